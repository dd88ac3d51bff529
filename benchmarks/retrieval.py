"""How well passages are found on public rows, by each retriever; and how the two are weighed in the hybrid one.

    python benchmarks/retrieval.py --data FOLDER [--only rqe medquad bitext eshop_manuals]
    python benchmarks/retrieval.py --data FOLDER --only weights
    python benchmarks/retrieval.py --only large [--passages 100000]

rqe: consumer questions of the official test split, each of which has a true FAQ, among all of its FAQs. medquad: test questions
among the test answers, whole and (medquad_cut) cut at 200 tokens. bitext: test questions among the training questions, of which
those of the same intent are right. eshop_manuals: ten questions only, among the 164 chunks of eight manuals, with and without
the product as a filter; the chunks that hold the answers were found by hand. Each is one `python eval/retrieval.py`.

weights: on training rows alone, what the default of `dense_weight` was chosen by: weighted sums of scores, and weighted
reciprocal rank fusion (Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114, k = 60), which they are compared with.

large: invented passages with drawn vectors: seconds and bytes of an index of so many, milliseconds of a search with and
without a filter; nothing is embedded.

FOLDER holds rqe_question_pairs, medquad, bitext_support and eshop_manuals. Results: benchmarks/results/retrieval.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from launches import PROJECT, RESULTS, describe_machine, run, say, threads, write_results

sys.path.append(str(PROJECT))

SETS = ("rqe", "medquad", "medquad_cut", "bitext", "eshop_manuals")
WHOLE = 10**6  # tokens: no passage is cut
# Of eshop_manuals: the chunk that holds the answer, by collection and question.
ANSWERS = {"test": {1: 41, 2: 32, 3: 85, 4: 106, 5: 69}, "demo": {1: 37, 2: 40, 3: 40, 4: 35, 5: 39}}
WEIGHTS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
RRF_K = 60
WORDS = 50_000  # of the invented passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the public rows")
    parser.add_argument("--only", nargs="+", choices=(*SETS, "weights", "large"), default=[*SETS, "weights", "large"])
    parser.add_argument("--passages", type=int, default=100_000)
    options = parser.parse_args()
    if options.data is None and options.only != ["large"]:
        sys.exit("--data: name the folder with the public rows")
    result = json.loads(file.read_text()) if (file := RESULTS / "retrieval.json").exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="carelm-retrieval-") as folder:
            if name == "large":
                measured = measure_large(Path(folder), options.passages)
            elif name == "weights":
                measured = choose_weight(options.data, Path(folder))
            else:
                measured = evaluate(name, PREPARE[name](options.data, Path(folder)), Path(folder))
            result[name] = {"machine": describe_machine(), **measured}
        say(f"{name}: written to {write_results('retrieval', result)}")


def evaluate(name: str, keys: dict, folder: Path) -> dict:
    """results.json of `python eval/retrieval.py` with these keys."""
    recipe = {"model_name_or_path": "demo/base", "chunk_tokens": WHOLE, "num_resamples": 2000} | keys
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", folder / f"{name}.yaml", "--output_dir", folder / "run"]
    outcome = run([sys.executable, "eval/retrieval.py", *map(str, words)], {"OMP_NUM_THREADS": threads(1)}, 3600)
    if outcome.status != 0:
        sys.exit(outcome.stderr)
    found = json.loads((folder / "run/eval/retrieval/results.json").read_text())
    del found["test"]["dataset"], found["index"]["embedder"]
    return {"keys": {k: v for k, v in recipe.items() if k not in ("documents", "dataset_name")}, **found}


def rqe(data: Path, folder: Path) -> dict:
    rows = read(data / "rqe_question_pairs/official_test.jsonl")
    write(folder / "faqs.jsonl", [{"faq": faq} for faq in dict.fromkeys(row["faq"] for row in rows)])
    write(folder / "rows/test.jsonl", [row for row in rows if row["value"] == "true"])
    write(folder / "rows/train.jsonl", read(data / "rqe_question_pairs/train.jsonl"))
    return {"documents": [str(folder / "faqs.jsonl")], "dataset_name": str(folder / "rows"), "passage_template": "{faq}",
            "prompt_template": "{chq}", "completion_template": "{faq}", "gold_passages": {"faq": "faq"}}  # fmt: skip


def medquad(data: Path, folder: Path) -> dict:
    return {"documents": [str(data / "medquad/test.jsonl")], "dataset_name": str(data / "medquad"),
            "passage_template": "{Answer}", "prompt_template": "{Question}", "completion_template": "{Answer}",
            "gold_passages": {"source": "source", "qid": "qid"}}  # fmt: skip


def medquad_cut(data: Path, folder: Path) -> dict:
    return medquad(data, folder) | {"chunk_tokens": 200, "model_name_or_path": "bases/smollm2-135m-instruct"}


def bitext(data: Path, folder: Path) -> dict:
    return {"documents": [str(data / "bitext_support/train.jsonl")], "dataset_name": str(data / "bitext_support"),
            "passage_template": "{instruction}", "prompt_template": "{instruction}", "completion_template": "{response}",
            "gold_passages": {"intent": "intent"}}  # fmt: skip


def eshop_manuals(data: Path, folder: Path) -> dict:
    source = data / "eshop_manuals"
    products = {
        (p["collection"], p["ProductId"]): f"{p['Brand']} {p['Model']}" for p in read(source / "products.jsonl")
    }
    chunks, questions = read(source / "manual_chunks.jsonl"), read(source / "questions.jsonl")
    for row in (*chunks, *questions):
        row["product"] = products[row["collection"], row["ProductId"]]
    for question in questions:
        question["ChunkId"] = ANSWERS[question["collection"]][question["QuestionId"]]
    write(folder / "chunks.jsonl", chunks)
    for split in ("train", "test"):  # nothing is trained
        write(folder / f"rows/{split}.jsonl", questions)
    return {"documents": [str(folder / "chunks.jsonl")], "dataset_name": str(folder / "rows"),
            "passage_template": "{Text}", "product_column": "product", "prompt_template": "{Question}",
            "completion_template": "{Answer}", "keep_test_questions": True,
            "gold_passages": {"collection": "collection", "ChunkId": "ChunkId"}}  # fmt: skip


PREPARE = {"rqe": rqe, "medquad": medquad, "medquad_cut": medquad_cut, "bitext": bitext, "eshop_manuals": eshop_manuals}


def choose_weight(data: Path, folder: Path) -> dict:
    """Mean reciprocal ranks on training rows: of the two alone, of their weighted sums, and of their ranks' fusion."""
    pairs = [row for row in read(data / "rqe_question_pairs/train.jsonl") if row["value"] == "true"]
    answers, support = read(data / "medquad/train.jsonl")[:800], read(data / "bitext_support/train.jsonl")
    of_faq, of_intent = {}, {}
    for row in pairs:
        of_faq.setdefault(row["faq"], len(of_faq))
    asked = {}
    for row in pairs:
        if row["chq"].strip() != row["faq"].strip():
            asked.setdefault(row["chq"], set()).add(of_faq[row["faq"]])
    for number, row in enumerate(support[:2250]):
        of_intent.setdefault(row["intent"], set()).add(number)
    sets = {
        "rqe": ([*of_faq], dict([*asked.items()][:300])),
        "medquad": ([row["Answer"] for row in answers], {row["Question"]: {n} for n, row in enumerate(answers[:300])}),
        "bitext": (
            [r["instruction"] for r in support[:2250]],
            {r["instruction"]: of_intent[r["intent"]] for r in support[2250:]},
        ),
    }
    found = {}
    for name, (texts, questions) in sets.items():
        say(f"weights: {name}")
        found[name] = {"passages": len(texts), "questions": len(questions), **fused(folder / name, texts, questions)}
    means = {
        way: {w: float(np.mean([of_set[way][w]["MRR@10"] for of_set in found.values()])) for w in map(str, WEIGHTS)}
        for way in ("score", "reciprocal_rank")
    }
    return {"training_rows": found, "mean_MRR@10": means}


