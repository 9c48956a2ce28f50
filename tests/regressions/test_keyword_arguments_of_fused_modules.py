"""A fused module took its input under the name x only; torchvision's `SqueezeExcitation` calls it `input`, and callers
may pass it so. Found in review.
"""

import inspect

import pytest
import torch

import tests.support  # noqa: F401  (makes torchvision importable beside a CPU torch)
from fused_attn import fuse_

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_name_of_the_original(compiled):
    module = torchvision.ops.SqueezeExcitation(32, 8).eval()
    x = torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        want = module(input=x)
        assert fuse_(module).fused
        assert list(inspect.signature(module.forward).parameters) == ["input"]
        run = torch.compile(module, backend="eager") if compiled else module
        torch.testing.assert_close(run(input=x), want)
        torch.testing.assert_close(run(x), want)


def test_that_of_a_parent():
    block = torchvision.models.mobilenet_v3_small().features[1].eval()
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        want = block(input=x)
        assert fuse_(block).fused
        torch.testing.assert_close(block(input=x), want)
