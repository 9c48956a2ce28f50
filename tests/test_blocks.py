"""SqueezeExcite and EffectiveSE against timm's modules, which take the same state_dict, and against the equations."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_attn import BLOCKS, EffectiveSE, SqueezeExcite, ops
from tests.support import assert_same_step, redraw, relative, step

squeeze_excite = pytest.importorskip("timm.layers.squeeze_excite")
F64 = torch.float64

OPTIONS = {
    "default": {},
    "rd_ratio": {"rd_ratio": 0.5},
    "rd_channels": {"rd_channels": 5},
    "rd_divisor": {"rd_divisor": 4},
    "add_maxpool": {"add_maxpool": True},
    "no bias": {"bias": False},
    "silu": {"act_layer": nn.SiLU},
    "gelu, no bias": {"act_layer": nn.GELU, "bias": False},
    "leaky_relu": {"act_layer": "leaky_relu"},
    "relu6": {"act_layer": "relu6"},
    "hard_swish": {"act_layer": "hard_swish"},
    "prelu": {"act_layer": "prelu"},
    "identity": {"act_layer": "identity"},
    "hard_sigmoid": {"gate_layer": "hard_sigmoid"},
    "gate relu": {"gate_layer": nn.ReLU},
    "gate prelu": {"gate_layer": nn.PReLU},
    "gate identity": {"gate_layer": nn.Identity},
    "norm": {"norm_layer": nn.BatchNorm2d},
    "norm, add_maxpool": {"norm_layer": nn.BatchNorm2d, "add_maxpool": True, "act_layer": "silu"},
}
ESE_OPTIONS = {
    "default": {},
    "add_maxpool": {"add_maxpool": True},
    "sigmoid": {"gate_layer": "sigmoid"},
    "gate prelu": {"gate_layer": nn.PReLU},
}
# The pooled means vary little around 0: spread them, so that every branch of an activation is taken.
SHAPES = {1: (4, 24, 13), 2: (4, 24, 7, 5), 3: (4, 24, 3, 4, 5)}


def feature_map(dims: int = 2, dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    n, c, *s = SHAPES[dims]
    offset = torch.randn(n, c, *(1 for _ in s), generator=draw, dtype=F64)
    return (2 * offset + torch.randn(SHAPES[dims], generator=draw, dtype=F64)).to(dtype)


def pair(ours: type, options: dict, dtype: torch.dtype = F64) -> tuple[nn.Module, nn.Module]:
    """Our module and timm's, with the same numbers by a strict load."""
    theirs = {SqueezeExcite: squeeze_excite.SEModule, EffectiveSE: squeeze_excite.EffectiveSEModule}[ours]
    reference = redraw(theirs(24, **options, dtype=dtype))
    module = ours(24, **options, dtype=dtype)
    for m in (module, reference):  # timm's create_act_layer makes slopes of prelu in the default dtype
        m.to(dtype)
    module.load_state_dict(reference.state_dict(), strict=True)
    assert list(module.state_dict()) == list(reference.state_dict())
    return module, reference


def bias_before_norm(options: dict) -> tuple[str, ...]:
    return ("fc1.bias",) if "norm_layer" in options else ()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPTIONS)
def test_squeeze_excite_is_timms(name: str, training: bool) -> None:
    module, reference = pair(SqueezeExcite, OPTIONS[name])
    zero = bias_before_norm(OPTIONS[name]) if training else ()
    # 1e-6: F.hardsigmoid's backward rounds 1/6 to float32
    within = 1e-6 if "hard" in name else 1e-12
    assert_same_step(module.train(training), reference.train(training), feature_map(), within=within, zero=zero)


@pytest.mark.parametrize("name", ESE_OPTIONS)
def test_effective_se_is_timms(name: str) -> None:
    module, reference = pair(EffectiveSE, ESE_OPTIONS[name])
    assert_same_step(module, reference, feature_map(), within=1e-6)


