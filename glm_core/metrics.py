"""Scores of generated texts and of labels: each one a pure function whose exact formula is in `FORMULAS`.

The scores of texts come from the evaluation of the released ChatGLM fine-tuning scripts: ROUGE as in rouge_chinese
1.0.3 over jieba words, BLEU-4 as in nltk over characters. Both are computed here, because rouge_chinese fills a
table of every pair of words (5.4 s and 512 MB for two texts of 2,000 words) and stops at an empty prediction.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import GLMError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]  # (rows scored, rows)

REFERENCE = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
CHARACTER_ROUGE = ("char-rouge-1", "char-rouge-2", "char-rouge-l")
OF_ROWS = (
    *REFERENCE,
    *CHARACTER_ROUGE,
    "exact-match",
)  # every row has a score; the score of a file is their mean
OF_FILES = ("corpus-bleu", "chrf", "length-ratio", "distinct-1", "distinct-2")
SHOWN = 20  # different answers outside the labels that are kept with their counts
BINS = 15
# How far the probabilities of a row may be from 1 in sum; more is no rounding.
SUM = 1e-3

# Name -> what exactly is computed, shown beside the number.
FORMULAS: Mapping[str, str] = {
    "rouge-1": "100 x F1 of the sets of different words (jieba) in prediction and reference, F1 = 2pr / (p + r + 1e-8), as in rouge_chinese 1.0.3; rounded to 4 decimals per row, then the mean of the rows.",
    "rouge-2": "100 x F1 of the sets of different pairs of neighbouring words (jieba), F1 = 2pr / (p + r + 1e-8), as in rouge_chinese 1.0.3; a text of one word scores 0; rounded to 4 decimals per row, then the mean of the rows.",
    "rouge-l": "100 x F1 of the longest common subsequence over all words (jieba), repeated words counted, F1 = 2pr / (p + r + 1e-8), as in rouge_chinese 1.0.3; rounded to 4 decimals per row, then the mean of the rows.",
    "bleu-4": "100 x sentence BLEU of 1 to 4 characters with equal weights, brevity penalty and smoothing method 3 (the k-th precision without a match counts 1 / 2^k of a match), as in nltk; rounded to 4 decimals per row, then the mean of the rows.",
    "char-rouge-1": "100 x F1 of single characters without white space, each counted as often as it is in both texts; the mean of the rows.",
    "char-rouge-2": "100 x F1 of pairs of neighbouring characters without white space, each counted as often as it is in both texts; the mean of the rows.",
    "char-rouge-l": "100 x F1 of the longest common subsequence of characters without white space; the mean of the rows.",
    "exact-match": "100 x share of rows whose prediction equals the reference, white space at both ends left out.",
    "corpus-bleu": "BLEU-4 of sacrebleu with its zh tokenizer: matches and lengths are added up over all rows before the precisions are formed, smoothing exp.",
    "chrf": "chrF2 of sacrebleu: F2 of 1 to 6 characters without white space, counted over all rows.",
    "length-ratio": "Characters of all predictions / characters of all references.",
    "distinct-1": "Different words (jieba) / words in all predictions together.",
    "distinct-2": "Different pairs of neighbouring words (jieba) / pairs in all predictions together; no pair spans two rows.",
    "accuracy": "Share of rows whose answer is the correct label; an answer outside the labels is wrong.",
    "precision": "Of the rows given this label, the share that have it; undefined if no row was given it.",
    "recall": "Of the rows that have this label, the share given it; undefined if no row has it.",
    "f1": "2TP / (2TP + FP + FN) of one label; undefined if no row has it or was given it.",
    "macro-precision": "Mean precision of the labels that some row has or was given; a label never given counts 0.",
    "macro-recall": "Mean recall of the labels that some row has or was given; a label no row has counts 0.",
    "macro-f1": "Mean F1 of the labels that some row has or was given, each with the same weight.",
    "weighted-precision": "Mean precision of the labels, weighted by the rows that have each; a label never given counts 0.",
    "weighted-recall": "Mean recall of the labels, weighted by the rows that have each: the accuracy.",
    "weighted-f1": "Mean F1 of the labels, weighted by the rows that have each.",
    "mcc": "Matthews correlation of answer and correct label, for any number of labels (Gorodkin 2004), from -1 to 1; answers outside the labels are one more kind of answer.",
    "balanced-accuracy": "Mean recall of the labels that some row has.",
    "roc-auc": "Chance that a row with the label has a higher probability of it than a row without, equal ones counted half; over several labels, the mean of one against the rest.",
    "pr-auc": "Average precision: sum over the thresholds of (gain in recall) x precision; over several labels, the mean of one against the rest.",
    "ece": "Expected calibration error: mean |accuracy - confidence| over 15 bins of equal width of the highest probability, weighted by their rows.",
    "ece-equal-mass": "Expected calibration error over 15 bins with equally many rows each; rows of equal confidence stay together.",
    "brier": "Two labels: mean (p - y)^2 of one of them, 0 to 1; more labels: mean over rows of the sum over labels of (p - y)^2, 0 to 2.",
    "log-loss": "Mean of -ln(probability of the correct label); 0 counts as 2.2e-16.",
}  # fmt: skip


def package(name: str, purpose: str) -> Any:
    """Import a package that only some scores need; GLMError with the pip line where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.split(".")[0]
        raise GLMError(
            f"{purpose} needs the package {top}, which is not installed.",
            f"Run: pip install {top}",
        ) from error


