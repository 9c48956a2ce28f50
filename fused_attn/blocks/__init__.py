"""The mechanisms, one file each: equations, module, conversion rules, cases. `tails`: what follows a gate."""

from . import shrinkage_ports, tails  # noqa: F401  (they register rules)
from .residual_attention import ResidualAttention
from .shrinkage import Shrinkage
from .squeeze_excite import EffectiveSE, SqueezeExcite

__all__ = ["EffectiveSE", "ResidualAttention", "Shrinkage", "SqueezeExcite"]
