"""CBAM against code that nobody here wrote, in float64: outputs, gradients and running statistics, by conversion."""

import copy

import pytest
import torch
from support import assert_same_step, redraw
from torch import nn

from fused_attn import fuse_, testing, unfuse_
from fused_attn.blocks import CBAM
from fused_attn.plan import ready

F64 = torch.float64


def draw(*shape, seed=0, integers=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x.round().clamp(-1, 1) if integers else x


def converted(module):
    """The module, and a converted copy of it."""
    module = redraw(module.double())
    fused = copy.deepcopy(module)
    report = fuse_(fused, strict=True)
    assert report.fused, report
    assert ready(fused) is not None or any(ready(m) is not None for m in fused.modules())
    return module, fused


TIMM = [
    {},
    dict(rd_channels=3, mlp_bias=True),
    dict(rd_channels=4, spatial_kernel_size=3, act_layer=nn.SiLU),
    # timm's own: the backward of torch's rounds 1/6 to float32
    dict(rd_channels=4, gate_layer="timm.layers.activations.HardSigmoid", act_layer=nn.LeakyReLU),
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("options", TIMM, ids=str)
@pytest.mark.parametrize("light", ["", "Light"])
def test_timm(light, options, ties, training):
    cbam = pytest.importorskip("timm.layers.cbam")
    if light and "gate_layer" in options:
        pytest.skip("its spatial gate takes no layer")
    if "gate_layer" in options:
        options = {**options, "gate_layer": pytest.importorskip("timm.layers.activations").HardSigmoid}
    try:
        made = getattr(cbam, f"{light}CbamModule")(32, **options)
    except TypeError:
        made = getattr(cbam, f"{light}CbamModule")(32, **{**options, "act_layer": lambda inplace: nn.SiLU()})
    theirs, ours = converted(made)
    for seed, layout in enumerate(("contiguous", "channels_last")):
        x = testing.arrange(draw(3, 32, 9, 7, seed=seed, integers=ties), layout)
        # A gate that the ReLU of a drawn MLP cuts off may have gradients of 0: compared by size, not by ratio.
        assert_same_step(ours.train(training), theirs.train(training), x, within=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_pytorchcv(ties, training):
    module = pytest.importorskip("pytorchcv.models.cbamresnet")
    theirs, ours = converted(module.CbamBlock(32, 8))
    for seed in range(2):
        assert_same_step(
            ours.train(training), theirs.train(training), draw(3, 32, 9, 7, seed=seed, integers=ties), within=1e-9
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("channels", "stride"), [((32, 32), 1), ((16, 32), 2)])
def test_pytorchcv_unit(channels, stride, training):
    """The residual add and ReLU of the parent are in the gate's pass."""
    module = pytest.importorskip("pytorchcv.models.cbamresnet")
    theirs, ours = converted(module.CbamResUnit(*channels, stride, True))
    assert ready(ours) is not None
    assert_same_step(ours.train(training), theirs.train(training), draw(3, channels[0], 8, 8), within=1e-9)


def test_weights_flip_between_orders():
    """timm's order and the authors' are the same network with the convolution's planes swapped."""
    one = redraw(CBAM(16, rd_channels=4).double())
    other = CBAM(16, rd_channels=4, order="max_mean").double()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.spatial.conv.conv.weight.copy_(one.spatial.conv.conv.weight.flip(1))
    x = draw(2, 16, 6, 6)
    torch.testing.assert_close(one.eval()(x), other.eval()(x))


def test_timm_state_dict():
    cbam = pytest.importorskip("timm.layers.cbam")
    theirs, ours = redraw(cbam.CbamModule(32).double()), CBAM(32).double()
    ours.load_state_dict(theirs.state_dict())
    x = draw(2, 32, 7, 7)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.spatial.conv, "bn", nn.GroupNorm(1, 1)),
        lambda m: setattr(m.spatial.conv, "conv", nn.Conv2d(2, 1, 7, padding=3, padding_mode="circular")),
        lambda m: setattr(m.channel, "act", nn.Tanh()),
        lambda m: m.spatial.conv.conv.register_forward_hook(lambda *a: None),
        lambda m: setattr(m, "channel", nn.Identity()),
    ],
)
def test_what_changes_inside_is_refused(change):
    """Before conversion and after it: two modules deep, nothing passes unseen."""
    cbam = pytest.importorskip("timm.layers.cbam")
    early, late = cbam.CbamModule(16), cbam.CbamModule(16)
    change(early)
    report = fuse_(early)
    assert not report.fused
    assert report.refused
    fuse_(late)
    assert ready(late) is not None
    change(late)
    assert ready(late) is None
    unfuse_(late)


@pytest.mark.parametrize("options", [dict(order="x"), dict(ties="x"), dict(pool_types=("x",)), dict(pool_types=()),
                                     dict(spatial_kernel_size=4), dict(dims=4), dict(act_layer="x"),
                                     dict(light=True, pool_types=("avg",))], ids=str)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CBAM(8, **options)


@pytest.mark.parametrize("pools", [("avg",), ("max",), ("lp",), ("lse",), ("avg", "max", "lp", "lse"), ("max", "lp")])
@pytest.mark.parametrize("ties", ["split", "first"])
@pytest.mark.parametrize("spatial", [True, False])
def test_pool_types(pools, ties, spatial):
    """The fused forward against the children's, in float64, with gradients."""
    ours = redraw(CBAM(12, rd_channels=4, mlp_bias=True, pool_types=pools, ties=ties, no_spatial=not spatial).double())
    theirs = copy.deepcopy(ours)
    theirs.channel["fc1"].register_forward_hook(lambda *a: None)
    assert ready(ours) is not None
    assert ready(theirs) is None
    assert_same_step(ours.train(), theirs.train(), draw(3, 12, 5, 6), within=1e-9)
