"""Programs without our operators, for tools that know only PyTorch's.

    program = torch.export.export(model, inputs).run_decompositions(fused_attn.decompositions())

Every operator is replaced by its eager form, so that what remains are ATen's: torch.onnx.export takes it, and runtimes
that load exported programs where this package isn't installed.
"""

from collections.abc import Callable
from typing import Any

import torch

from .registry import OPS


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """Every operator of this package, and its eager form in PyTorch's own: what `ExportedProgram.run_decompositions`
    takes."""
    return {op.overload: op.eager for op in OPS.values()}


__all__ = ["decompositions"]
