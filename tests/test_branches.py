"""Branches that compete: `branch_softmax`; SK, split attention and PSA against modules that weren't written here."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from fused_attn import BLOCKS, PyramidSqueezeAttention, SelectiveKernel, SplitAttention, explain, fuse_, ops, testing
from fused_attn.blocks import competing, pyramid_squeeze, selective_kernel
from fused_attn.plan import Rule, fingerprint, register
from tests.support import assert_same_step, redraw, relative, step

timm_sk = pytest.importorskip("timm.layers.selective_kernel")
timm_split = pytest.importorskip("timm.layers.split_attn")
pytorchcv_att = pytest.importorskip("pytorchcv.models.common.att")
pytorchcv_sknet = pytest.importorskip("pytorchcv.models.sknet")
F64 = torch.float64


def feature_map(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    offset = torch.randn(*shape[:2], *(1 for _ in shape[2:]), generator=draw, dtype=F64)
    return (2 * offset + torch.randn(shape, generator=draw, dtype=F64)).to(dtype)


def ran_unfused(module: nn.Module, *inputs: Tensor) -> list[str]:
    return [line.reason for line in explain(module, *inputs).lines if line.backend == "unfused"]


# ---- the function


def network(p: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """A small network of the tests' own."""
    return F.silu(p.to(w1.dtype) @ w1) @ w2


def weighed(maps: list[Tensor], w1: Tensor, w2: Tensor, groups: int, each: bool, merge: str) -> Tensor:
    """The equations, in the accumulation dtype of the maps."""
    acc = F64 if maps[0].dtype == F64 else torch.float32
    means = [m.to(acc).flatten(2).mean(-1) for m in maps]
    logits = network(torch.stack(means, 1) if each else sum(means), w1, w2)
    n, c, count = maps[0].shape[0], maps[0].shape[1], len(maps)
    if groups > 1:
        logits = logits.reshape(n, groups, count, c // groups).transpose(1, 2)
    logits = logits.reshape(n, count, c)
    gate = logits.sigmoid() if count == 1 else logits.softmax(1)
    scaled = [m.to(acc) * gate[:, i].reshape(n, c, *(1,) * (m.dim() - 2)) for i, m in enumerate(maps)]
    order = scaled[::-1] if merge == "concat_reversed" else scaled
    return (sum(scaled) if merge == "sum" else torch.cat(order, 1)).to(maps[0].dtype)


@pytest.mark.parametrize(
    "backend", [b for b in ("eager", "cpp") if testing.missing(fused_attn.OPS["branch_scale"], b) is None]
)
@pytest.mark.parametrize("merge", ["sum", "concat", "concat_reversed"])
@pytest.mark.parametrize("inside", [False, True], ids=["tensors", "one tensor"])
@pytest.mark.parametrize(
    ("count", "groups", "each"), [(1, 1, False), (2, 3, False), (3, 1, False), (4, 1, True), (8, 2, False)]
)
def test_branch_softmax(backend: str, count: int, groups: int, each: bool, inside: bool, merge: str) -> None:
    """Outputs and every gradient against the equations, in every layout and dtype."""
    draw = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=draw, dtype=F64)
    c = 6
    maps = [new(3, count * c, 5, 3)] if inside else [new(3, c, 5, 3) for _ in range(count)]
    weights = [new(c, 4), new(4, c if each else c * count)]
    splits = count if inside else 1

    def formula(*args: Tensor) -> Tensor:
        given = list(args[0].chunk(count, 1)) if inside else list(args[:count])
        return weighed(given, *args[-2:], groups, each, merge)

    fused = lambda *args: ops.branch_softmax(
        *args[:-2], excite=network, params=args[-2:], splits=splits, groups=groups, each=each, merge=merge
    )
    for dtype, layout in [(torch.float32, lay) for lay in testing.WALKABLE] + [
        (F64, "contiguous"), (F64, "transposed"), (torch.bfloat16, "channels_last"), (torch.float16, "contiguous"),
    ]:  # fmt: skip
        wide = F64 if dtype == F64 else torch.float32
        args = (*(testing.arrange(m.to(dtype), layout) for m in maps), *(w.to(wide) for w in weights))
        with fused_attn.use_backend(backend if layout != "transposed" else "auto"):
            got = testing.answer(fused, args, gradient="contiguous" if layout == "transposed" else layout)
        if layout != "transposed":
            assert got.outs[0].stride() == ops.branches.beside(args[0], got.outs[0].shape[1]).stride()
            assert all(g.stride() == torch.empty_like(m).stride() for g, m in zip(got.grads, args[:-2], strict=False))
        true = testing.answer(formula, testing.double(args), cotangents=testing.double(got.cotangents))
        plain = testing.answer(formula, args, cotangents=got.cotangents)
        names = [*(f"x{i}" for i in range(len(maps))), "w1", "w2"]
        found = testing.deviations(got, true, plain, 15 + 24, names)
        assert all(d.ok for d in found), f"{dtype}, {layout}: " + "; ".join(str(d) for d in found if not d.ok)


