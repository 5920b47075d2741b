"""Training examples from the analyst's files: which columns, which rows, and everything wrong with them at once."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..errors import GLMError, TableError
from ..tables import ReadOptions, Table, open_table
from ..tables.options import client_name, excerpt, listed, plural
from ..tables.sniffing import open_text

Severity = Literal["stop", "warn", "note"]
Layout = Literal["context-target", "text"]

KEPT_LINES = 100  # line numbers kept with a problem; a message names fewer
MOST_LABELS = 50  # different responses that may still be classes
LONGEST_LABEL = 40  # characters
RESYNC_LINES = 10_000  # lines looked through for the next record after rows were left out

# (prompt, response) by the names that data sets use; the first pair that a file has is taken.
KNOWN_PAIRS = (
    ("content", "summary"),  # ADGEN
    ("content", "label"),  # SpamClassify
    ("instruction", "output"),  # Alpaca
    ("context", "target"),  # Alpaca as ChatGLM-Tuning converts it
    ("prompt", "response"), ("prompt", "completion"), ("prompt", "answer"), ("prompt", "output"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("instruction", "response"), ("input", "output"), ("input", "target"), ("source", "target"),
    ("text", "label"), ("comment", "label"), ("sentence", "label"), ("review", "label"), ("message", "label"),
    ("title", "label"), ("q", "a"),
    ("问题", "回答"), ("问题", "答案"), ("提问", "回答"), ("提示", "回答"), ("指令", "输出"), ("输入", "输出"),
    ("内容", "摘要"), ("内容", "标签"), ("文本", "标签"), ("评论", "标签"), ("正文", "标签"),
)  # fmt: skip
ALPACA = {("instruction", "output"): "input", ("指令", "输出"): "输入"}
HISTORIES = ("history", "对话历史", "历史")
CONVERSATIONS = ("messages", "conversations", "conversation", "对话")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip

_WHOLE = re.compile(r"[+-]?\d+(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_DECIMAL_ZERO = re.compile(r"[+-]?\d+\.0+")
_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the answer to learn, after the rounds before it.

    line   where it stands: the line of a text file (of its first one, where cells hold line breaks), the row of a
           sheet with the header as row 1, the number of the record in a JSON document; 0 where it is in no file
    """

    prompt: str
    response: str
    history: tuple[tuple[str, str], ...] = ()
    line: int = 0


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    prompt, response   the same column for both where it holds whole conversations
    history            earlier rounds
    alpaca             the prompt is an Alpaca instruction: worded, with `input`, as `alpaca_prompt` does
    """

    prompt: str
    response: str
    history: str | None = None
    input: str | None = None
    alpaca: bool = False


@dataclass(frozen=True)
class Problem:
    """Something found in the data: "stop" prevents training, "warn" may spoil it, "note" tells what was done.

    lines   the first of the places, numbered as in `Example.line`
    count   how many there are in all
    """

    severity: Severity
    message: str
    todo: str = ""
    lines: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Loaded:
    """What `read` found. `columns` is None where it could not be told; `rows` counts the rows of the file."""

    examples: tuple[Example, ...]
    columns: Columns | None
    problems: tuple[Problem, ...] = ()
    rows: int = 0
    name: str = ""
    table_columns: tuple[str, ...] = ()

    @property
    def stops(self) -> tuple[Problem, ...]:
        """The problems that prevent training."""
        return tuple(problem for problem in self.problems if problem.severity == "stop")

    def checked(self) -> tuple[Example, ...]:
        """The examples; GLMError with all the problems that prevent training, where there are any."""
        if stops := self.stops:
            raise GLMError(
                " ".join(problem.message for problem in stops),
                " ".join(dict.fromkeys(problem.todo for problem in stops if problem.todo)),
            )
        return self.examples


def guess_columns(columns: Sequence[str]) -> Columns | None:
    """The columns by their names, upper or lower case; None where they say nothing."""
    by_name = {column.strip().casefold(): column for column in reversed(columns)}
    history = next((by_name[name] for name in HISTORIES if name in by_name), None)
    for pair in KNOWN_PAIRS:
        if pair[0] in by_name and pair[1] in by_name:
            alpaca = pair in ALPACA
            extra = by_name.get(ALPACA[pair]) if alpaca else None
            return Columns(by_name[pair[0]], by_name[pair[1]], history, extra, alpaca)
    for name in CONVERSATIONS:
        if name in by_name:
            return Columns(by_name[name], by_name[name])
    return None


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """An Alpaca instruction as ChatGLM-Tuning words it. Source: its `format_example`."""
    middle = f"Input: {input}\n" if input else ""
    return f"Instruction: {instruction}\n{middle}Answer: "


def labels_of(responses: Sequence[str]) -> Counter[str] | None:
    """How often each class occurs, where the responses are classes: at most 50 short ones, over two rows each."""
    counts: Counter[str] = Counter()
    for response in responses:
        counts[response] += 1
        if len(counts) > MOST_LABELS:
            return None
    if len(responses) <= 2 * len(counts) or any(len(label) > LONGEST_LABEL for label in counts):
        return None
    return counts


def read(
    path: str | Path,
    columns: Columns | None = None,
    options: ReadOptions | None = None,
    limit: int | None = None,
    name: str | None = None,
    training: bool = True,
) -> Loaded:
    """Read examples from a table of any format; everything wrong with it is in `problems`, nothing is raised.

    columns   None: told from the names
    limit     take no more than this many rows
    name      how messages call the file
    training  the rows are to be learned from; False for those to measure with, which may be of one class
    Rows without a prompt or a response are left out, as by the released scripts. A conversation of several rounds
    gives one example per answer. Numbers in the response column stay as they are written, but where all of them
    are whole and some are written 0.0, they become 0.
    """
    source = Path(path)
    shown = client_name(name if name is not None else source.name)
    reader = _Reader(shown, columns, limit, training)
    options = options or ReadOptions()
    try:
        reader.take(source, open_table(source, options, name))
    except (TableError, OSError) as error:
        reader = _Reader(shown, columns, limit, training)
        reader.problems.append(Problem("stop", *_said(error, shown)))
        if options.on_bad_rows == "stop" and isinstance(error, TableError):
            try:  # what else is wrong is to be said at once
                reader.take(
                    source, open_table(source, replace(options, on_bad_rows="skip"), name), quiet=True
                )
            except TableError:
                reader.finish(partly=True)
    return reader.loaded()


def convert_alpaca(source: str | Path, target: str | Path, layout: Layout = "context-target") -> int:
    """Write an Alpaca file (instruction, input, output) as JSON Lines and return their number.

    layout   "context-target": {"context", "target"} as ChatGLM-Tuning trains on; "text": {"text"}, question and
             answer in one, as its first version did
    GLMError with everything that is wrong with the source. Source: cover_alpaca2jsonl.py of ChatGLM-Tuning.
    """
    if layout not in ("context-target", "text"):
        raise GLMError(f"There is no layout {layout!r}.", "Choose context-target or text.")
    source, target = Path(source), Path(target)
    table = open_table(source)
    columns = guess_columns(table.info.columns)
    if columns is None or not columns.alpaca:
        raise GLMError(
            f"{table.info.name} has no columns instruction and output; it has {_names(table.info.columns)}.",
            "Choose an Alpaca file: instruction, output and, where there is one, input.",
        )
    plain = read(source, replace(columns, alpaca=False, input=None))
    plain.checked()
    at = [table.info.columns.index(column) for column in (columns.prompt, columns.response)]
    extra = table.info.columns.index(columns.input) if columns.input else None
    beside = target.with_name(target.name + ".part")
    written = 0
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for row in table.rows():
                asked, told = (row[i] for i in at)
                if not (asked.strip() and told.strip()):
                    continue
                given = row[extra] if extra is not None else ""
                if layout == "text":
                    middle = f"### Input:\n{given}\n\n" if given else ""
                    line = {"text": f"### Instruction:\n{asked}\n\n{middle}### Response:\n{told}\nEND\n"}
                else:
                    line = {"context": alpaca_prompt(asked, given), "target": told}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
        beside.replace(target)
    except OSError as error:
        raise GLMError(f"{target} could not be written: {error}.", "Choose another folder.") from error
    finally:
        beside.unlink(missing_ok=True)
    return written


# --- one file ---------------------------------------------------------------------------------------------------


@dataclass
class _Places:
    """Rows of one kind: how many, and where the first of them are."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < KEPT_LINES:
            self.lines.append(line)


