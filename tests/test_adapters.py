"""Prefixes and LoRA give the numbers of the released training scripts and of PEFT (tests/golden/README.md)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from glm_core import adapters, quantization
from glm_core.adapters import PREFIX, PrefixEncoder, PrefixModel
from glm_core.errors import GLMError
from glm_core.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from tests.conftest import GOLDEN, SHARED

# The reference differs from itself by up to 2.5e-5 between cached and uncached decoding, on logits of scale 7.
LOGITS = 5e-5
# One forward and backward differ only by the order of sums.
LOSS, GRADIENT = 1e-5, 2e-6
# AdamW divides by the root of a squared gradient, so rounding grows: 2.2e-4 between two correct implementations.
AFTER_STEPS = 1e-3


def folder_of(name: str) -> Path:
    """A golden folder, from the copy in the repository or, where it is too large for that, from the shared data."""
    path = GOLDEN / name
    if "real" not in name:
        return path
    shared = SHARED / "golden" / name
    if not shared.exists():
        pytest.skip(f"golden/{name} is not on this machine")
    return shared


def load_base(family: str, name: str = "tiny") -> Any:
    folder = folder_of(f"{family}/{name}")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_class, model_class = (
        (ChatGLMConfig, ChatGLMForConditionalGeneration) if family == "v1" else (ChatGLM2Config, ChatGLM2ForCausalLM)
    )  # fmt: skip
    config = config_class.from_released(raw)
    return model_class.from_pretrained(str(folder), config=config, dtype=torch.float32).eval()


def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = folder_of(name)
    arrays = np.load(folder.with_suffix(".npz"))
    return {key: torch.tensor(arrays[key]) for key in arrays}, json.loads(
        folder.with_suffix(".json").read_text(encoding="utf-8")
    )


def near(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module", params=["v1-noproj", "v1-proj", "v2-noproj", "v2-proj"])
def case(request: pytest.FixtureRequest) -> tuple[str, Any, PrefixEncoder, dict[str, torch.Tensor]]:
    family, kind = request.param.split("-")
    base = load_base(family)
    folder = folder_of(f"{family}/ptuning_tiny_{kind}")
    return family, base, adapters.load_prefix(folder, base.config), read(f"{family}/ptuning_tiny_{kind}")[0]


# ------------------------------------------------------------------------------------------------ P-tuning v2


def test_the_prefix_equals_the_reference(case):
    _, _, encoder, arrays = case
    near(encoder(), arrays["prefix_encoder_output"], 1e-6)  # one matrix product of 64 terms
    for layer, pair in enumerate(encoder.keys_values(batch=3)):
        for ours, theirs in zip(pair, arrays["prefix_past_key_values"][layer], strict=True):
            near(ours, theirs.permute(1, 2, 0, 3).expand(3, -1, -1, -1), 1e-6)
    assert encoder.keys_values(1, torch.bfloat16)[0][0].dtype == torch.bfloat16


def inputs_of(family: str, arrays: dict[str, torch.Tensor], name: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of a golden forward, and which of its columns are real tokens."""
    ids = arrays[f"{name}/input_ids"]
    if f"{name}/attention_mask" not in arrays:
        return {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)
    mask, positions = arrays[f"{name}/attention_mask"], arrays[f"{name}/position_ids"]
    if (
        family == "v1"
    ):  # the released mask says what is hidden; a padding column is hidden from the last row too
        return {"input_ids": ids, "attention_mask": ~mask, "glm_position_ids": positions}, ~mask[:, 0, -1]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, mask.bool()


@pytest.mark.parametrize("name", ["single", "batch"])
def test_logits_behind_a_prefix_equal_the_reference(case, name):
    family, base, encoder, arrays = case
    inputs, real = inputs_of(family, arrays, name)
    model = PrefixModel(base, encoder).eval()
    with torch.inference_mode():
        given = model(**inputs).logits
        made = model(inputs["input_ids"], attention_mask=real.long()).logits  # masks and positions of its own
    theirs = arrays[f"{name}/logits"]
    for ours in (given, made):  # what the reference computes for padding is meaningless
        near(ours[real], theirs[real], LOGITS)


