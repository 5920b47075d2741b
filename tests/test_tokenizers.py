"""Ids, prompts, answers and training rows of every tokenizer; against the references' numbers where the vocabulary is.

Everything here is exact: ids and texts are equal or wrong.
"""

from __future__ import annotations

import base64
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core.checkpoints import load_tokenizer
from glm_core.errors import GLMError
from glm_core.settings import MINI
from glm_core.tokenizers import chatglm, chatglm2, glm4
from glm_core.tokenizers.base import GLMTokenizer, settled
from glm_core.tokenizers.chatglm import ChatGLMTokenizer
from glm_core.tokenizers.chatglm2 import ROLE_TOKENS, ChatGLM2Tokenizer, Message
from glm_core.tokenizers.glm4 import GLM4Tokenizer
from tests.conftest import GOLDEN, SHARED

RELEASED = SHARED / "vocab" / "tokenizer.model"
RELEASED_V1 = SHARED / "vocab" / "ice_text.model"
released = pytest.mark.skipif(
    not (RELEASED.is_file() and RELEASED_V1.is_file()),
    reason="the released vocabularies are not on this machine",
)
FOLDERS = {"v1": "chatglm", "v2": "chatglm2", "v3": "chatglm3"}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@functools.cache
def from_release(folder: str, **config) -> GLMTokenizer:
    if folder == "v1":
        return ChatGLMTokenizer(RELEASED_V1, config or None)
    return ChatGLM2Tokenizer(RELEASED, FOLDERS[folder])


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(MINI / "tokenizer.model")


