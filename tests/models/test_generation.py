"""Answers are decoded in one way, whatever a base's generation config says."""

import json
import shutil

import pytest
import torch
from drawn import make_adapter

from carelm.evaluation import candidates
from carelm.evaluation.questions import make_questions
from carelm.models import generation
from carelm.models.batcher import Batcher, why_not
from carelm.models.generation import Decoding
from carelm.recipe_file import load_recipe

CPU = torch.device("cpu")
SETTINGS = [
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "num_return_sequences": 2},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "min_p": 0.2, "typical_p": 0.4},
    {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 0.5},
    {
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 5,
        "suppress_tokens": list(range(6, 900)),
        "begin_suppress_tokens": [1],
    },
    {"max_length": 5, "min_length": 300, "min_new_tokens": 9, "max_time": 1e-9, "stop_strings": ["e", "a"]},
    {
        "penalty_alpha": 0.6,
        "prompt_lookup_num_tokens": 3,
        "guidance_scale": 2.0,
        "dola_layers": "high",
        "use_cache": False,
    },
    {
        "sequence_bias": [[[40], 9.0]],
        "bad_words_ids": [[30]],
        "watermarking_config": {"bias": 9.0},
        "cache_implementation": "static",
    },
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A drawn adapter, its prompts and what it answers."""
    recipe = make_adapter(tmp_path_factory.mktemp("run"), "--load_in_4bit", "false", "--max_eval_samples", "3")
    candidate = candidates.find(recipe, "adapter")
    chat = candidate.make_chat()
    prompts = [chat.prompt_ids(question.messages) for question in make_questions(recipe, chat)[0]]
    model, _ = candidate.load(chat)
    return model, chat, prompts, generation.generate(model, chat, prompts, Decoding(8), device=CPU)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s)))
def test_no_setting_of_the_base_reaches_greedy_decoding(adapter, settings, monkeypatch):
    model, chat, prompts, plain = adapter
    own = model.generation_config
    before = own.to_dict()
    for key, value in settings.items():
        monkeypatch.setattr(own, key, value, raising=False)
    assert generation.generate(model, chat, prompts, Decoding(8), device=CPU) == plain
    generation.latency(model, chat, prompts[:1], Decoding(3), device=CPU, done=lambda: None)
    assert model.generation_config is own and own.to_dict() == {**before, **settings}
    assert {key: value for key, value in settings.items() if value is not False}.keys() <= generation.unused_settings(
        model
    ).keys()


def test_what_a_base_in_a_folder_adds_is_known_and_has_no_effect(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/generation_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "num_beams": 3, "return_dict_in_generate": True, "repetition_penalty": 1.5}))
    answers = []
    for folder in (base, tmp_path / "base"):
        candidate = candidates.find(load_recipe(["--model_name_or_path", str(folder)], usage=""), "base")
        chat = candidate.make_chat()
        model, about = candidate.load(chat)
        answers.append(generation.generate(model, chat, adapter[2], Decoding(8), device=CPU))
    assert answers[0] == answers[1]
    assert {"num_beams": 3, "repetition_penalty": 1.5}.items() <= about["unused_generation_config"].items()


def test_a_trained_prompt_is_answered_by_the_batcher_as_by_generate_token_for_token(tmp_path):
    recipe = make_adapter(tmp_path / "run", "--load_in_4bit", "false", "--method", "prompt_tuning")
    candidate = candidates.find(recipe, "adapter")
    chat = candidate.make_chat()
    model, _ = candidate.load(chat)
    questions, _ = make_questions(recipe, chat)
    prompts = [chat.fit_prompt(question.messages, 300).ids for question in questions[:9]]
    assert why_not(model) is None and len({*map(len, prompts)}) > 4
    for decoding in (Decoding(24), Decoding(24, temperature=1.3, seed=5)):
        by_generate = generation.generate(model, chat, prompts, decoding, device=CPU)
        batcher = Batcher(model, device=CPU, max_batch_tokens=600)  # more prompts than places
        requests = [batcher.submit(prompt, decoding) for prompt in prompts]
        while batcher.busy:
            batcher.step()
        assert [tuple(request.tokens) for request in requests] == [answer.ids for answer in by_generate]
        assert 1 < batcher.largest < len(prompts)
    assert len({answer.ids for answer in by_generate}) > 4
