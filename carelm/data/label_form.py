"""How a recipe's answers hold their labels. Imports no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from carelm import ranks
from carelm.data.labels import parse_label
from carelm.data.templates import around_last_column
from carelm.errors import UserError
from carelm.recipe import Recipe


@dataclass(frozen=True)
class Form:
    """How an answer holds its label: the reason, where there is one, `between`, the label, `behind`.

    Attributes:
        labels: in the recipe's order.
    """

    labels: tuple[str, ...]
    has_reason: bool
    between: str
    behind: str

    def answer(self, label: str, reason: str = "") -> str:
        return f"{reason}{self.between}{label}{self.behind}"

    def reason(self, text: str) -> str:
        """What a free answer says before its label: all of it, where it does not come to one; nothing without a reason.

        Where the label has a line of its own that begins with words ("Label: "), the first such line ends the reason, whatever
        follows it. Other text between the two may stand in a reason too: it counts where a label comes after it, at the end.
        """
        if not self.has_reason:
            return ""
        mark, between = self.between.strip(), re.escape(self.between.rstrip() or self.between)
        if "\n" in self.between and re.search(r"\w", mark):
            return re.split(rf"(?:^|\s*\n)\s*{re.escape(mark)}", text, maxsplit=1, flags=re.IGNORECASE)[0]
        label = "|".join(map(re.escape, self.labels))
        end = rf"{between}\s*(?:{label})\W*(?:{re.escape(self.behind.strip())}\W*)?\Z"
        return re.split(end, text, flags=re.IGNORECASE)[0]

    def true_label(self, reference: str) -> str:
        return parse_label(reference, self.labels)


def form_of(recipe: Recipe) -> Form:
    """The form that the recipe asks for, whether its answers have it or not."""
    parts = around_last_column(recipe.completion_template) if recipe.completion_template else (False, "", "")
    return Form(tuple(recipe.labels), *parts)


def why_none(recipe: Recipe, references: Iterable[tuple[str, str]]) -> str:
    """Why the expected answers, each behind the name of its row, do not end in their labels as the recipe's form has it; empty
    where they do. Each holds a label.

    Raises:
        UserError: where a constrained score is to decide and they do not.
    """
    form = form_of(recipe)
    for row, reference in references:
        end = form.answer(form.true_label(reference))
        fits = reference.endswith(end) if form.has_reason else reference == end
        is_whole = form.has_reason and form.between in reference  # else it may be another column's text
        if form.has_reason and not form.between:
            why = "completion_template has no text between the reason and the label"
        elif not fits and (is_whole or not recipe.reference_columns):
            why = f"the answer of {row} does not end in a label as the list has it ({end.strip()!r})"
        else:
            continue
        if recipe.primary_metric.startswith("constrained"):
            raise UserError(f"primary_metric: {recipe.primary_metric} cannot be had: {why}")
        return f"labels are read from free answers and not scored by their probability: {why}"
    return ""


def find_form(recipe: Recipe, references: Iterable[tuple[str, str]]) -> Form | None:
    """How the recipe's answers hold their labels; None, which is said, where they do not end in one (`why_none`)."""
    if not recipe.labels:
        return None
    if why := why_none(recipe, references):
        ranks.say(why)
        return None
    return form_of(recipe)
