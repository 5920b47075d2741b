"""Measuring as a durable job, a row per level; and everything that was measured, as it is kept and exported."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import GLMError
from ..jobs import Job, JobStore, Result, StopSignal
from .measuring import NEW_TOKENS, Level, Unfinished, measure
from .prediction import levels, usual
from .shapes import shape

KIND = "memory"
PARTS = ("weights", "cache", "moved", "activations", "overhead")
COLUMNS = (
    "model", "level", "device", "device_name", "threads", "date", "context", "batch",
    *(f"predicted_{part}" for part in PARTS), "predicted_total", "measured_peak", "deviation",
    "measured_after_prefill", "measured_at_load", "measured_weights", "measured_program", "allocated", "reserved",
    "device_used", "prefill_tokens_per_s", "decode_tokens_per_s", "load_seconds", "error",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryTask:
    """What to measure: the same object behind the screen, the shell and a resumed job."""

    checkpoint: str
    checkpoint_fingerprint: str
    levels: tuple[str, ...]
    contexts: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = (1, 4)
    device: str = "cpu"
    generation: str = ""
    base: str = ""
    new_tokens: int = NEW_TOKENS
    versions: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The task as a job stores it."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"versions": dict(self.versions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryTask:
        """The task of a stored job; GLMError if it lacks a value."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        try:
            for name in ("levels", "contexts", "batches"):
                known[name] = tuple(known.get(name, ()))
            known["versions"] = tuple(dict(known.get("versions", {})).items())
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise GLMError(
                f"The stored measurement is incomplete ({error}).", "Start the measurement again."
            ) from error


def plan(
    checkpoint: str | Path,
    chosen: Sequence[str] = (),
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    device: str = "auto",
    generation: str = "",
    base: str | Path | None = None,
) -> MemoryTask:
    """What would be measured of a folder; GLMError for what cannot be.

    chosen     the levels; default: all that the checkpoint can be loaded in, without fp16 on a processor
    contexts   default: 128 and 1,024 tokens, as far as the model takes them
    base       of an adapter; default: what the adapter names
    """
    from .. import batch, checkpoints

    info = checkpoints.inspect(Path(checkpoint).expanduser())
    if info.problems:
        raise GLMError(
            f"{info.path} cannot be loaded. {' '.join(info.problems)}", "Repair the folder or choose another."
        )
    under = checkpoints.base_of(info, base) if info.needs_base else info
    of = shape(under.path)
    device = checkpoints.best_device() if device == "auto" else device
    kind = device.partition(":")[0]
    possible = levels(of, kind)
    for one in chosen:
        if one not in possible:
            raise GLMError(
                f"Precision {one!r} is not one that {of.name} can be loaded in.",
                f"Choose one of {', '.join(possible)}.",
            )
    lengths = sorted({one for one in (contexts or (128, 1024)) if not of.context or one <= of.context})
    rows = sorted(set(batches or (1, 4)))
    if not lengths or lengths[0] < 32 or rows[0] < 1:
        raise GLMError(
            f"{', '.join(map(str, contexts or ()))} tokens x {', '.join(map(str, rows))} rows cannot be measured.",
            f"Choose 32 to {of.context:,} tokens and 1 row or more.",
        )
    return MemoryTask(
        str(info.path),
        checkpoints.fingerprint(info.path, under.path if info.needs_base else None),
        tuple(chosen or usual(of, kind)), tuple(lengths), tuple(rows), device, generation or under.generation,
        str(under.path) if info.needs_base else "", versions=tuple(batch.versions().items()),
    )  # fmt: skip


