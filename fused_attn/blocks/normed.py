"""A BatchNorm and what follows it, as one map per sample and channel: the gate, the residual add and the activation.

    z = a·(x − μ) + β,  a = γ/√(var + eps);   y = act(z·s + residual),  s = gate(mean_s z)

With x̄ the mean of a sample's plane, z has the mean z̄ = a·(x̄ − μ) + β there, so the gate needs no pass over z, and

    y = act(scale·(x − x̄) + shift + residual),   scale = s·a,   shift = s·z̄

which `moments_affine` computes: μ and var come from the same moments as x̄, or are running ones. A gate may stand before
the norm, too, if it is a function of x̄ (PSA's): s·x has the moments s·x̄ and s²·m2, of which μ and var are made, and

    y = act(scale·(x − x̄) + shift),   scale = a·s,   shift = a·(s·x̄ − μ) + β

A gate per channel and one per pixel behind z (CBAM's) are `affine_dual_scale`'s: the largest z is where x is largest,
or smallest. A gate that normalises the planes of z (shuffle attention's) needs their variances besides, which are
a²·m2/S. Ioffe and Szegedy, arXiv:1502.03167, alg. 1; running statistics keep the variance of n values, divided by
n − 1, as PyTorch's do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import backend
from ..layout import accumulator
from ..ops.affine_apply import affine_apply
from ..ops.affine_dual_scale import affine_dual_scale
from ..ops.affine_pool_scale import affine_pool_scale
from ..ops.batch_affine import batch_affine, formula
from ..ops.branch_affine import branch_moments_affine
from ..ops.moments_affine import moments_affine
from ..ops.moments_gate_shuffle import moments_gate_shuffle
from ..plan import PLAIN, path, vars_of
from .norms import affine, keep, uses_batch

_BATCH = {f"torch.nn.modules.batchnorm.BatchNorm{d}d": d for d in (1, 2, 3)}
_SYNC = "torch.nn.modules.batchnorm.SyncBatchNorm"
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"
# A BatchNorm and its activation in one module; the activation is the child `act`, and `drop` does nothing.
WITH_ACT = "timm.layers.norm_act.BatchNormAct2d"

Gate = tuple[Callable[..., Tensor], Sequence[Tensor]]  # a function of means (N, C) and tensors, and those tensors


class Planar(NamedTuple):
    """A gate per channel and then one per pixel, as `affine_dual_scale` takes them.

    channel, spatial: those functions, each with its tensors; pool: over pixels; ties: of both poolings
    keep: gets the statistics that they return beside their gates, and x
    """

    channel: tuple[Callable[..., Any], Sequence[Tensor]]
    spatial: tuple[Callable[..., Any], Sequence[Tensor]]
    pool: str
    ties: str
    keep: Callable[[Sequence[Tensor], Tensor], None]


class Planes(NamedTuple):
    """A gate that is a sigmoid, at each position, of a function of its input's planes, behind which channels are
    shuffled, as `moments_gate_shuffle` takes it.

    logits: (means, variances, tensors) -> what the input less its mean is multiplied by, and the offset, (N, C)
    k: channels of a half group
    """

    logits: Callable[..., Any]
    tensors: Sequence[Tensor]
    k: int


# On a CPU, how many elements a map must have for its norm to be computed with what follows it. A smaller one stays in a
# cache, where a pass costs less than the dozen small calls around the kernels. Measured on a Xeon (2 MiB L2), one
# thread, against PyTorch's norm and the fused gate behind it: at 0.8 M elements 1.0 to 1.5 times as fast, at 0.4 M 0.9
# to 1.1, at 0.1 M half as fast. A gate behind an activation, or one that differs from position to position, takes two
# passes that compute, and pays later; so do a gate per channel and one per pixel where nothing is trained: there one of
# the norm's two passes is left.
LEAST = 800_000


def pays(norm: "Norm", x: Tensor, behind_act: bool = False, gate: Any = None) -> bool:
    """Whether a norm is worth computing with what follows it. behind_act: with a gate behind an activation; gate: as
    `run` takes it."""
    if together(norm) is not None:  # all processes must answer the same, whatever the sizes of their batches
        return True
    if x.numel() == 0 or not has_kernel(x):
        return False
    if not x.is_cpu:
        return True
    least = LEAST
    if behind_act or isinstance(gate, Planes):
        least = LEAST * 3 // 2 if torch.is_grad_enabled() else LEAST * 5 // 2
    elif isinstance(gate, Planar) and not torch.is_grad_enabled():
        least = LEAST * 2
    return x.numel() >= least


class Norm(NamedTuple):
    """A BatchNorm read off a module: where its tensors are looked up on every call."""

    its: dict[str, Any]
    kind: str  # "batch", "sync" or "frozen"
    dims: int | None  # how many spatial dimensions it takes; None: any

    def takes(self, x: Tensor) -> bool:
        """Whether its module would take x, and give x's dtype."""
        weight, bias = self.tensors()
        kept = self.its["_buffers"]["running_mean"]
        there = [t for t in (weight, bias, kept) if t is not None]
        # FSDP's flat parameters and subclasses of tensors aren't read; and a frozen norm is plain arithmetic.
        return (
            self.dims in (None, x.dim() - 2)
            and x.dim() > 2
            and all(type(t) in PLAIN and t.shape == x.shape[1:2] and t.is_floating_point() for t in there)
            and (self.kind != "frozen" or all(t.dtype == x.dtype for t in there))
        )

    @property
    def batch(self) -> bool:
        """Whether the statistics of the batch are used."""
        return self.kind != "frozen" and uses_batch(self.its)

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias; a frozen one keeps them as buffers."""
        return affine(self.its, "_buffers" if self.kind == "frozen" else "_parameters")


def read(child: nn.Module | None) -> Norm | None:
    """The BatchNorm that a module is, or None where it is something else."""
    where = path(type(child))
    if where in _BATCH:
        return Norm(vars_of(child), "batch", _BATCH[where])
    if where in (WITH_ACT, _FROZEN):
        return Norm(vars_of(child), "batch" if where == WITH_ACT else "frozen", 2)
    return Norm(vars_of(child), "sync", None) if where == _SYNC else None


def has_kernel(x: Tensor) -> bool:
    """Whether a compiled kernel runs where x is: the eager form of a map that is nothing but motion is slower than
    PyTorch's norm. A forced backend is taken at its word."""
    if backend.forced() != "auto":
        return True
    first = backend.order(affine_apply, x)[0]
    return first != "eager" and not isinstance(backend.implementation(affine_apply, first), str)


