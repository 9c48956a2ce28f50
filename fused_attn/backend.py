"""Which implementation runs, and why.

A GPU tries triton, then eager; the CPU tries cpp, then eager; a forced backend runs or raises. The first that
*accepts* the arguments is taken, and `explain` tells what the others objected to. The eager form accepts everything.
"""

import atexit
import importlib
import importlib.util
import operator
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import TABLE
from .layout import same_kind, walkable

if TYPE_CHECKING:
    from .registry import Op

BACKENDS = ("auto", "eager", "triton", "cpp")
ORDER = {"cpu": ("cpp", "eager"), "cuda": ("triton", "eager")}
_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class Choice(NamedTuple):
    """One decision: the op, the backend that ran, the reason, and the shape of its first argument."""

    op: str
    backend: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _named(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    return backend


_DEFAULT = _named(os.environ.get("FUSED_ATTN_BACKEND", "auto"), "FUSED_ATTN_BACKEND")
_forced: ContextVar[str] = ContextVar("fused_attn_backend", default=_DEFAULT)
_blocks: list[str] = []  # what blocks of all threads ask for: a compiler can read this, and not a context's variable
_observers: list[Callable[[Choice], None]] = []


def forced() -> str:
    """The backend that the caller asked for, or "auto"."""
    return _forced.get()


def is_free() -> bool:
    """Whether nobody, in any thread, asks for a backend."""
    return _DEFAULT == "auto" and all(backend == "auto" for backend in _blocks)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every op inside the block on one backend, forward and backward.

    backend: "auto" | "eager" | "triton" | "cpp". `FUSED_ATTN_BACKEND` in the environment sets what holds outside any
        block.
    Raises ValueError for another name, and an op raises RuntimeError, with the reason, where the backend can't run it.
    """
    token = _forced.set(_named(backend, "backend"))
    _blocks.append(backend)
    try:
        yield
    finally:
        _blocks.remove(backend)
        _forced.reset(token)


def _all_of(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes these places out of a tuple: a tuple, of one place too."""
    return operator.itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


# Options beyond these are spelled out in each call: a slope on a schedule must not fill the kernels' table.
MOST_CALLS = 1024


class Call:
    """What all calls of an op share that have the same options and the same tensors present.

    pick: takes the tensors that are there out of the arguments, or one value for each of them out of a tuple with one
        for each tensor argument; spread: the other way round, out of (_, *values, default)
    maps: the places of the feature maps among them
    number: of these options in the compiled kernel's table, None before its first run, -1 where the table is full
    alone: whether the kernel of the first output alone will do
    """

    __slots__ = ("alone", "maps", "mask", "number", "pick", "spread")

    def __init__(self, op: "Op", args: tuple[Any, ...]) -> None:
        places = [i for i, t in enumerate(args[: op.count]) if t is not None]
        if not places:
            op.check(*args)  # in words that name the argument
            raise TypeError(f"{op.arguments[0]} must be a tensor; got None")
        self.pick = _all_of(places)
        one = [1 + places.index(i) if i in places else -1 for i in range(op.count)]
        self.spread = _all_of(one)
        self.maps = tuple(i for _, i in op.map_indices if args[i] is not None)
        self.mask = sum(1 << i for i in places)
        self.number: int | None = None
        self.alone = False


class Implementation:
    """How one backend runs one op: all outputs, or with `infer` the public ones alone."""

    def __init__(self, op: "Op", run: Callable[..., Any]) -> None:
        self.op, self.all = op, run

    def run(self, args: tuple[Any, ...], tensors: tuple[Tensor, ...], infer: bool, call: Call) -> Any:
        """args: all arguments; tensors: those of them that are tensors."""
        self.op.check(*args)
        outs = self.all(*args)
        return self.op.public(args, outs) if infer else outs


class CppImplementation(Implementation):
    """A compiled kernel: called with the list of the tensors that are there and the number of its options
    (_codegen.py)."""

    def __init__(self, op: "Op") -> None:
        functions = torch.ops.fused_attn_cpp
        # `_op` is what an overload calls: a frame less.
        super().__init__(op, getattr(functions, op.name).default._op)
        self.first = getattr(functions, op.name + "_infer").default._op if op.alone else None
        self.register = getattr(functions, op.name + "_options").default
        self.spelled = getattr(functions, op.name + "_spelled").default
        self.registered = 0

    def _register(self, args: tuple[Any, ...], call: Call) -> int:
        """Gives these options a number, where there is room."""
        if self.registered >= MOST_CALLS:
            call.number = -1
        else:
            call.alone = self.first is not None and self.op.alone(*args)  # type: ignore[misc]
            call.number = self.register(call.mask, *args[self.op.count :])
            self.registered += 1
        return call.number

    def run(self, args: tuple[Any, ...], tensors: tuple[Tensor, ...], infer: bool, call: Call) -> Any:
        # The kernel checks its arguments itself, in half a microsecond; Python repeats a complaint, in words that name
        # one.
        try:
            number = call.number
            if number is None:
                number = self._register(args, call)
            if infer and call.alone:
                return self.first(tensors, number)  # type: ignore[misc]
            outs = (
                self.all(tensors, number) if number >= 0 else self.spelled(tensors, call.mask, *args[self.op.count :])
            )
        except (RuntimeError, TypeError):
            self.op.check(*args)
            raise
        return self.op.public(args, outs) if infer else outs


_found: dict[tuple[str, str], Implementation | str] = {}


def implementation(op: "Op", backend: str) -> Implementation | str:
    """How `backend` runs `op`, or the reason why it can't run it on this machine at all. Looked up on the first
    call."""
    key = (op.name, backend)
    if key not in _found:
        _found[key] = _find(op, backend)
    return _found[key]


def _find(op: "Op", backend: str) -> Implementation | str:
    if backend == "eager":
        return Implementation(op, op.eager)
    if backend == "cpp":
        if (why := extension()) is not None:
            return why
        if not hasattr(torch.ops.fused_attn_cpp, op.name):
            return "this op has no C++ kernel"
        if not _same_options(op):
            return "the C++ extension was built for another version of fused_attn"
        op.compiled = CppImplementation(op)
        return op.compiled
    if (why := triton_missing()) is not None:
        return why
    module = op.eager.__module__ + "_triton"
    if importlib.util.find_spec(module) is None:
        return "this op has no Triton kernel"
    _writable_cache()
    return Implementation(op, getattr(importlib.import_module(module), op.name))


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: decided by TRITON_INTERPRET before they are
    defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_missing() -> str | None:
    """None where triton is there, and can be imported, else the reason."""
    if "triton" in sys.modules:
        return None
    try:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        importlib.import_module("triton")
    except Exception as error:  # whatever is wrong with it, the library works without it
        return f"triton does not load: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _writable_cache() -> None:
    """Gives Triton a directory of this process, which ends with it, where it could write no compiled kernel into its
    cache: a launch would raise."""
    knobs = importlib.import_module("triton").knobs.cache
    try:
        os.makedirs(knobs.dir, exist_ok=True)
        if os.access(knobs.dir, os.W_OK | os.X_OK):
            return
    except OSError:
        pass
    place = tempfile.TemporaryDirectory(prefix="fused_attn-triton-")
    atexit.register(place.cleanup)
    knobs.dir = place.name


def _same_options(op: "Op") -> bool:
    """Whether the compiled kernel takes the options that this version's op has."""
    theirs = getattr(torch.ops.fused_attn_cpp, op.name + "_options").default._schema.arguments[1:]
    ours = op.overload._schema.arguments[op.count :]
    return [(a.name, str(a.type)) for a in theirs] == [(a.name, str(a.type)) for a in ours]


_extension: list[str | None] = []
_LIBRARY = torch.library.Library("fused_attn_cpp", "IMPL")


def extension() -> str | None:
    """Loads the compiled extension on first use. None where it is there, else the reason why it isn't."""
    if not _extension:
        _extension.append(_load())
    return _extension[0]


def _load() -> str | None:
    files = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not files:
        return "the C++ extension is not built"
    try:
        if not _is_whole(files[0]):
            return "the C++ extension does not load: the file is cut short"
        torch.ops.load_library(str(files[0]))
        names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fused_attn_cpp::")]
        for name in names:  # nothing to do for autograd here: the way through its fallback costs a microsecond
            for key in ("AutogradCPU", "ADInplaceOrView"):
                _LIBRARY.impl(name, torch.library.fallthrough_kernel, key)
    except Exception as error:  # whatever is wrong with the file, the library works without it
        return f"the C++ extension does not load: {str(error).splitlines()[0]}"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a library of ELF's 64-bit form has its end, where its table of sections is: a loader that runs into the
    end of a file is killed by a signal. Other forms are left to the loader."""
    with file.open("rb") as library:
        head = library.read(64)
        size = library.seek(0, os.SEEK_END)
    if head[:6] != b"\x7fELF\x02\x01":
        return True
    if len(head) < 64:
        return False
    (table,) = struct.unpack_from("<Q", head, 40)
    each, count = struct.unpack_from("<HH", head, 58)
    return bool(size >= table + each * count)


def refusal(op: "Op", backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` can't run `op` on these arguments, or None where it can."""
    if backend == "eager":
        return None
    found = implementation(op, backend)
    if isinstance(found, str):
        return found
    x: Tensor = args[0]
    if backend == "cpp":
        if not x.is_cpu:
            return f"runs on the CPU, and {op.arguments[0]} is on {x.device.type}"
    elif not x.is_cuda and not interpreting():
        return (
            f"runs on a GPU, and {op.arguments[0]} is on {x.device.type} "
            "(TRITON_INTERPRET=1 runs it in Triton's interpreter)"
        )
    if x.dtype not in _DTYPES:
        return f"{op.arguments[0]} is {x.dtype}"
    first = None
    for name, index in op.map_indices:
        value = args[index]
        if value is None or value.numel() == 0:
            continue
        if first is None:
            first = value
            if not walkable(value):
                strides, shape = tuple(value.stride()), tuple(value.shape)
                return f"{name} has strides {strides} for shape {shape}, which no kernel walks"
        elif not same_kind(first, value):
            return f"{name} has another memory format than {op.arguments[0]}"
    return None


def size_class(x: Tensor) -> str:
    """The column of the table of measured backends that a map belongs to: bound by launches, or by memory."""
    return "small" if x.numel() * x.element_size() < 1 << 20 else "large"


def order(op: "Op", x: Tensor) -> tuple[str, ...]:
    """The backends to try, first choice first: as measured on this architecture where a result is committed."""
    usual = ORDER.get(x.device.type, ("eager",))
    if not TABLE or not x.is_cuda:
        return usual
    major, minor = torch.cuda.get_device_capability(x.device)
    measured = TABLE.get((op.name, f"sm_{major}{minor}", size_class(x)), ())
    return tuple(dict.fromkeys((*(b for b in measured if b in usual), *usual)))


def choose(op: "Op", args: tuple[Any, ...]) -> Choice:
    """The backend that will run, with the reason. Raises RuntimeError where a forced backend can't."""
    want, x = _forced.get(), args[0]
    seen = (tuple(x.shape), x.dtype)
    if want != "auto":
        if (why := refusal(op, want, args)) is not None:
            op.check(*args)  # what no backend could take is the caller's mistake, not the backend's
            raise RuntimeError(f"fused_attn.{op.name}: backend {want!r} can't run: {why}")
        return Choice(op.name, want, "forced", *seen)
    passed: list[str] = []
    for name in order(op, x):
        if (why := refusal(op, name, args)) is None:
            return Choice(op.name, name, "; ".join(passed) or f"first choice on {x.device.type}", *seen)
        passed.append(f"{name}: {why}")
    raise AssertionError("unreachable: eager accepts everything")


def run(op: "Op", args: tuple[Any, ...], infer: bool, tensors: tuple[Tensor, ...], call: Call) -> Any:
    """Runs the chosen backend: all outputs, or with `infer` the public ones. tensors: the arguments that are
    tensors."""
    if not _observers and _forced.get() == "auto":
        found = op.compiled
        if found is not None and tensors[0].is_cpu and tensors[0].dtype in _DTYPES:
            for i in call.maps:
                if not args[i].is_contiguous():
                    break
            else:  # what `choose` would say, in a tenth of the time: this is the usual call
                return found.run(args, tensors, infer, call)
    choice = choose(op, args)
    chosen = implementation(op, choice.backend)
    assert not isinstance(chosen, str)
    outs = chosen.run(args, tensors, infer, call)
    for observer in _observers:
        observer(choice)
    return outs


@contextmanager
def unobserved() -> Iterator[None]:
    """Nobody is told of what runs inside the block: trials, of which no caller knows."""
    kept = _observers[:]
    _observers.clear()
    try:
        yield
    finally:
        _observers[:0] = kept


@contextmanager
def observe(observer: Callable[[Choice], None]) -> Iterator[None]:
    """Calls `observer` with every choice made inside the block, in any thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
