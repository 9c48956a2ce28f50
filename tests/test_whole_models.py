"""Production models, converted by one line: outputs, gradients and training compared with float64 of the unfused.

A comparison proves nothing where attention has no effect, and zoo models are initialised so. Therefore every parameter
and buffer is drawn anew, and each run first shows that Identity in place of the gates, and 1.01 × a single gate,
change the output by far more than what the comparison allows.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import coverage
from fused_attn import Report, fuse_, plan, unfuse_
from fused_attn.ops import activations
from tests.support import redraw, relative, settle, step, worst

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


class Zoo(NamedTuple):
    """A model: how to build it, how many gates and tails are fused, image size and dimensions; `hard` where it has hard
    sigmoids or swishes, whose backward in PyTorch rounds its constants to float32; rate: of learning, in training."""

    build: Callable[[], nn.Module]
    gates: int
    tails: int = 0
    size: int = 64
    hard: bool = False
    dims: int = 2
    rate: float = 0.01


def of_timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=16, **options)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=16)


def of_pytorchcv(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        provider = pytest.importorskip("pytorchcv.model_provider")
        model = provider.get_model(name, num_classes=16, **options)
        if hasattr(getattr(model, "features", None), "final_pool"):  # it takes 7×7, which only 224×224 images give
            model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        return model

    return build


def of_monai(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("monai.networks.nets"), name)(**options)


def of_smp(name: str, encoder: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        smp = pytest.importorskip("segmentation_models_pytorch")
        return getattr(smp, name)(encoder, encoder_weights=None, classes=2, **options)

    return build


def of_efficientnet_pytorch(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        lib = pytest.importorskip("efficientnet_pytorch")
        return lib.EfficientNet.from_name(name, num_classes=16)

    return build


class SELayer(nn.Module):
    """As in most repositories; no rule names it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


def of_repositories() -> nn.Module:
    """torchvision's ResNet-18 with an SELayer after each stage."""
    model = torchvision.models.resnet18(num_classes=16)
    for name, channels in (("layer1", 64), ("layer2", 128), ("layer3", 256), ("layer4", 512)):
        getattr(model, name).append(SELayer(channels))
    return model


class Features(nn.Module):
    """The last of an encoder's maps."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[-1]


class Last(nn.Module):
    """A gate of maps (N, H, W, C) among others."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def of_rarer_gates() -> nn.Module:
    """torchvision's ResNet-18 with gates whose options no zoo's model has."""
    squeeze_excite = pytest.importorskip("timm.layers.squeeze_excite")
    monai = pytest.importorskip("monai.networks.blocks.squeeze_and_excitation")
    model = torchvision.models.resnet18(num_classes=16)
    model.layer1.append(monai.ResidualSELayer(2, 64))
    model.layer2.append(squeeze_excite.SEModule(128, add_maxpool=True, act_layer=nn.Hardswish))
    model.layer3.append(Last(squeeze_excite.SqueezeExciteCl(256, act_layer=nn.ReLU6)))
    model.layer4.append(squeeze_excite.SEModule(512, act_layer=nn.LeakyReLU, norm_layer=nn.BatchNorm2d))
    return model


def of_byobnet(kind: str, attn_last: bool = True) -> Callable[[], nn.Module]:
    """timm's ByobNet of one kind of block, with SE."""

    def build() -> nn.Module:
        byobnet = pytest.importorskip("timm.models.byobnet")
        options = {"attn_last": True} if attn_last else {}
        blocks = tuple(byobnet.ByoBlockCfg(kind, d=2, c=c, s=2, gs=0, block_kwargs=options) for c in (32, 48, 64))
        config = byobnet.ByoModelCfg(blocks=blocks, stem_chs=24, stem_type="3x3", attn_layer="se")
        return byobnet.ByobNet(config, num_classes=16)

    return build


def of_resnet(module: str, block: str, **options: object) -> Callable[[], nn.Module]:
    """timm's ResNet of other blocks, with SE."""

    def build() -> nn.Module:
        se, resnet = (pytest.importorskip(f"timm.{name}") for name in ("layers.squeeze_excite", "models.resnet"))
        blocks = pytest.importorskip(f"timm.models.{module}")
        return resnet.ResNet(
            getattr(blocks, block), (1, 1, 1, 1), num_classes=16, block_args={"attn_layer": se.SEModule}, **options
        )

    return build


