"""Every Triton kernel, compiled ahead of time for four targets without a GPU: registers, spills, widths of accesses.

What is compiled is what the launchers launch: they run on meta tensors, and a launch is caught before any driver.
"""

import functools
import importlib
import os
import pkgutil
import re
import subprocess
from typing import NamedTuple

import pytest
import torch

import fused_attn.ops
from fused_attn import OPS, backend
from fused_attn.ops import activations
from fused_attn.registry import Op

triton = pytest.importorskip("triton", reason="triton is not installed")
if backend.interpreting():
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SIDES = {49: 7, 196: 14, 784: 28, 3136: 56}

MODULES = [
    importlib.import_module(f"fused_attn.ops.{m.name}")
    for m in pkgutil.iter_modules(fused_attn.ops.__path__)
    if m.name.endswith(("_triton", "_kernels"))
]
KERNELS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__
}


class Launch(NamedTuple):
    """One caught launch."""

    kernel: JITFunction
    args: tuple
    meta: dict


class Built(NamedTuple):
    """What a compiler made of one launch."""

    registers: int
    spilled: int
    loads: dict  # width in bits -> how many
    stores: dict
    text: str


@pytest.fixture
def caught(monkeypatch):
    """Launches instead of running: a list that fills."""
    launches = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **meta: launches.append(Launch(self, args, meta))
    )
    return launches


@functools.cache
def _built(name, target, args, options):
    kernel, to = KERNELS[name], TARGETS[target]
    signature, constants, attributes = map(dict, args)
    source = ASTSource(kernel, signature, constants, {k: [list(a) for a in v] for k, v in attributes.items()})
    return _read(triton.compile(source, target=to, options=dict(options)), to)


def built(launch, target):
    """Compiles one launch as Triton's own launcher would: its binder decides what is constant, aligned, or 1."""
    compiler = make_backend(TARGETS[target])
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
    meta = dict(launch.meta)
    if target == "gfx942":  # what tile.py makes of it there: as many threads, in wider waves
        meta["num_warps"] = max(1, meta["num_warps"] // 2)
        meta.pop("maxnreg", None)
    bound, specialization, options = binder(*launch.args, **meta)
    options, signature, constants, attributes = launch.kernel._pack_args(compiler, meta, bound, specialization, options)
    frozen = (
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((k, tuple(tuple(a) for a in v)) for k, v in attributes.items()),
    )
    chosen = {k: v for k, v in meta.items() if k in ("num_warps", "enable_fp_fusion", "maxnreg")}
    return _built(launch.kernel.__name__, target, frozen, tuple(chosen.items()))


def _read(compiled, target):
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
        # Scalar registers spill into lanes of a vector register, not into memory.
        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        wide = {
            "ubyte": 8,
            "ushort": 16,
            "short": 16,
            "byte": 8,
            "dword": 32,
            "dwordx2": 64,
            "dwordx3": 96,
            "dwordx4": 128,
        }
        found = [
            (kind, wide.get(size, 16))
            for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_([a-z]+\w*)", text)
        ]
        registers = number("vgpr_count")
    else:
        path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fused_attn-{os.getpid()}.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        tool = lambda *command: (
            subprocess.run(
                [os.path.join(TOOLS, command[0]), *command[1:], path], capture_output=True, text=True, check=True
            ).stdout
        )
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("cuobjdump", "-res-usage"))
        text = tool("nvdisasm", "-c")
        os.remove(path)
        registers, stack, local = map(int, usage.groups())
        spilled = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", text))
        found = []
        for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", text):
            width = re.search(r"\.(128|64|256|[US]16|[US]8)\b", modifiers)
            found.append(
                ("load" if kind == "LDG" else "store", int(re.sub(r"\D", "", width.group(1))) if width else 32)
            )
    loads, stores = ({w: found.count((kind, w)) for k, w in found if k == kind} for kind in ("load", "store"))
    return Built(registers, spilled, loads, stores, text)


