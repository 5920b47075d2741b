"""What each method trains, computes and writes, on the small models of tests/golden."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm_core import adapters, checkpoints
from glm_core.checkpoints import LoadedModel, inspect, read_config
from glm_core.checkpoints.loading import empty_model, fill
from glm_core.errors import GLMError
from glm_core.finetune import methods
from glm_core.finetune.loop import collate
from glm_core.finetune.methods import LoraTrainee, Method, Trainee, attach
from tests.conftest import GOLDEN

GENERATIONS = ("v1", "v2", "v3")
METHODS = {
    "prefix": Method("p-tuning-v2", prefix_length=8),
    "projected prefix": Method("p-tuning-v2", prefix_length=8, prefix_projection=True),
    "lora": Method("lora"),
    "freeze": Method("freeze", freeze_layers=2),
    "freeze layers": Method("freeze", freeze_layers=1, freeze_what="layer"),
    "full": Method("full"),
}
ADAPTERS = ("prefix", "projected prefix", "lora")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Row:
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def load_tiny(generation: str, precision: str = "fp32") -> LoadedModel:
    """A small reference model without its tokenizer, which training does not need."""
    folder = GOLDEN / generation / "tiny"
    info = replace(inspect(folder), problems=())
    model = empty_model(info.architecture, read_config(folder), info.generation)
    bits = {"int8": 8, "int4": 4}.get(precision, 0)
    report = fill(model, [folder / "model.safetensors"], DTYPES.get(precision, torch.bfloat16), bits)
    assert not report.missing
    model.eval().requires_grad_(False)
    tokenizer: Any = None
    return LoadedModel(model, tokenizer, info, precision, torch.device("cpu"), 0.0)


def make_rows(generation: str, count: int, seed: int = 1, longest: int = 14) -> list[Row]:
    """Rows of random tokens, with the special tokens where the generation has them; the answer counts."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [chance.randrange(20, 140) for _ in range(chance.randint(2, longest))]
        answer = [chance.randrange(20, 140) for _ in range(chance.randint(1, 4))]
        if generation == "v1":
            ids = [*prompt, 151, 154, *answer, 155]
            start = len(prompt) + 1  # <sop> itself is a target, as in the released scripts
        else:
            ids = [*prompt, *answer, 2]
            start = len(prompt)
        rows.append(Row(tuple(ids), tuple([-100] * start + ids[start:])))
    return rows


def gradients_of(trainee: Trainee, rows: list[Row], own: bool) -> tuple[float, list[torch.Tensor]]:
    """Mean loss and gradients by the model's own forward, or by what the training loop uses."""
    ids, labels = collate(rows, 3)
    counted = int((labels[:, 1:] != -100).sum())
    for parameter in trainee.parameters.values():
        parameter.grad = None
    if own:
        with trainee.computing():
            loss = trainee.model(input_ids=ids, labels=labels).loss
        loss.backward()
    else:
        loss = trainee.backward(ids, labels, 1 / counted) / counted
    return float(loss.detach()), [p.grad.clone() for p in trainee.parameters.values() if p.grad is not None]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_equal_those_of_the_whole_logits(generation, name, monkeypatch):
    trainee = attach(load_tiny(generation), METHODS[name])
    trainee.training(dropout=False)
    if name == "lora":  # B starts as zero, and would keep A's gradients at zero
        for key, parameter in trainee.parameters.items():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05)
    rows = make_rows(generation, 24)
    theirs, wanted = gradients_of(trainee, rows, own=True)
    for budget in (1 << 23, 64):  # all rows in one part; parts of 64 rows
        monkeypatch.setitem(methods.LOGITS_AT_A_TIME, "cpu", budget)
        ours, found = gradients_of(trainee, rows, own=False)
        assert ours == pytest.approx(theirs, rel=1e-6)  # sums of fp32 in another order
        assert len(found) == len(wanted) == len(trainee.parameters)
        for mine, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, want, atol=2e-6, rtol=1e-4)
    ids, labels = collate(rows, 3)
    counted = int((labels[:, 1:] != -100).sum())
    assert float(trainee.loss(ids, labels)) / counted == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", METHODS)
