"""Both ends around the excite of branches that compete: pool, excite, softmax over the branches, scale and merge.

    p = mean_s Σ_b x_b,  or of each x_b        l[n, b, c] = excite(p, *params)
    gate[n, :, c] = softmax_b l[n, :, c],  a sigmoid where there is one branch        y = merge_b gate_b·x_b

Selective kernels (Li et al., arXiv:1903.06586, eq. 1–6), split attention (Zhang et al., arXiv:2004.08955, eq. 1–3),
PSA (Zhang et al., arXiv:2105.14447, §3). Backward has two halves with the excite's between them, so that neither
the sum of the branches nor its gradient is ever a feature map:

    reduce  dgate[n, b, c] = Σ_s dy_b·x_b                           reads dy and every x_b
    excite  dp, dparams = vjp of excite and softmax at p            [N, B, C] only
    apply   dx_b = gate_b·dy_b + dp_b/S                             reads dy, writes every dx_b
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..layout import accumulator
from ..registry import op
from . import branches, checks
from . import excite as excite_
from .branch_pool import branch_pool
from .branch_scale import branch_scale, gradient_of_gates, gradients_of_branches
from .branches import Eight


def _check_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> None:  # fmt: skip
    branches.check_gate(x, gate, (x1, x2, x3, x4, x5, x6, x7), merge)
    branches.check_gradient(x, gate, dy, merge)


def _reduce_budget(x: Tensor, dy: Tensor, gate: Tensor, *rest: object) -> tuple[float, float]:
    *more, merge = rest
    return len(branches.given(x, more)) + branches.written(x, more, gate, merge), 0  # type: ignore[arg-type]


@op(check=_check_reduce, maps=("x", "dy", "x1", "x2", "x3", "x4", "x5", "x6", "x7"), budget=_reduce_budget)
def branch_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    """First half of the backward: dgate (N, B, C) in the accumulation dtype. gate: for its shape."""
    maps = branches.split(branches.given(x, (x1, x2, x3, x4, x5, x6, x7)), gate.shape[1])
    return gradient_of_gates(maps, dy, merge)


def _inside(x: Tensor, gate: Tensor) -> bool:
    return x.shape[1] == gate.shape[1] * gate.shape[2]


def _check_apply(x: Tensor, dy: Tensor, gate: Tensor, dpooled: Tensor, merge: str) -> None:
    checks.feature_map("x", x)
    checks.tensor("gate", gate)
    if (
        gate.dim() != 3
        or gate.shape[0] != x.shape[0]
        or x.shape[1] not in (gate.shape[2], gate.shape[1] * gate.shape[2])
    ):
        raise ValueError(f"gate must have shape (N, B, C) for x {tuple(x.shape)}; got {tuple(gate.shape)}")
    checks.one_of("merge", merge, branches.MERGES)
    branches.check_gradient(x, gate, dy, merge)
    each = dpooled.dim() == 3
    shape = gate.shape if each else (gate.shape[0], gate.shape[2])
    checks.shaped("dpooled", dpooled, shape, "(N, B, C)" if each else "(N, C)")


def _apply_budget(x: Tensor, dy: Tensor, gate: Tensor, dpooled: Tensor, merge: str) -> tuple[float, float]:
    count = gate.shape[1]
    if _inside(x, gate):
        return (1 / count if merge == "sum" else 1), 1
    return (1 if merge == "sum" else count), count


@op(check=_check_apply, maps=("x", "dy"), budget=_apply_budget)
def branch_scale_apply(x: Tensor, dy: Tensor, gate: Tensor, dpooled: Tensor, merge: str) -> Eight:
    """Second half of the backward: dx_b = gate_b·dy_b + dpooled/S for each branch, or in one tensor where x holds all.

    x: the first branch, or all, for its shape and strides; dpooled: (N, C), or (N, B, C) where each branch was pooled
    """
    return gradients_of_branches(x, dy, gate, dpooled.to(accumulator(x.dtype)) / branches.size(x), merge)


def gates_of(logits: Tensor, count: int, channels: int, groups: int) -> Tensor:
    """The softmax over branches, (N, B, C), of logits in the order that `branch_softmax` describes; of one branch, the
    sigmoid."""
    n = logits.shape[0]
    if logits.numel() != n * count * channels:
        raise ValueError(f"logits must have {count}·{channels} values a sample; got shape {tuple(logits.shape)}")
    if groups > 1:
        logits = logits.reshape(n, groups, count, channels // groups).transpose(1, 2)
    logits = logits.reshape(n, count, channels)
    return torch.sigmoid(logits) if count == 1 else torch.softmax(logits, 1)


def branch_softmax(
    *maps: Tensor,
    excite: Callable[..., Any] | None = None,
    params: Sequence[Tensor] = (),
    logits: Tensor | None = None,
    splits: int = 1,
    groups: int = 1,
    each: bool = False,
    merge: str = "sum",
) -> Any:
    """Weighs up to eight branches by a softmax over them, for every channel, and merges them; one backward owns both
    ends.

    maps: the branches, each (N, C, *S); or one (N, splits·C, *S) that holds all of them along the channels
    excite: a differentiable function (descriptor, *params) -> logits, B·C values a sample: (N, B, C), or flat in that
        order. The descriptor is (N, C), or (N, B, C) with `each`; float32 for half-precision maps. It runs again in
        backward, so it must be pure; statistics that the caller keeps are returned beside the logits, as a tuple
        (logits, *statistics). Tensors that need a gradient must come through `params`, not through a closure.
    params: tensors handed to excite, which receive gradients
    logits: given, in place of excite: nothing is pooled
    splits: how many branches the one map holds
    groups: logits come in the order [group][branch][channel of the group], as a convolution in groups gives them
    each: the descriptor is the mean of each branch, not of their sum
    merge: "sum" | "concat" | "concat_reversed" (the last branch's channels first)

    The gate of a single branch is the sigmoid of its logit, as in ResNeSt; pytorchcv takes the softmax, which is 1.

    Returns y: (N, C, *S), or (N, B·C, *S) where branches are concatenated, in their dtype and memory format;
        (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or logits of another size.
    """
    if not 1 <= len(maps) <= branches.MOST:
        raise ValueError(f"maps must be 1 to {branches.MOST} branches; got {len(maps)}")
    if (excite is None) == (logits is None):
        raise ValueError("give either excite or logits; got " + ("neither" if excite is None else "both"))
    x, more = maps[0], (*maps[1:], *(None,) * (branches.MOST - len(maps)))
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(
            branch_softmax, *maps, excite=excite, params=params, logits=logits, splits=splits, groups=groups, each=each,
            merge=merge,
        )  # fmt: skip
    if len(maps) > 1 and splits != 1:
        raise ValueError(f"splits must be 1 where branches are given one by one; got {splits}")
    branches.check(x, more, len(maps) if len(maps) > 1 else splits, "splits")
    checks.one_of("merge", merge, branches.MERGES)
    count = max(len(maps), splits)
    channels = x.shape[1] // splits
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    if logits is not None:
        gate = gates_of(logits.to(accumulator(x.dtype)), count, channels, groups)
        return branch_scale(x, gate, *more, merge)
    assert excite is not None

    def weigh(p: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        found = excite(p, *given)
        first, *kept = found if isinstance(found, tuple) else (found,)
        return gates_of(first, count, channels, groups), *kept

    if is_transformed() or torch.jit.is_tracing():
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        gate, kept = excite_.split(weigh(branch_pool(x, *more, splits, each), *params))
        y: Tensor = branch_scale(x, gate, *more, merge)
        return (y, *kept) if kept else y
    excite_.check(excite, params)
    y, *statistics = _Spanning.apply(weigh, (len(maps), splits, each, merge), *maps, *params)
    return (y, *statistics) if statistics else y


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, weigh: Callable[..., Any], options: tuple[int, int, bool, str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given, splits, each, merge = options
        x, params = tensors[0], tensors[given:]
        more = (*tensors[1:given], *(None,) * (branches.MOST - given))
        count, channels = max(given, splits), x.shape[1] // splits
        p = branch_pool(x, *more, splits, each)
        gate, statistics = excite_.run(weigh, (p,), params, (x.shape[0], count, channels), "(N, B, C)")
        y = branch_scale(x, gate, *more, merge)
        ctx.save_for_backward(gate, p, *tensors)
        ctx.weigh, ctx.options = weigh, options
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "branch_softmax", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        gate, p, *tensors = saved
        given, _, _, merge = ctx.options
        x, params = tensors[0], tensors[given:]
        more = (*tensors[1:given], *(None,) * (branches.MOST - given))
        dy = branches.match(dy, x)
        dgate = branch_scale_reduce(x, dy, gate, *more, merge)
        needs = ctx.needs_input_grad[2 + given :]
        (dp,), dparams = excite_.gradient(ctx.weigh, (p,), params, dgate.to(gate.dtype), needs)
        dx = branch_scale_apply(x, dy, gate, dp.to(accumulator(x.dtype)), merge)
        return None, None, *dx[:given], *dparams
