"""`qualify` without a GPU: everything but the device's own calls, on the CPU and with a fake sanitizer."""

import argparse
import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import measure, models, qualify, support, trial_correctness, trial_sanitizer, trial_speed, trials
from bench.contests import CONTESTS
from fused_attn.registry import OPS


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", list(qualify.PARTS))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_items(part, device):
    """They can be listed without a device, and their names, which results are resumed by, are all different."""
    names = [i.name for i in qualify.items_of(part, device, "")]
    assert names
    assert len(set(names)) == len(names)


def test_each_item_has_one_worker_and_each_op_too():
    items = qualify.items_of("correctness", "cuda", "")
    found = trials.shares(items, 14)
    assert sorted(i.name for share in found for i in share) == sorted(i.name for i in items)
    place = {i.name: n for n, i in enumerate(items)}
    assert all([place[i.name] for i in share] == sorted(place[i.name] for i in share) for share in found)
    assert sum(any(i.name.startswith("scale ") and not i.group for i in share) for share in found) == 1
    assert max(map(len, found)) < 2 * len(items) / len(found)


def test_an_op_without_kernels_runs_as_the_device_runs_it(monkeypatch):
    monkeypatch.setattr(trial_correctness, "kernels_of", lambda device: "triton")
    assert trial_correctness.runnable(OPS["plane_conv"], "cuda") == ["eager"]
    assert trial_correctness.runnable(OPS["scale"], "cuda") == ["triton", "eager"]


def test_every_mechanism_and_op_is_on_trial():
    names = [i.name for i in qualify.items_of("correctness", "cuda", "")]
    for name in CONTESTS:
        for what in ("float32 nchw", "bfloat16 channels_last", "autocast"):
            assert f"{name}, fused, {what}" in names
        assert f"{name}, CUDA graph" in names
    sanitized = {i.name for i in qualify.items_of("sanitizer", "cuda", "")}
    for op in (op for op in OPS.values() if op.formula is not None):
        assert f"memcheck {op.name}" in sanitized
        assert any(n.startswith(f"{op.name} ") for n in names)
    assert all(i.seconds <= 9 * 60 for part in qualify.PARTS for i in qualify.items_of(part, "cuda", ""))


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "nchw"), ("bfloat16", "channels_last"), ("amp", "nchw")])
@pytest.mark.parametrize("name", ["SGE", "DRSN", "f2", "PSA"])
def test_mechanisms_pass(name, dtype, layout):
    found = trial_correctness._mechanism(name, dtype, layout, "cpu")
    assert found["compared"] >= 3


def test_a_wrong_mechanism_fails(monkeypatch):
    pair_of = trial_correctness.pair_of

    def broken(*given):
        eager, true, fused, xs = pair_of(*given)
        return eager, true, lambda *inputs: fused(*inputs) * 1.001, xs

    monkeypatch.setattr(trial_correctness, "pair_of", broken)
    with pytest.raises(trials.Wrong, match=r"y: error 1\.0e-03"):
        trial_correctness._mechanism("f2", "float32", "nchw", "cpu")


def test_streams():
    entered = []

    class Stream(nullcontext):
        def __enter__(self):
            entered.append(self)

    found = trial_correctness.streamed("cpu", [Stream(), Stream()], rounds=2)
    assert found == {"streams": 2, "rounds": 2}
    assert len(entered) == 4


def test_far_samples(monkeypatch):
    found = trial_correctness.far(OPS["scale"], "cpu", (3, 128, 8))
    assert found["elements"] == 3 * 128 * 64
    assert max(found["error"].values()) < 0.01
    with pytest.raises(trials.NotRun):
        trial_correctness.far(OPS["channel_moments"], "cpu", (3, 128, 8))
    monkeypatch.setattr(trial_correctness.testing, "error", lambda *given: 0.5)
    with pytest.raises(trials.Wrong):
        trial_correctness.far(OPS["scale"], "cpu", (3, 128, 8))


@pytest.mark.parametrize("name", ["four streams at once", "f2, CUDA graph", "scale on more than 2^31 elements"])
def test_what_needs_a_gpu_says_so(name):
    (item,) = [i for i in qualify.items_of("correctness", "cpu", "") if i.name == name]
    with pytest.raises(trials.NotRun, match="needs a GPU"):
        item.run()


def test_mechanisms_come_at_one_shape_before_the_next():
    """Where time runs out, every one of them has been timed once."""
    names = [i.name for i in qualify.items_of("kernels", "cuda", "")]
    at = [n for n in names if re.search(r" 64x\d+x(\d+)x\1 forward\+backward", n) and not n.startswith("pool_mlp")]
    at = [n for n in at if any(n.startswith(f"{c} 64x") for c in CONTESTS)][: len(CONTESTS)]
    assert len({n[n.index(" 64x") :] for n in at}) == 1
    assert len(at) == len(CONTESTS)


