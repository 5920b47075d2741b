"""The one training loop: seeded batches of similar length, AdamW, a watch over the numbers, exact resume.

The loss of a step is the mean over all tokens that count in its batches, whatever rows they are in, as transformers'
Trainer takes it since it passes num_items_in_batch. Every step draws its random numbers from the seed and its own
number alone, and the order of the rows follows from the seed and the epoch, so a resumed run needs neither a
generator's state nor a position in the data to go on exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GLMError
from . import state
from .methods import IGNORED, Kind, Method, Trainee

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Schedule = Literal["linear", "cosine", "constant"]
MULTIPLE = 8  # of columns a batch is padded to
POOL = 50  # batches whose rows are sorted by length together; between pools the order is random
ZERO_LOSSES = 3
# What the published scripts and the papers train with, and for whole weights of a model this small five times that.
RATES: dict[Kind, float] = {"lora": 1e-3, "p-tuning-v2": 5e-3, "freeze": 1e-4, "full": 1e-4}
SMALL, SMALL_FACTOR = 100_000_000, 5.0
# Changing these between a stop and a resume changes no number of the training.
FREE = ("save_steps", "logging_steps", "save_total")


@dataclass(frozen=True)
class Plan:
    """How a method is trained; the same object behind the screen, the shell and a resumed job.

    batch_size       rows per forward pass and process; a step takes `accumulation` of them
    warmup_steps     steps in which the learning rate rises from 0; a twentieth of all, at most 100, where None
    schedule         what the learning rate does after that, down to 0 at max_steps
    clip             largest norm of the gradient; 0 leaves it as it is
    dropout          False switches the method's dropout off
    """

    method: Method
    precision: str
    learning_rate: float
    batch_size: int
    accumulation: int
    max_steps: int
    warmup_steps: int | None = None
    schedule: Schedule = "linear"
    clip: float = 1.0
    weight_decay: float = 0.0
    seed: int = 42
    checkpointing: bool = False
    save_steps: int = 100
    logging_steps: int = 10
    save_total: int = 3
    dropout: bool = True

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return asdict(self) | {"method": self.method.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan `to_json` gave; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        return cls(**values | {"method": Method.from_json(data["method"])})

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(100, self.max_steps // 20) if self.warmup_steps is None else self.warmup_steps

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.max_steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, 1 - share)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self.learning_rate

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the plan, each with what to do."""
        found = self.method.problems()
        for name in ("batch_size", "accumulation", "max_steps", "save_steps", "logging_steps", "save_total"):
            if getattr(self, name) < 1:
                found.append((f"{name} is {getattr(self, name)}.", "Choose at least 1."))
        if not 0 < self.learning_rate < 1:
            found.append((f"learning_rate is {self.learning_rate}.", "Choose more than 0 and less than 1."))
        if self.schedule not in ("linear", "cosine", "constant"):
            found.append((f"schedule is {self.schedule!r}.", "Choose linear, cosine or constant."))
        for name in ("warmup", "clip", "weight_decay"):
            if getattr(self, name) < 0:
                found.append((f"{name} is {getattr(self, name)}.", "Choose 0 or more."))
        return found


