"""A sparse, nested or MKL-DNN feature map wasn't refused: "reshape is not implemented", or a sparse output.

Cause: the checks of arguments looked at dtype, shape and device, not at the layout. Issue 3.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_attn import SqueezeExcite, ops, use_backend


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor(list(x))


def csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is in beta
        return x.to_sparse_csr()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": csr,
    "mkldnn": Tensor.to_mkldnn,
    "nested": nested,
}
X, GATE, W = torch.randn(2, 24, 5, 5), torch.rand(2, 24), torch.randn(24, 24)
CALLS: dict[str, Callable[[Tensor], object]] = {
    "scale": lambda x: ops.scale(x, GATE),
    "channel_pool": lambda x: ops.channel_pool(x),
    "pool_mlp_scale": lambda x: ops.pool_mlp_scale(x, W, None, W, None),
    "pool_scale": lambda x: ops.pool_scale(x, torch.sigmoid),
    "module": SqueezeExcite(24),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "gradient"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused(kind: str, call: str, gradient: bool, backend: str) -> None:
    x = KINDS[kind](X)
    if gradient and kind != "mkldnn":
        x.requires_grad_()
    with use_backend(backend), pytest.raises(TypeError, match=rf"^x must be a dense tensor.*; got .*{kind}"):
        CALLS[call](x)


def test_so_are_the_others() -> None:
    with pytest.raises(TypeError, match="gate must be a dense tensor"):
        ops.scale(X, GATE.to_sparse())
    with pytest.raises(TypeError, match="residual must be a dense tensor"):
        ops.scale(X, GATE, X.to_sparse())
    with pytest.raises(TypeError, match="w1 must be a dense tensor"):
        ops.pool_mlp_scale(X, W.to_sparse(), None, W, None)