# ------------------------------------------------------------------------------------------------ generated texts


# The five rules by which rouge_chinese ends a sentence, in its order. Only a blank line of its own can matter: it
# counts as one word without characters.
_SENTENCE_ENDS = (
    (re.compile(r"([。！？?])([^”’])"), r"\1\n\2"),
    (re.compile(r"(\.{6})([^”’])"), r"\1\n\2"),
    (re.compile(r"(…{2})([^”’])"), r"\1\n\2"),
    (re.compile(r"([。！？?][”’])([^，。！？?])"), r"\1\n\2"),
)


def segment(text: str) -> list[str]:
    """The words jieba cuts a text into, white space included."""
    jieba = package("jieba", "ROUGE over Chinese words")
    if not jieba.dt.initialized:
        jieba.setLogLevel("WARNING")  # else it reports on stderr where it keeps its dictionary
    return list(jieba.cut(text))


def rouge_words(segmented: str) -> list[str]:
    """The words rouge_chinese compares, of a text whose words are joined by spaces; none for a blank text."""
    for pattern, replacement in _SENTENCE_ENDS:
        segmented = pattern.sub(replacement, segmented)
    lines = [line for line in segmented.rstrip().split("\n") if line]
    return [word for line in lines for word in line.split() or [""]]


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, in O(len(a) * len(b) / 64) steps and O(len) memory.

    One bit per place of the shorter text, one addition per place of the other (Crochemore et al. 2001,
    "A fast and practical bit-vector algorithm for the longest common subsequence problem").
    """
    start = 0
    end = min(len(a), len(b))
    while start < end and a[start] == b[start]:
        start += 1
    tail = 0
    while tail < end - start and a[len(a) - 1 - tail] == b[len(b) - 1 - tail]:
        tail += 1
    short, long = sorted((a[start : len(a) - tail], b[start : len(b) - tail]), key=len)
    places: dict[Hashable, int] = {}
    for place, item in enumerate(short):
        places[item] = places.get(item, 0) | 1 << place
    every = (1 << len(short)) - 1
    open_ = every
    for item in long:
        if found := places.get(item):
            matched = open_ & found
            open_ = ((open_ + matched) | (open_ - matched)) & every
    return start + tail + len(short) - open_.bit_count()


def rouge(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, of two lists of words as rouge_chinese 1.0.3 computes them.

    Its quirks are kept: sets of n-grams for the first two, every word for the third, and 1e-8 in the denominator.
    """
    if not prediction or not reference:
        return 0.0, 0.0, 0.0
    found = []
    for n in (1, 2):
        ours, theirs = _grams(prediction, n), _grams(reference, n)
        both = len(ours & theirs)
        found.append(_smoothed_f1(both, len(ours), len(theirs)))
    common = longest_common(reference, prediction)
    return found[0], found[1], _smoothed_f1(common, len(prediction), len(reference))


def _grams(words: Sequence[str], n: int) -> set[Any]:
    return set(words) if n == 1 else set(zip(words, words[1:], strict=False))