def test_logits_given() -> None:
    """Without an excite nothing is pooled, and the logits receive their gradient."""
    maps, logits = [feature_map(2, 6, 4, 3).roll(i) for i in range(3)], feature_map(2, 18, 1).flatten(1)
    got = testing.answer(lambda a, b, c, u: ops.branch_softmax(a, b, c, logits=u), (*maps, logits))
    gates = lambda u: u.view(2, 3, 6).softmax(1)[..., None, None]
    want = testing.answer(
        lambda a, b, c, u: (torch.stack([a, b, c], 1) * gates(u)).sum(1), (*maps, logits), cotangents=got.cotangents
    )
    assert all(relative(a, b) < 1e-12 for a, b in zip(got.outs + got.grads, want.outs + want.grads, strict=True))


def test_only_branches_and_small_tensors_are_saved() -> None:
    maps = [torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ops.branch_softmax(*maps, excite=lambda p: p.repeat(1, 2))
    large = [t for t in kept if t.numel() >= maps[0].numel()]
    assert {t.data_ptr() for t in large} == {m.data_ptr() for m in maps}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_branch_softmax_compiles(dynamic: bool) -> None:
    torch._dynamo.reset()
    fused = lambda a, b, w1, w2: ops.branch_softmax(a, b, excite=network, params=(w1, w2))
    args = (torch.randn(3, 6, 5, 3), torch.randn(3, 6, 5, 3), torch.randn(6, 4), torch.randn(4, 12))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert testing.same_bits(testing.answer(fused, args), testing.answer(compiled, args))


def test_branch_softmax_in_transforms() -> None:
    """vmap and grad get the parts: the same numbers."""
    a, b = feature_map(2, 3, 6, 5), feature_map(2, 3, 6, 5).flip(0)
    run = lambda a, b: ops.branch_softmax(a, b, excite=lambda p: p.repeat(1, 2))
    assert relative(torch.func.vmap(run)(a[None], b[None])[0], run(a, b)) < 1e-12
    loss = lambda a: run(a, b).square().sum()
    leaf = a.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative(torch.func.grad(loss)(a), want) < 1e-12


def test_second_derivative_raises() -> None:
    a = feature_map(2, 3, 4, 4).requires_grad_()
    y = ops.branch_softmax(a, a, excite=lambda p: p.repeat(1, 2))
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        da.sum().backward()


@pytest.mark.parametrize(
    ("maps", "options", "told"),
    [
        ([], {}, "1 to 8 branches"),
        ([(2, 3, 4)] * 9, {}, "1 to 8 branches"),
        ([(2, 3, 4), (2, 3, 5)], {}, "x1 must have the shape of x"),
        ([(2, 3, 4)], {"splits": 2}, "x must hold 2 branches"),
        ([(2, 4, 4), (2, 4, 4)], {"splits": 2}, "splits must be 1"),
        ([(2, 4, 4)], {"splits": 0}, "splits must be from 1 to 8"),
        ([(2, 4, 4)], {"merge": "max"}, "merge must be one of"),
        ([(2, 4, 4)], {"groups": 3}, "groups must divide"),
        ([(2, 4)], {}, "at least 3 dimensions"),
        ([(2, 4, 4), (2, 4, 4)], {"excite": lambda p: p}, "logits must have 2·4 values"),
        ([(2, 4, 4)], {"excite": None}, "either excite or logits"),
        ([(2, 4, 4)], {"excite": lambda p: p, "logits": torch.zeros(2, 4)}, "either excite or logits"),
    ],
)  # fmt: skip
def test_bad_arguments(maps: list[tuple[int, ...]], options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ops.branch_softmax(*(torch.zeros(s) for s in maps), **{"excite": lambda p: p, **options})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x: ops.branch_scale(x, torch.zeros(2, 2, 3), None, x), "x2 must follow x1"),
        (lambda x: ops.branch_scale(x, torch.zeros(2, 3, 3), x), "number of branches, 2; got 3"),
        (lambda x: ops.branch_scale(x, torch.zeros(2, 2, 4), x), "gate must have shape"),
        (lambda x: ops.branch_scale(x, torch.zeros(2, 3), x), "gate must have shape"),
        (lambda x: ops.branch_scale(x, torch.zeros(2, 2, 3), x[:, :2]), "x1 must have the shape of x"),
        (lambda x: ops.branch_scale(x, torch.zeros(2, 1, 3), merge="stack"), "merge must be one of"),
        (lambda x: ops.branch_pool(x, splits=2), "x must hold 2 branches"),
        (lambda x: ops.branch_pool(x, x, splits=3), "splits must be 1"),
    ],
)
def test_bad_arguments_of_the_ops(call, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(torch.zeros(2, 3, 4))


# ---- the blocks against timm, which takes the same state_dict

SK = {
    "default": dict(in_channels=16),
    "whole input": dict(in_channels=16, split_input=False, out_channels=24),
    "three kernels": dict(in_channels=24, kernel_size=[3, 5, 7], keep_3x3=False, rd_channels=5),
    "stride, groups": dict(in_channels=16, stride=2, groups=2, rd_ratio=0.5, rd_divisor=4),
    "one size": dict(in_channels=16, kernel_size=3, dilation=2, act_layer=nn.SiLU),
}
SPLIT = {
    "default": dict(in_channels=16),
    "norm": dict(in_channels=16, norm_layer=nn.BatchNorm2d),
    "radix 1": dict(in_channels=16, radix=1, norm_layer=nn.BatchNorm2d),
    "radix 4, groups": dict(in_channels=16, out_channels=24, radix=4, groups=2, norm_layer=nn.BatchNorm2d),
    "groups, no norm": dict(in_channels=16, groups=4, stride=2, bias=True, act_layer=nn.SiLU),
    "rd_channels": dict(in_channels=16, rd_channels=7, kernel_size=5, padding=1),
}


def biases_before_norm(module: nn.Module) -> tuple[str, ...]:
    """Parameters whose gradient is zero in training: a batch norm takes them away again."""
    named = dict(module.named_modules())
    return tuple(
        f"{conv}.bias"
        for norm, conv in (
            ("bn1", "fc1"),
            ("bn0", "conv"),
            ("att.bn", "att.conv1"),
            ("att.bn", "att.fc1"),
            ("bn", "conv1"),
            ("bn", "fc1"),
        )
        if isinstance(named.get(norm), nn.modules.batchnorm._BatchNorm)
        and getattr(named.get(conv), "bias", None) is not None
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*SK, *SPLIT])
def test_blocks_are_timms(name: str, training: bool) -> None:
    for ours, theirs, options in (
        (SelectiveKernel, timm_sk.SelectiveKernel, SK.get(name)),
        (SplitAttention, timm_split.SplitAttn, SPLIT.get(name)),
    ):
        if options is None:
            continue
        reference = redraw(theirs(**options)).double()
        module = ours(**options).double()
        module.load_state_dict(reference.state_dict(), strict=True)
        assert list(module.state_dict()) == list(reference.state_dict())
        x = feature_map(4, options["in_channels"], 7, 6)
        zero = biases_before_norm(reference) if training else ()
        assert_same_step(module.train(training), reference.train(training), x, within=1e-10, zero=zero)
        assert ran_unfused(module, x) == []


