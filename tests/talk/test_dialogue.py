"""Models are talked to as they are trained and evaluated."""

import dataclasses
import shutil

import pytest
from drawn import make_adapter

from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.models import generation
from carelm.talk import dialogue as rooms
from carelm.talk.dialogue import Dialogue
from carelm.talk.session import Session
from carelm.talk.speaker import Speaker

LONG = "The parcel of my neighbour has not come, and nobody says why. " * 2


def load(recipe, name):
    speaker = Speaker(recipe, candidates.find(recipe, name))
    speaker.load()
    return speaker


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    keys = ["--load_in_4bit", "false", "--max_new_tokens", "24", "--max_length", "96"]
    recipe = make_adapter(tmp_path_factory.mktemp("run"), *keys)
    return recipe, [load(recipe, "base"), load(recipe, "adapter")]


@pytest.fixture
def dialogue(speakers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, models = speakers
    return Dialogue(Session(recipe, [s.name for s in models], None, "20260102-030405"), models)


def answers(speaker, messages):
    found = {}
    generation.generate_all(
        speaker.model, speaker.chat, [speaker.chat.prompt_ids(messages)], speaker.decoding, device=speaker.device,
        max_batch_tokens=1, done=found.__setitem__,
    )  # fmt: skip
    return found[0]


def test_every_model_answers_as_the_evaluator_has_it_answer(dialogue, capsys):
    dialogue.ask(["Where is my order?"])
    dialogue.ask(["And <|eot_id|> now? 🧡"])
    base, adapter = dialogue.speakers
    first, second = dialogue.session.turns
    for speaker in (base, adapter):
        messages = [{"role": "user", "content": "Where is my order?"}]
        assert first.answers[speaker.name].text == answers(speaker, messages).text
        messages += [{"role": "assistant", "content": first.answers[speaker.name].text},
                     {"role": "user", "content": "And <|eot_id|> now? 🧡"}]  # fmt: skip
        assert second.answers[speaker.name].text == answers(speaker, messages).text
    assert first.answers["base"].text != first.answers["adapter"].text
    assert capsys.readouterr().out.startswith(
        f"[base]\n{first.answers['base'].text}\n[adapter]\n{first.answers['adapter'].text}\n[base]\n"
    )


@pytest.mark.parametrize(
    "keys", [["--method", "prompt_tuning"], ["--use_dora", "true"], ["--load_in_4bit", "true"]], ids=lambda k: k[0]
)
def test_what_is_shown_grows_to_what_the_evaluator_reads(tmp_path, keys, capsys):
    keys = keys if "--load_in_4bit" in keys else ["--load_in_4bit", "false", *keys]
    speaker = load(make_adapter(tmp_path, "--max_new_tokens", "12", *keys), "adapter")
    messages, shown = [{"role": "user", "content": "Where is my order?"}], []
    answer = speaker.answer(messages, shown.append)
    assert answer == answers(speaker, messages)
    assert len(shown) > 3 and all(after.startswith(before) for before, after in zip(shown, shown[1:]))
    assert "by transformers' generate" not in capsys.readouterr().err


def test_ctrl_c_ends_an_answer_and_what_is_there_is_kept(dialogue, monkeypatch, capsys):
    class Impatient(rooms.Screen):
        def show(self, text):
            if len(text) > 10:
                raise KeyboardInterrupt

    monkeypatch.setattr(rooms, "Screen", Impatient)
    assert dialogue.ask(["Where is my order?"]) == {"cancelled"}
    said = dialogue.session.turns[0].answers
    assert set(said) == {"base", "adapter"}
    assert all(10 < len(one.text) < 40 and one.finish_reason == "cancelled" for one in said.values())
    assert "answer ended by Ctrl-C, what is there is kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert dialogue.ask(["Where is my order?"]) <= {"stop", "length"}


def test_ctrl_c_before_the_first_token_takes_the_message_back(dialogue, monkeypatch, capsys):
    base, adapter = dialogue.speakers

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base.chat, "fit_prompt", interrupted)
    dialogue.ask(["Where is my order?"])
    assert "base has said nothing: the message is not in its conversation" in capsys.readouterr().err
    assert dialogue.session.messages("base") == [] and len(dialogue.session.messages("adapter")) == 2


def test_history_leaves_the_window_as_in_training_and_it_is_said(dialogue, capsys):
    speaker = dialogue.speakers[0]
    for number in range(4):
        dialogue.ask([f"{number}: {LONG}"])
    assert "base: old turns dropped to fit 96 tokens" in capsys.readouterr().err
    dialogue.ask([LONG * 9])
    assert "base: the longest message is cut at its end to fit 96 tokens" in capsys.readouterr().err
    assert speaker.limit == 96


def test_a_system_message_that_leaves_no_turn_is_refused_and_nothing_is_lost(dialogue):
    dialogue.ask(["Where is my order?"])
    with pytest.raises(UserError, match=r"max_length: base reads 96 tokens, and the system message with a turn of one"):
        dialogue.command("/system " + LONG * 9)
    assert dialogue.session.system is None and len(dialogue.session.turns) == 1
    dialogue.command("/system You are kind.")
    assert dialogue.session.messages("base") == [{"role": "system", "content": "You are kind."}]
    dialogue.command("/system none")
    assert dialogue.session.messages("base") == []


