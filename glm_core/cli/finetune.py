"""python -m glm_core finetune: train or apply a fine-tuned checkpoint, with the flags of the published scripts."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GLMError
from ..settings import Settings
from .model import folder_of
from .output import INTERRUPTED, say

if TYPE_CHECKING:
    from ..finetune.adapt import Adapt
    from ..finetune.loop import Event, Plan
    from ..finetune.work import FinetuneTask

PREDICTIONS = (
    "generated_predictions.txt"  # one {"labels", "predict"} a line, as the published scripts write it
)


def finetune(options: argparse.Namespace) -> int:
    """Train, predict, or both; 130 where a training was interrupted, with its checkpoint kept."""
    if not (options.do_train or options.do_predict):
        raise GLMError("There is nothing to do.", "Give --do_train, --do_predict or both.")
    if options.do_train and not options.train_file:
        raise GLMError("--do_train needs --train_file.", "Name the file to train on.")
    if options.do_predict and not (options.test_file or options.validation_file):
        raise GLMError("--do_predict needs --test_file.", "Name the file to predict.")
    task = _task(options)
    adapter = Path(options.ptuning_checkpoint) if options.ptuning_checkpoint else None
    if options.do_train:
        trained = _train(task, options)
        if trained is None:
            return INTERRUPTED
        adapter = trained
    if options.do_predict:
        _predict(task, options, adapter)
    return 0


def _task(options: argparse.Namespace) -> FinetuneTask:
    from ..checkpoints import inspect
    from ..finetune.examples import Columns
    from ..finetune.work import FinetuneTask

    folder, columns = folder_of(options.model_name_or_path), None
    if options.prompt_column and options.response_column:
        columns = Columns(options.prompt_column, options.response_column, options.history_column)
    return FinetuneTask(
        checkpoint=str(folder),
        plan=_plan(options, inspect(folder).parameters),
        train_file=options.train_file or options.test_file or options.validation_file,
        output=options.output_dir,
        dev_file=(options.validation_file or "") if options.do_train else "",
        columns=columns,
        dev_share=options.dev_share if options.do_train and not options.validation_file else 0.0,
        max_source=options.max_source_length,
        max_target=options.max_target_length,
        source_prefix=options.source_prefix,
        device=options.device,
        start_from=(options.ptuning_checkpoint or "") if options.do_train else "",
        adapt=_adapt(options),
        general_share=options.general_share,
        general_file=options.general_file or "",
        limit_train=options.max_train_samples,
        limit_dev=options.max_predict_samples if options.do_predict else options.max_eval_samples,
    )


def _adapt(options: argparse.Namespace) -> Adapt | None:
    """The unlabelled texts to read first; those that are asked in the files to judge with are left out."""
    from ..finetune.adapt import Adapt

    if not options.adapt_file:
        return None
    return Adapt(
        options.adapt_file,
        options.adapt_column,
        options.adapt_epochs,
        options.adapt_learning_rate,
        options.adapt_length,
        exclude=(options.test_file,) if options.test_file else (),
        compare=options.adapt_compare,
    )


def _plan(options: argparse.Namespace, parameters: int) -> Plan:
    """The published scripts' meaning of the flags: a prefix with --pre_seq_len, else all weights."""
    from ..finetune.loop import Plan, default_rate
    from ..finetune.methods import Method

    if options.lora_rank:
        method = Method("lora", lora_rank=options.lora_rank, lora_alpha=options.lora_alpha,
                        lora_dropout=options.lora_dropout)  # fmt: skip
    elif options.freeze_layers:
        method = Method("freeze", freeze_layers=options.freeze_layers)
    elif options.pre_seq_len:
        method = Method("p-tuning-v2", prefix_length=options.pre_seq_len,
                        prefix_projection=options.prefix_projection)  # fmt: skip
    else:
        method = Method("full")
    return Plan(
        method=method,
        precision=_precision(options),
        learning_rate=options.learning_rate or default_rate(method.kind, parameters),
        batch_size=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        max_steps=options.max_steps,
        warmup_steps=options.warmup_steps,
        schedule=options.lr_scheduler_type,
        clip=options.max_grad_norm,
        weight_decay=options.weight_decay,
        seed=options.seed,
        checkpointing=options.gradient_checkpointing,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        save_total=options.save_total_limit,
    )


