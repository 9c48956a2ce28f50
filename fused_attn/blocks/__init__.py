"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import authors, se_source, shrinkage_ports, tails, units  # noqa: F401  (they register rules)
from .bam import BAM
from .cbam import CBAM
from .eca import ECA
from .pyramid_squeeze import PyramidSqueezeAttention
from .residual_attention import ResidualAttention
from .scse import SpatialChannelSE
from .selective_kernel import SelectiveKernel
from .shrinkage import Shrinkage
from .shuffle_attention import ShuffleAttention
from .spatial_group_enhance import SpatialGroupEnhance
from .split_attention import SplitAttention
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = [
    "BAM",
    "CBAM",
    "ECA",
    "EffectiveSE",
    "PyramidSqueezeAttention",
    "ResidualAttention",
    "SelectiveKernel",
    "Shrinkage",
    "ShuffleAttention",
    "SpatialChannelSE",
    "SpatialGroupEnhance",
    "SplitAttention",
    "SqueezeExcite",
]
