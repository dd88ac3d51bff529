"""What a user types -> the user's message, as the recipe's template writes it in training. Imports no torch."""

import json
from typing import Any

from carelm import ranks
from carelm.data.masking import clean, clean_turns
from carelm.data.tags import make_tags, used_tags
from carelm.data.templates import fill, template_columns
from carelm.errors import UserError
from carelm.recipe import Recipe


def asked_columns(recipe: Recipe) -> list[str]:
    """The columns of `prompt_template` that a user gives the text of; none where a message is the text itself."""
    named = dict.fromkeys(template_columns(recipe.prompt_template or "", "prompt_template"))
    columns = [column for column in named if column not in used_tags(recipe)]
    return [column for column in columns if column not in recipe.optional_columns] or columns


def compose(recipe: Recipe, texts: list[str]) -> str:
    """The user's message made of one text for each of `asked_columns`, or of one text, each cleaned as the recipe has it.

    Raises:
        UserError: where a text is empty, or is no text.
    """
    columns = asked_columns(recipe)
    cleaned = []
    for text, column in zip(texts, columns or [""]):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the message is no UTF-8 text; type or paste it again") from None
        cleaned.append(clean(recipe, text, column))
        if not cleaned[-1].strip():
            raise UserError(f"{column or 'the message'} is empty; nothing is sent")
    return fill(recipe.prompt_template, dict(zip(columns, cleaned)) | tags_of(recipe, texts)) if columns else cleaned[0]


def tags_of(recipe: Recipe, texts: list[str]) -> dict[str, str]:
    """The tags that the recipe's templates name: those of `tag_column`'s text, or of all texts where none is that column's."""
    own = dict(zip(asked_columns(recipe), texts))
    return make_tags(recipe, own.get(recipe.tag_column, "\n".join(texts)))


def system_message(recipe: Recipe) -> tuple[str | None, str | None]:
    """The recipe's as text, or as a template of tags that are to be filled in; neither, which is said, where it is made of a
    row's columns."""
    columns = template_columns(recipe.system_prompt or "", "system_prompt")
    if others := [column for column in columns if column not in used_tags(recipe)]:
        ranks.say(
            f"system_prompt: {', '.join(others)} are columns of rows, so that a chat begins without a system message; "
            "--system_prompt TEXT or /system TEXT gives one"
        )
        return None, None
    if columns:
        return None, recipe.system_prompt
    return fill(recipe.system_prompt or "", {}) or None, None


def as_trained(
    recipe: Recipe, turns: list[dict[str, Any]], system: str | None, tagged_system: str | None
) -> list[dict[str, Any]]:
    """A conversation that a client sends, as training has it: what users say stands in the recipe's template, HTML and
    personal data are as the recipe has them, and one without a system message gets the recipe's (of which `system_message` says
    the two forms).

    Raises:
        UserError: where a user's message is empty, or not what the template is filled in with.
    """
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    texts = [parse(recipe, turn["content"]) if turn["role"] == "user" else None for turn in turns]
    asked = [
        {**turn, "content": compose(recipe, own)} if own else clean_turns(recipe, [turn])[0]
        for turn, own in zip(turns, texts)
    ]
    if any(turn["role"] == "system" for turn in turns):
        return asked
    if tagged_system:
        system = fill(tagged_system, tags_of(recipe, next(own for own in texts if own)))
    return [{"role": "system", "content": system}, *asked] if system else asked


def form_of(recipe: Recipe) -> str | None:
    """The JSON object that a message is where the template has several columns; None where it is plain text."""
    columns = asked_columns(recipe)
    return json.dumps(dict.fromkeys(columns, "..."), ensure_ascii=False) if len(columns) > 1 else None


def parse(recipe: Recipe, text: str) -> list[str]:
    """The texts that `compose` takes, from one text: where the template has several columns it is a JSON object of them.

    Raises:
        UserError: where it is not.
    """
    columns = asked_columns(recipe)
    if len(columns) < 2:
        return [text]
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"prompt_template has several columns: give the message as JSON, {form_of(recipe)}")
    if wrong := [column for column in columns if not isinstance(values.get(column), str)]:
        what = "is no text; write it in quotes" if wrong[0] in values else "is missing"
        raise UserError(f"{wrong[0]} {what}: a message is JSON, {form_of(recipe)}")
    if number := len(values.keys() - {*template_columns(recipe.prompt_template, "prompt_template")}):
        raise UserError(
            f"prompt_template has no place for {number} of the columns; leave them out: a message is JSON, {form_of(recipe)}"
        )
    return [values[column] for column in columns]


def decode(data: bytes, most: int) -> str:
    """The text of standard input, without the line end that closes it.

    Raises:
        UserError: where it is more than `most` bytes, binary or nothing.
    """
    if len(data) > most:
        raise UserError(f"standard input holds more than {most // 2**20} MiB, which is no message; send less")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no UTF-8 text (byte {error.start + 1}); send text") from None
    if "\0" in text:
        raise UserError(f"standard input is binary (byte {data.index(0) + 1} is 0); send text")
    if not text.strip():
        raise UserError("standard input is empty; send a message, or use --message TEXT")
    return text.rstrip("\r\n")
