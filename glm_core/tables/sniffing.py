"""Find out what a file is: its format, its encoding, its delimiter; by content, never by its extension."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.errors import TableError
from glm_core.tables.options import Format, ReadOptions, Source, printable

if TYPE_CHECKING:
    from _csv import Reader

ENCODINGS = ("utf-8", "gb18030", "big5", "utf-16", "cp1252", "cp1250", "cp1251", "shift_jis", "cp949")
DELIMITERS = ("\t", "|", ";", ",")  # on a tie the one that is rarer in prose wins
NO_DELIMITER = "\ufdd0"  # a noncharacter: what csv.reader splits on when there is one column
FIELD_LIMIT = 16 << 20  # characters in one cell
SAMPLE_RECORDS = 200
SAMPLE_CHARACTERS = 1 << 18
SAMPLE_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20

SAVE_AS_XLSX = "Open it in Excel, WPS or LibreOffice and save it as .xlsx (or as CSV UTF-8)."
CHOOSE_ENCODING = "Choose its encoding, or save it as CSV UTF-8."

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: it begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_REFUSED = (
    (b"%PDF", "a PDF", "Export the table from where it was made as .xlsx or CSV."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it first."),
    (b"Rar!", "a RAR archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first."),
    (b"ARROW1", "an Arrow or Feather file", "Save it as Parquet."),
    (b"SQLite format 3\0", "a SQLite database", "Export the table you need as CSV."),
    (b"\x89PNG", "a picture", "Give a table: CSV, Excel, JSON, JSONL or Parquet."),
    (b"\xff\xd8\xff", "a picture", "Give a table: CSV, Excel, JSON, JSONL or Parquet."),
)
_HTML = re.compile(rb"\s*<(!doctype\s+html|html|head|meta|body|table|script)\b", re.IGNORECASE)
_XML = re.compile(rb"\s*<\?xml\b")
_JSON_START = re.compile(r'\s*(\{\s*(["}]|$)|\[\s*([\[{"\]\d-]|true|false|null|$))')
_SEP_LINE = re.compile(r'"?sep=([^"\r\n])"?(\r\n|\r|\n)')  # Excel's own hint
_GB_CHARACTER = re.compile(rb"[\x81-\xfe](?:[\x30-\x39][\x81-\xfe][\x30-\x39]|[\x40-\x7e\x80-\xfe])")
_GB2312_CHARACTER = re.compile(rb"[\xa1-\xa9\xb0-\xf7][\xa1-\xfe]")
_GUESSES = ["cp1252", "cp1250", "cp1251", "big5", "shift_jis", "cp949", "euc_jp"]


# ---- format --------------------------------------------------------------------------------------------


def detect_format(source: Source) -> Format:
    """Return the format by magic bytes, then content; "csv" and "json" still have to prove themselves.

    Raises TableError for an empty file and for what is no table: archives, web pages, pictures.
    """
    try:
        with source.path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise TableError(
            f"{source.name} cannot be opened: {error.strerror or error}.", "Check that it is still there."
        ) from error
    if not head:
        raise TableError(f"{source.name} is empty.", "Choose a file with a header row and rows.")
    if head[:4] == b"PAR1":
        return "parquet"
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _zip_format(source)
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return "xls"
    for magic, what, todo in _REFUSED:
        if head.startswith(magic):
            raise TableError(f"{source.name} is {what}, not a table.", todo)
    text = head.removeprefix(codecs.BOM_UTF8)
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = text.replace(b"\0", b"")[2:]
    if _HTML.match(text) or text.startswith(b"MIME-Version:"):
        raise TableError(
            f"{source.name} is a web page (HTML), whatever its name says, not a spreadsheet.", SAVE_AS_XLSX
        )
    if _XML.match(text):
        raise TableError(f"{source.name} is an XML file, not a spreadsheet that can be read.", SAVE_AS_XLSX)
    return "csv"


def _zip_format(source: Source) -> Format:
    try:
        with zipfile.ZipFile(source.path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise TableError(
            f"{source.name} is a damaged Excel file or archive ({printable(str(error))}).",
            "Copy or download it again.",
        ) from error
    if "xl/workbook.xml" in names:
        return "xlsx"
    if "xl/workbook.bin" in names or "mimetype" in names:
        raise TableError(f"{source.name} is a spreadsheet, but neither .xlsx nor .xls.", SAVE_AS_XLSX)
    raise TableError(f"{source.name} is a ZIP archive, not a table.", "Unpack it and choose the file inside.")


def detect_text_format(source: Source, encoding: str) -> Format:
    """Return "csv", "json" or "jsonl" for a text file; TableError when it holds nothing but blanks."""
    with open_text(source.path, encoding) as stream:
        head = stream.read(4096)
        while head and not head.strip():
            head = stream.read(SAMPLE_CHARACTERS)
        if not head.strip("\ufeff \t\r\n"):
            raise TableError(f"{source.name} is empty.", "Choose a file with a header row and rows.")
        if not _JSON_START.match(head):
            return "csv"
    with open_text(source.path, encoding) as stream:
        lines = 0
        while line := stream.readline(FIELD_LIMIT):
            if not line.strip():
                continue
            if lines == 1:
                return "jsonl"
            try:
                value = json.loads(line, parse_int=str, parse_float=str)
            except (ValueError, RecursionError):
                return "json"
            if not isinstance(value, dict | list):
                return "json"
            lines = 1
    return "json"


# ---- encoding ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """How the bytes of a file become text; `note` is a sentence when that is not certain."""

    codec: str
    errors: str = "strict"
    note: str = ""

    @property
    def label(self) -> str:
        """The codec as ReadOptions takes it."""
        return self.codec if self.errors == "strict" else f"{self.codec}:{self.errors}"


def open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """Open a file as text with its line ends kept; `encoding` as in ReadOptions; a BOM stays out of it."""
    codec, _, errors = encoding.partition(":")
    return open(path, encoding=codec, errors=errors or "strict", newline="")


def detect_encoding(path: Path, encoding: str | None = None, name: str | None = None) -> str:
    """Return the encoding that reads the whole file: BOM, strict UTF-8, GB18030, then a guess.

    The file is streamed once through the decoder, so bytes far from its start count too; an `encoding` given
    is checked the same way. Raises TableError with the line of the first byte that cannot be read.
    """
    return find_encoding(Source(path, name or path.name, ReadOptions(encoding=encoding))).label


def find_encoding(source: Source) -> Encoding:
    """Return the encoding of a file with a note on how sure that is; TableError when none reads all of it."""
    with source.path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
    by_bom = next((codec for bom, codec in _BOMS if head.startswith(bom)), "")
    if source.options.encoding is not None:
        return _chosen(source, source.options.encoding, by_bom)
    if by_bom:
        if _first_bad_byte(source.path, by_bom) is not None:
            raise _damaged(source, by_bom)
        return Encoding(by_bom)
    if head.count(0) * 5 >= len(head):  # plain ASCII in UTF-16 is also valid UTF-8, full of NULs
        if utf16 := _utf16_without_bom(source.path, head):
            return Encoding(utf16)
    bad = _first_bad_byte(source.path, "utf-8")
    if bad is None:
        return Encoding("utf-8")
    if 0 in head:
        if utf16 := _utf16_without_bom(source.path, head):
            return Encoding(utf16)
        raise TableError(
            f"{source.name} is not text (it holds NUL bytes and is not UTF-8), so it is no table.",
            "Give a table: CSV, Excel, JSON, JSONL or Parquet; or choose its encoding.",
        )
    if _mostly_utf8(_sample_at(source.path, max(0, bad - 65536))):
        raise _damaged(source, "utf-8", bad)
    sample = _sample_at(source.path, bad)
    fits_gb18030 = _first_bad_byte(source.path, "gb18030") is None
    if fits_gb18030 and _looks_like_gb18030(sample):
        return Encoding("gb18030")
    guess = _guess(sample)
    if guess and _first_bad_byte(source.path, guess) is None:
        return Encoding(guess, note=_unsure(guess))
    if fits_gb18030:
        return Encoding("gb18030", note=_unsure("gb18030"))
    raise TableError(
        f"{source.name} is in no encoding that could be recognised: it is not UTF-8"
        f" (line {_line_of(source.path, bad):,}) nor GB18030.",
        CHOOSE_ENCODING,
    )


def _chosen(source: Source, chosen: str, by_bom: str) -> Encoding:
    codec, _, errors = chosen.partition(":")
    codec = codecs.lookup(codec).name
    if by_bom == "utf-8-sig" and codec == "utf-8":
        codec = by_bom
    if by_bom == "utf-16" and codec.startswith("utf-16-"):
        codec = by_bom
    if errors == "replace":
        return Encoding(codec, "replace", "Characters that cannot be read are shown as \ufffd.")
    if _first_bad_byte(source.path, codec) is not None:
        raise _damaged(source, codec)
    return Encoding(codec)


def _unsure(codec: str) -> str:
    return f"The encoding was guessed as {codec}; if characters look wrong, choose another one."


def _first_bad_byte(path: Path, codec: str) -> int | None:
    """Return the offset of the first byte that the codec cannot read, None when it reads the whole file."""
    decoder = codecs.getincrementaldecoder(codec)("strict")
    done = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return max(0, done + len(chunk) - len(error.object) + error.start)
            except UnicodeError:  # UTF-16 and UTF-32 without their BOM
                return done
            if not chunk:
                return None
            done += len(chunk)


def _line_of(path: Path, offset: int) -> int:
    breaks = 0
    with path.open("rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK_BYTES, offset))):
            breaks += chunk.count(b"\n") or chunk.count(b"\r")
            offset -= len(chunk)
    return breaks + 1


def _damaged(source: Source, codec: str, bad: int | None = None) -> TableError:
    offset = _first_bad_byte(source.path, codec) if bad is None else bad
    line = _line_of(source.path, offset or 0)
    return TableError(
        f"{source.name} cannot be read as {codec}: a character on line {line:,} is damaged.",
        f'Repair that line, choose another encoding, or choose "{codec}:replace" to show \ufffd there.',
    )


def _sample_at(path: Path, offset: int) -> bytes:
    """Return up to 1 MB from the start of the line that holds the byte at `offset`."""
    start = max(0, offset - 4096)
    with path.open("rb") as file:
        file.seek(start)
        before = file.read(offset - start)
        at = max(before.rfind(b"\n"), before.rfind(b"\r")) + 1
        file.seek(start + at)
        return file.read(SAMPLE_BYTES)


def _utf16_without_bom(path: Path, head: bytes) -> str:
    """Return utf-16-le or -be when NULs stand on one side of the byte pairs only and all of it decodes."""
    low, high = head[1::2].count(0), head[0::2].count(0)
    if min(low, high) * 20 > max(low, high):
        return ""
    codec = "utf-16-le" if low > high else "utf-16-be"
    return codec if _first_bad_byte(path, codec) is None else ""


def _mostly_utf8(sample: bytes) -> bool:
    """Tell whether whole UTF-8 characters outnumber damaged ones four to one."""
    text = sample.decode("utf-8", errors="replace")
    damaged = text.count("\ufffd")
    return sum(1 for c in text if c > "\x7f") - damaged >= 4 * damaged


def _looks_like_gb18030(sample: bytes) -> bool:
    """Tell Chinese from Latin-1, Big5 and Shift-JIS that happen to decode: 80 % common GB2312 characters."""
    pairs = [pair for pair in _GB_CHARACTER.findall(sample) if len(pair) == 2]
    return sum(1 for pair in pairs if _GB2312_CHARACTER.fullmatch(pair)) >= 0.8 * len(pairs)


def _guess(sample: bytes) -> str:
    import charset_normalizer

    matches = charset_normalizer.from_bytes(sample[: 1 << 16], cp_isolation=_GUESSES)
    names = [str(match.encoding) for match in matches]
    if not names:
        return ""
    if names[0] == "cp1250":  # told from cp1252 by a few letters only; Western Europe is the likelier origin
        western, central = (sample.decode(codec, errors="replace") for codec in ("cp1252", "cp1250"))
        if "cp1252" in names or western == central:
            return "cp1252"
    return names[0]


# ---- delimiter -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """How lines become cells. `delimiter` "" is one column; `first_line` skips Excel's sep= line."""

    delimiter: str
    quoting: bool = True
    skip_spaces: bool = False
    first_line: int = 1
    note: str = ""

    def reader(self, lines: Iterator[str], strict: bool = True) -> Reader:
        """Return a csv.reader over the lines."""
        csv.field_size_limit(FIELD_LIMIT)
        return csv.reader(
            lines,
            delimiter=self.delimiter or NO_DELIMITER,
            quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
            skipinitialspace=self.skip_spaces,
            strict=strict,
        )


