"""A subclass that has a property of a child's name, or looks up attributes by itself, computes with something else than
that child; it was fused as if it didn't.

Cause: plans read `_modules`, and only `forward` was compared with the known one.
Found in review of "Every squeeze-and-excitation in production".
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import Bottleneck


class Hidden(SEModule):
    @property
    def gate(self):
        return nn.Identity()

    @gate.setter
    def gate(self, module):
        self._modules["gate"] = module


class Looking(SEModule):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return nn.Identity() if name == "gate" else found


class HiddenBelow(Bottleneck):
    @property
    def act3(self):
        return nn.Tanh()

    @act3.setter
    def act3(self, module):
        self._modules["act3"] = module


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Hidden(24), "gate is an attribute of Hidden"),
        (lambda: Looking(24), "Looking looks up attributes by itself"),
        (lambda: HiddenBelow(24, 6, attn_layer="se"), "act3 is an attribute of HiddenBelow"),
    ],
)
@torch.no_grad()
def test_refused(build, reason) -> None:
    torch.manual_seed(0)
    ours = build().eval()
    theirs, x = copy.deepcopy(ours), torch.randn(2, 24, 5, 5)
    assert reason in dict(fuse_(ours).refused)[""]
    torch.testing.assert_close(ours(x), theirs(x))
