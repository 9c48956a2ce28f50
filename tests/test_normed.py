"""A BatchNorm and what follows it, against PyTorch's own modules in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import testing, use_backend
from fused_attn.blocks import normed

BACKENDS = testing.candidates("cpu")
NORMS = {
    "training": lambda c: nn.BatchNorm2d(c),
    "momentum": lambda c: nn.BatchNorm2d(c, momentum=0.3, eps=1e-3),
    "average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "plain": lambda c: nn.BatchNorm2d(c, affine=False),
    "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "untracked, evaluated": lambda c: nn.BatchNorm2d(c, track_running_stats=False).eval(),
    "evaluated": lambda c: nn.BatchNorm2d(c).eval(),
    "evaluated, plain": lambda c: nn.BatchNorm2d(c, affine=False).eval(),
}


def made(kind, c, dtype=torch.float64):
    torch.manual_seed(5)
    norm = NORMS[kind](c).double()
    with torch.no_grad():
        for t in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
            t.uniform_(0.5, 1.5)
    return norm.to(dtype)


def gate_of(c, dtype=torch.float64):
    torch.manual_seed(6)
    w1, w2 = (torch.randn(*s, dtype=torch.float64).to(dtype).requires_grad_() for s in ((3, c), (c, 3)))
    return lambda p, w1, w2: torch.sigmoid(F.relu(p @ w1.t()) @ w2.t()), (w1, w2)


def both(kind, form, shape, dtype, backend, residual=True, steps=3):
    """Outputs, gradients and running statistics of several steps: PyTorch's modules', and ours."""
    results = []
    for ours in (False, True):
        norm, (excite, weights) = made(kind, shape[1], dtype), gate_of(shape[1], dtype)
        torch.manual_seed(7)
        seen = []
        for _ in range(steps):
            x = (torch.randn(shape, dtype=dtype) * 2 + 1).requires_grad_()
            short = torch.randn(shape, dtype=dtype).requires_grad_() if residual else None
            dy = torch.randn(shape, dtype=dtype)
            gate = None if form == "plain" else (excite, weights)
            if ours:
                view = normed.read(norm)
                with use_backend(backend):
                    if form == "inside":
                        y = normed.run_inside(view, gate, x, "silu")
                    else:
                        y = normed.run(view, gate, x, short, "relu")
            else:
                z = norm(x)
                z = F.silu(z) if form == "inside" else z
                v = z if gate is None else z * excite(z.mean((2, 3)), *weights)[:, :, None, None]
                v = v if short is None or form == "inside" else v + short
                y = v if form == "inside" else F.relu(v)
            leaves = [t for t in (x, short, *norm.parameters(), *weights) if t is not None]
            grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
            seen += [y, *(g for g in grads if g is not None)]
        results.append((seen, [b.clone() for b in norm.buffers()]))
    return results


@pytest.mark.parametrize("form", ["plain", "outside", "inside"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm(backend, kind, form):
    """Forward, every gradient and the running statistics, to a few ulp in float64."""
    for shape, residual in (((3, 8, 5, 5), True), ((2, 5, 7, 7), False), ((1, 4, 3, 3), True)):
        (want, kept), (got, ours) = both(kind, form, shape, torch.float64, backend, residual)
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, a.abs().max().item())
        for a, b in zip(kept, ours, strict=True):
            assert a.dtype == b.dtype
            assert torch.allclose(a.double(), b.double(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("form", ["plain", "outside", "inside"])
def test_one_value_per_channel_raises(form):
    norm, gate = made("training", 4), gate_of(4)
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    view = normed.read(norm)
    how = {"plain": (None, x), "outside": (gate, x), "inside": (gate, x, "relu")}[form]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        (normed.run_inside if form == "inside" else normed.run)(view, *how)
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("form", ["plain", "outside", "inside"])
@pytest.mark.parametrize("kind", ["training", "evaluated"])
def test_gradcheck_through_the_statistics(kind, form):
    norm, (excite, weights) = made(kind, 3), gate_of(3)
    x, residual = (torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, residual, *weights):
        view = normed.read(copy.deepcopy(norm))
        if form == "inside":
            return normed.run_inside(view, (excite, weights), x, "silu") + 0 * residual
        return normed.run(view, None if form == "plain" else (excite, weights), x, residual, "silu")

    torch.autograd.gradcheck(f, (x, residual, *weights), fast_mode=True)


def test_backward_sees_what_forward_saw():
    """Between forward and backward the module may change; the gradient is that of what ran."""
    norm, gate = made("evaluated", 4), gate_of(4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(normed.run(normed.read(norm), gate, x).sum(), x)[0]
    y = normed.run(normed.read(norm), gate, x)
    norm.train()
    norm.eps = 7.0
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


@pytest.mark.parametrize("form", ["plain", "outside", "inside"])
def test_half_precision(form):
    """Half-precision maps beside float32 parameters, by float32 sums."""
    for dtype in (torch.bfloat16, torch.float16):
        norm, (excite, weights) = made("training", 8, torch.float32), gate_of(8, torch.float32)
        x = torch.randn(4, 8, 9, 9).to(dtype).requires_grad_()
        residual = torch.randn(4, 8, 9, 9).to(dtype)
        wide, (_, exact) = made("training", 8), gate_of(8)
        z = wide(x.detach().double())
        z = F.silu(z) if form == "inside" else z
        s = excite(z.mean((2, 3)), *exact)[:, :, None, None] if form != "plain" else 1
        want = z * s if form == "inside" else F.relu(z * s + residual.double())
        view, gate = normed.read(norm), (excite, weights)
        y = (
            normed.run_inside(view, gate, x, "silu")
            if form == "inside"
            else normed.run(view, None if form == "plain" else gate, x, residual, "relu")
        )
        assert y.dtype == dtype
        assert (y.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
        assert torch.allclose(norm.running_var.double(), wide.running_var, rtol=1e-5)
        y.float().sum().backward()
        assert (x.grad.dtype, norm.weight.grad.dtype) == (dtype, torch.float32)
