"""Models: what is there, what is wrong with it, load, adapters on their base, unload and tests."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from glm_core import checkpoints, effect, engine
from pages.shared import state
from tests.pages.conftest import write_lora, write_prefix, write_whole_with_prefix


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
    app.selectbox(key="widget.models.precision").set_value("bf16").run()
    wait_until_loaded(click(app, "load"))
    assert engine.host().current.status().precision == "bf16"


def test_predicted_memory_follows_the_precision(open_page, words, model_folder):
    app = open_page("models")
    app.selectbox(key="models_choice").set_value(str(model_folder)).run()
    full = words(app.selectbox(key="widget.models.precision").set_value("fp32").run())
    half = words(app.selectbox(key="widget.models.precision").set_value("bf16").run())
    assert "for the weights in FP32" in full
    assert "for the weights in BF16" in half


def test_settings_stay_when_another_page_was_shown(open_page, model_folder):
    app = open_page("models")
    app.selectbox(key="widget.models.precision").set_value("fp16").run()
    app.switch_page("Home.py").run()
    app.switch_page("pages/models.py").run()
    assert app.selectbox(key="widget.models.precision").value == "fp16"


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
    app.selectbox(key="widget.models.precision").set_value("bf16").run()
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


# --- adapters ---------------------------------------------------------------------------------------------


def choose(app, folder):
    return app.selectbox(key="models_choice").set_value(str(folder)).run()


def wait_until_measured(app, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while state.measuring().busy and time.monotonic() < end:
        time.sleep(0.05)
    return app.run()


def bases_of(app):
    return [box.options for box in app.selectbox if box.key == "models_base"]


def test_a_lora_is_shown_with_rank_alpha_layers_and_base(open_page, words, family):
    write_lora(family / "polite", family / "tiny-chatglm3", "THUDM/tiny-chatglm3")
    shown = words(open_page("models"))
    assert "badge[:material/extension: LoRA]" in shown
    assert "rank 4, alpha 16, on query\\_key\\_value · 384 parameters, 2 KiB" in shown
    assert "trained on THUDM/tiny\\-chatglm3" in shown


def test_a_prefix_is_shown_with_its_length_and_family(open_page, words, family):
    write_prefix(family / "ad-chatglm3", family / "tiny-chatglm3")
    shown = words(open_page("models"))
    assert "badge[:material/extension: P-tuning v2]" in shown
    assert "prefix of 6 columns · 384 parameters" in shown
    assert "names no base" in shown


def test_an_adapter_that_cannot_be_loaded_says_why(open_page, words, family):
    write_lora(family / "other", family / "tiny-chatglm3", peft_type="IA3")
    app = open_page("models")
    assert "adapter\\_config\\.json has peft\\_type 'IA3'" in words(app)
    assert "other" not in app.selectbox(key="models_choice").options


def test_the_precision_stored_is_on_the_card(open_page, words, family):
    checkpoints.convert(family / "tiny-chatglm3", family / "small-int4", "int4")
    shown = words(open_page("models"))
    assert "badge[:material/compress: INT4]" in shown
    assert "INT4 on disk" in shown


@pytest.mark.parametrize("make", [write_lora, write_prefix])
def test_only_bases_that_fit_are_offered_and_the_recorded_one_is_chosen(open_page, words, family, make):
    shutil.copytree(family / "tiny-chatglm3", family / "another-chatglm3")
    made = make(family / "adapter", family / "tiny-chatglm3", recorded="THUDM/tiny-chatglm3")
    app = choose(open_page("models"), made)
    assert not app.exception
    assert bases_of(app) == [["tiny-chatglm3 (recorded)", "another-chatglm3"]]
    assert app.selectbox(key="models_base").value == str(family / "tiny-chatglm3")
    left_out = [one.value for one in app.caption if one.value.startswith("**wide\\-chatglm3**: ")]
    assert left_out and "64" in left_out[0]  # the width that does not fit


def test_a_recorded_base_elsewhere_is_offered(open_page, family, tmp_path, monkeypatch):
    elsewhere = Path(shutil.move(family / "tiny-chatglm3", tmp_path / "elsewhere"))
    made = write_lora(family / "adapter", elsewhere, recorded=str(elsewhere))
    assert bases_of(choose(open_page("models"), made)) == []  # not among the allowed folders
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert bases_of(choose(open_page("models"), made)) == [["elsewhere (recorded)"]]


def test_without_a_fitting_base_there_is_nothing_to_load(open_page, family):
    made = write_prefix(family / "adapter", family / "tiny-chatglm3", recorded="THUDM/chatglm3-6b")
    shutil.rmtree(family / "tiny-chatglm3")
    app = choose(open_page("models"), made)
    assert not app.exception
    assert "No checkpoint here fits this adapter, trained on THUDM/chatglm3\\-6b" in app.warning[0].value
    assert "load" not in [one.key for one in app.button]


def test_a_base_with_a_prefix_of_its_own_is_not_offered(open_page, words, family):
    write_whole_with_prefix(family / "whole", family / "tiny-chatglm3")
    made = write_lora(family / "adapter", family / "tiny-chatglm3")
    app = choose(open_page("models"), made)
    assert bases_of(app) == [["tiny-chatglm3"]]
    assert "whole carries a prefix of its own" in words(app)


def test_the_next_adapter_gets_a_base_of_its_own(open_page, family):
    first = write_lora(family / "first", family / "tiny-chatglm3")
    second = write_lora(family / "second", family / "wide-chatglm3")
    app = choose(open_page("models"), first)
    assert app.selectbox(key="models_base").value == str(family / "tiny-chatglm3")
    app = choose(app, second)
    assert app.selectbox(key="models_base").value == str(family / "wide-chatglm3")
    assert "models_base" not in [box.key for box in choose(app, family / "wide-chatglm3").selectbox]


@pytest.mark.parametrize("make", [write_lora, write_prefix])
def test_an_adapter_is_loaded_onto_the_chosen_base_and_measured(open_page, words, family, make):
    shutil.copytree(family / "tiny-chatglm3", family / "another-chatglm3")
    made = make(family / "adapter", family / "tiny-chatglm3", recorded="tiny-chatglm3")
    app = choose(open_page("models"), made)
    app.selectbox(key="models_base").set_value(str(family / "another-chatglm3")).run()
    app = wait_until_loaded(click(app, "load"))
    current = engine.host().current
    assert current.loaded.info.path == made
    assert current.loaded.base.path == family / "another-chatglm3"
    shown = words(app)
    assert f"{len(current.loaded.report.used)} tensors used, 0 unused, 0 missing" in shown
    assert "on **another\\-chatglm3**" in shown
    assert "base in memory" in shown
    app = wait_until_measured(click(app, "effect_start"))
    report = state.measuring().report(current)
    assert report.effect.differing > 0
    shown = words(app)
    assert f"{report.effect.differing} of 8 answers changed" in shown
    assert "Write one sentence about the sea\\." in shown
    again = open_page("models")  # another session, as after a refresh
    assert f"{report.effect.differing} of 8 answers changed" in words(again)


def test_an_adapter_without_effect_is_warned_about(open_page, family):
    write_lora(family / "untrained", family / "tiny-chatglm3", strength=0.0)
    engine.host().use(family / "untrained", base=family / "tiny-chatglm3")
    app = wait_until_measured(click(open_page("models"), "effect_start"))
    assert "The adapter changed none of 8 test answers" in app.warning[0].value
    app = open_page("models", lang="zh")
    assert "适配器没有改变 8 个测试回答中的任何一个" in app.warning[0].value
    assert any("8 个回答中有 0 个改变" in one.value for one in app.markdown)


def test_what_was_measured_is_forgotten_with_the_model(open_page, words, family):
    whole = write_whole_with_prefix(family / "whole", family / "tiny-chatglm3")
    engine.host().use(whole)
    app = wait_until_measured(click(open_page("models"), "effect_start"))
    assert "of 8 answers changed" in words(app)
    click(app, "unload")
    engine.host().use(whole)
    assert "of 8 answers changed" not in words(app.run())
    assert app.button(key="effect_start")


# the traceback goes to the terminal
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_measurement_is_a_sentence(open_page, family, monkeypatch):
    engine.host().use(write_whole_with_prefix(family / "whole", family / "tiny-chatglm3"))
    monkeypatch.setattr(effect, "measure", lambda *_: 1 / 0)
    app = wait_until_measured(click(open_page("models"), "effect_start"))
    assert "The test prompts were not answered: ZeroDivisionError" in app.error[0].value.replace("\\", "")
    app = click(app, "self_test")
    assert not app.error


def test_a_model_without_an_adapter_has_no_effect_to_measure(open_page, loaded_model):
    assert "effect_start" not in [one.key for one in open_page("models").button]


def test_unused_tensors_are_named(open_page, words, family):
    import torch
    from safetensors.torch import load_file, save_file

    file = family / "tiny-chatglm3" / "model.safetensors"
    save_file(load_file(file) | {"transformer.extra.bias": torch.zeros(3)}, file)
    engine.host().use(family / "tiny-chatglm3")
    shown = words(open_page("models"))
    assert "1 unused, 0 missing" in shown
    assert "Not used: transformer\\.extra\\.bias" in shown


# --- while loading ----------------------------------------------------------------------------------------


def test_a_load_shows_the_share_read_also_after_a_refresh(open_page, words, model_folder, monkeypatch):
    load, reached, goes_on = checkpoints.load, threading.Event(), threading.Event()

    def slow(folder, precision, device, generation, base, progress):
        progress(2 << 20, 5 << 20)
        reached.set()
        goes_on.wait(30)
        return load(folder, precision, device, generation, base, progress)

    monkeypatch.setattr(checkpoints, "load", slow)
    app = choose(open_page("models"), model_folder)
    click(app, "load")
    try:
        assert reached.wait(30)
        again = open_page("models")
        for one in (app.run(), again):
            assert not one.exception
            assert "2 MiB of 5 MiB read (40 %)" in words(one)
            assert "Loading tiny\\-chatglm3" in words(one)
        assert again.selectbox(key="models_choice").value == str(model_folder)
        assert again.button(key="load").disabled
    finally:
        goes_on.set()
    assert "tensors used" in words(wait_until_loaded(again))


# --- what may be chosen -----------------------------------------------------------------------------------


def _pickers() -> None:
    import streamlit as st

    from pages.shared import pickers

    info = st.session_state.given
    st.session_state.chosen = (pickers.precision(info), pickers.generation(info))


def pickers_for(info) -> AppTest:
    app = AppTest.from_function(_pickers, default_timeout=60)
    app.session_state.given = info
    return app.run()


@pytest.mark.parametrize(
    ("generation", "family", "offered"),
    [
        ("chatglm", "ChatGLM", []),
        ("chatglm2", "ChatGLM2", ["as found (ChatGLM2)", "ChatGLM2 [Round 1]", "ChatGLM3 <|user|>"]),
        ("chatglm3", "ChatGLM3", ["as found (ChatGLM3)", "ChatGLM2 [Round 1]", "ChatGLM3 <|user|>"]),
        ("glm4", "GLM-4", []),
        ("template", "Qwen2", ["as found (the folder's chat", "the folder's chat", "Alpaca", "Vicuna"]),
    ],
)
def test_only_prompt_formats_that_fit_are_offered(model_folder, generation, family, offered):
    info = replace(checkpoints.inspect(model_folder), generation=generation, family=family)
    app = pickers_for(info)
    shown = [option for box in app.selectbox if box.label == "Prompt format" for option in box.options]
    assert len(shown) == len(offered)
    assert all(one.startswith(start) for one, start in zip(shown, offered, strict=True))
    assert app.session_state.chosen == ("auto", None)


def test_a_format_chosen_for_another_model_is_not_kept(model_folder):
    info = replace(checkpoints.inspect(model_folder), generation="template")
    app = pickers_for(info)
    app.selectbox(key="models_generation").set_value("vicuna").run()
    assert app.session_state.chosen == ("auto", "vicuna")
    app.session_state.given = replace(info, generation="chatglm3")
    assert app.run().session_state.chosen == ("auto", None)


def test_stored_codes_stay_and_only_the_arithmetic_is_chosen(model_folder):
    info = checkpoints.inspect(model_folder)
    app = pickers_for(info)
    assert [one.split(" ")[0] for one in app.selectbox[0].options] == ["auto", "FP32", "BF16", "FP16", "INT8", "INT4", *["INT4,"] * 3, "INT8,"]  # fmt: skip
    app.selectbox[0].set_value("int4").run()
    assert app.session_state.chosen[0] == "int4"
    app.session_state.given = replace(info, bits=8)
    app.run()
    assert app.selectbox[0].options == [
        "auto",
        "FP32",
        "BF16",
        "FP16",
        "INT8, dynamic · fastest on a processor",
    ]
    assert app.session_state.chosen[0] == "auto"
    assert "stored as INT8 and stay so" in app.caption[0].value


def test_int4_is_chosen_and_loaded(open_page, words, model_folder):
    app = choose(open_page("models"), model_folder)
    app.selectbox(key="widget.models.precision").set_value("int4").run()
    wait_until_loaded(click(app, "load"))
    assert engine.host().current.status().precision == "int4"


def test_the_memory_of_an_adapter_is_that_of_its_base_and_its_own(family):
    from pages.shared import pickers

    base = checkpoints.inspect(family / "tiny-chatglm3")
    adapter = checkpoints.inspect(write_lora(family / "adapter", base.path))
    assert pickers.expected_memory(base, "fp32", "cpu", adapter) == ("fp32", 4 * (base.parameters + 384))
