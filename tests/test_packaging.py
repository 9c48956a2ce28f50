"""Set-up: what setup.py builds, what it does where it can't, what wheel and source archive hold, what make runs.

Everything happens in a temporary copy of the build files around a stub package, so that nothing of this checkout
changes and a build takes seconds: only csrc/module.cpp is compiled, which needs Python's headers and none of torch's.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "requirements-dev.txt", "Makefile"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A small project with this project's build files."""
    tree = tmp_path / "project"
    tree.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").write_text("# A stub\n")
    (tree / "csrc/cpu").mkdir(parents=True)
    shutil.copy(ROOT / "csrc/module.cpp", tree / "csrc")
    (tree / "csrc/shared.h").write_text("#pragma once\n")
    (tree / "fused_attn/ops").mkdir(parents=True)
    (tree / "fused_attn/__init__.py").write_text('__version__ = "0.1.0"\nimport torch\n')
    (tree / "fused_attn/ops/__init__.py").touch()
    (tree / "fused_attn/py.typed").touch()
    return tree


def environment(tree, **env):
    ours = {"FUSED_ATTN_BUILD", "PYTHONPATH", "TRITON_INTERPRET", "ARGS", "JOBS"}
    inherited = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("MAKE", "MFLAGS"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    (tree.parent / "tmp").mkdir(exist_ok=True)
    return inherited | {"PATH": path, "TMPDIR": str(tree.parent / "tmp"), "MAX_JOBS": "1"} | env


def setup_py(tree, *command, **env):
    """Runs setup.py from another directory, so that no path in it may depend on the current one."""
    return subprocess.run(
        [sys.executable, str(tree / "setup.py"), *command],
        cwd=tree.parent,
        env=environment(tree, **env),
        capture_output=True,
        text=True,
        check=False,
    )


def spoken(run):
    """The lines of setup.py's own among the output."""
    return [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("fused_attn: ")]


def only_wheel(tree):
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, [name for name in archive.namelist() if ".dist-info" not in name]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("command", ["bdist_wheel", "egg_info"])
def test_unknown_build_mode_is_named(tree, command):
    run = setup_py(tree, command, FUSED_ATTN_BUILD="sometimes")
    assert run.returncode != 0
    for word in ("FUSED_ATTN_BUILD", "'auto'", "'require'", "'never'", "'sometimes'"):
        assert word in run.stderr
    assert "Traceback" not in run.stderr


@needs_compiler
def test_wheel_serves_every_python_and_torch(tree):
    source = '#include "shared.h"\n__attribute__((used)) static const char file[] = __FILE__;\n'
    (tree / "csrc/cpu/op.cpp").write_text(source)
    run = setup_py(tree, "-q", "bdist_wheel", FUSED_ATTN_BUILD="require")
    assert run.returncode == 0, run.stderr
    (line,) = spoken(run)
    assert "built fused_attn._C" in line
    assert not list((tree.parent / "tmp").glob("*.log")), "a clean build leaves no log"
    name, files = only_wheel(tree)
    assert name.startswith("fused_attn-0.1.0-cp310-abi3-")
    extensions = [f for f in files if f.startswith("fused_attn/_C")]
    assert len(extensions) == 1
    assert ".abi3." in extensions[0] or extensions[0].endswith("_C.pyd")

    (binary,) = tree.glob(f"build/lib*/{extensions[0]}")
    imported = subprocess.run(
        [sys.executable, "-c", "import fused_attn._C as m; print(m.__file__, m.__doc__)"],
        cwd=binary.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr
    assert str(binary) in imported.stdout
    assert "C++ kernels of fused_attn" in imported.stdout
    # libtorch_python would tie the wheel to one torch and one Python.
    assert b"libtorch_python" not in binary.read_bytes()
    assert str(tree).encode() not in binary.read_bytes(), "the builder's directories are in the binary"


def failing_compiler(tree):
    # Asked for its version, it answers: torch asks first.
    return script(
        tree.parent / "bin/broken-c++",
        """case "$1" in --version|-dump*) echo "c++ (GCC) 12.2.0"; exit 0;; esac
        echo "module.cpp:1:1: error: this compiler is broken" >&2
        exit 1
        """,
    )


@pytest.mark.parametrize("broken", ["failing", "missing"])
def test_auto_survives_a_compiler_that_fails(tree, broken):
    """The wheel is a pure one and works, one line says why, and an extension from an earlier build is gone."""
    cxx = failing_compiler(tree) if broken == "failing" else "/nonexistent/c++"
    stale = tree / "fused_attn" / "_C.abi3.so"
    stale.write_text("left by an earlier build")
    run = setup_py(tree, "-q", "bdist_wheel", CXX=cxx)
    assert run.returncode == 0, run.stderr
    (line,) = spoken(run)
    log = Path(re.search(r"installed without its C\+\+ extension: .+; log: (.+)$", line)[1])
    reason = "this compiler is broken" if broken == "failing" else "/nonexistent/c++"
    assert reason in line
    assert reason in log.read_text()
    name, files = only_wheel(tree)
    assert name == "fused_attn-0.1.0-py3-none-any.whl"
    assert sorted(files) == ["fused_attn/__init__.py", "fused_attn/ops/__init__.py", "fused_attn/py.typed"]
    assert not stale.exists()


@needs_compiler
def test_auto_survives_a_compile_error(tree):
    (tree / "csrc/cpu/wrong.cpp").write_text("int f() { return undeclared; }\n")
    run = setup_py(tree, "-q", "build")
    assert run.returncode == 0, run.stderr
    (line,) = spoken(run)
    assert "csrc/cpu/wrong.cpp:1" in line
    assert "'undeclared'" in line
    assert not list(tree.glob("build/lib*/fused_attn/_C*"))


def test_require_fails_with_the_compilers_words(tree):
    run = setup_py(tree, "-q", "bdist_wheel", FUSED_ATTN_BUILD="require", CXX=failing_compiler(tree))
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert "FUSED_ATTN_BUILD=require" in last
    assert "this compiler is broken" in last
    log = Path(re.search(r"log: (.+)$", last)[1])
    assert log.read_text().strip() in run.stderr
    assert not list(tree.glob("dist/*.whl"))


def test_never_calls_no_compiler(tree):
    called = tree.parent / "called"
    run = setup_py(
        tree, "-q", "bdist_wheel", FUSED_ATTN_BUILD="never", CXX=script(tree.parent / "bin/c++", f"touch {called}")
    )
    assert run.returncode == 0, run.stderr
    assert not called.exists()
    assert spoken(run) == []
    assert only_wheel(tree)[0] == "fused_attn-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so"),
    ],
    ids=["absent", "broken"],
)
def test_build_without_torch(tree, torch, reason):
    shadow = tree.parent / "shadow"
    shadow.mkdir()
    (shadow / "torch.py").write_text(torch)
    run = setup_py(tree, "-q", "bdist_wheel", PYTHONPATH=str(shadow))
    assert run.returncode == 0, run.stderr
    (line,) = spoken(run)
    assert reason in line
    assert only_wheel(tree)[0] == "fused_attn-0.1.0-py3-none-any.whl"

    run = setup_py(tree, "-q", "bdist_wheel", PYTHONPATH=str(shadow), FUSED_ATTN_BUILD="require")
    assert run.returncode != 0
    assert reason in run.stderr


