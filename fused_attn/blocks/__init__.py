"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import se_source, shrinkage_ports, tails  # noqa: F401  (they register rules)
from .cbam import CBAM
from .eca import ECA
from .pyramid_squeeze import PyramidSqueezeAttention
from .residual_attention import ResidualAttention
from .selective_kernel import SelectiveKernel
from .shrinkage import Shrinkage
from .shuffle_attention import ShuffleAttention
from .spatial_group_enhance import SpatialGroupEnhance
from .split_attention import SplitAttention
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = [
    "CBAM",
    "ECA",
    "EffectiveSE",
    "PyramidSqueezeAttention",
    "ResidualAttention",
    "SelectiveKernel",
    "Shrinkage",
    "ShuffleAttention",
    "SpatialGroupEnhance",
    "SplitAttention",
    "SqueezeExcite",
]
