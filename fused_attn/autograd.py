"""The ways into an op, and the gradient on each: who watches a call decides which one it takes.

    nobody                                         a launcher, in an autograd.Function where a gradient is wanted
    a compiler, a tracer, a mode, a subclass       the registered operator, with autograd registered for it
    a functorch transform, forward-mode autograd   an autograd.Function around the registered operator

Each has been seen to slip through a simpler check (inside vmap, `type(x) is Tensor` holds), so tests watch every one
of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_torch_function_mode_enabled, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from . import backend

if TYPE_CHECKING:
    from .registry import Op

# Everything a launcher takes as it is. A subclass of Tensor, a proxy or a symbolic number goes to the registered
# operator.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), str, float, int, bool})
_is_compiling = torch.compiler.is_compiling
_NO_SECOND = (
    "fused_attn.{}: a second derivative of a fused op is not available, nor the first one of some parts that an "
    "exported program holds; a converted model has it after fused_attn.unfuse_(model), a program after "
    "run_decompositions(fused_attn.decompositions())"
)
_NO_FORWARD = (
    "fused_attn.{}: forward-mode differentiation (jvp) of a fused op is not available; torch.func.vjp and grad are, "
    "and a converted model has it after fused_attn.unfuse_(model)"
)


def is_watched() -> bool:
    """Whether a compiler, tracer, mode or transform wants to see the op."""
    return (
        _is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
    )


def is_inference_compiled() -> bool:
    """Whether this is traced for a compiler, not for export, and nothing is differentiated."""
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled() and not torch.compiler.is_exporting()


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether these are arguments that a launcher takes as they are: no subclass, no proxy, no symbolic number."""
    return _PLAIN.issuperset(map(type, args))


def is_transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way; a compiler deals with these
    itself."""
    return not _is_compiling() and (forward_ad._current_level >= 0 or peek_interpreter_stack() is not None)


def launching(op: "Op") -> Callable[..., Any]:
    """The function whose forward is a launcher: called with ((all arguments, Call), *the tensors among them)."""
    save, differentiate = cast(Any, op.save), cast(Any, op.backward)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, asked: tuple[Any, ...], *tensors: Tensor) -> Any:
            args, call = asked
            outs = backend.run(op, args, False, tensors, call)
            kept, consts = save(args, outs)
            ctx.save_for_backward(*kept)
            ctx.set_materialize_grads(False)
            # On a GPU, backward runs in a thread that doesn't see the caller's context.
            ctx.consts = consts, call, backend.forced()
            public = outs[0] if call.alone else op.public(args, outs)
            if isinstance(public, tuple):  # of several, the first is the value, the rest are indices or statistics
                ctx.mark_non_differentiable(*public[1:])
            return public

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            consts, call, forced = ctx.consts
            if grads[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            saved, needs = ctx.saved_tensors, call.spread((*ctx.needs_input_grad, False))
            back = lambda: differentiate(saved, consts, grads, needs)
            return None, *call.pick(once(back, forced, op.name, (*saved, *grads)))

    _name(Function, op)
    # Function.apply itself looks for transforms, of which there are none here, and unwraps what they left behind, which
    # kernels take as it is: 7 µs for a dozen arguments.
    apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply
    return apply


def once(
    backward: Callable[[], tuple[Tensor | None, ...]], forced: str, name: str, given: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Runs a backward on the forward's backend; what is differentiated again raises, whatever it depends on.

    given: what the gradients are functions of: saved tensors, incoming gradients
    `once_differentiable` isn't enough: it lets a second derivative pass as 0 where the incoming gradient is a constant,
    and `torch.autograd.grad`, which asks for the way to its inputs alone, finds none and calls them unused.
    """
    if _is_compiling():  # which differentiates once only, by itself
        return backward()
    with torch.no_grad():
        if forced == backend.forced():
            back = backward()
        else:
            with backend.use_backend(forced):
                back = backward()
    if not torch.is_grad_enabled():
        return back
    found = [t.detach().requires_grad_() for t in back if t is not None]
    found += [t for t in given if t is not None and t.requires_grad]
    outs = torch._C._functions.DelayedError(_NO_SECOND.format(name).encode(), len(found))(*found)
    marked = iter(outs if isinstance(outs, tuple) else (outs,))
    return tuple(None if t is None else next(marked) for t in back)


def transformed(op: "Op") -> type[torch.autograd.Function]:
    """Around the registered operator, in the form that functorch takes; forward mode (jvp) raises, and isn't silently
    0."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op.overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _keep(op, ctx, inputs, output)
            # All outputs of a backward are gradients, and being asked for theirs it must raise.
            if isinstance(output, tuple) and op.backward is not None:
                ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return _back(op, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            raise RuntimeError(_NO_FORWARD.format(op.name))

    _name(Function, op)
    return Function


def register(op: "Op", library: torch.library.Library) -> None:
    """Autograd for the registered operator: the path of torch.compile and export."""
    torch.library.register_autograd(
        f"fused_attn::{op.name}",
        lambda ctx, *grads: _back(op, ctx, grads),
        setup_context=lambda ctx, inputs, output: _keep(op, ctx, op.bind(inputs, {}), output),
        lib=library,
    )


def _keep(op: "Op", ctx: Any, args: tuple[Any, ...], outs: Any) -> None:
    if op.save is not None:
        kept, ctx.consts = op.save(args, outs)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)


def _back(op: "Op", ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if op.backward is None:
        raise RuntimeError(_NO_SECOND.format(op.name))
    if grads[0] is None:
        return (None,) * op.arity
    # The dispatcher drops trailing arguments that have their default value.
    needs = ctx.needs_input_grad + (False,) * (op.arity - len(ctx.needs_input_grad))
    back = op.backward(ctx.saved_tensors, ctx.consts, grads, needs[: len(op.tensors)])
    return back + (None,) * (op.arity - len(back))


def traced(function: Callable[..., Any], *args: Any, **options: Any) -> torch.fx.Proxy:
    """One node of torch.fx that calls a function which asks for shapes and dtypes, where symbols stand for tensors.

    What can be called among the arguments has no place in a graph, and becomes part of the node's target.
    """
    proxy = next(a for a in args if isinstance(a, torch.fx.Proxy))
    known = {i: a for i, a in enumerate(args) if callable(a) and not isinstance(a, (torch.fx.Proxy, Tensor))}
    rest = [i for i in range(len(args)) if i not in known]
    named = {name: options.pop(name) for name, value in list(options.items()) if callable(value)
             and not isinstance(value, (torch.fx.Proxy, Tensor))}  # fmt: skip

    @functools.wraps(function)
    def call(*given: Any, **more: Any) -> Any:
        every = {**known, **dict(zip(rest, given, strict=True))}
        return function(*(every[i] for i in range(len(every))), **named, **more)

    node: torch.fx.Proxy = proxy.tracer.create_proxy("call_function", call, tuple(args[i] for i in rest), options)
    return node


def no_second(op: "Op") -> RuntimeError:
    """The complaint of a backward that is asked for its own gradient."""
    return RuntimeError(_NO_SECOND.format(op.name))


def _name(function: type[torch.autograd.Function], op: "Op") -> None:
    function.__name__ = function.__qualname__ = f"fused_attn_{op.name}"
    function._backward_cls.__name__ = f"fused_attn_{op.name}Backward"  # as grad_fn shows it