def test_metadata_needs_neither_torch_nor_a_compiler(tree):
    """Metadata is the same on every machine, so asking for it must look at nothing but files."""
    shadow = tree.parent / "shadow"
    shadow.mkdir()
    (shadow / "torch.py").write_text("raise AssertionError('torch was imported')")
    run = setup_py(tree, "-q", "egg_info", PYTHONPATH=str(shadow), CXX="/nonexistent/c++", FUSED_ATTN_BUILD="require")
    assert run.returncode == 0, run.stderr
    metadata = (tree / "fused_attn.egg-info/PKG-INFO").read_text()
    assert "Version: 0.1.0" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]


def test_source_archive(tree):
    for name in (
        "tests/test_x.py",
        "tests/results.json",
        "bench/results/gpu.json",
        "demo-results/table.png",
        "csrc/x.o",
    ):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tree / "csrc/cpu/op.cpp").touch()
    run = setup_py(tree, "-q", "sdist")
    assert run.returncode == 0, run.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {m.name.split("/", 1)[1] for m in tar.getmembers() if m.isfile()}
    files = {f for f in files if not f.startswith("fused_attn.egg-info/")}
    assert files == {
        *("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "PKG-INFO"),
        *("csrc/module.cpp", "csrc/shared.h", "csrc/cpu/op.cpp"),
        *("fused_attn/__init__.py", "fused_attn/ops/__init__.py", "fused_attn/py.typed"),
    }


def test_version_is_read_without_importing(tree):
    (tree / "fused_attn/__init__.py").write_text('__version__ = "7.8.9"\nraise ImportError("imported by the build")\n')
    run = setup_py(tree, "--version")
    assert run.stdout.strip() == "7.8.9", run.stderr


def requirements():
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements-dev.txt").read_text().splitlines())
    return [line for line in lines if line]


def test_dev_extra_is_requirements_dev():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {str(Requirement(r)) for r in project["optional-dependencies"]["dev"]}
    assert extra == {str(Requirement(r)) for r in requirements()}


def test_requirements_name_no_place():
    """Where packages come from is for pip's own configuration to say."""
    for line in requirements():
        assert not line.startswith("-")
        assert "://" not in line
        assert "@" not in line


@pytest.fixture
def make(tree):
    """Runs make in `tree` with a .venv of stubs that note their arguments in `calls` and exit as `status` says."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    calls = tree / "calls"

    def run(target, status="true", **variables):
        for tool in ("python", "ruff", "mypy", "clang-format"):
            script(tree / ".venv/bin" / tool, f'echo {tool} "$@" >> {calls}\n{status}\n')
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", target, *(f"{k}={v}" for k, v in variables.items())],
            cwd=tree,
            env=environment(tree),
            capture_output=True,
            text=True,
            check=False,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def installs(calls):
    return [re.search(r"--(constraint|requirement|editable)", c)[1] for c in calls if " pip install " in f"{c} "]


def test_make_installs_only_after_a_change(tree, make):
    def settle():
        """Everything an hour old, the stamps half an hour."""
        now = time.time()
        for path in tree.rglob("*"):
            os.utime(path, (now - 3600,) * 2)
        for stamp in tree.glob(".venv/.*.stamp"):
            os.utime(stamp, (now - 1800,) * 2)

    extension = tree / "fused_attn/_C.abi3.so"
    extension.touch()
    settle()
    everything = ["constraint", "editable", "requirement"]
    calls = make("test")[1]
    assert sorted(installs(calls)) == everything, "there is no stamp yet"
    assert installs(calls)[0] == "constraint", "torch comes first: the build needs it"
    settle()
    assert installs(make("test")[1]) == []
    for changed, expected in [
        ("requirements-dev.txt", everything),
        ("pyproject.toml", everything),
        ("setup.py", ["editable"]),
        ("csrc/module.cpp", ["editable"]),
        ("csrc/shared.h", ["editable"]),
        ("fused_attn/__init__.py", []),
    ]:
        settle()
        (tree / changed).touch()
        assert sorted(installs(make("test")[1])) == expected, changed
    settle()
    extension.unlink()
    assert installs(make("test")[1]) == ["editable"], "the extension was removed"


@pytest.mark.parametrize("fails", ["--constraint", "--requirement", "--editable"])
def test_make_stops_where_an_install_fails(tree, make, fails):
    """Neither half of what runs side by side may fail unseen, and the next call tries it again."""
    done, calls = make("test", f'case "$*" in *{fails}*) exit 1;; esac')
    assert done.returncode != 0
    assert not any(" pytest " in c for c in calls)
    done, calls = make("test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fails.strip("-") in installs(calls)


@pytest.mark.parametrize(
    ("native", "interpreted", "succeeds"),
    [
        (0, 0, True),
        (0, 5, True),
        (5, 0, True),
        (5, 5, False),
        (1, 0, False),
        (0, 1, False),
        (1, 5, False),
        (2, 2, False),
    ],
)
@pytest.mark.parametrize("target", ["test", "test-all"])
def test_make_test_runs_both_processes(make, target, native, interpreted, succeeds):
    """pytest's status 5, nothing selected, is a failure only when both processes say it."""
    status = f'case "$*" in *" pytest "*) [ -z "$TRITON_INTERPRET" ] && exit {native}; exit {interpreted};; esac'
    done, calls = make(target, status, ARGS="-k name")
    runs = [c for c in calls if " pytest " in c]
    assert len(runs) == 2, done.stdout + done.stderr
    assert all("-k name" in c for c in runs)
    assert all(("not slow" in c) == (target == "test") for c in runs)
    assert (done.returncode == 0) == succeeds


@pytest.mark.parametrize("failing", [None, "ruff", "mypy", "clang-format", "_codegen"])
def test_make_check_runs_everything(make, failing):
    status = f'case "$0 $*" in *{failing}*) exit 1;; esac' if failing else "true"
    done, calls = make("check", status)
    jobs = [" ".join(c.split()[:3]) for c in calls if " pip " not in c]
    assert jobs == [
        "ruff check .",
        "ruff format --check",
        "mypy",
        "clang-format --dry-run -Werror",
        "python -m fused_attn._codegen",
    ]
    assert (done.returncode == 0) == (failing is None)


def test_make_help_lists_every_target(make):
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {"FORCE"}
    done, _ = make("help")
    assert set(re.findall(r"^  make ([\w-]+) +\S", done.stdout, re.M)) == phony
