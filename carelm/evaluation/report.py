"""Results -> results.json, report.html (one file, plots inside), report.md and TensorBoard."""

import html
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from carelm.evaluation import judge_report, label_report, plots, run_report, same_answers, tables, verdicts
from carelm.evaluation.plots import COLOURS, DARK_COLOURS, STYLE
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import NAMES
from carelm.evaluation.shown import WORDS, Shown
from carelm.files import read_json, write_whole
from carelm.recipe import Recipe
from carelm.recipe_file import read_yaml
from carelm.training import finished, tensorboard

Lines = dict[str, list[dict[str, Any]]]


def write(
    folder: Path, recipe: Recipe, results: dict[str, Any], questions: list[Question], lines: Lines
) -> dict[str, Any]:
    """Writes everything that a person or a program reads of a comparison into `folder`, results.json last, and returns the
    results with what they say in a sentence: `headline`, `besides`, and `same`, the models that answer like another."""
    results = results | {"same": same_answers.find(results, lines)}
    results = judge_report.add_sentences(results)
    results = verdicts.headline(results, results["same"]) | results  # the answer stands first in results.json
    results["besides"] = [*results["besides"], *same_answers.of_merges(results, results["same"])]
    results = judge_report.lead(results)
    curves = loss_curves(recipe.output_dir / "runs")
    with matplotlib.rc_context(STYLE):
        figures = {"scores": plots.scores(same_answers.without(results, results["same"]))}
        if all(m["latency"]["e2e_ms"] for m in results["models"].values()):
            figures["latency"] = plots.latency(results)
        figures |= label_report.plots(results, COLOURS)
        if curves:
            figures["loss"] = plots.loss(curves)
        svgs = {name: plots.as_svg(figure) for name, figure in figures.items()}
        _write_tensorboard(folder, results, {name: figures[name] for name in figures if name != "loss"})
    _write_final(recipe.output_dir, results)
    shown = Shown(f"{recipe.name}: is the tuned model better?", results, questions, lines)
    _write_pages(folder, "report", shown, svgs)
    write_whole(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
    return results


def write_comparison(
    folder: Path,
    title: str,
    results: dict[str, Any],
    questions: list[Question],
    lines: Lines,
    curves: dict[str, dict[str, list[tuple[int, float]]]],
) -> dict[str, Any]:
    """The same of several runs: comparison.html, .md and .json, the last one last; `curves` are the losses of each run."""
    results = verdicts.headline(results) | results | {"same": {}}
    with matplotlib.rc_context(STYLE):
        svgs = {name: plots.as_svg(figure) for name, figure in run_report.plots(results, curves, COLOURS).items()}
    _write_pages(folder, "comparison", Shown(f"{title}: which run is better?", results, questions, lines), svgs)
    write_whole(folder / "comparison.json", json.dumps(results, ensure_ascii=False, indent=1))
    return results


def _write_pages(folder: Path, stem: str, shown: Shown, svgs: dict[str, str]) -> None:
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_breakable,
    ).get_template("report.html.j2")
    page = template.render(
        shown=shown,
        results=shown.results,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        plots={name: Markup(plots.for_page(svg)) for name, svg in svgs.items()},
    )
    write_whole(folder / f"{stem}.html", page)
    for name, svg in svgs.items():
        write_whole(folder / f"{name}.svg", svg)
    write_whole(folder / f"{stem}.md", _markdown(shown, list(svgs)))


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
        "headline": results["headline"],
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


def _write_tensorboard(folder: Path, results: dict[str, Any], figures: dict[str, Figure]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    models = results["models"]
    tensorboard.remove_events(folder)  # of the same comparison, made anew below
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"verdict/{name}", figure)
        said = [results["headline"], *results["besides"], *results["verdicts"]]
        writer.add_text("verdict/answer", "\n\n".join(map(html.escape, said)))
        writer.add_text("verdict/scores", table(["score", *map(_cell, models)], [
            [NAMES[s], *("{} ({})".format(*tables.ranged(s, model[s])) for model in models.values())]
            for s in tables.shared_scores(models)
        ]))  # fmt: skip


def _write_final(run: Path, results: dict[str, Any]) -> None:
    """The deciding score beside the run's keys in TensorBoard, where it is that of the run's own result."""
    metrics, (name, figure) = read_json(run / finished.METRICS), verdicts.deciding(results)
    is_own = Path(results["models"][name]["folder"]).resolve() in (run.resolve(), (run / "merged").resolve())
    if metrics and is_own and (run / "runs").is_dir() and (run / "recipe.yaml").exists():
        keys = read_yaml(run / "recipe.yaml")
        tensorboard.write_final(run, keys, metrics, **{results["primary_metric"]: figure["value"]})


