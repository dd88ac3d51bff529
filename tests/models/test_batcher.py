"""The continuous batcher gives the tokens of one-at-a-time `generate`, whatever is beside a request and whenever it comes."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from carelm.models import key_values
from carelm.models.batcher import Batcher, is_out_of_memory, why_not
from carelm.models.decoding import Decoding, choose
from carelm.models.key_values import Layer, attend_by_groups

CPU = torch.device("cpu")
VOCABULARY = 96
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32}
SIZES = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4}
MODERN = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
FAMILIES = {
    "Llama": LlamaConfig(**MODERN),
    "Qwen3": Qwen3Config(**MODERN, head_dim=8),
    "Mistral": MistralConfig(**MODERN, sliding_window=None),
    "Mixtral": MixtralConfig(**MODERN, sliding_window=None, num_local_experts=4),
    "Gemma": GemmaConfig(**MODERN, head_dim=8, tie_word_embeddings=False),
    "Phi": PhiConfig(**MODERN),
    "GPT-NeoX": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=128),
    "GPT-2": GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "OPT": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, pad_token_id=0),
    "Falcon with ALiBi": FalconConfig(**SIZES, alibi=True, new_decoder_architecture=False),
}
LENGTHS = (5, 17, 9, 30, 2, 12, 23, 9, 1, 28)


def draw_model(config):
    """Weights large enough that its answers vary; no token ends them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def llama():
    return draw_model(FAMILIES["Llama"])


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(1)
    return [[numbers.randrange(10, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def alone(model, prompt, new_tokens):
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :].tolist()


def run(batcher):
    over = []
    while batcher.busy:
        over += batcher.step()
    return over


def answers(model, prompts, decoding, max_batch_tokens):
    batcher = Batcher(model, device=CPU, max_batch_tokens=max_batch_tokens)
    requests = [batcher.submit(prompt, decoding) for prompt in prompts]
    assert set(run(batcher)) == set(requests)
    return [request.tokens for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_one_at_a_time(family, prompts):
    model = draw_model(FAMILIES[family])
    assert why_not(model) is None
    whole = [alone(model, prompt, 20) for prompt in prompts]
    stops = {tokens[3 * k] for k, tokens in enumerate(whole[:6])}
    model.generation_config.eos_token_id = list(stops)
    expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in stops), 20)] for tokens in whole]
    assert len({len(tokens) for tokens in expected}) > 1  # they end at unlike steps
    for max_batch_tokens in (170, 10**4):  # three places, a place for each
        assert answers(model, prompts, Decoding(20), max_batch_tokens) == expected


