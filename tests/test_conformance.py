"""Every op, on every backend that runs here, against its formula in float64.

Driven by the registry, so an op is covered by its declaration: cases come from there; layouts, truth and tolerances
come from `fused_attn.testing`.
"""

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F

from fused_attn import OPS, ops, testing, use_backend
from fused_attn.backend import refusal
from fused_attn.ops.channel_pool import POOLS, TIES, channel_pool
from fused_attn.ops.scale import scale
from fused_attn.registry import case as make_case

DEVICE = os.environ.get("FUSED_ATTN_TEST_DEVICE", "cpu")
BACKENDS = testing.candidates(DEVICE)
FORMULAS = [op for op in OPS.values() if op.formula is not None]
RUNS = [(backend, op) for backend in BACKENDS for op in FORMULAS if testing.missing(op, backend) is None]
HALF = (torch.bfloat16, torch.float16)


def small(op):
    return [case for case in op.cases if "bench" not in case.tags]


def per_case(keep=lambda op, case: True):
    """One test for each backend and case."""
    return pytest.mark.parametrize(
        ("backend", "op", "case"),
        [
            pytest.param(backend, op, case, id=f"{backend}-{op.name}-{case}")
            for backend, op in RUNS
            for case in small(op)
            if keep(op, case)
        ],
    )


def per_op(runs=RUNS):
    """One test for each backend and op."""
    return pytest.mark.parametrize(("backend", "op"), [pytest.param(b, op, id=f"{b}-{op.name}") for b, op in runs])


def drawn(op, case, dtype=torch.float32, **how):
    return testing.draw(case, op, dtype, DEVICE, **how)


def pools_max(op, case):
    return case.args.get("pool") in ("max", "mean_max") or case.args.get("max_weight", 0) != 0


def assert_true(op, args, got, what):
    """`got` agrees with the formula in float64."""
    true, plain = testing.truth(op, args, got), testing.plain(op, args, got)
    found = testing.deviations(got, true, plain, testing.terms(op, args), testing.names(op, args))
    assert all(d.ok for d in found), f"{what}: " + "; ".join(str(d) for d in found if not d.ok)


def assert_like(op, args, got, what):
    """Outputs have the formula's dtypes and shapes; what has x's shape, its gradient too, lies as x does."""
    expected = op.formula(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert [(o.dtype, o.shape) for o in got.outs] == [(o.dtype, o.shape) for o in expected], what
    x = args[0]
    if "x" in op.maps:
        want = torch.empty_like(x).stride()
        assert got.grads[0].stride() == want, f"{what}: strides of dx"
        assert all(o.stride() == want for o in got.outs if o.shape == x.shape), f"{what}: strides of the output"


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_here(backend):
    """Says once what the suites below could not run."""
    reasons = {op.name: why for op in OPS.values() if (why := testing.missing(op, backend)) is not None}
    if reasons:
        listed = {why: [n for n, w in reasons.items() if w == why] for why in dict.fromkeys(reasons.values())}
        some = "; ".join(f"{why} ({'all ops' if len(n) == len(OPS) else ', '.join(n)})" for why, n in listed.items())
        pytest.skip(f"not run on {backend}: {some}")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@per_case()
def test_values(backend, op, case, dtype):
    """Outputs and gradients, in every layout that kernels walk; parameters of x's dtype and, beside half x, float32."""
    for parameters in {dtype, torch.float32 if dtype in HALF else dtype}:
        for layout in testing.WALKABLE:
            what = f"{layout}, parameters {parameters}"
            args = drawn(op, case, dtype, layout=layout, parameters=parameters)
            assert refusal(op, backend, args) is None, what
            with use_backend(backend):
                got = testing.answer(op, args)
                alone = op(*args)
            assert_like(op, args, got, what)
            assert_true(op, args, got, what)
            alone = alone if isinstance(alone, tuple) else (alone,)
            pairs = zip(alone, got.outs, strict=True)
            assert all(testing.identical(a, b) for a, b in pairs), f"{what}: without gradients other bits"


@pytest.mark.parametrize("gradient", testing.LAYOUTS[1:])
@per_case()
def test_gradient_strides(backend, op, case, gradient):
    """Gradients that are expanded, sliced, transposed or of the other memory format, beside x of both formats."""
    for layout in ("contiguous", "channels_last"):
        args = drawn(op, case, layout=layout)
        with use_backend(backend):
            got = testing.answer(op, args, gradient=gradient)
        assert_like(op, args, got, layout)
        assert_true(op, args, got, layout)


@pytest.mark.parametrize("layout", ["transposed", "spread", "expanded"])
@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op.name}-{case}") for op in FORMULAS for case in small(op)]
)
def test_unwalkable_falls_back(op, case, layout):
    """What no kernel walks is computed all the same."""
    if layout == "expanded" and op.name in ("plane_gate_shuffle", "group_similarity_scale"):
        pytest.skip("divides by the standard deviation of a plane, which is 0 where all values are one")
    args = drawn(op, case, layout=layout)
    assert_true(op, args, testing.answer(op, args), layout)


