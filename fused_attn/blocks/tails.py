"""Tails: the residual add and the activation that follow a gate in a bottleneck, computed in the gate's own pass.

    y = act(gate(f(x)) + shortcut)

A parent is described by data: what its forward calls before the gate, what stands in between, and what comes after.
Its forward is rewritten only where the original's source is a known one and nothing stands between gate, add and
activation. Any mechanism's gate fits, as long as its plan runs a residual and an epilogue.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops import activations
from ..plan import Plan, Planned, Refused, Rule, activation, path, ready, register, unfused

# Modules that may stand between gate and add: idle ones, and DropPath, which is idle in evaluation and at rate 0.
_IDLE = "torch.nn.modules.linear.Identity"
_DROP_PATH = "timm.layers.drop.DropPath"


@dataclass(frozen=True)
class Tail:
    """The order of a parent's forward, by the names of its children.

    before: called one after the other on x; gate; act: the activation at the end
    drop_path: child between gate and add, or None; downsample: child that makes the shortcut, where it isn't x itself
    inplace: the original adds in place, so that the sum has the gate's dtype whatever the shortcut's
    """

    before: tuple[str, ...]
    gate: str
    act: str
    drop_path: str | None = None
    downsample: str = "downsample"
    inplace: bool = False


class TailPlan(Plan):
    """What a parent's rewritten forward relies on: gate, drop_path and activation are skipped."""

    __slots__ = ("drop_path", "epilogue", "slope", "tail")

    def __init__(self, module: nn.Module, tail: Tail) -> None:
        skipped = (tail.gate, tail.act) if tail.drop_path is None else (tail.gate, tail.act, tail.drop_path)
        super().__init__(module, skipped)
        children = module.__dict__["_modules"]
        gate = children.get(tail.gate)
        if gate is None:
            raise Refused(f"{tail.gate} is None")
        if isinstance(gate, Planned) and type(gate).forward is not type(gate).by_plan:
            raise Refused(f"{tail.gate} is a {path(type(gate))}, which overrides the forward that its plan replaces")
        self.tail = tail
        self.epilogue, self.slope = activation(self, tail.act, children[tail.act], activations.EPILOGUES)
        between = children.get(tail.drop_path) if tail.drop_path else None
        self.drop_path = None
        if between is not None and path(type(between)) != _IDLE:
            if path(type(between)) != _DROP_PATH:
                raise Refused(f"{tail.drop_path} is a {path(type(between))}")
            self.drop_path = vars(between)

    def drops(self) -> bool:
        """Whether DropPath is at work."""
        drop = self.drop_path
        return drop is not None and drop["training"] and drop["drop_prob"] > 0


def _extracting(x: Any) -> bool:
    """Whether torchvision's or timm's feature extractor traces: its users may ask for the gate, the sum, the activation
    by name, so each must be a node of its own."""
    return not isinstance(x, Tensor) and any(
        cls.__name__ == "NodePathTracer" for cls in type(getattr(x, "tracer", None)).__mro__
    )


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a parent's forward becomes: the original's order up to the gate, one op for the rest."""
    plan: TailPlan | None = ready(self)  # type: ignore[assignment]
    if plan is None or (type(x) is not Tensor and _extracting(x)):
        return self.original.forward(self, x)
    tail, children = plan.tail, self._modules
    gate = ready(children[tail.gate])
    if gate is None or plan.drops():
        unfused(self, "its gate runs unfused" if gate is None else "drop_path stands between gate and add")
        return self.original.forward(self, x)
    shortcut = x
    for name in tail.before:
        x = children[name](x)
    if children.get(tail.downsample) is not None:
        shortcut = children[tail.downsample](shortcut)
    if isinstance(x, Tensor) and (x.dtype != shortcut.dtype or x.shape != shortcut.shape or x.dim() != 4):
        unfused(
            self, f"the shortcut is {shortcut.dtype} {tuple(shortcut.shape)}, the branch {x.dtype} {tuple(x.shape)}"
        )
        x = children[tail.gate](x)
        if tail.inplace:
            x += shortcut
        else:
            x = x + shortcut
        return children[tail.act](x)
    return gate.run(x, shortcut, plan.epilogue, plan.slope)


def _rule(where: str, sources: tuple[str, ...], tail: Tail) -> Rule:
    return Rule(where, _forward, lambda module: TailPlan(module, tail), {"forward": sources}, tail)


_SENET = ("conv1", "bn1", "relu", "conv2", "bn2", "relu")
TAILS = register(
    _rule(
        "timm.models.resnet.BasicBlock",
        ("8c4bf37a7512",),
        Tail(
            ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"), "se", "act2", "drop_path", inplace=True
        ),
    ),
    _rule(
        "timm.models.resnet.Bottleneck",
        ("314ebf9685c4",),
        Tail(
            ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"),
            "se", "act3", "drop_path", inplace=True,
        ),
    ),
    _rule("timm.models.senet.Bottleneck", ("73fb28c2610d",), Tail((*_SENET, "conv3", "bn3"), "se_module", "relu")),
    _rule("timm.models.senet.SEResNetBlock", ("2de9b5e21b05",), Tail(_SENET, "se_module", "relu")),
    _rule("timm.models.tresnet.BasicBlock", ("2b3b2c784644",), Tail(("conv1", "conv2"), "se", "act", "drop_path")),
)  # fmt: skip
