"""The authors' modules, written anew from their equations with their parameters' names: fused where the forward is
theirs, refused with the reason where it is another under the same name."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import blocks, fuse_, unfuse_
from fused_attn.blocks import authors
from fused_attn.plan import ready, unfused_observers
from tests.support import assert_same_step, redraw

F64 = torch.float64
Make = Callable[[], nn.Module]


def feature_map(*shape: int, seed: int = 0, integers: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x.round().relu() if integers else x


class eca_layer(nn.Module):
    """Equation 6 of ECA-Net."""

    def __init__(self, taps: int = 5) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, taps, padding=taps // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        row = self.avg_pool(x).flatten(1).unsqueeze(1)
        gate = self.sigmoid(self.conv(row))
        return x * gate.squeeze(1)[:, :, None, None]


class sa_layer(nn.Module):
    """Equations 2 to 5 of SA-Net."""

    def __init__(self, channels: int = 24, groups: int = 4) -> None:
        super().__init__()
        k = channels // (2 * groups)
        self.groups = groups
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        for name in ("cweight", "cbias", "sweight", "sbias"):
            self.register_parameter(name, nn.Parameter(torch.full((1, k, 1, 1), float(name.endswith("bias")))))
        self.sigmoid = nn.Sigmoid()
        self.gn = nn.GroupNorm(k, k)

    @staticmethod
    def channel_shuffle(v: Tensor, groups: int) -> Tensor:
        n, c, h, w = v.shape
        return v.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        first, second = x.reshape(n * self.groups, c // self.groups, h, w).chunk(2, 1)
        first = first * self.sigmoid(self.cweight * self.avg_pool(first) + self.cbias)
        second = second * self.sigmoid(self.sweight * self.gn(second) + self.sbias)
        return self.channel_shuffle(torch.cat((first, second), 1).reshape(n, c, h, w), 2)


class SpatialGroupEnhance(nn.Module):
    """Equations 1 to 4 of SGE, with the unbiased deviation."""

    def __init__(self, groups: int = 3, offset: float = 1.0) -> None:
        super().__init__()
        self.groups = groups
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.full((1, groups, 1, 1), offset))
        self.sig = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        v = x.reshape(n * self.groups, c // self.groups, h, w)
        t = (v * self.avg_pool(v)).sum(1).flatten(1)
        t = t - t.mean(1, keepdim=True)
        t = t / (t.std(1, keepdim=True) + 1e-5)
        a = t.reshape(n, self.groups, h, w) * self.weight + self.bias
        return (v * self.sig(a.reshape(n * self.groups, 1, h, w))).reshape(n, c, h, w)


class Flat(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return p.reshape(p.size(0), -1)


def log_sum_exp(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    most = rows.max(2, keepdim=True).values
    return most + (rows - most).exp().sum(2, keepdim=True).log()


class ChannelGate(nn.Module):
    def __init__(self, channels: int, reduction: int, kinds: list[str]) -> None:
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(Flat(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.pool_types = kinds

    def forward(self, x: Tensor) -> Tensor:
        logits = None
        for kind in self.pool_types:
            if kind == "avg":
                pooled = F.adaptive_avg_pool2d(x, 1)
            elif kind == "max":
                pooled = F.max_pool2d(x, (x.size(2), x.size(3)))
            elif kind == "lp":
                pooled = F.lp_pool2d(x, 2, (x.size(2), x.size(3)))
            else:
                pooled = log_sum_exp(x)
            more = self.mlp(pooled)
            logits = more if logits is None else logits + more
        return x * torch.sigmoid(logits)[:, :, None, None]


class Compress(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((torch.max(x, 1)[0], torch.mean(x, 1)), 1)


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        self.relu = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if self.relu is not None:
            x = self.relu(x)
        return x


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.compress, self.spatial = Compress(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.spatial(self.compress(x)))


class CBAM(nn.Module):
    """Equations 1 to 3 of CBAM."""

    def __init__(self, kinds: tuple[str, ...] = ("avg", "max"), no_spatial: bool = False, channels: int = 12) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(channels, 3, list(kinds))
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ChannelGate(x)
        return y if self.no_spatial else self.SpatialGate(y)


class BamChannel(nn.Module):
    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels] + [channels // 4] * layers
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("flatten", Flat())
        for i in range(layers):
            self.gate_c.add_module(f"gate_c_fc_{i}", nn.Linear(widths[i], widths[i + 1]))
            self.gate_c.add_module(f"gate_c_bn_{i + 1}", nn.BatchNorm1d(widths[i + 1]))
            self.gate_c.add_module(f"gate_c_relu_{i + 1}", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", nn.Linear(widths[-1], channels))

    def forward(self, x: Tensor) -> Tensor:
        side = x.size(2)
        return self.gate_c(F.avg_pool2d(x, side, stride=side))[:, :, None, None].expand_as(x)


class BamSpatial(nn.Module):
    def __init__(self, channels: int, dilated: int = 2) -> None:
        super().__init__()
        h, self.gate_s = channels // 4, nn.Sequential()
        layers = [("reduce0", nn.Conv2d(channels, h, 1))]
        layers += [(f"di_{i}", nn.Conv2d(h, h, 3, padding=4, dilation=4)) for i in range(dilated)]
        for name, conv in layers:
            self.gate_s.add_module(f"gate_s_conv_{name}", conv)
            self.gate_s.add_module(f"gate_s_bn_{name}", nn.BatchNorm2d(h))
            self.gate_s.add_module(f"gate_s_relu_{name}", nn.ReLU())
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(h, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_s(x).expand_as(x)


class BAM(nn.Module):
    """Equations 1 to 5 of BAM, with the product of the authors' code."""

    def __init__(self, channels: int = 12, layers: int = 1) -> None:
        super().__init__()
        self.channel_att, self.spatial_att = BamChannel(channels, layers), BamSpatial(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.sigmoid(self.channel_att(x) * self.spatial_att(x)))


