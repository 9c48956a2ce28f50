"""Groups of channels scaled by one map each: how much a position resembles its group's mean, with what follows.

    p = mean_s x,   t[n, g, s] = Σ_{c in g} x[n, c, s]·p[n, c],   z = (t − mean_s t)/(std_s t + ε)
    y = act(x·sigmoid(weight[g]·z + bias[g]) + residual)

Spatial group-wise enhance (Li et al., arXiv:1905.09646, eq. 1–4); the standard deviation is the unbiased one (S − 1),
as in the authors' code, so a map of one position gives NaN. Backward, e = dy·act', a the gate, d = t − mean t, σ =
std t:

    h = a·(1 − a)·Σ_{c in g} e·x,   r = weight·h/(σ + ε)
    dt = r − mean r − d·Σ(r·d)/((σ + ε)·σ·(S − 1)),   dx = e·a + dt·p + Σ_s(dt·x)/S

A group depends on no other: forward 3R+1W, backward 4R+1W (t again and h; Σ dt·x; dx), all but the first read from a
cache on a CPU.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .channel_pool import spread
from .plane_gate_shuffle import behind
from .pool_scale import keeps_e
from .shared_mlp import or_none


def maps(x: Tensor, p: Tensor, groups: int) -> Tensor:
    """t (N, G, S) of x in the accumulation dtype; differentiable."""
    return (x.flatten(2) * p.unsqueeze(-1)).unflatten(1, (groups, -1)).sum(2)


def gates(d: Tensor, std: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The gate (N, G, S) of d = t − mean t and std (N, G)."""
    w, b = (v.reshape(1, -1, 1).to(d.dtype) for v in (weight, bias))
    return torch.sigmoid(w * (d / (std.unsqueeze(-1) + eps)) + b)


