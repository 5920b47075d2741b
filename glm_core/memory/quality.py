"""What a level costs in quality: the same labelled rows asked at every level, and the rows whose answer changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluate.work import unstored

if TYPE_CHECKING:
    from ..evaluate import EvaluationTask, Run
    from ..jobs import Job, JobStore

# From the one with the reference's numbers down; the first that was run is what the others are held against.
ORDER = ("fp32", "bf16", "fp16", "int8", "int8-dynamic", "int4-g32", "int4-g64", "int4-g128", "int4")


@dataclass(frozen=True)
class Change:
    """A row that two levels answer differently; `before` and `after` are None where the row was not scored."""

    number: int
    question: str
    reference: str
    answer: str
    other: str
    before: bool | None
    after: bool | None


def place(level: str) -> int:
    """Where a level stands in ORDER; unknown ones at the end."""
    return ORDER.index(level) if level in ORDER else len(ORDER)


def start_quality(store: JobStore, job: Job, task: EvaluationTask) -> list[Run]:
    """A run of the rows for every level of a measurement, kept together by the job's id.

    task    what is asked, without a model
    GLMError, with nothing started, where a level cannot be asked.
    """
    from .. import evaluate
    from .work import MemoryTask

    measured = MemoryTask.from_json(job.task)
    tasks = [
        replace(
            evaluate.with_model(
                task, measured.checkpoint, measured.base or None, level, measured.device, measured.generation
            ),
            group=job.id,
        )
        for level in measured.levels
    ]
    name = Path(measured.checkpoint).name
    started = []
    for one, level in zip(tasks, measured.levels, strict=True):
        made = evaluate.start(store, one, f"{name} {level.upper()} on {task.input_name}")
        started.append(evaluate.run_of(store, made.id))
    return started


def runs(store: JobStore, job_id: str) -> list[Run]:
    """The runs that were started with a measurement, the reference level first."""
    from .. import evaluate

    found = evaluate.runs(store, group=job_id)
    return sorted(found, key=lambda one: place(one.task.precision))


def changed(store: JobStore, reference: str, other: str, most: int = 1000) -> tuple[int, int, list[Change]]:
    """(rows answered differently, rows that both answered, the first `most` of the former) of two runs of one file."""
    from .. import evaluate

    tables = evaluate.per_row(store, reference), evaluate.per_row(store, other)
    right = [
        {
            int(idx): bool(right)
            for idx, right, scored in zip(one.idx, one.right, one.scored, strict=True)
            if scored
        }
        for one in tables
    ]
    task = evaluate.run_of(store, reference).task
    at = {name: len(task.columns) + i for i, name in enumerate(_extra())}
    answers = {
        idx: unstored(result.prediction)[0]
        for idx, _, result in store.iter_results(other)
        if result is not None and result.status == "ok"
    }
    found: list[Change] = []
    both = different = 0
    for idx, cells, result in store.iter_results(reference):
        if result is None or result.status != "ok" or idx not in answers:
            continue
        both += 1
        answer = unstored(result.prediction)[0]
        if answer.strip() == answers[idx].strip():
            continue
        different += 1
        if len(found) < most:
            asked = cells[at["question"]] or (cells[task.columns.index(task.prompt)] if task.prompt else "")
            found.append(
                Change(
                    int(cells[at["number in the file"]]), asked, cells[at["reference"]], answer, answers[idx],
                    right[0].get(idx), right[1].get(idx),
                )
            )  # fmt: skip
    return different, both, found


def _extra() -> tuple[str, ...]:
    from ..evaluate.task import EXTRA

    return EXTRA


def best(points: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """Which of (level, bytes, quality, tokens per second) no other is at least as good as in all three and better in one."""

    def beats(a: tuple[str, float, float, float], b: tuple[str, float, float, float]) -> bool:
        least = a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3]
        return least and (a[1] < b[1] or a[2] > b[2] or a[3] > b[3])

    return [one[0] for one in points if not any(beats(other, one) for other in points)]
