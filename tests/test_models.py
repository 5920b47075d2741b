"""The native classes give the numbers of the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from glm_core.errors import GLMError
from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM, released_config
from tests.conftest import GOLDEN

# The reference differs from itself by up to 2.5e-5 between cached and uncached decoding, on logits of scale 7.
ATOL = 5e-5


def load(generation: str, folder: str = "tiny") -> ChatGLM2ForCausalLM:
    path = GOLDEN / generation / folder
    config = ChatGLM2Config.from_released(json.loads((path / "config.json").read_text()))
    return ChatGLM2ForCausalLM.from_pretrained(str(path), config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["v2", "v3"])
def golden(request: pytest.FixtureRequest) -> tuple[ChatGLM2ForCausalLM, dict[str, np.ndarray]]:
    arrays = np.load(GOLDEN / request.param / "io_tiny.npz")
    return load(request.param), {key: arrays[key] for key in arrays}


@pytest.mark.parametrize(
    "case", ["single", "single_short", "single_two_sentences", "single_long", "teacher_forced", "batch"]
)
def test_logits_equal_the_reference(golden, case):
    model, arrays = golden
    ids, mask, positions = (
        torch.tensor(arrays[f"{case}/{key}"]) for key in ("input_ids", "attention_mask", "position_ids")
    )
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    real = mask.numpy().astype(bool)  # what the reference computes for padding is meaningless
    np.testing.assert_allclose(logits[real], arrays[f"{case}/logits"][real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["single", "single_short", "batch"])
def test_greedy_tokens_equal_the_reference(golden, case):
    model, arrays = golden
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(arrays[f"{case}/input_ids"]),
            attention_mask=torch.tensor(arrays[f"{case}/attention_mask"]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert out.numpy().tolist() == arrays[f"{case}/greedy_loop"].tolist()


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_shards_load_like_the_one_file(generation):
    one, shards = load(generation).state_dict(), load(generation, "tiny/sharded").state_dict()
    assert one.keys() == shards.keys()
    assert all(torch.equal(one[name], shards[name]) for name in one)


def test_released_config_survives_a_round_trip():
    raw = json.loads((GOLDEN / "v3" / "tiny" / "config.json").read_text())
    config = ChatGLM2Config.from_released(raw)
    written = released_config(config, "chatglm3", raw["seq_length"])
    assert {key: written[key] for key in raw if key in written and key not in ("_name_or_path",)} == {
        key: raw[key] for key in raw if key in written and key not in ("_name_or_path",)
    }


def test_a_variant_that_no_release_uses_is_refused():
    raw = json.loads((GOLDEN / "v3" / "tiny" / "config.json").read_text()) | {"multi_query_attention": False}
    with pytest.raises(GLMError, match="multi_query_attention=False"):
        ChatGLM2Config.from_released(raw)
