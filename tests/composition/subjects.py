"""Everything public, as modules: what every test of this folder runs.

A new op or block is a subject by its declaration. Ops that take functions declare no cases, and are written down here;
a test says when one is missing.

    one subject per op and block  in `make test`: the case with most tensors
    every case of all of them     under the mark `slow`
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn import BLOCKS, OPS, ops, testing
from fused_attn.blocks import chain
from tests.support import redraw

F64 = torch.float64


# Arguments of ops that are a module's weights; all others have a batch.
_PARAMETER = re.compile(r"[cs]?(weight|bias)|[wb]\d|(norm|act|gate)_\w+")


class Call(nn.Module):
    """One op with its case's options: feature maps come in, every other tensor is a parameter, or a buffer where a norm
    keeps it."""

    def __init__(self, op: Any, case: Any, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.given = function, testing.draw(case, op, F64)
        self.inputs = [i for i, a in enumerate(self.given) if isinstance(a, Tensor) and self._comes_in(op, i)]
        for i, (name, a) in enumerate(zip(op.arguments, self.given, strict=True)):
            if isinstance(a, Tensor) and i not in self.inputs:
                if name in ("norm_mean", "norm_var"):
                    self.register_buffer(name, a)
                else:
                    self.register_parameter(name, nn.Parameter(a))
        self.names = op.arguments
        self.given = tuple(None if isinstance(a, Tensor) else a for a in self.given)

    @staticmethod
    def _comes_in(op: Any, i: int) -> bool:
        return i == 0 or _PARAMETER.fullmatch(op.arguments[i]) is None

    def forward(self, *maps: Tensor) -> Tensor:
        args = list(self.given)
        for i, x in zip(self.inputs, maps, strict=True):
            args[i] = x
        for i, name in enumerate(self.names):
            own = self._parameters.get(name) if name in self._parameters else self._buffers.get(name)
            args[i] = args[i] if own is None else own
        out = self.function(*args)
        return out[0] if isinstance(out, tuple) else out


class Around(nn.Module):
    """An op around functions: of what is pooled, and of parameters (shapes)."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        new = lambda shape: nn.Parameter(torch.randn(shape, generator=draw, dtype=F64) / math.sqrt(shape[0]))
        self.function, self.weights = function, nn.ParameterList(map(new, shapes))

    def forward(self, *maps: Tensor) -> Tensor:
        return self.function(*maps, *self.weights)


