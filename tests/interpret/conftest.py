"""These tests run Triton's kernels in its interpreter, on the CPU, in a process of their own: import settles it."""

import os
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpret needs TRITON_INTERPRET=1 from the start of the process, and a process of its own:\n"
        "    TRITON_INTERPRET=1 python -m pytest tests/interpret        (make test does so)\n"
        "    python -m pytest tests --ignore=tests/interpret            (all the others)"
    )

if "triton" not in sys.modules:
    pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.interpreter import InterpretedFunction

import fused_attn


@pytest.fixture(scope="session", autouse=True)
def _interpreted():
    """The switch came in time: our kernels are not compiled ones."""
    from fused_attn.ops import scale_triton

    assert isinstance(scale_triton._scale_fwd_kernel, InterpretedFunction)


@pytest.fixture(autouse=True)
def _on_triton(_automatic_backend):
    with fused_attn.use_backend("triton"):
        yield
