"""Bad input gets a ValueError or TypeError that names the argument, what was expected and what came: on every backend.

A compiled kernel checks by itself, in C++; where it objects, the same check as everywhere gives the words.
"""

import re

import pytest
import torch

from fused_attn import OPS, ops, testing, use_backend

BACKENDS = testing.candidates()
FORMULAS = [op for op in OPS.values() if op.formula is not None]
NEEDED = {
    "affine_apply": ("scale", "shift"),
    "scale": ("gate",),
    "soft_threshold": ("tau",),
    "map_scale": ("z",),
    "shared_mlp": ("w1",),
    "pool_mlp_scale": ("w1",),
}


def good(op, **changes):
    """The arguments of a call that is right but for `changes`: x (2, 6, 5, 5), and a network 6 -> 4 -> 6."""
    shapes = {
        "affine_apply": dict(x=(2, 6, 5, 5), scale=(2, 6), shift=(2, 6)),
        "batch_affine": dict(moments=(2, 3, 6), weight=(6,), bias=(6,)),
        "channel_moments": dict(x=(2, 6, 5, 5)),
        "channel_pool": dict(x=(2, 6, 5, 5)),
        "spatial_pool": dict(x=(2, 6, 5, 5), gate=(2, 6)),
        "branch_pool": dict(x=(2, 6, 5, 5), x1=(2, 6, 5, 5)),
        "branch_scale": dict(x=(2, 6, 5, 5), gate=(2, 2, 6), x1=(2, 6, 5, 5)),
        "plane_gate_shuffle": dict(x=(2, 6, 5, 5), cweight=(3,), cbias=(3,), sweight=(3,), sbias=(3,)),
        "group_similarity_scale": dict(x=(2, 6, 5, 5), weight=(2,), bias=(2,)),
        "pool_conv_scale": dict(x=(2, 6, 5, 5), weight=(1, 1, 3)),
        "plane_conv": dict(planes=(2, 2, 5, 5), weight=(1, 2, 3, 3), bias=(1,)),
        "scale": dict(x=(2, 6, 5, 5), gate=(2, 6)),
        "map_scale": dict(x=(2, 6, 5, 5), z=(2, 6, 5, 5)),
        "soft_threshold": dict(x=(2, 6, 5, 5), tau=(2, 6)),
        "shared_mlp": dict(pooled=(2, 6), w1=(4, 6), b1=(4,), w2=(6, 4), b2=(6,)),
        "pool_mlp_scale": dict(x=(2, 6, 5, 5), w1=(4, 6), b1=(4,), w2=(6, 4), b2=(6,)),
    }
    args = {k: torch.ones(v) for k, v in shapes[op.name].items()}
    return {**args, **changes}


