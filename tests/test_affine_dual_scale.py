"""affine_dual_scale on every backend that runs here: a BatchNorm and the two gates behind it, against PyTorch's norm
and formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.ops.channel_pool import channel_pool
from fused_attn.ops.scale import scale
from fused_attn.ops.spatial_pool import spatial_pool

EPS = 1e-5
PASSES = ("affine_spatial_pool", "affine_pixel_scale", "dual_scale_reduce", "dual_scale_gate", "dual_scale_apply")
BACKENDS = [b for b in testing.candidates("cpu") if all(testing.missing(OPS[n], b) is None for n in PASSES)]
F32, F64 = torch.float32, torch.float64


def draw(*shape, seed=0, rounded=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x.round().clamp(-2, 2) if rounded else x


def channel(p, w):
    p = p.sum(0) if p.dim() == 3 else p
    return torch.sigmoid(p.to(w.dtype) @ w).to(p.dtype)


def planar(q, k):
    return torch.sigmoid((q.to(k.dtype) * k[: q.shape[1]].view(1, -1, *(1,) * (q.dim() - 2))).sum(1))


def batch(size):
    """BatchNorm by the batch's statistics, from the moments of the planes."""

    def norm(moments, weight, bias):
        mean, m2 = moments
        mu = mean.mean(0)
        var = (m2.sum(0) / size + (mean - mu).square().sum(0)) / mean.shape[0]
        a = weight * (var + EPS).rsqrt()
        return torch.stack([a.expand_as(mean), a * (mean - mu) + bias]), torch.stack([mu, var])

    return norm


def standing(mean, weight, bias, running_mean, running_var):
    """BatchNorm by statistics that are kept, from the means of the planes."""
    a = weight * (running_var + EPS).rsqrt()
    return torch.stack([a.expand_as(mean), a * (mean - running_mean) + bias])


def formula(x, weight, bias, w, k, r, pools, ties, act, running=None):
    """What the op computes, by PyTorch's norm and formulas."""
    u = F.batch_norm(x, *(running or (None, None)), weight, bias, running is None, 0.0, EPS)
    gate = channel(channel_pool.formula(u, pools[0], ties, False), w)
    pixel = planar(spatial_pool.formula(u, gate, pools[1], ties, False), k)
    return scale.formula(u, gate, r, pixel, act)


def fused(x, weight, bias, w, k, r, pools, ties, act, running=None):
    size = x[0, 0].numel() if x.numel() else 1
    own, params = (batch(size), ()) if running is None else (standing, tuple(t.to(weight.dtype) for t in running))
    out = ops.affine_dual_scale(
        x, own, channel, planar, (weight, bias, *params), (w,), (k,), moments=running is None,
        channel=pools[0], pool=pools[1], ties=ties, residual=r, act=act,
    )  # fmt: skip
    return out[0] if running is None else out


def arguments(shape, dtype, layout, residual, weight=None, rounded=False):
    c, small = shape[1], F64 if dtype == F64 else F32
    x = draw(*shape, rounded=rounded)
    weight = draw(c, seed=4) if weight is None else weight  # of either sign
    small_ones = weight, draw(c, seed=5), draw(c, c, seed=1) / c**0.5, 2 * draw(2, seed=2)
    lay = lambda t: testing.arrange(t.to(dtype), layout)
    return lay(x), *(t.to(small) for t in small_ones), lay(draw(*shape, seed=3)) if residual else None


