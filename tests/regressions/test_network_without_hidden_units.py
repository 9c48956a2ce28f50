"""A dense network of hidden width 0 with a batch norm: its statistics were cut out of what is saved from the end,
and the last 0 elements, written `[-0:]`, are all of them. Found by fuzzing."""

import pytest

from fused_attn import testing
from tests.fuzzing import Example, check


@pytest.mark.parametrize("backend", testing.candidates())
def test_shared_mlp(backend: str) -> None:
    args = {"pooled": (6, 5), "w1": (0, 5), "w2": (5, 0), "norm": "batch", "norm_weight": (0,), "norm_bias": (0,)}
    check(Example("shared_mlp", args, wanted=("pooled", "w1", "w2", "norm_weight"), backend=backend))
