"""What runs a module in another way: tracers, modes, torch.func, autocast, checkpoints, threads, derivatives of
derivatives. Over everything public, each against the plain call.

In `make test` one case of each op and block, because each takes a few hundredths of a second; all cases under `slow`.
"""

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import BLOCKS, SqueezeExcite, ops, testing
from tests.composition.subjects import ALL, F64, FEW, Subject, over, run, same

BATCH = 5
CONVOLVING = {"bam", "pyramid_squeeze", "residual_attention", "selective_kernel", "split_attention"}


def test_everything_public_is_here() -> None:
    assert set(ALL) == set(ops.__all__) | set(BLOCKS)


def pair(subject: Subject, dtype: torch.dtype = F64, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """The module and its twin, which is called plainly."""
    module = subject.module(dtype).train(training)
    return module, copy.deepcopy(module)


def agrees(subject: Subject, found: Callable[..., Tensor], parameters: list[Tensor], plain: nn.Module) -> None:
    """Outputs and gradients for a batch of another size than the one that was traced."""
    maps = subject.maps(batch=BATCH)
    same(run(found, maps, parameters), run(plain, maps, [*plain.parameters()]))


def named(module: nn.Module, plain: nn.Module, prefix: str = "") -> list[Tensor]:
    """Parameters in the order of the plain module's."""
    own = dict(module.named_parameters())
    return [own[prefix + name] for name, _ in plain.named_parameters()]


# ---- tracers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@over()
def test_jit_trace(subject: Subject, tmp_path) -> None:
    module, plain = pair(subject)
    traced = torch.jit.trace(module, subject.maps())
    torch.jit.save(traced, tmp_path / "traced.pt")
    for each in (traced, torch.jit.load(tmp_path / "traced.pt")):
        agrees(subject, each, named(each, plain), plain)


class Within(nn.Module):
    """A module around another, as a leaf needs; with as many arguments as it has maps, for torch.fx to see them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def within(inner: nn.Module, count: int) -> nn.Module:
    letters = ", ".join("abcdefghi"[:count])
    scope: dict[str, Callable[..., Tensor]] = {}
    exec(f"def forward(self, {letters}):\n    return self.inner({letters})", scope)
    return type("Within", (Within,), {"forward": scope["forward"]})(inner)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@over()
def test_symbolic_trace(subject: Subject, training: bool) -> None:
    """Our modules are leaves, and go on learning running statistics in the graph."""
    module, plain = pair(subject, training=training)
    before = copy.deepcopy(module.state_dict())
    graph = torch.fx.symbolic_trace(within(module, len(subject.shapes)))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    agrees(subject, graph, named(graph, plain, "inner."), plain)
    buffers = dict(graph.named_buffers())
    for name, buffer in plain.named_buffers():
        if f"inner.{name}" in buffers:
            torch.testing.assert_close(buffers[f"inner.{name}"], buffer)


def test_a_leaf_is_the_module() -> None:
    """train, eval, state_dict and hooks reach what a graph calls."""
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), SqueezeExcite(8), nn.ReLU()))
    assert [(n.op, n.target) for n in graph.graph.nodes if n.op == "call_module"] == [
        ("call_module", "0"), ("call_module", "1"), ("call_module", "2"),
    ]  # fmt: skip
    assert type(graph.get_submodule("1")) is SqueezeExcite


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_feature_extraction(training: bool) -> None:
    """torchvision's, whose nodes are named after modules: a gate of ours, and what stands around it."""
    pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    module = nn.Sequential(nn.Conv2d(3, 8, 1), SqueezeExcite(8), nn.ReLU()).to(F64).train(training)
    x = torch.randn(2, 3, 5, 5, dtype=F64)
    found = create_feature_extractor(module, ["0", "1", "2"])(x)
    expected = module[0](x)
    for name, layer in (("0", None), ("1", module[1]), ("2", module[2])):
        expected = expected if layer is None else layer(expected)
        torch.testing.assert_close(found[name], expected)


# ---- modes and devices


@over()
def test_flop_counter(subject: Subject) -> None:
    """Counts what is left to count, and changes nothing."""
    module, plain = pair(subject)
    maps = [x.requires_grad_() for x in subject.maps()]
    with FlopCounterMode(display=False) as counter:
        y = module(*maps)
        y.backward(torch.ones_like(y))
    wanted = [x.detach().requires_grad_() for x in maps]
    z = plain(*wanted)
    z.backward(torch.ones_like(z))
    assert counter.get_total_flops() >= 0
    same((y.detach(), [x.grad for x in maps]), (z.detach(), [x.grad for x in wanted]))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@over()
def test_meta_device(subject: Subject, training: bool) -> None:
    """Shapes, dtypes and strides without numbers, of gradients as well."""
    module, plain = pair(subject, torch.float32, training)
    maps, expected = subject.maps(torch.float32), plain(*subject.maps(torch.float32))
    module.to("meta")
    maps = [x.to("meta").requires_grad_() for x in maps]
    y = module(*maps)
    y.sum().backward()
    assert (y.device.type, y.shape, y.dtype, y.stride()) == (
        "meta", expected.shape, expected.dtype, expected.stride(),
    )  # fmt: skip
    assert all(x.grad is None or (x.grad.is_meta and x.grad.shape == x.shape) for x in maps)
    assert maps[0].grad is not None


# ---- torch.func


@over()
def test_vmap_of_grad(subject: Subject) -> None:
    """The gradients of every sample (of every batch of batches), by vmap, grad and functional_call together."""
    module, plain = pair(subject)
    maps = [torch.stack([x, 2 * x, x / 2]) for x in subject.maps()]
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], *maps: Tensor) -> tuple[Tensor, Tensor]:
        y = functional_call(module, (parameters, buffers), maps)
        return y.square().sum(), y

    each = torch.func.grad(loss, argnums=tuple(range(1 + len(maps))), has_aux=True)
    grads, y = torch.func.vmap(each, in_dims=(None, *(0,) * len(maps)))(parameters, *maps)
    for i in range(3):
        leaves = [x[i].detach().clone().requires_grad_() for x in maps]
        z = plain(*leaves)
        wanted = torch.autograd.grad(z.square().sum(), [*plain.parameters(), *leaves], allow_unused=True)
        same((y[i], [g[i] for g in (*grads[0].values(), *grads[1:])]), (z.detach(), list(wanted)))