def fused(folder: Path, texts: list[str], questions: dict[str, set[int]]) -> dict:
    from carelm.recipe_file import load_recipe
    from carelm.retrieval.embedder import find_embedder
    from carelm.retrieval.passages import Passage
    from carelm.retrieval.retriever import POOL, Retriever
    from carelm.retrieval.retriever_results import DEPTH, SCORES, statistics
    from carelm.retrieval.update import Content, build

    passages = [Passage(str(number), "rows", None, None, None, None, text) for number, text in enumerate(texts)]
    recipe = load_recipe(["--index", str(folder)], usage="")
    content = Content({"rows": []}, lambda name: (passages, {}), {})
    build(folder / "passages", content, find_embedder(recipe))

    def scored(found: list[dict[str, float]]) -> dict[str, float]:
        """Of passages with their scores, for each question."""
        best = [sorted(of_one, key=lambda id: -of_one[id])[:DEPTH] for of_one in found]
        ranks = [
            next((rank for rank, id in enumerate(of_one, 1) if int(id) in gold), DEPTH + 1)
            for of_one, gold in zip(best, questions.values())
        ]
        tables = statistics(np.array(ranks))
        return {name: float(tables[name].score(tables[name].table.sum(0))) for name in SCORES}

    retriever = Retriever(recipe)
    rows = retriever.index.table.to_arrow()
    vectors = np.stack(rows["vector"].to_numpy())[np.argsort(np.array(rows["id"].to_pylist(), int))]
    all_cosines = np.clip(retriever.embedder.embed([*questions], questions=True) @ vectors.T, 0, 1)
    cosines, of_words = [], []
    for question, row in zip(questions, all_cosines):
        words = dict(bm25(retriever.index, question, POOL))
        nearest = map(str, np.argsort(-row, kind="stable")[:POOL])
        of_words.append(words)
        cosines.append({id: float(row[int(id)]) for id in dict.fromkeys([*nearest, *words])})
    own = {"bm25": scored(of_words), "dense": scored(cosines), "score": {}, "reciprocal_rank": {}}
    for weight in WEIGHTS:
        of_score, of_rank = [], []
        for a, b in zip(cosines, of_words):
            highest = max(b.values(), default=1)
            of_score.append({id: weight * a[id] + (1 - weight) * b.get(id, 0) / highest for id in a})
            d, w = reciprocal([*a][:POOL], weight), reciprocal([*b], 1 - weight)
            of_rank.append({id: d.get(id, 0) + w.get(id, 0) for id in d | w})
        own["score"][str(weight)], own["reciprocal_rank"][str(weight)] = scored(of_score), scored(of_rank)
    return own


