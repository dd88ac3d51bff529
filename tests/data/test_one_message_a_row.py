"""Rows of one message each become conversations; what is missing, joined or left out is counted."""

import csv
import datetime
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rows import error_of, turns_of, write_jsonl, write_parquet

from carelm.data import splits
from carelm.data.conversations import join_messages
from carelm.data.report import SplitReport, format_report
from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe

TICKETS = {
    "text_column": "text", "role_column": "by", "conversation_column": "ticket", "order_column": "n", "trained_turns": "all",
}  # fmt: skip
REPLIES = {
    "text_column": "text", "role_column": "inbound", "id_column": "id", "reply_to_column": "to", "user_roles": ["true"],
    "assistant_roles": ["false"], "trained_turns": "all",
}  # fmt: skip


def tickets(*rows):
    return [dict(zip(("ticket", "n", "by", "text"), row)) for row in rows]


def replies(*rows):
    return [dict(zip(("id", "to", "inbound", "text"), row)) for row in rows]


def said(recipe, split="train"):
    """Each conversation as one line."""
    return [
        " | ".join(f"{m['role'][0]}: {m['content']}" for m in prompt + completion)
        for prompt, completion in turns_of(recipe, split)
    ]


def note(recipe):
    return next(n for n in splits.make_examples(recipe)[1]["train"].notes if "messages are" in n)


TWO_TICKETS = tickets(
    (7, 2, "agent", "Which size?"), (8, 1, "customer", "Late parcel."), (7, 1, "customer", "Wrong size."),
    (7, 3, "customer", "38."), (8, 2, "agent", "It comes today."), (7, 4, "agent", "Sent."),
)  # fmt: skip
TWO_SAID = ["u: Wrong size. | a: Which size? | u: 38. | a: Sent.", "u: Late parcel. | a: It comes today."]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_messages_of_one_conversation_are_put_together_in_order(tmp_path, make, write):
    path = write(tmp_path / f"rows.{write.__name__[6:]}", TWO_TICKETS)
    recipe = make(path, **TICKETS, category_column="ticket", system_prompt="Ticket {ticket}.")
    examples, reports = splits.make_examples(recipe)
    assert [(e.id, e.category, e.prompt[0]["content"]) for e in examples["train"]] == [
        ("7", "7", "Ticket 7."), ("8", "8", "Ticket 8."),
    ]  # fmt: skip
    assert said(make(path, **TICKETS)) == TWO_SAID
    assert note(recipe) == "6 messages are 2 conversations" and reports["train"].rows == 2


def test_conversations_and_rows_are_not_mixed_in_the_report(tmp_path, make):
    rows = [row | {"team": "b", "mail": "a@shop.de"} for row in TWO_TICKETS]
    rows[0]["text"] += " Write to a@shop.de."
    report = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS))[1]["train"]
    shown = format_report({"train": vars(report)})
    assert "from rows.jsonl (6 rows)" in shown and "1 e-mail address in 1 conversation (first: rows.jsonl:3)" in shown
    assert "column team (in 2 conversations)" in shown and "rows and used: conversations" in shown


def test_which_names_count_as_which_role_is_said(tmp_path, make):
    rows = [*TWO_TICKETS, *tickets((9, 1, "Kunde", "Open?"), (9, 2, "Bot", "Until nine."), (9, 3, "System", "Closed."))]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS, user_roles=["Kunde"])
    notes = splits.make_examples(recipe)[1]["train"].notes
    assert "agent, Bot count as assistant; System counts as system; customer, Kunde count as user" in notes


def test_the_sides_of_a_help_desk_are_known(tmp_path, make):
    sides = (("end-user", "support"), ("Requester", "Operator"), ("visitor", "Agent"))
    lines = [(i, n, by, f"{by} {i}") for i, of_one in enumerate(sides) for n, by in enumerate(of_one)]
    assert len(said(make(write_jsonl(tmp_path / "rows.jsonl", tickets(*lines)), **TICKETS))) == 3


def test_without_an_order_messages_stay_as_they_stand_and_shards_are_one_split(tmp_path, make):
    rows = sorted(TWO_TICKETS, key=lambda row: row["n"])
    write_jsonl(tmp_path / "folder/train-00000-of-00002.jsonl", rows[:3])
    write_jsonl(tmp_path / "folder/train-00001-of-00002.jsonl", rows[3:])
    write_jsonl(tmp_path / "folder/test.jsonl", tickets((7, 1, "customer", "Hello?"), (7, 2, "agent", "Hello.")))
    recipe = make(tmp_path / "folder", **TICKETS | {"order_column": None})
    assert sorted(said(recipe)) == sorted(TWO_SAID) and said(recipe, "test") == ["u: Hello? | a: Hello."]