def of_fastseresnet() -> nn.Module:
    """Of fewer layers than pytorchcv's fastseresnet101b, whose four gates among a hundred layers hardly matter."""
    fastseresnet = pytest.importorskip("pytorchcv.models.fastseresnet")
    model = fastseresnet.FastSEResNet([[64] * 2, [128] * 2, [256] * 2, [512] * 2], 64, True, True, num_classes=16)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def of_sknet() -> nn.Module:
    """Of fewer layers than pytorchcv's sknet50, which redrawn is too far from float64 in float32 to tell anything."""
    sknet = pytest.importorskip("pytorchcv.models.sknet")
    model = sknet.SKNet([[256], [512], [1024], [2048]], 64, num_classes=16)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def of_mobileone() -> nn.Module:
    """segmentation_models_pytorch's encoder, of fewer blocks: with as many as mobileone_s4 has, redrawn as they are,
    float32 is too far from float64 for a comparison to tell anything."""
    mobileone = pytest.importorskip("segmentation_models_pytorch.encoders.mobileone")
    encoder = mobileone.MobileOne(
        (3, 64, 64, 96, 128, 160), num_blocks_per_stage=[1, 1, 4, 3], width_multipliers=(1.0, 0.75, 0.5, 0.3125),
        use_se=True,
    )  # fmt: skip
    return Features(encoder)


def of_fpenet() -> nn.Module:
    fpenet = pytest.importorskip("pytorchcv.models.fpenet")
    return fpenet.FPENet([1, 2, 3], [16, 32, 64], 16, [64, 32], use_se=True, in_size=(64, 64), num_classes=16)


def with_layers(build: Callable[[], nn.Module], stages: str, **channels: int) -> Callable[[], nn.Module]:
    """A model with an SELayer after some of the stages."""

    def made() -> nn.Module:
        model = build()
        for name, count in channels.items():
            model.get_submodule(stages + name).append(SELayer(count))
        return model

    return made


