"""A gate of branches before its norm (PSA, BatchNorm, ReLU), against the unfused modules in float64."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from support import redraw, relative
from test_tail_ops import BACKENDS, EPS, batch_norm, compare, maps
from torch import Tensor, nn

from fused_attn import PyramidSqueezeAttention, explain, fuse_, models, ops, unfuse_, use_backend
from fused_attn.blocks import competing, normed, pyramid_squeeze
from fused_attn.blocks.chain import Tail, tail_rule, weighed
from fused_attn.plan import RULES, Rule, by_structure, fingerprint, rule_of

F64 = torch.float64
ACTS = {"identity": lambda t: t, "relu": F.relu, "silu": F.silu}


# ---- the op: branches that are merged, gated by their means, normalised


def excited(size):
    """An excite of `branch_moments_affine`: a gate of the means, and the BatchNorm of what it scales."""

    def excite(moments, weight, bias, w1, w2):
        s = torch.sigmoid(F.relu(moments[0] @ w1.t()) @ w2.t())
        a, shift, statistics = batch_norm(s * moments[0], s.square() * moments[1], weight, bias, size)
        return torch.stack([a * s, shift]), statistics

    return excite


def parameters(c, dtype=F64):
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_()
    return draw(c), draw(c), draw(3, c), draw(c, 3)


def tail(branches, merge, act, weight, bias, w1, w2):
    x = torch.cat(branches[::-1] if merge == "concat_reversed" else branches, 1)
    s = torch.sigmoid(F.relu(x.flatten(2).mean(-1) @ w1.t()) @ w2.t())
    z = x * s.reshape(*s.shape, *(1,) * (x.dim() - 2))
    return ACTS[act](F.batch_norm(z, None, None, weight, bias, True, 0.0, EPS))


SHAPES = [((2, 5, 7, 7), 4), ((3, 16, 14, 14), 4), ((4, 17, 13), 2), ((2, 6, 3, 4, 5), 3), ((3, 4, 5, 5), 1),
          ((5, 3, 2, 2), 8)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("merge", ["concat", "concat_reversed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_branch_moments_affine(backend, merge, act, layout, dtype):
    for shape, count in SHAPES:
        branches = maps(shape, dtype, layout, count)
        weights = parameters(count * shape[1])
        wide = [t.detach().double().requires_grad_() for t in branches]
        want = tail(wide, merge, act, *weights)
        dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=F64).to(dtype)
        true = torch.autograd.grad(want, [*wide, *weights], dy.double())
        own = [w.detach().to(F64 if dtype == F64 else torch.float32).requires_grad_() for w in weights]
        size = branches[0][0, 0].numel()
        with use_backend(backend):
            y, statistics = ops.branch_moments_affine(
                *branches, excite=excited(size), params=own, merge=merge, act=act
            )  # fmt: skip
            found = torch.autograd.grad(y, [*branches, *own], dy)
        assert statistics.shape == (2, count * shape[1])
        like = torch.cat([b.detach() for b in branches], 1)
        assert y.stride() == like.stride() or like.shape[2:].numel() == 1 or layout == "channels_last"
        assert [d.stride() for d in found[:count]] == [torch.empty_like(b).stride() for b in branches]
        compare([y], [want], dtype, 60)
        compare(found[:count], true[:count], dtype, 600)
        # Sums of gradients: beside their largest number.
        compare([g.double() for g in found[count:]], true[count:], F64, 2e3 * torch.finfo(dtype).eps / 2e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_that_of_the_merged_map(backend):
    """`moments_affine` of the branches, concatenated: the same numbers, bit for bit, and gradients."""
    branches = maps((3, 6, 9, 8), torch.float32, "contiguous", 4)
    weights = parameters(24, torch.float32)
    with use_backend(backend):
        y, _ = ops.branch_moments_affine(*branches, excite=excited(72), params=weights, act="relu")
        whole = torch.cat(branches, 1).detach().requires_grad_()
        want, _ = ops.moments_affine(whole, excited(72), *weights, act="relu")
        assert torch.equal(y, want)
        dy = torch.randn_like(y)
        found = torch.cat(torch.autograd.grad(y, branches, dy), 1)
        assert torch.equal(found, torch.autograd.grad(want, whole, dy)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_maps_and_gradients(backend):
    """Branches that are slices, gradients that are expanded or of the other layout."""
    g = torch.Generator().manual_seed(1)
    large = torch.randn(3, 20, 6, 5, generator=g, dtype=F64).requires_grad_()
    weights, dy = parameters(16), torch.randn(1, 16, 1, 1, dtype=F64).expand(3, 16, 6, 5)
    for grad in (dy, dy.contiguous(memory_format=torch.channels_last)):
        results = []
        for ours in (True, False):
            branches = [large[:, 5 * i : 5 * i + 4] for i in range(4)]
            with use_backend(backend):
                if ours:
                    y, _ = ops.branch_moments_affine(*branches, excite=excited(30), params=weights, act="silu")
                else:
                    y = tail(branches, "concat", "silu", *weights)
                results.append([y, *torch.autograd.grad(y, [large, *weights], grad)])
        compare(*results, F64, 1e3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend):
    """Mean 1e3 and deviation 1e-2 in float32, where E[z²] − E[z]² of z = s·x has no digit."""
    branches = [b.detach() for b in maps((4, 6, 28, 28), torch.float32, "contiguous", 4, 1e-2, 1e3)]
    x = torch.cat(branches, 1).double()
    weight, bias = torch.full((24,), 1.5), torch.full((24,), 0.25)

    def excite(moments, w, b):
        s = torch.full_like(moments[0], 0.25)
        both = normed.batch_affine(torch.stack([s * moments[0], s.square() * moments[1]]), w, b, 784, 1e-9)
        return torch.stack([both[0][0] * s, both[0][1]]), both[1]

    want = F.batch_norm(0.25 * x, None, None, weight.double(), bias.double(), True, 0.0, 1e-9)
    with use_backend(backend):
        y, (mu, var) = ops.branch_moments_affine(*branches, excite=excite, params=(weight, bias))
    true = (0.25 * x).transpose(0, 1).flatten(1).var(1, correction=0)
    assert ((var.double() - true).abs() <= 1e-3 * true).all()
    assert ((mu.double() - 250).abs() <= 1e-3).all()
    # One step of float32 at 1e3 is 6e-5, a hundredth of half a deviation.
    assert (y.double() - want).abs().max() <= 2e-2
    z = 0.25 * x.float()
    naive = z.square().mean((0, 2, 3)) - z.mean((0, 2, 3)).square()
    assert ((naive.double() - true).abs() > true).any()


def test_gradcheck():
    """Through the batch's statistics and the gate, in float64, by finite differences."""
    branches, weights = maps((3, 2, 3, 2), F64, "contiguous", 4), parameters(8)
    f = lambda *t: ops.branch_moments_affine(
        *t[:4], excite=excited(6), params=t[4:], merge="concat_reversed", act="silu"
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda *t: f(*t)[0], (*branches, *weights))


