"""No op moves more than its budget: passes over feature maps are counted, not declared (passes.py)."""

import pytest
import torch
from passes import Passes, counted, counting, counting_extension

from fused_attn import OPS, testing

SE = dict(x=[4, 64, 28, 28], w1=[4, 64], b1=[4], w2=[64, 4], b2=[64])
TAIL = dict(SE, residual=[4, 64, 28, 28], epilogue="relu")
MAX = dict(SE, max_weight=0.5)
# (arguments, forward reads and writes, forward and backward in all): the budgets of design.md §2 and mechanisms.md §4
TOTALS = {
    "se": (SE, (2, 1), 7),
    "se, residual, relu": (TAIL, (3, 1), 10),
    "se with add_maxpool": (MAX, (2, 1), 8),
}
# The same of `branch_softmax`, in branches: pooled each or their sum, (arguments, forward, backward).
MAP = [4, 16, 28, 28]
BRANCHES = {
    "sk": (False, dict(x=MAP, x1=MAP, gate=[4, 2, 16]), (4, 1), (4, 2)),
    "sk of three": (False, dict(x=MAP, x1=MAP, x2=MAP, gate=[4, 3, 16]), (6, 1), (5, 3)),
    "split attention": (False, dict(x=[4, 32, 28, 28], gate=[4, 2, 16]), (4, 1), (4, 2)),
    "psa": (True, dict(x=MAP, x1=MAP, x2=MAP, x3=MAP, gate=[4, 4, 16], merge="concat_reversed"), (8, 4), (12, 4)),
}
SA = dict(x=[4, 64, 28, 28], **{n: [4] for n in ("cweight", "cbias", "sweight", "sbias", "norm_weight", "norm_bias")})
SGE = dict(x=[4, 64, 28, 28], weight=[8], bias=[8])
ECA = dict(x=[4, 64, 28, 28], weight=[1, 1, 3])
RESIDUAL = dict(residual=[4, 64, 28, 28], act="relu")
# (op, arguments, forward reads and writes, forward and backward in all); planes, and half a read more in pixels
PLANEWISE = {
    "sa": ("plane_gate_shuffle", SA, (2, 1), 7.5),
    "sa, residual, relu": ("plane_gate_shuffle", {**SA, **RESIDUAL}, (3, 1), 10.5),
    "sge": ("group_similarity_scale", SGE, (3, 1), 9),
    "sge, residual, relu": ("group_similarity_scale", {**SGE, **RESIDUAL}, (4, 1), 12),
    "eca": ("pool_conv_scale", ECA, (2, 1), 7),
    "eca, residual, relu": ("pool_conv_scale", dict(ECA, residual=SE["x"], epilogue="relu"), (3, 1), 10),
}
AFFINE = dict(x=[4, 64, 28, 28], scale=[4, 64], shift=[4, 64])
ADDED = dict(AFFINE, residual=[4, 64, 28, 28])
# (what is called, arguments, reads and writes forward, and backward)
TAILS = {
    "norm, gate, residual, relu": ("moments_affine", dict(ADDED, act="relu"), (3, 1), (5, 2)),
    "norm, gate, residual, silu": ("moments_affine", dict(ADDED, act="silu"), (3, 1), (5, 2)),
    "norm, gate, residual": ("moments_affine", ADDED, (3, 1), (4, 1)),
    "norm, gate, relu": ("moments_affine", dict(AFFINE, act="relu"), (2, 1), (4, 1)),
    "norm, gate of extrema": ("moments_affine, extrema", AFFINE, (2, 1), (4, 1)),
    "norm, silu, gate": ("affine_pool_scale", dict(AFFINE, act="silu"), (3, 1), (4, 1)),
    "kept norm, silu, gate": ("affine_pool_scale, kept", dict(AFFINE, act="silu"), (2, 1), (4, 1)),
    "kept norm, relu, gate": ("affine_pool_scale, kept", dict(AFFINE, act="relu"), (2, 1), (4, 1)),
}
# A gate of branches before its norm: four maps of a quarter. By activation.
AHEAD = dict(x=MAP, x1=MAP, x2=MAP, x3=MAP, gate=[4, 4, 16], merge="concat_reversed")
AHEADS = {"relu": ((2, 1), (4, 1)), "silu": ((2, 1), (4, 1)), "identity": ((2, 1), (4, 1))}
# A norm before shuffle attention, and what follows: (arguments, reads and writes forward, and backward).
NORMED = {
    "norm, sa": (SA, (2, 1), (4, 1)),
    "norm, sa, relu": (dict(SA, act="relu"), (2, 1), (4, 1)),
    "norm, sa, residual": (dict(SA, residual=SE["x"]), (3, 1), (4, 1)),
    "norm, sa, residual, relu": ({**SA, **RESIDUAL}, (3, 1), (5, 2)),
    "norm, sa, residual, silu": ({**SA, **RESIDUAL, "act": "silu"}, (3, 1), (5, 2)),
}
LAYOUTS = ("contiguous", "channels_last")
SLACK = 0.05  # the first maximum of a plane is read again where it lies: one element of 35 in the smallest case


