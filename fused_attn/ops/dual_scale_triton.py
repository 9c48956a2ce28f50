"""Triton launchers of dual_scale's three passes; the kernels are pixel_kernels's."""

import torch
from torch import Tensor

from ..layout import accumulator
from .channel_pool import has_max
from .dual_scale import reads_x
from .pixel_kernels import apply, sums
from .pool_scale import keeps_e


def dual_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, aux: Tensor | None, planes: Tensor, affine: Tensor | None,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    e = torch.empty_like(x) if keeps_e(act, residual) else None
    top = planes[:, -1] if has_max(pool) and ties == "split" else None
    _, dpixel, shared = sums(
        x, dy, aux, gate, pixel, top, act, slope, "product", e, None, None, accumulator(x.dtype), affine=affine
    )
    return dpixel, x.new_empty((0,)) if e is None else e, shared


def _within(
    x: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor, pool: str, ties: str
) -> tuple[Tensor | None, ...]:
    """What pooling over channels adds, per pixel: the mean's part, the maximum's, where that is."""
    mean = dplanes[:, 0] / x.shape[1] if pool != "max" else None
    if not has_max(pool):
        return mean, None, None, None
    if ties == "first":
        return mean, dplanes[:, -1], None, places
    return mean, dplanes[:, -1] / shared, planes[:, -1], None


def dual_scale_gate(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    values: Tensor, affine: Tensor | None, act: str, slope: float, pool: str, channel: str, ties: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mean, most, top, place = _within(x, dplanes, planes, places, shared, pool, ties)
    maxima = values if has_max(channel) and ties == "split" else None
    return apply(
        x, e, gate, pixel, mean, most, top, place, None, None, maxima, None, act, slope, False, None,
        accumulator(x.dtype), True, affine,
    )  # fmt: skip


def dual_scale_apply(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor, affine: Tensor | None, tilt: Tensor | None,
    act: str, slope: float, pool: str, channel: str, ties: str,
) -> Tensor:  # fmt: skip
    mean, most, top, place = _within(x, dplanes, planes, places, shared, pool, ties)
    size = x[0, 0].numel() if x.numel() else 1
    dmean, dmax = (dpooled[0], dpooled[1]) if channel == "mean_max" else (dpooled, dpooled)
    split, first = has_max(channel) and ties == "split", has_max(channel) and ties == "first"
    dx = torch.empty_like(x)
    apply(
        x, e, gate, pixel, mean, most, top, place, None if channel == "max" else dmean / size,
        (dmax / count if split else dmax) if has_max(channel) else None, values if split else None,
        index if first else None, act, slope, channel == "mean_abs", dx, None,
        reads_x(tilt, act, pool, channel, ties), affine, tilt,
    )  # fmt: skip
    return dx
