"""Every mechanism moves what it should, and is faster than eager by a wide margin: ratios only (bench/regress.py)."""

import pytest
import torch

from bench import contests, regress, subjects


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_mechanism_is_listed():
    assert {name for name, _ in regress.expected()} == set(contests.CONTESTS)


@pytest.mark.parametrize(("name", "mode"), list(regress.expected()))
def test_no_regression(name, mode):
    if (why := regress.missing(name)) is not None:
        pytest.skip(why)
    found = regress.check(name, mode, regress.expected()[name, mode])
    assert found.wrong is None


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
    plain = subjects.Subject.candidate

    def slowed(self, mode, upstream):
        made = plain(self, mode, upstream)
        if self.name != "fused":
            return made
        return subjects.Candidate(made.name, [lambda: [c() for c in made.calls * 10]], made.context)

    monkeypatch.setattr(subjects.Subject, "candidate", slowed)
    found = regress.check("f2", "forward", regress.expected()["f2", "forward"], tries=2, seconds=0.05)
    assert "times as fast as eager" in found.wrong
