"""Rows of any usual file become the same examples, text stays as it is, and what is left out is counted and named."""

import multiprocessing
import os
import time

import numpy as np
import pytest
from small_rows import MESSAGES, TOOL_TURNS, chat, error_of, odd_rows, pairs, prepare, write_jsonl

from carelm.chat.chat import make_chat
from carelm.data import splits
from carelm.data.report import format_report
from carelm.errors import UserError
from carelm.training import prepared
from carelm.training.preview import preview

# Columns


def test_tokens_decode_to_the_text_to_the_byte(tmp_path, make, tokenizer):
    prepared = prepare(make(write_jsonl(tmp_path / "rows.jsonl", odd_rows())))
    for i, row in enumerate(odd_rows()):
        ids, trained = prepared.train[i]
        assert tokenizer.decode(ids[trained]) == row["answer"] + "<|eot_id|>"
        assert row["question"] in tokenizer.decode(ids[~trained])


def test_a_column_may_have_any_name(tmp_path, make):
    rows = [{"ticket.question": "Which sizes?", "reply [en]": "38", "note: urgent": "yes", "Sure!r": "no", "Sure": "?"}]
    recipe = make(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        prompt_template="{ticket.question} ({note: urgent}, {Sure!r}) {{Sure!}}",
        completion_template="{reply [en]}",
    )
    (example,) = splits.make_examples(recipe)[0]["train"]
    assert (example.prompt[-1]["content"], example.completion[0]["content"]) == (
        "Which sizes? (yes, no) {Sure!}",
        "38",
    )
    with pytest.raises(UserError, match="prompt_template: .*no column 'note: calm'"):
        splits.make_examples(make(tmp_path / "rows.jsonl", prompt_template="{note: calm}"))
    with pytest.raises(UserError, match="prompt_template: a single '{'; write {column} for a column"):
        make(tmp_path / "rows.jsonl", prompt_template="{Sure!r} {")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"Question": "a", "answer": "b"}])
    message = error_of(make(path))
    assert "prompt_template" in message and "'question'" in message and "Question, answer" in message
    for key in ("category_column", "id_column"):
        assert key in error_of(make(path, prompt_template="{Question}", **{key: "topic"}))
    assert "messages_column" in error_of(make(path, messages_column="turns"))
    assert "row_filter" in error_of(make(path, prompt_template="{Question}", row_filter={"lang": "en"}))


# Rows that are left out


def test_empty_answers_are_counted_and_named_until_there_are_too_many(tmp_path, make):
    rows = pairs(20)
    rows[3]["answer"], rows[7]["answer"], rows[9]["answer"] = "", " \r\n", None
    rows[11]["answer"] = {"not": "text"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, reports = splits.make_examples(make(path, max_empty_share=0.2))
    assert len(examples["train"]) == 16
    assert reports["train"].dropped == {"empty answer": 3, "answer is not text": 1}
    assert reports["train"].first_dropped == {"empty answer": "rows.jsonl:4", "answer is not text": "rows.jsonl:12"}
    message = error_of(make(path, max_empty_share=0.19))
    assert "max_empty_share" in message and "4 of 20" in message and "rows.jsonl:4" in message


def test_an_empty_question_and_an_empty_answer_are_named_apart(tmp_path, make):
    rows = pairs(20)
    rows[3]["answer"], rows[7]["question"], rows[9]["question"] = "", "", " "
    report = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), max_empty_share=0.2))[1]["train"]
    assert "1 empty answer (first: rows.jsonl:4), 2 empty column 'question' (first: rows.jsonl:8)" in format_report(
        {"train": vars(report)}
    )


def test_answers_that_say_next_to_nothing_are_counted_with_the_commonest(tmp_path, make):
    rows = pairs(20)
    for i, text in enumerate(("ok", "Ok ", "erledigt", "-", "erledigt", "OK", "Yes, on Monday.")):
        rows[i + 3]["answer"] = text
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def notes(**keys):
        return [n for n in splits.make_examples(make(path, **keys))[1]["train"].notes if "short" in n]

    assert notes() == ["6 answers are as short as 'ok' (3 times, first: rows.jsonl:4): the model learns to say so"]
    assert not notes(labels=["ok", "erledigt", "-"])
    short = write_jsonl(
        tmp_path / "short.jsonl", [{"question": f"{i}?", "answer": "no yes".split()[i % 2]} for i in range(9)]
    )
    assert not [n for n in splits.make_examples(make(short))[1]["train"].notes if "short" in n]  # they are the task


