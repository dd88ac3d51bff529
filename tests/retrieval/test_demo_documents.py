"""The demo's documents say what its conversations say, and are what their script gives."""

import importlib.util
import json
import sys

import pytest
from conftest import PROJECT
from small_files import words

from carelm.recipe import Recipe
from carelm.retrieval.documents import find
from carelm.retrieval.passages import passages_of

# By intent what answers and one passage have alike.
FACTS = {
    "order_status": "two to four working days", "cancel_order": "until it is packed", "change_address": "seven days",
    "late_parcel": "two working days", "damaged_item": "care@harbourandpine.example", "delivery_cost": "4.90 euros",
    "return_item": "30 days", "refund_status": "five working days", "payment_failed": "ten minutes", "invoice_copy": "PDF",
    "gift_card": "three years", "reset_password": "one hour", "change_email": "My Account", "product_price": "59.90",
    "product_care": "lambswool", "warranty": "receipt or the order number", "club_points": "100 points are worth five euros",
    "club_join": "at the till", "prescription": "one working day after we get it", "side_effects": "0555 0142",
    "dose": "leaflet", "storage": "below 25 degrees", "emergency": "112", "vaccination": "Tuesday and Thursday from 14 to 18",
    "pressure_check": "ten minutes", "opening_hours": "9 to 19", "complaint": "two working days", "praise": "kind words",
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """Each file's passages and report."""
    found = find([str(PROJECT / "demo/documents")])
    assert not found.unused
    return {name: passages_of(path, name, Recipe(), words) for name, path in found.files.items()}


def test_all_are_read_and_each_is_cited_by_page_or_heading(made):
    assert len(made) == 8 and not [report for _, report in made.values() if report.unreadable or report.notes]
    pages = {p.page for p in made["returns-and-refunds.pdf"][0]}
    assert pages == {1, 2, 3} and made["returns-and-refunds.pdf"][1].dropped == {
        "repeated line": 3,
        "contents line": 15,
    }
    for name in ("delivery.docx", "product-care.html", "pharmacy-corner.md"):
        assert sum(p.heading is not None for p in made[name][0]) > 4
    assert len(made["catalogue.csv"][0]) == 32


def test_what_each_intents_answers_say_stands_in_a_passage(made):
    rows = [json.loads(line) for line in open(PROJECT / "demo/data/train.jsonl", encoding="utf-8")]
    answers = {row["intent"]: "" for row in rows}
    for row in rows:
        answers[row["intent"]] += " ".join(m["content"] for m in row["messages"] if m["role"] == "assistant")
    texts = [passage.text.lower() for passages, _ in made.values() for passage in passages]
    assert answers.keys() == FACTS.keys()
    for intent, fact in FACTS.items():
        assert fact in answers[intent], intent
        assert any(fact.lower() in text for text in texts), intent


def test_the_files_are_what_the_script_gives(monkeypatch, made):
    monkeypatch.setattr(sys, "path", [str(PROJECT / "demo"), *sys.path])
    spec = importlib.util.spec_from_file_location("make_documents", PROJECT / "demo/make_documents.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, make in script.FILES.items():
        if name.endswith(".docx"):  # its other parts are those of python-docx's version
            from docx import Document

            assert (
                Document(script.io.BytesIO(make())).element.xml
                == Document(PROJECT / "demo/documents" / name).element.xml
            )
        else:
            assert make() == (PROJECT / "demo/documents" / name).read_bytes()
    size = sum(path.stat().st_size for path in (PROJECT / "demo/documents").iterdir())
    assert size < 300_000
