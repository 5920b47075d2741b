"""Models on servers: add one by its address, see what it can do, use it as the model of every page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import remote
from glm_core.errors import GLMError
from glm_core.remote import DEFAULT_KEY, Remote
from glm_core.remote.remotes import address
from pages.shared import panels, remote_words, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.remote import Report

REPORTS = "remotes.reports"  # what tests of this session found, by name
LISTED = "remotes.listed"  # (address, its models) of the server last looked at
PROBLEM = "remotes.problem"
FORM = "remotes.form"  # a new number empties the form


def known() -> list[Remote]:
    """The servers kept in the workspace; none where their file cannot be read, which the Models page says."""
    try:
        return remote.known()
    except GLMError:
        return []


def infos() -> list[CheckpointInfo]:
    """The servers as a list of checkpoints shows them."""
    return [remote.info_of(one) for one in known()]


def note(why: tuple[str, str]) -> None:
    """Why servers are not offered here; draws nothing where there are none."""
    if known():
        st.caption(f":material/cloud_off: {t(*why)}")


def card() -> None:
    """The servers that are known, and the form for another one."""
    found = known()
    with st.container(border=True, key="remote_engines"):
        panels.section(f"{t('Remote engines', '远程引擎')} · {len(found)}", "cloud")
        st.caption(
            t(
                "Models on servers that speak the OpenAI protocol: vLLM, SGLang, llama.cpp, another workbench. "
                "What you ask them leaves this computer and goes to that server, nowhere else.",
                "使用 OpenAI 协议的服务器上的模型：vLLM、SGLang、llama.cpp 或另一台工作台。"
                "向其提问的内容会离开本机，只发往该服务器。",
            )
        )
        try:
            remote.known()
        except GLMError as error:
            panels.problem(error)
        for one in found:
            _row(one)
        if error := state.session(PROBLEM):
            panels.problem(error)
        if state.may("load"):
            with st.expander(t("Add a server", "添加服务器"), icon=":material/add:", expanded=not found):
                _form()


def _row(one: Remote) -> None:
    engine = state.current_engine()
    current = engine is not None and engine.remote is not None and engine.remote.name == one.name
    report: Report | None = state.session(REPORTS, {}).get(one.name)
    pressed = False
    with st.container(border=True, gap="xsmall", key=f"remote_{one.name}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"**{plain(one.name)}**", width="content")
            st.badge(plain(one.model), icon=":material/deployed_code:", color="violet")
            if current:
                st.badge(t("in use", "使用中"), icon=":material/check_circle:", color="green")
            st.space("stretch")
            if state.may("load"):
                with st.container(horizontal=True, width="content", gap="small"):
                    pressed = _buttons(one, current)
        st.caption(
            f":material/link: `{one.url}` · :material/key: {plain(one.key_env)} · "
            + t(
                f"{one.concurrency} requests at a time, {one.tries} tries each",
                f"同时 {one.concurrency} 个请求，各最多尝试 {one.tries} 次",
            )
        )
        if pressed:
            _test(one)
        if report is not None:
            _abilities(report)


def _buttons(one: Remote, current: bool) -> bool:
    """Test, remove, use; whether the first was pressed."""
    pressed = st.button(
        t("Test", "测试"), icon=":material/network_check:", key=f"remote_test_{one.name}", type="tertiary"
    )
    st.button(
        t("Remove", "移除"), icon=":material/delete:", key=f"remote_remove_{one.name}", type="tertiary",
        on_click=_remove, args=(one.name,),
    )  # fmt: skip
    busy = state.model_state()[0] == "loading"
    st.button(
        t("Use", "使用"), icon=":material/play_arrow:", key=f"remote_use_{one.name}",
        disabled=current or busy, on_click=_use, args=(one,),
        help=t(
            "Takes the place of the model in memory on all pages. Jobs that run are not touched.",
            "在所有页面取代内存中的模型；正在运行的任务不受影响。",
        ),
    )  # fmt: skip
    return pressed


def _abilities(report: Report) -> None:
    """What a test found, as badges; why something does not work, as their help."""
    problems = report.problems or {}

    def badge(works: bool, what: str, detail: str, key: str) -> None:
        st.badge(
            f"{what}{f' · {detail}' if detail else ''}",
            icon=":material/check:" if works else ":material/close:",
            color="green" if works else "gray",
            help=None if works else plain(said(problems.get(key, ""))) or None,
        )

    first = report.first_token_s
    with st.container(horizontal=True, gap="xsmall", key=f"abilities_{report.model}_{report.url}"):
        badge(report.chat, t("chat", "对话"), "", "chat")
        begins = "" if first is None else t(f"first piece {first:.2f} s", f"首段 {first:.2f} 秒")
        badge(report.stream, t("stream", "流式"), begins, "stream")
        badge(report.logprobs > 0, t("log-probabilities", "对数概率"), str(report.logprobs or ""), "logprobs")
        badge(report.classify, "/v1/classify", "", "classify")
        st.badge(
            t(f"latency {1000 * report.latency_s:.0f} ms", f"延迟 {1000 * report.latency_s:.0f} 毫秒"),
            icon=":material/timer:",
            color="gray",
        )
        if report.context:
            st.badge(
                t(f"context {report.context:,} tokens", f"上下文 {report.context:,} 词元"),
                icon=":material/data_usage:",
                color="gray",
            )
    st.caption(f":material/label: {remote_words.way(report.labels)}")


# --- what the buttons do ----------------------------------------------------------------------------------


def _test(one: Remote) -> None:
    try:
        report = _asked(one)
    except GLMError as error:
        state.session_set(PROBLEM, error)
        state.session_set(REPORTS, {k: v for k, v in state.session(REPORTS, {}).items() if k != one.name})
    else:
        state.session_set(PROBLEM, None)
        state.session_set(REPORTS, {**state.session(REPORTS, {}), one.name: report})
    st.rerun()


def _asked(one: Remote) -> Report:
    with st.spinner(t(f"Asking {one.host} …", f"正在询问 {one.host}……")):
        return remote.test(one)


def _remove(name: str) -> None:
    try:
        remote.remove(name)
        state.session_set(PROBLEM, None)
    except GLMError as error:
        state.session_set(PROBLEM, error)


def _use(one: Remote) -> None:
    try:
        state.session_set(PROBLEM, None)
        state.load_model(remote.info_of(one).path)
    except GLMError as error:
        state.session_set(PROBLEM, error)


# --- the form ---------------------------------------------------------------------------------------------


def _form() -> None:
    number = state.session(FORM, 0)
    with st.grid(2, min_column_width=240):
        name = st.text_input(
            t("Name", "名称"), placeholder="vllm-a100", max_chars=60, key=f"remote_name_{number}"
        )
        url = st.text_input(
            t("Address", "地址"),
            placeholder="http://host:8000/v1",
            key=f"remote_url_{number}",
            help=t("Where the protocol begins; /v1 is added where it is missing.", "协议的起始地址；缺少 /v1 时自动补上。"),
        )  # fmt: skip
        variable = st.text_input(
            t("Variable with the key", "存放密钥的变量"),
            value=DEFAULT_KEY,
            key=f"remote_key_{number}",
            help=t(
                "The name of an environment variable or of a Streamlit secret, in capital letters. The key itself is "
                "never stored. Without a key of that name none is sent.",
                "环境变量或 Streamlit secret 的名称，使用大写字母。密钥本身从不保存；未设置该变量时不发送密钥。",
            ),
        )
        listed = state.session(LISTED)
        models = list(listed[1]) if listed and listed[0] == _address(url) else []
        model = st.selectbox(
            t("Model", "模型"),
            models,
            index=0 if models else None,
            accept_new_options=True,
            placeholder=t("list them, or type its name", "列出后选择，或直接输入名称"),
            key=f"remote_model_{number}_{len(models)}",
        )
    with st.container(horizontal=True, gap="small", key="remote_limits"):
        concurrency = st.number_input(
            t("Requests at a time", "同时请求数"), 1, 256, 16, key=f"remote_concurrency_{number}", width=155,
            help=t("Of a job; what more the server can do at once.", "任务的并发请求数。"),
        )  # fmt: skip
        tries = st.number_input(
            t("Tries per row", "每行尝试次数"), 1, 100, 6, key=f"remote_tries_{number}", width=155,
            help=t(
                "A request is sent again when the server is busy, fails or does not answer, after growing pauses.",
                "服务器繁忙、出错或无响应时，会在逐渐增加的间隔后重试。",
            ),
        )  # fmt: skip
        timeout = st.number_input(
            t("Longest answer (s)", "最长等待（秒）"), 1, 86400, 300, key=f"remote_timeout_{number}", width=155,
        )  # fmt: skip
    with st.container(horizontal=True, gap="small"):
        look = st.button(
            t("List its models", "列出模型"), icon=":material/search:", key="remote_look", disabled=not url
        )
        go = st.button(
            t("Test and add", "测试并添加"), icon=":material/add:", type="primary", key="remote_add",
            disabled=not (url and name and model),
        )  # fmt: skip
    values: dict[str, Any] = {
        "key_env": variable.strip(), "concurrency": int(concurrency), "tries": int(tries), "timeout_s": float(timeout),
    }  # fmt: skip
    try:
        if look:
            _look(Remote("", address(url), "", **values))
        if go:
            _add(Remote("", address(url), str(model), **values), name)
    except GLMError as error:
        panels.problem(error)


def _address(url: str) -> str:
    try:
        return address(url)
    except GLMError:
        return ""


def _look(one: Remote) -> None:
    from glm_core.remote.client import Refused
    from glm_core.remote.engine import RemoteEngine

    Remote("", one.url, "any", one.key_env).check()
    engine = RemoteEngine(one)
    try:
        with st.spinner(t(f"Asking {one.host} …", f"正在询问 {one.host}……")):
            listed = engine.run(engine.client.models()).result()
    finally:
        engine.close()
    names = [str(entry["id"]) for entry in listed if entry.get("id")]
    if not names:
        raise Refused(f"{one.host} lists no models.", "Type the name of the model.")
    state.session_set(LISTED, (one.url, tuple(names)))
    st.rerun()


def _add(one: Remote, name: str) -> None:
    """Test, then keep; a server that does not answer a chat is not kept."""
    if any(known_one.name == name.strip() for known_one in known()):
        raise GLMError(
            f"There is a remote engine {name.strip()!r} already.", "Choose another name, or remove it."
        )
    report = _asked(one)
    if not report.chat:
        why = (report.problems or {}).get("chat", "")
        raise GLMError(f"{one.host} does not answer a chat. {why}".strip(), "Choose another model or server.")
    kept = remote.add(Remote(name, **{k: v for k, v in vars(one).items() if k != "name"}))
    state.session_set(REPORTS, {**state.session(REPORTS, {}), kept.name: report})
    state.session_set(FORM, state.session(FORM, 0) + 1)
    state.session_set(PROBLEM, None)
    st.rerun()