def detect_dialect(source: Source, encoding: str) -> Dialect:
    """Return the delimiter that gives the header's cell count in most records, or one column."""
    with open_text(source.path, encoding) as stream:
        sample = stream.read(SAMPLE_CHARACTERS)
        cut = bool(stream.read(1))
    sample = sample.removeprefix("\ufeff")
    first_line = 1
    chosen = source.options.delimiter
    if hint := _SEP_LINE.match(sample):
        sample, first_line = sample[hint.end() :], 2
        chosen = hint[1] if chosen is None else chosen
    candidates = DELIMITERS if chosen is None else (chosen,) if chosen else ()
    best: tuple[float, int, Dialect] | None = None
    rejected = ""
    for delimiter in candidates:
        for dialect in (
            Dialect(delimiter, first_line=first_line),
            Dialect(delimiter, skip_spaces=True, first_line=first_line, note=_SPACES),
            Dialect(delimiter, quoting=False, first_line=first_line, note=_QUOTES),
        ):
            if dialect.skip_spaces and f'{delimiter} "' not in sample:
                continue
            counts, faulty = _count_cells(sample, cut, dialect)
            if not counts or (chosen is None and counts[0] < 2):
                continue
            agreeing = sum(1 for count in counts if count == counts[0]) / len(counts)
            if dialect.note and agreeing < 1:
                continue
            if not dialect.quoting and _encloses_cells(sample, dialect):
                continue
            if chosen is None and agreeing < (0.5 if _names_only(sample, delimiter) else 0.8):
                rejected = delimiter
                continue
            rank = (round(agreeing - 0.01 * faulty - 0.001 * bool(dialect.note), 4), counts[0], dialect)
            if best is None or rank[:2] > best[:2]:
                best = rank
    if best:
        return best[2]
    if chosen:
        return Dialect(chosen, first_line=first_line)
    faulty = _count_cells(sample, cut, Dialect("", first_line=first_line))[1] and not _encloses_cells(
        sample, Dialect("", quoting=False)
    )
    note = ""
    if rejected:
        note = f"Read as one column: {_NAMES[rejected]} do not give the same number of cells in each line."
    return Dialect("", quoting=not faulty, first_line=first_line, note=note)


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SPACES = "Spaces after a delimiter were taken as part of it, because quoted cells follow them."
_QUOTES = "Quotation marks were read as ordinary characters, because they do not enclose cells."


