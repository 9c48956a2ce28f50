"""The hot paths. Each public name is an `Op`: call it like a function."""

from .channel_pool import channel_pool
from .group_similarity_scale import group_similarity_scale
from .plane_gate_shuffle import plane_gate_shuffle
from .pool_conv_scale import pool_conv_scale
from .pool_mlp_scale import pool_mlp_scale
from .pool_scale import pool_scale
from .scale import scale
from .shared_mlp import shared_mlp

__all__ = [
    "channel_pool",
    "group_similarity_scale",
    "plane_gate_shuffle",
    "pool_conv_scale",
    "pool_mlp_scale",
    "pool_scale",
    "scale",
    "shared_mlp",
]
