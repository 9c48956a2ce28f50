"""Nothing that hangs on a model breaks: each model is compared with its twin that was never fused.

Where something hangs on a child that a fused module skips, that module runs unfused, and explain says so. What concerns
one gate and its options is in test_convert.py.
"""

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from fused_attn import EffectiveSE, SqueezeExcite, explain, fuse_, plan, unfuse_, use_backend, warmup
from fused_attn.blocks.squeeze_excite import ExcitePlan
from tests.support import assert_same_step, redraw, relative

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.layers.squeeze_excite import SEModule  # noqa: E402
from timm.models import _features, resnet  # noqa: E402
from timm.models._features_fx import FeatureGraphNet  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
F64 = torch.float64
C = 24


class Net(nn.Module):
    """A parent whose tail is fused, a gate of its own, one of ours, and plain layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.body = resnet.Bottleneck(C, C // 4, attn_layer="se")
        self.last = SEModule(C)
        self.ours = SqueezeExcite(C)
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ours(self.last(self.body(self.stem(x)))).mean((2, 3)))


FUSED = ["body", "body.se", "last"]


def net(seed: int = 0) -> nn.Module:
    model = redraw(Net(), seed).to(F64)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # with which backward hooks don't go together, fused or not
    return model


def pair() -> tuple[nn.Module, nn.Module]:
    """A fused model that has run, and its twin, unfused."""
    ours, theirs = net(), net()
    assert fuse_(ours).fused == FUSED
    assert_same(ours, theirs)
    return ours, theirs


def images(dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def ran_unfused(module: Callable[..., object], x: Tensor | None = None) -> list[str]:
    return [line.reason for line in explain(module, images() if x is None else x).lines if line.backend == "unfused"]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert_same_step(ours, theirs, images(), within=1e-10)


# ---- hooks


def grad_cam(model: nn.Module, target: str) -> Tensor:
    """The map of Selvaraju et al., arXiv:1610.02391: a hook on a layer keeps its output and the gradient of that."""
    kept = {}

    def hook(module: nn.Module, args: object, out: Tensor) -> None:
        kept["map"] = out.detach().clone()
        out.register_hook(lambda gradient: kept.update(gradient=gradient))

    with model.get_submodule(target).register_forward_hook(hook):
        model(images())[:, 2].sum().backward()
    model.zero_grad()
    return (kept["map"] * kept["gradient"].mean((2, 3), keepdim=True)).sum(1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "target", ["body", "body.conv2", "body.bn3", "body.se", "body.se.gate", "body.act3", "last", "last.fc1", "ours.act"]
)
def test_grad_cam(target: str, training: bool) -> None:
    ours, theirs = (m.train(training) for m in pair())
    assert relative(grad_cam(ours, target), grad_cam(theirs, target)) < 1e-10
    assert ran_unfused(ours) == []


@pytest.mark.parametrize("target", ["body", "body.conv2", "last", "ours"])
def test_hooks_on_what_is_called_leave_it_fused(target: str) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        layer = model.get_submodule(target)
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
        layer.register_forward_hook(lambda m, args, out: out - 0.5)
        layer.register_full_backward_hook(lambda m, grads, _: (grads[0] * 2,))
    assert_same(ours, theirs)
    assert ran_unfused(ours) == []


@pytest.mark.parametrize(
    ("target", "unfused"),
    [
        ("body.se", ["se has hooks"]),
        ("body.act3", ["act3 has hooks"]),
        ("body.se.fc2", ["fc2 has hooks", "its gate runs unfused"]),
        ("last.gate", ["gate has hooks"]),
        ("ours.fc1", ["fc1 has hooks"]),
    ],
)
def test_hooks_that_change_what_a_skipped_child_gives(target: str, unfused: list[str]) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        layer = model.get_submodule(target)
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
        layer.register_forward_hook(lambda m, args, out: out - 0.5)
        if target != "body.se":  # whose output is added to in place, which autograd forbids after such a hook
            layer.register_full_backward_hook(lambda m, grads, _: (grads[0] * 2,))
    twin = copy.deepcopy(ours)  # hooks are copied, too
    assert_same(ours, copy.deepcopy(theirs))
    assert sorted(set(ran_unfused(ours))) == unfused
    assert_same(twin, theirs)
    assert sorted(set(ran_unfused(twin))) == unfused


def test_hooks_of_parameters() -> None:
    ours, theirs = pair()
    counts = []
    for model in (ours, theirs):
        seen: list[Tensor] = []
        counts.append(seen)
        model.last.fc1.weight.register_hook(lambda g: 3 * g)
        model.body.se.fc2.bias.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model(images()).sum().backward()
    assert [len(c) for c in counts] == [1, 1]
    assert relative(counts[0][0], counts[1][0]) < 1e-10
    assert ran_unfused(ours) == []


# ---- feature extraction


@functools.cache
def backbone() -> nn.Module:
    return redraw(timm.create_model("seresnet18", num_classes=3)).to(F64).eval()


EXTRACTORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "list": lambda m: _features.FeatureListNet(m, out_indices=(1, 2, 4)),
    "dict": lambda m: _features.FeatureDictNet(m, out_indices=(1, 2, 4)),
    "hook": lambda m: _features.FeatureHookNet(m, out_indices=(1, 2, 4)),
    "getter": lambda m: _features.FeatureGetterNet(m, out_indices=(1, 2, 4)),
    "graph": lambda m: FeatureGraphNet(m, out_indices=(1, 2, 4)),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", EXTRACTORS)
def test_timm_features(kind: str, order: str) -> None:
    theirs, ours = EXTRACTORS[kind](copy.deepcopy(backbone())), copy.deepcopy(backbone())
    if order == "before":
        assert len(fuse_(ours).fused) == 16
    ours = EXTRACTORS[kind](ours)
    if order == "after":
        report = fuse_(ours)
        assert len(report.fused) == (0 if kind == "graph" else 16)
        assert not report.refused
    x = torch.randn(2, 3, 32, 32, dtype=F64)
    found, expected = ours(x), theirs(x)
    if kind == "dict":
        found, expected = list(found.values()), list(expected.values())
    assert len(found) == 3
    assert all(relative(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))


def test_timm_feature_hooks_within_a_block() -> None:
    """FeatureHookNet on children that fused modules skip."""
    names = ["layer1.0.se", "layer2.1.act2", "layer3.0.se.gate"]
    results = []
    for fuse in (True, False):
        model = copy.deepcopy(backbone())
        hooks = _features.FeatureHooks(names, model.named_modules())
        if fuse:
            assert dict(fuse_(model).refused) == {
                "layer1.0": "se has hooks", "layer2.1": "act2 has hooks", "layer3.0.se": "gate has hooks"
            }  # fmt: skip
        x = torch.randn(2, 3, 32, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
        model(x)
        results.append(hooks.get_output(x.device))
    assert list(results[0]) == list(results[1]) == names
    assert all(relative(a, results[1][name]) < 1e-10 for name, a in results[0].items())


@pytest.mark.parametrize("nodes", [["body"], ["body.se", "body.act3", "last"], ["body.add", "head"], ["body.bn3"]])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchvision_feature_extractor(nodes: list[str], training: bool) -> None:
    ours, theirs = pair()
    if "body.add" in nodes:
        nodes = [next(n for n in get_graph_node_names(ours)[0] if n.startswith("body.") and "add" in n), "head"]
    a, b = (create_feature_extractor(m, nodes).train(training)(images()) for m in (ours, theirs))
    assert list(a) == list(b)
    assert all(relative(a[name], b[name]) < 1e-10 for name in a)


# ---- reparametrisations and adapters


REPARAMETRISATIONS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "spectral norm": (
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "old spectral norm": (lambda m: nn.utils.spectral_norm(m), lambda m: nn.utils.remove_spectral_norm(m)),
    "weight norm": (
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "old weight norm": (lambda m: nn.utils.weight_norm(m), lambda m: nn.utils.remove_weight_norm(m)),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.4), lambda m: prune.remove(m, "weight")),
    "pruning of the bias": (lambda m: prune.l1_unstructured(m, "bias", 0.4), lambda m: prune.remove(m, "bias")),
    "LoRA as a parametrisation": (
        lambda m: parametrize.register_parametrization(m, "weight", LowRank(m.weight)),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
}


class LowRank(nn.Module):
    """w + (b a): what adapters add to a frozen weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        rows, columns = weight.shape[:2]
        self.a = nn.Parameter(torch.randn(2, columns, generator=draw, dtype=weight.dtype))
        self.b = nn.Parameter(torch.randn(rows, 2, generator=draw, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).reshape(weight.shape)


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm)")
@pytest.mark.parametrize("where", ["body.se.fc1", "last.fc2", "ours.fc1"])
@pytest.mark.parametrize("name", REPARAMETRISATIONS)
def test_reparametrised_and_back(name: str, where: str) -> None:
    put, remove = REPARAMETRISATIONS[name]
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(0)
        put(model.get_submodule(where))
    assert_same(ours, theirs)
    assert set(ran_unfused(ours))
    for model in (ours, theirs):
        remove(model.get_submodule(where))
    assert_same(ours, theirs)
    assert ran_unfused(ours) == []


