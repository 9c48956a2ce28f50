"""Squeeze-and-excitation of classes that nothing names: read where the forward is understood, refused where not.

The classes below are written as they are found in repositories; each that is read gives, fused, what it gave before.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import explain, fuse_, unfuse_
from tests.support import assert_same_step, redraw

F64 = torch.float64
C, H = 24, 6


def mlp(bias: bool = False, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, H, bias=bias), act(), nn.Linear(H, C, bias=bias), nn.Sigmoid())


class Base(nn.Module):
    """avg_pool and a Sequential of Linear layers, as in most repositories."""

    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = mlp()


class Expanded(Base):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Plain(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = mlp(bias=True, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """A docstring."""
        batch, channels = x.shape[:2]
        gate = self.avg_pool(x).reshape(batch, -1)
        gate = self.fc(gate)
        out = gate.view((batch, channels, 1, 1)) * x
        return out


class Flattened(Base):
    def forward(self, x):
        w = torch.flatten(self.avg_pool(x), 1)
        w = self.fc(w).unsqueeze(-1).unsqueeze(3)
        return torch.mul(x, w)


class Means(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.avg_pool

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None] if False else x * self.fc(x.mean((2, 3)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(C, H, 1)
        self.up = nn.Conv2d(H, C, kernel_size=1, bias=False)

    def forward(self, x):
        s = x.mean(dim=[-1, -2], keepdim=True)
        s = F.relu(self.down(s), inplace=True)
        s = self.up(s)
        return x * torch.sigmoid(s)


class Functional(Convolutions):
    def forward(self, inputs):
        x = F.adaptive_avg_pool2d(inputs, (1, 1))
        x = self.up(F.silu(self.down(x)))
        x = F.hardsigmoid(x)
        return inputs.mul(x)


class Whole(nn.Module):
    """All layers in one Sequential, and one more around two of them."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(C, H, 1), nn.ReLU(inplace=True))
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), inner, nn.Conv2d(H, C, 1), nn.Hardsigmoid())

    def forward(self, x):
        return x * self.se(x)


class Residual(Base):
    def forward(self, x):
        n, c, _h, _w = x.shape
        y = self.fc(self.avg_pool(x).view(n, c)).view(n, c, 1, 1)
        return x + x * y


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(C, C, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x):
        module_input = x
        x = self.gap(x)
        x = self.fc(x)
        x = self.gate(x)
        return module_input * x


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool1d(1)
        self.fc = mlp()

    def forward(self, x):
        b, c, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1)
        return x * y


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc1, self.fc2 = nn.Conv3d(C, H, 1), nn.Conv3d(H, C, 1)
        self.act, self.out = nn.LeakyReLU(0.2), nn.Sigmoid()

    def forward(self, x):
        return x * self.out(self.fc2(self.act(self.fc1(self.pool(x)))))


class Inherited(Expanded):
    pass


READ = [Expanded, Plain, Flattened, Convolutions, Functional, Whole, Residual, Single, Row, Volume, Inherited]
SHAPES = {Row: (4, C, 11), Volume: (4, C, 3, 4, 5)}


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return redraw(cls()).to(F64)


def feature_map(cls: type[nn.Module]) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    n, c, *s = SHAPES.get(cls, (4, C, 6, 5))
    offset = 2 * torch.randn(n, c, *(1 for _ in s), generator=draw, dtype=F64)
    return offset + torch.randn(n, c, *s, generator=draw, dtype=F64)


@pytest.mark.parametrize("cls", READ)
def test_read(cls: type[nn.Module]) -> None:
    original = make(cls)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert (report.fused, report.refused) == ([""], [])
    x = feature_map(cls)
    within = 1e-6 if any(isinstance(m, nn.Hardsigmoid) for m in original.modules()) or cls is Functional else 1e-12
    assert_same_step(module, original, x, within=within)
    assert explain(module, x).lines[-1].backend != "unfused"
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is type(module)
    assert torch.equal(twin(x), module(x))
    unfuse_(module)
    assert type(module) is cls


class Dropped(Expanded):
    def __init__(self) -> None:
        super().__init__()
        self.fc.insert(1, nn.Dropout(0.5))


class Conditional(Base):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        if self.training:
            y = 2 * y
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class Doubled(Base):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y * 2


class Largest(Expanded):
    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveMaxPool2d(1)


class Twice(Base):
    """The ReLU in place changes what is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Linear(C, C), nn.ReLU(inplace=True), nn.Linear(C, C), nn.Sigmoid()
        del self.fc

    def forward(self, x):
        b, c, _, _ = x.size()
        z = self.fc1(self.avg_pool(x).view(b, c))
        self.act(z)
        y = self.gate(self.fc2(z)).view(b, c, 1, 1)
        return x * y


class Reused(Twice):
    def forward(self, x):
        b, c, _, _ = x.size()
        z = self.fc1(self.avg_pool(x).view(b, c))
        h = self.act(z)  # noqa: F841
        y = self.gate(self.fc2(z)).view(b, c, 1, 1)
        return x * y


class Weights(Base):
    def forward(self, x):
        b, c, _, _ = x.size()
        return self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class Transposed(Base):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(c, b)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class Spatial(Base):
    """The mean over one dimension only."""

    def forward(self, x):
        b, c, _h, _w = x.size()
        y = x.mean(3, keepdim=True)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


def shadowed() -> type[nn.Module]:
    F = nn.Module()

    class Shadowed(Convolutions):
        def forward(self, x):
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))

    return Shadowed


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class Overlaid(Expanded):
    """A class attribute stands before the child of that name."""

    @property
    def fc(self):
        return nn.Identity()

    @fc.setter
    def fc(self, module):
        self._modules["fc"] = module


class Linear4d(Base):
    """A Linear layer on (N, C, 1, 1) acts on the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(self.avg_pool(x))


REFUSED = {
    Dropped: "aren't those of",
    Conditional: "if self.training",
    Doubled: "x * y * 2",
    Largest: "AdaptiveMaxPool2d",
    Twice: "self.act(z)",
    Reused: "`z`",
    Weights: "returns the gate",
    Transposed: "view(c, b)",
    Spatial: "mean(3",
    Decorated: "plain method",
    Overlaid: "isn't one of its children",
    Linear4d: "is applied to 4 dimensions",
    Means: "x *",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_what_is_not_understood_is_refused(cls: type[nn.Module]) -> None:
    module = make(cls)
    ((name, reason),) = fuse_(module).refused
    assert (name, type(module)) == ("", cls)
    assert REFUSED[cls] in reason, reason


def test_a_closure_is_not_read() -> None:
    assert fuse_(shadowed()()).fused == []


def test_a_gate_in_a_sequential_is_its_parents() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(C, C, 1)
            self.att = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, C, 1), nn.Sigmoid()
            )

        def forward(self, x):
            x = self.body(x)
            return self.att(x) * x

    ((name, reason),) = fuse_(Parent()).refused
    assert name == "att"
    assert "Sequential" in reason


def test_a_source_that_changed_is_not_read() -> None:
    space = {"nn": nn}
    source = "class SE(nn.Module):\n    def forward(self, x):\n        return x * self.fc(x)\n"
    exec(source, space)  # no file holds it
    module = Base()
    module.__class__ = type("SE", (Base,), {"forward": space["SE"].forward})
    ((_, reason),) = fuse_(module).refused
    assert "source" in reason


def test_other_shapes_are_left_to_the_original() -> None:
    original = make(Whole)
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map(Whole)[0]  # unbatched
    assert torch.equal(module(x), original(x))
