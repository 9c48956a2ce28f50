"""explain hung a hook on the PSA inside the library's bottleneck, which therefore ran apart from its norm, and told of
that."""

import torch

from fused_attn import explain, models


def test_what_runs_without_it():
    network = models.epsanet50(layers=(1, 1, 1, 1)).eval()
    lines = explain(network, torch.randn(1, 3, 64, 64)).lines
    assert [line.module for line in lines if line.op == "branch_affine"] == [f"layer{i}.0" for i in (1, 2, 3, 4)]
