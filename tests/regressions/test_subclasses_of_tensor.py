"""MONAI's `MetaTensor`, whose sizes must be tuples, raised a TypeError in fused modules that ran before.

Found in review.
"""

import copy

import pytest
import torch

import tests.support  # noqa: F401  (makes torchvision importable beside a CPU torch)
from fused_attn import fuse_
from fused_attn.testing import error

monai = pytest.importorskip("monai")
cbam = pytest.importorskip("timm.layers.cbam")


@pytest.mark.parametrize("name", ["ResidualSELayer", "CbamModule", "LightCbamModule"])
def test_meta_tensors(name):
    torch.manual_seed(0)
    of_monai = name == "ResidualSELayer"
    module = monai.networks.blocks.ResidualSELayer(2, 8) if of_monai else getattr(cbam, name)(8, 1 / 4)
    fused = copy.deepcopy(module)
    assert fuse_(fused).fused
    x = torch.randn(2, 8, 5, 5)
    found = []
    for m in (module, fused):
        given = monai.data.MetaTensor(x.clone()).requires_grad_()
        y = m(given)
        y.sum().backward()
        found.append([t.detach().as_subclass(torch.Tensor) for t in (y, given.grad)])
    for want, got in zip(*found, strict=True):
        assert error(got, want.double()) < 1e-5
