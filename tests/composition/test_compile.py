"""torch.compile of everything public: one graph, the numbers of the eager call, and no recompilation per batch size.

Whatever compiles costs seconds. In `make test`: a block of each kind under AOTAutograd, and one under Inductor; under
`slow` all of both. tests/test_conformance.py compiles one case of each op in `make test`.
"""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.composition.subjects import FEW, Subject, over, run, same

QUICK = ("squeeze_excite", "cbam", "selective_kernel", "moments_affine")
INDUCTOR = ("squeeze_excite",)
BATCHES = (19, 23, 29)  # sizes of no other dimension, which a compiler would take for the same symbol


def only(names: tuple[str, ...]) -> pytest.MarkDecorator:
    quick = [s for s in FEW if s.name.partition("-")[0] in names]
    assert len(quick) == len(names)
    return over(quick, [s for s in FEW if s not in quick])


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def check(subject: Subject, compiled: nn.Module, plain: nn.Module, batch: int | None) -> None:
    maps = subject.maps(batch=batch)
    same(run(compiled, maps, [*plain_of(compiled).parameters()]), run(plain, maps, [*plain.parameters()]))
    for (name, found), expected in zip(plain_of(compiled).named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def plain_of(compiled: nn.Module) -> nn.Module:
    return compiled._orig_mod


def compiles(subject: Subject, backend: str, dynamic: bool | None) -> None:
    module = subject.module()
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    if dynamic is None:  # the first call is static, the second makes the batch a symbol
        check(subject, compiled, plain, None)
    for batch in BATCHES:
        check(subject, compiled, plain, batch)
    assert counters["graph_break"] == {}
    assert graphs() == (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [pytest.param(None, id="static first"), pytest.param(True, id="dynamic")])
@only(QUICK)
def test_aot_autograd(subject: Subject, dynamic: bool | None) -> None:
    compiles(subject, "aot_eager", dynamic)


@only(INDUCTOR)
def test_inductor(subject: Subject) -> None:
    compiles(subject, "inductor", True)


@only(INDUCTOR)
def test_inductor_without_gradients(subject: Subject) -> None:
    """Where gates are the compiler's own."""
    module = subject.module().eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in BATCHES:
            maps = subject.maps(batch=batch)
            torch.testing.assert_close(compiled(*maps), module(*maps), rtol=1e-9, atol=1e-11)
    assert graphs() == 1
