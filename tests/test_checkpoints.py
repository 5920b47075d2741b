"""Checkpoint folders are found, described, loaded or refused with the reason; nothing in them is executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from glm_core import checkpoints
from glm_core.errors import GLMError
from glm_core.settings import MINI, Settings


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_a_folder_with_spaces_dots_and_chinese_loads(tiny_checkpoint):
    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    assert loaded.info.family == "ChatGLM3"
    assert loaded.info.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert next(loaded.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_precision_is_the_one_asked_for(tiny_checkpoint, precision, dtype):
    assert next(checkpoints.load(tiny_checkpoint, precision, "cpu").model.parameters()).dtype == dtype


def test_loading_twice_gives_the_same_weights_bit_for_bit(tiny_checkpoint):
    first = checkpoints.load(tiny_checkpoint, "fp32", "cpu").model.state_dict()
    poison = [torch.full((1 << 18,), float("nan")) for _ in range(20)]  # what a stray buffer would pick up
    del poison
    second = checkpoints.load(tiny_checkpoint, "fp32", "cpu").model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_code_in_the_folder_is_never_imported(folder):
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('executed')")
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit('executed')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoints.load(folder, "fp32", "cpu").info.loadable


def test_a_malicious_pickle_does_not_run(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (folder / "executed",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(GLMError, match="holds something other than tensors.*, so it was not opened"):
        checkpoints.load(folder, "fp32", "cpu")
    assert not (folder / "executed").exists()


def test_plain_bin_weights_load(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoints.load(folder, "fp32", "cpu").info.size_bytes > 0


def _shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


def test_shards_load(folder, tiny_checkpoint):
    _shards(folder)
    one = checkpoints.load(tiny_checkpoint, "fp32", "cpu").model.state_dict()
    two = checkpoints.load(folder, "fp32", "cpu").model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def _break(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "missing shard":
        _shards(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif how == "pointer":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "foreign":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    elif how == "another model":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "damaged config":
        (folder / "config.json").write_text('{"model_type": ')
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "other shape":
        config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 128}
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "not finite":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors["transformer.output_layer.weight"][:] = float("nan")
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing shard", "model-00002-of-00002.safetensors .* is missing"),
        ("pointer", "model.safetensors is a Git LFS pointer"),
        ("truncated", "model.safetensors is cut off"),
        ("foreign", "model_type 'vit', which is no text model"),
        ("another model", "they are of another model than config.json"),
        ("no config", "has no config.json"),
        ("damaged config", "config.json cannot be read"),
        ("no tokenizer", "tokenizer.model is missing"),
        ("no weights", "There are no weights"),
        ("other shape", r"has the shape \(6016, 64\), config.json says \(6016, 128\)"),
        ("not finite", "not finite"),
    ],
)
def test_a_broken_folder_is_refused_with_its_reason(folder, how, sentence):
    _break(folder, how)
    with pytest.raises(GLMError, match=sentence) as caught:
        checkpoints.load(folder, "fp32", "cpu")
    assert caught.value.todo


def test_find_lists_broken_folders_with_what_is_wrong(folder):
    _break(folder, "truncated")
    (found,) = checkpoints.find([folder.parent])
    assert not found.loadable and "cut off" in found.problems[0]


def test_too_little_memory_is_said_with_both_numbers(tiny_checkpoint, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1 << 20})())
    with pytest.raises(GLMError, match=r"needs about .* GiB .* are free"):
        checkpoints.load(tiny_checkpoint, "fp32", "cpu")


def test_paths_outside_the_allowed_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with pytest.raises(GLMError, match="outside the folders"):
        Settings.read().allowed_model("/etc")


def test_the_fingerprint_changes_with_the_weights(folder):
    before = checkpoints.fingerprint(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert checkpoints.fingerprint(folder) != before


def test_the_embedded_model_is_within_its_size():
    info = checkpoints.inspect(MINI)
    assert info.loadable and info.family == "ChatGLM3" and info.dtype == "BF16"
    assert 9_000_000 < info.parameters < 21_000_000
    assert sum(file.stat().st_size for file in MINI.iterdir()) < 40_000_000


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": []}'),
        ("config.json", '{"model_type": "chatglm", "padded_vocab_size": 1, "num_layers": "x"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": [1, 2]}'),
    ],
)
def test_one_damaged_folder_does_not_hide_the_others(folder, tiny_checkpoint, file, text):
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    shutil.copytree(tiny_checkpoint, folder.parent / "good")
    found = {info.name: info for info in checkpoints.find([folder.parent])}
    assert found["good"].loadable and not found["copy"].loadable
    with pytest.raises(GLMError):
        checkpoints.load(folder, "fp32", "cpu")


def test_a_default_that_is_no_number_is_left_out(folder):
    (folder / "generation_config.json").write_text('{"temperature": null, "top_k": "many", "top_p": 0.5}')
    assert checkpoints.defaults(folder) == {
        "temperature": 0.8,
        "top_p": 0.5,
        "top_k": 50,
        "max_new_tokens": 512,
    }
