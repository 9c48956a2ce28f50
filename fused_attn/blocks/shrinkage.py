"""Shrinkage: every channel is soft-thresholded, by a threshold that a small network reads off their means.

    m = mean_s |x|,   α = σ(W2 relu(norm(W1 m + b1)) + b2),   y = sign(x)·max(|x| − τ, 0) (+ identity)
    τ[n, c] = α[n, c]·m[n, c]          threshold="channel" (RSBU-CW)
    τ[n] = α[n]·mean_c m[n, c]         threshold="shared" (RSBU-CS), one for all channels of a sample

Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE Transactions on Industrial Informatics 16(7),
2020, eq. 5–9, https://doi.org/10.1109/TII.2019.2943898.

What differs between published versions:
    threshold   the authors' code has the channel-wise form only; the shared form is in the paper
    width       C → C/4 → C (the authors' TFLearn code), C → C → C (their Keras code, and most ports)
    max         relu(|x| − τ) here; ports write max(sub, sub − sub), which is NaN at ±inf and passes half of the
                gradient where |x| = τ
    pooling     ports of 2-D maps exist that pool x, not |x|: τ may then be negative, and values grow
    threshold   ports exist with τ = α, and with the labels CW and CS exchanged
The unit around it, BN–ReLU–conv twice before and the identity after, is plain PyTorch; the identity is `residual`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activations
from ..ops.pool_soft_threshold import pool_soft_threshold
from ..ops.shared_mlp import shared_mlp
from ..plan import Plan, Planned, Refused, leaf, path, ready, renew, tampered, vars_of
from ..registry import Block, case
from .norms import keep, norm_of, norm_state

_LAYERS = ("Linear", "norm", "ReLU", "Linear", "Sigmoid")
_CLASSES = {
    "Linear": "torch.nn.modules.linear.Linear",
    "ReLU": "torch.nn.modules.activation.ReLU",
    "Sigmoid": "torch.nn.modules.activation.Sigmoid",
}
THRESHOLDS = ("channel", "shared")
FACTORS = ("own", "mean", "none")


class ShrinkagePlan(Plan):
    """The network of a shrinkage, kept as a Sequential of Linear, norm, ReLU, Linear, Sigmoid.

    fc: name of that child; skipped: names of further children that don't run
    factor: what α is multiplied by: the descriptor's "own" value, its "mean" over the channels, or "none"
    pool: "mean_abs" or "mean"
    """

    __slots__ = ("factor", "first", "norm", "pool", "second")
    fits_tail = True

    def __init__(
        self, module: nn.Module, fc: str, factor: str, pool: str = "mean_abs", skipped: tuple[str, ...] = ()
    ) -> None:
        super().__init__(module, (fc, *skipped))
        network: Any = vars(module)["_modules"].get(fc)
        if path(type(network)) != "torch.nn.modules.container.Sequential" or len(network) != len(_LAYERS):
            raise Refused(f"{fc} is a {path(type(network))}, not a Sequential of {', '.join(_LAYERS)}")
        inner = vars(network)["_modules"]
        for (name, child), role in zip(inner.items(), _LAYERS, strict=True):
            if role != "norm" and path(type(child)) != _CLASSES[role]:
                raise Refused(f"{fc}.{name} is a {path(type(child))}, not a {role}")
            if (why := tampered(child)) is not None:
                raise Refused(f"{fc}.{name} {why}")
        # As `Plan` does for the module's own children
        self.skipped += tuple((child, type(child), vars_of(child)) for child in inner.values())
        self.fixed += tuple((inner, name, child) for name, child in inner.items())
        (n1, fc1), (n2, norm), _, (n3, fc2), _ = inner.items()
        self.first, self.second = self.weights(f"{fc}.{n1}", fc1), self.weights(f"{fc}.{n3}", fc2)
        self.norm = norm_of(f"{fc}.{n2}", norm)
        (hidden, channels), (outputs, width) = self.first["weight"].shape, self.second["weight"].shape
        if width != hidden or outputs not in (1, channels):
            raise Refused(f"the layers map {channels} channels to {outputs} thresholds, by way of {hidden} and {width}")
        self.factor, self.pool = factor, pool

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        norm, state, eps = norm_state(self.norm)
        first, second = self.first, self.second
        tensors = (first["weight"], first["bias"], second["weight"], second["bias"], *state)
        present = tuple(t is not None for t in tensors)
        factor = self.factor

        def excite(m: Tensor, *given: Tensor) -> Any:
            left = iter(given)
            network = [next(left) if there else None for there in present]
            # A compiler sees through the equations, and has its own way of fusing them.
            mlp: Any = shared_mlp.formula if torch.compiler.is_compiling() else shared_mlp
            out = mlp(m, *network, None, None, "relu", "sigmoid", 0.01, norm, eps)
            alpha, *statistics = out if norm == "batch" else (out,)
            if factor == "none":
                tau = alpha
            else:
                tau = alpha * (m if factor == "own" else m.mean(1, keepdim=True))
            return (tau, *statistics)

        out: Any = pool_soft_threshold(
            x, excite, *(t for t in tensors if t is not None), pool=self.pool, residual=residual
        )
        if norm == "batch":
            out, statistics = out
            keep(self.norm, statistics, x.shape[0])  # type: ignore[arg-type]
        return activations.apply(epilogue, out, epilogue_slope)


class Shrinkage(Planned):
    """Soft-thresholding of 1-D, 2-D or 3-D feature maps (N, C, *S) by learned thresholds.

    channels: C
    threshold: "channel" (one per channel and sample) | "shared" (one per sample)
    rd_ratio, rd_channels: hidden width, rd_channels or rd_ratio·C (at least one); 1/4 is the authors' TFLearn code
    norm_layer: nn.BatchNorm1d after the first layer, or None

    The state_dict has the keys fc.0, fc.1, fc.3 of ports that call their network `fc`.
    Raises ValueError for another threshold or norm, and in training for a batch of 1, which has no variance.
    """

    def __init__(
        self,
        channels: int,
        threshold: str = "channel",
        rd_ratio: float = 1.0,
        rd_channels: int | None = None,
        norm_layer: Any = nn.BatchNorm1d,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if threshold not in THRESHOLDS:
            raise ValueError(f"threshold must be one of {', '.join(map(repr, THRESHOLDS))}; got {threshold!r}")
        hidden = rd_channels or max(1, round(channels * rd_ratio))
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.threshold = threshold
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, **where),
            norm_layer(hidden, **where) if norm_layer else nn.Identity(),
            nn.ReLU(),
            nn.Linear(hidden, 1 if threshold == "shared" else channels, **where),
            nn.Sigmoid(),
        )
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def _plan(self) -> Plan:
        plan = ShrinkagePlan(self, "fc", "mean" if self.threshold == "shared" else "own")
        plan.own = (("threshold", self.threshold),)
        return plan

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = soft-thresholded x, plus the residual: x and residual (N, C, *S), any number of spatial dimensions.

        Raises ValueError or TypeError, naming the argument, for a wrong shape or dtype.
        """
        if (node := leaf(self, x, residual)) is not None:
            return node
        plan = ready(self)
        if plan is not None:
            return plan.run(x, residual, "identity", 0.01)
        m = x.abs().flatten(2).mean(-1)
        tau = self.fc(m) * (m.mean(1, keepdim=True) if self.threshold == "shared" else m)
        y = x.sign() * torch.relu(x.abs() - tau.reshape(*tau.shape, *(1,) * (x.dim() - 2)))
        return y if residual is None else y + residual

    by_plan = forward


Block(
    name="shrinkage",
    module=Shrinkage,
    paper="Zhao et al., Deep Residual Shrinkage Networks for Fault Diagnosis, https://doi.org/10.1109/TII.2019.2943898",
    ops=("pool_soft_threshold",),
    ports=("Shrinkage", "RSBU_CW", "RSBU_CS"),
    cases=(
        case(args={"channels": 32}, x=(3, 32, 25)),
        case(args={"channels": 24, "threshold": "shared"}, x=(3, 24, 9, 5)),
        case(args={"channels": 17, "rd_ratio": 0.25}, x=(4, 17, 7, 7)),
        case(args={"channels": 12, "rd_channels": 5, "norm_layer": None}, x=(2, 12, 3, 4, 5)),
    ),
)
