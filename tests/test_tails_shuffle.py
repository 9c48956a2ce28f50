"""BatchNorm, shuffle attention, shortcut and ReLU as one, against the unfused modules in float64."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from support import redraw, relative
from test_tail_ops import BACKENDS, EPS, batch_norm, compare, maps
from torch import Tensor, nn

from fused_attn import ShuffleAttention, explain, fuse_, models, ops, unfuse_, use_backend
from fused_attn.blocks import normed
from fused_attn.blocks.chain import Tail, joined, tail_rule
from fused_attn.plan import RULES, by_structure, fingerprint, rule_of

F64 = torch.float64
ACTS = {"identity": lambda t: t, "relu": F.relu, "silu": F.silu, "relu6": F.relu6}
GROUP_EPS = 1e-5
C = 16


def attend(u, k, cw, cb, sw, sb, nw, nb):
    """Shuffle attention, group by group and channel by channel, as the paper's equations have it."""
    out = [torch.empty(0)] * u.shape[1]
    for c in range(u.shape[1]):
        plane, i = u[:, c], c % k
        mean = plane.flatten(1).mean(1).reshape(-1, *(1,) * (plane.dim() - 1))
        if c % (2 * k) < k:
            out[c] = plane * torch.sigmoid(cw[i] * mean + cb[i])
        else:
            var = (plane - mean).square().flatten(1).mean(1).reshape(mean.shape)
            normal = (plane - mean) / (var + GROUP_EPS).sqrt()
            out[c] = plane * torch.sigmoid(sw[i] * (nw[i] * normal + nb[i]) + sb[i])
    half = len(out) // 2
    return torch.stack([out[d // 2 + half * (d % 2)] for d in range(len(out))], 1)


def tail(x, residual, act, k, weight, bias, *weights):
    v = attend(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS), k, *weights)
    return ACTS[act](v if residual is None else v + residual)


def excited(size, k):
    """An excite of `moments_gate_shuffle`: BatchNorm, and the logits of shuffle attention behind it."""

    def excite(moments, weight, bias, cw, cb, sw, sb, nw, nb):
        a, z, statistics = batch_norm(*moments, weight, bias, size)
        rstd = (a.square() * moments[1] / size + GROUP_EPS).rsqrt()
        groups = z.shape[1] // (2 * k)
        wide = lambda first, second: torch.stack([first, second]).expand(groups, 2, k).reshape(-1)
        zero, one = torch.zeros_like(cw), torch.ones_like(cw)
        steep = wide(zero, sw * nw) * rstd * a
        offset = wide(cw, zero) * z + wide(cb, sw * nb + sb) * wide(one, one)
        return torch.stack([a.expand_as(z), z, steep, offset]), statistics

    return excite


def parameters(c, k, dtype=F64):
    g = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randn(n, generator=g, dtype=F64).to(dtype).requires_grad_()
    return [draw(c), draw(c), *(draw(k) for _ in range(6))]


SHAPES = [((2, 12, 7, 7), 3), ((3, 32, 14, 14), 4), ((4, 34, 13), 17), ((2, 8, 3, 4, 5), 1), ((3, 20, 2, 2), 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_gate_shuffle(backend, with_residual, act, layout, dtype):
    for shape, k in SHAPES:
        x, residual = maps(shape, dtype, layout)
        residual = residual if with_residual else None
        weights = parameters(shape[1], k)
        wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual)]
        want = tail(*wide, act, k, *weights)
        dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=F64).to(dtype)
        leaves = [t for t in wide if t is not None]
        true = torch.autograd.grad(want, [*leaves, *weights], dy.double())
        own = [w.detach().to(F64 if dtype == F64 else torch.float32).requires_grad_() for w in weights]
        with use_backend(backend):
            y, statistics = ops.moments_gate_shuffle(
                x, excited(x[0, 0].numel(), k), *own, k=k, residual=residual, act=act
            )
            found = torch.autograd.grad(y, [t for t in (x, residual) if t is not None] + own, dy)
        assert statistics.shape == (2, shape[1])
        assert y.stride() == torch.empty_like(x).stride()
        assert found[0].stride() == torch.empty_like(x).stride()
        compare([y], [want], dtype, 100)
        if dtype != torch.bfloat16 or act in ("identity", "silu"):  # else its mask is read off rounded numbers
            compare(found[: len(leaves)], true[: len(leaves)], dtype, 800)
            compare([g.double() for g in found[len(leaves) :]], true[len(leaves) :], F64,
                    2e3 * torch.finfo(dtype).eps / 2e-16)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_maps_and_gradients(backend):
    """x a slice of a larger map; gradients that are expanded or of the other layout."""
    g = torch.Generator().manual_seed(1)
    large = torch.randn(3, 20, 6, 5, generator=g, dtype=F64).requires_grad_()
    short = torch.randn(3, 16, 6, 5, generator=g, dtype=F64).to(memory_format=torch.channels_last).requires_grad_()
    weights, dy = parameters(16, 2), torch.randn(1, 16, 1, 1, generator=g, dtype=F64).expand(3, 16, 6, 5)
    for grad in (dy, dy.contiguous(memory_format=torch.channels_last)):
        results = []
        for ours in (True, False):
            x = large[:, 3:19]
            with use_backend(backend if ours else "auto"):
                if ours:
                    how = dict(k=2, residual=short.contiguous(), act="silu")
                    y, _ = ops.moments_gate_shuffle(x, excited(30, 2), *weights, **how)
                else:
                    y = tail(x, short, "silu", 2, *weights)
                results.append([y, *torch.autograd.grad(y, [large, short, *weights], grad)])
        compare(*results, F64, 2e3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend):
    """Mean 1e3 and deviation 1e-2 in float32: the norm and the gate's own norm keep their digits."""
    x = maps((4, 8, 28, 28), torch.float32, "contiguous", 1, 1e-2, 1e3)[0].detach()
    weights = [w.detach() for w in parameters(8, 2)]
    want = tail(x.double(), None, "identity", 2, *weights)
    with use_backend(backend):
        y, _ = ops.moments_gate_shuffle(x, excited(784, 2), *(w.float() for w in weights), k=2)
    assert (y.double() - want).abs().max() <= 2e-2 * want.abs().max()


def test_gradcheck():
    """Through the batch's statistics and the planes' own, in float64, by finite differences."""
    x, residual = maps((3, 4, 3, 2), F64, "contiguous")
    f = lambda x, r, *w: ops.moments_gate_shuffle(x, excited(6, 1), *w, k=1, residual=r, act="silu")[0]
    assert torch.autograd.gradcheck(f, (x, residual, *parameters(4, 1)))


def test_parts_are_the_whole():
    """What can't look into an autograd.Function gets the parts; a second derivative is refused in words."""
    x, residual = maps((2, 8, 5, 5), F64, "contiguous")
    residual, weights = residual.detach(), [w.detach() for w in parameters(8, 2)]
    f = lambda x: ops.moments_gate_shuffle(x, excited(25, 2), *weights, k=2, residual=residual, act="relu")[0]
    whole = f(x)
    dx = torch.autograd.grad(whole.square().sum(), x)[0]
    assert torch.allclose(torch.func.grad(lambda x: f(x).square().sum())(x.detach()), dx)
    assert torch.allclose(torch.vmap(f)(x.detach().unsqueeze(0))[0], whole)
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_threads_and_runs():
    """The same bits whatever the number of threads, and twice."""
    for layout in ("contiguous", "channels_last"):
        x, residual = maps((3, 32, 20, 19), torch.float32, layout)
        weights, seen = parameters(32, 4, torch.float32), []
        for threads in (1, 1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            y, _ = ops.moments_gate_shuffle(x, excited(380, 4), *weights, k=4, residual=residual, act="relu")
            seen.append([y, *torch.autograd.grad(y, [x, residual, *weights], torch.ones_like(y))])
            torch.set_num_threads(before)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_empty_batch():
    for backend in BACKENDS:
        x = torch.zeros(0, 8, 5, 5).requires_grad_()
        with use_backend(backend):
            y = ops.moments_gate_shuffle(x, lambda m: torch.cat([m, m]), k=2, act="relu")
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 8, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (dict(x=torch.zeros(2, 8)), ValueError, "x must"),
        (dict(k=3), ValueError, "k must be"),
        (dict(act="tanh"), ValueError, "act must be"),
        (dict(residual=torch.zeros(2, 8, 4, 5)), ValueError, "residual"),
        (dict(excite=3), TypeError, "excite must be callable"),
        (dict(excite=lambda m: m), ValueError, "excite's gate must have shape"),
    ],
)
def test_errors(change, error, told):
    arguments = dict(x=torch.zeros(2, 8, 4, 4), excite=lambda m: torch.cat([m, m]), k=2) | change
    with pytest.raises(error, match=told):
        ops.moments_gate_shuffle(arguments.pop("x"), arguments.pop("excite"), **arguments)


