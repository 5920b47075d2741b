"""`python -m glm_core.minimodel corpus | tokenizer | train | evaluate | all`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ..errors import GLMError
from ..settings import MINI


def main(arguments: list[str] | None = None) -> int:
    """Run one step of the recipe, or all of them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.minimodel", description=__doc__)
    parser.add_argument("step", choices=("corpus", "tokenizer", "train", "evaluate", "all"))
    parser.add_argument(
        "--folder", type=Path, default=MINI, help="where the checkpoint is (default: data/models/glm-mini)"
    )
    parser.add_argument("--state", type=Path, help="file that lets an interrupted training go on")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after the epoch that ends past this"
    )
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="which rows are evaluated")
    parser.add_argument("--list", action="store_true", help="print every dialogue prompt with its answer")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except GLMError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from . import corpus, evaluation, training

    if options.step in ("corpus", "all"):
        for name, counts in corpus.build().items():
            print(f"{name}: {', '.join(f'{part} {count:,}' for part, count in counts.items())}")
    if options.step in ("tokenizer", "all"):
        print(f"tokenizer.model: {training.train_tokenizer(options.folder):,} ids")
    if options.step in ("train", "all"):
        training.train(options.folder, state=options.state, seconds=options.seconds)
    if options.step in ("evaluate", "all"):
        evaluation.evaluate(options.folder, options.split, options.list)


if __name__ == "__main__":
    sys.exit(main())