def measured(case):
    return "bench" not in case.tags and case.args.get("x", (0,))[0] != 0


REQUESTS = [
    dict(op=op.name, case=i, layout=layout, dtype=dtype)
    for op in OPS.values()
    if op.formula is not None and "x" in op.maps
    for i, case in enumerate(op.cases)
    if measured(case)
    for layout in (*LAYOUTS, "sliced")
    for dtype in ("float32", "bfloat16")
] + [
    dict(op="pool_mlp_scale", args=args, layout=layout, total=total, forward=forward)
    for args, forward, total in TOTALS.values()
    for layout in LAYOUTS
] + [
    dict(op="branch_scale", around=each, args=args, layout=layout)
    for each, args, *_ in BRANCHES.values()
    for layout in LAYOUTS
] + [
    dict(op=op, args=args, layout=layout, total=total, forward=forward)
    for op, args, forward, total in PLANEWISE.values()
    for layout in LAYOUTS
] + [
    dict(op="affine_apply", tail=tail, args=args, layout=layout, dtype=dtype)
    for tail, args, *_ in TAILS.values()
    for layout in LAYOUTS
    for dtype in ("float32", "bfloat16")
] + [
    dict(op="branch_scale", ahead=act, args=AHEAD, layout=layout)
    for act in AHEADS
    for layout in LAYOUTS
] + [
    dict(op="plane_gate_shuffle", normed=True, args=args, layout=layout)
    for args, *_ in NORMED.values()
    for layout in LAYOUTS
]  # fmt: skip


@pytest.fixture(scope="session")
def library():
    """The counting extension; skips where the usual one isn't built here."""
    why = testing.missing(OPS["scale"], "cpp")
    if why is not None:
        pytest.skip(f"cpp: {why}")
    return counting_extension()


@pytest.fixture(scope="session")
def answers(library):
    """The counts of all requests, from one process."""
    wanted = [r for r in REQUESTS if testing.missing(OPS[r["op"]], "cpp") is None]
    return list(zip(wanted, counted(library, wanted), strict=True))


def test_every_launch_keeps_its_budget(answers):
    """Forward and backward, each op, mode, layout: no launch exceeds what its op declares for these arguments."""
    seen, wrong = set(), []
    for request, answer in answers:
        for name, reads, writes, budget in answer["launches"]:
            assert budget is not None, f"{name} has no budget"
            seen.add(name)
            if reads > budget[0] + SLACK or writes > budget[1] + SLACK:
                wrong.append(f"{name} in {request}: {reads:.2f} R {writes:.2f} W, budget {budget[0]} R {budget[1]} W")
    assert not wrong, "\n".join(wrong)
    mapped = {op.name for op in OPS.values() if op.maps}
    spanning = ("pool_scale_", "dual_scale_", "merge_scale_", "pool_soft_threshold_", "project",
                "affine_spatial_pool", "affine_pixel_scale")  # fmt: skip
    assert seen >= {name for name in mapped if not name.startswith(spanning)}, "an op was never launched"


