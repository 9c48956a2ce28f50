"""Tails: the residual add and the activation that follow a gate in a bottleneck, computed in the gate's own pass.

    y = act(gate(f(x)) + shortcut)

A parent is described by data: what its forward does before the gate, what stands in between, and what comes after.
There may be no activation, or no shortcut. A forward is rewritten only where the original's source is a known one and
nothing stands between gate, add and activation. Any mechanism's gate fits, as long as its plan runs a residual and an
epilogue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import activations
from ..plan import Plan, Planned, Refused, Rule, activation, path, ready, register, unfused

# Modules that may stand between gate and add: idle ones, and DropPath, which is idle in evaluation and at rate 0.
_IDLE = "torch.nn.modules.linear.Identity"
_DROP_PATH = "timm.layers.drop.DropPath"


Branch = Callable[[Any, Tensor], tuple[Any, "Tensor | None"]]


@dataclass(frozen=True)
class Tail:
    """The order of a parent's forward, by the names of its children.

    before: children called one after the other on x; or (module, x) -> what the gate gets, and the shortcut or None
    gate; act: the activation at the end, or None
    drop_path: child between gate and add, or None; downsample: child that makes the shortcut, where it isn't x itself
    inplace: the original adds in place, so that the sum has the gate's dtype whatever the shortcut's
    needs: attributes that must be true for the gate to be called
    after: (module, y, x) -> what forward returns, where it goes on after the activation
    """

    before: tuple[str, ...] | Branch
    gate: str
    act: str | None
    drop_path: str | None = None
    downsample: str = "downsample"
    inplace: bool = False
    needs: tuple[str, ...] = ()
    after: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def branch(self, module: Any, x: Tensor) -> tuple[Any, Tensor | None]:
        """What the gate gets, and the shortcut or None."""
        if callable(self.before):
            return self.before(module, x)
        children, shortcut = module._modules, x
        for name in self.before:
            x = children[name](x)
        if children.get(self.downsample) is not None:
            shortcut = children[self.downsample](shortcut)
        return x, shortcut


class TailPlan(Plan):
    """What a parent's rewritten forward relies on: gate, drop_path and activation are skipped."""

    __slots__ = ("drop_path", "epilogue", "slope", "tail")

    def __init__(self, module: nn.Module, tail: Tail) -> None:
        super().__init__(module, [n for n in (tail.gate, tail.act, tail.drop_path) if n is not None], tail.needs)
        children = module.__dict__["_modules"]
        gate = children.get(tail.gate)
        if gate is None or not all(vars(module)[name] for name in tail.needs):
            raise Refused(f"{tail.gate} is None, or isn't called")
        if isinstance(gate, Planned) and type(gate).forward is not type(gate).by_plan:
            raise Refused(f"{tail.gate} is a {path(type(gate))}, which overrides the forward that its plan replaces")
        self.tail = tail
        self.epilogue, self.slope = "identity", 0.01
        if tail.act is not None:
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
    if not (gate.traces or isinstance(cast(Any, x), Tensor)):
        return self.original.forward(self, x)
    given = x
    x, shortcut = tail.branch(self, x)
    if isinstance(x, Tensor) and (
        x.dim() != getattr(gate, "dim", 4)
        or (shortcut is not None and (x.dtype != shortcut.dtype or x.shape != shortcut.shape))
    ):
        beside = "there is none" if shortcut is None else f"{shortcut.dtype} {tuple(shortcut.shape)}"
        unfused(self, f"the shortcut is {beside}, the branch {x.dtype} {tuple(x.shape)}")
        x = children[tail.gate](x)
        if shortcut is not None:
            if tail.inplace:
                x += shortcut
            else:
                x = x + shortcut
        x = x if tail.act is None else children[tail.act](x)
    else:
        x = gate.run(x, shortcut, plan.epilogue, plan.slope)
    return x if tail.after is None else tail.after(self, x, given)


