"""ECA against timm's EcaModule and CecaModule: outputs, gradients of x and of every parameter, every option."""

import re

import pytest
import torch
from torch import nn

from fused_attn import ECA, fuse_, testing, unfuse_
from tests.support import assert_same_step, redraw, relative, step

eca = pytest.importorskip("timm.layers.eca")
F64 = torch.float64

OPTIONS = {
    "channels": dict(channels=24),
    "many channels": dict(channels=300),
    "gamma, beta": dict(channels=300, gamma=1, beta=3),
    "kernel_size": dict(kernel_size=7),
    "hard_sigmoid": dict(kernel_size=5, gate_layer="hard_sigmoid"),
    "gate relu": dict(kernel_size=5, gate_layer=nn.ReLU),
    "act_layer alone does nothing": dict(channels=24, act_layer=nn.ReLU),
    "mlp": dict(channels=24, use_mlp=True),
    "mlp, rd_ratio, silu": dict(channels=300, use_mlp=True, rd_ratio=0.5, act_layer=nn.SiLU),
    "mlp, rd_channels, gelu": dict(channels=24, use_mlp=True, rd_channels=3, act_layer=nn.GELU),
    "mlp, rd_divisor": dict(channels=300, use_mlp=True, rd_divisor=1, act_layer="leaky_relu"),
    "circular": dict(channels=24, circular=True),
    "circular, bias": dict(channels=24, circular=True, act_layer=nn.ReLU),
    "circular, kernel_size": dict(kernel_size=9, circular=True, gate_layer="hard_sigmoid"),
}
# F.hardsigmoid's backward rounds 1/6 to float32
within = lambda name: 1e-6 if "hard" in str(OPTIONS[name]) else 1e-12


def theirs(name):
    options = dict(OPTIONS[name])
    cls = eca.CecaModule if options.pop("circular", False) else eca.EcaModule
    return redraw(cls(**options).double())


def feature_map(name, *size, dtype=F64):
    draw = torch.Generator().manual_seed(5)
    c = OPTIONS[name].get("channels", 24)
    return (torch.randn(3, c, *(size or (7, 5)), generator=draw, dtype=F64) + torch.randn(
        3, c, *(1 for _ in size or (7, 5)), generator=draw, dtype=F64
    )).to(dtype)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_eca_is_timms(name):
    reference = theirs(name)
    module = ECA(**OPTIONS[name]).double()
    module.load_state_dict(reference.state_dict(), strict=True)
    assert list(module.state_dict()) == list(reference.state_dict())
    assert_same_step(module, reference, feature_map(name), within=within(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_timms_module_is_converted(name):
    reference, module = theirs(name), theirs(name)
    report = fuse_(module)
    assert type(module).__name__.startswith("Fused"), str(report)
    assert_same_step(module, reference, feature_map(name), within=within(name))
    unfuse_(module)
    assert type(module) is type(reference)


@pytest.mark.parametrize("name", ["channels", "mlp", "circular, bias"])
def test_the_equations_are_the_op(name):
    """With a hook on a child the module runs its children: the same numbers, in 1, 2 and 3 dimensions."""
    module = redraw(ECA(**OPTIONS[name]).double())
    for size in ((13,), (7, 5), (3, 4, 5)):
        x = feature_map(name, *size)
        fused, calls = module(x, x, "relu"), []
        with module.conv.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            plain = module(x, x, "relu")
        assert calls
        assert relative(fused, plain) < 1e-12


def test_a_residual_behind_it():
    module = redraw(ECA(channels=24).double())
    reference = eca.EcaModule(channels=24).double()
    reference.load_state_dict(module.state_dict())
    x = feature_map("channels")

    class Tail(nn.Module):
        def __init__(self, inner, run):
            super().__init__()
            self.inner, self.run = inner, run

        def forward(self, x, r):
            return self.run(self.inner, x, r)

    ours = Tail(module, lambda m, x, r: m(x, r, "relu"))
    plain = Tail(reference, lambda m, x, r: torch.relu(m(x) + r))
    assert_same_step(ours, plain, x, x.flip(0))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "gate", nn.Tanh()), "gate is Tanh"),
        (lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 3)), "conv is Conv1d"),
        (lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 3, padding=2, dilation=2)), "conv is Conv1d"),
        (lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")), "conv is Conv1d"),
        (lambda m: setattr(m, "conv", nn.Identity()), "conv is a .*Identity"),
    ],
)
def test_what_is_not_understood_is_refused(change, why):
    module = eca.EcaModule(24)
    change(module)
    report = fuse_(module)
    assert type(module) is eca.EcaModule
    assert re.search(why, str(report))


def test_wrong_arguments():
    for options, told in [
        (dict(kernel_size=4), "odd"),
        (dict(use_mlp=True), "channels"),
        (dict(gate_layer="tanh"), "gate_layer"),
        (dict(channels=24, use_mlp=True, act_layer=nn.PReLU), "act is"),
    ]:
        with pytest.raises(ValueError, match=told):
            ECA(**options)


def test_ecaresnet_is_fused_with_its_tails():
    """Every bottleneck of timm's ecaresnet: gate, shortcut and ReLU in one op; the same step."""
    timm = pytest.importorskip("timm")
    model = redraw(timm.create_model("ecaresnet26t", num_classes=7)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=F64)
    want, want_grads = step(model, x)
    report = fuse_(model)
    gates = [m for m in model.modules() if isinstance(m, eca.EcaModule)]
    parents = [m for m in model.modules() if type(m).__name__ == "FusedBottleneck"]
    assert len(gates) == len(parents) == 8, str(report)
    seen = []
    with testing.backends.observe(seen.append):
        got, grads = step(model, x)
    assert sum(c.op == "moments_affine_apply" for c in seen) >= 8
    assert not any(c.op == "pool_conv_scale" for c in seen)
    assert relative(got, want) < 1e-10
    for name, grad in grads.items():
        assert relative(grad, want_grads[name]) < 1e-8, name