@pytest.fixture(scope="module")
def base_vocabulary(tmp_path_factory) -> Path:
    """A small unigram file made like ice_text.model before its control, whitespace and byte pieces were added."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("v1")
    lines = [line["text"] for line in golden("v1/tokenizer.json")["encode"] if line["text"].strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(folder / "ice_text"), model_type="unigram",
        vocab_size=400, hard_vocab_limit=False, character_coverage=0.98, pad_id=3, user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc", split_digits=True, minloglevel=2,
    )  # fmt: skip
    return folder / "ice_text.model"


# What the ranks of a small GLM-4 vocabulary are made of: every byte, then these in order.
MERGED = [
    b"\xe4\xbd", "你".encode(), b"\xe5\xa5", "好".encode(), "你好".encode(), b"he", b"th", b"the", b" t", b" the",
    b"in", b"ing", b"aa", b"aaa", b"baa", b"ll", b"Hell", b"lo", b"12", b"23", b"\n\n", b"  ", b" \n", b"'s", b"<|",
    b"|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + MERGED)}


@pytest.fixture(scope="module")
def glm4_vocabulary(tmp_path_factory, ranks) -> Path:
    file = tmp_path_factory.mktemp("glm4") / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return file


@pytest.fixture(scope="module", params=["chatglm", "chatglm2", "chatglm3", "glm4"])
def any_tokenizer(request, base_vocabulary, glm4_vocabulary) -> GLMTokenizer:
    """Each generation on a vocabulary that every machine has."""
    if request.param == "chatglm":
        return ChatGLMTokenizer(base_vocabulary)
    if request.param == "glm4":
        return GLM4Tokenizer(glm4_vocabulary)
    return ChatGLM2Tokenizer(MINI / "tokenizer.model", request.param)


# --- against the references -------------------------------------------------------------------------------------


@released
@pytest.mark.parametrize("folder", FOLDERS)
def test_ids_and_texts_equal_the_reference(folder):
    ours, cases = from_release(folder), golden(f"{folder}/tokenizer.json")
    for case in cases["encode"]:
        text = case["text"]
        assert ours.reference_ids(text) == case["ids"], text
        assert ours.reference_ids(text, False) == case["ids_no_special"], text
        assert ours.reference_text(case["ids"]) == case["decode_ids"], text
        assert ours.reference_text(case["ids"], True) == case["decode_ids_skip_special"], text
        assert ours.reference_text(case["ids_no_special"]) == case["decode_no_special"], text
        if text != "<unk>":  # the program leaves an unknown piece out, v1's reference prints a mark for it
            assert ours.decode(case["ids_no_special"]) == case["decode_no_special_noclean"], text
    texts = [case["text"] for case in cases["encode"]]
    assert ours.encode_many(texts) == [ours.encode(text) for text in texts]
    for case in cases["pairs"]:
        assert ours.reference_ids(case["a"], pair=case["b"]) == case["ids"]
    for case in cases["truncation"]:
        assert ours.reference_ids(case["text"], max_length=case["max_length"]) == case["ids"]
        assert (
            ours.reference_ids(case["text"], False, max_length=case["max_length"]) == case["ids_no_special"]
        )
    for case in cases["call_single"]:
        assert ours.reference_ids(case["text"]) == case["out"]["input_ids"]
    for case in cases["call_batch_of_one"]:
        assert [ours.reference_ids(case["text"])] == case["out"]["input_ids"]
    for case in cases["batch_no_padding"]:
        assert [ours.reference_ids(text) for text in case["texts"]] == case["out"]["input_ids"]


@released
@pytest.mark.parametrize("folder", FOLDERS)
def test_decoding_equals_the_reference(folder):
    ours, cases = from_release(folder), golden(f"{folder}/tokenizer.json")
    for case in cases["prefix_decodes"]:
        ends = range(1, len(case["ids"]) + 1)
        assert [ours.reference_text(case["ids"][:n]) for n in ends] == case["prefix_decodes"]
    for case in cases["decode_id_lists"]:
        for skip, expected in ((False, case["decode"]), (True, case["decode_skip_special"])):
            if isinstance(expected, dict):
                assert expected["__error__"] == "IndexError"
                with pytest.raises(IndexError):
                    ours.reference_text(case["ids"], skip)
                assert ours.decode(case["ids"]) == ""  # a model has more ids than its vocabulary
            else:
                assert ours.reference_text(case["ids"], skip) == expected
    if folder == "v1":  # the others take the letters of a lone id's piece for pieces, which nobody asks for
        assert ours.reference_text([cases["decode_scalar"]["id"]]) == cases["decode_scalar"]["decode"]


@released
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["batch_padding", "batch_padding_max_length", "batch_pad_to_multiple_of_8"])
def test_padding_equals_the_reference(folder, kind):
    ours = from_release(folder)
    for case in golden(f"{folder}/tokenizer.json")[kind]:
        rows = [ours.reference_ids(text) for text in case["texts"]]
        padded = ours.pad(rows, case.get("max_length"), 8 if kind.endswith("8") else None)
        for name, expected in case["out"].items():
            assert np.array_equal(getattr(padded, name), np.array(expected)), (name, case["texts"])


@released
@pytest.mark.parametrize("folder", FOLDERS)
def test_vocabulary_facts_equal_the_reference(folder):
    ours, info = from_release(folder), golden(f"{folder}/tokenizer.json")["info"]
    assert (ours.vocab_size, ours.n_pieces) == (info["vocab_size"], info["sp_vocab_size"])
    if folder == "v1":
        assert (ours.eos_id, ours.pad_id, ours.stop_ids) == (info["eos"], info["pad"], {info["eos"]})
        assert ours.prefix_ids == (info["gmask"], info["bos"])
        assert {name: info["special_piece_ids"][name] for name in ours.special} == ours.special
    else:
        assert (ours.special, ours.eos_id, ours.pad_id) == (
            info["special_tokens"],
            info["eos_id"],
            info["pad_id"],
        )
        assert list(ours.prefix_ids) == info["prefix_tokens"]


@released
def test_v1_ids_of_the_older_family_and_texts_of_the_older_code_equal_the_reference():
    cases = golden("v1/tokenizer.json")
    older, info = from_release("v1", num_image_tokens=20_000), cases["num_image_tokens_20000"]["info"]
    assert (older.vocab_size, older.eos_id, older.pad_id) == (info["vocab_size"], info["eos"], info["pad"])
    assert older.prefix_ids == (info["gmask"], info["bos"])
    for case in cases["num_image_tokens_20000"]["encode"]:
        assert older.reference_ids(case["text"]) == case["ids"]
        assert older.encode_many([case["text"]]) == [case["ids"][:-2]]
        assert older.reference_text(case["ids"]) == case["decode"]
    assert older.reference_text([12]) == cases["num_image_tokens_20000"]["id_to_token"]["12"]
    assert older.decode([12, 20_005, 94_874]) == "你好"  # a picture id says nothing
    slim, later = from_release("v1", num_image_tokens=0, eos_token="</s>"), from_release("v1")
    assert cases["v0_1_0_code"]["encode_differs"] == []
    for case in cases["v0_1_0_code"]["decode"]:
        assert slim.reference_text(later.reference_ids(case["text"])) == case["decode_ids"]


@released
def test_v1_of_march_2023_ends_a_text_by_its_own_rule():
    config = golden("published_configs/v1_v1.0_mar2023.tokenizer_config.json")
    ours = ChatGLMTokenizer(RELEASED_V1, config)
    for text, pair, expected in [  # by hand from the rule that the code of March 2023 states (read, not run)
        ("你好", None, [20_005, 94_874, 150_001, 150_004]),
        ("你好[MASK]", None, [20_005, 94_874, 150_000, 150_004]),
        ("[MASK]你好", None, [150_000, 20_005, 94_874, 20_002, 150_004]),
        ("你好</s>", None, [20_005, 94_874, 20_002, 150_001, 150_004]),
        ("你好", "你好", [20_005, 94_874, 150_001, 150_004, 20_005, 94_874, 150_005]),
    ]:
        assert ours.reference_ids(text, pair=pair) == expected


@released
def test_v1_file_of_march_2023_is_completed_to_the_later_one(tmp_path):
    """The later file less the 344 pieces it was given, which are the last ones in front of the trainer's settings."""
    data, at, pieces = RELEASED_V1.read_bytes(), 0, []
    while data[at] == 0x0A:  # pieces, all shorter than 128 bytes
        pieces.append(data[at : at + 2 + data[at + 1]])
        at += len(pieces[-1])
    (tmp_path / "ice_text.model").write_bytes(b"".join(pieces[:-344]) + data[at:])
    shorter, whole = ChatGLMTokenizer(tmp_path / "ice_text.model"), from_release("v1")
    assert (len(pieces), shorter.vocab_size, shorter.special) == (130_344, whole.vocab_size, whole.special)
    for case in golden("v1/tokenizer.json")["encode"]:
        assert shorter.reference_ids(case["text"]) == case["ids"]
        assert shorter.reference_text(case["ids"]) == case["decode_ids"]


