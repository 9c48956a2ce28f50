"""torch.compile of CBAM raised: its derivative went through an operator that functional transforms don't take, and, in
evaluation, through running statistics, by which torch's batch norm has no derivative."""

import copy

import pytest
import torch

from fused_attn.blocks import CBAM
from tests.support import redraw, relative, step, worst


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"no_spatial": True}, {"light": True}], ids=str)
def test_one_graph(options: dict[str, bool], training: bool) -> None:
    module = redraw(CBAM(16, rd_channels=4, **options).double()).train(training)
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(3, 16, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y, grads), (want, true) = step(compiled, x), step(twin, x)
    assert relative(y, want) < 1e-12
    assert worst(dict(zip(true, grads.values(), strict=True)), true) < 1e-11
    for buffer, expected in zip(module.buffers(), twin.buffers(), strict=True):
        assert relative(buffer, expected) < 1e-12