def _smoothed_f1(both: int, predicted: int, wanted: int) -> float:
    precision = both / predicted if predicted else 0.0
    recall = both / wanted if wanted else 0.0
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def bleu(prediction: str, reference: str) -> float:
    """Sentence BLEU of 1 to 4 characters, 0 to 1, equal to nltk's with its smoothing method 3."""
    if not prediction:
        return 0.0
    logarithms = []
    missed = 0
    for n, (ours, theirs) in enumerate(zip(_counted(prediction, 4), _counted(reference, 4), strict=True), 1):
        matches = _common(ours, theirs)
        if n == 1 and not matches:
            return 0.0
        possible = max(1, len(prediction) - n + 1)
        if matches:
            logarithms.append(0.25 * math.log(matches / possible))
        else:
            missed += 1
            logarithms.append(0.25 * math.log(1 / (2**missed * possible)))
    short = len(prediction) <= len(reference)
    penalty = math.exp(1 - len(reference) / len(prediction)) if short else 1
    return penalty * math.exp(math.fsum(logarithms))


def _counted(text: str, longest: int) -> Iterator[Counter[str]]:
    """How often each run of 1 to `longest` characters occurs."""
    grams = list(text)
    yield Counter(grams)
    for n in range(2, longest + 1):
        grams = list(map(add, grams, text[n - 1 :]))
        yield Counter(grams)


def _common(ours: Counter[str], theirs: Counter[str]) -> int:
    """Occurrences that both have: each counted as often as in the text that has it less."""
    both = ours.keys() & theirs.keys()
    return sum(map(min, map(ours.__getitem__, both), map(theirs.__getitem__, both)))


