"""The modules of papers' authors that no package holds: repositories copy them, under the same names.

A class is looked at by its name, and where its module has the children and parameters of the authors' code:

    eca_layer             conv.weight                                   ECA      BangguWu/ECANet
    sa_layer              cweight, cbias, sweight, sbias, gn            shuffle  wofmanaf/SA-Net
    SpatialGroupEnhance   weight, bias                                  SGE      implus/PytorchInsight
    CBAM                  ChannelGate.mlp, SpatialGate.spatial          CBAM     Jongchan/attention-module
    CBAM                  channel_attention.fc, spatial_attention.cv1   CBAM     ultralytics (one layer, no norm)
    BAM                   channel_att.gate_c, spatial_att.gate_s        BAM      Jongchan/attention-module

Copies differ in their maths under these names: a sum for a product, a biased variance, no norm. So it is fused where
`blocks.proof` shows that its forward is ours, and refused, with the reason, where it doesn't.

What differs between published versions:
    BAM     the authors' pooling averages a square of side H: maps that aren't square are left to their own forward
    CBAM    Ultralytics' has one dense layer on the mean alone, no norm, and [mean, max] as the convolution's input
    tied maxima: the first one's gradient in all of these, and that is tried as well
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ..plan import READERS, Plan, Refused, Rule, author, fingerprint, path, ready, run_original, tampered
from .bam import BamPlan
from .cbam import CbamPlan, Parts
from .deep import DeepPlan
from .eca import ConvPlan
from .proof import FAILURES, agree, methods, redrawn, straight
from .shuffle_attention import ShufflePlan
from .spatial_group_enhance import GroupPlan

_POOLS = ("torch.nn.modules.pooling.AdaptiveAvgPool2d", "torch.nn.modules.pooling.AdaptiveMaxPool2d")
_SIZES = ((5, 3), (3, 7))
_SQUARES = ((5, 5), (3, 3))


class _Eca(ConvPlan):
    __slots__ = ("channels", "square")


class _Shuffle(ShufflePlan):
    __slots__ = ("channels", "square")


class _Group(GroupPlan):
    __slots__ = ("channels", "square")


class _Cbam(CbamPlan):
    __slots__ = ("channels", "square")


class _Bam(BamPlan):
    __slots__ = ("channels", "square")


def _child(module: nn.Module, *names: str) -> str:
    """The first of these names that is a child's."""
    children = vars(module)["_modules"]
    found = next((name for name in names if children.get(name) is not None), None)
    if found is None:
        raise Refused(f"it has no {' or '.join(names)}")
    return found


def _eca(module: nn.Module) -> Plan:
    _only(module, "conv.weight")
    return _Eca(module, conv="conv", gate=_child(module, "sigmoid"))


def _shuffle(module: nn.Module) -> Plan:
    _only(module, "cweight", "cbias", "sweight", "sbias", "gn.weight", "gn.bias")
    plan = _Shuffle(module)
    shapes = {tuple(p.shape) for p in plan.parameters.values()}
    if len(shapes) != 1 or [n for i, n in enumerate(next(iter(shapes))) if i != 1] != [1, 1, 1]:
        raise Refused(f"cweight, cbias, sweight, sbias have the shapes {sorted(shapes)}")
    return plan


def _group(module: nn.Module) -> Plan:
    _only(module, "weight", "bias")
    plan = _Group(module, eps=1e-5)
    if any(p.dim() != 4 or p.numel() != p.shape[1] for p in plan.parameters.values()):
        raise Refused("weight and bias aren't (1, groups, 1, 1)")
    return plan


_AUTHORS = Parts({}, "ChannelGate.mlp.1", "ChannelGate.mlp.2", "ChannelGate.mlp.3", None, "SpatialGate.spatial.conv",
                 "SpatialGate.spatial.bn", None, flip=True, ties="first")  # fmt: skip
_ALONE = Parts({}, "ChannelGate.mlp.1", "ChannelGate.mlp.2", "ChannelGate.mlp.3", None, None, None, None,
               ties="first")  # fmt: skip
_ULTRALYTICS = Parts({}, "channel_attention.fc", None, None, "channel_attention.act", "spatial_attention.cv1", None,
                     "spatial_attention.act", ties="first")  # fmt: skip


