"""Triton's kernels in its interpreter against the ops' formulas in float64, forward and backward.

A kernel costs a third of a second here, so shapes are tiny, and each stands for something: rows that no vector fits,
rows that share vectors, sums that are split among programs, tiles with one more row or column than fits.
"""

import pytest
import torch
import triton
import triton.language as tl

from fused_attn import OPS, ops, testing, tile, use_backend
from fused_attn.backend import refusal
from fused_attn.ops import activations
from fused_attn.registry import case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SE = dict(w1=(3, 8), b1=(3,), w2=(8, 3), b2=(8,))
NORM = dict(norm_weight=(3,), norm_bias=(3,))
SA = dict.fromkeys(("cweight", "cbias", "sweight", "sbias", "norm_weight", "norm_bias"), (2,))

# (op, dtype, layout, arguments)
RUNS = [
    # planes whose rows share vectors (C·S is a multiple of 8, S is not), whole, and cut out of larger maps
    ("channel_pool", BF16, "contiguous", dict(x=(2, 8, 7, 7))),
    ("channel_pool", F32, "sliced", dict(x=(2, 4, 7, 7), pool="mean_max")),
    ("channel_pool", F64, "contiguous", dict(x=(2, 2, 5, 5), pool="mean_abs")),
    # no vectors: C·S odd; S < a vector; S = 1, walked as pixels; one element
    ("channel_pool", F16, "contiguous", dict(x=(2, 3, 13), pool="max")),
    ("channel_pool", BF16, "contiguous", dict(x=(1, 5, 2, 1, 2), pool="mean_max", ties="first")),
    ("channel_pool", F32, "contiguous", dict(x=(2, 9, 1, 1), pool="mean_max", ties="first", return_index=True)),
    ("channel_pool", F64, "contiguous", dict(x=(1, 1, 1), pool="mean_abs")),
    # pixels; tile + 1 in both directions; few programs: the sum is split, and merged
    ("channel_pool", BF16, "channels_last", dict(x=(2, 16, 3, 5), pool="mean_max", ties="first", return_index=True)),
    ("channel_pool", F32, "channels_last", dict(x=(1, 65, 1, 17), pool="max")),
    ("channel_pool", F32, "sliced_channels_last", dict(x=(2, 5, 3, 3), pool="mean_abs")),
    ("channel_pool", F32, "contiguous", dict(x=(1, 1, 4099), pool="mean_max", ties="first", return_index=True)),
    ("channel_pool", F32, "channels_last", dict(x=(1, 3, 1400), pool="mean_max")),
    ("channel_pool", F32, "contiguous", dict(x=(2, 9, 7, 7), pool="mean_var")),
    ("channel_pool", BF16, "sliced_channels_last", dict(x=(2, 33, 3, 5), pool="mean_var")),
    ("channel_pool", F64, "contiguous", dict(x=(1, 2, 1400), pool="mean_var")),
    ("plane_gate_shuffle", F32, "contiguous", dict(x=(2, 12, 7, 7), **SA)),
    ("plane_gate_shuffle", F64, "channels_last", dict(x=(2, 8, 3, 5), **SA, residual=(2, 8, 3, 5), act="relu")),
    ("plane_gate_shuffle", BF16, "sliced", dict(x=(1, 4, 1100), **SA, residual=(1, 4, 1100))),
    ("plane_gate_shuffle", F32, "sliced_channels_last", dict(x=(2, 4, 5, 3), **SA, act="silu")),
    ("plane_gate_shuffle", F16, "contiguous", dict(x=(2, 8, 3, 3), **{k: v for k, v in SA.items() if "norm" not in k},
                                                   residual=(2, 8, 3, 3), act="gelu")),
    ("group_similarity_scale", F32, "contiguous", dict(x=(2, 12, 7, 7), weight=(4,), bias=(4,))),
    ("group_similarity_scale", F64, "channels_last", dict(x=(2, 10, 3, 5), weight=(2,), bias=(2,),
                                                          residual=(2, 10, 3, 5), act="relu")),
    ("group_similarity_scale", BF16, "sliced", dict(x=(1, 4, 2100), weight=(4,), bias=(4,), residual=(1, 4, 2100))),
    ("group_similarity_scale", F32, "sliced_channels_last", dict(x=(2, 6, 5, 3), weight=(1,), bias=(1,), act="silu")),
    ("group_similarity_scale", F16, "contiguous", dict(x=(2, 8, 3, 3), weight=(2,), bias=(2,),
                                                       residual=(2, 8, 3, 3), act="gelu")),
    ("pool_conv_scale", F32, "contiguous", dict(x=(2, 9, 3, 3), weight=(1, 1, 5))),
    ("pool_conv_scale", F64, "channels_last", dict(x=(2, 5, 3, 3), weight=(1, 1, 5), bias=(1,), circular=True,
                                                   residual=(2, 5, 3, 3), epilogue="relu")),
    ("pool_conv_scale", BF16, "contiguous", dict(x=(1, 140, 3), weight=(1, 3, 3), bias=(1,), w1=(3, 1, 1), b1=(3,),
                                                 act="silu", gate="hard_sigmoid")),
    ("pool_conv_scale", F64, "contiguous", dict(x=(2, 6, 5), weight=(1, 2, 3), w1=(2,), gate="identity",
                                                circular=True, epilogue="silu")),
    ("scale", BF16, "contiguous", dict(x=(2, 8, 7, 7), residual=(2, 8, 7, 7), act="relu")),
    ("scale", F32, "sliced", dict(x=(2, 4, 7, 7), residual=(2, 4, 7, 7), act="silu")),
    ("scale", F64, "contiguous", dict(x=(2, 3, 11), act="gelu")),
    ("scale", F16, "channels_last", dict(x=(2, 16, 3, 3), residual=(2, 16, 3, 3), act="hardswish")),
    ("scale", F32, "sliced_channels_last", dict(x=(2, 5, 3, 3), residual=(2, 5, 3, 3))),
    ("scale", F32, "channels_last", dict(x=(1, 3, 1400), act="leaky_relu", slope=0.2)),
    ("scale", F64, "contiguous", dict(x=(1, 33, 1, 1), residual=(1, 33, 1, 1), act="relu6")),
    ("shared_mlp", F32, "contiguous", dict(pooled=(2, 3, 8), **SE)),
    ("shared_mlp", BF16, "sliced", dict(pooled=(9, 8), **SE, act="gelu", gate="hard_sigmoid")),
    ("shared_mlp", F64, "contiguous", dict(pooled=(2, 2, 7), w1=(7, 7, 1, 1), b1=(7,), gate="clamp")),
    ("shared_mlp", F64, "contiguous", dict(pooled=(3, 8), **SE, act="leaky_relu", slope=0.3, gate="relu")),
    ("shared_mlp", F32, "contiguous", dict(pooled=(3, 8), **SE, act="prelu", act_weight=(3,), gate="prelu",
                                           gate_weight=(1,))),
    ("shared_mlp", F32, "contiguous", dict(pooled=(2, 5, 8), **SE, **NORM, norm="batch", act="silu")),
    ("shared_mlp", F64, "contiguous", dict(pooled=(2, 8), **SE, **NORM, norm="running", norm_mean=(3,), norm_var=(3,))),
    ("pool_mlp_scale", BF16, "contiguous", dict(x=(2, 8, 7, 7), **SE)),
    ("pool_mlp_scale", F32, "sliced", dict(x=(2, 8, 3, 3), **SE, residual=(2, 8, 3, 3), epilogue="relu", act="silu")),
    ("pool_mlp_scale", F16, "channels_last", dict(x=(2, 8, 3, 5), **SE, max_weight=0.5, epilogue="silu")),
    ("pool_mlp_scale", F64, "contiguous", dict(x=(2, 8, 3, 5), **SE, max_weight=0.5, ties="first", act="hardswish")),
    ("pool_mlp_scale", F32, "contiguous", dict(x=(1, 5, 7), w1=(5, 5), gate="hard_sigmoid", max_weight=1.0)),
    ("pool_mlp_scale", F32, "contiguous", dict(x=(3, 8, 2, 2), **SE, **NORM, norm="batch", epilogue="relu6")),
    # branches in tensors of their own and in one, summed and side by side; sums that are split
    ("branch_pool", BF16, "contiguous", dict(x=(2, 8, 7, 7), x1=(2, 8, 7, 7))),
    ("branch_pool", F32, "channels_last", dict(x=(1, 3, 1400), x1=(1, 3, 1400), x2=(1, 3, 1400), each=True)),
    ("branch_pool", F32, "sliced", dict(x=(2, 16, 3, 5), splits=2)),
    ("branch_pool", F64, "contiguous", dict(x=(2, 6, 5), splits=3, each=True)),
    ("branch_scale", BF16, "contiguous", dict(x=(2, 8, 7, 7), gate=(2, 2, 8), x1=(2, 8, 7, 7))),
    ("branch_scale", F32, "sliced", dict(x=(2, 8, 3, 3), gate=(2, 2, 8), x1=(2, 8, 3, 3), merge="concat")),
    ("branch_scale", F16, "channels_last", dict(x=(2, 16, 3, 3), gate=(2, 2, 8))),
    ("branch_scale", F32, "channels_last", dict(x=(2, 8, 3, 3), gate=(2, 2, 8), x1=(2, 8, 3, 3),
                                                merge="concat_reversed")),
    ("branch_scale", F32, "sliced_channels_last", dict(x=(2, 15, 3, 3), gate=(2, 3, 5), merge="concat_reversed")),
    ("branch_scale", F64, "contiguous",
     dict(x=(1, 3, 11), gate=(1, 5, 3), **dict.fromkeys(("x1", "x2", "x3", "x4"), (1, 3, 11)))),
    ("branch_scale", F32, "contiguous", dict(x=(1, 1, 4099), gate=(1, 2, 1), x1=(1, 1, 4099))),
    ("branch_scale", F32, "contiguous", dict(x=(2, 9, 1, 1), gate=(2, 1, 9))),
]  # fmt: skip