MONAI_SENET = {
    "spatial_dims": 3, "in_channels": 3, "block": "se_resnet_bottleneck", "layers": (1, 1, 1, 1), "groups": 1,
    "reduction": 16, "dropout_prob": None, "inplanes": 16, "input_3x3": False, "downsample_kernel_size": 1,
    "num_classes": 16,
}  # fmt: skip
FAST = {
    "timm seresnet50": Zoo(of_timm("seresnet50"), 16, 16),
    "timm efficientnet_b0": Zoo(of_timm("efficientnet_b0"), 16, 16),
    "timm rexnet_100": Zoo(of_timm("rexnet_100"), 13, 13),
    "timm legacy_seresnet18": Zoo(of_timm("legacy_seresnet18"), 8, 8),
    "timm ese_vovnet19b_dw": Zoo(of_timm("ese_vovnet19b_dw"), 4, 4, hard=True),
    "torchvision mobilenet_v3_large": Zoo(of_torchvision("mobilenet_v3_large"), 8, 8, hard=True),
    "pytorchcv seresnet10": Zoo(of_pytorchcv("seresnet10"), 4, 4),
    "MONAI SENet 3-D": Zoo(of_monai("SENet", **MONAI_SENET), 4, 4, dims=3, size=16),
    "smp MAnet": Zoo(of_smp("MAnet", "resnet18"), 4),
    "SELayer in resnet18": Zoo(of_repositories, 4),
}
SLOW = {
    "rarer gates in resnet18": Zoo(of_rarer_gates, 4, hard=True),
    "timm test_byobnet": Zoo(of_timm("test_byobnet"), 4, 4),
    "timm ByobNet of RepVGG blocks": Zoo(of_byobnet("rep", False), 6, 6),
    "timm ByobNet of bottlenecks": Zoo(of_byobnet("bottle"), 6, 6),
    "timm ByobNet of edge blocks": Zoo(of_byobnet("edge"), 6, 6),
    "timm ResNet of res2net's blocks": Zoo(of_resnet("res2net", "Bottle2neck", base_width=26), 4, 4),
    "timm ResNet of sknet's basic blocks": Zoo(of_resnet("sknet", "SelectiveKernelBasic"), 8, 4),
    "timm ResNet of sknet's bottlenecks": Zoo(of_resnet("sknet", "SelectiveKernelBottleneck"), 8, 4),
    "timm fastvit_mci0": Zoo(of_timm("fastvit_mci0"), 3, 3),
    "pytorchcv FastSEResNet": Zoo(of_fastseresnet, 4, 4),
    "pytorchcv FPENet": Zoo(of_fpenet, 6, 6),
    "MONAI SENet 1-D": Zoo(
        of_monai("SENet", **{**MONAI_SENET, "spatial_dims": 1, "block": "se_resnetxt_bottleneck", "groups": 2}),
        4,
        4,
        dims=1,
    ),
    "smp Unet scse": Zoo(of_smp("Unet", "resnet18", decoder_attention_type="scse"), 10),
    "timm legacy_seresnet50": Zoo(of_timm("legacy_seresnet50"), 16, 16),
    "timm legacy_seresnext26_32x4d": Zoo(of_timm("legacy_seresnext26_32x4d"), 8, 8),
    "timm seresnext26d_32x4d": Zoo(of_timm("seresnext26d_32x4d"), 8, 8),
    "timm seresnet18 drop_path": Zoo(of_timm("seresnet18", drop_path_rate=0.2), 8, 8),
    "timm tresnet_m": Zoo(of_timm("tresnet_m"), 18, 7),
    "timm mobilenetv3_small_100": Zoo(of_timm("mobilenetv3_small_100"), 9, 9, hard=True),
    "timm regnety_002": Zoo(of_timm("regnety_002"), 13, 13),
    "timm ghostnet_100": Zoo(of_timm("ghostnet_100"), 7, hard=True),
    "timm nf_seresnet26": Zoo(of_timm("nf_seresnet26"), 8, rate=1e-8),
    "timm hgnet_tiny": Zoo(of_timm("hgnet_tiny"), 5),
    "timm gcvit_xxtiny": Zoo(of_timm("gcvit_xxtiny"), 11, size=224),
    "timm coatnet_pico_rw_224": Zoo(of_timm("coatnet_pico_rw_224"), 5, size=224),
    "timm fastvit_t8": Zoo(of_timm("fastvit_t8"), 1, 1),
    "torchvision efficientnet_b0": Zoo(of_torchvision("efficientnet_b0"), 16, 16),
    "torchvision regnet_y_400mf": Zoo(of_torchvision("regnet_y_400mf"), 16, 16),
    "timm seresnet18 zero_init": Zoo(of_timm("seresnet18", zero_init_last=True), 8, 8),
    "timm ByobNet of MobileOne blocks": Zoo(of_byobnet("one", False), 6, 6),
    "timm lcnetv2_base": Zoo(of_timm("lcnetv2_base"), 6),
    "pytorchcv sepreresnet10": Zoo(of_pytorchcv("sepreresnet10"), 4, 4),
    "pytorchcv senet16": Zoo(of_pytorchcv("senet16"), 4, 4),
    "pytorchcv seresnext50_32x4d": Zoo(of_pytorchcv("seresnext50_32x4d"), 16, 16),
    "pytorchcv mobilenetv3_small_w7d20": Zoo(of_pytorchcv("mobilenetv3_small_w7d20"), 9, hard=True),
    "pytorchcv ghostnet": Zoo(of_pytorchcv("ghostnet"), 7),
    "pytorchcv efficientnet_b0": Zoo(of_pytorchcv("efficientnet_b0"), 16),
    "pytorchcv cgnet_cityscapes": Zoo(of_pytorchcv("cgnet_cityscapes", in_size=(64, 64)), 24, 24),
    "pytorchcv sinet_cityscapes": Zoo(of_pytorchcv("sinet_cityscapes", in_size=(128, 128)), 3, size=128),
    "MONAI EfficientNetBN": Zoo(
        of_monai("EfficientNetBN", model_name="efficientnet-b0", pretrained=False, spatial_dims=2, num_classes=16), 16
    ),
    "efficientnet_pytorch b0": Zoo(of_efficientnet_pytorch("efficientnet-b0"), 16),
    "smp Unet se_resnet50": Zoo(of_smp("Unet", "se_resnet50"), 16, 16),
    "smp MobileOne": Zoo(of_mobileone, 10, 10),
    "smp Unet efficientnet-b0": Zoo(of_smp("Unet", "efficientnet-b0"), 16),
    "timm ecaresnet26t": Zoo(of_timm("ecaresnet26t"), 8, 8),
    "timm resnet18 ceca": Zoo(of_timm("resnet18", block_args={"attn_layer": "ceca"}), 8, 8),
    "timm resnet18 cbam": Zoo(of_timm("resnet18", block_args={"attn_layer": "cbam"}), 8, 8),
    "timm resnet18 lcbam": Zoo(of_timm("resnet18", block_args={"attn_layer": "lcbam"}), 8, 8),
    "timm resnest14d": Zoo(of_timm("resnest14d"), 4),
    "timm skresnet18": Zoo(of_timm("skresnet18"), 8, 8),
    "pytorchcv resnesta18": Zoo(of_pytorchcv("resnesta18"), 8),
    "pytorchcv bam_resnet18": Zoo(of_pytorchcv("bam_resnet18"), 3),
    "pytorchcv cbam_resnet18": Zoo(of_pytorchcv("cbam_resnet18"), 8, 8),
    "pytorchcv resattnet56": Zoo(of_pytorchcv("resattnet56"), 3, size=224),
    "pytorchcv SKNet": Zoo(of_sknet, 4),
    "SELayer in pytorchcv resnext14": Zoo(
        with_layers(of_pytorchcv("resnext14_16x4d"), "features.", stage1=256, stage3=1024), 2
    ),
    "SELayer in resnet50": Zoo(with_layers(of_torchvision("resnet50"), "", layer1=256, layer3=1024), 2),
}
MODELS = [*(pytest.param(n, id=n) for n in FAST), *(pytest.param(n, id=n, marks=pytest.mark.slow) for n in SLOW)]
FLOAT64 = 1e-10
FLOAT64_HARD = 1e-6


