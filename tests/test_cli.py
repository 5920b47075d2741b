"""Claims about the shell: the engine and jobs of the pages, exit codes for scripts, never a traceback."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from glm_core import batch, cli, doctor, engine, jobs, tables
from glm_core.cli import chat as talking
from glm_core.cli import checkpoints as showing
from glm_core.cli import job as labelling
from glm_core.cli.output import printable
from glm_core.engine import GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.jobs import Progress, Result
from glm_core.settings import Settings
from glm_core.tokenizers.base import Message
from tests.conftest import REPOSITORY

ROWS = [["1", "你好 =1+1"], ["2", "=SUM(A1)"], ["3", "{x} 谢谢"], ["4", "last"]]


@pytest.fixture
def loaded(tiny_checkpoint):
    """The small checkpoint in this process; commands that name it find it loaded."""
    running = engine.host().use(tiny_checkpoint)
    if running.exact is None:
        running.self_test()  # the one in the background is over by then, too
    return running


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "评论 表.csv", ROWS)


@pytest.fixture
def store():
    settings = Settings.read()
    settings.make_folders()
    return jobs.store(settings)


@pytest.fixture
def run(capsys):
    """Run a command: its exit status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        status = cli.main([str(part) for part in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture
def label(run, table, tmp_path, tiny_checkpoint):
    """Run `batch` on the table, with five tokens per row."""

    def call(*more, out="answers.csv", file=table, prompt="翻译：{comment}"):
        which = ("--prompt", prompt) if prompt else ()
        model = ("--model", tiny_checkpoint, "--max-new-tokens", 5)
        return run("batch", file, *which, "--out", tmp_path / out, *model, *more)

    return call


def write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "comment"], *rows])
    return path


def read_table(path):
    opened = tables.open_table(path)
    return [dict(zip(opened.info.columns, row, strict=True)) for row in opened]


def pipe(monkeypatch, text, typed=False):
    stream = io.StringIO(text)
    stream.isatty = lambda: typed
    monkeypatch.setattr(sys, "stdin", stream)


def interrupt_when(claim):
    """Press Ctrl-C as soon as the claim holds."""
    # A shell that runs the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if claim():
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()


def greedy(loaded, *contents, tokens=8):
    """What the engine answers after these alternating questions and answers."""
    messages = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(contents)]
    ids = tuple(loaded.tokenizer.chat_ids(messages))
    handle = loaded.submit(Request(ids, GenerationSettings(max_new_tokens=tokens)))
    assert handle.wait(30)
    return handle.text


# ---- start, usage, errors


def test_help_needs_no_model_no_torch_and_no_workspace(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    (tmp_path / "pandas.py").write_text("raise RuntimeError('pandas was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GLM_WORKSPACE": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "glm_core", "--help"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert done.returncode == 0 and done.stderr == ""
    for command in ("chat", "batch", "models", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["classify-everything"],
        ["batch", "a.csv", "--out", "b.csv"],
        ["batch", "a.csv", "--column", "x", "--prompt", "{x}", "--out", "b.csv"],
        ["batch", "a.csv", "--column", "x"],
        ["batch", "a.csv", "--column", "x", "--out", "b.csv", "--limit", "0"],
        ["chat", "--precision", "int3"],
    ],
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m glm_core" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "--model", "no/such folder", "--prompt", "hi"], "no/such folder"),
        (["chat", "--temperature", "-1", "--prompt", "hi"], "temperature is -1"),
        (["models", "inspect", "no/such folder"], "no/such folder"),
        (["batch", "no such.csv", "--column", "x", "--out", "b.csv"], "no such.csv"),
        (["batch", "a.csv", "--column", "x", "--out", "b.docx"], ".xlsx"),
        (["batch", "a.csv", "--column", "x", "--out", "no/such/b.csv"], "folder no/such"),
    ],
)
def test_a_problem_is_one_line_with_a_way_out_and_ends_with_1(arguments, said, run):
    status, out, err = run(*arguments)
    assert status == 1 and out == ""
    assert err.startswith("Error: ") and err.count("\n") == 1 and said in err


def test_a_missing_package_leads_to_doctor(monkeypatch, run):
    def models(options):
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    monkeypatch.setattr(showing, "models", models)
    status, _, err = run("models")
    assert status == 1 and "psutil is missing" in err and "doctor" in err and err.count("\n") == 1


