"""Networks of the papers: one residual network, with attention where each paper puts it.

    gate      y = relu(attention(f(x)) + shortcut)          CBAM, Shuffle Attention, SGE: behind the last norm
    conv      f holds the attention in place of its 3×3     EPSANet, SKNet
    stage     y = attention(stage(x))                       BAM: behind each stage but the last
    shrink    y = shrinkage(f(x)) + shortcut                DRSN: pre-activated, behind the last convolution
    mask      y = unit((1 + mask(x))·trunk(x))              Residual Attention Network: whole modules of a stage

ResNet: He et al., arXiv:1512.03385; pre-activation: He et al., arXiv:1603.05027. `NETWORKS` is the table: where each
network's attention stands, its arguments, and whose names its parameters have. What follows a gate (the sum and ReLU)
runs in the gate's own pass. No weights come with the library.

What differs between published versions:
    mask      the authors' Caffe models add to a level of the decoder one residual unit of the encoder's map. pytorchcv
              and a PyTorch port also add that map itself, and the trunk to the last level: form="ports"
    size      the paper prints 31.9 and 51.3 million parameters for attention56 and 92; its table 2, built as written
              here and in pytorchcv, has 31.8 and 52.5
    32 px     the paper gives no table for CIFAR. Here the stem alone changes, 3×3 without stride and pooling, so that
              the masks' smallest map is 4×4; a port halves the widths and the depths of the masks (2, 1, 0) too
    DRSN      the paper's networks are 1-D with stages of other widths; the authors' code has one of three blocks,
              drsn18(layers=(1, 1, 1), planes=(16, 32, 32), small_input=True). TensorFlow pads a strided convolution
              at its end alone, PyTorch at both
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    BAM,
    CBAM,
    PyramidSqueezeAttention,
    ResidualAttention,
    SelectiveKernel,
    Shrinkage,
    ShuffleAttention,
    SpatialGroupEnhance,
)
from .blocks.chain import Joining, joined, weighed
from .blocks.residual_attention import AttentionMask, PreActivationUnit

__all__ = [
    "NETWORKS",
    "Network",
    "ResidualNetwork",
    "attention56",
    "attention92",
    "bam_resnet50",
    "cbam_resnet50",
    "drsn18",
    "drsn34",
    "epsanet50",
    "epsanet101",
    "sa_resnet50",
    "sge_resnet50",
    "sknet50",
]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MEAN = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_PLANES = (64, 128, 256, 512)


@dataclass(frozen=True)
class Network:
    """One line of the table.

    layers: blocks per stage; of "mask", attention modules of each stage but the last, which has three units
    where: as in the formulas above
    attribute: the name of the attention in its block, or in the network
    make: (channels, stride, **options) -> the attention
    paper, names: its source, and whose parameter names the network has
    width: of a bottleneck's inner channels, in units of its planes
    norm: whether a norm and ReLU stand behind the bottleneck's inner convolution
    zero_bias: whether every bias starts at zero, as the authors have it
    options: keyword arguments of `make` or of the blocks that a caller may change, with their defaults
    about: what the options mean
    """

    layers: tuple[int, ...]
    where: str
    attribute: str
    make: Callable[..., nn.Module]
    paper: str
    names: str
    width: int = 1
    norm: bool = True
    zero_bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    about: str = ""


class Bottleneck(Joining):
    """1×1, 3×3, 1×1 convolutions with norms, then the gate where there is one, the shortcut, and ReLU."""

    expansion = 4

    def __init__(self, network: Network, inplanes: int, planes: int, stride: int, **options: Any) -> None:
        super().__init__()
        width, out = planes * network.width, planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if network.where == "conv":
            self.add_module(network.attribute, network.make(width, stride, **options))
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width) if network.norm else None
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.gate: str | None = network.attribute if network.where == "gate" else None
        ahead = network.where == "conv" and network.norm  # of its norm
        self.joins = ("conv2",) if ahead else (self.gate,) if self.gate is not None else ()
        if self.gate is not None:
            self.add_module(self.gate, network.make(out, 1, **options))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4·planes, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = joined(self.bn1, None, self.conv1(x))
        x = self.conv2(x) if self.bn2 is None else weighed(self.conv2, self.bn2, x)
        gate = None if self.gate is None else self.get_submodule(self.gate)
        return joined(self.bn3, gate, self.conv3(x), shortcut)


class ShrinkageBlock(nn.Module):
    """Two convolutions of 3, each after a norm and ReLU, then the shrinkage and the shortcut.

    The shortcut has no parameters: every stride-th position, and zeros for the channels that aren't there, half of them
    in front and half behind, as in the authors' code.
    """

    expansion = 1

    def __init__(
        self, network: Network, inplanes: int, planes: int, stride: int, dims: int = 2, **options: Any
    ) -> None:
        super().__init__()
        if planes < inplanes:
            raise ValueError(f"planes must not shrink from stage to stage; got {planes} after {inplanes}")
        conv, norm = _CONV[dims - 1], _NORM[dims - 1]
        self.bn1 = norm(inplanes)
        self.conv1 = conv(inplanes, planes, 3, stride, 1)
        self.bn2 = norm(planes)
        self.conv2 = conv(planes, planes, 3, 1, 1)
        self.shrinkage = network.make(planes, 1, **options)
        self.stride, more = stride, planes - inplanes
        self.pad = (0, 0) * dims + (more // 2, more - more // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, *S) to (N, planes, *S/stride)."""
        shortcut = x
        if self.stride != 1:
            every = (slice(None), slice(None)) + (slice(None, None, self.stride),) * (x.dim() - 2)
            shortcut = shortcut[every]
        if any(self.pad):
            shortcut = F.pad(shortcut, self.pad)
        x = self.conv1(joined(self.bn1, None, x))
        x = self.conv2(joined(self.bn2, None, x))
        y: Tensor = self.shrinkage(x, shortcut)
        return y


