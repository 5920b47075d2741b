"""Released folders of every generation, filled tensor by tensor, give the reference's numbers; and go back unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_core import weights
from glm_core.checkpoints import inspecting, loading, saving
from glm_core.errors import GLMError
from glm_core.models import released
from tests.conftest import GOLDEN

ATOL = 5e-5  # the reference's cached and uncached logits differ by up to 2.5e-5, on logits of scale 7
FOLDERS = ("v1/tiny", "v1/tiny/sharded", "v1/tiny28", "v2/tiny", "v2/tiny/sharded", "v3/tiny", "v3/tiny/sharded",
           "v1/quant_int8", "v1/quant_int4", "v1/quant_int4_qe", "v2/quant_int8", "v2/quant_int4")  # fmt: skip
CASES = {
    "v1": ("single_gmask", "single_long"),
    "v2": ("single", "single_long"),
    "v3": ("single", "single_long"),
}


def filled(folder: Path, dtype: torch.dtype = torch.float32, bits: int | None = None) -> tuple[Any, Any]:
    """(model, report) of a folder, without its tokenizer."""
    raw = inspecting.read_config(folder)
    stored = int(raw.get("quantization_bit") or 0)
    found, problems = weights.weight_files(folder)
    assert not problems
    generation = "chatglm" if inspecting.architecture_of(raw) == "chatglm" else "chatglm3"
    model = loading.empty_model(inspecting.architecture_of(raw), raw, generation)
    report = loading.fill(
        model, found, dtype, stored if bits is None else bits, bool(raw.get("quantization_embeddings"))
    )
    return model.eval(), report


def expected(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input ids, logits) of the reference for a folder."""
    generation, name = folder.split("/")[:2]
    arrays = np.load(GOLDEN / generation / (f"{name}.npz" if name.startswith("quant") else f"io_{name}.npz"))
    names = [f"{case}/" for case in CASES[generation]] if "logits" not in arrays else [""]
    return [(arrays[f"{n}input_ids"], arrays[f"{n}logits"]) for n in names if f"{n}logits" in arrays]


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_equal_the_reference(folder):
    model, report = filled(GOLDEN / folder)
    assert not report.unused and not report.missing
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    cases = expected(folder)
    assert cases
    for ids, logits in cases:
        with torch.inference_mode():
            ours = model(input_ids=torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(ours, logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("folder", ["v1/tiny", "v2/tiny", "v3/tiny"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_while_reading_gives_the_released_codes(folder, bits, tmp_path):
    """The codes are those of quant_int*/ where the reference wrote them, and what is written loads to the same numbers."""
    model, _ = filled(GOLDEN / folder, bits=bits)
    theirs = GOLDEN / folder.split("/")[0] / f"quant_int{bits}"
    state = dict(released.to_released(model.state_dict(), model.config))
    if theirs.is_dir():
        stored = load_file(theirs / "model.safetensors")
        for name in stored:
            if name.endswith(".weight") and stored[name].dtype == torch.int8:
                assert torch.equal(state[name], stored[name]), name
                assert torch.equal(state[f"{name}_scale"], stored[f"{name}_scale"]), name
    config = json.loads((GOLDEN / folder / "config.json").read_text()) | {"quantization_bit": bits}
    again, report = filled(saving.write(tmp_path / "out", state.items(), config, GOLDEN / folder))
    assert not report.unused and not report.missing
    ids = torch.tensor([[20, 21, 22, 151, 154]])
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("folder", ["v1/tiny", "v1/tiny28", "v2/tiny", "v3/tiny"])
def test_a_saved_checkpoint_has_the_released_names_shapes_and_bits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 60_000)  # several shards
    source = load_file(GOLDEN / folder / "model.safetensors")
    source = {name: tensor for name, tensor in source.items() if not name.endswith("inv_freq")}
    # LayerNorms of ChatGLM-6B are stored in fp32; one dtype is what a model computes in.
    model, _ = filled(GOLDEN / folder, torch.float16)
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    state = released.to_released(model.state_dict(), model.config)
    out = saving.write(tmp_path / "out", state, config, GOLDEN / folder)
    written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], source[name].half()) for name in source)
    assert len(list(out.glob("*.safetensors"))) > 1
    again, _ = filled(out, torch.float16)
    twice = saving.write(
        tmp_path / "twice", released.to_released(again.state_dict(), again.config), config, out
    )
    for file in out.glob("*.safetensors"):
        assert (twice / file.name).read_bytes() == file.read_bytes()


