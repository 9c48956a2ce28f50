"""What several test files share: the foreign libraries, made importable, and small measures."""

import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn


def allow_torchvision() -> None:
    """Makes `import torchvision` work beside a CPU build of torch, and does nothing where it works already.

    There torchvision's compiled operators can't load, and registering fakes for them raises; an empty module in place
    of the registrations is enough for models, which use none of them.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error) or "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")


allow_torchvision()


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and buffer anew, so that all of them matter and activations stay O(1).

    Zoo models are initialised so that attention has no effect: a zero last norm, a zero skip gain.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = lambda t, scale: t.copy_(torch.randn(t.shape, generator=draw, dtype=torch.float64) * scale)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            normal(p, (2 / p[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            p.copy_(0.5 + torch.rand(p.shape, generator=draw, dtype=torch.float64))
        else:
            normal(p, 0.2)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            normal(b, 0.1)
        elif name.endswith("running_var"):
            b.copy_(1 + torch.rand(b.shape, generator=draw, dtype=torch.float64))
    return model


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Sets the running statistics to about what they are on x, so that no layer drowns in the biases of the next."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, training = [m.momentum for m in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()(x)
    model.train(training)
    draw = torch.Generator().manual_seed(3)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        # A channel that a ReLU closed on x has no variance, and would shout where it opens on another.
        norm.running_var.clamp_(min=0.05 * float(norm.running_var.mean()))
        norm.running_var *= 0.8 + 0.4 * torch.rand(norm.running_var.shape, generator=draw).to(norm.running_var)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64."""
    a, b = found.detach().double(), expected.detach().double()
    assert a.shape == b.shape
    off, norm = float((a - b).norm()), float(b.norm())
    return off / norm if norm else off


def step(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward: the output, and the gradients by name of inputs and parameters that have one."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    y = module(*inputs)
    draw = torch.Generator().manual_seed(99)
    weigh = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype)
    named = [(f"input {i}", x) for i, x in enumerate(inputs)] + list(module.named_parameters())
    grads = torch.autograd.grad((y * weigh).sum(), [t for _, t in named], allow_unused=True)
    return y.detach(), {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert list(found) == list(expected)
    return max(relative(found[name], expected[name]) for name in expected)


def assert_same_step(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, within: float = 1e-12, zero: Iterable[str] = ()
) -> None:
    """Output, gradients and buffers agree. zero: names of gradients that are zero but for rounding."""
    y, grads = step(ours, *inputs)
    want, want_grads = step(theirs, *inputs)
    assert (y.dtype, y.shape, y.stride()) == (want.dtype, want.shape, want.stride())
    assert relative(y, want) < within
    assert list(grads) == list(want_grads)
    for name, grad in grads.items():
        if name in zero:
            assert float(grad.abs().max()) < 1e-10
        else:
            assert relative(grad, want_grads[name]) < within, name
    for (name, buffer), (other, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        assert relative(buffer, expected) < within, name
