"""Backward of the means of one map's branches, of an empty batch: a size was left for reshape to guess, which it can't
where there is nothing. Found by fuzzing."""

import pytest

from fused_attn import testing
from tests.fuzzing import Example, check


@pytest.mark.parametrize("backend", testing.candidates())
@pytest.mark.parametrize("each", [False, True])
def test_branch_pool(backend: str, each: bool) -> None:
    args = {"x": (0, 4, 5, 5), "splits": 2, "each": each}
    check(Example("branch_pool", args, wanted=("x",), backend=backend))