def named(run):
    name, dtype, layout, args = run
    return (
        f"{name}-{str(dtype)[6:]}-{layout}-{case(**{k: v for k, v in args.items() if k not in {**SE, **NORM, **SA}})}"
    )


def drawn(name, dtype, layout, args, **how):
    if name == "scale":
        args = {"gate": args["x"][:2], **args}
    return testing.draw(case(**args), OPS[name], dtype, layout=layout, **how)


def assert_true(op, args, got):
    found = testing.deviations(
        got,
        testing.truth(op, args, got),
        testing.plain(op, args, got),
        testing.terms(op, args),
        testing.names(op, args),
    )
    assert all(d.ok for d in found), "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_values(run):
    """Values, dtypes, strides, the same bits twice; parameters in float32 beside half-precision maps."""
    name, dtype, *_ = run
    op = OPS[name]
    args = drawn(*run, parameters=F32 if dtype in (BF16, F16) else None)
    assert refusal(op, "triton", args) is None
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    got = testing.answer(op, args)
    assert_true(op, args, got)
    if "x" in op.maps:
        assert got.grads[0].stride() == torch.empty_like(args[0]).stride()
        assert all(o.stride() == got.grads[0].stride() for o in got.outs if o.shape == args[0].shape)
    assert all(
        testing.identical(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(args, before, strict=True)
    )
    assert testing.same_bits(got, testing.answer(op, args))


@pytest.mark.parametrize("run", RUNS[::2], ids=named)
def test_backends_mix(run):
    """All outputs of forward are the eager form's, in shape, dtype, strides, values; each runs the other's backward."""
    op, args = OPS[run[0]], drawn(*run)
    want, got = (t if isinstance(t, tuple) else (t,) for t in (op.eager(*args), op.launch(args)))
    for s, t in zip(got, want, strict=True):
        assert (s.dtype, s.shape, s.stride()) == (t.dtype, t.shape, t.stride())
        torch.testing.assert_close(s, t)
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    grads = []
    for forward, backward in (("eager", "eager"), ("eager", "triton"), ("triton", "eager")):
        with use_backend(forward):
            out = op(*leaves)
        y = out[0] if isinstance(out, tuple) else out
        y.grad_fn.backend = backward
        wanted = [a for a in leaves if isinstance(a, torch.Tensor)]
        grads.append(torch.autograd.grad(y, wanted, testing.cotangent(y), allow_unused=True))
    for mixed in grads[1:]:
        for s, t in zip(mixed, grads[0], strict=True):
            if t.dtype in (torch.float16, torch.bfloat16):
                # A backend that writes the epilogue's gradient rounds it in between; where gradients cancel, that shows
                # by the resolution of what cancels. How far each is from the truth, other tests say.
                fine = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2}[t.dtype]  # as without this branch
                torch.testing.assert_close(s, t, rtol=fine, atol=torch.finfo(t.dtype).eps * float(t.abs().max()))
            else:
                torch.testing.assert_close(s, t)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", ["split", "first"])