class _UltralyticsChannel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.fc, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(self.pool(x))) * x


class _UltralyticsSpatial(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.cv1, self.act = nn.Conv2d(2, 1, size, padding=size // 2, bias=False), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]), 1)
        return self.act(self.cv1(both)) * x


def ultralytics(size: int = 7) -> nn.Module:
    """One layer, on the mean alone, then a convolution without a norm; under the path of that package."""

    class CBAM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channel_attention, self.spatial_attention = _UltralyticsChannel(12), _UltralyticsSpatial(size)

        def forward(self, x: Tensor) -> Tensor:
            return self.spatial_attention(self.channel_attention(x))

    for thing, name in ((CBAM, "CBAM"), (CBAM.forward, "CBAM.forward")):
        thing.__module__, thing.__qualname__ = "ultralytics.nn.modules.conv", name
    return CBAM()


FUSED: dict[str, tuple[Make, tuple[int, ...]]] = {
    "eca": (eca_layer, (3, 13, 5, 7)),
    "eca, one tap": (lambda: eca_layer(1), (2, 4, 6, 3)),
    "shuffle": (sa_layer, (3, 24, 5, 7)),
    "shuffle, groups of 2": (lambda: sa_layer(8, 4), (2, 8, 3, 4)),
    "sge": (SpatialGroupEnhance, (3, 12, 5, 7)),
    "sge, another offset": (lambda: SpatialGroupEnhance(4, 0.0), (2, 8, 3, 4)),
    "cbam": (CBAM, (3, 12, 9, 8)),
    "cbam, four pools": (lambda: CBAM(("max", "lse", "lp", "avg")), (3, 12, 5, 7)),
    "cbam, maxima": (lambda: CBAM(("max",)), (3, 12, 5, 7)),
    "cbam, channels": (lambda: CBAM(no_spatial=True), (3, 12, 5, 7)),
    "bam": (BAM, (3, 12, 7, 7)),
    "bam, two layers": (lambda: BAM(layers=2), (4, 12, 6, 6)),
    "ultralytics": (ultralytics, (3, 12, 9, 8)),
    "ultralytics, 3": (lambda: ultralytics(3), (3, 12, 5, 7)),
}


def converted(make: Make) -> tuple[nn.Module, nn.Module]:
    """The module as it was, and fused with the same numbers."""
    plain = redraw(make().double())
    fused = copy.deepcopy(plain)
    report = fuse_(fused)
    assert report.fused == [""], report
    return plain, fused


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, training: bool) -> None:
    """Output, all gradients and running statistics, also where many pixels and channels are equal."""
    make, shape = FUSED[name]
    plain, fused = converted(make)
    zero = [f"channel_att.gate_c.gate_c_fc_{i}.bias" for i in range(2)] if training else []
    zero += [f"spatial_att.gate_s.gate_s_conv_{k}.bias" for k in ("reduce0", "di_0", "di_1")] if training else []
    said: list[str] = []
    unfused_observers.append(lambda module, why: said.append(why))
    try:
        for seed, integers in ((0, False), (1, True)):
            x = feature_map(*shape, seed=seed, integers=integers)
            # A log of a sum of exponentials, and a root at 0, have no gradient to compare where all is 0.
            x = x + 0.5 if "pools" in name else x
            assert_same_step(fused.train(training), plain.train(training), x, within=1e-9, zero=zero)
    finally:
        unfused_observers.pop()
    assert not said
    assert ready(fused) is not None
    assert type(unfuse_(fused)) is type(plain)


@pytest.mark.parametrize("name", FUSED)
def test_a_module_at_work_keeps_its_plan(name: str) -> None:
    """The proof isn't given anew on each call, and isn't missed in half precision."""
    make, shape = FUSED[name]
    fused = make().eval()
    x = feature_map(*shape).float()
    want = fused(x)
    fuse_(fused)
    plan = ready(fused)
    torch.testing.assert_close(fused(x), want)
    assert plan is not None
    assert ready(fused) is plan


def variant(base: type[nn.Module], **methods: Callable[..., Tensor]) -> Make:
    """A class of the same name with other methods."""

    def make() -> nn.Module:
        module = base()
        made = type(base.__name__, (nn.Module,), {**vars(base), **methods})
        for name, method in methods.items():
            method = getattr(method, "__func__", method)
            method.__module__, method.__qualname__ = __name__, f"{base.__name__}.{name}"
        made.__module__, made.__qualname__ = __name__, base.__name__
        module.__class__ = made
        return module

    return make


def _biased(self, x):
    n, c, h, w = x.size()
    v = x.reshape(n * self.groups, c // self.groups, h, w)
    t = (v * self.avg_pool(v)).sum(1).flatten(1)
    t = t - t.mean(1, keepdim=True)
    t = t / (t.std(1, unbiased=False, keepdim=True) + 1e-5)
    a = t.reshape(n, self.groups, h, w) * self.weight + self.bias
    return (v * self.sig(a.reshape(n * self.groups, 1, h, w))).reshape(n, c, h, w)


def _inside(self, x):
    n, c, h, w = x.size()
    v = x.reshape(n * self.groups, c // self.groups, h, w)
    t = (v * self.avg_pool(v)).sum(1).flatten(1)
    t = t - t.mean(1, keepdim=True)
    t = t / (t.var(1, keepdim=True) + 1e-5).sqrt()
    a = t.reshape(n, self.groups, h, w) * self.weight + self.bias
    return (v * self.sig(a.reshape(n * self.groups, 1, h, w))).reshape(n, c, h, w)


def _floor(self, x):
    n, c, h, w = x.size()
    v = x.reshape(n * self.groups, c // self.groups, h, w)
    t = (v * self.avg_pool(v)).sum(1).flatten(1)
    t = t - t.mean(1, keepdim=True)
    t = t / (t.std(1, keepdim=True).clamp(min=1e-12) + 1e-5)
    a = t.reshape(n, self.groups, h, w) * self.weight + self.bias
    return (v * self.sig(a.reshape(n * self.groups, 1, h, w))).reshape(n, c, h, w)


def _in_place(self, x):
    n, c, h, w = x.size()
    v = x.view(n * self.groups, c // self.groups, h, w)
    t = (v * self.avg_pool(v)).sum(1).flatten(1)
    t = t - t.mean(1, keepdim=True)
    t = t / (t.std(1, keepdim=True) + 1e-5)
    a = t.reshape(n, self.groups, h, w) * self.weight + self.bias
    v *= self.sig(a.reshape(n * self.groups, 1, h, w))
    return v.view(n, c, h, w)


def _other_shuffle(v, groups):
    n, c, h, w = v.shape
    return v.reshape(n, c // groups, groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _sum(self, x):
    return x * (1 + torch.sigmoid(self.channel_att(x) + self.spatial_att(x)))


def _residual(self, x):
    return x + self.SpatialGate(self.ChannelGate(x))


def _branch(self, x):
    return x * self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None] if x.size(2) > 3 else x


def _training(self, x):
    gate = self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None]
    return x * gate if self.training else gate * x


def _keeping(self, x):
    self.gate = self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None]
    return x * self.gate


def _finite(self, x):
    return x * self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)).nan_to_num()).squeeze(1)[:, :, None, None]


