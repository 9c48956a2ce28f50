"""The hot paths. Each public name is an `Op`: call it like a function."""

from .channel_pool import channel_pool
from .dual_scale import dual_scale
from .merge_scale import bam_scale, scse_scale
from .pool_mlp_scale import pool_mlp_scale
from .pool_scale import pool_scale
from .scale import scale
from .shared_mlp import shared_mlp
from .spatial_pool import spatial_pool

__all__ = [
    "bam_scale",
    "channel_pool",
    "dual_scale",
    "pool_mlp_scale",
    "pool_scale",
    "scale",
    "scse_scale",
    "shared_mlp",
    "spatial_pool",
]