class Adapter(nn.Module):
    """A LoRA layer that wraps the one it adapts."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.delta = base.requires_grad_(False), LowRank(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.conv2d(x, self.delta(torch.zeros_like(self.base.weight)))


def wrapped(model: nn.Module, where: str) -> None:
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, Adapter(model.get_submodule(where)))


def in_place(model: nn.Module, where: str) -> None:
    """As libraries do that replace an object's forward and keep the old one."""
    child = model.get_submodule(where)
    old, child.delta = child.forward, LowRank(child.weight)
    child.requires_grad_(False).delta.requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return old(x) + nn.functional.conv2d(x, child.delta(torch.zeros_like(child.weight)))

    child.forward = forward


def by_class(model: nn.Module, where: str) -> None:
    child = model.get_submodule(where)
    child.delta = LowRank(child.weight)
    child.__class__ = AdaptedConv2d


class AdaptedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.delta(self.weight), self.bias)


def trainable_step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(images())
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("where", ["body.se.fc1", "last.fc2", "ours.fc2"])
@pytest.mark.parametrize("adapt", [wrapped, in_place, by_class])
def test_adapters(adapt: Callable[[nn.Module, str], None], where: str, order: str) -> None:
    ours, theirs = pair() if order == "after" else (net(), net())
    for model in (ours, theirs):
        adapt(model, where)
    if order == "before":
        report = fuse_(ours)
        assert (where.rpartition(".")[0] in dict(report.refused)) == (not where.startswith("ours"))
    (y, grads), (want, expected) = trainable_step(ours), trainable_step(theirs)
    assert relative(y, want) < 1e-10
    assert list(grads) == list(expected)
    assert any("delta" in name for name in grads)
    assert all(relative(grads[name], g) < 1e-10 for name, g in expected.items())
    assert ran_unfused(ours) != []


