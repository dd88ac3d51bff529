"""How well each retriever finds the gold passages of questions, and how long it takes."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from carelm.evaluation import scores
from carelm.evaluation.tables import Table, ranged
from carelm.evaluation.verdicts import FEWEST_CONVERSATIONS, decide
from carelm.retrieval import refusals
from carelm.retrieval.gold import Asked
from carelm.retrieval.retriever import Retriever

DEPTH = 10  # passages that are looked at
FALSE_REFUSALS = 0.1  # of the answerable questions, which a threshold is chosen for
SCORES = ("recall@1", "recall@5", f"MRR@{DEPTH}")


def gold_ranks(retriever: Retriever, questions: Sequence[Asked], filtered: bool = False) -> np.ndarray:
    """The rank of the first gold passage for each question, int [questions] from 1; above DEPTH where it is not found."""
    if filtered:
        found = [retriever.search(question.text, DEPTH, question.filters) for question in questions]
    else:
        found = retriever.search_many([question.text for question in questions], DEPTH)
    return np.array([
        next((rank for rank, one in enumerate(of_one, 1) if one.passage.id in question.gold), DEPTH + 1)
        for question, of_one in zip(questions, found)
    ])  # fmt: skip


def confidences(retriever: Retriever, questions: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """How sure the retriever is of each question, float [questions]: the highest confidence of the passages that it finds, and
    that of those it finds where the question's gold passages are left out, so that nothing answers it."""
    found = retriever.search_many([q.text for q in questions], DEPTH + max(len(q.gold | q.also) for q in questions))
    without = [[one for one in of_one if one.passage.id not in q.gold | q.also] for q, of_one in zip(questions, found)]
    with_all, left_out = (
        np.array([max((one.confidence for one in of_one[:DEPTH]), default=0.0) for of_one in kind])
        for kind in (found, without)
    )
    return with_all, left_out


def refusals_of(retriever: Retriever, questions: Sequence[Asked], seed: int) -> dict[str, Any]:
    """What a threshold on that refuses of both, chosen on nine tenths of the questions for the last one; and the curve."""
    answerable, unanswerable = confidences(retriever, questions)
    found = refusals.by_folds(answerable, unanswerable, FALSE_REFUSALS, seed)
    return {"wanted_false_refusals": FALSE_REFUSALS, **found, "curve": refusals.curve(answerable, unanswerable)}


def statistics(ranks: np.ndarray) -> dict[str, scores.Statistics]:
    """recall@k: the share of questions that have a gold passage among the first k. MRR@10: the mean of 1 / rank, 0 beyond
    (Voorhees 1999, https://trec.nist.gov/pubs/trec8/papers/qa_report.pdf)."""
    values = ((ranks <= 1).astype(float), (ranks <= 5).astype(float), np.where(ranks <= DEPTH, 1 / ranks, 0.0))
    return {name: scores.mean_of(of_score) for name, of_score in zip(SCORES, values)}


def time_searches(retriever: Retriever, questions: Sequence[Asked], filtered: bool = False) -> dict[str, float]:
    """Milliseconds of a search, the question's vector included, one at a time; the first is not counted."""
    times = []
    for question in [questions[0], *questions]:
        began = time.perf_counter()
        retriever.search(question.text, DEPTH, question.filters if filtered else None)
        times.append((time.perf_counter() - began) * 1000)
    p50, p95 = np.percentile(times[1:], (50, 95))
    return {"p50": float(p50), "p95": float(p95), "searches": len(questions)}


def make_results(
    questions: Sequence[Asked], ranks: dict[str, np.ndarray], own: str, resamples: int, seed: int
) -> dict[str, Any]:
    """Every retriever's scores with their intervals over questions, and the paired differences of every two.

    Args:
        ranks: of each retriever's first gold passages.
        own: the retriever that the recipe names.
    """
    drawn = scores.draws(len(questions), resamples, seed)
    ids = [str(number) for number in range(len(questions))]
    resampled = {
        name: scores.resample(scores.by_conversation(statistics(of_one), ids), drawn) for name, of_one in ranks.items()
    }
    pairs = scores.compare(resampled)
    intervals = {
        name: {score: scores.interval(one) for score, one in of_one.items()} for name, of_one in resampled.items()
    }
    return {"retrievers": intervals, "pairs": pairs, "verdicts": list(_verdicts(intervals, pairs, own, len(questions)))}


