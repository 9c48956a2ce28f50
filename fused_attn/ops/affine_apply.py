"""An affine map per sample and channel, with what follows: one read of x, one write of y.

    v[n, c, s] = scale[n, c]·(x[n, c, s] − centre[n, c]) + shift[n, c] (+ residual[n, c, s])
    y = act(v), or gate[n, c]·act(v)

A BatchNorm (Ioffe and Szegedy, arXiv:1502.03167, alg. 1) is such a map, and so are a BatchNorm and the gate behind it,
the residual add and the activation of the block around them. Subtracting the centre first keeps the digits of a channel
whose mean is large beside its deviation.

Backward, e = gate·dy·act'(v): dx = scale·e, dscale = Σ_s e·(x − centre), dshift = Σ_s e, dcentre = −scale·dshift,
dresidual = e, dgate = Σ_s dy·act(v).
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .channel_pool import spread


def affine(x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None) -> Tensor:
    """scale·(x − centre) + shift in the accumulation dtype."""
    acc = accumulator(x.dtype)
    at = x.to(acc) if centre is None else x.to(acc) - spread(centre.to(acc), x)
    return spread(scale.to(acc), x) * at + spread(shift.to(acc), x)


def behind(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None, act: str,
    slope: float,
) -> Tensor:  # fmt: skip
    """dy·act'(v) in the accumulation dtype. aux: the output or the residual, as `activations.needs_aux` says, or
    None."""
    acc = accumulator(x.dtype)
    e = dy.to(acc)
    if act == "identity":
        return e
    if aux is not None and act in activations.FROM_OUTPUT:
        d = activations.grad(act, aux.to(acc), slope)
    else:
        v = affine(x, scale, shift, centre)
        d = activations.grad(act, v if aux is None else v + aux.to(acc), slope)
    return torch.where(d == 0, 0, e * d)  # a cut gradient is 0, whatever was cut


def check_affine(x: Tensor, **others: Tensor | None) -> None:
    """(N, C) tensors beside x; scale and shift must be there."""
    checks.feature_map("x", x)
    for name, value in others.items():
        if name in ("scale", "shift"):
            checks.tensor(name, value)
        checks.shaped(name, value, x.shape[:2], "(N, C)")
    checks.same_device("x", x, **others)


def _check(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    act: str, slope: float,
) -> None:  # fmt: skip
    check_affine(x, scale=scale, shift=shift, centre=centre, gate=gate)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)
    if residual is not None and gate is not None:
        raise ValueError("residual and gate don't go together: no network gates what a residual was added to")


def formula(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None = None, residual: Tensor | None = None,
    gate: Tensor | None = None, act: str = "identity", slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """The equations above, in the accumulation dtype up to the last rounding."""
    v = affine(x, scale, shift, centre)
    y = activations.apply(act, v if residual is None else v + residual, slope)
    return (y if gate is None else y * spread(gate.to(y.dtype), x)).to(x.dtype)


def _save(args: tuple, y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, scale, shift, centre, residual, gate, act, slope = args
    need = activations.needs_aux(act, residual is not None)
    aux = {"output": y, "residual": residual, None: None}[need]
    return (x, scale, shift, centre, aux, gate), (act, slope, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, scale, shift, centre, aux, gate), (act, slope, residual), dy = saved, consts, match(grads[0], saved[0])
    dx, sums, dresidual = affine_apply_bwd(x, dy, scale, shift, centre, aux, gate, act, slope, residual)
    if residual and act == "identity":
        dresidual = dy  # the identity's gradient is dy itself: nothing is written
    return (
        dx,
        sums[0].to(scale.dtype),
        sums[1].to(shift.dtype),
        None if centre is None else (-scale * sums[1]).to(centre.dtype),
        dresidual if residual else None,
        None if gate is None else sums[2].to(gate.dtype),
    )


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "residual"),
    budget=lambda x, scale, shift, centre, residual, *rest: (2 if residual is not None else 1, 1),
    reduces=lambda x, *rest: x[0, 0].numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 256, 56, 56), scale=(8, 256), shift=(8, 256), residual=(8, 256, 56, 56), act="relu"),
        case("bench", x=(8, 512, 28, 28), scale=(8, 512), shift=(8, 512), gate=(8, 512), act="silu"),
        case(x=(2, 3, 7, 7), scale=(2, 3), shift=(2, 3)),
        case(x=(2, 17, 13), scale=(2, 17), shift=(2, 17), centre=(2, 17), residual=(2, 17, 13)),
        case(x=(1, 5, 3, 4, 5), scale=(1, 5), shift=(1, 5), residual=(1, 5, 3, 4, 5), act="silu"),
        case(x=(2, 31, 14, 14), scale=(2, 31), shift=(2, 31), centre=(2, 31), act="relu6"),
        case(
            x=(3, 8, 5, 3), scale=(3, 8), shift=(3, 8), centre=(3, 8), residual=(3, 8, 5, 3), act="leaky_relu",
            slope=0.2,
        ),
        case(x=(2, 7, 9, 9), scale=(2, 7), shift=(2, 7), gate=(2, 7), act="relu"),
        case(x=(2, 33, 7, 7), scale=(2, 33), shift=(2, 33), centre=(2, 33), gate=(2, 33), act="hardswish"),
        case(x=(2, 16, 1, 1), scale=(2, 16), shift=(2, 16), residual=(2, 16, 1, 1), act="relu"),
        case(x=(0, 4, 5, 5), scale=(0, 4), shift=(0, 4)),
    ],
)  # fmt: skip
def affine_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    centre: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Tensor:
    """Maps every plane by an affine function of its own, adds a residual, applies an activation and a gate, in one
    pass.

    x: (N, C, *S) feature map
    scale, shift: (N, C); float32 is welcome beside a half-precision x
    centre: (N, C) subtracted from x before scaling; None: nothing is
    residual: (N, C, *S) added before the activation, of x's dtype; not with gate
    gate: (N, C) multiplied after the activation
    act: "identity" | "relu" | "relu6" | "leaky_relu" | "silu" | "gelu" | "hardswish"
    slope: negative slope of leaky_relu

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    return like(x, formula(x, scale, shift, centre, residual, gate, act, slope))


