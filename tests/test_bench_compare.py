"""`python -m bench compare`: ratios, not times; what got slower fails, what got faster doesn't."""

import dataclasses
import json

import pytest

from bench import __main__ as bench
from bench import compare
from bench.measure import Row


def rows(eager, fused, clone=10.0, run=0):
    base = Row("scale", "8x64x7x7", "forward", "float32", "nchw", "cpu", "", "", "", run=run)
    made = {"eager": eager, "fused": fused, "clone": clone}
    return [
        Row(**{**base.dict(), "impl": impl, "median_us": us, "error": None if us else "no"})
        for impl, us in made.items()
    ]


def write(path, *several):
    path.write_text(json.dumps({"rows": [r.dict() for rs in several for r in rs]}))
    return str(path)


def test_another_machine_is_no_change(tmp_path, capsys):
    a, b = write(tmp_path / "a", rows(100, 50)), write(tmp_path / "b", rows(1000, 500))
    assert bench.main(["compare", a, b, "--fail-if-slower", "1%"]) == 0
    assert "+0.0 %" in capsys.readouterr().out
    assert bench.main(["compare", a, b, "--absolute", "--fail-if-slower", "1%"]) == 1


@pytest.mark.parametrize(("fused", "limit", "status"), [(55, "5%", 1), (55, "15", 0), (45, "5%", 0)])
def test_slower(tmp_path, capsys, fused, limit, status):
    a, b = write(tmp_path / "a", rows(100, 50)), write(tmp_path / "b", rows(100, fused))
    assert bench.main(["compare", a, b, "--fail-if-slower", limit]) == status
    assert ("slower by more than" in capsys.readouterr().out) == bool(status)


def test_reference_and_runs():
    found = compare.relative([*rows(100, 50), *rows(100, 80, run=1), *rows(100, 60, run=2)], None)
    assert found == {("scale", "8x64x7x7", "forward", "float32", "nchw", "fused", "eager"): pytest.approx(0.6)}
    assert list(compare.relative(rows(100, 50), "clone").values()) == [pytest.approx(5.0)]
    assert list(compare.relative(rows(None, 50), None).values()) == [pytest.approx(5.0)]  # eager failed


def test_a_ratio_to_eager_is_not_one_to_clone(tmp_path, capsys):
    """Where eager failed in one file, its rows have another reference, and nothing is said of them."""
    a, b = write(tmp_path / "a", rows(100, 50)), write(tmp_path / "b", rows(None, 50))
    assert bench.main(["compare", a, b, "--fail-if-slower", "5%"]) == 2
    assert "no row in common" in capsys.readouterr().err
    assert bench.main(["compare", a, b, "--fail-if-slower", "5%", "--against", "clone"]) == 0


@pytest.mark.parametrize("others", [[], [100, 40]])
def test_ours_that_failed_is_no_pass(tmp_path, capsys, others):
    """It has no time that could be slower, and is no less wrong for that."""
    more = [dataclasses.replace(r, case="8x64x9x9") for r in rows(*others)] if others else []
    a, b = write(tmp_path / "a", rows(100, 50), more), write(tmp_path / "b", rows(100, None), more)
    assert bench.main(["compare", a, b, "--fail-if-slower", "5%"]) == 1
    said = capsys.readouterr().out
    assert "failed in B: scale 8x64x7x7 forward float32 nchw fused: no" in said
    assert not others or "0 only in A" in said  # it was there, and failed
    assert bench.main(["compare", a, b, "--fail-if-slower", "5%", "--impl", "other"]) == 2
    assert bench.main(["compare", b, a, "--fail-if-slower", "5%"]) == (0 if others else 2)  # it works again
    assert bench.main(["compare", a, b]) == (0 if others else 2)  # nothing was asked


def test_nothing_to_compare(tmp_path, capsys):
    a = write(tmp_path / "a", rows(100, 50))
    (tmp_path / "b").write_text("{}")
    assert bench.main(["compare", a, str(tmp_path / "b")]) == 2
    assert bench.main(["compare", a, str(tmp_path / "missing")]) == 2
    assert bench.main(["compare", a, write(tmp_path / "c", [])]) == 2
    with pytest.raises(SystemExit):
        bench.main(["compare", a, a, "--fail-if-slower", "fast"])
    assert "5%" in capsys.readouterr().err
