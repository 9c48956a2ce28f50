"""Shrinkage against the published equations and the form that ports have."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_attn import BLOCKS, Shrinkage
from tests.support import redraw, relative, step

F64 = torch.float64
SHAPES = {1: (4, 12, 13), 2: (4, 12, 7, 5), 3: (4, 12, 3, 4, 5)}
OPTIONS = {
    "channel": {},
    "shared": {"threshold": "shared"},
    "narrow": {"rd_ratio": 0.25},
    "without norm": {"rd_channels": 5, "norm_layer": None},
    "narrow, shared": {"rd_channels": 3, "threshold": "shared"},
}


def feature_map(dims: int = 2, dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(SHAPES[dims], generator=draw, dtype=F64).to(dtype)


class Port(nn.Module):
    """The unit's shrinkage as ports write it: max(sub, sub − sub)."""

    def __init__(self, fc: nn.Module, shared: bool) -> None:
        super().__init__()
        self.fc, self.shared = fc, shared

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        x_abs = torch.abs(x)
        gap = x_abs.flatten(2).mean(2)
        average = gap.mean(1, keepdim=True) if self.shared else gap
        threshold = (average * self.fc(gap))[(...,) + (None,) * (x.dim() - 2)]
        sub = x_abs - threshold
        y = torch.sign(x) * torch.max(sub, sub - sub)
        return y if identity is None else y + identity


def pair(name: str, training: bool = True) -> tuple[Shrinkage, Port]:
    module = redraw(Shrinkage(12, **OPTIONS[name], dtype=F64)).train(training)
    twin = copy.deepcopy(module)
    return module, Port(twin.fc, twin.threshold == "shared").train(training)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPTIONS)
def test_ports_form(name: str, training: bool, dims: int) -> None:
    module, port = pair(name, training)
    x, identity = feature_map(dims), feature_map(dims).flip(0)
    for inputs in ((x,), (x, identity)):
        y, grads = step(module, *inputs)
        want, expected = step(port, *inputs)
        assert relative(y, want) < 1e-12
        assert list(grads) == list(expected)
        for key, grad in grads.items():
            if training and key == "fc.0.bias" and module.fc[1].__class__ is not nn.Identity:
                assert float(grad.abs().max()) < 1e-10  # a batch norm takes it away again
            else:
                assert relative(grad, expected[key]) < 1e-11, key
    for (key, value), other in zip(module.state_dict().items(), port.state_dict().values(), strict=True):
        assert relative(value, other) < 1e-12, key


def test_every_option_changes_the_output() -> None:
    seen: dict[str, Tensor] = {}
    for name in OPTIONS:
        y = pair(name, False)[0](feature_map())
        for other, z in seen.items():
            assert relative(y, z) > 1e-4, f"{name} gives what {other} gives"
        seen[name] = y


@pytest.mark.parametrize("name", OPTIONS)
def test_the_equations_are_the_op(name: str) -> None:
    """Where something hangs on a layer, the module runs its layers instead: the same numbers."""
    module = pair(name, False)[0]
    x = feature_map()
    fused, calls = module(x, x), []
    with module.fc[0].register_forward_hook(lambda *_: calls.append(1)):
        plain = module(x, x)
    assert calls
    assert relative(fused, plain) < 1e-12


def test_a_layer_that_is_replaced_is_seen() -> None:
    module = pair("channel", False)[0]
    x = feature_map()
    before = module(x)
    module.fc[0] = redraw(nn.Linear(12, 12, dtype=F64), seed=7)
    assert relative(module(x), before) > 1e-4
    module.fc[4] = nn.Hardsigmoid()
    m = x.abs().mean((2, 3))
    tau = (module.fc(m) * m)[..., None, None]
    assert relative(module(x), x.sign() * torch.relu(x.abs() - tau)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    module = redraw(Shrinkage(12))
    x = feature_map(dtype=dtype).contiguous(memory_format=memory_format)
    y, grads = step(module, x)
    twin = copy.deepcopy(module).double()
    want, expected = step(twin, x.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    unit = torch.finfo(dtype).eps
    assert relative(y, want) < 2 * unit
    for name, grad in grads.items():
        if name != "fc.0.bias":
            assert relative(grad, expected[name]) < 8 * max(unit, 1e-6), name


def test_compiles_in_one_graph() -> None:
    x = feature_map()
    for name in ("channel", "shared"):
        torch._dynamo.reset()
        module = redraw(Shrinkage(12, **OPTIONS[name], dtype=F64))
        twin = copy.deepcopy(module)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        got, want = compiled(inputs[0], x), twin(inputs[1], x)
        assert relative(got, want) < 1e-12
        got.square().sum().backward(), want.square().sum().backward()
        assert relative(inputs[0].grad, inputs[1].grad) < 1e-10
        for (key, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            assert key == "fc.0.bias" or relative(p.grad, q.grad) < 1e-10, key
        for b, c in zip(module.buffers(), twin.buffers(), strict=True):
            assert relative(b, c) < 1e-12


def test_refusals() -> None:
    with pytest.raises(ValueError, match="threshold must be one of"):
        Shrinkage(8, threshold="spatial")
    with pytest.raises(ValueError, match=r"fc.1 is a .*LayerNorm"):
        Shrinkage(8, norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match="more than 1"):
        Shrinkage(8)(torch.randn(1, 8, 5))


def test_declaration() -> None:
    for case in BLOCKS["shrinkage"].cases:
        module = redraw(Shrinkage(**case.args["args"]).double())
        y, grads = step(module, torch.randn(case.args["x"], dtype=F64))
        assert y.shape == case.args["x"]
        assert all(grad.isfinite().all() for grad in grads.values())
