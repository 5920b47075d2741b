"""The training loop: the reference's numbers, stopping, resuming, and what is left after every kind of accident."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glm_core import checkpoints
from glm_core.adapters import PREFIX
from glm_core.errors import GLMError
from glm_core.finetune import loop, state
from glm_core.finetune.loop import Batches, Event, Plan, TrainingError, collate, train
from glm_core.finetune.methods import Method, Trainee, attach
from tests.conftest import GOLDEN, REPOSITORY
from tests.test_methods import GENERATIONS, METHODS, Row, load_tiny, make_rows

# Tolerances of tests/test_adapters.py, with their reasons there.
LOSS, GRADIENT, AFTER_STEPS = 1e-5, 2e-6, 1e-3
PAD = 3
pytestmark = pytest.mark.usefixtures("one_thread")


def make_plan(method: str | Method = "lora", **changes: Any) -> Plan:
    """Short and constant, unless changed."""
    chosen = METHODS[method] if isinstance(method, str) else method
    values: dict[str, Any] = {
        "method": chosen, "precision": "fp32", "learning_rate": 1e-3, "batch_size": 4, "accumulation": 1,
        "max_steps": 6, "warmup_steps": 0, "schedule": "constant", "save_steps": 100, "logging_steps": 1,
    }  # fmt: skip
    return Plan(**values | changes)


def trained(plan: Plan, folder: Path, generation: str = "v2", rows: Any = None, **options: Any) -> Any:
    """A fresh small model trained by a plan: the outcome and the trainee."""
    trainee = attach(load_tiny(generation, plan.precision), plan.method, seed=plan.seed)
    given = make_rows(generation, 24) if rows is None else rows
    dev = options.pop("dev", ())
    return train(trainee, given, dev, plan, folder, PAD, **options), trainee


# ------------------------------------------------------------------------------------------------ reference numbers


def golden_rows(ids: torch.Tensor, labels: torch.Tensor) -> list[Row]:
    """The rows of a recorded batch without the padding on their right."""
    rows = []
    for own, label in zip(ids.tolist(), labels.tolist(), strict=True):
        end = max(i for i, value in enumerate(label) if value != -100) + 1
        rows.append(Row(tuple(own[:end]), tuple(label[:end])))
    return rows


class Watched:
    """Gradients as they are at the first step of an optimiser."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainee: Trainee) -> None:
        self.first: dict[str, torch.Tensor] = {}
        real = torch.optim.AdamW.step

        def step(optimizer: Any, *args: Any, **options: Any) -> Any:
            if not self.first:
                self.first = {name: p.grad.clone() for name, p in trainee.parameters.items()}
            return real(optimizer, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["noproj", "proj"])
def test_a_prefix_is_trained_as_in_the_reference(family, kind, accumulation, tmp_path, monkeypatch):
    folder = GOLDEN / family / f"ptuning_tiny_{kind}"
    arrays = {key: torch.tensor(array) for key, array in np.load(folder.with_suffix(".npz")).items()}
    record = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    rows = golden_rows(arrays["train/input_ids"], arrays["train/labels"])
    assert len(rows) == 3
    method = Method("p-tuning-v2", prefix_length=8, prefix_projection=kind == "proj")
    plan = make_plan(
        method, learning_rate=2e-2, batch_size=len(rows) // accumulation, accumulation=accumulation, clip=0.0,
        dropout=False,
    )  # fmt: skip
    trainee = attach(load_tiny(family), method)
    trainee.load(folder)
    watched = Watched(monkeypatch, trainee)
    outcome = train(trainee, rows, (), plan, tmp_path, PAD)
    for name, gradient in watched.first.items():
        torch.testing.assert_close(gradient, arrays[f"grad0/{PREFIX}{name}"], atol=GRADIENT, rtol=0)
    theirs = record["losses_before_each_of_5_adamw_steps_and_after"]
    ours = [loss for _, loss in outcome.losses]
    assert ours[0] == pytest.approx(theirs[0], abs=LOSS)
    assert ours == pytest.approx(theirs, abs=AFTER_STEPS)


