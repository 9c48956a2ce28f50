"""A parent's tail ran the plan of whatever gate it had: without a `__call__` of the gate's class, on (N, H, W, C) as if
it were (N, C, H, W), without the activation (shrinkage), or not at all (BAM, scSE: NotImplementedError).

Cause: nothing said whether a plan's `run` is the gate's whole forward, with a residual and an activation.
Found in review of "Every squeeze-and-excitation in production".
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import BAM, CBAM, ECA, Shrinkage, SpatialChannelSE, SpatialGroupEnhance, fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule, SqueezeExciteCl
from timm.models.resnet import Bottleneck

C = 24


class Called(SEModule):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("gate", "tail"),
    [(Called, False), (SqueezeExciteCl, False), (BAM, False), (SpatialChannelSE, False), (CBAM, True), (ECA, True),
     (Shrinkage, True), (lambda c, **_: SpatialGroupEnhance(8), True)],
)  # fmt: skip
@torch.no_grad()
def test_gate_of_a_bottleneck(gate: type[nn.Module], tail: bool) -> None:
    torch.manual_seed(0)
    ours = Bottleneck(C, C // 4, attn_layer=gate).eval()
    theirs = copy.deepcopy(ours)
    assert ("" in fuse_(ours).fused) == tail
    x = torch.randn(2, C, C, C)  # square in all but the batch, so that a gate of another layout finds its channels
    torch.testing.assert_close(ours(x), theirs(x))
    assert (ours(x) == 0).any()  # the activation ran


@torch.no_grad()
def test_gate_replaced_after_fusing() -> None:
    torch.manual_seed(0)
    ours = Bottleneck(C, C // 4, attn_layer=SEModule).eval()
    theirs = copy.deepcopy(ours)
    fuse_(ours)
    ours.se = theirs.se = SpatialChannelSE(C).eval()
    x = torch.randn(2, C, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
