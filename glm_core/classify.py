"""One label of a given set for every row, with its probability: the label task, its job, what moved an answer.

A label is scored as a whole: the log-probability of all its tokens and of the end of the answer behind them. So the
answer is always one of the labels, "1" and "10" are told apart, and what the model would rather have said is a number
too, the probability outside the labels.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import batch
from .errors import GLMError
from .jobs import Job, JobStore, Result, StopSignal

if TYPE_CHECKING:
    from .engine import Engine
    from .scoring import Scores
    from .statistics import Calibration, CrossFit
    from .tables import WriteReport
    from .tokenizers.base import Message

# Texts that say nothing, by which the bias of a prompt is found (Zhao et al. 2021, "Calibrate Before Use").
CONTENT_FREE = ("N/A", "", "[MASK]")
OUTSIDE = 0.5  # above this the model would rather say something else, and the row is one to look at
MOST_LABELS = 1000
MOST_PIECES = 256  # of a text whose words are explained; of a longer one neighbouring words stay together
DIGITS = 6  # of stored scores and probabilities
COLUMNS = (
    "margin",
    "outside",
    "reason",
    "status",
    "truncated",
)  # of an export, behind label and probabilities
UNREADABLE = (
    "The model's numbers left the range of its precision. Load it in bf16 or fp32, or shorten the text."
)

EMPTY = "The text is empty"
SHORTENED = "The text was shortened"
ELSEWHERE = "{:.0%} of the probability is outside the labels"
UNSURE = "The probability is {:.2f}, below {:.2f}"


@dataclass(frozen=True)
class Label:
    """One allowed answer.

    name         as it stands in data and results
    verbaliser   what the model writes for it; empty: the name
    display      how a person calls it; empty: the name
    """

    name: str
    verbaliser: str = ""
    display: str = ""

    @property
    def written(self) -> str:
        """What the model is to write."""
        return self.verbaliser or self.name

    @property
    def shown(self) -> str:
        """What a person reads."""
        return self.display or self.name


SPAM = (Label("0", "正常", "正常"), Label("1", "垃圾", "垃圾"))


def instruction_for(labels: Sequence[Label]) -> str:
    """What to ask for where nobody said it: the spam question for 正常 and 垃圾, else the list of labels."""
    written = [label.written for label in labels]
    if written in (["正常", "垃圾"], ["垃圾", "正常"]):
        return "判断下面的评论是垃圾还是正常，只回答一个词。"
    if all(text.isascii() for text in written):
        return f"Which of these labels fits the text below: {', '.join(written)}? Answer with the label only."
    return f"判断下面的文本属于哪一类：{'、'.join(written)}。只回答类别名称。"


@dataclass(frozen=True)
class LabelTask:
    """What to label and how: the same object behind the screen, the CLI and a resumed job."""

    checkpoint: str = field(metadata={"help": "Folder of the checkpoint"})
    checkpoint_fingerprint: str
    precision: str
    device: str
    template: str = field(
        metadata={"help": "The question; {column} is replaced by the cell, {{ and }} are braces"}
    )
    columns: tuple[str, ...]
    labels: tuple[Label, ...] = SPAM
    instruction: str = field(default="", metadata={"help": "Put first, before examples and question"})
    system: str = ""
    shots: tuple[tuple[str, str], ...] = field(
        default=(), metadata={"help": "Solved examples: text, name of its label"}
    )
    positive: str = field(default="", metadata={"help": "Name of the label a threshold is about"})
    threshold: float | None = field(
        default=None, metadata={"help": "From this probability on the label is the positive one"}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the calibration; 1 leaves it out"})
    bias: tuple[float, ...] = field(default=(), metadata={"help": "Of the calibration, one per label"})
    content_free: bool = field(
        default=False, metadata={"help": "Take away what the question says without a text"}
    )
    abstain_below: float = field(
        default=0.0, metadata={"help": "Rows of a lower probability are to be reviewed"}
    )
    output_column: str = "label"
    input_name: str = ""
    input_path: str = ""
    input_sha256: str = ""
    read_options: dict[str, Any] = field(default_factory=dict)
    limit_rows: int | None = None
    generation: str = ""  # prompt format, where it was chosen by hand
    base: str = ""  # folder of the base, where the checkpoint is an adapter alone
    engine: str = field(default="", metadata={"help": "ray: on a cluster; else on this machine"})
    address: str = field(
        default="", metadata={"help": "host:port of the cluster; empty: one of its own, here"}
    )
    workers: int = field(default=0, metadata={"help": "0: as many as fit"})
    cpus_per_worker: float = field(default=0.0, metadata={"help": "0: an equal share"})
    versions: dict[str, str] = field(default_factory=dict)
    # Where the checkpoint is on a server: its address, model, how it is asked, and where probabilities come from.
    remote: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    def to_json(self) -> dict[str, Any]:
        """The task as a job stores it."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {
            "columns": list(self.columns),
            "labels": [asdict(label) for label in self.labels],
            "shots": [list(shot) for shot in self.shots],
            "bias": list(self.bias),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LabelTask:
        """The task of a stored job; GLMError if it lacks a value."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        try:
            known["columns"] = tuple(known["columns"])
            known["labels"] = tuple(Label(**one) for one in known["labels"])
            known["shots"] = tuple((str(text), str(label)) for text, label in known.get("shots", ()))
            known["bias"] = tuple(float(one) for one in known.get("bias", ()))
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise GLMError(
                f"The stored label task is incomplete ({error}).", "Start the job again."
            ) from error

    def check(self) -> None:
        """Raise a GLMError naming the first thing that cannot be."""
        _check_labels(self.labels)
        batch.Template(self.template, self.columns)
        if batch.HALF.search("".join((self.template, self.instruction, self.system, *dict(self.shots)))):
            raise GLMError("The question holds half a character.", "Write it again.")
        for text, name in self.shots:
            if name not in self.names:
                raise GLMError(
                    f"The example {text[:40]!r} has the label {name!r}, which is not one of the labels.",
                    f"Choose one of: {', '.join(self.names)}.",
                )
        if self.positive and self.positive not in self.names:
            raise GLMError(
                f"The positive label {self.positive!r} is not one of the labels.",
                f"Choose one of: {', '.join(self.names)}.",
            )
        if self.threshold is not None and not self.positive:
            raise GLMError("There is a threshold, but no positive label.", "Choose the positive label.")
        for what, value in (("threshold", self.threshold), ("abstain_below", self.abstain_below)):
            if value is not None and not 0 <= value <= 1:
                raise GLMError(f"{what} is {value}.", "Choose a value from 0 to 1.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise GLMError(f"The temperature of the calibration is {self.temperature}.", "Calibrate again.")
        if self.bias and (len(self.bias) != len(self.labels) or not all(map(math.isfinite, self.bias))):
            raise GLMError(
                f"The calibration has {len(self.bias)} biases for {len(self.labels)} labels.",
                "Calibrate again with these labels.",
            )
        if not self.output_column.strip():
            raise GLMError("The output column has no name.", "Give it one, for example label.")

    def calibrated(self, calibration: Calibration) -> LabelTask:
        """The task with a calibration that was fitted on its scores; a content-free one is taken out for it."""
        return replace(self, temperature=calibration.temperature, bias=calibration.bias, content_free=False)


def _check_labels(labels: Sequence[Label]) -> None:
    if len(labels) < 2:
        raise GLMError(f"There {'is one label' if labels else 'are no labels'}.", "Give at least two labels.")
    if len(labels) > MOST_LABELS:
        raise GLMError(f"There are {len(labels):,} labels.", f"Give at most {MOST_LABELS:,}.")
    for what, values in (
        ("is named", [label.name for label in labels]),
        ("is written", [label.written for label in labels]),
    ):
        if any(not value.strip() for value in values):
            raise GLMError("A label is empty.", "Give every label a name.")
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise GLMError(f"More than one label {what} {twice[0]!r}.", "Give each label its own.")
    for label in labels:
        if batch.HALF.search(label.name + label.verbaliser + label.display):
            raise GLMError("A label holds half a character.", "Write the label again.")


# ---- one row


@dataclass(frozen=True)
class Scored:
    """The answer to one row.

    label           name of the label it got
    scores          per label the log-probability of writing it, in nats, as the model gives it
    probabilities   per label, among the labels, calibrated as the task says
    outside         probability that the model would write none of the labels
    greedy          name of the label it writes when it generates freely; None where that is none of them
    reason          why to look at the row, empty where there is none
    seconds         of computing
    """

    label: str
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    outside: float
    greedy: str | None = None
    reason: str = ""
    truncated: bool = False
    seconds: float = 0.0
    prompt_tokens: int = 0

    @property
    def margin(self) -> float:
        """Probability of the likeliest label less that of the next; 0 where there are none."""
        if not self.probabilities:
            return 0.0
        first, second = sorted(self.probabilities, reverse=True)[:2]
        return first - second

    @property
    def entropy(self) -> float:
        """Of the probabilities, in nats: 0 is sure, the logarithm of the number of labels is a guess."""
        return -math.fsum(p * math.log(p) for p in self.probabilities if p > 0)


class Classifier:
    """A task on a loaded model: builds the prompts, scores the labels, and reads the scores."""

    def __init__(self, engine: Engine, task: LabelTask) -> None:
        """GLMError where task and model do not go together."""
        task.check()
        self.engine, self.task = engine, task
        answers = [tuple(engine.tokenizer.answer_ids(label.written)) for label in task.labels]
        known: dict[tuple[int, ...], Label] = {}
        for label, ids in zip(task.labels, answers, strict=True):
            if ids in known:
                raise GLMError(
                    f"The labels {known[ids].written!r} and {label.written!r} are the same tokens to this model.",
                    "Choose words that differ more.",
                )
            known[ids] = label
        question, turns = _conversation(task)
        self.prompts = batch.Prompts(
            engine.tokenizer, question, task.system, task.columns, engine.context, max(map(len, answers)), turns
        )  # fmt: skip
        self.scorer = engine.scorer(answers, self.prompts.head)
        self._empty = "".join(self.prompts.template.render([]).split())
        self._shift: tuple[float, ...] | None = None
        if engine.remote is not None and getattr(self.scorer, "way", "") == "greedy":
            _refuse_what_needs_probabilities(task)

    def prepare(self) -> None:
        """Find what texts that say nothing score, where the task takes that away; once is enough."""
        if self._shift is not None or not self.task.content_free:
            return
        prompts = [self.prompts.build([text] * len(self.task.columns)) for text in CONTENT_FREE]
        found = self.scorer.score([prompt.ids for prompt in prompts])
        if not all(one.usable for one in found):
            raise GLMError(*_sentences(UNREADABLE))
        shares = zip(*(_softmax(one.values) for one in found), strict=True)
        self._shift = tuple(math.log(max(math.fsum(one) / len(found), 1e-12)) for one in shares)

    def score(self, rows: Sequence[Sequence[str]]) -> list[Scored]:
        """The answers to some rows of cells. GLMError for the model, and for a row it cannot compute."""
        self.prepare()
        prompts = [self.prompts.build(row) for row in rows]
        found = self.scorer.score([prompt.ids for prompt in prompts])
        for one in found:
            if one.error or not one.usable:
                raise GLMError(*_sentences(one.error or UNREADABLE))
        return [self.read(one, prompt) for one, prompt in zip(found, prompts, strict=True)]

    def read(self, scores: Scores, prompt: batch.Prompt) -> Scored:
        """The answer that the scores of a prompt mean."""
        task = self.task
        if not scores.values:
            return self._without_numbers(scores, prompt)
        none = (0.0,) * len(task.labels)
        probabilities = _softmax(
            [
                (value - shift) / task.temperature + extra
                for value, shift, extra in zip(
                    scores.values, self._shift or none, task.bias or none, strict=True
                )
            ]
        )
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        if task.threshold is not None:
            positive = task.names.index(task.positive)
            others = [i for i in range(len(probabilities)) if i != positive]
            reached = probabilities[positive] >= task.threshold
            best = positive if reached else max(others, key=probabilities.__getitem__)
        reasons = []
        if "".join(prompt.text.split()) == self._empty:
            reasons.append(EMPTY)
        if scores.outside > OUTSIDE:
            reasons.append(ELSEWHERE.format(scores.outside))
        if probabilities[best] < task.abstain_below:
            reasons.append(UNSURE.format(probabilities[best], task.abstain_below))
        truncated = prompt.truncated or scores.shortened
        if truncated:
            reasons.append(SHORTENED)
        return Scored(
            label=task.names[best],
            scores=scores.values,
            probabilities=tuple(probabilities),
            outside=scores.outside,
            greedy=None if scores.greedy is None else task.names[scores.greedy],
            reason="".join(f"{reason}. " for reason in reasons).strip(),
            truncated=truncated,
            seconds=scores.seconds,
            prompt_tokens=0 if self.engine.remote else len(prompt.ids),
        )

    def _without_numbers(self, scores: Scores, prompt: batch.Prompt) -> Scored:
        """The answer where a server gave no probabilities: the label it wrote."""
        assert scores.greedy is not None
        label = self.task.names[scores.greedy]
        empty = "".join(prompt.text.split()) == self._empty
        return Scored(label, (), (), 0.0, label, f"{EMPTY}." if empty else "", seconds=scores.seconds)


def _refuse_what_needs_probabilities(task: LabelTask) -> None:
    """GLMError for a task that cannot be done on labels alone."""
    asked = {
        "a threshold": task.threshold is not None,
        "the model's own preference taken out": task.content_free,
        "a calibration": task.temperature != 1.0 or any(task.bias),
    }
    for what, wanted in asked.items():
        if wanted:
            raise GLMError(
                f"This server gives no probabilities, so there cannot be {what}.",
                "Leave it out, or choose a server that shows log-probabilities.",
            )


def _sentences(text: str) -> tuple[str, str]:
    """A remark as message and way out of an error."""
    message, _, todo = text.partition(". ")
    return f"{message}.", todo


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    raised = [math.exp(score - highest) for score in scores]
    total = math.fsum(raised)
    return [one / total for one in raised]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _conversation(task: LabelTask) -> tuple[str, list[Message]]:
    """(template of the row's question, the solved examples before it); the instruction stands first."""
    from .tokenizers.base import Message

    template = batch.Template(task.template, task.columns)
    head = f"{task.instruction}\n" if task.instruction.strip() else ""
    if not task.shots:
        return _escaped(head) + task.template, []
    written = {label.name: label.written for label in task.labels}
    turns = []
    for number, (text, name) in enumerate(task.shots):
        asked = template.render([text] * len(task.columns))
        turns += [Message("user", asked if number else head + asked), Message("assistant", written[name])]
    return task.template, turns


def classify(engine: Engine, task: LabelTask, texts: Sequence[str]) -> list[Scored]:
    """The answers to some texts, each of which is put to every placeholder of the template; GLMError as `Classifier`."""
    return classify_rows(engine, task, [(text,) * len(task.columns) for text in texts])


def classify_rows(
    engine: Engine, task: LabelTask, rows: Sequence[Sequence[str]], greedy: bool = True
) -> list[Scored]:
    """The answers to some rows of cells, beside whatever the engine does; GLMError as `Classifier`.

    greedy   whether to say what free generation would give; it costs nothing
    """
    found = Classifier(engine, task).score(rows) if rows else []
    return found if greedy else [replace(one, greedy=None) for one in found]


# ---- why


@dataclass(frozen=True)
class Word:
    """A piece of a text, where it begins, and what it does to the log-odds of the label.

    change   log-odds with it less those without it, in nats: above 0 it speaks for the label
    """

    text: str
    start: int
    change: float


def explain(engine: Engine, task: LabelTask, text: str, label: str = "") -> list[Word]:
    """What each word of a text does to the odds of a label, by leaving one out at a time; all in one go.

    label   whose odds; by default those of the label the text gets
    White space has no entry of its own. Of a text of many words neighbouring ones are left out together.
    """
    if label and label not in task.names:
        raise GLMError(f"{label!r} is not one of the labels.", f"Choose one of: {', '.join(task.names)}.")
    classifier = Classifier(engine, task)
    pieces = _pieces(text)
    texts = [text, *(text[:start] + text[start + len(piece) :] for start, piece in pieces)]
    found = classifier.score([(one,) * len(task.columns) for one in texts])
    target = task.names.index(label or found[0].label)
    odds = [_log_odds(one.probabilities, target) for one in found]
    return [
        Word(piece, start, odds[0] - without)
        for (start, piece), without in zip(pieces, odds[1:], strict=True)
    ]


def _pieces(text: str) -> list[tuple[int, str]]:
    """The words of a text with their places, at most MOST_PIECES of them."""
    from . import metrics

    words, start = [], 0
    for word in metrics.segment(text):
        if word.strip():
            words.append((start, word))
        start += len(word)
    together = -(-len(words) // MOST_PIECES)
    if together <= 1:
        return words
    groups = [words[i : i + together] for i in range(0, len(words), together)]
    return [(one[0][0], text[one[0][0] : one[-1][0] + len(one[-1][1])]) for one in groups]


def _log_odds(probabilities: Sequence[float], target: int) -> float:
    rest = math.fsum(p for i, p in enumerate(probabilities) if i != target)
    return math.log(max(probabilities[target], 1e-300)) - math.log(max(rest, 1e-300))


# ---- labels of a file


@dataclass(frozen=True)
class Matched:
    """What the values of a column of correct labels mean.

    mapped      value -> label, where the two are the same
    unknown     every other value with its count
    proposals   what some of the unknown values probably mean; a person has to confirm it
    """

    mapped: Mapping[str, str]
    unknown: Mapping[str, int]
    proposals: Mapping[str, str]

    def apply(self, values: Iterable[Any], confirmed: Mapping[str, str] | None = None) -> list[str | None]:
        """The label of each value, by the same name or as a person confirmed it; None for any other."""
        meaning = dict(confirmed or {}) | dict(self.mapped)
        return [meaning.get(_value(value)) for value in values]


def match_labels(values: Iterable[Any] | Mapping[Any, int], labels: Sequence[Label]) -> Matched:
    """Find labels in the values of a column (or in values with their counts), guessing nothing.

    A value that is not exactly the name of a label is unknown. It is proposed as a label that it equals but for
    case, width, outer spaces or a decimal point behind a whole number, where that is one label only.
    """
    given: dict[str, int] = Counter()
    for value, count in values.items() if isinstance(values, Mapping) else ((one, 1) for one in values):
        given[_value(value)] += count
    names = {label.name for label in labels}
    means: dict[str, set[str]] = {}
    for label in labels:
        for spelling in (label.name, label.written, label.shown):
            means.setdefault(_plain(spelling), set()).add(label.name)
    unknown = {value: count for value, count in given.items() if value not in names}
    proposals = {}
    for value in unknown:
        candidates = means.get(_plain(value), set())
        if len(candidates) == 1:
            proposals[value] = next(iter(candidates))
    unknown = dict(sorted(unknown.items(), key=lambda item: -item[1]))
    return Matched({value: value for value in given if value in names}, unknown, proposals)


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _plain(text: str) -> str:
    """A text without differences of case, width, marks that show nothing, outer spaces, and ".0"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf").strip()
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


# ---- calibration


def calibrate(
    scores: Sequence[Scored] | Sequence[Sequence[float]], gold: Sequence[str], labels: Sequence[str]
) -> Calibration:
    """The temperature, and for two labels the bias, of least log loss on rows with a correct label.

    scores   answers, or per row the scores of the labels
    gold     per row the name of its correct label, one of `labels`
    """
    from . import statistics

    given, truth = _numbers(scores, gold, labels)
    return statistics.fit_calibration(given, truth, bias=len(labels) == 2)


def calibrate_across(
    scores: Sequence[Scored] | Sequence[Sequence[float]],
    gold: Sequence[str],
    labels: Sequence[str],
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> CrossFit:
    """`calibrate` where there is one labelled file only: each part of it judged by a fit on the others."""
    from . import statistics

    given, truth = _numbers(scores, gold, labels)
    return statistics.cross_fit(given, truth, bias=len(labels) == 2, seed=seed, groups=groups)


def _numbers(
    scores: Sequence[Scored] | Sequence[Sequence[float]], gold: Sequence[str], labels: Sequence[str]
) -> tuple[list[Sequence[float]], list[int]]:
    places = {name: i for i, name in enumerate(labels)}
    unknown = Counter(name for name in gold if name not in places)
    if unknown:
        listed = ", ".join(f"{name!r} ({count})" for name, count in unknown.most_common(5))
        raise GLMError(
            f"{unknown.total()} correct answers are not among the labels: {listed}.",
            "Map each of these values to a label, or leave the rows out.",
        )
    if len(scores) != len(gold):
        raise ValueError("one correct label per row")
    given = [one.scores if isinstance(one, Scored) else one for one in scores]
    return given, [places[name] for name in gold]


# ---- the job


def start(store: JobStore, task: LabelTask, table: batch.Rows) -> Job:
    """Copy the rows into a new job and queue it; GLMError, and a failed job, if the file cannot be read."""
    return batch.fill(store, _create(store, task), task, table)


def start_in_background(store: JobStore, task: LabelTask, table: batch.Rows) -> Job:
    """`start` for a large table: the job is "preparing" while its rows are copied, and counts them as it goes."""
    return batch.fill_in_background(store, _create(store, task), task, table)


def _create(store: JobStore, task: LabelTask) -> Job:
    task.check()
    return store.create("classify", task.input_name, task.to_json())


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Label every row that has no result yet; GLMError if the checkpoint is gone or another one by now."""
    task = LabelTask.from_json(job.task)
    if task.engine == "ray":
        from . import cluster

        return cluster.run(job, store, stop)
    batch.with_engine(
        job, store, stop, task, lambda engine: Labelling(job, store, stop, Classifier(engine, task)).run()
    )


class Labelling(batch.Stretch):
    """Rows from the store, scored a window at a time, back as results."""

    def __init__(self, job: Job, store: JobStore, stop: StopSignal, classifier: Classifier) -> None:
        super().__init__(job, store, stop, classifier.prompts)
        self.classifier = classifier

    def run(self) -> None:
        """Until no row is left, or until told to stop; what is finished is committed either way."""
        self.classifier.prepare()
        try:
            while self.after is not None and not self.stop.event.is_set():
                self._score_window()
                self._commit()
        finally:
            self._commit(all_of_it=True)

    def _score_window(self) -> None:
        rows: dict[bytes, list[tuple[int, bool]]] = {}
        prompts: dict[bytes, batch.Prompt] = {}
        for idx, prompt in self._window():
            key = batch.prompt_key(prompt)
            if (answer := self.answers.get(key)) is not None:
                self._keep(replace(answer, idx=idx, truncated=prompt.truncated, seconds=0.0), copy=True)
                continue
            prompts.setdefault(key, prompt)
            rows.setdefault(key, []).append((idx, prompt.truncated))
        keys = list(prompts)
        scorer = self.classifier.scorer
        for number, scores in scorer.each([prompts[key].ids for key in keys], self.stop.event):
            key = keys[number]
            result = self._result(rows[key][0][0], scores, prompts[key])
            self._keep(result)
            for idx, truncated in rows[key][1:]:
                self._keep(replace(result, idx=idx, truncated=truncated, seconds=0.0), copy=True)
            if result.status == "ok":
                self._remember(key, result)
            self._commit()

    def _result(self, idx: int, scores: Scores, prompt: batch.Prompt) -> Result:
        if scores.error or not scores.usable:
            return Result(idx, "failed", truncated=prompt.truncated, error=scores.error or UNREADABLE)
        return to_result(idx, self.classifier.read(scores, prompt))


def to_result(idx: int, scored: Scored) -> Result:
    """An answer as a job keeps it: the label as the prediction, all numbers as JSON beside it."""
    details = {
        "scores": [round(one, DIGITS) for one in scored.scores],
        "probabilities": [round(one, DIGITS + 3) for one in scored.probabilities],
        "outside": round(scored.outside, DIGITS + 3),
        "greedy": scored.greedy,
        "reason": scored.reason,
    }
    return Result(
        idx=idx,
        status="ok",
        prediction=scored.label,
        truncated=scored.truncated,
        seconds=round(scored.seconds, 4),
        prompt_tokens=scored.prompt_tokens,
        details=json.dumps(details, ensure_ascii=False, separators=(",", ":")),
    )


def from_result(result: Result) -> Scored:
    """The answer of a stored result; GLMError for one that is none."""
    return _scored(result.prediction, result.details, result.truncated, result.seconds, result.prompt_tokens)


def _scored(label: str, details: str, truncated: bool, seconds: float, prompt_tokens: int) -> Scored:
    try:
        found = json.loads(details)
        return Scored(
            label=label,
            scores=tuple(found["scores"]),
            probabilities=tuple(found["probabilities"]),
            outside=float(found["outside"]),
            greedy=found["greedy"],
            reason=str(found["reason"]),
            truncated=truncated,
            seconds=seconds,
            prompt_tokens=prompt_tokens,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise GLMError(
            f"A stored answer cannot be read ({error}).", "Run the job again for this file."
        ) from error


@dataclass(frozen=True)
class Answer:
    """The stored answer of a row, as numbers; `answer` is the number of its label."""

    idx: int
    answer: int
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    outside: float
    greedy: int
    reason: str


def read_answers(store: JobStore, job_id: str) -> tuple[tuple[str, ...], Iterator[Answer]]:
    """(names of the labels, the answers of a job in the order of its rows); rows without an answer are left out."""
    names = LabelTask.from_json(store.get(job_id).task).names

    def answers() -> Iterator[Answer]:
        places = {name: i for i, name in enumerate(names)}
        query = (
            "SELECT idx, prediction, details FROM result "
            "WHERE job_id = ? AND idx > ? AND status = 'ok' ORDER BY idx LIMIT 20000"
        )
        last = -1
        while page := store.connection().execute(query, (job_id, last)).fetchall():
            for row in page:
                one = _scored(row["prediction"], row["details"], False, 0.0, 0)
                yield Answer(
                    row["idx"], places.get(one.label, -1), one.scores, one.probabilities, one.outside,
                    places.get(one.greedy, -1) if one.greedy is not None else -1, one.reason,
                )  # fmt: skip
            last = page[-1]["idx"]

    return names, answers()


def export(
    store: JobStore,
    job_id: str,
    path: Path,
    format: Literal["csv", "xlsx", "jsonl", "parquet"],
    guard: bool = True,
) -> WriteReport:
    """The analyst's table with label, a probability per label, margin and reason beside it, and its manifest.

    Rows without an answer are there too, with status "not run". GLMError if a file cannot be written.
    """
    task = LabelTask.from_json(store.get(job_id).task)
    numbers = ("",) * (len(task.labels) + 2)

    def answer(result: Result | None) -> tuple[str | float, ...]:
        if result is None:
            return ("", *numbers, "", "not run", "")
        cut = "yes" if result.truncated else "no"
        if result.status != "ok":
            return ("", *numbers, result.error, result.status, cut)
        one = from_result(result)
        if not one.probabilities:  # a server that gives none
            return (one.label, *numbers, one.reason, result.status, cut)
        margin, outside = round(one.margin, DIGITS), round(one.outside, DIGITS)
        shares = (round(share, DIGITS) for share in one.probabilities)
        return (one.label, *shares, margin, outside, one.reason, result.status, cut)

    return batch.write_results(store, job_id, path, format, export_columns(task), answer, guard)


def export_columns(task: LabelTask) -> list[str]:
    """The columns of the exported table: a probability is named after its label."""
    return batch.with_names(task.columns, (task.output_column.strip(), *task.names, *COLUMNS))
