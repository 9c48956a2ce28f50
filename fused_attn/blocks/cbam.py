"""CBAM: a gate per channel from the mean and maximum of its pixels, then one per pixel from those of its channels.

    gate[n, c]  = g(MLP(mean_s x) + MLP(max_s x))                  MLP(p) = W2 act(W1 p + b1) + b2
    pixel[n, s] = g(norm(conv([mean_c x·gate, max_c x·gate])))     y = x·gate·pixel

Woo et al., "CBAM: Convolutional Block Attention Module", arXiv:1807.06521, eq. 1–3.

What differs between published versions:
    order     [mean, max] as input of the convolution in the paper and timm, [max, mean] in the authors' code and
              pytorchcv: weights of one are flipped in the other
    ties      a maximum's gradient is divided evenly (timm: amax) or goes to the first (authors, pytorchcv)
    bias      the MLP has biases (authors, pytorchcv) or none (timm)
    norm      BatchNorm of the one plane; the authors' momentum is 0.01, the others' 0.1
    pools     the authors also have "lp", sqrt(Σ x²), and "lse", log Σ exp x, both without a division by the size: each
              goes through the same MLP and is added
    light     timm's LightCbamModule: ½ mean + ½ max in both gates, one plane, the channel gate always a sigmoid
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import forced
from ..layout import accumulator
from ..ops import activations, dual_scale, plane_conv, pool_scale, shared_mlp
from ..plan import (
    Plan,
    Planned,
    Refused,
    Rule,
    activation,
    fingerprint,
    leaf,
    left_to_compiler,
    path,
    ready,
    register,
    renew,
    run_original,
)
from ..registry import Block, case
from . import normed, norms
from .chain import Tail, tail_rule
from .deep import DeepPlan
from .excite_plan import dense
from .squeeze_excite import _activation

_CONVS = {f"torch.nn.modules.conv.Conv{d}d": d for d in (1, 2, 3)}
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_IDENTITY = "torch.nn.modules.linear.Identity"
# A BatchNorm that isn't torch's own, with the fingerprint of its forward and the children that must be idle.
_NORMS = {f"torch.nn.modules.batchnorm.BatchNorm{d}d": ("", ()) for d in (1, 2, 3)} | {
    "timm.layers.norm_act.BatchNormAct2d": ("34994d9669ff", ("drop", "act")),
}
_OWN = "torch.nn.modules.container.ModuleDict"
_SEQUENTIAL = "torch.nn.modules.container.Sequential"
LAYOUTS = ("timm", "authors")


@dataclass(frozen=True)
class Parts:
    """Where a CBAM keeps what, by dotted names from the module on.

    inner: modules between it and its layers: name -> (class, fingerprint of its forward)
    fc2: None: the MLP is one layer, without activation; norm: None: there is none
    light: ½ mean + ½ max in both gates; flip: the convolution takes [max, mean]
    gate, spatial_gate: None: always a sigmoid; idle: poolings that must be of output size 1, by name and class
    """

    inner: dict[str, tuple[str, str]]
    fc1: str
    act: str | None
    fc2: str | None
    gate: str | None
    conv: str | None
    norm: str | None
    spatial_gate: str | None
    light: bool = False
    flip: bool = False
    ties: str = "split"
    idle: tuple[tuple[str, str], ...] = ()


class CbamPlan(DeepPlan):
    """What a CBAM's fused forward relies on: layers two modules deep, so those between are compared as well."""

    __slots__ = (
        "act",
        "conv",
        "conv_gate",
        "dilation",
        "dims",
        "first",
        "gate",
        "kinds",
        "norm",
        "padding",
        "parts",
        "second",
        "slope",
    )  # fmt: skip
    fits_tail = True

    def __init__(self, module: nn.Module, parts: Parts, kinds: tuple[str, ...] = ("avg", "max"),
                 fixed: tuple[str, ...] = ()) -> None:  # fmt: skip
        super().__init__(module, parts.inner, fixed)
        self.parts, self.kinds = parts, kinds
        for name, where in parts.idle:
            self.pooling(module, name, where)
        self.first = dense(self, parts.fc1, self.skip(module, parts.fc1))
        last = self.first
        self.second: dict[str, Any] = {"weight": None, "bias": None}
        if parts.fc2 is not None:
            last = self.second = dense(self, parts.fc2, self.skip(module, parts.fc2))
        if self.first["weight"].shape[1] != last["weight"].shape[0]:
            raise Refused("the MLP doesn't return as many channels as it takes")
        acts = tuple(a for a in activations.ACTS if a != "prelu")
        self.act, self.slope = "identity", 0.01
        if parts.act is not None:
            self.act, self.slope = activation(self, parts.act, self.skip(module, parts.act), acts)
        gates = tuple(g for g in activations.GATES if g != "prelu")
        self.gate = "sigmoid"
        if parts.gate is not None:
            self.gate, _ = activation(self, parts.gate, self.skip(module, parts.gate), gates)
        self.conv: dict[str, Any] | None = None
        self.norm: dict[str, Any] | None = None
        self.dims: int | None = None
        self.conv_gate = "sigmoid"
        if parts.conv is None:
            return
        self._convolution(module, parts)
        if parts.spatial_gate is not None:
            self.conv_gate, _ = activation(self, parts.spatial_gate, self.skip(module, parts.spatial_gate), gates)

    def _convolution(self, module: nn.Module, parts: Parts) -> None:
        assert parts.conv is not None
        conv = self.skip(module, parts.conv)
        self.dims = _CONVS.get(path(type(conv)))
        planes = 1 if parts.light else 2
        usual = self.dims is not None and {
            "stride": (1,) * self.dims, "groups": 1, "padding_mode": "zeros", "in_channels": planes, "out_channels": 1,
        }  # fmt: skip
        if not usual or any(self.fix(conv, k) != v for k, v in usual.items()):
            raise Refused(f"{parts.conv} is {conv!r}, not a plain convolution of {planes} planes to one")
        size, self.padding, self.dilation = (self.fix(conv, k) for k in ("kernel_size", "padding", "dilation"))
        want = tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, size, strict=True))
        if any(k % 2 == 0 for k in size) or self.padding != want:
            raise Refused(f"{parts.conv} is {conv!r}, which doesn't keep the size of a plane")
        self.conv = self.weights(parts.conv, conv)
        if parts.norm is None:
            return
        norm = self.skip(module, parts.norm)
        if path(type(norm)) == _IDENTITY:
            return
        known = _NORMS.get(path(type(norm)))
        if known is None or (known[0] and fingerprint(type(norm).forward) != known[0]):
            raise Refused(f"{parts.norm} is a {path(type(norm))}, not a BatchNorm")
        for name in known[1]:
            if path(type(self.skip(module, f"{parts.norm}.{name}"))) != _IDENTITY:
                raise Refused(f"{parts.norm}.{name} is not idle")
        self.norm = vars(norm)

    traces = False

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        channel, mlp, extra = self._channel(x)
        options: dict[str, Any] = dict(ties=self.parts.ties, residual=residual, act=epilogue, slope=epilogue_slope)
        if self.conv is None:
            y: Tensor = pool_scale(x, channel, *extra, *mlp, pool=self._pool(), **options)
            return y
        out = dual_scale(x, channel, self._spatial(), (*extra, *mlp), self._planar(), channel=self._pool(), **options)
        if not isinstance(out, tuple):
            return out
        y, *statistics = out
        self._keep(statistics, x)
        return y

    def _keep(self, statistics: Sequence[Tensor], x: Tensor) -> None:
        """Updates what the spatial gate's norm remembers, where it used the batch's statistics."""
        if statistics:
            assert self.norm is not None
            norms.keep(self.norm, statistics[0], x.numel() // max(x.shape[1], 1))

    def behind(self) -> normed.Planar | None:
        """Both gates, where neither looks at more of the map than means and maxima."""
        if self.conv is None or {"lp", "lse"} & set(self.kinds):
            return None
        channel, mlp, _ = self._channel(None)
        return normed.Planar(
            (channel, mlp), (self._spatial(), self._planar()), self._pool(), self.parts.ties, self._keep
        )

    def _pool(self) -> str:
        return "mean_max" if {"avg", "max"} <= set(self.kinds) else "max" if "max" in self.kinds else "mean"

    def _channel(self, x: Tensor | None) -> tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]:
        """The channel gate's function, its weights, and what is pooled of x outside of the op, by plain PyTorch; None
        stands for an x of which nothing is."""
        state = [self.first["weight"], self.first["bias"], self.second["weight"], self.second["bias"]]
        there = [t is not None for t in state]
        light, act, gate, slope, kinds = self.parts.light, self.act, self.gate, self.slope, self.kinds
        extra = []
        if x is not None and {"lp", "lse"} & set(kinds):
            flat = x.flatten(2).to(accumulator(x.dtype))
            extra = [flat.norm(2, -1) if k == "lp" else flat.logsumexp(-1) for k in kinds if k in ("lp", "lse")]
        count, pooled = len(extra), bool({"avg", "max"} & set(kinds))

        def excite(p: Tensor, *rest: Tensor) -> Tensor:
            more, given = rest[:count], iter(rest[count:])
            weights = [next(given) if here else None for here in there]
            p = p if p.dim() == 3 else p.unsqueeze(0)
            p = p if pooled else p[:0]
            if more:
                p = torch.cat([p, torch.stack(more)])
            if light:
                p = 0.5 * p.sum(0, keepdim=True)
            if p.shape[0] > 2:  # more pools than the op adds up
                w1, b1, w2, b2 = (t if t is None else t.to(p.dtype) for t in weights)
                hidden = activations.apply(act, F.linear(p, w1.flatten(1), b1), slope)  # type: ignore[union-attr]
                return activations.apply(gate, F.linear(hidden, w2.flatten(1), b2).sum(0))  # type: ignore[union-attr]
            p = p if p.shape[0] == 2 else p[0]
            # A compiler sees through the equations, and has its own way of fusing them.
            mlp: Any = shared_mlp.formula if torch.compiler.is_compiling() else shared_mlp
            gates: Tensor = mlp(p, *weights, None, None, None, None, None, None, act, gate, slope, "none", 1e-5)
            return gates

        return excite, [t for t in state if t is not None], extra

    def _planar(self) -> list[Tensor]:
        assert self.conv is not None
        state = (self.conv["weight"], self.conv["bias"], *(norms.state(self.norm) if self.norm else ()))
        return [t for t in state if t is not None]

    def _spatial(self) -> Callable[..., Any]:
        """The spatial gate's function of the planes and `_planar`."""
        assert self.conv is not None
        assert self.dims is not None
        state = (self.conv["weight"], self.conv["bias"], *(norms.state(self.norm) if self.norm else ()))
        there = [t is not None for t in state]
        light, flip, gate, convolve = self.parts.light, self.parts.flip, self.conv_gate, _CONV[self.dims - 1]
        padding, dilation, normed = self.padding, self.dilation, self.norm is not None
        eps = self.norm["eps"] if self.norm else 0.0
        near = self.dims == 2 and dilation == (1, 1)  # what plane_conv takes, where it has a kernel

        def excite(q: Tensor, *rest: Tensor) -> Any:
            given = iter(rest)
            weight, bias, *norm = [next(given) if here else None for here in there]
            if light:
                q = 0.5 * q.sum(1, keepdim=True)
            elif flip:
                q = q.flip(1)
            bias = None if bias is None else bias.to(q.dtype)
            # A compiler takes the derivative by functional transforms, in which an op isn't one that it can take.
            if near and q.is_cpu and not torch.compiler.is_compiling() and forced() != "triton":
                z = plane_conv(q, weight, bias)
            else:
                z = convolve(q, weight.to(q.dtype), bias, 1, padding, dilation)  # type: ignore[union-attr]
            statistics: tuple[Tensor, ...] = ()
            if normed:
                scale, shift, mean, var = norm
                z, statistics = norms.normalise(z, scale, shift, mean, var, eps)
            return activations.apply(gate, z).squeeze(1), *statistics

        return excite


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a foreign CBAM's forward becomes."""
    plan = None if left_to_compiler(x, opaque=True) else ready(self)
    if plan is None or not isinstance(x, Tensor) or x.dim() != 4:  # a Proxy of torch.fx isn't
        return run_original(self, plan, x)
    return plan.run(x, None, "identity", 0.01)


