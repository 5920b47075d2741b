"""The memory page: predictions for any shape, what fits a card, a measurement and its quality, exports, two languages."""

from __future__ import annotations

import json

import pytest
from streamlit.testing.v1 import AppTest

from glm_core import evaluate, jobs, memory
from glm_core.jobs import Supervisor
from glm_core.memory import work
from glm_core.memory.measuring import Level, Point
from glm_core.settings import MINI, Settings
from pages.shared import memory_model
from tests.pages.conftest import ROOT, texts

GROUPED = ("INT4 g32", "INT4 g64", "INT4 g128")


@pytest.fixture
def opened():
    """opened(model="chatglm2-6b"): the page as a browser opens it, run once."""

    def run(**query: str) -> AppTest:
        app = AppTest.from_file(str(ROOT / "Home.py"), default_timeout=120)
        app.switch_page("pages/memory.py")
        for key, value in query.items():
            app.query_params[key] = value
        return app.run()

    return run


def store():
    return jobs.store(Settings.read())


def figures(app) -> list[dict]:
    """The figures of the page as plotly gets them."""
    return [json.loads(one.proto.spec) for one in app.get("plotly_chart")]


def bars(app) -> dict[str, dict[str, float]]:
    """Part -> level -> GiB or MiB of the first figure."""
    return {
        one["name"]: dict(zip(one["y"], one["x"], strict=True))
        for one in figures(app)[0]["data"]
        if one["type"] == "bar"
    }


def widget(app, kind: str, key: str):
    return next(one for one in app.get(kind) if str(one.key).endswith(key))


