"""What is trained is the answer and its end of turn, after the very tokens that ask for it in generation."""

import copy
import json
import shutil

import numpy as np
import pytest
from conftest import PROJECT

from carelm.chat.chat import Chat
from carelm.chat.tokenizer import load_tokenizer
from carelm.data import sources
from carelm.data.conversations import join_messages
from carelm.data.example import Example, NoAnswer
from carelm.data.messages import split_turns
from carelm.data.report import SplitReport
from carelm.data.rows import to_example
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.recipe_file import load_recipe

RECIPES = sorted(path for folder in ("recipes", "recipes/datasets") for path in (PROJECT / folder).glob("*.yaml"))
MAPS = [PROJECT / "recipes/demo.yaml", *sorted((PROJECT / "recipes/datasets").glob("*.yaml"))]
ODD_TEXTS = ["Größe 38 😀?", "Two\r\nlines {{Order Number}}", " spaces  around ", "no special <tokens> | here"]
REAL_ROWS = 8
END = "<|eot_id|>"


def load(base, **changes):
    return load_tokenizer(
        str(base), **{"revision": "main", "trust_remote_code": False, "template_file": None} | changes
    )


@pytest.fixture(scope="module")
def tokenizer(base):
    return load(base)


@pytest.fixture
def with_template(tokenizer):
    """A copy of the tokenizer with another chat template."""

    def with_template(template):
        other = copy.copy(tokenizer)
        other.chat_template = template
        return other

    return with_template


def example(prompt, completion):
    return Example(prompt=prompt, completion=completion, id="1", category=None, source="rows.jsonl:1")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = example([user("Hi")], [assistant("Hello."), user("Size 38?"), assistant("Yes.")])
ROLES = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
HEADER = "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"


# Prompts and masks, for every recipe


def invented_rows(recipe):
    """Rows of the shape that the recipe reads."""
    if recipe.text_column:
        rows = [
            {
                recipe.text_column: f"{name} {i} {turn}: {text}",
                recipe.role_column: name,
                recipe.id_column: f"{i} {turn} {name}",
                recipe.reply_to_column: before,
            }
            for i, text in enumerate(ODD_TEXTS)
            for before, name, turn in ((None, "true", 1), (f"{i} 1 true", "false", 1), (f"{i} 1 false", "true", 2),
                                       (f"{i} 2 true", "false", 2))
        ]  # fmt: skip
        return join_messages(recipe, [(f"rows.jsonl:{n}", row) for n, row in enumerate(rows, 1)], SplitReport())
    if not recipe.messages_column:
        templates = (recipe.prompt_template, recipe.completion_template, recipe.system_prompt or "")
        columns = {column for template in templates for column in template_columns(template, "template")}
        rows = [{column: f"{column} {i}: {text}" for column in columns} for i, text in enumerate(ODD_TEXTS)]
    else:
        role, content = recipe.role_key or "role", recipe.content_key or "content"
        user_name = (recipe.user_roles or ["user"])[0]
        assistant_name = (recipe.assistant_roles or ["assistant"])[0]
        rows = []
        for i, text in enumerate(ODD_TEXTS):
            *prompt, answer = (
                {role: name, content: f"{name} {i} {turn}: {text}"}
                for turn in range(3)
                for name in (user_name, assistant_name)
            )
            row = {recipe.messages_column: [answer] if recipe.prompt_column else [*prompt, answer]}
            row |= {recipe.prompt_column: prompt} if recipe.prompt_column else {}
            row |= {recipe.rejected_column: [answer | {content: "No idea."}]} if recipe.rejected_column else {}
            rows.append(row)
    return [("rows.jsonl:1", row | {recipe.category_column: "c", recipe.id_column: "i"}) for row in rows]


def examples_of(recipe, rows):
    examples = []
    for source, row in rows:
        try:
            examples.append(to_example(recipe, source, row))
        except NoAnswer:
            pass
    return examples


def answer_text(message):
    calls = "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", []))
    return "\n".join(filter(None, [message["content"], calls])) + END


def check_prompts_and_masks(recipe, examples, tokenizer):
    """Every trained stretch is one whole answer, and before it stand the ids that ask for it in generation."""
    chat = Chat(tokenizer, trained_turns=recipe.trained_turns, max_length=10**6)
    rendered, counts = chat.render(examples)
    assert examples and not counts
    for e, r in zip(examples, rendered):
        messages = e.prompt + e.completion
        answers = [i for i in range(len(e.prompt), len(messages)) if messages[i]["role"] == "assistant"]
        answers = answers if recipe.trained_turns == "all" else answers[-1:]
        starts = np.flatnonzero(r.trained & ~np.concatenate([[False], r.trained[:-1]]))
        ends = np.flatnonzero(r.trained & ~np.concatenate([r.trained[1:], [False]])) + 1
        assert len(starts) == len(answers)
        for i, start, end in zip(answers, starts, ends):
            assert r.input_ids[:start].tolist() == chat.prompt_ids(messages[:i])
            assert tokenizer.decode(r.input_ids[start:end]) == answer_text(messages[i])
            assert r.input_ids[end - 1] == chat.end_of_turn_id
        assert ends[-1] == len(r.input_ids)
        assert r.input_ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert tokenizer.decode(r.input_ids) == chat.text(messages)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_training_and_generation_share_the_prompt_for_every_recipe(path, tokenizer):
    recipe = load_recipe(["--config", str(path)], usage="")
    check_prompts_and_masks(recipe, examples_of(recipe, invented_rows(recipe)), tokenizer)


