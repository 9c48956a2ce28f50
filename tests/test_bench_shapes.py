"""Shapes of networks, and the figures beside time, against counts by hand."""

import pytest
import torch

from bench import blocks, contests, figures, labels, measure, ops, shapes, subjects, support
from bench.measure import Candidate
from fused_attn.registry import OPS, case


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_case_at_another_shape():
    given = case("bench", x=(8, 512, 28, 28), w1=(32, 512), b1=(32,), w2=(512, 32), b2=(512,))
    made = shapes.rescaled(OPS["pool_mlp_scale"], given, 64, 72, 14, 24)
    assert made.args == {"x": (64, 72, 14, 14), "w1": (24, 72), "b1": (24,), "w2": (72, 24), "b2": (72,)}
    given = case("bench", x=(8, 512, 28, 28), gate=(8, 512), pixel=(8, 28, 28))
    assert shapes.rescaled(OPS["scale"], given, 1, 256, 56, 16).args["pixel"] == (1, 56, 56)
    groups = case("bench", x=(8, 512, 28, 28), weight=(64,), bias=(64,))
    assert shapes.rescaled(OPS["group_similarity_scale"], groups, 8, 256, 56, 16).args["weight"] == (64,)
    assert shapes.rescaled(OPS["group_similarity_scale"], groups, 8, 96, 56, 16).args["weight"] == (12,)
    assert shapes.rescaled(OPS["group_similarity_scale"], groups, 8, 100, 56, 16) is None
    kernel = case("bench", x=(8, 2048, 7, 7), weight=(1, 1, 7))  # a kernel's width, which is no position
    assert shapes.rescaled(OPS["pool_conv_scale"], kernel, 8, 256, 56, 16).args["weight"] == (1, 1, 7)
    assert shapes.rescaled(OPS["shared_mlp"], case(pooled=(8, 64)), 8, 100, 56, 16) is None


def test_every_op_with_maps_takes_the_shapes_of_resnet():
    for op in labels.bench_ops():
        first = labels.bench_cases(op)[-1].args[op.arguments[0]]
        if op.maps and len(first) == 4 and first[1] > 16:
            for c in labels.bench_cases(op):
                for shape in shapes.SETS["resnet50"]:
                    if c.args[op.arguments[0]][0] == 8:
                        assert shapes.rescaled(op, c, 8, *shape) is not None, (op.name, str(c), shape)


@pytest.mark.parametrize(
    ("name", "mode", "passes"),
    [
        ("SE (timm)", "forward", 3),
        ("SE (timm)", "forward+backward", 7),
        ("PSA", "forward", 3),  # four branches are one map: read, read again, write
        ("PSA", "forward+backward", 7),  # and: read branches and dy, read dy, write the gradients
        ("f1", "forward", 3),  # two maps in, one out
        ("f1", "forward+backward", 8),  # and: three in, two out
    ],
)
def test_passes_of_mechanisms_are_those_counted_by_hand(name, mode, passes):
    contest = contests.CONTESTS[name]
    if contest.needs and not support.importable(contest.needs):
        pytest.skip(f"{contest.needs} is not installed")
    rows = blocks.Job(contest, 2, 64, 14, "float32", "nchw", mode, "cpu", ("eager", "clone")).run(0.01, 0)
    by = {r.impl: r for r in rows}
    assert by["fused"].passes == passes
    assert by["fused"].bytes == passes * 2 * 64 * 14 * 14 * 4
    assert by["fused"].host_us > 0
    assert by["fused"].of_copy == pytest.approx(by["fused"].gbps / figures.copy_gbps("cpu"), abs=1e-3)


def test_memory_of_a_call_is_what_it_allocates():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB
    forward = Candidate("exp", [lambda: x.exp()])
    assert figures.peak_bytes(forward, "cpu") == pytest.approx(x.nbytes, abs=4096)
    assert figures.saved_bytes(forward, [x]) == x.nbytes  # exp keeps its result
    assert figures.saved_bytes(Candidate("square", [lambda: x.square()]), [x]) == 0  # and square what it was given
    chain = Candidate("chain", [lambda: (x.detach() + 1).exp() + 1])
    assert figures.peak_bytes(chain, "cpu") == pytest.approx(2 * x.nbytes, abs=4096)


def test_train_step_changes_weights_and_leaves_no_gradients():
    x, w = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    subject = subjects.Subject("s", "", lambda x: x * w, [(x,)], [[x, w]])
    subject.candidate("train-step", [torch.ones(4)]).calls[0]()
    assert x.grad is None
    assert w.grad is None
    assert torch.equal(x.detach(), torch.ones(4))
    assert (w < 1).all()


def test_max_autotune_is_timed_when_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(subjects, "compiled", lambda function, **options: asked.append(options) or function)
    c = case(x=(2, 8, 6, 6), gate=(2, 8))
    rows = ops.Job(OPS["scale"], c, baselines=("inductor", "max-autotune")).run(0.01)
    assert [r.impl for r in rows] == ["fused", *subjects.INDUCTORS]
    assert asked[2]["max_autotune"]


def test_selection(monkeypatch, capsys):
    from bench import __main__ as bench

    seen = []
    monkeypatch.setattr(ops.Job, "run", lambda self, seconds, number=0: seen.append(self) or [])
    monkeypatch.setattr(figures, "copy_gbps", lambda device: 1.0)
    arguments = [
        "ops",
        "--op",
        "pool_mlp_scale",
        "--shapes",
        "mobilenetv3",
        "--batch",
        "1",
        "64",
        "--mode",
        "train-step",
    ]
    assert bench.main([*arguments, "--device", "cpu", "--format", "csv"]) == 0
    assert len(seen) == 12
    assert {j.case.args["x"][0] for j in seen} == {1, 64}
    assert capsys.readouterr().out.startswith("op,case,mode,dtype,layout,device,impl,")
    assert measure.MODES[-1] == "train-step"
