"""The shell's command for a training, so that what was tried on the screen can be repeated elsewhere."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from pages.shared import finetune_adapt
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.finetune.work import FinetuneTask


def command(task: FinetuneTask) -> tuple[str, list[str]]:
    """The shell's command for a task, and what of the task it cannot say."""
    plan, method = task.plan, task.plan.method
    flags: list[tuple[str, Any]] = [
        ("train_file", task.train_file), ("validation_file", task.dev_file), ("output_dir", task.output),
        ("model_name_or_path", task.checkpoint),
    ]  # fmt: skip
    columns, differences = task.columns, []
    if columns and not columns.alpaca:
        flags += [
            ("prompt_column", columns.prompt), ("response_column", columns.response),
            ("history_column", columns.history or ""),
        ]  # fmt: skip
    flags += [("max_source_length", task.max_source), ("max_target_length", task.max_target)]
    if method.kind == "lora":
        flags += [
            ("lora_rank", method.lora_rank), ("lora_alpha", method.lora_alpha), ("lora_dropout", method.lora_dropout),
        ]  # fmt: skip
    elif method.kind == "freeze":
        flags += [("freeze_layers", method.freeze_layers)]
        if method.freeze_what != "mlp":
            differences.append(
                t("The shell trains the MLPs of the last layers.", "命令行只训练末几层的 MLP。")
            )
    elif method.kind == "p-tuning-v2":
        flags += [("pre_seq_len", method.prefix_length), ("prefix_projection", method.prefix_projection)]
    flags += {
        "int8": [("quantization_bit", 8)], "int4": [("quantization_bit", 4)], "bf16": [("bf16", True)],
        "fp16": [("fp16", True)],
        **{
            f"int4-g{size}": [("quantization_bit", 4), ("quantization_group", size)] for size in (32, 64, 128)
        },
    }.get(plan.precision, [])  # fmt: skip
    flags += [
        ("device", task.device), ("per_device_train_batch_size", plan.batch_size),
        ("gradient_accumulation_steps", plan.accumulation), ("gradient_checkpointing", plan.checkpointing),
        ("max_steps", plan.max_steps), ("learning_rate", plan.learning_rate), ("warmup_steps", plan.warmup),
        ("lr_scheduler_type", plan.schedule), ("weight_decay", plan.weight_decay), ("max_grad_norm", plan.clip),
        ("logging_steps", plan.logging_steps), ("save_steps", plan.save_steps),
        ("save_total_limit", plan.save_total), ("seed", plan.seed),
    ]  # fmt: skip
    if plan.precision == "fp32":
        differences.append(
            t(
                "The shell chooses the precision: FP32 for small models.",
                "命令行自动选择精度：小模型为 FP32。",
            )
        )
    flags += [("dev_share", task.dev_share or None), ("general_share", task.general_share or None)]
    if task.adapt is not None:
        flags += finetune_adapt.flags(task.adapt)
    if any(value not in (None, "stop", True) for value in task.read_options.values()):
        differences.append(
            t("The shell finds out by itself how the file is to be read.", "命令行自动判断文件的读取方式。")
        )
    lines = ["python -m glm_core finetune --do_train"]
    for name, value in flags:
        if value is True:
            lines.append(f"--{name}")
        elif value is not False and value is not None and value != "":
            text = f"{value:.12g}" if isinstance(value, float) else str(value)
            lines.append(f"--{name} {shlex.quote(text)}")
    return " \\\n  ".join(lines), differences
