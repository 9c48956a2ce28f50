"""A ReLU6 whose bounds were set to others was computed as relu6.

Cause: only the class was looked at, and ReLU6 keeps its bounds as attributes.
Found in review of "Every squeeze-and-excitation in production".
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import fuse_

pytest.importorskip("timm")

from timm.models.resnet import BasicBlock


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_bounds(before: bool) -> None:
    torch.manual_seed(0)
    ours = BasicBlock(24, 24, attn_layer="se", act_layer=nn.ReLU6).eval()
    theirs, x = copy.deepcopy(ours), 5 * torch.randn(2, 24, 5, 5)
    theirs.act2.max_val = 1.0
    if before:
        ours.act2.max_val = 1.0
    fuse_(ours)
    ours(x)
    ours.act2.max_val = 1.0
    torch.testing.assert_close(ours(x), theirs(x))
    assert float(ours(x).max()) == 1
