"""Rows with two answers: what is preferred, what is rejected, and what of them is no pair."""

import csv
import json

import numpy as np
import pytest
from small_rows import chat, error_of, prepare, write_jsonl, write_parquet

from carelm.chat.chat import make_chat
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.training.preview import preview

TEMPLATES = {
    "objective": "preferences",
    "prompt_template": "{prompt}",
    "completion_template": "{chosen}",
    "rejected_template": "{rejected}",
}
COLUMNS = {"objective": "preferences", "messages_column": "chosen", "rejected_column": "rejected"}
WITH_PROMPT = COLUMNS | {"prompt_column": "prompt"}


def rows(number, start=0):
    return [{"prompt": f"Where is order {i}?", "chosen": f"Order {i} is on its way. Look at your mails.",
             "rejected": f"No idea, {i}."} for i in range(start, start + number)]  # fmt: skip


def asked(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def pairs_of(recipe):
    return [(e.prompt, e.completion, e.rejected) for e in make_examples(recipe)[0]["train"]]


def shapes():
    """One pair as TRL's datasets have it: texts, messages, messages with the prompt in both answers."""
    q, good, bad = asked("Where is it?"), said("On its way."), said("No idea.")
    text = {"prompt": q["content"], "chosen": good["content"], "rejected": bad["content"]}
    yield "templates", text, TEMPLATES
    yield "texts", text, WITH_PROMPT
    yield "messages", {"prompt": [q], "chosen": [good], "rejected": [bad]}, WITH_PROMPT
    yield "messages-and-texts", {"prompt": [q], "chosen": good["content"], "rejected": bad["content"]}, WITH_PROMPT
    yield "implicit", {"chosen": [q, good], "rejected": [q, bad]}, COLUMNS
    yield "both", {"prompt": q["content"], "chosen": [q, good], "rejected": [q, bad]}, WITH_PROMPT


@pytest.mark.parametrize(("row", "keys"), [s[1:] for s in shapes()], ids=[s[0] for s in shapes()])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_shape_of_a_pair_is_the_same_pair(tmp_path, make, row, keys, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
            csv.writer(file).writerows([list(row), cells])
    else:
        {"jsonl": write_jsonl, "parquet": write_parquet}[suffix](path, [row])
    assert pairs_of(make(path, **keys)) == [([asked("Where is it?")], [said("On its way.")], [said("No idea.")])]


def test_a_pair_at_the_end_of_a_longer_conversation_has_all_of_it_as_its_prompt(tmp_path, make):
    before = [{"role": "system", "content": "Be brief."}, asked("Hi"), said("Hello."), asked("Where is it?")]
    row = {"prompt": before, "chosen": "On its way.", "rejected": "No idea."}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert pairs_of(make(path, **WITH_PROMPT)) == [(before, [said("On its way.")], [said("No idea.")])]


@pytest.mark.parametrize("in_prompt", [True, False])
def test_a_prompt_that_the_answers_repeat_is_there_once_though_one_of_them_lacks_the_system_message(
    tmp_path, make, in_prompt
):
    system, q = {"role": "system", "content": "Be brief."}, asked("Where is it?")
    prompt, before = ([system, q], [asked("Where is it? ")]) if in_prompt else ("Where is it?", [system, q])
    row = {"prompt": prompt, "chosen": [*before, said("On its way.")], "rejected": [*before, said("No idea.")]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert pairs_of(make(path, **WITH_PROMPT)) == [([system, q], [said("On its way.")], [said("No idea.")])]


def test_a_prompt_in_a_column_of_its_own_is_read_for_answers_alone_too(tmp_path, make):
    rows = [{"prompt": [asked("Hi"), said("Hello."), asked("Where?")], "completion": [said("Here.")]},
            {"prompt": "When?", "completion": "Now."}]  # fmt: skip
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), prompt_column="prompt", messages_column="completion")
    assert pairs_of(recipe) == [(rows[0]["prompt"], [said("Here.")], None), ([asked("When?")], [said("Now.")], None)]


def test_rows_that_are_no_pair_are_counted_and_named(tmp_path, make):
    odd = [
        {"prompt": "A?", "chosen": "Same.", "rejected": " Same. "},
        {"prompt": "B?", "chosen": "Yes.", "rejected": ""},
        {"prompt": "C?", "chosen": "", "rejected": "No."},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows(40) + odd)
    report = make_examples(make(path, **TEMPLATES))[1]["train"]
    assert report.dropped == {"both answers the same": 1, "empty rejected answer": 1, "empty answer": 1}
    assert report.first_dropped["both answers the same"] == "rows.jsonl:41"
    report = make_examples(make(path, **WITH_PROMPT))[1]["train"]
    assert report.dropped["both answers the same"] == 1 and sum(report.dropped.values()) == 3


def test_answers_to_two_prompts_are_no_pair(tmp_path, make):
    good = [{"chosen": [asked(f"{i}?"), said("Yes.")], "rejected": [asked(f"{i}?"), said("No.")]} for i in range(20)]
    other = {"chosen": [asked("A?"), said("Yes.")], "rejected": [asked("B?"), said("No.")]}
    report = make_examples(make(write_jsonl(tmp_path / "rows.jsonl", [*good, other]), **COLUMNS))[1]["train"]
    assert report.dropped == {"the two answers have different prompts": 1}


def test_pairs_that_are_all_the_same_twice_are_an_error(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"rejected": row["chosen"]} for row in rows(12)])
    assert error_of(make(path, **TEMPLATES)) == (
        "rejected_template: in all 12 rows of the train split the two answers are the same (first: rows.jsonl:1); name the "
        "column with the worse one"
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (TEMPLATES | {"rejected_template": "{worse}"}, "rejected_template: rows.jsonl has no column 'worse' (there:"),
        (WITH_PROMPT | {"rejected_column": "worse"}, "rejected_column: rows.jsonl has no column 'worse' (there:"),
    ],
)
def test_a_rejected_column_that_is_not_there_is_named(tmp_path, make, keys, said):
    assert error_of(make(write_jsonl(tmp_path / "rows.jsonl", rows(12)), **keys)).startswith(said)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rejected_template": None}, "objective: preferences needs rejected_template"),
        ({"objective": "answers"}, "rejected_template: it is for objective: preferences"),
        ({"method": "prompt_tuning"}, "objective: preferences does not train by method: prompt_tuning"),
        ({"trained_turns": "all"}, "trained_turns: all is for objective: answers"),
        ({"too_long": "cut"}, "too_long: cut is for objective: answers"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: it is for objective: answers"),
        ({"also_train": {"recipes/demo.yaml": 5}}, "also_train: it is for objective: answers"),
        ({"rejected_column": "rejected"}, "prompt_template and rejected_column: set only one of them"),
        (
            dict.fromkeys(("prompt_template", "completion_template", "rejected_template")) | {"rejected_column": "no"},
            "rejected_column: set messages_column too",
        ),
        ({"prompt_template": None, "completion_template": None}, "rejected_template: set prompt_template"),
        ({"beta": 0}, "beta: 0 is not above 0"),
        ({"answer_weight": -1}, "answer_weight: -1 is below 0"),
    ],
)
def test_what_does_not_go_with_preferences_is_refused(tmp_path, make, keys, said):
    with pytest.raises(UserError) as caught:
        make(tmp_path, **TEMPLATES | keys)
    assert str(caught.value).startswith(said)


