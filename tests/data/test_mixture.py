"""Rows of other recipes beside a recipe's own: mapped by their own recipe, drawn once, and none that is tested on here."""

import json

import pytest
import yaml
from small_rows import pairs, prepare, write_jsonl

from carelm.chat.chat import make_chat
from carelm.data.mixture import draw_mixed
from carelm.data.sources import changed_files, hash_files
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.recipe_file import check_identity, save_recipe
from carelm.training.preview import preview


@pytest.fixture
def shop(tmp_path, make):
    """A recipe with validation and test of its own, and one to mix in whose columns are called otherwise."""
    for split, number, start in (("train", 30, 0), ("validation", 4, 100), ("test", 4, 200)):
        write_jsonl(tmp_path / f"own/{split}.jsonl", pairs(number, start))
    asked = [{"ask": f"What does item {i} cost today?", "say": f"Item {i} is {i} euros."} for i in range(20)]
    write_jsonl(tmp_path / "prices/train.jsonl", asked)

    def shop(rows=5, of_own=None, **of_other):
        other = {"dataset_name": str(tmp_path / "prices"), "prompt_template": "{ask}", "completion_template": "{say}",
                 "validation_fraction": 0, "test_fraction": 0}  # fmt: skip
        (tmp_path / "prices.yaml").write_text(yaml.safe_dump(other | of_other))
        return make(tmp_path / "own", **{"also_train": {str(tmp_path / "prices.yaml"): rows}} | (of_own or {}))

    return shop


def mixed_of(recipe):
    ((rows, report),) = draw_mixed(recipe, make_examples(recipe)[0]).values()
    return [e.completion[0]["content"] for e in rows], report


def test_so_many_rows_are_drawn_by_split_seed_and_mapped_by_their_own_recipe(shop):
    rows, report = mixed_of(shop())
    assert len(rows) == 5 and all(row.endswith("euros.") for row in rows)
    assert report.dropped == {"not drawn": 15}
    assert mixed_of(shop())[0] == rows
    assert mixed_of(shop(of_own={"split_seed": 1}))[0] != rows
    assert len(mixed_of(shop("all"))[0]) == 20 and sorted(mixed_of(shop("3 times"))[0]) == sorted(
        3 * mixed_of(shop("all"))[0]
    )