# ---- conversion

MODULES = {
    **{f"timm SK {k}": functools.partial(timm_sk.SelectiveKernel, **v) for k, v in SK.items()},
    **{f"timm split {k}": functools.partial(timm_split.SplitAttn, **v) for k, v in SPLIT.items()},
    "timm SK aa": lambda: timm_sk.SelectiveKernel(16, stride=2, aa_layer=nn.AvgPool2d),
    "pytorchcv SK": lambda: pytorchcv_sknet.SKConvBlock(16, 16, 1, groups=4),
    "pytorchcv SK 3": lambda: pytorchcv_sknet.SKConvBlock(16, 8, 2, groups=2, num_branches=3, min_channels=5),
    "pytorchcv split": lambda: pytorchcv_att.SAConvBlock(16, 16, 3, 1, 1),
    "pytorchcv split groups": lambda: pytorchcv_att.SAConvBlock(16, 24, 3, 1, 1, groups=2, radix=4),
    "pytorchcv split radix 1": lambda: pytorchcv_att.SABlock(16, 2, 1),
    "pytorchcv split Linear": lambda: pytorchcv_att.SABlock(8, 1, 2, use_conv=False, normalization=lambda_norm),
}  # fmt: skip


def lambda_norm(num_features: int) -> nn.Module:
    return nn.BatchNorm1d(num_features)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_conversion(name: str, training: bool) -> None:
    original = redraw(MODULES[name]()).double().train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert len(report.fused) == 1
    assert not report.refused, report
    x = feature_map(4, 24 if "three" in name else 16, 7, 6)
    assert_same_step(module, original, x, within=1e-10, zero=biases_before_norm(original) if training else ())
    assert ran_unfused(module, x) == []
    names = [line.op for line in explain(module, x).lines]
    if name == "pytorchcv split radix 1":
        assert names == ["channel_pool", "shared_mlp", "scale"]
        return
    assert names == [
        "branch_pool",
        *(["shared_mlp"] if "groups" not in name or "pytorchcv" in name or "SK" in name else []),
        "branch_scale",
    ]


