"""`python -m bench models`: the pairs are what they say, the tax is counted right, what fails is reported."""

import json

import pytest
import torch

from bench import __main__ as bench
from bench import memory, models, support, taxed
from bench.measure import Row

SMALL = "mobilenetv3_large_100"


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def row(impl, us, **more):
    return Row("net", "4x3x8x8", "inference", "float32", "nchw", "cpu", impl, "", "", median_us=us, **more)


def test_tax_compares_like_with_like():
    rows = [
        row("attention", 150.0), row("plain", 100.0), row("attention, fused", 96.0), row("plain, fused", 80.0),
        row("attention, compiled", 70.0), row("attention", 130.0, run=1),
    ]  # fmt: skip
    found = {key[-2:]: tax for key, tax in models.taxes(rows).items()}
    assert found == {(0, "attention"): pytest.approx(50.0), (0, "attention, fused"): pytest.approx(20.0)}
    assert models.images(rows[0], 2e6) == 2.0


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 64])
def test_largest_batch(limit, start):
    found = models.search(lambda n: n <= limit, start)
    assert limit - max(1, limit // 16) < found <= limit or found == limit == 0


QUICK = (SMALL, "epsanet50", "cbam_resnet50")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in taxed.PAIRS if n not in QUICK)]
)
def test_pairs(name):
    """Fused computes the same, with and without attention; without, nothing is left that makes a gate."""
    if (why := taxed.missing(name)) is not None:
        pytest.skip(why)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outs = {form: taxed.build(name, form, 64)(x) for form in taxed.FORMS}
    for form in ("attention", "plain"):
        torch.testing.assert_close(outs[f"{form}, fused"], outs[form], rtol=1e-3, atol=1e-3 * float(outs[form].std()))
    assert not torch.allclose(outs["attention"], outs["plain"], rtol=0.1)
    plain = taxed.build(name, "plain", 64)
    gates = ("SqueezeExcite", "SEModule", "EcaModule", "SelectiveKernel", "CbamBlock", "PyramidSqueeze")
    assert not [n for n, m in plain.named_modules() if type(m).__name__ in gates]


def test_a_form_that_fails_is_reported(monkeypatch):
    if (why := taxed.missing(SMALL)) is not None:
        pytest.skip(why)
    build = taxed.build

    def broken(name, form, size):
        if form == "attention, fused":
            raise RuntimeError("no kernel today")
        return build(name, form, size)

    monkeypatch.setattr(taxed, "build", broken)
    job = models.Job(SMALL, "inference", "float32", "nchw", "cpu", 2, 32, memory=False, rounds=(1, 1))
    rows = {r.impl: r for r in job.run(0.01, 0)}
    assert set(rows) == set(taxed.FORMS)
    assert rows["attention, fused"].error == "RuntimeError: no kernel today"
    assert rows["attention"].median_us > 0
    assert "failed" in models.summary(list(rows.values()))


def test_a_missing_library_is_reported(monkeypatch):
    monkeypatch.setattr(taxed, "importable", lambda library: library != "pytorchcv")
    (found,) = models.Job("cbam_resnet50", "inference", "float32", "nchw", "cpu", 2, 32).run(0.01, 0)
    assert found.error == "pytorchcv: not installed"


def test_command(tmp_path, capsys):
    if (why := taxed.missing(SMALL)) is not None:
        pytest.skip(why)
    arguments = ["models", "--quick", "--network", SMALL, "--size", "32", "--seconds", "0.01", "--dtype", "amp"]
    assert bench.main([*arguments, "--layout", "channels_last", "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "images/s" in said
    assert "not run" in said  # the largest batch, on a CPU
    assert "plain is Identity for every SE" in said
    content = json.loads(next(tmp_path.glob("*/models-*.json")).read_text())
    assert {r["mode"] for r in content["rows"]} == set(models.MODES)
    assert {r["impl"] for r in content["rows"]} == set(taxed.FORMS)


class Known(torch.nn.Module):
    """Keeps two maps: exp its result, square its argument."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return ((x * self.weight).exp() * 2).square()


def test_memory_of_a_known_network():
    if not support.Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    found = memory.used(Known(), 16, 296, "cpu")
    size = 16 * 3 * 296 * 296 * 4 / 2**20  # MiB of a map
    assert found["saved"] == pytest.approx(2 * size, rel=0.01)
    assert found["peak"] > 2 * size - 1
