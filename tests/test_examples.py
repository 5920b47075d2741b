"""Files become training examples; what is wrong with them is said at once, with lines and counts."""

from __future__ import annotations

import json

import pytest

from glm_core.errors import GLMError
from glm_core.finetune.examples import (
    Columns,
    Example,
    Problem,
    alpaca_prompt,
    convert_alpaca,
    guess_columns,
    labels_of,
    read,
)
from glm_core.tables import ReadOptions
from tests.conftest import GOLDEN

ALPACA = json.loads((GOLDEN / "v1" / "lora_alpaca_data.json").read_text(encoding="utf-8"))
ROWS = [{"content": "你好，世界", "summary": "hello"}, {"content": "再见", "summary": "bye"}]
PAIRS = [("你好，世界", "hello"), ("再见", "bye")]


@pytest.fixture
def write(tmp_path):
    """Put a file into a folder of its own: text, or values for one JSON document or for JSON Lines."""

    def put(name, content):
        path = tmp_path / name
        if name.endswith(".jsonl") and not isinstance(content, str):
            content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content)
        elif not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def pairs(loaded):
    return [(one.prompt, one.response) for one in loaded.examples]


def sentences(loaded, severity):
    return [one.message for one in loaded.problems if one.severity == severity]


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ROWS),
        ("a.json", {"data": ROWS}),
        ("a.jsonl", ROWS),
        (
            "a.json",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
        ),  # as ADGEN names its lines
        ("a.csv", "content,summary\n你好，世界,hello\n再见,bye\n"),
        ("a.csv", "\ufeffid,summary,content\n1,hello,你好，世界\n2,bye,再见\n"),
        ("a.tsv", "content\tsummary\n你好，世界\thello\n再见\tbye\n"),
        ("a.csv", "content,summary\n你好，世界,hello\n再见,bye\n".encode("gb18030")),
    ],
)
def test_every_format_gives_the_same_examples(write, name, content):
    loaded = read(write(name, content))
    assert pairs(loaded) == PAIRS
    assert loaded.columns == Columns("content", "summary")
    assert (loaded.rows, loaded.stops) == (2, ())


def test_a_workbook_gives_examples_with_the_row_numbers_of_excel(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["问题", "回答"])
    book.active.append(["一", "二"])
    book.active.append([None, None])
    book.active.append(["三\n四", 5])
    book.active.append(["七", None])
    book.save(tmp_path / "a.xlsx")
    loaded = read(tmp_path / "a.xlsx")
    assert loaded.examples == (Example("一", "二", (), 2), Example("三\n四", "5", (), 4))
    assert "Left out: 1 row without a response (row 5)." in sentences(loaded, "warn")


def test_the_spam_lines_of_the_seed_keep_their_labels_as_text(write):
    lines = '{"content": "加微信", "label": "1"}\n{"content": "好书", "label": 0}\n'
    assert pairs(read(write("train.json", lines))) == [("加微信", "1"), ("好书", "0")]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["id", "Text", "LABEL"], Columns("Text", "LABEL")),
        (["instruction", "input", "output"], Columns("instruction", "output", None, "input", True)),
        (["output", "instruction"], Columns("instruction", "output", alpaca=True)),
        (["prompt", "response", "history"], Columns("prompt", "response", "history")),
        (["问题", "回答", "历史"], Columns("问题", "回答", "历史")),
        (["label", "content", "summary"], Columns("content", "summary")),
        (["conversations"], Columns("conversations", "conversations")),
        (["a", "b"], None),
        (["text"], None),
    ],
)
def test_columns_are_told_from_their_names(columns, found):
    assert guess_columns(columns) == found


def test_alpaca_prompts_equal_the_reference(write):
    loaded = read(write("alpaca.json", ALPACA["examples"]))
    assert [{"context": one.prompt, "target": one.response} for one in loaded.examples] == ALPACA["formatted"]
    assert alpaca_prompt("Say hi") == "Instruction: Say hi\nAnswer: "


