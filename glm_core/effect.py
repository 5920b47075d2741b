"""Whether an adapter changes anything: the same prompts answered with it and without it, on one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .engine import Request, out_of_memory
from .errors import GLMError

if TYPE_CHECKING:
    from .adapters import Effect
    from .engine import Engine

TOKENS = 32  # per answer
Progress = Callable[[int, int], None]  # (tokens chosen so far, the most there can be)


@dataclass(frozen=True)
class EffectReport:
    """Greedy answers to `adapters.PROBES` without and with the adapter, and how many of them differ."""

    effect: Effect
    prompts: tuple[str, ...]
    without: tuple[str, ...]
    with_: tuple[str, ...]


def has_adapter(engine: Engine) -> bool:
    """Whether the loaded model carries a P-tuning v2 prefix or a LoRA."""
    return engine.loaded.prefix is not None or bool(getattr(engine.model, "peft_config", None))


def measure(engine: Engine, progress: Progress | None = None) -> EffectReport:
    """Answer `adapters.PROBES` without and with the loaded adapter, at most 32 tokens each, and compare.

    Requests may run meanwhile and never see the adapter switched off: each forward of this is a task of its own on
    the engine's thread, and nothing that is computed here goes into the prefix cache. GLMError for a model without
    an adapter, and when the model is unloaded before the end.
    """
    from . import adapters
    from .tokenizers.base import Message

    if not has_adapter(engine):
        raise GLMError(
            f"{engine.loaded.info.name} carries no adapter that could be switched off.",
            "Load a P-tuning v2 or LoRA folder.",
        )
    prompts = [list(engine.tokenizer.chat_ids([Message("user", text)])) for text in adapters.PROBES]
    longest = max(prompts, key=len)
    engine.check(Request(tuple(longest)))
    limit = min(TOKENS, engine.context - len(longest))
    # The same steps for both, else rounding in half precision could differ where the adapter does nothing.
    chunk = engine.forward_columns(len(prompts), len(longest))
    rows = max(1, min(len(prompts), engine.max_rows))
    while True:
        try:
            without, with_ = _both(engine, prompts, rows, chunk, limit, progress)
            break
        except Exception as error:
            if not out_of_memory(error):
                raise
        if rows == 1:
            raise GLMError(
                f"Memory ran out on a prompt of {len(longest)} tokens.",
                "Shorten the text or the history, close other programs, or load the model in a lower precision.",
            )
        rows //= 2
    effect = adapters.took_effect(without, with_)
    return EffectReport(effect, adapters.PROBES, tuple(without), tuple(with_))


def _both(
    engine: Engine, prompts: Sequence[list[int]], rows: int, chunk: int, limit: int, progress: Progress | None
) -> tuple[list[str], list[str]]:
    """The answers without and with the adapter, so many rows at a time."""
    groups = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    total = 2 * len(groups) * limit
    found: list[list[str]] = []
    for number, adapted in enumerate((False, True)):
        answers: list[str] = []
        for place, group in enumerate(groups):
            before = (number * len(groups) + place) * limit

            def chosen(count: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + count, total)

            ids = _greedy(engine, group, adapted, chunk, limit, chosen)
            answers += [engine.tokenizer.answer_text(one, True) for one in ids]
            chosen(limit)
        found.append(answers)
    return found[0], found[1]


def _greedy(
    engine: Engine,
    prompts: Sequence[list[int]],
    adapted: bool,
    chunk: int,
    limit: int,
    chosen: Callable[[int], None],
) -> list[list[int]]:
    """Greedy ids of some prompts together, each forward between two steps of the engine's own rows."""
    import torch.nn.functional as F

    view, switch = (engine, _on) if adapted else _without(engine)
    # A cache of its own: nothing of the engine's rows or of its prefix cache is read or written.
    cache = view.empty_cache(len(prompts))
    ids, real, positions = view.left_padded([list(prompt) for prompt in prompts], 0)
    layout = view.layouts(prompts)
    known = real.shape[1] - ids.shape[1]
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    tokens: list[int] = []

    def forward(begin: int, end: int) -> None:
        with switch():
            logits = view.forward(
                cache, ids[:, begin:end], positions[:, begin:end], real[:, : known + end], layout
            )
        tokens[:] = logits.argmax(-1).tolist()

    for count in range(1, limit + 1):
        width = ids.shape[1]
        for begin in range(0, width, chunk):
            engine.between_steps(partial(forward, begin, min(width, begin + chunk)))
        for row in tuple(open_rows):
            answers[row].append(tokens[row])
            if tokens[row] in engine.tokenizer.stop_ids:
                open_rows.discard(row)
        chosen(count)
        if not open_rows:
            break
        known = real.shape[1]
        ids, positions = ids.new_tensor(tokens)[:, None], positions[:, -1:] + 1
        real = F.pad(real, (0, 1), value=True)
    return answers


def _without(engine: Engine) -> tuple[Engine, Callable[[], AbstractContextManager[None]]]:
    """(what computes without the adapter, what has to be open around each of its forwards)."""
    if engine.loaded.prefix is None:
        return engine, partial(_lora_off, engine.model)
    return engine.without_prefix(), _on


def _on() -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _lora_off(model: Any) -> Iterator[None]:
    from . import adapters

    name = next(iter(model.peft_config))
    adapters.use_lora(model, None)
    try:
        yield
    finally:
        adapters.use_lora(model, name)