def test_the_dispatch_table_gets_its_eager_rows(monkeypatch):
    """Every op that has kernels is timed on eager as well: without that there is nothing to choose from."""
    made = []
    monkeypatch.setattr(trial_speed.Job, "run", lambda self, *_: made.append(self.backends) or [])
    monkeypatch.setattr(trial_speed, "backends_of", lambda device: ("triton",))
    for item in qualify.items_of("kernels", "cuda", "^(scale|pool_mlp_scale) .*forward$"):
        item.run()
    assert set(made) == {("triton", "eager")}


FAKE = """#!{python}
import subprocess, sys
status = subprocess.run(sys.argv[3:]).returncode
print("========= ERROR SUMMARY: {errors} errors")
"""


@pytest.mark.parametrize("errors", [0, 2])
def test_sanitizer(tmp_path, monkeypatch, errors):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(python=sys.executable, errors=errors))
    fake.chmod(0o755)
    monkeypatch.setattr(trial_sanitizer, "program", lambda: str(fake))
    (item,) = [i for i in qualify.items_of("sanitizer", "cpu", "") if i.name == "memcheck map_scale"]
    if errors:
        with pytest.raises(trials.Wrong, match="2 errors in"):
            item.run()
    else:
        assert item.run()["cases"] > 2


def test_a_device_that_the_sanitizer_does_not_know(tmp_path, monkeypatch):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f"#!{sys.executable}\nprint('========= Error: Device not supported.')\nraise SystemExit(1)\n")
    fake.chmod(0o755)
    monkeypatch.setattr(trial_sanitizer, "program", lambda: str(fake))
    with pytest.raises(trials.NotRun, match="doesn't support this device"):
        qualify.items_of("sanitizer", "cpu", "memcheck map_scale")[0].run()


# Starts a process that would outlive it, writes down its number, and waits.
PARENT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
child = [sys.executable, "-c", "import time; time.sleep(100)"]
{}
"""
DIRECT = "open(sys.argv[1], 'w').write(f'{subprocess.Popen(child).pid} '); time.sleep(100)"
APART = """
from bench import trials
text = "import subprocess, sys, time; child = " + repr(child) + "; "
text += "open(sys.argv[1], 'w').write(f'{subprocess.Popen(child).pid} '); time.sleep(100)"
trials.output([sys.executable, "-c", text, sys.argv[1]], 100)
"""


def child_of(path):
    for _ in range(300):
        if path.exists() and path.read_text().endswith(" "):
            return int(path.read_text())
        time.sleep(0.1)
    raise AssertionError("it didn't start")


def gone(pid):
    """Whether a process ends within seconds; one that nobody has asked about yet has."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


@needs_proc
@pytest.mark.parametrize("how", [DIRECT, APART], ids=["its own child", "in a session of its own"])
def test_what_a_worker_started_ends_with_it(tmp_path, how):
    """Its own children, and what an item runs in a session of its own, such as the sanitizer."""
    path = tmp_path / "number"
    worker = qualify.Worker([sys.executable, "-c", PARENT.format(how), str(path)], tmp_path / "log.jsonl")
    worker.start()
    try:
        pid = child_of(path)
    finally:
        worker.stop()
    assert worker.process.poll() is not None
    assert gone(pid)


def test_no_worker_outlives_its_driver(tmp_path, monkeypatch):
    """Not where the driver itself fails, either."""
    started, start = [], qualify.Worker.start

    def fail(self):
        raise OSError("no space left")

    monkeypatch.setattr(qualify.Worker, "start", lambda self: started.append(self) or start(self))
    monkeypatch.setattr(qualify.Worker, "look", fail)
    with pytest.raises(OSError, match="no space"):
        qualify.drive("correctness", "cpu", "^scale 2x3x7x7", 1, time.monotonic() + 60, tmp_path)
    (worker,) = started
    try:
        assert worker.process.poll() is not None
    finally:
        worker.stop()


@needs_proc
def test_a_command_that_takes_too_long(tmp_path):
    path = tmp_path / "number"
    with pytest.raises(trials.Wrong, match="stopped after 3 s"):
        trials.output([sys.executable, "-c", PARENT.format(DIRECT), str(path)], 3)
    assert gone(child_of(path))


def given(tmp_path, *more):
    parser = argparse.ArgumentParser()
    p = qualify.parser(parser.add_subparsers().add_parser)
    return p.parse_args(["--only", "kernels", "--device", "cpu", "--out", str(tmp_path), *more])


ROW = models.Row("scale", "1x1x1x1", "forward", "float32", "nchw", "cpu", "fused:cpp", "cpp", "", median_us=1.0)


