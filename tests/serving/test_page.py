"""The chat page in a real browser, against the real server: what a person sees, corrects and is told."""

import asyncio
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROJECT
from drawn import make_taught_adapter
from playwright.sync_api import Page, expect, sync_playwright
from served import listening, make_gateway

from carelm.data import splits
from carelm.models.batcher import Batcher
from carelm.recipe_file import load_recipe
from carelm.serving.gateway import Gateway
from carelm.serving.security import AGAIN_SECONDS

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which shows the page")
expect.set_options(timeout=30_000)

PICTURE, MARKUP = "Show me the picture.", "<img src=x onerror=alert(1)> <b>Köln</b> — 東京"
ORDER = "Where is my order?"
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """Base and adapter, loaded once; the adapter has learnt to answer with HTML."""
    gateway = make_gateway(
        make_taught_adapter(tmp_path_factory.mktemp("served") / "run", PICTURE, MARKUP), "base", "adapter"
    )
    yield gateway
    asyncio.run(gateway.engine.close())


@pytest.fixture(scope="module")
def url(gateway):
    with listening(gateway) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page as a new visitor. Whatever a test does, nothing is asked of another host, no script is refused or fails,
    and no dialog of a script opens."""
    contexts, wrong = [], []

    def open_page(url: str, *, wait=True, **options) -> Page:
        context = browser.new_context(base_url=url, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: r.url.startswith((url, "data:")) or wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("console", lambda m: "Failed to load resource" in m.text or wrong.append(m.text))  # a status as of 401
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        if wait:
            expect(page.locator("#send")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def finish(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()


def answers(page: Page) -> list[str]:
    return page.locator(".answer .text").all_text_contents()


def api_answer(page: Page, model: str, *contents: str) -> str:
    """What the API says to a conversation, not streamed."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    response = page.request.post("/v1/chat/completions", data={"model": model, "messages": messages})
    return response.json()["choices"][0]["message"]["content"]


def when_text_comes(page: Page, action: str) -> None:
    """Runs `action` in the page as soon as an answer has begun; it sees the lengths of the text so far as `lengths`."""
    page.evaluate(
        """action => {
          window.lengths = [];
          const act = new Function(action);
          new MutationObserver(() => {
            const length = document.querySelector("#turns .turn:last-child .text")?.textContent.length;
            if (!length || length === lengths.at(-1)) return;
            lengths.push(length);
            if (lengths.length === 3) act();
          }).observe(document.getElementById("turns"), {subtree: true, childList: true, characterData: true});
        }""",
        action,
    )


def test_an_answer_grows_while_it_is_written_and_is_read_out_when_it_is_whole(url, open_page):
    page = open_page(url)
    page.select_option("#model", "base")
    when_text_comes(page, "window.readOut = document.getElementById('finished').textContent")
    ask(page, ORDER)
    finish(page)
    (text,) = answers(page)
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths) and len(lengths) > 10 and lengths[-1] == len(text)
    assert text == api_answer(page, "base", ORDER)
    assert page.evaluate("readOut") == "" and page.inner_text("#finished").strip() == f"base: {text}"


def test_stop_keeps_what_has_come_and_the_next_question_is_answered(url, open_page):
    page = open_page(url)
    page.select_option("#model", "base")
    whole = api_answer(page, "base", ORDER)
    when_text_comes(page, "document.getElementById('stop').click()")
    ask(page, ORDER)
    expect(page.locator(".note")).to_contain_text("stopped")
    (part,) = answers(page)
    assert part and part != whole and whole.startswith(part)
    ask(page, "And now?")
    finish(page)
    assert answers(page) == [part, api_answer(page, "base", ORDER, part, "And now?")]


def test_escape_stops_too_and_a_new_chat_begins_with_nothing(url, open_page):
    page = open_page(url)
    page.select_option("#model", "base")
    when_text_comes(page, """document.getElementById("question")
      .dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}))""")  # fmt: skip
    ask(page, ORDER)
    expect(page.locator(".note")).to_contain_text("stopped")
    page.click("#new")
    assert answers(page) == [] and page.locator("#hint").is_visible()
    ask(page, ORDER)
    finish(page)
    assert answers(page) == [api_answer(page, "base", ORDER)]


