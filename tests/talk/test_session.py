"""What is said and marked in a chat is kept, and can be trained on."""

import contextlib
import json
import resource

import pytest
from launching import PROJECT

from carelm.chat.question import compose, decode, parse
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.talk.marked import training_keys, training_words
from carelm.talk.session import Said, Session

DEMO = load_recipe([], usage="")
PAIRS = ["--prompt_template", "A: {a}\nB: {b}", "--completion_template", "{label}"]


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Session(DEMO, ["base", "adapter"], "You are kind.", "20260102-030405")
    for question in ("one?", "two?"):
        session.add(question, {name: Said(f"{name} on {question}", "stop") for name in session.models})
    return session


def test_each_model_has_its_own_answers_before_it(session):
    assert [m["content"] for m in session.messages("adapter")] == [
        "You are kind.", "one?", "adapter on one?", "two?", "adapter on two?"
    ]  # fmt: skip


def test_a_model_that_said_nothing_was_not_asked(session):
    session.add("three?", {"base": Said("yes", "stop")})
    assert session.messages("base")[-1]["content"] == "yes"
    assert session.messages("adapter")[-1]["content"] == "adapter on two?"


FOLDERS = (PROJECT / "recipes", PROJECT / "recipes/datasets")
RECIPES = sorted(str(f.relative_to(FOLDERS[0]).with_suffix("")) for folder in FOLDERS for f in folder.glob("*.yaml"))