# ---- the block: SA-Net's bottleneck


class sa_layer(nn.Module):
    """Written for these tests, with the children and parameters that the authors' class has."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups, k = groups, channels // (2 * groups)
        self.avg_pool, self.sigmoid, self.gn = nn.AdaptiveAvgPool2d(1), nn.Sigmoid(), nn.GroupNorm(k, k)
        for name in ("cweight", "cbias", "sweight", "sbias"):
            self.register_parameter(name, nn.Parameter(torch.ones(1, k, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        first, second = x.reshape(n * self.groups, -1, h, w).chunk(2, dim=1)
        first = first * self.sigmoid(self.cweight * self.avg_pool(first) + self.cbias)
        second = second * self.sigmoid(self.sweight * self.gn(second) + self.sbias)
        y = torch.cat([first, second], dim=1).reshape(n, 2, -1, h, w)
        return y.permute(0, 2, 1, 3, 4).reshape(n, -1, h, w)


class ShuffledBlock(nn.Module):
    """As above: the bottleneck."""

    def __init__(self, stride: int = 1, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, 8, 1, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride, 1, bias=False), norm(8)
        self.conv3, self.bn3 = nn.Conv2d(8, C, 1, bias=False), norm(C)
        self.sa, self.relu = sa_layer(C, 4), nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(C, C, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.sa(self.bn3(self.conv3(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


_ORDER = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
by_structure(
    "ShuffledBlock", lambda where: tail_rule(where, (fingerprint(ShuffledBlock.forward),), Tail(_ORDER, "sa", "relu"))
)
NORMS = {
    "training": nn.BatchNorm2d,
    "momentum": lambda c: nn.BatchNorm2d(c, momentum=0.3, eps=1e-3),
    "average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "plain": lambda c: nn.BatchNorm2d(c, affine=False),
    "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "sync": nn.SyncBatchNorm,
}


def block(kind="training", stride=1, training=True):
    torch.manual_seed(0)
    return redraw(ShuffledBlock(stride, NORMS[kind])).to(F64).train(training)


def feature_map(n=3):
    torch.manual_seed(1)
    return 2 * torch.randn(n, C, 1, 1, dtype=F64) + torch.randn(n, C, 8, 7, dtype=F64)


def steps(module, count=3):
    """Outputs and parameters over a few optimizer steps, from the same start."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-2, momentum=0.9)
    seen = []
    for i in range(count):
        x = (feature_map() + 0.1 * i).requires_grad_()
        y = module(x)
        optimizer.zero_grad()
        (y.square().mean() + y.mean()).backward()
        optimizer.step()
        seen += [y.detach(), x.grad]
    return seen + [p.detach().clone() for p in (*module.parameters(), *module.buffers())]


