"""`strip_html` makes plain text of HTML and touches no other text, the same in rows and in what a model is asked."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_rows import turns_of, write_jsonl

from carelm.chat.chat import make_chat
from carelm.chat.question import as_trained, compose
from carelm.data.html_text import plain_text
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation.questions import make_questions

SHOWN = {
    "Guten Tag<br>\nDas macht 5&nbsp;&euro;.<br/><br>Gr&uuml;&szlig;e": "Guten Tag\nDas macht 5 €.\n\nGrüße",
    "<p>Size <b>38</b>:</p>\n<ul>\n <li>red</li>\n <li>blue</li>\n</ul>\n<p>Bye</p>": "Size 38:\n\n- red\n- blue\n\nBye",
    "<div>Hello</div><div><br></div><div>Bye</div>": "Hello\n\nBye",
    "<table><tr><td>A</td><td>1</td></tr><tr><td>B</td><td>2</td></tr></table>": "A 1\nB 2",
    'See <a class="x" href="https://shop.de/?a=1&amp;copy=2">here</a>, <a href="mailto:a@b.de">a@b.de</a>.':
        "See here (https://shop.de/?a=1&copy=2), a@b.de.",
    "<head><style>p {}</style></head><!-- <b>no --><script>if (a < b) {}</script>Text &#x1F600; &eacute;": "Text 😀 é",
    "Two<br />lines &amp;uuml; &lt;br&gt;and three": "Two\nlines ü\nand three",
    "Dear <b>Ann</b>,\n\n  one &amp; two\nthree": "Dear Ann,\n\none & two\nthree",
    "<p title=\"don't > do\">x</p><img src='a.png'>": "x",
}  # fmt: skip


@pytest.mark.parametrize("written", SHOWN)
def test_html_is_what_a_browser_shows_of_it(written):
    assert plain_text(written) == SHOWN[written]


@pytest.mark.parametrize(
    "text", ["a < b and b > a", " <order number> is {{x}} ", "x?a=1&copy=2 & Co;", "1 <3 2\n\n\n  b", "<br", ""]
)
def test_a_text_without_html_stays_to_the_letter(text):
    assert plain_text(text) == text


@given(
    st.lists(
        st.sampled_from(
            [*"ab<>&; \n\"'/-", "<br>", "&amp;", "lt;", "<p", "</a>", "<a href=x@y>", "<li>", "&#", "<!--", "-->"]
        )
    )
)
def test_what_is_plain_stays_plain(parts):
    once = plain_text("".join(parts))
    assert plain_text(once) == once


def test_no_text_takes_long():
    began = time.perf_counter()
    for part in ("<a '", "<a href=x>", "<!-- ", "<script>", "<li", '<p "', "\n ", "<div>", "&amp;"):
        plain_text(part * 10_000 + "<br>")
    assert time.perf_counter() - began < 5


HTML = {"question": "<p>Gr&ouml;&szlig;e?</p>", "answer": "Sch&ouml;n:<br>38.", "messages": [
    {"role": "user", "content": "<p>Gr&ouml;&szlig;e?</p>"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": {"html": "<b>x</b>"}}}]},
    {"role": "tool", "content": "<b>38</b>"},
    {"role": "assistant", "content": "Sch&ouml;n:<br>38."},
]}  # fmt: skip


def test_rows_questions_and_what_is_typed_are_stripped_alike(make, tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", [HTML | {"question": f"{split}: {HTML['question']}"}])
    recipe = make(tmp_path / "data", strip_html=True)
    (questions,) = make_questions(recipe, make_chat(recipe))[0]
    assert questions.messages[-1]["content"] == "test:\n\nGröße?" and questions.references == ["Schön:\n38."]
    assert turns_of(recipe)[0][0][0]["content"] == compose(recipe, [f"train: {HTML['question']}"]) == "train:\n\nGröße?"
    turns = as_trained(recipe, [*HTML["messages"][:1], HTML["messages"][3]], None, None)
    assert [turn["content"] for turn in turns] == ["Größe?", "Schön:\n38."]
    with pytest.raises(UserError, match="^question is empty"):
        compose(recipe, ["<br>"])
    in_lists = make(write_jsonl(tmp_path / "rows.jsonl", [HTML]), messages_column="messages", strip_html=True)
    ((prompt, completion),) = turns_of(in_lists)
    assert (prompt[0]["content"], prompt[2]["content"], completion[0]["content"]) == (
        "Größe?",
        "<b>38</b>",
        "Schön:\n38.",
    )
    assert prompt[1]["tool_calls"][0]["function"]["arguments"] == {"html": "<b>x</b>"}


def test_the_report_says_how_html_is_taken_out_and_that_it_is(make, tmp_path):
    rows = [{"question": "a", "answer": "<br>"}, {"question": "Mail: anna&#64;shop.de", "answer": "Ok"}, HTML]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def report(**keys):
        return make_examples(make(path, max_empty_share=0.5, **keys))[1]["train"]

    assert report().personal_data["sentence"] == (
        "HTML in 3 rows (first: rows.jsonl:1); strip_html: true makes plain text of HTML"
    )
    stripped = report(strip_html=True, mask_personal_data=True)
    assert stripped.personal_data["sentence"].endswith(
        "HTML in 3 rows (first: rows.jsonl:1); strip_html makes plain text of it"
    )
    assert stripped.personal_data["sentence"].startswith(
        "mask_personal_data replaces 1 e-mail address in 1 row (first: rows.jsonl:2)"
    )
    assert stripped.dropped == {"empty column 'answer'": 1}
