"""Personal data is counted in the report and, where the recipe says so, masked: the same in training, evaluation and chat."""

import importlib.util
import json
import random
import re
import runpy
import time
from collections import Counter
from pathlib import Path

import pytest
from launching import PROJECT
from small_rows import write_jsonl, write_parquet

from carelm.chat import question
from carelm.chat.chat import make_chat
from carelm.data import masking
from carelm.data.personal import count_unjudged, find_personal, has_html, has_signature
from carelm.data.report import format_report
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation.questions import make_questions
from carelm.recipe_file import check_identity, load_also_tests, save_recipe
from carelm.talk.session import Said, Session
from carelm.training import hub
from carelm.training.prepared import prepare

KINDS = {"E": "EMAIL", "P": "PHONE", "C": "CARD", "I": "IBAN"}
MARK = re.compile(r"⟦(.):([^⟧]*)⟧")
# (precision, recall) that docs/data.md states, of the rows in personal_rows.txt.
MEASURED = {
    "EMAIL": (1.0, 0.93),
    "PHONE": (1.0, 0.94),
    "CARD": (1.0, 1.0),
    "IBAN": (1.0, 1.0),
    "HTML": (1.0, 1.0),
    "signature": (1.0, 1.0),
}
GERMAN = {"question": "Rückruf bitte unter 030 23125 146 oder anna@beispiel.de, Bestellung 0301234567.",
          "answer": "Wir rufen an: 030 23125 146. {{Order Number}}"}  # fmt: skip


def marked_rows():
    """(region, flags, text, marks as (start, end, kind)) of each row that is marked by hand."""
    for line in (Path(__file__).parent / "personal_rows.txt").read_text(encoding="utf-8").splitlines():
        region, flags, marked = line.split("|", 2)
        text, marks, at = "", [], 0
        marked = marked.replace("\\n", "\n")
        for found in MARK.finditer(marked):
            text += marked[at : found.start()]
            marks.append((len(text), len(text) + len(found[2]), KINDS[found[1]]))
            text, at = text + found[2], found.end()
        yield None if region == "-" else region, flags, text + marked[at:], marks


def test_precision_and_recall_on_rows_marked_by_hand_are_as_the_docs_state():
    right, found, marked = Counter(), Counter(), Counter()
    rows = list(marked_rows())
    for region, flags, text, marks in rows:
        spans = {*find_personal(text, region)}
        right += Counter(kind for _, _, kind in spans & {*marks})
        found += Counter(kind for _, _, kind in spans)
        marked += Counter(kind for _, _, kind in marks)
        for kind, is_found, flag in (("HTML", has_html(text), "H"), ("signature", has_signature(text), "S")):
            found[kind] += is_found
            marked[kind] += flag in flags
            right[kind] += is_found and flag in flags
    for kind in MEASURED:
        precision, recall = right[kind] / found[kind], right[kind] / marked[kind]
        print(f"{kind:<10} marked {marked[kind]:>3}  precision {precision:.3f}  recall {recall:.3f}")
        assert (round(precision, 2), round(recall, 2)) >= MEASURED[kind] and round(recall, 2) >= MEASURED[kind][1]
    assert len(rows) >= 300 and sum(not marks and not flags for _, flags, _, marks in rows) > 150


@pytest.mark.parametrize(("region", "text", "masked"), [
    ("DE", "Mobil 0171/3920017, Auftrag 0171 3920044, ab 12.03.2024", "Mobil [PHONE], Auftrag 0171 3920044, ab 12.03.2024"),
    ("DE", "IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN [IBAN] BIC COBADEFF"),
    ("ES", "Llámeme al 612 34 56 78 por el pedido 612345678", "Llámeme al [PHONE] por el pedido 612345678"),
    ("ES", "Tarjeta 4242 4242 4242 4242, pagué 1.299,95 €", "Tarjeta [CARD], pagué 1.299,95 €"),
    ("IN", "मेरा नंबर ९८७६५४३२१० है, ऑर्डर 9876543210", "मेरा नंबर [PHONE] है, ऑर्डर 9876543210"),
    ("IN", "ईमेल संपर्क@डेटामेल.भारत, दाम ₹1,29,999", "ईमेल [EMAIL], दाम ₹1,29,999"),
    ("US", "(415) 555-0132 for order 415-555-0133, v2.10.4.1123", "[PHONE] for order 415-555-0133, v2.10.4.1123"),
    ("US", "1Z999AA10123456784, {{me@example.com}}, [Order Number]", "1Z999AA10123456784, {{me@example.com}}, [Order Number]"),
    ("US", "https://shop.example/4111111111111111?to=4155550132", "https://shop.example/4111111111111111?to=4155550132"),
    (None, "+1 415 555 0132 but 415-555-0133", "[PHONE] but 415-555-0133"),
])  # fmt: skip
def test_what_is_personal_is_replaced_and_what_looks_like_it_stays(make, tmp_path, region, text, masked):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": f"{text}!"}])
    recipe = make(rows, mask_personal_data=True, phone_region=region)
    example = make_examples(recipe)[0]["train"][0]
    assert example.prompt[0]["content"] == masked and example.completion[0]["content"] == f"{masked}!"
    assert question.compose(recipe, [text]) == masked  # in a chat, and for card_questions
    assert make_examples(make(rows, phone_region=region))[0]["train"][0].prompt[0]["content"] == text