@pytest.mark.parametrize(("ours", "options"), [(SqueezeExcite, OPTIONS), (EffectiveSE, ESE_OPTIONS)])
def test_every_option_changes_the_output(ours: type, options: dict[str, dict]) -> None:
    x = 4 * feature_map()  # beyond relu6's corner, too
    seen: dict[str, Tensor] = {}
    for name, chosen in options.items():
        torch.manual_seed(0)
        y = redraw(ours(24, **chosen, dtype=F64).to(F64).eval())(x)
        for other, z in seen.items():
            assert relative(y, z) > 1e-4, f"{name} gives what {other} gives"
        seen[name] = y


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("add_maxpool", [False, True])
@pytest.mark.parametrize("block", [SqueezeExcite, EffectiveSE])
def test_other_dimensions_are_the_flattened_ones(block: type, add_maxpool: bool, dims: int) -> None:
    module, reference = pair(block, {"add_maxpool": add_maxpool})

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = reference

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(2).unsqueeze(-1)).reshape(x.shape)

    y, grads = step(module, feature_map(dims))
    want, want_grads = step(Flat(), feature_map(dims))
    assert relative(y, want) < 1e-6
    for (name, grad), expected in zip(grads.items(), want_grads.values(), strict=True):
        assert relative(grad, expected) < 1e-6, name


@pytest.mark.parametrize("epilogue", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_and_epilogue(epilogue: str, residual: bool) -> None:
    module, reference = pair(SqueezeExcite, {})
    x, r = feature_map().requires_grad_(), feature_map().flip(0).requires_grad_() if residual else None
    y = module(x, r, epilogue)
    v = reference(x) if r is None else reference(x) + r
    want = {"identity": lambda t: t, "relu": torch.relu, "silu": nn.functional.silu}[epilogue](v)
    assert relative(y, want) < 1e-12
    inputs = [x, *module.parameters(), *([r] if residual else [])]
    others = [x, *reference.parameters(), *([r] if residual else [])]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(want.square().sum(), others), strict=True
    ):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes(dtype: torch.dtype, memory_format: torch.memory_format, weights: str) -> None:
    module, reference = pair(SqueezeExcite, {}, torch.float32 if weights == "float32" else dtype)
    x = feature_map(dtype=dtype).contiguous(memory_format=memory_format)
    y, grads = step(module, x)
    want, want_grads = step(reference.double(), x.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    unit = torch.finfo(dtype).eps
    assert relative(y, want) < 2 * unit
    for name, grad in grads.items():
        assert grad.dtype == (dtype if name == "input 0" or weights == "same" else torch.float32)
        assert relative(grad, want_grads[name]) < 8 * unit, name


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0, None])
def test_running_statistics(momentum: float | None) -> None:
    norm = lambda h, **dd: nn.BatchNorm2d(h, momentum=momentum, **dd)
    module, reference = pair(SqueezeExcite, {"norm_layer": norm})
    for i in range(3):
        x = feature_map() * (i + 1)
        assert relative(module(x), reference(x)) < 1e-12
    assert int(module.bn.num_batches_tracked) == 3
    assert relative(module.bn.running_mean, reference.bn.running_mean) < 1e-12
    assert relative(module.bn.running_var, reference.bn.running_var) < 1e-12
    assert relative(module.eval()(x), reference.eval()(x)) < 1e-12


def test_norm_variants() -> None:
    """A norm's own mode decides, not the block's; without running statistics it uses the batch's, always."""
    x = feature_map()
    for norm in (
        lambda h, **dd: nn.BatchNorm2d(h, affine=False, **dd),
        lambda h, **dd: nn.BatchNorm2d(h, track_running_stats=False, **dd),
        lambda h, **dd: nn.BatchNorm2d(h, eps=0.1, **dd),
    ):
        for frozen in (False, True):
            module, reference = pair(SqueezeExcite, {"norm_layer": norm})
            if frozen:
                module.bn.eval()
                reference.bn.eval()
            before = copy.deepcopy(module.state_dict())
            assert relative(module(x), reference(x)) < 1e-12
            changed = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
            assert (
                changed == [k for k, v in reference.state_dict().items() if not torch.equal(v, before[k])] or not frozen
            )
            for key, value in reference.state_dict().items():
                assert torch.allclose(module.state_dict()[key], value, rtol=1e-12), key