def test_a_bin_of_either_age_loads_and_old_tar_files_are_refused(tmp_path):
    folder = Path(
        shutil.copytree(GOLDEN / "v2/tiny", tmp_path / "copy", ignore=shutil.ignore_patterns("sharded"))
    )
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    reference, _ = filled(GOLDEN / "v2/tiny")
    for zipped in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert weights.can_list(weights.weight_files(folder)[0]) is zipped
        model, _ = filled(folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    import tarfile

    with tarfile.open(folder / "pytorch_model.bin", "w") as archive:
        archive.add(folder / "config.json", "sys_info")
    with pytest.raises(GLMError, match="cannot be read"):
        filled(folder)


def test_a_truncated_bin_is_named_before_it_is_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-200])
    assert weights.weight_files(tmp_path)[1] == [
        f"{file.name} is cut off: it has {file.stat().st_size:,} bytes and no end; copy it again."
    ]
    file.write_bytes(b"")
    assert "is empty" in weights.weight_files(tmp_path)[1][0]


def test_weights_of_another_model_are_named(tmp_path):
    folder = Path(
        shutil.copytree(GOLDEN / "v2/tiny", tmp_path / "copy", ignore=shutil.ignore_patterns("sharded"))
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.extra"] = torch.zeros(3)
    del tensors["transformer.output_layer.weight"]
    save_file(tensors, folder / "model.safetensors")
    _, report = filled(folder)
    assert report.unused == ("transformer.extra",) and report.missing == ("lm_head.weight",)
    config = json.loads((folder / "config.json").read_text()) | {"ffn_hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GLMError, match="mlp.dense_.*.weight has the shape .*, config.json says"):
        filled(folder)


@pytest.mark.parametrize(
    ("ratio", "generation", "base", "divisor"),
    [(50, "chatglm3", 500_000.0, 1), (50, "chatglm2", 10_000.0, 50), (1, "chatglm2", 10_000.0, 1)],
)
def test_long_context_editions_scale_their_positions(ratio, generation, base, divisor):
    """ChatGLM3-32k and GLM-4 raise the base of the frequencies, ChatGLM2-32k divides the positions."""
    raw = json.loads((GOLDEN / "v2/tiny/config.json").read_text()) | {"rope_ratio": ratio}
    model = loading.empty_model("chatglm2", raw, generation)
    dims = raw["kv_channels"] // 2
    formula = base ** (-torch.arange(0, dims, 2).double() / dims) / divisor
    assert torch.allclose(model.model.rotary_emb.inv_freq.double(), formula, rtol=1e-6)


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path):
    def state():
        yield "a", torch.zeros(10)
        raise OSError("No space left on device")

    with pytest.raises(GLMError, match="No space left"):
        saving.write(tmp_path / "out", state(), {}, tmp_path)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(GLMError, match="exists already"):
        saving.write(tmp_path / "full", iter(()), {}, tmp_path)


def cached(file: Path) -> float:
    """The share of a file that is in memory, by looks at it that do not wait for the disk."""
    there = looked = 0
    with file.open("rb") as opened:
        for place in range(0, file.stat().st_size, 64 << 10):
            looked += 1
            with contextlib.suppress(BlockingIOError):
                there += os.preadv(opened.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
    return there / looked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told what to keep in memory")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_what_was_read_of_large_files_gives_its_memory_back_and_is_read_again(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WINDOW_BYTES", 1 << 20)
    state = {name: torch.randn(1 << 20) for name in "abcdef"}
    state["g"] = state["a"]  # one memory of two names
    file = tmp_path / f"重量.{'safetensors' if kind == 'safetensors' else 'bin'}"
    if kind == "safetensors":
        save_file(state | {"g": state["a"].clone()}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    os.sync()
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(file) > 0.1:
        pytest.skip("this file system is in memory")
    for share, kept in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(weights, "KEPT_SHARE", share)
        found = dict(weights.tensors([file]))
        assert cached(file) > 0.9 if kept or kind == "pickle" else cached(file) < 0.1
        # Views outlive what was given back.
        assert all(torch.equal(found[name], state[name]) for name in state)
        del found  # pages that somebody has mapped stay


def test_only_the_pages_of_that_file_are_given_back(tmp_path):
    file, tensor = tmp_path / "a", torch.arange(1 << 20)
    file.write_bytes(bytes(100))
    with contextlib.suppress(OSError, AttributeError):
        weights._give_back(file, tensor.data_ptr(), tensor.nbytes)
    assert torch.equal(tensor, torch.arange(1 << 20))


def test_looking_into_files_reads_none_of_their_weights(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(weights._Reading, "__init__", lambda *given: started.append(given))
    assert weights.listing(weights.weight_files(GOLDEN / "v2/tiny")[0]) and not started


def test_who_wants_a_part_has_nothing_else_read(monkeypatch):
    given = []
    monkeypatch.setattr(
        weights, "_Reading", lambda files: given.append(tuple(files)) or contextlib.nullcontext(Passed())
    )
    files, _ = weights.weight_files(GOLDEN / "v2/tiny/sharded")
    whole = dict(weights.tensors(files))
    assert (
        dict(weights.tensors(files, "transformer.encoder.final_layernorm.weight".__eq__)).keys()
        < whole.keys()
    )
    assert given == [tuple(files), ()]


class Passed:
    def passed(self, file, tensor):
        pass