X = [op.name for op in FORMULAS if op.arguments[0] == "x"]
MLP = ["shared_mlp", "pool_mlp_scale"]
RESIDUAL = [op.name for op in FORMULAS if "residual" in op.arguments]
BRANCHES = ["branch_pool", "branch_scale"]
t = torch.ones
F64, I64 = torch.float64, torch.int64
# (which ops, the changed arguments, the kind of error, what the message must hold)
BAD = {
    "rank 2": (X, dict(x=t(2, 6)), ValueError, ["x", "(N, C, *S)", "(2, 6)"]),
    "no spatial size": (X, dict(x=t(2, 6, 0, 5)), ValueError, ["x", "at least 1", "(2, 6, 0, 5)"]),
    "no channels": (["channel_pool"], dict(x=t(2, 0, 5, 5)), ValueError, ["x", "at least 1 channel", "(2, 0, 5, 5)"]),
    "integers": (X, dict(x=t(2, 6, 5, 5, dtype=I64)), TypeError, ["x", "float32", "int64"]),
    "complex": (X, dict(x=t(2, 6, 5, 5, dtype=torch.complex64)), TypeError, ["x", "float32", "complex64"]),
    "descriptor of integers": (["shared_mlp"], dict(pooled=t(2, 6, dtype=torch.int32)), TypeError, ["pooled", "int32"]),
    "descriptor of rank 1": (["shared_mlp"], dict(pooled=t(6)), ValueError, ["pooled", "(N, C)", "(6,)"]),
    "three descriptors": (["shared_mlp"], dict(pooled=t(3, 2, 6)), ValueError, ["pooled", "(2, N, C)", "(3, 2, 6)"]),
    "gate of other channels": (["scale"], dict(gate=t(2, 5)), ValueError, ["gate", "(2, 6)", "(2, 5)"]),
    "gate of other batch": (["scale"], dict(gate=t(1, 6)), ValueError, ["gate", "(2, 6)", "(1, 6)"]),
    "gate of integers": (["scale"], dict(gate=t(2, 6, dtype=I64)), TypeError, ["gate", "int64"]),
    "gate elsewhere": (["scale"], dict(gate=t(2, 6, device="meta")), ValueError, ["gate", "cpu", "meta"]),
    "thresholds of other channels": (["soft_threshold"], dict(tau=t(2, 5)), ValueError, ["tau", "(2, 6)", "(2, 5)"]),
    "thresholds of other batch": (["soft_threshold"], dict(tau=t(3)), ValueError, ["tau", "(2,)", "(3,)"]),
    "logits of other shape": (["map_scale"], dict(z=t(2, 6, 5, 4)), ValueError, ["z", "5, 5)", "(2, 6, 5, 4)"]),
    "logits of other dtype": (["map_scale"], dict(z=t(2, 6, 5, 5, dtype=F64)), TypeError, ["z", "float32", "float64"]),
    "norm": (["map_scale"], dict(norm="layer"), ValueError, ["norm", "channels", "layer"]),
    "gate of a branch too many": (["branch_scale"], dict(gate=t(2, 3, 6)), ValueError, ["gate", "branches", "2", "3"]),
    "branch of other shape": (BRANCHES, dict(x1=t(2, 6, 5, 4)), ValueError, ["x1", "(2, 6, 5, 4)"]),
    "branch of other dtype": (BRANCHES, dict(x1=t(2, 6, 5, 5, dtype=F64)), TypeError, ["x1", "float64"]),
    "merge": (["branch_scale", "scale"], dict(merge="multiply"), ValueError, ["merge", "'sum'", "'multiply'"]),
    "pixel gate of other size": (["scale"], dict(pixel=t(2, 5, 4)), ValueError, ["pixel", "(2, 5, 5)", "(2, 5, 4)"]),
    "gate of other channels in space": (["spatial_pool"], dict(gate=t(2, 5)), ValueError, ["gate", "(2, 5)"]),
    "parameters that don't group": (["plane_gate_shuffle"], dict(cweight=t(4)), ValueError, ["cweight", "4"]),
    "groups that don't divide": (["group_similarity_scale"], dict(weight=t(4), bias=t(4)), ValueError, ["weight", "4"]),
    "even kernel": (["pool_conv_scale"], dict(weight=t(1, 1, 4)), ValueError, ["weight", "odd", "4"]),
    "kernel of other planes": (["plane_conv"], dict(weight=t(1, 3, 3, 3)), ValueError, ["weight", "(1, 3, 3, 3)"]),
    "even kernel of planes": (["plane_conv"], dict(weight=t(1, 2, 4, 4)), ValueError, ["weight", "odd", "4"]),
    "residual of other shape": (RESIDUAL, dict(residual=t(2, 6, 5, 4)), ValueError, ["5, 5)", "(2, 6, 5, 4)"]),
    "residual of other dtype": (RESIDUAL, dict(residual=t(2, 6, 5, 5, dtype=F64)), TypeError, ["residual", "64"]),
    "residual elsewhere": (RESIDUAL, dict(residual=t(2, 6, 5, 5, device="meta")), ValueError, ["residual", "meta"]),
    "weight of other channels": (MLP, dict(w1=t(4, 7)), ValueError, ["w1", "(H, C)", "6", "(4, 7)"]),
    "weight of rank 1": (MLP, dict(w1=t(6)), ValueError, ["w1", "(H, C)", "(6,)"]),
    "3×3 weight": (MLP, dict(w1=t(4, 6, 3, 3)), ValueError, ["w1", "(4, 6, 3, 3)"]),
    "weights that don't meet": (MLP, dict(w2=t(6, 5)), ValueError, ["w2", "4", "(6, 5)"]),
    "weight elsewhere": (MLP, dict(w1=t(4, 6, device="meta")), ValueError, ["w1", "cpu", "meta"]),
    "weight of integers": (MLP, dict(w1=t(4, 6, dtype=I64)), TypeError, ["w1", "int64"]),
    "bias of other width": (MLP, dict(b1=t(5)), ValueError, ["b1", "(4,)", "(5,)"]),
    "bias of the missing layer": (MLP, dict(w1=t(6, 6), b1=None, w2=None), ValueError, ["b2", "w2"]),
    "gates of other channels": (["pool_mlp_scale"], dict(w2=t(5, 4), b2=None), ValueError, ["w2", "6", "(5, 4)"]),
    "one layer, not square": (["pool_mlp_scale"], dict(w2=None, b2=None), ValueError, ["w1", "(6, 6)", "(4, 6)"]),
    "norm of one sample": (MLP, dict(norm="batch"), ValueError, ["norm", "more than 1", "1"]),
    "running norm without": (MLP, dict(norm="running"), ValueError, ["norm_mean", "None"]),
    "prelu without slopes": (MLP, dict(act="prelu"), ValueError, ["act_weight", "None"]),
    "slopes of other width": (MLP, dict(act="prelu", act_weight=t(3)), ValueError, ["act_weight", "(4,)", "(3,)"]),
    "max_weight above 1": (["pool_mlp_scale"], dict(max_weight=1.5), ValueError, ["max_weight", "[0, 1]", "1.5"]),
    "scale of other channels": (["affine_apply"], dict(scale=t(2, 5)), ValueError, ["scale", "(2, 6)", "(2, 5)"]),
    "centre of other batch": (["affine_apply"], dict(centre=t(1, 6)), ValueError, ["centre", "(2, 6)", "(1, 6)"]),
    "moments of rank 2": (["batch_affine"], dict(moments=t(2, 6)), ValueError, ["moments", "(2, N, C)", "(2, 6)"]),
    "one moment": (["batch_affine"], dict(moments=t(1, 3, 6)), ValueError, ["moments", "(2, N, C)", "(1, 3, 6)"]),
    "norm of other channels": (["batch_affine"], dict(weight=t(5)), ValueError, ["weight", "(6,)", "(5,)"]),
    "planes of nothing": (["batch_affine"], dict(size=0), ValueError, ["size", "at least 1", "0"]),
    "index of a mean": (["channel_pool"], dict(return_index=True), ValueError, ["return_index", "'max'", "'mean'"]),
    **{
        f"unknown {name}": (
            [op.name for op in FORMULAS if name in op.arguments], {name: "nothing"}, ValueError, ["one of", "'nothing'"]
        )
        for name in ("pool", "ties", "act", "gate", "norm", "epilogue")
    },
}  # fmt: skip