def test_a_typed_system_message_is_masked_as_those_of_rows_are(dialogue):
    for is_masked, system in ((False, "You answer for a@b.de."), (True, "You answer for [EMAIL].")):
        dialogue.session.recipe = dataclasses.replace(dialogue.session.recipe, mask_personal_data=is_masked)
        dialogue.command("/system You answer for a@b.de.")
        assert dialogue.session.messages("base") == [{"role": "system", "content": system}]


def test_a_system_message_of_tags_is_filled_by_the_words_that_open_the_conversation(speakers):
    recipe, (base, _) = speakers
    recipe = dataclasses.replace(recipe, system_prompt="[{priority}] {{}}", tag_column="text", urgent_words=["urgent"])
    dialogue = Dialogue(Session(recipe, ["base"], None, "now"), [base], recipe.system_prompt)
    dialogue.ask(["It is urgent!"])
    dialogue.ask(["Hello."])
    assert dialogue.session.messages("base")[0]["content"] == "[HIGH] {}"
    dialogue.command("/reset")
    dialogue.ask(["Hello."])
    assert dialogue.session.messages("base")[0]["content"] == "[NORMAL] {}"
    dialogue.command("/system none")
    dialogue.ask(["It is urgent!"])
    assert dialogue.session.messages("base")[0]["role"] == "user"


def test_after_undo_the_same_question_is_another_draw(speakers, tmp_path):
    recipe, (base, _) = speakers
    base.decoding = dataclasses.replace(base.decoding, temperature=1.0)
    dialogue = Dialogue(Session(recipe, ["base"], None, "now"), [base])
    texts = []
    for _ in range(2):
        dialogue.ask(["Where is my order?"])
        texts.append(dialogue.session.turns[0].answers["base"].text)
        dialogue.command("/undo")
    dialogue.session.undone = 0
    dialogue.ask(["Where is my order?"])
    base.decoding = dataclasses.replace(base.decoding, temperature=0.0)
    assert texts[0] != texts[1] and dialogue.session.turns[0].answers["base"].text == texts[0]


def test_a_marked_answer_that_is_taken_back_is_said_to_be_saved_all_the_same(dialogue, capsys):
    for marks in (["/bad base"], []):
        dialogue.session.add("Where?", {"base": rooms.Said("There.", "stop"), "adapter": rooms.Said("Here.", "stop")})
        for line in [*marks, "/undo"]:
            dialogue.command(line)
    said = [line for line in capsys.readouterr().err.splitlines() if "taken back" in line]
    assert said == [
        "carelm: taken back; turns left: 0; what is marked of it is saved all the same (1)",
        "carelm: taken back; turns left: 0",
    ]


def test_an_unknown_command_is_one_line_and_quitting_saves_marks(dialogue, tmp_path, capsys):
    with pytest.raises(UserError, match=r"/sav is no command; did you mean /save\?"):
        dialogue.command("/sav x")
    dialogue.ask(["Where is my order?"])
    assert dialogue.command("/quit") is False and not list(tmp_path.iterdir())
    dialogue.session.turns[-1].answers["adapter"].finish_reason = "stop"  # as a trained one ends
    dialogue.command("/good adapter")
    assert dialogue.command("/quit") is False
    folder = dialogue.session.recipe.output_dir / "chats"
    assert not list(tmp_path.iterdir()) and [p.name for p in folder.iterdir()] == ["chat-20260102-030405.jsonl"]
    said = capsys.readouterr().err
    assert (
        f"carelm: saved: 2 answers, 1 marked good: {folder}/chat-20260102-030405.jsonl\n" in said
        and "carelm: next: python " in said
    )
    shutil.rmtree(folder)


def test_what_was_taken_back_with_a_mark_is_saved_and_named_apart(dialogue, tmp_path, capsys):
    for command in ("/bad adapter", "/undo"):
        dialogue.ask(["Where is my order?"])
        dialogue.command(command)
        dialogue.command("/undo") if command != "/undo" else None
    dialogue.ask(["Where is it?"])
    dialogue.command(f"/save {tmp_path / 'said.jsonl'}")
    assert "carelm: saved: 2 answers and 1 marked one that you took back, 0 marked good" in capsys.readouterr().err


def test_marks_that_cannot_be_saved_keep_the_chat_open_once(dialogue, tmp_path, monkeypatch):
    dialogue.ask(["Where is my order?"])
    dialogue.command("/bad base")
    file = dialogue.session.recipe.output_dir / "chats/chat-20260102-030405.jsonl"
    file.parent.mkdir()
    file.write_text("another's\n")
    with pytest.raises(UserError, match="stays as it is"):
        dialogue.command("/quit")
    assert dialogue.command("/quit") is False
    shutil.rmtree(file.parent)


def test_ctrl_c_that_is_held_down_ends_no_chat(dialogue, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, KeyboardInterrupt, UserError("what"), "/help", EOFError])

    def read(prompt):
        if isinstance(line := next(typed), str):
            return line
        raise line

    class Held:
        """Standard error, where the first line that is written is interrupted too."""

        def __init__(self):
            self.text = ""

        def write(self, text):
            if not self.text:
                self.text = "^C"
                raise KeyboardInterrupt
            self.text += text

        def flush(self):
            pass

    monkeypatch.setattr(rooms, "read_message", read)
    monkeypatch.setattr(rooms.sys, "stderr", held := Held())
    dialogue.run()
    assert "Ctrl-D or /quit ends the chat" in held.text and "error: what\n" in held.text and "/undo" in held.text


def test_the_commands_fit_a_narrow_terminal():
    for columns in (40, 200):
        lines = rooms.help_text(columns).splitlines()
        assert max(map(len, lines)) <= columns and all(line[15] == " " for line in lines)
