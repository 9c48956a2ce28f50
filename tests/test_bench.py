"""The bench itself: it counts the right bytes, sees what is slow, reports what fails; generated text is fresh."""

import dataclasses
import json
import math
import shlex
import subprocess
import sys
import time

import pytest
import torch

from bench import __main__ as bench
from bench import blocks, labels, measure, memory, ops, qualify, report, subjects, support, tables, trials
from bench.contests import CONTESTS, TAIL, WITHOUT
from bench.measure import Candidate, Row, Timing
from fused_attn import backend
from fused_attn.registry import OPS, case

SMALL = case(x=(2, 32, 14, 14), w1=(4, 32), b1=(4,), w2=(32, 4), b2=(32,))


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "c", "mode", "passes"),
    [
        ("pool_mlp_scale", SMALL, "forward", 3),  # read x, read x again, write y
        ("pool_mlp_scale", SMALL, "forward+backward", 7),  # and: read x and dy; read dy, write dx
        ("scale", case(x=(2, 8, 6, 6), gate=(2, 8)), "forward", 2),
        ("scale", case(x=(2, 8, 6, 6), gate=(2, 8), residual=(2, 8, 6, 6), act="relu"), "forward", 3),
        # and: read x, y and dy, write dx and dresidual
        ("scale", case(x=(2, 8, 6, 6), gate=(2, 8), residual=(2, 8, 6, 6), act="relu"), "forward+backward", 8),
        ("channel_pool", case(x=(2, 8, 6, 6)), "forward", 1),
        ("channel_pool", case(x=(2, 8, 6, 6)), "forward+backward", 2),  # the mean's gradient reads nothing
    ],
)
def test_bytes_are_those_counted_by_hand(name, c, mode, passes):
    job = ops.Job(OPS[name], c, mode=mode, baselines=("clone",))
    rows = {row.impl: row for row in job.run(0.01)}
    x_bytes = 4 * math.prod(next(iter(c.args.values())))
    assert rows["fused"].passes == passes
    assert rows["fused"].bytes == passes * x_bytes
    assert rows["clone"].bytes == 2 * x_bytes
    assert rows["fused"].gbps == pytest.approx(passes * x_bytes / rows["fused"].median_us / 1e3, rel=0.01)


def test_every_form_has_its_own_backend():
    if (why := backend.extension()) is not None:
        pytest.skip(why)
    job = ops.Job(OPS["scale"], case(x=(2, 8, 6, 6), gate=(2, 8)), baselines=(), backends=("cpp", "eager"))
    assert {r.impl: r.backend for r in job.run(0.01)} == {"fused:cpp": "cpp", "fused:eager": "eager"}


def test_every_form_has_its_own_passes():
    """The tail with its gate reads what the one without needn't, and both run where they are told to."""
    job = blocks.Job(CONTESTS[TAIL], 2, 32, 8, "float32", "nchw", "forward", "cpu", (), "eager")
    by = {r.impl: r for r in job.run(0.02, 0)}
    assert {r.backend for r in by.values()} == {"eager"}
    assert by[WITHOUT].passes is not None
    assert by[WITHOUT].passes < by["fused"].passes
    for r in by.values():
        assert r.bytes == r.passes * 4 * 2 * 32 * 8 * 8
        assert r.gbps == pytest.approx(r.bytes / r.median_us / 1e3, rel=0.01)


def test_recorded_commands_can_be_typed():
    words = ["python", "-m", "bench", "blocks", "--block", "BAM merge", "--match", "^a|b$"]
    assert shlex.split(measure.provenance("cpu", words)["command"]) == words


def test_original_module_is_the_baseline():
    pytest.importorskip("timm", exc_type=ImportError) if support.importable("timm") else pytest.skip("no timm")
    job = ops.Job(OPS["pool_mlp_scale"], SMALL, baselines=("eager",))
    by = {s.name: s for s in job.subjects()}
    assert by["eager"].source == "timm.layers.squeeze_excite.SEModule"
    with torch.no_grad():
        ours, theirs, module = (by[k].function(*by[k].args[0]) for k in ("fused", "eager", "fused module"))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(module, theirs)


def busy(seconds):
    def call():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return call


def test_slow_shows_as_slow():
    timings = measure.interleave([Candidate("quick", [busy(1e-3)]), Candidate("slow", [busy(3e-3)])], 0.1)
    quick, slow = timings["quick"], timings["slow"]
    assert 2.5 < slow.median_us / quick.median_us < 3.5
    assert quick.p20_us <= quick.median_us <= quick.p80_us


