"""What was measured on a classified file and is to hold for the next one: calibration, threshold, what goes to review."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import batch
from pages.shared import state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.classify import LabelTask
    from glm_core.engine import Engine
    from glm_core.jobs import Job
    from glm_core.statistics import Calibration

KEPT = "classify.carried"
BASIS = ("temperature", "bias", "content_free")  # what a probability was computed with


def _open(template: str) -> str:
    """A question with its columns unnamed, so that it is the same for another table."""
    return batch.PART.sub(lambda match: "{}" if match[1] is not None else str(match[0]), template)


def _asked(labels: Sequence[dict[str, Any]], template: str, shots: Sequence[Sequence[str]]) -> list[Any]:
    """What makes two tasks the same question to the same labels."""
    return [
        [[one["name"], one["verbaliser"] or one["name"]] for one in labels],
        _open(template),
        [list(one) for one in shots],
    ]


def _of_job(job: Job) -> dict[str, Any]:
    """What is carried over from a job: nothing yet but what it is about and how its probabilities were computed."""
    task = job.task
    basis = {
        "temperature": float(task.get("temperature", 1.0)),
        "bias": [float(one) for one in task.get("bias", ())],
        "content_free": bool(task.get("content_free", False)),
    }
    kept = state.remember(KEPT, None)
    about = {
        "asked": _asked(task["labels"], task["template"], task.get("shots", ())),
        "checkpoint": task["checkpoint"],
        "precision": task["precision"],
        "job": job.id,
        "title": job.title,
    }
    if isinstance(kept, dict) and all(kept.get(name) == value for name, value in (about | basis).items()):
        return dict(kept)
    return about | basis | {"threshold": None, "positive": "", "abstain_below": None}


def keep_threshold(job: Job, positive: str, value: float) -> None:
    """Let the next run call `positive` what has this probability and more."""
    state.remember_set(KEPT, _of_job(job) | {"positive": positive, "threshold": round(value, 6)})


def keep_review(job: Job, value: float) -> None:
    """Let the next run send what is less probable than this to review."""
    state.remember_set(KEPT, _of_job(job) | {"abstain_below": round(value, 6)})


def keep_calibration(job: Job, fit: Calibration) -> None:
    """Let the next run's probabilities be calibrated; a threshold on the ones before no longer means anything."""
    found = _of_job(job) | {"threshold": None, "abstain_below": None}
    state.remember_set(KEPT, found | {"temperature": fit.temperature, "bias": list(fit.bias)})


def can_keep_calibration(job: Job) -> bool:
    """Whether a calibration of this job's rows can be computed again in a run: not one on top of another."""
    task = job.task
    return not (task.get("content_free") and (task.get("temperature", 1.0) != 1.0 or task.get("bias")))


def told(kept: dict[str, Any]) -> str:
    """What is carried over, in a line."""
    parts = []
    if kept["temperature"] != 1.0 or kept["bias"]:
        bias = f", {kept['bias'][-1]:+.2f}" if kept["bias"] else ""
        parts.append(t(f"calibration (temperature {kept['temperature']:.3g}{bias})",
                       f"校准（温度 {kept['temperature']:.3g}{bias}）"))  # fmt: skip
    if kept["threshold"] is not None:
        name = plain(kept["positive"])
        parts.append(
            t(f"{name} from {kept['threshold']:.4f}", f"概率达到 {kept['threshold']:.4f} 判为 {name}")
        )
    if kept["abstain_below"] is not None:
        parts.append(t(f"review below {kept['abstain_below']:.4f}", f"低于 {kept['abstain_below']:.4f} 送审"))
    return " · ".join(parts)


def strip(
    engine: Engine, labels: Sequence[dict[str, Any]], template: str, shots: Sequence[Sequence[str]]
) -> dict[str, Any] | None:
    """What is carried over, said where the task is asked for, with the way to drop it; None where there is none.

    It holds for the same labels, question, examples, checkpoint and precision only; for others it is shown and not used.
    """
    kept = state.remember(KEPT, None)
    if not isinstance(kept, dict) or not told(kept):
        return None
    loaded, reasons = engine.loaded, []
    if kept["asked"] != _asked(labels, template, shots):
        reasons.append(t("other labels, question or examples", "标签、提问或示例不同"))
    if kept["checkpoint"] != str(loaded.info.path):
        reasons.append(
            t(f"measured with {Path(kept['checkpoint']).name}", f"由 {Path(kept['checkpoint']).name} 测得")
        )
    elif kept["precision"] != loaded.precision:
        reasons.append(
            t(f"measured at {kept['precision'].upper()}", f"在 {kept['precision'].upper()} 下测得")
        )
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="classify_carried"):
        if reasons:
            st.markdown(
                ":orange[:material/link_off:] "
                + t(
                    f"Not used here: {told(kept)} from {plain(kept['title'])} ({plain('; '.join(reasons))}).",
                    f"此处不使用来自 {plain(kept['title'])} 的 {told(kept)}（{plain('；'.join(reasons))}）。",
                ),
                width="stretch",
            )
        else:
            st.markdown(
                ":green[:material/link:] "
                + t(
                    f"As measured on **{plain(kept['title'])}**: {told(kept)}.",
                    f"沿用在 **{plain(kept['title'])}** 上测得的设置：{told(kept)}。",
                ),
                width="stretch",
            )
        st.button(
            t("Drop", "取消沿用"), icon=":material/close:", key="carried_drop",
            on_click=lambda: state.remember_set(KEPT, None),
        )  # fmt: skip
    return None if reasons else kept


def carried_into(task: LabelTask, kept: dict[str, Any] | None) -> LabelTask:
    """The task with what is carried over."""
    from dataclasses import replace

    if kept is None:
        return task
    values: dict[str, Any] = {
        "temperature": kept["temperature"], "bias": tuple(kept["bias"]), "content_free": kept["content_free"],
    }  # fmt: skip
    if kept["threshold"] is not None:
        values |= {"threshold": kept["threshold"], "positive": kept["positive"]}
    if kept["abstain_below"] is not None:
        values["abstain_below"] = kept["abstain_below"]
    return replace(task, **values)


def button(key: str, done: bool, on_click: Any, *args: Any) -> None:
    """Use it from now on; once it is, says so."""
    st.button(
        t("Used in the next run", "下次运行将使用") if done else t("Use in the next run", "用于下次运行"),
        icon=":material/check:" if done else ":material/redo:",
        key=key,
        disabled=done,
        on_click=on_click,
        args=args,
        help=t(
            "For the same labels, question, checkpoint and precision. It can be dropped where the task is asked for.",
            "适用于相同的标签、提问、检查点和精度；可在设置任务处取消。",
        ),
    )


def uses(job: Job, **values: Any) -> bool:
    """Whether exactly this is carried over from the job already."""
    kept = state.remember(KEPT, None)
    return (
        isinstance(kept, dict)
        and kept.get("job") == job.id
        and all(kept.get(k) == v for k, v in values.items())
    )