@pytest.mark.parametrize(
    ("build", "change", "told"),
    [
        (lambda: timm_sk.SelectiveKernel(16), lambda m: setattr(m.attn, "bn", nn.GroupNorm(1, 8)), "bn is a .*Norm"),
        (lambda: timm_sk.SelectiveKernel(16), lambda m: setattr(m.attn, "act", nn.Mish()), "act is Mish"),
        (lambda: timm_sk.SelectiveKernel(16), lambda m: setattr(m, "attn", nn.Identity()), "attn is a .*Identity"),
        (lambda: timm_sk.SelectiveKernel(16), lambda m: m.paths.append(nn.Identity()), "num_paths is 2"),
        (lambda: timm_sk.SelectiveKernel(16), lambda m: m.attn.register_forward_hook(print), "attn has hooks"),
        (lambda: timm_sk.SelectiveKernel(16), lambda m: m.attn.bn.register_forward_hook(print), "bn has hooks"),
        (lambda: timm_sk.SelectiveKernel(18, kernel_size=[3] * 9, rd_channels=4), lambda m: None, "9 branches"),
        (lambda: timm_split.SplitAttn(16), lambda m: setattr(m.rsoftmax, "radix", 3), "radix and cardinality"),
        (lambda: timm_split.SplitAttn(16), lambda m: setattr(m, "fc1", nn.Conv2d(16, 32, 3)), "1×1"),
        (lambda: timm_split.SplitAttn(16, norm_layer=lambda c, **k: nn.GroupNorm(1, c)), lambda m: None, "GroupNorm"),
        (lambda: pytorchcv_sknet.SKConvBlock(16, 16, 1, groups=4),
         lambda m: setattr(m.branches, "merge_type", "cat"), "not stacked"),
        (lambda: pytorchcv_sknet.SKConvBlock(16, 16, 1, groups=4),
         lambda m: setattr(m, "softmax", nn.Softmax(dim=2)), "not the softmax over branches"),
    ],
)  # fmt: skip
def test_refusals(build, change, told: str) -> None:
    module = build()
    change(module)
    (row,) = fuse_(module).refused
    assert re.search(told, row[1]), row


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_timms_attention_by_itself(training: bool) -> None:
    """Branches in, their weights out: converted where it stands alone, and left to the selective kernel around it."""
    original = redraw(timm_sk.SelectiveKernelAttn(8, 3, 5)).to(F64).train(training)
    module = copy.deepcopy(original)
    assert fuse_(module).fused == [""]
    x = torch.randn(4, 3, 8, 5, 6, generator=torch.Generator().manual_seed(4), dtype=F64)
    assert_same_step(module, original, x, within=1e-10)
    with pytest.raises(AssertionError):
        module(x[:, :2])
    around = timm_sk.SelectiveKernel(16)
    assert fuse_(around).fused == [""]
    assert type(around.attn) is timm_sk.SelectiveKernelAttn
    assert fuse_(timm_sk.SelectiveKernelAttn(8, 3, 5, norm_layer=lambda c, **_: nn.GroupNorm(1, c))).refused