def character_rouge(prediction: str, reference: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, over characters without white space, repeated ones counted."""
    ours, theirs = "".join(prediction.split()), "".join(reference.split())
    found = []
    for n, (mine, yours) in enumerate(zip(_counted(ours, 2), _counted(theirs, 2), strict=True), 1):
        found.append(_f1(_common(mine, yours), max(0, len(ours) - n + 1), max(0, len(theirs) - n + 1)))
    return found[0], found[1], _f1(longest_common(theirs, ours), len(ours), len(theirs))


def _f1(both: int, predicted: int, wanted: int) -> float:
    return 2 * both / (predicted + wanted) if predicted + wanted else 0.0


def score_text(
    prediction: str | None, reference: str | None, metrics: Sequence[str] = REFERENCE
) -> dict[str, float] | None:
    """The scores of one row, 0 to 100, or None where the reference is blank; a blank prediction scores 0."""
    if unknown := [name for name in metrics if name not in OF_ROWS]:
        raise ValueError(f"no score of a row: {unknown[0]!r}")
    prediction, reference = prediction or "", reference or ""
    if not reference.strip():
        return None
    if not prediction.strip():
        return dict.fromkeys(metrics, 0.0)
    found: dict[str, float] = {}
    if not {"rouge-1", "rouge-2", "rouge-l"}.isdisjoint(metrics):
        words = [rouge_words(" ".join(segment(text))) for text in (prediction, reference)]
        for name, value in zip(("rouge-1", "rouge-2", "rouge-l"), rouge(*words), strict=True):
            found[name] = round(value * 100, 4)
    if "bleu-4" in metrics:
        found["bleu-4"] = round(bleu(prediction, reference) * 100, 4)
    if not set(CHARACTER_ROUGE).isdisjoint(metrics):
        scores = character_rouge(prediction, reference)
        found |= {name: value * 100 for name, value in zip(CHARACTER_ROUGE, scores, strict=True)}
    if "exact-match" in metrics:
        found["exact-match"] = 100.0 * (prediction.strip() == reference.strip())
    return {name: found[name] for name in metrics}


@dataclass(frozen=True)
class TextScores:
    """What the predictions of a file score against its references.

    n                 rows with a reference; only these count
    n_empty           of them, rows whose prediction is blank: they score 0
    n_no_reference    rows left out, since there is nothing to compare with
    scores            score of the file per metric, None where `reasons` says why
    rows              scores per row, None where the reference is blank; empty for scores of files only
    """

    n: int
    n_empty: int
    n_no_reference: int
    scores: Mapping[str, float | None]
    rows: Mapping[str, tuple[float | None, ...]] = field(repr=False)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, which are written beside their predictions."""
        return {key: value for key, value in vars(self).items() if key != "rows"}


def texts(
    predictions: Sequence[str | None],
    references: Sequence[str | None],
    metrics: Sequence[str] = REFERENCE,
    progress: Progress | None = None,
) -> TextScores:
    """Score the predictions of a file by the named metrics, each row and together."""
    _same_length(predictions, references)
    if unknown := [name for name in metrics if name not in OF_ROWS + OF_FILES]:
        raise ValueError(f"no score of texts: {unknown[0]!r}")
    of_rows = [name for name in metrics if name in OF_ROWS]
    rows: dict[str, list[float | None]] = {name: [] for name in of_rows}
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        found = score_text(prediction, reference, of_rows) if of_rows else None
        for name in of_rows:
            rows[name].append(None if found is None else found[name])
        if progress is not None:
            progress(number, len(predictions))
    pairs = [
        (p if (p or "").strip() else "", r) for p, r in zip(predictions, references, strict=True) if (r or "").strip()
    ]  # fmt: skip
    ours, theirs = [p or "" for p, _ in pairs], [r or "" for _, r in pairs]
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in metrics:
        if not pairs:
            scores[name], reasons[name] = None, "No row has a reference."
        elif name in rows:
            scores[name] = float(np.mean([value for value in rows[name] if value is not None]))
        elif name == "corpus-bleu":
            scores[name] = corpus_bleu(ours, theirs)
        elif name == "chrf":
            scores[name] = chrf(ours, theirs)
        elif name == "length-ratio":
            scores[name] = sum(map(len, ours)) / sum(map(len, theirs))
        else:
            scores[name] = distinct([_spoken(text) for text in ours], int(name[-1]))
            if scores[name] is None:
                reasons[name] = f"No prediction has {name[-1]} words."
    return TextScores(
        n=len(pairs),
        n_empty=ours.count(""),
        n_no_reference=len(predictions) - len(pairs),
        scores=scores,
        rows={name: tuple(values) for name, values in rows.items()},
        reasons=reasons,
    )


def _spoken(text: str) -> list[str]:
    return [word for word in segment(text) if word.strip()]


def _same_length(first: Sized, second: Sized) -> None:
    if len(first) != len(second):
        raise GLMError(
            f"There are {len(first)} predictions and {len(second)} correct answers.",
            "Give one prediction for each row, in the same order.",
        )


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a file by sacrebleu with its zh tokenizer, 0 to 100."""
    sacrebleu = package("sacrebleu", "Corpus BLEU")
    score = sacrebleu.BLEU(tokenize="zh").corpus_score(list(predictions), [list(references)])
    return float(score.score)


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a file by sacrebleu, 0 to 100."""
    sacrebleu = package("sacrebleu", "chrF")
    return float(sacrebleu.CHRF().corpus_score(list(predictions), [list(references)]).score)


def distinct(texts_of_words: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams / n-grams of all texts together (Li et al. 2016), None where no text has n words."""
    grams: Counter[tuple[str, ...]] = Counter()
    for words in texts_of_words:
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None


# ------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True)
class LabelScores:
    """Precision, recall and F1 of one label; None where there is nothing to divide by."""

    label: str
    support: int  # rows that have the label
    predicted: int  # rows given it
    correct: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class ClassificationScores:
    """What the answers of a file score against its correct labels.

    confusion   rows: correct label, columns: answer, both in the order of `labels`, and last a column of the answers
                outside the labels, so that every row of the file is counted once
    outside     the most frequent of those answers with their counts; None is a row without an answer
    scores      the scores of the whole, None where `reasons` says why
    """

    labels: tuple[str, ...]
    n: int
    n_outside: int
    confusion: tuple[tuple[int, ...], ...]
    outside: tuple[tuple[str | None, int], ...]
    by_label: tuple[LabelScores, ...]
    scores: Mapping[str, float | None]
    reasons: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, in types JSON has."""
        return asdict(self)


def classification(
    truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> ClassificationScores:
    """Score answers against correct labels; GLMError where a correct label is not one of `labels`.

    An answer outside the labels, or None, counts as wrong and has a column of its own.
    """
    _same_length(predicted, truth)
    index = _index(labels)
    _inside(truth, index)
    size = len(labels)
    table = np.zeros((size, size + 1), dtype=np.int64)
    outside: Counter[str | None] = Counter()
    for correct, answer in zip(truth, predicted, strict=True):
        place = size if answer is None else index.get(answer, size)
        table[index[correct], place] += 1
        if place == size:
            outside[answer] += 1
    support, given = table.sum(axis=1), table[:, :size].sum(axis=0)
    hits = np.diagonal(table)
    by_label = tuple(
        LabelScores(
            label=label,
            support=int(support[i]),
            predicted=int(given[i]),
            correct=int(hits[i]),
            precision=_share(hits[i], given[i]),
            recall=_share(hits[i], support[i]),
            f1=_share(2 * hits[i], support[i] + given[i]),
        )
        for i, label in enumerate(labels)
    )
    scores, reasons = _overall(table, by_label)
    return ClassificationScores(
        labels=tuple(labels),
        n=len(truth),
        n_outside=outside.total(),
        confusion=tuple(tuple(int(count) for count in row) for row in table),
        outside=tuple(outside.most_common(SHOWN)),
        by_label=by_label,
        scores=scores,
        reasons=reasons,
    )


def _index(labels: Sequence[str]) -> dict[str, int]:
    index = {label: i for i, label in enumerate(labels)}
    if len(index) != len(labels):
        raise ValueError("a label is named twice")
    return index


def _inside(truth: Sequence[str], index: Mapping[str, int]) -> None:
    unknown = Counter(str(value) for value in truth if value not in index)
    if unknown:
        named = ", ".join(f"{value!r} ({count})" for value, count in unknown.most_common(5))
        raise GLMError(
            f"{unknown.total()} correct answers are not among the labels: {named}.",
            "Map each of these values to a label, or leave the rows out.",
        )


def _share(part: Any, whole: Any) -> float | None:
    return int(part) / int(whole) if whole else None


def _overall(
    table: npt.NDArray[np.int64], by_label: Sequence[LabelScores]
) -> tuple[dict[str, float | None], dict[str, str]]:
    names = ("precision", "recall", "f1")
    every = ("accuracy", *(f"{kind}-{name}" for kind in ("macro", "weighted") for name in names))
    every += ("mcc", "balanced-accuracy")
    n = int(table.sum())
    if not n:
        return dict.fromkeys(every), dict.fromkeys(every, "There are no rows.")
    scores: dict[str, float | None] = {"accuracy": sum(one.correct for one in by_label) / n}
    present = [one for one in by_label if one.support or one.predicted]
    for name in names:
        scores[f"macro-{name}"] = math.fsum(getattr(one, name) or 0.0 for one in present) / len(present)
    for name in names:
        scores[f"weighted-{name}"] = (
            math.fsum((getattr(one, name) or 0.0) * one.support for one in by_label) / n
        )
    scores["mcc"] = _mcc(table)
    recalls = [one.recall for one in by_label if one.recall is not None]
    scores["balanced-accuracy"] = math.fsum(recalls) / len(recalls)
    reasons = {}
    if scores["mcc"] is None:
        reasons["mcc"] = "Every row has the same correct label, or every row was given the same answer."
    return {name: scores[name] for name in every}, reasons


def _mcc(table: npt.NDArray[np.int64]) -> float | None:
    """Correlation of a table of counts (rows correct, columns answered), in whole numbers until the root."""
    n, hits = int(table.sum()), int(np.diagonal(table).sum())
    wanted = [int(count) for count in table.sum(axis=1)] + [0]
    given = [int(count) for count in table.sum(axis=0)]
    both = n * hits - sum(w * g for w, g in zip(wanted, given, strict=True))
    spread = (n * n - sum(w * w for w in wanted)) * (n * n - sum(g * g for g in given))
    return both / math.sqrt(spread) if spread else None


# ------------------------------------------------------------------------------------------------ probabilities


@dataclass(frozen=True)
class Curve:
    """Points of a ROC curve (x false positive rate, y true positive rate) or a PR curve (x recall, y precision).

    A row counts as positive from its threshold upward; thresholds fall. None is the first point, where no row does.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    thresholds: tuple[float | None, ...]
    area: float

    def thinned(self, points: int = 1000) -> Curve:
        """At most so many points for a drawing, the first and the last among them; the area stays the exact one."""
        keep = _spread(len(self.x), points)
        return Curve(
            tuple(self.x[i] for i in keep),
            tuple(self.y[i] for i in keep),
            tuple(self.thresholds[i] for i in keep),
            self.area,
        )

    def to_json(self) -> dict[str, Any]:
        """The points as lists."""
        return asdict(self)


def _spread(count: int, points: int) -> list[int]:
    if count <= points:
        return list(range(count))
    return [round(i * (count - 1) / (points - 1)) for i in range(points)]


def _steps(truth: Sequence[bool] | Bools, scores: Sequence[float] | Floats) -> tuple[Floats, Floats, Floats]:
    """Per different score, highest first: the score, and the positives and negatives from it upward."""
    correct, values = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=np.float64)
    if correct.shape != values.shape or correct.ndim != 1:
        raise ValueError("truth and scores are two lists of one length")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    order = np.argsort(-values, kind="stable")
    correct, values = correct[order], values[order]
    # The last row of each score.
    last = (
        np.flatnonzero(np.append(values[1:] != values[:-1], True)) if len(values) else np.zeros(0, np.int64)
    )
    positives = np.cumsum(correct, dtype=np.float64)[last]
    return values[last], positives, last + 1.0 - positives


def roc(truth: Sequence[bool] | Bools, scores: Sequence[float] | Floats) -> Curve | None:
    """ROC curve and the area under it, None unless there are positive and negative rows."""
    thresholds, positives, negatives = _steps(truth, scores)
    if not len(thresholds) or not positives[-1] or not negatives[-1]:
        return None
    gained, passed = np.diff(positives, prepend=0.0), np.diff(negatives, prepend=0.0)
    # Whole numbers and halves until the division, so that the order of the rows cannot matter.
    area = float((passed * (positives - gained / 2)).sum()) / float(positives[-1] * negatives[-1])
    return Curve(
        x=(0.0, *(negatives / negatives[-1]).tolist()),
        y=(0.0, *(positives / positives[-1]).tolist()),
        thresholds=(None, *thresholds.tolist()),
        area=area,
    )


def precision_recall(truth: Sequence[bool] | Bools, scores: Sequence[float] | Floats) -> Curve | None:
    """Precision-recall curve and its average precision, None without a positive row."""
    thresholds, positives, negatives = _steps(truth, scores)
    if not len(thresholds) or not positives[-1]:
        return None
    recall, precision = positives / positives[-1], positives / (positives + negatives)
    return Curve(
        x=(0.0, *recall.tolist()),
        y=(1.0, *precision.tolist()),
        thresholds=(None, *thresholds.tolist()),
        area=float((np.diff(recall, prepend=0.0) * precision).sum()),
    )


@dataclass(frozen=True)
class Bin:
    """Rows of similar confidence: how sure the model was of them, and how often it was right."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def reliability(
    confidence: Sequence[float] | Floats,
    correct: Sequence[bool] | Bools,
    bins: int = BINS,
    equal_mass: bool = False,
) -> tuple[tuple[Bin, ...], float | None]:
    """The bins of a reliability diagram and the expected calibration error, None without rows.

    Bins of equal width hold (low, high]; those of equal mass are cut between different confidences, so that the
    order of the rows cannot matter and there may be fewer of them.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if sure.shape != right.shape or sure.ndim != 1:
        raise ValueError("confidence and correct are two lists of one length")
    n = len(sure)
    if equal_mass:
        ordered = np.sort(sure)
        cuts = [float(ordered[max(1, round(i * n / bins)) - 1]) for i in range(1, bins + 1)] if n else []
        edges = [float(ordered[0]) if n else 0.0, *sorted(set(cuts))]
    else:
        edges = [i / bins for i in range(bins + 1)]
    # A bin ends with its upper edge; what is not above the lowest edge belongs to the first bin.
    places = np.clip(np.searchsorted(edges[1:], sure, side="left"), 0, max(0, len(edges) - 2))
    found = []
    error = 0.0
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = places == i
        count = int(inside.sum())
        if not count:
            found.append(Bin(low, high, 0, None, None))
            continue
        means = math.fsum(sure[inside]) / count, math.fsum(right[inside]) / count
        found.append(Bin(low, high, count, *means))
        error += count / n * abs(means[1] - means[0])
    return tuple(found), error if n else None


@dataclass(frozen=True)
class ProbabilityScores:
    """How good the probabilities of a file are.

    roc_auc and pr_auc hold one area per label against the rest, None where `reasons` says why; in `scores` they are
    those of the positive label, or the mean of the labels where none was named.
    """

    labels: tuple[str, ...]
    n: int
    positive: str | None
    scores: Mapping[str, float | None]
    roc_auc: Mapping[str, float | None]
    pr_auc: Mapping[str, float | None]
    bins: tuple[Bin, ...]
    bins_equal_mass: tuple[Bin, ...]
    reasons: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, in types JSON has."""
        return asdict(self)


def probabilities(
    truth: Sequence[str],
    probability: Sequence[Sequence[float]] | Floats,
    labels: Sequence[str],
    positive: str | None = None,
) -> ProbabilityScores:
    """Score a probability per label, (rows, labels), against correct labels.

    GLMError where a correct label is not one of `labels`, or where the probabilities of a row are none.
    """
    index = _index(labels)
    given = np.asarray(probability, dtype=np.float64)
    given = given.reshape(len(given), -1) if len(given) else np.zeros((0, len(labels)))
    _same_length(given, truth)
    _inside(truth, index)
    if len(truth) and given.shape[1] != len(labels):
        raise GLMError(
            f"There are {given.shape[1]} probabilities per row and {len(labels)} labels.",
            "Choose one column of probabilities for each label, in the order of the labels.",
        )
    _check_probabilities(given)
    names = ("roc-auc", "pr-auc", "ece", "ece-equal-mass", "brier", "log-loss")
    scores: dict[str, float | None] = dict.fromkeys(names)
    if not len(truth):
        nothing: dict[str, float | None] = dict.fromkeys(labels)
        reasons = dict.fromkeys(names, "There are no rows.")
        return ProbabilityScores(tuple(labels), 0, positive, scores, nothing, nothing, (), (), reasons)
    correct = np.array([index[label] for label in truth])
    hit = np.eye(len(labels), dtype=bool)[correct]
    roc_auc, pr_auc = ({}, {})  # type: tuple[dict[str, float | None], dict[str, float | None]]
    for i, label in enumerate(labels):
        curves = roc(hit[:, i], given[:, i]), precision_recall(hit[:, i], given[:, i])
        # Without a row that has the label, or without one that has not, ranking says nothing.
        roc_auc[label], pr_auc[label] = (curve.area if curve and curves[0] else None for curve in curves)
    reasons = {}
    for name, areas in (("roc-auc", roc_auc), ("pr-auc", pr_auc)):
        chosen = [areas[positive]] if positive is not None else list(areas.values())
        known = [area for area in chosen if area is not None]
        scores[name] = math.fsum(known) / len(known) if known else None
        if not known:
            reasons[name] = "It needs rows that have the label and rows that have not."
        elif len(known) < len(chosen):
            missing = ", ".join(label for label, area in areas.items() if area is None)
            reasons[name] = f"The mean of the labels that some rows have; left out: {missing}."
    confidence, answered = given.max(axis=1), given.argmax(axis=1)
    bins, scores["ece"] = reliability(confidence, answered == correct)
    massed, scores["ece-equal-mass"] = reliability(confidence, answered == correct, equal_mass=True)
    squares = (given - hit) ** 2
    per_row = squares[:, 1] if len(labels) == 2 else squares.sum(axis=1)
    scores["brier"] = float(per_row.mean())
    of_truth = np.clip(given[np.arange(len(truth)), correct], np.finfo(np.float64).eps, 1.0)
    scores["log-loss"] = float(-np.log(of_truth).mean())
    return ProbabilityScores(
        tuple(labels), len(truth), positive, scores, roc_auc, pr_auc, bins, massed, reasons
    )


def _check_probabilities(given: Floats) -> None:
    for row, values in enumerate(given, 1) if not _fine(given).all() else ():
        if not _fine(values[None])[0]:
            shown = ", ".join(f"{value:.4g}" for value in values[:6])
            raise GLMError(
                f"Row {row} holds no probabilities: {shown}.",
                "Each is from 0 to 1, and those of a row add up to 1.",
            )


def _fine(given: Floats) -> Bools:
    with np.errstate(invalid="ignore"):
        near = np.abs(given.sum(axis=1) - 1) <= SUM
        return np.asarray(near & (given >= 0).all(axis=1) & (given <= 1).all(axis=1))
