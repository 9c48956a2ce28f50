"""Modules that are proved on trial inputs told the log, and whoever observes, of the ops that the trials ran. Found in
review.
"""

import torch
from torch import nn

from fused_attn import backend, fuse_
from tests.test_authors import eca_layer


def test_nothing_is_observed_while_a_forward_is_proved():
    seen = []
    model = nn.Sequential(eca_layer(3))
    with backend.observe(seen.append):
        assert fuse_(model).fused
        assert not seen
        model(torch.randn(2, 48, 5, 5))
        assert seen
