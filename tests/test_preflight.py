"""What is said before a training: its size against what it then takes, all that stands in its way, its speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glm_core import checkpoints, devices
from glm_core.errors import GLMError
from glm_core.finetune import preflight, state
from glm_core.finetune.adapt import Adapt
from glm_core.finetune.loop import MULTIPLE, Plan
from glm_core.finetune.methods import Method, attach
from glm_core.finetune.work import FinetuneTask
from glm_core.settings import MINI

METHODS = [
    Method("lora"),
    Method("lora", lora_rank=4, lora_targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    Method("p-tuning-v2", prefix_length=16),
    Method("p-tuning-v2", prefix_length=16, prefix_projection=True),
    Method("freeze", freeze_layers=1),
    Method("freeze", freeze_layers=2, freeze_what="layer"),
    Method("full"),
]
ROWS = [{"content": f"{i} 这个多少钱呢", "summary": "正常"} for i in range(11)]
ROWS.append({"content": "加微信领红包" * 3, "summary": "垃圾"})


@pytest.fixture
def task(tmp_path, tiny_checkpoint):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(method=METHODS[0], checkpoint=tiny_checkpoint, **changes):
        plan = Plan(method, "fp32", 1e-3, 2, 1, 20, save_steps=5)
        own = {name: changes.pop(name) for name in tuple(changes) if hasattr(plan, name)}
        base = FinetuneTask(str(checkpoint), replace(plan, **own), str(file), str(tmp_path / "out"))
        return replace(base, **changes)

    return make


def said(prediction):
    return [problem.message for problem in prediction.stops]


def kept_bytes(trainee, rows, columns):
    """Bytes that a forward pass keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in trainee.model.parameters()}
    found = {}
    held = []  # or an address would be used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 5000, (rows, columns), generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainee.computing():
        kept = trainee._hidden(ids, ids.clone())
    assert kept[0].requires_grad
    return sum(found.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.freeze_what}")
def test_as_many_numbers_are_trained_as_predicted(task, tiny_checkpoint, method):
    trainee = attach(checkpoints.load(tiny_checkpoint, "fp32", "cpu"), method)
    found = preflight.predict(task(method))
    assert said(found) == []
    assert found.trainable == trainee.trainable_count
    assert found.memory_parts["weights"] == 4 * sum(
        p.numel() for p in checkpoints.load(tiny_checkpoint, "fp32", "cpu").model.parameters()
    )
    assert found.memory_parts["gradients"] * 2 == found.memory_parts["optimiser"] == 8 * found.trainable


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        (METHODS[0], "fp32"),
        (METHODS[0], "bf16"),
        (METHODS[2], "fp32"),
        (Method("freeze", freeze_layers=2), "fp32"),
        (METHODS[6], "fp32"),
        (METHODS[6], "bf16"),
    ],
    ids=lambda one: getattr(one, "kind", one),
)
def test_the_activations_are_those_that_the_layers_keep(task, method, precision):
    """Of glm-mini: of a model as small as the other one, nearly all is left out of the formula."""
    rows, columns = 2, 64
    loaded = checkpoints.load(MINI, precision, "cpu")
    trainee = attach(loaded, method, precision)
    trainee.training()
    measured = kept_bytes(trainee, rows, columns)
    what = task(
        method,
        MINI,
        precision=precision,
        batch_size=rows,
        max_source=columns // 2,
        max_target=columns // 2 - 1,
    )
    parts = preflight.predict(what).memory_parts
    # Not kept, but in memory for a moment while one layer is worked on backwards.
    moment = rows * columns * (3 * 768 * (4 if precision == "fp32" else 2) + 6 * 320 * 4)
    predicted = parts["activations"] - moment
    if method.kind == "full" and precision == "bf16":
        measured -= 2 * sum(  # autocast's copies of the weights, which are counted with the weights
            module.weight.numel()
            for module in loaded.model.base_model.modules()
            if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
        )
    assert 0.9 <= predicted / measured <= 1.3


def test_longer_rows_and_more_of_them_take_more_and_checkpointing_less(task):
    def activations(**changes):
        return preflight.predict(task(checkpoint=MINI, **changes)).memory_parts["activations"]

    plain = activations(max_source=100, max_target=99)
    assert activations(max_source=200, max_target=199) == pytest.approx(2 * plain, rel=0.02)
    assert activations(max_source=100, max_target=99, batch_size=4) == pytest.approx(2 * plain, rel=0.02)
    assert activations(max_source=100, max_target=99, checkpointing=True) < 0.5 * plain


def test_known_lengths_count_instead_of_the_limits(task):
    limits = task(max_source=900, max_target=900)
    short = preflight.predict(limits, longest=24, counted=8)
    assert short.memory_parts["activations"] < 0.02 * preflight.predict(limits).memory_parts["activations"]
    same = preflight.predict(task(max_source=16, max_target=7), counted=8)
    assert short.memory_parts == same.memory_parts and 24 % MULTIPLE == 0


