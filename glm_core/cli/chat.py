"""python -m glm_core chat: a conversation at the prompt, or one question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GLMError
from .model import asked, connected, folder_of, own_model, settings_of
from .output import FAILED, INTERRUPTED, printable, say

if TYPE_CHECKING:
    from ..engine import Engine, GenerationSettings, Handle
    from ..tokenizers.base import Message


def chat(options: argparse.Namespace) -> int:
    """Answer one question, or those typed or piped in; 1 if a piped question could not be answered."""
    from ..engine import GenerationSettings
    from ..remote import is_remote

    GenerationSettings.from_json(asked(options)).check()  # before a large model is loaded for nothing
    on_server = options.model is not None and is_remote(options.model)
    folder = None if on_server else folder_of(options.model)
    once = options.prompt is not None
    typed = not once and sys.stdin.isatty()
    with _engine(options, folder, typed) as engine:
        settings = settings_of(options, engine.loaded.defaults, engine.context)
        talk = _Talk(engine, settings, options.system, typed)
        if once:
            return INTERRUPTED if talk.ask(options.prompt).state == "cancelled" else 0
        if typed:
            info = engine.loaded.info
            if engine.remote is not None:
                say(f"{engine.remote.model} at {engine.remote.url}: what you type is sent there.")
            else:
                what = f"{info.name}: {info.family}, {engine.loaded.precision} on {engine.device}"
                say(f"{what}, {engine.context:,} tokens of context.")
            say("clear starts over, stop ends, Ctrl-C stops an answer.")
        status = 0
        for question in _questions(typed):
            if question == "stop":
                break
            try:
                if question == "clear":
                    talk.turns.clear()
                    say("The history is empty.")
                elif question:
                    talk.ask(question)
            except GLMError as error:
                say(f"Error: {error}")
                status = status if typed else FAILED
        return status


@contextmanager
def _engine(options: argparse.Namespace, folder: Path | None, typed: bool) -> Iterator[Engine]:
    """The model that answers: of a folder, or where there is none the server that --model names."""
    if folder is None:
        with connected(options) as engine:
            yield engine
        return
    with own_model() as host:
        if typed:
            say(f"Loading {folder.name} ...")
        yield host.use(folder, options.precision, options.device, base=options.base)


def _questions(typed: bool) -> Iterator[str]:
    """What is typed at the prompt, or the lines of a pipe; Ctrl-C and Ctrl-D end it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys, where the system has it
    try:
        while True:
            line = input("\n> " if sys.stdout.isatty() else "") if typed else sys.stdin.readline()
            if not line and not typed:
                return
            yield line.strip()
    except (EOFError, KeyboardInterrupt):
        if typed:
            print()


class _Talk:
    """A conversation on a terminal; it lasts as long as the command."""

    def __init__(self, engine: Engine, settings: GenerationSettings, system: str, typed: bool) -> None:
        """GLMError where this model knows no system prompt, or it is too long."""
        from ..chat import budget
        from ..tokenizers.base import Message

        self.engine, self.settings, self.system, self.typed = engine, settings, system, typed
        self.turns: list[Message] = []
        question = Message("user", "")
        budget(engine.tokenizer, system, [question], engine.context, settings.max_new_tokens)

    def ask(self, question: str) -> Handle:
        """Print the answer as it comes and keep it; Ctrl-C stops it. GLMError where there is no answer."""
        from ..chat import budget
        from ..engine import Request
        from ..tables.options import plural
        from ..tokenizers.base import Message

        turns = [*self.turns, Message("user", question)]
        room = self.settings.max_new_tokens
        plan = budget(self.engine.tokenizer, self.system, turns, self.engine.context, room)
        handle = self.engine.submit(Request(plan.prompt_ids, self.settings))
        self._print(handle)
        if handle.error is not None:
            raise handle.error
        if handle.text.strip():
            self.turns = [*turns, Message("assistant", handle.text)]
        notes = list(handle.notes)
        if handle.state == "cancelled":
            notes.append("stopped")
        elif handle.finish_reason == "length":
            notes.append(f"cut at {handle.n_tokens:,} tokens, --max-new-tokens allows more")
        if plan.dropped_turns:
            rounds = plural(plan.dropped_turns // 2, "round")
            notes.append(f"{rounds} at the beginning no longer fit and were not sent")
        if self.typed or notes:
            used = f"{plan.used + handle.n_tokens:,} of {plan.limit:,} tokens of context"
            if self.engine.remote is not None:
                used = f"{handle.n_prompt:,} + {handle.n_tokens:,} tokens, as the server counts"
            say(f"[{'; '.join([used, f'{handle.tokens_per_second:.1f} tokens/s', *notes])}]")
        return handle

    def _print(self, handle: Handle) -> None:
        shown = ""
        try:
            while not handle.wait(0.03):
                text = _settled(handle.text, self.settings.stop)
                if len(text) > len(shown) and text.startswith(shown):
                    print(printable(text[len(shown) :]), end="", flush=True)
                    shown = text
        except KeyboardInterrupt:
            handle.cancel("user")
            handle.wait(10)
        finally:
            if not handle.done:
                handle.cancel("not shown")
        rest = handle.text.removeprefix(shown) if handle.text.startswith(shown) else ""
        print(printable(rest), flush=True)


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing answer that stays: no space at its end, and no beginning of a stop text."""
    text = text.rstrip()
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
