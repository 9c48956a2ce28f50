"""Counts passes over feature maps, by machine: reads and writes in units of one map, whoever makes them.

    aten      `counting(numel)`: a dispatch mode that looks at every ATen operator: views are free, an expanded tensor
              counts by the storage it has, a reduction reads once. What libraries read twice internally counts once, so
              this is a lower bound of eager, which is what it is compared with.
    compiled  `counted(requests)`: the extension built once more with -DFUSED_ATTN_COUNT, where the kernels' accessors
              count, in a process of its own (it registers the same names as the usual build). ATen operators that run
              around the kernels (copies of gradients, say) are added by the dispatch mode.

As a program: `python passes.py LIBRARY` reads requests as JSON from stdin and writes counts as JSON.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
# These make memory, and touch none of it.
ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize")
FILL = ("zero_", "fill_", "copy_", "normal_", "uniform_")  # write without reading what was there


@dataclass
class Passes:
    """Elements read and written, in feature maps."""

    reads: float = 0
    writes: float = 0

    @property
    def total(self) -> float:
        """Both together."""
        return self.reads + self.writes


class counting(TorchDispatchMode):
    """Counts what ATen operators read and write inside the block, of tensors no smaller than `share` of a map."""

    def __init__(self, numel, share=0.2):
        super().__init__()
        self.numel, self.share, self.passes, self.log = numel, share, Passes(), []

    def __enter__(self):
        super().__enter__()
        return self

    def size(self, tensor):
        """In feature maps, by the elements that exist: an expanded dimension has one."""
        real = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
        return real / self.numel if real >= self.share * self.numel else 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not name.startswith("aten::"):
            return out
        name = name.removeprefix("aten::")
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        stores = {t.untyped_storage().data_ptr() for t in inputs}
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        ]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in stores]
        if (not fresh and not written) or name.split(".")[0] in ALLOCATE:
            return out  # a view
        skipped = {id(t) for t in written} if name in FILL else set()
        if name.endswith("_like") or name.startswith("new_"):  # they take a shape
            skipped = {id(t) for t in inputs}
        reads = sum(self.size(t) for t in inputs if id(t) not in skipped)
        writes = sum(self.size(t) for t in [*fresh, *written])
        if reads or writes:
            self.log.append(f"{name}: {reads:g} R, {writes:g} W")
        self.passes.reads += reads
        self.passes.writes += writes
        return out


def counting_extension():
    """Builds the counting extension by setup.py, so with the flags of the usual build, and returns its path.

    It is kept in build/, under a name that changes with the sources. Raises RuntimeError where it doesn't build.
    """
    sources = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / f"counting-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # test processes beside each other build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := sorted(folder.glob("lib/**/_C*.so"))):
            for stale in folder.parent.glob("counting-*"):
                if stale != folder:
                    shutil.rmtree(stale, ignore_errors=True)
            _build(folder)
            found = sorted(folder.glob("lib/**/_C*.so"))
    return found[0]


def _build(folder):
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    # A copy: setup.py works in the directory that it lies in, and writes its object files there.
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "pyproject.toml", source)
    # What is counted depends neither on the optimiser nor on the instruction set, and one of them compiles in a
    # third of the time of three.
    (source / "setup.py").write_text((ROOT / "setup.py").read_text().replace('"-O2"', '"-O1"'))
    (source / "csrc" / "isa.h").write_text((ROOT / "csrc" / "isa.h").read_text().replace("defined(__x86_64__)", "0"))
    (source / "README.md").touch()
    (source / "LICENSE").touch()
    (source / "fused_attn").mkdir()
    (source / "fused_attn" / "__init__.py").write_text('__version__ = "0"\n')
    env = {
        **os.environ,
        "FUSED_ATTN_BUILD": "require",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} -DFUSED_ATTN_COUNT",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=1200)
    if done.returncode or not list(folder.glob("lib/**/_C*.so")):
        raise RuntimeError(f"the counting extension does not build:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def counted(library, requests):
    """Runs requests (see `_serve`) against the counting extension in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(library)],
        input=json.dumps(requests),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout)


