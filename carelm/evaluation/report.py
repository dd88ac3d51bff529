"""Results -> results.json, report.html (one file, plots inside), report.md and TensorBoard."""

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from carelm.evaluation import label_report, run_report
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import LABEL_SCORES, NAMES, TEXT_SCORES
from carelm.evaluation.tables import FEWEST_OF_A_PART, make_tables, ranged, shared_scores
from carelm.files import write_whole
from carelm.recipe import Recipe

matplotlib.use("agg")
UNFIT = ("old turns dropped", "prompt cut")
WORDS = {
    "ROUGE-1, -2, -L, -Lsum": "words, pairs of words and longest run of words in order that answer and reference share, 0 to 1",
    "BLEU, chrF": "runs of words (characters, where there are no spaces) and of letters that they share, 0 to 100; chrF reads "
    "all scripts",
    "accuracy and macro F1, constrained": "of the label that the model finds likeliest of the list, behind its own reason "
    "where it gives one",
    "calibration error": "how far the probability of the chosen label is from the share that is right, in the mean over 15 "
    "bins of as many questions each; 0 is perfect",
    "average precision": "precision in the mean over all thresholds, by the recall that each adds",
    "exact match, accuracy": "share of answers that are the reference, or hold the right label",
    "macro F1": "right and complete for each label, in the mean over the labels: a rare one counts as much",
    "95 % interval": "the middle 95 % of the figures over resampled test sets",
    "p, Holm-adjusted": "how often chance makes such a difference, raised for the number of pairs; real below 0.05",
    "A less B": "the score of A minus that of B: above zero, A is better",
    "p50 / p95 / p99": "half, 95 % and 99 % of the timed prompts were at most that slow",
}
COLOURS = ("#8b95a5", "#0b7a75", "#d1603d", "#5b5ea6", "#b08900", "#3c7dd9")  # the first is for the base
STYLE = {"font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#8b95a5", "axes.labelcolor": "#3d4654", "xtick.color": "#3d4654", "ytick.color": "#3d4654",
         "svg.fonttype": "none", "svg.hashsalt": "carelm"}  # fmt: skip


def write(
    folder: Path,
    recipe: Recipe,
    results: dict[str, Any],
    questions: list[Question],
    lines: dict[str, list[dict[str, Any]]],
) -> None:
    """Writes everything that a person or a program reads of a comparison into `folder`, results.json last."""
    curves = loss_curves(recipe.output_dir / "runs")
    with matplotlib.rc_context(STYLE):
        plots = {"scores": plot_scores(results)}
        if all(model["latency"]["e2e_ms"] for model in results["models"].values()):
            plots["latency"] = plot_latency(results)
        plots |= label_report.plots(results, COLOURS)
        if curves:
            plots["loss"] = plot_loss(curves)
        svgs = {name: _svg(figure) for name, figure in plots.items()}
        _write_tensorboard(folder, results, plots)
    shown = _Shown(f"{recipe.name}: is the tuned model better?", results, questions, lines)
    _write_pages(folder, "report", shown, results, svgs)
    write_whole(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1))


def write_comparison(
    folder: Path,
    title: str,
    results: dict[str, Any],
    questions: list[Question],
    lines: dict[str, list[dict[str, Any]]],
    curves: dict[str, dict[str, list[tuple[int, float]]]],
) -> None:
    """The same of several runs: comparison.html, .md and .json, the last one last; `curves` are the losses of each run."""
    with matplotlib.rc_context(STYLE):
        svgs = {name: _svg(figure) for name, figure in run_report.plots(results, curves, COLOURS).items()}
    _write_pages(
        folder, "comparison", _Shown(f"{title}: which run is better?", results, questions, lines), results, svgs
    )
    write_whole(folder / "comparison.json", json.dumps(results, ensure_ascii=False, indent=1))


def _write_pages(folder: Path, stem: str, shown: "_Shown", results: dict[str, Any], svgs: dict[str, str]) -> None:
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_breakable,
    ).get_template("report.html.j2")
    page = template.render(
        shown=shown,
        results=results,
        plots={k: Markup(v) for k, v in svgs.items()},
    )
    write_whole(folder / f"{stem}.html", page)
    for name, svg in svgs.items():
        write_whole(folder / f"{name}.svg", svg)
    write_whole(folder / f"{stem}.md", _markdown(shown, results, list(svgs)))