def test_a_column_that_is_spelt_nearly_so_is_what_was_meant(tmp_path, make):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"Kundenfrage": "a", "Antwort für Kunde": "b", "n": 1, "Kundenfrage ": ""}]
    )
    for written, meant in (
        ("kundenfrage", "Kundenfrage"),
        ("antwort_fur_kunde", "Antwort für Kunde"),
        ("Kunden-Frage ", "Kundenfrage"),
    ):
        assert error_of(make(path, prompt_template=f"{{{written}}}")).endswith(f"; did you mean '{meant}'?")
    assert error_of(make(path, prompt_template="{subject}")).endswith(
        "(there: Antwort für Kunde, Kundenfrage, Kundenfrage , n)"
    )


def test_an_answer_template_with_fixed_words_is_empty_where_its_columns_are(tmp_path, make):
    rows = [{"question": "a", "answer": ""}, *pairs(19)]
    examples, reports = splits.make_examples(
        make(write_jsonl(tmp_path / "rows.jsonl", rows), completion_template="Label: {answer}")
    )
    assert reports["train"].dropped == {"empty answer": 1}


def test_duplicates_are_dropped_and_counted(tmp_path, make):
    rows = [*pairs(3), *pairs(2), {"question": "Question 0?", "answer": "Another answer."}]
    examples, reports = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert len(examples["train"]) == 4 and reports["train"].dropped == {"duplicate": 2}


def test_test_rows_that_differ_in_one_reference_are_no_duplicates(tmp_path, make):
    write_jsonl(tmp_path / "folder/train.jsonl", pairs(3))
    write_jsonl(tmp_path / "folder/test.jsonl", [{"question": "a", "one": "b", "two": two} for two in "ccd"])
    examples, reports = splits.make_examples(make(tmp_path / "folder", reference_columns=["one", "two"]))
    assert [e.references for e in examples["test"]] == [("b", "c"), ("b", "d")]
    assert reports["test"].dropped == {"duplicate": 1}


def test_row_filter_keeps_rows_by_column_and_must_leave_some(tmp_path, make):
    rows = [row | {"lang": "en" if row["n"] % 2 else "de", "kind": row["n"] % 3} for row in pairs(12)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, _ = splits.make_examples(make(path, row_filter={"lang": "en", "kind": [0, 2]}))
    assert [e.source for e in examples["train"]] == [f"rows.jsonl:{n + 1}" for n in (3, 5, 9, 11)]
    assert "row_filter" in error_of(make(path, row_filter={"lang": "fr"}))


def test_rows_that_are_all_held_out_are_said_to_be(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(1))
    message = error_of(make(path, test_fraction=0.9, validation_fraction=0.09))
    assert message.endswith("(none dropped, 1 held out); set validation_fraction: 0 and test_fraction: 0")


def test_nothing_left_to_train_on_is_an_error(tmp_path, make):
    write_jsonl(tmp_path / "folder/train.jsonl", pairs(3))
    write_jsonl(tmp_path / "folder/test.jsonl", pairs(3))
    assert "nothing is left" in error_of(make(tmp_path / "folder"))
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(UserError) as caught:
        prepare(make(rows, max_length=8))
    assert str(caught.value) == ("max_length: nothing is left of the train split (3 too long (first: rows.jsonl:1)); "
                                 "over 8 tokens; set max_length higher, or set too_long: cut")  # fmt: skip


# Rows that do not fit


def test_rows_over_the_window_are_dropped_and_counted(tmp_path, make):
    rows = [*pairs(5), {"question": "Long?", "answer": "word " * 200}]
    prepared = prepare(make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=64))
    assert len(prepared.train) == 5 and prepared.report["train"]["dropped"] == {"too long": 1}
    assert prepared.train.lengths.max() <= 64