def close(got, want, within=1e-9):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).abs().max() <= within * max(1.0, b.double().abs().max().item())


def fused(module):
    made = copy.deepcopy(module)
    return made, fuse_(made)


def names(module, x):
    return [line.op for line in explain(module, x).lines]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "pixels"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_steps(kind, training, stride, layout):
    """Outputs, gradients, running statistics over three optimizer steps; the report; unfused it is what it was."""
    if kind == "sync" and training:
        pytest.skip("a SyncBatchNorm trains on the CPU with a process group alone: the test below")
    original = block(kind, stride, training).to(memory_format=layout)
    module, report = fused(original)
    assert [row.part for row in report.rows] == ["norm + act, norm + gate + add + act", "gate"]
    assert report.refused == []
    ran = names(module, feature_map().to(memory_format=layout))
    assert "gate_shuffle" in ran
    assert "plane_gate_shuffle" not in ran
    close(steps(module), steps(copy.deepcopy(original)))
    twin, _ = fused(original)
    unfuse_(twin)
    assert torch.equal(twin(feature_map()), copy.deepcopy(original)(feature_map()))


@pytest.mark.parametrize("what", ["bn3.weight", "bn3.bias", "sa.cweight", "sa.sweight", "sa.gn.weight", "sa.gn.bias"])
def test_the_proof_can_fail(what):
    """The steps aren't blind to what the fused step reads: a twentieth more of it is seen."""
    original = block()
    module, _ = fused(original)
    with torch.no_grad():
        module.get_parameter(what).mul_(1.05)
    with pytest.raises(AssertionError):
        close(steps(module), steps(original))


