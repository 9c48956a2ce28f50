"""BAM: one gate from a gate per channel and a gate per pixel, each of which sees the whole map.

    Mc = W_k δ(norm(W_{k-1} … mean_s x))                    (N, C)
    Ms = conv1×1 ∘ [δ norm conv3×3, dilated]² ∘ δ norm conv1×1 (x)    (N, *S)
    y  = x·(1 + σ(Mc·Ms))   the authors' code, pytorchcv          y = x·(1 + σ(Mc + Ms))   the paper

Park et al., "BAM: Bottleneck Attention Module", arXiv:1807.06514, eq. 1–4. The paper's formulas end each branch with a
batch norm; no published code does: it stands after each hidden layer. The convolutions are PyTorch's, and run as
modules; the merge, the pooling and the channel branch are one op.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import activations, bam_scale, checks
from ..plan import Plan, Planned, Refused, Rule, activation, leaf, path, ready, register, renew, run_original
from ..registry import Block, case
from . import norms
from .deep import DeepPlan
from .excite_plan import dense
from .norms import norm_of

_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_DICT = "torch.nn.modules.container.ModuleDict"
_CV = "pytorchcv.models."
LAYOUTS = ("plain", "authors")


class BamPlan(DeepPlan):
    """What a BAM's fused forward relies on.

    hidden: dotted names (dense layer, norm, activation) of the channel branch; last: of its last layer
    spatial: dotted names of the modules that make the spatial branch, called one after the other
    """

    __slots__ = ("hidden", "last", "merge", "spatial")

    def __init__(
        self, module: nn.Module, inner: dict[str, tuple[str, str]], hidden: list[tuple[str, str, str]], last: str,
        spatial: tuple[str, ...], merge: str, fixed: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(module, inner, fixed)
        acts = tuple(a for a in activations.ACTS if a != "prelu")
        self.hidden = []
        for fc, norm, act in hidden:
            weights = dense(self, fc, self.skip(module, fc))
            self.hidden.append(
                (weights, norm_of(norm, self.skip(module, norm)), activation(self, act, self.skip(module, act), acts))
            )
        self.last, self.spatial, self.merge = dense(self, last, self.skip(module, last)), spatial, merge

    def run_on(self, module: nn.Module, x: Tensor) -> Tensor:
        """The forward of `module`, whose plan this is."""
        state: list[Tensor | None] = []
        layers = []
        kept = []
        for weights, norm, act in self.hidden:
            state += [weights["weight"], weights["bias"], *(norms.state(norm) if norm else ())]
            layers.append((norm is not None, norm["eps"] if norm else 0.0, act))
            if norm is not None and norms.uses_batch(norm):
                kept.append(norm)
        state += [self.last["weight"], self.last["bias"]]
        there = [t is not None for t in state]

        def excite(p: Tensor, *rest: Tensor) -> Any:
            given = iter(rest)
            tensors = iter([next(given) if here else None for here in there])
            linear = lambda v: F.linear(v, next(tensors).flatten(1).to(v.dtype), _to(next(tensors), v))  # type: ignore[union-attr]
            statistics: tuple[Tensor, ...] = ()
            for normed, eps, (act, slope) in layers:
                p = linear(p)
                if normed:
                    weight, bias, mean, var = (next(tensors) for _ in range(4))
                    p, more = norms.normalise(p, weight, bias, mean, var, eps)
                    statistics += more
                p = activations.apply(act, p, slope)
            return linear(p), *statistics

        def spatial(x: Tensor) -> Tensor:
            for name in self.spatial:
                x = module.get_submodule(name)(x)
            return x.squeeze(1)

        out = bam_scale(x, excite, spatial, *(t for t in state if t is not None), merge=self.merge)
        if not isinstance(out, tuple):
            return out
        y, *statistics = out
        for norm, batch in zip(kept, statistics, strict=True):
            norms.keep(norm, batch, x.shape[0])
        return y


def _layers(hidden: int) -> list[str]:
    """The authors' names in the channel branch: of each hidden layer, its norm and activation, and of the last."""
    each = (("fc", 0), ("bn", 1), ("relu", 1))
    return [f"gate_c_{kind}_{i + more}" for i in range(hidden) for kind, more in each] + ["gate_c_fc_final"]


def _to(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.dtype)


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a foreign BAM's forward becomes."""
    plan = ready(self)
    if plan is None or not isinstance(x, Tensor) or x.dim() != 4:
        return run_original(self, plan, x)
    return plan.run_on(self, x)  # type: ignore[attr-defined]


