"""The shapes that attention meets in networks at 224 px: (channels, height and width, hidden width of its MLP).

A network's stages, each shape once. `rescaled` makes an op's case at such a shape out of one that the op declares.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_attn.registry import Case, Op

SETS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "resnet50": ((256, 56, 16), (512, 28, 32), (1024, 14, 64), (2048, 7, 128)),
    "efficientnet_b0": (
        (32, 112, 8), (96, 56, 4), (144, 56, 6), (144, 28, 6), (240, 28, 10), (240, 14, 10), (480, 14, 20),
        (672, 14, 28), (672, 7, 28), (1152, 7, 48),
    ),
    "mobilenetv3": ((72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (672, 7, 168), (960, 7, 240)),
    "sknet": ((64, 56, 8), (128, 28, 8), (256, 14, 16), (512, 7, 32)),
    "resnest": (
        (64, 56, 32), (128, 56, 64), (128, 28, 64), (256, 28, 128), (256, 14, 128), (512, 14, 256), (512, 7, 256),
    ),
    "epsanet": ((64, 56, 1), (128, 28, 2), (256, 14, 4), (512, 7, 8)),
}  # fmt: skip
BATCHES = {"cpu": (8,), "cuda": (1, 8, 64, 256)}


def rescaled(op: Op, given: Case, n: int, c: int, s: int, h: int) -> Case | None:
    """The op's case at another shape, or None where the op doesn't take it.

    The first argument of the given case is a map (N, C, S, S). Elsewhere N, C and S stand for themselves, and C/16 is
    a hidden width. What else is in proportion to C stays where the op takes that (SGE's 64 groups), else it is scaled.
    """
    x = given.args[op.arguments[0]]
    if not isinstance(x, tuple) or len(x) != 4 or op.arguments[0] not in op.maps:
        return None
    n0, c0, s0 = x[0], x[1], x[2]
    for proportional in (False, True):

        def dims(name: str, shape: tuple[int, ...], proportional: bool = proportional) -> Iterator[int]:
            for i, d in enumerate(shape):
                if name in op.maps:
                    yield (n, c if d == c0 else max(1, d * c // c0), s, s)[i]
                elif d == n0 and i == 0:
                    yield n
                elif d == c0:
                    yield c
                elif d == c0 // 16 and c0 in (t for v in given.args.values() if isinstance(v, tuple) for t in v):
                    yield h
                elif d == s0 and i >= len(shape) - 2 and len(shape) > 2 and shape[0] == n0:
                    yield s
                elif proportional and d > 1 and d * c % c0 == 0 and c0 % d == 0:
                    yield d * c // c0
                else:
                    yield d

        args = {k: tuple(dims(k, v)) if isinstance(v, tuple) else v for k, v in given.args.items()}
        made = Case(args, given.tags)
        if takes(op, made):
            return made
    return None


def takes(op: Op, c: Case) -> bool:
    """Whether an op accepts a case: asked with tensors that have no data."""
    make = lambda v: torch.empty(v, device="meta") if isinstance(v, tuple) else v
    args: list[Any] = [make(v) for v in op.bind((), dict(c.args))]
    try:
        op.check(*args)
        out = op.eager(*args)
    except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError):
        return False
    return isinstance(out, Tensor | tuple)


def small(op: Op, given: Case) -> Case | None:
    """The case with so small a map, of two samples and two positions a side, that the host is most of its time."""
    x = given.args[op.arguments[0]]
    if not isinstance(x, tuple) or len(x) != 4:
        return None
    return rescaled(op, given, 2, x[1], 2, max(1, x[1] // 16))
