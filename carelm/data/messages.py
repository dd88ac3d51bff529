"""A row's list of messages -> turns with the roles and keys that chat templates know."""

import json
from typing import Any

from carelm.data.example import NoAnswer
from carelm.errors import UserError
from carelm.recipe import Recipe

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "utterance", "text")
ROLES = {
    **dict.fromkeys(("user", "human", "customer", "client", "patient"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "agent", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
}


def from_messages(recipe: Recipe, source: str, messages: Any) -> tuple[list[dict], list[dict]]:
    if isinstance(messages, str):  # a CSV file holds the list as JSON
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise UserError(
                f"{source}: column '{recipe.messages_column}' is text and no JSON list of messages"
            ) from None
    if messages is not None and not isinstance(messages, (list, tuple)):
        raise UserError(
            f"{source}: column '{recipe.messages_column}' holds a {type(messages).__name__}, no list of messages"
        )
    turns = [_to_turn(recipe, source, message) for message in messages or []]
    while turns and turns[-1]["role"] != "assistant":  # a question that nobody answered
        turns.pop()
    if not turns:
        raise NoAnswer("no assistant turn")
    # A greeting that opens the conversation answers nothing: it is prompt.
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    if not answers:
        raise NoAnswer("no turn before the answer")
    split = answers[0] if recipe.trained_turns == "all" else answers[-1]
    for turn in turns[split:]:
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise NoAnswer("empty answer")
    return turns[:split], turns[split:]


def _to_turn(recipe: Recipe, source: str, message: Any) -> dict[str, Any]:
    """A message of any of the usual shapes as {"role", "content", ...}; null content becomes empty text."""
    if not isinstance(message, dict):
        raise UserError(f"{source}: a message is {message!r}, not an object with a role and a text")
    role_key = recipe.role_key or next((k for k in ROLE_KEYS if k in message), None)
    content_key = recipe.content_key or next((k for k in CONTENT_KEYS if k in message), None)
    if role_key not in message or (content_key not in message and not message.get("tool_calls")):
        key = "content_key" if role_key in message else "role_key"
        raise UserError(f"{source}: a message has the keys {', '.join(map(str, message))}; set {key} to one of them")
    given = message[role_key]
    name = str(given).lower() if isinstance(given, bool) else str(given)
    role = (
        "user" if name in recipe.user_roles
        else "assistant" if name in recipe.assistant_roles
        else ROLES.get(name.lower())
    )  # fmt: skip
    if role is None:
        raise UserError(f"{source}: a message has the role {name!r}; put it in user_roles or assistant_roles")
    content = message.get(content_key)
    if content is not None and not isinstance(content, str):
        raise UserError(f"{source}: a message's '{content_key}' is {type(content).__name__}, not text")
    turn = {"role": role, "content": content or ""}
    if message.get("tool_calls"):
        turn["tool_calls"] = [_to_tool_call(call) for call in message["tool_calls"]]
    for extra in ("name", "tool_call_id"):
        if role == "tool" and message.get(extra):
            turn[extra] = message[extra]
    return turn


def _to_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Chat templates expect the arguments as an object; the OpenAI shape holds them as JSON text."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except json.JSONDecodeError:
            pass  # a template that can render objects can render text
    return {"type": "function", "function": function}
