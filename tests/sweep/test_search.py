"""A search: its study is shared by several calls and outlives a kill, and a trial that is worse than most is pruned."""

import json

import optuna
import pytest
from test_sweep import call, sweep
from torch.utils.tensorboard import SummaryWriter

from carelm.errors import UserError
from carelm.sweep.record import Outcome
from carelm.sweep.search import Search
from carelm.sweep.sweep_file import read_sweep
from carelm.training.stops import FILE

RANGES = {"lora_r": [2, 4], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}

LONG = {"max_steps": 400}


@pytest.fixture
def search(tmp_path):
    """Opens the search as one call does; what it has taken is given back when it is killed."""

    def search(num_trials=6, **keys) -> Search:
        words = sweep(tmp_path, search={"num_trials": num_trials, **RANGES, **keys}, evaluate=False, overrides=LONG)
        return Search(read_sweep(words[2:]))

    return search


def begin(search: Search, number: int) -> list:
    return [search.take() for _ in range(number)]


def finish(search: Search, taken, loss: float) -> None:
    folder = taken.run.recipe.output_dir
    folder.mkdir(exist_ok=True)
    (folder / "train_metrics.json").write_text(json.dumps({"eval_loss": loss}))
    search.ended(taken.run, Outcome("finished"))
    taken.lock.close()


def test_calls_share_one_study_and_begin_no_trial_twice_nor_one_too_many(search):
    one, other = search(), search()
    taken = [*begin(one, 2), *begin(other, 2), *begin(one, 3)]
    assert [t.run.name for t in taken[:6]] == [f"trial-{number:03}" for number in range(6)] and taken[6] is None
    assert other.take() is None and not other.waits()
    assert all(t.run.axes["lora_r"] in (2, 4) and 1e-4 <= t.run.axes["learning_rate"] <= 1e-2 for t in taken[:6])
    assert [run.state for run in one.compared()] == ["running"] * 6


def test_a_trial_whose_call_was_killed_is_gone_on_with_by_the_next_one(search):
    killed = search()
    first, second = begin(killed, 2)
    finish(killed, first, 2.0)
    second.lock.close()
    axes = second.run.axes
    again = search().take()
    assert (again.run.name, again.run.axes) == ("trial-001", axes)


def test_the_lowest_validation_loss_is_the_best_and_a_failed_trial_is_named(search):
    one = search(num_trials=3)
    for taken, loss in zip(begin(one, 2), (2.0, 1.5)):
        finish(one, taken, loss)
    one.ended(begin(one, 1)[0].run, Outcome("failed", "error: out of memory"))
    assert [(run.state, run.error) for run in search(num_trials=3).compared()] == [
        ("finished", ""), ("finished", ""), ("failed", "error: out of memory")]  # fmt: skip
    assert one.study.best_trial.number == 1
    assert one.summary() == "3 of 3 trials: 2 finished, 1 failed; num_trials: 4 tries as many others"
    assert search(num_trials=4).take().run.name == "trial-003"


def test_a_trial_above_the_median_at_its_step_is_asked_to_stop(search):
    one = search(num_trials=9)
    for loss in (1.0, 1.1, 1.2, 1.3, 1.4):
        [taken] = begin(one, 1)
        one._running[taken.run.name].report(loss, 20)
        finish(one, taken, loss)
    good, bad = begin(one, 2)
    for taken, loss in ((good, 1.1), (bad, 3.0)):
        with SummaryWriter(str(taken.run.recipe.output_dir / "runs")) as writer:
            writer.add_scalar("eval/loss", 9.0, 0)
            writer.add_scalar("eval/loss", loss, 20)
    assert not one.look(good.run) and one.look(bad.run)
    assert not (good.run.recipe.output_dir / FILE).exists()
    assert "3.0000, is above the median of the others" in (bad.run.recipe.output_dir / FILE).read_text()


def test_a_search_with_other_ranges_or_another_recipe_is_refused(search, tmp_path):
    search()
    with pytest.raises(UserError, match="holds a search with other ranges; set another output_dir"):
        search(lora_r=[2, 8])
    with pytest.raises(UserError, match="holds a search with other lora_alpha; set another output_dir"):
        words = sweep(tmp_path, search={"num_trials": 6, **RANGES}, overrides={**LONG, "lora_alpha": 3})
        Search(read_sweep(words[2:]))


def test_a_pruned_trial_of_a_real_search_ends_with_75_and_counts_as_pruned(search, tmp_path):
    for loss in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3):
        one = search()
        one.study.add_trial(
            optuna.create_trial(state=one.states.COMPLETE, value=loss, intermediate_values={20: loss},
                                params={"lora_r": 2, "learning_rate": 1e-3}, distributions=one._distributions)
        )  # fmt: skip
    done = call(sweep(tmp_path, search={"num_trials": 6, **RANGES}, evaluate=False, overrides=LONG))
    assert "carelm: trial-005 pruned after" in done.stderr, done.stderr
    assert (
        "stopped: after step" in (log := (tmp_path / "out/trial-005.log").read_text()) and "(pruned: by step 20" in log
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["finished"] == 5
