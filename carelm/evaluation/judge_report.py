"""`judge` of results.json -> the sentences, cautions and tables of the report."""

from typing import Any

from carelm.evaluation.judge import OVERALL
from carelm.evaluation.judge_results import UNREAD
from carelm.evaluation.scores import NAMES
from carelm.evaluation.tables import Table, ranged
from carelm.evaluation.verdicts import called, decide, main_pair

SWAYED = 1 / 3  # of the pairs that it was asked about: where more depend on the order, a caution says so
ANSWERS = {
    "better": "Yes",
    "worse": "No",
    "same": "No difference",
    "unclear": "The judge cannot tell: the difference may be chance",
}


def add_sentences(results: dict[str, Any]) -> dict[str, Any]:
    """The results with what the judge says in `judge.sentences`, and its cautions beside the others."""
    judged = results.get("judge")
    if not judged:
        return results
    said = ["" if judged["decides"] else _preference(results)[0], _marks(results), _agreement(judged)]
    cautions = [*results["cautions"], *_cautions(results)]
    return results | {"judge": judged | {"sentences": [*filter(None, said)]}, "cautions": cautions}


def lead(results: dict[str, Any]) -> dict[str, Any]:
    """Where the judge decides, its preference is the `headline` and `answer` of the results; theirs comes after it."""
    if not results.get("judge", {}).get("decides"):
        return results
    said, decided = _preference(results)
    if not said:  # one model alone
        return results
    number = results["judge"]["conversations"]
    few = f"The judge cannot tell: {number} conversations are too few for it, however they come out"
    answer = ANSWERS.get(decided, few if decided == "few" else "The judge cannot be read")
    other = f"By {NAMES[results['primary_metric']]}, which does not decide here: {results['headline']}"
    return results | {"headline": f"{answer}. {said}", "answer": decided, "besides": [other, *results["besides"]]}


def _pair(results: dict[str, Any]) -> dict[str, Any] | None:
    pair = [*main_pair(results["models"])]
    return next((found for found in results["judge"]["pairs"] if found["models"] == pair), None)


def _preference(results: dict[str, Any]) -> tuple[str, str | None]:
    """Which of the base and the tuned model the judge prefers, and the word of `decide` for it (None: it could not be read)."""
    judged, pair = results["judge"], _pair(results)
    if pair is None:
        return "", None
    first, tuned = pair["models"]
    models = {name: model for name, model in results["models"].items() if name not in results["same"]}
    names, judge = called(models, first, tuned), f"The judge ({judged['model']})"
    if not pair["asked"]:
        said = f"{judge} was not asked which answer it prefers: they are the same in all {pair['questions']} questions."
        return said, "same"
    if pair["preferred"] is None:
        return (
            f"{judge} does not say which answers it prefers: {pair['unread_pairs']} of {pair['asked']} pairs could not be read."
        ), None
    figures = pair["preferred"][OVERALL]
    decided = decide(figures, judged["conversations"])
    word = {
        "better": f"{names[tuned]} is better by it",
        "worse": f"{names[tuned]} is worse by it",
        "unclear": "no difference that these questions can show",
        "few": "too few conversations to tell",
    }[decided]
    read = pair["questions"] - pair["unread_pairs"]
    value, around = ranged("", figures, "difference")
    return (
        f"{judge} prefers the answer of {names[tuned]} in {figures[tuned]} of {read} questions, that of {names[first]} in "
        f"{figures[first]}, neither in {figures['tie']}: {word} (difference of the shares {value}, 95 % interval {around}; "
        f"p {figures['p_value_holm']:.3g})."
    ), decided


def _marks(results: dict[str, Any]) -> str:
    judged = results["judge"]
    names = [name for name in main_pair(results["models"]) if name]
    marks = [judged["models"][name]["marks"] for name in names]
    if None in marks:
        return ""
    each = [f"{key} {' -> '.join(format(m[key]['value'], '.2f') for m in marks)}" for key in judged["criteria"]]
    low, high = judged["scale"]
    return f"Marks of the judge ({judged['model']}), {low} to {high}, of {' -> '.join(names)}: {', '.join(each)}."


def _agreement(judged: dict[str, Any]) -> str:
    found = judged["agreement"]
    if not found or not found["ratings"]:
        return ""
    left_out = (
        f"; {found['of'] - found['ratings']} more could not be compared" if found["of"] > found["ratings"] else ""
    )
    figure = "{} (95 % interval {})".format(*ranged("", found["kappa"]))
    return (
        f"The judge agrees with {found['agreed']} of {found['ratings']} ratings by hand: Cohen's kappa {figure}, where 0 is "
        f"chance and 1 full agreement{left_out}."
    )


