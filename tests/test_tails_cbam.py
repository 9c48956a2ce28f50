"""A norm, CBAM, the add and the activation as one, in blocks of timm, pytorchcv and the library, against the unfused
block in float64."""

import copy
import functools

import pytest
import support  # noqa: F401  (before torchvision)
import torch
from support import redraw, relative
from torch import nn

from fused_attn import explain, fuse_, models
from fused_attn.blocks import CBAM, cbam, chain, normed
from fused_attn.plan import left_to_compiler

pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("pytorchcv")

from pytorchcv.models.cbamresnet import CbamResUnit  # noqa: E402
from timm.layers.cbam import LightCbamModule  # noqa: E402
from timm.models import resnet  # noqa: E402

F64 = torch.float64
C = 16
TOGETHER = {"channel_moments", "affine_spatial_pool", "affine_pixel_scale"}
BLOCKS = {
    "timm": (lambda: resnet.Bottleneck(C, C // 4, attn_layer="cbam"), "bn3", "se"),
    "timm basic": (lambda: resnet.BasicBlock(C, C, attn_layer="cbam"), "bn2", "se"),
    "timm light": (lambda: resnet.Bottleneck(C, C // 4, attn_layer=LightCbamModule), "bn3", "se"),
    "pytorchcv": (lambda: CbamResUnit(C, C, 1, True), "body.conv3.bn", "cbam"),
    "pytorchcv basic": (lambda: CbamResUnit(C, C, 1, False), "body.conv2.bn", "cbam"),
    "pytorchcv resized": (lambda: CbamResUnit(C, 24, 2, True), "body.conv3.bn", "cbam"),
}


def made(name, weights="mixed"):
    """A block whose last norm has weights of either sign, or some that are 0."""
    torch.manual_seed(0)
    block = redraw(BLOCKS[name][0]()).to(F64)
    with torch.no_grad():
        weight = block.get_submodule(BLOCKS[name][1]).weight
        weight[1::2] *= -1
        if weights == "zeros":
            weight[2:5] = 0
    return block


def feature_map(n=3, dtype=F64):
    torch.manual_seed(1)
    return (2 * torch.randn(n, C, 1, 1, dtype=F64) + torch.randn(n, C, 8, 6, dtype=F64)).to(dtype)


def answers(block, x):
    """Output, every gradient, every buffer."""
    x = x.detach().clone().requires_grad_()
    y = block(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(y.dtype))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in block.buffers())]


def same(got, want, within=1e-9):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= within * max(1.0, b.double().abs().max()), i


def ran(block, x):
    return {line.op for line in explain(block, x).lines}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["mixed", "zeros"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, weights, training, layout):
    original = made(name, weights).train(training).to(memory_format=layout)
    block = copy.deepcopy(original)
    assert fuse_(block).refused == []
    x = feature_map().to(memory_format=layout)
    assert ran(copy.deepcopy(block), x) >= TOGETHER
    same(answers(block, x), answers(original, x))
    with torch.no_grad():
        assert relative(copy.deepcopy(block)(x), copy.deepcopy(original)(x)) < 1e-12


@pytest.mark.parametrize("name", ["timm", "pytorchcv"])
def test_the_proof_can_fail(name):
    """A thousandth more in a parameter of the norm or of the gate is seen."""
    for part in (".weight", ".bias", None):
        original, (_, norm, gate) = made(name).train(), BLOCKS[name]
        block = copy.deepcopy(original)
        fuse_(block)
        changed = block.get_parameter(norm + part) if part else next(block.get_submodule(gate).parameters())
        with torch.no_grad():
            changed.mul_(1.001)
        with pytest.raises(AssertionError):
            same(answers(block, feature_map()), answers(original, feature_map()))


@pytest.mark.parametrize("name", ["timm", "pytorchcv"])
@pytest.mark.parametrize("how", ["momentum", "kept", "untracked", "plain", "frozen"])
def test_norms(name, how):
    """A cumulative average, statistics that stand still in training, none at all, no parameters, and a frozen norm."""
    original = made(name).train()
    path = BLOCKS[name][1]
    norm = original.get_submodule(path)
    if how == "momentum":
        norm.momentum = None
    elif how == "kept":
        norm.eval()
    elif how == "untracked":
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, *(None,) * 3
    else:
        other = torchvision.ops.FrozenBatchNorm2d(C) if how == "frozen" else nn.BatchNorm2d(C, affine=False)
        with torch.no_grad():
            for key, value in other.state_dict().items():
                value.copy_(norm.state_dict()[key])
        original.get_submodule(path.rpartition(".")[0])._modules[path.rpartition(".")[2]] = other.to(F64)
    block = copy.deepcopy(original)
    fuse_(block)
    for _ in range(2):
        assert ran(copy.deepcopy(block), feature_map()) >= TOGETHER
        same(answers(block, feature_map()), answers(original, feature_map()))


@pytest.mark.parametrize("layout", ["timm", "authors"])
@pytest.mark.parametrize("ties", ["split", "first"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_own_network(training, ties, layout):
    """The library's own bottleneck: its children one by one, the gate by plain PyTorch."""
    torch.manual_seed(0)
    block = redraw(models.cbam_resnet50().layer1[1]).to(F64)
    block.add_module(block.gate, redraw(CBAM(256, ties=ties, layout=layout)).to(F64))
    with torch.no_grad():
        block.bn3.weight[::2] *= -1
    twin = copy.deepcopy(block.train(training))

    def children(x):
        u = torch.relu(twin.bn2(twin.conv2(torch.relu(twin.bn1(twin.conv1(x))))))
        u, gate = twin.bn3(twin.conv3(u)), twin.get_submodule(block.gate)
        u = u * gate.channel_gate(u)
        return torch.relu(u * gate.spatial_gate(u) + x)

    x = torch.randn(2, 256, 6, 5, dtype=F64)
    assert ran(copy.deepcopy(block), x) >= TOGETHER
    twin.forward = children
    same(answers(block, x), answers(twin, x))


def test_pools_that_are_not_moments():
    """What pools by other norms of the map needs the map: PyTorch's norm runs."""
    block = models.cbam_resnet50().layer1[1].eval()
    x = torch.randn(1, 256, 6, 5)
    for gate in (CBAM(256, pool_types=("avg", "lp")), CBAM(256, no_spatial=True)):
        block.add_module(block.gate, gate.eval())
        want = torch.relu(gate(block.bn3(block.conv3(_inner(block, x)))) + x)
        assert "affine_pixel_scale" not in ran(block, x)
        assert relative(block(x), want) < 1e-5


def test_explain_hangs_nothing_on_a_gate_in_its_parent():
    """The report of the library's own network is of what runs without it, under the name of the block."""
    network = models.cbam_resnet50().eval()
    lines = explain(network, torch.randn(1, 3, 32, 32)).lines
    found = [line.module for line in lines if line.op == "affine_pixel_scale"]
    assert found == [f"layer{i + 1}.{j}" for i, many in enumerate((3, 4, 6, 3)) for j in range(many)]


def _inner(block, x):
    return torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))


@pytest.mark.parametrize("pools", [("avg",), ("max",), ("max", "avg")], ids=str)
def test_fewer_pools(pools):
    block = models.cbam_resnet50().layer1[1].train()
    gate = redraw(CBAM(256, pool_types=pools)).to(F64)
    block.add_module(block.gate, gate)
    block = block.to(F64)
    x = torch.randn(2, 256, 4, 5, dtype=F64)
    u = block.bn3(block.conv3(_inner(block, x)))
    u = u * gate.channel_gate(u)
    want = torch.relu(u * gate.spatial_gate(u) + x)
    assert ran(copy.deepcopy(block), x) >= TOGETHER
    assert relative(block(x), want) < 1e-10


@pytest.mark.parametrize("name", ["timm", "pytorchcv"])
def test_half_precision(name):
    """Under autocast the map is bfloat16 and the weights float32; the error is that of a bfloat16 map."""
    original = made(name).float().train()
    block, x = copy.deepcopy(original), feature_map(4, torch.float32)
    fuse_(block)
    true = answers(copy.deepcopy(original).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(copy.deepcopy(block), x) >= TOGETHER
        got, plain = answers(block, x), answers(original, x)
    for a, b, c in zip(got, plain, true, strict=True):
        assert a.dtype == b.dtype
        if a.is_floating_point():
            assert relative(a, c) <= 2 * relative(b, c) + 1e-2


def test_small_maps_keep_their_norm(monkeypatch):
    block, x = made("timm"), feature_map()
    fuse_(block)
    whole = block(x)
    monkeypatch.setattr(normed, "LEAST", x.numel() + 1)
    assert not ran(block, x) & TOGETHER
    assert relative(block(x), whole) < 1e-12
    monkeypatch.setattr(normed, "LEAST", x.numel())
    assert ran(block, x) >= TOGETHER
    with torch.no_grad():  # pays later
        assert not ran(block, x) & {"affine_spatial_pool"}
        monkeypatch.setattr(normed, "LEAST", x.numel() // 2)
        assert ran(block, x) >= TOGETHER


def _left(left, on_cpu, x, opaque=False):
    return left(x, opaque) and (on_cpu or not opaque)


@pytest.mark.parametrize("which", ["timm", "pytorchcv", "ours"])
def test_compiled_without_gradients(which, monkeypatch):
    """On a CPU the equations are the compiler's, and no op is called. Elsewhere the ops are, and the add and the
    activation go with them; here that is what a CPU does where it is told that it is none."""
    torch.manual_seed(0)
    if which == "ours":
        original = models.cbam_resnet50(layers=(1,), planes=(4,), small_input=True, num_classes=3)
        x = torch.randn(2, 3, 8, 8, dtype=F64)
    else:
        original, x = BLOCKS[which][0](), torch.randn(2, C, 8, 7, dtype=F64)
    original = redraw(original).to(F64).eval()
    module = copy.deepcopy(original)
    fuse_(module)
    want, graphs = original(x), []

    def backend(graph, inputs):
        graphs.append([n for n in graph.graph.nodes if "fused_attn" in str(n.target)])
        return graph.forward

    for on_cpu in (False, True):
        for where in (chain, cbam):
            asked = functools.partial(_left, left_to_compiler, on_cpu)
            monkeypatch.setattr(where, "left_to_compiler", asked)
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert relative(got, want) < 1e-10
    elsewhere, here = graphs
    assert here == []
    (scale,) = [n for n in elsewhere if "scale" in str(n.target)]
    assert {"relu", "product"} <= set(scale.args)
    assert scale.args[2] is not None  # the residual
