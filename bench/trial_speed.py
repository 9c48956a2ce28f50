"""Items of `qualify --only kernels` and `--only models`: how fast the device is, most valuable first."""

from collections.abc import Sequence

from fused_attn import testing
from fused_attn.registry import OPS, Op, case

from . import blocks, models, shapes, taxed
from .contests import CONTESTS
from .labels import SE, bench_ops
from .measure import Candidate, Row
from .ops import Job
from .trials import Item, NotRun, Payload, Wrong, backends_of

Beside = tuple[str, ...]
FULL, QUICK = ("eager", "inductor", "clone"), ("eager", "clone")
COMPILED = ("seresnet50", "cbam_resnet50")


def kernels(device: str) -> list[Item]:
    """Timings, most valuable first: everything once against eager and a copy, then with what takes minutes to
    compile."""
    stages = [(c, s) for c, s, _ in shapes.SETS["resnet50"]]
    batches = (64, 8, 256) if device == "cuda" else (2,)
    kinds = (("bfloat16", "channels_last"), ("float32", "nchw"), ("bfloat16", "nchw"), ("float32", "channels_last"))
    modes = ("forward", "forward+backward")
    found = []
    for c, s in stages[1:3]:
        found += [_squeeze(batches[0], c, s, *kinds[0], mode, device, QUICK) for mode in modes]
        found += [_mechanism(batches[0], name, c, s, device, QUICK) for name in CONTESTS]
    found += _others(device, QUICK)
    for n in batches:
        found += [_squeeze(n, c, s, *kind, mode, device) for kind in kinds for mode in modes for c, s in stages]
        found += [_mechanism(n, name, *shape, device) for shape in stages for name in CONTESTS if n == batches[0]]
    return found + _others(device)


def _squeeze(n: int, c: int, s: int, dtype: str, layout: str, mode: str, device: str, beside: Beside = FULL) -> Item:
    h = c // 16
    args = case(x=(n, c, s, s), w1=(h, c), b1=(h,), w2=(c, h), b2=(c,))
    return _timing(Job(OPS[SE], args, dtype, layout, mode, device, beside, rivals(OPS[SE], device)))


def _others(device: str, beside: Beside = FULL) -> list[Item]:
    """Every other op on its cases for the bench."""
    return [
        _timing(Job(op, c, "bfloat16", "nchw", mode, device, beside, rivals(op, device)))
        for op in bench_ops()
        for c in op.cases
        for mode in ("forward", "forward+backward")
        if "bench" in c.tags and op.name != SE
    ]


def rivals(op: Op, device: str) -> tuple[str, ...]:
    """The backends between which the dispatch table chooses."""
    return tuple(b for b in dict.fromkeys((*backends_of(device), "eager")) if testing.missing(op, b) is None)


def _mechanism(n: int, name: str, c: int, s: int, device: str, beside: Beside = FULL) -> Item:
    job = blocks.Job(CONTESTS[name], n, c, s, "bfloat16", "channels_last", "forward+backward", device, beside)
    title = f"{job.title} {job.dtype} {job.layout}{_without(beside)}"
    return Item(title, lambda: _rows(job.run(0.3, _number(beside))), lambda: _call_once(job.candidates()[1]))


def _call_once(candidates: Sequence[Candidate]) -> None:
    """Compiles everything into the caches on disk."""
    for c in candidates:
        with c.context():
            c.calls[0]()


def _number(beside: Beside) -> int:
    """Which run of a case it is: the one without compilers is another."""
    return int("inductor" not in beside)


def _without(beside: Beside) -> str:
    return "" if "inductor" in beside else ", not compiled"


def _rows(rows: Sequence[Row]) -> Payload:
    """What to keep of rows, or the complaint of ours that failed. A baseline may fail."""
    if wrong := [r.error for r in rows if "fused" in r.impl and r.error]:
        raise NotRun(wrong[0]) if "not installed" in wrong[0] else Wrong(wrong[0])
    return {"rows": [r.dict() for r in rows]}


def whole(device: str) -> list[Item]:
    """Whole networks: the attention tax with automatic mixed precision, then compiled for two of them, then memory."""
    batch, size, seconds = (64, 224, 6.0) if device == "cuda" else (2, 64, 0.1)
    make = lambda name, mode, dtype, layout, **how: models.Job(name, mode, dtype, layout, device, batch, size, **how)
    usual, compiled = {"memory": False}, {"memory": False, "compilers": ("compiled",)}
    jobs = [make(n, m, "amp", "channels_last", **usual) for m in models.MODES for n in taxed.PAIRS]
    jobs += [make(n, m, "amp", "channels_last", **compiled) for n in COMPILED for m in models.MODES]
    jobs += [make(n, m, "amp", "nchw", **usual) for m in models.MODES for n in taxed.PAIRS]
    found = [_whole(job, seconds, "compiled" if job.compilers else "") for job in jobs]
    weighed = [make(n, "train-step", "amp", "channels_last", memory=True) for n in COMPILED]
    return found + [_whole(job, 1.0, "memory") for job in weighed]


def _whole(job: models.Job, seconds: float, what: str) -> Item:
    def run() -> Payload:
        if (why := taxed.missing(job.name)) is not None:
            raise NotRun(why)
        return _rows(job.run(seconds, 0))

    return Item(" ".join(filter(None, (job.title, what))), run, seconds=400 if what else 150)


def _timing(job: Job) -> Item:
    title = f"{job.op.name} {job.label} {job.dtype} {job.layout} {job.mode}{_without(job.baselines)}"
    some = slice(None if job.device == "cuda" else 1)
    return Item(
        title,
        lambda: _rows(job.run(0.4, _number(job.baselines))),
        lambda: _call_once(job.candidates(job.subjects()[some])),
    )
