"""Channel gate by a convolution over the channels, as one op: pool, a few taps per channel, scale, with what follows.

    p = mean_s x,   u[n, c] = b + Σ_h Σ_t w[h, t]·v[n, h, c + t − k//2],   y = epilogue(x·g(u) + residual)
    v = p, or v[n, h, c] = act(w1[h]·p[n, c] + b1[h]) where there is a hidden layer

Efficient channel attention (Wang et al., arXiv:1910.03151, eq. 6): no hidden layer, no bias, zeros beyond the first and
the last channel. timm has a circular form and one with a hidden layer, to which zeros are added after its activation.

Backward, du = (Σ_s e·x)·g'(u):  dw[h, t] = Σ du[n, c]·v[n, h, c + t − k//2],  dv[n, h, c] = Σ_t w[h, t]·du[n, c − t +
k//2], and dp from dv through the hidden layer. Forward 2R+1W, backward 3R+1W, as any gate between pool and scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .pool_scale import keeps_e, pool_scale_apply, pool_scale_reduce
from .scale import formula as scaled
from .shared_mlp import or_none

GATES = tuple(g for g in activations.GATES if g != "prelu")
ACTS = tuple(a for a in activations.ACTS if a != "prelu")


def _cast(acc: torch.dtype, *weights: Tensor | None) -> list[Tensor | None]:
    return [w if w is None else w.to(acc) for w in weights]


def hidden(p: Tensor, w1: Tensor | None, b1: Tensor | None, act: str, slope: float) -> tuple[Tensor, Tensor]:
    """z and v = act(z), (N, H, C); without a hidden layer both are p."""
    z = p.unsqueeze(1)
    if w1 is None:
        return z, z
    z = w1.reshape(1, -1, 1) * z
    if b1 is not None:
        z = z + b1.reshape(1, -1, 1)
    return z, activations.apply(act, z, slope)


def padded(v: Tensor, taps: int, circular: bool) -> Tensor:
    """v with k//2 more channels on each side: zeros, or those of the other end."""
    r = taps // 2
    return F.pad(v, (r, r), mode="circular") if circular and r and v.numel() else F.pad(v, (r, r))