@pytest.mark.parametrize(("region", "text"), [
    ("US", "My order number is {}"), ("US", "Order for a phone {}"), ("US", "Ticket for headphones {}"),
    ("US", '{{"order_id": "{}"}}'), ("US", '{{"accountNumber": "{}"}}'), ("IN", "My Aadhaar number is {}"),
    ("DE", "Bestellung widerrufen: 0{}"), ("DE", "Auftrag abrufen: 0{}"), ("ES", "Pedido de un automóvil {}"),
])  # fmt: skip
def test_of_random_numbers_of_another_kind_none_is_masked(region, text):
    drawn = random.Random(1)
    numbers = [drawn.randrange(10**8, 10**10) for _ in range(400)]
    assert not [number for number in numbers if find_personal(text.format(number), region)]
    assert any(find_personal(f"Tel. {zero}{number}", region) for number in numbers for zero in ("", "0"))


def test_the_report_counts_rows_and_finds_and_names_the_first(make, tmp_path):
    plain = {"question": "Wo ist mein Paket?", "answer": "Unterwegs."}
    signed = {"question": "Danke<br>sehr\n\nViele Grüße\nTom", "answer": "Gern."}
    rows = write_jsonl(tmp_path / "rows.jsonl", [plain, GERMAN, signed, GERMAN | {"answer": "Ja, a@b.de."}])
    for keys, begins in (
        ({"phone_region": "DE"}, "personal data: "),
        ({"phone_region": "DE", "mask_personal_data": True}, "mask_personal_data replaces "),
    ):
        reports = make_examples(make(rows, **keys))[1]
        counts = "3 phone numbers in 2 rows (first: rows.jsonl:2), 3 e-mail addresses in 2 rows (first: rows.jsonl:2)"
        others = "HTML in 1 row (first: rows.jsonl:3), a signature in 1 row (first: rows.jsonl:3)"
        way = "strip_html: true makes plain text of HTML"
        assert reports["train"].personal_data["sentence"] == f"{begins}{counts}; {others}; {way}"
        assert reports["train"].personal_data["found"]["PHONE"] == {"number": 3, "rows": 2, "first": "rows.jsonl:2"}
    recipe = make(rows, mask_personal_data=True)
    masked, left = [line.strip() for line in format_report(prepare(recipe, make_chat(recipe)).report).splitlines()[3:5]]
    assert masked.startswith("mask_personal_data replaces 3 e-mail addresses in 2 rows (first: rows.jsonl:2)")
    assert left == (
        "mask_personal_data: 3 numbers without + may be phone numbers in 2 rows, left as they are (first: rows.jsonl:2): set "
        "phone_region (DE, US, IN ...) to tell them apart"
    )


@pytest.mark.parametrize(
    "text, number",
    [
        ("Call 030 2312514, or (0151) 2345678, or 415 555 2671.", 3),
        ("Call +49 30 2312514.", 0),  # it is one
        ("Order 4155552671, ticket 0301234567, IBAN DE89 3704 0044 0532 0130 00, card 4111 1111 1111 1111", 0),
        (
            "On 2024-05-01 12:30, 2019 - 2020, 1234567 EUR, 192.168.100.200, {{415 555 2671}}, https://x.de/0301234567",
            0,
        ),
        ("Lot 1234567", 0),  # no area code
    ],
)
def test_numbers_that_only_a_region_would_tell_from_phone_numbers_are_counted(make, tmp_path, text, number):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": "Yes."}])
    said = make_examples(make(rows))[1]["train"].personal_data["unjudged"]
    if number:
        assert said.startswith(
            f"{number} numbers without + may be phone numbers in 1 row (first: rows.jsonl:1): set phone_"
        )
    else:
        assert said == ""
    for keys in ({"phone_region": "DE"}, {"phone_region": "US", "mask_personal_data": True}):
        assert not make_examples(make(rows, **keys))[1]["train"].personal_data["unjudged"]


