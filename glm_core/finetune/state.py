"""Checkpoints of a training that is under way: whole or absent, whenever the process is killed.

A folder checkpoint-STEP holds the trained weights in the layout of their method, trainer_state.json (how far, by which
plan, on which data) and trainer.pt (the optimiser). It is written beside and takes its name once it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import GLMError
from .methods import Trainee

STATE, TENSORS = "trainer_state.json", "trainer.pt"
PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint-(\d+)")


class Row(Protocol):
    """A training row: ids, and labels that equal them where a token counts and are -100 elsewhere."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a training: where it is, how far it got, and what was written of it."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self) -> dict[str, Any]:
        """The optimiser's state, on the CPU."""
        import torch

        found: dict[str, Any] = torch.load(self.path / TENSORS, map_location="cpu", weights_only=True)
        return found


def data_hash(rows: Sequence[Row]) -> str:
    """SHA-256 over ids and labels of all rows in their order."""
    import numpy as np

    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.ids).to_bytes(4, "little"))
        digest.update(np.asarray(row.ids, dtype=np.int32).tobytes())
        digest.update(np.asarray(row.labels, dtype=np.int32).tobytes())
    return digest.hexdigest()


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of an output folder, the earliest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest(folder: str | Path) -> Saved | None:
    """The newest checkpoint of an output folder, or None; GLMError where its state is damaged."""
    found = checkpoints(folder)
    return read(found[-1]) if found else None


def read(path: str | Path) -> Saved:
    """One checkpoint; GLMError where its state is missing or damaged."""
    path = Path(path)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Saved(path, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GLMError(
            f"{path} is no checkpoint to resume from: {type(error).__name__}: {error}.",
            "Resume from an earlier checkpoint of the same folder.",
        ) from error


def write(
    folder: Path, step: int, trainee: Trainee, state: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Path:
    """Write checkpoint-STEP and return it; GLMError where the disk does not take it, and all is as before."""
    import torch
    from safetensors import SafetensorError

    target = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        need, free = size_of(trainee), shutil.disk_usage(folder).free
        if free < need:
            raise GLMError(
                *_no_room(target, f"about {need / 2**20:,.0f} MB are needed, {free / 2**20:,.0f} MB are free")
            )
        trainee.save(partial, exact=True)
        torch.save(dict(tensors), partial / TENSORS)
        text = json.dumps({**state, "step": step}, indent=1, ensure_ascii=False) + "\n"
        (partial / STATE).write_text(text, encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _to_disk(path)
        if target.exists():  # of an earlier run that had got further than the checkpoint it resumed from
            _remove(target)
        partial.rename(target)
        _to_disk(folder)
    except (OSError, RuntimeError, SafetensorError, GLMError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(partial.with_name(partial.name + PARTIAL), ignore_errors=True)
        cause = error.__cause__ if isinstance(error, GLMError) else error
        if cause is None:
            raise
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise GLMError(*_no_room(target, reason)) from error
    return target


def _no_room(target: Path, reason: str) -> tuple[str, str]:
    return (
        f"{target} cannot be written: {reason}.",
        "Free some disk space and resume; earlier checkpoints are as they were.",
    )


def size_of(trainee: Trainee) -> int:
    """Bytes of one checkpoint, about: the trained weights and two numbers of the optimiser for each."""
    trained = 4 * trainee.trainable_count
    whole = trainee.loaded.weight_bytes if trainee.method.kind in ("freeze", "full") else trained
    return whole + 2 * trained + (1 << 20)


def prune(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best; what a killed process left half written goes too."""
    for path in checkpoints(folder)[: -max(keep, 1)]:
        if path != best:
            _remove(path)
    for path in folder.glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its own name."""
    if not path.exists():
        return
    gone = path if path.name.endswith(PARTIAL) else path.with_name(f"{path.name}.old{PARTIAL}")
    if gone != path:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        import errno

        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(handle)