def test_an_alpaca_column_chosen_by_hand_is_taken_as_it_is(write):
    loaded = read(write("alpaca.json", ALPACA["examples"]), Columns("instruction", "output"))
    assert loaded.examples[1].prompt == "把下面的句子翻译成英文"


def test_converted_alpaca_lines_equal_the_reference_and_read_the_same(write, tmp_path):
    source, target = write("alpaca.json", ALPACA["examples"]), tmp_path / "alpaca.jsonl"
    assert convert_alpaca(source, target) == 3
    assert [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()] == ALPACA[
        "formatted"
    ]
    assert pairs(read(target)) == pairs(read(source))


def test_text_lines_are_written_in_the_first_layout_and_refused_for_training(write, tmp_path):
    source, target = write("alpaca.json", ALPACA["examples"]), tmp_path / "text.jsonl"
    assert convert_alpaca(source, target, "text") == 3
    lines = [json.loads(line)["text"] for line in target.read_text(encoding="utf-8").splitlines()]
    assert lines[1] == (
        "### Instruction:\n把下面的句子翻译成英文\n\n### Input:\n今天天气很好。\n\n### Response:\n"
        "The weather is nice today.\nEND\n"
    )
    assert lines[2] == "### Instruction:\nSay hi\n\n### Response:\nHi!\nEND\n"
    refused = read(target)
    assert refused.examples == ()
    assert "convert_alpaca" in refused.stops[0].todo


def test_a_file_that_is_not_alpaca_is_not_converted(write, tmp_path):
    with pytest.raises(GLMError, match="no columns instruction and output; it has content, summary"):
        convert_alpaca(write("a.jsonl", ROWS), tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


# --- several turns ----------------------------------------------------------------------------------------------

HISTORY = (("在吗", "在的"), ("多少钱", '8 元, "含税"'))


@pytest.mark.parametrize(
    "history",
    [
        [list(pair) for pair in HISTORY],
        json.dumps([list(pair) for pair in HISTORY]),  # JSON in a cell
        str([list(pair) for pair in HISTORY]),  # as pandas writes a list into CSV
        [
            {"role": ("user", "assistant")[i], "content": text}
            for pair in HISTORY
            for i, text in enumerate(pair)
        ],
        [{"from": ("human", "gpt")[i], "value": text} for pair in HISTORY for i, text in enumerate(pair)],
    ],
)
def test_a_history_is_read_however_it_is_written(write, history):
    row = {"prompt": "好", "response": "谢谢", "history": history}
    rows = [
        row,
        {"prompt": "早", "response": "早！", "history": []},
        {"prompt": "晚", "response": "安", "history": None},
    ]
    loaded = read(write("a.jsonl", rows))
    assert [one.history for one in loaded.examples] == [HISTORY, (), ()]
    assert loaded.problems == ()


def test_an_unreadable_history_stops_with_its_lines(write):
    good = {"prompt": "a", "response": "b", "history": []}
    bad = ["gibberish", [["only a question"]], {"role": "user"}, [{"role": "user", "content": "x"}]]
    loaded = read(
        write("a.jsonl", [good, *(good | {"history": one} for one in bad)]),
        Columns("prompt", "response", "history"),
    )
    problem = loaded.stops[0]
    assert problem.message.startswith("The history cannot be read in ")
    assert set(problem.lines) <= {2, 3, 4, 5} and problem.count == len(problem.lines) >= 3


def test_every_answer_of_a_conversation_is_an_example(write):
    texts = ["q1", "a1", "q2", "a2"]
    sharegpt = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    system = [{"role": "system", "content": "Be kind."}]
    open_end = [{"role": "user", "content": "and?"}]
    loaded = read(
        write("a.jsonl", [{"conversations": sharegpt}, {"conversations": system + roles + open_end}])
    )
    assert loaded.examples == (
        Example("q1", "a1", (), 1),
        Example("q2", "a2", (("q1", "a1"),), 1),
        Example("Be kind.\nq1", "a1", (), 2),
        Example("q2", "a2", (("Be kind.\nq1", "a1"),), 2),
    )
    assert sentences(loaded, "warn") == ["The last question has no answer in 1 row (line 2); it is left out."]
    assert sentences(loaded, "note") == [
        "The system message was put before the first question in 1 row (line 2)."
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}],
        [
            {"role": "user", "content": "a"},
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "c"},
        ],
        [{"role": "user", "content": "a"}],
        "not a list",
    ],
)
def test_a_conversation_that_does_not_take_turns_stops(write, messages):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    loaded = read(write("a.jsonl", [{"messages": good}, {"messages": messages}]))
    assert [one.lines for one in loaded.stops] == [(2,)]


