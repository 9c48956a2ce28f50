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

from ..ops import activations, pool_mlp_scale
from ..plan import Plan, Planned, Refused, Rule, activation, path, ready, register, renew, vars_of
from ..registry import Block, case
from .norms import keep

_DENSE = ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.linear.Linear")
_MEAN = "torch.nn.modules.pooling.AdaptiveAvgPool2d"
_NORMS = tuple(f"torch.nn.modules.batchnorm.BatchNorm{d}d" for d in (1, 2, 3))


class ExcitePlan(Plan):
    """SE's small network, wherever a module keeps it.

    fc1, norm, act, fc2, gate: names of the children; None: there is none of this kind
    maxpool: name of the attribute that says whether the maximum is averaged in
    pool: name of the child that computes the mean; None: forward does
    """

    __slots__ = ("act", "act_place", "first", "gate", "gate_place", "max_weight", "norm", "second", "simple", "slope")

    def __init__(
        self,
        module: nn.Module,
        fc1: str,
        fc2: str | None,
        gate: str,
        act: str | None = None,
        norm: str | None = None,
        maxpool: str | None = None,
        pool: str | None = None,
    ) -> None:
        skipped = [name for name in (pool, fc1, norm, act, fc2, gate) if name is not None]
        super().__init__(module, skipped, (maxpool,) if maxpool else ())
        children: dict[str, Any] = module.__dict__["_modules"]
        if pool is not None:
            _mean(self, pool, children[pool])
        self.first = _dense(self, fc1, children[fc1])
        self.second = _dense(self, fc2, children[fc2]) if fc2 else None
        channels = self.first["weight"].shape[1]
        outputs = (self.second or self.first)["weight"].shape[0]
        if outputs != channels or (self.second and self.second["weight"].shape[1] != self.first["weight"].shape[0]):
            raise Refused(f"the layers map {channels} channels to {outputs} gates")
        self.act, self.slope = "identity", 0.01
        if act is not None:
            self.act, self.slope = activation(self, act, children[act], activations.ACTS)
        self.gate, _ = activation(self, gate, children[gate], activations.GATES)
        self.act_place = self.weights(act, children[act]) if act and self.act == "prelu" else None
        self.gate_place = self.weights(gate, children[gate]) if self.gate == "prelu" else None
        self.norm = _norm(norm, children[norm]) if norm else None
        self.max_weight = 0.5 if maxpool and vars(module)[maxpool] else 0.0
        self.simple = fc2 is not None and self.norm is None and self.act_place is None and self.gate_place is None

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        first: dict[str, Any] = self.first
        second: Any = self.second
        if self.simple:
            return pool_mlp_scale(
                x, first["weight"], first["bias"], second["weight"], second["bias"],
                None, None, None, None, None, None,
                residual, self.act, self.gate, self.slope, "none", 1e-5, self.max_weight, "split",
                epilogue, epilogue_slope,
            )  # fmt: skip
        norm, state, eps = ("none", (None,) * 4, 1e-5) if self.norm is None else _norm_state(self.norm)
        out = pool_mlp_scale(
            x, first["weight"], first["bias"], *((second["weight"], second["bias"]) if second else (None, None)),
            *state, self.act_place and self.act_place["weight"], self.gate_place and self.gate_place["weight"],
            residual, self.act, self.gate, self.slope, norm, eps, self.max_weight, "split", epilogue, epilogue_slope,
        )  # fmt: skip
        if norm != "batch":
            return out
        y, statistics = out
        keep(self.norm, statistics, x.shape[0])  # type: ignore[arg-type]
        return y


def _mean(plan: Plan, name: str, child: nn.Module | None) -> None:
    """Raises Refused for a pooling layer that doesn't compute the mean of each map."""
    if path(type(child)) != _MEAN or plan.fix(child, "output_size") not in (1, (1, 1)):  # type: ignore[arg-type]
        raise Refused(f"{name} is {child!r}, not an AdaptiveAvgPool2d of output size 1")


