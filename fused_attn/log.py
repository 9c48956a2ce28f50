"""`FUSED_ATTN_LOG=1`: on stderr, which backend ran an op and why, and why a module ran unfused, each told once.

    fused_attn: pool_mlp_scale on 8×256×56×56 float32: cpp (first choice on cpu)
    fused_attn: timm.layers.squeeze_excite.SEModule unfused: fc1 has hooks

An op is told of again where backend, reason, dtype, channels, the number of dimensions or the size, to a power of two,
are others: detectors change the size with every image. A class is told of again for another reason.
The variable is read when the package is imported; where it isn't set, nothing here runs.
"""

import math
import os
import re
import sys
from collections.abc import Hashable

from torch import nn
from torch.compiler import is_dynamo_compiling

from . import backend, plan

_told: set[Hashable] = set()


def enabled() -> bool:
    """Whether the environment asks for it: FUSED_ATTN_LOG is set, and neither empty nor 0."""
    return os.environ.get("FUSED_ATTN_LOG", "") not in ("", "0")


def start() -> None:
    """Tells of everything that runs from now on."""
    backend._observers.append(_ran)
    plan.unfused_observers.append(_unfused)


def _ran(choice: backend.Choice) -> None:
    shape = choice.shape
    size = math.prod(shape[2:]).bit_length()
    on = f"{'×'.join(map(str, shape)) or 'a number'} {str(choice.dtype).removeprefix('torch.')}"
    once = (choice.op, choice.backend, _wordy(choice.reason), choice.dtype, len(shape), shape[1:2], size)
    _tell(once, f"{choice.op} on {on}: {choice.backend} ({choice.reason})")


def _unfused(module: nn.Module, why: str) -> None:
    if not is_dynamo_compiling():  # printing would break the graph; what the graph runs is told of when it runs
        refused(plan.path(getattr(module, "original", type(module))), why)


def refused(cls: str, why: str) -> None:
    """Tells that modules of a class run unfused, unless nothing is to be told."""
    if _unfused in plan.unfused_observers:
        _tell((cls, _wordy(why)), f"{cls} unfused: {why}")


def _wordy(reason: str) -> str:
    """A reason without its numbers, shapes mostly: with others it is the same reason."""
    return re.sub(r"\d+", "", reason)


def _tell(once: Hashable, line: str) -> None:
    if once not in _told:
        _told.add(once)
        print(f"fused_attn: {line}", file=sys.stderr, flush=True)
