"""Tokens per second of the embedded model: one stream, and 32, against one row at a time through transformers.

    python benchmarks/streams.py

Greedy, 64 tokens per answer for everybody (ends of answers are ignored), in turns within one process and one thread:
OpenMP's threads belong to the one that computes, and those of a second would slow both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from glm_core import checkpoints
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message

TOKENS = 64
STREAMS = 32


def prompts(tokenizer) -> list[tuple[int, ...]]:
    texts = [f"第{i}条评论写得怎么样？请说说你的看法。" for i in range(STREAMS)]
    return [tuple(tokenizer.chat_ids([Message("user", text)])) for text in texts]


def loaded(folder: Path, precision: str) -> tuple[checkpoints.LoadedModel, Engine]:
    """The model as it is, and another copy of it in an engine."""
    plain = checkpoints.load(folder, precision, "cpu")
    return plain, Engine(checkpoints.load(folder, precision, "cpu"), max_rows=STREAMS)


def generated(loaded: checkpoints.LoadedModel, ids: tuple[int, ...]) -> float:
    """Tokens per second of transformers' own generate on the model as it was loaded."""
    started = time.perf_counter()
    with torch.inference_mode():
        out = loaded.model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    return (out.shape[1] - len(ids)) / (time.perf_counter() - started)


def streamed(running: Engine, some: list[tuple[int, ...]]) -> float:
    """Tokens per second of the engine over requests that come at once."""
    settings = GenerationSettings(max_new_tokens=TOKENS)
    started = time.perf_counter()
    handles = [running.submit(Request(ids, settings, "batch")) for ids in some]
    for handle in handles:
        handle.wait()
    return sum(len(handle.ids) for handle in handles) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=MINI)
    parser.add_argument("--precision", action="append", choices=checkpoints.PRECISIONS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}")
    for precision in options.precision or ["fp32", "bf16"]:
        with ThreadPoolExecutor(1) as once:
            plain, running = once.submit(loaded, options.checkpoint, precision).result()
        running.tokenizer.stop_ids = frozenset()
        some = prompts(plain.tokenizer)
        found: dict[str, list[float]] = {name: [] for name in ("generate", "one", "many")}
        for number in range(options.rounds + 1):
            speeds = (
                running.between_steps(partial(generated, plain, some[0])),
                streamed(running, some[:1]),
                streamed(running, some),
            )
            if number:  # the first round warms up
                for name, speed in zip(found, speeds, strict=True):
                    found[name].append(speed)
        running.close()
        generate, one, many = (statistics.median(found[name]) for name in found)
        rounds = list(zip(*found.values(), strict=True))
        of_one = statistics.median(b / a for a, b, _ in rounds)
        of_many = statistics.median(c / a for a, _, c in rounds)
        alone = statistics.median(c / b for _, b, c in rounds)
        print(
            f"{plain.info.name} {precision}: generate {generate:,.0f} tokens/s, one stream {one:,.0f}: x {of_one:.2f} "
            f"(goal 1.5); {STREAMS} streams {many:,.0f}: x {of_many:.1f} of generate row by row (goal 10), "
            f"x {alone:.1f} of one stream",
            flush=True,
        )


if __name__ == "__main__":
    main()
