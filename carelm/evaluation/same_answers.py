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
                merge = read_json(Path(models[name].get("folder") or "") / "merge.json")
                found[name] = {
                    "as": other,
                    "certificate": merge,
                    "sentence": _sentence(name, other, len(answers), merge),
                }
                break
        else:
            kept.append(name)
    return found


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


def _sentence(name: str, other: str, number: int, merge: dict[str, Any]) -> str:
    said = (
        f"{name} gives the same answer as {other} to all {number} questions, to the letter, and stands in its column."
    )
    if merge.get("mean_kl") is not None:
        said += (
            f" The merge's certificate (merge.json): mean KL {merge['mean_kl']:.2g} nats per token over {merge['prompts']} "
            f"prompts, allowed {merge['tolerance']:.2g}; the same likeliest token in {merge['top1_agreement']:.2%}."
        )
    return said
