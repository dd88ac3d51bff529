"""The results in the words, rows and bars in which both reports show them; text is escaped by whoever prints it."""

import json
from typing import Any, NamedTuple

from carelm.evaluation import judge_report, label_report, run_report, same_answers
from carelm.evaluation.plots import way
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import CONSTRAINED, LABEL_SCORES, NAMES
from carelm.evaluation.tables import FEWEST_OF_A_PART, ONE_DECIMAL, make_tables, ranged, shared_scores
from carelm.evaluation.verdicts import figure, main_pair

UNFIT = ("old turns dropped", "prompt cut")
MOST_CATEGORIES = 8  # that stand unfolded
NUMBERS_SHOWN = 5  # answers of a model that state a number from nowhere
MEANINGS = {
    "rouge1": "Words that answer and expected reply share, in any order. 1 is all of them.",
    "rouge2": "The same of pairs of neighbouring words.",
    "rougeL": "The longest run of words, in order, that answer and expected reply share, gaps allowed. 1 is word for word.",
    "rougeLsum": "The same, line by line.",
    "bleu": "Runs of one to four words that answer and expected reply share, 0 to 100; stern on short answers.",
    "chrf": "Runs of letters that they share, 0 to 100. It reads every script, and forgives other endings of a word.",
    "exact_match": "The share of answers that are the expected reply, to the letter.",
    "accuracy": "The share of answers whose written label is the right one.",
    "macro_f1": "Right and complete for each label, in the mean over the labels: a rare label counts as much as a common one.",
    "constrained_accuracy": "The share of questions whose likeliest label, of the list, is the right one.",
    "constrained_macro_f1": "Macro F1 of the likeliest labels: a rare label counts as much as a common one.",
}
WORDS = {
    "expected reply": "the reply in the test data, which the models have not seen",
    "95 % interval": "the thin line on a bar, and the range below it: the middle 95 % of the figures over test sets that are "
    "drawn anew from these conversations, with replacement (percentile bootstrap)",
    "p, Holm-adjusted": "how often chance makes such a difference, raised for the number of pairs that are compared (Holm's "
    "correction); counted as real below 0.05",
    "mean KL": "how far the merged model's probabilities of each next token are from the adapter's, in nats; 0 is the "
    "same model",
    "calibration error": "how far the probability of the chosen label is from the share that is right, in the mean over 15 "
    "bins of as many questions each; 0 is perfect",
    "average precision": "precision in the mean over all thresholds, by the recall that each adds",
    "A less B": "the score of A minus that of B: above zero, A is better",
    "p50 / p95 / p99": "half, 95 % and 99 % of the timed prompts were at most that slow",
}


class Bar(NamedTuple):
    """A figure with its interval, as text and as per cent of the bar's whole length."""

    value: str
    around: str
    width: float
    low: float
    high: float


def bar(score: str, found: dict[str, float], is_few: bool = False) -> Bar:
    """Args: `is_few` where there are too few questions for an interval."""
    value, around = ranged(score, found)
    width, low, high = (found[key] * (1 if score in ONE_DECIMAL else 100) for key in ("value", "low", "high"))
    return (
        Bar(value, "too few for an interval", width, width, width) if is_few else Bar(value, around, width, low, high)
    )


