"""Selective kernels: convolutions of several sizes, weighed against each other for every channel.

    U_i = act(norm(conv_i(x))),   p = mean_s Σ_i U_i,   z = relu(norm(W1 p)),   a = softmax_i(W2 z),   y = Σ_i a_i·U_i

Li et al., "Selective Kernel Networks", arXiv:1903.06586, eq. 1–6.

What differs between published versions:
    input     every convolution sees x (paper, Caffe, pytorchcv); each sees its share of x's channels (timm, by default)
    width     max(C/16, 32) (paper, Caffe, pytorchcv, which takes the block's input for C); C/16 to a multiple of 8
              (timm)
    kernels   3×3 and 3×3 dilated (Caffe, timm, pytorchcv); dense 3×3 and 3×3 in 32 groups (PytorchInsight, which has
              the mechanism in its bottleneck's forward): kernel_size=3, groups=(1, 32)
    W1, W2    no bias in the authors' Caffe model, timm and pytorchcv; W2's rows are branch-major
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.branch_pool import branch_pool
from ..plan import Plan, Refused, Rule, by_structure, ready, register, run_original
from ..registry import Block, case
from .competing import NORMS, Competing, Head, convolution, divisible, foreign, known
from .norms import keep

_ATTENTION = "timm.layers.selective_kernel.SelectiveKernelAttn", "76e3253b98e9"
_CONCURRENT = "pytorchcv.models.common.arch.Concurrent", "5fbc48c13294"
_CONV_BLOCK = "pytorchcv.models.common.conv.ConvBlock", "234ab5542f9c"


class _Paths(Head):
    """timm's: `paths` are called one by one, `attn` is the head."""

    __slots__ = ("paths", "share")

    def __init__(self, module: nn.Module, attention: tuple[str, ...] | None) -> None:
        Plan.__init__(self, module, ("attn",), ("num_paths", "in_channels", "split_input"))
        children: dict[str, Any] = vars(module)["_modules"]
        attn, self.paths = children["attn"], children["paths"]
        if attention is not None:
            known(attn, "attn", *attention)
        inner = Plan(attn, ("fc_reduce", "bn", "act", "fc_select"), ("num_paths",) if attention else ())
        self.inner = ((attn, inner),)
        self.read(inner, "fc_reduce", "fc_select", "act", "bn", None, vars(attn)["_modules"])
        count = vars(module)["num_paths"]
        if len(self.paths) != count:
            raise Refused(f"num_paths is {count}, and there are {len(self.paths)} paths")
        if self.groups != 1:
            raise Refused(f"the layers of attn have {self.groups} groups")
        self.outputs(count)
        self.share = vars(module)["in_channels"] // count if vars(module)["split_input"] else None

    def weigh(self, x: Tensor) -> Tensor:
        paths = list(self.paths)
        parts = [x] * len(paths) if self.share is None else torch.split(x, self.share, 1)
        return self.softmax([path(part) for path, part in zip(paths, parts, strict=False)])


class _Concurrent(Head):
    """pytorchcv's: the children of `branches` are called one by one, fc1 is a convolution with its norm."""

    __slots__ = ("paths",)

    def __init__(self, module: nn.Module) -> None:
        Plan.__init__(self, module, ("branches", "pool", "fc1", "fc2", "softmax"), ("num_branches", "out_channels"))
        children: dict[str, Any] = vars(module)["_modules"]
        self.paths = known(children["branches"], "branches", *_CONCURRENT)
        if (self.fix(self.paths, "merge_type"), self.fix(self.paths, "axis")) != ("stack", 1):
            raise Refused("branches are not stacked")
        self.inner = ()
        self.usual(self, children, "pool", "softmax")
        first = known(children["fc1"], "fc1", *_CONV_BLOCK)
        inner = Plan(first, ("conv", "bn", "activ"))
        if [inner.fix(first, name) for name in ("use_pad", "normalize", "activate")] != [False, True, True]:
            raise Refused("fc1 is not a convolution, a norm and an activation")
        self.inner = ((first, inner),)
        layers = {**vars(first)["_modules"], "fc2": children["fc2"]}
        self.read(inner, "conv", "fc2", "activ", "bn", None, layers)
        if self.groups != 1:
            raise Refused(f"fc1 and fc2 have {self.groups} groups")
        count = vars(module)["num_branches"]
        if len(self.paths) != count:
            raise Refused(f"num_branches is {count}, and there are {len(self.paths)} branches")
        self.outputs(count)

    def weigh(self, x: Tensor) -> Tensor:
        return self.softmax([branch(x) for branch in self.paths])


