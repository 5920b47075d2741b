"""The shell: python -m glm_core chat | batch | classify | finetune | evaluate | compare | serve | models | doctor, with the calls the pages make.

Answers and tables go to standard output, everything said about them to standard error. Exit status: 0 done,
1 a problem (one line says what to do), 2 wrong usage, 3 some rows failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..errors import GLMError
from ..settings import Settings
from .arguments import parser
from .output import FAILED, INTERRUPTED, PROGRAM, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; wrong usage is argparse's SystemExit(2)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without Chinese shows ? and goes on
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.arguments = given
    log = _log_file()
    logging.getLogger("glm_core").addHandler(log)
    try:
        status = _command(options.command)(options)
        sys.stdout.flush()
        return status
    except GLMError as error:
        say(f"Error: {error}")
    except sqlite3.Error as error:
        say(f"Error: The workspace's database cannot be used: {error}. Free some disk space, then try again.")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("glm_core"):
            raise
        say(f"Error: The package {error.name} is missing. `{PROGRAM} doctor` says how to get it.")
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        logging.getLogger("glm_core").removeHandler(log)
        log.close()
    return FAILED


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """What runs a command; its module is imported now, so that --help stays quick."""
    if name == "chat":
        from .chat import chat

        return chat
    if name == "batch":
        from .batch import batch

        return batch
    if name == "classify":
        from .classify import classify

        return classify
    if name == "finetune":
        from .finetune import finetune

        return finetune
    if name == "evaluate":
        from .evaluate import evaluate

        return evaluate
    if name == "compare":
        from .evaluate import compare

        return compare
    if name == "models":
        from .checkpoints import models

        return models
    if name == "memory":
        from .memory import memory

        return memory
    if name == "serve":
        from .serve import serve

        return serve
    if name == "remotes":
        from .remotes import remotes

        return remotes
    if name == "users":
        from .users import users

        return users
    from .doctor import doctor

    return doctor


def _log_file() -> logging.Handler:
    """Where tracebacks go instead of onto the screen: a file of the workspace, once there is one."""
    with suppress(GLMError, OSError):
        folder = Settings.read().workspace
        if folder.is_dir():
            (folder / "logs").mkdir(exist_ok=True, mode=0o700)
            return logging.FileHandler(folder / "logs" / "shell.log", encoding="utf-8", delay=True)
    return logging.NullHandler()