def test_short_calls_are_timed_in_bundles():
    (timing,) = measure.interleave([Candidate("nothing", [lambda: None])], 0.01).values()
    assert timing.calls_per_sample > 100
    assert timing.median_us < 50


def test_gpu_calls_find_a_cold_cache(monkeypatch):
    """No call has the buffers of the one before it, nor of any that the L2 cache still holds."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "_cuda_sample", lambda c, turn, *_: order.append(turn % 5) or (1e-5, 1e-5))
    candidates = [Candidate(name, [lambda: None] * 5) for name in "abc"]
    measure.interleave(candidates, 0.0, "cuda", (10, 10))
    assert len(order) == 30
    assert all(len(set(order[i : i + 5])) == 5 for i in range(26))


@pytest.mark.parametrize(("host", "slept"), [(0.0, 1e-3), (0.01, 0.02), (0.06, 0.05)])
def test_a_gpu_sleeps_while_the_host_queues(monkeypatch, host, slept):
    cycles = []

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: 0.5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    (timing,) = measure.interleave([Candidate("it", [lambda: time.sleep(host)])], 0.0, "cuda", (2, 2)).values()
    assert timing.median_us == 500.0
    assert timing.wall_us >= host * 1e6  # the host's own
    assert cycles[0] / measure._CYCLES == pytest.approx(slept, rel=0.3)
    assert len(cycles) == 2


HEAP = """
import resource, sys, torch
from bench import measure
if len(sys.argv) > 1 and not measure.pin_heap():
    sys.exit("no glibc")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make = lambda: torch.empty(8 << 20).fill_(1)  # 32 MB: glibc would map and unmap it each time
make()
before = faults()
for _ in range(20):
    make()
