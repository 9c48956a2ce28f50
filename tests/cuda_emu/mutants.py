"""Takes each barrier and each shuffle out of the CUDA kernels in turn: the emulation must notice (`make mutants`).

A mutant is caught where the checks fail, in numbers or by an alarm. One that isn't caught, and isn't named in HARMLESS
with the reason, is a failure of the tests. With `sanitize` the unchanged kernels run under AddressSanitizer and UBSan
instead (`make sanitize`).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
SCHEDULES = 10
SANITIZERS = ("-O1", "-g", "-DCHECK_DTYPES=2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# (file, the line) -> why no run can tell.
HARMLESS: dict[tuple[str, str], str] = {}


class Mutant(NamedTuple):
    """One change: the file, the number of its line from 1, the line as it was, the whole file as it becomes."""

    file: str
    number: int
    line: str
    text: str
    what: str


def mutants() -> list[Mutant]:
    """Every barrier left out, and every lane left with its own value."""
    found = []
    for path in sorted(KERNELS.glob("*.cuh")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            for pattern, instead, what in (
                (r"__syncthreads\(\);", "", "without its barrier"),
                (r"__shfl_xor_sync\(\w+, ([\w.]+), \w+\)", r"(\1)", "without its shuffle"),
            ):
                if (changed := re.sub(pattern, instead, line)) != line:
                    text = "\n".join([*lines[: number - 1], changed, *lines[number:], ""])
                    found.append(Mutant(path.name, number, line.strip(), text, what))
    return found


def build(kernels: Path, out: Path, *flags: str) -> Path:
    """Compiles the checks against a directory of kernels, one file per process. Raises CalledProcessError."""
    from torch.utils.cpp_extension import include_paths

    out.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++17", "-DFA_HOST_EMU", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    common += [f"-I{kernels}", f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]
    objects, running = [], []
    for source in sorted(HERE.glob("*.cpp")):
        objects.append(out / f"{source.stem}.o")
        running.append(subprocess.Popen(["g++", *common, "-c", str(source), "-o", str(objects[-1])]))
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, "g++")
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    subprocess.run(["g++", *sanitizers, *map(str, objects), "-o", str(out / "check")], check=True)
    return out / "check"


def check(program: Path, group: str, *more: str, timeout: float = 1800) -> tuple[bool, str]:
    """Whether the checks of a group pass under all schedules, and what they print."""
    command = [str(program), group, "0", str(SCHEDULES), *more]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return False, "ran for ever"
    return run.returncode == 0, run.stdout + run.stderr


def caught(mutant: Mutant, where: Path) -> str | None:
    """What the checks said of a mutant; None where they passed."""
    shutil.copytree(KERNELS, where / "kernels")
    (where / "kernels" / mutant.file).write_text(mutant.text)
    program = build(where / "kernels", where / "build", "-O1", "-DCHECK_DTYPES=1", "-Wno-unused")
    fine, said = check(program, "all")
    return None if fine else next(iter(said.splitlines()), "no output")


def sanitized() -> int:
    """Runs the checks under the sanitizers; 1 where one complains, or a check fails."""
    with tempfile.TemporaryDirectory() as where:
        fine, said = check(build(KERNELS, Path(where), *SANITIZERS), "all")
    print(said, end="")
    return not fine


def main() -> int:
    """Runs all mutants; 1 where one that isn't known to be harmless gets through."""
    every = mutants()
    missed, harmless = [], []
    for mutant in every:
        name = f"{mutant.file}:{mutant.number} {mutant.what}"
        with tempfile.TemporaryDirectory() as where:
            said = caught(mutant, Path(where))
        key = (mutant.file, mutant.line)
        if said is not None:
            print(f"caught    {name}: {said}", flush=True)
        elif key in HARMLESS:
            harmless.append(mutant)
            print(f"harmless  {name}: {HARMLESS[key]}", flush=True)
        else:
            missed.append(mutant)
            print(f"MISSED    {name}", flush=True)
    print(f"{len(every)} mutants, {len(every) - len(missed) - len(harmless)} caught, {len(harmless)} harmless")
    return 1 if missed or not every else 0


if __name__ == "__main__":
    sys.exit(sanitized() if sys.argv[1:] == ["sanitize"] else main())