def test_the_checkpoints_of_a_step_are_as_large_as_the_disk_is_asked_for(task, tmp_path, tiny_checkpoint):
    for method in (Method("full"), Method("p-tuning-v2", prefix_length=64)):
        what = task(method, max_steps=5, save_steps=5, save_total=1)
        trainee = attach(checkpoints.load(tiny_checkpoint, "fp32", "cpu"), method)
        found = preflight.predict(what).disk_bytes
        # One checkpoint is kept and one is being written.
        assert found == pytest.approx(2 * state.size_of(trainee), rel=0.05)


def test_what_is_read_beforehand_takes_its_part(task, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\na\n", encoding="utf-8")
    plain = preflight.predict(task(max_source=16, max_target=7))
    longer = preflight.predict(
        task(max_source=16, max_target=7, adapt=Adapt(str(texts), "text", length=128, compare=True))
    )
    assert longer.memory_parts["activations"] > 4 * plain.memory_parts["activations"]
    assert longer.disk_bytes > 2 * plain.disk_bytes


def test_everything_that_stands_in_the_way_is_said_at_once(task, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("x", encoding="utf-8")
    what = task(
        Method("full"), precision="int8", batch_size=0, max_source=3000, device="cuda:9",
        dev_file=str(tmp_path / "gone.csv"), general_share=0.5, general_file=str(tmp_path / "lost.jsonl"),
    )  # fmt: skip
    found = said(preflight.predict(what))
    wanted = [
        "batch_size is 0.", f"There is no file {tmp_path / 'gone.csv'}.", f"There is no file {tmp_path / 'lost.jsonl'}.",
        f"The output folder {output} is in use.", "There is no device cuda:9",
        "The weights are INT8/INT4 codes, which full fine-tuning cannot change.",
        "3,000 tokens of a prompt and 64 of an answer do not fit into the model's context of 2,048.",
    ]  # fmt: skip
    assert len(found) == len(wanted)
    assert all(any(one.startswith(start) for one in found) for start in wanted)


def test_too_little_memory_is_refused_with_both_numbers_and_freed_memory_counts(task, monkeypatch):
    need = preflight.predict(task()).memory_bytes
    monkeypatch.setattr(devices, "free_bytes", lambda device: need // 2)
    found = preflight.predict(task())
    size = f"{need / 2**20:.0f} MiB", f"{(need // 2) / 2**20:.0f} MiB"
    assert any(size[0] in one and size[1] in one for one in said(found))
    assert said(preflight.predict(task(), freed_bytes=2 * need)) == []
    tight = preflight.predict(task(), freed_bytes=need // 2 + need // 20)
    assert said(tight) == [] and [one.severity for one in tight.problems] == ["warn"]


def test_too_little_disk_is_refused(task, monkeypatch):
    usage = preflight.shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert any(one.startswith("The checkpoints need about") for one in said(preflight.predict(task())))


@pytest.mark.parametrize(
    ("method", "start"),
    [
        (Method("lora", lora_targets=("nowhere",)), "ChatGLM2ForCausalLM has no linear layer named nowhere."),
        (Method("freeze", freeze_layers=3), "freeze_layers is 3; the model has 2 layers."),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(task, method, start):
    assert said(preflight.predict(task(method)))[0] == start


def test_a_folder_that_cannot_be_loaded_is_a_problem_among_the_others(task, tmp_path, tiny_checkpoint):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((Path(tiny_checkpoint) / "config.json").read_bytes())
    found = said(preflight.predict(task(checkpoint=broken, dev_file="gone.csv")))
    assert any("cannot be loaded" in one for one in found) and "There is no file gone.csv." in found


def test_trial_steps_give_a_time_and_leave_nothing_behind(task, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    found = preflight.time_steps(task(max_source=32, max_target=8), steps=2)
    assert found.steps == 2 and found.seconds_per_step > 0
    assert found.eta_s == pytest.approx(20 * found.seconds_per_step)
    assert found.memory_bytes > 100 << 20  # torch alone takes as much
    assert 8 < found.longest <= 41
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_trial_steps_pass_on_what_stands_in_their_way_and_can_be_stopped(task):
    with pytest.raises(GLMError, match="freeze_layers is 3") as caught:
        preflight.time_steps(task(Method("freeze", freeze_layers=3)), steps=1)
    assert caught.value.todo == "Choose 1 to 2."
    with pytest.raises(GLMError, match="were stopped"):
        preflight.time_steps(task(), stop=lambda: True)


def test_trial_steps_that_die_are_explained():
    with pytest.raises(GLMError, match="signal 9"):
        preflight._timing(-9, "", "")
    with pytest.raises(GLMError, match="without a result: ValueError: bad"):
        preflight._timing(1, "", "Traceback\nValueError: bad\n\n")