def test_a_batch_of_one_cannot_be_normalised() -> None:
    module = SqueezeExcite(24, norm_layer=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="more than 1"):
        module(torch.randn(1, 24, 5, 5))
    assert torch.equal(module.bn.running_mean, torch.zeros(8))
    module.eval()(torch.randn(1, 24, 5, 5))


@pytest.mark.parametrize(
    ("block", "options", "told"),
    [
        (SqueezeExcite, {"act_layer": "mish"}, "act_layer must be one of .* got 'mish'"),
        (SqueezeExcite, {"act_layer": nn.Mish}, "act is Mish"),
        (SqueezeExcite, {"act_layer": lambda: nn.GELU("tanh")}, "act is GELU"),
        (SqueezeExcite, {"gate_layer": "tanh"}, "gate_layer must be one of .* got 'tanh'"),
        (SqueezeExcite, {"gate_layer": nn.SiLU}, "gate is SiLU"),
        (SqueezeExcite, {"act_layer": 3}, "act_layer must be a name or a module class"),
        (SqueezeExcite, {"norm_layer": lambda h, **dd: nn.GroupNorm(1, h, **dd)}, "bn is a .*GroupNorm"),
        (EffectiveSE, {"gate_layer": "softmax"}, "gate_layer must be one of"),
        (EffectiveSE, {"gate_layer": nn.Tanh}, "gate is Tanh"),
    ],
)
def test_unknown_options_are_refused(block: type, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        block(24, **options)


def test_hidden_width_is_timms() -> None:
    for channels in (3, 8, 40, 64, 72, 96, 160, 200, 576, 1000, 2048):
        for ratio in (1 / 16, 1 / 8, 0.25, 0.5):
            for divisor in (1, 4, 8):
                kwargs = {"rd_ratio": ratio, "rd_divisor": divisor, "device": "meta"}
                ours, theirs = SqueezeExcite(channels, **kwargs), squeeze_excite.SEModule(channels, **kwargs)
                assert ours.fc1.weight.shape == theirs.fc1.weight.shape


@pytest.mark.parametrize("name", OPTIONS)
def test_the_equations_are_the_op(name: str) -> None:
    """Where something hangs on a child, the module runs its children instead: the same numbers."""
    module = redraw(SqueezeExcite(24, **OPTIONS[name], dtype=F64).to(F64).eval())
    for dims in (1, 2, 3):
        x = feature_map(dims)
        fused = module(x, x, "relu")
        calls = []
        with module.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            plain = module(x, x, "relu")
        assert calls
        assert relative(fused, plain) < 1e-12


def test_copies_and_pickles(tmp_path) -> None:
    module = redraw(SqueezeExcite(24, norm_layer=nn.BatchNorm2d).eval())
    x = feature_map(dtype=torch.float32)
    torch.save(module, tmp_path / "m.pt")
    for twin in (copy.deepcopy(module), torch.load(tmp_path / "m.pt", weights_only=False)):
        assert torch.equal(twin(x), module(x))
        with torch.no_grad():
            twin.fc1.weight.zero_()
        assert not torch.equal(twin(x), module(x))


def test_compiles_in_one_graph() -> None:
    x = feature_map(dtype=torch.float32)
    for module in (SqueezeExcite(24, act_layer="silu"), SqueezeExcite(24, norm_layer=nn.BatchNorm2d), EffectiveSE(24)):
        torch._dynamo.reset()
        twin = copy.deepcopy(module)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert relative(compiled(x, x, "relu"), twin(x, x, "relu")) < 1e-6
        assert [b.tolist() for b in module.buffers()] == [b.tolist() for b in twin.buffers()]


@pytest.mark.parametrize("name", ["squeeze_excite", "effective_se"])
def test_declaration(name: str) -> None:
    block = BLOCKS[name]
    assert all(op in ops.__all__ for op in block.ops)
    assert len(block.cases) >= 3
    for case in block.cases:
        module = redraw(block.module(**case.args["args"]).double())
        y, grads = step(module, torch.randn(case.args["x"], dtype=F64))
        assert y.shape == case.args["x"]
        assert all(grad.isfinite().all() for grad in grads.values())
