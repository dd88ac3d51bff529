"""Shows how well a recipe's questions find their passages: by words, by meaning and by both, beside one another.

    python eval/retrieval.py --config recipes/shop.yaml
    python eval/retrieval.py --config recipes/shop.yaml --dense_weight 0.7 --embedder intfloat/e5-small-v2

The questions are the test split's; a passage is right for a row where both have the same value in the columns that
`gold_passages` names. The index is made or brought up to date first. Where test rows have the columns of `product_column` and
`filter_columns`, each retriever is also asked with these filters. Writes results.json, report.md and ranks.jsonl into
OUTPUT_DIR/eval/retrieval/. The last line on standard output is the outcome as one JSON object.

exit status: 0 the report is written, 2 something is to be mended.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, quiet, ranks  # noqa: F401
from carelm.data.sources import stay_offline
from carelm.files import write_whole
from carelm.keys import RETRIEVAL_KEYS
from carelm.recipe_file import load_recipe

KEYS = (*RETRIEVAL_KEYS, "max_eval_samples", "num_resamples", "num_latency_prompts")  # for --help
WAYS = ("bm25", "dense", "hybrid")


def main() -> None:
    recipe = load_recipe(sys.argv[1:], usage=__doc__, first=KEYS)
    stay_offline(recipe, and_embedder=True)
    quiet.silence(has_gpu=False, is_first_rank=True)
    from carelm.retrieval import gold, retriever_results
    from carelm.retrieval.index import open_index
    from carelm.retrieval.refusals import FOLDS
    from carelm.retrieval.retriever import Retriever
    from carelm.retrieval.update import update

    folder = recipe.output_dir / "eval/retrieval"
    searched = dataclasses.replace(recipe, retriever="hybrid")
    if recipe.retriever == "bm25":  # whose own index has no vectors
        searched.index = str(folder / "index")
    report = update(searched)
    print(report.lines(), file=sys.stderr)
    index = open_index(searched)
    questions, without = gold.ask(recipe, index.passages())
    ranks.say(f"{len(questions)} questions have a gold passage, {without} have none")
    ways = WAYS if index.manifest["embedder"] else ("bm25",)
    filtered = all(question.filters for question in questions)
    found, latency = {}, {}
    for way in ways:
        retriever = Retriever(dataclasses.replace(searched, retriever=way))
        for is_filtered in (False, True) if filtered else (False,):
            name = f"{way}, filtered" if is_filtered else way
            ranks.say(f"{name} is asked")
            found[name] = retriever_results.gold_ranks(retriever, questions, is_filtered)
            timed = questions[: recipe.num_latency_prompts]
            latency[name] = retriever_results.time_searches(retriever, timed, is_filtered) if timed else None
    own = recipe.retriever if recipe.retriever in ways else "bm25"
    results = {
        "test": {"dataset": recipe.dataset_name, "questions": len(questions), "without_gold": without,
                 "gold_passages": recipe.gold_passages},
        "index": {"passages": report.passages, "bytes": report.bytes, "built": index.manifest["built"],
                  "embedder": report.embedder, "dense_weight": recipe.dense_weight, "chunk_tokens": recipe.chunk_tokens},
        **retriever_results.make_results(questions, found, own, recipe.num_resamples, recipe.seed),
    }  # fmt: skip
    if len(questions) >= FOLDS:
        asked = Retriever(dataclasses.replace(searched, retriever=own))
        results["refusals"] = retriever_results.refusals_of(asked, questions, recipe.seed)
    for name, times in latency.items():
        results["retrievers"][name]["latency_ms"] = times
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": question.id, "question": question.text, "gold": sorted(question.gold),
                    "rank": {name: int(of_one[k]) for name, of_one in found.items()}}, ensure_ascii=False) + "\n"
        for k, question in enumerate(questions)
    ]  # fmt: skip
    write_whole(folder / "ranks.jsonl", "".join(lines))
    write_whole(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
    write_whole(folder / "report.md", retriever_results.markdown(f"{recipe.name}: are passages found?", results))
    for verdict in results["verdicts"]:
        ranks.say(verdict)
    ranks.say(f"the report is {folder / 'report.md'}")
    scores = {
        name: {s: one[s]["value"] for s in retriever_results.SCORES} for name, one in results["retrievers"].items()
    }
    ranks.print_result({"report": str(folder / "report.md"), "questions": len(questions), "retrievers": scores})


if __name__ == "__main__":
    ranks.run_main(main, kept="the index before stays as it is")
