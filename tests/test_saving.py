"""What a saved checkpoint must not lose: its prefix and its prompt format; and merges refused before anything is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from glm_core import checkpoints
from glm_core.checkpoints import loading, saving
from glm_core.errors import GLMError
from tests.pages.conftest import write_lora, write_prefix, write_whole_with_prefix


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny-chatglm3")


def test_a_prefix_in_a_whole_checkpoint_is_converted_with_it(base, tmp_path):
    source = write_whole_with_prefix(tmp_path / "whole", base)
    before = checkpoints.load(source, "bf16", "cpu")
    after = checkpoints.load(checkpoints.convert(source, tmp_path / "copy"), "bf16", "cpu")
    assert after.report.missing == after.report.unused == ()
    assert before.prefix is not None and after.prefix is not None
    theirs = after.prefix.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in before.prefix.state_dict().items())


def test_what_has_no_place_for_a_prefix_refuses_one(base, tmp_path):
    source = write_whole_with_prefix(tmp_path / "whole", base)
    with pytest.raises(GLMError, match="whole carries a P-tuning v2 prefix, which `glm` has no place for"):
        checkpoints.convert_to_glm(source, tmp_path / "native")
    with pytest.raises(GLMError, match="whole carries a prefix of its own"):
        checkpoints.merge(write_lora(tmp_path / "lora", base), tmp_path / "merged", source)
    alone = write_prefix(tmp_path / "prefix", base, recorded=str(base))
    with pytest.raises(GLMError, match="holds a P-tuning v2 prefix alone"):
        saving.save(checkpoints.load(alone, "fp32", "cpu", base=base), tmp_path / "copy")
    assert not any((tmp_path / name).exists() for name in ("native", "merged", "copy"))


@pytest.mark.parametrize("generation", ["chatglm2", "chatglm3"])
def test_a_new_name_changes_no_prompt(base, tmp_path, generation):
    marked = base / "tokenizer_config.json"
    told = json.loads(marked.read_text(encoding="utf-8")) if marked.is_file() else {}
    told.pop("glm_generation", None)
    marked.write_text(json.dumps(told), encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = base.rename(tmp_path / f"{generation}-mine")
    copy = checkpoints.convert(named, tmp_path / "spam model")
    assert checkpoints.inspect(copy).generation == checkpoints.inspect(named).generation == generation


def test_codes_refuse_a_merge_before_a_weight_is_read(base, tmp_path, monkeypatch):
    codes = checkpoints.convert(base, tmp_path / "codes", "int4")
    lora = write_lora(tmp_path / "lora", base)
    monkeypatch.setattr(loading, "fill", lambda *_: pytest.fail("the weights were read"))
    for where, precision in ((codes, "bf16"), (base, "int8")):
        with pytest.raises(GLMError, match="cannot be merged into INT8/INT4"):
            checkpoints.merge(lora, tmp_path / "merged", where, precision)
    with pytest.raises(GLMError, match="is no LoRA adapter"):
        checkpoints.merge(base, tmp_path / "merged")