def assert_lean(kernel, b):
    assert b.spilled == 0, f"{kernel} spills"
    limit = 256 if "amdgcn" in b.text else 128  # gfx942 has twice the register file
    assert b.registers <= limit, f"{kernel} takes {b.registers} registers"
    # atomics on floats would make the order of a sum, and so its last bits, a matter of luck
    assert not re.search(r"\b(?:ATOM|ATOMG|RED)\b[.\w]*|(?:global|flat|buffer)_atomic", b.text), f"{kernel} has atomics"


def empty(shape, dtype, kind="planes"):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if kind == "pixels" else t


def run(name, *args):
    """One op's launcher, as backend.py finds it."""
    op: Op = OPS[name]
    return getattr(importlib.import_module(op.eager.__module__ + "_triton"), name)(*args)


def map_launches(size, kind, dtype, act="relu", n=2, c=64):
    """Every pass over feature maps: what is pooled, scaled, and the ways back."""
    acc = F64 if dtype == F64 else F32
    x, dy, residual = (empty((n, c, SIDES.get(size, size), SIDES.get(size, size)), dtype, kind) for _ in range(3))
    gate, both, index = empty((n, c), acc), empty((2, n, c), acc), empty((n, c), torch.int64)
    aux = activations.needs_aux(act, True) and residual
    run("channel_pool", x, "mean", "split", False)
    run("channel_pool", x, "mean_max", "first", True)
    run("scale", x, gate, residual, None, act, 0.01, "product")
    run("scale_bwd", x, gate, aux, None, dy, act, 0.01, "product", True)
    run("pool_scale_reduce", x, dy, gate, aux, both[1], act, 0.01, "mean_max", "split", True)
    run("pool_scale_apply", x, dy, gate, both, both[1], index, gate, act, 0.01, "mean_max", "split")
    run("pool_scale_apply", x, dy, gate, both[0], both[1], index, gate, "identity", 0.01, "mean", "split")
    run("channel_pool_bwd", x, both, both, index, "mean_max", "first")
    run("soft_threshold", x, gate, residual)
    run("soft_threshold_bwd", x, gate, dy)
    run("pool_soft_threshold_reduce", x, gate, dy)
    run("pool_soft_threshold_apply", x, gate, dy, gate, "mean_abs")
    run("map_scale", x, residual, "none", 1e-5, 0.0)
    run("map_scale", x, residual, "positions", 1e-5, 0.0)
    run("map_scale_bwd", x, residual, both, dy, "positions", 1e-5, 0.0)
    pixel, place = empty((n, *x.shape[2:]), acc), empty((n, *x.shape[2:]), torch.int64)
    planes = empty((n, 2, *x.shape[2:]), acc)
    run("scale", x, gate, residual, pixel, act, 0.01, "product")
    run("scale", x, gate, None, pixel, "identity", 0.01, "sigmoid_sum")
    run("scale_bwd", x, gate, aux, pixel, dy, act, 0.01, "sigmoid_product", True)
    run("spatial_pool", x, gate, "mean_max", "first", True)
    run("spatial_pool_bwd", x, gate, planes, planes, place, "mean_max", "split")
    run("affine_pixel_scale", x, gate, both, pixel, residual, act, 0.01)
    within = (planes, planes, place, pixel)
    for affine, tilt in ((None, None), (both, gate)):
        run("dual_scale_reduce", x, dy, gate, pixel, aux, planes, affine, act, 0.01, "mean_max", "split", True)
        for ties in ("split", "first"):
            end = (affine, tilt, "identity", 0.01, "mean_max", "mean_max", ties)
            run("dual_scale_gate", x, dy, gate, pixel, *within, both[1], affine, *end[2:])
            run("dual_scale_apply", x, dy, gate, pixel, *within, both, both[1], index, gate, *end)
    for first in (False, True):
        run("affine_spatial_pool", x, gate, both, "mean_max", first)
    run("dual_scale_gate", x, dy, gate, pixel, *within, both[1], both, act, 0.01, "mean_max", "mean_max", "split")
    run(
        "dual_scale_apply", x, dy, gate, pixel, *within, both, both[1], index, gate, both, gate, act, 0.01, "mean_max",
        "mean_max", "split",
    )  # fmt: skip
    run("merge_scale_reduce", x, dy, gate, pixel, "sigmoid_product")
    run("merge_scale_apply", dy, residual, gate, pixel, gate, empty((c,), acc), pixel, "sum")
    run("project", x, gate, pixel)


