"""The test split as questions: one for every assistant turn that carries loss, with the true turns before it."""

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from carelm.chat.chat import Chat
from carelm.data.example import Example
from carelm.data.label_count import do_not_fit
from carelm.data.labels import parse_label
from carelm.data.report import SplitReport, shortened
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation.predicted import fill_in
from carelm.evaluation.scores import kind_of_request
from carelm.recipe import Recipe


@dataclass(frozen=True)
class Question:
    """What a model is asked (`messages`, ending before the answer), and the references that its answer is scored by; `tools`
    are what it may call, `compared` the texts of `overlap_columns`."""

    id: str
    conversation: str
    category: str
    messages: list[dict[str, Any]]
    references: list[str]
    tools: list[dict[str, Any]] | None = None
    compared: tuple[str, ...] = ()
    shots: int = 0

    def own_turns(self) -> list[dict[str, Any]]:
        """The messages of the conversation itself, without system prompt and shots."""
        return [m for m in self.messages if m["role"] != "system"][self.shots :]

    def expected(self) -> tuple[str, str]:
        """Its id and what is expected of an answer: the first reference."""
        return self.id, self.references[0]

    def last_words(self) -> str:
        """What the user says last."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


def make_questions(recipe: Recipe, chat: Chat) -> tuple[list[Question], dict[str, Any]]:
    """All questions of the test split, with `num_shots` training examples in front, and how they came about.

    Args:
        recipe: names the data.
        chat: renders the answers that have no text of their own (tool calls).

    Raises:
        UserError: where there is no test split, not enough shots, a test row without a prediction for `predicted_columns`, or
            where most references hold none of the recipe's labels.
    """
    questions, _, about = make_questions_of_both(recipe, chat)
    return questions, about


def make_questions_of_both(
    recipe: Recipe, chat: Chat, is_trained_on: bool = True
) -> tuple[list[Question], list[Question], dict[str, Any]]:
    """`make_questions`, with the questions of the validation split, where the recipe has labels, in between."""
    examples, reports = make_examples(recipe)
    if not examples.get("test"):
        raise UserError(
            f"dataset_test_split: {recipe.dataset_name} has no rows to test on; give a file of that split, or set "
            "test_fraction above 0"
        )
    examples["test"], predicted = fill_in(recipe, examples["test"])
    shots = _shots(recipe, examples["train"])
    questions, left_out = _with_label(recipe, _ask(recipe, chat, examples["test"], shots))
    if do_not_fit("test", len(left_out), len(questions) + len(left_out)):
        raise UserError(
            f"labels: {len(left_out)} of {len(questions) + len(left_out)} references hold none of {shortened(recipe.labels)} "
            f"(first: {_shown(left_out[0])}); list the labels as the data writes them"
        )
    if left_out:
        reports["test"].dropped["answer without a label"] = len(left_out)
    validation = _ask(recipe, chat, examples.get("validation", []), shots) if recipe.labels else []
    validation, _ = _with_label(recipe, validation)
    about = {
        "dataset": recipe.dataset_name,
        "split": recipe.dataset_test_split,
        "conversations": len({question.conversation for question in questions}),
        "questions": len(questions),
        "num_shots": recipe.num_shots,
        "categories_from": recipe.category_column or "the words of the request (complaint, question, other)",
        "more_questions": _how_to_ask_more(recipe, reports["test"], is_trained_on),
        "dropped": reports["test"].dropped,
        "without_label": _say_left_out(questions, left_out),
        "predicted_columns": predicted,
    }
    return questions, validation, about


def ask_split(recipe: Recipe, chat: Chat, examples: list[Example]) -> list[Question]:
    """The questions of one split's examples, as they are trained: with the data's own values of `predicted_columns`."""
    return _ask(recipe, chat, examples, shots=[])


def _how_to_ask_more(recipe: Recipe, report: SplitReport, is_trained_on: bool) -> str:
    """What limits the number of test questions, as the end of a sentence that says what to do."""
    if left := report.dropped.get("beyond max_eval_samples"):
        return f"set max_eval_samples higher than {recipe.max_eval_samples} ({left} more rows are there; for more, add some)"
    if "held out of train" in report.notes:
        then = ", and train again in a new output_dir" if is_trained_on else " in its recipe"
        return f"add rows, or set test_fraction higher than {recipe.test_fraction:g}{then}"
    return f"add rows to the {recipe.dataset_test_split} split"


def _ask(recipe: Recipe, chat: Chat, examples: list[Example], shots: list[dict[str, Any]]) -> list[Question]:
    questions = []
    has_categories = recipe.category_column is not None
    for example in examples:
        messages = example.prompt + example.completion
        turns = [i for i in range(len(example.prompt), len(messages)) if messages[i]["role"] == "assistant"]
        for turn in chat.trained_answers(example):
            before = messages[:turn]
            try:
                references = chat.references(example, turn)
            except UserError as error:
                raise UserError(f"{example.source}: {error}") from None
            asked = next((m["content"] for m in reversed(before) if m["role"] == "user"), "")
            system = [m for m in before[:1] if m["role"] == "system"]
            questions.append(
                Question(
                    id=example.id if len(turns) == 1 else f"{example.id}/{turns.index(turn) + 1}",
                    conversation=example.id,
                    category=(example.category or "none") if has_categories else kind_of_request(asked),
                    messages=system + shots + before[len(system) :],
                    references=references,
                    tools=example.tools,
                    compared=example.compared,
                    shots=len(shots),
                )
            )
    return _number_repeated(questions)


def _with_label(recipe: Recipe, questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """The questions whose expected answer holds one of the recipe's labels, which all do where it has none, and the others."""
    kept, others = [], []
    for question in questions:
        fits = not recipe.labels or parse_label(question.references[0], recipe.labels) is not None
        (kept if fits else others).append(question)
    return kept, others


def _say_left_out(questions: list[Question], left_out: list[Question]) -> list[str]:
    if not left_out:
        return []
    of_all = f"{len(left_out)} of {len(questions) + len(left_out)} test questions"
    return [f"{of_all} are not asked: the expected answer holds none of the labels (first: {_shown(left_out[0])})."]


def _shown(question: Question) -> str:
    return f"{question.id} {question.references[0][-60:].strip()!r}"


def _number_repeated(questions: list[Question]) -> list[Question]:
    """Questions of different rows may have one id (several rows of one ticket): the second is called id#2."""
    times: Counter[str] = Counter()
    numbered = []
    for question in questions:
        times[question.id] += 1
        again = times[question.id] > 1
        numbered.append(dataclasses.replace(question, id=f"{question.id}#{times[question.id]}") if again else question)
    return numbered


def _shots(recipe: Recipe, train: list) -> list[dict[str, Any]]:
    if recipe.num_shots > len(train):
        raise UserError(f"num_shots: {recipe.num_shots} is more than the {len(train)} training examples")
    chosen = random.Random(recipe.split_seed).sample(train, recipe.num_shots)
    return [m for example in chosen for m in example.prompt + example.completion if m["role"] != "system"]
