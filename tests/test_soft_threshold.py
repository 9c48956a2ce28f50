"""Soft-thresholding and scaling by a map, beyond what the registry's suites ask: equations in index form, passes,
compilation."""

import itertools
import math

import pytest
import torch
from passes import counted, counting_extension
from torch import nn

from fused_attn import OPS, ops, testing, use_backend

F64 = torch.float64
BACKENDS = [b for b in testing.candidates() if testing.missing(OPS["soft_threshold"], b) is None]


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(got, want, within=1e-12):
    assert torch.allclose(got, want, rtol=within, atol=within), float((got - want).abs().max())


def excite(m, w1, w2, shared):
    """A share σ(relu(m W1) W2) of the descriptor, or of its mean."""
    alpha = torch.sigmoid(torch.relu(m @ w1.to(m.dtype)) @ w2.to(m.dtype))
    return alpha[:, :1] * m.mean(1, keepdim=True) if shared else alpha * m


def by_index(x, w1, w2, residual, dy, shared):
    """Forward and backward of the shrinkage unit, one number at a time, from the paper's equations: the threshold is
    α·mean|x|, and the chain rule is written out by hand. No autograd, no tensor expression."""
    n_, c_, s_ = x.shape
    hidden = w1.shape[1]
    at = lambda t: t.tolist()
    x, w1, w2, dy, r = at(x), at(w1), at(w2), at(dy), at(residual)
    new = lambda *shape: torch.zeros(shape, dtype=F64).tolist()
    y, dx, dw1, dw2 = new(n_, c_, s_), new(n_, c_, s_), new(c_, hidden), new(hidden, c_)
    sign = lambda v: (v > 0) - (v < 0)
    for n in range(n_):
        m = [sum(abs(v) for v in x[n][c]) / s_ for c in range(c_)]
        z = [sum(m[c] * w1[c][h] for c in range(c_)) for h in range(hidden)]
        a = [max(v, 0.0) for v in z]
        u = [sum(a[h] * w2[h][c] for h in range(hidden)) for c in range(c_)]
        alpha = [1 / (1 + math.exp(-v)) for v in u]
        mean = sum(m) / c_
        tau = [alpha[0] * mean if shared else alpha[c] * m[c] for c in range(c_)]
        dtau = [0.0] * c_
        for c, s in itertools.product(range(c_), range(s_)):
            over = abs(x[n][c][s]) - tau[c]
            y[n][c][s] = sign(x[n][c][s]) * max(over, 0.0) + r[n][c][s]
            if over > 0:
                dx[n][c][s] += dy[n][c][s]
                dtau[c] -= dy[n][c][s] * sign(x[n][c][s])
        dalpha, dm = [0.0] * c_, [0.0] * c_
        if shared:
            dalpha[0] = sum(dtau) * mean
            dm = [sum(dtau) * alpha[0] / c_] * c_
        else:
            dalpha = [dtau[c] * m[c] for c in range(c_)]
            dm = [dtau[c] * alpha[c] for c in range(c_)]
        du = [dalpha[c] * alpha[c] * (1 - alpha[c]) for c in range(c_)]
        da = [sum(du[c] * w2[h][c] for c in range(c_)) for h in range(hidden)]
        for h, c in itertools.product(range(hidden), range(c_)):
            dw2[h][c] += a[h] * du[c]
            if z[h] > 0:
                dw1[c][h] += m[c] * da[h]
                dm[c] += w1[c][h] * da[h]
        for c, s in itertools.product(range(c_), range(s_)):
            dx[n][c][s] += sign(x[n][c][s]) * dm[c] / s_
    return [torch.tensor(t, dtype=F64) for t in (y, dx, dw1, dw2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True], ids=["channel", "shared"])
def test_against_equations_by_index(backend, shared):
    x, residual, dy = (drawn(2, 5, 9, seed=i) for i in (0, 3, 4))
    w1, w2 = drawn(5, 4, seed=1), drawn(4, 5, seed=2)
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2, residual)]
    with use_backend(backend):
        y = ops.pool_soft_threshold(
            leaves[0], lambda m, a, b: excite(m, a, b, shared), *leaves[1:3], residual=leaves[3]
        )
        dx, dw1, dw2, dr = torch.autograd.grad(y, leaves, dy)
    for got, want in zip((y.detach(), dx, dw1, dw2), by_index(x, w1, w2, residual, dy, shared), strict=True):
        close(got, want)
    assert torch.equal(dr, dy)


