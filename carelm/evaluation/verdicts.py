"""Which of two models is better, said twice: in a sentence that needs no statistics (the headline), and with its figures.

Both come from the same decision: the interval of the paired difference and its p-value after Holm's correction.
"""

import math
from statistics import NormalDist
from typing import Any

from carelm.evaluation.scores import CONSTRAINED, LABEL_SCORES, NAMES, TEXT_SCORES, commonest

FEWEST_CONVERSATIONS = 10  # resampling fewer says little about others
TIMES_MORE = 20  # as many questions as there are, beyond which nobody would ask them to see a difference
# Of an answer's runs of four words: from here on it goes round in circles. In runs on a real base that answer well it was at
# most 0.05, after prompt tuning 0.15, in answers that loop 0.29 and more.
LOOPING = 0.25
NOTICEABLE = 0.05  # of the answers: below it, numbers that nobody gave them are not spoken of


def decide(figure: dict[str, float], conversations: int) -> str:
    """`better` or `worse` (the second model), `unclear`, or `few`: too few conversations to say anything of others."""
    if conversations < FEWEST_CONVERSATIONS:
        return "few"
    if figure["p_value_holm"] >= 0.05 or figure["low"] <= 0 <= figure["high"]:
        return "unclear"
    return "better" if figure["difference"] > 0 else "worse"


def questions_needed(score: dict[str, float], questions: int) -> int | None:
    """How many questions would show a difference, with a chance of 80 %, if it is what it seems: None where these are more than
    `TIMES_MORE` as many as were asked, or it is 0.

    The standard error of a mean over independent conversations shrinks with 1 / sqrt(n), so that n ((z_a + z_b) se / d)**2
    questions are needed (power analysis; for evaluations of language models Miller 2024, Adding Error Bars to Evals,
    https://arxiv.org/abs/2411.00640). se is that of the paired difference over resampled conversations, as in its interval; z_b
    is that of 80 %, z_a of 5 % on two sides, shared among the comparisons, the most that Holm's correction asks for.
    """
    if not score["difference"]:
        return None
    z = NormalDist().inv_cdf(1 - 0.025 / score["comparisons"]) + NormalDist().inv_cdf(0.8)
    times = (z * score["standard_error"] / score["difference"]) ** 2
    return None if times > TIMES_MORE else math.ceil(max(1.0, times) * questions)


def verdict(pair: dict[str, Any], metric: str, conversations: int) -> str:
    """One sentence with the figures: which of two models is better by this metric, or that the test set does not tell."""
    a, b = pair["models"]
    score = pair["scores"][metric]
    called = NAMES[metric]
    figures = f"{score['difference']:+.4g}, 95 % interval {score['low']:+.4g} to {score['high']:+.4g}"
    chance = f"chance makes such a difference in at most {100 * score['p_value_holm']:.3g} % of cases"
    match decide(score, conversations):
        case "few":
            short = f"{called} {score['difference']:+.4g}"
            return f"{b} against {a}: {conversations} conversations are too few to tell ({short})."
        case "unclear":
            return f"{b} against {a}: no difference in {called} that this test set can show ({figures}; {chance})."
        case word:
            return f"{b} is {word} than {a} in {called} ({figures}; {chance})."