def test_hooks_on_swallowed_children():
    """A hook on any child is called, as often as in the original, and numbers stay."""
    original = block()
    for path, _ in original.named_modules():
        if path == "":
            continue
        (module, _), plain = fused(original), copy.deepcopy(original)
        module(feature_map())
        plain(feature_map())
        called = []
        for which, m in enumerate((module, plain)):
            m.get_submodule(path).register_forward_hook(lambda *_, seen=called, which=which: seen.append(which))
        got, want = module(feature_map()), plain(feature_map())
        assert called.count(0) == called.count(1) > 0, path
        assert relative(got, want) < 1e-12, path


def test_replaced_children():
    """Another norm, another gate or none, parameters that want no gradient: what is there runs."""
    for change in (
        lambda m: setattr(m, "bn3", nn.GroupNorm(4, C).double()),
        lambda m: setattr(m, "bn3", nn.BatchNorm2d(C, eps=0.3).double()),
        lambda m: setattr(m, "relu", nn.Tanh()),
        lambda m: setattr(m, "sa", nn.Identity()),
        lambda m: setattr(m.sa, "gn", nn.GroupNorm(1, 2).double()),
        lambda m: m.bn3.eval(),
        lambda m: m.bn3.requires_grad_(False),
        lambda m: m.sa.requires_grad_(False),
    ):
        original = block()
        module, _ = fused(original)
        module(feature_map())
        original(feature_map())
        for each in (module, original):
            torch.manual_seed(8)
            change(each)
        close([module(feature_map())], [original(feature_map())])
        close([module(feature_map())], [original(feature_map())])