def test_without_a_mask_the_first_rows_are_counted_and_with_one_all(make, tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "MOST_COUNTED", 3)
    rows = [{"question": f"Write to me{i}@example.com", "answer": "Yes."} for i in range(5)]
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = [
        make_examples(make(rows, **k))[1]["train"].personal_data["sentence"] for k in ({}, {"mask_personal_data": True})
    ]
    assert said[0].startswith("personal data in the first 3 rows: 3 e-mail addresses in 3 rows")
    assert said[1].startswith("mask_personal_data replaces 5 e-mail addresses in 5 rows")


def test_a_column_of_numbers_says_by_its_name_which_they_are(make, tmp_path):
    row = {"order_id": 9876543210, "mobile": 9876543211, "question": "9876543212 pe call karo", "answer": "Ok."}
    template = "Order {order_id}, {mobile}: {question}"
    recipe = make(
        write_jsonl(tmp_path / "rows.jsonl", [row]),
        mask_personal_data=True,
        phone_region="IN",
        prompt_template=template,
    )
    examples, reports = make_examples(recipe)
    assert examples["train"][0].prompt[0]["content"] == "Order 9876543210, [PHONE]: [PHONE] pe call karo"
    assert reports["train"].personal_data["found"]["PHONE"]["number"] == 2


def test_the_recipes_own_text_and_ids_stay(make, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GERMAN | {"mail": "anna@beispiel.de"}])
    recipe = make(rows, mask_personal_data=True, system_prompt="Hotline: +49 30 23125146", id_column="mail")
    example = make_examples(recipe)[0]["train"][0]
    assert example.prompt[0]["content"] == "Hotline: +49 30 23125146" and example.id == "anna@beispiel.de"


CALL = {"name": "find", "arguments": {"mail": "a@b.de", "of": {"phones": ["+49 30 23125146"]}, "n": 5,
                                        "card": 4111111111111111, "at": 0.5}}  # fmt: skip
TURNS = [
    {"role": "system", "content": "You answer for a@b.de."},
    {"role": "user", "content": "Mail: a@b.de"},
    {"role": "assistant", "content": "", "reasoning_content": "a@b.de it is", "tool_calls": [
        {"type": "function", "id": "x@y.de", "function": CALL}]},
    {"role": "tool", "name": "find@b.de", "content": '{"phone": "+49 30 23125146"}'},
    {"role": "assistant", "content": "It is +49 30 23125146."},
]  # fmt: skip
MASKED = [
    TURNS[0] | {"content": "You answer for [EMAIL]."},
    {"role": "user", "content": "Mail: [EMAIL]"},
    {"role": "assistant", "content": "", "reasoning_content": "[EMAIL] it is", "tool_calls": [
        {"type": "function", "id": "x@y.de", "function": {"name": "find", "arguments": {
            "mail": "[EMAIL]", "of": {"phones": ["[PHONE]"]}, "n": 5,
            "card": "[CARD]", "at": 0.5}}}]},
    {"role": "tool", "name": "find@b.de", "content": '{"phone": "[PHONE]"}'},
    {"role": "assistant", "content": "It is [PHONE]."},
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_turns_are_masked_with_what_they_hand_to_tools(make, tmp_path, form):
    file = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_jsonl(file, [{"messages": TURNS}])
    elif form == "parquet":
        write_parquet(file, [{"messages": TURNS}])
    else:
        file.write_text(
            'messages\n"' + json.dumps(TURNS, ensure_ascii=False).replace('"', '""') + '"\n', encoding="utf-8"
        )
    examples, reports = make_examples(make(file, messages_column="messages", mask_personal_data=True))
    assert examples["train"][0].prompt + examples["train"][0].completion == MASKED
    found = reports["train"].personal_data["found"]
    masks = json.dumps(MASKED)  # the ids and names that stay are not counted
    assert {kind: of["number"] for kind, of in found.items()} == {k: masks.count(f"[{k}]") for k in found}
    assert found.keys() == {"EMAIL", "PHONE", "CARD"}


@pytest.mark.parametrize(("arguments", "masked"), [
    ({"phone": 2125550132, "order_id": 2125550132}, {"phone": "[PHONE]", "order_id": 2125550132}),
    ({"of": [4111111111111111, True, None]}, {"of": ["[CARD]", True, None]}),
    ({"total": 2125550132, "diff": -2125550132, "rate": 2125550132.5}, None),
    ({"orderId": 2125550132, "n": float("inf"), "m": float("nan"), "accountNumber": 4111111111111111}, None),
])  # fmt: skip
def test_of_numbers_in_arguments_those_that_are_personal_are_masked(make, tmp_path, arguments, masked):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", [GERMAN]), mask_personal_data=True, phone_region="US")
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert masking.clean_turns(recipe, [turn])[0]["tool_calls"][0]["function"]["arguments"] == (masked or arguments)


def test_one_message_a_row_is_masked_and_conversations_stay_apart(make, tmp_path):
    rows = [{"t": f"{text} {who}@b.de", "r": role, "c": f"{who}@b.de"} for who in "ab" for role, text in
            (("user", "Mail:"), ("assistant", "So it is:"))]  # fmt: skip
    keys = {"text_column": "t", "role_column": "r", "conversation_column": "c", "mask_personal_data": True}
    examples, reports = make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), **keys))
    assert examples["train"][0].completion[0]["content"] == "So it is: [EMAIL]"
    assert reports["train"].rows == 2 and reports["train"].dropped == {"duplicate": 1}  # alike, once masked


