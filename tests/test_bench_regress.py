"""Every mechanism moves what it should, and is faster than eager by a wide margin: ratios only (bench/regress.py)."""

import re
import subprocess
import sys
import time

import pytest
import torch

from bench import __main__ as bench
from bench import contests, measure, regress, subjects, support
from bench.measure import Timing


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def told():
    """What the command says of each mechanism and mode. Not from this process: its heap is that of other tests."""
    run = subprocess.run(
        [sys.executable, "-m", "bench", "regress"], cwd=support.ROOT, capture_output=True, text=True, timeout=900
    )
    lines = [re.split(r"\s{2,}", line) for line in run.stdout.splitlines()]
    found = {(line[0], line[1]): line[-1] for line in lines if len(line) == 7}
    assert found, run.stdout[-2000:] + run.stderr[-2000:]
    wrong = [line[0] for line in lines if len(line) == 1 and "expected" in line[0]]
    assert run.returncode == int(bool(wrong)), run.stderr[-2000:]
    return found, wrong


def test_every_mechanism_is_listed():
    assert {name for name, _ in regress.expected()} == set(contests.CONTESTS)


@pytest.mark.parametrize(("name", "mode"), list(regress.expected()))
def test_no_regression(name, mode, told):
    found, wrong = told
    if (why := regress.missing(name)) is not None:
        assert found[name, mode] == f"not run: {why}"
        pytest.skip(why)
    assert found[name, mode] == "ok", [text for text in wrong if text.startswith(f"{name}, {mode}: ")]


def test_more_passes_are_seen():
    """A floor that can't be reached and a pass too few: both are said, in words."""
    if (why := regress.missing("SGE")) is not None:
        pytest.skip(why)
    found = regress.check("SGE", "forward", {"passes": 3, "floor": 1e6}, tries=1, seconds=0.01)
    assert "4 passes over a feature map, 3 expected" in found.wrong
    assert "at least 1e+06 expected" in found.wrong


def test_a_slow_form_is_seen(monkeypatch):
    """Our form made to do its work ten times."""
    if (why := regress.missing("f2")) is not None:
        pytest.skip(why)
    torch.set_num_threads(1)
    plain = subjects.Subject.candidate

    def slowed(self, mode, upstream):
        made = plain(self, mode, upstream)
        if self.name != "fused":
            return made
        return subjects.Candidate(made.name, [lambda: [c() for c in made.calls * 10]], made.context)

    monkeypatch.setattr(subjects.Subject, "candidate", slowed)
    found = regress.check("f2", "forward", regress.expected()["f2", "forward"], tries=2, seconds=0.05)
    assert "times as fast as eager" in found.wrong


def test_tries_are_apart_and_the_best_counts(monkeypatch):
    """A neighbour that is busy for a second is no regression."""
    if (why := regress.missing("SGE")) is not None:
        pytest.skip(why)
    slept, ratios = [], iter([1.0, 3.0, 2.0, 1.5])
    timing = lambda us: Timing(us, us, us, us, 1, 1)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(measure, "interleave", lambda *_: {"fused": timing(1.0), "eager": timing(next(ratios))})
    found = regress.check("SGE", "forward", {"passes": 4, "floor": 9.0})
    assert slept == [1, 2, 3]
    assert found.speedup == 3.0
    ratios = iter([1.0, 9.5])
    assert regress.check("SGE", "forward", {"passes": 4, "floor": 9.0}).wrong is None


def test_the_process_is_prepared(monkeypatch, capsys):
    """One thread, and the heap pinned, before anything is timed."""
    order = []
    monkeypatch.setattr(measure, "prepare", order.append)
    monkeypatch.setattr(regress, "missing", lambda name: None)
    monkeypatch.setattr(regress, "expected", lambda: {("SGE", "forward"): {"passes": 4, "floor": 1.0}})
    monkeypatch.setattr(regress, "check", lambda *given: order.append("timed") or regress.Found(4, 2.0, None))
    assert bench.main(["regress"]) == 0
    assert order == ["cpu", "timed"]
