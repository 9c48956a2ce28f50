"""Scaling by gates, with what follows: one read of x, one write of y.

    v[n, c, s] = x[n, c, s] · f[n, c, s] (+ residual[n, c, s])        y = act(v)

    product          f = gate[n, c] · pixel[n, s]            CBAM (arXiv:1807.06521, eq. 1); without pixel SE's
    sum              f = gate[n, c] + pixel[n, s]            scSE (arXiv:1808.08127)
    sigmoid_product  f = 1 + σ(gate[n, c] · pixel[n, s])     BAM as its authors run it
    sigmoid_sum      f = 1 + σ(gate[n, c] + pixel[n, s])     BAM as the paper has it (arXiv:1807.06514, eq. 1–2)

With one gate alone f is that gate, or 1 + σ of it: excitation's second half (SE, arXiv:1709.01507, eq. 4), the residual
add and activation of the block around it, and Caffe SENet's `Axpy`. The factor is never a feature map.

Backward, e = dy·act'(v): dx = e·f, dgate = Σ_s e·x·∂f/∂gate, dpixel = Σ_c e·x·∂f/∂pixel, dresidual = e.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import activations, checks
from .channel_pool import spread

MERGES = ("product", "sum", "sigmoid_product", "sigmoid_sum")


def over(plane: Tensor) -> Tensor:
    """(N, *S) seen beside x: (N, 1, *S)."""
    return plane.unsqueeze(1)


def factor(x: Tensor, gate: Tensor | None, pixel: Tensor | None, merge: str) -> Tensor:
    """f above, in the accumulation dtype, as large as its gates are together."""
    acc = accumulator(x.dtype)
    parts = [] if gate is None else [spread(gate.to(acc), x)]
    parts += [] if pixel is None else [over(pixel.to(acc))]
    both = parts[0]
    if len(parts) == 2:
        both = parts[0] * parts[1] if merge.endswith("product") else parts[0] + parts[1]
    return 1 + torch.sigmoid(both) if merge.startswith("sigmoid") else both


def epilogue_gradient(
    dy: Tensor, x: Tensor, gate: Tensor | None, aux: Tensor | None, act: str, slope: float,
    pixel: Tensor | None = None, merge: str = "product",
) -> Tensor:  # fmt: skip
    """e = dy·act'(v) in the accumulation dtype. aux: the output or the residual, as `activations.needs_aux` says, or
    None."""
    acc = accumulator(x.dtype)
    e = dy.to(acc)
    if act == "identity":
        return e
    if aux is not None and act in activations.FROM_OUTPUT:
        d = activations.grad(act, aux.to(acc), slope)
    else:
        v = x.to(acc) * factor(x, gate, pixel, merge)
        d = activations.grad(act, v if aux is None else v + aux.to(acc), slope)
    return torch.where(d == 0, 0, e * d)  # a cut gradient is 0, whatever was cut


def check_epilogue(x: Tensor, gate: Tensor | None, residual: Tensor | None, act: str) -> None:
    """What `scale` and every op that ends like it ask of their arguments."""
    checks.tensor("gate", gate)
    checks.shaped("gate", gate, x.shape[:2], "(N, C)")
    checks.same_device("x", x, gate=gate)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)


def check_gates(x: Tensor, gate: Tensor | None, pixel: Tensor | None, merge: str) -> None:
    """A gate, a pixel gate or both."""
    if pixel is None or gate is not None:
        checks.tensor("gate", gate)
    checks.shaped("gate", gate, x.shape[:2], "(N, C)")
    checks.shaped("pixel", pixel, (x.shape[0], *x.shape[2:]), "(N, *S)")
    checks.same_device("x", x, gate=gate, pixel=pixel)
    checks.one_of("merge", merge, MERGES)


def _check(
    x: Tensor, gate: Tensor | None, residual: Tensor | None, pixel: Tensor | None, act: str, slope: float, merge: str
) -> None:
    checks.feature_map("x", x)
    check_gates(x, gate, pixel, merge)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)


def formula(
    x: Tensor, gate: Tensor | None, residual: Tensor | None, pixel: Tensor | None = None, act: str = "identity",
    slope: float = 0.01, merge: str = "product",
) -> Tensor:  # fmt: skip
    """The equations above, the gates' arithmetic in the accumulation dtype."""
    v = x.to(accumulator(x.dtype)) * factor(x, gate, pixel, merge)
    if residual is not None:
        v = v + residual
    return activations.apply(act, v, slope).to(x.dtype)


def _save(args: tuple, y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, gate, residual, pixel, act, slope, merge = args
    need = activations.needs_aux(act, residual is not None)
    aux = {"output": y, "residual": residual, None: None}[need]
    return (x, gate, aux, pixel), (act, slope, merge, residual is not None)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, gate, aux, pixel), (act, slope, merge, residual), dy = saved, consts, match(grads[0], saved[0])
    dx, dgate, dresidual, dpixel = scale_bwd(x, gate, aux, pixel, dy, act, slope, merge, residual)
    if residual and act == "identity":
        dresidual = dy  # the identity's gradient is dy itself: nothing is written
    return (
        dx,
        None if gate is None else dgate,
        dresidual if residual else None,
        None if pixel is None else dpixel,
    )


def _reduces(x: Tensor, gate: Tensor | None, residual: Tensor | None, pixel: Tensor | None, *rest: object) -> int:
    size = x[0, 0].numel() if x.numel() else 1
    return size if pixel is None else max(size, x.shape[1])


