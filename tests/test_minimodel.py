"""The corpus is what its card says, the splits share nothing, and the committed model passes its evaluation."""

from __future__ import annotations

import hashlib
import random

import pytest

from glm_core.minimodel import corpus, evaluation, examples, training
from glm_core.settings import DATA, MINI
from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer, Message

SPLITS = ("train", "dev", "test")


def test_the_written_splits_are_those_the_sources_give(tmp_path, monkeypatch):
    files = [DATA / name / f"{part}" for name, part in (
        *(("comments", f"{s}.csv") for s in SPLITS), *(("dialogue", f"{s}.jsonl") for s in SPLITS),
        *(("adverts", f"{s}.jsonl") for s in SPLITS))]  # fmt: skip
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    corpus.build()
    for file, digest in before.items():
        assert hashlib.sha256((tmp_path / file.relative_to(DATA)).read_bytes()).hexdigest() == digest, (
            file.name
        )


def test_no_comment_is_in_two_splits_and_the_sizes_are_right():
    texts = [{corpus.normalised(c.text) or c.text for c in corpus.read_comments(name)} for name in SPLITS]
    rows = sum(len(corpus.read_comments(name)) for name in SPLITS)
    assert len(set().union(*texts)) == rows >= 4000
    test = corpus.read_comments("test")
    for language in ("zh", "en"):
        spam = sum(c.label == "spam" for c in test if c.language == language)
        assert 0.4 < spam / sum(c.language == language for c in test) < 0.6


def test_near_copies_stay_together():
    texts = [
        "加我微信vx12ab34领红包，手慢无",
        "加我微信vx98cd76领红包，手慢无！",
        "今天的视频真好看",
        "今天天气怎么样",
    ]
    groups = corpus.near_groups(texts)
    assert groups[0] == groups[1] and len(set(groups)) == 3


def test_there_are_enough_exchanges_and_held_out_wordings_are_not_among_them():
    train = corpus.read_jsonl(DATA / "dialogue" / "train.jsonl")
    asked = {row["prompt"].strip().lower() for row in train}
    assert len({(row["prompt"], row["response"]) for row in train}) >= 1500
    for name in ("dev", "test"):
        held_out = corpus.read_jsonl(DATA / "dialogue" / f"{name}.jsonl")
        assert len(held_out) >= 60
        assert not asked & {row["prompt"].strip().lower() for row in held_out}


def test_adverts_are_distinct_and_say_their_attributes():
    pairs = [pair for name in SPLITS for pair in corpus.read_jsonl(DATA / "adverts" / f"{name}.jsonl")]
    assert len({pair["content"] for pair in pairs}) == len(pairs) >= 1500
    composed = pairs[100:200]
    said = sum(
        part.split("#")[1] in pair["summary"] for pair in composed for part in pair["content"].split("*")[1:]
    )
    assert said / sum(pair["content"].count("*") for pair in composed) > 0.9


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("支持 CSV、TSV、JSON 和 XLSX。", "zh"),
        ("Apple in Chinese is 苹果.", "en"),
        ("用 `make run` 启动。", "zh"),
    ],
)
def test_the_language_of_an_answer_is_that_of_its_sentence(text, language):
    assert corpus.language_of(text) == language


def test_an_epoch_is_the_same_for_the_same_seed_and_labels_match():
    comments = corpus.read_comments("train")[:200]
    dialogue = corpus.read_jsonl(DATA / "dialogue" / "train.jsonl")[:200]
    adverts = corpus.read_jsonl(DATA / "adverts" / "train.jsonl")[:90]
    first, second = (examples.epoch(dialogue, comments, adverts, random.Random(3)) for _ in range(2))
    assert first == second and len(first) == 200 + 100 + 30
    answers = {example.answer for example in first if example.weight > 1}
    assert answers == {"垃圾", "正常", "spam", "normal"}


def test_an_example_is_the_chat_prompt_and_the_answer():
    tokenizer = ChatGLM2Tokenizer(MINI / "tokenizer.model")
    ids, prompt = examples.encode(tokenizer, examples.Example((Message("user", "你好"),), "你好！"))
    assert tokenizer.answer_text(ids[prompt:]) == "你好！" and ids[-1] == tokenizer.eos_id
    assert ids[:prompt] == tokenizer.chat_ids([Message("user", "你好")])


def test_training_lowers_the_loss_and_writes_the_released_layout(tmp_path, monkeypatch, capsys):
    """Two epochs on a sliver of the corpus: the loss falls, and what is written loads and equals what was trained."""
    import shutil

    from glm_core import checkpoints

    shutil.copy(MINI / "tokenizer.model", tmp_path)
    monkeypatch.setattr(training, "SHAPE", training.SHAPE | {"num_hidden_layers": 1})
    read = corpus.read_jsonl
    monkeypatch.setattr(corpus, "read_comments", lambda name, real=corpus.read_comments: real(name)[:60])
    monkeypatch.setattr(corpus, "read_jsonl", lambda path: read(path)[:60])
    training.train(tmp_path, [training.Stage(2, 4096, 1e-3, 4), training.Stage(1, 2048, 1e-3, 2, 0.1, 0.1)])
    losses = [
        float(line.split("loss ")[1].split()[0])
        for line in capsys.readouterr().out.splitlines()
        if "loss" in line
    ]
    assert losses[-1] < losses[0]
    assert checkpoints.load(tmp_path, "fp32", "cpu").info.layers == 1


def test_the_embedded_model_tells_spam_and_answers_reworded_questions(capsys):
    """A sample small enough for every test run; a little under what the evaluation command measured."""
    from glm_core import checkpoints
    from glm_core.engine import Engine

    engine = Engine(checkpoints.load(MINI, "fp32", "cpu"))
    try:
        comments = corpus.read_comments("test")[::3]
        predicted = evaluation.spam(engine, comments)
        right = sum(label == c.label for (label, _), c in zip(predicted, comments, strict=True))
        assert right / len(comments) >= 0.9
        lines = corpus.read_jsonl(DATA / "dialogue" / "test.jsonl")[::4]
        known = {intent.id: intent for intent in corpus.intents()}
        answers = evaluation.dialogue(engine, [line["prompt"] for line in lines])
        good = sum(corpus.is_right(a, known[line["id"]]) for a, line in zip(answers, lines, strict=True))
        assert good / len(lines) >= 0.92
    finally:
        engine.close()
