"""Fused kernels for convolutional attention: forward and backward, in Triton and C++, falling back to eager PyTorch."""

from . import ops
from .backend import use_backend
from .registry import BLOCKS, OPS

__version__ = "0.1.0"

__all__ = ["BLOCKS", "OPS", "__version__", "ops", "use_backend"]
