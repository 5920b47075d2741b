"""python -m glm_core memory: what a model takes at every level, predicted without its weights, or measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from .job import carried_out, opened_store
from .model import folder_of
from .output import INTERRUPTED, SOME_ROWS_FAILED, json_text, printable, say

if TYPE_CHECKING:
    from ..finetune.methods import Method
    from ..jobs import Job
    from ..memory import Level, Prediction, Shape

GIB = 1 << 30


def memory(options: argparse.Namespace) -> int:
    """Print the prediction of every level, or measure a checkpoint; 3 if a level failed."""
    if options.measure:
        return _measure(options)
    from .. import memory as work

    of = _shape(options.model)
    device = "cpu" if options.device == "auto" else options.device
    found = work.table(
        of,
        options.precision,
        options.context or (None,),
        options.batch or (1,),
        _method(options.train),
        device,
    )
    figures = work.figures(work.same_shape(of.config)) if device == "cuda" else ()
    fits = [] if options.card is None else _fits(of, found, options)
    if options.json:
        print(json_text({
            "model": of.name, "family": of.family, "parameters": of.parameters, "context": of.context,
            "device": device, "predictions": [one.to_json() for one in found],
            "published": [
                {"level": one.level, "what": one.what, "gib": one.size, "predicted": one.predicted().total,
                 "deviation": round(one.deviation(), 4), "source": one.source} for one in figures
            ],
            **({"card_gb": options.card, "fits": fits} if options.card is not None else {}),
        }))  # fmt: skip
        return 0
    _print(of, found, device)
    for line in fits:
        print(line["text"])
    return 0


def _shape(named: str | None) -> Shape:
    """A built-in shape, a folder with a config.json, or a checkpoint of the model folders."""
    from .. import memory as work

    if named is not None and (named.lower() in work.BUILT_IN or Path(named).expanduser().is_dir()):
        return work.shape(named)
    try:
        return work.shape(folder_of(named))
    except GLMError as error:
        if named is None:
            raise
        raise GLMError(error.message, f"Built in are {', '.join(work.BUILT_IN)}. {error.todo}") from error


def _method(kind: str | None) -> Method | None:
    if kind is None:
        return None
    from ..finetune.methods import Method

    return Method(kind)  # type: ignore[arg-type]


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _print(of: Shape, found: list[Prediction], device: str) -> None:
    names = list(dict.fromkeys(part for one in found for part in one.parts))
    print(f"{printable(of.name)} ({of.family}), {of.parameters:,} parameters. Predicted GiB on {device}:")
    print("  ".join(["level       ", "context", "batch", *(f"{name:>11}" for name in names), "      total"]))
    for one in found:
        cells = [f"{_gib(one.parts.get(name, 0)):>11}" for name in names]
        row = [f"{one.precision:12}", f"{one.context:7,}", f"{one.batch:5}", *cells, f"{_gib(one.total):>11}"]
        print("  ".join(row))


def _fits(of: Shape, found: list[Prediction], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What fits into so many GB, level by level."""
    from .. import memory as work

    room = int(options.card * GIB)
    lines = []
    for one in found:
        fits = one.total <= room
        line: dict[str, Any] = {
            "level": one.precision, "context": one.context, "batch": one.batch, "fits": fits,
        }  # fmt: skip
        text = f"{one.precision}: {one.batch} x {one.context:,} tokens"
        text += (
            f" fit into {options.card:g} GB"
            if fits
            else f" need {_gib(one.total)} GiB, more than {options.card:g} GB"
        )
        if not one.training:
            line["longest_context"] = work.longest_context(of, one.precision, room, one.batch, one.device)
            text += f"; the longest context is {line['longest_context']:,}"
        lines.append(line | {"text": f"{text}."})
    return lines


# ---- measuring


def _measure(options: argparse.Namespace) -> int:
    from .. import memory as work

    if options.train is not None:
        raise GLMError(
            "A training is measured on its own data.",
            "Leave out --measure, or start the trial steps of finetune.",
        )
    task = work.plan(
        folder_of(options.model), options.precision, options.context, options.batch, options.device,
        base=options.base,
    )  # fmt: skip
    store = opened_store(options.owner)

    def begin() -> Job:
        job = work.start(store, task)
        say(f"Job {job.id}: {job.total} levels of {Path(task.checkpoint).name}.")
        return job

    plain = json.loads(json.dumps(task.to_json()))
    job = carried_out(options, store, work.KIND, plain, begin, work.run, "measured", ("versions",))
    if job is None:
        return INTERRUPTED
    found = work.results(store, job.id)
    levels = [level for _, level, _ in found if level is not None]
    if options.json:
        print(json_text({"job": job.id, "levels": [level.to_json() for level in levels],
                         "errors": {name: error for name, _, error in found if error}}))  # fmt: skip
    else:
        _print_levels(levels)
    for name, _, error in found:
        if error:
            say(f"{name}: {error}")
    return SOME_ROWS_FAILED if any(error for _, _, error in found) else 0


def _print_levels(levels: list[Level]) -> None:
    for level in levels:
        print(
            f"{level.level}: {_gib(level.at_load)} GiB once loaded ({level.load_seconds:.1f} s), weights "
            f"{_gib(level.weights)}, program {_gib(level.program)}; {level.device}, {level.date}"
        )
        for point in level.points:
            if point.error:
                print(f"  {point.context:7,} x {point.batch:<3} {point.error}")
                continue
            off = point.expected / max(1, point.peak) - 1
            print(
                f"  {point.context:7,} x {point.batch:<3} {_gib(point.peak)} GiB at most, predicted "
                f"{_gib(point.expected)} ({off:+.1%}); {point.prefill_per_s:,.0f} tokens/s read, "
                f"{point.decode_per_s:,.1f} written"
            )