@per_op([(backend, op) for backend, op in RUNS if len(op.maps) > 1])
def test_mixed_layouts(backend, op):
    """x channels_last beside a contiguous second map: refused by a forced kernel, computed by the automatic choice."""
    second = lambda c: any(isinstance(c.args.get(name), tuple) for name in op.maps if name != "x")
    case = next(c for c in small(op) if second(c) and c.args["x"][1] > 1 and math.prod(c.args["x"][2:]) > 1)
    args = list(drawn(op, case))
    args[0] = testing.arrange(args[0], "channels_last")
    assert_true(op, args, testing.answer(op, args), "auto")
    with use_backend(backend):
        if (why := refusal(op, backend, tuple(args))) is None:
            assert_true(op, args, testing.answer(op, args), backend)
        else:
            with pytest.raises(RuntimeError, match=why):
                op(*args)


# gelu(−inf) is 0 by its limit and NaN by its formula; ATen itself gives either, by dtype.
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
@per_case(lambda op, case: "x" in op.maps and 0 not in case.args["x"] and "gelu" not in case.args.values())
def test_special_values_propagate(backend, op, case, special):
    """A NaN or infinity in x, in its residual, or in the gradient.

    The output shows it exactly where the formula does. Gradients may spread it (0·NaN, where autograd masks), but not
    to another sample's x, and never lose it: a loss scaler that looks at one of them would step on.
    """
    for layout in ("contiguous", "channels_last"):
        for name in ("x", *(n for n in op.maps if n != "x" and isinstance(case.args.get(n), tuple)), "dy"):
            args = drawn(op, case, layout=layout)
            with use_backend(backend):
                dy = testing.cotangent(testing.answer(op, args).outs[0])
                target = dy if name == "dy" else args[op.arguments.index(name)]
                target[(0,) * target.dim()] = special
                got = testing.answer(op, args, cotangents=[dy])
            true = testing.plain(op, args, got)
            y, expected = got.outs[0], true.outs[0]
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(y), kind(expected)), (
                    f"{special} in {name}, {layout}: {kind.__name__} of the output"
                )
            for d, mine, theirs in zip(testing.names(op, args), got.grads, true.grads, strict=True):
                if theirs is not None:
                    # In a feature map plane by plane, else in the whole tensor. Where autograd makes NaN of 0·inf, ours
                    # may have the 0, but what isn't finite never vanishes.
                    start = 2 if d in op.maps else 0
                    gone = mine.isfinite().flatten(start).all(-1) & ~theirs.isfinite().flatten(start).all(-1)
                    assert not gone.any(), f"{special} in {name}, {layout}: lost in {int(gone.sum())} places of d{d}"
            if case.args.get("norm") != "batch":
                assert got.grads[0][1:].isfinite().all(), f"{special} in {name}, {layout}: spreads to another sample"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@per_case(pools_max)
