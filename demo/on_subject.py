"""What share of a model's answers is on the subject: python demo/on_subject.py outputs/demo/eval/predictions-adapter.jsonl

The subject of an answer is the intent with the most like answer in make_data.py (F1 of words, without the slots). Counted are
the first questions of the test split whose own reference gets its intent back by that rule, apart for those asked in phrasings
of the train split and in the held-out ones. ROUGE cannot tell this: answers of different intents share most of their words.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import make_data

SLOTS = re.compile(r"\{[^}]*\}|HP-\d+|[\d.]+|[(|)]")


def words(text: str) -> Counter:
    """The words of a phrase or an answer, without what is filled in."""
    return Counter(re.findall(r"[a-z']+", SLOTS.sub(" ", text.lower())))


def likeness(a: Counter, b: Counter) -> float:
    """F1 of two bags of words."""
    return 2 * (a & b).total() / max(1, a.total() + b.total())


ANSWERS = [(intent.name, words(answer)) for intent in make_data.INTENTS for answer in intent.answers]
QUESTIONS = {intent.name: ([words(q) for q in intent.questions], [words(q) for q in intent.held_out])
             for intent in make_data.INTENTS}  # fmt: skip


def subject(answer: str) -> str:
    """The intent that an answer belongs to; up to two sentences at its start may be courtesy."""
    sentences = re.split(r"(?<=[.!?]) ", answer)
    tails = [words(" ".join(sentences[k:])) for k in range(min(3, len(sentences)))]
    return max((likeness(tail, known), name) for tail in tails for name, known in ANSWERS)[1]


def main() -> None:
    test = (Path(__file__).parent / "data/test.jsonl").read_text(encoding="utf-8")
    rows = {row["id"]: row for row in map(json.loads, test.strip().split("\n"))}
    right: dict[str, list[bool]] = {"known phrasing": [], "held-out phrasing": []}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").strip().split("\n"):
        made = json.loads(line)
        row = rows[made["conversation"]]
        first, reference = (message["content"] for message in row["messages"][:2])
        if made["question"] != first or subject(reference) != row["intent"]:
            continue
        known, held_out = (max(likeness(words(first), q) for q in side) for side in QUESTIONS[row["intent"]])
        right["held-out phrasing" if held_out > known else "known phrasing"].append(
            subject(made["prediction"]) == row["intent"]
        )
    right["all"] = [x for side in right.values() for x in side]
    print(
        json.dumps(
            {name: {"questions": len(of), "on_subject": round(sum(of) / len(of), 3)} for name, of in right.items()}
        )
    )


if __name__ == "__main__":
    main()