@dataclass(frozen=True)
class Event:
    """What the loop tells while it runs.

    kind          "step" every logging_steps, "dev" when the dev loss was computed, "saved", "finished", "stopped"
    loss          mean of the steps since the last "step" event
    grad_norm     of the last step, before clipping; its gradient may be left out where fp16 overflowed
    tokens_per_s  real tokens, prompts included, since the last "step" event; rows_per_s likewise
    memory_bytes  of the process, on a GPU the most that torch had allocated
    """

    kind: Literal["step", "dev", "saved", "finished", "stopped"]
    step: int
    steps: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    rows_per_s: float | None = None
    memory_bytes: int | None = None
    eta_s: float | None = None
    dev_loss: float | None = None
    path: str = ""

    def to_json(self) -> dict[str, Any]:
        """The event without what it does not say."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Outcome:
    """How a training ended: after `steps` of `of` steps, with its losses and its checkpoints.

    losses   (step, mean training loss since the one before), of resumed runs too
    dev      (step, dev loss)
    best     the checkpoint with the lowest dev loss; the last one without dev rows
    skipped  steps that changed nothing because fp16 overflowed
    """

    steps: int
    of: int
    stopped: bool
    last: Path | None
    best: Path | None
    losses: tuple[tuple[int, float], ...]
    dev: tuple[tuple[int, float], ...]
    seconds: float  # of training alone, resumed runs included
    tokens: int  # real tokens trained on
    peak_bytes: int
    skipped: int = 0

    @property
    def loss(self) -> float | None:
        return self.losses[-1][1] if self.losses else None

    @property
    def dev_loss(self) -> float | None:
        return min((loss for _, loss in self.dev), default=None)


def default_rate(kind: Kind, parameters: int = 0) -> float:
    """The learning rate to begin with, for a model of so many parameters where that is known."""
    small = kind in ("freeze", "full") and 0 < parameters < SMALL
    return RATES[kind] * (SMALL_FACTOR if small else 1.0)


class TrainingError(GLMError):
    """A training that stopped because its numbers are no longer of use: at which step, and why."""

    def __init__(self, step: int, reason: str, todo: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(reason, todo)


def train(
    trainee: Trainee,
    encoded_train: Sequence[state.Row],
    encoded_dev: Sequence[state.Row],
    plan: Plan,
    folder: str | Path,
    pad_id: int,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], object] | None = None,
    resume: bool = False,
) -> Outcome:
    """Train to plan.max_steps, or until `stop` says so, and leave checkpoints in `folder`.

    encoded_train  rows with ids and labels; encoded_dev may be empty
    pad_id         fills rows up to the longest of their batch; it never counts and is never seen
    stop           asked after every step; anything true ends the training with a checkpoint
    resume         go on from the newest checkpoint in the folder, if there is one
    Started by torchrun or accelerate, with WORLD_SIZE above 1, every process takes batches of its own and the
    gradients are summed over all.
    GLMError before the first step for a plan or data that cannot work and for a folder in use; during training for
    a disk that is full and for too little memory; TrainingError at the first loss or gradient that is not a number,
    before it reaches a weight. The last checkpoint stays in each case.
    """
    for message, todo in plan.problems():
        raise GLMError(message, todo)
    if plan.method != trainee.method:
        raise ValueError(f"the plan is for {plan.method}, the model is prepared for {trainee.method}")
    _check_rows(encoded_train, "training")
    _check_rows(encoded_dev, "dev", may_be_empty=True)
    run = _Run(trainee, encoded_train, encoded_dev, plan, Path(folder), pad_id, on_event)
    run.open(resume)
    try:
        with _enough_memory(plan, run):
            return run.run(stop)
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        trainee.evaluating()


def _check_rows(rows: Sequence[state.Row], name: str, may_be_empty: bool = False) -> None:
    if not len(rows) and not may_be_empty:
        raise GLMError("There are no training rows.", "Choose a file with rows.")
    for number, row in enumerate(rows, start=1):
        if len(row.ids) != len(row.labels):
            raise ValueError(f"row {number}: {len(row.ids)} ids, {len(row.labels)} labels")
        if all(label == IGNORED for label in row.labels[1:]):
            raise GLMError(
                f"Row {number} of the {name} data has no token that counts in the loss.",
                "Take out rows without an answer, or raise the token limits.",
            )


class Batches:
    """Which rows every step takes: the same for the same seed, and of similar length within a batch.

    Rows are shuffled, sorted by length within pools of POOL batches, and the batches shuffled again. The longest
    batch of the first epoch comes first, so that too little memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed = lengths, size, seed
        self.per_epoch = -(-len(lengths) // size)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, index: int) -> list[int]:
        """The rows of a batch, counted through all epochs."""
        epoch, place = divmod(index, self.per_epoch)
        return self._order(epoch)[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        chance = random.Random(f"{self.seed}-{epoch}")
        rows = list(range(len(self.lengths)))
        chance.shuffle(rows)
        # A pool is a small part of the data, or every epoch would have the same batches.
        pool = self.size * max(1, min(POOL, self.per_epoch // 4))
        batches: list[list[int]] = []
        for start in range(0, len(rows), pool):
            part = sorted(rows[start : start + pool], key=lambda row: -self.lengths[row])
            batches += [part[i : i + self.size] for i in range(0, len(part), self.size)]
        chance.shuffle(batches)
        if epoch == 0:
            longest = max(range(len(batches)), key=lambda i: max(self.lengths[row] for row in batches[i]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return batches


def collate(rows: Sequence[state.Row], pad_id: int, multiple: int = MULTIPLE) -> tuple[Tensor, Tensor]:
    """ids and labels (rows, columns), padded on the right to a multiple of `multiple` columns."""
    import torch

    width = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.as_tensor(row.ids, dtype=torch.long)
        labels[number, : len(row.labels)] = torch.as_tensor(row.labels, dtype=torch.long)
    return ids, labels


class _Processes:
    """This process alone, or one of several that share the batches and sum their gradients."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = 0
        self._accelerator: Any = None
        if self.count > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator()
            self.rank = self._accelerator.process_index

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        if self._accelerator is None:
            return tensor
        summed: Tensor = self._accelerator.reduce(tensor, "sum")
        return summed

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """In buckets, since every exchange costs the same whatever its size."""
        import torch

        if self._accelerator is None:
            return
        bucket: list[Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for number, gradient in enumerate(gradients, start=1):
            bucket.append(gradient)
            if sum(part.numel() for part in bucket) < 1 << 24 and number < len(gradients):
                continue
            summed = self.sum(torch.cat([part.flatten() for part in bucket]))
            for part, of in zip(bucket, torch.split(summed, [part.numel() for part in bucket]), strict=True):
                part.copy_(of.view_as(part))
            bucket = []


@dataclass
class _Progress:
    """What a checkpoint says of the way here."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    dev: list[tuple[int, float]] = field(default_factory=list)
    best: str = ""  # name of the checkpoint
    best_loss: float = math.inf
    seconds: float = 0.0
    tokens: int = 0
    zeros: int = 0  # steps in a row whose loss was exactly 0
    skipped: int = 0
    since: list[float] = field(default_factory=list)  # losses since the last event


class _Run:
    """One training from its opening to its end."""

    def __init__(
        self,
        trainee: Trainee,
        rows: Sequence[state.Row],
        dev: Sequence[state.Row],
        plan: Plan,
        folder: Path,
        pad_id: int,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        import torch

        self.trainee, self.rows, self.dev, self.plan = trainee, rows, dev, plan
        self.folder, self.pad_id, self.tell = folder, pad_id, on_event or (lambda event: None)
        self.device = trainee.device
        self.processes = _Processes()
        self.lengths = [len(row.ids) for row in rows]
        self.batches = Batches(self.lengths, plan.batch_size, plan.seed)
        self.parameters = list(trainee.parameters.values())
        # As in the released scripts and in Trainer, biases and norms are not drawn to zero.
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=plan.learning_rate,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over the weights instead of a dozen
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainee.scaled)
        self.done = _Progress()
        self.last: Path | None = None
        self.data = ""
        self.peak = 0

    # ---- where to start

    def open(self, resume: bool) -> None:
        """Look at the folder, and take over its newest checkpoint where that is asked for."""
        self.data = state.data_hash(self.rows)
        found = state.checkpoints(self.folder)
        if found and not resume:
            raise GLMError(
                f"{self.folder} already holds {found[-1].name}.", "Resume it, or choose another folder."
            )
        saved = state.latest(self.folder)
        if saved is None:
            return
        theirs = Plan.from_json(saved.state["plan"])
        changed = [
            f.name
            for f in fields(Plan)
            if f.name not in FREE and getattr(theirs, f.name) != getattr(self.plan, f.name)
        ]
        if changed:
            name = changed[0]
            raise GLMError(
                f"{saved.path.name} was trained with {name}={_said(getattr(theirs, name))}, the plan says "
                f"{_said(getattr(self.plan, name))}.",
                "Resume with the plan it was started with, or start again in another folder.",
            )
        if saved.state["data"] != self.data:
            raise GLMError(
                f"{saved.path.name} was trained on other rows than these.",
                "Resume with the data it was started with, or start again in another folder.",
            )
        if saved.state["processes"] != self.processes.count:
            raise GLMError(
                f"{saved.path.name} was trained by {saved.state['processes']} processes, now there are "
                f"{self.processes.count}.",
                "Resume with as many processes, or start again in another folder.",
            )
        self.trainee.load(saved.path)
        try:
            tensors = saved.tensors()
            self.optimizer.load_state_dict(tensors["optimizer"])
            self.scaler.load_state_dict(tensors["scaler"])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise GLMError(
                f"{saved.path / state.TENSORS} cannot be read: {str(error).splitlines()[0]}.",
                "Delete this checkpoint and resume from the one before it.",
            ) from error
        self.done = _Progress(**saved.state["progress"])
        self.done.losses = [(int(step), float(loss)) for step, loss in self.done.losses]
        self.done.dev = [(int(step), float(loss)) for step, loss in self.done.dev]
        self.done.best_loss = min((loss for _, loss in self.done.dev), default=math.inf)
        self.last = saved.path

    # ---- the steps

    def run(self, stop: Callable[[], object] | None) -> Outcome:
        plan, done = self.plan, self.done
        first, began = done.step, time.perf_counter()
        pause = 0.0  # seconds spent on dev rows and files, which no speed should count
        marked, tokens, rows = began, 0, 0
        stopped = bool(stop and stop())
        self.trainee.training(plan.dropout, plan.checkpointing)
        while done.step < plan.max_steps and not stopped:
            started = time.perf_counter()
            loss, norm, own_rows, own_tokens = self._step(done.step)
            done.step += 1
            done.since.append(loss)
            tokens, rows, done.tokens = tokens + own_tokens, rows + own_rows, done.tokens + own_tokens
            now = time.perf_counter()
            done.seconds += now - started
            over = done.step == plan.max_steps
            if done.step % plan.logging_steps == 0 or over:
                mean = sum(done.since) / len(done.since)
                done.losses.append((done.step, mean))
                done.since = []
                each = (now - began - pause) / (done.step - first)
                spent = max(now - marked, 1e-9)
                self._say(
                    "step", loss=mean, learning_rate=plan.rate(done.step - 1), grad_norm=norm,
                    tokens_per_s=tokens / spent, rows_per_s=rows / spent, memory_bytes=self._memory(),
                    eta_s=each * (plan.max_steps - done.step),
                )  # fmt: skip
                marked, tokens, rows = now, 0, 0
            stopped = self._asked(stop)
            due = done.step % plan.save_steps == 0 or over
            if due or stopped:
                at = time.perf_counter()
                self._save(dev=due)  # who stops does not want to wait for the dev rows
                if not over and not stopped:
                    self.trainee.training(plan.dropout, plan.checkpointing)
                spent = time.perf_counter() - at
                pause, marked = pause + spent, marked + spent
        if self.last is None:  # stopped before the first step
            self._save(dev=False)
        self._memory()
        stopped = stopped and done.step < plan.max_steps
        self._say("stopped" if stopped else "finished", path=str(self.last))
        best = self.folder / done.best if done.best else self.last
        return Outcome(
            done.step, plan.max_steps, stopped, self.last, best, tuple(done.losses), tuple(done.dev), done.seconds,
            done.tokens, self.peak, done.skipped,
        )  # fmt: skip

    def _step(self, step: int) -> tuple[float, float, int, int]:
        """One step of the optimiser: its loss, the gradient's norm, and the rows and real tokens it took."""
        import torch

        plan, processes = self.plan, self.processes
        per_step = plan.accumulation * processes.count
        mine = [
            self.batches[step * per_step + i * processes.count + processes.rank]
            for i in range(plan.accumulation)
        ]
        micro = [collate([self.rows[row] for row in rows], self.pad_id) for rows in mine]
        counted = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in micro)
        own = [counted, sum(map(len, mine)), sum(self.lengths[row] for rows in mine for row in rows)]
        # fp64 is exact for every count, but not every device has it.
        counts = processes.sum(torch.tensor(own, device=self.device)).tolist()
        total = max(1, int(counts[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros((), device=self.device)
        for number, (ids, labels) in enumerate(micro):
            if plan.dropout:
                torch.manual_seed(_seed(plan.seed, step, number, processes.rank))
            factor: Any = 1 / total
            if self.scaler.is_enabled():
                factor = self.scaler.scale(torch.tensor(1 / total, device=self.device))
            sums += self.trainee.backward(ids.to(self.device), labels.to(self.device), factor)
        loss = float(processes.sum(sums)) / total
        self._check_loss(step + 1, loss)
        processes.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip or math.inf))
        self._check_norm(step + 1, loss, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, norm, int(counts[1]), int(counts[2])

    def _check_loss(self, step: int, loss: float) -> None:
        rate = f"{self.plan.rate(step - 1):.3g}"
        if not math.isfinite(loss):
            raise TrainingError(
                step,
                f"The loss became {_number(loss)} at step {step} (learning rate {rate}); training stopped.",
                "Resume is of no use here: start again with a lower learning rate, or in bf16 or fp32.",
            )
        self.done.zeros = self.done.zeros + 1 if loss == 0 else 0
        if self.done.zeros >= ZERO_LOSSES:
            raise TrainingError(
                step,
                f"The loss was exactly 0 for {ZERO_LOSSES} steps up to step {step} (learning rate {rate}); training "
                "stopped.",
                "There is nothing left to learn from these rows, or the numbers are lost: look at an answer of the "
                "last checkpoint.",
            )

    def _check_norm(self, step: int, loss: float, norm: float) -> None:
        if norm == 0 and loss > 0:
            raise TrainingError(
                step,
                f"No gradient reached a trained weight at step {step}, at a loss of {loss:.4g}.",
                "Choose another method or other layers.",
            )
        if math.isfinite(norm):
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            self.done.skipped += 1  # the scaler leaves the step out and lowers its factor
            return
        raise TrainingError(
            step,
            f"A gradient became {_number(norm)} at step {step} (learning rate {self.plan.rate(step - 1):.3g}, loss "
            f"{loss:.4g}); training stopped.",
            "Start again with a lower learning rate, or in bf16 or fp32.",
        )

    def _asked(self, stop: Callable[[], object] | None) -> bool:
        """Whether any process was asked to stop; all must agree, or they would wait for each other for ever."""
        import torch

        asked = bool(stop and stop())
        if self.processes.count == 1:
            return asked
        return bool(self.processes.sum(torch.tensor(int(asked), device=self.device)))

    # ---- dev rows, files, events

    def _dev_loss(self) -> float:
        """Mean cross entropy of the dev rows' tokens that count."""
        self.trainee.evaluating()
        part = (self.processes.rank, self.processes.count)
        loss, counted = self.processes.sum(
            _sums(self.trainee, self.dev, self.plan.batch_size, self.pad_id, part)
        ).tolist()
        return float(loss / counted)

    def _save(self, dev: bool) -> None:
        done = self.done
        if dev and len(self.dev):
            loss = self._dev_loss()
            if not math.isfinite(loss):
                raise TrainingError(
                    done.step,
                    f"The dev loss became {_number(loss)} at step {done.step}; training stopped.",
                    "Start again with a lower learning rate, or in bf16 or fp32.",
                )
            done.dev.append((done.step, loss))
            if loss < done.best_loss:
                done.best_loss, done.best = loss, f"checkpoint-{done.step}"
            self._say("dev", dev_loss=loss)
        path = self.folder / f"checkpoint-{done.step}"
        problem: GLMError | None = None
        if self.processes.first:
            try:
                self._write()
            except GLMError as error:
                problem = error
        self._agree(problem)
        self.last = path
        self._say("saved", path=str(path))

    def _write(self) -> None:
        progress = asdict(self.done)
        del progress["best_loss"]  # JSON has no infinity; it follows from the dev losses
        kept = {
            "plan": self.plan.to_json(),
            "data": self.data,
            "rows": len(self.rows),
            "processes": self.processes.count,
            "trainable": self.trainee.trainable_count,
            "progress": progress,
        }
        tensors = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state.write(self.folder, self.done.step, self.trainee, kept, tensors)
        best = self.folder / self.done.best if self.done.best else None
        state.prune(self.folder, self.plan.save_total, best)

    def _agree(self, problem: GLMError | None) -> None:
        """Let every process end where the one that writes failed."""
        import torch

        if self.processes.count > 1:
            failed = self.processes.sum(torch.tensor(int(problem is not None), device=self.device))
            if bool(failed) and problem is None:
                raise GLMError("The first process could not write its checkpoint.", "See its own message.")
        if problem is not None:
            raise problem

    def _memory(self) -> int:
        import torch

        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device)
        else:
            import psutil

            used = psutil.Process().memory_info().rss
        self.peak = max(self.peak, used)
        return int(used)

    def _say(self, kind: Any, **values: Any) -> None:
        if self.processes.first:
            per_step = self.plan.accumulation * self.processes.count
            epoch = self.done.step * per_step / self.batches.per_epoch
            self.tell(Event(kind, self.done.step, self.plan.max_steps, round(epoch, 4), **values))


def mean_loss(trainee: Trainee, rows: Sequence[state.Row], batch_size: int, pad_id: int) -> float:
    """Mean cross entropy of the tokens that count in some rows, in nats, as the model stands."""
    trainee.evaluating()
    loss, counted = _sums(trainee, rows, batch_size, pad_id).tolist()
    return float(loss / counted)


def _sums(
    trainee: Trainee, rows: Sequence[state.Row], size: int, pad_id: int, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """(summed cross entropy, tokens that count) of every n-th batch from the k-th on, with (k, n) as `part`."""
    import torch

    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    sums = torch.zeros(2, device=trainee.device)
    for group in groups[part[0] :: part[1]]:
        ids, labels = (one.to(trainee.device) for one in collate([rows[row] for row in group], pad_id))
        sums[0] += trainee.loss(ids, labels)
        sums[1] += (labels[:, 1:] != IGNORED).sum()
    return sums


@contextmanager
def _enough_memory(plan: Plan, run: _Run) -> Iterator[None]:
    """Too little memory as a sentence with a way out; any other error as it is."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if (
            not isinstance(error, MemoryError | torch.OutOfMemoryError)
            and "can't allocate memory" not in text
        ):
            raise
        half, twice = plan.batch_size // 2, 2 * plan.accumulation
        smaller = f"batch_size {half} and accumulation {twice}, " if half else ""
        run.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise GLMError(
            f"There was too little memory on {run.device} at step {run.done.step + 1}, with {plan.batch_size} rows at "
            "a time.",
            f"Choose {smaller}gradient checkpointing, a lower precision, or lower token limits (the longest row has "
            f"{max(run.lengths)} tokens).",
        ) from error


def _seed(*parts: int) -> int:
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"


def _said(value: Any) -> str:
    return json.dumps(value.to_json(), ensure_ascii=False) if isinstance(value, Method) else str(value)
