"""What a run asks of which checkpoint and file, and the kind of task a file is, told from its columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import batch, metrics
from ..errors import GLMError
from ..finetune import examples
from ..finetune.examples import Columns
from ..tables import ReadOptions, Table, open_table
from ..tables.options import excerpt, plural
from . import answers

if TYPE_CHECKING:
    from ..engine import GenerationSettings

Kind = Literal["text", "label", "choice", "number"]
Method = Literal["generate", "likelihood", "chain", "imported"]
KINDS: tuple[Kind, ...] = ("text", "label", "choice", "number")

# Kind -> how its answers are found; the first is taken where nothing is chosen.
METHODS: Mapping[Kind, tuple[Method, ...]] = {
    "text": ("generate",),
    "label": ("generate", "likelihood"),
    "choice": ("likelihood", "chain", "generate"),
    "number": ("generate",),
}
LONGEST: Mapping[Kind, int] = {"text": 256, "label": 32, "choice": 512, "number": 512}  # tokens of an answer
TEXT_METRICS = (*metrics.OF_ROWS, *metrics.OF_FILES)
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "text": TEXT_METRICS,
    "label": ("accuracy", "macro-f1", "weighted-f1", "balanced-accuracy", "mcc"),
    "choice": ("accuracy",),
    "number": ("accuracy",),
}
MAIN: Mapping[Kind, str] = {
    "text": "rouge-l",
    "label": "accuracy",
    "choice": "accuracy",
    "number": "accuracy",
}

GUESSED_ROWS = 2000
QUESTIONS = ("question", "问题", "题目", "题干")
ANSWERS = ("answer", "答案", "正确答案")
SUBJECTS = ("subject", "科目", "学科")
MOST_OPTIONS = 10
# Predictions made elsewhere: (reference, prediction) by the names that programs write.
IMPORTED = (
    ("labels", "predict"),  # generated_predictions.txt of the released scripts
    ("label", "predict"), ("label", "prediction"), ("labels", "prediction"), ("labels", "predictions"),
    ("reference", "prediction"), ("references", "predictions"), ("target", "prediction"), ("gold", "pred"),
    ("gold", "prediction"), ("expected", "predicted"), ("expected", "answer"), ("response", "predict"),
    ("response", "prediction"), ("summary", "prediction"), ("summary", "predict"), ("answer", "prediction"),
    ("answer", "predict"), ("output", "predict"), ("output", "prediction"), ("label", "pred"),
    ("参考", "预测"), ("标签", "预测"), ("答案", "预测"), ("参考答案", "模型回答"),
)  # fmt: skip

# Behind the columns of the file a row of a run has these cells.
EXTRA = ("number in the file", "reference", "question", "history")

_HASHED = re.compile(r"####\s*\$?[-+]?[0-9]")
_CHINESE = re.compile("[\u4e00-\u9fff]")
EXTRACTION = {
    "zh": "综上所述，{letters}中正确的选项是：",  # of the released evaluation of ChatGLM2-6B, where it says ABCD
    "en": "Therefore, the correct option among {letters} is:",
}


@dataclass(frozen=True)
class EvaluationTask:
    """What to ask, of which file and how: the same object behind the screen, the shell and a resumed run.

    columns         of the file; a row of the run has EXTRA behind them
    prompt, reference   the same column where it holds whole conversations; prompt is "" for imported predictions
    history, input, alpaca   as in glm_core.finetune.examples.Columns
    options, subject    columns of a multiple-choice file
    labels          what an answer may be, where the kind is "label"
    shots           (subject, question, answer) shown before every question; "" fits every subject
    shot_rows       numbers of the rows of the file that are shown and therefore not asked
    extraction      what follows a chain of thought before the options are scored
    prediction      column of the predictions, where they were made elsewhere
    remote          the address of the checkpoint where it is on a server, and how it is asked
    group, step     what a series of runs belongs to, such as a training, and the step of this one
    """

    kind: Kind
    method: Method
    input_name: str
    input_path: str
    input_sha256: str
    columns: tuple[str, ...]
    prompt: str
    reference: str
    metrics: tuple[str, ...]
    settings: GenerationSettings
    template: str = ""
    system: str = ""
    history: str = ""
    input: str = ""
    alpaca: bool = False
    options: tuple[str, ...] = ()
    subject: str = ""
    labels: tuple[str, ...] = ()
    few_shot: int = 0
    few_shot_name: str = ""
    few_shot_sha256: str = ""
    shots: tuple[tuple[str, str, str], ...] = ()
    shot_rows: tuple[int, ...] = ()
    extraction: str = ""
    prediction: str = ""
    read_options: dict[str, Any] = field(default_factory=dict)
    limit_rows: int | None = None
    checkpoint: str = ""
    checkpoint_fingerprint: str = ""
    precision: str = ""
    device: str = ""
    generation: str = ""
    base: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    remote: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    step: int | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of a row's cells."""
        return (*self.columns, *EXTRA)

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options."""
        return tuple("ABCDEFGHIJ"[: len(self.options)])

    def to_json(self) -> dict[str, Any]:
        """The task as a job stores it."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {
            "settings": self.settings.to_json()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationTask:
        """The task of a stored run; GLMError if it lacks a value."""
        from ..engine import GenerationSettings

        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        try:
            known["settings"] = GenerationSettings.from_json(known["settings"])
            for name in ("columns", "metrics", "options", "labels", "shot_rows"):
                known[name] = tuple(known.get(name, ()))
            known["shots"] = tuple((a, b, c) for a, b, c in known.get("shots", ()))
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise GLMError(
                f"The stored evaluation is incomplete ({error}).", "Start the evaluation again."
            ) from error