def start(store: JobStore, task: MemoryTask, title: str = "") -> Job:
    """Queue a measurement."""
    job = store.create(KIND, title.strip() or Path(task.checkpoint).name, task.to_json())
    store.add_rows(job.id, [(level,) for level in task.levels])
    return store.mark_ready(job.id)


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Measure the levels that have no result yet; a level that fails says why and does not keep the others back."""
    from .. import checkpoints

    task = MemoryTask.from_json(job.task)
    folder = Path(task.checkpoint)
    if not folder.is_dir():
        raise GLMError(f"There is no folder {folder}.", "Check the path of the checkpoint.")
    if checkpoints.fingerprint(folder, Path(task.base) if task.base else None) != task.checkpoint_fingerprint:
        raise GLMError(
            f"The checkpoint {folder.name} is not the one this job was started with; its files have changed.",
            "Put the old files back and resume, or start a new job.",
        )
    for idx, (level,) in store.pending(job.id, len(task.levels)):
        try:
            found = measure(
                folder, level, task.contexts, task.batches, task.device, task.generation, task.base,
                task.new_tokens, task.checkpoint_fingerprint, lambda text: store.update(job.id, text),
                stop.event.is_set,
            )  # fmt: skip
        except Unfinished as error:
            kept = "" if error.found is None else json.dumps(error.found.to_json(), ensure_ascii=False)
            result = Result(idx, "failed", error=str(error), details=kept)
        else:
            if found is None:  # told to stop; the level is measured anew when the job goes on
                return
            result = Result(idx, "ok", json.dumps(found.to_json(), ensure_ascii=False))
        store.save_results(job.id, [result], job.owner)
        if stop.event.is_set():
            return
    store.update(job.id, "")


# ---- what was measured


def results(store: JobStore, job_id: str) -> list[tuple[str, Level | None, str]]:
    """(level, what was measured of it, why it ended early) for every level of a job."""
    found = []
    for _, cells, result in store.iter_results(job_id):
        text = (result.prediction or result.details) if result else ""
        level = Level.from_json(json.loads(text)) if text else None
        found.append((cells[0], level, result.error if result else ""))
    return found


def measurements(store: JobStore, fingerprint: str, device: str = "") -> list[Level]:
    """The newest measurement of every level of a checkpoint in any job of the workspace."""
    found: dict[tuple[str, str], Level] = {}
    for job in store.list(1000, KIND):  # newest first
        if job.task.get("checkpoint_fingerprint") != fingerprint or not job.done:
            continue
        for _, level, _ in results(store, job.id):
            if level is not None and (not device or level.device.partition(":")[0] == device):
                found.setdefault((level.level, level.device), level)
    return list(found.values())


def measured_program(store: JobStore, device: str, level: str) -> int | None:
    """Bytes of Python and its libraries as last measured in this workspace with today's versions; None where never."""
    from ..batch import versions

    now = versions()
    for job in store.list(50, KIND):
        for _, one, _ in results(store, job.id):
            if one is not None and (one.device.partition(":")[0], one.level) == (device, level):
                if one.versions == now and one.program:
                    return one.program
    return None


def flat(found: Iterable[Level]) -> list[dict[str, Any]]:
    """A row per level, context and batch with the names of COLUMNS; bytes, tokens per second, seconds."""
    rows: list[dict[str, Any]] = []
    for level in found:
        same = {
            "model": level.model, "level": level.level, "device": level.device, "device_name": level.device_name,
            "threads": level.threads, "date": level.date, "measured_at_load": level.at_load,
            "measured_weights": level.weights, "measured_program": level.program,
            "load_seconds": round(level.load_seconds, 3),
        }  # fmt: skip
        for point in level.points:
            own: dict[str, Any] = {f"predicted_{part}": point.predicted.get(part) for part in PARTS}
            own |= {"context": point.context, "batch": point.batch, "error": point.error}
            if not point.error:
                own |= {
                    "predicted_total": point.expected, "measured_peak": point.peak,
                    "deviation": round(point.expected / point.peak - 1, 4) if point.peak else None,
                    "measured_after_prefill": point.after_prefill, "allocated": point.allocated,
                    "reserved": point.reserved, "device_used": point.used,
                    "prefill_tokens_per_s": round(point.prefill_per_s, 2),
                    "decode_tokens_per_s": round(point.decode_per_s, 2),
                }  # fmt: skip
            rows.append({name: (same | own).get(name) for name in COLUMNS})
    return rows


def csv_text(found: Iterable[Level]) -> str:
    """`flat` as CSV with the mark that Excel needs for UTF-8."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(flat(found))
    return "\ufeff" + out.getvalue()
