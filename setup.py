"""Builds the optional C++ extension `fused_attn._C`; everything else about the package is in pyproject.toml.

Environment switches (the extension is "it"):

    FUSED_ATTN_BUILD   auto     (default) build it; if that fails, install pure Python and say in one line what failed
                                and where the log is
                       require  build it or fail, showing the compiler's output
                       never    install pure Python; no compiler is called
    MAX_JOBS           how many files ninja compiles at once (default: the number of CPUs + 2)
    CXX                the C++ compiler (default: c++)

The extension uses only PyTorch's stable ABI and Python's limited API, so one wheel (cp310-abi3) serves every
torch >= 2.11 and every Python >= 3.10. Nothing is downloaded, and nothing depends on the builder's CPU or GPU.
"""

import contextlib
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # setuptools wants relative source paths: make them relative to this file, wherever it was started

MODE = os.environ.get("FUSED_ATTN_BUILD", "auto")
if MODE not in ("auto", "require", "never"):
    raise SystemExit(f"FUSED_ATTN_BUILD must be 'auto', 'require' or 'never', but is {MODE!r}")

# The oldest torch served, twice: as text, and as its headers want it (major << 56 | minor << 48).
# The oldest Python is in csrc/module.cpp and, as the wheel's tag, below.
TORCH_FLOOR = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"

CXX_FLAGS = [
    "-O2",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    # No -march=native: a wheel must run on other machines, so kernels choose their instruction set at run time.
    # No -ffast-math: NaN and inf must propagate, and sums must keep their order. The next two change no value and let
    # loops vectorise; a fused multiply-add rounds once instead of twice.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-g0",  # Python's own flags may say -g: many times the size
    f"-ffile-prefix-map={ROOT}{os.sep}=",  # __FILE__ in error messages: csrc/..., not the builder's directories
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]


def say(text):
    print(f"fused_attn: {text}", flush=True)


@contextlib.contextmanager
def output_to(log):
    """Sends what this process and its children (ninja, the compiler, the linker) print to the open file `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    try:
        for fd, _ in saved:
            os.dup2(log.fileno(), fd)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)


def first_error(output, error):
    """The one line of a failed build that tells most: the compiler's or linker's first error, else the exception."""
    for line in output.splitlines():
        if re.search(r"\berror:|undefined reference|: not found|: fatal ", line):
            return line.strip().replace(f"{ROOT}{os.sep}", "")
    return next(iter(str(error).splitlines()), type(error).__name__)


def extension():
    """The arguments for `setup` that build the extension. Raises ImportError, saying why, where that can't work."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("a free-threaded Python has no limited API")
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if torch.__version__ < TORCH_FLOOR:  # a TorchVersion: compares by packaging's rules, not as text
        raise ImportError(f"torch {torch.__version__} is older than {TORCH_FLOOR}")

    sources = ["csrc/module.cpp", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cpu/*.cpp"))]

    class Build(BuildExtension):
        """BuildExtension with its output in a log, and with a failure that `auto` survives."""

        def finalize_options(self):
            super().finalize_options()
            # An editable install would use a new temporary directory each time and compile every file again.
            self.build_temp = str(ROOT / "build" / f"temp-torch-{torch.__version__}")

        def run(self):
            os.environ["LC_ALL"] = "C"  # compiler messages in English and ASCII, for first_error()
            # Not under build/: pip removes its copy of the tree after a failure, and the log with it.
            fd, log_path = tempfile.mkstemp(prefix="fused_attn-build-", suffix=".log")
            failure = None
            with open(fd, "w", errors="backslashreplace") as log, output_to(log):
                try:
                    super().run()
                except Exception as error:
                    failure = error
                    traceback.print_exc(file=log)
            output = Path(log_path).read_text(encoding="ascii", errors="backslashreplace")
            if failure is not None:
                self.give_up(f"{first_error(output, failure)}; log: {log_path}", output)
                return
            built = f"built fused_attn._C ({len(sources)} C++ files, torch {torch.__version__}, Python limited API)"
            warnings = output.count(" warning: ")
            if warnings:
                say(f"{built}; compiler warnings: {warnings}, in {log_path}")
            else:
                say(built)
                os.unlink(log_path)

        def give_up(self, why, output):
            if MODE == "require":
                print(output, file=sys.stderr)
                raise SystemExit(f"fused_attn: FUSED_ATTN_BUILD=require, but fused_attn._C was not built: {why}")
            # An extension left by an earlier build would not match these sources; the wheel becomes a pure one.
            for ext in self.extensions:
                for stale in self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext):
                    Path(stale).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True
            say(f"installed without its C++ extension: {why}")

    module = CppExtension(
        "fused_attn._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],  # absolute: ninja runs elsewhere
        depends=sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.h")),
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Commands that only ask for metadata don't import torch: it takes seconds, and metadata must not depend on it.
builds = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}.intersection(sys.argv)
arguments = {}
if builds and MODE != "never":
    try:
        arguments = extension()
    except Exception as error:  # a broken torch raises more than ImportError
        why = f"{type(error).__name__}: {first_error('', error)}"
        if MODE == "require":
            raise SystemExit(f"fused_attn: FUSED_ATTN_BUILD=require, but fused_attn._C was not built: {why}") from error
        if isinstance(error, ModuleNotFoundError):
            why += " (pip's --no-build-isolation lets the build see an installed torch)"
        say(f"installed without its C++ extension: {why}")

setup(**arguments)
