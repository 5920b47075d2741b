"""What the runs compared were made with: settings that differ, curves of their trainings, and what can be taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import charts, panels, state
from pages.shared.compare_runs import Found
from pages.shared.compare_verdict import show
from pages.shared.finetune_run import smoothed, thinned
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run
    from glm_core.finetune.job import TrainingStatus

LONGEST = 160  # characters of a value
HIDDEN = ("input_sha256", "group")
PARTS = ("task", "rows", "base", "prompt_format", "trainable", "steps")  # of a training's manifest
# Of a training's task what says where it lies, not how it was done.
PLACES = ("output", "resume", "train_file", "dev_file", "checkpoint")


# --- settings that differ -------------------------------------------------------------------------------------


def differences(this: Found) -> None:
    """The settings of the runs and of the trainings of their checkpoints, those that differ alone."""
    panels.section(t("What they were made with", "设置差异"), "difference")
    rows = _run_settings(this)
    trained = _training_settings(this)
    if not rows and not trained:
        st.caption(t("Nothing differs in their settings.", "设置完全相同。"))
        return
    for title, found in (
        (t("The runs", "评测"), rows),
        (t("The trainings of their checkpoints", "检查点的训练"), trained),
    ):
        if found:
            st.caption(f"**{title}** · {t('differences only', '仅显示不同之处')}")
            _table(this, found, title)


def _table(this: Found, rows: Mapping[str, list[Any]], key: str) -> None:
    import pandas as pd

    columns = [t("setting", "设置"), *(this.names[run.id] for run in this.runs)]
    frame = pd.DataFrame([[name, *map(_shown, values)] for name, values in rows.items()], columns=columns)
    st.dataframe(frame, hide_index=True, key=f"compare_settings_{len(rows)}_{key}", height="content")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _run_settings(this: Found) -> dict[str, list[Any]]:
    """Name -> its value in every run, where not all are the same."""
    first = this.against_first
    names = dict.fromkeys(name for one in first for name in one.settings if name not in HIDDEN)
    found = {}
    for name in names:
        # A pair that does not name a setting has the reference's value.
        reference = next(one.settings[name][0] for one in first if name in one.settings)
        found[name] = [reference, *(one.settings.get(name, (None, reference))[1] for one in first)]
    return found


def training_folder(run: Run) -> Path | None:
    """The output folder of the training a run's checkpoint comes from, if it lies on this computer."""
    if run.imported or not run.task.checkpoint:
        return None
    folder = Path(run.task.checkpoint)
    for one in (folder, folder.parent):
        if (one / "events.jsonl").is_file() and (one / "manifest.json").is_file():
            return one
    return None


@st.cache_data(max_entries=32, show_spinner=False, ttl=60)
def _status(folder: Path) -> TrainingStatus:
    from glm_core.finetune import job as training

    return training.status(folder)


