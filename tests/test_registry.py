"""Declarations and the files around them agree: what is declared is complete, what exists is declared."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import BLOCKS, OPS, _codegen, backend, ops, testing

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_attn"
FORMULAS = [op for op in OPS.values() if op.formula is not None]
BACKWARDS = [op for op in OPS.values() if op.formula is None]
names = lambda value: getattr(value, "name", None)


def sizes(case):
    return [n for value in case.args.values() if isinstance(value, tuple) for n in value]


def power_of_two(n):
    return n & (n - 1) == 0


@pytest.mark.parametrize("op", OPS.values(), ids=names)
def test_declaration_is_complete(op):
    """Each op has an eager form, a schema, a budget, a check; one with a formula can be differentiated."""
    assert callable(op.eager)
    assert callable(op.check)
    assert op.budget is not None
    assert set(op.maps) <= set(op.arguments)
    assert torch._C._dispatch_has_kernel(f"fused_attn::{op.name}")
    assert re.fullmatch(r"[a-z][a-z_]*", op.name)
    assert (op.formula is None) == (op.backward is None) == (op.save is None) == (not op.cases)
    assert all(
        isinstance(n, int | float) for case in op.cases for n in op.budget(*testing.draw(case, op, device="meta"))
    )


@pytest.mark.parametrize("op", FORMULAS, ids=names)
def test_cases(op):
    """Enough of them: three at least, a benchmark, a size that is no power of two, a prime, an empty batch, a 1."""
    small = [c for c in op.cases if "bench" not in c.tags]
    assert len(small) >= 3
    assert len(small) < len(op.cases), "no case is tagged bench"
    assert len({str(c) for c in op.cases}) == len(op.cases), "a case twice"
    all_sizes = {n for case in small for n in sizes(case)}
    assert any(not power_of_two(n) for n in all_sizes - {0})
    assert all_sizes & {13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 127}, "no prime beyond a vector's width"
    assert any(0 in next(iter(c.args.values()))[:2] for c in small), "no empty batch"
    assert 1 in all_sizes
    tags = {tag for case in op.cases for tag in case.tags}
    assert tags <= {"bench"}, f"unknown tags: {tags}"


@pytest.mark.parametrize("op", FORMULAS, ids=names)
def test_every_option_has_a_case(op):
    """Each value that the docstring lists for an option of the op is drawn by some case, or is the default."""
    listed = {
        name: set(re.findall(r'"([a-z_0-9]+)"', text))
        for name, text in documented(op).items()
        if isinstance(inspect.signature(op).parameters[name].default, str)
    }
    for name, values in listed.items():
        default = inspect.signature(op).parameters[name].default
        used = {case.args.get(name, default) for case in op.cases}
        assert used <= values | {default} or not values, f"{name}: {used - values} are undocumented"


def documented(op):
    """Argument -> its text, from the lines `name, other: text` of the docstring; `first … last` names all between."""
    found, current = {}, []
    for line in inspect.cleandoc(op.__doc__).splitlines():
        match = re.match(r"([a-z_0-9]+(?:(?:, | … )[a-z_0-9]+)*): (.*)", line)
        if match:
            current = []
            for part in match[1].split(", "):
                ends = part.split(" … ")
                if len(ends) == 2:
                    first, last = (op.arguments.index(e) for e in ends)
                    current += op.arguments[first : last + 1]
                else:
                    current.append(part)
            found |= dict.fromkeys(current, match[2])
        elif line.startswith("    ") and current:
            found |= {name: found[name] + " " + line.strip() for name in current}
        elif not line.strip():
            current = []
    return {name: text for name, text in found.items() if name in op.arguments}


@pytest.mark.parametrize("op", FORMULAS, ids=names)
def test_docstring_documents_every_argument(op):
    assert not set(op.arguments) - set(documented(op)), "undocumented"
    for word in ("Returns", "Raises"):
        assert word in op.__doc__


@pytest.mark.parametrize("op", BACKWARDS, ids=names)
def test_backward_says_what_it_is(op):
    assert re.match(r"(Gradient of `\w+`|(First|Second|Last) (half|pass) of the backward|Part of `\w+`)", op.__doc__)


def test_backwards_are_reached(launches):
    """No operator without a use: each one runs in the backward of some case, or in that of a function around both
    ends."""
    for op in FORMULAS:
        for case in op.cases:
            if "bench" not in case.tags:
                testing.answer(op, testing.draw(case, op))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    ops.pool_scale(x, torch.sigmoid, pool="max", ties="first").sum().backward()
    ops.pool_soft_threshold(x, torch.sigmoid).sum().backward()
    ops.branch_softmax(x, excite=torch.sigmoid).sum().backward()
    ops.moments_affine(x, torch.sigmoid, residual=x, act="relu").sum().backward()
    ops.affine_pool_scale(x, torch.sigmoid, torch.sigmoid).sum().backward()
    ops.branch_moments_affine(x, x, excite=torch.sigmoid, act="relu").sum().backward()
    ops.affine_dual_scale(x, torch.sigmoid, lambda p: p[1], lambda q: q[:, 0]).sum().backward()
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    ops.moments_gate_shuffle(x, lambda m: m.repeat(2, 1, 1), k=2, residual=x, act="relu").sum().backward()
    for block in (fused_attn.CBAM(16), fused_attn.BAM(16), fused_attn.SpatialChannelSE(16)):
        block(x).sum().backward()
    assert set(OPS) == {op.name for op, _ in launches}


def test_public_names():
    """`fused_attn.ops` lists what the user calls, and each is documented."""
    assert {op.name for op in FORMULAS} <= set(ops.__all__)
    assert all(getattr(ops, name).__doc__ for name in ops.__all__)
    assert all(getattr(fused_attn, name, None) is not None for name in fused_attn.__all__)
    for name in ("set_fused_attn", "use_fused_attn"):
        assert not hasattr(fused_attn, name), "timm means something else by it"


def test_generated_header_is_fresh():
    if not _codegen.TARGET.parent.exists():
        pytest.skip("needs a checkout: an installed package has no csrc/")
    assert _codegen.TARGET.read_text() == _codegen.render(), "run `make gen`"


def test_extension_matches_the_ops():
    """Each C++ operator is an op's, and has its schema; each op has one or is listed here."""
    if (why := backend.extension()) is not None:
        pytest.skip(f"cpp: {why}")
    prefix = "fused_attn_cpp::"
    there = {
        s.name.removeprefix(prefix): s for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix)
    }  # fmt: skip
    public = {name for name in there if not name.startswith("_")}
    expected = set(OPS) | {f"{name}_{suffix}" for name in OPS for suffix in ("options", "spelled")}
    expected |= {f"{op.name}_infer" for op in OPS.values() if op.alone is not None}
    assert public <= expected, f"no op declares {public - expected}"
    assert set(OPS) <= public, f"no C++ kernel: {set(OPS) - public}"
    for name in public & set(OPS):
        # A kernel takes its tensors as a list; what is typed are its options, in the op's order.
        ours, op = OPS[name].overload._schema, OPS[name]
        options = [(a.name, str(a.type)) for a in ours.arguments[op.count :]]
        assert [(a.name, str(a.type)) for a in there[f"{name}_options"].arguments] == [("mask", "int"), *options]
        assert len(ours.returns) == len(there[name].returns)