def test_ties(ties, layout):
    for name, more in (("channel_pool", dict(pool="mean_max")), ("pool_mlp_scale", dict(**SE, max_weight=0.5))):
        args = drawn(name, F32, layout, dict(x=(2, 8, 3, 5), ties=ties, **more), ties=True)
        assert_true(OPS[name], args, testing.answer(OPS[name], args))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_index(layout):
    """int64, of the first maximum, of the first NaN, of −inf among −inf, on either side of a split."""
    x = testing.arrange(torch.randn(1, 8, 7, 7).clamp(-1, 1).round(), layout)
    x[0, 1], x[0, 2, 3, 3], x[0, 2, 5, 5], x[0, 3, 2, 2] = float("-inf"), float("nan"), float("nan"), float("inf")
    long = torch.zeros(1, 2, 5000)
    long[0, 0, [1700, 4100]], long[0, 1, [1300, 4999]] = 1, float("nan")
    for t in (x, long, testing.arrange(long, layout)):
        value, index = ops.channel_pool(t, "max", "first", True)
        want = t.flatten(2).max(-1)
        assert index.dtype == torch.int64
        assert torch.equal(index, want.indices)
        assert testing.identical(value, want.values)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_finite(layout):
    """NaN and ±inf go where the eager form puts them, and into no other channel."""
    for act in ("identity", "silu", "relu"):
        args = drawn("pool_mlp_scale", F32, layout, dict(x=(3, 8, 3, 3), **SE, residual=(3, 8, 3, 3), epilogue=act))
        args[0][0, 0, 1, 1], args[0][1, 1, 0, 0], args[11][2, 3, 2, 2] = float("nan"), float("inf"), float("-inf")
        got = testing.answer(OPS["pool_mlp_scale"], args)
        with use_backend("eager"):
            want = testing.answer(OPS["pool_mlp_scale"], args)
        for a, b in zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    x = testing.arrange(torch.randn(1, 8, 7, 7), layout)
    x[0, 2, 3, 3], x[0, 4, 0, 0] = float("nan"), float("inf")
    for pool in ("mean_max", "mean_abs"):
        got = testing.answer(ops.channel_pool, (x, pool))
        with use_backend("eager"):
            want = testing.answer(ops.channel_pool, (x, pool))
        for a, b in zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", ["channel_pool", "scale", "shared_mlp", "pool_mlp_scale"])