def level_of(name: str, peak: int = 1 << 30, **values) -> Level:
    points = tuple(
        Point(context, batch, peak, peak - 10, prefill_per_s=100.0, decode_per_s=speed,
              predicted={"weights": peak // 2, "cache": peak // 8, "overhead": peak // 4 + peak // 8})
        for context, batch, speed in ((128, 1, 7.0), (512, 4, 21.0))
    )  # fmt: skip
    made = {
        "level": name, "model": "tiny-chatglm3", "fingerprint": "print", "device": "cpu", "device_name": "a processor",
        "threads": 2, "date": "2026-01-01T10:00:00", "versions": {}, "program": 400 << 20, "at_load": peak // 2,
        "load_peak": peak, "weights": peak // 2, "load_seconds": 1.5, "points": points,
    }  # fmt: skip
    return Level(**made | values)


def measured(folder, levels=("fp32", "int4"), run=True):
    """A measurement of a checkpoint with made-up numbers: what the figures show must be these."""
    task = memory.plan(folder, levels, (128, 512), (1, 4), "cpu")
    job = memory.start(store(), task)
    if run:
        Supervisor(store(), {"memory": work.run}).run(store().claim(("memory",), jobs.this_process(), job.id))
    return store().get(job.id)


@pytest.fixture
def made_up(monkeypatch):
    """Levels are not measured but made up, the lower the smaller."""
    sizes = {"fp32": 4 << 30, "bf16": 2 << 30, "int8": 1 << 30, "int4": 1 << 29}
    monkeypatch.setattr(
        work, "measure",
        lambda folder, level, contexts, batches, device, generation, base, tokens, fingerprint, *rest: level_of(
            level, sizes[level], fingerprint=fingerprint
        ),
    )  # fmt: skip


# ---- predictions


def test_a_published_shape_is_predicted_without_a_file(opened):
    app = opened(model="chatglm2-6b")
    assert not app.exception
    found = bars(app)
    assert list(found["weights"]) == ["FP32", "BF16", "INT8", "INT4", *GROUPED, "INT8 dynamic"]
    assert found["weights"]["BF16"] == pytest.approx(6_243_584_000 * 2 / 2**30, abs=0.01)
    shown = texts(app)
    assert "6.2 B parameters" in shown and "stays a prediction" in shown


def test_on_a_gpu_the_published_figures_are_marked_and_said_to_be_predictions(opened):
    app = opened(model="chatglm2-6b")
    widget(app, "segmented_control", "memory.device").set_value("cuda").run()
    marks = {one["name"]: one["x"] for one in figures(app)[0]["data"] if one["type"] == "scatter"}
    assert marks == {
        "published: reading 2,048 tokens": [13.1, 8.2, 5.5],
        "published: writing 8,192 tokens": [12.8, 8.1, 5.1],
    }
    assert "predictions: there is no GPU here" in texts(app)


def test_the_slider_says_what_fits(opened):
    app = opened(model="chatglm2-6b")
    widget(app, "segmented_control", "memory.device").set_value("cuda").run()
    widget(app, "select_slider", "memory.card").set_value(6).run()
    assert "fits into 6 GB at **INT4**" in texts(app)
    widget(app, "select_slider", "memory.card").set_value(16).run()
    assert "fits into 16 GB at **BF16**" in texts(app)
    widget(app, "select_slider", "memory.card").set_value(4).run()
    assert "does not fit into 4 GB" in texts(app)


def test_longer_texts_and_more_rows_take_more(opened):
    app = opened(model="chatglm2-6b")
    before = bars(app)["cache"]["BF16"]
    widget(app, "select_slider", "memory.context.answer").set_value(8192).run()
    longer = bars(app)["cache"]["BF16"]
    widget(app, "select_slider", "memory.batch").set_value(4).run()
    assert longer == pytest.approx(4 * before, rel=0.02)
    assert bars(app)["cache"]["BF16"] == pytest.approx(4 * longer, rel=0.01)


def test_a_training_shows_its_own_parts_and_no_level_it_cannot_have(opened):
    app = opened(model="chatglm2-6b")
    widget(app, "selectbox", "memory.work").set_value("lora").run()
    assert list(bars(app)["weights"]) == ["FP32", "BF16", "INT8", "INT4", *GROUPED] and "cache" not in bars(
        app
    )
    widget(app, "selectbox", "memory.work").set_value("full").run()
    assert {"gradients", "optimiser", "what is trained, in fp32"} <= set(bars(app))
    assert list(bars(app)["weights"]) == ["FP32", "BF16"]
    assert not app.exception


def test_lines_go_over_contexts_and_batches_of_the_model(opened):
    app = opened(model="chatglm-6b")
    by_context, by_batch = figures(app)[1:3]
    assert by_context["data"][0]["x"] == [128, 256, 512, 1024, 2048]
    assert by_batch["data"][0]["x"] == list(memory_model.BATCHES)


def test_a_model_that_is_not_there_is_not_asked_for(opened):
    app = opened(model="/etc")
    assert not app.exception and "11.7 M parameters" in texts(app)


def test_the_page_speaks_chinese(opened):
    app = opened(model="chatglm2-6b", lang="zh")
    shown = texts(app)
    assert "量化与显存" in shown and "各精度的内存占用" in shown and "装得下吗" in shown


# ---- measurements


def test_the_form_starts_a_job_with_the_levels_chosen(opened, model_folder, made_up):
    app = opened(model=str(model_folder))
    widget(app, "multiselect", f"memory_levels_{model_folder}").set_value(["bf16", "int4"])
    widget(app, "multiselect", f"memory_batches_{model_folder}").set_value([2]).run()
    app.button(key="memory_start_0").click().run()
    job = store().list(kind="memory")[0]
    assert app.query_params["job"] in (job.id, [job.id])
    assert job.task["levels"] == ["bf16", "int4"] and job.task["batches"] == [2]
    assert job.task["contexts"] == [128, 512]  # 2,048 is beyond this model
    assert not app.exception


def test_predictions_and_measurements_stand_beside_each_other(opened, model_folder, made_up):
    job = measured(model_folder)
    app = opened(job=job.id)
    assert not app.exception
    data = figures(app)[0]["data"]
    peaks = next(one for one in data if one["name"] == "measured at most")
    assert dict(zip(peaks["y"], peaks["x"], strict=True)) == {"FP32": 4.0, "INT4": 0.5}
    speeds = {one["name"]: one["y"] for one in figures(app)[1]["data"]}
    assert speeds == {"1 row": [7.0, 7.0], "4 rows": [21.0, 21.0]}
    assert "furthest off +0.0%" in texts(app) or "furthest off -0.0%" in texts(app)
    rows = app.dataframe[-1].value
    assert rows["measured"].tolist() == ["4.00 GiB", "4.00 GiB", "512 MiB", "512 MiB"]


def test_a_level_that_failed_says_why_beside_the_others(opened, model_folder, monkeypatch):
    def measure(folder, level, *rest):
        if level == "int4":
            raise memory.Unfinished(
                "The process that measured ended early: no message.", "Close other programs."
            )
        return level_of(level)

    monkeypatch.setattr(work, "measure", measure)
    app = opened(job=measured(model_folder).id)
    assert not app.exception
    shown = texts(app)
    assert "ended early" in shown and "failed" in shown and "loaded 512 MiB" in shown


def test_a_waiting_measurement_shows_its_levels(opened, model_folder):
    job = measured(model_folder, run=False)
    jobs.supervisor(Settings.read()).stop()
    app = opened(job=job.id)
    assert not app.exception and "not measured yet" in texts(app)


def test_what_was_measured_is_marked_on_the_predictions(opened, model_folder, made_up):
    measured(model_folder)
    app = opened(model=str(model_folder))
    widget(app, "select_slider", "memory.context.answer").set_value(128).run()
    marks = {one["name"]: one["x"] for one in figures(app)[0]["data"] if one["type"] == "scatter"}
    assert marks["measured at most"] == [4.0, 0.5]
    assert "measured on this computer" in texts(app)


def test_a_job_of_another_kind_is_not_taken_for_a_measurement(opened):
    other = store().create("batch", "x", {})
    app = opened(job=other.id)
    assert "This job is no measurement." in texts(app)


# ---- quality


@pytest.fixture
def with_quality(model_folder, made_up, tmp_path):
    """A measurement of two levels with labelled rows that both have answered."""
    file = tmp_path / "rows.csv"
    lines = [f"text {i},{'yes' if i % 3 else 'no'}" for i in range(9)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    job = measured(model_folder)
    task = evaluate.plan(file, prompt="text", reference="label", method="likelihood")
    supervisor = Supervisor(store(), {"evaluate": evaluate.run})
    for one in memory.start_quality(store(), job, task):
        supervisor.run(store().claim(("evaluate",), jobs.this_process(), one.id))
    return job


def test_every_level_has_its_score_and_the_changed_answers_are_listed(opened, with_quality):
    app = opened(job=with_quality.id)
    assert not app.exception
    shown = texts(app)
    assert "Quality on your rows" in shown and "Accuracy with its 95 % interval, 9 rows" in shown
    runs = memory.quality_runs(store(), with_quality.id)
    different, both, _ = memory.changed(store(), runs[0].id, runs[1].id)
    assert f"{different} of {both} rows" in shown
    cards = {one.label: one.value for one in app.metric}
    expected = [f"{100 * one.scores.headline.estimate:.1f} %" for one in runs]
    assert [cards["FP32"], cards["INT4"]] == expected
    names = [trace.get("text", [""])[0] for trace in figures(app)[2]["data"]]
    assert {"FP32", "INT4"} <= set(names)


def test_the_figures_are_drawn_for_both_themes(opened, model_folder, made_up, monkeypatch):
    from pages.shared import charts

    job = measured(model_folder)
    colours = []
    for theme in (charts.LIGHT, charts.DARK):
        monkeypatch.setattr(charts, "colors", lambda theme=theme: theme)
        app = opened(job=job.id)
        assert not app.exception
        colours.append(figures(app)[0]["data"][0]["marker"]["color"])
    assert colours == [charts.LIGHT["main"], charts.DARK["main"]]


def test_the_embedded_model_can_be_chosen(opened):
    app = opened(model=str(MINI))
    assert not app.exception
    assert "11.7 M parameters" in texts(app)
