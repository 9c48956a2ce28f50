"""Moments, affine maps and what owns both, in Triton's interpreter: values, budgets, splits, specials."""

import pytest
import torch
from test_kernels import assert_true
from test_passes import SHAPES, launches, run, within_budget  # noqa: F401  (the fixture)
from test_tail_ops import batch_norm, excited, gated, maps, parameters, tail

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.backend import refusal
from fused_attn.registry import case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
RUNS = [
    ("channel_moments", BF16, "contiguous", dict(x=(2, 8, 7, 7), extrema=True)),
    ("channel_moments", F32, "sliced", dict(x=(2, 4, 7, 7))),
    ("channel_moments", F64, "contiguous", dict(x=(2, 3, 11), extrema=True)),
    ("channel_moments", F16, "channels_last", dict(x=(2, 16, 3, 5), extrema=True)),
    ("channel_moments", F32, "sliced_channels_last", dict(x=(2, 5, 3, 3), extrema=True)),
    ("channel_moments", F32, "channels_last", dict(x=(1, 3, 1400), extrema=True)),
    ("channel_moments", F32, "contiguous", dict(x=(1, 1, 4099), extrema=True)),
    ("channel_moments", F64, "contiguous", dict(x=(1, 2, 1400))),
    ("channel_moments", F32, "contiguous", dict(x=(1, 33, 1, 1), extrema=True)),
    ("batch_affine", F32, "contiguous", dict(moments=(2, 4, 133), weight=(133,), bias=(133,), size=49, eps=1e-5)),
    ("batch_affine", F64, "contiguous", dict(moments=(2, 3, 5), size=49, eps=0.5)),
    (
        "batch_affine",
        F32,
        "contiguous",
        dict(moments=(2, 19, 5), weight=(5,), bias=(5,), size=4, eps=1e-5),
    ),  # two tiles of samples
    ("affine_apply", BF16, "contiguous", dict(x=(2, 8, 7, 7), residual=(2, 8, 7, 7), centre=(2, 8), act="relu")),
    ("affine_apply", F32, "sliced", dict(x=(2, 4, 7, 7), residual=(2, 4, 7, 7), act="silu")),
    ("affine_apply", F64, "contiguous", dict(x=(2, 3, 11), gate=(2, 3), centre=(2, 3), act="gelu")),
    ("affine_apply", F16, "channels_last", dict(x=(2, 16, 3, 3), gate=(2, 16), act="hardswish")),
    ("affine_apply", F32, "sliced_channels_last", dict(x=(2, 5, 3, 3), residual=(2, 5, 3, 3), centre=(2, 5))),
    ("affine_apply", F32, "channels_last", dict(x=(1, 3, 1400), gate=(1, 3), act="silu")),
    ("affine_apply", F32, "contiguous", dict(x=(1, 1, 4099), centre=(1, 1), act="leaky_relu", slope=0.2)),
    ("affine_apply", F64, "contiguous", dict(x=(1, 33, 1, 1), residual=(1, 33, 1, 1), act="relu6")),
    ("affine_apply", F32, "contiguous", dict(x=(2, 8, 7, 7))),
]


def drawn(name, dtype, layout, args, **how):
    if name == "affine_apply":
        args = {**dict.fromkeys(("scale", "shift"), args["x"][:2]), **args}
    return testing.draw(case(**args), OPS[name], dtype, layout=layout, **how)


def named(run):
    return f"{run[0]}-{str(run[1])[6:]}-{run[2]}-{case(**run[3])}"


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_values(run):
    """Values, strides, the same bits twice; what is saved is the eager form's; float32 values beside half maps."""
    op, args = OPS[run[0]], drawn(*run, parameters=F32 if run[1] in (BF16, F16) else None)
    assert refusal(op, "triton", args) is None
    got = testing.answer(op, args)
    assert_true(op, args, got)
    assert got.grads[0].stride() == torch.empty_like(args[0]).stride()
    assert testing.same_bits(got, testing.answer(op, args))
    want, found = (t if isinstance(t, tuple) else (t,) for t in (op.eager(*args), op.launch(args)))
    for s, t in zip(found, want, strict=True):
        assert (s.dtype, s.shape, s.stride()) == (t.dtype, t.shape, t.stride())
        torch.testing.assert_close(s, t)


def halves(c, layout, dtype, act, s=(3, 5)):
    """Arguments of the ops that have no gradient of their own, half of them where a channel's last element is."""
    draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x, dy, aux = (testing.arrange(draw(2, c, *s, seed=i).to(dtype), layout) for i in range(3))
    small = F64 if dtype == F64 else F32
    return x, dy, aux, [draw(2, c, seed=3 + i).to(small) for i in range(7)]


