"""What goes wrong around us: missing or broken tools, full memory, hooks that raise, threads. No process ends by it, no
number changes, and what failed can be tried again."""

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fused_attn import OPS, backend, explain, fuse_, plan, unfuse_
from tests.support import redraw, relative, step
from tests.test_imports import ROOT, USE, python
from tests.test_packaging import needs_compiler, only_wheel, script, setup_py, spoken, tree  # noqa: F401

resnet = pytest.importorskip("timm.models.resnet")
SEModule = pytest.importorskip("timm.layers.squeeze_excite").SEModule
F64 = torch.float64
ELSEWHERE = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "TRITON_CACHE_DIR": "/dev/null/triton",
             "TORCHINDUCTOR_CACHE_DIR": "/dev/null/inductor"}  # fmt: skip


# ---- tools that are broken


@needs_compiler
@pytest.mark.parametrize("home", ["/nonexistent", "/dev/null"])
def test_broken_nvcc(tree: Path, home: str) -> None:  # noqa: F811
    """Nothing is compiled by it, so nothing asks it anything."""
    called = tree.parent / "called"
    nvcc = script(tree.parent / "bin/nvcc", f"touch {called}; exit 1")
    path = os.pathsep.join([str(Path(nvcc).parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    run = setup_py(tree, "-q", "bdist_wheel", FUSED_ATTN_BUILD="require", CUDA_HOME=home, PATH=path)
    assert run.returncode == 0, run.stderr
    assert "built fused_attn._C" in spoken(run)[0]
    assert only_wheel(tree)[0].startswith("fused_attn-0.1.0-cp310-abi3-")
    assert not called.exists()


def broken_triton(folder: Path, code: str) -> str:
    (folder / "triton").mkdir()
    (folder / "triton/__init__.py").write_text(code)
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.parametrize(
    "code",
    ["raise RuntimeError('no driver')", "import nothing_of_this_name", "raise OSError('libcuda.so.1: no such file')"],
)
def test_triton_raises_when_imported(tmp_path: Path, code: str) -> None:
    """Its backend is refused with the reason; where it would have been the first choice, the next one runs."""
    program = (
        USE
        + """
from fused_attn import backend, info
backend.ORDER["cpu"] = ("triton", "eager")
seen = []
with backend.observe(seen.append):
    assert torch.equal(fused_attn.ops.scale(x, gate), x * gate[:, :, None, None])
print(seen[0].backend, "|", seen[0].reason)
try:
    with fused_attn.use_backend("triton"):
        fused_attn.ops.scale(x, gate)
except RuntimeError as problem:
    print(problem)
print(info._triton())
"""
    )
    done = python(program, PYTHONPATH=broken_triton(tmp_path, code), TRITON_INTERPRET="1")
    ran, forced, told = done.stdout.strip().splitlines()
    assert ran.startswith("eager | triton: triton does not load: ")
    assert "backend 'triton' can't run: triton does not load: " in forced
    assert told.startswith("triton does not load: ")


def packaged(folder: Path) -> Path:
    """A copy of the package's Python files; the place for an extension beside them."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "fused_attn", folder / "fused_attn", ignore=ignored)
    return folder / "fused_attn/_C.abi3.so"


def extension() -> Path:
    found = sorted((ROOT / "fused_attn").glob("_C*.so"))
    if not found:
        pytest.skip("the C++ extension is not built")
    return found[0]


def truncated(file: Path, share: float) -> None:
    whole = extension().read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])


def other_torch(file: Path) -> None:
    """Asks for a symbol that this torch doesn't have."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = file.parent / "other.cpp"
    source.write_text('extern "C" int torch_of_another_version(); int f = torch_of_another_version();\n')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(file)], check=True)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: truncated(file, 0.999), id="its last bytes are missing"),
        pytest.param(lambda file: truncated(file, 0.5), id="half of it is missing"),
        pytest.param(lambda file: truncated(file, 0.01), id="nearly all of it is missing"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_bytes(bytes(100_000)), id="zeros"),
        pytest.param(lambda file: file.mkdir(), id="a directory"),
        pytest.param(lambda file: file.symlink_to("/nonexistent"), id="a dangling link"),
        pytest.param(other_torch, id="for another torch"),
    ],
)
def test_damaged_extension(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(packaged(tmp_path))
    code = USE + "from fused_attn import backend; print(backend.extension())"
    done = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("the C++ extension does not load: ")
    assert not done.stderr


def test_extension_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose options are not the op's are not called."""
    if (why := backend.extension()) is not None:
        pytest.skip(why)
    op, other = OPS["scale"], OPS["spatial_pool"]
    changed = SimpleNamespace(name=op.name, alone=None, count=op.count, overload=other.overload)
    assert backend._find(changed, "cpp") == "the C++ extension was built for another version of fused_attn"


def test_nowhere_to_write() -> None:
    """Home and every cache lie where nothing can be made: nothing of ours writes there on the CPU."""
    python(USE, **ELSEWHERE)


def test_triton_without_a_cache_compiles_elsewhere(tmp_path: Path) -> None:
    """Where Triton can't write its cache, it gets a directory of this process, which ends with it."""
    pytest.importorskip("triton")
    code = """
import os, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from fused_attn import OPS, backend
assert not isinstance(backend.implementation(OPS["scale"], "triton"), str)
place = triton.knobs.cache.dir
@triton.jit
def kernel(x_ptr, n: tl.constexpr):
    tl.store(x_ptr, tl.load(x_ptr) + n)
source = triton.compiler.ASTSource(kernel, {"x_ptr": "*fp32", "n": "constexpr"}, {(1,): 3})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert "ptx" in made.asm and any(files for _, _, files in os.walk(place))
print(place)
"""
    file = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, str(file)], env={**os.environ, **ELSEWHERE, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()


# ---- memory


class Net(nn.Module):
    """Two bottlenecks with SE, and a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.Sequential(*(resnet.Bottleneck(24, 6, attn_layer="se") for _ in range(2)))
        self.gate = SEModule(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.blocks(self.stem(x)))


def net() -> nn.Module:
    return redraw(Net()).to(F64).eval()


def images() -> Tensor:
    return torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.fixture
def failing_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the n-th launch from now on run out of memory, after what it computed."""
    run, left = backend.run, [0]

    def launch(*args: object) -> object:
        out = run(*args)
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(backend, "run", launch)
    return lambda n: left.__setitem__(0, n)


def test_out_of_memory_in_any_launch(failing_launch: Callable[[int], None]) -> None:
    """Forward or backward: what was accumulated before stays as it is, and the next step is right."""
    model, original = net(), net()
    fuse_(model)
    truth, grads = step(original, images())
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    state = copy.deepcopy(model.state_dict())
    failed = 0
    for n in range(1, 100):
        failing_launch(n)
        x = images().requires_grad_()
        try:
            torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
        except torch.OutOfMemoryError:
            failed += 1
            failing_launch(0)
            assert all(bool((p.grad == 3).all()) for p in model.parameters())
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            y, again = step(model, images())
            assert relative(y, truth) < 1e-12
            assert all(relative(again[k], g) < 1e-9 for k, g in grads.items())
            continue
        break
    failing_launch(0)
    assert failed == n - 1 > 6
    assert all(line.backend != "unfused" for line in explain(model, images()).lines)


def test_address_space_that_ends() -> None:
    """The allocator itself fails, under a limit that the process gives itself; without it, all is right again."""
    resource = pytest.importorskip("resource")
    assert resource
    code = """
import os, resource, torch, fused_attn
x = torch.randn(16, 64, 128, 128, requires_grad=True)  # 64 MiB
module = fused_attn.SqueezeExcite(64)
module(x[:1]).sum().backward()
truth = torch.autograd.grad(module(x).square().sum(), x)[0].clone()
def used():
    return int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
failed = 0
for spare in range(8, 400, 24):  # MiB: from forward to the end of backward
    resource.setrlimit(resource.RLIMIT_AS, (used() + spare * 2**20, resource.RLIM_INFINITY))
    try:
        torch.autograd.grad(module(x).square().sum(), x)
    except (RuntimeError, MemoryError) as problem:
        # A C++ kernel's own allocation says which call failed, and not that memory is out: PyTorch's stable ABI keeps
        # the reason to itself.
        told = any(word in str(problem) for word in ("memory", "aoti_torch_empty"))
        assert told or isinstance(problem, MemoryError), problem
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    again = torch.autograd.grad(module(x).square().sum(), x)[0]
    assert torch.equal(again, truth)
    del again
print(failed)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's limit on the address space")
    assert int(python(code).stdout) >= 3


def test_out_of_memory_in_any_step_of_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """fuse_ changes all modules or none, wherever it fails."""
    model, truth = net(), step(net(), images())
    classes = [type(m) for m in model.modules()]
    real = plan.Plan.seal
    for n in range(1, 100):
        calls = [0]

        def failing(self: plan.Plan, module: nn.Module, n: int = n, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == n:
                raise MemoryError
            real(self, module)

        monkeypatch.setattr(plan.Plan, "seal", failing)
        try:
            fuse_(model)
            break
        except MemoryError:
            monkeypatch.setattr(plan.Plan, "seal", real)
            assert [type(m) for m in model.modules()] == classes
            assert not any(plan.KEY in vars(m) for m in model.modules())
            assert torch.equal(step(model, images())[0], truth[0])
    assert n > 6
    assert relative(step(model, images())[0], truth[0]) < 1e-12


# ---- hooks that raise


class Problem(Exception):
    """A hook's own."""


def problem(*args: object) -> None:
    raise Problem


PLACES = ["", "blocks.0", "blocks.0.bn3", "blocks.1.se", "blocks.1.se.fc1", "gate"]
# Full backward hooks don't go together with what the blocks' own forward does in place, fused or not.
BACKWARD = ["", "blocks.1.se.fc1", "gate"]


@pytest.mark.parametrize(
    ("register", "where"),
    [
        *(("register_forward_hook", where) for where in PLACES),
        *(("register_forward_pre_hook", where) for where in PLACES),
        *(("register_full_backward_hook", where) for where in BACKWARD),
    ],
)
def test_hook_that_raises(register: str, where: str) -> None:
    """Its exception reaches the caller; once it is gone, everything runs fused again, with the same numbers: by a plan
    made anew, which may leave a norm to itself."""
    model = net()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    fuse_(model)
    y, grads = step(model, images())
    handle = getattr(model.get_submodule(where), register)(problem)
    with pytest.raises(Problem):
        step(model, images())
    handle.remove()
    again, grads_again = step(model, images())
    assert relative(again, y) < 1e-14
    assert all(relative(grads_again[k], g) < 1e-12 for k, g in grads.items())
    assert all(line.backend != "unfused" for line in explain(model, images()).lines)


def test_hook_of_a_tensor_that_raises_in_backward() -> None:
    model = net()
    fuse_(model)
    y, grads = step(model, images())
    kept = []

    def raising(module: nn.Module, args: object, out: Tensor) -> None:
        kept.append(out.register_hook(problem))

    with model.blocks[0].register_forward_hook(raising), pytest.raises(Problem):
        step(model, images())
    assert kept
    again, grads_again = step(model, images())
    assert torch.equal(y, again)
    assert all(torch.equal(g, grads_again[k]) for k, g in grads.items())


# ---- threads


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_converted_while_another_thread_runs_it(gradients: bool) -> None:
    """Each call is right, fused or not, or half of each; no thread raises, and unfused means unfused."""
    model = net()
    x = images()
    truth, grads = step(model, x)
    classes = [type(m) for m in model.modules()]
    done, problems, calls = threading.Event(), [], [0]

    def run() -> None:
        try:
            while not done.is_set():
                if gradients:
                    y, found = step(model, x)
                    assert all(relative(found[k], g) < 1e-9 for k, g in grads.items())
                else:
                    with torch.no_grad():
                        y = model(x)
                assert relative(y, truth) < 1e-12
                calls[0] += 1
        except BaseException as problem:
            problems.append(problem)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=run)
    try:
        thread.start()
        while (calls[0] < 150) and thread.is_alive():
            fuse_(model)
            unfuse_(model)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    if problems:
        raise problems[0]
    assert [type(m) for m in model.modules()] == classes
    assert not any(plan.KEY in vars(m) for m in model.modules())
    assert not fuse_(model).refused
    assert relative(step(model, x)[0], truth) < 1e-12
