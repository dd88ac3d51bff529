"""Tokens per second, model FLOPs utilisation, and threads that wait for one another."""

import types

import numpy as np
import pytest
import torch

from carelm import ranks
from carelm.models import flops
from carelm.training import callbacks, threads
from carelm.training.callbacks import ProgressBar, Speed, ThreadWatch

ON_A_CPU = types.SimpleNamespace(device=torch.device("cpu"))


def train(callbacks, monkeypatch, *step_seconds):
    """So many steps of 1,000 tokens, on a clock of its own; the last one is logged."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("carelm.training.callbacks.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("carelm.training.callbacks.time.monotonic", lambda: clock.now)
    for step, seconds in enumerate(step_seconds, 1):
        state = types.SimpleNamespace(global_step=step, is_world_process_zero=True, max_steps=len(step_seconds))
        for callback in callbacks:
            callback.on_step_begin(ON_A_CPU, state, None)
        clock.now += seconds
        for callback in callbacks:
            callback.on_step_end(ON_A_CPU, state, None)
    for callback in callbacks:
        callback.on_log(ON_A_CPU, state, None, logs={"loss": 1.5})


@pytest.fixture
def speed():
    """Of a model of 4e6 FLOPs a token, on a machine that makes 4e9."""
    speed = Speed(4_000_000, 4e9)
    speed.batches = types.SimpleNamespace(
        steps_per_epoch=100, lengths=np.array([400, 600]), plan=lambda _: [[0, 1]] * 100
    )
    speed.on_train_begin(ON_A_CPU, None, None)
    return speed


def test_utilisation_is_what_the_tokens_take_of_what_the_machine_makes(speed, monkeypatch):
    train([speed], monkeypatch, 2.0, 2.0, 4.0)
    assert speed.metrics() == {
        "tokens_per_second": 375.0, "mfu": 0.375, "flops_per_token": 4_000_000, "matmul_ceiling_flops": 4_000_000_000,
    }  # fmt: skip
    assert (speed.shown["tokens_per_second"], speed.shown["mfu"]) == (375, 0.375)
    train([speed], monkeypatch, 2.0)
    assert speed.shown["mfu"] == 0.5 and speed.metrics()["mfu"] == 0.4


def test_where_the_ceiling_was_measured_too_low_no_utilisation_is_given(speed, monkeypatch):
    train([speed], monkeypatch, 0.5)
    assert speed.shown["tokens_per_second"] == 2000 and "mfu" not in speed.shown
    assert speed.metrics()["mfu"] is None


def test_a_start_with_no_step_left_has_no_speed(speed):
    assert (speed.metrics()["tokens_per_second"], speed.metrics()["mfu"]) == (None, None)


def test_the_bar_shows_speed_and_utilisation(speed, monkeypatch, capsys):
    bar = ProgressBar(speed)
    bar.on_train_begin(ON_A_CPU, types.SimpleNamespace(is_world_process_zero=True, max_steps=2, global_step=0), None)
    train([speed, bar], monkeypatch, 2.0, 2.0)
    bar.bar.refresh()
    assert "loss=1.5000, tokens/s=500, mfu=50%" in capsys.readouterr().err


def test_the_ceiling_is_that_of_the_fastest_product_after_the_first(monkeypatch):
    begun_ended = [(0, 0.001), (0.01, 0.05), (0.05, 0.07)]  # the first product warms up
    (first, second, third), start, looks = begun_ended, [0], [0.05, 0.2]
    ticks = iter([*start, *first, *second, looks[0], *third, looks[1]])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(flops, "SIZES", {"cpu": 8})
    assert flops.matmul_ceiling(torch.device("cpu"), torch.float32) == pytest.approx(2 * 8**3 / 0.02)


# FLOP/s of two threads and of one, measured on two cores: free, and beside one, two and four processes that never rest.
@pytest.mark.parametrize("several, one, times", [(207e9, 110e9, None), (98e9, 106e9, None), (23e9, 57e9, "2.5"),
                                                 (1e9, 50e9, "50.0")])  # fmt: skip
def test_threads_are_warned_of_only_where_one_is_faster(several, one, times):
    line = threads.advice(2, several, one)
    assert (line is None) == (times is None)
    if times:
        assert (
            f"2 threads make matrix products {times} times slower than one does" in line and "OMP_NUM_THREADS=1" in line
        )


def test_it_is_measured_after_the_first_step_and_after_slow_ones_and_said_once(speed, monkeypatch, capsys):
    measured = [(207e9, 110e9), (98e9, 106e9), (1e9, 50e9)]
    monkeypatch.setattr(threads, "measure", lambda number: measured.pop(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train([speed, watch := ThreadWatch(speed)], monkeypatch, 40, 40, 40, 80)
    assert len(measured) == 2  # twice as slow is no reason to look
    train([speed, watch], monkeypatch, 400, 5, 20)
    assert len(measured) == 1 and capsys.readouterr().err == ""  # the last step was too soon after
    train([speed, watch], monkeypatch, 400, 400)
    assert not measured and capsys.readouterr().err.count("OMP_NUM_THREADS=1") == 1


def test_one_thread_is_never_looked_at(speed, monkeypatch):
    monkeypatch.setattr(threads, "measure", lambda number: pytest.fail("it was measured"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    train([speed, ThreadWatch(speed)], monkeypatch, 1, 1, 60)


def test_a_look_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(rate > 1e6 for rate in threads.measure(2, seconds=0.005)) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("here, number, said", [(1, 2, False), (2, 1, False), (2, 2, True), (1, 4, True)])
def test_more_threads_than_cores_are_said(monkeypatch, capsys, here, number, said):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    ranks.use_cpu(None)
    line = f"{here} x {number} threads share 2 cores, which is slow; put OMP_NUM_THREADS={2 // here} before"
    assert (line in capsys.readouterr().err) == said


def test_only_the_first_rank_watches(speed, monkeypatch):
    recipe = types.SimpleNamespace(
        training={"report_to": []}, num_sample_answers=1, sample_max_new_tokens=1, early_stopping_patience=None
    )
    prepared = types.SimpleNamespace(validation=None, samples=[])
    for rank, number in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        made = callbacks.make_callbacks(recipe, prepared, None, speed)
        assert sum(isinstance(callback, ThreadWatch) for callback in made) == number


def progress(monkeypatch, capsys, seconds, **variables):
    """What the bar and its sentences write to a log file."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    bar = ProgressBar(types.SimpleNamespace(shown={}))
    monkeypatch.setattr("carelm.training.callbacks.time.monotonic", lambda: 0.0)
    bar.on_train_begin(
        None, types.SimpleNamespace(global_step=0, is_world_process_zero=True, max_steps=len(seconds)), None
    )
    train([bar], monkeypatch, *seconds)
    bar.on_train_end(None, None, None)
    return capsys.readouterr().err


def test_how_long_a_run_will_take_is_said_after_its_first_steps(monkeypatch, capsys):
    said = progress(monkeypatch, capsys, [70.0] + [20.0] * 39)
    assert "carelm: the first step took 70 s, later ones are often faster: at most 46 minutes left\n" in said
    assert "carelm: about 12 minutes left for 36 steps, evaluations not counted\n" in said
    assert "left" not in progress(monkeypatch, capsys, [1.0] * 40)


def test_a_log_file_has_lines_and_not_a_bar_that_is_drawn_over(monkeypatch, capsys):
    seldom, each = (progress(monkeypatch, capsys, [1.0] * 40, TQDM_MININTERVAL=value) for value in ("10", "0"))
    assert "\r" not in seldom + each and "\n\n" not in each.rstrip()
    assert each.count("| 7/40 [") == 1 and "| 40/40 [" in each and seldom.count("/40 [") <= 3
