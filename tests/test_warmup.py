"""warmup runs everything that a first call would, forward and backward, and leaves everything as it was."""

import copy
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import SqueezeExcite, backend, fuse_, ops, use_backend, warmup
from fused_attn.explain import Explanation

ROOT = Path(__file__).resolve().parent.parent
C = 24


class Net(nn.Module):
    """Gates, one with a norm, beside layers with running statistics and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Dropout(0.3)
        self.first, self.second = SqueezeExcite(C), SqueezeExcite(C, norm_layer=nn.BatchNorm2d)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unset", None)
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
        self.calls += 1
        self.replaced = torch.ones(2)
        random.random()
        y = self.drop(self.first(self.norm(self.stem(x))) * scale)
        return {"features": [y], "out": self.second(y), "count": 1}


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def op_names(told: Explanation) -> list[str]:
    return [line.op for line in told.lines if line.op]


FORWARD, BACKWARD = ["pool_mlp_scale"] * 2, ["pool_mlp_scale_bwd"] * 2


def test_it_runs_forward_then_forward_and_backward() -> None:
    told = warmup(Net(), images(), scale=0.5)
    assert op_names(told) == FORWARD + FORWARD + BACKWARD
    assert [line.module for line in told.lines[:4]] == ["first", "second"] * 2
    assert "pool_mlp_scale_bwd" in str(told)


def test_only_forward_where_nothing_needs_a_gradient() -> None:
    model, x = Net(), images()
    with torch.no_grad():
        assert op_names(warmup(model, x)) == FORWARD
    with torch.inference_mode():
        assert op_names(warmup(model, x)) == FORWARD
    model.requires_grad_(False)
    assert op_names(warmup(model, x)) == FORWARD
    assert op_names(warmup(model, x.requires_grad_())) == FORWARD * 2 + BACKWARD
    assert x.grad is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_everything_is_as_it_was(training: bool) -> None:
    model, x = Net().train(training), images()
    model(x)["out"].sum().backward()
    pending = model(x)["out"].square().sum()  # a graph that still has to run backward
    before = {name: (t, t.detach().clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    state, python, given = torch.get_rng_state(), random.getstate(), x.clone()
    modes = [m.training for m in model.modules()]

    warmup(model, x)

    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.equal(x, given)
    assert [m.training for m in model.modules()] == modes
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, value, _) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value), name
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not backend._observers
    if not training:  # in training, its own forward writes to what the pending graph has kept
        pending.backward()


def test_numpy_random_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    numpy.random.seed(3)
    warmup(lambda: numpy.random.random())
    drawn = numpy.random.random()
    numpy.random.seed(3)
    assert drawn == numpy.random.random()


def test_an_error_leaves_everything_as_it_was_too() -> None:
    model = Net()

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> None:
            self.model(x)
            raise KeyError("after the forward")

    x = images()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyError, match="after the forward"):
        warmup(Failing(), x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not backend._observers
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_that_wait_for_gradients_are_not_called() -> None:
    """An optimizer in backward would step."""
    model, called = Net(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(called.append)
    warmup(model, images())
    assert not called


def test_any_callable() -> None:
    x, gate = torch.randn(2, 3, 4, 4), torch.rand(2, 3, requires_grad=True)
    assert op_names(warmup(ops.scale, x, gate, act="relu")) == ["scale", "scale", "scale_bwd"]
    assert gate.grad is None
    before = x.clone()
    assert op_names(warmup(lambda x: x.mul_(2), x)) == []
    assert torch.equal(x, before)


def test_it_runs_on_the_backend_and_in_the_dtype_of_the_call() -> None:
    x = torch.randn(2, C, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    with use_backend("eager"):
        told = warmup(SqueezeExcite(C).bfloat16(), x)
    assert {(line.backend, line.reason, line.dtype) for line in told.lines} == {("eager", "forced", torch.bfloat16)}


def test_it_tells_of_what_is_not_fused() -> None:
    squeeze_excite = pytest.importorskip("timm.layers.squeeze_excite")
    model = nn.Sequential(squeeze_excite.SEModule(C), squeeze_excite.SEModule(C))
    assert fuse_(model, only="0").fused == ["0"]
    lines = warmup(model, torch.randn(2, C, 4, 4)).lines
    assert [(line.module, line.backend == "unfused") for line in lines] == [
        ("0", False), ("0", False), ("", False), ("1", True),
    ]  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_compiled_is_compiled_once(in_place: bool) -> None:
    """The hooks by which explain names modules would be compiled in, and the next call would compile again."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(SqueezeExcite(C))
    if in_place:
        model.compile(backend=compiler)
    else:
        model = torch.compile(model, backend=compiler)
    x = torch.randn(2, C, 5, 5)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # so that it compiles again for other hooks
        assert "pool_mlp_scale" in op_names(warmup(model, x))
        assert len(graphs) == 2  # without and with gradients
        model(x)
        with torch.no_grad():
            model(x)
    assert len(graphs) == 2


RUN = """
import torch, fused_attn
model = torch.nn.Sequential(fused_attn.SqueezeExcite(24), fused_attn.SqueezeExcite(24))
fused_attn.warmup(model, torch.randn(2, 24, 5, 5))
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to stderr where that is a terminal of 120 columns."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stderr=theirs, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    os.set_blocking(ours, False)
    try:
        written = os.read(ours, 1 << 16).decode()
    except BlockingIOError:
        written = ""
    finally:
        os.close(ours)
        os.close(theirs)
    assert run.returncode == 0, written
    return written


def test_the_progress_line() -> None:
    pytest.importorskip("tqdm")
    written = on_a_terminal(RUN)
    assert "6/6" in written
    assert "pool_mlp_scale_bwd 2×24×5×5" in written
    quiet = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (quiet.returncode, quiet.stderr, quiet.stdout) == (0, "", "")


def test_no_progress_line_without_tqdm() -> None:
    assert on_a_terminal("import sys; sys.modules['tqdm'] = None" + RUN) == ""
