"""A norm and two gates as one, in Triton's interpreter: values, gradients, ties, specials, budgets."""

import numpy as np
import pytest
import test_passes
import torch
from test_affine_dual_scale import POOLS, arguments, batch, by_values, channel, formula, fused, planar
from test_dual_scale import draw as normal
from test_dual_scale import norm
from test_passes import launches, within_budget  # noqa: F401  (the fixture)
from triton.runtime.interpreter import InterpreterBuilder

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.backend import refusal

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "pools", "ties", "act", "residual"),
    [
        ((2, 8, 5, 7), F32, "contiguous", POOLS[0], "split", "relu", True),
        ((2, 8, 5, 7), F32, "sliced_channels_last", POOLS[0], "first", "relu", True),
        ((2, 4, 4, 4), F64, "channels_last", POOLS[0], "split", "silu", False),
        ((1, 5, 11), F64, "contiguous", POOLS[2], "first", "identity", False),
        ((2, 8, 3, 3), BF16, "channels_last", POOLS[3], "split", "relu", True),
        ((2, 6, 2, 2, 3), F16, "contiguous", POOLS[4], "split", "identity", True),
        ((2, 5, 3, 5), F32, "sliced", POOLS[1], "split", "silu", True),
    ],
    ids=str,
)
def test_values(shape, dtype, layout, pools, ties, act, residual):
    args, how = arguments(shape, dtype, layout, residual), (pools, ties, act)
    got = testing.answer(lambda *args: fused(*args, *how), args, gradient=layout)
    assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
    assert testing.same_bits(got, testing.answer(lambda *args: fused(*args, *how), args, gradient=layout))
    true = testing.answer(lambda *args: formula(*args, *how), testing.double(args),
                          cotangents=testing.double(got.cotangents))  # fmt: skip
    mixed = lambda x, *rest: formula(x.to(rest[0].dtype), *rest, *how).to(x.dtype)
    plain = testing.answer(mixed, args, cotangents=got.cotangents)
    names = ["x", "weight", "bias", "w", "k", "residual"][: len(got.grads)]
    found = testing.deviations(got, true, plain, 2 * args[0].numel(), names)
    if residual and act == "silu":  # e is held in x's dtype between the passes
        found = [d._replace(allowed=max(d.allowed, 2 * torch.finfo(dtype).eps)) for d in found]
    assert all(d.ok for d in found), "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", ["split", "first"])
def test_ties(ties, layout):
    weight = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0, -0.5], dtype=F64)
    args = list(arguments((2, 6, 3, 3), F64, layout, True, weight, rounded=True))
    args[0][:, 5] = args[0][:, 4]
    args[1][5], args[2][5] = args[1][4], args[2][4]
    args[3][:, 4] = args[3][:, 5]
    how = (POOLS[0], ties, "relu")
    got = testing.answer(lambda *args: fused(*args, *how), tuple(args))
    true = testing.answer(lambda *args: by_values(*args, *how), tuple(args), cotangents=got.cotangents)
    for found, want in zip((*got.outs, *got.grads), (*true.outs, *true.grads), strict=True):
        assert testing.error(found, want) <= 1e-9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_passes_alone(act, layout):
    """Every pass against its eager form, with and without what is optional, NaN and infinity among the numbers. Eighths
    have exact products and sums, so that the same are the largest whether they were rounded twice or once."""
    x, *_, residual = arguments((2, 8, 5, 3), F32, layout, True)
    x = x.mul(8).round().div(8)
    dy, x[0, 1, 2, 1], x[1, 0, 0, 0] = residual.flip(0), float("nan"), float("inf")
    draw = lambda *shape, seed: normal(*shape, seed=seed).float().mul(8).round().div(8)
    gate, affine, pixel = draw(2, 8, seed=1), draw(2, 2, 8, seed=2), draw(2, 5, 3, seed=3)
    for pool, ties in (("mean_max", "split"), ("mean_max", "first"), ("mean", "split"), ("max", "first")):
        planes, places = run("affine_spatial_pool", x, gate, affine, pool, pool != "mean")
        run("affine_pixel_scale", x, gate, affine, pixel, residual, act, 0.1)
        run("affine_pixel_scale", x, gate, affine, pixel, None, act, 0.1)
        aux = residual if act == "silu" else dy
        _, _, shared = run("dual_scale_reduce", x, dy, gate, pixel, aux, planes, affine, act, 0.1, pool, ties, True)
        values, within = x.flatten(2).amax(-1), (draw(*planes.shape, seed=4), planes, places, shared)
        for through in ("identity", act):
            how = (through, 0.1, pool, "mean_max", ties)
            _, count = run("dual_scale_gate", x, dy, gate, pixel, *within, values, affine, *how)
            index = x.flatten(2).max(-1).indices
            last = (draw(2, 2, 8, seed=5), values, index, count, affine)
            run("dual_scale_apply", x, dy, gate, pixel, *within, *last, draw(2, 8, seed=6), *how)
            run("dual_scale_apply", x, dy, gate, pixel, *within, *last, None, *how)


