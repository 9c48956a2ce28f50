"""The parents whose residual add and activation, and the BatchNorm before them, join a gate: what their forwards call.

The machinery is blocks/chain.py's. A forward whose order isn't a chain of children is a function here, of which the
gate and what follows it are fused, and a norm isn't.
"""

from typing import Any

import torch
from torch import Tensor

from ..plan import Rule, by_structure, register
from .chain import Branch, Tail, tail_rule


def _may_skip(self: Any, x: Tensor) -> Tensor | None:
    """timm's ByobNet blocks: drop_path is at work where there is no shortcut, too."""
    return None if self.shortcut is None else self.shortcut(x)


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


def _res2net(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Convolutions one after the other on slices of the channels, each with the last one's output added."""
    slices = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
    done: list[Tensor] = []
    for i, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=False)):
        alone = i == 0 or self.is_first
        done.append(self.relu(norm(conv(slices[i] if alone else done[-1] + slices[i]))))
    if self.scale > 1:
        done.append(slices[-1] if self.pool is None else self.pool(slices[-1]))
    out = self.bn3(self.conv3(self.drop_block(torch.cat(done, 1))))
    return out, x if self.downsample is None else self.downsample(x)


def _resnest(self: Any, x: Tensor) -> Tensor:
    """DropPath is on the shortcut, and only where that is resized; its random numbers are drawn in any case."""
    dropped = x if self.drop_path is None else self.drop_path(x)
    return x if self.downsample is None else self.downsample(dropped)


def _epsa(where: str) -> Rule:
    """EPSANet's bottleneck, the authors' (models/epsanet.py): the attention stands before its norm."""
    return tail_rule(where, ("5470e91340cb",), Tail((*_SENET, "conv3", "bn3"), None, "relu", inplace=True))


def _sa(where: str) -> Rule:
    """SA-Net's bottleneck, the authors' (models/sa_resnet.py)."""
    return tail_rule(where, ("5222324906b8",), Tail((*_SENET, "conv3", "bn3"), "sa", "relu", inplace=True))