def test_an_engine_that_breaks_in_mid_answer_leaves_the_part_that_came_and_another_try(url, open_page, monkeypatch):
    step, left = Batcher.step, itertools.count(8, -1)

    def breaking_step(self):
        if next(left) == 0:
            raise RuntimeError("out of memory, say")
        return step(self)

    page = open_page(url)
    page.select_option("#model", "base")
    whole = api_answer(page, "base", ORDER)
    monkeypatch.setattr(Batcher, "step", breaking_step)
    ask(page, ORDER)
    finish(page)
    (part,) = answers(page)
    assert part and part != whole and whole.startswith(part)
    expect(page.locator(".note")).to_contain_text("The answer broke off: the engine broke")
    page.click(".retry")
    finish(page)
    assert answers(page) == [whole] and page.locator(".note").is_hidden()


def test_what_looks_like_html_is_text_whoever_wrote_it(url, open_page):
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    assert answers(page) == [MARKUP]
    page.click(".edit")
    page.fill(".edited textarea", f"<script>alert(2)</script>{MARKUP}")
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text("Saved")
    ask(page, f"<b>{MARKUP}")
    finish(page)
    assert answers(page)[0] == f"<script>alert(2)</script>{MARKUP}"
    assert page.locator(".question").last.text_content() == f"<b>{MARKUP}"
    assert page.locator("main img, main b, main script").count() == 0