def test_ties(backend, op, case, dtype):
    """Maxima that occur more than once, under both rules, whatever rule the case has."""
    for ties in TIES:
        for layout in testing.WALKABLE:
            what = f"ties={ties!r}, {layout}"
            args = drawn(
                op, dataclasses.replace(case, args={**case.args, "ties": ties}), dtype, layout=layout, ties=True
            )
            with use_backend(backend):
                got = testing.answer(op, args)
            assert_true(op, args, got, what)


@pytest.mark.parametrize("backend", [b for b, op in RUNS if op.name == "channel_pool"])
@pytest.mark.parametrize("ties", TIES)
def test_ties_by_hand(backend, ties):
    """The rules, without the formula: the gradient of [1, 3, 3, 0, 3] is ⅓ at each 3, or 1 at the first."""
    x = torch.tensor([1.0, 3, 3, 0, 3], device=DEVICE).view(1, 1, 5).requires_grad_()
    with use_backend(backend):
        value, index = ops.channel_pool(x, "max", ties, True)
        value.backward(torch.ones_like(value))
    third = [0, 1 / 3, 1 / 3, 0, 1 / 3]
    assert value.item() == 3
    assert index.item() == 1
    assert torch.allclose(x.grad.flatten().cpu(), torch.tensor(third if ties == "split" else [0, 1.0, 0, 0, 0]))


@per_case()
def test_two_backwards(backend, op, case, launches):
    """Two backwards through one graph give equal bits; inputs, gradients and all that is kept stay untouched."""
    args = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in drawn(op, case, layout="channels_last", parameters=torch.float32)
    ]
    with use_backend(backend):
        out = op(*args)
        y = out[0] if isinstance(out, tuple) else out
        dy = testing.cotangent(y, "channels_last")
        kept = [t for t in y.grad_fn.saved_tensors if t is not None] + [
            dy,
            *(a for a in args if isinstance(a, torch.Tensor)),
        ]
        before = [t.detach().clone() for t in kept]
        wanted = [a for a in args if isinstance(a, torch.Tensor)]
        first = torch.autograd.grad(y, wanted, dy, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    assert all(testing.identical(a.detach(), b) for a, b in zip(kept, before, strict=True))
    assert all((a is None and b is None) or testing.identical(a, b) for a, b in zip(first, second, strict=True))


def enlarged(op, case):
    """The case with maps of an odd size that is large enough to be divided among threads."""
    size = {1: (2039,), 2: (43, 47), 3: (11, 13, 17)}
    args = dict(case.args)
    for name in op.maps:
        if isinstance(args.get(name), tuple):
            args[name] = (*args[name][:2], *size[len(args[name]) - 2])
    if isinstance(args.get("pixel"), tuple):
        args["pixel"] = (args["x"][0], *args["x"][2:])
    return make_case(**args)


def large(op):
    if not op.maps:
        return [c for c in op.cases if "bench" in c.tags][:1]
    wanted = [c for c in small(op) if c.args["x"][0] and math.prod(c.args["x"][:2]) >= 10]
    return [enlarged(op, c) for c in wanted]


@per_op()
def test_same_bits(backend, op, threads):
    """Run to run, and (our kernels; ATen promises nothing) whether one thread computes or two."""
    for case in large(op) if backend == "cpp" else large(op)[:1]:
        for layout in ("contiguous", "channels_last"):
            args = drawn(op, case, layout=layout)
            with use_backend(backend):
                threads(2)
                first, second = testing.answer(op, args), testing.answer(op, args)
                assert testing.same_bits(first, second), f"{case}, {layout}: two runs differ"
                if backend == "cpp":
                    threads(1)
                    assert testing.same_bits(first, testing.answer(op, args)), f"{case}, {layout}: depends on threads"
                    assert_true(op, args, first, f"{case}, {layout}")


@per_case(lambda op, case: 0 not in next(iter(case.args.values())))
def test_gradcheck(backend, op, case):
    args = [
        a.requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in drawn(op, case, torch.float64, layout="sliced")
    ]
    every = sum(a.numel() for a in args if isinstance(a, torch.Tensor)) <= 150
    first = lambda *a: out[0] if isinstance(out := op(*a), tuple) else out
    with use_backend(backend):
        assert torch.autograd.gradcheck(first, args, fast_mode=not every)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@per_op()
def test_opcheck(backend, op, layout, launches):
    """Schema, fake implementation and autograd registration of the operator and of those its backward runs."""
    for case in small(op):
        args = drawn(op, case, layout=layout)
        with use_backend(backend):
            testing.answer(op, args)
    seen = set()
    for other, args in list(launches):
        flags = tuple(
            a if isinstance(a, str | bool | None) else a.shape if isinstance(a, torch.Tensor) else 0 for a in args
        )
        if (other.name, flags) in seen:
            continue
        seen.add((other.name, flags))
        checked = ["test_schema", "test_autograd_registration", "test_faketensor"]
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        with use_backend(backend):
            torch.library.opcheck(other.overload, args, test_utils=checked)


@pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.name)
def test_opcheck_compiled(op):
    """What opcheck does through AOTAutograd with symbolic shapes, for one case with gradients."""
    case = next(c for c in small(op) if 0 not in next(iter(c.args.values())))
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in drawn(op, case)]
    torch.library.opcheck(op.overload, tuple(args), test_utils=["test_aot_dispatch_dynamic"])