# --- what is wrong ----------------------------------------------------------------------------------------------


def test_all_problems_come_at_once(write):
    loaded = read(write("a.csv", "content,label\nx,spam\nx,spam\n,spam\ny,\nz,spam,surplus\nw,spam\n"))
    assert [one.message for one in loaded.stops] == [
        "a.csv has 1 row that does not fit the 2 columns of the header: line 6 has 3 cells.",
        "All 3 responses are 'spam': with one class there is nothing to learn.",
    ]
    assert sentences(loaded, "warn") == [
        "Left out: 1 row without a prompt (line 4).",
        "Left out: 1 row without a response (line 5).",
    ]
    with pytest.raises(GLMError) as raised:
        loaded.checked()
    assert "line 6 has 3 cells" in raised.value.message and "All 3 responses" in raised.value.message


def test_rows_to_measure_with_may_be_of_one_class(write):
    file = write("a.csv", "content,label\nx,spam\ny,spam\n")
    assert [one.message for one in read(file).stops] == [
        "All 2 responses are 'spam': with one class there is nothing to learn."
    ]
    assert read(file, training=False).problems == ()


def test_a_broken_line_is_named_and_left_out_on_request(write):
    file = write(
        "a.jsonl", '{"content": "a", "label": "0"}\n\n{"content": \n{"content": "b", "label": "1"}\n'
    )
    stopped = read(file)
    assert "line 3" in stopped.stops[0].message and len(stopped.stops) == 1
    loaded = read(file, options=ReadOptions(on_bad_rows="skip"))
    assert loaded.stops == ()
    assert [one.line for one in loaded.examples] == [1, 4]
    assert sentences(loaded, "warn") == ["Left out: 1 row not valid as JSON (line 3)."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "a.csv is empty."),
        ("content,label\n", "a.csv has no rows below its header."),
        ("content,label\n,1\nx,\n", "a.csv has 2 rows, but none with a prompt and a response."),
        (
            "foo,bar\n1,2\n",
            "The columns of a.csv do not say which is the prompt and which the response; it has foo, bar.",
        ),
    ],
)
def test_a_file_without_examples_stops_with_one_reason(write, content, said):
    loaded = read(write("a.csv", content))
    assert len(loaded.stops) == 1 and loaded.stops[0].message.startswith(said)
    assert loaded.examples == () and loaded.stops[0].todo


def test_a_file_that_breaks_off_tells_what_was_found_before(write):
    loaded = read(write("a.csv", 'content,label\n"x",0\n,0\n"never closed,1\n'))
    assert [one.severity for one in loaded.problems] == ["stop", "warn"]
    assert "the quotation mark opened on line 4 is never closed" in loaded.stops[0].message
    assert loaded.problems[1].lines == (3,)


def test_a_missing_file_is_a_problem_too(tmp_path):
    assert "No such file" in read(tmp_path / "none.csv").stops[0].message


def test_missing_columns_are_named_with_the_columns_there_are(write):
    loaded = read(write("a.csv", "content,label\nx,1\n"), Columns("text", "answer", "history"))
    assert [one.message for one in loaded.stops] == [
        f"a.csv has no column {name!r}; it has content, label." for name in ("text", "answer", "history")
    ]


def test_lines_are_those_of_the_file(write):
    csv = 'content,label\n\n"a\nb",0\n  \nc,1\n"say ""hi""",0\n,1\n"",1\nd,\n'
    loaded = read(write("a.csv", csv))
    assert [(one.prompt, one.line) for one in loaded.examples] == [("a\nb", 3), ("c", 6), ('say "hi"', 7)]
    assert [one.lines for one in loaded.problems] == [(8, 9), (10,)]