def words_of_keys(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


OTHER = {
    "keys of its own": "messages_column: turns\nrole_key: from\ncontent_key: value\ntrained_turns: all\n",
    "one message a row": "text_column: t\nrole_column: r\nconversation_column: c\n",
    "tags": "prompt_template: '[{priority}] {q}'\ncompletion_template: '{a}'\ntag_column: q\nurgent_words: [now]\n",
    "tools": "messages_column: turns\ntools_column: functions\n",
}


def of_a_chat(session, file, words):
    return training_words(session.recipe, file, words, "chat")


@pytest.mark.parametrize("name", [*RECIPES, *OTHER])
def test_the_good_answers_of_a_session_are_what_the_data_step_trains_on(session, name, tmp_path):
    file = PROJECT / f"recipes/{name}.yaml"
    if name in OTHER:
        file = tmp_path / "recipe.yaml"
        file.write_text(OTHER[name])
    session.recipe = load_recipe(["--config", str(file)], usage="")
    session.mark("good", "adapter")
    session.undo()  # what is marked stays
    session.mark("bad", "base")
    session.begin_anew("Other.")
    session.add("new?", {"base": Said("yes 🧡", "length"), "adapter": Said("no", "stop")})
    session.mark("good", "base")
    keys = ["--config", str(file), *words_of_keys(training_keys(session.recipe, session.save()))]
    examples, _ = make_examples(load_recipe(keys, usage=""))
    found = {e.completion[-1]["content"]: [m["content"] for m in e.prompt] for e in examples["train"]}
    assert all(len(e.completion) == 1 for e in examples["train"])
    assert found == {
        "adapter on two?": ["You are kind.", "one?", "adapter on one?", "two?"],
        "yes 🧡": ["Other.", "new?"],
    }


def test_the_next_command_trains_on_the_saved_rows_and_no_longer_on_the_recipes(session, tmp_path):
    for words, names in (
        ([], "demo"),
        (["--config", str(PROJECT / "recipes/datasets/dialogsum.yaml"), "--seed", "2"], "d"),
    ):
        session.recipe = load_recipe([*words, "--output_dir", "run"], usage="")
        session.mark("good", "base")
        path = session.save(f"{names}.jsonl")
        recipe = load_recipe(of_a_chat(session, path, [*words, "--output_dir", "run"]), usage="")
        assert (recipe.dataset_name, str(recipe.output_dir), recipe.row_filter) == (
            str(path),
            "run-chat",
            {"mark": "good"},
        )
        assert recipe.messages_column and recipe.seed == session.recipe.seed and recipe.adapter is None
        examples, _ = make_examples(recipe)
        assert [e.completion[0]["content"] for e in examples["train"]] == ["base on two?"]  # none is held out
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_config.json").write_text("{}")
    assert of_a_chat(session, path, words)[-2:] == ["--adapter", "run"]
    of_the_chat = ["--max_new_tokens", "60", "--temperature", "0.7", "--top_p=0.9"]
    assert of_a_chat(session, path, [*words, *of_the_chat]) == of_a_chat(session, path, words)


def test_the_next_command_does_not_stop_early_by_rows_that_it_does_not_hold_out(session):
    session.recipe = load_recipe(["--early_stopping_patience", "2"], usage="")
    session.mark("good", "base")
    recipe = load_recipe(of_a_chat(session, session.save("said.jsonl"), []), usage="")
    assert recipe.validation_fraction == recipe.test_fraction == 0 and recipe.early_stopping_patience is None


def test_every_answer_and_every_mark_is_in_the_file(session):
    session.mark("bad", "adapter")
    rows = [json.loads(line) for line in session.save("said.jsonl").read_text().splitlines()]
    assert [(row["id"], row["mark"], row["finish_reason"]) for row in rows] == [
        ("20260102-030405/1/base", None, "stop"), ("20260102-030405/1/adapter", None, "stop"),
        ("20260102-030405/2/base", None, "stop"), ("20260102-030405/2/adapter", "bad", "stop"),
    ]  # fmt: skip


def test_save_never_writes_over_a_file_that_is_not_its_own(session, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text("{}\n")
    with pytest.raises(UserError, match="is there already and stays as it is"):
        session.save("rows.jsonl")
    assert other.read_text() == "{}\n"
    own = session.save("own.jsonl")
    session.mark("good", "base")
    assert not session.is_saved
    assert session.save() == own and session.is_saved
    own.write_text("edited by hand\n")
    with pytest.raises(UserError, match="stays as it is"):
        session.save()
    assert own.read_text() == "edited by hand\n"


def test_a_disk_without_room_costs_nothing_that_was_said(session, tmp_path):
    session.mark("good", "base")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        with pytest.raises(UserError, match="cannot be written .* the chat goes on"):
            session.save("full.jsonl")
    assert not list(tmp_path.iterdir()) and not session.is_saved
    assert session.save("full.jsonl").exists() and session.is_saved


@pytest.mark.parametrize("name", ["rows.csv", "none/rows.jsonl", "x" * 300 + ".jsonl", "folder.jsonl"])
def test_a_name_that_cannot_be_written_is_one_line(session, name, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="^/save: "):
        session.save(name)


def test_what_is_not_there_cannot_be_undone_marked_or_saved(session):
    with pytest.raises(UserError, match="/good: 2 models have answered; say whose answer: /good base or /good adapter"):
        session.mark("good", "")
    with pytest.raises(UserError, match="no last answer of 'merged'"):
        session.mark("good", "merged")
    session.undo()
    session.undo()
    with pytest.raises(UserError, match="no turn to take back"):
        session.undo()
    with pytest.raises(UserError, match="no answer yet"):
        session.mark("bad", "base")
    with pytest.raises(UserError, match="nothing has been said"):
        session.save()


def test_a_message_is_written_as_the_template_writes_it_in_training():
    pairs = load_recipe(PAIRS, usage="")
    assert compose(pairs, ["x {b}", "y"]) == "A: x {b}\nB: y"
    assert compose(pairs, parse(pairs, '{"b": "y", "a": "x"}')) == "A: x\nB: y"
    assert compose(DEMO, parse(DEMO, '{"b": 1}')) == '{"b": 1}'
    optional = load_recipe([*PAIRS, "--optional_columns", "b"], usage="")
    assert compose(optional, parse(optional, "x")) == "A: x\nB: "


def test_tags_of_the_words_are_those_of_training():
    tags = ["--tag_column", "b", "--urgent_words", "urgent"]
    pairs = load_recipe([*PAIRS[:1], "[{priority}] {a}: {b}", *PAIRS[2:], *tags], usage="")
    assert compose(pairs, ["urgent", "all is well"]) == "[NORMAL] urgent: all is well"
    assert compose(pairs, parse(pairs, '{"a": "x", "b": "URGENT!"}')) == "[HIGH] x: URGENT!"


@pytest.mark.parametrize("text", ["x", '{"a": "x"}', '{"a": "x", "b": 2}', "[1]"])
def test_one_text_for_several_columns_is_asked_for_as_json(text):
    with pytest.raises(UserError, match=r'give the message as JSON, \{"a": "...", "b": "..."\}'):
        parse(load_recipe(PAIRS, usage=""), text)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9", "no UTF-8 text .byte 4"),
        (b"PK\0\x01", "is binary .byte 3"),
        (b"x" * 101, "more than"),
    ],
)
def test_standard_input_that_is_no_message_is_refused(data, complaint):
    with pytest.raises(UserError, match=complaint):
        decode(data, 100)


def test_standard_input_is_one_message_of_all_its_lines():
    assert decode("\ufeffone\n\ntwo\r\n".encode(), 100) == "one\n\ntwo"