@over()
def test_forward_mode_raises(subject: Subject) -> None:
    """By both ways in; a tangent that is silently 0 would be the worst answer."""
    module, _ = pair(subject)
    maps = subject.maps()
    with pytest.raises(RuntimeError, match=r"fused_attn\.\w+: forward-mode differentiation"):
        torch.func.jvp(module, maps, maps)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"fused_attn\.\w+: forward-mode differentiation"),
    ):
        module(*[torch.autograd.forward_ad.make_dual(x, x) for x in maps])


# ---- second derivatives

SECOND = r"fused_attn\.\w+: a second derivative"


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "quadratic"])
@over()
def test_second_derivative_raises(subject: Subject, loss: Callable[[Tensor], Tensor]) -> None:
    """However it is asked for, of whatever gradient, and where the incoming one is a constant: never 0, never None,
    unless it is 0."""
    module, plain = pair(subject)
    leaves = [x.requires_grad_() for x in subject.maps()] + [*module.parameters()]
    count = len(subject.shapes)
    y = module(*leaves[:count])
    first = torch.autograd.grad(loss(y), leaves, create_graph=True, allow_unused=True)
    elsewhere = [2 * x.detach() for x in leaves[:1]] + [x.detach() for x in leaves[1:count]]
    other = [x.requires_grad_() for x in elsewhere] + [*plain.parameters()]
    moved = torch.autograd.grad(loss(plain(*other[:count])), other, allow_unused=True)
    for g, h in ((g, h) for g, h in zip(first, moved, strict=True) if g is not None):
        if not torch.equal(g, h):  # it depends on the first map
            with pytest.raises(RuntimeError, match=SECOND):
                torch.autograd.grad(g.sum(), leaves[0], retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=SECOND):
            g.square().sum().backward(retain_graph=True)