POOLS = [("mean_max", "mean_max"), ("mean", "mean"), ("max", "max"), ("mean", "mean_max"), ("mean_max", "mean")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("ties", ["split", "first"])
@pytest.mark.parametrize("pools", POOLS, ids=str)
def test_equations(backend, pools, ties, residual, act):
    """Layouts and dtypes: outputs and every gradient, and their strides."""
    cases = [((2, 37, 5, 7), F32, layout) for layout in testing.WALKABLE] + [
        ((2, 6, 13), F64, "contiguous"),
        ((3, 18, 4, 4), F64, "channels_last"),
        ((3, 18, 4, 4), torch.bfloat16, "channels_last"),
        ((2, 9, 3, 2, 4), torch.float16, "contiguous"),
    ]
    for shape, dtype, layout in cases:
        args = arguments(shape, dtype, layout, residual)
        one = lambda *args: fused(*args, pools, ties, act)
        other = lambda *args: formula(*args, pools, ties, act)
        with use_backend(backend):
            got = testing.answer(one, args, gradient=layout)
        assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
        true = testing.answer(other, testing.double(args), cotangents=testing.double(got.cotangents))
        # What plain PyTorch loses at this dtype, with a float32 norm as in mixed precision.
        mixed = lambda x, *rest: formula(x.to(rest[0].dtype), *rest, pools, ties, act).to(x.dtype)
        plain = testing.answer(mixed, args, cotangents=got.cotangents)
        names = ["x", "weight", "bias", "w", "k", "residual"][: len(got.grads)]
        found = testing.deviations(got, true, plain, 2 * args[0].numel(), names)  # of sums, in sums
        if residual and act == "silu":  # e is held in x's dtype between the passes: all gradients have its resolution
            found = [d._replace(allowed=max(d.allowed, 2 * torch.finfo(dtype).eps)) for d in found]
        assert all(d.ok for d in found), f"{shape}, {dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ties", ["split", "first"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kept_statistics(backend, layout, ties):
    """In evaluation the norm's gradient stops at its statistics."""
    shape = (2, 21, 5, 6)
    running = draw(21, seed=8), draw(21, seed=9).square() + 0.5
    args = arguments(shape, F32, layout, True)
    how = (POOLS[0], ties, "relu", running)
    with use_backend(backend):
        got = testing.answer(lambda *args: fused(*args, *how), args)
    true = testing.answer(lambda *args: formula(*args, *how), testing.double(args),
                          cotangents=testing.double(got.cotangents))  # fmt: skip
    for name, found, want in zip(("y", "x", "weight", "bias", "w", "k", "residual"), (*got.outs, *got.grads),
                                 (*true.outs, *true.grads), strict=True):  # fmt: skip
        assert testing.error(found, want) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ties", ["split", "first"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties(backend, layout, ties):
    """Equal values in a plane and among channels, and a weight of 0, by which a whole plane is one value: the gradients
    go where PyTorch's norm and pooling send them. In float64, where only values that were equal before are."""
    weight = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0, -0.5], dtype=F64)
    args = list(arguments((3, 6, 4, 4), F64, layout, True, weight, rounded=True))
    args[0][:, 5] = args[0][:, 4]
    args[1][5], args[2][5] = args[1][4], args[2][4]
    args[0][1, 0] = 2.0  # a plane of one value
    args[3][:, 4] = args[3][:, 5]  # and two channels of one gate
    want = formula(*args, POOLS[0], ties, "relu")
    assert (want.flatten(2).unique().numel()) < want.numel() / 2
    how = (POOLS[0], ties, "relu")
    with use_backend(backend):
        got = testing.answer(lambda *args: fused(*args, *how), tuple(args))
    true = testing.answer(lambda *args: by_values(*args, *how), tuple(args), cotangents=got.cotangents)
    for name, found, want in zip(("y", "x", "weight", "bias", "w", "k", "residual"), (*got.outs, *got.grads),
                                 (*true.outs, *true.grads), strict=True):  # fmt: skip
        assert testing.error(found, want) <= 1e-9, name


