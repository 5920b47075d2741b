"""Fine-tuning: examples from the analyst's files, one training loop for every method, a checkpoint and its proof."""

from .job import run

__all__ = ["run"]