class Shown:
    """Args: `results` with `headline`, `besides` and `same`; the questions; each model's predictions in their order."""

    def __init__(self, title: str, results: dict[str, Any], questions: list[Question], lines: dict[str, list]):
        self.title, self.everyone, self.metric = title, results["models"], results["primary_metric"]
        self.results = results = same_answers.without(results, results["same"])
        self.models = results["models"]
        self.lines = {name: lines[name] for name in self.models}
        self.names, self.words, self.ranged, self.most_categories = NAMES, WORDS, ranged, MOST_CATEGORIES
        self._questions = {q.id: (i, q) for i, q in enumerate(questions)}
        shared = shared_scores(self.models) if self.models else []
        shown = [s for s in shared if s == self.metric or any(float(ranged(s, m[s])[0]) for m in self.models.values())]
        self.scores = sorted(
            shown, key=lambda s: (s != self.metric, (s in LABEL_SCORES) != (self.metric in LABEL_SCORES))
        )
        self.left_out = [NAMES[s] for s in shared if s not in self.scores]
        self.runs = run_report.table(results) if "runs" in results else None
        self.about_differences = "In the score that decides; the others stand in comparison.json." if self.runs else ""
        self.tables = label_report.tables(results) + make_tables(results) if self.models else []
        self.judged = judge_report.tables(results)
        self.tables += [table for table in [judge_report.how(results)] if table]
        self.judge_prompts = [*results["judge"]["prompts"].values()] if self.judged else []

    def differences(self) -> list[tuple[str, str, str, str, str]]:
        """Pair, score, difference, interval and p-value; of several runs in the score that decides alone."""
        return [
            (f"{pair['models'][1]} less {pair['models'][0]}", score, *ranged(score, pair["scores"][score], "difference"),
             f"{pair['scores'][score]['p_value_holm']:.3g}")
            for pair in self.results["pairs"] for score in ([self.metric] if self.runs else self.scores)
        ]  # fmt: skip

    def about(self) -> str:
        """What was asked, and how the intervals come about."""
        test = self.results["test"]
        shots = f", with {test['num_shots']} shots" if test.get("num_shots") else ""
        return (
            f"{test['questions']} questions of {test['conversations']} conversations from the {test['split']} split of "
            f"{test['dataset']}{shots}. Below a figure stands where it would mostly lie if other questions of this kind were "
            "asked."
        )

    def score_rows(self, of_labels: bool | None = None) -> list[tuple[str, str, str, list[Bar]]]:
        """Key, name, meaning, and a bar for each model; the score that decides first. Those of labels or of the text alone,
        where it is said."""
        chosen = [s for s in self.scores if of_labels in (None, s in LABEL_SCORES)]
        return [(s, NAMES[s], MEANINGS[s], [bar(s, m[s]) for m in self.models.values()]) for s in chosen]

    def text_rows(self) -> list[tuple[str, str, str, list[Bar]]]:
        """Where labels decide, the other scores, which a report may fold away."""
        return self.score_rows(of_labels=False) if self.metric in LABEL_SCORES else []

    def about_categories(self) -> str:
        """Where the categories of the questions come from."""
        column = self.results["test"].get("categories_from", "")
        if " " not in column:
            return f"The categories stand in the data, in the column {column}." if column else ""
        return (
            "The recipe names no category_column, so the questions are sorted by their English words: a complaint has one such "
            "as refund or broken, a question has a question mark or begins with a word such as how; the rest is other."
        )

    def categories(self) -> list[tuple[str, int, list[Bar]]]:
        """The categories with most questions first; none where all questions are of one."""
        first = next(iter(self.models.values()))["categories"]
        ordered = sorted(first.items(), key=lambda item: -item[1]["questions"])
        return [
            (name, part["questions"],
             [bar(self.metric, m["categories"][name][self.metric], part["questions"] < FEWEST_OF_A_PART)
              for m in self.models.values()])
            for name, part in ordered if len(first) > 1
        ]  # fmt: skip

    def checks(self) -> list[tuple[str, int, str, list[Bar]]]:
        """Name, how many questions it is about, the expected replies' own share, and a bar for each model."""
        return [
            (name, check["questions"], f"{check['references']:.3f}",
             [bar("", m, check["conversations"] < FEWEST_OF_A_PART) for m in check["models"].values()])
            for name, check in self.results["checks"].items()
        ]  # fmt: skip

    def typical(self) -> tuple[str, list[dict[str, Any]]]:
        """A sentence on how they are chosen, and the examples nearest the median gain of the tuned model (or of the best run);
        of one model those nearest its median score."""
        by, results = self.results["scored_by"], self.results
        best = results.get("best")
        first, second = main_pair(self.models)
        if best:
            first, second = next(iter(self.models)), best
        pair = next((p for p in results["pairs"] if {*p["models"]} == {first, second}), None)
        if pair is None:
            chosen, called = results["examples"][best or first]["typical"], [best or first]
            text = f"The {len(chosen)} questions whose {NAMES[by]} is nearest the median: half of all answers score higher."
        else:
            chosen, called = pair["typical"], pair["models"]
            change = f"change in {NAMES[by]} from {called[0]} to {called[1]}"
            text = (
                f"The {len(chosen)} questions whose {change} is nearest the median: one half of the questions gained more, the "
                "other less. So they are neither the best nor the worst."
            )
            if by in LABEL_SCORES:  # most changes are alike
                text = (
                    f"Most questions change alike, so these {len(chosen)} are drawn among those with the median {change}: they "
                    "are neither the best nor the worst."
                )
                if by.startswith(CONSTRAINED):
                    text += " Judged is the label that a model finds likeliest when it must choose; below stands what it wrote."
        shown = self.models if self.runs is None else called
        return text, [
            self.example(i, shown) | {"values": {name: _in_short(by, values[name]) for name in shown if name in values}}
            for i, values in chosen.items()
        ]

    def example(self, question_id: str, models: Any = None) -> dict[str, Any]:
        """One question with its earlier turns, expected replies and answers (of all models where none are named)."""
        i, question = self._questions[question_id]
        turns = question.own_turns()
        last = max((k for k, m in enumerate(turns) if m["role"] == "user"), default=0)
        return {
            "id": question_id,
            "category": question.category,
            "question": question.last_words(),
            "earlier": [(m["role"], _said(m)) for m in turns[:last]],
            "references": question.references,
            "answers": {name: self.lines[name][i]["prediction"] for name in models or self.models},
            "values": {},
        }

    def example_groups(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Title and examples: what changed most between each two models, and each model's best and worst."""
        groups, pairs, ends_of = [], self.results["pairs"], self.results["examples"]
        if self.runs:  # all would be too many: the best against what stands first
            best = self.results["best"]
            pairs = [pair for pair in pairs if set(pair["models"]) == {next(iter(self.models)), best}]
            ends_of = {best: ends_of[best]}
        for pair in pairs:
            a, b = pair["models"]
            for how, word in (("better", "gained"), ("worse", "lost")):
                groups.append((f"{b} {word} most against {a} ({NAMES[pair['changed_by']]})", pair[how]))
        for pair in self.results["judge"]["pairs"] if self.judged else ():
            a, b = pair["models"]
            if self.models.keys() >= {a, b}:
                groups += [
                    (f"the judge prefers {name} to {other}", pair["examples"][name]) for name, other in ((a, b), (b, a))
                ]
        for name, ends in ends_of.items():
            groups += [(f"{name}: {end}", ends[end]) for end in ("best", "worst")]
        for name, model in self.models.items() if not self.runs else ():
            first = (model.get("unfounded_numbers") or {}).get("first", {})
            groups += [(f"{name}: says {', '.join(first[i])}, which neither the question nor the expected reply has", [i])
                       for i in [*first][:NUMBERS_SHOWN]]  # fmt: skip
        return [(title, [self.example(i) for i in ids]) for title, ids in groups if ids]

    def speed(self) -> str:
        """The time of one answer, in a few words, for the fold that holds the rest."""
        times = {name: m["latency"]["e2e_ms"]["p50"] for name, m in self.everyone.items() if m["latency"]["e2e_ms"]}
        if not times or self.runs:
            return ""
        return f"one answer takes {', '.join(f'{ms:,.0f} ms ({name})' for name, ms in times.items())}"

    def speed_rows(self) -> list[tuple[str, list[str]]]:
        """Label and one text per model, of everything that is measured beside the scores."""
        models = self.everyone.values()

        def times(name: str) -> list[str]:
            return [" / ".join(f"{m['latency'][name][p]:.1f}" for p in ("p50", "p95", "p99")) + way(m)
                    if m["latency"][name] else "-" for m in models]  # fmt: skip

        def held(m: dict[str, Any]) -> str:
            return f"{m['precision']}" + (f", weights in {m['bits']} bits" if m["bits"] else "")

        rows = [
            ("what it is", [m["kind"] for m in models]),
            ("computed in", [held(m) for m in models]),
            ("prompts timed one at a time", [str(m["latency"]["prompts"]) for m in models]),
            ("time to first token, ms (p50 / p95 / p99)", times("ttft_ms")),
            ("time per further token, ms", times("tpot_ms")),
            ("whole answer, ms", times("e2e_ms")),
            ("examples per second", [_speed(m, "examples_per_second") for m in models]),
            ("tokens per second", [_speed(m, "tokens_per_second") for m in models]),
            ("largest batch", [str(m["throughput"].get("batch_size", "-")) for m in models]),
            ("peak memory, GiB", [f"{m['peak_memory_bytes'] / 2**30:.2f}" if m["peak_memory_bytes"] else "-" for m in models]),
            ("seconds to load", ["-" if m["load_seconds"] is None else f"{m['load_seconds']:.1f}" for m in models]),
            ("parameters", [f"{n:,}" if (n := m["total_parameters"]) else "-" for m in models]),
            ("of these trained", [f"{n:,} ({n / m['total_parameters']:.3%})" if (n := m["trained_parameters"]) else "-"
                                  for m in models]),
            ("prompt tokens (p50 / p95 / longest)", ["{p50} / {p95} / {max}".format(**m["prompt_tokens"]) for m in models]),
            ("prompts that did not fit", [", ".join(f"{m['prompt_tokens'][how]} {how}" for how in UNFIT if
                                                    how in m["prompt_tokens"]) or "0" for m in models]),
            ("merge: mean KL to its adapter, nats (allowed)", [_distance(m) for m in models]),
            ("answers served as evaluated", [m.get("served", "-") for m in models]),
            ("empty answers (count as 0)", [str(m["empty_predictions"]) for m in models]),
            ("answers cut at max_new_tokens", [str(m["cut_predictions"]) for m in models]),
        ]  # fmt: skip
        return [(label, cells) for label, cells in rows if {*cells} - {"-"}]

    def conditions(self) -> dict[str, Any]:
        """Of all models, then what is each one's own."""
        own = {
            name: {**m["conditions"], "unused_generation_config": m["unused_generation_config"]}
            for name, m in self.everyone.items()
        }
        return {**self.results["conditions"], **self.results["signatures"], **own}


def _in_short(score: str, value: float) -> str:
    """One answer's score beside it; of labels whether it is right."""
    if score.startswith(CONSTRAINED):
        return f"chooses {'the right' if value else 'a wrong'} label"
    if score in LABEL_SCORES:
        return "the right label" if value else "not the right label"
    return f"{NAMES[score]} {figure(score, value)}"


def _distance(model: dict[str, Any]) -> str:
    merge = same_answers.certificate(model)
    return f"{merge['mean_kl']:.2g} ({merge['tolerance']:.2g})" if merge else "-"


def _said(message: dict[str, Any]) -> str:
    return message.get("content") or json.dumps(message.get("tool_calls", ""), ensure_ascii=False)


def _speed(model: dict[str, Any], key: str) -> str:
    speed = model["throughput"]
    if key not in speed:
        return "-"
    part = f" (of the last {speed['examples']})" if speed["examples"] < speed["of_examples"] else ""
    return f"{speed[key]:,.1f}{part}"
