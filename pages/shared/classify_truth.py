"""Which label each value of a column of correct labels means: listed with counts, proposed, confirmed, never guessed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from glm_core.review import Truth
from pages.shared import classify_task
from pages.shared.text import plain, t

MOST_VALUES = 30  # that can be mapped by hand
USUAL = ("label", "answer", "gold", "class", "category", "标签", "类别", "答案")


def column(columns: Sequence[str], used: Sequence[str], key: str, default: str = "") -> str:
    """The column of correct labels, "" for none; by default none, since a file to predict has none."""
    choices = ["", *(one for one in columns if one not in used)]
    named = next((one for one in choices if one and one.strip().casefold() in USUAL), "")
    chosen = st.selectbox(
        t("Correct labels, where there are some", "正确标签列（如有）"),
        choices,
        index=choices.index(default) if default in choices else 0,
        format_func=lambda one: one or t("none", "无"),
        key=key,
        persist_state="session",
        help=t(
            "With correct labels in the file, the result is measured against them. The model never sees them.",
            "若文件中有正确标签，将据此评测结果；模型不会看到它们。",
        ),
    )
    if not chosen and named:
        st.caption(
            ":material/lightbulb: "
            + t(f"{plain(named)} may be such a column.", f"{plain(named)} 可能就是这样的列。")
        )
    return str(chosen or "")


def mapping(
    found: str,
    counts: Mapping[str, int],
    labels: Sequence[dict[str, Any]],
    key: str,
    known: Truth | None = None,
) -> Truth | None:
    """What each value of the column means; None until every proposal is confirmed.

    counts   value as it stands in the file -> rows
    """
    from glm_core import classify

    names = [one["name"] for one in labels]
    matched = classify.match_labels(counts, _labels(labels))
    result: dict[str, str | None] = dict(matched.mapped)
    if known is not None and known.column == found:
        result |= {
            value: label
            for value, label in known.mapping.items()
            if value in counts and label in (*names, None)
        }
    open_ = {value: count for value, count in matched.unknown.items() if value not in result}
    exact = sum(count for value, count in counts.items() if value not in matched.unknown)
    total = sum(counts.values())
    if not matched.unknown:
        st.caption(
            ":green[:material/check:] "
            + t(
                f"All {len(counts):,} values of {plain(found)} are labels.",
                f"{plain(found)} 的 {len(counts):,} 种取值都是标签。",
            )
        )
        return Truth(found, result)
    st.markdown(
        t(
            f"{len(matched.unknown):,} values of **{plain(found)}** are not among the labels ({exact:,} of {total:,} rows "
            "are). What do they mean?",
            f"**{plain(found)}** 中有 {len(matched.unknown):,} 种取值不在标签中（{total:,} 行中 {exact:,} 行可识别）。"
            "它们表示什么？",
        )
    )
    shown = sorted(matched.unknown, key=lambda value: -matched.unknown[value])[:MOST_VALUES]
    stamp = hashlib.blake2b(json.dumps([found, names, shown]).encode(), digest_size=6).hexdigest()
    choices: list[str | None] = [*names, None]
    with st.container(key=f"truth_values_{key}", gap="xsmall"):
        for number, value in enumerate(shown):
            proposal = result[value] if value in result else matched.proposals.get(value)
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                text = plain(" ".join(value.split())[:40]) or t("*(empty)*", "*（空）*")
                st.markdown(f"**{text}** · {matched.unknown[value]:,}", width=220)
                chosen = st.selectbox(
                    f"{t('means', '表示')} {number + 1}",
                    choices,
                    index=choices.index(proposal),
                    format_func=lambda one: (
                        t("leave these rows out", "不参与评测")
                        if one is None
                        else classify_task.shown(labels, one)
                    ),
                    key=f"truth_{key}_{stamp}_{number}",
                    label_visibility="collapsed",
                )
            result[value] = chosen
    for value in matched.unknown:
        result.setdefault(value, None)
    if len(matched.unknown) > len(shown):
        rest = sum(matched.unknown[value] for value in matched.unknown if value not in shown)
        st.caption(
            t(
                f"The rarer values, {rest:,} rows, are left out.",
                f"其余较少出现的取值共 {rest:,} 行，不参与评测。",
            )
        )
    if known is not None and not open_ and dict(known.mapping) == result:
        return Truth(found, result)
    confirmed = st.checkbox(
        t("Yes, this is what they mean", "确认以上对应关系"), key=f"truth_sure_{key}_{stamp}"
    )
    return Truth(found, result) if confirmed else None


def _labels(labels: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    from glm_core.classify import Label

    return tuple(
        Label(str(one["name"]), str(one.get("verbaliser") or one["name"]), str(one.get("display") or ""))
        for one in labels
    )
