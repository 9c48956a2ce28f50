"""`python -m bench models`: the attention tax, what attention costs a whole network, before and after `fuse_`.

attention          the network as its library has it, every parameter drawn anew
attention, fused   after `fuse_`
plain              the same network without attention: what that is, the table says
plain, fused       after `fuse_`, which knows chains of norms, adds and activations without a gate as well
…, compiled        each of them under torch.compile, with --compile

The tax is how much longer the network with attention takes than the plain one *in the same form*: 100·(t/t₀ − 1).
inference runs in evaluation and inference mode; train-step is forward, cross entropy, backward and a step of SGD with
momentum, in training. All forms run turn by turn in one process. Memory is that of a process for each form.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import backend

from . import measure, memory, session, taxed
from .measure import Candidate, Row
from .ops import LAYOUTS
from .subjects import compiled
from .support import table

MODES = ("inference", "train-step")
DTYPES = ("float32", "amp", "bfloat16")  # amp: autocast to bfloat16, float32 weights
COMPILERS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled, no layout": {"layout_optimization": False},
    "compiled, max-autotune": {"max_autotune": True},
}
NAMES = {"default": "compiled", "no-layout": "compiled, no layout", "max-autotune": "compiled, max-autotune"}
QUICK = ("seresnet50", "cbam_resnet50", "mobilenetv3_large_100")
MIB = 2**20


@dataclass
class Job:
    """All forms of one pair, in one mode, dtype and layout."""

    name: str
    mode: str
    dtype: str
    layout: str
    device: str
    batch: int
    size: int = 224
    compilers: tuple[str, ...] = ()
    backend: str = "auto"
    memory: bool = True
    rounds: tuple[int, int] = (5, 200)

    @property
    def title(self) -> str:
        """What is said while it runs."""
        return f"{self.name} {self.mode} {self.dtype} {self.layout}"

    def cast(self) -> Any:
        """The context of a forward."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "amp" else nullcontext()

    def place(self, t: Any) -> Any:
        """A network or an input on the device, in this dtype and layout."""
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        order = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return t.to(self.device, dtype, memory_format=order)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Entered around every sample, outside the clock."""
        with ExitStack() as stack:
            if self.backend != "auto":
                stack.enter_context(fused_attn.use_backend(self.backend))
            if self.mode == "inference":
                stack.enter_context(torch.inference_mode())
            yield

    def call(self, model: nn.Module, x: Tensor, run: Callable[..., Any]) -> Callable[[], object]:
        """One call of a network. run: the network, or what a compiler made of it."""
        if self.mode == "inference":

            def infer() -> object:
                with self.cast():
                    return run(x)

            return infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        labels = torch.arange(len(x), device=x.device) % 1000

        def step() -> None:
            with self.cast():
                loss = F.cross_entropy(run(x).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def candidates(self) -> tuple[list[Candidate], dict[str, str], dict[str, str]]:
        """What is timed; which backends the forms ran on; what couldn't be built, and why."""
        found, seen, failed = [], {}, {}
        x = self.place(torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0)))
        for form in taxed.FORMS:
            try:
                model = self.place(taxed.build(self.name, form, self.size)).train(self.mode != "inference")
                call = self.call(model, x, model)
                backends = dict[str, None]()
                with self.context(), backend.observe(lambda choice, b=backends: b.setdefault(choice.backend)):
                    call()
            except Exception as error:
                failed[form] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
                continue
            seen[form] = "+".join(backends)
            found.append(Candidate(form, [call], self.context))
            for how in self.compilers:
                run = compiled(model, **COMPILERS[how])
                found.append(Candidate(f"{form}, {how}", [self.call(model, x, run)], self.context))
        return found, seen, failed

    def run(self, seconds: float, number: int) -> list[Row]:
        """Times all forms, interleaved, then asks for their memory."""
        plain = taxed.PAIRS[self.name].plain
        case = f"{self.batch}x3x{self.size}x{self.size}"
        base = Row(self.name, case, self.mode, self.dtype, self.layout, self.device, "", "", "", run=number)
        if (why := taxed.missing(self.name)) is not None:
            return [replace(base, impl="attention", error=why)]
        candidates, seen, failed = self.candidates()
        timings = measure.interleave(candidates, seconds, self.device, self.rounds)
        torch._dynamo.reset()
        rows = []
        for impl, timing in {**timings, **failed}.items():
            form = impl.split(", compiled")[0]
            source = plain if form.startswith("plain") else taxed.PAIRS[self.name].library
            row = replace(base, impl=impl, backend=seen.get(form, ""), source=source)
            rows.append(replace(row, error=timing) if isinstance(timing, str) else replace(row, **vars(timing)))
        del candidates
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return [self.weighed(row) for row in rows] if self.memory else rows

    def weighed(self, row: Row) -> Row:
        """The row with its memory; a compiled form has none, because compiling takes more than running."""
        if row.error or "compiled" in row.impl:
            return row
        command = ["models", "--one", row.impl, "--network", self.name, "--mode", self.mode, "--dtype", self.dtype]
        command += ["--layout", self.layout, "--device", self.device, "--batch", str(self.batch)]
        try:
            found = memory.alone([*command, "--size", str(self.size), "--backend", self.backend])
        except RuntimeError as error:
            measure.log(f"memory of {self.title}, {row.impl}: {error}")
            return row
        train = self.mode != "inference"
        return replace(
            row, peak_bytes=round(found["peak"] * MIB), saved_bytes=round(found["saved"] * MIB) if train else None,
            largest_batch=found["largest"],
        )  # fmt: skip

    def one(self, form: str) -> dict[str, Any]:
        """Memory of one form, in this process; on a GPU the largest batch that fits, to a sixteenth."""
        model = self.place(taxed.build(self.name, form, self.size)).train(self.mode != "inference")
        with self.context():
            found = memory.used(
                model, self.batch, self.size, self.device, self.mode != "inference", self.cast, self.place
            )
            return {**found, "largest": self.largest(model) if self.device == "cuda" else None}

    def largest(self, model: nn.Module) -> int:
        """The largest batch that one call gets through."""

        def fits(batch: int) -> bool:
            try:
                self.call(model, self.place(torch.randn(batch, 3, self.size, self.size)), model)()
                torch.cuda.synchronize()
                return True
            except torch.OutOfMemoryError:
                return False
            finally:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

        return search(fits, self.batch)