def test_tickets_of_one_number_in_two_shops_are_two_conversations(tmp_path, make):
    for shop, lines in (
        ("shoes", TWO_TICKETS),
        ("hats", tickets((7, 1, "customer", "Blue?"), (7, 2, "agent", "Yes."))),
    ):
        write_jsonl(tmp_path / f"{shop}.jsonl", lines)
    recipe = make(tmp_path / "*.jsonl", **TICKETS)
    assert said(recipe) == ["u: Blue? | a: Yes.", *TWO_SAID]
    assert note(recipe).endswith("3 conversations; 2 conversations of one name in several files, kept apart")


@pytest.mark.parametrize(
    "order",
    [
        ["2024-05-02 09:00", "2024-05-01T23:59:00Z", "2024-05-10"],
        ["Thu, 02 May 2024 09:00:00 +0000", "Wed, 01 May 2024 23:59:00 GMT", "Fri, 10 May 2024 00:00:00 +0200"],
        ["Thu May 02 09:00:00 +0000 2024", "Wed May 01 23:59:00 +0000 2024", "Fri May 10 00:00:00 +0000 2024"],
        ["May 1, 2024 01:30 PM", "May 1, 2024 10:00 AM", "May 1, 2024 11:00 pm"],
        ["2024-05-01 1:30 p.m.", "2024-05-01 12:30 AM", "2024-05-01 02:00 PM"],
        [
            "Wed May 01 2024 13:30:00 GMT+0200 (CEST)",
            "Wed May 01 2024 11:00:00 GMT+0000",
            "Wed May 01 12:00:00 UTC 2024",
        ],
        ["9", "8.5", "10"],
        [9, 8.5, 10],
        [datetime.datetime(2024, 5, 2), datetime.datetime(2024, 5, 1), datetime.datetime(2024, 5, 10)],
    ],
)
def test_numbers_and_dates_order_as_numbers_and_dates_not_as_text(tmp_path, make, order):
    rows = tickets(*((1, place, by, text) for place, by, text in zip(order, ("agent", "customer", "agent"), "bac")))
    assert said(make(write_parquet(tmp_path / "rows.parquet", rows), **TICKETS)) == ["u: a | a: b\n\nc"]


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ("05/04/2024", "'05/04/2024'"),
        ("Wed, 01 May 2024 12:30:00 CEST", "CEST'"),
        ("2024-05-01 13:30 PM", "13:30 PM'"),
        (None, "is empty"),
        ("2024-05-01", "a number in rows.jsonl:1 and a date in rows.jsonl:3"),
        (True, "True"),
    ],
)
def test_an_order_that_cannot_be_told_is_refused(tmp_path, make, order, named):
    rows = [
        *tickets((1, 1, "customer", "a"), (1, 2, "agent", "b")),
        {"ticket": 1, "n": order, "by": "agent", "text": "c"},
    ]
    message = error_of(make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS))
    assert message.startswith("order_column: ") and "rows.jsonl:3" in message and named in message


def in_order(*places):
    """A ticket of three messages, whose places stand in the file as b, a, c."""
    return tickets(*((1, place, by, text) for place, by, text in zip(places, ("agent", "customer", "agent"), "bac")))


@pytest.mark.parametrize(
    ("order", "said_of_it"),
    [
        (["01.03.2026 08:25", "01.03.2026 08:20", "13.03.2026 7:00 Uhr"], "day first, such as '13.03.2026 7:00 Uhr'"),
        (["01.03.2026", "02.02.2026", "02.03.2026"], "day first, such as '01.03.2026' (rows.jsonl:1)"),
        (["13/02/2026", "31/01/2026", "01/03/2026"], "day first, such as '13/02/2026'"),
        (["02/13/2026 1:30 PM", "02/13/2026 11:30 a.m.", "03/01/2026 1:00 AM"], "month first, such as '02/13/2026"),
        (["13-02-2026 08:20", "31-01-2026, 09:00:05", "01-03-2026 07:00"], "day first, such as '13-02-2026"),
        (["2026/02/13 08:20", "2026/01/31 23:00", "2026/10/01 00:10"], None),
        (["Fr., 13.02.2026 08:20", "Do., 12.02.2026 08:20", "So., 01.03.2026 08:20"], "day first, such as 'Fr., 13.02"),
        (["[13/02/2026, 08:20:11]", "[13/02/2026, 08:19:11]", "[01/03/2026, 07:20:11]"], "day first, such as '[13/02"),
    ],
)
def test_dates_in_numbers_are_read_as_their_column_shows_and_that_is_said(tmp_path, make, order, said_of_it):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", in_order(*order)), **TICKETS)
    assert said(recipe) == ["u: a | a: b\n\nc"]
    notes = [n for n in splits.make_examples(recipe)[1]["train"].notes if "are read" in n]
    assert len(notes) == (said_of_it is not None) and all(said_of_it in n for n in notes)


