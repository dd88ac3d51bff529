"""What people think of answers becomes rows that the data step reads."""

import dataclasses
import json
import runpy
import shlex
import shutil
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PROJECT
from drawn import make_adapter
from served import ASKED, KEYS, make_client, make_gateway

from carelm.data.splits import make_examples
from carelm.recipe import CERTIFIED, CHATS, ENGINE_LOG, FEEDBACK
from carelm.recipe_file import load_recipe, save_recipe
from carelm.serving import feedback
from carelm.talk.marked import training_words
from carelm.training import runs

SAID = {"model": "base", "messages": ASKED, "answer": "Soon.", "mark": "good"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return make_gateway(make_adapter(tmp_path_factory.mktemp("run"), *KEYS), "base")


@pytest.fixture
def rows(gateway):
    """Sends feedback, and reads what is written then."""
    client = make_client(gateway)
    file = gateway.recipe.output_dir / FEEDBACK
    file.unlink(missing_ok=True)

    def send(*bodies):
        for body in bodies:
            reply = client.post("/v1/feedback", json=body)
            assert reply.status_code == 201 and reply.json() == {"saved": str(file)}, reply.text
        return [json.loads(line) for line in file.read_text().splitlines()]

    return send


def test_a_row_is_the_conversation_with_the_answer_and_an_edit_beside_its_draft(rows):
    history = [*ASKED, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "7"}]
    plain, edited = rows(
        SAID, SAID | {"messages": history, "mark": "bad", "comment": "No date", "edited": "On Monday."}
    )
    assert plain == {"id": plain["id"], "messages": [*ASKED, {"role": "assistant", "content": "Soon."}],
                     "mark": "good", "comment": None, "model": "base"} and plain["id"] != edited["id"]  # fmt: skip
    assert edited["messages"][-1] == {"role": "assistant", "content": "On Monday."} and edited["draft"] == "Soon."
    assert edited["messages"][1]["train"] is False and edited["comment"] == "No date"


def test_a_rows_tools_stand_in_what_is_trained_as_they_stood_in_what_was_asked(rows, gateway):
    tools = [
        {"type": "function", "function": {"name": "find_order", "parameters": {"type": "object", "properties": {}}}}
    ]
    with_tools, without = rows(SAID | {"tools": tools}, SAID)
    assert with_tools["tools"] == tools and "tools" not in without
    file = str(gateway.recipe.output_dir / FEEDBACK)
    keys = ["--config", str(PROJECT / "recipes/datasets/marked.yaml"), "--dataset_name", file]
    examples, _ = make_examples(load_recipe(keys, usage=""))
    assert [e.tools for e in examples["train"]] == [tools, None]


def test_what_people_say_of_an_answer_is_masked_as_what_they_ask_is(gateway):
    recipe = dataclasses.replace(gateway.recipe, mask_personal_data=True)
    mail = "write to anna@example.org"
    said = feedback.Feedback.model_validate(SAID | {"answer": mail, "edited": f"Please {mail}", "comment": f"I {mail}"})
    row = said.row(recipe, said.messages)
    assert row["messages"][-1]["content"] == "Please write to [EMAIL]" and row["comment"] == "I write to [EMAIL]"
    assert "anna" not in json.dumps(row) and row["draft"] == "write to [EMAIL]"


def test_feedback_on_a_model_that_is_not_served_is_a_404(gateway):
    reply = make_client(gateway).post("/v1/feedback", json=SAID | {"model": "../other"})
    assert reply.status_code == 404 and reply.json()["error"]["param"] == "model" and "other" not in reply.text


@pytest.mark.parametrize(
    "words", [[], ["--config", "recipes/intents.yaml"], ["--config", "recipes/customer_service.yaml"]]
)
def test_the_command_at_the_servers_end_trains_on_what_is_good_or_was_edited_and_leaves_the_rest(
    rows, gateway, words, monkeypatch, capsys
):
    rows(SAID, SAID | {"mark": "bad", "answer": "Never."}, SAID | {"mark": None, "answer": "Later."},
         SAID | {"mark": None, "edited": "On Monday."}, SAID | {"mark": "bad", "edited": "On Tuesday."})  # fmt: skip
    monkeypatch.chdir(PROJECT)
    words = [*words, "--output_dir", str(gateway.recipe.output_dir)]
    say_feedback = runpy.run_path("serve/run.py")["say_feedback"]
    say_feedback(load_recipe(words, usage=""), gateway.marks[-5:], [*words, "--port", "8001"])
    said = capsys.readouterr().err
    assert f"carelm: feedback: 5 rows more, 3 of them good: {gateway.recipe.output_dir}/feedback.jsonl\n" in said
    python, file, *command = shlex.split(said.split("next: ")[1])
    recipe = load_recipe(command, usage="")
    assert (python, file, str(recipe.adapter)) == ("python", "train/sft.py", str(gateway.recipe.output_dir))
    assert str(recipe.output_dir) == f"{gateway.recipe.output_dir}-feedback" and recipe.port == 8000
    (mixed,) = recipe.mixed.values()
    examples = make_examples(mixed)[0]["train"]
    assert recipe.prompt_template == load_recipe(words, usage="").prompt_template  # what the next server serves
    assert sorted(e.completion[0]["content"] for e in examples) == ["On Monday.", "On Tuesday.", "Soon."]


