"""Residual attention: a trunk's output is scaled by one plus a mask of the same shape, which another branch computes.

    y = (1 + f(z))·T(x),   z = M(x)
    f1(z) = σ(z)                                      gate="f1", mixed attention: the paper's choice
    f2(z) = z / ‖z‖₂ over the channels                gate="f2", channel attention
    f3(z) = σ((z − mean) / std) over the positions    gate="f3", spatial attention

Wang et al., "Residual Attention Network for Image Classification", arXiv:1704.06904, eq. 3 and 5–7.

What differs between published versions:
    f2, f3    the paper gives neither an epsilon nor the divisor of the variance: here F.normalize's 1e-12, and the
              biased variance plus 1e-5, unless `eps` and `correction` say otherwise
    trunk     the paper's mask is the decoder's output alone; pytorchcv, and the stage classes of the usual PyTorch
              port, add the trunk's output to it before the last two convolutions (`add_trunk`)
    skip      a residual unit on each level of the encoder (paper); the identity plus such a unit (pytorchcv)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.map_scale import map_scale
from ..plan import Plan, Refused, Rule, author, fingerprint, path, ready, register, tampered, unfused
from ..registry import Block, case

GATES = {"f1": "none", "f2": "channels", "f3": "positions"}
_EPS = {"f1": 0.0, "f2": 1e-12, "f3": 1e-5}


class PreActivationUnit(nn.Module):
    """The residual unit of the paper's networks: the shortcut plus three convolutions, each after a norm and a ReLU.

    channels: of x; out_channels: of y, None for the same; stride: of the 3×3 convolution
    Where x's shape isn't y's, the shortcut is a 1×1 convolution of what went through the first norm and ReLU.
    """

    def __init__(self, channels: int, out_channels: int | None = None, stride: int = 1) -> None:
        super().__init__()
        out = out_channels or channels
        middle = max(1, out // 4)
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle), nn.ReLU(inplace=True), nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
            nn.BatchNorm2d(middle), nn.ReLU(inplace=True), nn.Conv2d(middle, out, 1, bias=False),
        )  # fmt: skip
        self.shortcut = None
        if stride != 1 or out != channels:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """shortcut(x) + body(x): (N, out_channels, H/stride, W/stride)."""
        if self.shortcut is None:
            return x + self.body(x)
        x = self.body[:2](x)
        y: Tensor = self.body[2:](x) + self.shortcut(x)
        return y


class AttentionMask(nn.Module):
    """The mask branch: an encoder and a decoder around it, ending in logits without an activation.

    channels: C
    depth: how often the map is halved
    units: residual units at each step, r in the paper
    unit, skip: channels -> module of C to C channels: the residual unit, and what a level's encoder map goes through
        before it is added to the decoder's (None: a unit)
    """

    def __init__(
        self,
        channels: int,
        depth: int = 2,
        units: int = 1,
        unit: Callable[[int], nn.Module] = PreActivationUnit,
        skip: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if depth < 1 or units < 1:
            raise ValueError(f"depth and units must be at least 1; got {depth} and {units}")
        sequence = lambda: nn.Sequential(*(unit(channels) for _ in range(units)))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.down = nn.ModuleList(sequence() for _ in range(depth))
        self.up = nn.ModuleList(sequence() for _ in range(depth))
        self.skip = nn.ModuleList((skip or unit)(channels) for _ in range(depth - 1))
        step = lambda: (nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1, bias=False))
        self.logits = nn.Sequential(*step(), *step())

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        """The logits (N, C, H, W) of x (N, C, H, W); trunk, of the same shape, is added before the convolutions."""
        levels = []
        for units in self.down:
            levels.append(x)
            x = units(self.pool(x))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            x = F.interpolate(x, size=levels[level].shape[2:], mode="bilinear", align_corners=True)
            if level:
                x = x + self.skip[level - 1](levels[level])
        if trunk is not None:
            x = x + trunk
        logits: Tensor = self.logits(x)
        return logits


class ResidualAttention(nn.Module):
    """Residual attention learning around any trunk and mask: y = (1 + f(mask(x)))·trunk(x).

    channels: C of the paper's trunk and mask, where one isn't given: two residual units, and an `AttentionMask`
    trunk: module of the branch that is scaled; mask: module of the logits, in the trunk's shape
    gate: "f1" (σ) | "f2" (unit length over the channels) | "f3" (σ of what is standardised over the positions)
    eps: the least norm that f2 divides by, or what f3 adds to the variance; None: 1e-12, 1e-5
    correction: f3's variance divides by the number of positions less this; 0 is the biased one
    add_trunk: hand the trunk's output to the mask, as its second argument
    depth: of the paper's mask, 3, 2, 1 from the first stage to the last

    Raises ValueError for another gate, or where neither channels nor a module is given.
    """

    def __init__(
        self,
        channels: int | None = None,
        trunk: nn.Module | None = None,
        mask: nn.Module | None = None,
        gate: str = "f1",
        eps: float | None = None,
        correction: float = 0.0,
        add_trunk: bool = False,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if channels is None and (trunk is None or mask is None):
            raise ValueError("channels must be given where trunk or mask isn't; got None")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}; got {gate!r}")
        self.trunk = trunk or nn.Sequential(PreActivationUnit(channels), PreActivationUnit(channels))  # type: ignore[arg-type]
        self.mask = mask or AttentionMask(channels, depth)  # type: ignore[arg-type]
        self.gate, self.eps, self.correction = gate, _EPS[gate] if eps is None else eps, correction
        self.add_trunk = add_trunk

    def forward(self, x: Tensor) -> Tensor:
        """y, in the trunk's shape and memory format, and in the wider dtype of trunk and mask, which differ under
        autocast.

        Raises ValueError where the mask's shape differs from the trunk's, TypeError where it isn't a floating tensor.
        """
        t = self.trunk(x)
        z = self.mask(x, t) if self.add_trunk else self.mask(x)
        if isinstance(t, Tensor) and isinstance(z, Tensor) and t.dtype != z.dtype and z.is_floating_point():
            wide = torch.promote_types(t.dtype, z.dtype)
            t, z = t.to(wide), z.to(wide)
        y: Tensor = map_scale(t, z, GATES[self.gate], self.eps, self.correction)
        return y

    def extra_repr(self) -> str:
        """The options, as printed."""
        return f"gate={self.gate!r}, eps={self.eps}, correction={self.correction}, add_trunk={self.add_trunk}"


# pytorchcv's AttBlock: its middle block ends in the sigmoid, and its forward goes on with (1 + mask)·trunk.
_MODELS = "pytorchcv.models.resattnet"
_MIDDLE = "d16e76e3d28d"


class _AttBlockPlan(Plan):
    """What the rewritten forward of an AttBlock relies on: it runs the middle block's convolutions, and not its
    sigmoid."""

    __slots__ = ("middle",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, ("middle_block",))
        middle: Any = vars(module)["_modules"]["middle_block"]
        if path(type(middle)) != f"{_MODELS}.MiddleAttBlock" or fingerprint(type(middle).forward) != _MIDDLE:
            raise Refused(f"middle_block is a {path(type(middle))}, of a version that isn't known")
        self.middle = vars(middle)["_modules"]
        sigmoid = self.middle.get("sigmoid")
        if path(type(sigmoid)) != "torch.nn.modules.activation.Sigmoid":
            raise Refused(f"middle_block.sigmoid is {sigmoid!r}, not a Sigmoid")
        if (why := tampered(sigmoid)) is not None:
            raise Refused(f"middle_block.sigmoid {why}")
        self.skipped += ((sigmoid, type(sigmoid), vars(sigmoid)),)
        self.fixed += ((self.middle, "sigmoid", sigmoid),)


def _forward(self: Any, x: Tensor) -> Tensor:
    """What an AttBlock's forward becomes: the same order, with σ and (1 + mask)·trunk in one pass."""
    plan: _AttBlockPlan | None = ready(self)  # type: ignore[assignment]
    if plan is None:
        return author(type(self)).forward(self, x)
    children, middle = self._modules, plan.middle
    x, trunk = children["hg"](children["init_blocks"](x))
    z = middle["conv2"](middle["conv1"](x))
    if z.dtype != trunk.dtype or z.shape != trunk.shape:
        unfused(self, f"the trunk is {trunk.dtype} {tuple(trunk.shape)}, the mask {z.dtype} {tuple(z.shape)}")
        y = (1 + torch.sigmoid(z)) * trunk
    else:
        y = map_scale(trunk, z)
    return children["final_block"](y)


RULES = register(Rule(f"{_MODELS}.AttBlock", _forward, _AttBlockPlan, {"forward": ("b753dd13a421",)}))


Block(
    name="residual_attention",
    module=ResidualAttention,
    paper="Wang et al., Residual Attention Network for Image Classification, https://arxiv.org/abs/1704.06904",
    ops=("map_scale",),
    rules=RULES,
    cases=(
        case(args={"channels": 16}, x=(2, 16, 12, 12)),
        case(args={"channels": 12, "gate": "f2", "depth": 1}, x=(2, 12, 7, 9)),
        case(args={"channels": 7, "gate": "f3", "depth": 1, "add_trunk": True}, x=(2, 7, 10, 5)),
        case(args={"trunk": nn.Identity(), "mask": nn.Identity(), "gate": "f3"}, x=(2, 5, 11)),
    ),
)
