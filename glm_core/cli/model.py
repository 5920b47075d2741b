"""The model that a command means, loaded by itself or by the process, and how it is to answer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..settings import MINI, Settings
from .arguments import SAMPLING
from .output import PROGRAM, Meter

LONGEST_ANSWER = 512

if TYPE_CHECKING:
    from ..checkpoints import CheckpointInfo
    from ..engine import EngineHost, GenerationSettings
    from ..remote import RemoteEngine
    from ..tokenizers.base import Tokenizer


def folder_of(named: str | None) -> Path:
    """The checkpoint meant by --model: a folder, or a name in the model folders; GLMError if neither."""
    from .. import checkpoints
    from ..remote import is_remote

    hint = f"`{PROGRAM} models` lists the checkpoints found."
    if named is not None and is_remote(named):
        raise GLMError(
            f"{named} is on a server; this needs weights on this machine.", f"Choose a checkpoint; {hint}"
        )
    if named is None:
        if not (MINI / "config.json").is_file():
            raise GLMError(f"There is no embedded model in {MINI}.", f"Choose one with --model; {hint}")
        return MINI
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder.resolve()
    for info in checkpoints.find(Settings.read().model_roots):
        if info.name == named:
            return info.path
    raise GLMError(f"There is neither a folder nor a checkpoint {named!r}.", f"Check the path; {hint}")


def chosen(options: argparse.Namespace) -> tuple[CheckpointInfo, dict[str, Any]]:
    """(the whole checkpoint under what was chosen, the values of a task that name model, precision and device)."""
    from .. import checkpoints
    from ..remote import is_remote

    if options.model is not None and is_remote(options.model):
        return _on_server(options)
    folder = folder_of(options.model)
    info = checkpoints.inspect(folder)
    if info.problems:
        problems = " ".join(info.problems)
        raise GLMError(f"{folder} cannot be loaded. {problems}", "Repair the folder or choose another.")
    under = checkpoints.base_of(info, options.base) if info.needs_base else info
    device = checkpoints.best_device() if options.device == "auto" else options.device
    auto = options.precision == "auto"
    return under, {
        "checkpoint": str(folder),
        "checkpoint_fingerprint": checkpoints.fingerprint(folder, under.path if info.needs_base else None),
        "precision": checkpoints.best_precision(under, device) if auto else options.precision,
        "device": device,
        "generation": under.generation,
        "base": str(under.path) if info.needs_base else "",
    }


def _on_server(options: argparse.Namespace) -> tuple[CheckpointInfo, dict[str, Any]]:
    from ..remote import info_of

    with connected(options) as engine:
        remote = engine.remote
        return info_of(remote), {
            "checkpoint": remote.spec,
            "checkpoint_fingerprint": remote.fingerprint,
            "precision": "remote",
            "device": remote.host,
            "generation": "remote",
            "base": "",
            "remote": engine.record(),
        }


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[RemoteEngine]:
    """The server that --model names, for as long as it is needed. GLMError where it does not answer."""
    from ..remote import connect, find

    engine = connect(find(options.model, options.key_env or "", options.concurrency))
    try:
        yield engine
    finally:
        engine.close()


def tokenizer_of(info: CheckpointInfo) -> Tokenizer:
    """What makes prompts for a checkpoint, on this machine or on a server."""
    from .. import checkpoints
    from ..remote import is_remote
    from ..remote.engine import Characters

    return Characters() if is_remote(info.path) else checkpoints.load_tokenizer(info.path, info.generation)


@contextmanager
def own_model() -> Iterator[EngineHost]:
    """The engine host; what is loaded inside is unloaded after it: no thread may compute at Python's end."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would write across ours
    from .. import engine

    host = engine.host()
    before = host.current
    host.on_progress = meter = Meter()
    try:
        yield host
    finally:
        host.on_progress = None
        meter.end()
        if host.current is not before:
            with suppress(GLMError):
                host.unload()


def where(options: argparse.Namespace, model: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a task that say where its rows are done; GLMError for a cluster that cannot be."""
    from .. import cluster

    if options.engine == "local":
        for name in cluster.WHERE[1:]:
            if getattr(options, name):
                raise GLMError(f"--{name.replace('_', '-')} is for a cluster.", "Add --engine ray.")
        return {}
    values = {name: getattr(options, name) for name in cluster.WHERE}
    found = {name: value for name, value in values.items() if value}
    cluster.check(
        str(model["checkpoint"]),
        found.get("address", ""), found.get("workers", 0), found.get("cpus_per_worker", 0.0),
    )  # fmt: skip
    return found


def settings_of(options: argparse.Namespace, defaults: Mapping[str, Any], context: int) -> GenerationSettings:
    """What was asked for over the defaults; a default longest answer leaves the prompt half the context."""
    from ..engine import GenerationSettings

    longest = min(int(defaults.get("max_new_tokens", LONGEST_ANSWER)), max(1, context // 2))
    settings = GenerationSettings.from_json({**defaults, "max_new_tokens": longest, **asked(options)})
    settings.check()
    return settings


def asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
