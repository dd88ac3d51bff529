"""Tags of a customer's words for templates: {priority} by the recipe's urgent words, {sentiment} by TextBlob.

A template writes them as it likes: "[PRIORITY: {priority}] [SENTIMENT: {sentiment}] {text}". Training, evaluation and chat make
them by `make_tags` alone.

- priority is HIGH where one of `urgent_words` stands in the text, else NORMAL. Case is not told apart; in scripts with capital
  letters a word counts where it stands by itself. What the text means is not read: "not urgent" is HIGH by "urgent".
- sentiment is POSITIVE from a polarity of 0.1 upwards, NEGATIVE from -0.1 downwards, else NEUTRAL: the threshold of the
  library that TextBlob's analyzer is from (https://github.com/clips/pattern, `positive`). The analyzer and its lexicon are
  English: a text is read where at least half of its words stand in the lexicon as English ones, else it is NEUTRAL.
"""

import importlib.util
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import regex

from carelm.data.report import SplitReport
from carelm.data.templates import template_columns
from carelm.data.values import cell_text
from carelm.errors import UserError

if TYPE_CHECKING:
    from carelm.data.readers import Rows
    from carelm.recipe import Recipe

TAGS = ("priority", "sentiment")
THRESHOLD = 0.1  # of polarity, from -1 to 1
WORD = regex.compile(r"\p{L}+(?:['\u2019]\p{L}+)*")


def used_tags(recipe: "Recipe") -> list[str]:
    """The tags that the recipe's system prompt and question name; none without `tag_column`, where they are columns."""
    templates = (recipe.system_prompt, recipe.prompt_template) if recipe.tag_column else ()
    named = [column for template in templates for column in template_columns(template or "", "prompt_template")]
    return [tag for tag in TAGS if tag in named]


def check_tags(recipe: "Recipe") -> None:
    """Raises UserError for tags without what they are made of."""
    if recipe.urgent_words and not recipe.tag_column:
        raise UserError("urgent_words: set tag_column too, the column with the customer's words")
    if "priority" in used_tags(recipe) and not recipe.urgent_words:
        raise UserError("urgent_words is not set: {priority} is HIGH where one of them stands in the customer's words")
    for word in recipe.urgent_words:
        if not regex.search(r"[\p{L}\p{N}]", word):
            raise UserError(f"urgent_words: {word!r} holds no letter and no digit")
    if "sentiment" in used_tags(recipe) and importlib.util.find_spec("textblob") is None:
        raise UserError("{sentiment} needs TextBlob, which is not installed: pip install -e '.[tags]'")


def make_tags(recipe: "Recipe", text: str) -> dict[str, str]:
    """The tags that the recipe's templates name, for one text of a customer."""
    made = {}
    for tag in used_tags(recipe):
        made[tag] = priority(text, recipe.urgent_words) if tag == "priority" else sentiment(text)
    return made


def add_tags(recipe: "Recipe", rows: "Rows", report: SplitReport) -> "Rows":
    """The rows with a column for each tag; how many have which value is noted in the report, with those in other languages."""
    if not (tags := used_tags(recipe)):
        return rows
    texts = [cell_text(row, recipe.tag_column, source) or "" for source, row in rows]
    made = [make_tags(recipe, text) for text in texts]
    for tag in tags:
        values = [own[tag] for own in made]
        report.notes.append(f"{tag}: " + ", ".join(f"{values.count(value)} {value}" for value in sorted(set(values))))
    if "sentiment" in tags and (foreign := sum(not is_english(text) for text in texts)):
        report.notes.append(f"sentiment: {foreign} of {len(rows)} rows are not English and count as NEUTRAL")
    return [(source, row | own) for (source, row), own in zip(rows, made)]


def priority(text: str, urgent_words: Sequence[str]) -> str:
    return "HIGH" if _urgent(tuple(urgent_words)).search(_fold(text)) else "NORMAL"


def sentiment(text: str) -> str:
    if not is_english(text):
        return "NEUTRAL"
    from textblob import TextBlob  # a second to import

    polarity = TextBlob(text).sentiment.polarity
    return "POSITIVE" if polarity >= THRESHOLD else "NEGATIVE" if polarity <= -THRESHOLD else "NEUTRAL"


def is_english(text: str) -> bool:
    """Whether half of the words, or more, stand in TextBlob's lexicon as English ones; a text without words is not."""
    from textblob.en import lexicon

    words = WORD.findall(text.lower().replace("\u2019", "'"))
    heads = [word.partition("'")[0] for word in words]  # hasn't is has, can't is can
    known = sum(any(lexicon.get(h, "FW") != "FW" for h in (head, head.removesuffix("n"))) for head in heads)
    return bool(words) and 2 * known >= len(words)  # FW are foreign words


@lru_cache
def _urgent(words: tuple[str, ...]) -> regex.Pattern:
    edge = r"[\p{Cased}\p{N}]"
    if not words:
        return regex.compile("(?!)")
    return regex.compile("|".join(
        (rf"(?<!{edge})" if regex.match(edge, word) else "")
        + r"\s+".join(regex.escape(part) for part in word.split())
        + (rf"(?!{edge})" if regex.search(rf"{edge}\Z", word) else "")
        for word in map(_fold, words)
    ))  # fmt: skip


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