def test_frozen_parameters() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.requires_grad_(False)
        model.last.fc2.requires_grad_()
        model.body.se.fc1.bias.requires_grad_()
    (_, grads), (_, expected) = trainable_step(ours), trainable_step(theirs)
    assert list(grads) == list(expected) == ["body.se.fc1.bias", "last.fc2.weight", "last.fc2.bias"]
    assert all(relative(grads[name], g) < 1e-10 for name, g in expected.items())
    assert ran_unfused(ours) == []


# ---- quantisation


class LinearSE(nn.Module):
    """A gate of dense layers, as some libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3))))))[:, :, None, None]


@pytest.fixture
def linear_se(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A rule for it."""

    def forward(self, x: Tensor) -> Tensor:
        ready = plan.ready(self)
        return self.original.forward(self, x) if ready is None else ready.run(x, None, "identity", 0.01)

    rule = plan.Rule(
        plan.path(LinearSE),
        forward,
        lambda module: ExcitePlan(module, fc1="fc1", act="act", fc2="fc2", gate="gate"),
        {"forward": (plan.fingerprint(LinearSE.forward),)},
    )
    monkeypatch.setitem(plan.RULES, rule.path, rule)
    return LinearSE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", ["before", "after"])
def test_dynamic_quantisation(order: str, linear_se: type[nn.Module]) -> None:
    if "none" in torch.backends.quantized.supported_engines and len(torch.backends.quantized.supported_engines) == 1:
        pytest.skip("this torch has no quantised kernels")
    torch.manual_seed(0)
    x, theirs = torch.randn(2, C, 5, 5), nn.Sequential(linear_se()).eval()
    ours = copy.deepcopy(theirs)
    if order == "after":
        assert fuse_(ours).fused == ["0"]
        torch.testing.assert_close(ours(x), theirs(x))
    ours, theirs = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8) for m in (ours, theirs))
    if order == "before":
        assert "fc1 is a torch.ao.nn.quantized.dynamic" in dict(fuse_(ours).refused)["0"]
    assert torch.equal(ours(x), theirs(x))
    assert "fc1 is a torch.ao.nn.quantized.dynamic" in ran_unfused(ours, x)[0]


