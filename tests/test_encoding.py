"""Encoded examples equal the released scripts' (tests/golden), the chat prompts, and what the cache gives back."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from glm_core.errors import GLMError
from glm_core.finetune import encoding
from glm_core.finetune.encoding import Cancelled, Encoded, Piece, encode, encode_all, encode_prompt, preview
from glm_core.finetune.examples import Example
from glm_core.finetune.methods import IGNORED
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message
from glm_core.tokenizers.chatglm import CONTROL_TOKENS, ChatGLMTokenizer
from glm_core.tokenizers.chatglm2 import MASK_TOKENS, ROLE_TOKENS, ChatGLM2Tokenizer
from glm_core.tokenizers.glm4 import GLM4Tokenizer
from glm_core.tokenizers.template import TemplateTokenizer
from tests.conftest import GOLDEN, REPOSITORY, SHARED

RELEASED = {"v1": SHARED / "vocab" / "ice_text.model", "v2": SHARED / "vocab" / "tokenizer.model"}
TEXTS = (
    "你好，世界！今天天气很好。",
    "What is the capital of France?",
    "Paris is the capital.",
    "加微信领福利 123",
)
GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4", "template")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HISTORY = (("早上好", "Good morning!"), ("<|user|> and [gMASK]", "  two  spaces\n"))


@functools.cache
def released(folder):
    if not RELEASED[folder].is_file():
        pytest.skip("the released vocabularies are not on this machine")
    return (
        ChatGLMTokenizer(RELEASED["v1"]) if folder == "v1" else ChatGLM2Tokenizer(RELEASED["v2"], "chatglm2")
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A small tokenizer of every kind, on vocabularies that every machine has."""
    import sentencepiece
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("vocabularies")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(folder / "ice_text"), model_type="unigram",
        vocab_size=200, hard_vocab_limit=False, character_coverage=0.98, pad_id=3, user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc", split_digits=True, minloglevel=2,
    )  # fmt: skip
    merged = [
        "你".encode()[:2],
        "你".encode(),
        b"he",
        b" t",
        b"the",
        "好".encode()[:2],
        "好".encode(),
        b"\n\n",
    ]
    ranks = [bytes([byte]) for byte in range(256)] + merged
    (folder / "ranks.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    chat = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2],
    )  # fmt: skip
    chat.chat_template = CHATML
    chat.save_pretrained(folder / "chat")
    return {
        "chatglm": ChatGLMTokenizer(folder / "ice_text.model"),
        "chatglm2": ChatGLM2Tokenizer(MINI / "tokenizer.model", "chatglm2"),
        "chatglm3": ChatGLM2Tokenizer(MINI / "tokenizer.model"),
        "glm4": GLM4Tokenizer(folder / "ranks.model"),
        "template": TemplateTokenizer(folder / "chat"),
    }


