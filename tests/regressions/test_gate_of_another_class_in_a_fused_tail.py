"""A gate whose class was replaced after fusing was never called: the tail ran the plan that still lay in its __dict__.

Cause: `plan.ready` compared the children of a module, not its own class. Found in review.
"""

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import SqueezeExcite, explain, fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import Bottleneck


class Doubled(SEModule):
    def forward(self, x):
        return super().forward(x) * 2


class OursDoubled(SqueezeExcite):
    def forward(self, x):
        return super().forward(x) * 2


def block() -> nn.Module:
    torch.manual_seed(0)
    return Bottleneck(32, 8, attn_layer=SEModule).eval()


@torch.no_grad()
def test_original_class_replaced() -> None:
    ours, theirs, x = block(), block(), torch.randn(2, 32, 5, 5)
    fuse_(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.se.__class__ = theirs.se.__class__ = Doubled
    torch.testing.assert_close(ours(x), theirs(x))
    assert any(line.backend == "unfused" and "gate" in line.reason for line in explain(ours, x).lines)


@torch.no_grad()
def test_fused_class_replaced_by_a_subclass() -> None:
    ours, theirs, x = block(), block(), torch.randn(2, 32, 5, 5)
    fuse_(ours)
    ours(x)
    fused = type(ours.se)
    ours.se.__class__ = type("Sub", (fused,), {"forward": lambda self, x: fused.forward(self, x) * 2})
    theirs.se.__class__ = Doubled
    torch.testing.assert_close(ours(x), theirs(x))
    assert any(line.backend == "unfused" and "overrides" in line.reason for line in explain(ours, x).lines)


@torch.no_grad()
def test_subclass_of_our_block_as_the_gate() -> None:
    ours, theirs, x = block(), block(), torch.randn(2, 32, 5, 5)
    ours.se, theirs.se = OursDoubled(32), Doubled(32)
    theirs.se.load_state_dict(ours.se.state_dict())
    fuse_(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.se.__class__ = SqueezeExcite
    theirs.se.__class__ = SEModule
    torch.testing.assert_close(ours(x), theirs(x))