# Ours, by layout
_NAMES = {
    "timm": Parts(
        dict.fromkeys(("channel", "spatial", "spatial.conv"), (_OWN, "")),
        "channel.fc1", "channel.act", "channel.fc2", "channel.gate",
        "spatial.conv.conv", "spatial.conv.bn", "spatial.gate",
    ),
    "authors": Parts(
        dict.fromkeys(("ChannelGate", "SpatialGate", "SpatialGate.spatial"), (_OWN, ""))
        | {"ChannelGate.mlp": (_SEQUENTIAL, "")},
        "ChannelGate.mlp.1", "ChannelGate.mlp.2", "ChannelGate.mlp.3", "ChannelGate.gate",
        "SpatialGate.spatial.conv", "SpatialGate.spatial.bn", "SpatialGate.gate",
    ),
}  # fmt: skip


class CBAM(Planned):
    """Convolutional block attention of feature maps (N, C, *S), with timm's state_dict keys or the authors'.

    channels: C
    rd_ratio, rd_channels: width of the MLP, rd_channels or rd_ratio·C rounded (at least one)
    spatial_kernel_size: of the convolution over planes, odd
    act_layer, gate_layer: module class or name; relu, relu6, silu, gelu, leaky_relu, hardswish, identity after the
        MLP's first layer; sigmoid, hard_sigmoid, relu, identity as both gates
    mlp_bias: whether the MLP's layers have one
    order: of the planes that the convolution takes, "mean_max" (timm) or "max_mean" (the authors, pytorchcv)
    ties: "split" (timm) or "first" (the authors, pytorchcv), as in `channel_pool` and `spatial_pool`
    pool_types: any of "avg", "max", "lp", "lse"; the last two are computed by plain PyTorch, in passes of their own
    no_spatial: the channel gate alone
    light: timm's LightCbamModule, whose poolings are averaged
    dims: 1, 2 or 3 spatial dimensions
    layout: names and shapes of the parameters. "timm": channel.fc1 and fc2, 1×1 convolutions; spatial.conv.conv and bn.
        "authors": ChannelGate.mlp.1 and .3, dense layers; SpatialGate.spatial.conv and bn. Nothing else depends on it

    Raises ValueError for another option.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        spatial_kernel_size: int = 7,
        act_layer: Any = nn.ReLU,
        gate_layer: Any = "sigmoid",
        mlp_bias: bool = False,
        order: str = "mean_max",
        ties: str = "split",
        pool_types: tuple[str, ...] = ("avg", "max"),
        no_spatial: bool = False,
        light: bool = False,
        dims: int = 2,
        layout: str = "timm",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if order not in ("mean_max", "max_mean"):
            raise ValueError(f"order must be 'mean_max' or 'max_mean'; got {order!r}")
        if ties not in ("split", "first"):
            raise ValueError(f"ties must be 'split' or 'first'; got {ties!r}")
        if not pool_types or len(set(pool_types)) != len(pool_types) or set(pool_types) - {"avg", "max", "lp", "lse"}:
            raise ValueError(f"pool_types must be some of 'avg', 'max', 'lp', 'lse'; got {pool_types!r}")
        if light and set(pool_types) != {"avg", "max"}:
            raise ValueError(f"light needs pool_types 'avg' and 'max'; got {pool_types!r}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3; got {dims!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
        if spatial_kernel_size < 1 or spatial_kernel_size % 2 == 0:
            raise ValueError(f"spatial_kernel_size must be odd; got {spatial_kernel_size!r}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = rd_channels or max(1, round(channels * rd_ratio))
        self.order, self.ties, self.pool_types, self.light = order, ties, tuple(pool_types), light
        self.layout = layout
        act, gate = _activation("act_layer", act_layer), _activation("gate_layer", gate_layer)
        if layout == "timm":
            self.channel = nn.ModuleDict(
                {
                    "fc1": nn.Conv2d(channels, hidden, 1, bias=mlp_bias, **made),
                    "act": act,
                    "fc2": nn.Conv2d(hidden, channels, 1, bias=mlp_bias, **made),
                    "gate": gate,
                }
            )
        else:
            first, second = nn.Linear(channels, hidden, mlp_bias, **made), nn.Linear(hidden, channels, mlp_bias, **made)
            mlp = nn.Sequential(nn.Flatten(), first, act, second)
            self.ChannelGate = nn.ModuleDict({"mlp": mlp, "gate": gate})
        self.no_spatial = no_spatial
        if not no_spatial:
            conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            size = spatial_kernel_size
            inner = {
                "conv": conv(1 if light else 2, 1, size, padding=size // 2, bias=False, **made),
                "bn": norm[dims - 1](1, **made),
            }
            last = _activation("gate_layer", "sigmoid" if gate_layer is None else gate_layer)
            if layout == "timm":
                self.spatial = nn.ModuleDict({"conv": nn.ModuleDict(inner), "gate": last})
            else:
                self.SpatialGate = nn.ModuleDict({"spatial": nn.ModuleDict(inner), "gate": last})
        elif layout == "timm":
            self.register_module("spatial", None)
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def _plan(self) -> Plan:
        names, spatial = _NAMES[self.layout], not self.no_spatial
        inner = {
            name: where for name, where in names.inner.items() if spatial or not name.lower().startswith("spatial")
        }
        parts = replace(
            names, inner=inner, gate=None if self.light else names.gate, conv=names.conv if spatial else None,
            light=self.light, flip=self.order == "max_mean", ties=self.ties,
        )  # fmt: skip
        fixed = ("light", "order", "ties", "pool_types", "layout", "no_spatial")
        return CbamPlan(self, parts, self.pool_types, fixed)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        """y = epilogue(x·gate·pixel + residual): x and residual (N, C, *S).

        residual, epilogue, epilogue_slope: what follows the gates, in the same pass, as in `scale`
        Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
        """
        if (node := leaf(self, x, residual, epilogue, epilogue_slope)) is not None:
            return node
        plan = None if left_to_compiler(x, opaque=True) else ready(self)
        if plan is not None:
            return plan.run(x, residual, epilogue, epilogue_slope)
        u = x * self.channel_gate(x)
        y = u if self.no_spatial else u * self.spatial_gate(u)
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    by_plan = forward

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate (N, C, 1, …), eq. 2, by plain PyTorch and the child modules."""
        flat = x.flatten(2)
        gated: Any = self.channel if self.layout == "timm" else self.ChannelGate
        mlp = self._mlp if self.layout == "timm" else gated["mlp"]
        pools = {
            "avg": lambda: flat.mean(-1),
            "max": lambda: flat.amax(-1) if self.ties == "split" else flat.max(-1).values,
            "lp": lambda: flat.norm(2, -1),
            "lse": lambda: flat.logsumexp(-1),
        }
        pooled = [pools[kind]() for kind in self.pool_types]
        pooled = [0.5 * (pooled[0] + pooled[1])] if self.light else pooled
        u: Any = sum(mlp(p) for p in pooled)
        gate = torch.sigmoid(u) if self.light else gated["gate"](u)
        return gate.reshape(x.shape[:2] + (1,) * (x.dim() - 2))

    def _mlp(self, p: Tensor) -> Tensor:
        part: Any = self.channel
        u: Tensor = part["fc2"](part["act"](part["fc1"](p[..., None, None])))
        return u

    def spatial_gate(self, u: Tensor) -> Tensor:
        """The gate (N, 1, *S), eq. 3, by plain PyTorch and the child modules."""
        mean = u.mean(1, keepdim=True)
        most = u.amax(1, keepdim=True) if self.ties == "split" else u.max(1, keepdim=True).values
        if self.light:
            q = 0.5 * (mean + most)
        else:
            q = torch.cat([mean, most] if self.order == "mean_max" else [most, mean], 1)
        outer: Any = self.spatial if self.layout == "timm" else self.SpatialGate
        inner = outer["conv" if self.layout == "timm" else "spatial"]
        gate: Tensor = outer["gate"](inner["bn"](inner["conv"](q)))
        return gate