def test_every_launch_is_counted(answers):
    """A launch of an op that must write a map writes one: the counters are connected."""
    for request, answer in answers:
        for name, _, writes, budget in answer["launches"]:
            assert writes >= min(budget[1], 1) - SLACK, f"{name} in {request}: {writes} W"
        name, reads, *_ = answer["launches"][0]
        assert reads >= 1 - SLACK, f"{name} in {request}: {reads} R"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", TOTALS)
def test_totals_end_to_end(answers, what, layout):
    """Forward and backward of one call, with every ATen operator that runs around the kernels."""
    args, (reads, writes), total = TOTALS[what]
    answer = next(a for r, a in answers if r.get("args") == args and r["layout"] == layout)
    for mode in ("inference", "forward"):
        passes = Passes(**answer[mode])
        assert passes.reads <= reads + SLACK, f"{mode}: {passes}"
        assert passes.writes <= writes + SLACK, f"{mode}: {passes}"
    forward, backward = Passes(**answer["forward"]), Passes(**answer["backward"])
    assert forward.total + backward.total <= total + SLACK, f"{forward} and {backward}; ATen: {answer['aten']}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", BRANCHES)
def test_branches_end_to_end(answers, what, layout):
    """Forward and backward of one `branch_softmax`, in branches: no more, and no less, than was promised."""
    each, args, *promised = BRANCHES[what]
    answer = next(
        a for r, a in answers
        if r.get("args") == args and r["layout"] == layout and r.get("around") is each
    )  # fmt: skip
    count = 2 if what == "split attention" else 1  # branches in what is counted by
    for mode, (reads, writes) in zip(("forward", "backward"), promised, strict=True):
        passes = Passes(**answer[mode])
        assert passes.reads * count == pytest.approx(reads, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
        assert passes.writes * count == pytest.approx(writes, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
    assert answer["inference"] == answer["forward"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", PLANEWISE)
def test_totals_of_whole_planes(answers, what, layout):
    """The same for what takes planes and groups of them whole."""
    op, args, (reads, writes), total = PLANEWISE[what]
    if op == "plane_gate_shuffle" and layout == "channels_last":
        total += 0.5
    answer = next(
        a for r, a in answers
        if r["op"] == op and r.get("args") == args and r["layout"] == layout and "normed" not in r
    )  # fmt: skip
    for mode in ("inference", "forward"):
        passes = Passes(**answer[mode])
        assert passes.reads <= reads + SLACK, f"{mode}: {passes}"
        assert passes.writes <= writes + SLACK, f"{mode}: {passes}"
    forward, backward = Passes(**answer["forward"]), Passes(**answer["backward"])
    assert forward.total + backward.total <= total + SLACK, f"{forward} and {backward}; ATen: {answer['aten']}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", TAILS)
def test_tails_end_to_end(answers, what, layout, dtype):
    """What owns a normalisation and the gate behind it moves what the normalisation alone would, and no less."""
    tail, args, *promised = TAILS[what]
    request = dict(op="affine_apply", tail=tail, args=args, layout=layout, dtype=dtype)
    answer = next(a for r, a in answers if r == request)
    for mode, (reads, writes) in zip(("forward", "backward"), promised, strict=True):
        passes = Passes(**answer[mode])
        assert passes.reads == pytest.approx(reads, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
        assert passes.writes == pytest.approx(writes, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
    assert answer["inference"] == answer["forward"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", AHEADS)
def test_branches_before_a_norm_end_to_end(answers, act, layout):
    """PSA, BatchNorm, ReLU: of the whole map 2 reads and a write forward, 4 and a write backward, and no less."""
    answer = next(a for r, a in answers if r.get("ahead") == act and r["layout"] == layout)
    for mode, (reads, writes) in zip(("forward", "backward"), AHEADS[act], strict=True):
        passes = Passes(**answer[mode])
        assert passes.reads / 4 == pytest.approx(reads, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
        assert passes.writes / 4 == pytest.approx(writes, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
    assert answer["inference"] == answer["forward"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", NORMED)
def test_shuffle_behind_a_norm_end_to_end(answers, what, layout):
    """BatchNorm, shuffle attention, shortcut, ReLU: what the BatchNorm alone would move with its shortcut and ReLU."""
    args, *promised = NORMED[what]
    answer = next(a for r, a in answers if "normed" in r and r["args"] == args and r["layout"] == layout)
    for mode, (reads, writes) in zip(("forward", "backward"), promised, strict=True):
        passes = Passes(**answer[mode])
        assert passes.reads == pytest.approx(reads, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
        assert passes.writes == pytest.approx(writes, abs=SLACK), f"{mode}: {passes}; ATen: {answer['aten']}"
    assert answer["inference"] == answer["forward"]


def test_a_strided_gradient_costs_one_copy(library):
    """A gradient that no kernel walks is copied, once: the mode sees what happens around the kernels."""
    plain, strided = counted(
        library, [dict(op="pool_mlp_scale", args=SE, gradient=g) for g in ("contiguous", "expanded")]
    )
    assert any("copy_" in line for line in strided["aten"]), strided
    assert Passes(**strided["backward"]).writes == pytest.approx(Passes(**plain["backward"]).writes + 1, abs=SLACK)


def test_budget_can_be_exceeded(library):
    """The same counters, on a call that does the work twice: what the tests above would say of a wasteful kernel."""
    once, twice = counted(library, [dict(op="channel_pool", args=dict(x=SE["x"]), repeat=n) for n in (1, 2)])
    assert twice["inference"]["reads"] == pytest.approx(2 * once["inference"]["reads"])
    assert twice["inference"]["reads"] > 1 + SLACK


@pytest.fixture
def timm_se():
    import support  # noqa: F401  (makes timm importable beside a CPU torch)

    return pytest.importorskip("timm.layers").SEModule


def eager_passes(module, x, after=lambda y: y):
    x = x.requires_grad_()
    with counting(x.numel()) as forward:
        y = after(module(x))
    dy = torch.randn_like(y)
    with counting(x.numel()) as backward:
        torch.autograd.grad(y, [x, *module.parameters()], dy)
    return forward, backward


def test_eager_counts(timm_se):
    """The counter finds, for timm's real module, what mechanisms.md §4 has: 13, 21 and 22 passes."""
    x, identity = torch.randn(4, 256, 16, 16), torch.randn(4, 256, 16, 16, requires_grad=True)
    forward, backward = eager_passes(timm_se(256), x)
    assert forward.passes == Passes(2, 1), forward.log
    assert forward.passes.total + backward.passes.total == 13, forward.log + backward.log
    forward, backward = eager_passes(timm_se(256), x, lambda y: torch.relu(y + identity))
    assert forward.passes == Passes(5, 3), forward.log
    assert forward.passes.total + backward.passes.total == 21, forward.log + backward.log
    forward, backward = eager_passes(timm_se(256, add_maxpool=True), x)
    assert forward.passes == Passes(3, 1), forward.log
    assert forward.passes.total + backward.passes.total == 22, forward.log + backward.log


def test_counter_on_known_operators():
    """Views and allocations are free, an expanded tensor has the storage it has, in-place operators read and write."""
    x = torch.randn(2, 8, 6, 6)
    for run, reads, writes in [
        (lambda: x.view(2, 8, 36).transpose(1, 2)[:1], 0, 0),
        (lambda: torch.empty_like(x), 0, 0),
        (lambda: x.mean((2, 3)), 1, 0),
        (lambda: x.clone(), 1, 1),
        (lambda: x * x, 2, 1),
        (lambda: torch.zeros_like(x), 0, 1),
        (lambda: torch.ones(1, 1, 1, 1).expand_as(x) + 0 * x, 2, 2),
        (lambda: x.clone().add_(1), 2, 2),
        (lambda: torch.empty_like(x).copy_(x), 1, 1),
        (lambda: x.half(), 1, 1),
        (lambda: x.detach()[:, :4].clone(), 0.5, 0.5),
    ]:
        with counting(x.numel()) as mode:
            run()
        assert (mode.passes.reads, mode.passes.writes) == (reads, writes), mode.log
