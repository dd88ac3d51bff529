"""A chat at a terminal: asks the models, does what commands say, and goes on after whatever can be mended."""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Sequence

from carelm import ranks
from carelm.chat.question import asked_columns, compose, tags_of
from carelm.data.masking import clean
from carelm.data.templates import fill
from carelm.errors import UserError
from carelm.files import here
from carelm.models.generation import Answer
from carelm.talk.marked import say_training
from carelm.talk.session import Said, Session
from carelm.talk.speaker import Speaker
from carelm.talk.terminal import Screen, read_message

HELP = {
    "/reset": "begin anew, under the same system message",
    "/system [TEXT]": 'show the system message, or begin anew under this one; "none" for none',
    "/undo": "take back the last message and its answers",
    "/good [MODEL]": "mark the last answer; of several models say whose",
    "/bad [MODEL]": "the same",
    "/save [FILE]": "write all answers and marks to a .jsonl file that can be trained on (default: in the run's folder)",
    "/help": "this list",
    "/quit": "or Ctrl-D; what is marked and not saved is saved",
    "Ctrl-C": "ends an answer",
    '"""': "begins and ends a message of several lines; a paste of several lines is one message",
}
COMMANDS = [line.split()[0][1:] for line in HELP if line.startswith("/")]


class Dialogue:
    """The models that are talked to, and the session with them.

    Args:
        tagged_system: a system message with tags of the words that open a conversation, which fill it in.
        words: that name the recipe on a command line.
    """

    def __init__(
        self, session: Session, speakers: list[Speaker], tagged_system: str | None = None, words: Sequence[str] = ()
    ):
        self.session, self.speakers, self.tagged_system, self.words = session, speakers, tagged_system, [*words]
        self.columns = asked_columns(session.recipe)
        self._was_told = False  # that marks cannot be saved: a second /quit ends all the same

    def run(self) -> None:
        """Reads messages and commands until /quit or Ctrl-D."""
        goes_on, said = True, ""
        while goes_on:
            try:
                if (
                    said
                ):  # here and not where it is caught: there a second Ctrl-C would end the chat, unsaved marks and all
                    print(said, file=sys.stderr, flush=True)
                    said = ""
                goes_on = self._turn()
            except UserError as error:
                said = f"error: {error}"
            except KeyboardInterrupt:
                said = "\ncarelm: Ctrl-D or /quit ends the chat"

    def _turn(self) -> bool:
        """One message or command; whether the chat goes on."""
        several = len(self.columns) > 1
        try:
            line = read_message(f"{self.columns[0]}> " if several else "> ")
            if not line.strip():
                return True
            if line.startswith("/"):
                return self.command(line)
            self._was_told = False
            texts = [line] + [read_message(f"{column}> ") for column in self.columns[1:]]
        except EOFError:
            print(file=sys.stderr)
            return self.command("/quit")
        self.ask(texts)
        return True

    def ask(self, texts: list[str]) -> set[str]:
        """Sends a message to every model and shows the answers, one below the other; they are a turn of the session.

        Returns:
            why the answers ended: "stop", "length", "cancelled".

        Raises:
            UserError: where the message is refused; what other models had answered by then is kept.
        """
        if self.tagged_system and not self.session.turns:
            self.session.system = fill(self.tagged_system, tags_of(self.session.recipe, texts))
        question, answers, reasons = compose(self.session.recipe, texts), {}, set()
        try:
            for speaker in self.speakers:
                if len(self.speakers) > 1:
                    print(f"[{speaker.name}]", flush=True)
                messages = [*self.session.messages(speaker.name), {"role": "user", "content": question}]
                screen = Screen()
                try:
                    answer = speaker.answer(messages, screen.show, again=self.session.undone)
                except KeyboardInterrupt:  # before there was a token
                    answer = Answer("", (), "cancelled")
                screen.end(answer.text)
                reasons.add(answer.finish_reason)
                if answer.finish_reason == "length":
                    ranks.say(f"cut at max_new_tokens {speaker.decoding.max_new_tokens}")
                elif answer.finish_reason == "cancelled":
                    ranks.say("answer ended by Ctrl-C" + (", what is there is kept" if answer.text else ""))
                if answer.text.strip():
                    answers[speaker.name] = Said(answer.text, answer.finish_reason)
                else:
                    ranks.say(f"{speaker.name} has said nothing: the message is not in its conversation")
        finally:
            self.session.add(question, answers)
        return reasons

    def command(self, line: str) -> bool:
        """Does what a line with / says; whether the chat goes on.

        Raises:
            UserError: where it is no command, or cannot be done.
        """
        name, _, rest = line[1:].partition(" ")
        rest, session = rest.strip(), self.session
        if name == "help":
            print(help_text(shutil.get_terminal_size().columns), file=sys.stderr, flush=True)
        elif name == "reset":
            session.begin_anew(session.system)
            ranks.say("a new conversation")
        elif name == "system":
            self._system(rest)
        elif name == "undo":
            kept = session.undo()
            saved = f"; what is marked of it is saved all the same ({kept})" if kept else ""
            ranks.say(f"taken back; turns left: {len(session.turns)}{saved}")
        elif name in ("good", "bad"):
            ranks.say(f"the last answer of {session.mark(name, rest)} is marked {name}")
        elif name == "save":
            self._save(rest)
        elif name == "quit":
            if not session.is_saved and not self._was_told:
                self._was_told = True
                self._save("")
            return False
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them."
            raise UserError(f"/{name} is no command; {hint} A blank in front makes it a message")
        return True

    def _system(self, text: str) -> None:
        if not text:
            return ranks.say(f"system message: {self.session.system or self.tagged_system or 'none'}")
        system = None if text == "none" else clean(self.session.recipe, text)  # as that of a row
        for speaker in self.speakers:
            speaker.check_window(system)
        self.tagged_system = None
        self.session.begin_anew(system)
        ranks.say(f"a new conversation, {'under this system message' if system else 'without a system message'}")

    def _save(self, name: str) -> None:
        session = self.session
        path, rows = session.save(name), session.rows()
        good = sum(row["mark"] == "good" for row in rows)
        undone = session.undone_rows
        there = f"{len(rows) - undone} {'answer' if len(rows) - undone == 1 else 'answers'}"
        there += f" and {undone} marked {'one' if undone == 1 else 'ones'} that you took back" if undone else ""
        ranks.say(f"saved: {there}, {good} marked good: {here(path)}")
        if good:
            say_training(session.recipe, here(path), good, self.words, "chat")


def help_text(columns: int) -> str:
    """The commands, for a terminal that is so wide."""
    width = max(30, min(columns, 100))
    return "\n".join(
        textwrap.fill(text, width, initial_indent=f"{name:16}", subsequent_indent=" " * 16)
        for name, text in HELP.items()
    )
