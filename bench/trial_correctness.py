"""Items of `qualify --only correctness`: whether the device computes what it should, most valuable first."""

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import ops, testing
from fused_attn.registry import OPS, Case, Op, case

from . import shapes
from .contests import CONTESTS
from .labels import SE, bench_ops, label
from .ops import DTYPES
from .support import ROOT, importable
from .trials import ITEM_SECONDS, Item, NotRun, Payload, Wrong, kernels_of, output


def items(device: str) -> list[Item]:
    """All items, most valuable first."""
    small: list[Item] = []
    large: list[Item] = []
    rest: list[Item] = []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for layout in ("contiguous", "channels_last", "sliced", "sliced_channels_last"):
            usual = dtype in ("float32", "bfloat16") and not layout.startswith("sliced")
            for op in OPS.values():
                if op.formula is None:
                    continue
                for c in op.cases:
                    if layout != "contiguous" and not op.maps and not layout.startswith("sliced"):
                        continue
                    name = f"{op.name} {label(op, c)} #{op.cases.index(c)} {dtype} {layout}"
                    run = functools.partial(_conforms, op, c, DTYPES[dtype], layout, device)
                    (rest if not usual else large if "bench" in c.tags else small).append(Item(name, run))
    return [
        *large,  # many tiles, and what users run
        *_beyond(device),
        *_mechanisms(device),
        *_special(device),
        *small,
        *rest,
        Item("pytest -m gpu", functools.partial(_pytest, device), seconds=240),
    ]


def _conforms(op: Op, c: Case, dtype: torch.dtype, layout: str, device: str) -> Payload:
    """Outputs and gradients against float64, strides, equal bits run to run: of the kernels and of the eager form."""
    args = testing.draw(c, op, dtype, device, layout=layout)
    worst, wrong = {}, []
    for name in runnable(op, device):
        with fused_attn.use_backend(name):
            got = testing.answer(op, args)
            again = testing.answer(op, args)
        found = testing.deviations(
            got, testing.truth(op, args, got), testing.plain(op, args, got), testing.terms(op, args), _names(op, args)
        )
        wrong += [f"{name}: {d}" for d in found if not d.ok]
        worst[name] = max((d.error for d in found), default=0.0)
        if name != "eager" and not testing.same_bits(got, again):
            wrong.append(f"{name}: two runs differ")
        x, y = args[0], got.outs[0]
        if op.maps and y.shape == x.shape and y.stride() != torch.empty_like(x).stride():
            wrong.append(f"{name}: strides {y.stride()} for x of {x.stride()}")
    if wrong:
        raise Wrong("; ".join(wrong))
    return {"error": worst}


def runnable(op: Op, device: str) -> list[str]:
    """The kernels on trial, where the op has such, and the eager form: a GPU takes PyTorch's convolution of planes."""
    return [b for b in dict.fromkeys((kernels_of(device), "eager")) if testing.missing(op, b) is None]


def _names(op: Op, args: Sequence[Any]) -> list[str]:
    return [n for n, v in zip(op.arguments, args, strict=True) if isinstance(v, Tensor) and v.is_floating_point()]


def _mechanisms(device: str) -> list[Item]:
    """Blocks and tails, fused, against the float64 form of what their users have; then with autocast, and captured."""
    made = []
    for dtype, layout in (
        ("float32", "nchw"),
        ("bfloat16", "channels_last"),
        ("float16", "nchw"),
        ("float32", "channels_last"),
    ):
        for name in CONTESTS:
            run = functools.partial(_mechanism, name, dtype, layout, device)
            made.append(Item(f"{name}, fused, {dtype} {layout}", run))
    for name in CONTESTS:
        made.append(Item(f"{name}, fused, autocast", functools.partial(_mechanism, name, "amp", "nchw", device)))
    for name in CONTESTS:
        made.append(Item(f"{name}, CUDA graph", functools.partial(_mechanism_graph, name, device)))
    return made


def pair_of(name: str, dtype: torch.dtype, layout: str, device: str) -> tuple[Any, Any, Any, list[Tensor]]:
    """A mechanism as users have it, the same in float64, fused, and inputs."""
    contest = CONTESTS[name]
    if contest.needs and not importable(contest.needs):
        raise NotRun(f"{contest.needs} is not installed")
    torch.manual_seed(0)
    pair = contest.make(128)
    eager, fused = (f.to(device, dtype).train() if isinstance(f, nn.Module) else f for f in pair[:2])
    true = copy.deepcopy(eager).double() if isinstance(eager, nn.Module) else eager
    generator = torch.Generator(device).manual_seed(1)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    xs = [torch.randn(s, generator=generator, device=device).to(dtype) for s in contest.inputs(4, 128, 14)]
    return eager, true, fused, [x.to(memory_format=order) if x.dim() == 4 else x for x in xs]