def test_trained_weights_are_fp32_over_every_base(name, precision):
    loaded = load_tiny("v2", precision)
    if precision.startswith("int") and name not in ADAPTERS:
        with pytest.raises(GLMError, match="INT8/INT4 codes"):
            attach(loaded, METHODS[name])
        return
    trainee = attach(loaded, METHODS[name])
    assert {p.dtype for p in trainee.parameters.values()} == {torch.float32}
    others = [p for p in loaded.model.parameters() if not any(p is t for t in trainee.parameters.values())]
    assert not any(p.requires_grad for p in others)
    trainee.training()
    loss, found = gradients_of(trainee, make_rows("v2", 4), own=False)
    assert 3 < loss < 12 and len(found) == len(trainee.parameters)
    assert any(bool(gradient.any()) for gradient in found)
    assert trainee.scaled == (precision == "fp16")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("prefix", 8 * 192),  # 8 columns; 3 layers x 2 x 2 groups x 16
        ("projected prefix", 8 * 192 + (192 * 64 + 64) + (64 * 192 + 192)),
        ("lora", 3 * (3 * 8 * 64 + 8 * (64 + 32 + 32))),
        ("freeze", 2 * (64 * 192 + 96 * 64)),
        ("full", 113_472),
    ],
)
def test_how_many_numbers_are_trained(name, count):
    assert attach(load_tiny("v2"), METHODS[name]).trainable_count == count


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_loads_into_another_trainee(generation, name, tmp_path):
    trainee = attach(load_tiny(generation), METHODS[name], seed=1)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    trainee.evaluating()
    trainee.save(tmp_path / "saved")
    other = attach(load_tiny(generation), METHODS[name], seed=2)
    other.load(tmp_path / "saved")
    other.evaluating()
    for key, parameter in trainee.parameters.items():
        assert torch.equal(other.parameters[key], parameter), key
    ids, labels = collate(make_rows(generation, 3), 3)
    assert float(other.loss(ids, labels)) == float(trainee.loss(ids, labels))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_adapters_are_in_the_released_layouts(generation, tmp_path):
    for name in ADAPTERS:
        trainee = attach(load_tiny(generation), METHODS[name], base="the base")
        trainee.save(tmp_path / name)
        info = adapters.inspect_adapter(tmp_path / name)
        assert info is not None and not info.problems and info.parameters == trainee.trainable_count
        assert info.base == "the base" and info.projection == (name == "projected prefix")
        info.check_base(read_config(GOLDEN / generation / "tiny"), "tiny")


