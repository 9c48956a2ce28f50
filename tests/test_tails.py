"""Parents as chains: a norm with what follows it, in real networks' blocks, against the unfused twin in float64."""

import copy
import os

import pytest
import support  # noqa: F401  (before torchvision)
import torch
from support import redraw, relative
from torch import nn

from fused_attn import explain, fuse_, unfuse_
from fused_attn.blocks import normed

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytest.importorskip("pytorchcv")

from pytorchcv.models.cbamresnet import CbamResUnit  # noqa: E402
from pytorchcv.models.resnet import ResUnit  # noqa: E402
from pytorchcv.models.seresnet import SEResUnit  # noqa: E402
from timm.layers import BatchNormAct2d  # noqa: E402
from timm.models import _efficientnet_blocks as mb  # noqa: E402
from timm.models import byobnet, regnet, resnet  # noqa: E402
from torchvision.models import efficientnet, mobilenetv3  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

F64 = torch.float64
C = 16


def _norm_act(c, **how):
    return BatchNormAct2d(c, act_layer=nn.SiLU, **how)


def _mbconv():
    config = efficientnet.MBConvConfig(4, 3, 1, C, C, 1)
    return efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)


def _mobilenet(se=True, act="HS"):
    config = mobilenetv3.InvertedResidualConfig(C, 3, 32, C, se, act, 1, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


# Each block, and what the report says is computed at once.
BLOCKS = {
    "resnet.BasicBlock": (lambda: resnet.BasicBlock(C, C), "norm + act, norm + add + act"),
    "resnet.Bottleneck se": (
        lambda: resnet.Bottleneck(C, C // 4, attn_layer="se"), "norm + act, norm + gate + add + act",
    ),
    "resnet.Bottleneck eca": (
        lambda: resnet.Bottleneck(C, C // 4, attn_layer="eca"), "norm + act, norm + gate + add + act",
    ),
    "resnet.Bottleneck cbam": (
        lambda: resnet.Bottleneck(C, C // 4, attn_layer="cbam"), "norm + act, norm + gate + add + act",
    ),
    "pytorchcv SEResUnit": (lambda: SEResUnit(C, C, 1, True, False), "norm + act, norm + gate + add + act"),
    "pytorchcv SEResUnit basic": (lambda: SEResUnit(C, C, 1, False, False), "norm + act, norm + gate + add + act"),
    "pytorchcv ResUnit": (lambda: ResUnit(C, C, bottleneck=True), "norm + act, norm + add + act"),
    "pytorchcv CbamResUnit": (lambda: CbamResUnit(C, C, 1, True), "norm + act, norm + gate + add + act"),
    "torchvision BasicBlock": (lambda: BasicBlock(C, C), "norm + act, norm + add + act"),
    "torchvision Bottleneck": (lambda: Bottleneck(C, C // 4), "norm + act, norm + add + act"),
    "InvertedResidual": (
        lambda: mb.InvertedResidual(C, C, act_layer=nn.SiLU, se_layer=mb.SqueezeExcite),
        "norm + act, norm + act + gate, norm + add",
    ),
    "InvertedResidual stride": (
        lambda: mb.InvertedResidual(C, 24, stride=2, act_layer=nn.Hardswish, se_layer=mb.SqueezeExcite),
        "norm + act, norm + act + gate",
    ),
    "DepthwiseSeparableConv": (
        lambda: mb.DepthwiseSeparableConv(C, C, act_layer=nn.SiLU, se_layer=mb.SqueezeExcite),
        "norm + act + gate, norm + add",
    ),
    "timm regnet": (
        lambda: regnet.Bottleneck(C, C, 1, se_ratio=0.25, downsample="conv1x1"),
        "norm + act, norm + act + gate, norm + add + act",
    ),
    "byobnet.BottleneckBlock": (
        lambda: byobnet.BottleneckBlock(C, C, layers=byobnet.LayerFn(attn=timm.layers.SEModule)),
        "norm + act, norm + act + gate, norm + add + act",
    ),
    "MBConv": (_mbconv, "norm + act, norm + act + gate, norm + add"),
    "MobileNetV3": (_mobilenet, "norm + act, norm + act + gate, norm + add"),
    "MobileNetV3 without": (lambda: _mobilenet(False, "RE"), "norm + act, norm + add"),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    return redraw(BLOCKS[name][0]()).to(F64)


def feature_map(n=3):
    torch.manual_seed(1)
    return 2 * torch.randn(n, C, 1, 1, dtype=F64) + torch.randn(n, C, 8, 7, dtype=F64)


def steps(module, count=3):
    """Outputs and parameters over a few optimizer steps, from the same start."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-2, momentum=0.9)
    seen = []
    for i in range(count):
        x = (feature_map() + 0.1 * i).requires_grad_()
        y = module(x)
        optimizer.zero_grad()
        (y.square().mean() + y.mean()).backward()
        optimizer.step()
        seen += [y.detach(), x.grad]
    return seen + [p.detach().clone() for p in (*module.parameters(), *module.buffers())]


def close(got, want, within=1e-6):
    """torchvision's and timm's hard gates round 1/6 to float32, in float64 too."""
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).abs().max() <= within * max(1.0, b.double().abs().max().item())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_steps(name, training):
    """Outputs, gradients, running statistics over three optimizer steps; the report; unfused it is what it was."""
    original = made(name).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert [row.part for row in report.rows if row.name == ""] == [BLOCKS[name][1]]
    assert report.refused == []
    close(steps(module), steps(copy.deepcopy(original)))
    assert not [line for line in explain(module, feature_map()).lines if line.backend == "unfused"]
    twin = copy.deepcopy(original)
    fuse_(twin)
    unfuse_(twin)
    assert torch.equal(twin(feature_map()), copy.deepcopy(original)(feature_map()))


@pytest.mark.parametrize("name", [n for n in BLOCKS if "without" not in n])
def test_the_proof_can_fail(name):
    """What the steps compare isn't blind to the norms' parameters: a hundredth more in one of them is seen."""
    original = made(name).train()
    module = copy.deepcopy(original)
    fuse_(module)
    with torch.no_grad():
        norms = [m for m in module.modules() if normed.read(m) is not None]
        norms[-1].weight *= 1.01
    with pytest.raises(AssertionError):
        close(steps(module), steps(original))


@pytest.mark.parametrize(
    "name",
    ["resnet.Bottleneck se", "resnet.Bottleneck cbam", "pytorchcv CbamResUnit", "InvertedResidual", "MBConv",
     "timm regnet"],
)  # fmt: skip
def test_hooks_on_swallowed_children(name):
    """A hook on any child is called, as often as in the original, and numbers stay."""
    original = made(name).train()
    for path, child in original.named_modules():
        if path == "" or list(child.children()):
            continue
        module, plain = copy.deepcopy(original), copy.deepcopy(original)
        fuse_(module)
        module(feature_map())
        plain(feature_map())
        called = []
        for which, m in enumerate((module, plain)):
            m.get_submodule(path).register_forward_hook(lambda *_, seen=called, which=which: seen.append(which))
        got, want = module(feature_map()), plain(feature_map())
        assert called.count(0) == called.count(1), path
        assert relative(got, want) < 1e-6, path


def test_small_maps_keep_their_norm(monkeypatch):
    """Where it doesn't pay, PyTorch's norm runs, and the gate behind it as ever; the same numbers."""
    module = made("resnet.Bottleneck se")
    fuse_(module)
    x = feature_map()
    whole = module(x)
    ran = lambda: {line.op for line in explain(module, x).lines}
    assert "affine_apply" in ran()
    monkeypatch.setattr(normed, "LEAST", x.numel() + 1)
    assert ran() == {"pool_mlp_scale"}
    assert relative(module(x), whole) < 1e-12
    monkeypatch.setattr(normed, "LEAST", x.numel())
    assert "affine_apply" in ran()


def test_drop_path_at_work():
    """Only the add and what follows it run by themselves; the same random numbers."""
    for name in ("resnet.Bottleneck se", "InvertedResidual", "MBConv"):
        original = made(name).train()
        if name == "MBConv":
            original.stochastic_depth.p = 0.5
        else:
            original.drop_path = timm.layers.DropPath(0.5)
        module = copy.deepcopy(original)
        fuse_(module)
        torch.manual_seed(2)
        want = original(feature_map(8))
        torch.manual_seed(2)
        assert relative(module(feature_map(8)), want) < 1e-6
        ran = {line.op for line in explain(module, feature_map(8)).lines}
        assert "channel_moments" in ran, name


def test_other_norms_stay():
    """A norm that isn't a BatchNorm is called, and what surrounds it is fused as before."""
    original = redraw(resnet.Bottleneck(C, C // 4, attn_layer="se", norm_layer=_group)).to(F64)
    module = copy.deepcopy(original)
    assert [row.part for row in fuse_(module).rows] == ["gate + add + act", "gate"]
    assert relative(module(feature_map()), original(feature_map())) < 1e-10


def _group(c, **how):
    return nn.GroupNorm(2, c, **how)


@pytest.mark.parametrize("frozen", [torchvision.ops.FrozenBatchNorm2d])
def test_frozen(frozen):
    original = made("torchvision Bottleneck")
    for name, child in list(original.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            other = frozen(child.num_features)
            other.load_state_dict({k: v for k, v in child.state_dict().items() if "num" not in k})
            setattr(original, name, other.to(F64))
    module = copy.deepcopy(original)
    assert [row.part for row in fuse_(module).rows] == ["norm + act, norm + add + act"]
    close(steps(module, 2), steps(copy.deepcopy(original), 2))


def _together(rank, folder, name):
    """One of two processes: half of a batch, SyncBatchNorm."""
    normed.LEAST = 0
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        module, x = _sync(name), feature_map(5)
        fuse_(module)
        mine = (x[:3] if rank == 0 else x[3:]).requires_grad_()  # of different sizes
        y = module(mine)
        (y * y).sum().backward()
        for p in module.parameters():
            torch.distributed.all_reduce(p.grad)
        kept = dict(module.named_buffers())
        torch.save((y.detach(), mine.grad, {n: p.grad for n, p in module.named_parameters()}, kept), f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def _alone(name):
    """The block of one process. A norm inside a gate doesn't share its statistics, so it uses those that are kept."""
    module = made(name).train()
    if "cbam" in name:
        module.se.eval()
    return module


def _sync(name):
    module = _alone(name)
    gate, module.se = module.se, None
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    module.se = gate
    return module


@pytest.mark.parametrize("name", ["resnet.Bottleneck se", "resnet.Bottleneck cbam"])
def test_sync_batch_norm_over_two_processes(tmp_path, name):
    """Outputs, gradients and running statistics are those of one process with the whole batch."""
    torch.multiprocessing.spawn(_together, (str(tmp_path), name), nprocs=2)
    original, x = _alone(name), feature_map(5).requires_grad_()
    y = original(x)
    (y * y).sum().backward()
    halves = [torch.load(os.path.join(tmp_path, str(rank))) for rank in range(2)]
    assert relative(torch.cat([h[0] for h in halves]), y) < 1e-12
    assert relative(torch.cat([h[1] for h in halves]), x.grad) < 1e-10
    for name, p in original.named_parameters():
        for h in halves:
            assert relative(h[2][name], p.grad) < 1e-9, name
    for name, b in original.named_buffers():
        for h in halves:
            assert torch.allclose(h[3][name].double(), b.double(), rtol=1e-12), name
