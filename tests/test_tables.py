"""Tables: every format read as text, bad files refused with a sentence, what is written comes back."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_core import tables
from glm_core.tables import ReadOptions, TableError, client_name, open_table, save_upload, write
from glm_core.tables import writing as writing_module

ROOT = Path(__file__).resolve().parents[1]
MESSY = Path(os.environ.get("GLM_SHARED_DATA", ROOT.parent / "shared" / "data")) / "messy"


@pytest.fixture
def load(tmp_path):
    """Write bytes or text to a file and return its columns and rows."""

    def _load(content, name="t.csv", **options):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        table = open_table(path, ReadOptions(**options), name=name)
        rows = list(table)
        return table, rows

    return _load


def refused(load, content, **options) -> str:
    with pytest.raises(TableError) as caught:
        load(content, **options)
    assert caught.value.todo, "a refusal says what to do"
    return str(caught.value)


# ---- cells are text ------------------------------------------------------------------------------------


def test_ids_numbers_and_missing_words_stay_as_they_are(load):
    _, rows = load("id,n,t\n007,0012345678901234567,NA\n1.50,,null\nTRUE,1e5, None \n")
    assert rows == [("007", "0012345678901234567", "NA"), ("1.50", "", "null"), ("TRUE", "1e5", " None ")]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('a,b\n1,"ha ""ha"" ha"\n3,4\n', [("1", 'ha "ha" ha'), ("3", "4")]),
        ('a,b\n1,"x \n""y"" \nz"\n', [("1", 'x \n"y" \nz')]),
        ('a,b\r1,2\r"u\rv",3\r', [("1", "2"), ("u\rv", "3")]),
        ("a,b\r\n1,2\r\n\r\n\r\n3,4", [("1", "2"), ("3", "4")]),
        ("\n\na,b\n1,2\n", [("1", "2")]),
        ("a,b\n1,2,,\n,\n", [("1", "2"), ("", "")]),
        ('a,b\n1,"{""k"": [1, 2]}"\n', [("1", '{"k": [1, 2]}')]),
        ("a,b\n\0,2\n", [("\0", "2")]),
        ('date, n\n1, "6,000"\n2, 3\n', [("1", "6,000"), ("2", "3")]),
        ("sep=;\na;b\n1,5;2\n", [("1,5", "2")]),
    ],
)
def test_csv_shapes(load, content, rows):
    assert load(content)[1] == rows


def test_header_may_hold_newlines_and_names_become_distinct(load):
    table, _ = load('"a\nb",,x,x,x (2)\n1,2,3,4,5\n')
    assert table.info.columns == ("a\nb", "column_2", "x", "x (3)", "x (2)")
    assert len(table.warnings) == 2


def test_without_header_columns_are_numbered(load):
    table, rows = load("1,2\n3,4\n", header=False)
    assert table.info.columns == ("column_1", "column_2")
    assert rows == [("1", "2"), ("3", "4")]
    assert table.warnings == ()


def test_nul_and_header_only_are_mentioned(load):
    assert "NUL" in load("a,b\n\0,2\n")[0].warnings[0]
    assert "no rows" in load("a,b\n")[0].warnings[0]


# ---- encoding ------------------------------------------------------------------------------------------

TEXT = "编号,评论\n1,这个产品很好用，推荐\n2,服务态度不好，非常失望\n"


@pytest.mark.parametrize(
    ("codec", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("gbk", "gb18030"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_chinese_encodings_are_found(load, codec, found, newline):
    table, rows = load(TEXT.replace("\n", newline).encode(codec))
    assert table.info.encoding == found
    assert table.info.columns == ("编号", "评论")
    assert rows[1] == ("2", "服务态度不好，非常失望")
    assert table.warnings == ()


@pytest.mark.parametrize(
    ("text", "codec", "found"),
    [
        ("id,评论\n1,好用😀\n", "gb18030", "gb18030"),
        ("id,text\n1,plain\n", "utf-16-le", "utf-16-le"),
        ("編號,評論\n1,這個產品很好用，推薦給大家\n2,服務態度不好，非常失望\n", "big5", "big5"),
        ("id,text\n1,Größe überprüfen\n2,Straße\n", "cp1252", "cp1252"),
        ("id,texte\n1,déjà vu à l'été\n2,où êtes-vous\n", "cp1252", "cp1252"),
        ("id,tekst\n1,Zażółć gęślą jaźń\n", "cp1250", "cp1250"),
    ],
)
def test_other_encodings_are_told_from_gb18030(load, text, codec, found):
    table, rows = load(text.encode(codec))
    assert table.info.encoding == found
    assert rows == [tuple(line.split(",")) for line in text.splitlines()[1:]]


def test_gbk_bytes_after_a_megabyte_of_ascii_are_found(load):
    content = b"id,text\n" + b"1,plain\n" * 200_000 + "2,好评，很好\n".encode("gbk")
    table, rows = load(content)
    assert table.info.encoding == "gb18030"
    assert rows[-1] == ("2", "好评，很好")


def test_damaged_utf8_is_refused_with_its_line_and_read_on_request(load):
    content = TEXT.encode()[:-20] + b"\xff" + TEXT.encode()[-20:]
    assert "line 3 is damaged" in refused(load, content)
    _, rows = load(content, encoding="utf-8:replace")
    assert "\ufffd" in rows[1][1]


def test_encoding_can_be_chosen_and_is_checked(load, tmp_path):
    assert load("a,b\n1,é\n".encode("latin-1"), encoding="latin-1")[1] == [("1", "é")]
    assert "line 2" in refused(load, "a,b\n1,é\n".encode("latin-1"), encoding="utf-8")
    assert "no text encoding" in refused(load, "a,b\n", encoding="klingon")
    assert "no text encoding" in refused(load, "a,b\n", encoding="base64")
    assert load(b"\xef\xbb\xbfa,b\n1,2\n", encoding="utf-8")[0].info.columns == ("a", "b")
    assert tables.detect_encoding(tmp_path / "file") == "utf-8-sig"


# ---- delimiter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(load, delimiter):
    content = "a,b,c\n1,x y,3\n2,z,4\n".replace(",", delimiter)
    table, rows = load(content)
    assert table.info.delimiter == delimiter
    assert rows == [("1", "x y", "3"), ("2", "z", "4")]


@pytest.mark.parametrize(
    "lines",
    [
        ["comment", "good, cheap, fast", "bad", "well, no"],
        ["评论", "很好", "不好，失望"],
        ["text", "the first letter", "to split at"],
        ["comment", 'he said "no", and left', '"Great" he said'],
        ["a, b and c were here", "one", "two, three", "four"],
    ],
)
def test_comments_full_of_commas_stay_one_column(load, lines):
    table, rows = load("\n".join(lines))
    assert table.info.delimiter == ""
    assert [table.info.columns, *rows] == [(line,) for line in lines]


def test_quotes_that_enclose_nothing_are_characters(load):
    _, rows = load('id\ttext\n1\t"unbalanced\n2\ta"b\n3\tplain\n')
    assert rows == [("1", '"unbalanced'), ("2", 'a"b'), ("3", "plain")]


def test_one_column_can_be_forced(load):
    assert load("a,b\n1,2\n", delimiter="")[1] == [("1,2",)]
    assert "single character" in refused(load, "a,b\n", delimiter="::")


# ---- bad rows ------------------------------------------------------------------------------------------

RAGGED = 'a,b,c\n1,2,3\n"x\ny",2,3,4\n1,2\n1,2,3\n1,2,3,4,5\n'


def test_long_rows_stop_with_line_numbers_and_counts(load):
    text = refused(load, RAGGED)
    assert "2 rows that do not fit the 3 columns" in text
    assert "line 3 has 4 cells, line 7 has 5 cells" in text


def test_long_rows_can_be_skipped_or_joined(load):
    table, rows = load(RAGGED, on_bad_rows="skip")
    assert rows == [("1", "2", "3"), ("1", "2", ""), ("1", "2", "3")]
    assert any("2 rows" in w and "line 3, 7" in w for w in table.warnings)
    table, rows = load(RAGGED, on_bad_rows="join")
    assert rows[1] == ("x\ny", "2", "3,4") and rows[-1] == ("1", "2", "3,4,5")
    assert any("line 5" in w and "fewer" in w for w in table.warnings)
    assert list(table) == rows and len(table.warnings) == 2  # counted once per pass


def test_text_after_a_closing_quote_is_never_changed_silently(load):
    content = 'a,b\n"1",2\n1,2\n1,2\n"x "y" z",2\n1,2\n'
    assert "line 5 has text after a closing quote" in refused(load, content)
    assert len(load(content, on_bad_rows="skip")[1]) == 4
    table, rows = load(content, on_bad_rows="join")
    assert len(rows) == 5 and "faulty quotes" in table.warnings[0]


def test_unclosed_quote_names_the_line_where_it_opened(load):
    for policy in ("stop", "skip", "join"):
        text = refused(load, 'a,b\n1,2\n"o\nk",3\n4,"never\n5,6\n', on_bad_rows=policy)
        assert "opened on line 5" in text and "never" in text


def test_a_cell_beyond_the_limit_is_refused(load):
    content = 'a,b\n1,2\n3,"' + "x,y\n" * (4_200_000) + '"\n'
    assert "line 3" in refused(load, content)
    assert len(load("a,b\n1," + "x" * 1_000_000 + "\n")[1][0][1]) == 1_000_000


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \r\n", b"\xef\xbb\xbf", b"\xff\xfe", b",,\n,,\n"])
def test_an_empty_file_is_refused(load, content):
    assert "t.csv is empty" in refused(load, content)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<html><table><tr><td>1</td></tr></table></html>", "HTML"),
        (b"\xef\xbb\xbf <!DOCTYPE html><p>", "HTML"),
        (b'<?xml version="1.0"?><Workbook>', "XML"),
        (b"%PDF-1.7", "PDF"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04garbage", "damaged"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "cannot be read as an Excel"),
        (b"PAR1 and nothing else", "Parquet"),
        (b"\x00\x01\x02\x03\xff\xfe\xfd\x00\x80" * 50, "not text"),
    ],
)
def test_what_is_no_table_is_refused(load, content, word):
    assert word in refused(load, content, name="t.xls")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TableError, match="cannot be opened"):
        open_table(tmp_path / "none.csv")


# ---- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "format", "columns", "rows"),
    [
        ('[{"a":1,"b":"x"},{"b":null,"c":true}]', "json", "abc", [("1", "x", ""), ("", "", "true")]),
        ('{"a": 2, "b": 3}\n{"b": 2, "d": 4}\n', "jsonl", "abd", [("2", "3", ""), ("", "2", "4")]),
        ('{"a":1}{"a":2} {"a":3}', "json", "a", [("1",), ("2",), ("3",)]),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', "json", "a", [("1",), ("2",)]),
        ('{"a":1}\n{\n "a": 2\n}\n', "json", "a", [("1",), ("2",)]),
        ('{"data":[{"a":1}],"total":1}', "json", "a", [("1",)]),
        ('{"who":"me","list":[{"a":1}]}', "json", "a", [("1",)]),
        ('{"a":[1,2],"b":["x",null]}', "json", "ab", [("1", "x"), ("2", "")]),
        ('{"a":{"0":1,"1":2},"b":{"0":3,"1":4}}', "json", "ab", [("1", "3"), ("2", "4")]),
        ('{"columns":["a","b"],"index":[0],"data":[[1,2]]}', "json", "ab", [("1", "2")]),
        ('[["a","b"],["1","2"]]', "json", "ab", [("1", "2")]),
        ('\ufeff[{"a":"007"}]', "json", "a", [("007",)]),
        ('[{"a":[1.50,{"b":null}]}]', "json", "a", [('[1.50,{"b":null}]',)]),
        ('[{"a":12345678901234567890,"b":1e400}]', "json", "ab", [("12345678901234567890", "1e400")]),
        ('[{"a":1,"a":2}]', "json", ("a", "a (2)"), [("1", "2")]),
        ('[{"a":{"b":1,"c":{}},"a.b":2}]', "json", ("a.b", "a.c", "a.b (2)"), [("1", "{}", "2")]),
        ('["x","y"]', "json", ("value",), [("x",), ("y",)]),
        ('{"a":1}\n\n{"a":2}', "jsonl", "a", [("1",), ("2",)]),
        ('{"a":1}\r{"a":2}\r', "jsonl", "a", [("1",), ("2",)]),
        ('{"a":"\u2028x"}\n{"a":2}', "jsonl", "a", [("\u2028x",), ("2",)]),
    ],
)
def test_json_shapes(load, content, format, columns, rows):
    table, found = load(content, name="x.json")
    assert (table.info.format, table.info.columns, found) == (format, tuple(columns), rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a":1}\n {"a":2}]', "line 2, column 2"),
        ('{"a":1}\n{"a":2}\n{"a" 3}\n', "line 3, column 6"),
        ('{"a":1}\n{"a":2\n{"a":3}\n{"b"\n', "2 lines of it"),
        ("[]", "no records"),
        ('{"a":[1,2],"b":[1]}', "different lengths"),
        ('{"x":[{"a":1}],"y":[{"a":1}]}', "several keys: x, y"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json_is_refused_with_the_place(load, content, words):
    assert words in refused(load, content)


def test_records_key_and_skipping_bad_lines(load):
    both = '{"x":[{"a":1}],"y":[{"a":2}]}'
    assert load(both, records_key="y")[1] == [("2",)]
    assert "has no key 'z'" in refused(load, both, records_key="z")
    table, rows = load('{"a":1}\n{bad}\n{"a":3}\n', on_bad_rows="skip")
    assert rows == [("1",), ("3",)] and "line 2" in table.warnings[0]


def test_json_in_gbk_and_a_csv_that_begins_with_a_bracket(load):
    assert load('[{"评论":"很好用，推荐"}]'.encode("gbk"))[1] == [("很好用，推荐",)]
    assert load("[id],[text]\n1,x\n")[0].info.columns == ("[id]", "[text]")


# ---- Excel and Parquet ---------------------------------------------------------------------------------


@pytest.fixture
def workbook(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    import datetime as dt

    book = openpyxl.Workbook()
    book.active.title = "空"
    sheet = book.create_sheet("数据")
    for row in (
        [None, None, None],
        ["id", None, "when"],
        [7, "007", dt.date(2020, 1, 2)],
        [7.5, True, dt.datetime(2020, 1, 2, 3, 4, 5)],
        [None, None, None],
        [1234567890123456789, "NA", None, "beyond"],
    ):
        sheet.append(row)
    book.create_sheet("隐藏").append(["x"])
    book["隐藏"].sheet_state = "hidden"
    path = tmp_path / "book"
    book.save(path)
    return path


def test_excel_values_as_text_from_the_first_sheet_that_is_not_empty(workbook):
    table = open_table(workbook, name="账.xlsx")
    assert (table.info.sheet, table.info.sheets) == ("数据", ("空", "数据", "隐藏"))
    assert table.info.columns == ("id", "column_2", "when", "column_4")
    assert list(table) == [
        ("7", "007", "2020-01-02", ""),
        ("7.5", "TRUE", "2020-01-02T03:04:05", ""),
        ("", "", "", ""),
        ("1234567890123457000", "NA", "", "beyond"),
    ]
    assert [word for word in ("blank row", "15 digits") if word in " ".join(table.warnings)] == [
        "blank row",
        "15 digits",
    ]


def test_sheets_can_be_chosen(workbook, tmp_path):
    assert tables.sheets(workbook) == ("空", "数据", "隐藏")
    assert "hidden" in " ".join(open_table(workbook, ReadOptions(sheet="隐藏")).warnings)
    with pytest.raises(TableError, match="has no sheet 'x'"):
        open_table(workbook, ReadOptions(sheet="x"))
    with pytest.raises(TableError, match="is empty"):
        open_table(workbook, ReadOptions(sheet="空"))
    (tmp_path / "a.csv").write_text("a\n")
    assert tables.sheets(tmp_path / "a.csv") == ()


def _with_sheet_xml(path, xml):
    """Write a workbook, then put other XML in place of its sheet."""
    write(path, ["a"], [["b"]], "xlsx")
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["xl/worksheets/sheet1.xml"] = (
        '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
        + xml
        + "</sheetData></worksheet>"
    ).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)


def test_a_cell_in_the_far_corner_is_refused_before_it_can_take_all_memory(tmp_path):
    path = tmp_path / "far.xlsx"
    _with_sheet_xml(
        path,
        '<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>1</v></c></row>',
    )
    with pytest.raises(TableError, match="1,048,576 rows by 16,384 columns"):
        open_table(path)


def test_cached_formula_values_are_read_and_error_cells_counted(tmp_path):
    path = tmp_path / "f.xlsx"
    _with_sheet_xml(
        path,
        '<row r="1"><c r="A1" t="inlineStr"><is><t>h</t></is></c><c r="B1"><v>0.1</v></c></row>'
        '<row r="2"><c r="A2"><f>1+1</f><v>2</v></c><c r="B2" t="e"><v>#DIV/0!</v></c></row>',
    )
    table = open_table(path)
    assert list(table) == [("2", "")]
    assert "1 cell" in table.warnings[0] and "#DIV/0!" in table.warnings[0]


def test_a_panic_of_the_excel_reader_is_a_refusal(workbook, monkeypatch):
    python_calamine = pytest.importorskip("python_calamine")

    class PanicException(BaseException):
        """What pyo3 raises; damaged .xls files do that."""

    class Workbook:
        @staticmethod
        def from_path(path):
            raise raised

    monkeypatch.setattr(python_calamine, "CalamineWorkbook", Workbook)
    raised = PanicException("range end index 64 out of range")
    with pytest.raises(TableError, match="cannot be read as an Excel workbook"):
        open_table(workbook)
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        open_table(workbook)


def test_zip_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
        with archive.open("xl/worksheets/sheet1.xml", "w") as sheet:
            for _ in range(210):
                sheet.write(bytes(1 << 20))
    with pytest.raises(TableError, match="unpacks to more than"):
        open_table(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "a")
    with pytest.raises(TableError, match="ZIP archive"):
        open_table(path, name="a.csv")


def test_parquet_of_any_type_is_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "p"
    parquet.write_table(pa.table({"i": [1, None], "s": ["007", ""], "l": [[1], None], "f": [1.5, 2.0]}), path)
    table = open_table(path)
    assert table.info.format == "parquet"
    assert list(table) == [("1", "007", "[1]", "1.5"), ("", "", "", "2.0")]


# ---- writing -------------------------------------------------------------------------------------------

CELL = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "",
        "_x0041_",
        "_x005F_x0041_",
        "<r>x</r>",
        "=1+1",
        "-5",
        "'x",
        '"',
        "a\r\nb",
        "\0",
        " 007 ",
        "NA",
        "好，😀",
    ]
)
NAMES = ("id", "文本", "c d")
ROWS = st.lists(st.tuples(CELL, CELL, CELL), max_size=6)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "xlsx"])
@QUICK
@given(rows=ROWS)
def test_what_is_written_comes_back(tmp_path, format, rows):
    path = tmp_path / "out"
    if format == "xlsx":  # documented: noncharacters are replaced, blank rows at the end are not stored
        rows = [tuple(c.replace("\ufffe", "").replace("\uffff", "") for c in row) for row in rows]
        while rows and not any(rows[-1]):
            rows.pop()
    report = write(path, NAMES, rows, format, guard=False)
    if format == "jsonl" and not rows:
        return  # an empty file has no columns
    table = open_table(path, ReadOptions(delimiter=","))
    assert table.info.columns == NAMES
    assert list(table) == rows
    assert report.rows == len(rows)


@QUICK
@given(cells=st.lists(CELL, max_size=6))
def test_a_single_column_comes_back(tmp_path, cells):
    path = tmp_path / "one"
    write(path, ["t"], [[cell] for cell in cells], "csv", guard=False)
    assert list(open_table(path, ReadOptions(delimiter=""))) == [(cell,) for cell in cells]


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "＝1+1",
    "＋1",
    "－1",
    "＠x",
    "  =1+1",
    "\u3000=1",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_neutralised_in_csv_cells_and_headers(tmp_path, text):
    path = tmp_path / "g.csv"
    report = write(path, [text, "n"], [[text, "-5"], ["+3.2e1", -7]], "csv")
    raw = path.read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf") and raw.endswith(b"\r\n")
    parsed = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
    assert parsed == [["'" + text, "n"], ["'" + text, "-5"], ["+3.2e1", "-7"]]
    assert report.notes == ("2 cells that Excel would take for a formula got a leading apostrophe.",)


def test_xlsx_has_no_formulas_and_no_links_and_keeps_numbers(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "x.xlsx"
    texts = [*FORMULAS, "http://example.com", "007", "{=1}", "1234567890123456789"]
    write(path, ["=h", "n"], [[text, 1.5] for text in texts] + [["", 3]], "xlsx")
    sheet = openpyxl.load_workbook(path).active
    assert {cell.data_type for row in sheet.iter_rows(max_col=1) for cell in row} == {"s", "n"}
    assert sheet["A1"].data_type == "s" and sheet["B2"].value == 1.5 and sheet["B18"].value == 3
    assert not any(cell.hyperlink for row in sheet.iter_rows() for cell in row)
    assert sheet.freeze_panes == "A2"
    assert [row[0] for row in open_table(path)] == [*texts, ""]


def test_xlsx_limits_are_told(tmp_path, monkeypatch):
    path = tmp_path / "x.xlsx"
    report = write(path, ["a"], [["😀" * 20_000], ["x\0y"], ["\ud800"], [10**18]], "xlsx")
    rows = [row[0] for row in open_table(path)]
    assert rows == ["😀" * 16_383, "x\0y", "\ufffd", str(10**18)]
    assert len(report.notes) == 4 and any("JSONL and Parquet" in note for note in report.notes)
    before = path.read_bytes()
    monkeypatch.setattr(writing_module, "EXCEL_ROWS", 3)
    with pytest.raises(TableError, match="CSV or Parquet"):
        write(path, ["a"], [["1"]] * 4, "xlsx")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_jsonl_keeps_types_and_lone_surrogates(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, ["键", "n"], [["\ud800好", 1.5], [None, float("nan")]], "jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines == [{"键": "\ud800好", "n": 1.5}, {"键": None, "n": None}]
    assert "好" in path.read_text("utf-8")


def test_parquet_types_follow_the_whole_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    rows = [[None, 1, 1, "a", 2**60]] * 9000 + [[None, 2, 1.5, 7, 1]]
    write(path, ["none", "int", "float", "mixed", "long"], rows, "parquet")
    schema = parquet.read_schema(path)
    assert [str(kind) for kind in schema.types] == ["string", "int64", "double", "string", "int64"]
    assert list(open_table(path))[-1] == ("", "2", "1.5", "7", "1")


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "xlsx"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, format):
    path = tmp_path / "out"
    path.write_text("old")

    def rows():
        yield ["1"]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write(path, ["a"], rows(), format)
    with pytest.raises(TableError, match="Row 1 has 2 cells"):
        write(path, ["a"], [["1", "2"]], format)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TableError, match="could not be written"):
        write(tmp_path / "none" / "x", ["a"], [["1"]], format)


def test_writing_refuses_what_would_lose_a_column(tmp_path):
    for columns in ([], ["a", "a"]):
        with pytest.raises(TableError):
            write(tmp_path / "x", columns, [], "jsonl")
    with pytest.raises(TableError, match="Choose one of csv"):
        write(tmp_path / "x", ["a"], [], "xml")


# ---- names and uploads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("../../x.csv", "x.csv"),
        ("C:\\dir\\x.csv", "x.csv"),
        ("a\0b.csv", "ab.csv"),
        ("\u202evsc.exe", "vsc.exe"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("a\nb.csv", "a b.csv"),
        ("评论 表.xlsx", "评论 表.xlsx"),
        ("x" * 300 + ".csv", "x" * 115 + "….csv"),
    ],
)
def test_client_names_are_harmless(tmp_path, given_name, shown):
    assert client_name(given_name) == shown
    path = save_upload(b"a,b\n1,2\n", given_name, tmp_path / "uploads", 100)
    assert path.parent == tmp_path / "uploads" and path.read_bytes() == b"a,b\n1,2\n"
    assert path.suffix in (".csv", ".xlsx", ".bin") and len(path.stem) == 32


def test_uploads_beyond_the_limit_leave_nothing(tmp_path):
    for data in (b"x" * 11, io.BytesIO(b"x" * 11)):
        with pytest.raises(TableError, match="upload limit"):
            save_upload(data, "x.csv", tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_options_survive_json():
    options = ReadOptions(encoding="gb18030", delimiter=";", sheet="数据", header=False, on_bad_rows="join")
    assert ReadOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    with pytest.raises(TableError):
        ReadOptions.from_json({"on_bad_rows": "ignore"})


def test_importing_and_streaming_csv_loads_no_heavy_package(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "a.jsonl").write_text('{"a":1}\n{"a":2}\n')
    code = (
        "import sys; from pathlib import Path; from glm_core.tables import open_table, write\n"
        "for name in ('a.csv', 'a.jsonl'):\n"
        "    t = open_table(Path(sys.argv[1]) / name)\n"
        "    write(Path(sys.argv[1]) / ('out' + name), t.info.columns, t, name.split('.')[1])\n"
        "heavy = {'pandas', 'pyarrow', 'xlsxwriter', 'streamlit', 'numpy', 'python_calamine'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)


# ---- real messy files ----------------------------------------------------------------------------------

MESSY_SHAPES = {
    "csvkit_bad.csv": "line 2 has 4 cells",
    "csvkit_blanks.csv": (1, 6),
    "csvkit_empty.csv": "is empty",
    "csvkit_mac_newlines.csv": (2, 3),
    "csvkit_null_byte.csv": (1, 3),
    "csvkit_sheets.xls": (5, 8),
    "csvkit_sheets.xlsx": (5, 8),
    "csvkit_test_empty_columns_short_row.csv": (1, 3),
    "csvkit_test_header_newline.csv": (1, 3),
    "csvkit_test_utf16_big.csv": (2, 3),
    "csvkit_test_utf8_bom.csv": (2, 3),
    "csvkit_testjson_multiline.json": (2, 3),
    "csvkit_testjson_nested.json": (2, 7),
    "messytables_complex.csv": (3, 4),
    "messytables_encrypted_no_password.xls": "password",
    "messytables_excel_pasting.csv": (20, 9),
    "messytables_simple.psv": (28, 6),
    "messytables_simple.ssv": (6, 3),
    "messytables_sparse_with_column_errors.csv": (2237, 4),
    "messytables_unicode_sheet_name.xls": (0, 1),
    "spectrum_escaped_quotes.csv": (2, 2),
    "spectrum_json.csv": (1, 2),
    "spectrum_newlines_crlf.csv": (3, 3),
    "spectrum_quotes_and_newlines.csv": (2, 2),
    "spectrum_utf8.csv": (2, 3),
}


@pytest.mark.skipif(not MESSY.is_dir(), reason="the shared messy files are not on this machine")
@pytest.mark.parametrize("name", MESSY_SHAPES)
def test_real_messy_files_load_or_are_refused(name):
    expected = MESSY_SHAPES[name]
    if isinstance(expected, str):
        with pytest.raises(TableError, match=expected):
            list(open_table(MESSY / name))
    else:
        table = open_table(MESSY / name)
        assert (len(list(table)), len(table.info.columns)) == expected
