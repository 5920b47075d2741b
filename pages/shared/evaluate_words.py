"""How an evaluation is spoken of on screen: metrics, kinds, methods and checkpoints by name, numbers with their digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.remote import is_remote, shown
from pages.shared.text import said, t

if TYPE_CHECKING:
    from glm_core.evaluate import EvaluationTask
    from glm_core.statistics import Interval

METRICS = {
    "rouge-1": ("ROUGE-1", "ROUGE-1"),
    "rouge-2": ("ROUGE-2", "ROUGE-2"),
    "rouge-l": ("ROUGE-L", "ROUGE-L"),
    "bleu-4": ("BLEU-4", "BLEU-4"),
    "char-rouge-1": ("Char ROUGE-1", "字 ROUGE-1"),
    "char-rouge-2": ("Char ROUGE-2", "字 ROUGE-2"),
    "char-rouge-l": ("Char ROUGE-L", "字 ROUGE-L"),
    "exact-match": ("Exact match", "完全一致"),
    "corpus-bleu": ("Corpus BLEU", "语料 BLEU"),
    "chrf": ("chrF", "chrF"),
    "length-ratio": ("Length ratio", "长度比"),
    "distinct-1": ("Distinct-1", "Distinct-1"),
    "distinct-2": ("Distinct-2", "Distinct-2"),
    "accuracy": ("Accuracy", "准确率"),
    "macro-f1": ("Macro F1", "宏平均 F1"),
    "weighted-f1": ("Weighted F1", "加权 F1"),
    "balanced-accuracy": ("Balanced accuracy", "平衡准确率"),
    "mcc": ("MCC", "MCC"),
}
KINDS = {
    "text": ("Texts", "文本", "notes"),
    "label": ("Labels", "标签", "label"),
    "choice": ("Multiple choice", "选择题", "checklist"),
    "number": ("Numbers", "数值题", "calculate"),
}
METHODS = {
    "generate": ("written by the model", "由模型写出"),
    "likelihood": ("the likeliest answer", "取概率最大的答案"),
    "chain": ("chain of thought, then the likeliest option", "先写思维链，再取概率最大的选项"),
    "imported": ("made elsewhere", "外部导入"),
}
RATIOS = ("length-ratio", "distinct-1", "distinct-2", "mcc")  # neither points of 100 nor a share


def metric(name: str) -> str:
    """A metric by its name on screen."""
    return t(*METRICS.get(name, (name, name)))


def kind(name: str) -> str:
    """A kind of task by its name on screen."""
    return t(*KINDS[name][:2])


def method(name: str) -> str:
    """How answers were found."""
    return t(*METHODS[name])


def is_share(task_kind: str, name: str) -> bool:
    """Whether a metric of this kind is a share, shown in percent."""
    return task_kind != "text" and name not in RATIOS


def number(value: float | None, task_kind: str, name: str) -> str:
    """A score with the digits that mean something: 31.2 of 100 for texts, 81.0 % for shares, 0.93 for ratios."""
    if value is None:
        return "–"
    if name in RATIOS:
        return f"{value:.3f}"
    return f"{100 * value:.1f} %" if task_kind != "text" else f"{value:.1f}"


def between(one: Interval, task_kind: str, name: str) -> str:
    """The interval of a score, or that there is none."""
    if one.low is None or one.high is None:
        return t("no interval", "无区间")
    if name in RATIOS:
        return f"{one.low:.3f} – {one.high:.3f}"
    factor, unit = (1.0, "") if task_kind == "text" else (100.0, " %")
    return f"{factor * one.low:.1f} – {factor * one.high:.1f}{unit}"


def score(one: Interval, task_kind: str, name: str) -> str:
    """A score and its interval in a few characters."""
    text = number(one.estimate, task_kind, name)
    return text if one.low is None or one.high is None else f"{text} ({between(one, task_kind, name)})"


def formula(task_kind: str, name: str) -> str:
    """What exactly a number is."""
    from glm_core import evaluate

    return said(evaluate.formula(task_kind, name))  # type: ignore[arg-type]


def folder(path: str) -> str:
    """A checkpoint's folder by name; of a step of a training the training too."""
    found = Path(path)
    if is_remote(path):
        return shown(path)
    return f"{found.parent.name}/{found.name}" if found.name.startswith("checkpoint-") else found.name


def checkpoint(task: EvaluationTask) -> str:
    """Which checkpoint a run is of, with the base under an adapter."""
    if task.method == "imported":
        return t("made elsewhere", "外部导入")
    name = folder(task.checkpoint)
    return f"{name} + {Path(task.base).name}" if task.base else name


def precision(task: EvaluationTask) -> str:
    """The precision of a run's weights; "" where the answers were made elsewhere."""
    return task.precision.upper()