def _precision(options: argparse.Namespace) -> str:
    if options.quantization_group:
        if options.quantization_bit != 4:
            raise GLMError(
                "--quantization_group is for weights of 4 bits.", "Give --quantization_bit 4 as well."
            )
        return f"int4-g{options.quantization_group}"
    if options.quantization_bit:
        return f"int{options.quantization_bit}"
    if options.bf16:
        return "bf16"
    if options.fp16:
        from ..checkpoints import best_device

        if options.device.startswith("cuda") or (options.device == "auto" and best_device() == "cuda"):
            return "fp16"
        say("Note: --fp16 is for GPUs; the precision of this processor is chosen instead.")
    return "auto"


def _train(task: FinetuneTask, options: argparse.Namespace) -> Path | None:
    """The folder of the result, or None where it was interrupted."""
    from ..finetune.adapt import FOLDER
    from ..finetune.state import checkpoints
    from ..finetune.work import carry_out

    settings = Settings.read()
    settings.make_folders()
    resume = not options.overwrite_output_dir and any(
        checkpoints(folder) for folder in (Path(task.output), Path(task.output) / FOLDER)
    )
    if resume:
        say(f"Going on from the last checkpoint in {task.output}.")
    with _interrupts() as stop:
        result = carry_out(
            task, _show, stop.is_set, resume, options.overwrite_output_dir, say,
            None if options.overwrite_cache else settings.cache,
        )  # fmt: skip
    outcome = result.outcome
    if outcome.stopped:
        say(f"Stopped after {outcome.steps:,} of {outcome.of:,} steps. The same command, without "
            "--overwrite_output_dir, goes on.")  # fmt: skip
        return None
    dev = f", dev loss {outcome.dev_loss:.4f}" if outcome.dev_loss is not None else ""
    loss = f"loss {outcome.loss:.4f}" if outcome.loss is not None else "no loss"
    print(f"{result.folder}: {outcome.steps:,} steps in {outcome.seconds:.0f} s, {loss}{dev}")
    return result.folder


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a request to end sets; a second Ctrl-C ends at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        say("Stopping after this step; its checkpoint is kept ...")
        asked.set()

    before = {one: signal.signal(one, ask) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _show(event: Event) -> None:
    """One line a report."""
    if event.kind == "step":
        left = f", about {event.eta_s / 60:.0f} min left" if event.eta_s and event.eta_s > 90 else ""
        speed = f", {event.rows_per_s:.1f} rows/s" if event.rows_per_s else ""
        say(f"step {event.step:,} of {event.steps:,}: loss {event.loss:.4f}, "
            f"learning rate {event.learning_rate:.2e}{speed}{left}")  # fmt: skip
    elif event.kind == "dev":
        say(f"step {event.step:,} of {event.steps:,}: dev loss {event.dev_loss:.4f}")
    elif event.kind == "saved":
        say(f"step {event.step:,} of {event.steps:,}: saved in {Path(event.path).name}")


def _predict(task: FinetuneTask, options: argparse.Namespace, adapter: Path | None) -> None:
    """Write the predictions of a labelled file and their scores into the output folder."""
    from ..finetune.work import predict
    from ..metrics import texts

    live = sys.stderr.isatty()

    def shown(done: int, total: int) -> None:
        if live:
            print(f"\r{done:,} of {total:,} rows", end="", file=sys.stderr, flush=True)

    rows = predict(task, options.test_file or options.validation_file, adapter, shown)
    if live:
        print(file=sys.stderr)
    output = Path(task.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"labels": label, "predict": answer}, ensure_ascii=False) + "\n" for label, answer in rows
    ]
    (output / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
    scored = texts(
        [answer for _, answer in rows],
        [label for label, _ in rows],
        ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match"),
    )
    found: dict[str, float | int | None] = {
        f"predict_{name}": None if value is None else round(value, 4) for name, value in scored.scores.items()
    }
    found |= {"predict_samples": len(rows), "predict_empty": scored.n_empty}
    (output / "predict_results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:22} {value}")
