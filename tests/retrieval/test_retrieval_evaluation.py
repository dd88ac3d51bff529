"""eval/retrieval.py: which passages are right follows from the recipe, and retrievers are scored by the evaluator's rules."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import script
from small_index import SENTENCES, build_small, make_embedder

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval import retriever_results
from carelm.retrieval.gold import Asked, ask
from carelm.retrieval.passages import Passage
from carelm.retrieval.retriever import Retriever

TOPICS = ("returns", "delivery", "battery", "refunds", "kettle")


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make(tmp_path):
    """The words that name a recipe whose test rows ask about the topics of five passages."""
    write(tmp_path / "faq.jsonl", [{"topic": t, "text": s, "line": "shop"} for t, s in zip(TOPICS, SENTENCES)])
    rows = [{"question": s.rstrip("."), "answer": "a", "about": t, "line": "shop"} for t, s in zip(TOPICS, SENTENCES)]
    rows += [{"question": rows[0]["question"], "answer": "b", "about": "kettle", "line": "shop"}]
    rows += [{"question": "Who are you?", "answer": "b", "about": "", "line": "shop"}]
    for split in ("train", "test"):
        write(tmp_path / f"rows/{split}.jsonl", rows)

    def make(**keys) -> list[str]:
        recipe = {
            "documents": [str(tmp_path / "faq.jsonl")], "passage_template": "{text}", "filter_columns": ["line"],
            "dataset_name": str(tmp_path / "rows"), "prompt_template": "{question}", "completion_template": "{answer}",
            "gold_passages": {"topic": "about"}, "output_dir": str(tmp_path / "run"),
            "embedder": str(tmp_path / "embedder"), "num_resamples": 200, "num_latency_prompts": 2,
        }  # fmt: skip
        (tmp_path / "shop.yaml").write_text(yaml.safe_dump(recipe | keys))
        return ["--config", str(tmp_path / "shop.yaml")]

    return make


PASSAGES = [
    Passage(f"p{k}", "faq.pdf", None, k, None, None, text, {"topic": topic})
    for k, (topic, text) in enumerate(zip(TOPICS, SENTENCES))
]


def test_a_passage_is_right_where_its_column_has_the_value_of_the_rows(make):
    asked, without = ask(load_recipe(make(), usage=""), PASSAGES)
    assert without == 1 and [question.gold for question in asked] == [{"p0", "p4"}, {"p1"}, {"p2"}, {"p3"}, {"p4"}]
    assert asked[0].text == "You can return a lamp within 30 days" and asked[0].filters == {"line": "shop"}
    fewer, _ = ask(load_recipe(make(max_eval_samples=2), usage=""), PASSAGES)
    assert len(fewer) == 2


def test_a_page_of_a_document_can_be_what_is_right(make, tmp_path):
    write(tmp_path / "rows/test.jsonl", [{"question": "Q?", "answer": "a", "file": "faq.pdf", "page": 3}])
    write(tmp_path / "rows/train.jsonl", [{"question": "R?", "answer": "a", "file": "faq.pdf", "page": 1}])
    recipe = load_recipe(make(gold_passages={"document": "file", "page": "page"}), usage="")
    assert ask(recipe, PASSAGES)[0][0].gold == {"p3"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gold_passages": {}}, r"gold_passages: it is empty; write {passage column: test row's column}"),
        ({"gold_passages": {"topic": "line"}}, r"gold_passages: no passage has in 'topic' .*test.jsonl:1 has 'shop'"),
    ],
)
def test_a_recipe_that_does_not_say_what_is_right_is_told_how(make, keys, said):
    with pytest.raises(UserError, match=said):
        ask(load_recipe(make(**keys), usage=""), PASSAGES)


def test_scores_are_those_of_the_definition_and_one_that_is_better_is_said_to_be():
    questions = [None] * 60
    ranks = {
        "bm25": np.array([1, 3, 6, 11] * 15),
        "hybrid": np.array([1, 3, 6, 11] * 15),
        "dense": np.array([1, 1, 2, 11] * 15),
    }
    found = retriever_results.make_results(questions, ranks, "hybrid", 500, 0)
    values = {s: of_one["value"] for s, of_one in found["retrievers"]["hybrid"].items()}
    assert values == pytest.approx({"recall@1": 0.25, "recall@5": 0.5, "MRR@10": (1 + 1 / 3 + 1 / 6) / 4})
    assert found["retrievers"]["dense"]["recall@5"]["low"] < 0.75 < found["retrievers"]["dense"]["recall@5"]["high"]
    assert all("dense is better (+" in verdict and "bm25" not in verdict for verdict in found["verdicts"])
    own = retriever_results.make_results(questions, ranks, "dense", 500, 0)
    assert all(verdict.endswith("; no other is significantly better") for verdict in own["verdicts"])


def test_a_question_is_asked_again_without_its_gold_passages_to_see_what_a_threshold_refuses(make, tmp_path):
    embedder = make_embedder(tmp_path / "embedder")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "shop.txt").write_text("\n".join(SENTENCES))
    build_small(tmp_path / "index/passages", documents, embedder)
    retriever = Retriever(load_recipe(make(index=str(tmp_path / "index")), usage=""))
    asked = [Asked(str(k), SENTENCES[k % 5], {f"shop.txt:{k % 5 + 1}"}) for k in range(20)]
    answerable, unanswerable = retriever_results.confidences(retriever, asked)
    assert answerable == pytest.approx(np.ones(20), abs=1e-3) and (unanswerable < 0.95).all()
    found = retriever_results.refusals_of(retriever, asked, seed=0)
    assert (found["answerable"]["refused"], found["unanswerable"]["refused"]) == (0, 20)
    ranks = {"hybrid": np.ones(20, int)}
    results = retriever_results.make_results(asked, ranks, "hybrid", 200, 0) | {"refusals": found}
    results["retrievers"]["hybrid"]["latency_ms"] = None
    assert "| 0% (0% to 16%) | 100% (84% to 100%) |" in retriever_results.tables(results)[-1].as_markdown()


def test_every_retriever_is_asked_with_and_without_filters_and_the_report_says_how_it_went(make, tmp_path):
    make_embedder(tmp_path / "embedder")
    done = script(*make(), file="eval/retrieval.py", check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    names = {f"{way}{ending}" for way in ("bm25", "dense", "hybrid") for ending in ("", ", filtered")}
    assert outcome["retrievers"].keys() == names and outcome["questions"] == 5
    assert all(scores["recall@1"] == 1 for scores in outcome["retrievers"].values())
    folder = tmp_path / "run/eval/retrieval"
    found = json.loads((folder / "results.json").read_text())
    assert found["test"]["without_gold"] == 1 and found["index"]["built"]["embedded"] == 5
    assert found["retrievers"]["hybrid"]["latency_ms"]["searches"] == 2 and len(found["pairs"]) == 15
    assert json.loads((folder / "ranks.jsonl").read_text().splitlines()[0])["rank"] == dict.fromkeys(names, 1)
    report = (folder / "report.md").read_text()
    assert "## Retrievers" in report and "- recall@1 of hybrid: 1.000; 5 questions are too few to tell" in report
