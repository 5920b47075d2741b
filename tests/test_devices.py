"""Devices are named or refused, layers are spread by the memory there is, and a spread model gives the same numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core import checkpoints, devices
from glm_core.checkpoints import loading
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message
from tests.conftest import GOLDEN, REPOSITORY

GIB = 1 << 30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine that says it has two GPUs; free bytes by device, to be changed."""
    free = {"cpu": 64 * GIB, "cuda": 24 * GIB, "cuda:0": 24 * GIB, "cuda:1": 24 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(devices, "free_bytes", free.__getitem__)
    return free


def empty(raw: dict[str, Any], generation: str = "chatglm3") -> Any:
    return loading.empty_model(checkpoints.inspecting.architecture_of(raw), raw, generation)


@pytest.fixture(scope="module")
def full_size() -> Any:
    """ChatGLM3-6B on the meta device, by its published config.json."""
    import json

    return empty(json.loads((GOLDEN / "published_configs/v3_chatglm3-6b.config.json").read_text()))


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda", "There is no device cuda; this machine has cpu"),
        ("cuda:1", "There is no device cuda:1; this machine has cpu"),
        ("mps", "There is no device mps; this machine has cpu"),
        ("cpu,cuda:0", "There is no device cuda:0; this machine has cpu"),
        ("gpu", "The device 'gpu' is unknown"),
        ("cuda:x", "The device 'cuda:x' is unknown"),
        ("", "The device '' is unknown"),
    ],
)
def test_a_device_that_is_not_there_is_named_before_a_weight_is_read(
    tiny_checkpoint, monkeypatch, device, sentence
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(loading, "fill", None)
    with pytest.raises(GLMError, match=re.escape(sentence)) as caught:
        checkpoints.load(tiny_checkpoint, "fp32", device)
    assert caught.value.todo


def test_names_mean_devices(two_gpus):
    assert devices.available()[:3] == ("cpu", "cuda:0", "cuda:1")
    assert devices.named("auto") == ("cuda",)
    assert devices.named("cuda:1") == ("cuda:1",)
    assert devices.named("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert devices.named("auto", 2) == devices.named("cuda", 2) == ("cuda:0", "cuda:1")
    assert devices.named("auto", 1) == ("cuda",)
    with pytest.raises(GLMError, match="There is no device cuda:2; this machine has cpu, cuda:0, cuda:1"):
        devices.named("auto", 3)
    for device, number in (("auto", 0), ("cpu", 2), ("cuda:1", 2)):
        with pytest.raises(GLMError, match=f"num_gpus is {number} and the device {device}"):
            devices.named(device, number)


def test_every_device_has_a_precision_with_a_reason(tiny_checkpoint, monkeypatch):
    small = checkpoints.inspect(tiny_checkpoint)
    assert all(
        precision in checkpoints.PRECISIONS and why for precision, why in devices.PRECISION_OF.values()
    )
    assert checkpoints.best_precision(small, "cpu") == "fp32"
    assert devices.precision_for("cpu", 6_000_000_000) == "bf16"
    assert devices.precision_for("mps", 6_000_000_000) == "fp16"
    for emulated_only, expected in ((False, "bf16"), (True, "fp16")):
        # torch answers yes for every GPU unless it is asked for the hardware's own.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, only=emulated_only: including_emulation or not only,
        )
        assert checkpoints.best_precision(small, "cuda:0,cuda:1") == expected
        assert devices.beside_codes("cuda") == {"bf16": torch.bfloat16, "fp16": torch.float16}[expected]


def test_no_device_is_wired_in():
    for path in [*(REPOSITORY / "glm_core").rglob("*.py"), *(REPOSITORY / "pages").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.cuda\(|\.to\(\"(cuda|mps)|\.to\('(cuda|mps)", text), path


# --- which layer goes where -------------------------------------------------------------------------------------


def bytes_of(model: Any, bits: int = 0) -> dict[str, int]:
    return loading._sizes(model, torch.bfloat16, bits)


def shares(model: Any, placed: dict[str, str], sizes: dict[str, int]) -> dict[str, int]:
    look = devices.device_of(placed)
    found: dict[str, int] = {}
    for name, size in sizes.items():
        device = look(name)
        assert device is not None, f"{name} has no place"
        found[device] = found.get(device, 0) + size
    return found


def test_sizes_are_those_of_the_precision(full_size):
    assert sum(bytes_of(full_size).values()) == 2 * 6_243_584_000
    sizes = bytes_of(full_size, 4)
    assert sizes["model.layers.0.self_attn.o_proj.weight"] == 4096 * 4096 // 2
    assert sizes["lm_head.weight"] == 65024 * 4096 * 2


@pytest.mark.parametrize(
    "free", [(24, 24), (8, 24), (24, 8), (6, 6, 6), (12, 4, 4, 24)], ids=lambda free: "+".join(map(str, free))
)
def test_layers_are_spread_in_order_and_by_the_free_memory(full_size, free):
    names = [f"cuda:{number}" for number in range(len(free))]
    sizes = bytes_of(full_size)
    placed = devices.split(full_size, sizes, names, [size * GIB for size in free])
    assert placed is not None
    found = shares(full_size, placed, sizes)
    rooms = {name: size * GIB for name, size in zip(names, free, strict=True)}
    assert all(devices.needed(size) <= rooms[name] for name, size in found.items())
    order = [names.index(placed[f"model.layers.{number}"]) for number in range(28)]
    assert order == sorted(order) and set(order) == set(range(len(free)))
    # Ids come in and logits go out on the first; nothing but layers is anywhere else.
    outside = {name: device for name, device in placed.items() if ".layers." not in name}
    assert set(outside) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    assert set(outside.values()) == {"cuda:0"}
    # As full as each other, up to one layer.
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    full = [found[name] / (rooms[name] / devices.SPARE_SHARE) for name in names]
    assert max(full) - min(full) <= 2 * layer / min(rooms.values())


def test_what_does_not_fit_is_not_spread(full_size):
    sizes = bytes_of(full_size)
    assert devices.split(full_size, sizes, ["cuda:0", "cuda:1"], [6 * GIB, 6 * GIB]) is None
    assert (
        devices.split(full_size, sizes, ["cuda:0", "cuda:1"], [1 * GIB, 40 * GIB]) is None
    )  # embeddings need 1.1
    assert devices.split(full_size, bytes_of(full_size, 4), ["cuda:0", "cuda:1"], [3 * GIB, 3 * GIB])


@pytest.mark.parametrize("folder", ["v1/tiny", "v2/tiny"])
def test_every_weight_of_each_generation_has_one_place(folder):
    raw = checkpoints.read_config(GOLDEN / folder)
    model = empty(raw)
    sizes = bytes_of(model)
    placed = devices.split(model, sizes, ["cuda:0", "cuda:1"], [GIB, GIB])
    assert placed is not None
    names = list(placed)
    assert not any(other.startswith(f"{name}.") for name in names for other in names)
    assert len(shares(model, placed, sizes)) == 2
    assert len(devices.layer_paths(model)) == raw["num_layers"]


def test_auto_takes_all_gpus_only_where_one_has_too_little_memory(two_gpus, tiny_checkpoint, monkeypatch):
    asked: list[Any] = []

    def stop(info, generation, precision, names, device_map, progress):
        asked.append(names)
        raise GLMError("stop")

    monkeypatch.setattr(loading, "_base_model", stop)
    for free in (24 * GIB, 320 << 20, 100 << 20):
        two_gpus["cuda"] = two_gpus["cuda:0"] = two_gpus["cuda:1"] = free
        monkeypatch.setattr(checkpoints.CheckpointInfo, "memory_bytes", lambda self, precision: 40 << 20)
        with pytest.raises(GLMError) as caught:
            checkpoints.load(tiny_checkpoint, "bf16")
    assert asked == [("cuda",), ("cuda:0", "cuda:1")]
    assert (
        "0.2 GiB are free on cuda" in caught.value.message
        or "0.1 GiB are free on cuda" in caught.value.message
    )


# --- loading --------------------------------------------------------------------------------------------------------


def blocks(layers: int, *, prefix: str = "model.", device: str = "cpu") -> dict[str, str]:
    return {
        "": device,
        **{f"{prefix}layers.{number}": device for number in range(layers)},
    }


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_spread_model_answers_as_the_whole_one(tiny_checkpoint, precision, monkeypatch):
    # Both on the model's own forward: beside codes it computes in bf16, which the lean one rounds in other places.
    monkeypatch.setattr("glm_core.models.lean.lean", lambda model: None)
    whole = checkpoints.load(tiny_checkpoint, precision, "cpu")
    spread = checkpoints.load(tiny_checkpoint, precision, device_map=blocks(2))
    assert whole.devices == spread.devices == "cpu" and not whole.device_map
    assert set(spread.device_map) == {
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head",
    }  # fmt: skip
    hooked = [name for name, module in spread.model.named_modules() if hasattr(module, "_hf_hook")]
    assert {"", "model.layers.0", "model.layers.1", "lm_head"} <= set(hooked)
    assert spread.weight_bytes == whole.weight_bytes
    prompt = tuple(whole.tokenizer.chat_ids([Message("user", "你好")]))
    answers = []
    for loaded in (whole, spread):
        engine = Engine(loaded)
        try:
            assert engine.self_test().rows
            handle = engine.submit(Request(prompt, GenerationSettings(max_new_tokens=16)))
            assert handle.wait(60) and handle.error is None
            answers.append(handle.ids)
        finally:
            engine.close()
    assert answers[0] == answers[1]
    checkpoints.release(spread)
    assert all(parameter.is_meta for parameter in spread.model.parameters())


def test_a_model_of_transformers_is_spread_too(tmp_path):
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=6016, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    shutil.copy(MINI / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"glm_generation": "chatglm3"}')
    whole = checkpoints.load(tmp_path, "fp32", "cpu")
    spread = checkpoints.load(tmp_path, "fp32", device_map=blocks(2))
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(whole.model(input_ids=ids).logits, spread.model(input_ids=ids).logits)
    assert spread.model.lm_head.weight is spread.model.model.embed_tokens.weight


@pytest.mark.parametrize(("folder", "prefix"), [("v1/tiny", "transformer."), ("v2/tiny", "model.")])
def test_each_generation_can_be_spread(folder, prefix):
    """Uncached, and token by token over a cache that the model is handed."""
    from transformers import DynamicCache

    raw = checkpoints.read_config(GOLDEN / folder)
    model = empty(raw)
    loading.fill(model, [GOLDEN / folder / "model.safetensors"], torch.float32)
    model.eval()
    ids = torch.tensor([[20, 21, 22, 151, 154, 30, 31]])

    def compute() -> list[torch.Tensor]:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            whole = model(input_ids=ids).logits
            first = model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).logits
            return [whole, first]

    expected = compute()
    placed = devices.whole(model, blocks(raw["num_layers"], prefix=prefix))
    devices.spread(model, placed, devices.check_map(model, placed))
    assert all(torch.equal(a, b) for a, b in zip(compute(), expected, strict=True))
    devices.gather(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(compute()[0], expected[0])


def test_weights_go_straight_onto_their_device(tiny_checkpoint):
    """With the meta device as the second one: what was read for it is never kept in main memory."""
    raw = checkpoints.read_config(tiny_checkpoint)
    model = empty(raw)
    loading.fill(
        model,
        [tiny_checkpoint / "model.safetensors"],
        torch.float32,
        device_map={"model.layers.1": "meta", "": "cpu"},
    )
    where = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert {device for name, device in where.items() if ".layers.1." in name} == {"meta"}
    assert {device for name, device in where.items() if ".layers.1." not in name} == {"cpu"}


@pytest.mark.parametrize(
    ("device_map", "sentence"),
    [
        ({"model": "cpu"}, "The device map has no place for lm_head.weight"),
        ({"": "cpu", "model.layers.0": "cuda:7"}, "There is no device cuda:7"),
        ({"": "cpu", "model.layers.0": "disk"}, "The device 'disk' is unknown"),
    ],
)
def test_a_wrong_device_map_is_refused(tiny_checkpoint, device_map, sentence):
    with pytest.raises(GLMError, match=sentence):
        checkpoints.load(tiny_checkpoint, "fp32", device_map=device_map)


def test_embedding_and_head_belong_on_one_device(two_gpus, full_size):
    with pytest.raises(GLMError, match="the embedding on cuda:0 and the head on cuda:1"):
        devices.check_map(full_size, {"": "cuda:0", "lm_head": "cuda:1"})
    assert devices.check_map(full_size, {"": "cuda:1", "model.layers.3": "cuda:0"}) == "cuda:1"


def test_each_device_has_to_hold_its_own_share(two_gpus, tiny_checkpoint, full_size):
    info = checkpoints.inspect(tiny_checkpoint)
    sizes = loading._sizes(full_size, torch.bfloat16, 0, 0)
    two_gpus["cuda:1"] = 4 * GIB
    crowded = {"": "cuda:1", "model.embed_tokens": "cuda:0", "lm_head": "cuda:0"}
    with pytest.raises(GLMError, match=r"needs about 12\.\d GiB in bf16; 4\.0 GiB are free on cuda:1"):
        loading._place(full_size, info, "bf16", sizes, ["cuda:0", "cuda:1"], crowded)
    placed = loading._place(full_size, info, "bf16", sizes, ["cuda:0", "cuda:1"], None)
    found = shares(full_size, placed, bytes_of(full_size))
    assert found["cuda:1"] < 4 * GIB < found["cuda:0"]
    two_gpus["cuda:0"] = GIB
    two_gpus["cuda:1"] = 40 * GIB
    with pytest.raises(GLMError, match="cannot be spread over cuda:0,cuda:1: one of them has too little"):
        loading._place(full_size, info, "bf16", sizes, ["cuda:0", "cuda:1"], None)
    two_gpus["cuda:1"] = 2 * GIB
    with pytest.raises(GLMError, match=r"in bf16; 3\.0 GiB are free on cuda:0,cuda:1"):
        loading._place(full_size, info, "bf16", sizes, ["cuda:0", "cuda:1"], None)


def test_an_adapters_warnings_travel_with_the_model(tiny_checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    assert base.notes == ()
    made = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "lora")
    assert Path(tmp_path / "lora/adapter_config.json").is_file()
    loaded = checkpoints.load(tmp_path / "lora", "fp32", "cpu", base=tiny_checkpoint)
    assert any("Every B of this adapter is zero" in note for note in loaded.notes)
    spread = checkpoints.load(tmp_path / "lora", "fp32", base=tiny_checkpoint, device_map=blocks(2))
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids).logits, spread.model(input_ids=ids).logits)
