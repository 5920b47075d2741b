"""Unlabelled texts before the labelled rows, general rows beside them, and the answers written at every checkpoint."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch

from glm_core import checkpoints
from glm_core.errors import GLMError
from glm_core.finetune import state, work
from glm_core.finetune.adapt import FOLDER, Adapt, encode_texts, texts
from glm_core.finetune.examples import Example
from glm_core.finetune.loop import Plan
from glm_core.finetune.methods import IGNORED, Method, attach
from glm_core.finetune.work import MANIFEST, SAMPLES, WITHOUT, FinetuneTask, carry_out, load_data
from tests.test_encoding import GENERATIONS, tokenizers  # noqa: F401  # a fixture
from tests.test_methods import GENERATIONS as TINY
from tests.test_methods import load_tiny, make_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [("这个多少钱", "正常"), ("加微信领红包", "垃圾"), ("画质不错", "正常"), ("兼职日结加群", "垃圾")]


@pytest.fixture
def labelled(tmp_path):
    file = tmp_path / "labelled.jsonl"
    rows = [{"content": f"{a}{i}", "label": b} for i in range(4) for a, b in ROWS]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def unlabelled(tmp_path):
    file = tmp_path / "texts.csv"
    lines = [
        "comment,likes",
        *(f"主播讲得真好第{i}遍,{i}" for i in range(40)),
        "主播讲得真好第 7 遍,1",
        ",3",
        "画质不错0,9",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def task(tmp_path, tiny_checkpoint, labelled):
    plan = Plan(
        Method("lora", lora_rank=4), "fp32", 5e-3, batch_size=4, accumulation=1, max_steps=4, save_steps=2,
        logging_steps=1,
    )  # fmt: skip
    return FinetuneTask(
        str(tiny_checkpoint), plan, str(labelled), str(tmp_path / "out"), dev_share=0.25, max_source=32, max_target=8
    )  # fmt: skip


def test_dev_questions_copies_and_empty_cells_are_not_read(unlabelled):
    found = texts(unlabelled, "comment", [Example("画质 不错０", "正常")])
    assert (found.rows, found.empty, found.copies, found.excluded) == (43, 1, 1, 1)
    assert len(found.train) + len(found.held) == 40 and not set(found.train) & set(found.held)
    assert "画质不错0" not in found.train + found.held
    assert texts(unlabelled, "comment", []) == texts(unlabelled, "comment", [])


def test_a_missing_column_and_too_few_texts_are_refused(unlabelled, tmp_path):
    with pytest.raises(GLMError, match="no column 'text' of texts; it has 'comment', 'likes'"):
        texts(unlabelled, "text", [])
    with pytest.raises(GLMError, match="several columns"):
        texts(unlabelled, "", [])
    few = tmp_path / "few.csv"
    few.write_text("comment\n" + "好\n" * 30, encoding="utf-8")
    with pytest.raises(GLMError, match=r"1 text to learn from, of 30 rows: 0 empty, 29 copies"):
        texts(few, "", [])


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_token_of_a_text_counts_once_and_its_end_too(tokenizers, name):  # noqa: F811
    ours = tokenizers[name]
    text = "主播讲得真好 ab 12，" * 9
    rows = encode_texts([text], ours, 24)
    assert all(len(row.ids) <= 24 for row in rows) and len(rows) > 1
    counted = [i for row in rows for i in row.labels if i != IGNORED]
    assert counted == [*ours.encode(text), ours.eos_id]
    head = tuple(getattr(ours, "prefix_ids", ()))
    assert all(
        row.ids[: len(head)] == head and row.labels[: len(head)] == (IGNORED,) * len(head) for row in rows
    )


def test_reading_texts_first_lowers_their_loss_and_is_told(task, unlabelled):
    adapt = Adapt(str(unlabelled), "comment", epochs=6, learning_rate=2e-2, length=32)
    result = carry_out(replace(task, adapt=adapt))
    told = result.manifest["adapt"]
    assert told["text_loss"] < told["text_loss_before"] - 0.1
    assert told["dev_loss"] != told["dev_loss_before"] > 0
    assert told["texts"] + told["held"] == 41 and told["steps"] == -(-6 * told["texts"] // 4)
    written = json.loads((result.folder / MANIFEST).read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.manifest))
    assert checkpoints.load(result.folder, "fp32", "cpu", base=task.checkpoint).report.missing == ()
    assert FinetuneTask.from_json(result.manifest["task"]) == replace(task, adapt=adapt)


@pytest.mark.parametrize("stage", ["texts", "rows"])
def test_stopped_in_either_stage_it_goes_on_with_the_same_losses(task, unlabelled, tmp_path, stage):
    task = replace(task, adapt=Adapt(str(unlabelled), "comment", epochs=0.5, length=32))
    whole = carry_out(replace(task, output=str(tmp_path / "whole")))
    stop = threading.Event()

    def watch(event):
        at = tmp_path / "out" / ("" if stage == "rows" else FOLDER)
        if event.kind == "step" and event.step == 2 and bool(state.checkpoints(tmp_path / "out" / FOLDER)) == (
            stage == "rows"
        ):  # fmt: skip
            assert at.is_dir()
            stop.set()

    halted = carry_out(task, watch, stop.is_set)
    assert halted.outcome.stopped and halted.manifest["state"] == "stopped"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    resumed = carry_out(task, resume=True)
    assert resumed.manifest["state"] == "done"
    assert resumed.manifest["adapt"]["dev_loss"] == pytest.approx(
        whole.manifest["adapt"]["dev_loss"], rel=1e-5
    )
    for name in ("losses", "dev_losses"):
        assert len(resumed.manifest[name]) == len(whole.manifest[name]) > 0
        for (at, one), (also, other) in zip(resumed.manifest[name], whole.manifest[name], strict=True):
            assert at == also and one == pytest.approx(other, rel=1e-5)


def test_what_reading_changed_is_compared_with_a_training_without_it(task, unlabelled):
    adapt = Adapt(str(unlabelled), "comment", epochs=3, learning_rate=2e-2, length=32, compare=True)
    result = carry_out(replace(task, adapt=adapt))
    without = json.loads((result.folder / WITHOUT / MANIFEST).read_text(encoding="utf-8"))
    assert without["state"] == "done" and "adapt" not in without
    assert without["dev_losses"] != [list(one) for one in result.outcome.dev]
    assert carry_out(replace(task, output=str(result.folder) + "2")).manifest["dev_losses"] == tuple(
        (step, loss) for step, loss in without["dev_losses"]
    )


def test_general_rows_are_mixed_in_but_not_judged(task, tmp_path):
    general = tmp_path / "general.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}, " + "and so on " * 9} for i in range(3)]
    general.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = replace(task, general_share=0.5, general_file=str(general))
    data = load_data(task)
    assert len(data.general) == 6 == len(data.train) // 2
    assert {one.response for one in data.general} == {row["response"] for row in rows}
    assert load_data(task).general == data.general
    result = carry_out(task)
    audited = json.loads((result.folder / work.AUDIT).read_text(encoding="utf-8"))
    assert "It is" not in json.dumps(audited) and result.manifest["rows"] == {"train": 12, "dev": 4}
    assert state.latest(result.folder).state["rows"] == 18
    made = work._Work(replace(task, output=str(tmp_path / "other")), tmp_path / "other", str, None)
    assert all(len(row.ids) > 30 and row.truncated_target == 0 for row in made.rows[-6:])


def test_the_general_rows_that_come_along_can_be_read(task):
    data = load_data(replace(task, general_share=2.0))
    assert len(data.general) == 2 * len(data.train) and all(one.response for one in data.general)


def test_every_checkpoint_leaves_the_answers_to_the_same_questions(task):
    result = carry_out(task)
    lines = [json.loads(line) for line in (result.folder / SAMPLES).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2] * 4 + [4] * 4
    assert {line["expected"] for line in lines} == {"正常", "垃圾"}
    assert [line["prompt"] for line in lines[:4]] == [line["prompt"] for line in lines[4:]]


def test_a_look_at_answers_under_training_is_what_the_model_answers(tiny_checkpoint):
    from glm_core.engine import Engine, GenerationSettings, Request

    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    trainee = attach(loaded, Method("full"))
    prompts = [loaded.tokenizer.encode(text) for text in ("你好", "加微信领红包 now", "a")]
    trainee.evaluating()
    ours = trainee.greedy(prompts, loaded.tokenizer.stop_ids, 6, loaded.tokenizer.pad_id)
    trainee.detach()
    running = Engine(loaded)
    try:
        settings = GenerationSettings(max_new_tokens=6)
        handles = running.submit_many([Request(tuple(ids), settings, "batch") for ids in prompts])
        for ids, handle in zip(ours, handles, strict=True):
            handle.wait()
            assert loaded.tokenizer.answer_text(ids, len(ids) < 6) == handle.text
    finally:
        running.close()


@pytest.mark.parametrize("generation", TINY)
def test_looked_at_together_questions_are_answered_as_alone(generation):
    trainee = attach(load_tiny(generation), Method("full"))
    prompts = [list(row.ids[: row.labels.index(next(i for i in row.labels if i != IGNORED)) + 1]) for row in
               make_rows(generation, 5)]  # fmt: skip
    trainee.evaluating()
    together = trainee.greedy(prompts, (), 5, 3)
    for ids, answer in zip(prompts, together, strict=True):
        for token in answer:
            alone = trainee.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert int(alone.argmax()) == token
            ids.append(token)
