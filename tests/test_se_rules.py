"""Squeeze-and-excitation of libraries beside timm and torchvision: each class, with every option, against itself
unfused. A library that isn't installed is skipped."""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fused_attn import explain, fuse_, unfuse_
from fused_attn.blocks import normed
from tests.support import assert_same_step, redraw, relative

F64 = torch.float64
C = 24


class Library:
    """A module that is imported on first use; the test that needs it is skipped where it is missing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> object:
        root = self.name.partition(".")[0]
        if importlib.util.find_spec(root) is None:
            pytest.skip(f"{root} isn't installed")
        module: ModuleType = importlib.import_module(self.name)
        return getattr(module, attribute)


att = Library("pytorchcv.models.common.att")
activ = Library("pytorchcv.models.common.activ")
ghostnet = Library("pytorchcv.models.ghostnet")
sinet = Library("pytorchcv.models.sinet")
dicenet = Library("pytorchcv.models.dicenet")
fishnet = Library("pytorchcv.models.fishnet")
monai = Library("monai.networks.blocks.squeeze_and_excitation")
monai_act = Library("monai.networks.blocks.activation")
monai_efficientnet = Library("monai.networks.nets.efficientnet")
smp_senet = Library("segmentation_models_pytorch.encoders._senet")
smp_mobileone = Library("segmentation_models_pytorch.encoders.mobileone")
smp_efficientnet = Library("segmentation_models_pytorch.encoders._efficientnet")
smp_manet = Library("segmentation_models_pytorch.decoders.manet.decoder")
smp_modules = Library("segmentation_models_pytorch.base.modules")
efficientnet = Library("efficientnet_pytorch.model")
efficientnet_utils = Library("efficientnet_pytorch.utils")

CV_ACTS = {
    "relu": lambda: nn.ReLU(),
    "relu6": lambda: nn.ReLU6(),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(),
    "prelu per channel": lambda: nn.PReLU(4),
    "swish": lambda: activ.Swish(),
    "hswish": lambda: activ.HSwish(inplace=True),
    "silu": lambda: nn.SiLU(),
}
CV_GATES = {
    "sigmoid": lambda: nn.Sigmoid(),
    "hsigmoid": lambda: activ.HSigmoid(),
    "ghost clamp": lambda: ghostnet.GhostHSigmoid(),
    "prelu": lambda: nn.PReLU(C),
}
MONAI_ACTS = {
    "relu": ("relu", {"inplace": True}),
    "leakyrelu": "leakyrelu",
    "swish": "swish",
    "memswish": "memswish",
    "gelu": "gelu",
    "prelu": "prelu",
}


def mbconv(library: Library, expand: int, stride: int, ratio: float = 0.25, dynamic: bool = False) -> nn.Module:
    """An MBConv of efficientnet_pytorch, or of segmentation_models_pytorch's copy of it."""
    if library is efficientnet:
        of = efficientnet_utils
    else:
        of = library
    block = of.BlockArgs(
        num_repeat=1, kernel_size=3, stride=[stride] if library is efficientnet else stride, expand_ratio=expand,
        input_filters=C, output_filters=C, se_ratio=ratio, id_skip=True,
    )  # fmt: skip
    whole = of.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3, image_size=None if dynamic else (6, 5))
    module = library.MBConvBlock(block, whole, image_size=None if dynamic else (6, 5))
    if library is efficientnet:
        module._block_args = block._replace(stride=stride)
    return module