def together(norm: Norm) -> Any:
    """The process group whose statistics a SyncBatchNorm shares, or None."""
    dist = torch.distributed
    if norm.kind != "sync" or not norm.its["training"] or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.its["process_group"] or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


class _Shared(torch.autograd.Function):
    """Mean and biased variance (C,) over all processes, from those of this one: one collective each way, on (C,)
    numbers. Sums of squares are merged by Chan, Golub and LeVeque's formula."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, m2: Tensor, count: int, group: Any, memo: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not memo:  # an excite runs again in backward; its numbers are here by then
            # Of another size than PyTorch's own: where a hook on one process alone keeps the module in place there, the
            # two must not take each other's numbers.
            mine = torch.cat([mean, m2, mean.new_tensor([count, 0])])
            all_of = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(all_of, mine, group)
            means, m2s, counts = torch.stack(all_of)[:, :-1].split([len(mean), len(mean), 1], 1)
            total = counts.sum()
            mu = (means * (counts / total)).sum(0)
            memo += [mu, (m2s + counts * (means - mu).square()).sum(0) / total, total]
        mu, var, total = memo
        ctx.save_for_backward(mean, mu, total)
        ctx.group, ctx.count = group, count
        return mu.clone(), var.clone()

    @staticmethod
    def backward(ctx: Any, dmu: Tensor, dvar: Tensor) -> tuple[Any, ...]:
        mean, mu, total = ctx.saved_tensors
        both = torch.stack([dmu, dvar])
        torch.distributed.all_reduce(both, group=ctx.group)
        dmu, dvar = both
        return (dmu + 2 * dvar * (mean - mu)) * (ctx.count / total), dvar / total, None, None, None


def _shared(moments: Tensor, size: int, group: Any, memo: list[Tensor]) -> tuple[Tensor, Tensor]:
    """μ and the biased variance (C,) over all processes, from the moments of the planes here."""
    mean, m2 = moments
    n = max(mean.shape[0], 1)  # a process without samples brings zeros, and counts for nothing
    mu = mean.sum(0) / n
    whole = m2.sum(0) + (mean - mu).square().sum(0) * size
    found: tuple[Tensor, Tensor] = _Shared.apply(mu, whole, mean.shape[0] * size, group, memo)
    return found


def _times(a: Tensor, weight: Tensor | None) -> Tensor:
    return a if weight is None else a * weight.to(a.dtype)


class _Map:
    """The functions that `moments_affine` and `affine_pool_scale` call, with what they depend on besides tensors: read
    when forward runs, because they run again in backward, when the module may have changed."""

    def __init__(self, norm: Norm, x: Tensor, excite: Callable[..., Tensor] | None = None) -> None:
        self.batch, self.eps, self.excite = norm.batch, norm.its["eps"], excite
        self.acc, self.shape, self.size = accumulator(x.dtype), x.shape[:2], math.prod(x.shape[2:])
        self.group = together(norm) if self.batch else None
        self.memo: list[Tensor] = []
        weight, bias = norm.tensors()
        self.weighted, self.biased = weight is not None, bias is not None
        standing: tuple[Tensor, ...] = ()
        if not self.batch:
            buffers = norm.its["_buffers"]
            standing = buffers["running_mean"], buffers["running_var"]
        self.tensors = tuple(t for t in (weight, bias, *standing) if t is not None)
        self.values = x.numel() // x.shape[1]
        if self.batch and self.group is None and self.values == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")

    @property
    def count(self) -> int:
        """How many values of a channel the batch had, over all processes; once forward has run."""
        return int(self.memo[2]) if self.memo else self.values

    def both(self, *given: Tensor) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """Scale and shift (2, N, C) of the norm, relative to the mean of each plane where the batch's statistics are
        used, else to the running mean; those statistics (2, C), or None; and the tensors left for a gate."""
        rest = list(given[self.batch :])
        weight = rest.pop(0) if self.weighted else None
        bias = rest.pop(0) if self.biased else None
        if self.batch and self.group is None:
            # Compilers differentiate only what they can look into.
            of: Any = formula if is_compiling() else batch_affine
            found, statistics = of(given[0], weight, bias, self.size, self.eps)
            return found, statistics, rest
        if self.batch:
            moments = given[0]
            mu, var = _shared(moments, self.size, self.group, self.memo)
            a = _times(torch.rsqrt(var + self.eps), weight)
            shift = (moments[0] - mu) * a
            shift = shift if bias is None else shift + bias.to(self.acc)
            return torch.stack([a.expand_as(shift), shift]), torch.stack([mu, var]), rest
        _, var = rest.pop(0), rest.pop(0).to(self.acc)
        a = _times(torch.rsqrt(var + self.eps), weight)
        shift = torch.zeros_like(a) if bias is None else bias.to(self.acc)
        return torch.stack([a, shift]).unsqueeze(1).expand(2, *self.shape), None, rest

    def outside(self, given: Tensor, *tensors: Tensor) -> Any:
        """Scale and shift of the norm and the gate of its means, relative to the means of the planes."""
        if self.batch:
            both, statistics, rest = self.both(given, *tensors)
        else:
            both, statistics, rest = self.both(*tensors)
            mu = tensors[self.weighted + self.biased].to(self.acc)
            both = torch.stack([both[0], (given - mu) * both[0] + both[1]])
        if self.excite is not None:
            both = both * self.excite(both[1], *rest)
        return both if statistics is None else (both, statistics)

    def planes(self, given: Tensor, *tensors: Tensor) -> Any:
        """What `moments_gate_shuffle` asks for, of the norm and of a gate of the means and variances of its planes."""
        assert self.excite is not None
        own = len(self.tensors)
        if self.batch:
            both, statistics, _ = self.both(given, *tensors[:own])
            scale, mean = both.unbind()
        else:
            both, statistics, _ = self.both(*tensors[:own])
            mu = tensors[self.weighted + self.biased].to(self.acc)
            scale = both[0]
            mean = (given[0] - mu) * scale + both[1]
        steep, offset = self.excite(mean, scale.square() * (given[1] / self.size), *tensors[own:])
        values = torch.stack([scale, mean, steep * scale, offset])
        return values if statistics is None else (values, statistics)

    def ahead(self, given: Tensor, *tensors: Tensor) -> Any:
        """Scale and shift of a gate of the means and of the norm behind it, relative to the means of the planes."""
        assert self.excite is not None
        own = len(self.tensors)
        if self.batch:
            mean, m2 = given.unbind()
            s = self.excite(mean, *tensors[own:])
            both, statistics, _ = self.both(torch.stack([s * mean, s.square() * m2]), *tensors[:own])
            assert statistics is not None
            scale, shift = both.unbind()
            return torch.stack([scale * s, shift]), statistics
        s = self.excite(given, *tensors[own:])
        both, _, _ = self.both(*tensors[:own])
        mu = tensors[self.weighted + self.biased].to(self.acc)
        return torch.stack([both[0] * s, (s * given - mu) * both[0] + both[1]])

    def inside(self, *given: Tensor) -> Any:
        """Scale and shift of the norm alone: relative to the plane's mean, or to the running one."""
        both, statistics, _ = self.both(*given)
        return both if statistics is None else (both, statistics)


