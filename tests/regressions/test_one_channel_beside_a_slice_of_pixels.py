"""A map of one channel beside one that is cut out of channels_last: both are pixels, but the concatenation, which is
laid out like the first, is planes. The C++ kernel found no common format and raised. Found by fuzzing."""

import pytest

from tests.fuzzing import Example, check


@pytest.mark.parametrize("merge", ["sum", "concat", "concat_reversed"])
@pytest.mark.parametrize("first", ["contiguous", "sliced"])
def test_branch_scale(merge: str, first: str) -> None:
    args = {"x": (2, 1, 7, 7), "x1": (2, 1, 7, 7), "gate": (2, 2, 1), "merge": merge}
    layouts = {"x": first, "x1": "sliced_channels_last"}
    check(Example("branch_scale", args, layouts=layouts, wanted=("x", "gate", "x1")))
