"""Time and memory for the scores of one pair of texts, against jieba, rouge_chinese and nltk called directly.

    python benchmarks/rouge.py

Each length is scored by both within one run, and both must give the same four numbers. rouge_chinese keeps a table
of every pair of words, so it is only asked up to --most characters. The time is that of the processor, the best of
the rounds; memory is the peak of what Python allocates, measured in a run of its own.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jieba
from rouge_chinese import Rouge

from glm_core import metrics
from glm_core.minimodel import corpus

try:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
except ImportError:
    sentence_bleu = None

Scores = dict[str, float]


def directly(prediction: str, reference: str) -> Scores:
    """The reference's recipe with the packages it uses; BLEU only where nltk is installed."""
    words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    found = {name: round(one["f"] * 100, 4) for name, one in Rouge().get_scores(*words)[0].items()}
    if sentence_bleu is not None:
        smooth = SmoothingFunction().method3
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smooth)
        found["bleu-4"] = round(bleu * 100, 4)
    return found


def measure(score: Callable[[str, str], Scores], pair: tuple[str, str], rounds: int) -> tuple[float, float]:
    """Milliseconds of the processor and peak MB of one call."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        score(*pair)
        times.append(time.process_time() - started)
    tracemalloc.start()
    score(*pair)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(times) * 1e3, peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--characters", type=int, nargs="+", default=[100, 500, 2000, 5000])
    parser.add_argument(
        "--most", type=int, default=2000, help="longest text rouge_chinese scores (5000: 1 GB and more)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    comments = [comment.text for comment in corpus.read_comments("train")]
    random.Random(1).shuffle(comments)
    text = "".join(comments)
    metrics.score_text("好", "好")  # reads jieba's dictionary
    print(f"{'characters':>10} {'':12} {'ms':>10} {'peak MB':>10}")
    for size in options.characters:
        # A prediction that shares two of three stretches with its reference.
        reference, other = text[:size], text[size : 2 * size]
        prediction = reference[: size // 3] + other[: size // 3] + reference[2 * size // 3 :]
        pair = prediction, reference
        mine = measure(metrics.score_text, pair, options.rounds)
        print(f"{size:>10,} {'score_text':12} {mine[0]:>10.1f} {mine[1]:>10.1f}")
        if size > options.most:
            continue
        found, expected = metrics.score_text(*pair), directly(*pair)
        if found is None or any(found[name] != value for name, value in expected.items()):
            raise SystemExit(f"Different scores: {found} and {expected}.")
        theirs = measure(directly, pair, 1 if size > 1000 else options.rounds)
        print(
            f"{size:>10,} {'directly':12} {theirs[0]:>10.1f} {theirs[1]:>10.1f}   {theirs[0] / mine[0]:.1f} times the time"
        )


if __name__ == "__main__":
    main()