def spanned(x, w1, w2, residual, shared, pool):
    """The same by tensor expressions, whose gradients are autograd's."""
    v = x.to(torch.promote_types(x.dtype, torch.float32))
    m = (v.abs() if pool == "mean_abs" else v).flatten(2).mean(-1)
    tau = excite(m, w1, w2, shared)[(...,) + (None,) * (x.dim() - 2)]
    y = v.sign() * torch.relu(v.abs() - tau)
    return (y if residual is None else y + residual).to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["mean_abs", "mean"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shared", [False, True], ids=["channel", "shared"])
def test_both_ends(backend, shared, residual, pool):
    """Layouts and dtypes, zeros in x, and thresholds below 0 where the mean is signed."""
    x, w1, w2, r = drawn(3, 6, 5, 3), drawn(6, 4, seed=1), drawn(4, 6, seed=2), drawn(3, 6, 5, 3, seed=3)
    x[0, :, 0] = 0
    if pool == "mean":
        x[:, ::2] -= 1
    for dtype, layout in [(torch.float32, lay) for lay in testing.WALKABLE] + [
        (F64, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float16, "contiguous")
    ]:  # fmt: skip
        lay = lambda t: testing.arrange(t.to(dtype), layout)  # noqa: B023
        weights = [w.to(F64 if dtype == F64 else torch.float32) for w in (w1, w2)]
        args = (lay(x), *weights, lay(r) if residual else None)
        fused = lambda x, a, b, r: ops.pool_soft_threshold(
            x, lambda m, a, b: excite(m, a, b, shared), a, b, pool=pool, residual=r
        )
        formula = lambda x, a, b, r: spanned(x, a, b, r, shared, pool)
        with use_backend(backend):
            got = testing.answer(fused, args, gradient=layout)
        assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
        true = testing.answer(formula, testing.double(args), cotangents=testing.double(got.cotangents))
        plain = testing.answer(formula, args, cotangents=got.cotangents)
        found = testing.deviations(got, true, plain, 15 * 6, ["x", "w1", "w2", "residual"][: len(got.grads)])
        assert all(d.ok for d in found), f"{dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_and_infinities_by_hand(backend, layout):
    """No gradient at |x| = τ and at 0; ±inf stays, and a negative threshold grows what isn't 0."""
    inf = math.inf
    x = torch.tensor([[[-inf, -2.0, -1, -0.5, 0, 1, 1.5, inf], [-2.0, -1, 0, 0, 0, 1, 2, 3]]])
    x, tau = testing.arrange(x, layout).requires_grad_(), torch.tensor([[1.0, -0.5]], requires_grad=True)
    with use_backend(backend):
        y = ops.soft_threshold(x, tau)
        dx, dtau = torch.autograd.grad(y, (x, tau), torch.ones_like(y))
    assert y.tolist() == [[[-inf, -1, 0, 0, 0, 0, 0.5, inf], [-2.5, -1.5, 0, 0, 0, 1.5, 2.5, 3.5]]]
    assert dx.tolist() == [[[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1]]]
    assert dtau.tolist() == [[0, -1]]


def test_statistics_and_compilation():
    """What excite returns beside its thresholds comes back without a gradient; one graph gives the eager bits."""
    x, w = drawn(3, 5, 4, 4).requires_grad_(), drawn(5, 5, seed=1).requires_grad_()

    def with_statistics(m, w):
        z = m @ w
        return torch.sigmoid(nn.functional.batch_norm(z, None, None, training=True)) * m, z.detach().mean(0)

    y, mean = ops.pool_soft_threshold(x, with_statistics, w)
    close(mean, (x.abs().mean((2, 3)) @ w).mean(0).detach())
    assert not mean.requires_grad
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, w), dy)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, w: ops.pool_soft_threshold(x, with_statistics, w), fullgraph=True, backend="aot_eager",
            dynamic=dynamic,
        )  # fmt: skip
        out, kept = compiled(x, w)
        close(out, y)
        close(kept, mean)
        for a, b in zip(torch.autograd.grad(out, (x, w), dy), want, strict=True):
            close(a, b)
    with pytest.raises(ValueError, match=r"excite's gate must have shape"):
        ops.pool_soft_threshold(x, lambda m: m[:, :2])
    (dx,) = torch.autograd.grad(ops.pool_soft_threshold(x, torch.sigmoid).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def test_a_batch_is_its_samples():
    """vmap-free transforms get the parts: torch.func.grad agrees with backward."""
    x = drawn(2, 3, 7)
    loss = lambda x: ops.pool_soft_threshold(x, torch.sigmoid, residual=x).square().sum()
    got = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    close(got, torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.fixture(scope="module")
def library():
    why = testing.missing(OPS["soft_threshold"], "cpp")
    if why is not None:
        pytest.skip(f"cpp: {why}")
    return counting_extension()


def test_halves_keep_their_budgets(library):
    """Forward 2 R + 1 W in two launches, which the registry's suite counts; backward 4 R + 1 W in these two."""
    shape = dict(x=[2, 16, 14, 14], tau=[2, 16], dy=[2, 16, 14, 14])
    apply = dict(shape, dpooled=[2, 16])
    requests = [
        dict(op=f"pool_soft_threshold_{half}", args=args, layout=layout)
        for half, args in [
            ("reduce", shape), ("apply", dict(apply, pool="mean_abs")), ("apply", dict(apply, pool="mean"))
        ]
        for layout in ("contiguous", "channels_last")
    ]  # fmt: skip
    for request, answer in zip(requests, counted(library, requests), strict=True):
        moved = answer["inference"]["reads"], answer["inference"]["writes"]
        assert moved == ((2, 0) if request["op"].endswith("reduce") else (2, 1)), (request, moved)


# ---- scaling by a map


def mask_by_index(x, z, dy, norm, eps, correction):
    """y, dx and dz of (1 + f(z))·x, one number at a time; the derivative of f by its own limit of sums."""
    n_, c_, s_ = x.shape
    y, dx, dz = (torch.zeros_like(x) for _ in range(3))
    sigma = lambda v: 1 / (1 + math.exp(-v))
    for n in range(n_):
        f, df = {}, {}  # df[(c, s)][(c2, s2)]: how f at (c, s) changes with z at (c2, s2)
        for c, s in itertools.product(range(c_), range(s_)):
            v = z[n, c, s].item()
            if norm == "none":
                f[c, s], df[c, s] = sigma(v), {(c, s): sigma(v) * (1 - sigma(v))}
            elif norm == "channels":
                column = z[n, :, s].tolist()
                r = math.sqrt(sum(w * w for w in column))
                f[c, s] = v / max(r, eps)
                df[c, s] = {
                    (k, s): ((k == c) - v * column[k] / r**2) / r if r >= eps else (k == c) / eps for k in range(c_)
                }
            else:
                row = z[n, c].tolist()
                mean = sum(row) / s_
                std = math.sqrt(sum((w - mean) ** 2 for w in row) / (s_ - correction) + eps)
                h = (v - mean) / std
                f[c, s] = sigma(h)
                inner = sigma(h) * (1 - sigma(h))
                df[c, s] = {
                    (c, k): inner * ((k == s) - 1 / s_ - h * (row[k] - mean) / ((s_ - correction) * std)) / std
                    for k in range(s_)
                }
        for c, s in f:
            y[n, c, s] = (1 + f[c, s]) * x[n, c, s]
            dx[n, c, s] = dy[n, c, s] * (1 + f[c, s])
            for (k, t), slope in df[c, s].items():
                dz[n, k, t] += dy[n, c, s] * x[n, c, s] * slope
    return y, dx, dz


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("norm", "eps", "correction"),
    [
        ("none", 0.0, 0.0),
        ("channels", 1e-12, 0.0),
        ("channels", 1.8, 0.0),
        ("positions", 1e-5, 0.0),
        ("positions", 0.1, 1.0),
    ],
)
def test_map_scale_by_index(backend, layout, norm, eps, correction):
    x, z, dy = (testing.arrange(drawn(2, 4, 6, seed=i), layout) for i in range(3))
    want = mask_by_index(x, z, dy, norm, eps, correction)
    x.requires_grad_(), z.requires_grad_()
    with use_backend(backend):
        y = ops.map_scale(x, z, norm, eps, correction)
        got = (y.detach(), *torch.autograd.grad(y, (x, z), dy))
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_map_scale_at_a_zero_norm(backend, layout):
    """F.normalize's value and gradient where all channels are 0, and above."""
    x, z, dy = (drawn(1, 8, 3, 3, seed=i, dtype=torch.float32) for i in range(3))
    z[0, :, 1, 1] = 0
    x, z, dy = (testing.arrange(t, layout).requires_grad_() for t in (x, z, dy))
    with use_backend(backend):
        got = ops.map_scale(x, z, "channels")
        grads = torch.autograd.grad(got, (x, z), dy.detach())
    want = (1 + nn.functional.normalize(z, dim=1)) * x
    close(got, want, 1e-6)
    for a, b in zip(grads, torch.autograd.grad(want, (x, z), dy.detach()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(40, 41), (4, 1500, 7)])
def test_standardised_far_from_zero(backend, layout, size):
    """A mean of 1000 standard deviations costs the variance no digits beyond those of z itself; tiles that end
    anywhere."""
    z = drawn(2, 19, *size, dtype=torch.float32) + 1000
    z, x = testing.arrange(z, layout), testing.arrange(torch.ones_like(z), layout)
    with use_backend(backend):
        y = ops.map_scale(x, z, "positions", 0.0)
    wide = z.double()
    v, m = torch.var_mean(wide.flatten(2), -1, correction=0)
    spread = (..., *(None,) * len(size))
    want = 1 + torch.sigmoid((wide - m[spread]) / v[spread].sqrt())
    assert float((y.double() - want).abs().max()) < 1e-4  # eps(float32)·1000 is 1.2e-4, a quarter of it through σ
