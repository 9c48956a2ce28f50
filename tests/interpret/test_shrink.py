"""Soft-thresholding and scaling by a map in Triton's interpreter: values, budgets, splits, specials."""

import pytest
import torch
from test_kernels import assert_true
from test_passes import SHAPES, launches, run, within_budget  # noqa: F401  (the fixture)

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.backend import refusal
from fused_attn.registry import case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
RUNS = [
    ("soft_threshold", BF16, "contiguous", dict(x=(2, 8, 7, 7), tau=(2, 8), residual=(2, 8, 7, 7))),
    ("soft_threshold", F32, "sliced", dict(x=(2, 4, 7, 7), tau=(2, 1))),
    ("soft_threshold", F64, "contiguous", dict(x=(2, 3, 11), tau=(2,), residual=(2, 3, 11))),
    ("soft_threshold", F16, "channels_last", dict(x=(2, 16, 3, 3), tau=(2, 16))),
    ("soft_threshold", F32, "channels_last", dict(x=(1, 3, 1400), tau=(1, 3))),
    ("soft_threshold", F32, "contiguous", dict(x=(1, 1, 4099), tau=(1,))),
    ("soft_threshold", F64, "contiguous", dict(x=(1, 33, 1, 1), tau=(1, 33))),
    ("map_scale", BF16, "contiguous", dict(x=(2, 8, 7, 7))),
    ("map_scale", F16, "channels_last", dict(x=(2, 16, 3, 3))),
    ("map_scale", F32, "contiguous", dict(x=(2, 8, 7, 7), norm="channels")),
    ("map_scale", F64, "contiguous", dict(x=(2, 3, 11), norm="channels", eps=1.5)),
    ("map_scale", BF16, "channels_last", dict(x=(2, 16, 3, 5), norm="channels")),
    ("map_scale", F32, "sliced", dict(x=(2, 5, 3, 3), norm="channels")),
    ("map_scale", F32, "contiguous", dict(x=(1, 1400, 3), norm="channels")),
    ("map_scale", F32, "contiguous", dict(x=(2, 8, 7, 7), norm="positions", eps=1e-5)),
    ("map_scale", F64, "contiguous", dict(x=(2, 3, 11), norm="positions", eps=1e-3, correction=1.0)),
    ("map_scale", F16, "channels_last", dict(x=(2, 16, 3, 5), norm="positions", eps=1e-5)),
    # The last of the programs that share a plane has nothing of it.
    ("map_scale", F32, "contiguous", dict(x=(1, 4, 40, 64), norm="positions", eps=1e-5)),
    ("map_scale", F32, "sliced_channels_last", dict(x=(2, 5, 3, 3), norm="positions", eps=1e-5)),
    ("map_scale", F32, "channels_last", dict(x=(1, 3, 1400), norm="positions", eps=1e-5)),
    ("map_scale", F32, "contiguous", dict(x=(1, 1, 4099), norm="positions", eps=1e-5)),
    ("map_scale", F32, "contiguous", dict(x=(1, 33, 1, 1), norm="positions", eps=1e-5)),
]  # fmt: skip


def drawn(name, dtype, layout, args, **how):
    if name == "map_scale":
        args = {"z": args["x"], **args}
    return testing.draw(case(**args), OPS[name], dtype, layout=layout, **how)


def named(run):
    return f"{run[0]}-{str(run[1])[6:]}-{run[2]}-{case(**run[3])}"


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_values(run):
    """Values, strides, the same bits twice; what is saved is the eager form's; float32 thresholds beside half maps."""
    op, args = OPS[run[0]], drawn(*run, parameters=F32 if run[1] in (BF16, F16) else None)
    assert refusal(op, "triton", args) is None
    got = testing.answer(op, args)
    assert_true(op, args, got)
    assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
    assert testing.same_bits(got, testing.answer(op, args))
    want, found = (t if isinstance(t, tuple) else (t,) for t in (op.eager(*args), op.launch(args)))
    for s, t in zip(found, want, strict=True):
        assert (s.dtype, s.shape, s.stride()) == (t.dtype, t.shape, t.stride())
        torch.testing.assert_close(s, t)


