"""Labels that do not fit the data are said before training."""

import csv
import json

import pytest
from small_rows import prepare

from carelm.chat.chat import make_chat
from carelm.data.report import format_report
from carelm.errors import UserError
from carelm.evaluation.questions import make_questions

TAGS = ["refund", "delivery", "not urgent", "urgent"]


@pytest.fixture
def tickets(tmp_path, make):
    """A recipe over rows whose answers end in these labels, one after the other."""

    def tickets(*answers, number=60, **keys):
        with open(tmp_path / "tickets.csv", "w", newline="") as file:
            rows = [[f"Ticket {i}: where is parcel {i * 37}?", answers[i % len(answers)]] for i in range(number)]
            csv.writer(file).writerows([["question", "answer"], *rows])
        return make(tmp_path / "tickets.csv", **{"labels": TAGS, "test_fraction": 0.3} | keys)

    return tickets


def notes(recipe) -> list[str]:
    return [line.removeprefix("labels").strip() for line in format_report(prepare(recipe).report).splitlines()
            if line.startswith("labels")]  # fmt: skip


def test_labels_that_fit_are_not_spoken_of(tickets):
    assert notes(tickets(*TAGS)) == []
    assert notes(tickets("Refund.", "**delivery**", "NOT URGENT", "urgent")) == [
        "labels are read from free answers and not scored by their probability: the answer of tickets.csv:5 does not end in a "
        "label as the list has it ('refund')"
    ]


def test_labels_of_the_data_that_are_not_listed_and_listed_ones_that_never_occur_are_named(tickets):
    unlisted, never, form = notes(tickets(*["refund"] * 9, "very urgent", *["delivery"] * 9, "urgent"))
    assert (
        unlisted == "in the answers and not in labels: 'very urgent' (3, first: tickets.csv:10)"
    )  # read as urgent otherwise
    assert never == "in labels and in no answer: not urgent"
    assert form.startswith("labels are read from free answers")


def test_answers_without_a_label_are_a_caution_with_the_first_of_them_and_are_not_asked(tickets):
    recipe = tickets(*["refund", "delivery", "urgent", "not urgent"] * 4, "I do not know")
    unlisted, without = notes(recipe)
    assert "'I do not know' (3, first: tickets.csv:17)" in unlisted
    assert without == (
        "3 of 60 answers hold no label (first: tickets.csv:17 'I do not know'): trained on, and left out of the evaluation"
    )


def test_a_test_question_without_a_label_is_left_out_of_the_evaluation_which_is_said(tickets):
    recipe = tickets("refund", "delivery", "it depends", max_empty_share=0.4)
    asked, about = make_questions(recipe, make_chat(recipe))
    left_out = about["dropped"]["answer without a label"]
    assert left_out and len(asked) == about["questions"] == about["conversations"]
    assert {q.references[0] for q in asked} == {"refund", "delivery"}
    (sentence,) = about["without_label"]
    assert sentence.startswith(f"{left_out} of {left_out + len(asked)} test questions are not asked: ")
    assert "'it depends'" in sentence


def test_labels_that_most_answers_lack_are_one_line_before_anything_is_trained(tickets):
    with pytest.raises(UserError) as caught:
        prepare(tickets("refund", "refund", "money back"))
    assert str(caught.value) == (
        "labels: 20 of 60 expected answers hold none of refund, delivery, not urgent, urgent (first: tickets.csv:3 'money "
        "back'); such answers end in 'money back' (20, first: tickets.csv:3); list the labels as the data writes them, take "
        "these rows out with row_filter, or raise max_empty_share"
    )
    with pytest.raises(
        UserError, match=r"hold none of yes, no \(first: .* end in 'Y' \(30, first: .*'N' \(30, first: "
    ):
        prepare(tickets("Y", "N", labels=["yes", "no"]))