def results(function: Callable[..., Any], xs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The output, the gradients of the inputs, and those of the parameters by name."""
    leaves = [x.detach().requires_grad_() for x in xs]
    named = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    grads = torch.autograd.grad(y, [*leaves, *named.values()], dy, allow_unused=True)
    found = {"y": y.detach(), **{f"dx{i}": g for i, g in enumerate(grads[: len(xs)]) if g is not None}}
    return found | {n: g for n, g in zip(named, grads[len(xs) :], strict=True) if g is not None}


def _mechanism(name: str, dtype: str, layout: str, device: str) -> Payload:
    amp = dtype == "amp"
    eager, true, fused, xs = pair_of(name, torch.float32 if amp else DTYPES[dtype], layout, device)
    xs = [x.bfloat16() for x in xs] if amp else xs  # what convolutions under autocast hand on
    want = results(true, [x.double() for x in xs])
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        plain, ours = results(eager, xs), results(fused, xs)
    errors, wrong = {}, []
    unit = max(float(t.abs().max()) for t in want.values())
    eps = torch.finfo(torch.bfloat16 if amp else DTYPES[dtype]).eps
    for key, value in want.items():
        matching = [k for k in ours if k == key or k.endswith(f".{key}") or key.endswith(f".{k}")]
        if len(matching) != 1 or key not in plain:
            continue  # a container around a module names its weights in another way
        errors[key] = testing.error(ours[matching[0]], value, unit)
        limit = 8 * (testing.error(plain[key], value, unit) + eps)
        if not errors[key] <= limit:
            wrong.append(f"{key}: error {errors[key]:.1e}, at most {limit:.1e} expected")
    if wrong:
        raise Wrong("; ".join(wrong))
    return {"error": max(errors.values()), "compared": len(errors)}


def _mechanism_graph(name: str, device: str) -> Payload:
    if device != "cuda":
        raise NotRun("needs a GPU")
    _, _, fused, xs = pair_of(name, torch.float32, "nchw", device)
    leaves = [x.requires_grad_() for x in xs]
    step = lambda: (y := fused(*leaves), *torch.autograd.grad(y.sum(), leaves))
    return {"results": _replayed(step, leaves)}


def _beyond(device: str) -> list[Item]:
    """Maps of more than 2^31 elements, of every op that computes each sample by itself: in many samples, and in one,
    whose offsets need 64 bits within it."""
    return [
        Item(
            f"{op.name} on more than 2^31 elements{' in one sample' if size[0] == 1 else ''}",
            functools.partial(_far, op, device, size), seconds=240, group="2^31",
        )
        for size in ((43, 1024, 224), (1, 1024, 1452))
        for op in bench_ops()
        if op.name != SE and op.maps
    ]  # fmt: skip


def _far(op: Op, device: str, size: tuple[int, int, int]) -> Payload:
    if device != "cuda":
        raise NotRun("needs a GPU")
    needed = 60 if size[0] > 1 else 100
    if torch.cuda.mem_get_info()[0] < needed << 30:
        raise NotRun(f"needs {needed} GiB of free GPU memory")
    return far(op, device, size)


def far(op: Op, device: str, size: tuple[int, int, int]) -> Payload:
    """The first and the last sample of a map, which lies beyond 32-bit offsets, against float64; one sample alone,
    which is too large for that, against float32."""
    n, c, s = size
    found = [m for given in op.cases if (m := shapes.rescaled(op, given, n, c, s, c // 16))]
    if not found:
        raise NotRun("no case of this op is a map (N, C, H, W)")
    make = lambda v: torch.randn(v, device=device, dtype=torch.bfloat16) if isinstance(v, tuple) else v
    args = [make(v) for v in op.bind((), dict(found[0].args))]
    with fused_attn.use_backend(runnable(op, device)[0]), torch.no_grad():
        out = _first(op(*args))
    if out.shape[0] != n:
        raise NotRun("its output isn't one per sample")
    errors = {}
    for i in dict.fromkeys((0, n - 1)):
        part = [a[i : i + 1] if isinstance(a, Tensor) and n > 1 and a.shape[0] == n else a for a in args]
        wide = testing.double(part) if n > 1 else [a.float() if isinstance(a, Tensor) else a for a in part]
        with torch.no_grad():
            want = _first(op.formula(*wide))  # type: ignore[misc]
        errors[f"y[{i}]"] = testing.error(out[i : i + 1], want)
    if max(errors.values()) > 0.02:
        raise Wrong(f"errors {errors}")
    return {"elements": args[0].numel(), "error": errors}


def _streams(device: str) -> Payload:
    if device != "cuda":
        raise NotRun("needs a GPU")
    return streamed(device, [torch.cuda.stream(torch.cuda.Stream()) for _ in range(4)])


def streamed(device: str, streams: Sequence[Any], rounds: int = 10) -> Payload:
    """The same bits as one by one, from calls that run at once on several streams, forward and backward."""
    op = OPS[SE]
    c = case(x=(16, 128, 28, 28), w1=(8, 128), b1=(8,), w2=(128, 8), b2=(128,))
    several = [testing.draw(c, op, device=device, seed=i) for i in range(len(streams))]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with fused_attn.use_backend(kernels_of(device)):
        alone = [testing.answer(op, args) for args in several]
        wait()
        for i in range(rounds):
            found = []
            for stream, args in zip(streams, several, strict=True):
                with stream:
                    found.append(testing.answer(op, args))
            wait()
            if wrong := [k for k, pair in enumerate(zip(found, alone, strict=True)) if not testing.same_bits(*pair)]:
                raise Wrong(f"streams {wrong} differ in round {i + 1}")
    return {"streams": len(streams), "rounds": rounds}


def _special(device: str) -> list[Item]:
    """What the cases of the ops don't show."""
    se = lambda n, c, s: case(x=(n, c, s, s), w1=(c // 16, c), b1=(c // 16,), w2=(c, c // 16), b2=(c,))
    made: list[Item] = []

    def item(name: str, run: Callable[[], Payload | None], seconds: float = ITEM_SECONDS) -> None:
        made.append(Item(name, run, seconds=seconds))

    for op in (o for o in OPS.values() if o.formula is not None and o.maps):
        for value in ("nan", "inf", "-inf"):
            item(f"{value} in {op.name}", functools.partial(_special_value, op, float(value), device))
    for op, c in ((o, c) for o in OPS.values() if o.formula is not None for c in o.cases if _maximum(c)):
        item(f"ties in {op.name} {label(op, c)} #{op.cases.index(c)}", functools.partial(_ties, op, c, device))
    item("pool_scale, checked", functools.partial(_pool_scale, device))
    big = se(64, 256, 56) if device == "cuda" else se(2, 64, 7)
    for layout in ("contiguous", "channels_last"):
        item(f"equal bits over 20 runs, {layout}", functools.partial(_deterministic, big, layout, device))
        item(f"more than 2^31 elements, {layout}", functools.partial(_huge, layout, device))
        item(f"torch.compile fullgraph, {layout}", functools.partial(_compiles, se(4, 64, 14), layout, device))
        item(f"CUDA graph, capture and replay, {layout}", functools.partial(_graph, se(8, 64, 28), layout, device))
    item("four streams at once", functools.partial(_streams, device))
    for dtype in ("float32", "bfloat16"):
        item(f"timm seresnet50, fused, {dtype}", functools.partial(_model, dtype, device), seconds=240)
    return made


def _maximum(c: Case) -> bool:
    return "max" in str(c.args.get("pool", "")) or c.args.get("max_weight", 0) != 0


def _special_value(op: Op, value: float, device: str) -> Payload:
    """Where the float64 formula has NaN or an infinity the kernel has it too, and nowhere else."""
    c = next(c for c in op.cases if "bench" not in c.tags and 0 not in c.args[op.arguments[0]])
    args = testing.draw(c, op, torch.float32, device)
    args[0].view(-1)[args[0].numel() // 2] = value
    with fused_attn.use_backend(kernels_of(device)), torch.no_grad():
        got = op(*args)
    with torch.no_grad():
        true = op.formula(*testing.double(args))  # type: ignore[misc]
    error = testing.error(_first(got), _first(true).float())
    if not error < 1e-4:
        raise Wrong(f"error {error:.1e}")
    return {"error": error}


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _ties(op: Op, c: Case, device: str) -> Payload:
    """The gradient of a maximum that occurs more than once."""
    args = testing.draw(c, op, torch.float32, device, ties=True)
    with fused_attn.use_backend(kernels_of(device)):
        got = testing.answer(op, args)
    true, plain = testing.truth(op, args, got), testing.plain(op, args, got)
    found = testing.deviations(got, true, plain, testing.terms(op, args), _names(op, args))
    if wrong := [str(d) for d in found if not d.ok]:
        raise Wrong("; ".join(wrong))
    return {"error": max((d.error for d in found), default=0.0)}


def _pool_scale(device: str) -> Payload:
    """The op that takes any excite, in every way that `testing.check` knows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 7, 7, generator=generator).to(device)
    w = torch.randn(16, 16, generator=generator).to(device) / 4

    def gated(x: Tensor, w: Tensor) -> Tensor:
        return ops.pool_scale(x, lambda p, w: torch.sigmoid(p @ w.to(p.dtype)), w)

    report = testing.check(gated, x, w)  # by choice: a forced backend would refuse the strides that no kernel walks
    if not report:
        raise Wrong(str(report))
    return {"findings": len(report.findings)}


def _deterministic(c: Case, layout: str, device: str) -> Payload:
    args = testing.draw(c, OPS[SE], torch.float32, device, layout=layout)
    with fused_attn.use_backend(kernels_of(device)):
        first = testing.answer(OPS[SE], args)
        for i in range(20):
            if not testing.same_bits(first, testing.answer(OPS[SE], args)):
                raise Wrong(f"run {i + 2} differs from run 1")
    return {"runs": 21}


def _huge(layout: str, device: str) -> Payload:
    """Offsets beyond 2^31. Samples don't depend on one another, so the first and the last are enough to compare."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        raise NotRun("needs 40 GiB of free GPU memory")
    n, c, s, dtype = 43, 1024, 224, torch.bfloat16
    small = case(x=(1, c, 1, 1), w1=(c // 16, c), b1=(c // 16,), w2=(c, c // 16), b2=(c,))
    args = list(testing.draw(small, OPS[SE], dtype, device))
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.empty(n, c, s, s, dtype=dtype, device=device).to(memory_format=order) for _ in range(2))
    x.normal_()
    dy.normal_()
    args[0] = x.requires_grad_()
    with fused_attn.use_backend(kernels_of(device)):
        y = OPS[SE](*args)
        (dx,) = torch.autograd.grad(y, x, dy)
    errors = {}
    for i in (0, n - 1):
        part = [x[i : i + 1].detach(), *args[1:]]
        true = testing.double(part)
        leaf = true[0].requires_grad_()
        want = OPS[SE].formula(*true)  # type: ignore[misc]
        (dwant,) = torch.autograd.grad(want, leaf, dy[i : i + 1].double())
        errors |= {f"y[{i}]": testing.error(y[i : i + 1], want), f"dx[{i}]": testing.error(dx[i : i + 1], dwant)}
    if max(errors.values()) > 0.02:
        raise Wrong(f"errors {errors}")
    return {"elements": x.numel(), "error": errors}


def _compiles(c: Case, layout: str, device: str) -> Payload:
    """One graph, forward and backward, with the values of the uncompiled op."""
    op, errors = OPS[SE], {}
    for dtype in (torch.float32, torch.bfloat16):
        args = testing.draw(c, op, dtype, device, layout=layout)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: op(*a) * 2, fullgraph=True)
        got, want = testing.answer(compiled, args), testing.answer(lambda *a: op(*a) * 2, args)
        pairs = zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True)
        errors[str(dtype)] = max(testing.error(a, b) for a, b in pairs if a is not None and b is not None)
        if errors[str(dtype)] > 8 * torch.finfo(dtype).eps:
            raise Wrong(f"{dtype}: error {errors[str(dtype)]:.1e} against the uncompiled op")
    return {"error": errors}


def _graph(c: Case, layout: str, device: str) -> Payload:
    """Captured once, replayed on other values, equal to a plain call to the bit."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    op = OPS[SE]
    args = [
        a.requires_grad_() if isinstance(a, Tensor) else a for a in testing.draw(c, op, device=device, layout=layout)
    ]
    leaves = [a for a in args if isinstance(a, Tensor)]
    dy = torch.randn_like(args[0])
    step = lambda: (y := op(*args), *torch.autograd.grad(y, leaves, dy))
    return {"results": _replayed(step, leaves)}


def _replayed(step: Callable[[], tuple[Tensor, ...]], leaves: Sequence[Tensor]) -> int:
    """How many results a replay on other values has, equal to those of a plain call."""
    with fused_attn.use_backend(kernels_of("cuda")):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for i, t in enumerate(leaves):
                t.copy_(torch.roll(t, 1 + i))
        graph.replay()
        torch.cuda.synchronize()
        kept, plain = [t.detach().clone() for t in captured], step()
    if wrong := [i for i, (a, b) in enumerate(zip(kept, plain, strict=True)) if not testing.identical(a, b.detach())]:
        raise Wrong(f"results {wrong} of the replay differ from a plain call")
    return len(kept)


def _model(dtype: str, device: str) -> Payload:
    """A whole network, fused, against itself in float64."""
    if not importable("timm"):
        raise NotRun("timm is not installed")
    from . import demo

    size = 224 if device == "cuda" else 64
    found = demo.errors(demo.build("seresnet50", size), size, device, DTYPES[dtype])
    if wrong := demo.too_far(found):
        raise Wrong("; ".join(wrong))
    return found


def _pytest(device: str) -> Payload:
    """The tests that ask for a GPU."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    if not importable("pytest") or not (ROOT / "tests").exists():
        raise NotRun("pytest or the tests are not here")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "--ignore=tests/interpret",  # wants a process of its own
        "-m",
        "gpu",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    status, text = output(command, 220)
    last = (text.strip().splitlines() or [""])[-1]
    if status == 5:
        raise NotRun("no test is marked gpu")
    if status:
        raise Wrong(text[-2000:])
    return {"pytest": last}
