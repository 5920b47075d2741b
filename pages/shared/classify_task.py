"""What to tell apart: the labels, how the question is put, and what counts as positive; kept over pages and restarts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import batch
from glm_core.errors import GLMError
from pages.shared import classify_carry, panels, remote_words, state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.classify import LabelTask
    from glm_core.engine import Engine
    from pages.shared.table_input import Chosen

TEXT = "text"  # the placeholder that stands for the text column, whatever its name
MOST_LABELS = 50
SPAM = (
    {"name": "0", "verbaliser": "正常", "display": "normal"},
    {"name": "1", "verbaliser": "垃圾", "display": "spam"},
)
TRAINED_TEMPLATE = "{text}"


@dataclass(frozen=True)
class Asked:
    """The labels and the question, as filled in and checked."""

    labels: tuple[dict[str, str], ...]
    template: str
    positive: str
    shots: tuple[tuple[str, str], ...]
    content_free: bool
    abstain_below: float
    carried: dict[str, Any] | None = None  # what was measured on another file

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one["name"] for one in self.labels)

    def shown(self, name: str) -> str:
        """A label as it is called on screen."""
        return shown(self.labels, name)


def shown(labels: Sequence[dict[str, Any]], name: str) -> str:
    """A label's display name, beside its own where the two differ."""
    for one in labels:
        if one["name"] == name and one.get("display") and one["display"] != name:
            return f"{name} · {one['display']}"
    return name


def ask(engine: Engine) -> Asked | None:
    """The card of the task; None while something in it is wrong, which it then says."""
    with st.container(border=True, key="classify_task"):
        row = panels.section(t("What to tell apart", "分类任务"), "label")
        with row:
            st.space("stretch")
            name = engine.loaded.info.name
            st.badge(plain(name), icon=":material/deployed_code:", color="violet")
            st.badge(remote_words.where(engine), color="gray")
        _trained(engine)
        left, right = st.columns(2, gap="large")
        with left:
            labels = _labels()
        with right:
            template = _template()
            positive = _positive(labels)
        with st.expander(t("Examples and doubtful rows", "示例与存疑行"), icon=":material/tune:"):
            shots, problem = _shots(labels)
            content_free = st.toggle(
                t("Take out the model's own preference", "消除模型自身偏好"),
                help=t(
                    "Asks once with an empty text and divides by what comes out (contextual calibration). For models "
                    "that were not fine-tuned on these labels.",
                    "先用空文本提问一次，再除以得到的概率（上下文校准）。适用于未针对这些标签微调的模型。",
                ),
                **state.kept_widget("classify.content_free", False),
            )
            abstain = st.slider(
                t("Send to review below this probability", "概率低于此值时送审"),
                0.0,
                1.0,
                step=0.05,
                help=t(
                    "A row whose likeliest label is less probable than this is marked for review. Its label stays.",
                    "最可能标签的概率低于此值的行会标记为待审，其标签保留。",
                ),
                **state.kept_widget("classify.abstain_below", 0.6),
            )
        problems = [*_problems(labels, template), *([problem] if problem else [])]
        for one in problems:
            panels.problem(one)
        if problems:
            return None
        try:
            way = remote_words.label_way(engine, [one["verbaliser"] or one["name"] for one in labels])
        except GLMError as error:
            panels.problem(error)
            return None
        if way:
            icon = ":orange[:material/warning:]" if way == "greedy" else ":material/cloud:"
            st.caption(f"{icon} {remote_words.way(way)}")
        carried = classify_carry.strip(engine, labels, template, shots)
    return Asked(tuple(labels), template, positive, shots, bool(content_free), float(abstain), carried)


# --- labels ------------------------------------------------------------------------------------------------


def kept_labels() -> list[dict[str, str]]:
    """The labels as they were filled in last."""
    found = state.remember("classify.labels", None)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return [dict(one) for one in SPAM]
    return [{key: str(one.get(key, "")) for key in ("name", "verbaliser", "display")} for one in found]


def keep_labels(labels: Sequence[dict[str, str]]) -> None:
    """Set the labels, and let the widgets show them."""
    state.remember_set("classify.labels", [dict(one) for one in labels])
    state.session_set("classify.labels_drawn", state.session("classify.labels_drawn", 0) + 1)


