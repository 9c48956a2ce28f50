"""Every Triton launch of an op, forward and backward, keeps to the op's budget of passes over feature maps."""

import pytest
import torch
import triton
import triton.language as tl
from passes import counting
from traffic import Traffic

from fused_attn import OPS, backend, ops, testing, tile
from fused_attn.registry import case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in masked lanes

# 13 × 16 isn't a whole number of tiles, 17 × 15 not of vectors either way in float32 planes; both dwarf what is [N, C].
SHAPES = {"planes": (1, 4, 17, 15), "even": (1, 4, 13, 16), "pixels": (1, 16, 15, 13)}
MLP = {"w1": "hc", "b1": "h", "w2": "ch", "b2": "c"}
# Descriptors, gates and weights move too, and a vector may reach over the edge of a tile.
SLACK = 0.3


@pytest.fixture
def launches(monkeypatch):
    """(op name, reads, writes, budget) of every launch, in feature maps, those of ATen inside it included."""
    seen, launch, kernel = [], backend.run, tile.launch
    aten = None

    def measured(op, args, *how):
        nonlocal aten
        x = args[0]
        with Traffic() as moved, counting(x.numel()) as aten:
            outs = launch(op, args, *how)
        unit = x.numel() * x.element_size()
        reads, writes = moved.read / unit + aten.passes.reads, moved.written / unit + aten.passes.writes
        seen.append((op.name, reads, writes, op.budget(*args)))
        return outs

    def uncounted(*args, **meta):  # the interpreter copies its arguments, with ATen
        before = aten and (aten.passes.reads, aten.passes.writes)
        kernel(*args, **meta)
        if before:
            aten.passes.reads, aten.passes.writes = before

    monkeypatch.setattr(backend, "run", measured)
    monkeypatch.setattr(tile, "launch", uncounted)
    return seen


def within_budget(launches, *expected):
    assert [name for name, *_ in launches] == list(expected)
    for name, reads, writes, budget in launches:
        limit = (budget[0] + SLACK, budget[1] + SLACK)
        assert reads <= limit[0], f"{name} reads {reads:.2f} of {budget[0]}"
        assert writes <= limit[1], f"{name} writes {writes:.2f} of {budget[1]}"
        assert writes > budget[1] - 0.01, f"{name} writes {writes:.2f} of {budget[1]}: is it counted?"


def run(name, described, kind):
    op = OPS[name]
    args = testing.draw(described, op, torch.float32, layout="channels_last" if kind == "pixels" else "contiguous")
    testing.answer(op, args)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("pool", "ties"),
    [("mean", "split"), ("mean_abs", "split"), ("mean_var", "split"), ("max", "first"), ("mean_max", "split")],
)
def test_channel_pool(launches, pool, ties, kind):
    run("channel_pool", case(x=SHAPES[kind], pool=pool, ties=ties), kind)
    within_budget(launches, "channel_pool", *(["channel_pool_bwd"] if pool != "mean" else []))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("residual", "act"), [(False, "identity"), (False, "silu"), (True, "identity"), (True, "relu")]
)
def test_scale(launches, residual, act, kind):
    shape = SHAPES[kind]
    run("scale", case(x=shape, gate=shape[:2], residual=shape if residual else None, act=act), kind)
    within_budget(launches, "scale", "scale_bwd")


@pytest.mark.parametrize("kind", ["planes", "pixels"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(residual=True, epilogue="relu"),
        dict(residual=True, epilogue="silu", max_weight=0.5),
        dict(max_weight=0.5, ties="first", epilogue="relu6"),
        dict(max_weight=1.0, residual=True),
    ],
    ids=str,
)
def test_pool_mlp_scale(launches, how, kind):
    shape = SHAPES[kind]
    c, how = shape[1], dict(how)
    if how.pop("residual", False):
        how["residual"] = shape
    run("pool_mlp_scale", case(x=shape, w1=(2, c), b1=(2,), w2=(c, 2), b2=(c,), **how), kind)
    within_budget(launches, "pool_mlp_scale", "pool_mlp_scale_bwd")


