"""Scaling by a gate, with what follows it: one read of x, one write of y.

    v[n, c, s] = x[n, c, s] · gate[n, c] (+ residual[n, c, s])        y = act(v)

Excitation's second half (SE, arXiv:1709.01507, eq. 4), the residual add and activation of the block around it, and
Caffe SENet's `Axpy`. Backward, e = dy·act'(v): dx = e·gate, dgate = Σ_s e·x, dresidual = e.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .channel_pool import spread


def epilogue_gradient(dy: Tensor, x: Tensor, gate: Tensor, aux: Tensor | None, act: str, slope: float) -> Tensor:
    """e = dy·act'(v) in the accumulation dtype. aux: the output or the residual, as `activations.needs_aux` says, or
    None."""
    acc = accumulator(x.dtype)
    e = dy.to(acc)
    if act == "identity":
        return e
    if aux is not None and act in activations.FROM_OUTPUT:
        d = activations.grad(act, aux.to(acc), slope)
    else:
        v = x.to(acc) * spread(gate.to(acc), x)
        d = activations.grad(act, v if aux is None else v + aux.to(acc), slope)
    return torch.where(d == 0, 0, e * d)  # a cut gradient is 0, whatever was cut


def check_epilogue(x: Tensor, gate: Tensor, residual: Tensor | None, act: str) -> None:
    """What `scale` and every op that ends like it ask of their arguments."""
    checks.tensor("gate", gate)
    checks.shaped("gate", gate, x.shape[:2], "(N, C)")
    checks.same_device("x", x, gate=gate)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)


def _check(x: Tensor, gate: Tensor, residual: Tensor | None, act: str, slope: float) -> None:
    checks.feature_map("x", x)
    check_epilogue(x, gate, residual, act)
    checks.number("slope", slope)


def formula(x: Tensor, gate: Tensor, residual: Tensor | None, act: str, slope: float) -> Tensor:
    """The equation above, in x's dtype, the gate's arithmetic in the accumulation dtype."""
    v = x.to(accumulator(x.dtype)) * spread(gate.to(accumulator(x.dtype)), x)
    if residual is not None:
        v = v + residual
    return activations.apply(act, v, slope).to(x.dtype)


def _save(args: tuple, y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, gate, residual, act, slope = args
    need = activations.needs_aux(act, residual is not None)
    return (x, gate, {"output": y, "residual": residual, None: None}[need]), (act, slope, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, gate, aux), (act, slope, residual), dy = saved, consts, match(grads[0], saved[0])
    dx, dgate, dresidual = scale_bwd(x, gate, aux, dy, act, slope, residual)
    if residual and act == "identity":
        dresidual = dy  # the identity's gradient is dy itself: nothing is written
    return dx, dgate, dresidual if residual else None


def _budget(x: Tensor, gate: Tensor, residual: Tensor | None, act: str, slope: float) -> tuple[int, int]:
    return 2 if residual is not None else 1, 1


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "residual"),
    budget=_budget,
    reduces=lambda x, *rest: x[0, 0].numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 256, 56, 56), gate=(8, 256)),
        case("bench", x=(8, 512, 28, 28), gate=(8, 512), residual=(8, 512, 28, 28), act="relu"),
        case(x=(2, 3, 7, 7), gate=(2, 3)),
        case(x=(2, 17, 13), gate=(2, 17), residual=(2, 17, 13)),
        case(x=(1, 5, 3, 4, 5), gate=(1, 5), residual=(1, 5, 3, 4, 5), act="silu"),
        case(x=(2, 31, 14, 14), gate=(2, 31), act="relu6"),
        case(x=(3, 8, 5, 3), gate=(3, 8), residual=(3, 8, 5, 3), act="leaky_relu", slope=0.2),
        case(x=(2, 7, 9, 9), gate=(2, 7), residual=(2, 7, 9, 9), act="gelu"),
        case(x=(2, 7, 9, 9), gate=(2, 7), act="hardswish"),
        case(x=(2, 16, 1, 1), gate=(2, 16), residual=(2, 16, 1, 1), act="relu"),
        case(x=(0, 4, 5, 5), gate=(0, 4)),
    ],
)
def scale(
    x: Tensor, gate: Tensor, residual: Tensor | None = None, act: str = "identity", slope: float = 0.01
) -> Tensor:
    """Multiplies every channel of a feature map by its gate, then adds a residual and applies an activation, in one
    pass.

    x: (N, C, *S) feature map
    gate: (N, C) factors; float32 is welcome beside a half-precision x
    residual: (N, C, *S) added after the gate, of x's dtype
    act: "identity" | "relu" | "relu6" | "leaky_relu" | "silu" | "gelu" | "hardswish"
    slope: negative slope of leaky_relu

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    return like(x, formula(x, gate, residual, act, slope))


def _check_bwd(x: Tensor, gate: Tensor, aux: Tensor | None, dy: Tensor, act: str, slope: float, residual: bool) -> None:
    checks.feature_map("x", x)
    check_epilogue(x, gate, aux, act)
    checks.like("dy", dy, "x", x)


@op(
    check=_check_bwd,
    maps=("x", "aux", "dy"),
    budget=lambda x, gate, aux, dy, act, slope, residual: (
        2 + (aux is not None),
        1 + (residual and act != "identity"),
    ),
)
def scale_bwd(
    x: Tensor, gate: Tensor, aux: Tensor | None, dy: Tensor, act: str, slope: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `scale` in one pass: dx, dgate, and dresidual (empty where it would be dy itself, or there is no
    residual)."""
    e = epilogue_gradient(dy, x, gate, aux, act, slope)
    dx = like(x, (e * spread(gate.to(e.dtype), x)).to(x.dtype))
    dgate = (e * x.to(e.dtype)).flatten(2).sum(-1).to(gate.dtype)
    return dx, dgate, like(x, e.to(x.dtype)) if residual and act != "identity" else x.new_empty(0)
