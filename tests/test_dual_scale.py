"""dual_scale and the merges on every backend that runs here: against formulas in float64, and the passes they make."""

import json
import os
import subprocess
import sys

import pytest
import torch
from passes import ROOT, counting_extension

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.ops.channel_pool import channel_pool
from fused_attn.ops.scale import scale
from fused_attn.ops.spatial_pool import spatial_pool

PASSES = ("dual_scale_reduce", "dual_scale_gate", "dual_scale_apply", "merge_scale_reduce", "merge_scale_apply",
          "project", "spatial_pool", "spatial_pool_bwd", "scale", "channel_pool")  # fmt: skip
# As a program this file loads the counting extension, and must not look for the usual one, which has the same names.
CANDIDATES = testing.candidates("cpu") if __name__ != "__main__" else ()
BACKENDS = [b for b in CANDIDATES if all(testing.missing(OPS[n], b) is None for n in PASSES)]


def draw(*shape, seed=0, rounded=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.round().clamp(-1, 1) if rounded else x


def channel(p, w):
    p = p.sum(0) if p.dim() == 3 else p
    return torch.sigmoid(p.to(w.dtype) @ w).to(p.dtype)


def planar(q, k):
    return torch.sigmoid((q.to(k.dtype) * k[: q.shape[1]].view(1, -1, *(1,) * (q.dim() - 2))).sum(1))


def cascade(x, w, k, r, pools, ties, act):
    """What dual_scale computes, by formulas alone."""
    gate = channel(channel_pool.formula(x, pools[0], ties, False), w)
    pixel = planar(spatial_pool.formula(x, gate, pools[1], ties, False), k)
    return scale.formula(x, gate, r, pixel, act)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("pools", "ties"),
    [(("mean_max", "mean_max"), "split"), (("mean_max", "mean_max"), "first"), (("mean", "mean"), "split"),
     (("mean_abs", "max"), "split"), (("max", "max"), "first"), (("max", "mean"), "split")],
)  # fmt: skip
def test_dual_scale(backend, pools, ties, residual, act):
    """Layouts, dtypes, ties, parameters: outputs and every gradient, and their strides."""
    cases = [((2, 37, 5, 7), torch.float32, layout, True) for layout in testing.WALKABLE] + [
        ((2, 6, 13), torch.float64, "contiguous", False),
        ((3, 18, 4, 4), torch.bfloat16, "channels_last", True),
        ((2, 9, 3, 2, 4), torch.float16, "contiguous", False),
    ]
    for shape, dtype, layout, rounded in cases:
        lay = lambda t: testing.arrange(t.to(dtype), layout)  # noqa: B023
        small = torch.float64 if dtype == torch.float64 else torch.float32
        w, k = (draw(shape[1], shape[1], seed=1) / shape[1] ** 0.5).to(small), draw(2, seed=2).to(small)
        args = lay(draw(*shape, rounded=rounded)), w, k, lay(draw(*shape, seed=3)) if residual else None
        fused = lambda x, w, k, r: ops.dual_scale(
            x, channel, planar, (w,), (k,), channel=pools[0], pool=pools[1], ties=ties, residual=r, act=act
        )
        formula = lambda x, w, k, r: cascade(x, w, k, r, pools, ties, act)
        with use_backend(backend):
            got = testing.answer(fused, args, gradient=layout)
        assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
        true = testing.answer(formula, testing.double(args), cotangents=testing.double(got.cotangents))
        plain = testing.answer(formula, args, cotangents=got.cotangents)
        names = ["x", "w", "k", "residual"][: len(got.grads)]
        found = testing.deviations(got, true, plain, max(shape) * 8, names)
        if residual and act == "silu":  # e is held in x's dtype between the passes: all gradients have its resolution
            found = [d._replace(allowed=max(d.allowed, torch.finfo(dtype).eps)) for d in found]
        assert all(d.ok for d in found), f"{shape}, {dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", ["sigmoid_product", "sigmoid_sum", "sum"])