def _labels() -> list[dict[str, str]]:
    found, drawn = kept_labels(), state.session("classify.labels_drawn", 0)
    # Three narrow fields and a button stay in one line, on a phone too.
    st.html(
        "<style>[class*='st-key-label_row_'], .st-key-label_heads {flex-wrap: nowrap !important;}"
        "[class*='st-key-label_row_'] > div, .st-key-label_heads > div {min-width: 0 !important;}"
        ".st-key-label_heads > div {flex: 1 1 0 !important;}"
        "[class*='st-key-label_row_'] > .stButton, [class*='st-key-label_row_'] > [class*='st-key-label_drop'],"
        ".st-key-label_heads > div:last-child {flex: 0 0 2rem !important;}</style>"
    )
    with st.container(horizontal=True, gap="small", key="label_heads"):
        for text, help_ in (
            (t("Label", "标签"), t("as in your file and in the result", "文件和结果中的写法")),
            (t("The model says", "模型的说法"), t("the word that is scored", "用于计分的词")),
            (t("Shown as", "显示为"), t("on these pages, optional", "页面上的名称，可选")),
        ):
            st.caption(f"**{text}**", help=help_)
        st.caption(" ")
    for i, one in enumerate(found):
        with st.container(horizontal=True, gap="small", vertical_alignment="center", key=f"label_row_{i}"):
            for field, title in (
                ("name", "Label"),
                ("verbaliser", "The model says"),
                ("display", "Shown as"),
            ):
                st.text_input(
                    f"{title} {i + 1}",
                    value=one[field],
                    key=f"label_{field}_{i}_{drawn}",
                    label_visibility="collapsed",
                    placeholder=one["name"] if field != "name" else t("label", "标签"),
                    on_change=_changed,
                    args=(i, field, f"label_{field}_{i}_{drawn}"),
                )
            st.button(
                "",
                icon=":material/close:",
                key=f"label_drop_{i}",
                type="tertiary",
                disabled=len(found) <= 2,
                help=t("Remove this label", "删除此标签"),
                on_click=lambda i=i: keep_labels([x for j, x in enumerate(kept_labels()) if j != i]),
            )
    with st.container(horizontal=True, gap="small"):
        st.button(
            t("Add a label", "添加标签"),
            icon=":material/add:",
            key="label_add",
            disabled=len(found) >= MOST_LABELS,
            on_click=lambda: keep_labels([*kept_labels(), {"name": "", "verbaliser": "", "display": ""}]),
        )
        if found != [dict(one) for one in SPAM]:
            st.button(
                t("Spam: 正常 / 垃圾", "垃圾评论：正常 / 垃圾"),
                icon=":material/restart_alt:",
                key="label_spam",
                on_click=lambda: keep_labels(SPAM),
            )
    return [{**one, "verbaliser": one["verbaliser"] or one["name"]} for one in found]


def _changed(i: int, field: str, widget: str) -> None:
    found = kept_labels()
    if i < len(found):
        found[i][field] = str(state.session(widget) or "").strip()
        state.remember_set("classify.labels", found)


def _problems(labels: Sequence[dict[str, str]], template: str) -> list[GLMError]:
    """Everything that is wrong with the task."""
    found = []
    if empty := sum(not one["name"] for one in labels):
        found.append(
            GLMError(f"{empty} of the labels have no name.", "Fill in the first field of each, or remove it.")
        )
    if twice := _twice([one["name"] for one in labels if one["name"]]):
        found.append(GLMError(f"Two labels have the same name: {twice}.", "Give each label its own name."))
    elif twice := _twice([one["verbaliser"] for one in labels if one["verbaliser"]]):
        found.append(
            GLMError(f"The model is to say {twice} for two labels.", "Give each label its own word.")
        )
    try:
        names = batch.placeholders(template)
    except GLMError as error:
        found.append(error)
    else:
        if not names:
            found.append(
                GLMError("The question has no place for the text.", "Write {text} where the text goes.")
            )
    return found


def _twice(given: Sequence[str]) -> str:
    """The first of some texts that is there twice, else nothing."""
    return next((one for one in given if given.count(one) > 1), "")


# --- the question ----------------------------------------------------------------------------------------------


def default_template() -> str:
    """The question the embedded model knows."""
    from glm_core.minimodel.examples import CHINESE_TEMPLATES

    return CHINESE_TEMPLATES[0]


def _template() -> str:
    return str(
        st.text_area(
            t("Question", "提问模板"),
            height=112,
            help=t(
                "`{text}` is replaced by the text. Other `{columns}` of the table may be used too. What stands before "
                "the text is computed once for all rows.",
                "`{text}` 会替换为文本；也可使用表格中的其他 `{列名}`。文本之前的部分对所有行只计算一次。",
            ),
            **state.kept_widget("classify.template", default_template()),
        )
        or ""
    )


def _positive(labels: Sequence[dict[str, str]]) -> str:
    names = [one["name"] for one in labels if one["name"]]
    choices = ["", *names]
    return str(
        st.selectbox(
            t("Positive label", "正类"),
            choices,
            format_func=lambda one: shown(labels, one) if one else t("none", "无"),
            help=t(
                "What is looked for, such as spam: thresholds, precision and recall, ROC and prevalence are about it.",
                "要找的类别（如垃圾）：阈值、精确率、召回率、ROC 和占比都针对它。",
            ),
            **state.kept_widget("classify.positive", names[-1] if len(names) == 2 else "", choices, "index"),
        )
        or ""
    )


