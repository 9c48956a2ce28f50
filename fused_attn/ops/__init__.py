"""The hot paths. Each public name is an `Op`: call it like a function."""

from .affine_apply import affine_apply
from .affine_dual_scale import affine_dual_scale
from .affine_pool_scale import affine_pool_scale
from .batch_affine import batch_affine
from .branch_affine import branch_moments_affine
from .branch_pool import branch_pool
from .branch_scale import branch_scale
from .branch_softmax import branch_softmax
from .channel_moments import channel_moments
from .channel_pool import channel_pool
from .dual_scale import dual_scale
from .group_similarity_scale import group_similarity_scale
from .map_scale import map_scale
from .merge_scale import bam_scale, scse_scale
from .moments_affine import moments_affine
from .moments_gate_shuffle import moments_gate_shuffle
from .plane_conv import plane_conv
from .plane_gate_shuffle import plane_gate_shuffle
from .pool_conv_scale import pool_conv_scale
from .pool_mlp_scale import pool_mlp_scale
from .pool_scale import pool_scale
from .pool_soft_threshold import pool_soft_threshold
from .scale import scale
from .shared_mlp import shared_mlp
from .soft_threshold import soft_threshold
from .spatial_pool import spatial_pool

__all__ = [
    "affine_apply",
    "affine_dual_scale",
    "affine_pool_scale",
    "bam_scale",
    "batch_affine",
    "branch_moments_affine",
    "branch_pool",
    "branch_scale",
    "branch_softmax",
    "channel_moments",
    "channel_pool",
    "dual_scale",
    "group_similarity_scale",
    "map_scale",
    "moments_affine",
    "moments_gate_shuffle",
    "plane_conv",
    "plane_gate_shuffle",
    "pool_conv_scale",
    "pool_mlp_scale",
    "pool_scale",
    "pool_soft_threshold",
    "scale",
    "scse_scale",
    "shared_mlp",
    "soft_threshold",
    "spatial_pool",
]