_UNIT = (("body",), "se", "activ", None)
_SENET = ("conv1", "bn1", "relu", "conv2", "bn2", "relu")
TAILS = register(
    tail_rule(
        "timm.models.resnet.BasicBlock",
        ("8c4bf37a7512",),
        Tail(
            ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"), "se", "act2", "drop_path", inplace=True
        ),
    ),
    tail_rule(
        "timm.models.resnet.Bottleneck",
        ("314ebf9685c4",),
        Tail(
            ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"),
            "se", "act3", "drop_path", inplace=True,
        ),
    ),
    tail_rule(
        "timm.models.regnet.Bottleneck",
        ("57b9e3d67253",),
        Tail(("conv1", "conv2", "se", "conv3"), None, "act3", "drop_path", skip="downsample"),
    ),
    tail_rule(
        "timm.models._efficientnet_blocks.InvertedResidual",
        ("e3f368d39685",),
        Tail(
            ("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"),
            None, None, "drop_path", skip="has_skip",
        ),
    ),
    tail_rule(
        "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
        ("4608128c1de4",),
        Tail(
            ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"),
            None, None, "drop_path", skip="has_skip",
        ),
    ),
    tail_rule(
        "torchvision.models.efficientnet.MBConv",
        ("ec96aad57794",),
        Tail(("block",), None, None, "stochastic_depth", skip="use_res_connect", inplace=True),
    ),
    tail_rule(
        "torchvision.models.mobilenetv3.InvertedResidual",
        ("e27a2681f293",),
        Tail(("block",), None, None, skip="use_res_connect", inplace=True),
    ),
    tail_rule(
        "torchvision.models.regnet.ResBottleneckBlock",
        ("d618784d76a3",),
        Tail(("f",), None, "activation", downsample="proj"),
    ),
    tail_rule(
        "torchvision.models.resnet.BasicBlock",
        ("b5adcc3aab81",),
        Tail(("conv1", "bn1", "relu", "conv2", "bn2"), None, "relu", inplace=True),
    ),
    tail_rule(
        "torchvision.models.resnet.Bottleneck",
        ("e203fe278a54",),
        Tail((*_SENET, "conv3", "bn3"), None, "relu", inplace=True),
    ),
    tail_rule("timm.models.senet.Bottleneck", ("73fb28c2610d",), Tail((*_SENET, "conv3", "bn3"), "se_module", "relu")),
    tail_rule("timm.models.senet.SEResNetBlock", ("2de9b5e21b05",), Tail(_SENET, "se_module", "relu")),
    tail_rule("timm.models.tresnet.BasicBlock", ("2b3b2c784644",), Tail(("conv1", "conv2"), "se", "act", "drop_path")),
    tail_rule(
        "timm.models.byobnet.BasicBlock",
        ("f85fea15f3c3",),
        Tail(("conv1_kxk", "attn", "conv2_kxk"), "attn_last", "act", "drop_path", _may_skip),
    ),
    tail_rule(
        "timm.models.byobnet.BottleneckBlock",
        ("d9f6c639f01c",),
        Tail(
            ("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1"), "attn_last", "act", "drop_path",
            _may_skip,
        ),
    ),
    tail_rule(
        "timm.models.byobnet.DarkBlock",
        ("3e968f1c61b2",),
        Tail(("conv1_1x1", "attn", "conv2_kxk"), "attn_last", "act", "drop_path", _may_skip),
    ),
    tail_rule(
        "timm.models.byobnet.EdgeBlock",
        ("af4765dcfda7",),
        Tail(("conv1_kxk", "attn", "conv2_1x1"), "attn_last", "act", "drop_path", _may_skip),
    ),
    tail_rule("timm.models.byobnet.RepVggBlock", ("5ea58069f93e",), Tail(_repvgg, "attn", "act")),
    tail_rule("timm.models.byobnet.MobileOneBlock", ("6615dcef0da9",), Tail(_mobileone_of_byobnet, "attn", "act")),
    tail_rule(
        "timm.models.fastvit.MobileOneBlock",
        ("1b4fd3012fcb",),
        Tail(_branches("identity", "conv_scale", "conv_kxk"), "se", "act"),
    ),
    tail_rule("timm.models.fastvit.ReparamLargeKernelConv", ("a406311278c2",), Tail(_large_kernel, "se", "act")),
    tail_rule(
        "timm.models.rexnet.LinearBottleneck",
        ("39056614428b",),
        Tail(_rexnet, "se", "act_dw", after=_after_rexnet),
    ),
    tail_rule(
        "timm.models.res2net.Bottle2neck",
        ("c7e0edddd70e",),
        Tail(_res2net, "se", "relu", "drop_path", inplace=True),
    ),
    tail_rule(
        "timm.models.sknet.SelectiveKernelBasic",
        ("c12022b87760",),
        Tail(("conv1", "conv2"), "se", "act", "drop_path", inplace=True),
    ),
    tail_rule(
        "timm.models.sknet.SelectiveKernelBottleneck",
        ("0d8f2731e1de",),
        Tail(("conv1", "conv2", "conv3"), "se", "act", "drop_path", inplace=True),
    ),
    tail_rule(
        "timm.models.resnest.ResNestBottleneck",
        ("6e2335d64546",),
        Tail(
            (
                "conv1", "bn1", "act1", "avd_first", "conv2", "bn2", "drop_block", "act2", "avd_last", "conv3", "bn3",
            ),
            None, "act3", downsample=_resnest, inplace=True,
        ),
    ),
    tail_rule("timm.models.vovnet.OsaBlock", ("757430c19e12",), Tail(_osa, "attn", None, "drop_path")),
    tail_rule("pytorchcv.models.resnet.ResUnit", ("aba339d01e51",), Tail(*_UNIT, "identity_conv")),
    tail_rule("pytorchcv.models.resnext.ResNeXtUnit", ("aba339d01e51",), Tail(*_UNIT, "identity_conv")),
    tail_rule("pytorchcv.models.seresnet.SEResUnit", ("7399a29c629d",), Tail(*_UNIT, "identity_conv")),
    tail_rule("pytorchcv.models.seresnext.SEResNeXtUnit", ("7399a29c629d",), Tail(*_UNIT, "identity_conv")),
    tail_rule("pytorchcv.models.senet.SENetUnit", ("7399a29c629d",), Tail(*_UNIT, "identity_conv")),
    tail_rule(
        "pytorchcv.models.fastseresnet.FastSEResUnit",
        ("f5bb6301431e",),
        Tail(*_UNIT, "identity_conv", needs=("use_se",)),
    ),
    tail_rule("pytorchcv.models.sepreresnet.SEPreResUnit", ("b9934c30ee15",), Tail(_pre_activated, "se", None)),
    tail_rule("pytorchcv.models.fpenet.FPEUnit", ("c5dd73cc41c2",), Tail(_fpenet, "se", "activ", needs=("use_se",))),
    tail_rule("pytorchcv.models.cgnet.CGBlock", ("af340ddb15a2",), Tail(_cgnet, "se", None, inplace=True)),
    tail_rule(
        "monai.networks.blocks.squeeze_and_excitation.SEBlock",
        ("714e40542de1",),
        Tail(_monai, "se_layer", "act", inplace=True),
    ),
    tail_rule(
        "segmentation_models_pytorch.encoders._senet.Bottleneck",
        ("a96bd9f69763",),
        Tail((*_SENET, "conv3", "bn3"), "se_module", "relu"),
    ),
    tail_rule(
        "segmentation_models_pytorch.encoders.mobileone.MobileOneBlock",
        ("88db6e7bba76",),
        Tail(_branches("rbr_skip", "rbr_scale", "rbr_conv"), "se", "activation"),
    ),
)  # fmt: skip
TAILS += register(*(_epsa(f"{where}.EPSABlock") for where in ("models.epsanet", "epsanet", "EPSANet.models.epsanet")))
by_structure("EPSABlock", _epsa)
TAILS += register(*(_sa(f"{where}.SABottleneck") for where in ("models.sa_resnet", "sa_resnet")))
by_structure("SABottleneck", _sa)
