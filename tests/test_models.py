"""The networks: names and numbers of parameters, code that nobody here wrote, and fused against plain."""

import copy
import importlib
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import models
from fused_attn.blocks import residual_attention
from tests.support import redraw, relative, step, worst

F64 = torch.float64
# Exact numbers, and the millions that the papers or the authors' pages print.
PARAMETERS = {
    "epsanet50": (22_561_715, "22.56"),
    "epsanet101": (38_900_279, "38.90"),
    "cbam_resnet50": (28_089_624, "28.09"),
    "bam_resnet50": (25_915_099, "25.92"),
    "sknet50": (27_479_784, "27.5"),
    "sa_resnet50": (25_557_740, None),  # the paper prints 25.557, which is this number cut off
    "sge_resnet50": (25_559_080, "25.559"),
    "drsn18": (11_871_112, None),  # the authors trained others
    "drsn34": (22_266_808, None),
    "attention56": (31_810_728, None),  # the paper prints 31.9; pytorchcv has this number
    "attention92": (52_466_344, None),  # the paper prints 51.3; pytorchcv has this number
}
# One block per stage, narrow where the mechanism allows.
SMALL = {
    "epsanet50": {},
    "cbam_resnet50": {"planes": (16, 32, 32, 64)},
    "bam_resnet50": {"planes": (16, 32, 32, 64)},
    "sknet50": {"planes": (16, 32, 32, 64)},
    "sa_resnet50": {"planes": (32, 64, 64, 64)},
    "sge_resnet50": {"planes": (16, 32, 32, 64)},
    "drsn18": {"planes": (8, 16, 17, 32)},
    "attention56": {"planes": (8, 16, 16, 32)},
}
VARIANTS = [
    *((name, {}) for name in SMALL),
    ("drsn18", {"threshold": "shared"}),
    ("drsn18", {"dims": 1}),
    ("drsn18", {"dims": 1, "threshold": "shared", "rd_ratio": 1.0}),
    ("attention56", {"form": "ports"}),
    ("bam_resnet50", {"merge": "sum"}),
    ("cbam_resnet50", {"no_spatial": True}),
]
IDS = ["-".join([name, *(str(v) for v in options.values())]) for name, options in VARIANTS]


def small(name: str, **options: object) -> models.ResidualNetwork:
    ones = (1,) * len(models.NETWORKS[name].layers)
    return getattr(models, name)(num_classes=5, **{"layers": ones, **SMALL[name], **options})


