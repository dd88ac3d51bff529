"""What a judge has said -> `judge` of results.json: marks and preferences with intervals, what may sway it, and its agreement
with people.

Only replies that could be read count. Where more than UNREAD of them could not, there is no figure: None stands in its place.
"""

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from carelm.evaluation import ratings, scores
from carelm.evaluation.judge import CRITERIA, OVERALL, PROMPTS, SCALE, Judge, Judged, Judgement, Preference
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import Scored, Statistics
from carelm.evaluation.verdicts import main_pair
from carelm.recipe import Recipe

UNREAD = 0.1  # share of the replies, above which a figure would be of chosen answers
MOST_SHOWN = 3  # questions in which each model was preferred, and replies that could not be read
Lines = dict[str, list[dict[str, Any]]]


class Sample:
    """The questions that are judged. Args: their conversations; the resamples that the recipe asks for are drawn of these."""

    def __init__(self, recipe: Recipe, conversations: list[str]):
        self.conversations, self.number = conversations, len({*conversations})
        self._drawn = scores.draws(self.number, recipe.num_resamples, recipe.split_seed)

    def means(self, columns: dict[str, np.ndarray]) -> dict[str, Scored]:
        """The mean of each column, float64 [questions], over its values that are there: nan is none."""
        turns = {
            name: scores.share_of(np.stack([np.nan_to_num(values), ~np.isnan(values)], 1).astype(float))
            for name, values in columns.items()
        }
        return self.resampled(turns)

    def resampled(self, turns: dict[str, Statistics]) -> dict[str, Scored]:
        return scores.resample(scores.by_conversation(turns, self.conversations), self._drawn)


def find(
    recipe: Recipe,
    judge: Judge,
    models: dict[str, Any],
    questions: list[Question],
    lines: Lines,
    rated: list[dict[str, str]],
    folder: Path,
) -> dict[str, Any]:
    """Asks the judge about `judge_samples` of the questions: about each model's answer, and about every two of them.

    Args:
        models: of the results; the base and the tuned model are known by their kind.
        lines: each model's predictions in the order of the questions.
        rated: the ratings by hand; what they are about is judged too, to tell how far the judge agrees.
        folder: where the judgements are kept.

    Raises:
        UserError: for an endpoint that fails; what the judge has said is kept.
    """
    number = min(recipe.judge_samples, len(questions))
    places = sorted(random.Random(recipe.split_seed).sample(range(len(questions)), number))
    first, tuned = main_pair(models)
    names = [first, *(name for name in models if name != first)]
    pairs = [*itertools.combinations(names, 2)]
    by_hand = ratings.choices(rated, first, tuned, questions, lines) if tuned else []
    asked = [(i, (name,)) for i in places for name in names] + [(i, pair) for i in places for pair in pairs]
    asked += [(i, (first, tuned)) for i in sorted({i for i, _ in by_hand} - {*places})]
    about = [_judged(questions[i], [lines[name][i]["prediction"] for name in whose]) for i, whose in asked]
    said = dict(zip(asked, judge.judge(about, folder)))
    sample = Sample(recipe, [questions[i].conversation for i in places])
    of_models = {name: [said[i, (name,)] for i in places] for name in names}
    of_pairs = {pair: [said[i, pair] for i in places] for pair in pairs}
    marks = {name: _marks(judgements) for name, judgements in of_models.items()}
    found_pairs = [
        {
            "models": [*pair],
            "marks": _mark_differences(sample, *(marks[name] for name in pair)),
            **_preferences(sample, pair, of_pairs[pair]),
            **_lengths(of_pairs[pair], [[lines[name][i]["prediction"] for i in places] for name in pair]),
            "examples": _examples(pair, of_pairs[pair], [questions[i].id for i in places]),
        }
        for pair in pairs
    ]
    _correct(found_pairs)
    days = sorted({line["date"] for line in judge.lines.values()})
    tokens = {key: sum(line[key] for line in judge.lines.values()) for key in ("prompt_tokens", "new_tokens")}
    return {
        "model": judge.model,
        "endpoint": judge.endpoint.url,
        "dates": [days[0], days[-1]] if days else [],
        "decides": recipe.judge_decides,
        "scale": [*SCALE],
        "criteria": CRITERIA,
        "prompts": PROMPTS,
        "max_tokens": judge.max_tokens,
        "refused": sorted({key for line in judge.lines.values() for key in line["refused"]}),
        "questions": len(places),
        "conversations": sample.number,
        "usage": {"replies": len(judge.lines), **tokens},
        "models": {
            name: {
                "answers": len(places),
                **_unread([judgement for judgement in of_models[name] if not judgement.found]),
                "marks": _if_read(marks[name], lambda of_model: _intervals(sample.means(of_model))),
            }
            for name in names
        },
        "pairs": found_pairs,
        "agreement": _agreement(recipe, questions, by_hand, said, (first, tuned)) if by_hand else {},
    }


def _judged(question: Question, answers: list[str]) -> Judged:
    """A question without its shots, which are other conversations."""
    system = [m for m in question.messages[:1] if m["role"] == "system"]
    return Judged(system + question.own_turns(), tuple(answers), question.references[0])


def _marks(judgements: list[Judgement]) -> dict[str, np.ndarray]:
    return {name: np.array([j.found.get(name, np.nan) for j in judgements], float) for name in CRITERIA}


def _if_read(marks: dict[str, np.ndarray], figures: Any) -> Any:
    return None if np.isnan(marks[next(iter(marks))]).mean() > UNREAD else figures(marks)


def _intervals(scored: dict[str, Scored]) -> dict[str, dict[str, float]]:
    return {name: scores.interval(one) for name, one in scored.items()}


