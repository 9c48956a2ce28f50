"""Blocks whose norm, activation and gate ran as one lost what their forwards do besides. Found in review.

DropPath without a shortcut; a gate's own forward; the plane's size, baked into a trace; a frozen norm's promotion under
autocast; a container that was empty; a norm that its module would refuse; weights that FSDP keeps elsewhere.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import SqueezeExcite, explain, fuse_
from fused_attn.blocks import normed
from fused_attn.blocks.chain import joined

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from timm.layers import DropPath, SEModule
from timm.models import _efficientnet_blocks as mb
from timm.models import byobnet, resnet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d


def twins(module, dtype=torch.float64):
    torch.manual_seed(0)
    original = module().to(dtype).train()
    fused = copy.deepcopy(original)
    fuse_(fused)
    return original, fused


@pytest.mark.parametrize("cls", [byobnet.BasicBlock, byobnet.BottleneckBlock, byobnet.DarkBlock, byobnet.EdgeBlock])
def test_drop_path_without_a_shortcut(cls):
    how = dict(downsample="", drop_path_rate=0.5, layers=byobnet.LayerFn(attn=SEModule))
    original, fused = twins(lambda: cls(16, 24, stride=2, **how))
    assert original.shortcut is None
    assert isinstance(original.drop_path, DropPath)
    x = torch.randn(8, 16, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    want = original(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), want)


class Double(SqueezeExcite):
    def forward(self, x, *rest):
        return 2 * super().forward(x, *rest)


def test_a_gate_with_a_forward_of_its_own():
    def block():
        made = mb.InvertedResidual(16, 16, act_layer=nn.SiLU, se_layer=mb.SqueezeExcite)
        made.se = Double(16)
        return made

    original, fused = twins(block)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), original(x))
    norm, gate, x = nn.BatchNorm2d(16), Double(16), x.float()
    want = gate(copy.deepcopy(norm)(x))
    torch.testing.assert_close(joined(norm, gate, x, None, "identity"), want)


def test_traces_know_no_size():
    original, fused = twins(lambda: BasicBlock(8, 8))
    big, small = (torch.randn(2, 8, s, 8, dtype=torch.float64) for s in (8, 3))
    traced = torch.jit.trace(fused, big, check_trace=False)
    copy.deepcopy(original)(big)
    want = copy.deepcopy(original)(small)
    torch.testing.assert_close(traced(small), want)


def test_a_frozen_norm_promotes_under_autocast():
    original, fused = twins(lambda: Bottleneck(32, 8, norm_layer=FrozenBatchNorm2d), torch.float32)
    x = torch.randn(2, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = original(x), fused(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_a_container_that_was_empty():
    def block():
        made = resnet.BasicBlock(16, 16, attn_layer="se")
        made.drop_block = nn.Sequential()
        return made

    original, fused = twins(block)
    for module in (original, fused):
        module.drop_block.append(nn.Tanh())
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), original(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(1), nn.BatchNorm1d(16)])
def test_norms_that_refuse(norm):
    original, fused = twins(lambda: resnet.BasicBlock(16, 16, attn_layer="se"))
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    for module in (original.eval(), fused.eval()):
        module.bn2 = copy.deepcopy(norm).double().eval()
        with pytest.raises((RuntimeError, ValueError)):
            module(x)


@pytest.mark.parametrize("gate", ["se", partial(SEModule, norm_layer=nn.BatchNorm2d)], ids=["se", "se with a norm"])
def test_replicas_of_data_parallel(gate):
    original, fused = twins(lambda: resnet.Bottleneck(32, 8, attn_layer=gate), torch.float32)
    x = torch.randn(2, 32, 8, 8)
    for module in fused.modules():
        for name, p in list(module._parameters.items()):
            del module._parameters[name]
            object.__setattr__(module, name, None if p is None else p.detach().clone())
    torch.testing.assert_close(fused(x), original(x))


def test_no_kernel_no_tail(monkeypatch):
    """The eager form of a tail is slower than PyTorch's norm: without a kernel the norm stays."""
    _, fused = twins(lambda: BasicBlock(8, 8), torch.float32)
    x = torch.randn(2, 8, 8, 8)
    monkeypatch.setattr(normed.backend, "implementation", lambda op, name: "none here")
    assert not explain(fused, x).lines
