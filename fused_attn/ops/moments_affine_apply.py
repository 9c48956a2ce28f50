"""The last half of the backward of what an affine map by a plane's own moments made: dx, an affine function of e and x.

    e = (gate·dy + spread)·act'(v),        v = scale·(x − centre) + shift
    dx = scale·e + tilt·(x − centre) + level, and dvalues at their places

A mean's gradient is a level, that of squared deviations a tilt, an extremum's stands at its place; so the gradient of a
BatchNorm's statistics and of every pooling costs no pass of its own. Without dy, gate·dy is 0.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like
from ..registry import op
from . import activations, checks
from .channel_pool import spread as over


def _check(
    x: Tensor, dy: Tensor | None, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None,
    gate: Tensor | None, spread: Tensor | None, tilt: Tensor | None, level: Tensor | None, dvalues: Tensor | None,
    index: Tensor | None, act: str, slope: float,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.like("dy", dy, "x", x)
    small = dict(scale=scale, shift=shift, centre=centre, gate=gate, spread=spread, tilt=tilt, level=level)
    for name, value in small.items():
        checks.shaped(name, value, x.shape[:2], "(N, C)")
    checks.same_device("x", x, **small)
    checks.one_of("act", act, activations.EPILOGUES)
    if (dy is not None or spread is not None) and scale is None:
        raise TypeError("scale must be a tensor beside dy or spread; got None")
    if act != "identity" and shift is None:
        raise TypeError(f"shift must be a tensor for act={act!r}; got None")
    if dvalues is not None:
        checks.shaped("dvalues", dvalues, (2, *x.shape[:2]), "(2, N, C)")
        checks.index("index", index, (2, *x.shape[:2]), "(2, N, C)")


def reads_x(tilt: Tensor | None, dy: Tensor | None, spread: Tensor | None, act: str) -> bool:
    """Whether x is needed: for the tilt, or for the activation's place."""
    return tilt is not None or (act != "identity" and (dy is not None or spread is not None))


@op(
    check=_check,
    maps=("x", "dy"),
    budget=lambda x, dy, scale, shift, centre, gate, spread, tilt, level, dvalues, index, act, slope: (
        int(dy is not None) + reads_x(tilt, dy, spread, act),
        1,
    ),
)
def moments_affine_apply(
    x: Tensor, dy: Tensor | None, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None,
    gate: Tensor | None, spread: Tensor | None, tilt: Tensor | None, level: Tensor | None, dvalues: Tensor | None,
    index: Tensor | None, act: str, slope: float,
) -> Tensor:  # fmt: skip
    """Last half of the backward: dx of the equations above, in x's dtype and layout, in one pass.

    gate: None: 1; spread, tilt, level: (N, C), None: 0; dvalues, index: (2, N, C) what is added at two places of every
        plane, or None
    """
    acc = accumulator(x.dtype)
    wide = lambda t: over(t.to(acc), x)
    at = x.to(acc) if centre is None else x.to(acc) - wide(centre)
    out = torch.zeros((), dtype=acc, device=x.device).expand(x.shape)
    if scale is not None and (dy is not None or spread is not None):
        e = out if dy is None else dy.to(acc)
        e = e if gate is None else e * wide(gate)
        e = e if spread is None else e + wide(spread)
        if act != "identity":
            assert shift is not None
            d = activations.grad(act, wide(scale) * at + wide(shift), slope)
            e = torch.where(d == 0, 0, e * d)  # a cut gradient is 0, whatever was cut
        out = wide(scale) * e
    out = out if tilt is None else out + wide(tilt) * at
    out = out if level is None else out + wide(level)
    if dvalues is not None:
        assert index is not None
        places = torch.zeros(x.shape, dtype=acc, device=x.device).flatten(2)
        for where, value in zip(index, dvalues, strict=True):
            places = places.scatter_add(-1, where.unsqueeze(-1), value.to(acc).unsqueeze(-1))
        out = out + places.view(x.shape)
    return like(x, out.to(x.dtype))


__all__ = ["moments_affine_apply"]