def _verdicts(intervals: dict[str, Any], pairs: list[dict[str, Any]], own: str, questions: int):
    """Of each score whether another retriever is better than the recipe's, by the evaluation's own rule."""
    for score in SCORES:
        better = []
        for pair in pairs:
            if own in pair["models"]:
                other = next(name for name in pair["models"] if name != own)
                one = pair["scores"][score]
                is_second = pair["models"][1] == other
                low, high = (one["low"], one["high"]) if is_second else (-one["high"], -one["low"])
                if decide(one, questions) == ("better" if is_second else "worse"):
                    better.append(f"{other} is better ({low:+.3f} to {high:+.3f})")
        value, few = intervals[own][score]["value"], questions < FEWEST_CONVERSATIONS
        none = f"{questions} questions are too few to tell" if few else "no other is significantly better"
        yield f"{score} of {own}: {value:.3f}; {' and '.join(better) or none}"


def tables(found: dict[str, Any]) -> list[Table]:
    """Of results.json, as eval/retrieval.py writes it."""
    retrievers = found["retrievers"]
    rows = [
        [name, *("{} ({})".format(*ranged(score, of_one[score])) for score in SCORES),
         f"{of_one['latency_ms']['p50']:.0f} / {of_one['latency_ms']['p95']:.0f}" if of_one["latency_ms"] else "-"]
        for name, of_one in retrievers.items()
    ]  # fmt: skip
    pairs = [
        [f"{pair['models'][1]} less {pair['models'][0]}",
         *("{} ({})".format(*ranged(s, d, "difference")) + f", p {d['p_value_holm']:.3g}" for s, d in pair["scores"].items())]
        for pair in found["pairs"]
    ]  # fmt: skip
    shown = [Table("Retrievers", "With 95 % intervals over questions, and the time of one search.",
                   ["", *SCORES, "ms, p50 / p95"], rows)]  # fmt: skip
    if pairs:
        shown.append(Table("Differences", "Paired by question; p Holm-adjusted over all pairs.", ["", *SCORES], pairs))
    if told := found.get("refusals"):
        kinds = (
            f"{told[k]['value']:.0%} ({told[k]['low']:.0%} to {told[k]['high']:.0%})"
            for k in ("answerable", "unanswerable")
        )
        points = (refusals.at(told["curve"], limit) for limit in (0.05, 0.1, 0.2))
        shown.append(
            Table(
                "Refusals",
                "What a threshold on the confidence refuses: of the questions, and of the same ones where their gold passages "
                f"are left out. It is chosen for {told['wanted_false_refusals']:.0%} of the former, on nine tenths of the "
                "questions for the last one. Behind it the curve: the most that is refused at so many false refusals.",
                ["answerable, refused", "unanswerable, refused", "at 5%", "at 10%", "at 20%"],
                [[*kinds, *(f"{point['refused']:.0%}" if point else "-" for point in points)]],
            )
        )
    return shown


def markdown(title: str, found: dict[str, Any]) -> str:
    """report.md of results.json."""
    test, index, built = found["test"], found["index"], found["index"]["built"]
    about = (
        f"{test['questions']} test questions ({test['without_gold']} more have no gold passage), {index['passages']} passages, "
        f"{index['bytes'] / 2**20:.1f} MB; the index took {built['seconds']:.1f} s, {built['embedded']} passages embedded."
    )
    verdicts = "\n".join(f"- {verdict}" for verdict in found["verdicts"])
    return "\n\n".join([f"# {title}", about, verdicts, *(table.as_markdown() for table in tables(found))]) + "\n"
