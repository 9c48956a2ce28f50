"""Squeeze-and-excitation: every channel is scaled by a gate computed from the means of all channels.

    p = mean_s x,   gate = g(W2 act(norm(W1 p + b1)) + b2),   y = x·gate        SE
    p = mean_s x,   gate = g(W p + b),                        y = x·gate        effective SE

SE: Hu et al., "Squeeze-and-Excitation Networks", arXiv:1709.01507, eq. 2–4.
Effective SE: Lee & Park, "CenterMask", arXiv:1911.06667, eq. 3.

What differs between published versions:
    bias        the paper's Caffe model, timm, torchvision, pytorchcv, MONAI have biases; many re-implementations none
    width       C/16, rounded to a multiple of 8 (timm) or not (Caffe), or of the block's input (EfficientNet)
    act, gate   ReLU and sigmoid in the paper; SiLU (EfficientNet), GELU, LeakyReLU, Hardswish; hard sigmoid
                relu6(u+3)/6 (MobileNetV3, ESE)
    norm        none in the paper; BatchNorm after the first layer (rexnet)
    pooling     mean in the paper; timm's add_maxpool: ½ mean + ½ max, the maximum's gradient divided among ties
    layers      1×1 convolutions or Linear: the same numbers
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activations
from ..plan import Plan, Planned, Refused, leaf, left_to_compiler, ready, renew
from ..registry import Block, case
from .excite_plan import ExcitePlan
from .se_rules import ESE_RULES, SE_RULES

_ACT_NAMES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "swish": nn.SiLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU,
    "hard_swish": nn.Hardswish, "hardswish": nn.Hardswish, "prelu": nn.PReLU, "identity": nn.Identity,
    "sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip


def _activation(argument: str, layer: Any) -> nn.Module:
    """The activation module that an argument names, or makes."""
    if isinstance(layer, str):
        if layer.lower() not in _ACT_NAMES:
            raise ValueError(
                f"{argument} must be one of {', '.join(map(repr, _ACT_NAMES))}, or a module class; got {layer!r}"
            )
        layer = _ACT_NAMES[layer.lower()]
    if not callable(layer):
        raise ValueError(f"{argument} must be a name or a module class; got {layer!r}")
    module = layer()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{argument} must make a module; got {module!r}")
    return module


class _Gate(Planned):
    """What SE and effective SE share: a forward by plan, and the equations where the plan doesn't hold."""

    def _finish(self) -> None:
        """Makes the plan, now that the children are there. Raises ValueError for an option that isn't understood."""
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        """y = epilogue(x·gate + residual): x and residual (N, C, *S), any number of spatial dimensions.

        residual, epilogue, epilogue_slope: what follows the gate, in the same pass, as in `pool_mlp_scale`
        Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
        """
        if (node := leaf(self, x, residual, epilogue, epilogue_slope)) is not None:
            return node
        plan = None if left_to_compiler(x) else ready(self)
        if plan is not None:
            return plan.run(x, residual, epilogue, epilogue_slope)
        y = x * self.excite(self.squeeze(x)).reshape(x.shape[:2] + (1,) * (x.dim() - 2))
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    by_plan = forward

    def squeeze(self, x: Tensor) -> Tensor:
        """The descriptor (N, C, 1, 1), eq. 2, by plain PyTorch."""
        p = x.flatten(2).mean(-1)
        if self.add_maxpool:
            p = 0.5 * p + 0.5 * x.flatten(2).amax(-1)
        return p[..., None, None]

    def excite(self, p: Tensor) -> Tensor:
        """The gate (N, C, 1, 1), eq. 3, by the child modules."""
        raise NotImplementedError


