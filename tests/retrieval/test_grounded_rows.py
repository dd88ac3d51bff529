"""Rows for grounding: gold passages among others or left out, marks that are true, and nothing of the test in training."""

import json

import pytest

from carelm.chat.grounding import DONT_KNOW, QUESTION, marks, passages_in, says_unknown
from carelm.data.example import Example
from carelm.retrieval.grounded_rows import GOLD, LEFT_OUT, NONE, RETRIEVED, Rows, hold_out
from carelm.retrieval.passages import Passage
from carelm.retrieval.support import claims, content_words

THINGS = [f"{a} {b}" for a in ("lamp", "mat", "kettle", "towel", "clock") for b in ("Gull", "Tern", "Heather", "Quay")]
PASSAGES = [
    Passage(
        f"shop#{k}", "shop.csv", thing, None, None, thing, f"The {thing} costs {k + 10} euros and lies in aisle {k}."
    )
    for k, thing in enumerate(THINGS)
]
PASSAGES.append(Passage("terms#1", "terms.pdf", "Terms", 3, "Returns", None, "Unused goods come back within 30 days."))


def example(k, split):
    thing, turns = THINGS[k], [("user", "Hello"), ("assistant", "With pleasure.")]
    answer = f"How nice of you to ask, Ada! The {thing} costs {k + 10} euros. Unused goods come back within 30 days."
    first = [{"role": "user", "content": f"What is the price of the {thing}?"}]
    rest = [{"role": "assistant", "content": answer}] + [{"role": r, "content": t} for r, t in turns]
    return Example(first, rest, id=f"{split}-{k}", category="price", source=f"{split}.jsonl:{k + 1}")


def search(questions, number):
    """By words in common, so that the same kind of thing comes next."""
    found = []
    for question in questions:
        words = content_words(question)
        shares = [(len(words & content_words(p.indexed)) / len(words), p) for p in PASSAGES]
        found.append([(p, share) for share, p in sorted(shares, key=lambda pair: -pair[0])[:number]])
    return found


def make(fits=lambda messages, answer: True, **options):
    return Rows(PASSAGES, fits, **{"number": 4, "left_out": 0.5, "seed": 1} | options)


@pytest.fixture(scope="module")
def asked():
    rows = make()
    found = rows.ask([example(k, "train") for k in range(len(THINGS))])
    return rows.retrieve(found, search)


def test_each_sentence_of_an_answer_has_the_passage_that_supports_it(asked):
    assert [one.gold for one in asked[:2]] == [[None, "shop#0", "terms#1"], [None, "shop#1", "terms#1"]]
    assert asked[0].supporting == {"shop#0", "terms#1"}  # not those of the same kind, which say another price
    assert asked[3].question == "What is the price of the lamp Quay?" and asked[3].before == []


def test_an_answer_that_no_passage_supports_is_left_out_and_counted():
    rows = make()
    other = Example([{"role": "user", "content": "Who are you?"}],
                    [{"role": "assistant", "content": "A friendly voice from far away."}], "x", None, "x:1")  # fmt: skip
    assert [one.id for one in rows.ask([other, example(0, "a")])] == ["a-0"]
    assert rows.counts == {"answer in no passage": 1}


def test_a_sentence_is_of_the_passage_of_the_whole_answer_and_of_none_for_two_words_in_common():
    other = Passage("club#1", "club.md", "Club", None, None, None, "We find kind words in aisle 0 for each member.")
    rows = Rows([*PASSAGES, other], lambda messages, answer: True, number=4, left_out=0, seed=1)
    answer = "Thank you for your kind words! The lamp Gull costs 10 euros. You find it in aisle 0."
    one = Example(
        [{"role": "user", "content": "And the lamp?"}], [{"role": "assistant", "content": answer}], "a", None, "a:1"
    )
    assert rows.ask([one])[0].gold == [None, "shop#0", "shop#0"]


def test_where_the_data_says_which_passages_answer_a_question_no_other_one_does():
    rows, answer = make(), {"role": "assistant", "content": "A lamp costs about 10 euros."}
    one = Example([{"role": "user", "content": "What do lamps cost?"}], [answer], "a", None, "a.jsonl:1")
    assert rows.ask([one], {"a.jsonl:1": {"shop#2", "shop#9"}})[0].gold == ["shop#2"] != rows.ask([one])[0].gold
    assert rows.ask([one], {"a.jsonl:1": {"terms#1"}}) == [] and rows.counts == {"answer in no passage": 1}


