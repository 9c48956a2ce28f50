"""Complaints about arguments, in one voice: the argument's name, what was expected, what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def tensor(name: str, value: Any) -> None:
    """A dense floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, of layout torch.strided; got {kind}")


def feature_map(name: str, x: Any) -> None:
    """A feature map (N, C, *S) with at least one spatial dimension, none of them empty."""
    tensor(name, x)
    if x.dim() < 3:
        raise ValueError(f"{name} must be a feature map (N, C, *S) of at least 3 dimensions; got shape {_shape(x)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name} must have spatial dimensions of at least 1; got shape {_shape(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least 1 channel; got shape {_shape(x)}")


def channels(name: str, x: Any, count: int, dims: int) -> None:
    """A feature map of this many channels and spatial dimensions; a convolution would take others for no batch. What
    stands for a tensor while a graph is traced passes."""
    if isinstance(x, torch.fx.Proxy):
        return
    feature_map(name, x)
    if x.dim() != dims + 2 or x.shape[1] != count:
        raise ValueError(f"{name} must have shape (N, {count}{', *' * dims}); got {_shape(x)}")


def same_device(x_name: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor is where x is."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the device of {x_name}, {x.device}; got {other.device}")


def shaped(name: str, value: Tensor | None, shape: Sequence[int], meaning: str) -> None:
    """A floating tensor of exactly this shape; `meaning` says in letters what the shape is."""
    if value is None:
        return
    tensor(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}; got {_shape(value)}")


def like(name: str, value: Tensor | None, x_name: str, x: Tensor) -> None:
    """A tensor of x's shape, dtype and device."""
    if value is None:
        return
    tensor(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {x_name}, {_shape(x)}; got {_shape(value)}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}; got {value.dtype}")
    same_device(x_name, x, **{name: value})


def weight(name: str, value: Tensor | None, rows: int | None, columns: int | None, meaning: str) -> None:
    """A dense layer's weight (rows, columns), or a 1×1 convolution's with trailing ones; None sizes are free."""
    if value is None:
        return
    tensor(name, value)
    ok = value.dim() >= 2 and all(s == 1 for s in value.shape[2:])
    ok = ok and rows in (None, value.shape[0]) and columns in (None, value.shape[1])
    if not ok:
        want = ", ".join(str(size) if size is not None else letter for size, letter in ((rows, "*"), (columns, "*")))
        raise ValueError(f"{name} must have shape {meaning} = ({want}), 1s may follow; got {_shape(value)}")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """One of the names of an option."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def number(name: str, value: Any) -> None:
    """A real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def index(name: str, value: Any, shape: Sequence[int], meaning: str) -> None:
    """Positions, int64, of exactly this shape. Whether they lie in a plane is for whoever reads them to see."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor; got {getattr(value, 'dtype', type(value).__name__)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}; got {_shape(value)}")