@pytest.mark.parametrize(
    "config, reason",
    [
        (MistralConfig(**MODERN, sliding_window=16), "it caches by DynamicSlidingWindowLayer"),
        (
            MambaConfig(**SMALL, num_hidden_layers=2),
            "its forward takes no past_key_values",
        ),
        (
            GPTNeoConfig(**SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
            "it has layers of local attention",
        ),
        (BloomConfig(**SMALL, n_layer=2, n_head=4), "its forward takes no position_ids"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_less_than_all_keys_is_refused_with_its_reason(config, reason):
    assert why_not(draw_model(config)) == reason


def test_drawn_answers_follow_from_the_seed_and_not_from_the_batch(llama, prompts):
    decoding = Decoding(20, temperature=1.3, top_p=0.9, seed=7)
    drawn = answers(llama, prompts, decoding, 1)
    assert answers(llama, prompts[::-1], decoding, 10**4)[::-1] == drawn
    assert answers(llama, prompts, decoding, 170) == drawn
    assert answers(llama, prompts, Decoding(20), 170) != drawn
    assert answers(llama, prompts, Decoding(20, temperature=1.3, top_p=0.9, seed=8), 170) != drawn


def test_requests_of_one_batch_are_decoded_each_in_its_own_way(llama, prompts):
    ways = [Decoding(20), Decoding(7), Decoding(20, temperature=0.8), Decoding(12, temperature=2.0, top_p=0.5)]
    batcher = Batcher(llama, device=CPU, max_batch_tokens=10**4)
    requests = [batcher.submit(prompts[1], way) for way in ways]
    run(batcher)
    for request, way in zip(requests, ways):
        assert [request.tokens] == answers(llama, [prompts[1]], way, 1)


def test_every_token_is_told_in_order_and_none_after_a_cancel(llama, prompts):
    told = {}
    batcher = Batcher(llama, device=CPU, max_batch_tokens=170)

    def on_token(request, token):
        told.setdefault(request, []).append(token)
        assert told[request] == request.tokens
        if request is requests[3] and len(request.tokens) == 2:
            batcher.cancel(request)

    requests = [batcher.submit(prompt, Decoding(9), on_token) for prompt in prompts]
    batcher.cancel(requests[-1])  # while it waits
    assert set(run(batcher)) == set(requests)
    assert [len(request.tokens) for request in requests] == [9, 9, 9, 2, 9, 9, 9, 9, 9, 0]
    assert [request.finish_reason for request in requests].count("cancelled") == 2
    assert requests[0].finish_reason == "length"


def test_a_request_that_comes_late_is_answered_beside_the_others(llama, prompts):
    """Longer ones too: room is made while others are in flight."""
    expected = [alone(llama, prompt, 20) for prompt in prompts]
    batcher = Batcher(llama, device=CPU, max_batch_tokens=300)
    requests = []
    for prompt in sorted(prompts, key=len):
        requests.append(batcher.submit(prompt, Decoding(20)))
        batcher.step()
    run(batcher)
    assert {tuple(request.prompt): request.tokens for request in requests} == {
        tuple(prompt): tokens for prompt, tokens in zip(prompts, expected)
    }
    assert batcher.largest > 2


def test_out_of_memory_reads_again_and_tells_no_token_twice(llama, prompts, capsys):
    expected, told, forwards = answers(llama, prompts, Decoding(20), 10**4), [], []

    def refuse(module, args, inputs):
        forwards.append(len(inputs["input_ids"]))
        if len(forwards) == 6 or len(inputs["input_ids"]) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    batcher = Batcher(llama, device=CPU, max_batch_tokens=10**4)
    requests = [batcher.submit(p, Decoding(20), lambda request, token: told.append(request)) for p in prompts]
    hook = llama.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        run(batcher)
    finally:
        hook.remove()
    assert [request.tokens for request in requests] == expected
    assert [told.count(request) for request in requests] == [len(tokens) for tokens in expected]
    assert "out of memory with a batch of 10; goes on with 5" in capsys.readouterr().err


def raised(compute):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        compute()
    return caught.value


@pytest.mark.parametrize(
    "error, is_one",
    [
        (raised(lambda: torch.empty(2**46)), True),  # torch's own words on a CPU
        (raised(lambda: bytearray(2**50)), True),
        (raised(lambda: np.zeros(2**46)), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), False),
        (raised(lambda: torch.ones(2) @ torch.ones(3)), False),
    ],
)
def test_only_what_a_smaller_batch_may_help_is_out_of_memory(llama, prompts, capsys, error, is_one):
    """oneDNN that cannot make a kernel fails again and again: a smaller batch would be in vain, and said for nothing."""

    def refuse(module, args, inputs):
        if len(inputs["input_ids"]) > 2:
            raise error

    batcher = Batcher(llama, device=CPU, max_batch_tokens=10**4)
    requests = [batcher.submit(prompt, Decoding(4)) for prompt in prompts[:4]]
    hook = llama.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        if is_one:
            run(batcher)
        else:
            assert raised(lambda: run(batcher)) is error
    finally:
        hook.remove()
    assert is_out_of_memory(error) is is_one
    assert all(request.finish_reason for request in requests) is is_one
    assert ("out of memory" in capsys.readouterr().err) is is_one


def test_newcomers_that_memory_has_no_room_for_wait_for_the_one_in_flight(llama, prompts, capsys, monkeypatch):
    expected = [alone(llama, prompt, 12) for prompt in prompts[:4]]
    batcher = Batcher(llama, device=CPU, max_batch_tokens=10**4)
    requests = [batcher.submit(prompts[0], Decoding(12))]
    batcher.step()

    def refuse(layer, rows, width):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Layer, "lay_out_anew", refuse)
    requests += [batcher.submit(prompt, Decoding(12)) for prompt in prompts[1:4]]
    batcher.step()
    monkeypatch.undo()
    run(batcher)
    assert [request.tokens for request in requests] == expected
    assert "out of memory with a batch of 4; goes on with 2" in capsys.readouterr().err


def test_what_was_drawn_before_memory_ended_is_drawn_again(llama, prompts):
    drawn = Decoding(20, temperature=1.0, top_p=0.9)
    expected, calls = answers(llama, prompts, drawn, 10**4), []

    def refuse(requests, logits):
        calls.append(give(requests, logits))
        if len(calls) == 5 and not requests[0].finish_reason:
            for request in requests:
                request.tokens.pop()
                request.finish_reason = None
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return calls[-1]

    batcher = Batcher(llama, device=CPU, max_batch_tokens=10**4)
    give, batcher._give = batcher._give, refuse
    requests = [batcher.submit(prompt, drawn) for prompt in prompts]
    run(batcher)
    assert [request.tokens for request in requests] == expected


@pytest.mark.parametrize("dtype, difference", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (9, 3), (3, 3), (4, 1)])
def test_attention_by_groups_is_attention(dtype, difference, heads, key_heads):
    torch.manual_seed(0)
    query, wide = torch.randn(5, heads, 1, 16, dtype=dtype), torch.randn(2, 8, key_heads, 40, 16, dtype=dtype)
    key, value = wide[:, :5, :, :33]
    for mask in (None, torch.arange(33) < torch.tensor([33, 20, 1, 7, 32])[:, None, None, None]):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), mask, scale=0.3, enable_gqa=True
        )
        found, _ = attend_by_groups(None, query, key, value, mask, scaling=0.3)
        assert found.dtype == dtype
        assert (found.transpose(1, 2) - expected).abs().max() < difference


