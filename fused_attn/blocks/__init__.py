"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import se_source, tails  # noqa: F401  (they register rules)
from .shrinkage import Shrinkage
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = ["EffectiveSE", "Shrinkage", "SqueezeExcite"]
