"""What the reports show of labels: tables of text cells, and two plots."""

from typing import Any

from matplotlib.figure import Figure

from carelm.evaluation.scores import CONSTRAINED, LABEL_SCORES, NAMES, UNPARSABLE
from carelm.evaluation.tables import Table, ranged

MOST_LABELS, MOST_TAKEN = 5, 3  # whose table fits a page, and the mistakes of a label that are named


def tables(results: dict[str, Any]) -> list[Table]:
    """How often labels are right (with the baselines as rows of their own), how sure they are, the differences to the
    baselines, and the confusion of each; empty where there are no labels."""
    models, baselines = results["models"], results.get("baselines", {})
    if not any("confusion" in model for model in models.values()):
        return []
    found, confusions, deciding = [], [], CONSTRAINED if results["primary_metric"].startswith(CONSTRAINED) else ""
    for name, model in models.items():
        for prefix, how in (("", "as written"), (CONSTRAINED, "the likeliest of the list")):
            if f"{prefix}macro_f1" in model:
                if "best" not in results or prefix == deciding:  # of several runs there would be too many
                    confusions.append((f"{name}, {how}", model[f"{prefix}confusion"]))
                found.append([name, how, *_right(model, prefix), str(_unparsable(model[f"{prefix}confusion"]))])
    for name, baseline in baselines.items():
        how = f"from {baseline['threshold']:.2f} on, chosen on {baseline['validation_questions']} validation rows"
        confusions.append((name, baseline["confusion"]))
        found.append([name, how, *_right(baseline, ""), "0"])
    note = (
        "As written: the label that the free answer ends up with. The likeliest of the list: every label is scored behind the "
        "reason that the answer gives, where the recipe asks for one."
    )
    shown = [Table("Labels", note, ["", "label", NAMES["accuracy"], NAMES["macro_f1"], "no label"], found)]
    sure = {name: model for name, model in models.items() if "calibration" in model}
    shown += [_certainty(sure)] if sure else []
    if any(baseline["differences"] for baseline in baselines.values()):
        rows = [
            [f"{model} less {name}", NAMES[score], _ranged(figure, "difference"), f"{figure['p_value_holm']:.3g}"]
            for name, baseline in baselines.items()
            for model, of_scores in baseline["differences"].items()
            for score, figure in of_scores.items()
        ]
        head = ["", "score", "difference (95 % interval)", "p, Holm-adjusted over all pairs"]
        shown.append(Table("Against the baselines", "", head, rows))
    return shown + [_confusion(f"Labels, {name}", counts) for name, counts in confusions]


def _confusion(title: str, counts: dict[str, dict[str, int]]) -> Table:
    """How often each label is answered for each true one; of many labels, for which others it is taken most often."""
    given = [label for label in next(iter(counts.values())) if label != UNPARSABLE or _unparsable(counts)]
    head = {label: "no label" if label == UNPARSABLE else label for label in given}
    if len(counts) <= MOST_LABELS:
        rows = [[true, *(str(row[label]) for label in given)] for true, row in counts.items()]
        return Table(title, "", ["true \\ answered", *head.values()], rows)
    rows = []
    for true, row in sorted(counts.items(), key=lambda item: item[1].get(item[0], 0) - sum(item[1].values())):
        wrong = sorted(((-n, head[label]) for label, n in row.items() if n and label != true))
        said = ", ".join(f"{label} ({-n})" for n, label in wrong[:MOST_TAKEN])
        more = f" and {len(wrong) - MOST_TAKEN} others" if len(wrong) > MOST_TAKEN else ""
        rows.append([true, str(sum(row.values())), str(row[true]), said + more or "-"])
    note = "Most mistakes first. The whole table is `confusion` in results.json."
    return Table(title, note, ["true label", "questions", "right", "else answered"], rows)


def plots(results: dict[str, Any], colours: tuple[str, ...]) -> dict[str, Figure]:
    """`reliability` and, for two labels, `precision_recall`, by name."""
    models = {name: model for name, model in results["models"].items() if "calibration" in model}
    found = {"reliability": _plot_reliability(models, colours)} if models else {}
    if any("precision_recall" in model for model in models.values()):
        found["precision_recall"] = _plot_precision_recall(models, colours)
    return found


def _certainty(models: dict[str, Any]) -> Table:
    rows, note = [], ""
    for name, model in models.items():
        before, after = (model["calibration"].get(when) for when in ("before", "after"))
        row = [name, *(f"{one['expected_calibration_error']:.3f}" if one else "-" for one in (before, after))]
        temperature = model["calibration"]["temperature"] if after else None
        row.append("-" if not after else "100 or more" if temperature > 99.9 else f"{temperature:.2f}")
        curve, decided = model.get("precision_recall"), model.get("decided")
        row.append(_ranged(curve["average_precision"]) if curve else "-")
        row.append(_ranged(decided["share"]) if decided else "-")
        row.append(_ranged(decided["precision"]) if decided and "precision" in decided else "-")
        rows.append(row)
        what = f"get {curve['positive']}" if curve else "get their label"
        if decided:
            note = (
                f"Decided: the share of the test questions that {what} from a probability on, the lowest at which "
                f"{decided['at_precision']:.0%} are right on the {model['calibration']['validation_questions']} validation "
                "questions, and how many of these test questions are right (Wilson's interval). What is chosen as the lowest "
                "is mostly a little too low: on new questions fewer are right. Temperatures are fitted on the validation "
                "questions too."
            )
    head = ["", "calibration error", "after scaling", "temperature", "average precision", "decided", "right of these"]
    return Table("How sure the labels are", note, head, rows)


def _right(figures: dict[str, Any], prefix: str) -> list[str]:
    return [_ranged(figures[f"{prefix}{score}"]) for score in LABEL_SCORES[:2]]


def _ranged(figure: dict[str, float], key: str = "value") -> str:
    return "{} ({})".format(*ranged("", figure, key))


def _unparsable(confusion: dict[str, dict[str, int]]) -> int:
    return sum(row[UNPARSABLE] for row in confusion.values())


def _plot_reliability(models: dict[str, Any], colours: tuple[str, ...]) -> Figure:
    """Share of right labels over their mean probability, in bins of as many questions each; a perfect model is on the line."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#b9c2ce", linewidth=1)
    for k, (name, model) in enumerate(models.items()):
        for when, style in (("before", "o:"), ("after", "o-")):
            if when in model["calibration"]:
                bins = model["calibration"][when]["bins"]
                axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], style, markersize=4, linewidth=1.2,
                          color=colours[k % len(colours)], markerfacecolor="white" if when == "before" else None,
                          label=f"{name}, {'as it is' if when == 'before' else 'scaled'}")  # fmt: skip
    axis.set_xlabel("probability of the chosen label, mean of the bin")
    axis.set_ylabel("share that is right")
    return _finish(figure, axis)


def _plot_precision_recall(models: dict[str, Any], colours: tuple[str, ...]) -> Figure:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for k, (name, model) in enumerate(models.items()):
        curve = model["precision_recall"]["curve"]
        recall = [point["recall"] for point in curve]
        colour = colours[k % len(colours)]
        axis.fill_between(
            recall, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.15, linewidth=0
        )
        axis.plot(recall, [p["precision"] for p in curve], color=colour, marker=".", label=name)
    axis.set_xlabel(f"recall of {next(iter(models.values()))['precision_recall']['positive']}")
    axis.set_ylabel("precision, with 95 % intervals")
    return _finish(figure, axis)


def _finish(figure: Figure, axis: Any) -> Figure:
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.05)
    axis.grid(color="#e3e7ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="best", fontsize=8)
    return figure