def _shots(labels: Sequence[dict[str, str]]) -> tuple[tuple[tuple[str, str], ...], GLMError | None]:
    """Example rows that are put before every question, and what is wrong with them."""
    typed = st.text_area(
        t("Examples, one per line: label | text", "示例，每行一个：标签 | 文本"),
        height=90,
        placeholder=f"{labels[-1]['name']} | …",
        help=t(
            "They come before every question. A model fine-tuned on the labels needs none.",
            "放在每次提问之前。已针对这些标签微调的模型不需要示例。",
        ),
        **state.kept_widget("classify.shots", ""),
    )
    found, names = [], [one["name"] for one in labels]
    for number, line in enumerate(str(typed or "").splitlines(), 1):
        if not line.strip():
            continue
        label, bar, text = line.partition("|")
        if not bar or label.strip() not in names or not text.strip():
            return (), GLMError(
                f"Example {number} is not a label, a bar and a text: {line.strip()[:40]!r}.",
                f"Write, for instance: {names[-1]} | a text. The labels are: {', '.join(names)}.",
            )
        found.append((text.strip(), label.strip()))
    return tuple(found), None


# --- what a fine-tuned checkpoint was trained on -------------------------------------------------------------


@st.cache_data(max_entries=16, show_spinner=False)
def trained_on(folder: str, stamp: float) -> tuple[tuple[str, ...], str]:
    """(the answers a checkpoint of this workbench was trained to give, what stood before its prompts); () if none."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        audit = json.loads((path / "audit.json").read_text(encoding="utf-8"))
        labels = tuple(sorted(str(one[0]) for one in audit["classes"]))
        return labels, str(manifest["task"].get("source_prefix", ""))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return (), ""


def _trained(engine: Engine) -> None:
    """Offer the labels of the training where the checkpoint was fine-tuned on other ones."""
    path = engine.loaded.info.path
    file = path / "manifest.json"
    labels, prefix = trained_on(str(path), file.stat().st_mtime if file.is_file() else 0.0)
    if len(labels) < 2:
        return
    template = prefix.replace("{", "{{").replace("}", "}}") + TRAINED_TEMPLATE
    now = [one["verbaliser"] or one["name"] for one in kept_labels()]
    if sorted(now) == sorted(labels) and state.remember("classify.template", "") == template:
        return
    listed = " / ".join(plain(one) for one in labels[:6]) + (" …" if len(labels) > 6 else "")
    with st.container(horizontal=True, vertical_alignment="center", key="classify_trained"):
        st.markdown(
            ":material/tips_and_updates: "
            + t(
                f"**{plain(path.name)}** was trained to answer {listed}, without a question around the text.",
                f"**{plain(path.name)}** 训练时的回答是 {listed}，文本外没有提问。",
            ),
            width="stretch",
        )

        def use() -> None:
            keep_labels([{"name": one, "verbaliser": one, "display": ""} for one in labels])
            state.remember_set("classify.template", template)
            state.session_set("widget.classify.template", template)

        st.button(t("Use its labels", "使用其标签"), icon=":material/check:", key="use_trained", on_click=use)


# --- the task of glm_core --------------------------------------------------------------------------------------


def for_column(template: str, column: str, columns: Sequence[str]) -> str:
    """The template with {text} put to a column of the table; other placeholders stay."""

    def put(match: Any) -> str:
        if match[1] is not None and match[1].strip() == TEXT:
            return batch.reference(column, columns)
        return str(match[0])

    return batch.PART.sub(put, template)


def make(
    engine: Engine, asked: Asked, template: str, columns: Sequence[str], chosen: Chosen | None = None
) -> LabelTask:
    """The task for the loaded model. GLMError where the labels or the template do not do."""
    from glm_core import checkpoints
    from glm_core.classify import Label, LabelTask

    loaded = engine.loaded
    base = loaded.base.path if loaded.base else None
    task = LabelTask(
        checkpoint=str(loaded.info.path),
        checkpoint_fingerprint=engine.remote.fingerprint
        if engine.remote is not None
        else checkpoints.fingerprint(loaded.info.path, base),
        precision=loaded.precision,
        device=loaded.devices,
        labels=tuple(Label(one["name"], one["verbaliser"], one["display"]) for one in asked.labels),
        template=template,
        shots=asked.shots,
        positive=asked.positive,
        content_free=asked.content_free,
        abstain_below=asked.abstain_below,
        columns=tuple(columns),
        input_name=chosen.name if chosen else "",
        input_path=str(chosen.path) if chosen else "",
        read_options=chosen.options.to_json() if chosen else {},
        generation=engine.tokenizer.generation,
        base=str(base) if base else "",
        versions=batch.versions(),
        remote=remote_words.record(engine, [one["verbaliser"] or one["name"] for one in asked.labels]),
    )
    return classify_carry.carried_into(task, asked.carried)