def test_lines_stay_right_behind_rows_that_were_left_out(write):
    rows = [f"text {i},{i % 2}" for i in range(50)]
    rows[10] += ",surplus"
    rows[30] = '"open" quote,1'
    loaded = read(
        write("a.csv", "content,label\n" + "\n".join(rows)), options=ReadOptions(on_bad_rows="skip")
    )
    assert len(loaded.examples) == 48
    assert all(one.prompt == f"text {one.line - 2}" for one in loaded.examples)


def test_half_a_character_is_replaced_and_said(write):
    lines = (
        r'{"content": "a\ud83d b", "label": "0"}' + "\n" + r'{"content": "\ud83d\ude00", "label": "1"}' + "\n"
    )
    loaded = read(write("a.jsonl", lines))
    assert [one.prompt for one in loaded.examples] == ["a\ufffd b", "😀"]
    assert sentences(loaded, "warn") == ["Half a character was read as \ufffd in 1 row (line 1)."]


def test_many_lines_are_counted_and_the_first_of_them_kept(write):
    loaded = read(write("a.csv", "content,label\n" + "x,1\ny,0\n" + ",1\n" * 500))
    problem = next(one for one in loaded.problems if "without a prompt" in one.message)
    assert problem.count == 500 and problem.lines == tuple(range(4, 104))
    assert problem.message == (
        "Left out: 500 rows without a prompt (line 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 490 more)."
    )


def test_rows_beyond_the_limit_are_counted(write):
    loaded = read(write("a.csv", "content,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(30))), limit=20)
    assert len(loaded.examples) == 20 and loaded.rows == 30
    assert loaded.problems == (
        Problem("warn", "a.csv has 30 rows; the first 20 are used.", "Raise the limit to use all.", count=10),
    )


@pytest.mark.parametrize(
    ("labels", "learned"),
    [
        (["0.0", "1.0", "0.0", "1.0"], ["0", "1", "0", "1"]),
        (["0.0", "1", "-2.00", "-0.0"], ["0", "1", "-2", "0"]),
        (["0", "1", "0", "1"], ["0", "1", "0", "1"]),
        (["0.5", "1.25", "0.5", "1.25"], ["0.5", "1.25", "0.5", "1.25"]),
    ],
)
def test_whole_numbers_with_decimals_become_whole_numbers_once(write, labels, learned):
    loaded = read(
        write("a.csv", "content,label\n" + "".join(f"t{i},{one}\n" for i, one in enumerate(labels)))
    )
    assert [one.response for one in loaded.examples] == learned
    assert loaded.stops == ()
    changed = sum(was != now for was, now in zip(labels, learned, strict=True))
    assert [one.count for one in loaded.problems if one.severity == "note"] == ([changed] if changed else [])


@pytest.mark.parametrize(
    "labels", [["0.0", "1.5", "2.0"], ["0.0", "1.0", "spam"] * 4, ["0.0", "nan", "1.0", "1.0", "0.0"] * 3]
)
def test_decimals_among_other_labels_stop(write, labels):
    loaded = read(
        write("a.csv", "content,label\n" + "".join(f"t{i},{one}\n" for i, one in enumerate(labels)))
    )
    assert [one.message.split(" (")[0] for one in loaded.stops][0].startswith(
        "The column 'label' mixes 0.0 with "
    )


def test_an_answer_that_is_a_decimal_among_texts_stays_as_it_is(write):
    rows = [{"question": f"q{i}", "answer": f"It is {i}."} for i in range(20)]
    loaded = read(write("a.jsonl", [*rows, {"question": "1.5 + 1.5?", "answer": "3.0"}]))
    assert loaded.examples[-1].response == "3.0" and loaded.problems == ()


def test_classes_are_few_short_and_repeated():
    assert labels_of(["a", "b", "a", "a", "b"]) == {"a": 3, "b": 2}
    assert labels_of(["a", "b", "c", "a"]) is None
    assert labels_of(["x" * 41] * 9) is None
    assert labels_of([str(i) for i in range(51)] * 9) is None