def _cautions(results: dict[str, Any]) -> list[str]:
    judged, said = results["judge"], []
    models = {name: judged["models"][name] for name in results["models"] if name not in results["same"]}
    pairs = [pair for pair in judged["pairs"] if models.keys() >= {*pair["models"]}]
    parts = [(f"answers of {name}", m["answers"], sum(m["unread"].values()), m) for name, m in models.items()]
    parts += [(f"pairs of {' and '.join(p['models'])}", p["asked"], p["unread_pairs"], p) for p in pairs]
    for what, asked, unread, found in parts:
        if unread:
            why = ", ".join(f"{problem} ({number})" for problem, number in found["unread"].items())
            then = "they count nowhere"
            if unread > UNREAD * asked:
                then = (
                    f"more than {UNREAD:.0%}, so no figure is given. Its replies stand in judgements-MODEL.jsonl; a larger "
                    "judge may do better"
                )
            said.append(f"The judge could not be read on {unread} of {asked} {what}: {why}; {then}.")
    for pair in pairs:
        swayed = pair["preferred"] and pair["preferred"][OVERALL]["orders_disagree"]
        if swayed and swayed > SWAYED * pair["asked"]:
            said.append(
                f"The judge's choice between {' and '.join(pair['models'])} hangs on which answer stands first: it changes in "
                f"{swayed} of {pair['asked']} pairs, which count as neither. Trust it little, or take a stronger judge."
            )
    for name, model in results["models"].items():
        if (model["conditions"].get("endpoint"), model["conditions"].get("model")) == (
            judged["endpoint"],
            judged["model"],
        ):
            said.append(f"{name} is compared and judges too: a judge may favour answers like its own.")
    return said


def tables(results: dict[str, Any]) -> list[Table]:
    """Marks, and a table for each two models; none where nothing was judged."""
    judged, models = results.get("judge"), results["models"]
    if not judged:
        return []
    low, high = judged["scale"]
    pairs = [pair for pair in judged["pairs"] if models.keys() >= {*pair["models"]}]
    of_models = {name: judged["models"][name]["marks"] for name in models}
    marks = Table(
        title="Marks",
        text=f"From {low}, not at all, to {high}, fully: the mean over {judged['questions']} questions of "
        f"{judged['conversations']} conversations, with the range where it would mostly lie if others were asked. p is "
        "Holm-adjusted over the pairs of models.",
        head=["", *models, *(_less(pair) for pair in pairs)],
        rows=[
            [
                f"{name}: {meaning}",
                *("not given" if m is None else _mark(m[name]) for m in of_models.values()),
                *("not given" if pair["marks"] is None else _difference(pair["marks"][name]) for pair in pairs),
            ]
            for name, meaning in judged["criteria"].items()
        ],
    )
    return [marks, *(_preferences(pair) for pair in pairs if pair["preferred"])]


def _preferences(pair: dict[str, Any]) -> Table:
    a, b = pair["models"]
    overall, firsts, words = pair["preferred"][OVERALL], pair["first_chosen"], pair["words"]
    same = pair["questions"] - pair["asked"]
    text = (
        f"It saw each pair twice, with either answer first. Where it does not choose the same one both times, neither counts: "
        f"overall in {overall['orders_disagree']} of {pair['asked']} pairs. p is Holm-adjusted over the pairs of models."
    )
    if firsts["replies"]:
        text += f" Of {firsts['replies']} replies that choose, {firsts['first']} choose the answer that stood first."
    if pair["decided"]:
        text += (
            f" The preferred answers have {words['preferred']:.1f} words in the mean, the others {words['other']:.1f}; the "
            f"longer one is preferred in {words['longer_preferred']} of {pair['decided']}."
        )
    if same:
        text += f" In {same} questions both answers are the same, which counts as neither."
    return Table(
        title=f"Which answer it prefers: {a} or {b}",
        text=text,
        head=["", a, b, "neither", "of these, it depends on the order", f"share of {b} less that of {a}"],
        rows=[
            [name, *(str(figures[key]) for key in (a, b, "tie", "orders_disagree")), _difference(figures)]
            for name, figures in pair["preferred"].items()
        ],
    )  # fmt: skip


def how(results: dict[str, Any]) -> Table | None:
    """How the judge was asked, less its prompts."""
    judged = results.get("judge")
    if not judged:
        return None
    usage = judged["usage"]
    refused = "".join(f", asked without {key}, which it refuses" for key in judged["refused"])
    return Table(
        title="How the judge was asked",
        text="Each answer by itself for its marks, and every two answers in both orders. All that it has said stands in "
        "judgements-MODEL.jsonl.",
        head=["", ""],
        rows=[
            ["model", judged["model"]],
            ["endpoint", judged["endpoint"]],
            ["day", " to ".join(dict.fromkeys(judged["dates"]))],
            ["decoding", f"temperature 0, at most {judged['max_tokens']} tokens{refused}"],
            ["replies", f"{usage['replies']:,}"],
            ["tokens of prompts", f"{usage['prompt_tokens']:,}"],
            ["tokens of replies", f"{usage['new_tokens']:,}"],
        ],
    )


def _less(pair: dict[str, Any]) -> str:
    return "{1} less {0}".format(*pair["models"])


def _mark(figure: dict[str, float]) -> str:
    return "{value:.2f} ({low:.2f} to {high:.2f})".format(**figure)


def _difference(figure: dict[str, float]) -> str:
    """In the form of which the page makes a figure with what is around it."""
    return "{difference:+.2f} ({low:+.2f} to {high:+.2f}; p {p_value_holm:.3g})".format(**figure)
