"""Passages hold all that a document says, once, in its order, within their bound; each file's follow from that file alone."""

import re
import time
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_files import page, put, words, write_pdf

from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.retrieval.content import Document, FileReport, Section
from carelm.retrieval.documents import doubles, find
from carelm.retrieval.passages import cut, format_report, passages_of


def pieces(text: str, limit: int, count=words) -> list[str]:
    return [p.text for p in cut([Document("a", [Section(text)])], limit, count)]


def test_a_passage_says_what_it_belongs_to_in_front_of_its_text():
    document = Document("a.pdf", [Section("Wipe it.", 3, "Care > Glass")], "Storm lamp care", "Storm lamp")
    (passage,) = cut([document], 50, words)
    assert (passage.document, passage.page, passage.heading) == ("a.pdf", 3, "Care > Glass")
    assert passage.indexed.split("\n") == ["Storm lamp care", "Storm lamp", "Care > Glass", "Wipe it."]


def test_passages_end_where_a_paragraph_does_else_a_line_else_a_sentence():
    assert pieces("one two\n\nthree four five\n\nsix", 4) == ["one two", "three four five\n\nsix"]
    assert pieces("- one two three\n- four five six\n- seven eight", 5) == [
        "- one two three",
        "- four five six",
        "- seven eight",
    ]
    text = "He paid approx. 5. May it help! See e.g. Mr. Berg on No. 5 there. Yes? (No.) The end."
    assert pieces(text, 8) == [
        "He paid approx. 5. May it help!",
        "See e.g. Mr. Berg on No. 5 there.",
        "Yes? (No.) The end.",
    ]


def test_only_a_sentence_that_is_longer_is_cut_and_then_at_words_and_a_text_without_blanks_anywhere():
    assert pieces("a b c d e f g. h i", 3) == ["a b c", "d e f", "g. h i"]
    assert pieces("abcdefghij", 4, len) == ["abcd", "efgh", "ij"]
    assert pieces("今日は。明日も。昨日。", 4, len) == ["今日は。", "明日も。", "昨日。"]
    assert pieces("今日は。明日も。昨日。", 8, len) == ["今日は。明日も。", "昨日。"]


def test_a_table_that_is_cut_has_its_first_row_in_each_part_and_one_that_fits_stays_whole():
    rows = [f"lamp{i} | {i} euros" for i in range(6)]
    text = "\n".join(["name | price", *rows])
    first, *others = pieces(text, 12)
    assert [p.split("\n")[0] for p in (first, *others)] == ["name | price"] * len((first, *others)) and len(others) > 1
    assert [row for p in (first, *others) for row in p.split("\n")[1:]] == rows
    assert pieces(f"{'word ' * 20}\n\n{text}", 40)[1] == text


def test_a_short_rest_shares_with_the_passage_before_it():
    assert [words(p) for p in pieces("\n\n".join(["a b"] * 11), 20)] == [10, 12]


@pytest.mark.parametrize(
    "text",
    [" " * 200_000 + "x", "# " + " " * 200_000 + "x", "A. B. " * 30_000, "word\n" * 30_000, "word " * 40_000,
     ". . x\n" * 30_000, "<p>x" * 30_000, "**a " * 40_000, "[a](" * 40_000, "# a\n" * 10_000, "<!--" * 50_000,
     "<style>" + "{" * 200_000, "| " * 90_000],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_no_file_takes_more_time_than_its_length_allows(tmp_path, text):
    for name in ("a.txt", "a.md", "a.html"):
        began = time.process_time()
        passages_of(put(tmp_path, name, text), name, Recipe(), words)
        assert time.process_time() - began < 5


WORD = st.text(st.sampled_from("abcXYZ019äß.,!?|-"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORD, st.sampled_from([" ", " ", " ", ". ", "\n", "\n\n"])), max_size=80), st.integers(8, 40))
def test_nothing_is_lost_or_added_and_no_passage_is_over_its_bound(parts, limit):
    text = re.sub(r"\n\s*\n", "\n\n", "".join(map("".join, parts))).replace("|", "").strip()
    for count in (words, len):
        found = pieces(text, limit, count)
        assert all(count(piece) <= limit for piece in found)
        if re.search(r"\w", text):
            assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)


