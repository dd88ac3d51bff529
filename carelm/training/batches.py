"""Which examples stand in which batch: the same ones in every optimizer step, whatever the ranks."""

import math
from collections.abc import Iterator

import numpy as np
import torch.distributed
from torch.utils.data import Dataset

from carelm.training.prepared import PreparedSplit

BLANK = -1  # stands for an example with nothing to learn, where a rank would have none
LENGTH_POOL = 50  # batches of like length are cut from pools of this many global batches


class GlobalBatches:
    """Deals one rank its micro-batches: `accumulation` of them for each global batch, in every epoch another order.

    Args:
        lengths: tokens of each example.
        global_batch_size: examples of one optimizer step.
        micro_batch_size: examples of one forward on one rank.
        rank, ranks: this rank and how many there are.
        seed: of the order.
        group_by_length: cut batches from examples of like length. The order is that of a shuffle, pools of it sorted by
            length, and the batches shuffled again; the first batch of all is the longest, so that memory that does not
            suffice shows at once.
        shuffle: False keeps the order by length (evaluation).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        seed: int = 0,
        group_by_length: bool = True,
        shuffle: bool = True,
    ):
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.accumulation = global_batch_size // (micro_batch_size * ranks)
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "GlobalBatches":
        """transformers looks for `set_epoch` one level down, as it expects accelerate's wrapper around a sampler."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The examples of each optimizer step of an epoch; the last batch may be smaller."""
        size = self.global_batch_size
        if not self.shuffle:
            return _cut(np.argsort(-self.lengths, kind="stable"), size)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.group_by_length:
            return _cut(order, size)
        pools = _cut(order, LENGTH_POOL * size)
        batches = [b for pool in pools for b in _cut(pool[np.argsort(-self.lengths[pool], kind="stable")], size)]
        batches = [batches[i] for i in generator.permutation(len(batches))]
        if epoch == 0:
            longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i]].max() * len(batches[i]))
            batches.insert(0, batches.pop(longest))
        return batches

    def tokens_until(self, step: int, numbers: np.ndarray | None = None) -> int:
        """Tokens (without padding) in the first `step` optimizer steps of the run, over all ranks: all of each example, or as
        many as `numbers` says."""
        numbers = self.lengths if numbers is None else numbers
        epochs, rest = divmod(step, self.steps_per_epoch)
        first = sum(int(numbers[batch].sum()) for batch in self.plan(epochs)[:rest]) if rest else 0
        return epochs * int(numbers.sum()) + first

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.plan(self.epoch):
            if self.group_by_length:
                batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
            parts = np.array_split(batch, self.accumulation * self.ranks)
            for i in range(self.accumulation):
                part = parts[i * self.ranks + self.rank]
                yield part.tolist() or [BLANK]


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


class Rows(Dataset):
    """A prepared split whose item -1 is blank: one token and nothing to learn."""

    def __init__(self, split: PreparedSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.zeros(1, np.int32), np.zeros(1, bool)) if i == BLANK else self.split[i]


class Pairs(Dataset):
    """A prepared split of preferences: item i is both answers of a pair, the better one first, and what the reference says to
    them (two log-probabilities). Item -1 is blank."""

    def __init__(self, split: PreparedSplit):
        self.split, self.reference = split, np.full((len(split), 2), np.nan)
        self._blank = (*[Rows(split)[BLANK]] * 2, np.zeros(2))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[tuple, tuple, np.ndarray]:
        return self._blank if i == BLANK else (*self.split.pair(i), self.reference[i])


class Collate:
    """Pads examples on the right to the longest of them: input_ids, attention_mask, labels, each [batch, length].

    Of an encoder-decoder the encoder reads what is not trained and the labels are what is, each side with a length of its own;
    positions that BART has learnt begin at 0 only where the padding is on the right.
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 1, is_encoder_decoder: bool = False):
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of
        self.is_encoder_decoder = is_encoder_decoder

    def __call__(self, examples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        if self.is_encoder_decoder:
            asked = [ids[~trained] for ids, trained in examples]
            return {
                "input_ids": self._padded(asked, self.pad_token_id),
                "attention_mask": self._padded([np.ones(len(ids)) for ids in asked], 0),
                "labels": self._padded([ids[trained] for ids, trained in examples], -100),
            }
        longest = max(len(ids) for ids, _ in examples)
        shape = (len(examples), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (ids, trained) in enumerate(examples):
            tokens = torch.from_numpy(ids.astype(np.int64))
            input_ids[row, : len(ids)] = tokens
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)][torch.from_numpy(np.array(trained))] = tokens[torch.from_numpy(np.array(trained))]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _padded(self, rows: list[np.ndarray], filler: int) -> torch.Tensor:
        longest = max(1, *map(len, rows))
        padded = torch.full((len(rows), -(-longest // self.multiple_of) * self.multiple_of), filler)
        for row, ids in zip(padded, rows):
            row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        return padded


class CollatePairs:
    """Pads pairs as `collate` does: the better answers, then the worse ones, [2 * pairs, length], and the `reference` of both,
    [pairs, 2]."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, pairs: list[tuple[tuple, tuple, np.ndarray]]) -> dict[str, torch.Tensor]:
        better, worse, reference = zip(*pairs)
        return self.collate([*better, *worse]) | {"reference": torch.from_numpy(np.stack(reference))}