@pytest.mark.parametrize(
    ("raised", "status"), [(RuntimeError("CUDA error"), 0), (KeyboardInterrupt(), qualify.STOPPED)]
)
def test_figures_that_fail_take_nothing_away(tmp_path, monkeypatch, raised, status):
    """What was measured is on disk before the device is asked for more."""

    def fail(device):
        raise raised

    entries = [{"name": "a", "status": "passed", "rows": [ROW.dict()]}]
    monkeypatch.setattr(qualify, "drive", lambda *_, **__: (entries, True, False))
    monkeypatch.setattr(qualify.figures, "copy_gbps", fail)
    assert qualify.qualify("kernels", given(tmp_path), "cpu", []) == status
    (path,) = tmp_path.glob("*/kernels-*.json")
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_interrupted_while_it_compiles(tmp_path, monkeypatch):
    """Nothing is timed after that."""
    driven = []
    monkeypatch.setattr(qualify, "drive", lambda *_, prepare=False, **__: driven.append(prepare) or ([], False, True))
    monkeypatch.setattr(measure, "provenance", lambda *_: {"device_name": "a GPU"})
    assert qualify.qualify("kernels", given(tmp_path), "cuda", []) == qualify.STOPPED
    assert driven == [True]
    assert not list(tmp_path.glob("*/*.json"))


def test_clocks_stand_beside_what_was_timed(tmp_path, monkeypatch):
    items = [trials.Item("timed", lambda: {"rows": [ROW.dict()]}), trials.Item("checked", lambda: {"error": 0.0})]
    monkeypatch.setattr(qualify, "items_of", lambda *_: items)
    monkeypatch.setattr(measure, "clocks", lambda: "1980 MHz")
    log = tmp_path / "log.jsonl"
    assert qualify.work("kernels", "cuda", "", "0/1", log, False) == 0
    found = {e["name"]: e for e in qualify._entries(log) if e["status"] == "passed"}
    assert found["timed"]["clocks"] == "1980 MHz"
    assert "clocks" not in found["checked"]


def test_no_sanitizer(monkeypatch):
    monkeypatch.setattr(trial_sanitizer, "program", lambda: None)
    with pytest.raises(trials.NotRun, match="not installed"):
        qualify.items_of("sanitizer", "cpu", "memcheck scale")[0].run()


def test_models_are_items(monkeypatch):
    row = models.Row("net", "2x3x8x8", "inference", "amp", "nchw", "cpu", "attention, fused", "", "", median_us=1.0)
    monkeypatch.setattr(models.Job, "run", lambda self, seconds, number: [row])
    items = qualify.items_of("models", "cuda", "^mobilenetv3_large_100 inference")
    if support.importable("timm"):
        assert items[0].run() == {"rows": [row.dict()]}
    failed = models.Row(**row.dict() | {"median_us": None, "error": "RuntimeError: boom"})
    with pytest.raises(trials.Wrong, match="boom"):
        trial_speed._rows([failed])
    baseline = models.Row(**failed.dict() | {"impl": "plain, compiled"})
    assert trial_speed._rows([baseline])["rows"][0]["error"]


ARGUMENTS = ["qualify", "--device", "cpu", "--only", "correctness"]


def test_resume(tmp_path, capsys):
    """What was settled isn't run again; what there was no time for is."""
    match = r"^scale 2x3x7x7.*float32 (contiguous|channels_last)"
    assert bench.main([*ARGUMENTS, "--match", match, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/correctness-*.json")
    content = json.loads(path.read_text())
    assert len(content["items"]) > 1
    content["items"][0]["seconds"] = 1234.5
    content["items"][1] = {"name": content["items"][1]["name"], "status": "not run", "reason": "the time was up"}
    path.write_text(json.dumps(content))
    again = tmp_path / "again"
    assert bench.main([*ARGUMENTS, "--match", match, "--out", str(again), "--resume", str(path)]) == 0
    (other,) = again.glob("*/correctness-*.json")
    found = json.loads(other.read_text())
    assert found["items"][0]["seconds"] == 1234.5
    assert {i["status"] for i in found["items"]} == {"passed"}
    assert bench.main(["qualify", "--device", "cpu", "--resume", str(path)]) == 2
    assert "--only" in capsys.readouterr().out


def test_interrupted(tmp_path, monkeypatch, capsys):
    """What there is gets written, and no other part begins."""

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(qualify.Worker, "look", stop)
    match = ["--match", "^scale 2x3x7x7.*float32 contiguous"]
    assert bench.main(["qualify", "--device", "cpu", *match, "--out", str(tmp_path)]) == qualify.STOPPED
    (path,) = tmp_path.glob("*/*.json")
    assert path.name.startswith("correctness-")
    content = json.loads(path.read_text())
    assert not content["finished"]
    assert "it was interrupted" in capsys.readouterr().out
