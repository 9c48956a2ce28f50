"""The oldest torch that is served, beside the installed one: the extension of either runs under the other.

The stable ABI promises that; these tests see it. They install a second torch into a temporary environment, which takes
minutes and gigabytes, and so does building the extension against it. FUSED_ATTN_OLDEST_PYTHON names an interpreter that
has that torch, pytest and the build's needs already.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FLOOR = (
    re.search(r'^TORCH_FLOOR = "(.+)"', (ROOT / "setup.py").read_text(), re.M) if (ROOT / "setup.py").exists() else None
)
SUBSET = "test_values and cpp"  # every op, once per case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FLOOR is None, reason="needs a checkout")]


def environment(python, root):
    ours = {"FUSED_ATTN_BUILD", "TRITON_INTERPRET", "PYTHONPATH"}
    inherited = {
        k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("MAKE", "MFLAGS", "PYTEST"))
    }
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])  # where ninja is
    return inherited | {"PATH": path, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def version(python):
    done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    return done.stdout.strip() or f"nothing: {done.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """An interpreter with the oldest torch."""
    floor = FLOOR[1]
    if torch.__version__.startswith(f"{floor}."):
        pytest.skip(f"the installed torch is {floor} already")
    if python := os.environ.get("FUSED_ATTN_OLDEST_PYTHON"):
        assert version(python).startswith(f"{floor}."), f"{python} has torch {version(python)}"
        yield python
        return
    venv = tmp_path_factory.mktemp("oldest")
    python = str(venv / "bin/python")
    wanted = [f"torch=={floor}.*", "ninja", "packaging", "setuptools>=77", "wheel", "pytest", "hypothesis"]
    try:
        for command in (
            [sys.executable, "-m", "venv", str(venv)],
            [python, "-m", "pip", "install", "-qq", "--no-compile", *wanted],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
        assert version(python).startswith(f"{floor}."), version(python)
        yield python
    except subprocess.SubprocessError as error:
        words = str(getattr(error, "stderr", "") or error).strip().splitlines()
        pytest.skip(f"torch {floor} can't be installed here: {words[-1][:200] if words else error}")
    finally:
        shutil.rmtree(venv, ignore_errors=True)


@pytest.fixture(scope="module")
def built(oldest, tmp_path_factory):
    """A copy of this checkout with the extension built against the oldest torch."""
    tree = tmp_path_factory.mktemp("checkout") / "fused_attn"
    away = shutil.ignore_patterns("_C*", "__pycache__")
    for name in ("csrc", "fused_attn", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=away)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [oldest, "setup.py", "build_ext", "--inplace"]
    env = environment(oldest, tree) | {"FUSED_ATTN_BUILD": "require"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return tree


def conforms(python, root):
    """Runs the C++ ops' comparison with float64 there."""
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py", "-k", SUBSET]
    done = subprocess.run(command, cwd=root, env=environment(python, root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 100, done.stdout[-2000:]


def test_this_extension_runs_under_the_oldest_torch(oldest):
    if not list((ROOT / "fused_attn").glob("_C*")):
        pytest.skip("the extension isn't built here")
    conforms(oldest, ROOT)


def test_the_oldest_torch_builds_the_extension(oldest, built):
    conforms(oldest, built)


def test_its_extension_runs_under_this_torch(built):
    conforms(sys.executable, built)