def _mark_differences(sample: Sample, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """By criterion the marks of b less those of a, over the questions in which both were read."""
    both = [
        {name: np.where(np.isnan(other[name]), np.nan, own[name]) for name in own} for own, other in ((a, b), (b, a))
    ]

    def differences(_: dict[str, np.ndarray]) -> dict[str, Any]:
        of_a, of_b = (sample.means(marks) for marks in both)
        return {name: scores.difference(of_a[name], of_b[name]) for name in CRITERIA}

    return _if_read(both[0], differences)


def _preferences(sample: Sample, pair: tuple[str, str], said: list[Preference]) -> dict[str, Any]:
    """By criterion in how many questions each of two models was preferred, and the second one's share less the first one's."""
    found: dict[str, Any] = {"questions": len(said), "asked": sum(one.orders > 0 for one in said)}
    unread = [judgement for one in said for judgement in one.unread]
    found["unread_pairs"] = sum(not one.found for one in said)
    found |= _unread(unread)
    if found["unread_pairs"] > UNREAD * found["asked"]:
        return found | {"preferred": None}
    preferred = {}
    for name in (*CRITERIA, OVERALL):
        chosen = [one.found.get(name) for one in said]
        wins = {
            side: np.array([np.nan if choice is None else choice == side for choice in chosen], float)
            for side in ("1", "2")
        }
        scored = sample.means(wins)
        preferred[name] = {
            pair[0]: chosen.count("1"),
            pair[1]: chosen.count("2"),
            "tie": chosen.count("tie"),
            "orders_disagree": sum(name in one.disagree for one in said),
            **scores.difference(scored["1"], scored["2"]),
        }
    return found | {"preferred": preferred}


def _lengths(said: list[Preference], texts: list[list[str]]) -> dict[str, Any]:
    """What may sway a judge: the words of the answers that it prefers overall and of the others, and which one stood first."""
    words = [
        (len(texts[won][k].split()), len(texts[1 - won][k].split()))
        for k, one in enumerate(said)
        if (won := {"1": 0, "2": 1}.get(one.found.get(OVERALL, ""))) is not None
    ]
    means = [float(np.mean(of_side)) if words else None for of_side in zip(*words)] or [None, None]
    firsts, chosen = (sum(one.first_chosen[k] for one in said) for k in (0, 1))
    return {
        "words": {"preferred": means[0], "other": means[1], "longer_preferred": sum(a > b for a, b in words)},
        "decided": len(words),
        "first_chosen": {"replies": chosen, "first": firsts},
    }


def _examples(pair: tuple[str, str], said: list[Preference], ids: list[str]) -> dict[str, list[str]]:
    return {
        name: [i for i, one in zip(ids, said) if one.found.get(OVERALL) == side][:MOST_SHOWN]
        for side, name in zip("12", pair)
    }


def _correct(pairs: list[dict[str, Any]]) -> None:
    """Holm's correction over the pairs, of each criterion by itself."""
    for key in ("marks", "preferred"):
        given = [pair[key] for pair in pairs if pair[key] is not None]
        for name in given[0] if given else ():
            adjusted = scores.holm([figures[name]["p_value"] for figures in given])
            for figures, p_value in zip(given, adjusted):
                figures[name] |= {"p_value_holm": p_value, "comparisons": len(given)}


def _unread(judgements: list[Judgement]) -> dict[str, Any]:
    return {
        "unread": dict(Counter(judgement.problem for judgement in judgements).most_common()),
        "first_unread": [judgement.reply[:200] for judgement in judgements[:MOST_SHOWN]],
    }


def _agreement(
    recipe: Recipe,
    questions: list[Question],
    by_hand: list[tuple[int, str]],
    said: dict[tuple[int, tuple[str, ...]], Any],
    pair: tuple[str, str],
) -> dict[str, Any]:
    """How often judge and people choose the same of two answers or neither, with Cohen's kappa and its interval over resampled
    conversations. A rating of a pair that the judge's reply could not be read of does not count."""
    sides = {"1": pair[0], "2": pair[1], "tie": "tie"}
    both = [(i, chosen, sides[found[OVERALL]]) for i, chosen in by_hand if (found := said[i, pair].found)]
    if not both:
        return {"ratings": 0, "of": len(by_hand)}
    names = (*pair, "tie")
    table = np.zeros((len(both), len(names) ** 2))
    for row, (_, hand, own) in zip(table, both):
        row[names.index(hand) * len(names) + names.index(own)] = 1
    sample = Sample(recipe, [questions[i].conversation for i, *_ in both])
    scored = sample.resampled({"kappa": Statistics(table, kappa)})["kappa"]
    counts = table.sum(0).reshape(len(names), -1).astype(int)
    return {
        "ratings": len(both),
        "of": len(by_hand),
        "conversations": sample.number,
        "agreed": int(np.trace(counts)),
        "kappa": scores.interval(scored),
        "by_hand_and_judge": {name: dict(zip(names, map(int, row))) for name, row in zip(names, counts)},
    }


def kappa(sums: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960, https://doi.org/10.1177/001316446002000104) of counts [..., k * k] of what two have chosen: their
    agreement beyond that of chance. 0 where both have chosen one thing alone: nothing can be told of chance there."""
    table = sums.reshape(*sums.shape[:-1], round(sums.shape[-1] ** 0.5), -1)
    number = np.maximum(table.sum((-2, -1)), 1)
    agreed = np.trace(table, axis1=-2, axis2=-1) / number
    chance = (table.sum(-1) * table.sum(-2)).sum(-1) / number**2
    return np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1), 0.0)
