"""Efficient channel attention: each channel's gate is computed from the means of its neighbours among the channels.

    p = mean_s x,   gate = g(conv_k(p)),                        y = x·gate        ECA
    p = mean_s x,   gate = g(conv_k(act(w1 p + b1)) + b),       y = x·gate        timm's `use_mlp`

Wang et al., "ECA-Net", arXiv:1910.03151, eq. 6; k is the odd number next to |log2(C)/γ + b/γ| (eq. 12).

What differs between published versions:
    k           timm derives it from the channels and never goes below 3; the authors' `eca_layer` takes it as given
    edges       zeros beyond the first and the last channel; in timm's `CecaModule` the ends are neighbours
    bias        none; timm's `CecaModule` has one where `act_layer` is given, and never applies that activation
    act         timm applies `act_layer` with `use_mlp` alone, after a layer from 1 to C/8 values per channel
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activations, pool_conv_scale
from ..ops.pool_conv_scale import ACTS, GATES, logits
from ..plan import (
    Plan,
    Planned,
    Refused,
    Rule,
    activation,
    leaf,
    left_to_compiler,
    path,
    ready,
    register,
    renew,
    vars_of,
)  # fmt: skip
from ..registry import Block, case
from .se_rules import gate_forward
from .squeeze_excite import _activation

_CONV = "torch.nn.modules.conv.Conv1d"


class ConvPlan(Plan):
    """The convolution over the channels, wherever a module keeps it.

    conv, act, conv2, gate: names of the children; of conv2 None means that conv is the convolution
    pads: name of the attribute that holds the circular padding; None: the convolution pads with zeros by itself
    pool: name of the child that computes the mean; None: forward does
    """

    __slots__ = ("act", "circular", "conv", "first", "gate", "slope")
    dim = 4  # of the maps that timm's modules take: (N, C, H, W)
    fits_tail = True
    opens = True

    def __init__(
        self,
        module: nn.Module,
        conv: str,
        gate: str,
        act: str | None = None,
        conv2: str | None = None,
        pads: str | None = None,
    ) -> None:
        children: dict[str, Any] = module.__dict__["_modules"]
        second = conv2 if conv2 is not None and children.get(conv2) is not None else None
        skipped = [name for name in (conv, act, second, gate) if name is not None]
        super().__init__(module, skipped, (pads,) if pads else ())
        self.circular = pads is not None
        width = vars_of(children[conv])["out_channels"] if second else 1
        self.first: dict[str, Any] | None = None
        if second:
            self.first = _conv1d(self, conv, children[conv], 1, width, 0, 1)
            self.act, self.slope = activation(self, act or "", children[act or ""], ACTS)
        else:
            self.act, self.slope = "identity", 0.01
        name = second or conv
        padding = 0 if pads else None
        self.conv = _conv1d(self, name, children[name], width, 1, padding, None)
        if pads and vars(module)[pads] != self.conv["weight"].shape[2] // 2:
            raise Refused(
                f"{pads} is {vars(module)[pads]}, and the convolution has {self.conv['weight'].shape[2]} taps"
            )
        self.gate, _ = activation(self, gate, children[gate], GATES)

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        conv: dict[str, Any] = self.conv
        w1, b1 = (None, None) if self.first is None else (self.first["weight"], self.first["bias"])
        return pool_conv_scale(
            x, conv["weight"], conv["bias"], w1, b1, residual,
            self.act, self.gate, self.slope, self.circular, epilogue, epilogue_slope,
        )  # fmt: skip

    def means(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The gate as a function of means (N, C), and its tensors."""
        places = [place for place in (self.conv, self.first) if place]
        given = [(place["weight"], place["bias"]) for place in places]
        biased = [bias is not None for _, bias in given]
        act, gate, slope, circular = self.act, self.gate, self.slope, self.circular

        def excite(p: Tensor, *tensors: Tensor) -> Tensor:
            left = iter(tensors)
            pairs = [(next(left), next(left) if has else None) for has in biased]
            (weight, bias), (w1, b1) = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
            return activations.apply(gate, logits(p, weight, bias, w1, b1, act, slope, circular))

        return excite, tuple(t for pair in given for t in pair if t is not None)


def _conv1d(
    plan: Plan, name: str, child: nn.Module | None, inputs: int, outputs: int, padding: int | None, taps: int | None
) -> dict[str, Any]:
    """Where a convolution keeps its weights. padding: None where it keeps the number of channels. Raises Refused for
    any other layer."""
    if path(type(child)) != _CONV:
        raise Refused(f"{name} is a {path(type(child))}, not a plain Conv1d")
    assert child is not None
    options = vars_of(child)
    (k,) = options["kernel_size"]
    plain = options["stride"] == (1,) and options["dilation"] == (1,) and options["groups"] == 1
    same = k // 2 if padding is None else padding
    plain = plain and options["padding"] == (same,) and (not same or options["padding_mode"] == "zeros")
    if (
        not plain
        or k % 2 == 0
        or taps not in (None, k)
        or (options["in_channels"], options["out_channels"])
        != (
            inputs,
            outputs,
        )
    ):
        raise Refused(f"{name} is {child!r}, not a convolution of an odd number of taps over the channels")
    return plan.weights(name, child)