GATES: dict[str, Callable[[], nn.Module]] = {
    "pytorchcv conv": lambda: att.SEBlock(C),
    "pytorchcv linear": lambda: att.SEBlock(C, use_conv=False),
    "pytorchcv round_mid": lambda: att.SEBlock(C, reduction=3, round_mid=True),
    "pytorchcv mid_channels": lambda: att.SEBlock(C, mid_channels=5, use_conv=False),
    **{f"pytorchcv mid {k}": lambda v=v: att.SEBlock(C, mid_channels=4, mid_activation=v) for k, v in CV_ACTS.items()},
    **{f"pytorchcv out {k}": lambda v=v: att.SEBlock(C, out_activation=v) for k, v in CV_GATES.items()},
    **{
        f"pytorchcv linear out {k}": lambda v=v: att.SEBlock(C, use_conv=False, out_activation=v)
        for k, v in CV_GATES.items()
    },
    "sinet one layer": lambda: sinet.SEBlock(
        C, 1, mid_activation=lambda: nn.PReLU(C), out_activation=lambda: nn.PReLU(C)
    ),
    "sinet two layers": lambda: sinet.SEBlock(
        C, 6, mid_activation=lambda: nn.PReLU(4), out_activation=lambda: nn.PReLU()
    ),
    "sinet sigmoid": lambda: sinet.SEBlock(C, 1),
    **{f"MONAI {d}-D": lambda d=d: monai.ChannelSELayer(d, C) for d in (1, 2, 3)},
    **{f"MONAI residual {d}-D": lambda d=d: monai.ResidualSELayer(d, C) for d in (1, 2, 3)},
    "MONAI sigmoid and residual": lambda: monai.ChannelSELayer(2, C, r=4, add_residual=True),
    **{f"MONAI {k}": lambda v=v: monai.ChannelSELayer(2, C, r=3, acti_type_1=v) for k, v in MONAI_ACTS.items()},
    **{
        f"MONAI residual {k}": lambda v=v: monai.ResidualSELayer(2, C, r=3, acti_type_1=v, acti_type_2="prelu")
        for k, v in MONAI_ACTS.items()
    },
    "smp senet": lambda: smp_senet.SEModule(C, 4),
    "smp mobileone": lambda: smp_mobileone.SEBlock(C, 0.25),
    "MONAI MBConv": lambda: monai_efficientnet.MBConvBlock(2, C, C, 3, 1, [6, 5], 2, 0.25, drop_connect_rate=0.0),
    "MONAI MBConv stride": lambda: monai_efficientnet.MBConvBlock(
        2, C, 8, 3, 2, [6, 5], 1, 0.25, drop_connect_rate=0.0
    ),
    "MONAI MBConv no skip": lambda: monai_efficientnet.MBConvBlock(
        2, C, C, 3, 1, [6, 5], 2, 0.25, id_skip=False, drop_connect_rate=0.0
    ),
    "MONAI MBConv 1-D": lambda: monai_efficientnet.MBConvBlock(1, C, C, 3, 1, [11], 2, 0.25, drop_connect_rate=0.0),
    "MONAI MBConv 3-D": lambda: monai_efficientnet.MBConvBlock(
        3, C, C, 3, 1, [3, 4, 5], 2, 0.25, drop_connect_rate=0.0
    ),
    **{
        f"{name} MBConv {expand} {stride}{' dynamic' if dynamic else ''}": partial(
            mbconv, library, expand, stride, dynamic=dynamic
        )
        for name, library in (("efficientnet_pytorch", efficientnet), ("smp", smp_efficientnet))
        for expand, stride, dynamic in ((1, 1, False), (4, 2, False), (4, 1, True))
    },
}

seresnet = Library("pytorchcv.models.seresnet")
seresnext = Library("pytorchcv.models.seresnext")
senet = Library("pytorchcv.models.senet")
fastseresnet = Library("pytorchcv.models.fastseresnet")
sepreresnet = Library("pytorchcv.models.sepreresnet")
fpenet = Library("pytorchcv.models.fpenet")
cv_norm = Library("pytorchcv.models.common.norm")
cgnet = Library("pytorchcv.models.cgnet")
byobnet = Library("timm.models.byobnet")
fastvit = Library("timm.models.fastvit")
res2net = Library("timm.models.res2net")
rexnet = Library("timm.models.rexnet")
sknet = Library("timm.models.sknet")
timm_drop = Library("timm.layers.drop")
vovnet = Library("timm.models.vovnet")
timm_se = Library("timm.layers.squeeze_excite")


def byob(block: str, out: int, **options: object) -> nn.Module:
    layers = byobnet.LayerFn(attn=timm_se.SEModule)
    return getattr(byobnet, block)(C, out, layers=layers, **options)