@over()
def test_second_derivative_by_torch_func(subject: Subject) -> None:
    """Right, where a backward is made of differentiable parts, or an error that names the op."""
    module, _ = pair(subject)
    maps = subject.maps()
    value = lambda t: module(*[x * t for x in maps]).square().sum()
    slope = torch.func.grad(value)
    one, h = torch.ones((), dtype=F64), 1e-5
    try:
        found = torch.func.grad(slope)(one)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=SECOND):
            torch.func.grad(slope)(one)
        return
    expected = (slope(one + h) - slope(one - h)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over()
def test_autocast(subject: Subject, dtype: torch.dtype) -> None:
    """float32 maps and weights: the output keeps x's dtype unless a convolution before it gave another, gradients keep
    their tensors', and the error is what the half type allows."""
    module, plain = pair(subject, torch.float32)
    maps = subject.maps(torch.float32)
    with torch.autocast("cpu", dtype):
        y, grads = run(module, maps, [*module.parameters()])
    name = subject.name.partition("-")[0]
    assert y.dtype == (dtype if name in CONVOLVING - {"bam", "residual_attention"} else torch.float32)
    for tensor, grad in zip([*maps, *module.parameters()], grads, strict=True):
        assert grad is None or grad.dtype == tensor.dtype
        assert grad is None or grad.isfinite().all()
    want, _ = run(plain.double(), [x.double() for x in maps], [*plain.parameters()])
    assert testing.error(y, want) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over()
def test_half_maps_beside_float32_weights(subject: Subject, dtype: torch.dtype) -> None:
    """Without autocast. A block that convolves maps raises as PyTorch's convolution does."""
    module, plain = pair(subject, torch.float32)
    maps = subject.maps(dtype)
    convolutions = [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if subject.name.partition("-")[0] in CONVOLVING and convolutions:
        with pytest.raises(RuntimeError, match="should be the same"):
            module(*maps)
        return
    y, grads = run(module, maps, [*module.parameters()])
    want, wanted = run(plain.double(), [x.double() for x in maps], [*plain.parameters()])
    assert y.dtype in (dtype, torch.float32)
    assert [None if g is None else g.dtype for g in grads] == [
        None if g is None else t.dtype for g, t in zip(grads, [*maps, *module.parameters()], strict=True)
    ]
    assert testing.error(y, want) < 16 * torch.finfo(dtype).eps
    assert all(g is None or testing.error(g, w, 1.0) < 64 * torch.finfo(dtype).eps
               for g, w in zip(grads, wanted, strict=True))  # fmt: skip


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("subject", [s for s in FEW if s.name.partition("-")[0] in BLOCKS], ids=str)
def test_grad_scaler(subject: Subject, overflow: bool) -> None:
    """A step under autocast and a loss scale moves the weights as one without; an overflow is seen, and skips it."""
    module, plain = pair(subject, torch.float32)
    if not [*module.parameters()]:
        pytest.skip("has no parameters")
    before = copy.deepcopy(module.state_dict())
    for model, scale in ((module, 1024.0), (plain, 1.0)):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=model is module)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*subject.maps(torch.float32)).float().square().mean()
        scaler.scale(loss * (torch.inf if overflow and model is module else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert scaler.get_scale() == scale / 2
            assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
            return
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---- recomputation, determinism, threads


@pytest.mark.parametrize("reentrant", [False, True])
@over()
def test_checkpoint(subject: Subject, reentrant: bool) -> None:
    module, plain = pair(subject, training=True)
    if reentrant:  # which has no `allow_unused`, and whose gradients are those of a whole backward
        leaves = [x.requires_grad_() for x in subject.maps()]
        wanted = [x.detach().clone().requires_grad_() for x in leaves]
        y, z = checkpoint(module, *leaves, use_reentrant=True), plain(*wanted)
        y.square().sum().backward()
        z.square().sum().backward()
        pairs = [(t.grad for t in (*ls, *m.parameters())) for ls, m in ((leaves, module), (wanted, plain))]
        same((y.detach(), list(pairs[0])), (z.detach(), list(pairs[1])))
    else:
        maps = subject.maps()
        found = run(functools.partial(checkpoint, module, use_reentrant=False), maps, [*module.parameters()])
        same(found, run(plain, maps, [*plain.parameters()]))


@over()
def test_deterministic_algorithms(subject: Subject) -> None:
    """Nothing of ours raises, warns, or changes a bit; memory that isn't initialised is filled with NaN."""
    module, plain = pair(subject)
    maps = subject.maps()
    expected = run(plain, maps, [*plain.parameters()])
    torch.use_deterministic_algorithms(True)
    try:
        y, grads = run(module, maps, [*module.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert testing.identical(y, expected[0])
    pairs = zip(grads, expected[1], strict=True)
    assert all((a is None and b is None) or testing.identical(a, b) for a, b in pairs)


@over()
def test_threads_at_once(subject: Subject) -> None:
    """Four threads call one module, forward and backward, each with maps of its own."""
    module, plain = pair(subject)
    wanted = [run(plain, subject.maps(seed=i), [*plain.parameters()]) for i in range(4)]
    found: dict[int, tuple] = {}
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        for _ in range(3):
            found[i] = run(module, subject.maps(seed=i), [*module.parameters()])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        same(found[i], wanted[i])