def test_ids_stay_where_other_files_come_or_other_passages_of_the_file_change(tmp_path):
    text = "One two.\n\nThree four.\n\nOne two."
    before = cut([Document("a", [Section(text)])], 2, words)
    after = cut([Document("a", [Section(text.replace("Three", "Five"))])], 2, words)
    assert len({p.id for p in before}) == 3 and [a.id == b.id for a, b in zip(before, after)] == [True, False, True]
    assert before[0].id != cut([Document("b", [Section(text)])], 2, words)[0].id


def test_files_folders_and_globs_are_reached_once_with_short_names_and_what_is_no_document_is_named(
    tmp_path, monkeypatch
):
    for name in ("docs/a.md", "docs/deep/b.pdf", "docs/deep/c.DOCX", "docs/old.doc", "docs/x.png", "docs/.hidden.md",
                 "docs/~$c.docx", "other/a.md", "rows.csv"):  # fmt: skip
        put(tmp_path, name, "x")
    (tmp_path / "docs/loop").symlink_to(tmp_path / "docs")
    (tmp_path / "docs/self.md").symlink_to("self.md")
    (tmp_path / "docs/again.md").symlink_to(tmp_path / "docs/a.md")
    found = find(
        [str(tmp_path / "docs"), str(tmp_path / "other/a.md"), str(tmp_path / "docs/*.md"), str(tmp_path / "*.csv")]
    )
    assert sorted(found.files) == ["a.md", "deep/b.pdf", "deep/c.DOCX", "old.doc", "other/a.md", "rows.csv", "self.md"]
    assert found.unused == ["x.png", "~$c.docx"]
    monkeypatch.chdir(tmp_path)
    assert sorted(find(["docs/**/*.pdf", "o*r"]).files) == ["deep/b.pdf", "other/a.md"]
    assert sorted(find(["docs/**"]).files) == ["a.md", "deep/b.pdf", "deep/c.DOCX", "old.doc", "self.md"]


def test_an_entry_that_leads_nowhere_and_one_without_documents_are_errors_that_name_it(tmp_path):
    put(tmp_path, "manual.pdf", "x")
    put(tmp_path, "pictures/a.png", "x")
    for entries, named in (
        ([], "documents: none is named"),
        ([str(tmp_path / "manuel.pdf")], "did you mean"),
        ([str(tmp_path / "*.docx")], "no file matches"),
        ([str(tmp_path / "pictures")], "holds no document (there: a.png)"),
    ):
        with pytest.raises(UserError, match=re.escape(named)):
            find(entries)


def test_names_that_are_no_utf8_or_hold_line_ends_can_be_shown_and_the_files_are_read(tmp_path):
    for number, name in enumerate((b"caf\xe9.txt", b"caf\xff.txt", b"two\nlines.txt")):
        (tmp_path / "d").mkdir(exist_ok=True)
        with open(bytes(tmp_path / "d") + b"/" + name, "w") as file:
            file.write(f"Text {number}.")
    found = find([str(tmp_path / "d")])
    assert len(found.files) == 3
    for name, path in found.files.items():
        assert name.encode() and name.isprintable()
        passages, report = passages_of(path, name, Recipe(), words)
        assert report.unreadable is None and passages[0].document == name


def test_a_file_that_goes_after_it_was_found_is_named_and_the_rest_goes_on(tmp_path):
    put(tmp_path, "a.md", "# A\nOne.")
    put(tmp_path, "b.md", "Two.")
    (tmp_path / "c.md").symlink_to("c.md")
    (tmp_path / "d.pdf").write_bytes(write_pdf.pdf([page("Three."), page("Four.")]))
    found = find([str(tmp_path)])
    (tmp_path / "b.md").unlink()
    reports = {name: passages_of(path, name, Recipe(), words)[1] for name, path in found.files.items()}
    assert [name for name, report in reports.items() if report.passages] == ["a.md", "d.pdf"]
    text = format_report(reports, found.unused)
    assert "not read: b.md is gone" in text and "not read: c.md is gone, or a link that leads nowhere" in text
    assert re.search(r"^all +2 +2 +3  of 2 files$", text, re.M)


def test_reports_go_through_json_and_name_what_was_dropped():
    report = FileReport(documents=1, pages=9, passages=4, notes=["is read as HTML"])
    report.drop("repeated line", 8)
    again = FileReport(**asdict(report))
    assert again == report and "8 repeated lines" in format_report({"a.pdf": again}, [])
    assert "is read as HTML" in format_report({"a.pdf": again}, [])


def test_of_files_with_one_content_the_first_counts():
    assert doubles({"b": "1", "a": "1", "c": "2", "d": "1"}) == {"b": "a", "d": "a"}
