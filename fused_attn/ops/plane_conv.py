"""Convolution of a few planes to one: the small network between both ends of a gate per pixel.

    y[n, 0, h, w] = b + Σ_p Σ_i Σ_j weight[0, p, i, j] · q[n, p, h + i − (K−1)/2, w + j − (L−1)/2]      q is 0 outside

CBAM's spatial gate has P = 2 and K = L = 7 (Woo et al., arXiv:1807.06521, eq. 3). A convolution library arranges such
planes for the many channels that it expects, and spends more on that than the sums take. Backward:

    dq[n, p]      = the same convolution of dy by the flipped weight
    dweight[p, i, j] = Σ_n,h,w dy[n, h, w] · q[n, p, h + i − (K−1)/2, w + j − (L−1)/2],      db = Σ dy

A GPU takes the eager form, which is torch's convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator
from ..registry import case, op
from . import checks


def _check(planes: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.tensor("planes", planes)
    checks.tensor("weight", weight)
    if planes.dim() != 4 or planes.shape[1] < 1 or 0 in planes.shape[2:]:
        raise ValueError(f"planes must have shape (N, P, H, W), none but N zero; got {tuple(planes.shape)}")
    shape = tuple(weight.shape)
    if len(shape) != 4 or shape[:2] != (1, planes.shape[1]) or shape[2] % 2 == 0 or shape[3] % 2 == 0:
        raise ValueError(f"weight must have shape (1, {planes.shape[1]}, K, L), K and L odd; got {shape}")
    checks.shaped("bias", bias, (1,), "(1,)")
    checks.same_device("planes", planes, weight=weight, bias=bias)


def _convolve(planes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator(planes.dtype)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(planes.to(acc), weight.to(acc), None if bias is None else bias.to(acc), padding=padding)


def _save(args: tuple, outs: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    return args, ()


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    planes, weight, bias = saved
    dplanes, dweight, dbias = plane_conv_bwd(planes, grads[0], weight, bias)
    return dplanes, dweight, None if bias is None else dbias


@op(
    formula=_convolve,
    check=_check,
    save=_save,
    backward=_backward,
    maps=(),
    budget=lambda *args: (0, 0),
    reduces=lambda planes, weight, bias: max(weight.numel(), planes[:, 0].numel()),
    cases=[
        case("bench", planes=(8, 2, 28, 28), weight=(1, 2, 7, 7)),
        case(planes=(2, 2, 9, 8), weight=(1, 2, 7, 7), bias=(1,)),
        case(planes=(3, 1, 5, 33), weight=(1, 1, 3, 3)),
        case(planes=(2, 3, 37, 17), weight=(1, 3, 5, 9), bias=(1,)),
        case(planes=(2, 2, 1, 1), weight=(1, 2, 7, 7)),
        case(planes=(1, 1, 70, 4), weight=(1, 1, 1, 11)),
        case(planes=(0, 2, 5, 5), weight=(1, 2, 3, 3), bias=(1,)),
    ],
)
def plane_conv(planes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves P planes to one of the same size, with stride 1 and zeros around them.

    planes: (N, P, H, W)
    weight: (1, P, K, L), K and L odd
    bias: (1,) or None

    Returns (N, 1, H, W): float32 for half-precision planes, else the planes' dtype.
    Raises ValueError or TypeError, naming the argument, for shapes that don't fit.
    """
    return _convolve(planes, weight, bias).contiguous()


def _check_bwd(planes: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check(planes, weight, bias)
    checks.shaped("dy", dy, (planes.shape[0], 1, *planes.shape[2:]), "(N, 1, H, W)")


@op(check=_check_bwd, maps=(), budget=lambda *args: (0, 0))
def plane_conv_bwd(planes: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `plane_conv`: dplanes, dweight and dbias (empty without a bias), in their tensors' dtypes."""
    acc = accumulator(planes.dtype)
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    dplanes, dweight, _ = torch.ops.aten.convolution_backward(
        dy.to(acc), planes.to(acc), weight.to(acc), None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    dbias = planes.new_empty((0,)) if bias is None else dy.to(acc).sum().reshape(1).to(bias.dtype)
    return dplanes.to(planes.dtype).contiguous(), dweight.to(weight.dtype).contiguous(), dbias
