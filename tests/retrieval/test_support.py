"""An answer's sentences are held against the passages that they name, by their words."""

import pytest

from carelm.retrieval.support import Supporting, claims, content_words, sentences, with_marks

RETURNS = "Returns\nUnused goods can come back within 30 days. The label is free."
LAMP = "Catalogue, Lantern storm lamp\nThe storm lamp costs 34.50 euros. It is made of brass."


def test_words_without_content_do_not_count_and_a_plural_is_its_singular():
    assert content_words("The lamps cost 34.50 euros, and you’ll find them on shelves [1].") == {
        "lamp", "cost", "34.50", "euro", "you'll", "find", "shelve",
    }  # fmt: skip
    assert content_words("It is what it was.") == set()


def test_a_mark_behind_the_full_stop_belongs_to_the_sentence_before_it():
    assert sentences("Yes, within 30 days. [1] It costs 34.50 euros [2]! Bye\nNow") == [
        "Yes, within 30 days [1].", "It costs 34.50 euros [2]!", "Bye", "Now",
    ]  # fmt: skip
    assert with_marks("It is free.", [1, 2]) == "It is free [1][2]." and with_marks("Free", [3]) == "Free [3]"


@pytest.mark.parametrize(
    "answer, share",
    [
        ("Unused goods come back within 30 days [1].", 1.0),  # come, back, within: unused good 30 day come
        ("Unused goods come back within 30 days [2].", 0.0),
        ("The brass lamp has a free label [1][2].", 1.0),
        ("The golden lamp flies to distant cities [2].", 0.2),
        ("Unused goods come back.", 0.0),
        ("Unused goods come back [7].", 0.0),
        ("So it is [1].", None),
    ],
)
def test_support_is_the_share_of_content_words_in_the_passages_named(answer, share):
    (claim,) = claims(answer, [RETURNS, LAMP])
    assert claim.share == share
    assert claim.is_supported == (share is not None and share >= 0.5)


def test_of_many_passages_those_that_hold_half_of_a_sentence_are_found_best_first():
    supporting = Supporting([RETURNS, LAMP, "The storm lamp is free.", "Hello"])
    assert supporting.find("The storm lamp costs 34.50 euros.") == {1: 1.0}
    assert supporting.find("The storm lamp is free of charge.") == {2: 0.75, 1: 0.5}
    assert supporting.find("And so it is.") == {}