def test_a_lora_is_trained_as_in_the_reference(tmp_path, monkeypatch):
    folder = GOLDEN / "v1" / "lora_tiny"
    arrays = {key: torch.tensor(array) for key, array in np.load(folder.with_suffix(".npz")).items()}
    record = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    rows = golden_rows(arrays["batch_default/input_ids"], arrays["batch_default/labels"])
    trainee = attach(load_tiny("v1"), METHODS["lora"])
    trainee.load(folder)
    watched = Watched(monkeypatch, trainee)
    plan = make_plan("lora", batch_size=len(rows), clip=0.0, dropout=False)
    outcome = train(trainee, rows, (), plan, tmp_path, PAD)
    for name, gradient in watched.first.items():
        expected = arrays[f"grad0/base_model.model.{name}"]
        torch.testing.assert_close(gradient, expected, atol=GRADIENT, rtol=1e-5)
    ours = [loss for _, loss in outcome.losses]
    assert ours[0] == pytest.approx(record["loss"]["default"], abs=LOSS)
    assert ours == pytest.approx(record["adamw_lr1e-3_losses"], abs=AFTER_STEPS)


def test_a_step_equals_that_of_transformers_trainer(tmp_path):
    """Batches of unlike lengths accumulate to the mean over tokens, under clipping and a falling rate."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    rows = make_rows("v2", 8)
    losses = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
            return SequentialSampler(rows)

        def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    def collator(batch: list[Any]) -> dict[str, torch.Tensor]:
        ids, labels = collate(batch, PAD)
        return {"input_ids": ids, "labels": labels}

    model = load_tiny("v2").model.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=2, gradient_accumulation_steps=4,
        max_steps=5, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=0.5,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    plan = make_plan(
        "full", batch_size=2, accumulation=4, max_steps=5, schedule="linear", clip=0.5, dropout=False
    )
    outcome, _ = trained(plan, tmp_path / "ours", rows=rows)  # every step sees all rows, in whatever order
    # Trainer rounds what it logs to 4 digits in some versions; Adam lets differences of rounding grow.
    assert [loss for _, loss in outcome.losses] == pytest.approx(losses, abs=2e-4)


# ------------------------------------------------------------------------------------------------ learning

RATES = {"prefix": 0.3, "lora": 1e-2, "freeze": 1e-2, "full": 5e-3}
STEPS = {"prefix": 160, "lora": 70, "freeze": 90, "full": 70}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        for name in RATES
        for precision in ("fp32", "bf16", "int8", "int4")
        if name in ("prefix", "lora") or not precision.startswith("int")  # codes cannot be trained
    ],
)
def test_eight_rows_are_learnt_by_heart(generation, name, precision, tmp_path):
    method = METHODS[name]
    if name == "prefix":
        method = replace(method, prefix_length=64)
    if name == "lora":
        method = replace(method, lora_targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"))
    plan = make_plan(
        method, precision=precision, learning_rate=RATES[name], batch_size=8, max_steps=STEPS[name],
        schedule="linear", logging_steps=10, dropout=False,
    )  # fmt: skip
    rows = make_rows(generation, 8, seed=3)
    outcome, trainee = trained(plan, tmp_path, generation, rows=rows, dev=rows)
    assert outcome.dev_loss is not None and outcome.dev_loss < 0.1
    assert outcome.losses[0][1] > 1  # it was not so before


def test_fp16_trains_with_a_scaled_loss(tmp_path):
    events: list[Event] = []
    for name in ("lora", "full"):
        plan = make_plan(name, precision="fp16", max_steps=20, learning_rate=3e-3, batch_size=8)
        rows = make_rows("v2", 8)
        outcome, _ = trained(plan, tmp_path / name, rows=rows, on_event=events.append)
        assert outcome.losses[-1][1] < outcome.losses[0][1] - 0.5
        assert outcome.skipped < 10
        saved = state.latest(tmp_path / name)
        assert saved is not None and saved.tensors()["scaler"]["scale"] > 1


@pytest.mark.parametrize("generation", ["v1", "v2"])
@pytest.mark.parametrize("name", ["prefix", "lora", "freeze", "full"])
def test_recomputing_layers_changes_no_loss(generation, name, tmp_path):
    runs = []
    for checkpointing in (False, True):
        plan = make_plan(name, checkpointing=checkpointing, learning_rate=1e-2)
        outcome, trainee = trained(plan, tmp_path / str(checkpointing), generation)
        runs.append([loss for _, loss in outcome.losses])
        assert not trainee.loaded.model.is_activation_checkpointing
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][-1] != runs[0][0]


def test_dropout_follows_the_seed_and_can_be_left_out(tmp_path):
    def losses(name: str, **changes: Any) -> list[float]:
        plan = make_plan("prefix", batch_size=24, learning_rate=1e-6, max_steps=3, **changes)
        return [loss for _, loss in trained(plan, tmp_path / name)[0].losses]

    first = losses("first")
    assert losses("again") == first
    assert losses("other", seed=43) != first
    plain = losses("plain", dropout=False)
    assert plain == pytest.approx([plain[0]] * 3, abs=1e-3)  # the same rows, nearly the same weights
    assert abs(first[1] - first[0]) > 1e-3


# ------------------------------------------------------------------------------------------------ batches, plan


def test_every_epoch_has_every_row_once_in_batches_of_like_length():
    lengths = [5 + (7 * row) % 50 for row in range(403)]
    batches = Batches(lengths, 8, seed=1)
    assert batches.per_epoch == 51
    epochs = [[batches[epoch * 51 + i] for i in range(51)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(403))
        padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in epoch)
        assert padded < 1.15 * sum(lengths)  # in random batches 1.6 times
    assert epochs[0] != epochs[1]
    assert max(lengths) in [lengths[row] for row in epochs[0][0]]  # too little memory shows at once
    again = Batches(lengths, 8, seed=1)
    assert [again[i] for i in range(102)] == epochs[0] + epochs[1]
    assert Batches(lengths, 8, seed=2)[5] != batches[5]


def test_batches_are_padded_to_a_multiple_of_eight():
    ids, labels = collate([Row((5, 6, 7), (-100, 6, 7)), Row(tuple(range(10, 19)), (-100,) * 8 + (18,))], PAD)
    assert ids.shape == labels.shape == (2, 16)
    assert ids[0].tolist() == [5, 6, 7] + [PAD] * 13
    assert labels[0].tolist() == [-100, 6, 7] + [-100] * 13


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "warmup_steps": 1}, [1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(changes, rates):
    plan = make_plan(max_steps=5, learning_rate=0.01, **changes)
    assert [plan.rate(step) / 0.01 for step in range(5)] == pytest.approx(rates)


def test_a_plan_survives_json():
    plan = make_plan(Method("lora", lora_targets=("dense",)), schedule="cosine", warmup_steps=None)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())) | {"later": 1}) == plan
    assert replace(plan, max_steps=400).warmup == 20 and replace(plan, max_steps=9000).warmup == 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"schedule": "polynomial"}, "schedule is 'polynomial'"),
        ({"clip": -1.0}, "clip is -1.0"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_the_first_step(changes, said, tmp_path):
    with pytest.raises(GLMError, match=said):
        trained(make_plan(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_learnt_are_refused(tmp_path):
    with pytest.raises(GLMError, match="no training rows"):
        trained(make_plan(), tmp_path, rows=[])
    with pytest.raises(GLMError, match="Row 2 of the training data has no token that counts"):
        trained(make_plan(), tmp_path, rows=[make_rows("v2", 1)[0], Row((5, 6), (5, -100))])
    with pytest.raises(GLMError, match="Row 1 of the dev data"):
        trained(make_plan(), tmp_path, dev=[Row((5, 6), (-100, -100))])


# ------------------------------------------------------------------------------------------------ events, checkpoints


def test_events_tell_how_far_and_how_fast(tmp_path):
    events: list[Event] = []
    rows = make_rows("v2", 10)
    plan = make_plan(batch_size=5, max_steps=7, logging_steps=2, save_steps=3, schedule="linear")
    outcome, trainee = trained(
        plan, tmp_path, rows=rows, dev=make_rows("v2", 3, seed=9), on_event=events.append
    )
    assert [(e.kind, e.step) for e in events] == [
        ("step", 2), ("dev", 3), ("saved", 3), ("step", 4), ("step", 6), ("dev", 6), ("saved", 6), ("step", 7),
        ("dev", 7), ("saved", 7), ("finished", 7),
    ]  # fmt: skip
    steps = [e for e in events if e.kind == "step"]
    for event in steps:
        assert event.steps == 7 and event.loss > 0 and event.grad_norm > 0
        assert event.tokens_per_s > event.rows_per_s > 0 and event.memory_bytes > 1 << 20
    assert steps[0].learning_rate == plan.rate(1) and steps[-1].eta_s == 0 and steps[0].eta_s > 0
    assert steps[-1].epoch == 3.5
    assert outcome.steps == outcome.of == 7 and not outcome.stopped
    assert outcome.losses == tuple((e.step, e.loss) for e in steps)
    assert outcome.dev == tuple((e.step, e.dev_loss) for e in events if e.kind == "dev")
    batches = Batches([len(row.ids) for row in rows], 5, plan.seed)
    assert outcome.tokens == sum(len(rows[row].ids) for step in range(7) for row in batches[step])
    best = min(outcome.dev, key=lambda pair: pair[1])[0]
    assert outcome.best == tmp_path / f"checkpoint-{best}" and outcome.last == tmp_path / "checkpoint-7"
    ids, labels = collate(make_rows("v2", 3, seed=9), PAD)
    mean = float(trainee.loss(ids, labels)) / int((labels[:, 1:] != -100).sum())
    assert outcome.dev[-1][1] == pytest.approx(mean, rel=1e-6)
    json.dumps([event.to_json() for event in events])


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(loop._Run, "_dev_loss", lambda self: next(values))
    plan = make_plan(max_steps=5, save_steps=1, save_total=2)
    outcome, _ = trained(plan, tmp_path, dev=make_rows("v2", 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    ]
    assert outcome.best == tmp_path / "checkpoint-2" and outcome.dev_loss == 1.0


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    trained(make_plan(max_steps=1), tmp_path)
    with pytest.raises(GLMError, match="already holds checkpoint-1"):
        trained(make_plan(max_steps=1), tmp_path)


def test_a_stop_leaves_a_checkpoint_that_goes_on(tmp_path):
    events: list[Event] = []
    stopped, _ = trained(
        make_plan(max_steps=6),
        tmp_path,
        on_event=events.append,
        stop=lambda: "pause" if len(events) >= 2 else "",
    )
    assert stopped.stopped and stopped.steps == 2 and events[-1].kind == "stopped"
    finished, _ = trained(make_plan(max_steps=6), tmp_path, resume=True)
    assert not finished.stopped and finished.steps == 6 and len(finished.losses) == 6
    assert finished.losses[:2] == stopped.losses


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("name", "precision", "generation"),
    [
        ("prefix", "fp32", "v1"),
        ("prefix", "int4", "v2"),
        ("lora", "fp32", "v2"),
        ("lora", "int8", "v1"),
        ("freeze", "bf16", "v3"),
        ("full", "fp32", "v1"),
        ("full", "bf16", "v2"),
        ("full", "fp16", "v2"),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(name, precision, generation, tmp_path):
    plan = make_plan(
        name, precision=precision, max_steps=9, save_steps=4, learning_rate=5e-3, accumulation=2, batch_size=5,
        schedule="cosine", warmup_steps=3, weight_decay=0.1,
    )  # fmt: skip
    dev = make_rows(generation, 4, seed=8)
    whole, first = trained(plan, tmp_path / "whole", generation, dev=dev)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    resumed, second = trained(plan, tmp_path / "part", generation, dev=dev, resume=True)
    assert resumed.losses == whole.losses  # bit for bit, on one machine
    assert resumed.dev == whole.dev and resumed.tokens == whole.tokens and resumed.skipped == whole.skipped
    for key, parameter in first.parameters.items():
        assert torch.equal(second.parameters[key], parameter), key


def test_what_only_concerns_files_may_change_at_a_resume_and_nothing_else(tmp_path):
    plan = make_plan(max_steps=4, save_steps=2)
    trained(plan, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for change, said in (
        (replace(plan, learning_rate=2e-3), r"learning_rate=0\.001, the plan says 0\.002"),
        (replace(plan, seed=1), "seed=42, the plan says 1"),
        (replace(plan, method=Method("lora", lora_rank=4)), "method=.*lora_rank"),
    ):
        with pytest.raises(GLMError, match=said):
            trained(change, tmp_path, resume=True)
    with pytest.raises(GLMError, match="trained on other rows"):
        trained(plan, tmp_path, rows=make_rows("v2", 24, seed=2), resume=True)
    outcome, _ = trained(replace(plan, save_steps=1, logging_steps=3), tmp_path, resume=True)
    assert outcome.steps == 4 and state.step_of(outcome.last) == 4


def test_a_damaged_checkpoint_is_named(tmp_path):
    plan = make_plan(max_steps=4, save_steps=2)
    trained(plan, tmp_path)
    tensors = tmp_path / "checkpoint-4" / state.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(GLMError, match=r"trainer\.pt cannot be read"):
        trained(plan, tmp_path, resume=True)
    (tmp_path / "checkpoint-4" / state.STATE).write_text("{")
    with pytest.raises(GLMError, match="checkpoint-4 is no checkpoint to resume from"):
        trained(plan, tmp_path, resume=True)


def run_child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs code after the imports of a training."""
    head = """
        import sys
        from pathlib import Path
        from tests.test_training import *
        """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *arguments],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


