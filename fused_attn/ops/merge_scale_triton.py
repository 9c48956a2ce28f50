"""Triton launchers of merge_scale's passes; the kernels are pixel_kernels's."""

from torch import Tensor

from ..layout import accumulator
from .pixel_kernels import scale, sums


def merge_scale_reduce(x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, merge: str) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    dgate, dpixel, _ = sums(x, dy, None, gate, pixel, None, "identity", 0.01, merge, None, None, acc, acc)
    return dgate, dpixel


def project(x: Tensor, gate: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    a, b, _ = sums(x, x, None, gate, pixel, None, "identity", 0.01, "product", None, None, acc, acc, True)
    return a, b


def merge_scale_apply(
    dy: Tensor, other: Tensor | None, gate: Tensor, pixel: Tensor, dmean: Tensor, weight: Tensor | None,
    dplane: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    size = dy[0, 0].numel() if dy.numel() else 1
    return scale(dy, gate, other, pixel, "identity", 0.01, merge, dmean / size, weight, dplane)