def test_keys_and_values_take_at_most_an_eighth_of_the_memory(llama, monkeypatch):
    config = llama.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(key_values, "total_memory_bytes", lambda device: 8 * 100 * a_token + 7)
    assert key_values.cache_tokens(llama, CPU) == 100


def test_the_bound_on_tokens_holds_and_empty_places_cost_nothing(llama, prompts):
    forwards = []
    hook = llama.register_forward_pre_hook(
        lambda module, args, inputs: forwards.append(inputs["input_ids"].shape), with_kwargs=True
    )
    try:
        expected = answers(llama, prompts, Decoding(20), 150)
    finally:
        hook.remove()
    decoded = [rows for rows, new in forwards if new == 1]
    assert max(decoded) <= 150 // (1 + 20)
    # every row of a decoding forward is a token of an answer; the first token comes of the reading
    assert sum(decoded) <= sum(map(len, expected))


@pytest.mark.parametrize("at", [1, 4])
def test_a_callback_that_raises_ends_its_own_request_alone(llama, prompts, at):
    def breaks(request, token):
        if len(request.tokens) == at:
            raise ConnectionError("gone")

    batcher, told = Batcher(llama, device=CPU, max_batch_tokens=4096), []
    first = batcher.submit(prompts[0], Decoding(8))
    broken = batcher.submit(prompts[1], Decoding(8), breaks)
    last = batcher.submit(prompts[2], Decoding(8), lambda request, token: told.append(token))
    run(batcher)
    assert (broken.finish_reason, len(broken.tokens), type(broken.error)) == ("cancelled", at, ConnectionError)
    assert first.tokens == alone(llama, prompts[0], 8)
    assert last.tokens == told == alone(llama, prompts[2], 8)


def test_nan_of_one_request_does_not_reach_the_next_in_its_place(llama, prompts):
    batcher = Batcher(llama, device=CPU, max_batch_tokens=4096)
    long, short = batcher.submit(prompts[3], Decoding(20)), batcher.submit(prompts[1], Decoding(2))
    batcher.step()
    for layer in batcher._cache.layers:
        layer.keys[1], layer.values[1] = torch.nan, torch.nan
    while not short.finish_reason:
        batcher.step()
    later = batcher.submit(prompts[0], Decoding(6))
    while batcher.busy:
        batcher.step()
    assert later.tokens == alone(llama, prompts[0], 6)
    assert long.tokens == alone(llama, prompts[3], 20)


@pytest.mark.parametrize("prompt, new_tokens", [([], 3), ([5, 6], 0), ([5] * 120, 9)])
def test_a_request_that_cannot_be_served_is_refused_to_its_sender(llama, prompt, new_tokens):
    batcher = Batcher(llama, device=CPU, max_batch_tokens=4096)
    with pytest.raises(ValueError, match="new"):
        batcher.submit(prompt, Decoding(new_tokens))
    assert not batcher.busy


def test_a_number_that_rounds_to_one_draws_a_token_that_top_p_has_left():
    logits = torch.full((1, 96), -5.0)
    logits[0, 7] = 10.0
    draws = random.Random(0)
    draws.random = lambda: 1 - 2**-26
    assert choose(logits, [Decoding(1, temperature=1.0, top_p=0.9)], [draws]).tolist() == [7]
