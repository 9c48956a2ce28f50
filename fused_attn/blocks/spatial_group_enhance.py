"""Spatial group-wise enhance: every group of channels is scaled by a map of how much a position resembles its mean.

    p = mean_s x,   t = Σ_{c in group} x_c·p_c,   z = (t − mean t)/(std t + ε),   y = x·sigmoid(w_g·z + b_g)

Li et al., "Spatial Group-wise Enhance", arXiv:1905.09646, eq. 1–4.

What differs between published versions:
    std         the unbiased one, and ε outside of it, in the authors' code; a map of one position gives NaN there and
                here. The paper's eq. 3 has the biased variance, ε under the root
    weights     w starts at 0 in all; b starts at 1 in the authors' code, at 0 in re-implementations
    groups      64 in the authors' code, 8 in re-implementations
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activations, group_similarity_scale
from ..plan import Plan, Planned, leaf, ready, renew
from ..registry import Block, case


class GroupPlan(Plan):
    """Two parameters of the module and its eps; there are no children to skip. eps: None: an attribute of the module"""

    __slots__ = ("eps", "parameters")
    fits_tail = True

    def __init__(self, module: nn.Module, eps: float | None = None) -> None:
        super().__init__(module, (), ("eps",) if eps is None else ())
        self.parameters = self.weights("the module", module)
        self.eps: float = vars(module)["eps"] if eps is None else eps

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        own = self.parameters
        return group_similarity_scale(x, own["weight"], own["bias"], residual, self.eps, epilogue, epilogue_slope)


class SpatialGroupEnhance(Planned):
    """Spatial group-wise enhance of 1-D, 2-D or 3-D feature maps (N, C, *S), with the state_dict keys of the authors'
    code: weight, bias (1, groups, 1, 1).

    groups: 64 in the paper; must divide C
    bias_init: what `bias` starts at: 1 in the authors' code, 0 in others
    eps: added to the standard deviation of a map

    Raises ValueError for fewer than one group.
    """

    def __init__(
        self,
        groups: int = 64,
        bias_init: float = 1.0,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be at least 1; got {groups}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((1, groups, 1, 1), float(bias_init), device=device, dtype=dtype))
        renew(self)

    def _plan(self) -> Plan:
        return GroupPlan(self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        """y = epilogue(x·gate + residual): x and residual (N, C, *S), any number of spatial dimensions.

        residual, epilogue, epilogue_slope: what follows the gate, in the same pass, as in `group_similarity_scale`
        Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
        """
        if (node := leaf(self, x, residual, epilogue, epilogue_slope)) is not None:
            return node
        plan = ready(self)
        if plan is not None:
            return plan.run(x, residual, epilogue, epilogue_slope)
        grouped = x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, math.prod(x.shape[2:]))
        t = (grouped * grouped.mean(-1, keepdim=True)).sum(2, keepdim=True)
        z = (t - t.mean(-1, keepdim=True)) / (t.std(-1, keepdim=True) + self.eps)
        y = (grouped * torch.sigmoid(self.weight * z + self.bias)).reshape(x.shape)
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    by_plan = forward


Block(
    name="spatial_group_enhance",
    module=SpatialGroupEnhance,
    paper="Li et al., Spatial Group-wise Enhance, https://arxiv.org/abs/1905.09646",
    ops=("group_similarity_scale",),
    ports=("SpatialGroupEnhance",),
    cases=(
        case(args={}, x=(2, 64, 7, 7)),
        case(args={"groups": 3, "bias_init": 0.0}, x=(3, 33, 13)),
        case(args={"groups": 5, "eps": 0.1}, x=(2, 20, 3, 4, 5)),
    ),
)
