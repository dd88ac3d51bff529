"""The report's tables as plain rows, which report.html and report.md show alike."""

from dataclasses import dataclass
from typing import Any

from carelm.evaluation.scores import LABEL_SCORES, NAMES, TEXT_SCORES, UNREFERENCED

FEWEST_OF_A_PART = 5  # questions, or conversations, for an interval to be shown
ONE_DECIMAL = ("bleu", "chrf", "answer_words", "answer_tokens")


@dataclass(frozen=True)
class Table:
    """A title, what to know of it in a sentence or two, and the cells as text."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{self.text}\n\n{body}"


def ranged(score: str, figure: dict[str, float], key: str = "value") -> tuple[str, str]:
    """("0.512", "0.48 to 0.54")"""
    sign = "+" if key == "difference" else ""
    value, low, high = (f"{figure[k]:{sign}{'.1f' if score in ONE_DECIMAL else '.3f'}}" for k in (key, "low", "high"))
    return value, f"{low} to {high}"


def shared_scores(models: dict[str, dict[str, Any]]) -> list[str]:
    """The scores that all models have: an endpoint's model tells no probabilities of labels."""
    return [score for score in (*TEXT_SCORES, *LABEL_SCORES) if all(score in model for model in models.values())]


def make_tables(results: dict[str, Any]) -> list[Table]:
    """What is shown below scores, speed and categories."""
    elsewhere = (
        table for name, test in results["tests"].items() for table in _elsewhere(name, test, results["cautions"])
    )
    return [*elsewhere, *_checks(results), _unreferenced(results)]


def _columns(results: dict[str, Any], pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs that have a column of their own; none in a comparison of runs, where there would be too many."""
    return [] if "best" in results else pairs


def against(results: dict[str, Any], name: str, best: str) -> tuple[str, str]:
    """A run's paired difference to the best one in the deciding score, and its interval with the p-value."""
    pair = next((p for p in results["pairs"] if set(p["models"]) == {name, best}), None)
    if pair is None:
        return ("best", "") if name == best else ("-", "")
    score = pair["scores"][results["primary_metric"]]
    if pair["models"][1] == best:
        score = score | {"difference": -score["difference"], "low": -score["high"], "high": -score["low"]}
    text, around = ranged(results["primary_metric"], score, "difference")
    return text, f"{around}; p {score['p_value_holm']:.3g}"


def _elsewhere(name: str, test: dict[str, Any], said: list[str]) -> list[Table]:
    """One of `also_test`: what the models do on questions that they were not trained for."""
    models, pairs, about, metric = test["models"], _columns(test, test["pairs"]), test["test"], test["primary_metric"]
    scores = shared_scores(models)
    rows = [
        [NAMES[score] + (" (decides)" if score == metric else ""),
         *(_cell(score, m[score]) for m in models.values()),
         *(f"{_cell(score, p['scores'][score], 'difference')}, p {p['scores'][score]['p_value_holm']:.3g}" for p in pairs)]
        for score in scores
    ]  # fmt: skip
    if best := test.get("best"):
        below = (
            "{} ({})".format(*cell) if cell[1] else cell[0] for cell in (against(test, name, best) for name in models)
        )
        rows.insert(scores.index(metric) + 1, [f"difference to {best}", *below])
    asked = f"{about['questions']} questions of {about['conversations']} conversations from {about['dataset']}."
    verdicts = [] if "best" in test else test["verdicts"]  # among runs a row of their own says the same
    sentences = [*verdicts, about["leaks"]["sentence"], *(c for c in test["cautions"] if c not in said), asked]
    return [
        Table(f"Elsewhere: {name}", " ".join(sentences), ["score", *models, *_called(pairs)], rows),
        *_checks(test, f", {name}"),
    ]


def _unreferenced(results: dict[str, Any]) -> Table:
    models = results["models"]
    return Table(
        title="Answers without a reference",
        text="The share of the runs of four words that stood in the same answer before, and how long the answers are. Neither "
        "more nor less is better. Tokens include the end of turn.",
        head=["", *models, *_called(_columns(results, results["pairs"]))],
        rows=[
            [NAMES[score], *(_cell(score, m[score]) for m in models.values()),
             *(_cell(score, pair["scores"][score], "difference") for pair in _columns(results, results["pairs"]))]
            for score in UNREFERENCED
        ],
    )  # fmt: skip


def _checks(results: dict[str, Any], where: str = "") -> list[Table]:
    checks = results["checks"]
    if not checks:
        return []
    rows = []
    for name, check in checks.items():
        few = check["conversations"] < FEWEST_OF_A_PART
        shares = [
            f"{m['value']:.3f} (too few for an interval)" if few else _cell("", m) for m in check["models"].values()
        ]
        differences = [
            f"{p['difference']:+.3f}" if few else f"{_cell('', p, 'difference')}, p {p['p_value_holm']:.3g}"
            for p in _columns(results, check["pairs"])
        ]
        rows.append([name, str(check["questions"]), f"{check['references']:.3f}", *shares, *differences])
    first = next(iter(checks.values()))
    return [
        Table(
            title=f"Checks{where}",
            text="The share of answers that pass, of those to the questions that the check is about, with the references' own. "
            "p is Holm-adjusted over the pairs of a check.",
            head=["check", "questions", "references", *first["models"], *_called(_columns(results, first["pairs"]))],
            rows=rows,
        ),
        Table(
            title=f"Answers that fail a check{where}",
            text="The first of each model; the answers stand in predictions-MODEL.jsonl.",
            head=["check", *first["models"]],
            rows=[
                [name, *(", ".join(m["failed"]) or "none" for m in check["models"].values())]
                for name, check in checks.items()
            ],
        ),
    ]


def _cell(score: str, figure: dict[str, float], key: str = "value") -> str:
    return "{} ({})".format(*ranged(score, figure, key))


def _called(pairs: list[dict[str, Any]]) -> list[str]:
    return ["{1} less {0}".format(*pair["models"]) for pair in pairs]
