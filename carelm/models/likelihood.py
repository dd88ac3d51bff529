"""How likely a model finds whole answers: the sum of the log-probabilities of an answer's tokens, end of turn included."""

import inspect
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from carelm.models.batcher import halve, has_virtual_tokens, unless_out_of_memory, why_not
from carelm.models.key_values import causal_model

LOGITS_AT_A_TIME = 1024  # tokens whose logits are held together: with a vocabulary of 128,000 0.5 GB of fp32
IGNORED = -100
Ids = list[int]


def score_answers(
    model: torch.nn.Module,
    prompts: list[Ids],
    answers: list[list[Ids]],
    *,
    device: torch.device,
    max_batch_tokens: int,
    done: Callable[[int, list[float]], None],
    show: str | None = None,
) -> float:
    """Scores several answers to each prompt and hands them over by `done(index, log_probabilities)`; returns the seconds.

    What a prompt's answers begin with alike is read once, together with the prompt, and counts for none of them. A model that
    the batcher cannot serve (virtual tokens, sliding windows) reads each answer with its whole prompt. An encoder-decoder reads
    whole answers behind its start token.

    Args:
        model: a causal language model in evaluation mode, with or without adapter.
        prompts: token ids of each prompt, two at least.
        answers: for each prompt the ids of its answers, no two alike, of which none begins another.
        max_batch_tokens: prompts with their answers, padded to the longest, stay under it; halved, and said, where memory ends.
        show: the text of a progress bar, or None for no bar.

    Raises:
        torch.OutOfMemoryError: where a batch of one does not fit.
    """
    prefixes, rests, has_encoder = [], [], causal_model(model).config.is_encoder_decoder
    for prompt, several in zip(prompts, answers):
        alike = 0 if has_encoder else next(k for k, ids in enumerate(zip(*several)) if len(set(ids)) > 1)
        prefixes.append(prompt + several[0][:alike])
        rests.append([ids[alike:] for ids in several])
    score, started = _whole_rows if why_not(model) or has_virtual_tokens(model) else _behind_shared, time.perf_counter()
    score = _by_decoder if has_encoder else score
    left = sorted(range(len(prompts)), key=lambda i: -len(prefixes[i]))
    with tqdm(total=len(left), desc=show, unit="example", dynamic_ncols=True, disable=show is None) as bar:
        while left:
            rows, longest = len(rests[left[0]]), max(len(ids) for i in left for ids in rests[i])
            tokens = rows * (len(prefixes[left[0]]) + longest)
            batch = left[: max(1, min(max_batch_tokens // tokens, LOGITS_AT_A_TIME // (rows * longest)))]
            given = [prefixes[i] for i in batch], [rests[i] for i in batch]
            found = unless_out_of_memory(partial(score, model, *given, device), len(batch))
            if found is None:
                max_batch_tokens = tokens * halve(len(batch))
                continue
            for i, values in zip(batch, found):
                done(i, values)
            left = left[len(batch) :]
            bar.update(len(batch))
    return time.perf_counter() - started


@torch.no_grad()
def _behind_shared(
    model: torch.nn.Module, prefixes: list[Ids], rests: list[list[Ids]], device: torch.device
) -> list[list[float]]:
    """The prefixes less their last token are read once, padded at their end; each answer goes on from their keys and values."""
    rows, inner = len(rests[0]), causal_model(model)
    ids = _padded([prefix[:-1] for prefix in prefixes], device)
    width, cache = ids.shape[1], DynamicCache(config=inner.config)
    kept = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    model(input_ids=ids, position_ids=torch.arange(width, device=device).expand_as(ids), past_key_values=cache, use_cache=True,
          **kept)  # fmt: skip
    cache.batch_repeat_interleave(rows)
    ids = _padded([[prefix[-1], *rest[:-1]] for prefix, several in zip(prefixes, rests) for rest in several], device)
    read = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device).repeat_interleave(rows)[:, None]
    columns = torch.arange(width + ids.shape[1], device=device)
    mask = ((columns < read) | (columns >= width)).long()
    positions = read + torch.arange(ids.shape[1], device=device)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    return _sums(logits, [rest for several in rests for rest in several], rows)


@torch.no_grad()
def _whole_rows(
    model: torch.nn.Module, prefixes: list[Ids], rests: list[list[Ids]], device: torch.device
) -> list[list[float]]:
    """Every answer behind its own copy of the prefix, padded at their end, which what is causal never sees."""
    first = min(map(len, prefixes)) - 1  # the earliest logits that count
    ids = _padded([prefix + rest[:-1] for prefix, several in zip(prefixes, rests) for rest in several], device)
    kept = ids.shape[1] - first
    logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": kept} if _keeps_logits(model) else {})).logits
    targets = [
        [IGNORED] * (len(prefix) - 1 - first) + rest for prefix, several in zip(prefixes, rests) for rest in several
    ]
    return _sums(logits[:, -kept:], targets, len(rests[0]))


@torch.no_grad()
def _by_decoder(
    model: torch.nn.Module, prompts: list[Ids], answers: list[list[Ids]], device: torch.device
) -> list[list[float]]:
    """The encoder reads a prompt for each of its answers, the decoder the answer."""
    rows, start = len(answers[0]), causal_model(model).config.decoder_start_token_id
    asked = [prompt for prompt in prompts for _ in range(rows)]
    told = [answer for several in answers for answer in several]
    mask = _padded([[1] * len(prompt) for prompt in asked], device)
    read = _padded([[start, *answer[:-1]] for answer in told], device)
    logits = model(
        input_ids=_padded(asked, device), attention_mask=mask, decoder_input_ids=read, use_cache=False
    ).logits
    return _sums(logits, told, rows)


def _sums(logits: torch.Tensor, targets: list[Ids], rows: int) -> list[list[float]]:
    """Of the log-probabilities of the targets (IGNORED: none), for `rows` answers to each prompt."""
    wanted = _padded(targets, logits.device, IGNORED)
    lost = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return (-lost.view(wanted.shape).double().sum(1)).view(-1, rows).tolist()


def _padded(rows: list[Ids], device: torch.device, filler: int = 0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)


def _keeps_logits(model: torch.nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(causal_model(model).forward).parameters
