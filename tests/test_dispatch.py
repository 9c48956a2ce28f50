"""Which path a call takes, and which backend runs it.

Three paths (registry.py): the launcher, an autograd.Function around it, the registered operator. Whoever watches the
program from outside must see the operator. Each watcher below is also run with the check that finds it switched off: it
must notice.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fused_attn import OPS, backend, ops, registry, testing, use_backend
from fused_attn.backend import choose, observe, refusal

FORMULAS = [op for op in OPS.values() if op.formula is not None]
per_op = pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.name)


def arguments(op, batch=None):
    """Small arguments; with `batch`, the first one has another dimension in front."""
    case = next(c for c in op.cases if "bench" not in c.tags and next(iter(c.args.values()))[0] == 2)
    args = list(testing.draw(case, op))
    if batch:
        args[0] = torch.stack([args[0] * (i + 1) for i in range(batch)])
    return args


def first(out):
    return out[0] if isinstance(out, tuple) else out


class Subclass(torch.Tensor):
    """A wrapper that notes what it is asked to do."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        plain = tree_map(lambda a: a.inner if isinstance(a, cls) else a, args)
        out = func(*plain, **(kwargs or {}))
        return tree_map(lambda o: cls(o) if isinstance(o, torch.Tensor) else o, out)


class DispatchLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(torch.nn.Module):
    def __init__(self, op, rest):
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, x):
        return first(self.op(x, *self.rest))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Each watcher runs the op in its surroundings and asserts that it saw the operator, and that the numbers are right.
def by_compile(op):
    x, *rest = arguments(op)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    close(torch.compile(Calls(op, rest), backend=compiler, fullgraph=True)(x), first(op.formula(x, *rest)))
    assert f"fused_attn.{op.name}" in str(graphs[0].graph)


def by_export(op):
    x, *rest = arguments(op)
    program = torch.export.export(Calls(op, rest), (x,))
    assert f"torch.ops.fused_attn.{op.name}" in str(program.graph)
    close(program.module()(x * 2), first(op.formula(x * 2, *rest)))


def by_jit_trace(op):
    x, *rest = arguments(op)
    traced = torch.jit.trace(Calls(op, rest), (x,))
    assert f"fused_attn::{op.name}" in str(traced.inlined_graph)
    close(traced(x * 2), first(op.formula(x * 2, *rest)))  # nothing of x is baked in


def by_fx(op):
    x, *rest = arguments(op)
    traced = torch.fx.symbolic_trace(Calls(op, rest))
    calls = [n for n in traced.graph.nodes if n.op == "call_function" and n.target is op.overload]
    assert len(calls) == 1, "a leaf"
    close(traced(x), first(op.formula(x, *rest)))


def by_make_fx(op):
    x, *rest = arguments(op)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: first(op(x, *rest)))(x)
    assert f"fused_attn.{op.name}" in str(traced.graph)


def by_subclass(op):
    x, *rest = arguments(op)
    Subclass.seen.clear()
    out = first(op(Subclass(x), *rest))
    assert f"fused_attn.{op.name}.default" in Subclass.seen
    close(out.inner, first(op.formula(x, *rest)))


def by_dispatch_mode(op):
    args = arguments(op)
    with DispatchLog() as log:
        op(*args)
    assert f"fused_attn.{op.name}.default" in log.seen


def by_function_mode(op):
    args = arguments(op)
    with FunctionLog() as log:
        op(*args)
    assert f"fused_attn.{op.name}.default" in log.seen


def by_fake(op):
    """Nothing is computed: every kernel, the eager one as well, would be a mistake."""
    x, *rest = arguments(op)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, DispatchLog() as log:
        out = op(mode.from_tensor(x), *[mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in rest])
    assert f"fused_attn.{op.name}.default" in log.seen
    want = first(op(x, *rest))
    assert isinstance(first(out), FakeTensor)
    assert (first(out).shape, first(out).dtype, first(out).stride()) == (want.shape, want.dtype, want.stride())


def by_fake_alone(op):
    """A fake tensor outside its mode, as some tools leave it."""
    x, *rest = arguments(op)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (x, *rest)]
    launched = []
    with observe(launched.append):
        out = op(*fakes)
    assert isinstance(first(out), FakeTensor)
    assert not launched


def by_meta(op):
    x, *rest = arguments(op)
    launched = []
    with observe(launched.append):
        out = op(*[t.to("meta") if isinstance(t, torch.Tensor) else t for t in (x, *rest)])
    want = first(op(x, *rest))
    assert first(out).is_meta
    assert (first(out).shape, first(out).dtype, first(out).stride()) == (want.shape, want.dtype, want.stride())
    assert not launched


