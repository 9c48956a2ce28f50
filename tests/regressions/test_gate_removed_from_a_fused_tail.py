"""`block.se = None` after fusing, which timm allows, raised AttributeError.

Cause: the tail's new plan skipped children that are None, and its forward then asked None for a plan. Found in review.
"""

import pytest
import torch

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import explain, fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import BasicBlock, Bottleneck


@torch.no_grad()
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_gate_removed_from_a_fused_tail(cls: type) -> None:
    torch.manual_seed(0)
    ours = cls(32, 32 // cls.expansion, attn_layer=SEModule).eval()
    theirs = cls(32, 32 // cls.expansion, attn_layer=SEModule).eval()
    theirs.load_state_dict(ours.state_dict())
    x, se = torch.randn(2, 32, 5, 5), ours.se
    assert len(fuse_(ours).fused) == 2
    ours.se = theirs.se = None
    torch.testing.assert_close(ours(x), theirs(x))
    assert {line.op for line in explain(ours, x).lines} == {"affine_apply"}  # the norm's, add's and activation's
    ours.se = theirs.se = se
    torch.testing.assert_close(ours(x), theirs(x))
    assert "shared_mlp" in {line.op for line in explain(ours, x).lines}
