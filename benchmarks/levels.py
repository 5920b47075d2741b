"""What each precision changes: probabilities and labels of the comments' test split against fp32, and rows per second.

    python benchmarks/levels.py

glm-mini answers the same 2,958 comments at every level, one after the other. "Error" is the root mean square of the
difference in a label's log-odds from fp32; "other labels" are the comments whose likelier label changed. For so small
a model the levels differ little in speed; for what they cost in quality it is the harder case.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from glm_core import checkpoints, statistics
from glm_core.engine import Engine
from glm_core.minimodel import corpus, evaluation
from glm_core.settings import MINI


def asked(checkpoint: Path, level: str, comments: list[corpus.Comment]) -> tuple[list[float], float]:
    """Log-odds of spam for every comment, and rows per second."""
    running = Engine(checkpoints.load(checkpoint, level, "cpu"))
    try:
        evaluation.spam(running, comments[:200])  # warm
        started = time.perf_counter()
        found = evaluation.spam(running, comments)
        seconds = time.perf_counter() - started
    finally:
        running.close()
    odds = []
    for label, probability in found:
        size = math.log(max(probability, 1e-12)) - math.log(max(1 - probability, 1e-12))
        odds.append(size if label == "spam" else -size)
    return odds, len(comments) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=MINI)
    parser.add_argument("--levels", nargs="+", default=["bf16", "int8", "int8-dynamic", "int4"])
    options = parser.parse_args()
    comments = corpus.read_comments("test")
    print(
        f"{options.checkpoint.name} on {len(comments):,} comments, {torch.get_num_threads()} threads, "
        f"{os.cpu_count()} cores, {platform.machine()}"
    )
    exact, speed = asked(options.checkpoint, "fp32", comments)
    right = [(value > 0) == (one.label == "spam") for value, one in zip(exact, comments, strict=True)]
    print(f"fp32          {sum(right) / len(right):.2%} right, {speed:,.0f} rows/s")
    for level in options.levels:
        odds, speed = asked(options.checkpoint, level, comments)
        error = math.sqrt(sum((a - b) ** 2 for a, b in zip(odds, exact, strict=True)) / len(odds))
        other = sum((a > 0) != (b > 0) for a, b in zip(odds, exact, strict=True))
        share = statistics.wilson(other, len(odds))
        hits = sum((value > 0) == (one.label == "spam") for value, one in zip(odds, comments, strict=True))
        print(
            f"{level:13} {hits / len(odds):.2%} right, {speed:,.0f} rows/s, error {error:.3f}, other labels {other} of "
            f"{len(odds):,} ({share.estimate:.2%}, {share.low:.2%} to {share.high:.2%})"
        )


if __name__ == "__main__":
    main()
