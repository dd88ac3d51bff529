"""Scores equal the reference implementations; intervals and p-values do what they say."""

import json
import random

import evaluate
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from carelm.evaluation import scores
from carelm.evaluation.rouge_measures import ROUGE_TYPES, rouge
from carelm.files import PROJECT

LINES = st.lists(st.text("ab c.\n-", max_size=30), min_size=1, max_size=4).map("\n".join)


def by_rouge_score(prediction: str, references: list[str]) -> dict[str, float]:
    found = RougeScorer(ROUGE_TYPES).score_multi(references, prediction)
    return {name: found[name].fmeasure for name in ROUGE_TYPES}


def real_pairs(folder, column: str, number: int) -> list[tuple[str, str]]:
    """Answers beside other rows' answers, so that they share some words and not all."""
    rows = [json.loads(line)[column] for line in open(folder / "train.jsonl", encoding="utf-8")]
    random.Random(0).shuffle(rows)
    return list(zip(rows[:number], rows[1 : number + 1]))


@given(st.lists(st.tuples(LINES, st.lists(LINES, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_rouge_is_rouge_score_for_any_text_and_any_number_of_references(pairs):
    found = rouge([p for p, _ in pairs], [r for _, r in pairs])
    for i, (prediction, references) in enumerate(pairs):
        for name, value in by_rouge_score(prediction, references).items():
            assert found[name][i] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(("dataset", "column"), [("bitext_support", "response"), ("medquad", "Answer")])
def test_rouge_is_rouge_score_on_a_thousand_real_pairs(carelm_data, dataset, column):
    pairs = real_pairs(carelm_data / dataset, column, 500)
    found = rouge([p for p, _ in pairs], [[r] for _, r in pairs])
    for i, (prediction, reference) in enumerate(pairs):
        for name, value in by_rouge_score(prediction, [reference]).items():
            assert found[name][i] == pytest.approx(value, abs=1e-9)


def test_rouge_is_rouge_score_for_texts_of_a_thousand_words():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(60)]
    long = ["".join(draw.choice(words) + draw.choice((" ", " ", " ", ".\n")) for _ in range(1000)) for _ in range(4)]
    found = rouge(long[:2], [[text] for text in long[2:]])
    for i in range(2):
        for name, value in by_rouge_score(long[i], [long[i + 2]]).items():
            assert found[name][i] == pytest.approx(value, abs=1e-9)


def test_the_metric_loads_offline_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(str(PROJECT / "carelm/evaluation/rouge.py"), cache_dir=str(tmp_path), keep_in_memory=True)
    found = metric.compute(predictions=["the cat sat", ""], references=["the cat", "a dog"])
    assert found["rouge1"] == pytest.approx((0.8 + 0) / 2)


@pytest.mark.parametrize(("dataset", "column"), [("bitext_support", "response"), ("medquad", "Answer")])
def test_bleu_and_chrf_are_sacrebleus(carelm_data, dataset, column):
    pairs = real_pairs(carelm_data / dataset, column, 500)
    predictions, references = [p for p, _ in pairs], [[r] for _, r in pairs]
    references[0] = [references[0][0], references[1][0], references[2][0]]
    predictions[3] = ""
    answers = scores.Answers([str(i // 2) for i in range(len(pairs))], predictions, references)
    tables = scores.statistics(answers)
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(3)]
    for name, score in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        ours = tables[name].score(tables[name].table.sum(0))
        assert float(ours) == pytest.approx(score(predictions, streams).score, abs=1e-9)
    assert scores.signatures(answers)["bleu"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp")


def answers(predictions, references, conversations=None) -> scores.Answers:
    conversations = conversations or [str(i) for i in range(len(predictions))]
    return scores.Answers(conversations, predictions, [[r] for r in references])


PIECES = st.sampled_from(
    ["a", "b", "the", "4", "-", ".", ",", "...", "&amp;quot;", "<skipped>", "-\n", "\n", " ", "\u00a0", "急", "诊"]
)
TEXTS = st.lists(PIECES, max_size=25).map("".join)


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4),
       st.sampled_from(["13a", "zh", "char", "intl"]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_counts_of_bleu_and_chrf_are_sacrebleus_for_any_text_and_any_number_of_references(pairs, tokenizer):
    found = scores.per_turn(scores.Answers([""] * len(pairs), *map(list, zip(*pairs))), tokenizer=tokenizer)
    for name, metric in (("bleu", sacrebleu.BLEU(tokenize=tokenizer)), ("chrf", sacrebleu.CHRF())):
        for row, value, (prediction, references) in zip(found[name].table, found[name].score(found[name].table), pairs):
            theirs = metric._extract_corpus_statistics([prediction], [[reference] for reference in references])[0]
            assert row.tolist() == theirs
            assert value == pytest.approx(metric._compute_score_from_stats(theirs).score, abs=1e-9)


@pytest.mark.parametrize("count", [3, 700], ids=["few texts", "more texts than are counted at a time"])
def test_texts_with_more_characters_than_can_be_packed_are_counted_like_others(count):
    draw = random.Random(0)
    texts = ["".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(3000)) for _ in range(3)]
    texts += ["ab" * draw.randrange(20) for _ in range(count - 3)]
    turned = [text[len(text) // 3 :] + text[: len(text) // 3] for text in texts]
    ours = scores.per_turn(answers(turned, texts))["chrf"].table
    theirs = sacrebleu.CHRF()._extract_corpus_statistics(turned, [texts])
    assert ours.tolist() == theirs


def test_intervals_differences_and_tables_of_a_comparison_are_those_of_their_definitions():
    """By the formulas written out: every resample's texts scored by the reference implementations."""
    draw = random.Random(2)
    references = [[" ".join(draw.choices("abcdefgh", k=9)) + draw.choice([" yes", " no"])] for _ in range(24)]
    conversations = [f"c{i // 2}" for i in range(24)]
    drawn = scores.draws(12, 40, seed=1)
    random_state = np.random.default_rng(1)
    for row in drawn:
        assert row.tolist() == np.bincount(random_state.integers(0, 12, 12), minlength=12).tolist()
    place = {name: k for k, name in enumerate(sorted(set(conversations)))}
    scored, expected = {}, {}
    for model in ("a", "b"):
        said = [" ".join(draw.sample(r.split(), 8)) + draw.choice([" yes", " no", ""]) for (r,) in references]
        one = scores.Answers(conversations, said, references)
        scored[model] = scores.resample(scores.statistics(one, ["yes", "no"]), drawn)
        turns = [by_rouge_score(p, r) for p, r in zip(said, references)]
        expected[model] = []
        for row in drawn:
            chosen = [i for i, name in enumerate(conversations) for _ in range(row[place[name]])]
            texts, streams = [said[i] for i in chosen], [[references[i][0] for i in chosen]]
            expected[model].append({
                **{name: np.mean([turns[i][name] for i in chosen]) for name in ROUGE_TYPES},
                "bleu": sacrebleu.corpus_bleu(texts, streams).score, "chrf": sacrebleu.corpus_chrf(texts, streams).score,
            })  # fmt: skip
        for name in (*ROUGE_TYPES, "bleu", "chrf"):
            assert scored[model][name].resampled == pytest.approx([e[name] for e in expected[model]], abs=1e-9)
    (pair,) = scores.compare(scored)
    for name in (*ROUGE_TYPES, "bleu", "chrf"):
        change = [b[name] - a[name] for a, b in zip(expected["a"], expected["b"])]
        low, high = np.percentile(change, (2.5, 97.5))
        assert (pair["scores"][name]["low"], pair["scores"][name]["high"]) == pytest.approx((low, high), abs=1e-9)


def test_a_comparison_of_many_predictions_holds_no_matrix_of_its_draws_in_full_precision():
    """Five times the conversations may not take five times the memory of float64 draws."""
    import tracemalloc

    table = scores.mean_of(np.ones(50_000))
    tracemalloc.start()
    found = scores.interval(scores.resample({"x": table}, scores.draws(50_000, 400, seed=0))["x"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {"value": 1, "low": 1, "high": 1}
    assert peak < 50_000 * 400 * 8


def interval(tables, name: str, drawn) -> dict[str, float]:
    return scores.interval(scores.resample(tables, drawn)[name])


def test_an_empty_prediction_counts_as_zero_and_stays_in_the_mean():
    tables = scores.statistics(answers(["same words", ""], ["same words", "other words"]))
    drawn = scores.draws(2, 100, seed=0)
    assert interval(tables, "rougeL", drawn)["value"] == pytest.approx(0.5)
    assert interval(tables, "exact_match", drawn)["value"] == pytest.approx(0.5)


def test_intervals_are_over_conversations_and_not_over_turns():
    """The same turns three times over are no more evidence."""
    once = [("a b", "a b"), ("c d", "e f"), ("g h", "g i"), ("k l", "k l")] * 5
    predictions, references = zip(*once)
    names = [str(i) for i in range(len(once))]
    drawn = scores.draws(len(once), 1000, seed=3)
    single = interval(scores.statistics(answers(predictions, references, names)), "rouge1", drawn)
    triple = interval(scores.statistics(answers(predictions * 3, references * 3, names * 3)), "rouge1", drawn)
    assert triple == pytest.approx(single)
    independent = scores.draws(3 * len(once), 1000, seed=3)
    narrow = interval(scores.statistics(answers(predictions * 3, references * 3)), "rouge1", independent)
    assert narrow["high"] - narrow["low"] < 0.8 * (single["high"] - single["low"])


def test_the_interval_covers_the_true_mean_about_95_times_of_100():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.binomial(1, 0.3, 60)
        table = scores.mean_of(values.astype(float))
        found = interval({"mean": table}, "mean", scores.draws(60, 300, seed=trial))
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_two_equal_models_do_not_differ_and_a_better_one_does():
    references = [f"word{i} of the answer" for i in range(40)]
    drawn = scores.draws(40, 1000, seed=0)
    good = scores.resample(scores.statistics(answers(references, references)), drawn)
    poor = scores.resample(scores.statistics(answers(["no"] * 40, references)), drawn)
    same = scores.difference(good["rougeL"], good["rougeL"])
    assert same == {"difference": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    better = scores.difference(poor["rougeL"], good["rougeL"])
    assert better["low"] > 0 and better["p_value"] == pytest.approx(2 / 1001)
    assert scores.difference(good["rougeL"], poor["rougeL"])["difference"] == -better["difference"]


def test_a_paired_difference_is_narrower_than_two_separate_intervals():
    rng = random.Random(5)
    references = [" ".join(rng.choices("abcdefgh", k=8)) for _ in range(60)]
    a = [" ".join(rng.choices(r.split(), k=rng.randrange(1, 8))) for r in references]
    b = [text + " a" for text in a]
    drawn = scores.draws(60, 1000, seed=0)
    both = [scores.resample(scores.statistics(answers(side, references)), drawn)["rouge1"] for side in (a, b)]
    apart = [scores.interval(one) for one in both]
    paired = scores.difference(*both)
    assert paired["high"] - paired["low"] < 0.5 * sum(i["high"] - i["low"] for i in apart)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    assert scores.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert scores.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values):
    adjusted = scores.holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values)) and max(adjusted) <= 1
    assert all(
        x <= y
        for x, y in zip([adjusted[i] for i in np.argsort(p_values)], [adjusted[i] for i in np.argsort(p_values)][1:])
    )


@pytest.mark.parametrize(
    ("text", "label"),
    [("true", "true"), ("It is False.", "false"), ("Not true, so: false", "false"), ("untrue", None), ("", None)],
)
def test_a_label_is_the_last_whole_word_that_is_one(text, label):
    assert scores.parse_label(text, ["true", "false"]) == label


def test_label_scores_by_hand():
    found = answers(["yes", "no", "no", "perhaps"], ["yes", "yes", "no", "no"])
    turns = scores.per_turn(found, ["yes", "no"])
    tables = scores.by_conversation(turns, found.conversations)
    drawn = scores.draws(4, 100, seed=0)
    assert interval(tables, "accuracy", drawn)["value"] == pytest.approx(0.5)
    # yes: tp 1, fp 0, fn 1 -> 2/3; no: tp 1, fp 1, fn 1 -> 1/2
    assert interval(tables, "macro_f1", drawn)["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # a label that neither occurs nor is predicted does not count, in a resample too
    rare = [f"l{i}" for i in range(20)]
    perfect = scores.statistics(answers(rare, rare), [*rare, "never"])
    assert interval(perfect, "macro_f1", scores.draws(20, 200, seed=0)) == {"value": 1, "low": 1, "high": 1}
    assert scores.confusion(turns, ["yes", "no"]) == {
        "yes": {"yes": 1, "no": 1, "unparsable": 0},
        "no": {"yes": 0, "no": 1, "unparsable": 1},
    }


@pytest.mark.parametrize(
    ("text", "kind"),
    [("My lamp arrived broken!", "complaint"), ("Where is my order", "question"), ("Please cancel it.", "other")],
)
def test_requests_without_category_are_sorted_by_their_words(text, kind):
    assert scores.kind_of_request(text) == kind