def branch_launches(size, kind, dtype, count=2, n=2, c=64):
    """Every pass over branches: pooled, scaled and merged, and the ways back; in tensors of their own, and in one."""
    acc = F64 if dtype == F64 else F32
    side = SIDES.get(size, size)
    x, dy = empty((n, c, side, side), dtype, kind), empty((n, count * c, side, side), dtype, kind)
    more = [empty(x.shape, dtype, kind) if b < count else None for b in range(1, 8)]
    gate, pooled, inside = empty((n, count, c), acc), empty((n, c), acc), (None,) * 7
    for merge in ("sum", "concat_reversed"):
        d = x if merge == "sum" else dy
        for first, others in ((x, more), (dy, inside)):
            run("branch_scale", first, gate, *others, merge)
            run("branch_scale_reduce", first, d, gate, *others, merge)
            run("branch_scale_apply", first, d, gate, gate if merge != "sum" else pooled, merge)
        run("branch_scale_bwd", x, gate, d, *more, merge)
    run("branch_pool", x, *more, 1, False)
    run("branch_pool", x, *more, 1, True)
    run("branch_pool", dy, *inside, count, False)


def affine_launches(size, kind, dtype, act="relu", n=2, c=64):
    """Every pass of the tails: moments, affine maps and pools of them, and the ways back."""
    acc = F64 if dtype == F64 else F32
    x, dy, residual = (empty((n, c, SIDES.get(size, size), SIDES.get(size, size)), dtype, kind) for _ in range(3))
    v, two, index = empty((n, c), acc), empty((2, n, c), acc), empty((2, n, c), torch.int64)
    aux, how = activations.needs_aux(act, True) and residual, (act, 0.01)
    run("channel_moments", x, False)
    run("channel_moments", x, True)
    run("batch_affine", two, v[0], v[0], 49, 1e-5)
    run("batch_affine_bwd", two, two, two[0], v[0], 49, 1e-5)
    run("affine_apply", x, v, v, v, residual, None, *how)
    run("affine_apply", x, v, v, None, None, v, *how)
    run("affine_apply_bwd", x, dy, v, v, v, aux, None, *how, True)
    run("affine_apply_bwd", x, dy, v, v, v, None, v, *how, False)
    run("moments_affine_reduce", x, dy, v, v, v, aux, *how, True)
    run("moments_affine_reduce", x, dy, v, v, v, None, *how, False)
    run("affine_pool", x, v, v, v, *how)
    run("affine_pool_scale_reduce", x, dy, v, v, v, *how)
    run("moments_affine_apply", x, dy, v, None, v, None, None, v, v, None, None, "identity", 0.0)
    run("moments_affine_apply", x, dy, v, v, v, v, v, v, v, None, None, *how)
    run("moments_affine_apply", x, dy, v, v, v, v, v, v, v, two, index, *how)
    # Branches beside slots of a merged map.
    both, more, whole = empty((n, 2 * c), acc), (x, *(None,) * 6), empty((n, 2 * c, *x.shape[2:]), dtype, kind)
    run("branch_moments", x, *more, "concat_reversed")
    run("branch_affine", x, both, both, both, *more, "concat_reversed", *how)
    run("branch_affine_reduce", x, whole, both, both, both, *more, "concat_reversed", *how)
    run("branch_affine_apply", x, whole, both, both, both, both, both, *more, "concat_reversed", *how)


