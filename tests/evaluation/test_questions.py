"""A test row is asked with its tools and as a trained row is; one that a model's template cannot ask is one line."""

import json

import pytest

from carelm.chat.chat import make_chat
from carelm.errors import UserError
from carelm.evaluation import answers, candidates
from carelm.evaluation.questions import make_questions
from carelm.recipe_file import load_recipe

TURNS = "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
ANSWER = {"role": "assistant", "content": "Yes."}
TOOLS = [{"type": "function", "function": {"name": "find_order", "description": "Finds it.", "parameters": {}}}]


@pytest.fixture
def ask(tmp_path):
    """The questions of a few rows, and the base as it would answer them with this template."""

    def ask(template, *messages, **more):
        for split in ("train", "test"):
            rows = [
                {"messages": [*messages, {"role": "user", "content": f"{split} {i}?"}, ANSWER]} for i in range(2)
            ]  # fmt: skip
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
        (tmp_path / "own.jinja").write_text(template)
        (tmp_path / "recipe.yaml").write_text(
            f"{{model_name_or_path: demo/base, dataset_name: {tmp_path}, messages_column: messages, models: [base], "
            f"chat_template_path: {tmp_path}/own.jinja, max_length: 256, max_new_tokens: 8}}"
        )
        recipe = load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage="")
        questions, _ = make_questions(recipe, make_chat(recipe))
        (base,) = candidates.find_candidates(recipe)
        return questions, answers.prepare(recipe, base, questions, tmp_path)

    return ask


def test_a_row_that_the_template_refuses_is_named_with_the_model_and_the_reason(ask):
    raises = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(
        UserError, match=r"^models: base, test row test\.jsonl:1: the chat template refuses .*no system role"
    ):
        ask(raises + TURNS, {"role": "system", "content": "Be kind."})


def test_a_row_whose_system_text_the_template_drops_is_not_asked_without_it(ask):
    drops = "{% for m in messages if m.role != 'system' %}" + TURNS
    with pytest.raises(UserError, match=r"^models: base, test row test\.jsonl:1: .*does not write .* role system"):
        ask(drops, {"role": "system", "content": "Be kind."})


def test_the_tools_of_a_row_stand_in_the_prompt_that_asks_for_its_answer(ask):
    questions, asked = ask("{{ tools[0].function.name if tools }}{% for m in messages %}" + TURNS, tools=TOOLS)
    assert questions[0].tools == TOOLS
    assert asked.chat.tokenizer.decode(asked.prompts[0]).startswith("find_order<|start_header_id|>user")


def test_only_turns_that_carry_loss_are_asked_and_references_are_those_of_the_last(tmp_path, make):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "find_order", "arguments": {}}], "weight": 0}
    turns = [{"role": "user", "content": "One?"}, ANSWER, {"role": "user", "content": "Two?"}, call]
    turns += [{"role": "tool", "content": "Sent."}, {"role": "assistant", "content": "It is sent."}]
    for split in ("train", "test"):
        row = {"messages": [{"role": "system", "content": split}, *turns], "a": "Sent.", "b": "It was sent."}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    recipe = make(tmp_path, messages_column="messages", trained_turns="all", reference_columns=["a", "b"])
    questions, _ = make_questions(recipe, make_chat(recipe))
    asked = [(q.id, q.messages[-1]["content"], q.references) for q in questions]
    assert asked == [
        ("test.jsonl:1/1", "One?", ["Yes."]),
        ("test.jsonl:1/3", "Sent.", ["Sent.", "It was sent."]),
    ]


def test_what_limits_the_number_of_test_questions_is_known(tmp_path):
    """Rows of a file of its own, a share of the training rows, or `max_eval_samples`."""
    rows = "".join(
        json.dumps({"q": f"Where is lamp {i}, which I ordered {i} days ago?", "a": "On its way."}) + "\n"
        for i in range(40)
    )
    (tmp_path / "train.jsonl").write_text(rows)
    keys = f"model_name_or_path: demo/base\ndataset_name: {tmp_path}\nprompt_template: '{{q}}'\ncompletion_template: '{{a}}'\n"
    (tmp_path / "recipe.yaml").write_text(keys)

    def more(*others):
        recipe = load_recipe(["--config", str(tmp_path / "recipe.yaml"), *others], usage="")
        return make_questions(recipe, make_chat(recipe))[1]["more_questions"]

    assert more("--test_fraction", "0.25") == (
        "add rows, or set test_fraction higher than 0.25, and train again in a new output_dir"
    )
    (tmp_path / "test.jsonl").write_text(rows.replace("lamp", "mug"))
    assert more() == "add rows to the test split"
    assert more("--max_eval_samples", "15") == (
        "set max_eval_samples higher than 15 (25 more rows are there; for more, add some)"
    )