_TIMM = "timm.layers."
_CV = "pytorchcv.models."


def _timm(light: str) -> Parts:
    channel, spatial = ("bd4fac144c1d", "b4d43867fab8") if light else ("8183ad677cd4", "dd52e7d7203d")
    return Parts(
        {
            "channel": (f"{_TIMM}cbam.{light}ChannelAttn", channel),
            "spatial": (f"{_TIMM}cbam.{light}SpatialAttn", spatial),
            "spatial.conv": (f"{_TIMM}conv_bn_act.ConvNormAct", "edd86b823f1f"),
        },
        "channel.fc1", "channel.act", "channel.fc2", None if light else "channel.gate",
        "spatial.conv.conv", "spatial.conv.bn", "spatial.gate", light=bool(light),
    )  # fmt: skip


def _timm_plan(light: str) -> Callable[[nn.Module], Plan]:
    def plan(module: nn.Module) -> Plan:
        found = CbamPlan(module, _timm(light))
        if vars(module.spatial.conv)["_modules"].get("aa") is not None:  # type: ignore[union-attr]
            raise Refused("spatial.conv.aa is there")
        return found

    return plan


_PYTORCHCV = Parts(
    {
        "ch_gate": (f"{_CV}cbamresnet.ChannelGate", "d3f58957180f"),
        "ch_gate.mlp": (f"{_CV}cbamresnet.MLP", "d13967f021e2"),
        "sp_gate": (f"{_CV}cbamresnet.SpatialGate", "3d2d8b9ce580"),
        "sp_gate.conv": (f"{_CV}common.conv.ConvBlock", "234ab5542f9c"),
    },
    "ch_gate.mlp.fc1", "ch_gate.mlp.activ", "ch_gate.mlp.fc2", "ch_gate.sigmoid",
    "sp_gate.conv.conv", "sp_gate.conv.bn", "sp_gate.sigmoid", flip=True, ties="first",
    idle=(
        ("ch_gate.avg_pool", "torch.nn.modules.pooling.AdaptiveAvgPool2d"),
        ("ch_gate.max_pool", "torch.nn.modules.pooling.AdaptiveMaxPool2d"),
    ),
)  # fmt: skip