def _wide(self, x):
    return x.double() * self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None]


def _counting(self, x):
    self.conv.weight.data.add_(1)
    return x * self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)) * 1).squeeze(1)[:, :, None, None]


def _bound(self, x):
    return x * self.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1)).clamp(max=1e9)).squeeze(1)[:, :, None, None]


def changed(base: Make, change: Callable[[nn.Module], object]) -> Make:
    def make() -> nn.Module:
        module = base()
        change(module)
        return module

    return make


class _Split(nn.Module):
    """Divides a maximum's gradient evenly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((torch.amax(x, 1), torch.mean(x, 1)), 1)


class _MeanFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((torch.mean(x, 1), torch.max(x, 1)[0]), 1)


_NUMBERS = "gives other numbers"
REFUSED: dict[str, tuple[Make, str]] = {
    "eca, a bias": (changed(eca_layer, lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 5, padding=2))), "has conv.bias"),
    "eca, circular": (
        changed(eca_layer, lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 5, padding=2, padding_mode="circular",
                                                                  bias=False))),
        "not a convolution",
    ),
    "eca, on a size": (variant(eca_layer, forward=_branch), "has a IfExp in line"),
    "eca, on training": (variant(eca_layer, forward=_training), "reads self.training"),
    "eca, a bound": (variant(eca_layer, forward=_bound), r"has the number 1000000000\.0"),
    "eca, keeps its gate": (variant(eca_layer, forward=_keeping), "sets self.gate"),
    "eca, finite": (variant(eca_layer, forward=_finite), "has nan_to_num in line"),
    "eca, wide": (variant(eca_layer, forward=_wide), "has double in line"),
    "eca, moves its weight": (variant(eca_layer, forward=_counting), _NUMBERS),
    "eca, a hook": (
        changed(eca_layer, lambda m: m.avg_pool.register_forward_hook(lambda *args: None)), "avg_pool has hooks"
    ),
    "eca, pooled to two": (
        changed(eca_layer, lambda m: setattr(m, "avg_pool", nn.AdaptiveAvgPool2d(2))), "not of output size 1"
    ),
    "eca, dropout": (changed(eca_layer, lambda m: setattr(m, "avg_pool", nn.Dropout(0.0))), "is a torch.*Dropout"),
    "shuffle, another order": (variant(sa_layer, channel_shuffle=staticmethod(_other_shuffle)), _NUMBERS),
    "shuffle, of two groups": (changed(sa_layer, lambda m: setattr(m, "gn", nn.GroupNorm(1, 3))), "each plane"),
    "sge, biased": (variant(SpatialGroupEnhance, forward=_biased), _NUMBERS),
    "sge, eps inside": (variant(SpatialGroupEnhance, forward=_inside), _NUMBERS),
    "sge, a floor": (variant(SpatialGroupEnhance, forward=_floor), "has the number 1e-12"),
    "sge, in place": (variant(SpatialGroupEnhance, forward=_in_place), "changes its input"),
    "bam, a sum": (variant(BAM, forward=_sum), _NUMBERS),
    "cbam, a residual": (variant(CBAM, forward=_residual), _NUMBERS),
    "cbam, mean first": (changed(CBAM, lambda m: setattr(m.SpatialGate, "compress", _MeanFirst())), _NUMBERS),
    "cbam, divided ties": (changed(CBAM, lambda m: setattr(m.SpatialGate, "compress", _Split())), _NUMBERS),
    "cbam, a rectifier": (changed(CBAM, lambda m: setattr(m.SpatialGate.spatial, "relu", nn.ReLU())), _NUMBERS),
    "cbam, no norm": (changed(CBAM, lambda m: setattr(m.SpatialGate.spatial, "bn", nn.Identity())), "has no Spatial"),
    "cbam, another pool": (lambda: CBAM(("avg", "median")), "pool_types is"),
    "cbam, others' names": (changed(CBAM, lambda m: m.__delattr__("ChannelGate")), "neither the authors'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, why = REFUSED[name]
    module = make()
    before = type(module)
    ((_, reason),) = fuse_(module).refused
    assert re.search(why, reason), reason
    assert type(module) is before


@pytest.mark.parametrize("name", ["eca", "shuffle", "sge", "cbam", "bam"])
def test_a_variant_with_the_same_maths_is_fused(name: str) -> None:
    """What `variant` makes is refused for its maths, not for how it is made."""
    base = {"eca": eca_layer, "shuffle": sa_layer, "sge": SpatialGroupEnhance, "cbam": CBAM, "bam": BAM}[name]
    assert fuse_(variant(base)()).fused == [""]


CHANGES = {
    "groups": (sa_layer, lambda m: setattr(m, "groups", 2)),
    "pools": (CBAM, lambda m: m.ChannelGate.pool_types.append("avg")),
    "flag": (CBAM, lambda m: setattr(m, "no_spatial", True)),
    "hook": (CBAM, lambda m: m.SpatialGate.compress.register_forward_hook(lambda *args: None)),
    "child": (CBAM, lambda m: setattr(m.SpatialGate, "compress", _MeanFirst())),
    "rectifier": (CBAM, lambda m: setattr(m.SpatialGate.spatial, "relu", nn.ReLU())),
    "pooling": (eca_layer, lambda m: setattr(m.avg_pool, "output_size", 2)),
    "shuffle": (sa_layer, lambda m: setattr(m, "channel_shuffle", _other_shuffle)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_fusing_is_seen(name: str) -> None:
    make, change = CHANGES[name]
    plain, fused = converted(make)
    channels = {eca_layer: 11, sa_layer: 24, CBAM: 12}[make]
    x = feature_map(3, channels, 7, 5)
    assert_same_step(fused, plain, x, within=1e-9)
    change(plain), change(fused)
    assert (ready(fused) is None) == (name != "groups")  # of other groups, proved anew
    for module in (plain, fused):
        module.eval()
    try:
        want = plain(x)
    except RuntimeError as error:
        with pytest.raises(type(error)):
            fused(x)
    else:
        assert torch.equal(fused(x), want)


def test_maps_that_the_proof_leaves_out() -> None:
    """Another rank or number of channels, and for BAM another shape, take the module's own forward."""
    plain, fused = converted(BAM)
    plain.eval(), fused.eval()
    x = feature_map(2, 12, 5, 8)  # the mean of a square of side 5
    assert torch.equal(fused(x), plain(x))
    plain, fused = converted(lambda: sa_layer(8, 4))
    for shape in ((2, 16, 4, 4), (8, 4, 4)):
        try:
            want = plain(feature_map(*shape))
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                fused(feature_map(*shape))
        else:
            assert torch.equal(fused(feature_map(*shape)), want)