def _dense(plan: Plan, name: str, child: nn.Module | None) -> dict[str, Any]:
    """Where a dense layer keeps its weights. Raises Refused for any other layer."""
    if path(type(child)) not in _DENSE:
        raise Refused(f"{name} is a {path(type(child))}, not a plain Conv2d or Linear")
    options = vars_of(child)
    if "kernel_size" in options:
        usual = all(k == 1 for k in options["kernel_size"] + options["stride"] + options["dilation"])
        padding = options["padding"]
        if not usual or options["groups"] != 1 or not (isinstance(padding, str) or not any(padding)):
            raise Refused(f"{name} is {child!r}, not a plain 1×1 convolution")
    assert child is not None
    return plan.weights(name, child)


def _norm(name: str, child: nn.Module | None) -> dict[str, Any] | None:
    """The attributes of a BatchNorm, None where there is no norm. Raises Refused for any other."""
    if path(type(child)) == "torch.nn.modules.linear.Identity":
        return None
    if path(type(child)) not in _NORMS:
        raise Refused(f"{name} is a {path(type(child))}, not a BatchNorm")
    return vars_of(child)


def _norm_state(norm: dict[str, Any]) -> tuple[str, tuple[Tensor | None, ...], float]:
    """Which statistics a BatchNorm uses now, and its tensors as the op takes them."""
    parameters, buffers = norm["_parameters"], norm["_buffers"]
    affine = parameters["weight"], parameters["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if norm["training"] or (mean is None and var is None):
        return "batch", (*affine, None, None), norm["eps"]
    return "running", (*affine, mean, var), norm["eps"]


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
        plan = ready(self)
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


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a foreign gate's forward becomes. What isn't (N, C, H, W) is left to its own, which may raise or not."""
    plan = ready(self)
    if plan is None or (isinstance(x, Tensor) and x.dim() != 4):
        return self.original.forward(self, x)
    return plan.run(x, None, "identity", 0.01)


def _forward_channels_last(self: Any, x: Tensor) -> Tensor:
    """The same for x (N, H, W, C): seen as (N, C, H, W), which kernels walk as it lies."""
    plan = ready(self)
    if plan is None or (isinstance(x, Tensor) and x.dim() != 4):
        return self.original.forward(self, x)
    return plan.run(x.permute(0, 3, 1, 2), None, "identity", 0.01).permute(0, 2, 3, 1)


def _rule(
    where: str, sources: dict[str, tuple[str, ...]], forward: Callable[..., Tensor] = _forward, **children: Any
) -> Rule:
    """A foreign class by the names of its children, as `ExcitePlan` takes them."""
    return Rule(where, forward, lambda module: ExcitePlan(module, **children), sources)


# Each with the fingerprints (`plan.fingerprint(cls.forward)`) of releases: timm 0.9.16 to 1.0.31, torchvision 0.28.
SE_RULES = register(
    _rule(
        "timm.layers.squeeze_excite.SEModule",
        {"forward": ("b62ab73617a3",)},
        fc1="fc1", norm="bn", act="act", fc2="fc2", gate="gate", maxpool="add_maxpool",
    ),
    _rule(
        "timm.layers.squeeze_excite.SqueezeExciteCl",
        {"forward": ("fbcdc9b68ac3",)},
        _forward_channels_last, fc1="fc1", act="act", fc2="fc2", gate="gate",
    ),
    _rule(
        "timm.models._efficientnet_blocks.SqueezeExcite",
        {"forward": ("35728e7aec88",)},
        fc1="conv_reduce", act="act1", fc2="conv_expand", gate="gate",
    ),
    _rule(
        "timm.models.senet.SEModule",
        {"forward": ("0ba2a55c9bf8",)},
        fc1="fc1", act="relu", fc2="fc2", gate="sigmoid",
    ),
    _rule(
        "torchvision.ops.misc.SqueezeExcitation",
        {"forward": ("23edf6a1397e",), "_scale": ("0f58890b06ca",)},
        fc1="fc1", act="activation", fc2="fc2", gate="scale_activation", pool="avgpool",
    ),
)  # fmt: skip
ESE_RULES = register(
    _rule(
        "timm.layers.squeeze_excite.EffectiveSEModule",
        {"forward": ("ce708b8a345b",)},
        fc1="fc", fc2=None, gate="gate", maxpool="add_maxpool",
    ),
    _rule(
        "timm.models.hgnet.EseModule",
        {"forward": ("16c1bb18ec6c",)},
        fc1="conv", fc2=None, gate="sigmoid",
    ),
)  # fmt: skip


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
