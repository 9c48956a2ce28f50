"""Importing the package: works without what is optional, brings in nothing heavy, writes nothing, takes little time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, *arguments, cwd=None, **env):
    """Runs a program in a fresh interpreter, and gives what it printed; fails with its traceback where it fails."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ATTN")}
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=cwd or ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


# Makes modules unfindable, as if they weren't installed.
BLOCK = """
import importlib.abc, sys
class Without(importlib.abc.MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
for name in {absent!r}:
    assert name not in sys.modules, name
"""
USE = """
import torch, fused_attn
torch.manual_seed(0)
x, gate = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3)
y = fused_attn.ops.scale(x, gate, act="relu")
y.sum().backward()
assert torch.equal(x.grad, gate[:, :, None, None] * (y > 0))
m = fused_attn.ops.channel_pool(x, "mean")
torch.testing.assert_close(m, x.mean((2, 3)), atol=1e-6, rtol=0)  # a mean may lie near 0: what is summed rounds, not it
"""


@pytest.mark.parametrize(
    "absent",
    [
        ["triton"],
        ["timm", "torchvision", "pytorchcv", "monai"],
        [
            "triton",
            "timm",
            "torchvision",
            "pytorchcv",
            "monai",
            "numpy",
            "setuptools",
            "packaging",
            "tqdm",
            "matplotlib",
        ],
    ],
    ids=["triton", "zoos", "everything-optional"],
)
def test_without(absent):
    done = python(BLOCK.format(absent=absent) + USE + "print(fused_attn.backend.triton_missing())")
    assert ("triton is not installed" in done.stdout) == ("triton" in absent)


def test_without_the_extension(tmp_path):
    """No compiler, no extension: a copy of the package that holds Python alone, and no compiler in PATH."""
    package = tmp_path / "fused_attn"
    for path in (ROOT / "fused_attn").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "fused_attn")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    code = USE + "from fused_attn import backend; print(fused_attn.__file__); print(backend.extension())"
    done = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path), PATH="")
    file, why = done.stdout.strip().splitlines()
    assert file == str(package / "__init__.py")
    assert why == "the C++ extension is not built"


def test_with_a_broken_extension(tmp_path):
    """A file that isn't a library costs a reason, not the import."""
    package = tmp_path / "fused_attn"
    for path in (ROOT / "fused_attn").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "fused_attn")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (package / "_C.abi3.so").write_bytes(b"no library")
    done = python(
        USE + "from fused_attn import backend; print(backend.extension())", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert done.stdout.startswith("the C++ extension does not load: ")
    assert not done.stderr


def test_without_cuda():
    """The package never asks for a GPU: neither at import, nor when an op runs on the CPU."""
    guard = """
import torch
def never(*args, **kwargs):
    raise AssertionError("CUDA was asked for")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = never
"""
    python(guard + USE, CUDA_VISIBLE_DEVICES="")


def test_import_is_light():
    """No triton, no zoo, no extension, no compiler stack; nothing on stdout or stderr."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import fused_attn
from fused_attn import backend
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([sorted(new), backend._extension, [m for m in sys.modules if m.startswith("torch._dynamo")],
                  [m for m in before if m.startswith("torch._dynamo")]]))
"""
    done = python(code)
    new, extension, dynamo, usual = json.loads(done.stdout)
    assert not {"triton", "timm", "torchvision", "pytorchcv", "setuptools", "numpy", "matplotlib"} & set(new), new
    assert extension == [], "the extension is loaded on first use"
    assert len(dynamo) <= len(usual), "importing the package brings in the compiler"
    assert not done.stderr


def test_import_writes_nothing(tmp_path):
    """Neither where it runs nor beside the package (bytecode apart, which Python was told not to write)."""
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "fused_attn").rglob("*") if "__pycache__" not in p.parts}
    python(
        "import fused_attn", "-B", cwd=tmp_path, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path)
    )
    after = {p: p.stat().st_mtime_ns for p in (ROOT / "fused_attn").rglob("*") if "__pycache__" not in p.parts}
    assert list(tmp_path.rglob("*")) == []
    assert before == after


def test_import_time(record_property):
    """Prints what the import costs beyond torch; a generous bound catches only a heavy import that crept in."""
    code = "import time, torch; t = time.perf_counter(); import fused_attn; print(time.perf_counter() - t)"
    seconds = min(float(python(code).stdout) for _ in range(3))
    record_property("import_seconds", seconds)
    print(f"import fused_attn: {1000 * seconds:.0f} ms beyond torch")
    assert seconds < 1.5


def test_info_runs():
    """The report is complete, in both forms, and says why what isn't there isn't."""
    text = subprocess.run(
        [sys.executable, "-m", "fused_attn.info"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert text.returncode == 0, text.stdout + text.stderr
    done = subprocess.run(
        [sys.executable, "-m", "fused_attn.info", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    info = json.loads(done.stdout)
    assert set(info) >= {"versions", "devices", "extension", "environment", "ops"}
    for name, results in info["ops"].items():
        assert name in text.stdout
        assert results["eager"] == "ok"
        assert all(re.match(r"ok$|not available: .+", r) for r in results.values()), results
