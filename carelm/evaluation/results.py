"""Predictions and measurements of several models -> `results.json`: scores with intervals, and which differences are real."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from carelm.evaluation import check_scores, endpoint, label_results, repetition, scores, scripts, stated_numbers
from carelm.evaluation.label_results import Labelled
from carelm.evaluation.questions import Question
from carelm.evaluation.verdicts import verdict
from carelm.recipe import Recipe

MOST_CHANGED = 3
# What is in most generation configs and decides nothing, or what the report's "decoding" says.
SILENT = ("do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff max_length use_cache "
          "output_scores output_logits output_attentions output_hidden_states return_dict_in_generate").split()  # fmt: skip
TYPICAL = 5
MOSTLY = 0.8  # of a model's answers: above it, what they score says how it keeps to the form


def make_results(
    recipe: Recipe,
    questions: list[Question],
    lines: dict[str, list[dict[str, Any]]],
    measured: dict[str, dict[str, Any]],
    checks: Sequence[check_scores.AskedCheck] = (),
    labelled: Labelled | None = None,
    has_labels_only: bool = False,
) -> dict[str, Any]:
    """The content of `results.json`, less what is known of the test split and the conditions. `data_cautions` are of the rows
    and not of the answers.

    Args:
        recipe: names the labels, the primary metric and the number of resamples.
        questions: the test questions.
        lines: for each model its predictions in the order of the questions.
        measured: for each model what was measured while it answered.
        checks: the recipe's, for these questions.
        labelled: what is known of labels beside the answers.
        has_labels_only: the references are labels, and no other score has a meaning.
    """
    labelled = labelled or Labelled()
    conversations, references = [q.conversation for q in questions], [q.references for q in questions]
    tokenizer = scripts.bleu_tokenizer(references)
    has_chosen = (
        recipe.primary_metric.startswith(scores.CONSTRAINED) and lines.keys() <= labelled.log_probabilities.keys()
    )
    deciding = _deciding(recipe, references, has_chosen)
    drawn = scores.draws(len(set(conversations)), recipe.num_resamples, recipe.split_seed)
    models, scored, ranked = {}, {}, {}
    for name, predicted in lines.items():
        answers = scores.Answers(conversations, [p["prediction"] for p in predicted], references)
        turns = scores.per_turn(answers, recipe.labels, tokenizer)
        turns |= label_results.constrained_scores(recipe, questions, labelled, name)
        if has_labels_only:
            turns = {score: turn for score, turn in turns.items() if score in scores.LABEL_SCORES}
        turns |= repetition.per_turn(answers.predictions, [p["new_tokens"] for p in predicted])
        scored[name] = scores.resample(scores.by_conversation(turns, conversations), drawn)
        models[name] = {
            **{score: scores.interval(found) for score, found in scored[name].items()},
            "empty_predictions": sum(not p["prediction"].strip() for p in predicted),
            "cut_predictions": sum(p["finish_reason"] == "length" for p in predicted),
            "unfounded_numbers": stated_numbers.count(questions, answers.predictions),
            **measured[name],
            "categories": _by_category(recipe, questions, turns),
        }
        ranked[name] = turns[deciding].score(turns[deciding].table)
        if recipe.labels:
            models[name]["confusion"] = scores.confusion(turns, recipe.labels)
        if name in labelled.log_probabilities:
            models[name]["constrained_confusion"] = scores.confusion(turns, recipe.labels, scores.CONSTRAINED)
            models[name] |= label_results.certainty(recipe, questions, labelled, name, drawn)
    of_baselines, baselines = label_results.baselines(recipe, questions, labelled, drawn)
    all_pairs = scores.compare(of_baselines | scored, baselines)
    for a, b, compared in ((*pair["models"], pair["scores"]) for pair in all_pairs):
        if a in baselines:
            baselines[a]["differences"][b] = compared
    pairs = [pair for pair in all_pairs if pair["models"][0] in models]
    for pair in pairs:
        a, b = pair["models"]
        pair["changed_by"] = deciding
        change = ranked[b] - ranked[a]
        order = np.argsort(-change, kind="stable")
        pair["better"] = [questions[i].id for i in order[:MOST_CHANGED] if change[i] > 0]
        pair["worse"] = [questions[i].id for i in order[::-1][:MOST_CHANGED] if change[i] < 0]
        pair["closer"], pair["farther"] = int((change > 0).sum()), int((change < 0).sum())
        pair["same_answers"] = sum(p["prediction"] == q["prediction"] for p, q in zip(lines[a], lines[b]))
        pair["typical"] = {questions[i].id: {name: float(ranked[name][i]) for name in ranked}
                           for i in _nearest_median(change)}  # fmt: skip
    first = scores.Answers(conversations, [p["prediction"] for p in next(iter(lines.values()))], references)
    conversation_count = len(set(conversations))
    checked, unchecked = check_scores.score(checks, questions, lines, recipe.num_resamples, recipe.split_seed)
    return {
        "primary_metric": recipe.primary_metric,
        "models": models,
        "baselines": baselines,
        "pairs": pairs,
        "checks": checked,
        "tests": {},
        "verdicts": [verdict(pair, recipe.primary_metric, conversation_count) for pair in pairs],
        "data_cautions": label_results.validation_cautions(recipe, labelled),
        "cautions": label_results.cautions(labelled, models)
        + _about_answers(recipe, questions, models)
        + unchecked
        + _cautions(recipe, measured, len(all_pairs)),
        "scored_by": deciding,
        "examples": {name: _examples(name, questions, values) for name, values in ranked.items()},
        "signatures": {
            "rouge": f"rouge_score {version('rouge-score')}, no stemmer, F-measure",
            **scores.signatures(first),
        },
    }


def _by_category(recipe: Recipe, questions: list[Question], turns: dict[str, scores.Statistics]) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question.category, []).append(i)
    found = {}
    for category, own in sorted(rows.items()):
        conversations = [questions[i].conversation for i in own]
        part = {name: scores.Statistics(turn.table[own], turn.score) for name, turn in turns.items()}
        drawn = scores.draws(len(set(conversations)), recipe.num_resamples, recipe.split_seed)
        resampled = scores.resample(scores.by_conversation(part, conversations), drawn)
        found[category] = {"questions": len(own), **{score: scores.interval(s) for score, s in resampled.items()}}
    return found


def _deciding(recipe: Recipe, references: list[list[str]], has_chosen: bool) -> str:
    """The score of single answers by which questions are counted and examples are chosen: the primary one where it is one and
    can read the references; where labels decide, whether the label is right."""
    if recipe.primary_metric in scores.LABEL_SCORES:
        return f"{scores.CONSTRAINED}accuracy" if has_chosen else "accuracy"
    readable = scripts.unread_by_rouge(references) < scripts.MANY
    if recipe.primary_metric in ("exact_match", "chrf") or (readable and recipe.primary_metric in scores.ROUGE_TYPES):
        return recipe.primary_metric
    return "rougeL" if readable else "chrf"


def _cautions(recipe: Recipe, measured: dict[str, dict[str, Any]], pairs: int) -> list[str]:
    """What is unlike between the models and may stand behind a difference, and what hides one."""
    cautions = []
    unused = {key: None for m in measured.values() for key in m["unused_generation_config"] if key not in SILENT}
    if unused:
        whose = ", ".join(name for name, m in measured.items() if unused.keys() & m["unused_generation_config"].keys())
        cautions.append(
            f"All models answer by the same rules: {', '.join(unused)} of the generation config of {whose} had no effect."
        )
    if pairs and 2 * pairs / (recipe.num_resamples + 1) >= 0.05:
        cautions.append(
            f"{recipe.num_resamples} resamples are too few to show any difference between {pairs} pairs of models: set "
            f"num_resamples to {100 * pairs} and run again (the answers are kept)."
        )
    if len({str(m["conditions"]) for m in measured.values()}) > 1:
        cautions.append(
            "The models were not measured in one place: their speeds do not compare (see the conditions of each)."
        )
    for name, m in measured.items():
        cautions += [f"{name}: {endpoint.what_was_refused(key)}" for key in m["conditions"].get("refused", [])]
    held = {name: (f"{m['bits']}-bit weights, " if m["bits"] else "whole weights, ") + f"computed in {m['precision']}"
            for name, m in measured.items()}  # fmt: skip
    if len({*held.values()}) > 1:
        each = "; ".join(
            f"{', '.join(n for n in held if held[n] == how)}: {how}" for how in dict.fromkeys(held.values())
        )
        cautions.append(
            f"The models are held in memory in different ways ({each}). This is no fault: each is used so. Speed and memory "
            "differ for it, and answers may a little."
        )
    rough = [
        name
        for name, m in measured.items()
        if m["precision"] in ("bf16", "fp16") and "CPU" not in m["conditions"]["device"]
    ]
    if rough:
        cautions.append(
            f"{', '.join(rough)} computed in 16 bits on a GPU: asked again in batches of another size, a model words some "
            "answers otherwise. On an H200 it did so for 12 of 100, and ROUGE-L moved by 0.002: a difference that small means "
            "nothing. `python benchmarks/gpu.py --only f` measures it on this machine."
        )
    return cautions


def _about_answers(recipe: Recipe, questions: list[Question], models: dict[str, Any]) -> list[str]:
    """What a score alone does not say: letters that ROUGE does not see, answers cut off, labels that never change."""
    cautions = []
    references = [q.references for q in questions]
    unread = {"ROUGE as rouge_score defines it sees a-z and 0-9 only": scripts.unread_by_rouge(references),
              f"BLEU's tokenizer ({scripts.bleu_tokenizer(references)}) wants spaces between words":
              scripts.unread_by_bleu(references)}  # fmt: skip
    for score, (what, share) in zip(("rouge", "bleu"), unread.items()):
        if share > scripts.FEW:
            advice = "set primary_metric: chrf" if recipe.primary_metric.startswith(score) else "chrF reads them"
            cautions.append(f"{what}, and {share:.0%} of the references' letters are others: {advice}.")
    cautions += _about_form(recipe, len(questions), models)
    for name, model in models.items():
        if recipe.labels:
            given = [label for label, count in _answered(model).items() if count and label != scores.UNPARSABLE]
            if len(given) == 1:
                cautions.append(
                    f"{name}: every label that it gives is {given[0]}; it does not tell the questions apart."
                )
    if recipe.labels and recipe.primary_metric not in scores.LABEL_SCORES:  # the headline has it where labels decide
        commonest, count = scores.commonest(next(iter(models.values()))["confusion"])
        cautions.append(f"Always answering {commonest} would be right in {count} of {len(questions)} questions.")
    return cautions


def _about_form(recipe: Recipe, questions: int, models: dict[str, Any]) -> list[str]:
    """Answers that were cut, or hold no label; and where these are most, what that means for a comparison."""
    said, cut, mostly = [], {}, {}
    for name, model in models.items():
        number, without = model["cut_predictions"], _answered(model)[scores.UNPARSABLE] if recipe.labels else 0
        if max(number, without) >= MOSTLY * questions:
            found = {"cut off at max_new_tokens": number, "without a label": without}
            mostly[name] = ", ".join(f"{n} of {questions} {how}" for how, n in found.items() if n > questions / 2)
            continue
        if number > questions / 2:
            cut[name] = number
        if without:
            said.append(f"{name}: {without} of {questions} answers hold no label.")
    if cut:
        each = ", ".join(f"{name} ({number})" for name, number in cut.items())
        said.append(f"Most of the {questions} answers were cut at max_new_tokens: {each}; set it higher.")
    if mostly and recipe.labels:
        each = "; ".join(f"{name}: {counts}" for name, counts in mostly.items())
        chosen = f"{scores.CONSTRAINED}accuracy"
        fairer = "examples in the prompt (num_shots) make the comparison fairer"
        if any(chosen in models[name] for name in mostly):
            fairer = f'"{scores.NAMES[chosen]}", of the label that a model finds likeliest, is the fairer comparison'
        said.append(
            f"Most answers are cut off or hold no label ({each}). So scores of written answers say that a model does not keep "
            f"to the form, not what it knows: {fairer}."
        )
    elif mostly:
        fairer = (
            "A longer answer shares less of itself with the expected reply: a part of what another model gains is that it ends "
            "in time. A higher max_new_tokens makes the comparison fairer."
        )
        each = ", ".join(f"{name} ({models[name]['cut_predictions']} of {questions})" for name in mostly)
        fairer = "Set it higher." if len(mostly) == len(models) else fairer
        said.append(f"Most answers are cut off at max_new_tokens: {each}. {fairer}")
    return said


def _answered(model: dict[str, Any]) -> dict[str, int]:
    """How often a model's written answers hold each label, or none."""
    table = model["confusion"].values()
    return {label: sum(row[label] for row in table) for label in next(iter(table))}


def _examples(name: str, questions: list[Question], values: np.ndarray) -> dict[str, Any]:
    order = np.argsort(-values, kind="stable")
    return {"best": [questions[i].id for i in order[:MOST_CHANGED]],
            "worst": [questions[i].id for i in order[::-1][:MOST_CHANGED]],
            "typical": {questions[i].id: {name: float(values[i])} for i in _nearest_median(values)}}  # fmt: skip


def _nearest_median(values: np.ndarray) -> np.ndarray:
    """The places of the values nearest the median; among equals drawn ones, as those that stand first may be of one kind."""
    shuffled = np.random.default_rng(0).permutation(len(values))
    return shuffled[np.argsort(np.abs(values - np.median(values))[shuffled], kind="stable")][:TYPICAL]
