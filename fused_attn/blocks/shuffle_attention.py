"""Shuffle attention: half of each group of channels gated by its means, half by its normalised maps, then shuffled.

    v = x·sigmoid(W1·mean_s x + b1)            first half of each group: a gate per channel
    v = x·sigmoid(W2·GN(x) + b2)               second half: a gate per position; GN normalises each plane on its own
    y = the channels of v, those of the first C/2 and of the last C/2 in turn

Zhang & Yang, "SA-Net: Shuffle Attention", arXiv:2102.00240, eq. 2–5. W1, b1, W2, b2 and GN's scale and offset are
vectors of C/(2·groups) elements that all groups share.

What differs between published versions:
    groups      64 in the authors' code, so that C must be a multiple of 128; 8 in some re-implementations
    GN          the authors' GroupNorm has as many groups as channels: an instance norm, the same in training and
                evaluation
    shuffle     the authors' `channel_shuffle` with 2 groups: channel j goes to 2j, channel C/2 + j to 2j + 1
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activations
from ..ops.plane_gate_shuffle import plane_gate_shuffle, shuffled
from ..plan import Plan, Planned, Refused, leaf, path, ready, renew, usual
from ..registry import Block, case
from . import normed

_NORM = "torch.nn.modules.normalization.GroupNorm"


class ShufflePlan(Plan):
    """Four parameters of the module, and its GroupNorm `gn`."""

    __slots__ = ("eps", "norm", "parameters")
    fits_tail = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, ("gn",))
        own: dict[str, Any] = vars(module)
        # A replica of DataParallel keeps plain attributes.
        self.parameters = own["_parameters"] if "cweight" in own["_parameters"] else own
        for name in ("cweight", "cbias", "sweight", "sbias"):
            if not usual(self.parameters.get(name)) or self.parameters.get(name) is None:
                raise Refused(f"{name} isn't a plain parameter")
        norm = own["_modules"]["gn"]
        if path(type(norm)) != _NORM:
            raise Refused(f"gn is a {path(type(norm))}, not a GroupNorm")
        if vars(norm)["num_groups"] != vars(norm)["num_channels"]:
            raise Refused(f"gn is {norm!r}, which doesn't normalise each plane on its own")
        if not vars(norm)["affine"]:
            raise Refused("gn has no weight")
        self.fix(norm, "num_groups")
        self.eps = self.fix(norm, "eps")
        self.norm = self.weights("gn", norm)

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        own, norm = self.parameters, self.norm
        return plane_gate_shuffle(
            x, own["cweight"], own["cbias"], own["sweight"], own["sbias"], norm["weight"], norm["bias"],
            residual, self.eps, epilogue, epilogue_slope,
        )  # fmt: skip

    def behind(self) -> normed.Planes | None:
        own, norm, eps = self.parameters, self.norm, self.eps
        if norm["weight"] is None or norm["bias"] is None:
            return None
        weights = *(own[name] for name in ("cweight", "cbias", "sweight", "sbias")), norm["weight"], norm["bias"]
        k = weights[0].numel()

        def logits(mean: Tensor, var: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            cw, cb, sw, sb, nw, nb = (t.reshape(-1).to(mean.dtype) for t in given)
            groups, none = mean.shape[1] // (2 * k), torch.zeros_like(cw)
            # A number for each channel, so that what is computed for all samples runs along whole rows.
            all_of = torch.stack([none, sw * nw, cw, none, cb, sw * nb + sb]).view(3, 1, 2, k)
            by_rstd, by_mean, offset = all_of.expand(3, groups, 2, k).reshape(3, -1).unbind()
            return by_rstd * (var + eps).rsqrt(), torch.addcmul(offset, by_mean, mean)

        return normed.Planes(logits, weights, k)


class ShuffleAttention(Planned):
    """Shuffle attention of 1-D, 2-D or 3-D feature maps (N, C, *S), with the state_dict keys of the authors' code:
    cweight, cbias, sweight, sbias (1, C/(2·groups), 1, 1), gn.weight, gn.bias.

    channels: C, a multiple of 2·groups; groups: 64 in the paper

    Both gates start at sigmoid(1), as the authors' do. Raises ValueError for channels that groups don't divide.
    """

    def __init__(self, channels: int, groups: int = 64, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if groups < 1 or channels < 1 or channels % (2 * groups):
            raise ValueError(f"channels must be a multiple of 2·groups = {2 * groups}; got {channels}")
        how = {"device": device, "dtype": dtype}
        self.groups, k = groups, channels // (2 * groups)
        self.cweight = nn.Parameter(torch.zeros(1, k, 1, 1, **how))
        self.cbias = nn.Parameter(torch.ones(1, k, 1, 1, **how))
        self.sweight = nn.Parameter(torch.zeros(1, k, 1, 1, **how))
        self.sbias = nn.Parameter(torch.ones(1, k, 1, 1, **how))
        self.gn = nn.GroupNorm(k, k, **how)
        renew(self)

    def _plan(self) -> Plan:
        return ShufflePlan(self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        """y = epilogue(shuffle(x·gate) + residual): x and residual (N, C, *S), any number of spatial dimensions.

        residual, epilogue, epilogue_slope: what follows the shuffle, in the same pass, as in `plane_gate_shuffle`
        Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
        """
        if (node := leaf(self, x, residual, epilogue, epilogue_slope)) is not None:
            return node
        plan = ready(self)
        if plan is not None:
            return plan.run(x, residual, epilogue, epilogue_slope)
        k = self.cweight.shape[1]
        groups, size = x.shape[1] // (2 * k), math.prod(x.shape[2:])
        first, second = x.reshape(x.shape[0] * groups, 2 * k, size, 1).chunk(2, 1)
        first = first * torch.sigmoid(self.cweight * first.mean(2, keepdim=True) + self.cbias)
        second = second * torch.sigmoid(self.sweight * self.gn(second) + self.sbias)
        y = shuffled(torch.cat([first, second], 1).reshape(x.shape))
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    by_plan = forward


Block(
    name="shuffle_attention",
    module=ShuffleAttention,
    paper="Zhang & Yang, SA-Net: Shuffle Attention for Deep CNNs, https://arxiv.org/abs/2102.00240",
    ops=("plane_gate_shuffle",),
    ports=("sa_layer", "SALayer", "ShuffleAttention"),
    cases=(
        case(args={"channels": 128}, x=(2, 128, 7, 7)),
        case(args={"channels": 36, "groups": 6}, x=(3, 36, 13)),
        case(args={"channels": 30, "groups": 3}, x=(2, 30, 3, 4, 5)),
        case(args={"channels": 34, "groups": 1}, x=(2, 34, 9, 5)),
    ),
)
