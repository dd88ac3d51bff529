"""The figures of one evaluation, and how a figure becomes part of a page."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from carelm.evaluation.scores import NAMES
from carelm.evaluation.tables import shared_scores

matplotlib.use("agg")
COLOURS = ("#8b95a5", "#0b7a75", "#d1603d", "#5b5ea6", "#b08900", "#3c7dd9")  # the first is for the base
DARK_COLOURS = ("#8b95a5", "#3fb8b0", "#f08a6b", "#9a9df0", "#e0bb3c", "#79a9f5")  # the same on a dark page
STYLE = {"font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#8b95a5", "axes.labelcolor": "#3d4654", "xtick.color": "#3d4654", "ytick.color": "#3d4654",
         "svg.fonttype": "none", "svg.hashsalt": "carelm"}  # fmt: skip


def scores(results: dict[str, Any]) -> Figure:
    """Every score of every model with its interval, ROUGE and shares on one axis, BLEU and chrF on another."""
    models = results["models"]
    there = [s for s in shared_scores(models) if any(model[s]["value"] for model in models.values())]
    groups = [[s for s in there if s not in ("bleu", "chrf")], [s for s in there if s in ("bleu", "chrf")]]
    groups = [group for group in groups if group] or [there]
    figure = Figure(figsize=(9, max(2.2, 0.55 + (0.16 * len(models) + 0.14) * len(there))), layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=[max(1, len(group)) for group in groups], squeeze=False)[:, 0]
    step = 0.72 / len(models)
    for axis, group in zip(axes, groups):
        for k, (name, model) in enumerate(models.items()):
            y = [i + (k - (len(models) - 1) / 2) * step for i in range(len(group))]
            value = [model[s]["value"] for s in group]
            below, above = ([abs(model[s][end] - model[s]["value"]) for s in group] for end in ("low", "high"))
            axis.barh(y, value, step * 0.86, color=colour(k), label=name, xerr=[below, above],
                      error_kw={"ecolor": "#20262e", "elinewidth": 1, "capsize": 2})  # fmt: skip
        axis.set_yticks(range(len(group)), [NAMES[s] for s in group])
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#e3e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_xlim(0, max(0.05, axes[0].get_xlim()[1]))
    axes[-1].set_xlabel("BLEU and chrF: 0 to 100, the others 0 to 1; bars with 95 % intervals")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(models), frameon=False)
    return figure


def latency(results: dict[str, Any]) -> Figure:
    """The primary metric with its interval over the median time to a whole answer at batch size 1."""
    metric = results["primary_metric"]
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for k, (name, model) in enumerate(results["models"].items()):
        score, times = model[metric], model["latency"]["e2e_ms"]
        axis.errorbar(times["p50"], score["value"], xerr=[[0], [times["p95"] - times["p50"]]],
                      yerr=[[abs(score["value"] - score["low"])], [abs(score["high"] - score["value"])]],
                      fmt="o", color=colour(k), capsize=3, markersize=8, label=name + way(model))  # fmt: skip
    axis.legend(frameon=False, loc="best")
    axis.set_xlabel("milliseconds for one answer at batch size 1: median, line to p95")
    axis.set_ylabel(NAMES[metric])
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(color="#e3e7ec", linewidth=0.8)
    axis.set_axisbelow(True)
    return figure


def loss(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Training and validation loss of the run, over its steps."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
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


def colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def as_svg(figure: Figure) -> str:
    """The figure as SVG without XML head, so that it can stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def for_page(svg: str) -> str:
    """The same in the colours of the page that it stands in, dark or light."""
    names = {
        "#20262e": "ink",
        "#3d4654": "ink",
        "#000000": "ink",
        "#b9c2ce": "grey",
        "#e3e7ec": "line",
        "#ffffff": "paper",
    }
    names |= {name: f"c{k}" for k, name in enumerate(COLOURS)}
    for name, variable in names.items():
        svg = svg.replace(name, f"var(--{variable})")
    return svg


def way(model: dict[str, Any]) -> str:
    """Said of times that hold the way to an endpoint and back."""
    return " over the wire" if model["latency"].get("over_the_wire") else ""
