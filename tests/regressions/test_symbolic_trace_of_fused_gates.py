"""torch.fx couldn't trace fused gates, though it traces the originals: a trace now has the original's graph."""

import copy

import pytest
import torch
from torch import nn

from fused_attn import fuse_
from tests import support


def _made(where: str, *args, **options) -> nn.Module:
    support.allow_torchvision()
    module, _, name = where.rpartition(".")
    return getattr(pytest.importorskip(module), name)(*args, **options)


GATES = {
    "CBAM": lambda: _made("timm.layers.cbam.CbamModule", 16),
    "CBAM, light": lambda: _made("timm.layers.cbam.LightCbamModule", 16),
    "SK": lambda: _made("timm.layers.selective_kernel.SelectiveKernel", 16),
    "split attention": lambda: _made("timm.layers.split_attn.SplitAttn", 16),
    "CBAM in its unit": lambda: _made("pytorchcv.models.cbamresnet.CbamResUnit", 16, 16, 1, False),
    "BAM": lambda: _made("pytorchcv.models.bamresnet.BamBlock", 16),
    "SK of pytorchcv": lambda: _made("pytorchcv.models.sknet.SKConvBlock", 16, 16, 1, groups=4),
    "split attention of pytorchcv": lambda: _made("pytorchcv.models.common.att.SABlock", 8, 1, 2),
}


@pytest.mark.parametrize("name", GATES)
def test_trace(name: str) -> None:
    original = support.redraw(GATES[name]()).double().eval()
    module = copy.deepcopy(original)
    assert fuse_(module).fused
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(module)
    assert support.relative(graph(x), original(x)) < 1e-12
    assert support.relative(module(x), original(x)) < 1e-12