def _names_only(sample: str, delimiter: str) -> bool:
    """Tell a header such as a,b,c from prose: no name is empty or begins with a space."""
    header = next((line for line in io.StringIO(sample) if line.strip()), "")
    return not any(name[:1].strip() == "" for name in header.rstrip("\r\n").split(delimiter))


def _encloses_cells(sample: str, unquoted: Dialect) -> bool:
    """Tell whether some cell is properly enclosed in quotes, so that quotes are not mere characters."""
    for row in islice(unquoted.reader(iter(io.StringIO(sample, newline=""))), SAMPLE_RECORDS):
        for cell in row:
            if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
                return True
    return False


def _count_cells(sample: str, cut: bool, dialect: Dialect) -> tuple[list[int], bool]:
    """Return the cells per record, surplus empty ones left out, and whether a quote was faulty."""
    counts: list[int] = []
    faulty = False
    reader = dialect.reader(iter(io.StringIO(sample, newline="")))
    rows = 0
    while rows < SAMPLE_RECORDS:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            at_end = "unexpected end" in str(error)
            faulty = faulty or not (cut and at_end)
            if at_end:
                break
            continue
        rows += 1
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        width = counts[0] if counts else len(row)
        count = len(row)
        while count > width and not row[count - 1]:
            count -= 1
        counts.append(count)
    if cut and rows < SAMPLE_RECORDS and len(counts) > 1:
        counts.pop()  # the last record may be cut in half
    return counts, faulty
