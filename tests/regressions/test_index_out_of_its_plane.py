"""An index that wasn't int64, contiguous or inside its plane made the C++ backward of a maximum write anywhere."""

import pytest
import torch

import fused_attn

BACKWARD = fused_attn.OPS["channel_pool_bwd"]


@pytest.mark.parametrize(
    "index",
    [
        torch.full((2, 3), 1 << 33),
        torch.full((2, 3), 16),
        torch.full((2, 3), -1),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3),
        torch.zeros(1, 1, dtype=torch.int64).expand(2, 3),
        torch.zeros(3, 2, dtype=torch.int64),
    ],
    ids=["huge", "one past", "negative", "int32", "float", "expanded", "shape"],
)
def test_it_is_refused(index):
    x, dpooled = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.fused_attn.channel_pool_bwd(x, dpooled, torch.empty(0), index, "max", "first")
