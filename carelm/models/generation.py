"""Answers of a model to prompts: in batches of like length, left-padded, greedy unless told, timed."""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from carelm.chat.chat import Chat
from carelm.ranks import rank

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PERCENTILES = (50, 95, 99)
WARM_UP_PROMPTS = 2


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: `temperature` 0 takes the likeliest token, above it tokens are drawn by `seed`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def arguments(self) -> dict:
        """As `generate` of transformers takes them."""
        draws = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature > 0 else {}
        plain = {"num_beams": 1, "return_dict_in_generate": False, "use_cache": True}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **plain, **draws}


@dataclass(frozen=True)
class Answer:
    """What a model answered: the text, its tokens (the end of turn is one), and why it ended ("stop" or "length")."""

    text: str
    new_tokens: int
    finish_reason: str


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
        model: a causal language model with or without adapter; its mode (train or eval) is restored.
        chat: its tokenizer turns ids into text.
        prompts: token ids of each prompt, up to and including the assistant's header.
        decoding: how tokens are chosen.
        device: where the model computes (its weights may lie elsewhere, under ZeRO with offload).
        synced_gpus: True under ZeRO-3, where every rank must take part in every step.
        streamer: is given every token as it comes (one prompt only).
    """
    if not prompts:
        return []
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), chat.tokenizer.pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids, device=device)
        attention_mask[row, longest - len(ids) :] = 1
    was_training = model.training
    model.eval()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    answering, start = model, longest
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        inputs, answering, start = _with_virtual_tokens(model, **inputs), model.get_base_model(), 0
    with _token_ids_alone(model):
        output = answering.generate(**inputs, synced_gpus=synced_gpus, streamer=streamer, **decoding.arguments())
    model.train(was_training)
    return [_to_answer(chat, model.generation_config.eos_token_id, row) for row in output[:, start:].tolist()]


@contextmanager
def _token_ids_alone(model: torch.nn.Module) -> Iterator[None]:
    """Of the model's generation config only its token ids count: beams, penalties, forced tokens, lengths, caches and all else
    that a base brings along would make its answers unlike those that it is compared with.

    `generate` fills whatever its arguments leave open from the model's own config, which therefore has to give way.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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

    PEFT's own `generate` puts it before the padding, so that an answer would come to depend on its batch.
    """
    virtual = model.get_prompt(len(input_ids)).to(model.dtype)
    rows, masks = [], []
    for embedded, mask, prompt in zip(model.word_embeddings(input_ids), attention_mask, virtual):
        padding = int((mask == 0).sum())
        rows.append(torch.cat([embedded[:padding], prompt, embedded[padding:]]))
        masks.append(torch.cat([mask[:padding], mask.new_ones(len(prompt)), mask[padding:]]))
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.stack(masks)}


def _to_answer(chat: Chat, stops: int | list[int], ids: list[int]) -> Answer:
    stops = {stops} if isinstance(stops, int) else set(stops)
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    ids = ids if end is None else ids[: end + 1]
    return Answer(chat.spoken(ids), len(ids), "length" if end is None else "stop")


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

    Where memory ends, the budget is halved, said, and the batch is taken again.

    Args:
        max_batch_tokens: prompts with padding and the longest answers of one batch stay under it.
        show: the text of a progress bar, or None for no bar.

    Returns:
        seconds, new_tokens and the largest batch (`batch_size`) of these prompts.

    Raises:
        torch.OutOfMemoryError: where a batch of one does not fit.
    """
    left = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    seconds, new_tokens, batch_size = 0.0, 0, 0
    bar = tqdm(total=len(prompts), desc=show, unit="example", dynamic_ncols=True, disable=show is None)
    while left:
        batch = left[: batch_length(len(prompts[left[0]]) + decoding.max_new_tokens, max_batch_tokens)]
        torch.manual_seed(decoding.seed * 1_000_003 + batch[0])
        started = time.perf_counter()
        answers = None
        try:
            answers = generate(model, chat, [prompts[i] for i in batch], decoding, device=device)
        except RuntimeError as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
        if answers is None:  # here the exception no longer holds the batch's memory
            gc.collect()
            torch.cuda.empty_cache()
            max_batch_tokens = (len(prompts[left[0]]) + decoding.max_new_tokens) * (len(batch) // 2)
            print(f"carelm: rank {rank()}: out of memory with a batch of {len(batch)}; goes on with {len(batch) // 2}",
                  file=sys.stderr, flush=True)  # fmt: skip
            continue
        seconds += time.perf_counter() - started
        left = left[len(batch) :]
        for i, answer in zip(batch, answers):
            done(i, answer)
        new_tokens += sum(answer.new_tokens for answer in answers)
        batch_size = max(batch_size, len(batch))
        bar.update(len(batch))
    bar.close()
    return {"seconds": seconds, "new_tokens": new_tokens, "batch_size": batch_size}


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def batch_length(tokens: int, max_batch_tokens: int) -> int:
    """How many rows of so many tokens one batch takes: at least one."""
    return max(1, max_batch_tokens // tokens)


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
    for ids in prompts[:WARM_UP_PROMPTS]:
        generate(model, chat, [ids], decoding, device=device)
    first, further, whole = [], [], []
    for ids in tqdm(prompts, desc="latency", unit="example", dynamic_ncols=True):
        clock = _Clock(device)
        started = time.perf_counter()
        generate(model, chat, [ids], decoding, device=device, streamer=clock)
        times = clock.times[1:]  # the first thing that comes is the prompt
        first.append(1e3 * (times[0] - started))
        whole.append(1e3 * (times[-1] - started))
        if len(times) > 1:
            further.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
        done()
    measured = {"ttft_ms": first, "tpot_ms": further, "e2e_ms": whole}
    return {name: {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES} if values else {}
            for name, values in measured.items()}  # fmt: skip
