"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import tails  # noqa: F401  (registers its rules)
from .eca import ECA
from .shuffle_attention import ShuffleAttention
from .spatial_group_enhance import SpatialGroupEnhance
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = ["ECA", "EffectiveSE", "ShuffleAttention", "SpatialGroupEnhance", "SqueezeExcite"]
