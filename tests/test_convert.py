"""fuse_ and unfuse_: every class with every option against itself unfused, and nothing that hangs on a model breaks."""

import copy
import functools
import gc
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_attn
from fused_attn import SqueezeExcite, explain, fuse_, plan, unfuse_, verify
from tests.support import assert_same_step, redraw, relative, step

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.layers import DropPath, activations, activations_me  # noqa: E402
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule, SqueezeExciteCl  # noqa: E402
from timm.models import resnet, senet, tresnet  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE  # noqa: E402
from timm.models.hgnet import EseModule  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

F64 = torch.float64
C = 24

ACTS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "swish": activations.Swish,
    "swish_me": activations_me.SwishMe,
    "gelu": nn.GELU,
    "timm gelu": activations.GELU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "hardswish": nn.Hardswish,
    "timm hardswish": activations.HardSwish,
    "hardswish_me": activations_me.HardSwishMe,
    "prelu": nn.PReLU,
    "timm prelu": activations.PReLU,
    "identity": nn.Identity,
}
GATES = {
    "sigmoid": nn.Sigmoid,
    "timm sigmoid": activations.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "timm hardsigmoid": activations.HardSigmoid,
    "hardsigmoid_me": activations_me.HardSigmoidMe,
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "identity": nn.Identity,
}

MODULES: dict[str, Callable[[], nn.Module]] = {
    "SEModule": lambda: SEModule(C),
    "SEModule add_maxpool": lambda: SEModule(C, add_maxpool=True),
    "SEModule no bias": lambda: SEModule(C, bias=False, rd_ratio=0.5),
    "SEModule norm": lambda: SEModule(C, norm_layer=nn.BatchNorm2d),
    "SEModule norm add_maxpool": lambda: SEModule(C, norm_layer=nn.BatchNorm2d, add_maxpool=True, rd_channels=5),
    "SqueezeExciteCl": lambda: SqueezeExciteCl(C),
    "SqueezeExciteCl no bias": lambda: SqueezeExciteCl(C, bias=False, act_layer=nn.SiLU),
    "EffectiveSEModule": lambda: EffectiveSEModule(C),
    "EffectiveSEModule add_maxpool": lambda: EffectiveSEModule(C, add_maxpool=True, gate_layer="sigmoid"),
    "EseModule": lambda: EseModule(C),
    "EfficientNet": lambda: EfficientNetSE(C),
    "EfficientNet force_act": lambda: EfficientNetSE(C, rd_channels=7, act_layer=nn.SiLU, force_act_layer=nn.ReLU6),
    "senet": lambda: senet.SEModule(C, 4),
    "torchvision": lambda: SqueezeExcitation(C, 6),
    "torchvision silu": lambda: SqueezeExcitation(C, 6, activation=nn.SiLU, scale_activation=nn.Hardsigmoid),
    **{f"SEModule act {k}": partial(SEModule, C, act_layer=v) for k, v in ACTS.items()},
    **{f"SEModule gate {k}": partial(SEModule, C, gate_layer=v) for k, v in GATES.items()},
    **{f"EfficientNet act {k}": partial(EfficientNetSE, C, act_layer=v) for k, v in ACTS.items()},
    **{f"ESE gate {k}": partial(EffectiveSEModule, C, gate_layer=v) for k, v in GATES.items()},
    **{f"torchvision gate {k}": partial(SqueezeExcitation, C, 6, nn.ReLU, v) for k, v in GATES.items()},
}