@per_case()
def test_backends_share_what_is_saved(backend, op, case):
    """A backward takes what any other backend's forward saved: the formats agree."""
    args = drawn(op, case)
    infer = {other: other for other, o in RUNS if o is op and other != backend}
    for other in infer:
        with use_backend(other):
            outs = op.launch(args)
        tensors, consts = op.save(args, outs)
        public = op.public(args, outs)
        y = public[0] if isinstance(public, tuple) else public
        dy = testing.cotangent(y)
        with use_backend(backend):
            grads = op.backward(tensors, consts, (dy,), (True,) * op.count)
        kept = tuple(g for g, a in zip(grads, args[: op.count], strict=True) if isinstance(a, torch.Tensor))
        public = public if isinstance(public, tuple) else (public,)
        got = testing.Answer(public, (dy,), kept)
        assert_true(op, args, got, f"forward {other}, backward {backend}")


@per_op()
def test_autocast(backend, op):
    """Autocast has no say: the output keeps the dtype that it has outside, and the gradients theirs."""
    case = small(op)[0]
    for dtype in (torch.float32, torch.bfloat16):
        args = drawn(op, case, dtype, parameters=torch.float32)
        with use_backend(backend):
            outside = testing.answer(op, args)
            with torch.autocast(DEVICE, torch.bfloat16):
                inside = testing.answer(op, args, cotangents=outside.cotangents)
        assert testing.same_bits(outside, inside)


