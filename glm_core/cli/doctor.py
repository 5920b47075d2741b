"""python -m glm_core doctor: what is installed, what is missing, how to get it."""

from __future__ import annotations

import argparse

from .output import FAILED, json_text, printable


def doctor(options: argparse.Namespace) -> int:
    """Show what there is and what is missing; 1 if something is."""
    from .. import doctor as examination

    found = examination.report()
    print(json_text(found) if options.json else printable(examination.text(found)))
    return FAILED if found["problems"] else 0