def _is_a_tensor(op, what):
    """Whether what is called an unknown option elsewhere is a tensor of this op: its gate."""
    name = what.removeprefix("unknown ")
    return name in op.arguments and op.arguments.index(name) < op.count


CASES = [
    pytest.param(backend, OPS[name], what, id=f"{backend}-{name}-{what.replace(' ', '_')}")
    for what, (names, *_) in BAD.items()
    for name in names
    for backend in BACKENDS
    if testing.missing(OPS[name], backend) is None and not _is_a_tensor(OPS[name], what)
]


@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "gradient"])
@pytest.mark.parametrize(("backend", "op", "what"), CASES)
def test_complaint(backend, op, what, gradient):
    _, changes, kind, words = BAD[what]
    args = good(op, **changes)
    if what == "norm of one sample":
        args[op.arguments[0]] = args[op.arguments[0]][:1]
    if gradient:
        for value in args.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.requires_grad_()
    with use_backend(backend), pytest.raises(kind) as caught:
        op(**args)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} lacks {missing}"
    named = [a for a in op.arguments if re.search(rf"\b{a}\b", message)]
    assert named, f"{message!r} names no argument"
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.name)
def test_not_a_tensor(op):
    """What isn't a tensor at all is a TypeError too, of ours or of the dispatcher's."""
    args = good(op)
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        op(**{**args, op.arguments[0]: [1.0, 2.0]})


@pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.name)
def test_wrong_arguments(op):
    """Python's own words for a missing or unknown argument."""
    with pytest.raises(TypeError, match="missing a required argument"):
        op()
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        op(**good(op), nonsense=1)


def excite(p):
    return p


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (dict(x=t(2, 6)), ValueError, ["x", "(2, 6)"]),
        (dict(x=t(2, 6, 5, 5, dtype=I64)), TypeError, ["x", "int64"]),
        (dict(pool="median"), ValueError, ["pool", "'mean_max'", "'median'"]),
        (dict(ties="last"), ValueError, ["ties", "'split'", "'last'"]),
        (dict(act="prelu"), ValueError, ["act", "'relu'", "'prelu'"]),
        (dict(residual=t(2, 6, 5, 4)), ValueError, ["residual", "(2, 6, 5, 5)", "(2, 6, 5, 4)"]),
        (dict(excite=lambda p: p[:, :3]), ValueError, ["gate", "(2, 6)", "(2, 3)"]),
        (dict(excite="sigmoid"), TypeError, ["excite", "callable", "str"]),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_pool_scale(changes, kind, words):
    args = {"x": t(2, 6, 5, 5), "excite": excite, **changes}
    with pytest.raises(kind) as caught:
        ops.pool_scale(args.pop("x"), args.pop("excite"), **args)
    assert all(word in str(caught.value) for word in words), str(caught.value)
