"""The model card's notes and questions: asked as in training, answered by the saved model, shown letter by letter."""

import html
import json
import re

import pytest
from launching import script
from markdown_it import MarkdownIt

from carelm.chat.chat import make_chat
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation.candidates import find
from carelm.files import read_json
from carelm.models.base import load_config
from carelm.models.generation import Decoding, generate
from carelm.recipe_file import load_recipe
from carelm.training import card, hub, runs

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ODD_ANSWERS = [
    "# A heading\n## Another\n\nText\n===\nmore\n---",
    "| drug | dose |\n|---|---|\n| a | 1 |",
    "```python\nprint(1)\n```\nand ~~~\nopen",
    "1. one\n2) two\n- three\n+ four\n* five\n    indented\n\ttab",
    "<script>alert(1)</script> <b>bold</b> &lt; &amp; <!-- gone",
    "[link](http://x.example) ![i](y.png) <http://z.example> `code` *a* _b_ **c** ~~d~~ \\*e\\*",
    "[ref]: http://x.example\n\n[^1]: note",
    "> quoted\n>> twice",
    "Größe 価格 😀 $x^2$ trailing\\",
    "",
    "\r\nlines\r\nof Windows\u2028and more\x0cpages",
]


def of_two_columns(make, tmp_path, **keys):
    rows = [{"q": f"Where is parcel {i}?", "intent": "track", "a": "On its way."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompt_template": "Query: {q}\nIntent: {intent}", "completion_template": "{a}"} | keys
    return make(tmp_path / "rows.jsonl", model_name_or_path="demo/base", **keys)


def prompts_of(recipe):
    return card.make_prompts(recipe, make_chat(recipe), load_config(recipe))


@pytest.mark.parametrize("text", ODD_ANSWERS)
def test_an_answer_is_shown_letter_by_letter_whatever_markdown_it_holds(text):
    page = READER.render(f"**Answer**\n\n{card.quote(text)}\n\n## Recipe\n")
    assert {*re.findall(r"<(\w+)", page)} <= {"p", "strong", "blockquote", "br", "h2"} and page.count("<h2>") == 1
    quoted = "".join(re.findall(r"(?s)<blockquote>(.*)</blockquote>", page))
    shown = html.unescape(re.sub(r"<[^>]+>", "", quoted)).replace("\xa0", " ")
    lines = [line.expandtabs(4).rstrip() for line in text.splitlines() if line.strip()]
    assert [line for line in shown.split("\n") if line.strip()] == lines


def test_a_text_with_backticks_does_not_end_its_block_of_code():
    text = "note: |\n  ```\n  ````\n  code\n"
    assert MarkdownIt("commonmark").parse(card.fence(text, "yaml"))[0].content == text


def test_a_question_has_the_ids_that_training_renders(make, tmp_path):
    asked = json.dumps({"q": "Where is parcel 2?", "intent": "track"})
    recipe = of_two_columns(make, tmp_path, system_prompt="You help {{us}}.", card_questions=[asked])
    chat = make_chat(recipe)
    example = make_examples(recipe)[0]["train"][2]
    (rendered,), _ = chat.render([example])
    (ids,) = prompts_of(recipe)
    assert ids == rendered.input_ids[: len(ids)].tolist() and rendered.trained[len(ids)]
    assert "You help {us}." in chat.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"card_questions": ["Where?"]}, "question 1: prompt_template has several columns: give the message as JSON"),
        ({"card_questions": ['{"q": " ", "intent": "a"}']}, "question 1: q is empty"),
        ({"card_questions": ['{"q": "Where?", "intent": "a"}'], "system_prompt": "{a}"}, "made of the column 'a'"),
        (
            {"card_questions": ["a " * 400], "prompt_template": "{q}"},
            "question 1 takes 4.. tokens, and max_length .* 64;",
        ),
        ({"card_questions": ["Hm?"], "prompt_template": "{q}", "max_new_tokens": 10**6}, "leaves 0; shorten"),
        ({"card_questions": ["\ud800"], "prompt_template": "{q}"}, "question 1: the message is no UTF-8 text"),
        ({"card_questions": ["a", " "], "prompt_template": "{q}"}, "question 2 is empty; remove it"),
        ({"card_questions": ["a", "b", "a"], "prompt_template": "{q}"}, "question 3 stands there twice"),
        ({"card_questions": [{"My chest": "it hurts"}]}, "{'My chest': 'it hurts'} is no text; one with a colon"),
        ({"card_questions": ["a", None]}, "one of its words is null"),
        ({"card_notes": ["a", "b"]}, "card_notes: .* is not of type str"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_a_question_that_cannot_be_asked_is_one_line_before_any_weights(make, tmp_path, keys, line):
    with pytest.raises(UserError, match=line) as caught:
        prompts_of(of_two_columns(make, tmp_path, **{"max_length": 64} | keys))
    assert "\n" not in str(caught.value) and "card_" in str(caught.value)


def test_tags_of_a_question_are_made_of_its_words(make, tmp_path):
    keys = {"tag_column": "q", "urgent_words": ["fire"], "system_prompt": "It is {priority}.", "prompt_template": "{q}"}
    recipe = of_two_columns(make, tmp_path, card_questions=["Fire!", "Hello?"], **keys)
    texts = [make_chat(recipe).tokenizer.decode(ids) for ids in prompts_of(recipe)]
    assert "It is HIGH." in texts[0] and "It is NORMAL." in texts[1]
    answers = [{"question": "Fire!", "answer": "Run.", "new_tokens": 2, "finish_reason": "stop"}]
    assert "> It is {priority}." in card.describe(recipe, answers)


# A finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose second step makes it worse, so that the first one's weights are kept; its recipe's words, its output."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "card.yaml").write_text(
        "card_notes: |\n  For research only.\ncard_questions: ['Where is my parcel?', '# Hi?']\nmax_new_tokens: 6\n"
    )
    keys = ["--config", "recipes/demo.yaml", "--config", str(folder / "card.yaml"), "--output_dir", str(folder / "run"),
            "--max_samples", "16", "--max_eval_samples", "4", "--global_batch_size", "4", "--max_steps", "2",
            "--eval_strategy", "steps", "--eval_steps", "1", "--early_stopping_patience", "5", "--learning_rate", "0.5",
            "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--num_sample_answers", "0"]  # fmt: skip
    script(*keys, check=True)
    return keys


