"""Concurrent spatial and channel squeeze-and-excitation: the sum of two recalibrations of one map.

    gate = σ(W2 δ(W1 mean_s x + b1) + b2)    pixel = σ(Σ_c w_c·x + b)    y = x·gate + x·pixel

Roy et al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", arXiv:1803.02579,
eq. 1–4, and arXiv:1808.08127. The paper leaves open how the two are merged; segmentation_models_pytorch adds them, as
here. Its state_dict keys are kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import activations, scse_scale
from ..plan import Plan, Planned, Refused, Rule, activation, leaf, ready, register, renew, run_original
from ..registry import Block, case
from .deep import DeepPlan
from .excite_plan import dense
from .squeeze_excite import _activation

_SEQUENTIAL = "torch.nn.modules.container.Sequential"


class ScsePlan(DeepPlan):
    """What the fused forward relies on: cSE (pool, dense, act, dense, gate), sSE (projection, gate)."""

    __slots__ = ("act", "first", "gate", "pixel", "projection", "second")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, {"cSE": (_SEQUENTIAL, ""), "sSE": (_SEQUENTIAL, "")})
        for name, size in (("cSE", 5), ("sSE", 2)):
            if len(module.get_submodule(name)) != size:  # type: ignore[arg-type]
                raise Refused(f"{name} has other layers")
        self.pooling(module, "cSE.0", "torch.nn.modules.pooling.AdaptiveAvgPool2d")
        self.first = dense(self, "cSE.1", self.skip(module, "cSE.1"))
        self.second = dense(self, "cSE.3", self.skip(module, "cSE.3"))
        self.projection = dense(self, "sSE.0", self.skip(module, "sSE.0"))
        if self.projection["weight"].shape[0] != 1:
            raise Refused("sSE.0 has more than one output")
        acts = tuple(a for a in activations.ACTS if a != "prelu")
        gates = tuple(g for g in activations.GATES if g != "prelu")
        self.act = activation(self, "cSE.2", self.skip(module, "cSE.2"), acts)
        self.gate, _ = activation(self, "cSE.4", self.skip(module, "cSE.4"), gates)
        self.pixel, _ = activation(self, "sSE.1", self.skip(module, "sSE.1"), gates)

    def run_on(self, x: Tensor) -> Tensor:
        """The fused forward."""
        state = [self.first["weight"], self.first["bias"], self.second["weight"], self.second["bias"]]
        there = [t is not None for t in state]
        (act, slope), gate, pixel = self.act, self.gate, self.pixel

        def channel(p: Tensor, *rest: Tensor) -> Tensor:
            given = iter(rest)
            w1, b1, w2, b2 = (next(given).to(p.dtype) if here else None for here in there)
            hidden = activations.apply(act, F.linear(p, w1.flatten(1), b1), slope)  # type: ignore[union-attr]
            return activations.apply(gate, F.linear(hidden, w2.flatten(1), b2))  # type: ignore[union-attr]

        def spatial(q: Tensor, *bias: Tensor) -> Tensor:
            return activations.apply(pixel, q + bias[0].to(q.dtype) if bias else q)

        bias = self.projection["bias"]
        return scse_scale(
            x, self.projection["weight"].flatten(), channel, spatial,
            [t for t in state if t is not None], [] if bias is None else [bias],
        )  # fmt: skip


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a foreign module's forward becomes."""
    plan = ready(self)
    if plan is None or not isinstance(x, Tensor) or x.dim() != 4:
        return run_original(self, plan, x)
    return plan.run_on(x)  # type: ignore[attr-defined]


class SpatialChannelSE(Planned):
    """scSE of feature maps (N, C, H, W), with the state_dict keys of segmentation_models_pytorch.

    channels: C; reduction: of the hidden width C // reduction
    act_layer: after the first layer; gate_layer: of both branches. Module classes or names, as in `SqueezeExcite`

    Raises ValueError for another activation or gate.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        act_layer: Any = nn.ReLU,
        gate_layer: Any = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = max(1, channels // reduction)
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1, **made),
            _activation("act_layer", act_layer),
            nn.Conv2d(hidden, channels, 1, **made),
            _activation("gate_layer", gate_layer),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1, **made), _activation("gate_layer", gate_layer))
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def _plan(self) -> Plan:
        return ScsePlan(self)

    def forward(self, x: Tensor) -> Tensor:
        """y: (N, C, H, W), in x's dtype and memory format.

        Raises ValueError or TypeError, naming the argument, for a wrong shape or dtype.
        """
        if (node := leaf(self, x)) is not None:
            return node
        plan = ready(self)
        if plan is not None:
            return plan.run_on(x)  # type: ignore[attr-defined]
        return x * self.cSE(x) + x * self.sSE(x)

    by_plan = forward


SCSE_RULES: tuple[Rule, ...] = register(
    Rule("segmentation_models_pytorch.base.modules.SCSEModule", _forward, ScsePlan, {"forward": ("345dd1d371fd",)}),
)

Block(
    name="scse",
    module=SpatialChannelSE,
    paper="Roy et al., Concurrent Spatial and Channel Squeeze & Excitation, https://arxiv.org/abs/1808.08127",
    ops=("scse_scale",),
    rules=SCSE_RULES,
    cases=(
        case(args={"channels": 32}, x=(3, 32, 9, 8)),
        case(args={"channels": 16, "reduction": 4, "act_layer": "silu", "gate_layer": "hard_sigmoid"}, x=(2, 16, 7, 7)),
    ),
)
