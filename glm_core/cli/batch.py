"""python -m glm_core batch: the job of the Batch page, with a progress bar, resumable."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from .arguments import FORMATS
from .job import carried_out, opened_store, reading, writable
from .model import chosen, settings_of, tokenizer_of, where
from .output import INTERRUPTED, SOME_ROWS_FAILED, say

if TYPE_CHECKING:
    from ..batch import BatchTask
    from ..jobs import Job


def batch(options: argparse.Namespace) -> int:
    """Answer every row of a table as a durable job and write the result; 3 if rows failed."""
    from .. import batch as work
    from .. import tables
    from ..remote import shown
    from ..tables.options import plural

    out = writable(options.out, options.file)
    store, how = opened_store(options.owner), reading(options)
    table = tables.open_table(options.file, how)
    task = _task(options, table.info.columns, how.to_json())

    def begin() -> Job:
        say(f"Reading {table.info.name} ...")
        job = work.start(store, task, table)
        say(f"Job {job.id}: {job.total:,} rows for {shown(task.checkpoint)}.")
        return job

    job = carried_out(options, store, "batch", task.to_json(), begin, work.run, "answered")
    if job is None:
        return INTERRUPTED
    report = work.export(store, job.id, out, FORMATS[out.suffix.lower()], guard=not options.no_guard)
    for note in (*job.warnings, *report.notes):
        say(f"Note: {note}")
    shortened = f", {job.truncated:,} shortened to fit" if job.truncated else ""
    print(f"{out}: {plural(job.done, 'row')} answered, {job.failed:,} failed{shortened}")
    if job.failed:
        say("The columns status and note say which rows failed and why; --retry-failed tries them again.")
        return SOME_ROWS_FAILED
    return 0


def _task(options: argparse.Namespace, columns: tuple[str, ...], read_options: dict[str, Any]) -> BatchTask:
    """The task, checked against table and checkpoint before anything is stored; GLMError where it fails."""
    from .. import batch as work

    if options.column is not None and options.column not in columns:
        raise GLMError(
            f"{options.file.name} has no column {options.column!r}; it has {', '.join(columns)}.",
            "Choose one of these.",
        )
    template = options.prompt if options.column is None else work.reference(options.column, columns)
    under, model = chosen(options)
    settings = settings_of(options, {}, under.context)
    work.Prompts(
        tokenizer_of(under), template, options.system, columns, under.context, settings.max_new_tokens
    )
    return work.BatchTask(
        **model,
        **where(options, model),
        template=template,
        system=options.system,
        settings=settings,
        output_column=options.output_column,
        input_name=options.file.name,
        input_path=str(options.file.resolve()),
        input_sha256=work.file_sha256(options.file),
        columns=columns,
        read_options=read_options,
        limit_rows=options.limit,
        versions=work.versions(),
    )