def by_vmap(op):
    x, *rest = arguments(op, batch=3)
    seen = []
    with observe(seen.append):
        got = torch.vmap(lambda x: first(op(x, *rest)))(x)
    close(got, torch.stack([first(op.formula(each, *rest)) for each in x]))
    assert seen, "a backend ran, on plain tensors"


def by_func_grad(op):
    x, *rest = arguments(op)
    loss = lambda f: lambda x: first(f(x, *rest)).square().sum()
    close(torch.func.grad(loss(op))(x), torch.func.grad(loss(op.formula))(x))
    close(
        torch.func.jacrev(lambda x: first(op(x, *rest)))(x), torch.func.jacrev(lambda x: first(op.formula(x, *rest)))(x)
    )


def by_vmap_of_grad(op):
    x, *rest = arguments(op, batch=3)
    loss = lambda f: lambda x: first(f(x, *rest)).square().sum()
    close(
        torch.vmap(torch.func.grad(loss(op)))(x), torch.stack([torch.func.grad(loss(op.formula))(each) for each in x])
    )


def by_jvp(op):
    """Forward mode is not there, and says so: a tangent that is silently 0 would be the worst answer."""
    x, *rest = arguments(op)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        torch.func.jvp(lambda x: first(op(x, *rest)), (x,), (x,))


def by_dual_numbers(op):
    x, *rest = arguments(op)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"),
    ):
        op(torch.autograd.forward_ad.make_dual(x, x), *rest)


WATCHERS = [
    by_compile, by_export, by_jit_trace, by_fx, by_make_fx, by_subclass, by_dispatch_mode, by_function_mode, by_fake,
    by_fake_alone, by_meta, by_vmap, by_func_grad, by_vmap_of_grad, by_jvp, by_dual_numbers,
]  # fmt: skip
# These find an operator that the launcher reached by itself, or numbers that happen to be right, on eager PyTorch.
TOLERANT = {by_vmap, by_func_grad, by_vmap_of_grad}


@per_op
@pytest.mark.parametrize("watcher", WATCHERS, ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore")
def test_watcher_sees_the_operator(op, watcher):
    watcher(op)


@pytest.mark.parametrize("watcher", [w for w in WATCHERS if w not in TOLERANT], ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore")
def test_watcher_can_fail(watcher, monkeypatch):
    """With the raw launcher in place of the operator, each of these tests fails."""
    monkeypatch.setattr(registry, "is_watched", lambda: False)
    monkeypatch.setattr(registry, "is_plain", lambda args: True)
    for op in OPS.values():
        monkeypatch.setattr(op, "_calls", {})
    if watcher is by_meta:
        monkeypatch.setattr(torch.Tensor, "is_meta", False)
    with pytest.raises((Exception, pytest.fail.Exception)):
        watcher(ops.scale)


def test_plain_tensors_take_the_launcher(launches):
    """The other side of the same coin: nothing unusual, no operator, no graph without gradients."""
    args = arguments(ops.scale)
    assert registry.is_plain(tuple(args))
    y = ops.scale(*args)
    assert y.grad_fn is None
    assert [op.name for op, _ in launches] == ["scale"]
    args[0].requires_grad_()
    assert "fused_attn_scale" in type(ops.scale(*args).grad_fn).__name__
    with torch.no_grad():
        assert ops.scale(*args).grad_fn is None
    with torch.inference_mode():
        assert ops.scale(*args).is_inference()
    assert ops.scale(args[0], torch.nn.Parameter(args[1]), *args[2:]).grad_fn is not None


@per_op
def test_what_outlived_a_transform(op):
    """A tensor that leaked out of functorch is a wrapper without a level: the numbers are those of what it wraps."""
    x, *rest = arguments(op)
    leaked = []

    def leaking(x):
        leaked.append(x * 2)
        return x.sum()

    torch.func.grad(leaking)(x)
    want = first(op(x * 2, *rest))
    assert torch.equal(first(op(leaked[0], *rest)), want)
    weighted = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in rest]
    if any(isinstance(t, torch.Tensor) for t in rest):
        assert torch.equal(first(op(leaked[0], *weighted)), want)


def test_modes_end():
    with DispatchLog():
        assert registry.is_watched()
    assert not registry.is_watched()


def test_keywords_and_defaults_bind():
    x, gate = arguments(ops.scale)[:2]
    want = ops.scale(x, gate, None, "relu", 0.01)
    assert torch.equal(ops.scale(x, gate, act="relu"), want)
    assert torch.equal(ops.scale(gate=gate, act="relu", x=x), want)
    assert torch.equal(torch.ops.fused_attn.scale(x, gate, act="relu"), want)


@pytest.mark.parametrize(
    ("watcher", "run"),
    [
        ("jit.trace", lambda f, x: torch.jit.trace(f, (x,), check_trace=False)(x)),
        ("fx", lambda f, x: torch.fx.symbolic_trace(f)(x)),
        ("vmap", lambda f, x: torch.vmap(f)(x[None])[0]),
        ("compile", lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True)(x)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_pool_scale_is_watched(watcher, run):
    """What spans a callable is no operator itself: watchers see its parts, or their composition."""
    w = torch.randn(6, 6)
    f = lambda x: ops.pool_scale(x, lambda p: torch.sigmoid(p @ w))
    x = torch.randn(2, 6, 4, 4)
    close(run(f, x), f(x))


@pytest.mark.filterwarnings("ignore")
def test_pool_scale_under_func_grad():
    w = torch.randn(6, 6)
    excite = lambda p: torch.sigmoid(p @ w)
    x = torch.randn(2, 6, 4, 4)
    f = lambda x: ops.pool_scale(x, excite).square().sum()
    true = lambda x: (x * excite(x.mean((2, 3)))[..., None, None]).square().sum()
    close(torch.func.grad(f)(x), torch.func.grad(true)(x))


# ---- backends


@per_op
def test_forced_backend_runs(op):
    args = tuple(arguments(op))
    for name in ("eager", "cpp"):
        seen = []
        with use_backend(name), observe(seen.append):
            if (why := refusal(op, name, args)) is None:
                op(*args)
                assert [(c.backend, c.reason) for c in seen] == [(name, "forced")]
            else:
                with pytest.raises(RuntimeError) as caught:
                    op(*args)
                assert str(caught.value) == f"fused_attn.{op.name}: backend {name!r} can't run: {why}"


def test_forced_triton_on_the_cpu_says_why():
    args = tuple(arguments(ops.scale))
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"scale: backend 'triton' can't run: .+"):
        ops.scale(*args)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*'cpp'; got 'fast'"), use_backend("fast"):
        pass
    assert backend.forced() == "auto"


def test_nesting_and_exceptions():
    with use_backend("eager"):
        with use_backend("cpp"):
            assert backend.forced() == "cpp"
        assert backend.forced() == "eager"
        with pytest.raises(KeyError), use_backend("cpp"):
            raise KeyError
        assert backend.forced() == "eager"
    assert backend.forced() == "auto"


def test_another_thread_is_not_forced():
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend.forced()))
        thread.start()
        thread.join()
    assert seen == [backend._forced.get()]