class SqueezeExcite(_Gate):
    """Squeeze-and-excitation of 1-D, 2-D or 3-D feature maps (N, C, *S), with timm's arguments and state_dict keys.

    channels: C
    rd_ratio, rd_channels, rd_divisor: hidden width, rd_channels or rd_ratio·C rounded to a multiple of rd_divisor (at
        least one)
    add_maxpool: squeeze by ½ mean + ½ max
    bias: whether the dense layers have one
    act_layer, gate_layer: module class or name; relu, relu6, silu, gelu, leaky_relu, hardswish, prelu, identity after
        the first layer, sigmoid, hard_sigmoid, relu, prelu, identity as the gate
    norm_layer: nn.BatchNorm2d (1d, 3d: the same) after the first layer, or None

    Raises ValueError for another activation, gate or norm.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        add_maxpool: bool = False,
        bias: bool = True,
        act_layer: Any = nn.ReLU,
        norm_layer: Any = None,
        gate_layer: Any = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = rd_channels or max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
        self.add_maxpool = add_maxpool
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias, device=device, dtype=dtype)
        self.bn = norm_layer(hidden, device=device, dtype=dtype) if norm_layer else nn.Identity()
        self.act = _activation("act_layer", act_layer)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias, device=device, dtype=dtype)
        self.gate = _activation("gate_layer", gate_layer)
        self._finish()

    def _plan(self) -> Plan:
        return ExcitePlan(self, fc1="fc1", norm="bn", act="act", fc2="fc2", gate="gate", maxpool="add_maxpool")

    def excite(self, p: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.bn(self.fc1(p)))))


class EffectiveSE(_Gate):
    """Effective squeeze-and-excitation: one dense layer, without a reduction. timm's arguments and keys.

    channels: C; add_maxpool: squeeze by ½ mean + ½ max
    gate_layer: module class or name; sigmoid, hard_sigmoid, relu, prelu, identity

    Raises ValueError for another gate.
    """

    def __init__(
        self,
        channels: int,
        add_maxpool: bool = False,
        gate_layer: Any = "hard_sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.add_maxpool = add_maxpool
        self.fc = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.gate = _activation("gate_layer", gate_layer)
        self._finish()

    def _plan(self) -> Plan:
        return ExcitePlan(self, fc1="fc", fc2=None, gate="gate", maxpool="add_maxpool")

    def excite(self, p: Tensor) -> Tensor:
        return self.gate(self.fc(p))


Block(
    name="squeeze_excite",
    module=SqueezeExcite,
    paper="Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507",
    ops=("pool_mlp_scale",),
    rules=SE_RULES,
    cases=(
        case(args={"channels": 64}, x=(2, 64, 7, 7)),
        case(args={"channels": 40, "rd_ratio": 0.25}, x=(3, 40, 13)),
        case(args={"channels": 24, "rd_channels": 6, "bias": False, "act_layer": "gelu"}, x=(2, 24, 3, 4, 5)),
        case(args={"channels": 32, "act_layer": "silu", "gate_layer": "hard_sigmoid"}, x=(2, 32, 9, 5)),
        case(args={"channels": 32, "add_maxpool": True, "act_layer": "leaky_relu"}, x=(2, 32, 9, 5)),
        case(args={"channels": 32, "norm_layer": nn.BatchNorm2d, "act_layer": "relu6"}, x=(4, 32, 6, 6)),
        case(args={"channels": 16, "rd_channels": 4, "act_layer": "prelu", "gate_layer": "prelu"}, x=(2, 16, 5, 5)),
        case(
            args={"channels": 16, "rd_channels": 4, "act_layer": "hardswish", "gate_layer": "identity"}, x=(2, 16, 5, 5)
        ),
    ),
)
Block(
    name="effective_se",
    module=EffectiveSE,
    paper="Lee & Park, CenterMask: Real-Time Anchor-Free Instance Segmentation, https://arxiv.org/abs/1911.06667",
    ops=("pool_mlp_scale",),
    rules=ESE_RULES,
    cases=(
        case(args={"channels": 32}, x=(2, 32, 7, 7)),
        case(args={"channels": 20, "gate_layer": "sigmoid"}, x=(2, 20, 11)),
        case(args={"channels": 20, "add_maxpool": True}, x=(2, 20, 4, 3, 2)),
    ),
)
