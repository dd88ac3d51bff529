"""benchmarks/gpu.py ends within its budget and loses nothing of what it has found by then."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu
import launches


@pytest.fixture
def lab(tmp_path):
    return gpu.Lab(tmp_path, time.monotonic() + 30, small=False)


def fill(lab, measure, seconds=0):
    """What stood in the file after each finding."""
    found, written = {"result": "not reached"}, []
    gpu.fill(found, gpu.Cell("a cell", seconds, measure), lab, lambda: written.append(dict(found)))
    return written


def test_a_cell_that_no_longer_fits_is_not_reached_and_says_why(lab):
    [only] = fill(lab, lambda lab: pytest.fail("it began"), seconds=60)
    assert only["result"] == "not reached"
    assert only["reason"].endswith(" s were left, it needs about 60")


def test_what_a_cell_found_is_written_before_it_fails(lab):
    def measure(lab):
        yield {"tokens_per_second": 7}
        raise gpu.RunFailed("CUDA out of memory")

    first, last = fill(lab, measure)
    assert (first["result"], first["tokens_per_second"]) == ("cut off", 7)
    assert (last["result"], last["tokens_per_second"]) == ("fails", 7)
    assert last["reason"] == "RunFailed: CUDA out of memory"


def test_a_cell_under_way_at_the_budgets_end_is_cut_off_and_keeps_what_it_found(lab):
    def measure(lab):
        yield {"tokens_per_second": 7}
        time.sleep(60)

    lab.deadline = time.monotonic() + 0.5
    *_, last = fill(lab, measure)
    assert (last["result"], last["tokens_per_second"]) == ("cut off", 7)
    assert time.monotonic() - lab.deadline < 20


def test_no_launch_begins_at_the_budgets_end(lab):
    lab.deadline = time.monotonic() + 1
    with pytest.raises(gpu.OutOfTime):
        lab.demo("never", "fp32", steps=1)


def test_a_cell_works_where_all_its_checks_hold(lab):
    assert fill(lab, lambda lab: iter([{"checks": {"falls": True}}]))[-1]["result"] == "works"
    assert fill(lab, lambda lab: iter([{"checks": {"falls": True, "fits": False}}]))[-1]["result"] == "fails"


def test_a_launch_at_its_time_limit_is_ended_with_ranks_in_sessions_of_their_own():
    launcher = "import subprocess; subprocess.run(['sleep', '30'], start_new_session=True)"
    outcome = launches.run([sys.executable, "-c", launcher], {}, timeout_s=1)
    assert outcome.status is None
    assert outcome.seconds < 10  # a rank that lived on would keep its end of standard error open


def test_the_commit_is_unknown_where_there_is_no_git(monkeypatch, tmp_path):
    from carelm.provenance import git_commit

    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    assert git_commit() is None
