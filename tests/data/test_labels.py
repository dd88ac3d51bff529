"""A label is read where it stands as a word of its own, in any script, and nowhere else."""

import unicodedata

import pytest

from carelm.data.labels import parse_label

PRIORITY = ["urgent", "Not urgent", "can wait"]
STARS = ["1", "2", "3", "4", "5", "0"]


@pytest.mark.parametrize(
    "text",
    ["4", "4.", "**4**", "Stars: 4", "(4)", "4)", "{'stars': 4}", '{"stars":4}', "\\boxed{4}", "评分是4分。", "４",
     "No.4",
     "1, 2, 4", "4점입니다", "Stars: 4\n\n"],
)  # fmt: skip
def test_a_number_that_stands_alone_is_a_label(text):
    assert parse_label(text.replace("점", ""), STARS) == "4"


@pytest.mark.parametrize(
    "text",
    ["4.0", "4.5", "0.4", ".4", "14", "4,000", "4 000", "4\u202f000", "4'000", "4\u2019000", "-4", "\u22124", "+4",
     "3-4", "3\u20134",
     "4/10", "4 / 10", "4:30", "4%", "4 %", "$4", "€ 4", "4€", "4k", "4th", "v4", "4_1", "4万",
     "4 1/2", "4 ½", "4^2", "٤٫٥", "4.0.1", "A-4"],
)  # fmt: skip
def test_a_part_of_a_number_is_none(text):
    assert parse_label(text, ["4"]) is None and parse_label(text, [text]) == text


@pytest.mark.parametrize(
    "text",
    ["urgent", "URGENT!", "**urgent**", "_urgent_", "`urgent`", "Label: urgent.",
     "<b>Urgent</b>", '{"label": "urgent"}', "- urgent",
     "-urgent", "‘urgent’", "urgent, I think", "urg\u00adent", "这是urgent情况", "urgent입니다", "ｕｒｇｅｎｔ",
     "urgent\u2014now"],
)  # fmt: skip
def test_formatting_around_a_label_is_no_part_of_it(text):
    assert parse_label(text, PRIORITY) == "urgent"


@pytest.mark.parametrize(
    "text",
    ["urgently", "insurgent", "non-urgent", "non\u2011urgent", "non\u2013urgent", "urgent-looking", "urgent_case",
     "urgent@shop.example",
     "urgent's", "urgentem", "urgente\u0301", ""],
)  # fmt: skip
def test_a_part_of_a_longer_word_is_none(text):
    assert parse_label(text, PRIORITY) is None


@pytest.mark.parametrize(
    "text",
    ["Not urgent", "It is not\nurgent.", "not **urgent**", "**not** urgent", "not-urgent", "not_urgent", "NOT  URGENT"],
)
def test_the_longest_label_wins_however_its_words_are_joined(text):
    assert parse_label(text, PRIORITY) == "Not urgent"
    assert parse_label(text, ["urgent", "not_urgent"]) == "not_urgent"


@pytest.mark.parametrize(
    ("text", "label"),
    [("KRİTİK", "kritik"), ("kritik", "KRİTİK"), ("KRITIK", "kritik"), ("ISRARLI", "ısrarlı"), ("GROSS", "groß"),
     ("groß", "GROSS"),
     ("ΧΑΛΑΣΜΕΝΟΣ", "χαλασμένος"), ("χαλασμένος", "ΧΑΛΑΣΜΈΝΟΣ"), ("СРОЧНО", "срочно"),
     ("e\u0301leve\u0301e", "élevée"),
     ("Élevée", "e\u0301leve\u0301e"), ("ﬁne", "fine"), ("it’s fine", "it's fine")],
)  # fmt: skip
def test_case_and_the_form_of_letters_are_not_told_apart(text, label):
    assert parse_label(f"-> {text}.", ["xyz", label]) == label


def test_labels_that_differ_in_case_or_form_alone_are_told_apart():
    assert parse_label("a", ["A", "a"]) == "a" and parse_label("A", ["A", "a"]) == "A"
    assert parse_label("ilik", ["ılık", "ilik"]) == "ilik"
    assert parse_label("C++", ["C", "C++"]) == "C++" and parse_label("C.", ["C", "C++"]) == "C"


@pytest.mark.parametrize(
    ("text", "label"),
    [("这个订单很紧急，请处理。", "紧急"), ("緊急です。", "緊急"), ("เรื่องนี้ด่วนมาก", "ด่วน"),
     ("キャンセルです", "キャンセル"), ("答案是高。", "高"),
     ("对的", "对"), ("優先度：高", "高"), ("긴급입니다.", "긴급"), ("긴급 상황", "긴급"), ("عاجل.", "عاجل"),
     ("דחוף!", "דחוף"), ("तत्काल है।", "तत्काल"),
     ("សំណើនេះបន្ទាន់", "បន្ទាន់"), ("အရေးကြီးသည်", "အရေးကြီး"), ("អ្នក 1", "1"), ("१।", "१")],
)  # fmt: skip
def test_a_label_is_found_in_scripts_with_and_without_spaces(text, label):
    assert parse_label(text, ["xyz", label]) == label
    assert parse_label(unicodedata.normalize("NFD", text), ["xyz", label]) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("不紧急", "紧急"), ("非緊急です", "緊急"), ("ไม่ด่วน", "ด่วน"), ("キャンセルポリシー", "キャンセル"),
     ("高兴", "高"), ("对不起", "对"), ("不对", "对"),
     ("星期三", "三"), ("비긴급", "긴급"), ("긴급하지 않습니다", "긴급"), ("عاجلة", "عاجل"), ("العاجل", "عاجل"),
     ("הדחופה", "דחופה"), ("तत्काली", "तत्काल"),
     ("का", "क"), ("فوری\u200cها", "فوری"), ("१०", "१"), ("несрочно", "срочно")],
)  # fmt: skip
def test_a_longer_word_of_any_script_is_another_word(text, label):
    assert parse_label(text, ["xyz", label]) is None


def test_a_denied_label_of_a_script_without_spaces_may_be_a_label_itself():
    assert parse_label("这不紧急。", ["紧急", "不紧急"]) == "不紧急"
