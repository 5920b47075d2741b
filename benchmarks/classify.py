"""Rows per second of label scoring against a `model.generate` loop and against batched generation; a chat beside it.

Same rows, model, precision and machine, measured in turns within one run:

    python benchmarks/classify.py

The rows are comments of about 40 tokens under a shared instruction of about 200. Scoring is the whole job: prompts
from cells, every label's log-probability, results committed to the job database. Batched generation is the engine's
with the shared instruction computed for every row, and once more with its prefix cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from batch import NEW_TOKENS, plain_loop, prompt_ids, rows

from glm_core import checkpoints, classify, engine, jobs, scoring
from glm_core.engine import GenerationSettings, Request
from glm_core.minimodel import examples
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message


def generated(running: engine.Engine, texts: list[str], shared: int) -> tuple[float, list[str]]:
    """Seconds and answers of batched greedy generation; `shared` leading ids are computed once, 0 for none."""
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    started = time.perf_counter()
    requests = [
        Request(tuple(prompt_ids(running.tokenizer, text)), settings, "batch", shared) for text in texts
    ]
    handles = running.submit_many(requests)
    for handle in handles:
        handle.wait()
    return time.perf_counter() - started, [handle.text for handle in handles]


def label_task(running: engine.Engine) -> classify.LabelTask:
    return classify.LabelTask(
        checkpoint=str(running.loaded.info.path),
        checkpoint_fingerprint=checkpoints.fingerprint(running.loaded.info.path),
        precision=running.loaded.precision, device="cpu", columns=("comment",),
        template=examples.GUIDELINES.replace("{text}", "{comment}"), input_name="benchmark",
    )  # fmt: skip


def label_job(running: engine.Engine, texts: list[str], folder: Path) -> tuple[float, list[str]]:
    """Seconds and labels of a classify job over the same rows, from queued to done."""
    store, task = jobs.JobStore(folder / f"{time.time_ns()}.db"), label_task(running)
    job = store.create("classify", "benchmark", task.to_json())
    store.add_rows(job.id, [(text,) for text in texts])
    store.mark_ready(job.id)
    claimed = store.claim(("classify",), jobs.this_process())
    assert claimed is not None
    started = time.perf_counter()
    with jobs.StopSignal(store, claimed) as stop:
        classify.run(claimed, store, stop)
    seconds = time.perf_counter() - started
    written = {label.name: label.written for label in task.labels}
    results = {result.idx: result.prediction for _, _, result in store.iter_results(job.id) if result}
    return seconds, [written[results[i]] for i in range(len(texts))]


def chat(running: engine.Engine, questions: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token and tokens per second of some chat answers, one after the other."""
    firsts, speeds = [], []
    for number in range(questions):
        ids = tuple(running.tokenizer.chat_ids([Message("user", f"介绍一下你自己 {number}")]))
        handle = running.submit(Request(ids, GenerationSettings(max_new_tokens=48, temperature=1.5, seed=1)))
        handle.wait()
        firsts.append(handle.time_to_first_token or 0.0)
        speeds.append(handle.tokens_per_second)
        time.sleep(0.3)
    return firsts, speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=MINI)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rows", type=int, default=512, help="rows per round of scoring")
    parser.add_argument(
        "--generated-rows", type=int, default=192, help="rows per round of batched generation"
    )
    parser.add_argument("--plain-rows", type=int, default=32, help="rows per round of the generate loop")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    host = engine.host()
    running = host.use(options.checkpoint, options.precision)
    loaded = running.loaded
    texts = rows(loaded.tokenizer, options.rows)
    task = label_task(running)
    head = len(classify.Classifier(running, task).prompts.head)
    lengths = [len(loaded.tokenizer.encode(text)) for text in texts]
    print(
        f"{loaded.info.name}, {loaded.info.parameters / 1e6:.1f} M parameters, {loaded.precision} on {loaded.device}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"shared head {head} tokens, rows {statistics.mean(lengths):.0f} tokens, {len(task.labels)} labels")
    ratios: dict[str, list[float]] = {
        "generate loop": [],
        "batched generation": [],
        "with its prefix cache": [],
    }
    same = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        plain_loop(loaded, texts[:4])
        generated(running, texts[:32], 0)
        label_job(running, texts[:64], Path(folder))
        for round_ in range(options.rounds):
            some = texts[round_ * options.plain_rows :][: options.plain_rows]
            many = texts[: options.generated_rows]
            seconds, ids = plain_loop(loaded, some)
            rates = [len(some) / seconds]
            before, labels = label_job(running, texts, Path(folder))
            for shared in (0, head):
                seconds, answers = generated(running, many, shared)
                rates.append(len(many) / seconds)
            after, _ = label_job(running, texts, Path(folder))
            rate = 2 * len(texts) / (before + after)
            same += sum(a == b for a, b in zip(labels, answers, strict=False))
            compared += len(answers)
            for found, other in zip(ratios.values(), rates, strict=True):
                found.append(rate / other)
            print(
                f"round {round_ + 1}: scoring {rate:6.1f} rows/s, "
                + ", ".join(f"{name} {other:.1f}" for name, other in zip(ratios, rates, strict=True))
            )
        for name, found in ratios.items():
            print(f"scoring / {name}: median {statistics.median(found):.1f} (lowest {min(found):.1f})")
        print(f"labels that are the generated answer: {same} of {compared}")

        longest: list[float] = []
        tree = scoring._Work.tree
        scoring._Work.tree = lambda self, place: _timed(tree, self, place, longest)
        alone = chat(running, 4)
        job = threading.Thread(target=lambda: [label_job(running, texts, Path(folder)) for _ in range(6)])
        job.start()
        beside = chat(running, 8)
        over = not job.is_alive()
        job.join()
        for what, (firsts, speeds) in (("alone", alone), ("beside a job", beside)):
            print(
                f"chat {what}: first token after {1000 * statistics.median(firsts):.0f} ms (longest "
                f"{1000 * max(firsts):.0f}), {statistics.median(speeds):.0f} tokens/s"
            )
        print(
            f"longest piece of scoring {1000 * max(longest):.0f} ms{', the job was over early' if over else ''}"
        )
    host.unload()


def _timed(tree, work, place: int, longest: list[float]):
    started = time.perf_counter()
    found = tree(work, place)
    longest.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
