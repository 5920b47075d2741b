"""Home: the first screen says what is there, with or without a model, and leads on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm_core import jobs
from glm_core.errors import GLMError
from glm_core.settings import Settings
from pages.shared import page, panels, state

ROOT = Path(__file__).resolve().parents[2]


def make_job(title: str, rows: int, finished: int = 0) -> str:
    store = jobs.store(Settings.read())
    job = store.create("sample", title, {})  # no runner takes this kind, so nothing moves under the test
    store.add_rows(job.id, ([f"row {n}"] for n in range(rows)))
    store.mark_ready(job.id, rows)
    store.save_results(job.id, [jobs.Result(n, "ok", "answer") for n in range(finished)])
    return job.id


def test_home_opens_without_a_model_and_offers_to_load_one(open_page, words):
    app = open_page("home")
    assert not app.exception
    assert "No model is loaded." in words(app)
    assert app.button(key="load_embedded").label == "Load the embedded model"


def test_home_says_that_the_embedded_model_is_a_demonstration(open_page, words, loaded_model, monkeypatch):
    monkeypatch.setattr(panels, "is_demo", lambda name: name == loaded_model.loaded.info.name)
    app = open_page("home")
    assert "is a demonstration model" in words(app)
    assert "Do not rely on its answers" in words(app)


def test_home_shows_model_device_and_precision(open_page, loaded_model):
    app = open_page("home")
    figures = {one.label: (one.value, one.delta) for one in app.metric}
    assert figures["Model"][0] == "tiny-chatglm3"
    assert figures["Device"] == ("CPU", "FP32")


def test_recent_jobs_show_title_state_and_rows(open_page, words):
    make_job("reviews.csv", rows=40, finished=10)
    shown = words(open_page("home"))
    assert "reviews\\.csv" in shown
    assert "10 of 40 rows" in shown
    assert "queued" in shown


def test_a_file_name_cannot_bring_an_image_onto_the_page(open_page, words):
    make_job("![x](http://example.org/a.png)", rows=1)
    shown = words(open_page("home"))
    assert "![x](http" not in shown
    assert "example\\.org" in shown


def test_the_menu_lists_only_pages_that_are_installed(open_page, words, installed):
    installed("models")
    app = open_page("home")
    assert not app.exception
    labels = [one.proto.label for one in app.get("page_link")]
    assert "Models" in labels
    assert "Chat" not in labels


def test_the_guided_start_opens_pages_with_sample_data(open_page):
    app = open_page("home")
    links = [(one.proto.page, one.proto.query_string) for one in app.get("page_link")]
    if page.entry("chat"):
        assert any(where == "chat" and query.startswith("q=") for where, query in links)
    if page.entry("batch"):
        assert ("batch", "sample=comments") in links
    assert any(where == "models" for where, _ in links)


@pytest.mark.parametrize(("language", "expected"), [("zh", "快速上手"), ("en", "Guided start")])
def test_the_address_chooses_the_language(open_page, words, language, expected):
    assert expected in words(open_page("home", lang=language))


def test_the_language_is_kept_across_pages_and_restarts(open_page, words):
    app = open_page("home")
    app.segmented_control(key="language_choice").set_value("zh").run()
    assert "快速上手" in words(app)
    app.switch_page("pages/models.py").run()
    assert "本机模型" in words(app)
    assert "快速上手" in words(open_page("home"))  # a new session of the same workspace


def test_a_damaged_preferences_file_does_not_take_the_page_away(open_page, workspace):
    workspace.mkdir(parents=True)
    (workspace / "preferences.json").write_text("{half of")
    assert not open_page("home").exception


def test_a_workspace_that_cannot_be_made_is_a_sentence(open_page, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLM_WORKSPACE", str(tmp_path / "file" / "workspace"))
    app = open_page("home")
    assert not app.exception
    assert "cannot be written" in app.error[0].value
    assert "GLM\\_WORKSPACE" in app.error[0].value
    monkeypatch.setenv("GLM_WORKSPACE", str(tmp_path / "workspace"))


def test_a_model_that_did_not_load_is_a_sentence_with_a_way_out(open_page, words):
    app = open_page("home")
    state.loading().error = GLMError("The shard is missing.", "Copy it again.")
    app.run()
    assert "The shard is missing" in words(app)
    assert "Copy it again" in words(app)


def test_home_is_on_screen_before_torch_is_imported(tmp_path):
    script = (
        "import sys; from pages.shared import state; state.FIRST_PAINT_S = 60\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('Home.py', default_timeout=60).run()\n"
        "assert not app.exception and app.metric\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    environment = {**os.environ, "GLM_WORKSPACE": str(tmp_path / "w"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout
    assert "transformers" not in done.stdout


@pytest.mark.parametrize(
    ("count", "expected"),
    [(512, "512 B"), (2048, "2 KiB"), (33_589_504, "32 MiB"), (6_550_000_000, "6.1 GiB"), (None, "–")],
)
def test_bytes_read_as_sizes(count, expected):
    assert panels.format_bytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.42, "0.4 s"), (12.3, "12 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds_read_as_durations(open_page, seconds, expected):
    assert panels.format_duration(seconds) == expected


def test_moments_read_as_seen_from_now():
    now = time.time()
    assert panels.format_ago(now - 5, now) == "just now"
    assert panels.format_ago(now - 7300, now) == "2 h ago"