@per_op()
def test_second_derivative_raises(backend, op):
    """A second derivative is right or raises: never silently wrong."""
    case = next(c for c in small(op) if 0 not in next(iter(c.args.values())))
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in drawn(op, case)]
    with use_backend(backend):
        out = op(*args)
        y = out[0] if isinstance(out, tuple) else out
        (dx,) = torch.autograd.grad(y.square().sum(), args[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
            dx.square().sum().backward()


def compiled_case(op):
    """The case with most tensors, where the batch isn't empty or 1 (which a compiler specialises on)."""
    usable = [c for c in small(op) if next(iter(c.args.values()))[0] > 1]
    return max(usable, key=lambda c: sum(isinstance(v, tuple) for v in c.args.values()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.name)
def test_compile(op, dynamic):
    """One graph, forward and backward, with the numbers of the eager call; two shapes where they are symbolic."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    case = compiled_case(op)
    for layout in ("contiguous", "channels_last"):
        args = drawn(op, case, layout=layout)
        got = testing.answer(compiled, args)
        assert_true(op, args, got, layout)
        assert_like(op, args, got, layout)


def test_compile_inductor():
    """Inductor runs the operator inside a larger graph, and gives its neighbours the strides that the fake promised."""
    torch._dynamo.reset()
    op = ops.pool_mlp_scale
    args = drawn(op, op.cases[7], layout="channels_last")
    function = lambda x, *rest: op(x * 2, *rest) + 1
    got = testing.answer(torch.compile(function, fullgraph=True), args)
    want = testing.answer(lambda x, *rest: op.formula(x * 2, *rest) + 1, testing.double(args),
                          cotangents=testing.double(got.cotangents))  # fmt: skip
    for a, b in zip(got.outs + got.grads, want.outs + want.grads, strict=True):
        assert testing.error(a, b) < 1e-5


def excite(p, w1, w2):
    """A small network of the tests' own."""
    p = p.sum(0) if p.dim() == 3 else p
    return torch.sigmoid(F.silu(p.to(w1.dtype) @ w1) @ w2).to(p.dtype)


def spanned(x, w1, w2, residual, pool, ties, act):
    """What `pool_scale` computes, by formulas alone."""
    gate = excite(channel_pool.formula(x, pool, ties, False), w1, w2)
    return scale.formula(x, gate, residual, None, act, 0.01)


POOL_SCALE = [b for b in BACKENDS if all(testing.missing(OPS[n], b) is None for n in ("channel_pool", "scale"))]


@pytest.mark.parametrize("backend", POOL_SCALE)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("pool", "ties"), [(p, t) for p in POOLS for t in TIES if "max" in p or t == "split"])
def test_pool_scale(backend, pool, ties, residual, act):
    """Both ends around an excite of the caller's, against formulas: layouts, ties, dtypes, parameters."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    x, w1, w2, r = new(2, 6, 5, 3), new(6, 4), new(4, 6), new(2, 6, 5, 3)
    for dtype, layout, rounded in [(torch.float32, lay, True) for lay in testing.WALKABLE] + [
        (torch.float64, "contiguous", False), (torch.bfloat16, "channels_last", True),
        (torch.float16, "contiguous", False),
    ]:  # fmt: skip
        lay = lambda t: testing.arrange((t.round() if rounded else t).to(dtype).to(DEVICE), layout)  # noqa: B023
        weights = [w.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32) for w in (w1, w2)]
        args = (lay(x), *weights, lay(r) if residual else None)
        fused = lambda x, a, b, r: ops.pool_scale(x, excite, a, b, pool=pool, ties=ties, residual=r, act=act)
        formula = lambda x, a, b, r: spanned(x, a, b, r, pool, ties, act)
        with use_backend(backend):
            got = testing.answer(fused, args, gradient=layout)
        assert got.outs[0].stride() == got.grads[0].stride() == torch.empty_like(args[0]).stride()
        true = testing.answer(formula, testing.double(args), cotangents=testing.double(got.cotangents))
        plain = testing.answer(formula, args, cotangents=got.cotangents)
        found = testing.deviations(got, true, plain, 15 + 6, ["x", "w1", "w2", "residual"][: len(got.grads)])
        assert all(d.ok for d in found), f"{dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pool_scale_compiles(dynamic):
    """One graph, whatever the excite, with the bits of the eager call."""
    torch._dynamo.reset()
    fused = lambda x, a, b, r: ops.pool_scale(x, excite, a, b, pool="mean_max", residual=r, act="relu")
    args = (torch.randn(2, 6, 5, 3), torch.randn(6, 4), torch.randn(4, 6), torch.randn(2, 6, 5, 3))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert testing.same_bits(testing.answer(fused, args), testing.answer(compiled, args))


def test_pool_scale_returns_statistics():
    """What excite returns beside the gate reaches the caller, without a gradient, and changes none."""
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    plain = lambda p, w: torch.sigmoid(p @ w)
    y, mean, square = ops.pool_scale(x, lambda p, w: (plain(p, w), p.mean(0), (p @ w).square()), w)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    assert not mean.requires_grad
    assert not square.requires_grad
    expected = ops.pool_scale(x, plain, w)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True):
        assert torch.equal(a, b)
