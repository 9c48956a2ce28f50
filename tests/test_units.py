"""Residual units whose forward is read: authors' ResNets with their gate before the sum, libraries' MBConv, and all
that must be left alone. Each against the unfused twin in float64."""

import copy
import pickle

import pytest
import support  # noqa: F401  (before torchvision)
import torch
import torch.nn.functional as F
from support import assert_same_step, redraw
from torch import Tensor, nn

from fused_attn import explain, fuse_, unfuse_
from fused_attn.blocks import units
from fused_attn.plan import KEY
from tests.test_authors import CBAM, SpatialGroupEnhance, eca_layer

F64 = torch.float64
C = 12


def feature_map(channels: int = C, size: tuple[int, ...] = (8, 7), seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((3, channels, *size), generator=draw, dtype=F64) + 0.5


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """The ResNet block that papers' repositories copy: the gate, where there is one, before the sum."""

    expansion = 4

    def __init__(self, gate: nn.Module | None = None, channels: int = C, stride: int = 1, out: int = C) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, 6), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(6, 6, 3, stride), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = conv(6, out), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))
        self.cbam = gate

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        if not self.cbam is None:  # noqa: E714  (as it is written)
            out = self.cbam(out)
        out += residual
        out = self.relu(out)
        return out


class Squeeze(nn.Module):
    """SE as in the repositories that hold it beside a ResNet."""

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, 3, bias=False), nn.ReLU(), nn.Linear(3, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ConvNorm(nn.Module):
    """A container of a repository's own, that its units are made of."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, size)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU() if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        if self.relu is not None:
            x = self.relu(x)
        return x


class Nested(nn.Module):
    """Calls within calls, functions for layers, a flag, a gate in the middle and one at the end."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.use_se, self.last = True, last
        self.body = nn.Sequential(ConvNorm(C, 8), ConvNorm(8, 8, 3))
        self.se = Squeeze(8)
        self.project = ConvNorm(8, C, act=False)
        self.eca = eca_layer(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.use_se:
            y = self.se(y)
        y = self.project(y)
        if self.last:
            y = self.eca(y)
        return F.relu(torch.add(y, x))


class Projected(nn.Module):
    """The sum written the other way round, an activation without a child, a gate in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            conv(C, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 16, 3), nn.BatchNorm2d(16), Squeeze(16)
        )
        self.shortcut = nn.Sequential(conv(C, 16), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.shortcut(x) + self.residual_function(x))


def shrinkage(dims: int) -> type[nn.Module]:
    """Channel-wise thresholds, as ports of the deep residual shrinkage network have them."""

    class Shrinkage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gap = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Sequential(
                nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C), nn.Sigmoid()
            )  # fmt: skip

    class Signals(Shrinkage):
        def forward(self, x: Tensor) -> Tensor:
            mean = torch.flatten(self.gap(torch.abs(x)), 1)
            threshold = torch.mul(mean, self.fc(mean)).unsqueeze(2)
            return torch.mul(torch.sign(x), torch.relu(torch.abs(x) - threshold))

    class Images(Shrinkage):
        def forward(self, x: Tensor) -> Tensor:
            mean = torch.flatten(self.gap(torch.abs(x)), 1)
            threshold = torch.mul(mean, self.fc(mean)).unsqueeze(2).unsqueeze(2)
            return torch.mul(torch.sign(x), torch.relu(torch.abs(x) - threshold))

    found = Signals if dims == 1 else Images
    found.__name__ = "Shrinkage"
    return found


class Shrunk(nn.Module):
    """A residual shrinkage unit: the shrinkage is the last layer of a Sequential, and a child of its own, too."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        layer, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.shrinkage = shrinkage(dims)()
        self.residual_function = nn.Sequential(
            layer(C, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True), layer(8, C, 3, padding=1), norm(C),
            self.shrinkage,
        )  # fmt: skip
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


UNITS = {
    "cbam": (lambda: Bottleneck(CBAM()), "norm + act, norm + gate + add + act"),
    "cbam resized": (lambda: Bottleneck(CBAM(channels=24), C, 2, 24), "norm + act, norm + gate + add + act"),
    "cbam without pixels": (lambda: Bottleneck(CBAM(no_spatial=True)), "norm + act, gate + add + act"),
    "se": (lambda: Bottleneck(Squeeze()), "norm + act, norm + gate + add + act"),
    "eca": (lambda: Bottleneck(eca_layer(3)), "norm + act, norm + gate + add + act"),
    "sge": (lambda: Bottleneck(SpatialGroupEnhance()), "norm + act, gate + add + act"),
    "none": (lambda: Bottleneck(), "norm + act, norm + add + act"),
    "none, resized": (lambda: Bottleneck(None, C, 2, 16), "norm + act, norm + add + act"),
    "projected": (Projected, "norm + act, norm + gate + add + act"),
    "nested": (Nested, "norm + act, norm + act + gate, norm + gate + add + act"),
    "nested, one gate": (lambda: Nested(False), "norm + act, norm + act + gate, norm + add + act"),
}  # fmt: skip


def _libraries() -> dict[str, tuple[object, str, int, tuple[str, ...]]]:
    """Each: how it is made, what the report says, the channels of x, and gradients that are zero (a norm follows)."""
    pytest.importorskip("pytorchcv")
    pytest.importorskip("timm")
    from pytorchcv.models import (
        efficientnet,
        efficientnetedge,
        ghostnet,
        mixnet,
        mnasnet,
        mobilenetv3,
        regnet,
        resnesta,
        sknet,
    )  # fmt: skip
    from pytorchcv.models.common.activ import lambda_hswish, lambda_swish
    from pytorchcv.models.common.norm import lambda_batchnorm2d
    from timm.layers import DropPath
    from timm.models import resnest

    norm, swish = lambda_batchnorm2d(), lambda_swish()
    first, mbconv, plain = "norm + act, norm + act + gate", "norm + act, norm + act + gate, norm + add", "norm + act"
    effi = lambda c, size, stride, tf: efficientnet.EffiInvResUnit(8, c, size, stride, 2, 4, norm, swish, tf)
    nest = lambda **how: resnest.ResNestBottleneck(16, 4, radix=2, norm_layer=nn.BatchNorm2d, **how)
    return {
        "EffiInvResUnit": (lambda: effi(8, 3, 1, False), mbconv, 8, ()),
        "EffiInvResUnit, TensorFlow's padding": (lambda: effi(10, 5, 2, True), first, 8, ()),
        "EffiDwsConvUnit, TensorFlow's padding": (
            lambda: efficientnet.EffiDwsConvUnit(8, 8, 1, norm, swish, True), "norm + act + gate, norm + add", 8, (),
        ),
        "EffiEdgeResUnit": (
            lambda: efficientnetedge.EffiEdgeResUnit(8, 8, 1, 2, 4, True, True, norm, swish),
            "norm + act + gate, norm + add", 8, (),
        ),
        "MobileNetV3Unit": (
            lambda: mobilenetv3.MobileNetV3Unit(8, 8, 16, 1, True, lambda_hswish(), True), mbconv, 8, (),
        ),
        "DwsExpSEResUnit": (lambda: mnasnet.DwsExpSEResUnit(8, 8, 1, True, 3, 4), mbconv, 8, ()),
        "MixUnit": (lambda: mixnet.MixUnit(8, 8, 1, 2, 3, 2, 2, 2, swish), mbconv, 8, ()),
        "GhostUnit": (lambda: ghostnet.GhostUnit(8, 12, 2, True, 2, True), "norm + gate", 8, ()),
        "RegNetUnit": (lambda: regnet.RegNetUnit(8, 16, 2, 8, True), first + ", norm + add + act", 8, ()),
        "SKNetUnit": (lambda: sknet.SKNetUnit(64, 64, 1), plain + ", norm + add + act", 64, ()),
        "ResNeStAUnit": (
            lambda: resnesta.ResNeStAUnit(16, 32, 2), plain + ", norm + add + act", 16, ("body.conv2.att.conv1.bias",),
        ),
        "ResNeStAUnit, two layers": (
            lambda: resnesta.ResNeStAUnit(16, 16, 1, False), "norm + act, gate", 16,
            ("body.conv2.att.conv1.bias",),
        ),
        "resnest": (nest, plain + ", norm + add + act", 16, ("conv2.fc1.bias",)),
        "resnest, drop_path": (
            lambda: nest(drop_path=DropPath(0.5), downsample=nn.Sequential(conv(16, 16), nn.BatchNorm2d(16))),
            plain + ", norm + add + act", 16, ("conv2.fc1.bias",),
        ),
    }  # fmt: skip


def made(make: object) -> nn.Module:
    torch.manual_seed(0)
    return redraw(make()).to(F64)  # type: ignore[operator]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", UNITS)
def test_units(name: str, training: bool) -> None:
    original = made(UNITS[name][0]).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert [row.part for row in report.rows if row.name == ""] == [UNITS[name][1]]
    assert report.refused == []
    x = feature_map()
    assert_same_step(module, original, x, within=1e-9)
    assert not [line for line in explain(module, x).lines if line.backend == "unfused"]
    again = pickle.loads(pickle.dumps(module))
    assert KEY in vars(again)
    assert torch.equal(again(x), copy.deepcopy(module)(x))
    assert type(unfuse_(module)) is type(original)


@pytest.mark.parametrize("name", ["cbam resized", "projected", "nested"])
def test_hooks_on_swallowed_children(name: str) -> None:
    """A hook on any child, container or layer, is called as often as in the original, and numbers stay."""
    original, x = made(UNITS[name][0]).train(), feature_map()
    for path, _ in original.named_modules():
        if path == "":
            continue
        module, plain = copy.deepcopy(original), copy.deepcopy(original)
        fuse_(module)
        module(x), plain(x)
        called: list[int] = []
        for which, m in enumerate((module, plain)):
            m.get_submodule(path).register_forward_hook(lambda *_, seen=called, which=which: seen.append(which))
        assert torch.allclose(module(x), plain(x), rtol=1e-9, atol=1e-9), path
        assert called.count(0) == called.count(1), path


def test_what_decides_is_looked_at_on_every_call() -> None:
    original = made(Nested)
    module, x = copy.deepcopy(original), feature_map()
    fuse_(module)
    for change in (
        lambda m: setattr(m, "last", False),
        lambda m: setattr(m, "use_se", False),
        lambda m: setattr(m.project, "relu", nn.ReLU()),
        lambda m: setattr(m.body[1], "bn", None),
        lambda m: m.body.append(nn.Tanh()),
    ):
        for m in (module, original):
            change(m)
        assert_same_step(module, original, x, within=1e-9)


def test_a_unit_goes_with_its_last_reference() -> None:
    """What was read holds nothing of the module, which is freed at once."""
    import gc
    import weakref

    module = made(Nested)
    fuse_(module)
    gc.disable()
    try:
        parameter = weakref.ref(module.project.conv.weight)
        del module
        assert parameter() is None
    finally:
        gc.enable()


class PreActivated(Bottleneck):
    """The shortcut starts behind the first activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn3(x))
        return self.bn3(self.conv3(self.bn1(self.conv1(y)))) + y


class Inplace(Bottleneck):
    """An activation changes x before it is added."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        return self.bn3(self.conv3(self.bn1(self.conv1(y)))) + x


class Scaled(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn3(self.conv3(self.bn1(self.conv1(x)))) * 0.5 + x)


class Unused(Bottleneck):
    """A norm whose output nobody takes keeps its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn2(self.conv1(x))
        y = self.bn2(self.conv1(x))
        y = self.bn1(self.conv1(x))
        return self.relu(self.bn3(self.conv3(y)) + x)


class IntoInput(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = self.bn3(self.conv3(self.bn1(y)))
        x += y
        return self.relu(x)


class Aliased(Bottleneck):
    """What the sum is written into has another name, which is used."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(self.bn1(self.conv1(x))))
        z = y
        y += x
        return self.relu(z)


class Dropped(Bottleneck):
    """Random numbers on both sides, in an order of their own."""

    def __init__(self) -> None:
        super().__init__(None, C, 1, 16)
        self.downsample.append(nn.Dropout(0.5))


class Looped(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.conv1, self.bn1, self.conv3, self.bn3):
            y = layer(y)
        return self.relu(y + x)


class Told(Bottleneck):
    """Training decides."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(self.bn1(self.conv1(x))))
        if self.training:
            y = self.relu(y)
        return self.relu(y + x)


class Called(Bottleneck):
    def branch(self, x: Tensor) -> Tensor:
        return self.bn3(self.conv3(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + x)


class Twice(Bottleneck):
    """What is added to is added again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(self.bn1(self.conv1(x))))
        return self.relu(y + x + x)


class More(Bottleneck):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.relu(self.bn3(self.conv3(self.bn1(self.conv1(x)))) + x)


LEFT = (PreActivated, Inplace, Scaled, Unused, IntoInput, Aliased, Dropped, Looped, Told, Called, Twice, More)


@pytest.mark.parametrize("cls", LEFT)
def test_what_is_left_alone(cls: type[nn.Module]) -> None:
    module = made(cls)
    assert fuse_(module).rows == []
    assert type(module) is cls


def test_a_changed_forward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass with a forward of its own is read for itself; a method put in its place later runs."""
    module = made(Bottleneck)
    fuse_(module)
    monkeypatch.setattr(Bottleneck, "forward", Scaled.forward)
    x = feature_map()
    plain = unfuse_(copy.deepcopy(module))
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("name", ["cbam resized", "projected", "nested"])
def test_the_proof_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut that is left out is seen."""
    original = made(UNITS[name][0])
    module = copy.deepcopy(original)
    fuse_(module)
    monkeypatch.setattr(units.Unit, "shortcut", lambda self, module, x: None)
    with pytest.raises(AssertionError):
        assert_same_step(module, original, feature_map(), within=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", _libraries())
def test_libraries(name: str, training: bool) -> None:
    """The units of pytorchcv and timm, and which of their parts run as one. The same random numbers are drawn."""
    make, part, channels, zero = _libraries()[name]
    original = made(make).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert [row.part for row in report.rows if row.name == ""] == [part]
    assert report.refused == []
    x = feature_map(channels, (9, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = module(x)
        torch.manual_seed(0)
        assert torch.allclose(y, original(x), rtol=1e-6, atol=1e-6)
    if "drop_path" in name:
        module.drop_path = original.drop_path = None
    assert_same_step(module, original, x, within=1e-6, zero=zero if training else ())  # hard gates round 1/6 to float32
    unfused = [line.reason[:15] for line in explain(module, x).lines if line.backend == "unfused"]
    # The gate at the end merges its input's splits: it can't take a shortcut of another shape.
    assert unfused == ["the shortcut is"] * ("two layers" in name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", [1, 2])
def test_shrinkage_units(dims: int, training: bool) -> None:
    """The whole unit of a port of DRSN: norms and activations, the sum and ReLU behind the thresholds; for signals."""
    original = made(lambda: Shrunk(dims)).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert [(row.name, row.part) for row in report.rows] == [
        ("", "norm + act, gate + add + act"), ("shrinkage", "gate"),
    ]  # fmt: skip
    x = feature_map(C, (9, 8)[:dims])
    zero = ["shrinkage.fc.0.bias", "residual_function.0.bias", "residual_function.3.bias"]
    assert_same_step(module, original, x, within=1e-9, zero=zero if training else ())
    assert not [line for line in explain(module, x).lines if line.backend == "unfused"]
