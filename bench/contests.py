"""The mechanisms that `python -m bench blocks` times: each twice, as its users have it and fused.

Eager is the third-party module (timm, pytorchcv); where no package has the mechanism, its published equations
(published.py). SK, split attention and PSA come without their convolutions, which are the same for both.
"""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

import fused_attn
from fused_attn import plan
from fused_attn.blocks import normed

from . import published

WITHOUT = "fused without the gate"
APART = "fused, the norm apart"
TAIL = "tail with SE"  # BatchNorm, SE, shortcut, ReLU
SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # C and H = W of the stages of ResNet-50


class Pair(NamedTuple):
    """The same mechanism twice: as its users have it, and fused. Each takes the tensors of `inputs`.

    beside: something else that is timed with them, where there is something to compare with
    """

    eager: Callable[..., Any]
    fused: Callable[..., Any]
    source: str
    beside: tuple[str, Callable[..., Any]] | None = None


def _converted(module: nn.Module) -> Pair:
    """A third-party module, and a copy after `fuse_`. Raises RuntimeError where it isn't converted."""
    fused = copy.deepcopy(module)
    fused_attn.fuse_(fused, strict=True)
    if not isinstance(fused, plan.Planned):
        raise RuntimeError(f"fuse_ left {type(module).__name__} as it was")
    return Pair(module, fused, f"{type(module).__module__}.{type(module).__name__}")


def _loaded(module: nn.Module, block: nn.Module) -> Pair:
    """Published equations, and the library's block with their weights."""
    block.load_state_dict(module.state_dict())
    return Pair(module, block, "published equations")


class _Pick(nn.Module):
    """Stands for a convolution: the i-th of the branches that are given."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.i = i

    def forward(self, branches: tuple[Tensor, ...]) -> Tensor:
        return branches[self.i]


class _Together(nn.Module):
    """Hands several tensors to a module as one argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *branches: Tensor) -> Any:
        return self.module(branches)


class _Behind(nn.Module):
    """The part of a block behind its convolutions: branches to what its plan makes of them."""

    def __init__(self, block: nn.Module, **how: Any) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, *branches: Tensor) -> Tensor:
        found: Any = plan.ready(self.block)
        return found.softmax(branches, **self.how)  # type: ignore[no-any-return]


def _sk(c: int) -> Pair:
    from timm.layers import SelectiveKernel

    module = SelectiveKernel(c, c, split_input=False)
    module.paths = nn.ModuleList([_Pick(0), _Pick(1)])
    pair = _converted(module)
    return pair._replace(eager=_Together(module), fused=_Behind(pair.fused))  # type: ignore[arg-type]


def _split(c: int) -> Pair:
    from timm.layers import SplitAttn

    module = SplitAttn(c, norm_layer=nn.BatchNorm2d)
    module.conv, module.bn0, module.act0 = nn.Identity(), nn.Identity(), nn.Identity()
    return _converted(module)


def _psa(c: int) -> Pair:
    module = published.PyramidSqueeze(c)
    block = fused_attn.PyramidSqueezeAttention(c, c)
    block.se.load_state_dict(module.state_dict())
    return Pair(module, _Behind(block, each=True, merge="concat_reversed"), "published equations")


class _Normed(nn.Module):
    """A tail, or an inner gate: the norm with what follows it as in a fused parent, whatever the size of the map."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        fused_attn.fuse_(self.module)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        own: Any = self.module
        gate = None if own.gate is None else plan.ready(own.gate).behind()  # type: ignore[union-attr]
        norm = normed.read(own.bn)
        assert norm is not None
        if isinstance(own, published.Inner):
            assert gate is not None
            return normed.run_inside(norm, gate, x, "silu")
        return normed.run(norm, gate, x, shortcut, "relu")


class _Ahead(nn.Module):
    """A gate of branches and the norm behind it, in the library's block.

    apart: as two ops, one after the other; else as one, whatever the size of the map
    """

    def __init__(self, module: published.Ahead, channels: int, apart: bool) -> None:
        super().__init__()
        self.block = fused_attn.PyramidSqueezeAttention(channels, channels)
        self.block.se.load_state_dict(module.gate.state_dict())
        self.bn, self.apart = copy.deepcopy(module.bn), apart

    def forward(self, *branches: Tensor) -> Tensor:
        found, norm = plan.ready(self.block), normed.read(self.bn)
        assert found is not None
        assert norm is not None
        if self.apart:
            return normed.run(norm, None, found.weighed(branches), None, "relu")
        excite, tensors, merge = found.weighs()
        return normed.run_ahead(norm, (excite, tensors), branches, merge, "relu")


def _ahead(c: int) -> Pair:
    module = published.Ahead(c)
    beside = (APART, _Ahead(module, c, True))
    return Pair(module, _Ahead(module, c, False), "published equations and torch.nn", beside)


def _tail(gate: Callable[[int], nn.Module] | None) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        module = published.Tail(c, None if gate is None else gate(c))
        beside = None if gate is None else (WITHOUT, _Normed(published.Tail(c, None)))
        return Pair(module, _Normed(module), "torch.nn and timm", beside)

    return make


class _Shuffled(nn.Module):
    """A norm, shuffle attention, the shortcut and ReLU, in the library's block.

    apart: the norm, and then the gate with what follows it; else as one, whatever the size of the map
    """

    def __init__(self, module: published.Tail, channels: int, apart: bool) -> None:
        super().__init__()
        assert module.gate is not None
        self.block = fused_attn.ShuffleAttention(channels)
        self.block.load_state_dict(module.gate.state_dict())
        self.bn, self.apart = copy.deepcopy(module.bn), apart

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        found, norm = plan.ready(self.block), normed.read(self.bn)
        assert found is not None
        assert norm is not None
        if self.apart:
            return found.run(self.bn(x), shortcut, "relu", 0.01)
        return normed.run(norm, found.behind(), x, shortcut, "relu")


def _shuffled(c: int) -> Pair:
    module = published.Tail(c, published.Shuffle(c))
    beside = (APART, _Shuffled(module, c, True))
    return Pair(module, _Shuffled(module, c, False), "published equations and torch.nn", beside)


class _Apart(_Normed):
    """A tail whose norm is PyTorch's, and the rest of it fused."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        own: Any = self.module
        return plan.ready(own.gate).run(own.bn(x), shortcut, "relu", 0.01)  # type: ignore[union-attr]