def test_preferences_have_a_learning_rate_of_their_own(tmp_path, make):
    assert make(tmp_path, **TEMPLATES).training["learning_rate"] == 2e-5
    assert make(tmp_path, **TEMPLATES, method="full").training["learning_rate"] == 5e-6
    assert make(tmp_path, **TEMPLATES, learning_rate=1e-4).training["learning_rate"] == 1e-4
    assert make(tmp_path).training["learning_rate"] == 2e-4


def test_test_rows_need_no_rejected_answer(tmp_path, make):
    write_jsonl(tmp_path / "data/train.jsonl", rows(8))
    held_out = [{k: v for k, v in row.items() if k != "rejected"} for row in rows(4, start=8)]
    write_jsonl(tmp_path / "data/test.jsonl", held_out)
    examples, _ = make_examples(make(tmp_path / "data", **TEMPLATES))
    assert [e.completion[0]["content"] for e in examples["test"]] == [row["chosen"] for row in held_out]
    assert {e.rejected for e in examples["test"]} == {None}


def test_what_is_masked_is_masked_in_both_answers(tmp_path, make):
    row = {"prompt": "Whom?", "chosen": "Write to a@shop.example.", "rejected": "Try b@shop.example, b@shop.example."}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    examples, reports = make_examples(make(path, **WITH_PROMPT, mask_personal_data=True))
    assert examples["train"][0].rejected == [said("Try [EMAIL], [EMAIL].")]
    assert reports["train"].personal_data["found"]["EMAIL"]["number"] == 3


def test_roles_that_nobody_knows_are_named_in_both_answers(tmp_path, make):
    row = {"chosen": chat(("user", "Hi"), ("assistant", "Hello.")), "rejected": [asked("Hi"), said("No.")]}
    row["rejected"][1]["role"] = "robot 7"
    assert "'robot 7' (1): add assistant_roles" in error_of(
        make(write_jsonl(tmp_path / "rows.jsonl", [row]), **COLUMNS)
    )


def test_a_pair_is_one_prepared_example_with_one_prompt_and_two_answers(tmp_path, make, tokenizer):
    prepared = prepare(make(write_jsonl(tmp_path / "rows.jsonl", rows(6)), **TEMPLATES))
    assert len(prepared.train) == 6
    for i, row in enumerate(rows(6)):
        better, worse = prepared.train.pair(i)
        prompts = [ids[: int(np.flatnonzero(trained)[0])] for ids, trained in (better, worse)]
        assert np.array_equal(*prompts)
        texts = [tokenizer.decode(ids[trained][:-1]) for ids, trained in (better, worse)]
        assert texts == [row["chosen"], row["rejected"]]
        assert len(better[0]) + len(worse[0]) == prepared.train.lengths[i]
    assert prepared.report["train"]["trained_tokens"] == prepared.train.trained_counts.sum()


def test_old_turns_go_for_both_answers_and_a_pair_that_never_fits_is_dropped(tmp_path, make):
    prompt = [asked("First question? " * 8), said("First answer. " * 8), asked("Second?")]
    long = {"prompt": prompt, "chosen": "Short.", "rejected": "A longer one. " * 10}  # the worse one alone is too long
    never = {"prompt": "Hm?", "chosen": "Yes.", "rejected": "No. " * 200}
    path = write_jsonl(tmp_path / "rows.jsonl", [long, never])
    prepared = prepare(make(path, **WITH_PROMPT, max_length=100))
    assert prepared.report["train"]["fitted"] == {"old turns dropped": 1}
    assert prepared.report["train"]["dropped"] == {"too long": 1}
    better, worse = prepared.train.pair(0)
    start = int(np.flatnonzero(better[1])[0])
    assert len(worse[0]) <= 100 and np.array_equal(better[0][:start], worse[0][:start]) and not worse[1][:start].any()


def test_a_preview_shows_both_answers(tmp_path, make):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows(6)), **TEMPLATES)
    shown = preview(recipe, make_chat(recipe), 1)
    assert (
        "--- rows.jsonl:1, preferred: " in shown and "--- rows.jsonl:1, rejected: " in shown and "No idea, 0." in shown
    )
