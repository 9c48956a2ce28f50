"""The hot paths. Each public name is an `Op`: call it like a function."""

from .channel_pool import channel_pool
from .pool_conv_scale import pool_conv_scale
from .pool_mlp_scale import pool_mlp_scale
from .pool_scale import pool_scale
from .scale import scale
from .shared_mlp import shared_mlp

__all__ = ["channel_pool", "pool_conv_scale", "pool_mlp_scale", "pool_scale", "scale", "shared_mlp"]