def test_training_rows_mark_the_gold_passage_among_others_like_it(asked):
    rows = make(left_out=0.0).train(asked)
    assert len(rows) == len(asked)
    places, numbers = set(), set()
    for row, one in zip(rows, asked):
        turn, answer = (message["content"] for message in row["messages"])
        shown = passages_in(turn)
        assert turn.endswith(QUESTION + one.question) and set(row["gold"]) <= set(row["passages"])
        assert 2 <= len(shown) == row["num_passages"] == len(set(row["passages"])) <= 4
        price, returned = claims(answer, shown)  # not how nice it is of Ada to ask, which no passage says
        assert price.share == returned.share == 1.0
        assert (
            row["passages"][price.marks[0] - 1] == one.gold[1] and row["passages"][returned.marks[0] - 1] == "terms#1"
        )
        places.add(price.marks[0])
        numbers.add(len(shown))
        kind, name = one.question.rstrip("?").split()[-2:]
        others = [p.title for p in PASSAGES if p.id in row["passages"] and p.id not in row["gold"]]
        assert all(kind in title or name in title for title in others)  # hard ones: alike
    assert places == {1, 2, 3, 4} and numbers == {2, 3, 4}


def test_a_share_of_the_training_questions_stands_there_again_without_all_that_supports_the_answer(asked):
    rows = make(left_out=0.5).train(asked)
    without = [row for row in rows if row["condition"] == LEFT_OUT]
    assert 5 <= len(without) <= 15 and len(rows) == len(asked) + len(without)
    for row in without:
        assert row["messages"][-1]["content"] == DONT_KNOW and not row["answerable"]
        assert not set(row["passages"]) & {*row["gold"], "terms#1"} and row["num_passages"] >= 1
        (other,) = [r for r in rows if r["question_id"] == row["question_id"] and r is not row]
        assert other["answerable"] and not says_unknown(other["messages"][-1]["content"])
    assert len({row["id"] for row in rows}) == len(rows)
    assert rows == make(left_out=0.5).train(asked) != make(left_out=0.5, seed=2).train(asked)


def test_a_test_question_stands_there_with_what_is_found_with_its_passages_without_any_and_with_these_left_out(asked):
    rows = make().test(asked[:1], (RETRIEVED, GOLD, NONE, LEFT_OUT))
    assert [row["id"] for row in rows] == ["train-0/retrieved", "train-0/gold", "train-0/none", "train-0/left-out"]
    retrieved, gold, none, left_out = rows
    assert retrieved["passages"][0] == "shop#0" and gold["passages"] == ["shop#0", "terms#1"]
    assert none["messages"][0]["content"] == asked[0].question and none["passages"] == []
    assert retrieved["confidence"] > left_out["confidence"] and gold["confidence"] is None
    assert [marks(row["messages"][-1]["content"]) for row in rows] == [[1], [1, 2], [], []]  # terms#1 is not found
    assert len({row["question_id"] for row in rows}) == 1 and json.dumps(rows)


def test_passages_that_do_not_fit_go_and_the_marks_with_them(asked):
    rows = make(fits=lambda messages, answer: messages[-1]["content"].count("\n> ") <= 1)
    (row,) = rows.test(asked[:1], (RETRIEVED,))
    assert row["num_passages"] == 1 and marks(row["messages"][-1]["content"]) == [1]
    assert rows.test(asked[:1], (GOLD,)) == [] and rows.counts["gold: passages do not fit max_length"] == 1


def test_no_passage_answers_a_test_question_and_one_of_train():
    rows = make()
    splits = {s: [e for k in range(20) if (e := example(k, s))] for s in ("train", "validation", "test")}
    alone = {s: [one for one in rows.ask(of_split)] for s, of_split in splits.items()}
    for of_split in alone.values():  # without what all share
        of_split[:] = [type(one)(**vars(one) | {"gold": one.gold[:2]}) for one in of_split]
    kept, counts = hold_out(alone, 0.4, seed=3)
    golds = {s: {gold for one in of_split for gold in one.golds} for s, of_split in kept.items()}
    assert len(kept["test"]) == 8 and len(kept["train"]) == 12 and len(kept["validation"]) == 20
    assert not golds["train"] & golds["test"]
    assert counts == {"train: its passage is on the other side": 8, "test: its passage is on the other side": 12}
    assert hold_out(alone, 0.4, seed=4)[0]["test"] != kept["test"]