class _Reader:
    """Collects the examples of one table and what is wrong with it."""

    def __init__(self, name: str, columns: Columns | None, limit: int | None, training: bool) -> None:
        self.name, self.columns, self.limit, self.training = name, columns, limit, training
        self.problems: list[Problem] = []
        self.examples: list[Example] = []
        self.rows = 0
        self.unit = "line"
        self.table_columns: tuple[str, ...] = ()
        self.no_prompt, self.no_response, self.no_history = _Places(), _Places(), _Places()
        self.no_turns, self.unanswered, self.systems = _Places(), _Places(), _Places()
        self.halves = _Places()

    def take(self, path: Path, table: Table, quiet: bool = False) -> None:
        """Read all rows; TableError where the table ends in something that cannot be read.

        quiet   say nothing about rows that the table left out
        """
        self.table_columns = table.info.columns
        self.unit = {"xlsx": "row", "xls": "row", "parquet": "row", "json": "record"}.get(
            table.info.format, "line"
        )
        self.problems += [
            Problem("note", sentence)
            for sentence in table.info.warnings
            if not sentence.startswith("There are no rows")
        ]
        known = self._known_columns()
        for line, row in _placed(path, table):
            if not any(row):
                continue
            self.rows += 1
            if known is not None and (self.limit is None or self.rows <= self.limit):
                try:
                    "".join(row).encode()
                except UnicodeEncodeError:
                    self.halves.add(line)
                    row = tuple(_whole(cell) for cell in row)
                self._add(row, line, known)
        told = set(table.info.warnings)
        if not quiet:
            self.problems += [
                Problem("warn", sentence) for sentence in table.warnings if sentence not in told
            ]
        self.finish()

    def _known_columns(self) -> Columns | None:
        """The columns to read, None where some are missing."""
        have = self.table_columns
        if self.columns is None:
            self.columns = guess_columns(have)
            if self.columns is None and [name.strip().casefold() for name in have] == ["text"]:
                self._stop(
                    f"{self.name} has only the column {have[0]!r}, in which question and answer stand together.",
                    "Give the file it was made from (instruction, input, output); it is read as it is, and"
                    " glm_core.finetune.examples.convert_alpaca writes it as context and target.",
                )
            elif self.columns is None:
                self._stop(
                    f"The columns of {self.name} do not say which is the prompt and which the response; it has"
                    f" {_names(have)}.",
                    "Choose both columns.",
                )
            return self.columns
        wanted = (self.columns.prompt, self.columns.response, self.columns.history, self.columns.input)
        missing = [name for name in dict.fromkeys(wanted) if name is not None and name not in have]
        for name in missing:
            self._stop(
                f"{self.name} has no column {name!r}; it has {_names(have)}.",
                "Choose one of these columns, or rename the column in the file.",
            )
        return None if missing else self.columns

    def _add(self, row: tuple[str, ...], line: int, columns: Columns) -> None:
        have = self.table_columns
        prompt = row[have.index(columns.prompt)]
        if columns.prompt == columns.response:
            self._add_conversation(prompt, line)
            return
        response = row[have.index(columns.response)]
        if not prompt.strip():
            self.no_prompt.add(line)
            if not response.strip():
                self.no_response.add(line)
            return
        if not response.strip():
            self.no_response.add(line)
            return
        history: tuple[tuple[str, str], ...] = ()
        if columns.history is not None:
            found = read_history(row[have.index(columns.history)])
            if found is None:
                self.no_history.add(line)
                return
            history = found
        if columns.alpaca:
            prompt = alpaca_prompt(prompt, row[have.index(columns.input)] if columns.input else "")
        self.examples.append(Example(prompt, response, history, line))

    def _add_conversation(self, cell: str, line: int) -> None:
        if not cell.strip():
            self.no_prompt.add(line)
            return
        turns = read_turns(read_value(cell))
        if turns is None or len(turns[1]) < 2:
            self.no_turns.add(line)
            return
        system, texts = turns
        if system:
            self.systems.add(line)
            texts = [f"{system}\n{texts[0]}", *texts[1:]]
        if len(texts) % 2:
            self.unanswered.add(line)
            texts = texts[:-1]
        rounds = list(zip(texts[::2], texts[1::2], strict=True))
        if any(not asked.strip() for asked, _ in rounds):
            self.no_prompt.add(line)
        elif any(not told.strip() for _, told in rounds):
            self.no_response.add(line)
        else:
            for i, (asked, told) in enumerate(rounds):
                self.examples.append(Example(asked, told, tuple(rounds[:i]), line))

    def finish(self, partly: bool = False) -> None:
        """Turn what was counted into problems, and numbers into texts.

        partly   the rest of the file cannot be read, so that nothing can be said about all rows
        """
        if self.limit is not None and self.rows > self.limit:
            self.problems.append(
                Problem(
                    "warn",
                    f"{self.name} has {plural(self.rows, 'row')}; the first {self.limit:,} are used.",
                    "Raise the limit to use all.",
                    count=self.rows - self.limit,
                )
            )
        self._places("warn", self.no_prompt, "Left out: {rows} without a prompt ({where}).")
        self._places("warn", self.no_response, "Left out: {rows} without a response ({where}).")
        self._places(
            "stop", self.no_history, "The history cannot be read in {rows} ({where}).",
            'Write it as a list of pairs: [["question", "answer"], ...].',
        )  # fmt: skip
        self._places(
            "stop", self.no_turns, "The conversation cannot be read in {rows} ({where}).",
            'Write it as messages that take turns: [{"role": "user", "content": "..."},'
            ' {"role": "assistant", "content": "..."}].',
        )  # fmt: skip
        self._places(
            "warn", self.unanswered, "The last question has no answer in {rows} ({where}); it is left out."
        )
        self._places(
            "note", self.systems, "The system message was put before the first question in {rows} ({where})."
        )
        self._places("warn", self.halves, "Half a character was read as \ufffd in {rows} ({where}).")
        if partly or self._explained():
            return
        if not self.examples:
            empty = self.rows == 0
            self._stop(
                f"{self.name} has no rows below its header." if empty
                else f"{self.name} has {plural(self.rows, 'row')}, but none with a prompt and a response.",
                "Choose a file with rows." if empty else "Choose other columns, or fill them in.",
            )  # fmt: skip
            return
        self._numbers()
        responses = {example.response.strip() for example in self.examples}
        if self.training and len(responses) == 1 and len(self.examples) > 1:
            self._stop(
                f"All {len(self.examples):,} responses are {excerpt(self.examples[0].response)!r}: with one class"
                " there is nothing to learn.",
                "Add rows of the other classes, or choose another response column.",
            )

    def _explained(self) -> bool:
        """Whether it is known already why there are no examples."""
        return not self.examples and any(problem.severity == "stop" for problem in self.problems)

    def _numbers(self) -> None:
        """Labels that a program wrote as 0.0 and 1.0: whole numbers again, or a problem."""
        numbered = [i for i, one in enumerate(self.examples) if _DECIMAL_ZERO.fullmatch(one.response.strip())]
        if not numbered or self.columns is None or self.columns.prompt == self.columns.response:
            return
        column = self.columns.response
        others = _Places()
        are_numbers = True
        other = ""
        for example in self.examples:
            text = example.response.strip()
            if not _WHOLE.fullmatch(text):
                other = other or text
                others.add(example.line)
                are_numbers = are_numbers and bool(_NUMBER.fullmatch(text))
        if not others.count:
            shown: dict[str, str] = {}
            for i in numbered:
                example = self.examples[i]
                text = example.response.strip()
                whole = text.partition(".")[0].removeprefix("+")
                whole = "0" if whole.strip("0") == "-" else whole
                shown.setdefault(text, whole)
                self.examples[i] = replace(example, response=whole)
            pairs = ", ".join(f"{was} → {now}" for was, now in list(shown.items())[:4])
            self.problems.append(
                Problem(
                    "note",
                    f"The column {column!r} holds whole numbers written with decimals; they are learned without:"
                    f" {pairs} ({plural(len(numbered), 'row')}).",
                    "Write the column as text if the decimals are meant.",
                    tuple(self.examples[i].line for i in numbered[:KEPT_LINES]),
                    len(numbered),
                )
            )
        elif are_numbers or labels_of([example.response for example in self.examples]) is not None:
            first = self.examples[numbered[0]].response.strip()
            self.problems.append(
                Problem(
                    "stop",
                    f"The column {column!r} mixes {first} with {excerpt(other, 30)!r}"
                    f" ({self.unit} {listed(others.lines, others.count)}): what the model is to answer is not clear.",
                    "Write every response as the text to be learned, for example 0 and 1.",
                    tuple(others.lines),
                    others.count,
                )
            )

    def _stop(self, message: str, todo: str) -> None:
        self.problems.append(Problem("stop", message, todo))

    def _places(self, severity: Severity, places: _Places, sentence: str, todo: str = "") -> None:
        if places.count:
            where = f"{self.unit} {listed(places.lines, places.count)}"
            message = sentence.replace("{rows}", plural(places.count, "row")).replace("{where}", where)
            self.problems.append(Problem(severity, message, todo, tuple(places.lines), places.count))

    def loaded(self) -> Loaded:
        examples = tuple(self.examples)
        return Loaded(examples, self.columns, tuple(self.problems), self.rows, self.name, self.table_columns)