@per_op
def test_backward_runs_where_the_forward_was_forced(op):
    """Also when backward is called outside the block, or from another thread, as autograd does on a GPU."""
    args = arguments(op)
    args[0].requires_grad_()
    with use_backend("eager"):
        out = first(op(*args))
    seen = []
    with observe(seen.append):
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert args[0].grad is not None
    assert {c.backend for c in seen} <= {"eager"}


def test_choice_has_a_reason():
    args = tuple(arguments(ops.scale))
    choice = choose(ops.scale, args)
    if choice.backend == "cpp":
        assert choice.reason == "first choice on cpu"
    else:
        assert choice.backend == "eager"
        assert choice.reason.startswith("cpp: ")
    strange = (testing.arrange(torch.randn(2, 3, 4, 5), "transposed"), torch.ones(2, 3), None, "relu", 0.01)
    choice = choose(ops.scale, strange)
    assert choice.backend == "eager"
    assert "cpp: " in choice.reason
    with use_backend("eager"):
        assert choose(ops.scale, args).reason == "forced"
    assert (choice.op, choice.dtype) == ("scale", torch.float32)


def test_reason_of_strides():
    if testing.missing(ops.scale, "cpp") is not None:
        pytest.skip(f"cpp: {testing.missing(ops.scale, 'cpp')}")
    x = testing.arrange(torch.randn(2, 3, 4, 5), "transposed")
    assert "strides (60, 20, 1, 4)" in choose(ops.scale, (x, torch.ones(2, 3), None, "relu", 0.01)).reason


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_forces():
    code = "import fused_attn.backend as b; print(b.forced())"
    assert run_python(code, FUSED_ATTN_BACKEND="eager").stdout.strip() == "eager"
    wrong = run_python(code, FUSED_ATTN_BACKEND="fast")
    assert wrong.returncode != 0
    assert "FUSED_ATTN_BACKEND must be one of 'auto'" in wrong.stderr
    assert "got 'fast'" in wrong.stderr


def test_every_leaf_is_a_tensor():
    """An operator's outputs are tensors, empty where there is nothing, because a schema can't say None."""
    for op in FORMULAS:
        outs = op.overload(*arguments(op))
        assert all(isinstance(o, torch.Tensor) for o in tree_leaves(outs))
        assert len(outs if isinstance(outs, tuple) else (outs,)) == op.returns
