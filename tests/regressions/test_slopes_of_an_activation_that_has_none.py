"""Slopes given to a network whose activations use none: their gradient was an empty tensor, and backward raised.

Found by fuzzing; `or_none` handed autograd what an operator returns where there is no gradient.
"""

import pytest

from fused_attn import testing
from tests.fuzzing import Example, check


@pytest.mark.parametrize("backend", testing.candidates())
def test_pool_mlp_scale(backend: str) -> None:
    args = {"x": (2, 4, 5, 5), "w1": (3, 4), "w2": (4, 3), "act_weight": (3,), "gate_weight": (4,), "norm_weight": (3,)}
    check(Example("pool_mlp_scale", args, wanted=tuple(args), backend=backend))