print(faults() - before)
"""


def test_heap_stays_faulted_in():
    """In a process of its own: in a long-lived one the heap is in pieces, and each array may get another of them."""
    pytest.importorskip("resource")

    def faults(*arguments):
        run = subprocess.run([sys.executable, "-c", HEAP, *arguments], capture_output=True, text=True)
        if "no glibc" in run.stderr:
            pytest.skip("no glibc")
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert faults("pin") < faults() / 4  # five arrays of twenty, at most


def test_failing_baseline_is_reported(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(subjects, "compiled", lambda function, **options: lambda *args: broken(function))
    rows = ops.Job(OPS["scale"], case(x=(2, 8, 6, 6), gate=(2, 8))).run(0.01)
    failed = [r for r in rows if r.impl.startswith("inductor")]
    assert len(failed) == 2
    assert all(r.error == "RuntimeError: no compiler today" and r.median_us is None for r in failed)
    assert "failed" in ops.summary(rows)
    assert next(r for r in rows if r.impl == "fused").median_us is not None


def synthetic(factor, run=0):
    """Rows of the speed table where ours is everywhere `factor` times as fast as eager, Inductor just as fast."""
    rows = []
    cases = [ops.label(OPS[ops.SE], c) for c in labels.bench_cases(OPS[ops.SE])] + [ops.label(OPS[ops.SE], ops.HOST)]
    for c in cases:
        for mode in measure.MODES:
            for impl, t in (
                ("eager", 100.0),
                ("inductor", 120.0),
                ("inductor, no layout", 100.0),
                ("fused module", 100 / factor),
            ):
                row = Row(ops.SE, c, mode, "float32", "nchw", "cpu", impl, "", "", median_us=t, run=run)
                rows.append(row)
    return rows


def test_floors():
    met = ops.floors(synthetic(5.0))
    assert len(met) == 7
    assert all(f.met for f in met)
    assert all(f.measured == pytest.approx(5.0) for f in met)
    missed = ops.floors(synthetic(0.9))
    assert not any(f.met for f in missed)
    best = ops.floors(synthetic(0.9) + synthetic(5.0, run=1))
    assert all(f.met for f in best)
    some = {f.name: f.met for f in ops.floors(synthetic(2.0))}
    assert some["forward (inference), N=8"]
    assert not some["forward (inference), N=1"]
    assert all("not measured" in f.detail and not f.met for f in ops.floors([]))
    assert "MISSED" in ops.floor_table(missed)


def test_one_slow_shape_is_enough_to_miss():
    rows = synthetic(5.0)
    slow = next(i for i, r in enumerate(rows) if r.impl == "fused module" and r.case.startswith("8x2048"))
    rows[slow] = dataclasses.replace(rows[slow], median_us=110.0)
    (line,) = [f for f in ops.floors(rows) if f.name.startswith("forward, every shape")]
    assert not line.met
    assert line.measured == pytest.approx(100 / 110)


def test_readme_is_fresh():
    text = report.README.read_text()
    assert report.render(text) == text, "README.md is stale: run `python -m bench report`"
    for op in ("pool_mlp_scale", "scale", "channel_pool", "shared_mlp", "pool_scale"):
        assert f"`{op}`" in text


def test_support_table_agrees_with_what_is_built():
    if (why := backend.extension()) is not None:
        pytest.skip(why)
    for op in OPS.values():
        assert report._has_cpp(op) == (not isinstance(backend.implementation(op, "cpp"), str)), op.name


def test_report_of_results(tmp_path):
    content = {
        "schema": 1,
        "kind": "ops",
        "provenance": {
            "device": "cpu", "device_name": "A CPU", "torch": "2", "threads": 1, "clock": "CPU time", "simd": "AVX2",
            "git": "0123456789abcdef", "git_changed": False, "command": "python -m bench ops", "time": "2026-01-02",
        },
        "rows": [r.dict() for r in synthetic(2.0)],
    }  # fmt: skip
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu" / "ops-1.json").write_text(json.dumps(content))
    content["floors"] = [f._asdict() for f in ops.floors(synthetic(2.0))]
    (tmp_path / "a-cpu" / "floors-1.json").write_text(json.dumps(content))
    text = report.measured(tmp_path)
    assert "2.00" in text
    assert "`python -m bench ops` at 0123456789, 2026-01-02" in text
    assert "No GPU result is committed yet" in text
    assert report.measured(tmp_path) == text


def test_report_of_mechanisms(tmp_path):
    """Files of several commands are one table; of one command the newest counts."""
    source = {
        "device": "cpu", "device_name": "A CPU", "torch": "2", "threads": 1, "clock": "CPU time", "simd": "AVX2",
        "git": "0123456789abcdef", "git_changed": False, "time": "2026-01-02",
    }  # fmt: skip

    def write(name: str, command: str, eager: float, cases: list[str], dtype: str = "float32") -> None:
        base = Row("CBAM", "", "forward", dtype, "nchw", "cpu", "fused", "cpp", "", median_us=10.0)
        rows = [dataclasses.replace(base, case=c) for c in cases]
        rows += [dataclasses.replace(r, impl="eager", median_us=eager) for r in rows]
        rows += [dataclasses.replace(r, impl="inductor", median_us=15.0) for r in rows[:1]]
        content = {"schema": 1, "kind": "blocks", "provenance": source | {"command": command}}
        (tmp_path / "a-cpu" / name).write_text(json.dumps(content | {"rows": [r.dict() for r in rows]}))

    (tmp_path / "a-cpu").mkdir()
    write("blocks-1.json", "a", 90.0, ["8x64x7x7"])
    write("blocks-2.json", "a", 20.0, ["8x64x7x7", "8x32x14x14"])
    write("blocks-3.json", "b", 30.0, ["8x64x7x7"], "bfloat16")
    write("blocks-4.json", "c", 40.0, ["1x64x7x7"])
    text = report.measured(tmp_path)
    assert "| speed-up over eager | mode | 32x14x14 | 64x7x7 | N=8, bfloat16, nchw | N=1, float32, nchw |" in text
    assert "| CBAM | forward | 2.00 | 2.00 | 3.00 | 4.00 | 1.50 |" in text
    assert "9.00" not in text


SOURCE = {
    "device": "cpu", "device_name": "A CPU", "torch": "2", "threads": 1, "clock": "CPU time", "simd": "AVX2",
    "git": "0123456789abcdef", "git_changed": False, "time": "2026-01-02",
}  # fmt: skip


def write_result(folder, name, kind, command, rows, **more):
    content = {"schema": 1, "kind": kind, "provenance": SOURCE | {"command": command} | more}
    (folder / "a-cpu").mkdir(exist_ok=True)
    (folder / "a-cpu" / name).write_text(json.dumps(content | {"rows": [r.dict() for r in rows]}))


def cbam(eager, dtype="float32", inductor=None):
    base = Row("CBAM", "8x64x7x7", "forward", dtype, "nchw", "cpu", "fused", "cpp", "", median_us=10.0)
    rows = [base, dataclasses.replace(base, impl="eager", median_us=eager)]
    return rows + ([dataclasses.replace(base, impl="inductor", median_us=inductor)] if inductor else [])


def test_a_rerun_wins_over_an_older_file_of_another_command(tmp_path):
    write_result(tmp_path, "blocks-1.json", "blocks", "a", cbam(90.0))
    write_result(tmp_path, "blocks-2.json", "blocks", "b", cbam(50.0))
    write_result(tmp_path, "blocks-3.json", "blocks", "a", cbam(20.0))
    assert "| CBAM | forward | 2.00 |" in report.measured(tmp_path)
    assert [c["path"] for c in tables.newest(tmp_path)["a-cpu", "blocks"]] == [
        "a-cpu/blocks-2.json", "a-cpu/blocks-3.json",
    ]  # fmt: skip


def test_inductor_of_two_dtypes(tmp_path):
    """One case in two dtypes is two measurements."""
    write_result(tmp_path, "blocks-1.json", "blocks", "a", cbam(20.0, inductor=15.0) + cbam(30.0, "bfloat16", 40.0))
    assert "| CBAM | forward | 2.00 | 3.00 | 1.50 – 4.00 |" in report.measured(tmp_path)


@pytest.mark.parametrize("kind", ["ops", "qualify-kernels", "blocks"])
@pytest.mark.parametrize("part", ["--quick", "--match '^scale x'", "--match=scale"])
def test_a_part_never_replaces_the_whole(tmp_path, kind, part):
    paths = lambda: [c["path"][len("a-cpu/") :] for c in tables.newest(tmp_path)["a-cpu", kind]]
    write_result(tmp_path, "1.json", kind, f"python -m bench {part}", cbam(20.0))
    assert paths() == ["1.json"]  # better than nothing
    write_result(tmp_path, "2.json", kind, "python -m bench", cbam(30.0))
    assert paths() == ["2.json"]
    write_result(tmp_path, "3.json", kind, f"python -m bench {part} --seconds 1", cbam(40.0))
    assert paths() == ["2.json"]
    write_result(tmp_path, "4.json", kind, "python -m bench", cbam(50.0))
    assert paths() == ["4.json"]


def test_a_busy_machine_is_said(tmp_path):
    calm, disturbed = {"wall_over_cpu": 1.02, "load_average": 0.1}, {"wall_over_cpu": 1.372, "load_average": 3.0}
    write_result(tmp_path, "blocks-1.json", "blocks", "a", cbam(20.0), probe=calm, probe_after=calm)
    assert "busy" not in report.measured(tmp_path)
    write_result(tmp_path, "blocks-2.json", "blocks", "a", cbam(20.0), probe=calm, probe_after=disturbed)
    assert "busy: wall ÷ CPU 1.37; `a`" in report.measured(tmp_path)


def test_floors_say_of_how_many_runs_they_are_the_best(tmp_path):
    folder = tmp_path / "a-cpu"
    folder.mkdir()
    rows = [r for run in range(3) for r in synthetic(2.0, run)]
    content = {"schema": 1, "kind": "ops", "provenance": SOURCE | {"command": "c"}, "rows": [r.dict() for r in rows]}
    content["floors"] = [f._asdict() for f in ops.floors(rows)]
    (folder / "floors-1.json").write_text(json.dumps(content))
    assert "speed-up | best of 3 runs | floor |" in report.measured(tmp_path)
    assert "best of 3 runs" in ops.floor_table(ops.floors(rows), 3)


def test_qualify_says_that_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["qualify"]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_qualify_runs_items_in_workers(tmp_path, capsys):
    match = r"^scale 2x3x7x7 .*float32 contiguous|more than 2\^31 elements, contiguous"
    assert (
        bench.main(["qualify", "--device", "cpu", "--only", "correctness", "--match", match, "--out", str(tmp_path)])
        == 0
    )
    (path,) = tmp_path.glob("*/correctness-*.json")
    content = json.loads(path.read_text())
    assert content["counts"] == {"passed": 1, "not run": 1}
    assert content["finished"]
    (found,) = [i for i in content["items"] if i["status"] == "passed"]
    assert found["error"]["eager"] < 1e-5
    assert str(tmp_path) not in path.read_text()
    assert "1 passed, 0 failed, 1 not run" in capsys.readouterr().out


def test_qualify_times_kernels(tmp_path):
    match = r"^scale 8x512x28x28 bfloat16 nchw forward$"
    arguments = ["qualify", "--device", "cpu", "--only", "kernels", "--match", match, "--minutes", "3"]
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.glob("*/kernels-*.json")).read_text())
    assert content["finished"]
    assert content["counts"] == {"passed": 1}
    assert content["provenance"]["copy_gbps"] > 0
    assert content["provenance"]["threads"] == 1
    by = {r["impl"]: r for r in content["rows"]}
    ours = {f"fused:{b}" for b in (*trials.backends_of("cpu"), "eager")}
    assert set(by) >= ours | {"eager", "clone"}
    assert all(by[impl]["median_us"] > 0 and by[impl]["error"] is None for impl in ours | {"eager", "clone"})
    assert all(by[impl]["backend"] == impl[len("fused:") :] for impl in ours)


def test_a_dying_worker_costs_one_item(tmp_path, monkeypatch):
    """The item that killed its process is marked failed; the others run."""
    import subprocess
    import sys

    log = tmp_path / "log.jsonl"
    program = (
        "import json, os, sys\n"
        f"done = [json.loads(l)['name'] for l in open({str(log)!r})] if os.path.exists({str(log)!r}) else []\n"
        f"say = lambda **e: open({str(log)!r}, 'a').write(json.dumps(e) + '\\n')\n"
        "for name in ('a', 'deadly', 'b'):\n"
        "    if name in done: continue\n"
        "    say(name=name, status='begun', limit=60, at=0)\n"
        "    if name == 'deadly': sys.exit('illegal memory access')\n"
        "    say(name=name, status='passed')\n"
    )
    monkeypatch.setattr(time, "time", lambda: 0.0)
    worker = qualify.Worker([sys.executable, "-c", program], log)
    worker.start()
    for _ in range(300):
        worker.look()
        if worker.done:
            break
        try:
            worker.process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    entries = {e["name"]: e for e in qualify._entries(log) if e["status"] != "begun"}
    assert {name: e["status"] for name, e in entries.items()} == {"a": "passed", "deadly": "failed", "b": "passed"}
    assert "illegal memory access" in entries["deadly"]["reason"]


@pytest.mark.parametrize(
    "command", [[], *([c] for c in ("ops", "blocks", "models", "compare", "regress", "qualify", "dispatch", "report"))]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m bench" in capsys.readouterr().out


def test_ops_command_writes_json_without_paths(tmp_path, capsys):
    out = tmp_path / "results"
    arguments = ["ops", "--op", "scale", "--case", "residual", "--mode", "forward", "--baseline", "eager", "clone"]
    assert bench.main([*arguments, "--seconds", "0.05", "--out", str(out)]) == 0
    (path,) = out.glob("*/ops-*.json")
    text = path.read_text()
    content = json.loads(text)
    assert {r["impl"] for r in content["rows"]} == {"fused", "eager", "clone"}
    assert content["provenance"]["command"].startswith("python -m bench ops --op scale")
    assert str(tmp_path) not in text
    assert str(support.ROOT) not in text
    assert "vs eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("ops --batch 8", "--batch is the N of --shapes"),
        ("ops --check-floors --op scale --case 8x", "without it: --op, --case"),
        ("ops --check-floors --shapes resnet50 --batch 8", "without it: --shapes"),
        ("blocks --check-floors --shape 512x28 --dtype bfloat16", "without it: --shape, --dtype"),
        ("blocks --check-floors --batch 1 --backend eager", "without it: --batch, --backend"),
    ],
)
def test_no_option_is_ignored(monkeypatch, capsys, arguments, said):
    for module in (ops, blocks):
        monkeypatch.setattr(module, "jobs", lambda options: [])
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    ["ops --shapes resnet50 --batch 8", "ops --check-floors --baseline eager", "blocks --check-floors --block SGE",
     "blocks --batch 1 --quick"],
)  # fmt: skip
def test_options_that_do_something(monkeypatch, capsys, arguments):
    for module in (ops, blocks):
        monkeypatch.setattr(module, "jobs", lambda options: [])
    assert bench.main(arguments.split()) == 2
    assert "matches the selection" in capsys.readouterr().err


def test_memory_says_how_it_was_measured(tmp_path, monkeypatch):
    """In other processes, on one thread, which give back what they free."""
    torch.set_num_threads(2)
    monkeypatch.setattr(memory, "alone", lambda command: {"saved": 1.0, "peak": 2.0})
    monkeypatch.setattr(measure, "pin_heap", lambda: True)
    assert bench.main(["memory", "--device", "cpu", "--network", "seresnet50", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/memory-*.json")
    source = json.loads(path.read_text())["provenance"]
    assert (source["threads"], source["heap_pinned"]) == (1, False)


def test_redrawn_gates_matter():
    if not support.importable("timm"):
        pytest.skip("timm is not installed")
    from bench import demo

    found = demo.errors(demo.build("seresnet50", 64), 64, "cpu")
    assert found["gates"]["output"] > 1e-3
    assert found["fused, float64"]["output"] < 1e-12
    assert not demo.too_far(found)
    assert demo.too_far(found | {"fused": {"output": 1e-3, "gradients": 0.0, "worst gradient": 0.0}})


def test_timing_is_complete():
    assert set(Timing.__dataclass_fields__) <= set(Row.__dataclass_fields__)