def _names(columns: Sequence[str]) -> str:
    shown = ", ".join(excerpt(name, 30) for name in columns[:30])
    return f"{shown} and {len(columns) - 30} more" if len(columns) > 30 else shown


def _whole(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _said(error: TableError | OSError, name: str) -> tuple[str, str]:
    if isinstance(error, GLMError):
        return error.message, error.todo
    return (
        f"{name} cannot be opened: {error.strerror or error}.",
        "Check the path, and that you may read the file.",
    )


# --- where rows stand -------------------------------------------------------------------------------------------


def _placed(path: Path, table: Table) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows of a table, each with the line or number by which its owner finds it."""
    if table.info.format == "jsonl":
        return zip(_json_lines(path, table), table.rows(), strict=False)
    if table.info.format == "csv":
        return _text_rows(path, table)
    return enumerate(
        table.rows(), start=1 if table.info.format == "json" or not table.info.options.header else 2
    )


def _json_lines(path: Path, table: Table) -> Iterator[int]:
    """Lines that hold a record; faulty ones do not count where the table leaves them out."""
    skipping = table.info.options.on_bad_rows == "skip"
    with open_text(path, table.info.encoding) as stream:
        for number, line in enumerate(stream, start=1):
            text = line.strip(" \t\r\n\ufeff")
            if not text:
                continue
            if skipping:
                try:
                    json.loads(text)
                except (ValueError, RecursionError):
                    continue
            yield number


def _text_rows(path: Path, table: Table) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Rows of a delimited file with their first line: the next line that begins as the first cell does.

    A record of n line breaks takes n + 1 lines, so this looks on only behind blank lines and rows left out. Where
    no such line comes, the rest is counted.
    """
    with open_text(path, table.info.encoding) as stream:
        lines = _Lines(enumerate(stream, start=1), table.info.delimiter)
        if table.info.options.header:
            lines.pass_header(table.info.columns)
        for row in table.rows():
            yield lines.find(row), row


class _Lines:
    """The lines of a text file, to be matched with the records that were read from them."""

    def __init__(self, lines: Iterator[tuple[int, str]], delimiter: str) -> None:
        self._lines, self._delimiter = lines, delimiter
        self._last = 0  # line on which the last record ends
        self._counting = False

    def pass_header(self, columns: Sequence[str]) -> None:
        for number, line in self._lines:
            text = line.removeprefix("\ufeff").strip()
            if text and not (number == 1 and text.lower().startswith("sep=")):
                self._last = number
                break
        self._pass(columns)

    def find(self, row: Sequence[str]) -> int:
        """The line a record begins on."""
        number = self._last + 1
        if not self._counting:
            for found, line in islice(self._lines, RESYNC_LINES):
                if self._begins(line, row[0]):
                    number = found
                    break
            else:
                self._counting = True
        self._last = number
        self._pass(row)
        return number

    def _pass(self, row: Sequence[str]) -> None:
        breaks = sum(len(_BREAK.findall(cell)) for cell in row if "\n" in cell or "\r" in cell)
        self._last += breaks
        if breaks and not self._counting:
            next(islice(self._lines, breaks - 1, None), None)

    def _begins(self, line: str, cell: str) -> bool:
        text = line.removeprefix("\ufeff")
        if not cell:
            text = text.lstrip(" ").removeprefix('""').lstrip(" ")
            return text.startswith(self._delimiter) if self._delimiter else False
        start = _BREAK.split(cell, maxsplit=1)[0][:60] if cell[:1] not in "\r\n" else '"'
        return text.startswith(start) or text.lstrip(" ").startswith('"' + start.replace('"', '""'))


# --- cells that hold several turns ------------------------------------------------------------------------------


def read_value(cell: str) -> Any:
    """A list in a cell: JSON, or as Python prints it (which is how pandas writes lists into CSV); else None."""
    try:
        return json.loads(cell, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_history(cell: str) -> tuple[tuple[str, str], ...] | None:
    """Earlier rounds of a cell; None where it cannot be read."""
    if not cell.strip():
        return ()
    value = read_value(cell)
    if not isinstance(value, list | tuple):
        return () if cell.strip() == "null" else None
    if value and all(isinstance(one, dict) for one in value):
        turns = read_turns(value)
        if turns is None or len(turns[1]) % 2:
            return None
        system, texts = turns
        if system:
            texts = [f"{system}\n{texts[0]}", *texts[1:]]
        return tuple(zip(texts[::2], texts[1::2], strict=True))
    rounds = []
    for one in value:
        if not isinstance(one, list | tuple) or len(one) != 2:
            return None
        if not all(isinstance(text, str | int | float) for text in one):
            return None
        rounds.append((str(one[0]), str(one[1])))
    return tuple(rounds)


def read_turns(value: Any) -> tuple[str, list[str]] | None:
    """(system message, texts of user and assistant in turn) of {"role", "content"} or ShareGPT messages."""
    if not isinstance(value, list | tuple) or not value:
        return None
    system, texts = "", list[str]()
    for message in value:
        if not isinstance(message, dict):
            return None
        role = ROLES.get(str(message.get("role", message.get("from"))).casefold())
        content = message.get("content", message.get("value"))
        if role is None or not isinstance(content, str):
            return None
        if role == "system" and not texts and not system:
            system = content
        elif role == ("user", "assistant")[len(texts) % 2]:
            texts.append(content)
        else:
            return None
    return (system, texts) if texts else None
