"""Models: what is there, what is wrong with it, load, unload and self-test."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from glm_core import engine
from pages.shared import state


def click(app, key):
    return app.button(key=key).click().run()


def wait_until_loaded(app, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while state.loading().busy and time.monotonic() < end:
        time.sleep(0.05)
    return app.run()


def test_a_checkpoint_is_shown_with_what_its_files_say(open_page, words, model_folder):
    shown = words(open_page("models"))
    assert "tiny\\-chatglm3" in shown
    assert "ChatGLM3" in shown
    assert "2 layers of 32" in shown
    assert "context 1,024" in shown


def test_what_is_wrong_with_a_folder_is_a_sentence(open_page, words, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "qwen"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    monkeypatch.setenv("GLM_MODELS", str(folder.parent))
    app = open_page("models")
    assert not app.exception
    assert "cannot be loaded" in words(app)
    assert "There is no tokenizer" in words(app)
    assert str(folder) not in (app.selectbox(key="models_choice").options if app.selectbox else [])


def test_load_unload_and_what_it_took(open_page, words, model_folder):
    app = open_page("models")
    app.selectbox(key="models_choice").set_value(str(model_folder)).run()
    app = wait_until_loaded(click(app, "load"))
    assert engine.host().current is not None
    figures = {one.label: one.value for one in app.metric}
    assert figures["Model"] == "tiny-chatglm3"
    assert figures["Precision and device"] == "FP32 · CPU"
    assert "Memory taken" in figures
    click(app, "unload")
    assert engine.host().current is None
    assert "Unloaded: the process held" in words(app)


def test_the_chosen_precision_is_the_one_loaded(open_page, model_folder):
    app = open_page("models")
    app.selectbox(key="models_choice").set_value(str(model_folder)).run()
    app.segmented_control(key="widget.models.precision").set_value("bf16").run()
    wait_until_loaded(click(app, "load"))
    assert engine.host().current.status().precision == "bf16"


def test_predicted_memory_follows_the_precision(open_page, words, model_folder):
    app = open_page("models")
    app.selectbox(key="models_choice").set_value(str(model_folder)).run()
    full = words(app.segmented_control(key="widget.models.precision").set_value("fp32").run())
    half = words(app.segmented_control(key="widget.models.precision").set_value("bf16").run())
    assert "for the weights in FP32" in full
    assert "for the weights in BF16" in half


def test_settings_stay_when_another_page_was_shown(open_page, model_folder):
    app = open_page("models")
    app.segmented_control(key="widget.models.precision").set_value("fp16").run()
    app.switch_page("Home.py").run()
    app.switch_page("pages/models.py").run()
    assert app.segmented_control(key="widget.models.precision").value == "fp16"


def test_the_self_test_says_what_it_compared(open_page, words, loaded_model):
    app = click(open_page("models"), "self_test")
    while state.testing().busy:
        time.sleep(0.05)
    app.run()
    assert not app.exception
    assert "8 of 8 rows generated together equal the rows generated alone" in words(app)
    assert "batched \\= single" in words(app) or "batched = single" in words(app)


def test_unload_is_refused_with_a_reason_while_a_job_runs(open_page, words, loaded_model):
    app = open_page("models")
    with engine.host().hold("job reviews.csv"):
        click(app, "unload")
    assert "in use by job reviews\\.csv" in words(app)
    assert engine.host().current is loaded_model


def test_another_model_is_refused_with_a_reason_while_a_job_runs(open_page, words, loaded_model):
    app = open_page("models")
    app.segmented_control(key="widget.models.precision").set_value("bf16").run()
    app.selectbox(key="models_choice").set_value(str(loaded_model.loaded.info.path)).run()
    with engine.host().hold("job reviews.csv"):
        app = wait_until_loaded(click(app, "load"))
    assert "in use by job reviews\\.csv" in words(app)
    assert engine.host().current is loaded_model


def add(app, text):
    app.text_input(key="folder_path").set_value(text)
    return click(app, "folder_add")


def test_a_folder_elsewhere_is_added_kept_and_removed(
    open_page, words, tiny_checkpoint, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(tiny_checkpoint.parent)
    monkeypatch.setattr(Path, "home", lambda: tiny_checkpoint.parent.parent)
    app = open_page("models")
    assert "tiny\\-chatglm3" not in words(app)
    add(app, str(tiny_checkpoint.parent))
    assert "tiny\\-chatglm3" in words(app)
    again = open_page("models")  # a new session of the same workspace
    assert "tiny\\-chatglm3" in words(again)
    click(again, f"remove {tiny_checkpoint.parent}")
    assert state.settings().model_roots
    assert "tiny\\-chatglm3" not in words(again)


@pytest.mark.parametrize("path", ["/etc", "/"])
def test_a_folder_outside_the_allowed_ones_is_refused(open_page, path):
    app = add(open_page("models"), path)
    assert "outside the folders this workbench may read" in app.error[-1].value
    assert "GLM\\_MODELS" in app.error[-1].value


def test_a_folder_without_checkpoints_says_so(open_page, tmp_path, monkeypatch):
    monkeypatch.setenv("GLM_MODELS", str(tmp_path))
    (tmp_path / "empty").mkdir()
    app = add(open_page("models"), str(tmp_path / "empty"))
    assert "There is no checkpoint in" in app.error[-1].value


def test_a_second_click_on_load_loads_once(model_folder, monkeypatch):
    calls = []

    class Host:
        def use(self, path, **_):
            calls.append(path)
            time.sleep(0.3)

    monkeypatch.setattr(state, "engine_host", lambda: Host())
    loading = state.Loading()
    for _ in range(3):
        loading.start(model_folder, "auto", "auto", None)
    assert loading.busy
    loading._thread.join()
    assert len(calls) == 1
