"""How much of what a model could do before a training is left after it: general questions, asked before and after."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from .. import statistics
from ..errors import GLMError
from ..settings import DATA
from .encoding import Encoded
from .methods import IGNORED

if TYPE_CHECKING:
    from ..checkpoints import LoadedModel
    from ..engine import Engine, Handle
    from ..tokenizers.base import Tokenizer

FILE = DATA / "probes" / "general.jsonl"
TOKENS = 48  # per answer
AT_ONCE = 256  # requests in the queue; `stop` is asked between them and while they run
WAIT_S = 0.2
TOKENS_AT_ONCE = {"cpu": 4096}  # of a forward pass without gradients
TOKENS_ELSEWHERE = 1 << 15
LOGITS_AT_ONCE = 1 << 25  # numbers
LEVEL = statistics.LEVEL
TOLERATED = 0.10  # a loss of right answers below this, for sure, is called none
FEW_RIGHT = 10  # right answers before, below which a loss can hardly be seen

Stop = Callable[[], object]
Progress = Callable[[int, int], None]  # (answered, of all)
Verdict = Literal["kept", "lost some", "lost", "undecided"]


class Stopped(GLMError):
    """Measuring was asked to stop."""

    def __init__(self) -> None:
        super().__init__("The measuring was stopped.", "Start it again; the training is not affected.")


@dataclass(frozen=True)
class Probe:
    """A general question.

    answer   a right answer, whose likelihood is measured
    accept   regular expressions; an answer is right if one is found in it after NFKC and case folding
    """

    id: str
    language: str
    kind: str
    prompt: str
    answer: str
    accept: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether an answer says what is right."""
        text = unicodedata.normalize("NFKC", answer).casefold()
        return any(re.search(pattern, text) for pattern in self.accept)


@dataclass(frozen=True)
class ProbeResult:
    """What a model made of the probes, in their order.

    nll   of the reference answer and the end after it, in nats per token
    """

    ids: tuple[str, ...]
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    nll: tuple[float, ...]