def _breakable(value: Any) -> Any:
    """A text, escaped, in which a line may break after the axes of a run's name (`lora_r=4,learning_rate=0.0002`)."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(re.sub(r",(?=\w+=)", ",<wbr>", str(escape(value))))


def summary(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The comparison in one line: the primary metric of each model with its interval, and what is real."""
    metric = results["primary_metric"]
    return {
        "report": str(folder / "report.html"),
        "primary_metric": metric,
        "models": {name: model[metric] for name, model in results["models"].items()},
        "examples_per_second": {n: m["throughput"].get("examples_per_second") for n, m in results["models"].items()},
        "verdicts": results["verdicts"],
        "tests": {name: test["verdicts"] for name, test in results["tests"].items()},
    }


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of training and evaluation from a run's TensorBoard events; empty where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = {"train/loss": "training", "eval/loss": "validation"}
    return {
        name: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag, name in tags.items()
        if tag in events.Tags()["scalars"]
    }


def plot_scores(results: dict[str, Any]) -> Figure:
    """Every score of every model with its interval, ROUGE and shares on one axis, BLEU and chrF on another."""
    models = results["models"]
    there = shared_scores(models)
    groups = [[s for s in there if s not in ("bleu", "chrf")], [s for s in there if s in ("bleu", "chrf")]]
    figure = Figure(figsize=(9, 0.55 + 0.16 * len(models) * len(there) + 0.14 * len(there)), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=[len(g) for g in groups])
    step = 0.72 / len(models)
    for axis, group in zip(axes, groups):
        for k, (name, model) in enumerate(models.items()):
            y = [i + (k - (len(models) - 1) / 2) * step for i in range(len(group))]
            value = [model[s]["value"] for s in group]
            below, above = ([abs(model[s][end] - model[s]["value"]) for s in group] for end in ("low", "high"))
            axis.barh(y, value, step * 0.86, color=_colour(k), label=name, xerr=[below, above],
                      error_kw={"ecolor": "#20262e", "elinewidth": 1, "capsize": 2})  # fmt: skip
        axis.set_yticks(range(len(group)), [NAMES[s] for s in group])
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#e3e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_xlim(0, max(0.05, axes[0].get_xlim()[1]))
    axes[1].set_xlabel("BLEU and chrF: 0 to 100, the others 0 to 1; bars with 95 % intervals")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(models), frameon=False)
    return figure


def plot_latency(results: dict[str, Any]) -> Figure:
    """The primary metric with its interval over the median time to a whole answer at batch size 1."""
    metric = results["primary_metric"]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for k, (name, model) in enumerate(results["models"].items()):
        score, times = model[metric], model["latency"]["e2e_ms"]
        axis.errorbar(times["p50"], score["value"], xerr=[[0], [times["p95"] - times["p50"]]],
                      yerr=[[abs(score["value"] - score["low"])], [abs(score["high"] - score["value"])]],
                      fmt="o", color=_colour(k), capsize=3, markersize=8, label=name + _way(model))  # fmt: skip
    axis.legend(frameon=False, loc="best")
    axis.set_xlabel("milliseconds for one answer at batch size 1: median, line to p95")
    axis.set_ylabel(NAMES[metric])
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(color="#e3e7ec", linewidth=0.8)
    axis.set_axisbelow(True)
    return figure