class BAM(Planned):
    """Bottleneck attention of feature maps (N, C, H, W).

    channels: C; rd_ratio, rd_channels: width inside both branches, rd_channels or rd_ratio·C (at least one)
    num_layers: hidden layers of the channel branch
    dilation, num_dilated: of the 3×3 convolutions
    merge: "product", as the authors' code has it, or "sum", as their paper has it
    layout: names of the parameters: "plain", channel.0, spatial.0 and so on; or "authors", theirs:
        channel_att.gate_c.gate_c_fc_0 … gate_c_fc_final, spatial_att.gate_s.gate_s_conv_reduce0 … gate_s_conv_final

    Raises ValueError for another merge or layout.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        num_layers: int = 1,
        dilation: int = 4,
        num_dilated: int = 2,
        merge: str = "product",
        layout: str = "plain",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if merge not in ("product", "sum"):
            raise ValueError(f"merge must be 'product' or 'sum'; got {merge!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1; got {num_layers!r}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        h = rd_channels or max(1, int(channels * rd_ratio))
        self.channels, self.merge, self.num_layers = channels, merge, num_layers
        dense: list[nn.Module] = []
        for i in range(num_layers):
            dense += [nn.Linear(h if i else channels, h, **made), nn.BatchNorm1d(h, **made), nn.ReLU()]
        dense += [nn.Linear(h, channels, **made)]
        convs: list[nn.Module] = [nn.Conv2d(channels, h, 1, **made), nn.BatchNorm2d(h, **made), nn.ReLU()]
        for _ in range(num_dilated):
            conv = nn.Conv2d(h, h, 3, padding=dilation, dilation=dilation, **made)
            convs += [conv, nn.BatchNorm2d(h, **made), nn.ReLU()]
        convs += [nn.Conv2d(h, 1, 1, **made)]
        self.layout = layout
        if layout == "plain":
            self.channel, self.spatial = nn.Sequential(*dense), nn.Sequential(*convs)
        else:
            steps = ["reduce0", *(f"di_{i}" for i in range(num_dilated))]
            named = [f"gate_s_{kind}_{step}" for step in steps for kind in ("conv", "bn", "relu")]
            within = nn.Sequential(OrderedDict(zip(_layers(num_layers), dense, strict=True)))
            beside = nn.Sequential(OrderedDict(zip([*named, "gate_s_conv_final"], convs, strict=True)))
            self.channel_att = nn.ModuleDict({"gate_c": within})
            self.spatial_att = nn.ModuleDict({"gate_s": beside})
        renew(self)

    def _plan(self) -> Plan:
        plain, k = self.layout == "plain", self.num_layers
        place = "channel" if plain else "channel_att.gate_c"
        names = [f"{place}.{name}" for name in (map(str, range(3 * k + 1)) if plain else _layers(k))]
        if len(self.get_submodule(place)) != len(names):  # type: ignore[arg-type]
            raise Refused("the channel branch has other layers")
        inner = {place: (_SEQUENTIAL, "")}
        if not plain:
            inner |= {"channel_att": (_DICT, ""), "spatial_att": (_DICT, "")}
        hidden = [(names[3 * i], names[3 * i + 1], names[3 * i + 2]) for i in range(k)]
        spatial = ("spatial",) if plain else ("spatial_att.gate_s",)
        fixed = ("merge", "num_layers", "layout")
        return BamPlan(self, inner, hidden, names[-1], spatial, f"sigmoid_{self.merge}", fixed)

    def forward(self, x: Tensor) -> Tensor:
        """y: (N, C, H, W), in x's dtype and memory format.

        Raises ValueError or TypeError, naming the argument, for a wrong shape or dtype; and ValueError where batch
        statistics are wanted of one value.
        """
        if (node := leaf(self, x)) is not None:
            return node
        checks.channels("x", x, self.channels, 2)
        plan = ready(self)
        if plan is not None:
            return plan.run_on(self, x)  # type: ignore[attr-defined]
        channel: Any = self.channel if self.layout == "plain" else self.channel_att["gate_c"]
        spatial: Any = self.spatial if self.layout == "plain" else self.spatial_att["gate_s"]
        gate, pixel = channel(x.mean((2, 3)))[..., None, None], spatial(x)
        return x * (1 + torch.sigmoid(gate * pixel if self.merge == "product" else gate + pixel))

    by_plan = forward


def _pytorchcv_plan(module: nn.Module) -> Plan:
    dense = (f"{_CV}bamresnet.DenseBlock", "82a27b27829f")
    inner = {
        "ch_att": (f"{_CV}bamresnet.ChannelGate", "704296b372b0"),
        "ch_att.init_fc": dense,
        "ch_att.main_fcs": (_SEQUENTIAL, ""),
        "sp_att": (f"{_CV}bamresnet.SpatialGate", "ddc2b222d7a0"),
    }
    found = vars(module)["_modules"].get("ch_att")
    more = list(found.main_fcs._modules) if found is not None else []
    inner |= {f"ch_att.main_fcs.{name}": dense for name in more}
    layers = ["ch_att.init_fc", *(f"ch_att.main_fcs.{name}" for name in more)]
    plan = BamPlan(
        module, inner, [(f"{n}.fc", f"{n}.bn", f"{n}.activ") for n in layers], "ch_att.final_fc",
        ("sp_att.init_conv", "sp_att.dil_convs", "sp_att.final_conv"), "sigmoid_product",
    )  # fmt: skip
    plan.pooling(module, "ch_att.pool", "torch.nn.modules.pooling.AdaptiveAvgPool2d")
    if path(type(plan.skip(module, "sigmoid"))) != "torch.nn.modules.activation.Sigmoid":
        raise Refused("sigmoid is another layer")
    return plan


BAM_RULES: tuple[Rule, ...] = register(
    Rule(f"{_CV}bamresnet.BamBlock", _forward, _pytorchcv_plan, {"forward": ("efe792989dde",)}),
)

Block(
    name="bam",
    module=BAM,
    paper="Park et al., BAM: Bottleneck Attention Module, https://arxiv.org/abs/1807.06514",
    ops=("bam_scale",),
    ports=("BAM", "BAMBlock"),
    rules=BAM_RULES,
    cases=(
        case(args={"channels": 32}, x=(3, 32, 9, 8)),
        case(args={"channels": 16, "rd_channels": 4, "merge": "sum"}, x=(3, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "num_layers": 2, "dilation": 2}, x=(3, 16, 7, 7)),
        case(args={"channels": 16, "rd_channels": 4, "num_layers": 2, "layout": "authors"}, x=(3, 16, 7, 7)),
    ),
)
