"""First half of the backward of an affine map by a plane's own moments: `affine_apply`'s pass, without its dx."""

import torch
from torch import Tensor

from . import affine_kernels
from .pool_scale import keeps_e


def moments_affine_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    e = torch.empty_like(x) if keeps_e(act, residual) else None
    sums = affine_kernels.sums(x, dy, scale, shift, centre, aux, None, act, slope, None, e)
    return sums, x.new_empty((0,)) if e is None else e


__all__ = ["moments_affine_reduce"]
