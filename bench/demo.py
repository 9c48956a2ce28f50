"""`python -m bench.demo`: whole networks, eager and fused: what was fused, how right it is, how long it takes.

    errors   of outputs and of the gradients of all parameters, against float64, beside those of the unfused network
    times    per image, of inference and of a training step (forward, backward, SGD): unfused, fused, and with the gates
             taken out, which is about what fusing can gain at most; then unfused and fused under torch.compile

Parameters are drawn anew, so that every gate has a say in the output. Nothing is downloaded.
"""

import argparse
import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import backend

from . import measure, networks
from .measure import Candidate, Timing
from .networks import NETWORKS
from .support import ROOT, progress, significant, table, threads, write_json

MODES = ("forward", "training")
COMPILED_FIRST = sorted((n for n in NETWORKS if NETWORKS[n].compiles is not None), key=lambda n: NETWORKS[n].compiles)
SIZE = 224


def batch(mode: str, device: str) -> int:
    """Images at once: one at inference and a few in training on a CPU, what fills a GPU there."""
    return 64 if device != "cpu" else {"forward": 1, "training": 2}[mode]


def build(name: str, size: int = SIZE) -> nn.Module:
    """One of `networks`, every parameter drawn anew, unfused and ready for inference."""
    return networks.build(name, size)


def gates(model: nn.Module) -> list[str]:
    """Names of the modules that are gates, in a model that isn't fused."""
    return networks.gates(copy.deepcopy(model))


def _plain_dropout(model: nn.Module) -> None:
    """Dropout draws random numbers, and two networks that draw differently can't be compared."""
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()


def errors(model: nn.Module, size: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, float]]:
    """Relative errors of outputs and gradients against float64, of the network as it is and fused.

    Output: max |y − y64| / max |y64|. Gradient: ‖g − g64‖ / ‖g64‖ over all parameters at once, and of the worst one.
    In float32 a rounding error that turns the sign of a ReLU's input moves gradients by far more than itself, in either
    network; "fused, float64" has no such excuse. "gates" says what there was to get wrong: by how much the output
    changes where every gate is 1 % larger.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 3, size, size, generator=generator)
        toward = torch.randn(2, 1000, generator=generator)
        eager = copy.deepcopy(model).to(device, dtype)
        fused = copy.deepcopy(eager)
        networks.fuse(fused)
        exact = copy.deepcopy(model).to(device, torch.float64)
        answers = {"truth": _answer(exact, x, toward)}
        networks.fuse(exact)
        answers |= {
            "eager": _answer(eager, x, toward),
            "fused": _answer(fused, x, toward),
            "fused, float64": _answer(exact, x, toward),
        }
        found = {}
        true, slopes = answers["truth"]
        for name in ("eager", "fused", "fused, float64"):
            y, grads = answers[name]
            each = [((g - t).norm() / t.norm().clamp_min(1e-300)).item() for g, t in zip(grads, slopes, strict=True)]
            off = torch.stack([(g - t).norm() for g, t in zip(grads, slopes, strict=True)]).norm()
            found[name] = {
                "output": ((y - true).abs().max() / true.abs().max()).item(),
                "gradients": (off / torch.stack([t.norm() for t in slopes]).norm()).item(),
                "worst gradient": max(each),
            }
        wanted = set(gates(model))
        for name, module in eager.named_modules():
            if name in wanted:
                module.register_forward_hook(lambda module, args, y: y * 1.01)
        with torch.no_grad():
            y = eager(x.to(device, dtype)).double()
        found["gates"] = {"output": ((y - true).abs().max() / true.abs().max()).item()}
        return found
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _answer(model: nn.Module, x: Tensor, toward: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradient of ⟨output, toward⟩ by every parameter, in float64."""
    parameters = list(model.parameters())
    like = parameters[0]
    y = model(x.to(like))
    grads = torch.autograd.grad(y, parameters, toward.to(like))
    return y.detach().double(), [g.double() for g in grads]


