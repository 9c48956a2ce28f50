"""What the support table says is known by name and source is what `fuse_` knows so."""

from fused_attn import BLOCKS
from fused_attn.blocks import authors, shrinkage_ports
from fused_attn.plan import STRUCTURES


def test_every_name_is_declared_by_a_block():
    declared = {name.lower(): name for block in BLOCKS.values() for name in block.ports}
    read = {*authors.KNOWN, *shrinkage_ports._NAMES}
    assert read <= set(declared)
    assert {declared[name] for name in set(declared) - read} == {"PSAModule", "SplAtConv2d"} <= set(STRUCTURES)