@pytest.mark.parametrize("kind", ["planes", "pixels"])
@pytest.mark.parametrize(
    "how", [{}, dict(residual=True, act="relu"), dict(residual=True, act="silu"), dict(act="relu")], ids=str
)
def test_whole_planes(launches, how, kind):
    """Shuffle attention; spatial group-wise enhance, its maps small beside its groups; efficient channel attention."""
    shape, how = (1, 16, 17, 15), dict(how)
    if how.pop("residual", False):
        how["residual"] = shape
    four = dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), (4,))
    run("plane_gate_shuffle", case(x=shape, **four, **how), kind)
    within_budget(launches, "plane_gate_shuffle", "plane_gate_shuffle_bwd")
    launches.clear()
    shape = (1, 64, 9, 7)
    if "residual" in how:
        how["residual"] = shape
    run("group_similarity_scale", case(x=shape, weight=(1,), bias=(1,), **how), kind)
    within_budget(launches, "group_similarity_scale", "group_similarity_scale_bwd")
    launches.clear()
    shape = (1, 16, 17, 15)  # gates and taps are small beside it
    if "residual" in how:
        how["residual"] = shape
    if "act" in how:
        how["epilogue"] = how.pop("act")
    run("pool_conv_scale", case(x=shape, weight=(1, 1, 3), **how), kind)
    within_budget(launches, "pool_conv_scale", "pool_conv_scale_bwd")


@pytest.mark.parametrize("pool", ["mean", "mean_max", "mean_var"])
def test_pool_scale_halves(launches, pool):
    x, residual = (torch.randn(SHAPES["planes"], requires_grad=True) for _ in range(2))
    excite = lambda p: torch.sigmoid(p if p.dim() == 2 else p.sum(0))
    ops.pool_scale(x, excite, pool=pool, residual=residual, act="relu").sum().backward()
    within_budget(launches, "channel_pool", "scale", "pool_scale_reduce", "pool_scale_apply")


@pytest.mark.parametrize("kind", ["planes", "pixels"])
@pytest.mark.parametrize("merge", ["sum", "concat_reversed"])
def test_branches(launches, merge, kind):
    shape = SHAPES[kind]
    run("branch_scale", case(x=shape, x1=shape, gate=(1, 2, shape[1]), merge=merge), kind)
    run("branch_pool", case(x=shape, x1=shape), kind)
    within_budget(launches, "branch_scale", "branch_scale_bwd", "branch_pool")


@pytest.mark.parametrize("inside", [False, True], ids=["tensors", "one tensor"])
def test_branch_softmax_halves(launches, inside):
    n, c, *s = SHAPES["planes"]
    maps = [torch.randn(n, c * (2 if inside else 1), *s, requires_grad=True) for _ in range(1 if inside else 2)]
    y = ops.branch_softmax(*maps, excite=lambda p: p.repeat(1, 2), splits=2 if inside else 1)
    y.sum().backward()
    within_budget(launches, "branch_pool", "branch_scale", "branch_scale_reduce", "branch_scale_apply")


@triton.jit
def _twice_kernel(x_ptr, out_ptr, S, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < S, other=0)
    x += tl.load(x_ptr + at, mask=at < S, other=0)
    tl.store(out_ptr + at, x, mask=at < S)


def test_waste_is_seen():
    """A kernel that reads x twice counts two reads, by a grid whose last block is mostly masked off."""
    x = torch.randn(1030)
    out = torch.empty_like(x)
    with Traffic() as moved:
        _twice_kernel[(3,)](x, out, x.numel(), BLOCK=512)
    assert torch.equal(out, 2 * x)
    assert (moved.read, moved.written) == (2 * 4 * 1030, 4 * 1030)