def headline(results: dict[str, Any], folded: dict[str, Any] | None = None) -> dict[str, Any]:
    """`headline`, the answer to "is the tuned model better?" in a sentence, `answer`, the same in a word (of `decide`, `same`
    or None) and `besides`, what else the figures say: other scores, the other models, the checks, the tests of `also_test`.

    Args:
        results: of `make_results`, with `test` and `tests`; with `runs` where a sweep's are compared.
        folded: models that are not spoken of, as their answers are another's.
    """
    models = {name: model for name, model in results["models"].items() if name not in (folded or {})}
    if "runs" in results:
        return _of_runs(results)
    (first, tuned), judged = main_pair(models), results.get("judge", {}).get("sentences", [])
    if tuned is None:
        return {"headline": _alone(results, first), "answer": None, "besides": judged}
    names = called(models, first, tuned)
    pairs = {tuple(pair["models"]): pair for pair in results["pairs"]}
    main = pairs.get((first, tuned)) or turned(pairs[tuned, first])
    decided = decide(main["scores"][results["primary_metric"]], results["test"]["conversations"])
    looping = _of_loops(results, tuned, names[tuned], first)
    besides = [*filter(None, [looping]), *_what_would_tell(results, main)]
    if said := _of_numbers(results, first, tuned, names):
        besides.append(
            f"Look at the numbers: {said} Such a price, date or telephone number may be invented, and no score sees it: see "
            "some under Other examples; the recipe's checks count what an answer must hold."
        )
    besides += _other_way(results, main, names)
    besides += judged
    besides += [results["ratings"]["sentence"]] if results.get("ratings") else []
    for (a, b), pair in pairs.items():
        if {a, b} != {first, tuned} and a in models and b in models:
            besides += [f"{b} against {a}: {_in_short(results, pair)}", *_other_way(results, pair, names)]
    besides += _of_checks(results["checks"], first, tuned, names)
    for name, test in results["tests"].items():
        there = next((p for p in test["pairs"] if {*p["models"]} == {first, tuned}), None)
        if there:
            there = there if there["models"][0] == first else turned(there)
            said = [_in_short(test, there), *_what_would_tell(test, there), _of_numbers(test, first, tuned, names)]
            said = " ".join(filter(None, said))
            besides.append(f"Elsewhere, on {name}, {names[tuned]} against {names[first]}: {said}")
            besides += [f"On {name}: {said}" for said in _other_way(test, there, names)]
    decided = "same" if _is_same(results, main) else decided
    answer = _answer(decided, main["scores"][results["primary_metric"]], results["test"]["conversations"])
    if looping and decided == "better":
        answer, decided = f"{answer}, but it is not fit for use", None
    return {"headline": f"{answer}. {_in_questions(results, main, names)}", "answer": decided, "besides": besides}


def _answer(decided: str, score: dict[str, float], number: int) -> str:
    """The headline's first words; where nothing can be told, they say why. Args: `number` of conversations."""
    few = f": {number} conversations are too few for it, however they come out" * (decided == "few")
    chance = ": the difference may be chance" * (decided == "unclear" and score["low"] < score["high"])
    said = {"better": "Yes", "worse": "No", "same": "No difference"}
    return said.get(decided, f"This test set cannot tell{few}{chance}")


def main_pair(models: dict[str, Any]) -> tuple[str, str | None]:
    """The base (or what stands first) and the tuned model (the run's own, or the first one after); None for a single one."""
    first = next((name for name, model in models.items() if model["kind"] == "base"), next(iter(models)))
    others = [name for name in models if name != first]
    own = [name for name in others if models[name]["kind"] not in ("base", "api")]
    return first, "adapter" if "adapter" in own else next(iter(own or others), None)


