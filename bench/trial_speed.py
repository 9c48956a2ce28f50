"""Items of `qualify --only kernels` and `--only models`: how fast the device is, most valuable first."""

from collections.abc import Sequence

from fused_attn.registry import OPS, case

from . import blocks, models, shapes, taxed
from .contests import CONTESTS
from .labels import SE, bench_ops
from .measure import Row
from .ops import Job
from .trials import Item, NotRun, Payload, Wrong, backends_of

COMPILED = ("seresnet50", "cbam_resnet50")


def kernels(device: str) -> list[Item]:
    """Timings, most valuable first."""
    stages = [(c, s) for c, s, _ in shapes.SETS["resnet50"]]
    batches = (64, 8, 256) if device == "cuda" else (2,)
    backends = tuple(dict.fromkeys((*backends_of(device), "eager")))  # between them the dispatch table chooses
    found = []
    for n in batches:
        for dtype, layout in (
            ("bfloat16", "channels_last"), ("float32", "nchw"), ("bfloat16", "nchw"), ("float32", "channels_last"),
        ):  # fmt: skip
            for mode in ("forward", "forward+backward"):
                for channels, s in stages:
                    h = channels // 16
                    c = case(x=(n, channels, s, s), w1=(h, channels), b1=(h,), w2=(channels, h), b2=(channels,))
                    found.append(_timing(Job(OPS[SE], c, dtype, layout, mode, device, backends=backends)))
        found += [_mechanism(n, name, *shape, device) for shape in stages for name in CONTESTS if n == batches[0]]
    for op in bench_ops():
        for c in (c for c in op.cases if "bench" in c.tags and op.name != SE):
            for mode in ("forward", "forward+backward"):
                found.append(_timing(Job(op, c, "bfloat16", "nchw", mode, device, backends=backends)))
    return found


def _mechanism(n: int, name: str, c: int, s: int, device: str) -> Item:
    job = blocks.Job(
        CONTESTS[name], n, c, s, "bfloat16", "channels_last", "forward+backward", device, ("eager", "inductor", "clone")
    )

    def run() -> Payload:
        return _rows(job.run(0.3, 0))

    return Item(f"{job.title} {job.dtype} {job.layout}", run)


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
    def run() -> Payload:
        return _rows(job.run(0.4))

    def prepare() -> None:
        """Compiles everything into the caches on disk."""
        for c in job.candidates(job.subjects()[: None if job.device == "cuda" else 1]):
            with c.context():
                c.calls[0]()

    return Item(f"{job.op.name} {job.label} {job.dtype} {job.layout} {job.mode}", run, prepare)