def test_moments_far_from_zero():
    """A mean of 1000 standard deviations, in one program and in several."""
    for shape in ((1, 4, 13, 16), (1, 1, 4099)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000
        with use_backend("eager"):
            want = ops.map_scale(torch.ones_like(z).double(), z.double(), "positions", 0.0)
        for layout in ("contiguous", "channels_last"):
            y = ops.map_scale(*(testing.arrange(t, layout) for t in (torch.ones_like(z), z)), "positions", 0.0)
            assert float((y.double() - want).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_finite(layout):
    """NaN and ±inf go where the eager form puts them; a column of zeros has a gradient."""
    for name, more in (
        ("soft_threshold", dict(tau=(2, 8))),
        *(("map_scale", dict(norm=n, eps=1e-5)) for n in ("none", "channels", "positions")),
    ):
        args = drawn(name, F32, layout, dict(x=(2, 8, 3, 3), **more))
        args[0][0, 0, 1, 1], args[0][0, 1, 0, 0], args[0][1, 2, 2, 2] = float("nan"), float("inf"), float("-inf")
        if name == "map_scale":
            args[1][1, :, 1, 1], args[1][1, 3, 0, 2] = 0, float("inf")
        got = testing.answer(OPS[name], args)
        with use_backend("eager"):
            want = testing.answer(OPS[name], args)
        for a, b in zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("pool", ["mean_abs", "mean"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_ends(pool, layout):
    weight = torch.randn(8, 8, dtype=F64, requires_grad=True)
    x, residual = (testing.arrange(torch.randn(2, 8, 3, 5, dtype=F64), layout).requires_grad_() for _ in range(2))
    excite = lambda m, w: torch.sigmoid(m @ w) * m.abs()

    def truth(x, weight, residual):
        m = (x.abs() if pool == "mean_abs" else x).mean((2, 3))
        return x.sign() * torch.relu(x.abs() - excite(m, weight)[..., None, None]) + residual

    y = ops.pool_soft_threshold(x, excite, weight, pool=pool, residual=residual)
    want = truth(x, weight, residual)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, true in zip(*(torch.autograd.grad(o, (x, weight, residual), dy) for o in (y, want)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("name", ["soft_threshold", "map_scale"])
def test_empty_batch(name):
    args = drawn(
        name, F32, "contiguous", dict(x=(0, 8, 3, 3), **(dict(tau=(0, 8)) if name == "soft_threshold" else {}))
    )
    assert_true(OPS[name], args, testing.answer(OPS[name], args))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_soft_threshold_budget(launches, residual, kind):  # noqa: F811
    shape = SHAPES[kind]
    run("soft_threshold", case(x=shape, tau=shape[:2], residual=shape if residual else None), kind)
    within_budget(launches, "soft_threshold", "soft_threshold_bwd")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("norm", ["none", "channels", "positions"])
def test_map_scale_budget(launches, norm, kind):  # noqa: F811
    n, c, *s = SHAPES[kind]
    shape = (n, max(c, 48), *s) if norm == "channels" else (n, c, *s)  # what is kept is small beside many channels
    run("map_scale", case(x=shape, z=shape, norm=norm), kind)
    if norm == "channels" and kind != "pixels":
        # Tiles have four rows, and each reads the norms and the sums of its positions: half a map, from the L2 cache.
        name, reads, writes, budget = launches[1]
        launches[1] = name, reads - 0.5, writes, budget
    within_budget(launches, "map_scale", "map_scale_bwd")


def test_halves_budget(launches):  # noqa: F811
    x = torch.randn(SHAPES["planes"], requires_grad=True)
    ops.pool_soft_threshold(x, torch.sigmoid).sum().backward()
    within_budget(launches, "channel_pool", "soft_threshold", "pool_soft_threshold_reduce", "pool_soft_threshold_apply")
