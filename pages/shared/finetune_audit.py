"""What is in the rows: their lengths in tokens, classes, copies and contradictions, and which tokens are learned."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import charts, finetune_data, panels
from pages.shared.text import t

if TYPE_CHECKING:
    from pages.shared.finetune_prepare import Prepared

MOST_CLASSES = 10  # bars
PREVIEW_TOKENS = 1200


def show(found: Prepared, limits: tuple[int, int]) -> None:
    """Figures, lengths with the limits in them, classes, problems, and the tokens of a row."""
    with st.container(border=True, key="finetune_audit"):
        panels.section(t("What is in it", "数据检查"), "fact_check")
        if found.train:
            _figures(found)
            left, right = st.columns([3, 2] if found.audit.classes else [1, 1], gap="medium")
            with left:
                if found.audit.classes:
                    _lengths(found, "source", limits[0])
                    _lengths(found, "target", limits[1])
                else:
                    _lengths(found, "source", limits[0])
            with right:
                if found.audit.classes:
                    _classes(found)
                else:
                    _lengths(found, "target", limits[1])
        if found.problems:
            finetune_data.problem_lines(found.problems)
            _conflicts(found)
        elif found.train:
            st.markdown(
                ":green[:material/check_circle:] "
                + t(
                    "No copies, no contradictions, no empty rows, and no row of dev is learned from.",
                    "没有重复、矛盾或空行，开发集的行均未参与训练。",
                )
            )
        if found.train:
            with st.expander(
                t(
                    "Which tokens are learned: rows as the model gets them",
                    "学习哪些词元：模型实际收到的样本",
                ),
                icon=":material/token:",
            ):
                _preview(found, limits)


def _figures(found: Prepared) -> None:
    audit = found.audit
    with st.grid(4, min_column_width=150):
        dev = t(f"{audit.dev_rows:,} to measure with", f"{audit.dev_rows:,} 行用于测量")
        _card(t("Rows to learn from", "训练行数"), f"{audit.rows:,}", dev, "table_rows")
        if audit.classes:
            largest, smallest = audit.classes[0], audit.classes[-1]
            names = f"{_short(largest[0])} {largest[1]:,} · {_short(smallest[0])} {smallest[1]:,}"
            _card(t("Classes", "类别"), f"{len(audit.classes)}", names, "category")
        else:
            kinds = len({one.response for one in found.train})
            _card(t("Responses", "回答"), f"{kinds:,}", t("different texts", "种不同文本"), "category")
        total = int(found.source.sum() + found.target.sum())
        _card(
            t("Tokens", "词元"),
            f"{total:,}" if total < 1_000_000 else f"{total / 1e6:.1f} M",
            t(f"{total / max(1, audit.rows):.0f} a row", f"每行 {total / max(1, audit.rows):.0f}"),
            "token",
            t(f"Counted by the tokenizer of {found.tokenizer_name}.", f"由 {found.tokenizer_name} 的分词器统计。"),
        )  # fmt: skip
        copies = audit.copies.count + audit.near_copies.count
        both = t(f"{audit.overlap.count:,} also in dev", f"{audit.overlap.count:,} 行同时在开发集")
        _card(t("Copies", "重复行"), f"{copies:,}", both, "content_copy")


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= 12 else shown[:11] + "…"


def _card(label: str, value: str, detail: str, icon: str, explained: str | None = None) -> None:
    st.metric(
        label, value, detail, icon=f":material/{icon}:", border=True, delta_color="off", delta_arrow="off",
        help=explained,
    )  # fmt: skip


def _lengths(found: Prepared, which: str, limit: int) -> None:
    """How long the rows are, with the limit, and how many it cuts."""
    import numpy as np

    go = charts.plotly()

    needed = found.source if which == "source" else found.target
    title = (
        t("Length of the prompts", "提示长度")
        if which == "source"
        else t("Length of the answers", "回答长度")
    )
    cut = found.cut(needed, limit)
    share = cut / len(needed)
    shown = f"{share:.1%}" if cut == 0 or share >= 0.001 else "< 0.1%"
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**{title}**", width="content")
        st.badge(
            t(f"{cut:,} row{'' if cut == 1 else 's'} cut ({shown})", f"截断 {cut:,} 行（{shown}）"),
            icon=":material/content_cut:",
            color="gray" if not cut else "orange" if share >= 0.01 else "blue",
            help=t(
                f"Rows longer than the limit of {limit:,} tokens chosen below lose their end. "
                f"The longest has {int(needed[-1]):,}.",
                f"超过下方所选上限（{limit:,} 词元）的行会丢失末尾。最长的一行有 {int(needed[-1]):,} 词元。",
            ),
        )
    c = charts.colors()
    # The longest few rows would press all others into one bar.
    end = max(int(needed[-1 - len(needed) // 500]), min(limit, 2 * int(needed[-1])))
    width = max(1, -(-end // 40))
    counts = np.bincount((needed.clip(1, end) - 1) // width)
    begins = np.arange(len(counts)) * width + 1
    over = begins > limit
    last = len(counts) - 1
    ranges = [
        f"{b:,}" if width == 1 else f"{b:,} – {b + width - 1:,}" if i < last or needed[-1] <= end else f"≥ {b:,}"
        for i, b in enumerate(begins.tolist())
    ]  # fmt: skip
    tokens, rows = t("tokens", "词元"), t("rows", "行")
    figure = go.Figure(
        go.Bar(
            x=begins + (width - 1) / 2,
            y=counts,
            width=width * 0.9,
            marker={"color": np.where(over, c["second"], c["main"]).tolist(), "cornerradius": 2},
            customdata=ranges,
            hovertemplate=f"%{{customdata}} {tokens}: %{{y:,}} {rows}<extra></extra>",
        )
    )
    figure.add_vline(x=limit + 0.5, line={"color": c["bad"], "width": 2, "dash": "dash"})
    right = limit > 0.6 * end
    figure.add_annotation(
        x=limit + 0.5, y=1, yref="paper", yanchor="top", xanchor="right" if right else "left", showarrow=False,
        text=f" {t('limit', '上限')} {limit:,} ", font={"color": c["bad"], "size": 12},
    )  # fmt: skip
    charts.dress(figure, 170, t("tokens", "词元"), t("rows", "行"), bargap=0)
    figure.update_xaxes(range=[0, max(end, limit) * 1.04 + 1])
    charts.draw(figure, f"finetune_{which}_lengths")


def _classes(found: Prepared) -> None:
    """Rows of each class, to learn from and to measure with."""
    go = charts.plotly()

    classes = found.audit.classes[:MOST_CLASSES]
    st.markdown(f"**{t('Classes', '类别')}**")
    c = charts.colors()
    names = [charts.escaped(name, 16) or t("(empty)", "（空）") for name, _, _ in classes]
    total = max(1, sum(train for _, train, _ in found.audit.classes))
    places = list(range(len(classes)))
    figure = go.Figure()
    parts = ((1, t("to learn from", "训练"), c["main"]), (2, t("to measure with", "测量"), c["other"]))
    for at, label, color in parts:
        counts = [one[at] for one in classes]
        figure.add_bar(
            x=counts, y=places, orientation="h", name=label,
            marker={"color": color, "cornerradius": 3}, customdata=names,
            text=[f"{n:,} · {n / total:.0%}" for n in counts] if at == 1 else None, textposition="inside",
            insidetextanchor="end", insidetextfont={"color": c["inside"]}, textangle=0,
            hovertemplate=f"%{{customdata}}: %{{x:,}} {t('rows', '行')} ({label})<extra></extra>",
        )  # fmt: skip
    charts.dress(
        figure, 74 + 46 * len(classes), t("rows", "行"), barmode="stack", bargap=0.3, showlegend=True
    )
    figure.update_yaxes(
        autorange="reversed", tickvals=places, ticktext=[f"{name}  " for name in names], showgrid=False
    )
    figure.update_xaxes(showgrid=True)
    charts.draw(figure, "finetune_classes")
    if len(found.audit.classes) > MOST_CLASSES:
        more = len(found.audit.classes) - MOST_CLASSES
        st.caption(t(f"{more} more classes.", f"另有 {more} 个类别。"))


def _conflicts(found: Prepared) -> None:
    if not found.audit.conflicts:
        return
    import pandas as pd

    with st.expander(
        t(
            f"The same prompt with different answers: {found.audit.conflicting:,}",
            f"同一提示有不同回答：{found.audit.conflicting:,}",
        ),
        icon=":material/call_split:",
    ):
        rows = [
            (
                one.text,
                " / ".join(f"{response} ×{count}" for response, count, _ in one.responses),
                ", ".join(str(line) for _, _, lines in one.responses for line in lines),
            )
            for one in found.audit.conflicts
        ]
        columns = [t("prompt", "提示"), t("answers", "回答"), t("lines", "行号")]
        st.dataframe(pd.DataFrame(rows, columns=columns), hide_index=True, key="finetune_conflicts")


def _preview(found: Prepared, limits: tuple[int, int]) -> None:
    """A row's tokens in order; those in colour count in the loss."""
    from glm_core.finetune.encoding import encode, preview

    number = st.number_input(
        t("Row to learn from", "训练行"),
        min_value=1,
        max_value=len(found.train),
        key="finetune_preview_row",
        width=160,
    )
    example = found.train[min(int(number), len(found.train)) - 1]
    try:
        encoded = encode(example, found.tokenizer, *limits, history_column=found.history)
    except GLMError as error:
        panels.problem(error)
        return
    c = charts.colors()
    dark = c is charts.DARK
    styles = (
        f"color:{c['faint']}",
        f"background:{'#10301f' if dark else '#bbf7d0'};color:{c['text']};border-radius:3px;"
        f"box-shadow:inset 0 0 0 1px {c['good']}55",
    )
    parts, pieces = [], preview(encoded, found.tokenizer)
    for piece in pieces[:PREVIEW_TOKENS]:
        text = html.escape(piece.text).replace("\n", "⏎\n")
        parts.append(f'<span style="{styles[piece.counted]}">{text}</span>')
    more = " …" if len(pieces) > PREVIEW_TOKENS else ""
    st.html(
        '<div style="white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;font-size:0.85rem;'
        f'line-height:1.7">{"".join(parts)}{more}</div>'
    )
    learned = sum(label != -100 for label in encoded.labels)
    cut = encoded.truncated_source + encoded.truncated_target
    lost = t(f" · {cut:,} tokens cut by the limits", f" · 上限截去 {cut:,} 词元") if cut else ""
    st.caption(
        t(
            f"Line {example.line:,} of the file. {len(encoded.ids):,} tokens; the {learned:,} in green count in the "
            f"loss, the model only reads the others{lost}.",
            f"文件第 {example.line:,} 行。共 {len(encoded.ids):,} 词元；绿色的 {learned:,} 个计入损失，"
            f"其余只供模型阅读{lost}。",
        )
    )