class DoubleSkip(nn.Module):
    """x plus a residual unit of x: what ports put on a level of the mask, and so count x twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unit = PreActivationUnit(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), as x."""
        y: Tensor = x + self.unit(x)
        return y


def _masked(channels: int, depth: int, gate: str = "f1", form: str = "authors") -> nn.Module:
    """An attention module: a unit, the trunk of two units with its mask, a unit (p = 1, t = 2, r = 1)."""
    if form not in ("authors", "ports"):
        raise ValueError(f"form must be 'authors' or 'ports'; got {form!r}")
    ports = form == "ports"
    mask = AttentionMask(channels, depth, skip=DoubleSkip if ports else None)
    attention = ResidualAttention(channels, mask=mask, gate=gate, add_trunk=ports)
    return nn.Sequential(PreActivationUnit(channels), attention, PreActivationUnit(channels))


def _cbam(channels: int, stride: int, **options: Any) -> nn.Module:
    cbam = CBAM(channels, mlp_bias=True, order="max_mean", ties="first", layout="authors", **options)
    if not cbam.no_spatial:
        norm: Any = cbam.get_submodule("SpatialGate.spatial.bn")
        norm.momentum = 0.01
        nn.init.zeros_(norm.weight)  # so that this gate starts at ½ everywhere
    return cbam


