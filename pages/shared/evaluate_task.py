"""What an evaluation asks of a file: columns, kind of task, examples, decoding and metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import evaluate, tables
from glm_core.errors import GLMError
from glm_core.tables import ReadOptions
from pages.shared import evaluate_words, panels, state, table_input
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import EvaluationTask
    from pages.shared.evaluate_file import Sample
    from pages.shared.table_input import Chosen

MOST_SHOTS = 20
LOOKED_AT = 2000
MOST_LISTED = 12


@dataclass(frozen=True)
class Asked:
    """What was chosen, in types that a cache can tell apart."""

    path: str
    stamp: int
    name: str
    options: str
    kind: str
    method: str
    prompt: str
    reference: str
    template: str = ""
    system: str = ""
    labels: tuple[str, ...] = ()
    few_shot: int = 0
    few_shot_file: str = ""
    metrics: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = field(default=())
    limit: int | None = None


def ask(chosen: Chosen, sample: Sample | None) -> EvaluationTask | None:
    """The card "what is asked"; the task without a model, None while something is missing or wrong."""
    with st.container(border=True, key="evaluate_task"):
        row = panels.section(t("2 · What is asked", "2 · 提问方式"), "quiz")
        if not chosen.rows:
            st.caption(t("The file has no rows below its header.", "表头之下没有数据行。"))
            return None
        columns = _columns(chosen, sample)
        if columns is None:
            return None
        prompt, reference = columns
        scope = f"{chosen.key}:{prompt}:{reference}"
        kind = _kind(chosen, reference, scope)
        asked = _rest(chosen, sample, prompt, reference, kind, scope)
        try:
            task = planned(asked)
        except GLMError as error:
            panels.problem(error)
            return None
        with row:
            st.space("stretch")
            st.badge(
                evaluate_words.kind(kind), icon=f":material/{evaluate_words.KINDS[kind][2]}:", color="violet"
            )
        _shown(task)
    return task


def _columns(chosen: Chosen, sample: Sample | None) -> tuple[str, str] | None:
    have = list(chosen.info.columns)
    found = evaluate.guess_columns(have)
    guessed = (
        (sample.prompt, sample.reference) if sample else (found.prompt, found.response) if found else ("", "")
    )
    choices = ["", *have]
    words = {
        "prompt": (t("Question", "问题列"), t("What the model is asked.", "向模型提出的问题。")),
        "reference": (
            t("Correct answer", "参考答案列"),
            t(
                "What the answer is compared with. The same column as the question where each cell holds a whole "
                "conversation.",
                "与回答比较的内容。若每个单元格含整段对话，请选择与问题相同的列。",
            ),
        ),
    }
    picked = []
    with st.grid(3, min_column_width=180):
        for (name, (label, help)), guess in zip(words.items(), guessed, strict=True):
            picked.append(
                st.selectbox(
                    label,
                    choices,
                    index=choices.index(guess) if guess in choices else 0,
                    format_func=lambda one: one or t("choose a column", "请选择列"),
                    help=help,
                    key=f"evaluate_{name}_{chosen.key}",
                    persist_state="session",
                )
            )
        st.number_input(
            t("First rows only", "仅前若干行"),
            min_value=1,
            value=None,
            placeholder=t(f"all {chosen.rows:,}", f"全部 {chosen.rows:,} 行"),
            key=f"evaluate_limit_{chosen.key}",
            persist_state="session",
            help=t("Leave it empty for the whole file.", "留空则评测整个文件。"),
        )
    if not all(picked):
        st.warning(
            t(
                "The names of the columns do not say which is the question and which the correct answer: choose both.",
                "无法从列名判断哪一列是问题、哪一列是参考答案：请选择这两列。",
            ),
            icon=":material/help:",
        )
        return None
    return str(picked[0]), str(picked[1])


@st.cache_data(max_entries=16, show_spinner=False)
def _guessed(path: str, stamp: int, name: str, options: str, reference: str) -> tuple[str, list[str], int]:
    """(kind of task, the different correct answers as far as they are few, their number) of the first rows."""
    table = tables.open_table(Path(path), ReadOptions.from_json(json.loads(options)), name)
    rows = list(islice(table.rows(), LOOKED_AT))
    place = table.info.columns.index(reference)
    found = dict.fromkeys(row[place].strip() for row in rows if row[place].strip())
    return evaluate.guess_kind(table.info.columns, rows, reference), list(found)[:MOST_LISTED], len(found)


def _kind(chosen: Chosen, reference: str, scope: str) -> str:
    """The kind of task, as the file shows it or as chosen, and why."""
    guess, answers, count = _guessed(
        str(chosen.path), chosen.path.stat().st_mtime_ns, chosen.name, json.dumps(chosen.options.to_json()), reference
    )  # fmt: skip
    kinds = list(evaluate.KINDS)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        kind = st.segmented_control(
            t("Kind of task", "任务类型"),
            kinds,
            format_func=lambda one: (
                f":material/{evaluate_words.KINDS[one][2]}: {evaluate_words.kind(one)}"
                + (t(" (found)", "（自动识别）") if one == guess else "")
            ),
            default=guess,
            required=True,
            key=f"evaluate_kind_{scope}",
            persist_state="session",
        )
    listed = " / ".join(plain(one) for one in answers[:6]) + (" …" if count > 6 else "")
    why = {
        "choice": t(
            "The file has a question, the options A, B, C … and the answer in columns.",
            "文件含问题、选项 A、B、C…… 和答案各列。",
        ),
        "number": t("The correct answers are numbers, or end in one after ####.", "参考答案是数字，或以 #### 后的数字结尾。"),
        "label": t(
            f"The correct answers are few and repeat: {listed}.", f"参考答案种类少且重复出现：{listed}。"
        ),
        "text": t(
            f"The correct answers are texts of their own: {count:,} different ones in the first rows.",
            f"参考答案是各不相同的文本：前几行中有 {count:,} 种。",
        ),
    }  # fmt: skip
    chosen_kind = str(kind or guess)
    if chosen_kind == guess:
        st.caption(f":material/auto_awesome: {why[guess]}")
    else:
        st.caption(
            ":orange[:material/edit:] "
            + t("Chosen by hand. The file looks like: ", "手动选择。文件看起来是：")
            + f"{evaluate_words.kind(guess)}. {why[guess]}"
        )
    return chosen_kind


def _rest(chosen: Chosen, sample: Sample | None, prompt: str, reference: str, kind: str, scope: str) -> Asked:
    """How answers are found, examples, wording, decoding and metrics."""
    methods = evaluate.METHODS[kind]  # type: ignore[index]
    key = f"{scope}:{kind}"
    method = methods[0]
    shots, shots_file = 0, ""
    with st.grid(3, min_column_width=200):
        if len(methods) > 1:
            method = st.selectbox(
                t("How an answer is found", "如何得到答案"),
                methods,
                format_func=evaluate_words.method,
                key=f"evaluate_method_{key}",
                persist_state="session",
                help=t(
                    "The likeliest answer: each possible answer is scored and the one with the highest probability "
                    "counts, so that none is unclear. Written: the model answers freely, and what it says is read.",
                    "取概率最大的答案：为每个可能的答案打分，取概率最高者，不会有歧义。由模型写出：模型自由作答，再从中读取答案。",
                ),
            )
        shots = st.number_input(
            t("Solved examples in front", "示例条数（few-shot）"),
            min_value=0,
            max_value=MOST_SHOTS,
            key=f"evaluate_shots_{key}",
            persist_state="session",
            help=t(
                "So many rows are shown with their answers before each question. They come from the start of the file, "
                "and are then not asked, or from a file of their own.",
                "每个问题前先展示若干带答案的样例。默认取文件开头的行（这些行不再提问），也可来自单独的文件。",
            ),
        )
    if shots:
        shots_file = _shots_file(key)
    labels: tuple[str, ...] = ()
    if kind == "label":
        text = st.text_input(
            t("Labels, separated by commas", "标签，用逗号分隔"),
            placeholder=t("those of the file", "取自文件"),
            key=f"evaluate_labels_{key}",
            persist_state="session",
            help=t("What an answer may be. Leave it empty to take the labels of the file.", "允许的答案。留空则取文件中的标签。"),
        )  # fmt: skip
        labels = tuple(one.strip() for one in str(text or "").replace("，", ",").split(",") if one.strip())
    with st.expander(t("Wording, decoding and metrics", "提问模板、解码与指标"), icon=":material/tune:"):
        template = st.text_area(
            t("Question put to the model", "提问模板"),
            value=sample.template if sample and prompt == sample.prompt else "",
            placeholder=t("the question as the file has it, with its options", "文件中的问题原文（含选项）"),
            height=90,
            key=f"evaluate_template_{key}",
            persist_state="session",
            help=t("`{column}` is replaced by the cell of each row.", "`{列名}` 会替换为每行对应的单元格。"),
        )
        system = st.text_input(
            t("System prompt", "系统提示词"), key=f"evaluate_system_{scope}", persist_state="session"
        )
        settings = _decoding(kind, method)
        metrics = _metrics(kind, scope)
    limit = state.session(f"evaluate_limit_{chosen.key}")
    return Asked(
        str(chosen.path), chosen.path.stat().st_mtime_ns, chosen.name, json.dumps(chosen.options.to_json()),
        kind, str(method), prompt, reference, str(template or "").rstrip("\n"), str(system or ""), labels,
        int(shots or 0), shots_file, metrics, settings, None if not limit else int(limit),
    )  # fmt: skip


def _shots_file(key: str) -> str:
    """The path of a file with the examples; "" takes them from the file itself."""
    kept = f"evaluate.shots.{key}"
    now = state.session(kept)
    if now:
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.caption(
                f":material/draft: {t('Examples from', '示例来自')} **{plain(now['file'])}**", width="content"
            )
            if st.button(
                t("From the file itself", "改为取自文件本身"), key="evaluate_shots_own", type="tertiary"
            ):
                state.session_set(kept, None)
                st.rerun()
        path = state.uploads() / now["table"]
        return str(path) if path.is_file() else ""
    with st.expander(
        t("Examples from a file of their own", "示例来自单独的文件"), icon=":material/upload_file:"
    ):
        st.caption(
            t(
                "With the same columns, as the dev file of C-Eval or MMLU. Examples of the same subject are shown.",
                "列须与评测文件相同，例如 C-Eval 或 MMLU 的 dev 文件。展示同一科目的示例。",
            )
        )
        label = t("JSON, JSONL, CSV or Excel", "JSON、JSONL、CSV 或 Excel")
        if stored := table_input.upload("evaluate_shots", label):
            state.session_set(kept, stored)
            st.rerun()
    return ""


def _decoding(kind: str, method: str) -> tuple[tuple[str, Any], ...]:
    """Greedy unless it is asked for otherwise, so that a run gives the same answers again."""
    from glm_core.evaluate.task import LONGEST

    if method == "likelihood":
        st.caption(
            ":material/done_all: "
            + t("Nothing is written, so there is nothing to decode.", "不生成文本，无需解码设置。")
        )
        return ()
    with st.grid(4, min_column_width=130):
        longest = st.number_input(
            t("Longest answer (tokens)", "回答最长（词元）"),
            min_value=1,
            max_value=32768,
            value=LONGEST[kind],  # type: ignore[index]
            key=f"evaluate_tokens_{kind}",
            persist_state="session",
        )
        temperature = st.number_input(
            t("Temperature", "温度"),
            min_value=0.0,
            max_value=2.0,
            value=0.0,
            step=0.1,
            key="evaluate_temperature",
            persist_state="session",
            help=t(
                "0 takes the likeliest token every time (greedy): only so do two runs measure the same.",
                "0 表示每次取最可能的词元（贪心）：只有这样两次评测才可比。",
            ),
        )
        greedy = temperature == 0
        top_p = st.number_input(
            "Top-p", min_value=0.05, max_value=1.0, value=0.8, step=0.05, disabled=greedy,
            key="evaluate_top_p", persist_state="session",
        )  # fmt: skip
        seed = st.number_input(
            t("Seed", "随机种子"), min_value=0, max_value=2**31, value=0, disabled=greedy,
            key="evaluate_seed", persist_state="session",
        )  # fmt: skip
    values: dict[str, Any] = {"max_new_tokens": int(longest)}
    if not greedy:
        values |= {"temperature": float(temperature), "top_p": float(top_p), "seed": int(seed)}
    return tuple(values.items())


def _metrics(kind: str, scope: str) -> tuple[str, ...]:
    """Which metrics to compute, with the formula of each; the reason where those of texts say nothing."""
    import pandas as pd

    from glm_core.evaluate.scoring import HIDDEN

    names = evaluate.METRICS[kind]  # type: ignore[index]
    chosen: list[str] = list(names)
    if len(names) > 1:
        chosen = st.multiselect(
            t("Metrics", "指标"),
            names,
            default=list(names),
            format_func=evaluate_words.metric,
            key=f"evaluate_metrics_{scope}:{kind}",
            persist_state="session",
        )
    if kind in HIDDEN:
        st.caption(f":material/visibility_off: {said(HIDDEN[kind])}")
    rows = [
        {
            t("metric", "指标"): evaluate_words.metric(one),
            t("what it is", "定义"): evaluate_words.formula(kind, one),
        }
        for one in names
        if not chosen or one in chosen
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=min(36 * (len(rows) + 1) + 2, 220),
        column_config={
            t("metric", "指标"): st.column_config.TextColumn(width=160),
            t("what it is", "定义"): st.column_config.TextColumn(width="large"),
        },
        key=f"evaluate_formulas_{kind}",
    )
    return () if len(chosen) == len(names) else tuple(chosen)


@st.cache_data(max_entries=24, show_spinner="Looking at the file …")
def _planned(asked: Asked) -> EvaluationTask:
    from glm_core.engine import GenerationSettings

    settings = GenerationSettings(**dict(asked.settings)) if asked.settings else None
    return evaluate.plan(
        asked.path,
        name=asked.name,
        options=ReadOptions.from_json(json.loads(asked.options)),
        kind=asked.kind,  # type: ignore[arg-type]
        method=asked.method,  # type: ignore[arg-type]
        prompt=asked.prompt,
        reference=asked.reference,
        template=asked.template,
        system=asked.system,
        labels=asked.labels,
        few_shot=asked.few_shot,
        few_shot_file=asked.few_shot_file or None,
        chosen=asked.metrics,
        settings=settings,
        limit=asked.limit,
    )


def planned(asked: Asked) -> EvaluationTask:
    """The task of what was chosen, kept as long as the choice; GLMError for what cannot be asked."""
    return _planned(asked)


@st.cache_data(max_entries=24, show_spinner=False)
def _first(task_json: str) -> tuple[list[tuple[str, str]], str, str] | None:
    """(rounds in front, question, correct answer) of the first row asked; None where no row is."""
    from glm_core import batch
    from glm_core.evaluate.task import EXTRA, rows_of

    task = evaluate.EvaluationTask.from_json(json.loads(task_json))
    table = tables.open_table(
        Path(task.input_path), ReadOptions.from_json(task.read_options), task.input_name
    )
    row = next(rows_of(task, table), None)
    if row is None:
        return None
    subject = row.cells[task.columns.index(task.subject)] if task.subject else ""
    by_subject = any(one for one, _, _ in task.shots)
    rounds = [(a, b) for one, a, b in task.shots if not by_subject or one == subject]
    return (
        rounds,
        batch.Template(task.template, task.cells).render(row.cells),
        row.cells[len(task.columns) + EXTRA.index("reference")],
    )


def _shown(task: EvaluationTask) -> None:
    """The first question with its correct answer, as the model is asked."""
    try:
        found = _first(json.dumps(task.to_json()))
    except GLMError as error:
        panels.problem(error)
        return
    if found is None:
        st.caption(t("No row has a question and a correct answer.", "没有同时含问题和参考答案的行。"))
        return
    rounds, question, reference = found
    with st.expander(
        t("The first question, as it is asked", "第一个问题的实际提问"), icon=":material/visibility:"
    ):
        for asked, told in rounds:
            st.caption(t("example", "示例"))
            st.code(f"{asked}\n→ {told}", language=None, wrap_lines=True)
        st.caption(t("question", "问题"))
        st.code(question, language=None, wrap_lines=True)
        st.caption(t("correct answer", "参考答案"))
        st.code(reference, language=None, wrap_lines=True)
