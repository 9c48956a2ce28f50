"""A subclass with a `__getstate__` of its own lost it when it was fused: copies and pickles were those of fused_attn.

Cause: the class that fused modules get comes before theirs. Such a class is refused.
Found in review of "Every squeeze-and-excitation in production".
"""

import copy

import pytest

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule


class Marked(SEModule):
    def __getstate__(self):
        return {**self.__dict__, "mark": 1}


def test_refused() -> None:
    module = Marked(24)
    assert fuse_(module).refused == [("", "Marked is copied and pickled in a way of its own")]
    assert copy.deepcopy(module).mark == 1
