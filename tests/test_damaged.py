"""Damaged and odd folders, as an analyst meets them: each is loaded, or refused with what is wrong and what to do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_core import checkpoints, weights
from glm_core.checkpoints import saving
from glm_core.errors import GLMError
from glm_core.tokenizers import chatglm
from glm_core.tokenizers.base import Message
from tests.conftest import GOLDEN

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
QKV_V1 = "transformer.layers.0.attention.query_key_value.weight"
HEAD_V2 = "transformer.output_layer.weight"


# ------------------------------------------------------------------------------------------------ whole folders


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ice_text.model and tokenizer.model of fewer than 160 ids, which is what the golden models have rows for."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("vocabularies")
    lines = [
        "你好",
        "写一首诗",
        "the sea is blue",
        "one two three",
        "abcdefghijklmnopqrstuvwxyz",
        "今天天气很好",
    ] * 20
    common = {"minloglevel": 2, "hard_vocab_limit": False, "character_coverage": 1.0}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=120,
        normalization_rule_name="identity", **common,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "base"), model_type="unigram", vocab_size=100,
        pad_id=3, user_defined_symbols=["<n>"], normalization_rule_name="nmt_nfkc", **common,
    )  # fmt: skip
    base = (folder / "base.model").read_bytes()
    filled = sentencepiece.SentencePieceProcessor(model_proto=base).vocab_size()
    # [MASK] is id 150 in the golden configurations; the tab follows the control tokens.
    kinds = [(f"filler{i}", 5) for i in range(filled, 150)] + [(name, 3) for name in chatglm.CONTROL_TOKENS]
    pieces = (
        chatglm._message(1, chatglm._piece(name) + bytes([3 << 3, kind]))
        for name, kind in [*kinds, ("<|tab|>", 4)]
    )
    (folder / "ice_text.model").write_bytes(base + b"".join(pieces))
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, vocabularies: Path) -> Make:
    """A golden folder copied under a name, with a tokenizer beside the weights."""

    def made(golden: str, name: str = "copy", tokenizer: bool = True) -> Path:
        folder = tmp_path / "models" / name
        shutil.copytree(
            GOLDEN / golden, folder, ignore=shutil.ignore_patterns("sharded", "prefix.safetensors")
        )
        if tokenizer:
            file = "ice_text.model" if golden.startswith("v1") else "tokenizer.model"
            shutil.copy(vocabularies / file, folder)
            if file == "ice_text.model":
                (folder / "tokenizer_config.json").write_text('{"num_image_tokens": 0}')
        return folder

    return made


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a folder, changed; a value of None takes the key out."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return raw


def retype(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def as_bin(folder: Path, content: Any = None, **options: Any) -> Path:
    """pytorch_model.bin in place of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


