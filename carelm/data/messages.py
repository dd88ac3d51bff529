"""A row's list of messages -> turns with the roles and keys that chat templates know."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from carelm.data.example import NoAnswer
from carelm.data.report import shortened
from carelm.data.tools import parse_json, to_rows, to_tool_calls
from carelm.data.values import as_text, as_word, cell_text, is_empty, is_missing
from carelm.errors import UserError
from carelm.recipe import Recipe

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "utterance", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TRAIN_KEYS = ("weight", "train", "loss")  # of OpenAI, Axolotl and ms-swift: 0 or false is a turn without loss
WAY = "; write [{role, content}, ...], or one message a row (text_column)"
MOST_ROLES = 12  # that are named in one line
TEXT_PARTS = ("text", "input_text", "output_text")
ROLES = {
    **dict.fromkeys(
        ("user", "human", "customer", "client", "patient", "prompter", "end-user", "requester", "visitor"), "user"
    ),
    **dict.fromkeys(("assistant", "gpt", "bot", "agent", "model", "chatbot", "ai", "support", "operator"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # ShareGPT's: an assistant's turn that is the call as JSON
}


class UnknownRole(UserError):
    """A role that means nobody known, `name`; `unknown_roles` says all that rows hold in one line."""

    def __init__(self, source: str, name: str):
        super().__init__(f"{source}: a message has the role {name!r}; put it in user_roles or assistant_roles")
        self.name = name


def unknown_roles(recipe: Recipe, rows: Iterable[tuple[str, dict[str, Any]]]) -> UserError:
    """The error that names every role of these rows that is not known, with its messages, and what to write into the recipe."""
    counts, sides, first = Counter[str](), set[str](), ()
    for source, row in rows:
        for value in _roles(recipe, source, row):
            try:
                sides.add(role_of(recipe, source, value))
            except UnknownRole as error:
                counts[error.name] += 1
                first = first or (source, error.name)
    told = shortened([f"{name!r} ({number})" for name, number in counts.most_common()], MOST_ROLES)
    names = f"[{', '.join(json.dumps(name, ensure_ascii=False) for name, _ in counts.most_common())}]"
    missing = {"user", "assistant"} - sides
    if len(counts) > MOST_ROLES:
        way = "set role_column or role_key to what holds the side and not the name, or list them in the recipe"
    elif len(missing) == 1:
        way = f"add {missing.pop()}_roles: {names} to the recipe"
    else:
        way = f"add assistant_roles: {names} to the recipe, and move those who ask into a user_roles of the same form"
    where, name = first
    return UserError(f"{where}: a message has the role {name!r}; not known, with their messages, are {told}: {way}")


def _roles(recipe: Recipe, source: str, row: dict[str, Any]) -> list[Any]:
    """The values of the roles of a row that is a message or holds them; none of what has another shape, which is said later."""
    keys = (recipe.role_key,) if recipe.role_key else ROLE_KEYS
    values = [row.get(recipe.role_column)] if recipe.text_column else []
    for column in message_columns(recipe):
        messages = row.get(column)
        with contextlib.suppress(UserError):
            messages = parse_json(messages, source) if isinstance(messages, str) and messages.strip() else messages
        messages = to_rows(messages)
        found = [m for m in messages if isinstance(m, dict)] if isinstance(messages, (list, tuple)) else []
        values += [next((m[key] for key in keys if not is_empty(m.get(key))), None) for m in found]
    return [value for value in values if isinstance(value, (str, int, float)) and not is_empty(value)]


def to_turns(recipe: Recipe, source: str, messages: Any) -> tuple[list[dict], set[str]]:
    """The value of `messages_column` as turns, and the keys of its messages that are not used.

    It is a list of objects, the same as JSON text, or an object of lists (a Hub dataset's sequence). A key counts where it
    has a value: Parquet gives every message the keys of all the others, with null. A turn is {"role", "content"}, with
    "tool_calls", "reasoning_content" and "train": False where an assistant's message has them; a tool's turn may have
    "name" and "tool_call_id". Text parts of one message are joined by line ends.

    Raises:
        UserError: for a message of an unknown shape, role or content, with the row.
    """
    where = f"{source}: column '{recipe.messages_column}'"
    if isinstance(messages, str):  # a CSV file holds the list as JSON
        messages = (
            parse_json(messages, f"{where} is text and no JSON list of messages{WAY}") if messages.strip() else []
        )
    messages = [] if is_missing(messages) else to_rows(messages)
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"{where} holds a {type(messages).__name__}, no list of messages")
    turns: list[dict] = []
    unused: set[str] = set()
    for message in messages:
        turn, left = _to_turn(recipe, source, message)
        unused |= left
        if turn["role"] == "call":
            turn["role"] = "assistant"
            if turns and turns[-1].get("called"):  # calls in a row are made at once
                turns[-1]["tool_calls"] += turn["tool_calls"]
                continue
            turn["called"] = True
        turns.append(turn)
    return [{key: value for key, value in turn.items() if key != "called"} for turn in turns], unused


def row_turns(recipe: Recipe, source: str, row: dict[str, Any], column: str) -> tuple[list[dict], set[str]]:
    """The turns that end with those of this column, as `to_turns` gives them.

    Beside a `prompt_column`, a text there is a question, and a text here its answer; messages that begin with those of the
    prompt have it already, whichever of the two has the system message.
    """
    turns, left = column_turns(recipe, source, row, column)
    if not recipe.prompt_column:
        return turns, left
    before, more = column_turns(recipe, source, row, recipe.prompt_column)
    (system, asked), (own_system, turns) = _parted(before), _parted(turns)
    if [*map(said, turns[: len(asked)])] == [*map(said, asked)]:
        turns = turns[len(asked) :]
    return (system or own_system) + asked + turns, left | more


def said(turn: dict[str, Any]) -> tuple[str, str, Any]:
    """What a turn says, by which it is compared: blanks at its ends do not count."""
    return turn["role"], turn["content"].strip(), turn.get("tool_calls")


def _parted(turns: list[dict]) -> tuple[list[dict], list[dict]]:
    """A system message that stands first, and the rest."""
    number = int(bool(turns) and turns[0]["role"] == "system")
    return turns[:number], turns[number:]


def column_turns(recipe: Recipe, source: str, row: dict[str, Any], column: str) -> tuple[list[dict], set[str]]:
    """The turns of one of `message_columns` alone."""
    value = cell_text(row, column, source) if isinstance(row.get(column), str) else row.get(column)
    if recipe.prompt_column and isinstance(value, str) and value.strip() and not _is_list(value):
        return [{"role": "user" if column == recipe.prompt_column else "assistant", "content": value}], set()
    return to_turns(replace(recipe, messages_column=column), source, value)


def message_columns(recipe: Recipe) -> list[str]:
    """The columns with a row's messages, in the order in which they are read."""
    return [c for c in (recipe.prompt_column, recipe.messages_column, recipe.rejected_column) if c]


def _is_list(text: str) -> bool:
    """Whether the text is a list of objects, as a CSV file has it."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and all(isinstance(item, dict) for item in found)


def split_turns(turns: list[dict], trained_turns: str) -> tuple[list[dict], list[dict]]:
    """Turns -> the prompt and the completion, which begins with the first (trained_turns: all) or last trained answer.

    Raises:
        NoAnswer: where there is none, or one that says nothing, or answers nothing.
    """
    # A greeting that opens the conversation answers nothing: it is prompt.
    opening = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > opening]
    trained = [i for i in answers if turns[i].get("train", True)]
    if not trained:
        raise NoAnswer(
            "no assistant turn" if not any(turn["role"] == "assistant" for turn in turns)
            else "no turn before the answer" if not answers
            else "no trained turn"
        )  # fmt: skip
    first, last = trained[0 if trained_turns == "all" else -1], trained[-1]
    if any(not turns[i]["content"].strip() and not turns[i].get("tool_calls") for i in trained if i >= first):
        raise NoAnswer("empty answer")
    if not any(t["content"].strip() or t.get("tool_calls") for t in turns[:first] if t["role"] != "system"):
        raise NoAnswer("empty question")
    prompt = [{key: value for key, value in turn.items() if key != "train"} for turn in turns[:first]]
    return prompt, turns[first : last + 1]  # what follows the last answer is a question that nobody answered


def role_of(recipe: Recipe, source: str, value: Any) -> str:
    """A role as rows call it -> user, assistant, system, tool or call; the recipe's own names come first."""
    name = as_word(as_text(value, f"{source}: a message's role")) or ""
    if name in map(as_word, recipe.user_roles):
        return "user"
    if name in map(as_word, recipe.assistant_roles):
        return "assistant"
    if name.lower() not in ROLES:
        raise UnknownRole(source, name)
    return ROLES[name.lower()]


def _to_turn(recipe: Recipe, source: str, message: Any) -> tuple[dict[str, Any], set[str]]:
    """A message of any of the usual shapes as a turn, with the keys of it that are not used."""
    if not isinstance(message, dict):
        raise UserError(f"{source}: a message is {message!r:.60}, not an object with a role and a text")
    values = {key: value for key, value in message.items() if not is_empty(value)}

    def first(*keys: str) -> str | None:
        """The first of these keys that has a value; it is used."""
        key = next((key for key in keys if key in values), None)
        used.add(key)
        return key

    used: set[str | None] = set()
    role_keys = (recipe.role_key,) if recipe.role_key else ROLE_KEYS
    role_key = first(*role_keys)
    content_keys = (recipe.content_key,) if recipe.content_key else CONTENT_KEYS
    if role_key is None and any(key in message for key in role_keys):
        raise UserError(f"{source}: a message's role is empty; write who says it, or set role_key to another key")
    if role_key is None:
        raise UserError(f"{source}: a message has {_keys(message)}; set role_key to the one with the role")
    role = role_of(recipe, source, values[role_key])
    content_key = first(*content_keys)
    turn: dict[str, Any] = {"role": role, "content": ""}
    if role in ("assistant", "call"):
        if calls_key := first("tool_calls", "function_call"):
            turn["tool_calls"] = to_tool_calls(source, values[calls_key])
        elif role == "call":
            turn["tool_calls"] = to_tool_calls(source, values.get(content_key))
            content_key = None
            if not turn["tool_calls"]:
                raise UserError(f"{source}: a message of the role {values[role_key]!r} holds no call")
        if reasoning_key := first(*REASONING_KEYS):
            turn["reasoning_content"] = _text(source, reasoning_key, values[reasoning_key], role)
            used |= {key for key in REASONING_KEYS if values.get(key) == values[reasoning_key]}
        if not all([_carries_loss(source, key, values[key]) for key in TRAIN_KEYS if first(key)]):
            turn["train"] = False
    elif role == "tool":
        for key in ("name", "tool_call_id"):
            if first(key):
                turn[key] = _text(source, key, values[key], role)
        results = [key for key in content_keys if isinstance(message.get(key), (list, tuple, dict))]
        content_key = content_key or next(iter(results), None)  # [] or {}: the tool has found nothing
    if role not in ("assistant", "call"):  # never trained, as false and 0 say
        used |= {key for key in TRAIN_KEYS if values.get(key) in (False, 0)}
    if content_key:
        turn["content"] = _text(source, content_key, message[content_key], role)
    elif not turn.keys() & {"tool_calls", "reasoning_content"} and not any(key in message for key in content_keys):
        raise UserError(f"{source}: a message has {_keys(message)}; set content_key to the one with the text")
    return turn, set(values) - used


def _keys(message: dict) -> str:
    return f"the keys {', '.join(map(repr, message)) or '(none)'}"


def _text(source: str, key: str, value: Any, role: str) -> str:
    """A message's text, text parts joined by line ends; what a tool returned may be any value, as JSON."""
    parts = [value] if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else None
    if parts is None or (
        role == "tool" and not (parts and all(isinstance(p, dict) and p.get("type") in TEXT_PARTS for p in parts))
    ):
        return as_text(value, f"{source}: a message's '{key}'") or ""
    texts = []
    for part in parts:
        if isinstance(part, dict) and (part.get("type") in TEXT_PARTS or is_empty(part.get("type")) and "text" in part):
            text = part.get("text")
            part = text if isinstance(text, dict) else as_text(text, f"{source}: a part of a message's '{key}'") or ""
        if not isinstance(part, str):
            what = part.get("type") if isinstance(part, dict) else None
            what = f"a part of type {what!r}" if isinstance(what, str) else f"{part!r:.60}"
            raise UserError(f"{source}: a message's '{key}' holds {what}; only text and text parts can be used")
        texts.append(part)
    return "\n".join(texts)


def _carries_loss(source: str, key: str, value: Any) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise UserError(
            f"{source}: a message's '{key}' is {value!r:.60}; write 1 or true to train the turn, 0 or false not to"
        )
    return bool(value)
