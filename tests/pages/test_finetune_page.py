"""Fine-tuning: the data and everything wrong with it, the form, the check, the start, the curve and the report."""

from __future__ import annotations

import io
import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from glm_core import jobs
from glm_core.cli import arguments
from glm_core.cli import finetune as shell
from glm_core.finetune.adapt import Adapt
from glm_core.finetune.examples import Columns
from glm_core.finetune.job import FinetuneJob
from glm_core.finetune.loop import Plan
from glm_core.finetune.methods import Method
from glm_core.finetune.work import FinetuneTask
from glm_core.settings import MINI, Settings
from pages.shared import (
    finetune_command,
    finetune_data,
    finetune_plan,
    finetune_prepare,
    finetune_run,
    state,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is started stays in the queue."""
    monkeypatch.setattr(state, "supervisor", lambda: None)


def opened(**query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "Home.py"), default_timeout=120)
    app.switch_page("pages/finetune.py")
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def store() -> jobs.JobStore:
    return jobs.store(Settings.read())


def comments(rows: int = 60, header: str = "text,label") -> str:
    chance = random.Random(0)
    lines = [header]
    for i in range(rows):
        spam = i % 3 == 0
        text = "加微信领红包" if spam else "这个视频很好看"
        lines.append(f"{text}{i}{'好' * chance.randrange(6)},{'spam' if spam else 'normal'}")
    return "\n".join(lines) + "\n"


def uploaded(data: str | bytes, name: str = "rows.csv", app: AppTest | None = None) -> AppTest:
    app = app or opened()
    raw = data.encode() if isinstance(data, str) else data
    return next(iter(app.get("file_uploader"))).set_value((name, raw, "text/plain")).run()


def button(app: AppTest, start: str):
    return next(one for one in app.button if str(one.key).startswith(start))


def field(app: AppTest, label: str):
    return next(one for one in (*app.number_input, *app.text_input, *app.selectbox) if one.label == label)


def choice(app: AppTest, label: str):
    return next(one for one in app.get("button_group") if one.label == label)


def said(app: AppTest) -> str:
    return "\n".join(one.value for one in (*app.error, *app.warning, *app.markdown, *app.caption))


# --- the data -----------------------------------------------------------------------------------------------


def test_the_formats_are_named_before_a_file_is_chosen():
    app = opened()
    assert not app.exception
    for one in ("ADGEN", "SpamClassify", "Alpaca", "messages", "history"):
        assert one in said(app)


def test_a_table_is_read_split_and_counted():
    app = uploaded(comments())
    assert not app.exception
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Rows to learn from"] == ("54", "6 to measure with")
    assert figures["Classes"][0] == "2"
    assert figures["Copies"][0] == "0"
    assert not button(app, "start_").disabled


@pytest.mark.parametrize(
    ("columns", "name"),
    [(("content", "summary"), "ADGEN"), (("content", "label"), "SpamClassify"), (("instruction", "output"), "Alpaca")],
)  # fmt: skip
def test_a_known_format_is_recognised_by_its_columns(columns, name):
    rows = [dict(zip(columns, (f"问题{i}", f"回答{i}"), strict=True)) for i in range(20)]
    app = uploaded("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "rows.jsonl")
    assert not app.exception
    assert f"**{name}**" in said(app)


def test_a_spreadsheet_is_read():
    import openpyxl

    book = openpyxl.Workbook()
    for line in comments().splitlines():
        book.active.append(line.split(","))
    data = io.BytesIO()
    book.save(data)
    app = uploaded(data.getvalue(), "rows.xlsx")
    assert not app.exception
    assert {one.label: one.value for one in app.metric}["Rows to learn from"] == "54"


def test_columns_that_say_nothing_are_chosen_by_hand():
    app = uploaded(comments(header="a,b"))
    assert "choose both" in said(app)
    assert not [one for one in app.button if str(one.key).startswith("start_")]
    field(app, "Prompt column").select("a").run()
    app = field(app, "Response column").select("b").run()
    assert not app.exception
    assert not button(app, "start_").disabled


@pytest.mark.parametrize(
    ("data", "name", "sentence"),
    [
        ("", "nothing.csv", "nothing\\.csv"),
        ("text,label\n", "rows.csv", "no rows below its header"),
        ("text,label\n" + "".join(f"评论{i},spam\n" for i in range(30)), "rows.csv", "with one class there is nothing"),
        ("text,label\n" + "".join(f"评论{i},{[0.0, 1.5, 'spam'][i % 3]}\n" for i in range(30)), "rows.csv", "mixes"),
        ("text,label\n甲,a\n", "rows.csv", "Different questions are too few"),
        ('{"text": "a", "label": "b"}\n{"text": "a" "label"}\n' * 9, "rows.jsonl", "line 2"),
        ('{"text": "instruction and answer"}\n' * 9, "rows.jsonl", "question and answer stand together"),
    ],
)  # fmt: skip
def test_bad_data_is_a_sentence_and_starts_nothing(data, name, sentence):
    app = uploaded(data, name)
    assert not app.exception
    found = said(app).replace("\\", "")
    assert sentence.replace("\\", "") in found or "choose both" in found
    assert all(one.disabled for one in app.button if str(one.key).startswith("start_"))


def test_all_problems_are_told_at_once():
    rows = comments(40) + ",spam\n空的回答,\n重复的评论,spam\n重复的评论,normal\n"
    app = uploaded(rows)
    found = said(app)
    assert "without a prompt" in found
    assert "without a response" in found
    assert "different responses" in found
    assert not button(app, "start_").disabled


def test_a_dev_file_is_measured_with_instead_of_a_share(tmp_path):
    app = uploaded(comments(30))
    app = choice(app, "Measured with").set_value("file").run()
    app = uploaded(comments(9), "dev.csv", app)
    assert not app.exception
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Rows to learn from"] == ("30", "9 to measure with")
    assert "Asked in train as well" in said(app)


def test_a_large_file_is_read_beside_the_page(monkeypatch):
    monkeypatch.setattr(finetune_prepare, "AT_ONCE_BYTES", 0)
    app = uploaded(comments())
    assert "Reading" in said(app) or [one for one in app.metric if one.label == "Copies"]
    finetune_prepare.preparing()._thread.join(60)
    app = app.run()
    assert {one.label: one.value for one in app.metric}["Rows to learn from"] == "54"


def test_a_sample_is_opened_by_its_address():
    app = opened(sample="adverts")
    assert not app.exception
    assert "adverts\\.jsonl" in said(app)
    assert app.query_params["sample"] in ("adverts", ["adverts"])


def test_an_unknown_sample_is_a_sentence():
    app = opened(sample="nothing")
    assert "There is no sample" in app.error[0].value


def test_the_tokens_that_count_are_the_answer_and_its_end():
    app = uploaded(comments())
    shown = next(one.proto.body for one in app.get("html") if "pre-wrap" in one.proto.body)
    coloured = "".join(
        part.split("</span>")[0].split('">')[1] for part in shown.split("<span ") if "background" in part
    )
    # the line break of the ChatGLM3 format before an answer is learned too
    assert coloured.replace("⏎", "").split() in (["spam&lt;/s&gt;"], ["normal&lt;/s&gt;"])


# --- the method ---------------------------------------------------------------------------------------------


def test_epochs_and_steps_follow_each_other():
    app = uploaded(comments())  # 54 rows
    assert (field(app, "Epochs").value, field(app, "Steps").value) == (3.0, 21)
    app = field(app, "Steps").set_value(70).run()
    assert (field(app, "Epochs").value, field(app, "Steps").value) == (10.0, 70)
    app = field(app, "Epochs").set_value(2.0).run()
    assert field(app, "Steps").value == 14
    app = field(app, "Batch size").set_value(54).run()
    assert (field(app, "Epochs").value, field(app, "Steps").value) == (2.0, 2)


def test_a_published_rate_for_p_tuning_carries_a_warning():
    app = uploaded(comments())
    app = app.button(key="method_p-tuning-v2").click().run()
    assert field(app, "Learning rate").value == 5e-3
    assert not app.warning
    app = field(app, "Learning rate").set_value(2e-2).run()
    assert "forget" in app.warning[0].value


@pytest.mark.parametrize("kind", ["lora", "p-tuning-v2", "freeze", "full"])
def test_every_method_has_the_rate_of_the_shell(kind):
    flags = {
        "lora": ["--lora_rank", "8"],
        "p-tuning-v2": ["--pre_seq_len", "8"],
        "freeze": ["--freeze_layers", "3"],
    }
    words = ["finetune", "--do_train", "--train_file", "x", "--output_dir", "y", *flags.get(kind, [])]
    plan = shell._task(arguments.parser().parse_args(words)).plan
    assert plan.method.kind == kind
    app = uploaded(comments()).button(key=f"method_{kind}").click().run()
    assert plan.learning_rate == field(app, "Learning rate").value


@pytest.mark.parametrize("kind", ["lora", "p-tuning-v2", "freeze", "full"])
def test_every_method_can_be_started(kind):
    app = uploaded(comments())
    app = app.button(key=f"method_{kind}").click().run()
    assert not app.exception
    assert not app.error
    app = button(app, "start_").click().run()
    assert not app.exception
    (job,) = store().list()
    task = FinetuneJob.from_json(job.task).task
    assert (job.kind, task.plan.method.kind) == ("finetune", kind)
    assert Path(task.output).parent == Settings.read().checkpoints
    assert app.query_params["job"] in (job.id, [job.id])


def test_the_limits_fit_ninety_nine_rows_of_a_hundred_and_what_is_cut_is_said():
    app = uploaded(comments(300))
    source = field(app, "Longest prompt, tokens")
    assert source.value % 8 == 0
    assert not [one for one in app.caption if "are cut" in one.value]
    app = source.set_value(8).run()
    assert [one for one in app.caption if "Longest prompt" in one.value and "are cut" in one.value]
    assert not app.exception


def test_what_was_filled_in_is_there_after_another_page():
    app = uploaded(comments())
    field(app, "Rank").set_value(16).run()
    field(app, "Steps").set_value(33).run()
    app = field(app, "Name of the result").set_value("mine").run()
    app.switch_page("pages/jobs.py").run()
    app = app.switch_page("pages/finetune.py").run()
    assert field(app, "Rank").value == 16
    assert field(app, "Steps").value == 33
    assert field(app, "Name of the result").value == "mine"


# --- the check and the start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("", "has no name"), ("../away", "cannot be that of a folder"), ("a b", "cannot be")],
)
def test_a_name_that_is_no_folder_is_refused(name, sentence):
    app = uploaded(comments())
    app = field(app, "Name of the result").set_value(name).run()
    assert any(sentence in one.value for one in app.error)
    assert button(app, "start_").disabled


def test_a_name_in_use_is_refused_and_the_suggestion_avoids_it(workspace):
    app = uploaded(comments())
    first = field(app, "Name of the result").value
    (Settings.read().checkpoints / "taken").mkdir()
    (Settings.read().checkpoints / "taken" / "model.safetensors").write_bytes(b"0")
    app = field(app, "Name of the result").set_value("taken").run()
    assert any("in use" in one.value for one in app.error)
    assert button(app, "start_").disabled
    (Settings.read().checkpoints / first).mkdir()
    assert finetune_plan.free_name(Settings.read().checkpoints, "rows.csv", "lora") == f"{first}-2"


def test_all_that_prevents_the_start_is_listed():
    app = uploaded("text,label\n" + "".join(f"评论{i},spam\n" for i in range(30)))
    app = field(app, "Name of the result").set_value("").run()
    found = "\n".join(one.value for one in app.error)
    assert "one class" in found
    assert "no name" in found


def test_limits_beyond_the_context_are_refused():
    app = uploaded(comments())
    field(app, "Longest prompt, tokens").set_value(2000).run()
    app = field(app, "Longest answer, tokens").set_value(2000).run()
    assert any("context" in one.value for one in app.error)
    assert button(app, "start_").disabled


def test_memory_disk_and_trained_numbers_are_predicted():
    app = uploaded(comments())
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Memory"][0].endswith("MiB")
    assert "free" in figures["Memory"][1]
    assert figures["Disk"][0].endswith("MiB")
    assert figures["Trained"][0] == "94.2 K"  # LoRA of rank 8 on query_key_value of the embedded model


def made_task(output: Path, **changes) -> FinetuneTask:
    plan = Plan(Method("lora"), "auto", 1e-3, 8, 1, 40, save_steps=20, logging_steps=5, warmup_steps=2)
    task = FinetuneTask(
        checkpoint=str(MINI), plan=plan, train_file=str(output.parent / "rows of mine.csv"), output=str(output),
        columns=Columns("text", "label"), max_source=48, max_target=16,
    )  # fmt: skip
    return replace(task, **changes)


@pytest.mark.parametrize(
    "method",
    [
        Method("lora", lora_rank=4, lora_alpha=12.5, lora_dropout=0.0), Method("full"), Method("freeze", freeze_layers=2),
        Method("p-tuning-v2", prefix_length=9, prefix_projection=True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_the_command_of_the_shell_means_the_same_task(tmp_path, method, precision):
    task = made_task(tmp_path / "out")
    task = replace(
        task, dev_file=str(tmp_path / "dev's.csv"),
        plan=replace(
            task.plan, method=method, precision=precision, schedule="cosine", weight_decay=0.01, checkpointing=True,
            learning_rate=3.25e-5, seed=7,
        ),
    )  # fmt: skip
    text, differences = finetune_command.command(task)
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "glm_core", "finetune"]
    assert not differences
    found = shell._task(arguments.parser().parse_args(words[3:]))
    wanted = task.to_json()
    for name in (
        "prefix_length",
        "prefix_projection",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "freeze_layers",
    ):
        assert getattr(found.plan.method, name) == getattr(task.plan.method, name), name
    assert found.to_json()["plan"] == wanted["plan"]
    for name in ("checkpoint", "train_file", "dev_file", "output", "max_source", "max_target", "columns"):
        assert found.to_json()[name] == wanted[name], name


def test_what_the_shell_cannot_say_is_said(tmp_path):
    task = made_task(tmp_path / "out", read_options={"sheet": "Other"})
    _, differences = finetune_command.command(task)
    assert len(differences) == 1 and "how the file is to be read" in differences[0]


def test_shares_and_unlabelled_texts_reach_the_shell(tmp_path):
    adapt = Adapt(str(tmp_path / "texts.csv"), "comment", epochs=2.5, length=96, compare=True)
    task = made_task(tmp_path / "out", dev_share=0.1, general_share=0.5, adapt=adapt)
    text, differences = finetune_command.command(task)
    found = shell._task(arguments.parser().parse_args(shlex.split(text.replace("\\\n", " "))[3:]))
    assert not differences
    assert (found.dev_share, found.general_share, found.adapt) == (0.1, 0.5, adapt)


def test_unlabelled_texts_are_chosen_with_their_column():
    app = uploaded(comments())
    texts = "text,site\n" + "".join(f"还不错{i},a\n" for i in range(30))
    box = next(one for one in app.get("file_uploader") if one.label == "Table with the texts")
    app = box.set_value(("unlabelled.csv", texts.encode(), "text/csv")).run()
    assert field(app, "Column of the texts").options == ["text", "site"]
    app = field(app, "Times read").set_value(2.0).run()
    app = button(app, "start_").click().run()
    (job,) = store().list()
    adapt = job.task["task"]["adapt"]
    assert (adapt["column"], adapt["epochs"], adapt["compare"]) == ("text", 2.0, False)
    assert Path(adapt["file"]).read_text(encoding="utf-8").startswith("text,site")


def test_what_the_texts_changed_is_shown():
    told = {"texts": 1200, "steps": 75, "excluded": 3, "text_loss_before": 3.1, "text_loss": 2.6,
            "dev_loss_before": 0.9, "dev_loss": 0.8}  # fmt: skip
    manifest = {"state": "done", "adapt": told, "dev_losses": [[40, 0.2]]}
    job = training("done", manifest=manifest)
    other = Path(job.task["task"]["output"]) / "without-adapting"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps({"dev_losses": [[40, 0.3]]}), encoding="utf-8")
    app = opened(job=job.id)
    shown = {one.label: (one.value, one.delta) for one in app.metric}
    assert shown["Loss of unseen texts"] == ("2.600", "3.100 before")
    assert shown["Best dev loss with them"] == ("0.200", "0.300 without")


def test_a_second_training_gets_a_folder_of_its_own():
    app = uploaded(comments())
    first = field(app, "Name of the result").value
    app = button(app, "start_").click().run()
    app = app.button(key="new_training").click().run()
    assert field(app, "Name of the result").value == f"{first}-2"
    app = field(app, "Name of the result").set_value(first).run()
    assert any("in use" in one.value for one in app.error)
    assert len(store().list()) == 1


# --- a training ---------------------------------------------------------------------------------------------


def training(state: str, **files: object) -> jobs.Job:
    """A job in this state with these files in its folder; it belongs to another computer."""
    output = Settings.read().checkpoints / "mine"
    output.mkdir(parents=True)
    what = FinetuneJob(made_task(output))
    job = store().create("finetune", "mine · LoRA", what.to_json())
    store().mark_ready(job.id, 0)
    (output / "job.json").write_text(json.dumps({"job": job.id, "run": "1", "what": what.to_json()}))
    for name, value in files.items():
        text = "\n".join(map(json.dumps, value)) + "\n" if isinstance(value, list) else json.dumps(value)
        (output / f"{name}.{'jsonl' if isinstance(value, list) else 'json'}").write_text(text)
    if state != "queued":
        store().claim(("finetune",), "elsewhere:1:1", job.id)
    if state not in ("queued", "running"):
        message = "loss became NaN at step 5." if state == "failed" else ""
        store().release(job.id, "elsewhere:1:1", state, message)
    return store().get(job.id)


EVENTS = [
    {
        "kind": "step",
        "step": 5,
        "steps": 40,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "rows_per_s": 10.0,
        "eta_s": 30,
    },
    {
        "kind": "step",
        "step": 10,
        "steps": 40,
        "loss": 1.5,
        "learning_rate": 9e-4,
        "rows_per_s": 11.0,
        "eta_s": 25,
    },
    {"kind": "dev", "step": 10, "steps": 40, "dev_loss": 1.7},
    {"kind": "saved", "step": 10, "steps": 40, "path": "checkpoint-10"},
]


def figure(app: AppTest, trace: str) -> dict:
    """The first figure with a trace of this name, by its JSON."""
    for one in app.get("plotly_chart"):
        spec = json.loads(one.proto.spec)
        if any(part.get("name") == trace for part in spec["data"]):
            return spec
    raise AssertionError(f"no figure with {trace}")


def points(spec: dict, trace: str) -> list[tuple[float, float]]:
    part = next(one for one in spec["data"] if one.get("name") == trace)
    return list(zip(part["x"], part["y"], strict=True))


def test_a_running_training_shows_its_curve_and_can_be_stopped():
    job = training("running", events=EVENTS)
    app = opened(job=job.id)
    assert not app.exception
    spec = figure(app, "training loss")
    assert points(spec, "training loss") == [(5, 2.5), (10, 1.5)]
    assert points(spec, "dev loss") == [(10, 1.7)]
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Step"][0] == "10"
    assert figures["Loss"] == ("1.5000", "dev 1.7000")
    app.button(key=f"pause_page_{job.id}").click().run()
    assert store().get(job.id).stop_request == "pause"


def test_the_newest_open_training_is_shown_without_an_address():
    job = training("paused", events=EVENTS)
    app = opened()
    assert app.query_params["job"] in (job.id, [job.id])
    assert "Stopped after step 10 of 40" in app.warning[0].value
    app.button(key=f"resume_page_{job.id}").click().run()
    assert store().get(job.id).state == "queued"


def test_a_new_training_can_be_prepared_beside_one_that_runs():
    job = training("running", events=EVENTS)
    app = opened()
    app = app.button(key="new_training").click().run()
    assert not app.exception
    assert "job" not in app.query_params
    assert "step 10 of 40" in said(app)
    assert [one for one in app.get("page_link") if job.id in str(one.proto)]


def test_a_waiting_training_says_how_many_are_before_it():
    running = training("running", events=EVENTS)
    task = made_task(Settings.read().checkpoints / "second")
    waiting = store().create("finetune", "second", FinetuneJob(task).to_json())
    store().mark_ready(waiting.id, 0)
    store()._change("UPDATE job SET id = ? WHERE id = ?", ("99999999-000000-ffffff", waiting.id))
    app = opened(job="99999999-000000-ffffff")
    assert "1 before it" in app.info[0].value
    assert running.state == "running"


def test_a_failed_training_says_why_and_can_be_resumed():
    job = training("failed", events=EVENTS)
    app = opened(job=job.id)
    assert "NaN at step 5" in app.error[0].value
    assert [one for one in app.button if one.key == f"resume_page_{job.id}"]


def test_answers_of_the_checkpoints_stand_side_by_side():
    samples = [
        {"step": step, "prompt": "p", "expected": "spam", "answer": answer}
        for step, answer in ((10, "no"), (20, "spam"))
    ]
    app = opened(job=training("paused", events=EVENTS, samples=samples).id)
    table = next(one.value for one in app.dataframe if "expected" in one.value.columns)
    assert table.iloc[0].to_dict() == {"prompt": "p", "expected": "spam", "step 10": "no", "step 20": "spam"}


def interval(value: float) -> dict:
    return {"estimate": value, "low": value - 0.02, "high": value + 0.02, "level": 0.95}


REPORT = {
    "format": 1, "kind": "labels", "dev_rows": 500, "rows": 500, "seed": 0, "notes": [], "labels": ["normal", "spam"],
    "systems": {
        name: {
            "name": name, "accuracy": interval(value), "macro_f1": interval(value), "n_outside": 3,
            "by_label": [{"label": "spam", "precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 250}],
        }
        for name, value in (("tuned", 0.97), ("base", 0.31), ("baseline", 0.93))
    },
    "comparisons": {"base": {"difference": 0.66, "p_value": 1e-9}, "baseline": {"difference": 0.04, "p_value": 0.002}},
    "verdict": {"kind": "better", "against": "baseline", "text": "Better than the baseline: so it is."},
    "dev_loss": {"tuned": 0.12, "base": 3.4, "per_row": {}},
    "effect": {"dev_changed": 480, "dev_rows": 500, "share": interval(0.96), "probes_changed": 4, "probes": 80,
               "text": "The training changed 480 of 500 dev answers and 4 of 80 general answers."},
    "forgetting": {"n": 80, "before": interval(0.6), "after": interval(0.55), "verdict": "lost some", "text": "Lost.",
                   "broke": [{"id": "1", "prompt": "2+2?", "expected": "4", "before": "4", "after": "spam"}]},
    "examples": [{"line": 2, "prompt": "p", "expected": "spam", "base": "?", "tuned": "spam"}],
    "training": {"seconds": 61.0, "peak_bytes": 2**30}, "seconds": 12.0, "peak_bytes": 2**30, "made": 0.0,
}  # fmt: skip


def finished() -> jobs.Job:
    return training(
        "done", events=EVENTS, report=REPORT, result={"state": "done", "run": "1"},
        manifest={"state": "done", "rows": {"train": 900, "dev": 100}, "task": made_task(Path("mine")).to_json()},
    )  # fmt: skip


def test_a_finished_training_shows_its_report():
    app = opened(job=finished().id)
    assert not app.exception
    assert "Better than the baseline" in app.success[0].value
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Fine-tuned"] == ("97.0%", "95 %: 95.0% – 99.0%")
    assert figures["TF-IDF baseline"][0] == "93.0%"
    assert figures["Dev loss"] == ("0.1200", "base 3.4000")
    assert "Against TF-IDF baseline: +4.0 points, p = 0.002" in said(app)
    broke = next(one.value for one in app.dataframe if "question" in one.value.columns)
    assert broke.iloc[0].to_dict() == {"question": "2+2?", "before": "4", "after": "spam"}
    assert len(app.get("download_button")) == 2


def test_a_result_goes_to_chat_with_its_base(monkeypatch):
    job = finished()
    config = json.loads((MINI / "config.json").read_text())
    folder = finetune_run.folder_of(job)
    from glm_core import adapters

    encoder = adapters.PrefixEncoder(adapters.BaseShape.of_file(config), 4)
    adapters.save_prefix(encoder, folder, config)
    asked: list[tuple] = []
    monkeypatch.setattr(
        state, "load_model", lambda path, precision, base=None: asked.append((path, precision, base))
    )
    app = opened(job=job.id)
    app.button(key="use_in_chat").click().run()
    assert asked == [(folder, "auto", MINI)]


def test_the_trainings_so_far_are_listed():
    finished()
    app = opened()
    table = next(one.value for one in app.dataframe if "verdict" in one.value.columns)
    row = table.iloc[0].to_dict()
    assert (row["name"], row["method"], row["rows"], row["dev loss"]) == ("mine", "LoRA", 900, 1.7)
    assert row["verdict"].startswith("Better")


def test_a_job_that_is_gone_or_no_training_is_a_sentence():
    assert "There is no job" in opened(job="nothing").error[0].value
    other = store().create("batch", "t.csv", {"template": "{q}", "columns": ["q"]})
    assert "no training" in opened(job=other.id).warning[0].value


def test_the_jobs_page_links_a_training_and_says_its_step(open_page, words):
    job = training("running", events=EVENTS)
    app = open_page("jobs")
    assert not app.exception
    shown = words(app)
    assert "step 10 of 40" in shown
    assert "rows" not in shown.split("step 10 of 40")[1].split("\n")[0]
    assert [one for one in app.get("page_link") if job.id in str(one.proto)]
    assert not [one for one in app.button if str(one.key).startswith("retry")]


def test_the_page_is_chinese_on_request():
    app = uploaded(comments(), app=opened(lang="zh"))
    assert not app.exception
    assert app.header[0].value.endswith("微调")
    labels = [one.label for one in (*app.number_input, *app.selectbox, *app.metric)]
    assert not [one for one in labels if one.isascii() and one not in ("Alpha", "Dropout")]


def test_a_curve_of_many_points_is_thinned_to_means():
    found = finetune_run.thinned([(i, float(i % 2)) for i in range(10_000)], 1000)
    assert len(found) == 1000
    assert {value for _, value in found} == {0.5}
    assert found[-1][0] == 9999


def test_smoothing_keeps_a_constant_curve():
    assert finetune_run.smoothed([2.0] * 50) == pytest.approx([2.0] * 50)


def test_the_samples_are_there():
    for file, _, _ in finetune_data.SAMPLES.values():
        assert (ROOT / "data" / file).is_file()
