"""The page of a shop in a real browser: folded sources, the product filter, past tickets; what documents say stays text."""

import asyncio
import json
import shutil

import pytest

pytest.importorskip("lancedb")
from playwright.sync_api import expect, sync_playwright
from served import listening
from shop import RETURNS, make_shop, shop_gateway, with_tickets

from carelm.chat.grounding import DONT_KNOW, ground
from carelm.recipe import FEEDBACK

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which shows the page")
expect.set_options(timeout=30_000)

MARKUP = "A clock <img src=x onerror=alert(1)> <b>ticks</b> in the hall of clocks."


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    recipe = with_tickets(folder, make_shop(folder, {"clock.md": f"# Clocks\n\n`{MARKUP}`\n"}))
    gateway = shop_gateway(recipe, "base", "adapter")
    yield gateway
    asyncio.run(gateway.engine.close())


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(gateway, browser):
    """The page as a new visitor sees it; nothing is asked elsewhere, no script fails and none of a document runs."""
    wrong = []
    with listening(gateway) as port:
        context = browser.new_context(base_url=f"http://127.0.0.1:{port}")
        page = context.new_page()
        page.on("request", lambda r: r.url.startswith((f"http://127.0.0.1:{port}", "data:")) or wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("console", lambda m: wrong.append(m.text))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto("/")
        expect(page.locator("#send")).to_be_enabled()
        yield page
        context.close()
    assert not wrong


def ask(page, question):
    page.fill("#question", question)
    page.press("#question", "Enter")
    expect(page.locator("#send")).to_be_visible()


def test_sources_are_folded_under_the_answer_and_open_to_the_passage(page):
    ask(page, "Can a lamp come back within 30 days?")
    source = page.locator(".source").first
    expect(source.locator("summary")).to_have_text("[1] Returns, Lamps (returns.md)")
    expect(source.locator("p")).to_be_hidden()
    source.locator("summary").click()
    expect(source.locator("p")).to_have_text(RETURNS)
    said = page.request.post(
        "/v1/shop/chat", data={"messages": [{"role": "user", "content": "Can a lamp come back within 30 days?"}]}
    )
    assert page.locator(".answer .text").text_content() == said.json()["answer"]


def test_what_is_thought_of_an_answer_is_saved_with_the_passages_that_it_is_from(page, gateway):
    saved = gateway.recipe.output_dir / FEEDBACK
    ask(page, "Can a lamp come back within 30 days?")
    page.click(".edit")
    page.fill(".feedback textarea", "Yes, within 30 days [1].")
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text(FEEDBACK)
    found = gateway.assistant.look_up([{"role": "user", "content": "Can a lamp come back within 30 days?"}])
    turn = ground("Can a lamp come back within 30 days?", [f.passage for f in found])
    row = json.loads(saved.read_text().splitlines()[-1])
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", turn),
        ("assistant", "Yes, within 30 days [1]."),
    ]


def test_of_an_answer_that_no_model_gave_there_is_nothing_to_learn(page, gateway):
    ask(page, "Xylophones?")
    expect(page.locator(".answer .text")).to_have_text(DONT_KNOW)
    expect(page.locator(".edit")).to_be_hidden()
    expect(page.locator(".up")).to_be_hidden()
    page.click(".down")
    page.fill(".comment", "We sell them.")
    page.click(".feedback .main")
    expect(page.locator(".said")).to_contain_text(FEEDBACK)
    row = json.loads((gateway.recipe.output_dir / FEEDBACK).read_text().splitlines()[-1])
    assert row["messages"][-1]["train"] is False and row["comment"] == "We sell them."


def test_a_product_narrows_what_an_answer_is_from(page):
    page.select_option("#product", "Harbour kettle")
    ask(page, "What does the Harbour one cost in euros?")
    expect(page.locator(".source summary")).to_have_text(["[1] Harbour kettle (goods.jsonl:2)"])


def test_markup_in_a_document_is_text(page):
    ask(page, "Which clock ticks in the hall of clocks?")
    expect(page.locator(".source").first.locator("p")).to_contain_text(MARKUP)
    assert page.locator("#turns img, #turns b").count() == 0


def test_a_ticket_is_pasted_and_past_ones_come_with_what_resolved_them(page):
    page.click("#totickets")
    expect(page.locator("#composer")).to_be_hidden()
    page.fill("#ticket", "The lamp flickers <img src=x onerror=alert(1)>")
    page.press("#ticket", "Enter")
    first = page.locator(".match").first
    expect(first.locator(".asked")).to_have_text("My lamp flickers.")
    expect(first.locator(".text")).to_have_text("We sent another bulb.")
    expect(first.locator(".verdict")).to_be_hidden()
    page.select_option("#ticketproduct", "Harbour kettle")
    page.fill("#ticket", "It is loud")
    page.click("#match")
    expect(page.locator(".match .asked")).to_have_text(["The kettle is loud."])
    page.click("#tochat")
    expect(page.locator("#composer")).to_be_visible()


def test_verdict_probability_and_reason_of_a_matcher_are_shown(page):
    match = {"ticket_id": "T7", "question": "<i>q</i>", "resolution": "r", "score": 0.8, "same": True, "probability": 0.93,
             "reason": "Both <b>flicker</b>."}  # fmt: skip
    page.route("**/v1/tickets/match", lambda route: route.fulfill(json={"matches": [match, {**match, "same": False}]}))
    page.click("#totickets")
    page.fill("#ticket", "It flickers")
    page.click("#match")
    expect(page.locator(".match .verdict")).to_have_text(
        ["The same, says the model: the same with 93 %", "Not the same, says the model: the same with 93 %"]
    )
    expect(page.locator(".match .reason").first).to_have_text("Its reason: Both <b>flicker</b>.")
    assert page.locator("#found b, #found i").count() == 0


def test_a_server_without_a_shop_shows_nothing_of_one(page, gateway, monkeypatch):
    monkeypatch.setattr(gateway, "assistant", None)
    monkeypatch.setattr(gateway, "tickets", None)
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    for id in ("#tabs", "#ofproduct", "#matches", "#ticketform"):
        expect(page.locator(id)).to_be_hidden()
    assert json.loads(page.request.get("/v1/models").text()).keys() == {"object", "data"}
