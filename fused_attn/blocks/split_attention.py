"""Split attention: the splits of one convolution, weighed against each other for every channel, in groups.

    x = act(norm(conv(x))) = [x_1 … x_R],   p = mean_s Σ_r x_r,   z = act(norm(W1 p + b1)),   a = softmax_r(W2 z + b2)
    y = Σ_r a_r·x_r;   for R = 1, a = sigmoid(W2 z + b2)

Zhang et al., "ResNeSt: Split-Attention Networks", arXiv:2004.08955, eq. 1–3. x is radix-major, [r][c]; W1 and W2 are in
groups (the cardinality), so W2's logits come [group][r][c of the group].

What differs between published versions:
    width     in·R/4, at least 32 (the authors'); to a multiple of 8, at least 32 (timm); out·R/4, at least 32
              (pytorchcv)
    groups    the dense layers are in groups (the authors', timm), or not (pytorchcv)
    R = 1     sigmoid (the authors', timm); pytorchcv takes the softmax over one split: 1, and no gradient, but NaN for
              a mean that isn't finite
    y         timm and the authors return it contiguous; here it keeps x's memory format
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.pool_scale import pool_scale
from ..plan import Plan, Refused, Rule, by_structure, register
from ..registry import Block, case
from .competing import NORMS, Competing, Head, convolution, divisible, foreign, known

_RADIX_SOFTMAX = "timm.layers.split_attn.RadixSoftmax", "6ee174371919"


class _Splits(Head):
    """timm's, the authors', and ours: `before` are called one after the other, the rest is the head.

    before: names of the children, of which some may not be there; norm, act: the head's; norm None: there is none
    cardinality: the module's attribute that holds the groups, for whoever computes the softmax; softmax: its class and
        the fingerprint of its forward
    """

    __slots__ = ("before", "radix")

    def __init__(
        self,
        module: nn.Module,
        before: Sequence[str] = ("conv", "bn0", "drop", "act0"),
        norm: str | None = "bn1",
        act: str = "act1",
        softmax: tuple[str, str] | None = None,
        fixed: Sequence[str] = (),
    ) -> None:
        more = ("rsoftmax",) if softmax is not None else ()
        super().__init__(module, fc1="fc1", norm=norm, act=act, fc2="fc2", more=more, fixed=("radix", *fixed))
        children: dict[str, Any] = vars(module)["_modules"]
        self.radix = vars(module)["radix"]
        if softmax is not None:
            child = known(children["rsoftmax"], "rsoftmax", *softmax)
            found = self.fix(child, "radix"), self.fix(child, "cardinality")
            if found != (self.radix, self.groups):
                raise Refused(f"rsoftmax has radix and cardinality {found}, the layers {(self.radix, self.groups)}")
        self.outputs(self.radix)
        self.before = tuple(children[name] for name in before if name in children)

    def weigh(self, x: Tensor) -> Tensor:
        for child in self.before:
            x = child(x)
        return self.softmax((x,), splits=self.radix)


def _authors(module: nn.Module, where: str) -> Plan:
    """Of SplAtConv2d, which applies one ReLU in both places, and has its norms where `use_bn` says so."""
    return _Splits(
        module, ("conv", "bn0", "dropblock", "relu"), "bn1" if vars(module)["use_bn"] else None, "relu",
        (f"{where}.rSoftMax", "6ee174371919"), ("use_bn", "dropblock_prob"),
    )  # fmt: skip


class _Radix(Head):
    """pytorchcv's SABlock, which is given the splits."""

    __slots__ = ("radix",)

    def __init__(self, module: nn.Module) -> None:
        fc1, fc2 = ("conv1", "conv2") if vars(module)["use_conv"] else ("fc1", "fc2")
        super().__init__(
            module, fc1=fc1, norm="bn", act="activ", fc2=fc2, pool="pool", softmax="softmax",
            fixed=("use_conv", "radix", "groups"),
        )  # fmt: skip
        self.radix = vars(module)["radix"]
        if self.groups != 1:
            raise Refused(f"{fc1} has {self.groups} groups")
        self.groups = vars(module)["groups"]  # of the logits alone: the layers are dense
        self.outputs(self.radix)

    @property
    def channels(self) -> int:
        return int(self.first["weight"].shape[1])

    def weigh(self, x: Tensor) -> Tensor:
        if self.radix > 1:
            return self.softmax((x,), splits=self.radix, dense=True)
        excite, given = self.excite(dense=True)

        def alone(p: Tensor, *rest: Tensor) -> Any:
            out = excite(p, *rest)
            u, *statistics = out if isinstance(out, tuple) else (out,)
            gate = torch.softmax(u.unsqueeze(1), 1).squeeze(1)
            return (gate, *statistics) if statistics else gate

        return self.kept(pool_scale(x, alone, *given, pool="mean"))


