"""Shuffle attention whose inner norm has no offset ran by itself, and raised behind a norm."""

import torch
from support import redraw, relative
from torch import nn

from fused_attn import ShuffleAttention
from fused_attn.blocks.chain import joined


def test_it_runs():
    gate = redraw(ShuffleAttention(16, groups=2)).double()
    gate.gn.bias = None
    norm, x = nn.BatchNorm2d(16).double(), torch.randn(2, 16, 4, 5, dtype=torch.float64)
    assert relative(joined(norm, gate, x, x), torch.relu(gate(norm(x)) + x)) < 1e-12