def _serve(library, requests):
    """Each request names an op, the number of a case or arguments, a dtype, the layouts of inputs and gradient; with
    `around`, `branch_softmax` is called on the branches of `branch_scale`, pooled each or their sum; with `tail`, what
    owns a normalisation and the gate behind it, on the arguments of `affine_apply`; with `ahead`, what owns branches, a
    gate and a norm behind it, with this activation, on those of `branch_scale`; with `normed`, what owns a norm and
    shuffle attention behind it, on those of `plane_gate_shuffle`.

    Answers, for each, in passes: "inference", "forward", "backward" end to end, and "launches" as
    [op, reads, writes, budget]; "aten" lists what ran around the kernels.
    """
    import fused_attn
    from fused_attn import backend, testing
    from fused_attn.registry import case

    torch.ops.load_library(library)
    backend._extension[:] = [None]  # there it is: nothing else is to be loaded
    cpp = torch.ops.fused_attn_cpp
    launches = []
    run = backend.run

    def measured(self, args, infer, *given):
        before = cpp._count_read(), cpp._count_write()
        outs = run(self, args, infer, *given)
        x = args[0]
        units = [
            (now - then) / x.numel() for now, then in zip((cpp._count_read(), cpp._count_write()), before, strict=True)
        ]
        launches.append([self.name, *units, list(self.budget(*args)) if self.budget else None])
        return outs

    backend.run = measured
    answers = []
    for request in requests:
        op = fused_attn.OPS[request["op"]]
        call = (
            _around_branches(request["around"]) if "around" in request
            else _ahead(request["ahead"]) if "ahead" in request
            else _normed_planes if "normed" in request
            else _tail(request["tail"]) if "tail" in request
            else op
        )  # fmt: skip
        described = op.cases[request["case"]] if "case" in request else case(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in request["args"].items()}
        )  # fmt: skip
        dtype = getattr(torch, request.get("dtype", "float32"))
        args = testing.draw(described, op, dtype, layout=request.get("layout", "contiguous"))
        launches.clear()
        answer = {}
        with fused_attn.use_backend("cpp"):
            numel = args[0].numel()
            cpp._count_reset()
            for _ in range(request.get("repeat", 1)):
                call(*args)
            answer["inference"] = asdict(_total(cpp, numel, Passes()))
            if op.formula is None:  # half of a backward: there is no gradient of it
                answers.append(answer)
                continue
            leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            cpp._count_reset()
            out = call(*leaves)
            y = out[0] if isinstance(out, tuple) else out
            answer["forward"] = asdict(_total(cpp, numel, Passes()))
            dy = testing.cotangent(y, request.get("gradient", request.get("layout", "contiguous")))
            cpp._count_reset()
            wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
            with _around(numel) as mode:
                torch.autograd.grad(y, wanted, dy, allow_unused=True)
            answer["backward"] = asdict(_total(cpp, numel, mode.passes))
            answer["aten"] = mode.log
        answer["launches"] = [list(entry) for entry in launches]
        answers.append(answer)
    return answers


def _around_branches(each):
    """`branch_softmax` in the place of `branch_scale`: its gate's shape counts, and an excite of no size."""
    from fused_attn import ops

    def call(x, gate, *rest):
        *more, merge = rest
        maps = [x, *(t for t in more if t is not None)]
        splits = gate.shape[1] if len(maps) == 1 else 1
        excite = (lambda p: p) if each else lambda p: p.repeat(1, gate.shape[1])
        return ops.branch_softmax(*maps, excite=excite, splits=splits, each=each, merge=merge)

    return call


def _ahead(act):
    """`branch_moments_affine` in the place of `branch_scale`, with an excite of no size that uses all it gets."""
    from fused_attn import ops

    def call(x, gate, *rest):
        *more, merge = rest
        maps = [x, *(t for t in more if t is not None)]
        excite = lambda moments, gate: torch.stack([gate.flatten(1) * (1 + moments[1]).rsqrt(), moments[0]])
        return ops.branch_moments_affine(*maps, excite=excite, params=(gate,), merge=merge, act=act)

    return call


def _normed_planes(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, eps, act, slope):
    """`moments_gate_shuffle` in the place of `plane_gate_shuffle`, with an excite of no size that uses all it gets."""
    from fused_attn import ops

    def excite(moments, weight):
        scale = (1 + moments[1]).rsqrt()
        return torch.stack([scale, moments[0], scale * weight.mean(), moments[0]])

    return ops.moments_gate_shuffle(x, excite, cweight, k=cweight.numel(), residual=residual, act=act)


def _tail(what):
    """`moments_affine` or `affine_pool_scale` in the place of `affine_apply`, with norms and gates of no size that use
    all they get."""
    from fused_attn import ops

    def norm(moments, scale, shift):
        mean, m2 = moments
        return torch.stack([scale * (1 + m2).rsqrt(), shift + mean])

    def extreme(moments, scale, shift):
        _mean, m2, largest, smallest = moments
        return torch.stack([scale * (1 + m2).rsqrt(), shift + largest * smallest])

    def call(x, scale, shift, centre, residual, gate, act, slope):
        if what == "moments_affine":
            return ops.moments_affine(x, norm, scale, shift, residual=residual, act=act)
        if what == "moments_affine, extrema":
            return ops.moments_affine(x, extreme, scale, shift, descriptor="extrema", residual=residual, act=act)
        if what == "affine_pool_scale":
            return ops.affine_pool_scale(x, norm, torch.sigmoid, [scale, shift], act=act)
        kept = lambda *both: torch.stack(both)
        return ops.affine_pool_scale(x, kept, torch.sigmoid, [scale, shift], moments=False, act=act)

    return call


class _around(counting):
    """The dispatch mode, with the ops none the wiser: they take the path they take without it."""

    def __enter__(self):
        from fused_attn import autograd

        self.plain = autograd._len_torch_dispatch_stack
        autograd._len_torch_dispatch_stack = lambda: 0
        return super().__enter__()

    def __exit__(self, *problem):
        from fused_attn import autograd

        autograd._len_torch_dispatch_stack = self.plain
        return super().__exit__(*problem)


def _total(cpp, numel, aten):
    return Passes(cpp._count_read() / numel + aten.reads, cpp._count_write() / numel + aten.writes)


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1], json.load(sys.stdin))))