@released
def test_v1_whitespace_pieces_and_prompts_equal_the_reference():
    ours = from_release("v1")
    for case in golden("v1/tokenizer.json")["sp_encode"]:
        assert ours.encode(case["text"]) == case["default"]
        assert ours._prepared(case["text"]) == case["preprocessed"]
    for case in golden("v1/prompts_process_response.json")["chat_prompts"]:
        history = [tuple(pair) for pair in case["history"]]
        assert ours.prompt_text(case["query"], history or None) == case["prompt"]
        messages = [
            Message(("user", "assistant")[i], text) for pair in history for i, text in enumerate(pair)
        ]
        assert ours.chat_ids([*messages, Message("user", case["query"])]) == case["ids"]


@released
def test_v2_prompts_equal_the_reference():
    ours, cases = from_release("v2"), golden("v2/tokenizer.json")
    for case in cases["build_prompt"]:
        history = [tuple(pair) for pair in case["history"] or []]
        assert ours.prompt_text(case["query"], history) == case["prompt"]
        messages = [
            Message(("user", "assistant")[i], text) for pair in history for i, text in enumerate(pair)
        ]
        assert ours.chat_ids([*messages, Message("user", case["query"])]) == case["ids"]["input_ids"][0]
    for case in cases["build_stream_inputs"]:
        number = len(case["history"] or []) + 1
        appended = (
            ours.next_turn_ids(number, case["query"])
            if number > 1
            else ours.chat_ids([Message("user", case["query"])])
        )
        assert appended == case["out"]["input_ids"][0]


