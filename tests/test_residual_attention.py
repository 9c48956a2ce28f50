"""Residual attention against pytorchcv's blocks, with the same numbers, and against its equations."""

import copy

import pytest
import support  # noqa: F401  (makes pytorchcv importable beside a CPU torch)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import BLOCKS, ResidualAttention, fuse_, unfuse_
from fused_attn.blocks.residual_attention import AttentionMask
from tests.support import redraw, relative, step, worst

F64 = torch.float64
resattnet = pytest.importorskip("pytorchcv.models.resattnet")


def feature_map(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def theirs(depth: int = 2) -> nn.Module:
    return redraw(resattnet.AttBlock(16, 16, depth, [1, 2, 1]).double())


def ours(block: nn.Module, depth: int) -> nn.Sequential:
    """The same block out of our modules, with pytorchcv's units and numbers."""
    unit = lambda c: resattnet.ResBlock(c, c)
    module = ResidualAttention(
        trunk=nn.Sequential(unit(16), unit(16)),
        mask=AttentionMask(16, depth, unit=unit, skip=lambda c: resattnet.DoubleSkipBlock(c, c)),
        add_trunk=True,
    ).double()
    hg, middle, mask = block.hg, block.middle_block, module.mask
    pairs: list = [
        (module.trunk, hg.skip_seq.skip1.blocks if hasattr(hg.skip_seq.skip1, "blocks") else hg.skip_seq.skip1)
    ]
    for level in range(depth):
        pairs += [(mask.down[level], hg.down_seq[level].res_blocks), (mask.up[level], hg.up_seq[level].res_blocks)]
        if level:
            pairs.append((mask.skip[level - 1], hg.skip_seq[level]))
    for i, conv in ((0, middle.conv1), (3, middle.conv2)):
        pairs += [(mask.logits[i], conv.bn), (mask.logits[i + 2], conv.conv)]
    for mine, other in pairs:
        for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
            assert a.shape == b.shape
            a.copy_(b)
    return nn.Sequential(block.init_blocks, module, block.final_block)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pytorchcvs_block(depth: int, training: bool) -> None:
    """Our trunk, mask and gate, given pytorchcv's numbers, give its outputs and the gradient of x and parameters."""
    block = theirs(depth).train(training)
    with torch.no_grad():
        module = ours(copy.deepcopy(block), depth).train(training)
    x = feature_map(2, 16, 16, 24)
    y, grads = step(module, x)
    want, expected = step(block, x)
    assert relative(y, want) < 1e-12
    assert relative(grads["input 0"], expected["input 0"]) < 1e-11
    norms = lambda g: sorted(float(t.norm()) for name, t in g.items() if name != "input 0")
    assert torch.allclose(torch.tensor(norms(grads)), torch.tensor(norms(expected)), rtol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conversion(training: bool) -> None:
    """A fused AttBlock gives the original's outputs, gradients and statistics; unfusing gives the class back."""
    plain = theirs().train(training)
    block = copy.deepcopy(plain)
    model = nn.Sequential(block)
    report = fuse_(model, strict=True)
    assert report.fused == ["0"]
    x = feature_map(2, 16, 16, 12)
    y, grads = step(block, x)
    want, expected = step(plain, x)
    assert relative(y, want) < 1e-12
    assert worst(grads, expected) < 1e-9
    for a, b in zip(block.buffers(), plain.buffers(), strict=True):
        assert relative(a, b) < 1e-12
    assert "map_scale" in str(fused_attn.explain(model, x))
    unfuse_(model)
    assert type(block) is resattnet.AttBlock


def test_a_model() -> None:
    """resattnet56: every attention block, in float64, within what rounding leaves."""
    model = redraw(resattnet.resattnet56(num_classes=3).double()).eval()
    x = feature_map(1, 3, 224, 224)
    with torch.no_grad():
        want = model(x)
        report = fuse_(model)
        assert len(report.fused) == 3
        assert relative(model(x), want) < 1e-10


def test_what_hangs_on_the_sigmoid_is_run() -> None:
    block = theirs()
    fuse_(block)
    x, calls = feature_map(2, 16, 8, 8), []
    block.eval()
    fused = block(x)
    with block.middle_block.sigmoid.register_forward_hook(lambda *_: calls.append(1)):
        plain = block(x)
    assert calls
    assert relative(fused, plain) < 1e-12
    block.middle_block.sigmoid = nn.Hardsigmoid()
    other = block(x)
    assert relative(other, fused) > 1e-6
    assert relative(other, type(block).original.forward(block, x)) < 1e-12


def test_refusals() -> None:
    block = theirs()
    block.middle_block.sigmoid = nn.Hardsigmoid()
    assert "not a Sigmoid" in fuse_(block).refused[0][1]
    with pytest.raises(ValueError, match="gate must be one of"):
        ResidualAttention(8, gate="f4")
    with pytest.raises(ValueError, match="channels must be given"):
        ResidualAttention(trunk=nn.Identity())
    with pytest.raises(ValueError, match="z must have the shape of x"):
        ResidualAttention(trunk=nn.Identity(), mask=nn.AvgPool2d(2))(torch.randn(1, 2, 4, 4))


EQUATIONS = {
    "f1": lambda z: torch.sigmoid(z),
    "f2": lambda z: F.normalize(z, dim=1),
    "f3": lambda z: torch.sigmoid(F.instance_norm(z)),
}


@pytest.mark.parametrize("shape", [(2, 6, 11), (2, 6, 5, 7), (2, 6, 3, 4, 5)], ids=len)
@pytest.mark.parametrize("gate", EQUATIONS)
def test_gates_are_torchs(gate: str, shape: tuple[int, ...]) -> None:
    """By functions of torch: sigmoid, F.normalize, F.instance_norm with their defaults."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.7, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1) * self.weight + 0.3

    trunk, mask = Scaled(), Scaled()
    module = ResidualAttention(trunk=trunk, mask=mask, gate=gate)
    x = feature_map(*shape)
    y, grads = step(module, x)

    class Want(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.mask = trunk, mask

        def forward(self, x: Tensor) -> Tensor:
            return (1 + EQUATIONS[gate](self.mask(x))) * self.trunk(x)

    want, expected = step(Want(), x)
    assert relative(y, want) < 1e-12
    largest = max(float(g.norm()) for g in expected.values())
    for name, grad in grads.items():  # f3 takes the mask's scale away again: that gradient is 0 but for eps
        assert float((grad - expected[name]).norm()) < 1e-12 * largest, name


def test_declaration() -> None:
    for case in BLOCKS["residual_attention"].cases:
        module = redraw(ResidualAttention(**case.args["args"]).double())
        y, grads = step(module, feature_map(*case.args["x"]))
        assert y.shape == case.args["x"]
        assert all(grad.isfinite().all() for grad in grads.values())