@dataclass(frozen=True)
class Broken:
    """A probe that was answered right before and no longer is."""

    id: str
    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Gauge(statistics.Result):
    """The probes before and after.

    before, after   share answered right, with Wilson's interval
    paired          exact McNemar test, A before and B after
    nll             mean nats per token of the reference answers, A after and B before: above 0, less likely now
    fixed           probes that are right only after
    changed         answers that are not the same text
    """

    n: int
    before: statistics.Interval
    after: statistics.Interval
    paired: statistics.McNemar
    nll: statistics.Difference
    fixed: int
    changed: int
    verdict: Verdict
    text: str
    broke: tuple[Broken, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields in types JSON has."""
        return super().to_json() | {"broke": [vars(one) for one in self.broke]}


@lru_cache(maxsize=1)
def general() -> tuple[Probe, ...]:
    """The probes of data/probes/general.jsonl: half Chinese, half English; facts, sums, words, common sense."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(Probe(**row | {"accept": tuple(row["accept"])}) for row in rows)


def measure(
    engine: Engine,
    probes: Sequence[Probe] | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Answer the probes greedily, many at a time, and score their reference answers, with what the engine has loaded.

    The likelihoods are computed outside of the engine's thread: nobody else may use the engine meanwhile. Stopped
    where `stop` says so.
    """
    from ..tokenizers.base import Message

    probes = general() if probes is None else probes
    tokenizer = engine.tokenizer
    prompts = [tuple(tokenizer.chat_ids([Message("user", probe.prompt)])) for probe in probes]
    texts = answer(engine, prompts, TOKENS, stop, progress)
    rows = [
        with_answer(prompt, probe.answer, tokenizer) for prompt, probe in zip(prompts, probes, strict=True)
    ]
    losses = answer_losses(engine.loaded, rows, stop)
    return ProbeResult(
        ids=tuple(probe.id for probe in probes),
        answers=tuple(texts),
        right=tuple(probe.is_right(text) for probe, text in zip(probes, texts, strict=True)),
        nll=tuple(total / count for total, count in losses),
    )


def compare(before: ProbeResult, after: ProbeResult, probes: Sequence[Probe] | None = None) -> Gauge:
    """What is lost: right answers by an exact paired test, likelihoods by a paired bootstrap, and a verdict."""
    if before.ids != after.ids:
        raise ValueError("the two results are of different probes")
    known = {probe.id: probe for probe in (general() if probes is None else probes)}
    n = len(before.ids)
    paired = statistics.mcnemar(before.right, after.right)
    nll = statistics.paired_bootstrap_mean(after.nll, before.nll)
    first, second = (statistics.wilson(sum(one.right), n) for one in (before, after))
    broke = tuple(
        Broken(name, known[name].prompt, known[name].answer, before.answers[i], after.answers[i])
        for i, name in enumerate(before.ids)
        if before.right[i] and not after.right[i]
    )
    verdict, text = _verdict(paired, nll)
    return Gauge(
        n=n,
        before=first,
        after=second,
        paired=paired,
        nll=nll,
        fixed=paired.only_b,
        changed=sum(a != b for a, b in zip(before.answers, after.answers, strict=True)),
        verdict=verdict,
        text=text,
        broke=broke,
    )


def _verdict(paired: statistics.McNemar, nll: statistics.Difference) -> tuple[Verdict, str]:
    n, was = paired.n, paired.both_right + paired.only_a
    now = paired.both_right + paired.only_b
    if paired.p_value is None or paired.low is None or paired.high is None:
        return "undecided", "No general question was asked, so nothing is known about what was lost."
    counts = f"{now} of {n} general questions are answered right, {was} before the training"
    if paired.p_value < 1 - LEVEL and now < was:
        if 2 * now <= was:
            return "lost", f"General ability is lost: {counts} (p {_p(paired.p_value)})."
        return "lost some", f"Some general ability is lost: {counts} (p {_p(paired.p_value)})."
    if was < FEW_RIGHT:
        return "undecided", f"Not decided: {counts}; so few right answers before cannot show a loss."
    if paired.high < TOLERATED:
        text = f"General ability is kept: {counts}; a loss of {TOLERATED:.0%} or more is ruled out."
        if nll.low is not None and nll.difference is not None and nll.low > 0:
            text += f" Right answers have become less likely, by {nll.difference:.2f} nats per token."
        return "kept", text
    return "undecided", (
        f"Not decided: {counts} (p {_p(paired.p_value)}); a loss of up to {max(paired.high, 0):.0%} is possible."
    )


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"


# ------------------------------------------------------------------------------------------------ answers


def answer(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to prompts of ids, in their order; Stopped where `stop` says so."""
    from ..engine import GenerationSettings, Request

    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    found: list[str] = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        handles = engine.submit_many([Request(tuple(ids), settings, "batch") for ids in some])
        for handle in handles:
            _wait(handle, handles, stop)
            if handle.error is not None:
                raise handle.error
            found.append(handle.text)
            if progress is not None:
                progress(len(found), len(prompts))
    return found


def _wait(handle: Handle, handles: Sequence[Handle], stop: Stop | None) -> None:
    while not handle.wait(WAIT_S):
        if stop is not None and stop():
            for one in handles:
                one.cancel()
            raise Stopped
    if handle.state == "cancelled" or (stop is not None and stop()):
        for one in handles:
            one.cancel()
        raise Stopped


def with_answer(prompt: Sequence[int], text: str, tokenizer: Tokenizer) -> Encoded:
    """A prompt's ids followed by those of an answer, which alone count."""
    ids = tuple(tokenizer.answer_ids(text))
    return Encoded((*prompt, *ids), (IGNORED,) * len(prompt) + ids)


@contextmanager
def without_adapter(loaded: LoadedModel) -> Iterator[LoadedModel]:
    """The base of a loaded adapter, of the same weights; while it is open, the LoRA is off. Nobody else may use it."""
    from .. import adapters

    model: Any = loaded.model
    name = next(iter(getattr(model, "peft_config", None) or {}), None)
    if name is not None:
        adapters.use_lora(model, None)
    try:
        yield replace(loaded, prefix=None)
    finally:
        if name is not None:
            adapters.use_lora(model, name)


# ------------------------------------------------------------------------------------------------ likelihoods


def answer_losses(
    loaded: LoadedModel, rows: Sequence[Encoded], stop: Stop | None = None
) -> list[tuple[float, int]]:
    """(summed cross entropy in nats, tokens that count) of every row, with the adapter that is loaded, if any."""
    import torch
    import torch.nn.functional as F

    from .loop import collate

    model: Any = loaded.model
    options: dict[str, Any] = {"use_cache": False}
    if loaded.prefix is not None:
        from ..adapters import PrefixModel

        model, options = PrefixModel(model, loaded.prefix), {}
    vocabulary = int(loaded.model.config.vocab_size)
    budget = TOKENS_AT_ONCE.get(loaded.device.type, TOKENS_ELSEWHERE)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for part in _groups([len(row.ids) for row in rows], min(budget, max(1, LOGITS_AT_ONCE // vocabulary))):
        if stop is not None and stop():
            raise Stopped
        ids, labels = collate([rows[i] for i in part], loaded.tokenizer.pad_id)
        ids, labels = ids.to(loaded.device), labels.to(loaded.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, **options).logits[:, :-1]
            each = F.cross_entropy(
                logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
            ).view(len(part), -1)
        counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
        for i, total, count in zip(part, each.double().sum(1).tolist(), counts, strict=True):
            found[i] = (total, count)
    return found


def _groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of similar length together, each group with at most so many tokens when padded, or one row."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        width = -(-lengths[i] // 8) * 8
        if groups and width * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
