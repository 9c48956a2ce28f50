"""A fused module at the end of a region that is checkpointed updated its norm once, where the unfused one, whose region
runs twice, does so twice: recomputation stops when the last tensor that was saved is there, which was before."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_attn import BLOCKS
from fused_attn.blocks import chain
from tests.support import redraw

SEEN = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def _hooked(module: nn.Module) -> nn.Module:
    """With a hook on each child, which makes it run unfused."""
    for child in module.modules():
        if child is not module:
            child.register_forward_hook(lambda *_: None)
    return module


class _Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return chain.joined(self.norm, None, x)


def _cases() -> dict[str, tuple]:
    found = {"tail": (_Tail, (4, 8, 6, 6))}
    for block in BLOCKS.values():
        for i, case in enumerate(block.cases):
            build = lambda b=block, c=case: redraw(b.module(**copy.deepcopy(c.args["args"])))
            if any(isinstance(m, SEEN) for m in build().modules()):  # one case of each block with norms is enough
                found[f"{block.name}-{i}"] = build, case.args["x"]
                break
    return found


CASES = _cases()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_unfused(name: str, reentrant: bool) -> None:
    build, shape = CASES[name]
    torch.manual_seed(0)
    ours = build().double()
    theirs, x = _hooked(copy.deepcopy(ours)), torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(dict(ours.named_buffers()))
    for module in (ours, theirs):
        checkpoint(module, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    counts = 0
    for (key, found), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        if key.endswith("num_batches_tracked"):
            counts += 1
            assert int(found) == int(before[key]) + 2, key
    assert counts
