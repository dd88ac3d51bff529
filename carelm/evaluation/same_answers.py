"""Models that answer every question with the same text as one before them: a merge that is its adapter, to the letter."""

from pathlib import Path
from typing import Any

from carelm.evaluation.scores import LABEL_SCORES
from carelm.evaluation.verdicts import main_pair
from carelm.files import read_json


def find(results: dict[str, Any], lines: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each such model `as`, the one before it, `certificate`, what merge.json in its folder says (empty where there is
    none), and `sentence`. The base and the tuned model are never folded into one: that they are alike is the answer."""
    models = results["models"]
    kept: list[str] = [name for name in main_pair(models) if name]
    found = {}
    for name in (n for n in models if n not in kept):
        answers = [line["prediction"] for line in lines[name]]
        for other in kept:
            alike = all(models[name].get(s) == models[other].get(s) for s in LABEL_SCORES)
            if alike and answers == [line["prediction"] for line in lines[other]]:
                merge = certificate(models[name])
                sentence = (
                    f"{name} gives the same answer as {other} to all {len(answers)} questions, to the letter, and stands in "
                    "its column."
                )
                if merge:
                    sentence += f" When it was merged it was checked too: {describe(merge)}"
                found[name] = {"as": other, "certificate": merge, "sentence": sentence}
                break
        else:
            kept.append(name)
    return found


def certificate(model: dict[str, Any]) -> dict[str, Any]:
    """What merge.json in a model's folder says of how far it is from its adapter; empty where nothing was measured."""
    merge = read_json(Path(model.get("folder") or "") / "merge.json")
    return merge if merge.get("mean_kl") is not None else {}


def of_merges(results: dict[str, Any], folded: dict[str, Any]) -> list[str]:
    """A sentence on how each merged model was checked that does not answer like another one to the letter."""
    checked = {name: certificate(model) for name, model in results["models"].items() if name not in folded}
    return [f"{name} was checked when it was merged: {describe(merge)}" for name, merge in checked.items() if merge]


def describe(merge: dict[str, Any]) -> str:
    """What a merge's certificate says, in words: what was checked, what the figure means, and whether to worry.

    Args:
        merge: the content of merge.json.
    """
    number, agreed, passed = merge["prompts"], merge["top1_agreement"], merge["mean_kl"] <= merge["tolerance"]
    far, allowed = f"{merge['mean_kl']:.2g}", f"{merge['tolerance']:g}"
    said = (
        f"{'passed' if passed else 'not passed'}. What decides is how far its probabilities of the next token (a piece of a "
        f"word) are from its adapter's: mean KL {far} on {number} test questions, {'at most' if passed else 'more than the'} "
        f"{allowed} {'' if passed else 'that '}are allowed. It picks the same token "
        f"{'every time' if agreed == 1 else f'in {min(agreed, 0.999):.1%} of the places'}"
    )
    if (share := merge.get("same_text_share")) is not None:
        same = round(share * number)
        said += f", and {'all' if same == number else same} of the {number} whole answers are the same"
        if same < number and passed:
            said += (
                ". Do not worry about the others: the merge rounds otherwise, and after the first other token the rest of an "
                "answer goes another way"
            )
    if not passed:
        said += "; that many alike are not enough, as the probabilities decide"
    return f"{said}."


def without(results: dict[str, Any], folded: dict[str, Any]) -> dict[str, Any]:
    """The results less the folded models, their pairs, verdicts and what they did in checks."""
    if not folded:
        return results

    def pairs(several: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [pair for pair in several if not folded.keys() & {*pair["models"]}]

    def kept(several: dict[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in several.items() if name not in folded}

    checks = {name: check | {"models": kept(check["models"]), "pairs": pairs(check["pairs"])}
              for name, check in results["checks"].items()}  # fmt: skip
    verdicts = [
        said for pair, said in zip(results["pairs"], results["verdicts"]) if not folded.keys() & {*pair["models"]}
    ]
    return results | {"models": kept(results["models"]), "pairs": pairs(results["pairs"]), "verdicts": verdicts,
                      "checks": checks, "examples": kept(results["examples"])}  # fmt: skip
