"""What a training brought: better than its base and than a plain classifier or not, and what it forgot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import charts, page, panels, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.finetune.job import TrainingStatus

VERDICTS = {
    "better": (st.success, ":material/thumb_up:"),
    "undecided": (st.info, ":material/balance:"),
    "worse": (st.warning, ":material/thumb_down:"),
    "none": (st.info, ":material/help:"),
}
KEPT_WORDS = {
    "kept": ("kept", "保留", "green"),
    "lost some": ("lost some", "遗忘一部分", "orange"),
    "lost": ("lost", "已遗忘", "red"),
}
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
ORDER = ("tuned", "baseline", "base_choice", "base")


def names() -> dict[str, str]:
    """The systems of a report as they are called on screen."""
    return {
        "tuned": t("Fine-tuned", "微调后"),
        "base": t("Base, free answer", "基座（自由回答）"),
        "base_choice": t("Base, likeliest label", "基座（最可能的标签）"),
        "baseline": t("TF-IDF baseline", "TF-IDF 基线"),
    }


def show(name: str, folder: Path, checkpoint: str, status: TrainingStatus) -> None:
    """The report of a finished training, and the ways on from it."""
    with st.container(border=True, key="finetune_result"):
        row = panels.section(t("Result", "结果"), "flag")
        with row:
            st.space("stretch")
            _ways_on(folder, checkpoint, status)
        report = status.report
        if not report:
            st.caption(
                t(
                    "It was not measured. Its dev loss is in the curve below.",
                    "未进行评测。开发集损失见下方曲线。",
                )
            )
        else:
            verdict = report["verdict"]
            box, icon = VERDICTS.get(verdict["kind"], VERDICTS["none"])
            box(f"**{plain(said(verdict['text']))}**", icon=icon)
            if report.get("systems"):
                _systems(report)
            left, right = st.columns(2, gap="medium")
            with left.container(border=True, height="stretch", key="finetune_forgetting"):
                _forgetting(report["forgetting"])
            with right.container(border=True, height="stretch", key="finetune_effect"):
                _effect(report)
            for note in report.get("notes", ()):
                st.caption(f":material/info: {plain(said(str(note)))}")
            _details(report)
        _manifest(name, status)


def _ways_on(folder: Path, checkpoint: str, status: TrainingStatus) -> None:
    if st.button(
        t("Use in Chat", "用于聊天"),
        type="primary",
        icon=":material/chat:",
        key="use_in_chat",
        disabled=not state.may("load"),
        help=t(
            "Loads it with its base in place of the model in memory.", "加载它及其基座，替换内存中的模型。"
        ),
    ):
        try:
            load(folder, checkpoint, status)
        except GLMError as error:
            panels.problem(error)
        else:
            st.switch_page("pages/chat.py")
    page.link("models", ("Merge, export", "合并、导出"), ":material/deployed_code:")


def load(folder: Path, checkpoint: str, status: TrainingStatus) -> None:
    """Begin to load the result, with its base where it is an adapter; GLMError where the folder cannot be loaded."""
    from glm_core import checkpoints

    state.checkpoints.clear()
    info = checkpoints.inspect(folder)
    if info.problems:
        raise GLMError(
            f"{folder.name} cannot be loaded. {info.problems[0]}", "Repair the folder or choose another."
        )
    precision = str((status.manifest or {}).get("task", {}).get("plan", {}).get("precision", "auto"))
    state.load_model(folder, precision, base=Path(checkpoint) if info.needs_base else None)


# --- base, baseline and fine-tuned --------------------------------------------------------------------------


def _systems(report: dict[str, Any]) -> None:
    labelled = report["kind"] == "labels"
    found = {name: report["systems"][name] for name in ORDER if name in report["systems"]}
    words = names()
    icons = {
        "tuned": "neurology",
        "baseline": "functions",
        "base": "deployed_code",
        "base_choice": "checklist",
    }
    rows = report["rows"]
    what = t("Accuracy", "准确率") if labelled else "ROUGE-L"
    st.markdown(t(f"**{what}** on {rows:,} dev rows", f"{rows:,} 行开发集上的**{what}**"))
    with st.grid(min(4, max(2, len(found))), min_column_width=170):
        for name, system in found.items():
            value = system["accuracy"] if labelled else system["scores"]["rouge-l"]
            st.metric(
                words[name],
                _value(value, labelled),
                _between(value, labelled),
                icon=f":material/{icons[name]}:",
                border=True,
                delta_color="off",
                delta_arrow="off",
                help=_about(system),
            )
    _forest(found, labelled)
    with st.container(gap="xxsmall"):
        for name, one in report.get("comparisons", {}).items():
            difference = one if labelled else one.get("rouge-l", {})
            if name in words and difference:
                st.caption(f":material/compare_arrows: {_compared(words[name], difference, labelled)}")


def _value(interval: dict[str, Any], labelled: bool) -> str:
    value = interval["estimate"]
    return "–" if value is None else f"{value:.1%}" if labelled else f"{value:.1f}"


def _between(interval: dict[str, Any], labelled: bool) -> str:
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return t("interval unknown", "区间未知")
    shown = f"{low:.1%} – {high:.1%}" if labelled else f"{low:.1f} – {high:.1f}"
    return t(f"95 %: {shown}", f"95%：{shown}")


def _about(system: dict[str, Any]) -> str | None:
    parts = []
    if system.get("description"):
        parts.append(plain(said(str(system["description"]))))
    if system.get("n_outside"):
        n = system["n_outside"]
        parts.append(t(f"{n:,} answers are none of the labels.", f"{n:,} 个回答不是任何标签。"))
    if system.get("n_empty"):
        n = system["n_empty"]
        parts.append(t(f"{n:,} answers are empty.", f"{n:,} 个回答为空。"))
    if system.get("seconds_per_1000"):
        time = panels.format_duration(system["seconds_per_1000"])
        parts.append(t(f"{time} for 1,000 rows.", f"每 1,000 行用时 {time}。"))
    return " ".join(parts) or None


def _compared(name: str, one: dict[str, Any], labelled: bool) -> str:
    difference, p = one.get("difference"), one.get("p_value")
    if difference is None or p is None:
        return t(f"Against {name}: cannot be told.", f"与{name}相比：无法判断。")
    shown = f"{100 * difference:+.1f}" if labelled else f"{difference:+.1f}"
    unit = t(" points", " 个百分点") if labelled else t(" ROUGE-L", " ROUGE-L")
    test = t("exact McNemar test", "McNemar 精确检验") if labelled else t("paired bootstrap", "配对自助法")
    p_shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return t(
        f"Against {name}: {shown}{unit}, {p_shown} ({test}).",
        f"与{name}相比：{shown}{unit}，{p_shown}（{test}）。",
    )


def _forest(found: dict[str, Any], labelled: bool) -> None:
    """The headline scores with their intervals, one line each."""
    go = charts.plotly()

    measures = {"accuracy": t("accuracy", "准确率"), "macro_f1": "macro F1"} if labelled else {
        score: score.upper() for score in SCORES
    }  # fmt: skip
    c, words = charts.colors(), names()
    shades = {"tuned": c["main"], "baseline": c["second"], "base": c["faint"], "base_choice": c["other"]}
    figure = go.Figure()
    factor = 100 if labelled else 1
    places = list(range(len(measures)))
    for i, (name, system) in enumerate(found.items()):
        x, up, down, at = [], [], [], []
        for place, key in zip(places, measures, strict=True):
            value = system[key] if labelled else system["scores"][key]
            if value["estimate"] is None:
                continue
            x.append(value["estimate"] * factor)
            up.append(
                ((value["high"] if value["high"] is not None else value["estimate"]) - value["estimate"])
                * factor
            )
            down.append(
                (value["estimate"] - (value["low"] if value["low"] is not None else value["estimate"]))
                * factor
            )
            at.append(place + (i - (len(found) - 1) / 2) * 0.16)
        figure.add_scatter(
            x=x, y=at, mode="markers", name=words[name], marker={"size": 11, "color": shades[name]},
            error_x={"type": "data", "array": up, "arrayminus": down, "color": shades[name], "thickness": 2, "width": 5},
            hovertemplate=f"{words[name]}: %{{x:.1f}}<extra></extra>",
        )  # fmt: skip
    unit = "%" if labelled else t("score, 0 to 100", "分数（0 到 100）")
    charts.dress(figure, 60 + 74 * len(measures), unit, "", showlegend=True)
    figure.update_yaxes(
        tickvals=places, ticktext=[f"{one}  " for one in measures.values()], showgrid=False,
        range=[len(measures) - 0.5, -0.5],
    )  # fmt: skip
    figure.update_xaxes(showgrid=True, rangemode="tozero")
    charts.draw(figure, "finetune_forest")


# --- what was forgotten, and whether it took effect ---------------------------------------------------------


def _forgetting(gauge: dict[str, Any]) -> None:
    """General questions answered right before and after."""
    go = charts.plotly()

    verdict = str(gauge.get("verdict", ""))
    en, zh, color = KEPT_WORDS.get(verdict, (t("not decided", "未定"), t("not decided", "未定"), "gray"))
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**:material/psychology: {t('Forgetting', '遗忘')}**", width="content")
        st.badge(t(en, zh), color=color)  # type: ignore[arg-type]
    c = charts.colors()
    parts = (
        (t("before", "训练前"), gauge["before"], c["quiet"]),
        (t("after", "训练后"), gauge["after"], c["main"]),
    )
    figure = go.Figure()
    for place, (label, value, shade) in enumerate(parts):
        share = value["estimate"] or 0.0
        low, high = (value[key] if value[key] is not None else share for key in ("low", "high"))
        figure.add_bar(
            x=[100 * share], y=[place], orientation="h", marker={"color": shade, "cornerradius": 4},
            error_x={"type": "data", "array": [100 * (high - share)], "arrayminus": [100 * (share - low)],
                     "color": c["text"], "thickness": 1.5, "width": 4},
            hovertemplate=f"{label}: %{{x:.1f}} % ({100 * low:.0f} – {100 * high:.0f})<extra></extra>",
        )  # fmt: skip
    charts.dress(
        figure, 128, t(f"right of {gauge['n']} general questions, %", f"{gauge['n']} 个通用问题的正确率（%）"),
        bargap=0.35,
    )  # fmt: skip
    figure.update_xaxes(range=[0, 100], showgrid=True)
    figure.update_yaxes(
        tickvals=[0, 1],
        ticktext=[f"{label}  " for label, _, _ in parts],
        autorange="reversed",
        showgrid=False,
    )
    charts.draw(figure, "finetune_gauge")
    st.caption(plain(said(str(gauge["text"]))))
    if verdict in ("lost", "lost some"):
        st.caption(
            ":material/build: "
            + t(
                "To forget less: mix in general conversations (Advanced), or take a lower learning rate, fewer steps "
                "or LoRA. The base itself is unchanged.",
                "减少遗忘：混入通用对话（高级设置），或降低学习率、减少步数、改用 LoRA。基座本身没有改变。",
            )
        )
    if broke := gauge.get("broke"):
        import pandas as pd

        with st.expander(t(f"No longer right: {len(broke)}", f"不再正确：{len(broke)} 个")):
            columns = {
                "prompt": t("question", "问题"), "before": t("before", "训练前"), "after": t("after", "训练后"),
            }  # fmt: skip
            rows = [{shown: one[key] for key, shown in columns.items()} for one in broke]
            st.dataframe(pd.DataFrame(rows), hide_index=True, key="finetune_broke")


def _effect(report: dict[str, Any]) -> None:
    effect, loss = report["effect"], report.get("dev_loss")
    changed = bool(effect["dev_changed"] or effect["probes_changed"])
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**:material/difference: {t('Took effect', '是否生效')}**", width="content")
        st.badge(
            t("yes", "是") if changed else t("no", "否"),
            icon=":material/check_circle:" if changed else ":material/warning:",
            color="green" if changed else "orange",
        )
    st.caption(plain(said(str(effect["text"]))))
    with st.grid(2, min_column_width=130):
        if loss:
            st.metric(
                t("Dev loss", "开发集损失"),
                f"{loss['tuned']:.4f}",
                t(f"base {loss['base']:.4f}", f"基座 {loss['base']:.4f}"),
                delta_color="off",
                delta_arrow="off",
            )
        training = report.get("training", {})
        st.metric(
            t("Training", "训练"),
            panels.format_duration(training.get("seconds")),
            t(
                f"at most {panels.format_bytes(training.get('peak_bytes'))}",
                f"最多 {panels.format_bytes(training.get('peak_bytes'))}",
            ),
            delta_color="off",
            delta_arrow="off",
        )
    st.caption(
        t(
            f"Measured in {panels.format_duration(report.get('seconds'))}.",
            f"评测用时 {panels.format_duration(report.get('seconds'))}。",
        )
    )


# --- the rest -----------------------------------------------------------------------------------------------


def _details(report: dict[str, Any]) -> None:
    import pandas as pd

    if report.get("examples"):
        with st.expander(t("Dev rows and their answers", "开发集各行及回答"), icon=":material/table_rows:"):
            columns = {
                "line": t("line", "行号"), "prompt": t("prompt", "提示"), "expected": t("expected", "期望"),
                "base": t("base", "基座"), "tuned": t("fine-tuned", "微调后"),
            }  # fmt: skip
            rows = [{shown: one.get(key) for key, shown in columns.items()} for one in report["examples"]]
            st.dataframe(pd.DataFrame(rows), hide_index=True, key="finetune_examples")
            st.caption(t("Those that the training changed come first.", "训练改变了的回答排在前面。"))
    if report.get("kind") == "labels":
        with st.expander(t("Class by class", "各类别"), icon=":material/category:"):
            words = names()
            rows = [
                {
                    t("system", "系统"): words.get(name, name),
                    t("class", "类别"): one.get("label"),
                    t("precision", "精确率"): one.get("precision"),
                    t("recall", "召回率"): one.get("recall"),
                    "F1": one.get("f1"),
                    t("rows", "行数"): one.get("support"),
                }
                for name, system in report["systems"].items()
                for one in system["by_label"]
            ]
            st.dataframe(pd.DataFrame(rows).round(3), hide_index=True, key="finetune_by_label")


def _manifest(name: str, status: TrainingStatus) -> None:
    """What the training was, whole and to take away."""
    if not status.manifest:
        return
    with st.expander(t("How it was made", "训练设置与记录"), icon=":material/receipt_long:"):
        with st.container(horizontal=True, gap="small"):
            for key, what, value in (
                ("manifest", t("Manifest", "训练记录"), status.manifest),
                ("report", t("Report", "评测报告"), status.report),
            ):
                if value:
                    st.download_button(
                        f"{what} (JSON)",
                        json.dumps(value, ensure_ascii=False, indent=2),
                        file_name=f"{name}-{key}.json",
                        mime="application/json",
                        icon=":material/download:",
                        key=f"finetune_download_{key}",
                        on_click="ignore",
                    )
        st.json(status.manifest, expanded=1)
