"""Every plane scaled by a gate from its own statistics, stored with its channels shuffled, with what follows.

Channels come in groups of 2K: the first K of each group take one gate per plane, the others one per position. With
μ = mean_s x, σ² = mean_s (x − μ)², x̂ = (x − μ)/√(σ² + ε) of a plane, k its place in its half of the group:

    v = x·sigmoid(cweight[k]·μ + cbias[k])                                                  first half
    v = x·sigmoid(sweight[k]·(norm_weight[k]·x̂ + norm_bias[k]) + sbias[k])                  second half
    y[n, 2j] = act(v[n, j] + residual[n, 2j]),   y[n, 2j + 1] = act(v[n, C/2 + j] + residual[n, 2j + 1])

Shuffle attention (Zhang & Yang, arXiv:2102.00240, eq. 2–5). A plane depends on no other: forward reads x twice, the
second time from a cache, and writes once. Backward, e = dy·act', s the gate, q = e·x·s·(1 − s), a =
sweight·norm_weight:

    first half    dx = e·s + cweight·Σq/S                dcweight = Σ q·μ, dcbias = Σ q
    second half   dx = e·s + a·(q − mean q − x̂·mean(q·x̂))/√(σ² + ε)

3.5R+1W: the last pass needs no x in the first half (4R+1W in channels_last).
"""

import torch
from torch import Tensor

from ..layout import accumulator, layout, like, match
from ..registry import case, op
from . import activations, checks
from .pool_scale import keeps_e
from .shared_mlp import or_none


