"""`explain` found "no module of a class that it knows" where a fused module left an unusual map to its own forward.

Found in review.
"""

import pytest
import torch

import tests.support  # noqa: F401  (makes torchvision importable beside a CPU torch)
from fused_attn import explain, fuse_

torchvision = pytest.importorskip("torchvision")


def test_a_map_without_a_batch():
    module = torchvision.ops.SqueezeExcitation(8, 4)
    assert fuse_(module).fused
    assert "unfused" not in str(explain(module, torch.randn(2, 8, 5, 5)))
    assert "fused for maps of another kind than (8, 5, 5)" in str(explain(module, torch.randn(8, 5, 5)))
