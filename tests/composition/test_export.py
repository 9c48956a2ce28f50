"""torch.export, and what is made of exported programs: files, AOTInductor's packages, ONNX models.

In `make test`: export, save, load and decomposition of each block and each op that takes functions, and ONNX of one
block. Under `slow`: the other ops, other ONNX models, and AOTInductor, which runs a C++ compiler.
"""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import OPS, testing
from fused_attn.registry import Op
from tests.composition.subjects import FEW, OP_CASES, Subject, over, run, same
from tests.composition.test_transforms import within

BATCH = 5
QUICK = [s for s in FEW if s.name.startswith("squeeze_excite")]
COMPOSED = [s for s in FEW if s.name.partition("-")[0] not in OP_CASES]
OTHERS = [s for s in FEW if s not in QUICK]


def exported(subject: Subject, module: nn.Module, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """For batches of any size."""
    batch = torch.export.Dim("batch", min=2, max=64)  # not 1: a variance over one sample is none
    maps = subject.maps(dtype)
    axes = (subject.axes * len(maps))[: len(maps)]
    return torch.export.export(module, maps, dynamic_shapes=tuple({at: batch} for at in axes))


def pair(subject: Subject, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    module = within(subject.module(dtype).eval(), len(subject.shapes))
    return module, copy.deepcopy(module)


def operators(program: torch.export.ExportedProgram) -> list[torch._ops.OpOverload]:
    return [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def ours(program: torch.export.ExportedProgram) -> list[Op]:
    return [OPS[o._schema.name.partition("::")[2]] for o in operators(program) if o.namespace == "fused_attn"]


def differentiable(program: torch.export.ExportedProgram) -> bool:
    """Whether each of our operators has a backward. Of what `moments_affine` and its like are made, forward parts
    haven't: their backward is that of the whole."""
    return all(op.backward is not None for op in ours(program))


@over(COMPOSED, [s for s in FEW if s not in COMPOSED])
def test_export_save_load_decompose(subject: Subject, tmp_path) -> None:
    """Outputs and gradients of what was loaded; and of what is left when our operators are replaced by PyTorch's."""
    module, plain = pair(subject)
    program = exported(subject, module, torch.float64)
    assert ours(program)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    maps = subject.maps(batch=BATCH)
    expected = run(plain, maps, [*plain.parameters()])
    again = loaded.module()
    with torch.no_grad():
        assert testing.error(again(*maps), expected[0]) < 1e-9
    if differentiable(program):
        same(run(again, maps, named(again, plain)), expected)
    else:
        with pytest.raises(RuntimeError, match=r"fused_attn\.\w+: .* exported program"):
            run(again, maps, named(again, plain))
    decomposed = program.run_decompositions(fused_attn.decompositions())
    assert ours(decomposed) == []
    assert all(o.namespace == "aten" for o in operators(decomposed))
    again = decomposed.module()
    same(run(again, maps, named(again, plain)), expected)


def named(module: nn.Module, plain: nn.Module) -> list[Tensor]:
    own = dict(module.named_parameters())
    return [own[name] for name, _ in plain.named_parameters()]


@over([], FEW)
def test_aot_inductor(subject: Subject, tmp_path) -> None:
    module, plain = pair(subject, torch.float32)
    program = exported(subject, module, torch.float32)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for batch in (BATCH, 7):
        maps = subject.maps(torch.float32, batch)
        with torch.no_grad():
            torch.testing.assert_close(package(*maps), plain(*maps), rtol=1e-4, atol=1e-5)


def evaluated(model: object, maps: Sequence[Tensor]) -> Tensor:
    """By ONNX's own reference, which is slow and nobody's optimisation."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(model)
    found = session.run(None, {name: x.numpy() for name, x in zip(session.input_names, maps, strict=True)})
    return torch.as_tensor(found[0])


@over(QUICK, OTHERS)
def test_onnx(subject: Subject) -> None:
    """Through the eager forms, as any other model."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    module, plain = pair(subject, torch.float32)
    program = exported(subject, module, torch.float32).run_decompositions(fused_attn.decompositions())
    model = torch.onnx.export(program, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib", "pkg.torch"}
    maps = subject.maps(torch.float32, BATCH)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(model, maps), plain(*maps), rtol=1e-4, atol=1e-4)