class _Inline(Head):
    """PytorchInsight's bottleneck, whose own forward holds the mechanism: two branches behind one convolution."""

    __slots__ = ("layers",)

    def __init__(self, module: nn.Module) -> None:
        Plan.__init__(self, module, ("avg_pool", "conv_fc1", "bn_fc1", "conv_fc2"), ("D",))
        self.layers: dict[str, Any] = vars(module)["_modules"]
        self.inner = ()
        self.usual(self, self.layers, "avg_pool", None)
        # The head's ReLU is a function, whatever the child `relu` is.
        self.read(self, "conv_fc1", "conv_fc2", "act", "bn_fc1", None, {**self.layers, "act": nn.ReLU()})
        if self.groups != 1:
            raise Refused(f"conv_fc1 and conv_fc2 have {self.groups} groups")
        self.outputs(2)
        if vars(module)["D"] != self.channels:
            raise Refused(f"D is {vars(module)['D']}, and conv_fc1 takes {self.channels} channels")

    def weigh(self, x: Tensor) -> Tensor:
        layers = self.layers
        relu, downsample = layers["relu"], layers.get("downsample")
        y = relu(layers["bn1"](layers["conv1"](x)))
        y = self.softmax([relu(layers[f"bn2{g}"](layers[f"conv2{g}"](y))) for g in ("", "g")])
        y = layers["bn3"](layers["conv3"](y))
        y += x if downsample is None else downsample(x)
        return relu(y)


class _Weights(Head):
    """timm's attention by itself: branches (N, B, C, H, W) in, their weights (N, B, C, 1, 1) out."""

    __slots__ = ("count",)
    fits_tail = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "fc_reduce", "fc_select", "act", "bn", fixed=("num_paths",))
        self.count = vars(module)["num_paths"]
        if self.groups != 1:
            raise Refused(f"the layers have {self.groups} groups")
        self.outputs(self.count)

    def weigh(self, x: Tensor) -> Tensor:
        excite, given = self.excite()
        out = excite(branch_pool(x.flatten(1, 2), splits=self.count), *given)
        logits, *statistics = out if isinstance(out, tuple) else (out,)
        if statistics:
            keep(self.norm, statistics[0], x.shape[0])  # type: ignore[arg-type]
        weights = torch.softmax(logits.unflatten(1, (self.count, -1)), 1).to(x.dtype)
        return weights[..., None, None]


def _weights(self: Any, x: Tensor) -> Tensor:
    """What the attention's forward becomes; what isn't (N, num_paths, C, H, W) is left to its own, which raises."""
    plan: Any = ready(self)
    if plan is None or not isinstance(x, Tensor) or x.dim() != 5 or x.shape[1] != plan.count:
        return run_original(self, plan, x)
    return cast(Tensor, plan.weigh(x))


class _Attention(nn.Module):
    """The head: from the mean of the sum of branches to their gates (N, B, C)."""

    def __init__(self, channels: int, count: int, hidden: int, norm_layer: Any, **where: Any) -> None:
        super().__init__()
        self.fc_reduce = nn.Conv2d(channels, hidden, 1, bias=False, **where)
        self.bn = norm_layer(hidden, **where)
        self.act = nn.ReLU(inplace=True)
        self.fc_select = nn.Conv2d(hidden, channels * count, 1, bias=False, **where)

    def forward(self, p: Tensor, count: int) -> Tensor:
        logits = self.fc_select(self.act(self.bn(self.fc_reduce(p[..., None, None]))))
        return torch.softmax(logits.reshape(p.shape[0], count, -1), 1)


