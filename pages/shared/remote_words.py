"""What pages say of a model on a server: where probabilities come from, and what only the server knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import remote
from pages.shared import state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.engine import Engine


def way(name: str) -> str:
    """Where the probabilities of labels come from, in a sentence."""
    words = {
        "classify": t(
            "Labels: exact probabilities, from the server's /v1/classify.",
            "标签：由服务器的 /v1/classify 给出精确概率。",
        ),
        "echo": t(
            "Labels: exact probabilities, from the server's log-probabilities of each label.",
            "标签：根据服务器给出的各标签对数概率得到精确概率。",
        ),
        "first": t(
            "Labels: probabilities of their first tokens, as far as the server shows them; the rest counts as outside.",
            "标签：取其首个词元的概率（以服务器所示为限），其余计入“标签之外”。",
        ),
        "greedy": t(
            "Labels: this server gives no probabilities. A label is what the model writes, and nothing says how sure it is.",
            "标签：此服务器不提供概率。标签即模型写出的内容，无从得知其把握程度。",
        ),
    }
    return words.get(name, words["greedy"])


def no_probabilities(task: dict[str, Any]) -> bool:
    """Whether a job's labels come without probabilities."""
    return bool(task.get("remote")) and task["remote"].get("labels") == "greedy"


def label_way(engine: Engine, labels: list[str]) -> str:
    """Where probabilities of these labels will come from, "" for a model here. GLMError where the server is gone."""
    if engine.remote is None:
        return ""
    from glm_core.remote.labels import way_for

    kept = state.session("remotes.way", {})
    key = (engine.remote, id(engine), *labels)
    if key not in kept:
        with st.spinner(t(f"Asking {engine.remote.host} …", f"正在询问 {engine.remote.host}……")):
            kept = {key: way_for(engine, True, labels)}  # type: ignore[arg-type]
        state.session_set("remotes.way", kept)
    return str(kept[key])


def record(engine: Engine, labels: list[str]) -> dict[str, Any]:
    """What a job on labels keeps of the server; nothing for a model here."""
    if engine.remote is None:
        return {}
    kept: dict[str, Any] = engine.record()  # type: ignore[attr-defined]
    return kept | {"labels": label_way(engine, labels)}


def answered_by(engine: Engine) -> str:
    """Who answers and where texts go, in a sentence."""
    assert engine.remote is not None
    name, host = plain(engine.remote.label), plain(engine.remote.host)
    return t(
        f"Answers come from **{name}**: the rows are sent to {host}. The job goes on when you close the browser.",
        f"由 **{name}** 回答：各行会发往 {host}。关闭浏览器后任务仍会继续。",
    )


def goes_to(engine: Engine) -> str:
    """That what is asked leaves this computer, and where it goes."""
    assert engine.remote is not None
    name, host = plain(engine.remote.model), plain(engine.remote.host)
    return t(
        f"{name} answers on {host}: system prompt, questions and earlier answers are sent there.",
        f"由 {host} 上的 {name} 回答：系统提示词、问题和之前的回答都会发往该服务器。",
    )


def where(engine: Engine) -> str:
    """A model's precision and place, for a line under its name."""
    if engine.remote is not None:
        return t(f"on {plain(engine.remote.host)}", f"位于 {plain(engine.remote.host)}")
    from pages.shared import panels

    status = engine.status()
    return f"{status.precision.upper()} · {panels.device_name(status.device)}"


def checkpoint_name(checkpoint: str) -> str:
    """A task's checkpoint as it is called on screen."""
    return remote.shown(checkpoint)
