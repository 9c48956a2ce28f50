"""The hot paths. Each public name is an `Op`: call it like a function."""

from .branch_pool import branch_pool
from .branch_scale import branch_scale
from .branch_softmax import branch_softmax
from .channel_pool import channel_pool
from .pool_mlp_scale import pool_mlp_scale
from .pool_scale import pool_scale
from .scale import scale
from .shared_mlp import shared_mlp

__all__ = [
    "branch_pool",
    "branch_scale",
    "branch_softmax",
    "channel_pool",
    "pool_mlp_scale",
    "pool_scale",
    "scale",
    "shared_mlp",
]