def test_old_turns_go_first_and_the_system_message_stays(tmp_path, make, tokenizer):
    turns = [t for i in range(8) for t in (("user", f"Question {i}? " + "word " * 8), ("assistant", f"Answer {i}."))]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*turns)}])
    for trained_turns in ("last", "all"):
        recipe = make(path, **MESSAGES, trained_turns=trained_turns, system_prompt="Be kind.", max_length=128)
        prepared = prepare(recipe)
        assert prepared.report["train"]["fitted"] == {"old turns dropped": 1}
        ids, trained = prepared.train[0]
        text = tokenizer.decode(ids)
        assert len(ids) <= 128 and "Be kind." in text and "Question 0" not in text and "Question 7" in text
        last = "Answer 7.<|eot_id|>"
        assert tokenizer.decode(ids[trained]).endswith(last)
        assert (tokenizer.decode(ids[trained]) == last) == (trained_turns == "last")


def test_a_cut_answer_keeps_its_end_of_turn(tmp_path, make, tokenizer):
    answer = "word " * 200
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Long?", "answer": answer}])
    prepared = prepare(make(path, max_length=64, too_long="cut"))
    ids, trained = prepared.train[0]
    text = tokenizer.decode(ids[trained])
    assert len(ids) == 64 and text.endswith("<|eot_id|>") and answer.startswith(text.removesuffix("<|eot_id|>"))
    assert "Long?" in tokenizer.decode(ids) and prepared.report["train"]["fitted"] == {"answer cut": 1}
    assert prepared.report["train"]["truncated_share"] == 1.0


def test_a_cut_prompt_keeps_the_whole_answer(tmp_path, make, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "word " * 200, "answer": "Short answer."}])
    prepared = prepare(make(path, max_length=64, too_long="cut", system_prompt="Be kind."))
    ids, trained = prepared.train[0]
    assert 56 <= len(ids) <= 64 and tokenizer.decode(ids[trained]) == "Short answer.<|eot_id|>"
    assert "Be kind." in tokenizer.decode(ids) and prepared.report["train"]["fitted"] == {"prompt cut": 1}


def test_a_cut_that_falls_into_a_tools_turn_leaves_whole_answers_only(tmp_path, make, tokenizer):
    turns = [dict(m) for m in TOOL_TURNS]
    turns[3]["content"] = "result " * 200
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    prepared = prepare(make(path, **MESSAGES, trained_turns="all", max_length=128, too_long="cut"))
    ids, trained = prepared.train[0]
    assert tokenizer.decode(ids[trained]).count("<|eot_id|>") == 1
    assert tokenizer.decode(ids).endswith('"ü": 1}}<|eot_id|>')


# The report and the prepared files


