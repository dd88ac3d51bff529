"""Scores read the script of the references, or say that they do not."""

import unicodedata

import pytest

from carelm.evaluation import results, scores, scripts
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe

TEXTS = {
    "zh": "包裹会在两天之内送到您家。",
    "ja": "お荷物は明日の朝に届きます。",
    "th": "พัสดุจะมาถึงพรุ่งนี้เช้าค่ะ",
    "km": "កញ្ចប់នឹងមកដល់ថ្ងៃស្អែកព្រឹក។",
    "my": "ပါဆယ်ထုပ်မနက်ဖြန်ရောက်ပါမည်။",
    "ko": "소포는 내일 아침 일찍 도착합니다.",
    "ru": "Посылка придёт завтра утром, не позже.",
    "hi": "पार्सल कल सुबह तक पहुँच जाएगा।",
    "ar": "سيصل الطرد غدا في الصباح الباكر.",
    "fr": "Le colis arrivera à la maison demain matin.",
    "en": "The parcel will be there by tomorrow morning.",
}


def answers(predictions, references):
    return scores.Answers([str(i) for i in range(len(predictions))], predictions, [[r] for r in references])


def value(found, name):
    table = scores.statistics(found)[name]
    return float(table.score(table.table.sum(0)))


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("zh", "zh"), ("ja", "char"), ("th", "char"), ("km", "char"), ("my", "char"), ("ko", "intl"), ("ru", "intl"),
     ("hi", "intl"),
     ("ar", "intl"), ("fr", "13a"), ("en", "13a")],
)  # fmt: skip
def test_bleu_reads_every_script_and_its_signature_says_how(language, tokenizer):
    same = answers([TEXTS[language]] * 3, [TEXTS[language]] * 3)
    assert value(same, "bleu") == pytest.approx(100)
    assert f"|tok:{tokenizer}|" in scores.signatures(same)["bleu"]
    half = TEXTS[language][: len(TEXTS[language]) * 2 // 3]
    assert 5 < value(answers([half] * 3, [TEXTS[language]] * 3), "bleu") < 95


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_both_sides_are_compared_in_one_form_with_one_kind_of_line_end(form):
    said = unicodedata.normalize(form, "Müller wünscht\r\neine Rückgabe für fünf Äpfel.")
    found = answers([said], ["Müller wünscht\neine Rückgabe für fünf Äpfel."])
    assert value(found, "exact_match") == value(found, "rougeLsum") == 1
    assert value(found, "bleu") == pytest.approx(100) and value(found, "chrf") == pytest.approx(100)


def compare(texts, *keys, **of_model):
    """What is said of two models, of which the first says nothing and the second what is right."""
    recipe = load_recipe(["--num_resamples", "100", *keys], usage="")
    questions = [Question(str(i), str(i), "a" if i % 2 else "b", [], [text]) for i, text in enumerate(texts)]
    lines = {
        name: [
            {"prediction": text if name == "adapter" else "no", "finish_reason": "stop", "new_tokens": 1}
            for text in texts
        ]
        for name in ("base", "adapter")
    }
    about = {"conditions": {}, "precision": "fp32", "bits": None, "unused_generation_config": {}, **of_model}
    return results.make_results(recipe, questions, lines, dict.fromkeys(lines, about))


def test_a_shown_score_that_cannot_read_the_script_is_never_without_a_caution():
    mixed = [TEXTS["en"]] * 15 + [TEXTS["ru"]] * 5  # 15 * 37 and 5 * 31 letters
    for metric in ("rougeL", "chrf", "exact_match"):
        (caution,) = compare(mixed, "--primary_metric", metric)["cautions"]
        assert caution.startswith("ROUGE") and "22% of the references' letters" in caution
        assert ("set primary_metric: chrf" in caution) == (metric == "rougeL")
    assert compare([TEXTS["en"]] * 12)["cautions"] == []
    few_thai = [TEXTS["en"]] * 30 + [TEXTS["th"]]
    rouge, bleu = compare(few_thai, "--primary_metric", "bleu")["cautions"]
    assert (
        "chrF reads them" in rouge and "BLEU's tokenizer (13a)" in bleu and "2% of" in bleu and "primary_metric" in bleu
    )


def test_a_comparison_has_one_tokenizer_for_all_models_and_categories():
    found = compare([TEXTS["en"], TEXTS["zh"]] * 10)
    assert "|tok:zh|" in found["signatures"]["bleu"]
    for category in found["models"]["adapter"]["categories"].values():
        assert category["bleu"]["value"] == pytest.approx(100)


def test_examples_of_a_script_that_rouge_cannot_read_are_chosen_by_chrf():
    found = compare([TEXTS["zh"]] * 12)
    assert found["pairs"][0]["changed_by"] == "chrf" and len(found["pairs"][0]["better"]) == 3
    assert compare([TEXTS["fr"]] * 12)["pairs"][0]["changed_by"] == "rougeL"


def test_settings_of_a_base_that_have_no_effect_are_named():
    unused = {"do_sample": True, "temperature": 0.6, "num_beams": 4, "repetition_penalty": 1.1}
    (caution,) = compare([TEXTS["en"]] * 12, unused_generation_config=unused)["cautions"]
    assert (
        "num_beams, repetition_penalty of the generation config of base, adapter" in caution
        and "temperature" not in caution
    )


def test_the_share_of_a_script_counts_letters_marks_and_digits_alone():
    assert scripts.share(["ab 12 ?! क्षि"], scripts.ROUGE_READS) == pytest.approx(4 / 8)
    assert scripts.share([""], scripts.ROUGE_READS) == 0