def shuffled(v: Tensor) -> Tensor:
    """Channel j of the first half to 2j, of the second half to 2j + 1."""
    return v.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def unshuffled(v: Tensor) -> Tensor:
    """Its inverse."""
    return v.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def halves(v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of (N, C, *S) the first and second half of each group, (N, groups, K, *S)."""
    grouped = v.unflatten(1, (v.shape[1] // (2 * k), 2, k))
    return grouped[:, :, 0], grouped[:, :, 1]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack([first, second], 2).flatten(1, 3)


def _cast(acc: torch.dtype, weights: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The six parameters as vectors; without a norm's, 1 and 0."""
    default = (None, None, None, None, 1.0, 0.0)
    k, first = weights[0].numel(), weights[0]  # type: ignore[union-attr]
    return [
        torch.full((k,), d, dtype=acc, device=first.device) if w is None else w.reshape(-1).to(acc)  # type: ignore[union-attr,arg-type]
        for w, d in zip(weights, default, strict=True)
    ]


def gates(x: Tensor, mean: Tensor, rstd: Tensor, weights: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The gate of each element, and x̂ of the second halves, in the dtype of x: differentiable."""
    cw, cb, sw, sb, nw, nb = _cast(x.dtype, weights)
    ones = (1,) * (x.dim() - 2)
    wide = lambda v: v.reshape(*v.shape, *ones)
    (mean0, mean1), (_, rstd1) = halves(mean, cw.numel()), halves(rstd, cw.numel())
    x1 = halves(x, cw.numel())[1]
    xhat = (x1 - wide(mean1)) * wide(rstd1)
    each = torch.sigmoid(wide(sw) * (wide(nw) * xhat + wide(nb)) + wide(sb))
    return joined(wide(torch.sigmoid(cw * mean0 + cb)).expand_as(x1), each), xhat


def _check(
    x: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor, sbias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.tensor("cweight", cweight)
    k = cweight.numel()
    if k == 0 or x.shape[1] % (2 * k):
        raise ValueError(f"cweight must have C/(2·groups) elements, of C = {x.shape[1]} channels; got {k}")
    named = dict(cbias=cbias, sweight=sweight, sbias=sbias, norm_weight=norm_weight, norm_bias=norm_bias)
    for name, w in named.items():
        if w is not None or not name.startswith("norm"):
            checks.tensor(name, w)
            if w.numel() != k:  # type: ignore[union-attr]
                raise ValueError(f"{name} must have as many elements as cweight, {k}; got {w.numel()}")  # type: ignore[union-attr]
    checks.same_device("x", x, cweight=cweight, **named)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("eps", eps)
    checks.number("slope", slope)


def _formula(
    x: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor, sbias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float,
) -> Tensor:  # fmt: skip
    wide = x.to(accumulator(x.dtype))
    mean, var = wide.flatten(2).mean(-1), wide.flatten(2).var(-1, correction=0)
    weights = (cweight, cbias, sweight, sbias, norm_weight, norm_bias)
    gate, _ = gates(wide, mean, (var + eps).rsqrt(), weights)
    v = shuffled(wide * gate)
    v = v if residual is None else v + residual
    return activations.apply(act, v, slope).to(x.dtype)


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, *weights, residual, _, act, slope = args
    need = activations.needs_aux(act, residual is not None)
    aux = {"output": outs[0], "residual": residual, None: None}[need]
    return (x, aux, outs[1], *weights), (act, slope, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, aux, stats, *weights = saved
    dy = match(grads[0], x)
    dx, dresidual, *dweights = plane_gate_shuffle_bwd(x, dy, aux, stats, *weights, *consts)
    if consts[2] and consts[0] == "identity":
        dresidual = dy
    return dx, *or_none(tuple(dweights), needs[1:7]), dresidual if consts[2] else None


def _k(k: int, *shape: int) -> dict:
    return dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), (k, *shape))


def _norm(k: int) -> dict:
    return dict(norm_weight=(k,), norm_bias=(k,))


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: outs[0],
    alone=lambda *args: True,
    maps=("x", "residual"),
    budget=lambda x, *args: (3 if args[6] is not None else 2, 1),
    reduces=lambda x, cweight, *rest: x[0].numel() // cweight.numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 512, 28, 28), **_k(4), **_norm(4)),
        case("bench", x=(8, 512, 28, 28), **_k(4), **_norm(4), residual=(8, 512, 28, 28), act="relu"),
        case("bench", x=(8, 2048, 7, 7), **_k(16), **_norm(16)),
        case(x=(2, 16, 7, 7), **_k(2), **_norm(2)),
        case(x=(2, 12, 13), **_k(3), **_norm(3), residual=(2, 12, 13), act="relu"),
        case(x=(1, 20, 3, 4, 5), **_k(5), **_norm(5), residual=(1, 20, 3, 4, 5)),
        case(x=(2, 64, 5, 5), **_k(1), residual=(2, 64, 5, 5), act="silu"),
        case(x=(3, 34, 5, 9), **_k(17), **_norm(17), act="relu"),
        case(x=(2, 40, 6, 6), **_k(4), **_norm(4), act="gelu", eps=0.1),
        case(x=(2, 32, 17, 31), **_k(16), **_norm(16), residual=(2, 32, 17, 31), act="relu6"),
        case(x=(2, 8, 1, 1), **_k(2), **_norm(2), eps=0.5),
        case(x=(0, 4, 5, 5), **_k(1)),
    ],
)  # fmt: skip
def plane_gate_shuffle(
    x: Tensor,
    cweight: Tensor,
    cbias: Tensor,
    sweight: Tensor,
    sbias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "identity",
    slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Shuffle attention of a feature map, with the residual add and activation that follow it: two reads of x, one
    write.

    x: (N, C, *S) feature map, C a multiple of 2K
    cweight, cbias, sweight, sbias: K elements each, of any shape: scale and offset of the channel and spatial gates'
        logits; there are C/(2K) groups
    norm_weight, norm_bias: K elements each, or None: what the normalised planes of the second half are scaled by
    residual: (N, C, *S) added after the shuffle, of x's dtype
    eps: added to the variance of a plane
    act, slope: activation after gate and residual, as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, devices or options.
    """
    wide = x.to(accumulator(x.dtype))
    mean, var = wide.flatten(2).mean(-1), wide.flatten(2).var(-1, correction=0)
    rstd = (var + eps).rsqrt()
    gate, _ = gates(wide, mean, rstd, (cweight, cbias, sweight, sbias, norm_weight, norm_bias))
    v = shuffled(wide * gate)
    v = v if residual is None else v + residual
    # 0 stands for "not normalised": kernels see by it which half a channel is in.
    second = halves(rstd, cweight.numel())[1]
    stats = torch.stack([mean, joined(torch.zeros_like(second), second)])
    return like(x, activations.apply(act, v, slope).to(x.dtype)), stats


def _check_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, stats: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor,
    sbias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, act: str, slope: float, residual: bool,
) -> None:  # fmt: skip
    checks.like("dy", dy, "x", x)
    _check(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, aux, 1e-5, act, slope)
    checks.shaped("stats", stats, (2, *x.shape[:2]), "(2, N, C)")


def behind(dy: Tensor, v: Tensor, aux: Tensor | None, act: str, slope: float) -> Tensor:
    """e = dy·act'(v + residual); aux: the output or the residual, as `activations.needs_aux` says, or None."""
    if act == "identity":
        return dy
    if aux is not None:
        v = aux.to(v.dtype) if act in activations.FROM_OUTPUT else v + aux
    d = activations.grad(act, v, slope)
    return torch.where(d == 0, 0, dy * d)  # a cut gradient is 0, whatever was cut


def _bwd_budget(x: Tensor, dy: Tensor, aux: Tensor | None, *args: object) -> tuple[int, int]:
    act, _, residual = args[-3:]
    again = act != "identity" and not residual
    # Where channels lie side by side, those of the first half share cache lines with those of the second.
    apart = x.shape[2:].numel() > 1 and (kind := layout(x)) is not None and kind.kind == "planes"
    half = 0.5 if apart and not again else 1
    return 3 + (aux is not None) + half, 1 + keeps_e(act, residual)  # type: ignore[return-value,arg-type]


@op(
    check=_check_bwd,
    maps=("x", "dy", "aux"),
    budget=_bwd_budget,
)
def plane_gate_shuffle_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, stats: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor,
    sbias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `plane_gate_shuffle`: dx, dresidual (empty where it is dy), and that of each of the six parameters.

    stats: (2, N, C) mean and 1/√(σ² + ε) of each plane, the latter 0 in the first half
    """
    acc = accumulator(x.dtype)
    wide, (mean, rstd) = x.to(acc), stats
    parameters = (cweight, cbias, sweight, sbias, norm_weight, norm_bias)
    cw, _, sw, _, nw, nb = _cast(acc, parameters)
    k, size = cw.numel(), x[0, 0].numel() if x.numel() else 1
    gate, xhat = gates(wide, mean, rstd, parameters)
    e = unshuffled(behind(dy.to(acc), shuffled(wide * gate), aux, act, slope))
    q0, q1 = halves(e * wide * gate * (1 - gate), k)
    total = lambda v: v.flatten(3).sum(-1)
    spatial = lambda v: v.reshape(*v.shape, *(1,) * (x.dim() - 2))
    c0, s0, s1 = total(q0), total(q1), total(q1 * xhat)
    a = sw * nw * halves(rstd, k)[1]
    back = spatial(a) * (q1 - spatial(s0 / size) - xhat * spatial(s1 / size))
    dx = e * gate + joined(spatial(cw * c0 / size).expand_as(back), back)
    c1 = (c0 * halves(mean, k)[0]).sum((0, 1))
    c0, s0, s1 = (v.sum((0, 1)) for v in (c0, s0, s1))
    found = (c1, c0, nw * s1 + nb * s0, s0, sw * s1, sw * s0)
    grads = [
        x.new_empty((0,)) if p is None else g.reshape(p.shape).to(p.dtype)
        for p, g in zip(parameters, found, strict=True)
    ]
    kept = like(x, shuffled(e).to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,))
    return like(x, dx.to(x.dtype)), kept, *grads  # type: ignore[return-value]


__all__ = ["plane_gate_shuffle", "plane_gate_shuffle_bwd"]