PARENTS: dict[str, Callable[[], nn.Module]] = {
    "resnet.BasicBlock": lambda: resnet.BasicBlock(C, C, attn_layer="se"),
    "resnet.BasicBlock ese": lambda: resnet.BasicBlock(C, C, attn_layer="ese"),
    "resnet.Bottleneck": lambda: resnet.Bottleneck(C, C // 4, attn_layer="se"),
    "resnet.Bottleneck silu": lambda: resnet.Bottleneck(C, C // 4, attn_layer="se", act_layer=nn.SiLU),
    "resnet.Bottleneck stride": lambda: resnet.Bottleneck(
        C, 4, stride=2, downsample=nn.Conv2d(C, 16, 1, 2), attn_layer="se", drop_path=DropPath(0.0)
    ),
    "resnet.Bottleneck ours": lambda: resnet.Bottleneck(C, C // 4, attn_layer=SqueezeExcite),
    "senet.SEResNetBottleneck": lambda: senet.SEResNetBottleneck(C, C // 4, 1, 4),
    "senet.SEResNeXtBottleneck": lambda: senet.SEResNeXtBottleneck(C, 16, 4, 4, downsample=nn.Conv2d(C, 64, 1)),
    "senet.SEBottleneck": lambda: senet.SEBottleneck(C, C // 4, 2, 4),
    "senet.SEResNetBlock": lambda: senet.SEResNetBlock(C, C, 1, 4),
    "tresnet.BasicBlock": lambda: tresnet.BasicBlock(C, C),
}


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return redraw(build()).to(F64)


def feature_map(channels_last: bool = False, dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(4, C, 1, 1, generator=draw, dtype=F64) + torch.randn(4, C, 6, 5, generator=draw, dtype=F64)
    return (x.permute(0, 2, 3, 1).contiguous() if channels_last else x).to(dtype)


def ran_unfused(module: nn.Module, *inputs: Tensor) -> list[str]:
    return [line.reason for line in explain(module, *inputs).lines if line.backend == "unfused"]


class Model(nn.Module):
    """Two gates and a parent, for what concerns a model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SEModule(C)
        self.body = nn.Sequential(resnet.Bottleneck(C, C // 4, attn_layer="se"), EffectiveSEModule(C))
        self.last = SqueezeExcitation(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


ALL = ["first", "body.0", "body.0.se", "body.1", "last"]


# ---- the same numbers


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_gates(name: str, training: bool) -> None:
    original = make(MODULES[name]).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert (report.fused, report.refused) == ([""], [])
    x = feature_map(channels_last="Cl" in name)
    within = 1e-6 if any(isinstance(m, (nn.Hardsigmoid, nn.Hardswish)) for m in original.modules()) else 1e-12
    zero = ("fc1.bias",) if "norm" in name and training else ()
    assert_same_step(module, original, x, within=within, zero=zero)
    assert ran_unfused(module, x) == []


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PARENTS)
def test_parents(name: str, training: bool) -> None:
    original = make(PARENTS[name]).train(training)
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert "" in report.fused
    assert not report.refused
    zero = tuple(n for n, _ in original.named_parameters() if n.endswith("conv.bias")) if training else ()
    assert_same_step(module, original, feature_map(), within=1e-6 if "ese" in name else 1e-10, zero=zero)
    ran = {line.op for line in explain(module, feature_map()).lines}
    tail = {"shared_mlp", "affine_apply", *(("channel_moments", "batch_affine") if training else ("channel_pool",))}
    inner = {"pool_mlp_scale"} if name == "senet.SEResNetBlock" else set()
    if inner:  # a ReLU stands between its norm and its gate
        tail -= {"shared_mlp", "channel_pool"}
    assert ran == tail | inner


@pytest.mark.parametrize("name", ["resnet.Bottleneck", "tresnet.BasicBlock"])
def test_parents_with_drop_path(name: str) -> None:
    """Active drop_path stands between gate and add: then only the gate is fused, with the same random numbers."""
    original = make(PARENTS[name])
    original.drop_path = DropPath(0.5)
    module = copy.deepcopy(original)
    assert fuse_(module).refused == []
    x = feature_map()
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    assert relative(y, original(x)) < 1e-12
    assert ran_unfused(module, x) == ["drop_path stands between gate and add"]
    assert ran_unfused(module.eval(), x) == []
    assert relative(module(x), original.eval()(x)) < 1e-12


def test_tail_of_other_dtype_or_shape_is_not_fused() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    class Row(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, :1]

    for shortcut in (Half(), Row()):
        for name in ("resnet.Bottleneck", "senet.SEResNetBottleneck"):
            original = make(PARENTS[name])
            original.downsample = shortcut
            module = copy.deepcopy(original)
            fuse_(module)
            y, want = module(feature_map()), original(feature_map())
            assert y.dtype == want.dtype
            assert relative(y, want) < 1e-12
            assert len(ran_unfused(module, feature_map())) == 1


def test_inputs_that_are_not_batches_of_images_are_left_to_the_original() -> None:
    original = make(MODULES["torchvision"]).eval()
    module = copy.deepcopy(original)
    fuse_(module)
    x = torch.randn(C, 5, 5, dtype=F64)  # unbatched: adaptive pooling takes it
    assert torch.equal(module(x), original(x))
    module = make(MODULES["SEModule"])
    fuse_(module)
    with pytest.raises(IndexError):
        module(x)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [*PARENTS.values(), MODULES["SEModule"], MODULES["EseModule"]])
def test_autocast_gives_the_same_dtype(build: Callable[[], nn.Module], x_dtype: torch.dtype) -> None:
    original = make(build).float().eval()
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map(dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = module(x), original(x)
    assert y.dtype == want.dtype
    assert relative(y, want) < 2e-2


# ---- in place


def test_identity_keys_and_parameters_stay() -> None:
    model = Model()
    modules, parameters = list(model.modules()), list(model.parameters())
    keys = list(model.state_dict())
    report = fuse_(model)
    assert report.fused == ALL
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model.first, SEModule)
    assert isinstance(model.body[0], resnet.Bottleneck)
    assert "Fused" in repr(model.first)


def test_it_is_idempotent() -> None:
    model = Model()
    first = fuse_(model)
    classes = [type(m) for m in model.modules()]
    assert fuse_(model) == first
    assert [type(m) for m in model.modules()] == classes


def test_unfuse_gives_the_original_back() -> None:
    model = make(Model)
    classes, attributes = [type(m) for m in model.modules()], [list(vars(m)) for m in model.modules()]
    x = feature_map()
    want = step(model, x)
    fuse_(model)
    step(model, x)
    assert unfuse_(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [list(vars(m)) for m in model.modules()] == attributes
    y, grads = step(model.train(), x)
    assert torch.equal(y, want[0])
    assert all(torch.equal(grads[k], g) for k, g in want[1].items())


def test_an_optimizer_made_before_goes_on() -> None:
    model, other = make(Model), make(Model)
    optimizer, control = (torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, other))
    for i in range(3):
        if i == 1:
            fuse_(model)
        for m, o in ((model, optimizer), (other, control)):
            o.zero_grad()
            m(feature_map()).square().mean().backward()
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p, q) < 1e-6


def test_loading_moving_and_swapping_weights() -> None:
    for change in (
        lambda m: m.load_state_dict(make(Model, 1).state_dict()),
        lambda m: m.load_state_dict(make(Model, 1).state_dict(), assign=True),
        lambda m: m.double(),
        lambda m: m.float().double(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: setattr(m.first.fc1, "weight", nn.Parameter(m.first.fc1.weight.detach() * 2)),
        lambda m: setattr(m.first, "add_maxpool", True),
        lambda m: setattr(m.first, "gate", nn.Hardsigmoid()),
        lambda m: setattr(m.last, "activation", nn.LeakyReLU(0.3)),
        lambda m: setattr(m.body[0], "act3", nn.SiLU()),
    ):
        model, original = make(Model), make(Model)
        fuse_(model)
        model(feature_map())
        original(feature_map())
        change(model)
        change(original)
        assert relative(model(feature_map()), original(feature_map())) < 1e-12
        assert ran_unfused(model, feature_map()) == []


def test_train_and_eval_reach_the_norm() -> None:
    model = make(MODULES["SEModule norm"])
    fuse_(model)
    x, before = feature_map(), model.bn.running_mean.clone()
    train = model(x)
    assert not torch.equal(model.bn.running_mean, before)
    kept = model.bn.running_mean.clone()
    assert relative(model.eval()(x), train) > 1e-3
    assert torch.equal(model.bn.running_mean, kept)


def test_functional_call_uses_the_weights_given() -> None:
    model = make(Model).eval()
    fuse_(model)
    others = dict(make(Model, 1).eval().named_parameters())
    want = copy.deepcopy(model)
    want.load_state_dict({**model.state_dict(), **others})
    assert relative(torch.func.functional_call(model, others, (feature_map(),)), want(feature_map())) < 1e-12


def test_a_shared_module_is_fused_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = SEModule(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    original = make(Twice)
    model = copy.deepcopy(original)
    assert fuse_(model, only="b").fused == ["a"]
    assert_same_step(model, original, feature_map())


def test_nothing_is_kept_alive() -> None:
    model = Model()
    fuse_(model)
    model(feature_map(dtype=torch.float32))
    gone = weakref.ref(model.body[0].se)
    gc.disable()
    try:
        del model
        assert gone() is None  # at once, by its reference count
    finally:
        gc.enable()


def test_a_weight_that_becomes_another_kind_of_tensor() -> None:
    """As quantisation in place does: the op can't read its numbers, and the original's forward can."""

    class Scaled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                args = [3 * a.as_subclass(Tensor) if isinstance(a, Scaled) else a for a in args]
                return func(*args, **(kwargs or {}))

    module, original = (make(MODULES["SEModule"]) for _ in range(2))
    fuse_(module)
    plain = module(feature_map())
    for m in (module, original):
        del m.fc1.weight
        m.fc1.register_parameter("weight", None)
        m.fc1._parameters["weight"] = make(MODULES["SEModule"]).fc1.weight.detach().as_subclass(Scaled)
    assert relative(module(feature_map()), original(feature_map())) < 1e-12
    assert relative(module(feature_map()), plain) > 1e-3
    assert ran_unfused(module, feature_map()) == ["fc1.weight is a Scaled"]


# ---- what hangs on a child


def _hook(register: str) -> Callable[[nn.Module], object]:
    return lambda child: getattr(child, register)(lambda *_: None)


TAMPERINGS: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": _hook("register_forward_hook"),
    "forward pre-hook": _hook("register_forward_pre_hook"),
    "backward hook": _hook("register_full_backward_hook"),
    "backward pre-hook": _hook("register_full_backward_pre_hook"),
    "forward": lambda child: setattr(child, "forward", type(child).forward.__get__(child)),
    "pruning": lambda child: prune.random_unstructured(child, "weight", 0.5),
    "parametrisation": lambda child: parametrize.register_parametrization(child, "weight", nn.Softplus()),
    "weight norm": lambda child: torch.nn.utils.parametrizations.weight_norm(child),
    "old weight norm": lambda child: torch.nn.utils.weight_norm(child),
    "class": lambda child: setattr(child, "__class__", type("Mine", (type(child),), {})),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("where", ["first.fc2", "body.0.se.fc2"])
@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_hangs_on_a_child_makes_it_run_unfused(name: str, where: str, before: bool) -> None:
    model, original = make(Model).eval(), make(Model).eval()
    gate = where.rpartition(".")[0]
    if not before:
        fuse_(model)
        model(feature_map())
    for m in (model, original):
        torch.manual_seed(0)
        TAMPERINGS[name](m.get_submodule(where))
    if before:
        refused = dict(fuse_(model).refused)
        assert list(refused) == [gate]
    if gate == "first":
        assert torch.equal(step(model.first, feature_map())[0], step(original.first, feature_map())[0])
    assert relative(model(feature_map()), original(feature_map())) < 1e-12
    assert len(ran_unfused(model, feature_map())) >= 1


PATCHES: dict[str, tuple[type[nn.Module], str, str, list[str]]] = {
    "a child's": (nn.Conv2d, "forward", "body.0.se.fc1", ["first", "body.0.se", "last"]),
    "an activation's": (nn.ReLU, "forward", "last.activation", ["first", "body.0.se", "last"]),
    "a gate's": (SEModule, "forward", "first", ["first", "body.0.se"]),
    "a parent's": (resnet.Bottleneck, "forward", "body.0", ["body.0"]),
    "a part of a gate's": (SqueezeExcitation, "_scale", "last", ["last"]),
}


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapped", "plain"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", PATCHES)
def test_a_method_replaced_on_a_class(name: str, before: bool, wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools do that count or log: what isn't called through the class any more would go unnoticed."""
    cls, method, where, concerned = PATCHES[name]
    model, original = make(Model).eval(), make(Model).eval()
    plain = original(feature_map())
    if not before:
        fuse_(model)
        model(feature_map())
    kept, calls = getattr(cls, method), []

    def replaced(self: nn.Module, *args: Tensor) -> Tensor:
        calls.append(self)
        return 1.5 * kept(self, *args)

    monkeypatch.setattr(cls, method, functools.wraps(kept)(replaced) if wraps else replaced)
    if before:
        refused = fuse_(model).refused
        assert {name for name, _ in refused} >= set(concerned)
        assert all("isn't its own" in why or "is wrapped" in why for _, why in refused), refused
    want = original(feature_map())
    calls.clear()
    assert relative(model(feature_map()), want) < 1e-12
    assert model.get_submodule(where) in calls
    assert relative(want, plain) > 1e-3
    assert before or set(ran_unfused(model, feature_map())) != set()
    monkeypatch.undo()
    assert relative(model(feature_map()), plain) < 1e-12
    assert before or ran_unfused(model, feature_map()) == []


def test_a_hook_on_a_child_is_called_and_removing_it_fuses_again() -> None:
    model = make(Model)
    fuse_(model)
    for child in (model.first.gate, model.body[0].se, model.body[0].act3, model.body[0].se.fc1, model.last.avgpool):
        calls = []
        handle = child.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(feature_map())
        assert calls == [1]
        assert ran_unfused(model, feature_map()) != []
        handle.remove()
        assert ran_unfused(model, feature_map()) == []


def test_a_hook_on_all_modules_sees_all_modules() -> None:
    model = make(Model)
    fuse_(model)
    seen = set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module)):
        model(feature_map())
    assert set(model.modules()) <= seen


def test_hooks_on_the_module_itself() -> None:
    model = make(Model)
    fuse_(model)
    seen = []
    model.first.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model.first.register_full_backward_hook(lambda m, gi, go: seen.append(gi[0].shape))
    model(feature_map().requires_grad_()).sum().backward()
    assert len(seen) == 2
    assert ran_unfused(model, feature_map()) == []


def test_replaced_children_that_are_not_understood_run() -> None:
    model, original = make(Model), make(Model)
    fuse_(model)
    for m in (model, original):
        m.first.gate = nn.Softplus()
        m.body[0].act3 = nn.Mish()
    assert relative(model(feature_map()), original(feature_map())) < 1e-12
    assert len(ran_unfused(model, feature_map())) == 2


@pytest.mark.parametrize("order", ["before", "after"])
def test_sync_batch_norm(order: str) -> None:
    model, original = make(MODULES["SEModule norm"]), make(MODULES["SEModule norm"])
    if order == "after":
        fuse_(model)
        assert relative(model(feature_map()), original(feature_map())) < 1e-12
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if order == "before":
        assert "SyncBatchNorm" in fuse_(model).refused[0][1]
    assert relative(model.eval()(feature_map()), original.eval()(feature_map())) < 1e-12
    assert order == "before" or "SyncBatchNorm" in ran_unfused(model, feature_map())[0]


def test_unfuse_under_a_parametrisation_raises() -> None:
    model = Model()
    fuse_(model)
    classes = [type(m) for m in model.modules()]
    model.first.gain = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model.first, "gain", nn.Identity())
    with pytest.raises(RuntimeError, match="first became a"):
        unfuse_(model)
    parametrize.remove_parametrizations(model.first, "gain")
    assert [type(m) for m in model.modules()] == classes
    unfuse_(model)


# ---- copies


def test_deepcopy_and_pickle() -> None:
    model = make(Model)
    fuse_(model)
    x = feature_map()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
    want = copy.deepcopy(model)(x)
    for twin in twins[:2]:
        assert fuse_(twin).fused == ALL
        assert torch.equal(twin(x), want)
        assert all(a is not b for a, b in zip(twin.modules(), model.modules(), strict=True))
        with torch.no_grad():
            twin.first.fc1.weight.zero_()
        assert not torch.equal(twin(x), want)
        assert ran_unfused(twin, x) == []
        assert type(unfuse_(twin).first) is SEModule
    assert type(model.first) is not SEModule


def test_a_saved_model_loads_in_a_process_that_knows_nothing(tmp_path) -> None:
    model = make(PARENTS["resnet.Bottleneck"]).eval()
    fuse_(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((feature_map(), model(feature_map()).detach()), tmp_path / "xy.pt")
    code = (
        "import sys; from tests.support import allow_torchvision; import torch;"
        "assert 'fused_attn' not in sys.modules and 'timm' not in sys.modules;"
        f"m = torch.load(r'{tmp_path}/model.pt', weights_only=False); x, y = torch.load(r'{tmp_path}/xy.pt');"
        "assert (m(x) - y).abs().max() < 1e-12; import fused_attn; assert fused_attn.fuse_(m).fused == ['', 'se']"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_pickle_whose_class_changed_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(MODULES["senet"])
    fuse_(model)
    saved = pickle.dumps(model)
    monkeypatch.setattr(senet.SEModule, "forward", lambda self, x: x)
    assert type(pickle.loads(saved)) is senet.SEModule


# ---- refusals


class Louder(SEModule):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(SEModule):
    pass


class OtherScale(SqueezeExcitation):
    def _scale(self, input: Tensor) -> Tensor:  # noqa: A002
        return 1 - super()._scale(input)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: Louder(C), "Louder overrides forward of SEModule"),
    "helper": (lambda: OtherScale(C, 4), "OtherScale overrides _scale of SqueezeExcitation"),
    "act": (lambda: SEModule(C, act_layer=nn.Mish), "act is Mish"),
    "gelu tanh": (lambda: SEModule(C, act_layer=lambda **_: nn.GELU("tanh")), "act is GELU.*tanh"),
    "gate": (lambda: SEModule(C, gate_layer="tanh"), "gate is Tanh"),
    "norm": (lambda: SEModule(C, norm_layer=partial(nn.GroupNorm, 1)), "bn is a .*GroupNorm"),
    "3x3": (lambda: _with(SEModule(C), "fc1", nn.Conv2d(C, 8, 3, padding=1)), "fc1 is .*1×1"),
    "groups": (lambda: _with(SEModule(C), "fc2", nn.Conv2d(8, C, 1, groups=2)), "fc2 is .*1×1"),
    "layer": (lambda: _with(SEModule(C), "fc1", nn.Sequential(nn.Conv2d(C, 8, 1))), "fc1 is a .*Sequential"),
    "width": (lambda: _with(SEModule(C), "fc2", nn.Conv2d(8, 2 * C, 1)), "the layers map 24 channels to 48"),
    "lazy": (lambda: _with(SEModule(C), "fc1", nn.LazyConv2d(8, 1)), "fc1 (is a .*Lazy|has hooks)"),
    "own forward": (lambda: _with(SEModule(C), "forward", lambda x: x), "has a forward of its own"),
    "own forward of a child": (
        lambda: (m := SEModule(C), setattr(m.act, "forward", lambda x: x))[0],
        "act has a forward of its own",
    ),
}


def _with(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    build, told = REFUSED[name]
    model = nn.Sequential(nn.Identity(), build())
    classes = [type(m) for m in model.modules()]
    report = fuse_(model)
    assert report.fused == []
    assert [n for n, _ in report.refused] == ["1"]
    assert re.search(told, report.refused[0][1])
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(RuntimeError, match="strict"):
        fuse_(model, strict=True)


def test_a_subclass_that_changes_nothing_is_fused() -> None:
    original = make(lambda: Renamed(C))
    module = copy.deepcopy(original)
    assert fuse_(module).fused == [""]
    assert isinstance(module, Renamed)
    assert_same_step(module, original, feature_map())


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate whose forward has another source isn't fused; a parent whose forward has: only its gate is."""

    def forward(self, x):
        return x

    forward.__module__, forward.__qualname__ = resnet.__name__, "Bottleneck.forward"
    monkeypatch.setattr(resnet.Bottleneck, "forward", forward)
    report = fuse_(Model())
    assert "body.0.se" in report.fused
    told = "forward of this version's timm.models.resnet.Bottleneck isn't one that is known"
    assert report.refused == [("body.0", told)]
    forward.__module__, forward.__qualname__ = SEModule.__module__, "SEModule.forward"
    monkeypatch.setattr(SEModule, "forward", forward)
    assert "this version's" in dict(fuse_(Model()).refused)["first"]


def test_a_wrapped_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SEModule.forward
    monkeypatch.setattr(SEModule, "forward", functools.wraps(kept)(lambda self, x: 2 * kept(self, x)))
    assert dict(fuse_(Model()).refused)["first"] == "forward of SEModule is wrapped"


def test_a_parent_with_an_unknown_activation_keeps_its_gate_fused() -> None:
    model = make(lambda: resnet.Bottleneck(C, C // 4, attn_layer="se", act_layer=nn.Mish))
    original = copy.deepcopy(model)
    report = fuse_(model, strict=True)
    assert report.fused == ["se"]
    assert report.refused == [("", "act3 is Mish(inplace=True), which no kernel has")]
    assert_same_step(model, original, feature_map(), within=1e-10)


def test_parents_without_a_gate() -> None:
    """Fused where a BatchNorm ends them, and not mentioned where nothing can be."""
    original = make(lambda: resnet.Bottleneck(C, C // 4))
    module = copy.deepcopy(original)
    report = fuse_(module)
    assert [(row.kind, row.part) for row in report.rows] == [("plain", "norm + act, norm + add + act")]
    assert_same_step(module, original, feature_map(), within=1e-10)
    assert fuse_(resnet.Bottleneck(C, C // 4, norm_layer=partial(nn.GroupNorm, 1))).rows == []
    assert fuse_(nn.Linear(2, 2)).rows == []
    assert str(fuse_(nn.Linear(2, 2))).startswith("nothing to fuse")


# ---- selection and failure


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, ALL),
        ({"only": "body"}, ["body.0", "body.0.se", "body.1"]),
        ({"only": "body.0.se"}, ["body.0.se"]),
        ({"only": ["first", "la*"]}, ["first", "last"]),
        ({"only": SEModule}, ["first", "body.0.se"]),
        ({"only": resnet.Bottleneck}, ["body.0", "body.0.se"]),
        ({"only": [EffectiveSEModule, "last"]}, ["body.1", "last"]),
        ({"skip": "body.*"}, ["first", "last"]),
        ({"skip": "body.0.se"}, ["first", "body.1", "last"]),
        ({"skip": resnet.Bottleneck}, ["first", "body.1", "last"]),
        ({"only": "*", "skip": ["first", SqueezeExcitation]}, ["body.0", "body.0.se", "body.1"]),
        ({"filter_fn": lambda module, name: "0" not in name}, ["first", "body.1", "last"]),
        ({"filter_fn": lambda module, name: isinstance(module, SEModule), "skip": "first"}, ["body.0.se"]),
    ],
)
def test_selection(arguments: dict, fused: list[str]) -> None:
    model = Model()
    assert fuse_(model, **arguments).fused == fused
    assert [n for n, m in model.named_modules() if isinstance(m, plan.Fused)] == fused
    assert fuse_(model).fused == ALL


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"only": "frist"}, ValueError, "only: no module's name matches 'frist'"),
        ({"skip": ["first", "x*"]}, ValueError, "skip: no module's name matches 'x"),
        ({"only": [3]}, TypeError, "only must hold names and classes; got 3"),
        ({"filter_fn": lambda module, name: 1 / 0}, ZeroDivisionError, ""),
        ({"example_inputs": torch.randn(2, 3, 4, 4)}, RuntimeError, ""),
        ({"example_inputs": (1, 2)}, TypeError, ""),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(arguments: dict, error: type, told: str) -> None:
    model = Model()
    classes, attributes = [type(m) for m in model.modules()], [list(vars(m)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=told):
        fuse_(model, **arguments)
    assert [type(m) for m in model.modules()] == classes
    assert [list(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    classes = [type(m) for m in model.modules()]
    real, made = fused_attn.convert.fused_class, []

    def failing(*args):
        made.append(args)
        if len(made) == 3:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(fused_attn.convert, "fused_class", failing)
    with pytest.raises(MemoryError):
        fuse_(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any(plan.KEY in vars(m) for m in model.modules())


def test_the_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got dict"):
        fuse_({})


# ---- example inputs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_example_inputs_are_compared_and_timed(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_SECONDS", 0.01)
    model = make(Model).float().train(training)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    report = fuse_(model, example_inputs=feature_map(dtype=torch.float32))
    assert report.fused == ALL
    assert set(report.errors) == {"output", "gradients", "buffers"}
    assert all(values["float64"] < 1e-7 and values["fused"] < 1e-5 for values in report.errors.values())
    assert set(report.speed) == {"forward", "forward+backward"}
    assert "fused ms" in str(report)
    assert "float64" in str(report)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("zero", [False, True], ids=["awake", "zero-initialised"])
def test_example_inputs_catch_a_wrong_conversion(zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 % in one gate, even where a zero-initialised norm hides it at the moment."""
    excite = fused_attn.blocks.squeeze_excite.ExcitePlan.excite
    monkeypatch.setattr(
        fused_attn.blocks.squeeze_excite.ExcitePlan, "excite", lambda self, *rest: 1.01 * excite(self, *rest)
    )
    model = make(lambda: nn.Sequential(resnet.Bottleneck(C, C // 4, attn_layer="se"), nn.Conv2d(C, 3, 1))).float()
    if zero:
        nn.init.zeros_(model[0].bn3.weight)
        nn.init.zeros_(model[0].bn3.bias)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="differs on the example inputs"):
        fuse_(model, example_inputs=feature_map(dtype=torch.float32))
    assert [type(m) for m in model.modules()] == classes


def test_example_inputs_of_a_model_that_draws_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_SECONDS", 0.01)
    model = make(lambda: nn.Sequential(SEModule(C), nn.Dropout(0.5), SEModule(C))).float()
    report = fuse_(model, example_inputs=(feature_map(dtype=torch.float32),))
    assert report.errors["output"]["fused"] < 1e-5


# ---- compilers and tracers


@pytest.mark.parametrize(
    "name", ["SEModule", "SEModule norm add_maxpool", "SqueezeExciteCl", "torchvision", "resnet.Bottleneck"]
)
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    original = make({**MODULES, **PARENTS}[name])
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map(channels_last="Cl" in name)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert relative(compiled(x), original(x)) < 1e-12
    for (_, a), (_, b) in zip(module.named_buffers(), original.named_buffers(), strict=True):
        assert relative(a, b) < 1e-12


def test_compiled_with_a_hook_on_a_child_calls_it() -> None:
    torch._dynamo.reset()
    module = make(MODULES["SEModule"])
    fuse_(module)
    plain = module(feature_map())
    module.fc1.register_forward_hook(lambda m, i, o: 3 * o)
    y = torch.compile(module, backend="eager", fullgraph=True)(feature_map())
    assert relative(y, module(feature_map())) < 1e-12
    assert relative(y, plain) > 1e-3


def test_traced_symbolically_traced_and_exported() -> None:
    original = make(PARENTS["resnet.Bottleneck"]).eval()
    module = copy.deepcopy(original)
    fuse_(module)
    x = feature_map()
    graph = torch.fx.symbolic_trace(module)
    assert "pool_mlp_scale" in graph.code
    exported = torch.export.export(module, (x,))
    assert "pool_mlp_scale" in str(exported.graph)
    for other in (torch.jit.trace(module, x), graph, exported.module()):
        assert relative(other(x), original(x)) < 1e-12


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    assert fuse_(model).fused == ALL
    assert model(torch.empty(2, C, 5, 5, device="meta")).shape == (2, C, 5, 5)


# ---- explain


def test_explain_a_model() -> None:
    model = make(Model)
    x = feature_map()
    before = explain(model, x)
    assert {line.reason for line in before.lines} == {"not converted: call fuse_"}
    fuse_(model, skip="last")
    state = copy.deepcopy(model.state_dict())
    told = explain(model, x)
    ops = {name: [line.op for line in told.lines if line.module == name] for name in ALL}
    assert ops.pop("body.0")[-4:] == ["channel_moments", "batch_affine", "shared_mlp", "affine_apply"]
    assert ops == {"first": ["pool_mlp_scale"], "body.0.se": [], "body.1": ["pool_mlp_scale"], "last": [""]}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    text = str(told)
    assert all(word in text for word in ("pool_mlp_scale", "4×24×6×5 float64", "unfused", "not converted"))
    assert repr(told) == f"<Explanation: {len(told.lines) - 1} op calls, 1 modules unfused>"
    with fused_attn.use_backend("eager"):
        assert explain(model, x).lines[0].reason == "forced"


def test_explain_refusals_and_ops() -> None:
    model = nn.Sequential(SEModule(C, gate_layer="tanh"))
    fuse_(model)
    assert "gate is Tanh" in explain(model, feature_map(dtype=torch.float32)).lines[0].reason
    lines = explain(fused_attn.ops.scale, feature_map(), torch.randn(4, C, dtype=F64)).lines
    assert [(line.module, line.op) for line in lines] == [("", "scale")]
    assert "no op" in str(explain(nn.Identity(), 1))


def test_explain_leaves_no_hooks() -> None:
    model = make(Model)
    fuse_(model)
    with pytest.raises(ValueError, match="w1"):
        explain(model, torch.randn(2, C + 1, 3, 3, dtype=F64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not plan.unfused_observers