def test_the_answers_are_those_of_the_model_that_was_saved_and_stand_in_card_and_metrics(finished):
    recipe = load_recipe(finished, usage="")
    metrics, page = read_json(recipe.output_dir / "train_metrics.json"), (recipe.output_dir / "README.md").read_text()
    chat = make_chat(recipe)
    model, _ = find(recipe, "adapter").load(chat)
    device = next(model.parameters()).device
    said = generate(model, chat, prompts_of(recipe), Decoding(6), device=device)
    assert [a["question"] for a in metrics["card_answers"]] == ["Where is my parcel?", "# Hi?"]
    assert [(a["answer"], a["new_tokens"]) for a in metrics["card_answers"]] == [(a.text, a.new_tokens) for a in said]
    for a in metrics["card_answers"]:
        assert card.quote(a["answer"]) in page
    assert page.index("For research only.") < page.index("A chat assistant") < page.index("## What it answers")
    assert (
        "> \\# Hi?" in page and page.count("(cut at 6 tokens)") == [a.finish_reason for a in said].count("length") > 0
    )
    assert read_json(recipe.output_dir / "checkpoint-2/trainer_state.json")["best_global_step"] == 1


def test_a_finished_run_keeps_its_answers_and_takes_new_notes(finished, capsys, monkeypatch):
    recipe = load_recipe(finished, usage="")
    before = runs.find_finished(recipe)
    assert runs.publish(recipe, before) == before
    page = recipe.output_dir / "README.md"
    other = load_recipe([*finished, "--card_notes", "Not a medical device."], usage="")
    pushed = []
    monkeypatch.setattr(hub, "push", lambda recipe: pushed.append(page.read_text()) or "shop/care")
    other.training["push_to_hub"] = True
    after = runs.publish(other, runs.find_finished(other))
    assert after["card_answers"] == before["card_answers"] and "has the new card_notes" in capsys.readouterr().err
    assert "Not a medical device." in pushed[0] and "For research only." not in pushed[0]
    for a in before["card_answers"]:
        assert card.quote(a["answer"]) in pushed[0]
    assert runs.publish(other, runs.find_finished(other)) == after and len(pushed) == 1


def test_other_questions_are_answered_from_the_newest_checkpoint_and_none_stay_as_they_are(finished):
    other = load_recipe([*finished, "--card_questions", "Hello?"], usage="")
    assert runs.find_finished(other) is None
    none = load_recipe([*finished[:2], *finished[4:]], usage="")
    assert runs.find_finished(none)["card_answers"]
    kept = [folder.rename(folder.with_name(f"kept-{folder.name}")) for folder in other.output_dir.glob("checkpoint-*")]
    with pytest.raises(UserError, match="and no checkpoint to answer other card_questions from; begin anew"):
        runs.find_finished(other)
    for folder in kept:
        folder.rename(folder.with_name(folder.name.removeprefix("kept-")))