# ---- moving, loading, copying


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = net()(images())
    for move in (lambda m: m.to(dtype), lambda m: m.half() if dtype == torch.float16 else m.bfloat16()):
        ours, theirs = pair()
        y, want = move(ours)(images(dtype)), move(theirs)(images(dtype))
        assert y.dtype == want.dtype == dtype
        assert relative(y, exact) < 2 * relative(want, exact) + 4 * torch.finfo(dtype).eps
        assert ran_unfused(ours, images(dtype)) == []
        assert relative(ours.to(F64)(images()), theirs.to(F64)(images())) < 1e-10


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        by_copy, by_assignment = Net().double(), Net().double()
    theirs = net()
    fuse_(by_copy)
    fuse_(by_assignment)
    by_copy.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    by_assignment.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    for ours in (by_copy, by_assignment):
        assert_same(ours, copy.deepcopy(theirs))
        assert ran_unfused(ours) == []


def test_memory_format() -> None:
    ours, theirs = (m.to(memory_format=torch.channels_last) for m in pair())
    x = images().to(memory_format=torch.channels_last)
    assert_same_step(ours, theirs, x, within=1e-10)
    features = [nn.Sequential(m.stem, m.body, m.last)(x) for m in (ours, theirs)]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in features)


def test_state_dicts_go_both_ways() -> None:
    ours, theirs = pair()
    other = net(1)
    ours.load_state_dict(other.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert_same(ours, other)
    for model in (ours, theirs):
        state = model.state_dict()
        del state["last.fc1.weight"]
        state["last.fc3.weight"] = torch.ones(1)
        with pytest.raises(RuntimeError, match=r"(?s)Missing.*last\.fc1\.weight.*Unexpected.*last\.fc3\.weight"):
            model.load_state_dict(state)
    assert_same(ours, other)


@pytest.mark.parametrize(
    "average",
    [
        lambda m: ModelEmaV3(m, decay=0.5),
        lambda m: torch.optim.swa_utils.AveragedModel(
            m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        ),
    ],
    ids=["timm", "torch"],
)
def test_averages_of_the_weights(average: Callable[[nn.Module], nn.Module]) -> None:
    results = []
    for model in pair():
        mean = average(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
            (mean.update if isinstance(mean, ModelEmaV3) else mean.update_parameters)(model)
        assert relative(mean.module(images()), model(images())) > 1e-4
        results.append(mean.module.eval())
    assert relative(results[0](images()), results[1](images())) < 1e-10
    assert isinstance(results[0].last, plan.Fused)
    assert ran_unfused(results[0]) == []


def test_loading_a_fused_model_without_fused_attn_says_what_is_missing(tmp_path: Path) -> None:
    """Python's own words name what to install, by the name that pip knows; a state_dict, and what unfuse_ gave back,
    need nothing."""
    model = nn.Sequential(SEModule(C))
    fuse_(model)
    torch.save(model, tmp_path / "fused.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(unfuse_(model), tmp_path / "unfused.pt")
    code = f"""
        import sys
        class Without:  # finds what the other does, but for one package
            def __init__(self, finder):
                self.finder = finder
            def __getattr__(self, name):
                return getattr(self.finder, name)
            def find_spec(self, name, *rest):
                return None if name == "fused_attn" else self.finder.find_spec(name, *rest)
        sys.meta_path[:] = map(Without, sys.meta_path)
        import tests.support, torch
        torch.load({str(tmp_path / "state.pt")!r})
        print(type(torch.load({str(tmp_path / "unfused.pt")!r}, weights_only=False)[0]).__name__)
        torch.load({str(tmp_path / "fused.pt")!r}, weights_only=False)
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1
    assert run.stdout == "SEModule\n"
    assert run.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'fused_attn'"
    assert re.search(r'^name = "fused_attn"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("cls", [SqueezeExcite, EffectiveSE])
def test_our_modules_are_pickled_without_their_plan(cls: type[nn.Module]) -> None:
    module = cls(C).double()
    twin = pickle.loads(pickle.dumps(module))
    x = torch.randn(2, C, 4, 4, dtype=F64)
    assert torch.equal(twin(x), module(x))
    assert vars(twin)[plan.KEY] is not vars(module)[plan.KEY]
    assert ran_unfused(twin, x) == []


# ---- compilers


@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_compile(order: str) -> None:
    torch._dynamo.reset()
    ours, theirs = net().eval(), net().eval()
    if order == "before":
        fuse_(ours)
    compiled = torch.compile(ours, backend="aot_eager")
    assert_same(compiled._orig_mod, theirs)
    check = lambda: relative(compiled(images()), theirs(images())) < 1e-10
    assert check()
    if order == "after":
        assert fuse_(compiled).fused == [f"_orig_mod.{name}" for name in FUSED]
        assert check()
    y, want = compiled(images()), theirs(images())
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), list(ours.parameters())),
        torch.autograd.grad(want.square().sum(), list(theirs.parameters())),
        strict=True,
    ):
        assert relative(a, b) < 1e-9
    unfuse_(compiled)
    assert check()


def test_compilers_fuse_gates_of_means_where_nothing_is_differentiated() -> None:
    """With the norm in front of the gate, which they can't join to an operator. Exported programs, whose reader may be
    no compiler, keep the op."""
    torch._dynamo.reset()
    ours, theirs, graphs = net().eval(), net().eval(), []
    fuse_(ours)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def ops(graph: torch.fx.GraphModule) -> int:
        return sum(
            isinstance(n.target, torch._ops.OpOverload) and "fused_attn" in str(n.target) for n in graph.graph.nodes
        )

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(images()), theirs(images())) < 1e-10
    assert relative(compiled(images()), theirs(images())) < 1e-10
    assert [ops(graph) for graph in graphs] == [0, len(FUSED)]
    torch._dynamo.reset()
    graphs.clear()
    with torch.no_grad(), use_backend("eager"):
        assert relative(compiled(images()), theirs(images())) < 1e-10
        assert [ops(graph) for graph in graphs] == [len(FUSED)]
    for strict in (False, True):
        with torch.no_grad():
            assert ops(torch.export.export(ours, (images(),), strict=strict)) == len(FUSED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script() -> None:
    """It compiles source, and a plan isn't in the source: the complaint says what to do."""
    model = nn.Sequential(SEModule(C)).eval()
    x = torch.randn(2, C, 5, 5)
    fuse_(model)
    want = model(x)
    with pytest.raises(RuntimeError, match=r"SEModule, .* call fused_attn\.unfuse_\(model\) first, or .*trace"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"script can't compile .*\.SqueezeExcite, .* use torch\.jit\.trace"):
        torch.jit.script(SqueezeExcite(C))
    assert torch.equal(model(x), want)
    assert isinstance(model[0], plan.Fused)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), want)
    torch.testing.assert_close(torch.jit.script(unfuse_(model))(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    ours, theirs = (m.eval() for m in pair())

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    results = []
    for model in (Checkpointed(ours), theirs):
        x = images().requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(relative(a, b) < 1e-10 for a, b in zip(*results, strict=True))


# ---- distributed


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("order", ["before", "after"])
def test_distributed_data_parallel(order: str, one_process: None) -> None:
    ours, theirs = net(), net()
    if order == "before":
        fuse_(ours)
    wrapper = nn.parallel.DistributedDataParallel(ours)
    if order == "after":
        trainable_step(wrapper)
        theirs(images())
        assert fuse_(wrapper).fused == [f"module.{name}" for name in FUSED]
    warmup(wrapper, images())
    for _ in range(2):
        (y, grads), (want, expected) = trainable_step(wrapper), trainable_step(theirs)
        assert relative(y, want) < 1e-10
        assert all(relative(grads[f"module.{name}"], g) < 1e-9 for name, g in expected.items())
    assert ran_unfused(wrapper) == []
    unfuse_(wrapper)
    assert relative(wrapper(images()), theirs(images())) < 1e-10


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [[], ["body"], ["body.se", "body", "last"]], ids=["root", "block", "gates"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_fully_sharded_data_parallel(order: str, wrap: list[str], one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    ours, theirs = net(), net()
    if order == "before":
        fuse_(ours)
    mesh = dist.init_device_mesh("cpu", (1,))
    for name in (*wrap, ""):
        fully_shard(ours.get_submodule(name), mesh=mesh)
    if order == "after":
        refused = dict(fuse_(ours).refused)
        assert set(refused.values()) == {"fc1.weight is a DTensor: call fuse_ before the model is sharded"}
    warmup(ours, images())
    for _ in range(2):
        (y, grads), (want, expected) = trainable_step(ours), trainable_step(theirs)
        assert relative(y, want) < 1e-10
        assert all(relative(grads[name].full_tensor(), g) < 1e-9 for name, g in expected.items())
    if order == "before":
        # A gate that is sharded by itself must be called, for its hooks to gather its weights.
        assert ran_unfused(ours) == (["se has hooks"] if "body.se" in wrap else [])
        if wrap:
            with pytest.raises(RuntimeError, match=r"body became a .*FSDPFusedBottleneck after it was fused"):
                unfuse_(ours)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("original_parameters", [True, False], ids=["original parameters", "flat parameters"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_first_generation_of_fsdp(order: str, original_parameters: bool, one_process: None) -> None:
    """Its flat parameters are plain attributes of the layers, as DataParallel's replicas have them."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    ours, theirs = net(), net()
    if order == "before":
        fuse_(ours)
    policy = ModuleWrapPolicy({resnet.Bottleneck})
    wrapper = FullyShardedDataParallel(
        ours, auto_wrap_policy=policy, use_orig_params=original_parameters, device_id=torch.device("cpu")
    )
    assert isinstance(wrapper.module.body, FullyShardedDataParallel)
    # Before the first forward, after which the parameters are views of the flat ones until a backward.
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (wrapper, theirs)]
    if order == "after":
        wrapper(images())
        assert not fuse_(wrapper).refused
    with torch.no_grad():
        warmup(wrapper, images())
    with pytest.raises(ValueError, match="warm up the model before it is wrapped"):
        warmup(wrapper, images())
    for _ in range(3):
        results = []
        for model, optimizer in zip((wrapper, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            y = model(images())
            y.square().mean().backward()
            optimizer.step()
            results.append(y.detach())
        assert relative(*results) < 1e-9
    assert ran_unfused(wrapper) == []


def test_replicas_of_data_parallel() -> None:
    """What nn.DataParallel makes for each GPU: copies of the modules' __dict__, with weights that are no parameters."""
    ours, theirs = pair()
    weights = {id(p): 2 * p.detach() for p in ours.last.parameters()}
    replica = ours.last._replicate_for_data_parallel()
    for name, child in ours.last._modules.items():
        copied = child._replicate_for_data_parallel()
        for key, p in child._parameters.items():
            setattr(copied, key, p if p is None else weights[id(p)])
        setattr(replica, name, copied)
    with torch.no_grad():
        for p in theirs.last.parameters():
            p.mul_(2)
    x = torch.randn(2, C, 5, 4, dtype=F64)
    assert isinstance(replica, plan.Fused)
    assert relative(replica(x), theirs.last(x)) < 1e-12
    assert ran_unfused(replica, x) == []
    assert relative(ours.last(x), theirs.last(x)) > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_and_back() -> None:
    ours, theirs = pair()
    x = images().cuda()
    assert_same_step(ours.cuda(), theirs.cuda(), x, within=1e-9)
    assert ran_unfused(ours, x) == []
    assert_same(ours.cpu(), theirs.cpu())