@pytest.fixture(params=GENERATIONS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


# --- against the references -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", RELEASED)
def test_rows_equal_the_reference_but_for_their_padding(folder):
    ours = released(folder)
    golden = json.loads((GOLDEN / folder / "ptuning_preprocess.json").read_text(encoding="utf-8"))
    pad = ours.pad_id
    for case in golden["cases"]:
        source, target = case["max_source_length"], case["max_target_length"]
        used = case["history_column_used"]
        options = {"source_prefix": case["source_prefix"]}
        examples = [
            Example(row["content"], row["summary"], tuple(map(tuple, row["history"])) if used else ())
            for row in golden["data"]
            if row["content"] and row["summary"]
        ]
        rows = encode_all(examples, ours, source, target, history_column=used, **options)
        assert len(rows) == len(case["train"]["input_ids"]) > 0
        for row, ids, labels in zip(rows, case["train"]["input_ids"], case["train"]["labels"], strict=True):
            n = len(row.ids)
            assert (list(row.ids), set(ids[n:])) == (ids[:n], {pad} if ids[n:] else set())
            # Where padding counts in the loss, the reference has its id for a label; ours never does.
            assert list(row.labels) == [IGNORED if i == pad else i for i in labels[:n]]
        for example, ids in zip(examples, case["eval"]["input_ids"], strict=True):
            prompt = encode_prompt(example, ours, source, **options)
            assert ids == [pad] * (len(ids) - len(prompt)) + prompt


def test_truncation_is_counted_in_ids(tokenizers):
    example = Example("加微信领福利 123" * 9, "你好，世界！今天天气很好。" * 9, HISTORY)
    for name in GENERATIONS:
        ours = tokenizers[name]
        whole, cut = encode(example, ours, 4000, 4000), encode(example, ours, 60, 12)
        start, whole_start = (sum(label == IGNORED for label in one.labels) for one in (cut, whole))
        assert (whole.truncated_source, whole.truncated_target) == (0, 0)
        assert len(cut.ids) + cut.truncated_source + cut.truncated_target == len(whole.ids), name
        if name not in ("chatglm", "chatglm2"):  # there a padding id within an answer is no label
            assert start + cut.truncated_source == whole_start
        assert cut.truncated_source > 0 and cut.truncated_target > 0


# --- what every generation gives ---------------------------------------------------------------------------------


def messages(example):
    turns = [
        one for asked, told in example.history for one in (Message("user", asked), Message("assistant", told))
    ]
    return [*turns, Message("user", example.prompt)]


@pytest.mark.parametrize("history", [(), HISTORY])
def test_a_row_is_the_chat_prompt_and_the_answer_that_counts(tokenizer, history):
    example = Example("今天天气很好 ok?", "你好，世界", history)
    row = encode(example, tokenizer, 500, 100)
    asked, told = tokenizer.chat_ids(messages(example)), tokenizer.answer_ids(example.response)
    assert list(row.ids) == asked + told
    first = len(asked) - (tokenizer.generation == "chatglm")  # its <sop> counts
    hole = tokenizer.pad_id if tokenizer.generation in ("chatglm", "chatglm2") else None
    assert row.labels[:first] == (IGNORED,) * first
    assert [*row.labels[first:]] == [IGNORED if i == hole else i for i in row.ids[first:]]
    assert row.ids[-1] == row.labels[-1] and row.ids[-1] in tokenizer.stop_ids
    assert encode_prompt(example, tokenizer, 500) == asked


def test_glm4_answers_end_with_the_users_turn(tokenizers):
    row = encode(Example("a", "b"), tokenizers["glm4"], 50, 50)
    assert row.labels[-1] == tokenizers["glm4"].special["<|user|>"]


def test_control_tokens_in_a_text_stay_text(tokenizer):
    control = {
        *CONTROL_TOKENS,
        *MASK_TOKENS,
        *ROLE_TOKENS,
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "</s>",
    }
    spelled = "".join(sorted(control))
    plain = Example("x", "y", (("u", "v"),))
    spelling = Example(spelled, spelled, ((spelled, spelled),))

    def controls(row):
        return [i for i in row.ids if i in {*tokenizer.special.values(), tokenizer.eos_id}]

    assert controls(encode(spelling, tokenizer, 9999, 9999)) == controls(encode(plain, tokenizer, 9999, 9999))


def test_a_first_question_is_numbered_only_for_a_history_column(tokenizers):
    ours = tokenizers["chatglm"]
    example = Example("你好", "hello")
    assert "Round" not in ours.decode(encode(example, ours, 99, 99).ids)
    numbered = encode(example, ours, 99, 99, history_column=True).ids
    assert ours.decode(numbered).startswith("[Round 0]\n")


@pytest.mark.parametrize("limit", [40, 60, 90])
def test_the_oldest_rounds_go_first_and_the_frame_stays(tokenizers, limit):
    for name in GENERATIONS[2:]:
        ours = tokenizers[name]
        frame = len(ours.chat_ids([Message("user", "")]))
        question = "今天天气很好 " * 2
        example = Example(question, "ok", tuple((f"question {i}", f"answer {i}") for i in range(6)))
        ids = encode_prompt(example, ours, limit)
        assert len(ids) <= limit and len(ids) > frame
        candidates = [
            ours.chat_ids(messages(Example(question, "ok", example.history[first:]))) for first in range(7)
        ]
        fitting = [one for one in candidates if len(one) <= limit]
        if fitting:
            assert ids == fitting[0], name
        else:
            assert ids[: frame // 2] == candidates[-1][: frame // 2]
            assert ours.decode(ids[-1:], skip_special=False) == ours.decode(
                candidates[-1][-1:], skip_special=False
            )


def test_limits_without_room_are_refused_with_the_smallest_that_has(tokenizer):
    example = Example("今天天气很好" * 20, "你好" * 60)
    for limits in (lambda n: (n, 60), lambda n: (60, n)):
        for n in range(1, 60):
            with contextlib.suppress(GLMError):
                row = encode(example, tokenizer, *limits(n))
                break
        assert n > 1 or tokenizer.generation in ("chatglm2", "template")
        assert row.truncated_source > 0 and row.truncated_target > 0
        if n > 1:
            with pytest.raises(GLMError, match=f"Raise the longest (prompt|answer) to {n} tokens or more"):
                encode(example, tokenizer, *limits(n - 1))


def test_empty_rows_are_refused_with_their_lines(tokenizer):
    examples = [Example("a", "b", (), 2), Example(" ", "b", (), 3), Example("a", "", (), 9)]
    with pytest.raises(GLMError, match=r"Without a prompt or a response: 2 rows \(line 3, 9\)"):
        encode_all(examples, tokenizer, 50, 50)


# --- preview ----------------------------------------------------------------------------------------------------


def test_a_preview_shows_the_text_and_what_counts(tokenizer):
    example = Example("你好 𠮷😀 naïve\n\n  x", "𠮷 is rare 😀, 今天", HISTORY)
    row = encode(example, tokenizer, 900, 900)
    pieces = preview(row, tokenizer)
    assert sum(one.tokens for one in pieces) == len(row.ids)
    assert sum(one.tokens for one in pieces if one.counted) == sum(label != IGNORED for label in row.labels)
    assert "\ufffd" not in "".join(one.text for one in pieces)
    counted = "".join(one.text for one in pieces if one.counted)
    names = {*tokenizer.special, "</s>"}
    spoken = "".join(one.text for one in pieces if one.counted and one.text not in names)
    assert spoken.strip() == tokenizer.decode(tokenizer.encode(example.response)).strip()
    assert counted.endswith(pieces[-1].text) and pieces[-1].text in names
    assert example.prompt.split()[0] in "".join(one.text for one in pieces if not one.counted)


def test_half_a_character_at_a_cut_is_shown_as_such(tokenizers):
    ours = tokenizers["glm4"]
    row = encode(Example("a", "😀"), ours, 50, 4)  # two of its four bytes
    shown = preview(row, ours)
    assert row.truncated_target == len(ours.encode("😀")) - (4 - len(ours.encode("\n")))
    assert any(one.text.startswith("\ufffd") and one.counted for one in shown)
    assert shown[-1] == Piece("<|user|>", True)


# --- all rows, and the cache ------------------------------------------------------------------------------------


def many(count=20):
    return [
        Example(
            f"评论 {i} " + "好" * (i % 13),
            "spam" if i % 3 else "normal " * (i % 5 + 1),
            HISTORY[: i % 3],
            i + 1,
        )
        for i in range(count)
    ]


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_gives_back_what_was_encoded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 7)
    examples = many()
    expected = [encode(one, tokenizer, 40, 8) for one in examples]
    plain = encode_all(examples, tokenizer, 40, 8)
    first = encode_all(examples, tokenizer, 40, 8, cache=tmp_path)
    files = written(tmp_path)
    again = encode_all(examples, tokenizer, 40, 8, cache=tmp_path)
    assert written(tmp_path) == files and [name.rsplit(".")[-1] for name in files] == ["arrow", "json"]
    for rows in (plain, first, again):
        assert list(rows) == expected
        assert (rows[-1], rows[3:9][2], rows.take([5, 1])[1]) == (expected[-1], expected[5], expected[1])
        assert rows.lengths.tolist() == [len(one.ids) for one in expected]
        assert rows.truncated_source.tolist() == [one.truncated_source for one in expected]
        assert rows.take([2, 9]).truncated_target.tolist() == [expected[i].truncated_target for i in (2, 9)]
        with pytest.raises(IndexError):
            rows[20]


def test_cached_rows_are_mapped_and_not_encoded_again(tokenizers, tmp_path, monkeypatch):
    examples = many()
    encode_all(examples, tokenizers["chatglm3"], 40, 8, cache=tmp_path)
    monkeypatch.setattr(encoding, "_rows", None)
    rows = encode_all(examples, tokenizers["chatglm3"], 40, 8, cache=tmp_path)
    assert len(rows) == 20 and not rows.chunks[0].ids.flags.owndata


def test_anything_that_changes_the_rows_changes_the_file(tokenizers, tmp_path):
    ours, examples = tokenizers["chatglm3"], many()
    changed = [*examples[:-1], Example(examples[-1].prompt, "other")]
    calls = [
        (examples, ours, 40, 8, {}), (examples, ours, 41, 8, {}), (examples, ours, 40, 9, {}),
        (examples, ours, 40, 8, {"source_prefix": "a"}), (examples, tokenizers["chatglm2"], 40, 8, {}),
        (examples, tokenizers["glm4"], 40, 8, {}), (changed, ours, 40, 8, {}), (examples[:-1], ours, 40, 8, {}),
    ]  # fmt: skip
    for count, (rows, one, source, target, options) in enumerate(calls, start=1):
        found = encode_all(rows, one, source, target, cache=tmp_path, **options)
        assert list(found) == [encode(row, one, source, target, **options) for row in rows]
        assert len(written(tmp_path)) == 2 * count
    moved = [Example(row.prompt, row.response, row.history, row.line + 1) for row in examples]
    encode_all(moved, ours, 40, 8, cache=tmp_path)
    assert len(written(tmp_path)) == 2 * len(calls)


@pytest.mark.parametrize("damage", ["cut", "flip", "note", "no note", "empty", "other rows"])
def test_a_damaged_cache_is_written_again(tokenizers, tmp_path, damage):
    ours, examples = tokenizers["chatglm3"], many()
    expected = list(encode_all(examples, ours, 40, 8, cache=tmp_path))
    arrow, note = (next(tmp_path.glob(f"*.{kind}")) for kind in ("arrow", "json"))
    good = arrow.read_bytes()
    if damage == "cut":
        arrow.write_bytes(good[:-100])
    elif damage == "flip":
        arrow.write_bytes(good[:-600] + bytes([good[-600] ^ 255]) + good[-599:])
    elif damage == "note":
        note.write_text("{")
    elif damage == "no note":
        note.unlink()
    elif damage == "empty":
        arrow.write_bytes(b"")
    else:
        note.write_text(json.dumps(json.loads(note.read_text()) | {"rows": 19}))
    assert list(encode_all(examples, ours, 40, 8, cache=tmp_path)) == expected
    assert arrow.read_bytes() == good


def test_progress_is_told_and_a_stop_leaves_nothing_behind(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 8)
    told = []
    encode_all(many(), tokenizers["chatglm3"], 40, 8, progress=lambda *one: told.append(one))
    assert told == [(8, 20), (16, 20), (20, 20)]
    for cache in (None, tmp_path):
        asked = iter([False, True])
        with pytest.raises(Cancelled):
            encode_all(
                many(), tokenizers["chatglm3"], 40, 8, cache=cache, stop=lambda asked=asked: next(asked)
            )
    assert written(tmp_path) == []


def test_half_written_files_of_killed_processes_go_after_a_day(tokenizers, tmp_path):
    for name, age in (("encoded-old-1.part", 90_000), ("encoded-new-2.part", 60), ("other.part", 90_000)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    encode_all(many(), tokenizers["chatglm3"], 40, 8, cache=tmp_path)
    assert [name for name in written(tmp_path) if name.endswith(".part")] == [
        "encoded-new-2.part",
        "other.part",
    ]


def test_a_folder_that_cannot_be_written_is_named(tokenizers, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GLMError, match="could not be written to .*file"):
        encode_all(many(), tokenizers["chatglm3"], 40, 8, cache=tmp_path / "file")


def test_another_process_finds_the_cache_and_splits_the_same(tokenizers, tmp_path):
    """Neither may depend on the seed that Python hashes with; importing them loads nothing heavy either."""
    code = (
        "import sys, pathlib; from glm_core.finetune import audit, encoding, examples, split;"
        "assert not {'torch', 'transformers', 'pandas', 'datasets'} & set(sys.modules);"
        "from glm_core.settings import MINI; from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer;"
        "rows = [examples.Example(f'text {i}', 'ab'[i % 2]) for i in range(40)];"
        "tokenizer = ChatGLM2Tokenizer(MINI / 'tokenizer.model');"
        "encoding.encode_all(rows, tokenizer, 40, 8, cache=pathlib.Path(sys.argv[1]));"
        "print(split.split(rows, 0.2).dev)"
    )
    told = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1] and len(written(tmp_path)) == 2


def test_no_rows_are_no_error(tokenizers, tmp_path):
    rows = encode_all([], tokenizers["chatglm3"], 40, 8, cache=tmp_path)
    assert (list(rows), rows.lengths.tolist()) == ([], [])


def test_ids_take_four_bytes_each(tokenizers):
    rows = encode_all(many(), tokenizers["chatglm3"], 40, 8)
    assert {column.dtype for chunk in rows.chunks for column in chunk} == {np.dtype(np.int32)}


def test_a_row_is_of_its_own_type(tokenizers):
    assert isinstance(encode_all(many(), tokenizers["glm4"], 60, 20)[0], Encoded)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
