"""SelectiveKernel left out the channels that no path takes, and said nothing; a map without a batch was taken for one
with it, or refused by a convolution that named no argument."""

import pytest
import torch

from fused_attn import BAM, PyramidSqueezeAttention, SelectiveKernel, SplitAttention

BLOCKS = {
    "SK": lambda: SelectiveKernel(16),
    "SK, whole input": lambda: SelectiveKernel(16, split_input=False),
    "SK, 1-D": lambda: SelectiveKernel(16, dims=1),
    "split attention": lambda: SplitAttention(16),
    "PSA": lambda: PyramidSqueezeAttention(16, 64),
    "BAM": lambda: BAM(16),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_x_is_named(name: str, training: bool) -> None:
    module = BLOCKS[name]().train(training)
    size = (9,) if name == "SK, 1-D" else (5, 7)
    module(torch.randn(2, 16, *size))
    for shape in ((2, 19, *size), (16, *size), (2, 16, 3, *size), (2, 16)):
        with pytest.raises(ValueError, match=r"^x must .*got (shape )?\("):
            module(torch.randn(shape))
    with pytest.raises(TypeError, match="x must be a tensor"):
        module("a")
    with pytest.raises(TypeError, match="x must be float"):
        module(torch.ones(2, 16, *size, dtype=torch.int32))