def _identity_conv(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """pytorchcv's residual units."""
    shortcut = self.identity_conv(x) if self.resize_identity else x
    return self.body(x), shortcut


def _pre_activated(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """pytorchcv's pre-activation units: the shortcut starts after the first activation, where it is resized."""
    out, activated = self.body(x)
    return out, self.identity_conv(activated) if self.resize_identity else x


def _fpenet(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shortcut = self.identity_conv(x) if self.resize_identity else x
    return self.conv2(self.block(self.conv1(x))), shortcut


def _cgnet(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    out = self.norm_activ(self.branches(self.conv1(x)))
    return (self.conv2(out), None) if self.down else (out, x)


def _monai(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shortcut = self.project(x)
    return self.conv3(self.conv2(self.conv1(x))), shortcut


def _byobnet(*names: str) -> Branch:
    """timm's ByobNet blocks: the shortcut may be left out."""

    def branch(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = x
        for name in names:
            out = getattr(self, name)(out)
        return out, None if self.shortcut is None else self.shortcut(x)

    return branch


def _branches(skip: str, scale: str, convs: str) -> Branch:
    """MobileOne: the sum of parallel convolutions, or the one that they were merged into."""

    def branch(self: Any, x: Tensor) -> tuple[Any, None]:
        if self.inference_mode if skip == "rbr_skip" else self.reparam_conv is not None:
            return self.reparam_conv(x), None
        skipped, scaled, many = getattr(self, skip), getattr(self, scale), getattr(self, convs)
        out: Any = (0 if scaled is None else scaled(x)) + (0 if skipped is None else skipped(x))
        for conv in many or ():
            out += conv(x)
        return out, None

    return branch


def _mobileone_of_byobnet(self: Any, x: Tensor) -> tuple[Any, None]:
    if self.reparam_conv is not None:
        return self.reparam_conv(x), None
    skipped: Any = 0 if self.identity is None else self.identity(x)
    out: Any = 0 if self.conv_scale is None else self.conv_scale(x)
    for conv in self.conv_kxk:
        out += conv(x)
    out = self.drop_path(out)
    out += skipped
    return out, None


def _repvgg(self: Any, x: Tensor) -> tuple[Tensor, None]:
    if self.reparam_conv is not None:
        return self.reparam_conv(x), None
    if self.identity is None:
        return self.conv_1x1(x) + self.conv_kxk(x), None
    skipped = self.identity(x)
    out = self.drop_path(self.conv_1x1(x) + self.conv_kxk(x))
    out += skipped
    return out, None


def _large_kernel(self: Any, x: Tensor) -> tuple[Tensor, None]:
    if self.reparam_conv is not None:
        return self.reparam_conv(x), None
    out = self.large_conv(x)
    return out if self.small_conv is None else out + self.small_conv(x), None


def _rexnet(self: Any, x: Tensor) -> tuple[Tensor, None]:
    return self.conv_dw(x if self.conv_exp is None else self.conv_exp(x)), None


def _after_rexnet(self: Any, y: Tensor, x: Tensor) -> Tensor:
    """The shortcut covers the first channels only."""
    y = self.conv_pwl(y)
    if not self.use_shortcut:
        return y
    if self.drop_path is not None:
        y = self.drop_path(y)
    c = self.in_channels
    return torch.cat([y[:, 0:c] + x, y[:, c:]], dim=1)


def _osa(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """VoVNet: every convolution's output is kept and all are joined."""
    kept = [x]
    out = x if self.conv_reduction is None else self.conv_reduction(x)
    out = self.conv_concat(self.conv_mid(out, kept))
    return out, kept[0] if self.residual else None


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
    _rule(
        "timm.models.byobnet.BasicBlock",
        ("f85fea15f3c3",),
        Tail(_byobnet("conv1_kxk", "attn", "conv2_kxk"), "attn_last", "act", "drop_path"),
    ),
    _rule(
        "timm.models.byobnet.BottleneckBlock",
        ("d9f6c639f01c",),
        Tail(
            _byobnet("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1"), "attn_last", "act", "drop_path"
        ),
    ),
    _rule("timm.models.byobnet.RepVggBlock", ("5ea58069f93e",), Tail(_repvgg, "attn", "act")),
    _rule("timm.models.byobnet.MobileOneBlock", ("6615dcef0da9",), Tail(_mobileone_of_byobnet, "attn", "act")),
    _rule(
        "timm.models.fastvit.MobileOneBlock",
        ("1b4fd3012fcb",),
        Tail(_branches("identity", "conv_scale", "conv_kxk"), "se", "act"),
    ),
    _rule("timm.models.fastvit.ReparamLargeKernelConv", ("a406311278c2",), Tail(_large_kernel, "se", "act")),
    _rule("timm.models.rexnet.LinearBottleneck", ("39056614428b",), Tail(_rexnet, "se", "act_dw", after=_after_rexnet)),
    _rule("timm.models.vovnet.OsaBlock", ("757430c19e12",), Tail(_osa, "attn", None, "drop_path")),
    _rule("pytorchcv.models.seresnet.SEResUnit", ("7399a29c629d",), Tail(_identity_conv, "se", "activ")),
    _rule("pytorchcv.models.seresnext.SEResNeXtUnit", ("7399a29c629d",), Tail(_identity_conv, "se", "activ")),
    _rule("pytorchcv.models.senet.SENetUnit", ("7399a29c629d",), Tail(_identity_conv, "se", "activ")),
    _rule(
        "pytorchcv.models.fastseresnet.FastSEResUnit",
        ("f5bb6301431e",),
        Tail(_identity_conv, "se", "activ", needs=("use_se",)),
    ),
    _rule("pytorchcv.models.sepreresnet.SEPreResUnit", ("b9934c30ee15",), Tail(_pre_activated, "se", None)),
    _rule("pytorchcv.models.fpenet.FPEUnit", ("c5dd73cc41c2",), Tail(_fpenet, "se", "activ", needs=("use_se",))),
    _rule("pytorchcv.models.cgnet.CGBlock", ("af340ddb15a2",), Tail(_cgnet, "se", None, inplace=True)),
    _rule(
        "monai.networks.blocks.squeeze_and_excitation.SEBlock",
        ("714e40542de1",),
        Tail(_monai, "se_layer", "act", inplace=True),
    ),
    _rule(
        "segmentation_models_pytorch.encoders._senet.Bottleneck",
        ("a96bd9f69763",),
        Tail((*_SENET, "conv3", "bn3"), "se_module", "relu"),
    ),
    _rule(
        "segmentation_models_pytorch.encoders.mobileone.MobileOneBlock",
        ("88db6e7bba76",),
        Tail(_branches("rbr_skip", "rbr_scale", "rbr_conv"), "se", "activation"),
    ),
)  # fmt: skip
