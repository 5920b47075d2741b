"""A new evaluation: file, what is asked, which checkpoints at which precisions, and the start of a job for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import evaluate
from glm_core.errors import GLMError
from glm_core.remote import is_remote
from glm_core.settings import MINI
from pages.shared import (
    evaluate_file,
    evaluate_task,
    evaluate_words,
    panels,
    pickers,
    remote_engines,
    state,
    table_input,
)
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.evaluate import EvaluationTask
    from pages.shared.table_input import Chosen

STARTED = "evaluate.started"


def form(draft: dict[str, Any]) -> None:
    """The three cards, one under the other as far as they are filled in."""
    found = evaluate_file.choose()
    if found is None:
        return
    chosen, sample = found
    task = evaluate_task.ask(chosen, sample)
    if task is not None:
        _run_card(draft, chosen, task)


def checkpoints() -> list[CheckpointInfo]:
    """The checkpoints that can be asked, the embedded one first; adapters as well."""
    roots = [*state.settings().model_roots]
    for folder in state.remember("models.folders", []):
        try:
            roots.append(state.settings().allowed_model(folder))
        except GLMError:
            continue  # the disk is not mounted today
    found = [one for one in state.checkpoints(tuple(roots)) if one.loadable]
    if not state.may("load"):
        engine = state.current_engine()
        loaded = engine.loaded if engine is not None else None
        here = {loaded.info.path, loaded.base.path if loaded.base else None} if loaded else set()
        found = [one for one in (*found, *remote_engines.infos()) if one.path in here]
    else:
        found += remote_engines.infos()
    return sorted(found, key=lambda one: one.path != MINI)


def name_of(info: CheckpointInfo) -> str:
    """A checkpoint as a list shows it: its name, and what kind of adapter it is."""
    name = evaluate_words.folder(str(info.path)) if info.path.name.startswith("checkpoint-") else info.name
    return f"{name} ({panels.METHODS.get(info.method, info.method)})" if info.adapter else name


def _run_card(draft: dict[str, Any], chosen: Chosen, task: EvaluationTask) -> None:
    with st.container(border=True, key="evaluate_run"):
        row = panels.section(t("3 · Checkpoints and run", "3 · 检查点与运行"), "play_circle")
        known = checkpoints()
        by_path = {str(one.path): one for one in known}
        engine = state.current_engine()
        now = str(engine.loaded.info.path) if engine is not None else str(MINI)
        left, right = st.columns([3, 2], gap="medium")
        with left:
            picked = st.multiselect(
                t("Checkpoints", "检查点"),
                list(by_path),
                default=[now] if now in by_path else list(by_path)[:1],
                format_func=lambda path: name_of(by_path[path]),
                placeholder=t("choose one or several", "选择一个或多个"),
                key="evaluate_checkpoints",
                persist_state="session",
                help=t(
                    "Each is asked the same in a job of its own, one after the other. Adapters are put on their base.",
                    "每个检查点以相同方式提问，各为一个任务，依次运行。适配器会加载到其基座上。",
                ),
            )
        with right:
            levels, free = list(pickers.PRECISIONS), state.may("load")
            if not free:
                levels = [engine.loaded.precision if engine is not None else "auto"]
            precisions = st.multiselect(
                t("Precision in memory", "内存精度"),
                levels,
                default=levels[:1],
                format_func=lambda one: t("auto", "自动") if one == "auto" else one.upper(),
                key="evaluate_precisions" if free else f"evaluate_precisions_{levels[0]}",
                disabled=not free,
                persist_state="session",
                help=t(
                    "Several give a run each, to see what quantization costs. Auto: FP32 for small models, else BF16.",
                    "选择多个会分别运行，可看出量化的代价。自动：小模型用 FP32，其余用 BF16。",
                ),
            )
        chosen_infos = [by_path[one] for one in picked if one in by_path]
        bases = {str(one.path): _base(one, known) for one in chosen_infos if one.needs_base}
        with st.grid(2, min_column_width=240):
            title = st.text_input(
                t("Name of the run", "名称"),
                placeholder=t("checkpoint on file", "检查点 on 文件"),
                key=f"evaluate_title_{draft['number']}",
            )
            device = pickers.device()
        pairs = [
            (one, precision)
            for one in chosen_infos
            for precision in (["auto"] if is_remote(one.path) else precisions)
        ]
        ready = bool(pairs) and all(bases.get(str(one.path), True) for one in chosen_infos)
        rows = state.most_rows(min(chosen.rows, task.limit_rows or chosen.rows))
        with row:
            st.space("stretch")
            go = st.button(
                t(f"Evaluate {rows:,} rows", f"评测 {rows:,} 行")
                if len(pairs) < 2
                else t(
                    f"Start {len(pairs)} runs of {rows:,} rows", f"启动 {len(pairs)} 个任务，各 {rows:,} 行"
                ),
                type="primary",
                icon=":material/play_arrow:",
                key=f"evaluate_start_{draft['number']}",  # a second click of a double click finds no button
                disabled=not ready,
            )
        st.caption(
            t(
                "Jobs go on when you close the browser. They take the model in memory: one checkpoint at a time.",
                "关闭浏览器后任务仍会继续。任务会占用内存中的模型：一次一个检查点。",
            )
        )
        if any(is_remote(one.path) for one in chosen_infos):
            st.caption(
                ":material/cloud: "
                + t(
                    "The rows for a remote engine are sent to its server. It has one run: its precision is the server's.",
                    "远程引擎的各行会发往其服务器。只运行一次：精度由服务器决定。",
                )
            )
        if go:
            try:
                _start(draft, chosen, task, pairs, bases, device, title)
            except GLMError as error:
                panels.problem(error)


def _base(adapter: CheckpointInfo, known: list[CheckpointInfo]) -> str:
    """The folder of the base to put an adapter on; "" where there is none."""
    fits, _ = state.bases(adapter, known)
    if not fits:
        named = f" ({plain(adapter.base)})" if adapter.base else ""
        st.warning(
            t(
                f"No checkpoint here fits {plain(adapter.name)}{named}. Add the folder of its base on the Models page.",
                f"没有与 {plain(adapter.name)}{named} 相符的检查点。请在“模型”页添加其基座所在的文件夹。",
            ),
            icon=":material/link_off:",
        )
        return ""
    by_path = {str(one.path): one for one in fits}
    if len(fits) == 1:
        return next(iter(by_path))
    return str(
        st.selectbox(
            t(f"Base of {plain(adapter.name)}", f"{plain(adapter.name)} 的基座"),
            list(by_path),
            format_func=lambda path: (
                t(f"{by_path[path].name} (recorded)", f"{by_path[path].name}（适配器所记录）")
                if state.is_recorded(adapter, by_path[path])
                else by_path[path].name
            ),
            key=f"evaluate_base_{adapter.path}",
            persist_state="session",
        )
    )


def _start(
    draft: dict[str, Any], chosen: Chosen, task: EvaluationTask, pairs: list[tuple[CheckpointInfo, str]],
    bases: dict[str, str], device: str, title: str,
) -> None:  # fmt: skip
    """Check every checkpoint, then copy the rows into a job for each; to the job where it is the only one."""
    engine, store = state.current_engine(), state.job_store()
    if engine is None or any(info.path != engine.loaded.info.path for info, _ in pairs):
        store.person.require("load")
    begin = evaluate.start if chosen.rows <= table_input.AT_ONCE_ROWS else evaluate.start_in_background
    with st.spinner(t("Checking the checkpoints and copying the rows …", "正在检查检查点并复制各行……")):
        tasks = [
            evaluate.with_model(task, info.path, bases.get(str(info.path)) or None, precision, device)
            for info, precision in pairs
        ]
        jobs = [begin(store, one, _title(title, one, tasks)) for one in tasks]
    draft["number"] += 1
    state.supervisor()
    if len(jobs) == 1:
        draft["run"] = jobs[0].id
    else:
        state.session_set(STARTED, len(jobs))
    st.rerun()


def _title(title: str, task: EvaluationTask, tasks: list[EvaluationTask]) -> str:
    """The name of one of several runs: what was typed, else the checkpoint on the file, and what tells them apart."""
    several = len({one.checkpoint for one in tasks}) > 1
    name = title.strip() or f"{evaluate_words.folder(task.checkpoint)} on {task.input_name}"
    if title.strip() and several:
        name = f"{name}, {evaluate_words.folder(task.checkpoint)}"
    if len({one.precision for one in tasks}) > 1:
        name = f"{name} ({task.precision.upper()})"
    return name


def told() -> None:
    """That several runs were started just now; they are in the list below."""
    if count := state.session(STARTED):
        st.success(
            t(
                f"{count} runs are under way; they are in the list below.",
                f"{count} 个任务已开始，见下方列表。",
            ),
            icon=":material/rocket_launch:",
        )
        state.session_set(STARTED, None)