def test_small_maps_keep_their_norm(monkeypatch):
    """Where it doesn't pay, PyTorch's norm runs, and the gate behind it as ever; the same numbers."""
    module, _ = fused(block())
    x = feature_map()
    whole = module(x)
    monkeypatch.setattr(normed, "LEAST", 10**9)
    assert relative(module(x), whole) < 1e-12
    assert names(module, x) == ["plane_gate_shuffle"]
    # It pays later than a norm and an activation: from half as much again, without gradients from two and a half.
    monkeypatch.setattr(normed, "LEAST", x.numel() * 2 // 3)
    assert "gate_shuffle" in names(module, x)
    with torch.no_grad():
        assert "plane_gate_shuffle" in names(module, x)
    monkeypatch.setattr(normed, "LEAST", x.numel())
    assert "plane_gate_shuffle" in names(module, x)


def test_a_gate_that_starts_flat():
    """sweight is 0 at the start, and its gradient isn't."""
    torch.manual_seed(0)
    made, norm = ShuffleAttention(C, 4).double(), nn.BatchNorm2d(C).double()
    assert not made.sweight.any()
    x, short = feature_map(), feature_map().flip(0)
    y = joined(norm, made, x, short)
    y.square().sum().backward()
    weights = [made.cweight, made.cbias, made.sweight, made.sbias, made.gn.weight, made.gn.bias]
    wide = [w.detach().flatten().requires_grad_() for w in weights]
    ones, zeros = torch.ones(C, dtype=F64), torch.zeros(C, dtype=F64)
    want = tail(x, short, "relu", 2, ones, zeros, *wide)
    assert relative(y, want) < 1e-12
    for w, g in zip(weights, torch.autograd.grad(want.square().sum(), wide), strict=True):
        assert torch.allclose(w.grad.flatten(), g, rtol=1e-9, atol=1e-9)
    assert made.sweight.grad.abs().min() > 1e-6


def test_autocast_and_half():
    original = block().float()
    module, _ = fused(original)
    x = feature_map().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = module(x), original(x)
    assert relative(got, want) < 2e-2
    got, want = module.bfloat16()(x.bfloat16()), original.bfloat16()(x.bfloat16())
    assert got.dtype == want.dtype
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_own_blocks(dims, training):
    """The library's module behind a BatchNorm, of every number of dimensions."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](12)
    ours = redraw(nn.ModuleList([norm, ShuffleAttention(12, 2)])).double().train(training)
    with torch.no_grad():
        for name in ("cweight", "sweight"):
            getattr(ours[1], name).normal_(generator=torch.Generator().manual_seed(2))
    theirs = copy.deepcopy(ours)
    x, short = (torch.randn(3, 12, *(9, 8, 7)[:dims], dtype=F64, requires_grad=True) for _ in range(2))
    twins = [t.detach().clone().requires_grad_() for t in (x, short)]
    gate = theirs[1]
    weights = (gate.cweight, gate.cbias, gate.sweight, gate.sbias, gate.gn.weight, gate.gn.bias)
    got = joined(ours[0], ours[1], x, short)
    want = torch.relu(attend(theirs[0](twins[0]), 3, *(w.flatten() for w in weights)) + twins[1])
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    everything = lambda m, y, *x: [y, *(t.grad for t in x), *(p.grad for p in m.parameters()), *m.buffers()]
    for a, b in zip(everything(ours, got, x, short), everything(theirs, want, *twins), strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_network(training, monkeypatch):
    """A small sa_resnet50 is the network that it is where every norm is by itself."""
    torch.manual_seed(0)
    options = dict(layers=(1, 1), planes=(32, 32), small_input=True, groups=8)
    net = redraw(models.sa_resnet50(5, **options)).double().train(training)
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 12, 12, dtype=F64)
    y = net(x)
    y.square().sum().backward()
    seen = []
    run = normed.moments_gate_shuffle
    monkeypatch.setattr(normed, "moments_gate_shuffle", lambda *args, **named: seen.append(1) or run(*args, **named))
    copy.deepcopy(net)(x)
    assert len(seen) == 2
    monkeypatch.setattr(normed, "LEAST", 10**9)
    want = twin(x)
    want.square().sum().backward()
    assert len(seen) == 2
    assert relative(y, want) < 1e-9
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-10), name
    for (name, p), q in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert relative(p, q[1]) < 1e-9, name


def test_compiled_and_traced():
    """Compilers and tracers get the modules' own order."""
    module, _ = fused(block("training", 1, False))
    x = feature_map()
    want = module(x)
    assert relative(torch.jit.trace(module, x, check_trace=False)(x), want) < 1e-12
    assert relative(torch.compile(module, backend="eager")(x), want) < 1e-12


def _process(rank, folder):
    """One of two processes: half of a batch, SyncBatchNorm."""
    normed.LEAST = 0
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        module, x = block("sync"), feature_map(5)
        fuse_(module)
        mine = (x[:3] if rank == 0 else x[3:]).requires_grad_()  # of different sizes
        y = module(mine)
        (y * y).sum().backward()
        for p in module.parameters():
            torch.distributed.all_reduce(p.grad)
        kept = dict(module.named_buffers())
        torch.save((y.detach(), mine.grad, {n: p.grad for n, p in module.named_parameters()}, kept), f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_sync_batch_norm_over_two_processes(tmp_path):
    """Outputs, gradients and running statistics are those of one process with the whole batch."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    original, x = block("training"), feature_map(5).requires_grad_()
    y = original(x)
    (y * y).sum().backward()
    halves = [torch.load(os.path.join(tmp_path, str(rank))) for rank in range(2)]
    assert relative(torch.cat([h[0] for h in halves]), y) < 1e-12
    assert relative(torch.cat([h[1] for h in halves]), x.grad) < 1e-10
    for name, p in original.named_parameters():
        for h in halves:
            assert relative(h[2][name], p.grad) < 1e-9, name
    for name, b in original.named_buffers():
        for h in halves:
            assert torch.allclose(h[3][name].double(), b.double(), rtol=1e-12), name


def test_the_authors_names():
    """Their file's usual places are registered; elsewhere the name alone is not enough."""
    assert "models.sa_resnet.SABottleneck" in RULES
    assert rule_of(type("SABottleneck", (nn.Module,), {"forward": lambda self, x: x})) is None
    assert rule_of(ShuffledBlock) is not None
