"""A PDF's lines become the paragraphs, headings and pages that its reader sees; its footers and contents do not."""

import time

import pytest
from small_files import document_of, flowing, page, reason_of, texts_of, write_pdf

LONG = (
    "You can send back what you do not like within thirty days of the day on which it came. Put it into its box, "
    "print the free label and bring the parcel to the post. Your money comes back within five working days after the "
    "parcel has reached us."
)


def read(tmp_path, pages, **about):
    return document_of(tmp_path, "returns-and_refunds.pdf", write_pdf.pdf(pages, **about))


def test_lines_that_run_on_are_one_paragraph_and_lines_that_end_early_stay_lines(tmp_path):
    prices = page("Blanket 59.90", "Lamp 34.50", "Kettle 42.00", top=600)
    document, _ = read(tmp_path, [[*flowing(LONG), *prices]])
    assert texts_of(document) == [(1, None, f"{LONG}\n\nBlanket 59.90\nLamp 34.50\nKettle 42.00")]


def test_larger_and_bold_lines_are_headings_with_those_above_them_and_the_largest_is_the_title(tmp_path):
    lines = page(
        ("Returns", {"size": 20, "bold": True}), "", ("How to pack", {"size": 15}), "Use the box.", ("Glass", {"bold": True}),
        "Wrap it twice.", ("Money", {"size": 15}), "It comes back."
    )  # fmt: skip
    document, _ = read(tmp_path, [[line for line in lines if line.text], flowing(LONG)])
    assert document.title == "Returns"
    assert texts_of(document) == [
        (1, "How to pack", "Use the box."),
        (1, "How to pack > Glass", "Wrap it twice."),
        (1, "Money", "It comes back."),
        (2, "Money", LONG),
    ]


def test_the_files_own_title_counts_unless_a_program_made_it_up_and_bookmarks_say_what_is_a_heading(tmp_path):
    pages = [page("1. Packing", LONG[:60]), page("2. Money", LONG[:60])]
    document, _ = read(tmp_path, pages, title="Our returns", bookmarks=[("1. Packing", 0), ("Money", 1)])
    assert (document.title, [s.heading for s in document.sections]) == ("Our returns", ["1. Packing", "2. Money"])
    for made_up in ("Microsoft Word - x_final2.docx", "about:blank", "https://example.org/returns?id=3"):
        document, _ = read(tmp_path, pages, title=made_up, subject="Storm lamp")
        assert (document.title, document.product) == ("returns and refunds", "Storm lamp")


def test_footers_page_numbers_and_running_heads_are_dropped_and_counted(tmp_path):
    pages, texts = [], []
    for number in range(1, 7):
        texts.append(" ".join([*LONG.split()[number:], *LONG.split()[:number]]) + ".")
        head = f"Chapter {1 + number // 4}: Returns {number + 2}" if number % 2 else f"{number + 2} Harbour and Pine"
        pages.append([*page(head, top=820), *flowing(texts[-1]),
                      *page(f"Harbour & Pine, version 4, page {number} of 6", top=30)])  # fmt: skip
    document, report = read(tmp_path, pages)
    assert texts_of(document) == [(number, None, text) for number, text in enumerate(texts, 1)]
    assert report.dropped["repeated line"] == 12


def test_a_line_that_stands_on_most_pages_within_their_text_stays(tmp_path):
    pages = [page(*(f"Word {number}{letter} here." for letter in "abcd"), "Ask the desk.",
                  *(f"Word {number}{letter} here." for letter in "efgh")) for number in range(4)]  # fmt: skip
    document, _ = read(tmp_path, [[*p[:4], p[4], *p[5:]] for p in pages])
    assert sum("Ask the desk." in section.text for section in document.sections) == 4


CONTENTS = [
    "Contents",
    "1. Returns . . . . . . . . . . . . 3",
    "1.1 Packing ......................... 4",
    "1.2 How to send back what is too large",
    "for the post ........................ 5",
    "2. Money …………………… 6",
]


@pytest.mark.parametrize("lines", [CONTENTS, ["Contents", "Returns 3", "Packing 4", "Large things 4", "Money 16"]])
def test_tables_of_contents_are_dropped_and_counted_with_what_stands_below_them_kept(tmp_path, lines):
    document, report = read(tmp_path, [page(*lines, "", "Read this first.")[:-2] + page("Read this first.", top=300)])
    assert texts_of(document) == [(1, None, "Read this first.")]
    assert report.dropped["contents line"] == len(lines)