def image(dims: int = 2, n: int = 4, size: int = 64, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(11)
    return torch.randn((n, channels) + (size,) * dims, generator=draw, dtype=F64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    exact, printed = PARAMETERS[name]
    with torch.device("meta"):
        model = getattr(models, name)()
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    if printed is not None:
        assert f"{count / 1e6:.{len(printed.partition('.')[2])}f}" == printed


def test_table_is_complete() -> None:
    assert set(models.NETWORKS) == set(PARAMETERS) == {name for name in models.__all__ if name[0].islower()}
    for name in PARAMETERS:
        make = getattr(models, name)
        assert make.__name__ == name
        assert "https://" in make.__doc__
        assert pickle.loads(pickle.dumps(make)) is make


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    one = {f"{name}.{kind}": (channels,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return one | {f"{name}.num_batches_tracked": ()}


def unit(inner: dict[str, tuple[int, ...]], more: dict[str, tuple[int, ...]], inplanes: int, planes: int, width: int,
         bn2: bool = True) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """A first block of a stage, written from the authors' repositories."""
    return {
        "conv1.weight": (width, inplanes, 1, 1), **norm("bn1", width), **inner, **(norm("bn2", width) if bn2 else {}),
        "conv3.weight": (4 * planes, width, 1, 1), **norm("bn3", 4 * planes),
        "downsample.0.weight": (4 * planes, inplanes, 1, 1), **norm("downsample.1", 4 * planes), **more,
    }  # fmt: skip


PLAIN = {"conv2.weight": (128, 128, 3, 3)}
GATES: dict[str, dict[str, tuple[int, ...]]] = {
    "cbam_resnet50": {
        "cbam.ChannelGate.mlp.1.weight": (32, 512), "cbam.ChannelGate.mlp.1.bias": (32,),
        "cbam.ChannelGate.mlp.3.weight": (512, 32), "cbam.ChannelGate.mlp.3.bias": (512,),
        "cbam.SpatialGate.spatial.conv.weight": (1, 2, 7, 7), **norm("cbam.SpatialGate.spatial.bn", 1),
    },
    "sa_resnet50": {f"sa.{name}": (1, 4, 1, 1) for name in ("cweight", "cbias", "sweight", "sbias")}
    | {"sa.gn.weight": (4,), "sa.gn.bias": (4,)},
    "sge_resnet50": {"sge.weight": (1, 64, 1, 1), "sge.bias": (1, 64, 1, 1)},
    "bam_resnet50": {},
}  # fmt: skip
PYRAMID = {
    "conv2.conv_1.weight": (32, 128, 3, 3), "conv2.conv_2.weight": (32, 32, 5, 5),
    "conv2.conv_3.weight": (32, 16, 7, 7), "conv2.conv_4.weight": (32, 8, 9, 9),
    "conv2.se.fc1.weight": (2, 32, 1, 1), "conv2.se.fc1.bias": (2,),
    "conv2.se.fc2.weight": (32, 2, 1, 1), "conv2.se.fc2.bias": (32,),
}  # fmt: skip
KERNELS = {
    **{f"conv2.paths.{i}.conv.weight": (256, 8, 3, 3) for i in range(2)},
    **norm("conv2.paths.0.bn", 256), **norm("conv2.paths.1.bn", 256),
    "conv2.attn.fc_reduce.weight": (32, 256, 1, 1), **norm("conv2.attn.bn", 32),
    "conv2.attn.fc_select.weight": (512, 32, 1, 1),
}  # fmt: skip
UNITS = {name: unit(PLAIN, gate, 256, 128, 128) for name, gate in GATES.items()}
UNITS["epsanet50"] = unit(PYRAMID, {}, 256, 128, 128)
UNITS["sknet50"] = unit(KERNELS, {}, 256, 128, 256, bn2=False)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("name", UNITS)
def test_names_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    assert shapes(model.layer2[0]) == UNITS[name]
    outer = {key for key in model.state_dict() if not key.startswith(("layer", "bam"))}
    assert outer == {"conv1.weight", *norm("bn1", 64), "fc.weight", "fc.bias"}
    if name == "epsanet50":
        assert model.layer2[0].conv2.reverse  # as checkpoints have it
    counts = [len(getattr(model, f"layer{i}")) for i in range(1, 5)]
    assert counts == [3, 4, 6, 3]


def test_names_of_bam() -> None:
    with torch.device("meta"):
        model = models.bam_resnet50()
    channel, spatial = "channel_att.gate_c.gate_c", "spatial_att.gate_s.gate_s"
    expected = {
        f"{channel}_fc_0.weight": (16, 256), f"{channel}_fc_0.bias": (16,), **norm(f"{channel}_bn_1", 16),
        f"{channel}_fc_final.weight": (256, 16), f"{channel}_fc_final.bias": (256,),
        f"{spatial}_conv_reduce0.weight": (16, 256, 1, 1), f"{spatial}_conv_reduce0.bias": (16,),
        **norm(f"{spatial}_bn_reduce0", 16),
        f"{spatial}_conv_di_0.weight": (16, 16, 3, 3), f"{spatial}_conv_di_0.bias": (16,),
        **norm(f"{spatial}_bn_di_0", 16),
        f"{spatial}_conv_di_1.weight": (16, 16, 3, 3), f"{spatial}_conv_di_1.bias": (16,),
        **norm(f"{spatial}_bn_di_1", 16),
        f"{spatial}_conv_final.weight": (1, 16, 1, 1), f"{spatial}_conv_final.bias": (1,),
    }  # fmt: skip
    assert shapes(model.bam1) == expected
    assert [model.get_submodule(f"bam{i}.{channel}_fc_0").in_features for i in (1, 2, 3)] == [256, 512, 1024]
    assert not hasattr(model, "bam4")


def test_initial_values() -> None:
    """What the authors start from: spatial gates of ½, no biases, shuffle attention's gates at sigmoid(1)."""
    model = small("cbam_resnet50")
    gate = model.layer1[0].cbam.SpatialGate["spatial"]["bn"]
    assert gate.momentum == 0.01
    assert not gate.weight.any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    kernel = small("epsanet50").layer3[0].conv2.conv_4.weight.detach()
    assert float(kernel.std()) == pytest.approx((2 / (81 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_forward_and_backward(name: str, options: dict) -> None:
    dims = options.get("dims", 2)
    model = small(name, **options, in_chans=2)
    x = image(dims, channels=2).float().requires_grad_()
    last = model.features(x)
    assert last.shape == (4, model.fc.in_features) + (2,) * dims
    y = model(x)
    assert y.shape == (4, 5)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["attention56", "drsn18", "cbam_resnet50"])
def test_small_input(name: str) -> None:
    """32 pixels: the stem keeps them, so that the last map is 4×4."""
    model = small(name, small_input=True)
    assert model.conv1.kernel_size == (3, 3)
    assert model.features(image(size=32).float()).shape[2:] == (4, 4)


def test_masks() -> None:
    """3, 2, 1 halvings at stages 1 to 3, one module each or 1, 2, 3; a smallest mask of 7×7 at 224 and of 4×4 at 32."""
    for name, modules in (("attention56", [1, 1, 1]), ("attention92", [1, 2, 3])):
        with torch.device("meta"):
            model = getattr(models, name)()
        for i, stage in enumerate([model.layer1, model.layer2, model.layer3]):
            found = [m for m in stage.modules() if isinstance(m, fused_attn.ResidualAttention)]
            assert len(found) == modules[i]
            assert [len(m.mask.down) for m in found] == [3 - i] * modules[i]
            # As in the authors' Caffe model: one unit on each level, and no trunk in the mask
            assert not any(m.add_trunk for m in found)
            assert {type(unit).__name__ for m in found for unit in m.mask.skip} <= {"PreActivationUnit"}
        assert len(model.layer4) == 3
    for size, small_input, least in ((224, False, 7), (32, True, 4)):
        with torch.device("meta"):
            model = small("attention56", small_input=small_input)
            sizes = []
            for m in model.modules():
                if isinstance(m, fused_attn.ResidualAttention):
                    m.mask.down[-1].register_forward_hook(lambda _m, _x, y, kept=sizes: kept.append(y.shape[-1]))
            model(torch.empty(1, 3, size, size))
        assert sizes == [least] * 3


def _bottleneck(self: models.Bottleneck, x: Tensor) -> Tensor:
    y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
    y = self.bn3(self.conv3(y if self.bn2 is None else torch.relu(self.bn2(y))))
    y = y if self.gate is None else getattr(self, self.gate)(y)
    return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shrinkage_block(self: models.ShrinkageBlock, x: Tensor) -> Tensor:
    """The shortcut as the authors write it: an average pool of one position, and zeros around its channels."""
    y = self.conv1(torch.relu(self.bn1(x)))
    y = self.conv2(torch.relu(self.bn2(y)))
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.dim() - 2]
    shortcut = pool(x, 1, self.stride)
    more = y.shape[1] - x.shape[1]
    before, after = (shortcut.new_zeros((x.shape[0], k, *y.shape[2:])) for k in (more // 2, more - more // 2))
    return self.shrinkage(y) + torch.cat([before, shortcut, after], 1)


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function with no plan and no fused op: every block by its equations, sums and activations on their own."""

    def run(function):
        with monkeypatch.context() as patch:
            for name in ("cbam", "bam", "competing", "shrinkage", "shuffle_attention", "spatial_group_enhance"):
                patch.setattr(importlib.import_module(f"fused_attn.blocks.{name}"), "ready", lambda module: None)
            patch.setattr(residual_attention, "map_scale", lambda t, z, *rest: (1 + torch.sigmoid(z)) * t)
            patch.setattr(models.Bottleneck, "forward", _bottleneck)
            patch.setattr(models.ShrinkageBlock, "forward", _shrinkage_block)
            return function()

    return run


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_fused_is_plain(name: str, options: dict, backend: str, plainly, launches) -> None:
    """Outputs, the gradient of the input and of every parameter, and the running statistics."""
    model = redraw(small(name, **options).double())
    x = image(options.get("dims", 2))
    plain = copy.deepcopy(model)
    want, expected = plainly(lambda: step(plain, x))
    assert not launches
    with fused_attn.use_backend(backend):
        y, grads = step(model, x)
    assert launches
    assert relative(y, want) < 1e-11
    scale = max(float(g.norm()) for g in expected.values())
    assert list(grads) == list(expected)
    for key, grad in grads.items():  # a gradient may be zero but for rounding, as of a bias in front of a norm
        assert float((grad - expected[key]).norm()) < 1e-9 * max(float(expected[key].norm()), 1e-4 * scale), key
    for (key, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert relative(buffer, other) < 1e-11, key


@pytest.mark.parametrize("name", ["cbam_resnet50", "sa_resnet50", "sge_resnet50", "drsn18"])
def test_sum_is_in_the_gates_pass(name: str, launches) -> None:
    """The last thing a block does is one op that is given the shortcut and, behind a gate, ReLU."""
    block = small(name).eval().layer2[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    kept: list[Tensor] = []
    if name != "drsn18":
        block.downsample.register_forward_hook(lambda _m, _x, y: kept.append(y))
    with torch.no_grad(), fused_attn.use_backend("eager"):
        y = block(x)
    assert y.shape[2:] == (4, 4)
    tensors = [t for t in launches[-1][1] if isinstance(t, Tensor)]
    if name == "drsn18":
        assert any(t.shape == y.shape and torch.equal(t[:, 4:12], x[:, :, ::2, ::2]) for t in tensors)
    else:
        assert any(t.data_ptr() == kept[0].data_ptr() for t in tensors)
        assert "relu" in launches[-1][1]


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Parameters and buffers in order, which have the same shapes but for a dense layer's."""
    a, b = list(ours.state_dict().values()), list(theirs.state_dict().values())
    assert [t.numel() for t in a] == [t.numel() for t in b]
    with torch.no_grad():
        for mine, other in zip(a, b, strict=True):
            mine.copy_(other.reshape(mine.shape))


def ordered(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def same_as(ours: nn.Module, theirs: nn.Module, training: bool) -> None:
    for module in ours.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    ours.train(training)
    theirs.train(training)
    x = image()
    y, grads = step(ours, x)
    want, expected = step(theirs, x)
    assert relative(y, want) < 1e-11
    assert relative(grads["input 0"], expected["input 0"]) < 1e-9
    found, wanted = (sorted(float(g.norm()) for g in each.values()) for each in (grads, expected))
    assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=1e-7, atol=1e-9 * max(wanted))


THEIRS = {
    "cbam_resnet50": ("cbamresnet", "CbamResNet", {"bottleneck": True}),
    "bam_resnet50": ("bamresnet", "BamResNet", {"bottleneck": True}),
    "sknet50": ("sknet", "SKNet", {}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", THEIRS)
def test_pytorchcvs_network(name: str, training: bool) -> None:
    """pytorchcv's network of the same shape, whose parameters come in the same order."""
    where, cls, options = THEIRS[name]
    planes = SMALL[name]["planes"]
    module = pytest.importorskip(f"pytorchcv.models.{where}")
    theirs = getattr(module, cls)(
        channels=[[4 * k] for k in planes], init_block_channels=planes[0], num_classes=5, **options
    ).double()
    theirs.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs is made for maps of 7×7
    redraw(theirs)
    ours = small(name).double()
    copied(ours, theirs)
    same_as(ours, theirs, training)
    for mine, other in zip(ordered(ours), ordered(theirs), strict=True):
        assert relative(mine.reshape(other.shape), other) < 1e-11


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layers", [(1, 1, 1), (1, 2, 1)])
def test_pytorchcvs_residual_attention(layers: tuple[int, ...], training: bool) -> None:
    """pytorchcv's resattnet56, narrow; its modules hold encoder, decoder and trunk in another order."""
    resattnet = pytest.importorskip("pytorchcv.models.resattnet")
    planes = SMALL["attention56"]["planes"]
    theirs = resattnet.ResAttNet(
        channels=[[4 * k] * (1 + n) for k, n in zip(planes, (*layers, 2), strict=True)],
        init_block_channels=planes[0],
        attentions=[*([0] + [1] * n for n in layers), [0, 0, 0]],
        att_scales=[1, 2, 1],
        num_classes=5,
    ).double()
    theirs.features.final_pool = nn.AdaptiveAvgPool2d(1)
    redraw(theirs)
    ours = small("attention56", layers=layers, form="ports").double()
    copied(nn.ModuleList([ours.conv1, ours.bn1]), theirs.features.init_block)
    copied(ours.norm, theirs.features.post_activ)
    copied(ours.fc, theirs.output)
    for i in range(4):
        for mine, other in zip(getattr(ours, f"layer{i + 1}"), getattr(theirs.features, f"stage{i + 1}"), strict=True):
            if isinstance(other, resattnet.ResBlock):
                copied(mine, other)
                continue
            first, attention, last = mine
            copied(first, other.init_blocks)
            copied(attention.trunk, other.hg.skip_seq[0])
            copied(attention.mask.down, other.hg.down_seq)
            copied(attention.mask.up, other.hg.up_seq)
            copied(attention.mask.skip, other.hg.skip_seq[1:])
            copied(attention.mask.logits, other.middle_block)
            copied(last, other.final_block)
    same_as(ours, theirs, training)


def test_authors_shrinkage_network() -> None:
    """The three blocks of the authors' TFLearn script, for CIFAR; its second convolution of stride 2 has 32 channels
    already."""
    model = models.drsn18(10, layers=(1, 1, 1), planes=(16, 32, 32), small_input=True)
    assert model(image(size=32).float()).shape == (4, 10)
    assert [tuple(p.shape) for p in model.layer2[0].shrinkage.parameters()] == [
        (8, 32),
        (8,),
        (8,),
        (8,),
        (32, 8),
        (32,),
    ]
    assert (model.layer3[0].stride, any(model.layer3[0].pad)) == (2, False)


@pytest.mark.parametrize("dims", [1, 2])
def test_strided_shortcut(dims: int, plainly) -> None:
    """A shortcut that is every second position of x and nothing else, so not dense in memory."""
    model = redraw(small("drsn18", planes=(8, 16, 16, 16), dims=dims).double())
    x = image(dims)
    want, expected = plainly(lambda: step(copy.deepcopy(model), x))
    y, grads = step(model, x)
    assert relative(y, want) < 1e-12
    assert worst({"x": grads["input 0"]}, {"x": expected["input 0"]}) < 1e-10


@pytest.mark.parametrize("name", SMALL)
def test_copies(name: str) -> None:
    """A deep copy, a pickled one and a state_dict give the same outputs, and the copies run by plans of their own."""
    model = redraw(small(name)).eval()
    x = image(n=2).float()
    with torch.no_grad():
        y = model(x)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = small(name).eval()
        loaded.load_state_dict(torch.load(file))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(other(x), y)


def test_channels_last() -> None:
    model = redraw(small("cbam_resnet50")).eval().to(memory_format=torch.channels_last)
    x = image(n=2).float()
    with torch.no_grad():
        assert relative(model(x.contiguous(memory_format=torch.channels_last)), model(x)) < 1e-5


def test_errors() -> None:
    with pytest.raises(TypeError, match="options must be some of groups; got colour"):
        models.sa_resnet50(colour=1)
    with pytest.raises(ValueError, match="one for each of 3 stages; got layers=\\(1, 1, 1\\), planes=\\(64, 128"):
        models.epsanet50(layers=(1, 1, 1))
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        models.drsn18(num_classes=0)
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3; got 4"):
        models.drsn18(dims=4)
    with pytest.raises(ValueError, match="form must be 'authors' or 'ports'; got 'paper'"):
        models.attention56(form="paper")
    with pytest.raises(ValueError, match="planes must not shrink"):
        models.drsn18(layers=(1, 1), planes=(32, 16))
    with pytest.raises(ValueError, match="layout must be one of 'timm', 'authors'; got 'mine'"):
        fused_attn.CBAM(32, layout="mine")
    with pytest.raises(ValueError, match="layout must be one of 'plain', 'authors'; got 'mine'"):
        fused_attn.BAM(32, layout="mine")


def test_imported_on_first_use() -> None:
    script = "import sys, fused_attn as f; assert 'fused_attn.models' not in sys.modules; f.models.drsn18"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
