"""Rows per second of the batch path against a plain `model.generate` loop, and tokens per second of one chat.

Same rows, model, precision and machine, measured in turns within one run:

    python benchmarks/batch.py

The rows are comments of about 40 tokens under a shared instruction of about 200; answers are a few tokens long.
The batch path is the whole one: prompts from cells, the engine, results committed to the job database.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from glm_core import batch, checkpoints, engine, jobs
from glm_core.engine import GenerationSettings, Request
from glm_core.minimodel import corpus, examples
from glm_core.settings import MINI
from glm_core.tokenizers.chatglm2 import Message

NEW_TOKENS = 6
ROW_TOKENS = 40


def rows(tokenizer, count: int) -> list[str]:
    """Distinct texts of about 40 tokens, joined from comments of the test split."""
    generator = random.Random(1)
    texts = [comment.text for comment in corpus.read_comments("test")]
    made: set[str] = set()
    while len(made) < count:
        text = generator.choice(texts)
        while len(tokenizer.encode(text)) < ROW_TOKENS:
            text += "。" + generator.choice(texts)
        ids = tokenizer.encode(text)
        made.add(tokenizer.decode(ids[: ROW_TOKENS + generator.randint(-6, 6)]))
    return sorted(made)


def prompt_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.chat_ids([Message("user", examples.GUIDELINES.replace("{text}", text))])


def plain_loop(loaded: checkpoints.LoadedModel, texts: list[str]) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of `model.generate`, one row at a time, greedy, with its own cache."""
    answers = []
    stops = sorted(loaded.tokenizer.stop_ids)
    started = time.perf_counter()
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([prompt_ids(loaded.tokenizer, text)], device=loaded.device)
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=stops, pad_token_id=0,
            )  # fmt: skip
            answers.append(out[0, ids.shape[1] :].tolist())
    return time.perf_counter() - started, answers


def batch_job(running: engine.Engine, texts: list[str], folder: Path) -> tuple[float, list[str]]:
    """Seconds and answers of a batch job over the same rows, from queued to done."""
    store = jobs.JobStore(folder / f"{time.time_ns()}.db")
    template = examples.GUIDELINES.replace("{text}", "{comment}")
    task = batch.BatchTask(
        checkpoint=str(running.loaded.info.path), checkpoint_fingerprint=checkpoints.fingerprint(running.loaded.info.path),
        precision=running.loaded.precision, device="cpu", template=template, system="",
        settings=GenerationSettings(max_new_tokens=NEW_TOKENS), output_column="label", input_name="benchmark",
        input_path="", input_sha256="", columns=("comment",),
    )  # fmt: skip
    job = store.create("batch", "benchmark", task.to_json())
    store.add_rows(job.id, [(text,) for text in texts])
    store.mark_ready(job.id)
    claimed = store.claim(("batch",), jobs.this_process())
    assert claimed is not None
    started = time.perf_counter()
    with jobs.StopSignal(store, claimed) as stop:
        batch.run(claimed, store, stop)
    seconds = time.perf_counter() - started
    results = {result.idx: result.prediction for _, _, result in store.iter_results(job.id) if result}
    return seconds, [results[i] for i in range(len(texts))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=MINI)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rows", type=int, default=1024, help="rows per round of the batch path")
    parser.add_argument("--plain-rows", type=int, default=48, help="rows per round of the plain loop")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    host = engine.host()
    running = host.use(options.checkpoint, options.precision)
    loaded = running.loaded
    texts = rows(loaded.tokenizer, options.rows)
    instruction = len(prompt_ids(loaded.tokenizer, ""))
    lengths = [len(loaded.tokenizer.encode(text)) for text in texts]
    print(
        f"{loaded.info.name}, {loaded.info.parameters / 1e6:.1f} M parameters, {loaded.precision} on {loaded.device}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(
        f"shared instruction {instruction} tokens, rows {statistics.mean(lengths):.0f} tokens, up to {NEW_TOKENS} new tokens"
    )
    ratios, different = [], 0
    plain_loop(loaded, texts[:4])
    with tempfile.TemporaryDirectory() as folder:
        batch_job(running, texts[:64], Path(folder))
        for round_ in range(1, options.rounds + 1):
            start = (round_ - 1) * options.plain_rows % max(1, options.rows - options.plain_rows)
            part = texts[start : start + options.plain_rows]
            plain, ids = plain_loop(loaded, part)
            seconds, answers = batch_job(running, texts, Path(folder))
            ours = [loaded.tokenizer.answer_text(row) for row in ids]
            different += sum(a != b for a, b in zip(ours, answers[start : start + len(part)], strict=True))
            ratios.append((options.rows / seconds) / (len(part) / plain))
            print(
                f"round {round_}: generate loop {len(part) / plain:6.1f} rows/s, batch job {options.rows / seconds:6.1f} rows/s, "
                f"ratio {ratios[-1]:.1f}"
            )
    print(f"batch job / generate loop: median {statistics.median(ratios):.1f} (lowest {min(ratios):.1f})")
    print(f"answers that differ between the two: {different} of {options.rounds * options.plain_rows}")

    speeds, firsts = [], []
    for text in ("Tell me about yourself.", "介绍一下你自己", "How do I label a spreadsheet?") * 2:
        ids = tuple(loaded.tokenizer.chat_ids([Message("user", text)]))
        handle = running.submit(Request(ids, GenerationSettings(max_new_tokens=128, temperature=1.5, seed=1)))
        handle.wait()
        speeds.append(handle.tokens_per_second)
        firsts.append(handle.time_to_first_token or 0)
    print(
        f"one chat: {statistics.median(speeds):.0f} tokens/s, first token after {1000 * statistics.median(firsts):.0f} ms (medians)"
    )
    host.unload()


if __name__ == "__main__":
    main()
