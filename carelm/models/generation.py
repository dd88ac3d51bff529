"""Answers of a model to prompts: through the continuous batcher, or `generate` of transformers where it cannot serve; timed."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from carelm.chat.chat import Chat
from carelm.models.batcher import Batcher, halve, has_virtual_tokens, stop_ids, unless_out_of_memory, why_not
from carelm.models.decoding import Decoding, Draws
from carelm.models.key_values import cache_tokens, causal_model
from carelm.ranks import rank, say

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
PERCENTILES = (50, 95, 99)
WARM_UP_PROMPTS = 2


@dataclass(frozen=True)
class Answer:
    """What a model answered: the text, its tokens (the end of turn is one), and why it ended ("stop", "length", or "cancelled"
    by Ctrl-C)."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str

    @property
    def new_tokens(self) -> int:
        return len(self.ids)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    chat: Chat,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    device: torch.device,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """The model's answers to one batch, in the order of the prompts.

    Args:
        model: a causal language model or an encoder-decoder, with or without adapter; its mode (train or eval) is restored.
        chat: its tokenizer turns ids into text.
        prompts: token ids of each prompt, up to and including the assistant's header (the end of sequence for an encoder).
        decoding: how tokens are chosen.
        device: where the model computes (its weights may lie elsewhere, under ZeRO with offload).
        synced_gpus: True under ZeRO-3, where every rank must take part in every step.
        streamer: is given every token as it comes (one prompt only).
    """
    if not prompts:
        return []
    longest, has_encoder = max(map(len, prompts)), causal_model(model).config.is_encoder_decoder
    input_ids = torch.full((len(prompts), longest), chat.tokenizer.pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        # An answer follows on its prompt; an encoder's text begins at the first of the positions that it has learnt.
        part = slice(len(ids)) if has_encoder else slice(longest - len(ids), None)
        input_ids[row, part] = torch.tensor(ids, device=device)
        attention_mask[row, part] = 1
    was_training = model.training
    model.eval()
    how = {"max_new_tokens": decoding.max_new_tokens, "do_sample": False, "num_beams": 1, "use_cache": True,
           "return_dict_in_generate": False}  # fmt: skip
    if decoding.temperature > 0:
        how["logits_processor"] = LogitsProcessorList([Draws(decoding, prompts)])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    answering, start = model, 1 if has_encoder else longest  # a decoder begins with its start token
    if has_virtual_tokens(model):
        inputs, answering = _with_virtual_tokens(model, **inputs), model.get_base_model()
        start = 1 if has_encoder else 0
    with _token_ids_alone(model):
        output = answering.generate(**inputs, synced_gpus=synced_gpus, streamer=streamer, **how)
    model.train(was_training)
    stops = stop_ids(model)
    return [_to_answer(chat, stops, row) for row in output[:, start:].tolist()]


@contextmanager
def _token_ids_alone(model: torch.nn.Module) -> Iterator[None]:
    """Of the model's generation config only its token ids count: beams, penalties, forced tokens, lengths, caches and all else
    that a base brings along would make its answers unlike those that it is compared with.

    `generate` fills whatever its arguments leave open from the model's own config, which therefore has to give way.
    """
    inner = causal_model(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig(**{name: getattr(own, name) for name in TOKEN_IDS})
    try:
        yield
    finally:
        inner.generation_config = own


def unused_settings(model: torch.nn.Module) -> dict[str, Any]:
    """What the model's generation config sets beside its token ids, and what is not used here."""
    own = json.loads(model.generation_config.to_json_string())
    return {k: v for k, v in own.items() if k not in (*TOKEN_IDS, "transformers_version", "_from_model_config")}


def _with_virtual_tokens(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Embeddings with the trained prompt right before the text, as in training.

    PEFT's own `generate` puts it before the padding, so that an answer would come to depend on its batch, and of an
    encoder-decoder it copies the streamer with all that this holds.
    """
    virtual = model.get_prompt(len(input_ids)).to(model.dtype)
    rows, masks = [], []
    for embedded, mask, prompt in zip(model.word_embeddings(input_ids), attention_mask, virtual):
        padding = int(mask.argmax())  # on the left
        rows.append(torch.cat([embedded[:padding], prompt, embedded[padding:]]))
        masks.append(torch.cat([mask[:padding], mask.new_ones(len(prompt)), mask[padding:]]))
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.stack(masks)}


def _to_answer(chat: Chat, stops: set[int], ids: list[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    ids = ids if end is None else ids[: end + 1]
    return Answer(chat.spoken(ids), tuple(ids), "length" if end is None else "stop")


def generate_all(
    model: torch.nn.Module,
    chat: Chat,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    device: torch.device,
    max_batch_tokens: int,
    done: Callable[[int, Answer], None],
    show: str | None = None,
) -> dict[str, float]:
    """Answers every prompt, longest first, and hands each answer to `done(index, answer)` as soon as it is there.

    A model that the batcher cannot serve is answered in batches by `generate`, which is said.

    Args:
        max_batch_tokens: prompts in flight with their longest answers, padded to the longest of them, stay under it, and
            their keys and values under an eighth of the memory; halved, and said, where memory ends.
        show: the text of a progress bar, or None for no bar.

    Returns:
        seconds, new_tokens and the largest batch (`batch_size`) of these prompts.

    Raises:
        torch.OutOfMemoryError: where a batch of one does not fit.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    max_batch_tokens = min(max_batch_tokens, cache_tokens(model, device))
    reason = why_not(model)
    if reason:
        print(f"carelm: rank {rank()}: {reason}: answers come in batches by transformers' generate, which is slower",
              file=sys.stderr, flush=True)  # fmt: skip
    answering = (_by_generate if reason else _by_batcher)(
        model, chat, prompts, order, decoding, device, max_batch_tokens
    )
    seconds, new_tokens, batch_size = 0.0, 0, 0
    started = time.perf_counter()
    with tqdm(total=len(prompts), desc=show, unit="example", dynamic_ncols=True, disable=show is None) as bar:
        for in_flight, answers in answering:
            seconds += time.perf_counter() - started
            for i, answer in answers:
                done(i, answer)
                new_tokens += answer.new_tokens
            batch_size = max(batch_size, in_flight)
            bar.update(len(answers))
            started = time.perf_counter()
    return {"seconds": seconds, "new_tokens": new_tokens, "batch_size": batch_size}


# How many were answered together, and the indices and answers of those that are over.
Answering = Iterator[tuple[int, list[tuple[int, Answer]]]]


def _by_batcher(
    model: torch.nn.Module, chat: Chat, prompts: list[list[int]], order: list[int], decoding: Decoding,
    device: torch.device, max_batch_tokens: int,
) -> Answering:  # fmt: skip
    was_training = model.training
    model.eval()
    batcher = Batcher(model, device=device, max_batch_tokens=max_batch_tokens)
    index = {batcher.submit(prompts[i], decoding): i for i in order}
    while batcher.busy:
        over = batcher.step()
        yield batcher.largest, [(index[request], _to_answer(chat, batcher.stops, request.tokens)) for request in over]
    model.train(was_training)


def _by_generate(
    model: torch.nn.Module, chat: Chat, prompts: list[list[int]], left: list[int], decoding: Decoding,
    device: torch.device, max_batch_tokens: int,
) -> Answering:  # fmt: skip
    while left:
        longest = len(prompts[left[0]]) + decoding.max_new_tokens
        batch = left[: max(1, max_batch_tokens // longest)]
        given = [prompts[i] for i in batch]
        answers = unless_out_of_memory(partial(generate, model, chat, given, decoding, device=device), len(batch))
        if answers is None:
            max_batch_tokens = longest * halve(len(batch))
            continue
        left = left[len(batch) :]
        yield len(batch), list(zip(batch, answers))


class _Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def put(self, value):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self):
        pass


def _time_one(
    model: torch.nn.Module,
    chat: Chat,
    ids: list[int],
    decoding: Decoding,
    device: torch.device,
    batcher: Batcher | None,
) -> list[float]:
    """When the prompt came and when each token did, in seconds."""
    clock = _Clock(device)
    clock.put(ids)
    if batcher is None:
        generate(model, chat, [ids], decoding, device=device, streamer=clock)
        del clock.times[1]  # the first thing that a streamer is given is the prompt
        return clock.times
    batcher.submit(ids, decoding, on_token=lambda request, token: clock.put(token))
    while batcher.busy:
        batcher.step()
    return clock.times


def latency(
    model: torch.nn.Module,
    chat: Chat,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    device: torch.device,
    done: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """Milliseconds at batch size 1: to the first token, for each further one, and end to end, as p50, p95 and p99.

    The first prompts are answered once before, unmeasured; the device is synchronised at every token. `done` is called after
    each prompt.
    """
    was_training = model.training
    model.eval()
    batcher = None if why_not(model) else Batcher(model, device=device, max_batch_tokens=1)
    warm_up, began = prompts[:WARM_UP_PROMPTS], time.perf_counter()
    for ids in warm_up:
        _time_one(model, chat, ids, decoding, device, batcher)
    if prompts:
        seconds = (time.perf_counter() - began) / len(warm_up) * len(prompts)
        lasts = f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} s"
        say(f"latency: {len(prompts)} answers, one at a time, {lasts}; num_latency_prompts: 0 leaves it out")
    first, further, whole = [], [], []
    for ids in tqdm(prompts, desc="latency", unit="example", dynamic_ncols=True, disable=not prompts):
        started, *times = _time_one(model, chat, ids, decoding, device, batcher)
        first.append(1e3 * (times[0] - started))
        whole.append(1e3 * (times[-1] - started))
        if len(times) > 1:
            further.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
        done()
    model.train(was_training)
    measured = {"ttft_ms": first, "tpot_ms": further, "e2e_ms": whole}
    return {name: {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES} if values else {}
            for name, values in measured.items()}  # fmt: skip