def test_where_fuse_is_called_does_not_matter() -> None:
    """No gradients, frozen parameters, autocast, inference mode, a forced backend: a trial has its own."""
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16),
                   fused_attn.use_backend("triton")):  # fmt: skip
        authors._proved.clear()
        module = CBAM().requires_grad_(False)
        state = torch.get_rng_state()
        with around:
            assert fuse_(module).fused == [""]
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("base", [eca_layer, sa_layer, SpatialGroupEnhance, CBAM, BAM])
def test_pickles(base: type[nn.Module]) -> None:
    module = redraw(base().double()).eval()
    fuse_(module)
    twin = pickle.loads(pickle.dumps(module))
    x = feature_map(2, {eca_layer: 5, sa_layer: 24, SpatialGroupEnhance: 9}.get(base, 12), 5, 5)
    assert ready(twin) is not None
    assert torch.equal(twin(x), module(x))


MANIFEST = json.loads((Path(__file__).parent / "data" / "authors.json").read_text())


def state(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in module.state_dict().items()}


OURS: dict[str, Make] = {
    "eca_layer": lambda: blocks.ECA(kernel_size=3),
    "sa_layer": lambda: blocks.ShuffleAttention(256),
    "SpatialGroupEnhance": lambda: blocks.SpatialGroupEnhance(),
    "CBAM": lambda: blocks.CBAM(256, rd_channels=16, mlp_bias=True, order="max_mean", ties="first"),
    "BAM": lambda: blocks.BAM(256),
    "PSAModule": lambda: blocks.PyramidSqueezeAttention(256, 256),
    "SplAtConv2d": lambda: blocks.SplitAttention(256, norm_layer=nn.BatchNorm2d),
    "SELayer": lambda: blocks.SqueezeExcite(256, rd_channels=16, bias=False),
}


