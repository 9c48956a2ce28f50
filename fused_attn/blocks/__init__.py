"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import tails  # noqa: F401  (registers its rules)
from .cbam import CBAM
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = ["CBAM", "EffectiveSE", "SqueezeExcite"]
