"""Models of one base share it in memory, and none changes what another answers."""

import asyncio
import time
from contextlib import aclosing

import pytest
import torch
from drawn import make_adapter
from served import KEYS

from carelm.evaluation import candidates
from carelm.models.batcher import Batcher
from carelm.models.decoding import Decoding
from carelm.models.generation import generate_all
from carelm.models.key_values import causal_model
from carelm.serving.engine import BatcherEngine
from carelm.talk.speaker import Speaker


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A base and its adapters: LoRA, another one, DoRA, a trained prompt, LoRA with a whole module."""
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "lora": [],
        "other.1": ["--lora_r", "4"],
        "dora": ["--use_dora", "true"],
        "prompt": ["--method", "prompt_tuning"],
        "head": ["--lora_modules_to_save", "lm_head"],
    }
    return {name: make_adapter(folder / name, *KEYS, *keys) for name, keys in ways.items()}


@pytest.fixture(scope="module")
def speakers(recipes):
    recipe = recipes["lora"]
    names = [str(other.output_dir) for other in recipes.values()]
    return [Speaker(recipe, candidates.find(recipe, name)) for name in [*names[:2], "base", *names[2:]]]


@pytest.fixture(scope="module")
def engine(recipes, speakers):
    engine = BatcherEngine(recipes["lora"], speakers)
    yield engine
    asyncio.run(engine.close())


def answer(engine, speaker, ids):
    async def collect():
        return [token async for token in engine.answer(speaker.name, ids, speaker.decoding)]

    return collect()


def alone(speaker, ids):
    """The answer of the model by itself, as the evaluation has it."""
    model, _ = speaker.candidate.load(speaker.chat)
    found = {}
    generate_all(model, speaker.chat, [ids], speaker.decoding, device=speaker.device, max_batch_tokens=1,
                 done=found.__setitem__)  # fmt: skip
    return list(found[0].ids)


def test_six_models_on_one_base_answer_at_once_as_each_does_alone(engine, speakers, capsys):
    prompts = [s.chat.prompt_ids([{"role": "user", "content": f"Where is order {n}?"}]) for n, s in enumerate(speakers)]

    async def all_at_once():
        return await asyncio.gather(*(answer(engine, s, ids) for s, ids in zip(speakers, prompts)))

    answers = asyncio.run(all_at_once())
    assert engine.models == ["lora", "other.1", "base", "dora", "prompt", "head"]
    assert answers == [alone(speaker, ids) for speaker, ids in zip(speakers, prompts)]
    assert len({tuple(a) for a in answers}) > 4


def test_a_base_is_held_once_but_where_an_adapter_changes_more_of_it(engine, speakers):
    weights = {s.name: causal_model(s.model).get_input_embeddings().weight.data_ptr() for s in speakers}
    assert len({weights[name] for name in ("lora", "other.1", "base", "dora", "prompt")}) == 1
    assert weights["head"] != weights["base"]


def test_closing_an_answer_ends_it_and_others_go_on(engine, speakers):
    base = speakers[2]
    ids = base.chat.prompt_ids([{"role": "user", "content": "Where is it?"}])

    async def leave_and_stay():
        decoding = Decoding(base.positions - len(ids))
        async with aclosing(engine.answer("base", ids, decoding)) as tokens:
            async for _ in tokens:
                break
        whole = await answer(engine, base, ids)
        served = engine._served["base"]
        until = time.time() + 5
        while served.asked and time.time() < until:
            await asyncio.sleep(0.01)
        return whole, served.asked

    whole, left = asyncio.run(leave_and_stay())
    assert whole == alone(base, ids) and not left


@pytest.fixture
def one_at_a_time(engine, monkeypatch):
    """A model as if the batcher could not serve it."""
    monkeypatch.setattr(engine._served["prompt"], "is_batched", False)


def test_a_model_that_answers_one_at_a_time_lets_the_others_go_on(engine, speakers, one_at_a_time):
    prompt, lora = (next(s for s in speakers if s.name == name) for name in ("prompt", "lora"))
    ids = {s.name: s.chat.prompt_ids([{"role": "user", "content": "Where is it?"}]) for s in (prompt, lora)}
    over = []

    async def ask(speaker):
        tokens = await answer(engine, speaker, ids[speaker.name])
        over.append(speaker.name)
        return tokens

    async def long_and_short():
        long = asyncio.create_task(collect(engine.answer("prompt", ids["prompt"], Decoding(200)), over))
        await asyncio.sleep(0.05)
        short = await ask(lora)
        return short, await long

    async def collect(tokens, over):
        found = [token async for token in tokens]
        over.append("prompt")
        return found

    short, long = asyncio.run(long_and_short())
    assert over == ["lora", "prompt"] and len(long) > 24
    assert short == alone(lora, ids["lora"]) and long[:24] == alone(prompt, ids["prompt"])


def test_leaving_a_model_that_answers_one_at_a_time_ends_its_answer_too(engine, speakers, one_at_a_time):
    prompt = next(s for s in speakers if s.name == "prompt")
    ids = prompt.chat.prompt_ids([{"role": "user", "content": "Where is it?"}])

    async def leave():
        async with aclosing(engine.answer("prompt", ids, Decoding(800))) as tokens:
            async for _ in tokens:
                break
        began = time.monotonic()
        return await answer(engine, prompt, ids), time.monotonic() - began

    tokens, seconds = asyncio.run(leave())
    assert tokens == alone(prompt, ids) and seconds < 2  # 800 tokens would take longer


def test_the_thread_that_steps_alone_has_a_pool_of_threads(recipes, speakers, monkeypatch):
    """A second pool makes the first one's threads sleep between operations."""
    step, seen = Batcher.step, set()
    monkeypatch.setattr(Batcher, "step", lambda batcher: (seen.add(torch.get_num_threads()), step(batcher))[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        recipe = recipes["lora"]
        speaker = Speaker(recipe, candidates.find(recipe, "base"))
        engine = BatcherEngine(recipe, [speaker])
        assert torch.get_num_threads() == 1
        asyncio.run(answer(engine, speaker, speaker.chat.prompt_ids([{"role": "user", "content": "x"}])))
        asyncio.run(engine.close())
        assert seen == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_base_in_4_bits_answers_as_in_the_evaluation(tmp_path):
    """With an adapter beside it, in fp32: the same ids, asked at once."""
    recipe = make_adapter(tmp_path, *KEYS[:-1], "true", "--precision", "fp32")
    speakers = [Speaker(recipe, candidates.find(recipe, name)) for name in ("base", "adapter")]
    engine = BatcherEngine(recipe, speakers)
    questions = [[{"role": "user", "content": text}] for text in ("Where is my order?", "May I return a kettle?", "Hi")]
    asked = [(speaker, speaker.chat.prompt_ids(question)) for speaker in speakers for question in questions]

    async def all_at_once():
        answers = await asyncio.gather(*(answer(engine, *pair) for pair in asked))
        await engine.close()
        return answers

    served = asyncio.run(all_at_once())
    assert all(speaker.candidate.bits == 4 for speaker in speakers)
    weight = next(
        w for name, w in causal_model(speakers[0].model).named_parameters() if "q_proj" in name and w.ndim == 2
    )
    assert len(set(weight.flatten()[:64].tolist())) <= 16  # a block of NF4
    assert served == [alone(*pair) for pair in asked] and len({*map(tuple, served)}) > 3
