"""What glm-mini can do, on rows it never saw: spam by label likelihood, and answers to reworded questions."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import checkpoints
from ..engine import Engine, GenerationSettings, Request
from ..settings import DATA
from ..tokenizers.chatglm2 import Message
from . import corpus, examples


def spam(engine: Engine, comments: Sequence[corpus.Comment]) -> list[tuple[str, float]]:
    """The likelier label of every comment and its probability, by the log-likelihood of the whole label.

    Comments are asked about in their own language; nothing of the training labels enters the prompt (zero-shot).
    """
    answers: list[tuple[str, float]] = [("", 0.0)] * len(comments)
    tokenizer = engine.tokenizer
    for language, template, labels in (
        ("zh", examples.CHINESE_TEMPLATES[0], examples.CHINESE_LABELS),
        ("en", examples.ENGLISH_TEMPLATES[0], examples.ENGLISH_LABELS),
    ):
        rows = [i for i, comment in enumerate(comments) if comment.language == language]
        prompts = [
            tokenizer.chat_ids([Message("user", template.replace("{text}", comments[i].text))]) for i in rows
        ]
        continuations = [tokenizer.answer_ids(labels[label]) for label in corpus.LABELS]
        for i, scores in zip(rows, engine.score(prompts, continuations), strict=True):
            best = max(range(len(scores)), key=scores.__getitem__)
            answers[i] = corpus.LABELS[best], 1 / sum(math.exp(score - scores[best]) for score in scores)
    return answers


def dialogue(engine: Engine, prompts: Sequence[str], max_new_tokens: int = 96) -> list[str]:
    """Greedy answers to single questions."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    encoded = [tuple(engine.tokenizer.chat_ids([Message("user", prompt)])) for prompt in prompts]
    handles = engine.submit_many([Request(ids, settings, "batch") for ids in encoded])
    for handle in handles:
        handle.wait()
    return [handle.text for handle in handles]


def evaluate(folder: Path, split: str = "test", show: bool = False) -> dict[str, float]:
    """Print and return accuracy on comments and dialogue of a split; `show` lists every dialogue answer."""
    engine = Engine(checkpoints.load(folder, "fp32", "cpu"))
    try:
        comments = corpus.read_comments(split)
        started = time.perf_counter()
        predicted = spam(engine, comments)
        seconds = time.perf_counter() - started
        right = [label == comment.label for (label, _), comment in zip(predicted, comments, strict=True)]
        print(
            f"Spam by label likelihood, zero-shot, {split} split: {_share(right)}, {len(right) / seconds:.0f} rows/s"
        )
        for language in ("zh", "en"):
            part = [ok for ok, comment in zip(right, comments, strict=True) if comment.language == language]
            print(f"  {language}: {_share(part)}")
        wrong = Counter(f"{c.label}/{c.kind}" for ok, c in zip(right, comments, strict=True) if not ok)
        print(f"  errors by label/kind: {', '.join(f'{kind} {n}' for kind, n in wrong.most_common(8))}")

        known = {intent.id: intent for intent in corpus.intents()}
        lines = corpus.read_jsonl(DATA / "dialogue" / f"{split}.jsonl")
        trained = {
            row["prompt"].strip().lower() for row in corpus.read_jsonl(DATA / "dialogue" / "train.jsonl")
        }
        assert not any(line["prompt"].strip().lower() in trained for line in lines), "a prompt was trained on"
        answers = dialogue(engine, [line["prompt"] for line in lines])
        judged = [
            corpus.is_right(answer, known[line["id"]]) for line, answer in zip(lines, answers, strict=True)
        ]
        spoken = [
            corpus.language_of(answer) == line["lang"] for line, answer in zip(lines, answers, strict=True)
        ]
        print(f"Dialogue, paraphrases absent from the corpus, {split} split: right answer {_share(judged)}")
        print(f"  right language: {_share(spoken)}")
        for language in ("zh", "en"):
            print(
                f"  {language}: {_share([ok for ok, line in zip(judged, lines, strict=True) if line['lang'] == language])}"
            )
        if show:
            for line, answer, ok in zip(lines, answers, judged, strict=True):
                print(f"{'ok   ' if ok else 'WRONG'} {line['prompt']!r} -> {answer!r}")
        return {"spam": sum(right) / len(right), "dialogue": sum(judged) / len(judged)}
    finally:
        engine.close()


def _share(judged: Sequence[bool]) -> str:
    return f"{sum(judged)} of {len(judged)} ({sum(judged) / max(len(judged), 1):.1%})"