def cut(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")


def shards(folder: Path, twice: str = "", owner: int = 0, change: float = 0.0) -> None:
    """Two shards; `twice` is in both, changed by a number in the second, and given to the `owner`-th by the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    table = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    for part, file in zip(parts, files, strict=True):
        held = {name: tensors[name] for name in part}
        if twice:
            held[twice] = tensors[twice] + (change if file == files[1] else 0.0)
        save_file(held, folder / file)
    if twice:
        table |= {twice: [*files, "model-00003-of-00002.safetensors"][owner]}
    index(folder, json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize(
    "golden", ["v1/tiny", "v1/quant_int8", "v1/quant_int4", "v1/quant_int4_qe", "v2/tiny", "v2/quant_int8",
               "v2/quant_int4", "v3/tiny"],
)  # fmt: skip
def test_the_whole_folders_load(make, golden):
    loaded = checkpoints.load(make(golden), "fp32", "cpu")
    assert loaded.info.loadable and not loaded.report.missing and not loaded.report.unused


# ------------------------------------------------------------------------------------------------ refused


def missing_shard(make: Make) -> Path:
    folder = make("v2/tiny")
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def cut_weights(keep: float) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make("v2/tiny")
        cut(folder / "model.safetensors", keep)
        return folder

    return made


def cut_bin(keep: float, zipped: bool = True) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make("v2/tiny")
        cut(as_bin(folder, _use_new_zipfile_serialization=zipped), keep)
        return folder

    return made


def too_long(make: Make) -> Path:
    folder = make("v2/tiny")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 10)
    return folder


def overlapping(make: Make) -> Path:
    """A header whose shape and bytes disagree."""
    folder = make("v2/tiny")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"shape":[160,64]', b'"shape":[160,65]', 1))
    return folder


def written(file: str, content: bytes, golden: str = "v2/tiny") -> Callable[[Make], Path]:
    """A file of the folder replaced by other content."""

    def made(make: Make) -> Path:
        folder = make(golden)
        if file.startswith(("model.safetensors.", "pytorch")):
            (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(content)
        return folder

    return made


def without(file: str, golden: str = "v2/tiny") -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make(golden)
        (folder / file).unlink()
        return folder

    return made


def configured(golden: str = "v2/tiny", **changes: Any) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make(golden)
        config_of(folder, **changes)
        return folder

    return made


def mixed(config: str, stored: str) -> Callable[[Make], Path]:
    """config.json of one model, weights of another."""

    def made(make: Make) -> Path:
        folder = make(config)
        shutil.copy(GOLDEN / stored / "model.safetensors", folder)
        return folder

    return made


def tensors(golden: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make(golden)
        retype(folder, change)
        return folder

    return made


def not_finite(found: dict[str, torch.Tensor]) -> None:
    found["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"][0, 0] = float("nan")


def whole_numbers(found: dict[str, torch.Tensor]) -> None:
    name = "transformer.encoder.final_layernorm.weight"
    found[name] = found[name].to(torch.int32)


def no_scales(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if name.endswith("weight_scale")]:
        del found[name]


def short_scales(found: dict[str, torch.Tensor]) -> None:
    found[f"{QKV_V1}_scale"] = found[f"{QKV_V1}_scale"][:-1]


def other_tokenizer(make: Make) -> Path:
    folder = make("v2/tiny")
    from glm_core.settings import MINI

    shutil.copy(MINI / "tokenizer.model", folder)
    return folder


def cut_tokenizer(golden: str, file: str) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make(golden)
        cut(folder / file, 0.6)
        return folder

    return made


def swapped_tokenizer(make: Make) -> Path:
    folder = make("v1/tiny")
    other = make("v2/tiny", "other")
    (other / "tokenizer.model").rename(folder / "ice_text.model")
    shutil.rmtree(other)
    return folder


def of_bin(content: Any) -> Callable[[Make], Path]:
    def made(make: Make) -> Path:
        folder = make("v2/tiny")
        as_bin(folder, content)
        return folder

    return made


def both_hold(make: Make) -> Path:
    folder = make("v2/tiny")
    shards(folder, HEAD_V2, owner=2)
    save_file({"unused": torch.zeros(1)}, folder / "model-00003-of-00002.safetensors")
    return folder


def scripted(make: Make) -> Path:
    folder = make("v2/tiny")
    as_bin(folder)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "pytorch_model.bin"))
    return folder


DEEP = b'{"model_type": "chatglm", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"

REFUSED: dict[str, tuple[Callable[[Make], Path], str, str]] = {
    # weights
    "missing shard": (missing_shard, "The shard model-00002-of-00002.safetensors named in model.safetensors.index.json is missing", "Repair"),
    "cut safetensors": (cut_weights(0.5), r"model.safetensors is cut off: it has [\d,]+ bytes, its header promises [\d,]+; copy", "Repair"),
    "cut header": (cut_weights(0.005), r"its header cannot be read \(the file ends inside it\)", "Repair"),
    "long safetensors": (too_long, r"model.safetensors has [\d,]+ bytes, more than the [\d,]+ of its header; copy it again", "Repair"),
    "shape and bytes disagree": (overlapping, r"its header cannot be read \(nonsense about transformer\.", "Repair"),
    "text as safetensors": (written("model.safetensors", b"<!DOCTYPE html><html>not found</html>"), r"its header cannot be read \(no safetensors header\)", "Repair"),
    "list as header": (written("model.safetensors", (2).to_bytes(8, "little") + b"[]"), r"\(no table of tensors\)", "Repair"),
    "deep header": (written("model.safetensors", len(DEEP).to_bytes(8, "little") + DEEP), r"\(too deep\)", "Repair"),
    "empty safetensors": (written("model.safetensors", b""), "model.safetensors is cut off: it is empty", "Repair"),
    "empty bin": (written("pytorch_model.bin", b""), "pytorch_model.bin is cut off: it is empty", "Repair"),
    "cut bin": (cut_bin(0.7), r"pytorch_model.bin is cut off: it has [\d,]+ bytes and no end", "Repair"),
    "cut old bin": (cut_bin(0.9, zipped=False), "pytorch_model.bin cannot be read: ", "convert it to safetensors"),
    "cut old bin, early": (cut_bin(0.01, zipped=False), "pytorch_model.bin cannot be read: ", "convert it to safetensors"),
    "page as bin": (written("pytorch_model.bin", b"<!DOCTYPE html><html>"), "no file of weights: it begins with b'<!DOCTYPE html><'", "Repair"),
    "list in bin": (of_bin([torch.zeros(2)]), "holds no table of tensors, it holds a list", "Choose a file of weights"),
    "nested bin": (of_bin({"epoch": 3, "state_dict": {}}), "holds no table of tensors: its 'epoch' is a int", "state_dict alone"),
    "program as bin": (scripted, r"something other than tensors \(a TorchScript program\)", "from a source you trust"),
    "pointer": (written("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer", "Repair"),
    "no weights": (without("model.safetensors"), "There are no weights: neither", "Repair"),
    "not finite": (tensors("v2/tiny", not_finite), "its logits are not finite", "Copy the checkpoint again"),
    "whole numbers": (tensors("v2/tiny", whole_numbers), "final_layernorm.weight is stored as I32, where floats belong", "Repair"),
    "in both shards": (both_hold, "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors both hold transformer.output_layer.weight", "Copy the checkpoint again"),
    # index
    "pointer as index": (written("model.safetensors.index.json", POINTER), "model.safetensors.index.json is a Git LFS pointer", "Repair"),
    "no weight_map": (written("model.safetensors.index.json", b'{"metadata": {}}'), "has no weight_map that gives every tensor its file", "Repair"),
    "weight_map of numbers": (written("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'), "has no weight_map that", "Repair"),
    "list as index": (written("model.safetensors.index.json", b"[]"), "model.safetensors.index.json holds no object", "Repair"),
    "cut index": (written("model.safetensors.index.json", b'{"weight_map": {'), "index.json cannot be read: Expecting property name", "Repair"),
    "index that leaves the folder": (written("model.safetensors.index.json", b'{"weight_map": {"a": "../secret.safetensors"}}'), "names '../secret.safetensors', which is no file of this folder", "Repair"),
    "index with a full path": (written("pytorch_model.bin.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'), "names '/etc/passwd', which is no file of this folder", "Repair"),
    # config.json
    "no config": (without("config.json"), "has no config.json", "Choose the folder"),
    "cut config": (written("config.json", b'{"model_type": '), "config.json cannot be read: Expecting value", "Copy config.json again"),
    "empty config": (written("config.json", b""), "config.json cannot be read: Expecting value", "Copy config.json again"),
    "list as config": (written("config.json", b"[]"), "config.json holds no object", "Copy config.json again"),
    "pointer as config": (written("config.json", POINTER), "config.json is a Git LFS pointer", "Copy config.json again"),
    "binary as config": (written("config.json", b"\xff\xfe\x00\xd8"), "config.json cannot be read: 'utf-8' codec", "Copy config.json again"),
    "deep config": (written("config.json", DEEP), "config.json cannot be read: maximum recursion depth", "Copy config.json again"),
    "no model_type": (configured(model_type=None), "config.json names no model_type", "Repair"),
    "vit": (configured(model_type="vit"), "model_type 'vit', which is no text model", "Repair"),
    "number as text": (configured(hidden_size="64"), "hidden_size '64', where a positive number belongs", "Repair"),
    "text for a number, v1": (configured("v1/tiny", num_layers="three"), "num_layers 'three', where a positive number", "Repair"),
    "no heads": (configured(num_attention_heads=0), "num_attention_heads 0, where a positive number", "Repair"),
    "epsilon as text": (configured("v1/tiny", layernorm_epsilon="1e-5"), "layernorm_epsilon '1e-5', where", "Repair"),
    "size missing": (configured(kv_channels=None), "config.json has no kv_channels", "Repair"),
    "odd size": (configured("v1/tiny", num_attention_heads=3), "hidden_size=64, which no published", "a multiple of 12"),
    # config.json and weights
    "v1 weights, v2 config": (mixed("v2/tiny", "v1/tiny"), "have no transformer.embedding.word_embeddings.weight, but lm_head", "Repair"),
    "v2 weights, v1 config": (mixed("v1/tiny", "v2/tiny"), "have no transformer.word_embeddings.weight, but transformer.emb", "Repair"),
    "llama": (configured(model_type="llama"), "have no model.embed_tokens.weight, but transformer.embedding", "Repair"),
    "hidden_size": (configured(hidden_size=128), r"has the shape \(160, 64\), config.json says \(160, 128\)", "Repair"),
    "vocabulary": (configured("v1/tiny", vocab_size=192), r"has the shape \(160, 64\), config.json says \(192, 64\)", "Repair"),
    "width of the middle": (configured(ffn_hidden_size=48), r"dense_.* has the shape .*, config.json says", "copy both from the same place"),
    "more layers stored": (configured(num_layers=2), "config.json says 2 layers, the weights have 3", "Repair"),
    "fewer layers stored": (configured("v1/tiny", num_layers=28), "config.json says 28 layers, the weights have 3", "Repair"),
    # INT8 and INT4
    "no scales": (tensors("v1/quant_int8", no_scales), r"\.weight_scale, without which its codes mean", "Repair"),
    "short scales": (tensors("v1/quant_int4", short_scales), r"weight_scale has the shape \(191,\), its layer has 192 rows", "Repair"),
    "INT4 not packed": (mixed("v1/quant_int4", "v1/quant_int8"), "as in INT8; config.json says quantization_bit 4", "Repair"),
    "INT8 packed": (mixed("v2/quant_int8", "v2/quant_int4"), "as in INT4; config.json says quantization_bit 8", "Repair"),
    "codes without bits": (configured("v2/quant_int8", quantization_bit=None), "is stored as I8, but config.json has no quantization_bit", "Repair"),
    "three bits": (configured(quantization_bit=3), "quantization_bit 3; INT8 and INT4 can be loaded", "Repair"),
    "bits as text": (configured("v1/quant_int4", quantization_bit="4"), "quantization_bit '4'; INT8 and INT4", "Repair"),
    # tokenizer
    "no tokenizer": (without("tokenizer.model"), "tokenizer.model is missing", "Repair"),
    "no tokenizer, v1": (without("ice_text.model", "v1/tiny"), "ice_text.model is missing", "Repair"),
    "empty tokenizer": (written("tokenizer.model", b""), "tokenizer.model is cut off: it is empty", "Repair"),
    "pointer as tokenizer": (written("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer", "Repair"),
    "cut tokenizer": (cut_tokenizer("v2/tiny", "tokenizer.model"), "tokenizer.model is not a readable sentencepiece file", "Copy tokenizer.model again"),
    "cut tokenizer, v1": (cut_tokenizer("v1/tiny", "ice_text.model"), "ice_text.model is not", "Copy ice_text.model again"),
    "larger tokenizer": (other_tokenizer, r"The tokenizer has \d+ ids, the weights only 160", "from the same checkpoint"),
    "tokenizer of v2 in v1": (swapped_tokenizer, "is not the vocabulary of ChatGLM-6B", "Copy ice_text.model again"),
    "cut tokenizer_config": (written("tokenizer_config.json", b'{"num_image'), "tokenizer_config.json cannot be read", "Repair"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_damaged_folder_is_refused_with_its_reason(make, how):
    damage, sentence, todo = REFUSED[how]
    folder = damage(make)
    with pytest.raises(GLMError, match=sentence) as caught:
        checkpoints.load(folder, "fp32", "cpu")
    assert todo in str(caught.value)


# ------------------------------------------------------------------------------------------------ odd, but loaded


def logits(folder: Path, **options: Any) -> torch.Tensor:
    loaded = checkpoints.load(folder, "fp32", "cpu", **options)
    ids = torch.tensor([loaded.tokenizer.chat_ids([Message("user", "你好")])])
    with torch.inference_mode():
        return loaded.model(input_ids=ids).logits


@pytest.mark.parametrize("golden", ["v1/tiny", "v2/tiny"])
def test_unknown_keys_of_config_json_are_left_alone(make, golden):
    plain = logits(make(golden))
    folder = make(golden, "more")
    config_of(
        folder, some_new_key=[1, {"a": "b"}], quantization_kernel="cuda", _attn_implementation_autoset=True
    )
    assert torch.equal(logits(folder), plain)


@pytest.mark.parametrize("name", ["100% ready  %20 %s", "模型 v1.1.0.", "-a'b\"c #?&="])
def test_any_name_of_a_folder_loads(make, name):
    plain = logits(make("v1/tiny"))
    folder = make("v1/tiny", f"{name}/chatglm")
    assert torch.equal(logits(folder), plain)
    as_bin(folder)
    assert torch.equal(logits(folder), plain)


def test_nothing_is_written_into_a_folder_that_is_read(make):
    folder = make("v1/tiny")
    as_bin(folder)

    def state() -> list[tuple[str, int, int]]:
        return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.iterdir()])

    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state()
    try:
        assert checkpoints.load(folder, "fp32", "cpu").info.loadable
        assert state() == before
    finally:
        folder.chmod(0o755)


def test_links_to_files_elsewhere_are_followed(make, tmp_path):
    """As in the cache of huggingface_hub, where every file of a snapshot is a link to ../../blobs."""
    folder = make("v2/tiny")
    plain = logits(folder)
    shards(folder)
    snapshot = tmp_path / "hub" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "hub" / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert torch.equal(logits(snapshot), plain)


@pytest.mark.parametrize("owner", [0, 1])
def test_a_tensor_in_two_shards_is_taken_from_the_one_in_the_index(make, owner):
    plain = logits(make("v2/tiny"))
    folder = make("v2/tiny", "twice")
    shards(folder, HEAD_V2, owner, change=0.5)
    assert torch.equal(logits(folder), plain) is (owner == 0)
    assert checkpoints.inspect(folder).parameters == checkpoints.inspect(folder.parent / "copy").parameters


def test_safetensors_are_read_before_bin_as_transformers_does(make):
    folder = make("v2/tiny")
    plain = logits(folder)
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    assert torch.equal(logits(folder), plain)
    shards(folder)
    assert torch.equal(logits(folder), plain)


def test_float_weights_under_a_quantized_config_become_its_codes(make):
    folder = make("v1/quant_int8")
    shutil.copy(GOLDEN / "v1/tiny/model.safetensors", folder)
    assert torch.equal(logits(folder), logits(make("v1/quant_int8", "released")))


def first_release(folder: Path, vocabulary: Path, vocab_size: int, images: int) -> Path:
    """A small model in the layout of ChatGLM-6B of March (150,528 ids) or April 2023 (130,528)."""
    from glm_core.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    published = GOLDEN / "published_configs" / "v1_v1.0_mar2023"
    raw = json.loads(published.with_suffix(".0_mar2023.config.json").read_text())
    folder.mkdir(parents=True)
    shutil.copy(f"{published}.tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.copy(vocabulary / "base.model", folder / "ice_text.model")
    control = chatglm.ChatGLMTokenizer(folder / "ice_text.model", {"num_image_tokens": images}).special
    raw |= {"hidden_size": 16, "inner_hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
            "vocab_size": vocab_size, "bos_token_id": control["<sop>"], "eos_token_id": control["<eop>"],
            "pad_token_id": images + 3}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(3)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_released(raw)).half()
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_the_first_release_with_150_528_ids_loads_and_answers(tmp_path, vocabularies):
    from glm_core.engine import Engine, GenerationSettings, Request

    folder = first_release(tmp_path / "chatglm-6b", vocabularies, 150_528, 20_000)
    assert "num_image_tokens" not in json.loads((folder / "tokenizer_config.json").read_text())
    loaded = checkpoints.load(folder, "fp32", "cpu")
    tokenizer = loaded.tokenizer
    assert min(tokenizer.chat_ids([Message("user", "你好")])) >= 20_000
    assert tokenizer.prefix_ids == (loaded.model.config.gmask_token_id, loaded.model.config.bos_token_id)
    assert tokenizer.special["[MASK]"] == loaded.model.config.mask_token_id
    engine = Engine(loaded)
    try:
        prompt = tokenizer.chat_ids([Message("user", "你好")])
        handle = engine.submit(Request(prompt, GenerationSettings(max_new_tokens=4, temperature=0.0)))
        assert handle.wait(60)
    finally:
        engine.close()
    with torch.inference_mode():
        first = int(loaded.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    assert handle.ids[0] == first


def test_the_shortened_vocabulary_of_april_2023_has_no_ids_for_pictures(tmp_path, vocabularies):
    """Its tokenizer_config.json does not say so: the rows of the embedding do."""
    folder = first_release(tmp_path / "chatglm-6b", vocabularies, 130_528, 0)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    rows = weights.listing(weights.weight_files(folder)[0])["transformer.word_embeddings.weight"].shape[0]
    tokenizer = chatglm.ChatGLMTokenizer(
        folder / "ice_text.model", config | {"num_image_tokens": rows - 130_528}
    )
    assert max(tokenizer.chat_ids([Message("user", "你好")])) < 1000
    assert tokenizer.first_release
    loaded = checkpoints.load(folder, "fp32", "cpu")
    assert loaded.tokenizer.chat_ids([Message("user", "你好")]) == tokenizer.chat_ids(
        [Message("user", "你好")]
    )


# ------------------------------------------------------------------------------------------------ adapters


def prefix(make: Make, name: str = "prefix", golden: str = "v2/ptuning_tiny_noproj") -> Path:
    return make(golden, name, tokenizer=False)


def lora(make: Make, name: str = "lora") -> Path:
    return make("v1/lora_tiny", name, tokenizer=False)


def adapter_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def emptied(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).unlink()
    return folder


def filled(folder: Path, file: str, content: bytes) -> Path:
    (folder / file).write_bytes(content)
    return folder


def renamed(folder: Path) -> Path:
    """The prefix without the name of the module it sits in."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(
        {name.split(".", 2)[2]: tensor for name, tensor in state.items()}, folder / "pytorch_model.bin"
    )
    return folder


