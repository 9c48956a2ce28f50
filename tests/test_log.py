"""FUSED_ATTN_LOG: on stderr, once per op and kind of shape what ran and why, once per class why it ran unfused."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)

ROOT = Path(__file__).resolve().parent.parent


def stderr(code: str, log: str | None = "1", **env: str) -> list[str]:
    """The lines that a program writes to stderr, in a fresh process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ATTN")}
    if log is not None:
        env["FUSED_ATTN_LOG"] = log
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr.splitlines()


OPS = """
import torch, fused_attn
from fused_attn import ops
x, gate = torch.randn(2, 24, 8, 8), torch.rand(2, 24)
for _ in range(3):
    ops.scale(x, gate)
"""
FIRST = "fused_attn: scale on 2×24×8×8 float32: "


@pytest.mark.parametrize("log", [None, "0"])
def test_nothing_is_told_where_it_is_off(log: str | None) -> None:
    code = OPS + "from fused_attn import backend, plan; assert not backend._observers and not plan.unfused_observers"
    assert stderr(code, log) == []


AGAIN = {
    "ops.scale(x[:1], gate[:1])": [],
    "ops.scale(x[..., :7].contiguous(), gate)": ["scale on 2×24×8×7 float32: "],
    "[ops.scale(x[..., :i].contiguous(), gate) for i in (7, 6, 5)]": ["scale on 2×24×8×7 float32: "],
    "[ops.scale(x[..., :i], gate) for i in (7, 6, 5)]": ["scale on 2×24×8×7 float32: eager (cpp: "],
    "ops.scale(x.double(), gate)": ["scale on 2×24×8×8 float64: "],
    "ops.scale(x[:1, :8], gate[:1, :8])": ["scale on 1×8×8×8 float32: "],
    "ops.scale(x.flatten(2), gate)": ["scale on 2×24×64 float32: "],
    "ops.channel_pool(x)": ["channel_pool on 2×24×8×8 float32: "],
    "ops.scale(x.clone().requires_grad_(), gate).sum().backward()": ["scale_bwd on 2×24×8×8 float32: "],
    "use_backend('eager')(ops.scale)(x, gate)": ["scale on 2×24×8×8 float32: eager (forced)"],
}


def test_what_is_told_again() -> None:
    lines = stderr(
        OPS
        + f"""
import sys
from fused_attn import log, use_backend
told = log._told.copy()
for call in {list(AGAIN)!r}:
    print(call, file=sys.stderr)
    log._told = told.copy()
    eval(call)
"""
    )
    assert lines[0] == FIRST + "cpp (first choice on cpu)" or lines[0].startswith(FIRST + "eager (cpp: ")
    assert lines[1] in AGAIN  # the second and third call aren't told of
    calls = [i for i, line in enumerate(lines) if line in AGAIN] + [len(lines)]
    assert [lines[i] for i in calls[:-1]] == list(AGAIN)
    for start, end in itertools.pairwise(calls):
        found, expected = lines[start + 1 : end], AGAIN[lines[start]]
        assert len(found) == len(expected), lines[start:end]
        assert all(line.startswith(f"fused_attn: {text}") for text, line in zip(expected, found, strict=True)), found


def test_explain_and_compiled_code_with_it() -> None:
    lines = stderr("""
        import torch, fused_attn
        model = fused_attn.SqueezeExcite(24)
        x = torch.randn(2, 24, 8, 8)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            told = fused_attn.explain(model, x)
        assert [line.op for line in told.lines] == ["pool_mlp_scale"]
    """)
    assert len(lines) == 1
    assert "pool_mlp_scale on 2×24×8×8 float32: " in lines[0]


MODULES = """
import tests.support, torch, fused_attn
from torch import nn
from timm.layers import DropPath
from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import Bottleneck
x = torch.randn(2, 24, 8, 8)
model = nn.Sequential(*(Bottleneck(24, 6, attn_layer=SEModule) for _ in range(3)), SEModule(24, gate_layer="tanh"))
"""


def test_a_module_that_runs_unfused_is_told_of_once_per_class() -> None:
    pytest.importorskip("timm")
    lines = stderr(
        MODULES
        + """
model[2].drop_path = DropPath(0.5)
fused_attn.fuse_(model)
torch.compile(model[2], backend="eager", fullgraph=True)(x)  # telling of it there would break the graph
for block in model[:2]:
    block.se.fc1.register_forward_hook(lambda *_: None)
for _ in range(2):
    model(x)
"""
    )
    assert lines[0] == "fused_attn: timm.layers.squeeze_excite.SEModule unfused: gate is Tanh(), which no kernel has"
    assert sorted(line for line in lines[1:] if " unfused: " in line) == [
        "fused_attn: timm.layers.squeeze_excite.SEModule unfused: fc1 has hooks",
        "fused_attn: timm.models.resnet.Bottleneck unfused: drop_path stands between gate and add",
        "fused_attn: timm.models.resnet.Bottleneck unfused: its gate runs unfused",
    ]
    assert len([line for line in lines if "pool_mlp_scale on " in line]) == 1