def _cbam(module: nn.Module) -> Plan:
    children = vars(module)["_modules"]
    if "channel_attention" in children:
        _only(module, "channel_attention.fc.weight", "channel_attention.fc.bias", "spatial_attention.cv1.weight")
        return _Cbam(module, _ULTRALYTICS, ("avg",))
    if "ChannelGate" not in children:
        raise Refused("it has neither the authors' ChannelGate nor Ultralytics' channel_attention")
    kinds = vars(children["ChannelGate"]).get("pool_types")
    if not isinstance(kinds, (list, tuple)) or not kinds or not {"avg", "max", "lp", "lse"}.issuperset(kinds):
        raise Refused(f"ChannelGate.pool_types is {kinds!r}")
    gate = [f"ChannelGate.mlp.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")]
    if "SpatialGate" not in children:
        _only(module, *gate)
        return _Cbam(module, _ALONE, tuple(kinds))
    _only(
        module, *gate, "SpatialGate.spatial.conv.weight", *(f"SpatialGate.spatial.bn.{k}" for k in ("weight", "bias"))
    )
    return _Cbam(module, _AUTHORS, tuple(kinds))


def _bam(module: nn.Module) -> Plan:
    if not {"channel_att", "spatial_att"} <= set(vars(module)["_modules"]):
        raise Refused("it has not the authors' channel_att and spatial_att")
    named = dict(module.named_modules())
    where = "channel_att.gate_c.gate_c_"
    layers = [(f"{where}fc_{i}", f"{where}bn_{i + 1}", f"{where}relu_{i + 1}") for i in range(len(named))]
    hidden = [names for names in layers if names[0] in named]
    if not hidden or "spatial_att.gate_s" not in named:
        raise Refused("it has not the authors' gate_c and gate_s")
    return _Bam(module, {}, hidden, f"{where}fc_final", ("spatial_att.gate_s",), "sigmoid_product")


def _only(module: nn.Module, *names: str) -> None:
    """Raises Refused for other parameters than the authors' module has."""
    found = {name for name, _ in module.named_parameters()}
    if found != set(names):
        extra, missing = sorted(found - set(names)), sorted(set(names) - found)
        said = [f"has {', '.join(extra)}"] * bool(extra) + [f"has no {', '.join(missing)}"] * bool(missing)
        raise Refused(f"it {' and '.join(said)}, unlike the authors' module")


@dataclass(frozen=True)
class _Known:
    """draft: module -> plan; channels: of which maps it is tried; any: whether it takes maps of other channels, too
    called: names of children that the plan calls; added: floats of its source; ties: whether it picks maxima
    """

    draft: Callable[[nn.Module], Plan]
    channels: Callable[[nn.Module], tuple[int, ...]]
    any: bool = False
    called: tuple[str, ...] = ()
    added: tuple[float, ...] = ()
    ties: bool = False
    square: bool = False


def _width(suffix: str) -> Callable[[nn.Module], tuple[int, ...]]:
    """The channels that the first dense layer takes."""
    return lambda module: (next(int(p.shape[1]) for n, p in module.named_parameters() if n.endswith(suffix)),)


def _shuffled(module: nn.Module) -> tuple[int, ...]:
    groups = next((v for n, v in vars(module).items() if n in ("groups", "G") and isinstance(v, int)), 1)
    return (2 * groups * int(vars(module)["_modules"]["gn"].num_channels),)


def _grouped(module: nn.Module) -> tuple[int, ...]:
    groups = int(vars(module)["_parameters"]["weight"].shape[1])
    return 2 * groups, 3 * groups


_eca_known = _Known(_eca, lambda module: (6, 11), any=True)
_shuffle_known = _Known(_shuffle, _shuffled)
_group_known = _Known(_group, _grouped, any=True, added=(1e-5,))
_cbam_known = _Known(_cbam, lambda module: _width(_cbam(module).parts.fc1 + ".weight")(module), ties=True)  # type: ignore[attr-defined]
_bam_known = _Known(_bam, _width("gate_c_fc_0.weight"), called=("spatial_att.gate_s",), square=True)
KNOWN = {
    "eca_layer": _eca_known,
    "ecalayer": _eca_known,
    "ecaattention": _eca_known,
    "sa_layer": _shuffle_known,
    "salayer": _shuffle_known,
    "shuffleattention": _shuffle_known,
    "spatialgroupenhance": _group_known,
    "cbam": _cbam_known,
    "cbamblock": _cbam_known,
    "bam": _bam_known,
    "bamblock": _bam_known,
}


