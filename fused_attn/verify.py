"""The check behind `fuse_(model, example_inputs=…)`: outputs, gradients, buffers and time, fused against unfused.

    float64   ‖fused₆₄ − unfused₆₄‖ / ‖unfused₆₄‖      copies in double precision: no rounding, so nothing may differ
    unfused   ‖unfused − unfused₆₄‖ / ‖unfused₆₄‖      rounding that the model has anyway
    fused     ‖fused − unfused₆₄‖ / ‖unfused₆₄‖        rounding that it has now

In those copies, parameters that are all zero are drawn anew: a zero-initialised norm would hide the gate before it.
The worst tensor counts. Every run starts from the same random state and leaves the model's buffers as they were.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# A gradient that is zero but for rounding (a bias before a BatchNorm) is compared with this share of the largest one.
_FLOOR = 1e-3
_FLOAT64 = 1e-6  # F.hardsigmoid's own backward rounds 1/6 to float32, in float64 too: 1e-8
_LOOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_SECONDS = 3.0  # for the timing, about


class Run(NamedTuple):
    """What one run of the model gave."""

    output: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]


Errors = dict[str, dict[str, float]]


def verify(
    model: nn.Module, inputs: tuple[Any, ...], apply: Callable[[], None], revert: Callable[[], None]
) -> tuple[Errors, Errors]:
    """Applies the conversion and leaves it applied if it is right, else reverts it and raises RuntimeError.

    Returns errors and speed as the report holds them: {"output": {"float64": …}, …}, {"forward": {"unfused ms": …}, …}.
    """
    with torch.inference_mode(False), torch.enable_grad():
        before = _run(model, inputs)
        truth = _in_float64(model, inputs)
        woken = _in_float64(model, inputs, wake=True)
        random = _differs(before.output, _run(model, inputs, seed=1).output)
        apply()
        try:
            after = _run(model, inputs)
            exact = None if woken is None else _in_float64(model, inputs, wake=True)
            errors, wrong = _compare(before, after, truth, (woken, exact), random)
            if wrong:
                told = "\n".join(f"  {name}: {values}" for name, values in errors.items())
                raise RuntimeError(f"the fused model differs on the example inputs in its {', '.join(wrong)}\n{told}")
            return errors, _time(model, inputs, apply, revert)
        except BaseException:
            revert()
            raise


def _run(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> Run:
    """Output, gradients of a weighted sum of it in parameters and inputs, and buffers, which are then put back."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    leaf = lambda t: t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            arguments = pytree.tree_map(leaf, inputs)
            leaves = pytree.tree_leaves(model(*arguments))
        output = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        draw = torch.Generator().manual_seed(0)
        weigh = lambda t: (t * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t)).sum()
        total = sum((weigh(t) for t in output if t.requires_grad), torch.zeros(()))
        wanted: list[Tensor] = [t for t in model.parameters() if t.requires_grad]
        wanted += [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and total.requires_grad:
            found = torch.autograd.grad(total, wanted, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        return Run([t.detach() for t in output], gradients, [b.detach().clone() for b in model.buffers()])
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _in_float64(model: nn.Module, inputs: tuple[Any, ...], wake: bool = False) -> Run | None:
    """The same in double precision, on a copy; None where the model can't be copied or has no such precision."""
    to = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
    try:
        twin = copy.deepcopy(model).double()
        if wake:
            draw = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in twin.parameters():
                    if not p.any():
                        p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
        return _run(twin, pytree.tree_map(to, inputs))
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor; infinite where shapes, count or NaN differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    norms = [t.double().norm() for t in expected]
    floor = _FLOOR * max(norms, default=torch.zeros(()))
    worst = 0.0
    for a, b, norm in zip(found, expected, norms, strict=True):
        off = float((a.double() - b.double()).norm())
        scale = float(torch.maximum(norm, floor))
        error = off / scale if scale > 0 else off
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _differs(a: list[Tensor], b: list[Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _compare(
    before: Run, after: Run, truth: Run | None, exact: tuple[Run | None, Run | None], random: bool
) -> tuple[Errors, list[str]]:
    """Errors by part, and the parts in which they are too large. exact: unfused and fused in float64, or None."""
    errors: Errors = {}
    wrong = []
    for part in Run._fields:
        old, new = getattr(before, part), getattr(after, part)
        if not old:
            continue
        values = {}
        if exact[0] is not None:
            values["float64"] = distance(getattr(exact[1], part, []), getattr(exact[0], part))
        # A model that draws random numbers draws others in float64.
        base = getattr(truth, part) if truth is not None and not random else old
        values["unfused"], values["fused"] = distance(old, base), distance(new, base)
        # Rounding grows through a deep model by as much as it grew unfused, give or take; with nothing to compare, be
        # loose.
        limit = _LOOSE[old[0].dtype] if base is old else max(8 * values["unfused"], 64 * torch.finfo(old[0].dtype).eps)
        if values.get("float64", 0.0) > _FLOAT64 or values["fused"] > limit:
            wrong.append(part)
        errors[part] = values
    return errors, wrong


def _time(model: nn.Module, inputs: tuple[Any, ...], apply: Callable[[], None], revert: Callable[[], None]) -> Errors:
    """Milliseconds of a forward without gradients and of forward and backward, medians of interleaved runs."""
    device = next((t.device for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)), torch.device("cpu"))

    def clock(run: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    def forward() -> None:
        with torch.no_grad():
            model(*inputs)

    kept = [(b, b.detach().clone()) for b in model.buffers()]
    speed = {}
    for name, run in (("forward", forward), ("forward+backward", lambda: _run(model, inputs))):
        rounds = max(1, min(7, int(_SECONDS * 250 / max(clock(run), 1e-3))))
        unfused, fused = [], []
        for _ in range(rounds):
            revert()
            unfused.append(clock(run))
            apply()
            fused.append(clock(run))
        a, b = statistics.median(unfused), statistics.median(fused)
        speed[name] = {"unfused ms": a, "fused ms": b, "ratio": a / b}
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    return speed
