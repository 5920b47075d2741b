"""Batch: choosing a table, what the prompt will be, the trial, the job, and what comes back."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest

from glm_core import batch, jobs, tables
from glm_core.jobs import Result
from glm_core.settings import DATA, Settings
from pages.shared import results_panel, table_input

SAMPLE = DATA / "samples" / "comments.csv"
GB = "编号,留言\n0012,好用😀\n0013,NA\n".encode("gb18030")


def store():
    return jobs.store(Settings.read())


def upload(app, name: str, data: bytes):
    uploader = next(one for one in app.get("file_uploader"))
    return uploader.set_value((name, data, "application/octet-stream")).run()


def click(app, key: str):
    return app.button(key=key).click().run()


def address(app) -> dict[str, str]:
    """The parameters of the page's address."""
    return {key: one if isinstance(one, str) else one[0] for key, one in app.query_params.items()}


def button(app, start: str):
    return next(one for one in app.button if str(one.key).startswith(start))


def table_of(app, what: str):
    """The table on the page that has such a column: the first rows, the trial or the results."""
    column = {"trial_rows": "tokens in → out", "table_": "status"}.get(what)
    return next(one.value for one in app.dataframe if column is None or column in one.value.columns)


def finished_job(results: list[Result], columns=("id", "comment"), cells=None, name="notes.csv"):
    """A job that is done, with these results."""
    rows = cells or [(f"{i:04d}", f"comment {i}") for i in range(len(results))]
    task = batch.BatchTask(
        checkpoint="gone", checkpoint_fingerprint="0", precision="fp32", device="cpu", template="{comment}",
        system="", settings=batch_settings(), output_column="answer", input_name=name, input_path=name,
        input_sha256="", columns=tuple(columns),
    )  # fmt: skip
    made = store().create("batch", name, task.to_json())
    store().add_rows(made.id, rows)
    store().mark_ready(made.id)
    store().claim(("batch",), "test:1:1", made.id)
    store().save_results(made.id, results, "test:1:1")
    store().release(made.id, "test:1:1", "done")
    return store().get(made.id)


def batch_settings():
    from glm_core.engine import GenerationSettings

    return GenerationSettings(max_new_tokens=8)


def wait_for(app, job_id: str, state: str = "done", seconds: float = 60.0):
    jobs.supervisor(Settings.read())
    end = time.monotonic() + seconds
    while store().get(job_id).state != state and time.monotonic() < end:
        time.sleep(0.05)
    assert store().get(job_id).state == state, store().get(job_id).message
    return app.run()


# --- the table


def test_without_a_table_the_page_asks_for_one(open_page, words):
    app = open_page("batch")
    assert not app.exception
    assert "1 · Choose a table" in words(app)
    assert {"sample_comments", "sample_questions"} <= {one.key for one in app.button}


def test_the_sample_comes_with_a_ready_template(open_page, words):
    app = open_page("batch", sample="comments")
    assert app.text_area(key="widget.batch.sample_comments.template").value.endswith("评论：{comment}")
    assert "60 rows · 4 columns" in words(app)


def test_the_sample_keeps_long_ids_and_leading_zeros():
    rows = list(tables.open_table(SAMPLE))
    assert len(rows) == 60
    assert rows[0][0] == "0007"
    assert "1734567890123456789" in {row[0] for row in rows}
    assert "NA" in {row[3] for row in rows}


def test_a_chinese_file_of_excel_opens_as_it_is(open_page, words):
    app = upload(open_page("batch"), "留言.csv", GB)
    assert not app.exception
    shown = table_of(app, "first_rows")
    assert list(shown.columns) == ["编号", "留言"]
    assert shown.values.tolist() == [["0012", "好用😀"], ["0013", "NA"]]
    assert "2 rows · 2 columns" in words(app)


def test_an_upload_is_found_again_by_its_address(open_page, words):
    app = upload(open_page("batch"), "../../留言.csv", GB)
    where = address(app)
    assert where["file"] == "留言.csv"
    assert (Settings.read().uploads / where["table"]).is_file()
    again = open_page("batch", **where)
    assert "2 rows · 2 columns" in words(again)


@pytest.mark.parametrize("stored", ["../workbench.db", "0" * 32 + ".csv", "/etc/passwd"])
def test_an_address_opens_no_other_file(open_page, stored):
    app = open_page("batch", table=stored)
    assert not app.exception
    assert "no longer in the workspace" in app.error[0].value


def test_another_encoding_can_be_chosen(open_page):
    app = upload(open_page("batch"), "a.csv", GB)
    picker = next(one for one in app.selectbox if str(one.key).startswith("read_encoding"))
    picker.set_value("big5").run()
    assert not app.exception
    picker = next(one for one in app.selectbox if str(one.key).startswith("read_encoding"))
    picker.set_value("gb18030").run()
    assert not app.error
    assert list(table_of(app, "first_rows").columns) == ["编号", "留言"]