def plot_loss(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Training and validation loss of the run, over its steps."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        steps, values = zip(*points)
        if name == "training":
            axis.plot(steps, values, color="#b9c2ce", linewidth=1, label="training")
        else:
            axis.plot(steps, values, color=COLOURS[1], marker="o", linewidth=2, label="validation")
            axis.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(-4, 8), textcoords="offset points",
                          ha="right", color=COLOURS[1])  # fmt: skip
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    axis.grid(color="#e3e7ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False)
    return figure


class _Shown:
    """The results in the words and rows in which both reports show them; text is escaped by whoever prints it."""

    def __init__(self, title: str, results: dict[str, Any], questions: list[Question], lines: dict[str, list]):
        self.title, self.models, self.metric = title, results["models"], results["primary_metric"]
        self.results, self.lines = results, lines
        self.names, self.words = NAMES, WORDS
        self.questions = {q.id: i for i, q in enumerate(questions)}
        self._questions = questions
        self.scores = shared_scores(self.models) if self.models else []
        self.runs = run_report.table(results) if "runs" in results else None
        self.about_differences = "In the score that decides; the others stand in comparison.json." if self.runs else ""
        self.tables = label_report.tables(results) + make_tables(results) if self.models else []
        self.ranged = ranged

    def differences(self) -> list[tuple[str, str, str, str, str]]:
        """Pair, score, difference, interval and p-value; of several runs in the score that decides alone."""
        return [
            (f"{pair['models'][1]} less {pair['models'][0]}", score, *ranged(score, pair["scores"][score], "difference"),
             f"{pair['scores'][score]['p_value_holm']:.3g}")
            for pair in self.results["pairs"] for score in ([self.metric] if self.runs else self.scores)
        ]  # fmt: skip

    def speed_rows(self) -> list[tuple[str, list[str]]]:
        """Label and one text per model, of everything that is measured beside the scores."""
        models = self.models.values()

        def times(name: str) -> list[str]:
            return [" / ".join(f"{m['latency'][name][p]:.1f}" for p in ("p50", "p95", "p99")) + _way(m)
                    if m["latency"][name] else "-" for m in models]  # fmt: skip

        def held(m: dict[str, Any]) -> str:
            return f"{m['precision']}" + (f", weights in {m['bits']} bits" if m["bits"] else "")

        return [
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
            ("empty answers (count as 0)", [str(m["empty_predictions"]) for m in models]),
            ("answers cut at max_new_tokens", [str(m["cut_predictions"]) for m in models]),
        ]  # fmt: skip

    def conditions(self) -> dict[str, Any]:
        """Of all models, then what is each one's own."""
        own = {
            name: {**m["conditions"], "unused_generation_config": m["unused_generation_config"]}
            for name, m in self.models.items()
        }
        return {**self.results["conditions"], **self.results["signatures"], **own}

    def categories(self) -> list[tuple[str, int, list[tuple[str, str]]]]:
        first = next(iter(self.models.values()))["categories"]
        return [
            (
                name,
                part["questions"],
                [self._of_category(m["categories"][name]) for m in self.models.values()],
            )
            for name, part in first.items()
        ]

    def _of_category(self, part: dict[str, Any]) -> tuple[str, str]:
        value, around = ranged(self.metric, part[self.metric])
        return value, around if part["questions"] >= FEWEST_OF_A_PART else "too few for an interval"

    def example(self, question_id: str) -> dict[str, Any]:
        i = self.questions[question_id]
        question = self._questions[i]
        turns = [m for m in question.messages if m["role"] == "user"]
        return {
            "id": question_id,
            "category": question.category,
            "question": turns[-1]["content"] if turns else "",
            "earlier": len(turns) - 1,
            "references": question.references,
            "answers": {name: lines[i]["prediction"] for name, lines in self.lines.items()},
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
            for way, word in (("better", "gained"), ("worse", "lost")):
                groups.append((f"{b} {word} most against {a} ({NAMES[pair['changed_by']]})", pair[way]))
        for name, ends in ends_of.items():
            groups += [(f"{name}: {end}", ends[end]) for end in ("best", "worst")]
        return [(title, [self.example(i) for i in ids]) for title, ids in groups if ids]


def _way(model: dict[str, Any]) -> str:
    return " over the wire" if model["latency"].get("over_the_wire") else ""


def _speed(model: dict[str, Any], key: str) -> str:
    speed = model["throughput"]
    if key not in speed:
        return "-"
    part = f" (of the last {speed['examples']})" if speed["examples"] < speed["of_examples"] else ""
    return f"{speed[key]:,.1f}{part}"


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _svg(figure: Figure) -> str:
    """The figure as SVG without XML head, so that it can stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _write_tensorboard(folder: Path, results: dict[str, Any], plots: dict[str, Figure]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()  # events of the same comparison, made anew below
    with SummaryWriter(str(folder)) as writer:
        for name, model in results["models"].items():
            for score in (s for s in (*TEXT_SCORES, *LABEL_SCORES) if s in model):
                writer.add_scalar(f"{score}/{name}", model[score]["value"])
            if model["latency"]["e2e_ms"]:
                writer.add_scalar(f"e2e_ms_p50/{name}", model["latency"]["e2e_ms"]["p50"])
        for name, figure in plots.items():
            writer.add_figure(f"eval/{name}", figure)
        writer.add_text("eval/verdicts", "\n\n".join(html.escape(v) for v in results["verdicts"]))


def _markdown(shown: _Shown, results: dict[str, Any], plots: list[str]) -> str:
    """report.md: the same tables; text from data and models is escaped and stands in <pre>."""
    names = [_cell(name) for name in shown.models]

    def table(head: list[str], rows: list[list[str]]) -> str:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])

    scored = [
        [NAMES[s] + (" (primary)" if s == shown.metric else "")]
        + ["{} ({})".format(*shown.ranged(s, m[s])) for m in shown.models.values()]
        for s in shown.scores
    ]
    compared = [
        [_cell(pair), NAMES[score], f"{text} ({around})", p_value]
        for pair, score, text, around, p_value in shown.differences()
    ]
    parts = [f"# {_cell(shown.title)}"]
    parts += ["\n".join(f"- {_cell(sentence)}" for sentence in results["verdicts"] + results["cautions"])]
    if shown.runs:
        head, rows = shown.runs
        cells = [[_cell(f"{text} ({small})" if small else text) for text, small in row] for row in rows]
        parts.append("## The runs\n\n" + table([*map(_cell, head)], cells))
    if not shown.models:
        return "\n\n".join([*parts, *(f"![{name}]({name}.svg)" for name in plots)]) + "\n"
    test = results["test"]
    parts += [
        f"{test['questions']} questions of {test['conversations']} conversations from the {_cell(test['split'])} split of "
        f"{_cell(test['dataset'])}; 95 % percentile intervals over {results['conditions']['num_resamples']} resamples of "
        "conversations.",
        "## Scores\n\n" + table(["score", *names], scored),
        *(f"![{name}]({name}.svg)" for name in plots),
        "## Differences" + f"\n\n{shown.about_differences}" * bool(shown.about_differences),
        table(["models", "score", "difference (95 % interval)", "p, Holm-adjusted"], compared),
        "## Speed and size\n\n" + table(["", *names], [[label, *map(_cell, row)] for label, row in shown.speed_rows()]),
        f"## {NAMES[shown.metric]} by category\n\n"
        + table(["category", "questions", *names],
                [[_cell(name), str(n), *("{} ({})".format(*cell) for cell in row)] for name, n, row in shown.categories()]),
    ]  # fmt: skip
    for t in shown.tables:
        rows = table([*map(_cell, t.head)], [[*map(_cell, row)] for row in t.rows])
        parts.append(f"## {_cell(t.title)}\n\n{_cell(t.text)}\n\n{rows}")
    parts.append("## Examples")
    for title, examples in shown.example_groups():
        parts.append(f"### {_cell(title)}")
        for example in examples:
            texts = [("question", example["question"]), *(("reference", r) for r in example["references"]),
                     *example["answers"].items()]  # fmt: skip
            body = "\n".join(f"{label}: {text}" for label, text in texts)
            parts.append(f"{_cell(example['id'])}, {_cell(example['category'])}\n\n{_pre(body)}")
    parts.append("## The words\n\n" + table(["", ""], [[_cell(word), _cell(text)] for word, text in WORDS.items()]))
    under = json.dumps(shown.conditions(), indent=1)
    parts.append(f"## Conditions\n\n{_pre(under)}")
    return "\n\n".join(parts) + "\n"


def _pre(text: str) -> str:
    return f"<pre>\n{html.escape(text, quote=False)}\n</pre>"


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return re.sub(r"([|*`_\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
