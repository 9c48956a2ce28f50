"""The statistics of an empty batch were 0 on the C++ backend, and NaN on all others and in `shared_mlp`.

Found by fuzzing; the kernel fills what it saves with zeros, and they reached the caller.
"""

import pytest

from fused_attn import testing
from tests.fuzzing import Example, check


@pytest.mark.parametrize("backend", testing.candidates())
def test_pool_mlp_scale(backend: str) -> None:
    args = {"x": (0, 4, 5, 5), "w1": (2, 4), "w2": (4, 2), "norm": "batch"}
    check(Example("pool_mlp_scale", args, wanted=("x", "w1", "w2"), backend=backend))
