"""The foreign squeeze-and-excitation modules that are converted: how each names its children, and how its forward
becomes one op.

A gate is a module of its own, or it is written into its parent's forward (MBConv of EfficientNet, MAnet's fusion
block): then the parent is converted, and runs its other children as before. A class that is known and that no op does
is listed, too: it is refused, with the reason.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import channel_pool, pool_scale
from ..plan import Plan, Refused, Rule, author, left_to_compiler, ready, register, run_original, unfused
from .excite_plan import ExcitePlan, Given


def gate_forward(self: Any, x: Tensor) -> Tensor:
    """What a foreign gate's forward becomes. What isn't a batch of maps is left to its own, which may raise or not."""
    if left_to_compiler(x):
        return author(type(self)).forward(self, x)
    plan: Any = ready(self)
    if plan is None or (isinstance(x, Tensor) and x.dim() != plan.dim):
        return run_original(self, plan, x)
    return plan.run(x, None, "identity", 0.01)


def _forward_channels_last(self: Any, x: Tensor) -> Tensor:
    """The same for x (N, H, W, C): seen as (N, C, H, W), which kernels walk as it lies."""
    plan = ready(self)
    if plan is None or (isinstance(x, Tensor) and x.dim() != 4):
        return run_original(self, plan, x)
    return plan.run(x.permute(0, 3, 1, 2), None, "identity", 0.01).permute(0, 2, 3, 1)


class _PartPlan(ExcitePlan):
    """Of a forward that does more than the plan."""

    __slots__ = ()
    fits_tail = False


def _rule(
    where: str,
    sources: dict[str, tuple[str, ...]],
    forward: Callable[..., Any] = gate_forward,
    by_module: Callable[[nn.Module], dict[str, Any]] | None = None,
    **children: Any,
) -> Rule:
    """A foreign class by the names of its children, as `ExcitePlan` takes them.

    by_module: more of them, which depend on the module's attributes
    """

    made = ExcitePlan if forward is gate_forward else _PartPlan

    def plan(module: nn.Module) -> ExcitePlan:
        return made(module, **children, **(by_module(module) if by_module else {}))

    return Rule(where, forward, plan, sources)


def _refused(where: str, why: str) -> Rule:
    """A class that is known and that no op does."""

    def plan(module: nn.Module) -> Plan:
        raise Refused(why)

    return Rule(where, gate_forward, plan, {})


def _attribute(module: nn.Module, name: str) -> Any:
    if name not in vars(module):
        raise Refused(f"has no attribute {name}")
    return vars(module)[name]


def _pytorchcv(module: nn.Module) -> dict[str, Any]:
    dense = "conv" if _attribute(module, "use_conv") else "fc"
    return {"fc1": f"{dense}1", "fc2": f"{dense}2"}


def _sinet(module: nn.Module) -> dict[str, Any]:
    return {"act": "activ", "fc2": "fc2"} if _attribute(module, "use_conv2") else {"fc2": None}


def _monai(module: nn.Module) -> dict[str, Any]:
    return {"offset": 1.0 if _attribute(module, "add_residual") else 0.0}


def _theirs(where: str, name: str) -> Any:
    """A function of the module that a converted class comes from."""
    return getattr(sys.modules[where], name)


def _mbconv(where: str, has_se: str, expands: Callable[[Any], bool], skips: Callable[[Any], bool], padded: bool) -> Any:
    """The forward of an MBConv block that has its gate inside.

    where: module of the class; has_se: attribute; expands, skips: block -> bool
    padded: each convolution has a padder before it
    """

    def convolve(self: Any, name: str, x: Tensor) -> Tensor:
        children = self._modules
        return children[name](children[f"{name}_padding"](x) if padded else x)

    def forward(self: Any, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        plan: Any = ready(self)
        if plan is None or (isinstance(inputs, Tensor) and inputs.dim() != plan.dim):
            return author(type(self)).forward(self, inputs, *(() if padded else (drop_connect_rate,)))
        children = self._modules
        x = inputs
        if expands(self):
            x = children["_swish"](children["_bn0"](convolve(self, "_expand_conv", x)))
        x = children["_swish"](children["_bn1"](convolve(self, "_depthwise_conv", x)))
        x = plan.run(x)
        x = children["_bn2"](convolve(self, "_project_conv", x))
        if skips(self):
            rate = self.drop_connect_rate if padded else drop_connect_rate
            if rate:
                x = _theirs(where, "drop_connect")(x, p=rate, training=self.training)
            x = x + inputs
        return x

    def forward_monai(self: Any, inputs: Tensor) -> Tensor:
        return forward(self, inputs)

    def plan(module: nn.Module) -> ExcitePlan:
        if not _attribute(module, has_se):
            raise Refused("has no gate")
        return _PartPlan(
            module, "_se_reduce", "_se_expand", Given("sigmoid"), "_swish", fixed=(has_se,),
            pool="_se_adaptpool" if padded else None,
            idle=("_se_reduce_padding", "_se_expand_padding") if padded else (),
        )  # fmt: skip

    return {
        "forward": forward_monai if padded else forward,
        "plan": plan,
        "holds": lambda module: bool(vars(module).get(has_se)),
    }


def _skips_efficientnet(self: Any) -> bool:
    args = self._block_args
    return bool(self.id_skip and args.stride == 1 and args.input_filters == args.output_filters)


class _PairPlan(Plan):
    """Two networks whose gates are added."""

    __slots__ = ("high", "low", "mode")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, ("SE_hl", "SE_ll"), ("interpolation_mode",))
        self.high, self.low = (
            ExcitePlan(module, f"{name}.1", f"{name}.3", f"{name}.4", f"{name}.2", pool=f"{name}.0")
            for name in ("SE_hl", "SE_ll")
        )
        for part in (self.high, self.low):
            if part.norm or part.dim != 4:
                raise Refused("its gates aren't plain ones of images")
            self.skipped += part.skipped
            self.fixed += part.fixed
            self.places += part.places


def _forward_pair(self: Any, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """MAnet's fusion: what comes from below is scaled by the sum of its own gate and the skip's."""
    plan: Any = ready(self)
    if plan is None or skip is None:
        if plan is not None:
            unfused(self, "without a skip nothing is gated")
        return author(type(self)).forward(self, x, skip)
    children = self._modules
    x = nn.functional.interpolate(children["hl_conv"](x), scale_factor=2.0, mode=self.interpolation_mode)
    low = plan.low.network()(channel_pool(skip), *plan.low.tensors())
    high: ExcitePlan = plan.high
    network = high.network()
    x = pool_scale(x, lambda p, low, *tensors: network(p, *tensors) + low, low, *high.tensors())
    return children["conv2"](children["conv1"](torch.cat([x, skip], dim=1)))


_EFFICIENTNET = "efficientnet_pytorch.model"
_SMP = "segmentation_models_pytorch.encoders._efficientnet"
_MONAI = "monai.networks.nets.efficientnet"
_WEIGHT_ONLY = "returns the gate and leaves the product to its parent"

# Each with the fingerprints (`plan.fingerprint(cls.forward)`) of releases: timm 0.9.16 to 1.0.31, torchvision 0.28,
# pytorchcv 0.0.74, MONAI 1.6, segmentation_models_pytorch 0.6, efficientnet_pytorch 0.7.
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
    _rule(
        "pytorchcv.models.common.att.SEBlock",
        {"forward": ("829adab240f3",)},
        by_module=_pytorchcv, act="activ", gate="sigmoid", pool="pool", fixed=("use_conv",),
    ),
    _rule(
        "pytorchcv.models.sinet.SEBlock",
        {"forward": ("d3057d594619",)},
        by_module=_sinet, fc1="fc1", gate="sigmoid", pool="pool", fixed=("use_conv2",),
    ),
    _rule(
        "monai.networks.blocks.squeeze_and_excitation.ChannelSELayer",
        {"forward": ("604d3227b2ac",)},
        by_module=_monai, fc1="fc.0", act="fc.1", fc2="fc.2", gate="fc.3", pool="avg_pool", fixed=("add_residual",),
    ),
    _rule(
        "segmentation_models_pytorch.encoders._senet.SEModule",
        {"forward": ("83a9b7e65407",)},
        fc1="fc1", act="relu", fc2="fc2", gate="sigmoid", pool="avg_pool",
    ),
    _rule(
        "segmentation_models_pytorch.encoders.mobileone.SEBlock",
        {"forward": ("b364c33a4574",)},
        fc1="reduce", act=Given("relu"), fc2="expand", gate=Given("sigmoid"),
    ),
    Rule(
        f"{_MONAI}.MBConvBlock",
        sources={"forward": ("f0d3a20197c5",)},
        **_mbconv(
            _MONAI, "has_se", lambda m: m.expand_ratio != 1,
            lambda m: m.id_skip and m.stride == 1 and m.in_channels == m.out_channels, padded=True,
        ),
    ),
    Rule(
        f"{_EFFICIENTNET}.MBConvBlock",
        sources={"forward": ("adbac77af1c1",)},
        **_mbconv(
            _EFFICIENTNET, "has_se", lambda m: m._block_args.expand_ratio != 1, _skips_efficientnet, padded=False
        ),
    ),
    Rule(
        f"{_SMP}.MBConvBlock",
        sources={"forward": ("270e644e3df6",)},
        **_mbconv(_SMP, "_has_se", lambda m: m._has_expansion, lambda m: m._has_drop_connect, padded=False),
    ),
    Rule(
        "segmentation_models_pytorch.decoders.manet.decoder.MFABBlock",
        _forward_pair, _PairPlan, {"forward": ("cf558766ed19",)},
    ),
    _refused("pytorchcv.models.dicenet.DiceAttBlock", _WEIGHT_ONLY),
    _refused("pytorchcv.models.fishnet.PreSEAttBlock", _WEIGHT_ONLY),
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
