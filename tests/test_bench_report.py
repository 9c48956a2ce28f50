"""Pictures, page and dispatch table: the same results give the same bytes, and no result gives no number."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import dispatch, page, plots, report, support
from bench.measure import Row
from fused_attn import backend
from fused_attn.registry import OPS

pytest.importorskip("matplotlib")

SOURCE = {
    "device": "cpu", "device_name": "A CPU", "torch": "2", "threads": 1, "clock": "CPU time", "simd": "AVX2",
    "git": "0123456789abcdef", "git_changed": False, "time": "2026-01-02T03:04", "copy_gbps": 20.0, "command": "x",
}  # fmt: skip


def write(folder, name, kind, rows, **source):
    folder.mkdir(exist_ok=True)
    content = {"schema": 1, "kind": kind, "provenance": SOURCE | source, "rows": [r.dict() for r in rows]}
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    """A CPU's results of all kinds that are drawn."""
    row = lambda impl, us, op="SE (timm)", case="8x256x56x56", mode="forward", **more: Row(
        op, case, mode, "float32", "nchw", "cpu", impl, "cpp", "published", median_us=us, **more
    )
    blocks = []
    for case, us in (("8x256x56x56", 40.0), ("8x512x28x28", 90.0)):
        for mode in ("forward", "forward+backward"):
            blocks += [
                row("fused", us, case=case, mode=mode, bytes=3 << 24),
                row("eager", 3 * us, case=case, mode=mode),
            ]
    write(tmp_path / "a-cpu", "blocks-1.json", "blocks", blocks)
    net = lambda impl, us, mode: row(impl, us, "<net>", "8x3x224x224", mode)
    forms = {"attention": 130e3, "attention, fused": 110e3, "plain": 100e3, "plain, fused": 98e3}
    write(tmp_path / "a-cpu", "models-1.json", "models", [
        net(impl, us, mode) for impl, us in forms.items() for mode in ("inference", "train-step")
    ])  # fmt: skip
    return tmp_path


DIGEST = """
import hashlib, sys
from pathlib import Path
from bench import page, plots
pictures = plots.draw(Path(sys.argv[1]))
html = page.render(Path(sys.argv[1]), pictures)
print(hashlib.sha256(b"".join(pictures.values()) + html.encode()).hexdigest())
"""


def test_the_same_bytes_from_the_same_results(results):
    first, second = plots.draw(results), plots.draw(results)
    assert first == second
    html = page.render(results, first)
    assert html == page.render(results, second)
    digest = hashlib.sha256(b"".join(first.values()) + html.encode()).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", DIGEST, str(results)], capture_output=True, text=True, cwd=support.ROOT, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(support.ROOT)},
    )  # fmt: skip
    assert run.stdout.strip() == digest


def test_every_kind_has_its_picture(results, tmp_path):
    pictures = plots.draw(results)
    assert set(pictures) == {"speedup-a-cpu.png", "roofline-blocks-a-cpu.png", "tax-models-a-cpu.png"}
    for data in pictures.values():
        assert data.startswith(b"\x89PNG")
        assert len(data) < 150_000
        assert int.from_bytes(data[16:20], "big") <= 1000  # pixels: a README's width
    assert plots.speedups(plots.planned(results)[0].contents)["SE (timm)", "forward"]["256x56x56"] == 3.0
    points = {whose: (mib, gbps) for whose, mib, gbps in plots.points(plots.planned(results)[0].contents)[:2]}
    assert points["fused"] == (48.0, pytest.approx((3 << 24) / 40.0 / 1e3))
    assert points["eager"] == (48.0, pytest.approx((3 << 24) / 120.0 / 1e3))
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "old.png").write_bytes(b"")
    report.write(folder, pictures, page.render(results, pictures))
    assert {p.name for p in folder.iterdir()} == {*pictures, "index.html"}


def shown(figure):
    """The labels of a figure's legend, in order."""
    return [t.get_text() for t in figure.legends[0].get_texts()]


def drawn(rows, draw):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return draw(plt, [{"rows": [r.dict() for r in rows], "provenance": SOURCE}])


