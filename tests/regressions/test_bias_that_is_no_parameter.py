"""A bias deleted and set again as a plain tensor, as pruning and adapters do, made a fused module raise KeyError.

Cause: only the weight's place was compared on each call.
Found in review of "Every squeeze-and-excitation in production".
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import SqueezeExcite, explain, fuse_

pytest.importorskip("timm")

from timm.layers.squeeze_excite import SEModule


def moved(module: nn.Module) -> None:
    del module.fc1._parameters["bias"]
    module.fc1.bias = torch.ones(8)


@pytest.mark.parametrize("cls", [SEModule, SqueezeExcite])
@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_bias_set_as_a_tensor(cls: type[nn.Module], before: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(SEModule(24) if cls is SEModule else cls(24))
    theirs, x = nn.Sequential(SEModule(24)), torch.randn(2, 24, 5, 5)
    theirs.load_state_dict(ours.state_dict())
    ours = copy.deepcopy(ours)
    if not before:
        fuse_(ours)
        ours(x)
    moved(ours[0])
    moved(theirs[0])
    fuse_(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    assert "keeps no bias where one is expected" in explain(ours, x).lines[0].reason