@pytest.mark.parametrize("path", MAPS, ids=lambda p: p.stem)
def test_training_and_generation_share_the_prompt_on_real_rows(path, tokenizer, carelm_data):
    folder = PROJECT / "demo/data" if path.stem == "demo" else carelm_data / path.stem
    if not folder.is_dir():
        pytest.skip(f"no public samples of this recipe: there is no folder {folder}")
    recipe = load_recipe(["--config", str(path), "--dataset_name", str(folder)], usage="")
    rows = sources.load_splits(recipe)[0]["train"]
    rows = rows[: REAL_ROWS // 2] + rows[-REAL_ROWS // 2 :]
    check_prompts_and_masks(recipe, examples_of(recipe, rows), tokenizer)


# Masks


def test_trained_turns_decides_how_many_answers_carry_loss(tokenizer):
    for trained_turns, expected in (("last", f"Yes.{END}"), ("all", f"Hello.{END}Yes.{END}")):
        (r,), _ = Chat(tokenizer, trained_turns=trained_turns, max_length=512).render([TWO_TURNS])
        assert tokenizer.decode(r.input_ids[r.trained]) == expected


def test_an_answer_is_tokenised_alone_so_that_its_first_token_is_what_generation_writes(tokenizer):
    chat = Chat(tokenizer, max_length=512)
    for answer in ("Yes", " Yes", "\nYes", "é"):
        (r,), _ = chat.render([example([user("Hi")], [assistant(answer)])])
        ids = tokenizer(answer + END, add_special_tokens=False)["input_ids"]
        assert r.input_ids[r.trained].tolist() == ids
        assert r.input_ids[~r.trained].tolist() == chat.prompt_ids([user("Hi")])


def test_arrays_have_the_lengths_and_types_that_they_promise(tokenizer):
    (r,), _ = Chat(tokenizer, max_length=512).render([TWO_TURNS])
    assert r.input_ids.shape == r.trained.shape
    assert (r.input_ids.dtype, r.trained.dtype) == (np.int32, np.bool_)


def test_the_preview_marks_the_trained_tokens_and_nothing_else(tokenizer):
    chat = Chat(tokenizer, trained_turns="all", max_length=512)
    (r,), _ = chat.render([TWO_TURNS])
    shown = chat.highlight(r)
    assert f"\033[7;32mHello.{END}\033[0m" in shown and f"\033[7;32mYes.{END}\033[0m" in shown
    assert shown.replace("\033[7;32m", "").replace("\033[0m", "") == chat.text(TWO_TURNS.prompt + TWO_TURNS.completion)


def test_no_warning_is_printed_for_a_text_over_the_models_window(tokenizer, monkeypatch):
    from transformers.tokenization_utils_base import logger

    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})
    monkeypatch.setattr(logger, "warning", lambda message, *_: pytest.fail(message))
    chat = Chat(tokenizer, max_length=4096)
    (r,), _ = chat.render([example([user("word " * 2000)], [assistant("Yes.")])])
    assert len(r.input_ids) > tokenizer.model_max_length


# Templates and tokenizers that cannot be trained with


def test_a_tokenizer_without_a_chat_template_is_refused(with_template):
    with pytest.raises(UserError, match="no chat template; set chat_template_path"):
        Chat(with_template(None), max_length=512)


def test_a_template_that_ends_an_answer_without_a_special_token_is_refused(with_template):
    plain = with_template(ROLES + "{{ m.content }}\n" + HEADER)
    with pytest.raises(UserError, match="chat_template_path.*no special token"):
        Chat(plain, max_length=512)


def test_an_answer_that_the_template_does_not_end_stops_the_run(with_template):
    forgets = with_template(ROLES + "{{ m.content }}{% if m.content != 'Yes.' %}<|eot_id|>{% endif %}" + HEADER)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: an answer has no trained end-of-turn token"):
        Chat(forgets, trained_turns="all", max_length=512).render([TWO_TURNS])


