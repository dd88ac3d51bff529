"""A number that neither the prompt nor the expected reply has is found, and one that they only write otherwise is not."""

import pytest

from carelm.evaluation.questions import Question
from carelm.evaluation.stated_numbers import count, unfounded


@pytest.mark.parametrize("answer, given", [
    ("It costs 1,299.00 euros", "1299"), ("Es kostet 1.299,00 Euro", "1,299"), ("29.5", "29.50"), ("12,50", "12.5 euros"),
    ("Call +1-800-555-0199", "Call 18005550199"), ("Call 0555 0142", "(0555) 0142"), ("on 05.03.2024", "March 5, 2024"),
    ("2024-03-05", "5/3/2024"), ("open from 9:00", "open from 9"), ("order HP19606", "HP-19606"), ("7 days", "07 days"),
    ("३ दिन", "3 दिन"), ("2-4 days", "4 days, or 2"), ("10 000 Ft", "10000"), ("14 days", "14"),
    ("It is $45", "It costs\n$45."), ("Call 0800 123 4567", "08001234567"), ("ID 12-345-678", "12345678"),
])  # fmt: skip
def test_numbers_are_compared_by_what_they_are_worth(answer, given):
    assert unfounded(answer, [given]) == []
    assert unfounded(answer, ["nothing"])


@pytest.mark.parametrize("answer", [
    "1. Open it.\n2. Click\n- 3) Save\n4", "Do this: 1. Open it. 2. Click it. 3. Save", "Then 6. Open it. 7. Save. 8.",
    "**1.** Open\n10. Close", "Step 2 is to pay", "We are here 24/7", "Order {{Order Number 1}} of [PHONE 2]",
    "Take vitamin B12", "COVID-19", "an mp3", "no number",
])  # fmt: skip
def test_what_counts_steps_or_stands_in_for_text_states_nothing(answer):
    assert unfounded(answer, [""]) == []


@pytest.mark.parametrize("answer, found", [
    ("It costs 15. We ship in 8 days.", ["15", "8"]), ("Call 0800 555 0199 now", ["0800 555 0199"]),
    ("31.00 not 29.50", ["31.00"]), ("on 6.3.2024", ["6.3.2024"]), ("HP-19607", ["19607"]),
    ("1. Pay 12 euros\n2. Wait", ["12"]), ("99 and 99", ["99"]),
])  # fmt: skip
def test_other_numbers_are_found_as_they_are_written(answer, found):
    assert unfounded(answer, ["29.50 euros, order HP-19606", "call 0800 555 0142, on 5.3.2024"]) == found


def test_digits_without_an_end_are_a_number_too():
    assert unfounded("1" * 5000, ["2" * 5000]) == ["1" * 5000] and unfounded("1" * 5000, ["01" + "1" * 4999]) == []


def test_the_whole_prompt_and_every_reference_count_as_given():
    turns = [{"role": "system", "content": "We open at 9"}, {"role": "user", "content": "Order 77"},
             {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"order": 5512}}]}]  # fmt: skip
    questions = [Question(f"q{i}", f"c{i}", "k", turns, ["It is 30 euros", "It is 40 euros"]) for i in range(30)]
    answer = "Order 77 of 5512 costs 30 or 40 euros, come at 9"
    assert count(questions, [answer] * 30) == {"answers": 0, "first": {}}
    found = count(questions, [answer + " and not at 8"] * 30)
    assert found["answers"] == 30 and len(found["first"]) == 20 and found["first"]["q0"] == ["8"]