@pytest.mark.parametrize("name", ["single", "batch"])
def test_decoding_on_a_cache_that_begins_with_the_prefix(case, name):
    family, base, encoder, arrays = case
    inputs, real = inputs_of(family, arrays, name)
    ids = inputs["input_ids"]
    rows, prompt = ids.shape
    cache = DynamicCache(config=base.config)
    with torch.inference_mode():
        for layer, (keys, values) in enumerate(encoder.keys_values(rows)):
            cache.update(keys, values, layer)
        if family == "v1":
            ids = base.generate(
                ids,
                attention_mask=real.long(),
                past_key_values=cache,
                prefix_length=encoder.length,
                max_new_tokens=16,
                do_sample=False,
            )
        else:
            mask = torch.cat((torch.ones(rows, encoder.length, dtype=torch.long), real.long()), dim=1)
            new, positions = ids, (real.long().cumsum(1) - 1).clamp(min=0)
            for _ in range(16):
                out = base(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache)
                new, positions = out.logits[:, -1:].argmax(-1), positions[:, -1:] + 1
                ids, mask = torch.cat((ids, new), dim=1), torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
    assert ids.tolist() == arrays[f"{name}/generate"].tolist()
    if name == "single":
        held = encoder.length + prompt
        for ours, side in ((cache.layers[0].keys, "k"), (cache.layers[0].values, "v")):
            near(ours[:, :, :held].permute(2, 0, 1, 3), arrays[f"single/past_layer0_{side}"], LOGITS)


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["tiny_noproj", "tiny_proj", "real_noproj", "real_proj"])
def test_training_a_prefix_equals_the_reference(family, kind):
    base = load_base(family, kind.split("_")[0])
    folder = folder_of(f"{family}/ptuning_{kind}")
    arrays, record = read(f"{family}/ptuning_{kind}")
    model = PrefixModel(
        base, adapters.load_prefix(folder, base.config)
    ).eval()  # as recorded: without dropout
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inputs, _ = inputs_of(family, arrays, "train")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    losses = []
    for step in range(6):
        loss = model(**inputs, labels=arrays["train/labels"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in model.encoder.named_parameters():
                near(parameter.grad, arrays[f"grad0/{PREFIX}{name}"], GRADIENT)
        if step < 5:
            optimizer.step()
    theirs = record["losses_before_each_of_5_adamw_steps_and_after"]
    assert losses[0] == pytest.approx(theirs[0], abs=LOSS)
    assert losses == pytest.approx(theirs, abs=AFTER_STEPS)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_gradient_checkpointing_changes_no_gradient(family):
    base = load_base(family)
    arrays, _ = read(f"{family}/ptuning_tiny_proj")
    model = PrefixModel(base, adapters.load_prefix(folder_of(f"{family}/ptuning_tiny_proj"), base.config))
    model.train()
    model.encoder.eval()  # the dropout of two runs would differ
    inputs, _ = inputs_of(family, arrays, "train")
    gradients, runs = [], []
    for checkpointing in (False, True):
        if checkpointing:
            base.activation_checkpointing_enable()
            layer = next(module for module in base.modules() if hasattr(module, "_can_checkpoint_with_cache"))
            allowed = layer._can_checkpoint_with_cache
            layer._gradient_checkpointing_func = counting(layer._gradient_checkpointing_func, runs)
        model.zero_grad()
        model(**inputs, labels=arrays["train/labels"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.encoder.parameters()])
    assert runs, "the layer was not checkpointed"
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        near(checkpointed, plain, 1e-7)  # the same operations, twice
    assert layer._can_checkpoint_with_cache == allowed  # for other caches as before


def counting(function: Any, runs: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return function(*args, **kwargs)

    return counted


def test_dropout_only_in_training_and_different_for_every_row(case):
    encoder = PrefixEncoder(case[2].shape, 16)
    keys, _ = encoder.eval().keys_values(2)[0]
    assert torch.equal(keys[0], keys[1]) and keys.all()
    torch.manual_seed(3)
    keys = torch.stack([pair[0] for pair in encoder.train().keys_values(2)])
    assert not torch.equal(keys[:, 0], keys[:, 1])
    # 3 layers x 2 rows x 16 columns of at least 32 numbers: the standard deviation of the share is below 0.006.
    assert (keys == 0).float().mean().item() == pytest.approx(adapters.PREFIX_DROPOUT, abs=0.03)


@pytest.mark.parametrize("kind", ["noproj", "proj"])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_prefix_is_saved_as_it_was_read(family, kind, tmp_path):
    source = folder_of(f"{family}/ptuning_tiny_{kind}")
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = (ChatGLMConfig if family == "v1" else ChatGLM2Config).from_released(raw)
    theirs = torch.load(source / "pytorch_model.bin", weights_only=True)
    encoder = adapters.load_prefix(source, config)
    wrapped = torch.nn.ModuleList([encoder]).half()  # as when a model around it is cast
    assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.float32}
    base_config = {
        key: value for key, value in raw.items() if key not in ("pre_seq_len", "prefix_projection")
    }
    adapters.save_prefix(encoder, tmp_path, base_config)
    again = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert again.keys() == theirs.keys() and all(torch.equal(again[key], theirs[key]) for key in theirs)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == raw
    info = adapters.inspect_adapter(tmp_path)
    numbers = sum(tensor.numel() for tensor in theirs.values())
    assert info == adapters.AdapterInfo(
        "p-tuning-v2", prefix_length=8, projection=kind == "proj", base=raw["_name_or_path"], tensors=len(theirs),
        parameters=numbers, size_bytes=4 * numbers,
    )  # fmt: skip
    # Inside a whole checkpoint: one file, and shards of which only the one with the prefix is there.
    base = load_file(folder_of(f"{family}/tiny") / "model.safetensors")
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder in (whole, shards):
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
    save_file(base | theirs, whole / "model.safetensors")
    torch.save(theirs, shards / "b.bin")
    index = dict.fromkeys(base, "a.bin") | dict.fromkeys(theirs, "b.bin")
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for folder in (whole, shards):
        found = adapters.load_prefix(folder, config).released_state()
        assert all(torch.equal(found[key], theirs[key]) for key in theirs)
        assert adapters.inspect_adapter(folder) == replace(info, with_base=True)
    with pytest.raises(GLMError, match="no prefix among"):
        PrefixEncoder.from_state(base, config)


@pytest.mark.parametrize(
    ("changed", "recorded", "said"),
    [
        ({}, {"pre_seq_len": 9}, r"pre_seq_len=9, .* pre_seq_len=8"),
        ({}, {"prefix_projection": True}, "prefix_projection=True, .* prefix_projection=False"),
        (
            {"num_layers": 4},
            {},
            r"is \[8, 192\]; this base, .* needs \[8, 256\]\. .* 192 numbers, .* base 256",
        ),
        ({"kv_channels": 32}, {}, "192 numbers, one of the base 384"),
        (
            {"num_layers": 4},
            None,
            "trained on a ChatGLM2/3 of 3 layers, .*; this base is a ChatGLM2/3 of 4 layers",
        ),
        ({"hidden_size": 128}, None, "width 64 .*; this base is .* width 128"),
        (
            {"multi_query_group_num": 4},
            None,
            "and 2 key/value heads of 16; this base is .* and 4 key/value heads",
        ),
    ],
)
def test_a_prefix_of_another_base_is_refused(changed, recorded, said):
    folder = folder_of("v2/ptuning_tiny_noproj")
    base = json.loads((folder_of("v2/tiny") / "config.json").read_text(encoding="utf-8"))
    if recorded is None:
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ChatGLM2Config.from_released(base | changed)
    with pytest.raises(GLMError, match=said):
        PrefixEncoder.from_state(load_file(folder / "prefix.safetensors"), config, recorded)
    info = adapters.inspect_adapter(folder)
    assert info is not None
    info.check_base(base, "tiny")
    with pytest.raises(GLMError, match=said.replace("this base", "other")):
        replace(info, recorded=recorded).check_base(base | changed, "other")


def test_a_prefix_of_the_other_family_is_refused():
    raw = json.loads((folder_of("v1/tiny") / "config.json").read_text(encoding="utf-8"))
    config, folder = ChatGLMConfig.from_released(raw), folder_of("v2/ptuning_tiny_proj")
    with pytest.raises(GLMError, match="trained on a ChatGLM2/3 .*; this base is a ChatGLM-6B"):
        adapters.load_prefix(folder, config)
    with pytest.raises(
        GLMError, match=r"\[8, 192\]; .* needs \[8, 64\]\. .* 192 numbers, one of the base 384"
    ):
        PrefixEncoder.from_state(load_file(folder / "prefix.safetensors"), config)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_quantized_base_carries_both_kinds_of_adapter(family, bits, tmp_path):
    """Over INT8/INT4 codes everything is as over the float weights that the codes stand for."""
    folder = folder_of(f"{family}/ptuning_tiny_proj")
    arrays, _ = read(f"{family}/ptuning_tiny_proj")
    inputs, _ = inputs_of(family, arrays, "train")
    quantized = quantization.quantize(load_base(family), bits)
    expanded = quantization.dequantize_model(quantization.quantize(load_base(family), bits))
    results = []
    for base in (quantized, expanded):
        model = PrefixModel(base, adapters.load_prefix(folder, base.config)).eval()
        loss = model(**inputs, labels=arrays["train/labels"]).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.encoder.parameters())])
        torch.manual_seed(11)
        report = adapters.add_lora(base, targets=["query_key_value", "dense"])
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        loss = base(inputs["input_ids"], labels=arrays["train/labels"]).loss
        loss.backward()
        grads = [parameter.grad for parameter in base.parameters() if parameter.grad is not None]
        assert len(grads) == 2 * report.modules
        results[-1] += [loss, *grads]
    for ours, theirs in zip(*results, strict=True):
        assert theirs.any()
        near(ours, theirs.detach(), 1e-5)  # scales are multiplied after the sum instead of before it
    adapters.save_lora(quantized, tmp_path / "saved")
    with pytest.raises(GLMError, match="weights are quantized"):
        adapters.merge_lora(quantized)
    adapted = quantized(inputs["input_ids"]).logits
    adapters.unload_lora(quantized)
    assert not torch.equal(quantized(inputs["input_ids"]).logits, adapted)
    adapters.load_lora(quantized, tmp_path / "saved")
    assert torch.equal(quantized(inputs["input_ids"]).logits, adapted)


