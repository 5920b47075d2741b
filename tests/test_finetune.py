"""Fine-tuning from the shell: the published scripts' flags, a checkpoint that loads, predictions, and what is refused."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext

import pytest

from glm_core import checkpoints, cli
from glm_core.cli import finetune as shell
from glm_core.finetune.work import MANIFEST, FinetuneTask, read_events

ROWS = [("这个多少钱", "正常"), ("加微信领红包", "垃圾"), ("画质不错", "正常"), ("兼职日结加群", "垃圾")]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.json"
    lines = [json.dumps({"content": a, "label": b}, ensure_ascii=False) for a, b in ROWS * 3]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tiny_checkpoint):
    monkeypatch.setenv("GLM_WORKSPACE", str(tmp_path / "workspace"))

    def call(*more, out="out", steps=4):
        given = [
            "finetune", "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / out, "--max_steps", steps,
            "--max_source_length", 32, "--max_target_length", 8, "--per_device_train_batch_size", 2,
            "--per_device_eval_batch_size", 1, "--gradient_accumulation_steps", 1, "--predict_with_generate",
            "--logging_steps", 2, "--save_steps", 2, "--learning_rate", "2e-2", *more,
        ]  # fmt: skip
        status = cli.main([str(part) for part in given])
        said = capsys.readouterr()
        return status, tmp_path / out, said.out, said.err

    return call


@pytest.mark.parametrize("method", [("--pre_seq_len", 8), ("--lora_rank", 4), ("--freeze_layers", 1), ()])
def test_a_tutorials_command_leaves_a_checkpoint_that_loads(run, data, tiny_checkpoint, method):
    columns = ("--prompt_column", "content", "--response_column", "label")
    status, out, said, _ = run("--do_train", "--train_file", data, *columns, "--overwrite_cache", *method)
    assert status == 0 and "4 steps" in said
    loaded = checkpoints.load(
        out, "fp32", "cpu", base=tiny_checkpoint if method[:1] != ("--freeze_layers",) and method else None
    )
    assert loaded.report.missing == ()
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["state"] == "done" and manifest["rows"] == {"train": 12, "dev": 0}
    assert FinetuneTask.from_json(manifest["task"]).to_json() == manifest["task"]
    steps = [event["step"] for event in read_events(out) if event["kind"] == "step"]
    assert steps == [2, 4]


def test_predictions_are_written_as_the_published_scripts_write_them(run, data):
    status, out, said, _ = run(
        "--do_train", "--do_predict", "--train_file", data, "--test_file", data, "--lora_rank", 4
    )
    lines = (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert status == 0 and [json.loads(line)["labels"] for line in lines] == [b for _, b in ROWS * 3]
    scores = json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    assert scores["predict_samples"] == 12 and {"predict_rouge-l", "predict_bleu-4"} <= set(scores)


def test_a_stopped_training_goes_on_with_the_same_losses(run, data, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(shell, "_interrupts", lambda: nullcontext(asked))
    monkeypatch.setattr(shell, "_show", lambda event: asked.set() if event.step == 2 else None)
    what = ("--do_train", "--train_file", data, "--lora_rank", 4)
    status, out, _, said = run(*what)
    assert (
        status == 130 and "Stopped after 2 of 4 steps" in said and not (out / "adapter_config.json").exists()
    )
    monkeypatch.undo()
    monkeypatch.setenv("GLM_WORKSPACE", str(out.parent / "workspace"))
    status, _, _, said = run(*what)
    assert (
        status == 0 and "Going on from the last checkpoint" in said and (out / "adapter_config.json").exists()
    )
    _, whole, _, _ = run(*what, out="whole")
    losses = [[e["loss"] for e in read_events(folder) if e["kind"] == "step"] for folder in (out, whole)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_input_is_refused_before_the_old_training_is_overwritten(run, data, tmp_path):
    _, out, _, _ = run("--do_train", "--train_file", data, "--lora_rank", 4)
    bad = tmp_path / "bad.json"
    bad.write_text('{"content": "a", "label": ""}\n', encoding="utf-8")
    kept = sorted(path.name for path in out.iterdir())
    status, _, _, said = run("--do_train", "--train_file", bad, "--lora_rank", 4, "--overwrite_output_dir")
    assert status == 1 and said.startswith("Error: ")
    assert sorted(path.name for path in out.iterdir()) == kept


def test_a_folder_that_is_no_training_is_never_overwritten(run, data, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.docx").write_bytes(b"years of work")
    for more in ((), ("--overwrite_output_dir",)):
        status, out, _, said = run("--do_train", "--train_file", data, "--lora_rank", 4, *more, out="thesis")
        assert status == 1 and "thesis" in said
        assert (out / "chapter.docx").read_bytes() == b"years of work"