@dataclass(frozen=True)
class Row:
    """A row of the file as it is asked: its number in the file from 1, and its cells with EXTRA behind them."""

    number: int
    cells: tuple[str, ...]


# ---- columns and kind


def option_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns A, B, C ... of a multiple-choice file, upper or lower case; none where there are fewer than two."""
    by_name = {column.strip().upper(): column for column in reversed(columns)}
    found = []
    for letter in "ABCDEFGHIJ"[:MOST_OPTIONS]:
        if letter not in by_name:
            break
        found.append(by_name[letter])
    return tuple(found) if len(found) > 1 else ()


def _named(columns: Sequence[str], names: Sequence[str]) -> str:
    by_name = {column.strip().casefold(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), "")


def guess_columns(columns: Sequence[str], kind: Kind | None = None) -> Columns | None:
    """Which columns hold the prompt and the correct answer, by their names; None where they say nothing."""
    found = examples.guess_columns(columns)
    question, answer = _named(columns, QUESTIONS), _named(columns, ANSWERS)
    if question and answer and (found is None or (option_columns(columns) and kind in (None, "choice"))):
        return Columns(question, answer)
    return found


def guess_kind(columns: Sequence[str], rows: Iterable[Sequence[str]], reference: str | None = None) -> Kind:
    """The kind of task a file is, by its columns and some of its rows.

    reference   the column of the correct answers; told from the names where it is None
    """
    if option_columns(columns) and _named(columns, QUESTIONS) and _named(columns, ANSWERS):
        return "choice"
    if reference is None:
        guessed = examples.guess_columns(columns)
        reference = guessed.response if guessed else ""
    if reference not in columns:
        return "text"
    place = list(columns).index(reference)
    given = [
        row[place].strip() for row in islice(rows, GUESSED_ROWS) if place < len(row) and row[place].strip()
    ]
    return _kind_of(given)


def _kind_of(references: Sequence[str]) -> Kind:
    if not references:
        return "text"
    if sum(bool(_HASHED.search(one)) for one in references) * 10 >= 9 * len(references):
        return "number"
    if examples.labels_of(references):
        return "label"
    bare = sum(answers.number_of(one) is not None and len(one) <= 20 and not _CHINESE.search(one)
               and bool(re.fullmatch(r"[-+$€£¥]*\s*[0-9][0-9,.]*\s*%?", one)) for one in references)  # fmt: skip
    return "number" if bare == len(references) else "text"


def default_template(task: EvaluationTask, chinese: bool) -> str:
    """The question put to the model where no template is given."""
    extra = len(task.columns)
    if task.alpaca or task.prompt == task.reference:
        return f"{{#{extra + 1 + EXTRA.index('question')}}}"
    asked = batch.reference(task.prompt, task.columns)
    if task.kind != "choice":
        return asked
    lines = [asked]
    for letter, column in zip(task.letters, task.options, strict=True):
        lines.append(f"{letter}. {batch.reference(column, task.columns)}")
    if task.method == "chain":
        return "\n".join(lines)
    return "\n".join([*lines, "答案：" if chinese else "Answer:"])


# ---- planning


def plan(
    path: str | Path,
    *,
    name: str | None = None,
    options: ReadOptions | None = None,
    kind: Kind | None = None,
    method: Method | None = None,
    columns: Columns | None = None,
    prompt: str = "",
    reference: str = "",
    template: str = "",
    system: str = "",
    labels: Sequence[str] = (),
    few_shot: int = 0,
    few_shot_file: str | Path | None = None,
    chosen: Sequence[str] = (),
    settings: GenerationSettings | None = None,
    limit: int | None = None,
) -> EvaluationTask:
    """What would be asked of this labelled file, without a model yet; GLMError for what cannot be asked.

    name      how the file is called on screen
    columns   as for a training; prompt and reference name only these two
    template  the question, {column} is a cell; default: the prompt column, or the question with its options
    labels    the allowed answers; default: those of the file
    few_shot  so many solved examples before every question, of few_shot_file (of the same subject where both files
              say one), else the first rows of the file, which then are not asked
    chosen    the metrics; default: all of the kind
    settings  how answers are decoded; default: greedily, as many tokens as the kind needs
    """
    from ..engine import GenerationSettings

    source = Path(path)
    options = options or ReadOptions()
    table = open_table(source, options, name)
    have = table.info.columns
    found = _columns(table, columns, prompt, reference, kind)
    kind = kind or guess_kind(have, table.rows(), found.response)
    if kind not in KINDS:
        raise GLMError(f"There is no kind of task {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    method = method or METHODS[kind][0]
    if method not in METHODS[kind]:
        raise GLMError(
            f"The answers of a task of kind {kind!r} cannot be found by {method!r}.",
            f"Choose one of {', '.join(METHODS[kind])}.",
        )
    if settings is None:
        settings = GenerationSettings(max_new_tokens=LONGEST[kind])
    settings.check()
    task = EvaluationTask(
        kind=kind, method=method, input_name=table.info.name, input_path=str(source.resolve()),
        input_sha256=batch.file_sha256(source), columns=have, prompt=found.prompt, reference=found.response,
        metrics=known_metrics(kind, chosen), settings=settings, system=system, history=found.history or "",
        input=found.input or "", alpaca=found.alpaca,
        options=option_columns(have) if kind == "choice" else (),
        subject=_named(have, SUBJECTS) if kind == "choice" else "",
        read_options=options.to_json(), limit_rows=limit,
    )  # fmt: skip
    if kind == "choice" and not task.options:
        raise GLMError(
            f"{task.input_name} has no columns A, B, C ... with the options; it has {', '.join(have)}.",
            "Name the columns of the options A, B, C and so on.",
        )
    chinese = _is_chinese(task, table)
    task = replace(task, template=template or default_template(task, chinese))
    if method == "chain":
        wording = EXTRACTION["zh" if chinese else "en"]
        task = replace(task, extraction=wording.replace("{letters}", "".join(task.letters)))
    batch.Template(task.template, task.cells)
    if kind == "label":
        task = replace(task, labels=_labels(task, table, labels))
    if few_shot:
        task = _with_shots(task, few_shot, few_shot_file, table)
    return task


def known_metrics(kind: Kind, chosen: Sequence[str]) -> tuple[str, ...]:
    """The metrics to compute, in their usual order; GLMError for one the kind does not have."""
    for one in chosen:
        if one in METRICS[kind]:
            continue
        if kind != "text" and one in TEXT_METRICS:
            raise GLMError(
                f"{one} compares words and says nothing about answers of kind {kind!r}.",
                f"Choose from {', '.join(METRICS[kind])}.",
            )
        raise GLMError(
            f"A task of kind {kind!r} has no metric {one!r}.", f"Choose from {', '.join(METRICS[kind])}."
        )
    wanted = {*chosen, MAIN[kind]} if chosen else set(METRICS[kind])
    return tuple(one for one in METRICS[kind] if one in wanted)


def _columns(
    table: Table, columns: Columns | None, prompt: str, reference: str, kind: Kind | None
) -> Columns:
    have = table.info.columns
    if columns is None:
        columns = guess_columns(have, kind)
        if prompt or reference:
            plain = Columns(
                prompt or (columns.prompt if columns else ""),
                reference or (columns.response if columns else ""),
            )
            # Chosen columns are what they are: an Alpaca wording belongs to the guessed pair.
            columns = (
                plain if columns is None or plain != Columns(columns.prompt, columns.response) else columns
            )
    if columns is None or not columns.prompt or not columns.response:
        raise GLMError(
            f"The columns of {table.info.name} do not say which is the prompt and which the response; it has"
            f" {', '.join(excerpt(one, 30) for one in have[:30])}.",
            "Choose both columns.",
        )
    for wanted in (columns.prompt, columns.response, columns.history, columns.input):
        if wanted and wanted not in have:
            raise GLMError(
                f"{table.info.name} has no column {wanted!r}; it has {', '.join(excerpt(one, 30) for one in have[:30])}.",
                "Choose one of these columns, or rename the column in the file.",
            )
    return columns


def _is_chinese(task: EvaluationTask, table: Table) -> bool:
    place = task.columns.index(task.prompt)
    return any(_CHINESE.search(row[place]) for row in table.preview(20))


def _labels(task: EvaluationTask, table: Table, chosen: Sequence[str]) -> tuple[str, ...]:
    """The labels by their first spelling: those chosen, else those of the file."""
    if chosen:
        return tuple(answers.spellings(one for one in chosen if one.strip()).values())
    place = task.columns.index(task.reference)
    found: Counter[str] = Counter()
    for row in table.rows():
        if row[place].strip():
            found[row[place].strip()] += 1
            if len(found) > 20 * examples.MOST_LABELS:
                break
    labels = tuple(answers.spellings(found).values())
    if len(labels) > examples.MOST_LABELS:
        raise GLMError(
            f"The column {task.reference!r} has more than {examples.MOST_LABELS} different values, so they are no labels.",
            "Choose the kind text, or another column.",
        )
    if not labels:
        raise GLMError(
            f"The column {task.reference!r} of {task.input_name} is empty.",
            "Choose the column with the labels.",
        )
    return labels


def _with_shots(task: EvaluationTask, count: int, file: str | Path | None, table: Table) -> EvaluationTask:
    """The task with solved examples; GLMError where the file has too few."""
    if count < 0:
        raise GLMError(f"{count} examples cannot be shown.", "Choose 0 or more.")
    source, own = table, file is None
    shown = replace(task, limit_rows=None, shot_rows=())
    if file is not None:
        source = open_table(Path(file))
        needed = [
            one for one in (task.prompt, task.reference, *task.options) if one not in source.info.columns
        ]
        if needed:
            raise GLMError(
                f"{source.info.name} has no column {needed[0]!r}; it has {', '.join(source.info.columns)}.",
                "The examples need the same columns as the questions.",
            )
        shown = replace(
            shown, columns=source.info.columns,
            subject=task.subject if task.subject in source.info.columns else "",
            template=_moved(task, source.info.columns),
        )  # fmt: skip
    template = batch.Template(shown.template, shown.cells)
    by_subject = bool(shown.subject) and not own
    found: list[tuple[str, str, str]] = []
    numbers: list[int] = []
    taken: Counter[str] = Counter()
    for row in rows_of(shown, source):
        subject = row.cells[shown.columns.index(shown.subject)] if by_subject else ""
        if taken[subject] < count:
            taken[subject] += 1
            found.append((subject, template.render(row.cells), shot_answer(shown, row.cells)))
            numbers.append(row.number)
        elif not by_subject:
            break
    if len(found) < count:
        raise GLMError(
            f"{source.info.name} has {plural(len(found), 'usable row')} for {count} examples.",
            "Choose fewer examples, or a larger file.",
        )
    return replace(
        task, few_shot=count, shots=tuple(found), few_shot_name="" if own else source.info.name,
        few_shot_sha256="" if own or file is None else batch.file_sha256(Path(file)),
        shot_rows=tuple(numbers) if own else (),
    )  # fmt: skip


def _moved(task: EvaluationTask, columns: tuple[str, ...]) -> str:
    """The template for a file with the same columns in another order."""
    other = replace(task, columns=columns)
    if task.template == default_template(task, True):
        return default_template(other, True)
    if task.template == default_template(task, False):
        return default_template(other, False)
    return task.template


def shot_answer(task: EvaluationTask, cells: Sequence[str]) -> str:
    """The answer of a solved example: the reference as the file has it, and a letter or label as it is scored."""
    return cells[len(task.columns) + EXTRA.index("reference")]


# ---- rows


class Left(Counter[str]):
    """How many rows were left out, by the reason."""


def rows_of(task: EvaluationTask, table: Table, left: Left | None = None) -> Iterator[Row]:
    """The rows to ask, with their references; rows without a prompt or a reference are counted in `left`.

    GLMError where a reference is not one of the options or labels, or holds no number.
    """
    at = {name: task.columns.index(name) for name in (task.prompt, task.reference) if name}
    shown = set(task.shot_rows)
    by_key = {answers.label_key(label): label for label in task.labels}
    left = Left() if left is None else left
    number = taken = 0
    for cells in table.rows():
        number += 1
        if number in shown:
            left["example"] += 1
            continue
        if task.limit_rows is not None and taken >= task.limit_rows:
            break
        if not any(cell.strip() for cell in cells):
            continue
        taken += 1
        for question, history, reference in _asked(task, cells, at, number):
            if task.prompt and not question.strip():
                left["prompt"] += 1
            elif not reference.strip() and task.method != "imported":
                left["reference"] += 1
            else:
                if reference.strip():
                    reference = _reference(task, cells, reference, number, by_key)
                asked = question if task.alpaca or task.prompt == task.reference else ""
                yield Row(number, (*cells, str(number), reference, asked, history))


def _asked(
    task: EvaluationTask, cells: Sequence[str], at: Mapping[str, int], number: int
) -> Iterator[tuple[str, str, str]]:
    """(question, earlier rounds as JSON or "", reference) of a row; several where it holds a conversation."""
    import json

    if task.prompt and task.prompt == task.reference:
        cell = cells[at[task.prompt]]
        turns = examples.read_turns(examples.read_value(cell)) if cell.strip() else ("", [])
        if turns is None:
            raise GLMError(
                f"The conversation in row {number:,} cannot be read.",
                'Write it as messages that take turns: [{"role": "user", "content": "..."},'
                ' {"role": "assistant", "content": "..."}].',
            )
        system, texts = turns
        texts = [f"{system}\n{texts[0]}", *texts[1:]] if system and texts else texts
        rounds = list(zip(texts[::2], texts[1::2], strict=False))
        for i, (asked, told) in enumerate(rounds):
            yield asked, json.dumps(rounds[:i], ensure_ascii=False) if i else "", told
        return
    question = cells[at[task.prompt]] if task.prompt else ""
    history = ""
    if task.history:
        found = examples.read_history(cells[task.columns.index(task.history)])
        if found is None:
            raise GLMError(
                f"The history in row {number:,} cannot be read.",
                'Write it as a list of pairs: [["question", "answer"], ...].',
            )
        history = json.dumps(found, ensure_ascii=False) if found else ""
    if task.alpaca and question.strip():
        question = examples.alpaca_prompt(
            question, cells[task.columns.index(task.input)] if task.input else ""
        )
    yield question, history, cells[at[task.reference]]


def _reference(
    task: EvaluationTask, cells: Sequence[str], text: str, number: int, by_key: Mapping[str, str]
) -> str:
    """The correct answer of a row as predictions are compared with it."""
    if task.kind == "label":
        if (label := by_key.get(answers.label_key(text))) is None:
            raise GLMError(
                f"The label {excerpt(text.strip(), 40)!r} in row {number:,} is not among {', '.join(task.labels)}.",
                "Name every label, or leave the row out.",
            )
        return label
    if task.kind == "choice" and task.options:
        texts = [cells[task.columns.index(column)] for column in task.options]
        letters = [letter for letter, option in zip(task.letters, texts, strict=True) if option.strip()]
        letter = answers.option_reference(text, task.letters, texts)
        if letter is None or letter not in letters:
            raise GLMError(
                f"The answer {excerpt(text.strip(), 40)!r} in row {number:,} is none of the options"
                f" {', '.join(letters) or 'of the file'}.",
                "Write the letter of the correct option.",
            )
        return letter
    if task.kind == "choice":
        letter = answers.option_reference(text, "ABCDEFGHIJ"[:MOST_OPTIONS])
        if letter is None:
            raise GLMError(
                f"The answer {excerpt(text.strip(), 40)!r} in row {number:,} is no letter of an option.",
                "Choose another kind, or another column.",
            )
        return letter
    if task.kind == "number" and answers.number_of(text) is None:
        raise GLMError(
            f"The answer in row {number:,} holds no number: {excerpt(text.strip(), 40)!r}.",
            "Choose the kind text, or another column.",
        )
    return text


# ---- the model


def with_model(
    task: EvaluationTask,
    checkpoint: str | Path,
    base: str | Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    generation: str = "",
    concurrency: int | None = None,
    key_env: str = "",
) -> EvaluationTask:
    """The task with a checkpoint to ask, checked without loading its weights; GLMError where it cannot be asked.

    base                   of an adapter; default: what the adapter names
    concurrency, key_env   of a server, in place of what is kept with its name
    """
    from .. import checkpoints
    from ..remote import is_remote
    from .questions import Questions

    if is_remote(checkpoint):
        return _with_server(task, str(checkpoint), concurrency, key_env)
    folder = Path(checkpoint)
    info = checkpoints.inspect(folder)
    if info.problems:
        raise GLMError(
            f"{folder} cannot be loaded. {' '.join(info.problems)}", "Repair the folder or choose another."
        )
    under = checkpoints.base_of(info, base) if info.needs_base else info
    device = checkpoints.best_device() if device == "auto" else device
    longest = min(task.settings.max_new_tokens, max(1, under.context // 2))
    found = replace(
        task,
        settings=replace(task.settings, max_new_tokens=longest),
        checkpoint=str(folder),
        checkpoint_fingerprint=checkpoints.fingerprint(folder, under.path if info.needs_base else None),
        precision=checkpoints.best_precision(under, device) if precision == "auto" else precision,
        device=device,
        generation=generation or under.generation,
        base=str(under.path) if info.needs_base else "",
        versions=batch.versions(),
    )
    tokenizer = checkpoints.load_tokenizer(under.path, found.generation)
    Questions(tokenizer, found, under.context)
    return found


def _with_server(
    task: EvaluationTask, spec: str, concurrency: int | None = None, key_env: str = ""
) -> EvaluationTask:
    """The task with a server's model to ask; GLMError where the server is not there or gives too little."""
    from ..remote import connect, find
    from ..remote.labels import way_for
    from .questions import Questions

    engine = connect(find(spec, key_env, concurrency))
    try:
        record = engine.record()
        if task.method in ("likelihood", "chain"):
            answers = list(task.labels or task.letters)
            record["labels"] = way_for(engine, task.kind != "choice", answers)
            if record["labels"] == "greedy":
                raise GLMError(
                    f"{engine.remote.label} gives no probabilities, so there is no likeliest answer to take.",
                    "Let the model write its answer instead.",
                )
        remote, tokenizer, context = engine.remote, engine.tokenizer, engine.context
    finally:
        engine.close()
    found = replace(
        task,
        checkpoint=remote.spec,
        checkpoint_fingerprint=remote.fingerprint,
        precision="remote",
        device=remote.host,
        generation="remote",
        base="",
        versions=batch.versions(),
        remote=record,
    )
    Questions(tokenizer, found, context)
    return found


