"""The order of the examples follows from the data, the global batch and the seed; ranks only deal it out."""

import numpy as np
import pytest

from carelm.errors import UserError
from carelm.recipe import micro_batch_size
from carelm.recipe_file import load_recipe
from carelm.training.batches import BLANK, GlobalBatches

LENGTHS = np.random.default_rng(0).integers(5, 400, 1003)


def deal(micro, ranks, epoch=0, lengths=LENGTHS, size=16, seed=3, **keys):
    """For each optimizer step the set of examples that all ranks take together."""
    sides = []
    for rank in range(ranks):
        batches = GlobalBatches(
            lengths, global_batch_size=size, micro_batch_size=micro, rank=rank, ranks=ranks, seed=seed, **keys
        )
        batches.set_epoch(epoch)
        flat = list(batches)
        assert len(flat) == len(batches)
        sides.append([flat[i : i + batches.accumulation] for i in range(0, len(flat), batches.accumulation)])
    return [
        sorted(i for side in sides for part in side[step] for i in part if i != BLANK) for step in range(len(sides[0]))
    ]


@pytest.mark.parametrize("micro, ranks", [(8, 1), (4, 1), (1, 1), (8, 2), (4, 2), (2, 4), (1, 16)])
@pytest.mark.parametrize("group", [True, False])
def test_every_split_takes_the_same_examples_in_every_step(micro, ranks, group):
    assert deal(micro, ranks, group_by_length=group) == deal(16, 1, group_by_length=group)


def test_an_epoch_holds_every_example_once():
    assert sorted(i for step in deal(4, 2) for i in step) == list(range(1003))


def test_every_epoch_and_seed_has_its_own_order():
    assert deal(16, 1, epoch=0) != deal(16, 1, epoch=1) != deal(16, 1, epoch=2)
    assert deal(16, 1, seed=1) != deal(16, 1, seed=2)


def test_grouping_leaves_next_to_no_padding():
    def carried(group):
        batches = GlobalBatches(
            LENGTHS, global_batch_size=8, micro_batch_size=8, rank=0, ranks=1, group_by_length=group
        )
        return sum(len(b) * LENGTHS[b].max() for b in batches) / LENGTHS.sum()

    assert carried(group=True) < 1.05 < 1.5 < carried(group=False)


def test_the_longest_batch_comes_first():
    first = deal(16, 1)[0]
    assert LENGTHS[first].max() == LENGTHS.max()


def test_every_rank_has_a_micro_batch_even_where_examples_run_out():
    lengths = np.array([9, 8, 7])
    for rank in range(4):
        batches = GlobalBatches(lengths, global_batch_size=4, micro_batch_size=1, rank=rank, ranks=4)
        assert [len(b) for b in batches] == [1]
    assert deal(1, 4, lengths=lengths, size=4) == [[0, 1, 2]]


def test_tokens_until_a_step_are_counted_over_epochs():
    batches = GlobalBatches(LENGTHS, global_batch_size=16, micro_batch_size=16, rank=0, ranks=1, seed=3)
    assert batches.tokens_until(0) == 0
    assert batches.tokens_until(batches.steps_per_epoch) == LENGTHS.sum()
    assert batches.tokens_until(batches.steps_per_epoch + 1) == LENGTHS.sum() + LENGTHS[deal(16, 1, epoch=1)[0]].sum()


@pytest.mark.parametrize(
    "total, micro, ranks, message", [(10, 8, 4, "8 or 12"), (3, 8, 4, "are 4"), (12, 5, 1, "4 and 6")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(total, micro, ranks, message):
    recipe = load_recipe(["--global_batch_size", str(total), "--per_device_train_batch_size", str(micro)], usage="")
    with pytest.raises(UserError, match=message):
        micro_batch_size(recipe, ranks)