def _sigmoid(p: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(p @ w.to(p.dtype))


def _of_two(p: Tensor, w: Tensor) -> Tensor:
    return _sigmoid(p[0] + p[1], w)


def _pixels(planes: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((planes * v.to(planes.dtype)[:, None, None]).sum(1))


def _affine(given: Tensor, w: Tensor) -> Tensor:
    return torch.stack([1 + _sigmoid(given[0], w), given[0] @ w.to(given.dtype) + 0.1 * given[1]])


def _four(given: Tensor, w: Tensor) -> Tensor:
    return torch.cat([_affine(given, w), _affine(given, w.t())])


def _shrink(p: Tensor, w: Tensor) -> Tensor:
    return p * _sigmoid(p, w)


_C = 8
_SQUARE, _MAP = (_C, _C), (3, _C, 5, 4)
# Function of the maps and parameters; shapes of the parameters; shapes of the maps.
AROUND: dict[str, tuple[Callable[..., Any], Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]]] = {
    "pool_scale": (
        lambda x, r, w: ops.pool_scale(x, _of_two, w, pool="mean_max", residual=r, act="relu"),
        [_SQUARE], [_MAP, _MAP],
    ),
    "pool_soft_threshold": (lambda x, w: ops.pool_soft_threshold(x, _shrink, w), [_SQUARE], [_MAP]),
    "dual_scale": (
        lambda x, r, w, v: ops.dual_scale(x, _of_two, _pixels, (w,), (v,), residual=r, act="silu"),
        [_SQUARE, (2,)], [_MAP, _MAP],
    ),
    "bam_scale": (
        lambda x, w: ops.bam_scale(x, _sigmoid, lambda x: x.mean(1), w), [_SQUARE], [_MAP],
    ),
    "scse_scale": (
        lambda x, w, v: ops.scse_scale(x, v, _sigmoid, torch.sigmoid, (w,)), [_SQUARE, (_C,)], [_MAP],
    ),
    "branch_softmax": (
        lambda a, b, w: ops.branch_softmax(a, b, excite=lambda p, w: p @ torch.cat([w, w.t()], 1), params=(w,)),
        [_SQUARE], [_MAP, _MAP],
    ),
    "moments_affine": (
        lambda x, r, w: ops.moments_affine(x, _affine, w, residual=r, act="relu"), [_SQUARE], [_MAP, _MAP],
    ),
    "affine_pool_scale": (
        lambda x, w, v: ops.affine_pool_scale(x, _affine, _sigmoid, (w,), (v,), act="silu"),
        [_SQUARE, _SQUARE], [_MAP],
    ),
    "affine_dual_scale": (
        lambda x, w, u, v: ops.affine_dual_scale(x, _affine, _of_two, _pixels, (w,), (u,), (v,)),
        [_SQUARE, _SQUARE, (2,)], [_MAP],
    ),
    "branch_moments_affine": (
        lambda a, b, w: ops.branch_moments_affine(a, b, excite=_affine, params=(w,), act="relu"),
        [(2 * _C, 2 * _C)], [_MAP, _MAP],
    ),
    "moments_gate_shuffle": (
        lambda x, r, w: ops.moments_gate_shuffle(x, _four, w, k=2, residual=r, act="relu"), [_SQUARE], [_MAP, _MAP],
    ),
}  # fmt: skip


class Tail(nn.Module):
    """A norm, a gate, the shortcut and a ReLU, as the library's own networks and converted parents join them."""

    def __init__(self, gate: nn.Module | None, channels: int, ahead: bool = False) -> None:
        super().__init__()
        self.norm, self.gate, self.ahead = nn.BatchNorm2d(channels), gate, ahead

    def forward(self, x: Tensor, *shortcut: Tensor) -> Tensor:
        if self.ahead:
            return chain.weighed(self.gate, self.norm, x)
        return chain.joined(self.norm, self.gate, x, *shortcut)


@dataclass(frozen=True)
class Subject:
    """Something public: how it is built, in float64, and the shapes of the maps that it takes."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...] = (0,)  # where each has its batch

    def __str__(self) -> str:
        return self.name

    def module(self, dtype: torch.dtype = F64) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(dtype)

    def maps(self, dtype: torch.dtype = F64, batch: int | None = None, seed: int = 1) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(seed)
        shape = lambda s, at: s if batch is None else (*s[:at], batch, *s[at + 1 :])
        pairs = zip(self.shapes, self.axes * len(self.shapes), strict=False)
        return tuple(torch.randn(shape(s, at), generator=draw, dtype=F64).to(dtype) for s, at in pairs)


def _op_subjects(op: Any) -> list[Subject]:
    found = []
    for case in op.cases:
        given = [case.args[n] if isinstance(case.args.get(n), tuple) else None for n in op.arguments]
        if "bench" in case.tags or 0 in given[0]:
            continue
        maps = [(n, s) for i, (n, s) in enumerate(zip(op.arguments, given, strict=True))
                if s is not None and Call._comes_in(op, i)]  # fmt: skip
        # Descriptors may be stacked, two to a sample.
        axes = tuple(int(n == "moments" or (n == "pooled" and len(s) == 3)) for n, s in maps)
        build = functools.partial(Call, op, case, op)
        found.append(Subject(f"{op.name}-{case}", build, tuple(s for _, s in maps), axes))
    return found


def _block_subjects(block: Any) -> list[Subject]:
    def build(case: Any) -> nn.Module:
        return redraw(block.module(**copy.deepcopy(case.args["args"])).double())

    return [Subject(f"{block.name}-{i}", functools.partial(build, c), (c.args["x"],)) for i, c in
            enumerate(block.cases)]  # fmt: skip


def _richest(subjects: list[Subject]) -> Subject:
    """The one with most tensors, of those whose batch isn't 1, on which compilers specialise."""
    count = lambda s: len(s.shapes) + sum(1 for _ in s.module().parameters())
    return max((s for s in subjects if s.shapes[0][0] > 1), key=count)


OP_CASES = {op.name: _op_subjects(op) for op in OPS.values() if op.formula is not None}
BLOCK_CASES = {block.name: _block_subjects(block) for block in BLOCKS.values()}
FUNCTIONS = {
    name: [Subject(name, functools.partial(Around, function, *shapes), tuple(maps))]
    for name, (function, shapes, maps) in AROUND.items()
}
ALL = {**OP_CASES, **FUNCTIONS, **BLOCK_CASES}
FEW = [_richest(cases) for cases in ALL.values()]
REST = [s for cases in ALL.values() for s in cases if all(s.name != f.name for f in FEW)]


def over(few: Sequence[Subject] = FEW, rest: Sequence[Subject] = REST) -> Any:
    """One test for each subject: `few` in the quick suite, `rest` under `slow`."""
    return pytest.mark.parametrize(
        "subject",
        [pytest.param(s, id=s.name) for s in few] + [pytest.param(s, id=s.name, marks=pytest.mark.slow) for s in rest],
    )


def run(module: Callable[..., Any], maps: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """One forward and backward: the output, and the gradients of maps and parameters, None where there is none."""
    leaves = [x.detach().clone().requires_grad_() for x in maps]
    y = module(*leaves)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(y.dtype)
    grads = torch.autograd.grad((y * weigh).sum(), [*leaves, *parameters], allow_unused=True)
    return y.detach(), list(grads)


def same(found: tuple[Tensor, list[Any]], expected: tuple[Tensor, list[Any]], within: float = 1e-7) -> None:
    """Outputs and gradients agree; no gradient is as good as zeros. Differences count against the largest of a tensor,
    or of all gradients where a tensor is rounding alone. `F.hardsigmoid`'s backward rounds 1/6 to float32."""
    (y, grads), (want, wanted) = found, expected
    assert (y.shape, y.dtype) == (want.shape, want.dtype)
    assert testing.error(y, want) <= within, f"output: {testing.error(y, want):.1e}"
    assert len(grads) == len(wanted)
    unit = max((float(g.abs().max()) for g in wanted if g is not None and g.numel()), default=0.0) or 1.0
    for i, (g, w) in enumerate(zip(grads, wanted, strict=True)):
        if g is None and w is None:
            continue
        g, w = (torch.zeros_like(w) if g is None else g), (torch.zeros_like(g) if w is None else w)
        assert g.dtype == w.dtype
        off = float((g - w).abs().max()) / max(float(w.abs().max()), 1e-5 * unit) if w.numel() else 0.0
        assert off <= within, f"gradient {i}: {off:.1e}"