@pytest.mark.parametrize("name", OURS)
def test_our_states_are_the_authors(name: str) -> None:
    """Our block has the authors' keys and shapes, or those that the manifest maps them to."""
    entry = MANIFEST[name]
    expected = {entry.get("ours", {}).get(key, key): shape for key, shape in entry["state"].items()}
    # A dense layer's (H, C) is our (H, C, 1, 1).
    found = state(OURS[name]())
    assert set(found) == set(expected)
    for key, shape in found.items():
        assert shape[: len(expected[key])] == expected[key], key
        assert all(n == 1 for n in shape[len(expected[key]) :]), key


STANDINS: dict[str, Make] = {
    "eca_layer": lambda: eca_layer(3),
    "sa_layer": lambda: sa_layer(256, 64),
    "SpatialGroupEnhance": lambda: SpatialGroupEnhance(64),
}


@pytest.mark.parametrize("name", STANDINS)
def test_stand_ins_have_the_authors_states(name: str) -> None:
    """The modules of this file are what the manifest says; ours computes the same from their numbers."""
    theirs, ours = redraw(STANDINS[name]().double()), OURS[name]().double()
    assert state(theirs) == MANIFEST[name]["state"]
    ours.load_state_dict(theirs.state_dict())
    x = feature_map(2, 256, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["CBAM", "BAM"])