def test_pytorchcvs_single_split() -> None:
    """Its softmax is over one value: 1, without a gradient, but NaN where the mean isn't finite."""
    original = redraw(pytorchcv_att.SABlock(16, 2, 1)).eval()
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map(2, 16, 7, 6, dtype=torch.float32)
    x[0, 3, 2, 2] = float("inf")
    assert torch.equal(module(x)[1], x[1])
    assert torch.equal(module(x).isnan(), original(x).isnan())
    assert module(x)[0].isnan().all()


def test_what_changes_later_is_seen() -> None:
    """A hook on a grandchild, another layer, other weights: seen on the next call."""
    module = redraw(timm_sk.SelectiveKernel(16)).double().eval()
    original = copy.deepcopy(module)
    fuse_(module)
    x, seen = feature_map(4, 16, 7, 6), []
    with module.attn.fc_reduce.register_forward_hook(lambda *_: seen.append(1)):
        assert relative(module(x), original(x)) < 1e-12
        assert seen
        assert ran_unfused(module, x) == ["fc_reduce has hooks"]
    for m in (module, original):
        m.attn.act = nn.SiLU()
        m.attn.fc_select.weight.data.mul_(2)
    assert relative(module(x), original(x)) < 1e-12
    assert ran_unfused(module, x) == []