class SelectiveKernel(Competing):
    """Selective-kernel convolution of feature maps (N, C, *S), with timm's arguments and state_dict keys.

    in_channels, out_channels: of x and of y; None: the same
    kernel_size: of each convolution, a list; None: 3 and 5; a number: two of it
    stride, dilation: of all convolutions; groups: of all, or of each, a list
    rd_ratio, rd_channels, rd_divisor: the head's width, rd_channels or rd_ratio·out_channels rounded to a multiple of
        rd_divisor
    keep_3x3: kernels of 3, and a dilation in place of a larger size
    split_input: each convolution sees its share of x's channels, not x
    act_layer, norm_layer: classes, after each convolution; the head has ReLU and nn.BatchNorm2d, as timm's
    dims: 1, 2 or 3 spatial dimensions

    Raises ValueError for channels that can't be shared out, more than 8 kernels, or a norm of the wrong kind.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int | Sequence[int] = 1,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
        act_layer: Any = nn.ReLU,
        norm_layer: Any = None,
        dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        out_channels = out_channels or in_channels
        sizes = [3, 5] if kernel_size is None else [kernel_size] * 2 if isinstance(kernel_size, int) else kernel_size
        if any(k < 3 or k % 2 == 0 for k in sizes):
            raise ValueError(f"kernel_size must hold odd numbers from 3; got {kernel_size!r}")
        shares = [groups] * len(sizes) if isinstance(groups, int) else list(groups)
        if len(shares) != len(sizes):
            raise ValueError(f"groups must be a number, or one for each of {len(sizes)} kernels; got {groups!r}")
        if split_input and in_channels % len(sizes):
            raise ValueError(f"in_channels must be a multiple of {len(sizes)}, the paths; got {in_channels}")
        self.num_paths, self.in_channels, self.out_channels = len(sizes), in_channels, out_channels
        self.split_input, self.dims = split_input, dims
        conv = convolution(dims)
        norm = norm_layer or NORMS[dims]
        self.paths = nn.ModuleList()
        for size, share in zip(sizes, shares, strict=True):
            spread, kernel = (dilation * (size - 1) // 2, 3) if keep_3x3 else (dilation, size)
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            layers["conv"] = conv(
                in_channels // len(sizes) if split_input else in_channels, out_channels, kernel, stride=stride,
                padding=(stride - 1 + spread * (kernel - 1)) // 2, dilation=spread, groups=min(out_channels, share),
                bias=False, **where,
            )  # fmt: skip
            layers["bn"] = norm(out_channels, **where)
            layers["act"] = act_layer()
            self.paths.append(nn.Sequential(layers))
        hidden = rd_channels or divisible(out_channels * rd_ratio, rd_divisor)
        self.attn = _Attention(out_channels, len(sizes), hidden, nn.BatchNorm2d, **where)
        self._finish()

    def _plan(self) -> Plan:
        return _Paths(self, None)

    def takes(self) -> tuple[int, int]:
        return self.in_channels, self.dims

    def equations(self, x: Tensor) -> Tensor:
        share = self.in_channels // self.num_paths
        parts = torch.split(x, share, 1) if self.split_input else [x] * self.num_paths
        maps = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=False)], 1)
        gates = self.attn(maps.sum(1).flatten(2).mean(-1), self.num_paths)
        return (maps * gates.reshape(gates.shape + (1,) * (maps.dim() - 3))).sum(1)


def _insight(where: str) -> Rule:
    return Rule(where, foreign, _Inline, {"forward": ("b26dd5d3b3d1",)})


RULES = register(
    Rule(
        "timm.layers.selective_kernel.SelectiveKernel",
        foreign,
        lambda module: _Paths(module, _ATTENTION),
        {"forward": ("cb6194c02e4c",)},
    ),
    Rule(_ATTENTION[0], _weights, _Weights, {"forward": _ATTENTION[1:]}, alone=True),
    Rule("pytorchcv.models.sknet.SKConvBlock", foreign, _Concurrent, {"forward": ("66ce90d5d388",)}),
    # implus/PytorchInsight is no package: its class is named by wherever the file is imported from.
    *(
        _insight(f"{where}resnet_sk.Bottleneck")
        for where in ("models.imagenet.", "classification.models.imagenet.", "")
    ),
)
by_structure("Bottleneck", _insight)

Block(
    name="selective_kernel",
    module=SelectiveKernel,
    paper="Li et al., Selective Kernel Networks, https://arxiv.org/abs/1903.06586",
    ops=("branch_softmax",),
    rules=RULES,
    cases=(
        case(args={"in_channels": 16}, x=(4, 16, 7, 7)),
        case(args={"in_channels": 12, "out_channels": 17, "split_input": False}, x=(3, 12, 9, 5)),
        case(
            args={
                "in_channels": 24, "kernel_size": [3, 5, 7], "stride": 2, "groups": 2, "rd_channels": 5,
                "keep_3x3": False, "act_layer": nn.SiLU,
            },
            x=(3, 24, 11, 8),
        ),
        case(args={"in_channels": 8, "dims": 1, "dilation": 2, "rd_ratio": 0.5, "rd_divisor": 2}, x=(3, 8, 13)),
        case(args={"in_channels": 8, "dims": 3, "kernel_size": 3}, x=(2, 8, 4, 3, 5)),
    ),
)  # fmt: skip