@pytest.mark.parametrize("layout", ["contiguous", "sliced_channels_last"])
@pytest.mark.parametrize(
    ("dtype", "c", "s", "act"),
    [
        (F32, 4, (3, 5), "silu"),
        (BF16, 8, (7, 7), "relu"),
        (F64, 5, (3,), "hardswish"),
        (F32, 2, (1300,), "identity"),
    ],
    ids=str,
)
def test_halves(act, dtype, c, s, layout):
    """Every half against its eager form in float64, with and without what is optional."""
    x, dy, aux, (scale, shift, centre, gate, spread, tilt, level) = halves(c, layout, dtype, act, s)
    index = torch.randint(0, x[0, 0].numel(), (2, 2, c), generator=torch.Generator().manual_seed(0))
    index[1, 0, :2] = index[0, 0, :2]  # both at one place
    reduce_only = x[0, 0].numel() > 1000  # which is there to split sums among programs
    dvalues, last = torch.stack([gate, spread]), (act, 0.1)
    calls = [
        ("affine_pool", (x, scale, shift, centre, *last)),
        ("affine_pool", (x, scale, shift, None, *last)),
        ("affine_pool_scale_reduce", (x, dy, scale, shift, centre, *last)),
        ("moments_affine_reduce", (x, dy, scale, shift, None, None, *last, False)),
        ("moments_affine_reduce", (x, dy, scale, shift, centre, None if act == "identity" else aux, *last, True)),
        ("affine_apply_bwd", (x, dy, scale, shift, centre, None, gate, *last, False)),
        ("moments_affine_apply", (x, dy, scale, shift, centre, gate, spread, tilt, level, None, None, *last)),
        ("moments_affine_apply", (x, dy, scale, shift, centre, None, None, tilt, level, dvalues, index, *last)),
        ("moments_affine_apply", (x, None, None, None, None, None, None, None, level, dvalues, index, "identity", 0.0)),
    ]
    for name, args in calls[: 6 if reduce_only else None]:
        op = OPS[name]
        found, want = op.launch(args), op.eager(*testing.double(args))
        same = op.launch(args)
        for g, w, again in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, want, same)), strict=True):
            assert g.shape == w.shape
            assert torch.equal(g, again)
            if w.numel():
                bound = testing.tolerance(g.dtype, x[0, 0].numel())
                assert testing.error(g, w) <= bound, name
                assert g.shape != x.shape or g.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 4, 13, 16), (1, 1, 4099)], ids=str)