def _check_bwd(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    gate: Tensor | None, act: str, slope: float, residual: bool,
) -> None:  # fmt: skip
    _check(x, scale, shift, centre, aux, gate, act, slope)
    checks.like("dy", dy, "x", x)


@op(
    check=_check_bwd,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, scale, shift, centre, aux, gate, act, slope, residual: (
        2 + (aux is not None),
        1 + (residual and act != "identity"),
    ),
)
def affine_apply_bwd(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    gate: Tensor | None, act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `affine_apply` in one pass: dx; sums (2, N, C): Σ e·(x − centre) and Σ e, with a gate (3, N, C): its
    own gradient beside them; dresidual, empty where it would be dy itself, or there is no residual."""
    acc = accumulator(x.dtype)
    e = behind(dy, x, scale, shift, centre, aux, act, slope)
    sums = []
    if gate is not None:
        value = activations.apply(act, affine(x, scale, shift, centre), slope)
        sums = [(dy.to(acc) * value).flatten(2).sum(-1)]
        e = e * spread(gate.to(acc), x)
    at = x.to(acc) if centre is None else x.to(acc) - spread(centre.to(acc), x)
    sums = [(e * at).flatten(2).sum(-1), e.flatten(2).sum(-1), *sums]
    dx = like(x, (e * spread(scale.to(acc), x)).to(x.dtype))
    return dx, torch.stack(sums), like(x, e.to(x.dtype)) if residual and act != "identity" else x.new_empty((0,))


__all__ = ["affine_apply", "affine_apply_bwd"]