def _run(module: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    return plan.run_on(module, x) if isinstance(plan, BamPlan) else plan.run(x, None, "identity", 0.01)


def _within(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _watched(module: nn.Module, plan: Plan, read: dict[nn.Module, set[str]], called: tuple[str, ...]) -> None:
    """What the proof took for granted is compared on each call."""
    seen = {id(child) for child, _, _ in plan.skipped}
    for name, child in module.named_modules():
        if child is module or _within(name, called):
            continue
        if id(child) not in seen:
            if isinstance(plan, DeepPlan):
                plan.skip(module, name)
            else:
                plan.skipped += ((child, type(child), vars(child)),)
        if path(type(child)) in _POOLS and plan.fix(child, "output_size") not in (1, (1, 1)):
            raise Refused(f"{name} is {child!r}, not of output size 1")
        if path(type(child)).endswith(".Flatten") and type(child).__module__.startswith("torch."):
            plan.fix(child, "start_dim"), plan.fix(child, "end_dim")
    for owner, names in read.items():
        for name in names:
            value = vars(owner)[name]  # a list is kept as it is now
            plan.fixed += ((vars(owner), name, list(value) if isinstance(value, list) else value),)


# What was proved of a class, by all that decides a forward but the parameters' numbers: whether only of square maps, or
# why not.
_proved: dict[tuple[Any, ...], bool | str] = {}


def _prove(module: nn.Module, known: _Known, read: dict[nn.Module, set[str]], channels: tuple[int, ...]) -> bool:
    """Whether it agrees on square maps alone. Raises Refused where it agrees on none."""
    key = (
        tuple((author(type(m)), m.extra_repr()) for m in module.modules()),
        tuple(tuple(sorted((n, repr(vars(owner)[n])) for n in names)) for owner, names in read.items()),
        tuple((n, tuple(t.shape)) for n, t in (*module.named_parameters(), *module.named_buffers())),
        channels,
    )
    if key not in _proved:
        twin, result = redrawn(module), "its forward isn't the authors': on trial inputs it gives other numbers"
        found: bool | str = result
        for square, sizes in ((False, _SIZES), (True, _SQUARES))[: 1 + known.square]:
            try:
                if agree(twin, known.draft, channels, sizes, _run, known.ties):
                    found = square
                    break
                found = result
            except FAILURES as error:
                found = f"its forward fails on a trial input: {str(error).splitlines()[0]}"
            except Refused as why:
                found = str(why)
        _proved[key] = found
    found = _proved[key]
    if isinstance(found, str):
        raise Refused(found)
    return found


def _plan(module: nn.Module) -> Plan:
    cls = author(type(module))
    known = KNOWN[cls.__name__.lower()]
    plan: Any = known.draft(module)
    for name, child in module.named_modules():
        if child is not module and not _within(name, known.called) and (why := tampered(child)) is not None:
            raise Refused(f"{name} {why}")
    read = straight(cls.forward, module, True, known.added)
    _watched(module, plan, read, known.called)
    channels = known.channels(module)
    plan.square = _prove(module, known, read, channels)
    plan.channels = None if known.any else channels[0]
    return cast(Plan, plan)


def _forward(self: Any, x: Tensor) -> Tensor:
    """What such a forward becomes; maps that it wasn't proved for are left to its own."""
    plan: Any = ready(self)
    if (
        plan is None
        or not isinstance(x, Tensor)
        or x.dim() != 4
        or (plan.channels is not None and x.shape[1] != plan.channels)
        or (plan.square and x.shape[2] != x.shape[3])
    ):
        return run_original(self, plan, x)
    return _run(self, plan, x)


@functools.cache
def _rule(cls: type[nn.Module]) -> Rule:
    sources: dict[str, Iterable[str]] = {name: (fingerprint(method),) for name, method in methods(cls).items()}
    return Rule(path(cls), _forward, _plan, sources)


def by_name(cls: type, module: nn.Module | None) -> Rule | None:
    """The rule for a class of one of the names, which its plan may still refuse."""
    if cls.__name__.lower() not in KNOWN or not issubclass(cls, nn.Module) or cls.__module__.startswith("fused_attn."):
        return None
    return _rule(cls)  # type: ignore[arg-type]  # mypy takes Module's __hash__ for an instance's


READERS.insert(0, by_name)  # before who would read it as squeeze-and-excitation, and refuse