class SplitAttention(Competing):
    """Split-attention convolution of feature maps (N, C, *S), with timm's arguments and state_dict keys.

    in_channels, out_channels: of x and of y; None: the same
    kernel_size, stride, padding, dilation, bias: of the convolution; padding None: kernel_size // 2
    groups: the cardinality: of the convolution, in each split, and of the dense layers
    radix: how many splits are weighed against each other
    rd_ratio, rd_channels, rd_divisor: the head's width, rd_channels·radix, or rd_ratio·in_channels·radix rounded to a
        multiple of rd_divisor, at least 32
    act_layer: class; norm_layer: class, or None
    dims: 1, 2 or 3 spatial dimensions

    Raises ValueError for more than 8 splits, or an activation or norm that isn't understood.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        radix: int = 2,
        rd_ratio: float = 0.25,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        act_layer: Any = nn.ReLU,
        norm_layer: Any = None,
        dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        out_channels = out_channels or in_channels
        self.radix, self.groups, self.in_channels, self.dims = radix, groups, in_channels, dims
        made = out_channels * radix
        hidden = rd_channels * radix if rd_channels else divisible(in_channels * radix * rd_ratio, rd_divisor, 32)
        self.conv = convolution(dims)(
            in_channels, made, kernel_size, stride=stride, padding=kernel_size // 2 if padding is None else padding,
            dilation=dilation, groups=groups * radix, bias=bias, **where,
        )  # fmt: skip
        # The head's descriptors are (N, C, 1, 1), whatever x's dimensions.
        first = NORMS[dims] if norm_layer is nn.BatchNorm2d else norm_layer
        self.bn0 = first(made, **where) if norm_layer else nn.Identity()
        self.drop = nn.Identity()
        self.act0 = act_layer()
        self.fc1 = nn.Conv2d(out_channels, hidden, 1, groups=groups, **where)
        self.bn1 = norm_layer(hidden, **where) if norm_layer else nn.Identity()
        self.act1 = act_layer()
        self.fc2 = nn.Conv2d(hidden, made, 1, groups=groups, **where)
        self._finish()

    def _plan(self) -> Plan:
        return _Splits(self)

    def takes(self) -> tuple[int, int]:
        return self.in_channels, self.dims

    def equations(self, x: Tensor) -> Tensor:
        maps = self.act0(self.drop(self.bn0(self.conv(x)))).unflatten(1, (self.radix, -1))
        n, radix, channels, *size = maps.shape
        p = maps.sum(1).flatten(2).mean(-1)[..., None, None]
        logits = self.fc2(self.act1(self.bn1(self.fc1(p)))).reshape(n, self.groups, radix, channels // self.groups)
        logits = logits.transpose(1, 2).reshape(n, radix, channels)
        gates = torch.sigmoid(logits) if radix == 1 else torch.softmax(logits, 1)
        return (maps * gates.reshape(gates.shape + (1,) * len(size))).sum(1)


def _published(where: str) -> Rule:
    """ResNeSt's own class, wherever its file is imported from."""
    return Rule(where, foreign, partial(_authors, where=where.rpartition(".")[0]), {"forward": ("fbeefd64b2ac",)})


RULES = register(
    Rule(
        "timm.layers.split_attn.SplitAttn",
        foreign,
        lambda module: _Splits(module, softmax=_RADIX_SOFTMAX),
        {"forward": ("0c32f6036781",)},
    ),
    *(_published(f"{where}.SplAtConv2d") for where in ("resnest.torch.models.splat", "resnest.torch.splat")),
    Rule("pytorchcv.models.common.att.SABlock", foreign, _Radix, {"forward": ("f0c045c02c01",)}),
)
by_structure("SplAtConv2d", _published)

Block(
    name="split_attention",
    module=SplitAttention,
    paper="Zhang et al., ResNeSt: Split-Attention Networks, https://arxiv.org/abs/2004.08955",
    ops=("branch_softmax",),
    ports=("SplAtConv2d",),
    rules=RULES,
    cases=(
        case(args={"in_channels": 16, "norm_layer": nn.BatchNorm2d}, x=(4, 16, 7, 7)),
        case(args={"in_channels": 8, "out_channels": 17, "radix": 1}, x=(2, 8, 5, 5)),
        case(
            args={
                "in_channels": 16, "out_channels": 24, "radix": 4, "groups": 2, "rd_channels": 6, "stride": 2,
                "bias": True, "act_layer": nn.SiLU, "norm_layer": nn.BatchNorm2d,
            },
            x=(3, 16, 9, 5),
        ),
        case(args={"in_channels": 8, "dims": 3, "norm_layer": nn.BatchNorm2d}, x=(2, 8, 4, 3, 5)),
        case(args={"in_channels": 8, "dims": 1, "rd_ratio": 4.0, "groups": 2}, x=(2, 8, 13)),
    ),
)  # fmt: skip