@released
def test_v3_prompts_equal_the_reference():
    ours, cases = from_release("v3"), golden("v3/tokenizer.json")
    for case in cases["build_single_message"]:
        assert ours.message_ids(Message(case["role"], case["message"], case["metadata"])) == case["ids"]
    for case in cases["build_chat_input"]:
        messages = [
            Message(m["role"], m["content"], m.get("metadata", ""), tuple(m.get("tools", ())))
            for m in case["history"] or []
        ]
        messages.append(Message(case["role"], case["query"]))
        assert ours.chat_ids(messages) == case["out"]["input_ids"][0]
    for case in cases["encode_special_tokens_true"]:
        assert ours.reference_ids(case["text"], encode_special_tokens=True) == case["ids"]
        assert ours.reference_text(case["ids"]) == case["decode"]


@released
@pytest.mark.parametrize("folder", ["v1", "v2"])
def test_evaluation_rows_equal_the_reference(folder):
    ours, cases = from_release(folder), golden(f"{folder}/ptuning_preprocess.json")
    for case in cases["cases"]:
        source, target = case["max_source_length"], case["max_target_length"]
        prompts, answers = [], []
        for row in cases["data"]:
            if not (row["content"] and row["summary"]):
                continue  # the scripts drop it
            history = [tuple(pair) for pair in row["history"]] if case["history_column_used"] else None
            # Evaluation numbers the rounds of v1 only where there are some.
            asked = ours.prompt_text(row["content"], history or (None if folder == "v1" else ()))
            prompts.append(ours.reference_ids(case["source_prefix"] + asked, max_length=source))
            answers.append(ours.reference_ids(row["summary"], max_length=target))
        padded = ours.pad(prompts)
        for name in {"input_ids", "attention_mask", "position_ids"} & set(case["eval"]):
            assert np.array_equal(getattr(padded, name), np.array(case["eval"][name])), name
        assert answers == [[i for i in row if i != -100] for row in case["eval"]["labels"]]


@pytest.mark.parametrize(
    ("file", "process"),
    [("v1/prompts_process_response.json", chatglm), ("v2/process_response.json", chatglm2)],
)
def test_answers_are_processed_as_by_the_reference(file, process):
    for case in golden(file)["process_response"]:
        assert process.process_response(case["in"]) == case["out"]


def test_v3_answers_and_calls_are_parsed_as_by_the_reference():
    for case in golden("v3/process_response.json")["process_response"]:
        before = json.dumps(case["history_in"])
        content, history = chatglm2.parse_response(case["in"], case["history_in"])
        assert (content, history) == (case["content"], case["history_out"])
        assert json.dumps(case["history_in"]) == before


@released
@pytest.mark.parametrize("folder", FOLDERS)
def test_shown_answers_equal_the_reference(folder):
    """From ids: the reference's decode and process_response; a call of a tool is shown as it was written."""
    ours = from_release(folder)
    file = "v1/prompts_process_response.json" if folder == "v1" else f"{folder}/process_response.json"
    for case in golden(file)["process_response"]:
        if folder == "v3":
            ids = ours.reference_ids(case["in"], False, encode_special_tokens=True)
            called = case["in"].rpartition("<|assistant|>")[2].strip()
            expected = case["content"] if isinstance(case["content"], str) else called
        else:
            ids = ours.encode(case["in"])
            expected = (chatglm if folder == "v1" else chatglm2).process_response(ours.reference_text(ids))
        assert ours.answer_text([*ids, ours.eos_id]) == expected


# --- every generation, on any machine ---------------------------------------------------------------------------


SPELLED = "[gMASK]<sop>sop</s><unk><pad><eop>[MASK]<|user|>\n你好<|assistant|><|observation|><|endoftext|>"


def test_text_never_becomes_a_control_token(any_tokenizer):
    ours = any_tokenizer
    control = set(ours.special.values()) | ours.stop_ids | {ours.pad_id}
    if not isinstance(ours, GLM4Tokenizer):
        control |= {0, 1, 2}
    assert not control & set(ours.encode(SPELLED))
    assert ours.decode(ours.encode(SPELLED)) == SPELLED
    question = [i for i in ours.chat_ids([Message("user", SPELLED)]) if i in control]
    assert question == [i for i in ours.chat_ids([Message("user", "x")]) if i in control]
    assert [i for i in ours.answer_ids(SPELLED) if i in control] == ours.answer_ids("")[-1:]


