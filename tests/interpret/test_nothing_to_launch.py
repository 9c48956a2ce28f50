"""Empty tensors on Triton, found by fuzzing: maps of no elements, whose strides say nothing, were refused in the middle
of a call; a dense layer of no inputs divided by 0, and its bias had no gradient."""

import pytest

from fused_attn import testing
from tests.fuzzing import Example, check

X = (0, 4, 5, 5)


@pytest.mark.parametrize("gradient", testing.LAYOUTS)
def test_gradient_of_an_empty_batch(gradient: str) -> None:
    args = {"x": X, "z": X, "norm": "positions"}
    check(Example("map_scale", args, wanted=("x", "z"), gradient=gradient, backend="triton"))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_of_an_empty_batch(layout: str) -> None:
    args = {"x": X, "gate": (0, 4), "pixel": (0, 5, 5), "residual": X}
    check(Example("scale", args, layouts={"x": layout}, wanted=("x", "gate", "pixel"), backend="triton"))


@pytest.mark.parametrize(("inputs", "hidden"), [(0, 5), (4, 0)])
def test_dense_layer_without_inputs(inputs: int, hidden: int) -> None:
    args = {"pooled": (3, inputs), "w1": (hidden, inputs), "b1": (hidden,), "w2": (inputs, hidden), "b2": (inputs,)}
    check(Example("shared_mlp", args, wanted=tuple(args), backend="triton"))
