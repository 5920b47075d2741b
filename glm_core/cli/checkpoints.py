"""python -m glm_core models: what is on this machine, and what a folder holds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import Settings
from .output import Meter, json_text, printable, say, short, width

if TYPE_CHECKING:
    from ..checkpoints import CheckpointInfo


def models(options: argparse.Namespace) -> int:
    """List the checkpoints in the model folders, or do something with one."""
    if options.does == "inspect":
        return _inspect(options.folder.expanduser(), options.json)
    if options.does is not None:
        return _rewrite(options)
    from .. import checkpoints

    roots = Settings.read().model_roots
    found = checkpoints.find(roots)
    if options.json:
        print(json_text([_facts(info) for info in found]))
    elif found:
        print(_listed(found))
    else:
        say(f"There is no checkpoint in {', '.join(map(str, roots))}. Add your own folders with GLM_MODELS.")
    return 0


def _inspect(folder: Path, as_json: bool) -> int:
    from .. import checkpoints

    info = checkpoints.inspect(folder)
    print(json_text(_facts(info)) if as_json else _described(info))
    return 0


def _rewrite(options: argparse.Namespace) -> int:
    """convert, merge or export; says where the result is."""
    from .. import checkpoints

    meter = Meter()
    if options.does == "convert":
        write = checkpoints.convert_to_glm if options.to == "glm" else checkpoints.convert
        out = write(options.folder, options.out, options.precision, meter)
    elif options.does == "merge":
        out = checkpoints.merge(options.folder, options.out, options.base, options.precision, meter)
    else:
        out = checkpoints.export(options.folder, options.out)
    meter.end()
    return _inspect(out, False)


def _facts(info: CheckpointInfo) -> dict[str, Any]:
    from ..checkpoints import PRECISIONS, fingerprint

    facts = {name: getattr(info, name) for name in info.__dataclass_fields__ if name != "adapter"}
    facts |= {"path": str(info.path), "loadable": info.loadable, "needs_base": info.needs_base}
    if info.adapter is not None:
        own = dataclasses.asdict(info.adapter)
        facts["adapter"] = {name: own[name] for name in own if name not in ("shapes", "recorded")}
    if info.loadable:
        facts["memory_bytes"] = {precision: info.memory_bytes(precision) for precision in PRECISIONS}
        facts["fingerprint"] = fingerprint(info.path)
    return facts


def _described(info: CheckpointInfo) -> str:
    from ..checkpoints import PRECISIONS
    from ..doctor import size

    rows = {
        "folder": info.path,
        "family": info.family,
        "parameters": f"{info.parameters:,}",
        "size on disk": f"{size(info.size_bytes)}, stored as {info.dtype or 'unknown'}",
    }
    if info.adapter is not None:
        rows["adapter"] = info.adapter.text
        rows["base"] = info.base or "not named"
    if info.layers:
        rows |= {
            "prompt format": info.generation,
            "layers": f"{info.layers} of width {info.hidden_size:,}",
            "context": f"{info.context:,} tokens",
            "weights in memory": ", ".join(f"{p} {size(info.memory_bytes(p))}" for p in PRECISIONS),
        }
    rows |= {f"problem {n}": problem for n, problem in enumerate(info.problems, 1)}
    return printable("\n".join(f"{name:18} {value}" for name, value in rows.items()))


def _listed(found: Sequence[CheckpointInfo]) -> str:
    """A table of checkpoints, with what is wrong under each."""
    from ..doctor import size

    table = [("name", "family", "parameters", "size", "stored as", "context", "folder")]
    for info in found:
        sizes = (short(info.parameters), size(info.size_bytes), info.dtype, f"{info.context:,}")
        table.append((info.name, info.family, *sizes, str(info.path)))
    widths = [max(width(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row, problems in zip(table, [(), *(info.problems for info in found)], strict=True):
        cells = (cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        lines += [f"  ! {problem}" for problem in problems]
    return printable("\n".join(lines))