def test_a_date_of_the_test_split_tells_how_those_of_train_are_read(tmp_path, make):
    write_jsonl(tmp_path / "rows/train.jsonl", in_order("02/03/2026", "01/03/2026", "03/03/2026"))
    rows = in_order("14/03/2026", "13/03/2026", "15/03/2026")
    write_jsonl(tmp_path / "rows/test.jsonl", [row | {"text": f"Test {row['text']}"} for row in rows])
    assert "read day first" in splits.make_examples(make(tmp_path / "rows", **TICKETS))[1]["train"].notes[0]


def test_dates_of_two_readings_are_those_that_date_order_says(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", in_order("02/03/2026", "03/02/2026", "03/03/2026"))
    message = error_of(make(path, **TICKETS))
    assert message.startswith("order_column: column 'n' holds '02/03/2026' (rows.jsonl:1), and no row tells")
    assert message.endswith("set date_order: day_first, or month_first")
    assert said(make(path, **TICKETS, date_order="day_first")) == ["u: a | a: b\n\nc"]
    notes = splits.make_examples(make(path, **TICKETS, date_order="month_first"))[1]["train"].notes
    assert "dates of column 'n' are read month first as date_order says, such as '02/03/2026' (rows.jsonl:1)" in notes
    short = write_jsonl(tmp_path / "short.jsonl", in_order("02.03.26, 08:20", "31.12.69", "03.03.26"))
    assert "a year of two digits; set date_order" in error_of(make(short, **TICKETS))
    assert said(make(short, **TICKETS, date_order="day_first")) == ["u: a | a: b\n\nc"]


@pytest.mark.parametrize(
    ("order", "keys", "named"),
    [
        (["13/02/2026", "02/13/2026", "01/01/2026"], {}, "two orders, '13/02/2026' (rows.jsonl:1): day_first and '02/13/"),
        (["13/02/2026", "2026-03-01", "01/01/2026"], {}, "two forms, '13/02/2026' (rows.jsonl:1) and '2026-03-01' (rows"),
        (["13/02/2026", "14/02/2026", "15/02/2026"], {"date_order": "month_first"}, "(rows.jsonl:1); set day_first"),
        (["31.02.2026", "01.02.2026", "02.02.2026"], {}, "rows.jsonl:1: column 'n' holds '31.02.2026', neither"),
        (["13.02.2026 13:30 PM", "01.02.2026", "02.02.2026"], {}, "rows.jsonl:1: column 'n' holds '13.02.2026 13:30 PM'"),
    ],
)  # fmt: skip
def test_dates_that_contradict_one_another_are_refused_in_one_line(tmp_path, make, order, keys, named):
    assert named in error_of(make(write_jsonl(tmp_path / "rows.jsonl", in_order(*order)), **TICKETS, **keys))


NEWEST_FIRST = tickets(
    (7, "01.03.2026 08:25", "agent", "Sent."), (7, "01.03.2026 08:20", "customer", "Where is it?"),
    (8, "01.03.2026 08:20", "agent", "Until nine."), (8, "01.03.2026 08:20", "customer", "Open?"),
    (9, "01.03.2026 08:20", "customer", "So?"), (9, "01.03.2026 08:19", "agent", "We call."),
    (9, "01.03.2026 08:18", "customer", "c"),
)  # fmt: skip


def test_without_an_order_a_file_with_the_newest_message_first_is_warned_of(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", NEWEST_FIRST)
    keys = {**TICKETS, "order_column": None, "max_empty_share": 1}

    def order_of(path):
        recipe = make(path, **keys)
        reports = [SplitReport()]
        join_messages(
            recipe, [(f"rows.jsonl:{i}", json.loads(line)) for i, line in enumerate(open(path), 1)], reports[0]
        )
        return reports[0].notes[-1]

    assert order_of(path).endswith("column 'n' runs backwards in it: set order_column: n")
    assert "; the file's order counts, and column 'n' runs backwards in it: set order_column: n; else mend" in error_of(
        make(path, **keys | {"max_empty_share": 0.1})
    )
    untimed = [{key: value for key, value in row.items() if key != "n"} for row in NEWEST_FIRST]
    assert "2 of 3 begin with the assistant" in order_of(write_jsonl(tmp_path / "untimed.jsonl", untimed))
    forwards = order_of(write_jsonl(tmp_path / "forwards.jsonl", NEWEST_FIRST[::-1]))
    assert forwards.startswith("order_column is not set") and forwards.endswith("in the order of the file")


def test_messages_of_one_minute_in_a_file_with_the_newest_first_are_turned_round_too(tmp_path, make):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", NEWEST_FIRST), **TICKETS)
    assert said(recipe) == ["u: Where is it? | a: Sent.", "u: Open? | a: Until nine.", "u: c | a: We call."]


def test_gaps_two_in_a_row_empty_messages_and_tickets_without_a_reply_are_counted(tmp_path, make):
    rows = tickets(
        (1, 1, "customer", "Hello?"), (1, 2, "customer", "Anyone?"), (1, 3, "agent", "Yes."), (1, 4, "agent", "How?"),
        (2, 1, "customer", "a"), (2, 4, "agent", "b"),  # two are missing
        (3, 1, "customer", "No reply."),
        (4, 1, "customer", "c"), (4, 2, "agent", ""), (4, 3, "agent", "d"), (4, 4, "customer", "Left out."),
        (None, 1, "customer", "Whose?"),
    )  # fmt: skip
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS, max_empty_share=0.3)
    assert said(recipe) == ["u: Hello?\n\nAnyone? | a: Yes.\n\nHow?", "u: a | a: b", "u: c | a: d"]
    assert note(recipe) == (
        "12 messages are 4 conversations; 1 messages without a conversation, left out, 1 conversations where a number of the "
        "order is missing or twice, 1 messages without text, 1 conversations whose "
        "end has no reply, left out, 1 user messages joined to the one before, 1 assistant messages "
        "joined to the one before"
    )
    report = splits.make_examples(recipe)[1]["train"]
    assert report.dropped == {"no assistant turn": 1} and report.rows == 4


def test_a_message_that_an_export_holds_twice_counts_once(tmp_path, make):
    rows = tickets(
        (1, "2024-05-01 09:00", "customer", "Hello?"), (1, "2024-05-01 09:05", "agent", "Yes."),
        (1, "2024-05-01 09:05", "agent", "Yes."), (1, "2024-05-01 09:00", "customer", "Hello?"),
        (1, "2024-05-01 09:05", "agent", "How?"), (2, "2024-05-01 09:00", "customer", "Hello?"),
        (2, "2024-05-01 09:05", "agent", "Yes."), (2, "2024-05-01 09:06", "agent", "Yes."),
    )  # fmt: skip
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS)
    assert said(recipe) == ["u: Hello? | a: Yes.\n\nHow?", "u: Hello? | a: Yes.\n\nYes."]
    assert "2 messages that are there twice, left out" in note(recipe)