def test_reference_ids_take_control_tokens_literally_where_the_release_does(any_tokenizer):
    found = [i for i in any_tokenizer.reference_ids(SPELLED, False) if i in any_tokenizer.special.values()]
    names = {
        "chatglm": ["<sop>", "<eop>", "[MASK]"],
        "chatglm2": [],
        "chatglm3": [],
        "glm4": ["[gMASK]", "<sop>", "<eop>", "[MASK]", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    }  # fmt: skip
    assert found == [any_tokenizer.special[name] for name in names[any_tokenizer.generation]]


GROWING = [
    "你好，世界！",
    "他说: 好的, 再见!  然后走了 . 真的 ?",
    "it 's here , isn 't it ? don't, ' quoted ' end",
    "数据截止到[[训练时间]], 谢谢",
    "emoji 🦩🦩 好",
    "def f(x):\n    return x\n\n\tend  ",
    "[list] a, b, [[c]] ,,, !!! 中,!?:;文",
]


@pytest.mark.parametrize("text", GROWING)
def test_a_growing_answer_is_never_taken_back(any_tokenizer, text):
    ids = any_tokenizer.answer_ids(text)
    shown = [any_tokenizer.answer_text(ids[:n], finished=False) for n in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False)), shown
    whole = any_tokenizer.answer_text(ids)
    assert whole.startswith(shown[-1].rstrip()) and len(whole) - len(shown[-1]) <= 4
    assert not any("\ufffd" in one or "[[训" in one for one in shown)
    if "[[训练时间]]" in text:
        assert "2023年" in whole and "训练时间" not in whole


def test_an_answer_reads_back_and_ends_the_generation(any_tokenizer):
    ids = any_tokenizer.answer_ids("垃圾")
    assert ids[-1] in any_tokenizer.stop_ids and not any_tokenizer.stop_ids & set(ids[:-1])
    assert any_tokenizer.answer_text(ids) == any_tokenizer.answer_text(ids[:-1]) == "垃圾"
    assert any_tokenizer.answer_text([]) == any_tokenizer.answer_text([], finished=False) == ""