@pytest.mark.parametrize(
    "name", ["timm SK default", "timm split norm", "timm split radix 1", "pytorchcv SK", "pytorchcv split"]
)
def test_autocast_gives_the_same_dtype(name: str) -> None:
    original = redraw(MODULES[name]()).eval()
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map(4, 16, 7, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = module(x), original(x)
    assert y.dtype == want.dtype == torch.bfloat16
    assert relative(y, want) < 3e-2


def test_running_statistics() -> None:
    for name in ("timm SK default", "timm split radix 4, groups", "pytorchcv split"):
        original = redraw(MODULES[name]())
        module = copy.deepcopy(original)
        fuse_(module)
        for i in range(3):
            x = feature_map(4, 16, 7, 6, dtype=torch.float32) * (i + 1)
            module(x), original(x)
        for (key, value), expected in zip(module.state_dict().items(), original.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, msg=key)


# ---- PSA: the paper's equations in index form, and once more by its authors' steps


def psa_by_index(module: nn.Module, x: Tensor) -> Tensor:
    """Every element by its own sum, in loops: §3.2 of the paper, in the order of the authors' code."""
    maps = [getattr(module, f"conv_{i}")(x) for i in (1, 2, 3, 4)]
    w1, b1, w2, b2 = module.se.fc1.weight, module.se.fc1.bias, module.se.fc2.weight, module.se.fc2.bias
    n, c, h, w = maps[0].shape
    rows = []
    for i in range(n):
        z = []
        for m in maps:
            g = [sum(m[i, k, r, s] for r in range(h) for s in range(w)) / (h * w) for k in range(c)]
            hidden = [
                torch.clamp(sum(w1[j, k, 0, 0] * g[k] for k in range(c)) + b1[j], min=0) for j in range(w1.shape[0])
            ]
            z.append(
                [
                    1 / (1 + torch.exp(-(sum(w2[k, j, 0, 0] * hidden[j] for j in range(len(hidden))) + b2[k])))
                    for k in range(c)
                ]
            )
        channels = []
        for b in (3, 2, 1, 0):
            for k in range(c):
                weight = torch.exp(z[b][k]) / sum(torch.exp(z[a][k]) for a in range(4))
                channels.append(maps[b][i, k] * weight)
        rows.append(torch.stack(channels))
    return torch.stack(rows)


def psa_by_tensors(module: nn.Module, x: Tensor) -> Tensor:
    """The same, a tensor at a time."""
    maps = torch.stack([getattr(module, f"conv_{i}")(x) for i in (1, 2, 3, 4)], 1)
    se = nn.Sequential(module.se.fc1, nn.ReLU(), module.se.fc2, nn.Sigmoid())
    weights = se(maps.mean((3, 4)).flatten(0, 1)[..., None, None]).view(maps.shape[0], 4, -1, 1, 1)
    return (maps * torch.exp(weights) / torch.exp(weights).sum(1, keepdim=True)).flip(1).flatten(1, 2)


class Oracle(nn.Module):
    """A module's parameters under another forward."""

    def __init__(self, module: nn.Module, forward) -> None:
        super().__init__()
        self.module, self.by = module, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.by(self.module, x)


@pytest.mark.parametrize("oracle", [psa_by_index, psa_by_tensors])
def test_psa(oracle) -> None:
    module = redraw(PyramidSqueezeAttention(8, 16, conv_groups=(1, 2, 2, 4), reduction=2).double())
    assert [*module.state_dict()] == [*(f"conv_{i}.weight" for i in (1, 2, 3, 4)), "se.fc1.weight", "se.fc1.bias",
                                      "se.fc2.weight", "se.fc2.bias"]  # fmt: skip
    x = feature_map(2, 8, 3, 4)
    y, grads = step(module, x)
    want, expected = step(Oracle(copy.deepcopy(module), oracle), x)
    assert relative(y, want) < 1e-12
    for (name, grad), other in zip(grads.items(), expected.values(), strict=True):
        assert relative(grad, other) < 1e-10, name
    assert ran_unfused(module, x) == []


def test_psa_in_order() -> None:
    module = redraw(PyramidSqueezeAttention(8, 16, conv_groups=(1, 2, 2, 4), reduction=2).double())
    forward = PyramidSqueezeAttention(8, 16, conv_groups=(1, 2, 2, 4), reduction=2, reverse=False).double()
    forward.load_state_dict(module.state_dict())
    x = feature_map(2, 8, 3, 4)
    assert relative(forward(x), module(x).unflatten(1, (4, 4)).flip(1).flatten(1, 2)) < 1e-12


class SEWeightModule(nn.Module):
    """Written for these tests, with the children that the authors' class has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool, self.relu, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Sigmoid()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class PSAModule(nn.Module):
    """Written for these tests, with the children that the authors' class has."""

    def __init__(self) -> None:
        super().__init__()
        for i, kernel in enumerate((3, 5, 7, 9), 1):
            self.add_module(f"conv_{i}", nn.Conv2d(8, 4, kernel, padding=kernel // 2, bias=False))
        self.se, self.softmax, self.split_channel = SEWeightModule(4), nn.Softmax(dim=1), 4

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(x) for conv in (self.conv_1, self.conv_2, self.conv_3, self.conv_4)]
        gates = self.softmax(torch.stack([self.se(m) for m in maps], 1))
        return torch.cat([maps[i] * gates[:, i] for i in (3, 2, 1, 0)], 1)


def test_conversion_of_psa() -> None:
    """The rule's plan, on classes of the authors' structure; the rules themselves name their published sources."""
    weights = fingerprint(SEWeightModule.forward)
    rule = Rule(
        f"{__name__}.PSAModule", competing.foreign,
        lambda module: pyramid_squeeze._Pyramid(module, weights, "concat_reversed"),
        {"forward": (fingerprint(PSAModule.forward),)},
    )  # fmt: skip
    register(rule)
    original = redraw(PSAModule().double())
    module = copy.deepcopy(original)
    assert fuse_(module).fused == [""]
    assert_same_step(module, original, feature_map(2, 8, 5, 4), within=1e-10)
    assert ran_unfused(module, feature_map(2, 8, 5, 4)) == []
    for change, told in (
        (lambda m: setattr(m, "softmax", nn.Softmax(dim=2)), "softmax"),
        (lambda m: setattr(m, "split_channel", 5), "split_channel"),
        (lambda m: setattr(m.se, "sigmoid", nn.Hardsigmoid()), "sigmoid"),
        (lambda m: setattr(m.se, "avg_pool", nn.AdaptiveMaxPool2d(1)), "avg_pool"),
        (lambda m: setattr(m, "se", nn.Identity()), "se is a"),
    ):
        module = PSAModule()
        change(module)
        ((_, reason),) = fuse_(module).refused
        assert told in reason


class Inlined(nn.Module):
    """Written for these tests, with the children that PytorchInsight's bottleneck has."""

    def __init__(self, downsample: nn.Module | None) -> None:
        super().__init__()
        conv = lambda i, o, k, **how: nn.Conv2d(i, o, k, padding=k // 2, bias=False, **how)
        stride = 1 if downsample is None else 2
        self.conv1, self.bn1 = conv(64, 32, 1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = conv(32, 32, 3, stride=stride), nn.BatchNorm2d(32)
        self.conv2g, self.bn2g = conv(32, 32, 3, stride=stride, groups=32), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = conv(32, 64, 1), nn.BatchNorm2d(64)
        self.relu, self.downsample, self.D = nn.ReLU(inplace=True), downsample, 32
        self.avg_pool, self.bn_fc1 = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(5)
        self.conv_fc1, self.conv_fc2 = conv(32, 5, 1), conv(5, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        a, b = torch.relu(self.bn2(self.conv2(y))), torch.relu(self.bn2g(self.conv2g(y)))
        logits = self.conv_fc2(torch.relu(self.bn_fc1(self.conv_fc1(self.avg_pool(a) + self.avg_pool(b)))))
        first, second = logits.unflatten(1, (2, 32)).softmax(1).unbind(1)
        y = self.bn3(self.conv3(a * first + b * second))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conversion_of_a_bottleneck_that_holds_sk(training: bool) -> None:
    """The rule's plan, as for PSA. And its two branches are our block's, with a number of groups for each."""
    sources = {"forward": (fingerprint(Inlined.forward),)}
    register(Rule(f"{__name__}.Inlined", competing.foreign, selective_kernel._Inline, sources))
    x = feature_map(4, 64, 7, 6)
    for downsample in (None, nn.Conv2d(64, 64, 1, 2, bias=False)):
        original = redraw(Inlined(downsample).double()).train(training)
        module = copy.deepcopy(original)
        assert fuse_(module).fused == [""]
        assert_same_step(module, original, x, within=1e-9)
        assert ran_unfused(module, x) == []
        assert [line.op for line in explain(module, x).lines] == ["branch_pool", "shared_mlp", "branch_scale"]
    for change, told in (
        (lambda m: setattr(m, "D", 16), "D is 16"),
        (lambda m: setattr(m, "avg_pool", nn.AdaptiveMaxPool2d(1)), "avg_pool"),
        (lambda m: setattr(m, "conv_fc2", nn.Conv2d(5, 96, 1)), "96 logits for 2 branches"),
        (lambda m: m.bn_fc1.register_forward_hook(print), "bn_fc1 has hooks"),
    ):
        module = Inlined(None)
        change(module)
        ((_, reason),) = fuse_(module).refused
        assert told in reason
    block = SelectiveKernel(32, kernel_size=3, groups=[1, 32], rd_channels=5, split_input=False).double()
    original = redraw(Inlined(None).double()).train(training)
    names = {"conv2": "paths.0.conv", "bn2": "paths.0.bn", "conv2g": "paths.1.conv", "bn2g": "paths.1.bn"}
    names |= {"conv_fc1": "attn.fc_reduce", "bn_fc1": "attn.bn", "conv_fc2": "attn.fc_select"}
    state = {f"{names[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in original.state_dict().items()
             if k.partition(".")[0] in names}  # fmt: skip
    block.load_state_dict(state)
    for name in ("conv1", "bn1", "conv3", "bn3"):
        setattr(original, name, nn.Identity())
    z = feature_map(4, 32, 5, 6).abs()
    want = original(z) - z  # the shortcut; ReLU does nothing to what is positive
    assert relative(block.train(training)(z), want) < 1e-10


# ---- the blocks themselves


@pytest.mark.parametrize("name", ["selective_kernel", "split_attention", "pyramid_squeeze"])
def test_declaration(name: str) -> None:
    """Every case: the plan against the equations, in training and in evaluation, in any number of dimensions."""
    for case in BLOCKS[name].cases:
        module = redraw(BLOCKS[name].module(**case.args["args"]).double())
        x = feature_map(*case.args["x"])
        for training in (True, False):
            plain = copy.deepcopy(module).train(training)
            plain.forward = plain.equations
            zero = biases_before_norm(module) if training else ()
            assert_same_step(module.train(training), plain, x, within=1e-10, zero=zero)
            assert ran_unfused(module, x) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["selective_kernel", "split_attention", "pyramid_squeeze"])
def test_dtypes_and_memory_formats(name: str, dtype: torch.dtype) -> None:
    case = BLOCKS[name].cases[0]
    module = redraw(BLOCKS[name].module(**case.args["args"])).eval()
    x = feature_map(*case.args["x"], dtype=torch.float32)
    want = copy.deepcopy(module).double()(x.double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = module.to(dtype, memory_format=memory_format)(x.to(dtype).contiguous(memory_format=memory_format))
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        assert relative(y, want) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["selective_kernel", "split_attention", "pyramid_squeeze"])
def test_compiles_in_one_graph_and_copies(name: str, tmp_path) -> None:
    case = BLOCKS[name].cases[0]
    module = redraw(BLOCKS[name].module(**case.args["args"]))
    x = feature_map(*case.args["x"], dtype=torch.float32)
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y, grads = step(compiled, x)
    want, expected = step(twin, x)
    assert relative(y, want) < 1e-5
    zero = {f"_orig_mod.{n}" for n in biases_before_norm(twin)}
    for (key, grad), other in zip(grads.items(), expected.values(), strict=True):
        assert key in zero or relative(grad, other) < 1e-4, key
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch.save(module.eval(), tmp_path / "m.pt")
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=False)(x), module(x))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: SelectiveKernel(15), "in_channels must be a multiple of 2"),
        (lambda: SelectiveKernel(16, kernel_size=[2, 3]), "kernel_size must hold odd numbers"),
        (lambda: SelectiveKernel(18, kernel_size=[3] * 9), "9 branches"),
        (lambda: SelectiveKernel(16, dims=4), "dims must be 1, 2 or 3"),
        (lambda: SelectiveKernel(16, groups=[1, 2, 4]), "one for each of 2 kernels"),
        (lambda: SplitAttention(18, radix=9), "9 branches"),
        (lambda: SplitAttention(16, act_layer=nn.Mish), "act1 is Mish"),
        (lambda: SplitAttention(16, norm_layer=lambda c, **k: nn.GroupNorm(1, c)), "GroupNorm"),
        (lambda: PyramidSqueezeAttention(16, 18), "planes must be a multiple of 4"),
        (lambda: PyramidSqueezeAttention(16, 32, conv_groups=(1, 1, 1, 1)), "planes must be at least 64"),
    ],
)
def test_unknown_options_are_refused(build, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build()


def test_a_batch_of_one_cannot_be_normalised() -> None:
    for module in (SelectiveKernel(16), SplitAttention(16, groups=2, norm_layer=nn.BatchNorm2d)):
        with pytest.raises(ValueError, match="more than 1"):
            module(torch.randn(1, 16, 5, 5))
        module.eval()(torch.randn(1, 16, 5, 5))


def test_widths_are_timms() -> None:
    for c in (16, 24, 40, 64, 72, 96, 160, 200):
        ours, theirs = SelectiveKernel(c, device="meta"), timm_sk.SelectiveKernel(c, device="meta")
        assert ours.attn.fc_reduce.weight.shape == theirs.attn.fc_reduce.weight.shape
        ours, theirs = SplitAttention(c, device="meta"), timm_split.SplitAttn(c, device="meta")
        assert ours.fc1.weight.shape == theirs.fc1.weight.shape