def run(
    norm: Norm, gate: Gate | Planar | Planes | None, x: Tensor, residual: Tensor | None = None, act: str = "identity",
    slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """act(norm(x)·s + residual), s = gate of the means of norm(x), or two of what is pooled, or one of the means and
    variances of planes; without a gate s is 1.

    x, residual: (N, C, *S); norm's running statistics are updated where it trains
    """
    if isinstance(gate, Planar):
        return _run_planar(norm, gate, x, residual, act, slope)
    if isinstance(gate, Planes):
        return _run_planes(norm, gate, x, residual, act, slope)
    excite, tensors = gate if gate is not None else (None, ())
    maps = _Map(norm, x, excite)
    if not maps.batch and excite is None:  # nothing of x is pooled
        scale, shift = maps.inside(*maps.tensors)
        centre = _centre(norm, x)
        return affine_apply(x, scale, shift, centre, residual, None, act, slope)
    what = "moments" if maps.batch else "mean"
    out = moments_affine(
        x, maps.outside, *maps.tensors, *tensors, descriptor=what, residual=residual, act=act, slope=slope
    )
    return _kept(norm, maps, out)


def _run_planar(
    norm: Norm, gate: Planar, x: Tensor, residual: Tensor | None, act: str, slope: float
) -> Tensor:  # fmt: skip
    maps = _Map(norm, x)
    out = affine_dual_scale(
        x, maps.outside, gate.channel[0], gate.spatial[0], maps.tensors, gate.channel[1], gate.spatial[1],
        moments=maps.batch, channel=gate.pool, ties=gate.ties, residual=residual, act=act, slope=slope,
    )  # fmt: skip
    y, *statistics = out if isinstance(out, tuple) else (out,)
    if maps.batch:
        keep(norm.its, statistics.pop(0), maps.count)
    gate.keep(statistics, x)
    return y


def _run_planes(norm: Norm, gate: Planes, x: Tensor, residual: Tensor | None, act: str, slope: float) -> Tensor:
    maps = _Map(norm, x, gate.logits)
    given = (*maps.tensors, *gate.tensors)
    return _kept(
        norm, maps, moments_gate_shuffle(x, maps.planes, *given, k=gate.k, residual=residual, act=act, slope=slope)
    )


def run_inside(norm: Norm, gate: Gate, x: Tensor, act: str, slope: float = 0.01) -> Tensor:
    """act(norm(x))·s, s = gate of the means of act(norm(x)): the gate behind an activation."""
    excite, tensors = gate
    maps = _Map(norm, x)
    centre = None if maps.batch else _centre(norm, x)
    out = affine_pool_scale(
        x, maps.inside, excite, maps.tensors, tensors, moments=maps.batch, centre=centre, act=act, slope=slope
    )
    return _kept(norm, maps, out)


def merged(maps: Sequence[Tensor]) -> Tensor:
    """What stands for the map that branches are concatenated into, wherever only its shape and dtype are asked for."""
    x = maps[0]
    return x.detach().new_empty(()).expand(x.shape[0], len(maps) * x.shape[1], *x.shape[2:])


def run_ahead(
    norm: Norm, gate: Gate, maps: Sequence[Tensor], merge: str, act: str = "identity", slope: float = 0.01
) -> Tensor:
    """act(norm(s·x)), x the branches side by side, s = gate of the means of x: the gate before the norm."""
    excite, tensors = gate
    of = _Map(norm, merged(maps), excite)
    out = branch_moments_affine(
        *maps, excite=of.ahead, params=(*of.tensors, *tensors), merge=merge,
        descriptor="moments" if of.batch else "mean", act=act, slope=slope,
    )  # fmt: skip
    return _kept(norm, of, out)


def _centre(norm: Norm, x: Tensor) -> Tensor:
    """The running mean for every sample (N, C)."""
    mean: Tensor = norm.its["_buffers"]["running_mean"]
    return mean.to(accumulator(x.dtype)).expand(x.shape[:2])


def _kept(norm: Norm, maps: _Map, out: Any) -> Tensor:
    """y alone; running statistics are updated by those beside it."""
    if not maps.batch:
        return out
    y, statistics = out
    keep(norm.its, statistics, maps.count)
    return y
