"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import tails  # noqa: F401  (registers its rules)
from .bam import BAM
from .cbam import CBAM
from .scse import SpatialChannelSE
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = ["BAM", "CBAM", "EffectiveSE", "SpatialChannelSE", "SqueezeExcite"]