def test_references_and_compared_columns_are_masked(make, tmp_path):
    row = {"question": "Wo? a@b.de", "answer": "Hier, c@d.de", "other": "Da: e@f.de"}
    folder = tmp_path / "data"
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [row | {"question": f"{split} a@b.de"}])
    keys = {
        "reference_columns": ["answer", "other"],
        "overlap_columns": ["question", "other"],
        "labels": ["Hier", "Da"],
    }
    example = make_examples(make(folder, mask_personal_data=True, **keys))[0]["test"][0]
    assert example.references == ("Hier, [EMAIL]", "Da: [EMAIL]")
    assert example.compared == ("test [EMAIL]", "Da: [EMAIL]") and example.columns == ("test [EMAIL]",)


def test_a_chat_reads_and_keeps_what_is_masked(make, tmp_path):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", [GERMAN]), mask_personal_data=True, phone_region="DE")
    session = Session(recipe, ["base"], "Write to shop@example.com", "now")
    session.add(question.compose(recipe, ["Ich bin a@b.de"]), {"base": Said("Gut, a@b.de, 030 23125 146", "stop")})
    assert [m["content"] for m in session.messages("base")] == [
        "Write to shop@example.com", "Ich bin [EMAIL]", "Gut, [EMAIL], [PHONE]"
    ]  # fmt: skip


def test_it_is_part_of_the_run_and_stands_in_its_card(make, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GERMAN])
    masked = make(rows, mask_personal_data=True, phone_region="DE")
    save_recipe(masked, tmp_path / "recipe.yaml")
    prints = []
    for keys in ({}, {"mask_personal_data": True}, {"mask_personal_data": True, "phone_region": "DE"}):
        recipe = make(rows, **keys)
        prints.append(prepare(recipe, make_chat(recipe)).fingerprint)
    assert len({*prints}) == 3
    with pytest.raises(UserError, match="mask_personal_data .was True, is False., phone_region .was 'DE', is None."):
        check_identity(make(rows), tmp_path / "recipe.yaml")
    metrics = dict.fromkeys(("eval_loss_before", "eval_loss", "train_loss", "global_step", "num_train_tokens", "precision",
                             "world_size", "zero_stage", "wall_seconds", "trainable_percent"), 1)  # fmt: skip
    cards = [hub.model_card(r, metrics | {"trainable_parameters": 1}, {}) for r in (masked, make(rows))]
    assert "phone numbers (of DE, and those with +)" in cards[0] and "[EMAIL]" in cards[0] and "[EMAIL]" not in cards[1]


def test_a_region_that_masks_nothing_makes_no_other_run(make, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GERMAN])
    counted = make(rows, phone_region="DE")
    save_recipe(counted, tmp_path / "recipe.yaml")
    check_identity(make(rows), tmp_path / "recipe.yaml")
    assert prepare(counted, make_chat(counted)).fingerprint == prepare(make(rows), make_chat(counted)).fingerprint
    save_recipe(make(rows, mask_personal_data=True, phone_region="DE"), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="phone_region .was 'DE', is 'US'."):
        check_identity(make(rows, mask_personal_data=True, phone_region="US"), tmp_path / "recipe.yaml")


LONG = 20_000