def over(v: Tensor, x: Tensor) -> Tensor:
    """(N, G, S) seen beside x: each map repeated over the channels of its group."""
    return v.repeat_interleave(x.shape[1] // v.shape[1], 1).reshape(x.shape)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str, slope: float
) -> None:
    checks.feature_map("x", x)
    checks.tensor("weight", weight)
    checks.tensor("bias", bias)
    g = weight.numel()
    if g == 0 or x.shape[1] % g:
        raise ValueError(f"weight must have one element per group, and {x.shape[1]} channels make no {g} groups")
    if bias.numel() != g:
        raise ValueError(f"bias must have as many elements as weight, {g}; got {bias.numel()}")
    checks.same_device("x", x, weight=weight, bias=bias)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("eps", eps)
    checks.number("slope", slope)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, p, and mean and standard deviation of t."""
    wide = x.to(accumulator(x.dtype))
    p = wide.flatten(2).mean(-1)
    t = maps(wide, p, weight.numel())
    mean = t.mean(-1)
    std = t.std(-1) if t.shape[-1] > 1 else t[..., 0] * torch.nan  # torch warns of it
    v = wide * over(gates(t - mean.unsqueeze(-1), std, weight, bias, eps), x)
    v = v if residual is None else v + residual
    return activations.apply(act, v, slope).to(x.dtype), p, mean, std


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str, slope: float
) -> Tensor:
    return _forward(x, weight, bias, residual, eps, act, slope)[0]


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, weight, bias, residual, eps, act, slope = args
    need = activations.needs_aux(act, residual is not None)
    aux = {"output": outs[0], "residual": residual, None: None}[need]
    return (x, aux, outs[1], weight, bias), (eps, act, slope, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, aux, state, weight, bias = saved
    dy = match(grads[0], x)
    dx, dresidual, *dweights = group_similarity_scale_bwd(x, dy, aux, state, weight, bias, *consts)
    if consts[3] and consts[1] == "identity":
        dresidual = dy
    return dx, *or_none(tuple(dweights), needs[1:3]), dresidual if consts[3] else None


def looks_twice(act: str, residual: bool) -> bool:
    """Whether e needs the gate, so that t must be there before a position's e is."""
    return act != "identity" and not (residual and act in activations.FROM_OUTPUT)


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: outs[0],
    alone=lambda *args: True,
    maps=("x", "residual"),
    budget=lambda x, *args: (4 if args[2] is not None else 3, 1),
    reduces=lambda x, *rest: x[0].numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 512, 28, 28), weight=(64,), bias=(64,)),
        case("bench", x=(8, 512, 28, 28), weight=(64,), bias=(64,), residual=(8, 512, 28, 28), act="relu"),
        case("bench", x=(8, 2048, 7, 7), weight=(64,), bias=(64,)),
        case(x=(2, 16, 7, 7), weight=(1, 4, 1, 1), bias=(1, 4, 1, 1)),
        case(x=(2, 12, 13), weight=(3,), bias=(3,), residual=(2, 12, 13), act="relu"),
        case(x=(1, 10, 3, 4, 5), weight=(2,), bias=(2,), residual=(1, 10, 3, 4, 5)),
        case(x=(2, 64, 5, 5), weight=(64,), bias=(64,), residual=(2, 64, 5, 5), act="silu"),
        case(x=(3, 34, 5, 9), weight=(2,), bias=(2,), act="relu"),
        case(x=(2, 40, 6, 6), weight=(8,), bias=(8,), act="gelu", eps=0.1),
        case(x=(2, 19, 17, 31), weight=(1,), bias=(1,), residual=(2, 19, 17, 31), act="relu6"),
        case(x=(0, 4, 5, 5), weight=(2,), bias=(2,)),
    ],
)
def group_similarity_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "identity",
    slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Spatial group-wise enhance of a feature map, with the residual add and activation that follow it: three reads of
    x, one write.

    x: (N, C, *S) feature map, C a multiple of G
    weight, bias: G elements each, of any shape: scale and offset of the normalised maps
    residual: (N, C, *S) added after the gate, of x's dtype
    eps: added to the standard deviation of a map
    act, slope: activation after gate and residual, as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; NaN where S = 1, as in the formula.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, devices or options.
    """
    y, p, mean, std = _forward(x, weight, bias, residual, eps, act, slope)
    return like(x, y), torch.cat([p.flatten(), mean.flatten(), std.flatten()])


def _check_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, state: Tensor, weight: Tensor, bias: Tensor, eps: float,
    act: str, slope: float, residual: bool,
) -> None:  # fmt: skip
    checks.like("dy", dy, "x", x)
    _check(x, weight, bias, aux, eps, act, slope)
    size = x.shape[0] * (x.shape[1] + 2 * weight.numel())
    checks.shaped("state", state, (size,), "(N·(C + 2G),)")


@op(
    check=_check_bwd,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, aux, state, weight, bias, eps, act, slope, residual: (
        4 + (aux is not None) + looks_twice(act, residual) + (act != "identity" and not residual),
        1 + keeps_e(act, residual),
    ),
)
def group_similarity_scale_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, state: Tensor, weight: Tensor, bias: Tensor, eps: float,
    act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `group_similarity_scale`: dx, dresidual (empty where it is dy), dweight, dbias.

    state: p (N, C), mean and standard deviation of t (N, G), one after the other
    """
    acc, (n, c), groups = accumulator(x.dtype), x.shape[:2], weight.numel()
    wide = x.to(acc)
    p, mean, std = state.split([n * c, n * groups, n * groups])
    p, mean, std = p.view(n, c), mean.view(n, groups, 1), std.view(n, groups, 1)
    d = maps(wide, p, groups) - mean
    size, s = d.shape[-1], std + eps
    gate = gates(d, std.squeeze(-1), weight, bias, eps)
    e = behind(dy.to(acc), wide * over(gate, x), aux, act, slope)
    h = gate * (1 - gate) * (e * wide).flatten(2).unflatten(1, (groups, -1)).sum(2)
    r = weight.reshape(1, -1, 1).to(acc) * h / s
    # torch lets no gradient through a standard deviation of 0.
    along = torch.where(std == 0, 0, (r * d).sum(-1, keepdim=True) / (s * std * (size - 1)))
    dt = over(r - r.mean(-1, keepdim=True) - d * along, x)
    back = dt * spread(p, x) + spread((dt * wide).flatten(2).sum(-1) / size, x)
    dx = like(x, (e * over(gate, x) + back).to(x.dtype))
    dweight = (h * d / s).sum((0, 2)).reshape(weight.shape).to(weight.dtype)
    dbias = h.sum((0, 2)).reshape(bias.shape).to(bias.dtype)
    return dx, like(x, e.to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,)), dweight, dbias


__all__ = ["group_similarity_scale", "group_similarity_scale_bwd"]