def test_a_bad_row_is_a_sentence_and_can_be_left_out(open_page, words):
    app = upload(open_page("batch"), "a.csv", b"id,text\n1,one\n2,two,three\n3,three\n")
    assert not app.exception
    assert "line 3" in app.error[0].value
    picker = next(one for one in app.selectbox if str(one.key).startswith("read_on_bad_rows"))
    picker.set_value("skip").run()
    assert not app.error
    assert "2 rows · 2 columns" in words(app)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.csv", b""),
        ("picture.csv", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("broken.json", b'[{"a": 1},'),
        ("no.xlsx", b"PK\x03\x04" + bytes(40)),
    ],
)
def test_what_is_no_table_is_a_sentence(open_page, name, data):
    app = upload(open_page("batch"), name, data)
    assert not app.exception
    assert app.error


def test_records_under_a_key_and_lines_are_tables_too(open_page, words):
    nested = json.dumps({"data": [{"q": "a"}, {"q": "b"}]}).encode()
    assert "2 rows · 1 columns" in words(upload(open_page("batch"), "a.json", nested))
    assert "3 rows · 1 columns" in words(upload(open_page("batch"), "a.jsonl", b'{"q": "x"}\n' * 3))


def test_a_path_outside_the_allowed_folders_is_refused(open_page, tmp_path, monkeypatch):
    monkeypatch.setenv("GLM_TABLES", str(tmp_path / "tables"))
    app = open_page("batch")
    app.text_input(key="path_form_text").set_value("/etc/hostname")
    app = click(app, "open_path")
    assert not app.exception
    assert "outside the folders" in app.error[0].value


def test_a_path_inside_is_opened(open_page, words, tmp_path, monkeypatch):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "big.tsv").write_text("a\tb\n1\t2\n")
    monkeypatch.setenv("GLM_TABLES", str(folder))
    app = open_page("batch")
    app.text_input(key="path_form_text").set_value(str(folder / "big.tsv"))
    assert "1 rows · 2 columns" in words(click(app, "open_path"))


# --- the prompt


def test_a_column_button_puts_its_name_into_the_template(open_page):
    app = open_page("batch", sample="questions")
    pills = next(one for one in app.get("button_group") if "insert_" in str(one.proto.id))
    pills.set_value("language").run()
    assert app.text_area(key="widget.batch.sample_questions.template").value == "{question} {language}"


def test_the_exact_prompt_of_any_row_is_shown_with_its_tokens(open_page, words, loaded_model):
    app = open_page("batch", sample="comments")
    app.number_input(key="preview_row_sample:comments").set_value(9).run()
    assert not app.exception
    shown = next(one.value for one in app.code)
    assert "城北老周" not in shown
    assert "修路我支持" in shown
    assert shown.endswith("<|assistant|>")
    assert "row 9: " in words(app)


def test_an_unknown_column_is_a_sentence_and_what_was_typed_stays(open_page, loaded_model):
    app = open_page("batch", sample="comments")
    app.text_area(key="widget.batch.sample_comments.template").set_value("Rate {coment}").run()
    assert not app.exception
    assert "coment" in app.error[0].value
    assert button(app, "run_").disabled
    assert app.text_area(key="widget.batch.sample_comments.template").value == "Rate {coment}"
    app = click(app, "use_suggested")
    assert not app.error
    assert not button(app, "run_").disabled


def test_a_prompt_too_long_for_the_model_says_what_is_cut(open_page, words, loaded_model):
    app = upload(open_page("batch"), "long.csv", ("text\n" + "天空 " * 3000 + "\n").encode())
    assert not app.exception
    assert "characters are cut" in words(app)


def test_a_template_of_ones_own_outlives_the_sample_and_the_page(open_page, loaded_model):
    app = upload(open_page("batch"), "a.csv", b"q\nwhat?\n")
    app.text_area(key="widget.batch.own.template").set_value("My own words: {q}").run()
    app = click(click(app, "another_table"), "sample_comments")
    app = upload(click(app, "another_table"), "a.csv", b"q\nwhat?\n")
    assert app.text_area(key="widget.batch.own.template").value == "My own words: {q}"
    assert (
        upload(open_page("batch"), "b.csv", b"q\nwho?\n").text_area(key="widget.batch.own.template").value
        == "My own words: {q}"
    )


# --- trial, run, results


def test_a_trial_answers_five_rows_and_says_how_long_all_will_take(open_page, words, loaded_model):
    app = open_page("batch", sample="comments")
    app.number_input(key="widget.batch.max_new_tokens").set_value(4).run()
    app = click(app, "try")
    assert not app.exception
    assert len(table_of(app, "trial_rows")) == 5
    assert "rows/s" in words(app)
    assert "for 60 rows" in words(app)
    app.number_input(key="widget.batch.max_new_tokens").set_value(5).run()
    assert "measured before the last change" in words(app)