def test_far_from_zero(shape, layout):
    """Mean 1e3, deviation 1e-2, in one program and in several; a plane that begins somewhere else altogether."""
    (x,) = maps(shape, F32, "contiguous", 1, 1e-2, 1e3)
    x = testing.arrange(x.detach(), layout)
    begins = x.clone()
    begins[..., :2] = 0
    for t in (x, begins, torch.full_like(x, 1e3 + 1 / 3)):
        mean, m2 = ops.channel_moments(t)
        wide = t.double().flatten(2)
        var = wide.var(-1, correction=0)
        assert ((m2.double() / wide.shape[-1] - var).abs() <= 1e-3 * var + 1e-7).all()
        assert ((mean.double() - wide.mean(-1)).abs() <= 1e-7 * 1e3).all()
    for dtype in (BF16, F16):
        half = testing.arrange((x.double() * 3).to(dtype) if dtype == BF16 else x.double().mul(0.2).to(dtype), layout)
        half.flatten()[3] += 1
        mean, m2 = ops.channel_moments(half)
        wide = half.double().flatten(2)
        assert testing.error(mean, wide.mean(-1)) < 1e-6
        assert testing.error(m2, (wide - wide.mean(-1, keepdim=True)).square().sum(-1)) < 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_extrema(layout):
    """The first of equals, of NaN, of infinities, on either side of a split."""
    x = testing.arrange(torch.randn(1, 8, 7, 7).clamp(-1, 1).round(), layout)
    x[0, 1], x[0, 2, 3, 3], x[0, 2, 5, 5], x[0, 3, 2, 2] = float("-inf"), float("nan"), float("nan"), float("inf")
    x[0, 4] = float("inf")
    long = torch.zeros(1, 3, 5000)
    long[0, 0, [1700, 4100]], long[0, 1, [1300, 4999]], long[0, 2, [1, 4998]] = 1, float("nan"), -1
    for t in (x, testing.arrange(long, layout)):
        moments, index = ops.channel_moments(t, True)
        with use_backend("eager"):
            want, places = ops.channel_moments(t, True)
        assert torch.equal(index, places)
        torch.testing.assert_close(moments[2:], want[2:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 8, 7, 7), (1, 8, 1500)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_finite(layout, shape):
    """NaN and ±inf go where the eager form puts them, and into no other channel."""
    x = testing.arrange(torch.randn(shape), layout)
    at = lambda c, i, value: x[0, c].view(-1).__setitem__(i, value) if layout == "contiguous" else set_(c, i, value)

    def set_(c, i, value):
        x.movedim(1, -1).view(1, -1, 8)[0, i, c] = value

    last = x[0, 0].numel() - 1
    at(0, 1, float("nan")), at(1, 0, float("inf")), at(2, last, float("-inf")), at(3, last, float("nan"))
    at(4, 0, float("inf")), at(4, last, float("-inf")), at(5, last, 3e38)
    ones = torch.rand(1, 8) + 0.5
    calls = [("channel_moments", (x, True)), ("affine_apply", (x, ones, ones, ones, None, None, "relu", 0.0))]
    for name, args in calls:
        got = testing.answer(OPS[name], args)
        with use_backend("eager"):
            want = testing.answer(OPS[name], args)
        for a, b in zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)
    dy, op = torch.randn_like(x), OPS["affine_pool_scale_reduce"]
    for act in ("relu", "silu"):
        args = x, dy, ones, ones, None, act, 0.0
        torch.testing.assert_close(op.launch(args), op.eager(*args), equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_overflow(layout):
    """Where they do, and the sum doesn't, m2 is infinite and the mean is right, wherever the large number stands."""
    x = testing.arrange(torch.randn(1, 8, 7, 7), layout)
    x[0, 0, 0, 0] = x[0, 1, 6, 6] = 3e38
    mean, m2 = ops.channel_moments(x)
    assert testing.error(mean, x.double().flatten(2).mean(-1)) < 1e-6
    assert torch.equal(m2.isinf(), torch.arange(8).view(1, 8) < 2)
    assert not m2.isnan().any()


@pytest.mark.parametrize("name", ["channel_moments", "affine_apply"])
def test_empty_batch(name):
    args = drawn(name, F32, "contiguous", dict(x=(0, 8, 3, 3)))
    assert_true(OPS[name], args, testing.answer(OPS[name], args))


def test_empty_halves():
    x, gate = torch.empty(0, 8, 3, 3), torch.empty(0, 8)
    for name, args in (
        ("affine_pool", (x, gate, gate, None, "relu", 0.0)),
        ("affine_pool_scale_reduce", (x, x, gate, gate, None, "relu", 0.0)),
        ("moments_affine_reduce", (x, x, gate, gate, None, x, "relu", 0.0, True)),
        ("moments_affine_apply", (x, x, gate, gate, None, gate, gate, gate, gate, None, None, "relu", 0.0)),
    ):
        found, want = OPS[name].launch(args), OPS[name].eager(*args)
        for g, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, want)), strict=True):
            assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())


def norm(size):
    """BatchNorm as `affine_pool_scale` takes it."""

    def normed(moments, weight, bias):
        a, z, _ = batch_norm(*moments, weight, bias, size)
        return torch.stack([a.expand_as(z), z])

    return normed


def gate(p, w1, w2):
    return torch.sigmoid(torch.relu(p @ w1.t()) @ w2.t())


def assert_near(got, want, within=1e-4):
    for mine, theirs in zip(got, want, strict=True):
        assert testing.error(mine, theirs) < within


@pytest.mark.parametrize(
    ("largest", "act", "with_residual"),
    [
        (False, "relu", True),
        (True, "relu6", True),
        (True, "silu", False),
        (False, "silu", True),
        (False, "identity", True),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_affine(layout, largest, act, with_residual):
    """BatchNorm, gate, residual and activation against autograd through torch's BatchNorm in float64."""
    x, residual = maps((2, 8, 7, 7), F64, layout)
    weights = parameters(8)
    leaves = [x, residual, *weights] if with_residual else [x, *weights]
    want = tail(x, residual if with_residual else None, act, *weights, largest)
    dy = torch.randn_like(want)
    true = torch.autograd.grad(want, leaves, dy)
    for dtype, within in ((F64, 1e-9), (F32, 1e-4), (BF16, 0.1)):
        small = dtype if dtype == F64 else F32
        own = [t.detach().to(dtype if t.dim() == 4 else small).requires_grad_() for t in leaves]
        mine = own[2 if with_residual else 1 :]
        y, _ = ops.moments_affine(
            own[0], excited(49, largest), *mine, descriptor="extrema" if largest else "moments",
            residual=own[1] if with_residual else None, act=act,
        )  # fmt: skip
        assert testing.error(y, want) < within
        if dtype != BF16:  # the mask of a half-precision relu is read off rounded numbers
            assert_near(torch.autograd.grad(y, own, dy.to(dtype)), true, within)


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_affine_pool_scale(layout, act):
    (x,) = maps((2, 8, 7, 7), F64, layout, 1)
    weights = parameters(8)
    want = gated(x, act, *weights)
    dy = torch.randn_like(want)
    true = torch.autograd.grad(want, [x, *weights], dy)
    for dtype, within in ((F64, 1e-9), (F32, 1e-4), (BF16, 0.1)):
        small = dtype if dtype == F64 else F32
        own = [t.detach().to(dtype if t.dim() == 4 else small).requires_grad_() for t in (x, *weights)]
        y = ops.affine_pool_scale(own[0], norm(49), gate, own[1:3], own[3:], act=act)
        assert testing.error(y, want) < within
        if dtype != BF16:
            assert_near(torch.autograd.grad(y, own, dy.to(dtype)), true, within)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("channel_moments", dict(x=(1, 2, 5), extrema=True)),
        ("affine_apply", dict(x=(1, 2, 5), centre=(1, 2), residual=(1, 2, 5), act="silu")),
        ("affine_apply", dict(x=(1, 2, 5), gate=(1, 2), act="hardswish")),
    ],
)
def test_gradcheck(name, args):
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in drawn(name, F64, "contiguous", args)]
    only = (lambda *a: OPS[name](*a)[0]) if name == "channel_moments" else OPS[name]
    assert torch.autograd.gradcheck(only, leaves, fast_mode=True)