def logits(
    p: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None, b1: Tensor | None,
    act: str, slope: float, circular: bool,
) -> Tensor:  # fmt: skip
    """u (N, C), in the dtype of p; differentiable."""
    weight, bias, w1, b1 = _cast(p.dtype, weight, bias, w1, b1)  # type: ignore[assignment]
    _, v = hidden(p, w1, b1, act, slope)
    k, c = weight.shape[-1], p.shape[1]
    v = padded(v, k, circular)
    u = sum((weight[0, :, t, None] * v[..., t : t + c]).sum(1) for t in range(k))
    return u if bias is None else u + bias  # type: ignore[return-value]


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None, b1: Tensor | None, residual: Tensor | None,
    act: str, gate: str, slope: float, circular: bool, epilogue: str, epilogue_slope: float,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.tensor("weight", weight)
    width = 1 if w1 is None else w1.shape[0]
    if weight.dim() != 3 or weight.shape[:2] != (1, width) or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight must have shape (1, H, k) = (1, {width}, odd); got {tuple(weight.shape)}")
    if circular and weight.shape[2] // 2 > x.shape[1]:
        raise ValueError(f"weight may reach at most once around {x.shape[1]} channels; got {weight.shape[2]} taps")
    checks.shaped("bias", bias, (1,), "(1,)")
    if w1 is not None:
        checks.tensor("w1", w1)
        if w1.numel() != w1.shape[0]:
            raise ValueError(f"w1 must have shape (H,), 1s may follow; got {tuple(w1.shape)}")
    elif b1 is not None:
        raise ValueError("b1 must be None where w1 is None")
    checks.shaped("b1", b1, (width,), "(H,)")
    checks.same_device("x", x, weight=weight, bias=bias, w1=w1, b1=b1)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, ACTS)
    checks.one_of("gate", gate, GATES)
    checks.one_of("epilogue", epilogue, activations.EPILOGUES)
    checks.number("slope", slope)
    checks.number("epilogue_slope", epilogue_slope)


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None, b1: Tensor | None, residual: Tensor | None,
    act: str, gate: str, slope: float, circular: bool, epilogue: str, epilogue_slope: float,
) -> Tensor:  # fmt: skip
    p = x.flatten(2).mean(-1, dtype=accumulator(x.dtype))
    g = activations.apply(gate, logits(p, weight, bias, w1, b1, act, slope, circular))
    return scaled(x, g, residual, None, epilogue, epilogue_slope)


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, weight, bias, w1, b1, residual, *options = args
    need = activations.needs_aux(options[4], residual is not None)
    aux = {"output": outs[0], "residual": residual, None: None}[need]
    return (x, aux, outs[1], weight, bias, w1, b1), (*options, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, aux, state, *weights = saved
    dy = match(grads[0], x)
    dx, dresidual, *dweights = pool_conv_scale_bwd(x, dy, aux, state, *weights, *consts)
    if consts[-1] and consts[4] == "identity":
        dresidual = dy
    return dx, *or_none(tuple(dweights), needs[1:5]), dresidual if consts[-1] else None


def _reduces(x: Tensor, weight: Tensor, *rest: object) -> int:
    # A tap's gradient is a sum over every element of a sample, a logit one over all taps of all hidden channels.
    return max(x[0].numel() if x.numel() else 1, weight.numel())


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: outs[0],
    alone=lambda *args: True,
    maps=("x", "residual"),
    budget=lambda x, *args: (3 if args[4] is not None else 2, 1),
    reduces=_reduces,
    opens=True,
    cases=[
        *(
            case("bench", x=(n, c, s, s), weight=(1, 1, k))
            for n, c, s, k in ((8, 256, 56, 5), (8, 512, 28, 5), (8, 2048, 7, 7), (1, 64, 56, 3), (1, 64, 7, 3))
        ),
        case("bench", x=(8, 512, 28, 28), weight=(1, 1, 5), residual=(8, 512, 28, 28), epilogue="relu"),
        case(x=(2, 32, 7, 7), weight=(1, 1, 3)),
        case(x=(2, 17, 13), weight=(1, 1, 5), residual=(2, 17, 13), epilogue="relu"),
        case(x=(1, 23, 3, 4, 5), weight=(1, 1, 7), bias=(1,), circular=True, residual=(1, 23, 3, 4, 5)),
        case(x=(3, 5, 5, 3), weight=(1, 1, 9), gate="hard_sigmoid", epilogue="silu"),
        case(x=(2, 5, 5, 3), weight=(1, 1, 11), circular=True, gate="identity"),
        case(x=(2, 24, 9, 1), weight=(1, 3, 5), bias=(1,), w1=(3, 1, 1), b1=(3,), act="relu",
             gate="identity"),
        case(x=(2, 40, 6, 6), weight=(1, 4, 3), w1=(4,), act="silu", gate="relu", circular=True,
             residual=(2, 40, 6, 6), epilogue="silu"),
        case(x=(2, 7, 1, 1), weight=(1, 1, 1), epilogue="relu6"),
        case(x=(0, 4, 5, 5), weight=(1, 2, 3), w1=(2, 1, 1)),
        case(x=(1, 3, 127, 2), weight=(1, 1, 3), gate="clamp"),
    ],
)  # fmt: skip
def pool_conv_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
    slope: float = 0.01,
    circular: bool = False,
    epilogue: str = "identity",
    epilogue_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Efficient channel attention of a feature map, with the residual add and activation that follow it: two reads of
    x, one write.

    x: (N, C, *S) feature map
    weight: (1, H, k) taps of the convolution over the channels, k odd, as Conv1d keeps them; H = 1 without `w1`
    bias: (1,) of the convolution, or None
    w1, b1: (H, 1, 1) or (H,), and (H,) or None: a layer applied to each mean before the convolution
    residual: (N, C, *S) added after the gate, of x's dtype
    act, slope: after w1: "identity" | "relu" | "relu6" | "leaky_relu" | "silu" | "gelu" | "hardswish"
    gate: "sigmoid" | "hard_sigmoid" | "clamp" | "relu" | "identity"
    circular: whether the first channel is the last one's neighbour; else zeros are
    epilogue, epilogue_slope: activation after gate and residual, as `act` and `slope` of `scale`

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, devices or options.
    """
    p = x.flatten(2).mean(-1, dtype=accumulator(x.dtype))
    u = logits(p, weight, bias, w1, b1, act, slope, circular)
    y = like(x, scaled(x, activations.apply(gate, u), residual, None, epilogue, epilogue_slope))
    return y, torch.cat([p.flatten(), u.flatten()])


def _check_bwd(x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, *args: object) -> None:
    checks.like("dy", dy, "x", x)
    _check(x, *args[:4], aux, *args[4:-1])  # type: ignore[arg-type,call-arg]


def gradients(
    p: Tensor, du: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None, b1: Tensor | None,
    act: str, slope: float, circular: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dp, and the gradients of weight, bias, w1, b1 (empty where there is none)."""
    weight_, w1_, b1_ = _cast(p.dtype, weight, w1, b1)
    assert weight_ is not None
    z, v = hidden(p, w1_, b1_, act, slope)
    k, c = weight.shape[-1], p.shape[1]
    v, back = padded(v, k, circular), padded(du, k, circular)
    dweight = torch.stack([(v[..., t : t + c] * du.unsqueeze(1)).sum((0, 2)) for t in range(k)], -1).unsqueeze(0)
    dv = sum(weight_[0, :, t, None] * back[:, None, k - 1 - t : k - 1 - t + c] for t in range(k))
    none = lambda like: p.new_empty((0,), dtype=(weight if like is None else like).dtype)
    dbias = none(bias) if bias is None else du.sum().reshape(1).to(bias.dtype)
    dweight = dweight.to(weight.dtype)
    if w1_ is None or w1 is None:
        return dv[:, 0], dweight, dbias, none(w1), none(b1)  # type: ignore[index]
    dz = dv * activations.grad(act, z, slope)
    dw1 = (dz * p.unsqueeze(1)).sum((0, 2)).reshape(w1.shape).to(w1.dtype)
    db1 = none(b1) if b1 is None else dz.sum((0, 2)).to(b1.dtype)
    return (w1_.reshape(1, -1, 1) * dz).sum(1), dweight, dbias, dw1, db1


