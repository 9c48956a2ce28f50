"""A container among the children of a plan has no forward of its own, which is no reason to run unfused: the library's
CBAM, whose pooling convolution lives in a ModuleDict, ran unfused, and only `explain` said so."""

import pytest
import torch

import fused_attn
from fused_attn.registry import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_runs_fused(name):
    block = BLOCKS[name]
    for case in block.cases:
        module = block.module(**case.args["args"]).eval()
        shapes = case.args["x"]
        x = [torch.randn(s) for s in shapes] if isinstance(shapes[0], tuple) else [torch.randn(shapes)]
        lines = fused_attn.explain(module, *x).lines
        assert lines
        assert not [line.reason for line in lines if line.backend == "unfused"], str(case)
