"""The CUDA kernels of csrc/cuda, without a GPU: run by an emulation of CUDA on the CPU, and compiled for three targets.

The emulation (tests/cuda_emu) compiles the very same files. It checks every kernel against its equations in float64,
under ten schedules, and asserts how often each map is read and written. The compiler says whether a kernel needs a
stack.
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_emu import mutants

KERNELS = mutants.KERNELS
SOURCES = sorted(path.stem for path in KERNELS.glob("*.cu"))
TARGETS = ("sm_80", "sm_90a", "sm_100")
GROUPS = ("emulator", "pool", "scale", "gradient", "excite", "far")

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def nvcc() -> str | None:
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The checks, for float32 and bfloat16."""
    return mutants.build(KERNELS, tmp_path_factory.mktemp("emulated"), "-O1", "-DCHECK_DTYPES=2")


@pytest.fixture(scope="module")
def all_dtypes(tmp_path_factory):
    return mutants.build(KERNELS, tmp_path_factory.mktemp("emulated"), "-O1")


def passes(program, group, *more):
    fine, said = mutants.check(program, group, *more)
    assert fine, said
    # What compares nothing proves nothing.
    assert int(re.search(r"(\d+) checks, 0 failures", said).group(1)) > (5 if group == "emulator" else 50_000)


@needs_gcc
def test_emulated(few):
    for group in GROUPS:
        passes(few, group)


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_emulated_in_every_dtype_and_on_large_maps(all_dtypes, group):
    passes(all_dtypes, group, "slow")


@needs_gcc
@pytest.mark.slow
def test_emulated_under_sanitizers(tmp_path):
    program = mutants.build(KERNELS, tmp_path, *mutants.SANITIZERS)
    for group in GROUPS:
        passes(program, group)


@needs_gcc
@pytest.mark.slow
def test_every_missing_synchronisation_is_noticed():
    run = subprocess.run(
        [sys.executable, mutants.__file__], capture_output=True, text=True, check=False, cwd=KERNELS.parent.parent
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSED" not in run.stdout


def test_every_synchronisation_has_a_mutant():
    text = "".join(path.read_text() for path in KERNELS.glob("*.cuh"))
    count = len(re.findall(r"__syncthreads\(|__shfl\w*\(|__syncwarp\(", text))
    assert len(mutants.mutants()) == count > 5
    # What the emulation doesn't model must not be there.
    for word in ("atomic", "__threadfence", "cluster", "asm", "volatile", "__ldg", "malloc"):
        assert not re.search(rf"\b{word}\w*\s*[(.]", text), word


class Built(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


@functools.cache
def built(source, target):
    """The kernels of a file, and their PTX by name."""
    with tempfile.TemporaryDirectory() as where:
        flags = f"-std=c++17 -O3 -arch={target} -cubin -Xptxas -v -Werror all-warnings --keep --keep-dir {where}"
        command = [nvcc(), *flags.split(), "-o", f"{where}/{source}.cubin", str(KERNELS / f"{source}.cu")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        ptx = (Path(where) / f"{source}.ptx").read_text()
    kernels = []
    for part in run.stderr.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part).group(1)
        number = lambda pattern, part=part: int(found.group(1)) if (found := re.search(pattern, part)) else 0
        stores, loads = number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads")
        stack = max(number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes cumulative stack"))
        kernels.append(Built(name, number(r"Used (\d+) registers"), stack, stores + loads, number(r"(\d+) bytes smem")))
    bodies = {re.match(r"\w+", body).group(): body for body in ptx.split(".visible .entry ")[1:]}
    return kernels, bodies


def widths(kind, body):
    """How wide the accesses to global memory are, in bits."""
    found = re.findall(rf"\b{kind}\.global(?:\.nc)?(?:\.v(\d))?\.[a-z]+(\d+)", body)
    return {int(count or 1) * int(bits) for count, bits in found}


def compiles_well(source, target):
    kernels, bodies = built(source, target)
    assert len(kernels) == len(bodies) >= 12, "fewer kernels than dtypes"
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.spilled == 0, kernel
        assert 0 < kernel.registers <= 128, kernel  # two blocks of 256 threads to a multiprocessor
        assert kernel.shared <= 48 << 10, kernel
        body = bodies[kernel.name]
        # Kernels over maps are named by their dtype and their elements per access: 16 bytes, or 1 on an unaligned map.
        name = re.search(r"(scale|spread|sum_\w+)_kernelI(f|d|\d+\w+?)Li(\d+)E", kernel.name)
        if name is None or name.group(3) == "1":
            continue
        assert 128 in widths("ld", body), f"{kernel.name} loads no 16 bytes"
        if not name.group(1).startswith("sum"):  # whose stores are maps alone: 16 bytes, or an element at the end
            element = {"f": 32, "d": 64}.get(name.group(2), 16)
            assert widths("st", body) == {128, element}, kernel.name


@needs_nvcc
def test_compiles_for_hopper():
    compiles_well("scale", "sm_90a")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_every_target(source, target):
    compiles_well(source, target)