def test_a_form_and_a_price_list_are_no_contents(tmp_path):
    lines = ["Name ..........................", "Order number ..........................", "Date ....................",
             "Socks 12", "Lamp 34", "Chair 129"]  # fmt: skip
    document, report = read(tmp_path, [page(*lines)])
    assert document.sections[0].text.split("\n") == lines and not report.dropped


def test_words_parted_at_a_lines_end_are_whole_again_and_keep_a_hyphen_that_is_theirs(tmp_path):
    lines = page("We send the informa-", "tion to your e-mail address; for the water-", "proof jacket see the self-",
                 "service desk. Every well-known desk has it: a well-", "known desk, and Harbour-",
                 "Pine too. It has waterproof lamps.")  # fmt: skip
    document, _ = read(tmp_path, [lines])
    read_as = " ".join(document.sections[0].text.split())
    for whole in (
        "the information to",
        "the waterproof jacket",
        "the self-service desk",
        "a well-known desk",
        "Harbour-Pine too",
    ):
        assert whole in read_as


def test_a_sentence_that_goes_on_on_the_next_page_is_whole_on_the_page_where_it_begins(tmp_path):
    document, _ = read(
        tmp_path, [flowing(LONG + " What is broken when it comes"), flowing("is paid back at once. Ask us.")]
    )
    assert texts_of(document) == [
        (1, None, LONG + " What is broken when it comes is paid back at once."),
        (2, None, "Ask us."),
    ]


def test_points_of_a_list_are_lines_and_each_has_its_own_next_lines(tmp_path):
    first, second = list(write_pdf.wrapped(LONG[:140], 440))
    points = [*page("\u2022 " + first), *page(second, left=80, top=766), *page("\u2022 The second.", top=752)]
    document, _ = read(tmp_path, [[*points, *flowing(LONG, top=738)]])
    assert document.sections[0].text.split("\n") == [f"- {LONG[:140]}", "- The second.", "", LONG]


def test_the_rows_of_a_table_are_rows_with_their_cells_parted_and_its_bold_header_is_no_heading(tmp_path):
    rows = [
        ("Product", "Price", "Stock"),
        ("Skerry wool blanket", "59.90 euros", "12"),
        ("Lantern storm lamp", "34.50 euros", "7"),
    ]
    cells = [
        write_pdf.Words(text, x, 500 - 16 * i, bold=i == 0)
        for i, row in enumerate(rows)
        for x, text in zip((70, 250, 400), row)
    ]
    document, _ = read(tmp_path, [[*flowing(LONG), *cells]])
    assert texts_of(document) == [(1, None, LONG + "\n\n" + "\n".join(" | ".join(row) for row in rows))]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%PDF-1.4\nrubbish", "broken"),
        (write_pdf.pdf([page("Hello")])[:300], "broken"),
        (write_pdf.pdf([[], []]), "has no text"),
        (b"", "is empty"),
        (b"GIF89a", "is no PDF"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(tmp_path, content, reason):
    assert reason in reason_of(tmp_path, "a.pdf", content)


def encrypted() -> bytes:
    """A PDF that no password opens, the empty one neither."""
    lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>] /Root" % (
        b"11" * 32,
        b"22" * 32,
    )
    return write_pdf.pdf([page("Secret")]).replace(b"/Root", lock)


def scanned(number: int, *more: list) -> bytes:
    """A PDF of pages that are one picture each, and of more pages."""
    mark = "x" * 80
    content = write_pdf.pdf([*[page(mark)] * number, *more])
    drawn = write_pdf.pdf([page(mark)]).split(b"stream\n")[1].removesuffix(b"\nend")
    picture = b"q 400 0 0 400 50 50 cm BI /W 1 /H 1 /BPC 8 /CS /G ID z EI Q"
    return content.replace(drawn, picture.ljust(len(drawn)))


def test_an_encrypted_and_a_scanned_pdf_say_what_to_do(tmp_path):
    assert reason_of(tmp_path, "a.pdf", encrypted()) == "is encrypted; save it without a password"
    assert reason_of(tmp_path, "a.pdf", scanned(2)) == "is scanned: has no text; run OCR first"
    document, report = document_of(tmp_path, "b.pdf", scanned(2, page("A page with words.")))
    assert texts_of(document) == [(3, None, "A page with words.")]
    assert report.notes == ["2 of 3 pages are scanned and have no text (first: 1, 2); run OCR first"]


def test_two_hundred_pages_are_read_in_under_two_seconds(tmp_path):
    content = write_pdf.pdf([flowing(f"{LONG} {number} " * 8) for number in range(210)])
    began = time.process_time()
    document, report = document_of(tmp_path, "a.pdf", content)
    assert report.pages == 210 and len(document.sections) == 210 and time.process_time() - began < 2
