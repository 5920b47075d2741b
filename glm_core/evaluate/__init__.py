"""Evaluation runs: a checkpoint on a labelled file, or predictions made elsewhere, with scores and their intervals.

task.py says what is asked, questions.py how, work.py does it as a durable job, answers.py reads what was said,
scoring.py counts, registry.py lists what there is, views.py prepares what a screen or a report shows of it.
"""

from . import views
from .registry import (
    Run,
    answers_page,
    by_step,
    column,
    delete,
    export,
    import_predictions,
    manifest,
    rename,
    rerun,
    run_of,
    runs,
    start_precisions,
    start_steps,
    tag,
)
from .scoring import PerRow, Scores, formula, per_row, published, scores
from .task import (
    KINDS,
    METHODS,
    METRICS,
    EvaluationTask,
    Kind,
    Method,
    guess_columns,
    guess_kind,
    plan,
    with_model,
)
from .work import run, start, start_in_background

__all__ = [
    "KINDS",
    "METHODS",
    "METRICS",
    "EvaluationTask",
    "Kind",
    "Method",
    "PerRow",
    "Run",
    "Scores",
    "answers_page",
    "by_step",
    "column",
    "delete",
    "export",
    "formula",
    "guess_columns",
    "guess_kind",
    "import_predictions",
    "manifest",
    "per_row",
    "plan",
    "published",
    "rename",
    "rerun",
    "run",
    "run_of",
    "runs",
    "scores",
    "start",
    "start_in_background",
    "start_precisions",
    "start_steps",
    "tag",
    "views",
    "with_model",
]
