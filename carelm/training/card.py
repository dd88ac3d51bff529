"""What the finished model answers to the recipe's `card_questions`, for its model card. Imports no torch."""

import re
from typing import TYPE_CHECKING, Any

from carelm.chat.chat import Chat
from carelm.chat.question import compose, parse, tags_of
from carelm.data.tags import used_tags
from carelm.data.templates import fill, template_columns
from carelm.errors import UserError
from carelm.ranks import say
from carelm.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from carelm.training.trainer import Trainer

# What Markdown or HTML would read as a sign of its own: anywhere, and where a line begins.
SIGN = re.compile(r"([\\`*_\[\]<>|~&$]|:(?=//)|(?<=www)\.)")
FIRST_SIGN = re.compile(r"^([-+=#]|\d{1,9}[.)])")


def make_prompts(recipe: Recipe, chat: Chat, config: "PretrainedConfig") -> list[list[int]]:
    """The token ids of each of `card_questions`, as training renders such a question.

    Args:
        config: of the base; names its positions.

    Raises:
        UserError: for a question that cannot be asked: it is empty, lacks a column of the templates or is too long.
    """
    if not recipe.card_questions:
        return []
    columns = template_columns(recipe.system_prompt or "", "system_prompt")
    if others := [column for column in columns if column not in used_tags(recipe)]:
        raise UserError(
            f"card_questions: system_prompt is made of the column '{others[0]}', which no question has; write it as plain text"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    limit, prompts = max(0, min(recipe.max_length, positions - recipe.virtual_tokens - recipe.max_new_tokens)), []
    for number, question in enumerate(recipe.card_questions, 1):
        try:
            texts = parse(recipe, question)
            asked = compose(recipe, texts)
            system = fill(recipe.system_prompt or "", tags_of(recipe, texts))
            messages = [{"role": "system", "content": system}] * bool(system.strip())
            ids = chat.fit_prompt([*messages, {"role": "user", "content": asked}], positions).ids
        except UserError as error:
            raise UserError(f"card_questions: question {number}: {error}") from None
        if len(ids) > limit:
            raise UserError(
                f"card_questions: question {number} takes {len(ids)} tokens, and max_length with max_new_tokens leaves "
                f"{limit}; shorten it, or set them otherwise"
            )
        prompts.append(ids)
    return prompts


def answer(recipe: Recipe, prompts: list[list[int]], run: "Trainer") -> list[dict[str, Any]]:
    """Question, answer and why it ended ("stop" or "length") of each; every rank calls it."""
    from carelm.training.state import zero_stage
    from carelm.training.tensorboard import answer_in_training

    if prompts:
        say(f"the finished model answers {len(prompts)} card_questions")
    size, answers = run.args.per_device_eval_batch_size, []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        answers += answer_in_training(
            run.model, run.chat, part, recipe.max_new_tokens, run.args, synced_gpus=zero_stage(run) == 3
        )
    return [
        {"question": question, "answer": a.text, "new_tokens": a.new_tokens, "finish_reason": a.finish_reason}
        for question, a in zip(recipe.card_questions, answers)
    ]


def describe(recipe: Recipe, answers: list[dict[str, Any]]) -> str:
    """The chapter of the card with these answers, as Markdown; empty where there are none."""
    if not answers:
        return ""
    under = ""
    template = recipe.system_prompt or ""
    if system := fill(template, {tag: f"{{{tag}}}" for tag in used_tags(recipe)}).strip():
        under = f" The system message was:\n\n{quote(system)}"
    parts = [
        "## What it answers\n\nThe finished model was asked these questions once. Each time it took the likeliest token. The "
        f"answers stand as they came; nobody has chosen or mended them.{under}"
    ]
    for a in answers:
        cut = f"\n\n(cut at {a['new_tokens']} tokens)" if a["finish_reason"] == "length" else ""
        parts.append(
            f"**Question**\n\n{quote(a['question'])}\n\n**Answer**\n\n{quote(a['answer']) or '(nothing)'}{cut}"
        )
    return "\n\n".join(parts) + "\n\n"


def quote(text: str) -> str:
    """A text as a Markdown quotation that shows it letter by letter: no table, heading, link, fence or HTML comes of it."""
    lines = [_plain(line) for line in text.replace("\0", "\ufffd").strip("\r\n").splitlines()]
    ends = ["\\" if line and after else "" for line, after in zip(lines, [*lines[1:], ""])]  # keeps the line break
    return "\n".join(f"> {line}{end}".rstrip() for line, end in zip(lines, ends))


def fence(text: str, language: str = "") -> str:
    """A text as a block of code, behind more backticks than any run of them in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}{ticks}"


def _plain(line: str) -> str:
    line = line.expandtabs(4).rstrip()
    words = SIGN.sub(r"\\\1", line.lstrip())
    words = FIRST_SIGN.sub(lambda m: f"{m[1][:-1]}\\{m[1][-1]}", words)
    return "&nbsp;" * (len(line) - len(line.lstrip())) * bool(words) + words
