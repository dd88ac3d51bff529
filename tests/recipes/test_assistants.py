"""The five assistants' recipes: what each trains and asks, and `make assistants`, which runs them in small.

The rows are those of demo/assistants/, invented, with the columns of the datasets that the recipes name.
"""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from launching import script

from carelm.chat.chat import make_chat
from carelm.data.splits import make_examples
from carelm.evaluation.questions import make_questions
from carelm.recipe_file import load_recipe

sys.path.insert(0, str(PROJECT / "demo"))

import assistants

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = {  # of the bases; without one the demo's stands for Llama 3's
    "meta-llama/Llama-3.2-1B-Instruct": "tests/chat/templates/llama-3.2.jinja",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tests/chat/templates/tinyllama.jinja",
}


def recipe_of(name: str):
    return load_recipe(["--config", f"recipes/{name}.yaml"], usage="")


def golden_of(name: str) -> str:
    """The first training row as the recipe's base writes it, what is trained between ⟦ and ⟧, and the first question of the
    test rows, with the data's own value where one is predicted. The tokenizer is the demo's."""
    template = TEMPLATES.get(recipe_of(name).model["model_name_or_path"])
    own = ["--chat_template_path", template] if template else []
    recipe = load_recipe([*assistants.words(name, Path("outputs")), *own], usage="")
    recipe = dataclasses.replace(recipe, predicted_columns=dict.fromkeys(recipe.predicted_columns, "gold"))
    chat = make_chat(recipe)
    (rendered,), _ = chat.render(make_examples(recipe)[0]["train"][:1])
    trained = chat.highlight(rendered).replace("\033[7;32m", "⟦").replace("\033[0m", "⟧")
    [question, *_], _ = make_questions(recipe, chat)
    asked = chat.tokenizer.decode(chat.prompt_ids(question.messages))
    return "\n".join([trained, "--- asked", asked, "--- compared with", *question.references, ""])


@pytest.mark.parametrize("name", assistants.KEYS)
def test_what_is_trained_and_what_is_asked_is_the_golden_text(name):
    assert golden_of(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def in_small(tmp_path_factory):
    """The folder of `make assistants`, each command in a copy of a process with the libraries loaded, and what was said."""
    folder = tmp_path_factory.mktemp("assistants")

    def start(command):
        done = script(*command[1:], file=command[0], CARELM_CACHE=str(folder / "cache"))
        assert done.returncode == 0, done.stderr[-4000:]
        return done.returncode

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assistants.main(folder, start)
    return folder, said.getvalue().splitlines()


def test_it_ends_with_a_line_for_each_assistant_that_says_where_its_report_is(in_small):
    folder, said = in_small
    assert said == [f"{name}: {folder}/{name}/eval/report.html" for name in assistants.KEYS]
    assert all(Path(line.partition(": ")[2]).stat().st_size > 10_000 for line in said)


@pytest.mark.parametrize("name", assistants.KEYS)
def test_five_steps_lower_the_loss_and_both_models_answer(in_small, name):
    metrics, found = (
        json.loads((in_small[0] / name / file).read_text()) for file in ("train_metrics.json", "eval/results.json")
    )
    assert metrics["global_step"] == 5 and metrics["eval_loss"] < metrics["eval_loss_before"]
    assert (metrics["method"], metrics["bits"]) == ("lora", 4)
    assert (
        set(found["models"]) == {"base", "adapter"} and found["test"]["questions"] == found["test"]["conversations"] > 2
    )
    assert found["primary_metric"] == recipe_of(name).primary_metric
    assert set(found["tests"]) == {Path(path).stem for path in recipe_of(name).also_test}


def test_what_one_assistant_alone_has_is_in_its_report(in_small):
    found = {name: json.loads((in_small[0] / name / "eval/results.json").read_text()) for name in assistants.KEYS}
    assert found["customer_service"]["test"]["predicted_columns"]["intent"]["rows"] == 6
    assert list(found["medical_dialogue"]["checks"]) == [c["name"] for c in recipe_of("medical_dialogue").checks]
    for name in ("intents", "ticket_matching"):
        assert "constrained_macro_f1" in found[name]["models"]["adapter"], name
    card = (in_small[0] / "medical_dialogue/README.md").read_text(encoding="utf-8")
    assert "not a medical device" in card and all(q in card for q in recipe_of("medical_dialogue").card_questions)


def test_make_assistants_is_this_command():
    shown = subprocess.run(["make", "-n", "assistants"], cwd=PROJECT, capture_output=True, text=True)
    assert "python demo/assistants.py" in shown.stdout.splitlines(), shown.stderr