def test_a_template_that_rewrites_history_is_refused_where_all_turns_are_trained(with_template):
    last_is_marked = ROLES + "{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}<|eot_id|>" + HEADER
    forgetful = with_template(last_is_marked)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: trained_turns.*rewrites earlier turns.*set trained_turns: last"
    ):
        Chat(forgetful, trained_turns="all", max_length=512).render([TWO_TURNS])
    (r,), _ = Chat(forgetful, trained_turns="last", max_length=512).render([TWO_TURNS])
    assert forgetful.decode(r.input_ids[r.trained]) == f"!Yes.{END}"


def test_a_prompt_that_no_answer_follows_is_refused_without_advice_that_is_followed_already(with_template):
    thinks = with_template(ROLES + "{{ m.content }}<|eot_id|>" + HEADER.replace("_id|>{% e", "_id|><think>{% e"))
    for trained_turns in ("last", "all"):
        with pytest.raises(
            UserError, match="rows.jsonl:1: the chat template asks for an answer with '.*<think>'"
        ) as raised:
            Chat(thinks, trained_turns=trained_turns, max_length=512).render([TWO_TURNS])
        assert "trained_turns" not in str(raised.value)


def test_what_stands_behind_an_end_of_turn_may_be_another_thing_later(with_template):
    header = HEADER.replace("{% endif %}", "{% else %}<|end_of_text|>{% endif %}")
    closes = with_template(ROLES + "{{ m.content }}<|eot_id|>\n" + header)
    (r,), _ = Chat(closes, trained_turns="all", max_length=512).render([TWO_TURNS])
    assert closes.decode(r.input_ids[r.trained]) == f"Hello.{END}Yes.{END}"
    assert closes.decode(r.input_ids).count("<|end_of_text|>") == 1


def test_a_template_that_forgets_turns_is_not_said_to_ask_otherwise(with_template):
    short = with_template(ROLES.replace("messages", "messages[-3:]") + "{{ m.content }}<|eot_id|>" + HEADER)
    with pytest.raises(
        UserError, match="rows.jsonl:1: the chat template rewrites earlier turns once an answer follows"
    ):
        Chat(short, max_length=512).render([TWO_TURNS])


def test_a_turn_that_is_not_to_be_trained_carries_no_loss_and_looks_like_any_other(tokenizer):
    spared = example(TWO_TURNS.prompt, [{**assistant("Hello."), "train": False}, user("Size 38?"), assistant("Yes.")])
    chat = Chat(tokenizer, trained_turns="all", max_length=512)
    ((r,), _), ((whole,), _) = chat.render([spared]), chat.render([TWO_TURNS])
    assert r.input_ids.tolist() == whole.input_ids.tolist()
    assert tokenizer.decode(r.input_ids[r.trained]) == f"Yes.{END}"
    last = example([*TWO_TURNS.prompt], [*TWO_TURNS.completion[:2], {**assistant("Yes."), "train": False}])
    (r,), _ = chat.render([last])
    assert tokenizer.decode(r.input_ids[r.trained]) == f"Hello.{END}"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: it has no answer to train"):
        Chat(tokenizer, trained_turns="last", max_length=512).render([last])


def test_a_turn_that_is_not_to_be_trained_is_none_either_once_old_turns_are_dropped(tokenizer):
    turns = [
        user("long " * 100),
        {**assistant("First."), "train": False},
        user("And?"),
        {**assistant("No."), "train": False},
    ]
    prompt, completion = split_turns([*turns, user("Size 38?"), assistant("Yes.")], "all")
    (r,), counts = Chat(tokenizer, trained_turns="all", max_length=60).render([example(prompt, completion)])
    assert counts == {"old turns dropped": 1} and "No." in tokenizer.decode(r.input_ids)
    assert tokenizer.decode(r.input_ids[r.trained]) == f"Yes.{END}"


def test_a_conversation_that_the_template_refuses_is_named_with_the_reason(with_template):
    strict = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + ROLES + "{{ m.content }}<|eot_id|>" + HEADER
    )  # fmt: skip
    chat = Chat(strict, max_length=512)
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*System role not supported"):
        chat.render([example([{"role": "system", "content": "Be kind."}, user("Hi")], [assistant("Yes.")])])


def test_a_template_file_takes_the_place_of_the_tokenizers_own(base, tmp_path):
    path = tmp_path / "other.jinja"
    path.write_text(ROLES + "{{ m.content }}<|eot_id|>" + HEADER, encoding="utf-8")
    tokenizer = load(base, template_file=str(path))
    assert Chat(tokenizer, max_length=512).text([user("Hi")]) == "<|start_header_id|>user<|end_header_id|>Hi<|eot_id|>"
    with pytest.raises(UserError, match="nowhere.jinja"):
        load(base, template_file=str(tmp_path / "nowhere.jinja"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=f"model_name_or_path.*{tmp_path}"):
        load(tmp_path)


def test_padding_is_never_the_end_of_turn_where_another_token_will_do(base, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path / name)
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert tokenizer.pad_token is not None
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, Chat(tokenizer, max_length=512).end_of_turn_id)