def _markdown(shown: Shown, pictures: list[str]) -> str:
    """report.md: the same tables; text from data and models is escaped and stands in <pre>."""
    results = shown.results
    names = [_cell(name) for name in shown.models]

    def listed(sentences: list[str]) -> list[str]:
        return ["\n".join(f"- {_cell(sentence)}" for sentence in sentences)] if sentences else []

    def example(one: dict[str, Any]) -> str:
        texts = [*(("user, before" if role == "user" else f"{role}, before", text) for role, text in one["earlier"]),
                 ("question", one["question"]), *(("expected reply", r) for r in one["references"]),
                 *((f"{name} ({one['values'][name]})" if name in one["values"] else name, text)
                   for name, text in one["answers"].items())]  # fmt: skip
        body = "\n".join(f"{label}: {text}" for label, text in texts)
        return f"{_cell(one['id'])}, {_cell(one['category'])}\n\n{_pre(body)}"

    scored = [
        [name + (" (decides)" if s == shown.metric else ""),
         *("{} ({})".format(*shown.ranged(s, m[s])) for m in shown.models.values()), meaning]
        for s, name, meaning, _ in shown.score_rows()
    ]  # fmt: skip
    compared = [
        [_cell(pair), NAMES[score], f"{text} ({around})", p_value]
        for pair, score, text, around, p_value in shown.differences()
    ]
    parts = [f"# {_cell(shown.title)}", f"**{_cell(results['headline'].replace('->', '→'))}**"]
    parts += listed(
        [
            *(said.replace("->", "→") for said in results["besides"]),
            *(same["sentence"] for same in results["same"].values()),
        ]
    )
    if results["cautions"]:
        parts += ["To keep in mind:", *listed(results["cautions"])]
    if shown.runs:
        head, rows = shown.runs
        cells = [[_cell(f"{text} ({small})" if small else text) for text, small in row] for row in rows]
        parts.append("## The runs\n\n" + table([*map(_cell, head)], cells))
    if not shown.models:
        return "\n\n".join([*parts, *(f"![{name}]({name}.svg)" for name in pictures)]) + "\n"
    sentence, examples = shown.typical()
    parts += ["## Typical questions", _cell(sentence), *map(example, examples)]
    left_out = f"\n\nLeft out, as 0 for every model: {', '.join(shown.left_out)}." if shown.left_out else ""
    parts += ["## Scores\n\n" + table(["score", *names, "what it means"], scored) + left_out, _cell(shown.about())]
    parts += [f"![{name}]({name}.svg)" for name in pictures]
    if categories := shown.categories():
        rows = [[_cell(name), str(n), *(f"{b.value} ({b.around})" for b in bars)] for name, n, bars in categories]
        of_categories = table(["category", "questions", *names], rows)
        parts.append(f"## {NAMES[shown.metric]} by category\n\n{_cell(shown.about_categories())}\n\n{of_categories}")
    if shown.judged:
        parts += ["## The judge", *("### " + _part(t) for t in shown.judged)]
    if compared:
        head = ["models", "score", "difference (95 % interval)", "p, Holm-adjusted"]
        said = [*listed(results["verdicts"]), *([shown.about_differences] if shown.about_differences else [])]
        parts += ["## Differences", *said, table(head, compared)]
    speed = [[label, *map(_cell, row)] for label, row in shown.speed_rows()]
    parts.append("## Speed and size\n\n" + table(["", *map(_cell, shown.everyone)], speed))
    parts += ["## " + _part(t) for t in shown.tables]
    parts += [f"The judge's instructions:\n\n{_pre(text)}" for text in shown.judge_prompts]
    parts.append("## Other examples")
    for title, several in shown.example_groups():
        parts += [f"### {_cell(title)}", *map(example, several)]
    parts.append("## The words\n\n" + table(["", ""], [[_cell(word), _cell(text)] for word, text in WORDS.items()]))
    under = json.dumps(shown.conditions(), indent=1)
    parts.append(f"## Conditions\n\n{_pre(under)}")
    return "\n\n".join(parts) + "\n"


def _part(t: tables.Table) -> str:
    rows = table([*map(_cell, t.head)], [[*map(_cell, row)] for row in t.rows])
    return f"{_cell(t.title)}\n\n{_cell(t.text)}\n\n{rows}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells of Markdown as a table of it."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _pre(text: str) -> str:
    return f"<pre>\n{html.escape(text, quote=False)}\n</pre>"


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return re.sub(r"([|*`_\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
