"""Save as … on the Models page: what is offered for which checkpoint, what is refused, and that the result loads."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from glm_core import checkpoints, engine
from glm_core.errors import GLMError
from pages.shared import convert_panel, state
from tests.pages.conftest import write_lora, write_prefix, write_whole_with_prefix


@pytest.fixture
def saved(workspace) -> Path:
    """The folder new checkpoints go to."""
    return workspace / "checkpoints"


def opened(open_page, folder, **query):
    return open_page("models", **query).button(key=f"save_as {folder}").click().run()


def wait_until_saved(app, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while state.making().busy and time.monotonic() < end:
        time.sleep(0.02)
    return app.run()


def start(app, name=None):
    if name is not None:
        app.text_input(key="convert_name").set_value(name).run()
    app.button(key="convert_start").click().run()
    assert not app.exception
    return app


def save(app, name=None):
    return wait_until_saved(start(app, name))


def keys(elements):
    return [one.key for one in elements]


def logits(folder, base=None):
    import torch

    loaded = checkpoints.load(folder, "fp32", "cpu", base=base)
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([[1, 5, 9, 12]]), use_cache=False).logits


# --- what is offered --------------------------------------------------------------------------------------


def test_only_what_can_be_made_of_a_checkpoint_is_offered(family):
    base = family / "tiny-chatglm3"
    possible = {
        "whole": checkpoints.inspect(base),
        "codes": checkpoints.inspect(checkpoints.convert(base, family / "codes", "int4")),
        "native": checkpoints.inspect(checkpoints.convert_to_glm(base, family / "native", "fp32")),
        "lora": checkpoints.inspect(write_lora(family / "lora", base)),
        "prefix": checkpoints.inspect(write_prefix(family / "prefix", base)),
        "whole with prefix": checkpoints.inspect(write_whole_with_prefix(family / "both", base)),
        "first": replace(checkpoints.inspect(base), architecture="chatglm"),
        "broken": replace(checkpoints.inspect(base), problems=("config.json names no model_type.",)),
    }
    assert {name: convert_panel.possible(info) for name, info in possible.items()} == {
        "whole": ("convert", "glm"),
        "codes": ("convert",),
        "native": ("convert",),
        "lora": ("merge",),
        "prefix": ("export",),
        "whole with prefix": ("export",),
        "first": ("convert",),
        "broken": (),
    }


def test_a_folder_that_cannot_be_loaded_has_no_button(open_page, family):
    broken = write_lora(family / "other", family / "tiny-chatglm3", peft_type="IA3")
    buttons = keys(open_page("models").button)
    assert f"save_as {family / 'tiny-chatglm3'}" in buttons
    assert f"save_as {broken}" not in buttons


def test_the_form_says_what_each_choice_is_good_for(open_page, model_folder):
    app = opened(open_page, model_folder)
    assert not app.exception
    radio = app.radio(key="convert_kind")
    assert len(radio.options) == len(radio.proto.captions) == 2
    assert "whatever uses transformers loads it" in radio.proto.captions[1]


# --- what is made -----------------------------------------------------------------------------------------


def test_as_stored_no_number_changes(open_page, words, model_folder, saved):
    import torch
    from safetensors.torch import load_file

    app = opened(open_page, model_folder)
    assert app.selectbox(key="convert_precision").value == "fp32"  # as the tiny one is stored
    assert app.text_input(key="convert_name").value == "tiny-chatglm3-fp32"
    app = save(app)
    out = saved / "tiny-chatglm3-fp32"
    assert f":material/folder: {out}" in words(app).replace("\\", "")
    before, after = load_file(model_folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "tiny\\-chatglm3\\-fp32" in words(app)  # listed at once


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_another_precision_is_written_and_loads(open_page, model_folder, saved, precision):
    app = opened(open_page, model_folder)
    app.selectbox(key="convert_precision").set_value(precision).run()
    save(app)
    out = saved / f"tiny-chatglm3-{precision}"
    info = checkpoints.inspect(out)
    assert info.dtype.lower() == precision
    assert not checkpoints.load(out).report.missing
    expected, _ = convert_panel.expected(
        checkpoints.inspect(model_folder), checkpoints.inspect(model_folder), "convert", precision
    )
    assert 0 <= info.size_bytes - expected < 6000  # headers, and scales beside codes


def test_the_layout_of_transformers_has_the_same_logits(open_page, model_folder, saved):
    import torch

    app = opened(open_page, model_folder)
    app.radio(key="convert_kind").set_value("glm").run()
    assert app.selectbox(key="convert_precision").options == ["FP32 · as stored", "BF16", "FP16"]
    save(app, "for-others")
    out = saved / "for-others"
    assert json.loads((out / "config.json").read_text())["model_type"] == "glm"
    assert torch.equal(logits(out), logits(model_folder))


def test_codes_stay_and_the_numbers_beside_them_too(open_page, words, family, saved):
    from safetensors.torch import load_file

    codes = checkpoints.convert(family / "tiny-chatglm3", family / "small", "int4")
    app = opened(open_page, codes)
    assert "stored as INT4 and stay so" in words(app)
    assert "convert_precision" not in keys(app.selectbox)
    save(app)
    before, after = (
        load_file(codes / "model.safetensors"),
        load_file(saved / "small-int4" / "model.safetensors"),
    )
    assert {name: (one.dtype, one.tolist()) for name, one in before.items()} == {
        name: (one.dtype, one.tolist()) for name, one in after.items()
    }


def test_a_lora_is_merged_into_the_chosen_base(open_page, words, family, saved):
    import torch

    shutil.copytree(family / "tiny-chatglm3", family / "another-chatglm3")
    made = write_lora(family / "polite", family / "tiny-chatglm3", recorded="tiny-chatglm3")
    app = opened(open_page, made)
    assert "convert_kind" not in keys(app.radio)
    assert app.selectbox(key="models_base").value == str(family / "tiny-chatglm3")
    app.selectbox(key="models_base").set_value(str(family / "another-chatglm3")).run()
    assert app.text_input(key="convert_name").value == "polite-merged"
    app = save(app)
    out = saved / "polite-merged"
    assert not checkpoints.inspect(out).method
    whole, beside = logits(out), logits(made, family / "another-chatglm3")
    assert torch.allclose(whole, beside, atol=1e-5)
    assert not torch.allclose(whole, logits(family / "tiny-chatglm3"), atol=1e-3)


def test_a_lora_chosen_to_be_loaded_can_be_merged_on_the_same_page(open_page, family, saved):
    made = write_lora(family / "polite", family / "tiny-chatglm3")
    app = open_page("models")
    app.selectbox(key="models_choice").set_value(str(made)).run()
    app.button(key=f"save_as {made}").click().run()
    assert not app.exception
    assert keys(app.selectbox).count("models_base") == 1
    save(app)
    assert (saved / "polite-merged" / "config.json").is_file()


def test_a_prefix_is_written_alone_and_loads_onto_its_base(open_page, family, saved):
    import torch

    both = write_whole_with_prefix(family / "both", family / "tiny-chatglm3")
    app = opened(open_page, both)
    save(app)
    out = saved / "both-prefix"
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "pytorch_model.bin"]
    alone = checkpoints.load(out, "fp32", base=family / "tiny-chatglm3").prefix
    assert torch.equal(alone(), checkpoints.load(both, "fp32").prefix())


def test_the_loaded_model_stays_as_it_is(open_page, loaded_model, model_folder, saved):
    before = {name: one.clone() for name, one in loaded_model.loaded.model.state_dict().items()}
    app = opened(open_page, model_folder)
    app.selectbox(key="convert_precision").set_value("int4").run()
    save(app)
    assert (saved / "tiny-chatglm3-int4").is_dir()
    assert engine.host().current is loaded_model
    after = loaded_model.loaded.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)


def test_the_new_folder_is_chosen_and_loaded(open_page, model_folder, saved):
    app = save(opened(open_page, model_folder), "small")
    app.button(key="convert_choose").click().run()
    assert app.selectbox(key="models_choice").value == str(saved / "small")
    assert "convert_choose" not in keys(app.button)
    app.button(key="load").click().run()
    while state.loading().busy:
        time.sleep(0.02)
    assert engine.host().current.loaded.info.path == saved / "small"


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "has no name"),
        ("   ", "has no name"),
        ("a/b", "cannot be called"),
        ("../outside", "cannot be called"),
        ("..", "cannot be called"),
        (".hidden", "cannot be called"),
        ("C:\\x", "cannot be called"),
        ("made.partial", "cannot be called"),
        ("型" * 90, "cannot be called"),
        ("taken", "exists already"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused_before_the_work(
    open_page, model_folder, saved, workspace, name, said
):
    (saved / "taken").mkdir(parents=True)
    (saved / "taken" / "notes.txt").write_text("mine")
    before = sorted(workspace.parent.rglob("*"))
    app = start(opened(open_page, model_folder), name)
    assert said in app.error[0].value
    assert state.making().target is None
    assert app.button(key="convert_start")  # the dialog is still there
    left = [one for one in workspace.parent.rglob("*") if one not in before and one.parent != workspace]
    assert not left
    assert (saved / "taken" / "notes.txt").read_text() == "mine"


def test_the_proposed_name_is_free_and_follows_the_choices_until_one_is_typed(open_page, model_folder, saved):
    (saved / "tiny-chatglm3-int4").mkdir(parents=True)
    app = opened(open_page, model_folder)
    app.selectbox(key="convert_precision").set_value("int4").run()
    assert app.text_input(key="convert_name").value == "tiny-chatglm3-int4-2"
    app.radio(key="convert_kind").set_value("glm").run()
    assert app.text_input(key="convert_name").value == "tiny-chatglm3-glm"
    app.text_input(key="convert_name").set_value("mine").run()
    app.radio(key="convert_kind").set_value("convert").run()
    assert app.text_input(key="convert_name").value == "mine"


def test_the_form_of_the_next_checkpoint_is_fresh(open_page, family):
    app = opened(open_page, family / "tiny-chatglm3")
    app.text_input(key="convert_name").set_value("mine").run()
    app.button(key=f"save_as {family / 'wide-chatglm3'}").click().run()
    assert app.text_input(key="convert_name").value == "wide-chatglm3-fp32"


# --- refusals and failures --------------------------------------------------------------------------------


def test_codes_take_no_lora_and_that_is_said_before_the_work(open_page, family):
    made = write_lora(family / "polite", family / "tiny-chatglm3", recorded="codes")
    checkpoints.convert(family / "tiny-chatglm3", family / "codes", "int4")
    app = opened(open_page, made)
    assert "LoRA cannot be merged into INT8/INT4 weights" in app.error[0].value
    assert "convert_start" not in keys(app.button)
    app.selectbox(key="models_base").set_value(str(family / "tiny-chatglm3")).run()
    assert not app.error
    assert "convert_start" in keys(app.button)


def test_without_a_base_there_is_nothing_to_merge(open_page, family):
    made = write_lora(family / "polite", family / "tiny-chatglm3")
    shutil.rmtree(family / "tiny-chatglm3")
    app = opened(open_page, made)
    assert "No checkpoint here fits this adapter" in app.warning[0].value
    assert "convert_start" not in keys(app.button)


def test_a_full_disk_is_refused_before_the_work(open_page, model_folder, saved, monkeypatch):
    used = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_panel.shutil, "disk_usage", lambda _: used)
    app = start(opened(open_page, model_folder))
    assert "GiB are free there" in app.error[0].value
    assert state.making().target is None


def test_too_little_memory_is_refused_as_loading_does(open_page, words, model_folder, saved, monkeypatch):
    from glm_core import devices

    monkeypatch.setattr(devices, "free_bytes", lambda _: 1 << 20)
    little = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    app = opened(open_page, model_folder)
    assert ":orange[:material/warning: In memory while it is made" in words(app)
    app = save(app, "small")
    assert "tiny-chatglm3 needs about" in app.error[0].value.replace("\\", "")
    assert list(saved.iterdir()) == []
    app.button(key="convert_close").click().run()
    assert not app.error


def test_a_failed_save_is_a_sentence_and_leaves_no_folder(open_page, model_folder, saved, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    app = save(opened(open_page, model_folder), "small")
    assert "small cannot be written: No space left" in app.error[0].value.replace("\\", "")
    assert list(saved.iterdir()) == []
    assert "convert_choose" not in keys(app.button)
    assert "small 无法写入" in open_page("models", lang="zh").error[0].value


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_failure_is_a_sentence_too(open_page, model_folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "convert", lambda *_: 1 / 0)
    app = save(opened(open_page, model_folder), "small")
    assert "tiny-chatglm3 was not saved as small: ZeroDivisionError" in app.error[0].value.replace("\\", "")


def test_a_failed_save_does_not_keep_its_weights(tmp_path):
    import gc
    import weakref

    class Weights:
        pass

    kept: list[weakref.ref[Weights]] = []

    def fail(_):
        weights = Weights()
        kept.append(weakref.ref(weights))
        raise GLMError("The disk is full.", "Free some space.")

    making = state.Making()
    making.start(tmp_path / "a", tmp_path / "b", 1, fail)
    making._thread.join()
    gc.collect()
    assert making.error.message == "The disk is full."
    assert kept[0]() is None


# --- while it is made -------------------------------------------------------------------------------------


def test_progress_is_shown_also_to_a_session_that_comes_later(
    open_page, words, model_folder, saved, monkeypatch
):
    convert, reached, goes_on = checkpoints.convert, threading.Event(), threading.Event()

    def slow(path, folder, precision, progress):
        progress(2 << 20, 5 << 20)
        reached.set()
        goes_on.wait(30)
        return convert(path, folder, precision, progress)

    monkeypatch.setattr(checkpoints, "convert", slow)
    app = opened(open_page, model_folder)
    app.text_input(key="convert_name").set_value("small").run()
    app.button(key="convert_start").click().run()
    try:
        assert reached.wait(30)
        app.switch_page("Home.py").run()
        app.switch_page("pages/models.py").run()
        again = open_page("models")
        for one in (app, again):
            assert not one.exception
            assert "Saving small …" in words(one)
            assert "2 MiB of 5 MiB read (40 %)" in words(one)
            assert "Being saved as **small**" in words(one)
            assert one.button(key="load").disabled
        partial = saved / "small.partial"
        partial.mkdir()
        (partial / "part-00001.safetensors").write_bytes(bytes(400 << 10))
        assert "400 KiB of about 2 MiB written (25 %)" in words(again.run())
        again.button(key=f"save_as {model_folder}").click().run()
        assert again.button(key="convert_start").disabled
        assert "Another copy is being made; wait for it." in words(again)
        shutil.rmtree(partial)
    finally:
        goes_on.set()
    shown = words(wait_until_saved(app))
    assert "**small** is saved" in shown
    assert "Saved as **small**" in shown


def test_a_copy_waits_for_a_load_under_way(open_page, words, model_folder, monkeypatch):
    monkeypatch.setattr(state, "model_state", lambda: ("loading", "big"))
    app = opened(open_page, model_folder)
    assert app.button(key="convert_start").disabled
    assert "A model is being loaded; wait for it." in words(app)


def test_the_form_and_its_outcome_are_there_in_chinese(open_page, words, family, monkeypatch):
    made = checkpoints.inspect(write_lora(family / "polite", family / "tiny-chatglm3"))
    save(opened(open_page, made.path))
    app = open_page("models", lang="zh")
    assert "**polite\\-merged** 已保存" in words(app)
    monkeypatch.setattr(convert_panel, "opened", lambda _: made)
    app = open_page("models", lang="zh")
    assert "把 LoRA 合并到基座中的完整检查点" in words(app)
    assert app.button(key="convert_start").label == "保存"
