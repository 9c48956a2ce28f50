"""What `python -m bench qualify` is made of: items, each one thing to check or to time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fused_attn import backend

ITEM_SECONDS = 150.0
Payload = dict[str, Any]


class NotRun(Exception):
    """Why an item can't run here."""


class Wrong(AssertionError):
    """An item that found something wrong."""


@dataclass(frozen=True)
class Item:
    """One thing to check or time. `run` returns what to keep; it raises NotRun, or anything else where it fails."""

    name: str
    run: Callable[[], Payload | None]
    prepare: Callable[[], object] | None = None
    seconds: float = ITEM_SECONDS


def backends_of(device: str) -> tuple[str, ...]:
    """The backends whose kernels can be on trial, first choice first."""
    found = tuple(b for b in backend.ORDER[device] if b != "eager")
    return found if device != "cpu" or backend.extension() is None else ("eager",)


def kernels_of(device: str) -> str:
    """The backend whose kernels are on trial."""
    return backends_of(device)[0]
