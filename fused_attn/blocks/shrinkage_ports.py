"""Shrinkage modules of ports of deep residual shrinkage networks, which no library publishes under one name.

A class is looked at where it is called Shrinkage, RSBU_CW or RSBU_CS and its module keeps a network fc or FC of Linear,
BatchNorm, ReLU, Linear, Sigmoid. Ports differ in what is pooled (|x| or x) and in what α is multiplied by, under the
same names; so names decide nothing. It is fused where both hold:

    * its forward is straight-line code without numbers: no branch or loop that a trial could miss, no constant (a
      clamp's bound, say) that matters for some inputs only, no function but torch's, and of self nothing but child
      modules is read;
    * in float64, outputs, gradients and running statistics agree with one of the forms that a plan has, in training and
      in evaluation, on random inputs of three magnitudes, which are left as they were.

Both are in `blocks.proof`. Trials see no tie |x| = τ and nothing infinite; there relu(|x| − τ) is what runs, as
`blocks.shrinkage` says.
"""

import functools
from typing import Any

from torch import Tensor, nn

from ..plan import READERS, Plan, Refused, Rule, fingerprint, path, ready, run_original
from .proof import agree, original, straight
from .shrinkage import FACTORS, ShrinkagePlan

_NAMES = ("shrinkage", "rsbu_cw", "rsbu_cs")
_SIDES = {f"torch.nn.modules.pooling.AdaptiveAvgPool{d}d": (7, 5, 3)[:d] for d in (1, 2, 3)}
_IDLE = ("torch.nn.modules.flatten.Flatten",)


class PortPlan(ShrinkagePlan):
    """A port's: maps of one number of dimensions alone, `dim`, are what its pooling takes."""

    __slots__ = ("dim",)
    dim: int


def _plan(module: nn.Module) -> Plan:
    """The one of the forms that agrees with the module's forward. Raises Refused where none does."""
    children: dict[str, Any] = vars(module)["_modules"]
    fc = next((name for name in ("fc", "FC") if name in children), None)
    pools = [name for name, child in children.items() if path(type(child)) in _SIDES]
    if fc is None or len(pools) != 1:
        raise Refused("it doesn't consist of one adaptive average pooling and a network fc")
    others = [n for n, m in children.items() if n not in (fc, *pools) and path(type(m)) not in _IDLE]
    if others:
        raise Refused(f"it has further layers, {', '.join(others)}: the unit around a shrinkage isn't fused")
    skipped = tuple(name for name in children if name != fc)
    draft = lambda m, factor, pool: PortPlan(m, fc, factor, pool, skipped)
    plan = draft(module, FACTORS[0], "mean_abs")
    pooling = children[pools[0]]
    sides = _SIDES[path(type(pooling))]
    channels = plan.first["weight"].shape[1]
    twin = original(module)
    straight(type(twin).forward, twin)
    try:
        for pool in ("mean_abs", "mean"):
            for factor in FACTORS:
                if agree(twin, functools.partial(draft, factor=factor, pool=pool), (channels,), (sides,)):
                    plan.factor, plan.pool, plan.dim = factor, pool, len(sides) + 2
                    plan.fix(pooling, "output_size")
                    return plan
    except (RuntimeError, TypeError, ValueError) as error:
        raise Refused(f"its forward fails on a trial input: {str(error).splitlines()[0]}") from None
    raise Refused("its forward agrees with none of the forms of shrinkage that are known")


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a port's forward becomes; another number of dimensions is left to its own."""
    plan: PortPlan | None = ready(self)  # type: ignore[assignment]
    if plan is None or not isinstance(x, Tensor) or x.dim() != plan.dim:
        return run_original(self, plan, x)
    return plan.run(x, None, "identity", 0.01)


@functools.cache
def _rule(cls: type[nn.Module]) -> Rule:
    return Rule(path(cls), _forward, _plan, {"forward": (fingerprint(cls.forward),)})


def by_name(cls: type, module: nn.Module | None) -> Rule | None:
    """The rule for a class of one of the names, which its plan may still refuse."""
    if cls.__name__.lower() not in _NAMES or not issubclass(cls, nn.Module) or cls.__module__.startswith("fused_attn."):
        return None
    return _rule(cls)  # type: ignore[arg-type]  # mypy takes Module's __hash__ for an instance's


READERS.insert(0, by_name)  # before who would read it as squeeze-and-excitation, and refuse