def _budget(x: Tensor, gate: Tensor | None, residual: Tensor | None, *rest: object) -> tuple[int, int]:
    return 2 if residual is not None else 1, 1


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "residual"),
    budget=_budget,
    reduces=_reduces,
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
        case("bench", x=(8, 512, 28, 28), gate=(8, 512), pixel=(8, 28, 28)),
        case("bench", x=(8, 512, 28, 28), gate=(8, 512), pixel=(8, 28, 28), merge="sigmoid_product"),
        case(x=(2, 13, 7, 7), gate=(2, 13), pixel=(2, 7, 7)),
        case(x=(2, 37, 13), gate=(2, 37), residual=(2, 37, 13), pixel=(2, 13), act="relu"),
        case(x=(1, 6, 3, 4, 5), pixel=(1, 3, 4, 5), residual=(1, 6, 3, 4, 5), act="silu"),
        case(x=(3, 6, 5, 5), pixel=(3, 5, 5), act="leaky_relu", slope=0.2),
        case(x=(2, 16, 1, 1), gate=(2, 16), pixel=(2, 1, 1)),
        case(x=(2, 9, 6, 6), gate=(2, 9), pixel=(2, 6, 6), merge="sum"),
        case(x=(2, 9, 6, 6), gate=(2, 9), pixel=(2, 6, 6), residual=(2, 9, 6, 6), merge="sum", act="relu"),
        case(x=(2, 18, 5, 7), gate=(2, 18), pixel=(2, 5, 7), merge="sigmoid_product"),
        case(
            x=(2, 18, 5, 7), gate=(2, 18), pixel=(2, 5, 7), residual=(2, 18, 5, 7), merge="sigmoid_product", act="relu6"
        ),
        case(x=(3, 19, 6, 4), gate=(3, 19), pixel=(3, 6, 4), merge="sigmoid_sum"),
        case(x=(2, 5, 4, 4), gate=(2, 5), merge="sigmoid_sum"),
        case(x=(0, 4, 5, 5), gate=(0, 4), pixel=(0, 5, 5)),
    ],
)
def scale(
    x: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pixel: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
    merge: str = "product",
) -> Tensor:
    """Multiplies a feature map by a gate per channel, per pixel or both, then adds a residual and applies an
    activation, in one pass.

    x: (N, C, *S) feature map
    gate: (N, C) per channel; float32 is welcome beside a half-precision x. None: pixel stands alone
    residual: (N, C, *S) added after the gates, of x's dtype
    pixel: (N, *S) per pixel; None: gate stands alone
    act: "identity" | "relu" | "relu6" | "leaky_relu" | "silu" | "gelu" | "hardswish"
    slope: negative slope of leaky_relu
    merge: "product" x·gate·pixel (CBAM) | "sum" x·(gate + pixel) (scSE) | "sigmoid_product" x·(1 + σ(gate·pixel)) and
        "sigmoid_sum" x·(1 + σ(gate + pixel)) (BAM: its code and its paper)

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    return like(x, formula(x, gate, residual, pixel, act, slope, merge))


def _check_bwd(
    x: Tensor, gate: Tensor | None, aux: Tensor | None, pixel: Tensor | None, dy: Tensor,
    act: str, slope: float, merge: str, residual: bool,
) -> None:  # fmt: skip
    _check(x, gate, aux, pixel, act, slope, merge)
    checks.like("dy", dy, "x", x)


@op(
    check=_check_bwd,
    maps=("x", "aux", "dy"),
    budget=lambda x, gate, aux, pixel, dy, act, slope, merge, residual: (
        2 + (aux is not None),
        1 + (residual and act != "identity"),
    ),
)
def scale_bwd(
    x: Tensor, gate: Tensor | None, aux: Tensor | None, pixel: Tensor | None, dy: Tensor,
    act: str, slope: float, merge: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `scale` in one pass: dx, dgate, dresidual (empty where it would be dy itself, or there is no
    residual), dpixel; empty too where there is no such gate."""
    e = epilogue_gradient(dy, x, gate, aux, act, slope, pixel, merge)
    dx = like(x, (e * factor(x, gate, pixel, merge)).to(x.dtype))
    dgate, dpixel = gate_gradients(e * x.to(e.dtype), x, gate, pixel, merge)
    dresidual = like(x, e.to(x.dtype)) if residual and act != "identity" else x.new_empty((0,))
    return (
        dx,
        x.new_empty((0,)) if gate is None else dgate.to(gate.dtype),
        dresidual,
        x.new_empty((0,)) if pixel is None else dpixel.to(pixel.dtype),
    )


def gate_gradients(
    t: Tensor, x: Tensor, gate: Tensor | None, pixel: Tensor | None, merge: str
) -> tuple[Tensor, Tensor]:
    """dgate (N, C) and dpixel (N, *S) from t = e·x, in its dtype."""
    if merge.startswith("sigmoid"):
        sigma = factor(x, gate, pixel, merge) - 1
        t = t * (sigma * (1 - sigma))
    by_gate = by_pixel = t
    if merge.endswith("product") and gate is not None and pixel is not None:
        by_gate, by_pixel = t * over(pixel.to(t.dtype)), t * spread(gate.to(t.dtype), x)
    return by_gate.flatten(2).sum(-1), by_pixel.sum(1)