# ------------------------------------------------------------------------------------------------ LoRA


def load_only(model: Any, folder: Path, file: str, name: str = "default") -> adapters.LoraReport:
    """Load an adapter from one of the two weight files of a golden folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as alone:
        for part in ("adapter_config.json", file):
            shutil.copy(folder / part, alone)
        return adapters.load_lora(model, alone, name)


def test_lora_equals_the_reference():
    arrays, record = read("v1/lora_tiny")
    ids = arrays["single_gmask/input_ids"]
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        model = load_base("v1")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        base = model(ids).logits
        folder = folder_of("v1/lora_tiny")
        report = load_only(model, folder, file)
        assert report == adapters.LoraReport(
            "default", 8, 32.0, ("query_key_value",), 3, 3 * (8 * 64 + 192 * 8), "v1/tiny", False, False, ()
        )
        adapted = model(ids).logits
        near(adapted, arrays["single_gmask/logits"], LOGITS)
        moved = (adapted - base).abs().max().item()
        assert moved == pytest.approx(record["max_abs_logit_change_from_adapter"], abs=LOGITS)
        adapters.use_lora(model, None)
        assert torch.equal(model(ids).logits, base)
        adapters.use_lora(model, "default")
        assert torch.equal(model(ids).logits, adapted)
    adapters.unload_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("tiny", ["default"]), ("real", ["default", "legacy", "default_single_example"])],
)
def test_training_a_lora_equals_the_reference(kind, cases):
    arrays, record = read(f"v1/lora_{kind}")
    model = load_base("v1", kind)
    adapters.load_lora(model, folder_of(f"v1/lora_{kind}"), trainable=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"base_model.model.{name}" for name in trained} == set(record["grad_norms"]["default"])
    for name in cases:
        inputs, _ = inputs_of("v1", arrays, f"batch_{name}")
        out = model(**inputs, labels=arrays[f"batch_{name}/labels"])
        assert out.loss.item() == pytest.approx(record["loss"][name], abs=LOSS)
        model.zero_grad()
        out.loss.backward()
        for key, parameter in trained.items():
            norm = record["grad_norms"][name][f"base_model.model.{key}"]
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-5)  # fp32 sums of 512 squares
            if name == "default":
                near(parameter.grad, arrays[f"grad0/base_model.model.{key}"], GRADIENT)
    if "train/logits" in arrays:
        near(model(arrays["batch_default/input_ids"]).logits, arrays["train/logits"], LOGITS)
    inputs, _ = inputs_of("v1", arrays, "batch_default")
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(6):
        loss = model(**inputs, labels=arrays["batch_default/labels"]).loss
        losses.append(loss.item())
        if step < 5:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses == pytest.approx(record["adamw_lr1e-3_losses"], abs=AFTER_STEPS)
    # Merged and beside the base are two orders of the same sums: 5.6e-6 apart in the reference.
    beside = model(**inputs).logits
    count = adapters.merge_lora(model)
    assert count == model.config.num_hidden_layers and not hasattr(model, "peft_config")
    assert not any("lora" in name for name in model.state_dict())
    near(model(**inputs).logits, beside.detach(), LOGITS)


PARTS = {
    "self_attention.query_key_value": (64, 128),
    "self_attention.dense": (64, 64),
    "mlp.dense_h_to_4h": (64, 192),
    "mlp.dense_4h_to_h": (96, 64),
}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"]}
    (folder / "adapter_config.json").write_text(json.dumps(raw | config))
    return folder


def released_adapter(scale: float = 0.05) -> dict[str, torch.Tensor]:
    """A random adapter of rank 4 on every linear layer of v2/tiny, under the released names."""
    random = torch.Generator().manual_seed(5)
    out = {}
    for layer in range(3):
        for part, (columns, rows) in PARTS.items():
            name = f"transformer.encoder.layers.{layer}.{part}"
            out[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=random)
            out[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=random) * scale
    return out


def test_a_fused_adapter_equals_its_sum_with_the_fused_weights(tmp_path):
    tensors = released_adapter()
    # One layer has an alpha of its own, and the scale is that of rank-stabilised LoRA.
    special = "layers.1.self_attention.query_key_value"
    folder = write_adapter(
        tmp_path / "fused", tensors,
        target_modules=list(PARTS), use_rslora=True, alpha_pattern={special: 6}, some_key_of_another_peft=[1],
    )  # fmt: skip
    source = folder_of("v2/tiny")
    weights = load_file(source / "model.safetensors")
    for name in [key for key in weights if f"{key.removesuffix('.weight')}.lora_A.weight" in tensors]:
        module = name.removesuffix(".weight")
        scale = (6 if special in module else 16) / 4**0.5
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        weights[name] = weights[name].float() + scale * product
    summed = tmp_path / "summed"
    summed.mkdir()
    shutil.copy(source / "config.json", summed)
    save_file(
        {name: tensor.float() for name, tensor in weights.items()},
        summed / "model.safetensors",
        {"format": "pt"},
    )
    config = ChatGLM2Config.from_released(json.loads((source / "config.json").read_text(encoding="utf-8")))
    fused = ChatGLM2ForCausalLM.from_pretrained(str(summed), config=config, dtype=torch.float32).eval()

    model = load_base("v2")
    report = adapters.load_lora(model, folder)
    assert report.converted and not report.zero and not report.warnings
    assert sorted(report.targets) == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    ids = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
    expected = fused(ids).logits
    assert (load_base("v2")(ids).logits - expected).abs().max() > 0.1
    near(model(ids).logits, expected, LOGITS)  # the same sums in another order: 2.5e-5 apart
    # Written in PEFT's layout: plain PEFT reads it onto a fresh base, and so do we.
    adapters.save_lora(model, tmp_path / "saved")
    info = adapters.inspect_adapter(tmp_path / "saved")
    assert info is not None and (info.rank, info.alpha, info.tensors) == (4, 16.0, 2 * 6 * 3)
    plain = PeftModel.from_pretrained(load_base("v2"), str(tmp_path / "saved")).eval()
    assert torch.equal(plain(ids).logits, model(ids).logits)
    again = load_base("v2")
    assert not adapters.load_lora(again, tmp_path / "saved").converted
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert adapters.merge_lora(model) == 18
    near(model(ids).logits, expected, LOGITS)


def test_a_merge_in_half_precision_rounds_once(tmp_path):
    model = load_base("v2").to(torch.bfloat16)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    adapters.load_lora(model, write_adapter(tmp_path / "a", tensors := released_adapter(0.001)))
    lora = model.model.layers[0].self_attn.v_proj.lora_B["default"].weight
    assert lora.dtype == torch.float32
    adapters.merge_lora(model)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h"
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    expected = (weight.float() + 4.0 * product).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_of_the_head(tmp_path):
    tied = load_base("v1")
    adapters.add_lora(tied, targets=["lm_head"])
    with pytest.raises(GLMError, match="shares its weights with the input embedding"):
        adapters.merge_lora(tied)
    model = load_base("v2")
    weight = model.lm_head.weight.detach().clone()
    a, b = torch.full((4, 64), 0.25), torch.full((160, 4), 0.5)
    released = {f"transformer.output_layer.lora_{side}.weight": t for side, t in (("A", a), ("B", b))}
    assert adapters.load_lora(model, write_adapter(tmp_path / "head", released)).converted
    adapters.merge_lora(model)
    near(model.lm_head.weight, weight + 2.0, 1e-6)  # alpha / r * 4 * 0.25 * 0.5, on weights below 1


def test_two_adapters_one_at_a_time(tmp_path):
    model = load_base("v2")
    ids = torch.tensor([[3, 14, 15, 92]])
    base = model(ids).logits
    first = write_adapter(tmp_path / "first", released_adapter())
    one_layer = {name: tensor * 2 for name, tensor in released_adapter().items() if "layers.1.mlp" in name}
    second = write_adapter(tmp_path / "second", one_layer)
    adapters.load_lora(model, first, "first")
    with_first = model(ids).logits
    adapters.use_lora(model, None)
    report = adapters.load_lora(model, second, "second")
    assert report.targets == ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_up_proj")
    assert len(report.warnings) == 2 and "1 of the 3 layers named down_proj" in report.warnings[0]
    with_second = model(ids).logits
    assert not torch.equal(with_second, with_first) and not torch.equal(with_second, base)
    adapters.use_lora(model, "first")
    assert torch.equal(model(ids).logits, with_first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(GLMError, match="'first' is already loaded"):
        adapters.load_lora(model, first, "first")
    with pytest.raises(GLMError, match="'third'"):
        adapters.use_lora(model, "third")
    adapters.use_lora(model, "second")
    assert adapters.merge_lora(model) == 2  # the active one alone
    near(model(ids).logits, with_second, LOGITS)
    for act in (adapters.merge_lora, adapters.unload_lora):
        with pytest.raises(GLMError, match="No LoRA is loaded"):
            act(model)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_fresh_adapter_starts_without_effect_and_is_reported_as_zero(family, tmp_path):
    model = load_base(family)
    ids = torch.tensor([[20, 30, 40, 151, 154]])
    base = model(ids).logits
    report = adapters.add_lora(
        model, rank=2, alpha=4, dropout=0.5, targets=["query_key_value", "dense_4h_to_h"]
    )
    assert report.modules == (6 if family == "v1" else 12)
    assert torch.equal(model(ids).logits, base)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * report.modules and all("lora_" in name for name in trained)
    adapters.save_lora(model, tmp_path / "saved")
    report = adapters.load_lora(load_base(family), tmp_path / "saved")
    assert report.zero and "Every B of this adapter is zero" in report.warnings[0]
    with pytest.raises(GLMError, match="no linear layer named conv"):
        adapters.add_lora(model, targets=["conv"], name="other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"r": 8}, "rank 4 .* r=8"),
    ],
)
def test_what_is_no_plain_lora_is_refused(change, said, tmp_path):
    folder = write_adapter(tmp_path / "adapter", released_adapter(), **change)
    model = load_base("v2")
    with pytest.raises(GLMError, match=said):
        adapters.load_lora(model, folder)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("v1", lambda key, t: (key, t), "dense_4h_to_h, which ChatGLMForConditionalGeneration with 3 layers"),
        ("v2", lambda key, t: (key.replace("layers.2", "layers.30"), t), r"layers\.30.* with 3 layers"),
        ("v2", lambda key, t: (key, t[:, :3] if "_A" in key else t), "of 3 -> 64; .* 96 -> 64"),
        ("v2", lambda key, t: (key, t[:60] if "_B" in key else t), "of 96 -> 60; .* 96 -> 64"),
        ("v2", lambda key, t: (key.replace("lora_B", "lora_C"), t), r"lora_C\.weight, which is no A or B"),
        ("v2", lambda key, t: (key, t[:, :2] if "_B" in key else t), "of different ranks"),
    ],
)
def test_an_adapter_of_another_base_is_refused(family, change, said, tmp_path):
    tensors = dict(change(name, tensor.clone()) for name, tensor in released_adapter().items())
    folder = write_adapter(
        tmp_path / "adapter", {name: tensor.contiguous() for name, tensor in tensors.items()}
    )
    with pytest.raises(GLMError, match=said):
        adapters.load_lora(load_base(family), folder)


# ------------------------------------------------------------------------------------------------ folders, effect


def test_inspecting_reads_what_the_folder_says(tmp_path):
    folder = folder_of("v1/lora_tiny")
    info = adapters.inspect_adapter(folder)
    numbers = 3 * (8 * 64 + 192 * 8)
    assert info == adapters.AdapterInfo(
        "lora", rank=8, alpha=32.0, targets=("query_key_value",), base="v1/tiny", tensors=6, parameters=numbers,
        size_bytes=4 * numbers,
    )  # fmt: skip
    for file in ("adapter_model.bin", "adapter_model.safetensors"):
        alone = tmp_path / file
        alone.mkdir()
        for part in ("adapter_config.json", file):
            shutil.copy(folder / part, alone)
        assert adapters.inspect_adapter(alone) == info
        (alone / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        for read_it in (adapters.inspect_adapter, lambda path: adapters.load_lora(load_base("v1"), path)):
            with pytest.raises(GLMError, match="Git LFS pointer"):
                read_it(alone)
        (alone / file).unlink()
        assert adapters.inspect_adapter(alone).problems == (
            "There is no adapter_model.safetensors or adapter_model.bin.",
        )
    assert adapters.inspect_adapter(folder_of("v2/tiny")) is None
    assert adapters.inspect_adapter(tmp_path) is None
    # pre_seq_len in config.json, but no prefix among the weights
    shutil.copytree(folder_of("v2/tiny"), tmp_path / "base")
    shutil.copy(folder_of("v2/ptuning_tiny_proj") / "config.json", tmp_path / "base")
    assert adapters.inspect_adapter(tmp_path / "base") is None
    prefix = write_adapter(tmp_path / "prefix", released_adapter(), peft_type="PREFIX_TUNING")
    info = adapters.inspect_adapter(prefix)
    assert info.method == "prefix_tuning" and "peft_type 'PREFIX_TUNING'" in info.problems[0]


def test_a_lora_is_compared_with_its_base_by_sizes_alone(tmp_path):
    first, second = (
        json.loads((folder_of(f"{family}/tiny") / "config.json").read_text(encoding="utf-8"))
        for family in ("v1", "v2")
    )
    lora = adapters.inspect_adapter(folder_of("v1/lora_tiny"))
    lora.check_base(first, "tiny")
    with pytest.raises(
        GLMError, match=r"transformer\.layers\.0.*; other is a ChatGLM2/3 of 3 layers.*, v1/tiny"
    ):
        lora.check_base(second, "other")
    fused = adapters.inspect_adapter(write_adapter(tmp_path / "adapter", released_adapter()))
    fused.check_base(second, "tiny")
    for change, said in (
        ({"num_layers": 2}, "adapts layer 3; other has 2 layers"),
        ({"hidden_size": 96}, "of width 64; other has width 96"),
    ):
        with pytest.raises(GLMError, match=said):
            fused.check_base(second | change, "other")


def test_an_adapter_that_changes_nothing_is_said_to():
    assert len(adapters.PROBES) == len(set(adapters.PROBES)) == 8
    assert adapters.took_effect(["a", "b"], ["a", "c"]) == adapters.Effect(1, 2, "")
    none = adapters.took_effect(["a", "b"], ["a", "b"])
    assert none.differing == 0 and "none of 2 test answers" in none.warning
    for before, after in ((["a"], []), ([], [])):
        with pytest.raises(ValueError):
            adapters.took_effect(before, after)