def test_only_modes_that_were_measured_are_drawn():
    make = lambda mode, impl, us, case="8x64x7x7": Row(
        "SE (timm)", case, mode, "float32", "nchw", "cpu", impl, "", "", median_us=us
    )
    backward = [make("forward+backward", impl, us) for impl, us in (("fused", 1.0), ("eager", 2.0))]
    figure = drawn(backward, plots._speedup)
    assert [ax.get_title() for ax in figure.axes] == ["forward and backward"]
    assert shown(figure) == ["64×7×7"]
    more = [make("forward", impl, us, "8x32x9x9") for impl, us in (("fused", 1.0), ("eager", 2.0))]
    figure = drawn(backward + more, plots._speedup)
    assert [ax.get_title() for ax in figure.axes] == ["forward (inference)", "forward and backward"]
    assert sorted(shown(figure)) == ["32×9×9", "64×7×7"]  # each is in one of the two alone


def test_every_form_has_a_colour_and_a_label():
    """Four ways to run, each fused and not, and one of the panels has only one of them."""
    make = lambda mode, impl, us: Row("net", "8x3x64x64", mode, "float32", "nchw", "cpu", impl, "", "", median_us=us)
    ways = ("", ", compiled", ", compiled, max-autotune", ", compiled without cudagraphs")
    forms = [f"{what}{f}{how}" for how in ways for what in ("attention", "plain") for f in ("", ", fused")]
    rows = [make("train-step", impl, 100.0 + 7 * i) for i, impl in enumerate(forms)]
    rows = [make("inference", impl, us) for impl, us in (("attention", 2.0), ("plain", 1.0))] + rows
    figure = drawn(rows, plots._tax)
    assert len(shown(figure)) == 8
    colours = {tuple(bars.patches[0].get_facecolor()) for bars in figure.axes[1].containers}
    assert len(colours) == 8


def test_the_page_needs_no_other_file(results):
    html = page.render(results, plots.draw(results))
    assert html.count("data:image/png;base64,") == 3
    assert 'src="http' not in html
    assert "&lt;net&gt;" in html
    assert "+30.0 %" in html  # the tax, from 130 and 100 ms
    assert "No GPU result is committed yet" in html
    assert str(results) not in html


def test_no_result_no_picture(tmp_path):
    assert plots.draw(tmp_path) == {}
    assert "No result is committed yet" in page.render(tmp_path, {})


def gpu_rows(triton, eager, case="8x256x56x56"):
    """`eager` is the op on that backend; beside it what users have, which is no backend, however fast it is."""
    base = ("scale", case, "forward", "float32", "nchw", "cuda")
    plain = [Row(*base, impl, "", "", median_us=0.1) for impl in ("eager", "triton", "fused module:eager")]
    return [Row(*base, f"fused:{b}", b, "", median_us=us) for b, us in (("triton", triton), ("eager", eager))] + plain


def test_dispatch_table_of_no_gpu_is_empty(results):
    assert dispatch.table(results) == {}
    assert dispatch.render(results).endswith("= {}\n")


def test_dispatch_table_follows_the_results(tmp_path):
    gpu = {"device": "cuda", "capability": "9.0"}
    write(
        tmp_path / "gpu",
        "kernels-1.json",
        "qualify-kernels",
        gpu_rows(10.0, 30.0) + gpu_rows(9.0, 5.0, "1x64x7x7"),
        **gpu,
    )
    found = dispatch.table(tmp_path)
    assert found == {("scale", "sm_90", "large"): ("triton", "eager"), ("scale", "sm_90", "small"): ("eager", "triton")}
    scope = {}
    exec(dispatch.render(tmp_path), scope)
    assert scope["TABLE"] == found


def test_committed_dispatch_table_is_fresh():
    assert dispatch.TARGET.read_text() == dispatch.render(dispatch.RESULTS), "run `python -m bench dispatch`"


def test_the_library_reads_the_table(monkeypatch):
    class OnGpu:
        device, is_cuda = torch.device("cuda", 0), True

        def __init__(self, count):
            self.count = count

        numel = lambda self: self.count
        element_size = lambda self: 4

    op = OPS["scale"]
    assert backend.order(op, OnGpu(10)) == ("triton", "eager")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "TABLE", {("scale", "sm_90", "small"): ("eager", "gone")})
    assert backend.order(op, OnGpu(10)) == ("eager", "triton")
    assert backend.order(op, OnGpu(1 << 20)) == ("triton", "eager")
    assert backend.order(op, torch.empty(3)) == ("cpp", "eager")