def bm25(index, question: str, number: int) -> list[tuple[str, float]]:
    found = index.by_words(question, number)
    return [*zip(found["id"].to_pylist(), found["_score"].to_pylist())]


def reciprocal(ids: list[str], weight: float) -> dict[str, float]:
    return {id: weight / (RRF_K + rank) for rank, id in enumerate(ids, 1)}


def measure_large(folder: Path, number: int) -> dict:
    """An index of invented passages: words as often as Zipf's law has them, vectors around 500 points, 1,000 products."""
    from carelm.recipe_file import load_recipe
    from carelm.retrieval.index import FLAT, Index
    from carelm.retrieval.passages import Passage
    from carelm.retrieval.retriever import Retriever
    from carelm.retrieval.update import Content, build

    random = np.random.default_rng(0)
    likely = np.cumsum(1 / np.arange(1, WORDS + 1))

    def draw_texts(number: int, words: int) -> list[str]:
        drawn = np.searchsorted(likely, random.random((number, words)) * likely[-1])
        return [" ".join(f"word{k}" for k in of_one) for of_one in drawn.tolist()]

    passages = [
        Passage(str(k), "rows", None, None, None, f"product {k % 1000}", text)
        for k, text in enumerate(draw_texts(number, 80))
    ]
    centres = random.standard_normal((500, 384), np.float32)

    class Drawn:
        """An embedder whose vectors are drawn: what an index takes besides the embedding."""

        folder, fingerprint, precision = Path("drawn"), "drawn", "fp32"

        def embed(self, texts, questions=False):
            near = centres[random.integers(0, 500, len(texts))]
            vectors = near + random.standard_normal(near.shape, np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        def count_too_long(self, texts):
            return 0

    report = build(folder / "passages", Content({"rows": []}, lambda name: (passages, {}), {}), Drawn())
    found = {"passages": number, "seconds": report.seconds, "bytes": report.bytes, "approximate_above": FLAT}
    recipe = load_recipe(["--index", str(folder), "--retriever", "bm25"], usage="")
    retriever = Retriever(recipe)
    retriever.embedder = Drawn()
    questions = draw_texts(50, 10)
    for way in ("bm25", "dense", "hybrid"):
        retriever.way = way
        for name, filters in (("", None), (", filtered", {"product": "product 7"})):
            times = []
            for question in [questions[0], *questions]:
                began = time.perf_counter()
                retriever.search(question, 10, filters)
                times.append((time.perf_counter() - began) * 1000)
            p50, p95 = np.percentile(times[1:], (50, 95))
            found[f"{way}{name}"] = {"p50_ms": float(p50), "p95_ms": float(p95)}
    index = Index(folder / "passages")
    vectors = Drawn().embed(questions)
    exact = [
        index.table.search(v).distance_type("cosine").bypass_vector_index().limit(10).to_arrow()["id"].to_pylist()
        for v in vectors
    ]
    near = [index.by_meaning(v, 10)["id"].to_pylist() for v in vectors]
    found["share_of_exact_10"] = float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, near)]))
    return found


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
