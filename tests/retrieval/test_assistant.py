"""What is looked up for a conversation, and which marks of an answer are shown."""

import random

import pytest

from carelm.chat.grounding import without_false_marks
from carelm.recipe_file import load_recipe
from carelm.retrieval.assistant import Assistant, TrueMarks, query_of

ANSWERS = (
    "Within 30 days [1]. Unused [7] goods [2, 9] only [1;2].", "An array[0] or [x], [12", "Order [2024] and [ 1 ]  [9]",
    "[9]", "a [", "[1][9] [2]\n\n[9]\nb", "", "[" * 60, "many   [9]   blanks", "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]",
)  # fmt: skip


def test_false_marks_are_dropped_however_an_answer_is_cut_into_pieces():
    draw = random.Random(7)
    for answer in ANSWERS:
        for _ in range(60):
            marks, shown, rest = TrueMarks(2), [], answer
            while rest:
                at = draw.randint(1, 5)
                shown.append(marks.add(rest[:at]))
                rest = rest[at:]
                assert "[9" not in "".join(shown)
            shown.append(marks.end())
            assert "".join(shown) == marks.text == without_false_marks(answer, 2)


def test_text_before_a_mark_is_not_kept_waiting():
    marks = TrueMarks(1)
    assert [marks.add(p) for p in ("Within", " 30 days", " [", "1", "]", ".")] == [
        "Within",
        " 30 days",
        "",
        "",
        " [1]",
        ".",
    ]


def test_a_short_question_is_looked_up_with_the_one_before_it():
    turns = [("user", "Does the kettle have a warranty?"), ("assistant", "Two years."), ("user", "And if I lost it?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert query_of(messages) == "Does the kettle have a warranty?\nAnd if I lost it?"
    long = {"role": "user", "content": "kettle " * 20_000}
    assert query_of([long, messages[-1]]) == "kettle " * 99 + "kettle\nAnd if I lost it?"
    whole = {"role": "user", "content": "How long does the delivery of a large shelf to an island take?"}
    assert query_of([*messages, whole]) == whole["content"] and query_of(messages[:1]) == turns[0][1]


def test_below_the_threshold_a_customer_is_compared_with_the_question_field_by_field(tmp_path):
    pytest.importorskip("lancedb")
    from small_index import SENTENCES, build_small, make_embedder

    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.txt").write_text("\n".join(SENTENCES))
    build_small(tmp_path / "index/passages", tmp_path / "documents", make_embedder(tmp_path / "embedder"))
    keys = ["--index", str(tmp_path / "index"), "--documents", "documents", "--answer_threshold", "0.8"]
    assistant = Assistant(load_recipe([*keys, "--embedder", str(tmp_path / "embedder")], usage=""))

    def consult(question, customer):
        return assistant.consult([{"role": "user", "content": question}], {}, customer)

    found, is_known = consult(SENTENCES[1], {"name": "Ada"})
    assert is_known and found[0].passage.text == SENTENCES[1]
    refunds = "Was the kettle paid to a card?"
    assert consult(refunds, {}) == consult(refunds, {"name": "Ada"}) == ([], False)
    orders = {"name": "Ada", "member": "eight hours battery", "orders": ["kettle paid to card", {"was": "the a"}]}
    assert consult(refunds, orders) == ([], True)
