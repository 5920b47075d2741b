"""What a model takes in memory: predicted from its configuration alone, and measured level by level on this machine.

shapes.py reads the sizes, prediction.py computes, measuring.py runs a level in a process of its own, work.py is the
job, quality.py asks labelled rows at every level, published.py has the makers' figures.
"""

from .measuring import Level, Point, Unfinished, measure
from .prediction import Prediction, levels, longest_context, predict, table, usual
from .published import FIGURES, Published, figures, same_shape
from .quality import Change, best, changed, place, start_quality
from .quality import runs as quality_runs
from .shapes import BUILT_IN, Shape, shape
from .work import (
    COLUMNS,
    KIND,
    PARTS,
    MemoryTask,
    csv_text,
    flat,
    measured_program,
    measurements,
    plan,
    results,
    run,
    start,
)

__all__ = [
    "BUILT_IN",
    "COLUMNS",
    "FIGURES",
    "KIND",
    "PARTS",
    "Change",
    "Level",
    "MemoryTask",
    "Point",
    "Prediction",
    "Published",
    "Shape",
    "Unfinished",
    "best",
    "changed",
    "csv_text",
    "figures",
    "flat",
    "levels",
    "longest_context",
    "measure",
    "measured_program",
    "measurements",
    "place",
    "plan",
    "predict",
    "quality_runs",
    "results",
    "run",
    "same_shape",
    "shape",
    "start",
    "start_quality",
    "table",
    "usual",
]
