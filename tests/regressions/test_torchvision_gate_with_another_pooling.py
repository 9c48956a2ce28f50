"""torchvision's SqueezeExcitation ran fused, as a mean over the whole map, whatever its `avgpool` child was.

Cause: the child was watched for hooks, but neither its class nor its output_size was read. Found in review.
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes torchvision importable beside a CPU torch)
from fused_attn import fuse_

pytest.importorskip("torchvision")

from torchvision.ops import SqueezeExcitation


def gate(pool: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module = SqueezeExcitation(12, 4)
    module.avgpool = pool
    return module


@pytest.mark.parametrize(
    ("pool", "fused"),
    [
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d((1, 1)), True),
        (nn.AdaptiveAvgPool2d(2), False),
        (nn.AdaptiveAvgPool2d((1, None)), False),
        (nn.AdaptiveMaxPool2d(1), False),
    ],
    ids=repr,
)
def test_before_fusing(pool: nn.Module, fused: bool) -> None:
    report = fuse_(gate(pool))
    assert bool(report.fused) == fused
    assert fused or "avgpool" in report.refused[0][1]


def test_after_fusing() -> None:
    module = gate(nn.AdaptiveAvgPool2d(1))
    fuse_(module)
    x = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(module(x), gate(nn.AdaptiveAvgPool2d(1))(x))
    module.avgpool = nn.AdaptiveMaxPool2d(1)
    torch.testing.assert_close(module(x), gate(nn.AdaptiveMaxPool2d(1))(x))
    module.avgpool = nn.AdaptiveAvgPool2d(1)
    torch.testing.assert_close(module(x), gate(nn.AdaptiveAvgPool2d(1))(x))
    changed = copy.deepcopy(module)
    changed.avgpool.output_size = 4  # as large as x: the gates become maps
    torch.testing.assert_close(changed(x), gate(nn.AdaptiveAvgPool2d(4))(x))
