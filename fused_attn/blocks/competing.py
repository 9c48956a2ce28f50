"""What SK, split attention and PSA share: branches, and a head of two dense layers that makes them compete.

    p = pool(branches),  l = g(W2 act(norm(W1 p + b1)) + b2),  y = merge_b softmax_b(l)_b · x_b

The head is read off a module as SE's network is, with dense layers that may be in groups.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops import activations, checks
from ..ops.branch_softmax import branch_softmax
from ..ops.branches import MOST
from ..ops.shared_mlp import shared_mlp
from ..plan import Plan, Planned, Refused, activation, fingerprint, leaf, path, ready, renew, run_original, vars_of
from .excite_plan import dense
from .norms import keep, norm_of, norm_state

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}  # by spatial dimensions
_MEAN = "torch.nn.modules.pooling.AdaptiveAvgPool2d"
_SOFTMAX = "torch.nn.modules.activation.Softmax"


class Head(Plan):
    """The two dense layers and what stands around them, as children of one module.

    fc1, norm, act, fc2, gate: names of the children; None: there is none of this kind
    pool, softmax: names of the children that compute the mean and the softmax over branches; None: forward does
    more: further children that are skipped; fixed: names of the module's attributes that decide the maths
    """

    __slots__ = ("act", "act_place", "first", "gate", "groups", "inner", "norm", "second", "slope")
    fits_tail = True
    closes = False

    def __init__(
        self,
        module: nn.Module,
        fc1: str,
        fc2: str,
        act: str,
        norm: str | None = None,
        gate: str | None = None,
        pool: str | None = None,
        softmax: str | None = None,
        more: Sequence[str] = (),
        fixed: Sequence[str] = (),
    ) -> None:
        skipped = [name for name in (pool, fc1, norm, act, fc2, gate, softmax, *more) if name is not None]
        super().__init__(module, skipped, fixed)
        self.inner: tuple[tuple[nn.Module, Plan], ...] = ()
        children: dict[str, Any] = module.__dict__["_modules"]
        self.usual(self, children, pool, softmax)
        self.read(self, fc1, fc2, act, norm, gate, {name: children[name] for name in skipped})

    def usual(self, plan: Plan, children: dict[str, Any], pool: str | None, softmax: str | None) -> None:
        """Raises Refused for a pooling layer that doesn't compute the mean, or a softmax that isn't over branches."""
        if pool is not None:
            child = children[pool]
            if path(type(child)) != _MEAN or plan.fix(child, "output_size") not in (1, (1, 1)):
                raise Refused(f"{pool} is {child!r}, not an AdaptiveAvgPool2d of output size 1")
        if softmax is not None:
            child = children[softmax]
            if path(type(child)) != _SOFTMAX or plan.fix(child, "dim") != 1:
                raise Refused(f"{softmax} is {child!r}, not the softmax over branches")

    def read(
        self, plan: Plan, fc1: str, fc2: str, act: str, norm: str | None, gate: str | None, children: dict[str, Any]
    ) -> None:
        """Reads the layers; plan: that of the module whose children they are."""
        self.first, self.second = (dense(plan, name, children[name], groups=None) for name in (fc1, fc2))
        groups, self.groups = (vars_of(children[name]).get("groups", 1) for name in (fc1, fc2))
        if groups != self.groups:
            raise Refused(f"{fc1} has {groups} groups and {fc2} {self.groups}")
        hidden, expected = self.first["weight"].shape[0], self.second["weight"].shape[1] * self.groups
        if hidden != expected:
            raise Refused(f"{fc1} makes {hidden} channels, and {fc2} takes {expected}")
        self.act, self.slope = activation(plan, act, children[act], activations.ACTS)
        self.act_place = plan.weights(act, children[act], False) if self.act == "prelu" else None
        self.norm = norm_of(norm, children[norm]) if norm else None
        self.gate = activation(plan, gate, children[gate], ("sigmoid",))[0] if gate else "identity"

    @property
    def channels(self) -> int:
        """Of a branch."""
        return int(self.first["weight"].shape[1]) * self.groups

    def outputs(self, count: int, each: bool = False) -> None:
        """Raises Refused where the head doesn't make a logit for each of `count` branches and each channel."""
        if not 1 <= count <= MOST:
            raise Refused(f"{count} branches, and the ops take {MOST}")
        made, wanted = self.second["weight"].shape[0], self.channels * (1 if each else count)
        if made != wanted:
            raise Refused(f"the head makes {made} logits for {count} branches of {self.channels} channels")

    def nest(self, module: nn.Module, plan: Plan) -> None:
        """Adds the plan of a child whose own children are skipped as well."""
        self.inner += ((module, plan),)

    def seal(self, module: nn.Module) -> None:
        super().seal(module)
        for child, plan in self.inner:
            plan.seal(child)

    def intact(self, attributes: dict[str, Any]) -> bool:
        return super().intact(attributes) and all(plan.intact(vars(child)) for child, plan in self.inner)

    def weigh(self, x: Tensor) -> Tensor:
        """The whole of forward."""
        raise NotImplementedError

    def run(
        self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity", epilogue_slope: float = 0.01
    ) -> Tensor:
        y = self.weigh(x)
        y = y if residual is None else y + residual
        return activations.apply(epilogue, y, epilogue_slope)

    def excite(self, dense: bool = False) -> tuple[Callable[..., Any], list[Tensor]]:
        """The head as an excite of descriptors (…, C), and its parameters. With batch statistics it returns them, too.

        dense: the layers are not in groups, though the logits are
        """
        norm, state, eps = norm_state(self.norm)
        prelu = self.act_place and self.act_place["weight"]
        first, second = self.first, self.second
        slots = (first["weight"], first["bias"], second["weight"], second["bias"], *state, prelu)
        there = tuple(i for i, t in enumerate(slots) if t is not None)
        options = self.act, self.gate, self.slope, norm, eps
        groups = 1 if dense else self.groups

        def excite(p: Tensor, *given: Tensor) -> Any:
            tensors: list[Any] = [None] * 9
            for i, t in zip(there, given, strict=True):
                tensors[i] = t
            rows = p.flatten(0, -2)
            # The kernel's one launch in place of ten; compilers differentiate only what they can look into.
            out: Any
            if groups == 1 and not is_compiling():
                out = shared_mlp(rows, *tensors, None, *options)
            else:
                out = network(rows, groups, tensors, *options)
            if norm == "batch":
                return out[0].unflatten(0, p.shape[:-1]), out[1]
            return out.unflatten(0, p.shape[:-1])

        return excite, [t for t in slots if t is not None]

    def kept(self, out: Any) -> Tensor:
        """y, of what an op returns around the head; its batch statistics go into the norm's running ones."""
        if not isinstance(out, tuple):
            return out
        y, statistics = out
        keep(self.norm, statistics, y.shape[0])  # type: ignore[arg-type]
        return y

    def softmax(
        self, maps: Sequence[Tensor], splits: int = 1, each: bool = False, merge: str = "sum", dense: bool = False
    ) -> Tensor:
        """The branches weighed and merged. dense: as in `excite`."""
        excite, given = self.excite(dense)
        return self.kept(
            branch_softmax(
                *maps, excite=excite, params=given, splits=splits, groups=self.groups, each=each, merge=merge
            )
        )


