"""What `python -m bench qualify` is made of: items, each one thing to check or to time."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fused_attn import backend

from .support import ROOT

ITEM_SECONDS = 150.0
Payload = dict[str, Any]


class NotRun(Exception):
    """Why an item can't run here."""


class Wrong(AssertionError):
    """An item that found something wrong."""


@dataclass(frozen=True)
class Item:
    """One thing to check or time. `run` returns what to keep; it raises NotRun, or anything else where it fails.

    group: items of one group go to one worker, so that none compiles what another is compiling; empty: the first word
    """

    name: str
    run: Callable[[], Payload | None]
    prepare: Callable[[], object] | None = None
    seconds: float = ITEM_SECONDS
    group: str = ""


def backends_of(device: str) -> tuple[str, ...]:
    """The backends whose kernels can be on trial, first choice first."""
    found = tuple(b for b in backend.ORDER[device] if b != "eager")
    return found if device != "cpu" or backend.extension() is None else ("eager",)


def kernels_of(device: str) -> str:
    """The backend whose kernels are on trial."""
    return backends_of(device)[0]


def shares(items: Sequence[Item], workers: int) -> list[list[Item]]:
    """The items of each worker, in their order: group by group, the largest first, to whom has least to do."""
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.group or item.name.split()[0], []).append(i)
    found: list[list[int]] = [[] for _ in range(workers)]
    for places in sorted(groups.values(), key=len, reverse=True):
        min(found, key=len).extend(places)
    return [[items[i] for i in sorted(places)] for places in found]


def end(process: subprocess.Popen[Any], patience: float = 0.0) -> None:
    """Ends a process that has a session of its own, and all that it started.

    patience: seconds that it has to end what it started in sessions of their own
    """
    if patience and process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def output(command: Sequence[str], seconds: float, **more: str) -> tuple[int, str]:
    """Status and output of a command; `more` goes into its environment. Nothing that it started outlives it.

    Raises Wrong where it takes longer.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **more}, start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Wrong(f"stopped after {seconds:.0f} s") from None
    finally:
        end(process)
    return process.returncode, text