def plane_launches(size, kind, dtype, act="relu", n=2, c=64):
    """What takes planes, or groups of them, whole."""
    acc, side = F64 if dtype == F64 else F32, SIDES.get(size, size)
    x, dy, residual = (empty((n, c, side, side), dtype, kind) for _ in range(3))
    aux = activations.needs_aux(act, True) and residual
    run("channel_pool", x, "mean_var", "split", False)
    two = empty((2, n, c), acc)
    run("channel_pool_bwd", x, two, two, empty((0,), torch.int64), "mean_var", "split")
    k, groups = max(c // 16, 1), max(c // 8, 1)
    parameters = [empty((1, k, 1, 1), dtype) for _ in range(4)] + [empty((k,), dtype)] * 2
    run("plane_gate_shuffle", x, *parameters, residual, 1e-5, act, 0.01)
    run("plane_gate_shuffle_bwd", x, dy, aux, two, *parameters, act, 0.01, True)
    run("plane_gate_shuffle_bwd", x, dy, None, two, *parameters, act, 0.01, False)
    v, four = empty((n, c), acc), empty((4, n, c), acc)
    run("gate_shuffle", x, v, four, residual, k, act, 0.01)
    run("gate_shuffle_reduce", x, dy, v, four, aux, k, act, 0.01, True)
    run("gate_shuffle_reduce", x, dy, v, four, None, k, act, 0.01, False)
    run("gate_shuffle_apply", x, dy, v, four, v, v, k, "identity", 0.01)
    run("gate_shuffle_apply", x, dy, v, four, v, v, k, act, 0.01)
    weight, state = empty((1, groups, 1, 1), dtype), empty((n * (c + 2 * groups),), acc)
    run("group_similarity_scale", x, weight, weight, residual, 1e-5, act, 0.01)
    run("group_similarity_scale_bwd", x, dy, aux, state, weight, weight, 1e-5, act, 0.01, True)
    run("group_similarity_scale_bwd", x, dy, None, state, weight, weight, 1e-5, act, 0.01, False)
    for hidden in (None, 8):
        w1 = hidden and empty((hidden, 1, 1), dtype)
        b1 = hidden and empty((hidden,), dtype)
        net = (empty((1, hidden or 1, 5), dtype), empty((1,), dtype), w1, b1)
        run("pool_conv_scale", x, *net, residual, "gelu", "sigmoid", 0.01, False, act, 0.01)
        saved = empty((2 * n * c,), acc)
        run("pool_conv_scale_bwd", x, dy, aux, saved, *net, "gelu", "sigmoid", 0.01, False, act, 0.01, True)


def network(c, hidden, dtype, act="relu", norm="none"):
    """The tensors and options of an Mlp."""
    v = lambda: empty((hidden,), dtype)
    normed = (v(), v(), None, None) if norm == "batch" else (None,) * 4
    prelu = v() if act == "prelu" else None
    w1, w2 = empty((hidden, c, 1, 1), dtype), empty((c, hidden, 1, 1), dtype)
    return (w1, v(), w2, empty((c,), dtype), *normed, prelu, None, act, "sigmoid", 0.01, norm, 1e-5)


def mlp_launches(rows, c, hidden, dtype, acts=("relu",), many=1):
    p = empty((many, rows, c), F32 if dtype == BF16 else dtype)
    for act in acts:
        net = network(c, hidden, dtype, act)
        gate, saved = run("shared_mlp", p, *net)
        run("shared_mlp_bwd", p, gate, saved, *net)
    run("shared_mlp", p, *network(c, hidden, dtype, acts[0], "batch"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(caught, target):
    """Each kernel there is, for each target: a new one that the calls here don't reach fails the test."""
    map_launches(49, "planes", BF16)
    run("channel_pool", empty((1, 8, 56, 56), BF16, "pixels"), "mean_max", "first", True)  # split, so merged
    x = empty((1, 8, 56, 56), F32, "pixels")
    run("scale_bwd", x, empty((1, 8), F32), None, None, x, "identity", 0.01, "product", False)
    run("map_scale", x, x, "positions", 1e-5, 0.0)
    mlp_launches(8, 256, 16, F32)
    run("channel_moments", x, True)
    branch_launches(49, "planes", BF16)
    plane_launches(49, "planes", BF16)
    affine_launches(49, "planes", BF16)
    assert {launch.kernel.__name__ for launch in caught} == set(KERNELS), "kernels without a test"
    seen = set()
    for launch in caught:
        if target != "sm_90" and launch.kernel.__name__ in seen:
            continue  # one variant of each will do where the next test looks closer at another target
        seen.add(launch.kernel.__name__)
        assert_lean(launch.kernel.__name__, built(launch, target))


@pytest.mark.parametrize(("size", "kind", "dtype"), [(784, "planes", F32), (49, "pixels", BF16), (13, "planes", F64)])
def test_whole_planes(caught, size, kind, dtype):
    """Kernels that hold planes or groups of them: nothing spills, in either layout, with an expensive activation."""
    plane_launches(size, kind, dtype, act="gelu")
    for launch in caught:
        if "CH" in launch.meta:
            assert_lean(launch.kernel.__name__, built(launch, "sm_90"))


def maps_of(launch):
    """How many feature maps a launch loads and stores at least once."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    # What is pooled or summed, (N, 1 or 2, *S) or in parts (blocks, N, *S), (splits, 2, N, C), is small beside a map.
    pooled = {"mean_ptr", "max_ptr", "dpixel_ptr", "shared_ptr", "sums_ptr", "moments_ptr", "index_ptr", "p_ptr"}
    is_map = lambda name: isinstance(given.get(name), torch.Tensor) and given[name].dim() == 4 and name not in pooled
    outs = {"y_ptr", "dx_ptr", "e_ptr", "dz_ptr", *(f"{name}{b}_ptr" for name in ("y", "dx") for b in range(1, 8))}
    if launch.kernel.__name__ in ("_pool_scale_apply_kernel", "_pixel_apply_kernel"):  # which read e
        outs.remove("e_ptr")
    return sum(is_map(n) for n in given if n not in outs), sum(is_map(n) for n in outs)


def assert_wide(launch, target, what):
    b = built(launch, target)
    assert_lean(what, b)
    loaded, stored = maps_of(launch)
    # Descriptors and gates may be loaded in any width. No map may be, nor anything in 16 bits.
    assert b.loads.get(128, 0) >= loaded, f"{what}: {b.loads} for {loaded} maps"
    assert b.stores.get(128, 0) >= stored, f"{what}: {b.stores} for {stored} maps"
    element = launch.args[0].element_size() * 8 if launch.args[0] is not None else 16
    if element == 16:
        assert 16 not in {*b.loads, *b.stores}, f"{what}: {b.loads} {b.stores}"


# Sums over channels in planes whose rows start inside of a vector: columns of a tile must be pixels, so elements are
# loaded one by one. (kernel, HW, layout, dtype); what is here must be narrow.
NARROW = {
    (kernel, size, "planes", dtype)
    for kernel in ("_pixel_sums_kernel", "_spatial_pool_kernel", "_count_top_kernel")
    for size, dtype in ((49, BF16), (49, F32), (196, BF16))
}


def check_widths(caught, size, kind, dtype, target):
    map_launches(size, kind, dtype)
    branch_launches(size, kind, dtype)
    affine_launches(size, kind, dtype)
    for launch in caught:
        if (launch.kernel.__name__, size, kind, dtype) in NARROW:
            assert launch.meta["V"] == 1, "wide now: take it out of the table"
            assert_lean(launch.kernel.__name__, built(launch, target))
        elif launch.meta.get("V") is not None:
            assert launch.meta["V"] == 16 // dtype.itemsize
            assert_wide(launch, target, f"{launch.kernel.__name__} at HW={size}, {kind}, {dtype}, {target}")


@pytest.mark.parametrize(("size", "kind"), [(49, "planes"), (49, "pixels"), (784, "planes")])
def test_wide_accesses(caught, size, kind):
    check_widths(caught, size, kind, BF16, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", ["planes", "pixels"])
@pytest.mark.parametrize("size", SIDES)
def test_wide_accesses_everywhere(caught, size, kind, dtype, target):
    check_widths(caught, size, kind, dtype, target)


def test_wide_accesses_in_float32(caught):
    """The odd size, in the dtype of training without autocast."""
    x, gate = empty((2, 64, 7, 7), F32), empty((2, 64), F32)
    run("channel_pool", x, "mean", "split", False)
    run("scale", x, gate, empty(x.shape, F32), None, "relu", 0.01, "product")
    run(
        "pool_scale_reduce",
        x,
        empty(x.shape, F32),
        gate,
        empty(x.shape, F32),
        gate,
        "relu",
        0.01,
        "mean",
        "split",
        True,
    )
    for launch in caught:
        assert_wide(launch, "sm_90", launch.kernel.__name__)


def test_a_slice_of_pixels_is_wide_too(caught):
    x = empty((2, 96, 7, 7), BF16, "pixels")[:, 32:]
    run("scale", x, empty((2, 64), F32), None, None, "identity", 0.01, "product")
    assert_wide(caught[0], "sm_90", "a slice")


def test_narrow_accesses_are_seen(caught):
    """The check can fail: 3·49 elements a sample leave no room for vectors."""
    run("scale", empty((2, 3, 7, 7), BF16), empty((2, 3), F32), None, None, "identity", 0.01, "product")
    with pytest.raises(AssertionError, match="maps"):
        assert_wide(caught[0], "sm_90", "a narrow one")


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(caught):
    """Offsets inside a sample are 32 bits where those suffice; samples are 64-bit addresses always."""
    run("scale", empty((40, 1024, 256, 256), BF16), empty((40, 1024), F32), None, None, "identity", 0.01, "product")
    assert not caught.pop().meta["BIG"]
    for c, side in ((1024, 2048), (1, 2**16)):  # many rows, and one that by itself is too long
        map_launches(side, "planes", BF16, n=1, c=c)
        affine_launches(side, "planes", BF16, n=1, c=c)
    for launch in caught:
        if "BIG" in launch.meta:
            assert launch.meta["BIG"]
            assert_wide(launch, "sm_90", f"{launch.kernel.__name__} of a large map")


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_heaviest(caught, dtype):
    """The variants that hold most at once still fit: everything wanted of one pass, an expensive activation."""
    map_launches(49, "planes", dtype, act="gelu")
    for launch in caught[3:6]:
        assert_lean(launch.kernel.__name__, built(launch, "sm_90"))


@pytest.mark.parametrize(
    "target", ["sm_90", "sm_100", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "gfx942"))]
)
@pytest.mark.parametrize(("kind", "dtype"), [("planes", BF16), ("pixels", BF16), ("pixels", F64)], ids=str)
def test_tails(caught, kind, dtype, target):
    """A pixel of channels_last has a value of each channel beside it, and five sums: with GELU they still fit."""
    affine_launches(49, kind, dtype, act="gelu")
    for launch in caught:
        assert_wide(launch, target, f"{launch.kernel.__name__} in {kind}, {dtype}, {target}")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("planes", BF16),
        pytest.param("pixels", BF16, marks=pytest.mark.slow),
        pytest.param("planes", F64, marks=pytest.mark.slow),
    ],
)
def test_eight_branches(caught, kind, dtype):
    """The most branches there may be still fit in registers."""
    branch_launches(49, kind, dtype, count=8)
    for launch in caught:
        assert_lean(launch.kernel.__name__, built(launch, "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
@pytest.mark.parametrize("size", [1, 13])
@pytest.mark.parametrize("kind", ["planes", "pixels"])
def test_odd_sizes(caught, kind, size, dtype, target):
    """Sizes where numbers are 1, and so constants; odd channels."""
    for n, c in ((1, 1), (3, 17)):
        map_launches(size, kind, dtype, "silu", n, c)
        branch_launches(size, kind, dtype, 3, n, c)
        affine_launches(size, kind, dtype, "silu", n, c)
    for launch in caught:
        assert_lean(launch.kernel.__name__, built(launch, target))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("rows", "c", "hidden"), [(1, 1, 1), (1, 64, 4), (8, 2048, 128), (256, 2048, 128)])
def test_networks(caught, rows, c, hidden, dtype, target):
    mlp_launches(rows, c, hidden, dtype, acts=("gelu", "prelu"), many=2)
    for launch in caught:
        assert_lean(launch.kernel.__name__, built(launch, target))
