"""Ops that own a normalisation and the gate behind it, against autograd over the equations in float64."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn import OPS, ops, testing, use_backend

BACKENDS = testing.candidates("cpu")
EPS = 1e-5


def batch_norm(mean, m2, weight, bias, size):
    """A BatchNorm's multiplier (C,) and the mean (N, C) of what it makes, from the moments."""
    mu = mean.mean(0)
    var = (m2.sum(0) / size + (mean - mu).square().sum(0)) / mean.shape[0]
    a = weight * (var + EPS).rsqrt()
    return a, a * (mean - mu) + bias, torch.stack([mu, var])


def excited(size, largest=False):
    """An excite of `moments_affine`: BatchNorm, and a gate of the means (and the maxima) behind it."""

    def excite(moments, weight, bias, w1, w2):
        mean, m2, *ends = moments
        a, z, statistics = batch_norm(mean, m2, weight, bias, size)
        p = z if not largest else 2 * z + (torch.where(a > 0, *ends) - mean) * a
        s = torch.sigmoid(F.relu(p @ w1.t()) @ w2.t())
        return torch.stack([s * a, s * z]), statistics

    return excite


def parameters(c, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return draw(c), draw(c), draw(3, c), draw(c, 3)


def maps(shape, dtype, layout, count=2, scale=1.0, offset=0.0):
    g = torch.Generator().manual_seed(7)
    made = [torch.randn(*shape, generator=g, dtype=torch.float64) * scale + offset for _ in range(count)]
    made = [m.to(dtype) for m in made]
    if layout == "channels_last" and len(shape) in (4, 5):
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        made = [m.to(memory_format=form) for m in made]
    return [m.requires_grad_() for m in made]


def tail(x, residual, act, weight, bias, w1, w2, largest=False):
    z = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    p = z.flatten(2).mean(-1) + (z.flatten(2).amax(-1) if largest else 0)
    v = z * torch.sigmoid(F.relu(p @ w1.t()) @ w2.t()).reshape(*z.shape[:2], *(1,) * (z.dim() - 2))
    v = v if residual is None else v + residual
    return {"identity": lambda t: t, "relu": F.relu, "silu": F.silu, "relu6": F.relu6}[act](v)


def gated(x, act, weight, bias, w1, w2, running=None):
    mean, var = running or (None, None)
    z = F.batch_norm(x, mean, var, weight, bias, running is None, 0.0, EPS)
    u = {"identity": lambda t: t, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}[act](z)
    return u * torch.sigmoid(F.relu(u.flatten(2).mean(-1) @ w1.t()) @ w2.t()).reshape(
        *u.shape[:2], *(1,) * (u.dim() - 2)
    )


def compare(got, want, dtype, terms):
    """Outputs and gradients agree by the dtype's resolution, of each tensor's largest number."""
    eps = torch.finfo(dtype).eps
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype or a.shape != want[0].shape
        error = (a.double() - b).abs().max().item() if b.numel() else 0.0
        bound = b.abs().max().item() if b.numel() else 0.0
        assert error <= eps * terms * max(bound, 1e-3), f"{i}: {error:.3g} of {bound:.3g}"


SHAPES = [(2, 5, 7, 7), (3, 33, 14, 14), (4, 17, 13), (2, 6, 3, 4, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_affine(backend, with_residual, act, layout, dtype):
    for shape in SHAPES:
        for largest in (False, True):
            x, residual = maps(shape, dtype, layout)
            residual = residual if with_residual else None
            weights = parameters(shape[1])
            wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual)]
            want = tail(*wide, act, *weights, largest)
            dy = torch.randn_like(want).to(dtype)
            leaves = [t for t in wide if t is not None]
            true = torch.autograd.grad(want, [*leaves, *weights], dy.double())
            own = [w.detach().to(torch.float64 if dtype == torch.float64 else torch.float32) for w in weights]
            own = [w.requires_grad_() for w in own]
            size = x[0, 0].numel()
            with use_backend(backend):
                y, statistics = ops.moments_affine(
                    x, excited(size, largest), *own, descriptor="extrema" if largest else "moments",
                    residual=residual, act=act,
                )  # fmt: skip
                found = torch.autograd.grad(y, [t for t in (x, residual) if t is not None] + own, dy)
            assert statistics.shape == (2, shape[1])
            assert y.stride() == torch.empty_like(x).stride()
            compare([y], [want], dtype, 60)
            # The mask of a half-precision relu is read off rounded numbers: its gradients differ where v is about 0.
            compare(found[: len(leaves)], true[: len(leaves)], dtype, 400)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "hardswish"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_affine_pool_scale(backend, training, act, layout, dtype):
    for shape in SHAPES:
        (x,) = maps(shape, dtype, layout, 1)
        weights = parameters(shape[1])
        running = None if training else (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 0.5)
        wide = x.detach().double().requires_grad_()
        want = gated(wide, act, *weights, running)
        dy = torch.randn_like(want).to(dtype)
        true = torch.autograd.grad(want, [wide, *weights], dy.double())
        own = [w.detach().to(torch.float64 if dtype == torch.float64 else torch.float32) for w in weights]
        own = [w.requires_grad_() for w in own]
        size, n = x[0, 0].numel(), shape[0]

        def norm(*args, n=n, size=size, running=running):
            if running is None:
                (mean, m2), weight, bias = args
                a, z, statistics = batch_norm(mean, m2, weight, bias, size)
                return torch.stack([a.expand_as(z), z]), statistics
            weight, bias = args
            a = weight * (running[1].to(weight.dtype) + EPS).rsqrt()
            return torch.stack([a, bias]).unsqueeze(1).expand(2, n, -1)

        excite = lambda p, w1, w2: torch.sigmoid(F.relu(p @ w1.t()) @ w2.t())
        centre = None if training else running[0].to(own[0].dtype).expand(n, -1).contiguous()
        with use_backend(backend):
            out = ops.affine_pool_scale(x, norm, excite, own[:2], own[2:], moments=training, centre=centre, act=act)
            y = out[0] if training else out
            found = torch.autograd.grad(y, [x, *own], dy)
        compare([y], [want], dtype, 60)
        compare(found[:1], true[:1], dtype, 400)
        compare([g.to(torch.float64) for g in found[1:]], true[1:], torch.float64, 1e3 * torch.finfo(dtype).eps / 2e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_far_from_zero(backend):
    """Mean 1e3 and deviation 1e-2 in float32: Σx² − S·mean² would leave no digit."""
    (x,) = maps((4, 6, 28, 28), torch.float32, "contiguous", 1, 1e-2, 1e3)
    with use_backend(backend), torch.no_grad():
        mean, m2 = ops.channel_moments(x)
    wide = x.double().flatten(2)
    var = wide.var(-1, correction=0)
    assert ((m2.double() / wide.shape[-1] - var).abs() <= 1e-3 * var).all()
    assert ((mean.double() - wide.mean(-1)).abs() <= 1e-7 * 1e3).all()


@pytest.mark.parametrize("name", ["moments_affine", "affine_pool_scale"])
def test_parts_are_the_whole(name):
    """What traces can't look into an autograd.Function gets the parts; the numbers and gradients are the same."""
    x, residual = maps((2, 5, 7, 7), torch.float64, "contiguous")
    residual, weights = residual.detach(), [w.detach() for w in parameters(5)]
    if name == "moments_affine":
        f = lambda x: ops.moments_affine(x, excited(49), *weights, residual=residual, act="relu")[0]
    else:
        norm = lambda m, w, b: torch.stack([batch_norm(*m, w, b, 49)[0].expand_as(m[0]), batch_norm(*m, w, b, 49)[1]])
        excite = lambda p, w1, w2: torch.sigmoid(F.relu(p @ w1.t()) @ w2.t())
        f = lambda x: ops.affine_pool_scale(x, norm, excite, weights[:2], weights[2:], act="silu")
    whole = f(x)
    dx = torch.autograd.grad(whole.sum(), x)[0]
    assert torch.allclose(torch.func.grad(lambda x: f(x).sum())(x.detach()), dx)
    assert torch.allclose(torch.vmap(f, in_dims=0)(x.detach().unsqueeze(0))[0], whole)
    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)


def test_every_half_is_registered():
    for name in ("moments_affine_reduce", "moments_affine_apply", "affine_pool", "affine_pool_scale_reduce"):
        assert name in OPS
