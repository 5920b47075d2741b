"""Rows per second of a job on Ray with one worker against the same job in this process; both take all processors.

Same rows, model, precision, threads and machine, in turns within one run:

    python benchmarks/cluster.py

A job counts from the moment its model is loaded to its last result in the database; what Ray takes to start is
printed beside it. The results of both are compared row for row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from batch import rows

from glm_core import batch, checkpoints, classify, engine, jobs
from glm_core.engine import GenerationSettings
from glm_core.minimodel import examples
from glm_core.settings import MINI

SAME = ("status", "prediction", "truncated", "prompt_tokens", "new_tokens", "error")


def task_of(kind: str, folder: Path, precision: str, **where: object) -> batch.BatchTask | classify.LabelTask:
    """The same question to every row, to be answered or labelled."""
    common = {
        "checkpoint": str(folder), "checkpoint_fingerprint": checkpoints.fingerprint(folder), "precision": precision,
        "device": "cpu", "columns": ("comment",), "input_name": "benchmark",
        "template": examples.GUIDELINES.replace("{text}", "{comment}"), **where,
    }  # fmt: skip
    if kind == "classify":
        return classify.LabelTask(**common)
    settings = GenerationSettings(max_new_tokens=8)
    return batch.BatchTask(
        **common, system="", settings=settings, output_column="a", input_path="", input_sha256=""
    )


def timed(
    store: jobs.JobStore, kind: str, task: batch.BatchTask | classify.LabelTask, texts: list[str]
) -> tuple:
    """(rows per second once the model is loaded, seconds before that, the results)."""
    job = store.create(kind, "benchmark", task.to_json())
    store.add_rows(job.id, [(text,) for text in texts])
    store.mark_ready(job.id)
    claimed = store.claim((kind,), jobs.this_process())
    assert claimed is not None
    began = time.time()
    with jobs.StopSignal(store, claimed) as stop:
        (batch if kind == "batch" else classify).run(claimed, store, stop)
    loaded = store.get(job.id).run_started or began
    store.release(job.id, claimed.owner, "done")
    results = {result.idx: result for _, _, result in store.iter_results(job.id) if result}
    last = max(one.finished for one in results.values())
    return len(results) / (last - loaded), loaded - began, results


def different(here: dict, there: dict) -> tuple[int, float]:
    """(rows that differ, the largest difference of a label's log-probability)."""
    count, largest = 0, 0.0
    for idx, one in here.items():
        other = there[idx]
        count += any(getattr(one, name) != getattr(other, name) for name in SAME)
        if one.details:
            pairs = zip(json.loads(one.details)["scores"], json.loads(other.details)["scores"], strict=True)
            largest = max(largest, *(abs(a - b) for a, b in pairs))
    return count, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=MINI)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--kind", choices=("classify", "batch"), default="classify")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="g") as folder:
        os.environ["GLM_WORKSPACE"] = folder
        (Path(folder) / "cache").mkdir()
        store = jobs.JobStore(Path(folder) / "workbench.db")
        loaded = engine.host().use(options.checkpoint, options.precision).loaded
        texts = rows(loaded.tokenizer, options.rows)
        print(
            f"{loaded.info.name}, {loaded.precision}, {options.kind}, {len(texts):,} rows, {torch.get_num_threads()} "
            f"threads, {os.cpu_count()} cores"
        )
        here = task_of(options.kind, options.checkpoint, options.precision)
        there = task_of(
            options.kind, options.checkpoint, options.precision, engine="ray", workers=options.workers
        )
        timed(store, options.kind, here, texts[:200])
        ratios = []
        for round_ in range(options.rounds):
            before, _, plain = timed(store, options.kind, here, texts)
            rate, start, spread = timed(store, options.kind, there, texts)
            after, _, _ = timed(store, options.kind, here, texts)
            ratios.append(rate / ((before + after) / 2))
            wrong, off = different(plain, spread)
            print(
                f"round {round_ + 1}: here {before:.1f} and {after:.1f} rows/s, Ray {rate:.1f} "
                f"(started after {start:.1f} s); {wrong} rows differ, log-probabilities by at most {off:.1g}; "
                f"load {os.getloadavg()[0]:.1f}"
            )
        print(f"Ray / here: median {statistics.median(ratios):.2f} (lowest {min(ratios):.2f})")
        engine.host().unload()


if __name__ == "__main__":
    main()