def same_question(a: EvaluationTask, b: EvaluationTask) -> list[str]:
    """What the prompts of two tasks differ in, as names of fields; empty where they are the same."""
    if "imported" in (a.method, b.method):
        return []
    names = ("template", "system", "shots", "prompt", "history", "input", "alpaca", "method", "extraction")
    return [name for name in names if getattr(a, name) != getattr(b, name)]


def differing(a: EvaluationTask, b: EvaluationTask) -> dict[str, tuple[Any, Any]]:
    """What two tasks differ in, by name; paths and what follows from other fields left out."""
    from ..remote import shown

    left = {"input_path", "checkpoint_fingerprint", "read_options", "columns", "shot_rows", "remote"}
    found: dict[str, tuple[Any, Any]] = {}
    for one in fields(a):
        values = getattr(a, one.name), getattr(b, one.name)
        if one.name in left or values[0] == values[1]:
            continue
        if one.name in ("settings", "versions"):
            parts = [asdict(value) if one.name == "settings" else value for value in values]
            found |= {
                key: (parts[0].get(key), parts[1].get(key))
                for key in dict.fromkeys([*parts[0], *parts[1]])
                if parts[0].get(key) != parts[1].get(key)
            }
        elif one.name in ("checkpoint", "base"):
            found[one.name] = (shown(values[0]), shown(values[1]))
        else:
            found[one.name] = values
    return found