def network(
    p: Tensor, groups: int, tensors: Sequence[Any], act: str, gate: str, slope: float, norm: str, eps: float
) -> Any:
    """`shared_mlp` with dense layers in groups, in differentiable PyTorch: (rows, C) to (rows, outputs).

    tensors: w1, b1, w2, b2, the norm's weight, bias, mean and variance, the slopes of prelu
    """
    w1, b1, w2, b2, norm_weight, norm_bias, mean, var, act_weight = tensors

    def layer(p: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        w = w.flatten(1).to(p.dtype)
        if groups == 1:
            z = F.linear(p, w)
        else:
            inputs = p.unflatten(1, (groups, -1)).transpose(0, 1)
            z = torch.bmm(inputs, w.unflatten(0, (groups, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)
        return z if b is None else z + b.to(z.dtype)

    statistics = None
    # Gates are float32, whatever the maps are; nothing is computed on the meta device, which has no autocast.
    with nullcontext() if p.is_meta else torch.autocast(p.device.type, enabled=False):
        z = layer(p, w1, b1)
        if norm != "none":
            if norm == "batch":
                if z.shape[0] == 1:
                    raise ValueError("norm='batch' needs more than 1 descriptor per channel when training; got 1")
                mean, var = z.mean(0), z.var(0, unbiased=False)
                statistics = torch.stack([mean, var])
            z = (z - mean.to(z.dtype)) * torch.rsqrt(var.to(z.dtype) + eps)
            z = z if norm_weight is None else z * norm_weight.to(z.dtype)
            z = z if norm_bias is None else z + norm_bias.to(z.dtype)
        h = activations.apply(act, z, slope, None if act_weight is None else act_weight.to(z.dtype))
        u = activations.apply(gate, layer(h, w2, b2), slope)
    return u if statistics is None else (u, statistics)


def known(child: nn.Module | None, name: str, where: str, *sources: str) -> Any:
    """A child whose forward is skipped although its class is a library's. Raises Refused where that isn't the one
    known."""
    if path(type(child)) != where:
        raise Refused(f"{name} is a {path(type(child))}, not a {where}")
    assert child is not None
    if fingerprint(type(child).forward) not in sources:
        raise Refused(f"forward of this version's {where} isn't one that is known")
    return child


def foreign(self: Any, x: Tensor) -> Tensor:
    """What a foreign module's forward becomes. What isn't (N, C, H, W) is left to its own, which may raise or not."""
    plan = ready(self)
    if plan is None or not isinstance(x, Tensor) or x.dim() != 4:
        return run_original(self, plan, x)
    return plan.run(x, None, "identity", 0.01)


class Competing(Planned):
    """What our own blocks share: a forward by plan, and the equations where the plan doesn't hold."""

    def _finish(self) -> None:
        """Makes the plan, now that the children are there. Raises ValueError for an option that isn't understood."""
        try:
            self._plan()
        except Refused as why:
            raise ValueError(str(why)) from None
        renew(self)

    def forward(self, x: Tensor) -> Tensor:
        """y (N, C', *S') of x (N, C, *S). Raises ValueError or TypeError, naming the argument, for a wrong shape or
        dtype."""
        if (node := leaf(self, x)) is not None:
            return node
        checks.channels("x", x, *self.takes())
        plan = ready(self)
        if plan is not None:
            return plan.run(x, None, "identity", 0.01)
        return self.equations(x)

    by_plan = forward

    def takes(self) -> tuple[int, int]:
        """How many channels and spatial dimensions x has."""
        raise NotImplementedError

    def equations(self, x: Tensor) -> Tensor:
        """The mechanism in plain PyTorch, by the child modules."""
        raise NotImplementedError


def convolution(dims: int) -> type[nn.Module]:
    """Conv1d, Conv2d or Conv3d. Raises ValueError for other dimensions."""
    found = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(dims)
    if found is None:
        raise ValueError(f"dims must be 1, 2 or 3; got {dims!r}")
    return found


def divisible(width: float, divisor: int, least: int = 0) -> int:
    """The nearest multiple of divisor, not below `least` or divisor, nor below 0.9 of the width: timm's rule."""
    found = max(least or divisor, int(width + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * width else found
