"""The table of activations: its derivatives against autograd, at kinks too; the lists of names against the table."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn.ops import activations

KINKS = [-3.0, 0.0, 1.0, 3.0, 6.0]
# PyTorch's own, but for F.hardsigmoid, whose backward rounds 1/6 to float32.
TORCH = {
    "identity": lambda v: v * 1,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "clamp": lambda v: v.clamp(0, 1),
}


def grid():
    """A grid of float64 that meets no kink, from far below to far above."""
    return torch.linspace(-9.01, 9.02, 361, dtype=torch.float64)


def test_every_name_is_tested_and_known():
    assert set(TORCH) == set(activations.TABLE)
    named = {*activations.ACTS, *activations.GATES, *activations.EPILOGUES}
    assert named - {"prelu"} <= set(activations.TABLE)
    assert set(activations.TABLE) <= named
    assert set(activations.FROM_OUTPUT) <= set(activations.EPILOGUES)
    assert "prelu" not in activations.EPILOGUES


@pytest.mark.parametrize("name", activations.TABLE)
def test_value_and_derivative(name):
    v = grid().requires_grad_()
    y = TORCH[name](v)
    (dv,) = torch.autograd.grad(y.sum(), v)
    near = 1e-7 if name == "hard_sigmoid" else 1e-14
    torch.testing.assert_close(activations.apply(name, v, 0.2), y, rtol=near, atol=near)
    torch.testing.assert_close(activations.grad(name, v.detach(), 0.2), dv, rtol=near, atol=near)


@pytest.mark.parametrize("name", activations.TABLE)
def test_derivative_at_kinks(name):
    v = torch.tensor(KINKS, dtype=torch.float64, requires_grad=True)
    (dv,) = torch.autograd.grad(TORCH[name](v).sum(), v)
    torch.testing.assert_close(activations.grad(name, v.detach(), 0.2), dv, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", activations.TABLE)
def test_derivative_is_that_of_the_value(name):
    """The formula of the tests differentiates the table's own values by autograd."""
    v = grid().requires_grad_()
    (dv,) = torch.autograd.grad(activations.apply(name, v, 0.2).sum(), v)
    torch.testing.assert_close(activations.grad(name, v.detach(), 0.2), dv, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("width", [1, 5])
def test_prelu(width):
    v = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(width, dtype=torch.float64)
    y = F.prelu(v, slopes)
    (dv,) = torch.autograd.grad(y.sum(), v)
    assert torch.equal(activations.apply("prelu", v, weight=slopes), y)
    assert torch.equal(activations.grad("prelu", v.detach(), weight=slopes), dv)


@pytest.mark.parametrize("name", activations.FROM_OUTPUT)
def test_derivative_read_off_the_output(name):
    """These derivatives are the same at act(v) as at v, kinks included: the output stands in for the residual."""
    v = torch.cat([grid(), torch.tensor(KINKS, dtype=torch.float64)])
    y = activations.apply(name, v, 0.2)
    assert torch.equal(activations.grad(name, y, 0.2), activations.grad(name, v, 0.2))


@pytest.mark.parametrize("name", activations.TABLE)
def test_nan_is_a_nan(name):
    v = torch.tensor([float("nan")])
    assert activations.apply(name, v).isnan().all()


def test_what_an_epilogue_keeps():
    assert activations.needs_aux("identity", True) is None
    assert activations.needs_aux("silu", False) is None
    assert activations.needs_aux("relu", True) == "output"
    assert activations.needs_aux("silu", True) == "residual"
