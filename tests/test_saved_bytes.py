"""What autograd keeps from forward to backward, of every block: its maps, the output where ReLU needs its mask, and
what is small beside a map: [N, C], [N, 1, H, W]. What torch's own layers inside of a block keep is theirs.

Counted by storage, each once, whoever keeps it.
"""

import inspect

import pytest
import torch
from torch import Tensor, nn

from fused_attn import BLOCKS
from fused_attn.plan import ready

N, C, SIDE = 2, 64, 32
# Arguments for C channels, and the children that are torch's own: their outputs are the maps that the mechanism takes.
BUILT: dict[str, tuple[dict, tuple[str, ...]]] = {
    "bam": ({"channels": C}, ("spatial",)),
    "cbam": ({"channels": C}, ()),
    "eca": ({"channels": C}, ()),
    "effective_se": ({"channels": C}, ()),
    "pyramid_squeeze": ({"inplans": C, "planes": C}, ("conv_1", "conv_2", "conv_3", "conv_4")),
    "residual_attention": ({"channels": C}, ("trunk", "mask")),
    "scse": ({"channels": C}, ()),
    "selective_kernel": ({"in_channels": C, "split_input": False}, ("paths.0", "paths.1")),
    "shrinkage": ({"channels": C}, ()),
    "shuffle_attention": ({"channels": C, "groups": 8}, ()),
    "spatial_group_enhance": ({"groups": 8}, ()),
    "split_attention": ({"in_channels": C, "norm_layer": nn.BatchNorm2d}, ("conv", "bn0", "drop", "act0")),
    "squeeze_excite": ({"channels": C}, ()),
}


def takes(name: str) -> tuple[str, ...]:
    """Names of what a block's forward takes."""
    return tuple(inspect.signature(BLOCKS[name].module.forward).parameters)


def test_every_block_is_counted() -> None:
    assert set(BUILT) == set(BLOCKS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tail"),
    [(name, tail) for name in BUILT for tail in (False, True) if not tail or "residual" in takes(name)],
)
def test_only_maps_that_are_there_anyway(name: str, tail: bool, dtype, memory_format, training: bool) -> None:
    options, children = BUILT[name]
    torch.manual_seed(0)
    module = BLOCKS[name].module(**options).to(dtype).train(training)
    x, residual = (torch.randn(N, C, SIDE, SIDE, dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    storage = lambda t: t.untyped_storage().data_ptr()
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address isn't given away twice
    maps = {storage(x): x.nbytes}
    depth = 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(_m: nn.Module, _x: object, y: Tensor) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            maps[storage(y)] = y.untyped_storage().nbytes()
            alive.append(y)

    def pack(t: Tensor) -> Tensor:
        if not depth:
            kept[storage(t)] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    for child in children:
        module.get_submodule(child).register_forward_pre_hook(enter)
        module.get_submodule(child).register_forward_hook(leave)
    more = ({"residual": residual} | ({"epilogue": "relu"} if "epilogue" in takes(name) else {})) if tail else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x, **more)
    assert name == "residual_attention" or ready(module) is not None  # which has no plan
    if "epilogue" in more:
        maps[storage(y)] = y.nbytes
    for p in module.parameters():
        kept.pop(storage(p), None)
    large = {at: size for at, size in kept.items() if size >= x.nbytes / 8}
    assert set(large) <= set(maps), f"keeps {sorted(large[at] for at in set(large) - set(maps))} bytes of its own"
    assert sum(size for at, size in kept.items() if at not in large) < 0.2 * x.nbytes
    assert large, "nothing is kept: nothing was counted"
