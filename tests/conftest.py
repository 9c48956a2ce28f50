"""What every suite shares. `FUSED_ATTN_TEST_DEVICE=cuda` runs the suites that are driven by the registry on a GPU."""

import os

# Before torch starts its pool: the suites run beside each other, and thread counts are set where they matter.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import fused_attn
from fused_attn import backend
from fused_attn.blocks import normed
from fused_attn.convert import table


@pytest.fixture(autouse=True)
def _automatic_backend():
    """A test that forces a backend does so by itself, whatever FUSED_ATTN_BACKEND says outside."""
    with fused_attn.use_backend("auto"):
        yield


@pytest.fixture(autouse=True)
def _small_maps_too(monkeypatch):
    """Norms are computed with what follows them whatever the size: tests have small maps."""
    monkeypatch.setattr(normed, "LEAST", 0)


@pytest.fixture
def launches(monkeypatch):
    """Every (op, arguments) that reaches a backend during the test, forward and backward, in order."""
    seen = []
    run = backend.run

    def recording(op, args, *rest):
        seen.append((op, args))
        return run(op, args, *rest)

    monkeypatch.setattr(backend, "run", recording)
    return seen


@pytest.fixture
def threads():
    """Sets the number of threads for this test: `threads(2)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """The table of the whole models that were compared."""
    rows = [
        [str(value) for value in values]
        for report in terminalreporter.stats.get("passed", [])
        for name, values in getattr(report, "user_properties", [])
        if name == "whole model" and report.when == "call"
    ]
    if rows:
        fused = ["whole model", "gates", "tails", "plain", "refused"]
        head = [*fused, "float64 y", "float64 grads", "float32 y", "unfused float32 y"]
        terminalreporter.section("relative errors of fused models against their float64 originals")
        terminalreporter.write_line("\n".join(table([head, *sorted(rows)])))