@pytest.mark.parametrize("text", [
    "a" * LONG + "@", "a." * (LONG // 2) + "@b", "%" * LONG + " (at) b.de", "a@" + "b." * LONG + "1", "a@" * (LONG // 2),
    "a" * LONG + "@b.de " + "c" * LONG, "4111111111111111 " * (LONG // 17), "{{a " * (LONG // 4) + "030 23125146",
    "<a " * (LONG // 3), "regards" + " " * LONG + "\n" * LONG, "DE89 3704 0044 " * (LONG // 15),
], ids=lambda text: f"{text[:3]}...{text[-8:].strip()}")  # fmt: skip
def test_a_long_text_takes_no_longer_for_each_of_its_letters(text):
    started = time.process_time()
    find_personal(text), has_html(text), has_signature(text)
    assert time.process_time() - started < 1.5


def test_an_address_behind_a_long_run_is_found_and_two_that_touch_are_two():
    assert find_personal("x" * 100 + " a@b.de") == [(101, 107, "EMAIL")]
    assert find_personal("a@b.de%20c@d.de") == [(0, 6, "EMAIL"), (6, 15, "EMAIL")]


def test_rows_of_other_recipes_are_masked_too(make, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GERMAN])
    write_jsonl(tmp_path / "other.jsonl", [{"q": "Ruf 030 23125 147", "a": "Gut."}])
    other = tmp_path / "other.yaml"
    templates = "prompt_template: '{q}'\ncompletion_template: '{a}'\ntest_fraction: 0\nvalidation_fraction: 0\n"
    other.write_text(f"dataset_name: {tmp_path / 'other.jsonl'}\n{templates}")
    keys = {
        "mask_personal_data": True,
        "phone_region": "DE",
        "also_train": {str(other): "all"},
        "also_test": [str(other)],
    }
    recipe = make(rows, **keys)
    for one in (recipe.mixed[str(other)], load_also_tests(recipe)["other"]):
        assert make_examples(one)[0]["train"][0].prompt[0]["content"] == "Ruf [PHONE]"


@pytest.mark.parametrize(("keys", "problem"), [
    ({"phone_region": "UK"}, "phone_region: 'UK' is no country's two letters; did you mean GB?"),
    ({"phone_region": "de"}, "phone_region: 'de' is no country's two letters; did you mean DE?"),
    ({"phone_region": False}, "is not of type str | None; in YAML the words yes, no, on and off stand in quotes"),
    ({"phone_region": "Germany"}, "phone_region: 'Germany' is no country's two letters; write DE, US, IN or another"),
])  # fmt: skip
def test_a_region_that_is_none_is_one_line(make, tmp_path, keys, problem):
    with pytest.raises(UserError) as caught:
        make(write_jsonl(tmp_path / "rows.jsonl", [GERMAN]), **keys)
    assert str(caught.value).endswith(problem)


def test_without_the_libraries_a_mask_is_refused_and_a_report_says_what_it_lacks(make, tmp_path, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GERMAN])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "stdnum" else find_spec(name, *a))
    masking._is_installed.cache_clear()
    try:
        report = make_examples(make(rows))[1]["train"]
        lacks = "python-stdnum not installed: pip install -r requirements.txt"
        assert report.personal_data["sentence"] == f"personal data is not looked for: {lacks}"
        with pytest.raises(UserError, match=f"^mask_personal_data: {lacks}$"):
            make(rows, mask_personal_data=True)
    finally:
        masking._is_installed.cache_clear()


def test_the_evaluator_asks_and_compares_what_is_masked(make, tmp_path):
    folder = tmp_path / "data"
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [GERMAN | {"question": f"{split}: {GERMAN['question']}"}])
    recipe = make(folder, mask_personal_data=True, phone_region="DE", num_shots=1)
    questions, _ = make_questions(recipe, make_chat(recipe))
    asked = "Rückruf bitte unter [PHONE] oder [EMAIL], Bestellung 0301234567."
    answer = "Wir rufen an: [PHONE]. {{Order Number}}"
    assert [m["content"] for m in questions[0].messages] == [f"train: {asked}", answer, f"test: {asked}"]
    assert questions[0].references == [answer]


def test_a_chat_says_that_it_masks(make, tmp_path, capfd):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", [GERMAN]), mask_personal_data=True)
    runpy.run_path(str(PROJECT / "train/chat.py"))["for_chat"](recipe)
    assert "mask_personal_data: the models read [EMAIL], [PHONE]" in capfd.readouterr().err


@pytest.mark.parametrize("text, number", [
    ("call 0171 2345678", 1), ("98765 43210", 1), ("171 2345", 0), ("+99 999 999 9999", 0), ("1234 5678 9012 3456", 0),
])  # fmt: skip
def test_what_may_be_a_phone_number_has_no_plus_and_as_many_digits_as_one(text, number):
    assert count_unjudged(text) == number