def test_empty_batch(name):
    args = {"shared_mlp": dict(pooled=(0, 8), **SE), "pool_mlp_scale": dict(x=(0, 8, 3, 3), **SE)}
    args = drawn(name, F32, "contiguous", args.get(name, dict(x=(0, 8, 3, 3))))
    got = testing.answer(OPS[name], args)
    assert_true(OPS[name], args, got)


@triton.jit
def _table_kernel(v_ptr, value_ptr, slope_ptr, ACT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    v = tl.load(v_ptr + at)
    tl.store(value_ptr + at, tile.activate(v, ACT, 0.2, None))
    tl.store(slope_ptr + at, tile.derivative(v, ACT, 0.2, None))


@pytest.mark.parametrize("act", activations.TABLE)
def test_activations(act):
    """tile.py's table is ops/activations.py's, value and derivative, kinks, infinities and NaN included."""
    special = torch.tensor([-3, 0, 1, 3, 6, float("inf"), float("-inf"), float("nan")], dtype=F64)
    v = torch.cat([torch.linspace(-9, 9, 56, dtype=F64), special])
    value, slope = torch.empty_like(v), torch.empty_like(v)
    _table_kernel[(1,)](v, value, slope, ACT=act, SIZE=64)
    torch.testing.assert_close(value, activations.apply(act, v, 0.2), rtol=1e-14, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(slope, activations.grad(act, v, 0.2), rtol=1e-14, atol=1e-14, equal_nan=True)


def test_pool_scale():
    """Any excite between the halves."""
    weight = torch.randn(8, 8, dtype=F64, requires_grad=True)
    x, residual = (torch.randn(2, 8, 3, 5, dtype=F64, requires_grad=True) for _ in range(2))
    excite = lambda p, w: torch.sigmoid(p.sum(0) @ w)

    def truth(x, weight, residual):
        p = torch.stack([x.mean((2, 3)), x.amax((2, 3))])
        return torch.relu(x * excite(p, weight)[..., None, None] + residual)

    y = ops.pool_scale(x, excite, weight, pool="mean_max", residual=residual, act="relu")
    want = truth(x, weight, residual)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, true in zip(*(torch.autograd.grad(o, (x, weight, residual), dy) for o in (y, want)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize(("merge", "each"), [("sum", False), ("concat_reversed", True)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_branch_softmax(layout, merge, each):
    """Any excite between the halves."""
    weight = torch.randn(8, 8 if each else 16, dtype=F64, requires_grad=True)
    maps = [testing.arrange(torch.randn(2, 8, 3, 5, dtype=F64), layout).requires_grad_() for _ in range(2)]
    excite = lambda p, w: p @ w

    def truth(a, b, weight):
        means = torch.stack([a.mean((2, 3)), b.mean((2, 3))], 1)
        gate = ((means if each else means.sum(1)) @ weight).view(2, 2, 8).softmax(1)[..., None, None]
        scaled = torch.stack([a, b], 1) * gate
        return scaled.sum(1) if merge == "sum" else scaled.flip(1).flatten(1, 2)

    y = ops.branch_softmax(*maps, excite=excite, params=(weight,), each=each, merge=merge)
    want = truth(*maps, weight)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, true in zip(*(torch.autograd.grad(o, (*maps, weight), dy) for o in (y, want)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("channel_pool", dict(x=(1, 2, 5), pool="mean_max")),
        ("scale", dict(x=(1, 2, 5), residual=(1, 2, 5), act="silu")),
        ("shared_mlp", dict(pooled=(2, 4), w1=(2, 4), w2=(4, 2), act="gelu")),
        ("pool_mlp_scale", dict(x=(1, 4, 3), w1=(2, 4), w2=(4, 2), act="silu", max_weight=0.5)),
    ],
)
def test_gradcheck(name, args):
    op = OPS[name]
    args = drawn(name, F64, "contiguous", args)
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