def step(model: nn.Module, mode: str, device: str) -> Candidate:
    """A candidate without a name: one inference, or one training step, on random images."""
    n = batch(mode, device)
    x = torch.randn(n, 3, SIZE, SIZE, device=device)
    if mode == "forward":
        model.eval()
        return Candidate("", [lambda: model(x)], torch.inference_mode)
    model.train()
    _plain_dropout(model)
    labels = torch.randint(1000, (n,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return Candidate("", [train], nullcontext)


def variants(name: str, model: nn.Module, device: str) -> tuple[dict[str, nn.Module], fused_attn.Report]:
    """The network as it is, fused, and without its gates, where that is a network still; and what was fused."""
    made = {variant: copy.deepcopy(model).to(device) for variant in ("eager", "fused", "no gates")}
    networks.without(made["no gates"], gates(model))
    if not NETWORKS[name].bare:
        del made["no gates"]
    return made, networks.fuse(made["fused"])


def candidates(models: dict[str, nn.Module], mode: str, device: str) -> list[Candidate]:
    """One per network, to be timed side by side."""
    found = []
    for name, model in models.items():
        made = step(model, mode, device)
        found.append(Candidate(name, made.calls, made.context))
    return found


def timed(among: list[Candidate], mode: str, device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Milliseconds per image of each, interleaved."""
    n = batch(mode, device)
    found: dict[str, dict[str, Any]] = {}
    for name, t in measure.interleave(among, seconds, device, rounds=(3, 50)).items():
        if isinstance(t, Timing):
            times = (("ms", t.median_us), ("p20", t.p20_us), ("p80", t.p80_us), ("wall_ms", t.wall_us))
            found[name] = {key: v / n / 1e3 for key, v in times} | {"samples": t.samples}
        else:
            found[name] = {"error": t}
    return found


def which_backend(model: nn.Module, device: str) -> dict[str, int]:
    """Which backend ran how many ops in one forward of a fused model."""
    ran: Counter[str] = Counter()
    with torch.inference_mode(), backend.observe(lambda choice: ran.update([choice.backend])):
        model(torch.randn(1, 3, SIZE, SIZE, device=device))
    return dict(ran)


def compiled(name: str, mode: str, device: str, seconds: float, folder: Path) -> None:
    """The same under torch.compile, unfused and fused, in a process of its own that may be stopped.

    It compiles, writes `folder/ready`, waits for `folder/go` so that nothing else runs while it measures, and writes
    `folder/result.json`.
    """
    parent = os.getppid()
    measure.prepare(device)
    made, _ = variants(name, build(name), device)
    start = time.perf_counter()
    models = {k: torch.compile(made[k], dynamic=False) for k in ("eager", "fused")}
    among = candidates(models, mode, device)  # type: ignore[arg-type]
    for c in among:
        with contextlib.suppress(Exception), c.context():  # what fails here fails again below, and is reported there
            c.calls[0]()
    spent = round(time.perf_counter() - start, 1)
    (folder / "ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.1)
        if os.getppid() != parent:
            return
    write_json(folder / "result.json", timed(among, mode, device, seconds) | {"seconds": spent})


class Compiling:
    """A process that compiles one network in one mode, and then waits to be told to measure."""

    def __init__(self, name: str, mode: str, device: str, seconds: float, folder: Path, threads: int) -> None:
        self.name, self.mode, self.folder = name, mode, folder
        folder.mkdir()
        command = [sys.executable, "-m", "bench.demo", "--device", device]
        self.process = subprocess.Popen(
            [*command, "--compiled", name, mode, str(seconds), str(folder)],
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("wb"),
            start_new_session=True,
        )

    @property
    def busy(self) -> bool:
        """Whether it still compiles."""
        return self.process.poll() is None and not (self.folder / "ready").exists()

    def result(self, limit: float) -> dict[str, Any]:
        """Lets it measure, for at most `limit` seconds."""
        (self.folder / "go").touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(limit)
        self.stop()
        path = self.folder / "result.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        lines = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return {"error": lines[-1][:300] if lines and self.process.returncode != -signal.SIGKILL else "took too long"}

    def stop(self) -> None:
        """Ends the process, and the compilers that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compile_all(
    columns: Sequence[tuple[str, str]],
    device: str,
    seconds: float,
    left: Callable[[], float],
    done: Callable[..., None],
) -> None:
    """Compiles two at a time, as that is mostly one thread's work; then measures one at a time, with nothing beside it.

    done: called with network, mode and times of each. What isn't compiled when the time is up is reported as that.
    """
    waiting, started = list(columns), []
    threads = max(1, (os.cpu_count() or 1) // 2)
    reserve = 4 * seconds * len(columns)
    with tempfile.TemporaryDirectory(prefix="fused_attn_") as temporary:
        try:
            while (waiting or any(c.busy for c in started)) and left() > reserve:
                if waiting and sum(c.busy for c in started) < 2:
                    name, mode = waiting.pop(0)
                    folder = Path(temporary) / f"{name} {mode}"
                    started.append(Compiling(name, mode, device, seconds, folder, threads))
                time.sleep(0.2)
            late = [c for c in started if c.busy]
            for c in late:
                c.stop()
            for c in started:
                if c in late:
                    done(c.name, c.mode, {"error": "not compiled in the demo's time (make demo-full)"})
                else:
                    done(c.name, c.mode, c.result(min(max(left(), 0) + 60, 3600)))
        finally:
            for c in started:
                c.stop()
    for name, mode in waiting:
        done(name, mode, {"error": "not compiled in the demo's time (make demo-full)"})


# ---- what is shown

ERRORS = {"eager": "unfused, float32", "fused": "fused, float32", "fused, float64": "fused, float64"}


def too_far(e: dict[str, dict[str, float]]) -> list[str]:
    """What is wrong with these errors: in float32 ours may be a small multiple of the unfused network's."""
    wrong = [
        f"{key}: error {e['fused'][key]:.1e} fused, {e['eager'][key]:.1e} unfused"
        for key, factor in (("output", 4), ("gradients", 20))
        if not e["fused"][key] <= factor * e["eager"][key] + 1e-6
    ]
    # PyTorch's hardsigmoid rounds 1/6 to float32 in its backward, in float64 too: MobileNetV3's gradients show that.
    for key, allowed in (("output", 1e-12), ("gradients", 1e-7)):
        if not e["fused, float64"][key] <= allowed:
            wrong.append(f"{key}: error {e['fused, float64'][key]:.1e} in float64")
    return wrong


def describe(name: str, found: dict[str, Any]) -> str:
    """What was fused in one network."""
    ran = ", ".join(f"{k} ({v} calls)" for k, v in found["backend"].items()) or "none"
    return f"\n━━ {name}\nfuse_: {found['fuse']}\nbackend that ran: {ran}\n"


def describe_times(found: dict[str, Any], mode: str) -> str:
    """One line, said as soon as it is known: the whole table comes at the end."""
    times, n = found["times"][mode], batch(mode, found["device"])
    cell = lambda key: "failed" if "error" in times[key] else f"{significant(times[key]['ms'])} ms"
    return (
        f"{mode}, batch {n}, per image: {cell('eager')} unfused, {cell('fused')} fused ({_ratio(times)}), "
        f"{cell('no gates')} with the gates removed"
    )


def describe_errors(e: dict[str, dict[str, float]]) -> str:
    """How right it is."""
    rows = [[ERRORS[k], *(f"{e[k][c]:.1e}" for c in ("output", "gradients", "worst gradient"))] for k in ERRORS]
    head = ["relative error vs float64", "output", "all gradients", "worst gradient"]
    gates = f"(were every gate 1 % larger, the output would change by {e['gates']['output']:.1e})"
    return f"\n{table(head, rows)}\n{gates}"


def _ratio(times: dict[str, Any]) -> str:
    try:
        return f"{times['eager']['ms'] / times['fused']['ms']:.3f}×"
    except KeyError:
        return "–"


def overview(results: dict[str, Any]) -> str:
    """One line per network and mode."""
    rows = []
    for name, found in results.items():
        for mode in MODES:
            plain, made = found["times"].get(mode), found["times"].get(f"compiled {mode}")
            cell = lambda times, key: (
                "–" if not times or "error" in times or "error" in times.get(key, {"error": 0})
                else significant(times[key]["ms"])
            )  # fmt: skip
            rows.append([
                name, mode, cell(plain, "eager"), cell(plain, "fused"), _ratio(plain or {}), cell(plain, "no gates"),
                cell(made, "eager"), cell(made, "fused"), _ratio(made or {}),
            ])  # fmt: skip
    head = [
        "ms per image",
        "",
        "unfused",
        "fused",
        "speed-up",
        "gates removed",
        "compiled unfused",
        "compiled fused",
        "speed-up",
    ]
    text = table(head, rows, right=2)
    reasons = {
        f"{name}, {mode}: {times['error']}"
        for name, found in results.items()
        for mode, times in found["times"].items()
        if "error" in times
    }
    reasons |= {
        f"{name}, {mode}, {variant}: {t['error']}"
        for name, found in results.items()
        for mode, times in found["times"].items()
        for variant, t in times.items()
        if isinstance(t, dict) and "error" in t
    }
    return "\n".join([text, *sorted(reasons)])


COLORS = {"eager": "#9aa5b1", "fused": "#d9480f", "no gates": "#e6e9ed"}
NAMES = {"eager": "unfused", "fused": "fused", "no gates": "gates removed"}


def draw(results: dict[str, Any], subtitle: str, path: Path) -> None:
    """A bar per variant: time per image as a share of the unfused network's, milliseconds per image written on it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (prefix, mode) for prefix in ("", "compiled ") for mode in MODES
        if any("fused" in found["times"].get(prefix + mode, {}) for found in results.values())
    ]  # fmt: skip
    rows = (len(panels) + 1) // 2
    width = max(11, 3.2 * len(results))
    figure, axes = plt.subplots(rows, 2, figsize=(width, 1.2 + 3.1 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (prefix, mode) in zip(axes.flat, panels, strict=False):
        names = list(results)
        for at, name in enumerate(names):
            times = results[name]["times"].get(prefix + mode, {})
            shown = [v for v in NAMES if isinstance(times.get(v), dict) and "ms" in times[v]]
            base = times["eager"]["ms"] if "eager" in shown else None
            if not shown:
                axis.annotate("not measured", (at, 0), (0, 4), textcoords="offset points", ha="center", fontsize=8.5)
            for i, variant in enumerate(shown):
                share = 100 * times[variant]["ms"] / base if base else 100
                where = at + (i - (len(shown) - 1) / 2) * 0.28
                axis.bar(where, share, 0.26, color=COLORS[variant], label=NAMES[variant])
                text = significant(times[variant]["ms"])
                axis.annotate(
                    text,
                    (where, share),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                )
        n = batch(mode, next(iter(results.values()))["device"])
        what = {"forward": "inference", "training": "training step"}[mode]
        axis.set_title(f"{what}, batch {n}{', torch.compile' if prefix else ''}", fontsize=11)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.axhline(100, color="#5b6670", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 125)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("time per image,\n% of the unfused network\n(numbers: milliseconds)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=3, frameon=False)
    figure.suptitle(f"Networks with attention, fused by fused_attn\n{subtitle}", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The demo. 1 where a fused network is further from the truth than it may be."""
    device = options.device or measure.default_device()
    measure.prepare(device)
    start = time.monotonic()
    left = lambda: float("inf") if options.full else options.minutes * 60 - (time.monotonic() - start)
    source = measure.provenance(device, measure.command_line("bench.demo", arguments))
    clock = "one thread, process CPU time" if device == "cpu" else "CUDA events"
    subtitle = f"{source['device_name']}, float32, {SIZE}×{SIZE}, {clock}, medians, interleaved"
    print(f"fused_attn {fused_attn.__version__}, torch {torch.__version__}\n{subtitle}", flush=True)
    models = options.models or [name for name in NETWORKS if options.full or NETWORKS[name].always]
    columns = [(m, "forward") for m in COMPILED_FIRST] + [(COMPILED_FIRST[0], "training")]
    if options.full:
        columns += [(m, mode) for m in NETWORKS for mode in MODES if (m, mode) not in columns]
    columns = [] if options.no_compile else [(m, mode) for m, mode in columns if m in models]
    bar = progress(range(4 * len(models) + len(columns)), "demo", 4 * len(models) + len(columns))
    results: dict[str, Any] = {}

    def during(what: str, function: Callable[..., Any], *args: Any) -> Any:
        bar.set_postfix_str(what)
        result = function(*args)
        bar.update()
        return result

    def save() -> None:
        write_json(
            options.out / "demo.json",
            {"schema": measure.SCHEMA, "kind": "demo", "provenance": source, "models": results},
        )
        draw(results, subtitle, options.out / "demo.png")

    wrong = []
    for name in models:
        model = during(f"{name}: drawing its parameters", build, name)
        made, report = variants(name, model, device)
        found: dict[str, Any] = {
            "device": device,
            "fuse": str(report),
            "fused": report.fused,
            "refused": report.refused,
            "backend": which_backend(made["fused"], device),
            "times": {},
        }
        results[name] = found
        _say(bar, describe(name, found))
        for mode, seconds in zip(MODES, (options.seconds, 3 * options.seconds), strict=True):
            found["times"][mode] = during(
                f"{name}: {mode}", timed, candidates(made, mode, device), mode, device, seconds
            )
            _say(bar, describe_times(found, mode))
        with threads(min(4, os.cpu_count() or 1)):  # not timed
            found["errors"] = during(f"{name}: errors against float64", errors, model, SIZE, device)
        wrong += [f"{name}: {text}" for text in too_far(found["errors"])]
        _say(bar, describe_errors(found["errors"]))
        save()

    def column(name: str, mode: str, times: dict[str, Any]) -> None:
        results[name]["times"][f"compiled {mode}"] = times
        bar.update()
        bar.set_postfix_str(f"{name}, {mode}, under torch.compile")
        save()

    bar.set_postfix_str("torch.compile, two networks at a time: minutes")
    for at in range(0, len(columns), 4):  # no more than four wait in memory
        compile_all(columns[at : at + 4], device, options.seconds, left, column)
    bar.close()
    save()
    print(f"\n━━ all, in {(time.monotonic() - start) / 60:.1f} minutes\n{overview(results)}")
    print(f"\nwrote {options.out.name}/demo.json and {options.out.name}/demo.png")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def _say(bar: Any, text: str) -> None:
    """Prints to stdout without tearing the bar."""
    write = getattr(bar, "write", None)
    if write is not None:
        write(text, file=sys.stdout)
    else:
        print(text)
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m bench.demo`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(prog="python -m bench.demo", description="Whole networks, unfused and fused.")
    p.add_argument("--full", action="store_true", help="every torch.compile column, however long it takes")
    p.add_argument("--models", nargs="+", choices=NETWORKS, help="only these (default: some; with --full all)")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    p.add_argument("--minutes", type=float, default=7.0, help="when to stop compiling (default: 7)")
    p.add_argument(
        "--seconds", type=float, default=4.0, help="time for one row of times (default: 4; training: 3 times)"
    )
    p.add_argument("--no-compile", action="store_true", help="no torch.compile columns")
    p.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for demo.json and demo.png")
    p.add_argument("--compiled", nargs=4, help=argparse.SUPPRESS)  # the demo calls itself with this
    options = p.parse_args(arguments)
    if options.compiled:
        name, mode, seconds, folder = options.compiled
        compiled(name, mode, options.device, float(seconds), Path(folder))
        return 0
    return run(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
