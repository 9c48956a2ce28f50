"""Triton launchers of affine_dual_scale's two passes of its own; the kernels are spatial_pool's and pixel_kernels's."""

from torch import Tensor

from .pixel_kernels import scale
from .spatial_pool_triton import pooled


def affine_spatial_pool(
    x: Tensor, gate: Tensor, affine: Tensor, pool: str, return_index: bool
) -> tuple[Tensor, Tensor]:
    return pooled(x, gate, affine, pool, return_index)


def affine_pixel_scale(
    x: Tensor, gate: Tensor, affine: Tensor, pixel: Tensor, residual: Tensor | None, act: str, slope: float
) -> Tensor:
    return scale(x, gate, residual, pixel, act, slope, "product", affine=affine)
