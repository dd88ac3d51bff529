"""What a comparison of runs shows that one evaluation does not: the table of the runs, their losses, quality against cost."""

from typing import Any

from matplotlib.figure import Figure

from carelm.evaluation.scores import NAMES
from carelm.evaluation.tables import against, ranged

Cell = tuple[str, str]  # what it says, and what stands small below it
LINES = ("-", "--", ":", "-.")  # with MARKERS, for what has the colour of another row
MARKERS = ("o", "s", "^", "D")


def table(results: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """The head and a row for each run: the deciding score first, then what it costs."""
    metric, best, models = results["primary_metric"], results["best"], results["models"]
    head = [f"{NAMES[metric]} (decides)", f"difference to {best}"] if models else []
    tests = results["tests"]
    head += [f"{name}: {NAMES[test['primary_metric']]}" for name, test in tests.items()]
    loss_head = "validation loss" if models else "validation loss (decides)"
    head += [loss_head if results["has_one_tokenizer"] else "validation loss (other tokenizers: not to compare)"]
    head += ["one answer, ms", "memory to answer, GiB"] if models else []
    head += ["trained", "training, s", "memory to train, GiB", "tokens/s"]
    rows = []
    for name, run in results["runs"].items():
        model, state = models.get(name), run.get("state", "finished")
        keys = ", ".join(f"{key}={value}" for key, value in run.get("axes", {}).items())
        row = [(name, state if state != "finished" else keys if keys != name.replace(",", ", ") else "")]
        if models:
            row.append(ranged(metric, model[metric]) if model else ("-", ""))
            row.append(against(results, name, best))
            for test in tests.values():
                there, score = test["models"].get(name), test["primary_metric"]
                row.append(ranged(score, there[score]) if there else ("-", ""))
        loss, before = run.get("eval_loss"), run.get("eval_loss_before")
        row.append((f"{loss:.4f}" if loss is not None else "-", f"{before:.4f} before" if before is not None else ""))
        if models:
            times = model["latency"]["e2e_ms"] if model else None
            row.append((f"{times['p50']:.1f}", f"p95 {times['p95']:.1f}") if times else ("-", ""))
            row.append((_gib(model["peak_memory_bytes"] if model else None), ""))
        trained = run.get("trainable_parameters")
        row.append((f"{trained / run['total_parameters']:.3%}", f"{trained:,}") if trained else ("-", ""))
        seconds = run.get("wall_seconds")
        row.append((f"{seconds:.1f}", f"{run['global_step']} steps") if seconds else ("-", ""))
        row.append((_gib(run.get("peak_memory_bytes")), ""))
        row.append((f"{run['tokens_per_second']:,.0f}" if run.get("tokens_per_second") else "-", ""))
        rows.append(row)
    return ["run", *head], rows


def _gib(number: float | None) -> str:
    return f"{number / 2**30:.2f}" if number else "-"


def plots(results: dict[str, Any], curves: dict[str, Any], colours: tuple[str, ...]) -> dict[str, Figure]:
    """The figures by name. The rows have the same colours in all of them."""
    style = {name: {"color": colours[k % len(colours)], "linestyle": LINES[k // len(colours) % len(LINES)],
                    "marker": MARKERS[k // len(colours) % len(MARKERS)]}
             for k, name in enumerate(results["runs"])}  # fmt: skip
    found = {"quality": _plot_quality(results, style)} if results["models"] else {}
    return found | ({"loss": _plot_losses(curves, style)} if curves else {})


def _plot_losses(curves: dict[str, dict[str, list[tuple[int, float]]]], style: dict[str, dict]) -> Figure:
    """Validation losses over one another, training losses faint behind them."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        if "training" in curve:
            axis.plot(*zip(*curve["training"]), **style[name] | {"marker": ""}, linewidth=0.8, alpha=0.3)
        if "validation" in curve:
            axis.plot(*zip(*curve["validation"]), **style[name], linewidth=1.8, markersize=4, label=name)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("validation loss (faint: training)")
    _finish(figure, [axis])
    return figure


def _plot_quality(results: dict[str, Any], style: dict[str, dict]) -> Figure:
    """The deciding score with its interval against the time of an answer, the memory for it, and the share that is trained."""
    metric = results["primary_metric"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for name, model in results["models"].items():
        run, score, times = results["runs"][name], model[metric], model["latency"]["e2e_ms"]
        trained, memory = run.get("trainable_parameters"), model["peak_memory_bytes"]
        share = 100 * trained / run["total_parameters"] if trained else 0
        for axis, cost in zip(axes, (times and times["p50"], memory and memory / 2**30, share)):
            if cost or axis is axes[2]:
                axis.errorbar(cost, score["value"], **style[name] | {"linestyle": ""}, capsize=3, markersize=7, label=name,
                              yerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]])  # fmt: skip
    axes[0].set_ylabel(NAMES[metric])
    words = ("one answer at batch size 1, ms (median)", "memory while answering, GiB", "trained, % of the parameters")
    for axis, label in zip(axes, words):
        axis.set_xlabel(label)
        axis.set_xlim(-0.03 * (end := 1.12 * axis.dataLim.x1 if axis.has_data() and axis.dataLim.x1 > 0 else 1), end)
    _finish(figure, axes)
    return figure


def _finish(figure: Figure, axes: Any) -> None:
    for axis in axes:
        axis.grid(color="#e3e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), 120 // max(12, max(map(len, labels), default=1) + 4)))
    figure.set_figheight(figure.get_figheight() + 0.23 * (len(labels) // columns))  # of the legend's further rows
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