def build(zoo: Zoo) -> nn.Module:
    torch.manual_seed(0)
    return settle(redraw(zoo.build()).double(), image(zoo, 8))


def image(zoo: Zoo, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, *(zoo.size,) * zoo.dims, generator=draw, dtype=torch.float64)


def names(report: Report, kind: str) -> list[str]:
    return [row.name for row in report.rows if row.kind == kind and row.reason is None]


@contextmanager
def instead(modules: list[nn.Module], change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Makes each module return change(input, output)."""
    handles = [m.register_forward_hook(lambda _, inputs, y: change(inputs[0], y)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# The last layer of a gate that is written into its parent's forward.
INLINED = ("_se_expand", "SE_ll.3", "SE_hl.3")


def opened(x: Tensor, y: Tensor) -> Tensor:
    """A gate's input, or the mean of its branches where they lie side by side in it."""
    beside = x.shape[0] == y.shape[0] and x.shape[2:] == y.shape[2:] and x.shape[1] % y.shape[1] == 0
    return x.unflatten(1, (-1, y.shape[1])).mean(1) if beside else y


@contextmanager
def open_gates(modules: list[nn.Module]) -> Iterator[None]:
    """Makes every gate pass its input: by a hook, or, where the gate lies within its parent, by logits of 40."""
    layers = [(m, m.get_submodule(n)) for m in modules for n in INLINED if n in dict(m.named_modules())]
    inlined = {id(m) for m, _ in layers}
    kept = [copy.deepcopy(layer.state_dict()) for _, layer in layers]
    gates = [m for m in modules if id(m) not in inlined]
    # Selective kernels are convolutions, too, which nothing can be put in place of.
    with instead(gates, opened), torch.no_grad():
        for _, layer in layers:
            layer.weight.zero_()
            layer.bias.fill_(40)
        try:
            yield
        finally:
            for (_, layer), state in zip(layers, kept, strict=True):
                layer.load_state_dict(state)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name: str, record_property: Callable[[str, object], None]) -> None:
    zoo = {**FAST, **SLOW}[name]
    original = build(zoo).eval()
    x = image(zoo)
    truth, truth_grads = step(original, x)
    single = copy.deepcopy(original).float()
    eager, eager_grads = step(single, x.float())
    allowed = 8 * relative(eager, truth) + 1e-6
    # In float32 a ReLU now and then lies on the other side of its corner than in float64, fused or not, elsewhere each
    # time.
    allowed_grads = 8 * worst(eager_grads, truth_grads) + 5e-2

    within = FLOAT64_HARD if zoo.hard else FLOAT64
    model = copy.deepcopy(original)
    keys = list(model.state_dict())
    report = fuse_(model)
    assert not report.refused, report
    gates = names(report, "gate")
    assert (len(gates), len(names(report, "tail"))) == (zoo.gates, zoo.tails)
    assert list(model.state_dict()) == keys

    # The comparison can fail.
    assert 1e-3 < float(truth.std()) < 1e3
    modules = [original.get_submodule(gate) for gate in gates]
    with open_gates(modules):
        assert relative(original(x), truth) > 0.01
    for module in {modules[0], modules[len(modules) // 2], modules[-1]}:
        with instead([module], lambda i, y: 1.01 * y):
            changed, changed_grads = step(original, x)
        assert relative(changed, truth) > 10 * max(allowed, FLOAT64)
        assert worst(changed_grads, truth_grads) > 1e3 * within

    y, grads = step(model, x)
    off, off_grads = relative(y, truth), worst(grads, truth_grads)
    assert off < FLOAT64
    assert off_grads < within
    fuse_(single)
    y, grads = step(single, x.float())
    assert relative(y, truth) < allowed
    assert worst(grads, truth_grads) < allowed_grads

    measured = (off, off_grads, relative(y, truth), relative(eager, truth))
    plain = len(names(report, "plain"))
    refused = len(report.refused)
    record_property("whole model", (name, zoo.gates, zoo.tails, plain, refused, *(f"{m:.0e}" for m in measured)))

    # Back: the same classes, and the same bits.
    unfuse_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    y, grads = step(model, x)
    assert torch.equal(y, truth)
    assert all(torch.equal(grads[k], g) for k, g in truth_grads.items())


# What the proof is about: every class that a rule of squeeze-and-excitation or of a parent names, but for those it
# refuses, and what their networks are made of.
PARTS = {
    *(f"act {name}" for name in activations.ACTS),
    *(f"gate {name}" for name in ("sigmoid", "hard_sigmoid", "clamp", "relu", "prelu")),
    *(f"act after the sum {name}" for name in ("identity", "relu", "relu6", "gelu")),
    "norm", "no norm", "one layer", "two layers", "mean", "mean and maximum", "gate", "1 + gate",
}  # fmt: skip


def parts(module: nn.Module) -> set[str]:
    """What a fused module's plan is made of."""
    found = vars(module)[plan.KEY]
    if module.rule.tail is not None:
        return {f"act after the sum {found.epilogue}"}
    networks = [found.high, found.low] if hasattr(found, "high") else [found] if hasattr(found, "max_weight") else []
    return {
        part
        for network in networks
        for part in (
            f"act {network.act}", f"gate {network.gate}", "norm" if network.norm else "no norm",
            "two layers" if network.second else "one layer", "mean and maximum" if network.max_weight else "mean",
            "1 + gate" if network.offset else "gate",
        )
    }  # fmt: skip


ZOOS = ("timm", "torchvision", "pytorchcv", "monai", "segmentation_models_pytorch", "efficientnet_pytorch")


@pytest.mark.slow
def test_the_models_hold_every_class_and_option() -> None:
    """Every class of these libraries that any rule names, and every option of a gate."""
    wanted = {rule.path for rule in plan.RULES.values() if rule.sources and rule.path.split(".")[0] in ZOOS}
    assert len(wanted) > 65
    assert len({**FAST, **SLOW}) >= 60
    seen: set[str] = set()
    for zoo in (*FAST.values(), *SLOW.values()):
        model = coverage.build(zoo.build)
        fuse_(model)
        for module in model.modules():
            if isinstance(module, plan.Fused):
                seen |= {module.rule.path} | parts(module)
    assert not (wanted | PARTS) - seen


STEPS = ["timm seresnet50", "timm rexnet_100", "torchvision mobilenet_v3_large", "pytorchcv seresnet10"]

TRAINED = [pytest.param(n, id=n, marks=[] if n in STEPS else [pytest.mark.slow]) for n in {**FAST, **SLOW}]


@pytest.mark.parametrize("name", TRAINED)
def test_training_steps(name: str) -> None:
    """Three steps of SGD in training mode: the parameters and the running statistics end where they do unfused."""
    zoo = {**FAST, **SLOW}[name]
    original = build(zoo).train()
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = copy.deepcopy(original)
    assert not fuse_(model).refused
    start = copy.deepcopy(original.state_dict())
    x = image(zoo, 4)
    for m in (original, model):
        torch.manual_seed(5)  # drop_path drops the same
        optimizer = torch.optim.SGD(m.parameters(), zoo.rate, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    ends, expected = model.state_dict(), original.state_dict()
    gates = [m for m in model.modules() if isinstance(m, plan.Fused) and m.rule.tail is None]
    place = {id(p): name for name, p in model.named_parameters()}
    used = {name for name, p in original.named_parameters() if p.grad is not None}
    trained = [[key for p in gate.parameters() if p.dim() > 1 and (key := place[id(p)]) in used] for gate in gates]
    assert (
        len(list(filter(None, trained))) >= len(gates) - 1
    )  # a decoder's last block may have one that it doesn't call
    for keys in filter(None, trained):
        assert max(relative(expected[key], start[key]) for key in keys) > 1e-6
    for key, end in ends.items():
        moved = (expected[key] - start[key]).double().norm()
        off = (end - expected[key]).double().norm()
        assert float(off) <= 1e-4 * float(moved) + 1e-12, key
