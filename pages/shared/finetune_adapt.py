"""Unlabelled texts that the model reads before the labelled rows: which, how long, and what that changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from glm_core.finetune.adapt import Adapt
from pages.shared import finetune_data, panels, table_input
from pages.shared import finetune_form as form
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.finetune.job import TrainingStatus


def choose() -> Adapt | None:
    """The file, its column and how long it is read; None where nothing is to be read first."""
    with st.expander(t("Read unlabelled texts first", "先读未标注文本"), icon=":material/menu_book:"):
        st.caption(
            t(
                "Where labelled rows are few, the model first reads your own texts without labels, such as all "
                "comments of the site. Texts that the dev rows ask are left out.",
                "标注行较少时，可让模型先读您自己的未标注文本，例如网站的全部评论。开发集中出现的文本会被排除。",
            )
        )
        asked = form.value("adapt", {})
        if not asked:
            if stored := table_input.upload("finetune_adapt", t("Table with the texts", "含文本的表格")):
                form.put("adapt", stored)
                st.rerun()
            return None
        try:
            file = finetune_data.resolve(asked)
            columns = list(finetune_data.head(str(file.path), file.stamp, file.name, "{}").info.columns)
        except GLMError as error:
            panels.problem(error)
            columns = []
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f":material/menu_book: **{plain(asked.get('file', ''))}**", width="content")
            if st.button(t("Remove", "移除"), key="remove_adapt", type="tertiary", icon=":material/close:"):
                form.put("adapt", None)
                st.rerun()
        return _settings(file, columns) if columns else None


def _settings(file: finetune_data.File, columns: list[str]) -> Adapt:
    with st.grid(3, min_column_width=170):
        column = st.selectbox(
            t("Column of the texts", "文本列"),
            columns,
            **form.held(f"adapt_column:{file.key}", columns[0], columns, "index"),
        )
        epochs = st.number_input(
            t("Times read", "读几遍"),
            min_value=0.1,
            max_value=100.0,
            step=0.5,
            help=t(
                "Once is usual for many texts; up to three times for a few thousand.",
                "文本多时读一遍即可；几千条时可读到三遍。",
            ),
            **form.kept("adapt_epochs", 1.0),
        )
        length = st.number_input(
            t("Longest row, tokens", "每行最长词元数"),
            min_value=16,
            max_value=4096,
            step=16,
            help=t("Longer texts become several rows.", "更长的文本会拆成多行。"),
            **form.kept("adapt_length", 128),
        )
    compare = st.toggle(
        t("Also train without them, to see what they change", "另做一次不读这些文本的训练，以便比较"),
        help=t("Takes the training's time once more.", "训练时间增加一倍。"),
        **form.kept("adapt_compare", False),
    )
    return Adapt(str(file.path), str(column), float(epochs), length=int(length), compare=compare)


def flags(adapt: Adapt) -> list[tuple[str, Any]]:
    """The same as flags of the shell."""
    return [
        ("adapt_file", adapt.file), ("adapt_column", adapt.column), ("adapt_epochs", adapt.epochs),
        ("adapt_length", adapt.length), ("adapt_compare", adapt.compare),
    ]  # fmt: skip


def show(status: TrainingStatus, folder: Path) -> None:
    """What reading the texts changed, as far as it was measured."""
    found = (status.manifest or {}).get("adapt")
    if not found:
        return
    with st.container(border=True, key="finetune_adapted"):
        panels.section(t("The unlabelled texts", "未标注文本"), "menu_book")
        texts, left = f"{found['texts']:,}", f"{found['excluded']:,}"
        st.caption(
            t(
                f"{texts} texts read in {found['steps']:,} steps; {left} left out because dev rows ask them.",
                f"读了 {texts} 条文本，{found['steps']:,} 步；{left} 条因出现在开发集中而被排除。",
            )
        )
        with st.grid(3, min_column_width=170):
            _change(
                t("Loss of unseen texts", "未读文本的损失"), found.get("text_loss_before"), found.get("text_loss")
            )  # fmt: skip
            _change(
                t("Dev loss before training", "训练前的开发集损失"), found.get("dev_loss_before"),
                found.get("dev_loss"),
            )  # fmt: skip
            _without(status, folder)


def _change(label: str, before: float | None, after: float | None) -> None:
    if before is None or after is None:
        return
    st.metric(
        label,
        f"{after:.3f}",
        t(f"{before:.3f} before", f"之前 {before:.3f}"),
        delta_color="off",
        delta_arrow="off",
        help=t("Nats per token; lower is better.", "每个词元的 nat 数，越低越好。"),
    )


def _without(status: TrainingStatus, folder: Path) -> None:
    """The figure of the same training without the texts beside this one's: the headline score, else the dev loss."""
    from glm_core.finetune.job import REPORT
    from glm_core.finetune.work import MANIFEST, WITHOUT

    other = _read(folder / WITHOUT / REPORT)
    label = t("Dev score with them", "读过之后的开发集得分")
    if other and status.report:
        ours, theirs = (_headline(one) for one in (status.report, other))
        if ours is not None and theirs is not None:
            st.metric(
                label, f"{ours:.1%}", t(f"{theirs:.1%} without", f"不读时 {theirs:.1%}"), delta_color="off",
                delta_arrow="off",
            )  # fmt: skip
            return
    plain_run = _read(folder / WITHOUT / MANIFEST)
    theirs_loss = min((loss for _, loss in plain_run.get("dev_losses", ())), default=None)
    ours_loss = min((loss for _, loss in (status.manifest or {}).get("dev_losses", ())), default=None)
    if ours_loss is not None and theirs_loss is not None:
        st.metric(
            t("Best dev loss with them", "读过之后的最佳开发集损失"), f"{ours_loss:.3f}",
            t(f"{theirs_loss:.3f} without", f"不读时 {theirs_loss:.3f}"), delta_color="off", delta_arrow="off",
        )  # fmt: skip


def _headline(report: dict[str, Any]) -> float | None:
    """Share of right dev answers of the fine-tuned model, where the task has labels."""
    interval = ((report.get("systems") or {}).get("tuned") or {}).get("accuracy")
    return (
        float(interval["estimate"])
        if isinstance(interval, dict) and interval.get("estimate") is not None
        else None
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