def sources():
    """C++ files that register an operator, by op name."""
    texts = [p.read_text() for p in (ROOT / "csrc" / "cpu").glob("*.cpp")]
    return {name for text in texts for name in re.findall(r"^FA_REGISTER\((\w+)\)", text, re.M)}


def test_sources_register_declared_ops():
    """Read off the sources, so that it holds before anything is compiled."""
    if not (ROOT / "csrc" / "cpu").exists():
        pytest.skip("no C++ kernels here")
    registered = {name for name in sources() if not name.startswith("_")}
    assert registered == set(OPS), f"differ: {registered ^ set(OPS)}"


@pytest.mark.parametrize("folder", ["ops", "blocks"])
def test_every_file_is_imported(folder):
    """A file that no import line names is dead: its op or block would be missing without a word."""
    init = PACKAGE / folder / "__init__.py"
    if not init.exists():
        pytest.skip(f"no {folder} yet")
    files = {p.stem for p in init.parent.glob("*.py")} - {"__init__"}
    imported = {
        node.module if node.level == 1 else None
        for path in init.parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    } | {
        alias.name
        for path in init.parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is None
        for alias in node.names
    }  # fmt: skip
    kernels = {f for f in files if f.endswith("_triton")}  # imported on first use
    assert files - kernels <= imported, f"not imported: {files - kernels - imported}"
    assert {k.removesuffix("_triton") for k in kernels} <= files, "kernels without an op file"


def test_registry_stays_small():
    assert len((PACKAGE / "registry.py").read_text().splitlines()) < 300


@pytest.mark.parametrize("block", BLOCKS.values(), ids=names)
def test_block_is_complete(block):
    """A block's ops exist, and it has a paper, a documented module, and cases that say what they construct."""
    assert set(block.ops) <= set(OPS) | set(ops.__all__)
    assert "http" in block.paper or "arXiv" in block.paper
    assert issubclass(block.module, torch.nn.Module)
    assert block.module.__doc__
    assert getattr(fused_attn, block.module.__name__) is block.module
    assert block.cases


def test_a_case_reads_well():
    case = OPS["scale"].cases[3]
    assert str(case) == "x=2x17x13,gate=2x17,residual=2x17x13"


def test_draw_is_reproducible_and_varied():
    """The same seed gives the same values in every layout and device-independent; another seed gives others."""
    op = OPS["pool_mlp_scale"]
    case = next(c for c in op.cases if c.args.get("norm") == "running")
    plain = testing.draw(case, op)
    for layout in testing.WALKABLE:
        other = testing.draw(case, op, layout=layout)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True) if isinstance(a, torch.Tensor))
        x = other[0]
        assert x.stride(1) == 1 if "channels_last" in layout else x.stride(3) == 1
        assert ("sliced" in layout) == (x.storage_offset() % 4 != 0)
    assert (plain[op.arguments.index("norm_var")] > 0).all()
    assert not torch.equal(plain[0], testing.draw(case, op, seed=1)[0])
    tied = testing.draw(case, op, ties=True)[0]
    assert torch.equal(tied, tied.round())
    assert ((tied == tied.amax((2, 3), keepdim=True)).sum((2, 3)) > 1).any()