def test_a_traceback_goes_to_the_log_of_the_workspace(monkeypatch, run, store):
    def models(options):
        try:
            raise ValueError("inside")
        except ValueError as error:
            logging.getLogger("glm_core.engine").exception("loading failed")
            raise GLMError("The model did not load.", "See the log.") from error

    monkeypatch.setattr(showing, "models", models)
    status, _, err = run("models")
    assert status == 1 and err == "Error: The model did not load. See the log.\n"
    assert "ValueError: inside" in (store.path.parent / "logs" / "shell.log").read_text(encoding="utf-8")


def test_a_closed_pipe_is_no_error(monkeypatch):
    def closed(options):
        raise BrokenPipeError

    monkeypatch.setattr(showing, "models", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert cli.main(["models"]) == 1


def test_output_never_steers_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\x9bc\n\td 你好") == "a[2Jbc\n\td 你好"


# ---- models and doctor


def test_models_lists_what_is_there_and_what_is_wrong_with_it(run, workspace, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, workspace / "checkpoints" / "模型 v1.1")
    broken = workspace / "checkpoints" / "half a copy"
    shutil.copytree(tiny_checkpoint, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    status, out, _ = run("models")
    assert status == 0
    lines = out.splitlines()
    good = next(line for line in lines if line.startswith("模型 v1.1"))
    assert "ChatGLM3" in good and "2,048" in good and "BF16" in good
    assert (
        "model.safetensors is cut off"
        in lines[1 + lines.index(next(x for x in lines if x.startswith("half")))]
    )
    head = lines[0].index("folder")
    assert good.index(str(workspace)) == head - 2, "two Chinese characters take four columns"
    listed = json.loads(run("models", "--json")[1])
    assert {one["name"]: one["loadable"] for one in listed}.items() >= {
        "模型 v1.1": True,
        "half a copy": False,
    }.items()


def test_inspect_shows_the_memory_per_precision(run, tiny_checkpoint):
    status, out, _ = run("models", "inspect", tiny_checkpoint)
    assert status == 0 and "ChatGLM3" in out and "fp32" in out and "2,048 tokens" in out
    facts = json.loads(run("models", "inspect", tiny_checkpoint, "--json")[1])
    assert facts["memory_bytes"]["fp32"] == 4 * facts["parameters"] and facts["fingerprint"]


@pytest.mark.parametrize(
    "error", ["RuntimeError('Unknown platform')", "FileNotFoundError('nvcuda.dll')", "OSError('libcuda')",
              "ImportError('libcudart')", "SystemExit('no')"],
)  # fmt: skip
def test_doctor_survives_a_broken_cpm_kernels(error, tmp_path, monkeypatch, run):
    (tmp_path / "cpm_kernels.py").write_text(f"print('noise')\nraise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cpm_kernels", raising=False)
    _, out, _ = run("doctor", "--json")
    kernels = json.loads(out)["kernels"]["cpm_kernels"]
    assert not kernels["usable"] and error.split("'")[1] in kernels["reason"]


def test_doctor_names_what_is_missing_with_its_pip_line(tmp_path, monkeypatch, run):
    (tmp_path / "requirements.txt").write_text(
        "# Needed\nno-such-package>=3,<4\npytest>=99 # newer\npsutil\n"
    )
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)
    status, out, _ = run("doctor")
    assert status == 1
    assert 'pip install "no-such-package>=3,<4"' in out and 'pip install "pytest>=99"' in out
    assert "psutil" in out and '"psutil"' not in out


def test_doctor_shows_the_machine_as_text_and_json(run, workspace, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, workspace / "checkpoints" / "mine")
    found = json.loads(run("doctor", "--json")[1])
    assert found["program"]["python"] == platform.python_version()
    assert found["packages"]["torch"]["fits"] and found["devices"]["cpu"] == "usable"
    assert set(found["processor"]["features"]) >= {"avx2", "avx512_bf16", "amx_bf16"}
    assert found["memory"]["total_bytes"] > found["memory"]["free_bytes"] > 0
    assert found["workspace"]["folder"] == str(workspace) and found["workspace"]["disk_free_bytes"] > 0
    assert found["models"][str(workspace / "checkpoints" / "mine")] == "ChatGLM3: can be loaded"
    assert not any("checkpoint" in problem["what"] for problem in found["problems"])
    text = run("doctor")[1]
    name = rf"\b{re.escape(platform.node())}\b"  # a short one may be part of a word
    assert "cpm_kernels" in text and not re.search(name, text.replace(str(workspace), ""))


def test_doctor_works_without_torch_in_a_forbidden_workspace(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("GLM_WORKSPACE", str(REPOSITORY / "inside"))
    status, out, _ = run("doctor")
    assert status == 1 and "PyTorch does not start" in out and "inside the program's own folder" in out


def test_doctor_goes_on_where_one_part_cannot_be_found_out(monkeypatch, tmp_path, run):
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)  # no requirements.txt
    found = json.loads(run("doctor", "--json")[1])
    assert "FileNotFoundError" in found["packages"]["error"] and "total" in found["memory"]


# ---- chat


def test_one_shot_prints_the_answer_and_nothing_else(run, loaded, tiny_checkpoint):
    asked = (
        "chat",
        "--model",
        tiny_checkpoint,
        "--temperature",
        0,
        "--max-new-tokens",
        8,
        "--prompt",
        "你好",
    )
    status, out, _ = run(*asked)
    assert status == 0 and out == printable(greedy(loaded, "你好")) + "\n"
    assert run(*asked)[1] == out
    assert engine.host().current is loaded, "a command unloads only what it has loaded"


def test_piped_lines_are_questions_with_history_until_clear(run, loaded, tiny_checkpoint, monkeypatch):
    first = greedy(loaded, "one")
    second = greedy(loaded, "one", first, "one")
    assert first != second
    pipe(monkeypatch, "one\n\none\nclear\none\nstop\nnever asked\n")
    status, out, err = run("chat", "--model", tiny_checkpoint, "--temperature", 0, "--max-new-tokens", 8)
    assert status == 0 and out == printable(f"{first}\n{second}\n{first}\n")
    assert "The history is empty." in err


def test_trimmed_history_is_said(run, loaded, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(loaded, "context", 64)
    pipe(monkeypatch, "".join(f"a question of some length number {n}\n" for n in range(4)))
    status, out, err = run("chat", "--model", tiny_checkpoint, "--temperature", 0, "--max-new-tokens", 8)
    assert status == 0 and len(out.splitlines()) >= 4
    assert "at the beginning no longer fit" in err and "of 64 tokens of context" in err


def test_a_question_that_does_not_fit_is_refused_and_the_next_answered(
    run, loaded, tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(loaded, "context", 48)
    pipe(monkeypatch, "太长了" * 99 + "\nshort\n")
    status, out, err = run("chat", "--model", tiny_checkpoint, "--temperature", 0, "--max-new-tokens", 8)
    assert status == 1 and out == greedy(loaded, "short") + "\n"
    assert "there is room for 40" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(run, loaded, tiny_checkpoint, monkeypatch):
    talks = []

    class Seen(talking._Talk):
        def __init__(self, *values):
            super().__init__(*values)
            talks.append(self)

    monkeypatch.setattr(talking, "_Talk", Seen)
    pipe(monkeypatch, "tell me everything\nshort\n", typed=True)
    handles = set(loaded._handles)

    def saying():
        new = [handle for key, handle in list(loaded._handles.items()) if key not in handles]
        return new and new[0].n_tokens > 5

    interrupt_when(saying)
    model = (
        "--model",
        tiny_checkpoint,
        "--max-new-tokens",
        1500,
        "--stop",
        "no such text",
        "--temperature",
        0,
    )
    status, out, err = run("chat", *model)
    assert status == 0 and "stopped" in err
    question, said, after, _ = talks[0].turns
    assert (question.content, after.content) == ("tell me everything", "short")
    assert said.content and said.content in out


def test_ctrl_c_in_a_one_shot_ends_with_130_after_what_was_said(run, loaded, tiny_checkpoint):
    before = set(loaded._handles)

    def saying():
        return any(handle.n_tokens > 5 for key, handle in list(loaded._handles.items()) if key not in before)

    interrupt_when(saying)
    model = ("--model", tiny_checkpoint, "--max-new-tokens", 300, "--temperature", 0)
    status, out, _ = run("chat", *model, "--prompt", "tell me everything")
    assert status == 130 and out.strip()


@pytest.mark.parametrize(
    ("text", "shown"), [("abc ", "abc"), ("abc#", "abc"), ("abc##", "abc"), ("ab#c", "ab#c"), ("", "")]
)
def test_what_may_become_a_stop_text_is_not_shown_yet(text, shown):
    assert talking._settled(text, ("###",)) == shown


# ---- batch


def test_batch_keeps_the_table_and_adds_answers_and_a_manifest(label, loaded, tmp_path, table):
    status, out, err = label()
    assert status == 0 and "4 rows answered, 0 failed" in out and "4 of 4 rows (100%)" in err
    found = read_table(tmp_path / "answers.csv")
    assert [row["id"] for row in found] == ["1", "2", "3", "4"]
    assert [row["comment"] for row in found] == ["你好 =1+1", "'=SUM(A1)", "{x} 谢谢", "last"]
    expected = greedy(loaded, "翻译：{x} 谢谢", tokens=5)
    assert found[2]["answer"] == expected and found[2]["status"] == "ok"
    manifest = json.loads((tmp_path / "answers.csv.manifest.json").read_text(encoding="utf-8"))
    assert manifest["task"]["precision"] == "fp32" and manifest["task"]["input_sha256"] == batch.file_sha256(
        table
    )
    assert manifest["task"]["settings"]["temperature"] == 0


def test_a_finished_job_is_exported_again_without_computing(label, loaded, store, tmp_path, monkeypatch):
    assert label()[0] == 0

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(batch, "run", never)
    first = [row["answer"] for row in read_table(tmp_path / "answers.csv")]
    for name in ("again.xlsx", "again.jsonl", "again.parquet"):
        status, out, err = label(out=name)
        assert status == 0 and "answered these rows already" in err and "4 rows answered" in out
        assert [row["answer"] for row in read_table(tmp_path / name)] == first
        assert (tmp_path / f"{name}.manifest.json").is_file()
    assert label("--no-guard")[0] == 0
    assert read_table(tmp_path / "answers.csv")[1]["comment"] == "=SUM(A1)"
    assert len(store.list()) == 1


def test_another_prompt_other_rows_or_restart_is_another_job(label, loaded, store, table):
    label()
    label(prompt="Say: {comment}")
    label("--column", "comment", prompt=None)
    label("--limit", "2")
    made = sorted(store.list(), key=lambda job: job.created)
    assert [job.total for job in made] == [4, 4, 4, 2]
    assert made[2].task["template"] == "{comment}"
    label("--restart")
    assert len(store.list()) == 5
    write_table(table, ROWS[:3])
    label()
    assert sorted(job.total for job in store.list()) == [2, 3, 4, 4, 4, 4]


def test_ctrl_c_pauses_and_the_same_command_goes_on(label, loaded, store, tmp_path, monkeypatch):
    monkeypatch.setitem(loaded.limits, "batch", 4)
    monkeypatch.setattr(batch, "COMMIT_S", 0.02)
    file = write_table(tmp_path / "many.csv", [[str(n), f"comment number {n}"] for n in range(300)])
    interrupt_when(lambda: store.list() and store.list()[0].done >= 8)
    status, out, err = label("--restart", file=file)
    assert status == 130 and out == "" and not (tmp_path / "answers.csv").exists()
    assert "Paused: " in err and "To go on: python -m glm_core batch" in err and "--restart" not in err
    job = store.list()[0]
    assert job.state == "paused" and 8 <= job.done < 300
    kept = {result.idx: result for _, _, result in store.iter_results(job.id) if result}
    monkeypatch.undo()
    monkeypatch.setenv("GLM_WORKSPACE", str(store.path.parent))
    status, out, err = label(file=file)
    assert status == 0 and f"goes on: {job.done:,} of 300 rows are done" in err and "300 rows answered" in out
    after = {result.idx: result for _, _, result in store.iter_results(job.id)}
    assert len(after) == 300 and all(after[idx] == result for idx, result in kept.items())
    assert store.get(job.id).attempt == 2 and len(store.list()) == 1


def test_a_job_of_a_killed_process_is_taken_over(label, loaded, store):
    label()
    job = store.list()[0]
    with store.writing() as db:
        dead = f"{platform.node()}:999999999:1"
        db.execute("DELETE FROM result WHERE idx = 2")
        db.execute("UPDATE job SET state = 'running', done = 3, owner = ?, marked = 0", (dead,))
    status, out, err = label()
    assert status == 0 and "goes on: 3 of 4 rows" in err and "4 rows answered" in out
    assert store.get(job.id).state == "done"


def test_a_job_of_a_live_process_is_watched_not_run(label, loaded, store, monkeypatch):
    label()
    monkeypatch.setattr(labelling, "POLL_S", 0.02)
    job = store.list()[0]
    me = jobs.this_process()
    with store.writing() as db:
        db.execute("DELETE FROM result WHERE idx = 2")
        db.execute("UPDATE job SET state = 'running', done = 3, owner = ?", (me,))

    def finish():
        time.sleep(0.3)
        store.save_results(job.id, [Result(2, "ok", "by the other")], me)
        store.release(job.id, me, "done")

    threading.Thread(target=finish).start()
    status, out, err = label()
    assert status == 0 and "is run by another process" in err and "4 rows answered" in out
    assert store.get(job.id).attempt == 1


def test_failed_rows_end_with_3_and_can_be_tried_again(label, loaded, monkeypatch, tmp_path):
    def run(job, store, stop):
        rows = store.pending(job.id, 100)
        results = [
            Result(idx, "failed" if idx == 1 else "ok", "x", error="Too odd." * (idx == 1)) for idx, _ in rows
        ]
        store.save_results(job.id, results, job.owner)

    with monkeypatch.context() as patched:
        patched.setattr(batch, "run", run)
        status, out, err = label()
    assert status == 3 and "3 rows answered, 1 failed" in out and "--retry-failed" in err
    assert read_table(tmp_path / "answers.csv")[1]["note"] == "Too odd."
    assert label()[0] == 3, "without asking for it nothing is computed again"
    status, out, _ = label("--retry-failed")
    assert status == 0 and "4 rows answered, 0 failed" in out
    assert [row["answer"] == "x" for row in read_table(tmp_path / "answers.csv")] == [True, False, True, True]


def test_a_job_that_fails_says_why_and_goes_on_with_the_same_command(label, loaded, monkeypatch):
    def run(job, store, stop):
        store.save_results(job.id, [Result(0, "ok", "x")], job.owner)
        raise GLMError("The disk has gone.", "Plug it in.")

    with monkeypatch.context() as patched:
        patched.setattr(batch, "run", run)
        status, out, err = label()
    assert status == 1 and out == ""
    assert (
        "Error: The disk has gone. Plug it in. 1 of 4 rows are done and kept. The same command goes on."
        in err
    )
    assert label()[0] == 0


def test_everything_is_checked_before_a_job_exists(label, loaded, store, table, tmp_path):
    wrong = {
        ("--column", "text"): "it has id, comment",
        ("--prompt", "{text}"): "{text}",
        ("--prompt", "no column"): "uses no column",
        ("--column", "comment", "--system", "x " * 3000): "The template alone has",
        ("--column", "comment", "--encoding", "klingon"): "klingon",
        ("--column", "comment", "--temperature", "99"): "temperature is 99",
    }
    for more, said in wrong.items():
        status, _, err = label(*more, prompt=None)
        assert status == 1 and said in err and err.count("\n") == 1
    status, _, err = label(out=table.name)
    assert status == 1 and "is the table itself" in err
    assert not store.list()


def test_reading_options_reach_the_reader(label, loaded, store, tmp_path):
    file = tmp_path / "odd.txt"
    file.write_bytes("id\tcomment\n1\t你好\n2\tone\ttoo many\n".encode("gb18030"))
    reading = ("--encoding", "gb18030", "--delimiter", "tab", "--on-bad-rows", "skip")
    status, out, err = label(*reading, file=file)
    assert status == 0 and "1 row answered" in out and "Note: " in err
    assert read_table(tmp_path / "answers.csv")[0]["comment"] == "你好"


# ---- progress


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress(0, 0, 200, 0.0, None, "running", "Loading glm"), "0 of 200 rows (0%), Loading glm"),
        (Progress(95, 5, 2000, 0.158, 12000.0, "running", ""),
         "100 of 2,000 rows (5%), 5 failed, 0.2 rows/s, about 3 h 20 min left"),
        (Progress(10, 0, 10, 4.0, None, "done", ""), "10 of 10 rows (100%), 4.0 rows/s"),
        (Progress(0, 0, 0, 0.0, None, "queued", ""), "0 of 0 rows (0%)"),
    ],
)  # fmt: skip
def test_progress_has_rows_rate_and_time_left(progress, line):
    assert labelling._progress_line(progress).split("] ")[1] == line


def test_a_terminal_gets_one_line_and_a_log_plain_lines_now_and_then(monkeypatch, capsys):
    progress = Progress(1, 0, 2, 1.0, 1.0, "running", "")
    meter = labelling._Meter()
    for _ in range(5):
        meter.show(progress)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    meter = labelling._Meter()
    meter.show(progress)
    meter.show(progress, last=True)
    shown = capsys.readouterr().err
    assert shown.count("\r") == 2 and shown.count("\n") == 1
