"""Examples as the model sees them, for a terminal."""

from carelm.chat.chat import Chat
from carelm.chat.encoder_decoder import one_answer_each
from carelm.data.report import format_report
from carelm.data.splits import make_examples
from carelm.recipe import Recipe
from carelm.training import learnt
from carelm.training.prepared import prepare


def preview(recipe: Recipe, chat: Chat, number: int) -> str:
    """The first `number` training examples as the model sees them, trained tokens highlighted, and what became of all rows:
    the report of the training, which finds them prepared."""
    prepared = prepare(recipe, chat)
    examples = one_answer_each(chat, make_examples(recipe)[0]["train"][:number])
    is_pair = recipe.objective == "preferences"
    rendered, _ = (chat.render_pairs if is_pair else chat.render)(examples)
    parts = []
    for example, tokens in zip(examples, rendered):
        if tokens is None:
            parts.append(f"--- {example.source}: dropped, too long for max_length {recipe.max_length}")
            continue
        for answer, one in zip((", preferred", ", rejected"), tokens) if is_pair else [("", tokens)]:
            parts.append(
                f"--- {example.source}{answer}: {len(one.input_ids)} tokens, {int(one.trained.sum())} trained (highlighted)\n"
                + chat.highlight(one)
            )
    parts.append("--- data\n" + format_report(prepared.report))
    parts += learnt.expect(recipe, prepared)
    return "\n".join(parts)