def _bwd_budget(x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, *args: object) -> tuple[int, int]:
    epilogue, _, residual = args[8:]
    with_x = epilogue != "identity" and not residual
    return 3 + (aux is not None) + with_x, 1 + keeps_e(epilogue, residual)  # type: ignore[arg-type]


@op(check=_check_bwd, maps=("x", "dy", "aux"), budget=_bwd_budget)
def pool_conv_scale_bwd(
    x: Tensor,
    dy: Tensor,
    aux: Tensor | None,
    saved: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    act: str,
    gate: str,
    slope: float,
    circular: bool,
    epilogue: str,
    epilogue_slope: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `pool_conv_scale`: dx, dresidual (empty where it is dy), and that of weight, bias, w1, b1."""
    p, u = saved.view(2, *x.shape[:2])
    g = activations.apply(gate, u)
    none, index = p.new_empty((0,)), p.new_empty((0,), dtype=torch.int64)
    dgate, e, _ = pool_scale_reduce.eager(x, dy, g, aux, none, epilogue, epilogue_slope, "mean", "split", residual)
    du = dgate * activations.grad(gate, u)
    dp, *dweights = gradients(p, du, weight, bias, w1, b1, act, slope, circular)
    written = keeps_e(epilogue, residual)
    through = "identity" if residual else epilogue
    dx = pool_scale_apply.eager(
        x, e if written else dy, g, dp, none, index, none, through, epilogue_slope, "mean", "split"
    )
    return dx, e, *dweights


__all__ = ["pool_conv_scale", "pool_conv_scale_bwd"]
