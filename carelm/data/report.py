"""What became of a split's rows."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SplitReport:
    """What became of a split's rows; lengths in tokens."""

    files: dict[str, int] = field(default_factory=dict)  # rows of each, before row_filter
    notes: list[str] = field(default_factory=list)
    order_doubt: str = ""  # why the order of a file of messages may not be that of the conversations
    unused: dict[str, int] = field(default_factory=dict)  # columns, and keys of messages, with the rows that have them
    personal_data: dict[str, Any] = field(default_factory=dict)  # see PersonalCount.describe
    unit: str = "row"  # what counts as one: "conversation" where a row of the files is one message
    rows: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)  # where the first of each stands
    fitted: dict[str, int] = field(default_factory=dict)
    first_in_other_split: list[str] = field(default_factory=list)
    near_duplicates: int = 0  # of questions of validation and test
    first_near_duplicates: list[str] = field(default_factory=list)
    length_p50: int = 0
    length_p95: int = 0
    length_max: int = 0
    truncated_share: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    labels: dict[str, Any] = field(default_factory=dict)  # see count_labels
    label_notes: list[str] = field(default_factory=list)  # in that of train, on all splits
    share: float | None = None  # of all training examples, where also_train adds some
    share_of_trained_tokens: float | None = None


def list_counts(counts: dict[str, int], first: dict[str, str] | None = None) -> str:
    """`2 duplicate (first: rows.csv:3), 1 too long`: the counts, with where the first of each stands."""
    where = {what: f" (first: {source})" for what, source in (first or {}).items()}
    return ", ".join(f"{number} {what}{where.get(what, '')}" for what, number in counts.items()) or "none dropped"


def number_of(number: int, unit: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def shortened(names: list[str], number: int = 8) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


LEGEND = (
    "median, 95 %, longest: tokens of a row (95 % of the rows are no longer); cut: rows that lost text to max_length; trained "
    "tokens: of the answers, which carry loss"
)


def format_report(report: dict[str, dict[str, Any]]) -> str:
    """The data report as a small table for the terminal."""
    head = f"{'split':<11}{'rows':>7}{'used':>7}{'median':>8}{'95 %':>6}{'longest':>9}{'cut':>8}{'trained tokens':>16}  dropped"
    lines = [head]
    for split, r in report.items():
        tokens = (
            f"{r['length_p50']:>8}{r['length_p95']:>6}{r['length_max']:>9}{r['truncated_share']:>8.1%}{r['trained_tokens']:>16}"
            if r["tokens"]
            else " " * 47
        )
        lines.append(
            f"{split:<11}{r['rows']:>7}{r['used']:>7}{tokens}  {list_counts(r['dropped'], r['first_dropped'])}"
        )
        if r["share"] is not None:
            shares = f"{r['share']:.1%} of the examples, {r['share_of_trained_tokens']:.1%} of the trained tokens"
            lines.append(f"{'':<11}{shares}")
        if r["files"]:
            files = [f"{name} ({number_of(rows, 'row')})" for name, rows in r["files"].items()]
            lines.append(f"{'':<11}from {shortened(files)}")
        lines += [f"{'':<11}{note}" for note in r["notes"]]
        personal = r["personal_data"]
        lines += [f"{'':<11}{personal[key]}" for key in ("sentence", "unjudged") if personal.get(key)]
        if r["unused"]:
            unused = [f"{what} (in {number_of(number, r['unit'])})" for what, number in r["unused"].items()]
            lines.append(f"{'':<11}not used: {shortened(unused)}")
        if r["fitted"]:
            fitted = "; ".join(f"{what}: {number_of(number, r['unit'])}" for what, number in r["fitted"].items())
            lines.append(f"{'':<11}of the {r['used']} used: {fitted}")
        if r["first_in_other_split"]:
            lines.append(
                f"{'':<11}the first that are also in validation or test: {'; '.join(r['first_in_other_split'])}"
            )
        if r["near_duplicates"]:
            what = f"{r['near_duplicates']} {'question is' if r['near_duplicates'] == 1 else 'questions are'}"
            gone = "near-duplicates of validation or test" in r["dropped"]
            then = (
                "taken out" if gone else "still trained on, which may flatter the scores (drop_near_duplicates: true)"
            )
            lines.append(f"{'':<11}{what} nearly one of validation or test, {then}:")
            lines += [f"{'':<13}{pair}" for pair in r["first_near_duplicates"]]
    lines.append(LEGEND)
    if any(r["unit"] == "conversation" for r in report.values()):
        lines.append(
            "rows and used: conversations; a row of the files is a message, and a conversation is named by its first"
        )
    lines += [f"{'labels':<11}{note}" for r in report.values() for note in r["label_notes"]]
    return "\n".join(lines)