def search(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, to a sixteenth of it, or 0: doubled from `start` until one doesn't, then halved
    in between."""
    good, bad = 0, start
    while bad <= 1 << 20 and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def taxes(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """The tax of every row with attention that has its plain counterpart, in per cent: (…, impl) -> tax."""
    key = lambda r, impl: (r.op, r.case, r.mode, r.dtype, r.layout, r.device, r.run, impl)
    times = {key(r, r.impl): r.median_us for r in rows if r.median_us}
    found = {}
    for (*where, impl), us in times.items():
        without = times.get((*where, impl.replace("attention", "plain", 1)))
        if impl.startswith("attention") and without is not None:
            found[(*where, impl)] = 100 * (us / without - 1)
    return found


def images(row: Row, us: float | None) -> float | None:
    """Images per second."""
    return None if not us else int(row.case.split("x")[0]) / us * 1e6


def summary(rows: Sequence[Row]) -> str:
    """One line per form."""
    tax, lines = taxes(rows), []
    show = lambda v, digits=1: "–" if v is None else f"{v:.{digits}f}"
    mib = lambda v: "–" if v is None else f"{v / MIB:.0f}"
    for r in rows:
        own = tax.get((r.op, r.case, r.mode, r.dtype, r.layout, r.device, r.run, r.impl))
        rate = "failed" if r.error else f"{show(images(r, r.median_us))}"
        span = "–" if r.error else f"{show(images(r, r.p80_us))}–{show(images(r, r.p20_us))}"
        most = "not run" if r.largest_batch is None else str(r.largest_batch)
        lines.append([
            r.op, r.case, r.mode, f"{r.dtype} {r.layout}", r.impl, rate, span, "" if own is None else f"{own:+.1f} %",
            mib(r.peak_bytes), mib(r.saved_bytes), most,
        ])  # fmt: skip
    head = ["network", "batch", "mode", "x", "form", "images/s", "p20–p80", "tax", "peak MiB", "saved MiB"]
    text = table([*head, "largest batch"], lines, right=5)
    plains = {r.op: taxed.PAIRS[r.op].plain for r in rows}
    return text + "\n\n" + "\n".join(f"{name}: plain is {plain}" for name, plain in plains.items())


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench models`."""
    p: argparse.ArgumentParser = add(
        "models", help="the attention tax: whole networks with attention and without, before and after fuse_",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    text = f"of {', '.join(taxed.PAIRS)} (default: all)"
    p.add_argument("--network", nargs="+", choices=list(taxed.PAIRS), metavar="NAME", help=text)
    p.add_argument("--batch", nargs="+", type=int, help="N (default: 8; on a GPU 1 and 64)")
    p.add_argument("--size", type=int, default=224, help="height and width (default: 224)")
    p.add_argument(
        "--compile", nargs="*", choices=list(NAMES), metavar="HOW",
        help=f"also under torch.compile, which takes minutes per network: {', '.join(NAMES)} (alone: default)",
    )  # fmt: skip
    p.add_argument("--backend", default="auto", choices=backend.BACKENDS, help="of the fused forms (default: auto)")
    p.add_argument("--no-memory", action="store_true", help="leave out memory, which takes a process for each form")
    session.options(p, modes=2, seconds=30.0, mode=MODES, dtype=DTYPES, layout=LAYOUTS)
    p.add_argument("--one", choices=taxed.FORMS, help=argparse.SUPPRESS)  # what the processes are called with
    return p


def jobs(options: argparse.Namespace) -> list[Job]:
    """What the options select."""
    device = options.device or measure.default_device()
    batches = options.batch or ([1, 64] if device == "cuda" else [8])
    how = () if options.compile is None else tuple(NAMES[c] for c in options.compile or ["default"])
    size, rounds, weigh = options.size, (5, 200), not options.no_memory
    if options.quick:
        batches, size, rounds, weigh = batches if options.batch else [2], min(size, 96), (3, 200), False
    networks = options.network or (list(QUICK) if options.quick else list(taxed.PAIRS))
    return [
        Job(name, mode, dtype, layout, device, batch, size, how, options.backend, weigh, rounds)
        for name, batch, mode, dtype, layout in itertools.product(
            networks, batches, session.chosen(options.mode, MODES), session.chosen(options.dtype, DTYPES),
            session.chosen(options.layout, LAYOUTS),
        )
    ]  # fmt: skip


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench models`."""
    selected = jobs(options)
    if options.one:
        print(json.dumps(selected[0].one(options.one)))
        return 0
    if options.quick:
        options.seconds = min(options.seconds, 1.0)
    rows, _ = session.run("models", selected, options, arguments, None, "models")
    if options.format == "table":
        print(summary(rows))
    return int(session.failures(rows) or not any(r.median_us for r in rows))