def test_of_a_shop_without_a_result_the_servers_end_names_rows_that_have_passages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    words = ["--config", "recipes/shop_assistant.yaml", "--output_dir", str(tmp_path)]
    feedback.append(tmp_path, {"mark": "good", "messages": [{"role": "assistant", "content": "Soon [1]."}]})
    runpy.run_path("serve/run.py")["say_feedback"](load_recipe(words, usage=""), ["good"], words)
    said = capsys.readouterr().err
    assert "answers from passages are learnt among rows that have some" in said and "next: " not in said


def test_a_second_command_goes_on_at_the_rate_of_the_first_and_pushes_nothing_that_is_not_compared(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(PROJECT)
    (run := tmp_path / "run").mkdir()
    make_adapter(run, *KEYS)
    words = ["--output_dir", str(run), "--push_to_hub", "true", "--learning_rate", "2e-4"]
    rates = []
    for ending in ("feedback", "feedback-2"):
        recipe = load_recipe(words, usage="")
        words = training_words(recipe, recipe.output_dir / FEEDBACK, 3, words, "feedback")
        after = load_recipe(words, usage="")
        rates.append(after.training["learning_rate"])
        assert after.output_dir.name == f"run-{ending}" and not after.training["push_to_hub"]
        shutil.copytree(run, after.output_dir)
        words = ["--config", str(after.output_dir / "recipe.yaml")]
        save_recipe(after, after.output_dir / "recipe.yaml")
    assert rates == [5e-5, 5e-5]


def test_the_servers_end_reads_any_text_and_says_which_line_a_person_has_broken(tmp_path, capsys):
    recipe = load_recipe(["--output_dir", str(tmp_path)], usage="")
    feedback.append(tmp_path, {"mark": "good", "messages": [], "comment": "one\u2028line\x85"})
    with open(tmp_path / FEEDBACK, "a") as file:
        file.write("\n{}\n")
    say_feedback = runpy.run_path("serve/run.py")["say_feedback"]
    say_feedback(recipe, ["good"], [])
    assert "next: " in capsys.readouterr().err
    with open(tmp_path / FEEDBACK, "a") as file:
        file.write('{"mark": good}\n')
    say_feedback(recipe, ["good"], [])
    assert f"{FEEDBACK}:4: not JSON" in capsys.readouterr().err


def test_a_run_may_begin_where_its_base_has_been_served(tmp_path):
    recipe = load_recipe(["--output_dir", str(tmp_path)], usage="")
    for name in (FEEDBACK, CERTIFIED, ENGINE_LOG):
        (tmp_path / name).write_text("{}\n")
    assert runs.find_finished(recipe) is None


def test_several_good_answers_to_one_question_are_said(rows, gateway, capsys):
    rows(SAID, SAID | {"edited": "On Friday."}, SAID | {"mark": "bad", "answer": "Never."})
    say_feedback = runpy.run_path(str(PROJECT / "serve/run.py"))["say_feedback"]
    say_feedback(load_recipe(["--output_dir", str(gateway.recipe.output_dir)], usage=""), gateway.marks, [])
    assert "feedback: 1 question has several good answers" in capsys.readouterr().err


def test_rows_written_at_once_stand_whole_each_on_its_line(tmp_path):
    texts = [f"{n} " * 5000 for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: feedback.append(tmp_path, {"text": text}), texts))
    assert sorted(json.loads(line)["text"] for line in open(tmp_path / FEEDBACK)) == sorted(texts)


def test_a_disk_that_is_full_leaves_the_rows_before(tmp_path, monkeypatch):
    feedback.append(tmp_path, {"text": "one"})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feedback.os, "fsync", full)
    with pytest.raises(OSError):
        feedback.append(tmp_path, {"text": "two"})
    assert (tmp_path / FEEDBACK).read_text() == '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("mark", {"mark": "so-so"}),
        ("answer", {"answer": ""}),
        ("answer", {"answer": " \n"}),
        ("edited", {"edited": " "}),
        ("messages", {"messages": []}),
        ("more", {"more": 1}),
        (None, {"whole": False}),  # a good answer that was cut off
    ],
)
def test_what_is_no_feedback_is_a_400_that_names_the_field(gateway, param, change):
    reply = make_client(gateway).post("/v1/feedback", json=SAID | change)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_what_people_thought_and_said_stays_in_the_folder_where_the_run_begins_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    recipe = load_recipe(["--output_dir", str(folder), "--restart"], usage="")
    (folder / CHATS).mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    feedback.append(folder, {"text": "one"})
    runs.open_output(recipe, types.SimpleNamespace(device=None))
    feedback.append(folder, {"text": "two"})
    assert [json.loads(line)["text"] for line in open(folder / FEEDBACK)] == ["one", "two"]
    assert (folder / CHATS).is_dir() and not (folder / "adapter_config.json").exists()
    assert f"--restart: {FEEDBACK} stays in {folder}" in capsys.readouterr().err
    (aside,) = (path for path in tmp_path.iterdir() if path != folder)
    assert (aside / "adapter_config.json").exists() and not (aside / FEEDBACK).exists()
