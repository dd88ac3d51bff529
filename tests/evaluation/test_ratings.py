"""Blind pairs: the page does not say whose answer is whose, and what it saves is counted for the right model."""

import json
import re
import shutil
import subprocess

import pytest

from carelm.errors import UserError
from carelm.evaluation import ratings
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import wilson_interval
from carelm.recipe_file import load_recipe

MODELS = {"base": {"kind": "base"}, "adapter": {"kind": "adapter"}}
NUMBER = 40


@pytest.fixture
def asked():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    questions = [Question(f"q{i}", f"c{i}", "any", [*turns, {"role": "user", "content": f"Is <b>{i}</b> it?"}], ["It is."])
                 for i in range(NUMBER)]  # fmt: skip
    answers = {"base": "No, {0}", "adapter": "It is {0}"}
    lines = {name: [{"prediction": text.format(i) if i else "the same"} for i in range(NUMBER)]
             for name, text in answers.items()}  # fmt: skip
    return questions, lines


def pairs_of(page):
    (found,) = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page.read_text())
    return json.loads(found)


def rate(folder, pairs, name, choose, rater=None, saved=1):
    kept = [{key: pair[key] for key in ("id", "first", "second")} | {"chosen": choose(pair)} for pair in pairs]
    (folder / name).write_text(json.dumps({"rater": rater or name, "saved": saved, "ratings": kept}))


def side_of(pair, word):
    return str(1 + [text.startswith(word) for text in pair["texts"]].index(True))


def test_the_page_asks_what_differs_with_drawn_sides_and_names_no_model(asked, tmp_path):
    page, number = ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)
    pairs = pairs_of(page)
    assert number == len(pairs) == NUMBER - 1 and "q0" not in {pair["id"] for pair in pairs}
    sides = [side_of(pair, "It is") for pair in pairs]
    assert 8 < sides.count("1") < NUMBER - 8 and [pair["id"] for pair in pairs] != sorted(pair["id"] for pair in pairs)
    assert "adapter" not in page.read_text() and '"base"' not in page.read_text()
    assert pairs[0]["earlier"] == [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Yes?"}]
    assert "<b>1</b> it" not in page.read_text()  # text of the data is no markup
    assert "http" not in page.read_text() and "src=" not in page.read_text()


def test_what_raters_save_is_counted_for_the_right_model_with_wilsons_interval(asked, tmp_path):
    pairs = pairs_of(ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)[0])
    rate(tmp_path, pairs[:20], "ratings-ann.json", lambda pair: side_of(pair, "It is"))
    rate(
        tmp_path, pairs[15:30], "ratings.json", lambda pair: side_of(pair, "No" if int(pair["id"][1:]) % 5 else "It is")
    )
    rate(tmp_path, pairs[30:], "ratings-bo.json", lambda pair: "tie")
    found = ratings.count(ratings.load(tmp_path), MODELS, *asked)
    fives = sum(int(pair["id"][1:]) % 5 == 0 for pair in pairs[15:30])
    assert found["preferred"] == {"base": 15 - fives, "adapter": 20 + fives, "tie": 9}
    assert found["questions"] == 39 and found["share"] == wilson_interval((20 + fives) / 35, 30)
    said = (
        f"the answer of the tuned model was preferred in {20 + fives} of 44 ratings, that of the base in {15 - fives}, "
    )
    assert said in found["sentence"] and "% of those that chose; 95 % interval" in found["sentence"]


