"""Errors an analyst can fix: what happened, with the value, and what to do about it."""

from __future__ import annotations


class GLMError(Exception):
    """A problem with a way out; shown as a sentence, never as a traceback."""

    def __init__(self, message: str, todo: str = "") -> None:
        self.message = message
        self.todo = todo
        super().__init__(f"{message} {todo}".strip())


class TableError(GLMError):
    """A file that cannot be read or written as a table."""