def test_gradcheck_of_composites():
    x, residual = maps((2, 2, 3), F64, "contiguous")
    w = [p.detach() for p in parameters(2)]
    whole = lambda x, r: ops.moments_affine(x, excited(3, True), *w, descriptor="extrema", residual=r, act="silu")[0]
    assert torch.autograd.gradcheck(whole, (x, residual), fast_mode=True)
    whole = lambda x: ops.affine_pool_scale(x, norm(3), gate, w[:2], w[2:], act="silu")
    assert torch.autograd.gradcheck(whole, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("extrema", [False, True])
def test_channel_moments_budget(launches, extrema, kind):  # noqa: F811
    run("channel_moments", case(x=SHAPES[kind], extrema=extrema), kind)
    within_budget(launches, "channel_moments", "moments_affine_apply")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "how", [{}, dict(residual=True, act="relu"), dict(residual=True, act="silu"), dict(gate=True, act="silu")], ids=str
)
def test_affine_apply_budget(launches, how, kind):  # noqa: F811
    shape, small = SHAPES[kind], SHAPES[kind][:2]
    more = {k: (shape if k == "residual" else small) if v is True else v for k, v in how.items()}
    run("affine_apply", case(x=shape, scale=small, shift=small, centre=small, **more), kind)
    within_budget(launches, "affine_apply", "affine_apply_bwd")


def total(launches):  # noqa: F811
    """The budgets of some launches together: reads and writes."""
    return tuple(sum(budget[i] for *_, budget in launches) for i in (0, 1))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_moments_affine_budget(launches, with_residual, kind):  # noqa: F811
    """3R+1W forward and 5R+2W backward with a residual, as without attention; 2R+1W and 4R+1W without."""
    x, residual = maps(SHAPES[kind], F32, "channels_last" if kind == "pixels" else "contiguous")
    y, _ = ops.moments_affine(
        x, excited(x[0, 0].numel()), *parameters(x.shape[1], F32), residual=residual if with_residual else None,
        act="relu",
    )  # fmt: skip
    torch.autograd.grad(y, [x, residual] if with_residual else [x], torch.randn_like(y))
    within_budget(launches, "channel_moments", "affine_apply", "moments_affine_reduce", "moments_affine_apply")
    assert total(launches[:2]) == ((3, 1) if with_residual else (2, 1))
    assert total(launches[2:]) == ((5, 2) if with_residual else (4, 1))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_affine_pool_scale_budget(launches, training, kind):  # noqa: F811
    """3R+1W forward, 2R+1W with statistics that are kept; 4R+1W backward, 4R+1W there as well."""
    (x,) = maps(SHAPES[kind], F32, "channels_last" if kind == "pixels" else "contiguous", 1)
    weights = parameters(x.shape[1], F32)
    given = lambda w, b: torch.stack([w, b]).unsqueeze(1)
    y = ops.affine_pool_scale(
        x, norm(x[0, 0].numel()) if training else given, gate, weights[:2], weights[2:], moments=training, act="silu"
    )
    torch.autograd.grad(y, x, torch.randn_like(y))
    first = ["channel_moments"] * training + ["affine_pool", "affine_apply"]
    within_budget(launches, *first, "affine_pool_scale_reduce", "moments_affine_apply")
    assert total(launches[: len(first)]) == ((3, 1) if training else (2, 1))
    assert total(launches[len(first) :]) == (4, 1)