def run(name, *args):
    """What the launcher returns, which is what the eager form does."""
    assert refusal(OPS[name], "triton", args) is None
    found, want = OPS[name].launch(args), OPS[name].eager(*args)
    for g, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, want)), strict=True):
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride())
        torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-4, atol=1e-4)
    return want


class OfMaps:
    """Counts as `Traffic` does, but maps alone: runs of addresses as long as one. Every tile loads what lies beside it,
    planes (N, S) and arrays (N, C), which is no small part of so small a map."""

    size = 96 * 11 * 13

    def __enter__(self):
        self.kept = load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        self.loaded, self.stored = [], []

        def kept_load(builder, ptrs, mask, *rest):
            self.loaded.append(np.unique(ptrs.data[mask.data.astype(bool)]))
            return load(builder, ptrs, mask, *rest)

        def kept_store(builder, ptrs, value, mask, *rest):
            self.stored.append(np.unique(ptrs.data[mask.data.astype(bool)]))
            return store(builder, ptrs, value, mask, *rest)

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = kept_load, kept_store
        return self

    def __exit__(self, *problem):
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = self.kept
        self.read, self.written = (4 * self.elements(found) for found in (self.loaded, self.stored))

    def elements(self, found):
        at, times = np.unique(np.concatenate([[], *found]), return_counts=True)
        runs = np.split(times, np.flatnonzero(np.diff(at) != 4) + 1)
        return sum(run.sum() for run in runs if run.size >= self.size)


@pytest.mark.parametrize("kind", ["planes", "pixels"])
@pytest.mark.parametrize("ties", ["split", "first"])
def test_budget(monkeypatch, launches, ties, kind):  # noqa: F811
    monkeypatch.setattr(test_passes, "Traffic", OfMaps)
    monkeypatch.setattr(test_passes, "SLACK", 0.05)
    shape = (1, 96, 11, 13)
    x, r = (testing.arrange(torch.randn(shape), "channels_last" if kind == "pixels" else "contiguous") for _ in "xr")
    w, k = torch.randn(96, 96).requires_grad_(), torch.randn(96).requires_grad_()
    x, r = x.requires_grad_(), r.requires_grad_()
    y = ops.affine_dual_scale(x, norm, channel, planar, (k, k), (w,), (k,), ties=ties, residual=r, act="relu")
    y.backward(torch.randn_like(y))
    within_budget(
        launches, "channel_moments", "affine_spatial_pool", "affine_pixel_scale", "dual_scale_reduce",
        "dual_scale_gate", "dual_scale_apply",
    )  # fmt: skip
    assert [round(reads) for _, reads, *_ in launches] == [1, 1, 2, 3, 2, 2]


def test_empty_batch():
    x = torch.empty(0, 4, 5, 5, requires_grad=True)
    with use_backend("triton"):
        y = ops.affine_dual_scale(
            x, lambda m: torch.stack([m, m]), channel, planar, (), (torch.ones(4, 4),), (torch.ones(2),), moments=False
        )
        y.sum().backward()
    assert x.grad.shape == x.shape
    assert batch(25)(torch.ones(2, 1, 4), torch.ones(4), torch.ones(4))[0].shape == (2, 1, 4)