def test_a_test_file_that_writes_its_labels_otherwise_is_refused_however_many_rows_train_has(tmp_path, make):
    for split, answers, number in (("train", TAGS, 200), ("test", ["T1", "T2"], 8)):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            rows = [[f"{split} {i * 37}?", answers[i % len(answers)]] for i in range(number)]
            csv.writer(file).writerows([["question", "answer"], *rows])
    with pytest.raises(UserError, match=r"^labels: 8 of 8 expected answers hold none of .*\(first: test.csv:1 'T1'\)"):
        prepare(make(tmp_path, labels=TAGS))


def test_the_one_odd_row_of_a_small_split_stops_nothing_but_where_no_test_question_is_left(tmp_path, make):
    for split, answers in (("train", TAGS * 10), ("validation", ["no idea"]), ("test", ["no idea", "urgent"])):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            rows = [[f"{split} {i * 37}?", answer] for i, answer in enumerate(answers)]
            csv.writer(file).writerows([["question", "answer"], *rows])
    recipe = make(tmp_path, labels=TAGS)
    assert notes(recipe)[-1].startswith("2 of 43 answers hold no label (first: validation.csv:1 'no idea')")
    asked, _ = make_questions(recipe, make_chat(recipe))
    assert [q.references for q in asked] == [["urgent"]]
    (tmp_path / "test.csv").write_text("question,answer\nWhat?,no idea\n")
    with pytest.raises(UserError, match="^labels: 1 of 1 expected answers hold none of "):
        prepare(recipe)
    with pytest.raises(UserError, match="^labels: 1 of 1 references hold none of "):
        make_questions(recipe, make_chat(recipe))


def test_conversations_that_come_to_a_label_at_their_end_are_told_to_train_that_answer_alone(tmp_path, make):
    turns = ["user", "assistant", "user", "assistant"]
    texts = [[f"Hello, {i}", "How can I help?", f"Where is parcel {i * 37}?", TAGS[i % 4]] for i in range(40)]
    rows = [{"messages": [{"role": r, "content": t} for r, t in zip(turns, of_row)]} for of_row in texts]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {"labels": TAGS, "test_fraction": 0.3, "messages_column": "messages", "prompt_template": None,
            "completion_template": None}  # fmt: skip
    with pytest.raises(
        UserError, match=r"\(first: .*'How can I help\?'\); the last answers .* do: set trained_turns: last$"
    ):
        prepare(make(tmp_path / "chats.jsonl", **keys, trained_turns="all"))
    assert notes(make(tmp_path / "chats.jsonl", **keys, trained_turns="last")) == []


def test_the_text_around_a_label_is_no_part_of_it(tickets):
    recipe = tickets(*TAGS, "fraud", completion_template="Label: {answer}.", max_empty_share=0.4)
    assert notes(recipe)[0].startswith("in the answers and not in labels: 'fraud' (12, first: tickets.csv:")


def test_a_label_in_another_form_is_not_called_unlisted(tickets):
    assert notes(tickets("GROSS", "ACİL", labels=["groß", "acil"]))[0].startswith("labels are read from free answers")


def test_free_sentences_are_not_taken_for_labels(tickets):
    (line,) = notes(tickets("Yes, we can.", "No, that is too late.", "Yes, on Monday.", labels=["yes", "no"]))
    assert line.startswith("labels are read from free answers")


def test_other_labels_are_counted_anew_though_the_rows_are_prepared(tickets):
    assert notes(tickets("refund", "delivery", labels=["refund", "delivery"])) == []
    assert notes(tickets("refund", "delivery", labels=["refund", "delivery", "fraud"])) == [
        "in labels and in no answer: fraud"
    ]


def test_that_a_constrained_score_cannot_be_had_is_said_before_training(tickets):
    with pytest.raises(
        UserError, match="primary_metric: constrained_accuracy cannot be had: the answer of tickets.csv:"
    ):
        prepare(tickets("Refund!", "delivery", labels=["refund", "delivery"], primary_metric="constrained_accuracy"))