def test_merges(backend, merge):
    """bam_scale and scse_scale: layouts and dtypes."""
    bam = lambda x, w, k: ops.bam_scale(x, channel, lambda x: planar(x, k), w, merge=merge)
    scse = lambda x, w, k: ops.scse_scale(x, k, channel, torch.sigmoid, (w,), merge=merge)

    def bam_formula(x, w, k):
        return scale.formula(x, channel(channel_pool.formula(x, "mean", "split", False), w), None, planar(x, k),
                             merge=merge)  # fmt: skip

    def scse_formula(x, w, k):
        q = (x.to(k.dtype) * k.view(1, -1, 1, 1)).sum(1)
        gate = channel(channel_pool.formula(x, "mean", "split", False), w)
        return scale.formula(x, gate, None, torch.sigmoid(q), merge=merge)

    for fused, formula in ((bam, bam_formula), (scse, scse_formula)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for layout in testing.WALKABLE:
                small = torch.float64 if dtype == torch.float64 else torch.float32
                w, k = (draw(19, 19, seed=1) / 4).to(small), (draw(19, seed=2) / 4).to(small)
                args = testing.arrange(draw(2, 19, 5, 7).to(dtype), layout), w, k
                with use_backend(backend):
                    got = testing.answer(fused, args, gradient=layout)
                true = testing.answer(formula, testing.double(args), cotangents=testing.double(got.cotangents))
                plain = testing.answer(formula, args, cotangents=got.cotangents)
                found = testing.deviations(got, true, plain, 37 * 8, ["x", "w", "k"])
                assert all(d.ok for d in found), f"{dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic):
    """One graph, with the bits of the eager call; what has no such graph of its own is composed of its parts."""
    torch._dynamo.reset()
    args = torch.randn(2, 6, 5, 3), torch.randn(6, 6), torch.randn(2), torch.randn(2, 6, 5, 3)
    fused = lambda x, w, k, r: ops.dual_scale(x, channel, planar, (w,), (k,), residual=r, act="relu")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert testing.same_bits(testing.answer(fused, args), testing.answer(compiled, args))


def test_checks():
    x = torch.randn(2, 3, 4, 4)
    one, two = (lambda p: p[0]), (lambda q: q[:, 0])
    with pytest.raises(ValueError, match="pool must be"):
        ops.dual_scale(x, one, two, pool="mean_abs")
    with pytest.raises(ValueError, match="excite's gate"):
        ops.dual_scale(x, one, lambda q: q)
    with pytest.raises(ValueError, match="pixel must have shape"):
        ops.scale(x, pixel=torch.randn(2, 4))
    with pytest.raises(ValueError, match="merge must be"):
        ops.scale(x, pixel=torch.randn(2, 4, 4), merge="x")
    index = torch.full((2, 4, 4), 3)
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises((RuntimeError, IndexError), match="index"):
            OPS["spatial_pool_bwd"](x, None, torch.randn(2, 1, 4, 4), x[:, :1], index, "max", "first")


# (forward, backward) in reads and writes: the column (a) of mechanisms.md §4
TOTALS = {
    "split": ((3, 1), (6, 1)),
    "first": ((3, 1), (5, 1)),
    "split, residual, relu": ((4, 1), (7, 2)),
    "first, residual, relu": ((4, 1), (6, 2)),
    "norm, split": ((3, 1), (6, 1)),
    "norm, first, residual, relu": ((4, 1), (7, 2)),
    "norm, split, residual, relu": ((4, 1), (7, 2)),
    "bam": ((2, 1), (4, 1)),
    "scse": ((2, 1), (4, 1)),
}


@pytest.fixture(scope="module")
def counts():
    why = testing.missing(OPS["scale"], "cpp")
    if why is not None:
        pytest.skip(f"cpp: {why}")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(counting_extension())], env=env, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("what", TOTALS)
def test_passes(counts, what, layout):
    for found, budget in zip(counts[f"{what}, {layout}"], TOTALS[what], strict=True):
        for passes, most in zip(found, budget, strict=True):
            assert passes <= most + 0.06, counts[f"{what}, {layout}"]


def count(library):
    """The passes of each, the kernels' and those of the ATen operators around them."""
    from passes import _around

    from fused_attn import backend

    torch.ops.load_library(library)
    backend._extension[:] = [None]
    cpp, found = torch.ops.fused_attn_cpp, {}
    for what in TOTALS:
        for layout in ("contiguous", "channels_last"):
            x, r, dy = (testing.arrange(torch.randn(4, 64, 14, 14), layout).requires_grad_() for _ in range(3))
            w, k = torch.randn(64, 64).requires_grad_(), torch.randn(64).requires_grad_()
            pixel = torch.randn(4, 14, 14).requires_grad_()
            tail = dict(residual=r, act="relu") if "relu" in what else {}

            def run(x=x, w=w, k=k, pixel=pixel, tail=tail, what=what):
                if what == "bam":  # its own network's passes are PyTorch's: one that makes none stands in for it
                    return ops.bam_scale(x, channel, lambda x: _Free.apply(x, pixel), w)
                if what == "scse":
                    return ops.scse_scale(x, k, channel, torch.sigmoid, (w,))
                if what.startswith("norm"):
                    return ops.affine_dual_scale(x, norm, channel, planar, (k, k), (w,), (k,),
                                                 ties=what.split(", ")[1], **tail)  # fmt: skip
                return ops.dual_scale(x, channel, planar, (w,), (k,), ties=what.split(",")[0], **tail)

            with use_backend("cpp"):
                halves = []
                for step in range(2):
                    cpp._count_reset()
                    with _around(x.numel()) as mode:
                        if step == 0:
                            y = run()
                        else:
                            torch.autograd.grad(y, [x, w], dy)
                    reads, writes = cpp._count_read() / x.numel(), cpp._count_write() / x.numel()
                    halves.append((reads + mode.passes.reads, writes + mode.passes.writes))
            found[f"{what}, {layout}"] = halves
    print(json.dumps(found))


def norm(moments, weight, bias):
    """Some norm that uses all it gets."""
    return torch.stack([weight * (1 + moments[1]).rsqrt(), bias + moments[0]])


class _Free(torch.autograd.Function):
    """A pixel gate that depends on x without reading it."""

    @staticmethod
    def forward(ctx, x, pixel):
        ctx.like = x
        return pixel.clone()

    @staticmethod
    def backward(ctx, dpixel):
        return torch.empty_like(ctx.like), dpixel


if __name__ == "__main__":
    count(sys.argv[1])