def _training_settings(this: Found) -> dict[str, list[Any]]:
    folders = [training_folder(run) for run in this.runs]
    if not any(folders):
        return {}
    flat = []
    for folder in folders:
        manifest = _status(folder).manifest if folder is not None else None
        flat.append(_flat({name: (manifest or {}).get(name) for name in PARTS}))
    names = dict.fromkeys(name for one in flat for name in one)
    found = {}
    for name in names:
        values = [one.get(name) for one in flat]
        if any(value != values[0] for value in values) and name.rpartition(".")[2] not in PLACES:
            found[name.removeprefix("task.")] = values
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, {"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, one in value.items():
        found |= _flat(one, f"{prefix}.{name}" if prefix else str(name))
    return found


# --- curves ---------------------------------------------------------------------------------------------------


def trainings(this: Found) -> dict[Path, TrainingStatus]:
    """The trainings the checkpoints come from that have a curve, each once."""
    found: dict[Path, TrainingStatus] = {}
    for run in this.runs:
        folder = training_folder(run)
        if folder is not None and folder not in found and (status := _status(folder)).curve:
            found[folder] = status
    return found


def curves(this: Found) -> None:
    """Loss over the steps of the trainings the checkpoints come from, in one figure; nothing where there are none."""
    drawn = trainings(this)
    if not drawn:
        return
    with st.container(border=True, key="compare_curves"):
        panels.section(t("Loss of their trainings", "训练损失"), "show_chart")
        go = charts.plotly()

        c = charts.colors()
        figure = go.Figure()
        dev = t("dev", "开发集")
        for color, (folder, status) in zip(
            (c["main"], c["second"], c["other"], c["more"]), drawn.items(), strict=False
        ):
            name = folder.name
            curve = thinned(status.curve)
            figure.add_scatter(
                x=[one[0] for one in curve], y=smoothed([one[1] for one in curve]), mode="lines",
                name=charts.escaped(name), line={"color": color, "width": 2},
                hovertemplate="%{x:,}: %{y:.4f}<extra>" + charts.escaped(name) + "</extra>",
            )  # fmt: skip
            if status.dev:
                figure.add_scatter(
                    x=[one[0] for one in status.dev], y=[one[1] for one in status.dev], mode="lines+markers",
                    name=f"{charts.escaped(name)} · {dev}", line={"color": color, "width": 1.5, "dash": "dot"},
                    marker={"size": 7},
                    hovertemplate="%{x:,}: %{y:.4f}<extra>" + f"{charts.escaped(name)} · {dev}</extra>",
                )  # fmt: skip
        charts.dress(
            figure, 330, t("step", "步"), t("loss, nats a token", "损失（nat/词元）"), showlegend=True
        )
        figure.update_yaxes(rangemode="tozero")
        show(figure, "compare_loss", "loss")


# --- to take away ---------------------------------------------------------------------------------------------


def downloads(this: Found) -> None:
    """The report as one file, the rows as a table, and the address of this comparison."""
    panels.section(t("Share", "分享"), "share")
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.download_button(
            t("Report (HTML)", "报告（HTML）"),
            lambda: report(this).encode(),
            file_name="comparison.html",
            mime="text/html",
            icon=":material/description:",
            type="primary",
            key="compare_report",
            on_click="ignore",
            help=t("One file that opens without a network.", "单个文件，离线即可打开。"),
        )
        st.download_button(
            t("Rows (CSV)", "逐行结果（CSV）"),
            lambda: rows_file(this).read_bytes(),
            file_name="comparison.csv",
            mime="text/csv",
            icon=":material/table_rows:",
            key="compare_csv",
            on_click="ignore",
        )
        st.caption(
            t(
                "A figure is saved with the camera above it.",
                "图可用其右上角的相机按钮保存。",
            ),
            width="content",
        )
    st.caption(t("The address of this comparison", "此对比的链接"))
    st.code(address(this), language=None, wrap_lines=True)


def report(this: Found) -> str:
    """The page of every pair."""
    from glm_core.report_html import comparison_page

    return comparison_page(state.job_store(), this.pairs)


def rows_file(this: Found) -> Path:
    """The rows with the answers of all runs; written when it is asked for."""
    from glm_core import compare

    file = state.exports() / f"comparison-{'-'.join(id_[-6:] for id_ in this.ids)}.csv"
    compare.export(state.job_store(), this.pairs, file)
    return file


def address(this: Found) -> str:
    """The page's own address with the runs, as far as the browser tells it."""
    values = {"runs": ",".join(this.ids)}
    values |= {name: state.query(name) for name in ("metric", "delta") if state.query(name)}
    return f"{str(st.context.url or '').split('?')[0] or 'compare'}?{urlencode(values, safe=',')}"


def problem(error: GLMError, runs: list[Run]) -> None:
    """Why these runs cannot be compared, with what each was asked."""
    st.error(
        f"### {t('These runs cannot be compared.', '这些评测无法对比。')}\n\n{plain(said(error.message))}"
        + (f"\n\n:material/build: {plain(said(error.todo))}" if error.todo else ""),
        icon=":material/block:",
    )
    for run in runs:
        st.caption(f"**{plain(run.title)}**: {plain(run.task.input_name)} · {plain(run.task.reference)}")
