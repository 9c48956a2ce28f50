"""A plan over children of children: what stands between a module and the layers it skips is compared as well."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..plan import Plan, Refused, author, fingerprint, path, tampered


class DeepPlan(Plan):
    """A plan whose children have dotted names.

    inner: modules between the module and its layers: name -> (class, fingerprint of its forward, or "" for any)
    """

    __slots__ = ("nested",)

    def __init__(self, module: nn.Module, inner: dict[str, tuple[str, str]], fixed: Iterable[str] = ()) -> None:
        super().__init__(module, (), fixed)
        self.nested: tuple[tuple[dict[str, Any], tuple[Any, ...]], ...] = ()
        for name, (where, source) in inner.items():
            child = self.skip(module, name)
            cls: Any = author(type(child))
            if path(cls) != where or (source and fingerprint(cls.forward) != source):
                raise Refused(f"{name} is a {path(type(child))} that isn't known")

    def skip(self, module: nn.Module, name: str) -> nn.Module:
        """The child of a dotted name, which from now on is compared. Raises Refused where something hangs on it."""
        child: Any = module
        for part in name.split("."):
            child = vars(child)["_modules"].get(part)
            if child is None:
                raise Refused(f"{name} is None")
        if (why := tampered(child)) is not None:
            raise Refused(f"{name} {why}")
        self.skipped += ((child, type(child), vars(child)),)
        children = vars(child)["_modules"]
        self.nested += ((children, tuple(children.values())),)
        return child

    def pooling(self, module: nn.Module, name: str, where: str) -> None:
        """A pooling layer of output size 1. Raises Refused for any other."""
        child = self.skip(module, name)
        if path(type(child)) != where or self.fix(child, "output_size") not in (1, (1, 1)):
            raise Refused(f"{name} is {child!r}, not of output size 1")

    def intact(self, attributes: dict[str, Any]) -> bool:
        for children, before in self.nested:
            if tuple(children.values()) != before:
                return False
        return super().intact(attributes)
