"""Answers rated by hand, without seeing whose they are: the page that asks (rate.html), and the files that it saves.

The page knows an answer by a hash of its text. So nothing in it says which model stands on which side, and a rating counts as
long as both answers are still the same.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import jinja2

from carelm.errors import UserError
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import wilson_interval
from carelm.evaluation.verdicts import called, main_pair
from carelm.files import write_whole

MOST_PAIRS = 50
CHOICES = ("1", "2", "tie")
Lines = dict[str, list[dict[str, Any]]]


def load(folder: Path) -> list[dict[str, str]]:
    """The ratings in `folder`/ratings*.json, of one rater or several: `id` of the question, `first` and `second` (hashes of the
    answers as they were shown) and `chosen`, one of CHOICES. Of what a rater (a browser) saved more than once, the newest.

    Raises:
        UserError: for a file that is not what rate.html saves.
    """
    files = []
    for file in sorted(folder.glob("ratings*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rated = [{key: str(one[key]) for key in ("id", "first", "second", "chosen")} for one in found["ratings"]]
            files.append((float(found["saved"]), str(found["rater"]), rated))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} is not what rate.html saves, with its rater; move it out of the folder, write the page anew (--rate) "
                "and save it there"
            ) from None
        if any(one["chosen"] not in CHOICES for one in rated):
            raise UserError(f"{file}: chosen is none of {', '.join(CHOICES)}; save it in rate.html again")
    newest = {}
    for _, rater, rated in sorted(files, key=lambda file: file[0]):
        newest |= {(rater, one["id"], *sorted((one["first"], one["second"]))): one for one in rated}
    return list(newest.values())


def count(
    rated: list[dict[str, str]], models: dict[str, Any], questions: list[Question], lines: Lines
) -> dict[str, Any]:
    """How often each of the base and the tuned model was preferred, with a sentence; empty where nothing was rated.

    `share` is that of the tuned model among the ratings that prefer one, with Wilson's interval over their conversations.
    """
    first, tuned = main_pair(models)
    if not rated or tuned is None:
        return {}
    preferred, decided, asked = {first: 0, tuned: 0, "tie": 0}, set(), set()
    for i, chosen in choices(rated, first, tuned, questions, lines):
        preferred[chosen] += 1
        asked.add(questions[i].id)
        if chosen != "tie":
            decided.add(questions[i].conversation)
    number = sum(preferred.values())
    found: dict[str, Any] = {"models": [first, tuned], "preferred": preferred, "questions": len(asked),
                             "of_other_answers": len(rated) - number}  # fmt: skip
    names = called(models, first, tuned)
    said = (
        f"Rated by hand without seeing whose: the answer of {names[tuned]} was preferred in {preferred[tuned]} of {number} "
        f"ratings, that of {names[first]} in {preferred[first]}, neither in {preferred['tie']}"
    )
    if decided:
        found["share"] = share = wilson_interval(preferred[tuned] / (preferred[first] + preferred[tuned]), len(decided))
        said += " ({value:.0%} of those that chose; 95 % interval {low:.0%} to {high:.0%})".format(**share)
    if found["of_other_answers"]:
        said += f"; {found['of_other_answers']} more are of other answers than are there now, and do not count"
    return found | {"sentence": f"{said}."}


def choices(
    rated: list[dict[str, str]], first: str, tuned: str, questions: list[Question], lines: Lines
) -> list[tuple[int, str]]:
    """The place of the question and the model that was preferred, or "tie", of each rating whose two answers are there now."""
    shown = {
        q.id: (i, {_hash(lines[name][i]["prediction"]): name for name in (first, tuned)})
        for i, q in enumerate(questions)
    }
    found = []
    for one in rated:
        i, whose = shown.get(one["id"], (0, {}))
        if len(whose) == 2 and {one["first"], one["second"]} == whose.keys():
            found.append((i, {"1": whose[one["first"]], "2": whose[one["second"]], "tie": "tie"}[one["chosen"]]))
    return found


def write_page(
    folder: Path, title: str, models: dict[str, Any], questions: list[Question], lines: Lines, seed: int
) -> tuple[Path | None, int]:
    """Writes rate.html, which asks about up to MOST_PAIRS drawn questions that got different answers, with the sides drawn for
    each; returns it with their number. Where the base and the tuned model give the same answers there is no page.
    """
    first, tuned = main_pair(models)
    unlike = [i for i in range(len(questions)) if len({lines[name][i]["prediction"] for name in (first, tuned)}) > 1]
    if not unlike:
        return None, 0
    drawn, pairs = random.Random(seed), []
    for i in drawn.sample(unlike, min(MOST_PAIRS, len(unlike))):
        texts = [lines[name][i]["prediction"] for name in (first, tuned)]
        drawn.shuffle(texts)
        turns = questions[i].own_turns()
        last = max((k for k, m in enumerate(turns) if m["role"] == "user"), default=0)
        pairs.append({
            "id": questions[i].id, "question": questions[i].last_words(), "expected": questions[i].references,
            "earlier": [{"role": m["role"], "text": m.get("content") or ""} for m in turns[:last]],
            "first": _hash(texts[0]), "second": _hash(texts[1]), "texts": texts,
        })  # fmt: skip
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = template.get_template("rate.html.j2").render(
        title=title, pairs=pairs, folder=str(folder), key=_hash(str([p["first"] for p in pairs]))
    )
    write_whole(folder / "rate.html", page)
    return folder / "rate.html", len(pairs)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
