"""Ids, prompts and answers of the v2/v3 tokenizer; against the released vocabulary where it is present."""

from __future__ import annotations

import json

import pytest

from glm_core.errors import GLMError
from glm_core.settings import MINI
from glm_core.tokenizers.chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, Message
from tests.conftest import GOLDEN, SHARED

RELEASED = SHARED / "vocab" / "tokenizer.model"
released = pytest.mark.skipif(
    not RELEASED.is_file(), reason="the released tokenizer.model is not on this machine"
)


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(MINI / "tokenizer.model")


def reference(generation: str) -> dict:
    return json.loads((GOLDEN / generation / "tokenizer.json").read_text(encoding="utf-8"))


@released
@pytest.mark.parametrize(("folder", "generation"), [("v2", "chatglm2"), ("v3", "chatglm3")])
def test_ids_and_texts_equal_the_reference(folder, generation):
    ours = ChatGLM2Tokenizer(RELEASED, generation)
    for case in reference(folder)["encode"]:
        ids = ours.encode(case["text"])
        assert ids == case["ids_no_special"], case["text"]
        assert ours.decode(ids) == case["decode_no_special"], case["text"]


@released
def test_chat_prompts_equal_the_reference():
    ours = ChatGLM2Tokenizer(RELEASED, "chatglm3")
    for case in reference("v3")["build_single_message"]:
        assert ours.message_ids(Message(case["role"], case["message"], case["metadata"])) == case["ids"]
    checked = 0
    for case in reference("v3")["build_chat_input"]:
        history = case["history"] or []
        if any("tools" in message for message in history):
            continue
        messages = [Message(m["role"], m["content"], m.get("metadata", "")) for m in history]
        messages.append(Message(case["role"], case["query"]))
        assert ours.chat_ids(messages) == case["out"]["input_ids"][0]
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize(
    "text", ["[gMASK]sop", "<|user|>\n你好<|assistant|>", "</s>", "<unk>", "[MASK] eop", "<|observation|>"]
)
@pytest.mark.parametrize("generation", ["chatglm2", "chatglm3"])
def test_user_text_never_becomes_a_control_token(text, generation):
    tokenizer = ChatGLM2Tokenizer(MINI / "tokenizer.model", generation)
    assert all(2 < i < tokenizer.n_pieces for i in tokenizer.encode(text))
    control = [i for i in tokenizer.chat_ids([Message("user", text)]) if i >= tokenizer.n_pieces]
    roles = (
        [tokenizer.special["<|user|>"], tokenizer.special["<|assistant|>"]]
        if generation == "chatglm3"
        else []
    )
    assert control == [*tokenizer.prefix_ids, *roles]


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！",
        "Hello  world",
        " leading",
        "a\nb\n\nc",
        "🎉 emoji",
        "ＦＵＬＬ width",
        "\tTab",
        "é ñ ü 🤖👍🏽",
    ],
)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_answer_ends_with_the_end_token_and_reads_back(tokenizer):
    ids = tokenizer.answer_ids("垃圾")
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.answer_text(ids) == "垃圾"


def test_a_character_cut_in_half_is_held_back_while_streaming(tokenizer):
    ids = tokenizer.encode("\n") + tokenizer.encode("好🦩")
    shown = [tokenizer.answer_text(ids[:n], finished=False) for n in range(len(ids) + 1)]
    assert shown[-1] == "好🦩"
    assert all("\ufffd" not in text for text in shown)
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False))


def test_chatglm2_numbers_its_rounds_from_one(tokenizer):
    two = ChatGLM2Tokenizer(MINI / "tokenizer.model", "chatglm2")
    ids = two.chat_ids([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    assert two.decode(ids) == "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："


def test_chatglm2_refuses_a_system_prompt(tokenizer):
    two = ChatGLM2Tokenizer(MINI / "tokenizer.model", "chatglm2")
    with pytest.raises(GLMError, match="no system prompt"):
        two.chat_ids([Message("system", "be brief"), Message("user", "hi")])


def test_stops_are_the_end_token_and_from_v3_on_the_next_speaker(tokenizer):
    assert tokenizer.stop_ids == {2, tokenizer.special["<|user|>"], tokenizer.special["<|observation|>"]}
    assert ChatGLM2Tokenizer(MINI / "tokenizer.model", "chatglm2").stop_ids == {2}
    assert [tokenizer.special[name] - tokenizer.n_pieces for name in ROLE_TOKENS] == [5, 6, 7, 8]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(GLMError, match=r"tokenizer\.model is not a readable"):
        ChatGLM2Tokenizer(tmp_path / "tokenizer.model")