def test_a_run_becomes_one_job_whose_table_comes_back_unchanged(open_page, words, loaded_model):
    app = open_page("batch", sample="comments")
    app.number_input(key="widget.batch.max_new_tokens").set_value(3).run()
    app.number_input(key="limit_sample:comments").set_value(7).run()
    button(app, "run_").click().run()
    assert not app.exception
    job_id = address(app)["job"]
    assert [job.id for job in store().list()] == [job_id]
    app = wait_for(app, job_id)
    assert not app.exception
    shown = table_of(app, "table_")
    own = [list(cells) for cells in tables.open_table(SAMPLE).preview(7)]
    assert shown[["id", "site", "user", "comment"]].values.tolist() == own
    job = store().get(job_id)
    with results_panel._file(job, "csv", True).open(encoding="utf-8-sig", newline="") as file:
        exported = list(csv.DictReader(file))
    assert [row["id"] for row in exported] == [row[0] for row in own]
    assert {row["status"] for row in exported} == {"ok"}
    assert job.task["input_sha256"] == batch.file_sha256(SAMPLE)


def test_a_job_goes_on_where_another_session_looks(open_page, words, loaded_model):
    app = open_page("batch", sample="questions")
    app.number_input(key="widget.batch.max_new_tokens").set_value(2).run()
    button(app, "run_").click().run()
    job_id = address(app)["job"]
    other = wait_for(open_page("batch", job=job_id), job_id)
    assert "of 12 rows" in words(other)


def test_an_unknown_job_is_a_sentence(open_page):
    app = open_page("batch", job="20260101-000000-abcdef")
    assert not app.exception
    assert "There is no job" in app.error[0].value


def test_results_can_be_narrowed_to_failed_and_truncated_rows(open_page):
    job = finished_job(
        [
            Result(0, "ok", "yes"),
            Result(1, "failed", error="Too long."),
            Result(2, "ok", "no", truncated=True),
        ]
    )
    app = open_page("batch", job=job.id)
    assert not app.exception
    assert len(table_of(app, "table_")) == 3
    pills = next(one for one in app.get("button_group") if "filter_" in str(one.proto.id))
    pills.set_value("failed").run()
    assert table_of(app, "table_")["note"].tolist() == ["Too long."]


def test_a_page_of_results_has_at_most_a_hundred_rows(open_page):
    job = finished_job([Result(i, "ok", str(i)) for i in range(250)])
    app = open_page("batch", job=job.id)
    assert not app.exception
    assert len(table_of(app, "table_")) == 100
    assert not app.get("plotly_chart")  # 250 different answers are no distribution


def test_few_answers_make_a_chart(open_page):
    job = finished_job([Result(i, "ok", "spam" if i % 3 else "normal") for i in range(9)])
    app = open_page("batch", job=job.id)
    assert not app.exception
    assert app.get("plotly_chart")
    assert results_panel._answers(job.id, "x") == [("spam", 6), ("normal", 3)]


def test_a_formula_is_guarded_unless_a_program_reads_the_file(open_page):
    job = finished_job([Result(0, "ok", "=1+1")], cells=[("0001", "@home")])
    app = open_page("batch", job=job.id)

    def answer(guard: bool) -> str:
        text = results_panel._file(job, "csv", guard).read_text(encoding="utf-8-sig")
        return next(csv.DictReader(io.StringIO(text)))["answer"]

    assert answer(True) == "'=1+1"
    app.toggle(key="widget.batch.export_guard").set_value(False).run()
    assert answer(False) == "=1+1"


@pytest.mark.parametrize("form", ["csv", "xlsx", "jsonl", "parquet"])
def test_every_format_comes_with_its_manifest(open_page, form):
    job = finished_job([Result(0, "ok", "yes")])
    app = open_page("batch", job=job.id)
    next(one for one in app.get("button_group") if "export_format" in str(one.proto.id)).set_value(form).run()
    assert not app.exception
    file = results_panel._file(job, form, True)
    assert file.is_file()
    assert json.loads(Path(f"{file}.manifest.json").read_text())["counts"]["done"] == 1
    assert len(app.get("download_button")) == 2


def test_the_page_speaks_chinese(open_page, words, loaded_model):
    app = open_page("batch", sample="comments", lang="zh")
    assert not app.exception
    assert "批量预测" in words(app)
    assert "实际提示词" in words(app)


def test_widths_show_every_column():
    found = table_input.widths(("a", "b"), [("x" * 500, "y")])
    assert found["a"]["width"] <= 300
    assert found["b"]["width"] >= 64
