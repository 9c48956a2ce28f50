"""How SE's small network is read off a module, wherever it keeps it: the plan of a gate that is an MLP of the means.

    p = mean_s x,   gate = a + g(W2 act(norm(W1 p + b1)) + b2),   y = epilogue(x·gate + residual)

a is 0, or 1 where a module adds its input to what it gates. Children are named by paths ("fc.0"), and an activation
that a forward applies itself is `Given`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops import activations
from ..ops.pool_mlp_scale import pool_mlp_scale
from ..ops.pool_scale import pool_scale
from ..ops.shared_mlp import formula, shared_mlp
from ..plan import Plan, Refused, activation, fingerprint, path, tampered, vars_of
from .norms import keep, norm_of, norm_state


class Given(NamedTuple):
    """An activation that forward computes by a function: its name among the ops' activations."""

    name: str


_DENSE = ("torch.nn.modules.linear.Linear", *(f"torch.nn.modules.conv.Conv{d}d" for d in (1, 2, 3)))
# 1×1 convolutions that pad by themselves, which at this size is not at all: path, fingerprint of forward.
_SAME = {
    f"{where}.Conv2d{kind}SamePadding": known
    for where, versions in (
        ("efficientnet_pytorch.utils", ("f5d84ead5f09", "48085ffe6c95")),
        ("segmentation_models_pytorch.encoders._efficientnet", ("a70924afee8a", "d74b87f8ff61")),
    )
    for kind, known in zip(("Static", "Dynamic"), versions, strict=True)
}
_IDENTITY = "torch.nn.modules.linear.Identity"
_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_MEANS = {f"torch.nn.modules.pooling.AdaptiveAvgPool{d}d": d for d in (1, 2, 3)}
_OPEN = ("none", (None,) * 4, 1e-5)  # no norm


