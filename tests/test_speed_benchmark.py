"""benchmarks/speed.py compares each side in its faster precision, and loses nothing of what it has timed."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import speed  # noqa: E402

WORK = "smollm2/bitext_support"


def a_run(side, tokens_per_second, peak=1000, start=10.0, commit="now"):
    about = {"work": WORK, "side": side, "git_commit": commit, "date": "2026-01-02T03:04:05", "peak_memory_bytes": peak}
    return about | {"tokens_per_second": tokens_per_second, "rows_per_second": 1.0, "seconds_to_first_step": start}


def found(runs, figure, theirs):
    lines = speed.targets(speed.summarize(runs), beside="old")
    return next(t for t in lines if t["work"] == WORK and t["figure"] == figure and t.get("theirs") == theirs)


def test_each_side_is_compared_in_its_faster_precision():
    runs = [a_run("carelm-fp32", 100), a_run("carelm-bf16", 400), a_run("trl-fp32", 100), a_run("trl-bf16", 90)]
    target = found(runs, "tokens_per_second", "trl-fp32")
    assert (target["ours"], target["ratio"], target["reached"]) == ("carelm-bf16", 4.0, True)


def test_a_ratio_is_that_of_the_medians_over_all_rounds():
    runs = [a_run("carelm-bf16", speed) for speed in (100, 300, 340)] + [a_run("old-bf16", 200)]
    assert found(runs, "tokens_per_second", "old-bf16")["ratio"] == 1.5


def test_less_memory_is_reached_where_the_ratio_is_small():
    runs = [a_run("carelm-bf16", 400, peak=500), a_run("old-fp32", 100, peak=1000)]
    assert found(runs, "peak_memory_bytes", "old-fp32")["reached"]
    assert not found([a_run("carelm-bf16", 400, peak=501), runs[1]], "peak_memory_bytes", "old-fp32")["reached"]


def test_what_was_not_timed_is_neither_reached_nor_missed():
    targets = list(speed.targets(speed.summarize([a_run("carelm-bf16", 400)]), beside="old"))
    assert {(t["ratio"], t["reached"]) for t in targets} == {(None, None)}
    assert "not measured" in "\n".join(speed.report([], targets))


HERE = {
    "machine": {"cpu": "this", "cores": 2, "versions": {"trl": "1"}, "git_commit": "now"},
    "settings": {"seed": 42},
    "beside": "old",
}


def taken_over(tmp_path, runs, pieces=(), **changes):
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({**HERE, "inputs": {WORK: {"rows": 64}}, "runs": runs}))
    results = {**HERE, "inputs": {}, "runs": [], **changes}
    speed.take_over(file, results, list(pieces))
    return results


def test_later_pieces_add_to_the_runs_but_not_to_those_of_other_code_of_ours_nor_to_older_ones_of_the_same_side(
    tmp_path,
):
    runs = [a_run("carelm-bf16", 1, commit="then"), a_run("carelm-fp32", 2), a_run("trl-bf16", 3, commit="then"),
            a_run("trl-fp32", 4, commit="then"), a_run("old-fp32", 5)]  # fmt: skip
    timed_now = [(WORK, speed.Side("trl", "bf16")), (WORK, speed.Side("old", "fp32"))]
    kept = taken_over(tmp_path, runs, timed_now)["runs"]
    assert [run["tokens_per_second"] for run in kept] == [2, 4, 5]
    (line,) = [line for line in speed.report(speed.summarize(kept), []) if "trl-fp32" in line]
    assert "2026-01-02 at then" in line


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"seed": 1}}, {"beside": "other"}, {"machine": HERE["machine"] | {"cores": 4}},
     {"machine": HERE["machine"] | {"versions": {"trl": "2"}}}],
)  # fmt: skip
def test_runs_of_another_machine_versions_or_settings_are_not_added_to(tmp_path, changes):
    with pytest.raises(SystemExit, match="another machine or other versions or settings"):
        taken_over(tmp_path, [], **changes)


def test_runs_over_other_rows_are_dropped(tmp_path):
    results = taken_over(tmp_path, [a_run("trl-bf16", 3)])
    speed.keep_work(results, WORK, {"rows": 64})
    assert len(results["runs"]) == 1
    speed.keep_work(results, WORK, {"rows": 32})
    assert results["runs"] == [] and results["inputs"] == {WORK: {"rows": 32}}


def test_a_benchmark_that_is_stopped_ends_what_it_started():
    script = "import signal, sys, launches; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    script += "launches.run([sys.executable, '-c', 'import time; time.sleep(60)'], {}, 50)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=BENCHMARKS)
    this, until, started = psutil.Process(process.pid), time.monotonic() + 40, []
    while not started and time.monotonic() < until:
        time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = this.children(recursive=True)  # until it is another program, one is its parent's copy
            started = [child for child in children if child.cmdline()[-1:] == ["import time; time.sleep(60)"]]
    time.sleep(0.5)  # now the benchmark knows of it
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert started and not any(child.is_running() for child in started)