def with_length(folder: Path, length: Any) -> Path:
    config_of(folder, pre_seq_len=length)
    return folder


REFUSED_ADAPTERS: dict[str, tuple[Callable[[Make], Path], str, str]] = {
    "prefix of another length": (lambda make: with_length(prefix(make), 9), "says pre_seq_len=9, the prefix tensors are for pre_seq_len=8", "Repair"),
    "prefix length as text": (lambda make: with_length(prefix(make), "8"), "pre_seq_len '8', where a positive number belongs", "Repair"),
    "no prefix": (lambda make: renamed(prefix(make)), "config.json says pre_seq_len 8, the weights hold no prefix", "Repair"),
    "cut prefix": (lambda make: filled(prefix(make), "pytorch_model.bin", (GOLDEN / "v2/ptuning_tiny_noproj/pytorch_model.bin").read_bytes()[:5000]), "pytorch_model.bin is cut off", "Repair"),
    "pointer as prefix": (lambda make: filled(prefix(make), "pytorch_model.bin", POINTER), "pytorch_model.bin is a Git LFS pointer", "Repair"),
    "prefix without weights": (lambda make: emptied(prefix(make), "pytorch_model.bin"), "There are no weights", "Repair"),
    "DoRA": (lambda make: adapter_config(lora(make), use_dora=True), "use_dora=True, which changes more than the low-rank product", "Merge this adapter"),
    "IA3": (lambda make: adapter_config(lora(make), peft_type="IA3"), "peft_type 'IA3'", "Only LORA is loaded"),
    "whole layers beside": (lambda make: adapter_config(lora(make), modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]", "Merge this adapter"),
    "LoRA without weights": (lambda make: emptied(lora(make), "adapter_model.bin", "adapter_model.safetensors"), "There is no adapter_model.safetensors or adapter_model.bin", "Repair"),
    "cut LoRA": (lambda make: filled(lora(make), "adapter_model.safetensors", (GOLDEN / "v1/lora_tiny/adapter_model.safetensors").read_bytes()[:9000]), "adapter_model.safetensors is cut off", "Copy the checkpoint again"),
    "rank as text": (lambda make: adapter_config(lora(make), r="eight"), "adapter_config.json says r 'eight'", "Copy adapter_config.json again"),
    "cut adapter_config": (lambda make: filled(lora(make), "adapter_config.json", b'{"r": '), "adapter_config.json cannot be read", "Copy adapter_config.json again"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED_ADAPTERS)
def test_a_damaged_adapter_is_refused_with_its_reason(make, how, monkeypatch):
    """Before a weight of the base is read."""
    damage, sentence, todo = REFUSED_ADAPTERS[how]
    folder = damage(make)
    base = make("v2/tiny" if "prefix" in how else "v1/tiny", "base")
    monkeypatch.setattr("glm_core.checkpoints.loading.tensors", unread)
    with pytest.raises(GLMError, match=sentence) as caught:
        checkpoints.load(folder, "fp32", "cpu", base=base)
    assert todo in str(caught.value)


def unread(*arguments: Any) -> Iterator[Any]:
    raise AssertionError("a weight of the base was read")


@pytest.mark.parametrize(
    ("adapter", "base", "changes", "sentence"),
    [
        ("v2/ptuning_tiny_noproj", "v1/tiny", {}, "trained on a ChatGLM2/3 of 3 layers, .*; base is a ChatGLM-6B of 3 layers"),
        ("v1/ptuning_tiny_proj", "v2/tiny", {}, "trained on a ChatGLM-6B of 3 layers, .*; base is a ChatGLM2/3 of 3 layers"),
        ("v1/ptuning_tiny_noproj", "v1/tiny28", {}, "of 3 layers, .* base is a ChatGLM-6B of 28 layers"),
        ("v1/lora_tiny", "v2/tiny", {}, "adapts transformer.layers.*; base is a ChatGLM2/3 of 3 layers"),
        ("v1/lora_tiny", "v1/tiny", {"num_layers": 2}, "adapts layer 3; base has 2 layers"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_is_refused_before_that_is_read(
    make, monkeypatch, adapter, base, changes, sentence
):
    folder, on = make(adapter, "adapter", tokenizer=False), make(base, "base")
    if changes:  # keep the base itself in order
        config_of(on, **changes)
        retype(on, lambda found: [found.pop(name) for name in list(found) if ".layers.2." in name] and None)
    assert checkpoints.inspect(on).loadable
    monkeypatch.setattr("glm_core.checkpoints.loading.tensors", unread)
    with pytest.raises(GLMError, match=sentence) as caught:
        checkpoints.load(folder, "fp32", "cpu", base=on)
    assert "Load the base it was trained on" in str(caught.value)


def test_the_adapters_that_are_whole_load(make):
    base = make("v1/tiny", "base")
    plain = logits(base)
    for folder in (lora(make), prefix(make, golden="v1/ptuning_tiny_noproj")):
        assert checkpoints.load(folder, "fp32", "cpu", base=base).info.needs_base
    assert not torch.equal(logits(folder.parent / "lora", base=base), plain)


def test_a_lora_that_was_never_trained_loads_and_changes_nothing(make):
    base, folder = make("v1/tiny", "base"), lora(make)
    file = folder / "adapter_model.safetensors"
    save_file({name: t * 0 if "lora_B" in name else t for name, t in load_file(file).items()}, file)
    assert torch.equal(logits(folder, base=base), logits(base))
    loaded = checkpoints.load(folder, "fp32", "cpu", base=base)
    assert "Every B of this adapter is zero" in loaded.notes[0]


# ------------------------------------------------------------------------------------------------ code in the files


class Planted:
    """What a pickle holds that creates a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(file: Path, mark: Path, how: str) -> None:
    """A file of weights with a call of posix.mkdir in it, in one of the formats torch has had."""
    content = {"transformer.prefix_encoder.embedding.weight": Planted(mark), "weight": torch.zeros(2)}
    if how == "zip":
        torch.save(content, file)
    elif how == "old":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif how == "tar":
        (mark.parent / "pickle").write_bytes(pickle.dumps({"weight": Planted(mark)}, protocol=2))
        with tarfile.open(file, "w") as archive:
            for member in ("sys_info", "pickle", "storages", "tensors"):
                archive.add(mark.parent / "pickle", member)
    elif how == "protocol 4 GLOBAL":
        file.write_bytes(
            b"\x80\x04cposix\nmkdir\nX"
            + len(str(mark)).to_bytes(4, "little")
            + str(mark).encode()
            + b"\x85R."
        )
    else:
        file.write_bytes(pickle.dumps({"weight": Planted(mark)}, protocol=int(how[-1])))


FORMATS = ("zip", "old", "tar", "protocol 4 GLOBAL", "protocol 0", "protocol 2", "protocol 4", "protocol 5")


def test_the_planted_call_would_work(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("place", ["weights", "shard", "prefix", "lora", "safetensors"])
def test_a_call_in_a_pickle_is_never_made(make, tmp_path, how, place):
    mark = tmp_path / "executed"
    base = None
    if place in ("prefix", "lora"):
        base = make("v2/tiny" if place == "prefix" else "v1/tiny", "base")
        folder = prefix(make) if place == "prefix" else lora(make)
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        file = folder / ("pytorch_model.bin" if place == "prefix" else "adapter_model.bin")
    else:
        folder = make("v2/tiny")
        file = folder / ("model.safetensors" if place == "safetensors" else "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        if place == "shard":
            file = folder / "pytorch_model-00001-of-00001.bin"
            index_file = folder / "pytorch_model.bin.index.json"
            index_file.write_text(json.dumps({"weight_map": {"weight": file.name}}))
    pickled(file, mark, how)
    with pytest.raises(GLMError) as caught:
        checkpoints.load(folder, "fp32", "cpu", base=base)
    assert file.name in caught.value.message
    if place != "safetensors" and how not in ("tar", "protocol 0"):
        assert "holds something other than tensors (posix.mkdir), so it was not opened" in str(caught.value)
    checkpoints.find([folder.parent])
    assert not mark.exists()


def test_pickles_beside_the_weights_are_not_opened(make, tmp_path):
    folder = make("v1/tiny")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "adapter_model.bin",
        "pytorch_model.bin",
    ):
        pickled(folder / name, tmp_path / "executed", "protocol 4")
    assert checkpoints.load(folder, "fp32", "cpu").info.loadable
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------ many at once


def test_find_lists_every_damaged_folder_with_its_problem(make, tmp_path):
    everything = REFUSED | REFUSED_ADAPTERS
    for number, (damage, *_) in enumerate(everything.values()):
        damage(
            lambda golden, name="copy", tokenizer=True, n=number: make(golden, f"{n:03} {name}", tokenizer)
        )  # type: ignore[misc]
    make("v3/tiny", "whole")
    models = tmp_path / "models"
    (models / "circle").symlink_to(models / "circle")
    (models / "up").symlink_to(models)
    (models / "gone").symlink_to(models / "nowhere")
    (models / "file.txt").write_text("no folder")
    (models / "folder" / "config.json").mkdir(parents=True)
    found = checkpoints.find([models, models / "circle", models / "nowhere", models / "file.txt"])
    names = [info.name for info in found]
    assert len(names) == len(set(names)) and "whole" in names
    seen_while_loading = {
        "not finite", "width of the middle", "odd size", "cut old bin", "cut old bin, early", "program as bin",
        "list in bin", "nested bin", "cut tokenizer", "cut tokenizer, v1", "larger tokenizer", "tokenizer of v2 in v1",
    }  # fmt: skip
    for number, how in enumerate(everything):
        listed = [info for info in found if info.name.startswith(f"{number:03} copy")] or [
            info for info in found if info.name.startswith(f"{number:03} ")
        ]
        if how == "no config":
            assert not listed
        elif how not in seen_while_loading:
            assert not listed[0].loadable and all(listed[0].problems), how
    assert next(info for info in found if info.name == "whole").loadable


def test_a_link_in_a_circle_leads_to_no_folder(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path / "circle", tmp_path / "circle" / "x", Path("a\0b")):
        with pytest.raises(GLMError, match="There is no folder|leads to no folder"):
            checkpoints.inspect(path)


# ------------------------------------------------------------------------------------------------ saving


def state(fail: BaseException | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.zeros(10)
    if fail is not None:
        raise fail
    yield "b", torch.ones(10)


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), RuntimeError("stopped"), MemoryError()])
def test_a_stopped_save_leaves_nothing(tmp_path, fail, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 40)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(type(fail)):
        saving.write(target, state(fail), {"model_type": "chatglm"}, tmp_path)
    assert list(tmp_path.iterdir()) == [target] and not any(target.iterdir())
    assert saving.write(target, state(), {"model_type": "chatglm"}, tmp_path) == target
    assert (target / "config.json").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_that_was_killed_is_no_checkpoint_and_the_next_one_clears_it(make, tmp_path):
    left = make("v2/tiny", f"out{checkpoints.inspecting.UNFINISHED}")
    assert checkpoints.find([left.parent]) == []
    target = saving.write(left.parent / "out", state(), {"model_type": "chatglm"}, tmp_path)
    assert not left.exists() and (target / "config.json").is_file()


def test_a_folder_of_the_users_with_that_name_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(GLMError, match="out.partial exists already"):
        saving.write(tmp_path / "out", state(), {}, tmp_path)
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_config_json_is_written_last(tmp_path, monkeypatch):
    order = []
    write_json = saving._write_json
    monkeypatch.setattr(
        saving, "_write_json", lambda path, value: (order.append(path.name), write_json(path, value))
    )
    monkeypatch.setattr(saving, "SHARD_BYTES", 40)
    out = saving.write(
        tmp_path / "out", state(), {}, tmp_path, tokenizer_config={"glm_generation": "chatglm3"}
    )
    assert order == ["model.safetensors.index.json", "tokenizer_config.json", "config.json"]
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"glm_generation": "chatglm3"}


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*arguments: Any, **options: Any) -> None:
    from safetensors import SafetensorError

    raise SafetensorError(
        'Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'
    )


@pytest.mark.parametrize(
    ("where", "how"),
    [("safetensors.torch.save_file", full), ("safetensors.torch.save_file", full_in_rust), ("shutil.copyfile", full)],
)  # fmt: skip
def test_a_full_disk_is_said_and_leaves_nothing(make, tmp_path, monkeypatch, where, how):
    loaded = checkpoints.load(make("v2/tiny"), "fp32", "cpu")
    monkeypatch.setattr(where, how)
    target = tmp_path / "out"
    with pytest.raises(GLMError, match=f"{target} cannot be written: .*No space left on device") as caught:
        checkpoints.save(loaded, target)
    assert "enough room" in caught.value.todo
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_too_little_room_is_said_with_both_numbers_before_anything_is_written(make, tmp_path, monkeypatch):
    loaded = checkpoints.load(make("v2/tiny"), "fp32", "cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(GLMError, match=r"out needs 0.0 GiB; 0.0 GiB are free there"):
        checkpoints.save(loaded, tmp_path / "out")
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_a_prefix_that_cannot_be_exported_leaves_nothing(make, tmp_path, monkeypatch):
    folder = prefix(make)
    exported = checkpoints.export(folder, tmp_path / "exported")
    assert checkpoints.inspect(exported).adapter == checkpoints.inspect(folder).adapter
    for fails in (
        full,
        lambda *a: (_ for _ in ()).throw(RuntimeError("[enforce fail] . unexpected pos 1 vs 0\nmore")),
    ):
        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(GLMError, match="out cannot be written"):
            checkpoints.export(folder, tmp_path / "out")
        assert not any(path.name.startswith("out") for path in tmp_path.iterdir())