def test_states_convert_as_the_manifest_maps_them(name: str) -> None:
    theirs = redraw({"CBAM": lambda: CBAM(channels=12), "BAM": lambda: BAM(12)}[name]().double()).eval()
    made = {
        "CBAM": lambda: blocks.CBAM(12, rd_channels=4, mlp_bias=True, order="max_mean", ties="first"),
        "BAM": lambda: blocks.BAM(12, rd_channels=3),
    }[name]
    ours, to = made().double().eval(), MANIFEST[name]["ours"]
    weights = {to[key]: t.reshape(ours.state_dict()[to[key]].shape) for key, t in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    x = feature_map(2, 12, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_manifest_says_where_all_was_read() -> None:
    for name, entry in MANIFEST.items():
        assert re.fullmatch(r"[0-9a-f]{40}", entry["source"]["commit"]), name
        assert set(entry) <= {"source", "arguments", "state", "ours", "note"}, name
        assert set(entry.get("ours", {})) <= set(entry["state"] or {}), name


@pytest.mark.parametrize("name", ["eca", "shuffle", "sge", "cbam", "bam", "ultralytics"])
def test_compiles_in_one_graph(name: str) -> None:
    make, shape = FUSED[name]
    plain, fused = converted(make)
    torch._dynamo.reset()
    compiled = torch.compile(fused.eval(), backend="eager", fullgraph=True)
    x = feature_map(*shape)
    torch.testing.assert_close(compiled(x), plain.eval()(x))