def test_a_rater_who_saves_twice_counts_once_with_what_was_saved_last(asked, tmp_path):
    """The browser calls the second file `ratings (1).json`, or otherwise: names and their order say nothing."""
    pairs = pairs_of(ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)[0])
    rate(tmp_path, pairs[:20], "ratings.json", lambda pair: side_of(pair, "No"), "ann", saved=1)
    rate(tmp_path, pairs, "ratings (1).json", lambda pair: side_of(pair, "It is"), "ann", saved=2)
    rate(tmp_path, pairs[:5], "ratings (2).json", lambda pair: "tie", "bo", saved=0)
    found = ratings.count(ratings.load(tmp_path), MODELS, *asked)
    assert found["preferred"] == {"base": 0, "adapter": 39, "tie": 5} and "39 of 44 ratings" in found["sentence"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js, which runs the page's script")
def test_what_the_page_saves_is_read_and_names_the_browser_each_time(asked, tmp_path):
    page, _ = ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)
    (script,) = re.findall(r"<script>(.*?)</script>", page.read_text(), re.DOTALL)
    pairs = json.dumps(json.dumps(pairs_of(page)))
    browser = f"""
      const parts = {{}}, stored = new Map(), saved = [], names = [];
      const part = id => parts[id] ||= {{classList: {{toggle() {{}}}}, replaceChildren() {{}}, value: "", textContent: ""}};
      part("pairs").textContent = {pairs};
      globalThis.document = {{getElementById: part, createElement: () => ({{click() {{ names.push(this.download); }}}})}};
      globalThis.localStorage = {{getItem: key => stored.get(key) ?? null, setItem: (key, value) => stored.set(key, value)}};
      globalThis.addEventListener = globalThis.scrollTo = () => {{}};
      globalThis.Blob = class {{ constructor(texts) {{ saved.push(texts[0]); }} }};
      URL.createObjectURL = () => "";
      const script = {json.dumps(script)};
      for (const choice of ["c1", "c2"]) {{ new Function(script)(); part(choice).onclick(); part("save").onclick(); }}
      part("name").value = "Ann Lee";
      part("save").onclick();
      console.log(JSON.stringify([saved.slice(0, 2), names]));
    """
    done = subprocess.run(["node", "-e", browser], capture_output=True, text=True, timeout=30)
    saved, names = json.loads(done.stdout or done.stderr)
    for number, text in enumerate(saved):
        (tmp_path / f"ratings ({number}).json").write_text(text)
    assert [one["chosen"] for one in ratings.load(tmp_path)] == ["1", "2"]
    (rater,) = {json.loads(file.read_text())["rater"] for file in tmp_path.glob("ratings*.json")}
    assert len(rater) > 16
    assert names == [f"ratings-{rater[:6]}.json"] * 2 + ["ratings-Ann_Lee.json"]


def test_ratings_of_answers_that_are_no_longer_there_do_not_count_which_is_said(asked, tmp_path):
    questions, lines = asked
    pairs = pairs_of(ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)[0])
    rate(tmp_path, pairs, "ratings.json", lambda pair: side_of(pair, "It is"))
    lines["adapter"][1:11] = [{"prediction": "Maybe"}] * 10
    found = ratings.count(ratings.load(tmp_path), MODELS, questions, lines)
    assert found["preferred"] == {"base": 0, "adapter": 29, "tie": 0} and found["of_other_answers"] == 10
    assert "10 more are of other answers than are there now, and do not count" in found["sentence"]
    assert ratings.count([], MODELS, questions, lines) == {}


@pytest.mark.parametrize("text", [
    "", "[]", '{"ratings": []}', '{"rater": "a", "saved": 1, "ratings": [{"id": "q1"}]}', '{"ratings": 3}', "\xff",
    '{"rater": "a", "saved": 1, "ratings": [{"id": "q1", "first": "a", "second": "b", "chosen": "3"}]}',
])  # fmt: skip
def test_a_file_that_the_page_did_not_save_is_named(text, tmp_path):
    (tmp_path / "ratings-x.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="ratings-x.json.*save it"):
        ratings.load(tmp_path)


def test_the_same_answers_are_nothing_to_rate(asked, tmp_path):
    questions, lines = asked
    alike = {name: lines["base"] for name in MODELS}
    assert ratings.write_page(tmp_path, "shop", MODELS, questions, alike, 3) == (None, 0)
    assert not (tmp_path / "rate.html").exists()


def test_rate_is_a_word_of_the_command_line_alone(tmp_path):
    assert load_recipe(["--rate"], usage="").rate and not load_recipe([], usage="").rate
    (tmp_path / "shop.yaml").write_text("rate: true")
    with pytest.raises(
        UserError, match="shop.yaml: rate is meant once, so it stands on the command line alone: --rate"
    ):
        load_recipe(["--config", str(tmp_path / "shop.yaml")], usage="")