def test_the_report_counts_what_a_person_counts(tmp_path, make, tokenizer):
    answers = ["One.", "Two words.", "Three words here.", "One.", "", "word " * 100]
    rows = [{"question": f"Question {i}?", "answer": a} for i, a in enumerate(answers)]
    rows.append(rows[0])
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=64, max_empty_share=0.5)
    report = prepare(recipe).report["train"]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows[:4]
    ]
    lengths = sorted(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    assert (report["rows"], report["used"]) == (7, 4)
    assert report["dropped"] == {"empty answer": 1, "duplicate": 1, "too long": 1}
    assert report["rows"] == report["used"] + sum(report["dropped"].values())
    shown = format_report({"train": report})
    assert (
        "1 empty answer (first: rows.jsonl:5), 1 duplicate (first: rows.jsonl:7), 1 too long (first: rows.jsonl:6)"
        in shown
    )
    assert (report["tokens"], report["length_max"], report["length_p50"]) == (sum(lengths), lengths[-1], lengths[1])
    answers_with_ends = [tokenizer(a + "<|eot_id|>", add_special_tokens=False)["input_ids"] for a in answers[:4]]
    assert report["trained_tokens"] == sum(map(len, answers_with_ends))
    assert report["truncated_share"] == 0
    shown = format_report({"train": report})
    assert "rows.jsonl:5" in shown and "1 empty answer" in shown and str(report["trained_tokens"]) in shown


def test_prepared_data_is_written_once_and_reused(tmp_path, make, monkeypatch):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", pairs(20)), validation_fraction=0.3)
    first = prepare(recipe)
    monkeypatch.setattr(prepared, "_write", lambda *_: pytest.fail("prepared again"))
    again = prepare(recipe)
    assert again.fingerprint == first.fingerprint and again.report == first.report
    assert np.array_equal(again.train.tokens, first.train.tokens)
    assert len(again.validation) == len(first.validation) > 0
    assert again.samples[0]["prompt"][0]["role"] == "user"


def test_a_changed_row_key_or_template_gives_another_fingerprint(tmp_path, make, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(20))
    seen = {prepare(make(path)).fingerprint, prepare(make(path, system_prompt="Be kind.")).fingerprint}
    write_jsonl(path, [*pairs(19), {"question": "Question 19?", "answer": "Changed."}])
    seen.add(prepare(make(path)).fingerprint)
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|end_header_id|>\\n\\n", "<|end_header_id|>\\n")
    try:
        assert tokenizer.chat_template != template
        seen.add(prepare(make(path)).fingerprint)
    finally:
        tokenizer.chat_template = template
    assert len(seen) == 4


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, make, own_cache):
    with pytest.raises(UserError):
        prepare(make(write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": ""}])))
    assert list(own_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, make, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(3))
    monkeypatch.setenv("CARELM_CACHE", str(path / "cache"))
    with pytest.raises(UserError, match="CARELM_CACHE"):
        prepare(make(path))


def _prepare_as_second_rank(recipe, chat, queue):
    os.environ["LOCAL_RANK"] = "1"
    prepared._write = lambda *_: queue.put("the second rank prepared")
    queue.put("waits")
    queue.put(prepared.prepare(recipe, chat).fingerprint)


def test_a_second_rank_waits_for_the_first_ones_files(tmp_path, make):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", pairs(20)))
    chat = make_chat(recipe)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    second = context.Process(target=_prepare_as_second_rank, args=(recipe, chat, queue), daemon=True)
    second.start()
    assert queue.get(timeout=20) == "waits"
    time.sleep(0.5)
    assert second.is_alive() and queue.empty()
    first = prepared.prepare(recipe, chat)
    assert queue.get(timeout=20) == first.fingerprint
    second.join(timeout=20)
    assert second.exitcode == 0


def test_a_preview_shows_the_trained_part_and_says_what_is_dropped(tmp_path, make):
    rows = [*pairs(1), {"question": "Long?", "answer": "word " * 200}, *pairs(1)]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=64)
    shown = preview(recipe, make_chat(recipe), 2)
    assert "\033[7;32mAnswer 0.<|eot_id|>\033[0m" in shown and "rows.jsonl:2: dropped" in shown
    (said,) = [line for line in shown.splitlines() if line.startswith("train ")]
    assert "1 duplicate (first: rows.jsonl:3)" in said and "1 too long (first: rows.jsonl:2)" in said
    assert "too long: over 64 tokens; set max_length higher, or set too_long: cut\n" in shown
    assert "not used: column n (in 1 row)" in shown
    assert format_report(prepare(recipe).report) in shown  # the training says the same


def test_columns_that_no_key_of_the_recipe_names_are_said_with_their_rows(tmp_path, make):
    path = tmp_path / "rows.csv"
    path.write_text(
        "question,answer,agent,kind,ticket,note\n" + "".join(f"Q{i}?,A{i}.,Ann,order,{i},\n" for i in range(4))
    )
    recipe = make(path, category_column="kind", id_column="ticket")
    assert prepare(recipe).report["train"]["unused"] == {"column agent": 4}
    path.write_text(
        "ticket,from,text,mood\n"
        + "".join(f"{i},{who},{who} {i},calm\n" for i in range(3) for who in ("user", "agent"))
    )
    recipe = make(path, text_column="text", role_column="from", conversation_column="ticket")
    assert "not used: column mood (in 3 conversations)\n" in preview(recipe, make_chat(recipe), 1) + "\n"
