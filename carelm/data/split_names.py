"""Which split a name means: of a file, a folder, a key of a JSON object, a split of the Hub."""

import re
from collections.abc import Iterable

from carelm.errors import UserError
from carelm.recipe import Recipe

SPLITS = ("train", "validation", "test")
# As people write them; the first of each is the default of dataset_train_split and its like.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# train-1, train_part2, train-part-b, train-2024-05, train-00000-of-00002, train-00000-of-00001-b42a775f407cee45
_PART = (
    r"(?:(?:[-_. ]?(?:(?:part|shard|chunk)[-_. ]?(?:\d+|[a-z]{1,2})|\d+))+(?:[-_. ]of[-_. ]\d+)?(?:-[0-9a-f]{16})?)?"
)


class SplitNames:
    """The words that mean a split in this recipe: those that people use, or the one that the recipe names instead."""

    def __init__(self, recipe: Recipe):
        named = {split: getattr(recipe, f"dataset_{split}_split").casefold() for split in SPLITS}
        chosen = {name for split, name in named.items() if name != split}
        self.words = {
            split: [name] if name != split else [w for w in WORDS[split] if w == split or w not in chosen]
            for split, name in named.items()
        }
        self._known = sorted({*chosen, *(w for words in WORDS.values() for w in words)}, key=len, reverse=True)

    def word(self, name: str) -> str | None:
        """`train-00000-of-00002` -> "train", also where no split of this recipe takes it; None for `rows`."""
        return next((w for w in self._known if re.fullmatch(re.escape(w) + _PART, name.casefold())), None)

    def word_inside(self, name: str) -> tuple[str, str] | None:
        """`shop_val-1` -> ("val", "shop_*"): the one such word in a longer name, and the name without it."""
        found = [
            (word, re.sub(rf"(?<![^\W\d_]){re.escape(word)}{_PART}(?![^\W_])", "*", name.casefold()))
            for word in self._known
        ]
        found = [(word, rest) for word, rest in found if "*" in rest]
        return found[0] if len(found) == 1 else None

    def splits(self, word: str | None) -> list[str]:
        """The splits that take this word: mostly one, none where the recipe names another, two where it says so."""
        return [split for split in SPLITS if word in self.words[split]]

    def check(self, found: Iterable[tuple[str, str]], where: str) -> None:
        """Raises UserError where two words of one split are there at once; `found` holds (word, name as written)."""
        found = list(found)
        for split in SPLITS:
            names = {word: name for word, name in reversed(found) if word in self.words[split]}
            if len(names) > 1:
                other = next(word for word in names if word != split)
                raise UserError(
                    f"dataset_{split}_split: {' and '.join(sorted(names.values()))} in {where} mean {split}; keep one, or "
                    f"choose it, such as dataset_{split}_split: {other}"
                )