def test_a_recipe_is_mixed_in_with_other_data_than_its_own_and_both_may_be(shop, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", [{"ask": "What is new?", "say": "A bell for 9 euros."}])
    recipe, prices = shop(), str(tmp_path / "prices.yaml")
    more = f"{prices}={tmp_path / 'more.jsonl'}"
    both = shop(of_own={"also_train": {prices: "all", more: "2 times"}})
    drawn = draw_mixed(both, make_examples(both)[0])
    assert [len(rows) for rows, _ in drawn.values()] == [20, 2] and list(drawn) == [prices, more]
    with pytest.raises(UserError, match="more.jsonl stands there twice"):
        shop(of_own={"also_train": {more: "all", f"{prices}={tmp_path / 'prices/../more.jsonl'}": "all"}})
    assert hash_files(both)[f"{more}: more.jsonl"] and not recipe.mixed.keys() & {more}


def test_rows_that_are_all_there_already_are_no_error(shop, tmp_path):
    again = tmp_path / "same.yaml"
    shop()
    again.write_text((tmp_path / "prices.yaml").read_text())
    found = prepare(shop(of_own={"also_train": {str(tmp_path / "prices.yaml"): "all", str(again): "2 times"}}))
    report = found.report[f"train of {again}"]
    assert len(found.train) == 50 and report["dropped"] == {"there already": 20} and report["share"] == 0


def test_the_mix_is_in_the_tokens_and_its_shares_in_the_report(shop, tmp_path):
    recipe = shop()
    found = prepare(recipe)
    part = f"train of {tmp_path / 'prices.yaml'}"
    assert len(found.train) == 35 and len(found.validation) == 4
    assert list(found.report) == ["train", "validation", "test", part]
    assert (found.report["train"]["share"], found.report[part]["share"]) == (0.8571, 0.1429)
    tokens = found.report["train"]["trained_tokens"] + found.report[part]["trained_tokens"]
    assert sum(int(found.train[i][1].sum()) for i in range(35)) == tokens
    assert found.report[part]["share_of_trained_tokens"] == round(found.report[part]["trained_tokens"] / tokens, 4)
    assert "14.3% of the examples" in preview_of(recipe, found)
    text = make_chat(recipe).tokenizer.decode(found.train[34][0])
    assert "What does item" in text
    assert f"train of {tmp_path / 'prices.yaml'}" in preview(recipe, make_chat(recipe), 1)


def preview_of(recipe, found):
    from carelm.data.report import format_report

    return format_report(found.report)


def test_without_it_nothing_of_the_report_changes(shop, make, tmp_path):
    found = prepare(make(tmp_path / "own"))
    assert list(found.report) == ["train", "validation", "test"] and found.report["train"]["share"] is None


def test_validation_and_test_stay_those_of_the_recipe(shop, make, tmp_path):
    (tmp_path / "own/validation.jsonl").unlink()
    (tmp_path / "own/test.jsonl").unlink()
    cut = {"validation_fraction": 0.2, "test_fraction": 0.2}
    alone, mixed = (
        make_examples(r)[0] for r in (make(tmp_path / "own", **cut), shop(of_own=cut, system_prompt="Be kind."))
    )
    assert mixed == alone and alone["validation"] and alone["test"]


def test_questions_of_validation_and_test_are_taken_out_of_the_others_rows_whatever_the_system_message(shop, tmp_path):
    asked = [{"ask": "Question 200?", "say": "Answer A."}, {"ask": "Question 100?", "say": "Answer B."},
             {"ask": "Question 1?", "say": "Answer 1."}, {"ask": "Another?", "say": "Answer D."}]  # fmt: skip
    write_jsonl(tmp_path / "prices/train.jsonl", asked)
    rows, report = mixed_of(shop("all", system_prompt="Be kind."))
    assert rows == ["Answer 1.", "Answer D."]
    assert report.dropped == {"question also in validation or test": 2}
    rows, report = mixed_of(shop("all"))
    assert rows == ["Answer D."] and report.dropped["there already"] == 1
    rows, report = mixed_of(shop("all", of_own={"keep_test_questions": True}))
    assert rows == ["Answer A.", "Answer B.", "Answer D."]


@pytest.mark.parametrize(
    "own, of_other",
    [
        ("Query: {question}", "{ask}"),
        ("{question}", "A customer asks:\n{ask}"),
        ("Query: {question}\nIntent: {intent}", "{ask}"),
        ("{question}", "Query: {ask}\nIntent: {intent}"),
        ("{question}\n{intent}", "Intent {intent}\n{ask}"),
    ],
)
def test_they_are_found_whatever_the_templates_put_around_them(shop, tmp_path, own, of_other):
    for split, number in (("train", 1), ("validation", 100), ("test", 200)):
        row = {"question": f"Question {number}?", "answer": "No.", "intent": "ASK"}
        write_jsonl(tmp_path / f"own/{split}.jsonl", [row])
    asked = [{"ask": f"Question {i}?", "say": f"Answer {i}.", "intent": "ASK"} for i in (100, 200, 300)]
    write_jsonl(tmp_path / "prices/train.jsonl", asked)
    rows, report = mixed_of(shop("all", {"prompt_template": own}, prompt_template=of_other))
    assert rows == ["Answer 300."] and report.dropped == {"question also in validation or test": 2}
    assert len(report.first_in_other_split) == 2
    assert (
        len(mixed_of(shop("all", {"prompt_template": own, "keep_test_questions": True}, prompt_template=of_other))[0])
        == 3
    )


def test_questions_beyond_max_eval_samples_are_taken_out_too(shop, tmp_path):
    """A later evaluation may ask them."""
    questions = [json.loads(line) for line in (tmp_path / "own/test.jsonl").read_text().splitlines()]
    found = []
    for limit in (None, 1):
        recipe = shop("all", {"max_eval_samples": limit})
        rows = [{"ask": row["question"], "say": f"Answer {i}."} for i, row in enumerate(questions)]
        write_jsonl(tmp_path / "prices/train.jsonl", [*rows, {"ask": "Is it open?", "say": "Yes."}])
        found.append(mixed_of(recipe)[0])
    assert found == [["Yes."]] * 2


def test_near_duplicates_of_test_are_named_and_dropped_on_demand(shop, tmp_path):
    long = "Where is the parcel that I ordered on Monday with the two blue lamps and the chair of oak, number 17?"
    write_jsonl(tmp_path / "own/test.jsonl", [{"question": long, "answer": "On its way."}])
    write_jsonl(
        tmp_path / "prices/train.jsonl", [{"ask": long[:-1] + "!", "say": "A."}, {"ask": "Another?", "say": "B."}]
    )
    rows, report = mixed_of(shop("all"))
    assert (rows, report.near_duplicates) == (["A.", "B."], 1)
    rows, report = mixed_of(shop("all", of_own={"drop_near_duplicates": True}))
    assert rows == ["B."] and report.dropped == {"near-duplicates of validation or test": 1}


@pytest.mark.parametrize("own, of_other", [("{question} {intent}", "{ask}"), ("{question}", "Intent {intent}: {ask}")])
def test_near_duplicates_are_found_where_one_template_has_more_columns(shop, tmp_path, own, of_other):
    long = "Where is the parcel that I ordered on Monday with the two blue lamps and the chair of oak, number 17?"
    for split, question in (("train", "Open?"), ("validation", "Closed?"), ("test", long)):
        row = {"question": question, "answer": "On its way.", "intent": "ORDER"}
        write_jsonl(tmp_path / f"own/{split}.jsonl", [row])
    asked = [{"ask": text, "say": text[0], "intent": "ORDER"} for text in (long[:-1] + "!", "Bring it back, please.")]
    write_jsonl(tmp_path / "prices/train.jsonl", asked)
    rows, report = mixed_of(shop("all", {"prompt_template": own}, prompt_template=of_other))
    assert (rows, report.near_duplicates) == (["W", "B"], 1)
    assert "test.jsonl:1 (0.9" in report.first_near_duplicates[0]
    template = {"prompt_template": own, "drop_near_duplicates": True}
    assert mixed_of(shop("all", template, prompt_template=of_other))[0] == ["B"]


def test_a_short_title_that_questions_share_makes_them_no_near_duplicates(shop, tmp_path):
    for split, title, question in (("train", "Opening hours", "Open on Sunday?"), ("validation", "Opening hours", "Closed?"),
                                   ("test", "Shipping costs", "My parcel to Norway has not come yet, why is it?")):  # fmt: skip
        write_jsonl(tmp_path / f"own/{split}.jsonl", [{"title": title, "question": question, "answer": "Soon."}])
    asked = [
        {"ask": text, "say": text} for text in ("Shipping costs?", "My parcel to Norway has not come yet, why is it")
    ]
    write_jsonl(tmp_path / "prices/train.jsonl", asked)
    rows, report = mixed_of(shop("all", {"prompt_template": "{title}: {question}", "drop_near_duplicates": True}))
    assert rows == ["Shipping costs?"] and report.near_duplicates == 1


def test_its_own_test_rows_are_never_trained_on(shop, tmp_path):
    rows, _ = mixed_of(shop("all", test_fraction=0.3))
    assert 0 < len(rows) < 20


def test_each_recipe_has_its_own_rules_for_turns_and_length(shop, tmp_path):
    turns = [{"role": r, "content": f"{r} {i} says this."} for i in range(2) for r in ("user", "assistant")]
    write_jsonl(tmp_path / "prices/train.jsonl", [{"messages": turns}])
    keys = {"prompt_template": None, "completion_template": None, "messages_column": "messages"}
    last, every = (prepare(shop("all", **keys, trained_turns=t)).report for t in ("last", "all"))
    part = f"train of {tmp_path / 'prices.yaml'}"
    assert every[part]["trained_tokens"] > last[part]["trained_tokens"]
    assert every["train"] == last["train"] | {k: every["train"][k] for k in ("share", "share_of_trained_tokens")}


@pytest.mark.parametrize(
    "rows, keys, line",
    [
        (21, {}, "also_train: .*prices.yaml: 21 rows are asked for, and 20 can be trained on; all takes them"),
        (0, {}, "also_train: .*prices.yaml: 0 is no number of rows"),
        (-1, {}, "also_train: .*: -1 is no number of rows"),
        (2.5, {}, "also_train: .*: 2.5 is no number of rows"),
        (True, {}, "also_train: .*: True is no number of rows"),
        ("0 times", {}, "also_train: .*: '0 times' is no number"),
        ("half", {}, "also_train: .*: 'half' is no number of rows"),
        (None, {}, "also_train: .*: None is no number of rows"),
        (5, {"also_train": {"x.yaml": 1}}, "also_train: .*prices.yaml: it has also_train itself"),
        (5, {"prompt_template": "{q}"}, "also_train: .*prices.yaml: prompt_template: .* no column 'q'"),
        (5, {"prompt_template": None}, "also_train: .*prices.yaml: completion_template is set and prompt_template is not"),
        (5, {"messages_column": "m"}, "also_train: .*prices.yaml: prompt_template and messages_column"),
        (5, {"chat_template_path": "x.jinja"}, "also_train: .*prices.yaml: chat_template_path: x.jinja is not this run's"),
        (5, {"dataset_name": "/nowhere/x.csv"}, "also_train: .*prices.yaml: dataset_name: .*nowhere"),
        (5, {"colour": "red"}, "also_train: .*prices.yaml: .* unknown key 'colour'"),
        (5, {"max_length": "long"}, "also_train: .*prices.yaml: .*max_length: 'long' is not of type"),
        (5, {"row_filter": {"ask": "nothing"}}, "also_train: .*prices.yaml: row_filter: .* leaves no training row"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_in_is_one_line(shop, rows, keys, line):
    with pytest.raises(UserError, match=line) as caught:
        prepare(shop(rows, **keys))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_there_twice_is_named(shop, make, tmp_path):
    shop()
    with pytest.raises(UserError, match="also_train: no.yaml: recipe no.yaml cannot be read"):
        make(tmp_path / "own", also_train={"no.yaml": 1})
    here = str(tmp_path / "prices.yaml")
    with pytest.raises(UserError, match="also_train: .* stands there twice"):
        make(tmp_path / "own", also_train={here: 1, here.replace("prices.yaml", "./prices.yaml"): 2})
    with pytest.raises(UserError, match="also_train: .* is not of type"):
        make(tmp_path / "own", also_train=[here])


def test_what_is_mixed_in_is_part_of_what_makes_it_this_run(shop, make, tmp_path):
    recipe = shop()
    save_recipe(recipe, tmp_path / "recipe.yaml")
    check_identity(shop(), tmp_path / "recipe.yaml")
    for other in (shop(6), make(tmp_path / "own")):
        with pytest.raises(UserError, match="also_train"):
            check_identity(other, tmp_path / "recipe.yaml")
    before, found = hash_files(recipe), prepare(recipe)
    changed = shop(system_prompt="Be kind.")
    assert changed_files(before, hash_files(changed)) == {str(tmp_path / "prices.yaml"): "has changed"}
    assert prepare(changed).fingerprint != found.fingerprint
    write_jsonl(tmp_path / "prices/train.jsonl", json.loads('[{"ask": "A?", "say": "B."}]') * 1)
    file = f"{tmp_path / 'prices.yaml'}: train.jsonl"
    assert changed_files(before, hash_files(shop())) == {file: "has changed"}
    with pytest.raises(UserError, match="5 rows are asked for, and 1 can"):
        prepare(shop())