def _sk(channels: int, stride: int, groups: int) -> nn.Module:
    return SelectiveKernel(
        channels, stride=stride, groups=groups, rd_channels=max(channels // 16, 32), split_input=False
    )


def _shrinkage(channels: int, stride: int, threshold: str, rd_ratio: float) -> nn.Module:
    return Shrinkage(channels, threshold, rd_channels=max(1, int(channels * rd_ratio)))


_EPSANET = Network(
    (3, 4, 6, 3), "conv", "conv2",
    lambda channels, stride, **options: PyramidSqueezeAttention(channels, channels, stride=stride, **options),
    "Zhang et al., EPSANet, https://arxiv.org/abs/2105.14447",
    "the authors' (https://github.com/murufeng/EPSANet)",
    options={"conv_kernels": (3, 5, 7, 9), "conv_groups": (1, 4, 8, 16)},
    about="conv_kernels, conv_groups: of the four convolutions",
)  # fmt: skip
_DRSN = Network(
    (2, 2, 2, 2), "shrink", "shrinkage", _shrinkage,
    "Zhao et al., Deep Residual Shrinkage Networks for Fault Diagnosis, https://doi.org/10.1109/TII.2019.2943898",
    "the library's own; the structure is that of the authors' TFLearn code "
    "(https://github.com/zhao62/Deep-Residual-Shrinkage-Networks), with the stages of ResNet",
    zero_bias=True, options={"threshold": "channel", "dims": 2, "rd_ratio": 0.25},
    about="""threshold: "channel" (DRSN-CW) | "shared" (DRSN-CS); dims: 1, 2 or 3 spatial dimensions
    rd_ratio: hidden width of a shrinkage over its channels: 1/4 in the authors' TFLearn code, 1 in the Keras code""",
)  # fmt: skip
_ATTENTION = Network(
    (1, 1, 1), "mask", "attention", _masked,
    "Wang et al., Residual Attention Network for Image Classification, https://arxiv.org/abs/1704.06904, table 2",
    "the library's own; the structure is that of the authors' Caffe models "
    "(https://github.com/fwang91/residual-attention-network)",
    options={"gate": "f1", "form": "authors"},
    about='gate: "f1" | "f2" | "f3", as in `ResidualAttention`; form: of the masks, "authors" | "ports"',
)  # fmt: skip

NETWORKS: dict[str, Network] = {
    "epsanet50": _EPSANET,
    "epsanet101": replace(_EPSANET, layers=(3, 4, 23, 3)),
    "cbam_resnet50": Network(
        (3, 4, 6, 3), "gate", "cbam", _cbam,
        "Woo et al., CBAM, https://arxiv.org/abs/1807.06521",
        "the authors' (https://github.com/Jongchan/attention-module)",
        zero_bias=True, options={"no_spatial": False},
        about="no_spatial: the channel gates alone",
    ),
    "bam_resnet50": Network(
        (3, 4, 6, 3), "stage", "bam",
        lambda channels, stride, **options: BAM(channels, layout="authors", **options),
        "Park et al., BAM, https://arxiv.org/abs/1807.06514",
        "the authors' (https://github.com/Jongchan/attention-module)",
        zero_bias=True, options={"merge": "product"},
        about='merge: "product" (the authors\' code) | "sum" (the paper)',
    ),
    "sknet50": Network(
        (3, 4, 6, 3), "conv", "conv2", _sk,
        "Li et al., Selective Kernel Networks, https://arxiv.org/abs/1903.06586",
        "ResNet's and, inside conv2, timm's; the authors published a Caffe model",
        width=2, norm=False, options={"groups": 32},
        about="groups: of each convolution",
    ),
    "sa_resnet50": Network(
        (3, 4, 6, 3), "gate", "sa", lambda channels, stride, **options: ShuffleAttention(channels, **options),
        "Zhang & Yang, SA-Net, https://arxiv.org/abs/2102.00240",
        "the authors' (https://github.com/wofmanaf/SA-Net)",
        options={"groups": 64}, about="groups: of the channels",
    ),
    "sge_resnet50": Network(
        (3, 4, 6, 3), "gate", "sge", lambda channels, stride, **options: SpatialGroupEnhance(**options),
        "Li et al., Spatial Group-wise Enhance, https://arxiv.org/abs/1905.09646",
        "the authors' (https://github.com/implus/PytorchInsight)",
        options={"groups": 64}, about="groups: of the channels",
    ),
    "drsn18": _DRSN,
    "drsn34": replace(_DRSN, layers=(3, 4, 6, 3)),
    "attention56": _ATTENTION,
    "attention92": replace(_ATTENTION, layers=(1, 2, 3)),
}  # fmt: skip


class ResidualNetwork(nn.Module):
    """The residual network of one line of the table.

    network: the line
    num_classes, in_chans: outputs, and channels of x
    layers: blocks per stage, None: as in the table; planes: widths of the stages, of which a bottleneck returns four
        times as many
    small_input: for maps of about 32 pixels: a stem of 3 without stride, and no max pool behind it
    options: those that the line has

    Raises TypeError for another option, ValueError for a value that is not to be had.
    """

    def __init__(
        self,
        network: Network,
        num_classes: int = 1000,
        in_chans: int = 3,
        layers: Sequence[int] | None = None,
        planes: Sequence[int] = _PLANES,
        small_input: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        given = network.layers if layers is None else tuple(layers)
        stages = len(given) + (network.where == "mask")
        if stages != len(planes) or min((*given, *planes), default=0) < 1:
            raise ValueError(
                f"layers and planes must be numbers from 1, one for each of {stages} stages; got layers={given}, "
                f"planes={tuple(planes)}"
            )
        for name, value in (("num_classes", num_classes), ("in_chans", in_chans)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}")
        if unknown := sorted(set(options) - set(network.options)):
            known = ", ".join(network.options)
            raise TypeError(f"options must be some of {known}; got {', '.join(unknown)}")
        options = network.options | options
        dims = options.get("dims", 2)
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3; got {dims!r}")
        shrink = network.where == "shrink"
        size, stride = (3, 1) if small_input else (7, 2)
        self.conv1 = _CONV[dims - 1](in_chans, planes[0], size, stride, size // 2, bias=shrink)
        self.bn1 = None if shrink else _NORM[dims - 1](planes[0])  # a shrinkage block begins with its own
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = None if small_input else _MAX_POOL[dims - 1](3, 2, 1)
        self.stages = stages
        channels = planes[0]
        for i in range(stages):
            step, last = 1 if i == 0 else 2, i == stages - 1
            if network.where == "mask":
                stage, channels = self._mask(network, channels, 4 * planes[i], step, given, i, options)
            else:
                block = ShrinkageBlock if shrink else Bottleneck
                own = {} if network.where == "stage" else options
                blocks = []
                for k in range(given[i]):
                    blocks.append(block(network, channels, planes[i], step if k == 0 else 1, **own))
                    channels = planes[i] * block.expansion
                stage = nn.Sequential(*blocks)
            self.add_module(f"layer{i + 1}", stage)
            if network.where == "stage" and not last:
                self.add_module(f"{network.attribute}{i + 1}", network.make(channels, 1, **options))
        self.behind = network.attribute if network.where == "stage" else None
        self.norm = _NORM[dims - 1](channels) if network.where in ("shrink", "mask") else None
        self.avgpool = _MEAN[dims - 1](1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(network)

    @staticmethod
    def _mask(
        network: Network, inplanes: int, out: int, stride: int, layers: Sequence[int], i: int, options: dict[str, Any]
    ) -> tuple[nn.Module, int]:
        """A stage of a Residual Attention Network: a unit that changes the shape, then its modules, the masks as deep
        as there are stages behind; three units in the last stage."""
        units: list[nn.Module] = [PreActivationUnit(inplanes, out, stride)]
        depth = len(layers) - i
        if depth:
            units += [network.make(out, depth, **options) for _ in range(layers[i])]
        else:
            units += [PreActivationUnit(out), PreActivationUnit(out)]
        return nn.Sequential(*units), out

    def _initialise(self, network: Network) -> None:
        """He initialisation of the convolutions, as in all the authors' code."""
        for name, module in self.named_modules():
            if isinstance(module, _CONV):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            bias = getattr(module, "bias", None)
            if network.zero_bias and isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)
            if network.zero_bias and name == "fc":
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map (N, C, *S/32), or *S/8 with small_input."""
        x = self.conv1(x)
        if self.bn1 is not None:
            x = self.relu(self.bn1(x))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for i in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{i}")(x)
            if self.behind is not None and i < self.stages:
                x = self.get_submodule(f"{self.behind}{i}")(x)
        if self.norm is not None:
            x = self.relu(self.norm(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of x (N, in_chans, *S)."""
        y: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return y


def _function(name: str) -> Callable[..., ResidualNetwork]:
    """The function that makes a network of the table."""
    network = NETWORKS[name]

    def make(num_classes: int = 1000, in_chans: int = 3, **options: Any) -> ResidualNetwork:
        return ResidualNetwork(network, num_classes, in_chans, **options)

    make.__name__ = make.__qualname__ = name
    channels = _PLANES[-1] if network.where == "shrink" else 4 * _PLANES[-1]
    size = "*S" if "dims" in network.options else "H, W"
    make.__doc__ = f"""{network.paper}

    x: (N, in_chans, {size}), made for 224×224; returns logits (N, num_classes).
    The last map, of which they are computed, has {channels} channels.
    Names of the parameters: {network.names}.

    num_classes, in_chans: outputs, and channels of x
    layers: blocks per stage, {network.layers}; planes: widths of the stages, {_PLANES}
    small_input: for 32×32: a stem of 3×3 without stride, and no max pool behind it
    {network.about}

    Raises TypeError for another option, ValueError for a value that is not to be had.
    """
    make.__doc__ = make.__doc__.rstrip(" ")
    return make


epsanet50 = _function("epsanet50")
epsanet101 = _function("epsanet101")
cbam_resnet50 = _function("cbam_resnet50")
bam_resnet50 = _function("bam_resnet50")
sknet50 = _function("sknet50")
sa_resnet50 = _function("sa_resnet50")
sge_resnet50 = _function("sge_resnet50")
drsn18 = _function("drsn18")
drsn34 = _function("drsn34")
attention56 = _function("attention56")
attention92 = _function("attention92")
