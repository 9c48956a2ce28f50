"""BAM and scSE against code that nobody here wrote, or the equations, in float64: outputs, gradients, statistics."""

import copy
from itertools import pairwise

import pytest
import torch
from support import assert_same_step, redraw
from torch import nn

from fused_attn import fuse_
from fused_attn.blocks import BAM, SpatialChannelSE
from fused_attn.plan import ready


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unplanned(module):
    """A copy that runs by its children."""
    other = copy.deepcopy(module)
    for child in other.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            child.register_forward_hook(lambda *a: None)
    assert ready(other) is None
    return other


# A norm takes a constant away: gradients of biases before it are 0 but for rounding.
def zero(module, training):
    if not training:
        return ()
    named = dict(module.named_modules())
    names = list(named)
    return [
        f"{name}.bias"
        for name, after in pairwise(names)
        if isinstance(named[name], nn.Linear | nn.Conv2d) and "Batch" in type(named[after]).__name__
    ]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layers", [1, 3])
def test_bam_of_pytorchcv(layers, training):
    cv = pytest.importorskip("pytorchcv.models.bamresnet")
    theirs = cv.BamBlock(32)
    theirs.ch_att = cv.ChannelGate(32, 8, num_layers=layers)
    theirs = redraw(theirs.double())
    ours = copy.deepcopy(theirs)
    fuse_(ours, strict=True)
    assert ready(ours) is not None
    for seed in range(2):
        assert_same_step(
            ours.train(training), theirs.train(training), draw(5, 32, 9, 7, seed=seed), within=1e-8,
            zero=zero(theirs, training),
        )  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options", [{}, dict(merge="sum"), dict(num_layers=2, dilation=2, num_dilated=1), dict(num_dilated=3)], ids=str
)
def test_bam(options, training):
    """The fused forward against the children's."""
    ours = redraw(BAM(16, rd_channels=4, **options).double()).train(training)
    theirs = unplanned(ours)
    assert ready(ours) is not None
    assert_same_step(ours, theirs, draw(5, 16, 8, 8), within=1e-8, zero=zero(theirs, training))


def test_bam_twice_through_one_graph():
    """What the merge leaves for the end of the backward is left by each backward anew."""
    bam, x = redraw(BAM(16, rd_channels=4).double()).eval(), draw(2, 16, 8, 8).requires_grad_()
    y = bam(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.autograd.gradcheck(bam, x, fast_mode=True)


@pytest.mark.parametrize("options", [{}, dict(reduction=4, act_layer="silu", gate_layer="identity")], ids=str)
def test_scse(options):
    ours = redraw(SpatialChannelSE(32, **options).double())
    theirs = unplanned(ours)
    assert ready(ours) is not None
    for seed in range(2):
        assert_same_step(ours, theirs, draw(3, 32, 9, 7, seed=seed), within=1e-10)


def test_scse_of_segmentation_models():
    modules = pytest.importorskip("segmentation_models_pytorch.base.modules")
    theirs = redraw(modules.SCSEModule(32).double())
    ours = copy.deepcopy(theirs)
    fuse_(ours, strict=True)
    assert ready(ours) is not None
    assert_same_step(ours, theirs, draw(3, 32, 9, 7), within=1e-10)
    own = SpatialChannelSE(32).double()
    own.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(own(draw(2, 32, 5, 5)), theirs(draw(2, 32, 5, 5)))


def test_options_are_checked():
    for options, name in ((dict(merge="x"), "merge"), (dict(num_layers=0), "num_layers")):
        with pytest.raises(ValueError, match=name):
            BAM(8, **options)
    with pytest.raises(ValueError, match="gate_layer"):
        SpatialChannelSE(8, gate_layer="x")