def test_two_models_answer_side_by_side_and_each_goes_on_with_what_it_said(url, open_page):
    page = open_page(url, viewport={"width": 1280, "height": 800})
    assert page.input_value("#model") == "adapter"
    assert page.locator("#other option:disabled").all_text_contents() == ["adapter"]
    page.select_option("#other", "base")
    ask(page, PICTURE)
    finish(page)
    first = answers(page)
    assert page.locator(".answer h3").all_text_contents() == ["adapter", "base"]
    assert first == [MARKUP, api_answer(page, "base", PICTURE)]
    left, right = (box.bounding_box() for box in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    ask(page, ORDER)
    finish(page)
    assert answers(page)[2:] == [
        api_answer(page, name, PICTURE, said, ORDER) for name, said in zip(("adapter", "base"), first)
    ]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_template_of_several_columns_has_a_field_for_each(gateway, open_page, width):
    recipe = replace(gateway.recipe, prompt_template="{topic} / {product}: {question}", completion_template="{answer}")
    served = Gateway(recipe, list(gateway.speakers.values()), gateway.engine)
    sent = []
    with listening(served) as port:
        page = open_page(f"http://127.0.0.1:{port}", viewport={"width": width, "height": 700})
        page.on("request", lambda request: sent.append(request.post_data_json) if "chat" in request.url else None)
        names, values = ["topic", "product", "question"], ["Refund", "Kettle {x}", 'When "exactly"?']
        assert page.evaluate("document.activeElement.name") == "topic"
        page.keyboard.type("Refund")
        page.keyboard.press("Enter")  # what is missing is asked for next
        assert page.evaluate("document.activeElement.name") == "product" and not sent
        for name, value in zip(names, values):
            page.get_by_role("textbox", name=name, exact=True).fill(value)
        page.keyboard.press("Enter")
        finish(page)
        assert page.inner_text(".question") == "\n".join(f"{name}: {value}" for name, value in zip(names, values))
        assert json.loads(sent[0]["messages"][0]["content"]) == dict(zip(names, values)) and answers(page)[0]
        for name in names:
            box = page.get_by_role("textbox", name=name, exact=True)
            place = box.bounding_box()
            assert box.input_value() == "" and place["x"] >= 0 and place["x"] + place["width"] <= width
            box.fill("And then?")
        page.keyboard.press("Enter")
        finish(page)
        assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
        assert answers(page)[1]


def test_a_good_mark_of_an_answer_that_was_cut_off_asks_for_its_end(url, open_page):
    page = open_page(url)
    page.select_option("#model", "base")
    when_text_comes(page, "document.getElementById('stop').click()")
    ask(page, ORDER)
    expect(page.locator(".note")).to_contain_text("stopped")
    page.click(".up")
    page.click(".feedback .main")
    expect(page.locator(".feedback .error")).to_contain_text("write its end")
    (part,) = answers(page)
    page.fill(".edited textarea", part + " It is on its way.")
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text("feedback.jsonl")


def test_a_question_that_is_refused_comes_back_to_be_changed(url, open_page):
    page = open_page(url)
    question = "a" * 2**20
    page.evaluate("text => document.getElementById('question').value = text", question)
    page.press("#question", "Enter")
    expect(page.locator(".note")).to_contain_text("The server refuses")
    assert page.input_value("#question") == question


def test_feedback_that_is_not_sent_is_not_lost_without_a_word(url, open_page):
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    page.evaluate("window.confirm = text => { window.asked = text; return false; }")
    page.click(".up")
    page.click("#new")
    assert "not sent" in page.evaluate("asked") and answers(page) == [MARKUP]
    prevented = """() => {
      const event = new Event("beforeunload", { cancelable: true });
      window.dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    assert page.evaluate(prevented)
    page.click(".cancel")
    assert not page.evaluate(prevented)
    page.click("#new")
    assert answers(page) == []


def test_an_edited_answer_is_a_row_that_trains_and_what_the_conversation_goes_on_with(url, gateway, open_page):
    saved = Path(gateway.recipe.output_dir) / "feedback.jsonl"
    saved.unlink(missing_ok=True)
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    page.click(".edit")
    assert page.input_value(".edited textarea") == MARKUP
    page.fill(".edited textarea", "We show no pictures. 📦")
    page.click(".up")
    page.fill(".comment", "  say it plainly ")
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text("feedback.jsonl")
    assert answers(page) == ["We show no pictures. 📦"] and page.locator(".draft p").text_content() == MARKUP
    ask(page, ORDER)
    finish(page)
    assert answers(page)[1] == api_answer(page, "adapter", PICTURE, "We show no pictures. 📦", ORDER)
    page.locator(".down").last.click()
    page.locator(".feedback .main").last.click()
    expect(page.locator(".said").last).to_contain_text("feedback.jsonl. To change it, change its row there.")

    edited, rated = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    assert (edited["draft"], edited["mark"], edited["comment"], edited["model"]) == (
        MARKUP, "good", "say it plainly", "adapter",
    )  # fmt: skip
    assert "draft" not in rated and (rated["mark"], rated["comment"]) == ("bad", None)
    keys = ["--config", str(PROJECT / "recipes/datasets/marked.yaml"), "--dataset_name", str(saved)]
    recipe = load_recipe(keys, usage="")
    examples, reports = splits.make_examples(recipe)
    (example,) = examples["train"]
    assert [(m["role"], m["content"]) for m in example.prompt + example.completion] == [
        ("user", PICTURE), ("assistant", "We show no pictures. 📦"),
    ]  # fmt: skip
    assert [m["content"] for m in rated["messages"]] == [PICTURE, "We show no pictures. 📦", ORDER, answers(page)[1]]
    assert reports["train"].dropped == {}  # the bad answer


def test_nothing_and_an_empty_edit_are_not_sent(url, gateway, open_page):
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    page.click(".edit")
    page.click(".feedback .main")
    expect(page.locator(".error")).to_contain_text("Change the answer")
    page.fill(".edited textarea", " \n")
    page.click(".feedback .main")
    expect(page.locator(".error")).to_contain_text("Write an answer")
    page.press(".edited textarea", "Escape")
    assert page.locator(".feedback").is_hidden() and answers(page) == [MARKUP]


def test_feedback_that_cannot_be_written_says_so_and_can_be_sent_again(url, gateway, open_page, monkeypatch):
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    page.click(".up")
    page.context.set_offline(True)
    page.click(".feedback .main")
    expect(page.locator(".error")).to_have_text("Not saved. The server cannot be reached. Is it running?")
    page.context.set_offline(False)
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text("Saved to")


def test_a_server_that_is_gone_is_said_and_found_again(gateway, open_page):
    with listening(gateway) as port:
        page = open_page(f"http://127.0.0.1:{port}")
    ask(page, PICTURE)
    expect(page.locator(".note")).to_contain_text("The server cannot be reached.")
    assert page.locator(".retry").is_enabled() and answers(page) == [""]


def test_a_busy_server_is_asked_again_only_when_the_user_says_so(url, gateway, open_page, monkeypatch):
    page = open_page(url)
    page.clock.install()
    page.clock.pause_at("2100-01-01")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    monkeypatch.setattr(gateway, "in_flight", gateway.recipe.max_queue)
    ask(page, PICTURE)
    expect(page.locator(".note")).to_contain_text("The server is busy")
    expect(page.locator(".retry")).to_have_text(f"Try again in {AGAIN_SECONDS} s")
    expect(page.locator(".retry")).to_be_disabled()
    monkeypatch.setattr(gateway, "in_flight", 0)
    page.clock.run_for(AGAIN_SECONDS * 1000)
    expect(page.locator(".retry")).to_have_text("Try again")
    assert len(asked) == 1
    page.click(".retry")
    finish(page)
    assert answers(page) == [MARKUP] and len(asked) == 2


def test_the_key_is_asked_for_once_and_kept_for_this_tab(gateway, open_page):
    with listening(gateway, KEY) as port:
        page = open_page(f"http://127.0.0.1:{port}", wait=False)
        for key, words in (("wrong", "asks for its key"), (KEY, "does not accept that key")):
            expect(page.locator("#keywords")).to_contain_text(words)
            page.fill("#key", key)
            page.press("#key", "Enter")
        expect(page.locator("#send")).to_be_enabled()
        page.reload()
        page.select_option("#other", "base")
        ask(page, PICTURE)
        finish(page)
        assert answers(page)[0] == MARKUP and page.locator("#keydialog").is_hidden()
        assert page.evaluate("Object.keys(localStorage).length") == 0
        page.evaluate("sessionStorage.clear()")
        ask(page, PICTURE)
        page.click("#keydialog button[value='']")
        expect(page.locator(".note").last).to_contain_text("only with its key")


def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(url, open_page):
    page = open_page(url)
    page.fill("#question", "とうきょう")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        page.evaluate("""how => document.getElementById("question").dispatchEvent(
          new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true, ...how}))""", how)  # fmt: skip
    page.press("#question", "Shift+Enter")
    assert page.input_value("#question") == "とうきょう\n" and answers(page) == []


def test_the_keyboard_alone_is_enough_and_where_it_is_can_be_seen(url, open_page):
    page = open_page(url)
    focus = lambda: page.evaluate("""() => {
      const style = getComputedStyle(document.activeElement);
      const name = document.activeElement.id || document.activeElement.className.split(" ")[0];
      return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    }""")  # fmt: skip  # noqa: E731
    assert focus() == ["question", True]
    page.keyboard.type(PICTURE)
    page.keyboard.press("Enter")
    finish(page)
    page.keyboard.press("Shift+Tab")
    seen = [focus()]
    while seen[-1][0] != "model":
        page.keyboard.press("Shift+Tab")
        seen.append(focus())
    assert seen == [[name, True] for name in ("down", "up", "edit", "copy", "log", "other", "model")]
    page.keyboard.press("ArrowUp")
    assert page.input_value("#model") == "base"
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("No pictures.")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_contain_text("Saved")
    assert answers(page) == ["No pictures."] and focus() == ["copy", True]


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_never_scrolls_sideways(url, open_page, width):
    page = open_page(url, viewport={"width": width, "height": 844})
    page.select_option("#other", "base")
    ask(page, "W" * 300)
    finish(page)
    page.locator(".edit").first.click()
    assert page.evaluate(
        """[document.documentElement, document.getElementById("log")].every(box => box.scrollWidth <= box.clientWidth)"""
    )
    for box in page.locator("button:visible, select:visible, textarea:visible").all():
        place = box.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= width


def test_the_log_follows_the_answer_only_while_the_reader_is_at_its_end(url, open_page):
    page = open_page(url, viewport={"width": 390, "height": 500})
    page.select_option("#model", "base")
    at_end = """() => {
      const log = document.getElementById("log");
      return log.scrollHeight - log.scrollTop - log.clientHeight < 2;
    }"""
    for _ in range(3):
        ask(page, ORDER)
        finish(page)
    assert page.evaluate(at_end)
    when_text_comes(page, "document.getElementById('log').scrollTop = 0")
    ask(page, ORDER)
    finish(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0


def test_what_the_window_cannot_hold_is_said(url, open_page):
    page = open_page(url)
    for question, note in (
        (PICTURE, ""),
        ("Where is it? " * 70, "the oldest messages are left out"),
        ("Where is it? " * 200, "the longest message is cut"),
    ):
        ask(page, question)
        finish(page)
        expect(page.locator(".note").last).to_contain_text(note)


def test_events_are_the_same_however_the_bytes_are_cut(url, open_page):
    page = open_page(url)
    found = page.evaluate(
        """async text => {
          const { events } = await import("/server.js");
          const bytes = new TextEncoder().encode(text);
          const found = new Set();
          for (let i = 0; i <= bytes.length; i++) {
            for (let j = i; j <= bytes.length; j++) {
              const parts = [bytes.slice(0, i), bytes.slice(i, j), bytes.slice(j)];
              const stream = new ReadableStream({ start(c) { parts.forEach(part => c.enqueue(part)); c.close(); } });
              const data = [];
              for await (const event of events(stream)) data.push(event);
              found.add(JSON.stringify(data));
            }
          }
          return [...found];
        }""",
        'data: {"a": "Köln 📦"}\r\n\r\n: a comment\n\ndata:two\ndata: lines\n\nevent: x\ndata: [DONE]\n\n',
    )
    assert [json.loads(one) for one in found] == [['{"a": "Köln 📦"}', "two\nlines", "[DONE]"]]


def luminance(color: str) -> float:
    """Of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_edges_have_the_contrast_of_wcag_aa(url, open_page, scheme):
    page = open_page(url, color_scheme=scheme)
    names = ("ink", "soft", "edge", "paper", "page", "mark", "on-mark", "tint", "bad", "line")
    colors = page.evaluate(
        """names => {
          const style = getComputedStyle(document.documentElement);
          return Object.fromEntries(names.map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
        }""",
        names,
    )
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb({}, {}, {})".format(
        *(int(colors["ink"][i : i + 2], 16) for i in (1, 3, 5))
    )
    for text, under, least in [
        ("ink", "page", 4.5), ("ink", "paper", 4.5), ("ink", "tint", 4.5), ("soft", "page", 4.5), ("soft", "paper", 4.5),
        ("bad", "paper", 4.5), ("on-mark", "mark", 4.5), ("edge", "paper", 3), ("edge", "page", 3), ("mark", "page", 3),
        ("mark", "paper", 3),
    ]:  # fmt: skip
        light, dark = sorted((luminance(colors[text]), luminance(colors[under])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (scheme, text, under)


def test_labels_name_everything_that_can_be_used(url, open_page):
    page = open_page(url)
    ask(page, PICTURE)
    finish(page)
    page.click(".edit")
    for role, names in {
        "combobox": ["Model", "Compare with"],
        "textbox": ["Question", "Your answer", "Comment (optional)"],
        "button": ["New chat", "Copy", "Edit", "Good answer", "Bad answer", "Send feedback", "Cancel", "Send"],
    }.items():
        for name in names:
            assert page.get_by_role(role, name=name, exact=True).count() == 1, name
    unnamed = page.evaluate("""[...document.querySelectorAll("button, input, textarea, select")]
      .filter(part => !(part.labels?.length || part.textContent.trim() || part.ariaLabel)).length""")  # fmt: skip
    assert unnamed == 0
