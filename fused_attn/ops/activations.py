"""The activations and gates that ops take by name, with their derivatives: one table for every eager form.

`act(v)` follows the first dense layer of an MLP, or a residual add; `gate(u)` turns a logit into a gate. Both names
index the same table. Conventions at kinks are PyTorch's: derivative 0 of relu at 0, and of the clamped forms at their
ends. The C++ form is csrc/simd.h, the Triton form is tile.py; a test compares the three.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> (value, derivative), each (v, slope) -> tensor. `slope` is the negative slope of leaky_relu, unused elsewhere.
# prelu stands apart: its slope is a tensor, broadcast over the last dimension.
Pair = tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]

_SQRT_HALF, _INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


def _silu_grad(v: Tensor, slope: float) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _sigmoid_grad(v: Tensor, slope: float) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 - s)


def _inside(v: Tensor, low: float, high: float) -> Tensor:
    """1 strictly between the ends."""
    return ((v > low) & (v < high)).to(v.dtype)


TABLE: dict[str, Pair] = {
    "identity": (lambda v, a: v, lambda v, a: torch.ones_like(v)),
    "relu": (lambda v, a: F.relu(v), lambda v, a: (~(v <= 0)).to(v.dtype)),  # passes NaN, as torch does
    "relu6": (lambda v, a: F.relu6(v), lambda v, a: _inside(v, 0, 6)),
    "leaky_relu": (
        lambda v, a: F.leaky_relu(v, a),
        lambda v, a: torch.where(v > 0, torch.ones_like(v), a),
    ),
    "silu": (lambda v, a: F.silu(v), _silu_grad),
    "gelu": (
        lambda v, a: F.gelu(v),
        lambda v, a: 0.5 * (1 + torch.erf(v * _SQRT_HALF)) + v * torch.exp(-0.5 * v * v) * _INV_SQRT_2PI,
    ),
    "hardswish": (
        lambda v, a: F.hardswish(v),
        lambda v, a: torch.where(v <= -3, 0, torch.where(v >= 3, 1, v / 3 + 0.5)),  # NaN at NaN
    ),
    "sigmoid": (lambda v, a: torch.sigmoid(v), _sigmoid_grad),
    # Not F.hardsigmoid: its backward rounds 1/6 to float32, in float64 too, and this table is the truth of the tests.
    "hard_sigmoid": (lambda v, a: F.relu6(v + 3) / 6, lambda v, a: _inside(v, -3, 3) / 6),
    "clamp": (lambda v, a: v.clamp(0, 1), lambda v, a: ((v >= 0) & (v <= 1)).to(v.dtype)),
}

ACTS = ("identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "prelu")
GATES = ("sigmoid", "hard_sigmoid", "clamp", "relu", "prelu", "identity")
EPILOGUES = ("identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")
# The derivative of these at v can be read off act(v), so that backward needs the output and not the residual.
FROM_OUTPUT = ("relu", "relu6")


def apply(name: str, v: Tensor, slope: float = 0.01, weight: Tensor | None = None) -> Tensor:
    """act(v) or gate(v): v (..., H), weight (1,) or (H,) the slopes of prelu."""
    if name == "prelu":
        return torch.where(v > 0, v, v * weight)  # type: ignore[operator]
    return TABLE[name][0](v, slope)


def grad(name: str, v: Tensor, slope: float = 0.01, weight: Tensor | None = None) -> Tensor:
    """d act(v) / dv, in v's dtype."""
    if name == "prelu":
        return torch.where(v > 0, torch.ones_like(v), weight.expand_as(v))  # type: ignore[union-attr]
    return TABLE[name][1](v, slope)


def needs_aux(act: str, residual: bool) -> str | None:
    """What an epilogue must keep for backward besides x and the gate: "output", "residual", or None."""
    if act == "identity" or not residual:  # without a residual the pre-activation is x·gate, which backward has anyway
        return None
    return "output" if act in FROM_OUTPUT else "residual"