KILLED = make_plan("full", max_steps=40, save_steps=1, schedule="linear", save_total=2)


def test_a_killed_training_goes_on_where_its_last_checkpoint_is(tmp_path):
    """Killed at an arbitrary moment; nearly all of the time is spent writing checkpoints."""
    child = run_child(
        """
        def tell(event):
            print(event.kind, event.step, flush=True)
        trained(KILLED, Path(sys.argv[1]), on_event=tell)
        """,
        str(tmp_path / "killed"),
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 6"):
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    saved = state.latest(tmp_path / "killed")
    assert saved is not None and saved.step >= 5
    before = torch.get_num_threads()
    resumed, _ = trained(KILLED, tmp_path / "killed", resume=True)
    whole, _ = trained(KILLED, tmp_path / "whole")
    assert [step for step, _ in resumed.losses] == list(range(1, 41))
    for (_, ours), (_, theirs) in zip(resumed.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["checkpoint-39", "checkpoint-40"]
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------ accidents


def break_at(trainee: Trainee, calls: int, value: float) -> None:
    """Let the model's last hidden states become useless from this forward pass on."""
    seen = []

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if trainee.model.training:
            seen.append(1)
        return output * value if len(seen) >= calls and trainee.model.training else output

    norm = trainee.loaded.model.base_model.norm
    norm.register_forward_hook(spoil)


@pytest.mark.parametrize("name", ["prefix", "lora", "freeze", "full"])
def test_a_loss_that_is_no_number_stops_the_training_and_spares_the_weights(name, tmp_path):
    plan = make_plan(name, save_steps=2, max_steps=10)
    trainee = attach(load_tiny("v2"), plan.method)
    break_at(trainee, 5, float("nan"))
    events: list[Event] = []
    with pytest.raises(
        TrainingError, match=r"The loss became NaN at step 5 \(learning rate 0\.001\)"
    ) as caught:
        train(trainee, make_rows("v2", 24), (), plan, tmp_path, PAD, events.append)
    assert caught.value.step == 5
    assert events[-1].step == 4
    assert all(bool(parameter.isfinite().all()) for parameter in trainee.parameters.values())
    other = attach(load_tiny("v2"), plan.method)
    other.load(tmp_path / "checkpoint-4")
    assert all(torch.equal(other.parameters[key], p) for key, p in trainee.parameters.items())


def test_a_gradient_that_is_no_number_stops_the_training(tmp_path):
    plan = make_plan(max_steps=5)
    trainee = attach(load_tiny("v2"), plan.method)
    count = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return gradient * math.inf if len(count) == 3 else gradient

    next(iter(trainee.parameters.values())).register_hook(spoil)
    with pytest.raises(TrainingError, match=r"A gradient became (NaN|infinite) at step 3"):
        train(trainee, make_rows("v2", 24), (), plan, tmp_path, PAD)
    assert all(bool(parameter.isfinite().all()) for parameter in trainee.parameters.values())


def test_a_loss_of_zero_stops_the_training(tmp_path, monkeypatch):
    plan = make_plan(max_steps=9, batch_size=8)
    trainee = attach(load_tiny("v2"), plan.method)
    real, calls = trainee.backward, []

    def backward(ids: Any, labels: Any, factor: Any) -> Any:
        calls.append(1)
        return real(ids, labels, factor) * (len(calls) in (1, 2, 4))  # steps 3 and 5, 6, 7 are zero

    monkeypatch.setattr(trainee, "backward", backward)
    with pytest.raises(TrainingError, match="exactly 0 for 3 steps up to step 7"):
        train(trainee, make_rows("v2", 8), (), plan, tmp_path, PAD)


def test_weights_that_no_gradient_reaches_are_reported(tmp_path):
    plan = make_plan("lora")
    trainee = attach(load_tiny("v2"), plan.method)
    for key, parameter in trainee.parameters.items():
        if "lora_A" in key:  # with B zero as well, no gradient passes either of them
            torch.nn.init.zeros_(parameter)
    with pytest.raises(TrainingError, match="No gradient reached a trained weight at step 1"):
        train(trainee, make_rows("v2", 8), (), plan, tmp_path, PAD)


def test_a_dev_loss_that_is_no_number_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "_dev_loss", lambda self: math.nan)
    with pytest.raises(TrainingError, match="The dev loss became NaN at step 2"):
        trained(make_plan(save_steps=2), tmp_path, dev=make_rows("v2", 2))
    assert not state.checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_checkpoint(name, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the same writes."""
    plan = make_plan(name, max_steps=4, save_steps=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tell(event: Event) -> None:
        if event.kind == "saved":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))

    try:
        with pytest.raises(GLMError, match=r"checkpoint-4 cannot be written: .+\. Free some disk space"):
            trained(plan, tmp_path / "run", on_event=tell)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    outcome, _ = trained(plan, tmp_path / "run", resume=True)
    assert outcome.steps == 4


def test_too_little_disk_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(state.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(GLMError, match="about 1 MB are needed, 0 MB are free"):
        trained(make_plan(max_steps=1), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_says_which_settings_need_less(error, tmp_path, monkeypatch):
    plan = make_plan(batch_size=6, accumulation=2)
    trainee = attach(load_tiny("v2"), plan.method)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(trainee, "backward", fail)
    with pytest.raises(
        GLMError, match=r"at step 1, with 6 rows .*batch_size 3 and accumulation 4, gradient checkpointing"
    ):
        train(trainee, make_rows("v2", 24), (), plan, tmp_path, PAD)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    plan = make_plan()
    trainee = attach(load_tiny("v2"), plan.method)
    monkeypatch.setattr(trainee, "backward", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train(trainee, make_rows("v2", 24), (), plan, tmp_path, PAD)


# ------------------------------------------------------------------------------------------------ several processes


def test_two_processes_train_as_one_with_twice_the_accumulation(tmp_path):
    import socket

    plan = make_plan("prefix", accumulation=2, max_steps=5, save_steps=3, dropout=False, learning_rate=1e-2)
    alone, _ = trained(plan, tmp_path / "alone", dev=make_rows("v2", 7, seed=5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = """
        plan = make_plan("prefix", accumulation=1, max_steps=5, save_steps=3, dropout=False, learning_rate=1e-2)
        outcome, _ = trained(plan, Path(sys.argv[1]), dev=make_rows("v2", 7, seed=5))
        print(json.dumps([outcome.losses, outcome.dev]))
        """
    children = [
        run_child(
            code, str(tmp_path / "two"), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true",
        )
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        output, _ = child.communicate(timeout=200)
        assert child.returncode == 0, output
        losses, dev = json.loads(output.splitlines()[-1])
        for ours, theirs in ((losses, alone.losses), (dev, alone.dev)):
            assert [step for step, _ in ours] == [step for step, _ in theirs]
            assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)
    assert [path.name for path in state.checkpoints(tmp_path / "two")] == ["checkpoint-3", "checkpoint-5"]


def test_a_trained_checkpoint_is_a_checkpoint_for_everything_else(tiny_checkpoint, tmp_path):
    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    for name in ("prefix", "lora", "full"):
        plan = make_plan(name, max_steps=2)
        trainee = attach(loaded, plan.method)
        outcome = train(trainee, make_rows("v2", 4), (), plan, tmp_path / name, loaded.tokenizer.pad_id)
        trainee.detach()
        info = checkpoints.inspect(outcome.last)
        assert info.loadable and info.method == {"prefix": "p-tuning-v2", "full": ""}.get(name, name)
        assert checkpoints.load(outcome.last, "fp32", "cpu").report.unused == ()
