"""What is said and marked in a chat is kept, and can be trained on."""

import contextlib
import json
import resource
from pathlib import Path

import pytest
from launching import PROJECT

from carelm.chat.question import compose, decode, parse
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.talk.marked import say_training, training_words
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
OTHER = {
    "keys of its own": "messages_column: turns\nrole_key: from\ncontent_key: value\ntrained_turns: all\n",
    "one message a row": "text_column: t\nrole_column: r\nconversation_column: c\n",
    "tags": "prompt_template: '[{priority}] {q}'\ncompletion_template: '{a}'\ntag_column: q\nurgent_words: [now]\n",
    "tools": "messages_column: turns\ntools_column: functions\n",
}


def trained_by(words, file, good=1):
    """The recipe of the command that goes on, and the answers that it adds to its own rows."""
    recipe = load_recipe(training_words(load_recipe(words, usage=""), file, good, words, "chat"), usage="")
    (mixed,) = recipe.mixed.values()
    return recipe, make_examples(mixed)[0]["train"]


@pytest.mark.parametrize("name", [name for name in [*RECIPES, *OTHER] if name != "preferences"])
def test_the_good_answers_of_a_session_are_what_the_data_step_trains_on(name, session, tmp_path):
    file = PROJECT / f"recipes/{name}.yaml"
    if name in OTHER:
        file = tmp_path / "recipe.yaml"
        file.write_text(OTHER[name])
    session.recipe = load_recipe(["--config", str(file)], usage="")
    session.mark("good", "adapter")
    session.undo()  # what is marked stays
    session.mark("bad", "base")
    session.begin_anew("Other.")
    session.add("new?", {"base": Said("yes 🧡", "stop"), "adapter": Said("no", "stop")})
    session.mark("good", "base")
    _, examples = trained_by(["--config", str(file)], session.save())
    found = {e.completion[-1]["content"]: [m["content"] for m in e.prompt] for e in examples}
    assert all(len(e.completion) == 1 for e in examples)
    assert found == {
        "adapter on two?": ["You are kind.", "one?", "adapter on one?", "two?"],
        "yes 🧡": ["Other.", "new?"],
    }


def test_where_pairs_are_learnt_the_recipe_of_the_answers_is_named(tmp_path, capsys):
    words = ["--config", str(PROJECT / "recipes/preferences.yaml")]
    say_training(load_recipe(words, usage=""), tmp_path / "marked.jsonl", 2, words, "chat")
    assert "talk by the recipe of the answers, --models outputs/preferences;" in capsys.readouterr().err


def test_the_next_command_trains_on_the_saved_rows_among_the_recipes_own(session, tmp_path):
    for words in ([], ["--config", str(PROJECT / "recipes/datasets/dialogsum.yaml"), "--seed", "2"]):
        words = [*words, "--output_dir", "run"]
        session.recipe = before = load_recipe(words, usage="")
        session.mark("good", "base")
        path = session.save(f"{before.name}.jsonl")
        recipe, examples = trained_by(words, path)
        assert [e.completion[0]["content"] for e in examples] == ["base on two?"]  # none is held out
        assert str(recipe.output_dir) == "run-chat" and recipe.adapter is None and recipe.max_samples is None
        told = ("dataset_name", "prompt_template", "system_prompt", "validation_fraction", "seed", "row_filter")
        assert all(getattr(recipe, key) == getattr(before, key) for key in told)
    of_the_chat = ["--max_new_tokens", "60", "--temperature", "0.7", "--top_p=0.9"]
    found = [training_words(before, path, 1, [*words, *more], "chat") for more in ([], of_the_chat)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("good", "batch", "of_its_own", "passes"), [(1, 8, 200, 3), (50, 8, 500, 3), (1, 128, 200, 47)]
)
def test_the_next_command_goes_on_from_an_adapter_by_a_few_passes_over_as_many_old_rows(
    session, good, batch, of_its_own, passes, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_config.json").write_text("{}")
    words = ["--output_dir", "run", "--global_batch_size", str(batch), "--max_steps", "400", "--max_samples", "9000"]
    found = training_words(load_recipe(words, usage=""), tmp_path / "said.jsonl", good, words, "chat")
    keys = dict(zip(found[::2], found[1::2]))
    assert keys["--adapter"] == "run" and (keys["--max_steps"], keys["--num_train_epochs"]) == ("-1", str(passes))
    assert float(keys["--learning_rate"]) == load_recipe([], usage="").training["learning_rate"] / 4
    assert keys["--max_samples"] == str(of_its_own) and len(found) == 2 * len(keys)


@pytest.mark.parametrize("reason", ["length", "cancelled"])
def test_an_answer_that_is_not_whole_is_not_good(session, reason):
    session.add("three?", {"adapter": Said("It is in the", reason)})
    with pytest.raises(UserError, match="/good: the last answer of adapter was .*, and is not whole; ask again"):
        session.mark("good", "adapter")
    session.mark("bad", "adapter")
    assert [row["mark"] for row in session.rows()][-1] == "bad"


def test_the_second_command_has_a_folder_of_its_own(tmp_path):
    folders = []
    for name in ("run", "run", "run-chat", "run-chat-2"):
        words = ["--output_dir", str(tmp_path / name)]
        found = training_words(load_recipe(words, usage=""), tmp_path / "said.jsonl", 1, words, "chat")
        folders.append(Path(found[found.index("--output_dir") + 1]))
        folders[-1].mkdir()
    assert [folder.name for folder in folders] == ["run-chat", "run-chat-2", "run-chat-3", "run-chat-4"]


def test_what_a_recipe_mixes_in_itself_stays_beside_the_good_answers(session, tmp_path):
    other = json.dumps({str(PROJECT / "recipes/datasets/medquad.yaml"): 500})
    found = training_words(load_recipe(["--also_train", other], usage=""), tmp_path / "said.jsonl", 1, [], "chat")
    mixed = json.loads(found[found.index("--also_train") + 1])
    assert list(mixed.values()) == [500, "20 times"] and list(mixed)[1].endswith("said.jsonl")


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


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x", "give the message as JSON, "),
        ('{"a": "x"}', "b is missing: a message is JSON, "),
        ('{"a": "x", "b": 2}', "b is no text; write it in quotes: a message is JSON, "),
        ("[1]", "give the message as JSON, "),
    ],
)
def test_one_text_for_several_columns_is_asked_for_as_json(text, what):
    with pytest.raises(UserError, match=what + r'\{"a": "...", "b": "..."\}'):
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