def by_values(x, weight, bias, w, k, r, pools, ties, act):
    """`formula`, whose maxima are found by x's own values: rounding makes no two of them equal, or different."""
    mu, var = x.transpose(0, 1).flatten(1).mean(1), x.transpose(0, 1).flatten(1).var(1, correction=0)
    over = lambda t: t.view(1, -1, *(1,) * (x.dim() - 2))
    a = weight * (var + EPS).rsqrt()
    u = (x - over(mu)) * over(a) + over(bias)
    flat, its = u.flatten(2), (x * over(weight)).detach().flatten(2)
    at = its == its.amax(-1, keepdim=True)
    if ties == "first":
        at = at & (at.cumsum(-1) == 1)
    top = (flat * at).sum(-1) / at.sum(-1)
    gate = channel(torch.stack([flat.mean(-1), top]), w)
    v = u * gate.view(*gate.shape, *(1,) * (x.dim() - 2))
    # Channels 4 and 5 are alike to the last bit here; others differ by more than rounding.
    near = v.detach() >= v.detach().amax(1, keepdim=True) - 1e-12
    if ties == "first":
        near = near & (near.cumsum(1) == 1)
    q = torch.stack([v.mean(1), (v * near).sum(1) / near.sum(1)], 1)
    y = v * planar(q, k).unsqueeze(1)
    return F.relu(y + r)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    args = arguments((0, 4, 5, 5), F32, "contiguous", True)
    running = torch.zeros(4), torch.ones(4)
    with use_backend(backend):
        got = testing.answer(lambda *args: fused(*args, POOLS[0], "split", "relu", running), args)
    assert got.outs[0].shape == (0, 4, 5, 5)
    assert all(torch.isfinite(g).all() for g in got.grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(backend, layout, value):
    """What isn't finite spoils what it spoils in PyTorch, and no other sample where the statistics are kept. An
    infinity spoils its plane, whose mean it is."""
    args = arguments((2, 9, 4, 4), F32, layout, True)
    args[0][0, 3, 1, 2] = value
    running = torch.zeros(9), torch.ones(9)
    with use_backend(backend), torch.no_grad():
        y = fused(*args, POOLS[0], "split", "identity", running)
    want = formula(*args, POOLS[0], "split", "identity", running)
    assert not (y.isfinite() & ~want.isfinite()).any()
    assert not y[0, 3].isfinite().any()
    assert y[1].isfinite().all()
    torch.testing.assert_close(y[1], want[1], rtol=1e-4, atol=1e-4)


def test_parts_are_the_whole():
    """What traces can't look into an autograd.Function gets the parts; the numbers and gradients are the same."""
    args = arguments((2, 5, 4, 4), F64, "contiguous", True)
    x, *rest = args
    f = lambda x: fused(x, *rest, POOLS[0], "split", "silu")
    x = x.requires_grad_()
    whole = f(x)
    dx = torch.autograd.grad(whole.sum(), x)[0]
    assert torch.allclose(torch.func.grad(lambda x: f(x).sum())(x.detach()), dx)
    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)


def test_complaints():
    x, weight, bias, w, k, _ = arguments((2, 5, 4, 4), F32, "contiguous", False)
    own, w_ = batch(16), w.clone().requires_grad_()
    call = lambda norm=own, excite=channel, given=(w,), **options: ops.affine_dual_scale(
        x, norm, excite, planar, (weight, bias), given, (k,), **options
    )
    with pytest.raises(ValueError, match="channel must be one of"):
        call(channel="mean_abs")
    with pytest.raises(ValueError, match="ties must be one of"):
        call(ties="last")
    with pytest.raises(ValueError, match=r"\(2, N, C\)"):
        call(norm=lambda m, *p: m[0])
    with pytest.raises(TypeError, match="excite must be callable"):
        call(norm=None)
    with pytest.raises(ValueError, match="residual"):
        call(residual=x[:1])
    with pytest.raises(ValueError, match="through params"):
        call(excite=lambda p: channel(p, w_), given=())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic):
    """One graph, with the bits of the eager call."""
    torch._dynamo.reset()
    args = arguments((2, 6, 5, 3), F32, "contiguous", True)
    own = lambda *args: fused(*args, POOLS[0], "first", "relu")
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert testing.same_bits(testing.answer(own, args), testing.answer(compiled, args))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_threads(layout):
    args = arguments((2, 70, 40, 40), F32, layout, True)
    own = lambda *args: fused(*args, POOLS[0], "split", "relu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(testing.answer(own, args))
    finally:
        torch.set_num_threads(before)
    assert testing.same_bits(found[0], found[1])
    assert testing.same_bits(found[0], found[2])


def test_second_derivatives_are_refused():
    args = [t.requires_grad_() for t in arguments((2, 5, 4, 4), F64, "contiguous", True)]
    (dx,) = torch.autograd.grad(fused(*args, POOLS[0], "split", "silu").sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="affine_dual_scale"):
        dx.sum().backward()