def _two_gates(gate: Callable[[int], nn.Module]) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        module = published.Tail(c, gate(c))
        return Pair(module, _Normed(module), "torch.nn and timm", (APART, _Apart(module)))

    return make


def _inner(c: int) -> Pair:
    module = published.Inner(c, _layer("SEModule")(c))
    return Pair(module, _Normed(module), "torch.nn and timm")


def _layer(name: str) -> Callable[[int], nn.Module]:
    def make(c: int) -> nn.Module:
        from timm import layers

        return operator.attrgetter(name)(layers)(c)  # type: ignore[no-any-return]

    return make


def _timm(name: str, **options: Any) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        from timm import layers

        return _converted(operator.attrgetter(name)(layers)(c, **options))

    return make


def _pytorchcv(where: str, name: str) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        import importlib

        return _converted(getattr(importlib.import_module(f"pytorchcv.models.{where}"), name)(channels=c))

    return make


def _function(eager: Callable[..., Any], fused: Callable[..., Any]) -> Callable[[int], Pair]:
    return lambda c: Pair(eager, fused, "published equations")


def _one(n: int, c: int, s: int) -> list[tuple[int, ...]]:
    return [(n, c, s, s)]


def _two(n: int, c: int, s: int) -> list[tuple[int, ...]]:
    return [(n, c, s, s)] * 2


@dataclass(frozen=True)
class Contest:
    """One mechanism of the table. make: channels -> Pair; inputs: (n, c, s) -> shapes; needs: the package it takes;
    divides: what the number of channels is a multiple of."""

    name: str
    make: Callable[[int], Pair]
    inputs: Callable[[int, int, int], list[tuple[int, ...]]] = _one
    needs: str | None = None
    divides: int = 8


_ops = fused_attn.ops
CONTESTS = {
    c.name: c
    for c in (
        Contest("SE (timm)", _timm("SEModule"), needs="timm"),
        Contest("ECA (timm)", _timm("EcaModule"), needs="timm"),
        Contest("CBAM (timm)", _timm("cbam.CbamModule"), needs="timm"),
        Contest("CBAM (pytorchcv)", _pytorchcv("cbamresnet", "CbamBlock"), needs="pytorchcv"),
        Contest("BAM (pytorchcv)", _pytorchcv("bamresnet", "BamBlock"), needs="pytorchcv"),
        Contest(
            "BAM merge",
            _function(
                published.product_merge, lambda x, a, b: _ops.scale(x, a, pixel=b[:, 0], merge="sigmoid_product")
            ),
            lambda n, c, s: [(n, c, s, s), (n, c), (n, 1, s, s)],
        ),
        Contest("SK (timm)", _sk, _two, "timm"),
        Contest("split attention (timm)", _split, lambda n, c, s: [(n, 2 * c, s, s)], "timm"),
        Contest("PSA", _psa, lambda n, c, s: [(n, c // 4, s, s)] * 4, divides=64),
        Contest("DRSN", lambda c: _loaded(published.SoftThreshold(c), fused_attn.Shrinkage(c))),
        Contest(
            "Shuffle Attention", lambda c: _loaded(published.Shuffle(c), fused_attn.ShuffleAttention(c)), divides=128
        ),
        Contest("SGE", lambda c: _loaded(published.GroupEnhance(), fused_attn.SpatialGroupEnhance()), divides=64),
        Contest(TAIL, _tail(_layer("SEModule")), _two, "timm"),
        Contest("tail with ECA", _tail(_layer("EcaModule")), _two, "timm"),
        Contest("tail with CBAM", _two_gates(_layer("cbam.CbamModule")), _two, "timm"),
        Contest("tail without a gate", _tail(None), _two),
        Contest("tail of PSA", _ahead, lambda n, c, s: [(n, c // 4, s, s)] * 4, divides=64),
        Contest("tail with Shuffle Attention", _shuffled, _two, divides=128),
        Contest("BatchNorm, SiLU, SE", _inner, needs="timm"),
        Contest("f1", _function(published.sigmoid_scale, lambda z, t: _ops.map_scale(t, z)), _two),
        Contest("f2", _function(published.channel_norm_scale, lambda z, t: _ops.map_scale(t, z, "channels")), _two),
        Contest("f3", _function(published.spatial_norm_scale, lambda z, t: _ops.map_scale(t, z, "positions")), _two),
    )
}

NORMED = ("BAM (pytorchcv)", "SK (timm)", "split attention (timm)", "DRSN")  # with a BatchNorm of descriptors
