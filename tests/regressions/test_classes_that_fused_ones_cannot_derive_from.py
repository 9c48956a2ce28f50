"""One class that reacts to its subclasses, or that has a child of the name of an attribute of fused modules, made
`fuse_` raise for the whole model. Found in review.
"""

import pytest
import torch
from torch import nn

import tests.support  # noqa: F401  (makes torchvision importable beside a CPU torch)
from fused_attn import fuse_

SEModule = pytest.importorskip("timm").layers.SEModule


class Asking(SEModule):
    def __init_subclass__(cls, word, **kwargs):
        super().__init_subclass__(**kwargs)


def test_a_class_that_wants_a_word_from_its_subclasses():
    model = nn.Sequential(SEModule(32), Asking(32))
    report = fuse_(model)
    assert len(report.fused) == 1
    assert "has a say in its subclasses" in report.refused[0][-1]


def test_a_child_named_as_an_attribute_of_ours():
    model = nn.Sequential(SEModule(32), SEModule(32))
    model[1].rule = nn.Identity()
    x = torch.randn(2, 32, 5, 5)
    want = model(x)
    report = fuse_(model)
    assert len(report.fused) == 1
    assert report.refused[0][-1].startswith("rule is the name of one of its children")
    torch.testing.assert_close(model(x), want)