def test_calls_in_a_row_are_one_turn_as_in_a_list_of_messages(tmp_path, make):
    calls = ['{"name": "find_order", "arguments": {"order": 7}}', '{"name": "find_size", "arguments": {}}']
    lines = [
        ("user", "Where?"),
        *(("function_call", call) for call in calls),
        ("tool", "Sent."),
        ("agent", "It is sent."),
    ]
    rows = write_jsonl(tmp_path / "rows.jsonl", tickets(*((1, i, *line) for i, line in enumerate(lines))))
    whole = [{"messages": [{"role": role, "content": text} for role, text in lines]}]
    in_list = make(write_jsonl(tmp_path / "list.jsonl", whole), messages_column="messages", trained_turns="all")
    assert turns_of(make(rows, **TICKETS)) == turns_of(in_list)


def test_numbers_that_go_through_all_tickets_have_no_gaps(tmp_path, make):
    rows = tickets((1, 11, "customer", "a"), (2, 12, "customer", "b"), (1, 13, "agent", "c"), (2, 17, "agent", "d"))
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **TICKETS)
    assert note(recipe) == "4 messages are 2 conversations"


def test_a_split_whose_messages_have_no_conversation_is_refused(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", tickets((None, 1, "customer", "a"), ("", 2, "agent", "b")))
    assert error_of(make(path, **TICKETS)).startswith("conversation_column: column 'ticket' is empty in all rows")


# Replies


def test_replies_follow_what_they_reply_to_and_each_end_is_a_conversation(tmp_path, make):
    rows = replies(
        (4, 3, False, "Try again."), (1, None, True, "Broken."), (2, 1, False, "Which?"), (3, 2, True, "The red one."),
        (5, 2, True, "All."), (6, 5, False, "Sorry."), (7, 99, True, "And mine?"), (8, 7, False, "Also."),
        (9, None, True, "Nobody replies."),
    )  # fmt: skip
    expected = [
        "u: Broken. | a: Which? | u: The red one. | a: Try again.", "u: Broken. | a: Which? | u: All. | a: Sorry.",
        "u: And mine? | a: Also.",
    ]  # fmt: skip
    for path in (write_jsonl(tmp_path / "rows.jsonl", rows), write_parquet(tmp_path / "rows.parquet", rows)):
        recipe = make(path, **REPLIES, max_empty_share=0.3)
        assert said(recipe) == expected
        assert note(recipe) == (
            "9 messages are 4 conversations; 1 replies to a message that is not here, "
            "1 branches, each a conversation of its own"
        )
        assert [e.id for e in splits.make_examples(recipe)[0]["train"]] == ["1", "1", "7"]


def test_ids_that_pandas_has_made_float_still_meet(tmp_path, make):
    lines = ["id,to,inbound,text", "119237,,True,Broken.", "119238,119237.0,False,Which?", "119239,119238.0,TRUE,All.",
             "119240,119239.0,false,Ok."]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    assert said(make(tmp_path / "rows.csv", **REPLIES)) == ["u: Broken. | a: Which? | u: All. | a: Ok."]


def test_a_message_may_name_itself_and_a_conversation_of_its_own(tmp_path, make):
    rows = replies(
        ("a", "a", True, "One?"), ("b", "a", False, "Yes."), ("a", "a", True, "Two?"), ("b", "a", False, "No.")
    )
    rows = [row | {"thread": i // 2} for i, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert said(make(path, **REPLIES, conversation_column="thread")) == ["u: One? | a: Yes.", "u: Two? | a: No."]
    message = error_of(make(path, **REPLIES))
    assert message.startswith("id_column: ") and "rows.jsonl:1" in message and "rows.jsonl:3" in message


def test_a_circle_of_replies_is_refused(tmp_path, make):
    rows = replies((0, None, True, "x"), (1, 3, True, "a"), (2, 1, False, "b"), (3, 2, True, "c"))
    assert "rows.jsonl:2" in error_of(make(write_jsonl(tmp_path / "rows.jsonl", rows), **REPLIES))


def test_the_recipe_of_tweets_follows_each_reply_to_the_tweet_that_began_it(tmp_path):
    """Rows as that export has them: replies before what they reply to, parents as 3.0, several replies as 1,7."""
    columns = "tweet_id author_id inbound created_at text response_tweet_id in_response_to_tweet_id".split()
    rows = [
        (1, "shop", False, "Tue Oct 31 22:10:47 +0000 2017", "@11 It is here.", "2", "3.0"),
        (2, "11", True, "Tue Oct 31 22:11:45 +0000 2017", "@shop Fine!", "", "1.0"),
        (3, "11", True, "Tue Oct 31 22:08:27 +0000 2017", "@shop The red one.", "1", "4.0"),
        (4, "shop", False, "Tue Oct 31 21:54:49 +0000 2017", "@11 Which size?", "3,7", "5.0"),
        (5, "11", True, "Tue Oct 31 21:49:35 +0000 2017", "@shop No parcel yet.", "4", ""),
        (7, "12", True, "Tue Oct 31 21:59:35 +0000 2017", "@shop Mine too.", "8", "4.0"),
        (8, "shop", False, "Tue Oct 31 22:59:35 +0000 2017", "@12 We look.", "", "7.0"),
        (9, "13", True, "Tue Oct 31 20:00:00 +0000 2017", "@shop hello?", "", ""),
    ]  # fmt: skip
    write_csv(tmp_path / "twcs.csv", [dict(zip(columns, row)) for row in rows])
    words = ["--dataset_name", str(tmp_path / "twcs.csv"), "--validation_fraction", "0", "--test_fraction", "0"]
    recipe = load_recipe(["--config", "recipes/datasets/twitter_support.yaml", *words], usage="")
    assert said(recipe) == [
        "u: @shop No parcel yet. | a: @11 Which size? | u: @shop The red one. | a: @11 It is here.",
        "u: @shop No parcel yet. | a: @11 Which size? | u: @shop Mine too. | a: @12 We look.",
    ]


# What is wrong


def test_a_role_that_is_not_there_or_not_known_is_named_with_its_row(tmp_path, make):
    for by, named in ((None, "rows.jsonl:2: column 'by'"), ("robot", "rows.jsonl:2: a message has the role 'robot'")):
        path = write_jsonl(tmp_path / "rows.jsonl", tickets((1, 1, "customer", "a"), (1, 2, by, "b")))
        assert error_of(make(path, **TICKETS)).startswith(named)
    assert said(make(path, **TICKETS, assistant_roles=["robot"])) == ["u: a | a: b"]
    lines = [
        (1, 1, "Kunde", "a"),
        (1, 2, "Lena", "b"),
        (2, 1, "customer", "a"),
        (2, 2, "Lena", "b"),
        (2, 3, 'Jo "X"', "c"),
    ]
    write_jsonl(tmp_path / "teams/train.jsonl", tickets(*lines))
    write_jsonl(tmp_path / "teams/test.jsonl", tickets((3, 1, "Kunde", "a"), (3, 2, "Mona", "b")))
    of_all = "not known, with their messages, are 'Lena' (2), 'Jo \"X\"' (1), 'Mona' (1): add assistant_roles: "
    names = '["Lena", "Jo \\"X\\"", "Mona"]'
    assert of_all + names in error_of(make(tmp_path / "teams", **TICKETS, user_roles=["Kunde"]))
    assert yaml.safe_load(names) == ["Lena", 'Jo "X"', "Mona"]
    assert "conversation_column: rows.jsonl has no column 'case'" in error_of(
        make(path, **TICKETS | {"conversation_column": "case"})
    )


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"text_column": "text"}, "role_column"),
        ({"text_column": "text", "role_column": "by"}, "conversation_column"),
        ({"text_column": "text", "role_column": "by", "reply_to_column": "to"}, "id_column"),
        (REPLIES | {"order_column": "n"}, "order_column"),
        (TICKETS | {"messages_column": "messages"}, "messages_column"),
        (TICKETS | {"prompt_template": "{text}"}, "text_column"),
        ({"order_column": "n"}, "prompt_template and order_column"),
        (TICKETS | {"order_column": None, "date_order": "day_first"}, "date_order: set order_column too"),
        ({"order_column": "n", "prompt_template": None, "completion_template": None}, "text_column"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_any_row_is_read(make, keys, named):
    with pytest.raises(UserError, match=named):
        make("demo/data", **keys)


CELL = (
    st.none()
    | st.booleans()
    | st.integers(0, 4)
    | st.floats()
    | st.text(max_size=3)
    | st.datetimes()
    | st.lists(st.none())
)
ROW = st.fixed_dictionaries({"text": CELL, "by": st.sampled_from(["user", "agent"]), "n": CELL, "id": CELL, "to": CELL})


@settings(max_examples=200, deadline=None)
@given(cells=st.lists(ROW, max_size=5), keys=st.sampled_from([{"conversation_column": "id", "order_column": "n"},
                                                             {"id_column": "id", "reply_to_column": "to"}]))  # fmt: skip
def test_no_rows_whatever_they_hold_end_in_a_traceback(cells, keys):
    recipe = Recipe(text_column="text", role_column="by", **keys, training={}, model={})
    rows = [(f"rows.jsonl:{i}", row) for i, row in enumerate(cells, 1)]
    try:
        joined = join_messages(recipe, rows, SplitReport())
    except UserError as error:
        assert "rows.jsonl" in str(error) and "\n" not in str(error)
        return
    turns = [turn for _, row in joined for turn in row["text"]]
    assert all(turn["content"].strip() for turn in turns) and (len(turns) <= len(rows) or "reply_to_column" in keys)
