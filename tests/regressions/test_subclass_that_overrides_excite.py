"""A subclass of a block of ours that overrides `squeeze` or `excite`, and not `forward`, ran as if it didn't.

Cause: `plan.renew` made a plan for whatever class has a `_plan`, by its children alone. Issue 3.
"""

import copy

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import EffectiveSE, SqueezeExcite, explain, fuse_


class Doubled(SqueezeExcite):
    def excite(self, p):
        return 2 * super().excite(p)


class Maximum(EffectiveSE):
    def squeeze(self, x):
        return x.amax((2, 3), keepdim=True)


class Quiet(SqueezeExcite):
    """Overrides what no plan stands for."""

    def extra_repr(self):
        return "quiet"


def why(module: nn.Module, x: torch.Tensor) -> list[str]:
    return [line.reason for line in explain(module, x).lines if line.backend == "unfused"]


def equations(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * module.excite(module.squeeze(x))


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (Doubled, "Doubled overrides excite of SqueezeExcite"),
        (Maximum, "Maximum overrides squeeze of EffectiveSE"),
        (Quiet, None),
    ],
)
def test_its_own_equations_run(cls: type, told: str | None) -> None:
    module, x = cls(24), torch.randn(2, 24, 5, 5)
    for twin in (module, copy.deepcopy(module)):
        torch.testing.assert_close(twin(x), equations(twin, x))
        assert why(twin, x) == ([] if told is None else [told])


def test_so_do_those_of_one_module() -> None:
    module, x = SqueezeExcite(24), torch.randn(2, 24, 5, 5)
    module(x)
    module.excite = lambda p: torch.full_like(p, 3)
    torch.testing.assert_close(module(x), 3 * x)
    assert why(module, x) == ["has its own excite"]
    del module.excite
    torch.testing.assert_close(module(x), equations(module, x))
    assert why(module, x) == []


def test_and_those_of_a_gate_in_a_fused_tail() -> None:
    resnet = pytest.importorskip("timm.models.resnet")
    torch.manual_seed(0)
    ours, x = resnet.Bottleneck(32, 8, attn_layer=Doubled).eval(), torch.randn(2, 32, 5, 5)
    want = copy.deepcopy(ours)(x)
    fuse_(ours)
    torch.testing.assert_close(ours(x), want)
    assert "Doubled overrides excite of SqueezeExcite" in why(ours, x)


def test_a_helper_of_one_foreign_module() -> None:
    """The same for a class that `fuse_` converts: torchvision's forward calls `_scale`."""
    ops = pytest.importorskip("torchvision.ops")
    module, x = ops.SqueezeExcitation(24, 6), torch.randn(2, 24, 5, 5)
    fuse_(module)
    module(x)
    module._scale = lambda x: torch.full_like(x[:, :, :1, :1], 3)
    torch.testing.assert_close(module(x), 3 * x)
    assert why(module, x) == ["has its own _scale"]
    other = ops.SqueezeExcitation(24, 6)
    other._scale = module._scale
    assert fuse_(other).refused == [("", "has its own _scale")]