def taps_of(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """timm's k for a number of channels: an odd number near (log2 C + beta)/gamma, at least 3."""
    t = int(abs(math.log(channels, 2) + beta) / gamma)
    return max(t if t % 2 else t + 1, 3)


class ECA(Planned):
    """Efficient channel attention of 1-D, 2-D or 3-D feature maps (N, C, *S), with timm's arguments and state_dict
    keys.

    channels: C, from which k is derived by gamma and beta; None: k is kernel_size
    kernel_size: k, odd
    act_layer: class or name of the activation with use_mlp, ReLU where None; with circular it adds a bias, and is not
        applied, as in timm
    gate_layer: module class or name: sigmoid, hard_sigmoid, relu, identity
    rd_ratio, rd_channels, rd_divisor, use_mlp: a layer of rd_channels, or rd_ratio·C rounded as in SE, before the
        convolution
    circular: the first channel is the last one's neighbour (timm's CecaModule)

    Raises ValueError for an even k, another gate or activation, use_mlp without channels or with circular.
    """

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 3,
        gamma: float = 2,
        beta: float = 1,
        act_layer: Any = None,
        gate_layer: Any = "sigmoid",
        rd_ratio: float = 1 / 8,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        use_mlp: bool = False,
        circular: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        k = kernel_size if channels is None else taps_of(channels, gamma, beta)
        if k % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {k}")
        if use_mlp and (channels is None or circular):
            raise ValueError("use_mlp needs channels, and can't be circular")
        how = {"device": device, "dtype": dtype}
        self.circular, self.use_mlp = circular, use_mlp
        self.act = self.conv2 = None
        if use_mlp:
            assert channels is not None
            hidden = rd_channels or _divisible(channels * rd_ratio, rd_divisor)
            self.conv = nn.Conv1d(1, hidden, 1, bias=True, **how)
            self.act = _activation("act_layer", act_layer or nn.ReLU)
            self.conv2 = nn.Conv1d(hidden, 1, k, padding=k // 2, bias=True, **how)
        else:
            bias = circular and act_layer is not None
            self.conv = nn.Conv1d(1, 1, k, padding=0 if circular else k // 2, bias=bias, **how)
        self.padding = k // 2
        self.gate = _activation("gate_layer", gate_layer)
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def _plan(self) -> Plan:
        if self.use_mlp:
            return ConvPlan(self, conv="conv", act="act", conv2="conv2", gate="gate")
        return ConvPlan(self, conv="conv", gate="gate", pads="padding" if self.circular else None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        """y = epilogue(x·gate + residual): x and residual (N, C, *S), any number of spatial dimensions.

        residual, epilogue, epilogue_slope: what follows the gate, in the same pass, as in `pool_conv_scale`
        Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
        """
        if (node := leaf(self, x, residual, epilogue, epilogue_slope)) is not None:
            return node
        plan = None if left_to_compiler(x) else ready(self)
        if plan is not None:
            return plan.run(x, residual, epilogue, epilogue_slope)
        y = x * self.excite(x.flatten(2).mean(-1)).reshape(x.shape[:2] + (1,) * (x.dim() - 2))
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    by_plan = forward

    def excite(self, p: Tensor) -> Tensor:
        """The gate (N, C) of means (N, C), by the child modules."""
        u = p.unsqueeze(1)
        if self.circular:
            u = nn.functional.pad(u, (self.padding, self.padding), mode="circular")
        u = self.conv(u)
        if self.conv2 is not None:
            u = self.conv2(self.act(u))  # type: ignore[misc]
        return self.gate(u).squeeze(1)


def _divisible(width: float, divisor: int) -> int:
    """timm's rounding to a multiple, one more where more than a tenth would be lost."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def _rule(where: str, source: str, **children: Any) -> Rule:
    return Rule(where, gate_forward, lambda module: ConvPlan(module, **children), {"forward": (source,)})


def _timm(module: nn.Module) -> Plan:
    """timm's module keeps None where it has no hidden layer."""
    if module.__dict__["_modules"].get("conv2") is None:
        return ConvPlan(module, conv="conv", gate="gate")
    return ConvPlan(module, conv="conv", act="act", conv2="conv2", gate="gate")


ECA_RULES = register(
    Rule("timm.layers.eca.EcaModule", gate_forward, _timm, {"forward": ("b54edf5eacb3",)}),
    _rule("timm.layers.eca.CecaModule", "e723b5f94b0c", conv="conv", gate="gate", pads="padding"),
)


Block(
    name="eca",
    module=ECA,
    paper="Wang et al., ECA-Net: Efficient Channel Attention, https://arxiv.org/abs/1910.03151",
    ops=("pool_conv_scale",),
    ports=("eca_layer", "ECALayer", "ECAAttention"),
    rules=ECA_RULES,
    cases=(
        case(args={"channels": 64}, x=(2, 64, 7, 7)),
        case(args={"channels": 37}, x=(3, 37, 13)),
        case(args={"kernel_size": 7, "gate_layer": "hard_sigmoid"}, x=(2, 24, 3, 4, 5)),
        case(args={"channels": 160, "circular": True, "act_layer": nn.ReLU}, x=(2, 160, 5, 3)),
        case(args={"channels": 32, "use_mlp": True, "rd_channels": 3, "act_layer": "silu"}, x=(2, 32, 9, 5)),
    ),
)
