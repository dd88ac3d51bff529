"""What the evaluation of grounded answers shows: tables, and the curve of refusals."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from carelm.evaluation.plots import COLOURS, STYLE, as_svg
from carelm.evaluation.scores import NAMES
from carelm.evaluation.tables import Table, ranged
from carelm.retrieval.grounded_results import FOUND, MISSED, RETRIEVER, VALIDATION
from carelm.retrieval.grounded_rows import GOLD, LEFT_OUT, NONE, RETRIEVED
from carelm.retrieval.refusals import at
from carelm.retrieval.support import ENOUGH

SHOWN_AT = (0.05, 0.1, 0.2, 0.3)  # false refusals that the table of the curve has a column for
WORDS = {NONE: "no passages", RETRIEVED: "retrieved passages", GOLD: "gold passages"}


def tables(found: dict[str, Any]) -> list[Table]:
    """Of `results` as eval/grounding.py writes them."""
    models = found["models"]
    of_scores = [
        [f"{name}, {WORDS[condition]}", *("{} ({})".format(*ranged(s, own[s])) for s in own)]
        for name, model in models.items()
        for condition, own in model["scores"].items()
    ]
    pairs = [
        [name, f"{WORDS[pair['models'][1]]} less {WORDS[pair['models'][0]]}",
         *("{} ({})".format(*ranged(s, d, "difference")) + f", p {d['p_value_holm']:.3g}" for s, d in pair["scores"].items())]
        for name, model in models.items()
        for pair in model["pairs"]
    ]  # fmt: skip
    support = [
        [f"{name}, {WORDS[condition]}", *("{} ({})".format(*ranged(s, own[s])) for s in own)]
        for name, model in models.items()
        for condition, own in model["support"].items()
    ]
    names = [NAMES[s] for s in next(iter(models.values()))["scores"][NONE]] if models else []
    shown = [
        Table("Scores", "Of the answers without their marks; 95 % intervals over questions.", ["", *names], of_scores),
        Table("What passages change", "Paired by question; p Holm-adjusted over the three pairs of a model.",
              ["", "", *names], pairs),
        Table("Support", "Of the sentences with a mark those of whose content words at least "
              f"{ENOUGH:.0%} stand in the passages named; how many sentences have one; marks that name no passage.",
              ["", "supported", "with a mark", "false marks"], support),
    ]  # fmt: skip
    refusals = found["refusals"]
    rows, curves = [], []
    for name, own in refusals["by"].items():
        rows.append([_who(name), f"{own['threshold']:.3f}", _share(own[RETRIEVED]), _share(own[LEFT_OUT])])
        if "curve" in own:
            points = [at(own["curve"], limit) for limit in SHOWN_AT]
            curves.append(
                [_who(name), *(f"{p['refused']:.0%} at {p['false_refusals']:.1%}" if p else "-" for p in points)]
            )
    for name, model in models.items():
        told = model["refused"]
        rows.append([f"{name} alone", "-", _share(told[RETRIEVED]), _share(told[LEFT_OUT])])
        rows += [[f"{name} alone, {kind}", "-", _share(told[kind]), "-"] for kind in (FOUND, MISSED) if kind in told]
    shown = [*(shown if models else []), Table(
        "Refusals",
        f"By a threshold on the retriever's confidence for {refusals['wanted_false_refusals']:.0%} false refusals, alone and "
        "together with what a model refuses by itself. It is chosen on nine tenths of the questions for the other tenth "
        f"(shown: that of all), or on {refusals['validation_questions']} validation questions. An unanswerable question is "
        "a test question all of whose supporting passages were left out.",
        ["", "threshold", "answerable, refused", "unanswerable, refused"], rows,
    ), Table("The curve of refusals", "The most that any threshold refuses of the unanswerable test questions, at so many "
             "false refusals at most (chosen on the test questions, so that it is what could be, not what is).",
             ["", *(f"at {limit:.0%}" for limit in SHOWN_AT)], curves)]  # fmt: skip
    return shown


def markdown(title: str, found: dict[str, Any]) -> str:
    of_gold = f"{found['retrieved']:.0%} of the gold passages are among those retrieved"
    parts = [f"# {title}", f"{found['questions']} test questions; {of_gold}.", *found["cautions"]]
    parts += [table.as_markdown() for table in tables(found)]
    return "\n\n".join([*parts, "![refusals](refusals.svg)"]) + "\n"


def picture(refusals: dict[str, Any]) -> str:
    """The whole curve as SVG: what is refused of the unanswerable over what is refused of the answerable."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axis = figure.subplots()
        for k, (name, own) in enumerate((n, o) for n, o in refusals["by"].items() if "curve" in o):
            colour, label = COLOURS[k % len(COLOURS)], _who(name)
            x, y = ([point[key] for point in own["curve"]] for key in ("false_refusals", "refused"))
            axis.step(x, y, where="post", color=colour, label=label)
            axis.plot(own[RETRIEVED]["value"], own[LEFT_OUT]["value"], "o", color=colour)
        axis.axvline(refusals["wanted_false_refusals"], color="#b9c2ce", linewidth=1, linestyle="--")
        axis.set_xlabel("answerable questions that are refused")
        axis.set_ylabel("unanswerable ones that are refused")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.05)
        axis.grid(color="#e3e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, loc="lower right", fontsize=8)
    return as_svg(figure)


def _who(name: str) -> str:
    return name if name in (VALIDATION, RETRIEVER) else f"retriever and {name}"


def _share(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.0%} ({figure['low']:.0%} to {figure['high']:.0%}; {figure['refused']} of {figure['questions']})"
