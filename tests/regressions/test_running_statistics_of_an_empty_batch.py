"""An empty batch in training wrote the statistics of no descriptors into BatchNorm's running mean and variance.

Cause: `_keep` averaged them in whatever n was; nn.BatchNorm2d only counts such a batch. Found in review.
"""

import pytest
import torch
from torch import nn

from fused_attn import SqueezeExcite


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_an_empty_batch(momentum: float | None) -> None:
    module = SqueezeExcite(8, rd_channels=4, norm_layer=nn.BatchNorm2d)
    module.bn.momentum = momentum
    module.train()(torch.randn(4, 8, 3, 3))
    before = {name: value.clone() for name, value in module.bn.state_dict().items()}
    module(torch.empty(0, 8, 3, 3))
    before["num_batches_tracked"] += 1
    for name, value in module.bn.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
