"""Scripts without spaces between words, as ranges of a `regex` set."""

KANA = r"\p{Hiragana}\p{Katakana}\u30fc"  # U+30FC prolongs a vowel in both Japanese syllabaries
BY_LETTER = rf"{KANA}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}\p{{Tibetan}}"
NO_SPACES = rf"\p{{Han}}{BY_LETTER}"