def bottle2neck(**options: object) -> nn.Module:
    layers = {"act_layer": nn.ReLU, "norm_layer": nn.BatchNorm2d, "attn_layer": timm_se.SEModule}
    return res2net.Bottle2neck(C, C // 4, base_width=104, **layers, **options)


PARENTS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"pytorchcv {name} {out} {bottleneck}": partial(
            lambda m, name, *options: getattr(m, name)(*options),
            m,
            name,
            C,
            out,
            1 if out == C else 2,
            bottleneck,
            False,
            *more,
        )
        for m, name, more in (
            (seresnet, "SEResUnit", ()),
            (sepreresnet, "SEPreResUnit", ()),
            (fastseresnet, "FastSEResUnit", (True,)),
        )
        for out, bottleneck in ((C, False), (32, True))
    },
    "pytorchcv SEResNeXtUnit": lambda: seresnext.SEResNeXtUnit(C, 64, 1, 4, 16),
    "pytorchcv SENetUnit": lambda: senet.SENetUnit(C, 64, 2, 4, 16, True),
    "pytorchcv SENetUnit 1x1": lambda: senet.SENetUnit(C, 64, 2, 4, 16, False),
    "pytorchcv FPEUnit": lambda: fpenet.FPEUnit(C, 32, 1, 1, True),
    "pytorchcv CGBlock": lambda: cgnet.CGBlock(C, C, 2, 4, False, cv_norm.lambda_batchnorm2d()),
    "pytorchcv CGBlock down": lambda: cgnet.CGBlock(C, 32, 2, 4, True, cv_norm.lambda_batchnorm2d()),
    **{f"MONAI SEBlock {d}-D": lambda d=d: monai.SEBlock(d, C, 8, 8, 32) for d in (1, 2, 3)},
    "MONAI SEBlock silu": lambda: monai.SEBlock(2, C, 8, 8, C, acti_type_final="swish"),
    "MONAI SEBlock no act": lambda: monai.SEBlock(2, C, 8, 8, C, acti_type_final=None),
    "MONAI SEBottleneck": lambda: monai.SEBottleneck(2, C, C // 4, 1, 4),
    "MONAI SEResNetBottleneck 3-D": lambda: monai.SEResNetBottleneck(3, C, C // 4, 1, 4),
    "MONAI SEResNeXtBottleneck": lambda: monai.SEResNeXtBottleneck(2, C, 16, 4, 4),
    "smp SEBottleneck": lambda: smp_senet.SEBottleneck(C, C // 4, 2, 4),
    "smp SEResNetBottleneck": lambda: smp_senet.SEResNetBottleneck(C, C // 4, 1, 4),
    "smp SEResNeXtBottleneck": lambda: smp_senet.SEResNeXtBottleneck(C, 16, 4, 4, downsample=nn.Conv2d(C, 64, 1)),
    "smp MobileOneBlock": lambda: smp_mobileone.MobileOneBlock(C, C, 3, padding=1, use_se=True, num_conv_branches=2),
    "smp MobileOneBlock stride": lambda: smp_mobileone.MobileOneBlock(C, 32, 3, 2, 1, use_se=True),
    "timm byobnet basic": lambda: byob("BasicBlock", C),
    "timm byobnet basic wider": lambda: byob("BasicBlock", 32, stride=2),
    "timm byobnet bottle": lambda: byob("BottleneckBlock", C, attn_last=True),
    "timm byobnet bottle linear": lambda: byob("BottleneckBlock", 32, attn_last=True, linear_out=True),
    "timm byobnet dark": lambda: byob("DarkBlock", C, attn_last=True),
    "timm byobnet dark wider": lambda: byob("DarkBlock", 32, attn_last=True, linear_out=True),
    "timm byobnet edge": lambda: byob("EdgeBlock", C, attn_last=True),
    "timm byobnet edge stride": lambda: byob("EdgeBlock", 32, stride=2, attn_last=True),
    "timm res2net": lambda: bottle2neck(),
    "timm res2net stride": lambda: bottle2neck(
        stride=2, downsample=nn.Conv2d(C, C, 1, 2), drop_path=timm_drop.DropPath(0.0)
    ),
    "timm res2net scale 1": lambda: bottle2neck(scale=1),
    "timm sknet basic": lambda: sknet.SelectiveKernelBasic(C, C, attn_layer="se"),
    "timm sknet bottleneck": lambda: sknet.SelectiveKernelBottleneck(
        C, 16, 2, nn.Conv2d(C, 64, 1, 2), attn_layer="se", sk_kwargs={"split_input": True}
    ),
    "timm byobnet repvgg": lambda: byob("RepVggBlock", C),
    "timm byobnet repvgg stride": lambda: byob("RepVggBlock", 32, stride=2),
    "timm byobnet mobileone": lambda: byob("MobileOneBlock", C, num_conv_branches=2),
    "timm byobnet mobileone stride": lambda: byob("MobileOneBlock", 32, stride=2),
    "timm fastvit MobileOneBlock": lambda: fastvit.MobileOneBlock(C, C, 3, use_se=True, act_layer=nn.GELU),
    "timm fastvit MobileOneBlock stride": lambda: fastvit.MobileOneBlock(C, 2 * C, 3, 2, use_se=True),
    "timm fastvit large kernel": lambda: fastvit.ReparamLargeKernelConv(
        C, C, 7, 1, 1, small_kernel=3, use_se=True, act_layer=nn.GELU
    ),
    "timm rexnet": lambda: rexnet.LinearBottleneck(C, 32, 1, se_ratio=1 / 12),
    "timm rexnet stride": lambda: rexnet.LinearBottleneck(C, 32, 2, exp_ratio=2, se_ratio=1 / 12, ch_div=4),
    "timm vovnet": lambda: vovnet.OsaBlock(C, 16, C, 2, residual=True, attn="ese"),
    "timm vovnet depthwise": lambda: vovnet.OsaBlock(C, 16, 32, 2, depthwise=True, attn="se"),
}
SHAPES = {1: (4, C, 11), 2: (4, C, 6, 5), 3: (4, C, 3, 4, 5)}


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return redraw(build(), seed).to(F64)


def feature_map(dims: int = 2, channels: int = C) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    n, _, *s = SHAPES[dims]
    offset = 2 * torch.randn(n, channels, *(1 for _ in s), generator=draw, dtype=F64)
    return offset + torch.randn(n, channels, *s, generator=draw, dtype=F64)


def dims_of(name: str) -> int:
    return next((d for d in (1, 3) if f"{d}-D" in name), 2)


def of_norms(module: nn.Module) -> tuple[str, ...]:
    """Biases that a BatchNorm in training takes out again."""
    return tuple(n for n, _ in module.named_parameters() if n.endswith("_conv.bias"))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GATES)
def test_gates(name: str, training: bool) -> None:
    original = make(GATES[name]).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert (report.fused, report.refused) == ([""], [])
    x = feature_map(dims_of(name))
    assert_same_step(module, original, x, within=1e-10, zero=of_norms(original) if training else ())
    lines = explain(module, x).lines
    assert not [line.reason for line in lines if line.backend == "unfused"]
    assert [line.op for line in lines] in (["pool_mlp_scale"], ["channel_pool", "shared_mlp", "scale"])
    # The gate matters: without it the output is another.
    unfuse_(module)
    names = [n for n, _ in module.named_parameters() if "fc" in n or "conv2" in n or "expand." in n]
    with torch.no_grad():
        for n in names:
            module.get_parameter(n).mul_(0.5)
    assert relative(module(x), original(x)) > 1e-4


def test_inlined_gates_with_drop_connect() -> None:
    for build in (
        lambda: monai_efficientnet.MBConvBlock(2, C, C, 3, 1, [6, 5], 2, se_ratio=0.25, drop_connect_rate=0.5),
        partial(mbconv, efficientnet, 4, 1),
        partial(mbconv, smp_efficientnet, 4, 1),
    ):
        original = make(build)
        module = copy.deepcopy(original)
        assert fuse_(module).fused == [""]
        rate = () if hasattr(original, "drop_connect_rate") else (0.5,)
        torch.manual_seed(3)
        y = module(feature_map(), *rate)
        torch.manual_seed(3)
        assert relative(y, original(feature_map(), *rate)) < 1e-12
        assert explain(module, feature_map(), *rate).lines[0].op == "pool_mlp_scale"


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_manet_adds_two_gates(mode: str) -> None:
    original = make(lambda: smp_manet.MFABBlock(C, 16, 8, interpolation_mode=mode)).eval()
    module = copy.deepcopy(original)
    assert fuse_(module).fused == [""]
    skip = torch.randn(4, 16, 12, 10, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert_same_step(module, original, feature_map(), skip, within=1e-10)
    assert [line.op for line in explain(module, feature_map(), skip).lines] == [
        "channel_pool", "shared_mlp", "channel_pool", "shared_mlp", "scale",
    ]  # fmt: skip


def test_a_change_inside_a_container_is_seen() -> None:
    for change in (
        lambda m: m.fc.__setitem__(1, nn.SiLU()),
        lambda m: m.fc.append(nn.Dropout(0.9)),
        lambda m: m.fc.insert(0, nn.ReLU()),
        lambda m: setattr(m, "avg_pool", nn.AdaptiveMaxPool2d(1)),
        lambda m: setattr(m.avg_pool, "output_size", (2, 2)),
        lambda m: setattr(m, "add_residual", True),
        lambda m: m.fc.register_forward_hook(lambda *_: None),
        lambda m: m.fc[2].register_forward_hook(lambda *called: 2 * called[2]),
        lambda m: setattr(m.fc, "forward", lambda p: p),
        lambda m: m.fc[0].weight.data.mul_(2),
    ):
        module, original = (make(lambda: monai.ChannelSELayer(2, C)).eval() for _ in range(2))
        fuse_(module)
        module(feature_map())
        change(module)
        change(original)
        if original.avg_pool.output_size == (2, 2):
            with pytest.raises(RuntimeError):
                module(feature_map())
            continue
        torch.manual_seed(0)
        y = module(feature_map())
        torch.manual_seed(0)
        assert relative(y, original(feature_map())) < 1e-12


def test_refused_for_a_reason() -> None:
    for build, expected in (
        (lambda: dicenet.DiceAttBlock(C, C), "returns the gate"),
        (lambda: fishnet.PreSEAttBlock(C, C), "returns the gate"),
        (lambda: monai.ChannelSELayer(2, C, acti_type_1="elu"), "ELU"),
        (lambda: monai.ChannelSELayer(2, C, acti_type_1=("swish", {"alpha": 2.0})), "Swish"),
        (lambda: att.SEBlock(C, out_activation=nn.Tanh()), "Tanh"),
        (lambda: att.SEBlock(C, mid_activation=nn.Mish()), "Mish"),
    ):
        module = make(build)
        kind = type(module)
        ((name, reason),) = fuse_(module).refused
        assert (name, type(module)) == ("", kind)
        assert expected in reason, reason


def test_a_block_without_a_gate_is_no_gate() -> None:
    for library in (efficientnet, smp_efficientnet):
        report = fuse_(mbconv(library, 4, 1, ratio=0.0))
        assert report.rows == []


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PARENTS)
def test_parents(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make(PARENTS[name]).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module, filter_fn=lambda m, _: type(m).__name__ != "SelectiveKernel")  # a gate, but not SE's
    assert report.fused[0] == ""
    assert not report.refused
    assert [row.kind for row in report.rows] == ["tail", "gate"]
    x = feature_map(dims_of(name))
    names = [n for n, _ in original.named_parameters()]
    zero = [n for n in names if n.endswith(("conv.bias", "se.fc1.bias" if "rexnet" in name else "conv.bias"))]
    assert_same_step(module, original, x, within=1e-6 if "vovnet" in name else 1e-10, zero=zero if training else ())
    monkeypatch.setattr(normed, "LEAST", x.numel() * 100)  # norms by themselves: then one op is left
    lines = [line for line in explain(module, x).lines if not line.reason.startswith("not converted")]
    assert [line.op for line in lines] == ["pool_mlp_scale"]
    assert_same_step(module, original, x, within=1e-6 if "vovnet" in name else 1e-10, zero=zero if training else ())
    # The original, with its gate left out, gives another output.
    gate = original.get_submodule(report.rows[1].name)
    with torch.no_grad():
        want = original(x)
        with_hook = gate.register_forward_hook(lambda _, inputs, y: inputs[0])
        assert relative(original(x), want) > 1e-3
        with_hook.remove()


@pytest.mark.parametrize("name", ["smp MobileOneBlock", "timm byobnet mobileone", "timm fastvit MobileOneBlock"])
def test_a_parent_whose_branches_are_merged(name: str) -> None:
    """As for inference: after it was fused, and before."""
    for before in (True, False):
        original = make(PARENTS[name]).eval()
        module = copy.deepcopy(original)
        if before:
            fuse_(module)
        module.reparameterize()
        if not before:
            fuse_(module)
        assert relative(module(feature_map()), original(feature_map())) < 1e-10
        assert [line.op for line in explain(module, feature_map()).lines] == ["pool_mlp_scale"]


def test_a_flag_that_leaves_the_gate_out_is_seen() -> None:
    for name in ("pytorchcv FastSEResUnit 24 False", "pytorchcv FPEUnit"):
        module, original = (make(PARENTS[name]).eval() for _ in range(2))
        fuse_(module)
        module(feature_map())
        for m in (module, original):
            m.use_se = False
        assert torch.equal(module(feature_map()), original(feature_map()))


def test_byobnet_drop_path_stands_between() -> None:
    original = make(lambda: byob("BasicBlock", C, drop_path_rate=0.5))
    module = copy.deepcopy(original)
    fuse_(module)
    torch.manual_seed(3)
    y = module(feature_map())
    torch.manual_seed(3)
    assert relative(y, original(feature_map())) < 1e-12