def deciding(results: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The tuned model, or the one that stands alone, and its deciding score with the interval."""
    first, tuned = main_pair(results["models"])
    name = tuned or first
    return name, results["models"][name][results["primary_metric"]]


def turned(pair: dict[str, Any]) -> dict[str, Any]:
    """The same pair with its second model first."""
    scores = {name: {**score, "difference": -score["difference"], "low": -score["high"], "high": -score["low"]}
              for name, score in pair["scores"].items()}  # fmt: skip
    return {**pair, "models": pair["models"][::-1], "scores": scores, "closer": pair["farther"], "farther": pair["closer"],
            "better": pair["worse"], "worse": pair["better"]}  # fmt: skip


def figure(score: str, value: float) -> str:
    """A score as it is written in a sentence: BLEU and chrF with one decimal."""
    return f"{value:.1f}" if score in ("bleu", "chrf") else f"{value:.3f}"


def called(models: dict[str, Any], first: str, tuned: str) -> dict[str, str]:
    """What the sentences call each model."""
    names = {name: name for name in models}
    if models[first]["kind"] == "base":
        names[first] = "the base"
        if models[tuned]["kind"] not in ("base", "api"):
            names[tuned] = "the tuned model" if len(models) == 2 or tuned == "adapter" else f"the tuned model ({tuned})"
    return names


def _is_same(results: dict[str, Any], pair: dict[str, Any]) -> bool:
    """Whether both give the same answers to the letter, and choose the same labels where these decide."""
    score = pair["scores"][results["primary_metric"]]
    return pair["same_answers"] == results["test"]["questions"] and not (score["low"] or score["high"])


def _other_way(results: dict[str, Any], pair: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A sentence for each score by which the second model is worse where the primary one says better, or the reverse; of the
    written words nothing where labels decide."""
    found, number, (a, b) = pair["scores"], results["test"]["conversations"], pair["models"]
    decided = decide(found[results["primary_metric"]], number)
    other = {"better": "worse", "worse": "better"}.get(decided)
    return [
        f"{NAMES[s]} says the opposite: {names.get(b, b)} is {other} than {names.get(a, a)} ({_change(results, pair, s)})."
        for s in (LABEL_SCORES if results["primary_metric"] in LABEL_SCORES else (*TEXT_SCORES, *LABEL_SCORES))
        if s in found and decide(found[s], number) == other
    ]


def _what_would_tell(results: dict[str, Any], pair: dict[str, Any]) -> list[str]:
    """Where the test set cannot tell: how many questions would, and how to get them."""
    score, asked = pair["scores"][results["primary_metric"]], results["test"]["questions"]
    decided, more = decide(score, results["test"]["conversations"]), results["test"].get("more_questions", "")
    if decided not in ("unclear", "few") or _is_same(results, pair):
        return []
    if decided == "few":
        return [f"Ask at least {FEWEST_CONVERSATIONS} conversations, better 100{f': {more}' if more else ''}."]
    needed = questions_needed(score, asked)
    if needed is not None and needed <= asked:  # too few resamples hide it, which a caution says
        return []
    to_ask_more = f" To ask more, {more}." if more else ""
    if needed is not None:
        return [
            f"About {_rounded(needed)} questions would settle it, if the difference is as large as it looks here; {asked} were "
            f"asked.{to_ask_more}"
        ]
    if score["low"] == score["high"]:  # no question tells them apart, which the headline says
        return []
    return [
        f"{TIMES_MORE} times as many questions might not show a difference as small as it looks here. That does not make the "
        f"two alike: how large it may be is said above, and four times as many questions would halve that range.{to_ask_more}"
    ]


def _rounded(number: int) -> str:
    """Two digits of it, as it is an estimate."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{math.ceil(number / unit) * unit:,}"


def _of_loops(results: dict[str, Any], name: str, called: str, beside: str | None = None) -> str:
    """That a model's answers go round in circles, where they do: a score that rises does not make them answers."""
    share = {model: results["models"][model]["repeated_4grams"]["value"] for model in (name, beside or name)}
    if results["primary_metric"] in LABEL_SCORES or share[name] < LOOPING:
        return ""
    base = f" ({beside}: {share[beside]:.0%})" if beside else ""
    return (
        f"The answers of {called} go round in circles: {share[name]:.0%} of their runs of four words stand in the same answer "
        f"before{base}. Read some before you trust a score. More steps or rows, or a base that knows the language may mend it."
    )


def _of_numbers(results: dict[str, Any], first: str, tuned: str, names: dict[str, str]) -> str:
    """How many of the tuned model's answers state numbers that nobody gave them, where these are enough to look at."""
    found = {name: results["models"][name].get("unfounded_numbers") for name in (first, tuned)}
    number = results["test"]["questions"]
    if results["primary_metric"] in LABEL_SCORES or not all(found.values()):
        return ""
    base, own = (found[name]["answers"] for name in (first, tuned))
    if own < NOTICEABLE * number:
        return ""
    return (
        f"{own} of {number} answers of {names[tuned]} state a number that neither the question nor the expected reply has "
        f"({names[first]}: {base})."
    )


def _change(results: dict[str, Any], pair: dict[str, Any], score: str) -> str:
    """Both models' scores."""
    return " -> ".join(figure(score, results["models"][name][score]["value"]) for name in pair["models"])


def _in_short(results: dict[str, Any], pair: dict[str, Any]) -> str:
    """The same as the headline of a pair, in half a sentence."""
    metric, models, number = results["primary_metric"], results["models"], results["test"]["questions"]
    a, b = pair["models"]
    if _is_same(results, pair):
        return f"the same answers to all {number} questions, to the letter ({_both(results, pair)})."
    if metric in LABEL_SCORES:
        right = [round(models[name][_accuracy(metric)]["value"] * number) for name in (b, a)]
        counted = f"the right label in {right[0]} of {number} questions, against {right[1]}"
    else:
        by = f" by {NAMES[pair['changed_by']]}" if pair["changed_by"] != metric else ""
        counted = (
            f"closer to the expected reply{by} in {pair['closer']} of {number} questions, farther in {pair['farther']}"
        )
    decided = decide(pair["scores"][metric], results["test"]["conversations"])
    word = {"unclear": "this test set cannot tell", "few": "too few conversations to tell"}.get(decided, decided)
    return f"{word}; {counted} ({_both(results, pair)})."


def _both(results: dict[str, Any], pair: dict[str, Any]) -> str:
    """Both scores of a pair; where nothing can be told, what the difference may be."""
    metric, score = results["primary_metric"], pair["scores"][results["primary_metric"]]
    said = _change(results, pair, metric)
    match decide(score, results["test"]["conversations"]):
        case "unclear" if score["low"] < score["high"]:
            low, high = (f"{'+' if score[end] > 0 else ''}{figure(metric, score[end])}" for end in ("low", "high"))
            said += f"; the difference may lie anywhere from {low} to {high}"
            if not score["low"] <= 0 <= score["high"]:
                among = f": among {score['comparisons']} comparisons chance" if score["comparisons"] > 1 else ": chance"
                said += f", which is not enough{among} makes such a difference too often"
    return f"{NAMES[metric]} {said}"


def _in_questions(results: dict[str, Any], pair: dict[str, Any], names: dict[str, str]) -> str:
    """What the second model of a pair does better, counted in questions, and both scores."""
    metric, models, number = results["primary_metric"], results["models"], results["test"]["questions"]
    a, b = pair["models"]
    of_a, of_b = names.get(a, a), names.get(b, b)
    score = pair["scores"][metric]
    both, decided = _both(results, pair), decide(score, results["test"]["conversations"])
    if _is_same(results, pair):
        return _first_word(
            f"{of_b} gives the same answers as {of_a} to all {number} questions, to the letter ({both})."
        )
    if metric in LABEL_SCORES:
        right = {name: round(models[name][_accuracy(metric)]["value"] * number) for name in (a, b)}
        how = "Asked to choose among the labels, " if metric.startswith(CONSTRAINED) else ""
        always, often = commonest(models[b]["confusion"])
        said = (f"{how}{of_b} gives the right label in {right[b]} of {number} questions, {of_a} in {right[a]}; always "
                f"answering {always} would be right in {often} ({both}).")  # fmt: skip
        is_turned = decided in ("better", "worse") and (right[b] - right[a]) * score["difference"] < 0
        note = " Macro F1 counts each label alike, however rare, and decides here." if is_turned else ""
        return _first_word(said) + note
    closer, farther = pair["closer"], pair["farther"]
    by = f" by {NAMES[pair['changed_by']]}" if pair["changed_by"] != metric else ""
    whose = f"{_first_word(of_b)}'s answers are"
    if closer == farther == 0:
        return f"{whose} as close to the expected replies{by} as those of {of_a} in all {number} questions ({both})."
    ways = [("closer to", "farther", closer, farther), ("farther from", "closer", farther, closer)][decided == "worse"]
    note = ""
    if decided in ("better", "worse") and ways[2] < ways[3]:
        note = f" What changes for the {decided} is more than the rest makes up for."
    return (
        f"{whose} {ways[0]} the expected replies{by} than those of {of_a} in {ways[2]} of {number} questions and {ways[1]} "
        f"in {ways[3]} ({both}).{note}"
    )


def _first_word(text: str) -> str:
    """The beginning of a sentence; a model's own name stays as it is."""
    return "The" + text[3:] if text.startswith("the ") else text


def _accuracy(metric: str) -> str:
    return f"{CONSTRAINED}accuracy" if metric.startswith(CONSTRAINED) else "accuracy"


def _of_checks(checks: dict[str, Any], first: str, tuned: str, names: dict[str, str]) -> list[str]:
    """One sentence on the checks: where the tuned model passes more often, where less, and where nothing can be told."""
    ways: dict[str, list[str]] = {"more": [], "less": [], "unclear": []}
    for name, check in checks.items():
        pair = next(p for p in check["pairs"] if {*p["models"]} == {first, tuned})
        decided = decide(pair, check["conversations"])
        if decided in ("better", "worse") and pair["models"][0] != first:
            decided = "worse" if decided == "better" else "better"
        way = {"better": "more", "worse": "less"}.get(decided, "unclear")
        counts = [round(check["models"][model]["value"] * check["questions"]) for model in (first, tuned)]
        ways[way].append(f"{name} ({counts[0]} -> {counts[1]} of {check['questions']})")
    said = [f"passes {way} often: {', '.join(found)}" for way, found in ways.items() if found and way != "unclear"]
    said += [f"no difference can be told: {', '.join(ways['unclear'])}"] if ways["unclear"] else []
    return [f"Checks, {names[first]} -> {names[tuned]}: {'; '.join(said)}."] if said else []


def _alone(results: dict[str, Any], name: str) -> str:
    metric, model, number = results["primary_metric"], results["models"][name], results["test"]["questions"]
    score = model[metric]
    low, high = figure(metric, score["low"]), figure(metric, score["high"])
    said = f"{NAMES[metric]} {figure(metric, score['value'])}, 95 % interval {low} to {high}"
    if metric in LABEL_SCORES:
        right = round(model[_accuracy(metric)]["value"] * number)
        always, often = commonest(model["confusion"])
        said += f"; the right label in {right} of {number} questions, always answering {always} in {often}"
    return f"Only {name} was asked, so nothing is compared ({said})."


def _of_runs(results: dict[str, Any]) -> dict[str, Any]:
    best, metric = results["best"], results["primary_metric"]
    if best is None:
        losses = "No run has answers or a validation loss yet."
        if not results["has_one_tokenizer"]:
            losses = "No answers are compared, and validation losses under several tokenizers do not compare."
        return {"headline": losses, "answer": None, "besides": []}
    if not results["models"]:
        loss = results["runs"][best]["eval_loss"]
        said = f"{best} has the lowest validation loss ({loss:.4f}). No answers are compared, only losses."
        return {"headline": said, "answer": None, "besides": []}
    ways: dict[str, list[str]] = {}
    besides = list[str]()
    for pair in (p for p in results["pairs"] if best in p["models"]):
        pair = pair if pair["models"][1] == best else turned(pair)
        decided = decide(pair["scores"][metric], results["test"]["conversations"])
        way = "same" if _is_same(results, pair) else "better" if decided == "better" else "unclear"
        ways.setdefault(way, []).append(pair["models"][0])
        besides += _other_way(results, pair, {})
    besides += filter(None, [_of_loops(results, best, best)])
    said = f"{best} scores highest ({NAMES[metric]} {figure(metric, results['models'][best][metric]['value'])})."
    if ways.get("better"):
        said += f" It is better than {_listed(ways['better'])}."
    if ways.get("same"):
        said += f" Its answers are those of {_listed(ways['same'])}, to the letter."
    if ways.get("unclear"):
        said += f" This test set cannot tell it from {_listed(ways['unclear'])}."
        besides[:0] = _what_would_tell_runs(results, best, ways["unclear"])
    return {"headline": said, "answer": None, "besides": besides}


def _what_would_tell_runs(results: dict[str, Any], best: str, others: list[str]) -> list[str]:
    """The same as `_what_would_tell`, in one sentence over the runs that cannot be told from the best one."""
    asked, metric = results["test"]["questions"], results["primary_metric"]
    if results["test"]["conversations"] < FEWEST_CONVERSATIONS:
        return [f"Ask at least {FEWEST_CONVERSATIONS} conversations, better 100."]
    scores = {
        n: p["scores"][metric] for p in results["pairs"] for n in p["models"] if best in p["models"] and n in others
    }
    needed = {name: questions_needed(score, asked) for name, score in scores.items()}
    said = []
    if some := {name: number for name, number in needed.items() if number}:
        each = ", ".join(f"{_rounded(some[n])} for {n}" for n in sorted(some, key=some.get)[:4])
        more = results["test"].get("more_questions", "")
        said.append(
            f"Questions that would settle it, if the differences are as large as they look here: about {each} ({asked} were "
            f"asked).{f' To ask more, {more}.' if more else ''}"
        )
    if small := [name for name, number in needed.items() if not number]:
        said.append(
            f"The difference to {_listed(small)} looks so small that {TIMES_MORE} times as many questions might not show it. "
            "How large it may be all the same, its interval says; four times as many questions halve that."
        )
    return said


def _listed(names: list[str]) -> str:
    """Up to four names, of more how many they are."""
    return ", ".join(names) if len(names) < 5 else f"{len(names)} others ({', '.join(names[:3])} ...)"