def test_parts_are_the_whole():
    """What can't look into an autograd.Function gets the parts; a second derivative is refused in words."""
    branches = maps((2, 3, 5, 5), F64, "contiguous", 4)
    weights = [w.detach() for w in parameters(12)]
    f = lambda *t: ops.branch_moments_affine(*t, excite=excited(25), params=weights, merge="concat_reversed")[0]
    whole = f(*branches)
    grads = torch.autograd.grad(whole.square().sum(), branches)
    plain = [b.detach() for b in branches]
    found = torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3))(*plain)
    for a, b in zip(found, grads, strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(torch.vmap(f)(*(b.unsqueeze(0) for b in plain))[0], whole)
    y = f(*branches).square().sum()
    (first,) = torch.autograd.grad(y, branches[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_empty_batch():
    for backend in BACKENDS:
        branches = [torch.zeros(0, 4, 5, 5).requires_grad_() for _ in range(4)]
        with use_backend(backend):
            y = ops.branch_moments_affine(*branches, excite=lambda m: torch.stack([m[0], m[1]]), act="relu")
        y.sum().backward()
        assert y.shape == (0, 16, 5, 5)
        assert branches[0].grad.shape == (0, 4, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (dict(maps=[]), ValueError, "maps must be 1 to 8"),
        (dict(merge="sum"), ValueError, "merge must be"),
        (dict(descriptor="extrema"), ValueError, "descriptor must be"),
        (dict(act="tanh"), ValueError, "act must be"),
        (dict(excite=3), TypeError, "excite must be callable"),
        (dict(excite=lambda m: m[0]), ValueError, "excite's gate must have shape"),
        (dict(maps=[torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)]), ValueError, "x1"),
        (dict(maps=[torch.zeros(2, 3)]), ValueError, "x must"),
        (dict(params=[3]), TypeError, r"params\[0\]"),
    ],
)
def test_errors(change, error, told):
    arguments = dict(maps=[torch.zeros(2, 3, 4, 4)] * 2, excite=lambda m: torch.zeros(2, 2, 6)) | change
    with pytest.raises(error, match=told):
        ops.branch_moments_affine(*arguments.pop("maps"), **arguments)


# ---- the block: EPSANet's bottleneck


class SEWeightModule(nn.Module):
    """Written for these tests, with the children that the authors' class has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool, self.relu, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Sigmoid()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class AheadPSA(nn.Module):
    """As above."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        for i, kernel in enumerate((3, 5, 7, 9), 1):
            conv = nn.Conv2d(16, 4, kernel, stride, kernel // 2, groups=(1, 2, 2, 4)[i - 1], bias=False)
            self.add_module(f"conv_{i}", conv)
        self.se, self.softmax, self.split_channel = SEWeightModule(4), nn.Softmax(dim=1), 4

    def forward(self, x: Tensor) -> Tensor:
        found = [conv(x) for conv in (self.conv_1, self.conv_2, self.conv_3, self.conv_4)]
        gates = self.softmax(torch.stack([self.se(m) for m in found], 1))
        return torch.cat([found[i] * gates[:, i] for i in (3, 2, 1, 0)], 1)


class AheadBlock(nn.Module):
    """As above: the bottleneck, and none of its norms has to be a BatchNorm."""

    def __init__(self, stride: int = 1, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 1, bias=False), norm(16)
        self.conv2, self.bn2 = AheadPSA(stride), norm(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1, bias=False), norm(16)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(16, 16, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


_ORDER = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
by_structure("AheadPSA", lambda where: Rule(
    where, competing.foreign,
    lambda module: pyramid_squeeze._Pyramid(module, fingerprint(SEWeightModule.forward), "concat_reversed"),
    {"forward": (fingerprint(AheadPSA.forward),)}, ahead=True,
))  # fmt: skip
by_structure(
    "AheadBlock", lambda where: tail_rule(where, (fingerprint(AheadBlock.forward),), Tail(_ORDER, None, "relu"))
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
    return redraw(AheadBlock(stride, NORMS[kind])).to(F64).train(training)


def feature_map(n=3):
    torch.manual_seed(1)
    return 2 * torch.randn(n, 16, 1, 1, dtype=F64) + torch.randn(n, 16, 8, 7, dtype=F64)


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


def fused(module, **how):
    made = copy.deepcopy(module)
    return made, fuse_(made, **how)


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
    assert [row.part for row in report.rows] == ["norm + act, gate + norm + act, norm + add + act", "gate"]
    assert report.refused == []
    ran = names(module, feature_map().to(memory_format=layout))
    assert "branch_moments" in ran
    assert "branch_affine" in ran
    assert "branch_scale" not in ran
    close(steps(module), steps(copy.deepcopy(original)))
    twin, _ = fused(original)
    unfuse_(twin)
    assert torch.equal(twin(feature_map()), copy.deepcopy(original)(feature_map()))


@pytest.mark.parametrize("what", ["bn2.weight", "conv2.se.fc1.weight", "conv2.conv_3.weight"])
def test_the_proof_can_fail(what):
    """The steps aren't blind to what the fused step reads: a twentieth more of it is seen."""
    original = block()
    module, _ = fused(original)
    with torch.no_grad():
        module.get_parameter(what).mul_(1.05)
    with pytest.raises(AssertionError):
        close(steps(module), steps(original))


def test_gates_matter():
    """The pyramid's weights are far from equal here, and differ between samples."""
    original = block()
    seen = []
    original.conv2.softmax.register_forward_hook(lambda m, args, out: seen.append(out))
    original(feature_map())
    assert (seen[0] - 0.25).abs().max() > 0.05
    assert seen[0].std(0).max() > 0.01


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
    """Another norm, another activation, a gate that was taken out: what is there runs."""
    for change in (
        lambda m: setattr(m, "bn2", nn.GroupNorm(4, 16).double()),
        lambda m: setattr(m, "bn2", nn.BatchNorm2d(16, eps=0.3).double()),
        lambda m: setattr(m, "relu", nn.Tanh()),
        lambda m: setattr(m, "conv2", nn.Conv2d(16, 16, 3, padding=1).double()),
        lambda m: setattr(m.conv2, "se", SEWeightModule(4).double()),
        lambda m: setattr(m.conv2, "softmax", nn.Softmax(2)),
        lambda m: m.bn2.eval(),
        lambda m: m.bn2.requires_grad_(False),
        lambda m: m.conv2.requires_grad_(False),
    ):
        original = block()
        module, _ = fused(original)
        module(feature_map())
        original(feature_map())
        for each in (module, original):
            torch.manual_seed(8)
            change(each)
        close([module(feature_map())], [original(feature_map())])
        assert [p.grad is None for p in module.parameters()] == [p.grad is None for p in original.parameters()]


def test_only_the_gate_or_only_the_block():
    """What isn't selected isn't fused, and the rest of the step runs as ever."""
    original = block()
    for how in (dict(skip="conv2"), dict(only="conv2")):
        module, _ = fused(original, **how)
        assert "branch_moments" not in names(module, feature_map())
        close(steps(module), steps(copy.deepcopy(original)))


def test_small_maps_keep_their_norm(monkeypatch):
    """Where it doesn't pay, the gate and PyTorch's norm run, one after the other; the convolutions once."""
    module, _ = fused(block())
    x = feature_map()
    whole = module(x)
    calls = []
    monkeypatch.setattr(normed, "LEAST", 10**9)
    handle = module.conv2.conv_1.register_forward_hook(lambda *_: calls.append(1))
    assert relative(module(x), whole) < 1e-12
    assert calls == [1]
    handle.remove()
    assert {"branch_pool", "branch_scale"} <= set(names(module, x))


def test_autocast_and_half():
    """Under autocast the convolutions' halves are normalised by float32 weights, as PyTorch does."""
    original = block().float()
    module, _ = fused(original)
    x = feature_map().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = module(x), original(x)
    assert got.dtype == want.dtype
    assert relative(got, want) < 2e-2
    got, want = module.bfloat16()(x.bfloat16()), original.bfloat16()(x.bfloat16())
    assert got.dtype == want.dtype
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_own_blocks(dims, reverse, training):
    """The library's block and its BatchNorm, of every number of dimensions."""
    made = PyramidSqueezeAttention(8, 16, (3, 3, 5, 5), 2, (1, 2, 2, 4), 2, reverse, dims)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](16)
    ours = redraw(nn.ModuleList([made, norm])).double().train(training)
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 8, *(9, 8, 7)[:dims], dtype=F64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    got, want = weighed(ours[0], ours[1], x), torch.relu(theirs[1](theirs[0].equations(twin)))
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    everything = lambda m, y, x: [y, x.grad, *(p.grad for p in m.parameters()), *m.buffers()]
    for a, b in zip(everything(ours, got, x), everything(theirs, want, twin), strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_network(training, monkeypatch):
    """A small epsanet: its blocks run so, and it is the network that it is without."""
    torch.manual_seed(0)
    net = redraw(models.epsanet50(5, layers=(1, 1), planes=(64, 64), small_input=True)).double().train(training)
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 12, 12, dtype=F64)
    assert names(net, x).count("branch_affine") == 2
    y = net(x)
    y.square().sum().backward()
    monkeypatch.setattr("fused_attn.models.weighed", lambda gate, norm, x: torch.relu(norm(gate.equations(x))))
    want = twin(x)
    want.square().sum().backward()
    assert relative(y, want) < 1e-9
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-12), name  # an SE's ReLU may be closed here
    for (name, p), q in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert relative(p, q[1]) < 1e-9, name


def test_compiled_and_traced():
    """Compilers and tracers get the modules' own order."""
    module, _ = fused(block("training", 1, False))
    x = feature_map()
    want = module(x)
    assert relative(torch.jit.trace(module, x, check_trace=False)(x), want) < 1e-12
    assert relative(torch.compile(module, backend="eager")(x), want) < 1e-12


def test_copies_and_pickles():
    """A copy, and what a pickle gives back, run the same way."""
    module, _ = fused(block())
    x = feature_map()
    twin = copy.deepcopy(module)
    assert "branch_affine" in names(twin, x)
    assert torch.equal(twin(x), module(x))


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
    """Their files' usual places are registered; elsewhere the name alone is not enough."""
    assert {"models.epsanet.EPSABlock", "models.epsanet.PSAModule"} <= set(RULES)
    other = type("EPSABlock", (nn.Module,), {"forward": lambda self, x: x})
    assert rule_of(other) is None
    assert rule_of(AheadBlock) is not None
