"""The prompt of every row of a run: solved examples and earlier rounds, then the question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import batch
from .task import EXTRA, EvaluationTask

if TYPE_CHECKING:
    from ..tokenizers.base import Tokenizer

Rounds = list[tuple[str, str]]


class Questions(batch.Prompts):
    """`batch.Prompts` with rounds before the question; what all rows share is found once."""

    def __init__(self, tokenizer: Tokenizer, task: EvaluationTask, context: int) -> None:
        """GLMError where the template does not fit the columns, the model, or the model's context."""
        self._task = task
        self._general: Rounds = [(asked, told) for subject, asked, told in task.shots if not subject]
        self._by_subject: dict[str, Rounds] = {}
        for subject, asked, told in task.shots:
            if subject:
                self._by_subject.setdefault(subject, []).append((asked, told))
        self._rounds = self._general
        self._answers = tokenizer.answer_ids
        room = task.settings.max_new_tokens
        if task.method == "likelihood":
            room = max(len(self.answer_ids(one)) for one in (task.labels or task.letters))
        super().__init__(tokenizer, task.template, task.system, task.cells, context, room)

    def _ids(self, text: str) -> tuple[int, ...]:
        from ..tokenizers.base import Message

        turns = [Message("system", self._system)] if self._system.strip() else []
        for asked, told in self._rounds:
            turns += [Message("user", asked), Message("assistant", told)]
        return tuple(self._tokenizer.chat_ids([*turns, Message("user", text)]))

    def rounds(self, cells: Sequence[str]) -> Rounds:
        """What stands before the question of a row."""
        task, shots = self._task, self._general
        if self._by_subject and task.subject:
            shots = self._by_subject.get(cells[task.columns.index(task.subject)], [])
        history = cells[len(task.columns) + EXTRA.index("history")]
        earlier = [(str(asked), str(told)) for asked, told in json.loads(history)] if history else []
        return [*shots, *earlier]

    def build(self, cells: Sequence[str]) -> batch.Prompt:
        """The prompt of one row; what does not fit loses its first rounds, then the ends of its longest cells."""
        rounds, dropped = self.rounds(cells), 0
        self._rounds = rounds
        if rounds:
            text = self.template.render(cells)
            while self._rounds and len(self._ids(text)) > self.limit:
                dropped += 1
                self._rounds = rounds[dropped:]
        built = super().build(cells)
        return replace(built, truncated=True) if dropped else built

    def answer_ids(self, answer: str) -> list[int]:
        """The ids whose probability is that of an answer; of an option its letter alone, as it is released."""
        ids = self._answers(answer)
        return ids[:-1] if self._task.kind == "choice" else ids

    def follow_up(self, question: str, told: str, cells: Sequence[str]) -> tuple[int, ...]:
        """The prompt that asks for the option after a chain of thought, whose end is cut where it is too long.

        Source: evaluate_ceval.py of ChatGLM2-6B.
        """
        rounds = self.rounds(cells)
        self._rounds = rounds
        pieces = self._tokenizer.encode(told)
        while True:
            ids = self._ids(f"{question}{told}\n{self._task.extraction}")
            over = len(ids) - (self.limit + self._task.settings.max_new_tokens - 8)
            if over <= 0:
                return ids
            if pieces:
                pieces = pieces[: max(0, len(pieces) - over)]
                told = self._tokenizer.decode(pieces).rstrip("\ufffd")
            elif self._rounds:
                self._rounds = self._rounds[1:]
            else:
                return ids