@pytest.mark.parametrize("targets", [("query_key_value",), ("query_key_value", "dense_4h_to_h")])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_lora_for_the_released_code_computes_the_same(generation, targets, tmp_path):
    trainee = attach(load_tiny(generation), Method("lora", lora_targets=targets))
    assert isinstance(trainee, LoraTrainee)
    for parameter in trainee.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    trainee.evaluating()
    ids, _ = collate(make_rows(generation, 2), 3)
    trainee.save_released(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    layers = trainee.loaded.info.layers
    assert len(stored) == 2 * layers * len(targets) and not any("_proj" in name for name in stored)
    other = load_tiny(generation).model
    report = adapters.load_lora(other, tmp_path / "saved")
    assert report.converted == (generation != "v1")
    theirs, ours = trainee.model(ids).logits, other(ids).logits
    assert (theirs - load_tiny(generation).model(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("name", "precision"), [("full", "fp32"), ("full", "bf16"), ("freeze", "bf16")])
def test_trained_weights_are_a_whole_checkpoint_of_the_same_names(generation, name, precision, tmp_path):
    trainee = attach(load_tiny(generation, precision), METHODS[name])
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(1e-3)
    trainee.save(tmp_path / "saved")
    theirs = load_file(GOLDEN / generation / "tiny" / "model.safetensors")
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    left_out = {key for key in theirs if key.endswith("inv_freq")}
    assert ours.keys() == theirs.keys() - left_out
    assert {t.dtype for t in ours.values()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    changed = {key for key in ours if not torch.equal(ours[key], theirs[key].to(ours[key].dtype))}
    mlps = {key for key in ours if ".mlp." in key and ".layers.0." not in key}
    if name == "full":
        assert mlps < changed
    else:
        last = [f".layers.{layer}." for layer in range(trainee.loaded.info.layers)][-2:]
        assert changed and all(".mlp." in key and any(part in key for part in last) for key in changed)
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]


def test_rounded_checkpoints_keep_the_exact_weights_beside_them(tmp_path):
    trainee = attach(load_tiny("v2", "bf16"), METHODS["full"])
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(1e-5)  # less than bf16 resolves
    trainee.save(tmp_path / "rounded")
    trainee.save(tmp_path / "exact", exact=True)
    other = attach(load_tiny("v2", "bf16"), METHODS["full"])
    key = "model.layers.0.mlp.down_proj.weight"
    other.load(tmp_path / "rounded")
    assert not torch.equal(other.parameters[key], trainee.parameters[key])
    other.load(tmp_path / "exact")
    assert torch.equal(other.parameters[key], trainee.parameters[key])


@pytest.mark.parametrize("name", METHODS)
def test_after_the_end_an_adapter_is_off_and_trained_weights_stay(name):
    loaded = load_tiny("v3", "bf16")
    ids, _ = collate(make_rows("v3", 2), 3)
    before = loaded.model(ids).logits
    trainee = attach(loaded, METHODS[name])
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.1)
    trainee.detach()
    after = loaded.model(ids).logits
    assert torch.equal(after, before) == (name in ADAPTERS)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    attach(loaded, METHODS["lora"])  # nothing is left in the way of another method


def test_a_base_that_the_model_computes_otherwise_than_its_precision_says():
    loaded = load_tiny("v2", "bf16")
    attach(loaded, METHODS["lora"], "fp32")
    assert loaded.model.dtype == torch.float32
    trainee = attach(load_tiny("v2", "fp32"), METHODS["lora"], "bf16")
    ids, _ = collate(make_rows("v2", 1), 3)
    with trainee.computing():
        assert trainee.model(ids).logits.dtype == torch.bfloat16
    with pytest.raises(GLMError, match="loaded in fp16 and cannot be trained in bf16"):
        attach(load_tiny("v2", "fp16"), METHODS["lora"], "bf16")
    with pytest.raises(GLMError, match="cannot be trained in int4"):
        attach(load_tiny("v2", "fp32"), METHODS["lora"], "int4")


def test_the_first_weights_follow_from_the_seed_and_leave_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (attach(load_tiny("v2"), METHODS["lora"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    key = next(key for key in first.parameters if "lora_A" in key)
    assert torch.equal(first.parameters[key], second.parameters[key])
    assert not torch.equal(first.parameters[key], third.parameters[key])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Method("p-tuning-v2", prefix_length=0), "prefix_length is 0"),
        (Method("lora", lora_rank=0), "lora_rank is 0"),
        (Method("lora", lora_dropout=1.0), "lora_dropout is 1.0"),
        (Method("lora", lora_targets=("conv",)), "no linear layer named conv"),
        (Method("freeze", freeze_layers=4), "freeze_layers is 4; the model has 3 layers"),
        (Method("freeze", freeze_what="head"), "freeze_what is 'head'"),  # type: ignore[arg-type]
        (Method("qlora"), "Method 'qlora' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_fit_are_refused(method, said):
    with pytest.raises(GLMError, match=said):
        attach(load_tiny("v2"), method)


def test_a_model_with_an_adapter_is_refused(tmp_path):
    loaded = load_tiny("v2")
    attach(loaded, METHODS["lora"])
    with pytest.raises(GLMError, match="carries an adapter already"):
        attach(loaded, METHODS["prefix"])


def test_files_of_another_training_are_refused(tmp_path):
    attach(load_tiny("v2"), Method("lora", lora_rank=4)).save(tmp_path / "lora")
    with pytest.raises(GLMError, match=r"has \[4, 64\] as .*lora_A.* needs \[8, 64\]"):
        attach(load_tiny("v2"), METHODS["lora"]).load(tmp_path / "lora")
    other = attach(load_tiny("v2"), Method("lora", lora_targets=("dense_4h_to_h",)))
    with pytest.raises(GLMError, match="has no .*down_proj"):
        other.load(tmp_path / "lora")


def test_a_method_survives_json():
    for method in METHODS.values():
        assert Method.from_json(json.loads(json.dumps(method.to_json())) | {"later": 1}) == method


def test_a_saved_adapter_and_a_saved_model_answer_as_the_trained_one(tiny_checkpoint: Path, tmp_path):
    for name in ("prefix", "lora", "full"):
        loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
        ids = torch.tensor([loaded.tokenizer.encode("你好，今天")])
        trainee = attach(loaded, METHODS[name])
        with torch.no_grad():
            for parameter in trainee.parameters.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        trainee.evaluating()
        expected = trainee.model(input_ids=ids).logits
        trainee.save(tmp_path / name)
        again = checkpoints.load(tmp_path / name, "fp32", "cpu")  # finds its base by itself
        model = adapters.PrefixModel(again.model, again.prefix).eval() if again.prefix else again.model
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scaling", "whole"), [(1.0, False), (4.0, True)])
@pytest.mark.parametrize("name", ["lora", "full", "freeze"])
def test_a_model_whose_logits_are_more_than_the_heads_product(name, scaling, whole):
    """Granite divides its logits; without that its head is as any other's."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(3)
    config = GraniteConfig(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=scaling, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    loaded = load_tiny("v2")
    loaded.model = GraniteForCausalLM(config).eval().requires_grad_(False)
    loaded.info = replace(loaded.info, architecture="granite", family="Granite")
    method = Method("lora", lora_targets=("q_proj", "down_proj")) if name == "lora" else METHODS[name]
    trainee = attach(loaded, method)
    assert trainee._whole == whole
    trainee.training(dropout=False)
    rows = make_rows("v2", 12)
    theirs, wanted = gradients_of(trainee, rows, own=True)
    ours, found = gradients_of(trainee, rows, own=False)
    assert ours == pytest.approx(theirs, rel=1e-6)
    for mine, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, want, atol=2e-6, rtol=1e-4)
    with pytest.raises(GLMError, match="P-tuning v2 is for .*Granite"):
        loaded = replace(loaded, model=GraniteForCausalLM(config).eval())
        attach(loaded, METHODS["prefix"])