def _pytorchcv_plan(module: nn.Module) -> Plan:
    plan = CbamPlan(module, _PYTORCHCV)
    conv = module.sp_gate.conv  # type: ignore[union-attr]
    for name, value in (("use_pad", False), ("normalize", True), ("activate", False)):
        if plan.fix(conv, name) != value:  # type: ignore[arg-type]
            raise Refused(f"sp_gate.conv.{name} is {not value}")
    return plan


CBAM_RULES = register(
    Rule(f"{_TIMM}cbam.CbamModule", _forward, _timm_plan(""), {"forward": ("92cac90d6e69",)}),
    Rule(f"{_TIMM}cbam.LightCbamModule", _forward, _timm_plan("Light"), {"forward": ("92cac90d6e69",)}),
    Rule(f"{_CV}cbamresnet.CbamBlock", _forward, _pytorchcv_plan, {"forward": ("087df7779592",)}),
)
CBAM_TAILS = register(
    tail_rule(
        f"{_CV}cbamresnet.CbamResUnit",
        ("6999721b0238",),
        Tail(("body",), "cbam", "activ", downsample="identity_conv"),
    ),
)

Block(
    name="cbam",
    module=CBAM,
    paper="Woo et al., CBAM: Convolutional Block Attention Module, https://arxiv.org/abs/1807.06521",
    ops=("affine_dual_scale", "dual_scale", "plane_conv", "pool_scale", "shared_mlp"),
    ports=("CBAM", "CBAMBlock"),
    rules=CBAM_RULES,
    cases=(
        case(args={"channels": 32}, x=(3, 32, 9, 8)),
        case(args={"channels": 24, "rd_channels": 4, "dims": 1, "spatial_kernel_size": 5}, x=(2, 24, 13)),
        case(args={"channels": 12, "rd_channels": 3, "dims": 3, "spatial_kernel_size": 3}, x=(2, 12, 3, 4, 5)),
        case(args={"channels": 16, "rd_channels": 4, "mlp_bias": True, "act_layer": "silu", "order": "max_mean",
                   "ties": "first"}, x=(2, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "light": True}, x=(2, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "no_spatial": True, "gate_layer": "hard_sigmoid"},
             x=(2, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "mlp_bias": True, "order": "max_mean", "ties": "first",
                   "layout": "authors"}, x=(2, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "pool_types": ("avg", "max", "lp", "lse")}, x=(2, 16, 5, 5)),
        case(args={"channels": 16, "rd_channels": 4, "pool_types": ("lp",)}, x=(2, 16, 5, 5)),
    ),
)  # fmt: skip