class ExcitePlan(Plan):
    """SE's small network.

    fc1, norm, act, fc2, gate: paths of the children, or what is given; None: there is none of this kind
    maxpool: name of the attribute that says whether the maximum is averaged in
    pool: path of the child that computes the mean; None: forward does
    offset: what is added to the gate
    idle: children that forward calls and that do nothing
    fixed: names of further attributes that decide which children there are
    """

    __slots__ = (
        "act", "act_place", "dim", "first", "gate", "gate_place", "max_weight", "norm", "offset", "second", "simple",
        "slope", "usual",
    )  # fmt: skip
    fits_tail = True
    opens = True

    def __init__(
        self,
        module: nn.Module,
        fc1: str,
        fc2: str | None,
        gate: str | Given,
        act: str | Given | None = None,
        norm: str | None = None,
        maxpool: str | None = None,
        pool: str | None = None,
        offset: float = 0.0,
        idle: Sequence[str] = (),
        fixed: Sequence[str] = (),
    ) -> None:
        names = [name for name in (pool, fc1, norm, act, fc2, gate, *idle) if isinstance(name, str)]
        super().__init__(
            module, [name for name in names if "." not in name], (*((maxpool,) if maxpool else ()), *fixed)
        )
        children = self._inside(module, names)
        self.dim = 4 if pool is None else 2 + _mean(self, pool, children[pool])
        for name in idle:
            if path(type(children[name])) != _IDENTITY:
                raise Refused(f"{name} is {children[name]!r}, where nothing is expected")
        self.first = dense(self, fc1, children[fc1])
        self.second = dense(self, fc2, children[fc2]) if fc2 else None
        channels = self.first["weight"].shape[1]
        outputs = (self.second or self.first)["weight"].shape[0]
        if outputs != channels or (self.second and self.second["weight"].shape[1] != self.first["weight"].shape[0]):
            raise Refused(f"the layers map {channels} channels to {outputs} gates")
        self.act, self.slope = "identity", 0.01
        if isinstance(act, Given):
            self.act = act.name
        elif act is not None:
            self.act, self.slope = activation(self, act, children[act], activations.ACTS)
        if isinstance(gate, Given):
            self.gate = gate.name
        else:
            self.gate, _ = activation(self, gate, children[gate], activations.GATES)
        self.act_place = (
            self.weights(act, children[act], False) if isinstance(act, str) and self.act == "prelu" else None
        )
        self.gate_place = (
            self.weights(gate, children[gate], False) if isinstance(gate, str) and self.gate == "prelu" else None
        )
        self.norm = norm_of(norm, children[norm]) if norm else None
        self.max_weight = 0.5 if maxpool and vars(module)[maxpool] else 0.0
        self.offset = offset
        self.simple = (
            fc2 is not None and self.norm is None and self.act_place is None and self.gate_place is None and not offset
        )
        if self.simple:
            self.usual = pool_mlp_scale.at(
                self.act, self.gate, self.slope, "none", 1e-5, self.max_weight, "split", "identity", 0.01
            )
        if offset and (self.norm or self.max_weight):
            raise Refused("a gate that the input is added to has a norm or a maximum, which no published form has")

    def _inside(self, module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
        """The children by path, in the order in which they are called. A container on the way holds no others, and may
        change neither them nor its forward."""
        found: dict[str, Any] = {}
        for name in names:
            within, *steps = name.split(".")
            child = vars(module)["_modules"].get(within)
            for step in steps:
                found.setdefault(within, child)
                if path(type(child)) != _SEQUENTIAL:
                    raise Refused(f"{within} is a {path(type(child))}, not a Sequential")
                child, within = vars(child)["_modules"].get(step), f"{within}.{step}"
            found[name] = child
        direct = vars(module)["_modules"].values()
        for name, child in found.items():
            if child is None:
                continue
            steps = [other[len(name) + 1 :].split(".")[0] for other in names if other.startswith(f"{name}.")]
            if steps:
                if list(vars(child)["_modules"]) != list(dict.fromkeys(steps)):
                    raise Refused(f"{name} is {child!r}, which holds another layer")
                self.fixed += ((vars(child), "_modules", dict(vars(child)["_modules"])),)
            if any(child is other for other, _, _ in self.skipped):
                continue
            assert "." in name or any(child is other for other in direct)
            if (why := tampered(child)) is not None:
                raise Refused(f"{name} {why}")
            self.skipped += ((child, type(child), vars(child)),)
        return found

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        first: dict[str, Any] = self.first
        second: Any = self.second
        if self.simple and epilogue == "identity":
            return self.usual(
                x, first["weight"], first["bias"], second["weight"], second["bias"],
                None, None, None, None, None, None, residual,
            )  # fmt: skip
        if self.offset:
            return pool_scale(x, self.network(), *self.tensors(), residual=residual, act=epilogue, slope=epilogue_slope)
        norm, state, eps = _OPEN if self.norm is None else norm_state(self.norm)
        out = pool_mlp_scale(
            x, first["weight"], first["bias"], *((second["weight"], second["bias"]) if second else (None, None)),
            *state, self.act_place and self.act_place["weight"], self.gate_place and self.gate_place["weight"],
            residual, self.act, self.gate, self.slope, norm, eps, self.max_weight, "split", epilogue, epilogue_slope,
        )  # fmt: skip
        if norm != "batch":
            return out
        y, statistics = out
        keep(self.norm, statistics, x.shape[0])  # type: ignore[arg-type]
        return y

    def means(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
        """The gate as a function of means (N, C), and its tensors; None where it depends on more than those."""
        return None if self.norm is not None or self.max_weight else (self.network(), self.tensors())

    def network(self) -> Callable[..., Tensor]:
        """`excite` of the layers as they are now: it runs again in backward, when FSDP has taken the weights away."""
        there = [place[name] is not None for place in (self.first, self.second) if place for name in ("weight", "bias")]
        return functools.partial(self.excite, there)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of a network without a norm, as `excite` takes them; those that there are."""
        places = (self.first, self.second, self.act_place, self.gate_place)
        dense = [place[name] for place in places[:2] if place for name in ("weight", "bias")]
        return tuple(t for t in (*dense, *(place["weight"] for place in places[2:] if place)) if t is not None)

    def excite(self, there: Sequence[bool], p: Tensor, *tensors: Tensor) -> Tensor:
        """a + gate of descriptors (N, C): the excite of `pool_scale`, by `tensors()`.

        there: which of the layers' weights and biases are among those
        """
        left = iter(tensors)
        layers = [next(left) if given else None for given in there]
        layers += [None] * (4 - len(layers))
        slopes = [next(left) if place else None for place in (self.act_place, self.gate_place)]
        # Compilers differentiate only what they can look into.
        mlp: Any = formula if is_compiling() else shared_mlp
        gate: Tensor = mlp(p, *layers, None, None, None, None, *slopes, self.act, self.gate, self.slope, "none", 1e-5)
        return self.offset + gate if self.offset else gate


def _mean(plan: Plan, name: str, child: nn.Module | None) -> int:
    """How many dimensions a pooling layer reduces to their mean. Raises Refused for another pooling layer."""
    dims = _MEANS.get(path(type(child)))
    if dims is None or plan.fix(child, "output_size") not in (1, (1,) * dims):  # type: ignore[arg-type]
        raise Refused(f"{name} is {child!r}, not an AdaptiveAvgPool of output size 1")
    return dims


def dense(plan: Plan, name: str, child: nn.Module | None, groups: int | None = 1) -> dict[str, Any]:
    """Where a dense layer keeps its weights. Raises Refused for any other layer.

    groups: how many it may have; None: any number
    """
    where = path(type(child))
    if where not in _DENSE and (child is None or fingerprint(type(child).forward) != _SAME.get(where)):
        raise Refused(f"{name} is a {where}, not a plain convolution or Linear")
    options = vars_of(child)
    if "kernel_size" in options:
        usual = all(k == 1 for k in (*options["kernel_size"], *options["stride"], *options["dilation"]))
        padding = options["padding"]
        if not usual or groups not in (None, options["groups"]) or not (isinstance(padding, str) or not any(padding)):
            raise Refused(f"{name} is {child!r}, not a plain 1×1 convolution")
        if groups is None:
            plan.fix(child, "groups")  # type: ignore[arg-type]
    assert child is not None
    padder = options["_modules"].get("static_padding")
    if padder is not None:
        if path(type(padder)) != _IDENTITY:
            raise Refused(f"{name} pads by {padder!r}")
        plan.fixed += ((options["_modules"], "static_padding", padder),)
    return plan.weights(name, child)
