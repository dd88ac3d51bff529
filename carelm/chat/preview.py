"""Examples as the model sees them, for a terminal."""

from dataclasses import asdict

from carelm.chat.chat import Chat
from carelm.data.mixture import draw_mixed
from carelm.data.report import format_report
from carelm.data.splits import make_examples
from carelm.recipe import Recipe


def preview(recipe: Recipe, chat: Chat, number: int) -> str:
    """The first `number` training examples as the model sees them, trained tokens highlighted, and what the data holds."""
    examples, reports = make_examples(recipe)
    rendered, _ = chat.render(examples["train"][:number])
    parts = []
    for example, tokens in zip(examples["train"], rendered):
        if tokens is None:
            parts.append(f"--- {example.source}: dropped, longer than max_length {recipe.max_length}")
        else:
            parts.append(
                f"--- {example.source}: {len(tokens.input_ids)} tokens, {int(tokens.trained.sum())} trained (highlighted)\n"
                + chat.highlight(tokens)
            )
    for split, report in reports.items():
        report.used = len(examples[split])
    for name, (rows, report) in draw_mixed(recipe, examples).items():
        report.used = len(rows)
        reports[f"train of {name}"] = report
    parts.append("--- data, before tokens are counted\n" + format_report({s: asdict(r) for s, r in reports.items()}))
    return "\n".join(parts)