def test_rows_that_do_not_fit_are_not_padded(any_tokenizer):
    with pytest.raises(ValueError, match="3 ids"):
        any_tokenizer.pad([[5, 5, 5]], max_length=2)
    assert any_tokenizer.pad([[5, 5, 5], [6]]).input_ids.tolist() == [
        [5, 5, 5],
        [any_tokenizer.pad_id] * 2 + [6],
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a[", "a"), ("a[[训练", "a"), ("a[[训练时间]]", "a[[训练时间]]"), ("a[b", "a[b"), ("好\ufffd\ufffd", "好"), ("", "")],
)  # fmt: skip
def test_only_an_end_that_may_change_is_held_back(text, kept):
    assert settled(text) == kept


# --- ChatGLM-6B -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "told", "images"),
    [
        (150528, {"eos_token": "</s>"}, 20_000),  # March 2023
        (130528, {"eos_token": "</s>"}, 0),  # a week of April 2023: neither the key nor the pictures
        (130528, {"eos_token": "<eop>", "num_image_tokens": 0}, 0),
        (150528, {"num_image_tokens": 20_000}, 20_000),
        (150528, None, 20_000),  # tokenizer_config.json was not copied
        (130528, None, 0),
        (400, None, 0),
    ],
)
def test_v1_counts_its_picture_ids_by_the_rows_of_the_embedding(
    base_vocabulary, tmp_path, rows, told, images
):
    shutil.copy(base_vocabulary, tmp_path / "ice_text.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "vocab_size": rows}))
    if told is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    ours = load_tokenizer(tmp_path, "chatglm")
    assert isinstance(ours, ChatGLMTokenizer) and ours.num_image_tokens == images
    assert ours.first_release == ((told or {}).get("eos_token") == "</s>")
    plain = ChatGLMTokenizer(base_vocabulary)
    assert ours.encode("你好") == [i + images for i in plain.encode("你好")]


@pytest.mark.parametrize("text", ["a  b", "  \t\n\n x", "a" + " " * 250 + "b", "tab\tand   three\n"])
def test_v1_keeps_whitespace(base_vocabulary, text):
    assert ChatGLMTokenizer(base_vocabulary).decode(ChatGLMTokenizer(base_vocabulary).encode(text)) == text


def test_v1_shows_the_names_of_control_tokens_on_request(base_vocabulary):
    ours = ChatGLMTokenizer(base_vocabulary)
    ids = ours.chat_ids([Message("user", "a\nb")])
    assert ours.decode(ids) == "a\nb"
    assert ours.decode(ids, skip_special=False) == "a\nb[gMASK]<sop>"


def test_v1_knows_no_roles_and_no_foreign_vocabulary(base_vocabulary):
    with pytest.raises(GLMError, match="no system prompt"):
        ChatGLMTokenizer(base_vocabulary).chat_ids([Message("system", "be brief"), Message("user", "hi")])
    with pytest.raises(GLMError, match="not the vocabulary of ChatGLM-6B"):
        ChatGLMTokenizer(MINI / "tokenizer.model")
    with pytest.raises(GLMError, match="not a readable sentencepiece"):
        ChatGLMTokenizer(base_vocabulary.parent / "none.model")


def test_v1_reads_tokens_that_transformers_saved_as_objects(base_vocabulary):
    ours = ChatGLMTokenizer(base_vocabulary, {"eos_token": {"content": "</s>"}, "unk_token": None})
    assert (ours.first_release, ours.num_image_tokens) == (True, 20_000)
    assert ours.reference_ids("<unk>", False) == [20_000]


# --- GLM-4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # tiktoken 0.14.0 over the same ranks and regular expression
        ("你你好好", [257, 260, 259]),
        ("the thing", [263, 32, 262, 267]),
        ("then  the\n\n\nend", [263, 110, 32, 265, 276, 10, 101, 110, 100]),
        ("aaaaaaa baaaa", [268, 268, 269, 32, 270, 268]),
        ("Hello hello", [72, 101, 271, 111, 32, 261, 271, 111]),
        ("1234567", [274, 51, 52, 53, 54, 55]),
        ("it's IT'S", [105, 116, 279, 32, 73, 84, 39, 83]),
        ("<|user|>\n你好", [280, 117, 115, 101, 114, 281, 10, 260]),
        ("tab\tand\r\n  two", [116, 97, 98, 9, 97, 110, 100, 13, 10, 32, 264, 119, 111]),
        ("🦩\udc00", [240, 159, 166, 169, 239, 191, 189]),
    ],
)
def test_glm4_ids_equal_those_of_tiktoken(glm4_vocabulary, text, expected):
    assert GLM4Tokenizer(glm4_vocabulary).encode(text) == expected


def merged_by_hand(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """The definition: again and again, the pair of the lowest rank, of equal ones the leftmost, becomes one."""
    parts = [bytes([byte]) for byte in piece]
    while pairs := [
        (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
    ]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("ab", min_size=2, max_size=6), max_size=40), st.text("ab", min_size=1, max_size=80))
def test_glm4_merges_by_rank_then_from_the_left(tmp_path_factory, extra, text):
    """On vocabularies where tokens overlap in every way, which trained ones hardly do."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"aa", b"ab"] + [one.encode() for one in extra]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    whole = text.encode()
    assert GLM4Tokenizer(file).encode(text) == (
        [ranks[whole]] if whole in ranks else merged_by_hand(ranks, whole)
    )


def test_glm4_control_tokens_follow_the_ranks(glm4_vocabulary, ranks):
    ours = GLM4Tokenizer(glm4_vocabulary)
    n = len(ranks)
    assert (ours.n_pieces, ours.vocab_size) == (n, n + 14)
    # With the 151,329 ranks of the released file: 151329, 151336 and 151338, its published eos_token_id.
    assert ours.stop_ids == {n, n + 7, n + 9} and ours.eos_id == ours.pad_id == n
    assert ours.prefix_ids == (n + 2, n + 4)
    assert ours.answer_ids("") == [10, n + 7]
    roles = ("system", "user", "assistant", "observation")
    assert [ours.special[f"<|{role}|>"] for role in roles] == [n + 6, n + 7, n + 8, n + 9]
    assert ours.reference_ids("a<|user|>b", pair="c") == [n + 2, n + 4, 97, n + 7, 98, 99, n]
    assert ours.reference_ids("abcd", max_length=4) == [n + 2, n + 4, 97, 98]


def test_glm4_prompts_are_built_by_segment(glm4_vocabulary):
    ours = GLM4Tokenizer(glm4_vocabulary)
    tool = {"name": "weather", "parameters": {"city": "城市"}}
    messages = [
        Message("system", "be brief", tools=(tool, {"type": "function", "function": tool})),
        Message("user", "\n你好"),
        Message("assistant", '{"city": "x"}', "weather"),
        Message("observation", "12"),
    ]
    assert len({*messages}) == 4  # tools do not keep a message out of a set
    described = f"\n\n## weather\n\n{json.dumps(tool, ensure_ascii=False, indent=4)}\n{glm4.TOOLS_TAIL}"
    assert ours.decode(ours.chat_ids(messages), skip_special=False) == (
        f"[gMASK]<sop><|system|>\n{glm4.TOOLS_HEAD}{described * 2}<|system|>\nbe brief<|user|>\n\n你好"
        '<|assistant|>weather\n{"city": "x"}<|observation|>\n12<|assistant|>'
    )
    user = ours.message_ids(messages[1])
    assert user == [
        ours.special["<|user|>"],
        10,
        10,
        260,
    ]  # two line breaks apart, although one token has both
    with pytest.raises(GLMError, match="type 'python'"):
        ours.message_ids(Message("system", "", tools=({"type": "python"},)))


def test_glm4_shows_the_last_turn_and_reads_calls(glm4_vocabulary):
    ours = GLM4Tokenizer(glm4_vocabulary)
    answer = ours.encode("\nfirst") + [ours.special["<|assistant|>"]] + ours.encode('weather\n{"city": "x"}')
    assert ours.answer_text(answer) == 'weather\n{"city": "x"}'
    text = ours.reference_text(answer)
    content, history = glm4.parse_response(text, [{"role": "system", "content": "", "tools": [{}]}])
    assert content == {"name": "weather", "parameters": {"city": "x"}}
    assert [turn["content"] for turn in history[1:]] == ["first", '{"city": "x"}']
    for wrong in ("weather\n[1]", "weather\ncity"):
        with pytest.raises(GLMError, match="'weather'"):
            glm4.parse_response(wrong, [{"role": "system", "content": "", "tools": [{}]}])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not base64!! 0\n", "not a readable file of token ranks"),
        (b"YQ== 0\n", "255 of 256 bytes"),
        (b"YQ== 1\n", "do not count from 0"),
        (None, "not a readable file of token ranks"),
    ],
)
def test_glm4_refuses_what_is_no_file_of_ranks(tmp_path, content, reason):
    if content is None:
        content = (MINI / "tokenizer.model").read_bytes()  # ChatGLM3's file has the same name
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(GLMError, match=reason):
        GLM4Tokenizer(tmp_path / "tokenizer.model")


# --- ChatGLM2-6B and ChatGLM3-6B --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "tool_call(city=__import__('os').getcwd())",
        "tool_call('x')",
        "tool_call(**{'city': 'x'})",
        "print(city='x')",
        "tool_call(city='x'); tool_call(city='y')",
        "tool_call(city='x'",
        "tool_call(city=1 + open)",
        "",
        "tool_call(x=" + "(" * 5000 + "1" + ")" * 5000 + ")",
    ],
)
def test_v3_runs_nothing_a_model_wrote(call):
    with pytest.raises(GLMError, match="'weather'"):
        chatglm2.tool_arguments("weather", f"```python\n{call}\n```")


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
