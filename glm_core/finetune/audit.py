"""What is in the training data, in numbers, and what in it will spoil the training or its measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..tables.options import excerpt, listed, plural
from .encoding import EncodedRows
from .examples import KEPT_LINES, Example, Problem, Severity, labels_of
from .split import normalised, question_keys, text_hash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SHOWN = 20  # conflicts and overlaps listed
LONGEST_SHOWN = 5
BINS = 20
CUT_SHARE = 0.01  # rows that may be cut before it is worth a warning
IMBALANCE = 9  # times as many rows in the largest class as in the smallest
SMALL_CLASS = 10  # rows


@dataclass(frozen=True)
class Lengths:
    """Tokens that rows need, counted as the limits are, and what the limit cuts.

    fitting     the smallest limit that cuts fewer than 1 % of the rows
    histogram   (from, to, rows), both ends included
    """

    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    longest: int
    limit: int
    truncated: int
    share: float
    fitting: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Places:
    """Some rows: how many, and the lines of the first of them."""

    count: int = 0
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conflict:
    """A question with different responses: the start of its text, and (response, rows, first lines) of each."""

    text: str
    responses: tuple[tuple[str, int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Audit:
    """The findings on a data set.

    copies         rows equal to an earlier one
    near_copies    rows that differ from an earlier one in width, case or spaces only
    conflicts      questions asked several times with different responses; at most 20 of `conflicting`
    overlap        rows of dev whose question is in train; `overlap_lines` are (dev, train) of the first of them
    classes        (response, rows in train, rows in dev), the commonest first; empty where responses are no classes
    longest        (line, tokens of the prompt, of the response) of the longest rows
    """

    rows: int
    dev_rows: int
    source: Lengths | None
    target: Lengths | None
    dev_source: Lengths | None
    dev_target: Lengths | None
    copies: Places
    near_copies: Places
    conflicting: int
    conflicts: tuple[Conflict, ...]
    overlap: Places
    overlap_lines: tuple[tuple[int, int], ...]
    classes: tuple[tuple[str, int, int], ...]
    no_prompt: Places
    no_response: Places
    longest: tuple[tuple[int, int, int], ...]
    findings: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Audit:
        """The audit that `to_json` gave, also after a way through JSON."""
        values = {name: _tuples(value) for name, value in data.items() if name in cls.__dataclass_fields__}
        for name in ("source", "target", "dev_source", "dev_target"):
            values[name] = Lengths(**values[name]) if values[name] else None
        for name in ("copies", "near_copies", "overlap", "no_prompt", "no_response"):
            values[name] = Places(**values[name])
        values["conflicts"] = tuple(Conflict(**one) for one in values["conflicts"])
        values["findings"] = tuple(Problem(**one) for one in values["findings"])
        return cls(**values)


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tuples(one) for one in value)
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return value


def audit(
    train: Sequence[Example],
    dev: Sequence[Example] | None = None,
    encoded: EncodedRows | None = None,
    encoded_dev: EncodedRows | None = None,
) -> Audit:
    """Look at all rows before a training.

    encoded, encoded_dev   the same rows encoded; without them nothing is said about lengths
    """
    import numpy as np

    dev = dev or ()
    findings: list[Problem] = []
    for rows, what in ((encoded, train), (encoded_dev, dev)):
        if rows is not None and len(rows) != len(what):
            raise ValueError(f"{len(rows)} encoded rows for {len(what)} examples")

    no_prompt = _where(train, [not one.prompt.strip() for one in train])
    no_response = _where(train, [not one.response.strip() for one in train])
    for places, lacking in ((no_prompt, "prompt"), (no_response, "response")):
        _find(
            findings, "stop", places, f"Without a {lacking}: {{rows}} ({{where}}).", "Fill them in, or leave such rows out."
        )  # fmt: skip

    source = _lengths(encoded.source_needed, encoded.limits.max_source) if encoded else None
    target = _lengths(encoded.target_needed, encoded.limits.max_target) if encoded else None
    dev_source = _lengths(encoded_dev.source_needed, encoded_dev.limits.max_source) if encoded_dev else None
    dev_target = _lengths(encoded_dev.target_needed, encoded_dev.limits.max_target) if encoded_dev else None
    findings += _cut(source, len(train), "prompt") + _cut(target, len(train), "response")

    questions = question_keys(train)
    exact = np.fromiter(
        (hash((one.prompt, one.response, one.history)) for one in train), dtype=np.int64, count=len(train)
    )
    answers = np.fromiter(
        (text_hash(normalised(one.response)) for one in train), dtype=np.uint64, count=len(train)
    )
    is_copy = _again(exact)
    is_near = _again(questions * np.uint64(0x9E3779B97F4A7C15) ^ answers) & ~is_copy
    copies, near_copies = _where(train, is_copy), _where(train, is_near)
    keep = "Remove them, or split by this program, which keeps copies on one side."
    for places, sentence in (
        (copies, "Exact copies of earlier rows: {rows} ({where})."),
        (near_copies, "Copies of earlier rows but for width, case or spaces: {rows} ({where})."),
    ):
        _find(findings, "warn" if places.count >= CUT_SHARE * len(train) else "note", places, sentence, keep)

    counts = labels_of([one.response for one in train])
    conflicting, conflicts = _conflicts(train, questions, answers)
    if conflicting:
        lines = tuple(line for one in conflicts for response in one.responses for line in response[2])
        findings.append(
            Problem(
                "warn" if counts else "note",
                f"{plural(conflicting, 'question')} with different responses, such as {conflicts[0].text!r}"
                f" (line {listed(sorted(line for one in conflicts[0].responses for line in one[2]))}).",
                "Decide on one class for each; whichever is wrong is learned too." if counts
                else "Keep them if several answers are right.",
                lines[:KEPT_LINES],
                conflicting,
            )
        )  # fmt: skip

    overlap, overlap_lines = Places(), tuple[tuple[int, int], ...]()
    if dev:
        dev_questions = question_keys(dev)
        found = np.isin(dev_questions, questions)
        overlap = _where(dev, found)
        overlap_lines = tuple(
            (_line(dev, i), _line(train, int(np.argmax(questions == dev_questions[i]))))
            for i in np.flatnonzero(found)[:SHOWN].tolist()
        )
        share = overlap.count / len(dev)
        _find(
            findings, "warn", overlap,
            f"Asked in train as well: {{rows}} of dev ({share:.1%}; {{where}}); the scores on dev will be better than"
            " they are.",
            "Split again by this program, or remove them from one of the two.",
        )  # fmt: skip

    classes = _classes(train, dev, findings)
    return Audit(
        rows=len(train), dev_rows=len(dev), source=source, target=target, dev_source=dev_source,
        dev_target=dev_target, copies=copies, near_copies=near_copies, conflicting=conflicting, conflicts=conflicts,
        overlap=overlap, overlap_lines=overlap_lines, classes=classes, no_prompt=no_prompt, no_response=no_response,
        longest=_longest(train, encoded), findings=_by_weight(findings),
    )  # fmt: skip


def _by_weight(findings: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(findings, key=lambda one: ("stop", "warn", "note").index(one.severity)))


def _line(examples: Sequence[Example], i: int) -> int:
    return examples[i].line or i + 1


def _where(examples: Sequence[Example], chosen: Any) -> Places:
    import numpy as np

    rows = np.flatnonzero(chosen)
    return Places(len(rows), tuple(_line(examples, i) for i in rows[:KEPT_LINES].tolist()))


def _find(findings: list[Problem], severity: Severity, places: Places, sentence: str, todo: str) -> None:
    if places.count:
        message = sentence.replace("{rows}", plural(places.count, "row"))
        message = message.replace("{where}", f"line {listed(places.lines, places.count)}")
        findings.append(Problem(severity, message, todo, places.lines, places.count))


def _again(keys: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether an earlier row has the same key."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    found = np.zeros(len(keys), dtype=np.bool_)
    found[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return found


def _lengths(needed: npt.NDArray[np.int32], limit: int) -> Lengths | None:
    import numpy as np

    n = len(needed)
    if not n:
        return None
    ordered = np.sort(needed)
    p50, p90, p95, p99 = (int(ordered[-(-n * percent // 100) - 1]) for percent in (50, 90, 95, 99))
    may_be_cut = -(-n // round(1 / CUT_SHARE)) - 1  # the most rows that are fewer than 1 %
    longest = int(ordered[-1])
    width = max(1, -(-longest // BINS))
    counts = np.bincount((ordered - 1).clip(0) // width)
    truncated = int((ordered > limit).sum())
    return Lengths(
        mean=float(ordered.mean()), p50=p50, p90=p90, p95=p95, p99=p99, longest=longest, limit=limit,
        truncated=truncated, share=truncated / n, fitting=int(ordered[n - 1 - may_be_cut]),
        histogram=tuple((i * width + 1, (i + 1) * width, int(count)) for i, count in enumerate(counts)),
    )  # fmt: skip


def _cut(lengths: Lengths | None, rows: int, what: str) -> list[Problem]:
    if lengths is None or not lengths.truncated:
        return []
    lost = "what is cut is never seen" if what == "prompt" else "their end is never learned"
    return [
        Problem(
            "warn" if lengths.share >= CUT_SHARE else "note",
            f"The limit of {lengths.limit:,} tokens cuts {lengths.truncated:,} of {plural(rows, what)}"
            f" ({lengths.share:.1%}): {lost}.",
            f"A limit of {lengths.fitting:,} cuts fewer than 1 %, one of {lengths.longest:,} none.",
            count=lengths.truncated,
        )
    ]


def _conflicts(
    examples: Sequence[Example], questions: npt.NDArray[np.uint64], answers: npt.NDArray[np.uint64]
) -> tuple[int, tuple[Conflict, ...]]:
    """How many questions have different responses, and the ones with most rows."""
    import numpy as np

    if not len(examples):
        return 0, ()
    order = np.argsort(questions, kind="stable")
    begins = np.flatnonzero(np.r_[True, questions[order[1:]] != questions[order[:-1]]])
    sorted_answers = answers[order]
    differ = np.flatnonzero(
        np.minimum.reduceat(sorted_answers, begins) != np.maximum.reduceat(sorted_answers, begins)
    )
    ends = np.r_[begins[1:], len(order)]
    largest = sorted(differ.tolist(), key=lambda g: (int(begins[g] - ends[g]), int(order[begins[g]])))[:SHOWN]
    shown = []
    for group in largest:
        rows = order[begins[group] : ends[group]].tolist()
        by_answer: dict[int, list[int]] = {}
        for i in rows:
            by_answer.setdefault(int(answers[i]), []).append(i)
        responses = tuple(
            (excerpt(examples[of[0]].response), len(of), tuple(_line(examples, i) for i in of[:5]))
            for of in sorted(by_answer.values(), key=lambda of: -len(of))[:SHOWN]
        )
        shown.append(Conflict(excerpt(examples[rows[0]].prompt), responses))
    return len(differ), tuple(shown)


def _classes(
    train: Sequence[Example], dev: Sequence[Example], findings: list[Problem]
) -> tuple[tuple[str, int, int], ...]:
    counts = labels_of([one.response for one in train])
    if counts is None:
        return ()
    in_dev = dict.fromkeys(counts, 0)
    unknown: dict[str, int] = {}
    for one in dev:
        if one.response in in_dev:
            in_dev[one.response] += 1
        else:
            unknown[one.response] = unknown.get(one.response, 0) + 1
    ordered = counts.most_common()
    (most, largest), (least, smallest) = ordered[0], ordered[-1]
    if len(ordered) == 1:
        findings.append(
            Problem(
                "stop",
                f"All {largest:,} responses are {excerpt(most)!r}: with one class there is nothing to learn.",
                "Add rows of the other classes, or choose another response column.",
            )
        )
    elif largest >= IMBALANCE * smallest:
        findings.append(
            Problem(
                "warn",
                f"The class {excerpt(most)!r} has {largest:,} rows, the class {excerpt(least)!r} {smallest:,}: a model"
                " that always answers the first looks good by accuracy.",
                "Add rows of the rare class, and look at the score of each class.",
            )
        )
    few = [label for label, count in ordered if count < SMALL_CLASS]
    if few and len(ordered) > 1:
        findings.append(
            Problem(
                "warn",
                f"Fewer than {SMALL_CLASS} rows in train: {_quoted(few)}.",
                "Add rows of these classes, or join them with others.",
                count=len(few),
            )
        )
    if dev:
        unseen = [label for label, count in ordered if not in_dev[label]]
        if unseen and len(ordered) > 1:
            findings.append(
                Problem(
                    "warn",
                    f"Not in dev, so never measured: {_quoted(unseen)}.",
                    "Split again by this program, which splits each class by itself.",
                    count=len(unseen),
                )
            )
        if unknown:
            findings.append(
                Problem(
                    "warn",
                    f"In dev, but not in train: {_quoted(list(unknown))} ({plural(sum(unknown.values()), 'row')}).",
                    "Add rows of these classes to train, or check how they are written.",
                    count=sum(unknown.values()),
                )
            )
    return tuple((label, count, in_dev[label]) for label, count in ordered)


def _quoted(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(excerpt(label, 30)) for label in labels[:10])
    return f"{shown} and {len(labels) - 10} more" if len(labels) > 10 else shown


def _longest(examples: Sequence[Example], encoded: EncodedRows | None) -> tuple[tuple[int, int, int], ...]:
    import numpy as np

    if encoded is None or not len(encoded):
        return ()
    source, target = encoded.source_needed, encoded.target_needed
    first = np.lexsort((np.arange(len(source)), -(source + target)))[:LONGEST_SHOWN]
    return tuple((_line(examples, i), int(source[i]), int(target[i])) for i in first.tolist())
