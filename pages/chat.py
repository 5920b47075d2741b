"""Chat: talk to the loaded model; every conversation is kept, every answer goes on without the page."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit_chat import message

from glm_core.chat import default_settings, strip_remote_images
from glm_core.errors import GLMError
from pages.shared import avatars, page, panels, remote_words, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.chat import Conversation, ConversationStore, Turn
    from glm_core.engine import Engine, GenerationSettings

BUBBLES = 20  # streamlit-chat draws a frame of its own per turn, about 0.15 s each
EARLIER = 40  # turns more per click on "show earlier"
LISTED = 30
SAMPLES = (
    "What is the capital of France?",
    "What is accuracy in machine learning?",
    "红楼梦的作者是谁？",
    "语言模型的温度是什么？",
)
# Keeps the newest words in view while an answer grows, unless the reader has scrolled up. Streamlit's own
# following does not see a bubble grow inside its frame.
FOLLOW = """<script>(() => {
  const question = "%s";
  const end = document.querySelector(".st-key-chat_end");
  const scrolls = (node) =>
    node.scrollHeight > node.clientHeight && /auto|scroll/.test(getComputedStyle(node).overflowY);
  let view = end;
  while (view && !scrolls(view)) view = view.parentElement;
  view = view || document.querySelector('[data-testid="stMain"]');
  if (!view) return;
  if (view.glmFollow) { view.glmFollow(question); return; }
  let following = true;
  const down = () => {
    if (following && document.querySelector(".st-key-chat_end")) view.scrollTop = view.scrollHeight;
  };
  view.glmFollow = () => { following = true; down(); };
  view.addEventListener("scroll", () => {
    following = view.scrollHeight - view.scrollTop - view.clientHeight < 160;
  }, {passive: true});
  const content = document.querySelector('[data-testid="stMainBlockContainer"]') || view.firstElementChild;
  new ResizeObserver(down).observe(content);
  down();
})();</script>"""
FIELDS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


def main() -> None:
    """Draw the page."""
    corner = page.frame(
        "chat",
        ("Chat", "聊天"),
        ":material/chat:",
        (
            "Talk to the loaded model. Conversations are kept on this computer, also when you close the page.",
            "与已加载的模型对话。对话保存在本机，关闭页面也不会丢失。",
        ),
    )
    engine = panels.need_model()
    if engine is not None and engine.remote is not None:
        st.caption(f":material/cloud: {remote_words.goes_to(engine)}")
    try:
        store = state.conversations()
        found = opened(store)
        with corner:
            if engine is not None and panels.is_demo(engine.loaded.info.name):
                st.badge(
                    t("demonstration model", "演示模型"),
                    icon=":material/school:",
                    color="orange",
                    help=panels.demo_text(),
                )
        native = toolbar(store, found, engine)
        sample = None if found is not None and found.turns else empty(engine)
        if found is not None and found.turns:
            transcript(store, found, engine, native)
        refused()
        with st.bottom:
            meter(store, found, engine)
            typed = composer(found, engine)
        if asked := sample or typed:
            send(store, found, asked)
    except GLMError as error:
        panels.problem(error)
    panels.rerun_on_model_change()


# --- which conversation ---------------------------------------------------------------------------------


def opened(store: ConversationStore) -> Conversation | None:
    """The conversation of the address, else the one this session had open; None for a new one."""
    wanted = state.query("c") or state.session("chat.open") or ""
    if not wanted:
        return None
    try:
        found = store.get(wanted)
    except GLMError:  # deleted, here or in another tab
        show(None)
        return None
    show(found.id)
    return found


def show(conversation_id: str | None) -> None:
    """Make a conversation the open one, in the address too: a refresh finds it again."""
    if state.session("chat.open") != conversation_id:
        state.session_set("chat.earlier", 0)
    state.session_set("chat.open", conversation_id)
    state.query_set("c", conversation_id)


def send(store: ConversationStore, found: Conversation | None, text: str) -> None:
    """Ask; a refused question is shown with its reason, so that nobody types it twice."""
    fresh = found is None
    if found is None:
        found = store.create(system=state.remember("chat.system", ""), settings=remembered_settings())
    try:
        store.ask(found.id, text)
        show(found.id)
    except GLMError as error:
        state.session_set("chat.refused", (error, text))
        if fresh:
            store.delete(found.id)
    st.rerun()


def refused() -> None:
    """Why the last question was not accepted, and its words."""
    if kept := state.session("chat.refused"):
        state.session_set("chat.refused", None)
        panels.problem(kept[0])
        if kept[1]:
            st.caption(t("Your question, not sent:", "您的问题（未发送）："))
            st.code(kept[1], language=None, wrap_lines=True)


def attempt(action: Callable[..., Any], conversation_id: str, key: str | None = None) -> None:
    """Do something that may be refused; `key` is the widget that holds the text it needs."""
    text = str(state.session(key) or "") if key else ""
    try:
        action(conversation_id, text) if key else action(conversation_id)
    except GLMError as error:
        state.session_set("chat.refused", (error, text))


def confirm(label: str, key: str, action: Callable[..., Any], *args: str) -> None:
    """The button that does what a dialog asks about, and closes it."""
    if st.button(label, type="primary", key=key, on_click=attempt, args=(action, *args)):
        st.rerun()


# --- the tools above the conversation -------------------------------------------------------------------


def toolbar(store: ConversationStore, found: Conversation | None, engine: Engine | None) -> bool:
    """New, list, settings, export and the choice of view; returns whether the native view is wanted."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="chat_tools"):
        if st.button(
            t("New", "新对话"), icon=":material/add_comment:", key="chat_new", disabled=found is None
        ):
            show(None)
            st.rerun()
        with st.popover(t("Conversations", "对话列表"), icon=":material/forum:", key="chat_list"):
            listing(store, found)
        with st.popover(t("Settings", "设置"), icon=":material/tune:", key="chat_settings"):
            controls(found, engine)
        with st.popover(
            t("Export", "导出"),
            icon=":material/download:",
            key="chat_export",
            disabled=found is None or not found.turns,
        ):
            if found is not None and found.turns:
                downloads(store, found)
        st.space("stretch")
        names = {"bubbles": t("Bubbles", "气泡"), "native": t("Plain", "简洁")}
        view = st.segmented_control(
            t("View", "视图"),
            list(names),
            format_func=names.__getitem__,
            required=True,
            label_visibility="collapsed",
            help=t("Plain shows tables, code and links best.", "简洁视图更适合表格、代码和链接。"),
            **state.kept_widget("chat.view", "bubbles", list(names), "default"),
        )
    return view == "native"


def listing(store: ConversationStore, found: Conversation | None) -> None:
    """All conversations with search, open, rename and delete."""
    wanted = st.text_input(
        t("Search", "搜索"),
        placeholder=t("Search titles and texts", "搜索标题和内容"),
        icon=":material/search:",
        label_visibility="collapsed",
        key="chat_search",
    )
    listed = store.search(wanted or "", LISTED + 1)
    if not listed:
        st.caption(t("Nothing found.", "没有找到。") if wanted else t("None yet.", "还没有对话。"))
    for one in listed[:LISTED]:
        current = found is not None and one.id == found.id
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key=f"row_{one.id}"):
            if st.button(
                plain(one.title or t("Untitled", "未命名")),
                key=f"open_{one.id}",
                type="primary" if current else "tertiary",
                help=" · ".join(
                    part for part in (plain(one.snippet), panels.format_ago(one.updated, time.time())) if part
                ),
            ):
                show(one.id)
                st.rerun()
            st.space("stretch")
            if st.button(
                "",
                icon=":material/edit:",
                key=f"rename_{one.id}",
                type="tertiary",
                help=t("Rename", "重命名"),
            ):
                st.dialog(t("Rename the conversation", "重命名对话"))(rename)(store, one)
            if st.button(
                "",
                icon=":material/delete:",
                key=f"delete_{one.id}",
                type="tertiary",
                help=t("Delete", "删除"),
            ):
                st.dialog(t("Delete the conversation?", "删除对话？"))(delete)(store, one)
    if len(listed) > LISTED:
        st.caption(
            t(
                f"The newest {LISTED} are shown; search for the others.",
                f"仅显示最新 {LISTED} 条，其余请搜索。",
            )
        )


def rename(store: ConversationStore, one: Conversation) -> None:
    """The body of the rename dialog."""
    key = f"chat_title_{one.id}"
    st.text_input(t("Title", "标题"), one.title, max_chars=200, key=key)
    confirm(t("Save", "保存"), "chat_rename_save", store.rename, one.id, key)


def delete(store: ConversationStore, one: Conversation) -> None:
    """The body of the delete dialog."""
    st.markdown(plain(one.title))
    st.caption(t("Its turns cannot be brought back.", "删除后无法恢复。"))
    confirm(t("Delete", "删除"), "chat_delete_yes", store.delete, one.id)


def downloads(store: ConversationStore, found: Conversation) -> None:
    """The open conversation as a file."""
    for kind, label, mime in (
        ("md", t("Markdown, to read", "Markdown（阅读）"), "text/markdown"),
        ("json", t("JSON, to process", "JSON（处理）"), "application/json"),
    ):
        st.download_button(
            label,
            data=lambda kind=kind: store.export(found.id, kind).encode(),
            file_name=f"chat-{found.id}.{kind}",
            mime=mime,
            icon=":material/download:",
            on_click="ignore",
            key=f"export_{kind}",
            width="stretch",
        )


# --- settings -------------------------------------------------------------------------------------------


def remembered_settings() -> GenerationSettings | None:
    """What a new conversation starts with; None follows the model."""
    from glm_core.engine import GenerationSettings

    kept = state.remember("chat.settings", None)
    return GenerationSettings.from_json(kept) if kept else None


def controls(found: Conversation | None, engine: Engine | None) -> None:
    """System prompt and sampling; saved with the conversation and for the next new one."""
    if engine is None:
        st.caption(t("Load a model first.", "请先加载模型。"))
        return
    own = default_settings(engine)
    now = (found.settings if found else remembered_settings()) or own
    system = found.system if found else state.remember("chat.system", "")
    name = f"chat.set.{found.id if found else 'new'}.{state.session('chat.revision', 0)}"
    saving: dict[str, Any] = {"on_change": save_settings, "args": (found.id if found else None, name, own)}
    no_system = engine.tokenizer.generation == "chatglm2" and not system
    st.text_area(
        t("System prompt", "系统提示词"),
        system,
        key=f"{name}.system",
        on_change=save_system,
        args=(found.id if found else None, f"{name}.system"),
        placeholder=t("How the model should answer", "希望模型如何回答"),
        height=90,
        disabled=no_system,
        help=t("ChatGLM2 was trained without one.", "ChatGLM2 训练时没有系统提示词。") if no_system else None,
    )
    greedy = now.temperature == 0
    unused = t("Not used at temperature 0.", "温度为 0 时不使用。") if greedy else None
    st.slider(
        t("Temperature", "温度"),
        0.0,
        max(2.0, now.temperature),
        float(now.temperature),
        0.05,
        key=f"{name}.temperature",
        help=t(
            "0 takes the likeliest token every time (greedy); higher varies more.",
            "0 为贪心解码；越高越多样。",
        ),
        **saving,
    )
    with st.grid(2, min_column_width=130):
        st.slider(
            "top_p", 0.05, 1.0, max(0.05, float(now.top_p)), 0.05,
            key=f"{name}.top_p", disabled=greedy, help=unused, **saving,
        )  # fmt: skip
        st.number_input(
            "top_k", 0, None, now.top_k, 1, key=f"{name}.top_k", disabled=greedy,
            help=unused or t("0 is all tokens.", "0 表示不限。"), **saving,
        )  # fmt: skip
        st.slider(
            t("Repetition penalty", "重复惩罚"), min(1.0, now.repetition_penalty),
            max(2.0, now.repetition_penalty), float(now.repetition_penalty), 0.05,
            key=f"{name}.repetition_penalty", help=t("1 is none.", "1 表示不惩罚。"), **saving,
        )  # fmt: skip
        st.number_input(
            t("Longest answer (tokens)", "最长回答（词元）"), 1, max(engine.context, now.max_new_tokens),
            now.max_new_tokens, 16, key=f"{name}.max_new_tokens", **saving,
        )  # fmt: skip
        st.number_input(
            t("Seed", "随机种子"), 0, None, now.seed, 1, key=f"{name}.seed", disabled=greedy,
            placeholder=t("random", "随机"),
            help=unused or t("Same seed, same answer.", "种子相同，回答相同。"), **saving,
        )  # fmt: skip
        st.text_input(
            t("Stop text", "停止文本"), now.stop[0] if now.stop else "", key=f"{name}.stop",
            help=t("The answer ends before this text.", "回答在此文本之前结束。"), **saving,
        )  # fmt: skip
    st.caption(f"{t('Own defaults of', '模型默认值')} **{plain(engine.loaded.info.name)}**: {in_words(own)}")
    st.button(
        t("Back to the model's defaults", "恢复模型默认值"),
        icon=":material/restart_alt:",
        key="chat_reset",
        disabled=now == own,
        on_click=reset_settings,
        args=(found.id if found else None,),
    )


def in_words(settings: GenerationSettings) -> str:
    """Sampling settings in a line."""
    if settings.temperature == 0:
        how = t("temperature 0 (greedy)", "温度 0（贪心）")
    else:
        how = f"{t('temperature', '温度')} {settings.temperature:g}"
        how += f" · top_p {settings.top_p:g} · top_k {settings.top_k}"
    return f"{how} · {t(f'at most {settings.max_new_tokens} tokens', f'最多 {settings.max_new_tokens} 词元')}"


def save_system(conversation_id: str | None, key: str) -> None:
    """Keep the system prompt as typed."""
    system = state.session(key, "")
    state.remember_set("chat.system", system)
    if conversation_id:
        state.conversations().set_system(conversation_id, system)


def save_settings(conversation_id: str | None, name: str, own: GenerationSettings) -> None:
    """Keep the sampling settings; those of the model are kept as "the model's", whichever it is later."""
    values = {field: state.session(f"{name}.{field}") for field in FIELDS}
    values["stop"] = (values["stop"],) if values["stop"] else ()
    chosen = type(own)(**values)
    keep_settings(conversation_id, None if chosen == own else chosen)


def reset_settings(conversation_id: str | None) -> None:
    """Back to the model's own defaults."""
    state.session_set("chat.revision", state.session("chat.revision", 0) + 1)
    keep_settings(conversation_id, None)


def keep_settings(conversation_id: str | None, chosen: GenerationSettings | None) -> None:
    """Store settings with the conversation and for the next new one."""
    state.remember_set("chat.settings", chosen.to_json() if chosen else None)
    if conversation_id:
        try:
            state.conversations().set_settings(conversation_id, chosen)
        except GLMError as error:
            state.session_set("chat.refused", (error, ""))


# --- the conversation -----------------------------------------------------------------------------------


def empty(engine: Engine | None) -> str | None:
    """What a new conversation shows; returns the sample question that was clicked."""
    clicked = None
    with st.container(border=True, horizontal_alignment="center", key="chat_empty"):
        st.subheader(t("What would you like to ask?", "想问点什么？"), anchor=False, text_alignment="center")
        st.caption(
            t("Type below, or try one of these.", "在下方输入，或试试这些问题。"), text_alignment="center"
        )
        with st.grid(2, min_column_width=220):
            for i, question in enumerate(SAMPLES):
                if st.button(question, key=f"sample_{i}", width="stretch", disabled=engine is None):
                    clicked = question
    if engine is not None and panels.is_demo(engine.loaded.info.name):
        panels.demo_note()
    return clicked


def transcript(store: ConversationStore, found: Conversation, engine: Engine | None, native: bool) -> None:
    """The settled turns, the answer on its way, and what can be done about the last one."""
    running = found.running
    settled = found.turns[:-1] if running else found.turns
    start = max(len(settled) - BUBBLES, 0)
    first = max(start - int(state.session("chat.earlier", 0)), 0)
    if first:
        if st.button(
            t(f"Show earlier ({first} turns)", f"显示更早的内容（{first} 条）"),
            icon=":material/expand_less:",
            key="chat_earlier",
            type="tertiary",
        ):
            state.session_set("chat.earlier", start - first + EARLIER)
            st.rerun()
    for turn in settled[first:start]:
        draw(turn, True)
    for turn in settled[start:]:
        draw(turn, native, details=turn is settled[-1])
    if running:
        in_flight(running, native)
    else:
        actions(store, found, engine)
    with st.container(key="chat_end"):
        # one script per answer: the same one is not run again
        st.html(FOLLOW % found.turns[-1].handle_id, unsafe_allow_javascript=True)


def draw(turn: Turn, native: bool, details: bool = False) -> None:
    """One settled turn."""
    text = as_typed(turn.text) if turn.is_user else as_answer(turn.text)
    bubble(turn, text or t("*(no text)*", "*（无内容）*"), native)
    if not turn.is_user and (details or turn.state != "done" or turn.finish_reason == "length"):
        how_it_went(turn, details)


def bubble(turn: Turn, text: str, native: bool) -> None:
    """Words in the view that was chosen; neither view asks the internet for anything."""
    if native:
        face = ":material/person:" if turn.is_user else ":material/neurology:"
        with st.chat_message(turn.role, avatar=face):
            st.markdown(with_breaks(text))
    else:
        message(
            text,
            is_user=turn.is_user,
            logo=avatars.USER if turn.is_user else avatars.BOT,
            allow_html=False,
            key=f"{turn.conversation_id}-{turn.n}",
        )


def how_it_went(turn: Turn, details: bool) -> None:
    """State, tokens and speed under an answer."""
    states = {
        "stopped": (t("stopped", "已停止"), "gray", ":material/stop_circle:"),
        "interrupted": (t("interrupted", "已中断"), "orange", ":material/power_off:"),
        "failed": (t("failed", "失败"), "red", ":material/error:"),
    }
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        if turn.state in states:
            label, color, icon = states[turn.state]
            st.badge(label, color=color, icon=icon)  # type: ignore[arg-type]
        elif turn.finish_reason == "length":
            st.badge(
                t(f"cut after {turn.tokens} tokens", f"在 {turn.tokens} 词元处截断"),
                color="orange",
                icon=":material/content_cut:",
                help=t("Raise the longest answer in the settings.", "可在设置中调大“最长回答”。"),
            )
        if turn.error:
            st.caption(plain(said(turn.error)))
        if details and turn.tokens:
            st.caption(
                " · ".join([*speed(turn.tokens, turn.tokens_per_second, turn.ttft), plain(turn.model)])
            )
        for note in turn.notes:
            st.caption(plain(said(note)))


def speed(tokens: int, per_second: float, first: float | None) -> list[str]:
    """Tokens, tokens per second and time to the first token, in words."""
    parts = [t(f"{tokens:,} tokens", f"{tokens:,} 词元")]
    parts += [t(f"{per_second:.1f} tokens/s", f"{per_second:.1f} 词元/秒")] if per_second else []
    parts += [t(f"first after {first:.2f} s", f"首词元 {first:.2f} 秒")] if first is not None else []
    return parts


@live(run_every=0.3)
def in_flight(turn: Turn, native: bool) -> None:
    """The answer being written: looked at again three times a second, also after a refresh of the page."""
    store = state.conversations()
    handle = store.live(turn)
    if handle is None or handle.done:
        now = store.get(turn.conversation_id).running
        if now is None:
            st.rerun()
        turn = now or turn  # another program is writing it
    text = as_answer(handle.text if handle else turn.text)
    bubble(turn, text or "…", native)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if st.button(t("Stop", "停止"), icon=":material/stop_circle:", key="chat_stop", type="primary"):
            attempt(store.stop, turn.conversation_id)
            st.rerun()
        if handle is not None and handle.state == "queued":
            place = handle.place
            st.caption(t(f"Waiting, place {place} in line", f"排队中，第 {place} 位"))
        elif handle is not None and handle.n_tokens:
            parts = speed(handle.n_tokens, handle.tokens_per_second, handle.time_to_first_token)
            st.caption(" · ".join(parts))
        else:
            st.caption(t("Reading the conversation …", "正在读取对话…"))


def actions(store: ConversationStore, found: Conversation, engine: Engine | None) -> None:
    """Regenerate, edit the last question, clear."""
    with st.container(horizontal=True, gap="small", key="chat_actions"):
        if st.button(
            t("Regenerate", "重新生成"),
            icon=":material/refresh:",
            key="chat_regenerate",
            type="tertiary",
            disabled=engine is None,
            help=t(
                "At temperature 0, or with a seed, the answer will be the same.",
                "温度为 0 或设定了种子时，回答不会变化。",
            ),
        ):
            attempt(store.regenerate, found.id)
            st.rerun()
        if st.button(
            t("Edit question", "修改问题"),
            icon=":material/edit:",
            key="chat_edit",
            type="tertiary",
            disabled=engine is None,
        ):
            st.dialog(t("Edit the last question", "修改上一个问题"), width="medium")(edit)(store, found)
        if st.button(t("Clear", "清空"), icon=":material/ink_eraser:", key="chat_clear", type="tertiary"):
            st.dialog(t("Clear the conversation?", "清空对话？"))(clear)(store, found)


def edit(store: ConversationStore, found: Conversation) -> None:
    """The body of the edit dialog."""
    last = next((turn.text for turn in reversed(found.turns) if turn.is_user), "")
    key = f"chat_edit_text_{found.turns[-1].handle_id}"
    st.text_area(t("Question", "问题"), last, key=key, height=160)
    st.caption(t("Its answer is replaced.", "原回答将被替换。"))
    confirm(t("Send", "发送"), "chat_edit_send", store.edit_last, found.id, key)


def clear(store: ConversationStore, found: Conversation) -> None:
    """The body of the clear dialog."""
    st.caption(
        t(
            "All turns are removed; title, system prompt and settings stay.",
            "所有内容将被删除；标题、系统提示词和设置保留。",
        )
    )
    confirm(t("Clear", "清空"), "chat_clear_yes", store.clear, found.id)


# --- the foot of the page -------------------------------------------------------------------------------


def meter(store: ConversationStore, found: Conversation | None, engine: Engine | None) -> None:
    """How full the context is, what no longer fits, and how answers are chosen."""
    if engine is None:
        return
    own = default_settings(engine)
    now = (found.settings if found else remembered_settings()) or own
    parts = []
    if engine.remote is not None:
        parts.append(server_count(found, engine))
    elif found is not None and found.turns:
        try:
            used, dropped = context_use(store, found, engine)
        except GLMError as error:
            st.caption(f":orange[{plain(said(str(error)))}]")
            return
        text = t(
            f"context {used:,} / {engine.context:,} tokens", f"上下文 {used:,} / {engine.context:,} 词元"
        )
        full = dropped > 0 or used + now.max_new_tokens > 0.85 * engine.context
        parts.append(f":orange[{text}]" if full else text)
        if dropped:
            text = t(f"{dropped} oldest turns left out", f"已略去最早的 {dropped} 条")
            parts.append(f":orange[{text}]")
    parts.append(in_words(now) + (t(" (the model's defaults)", "（模型默认值）") if now == own else ""))
    st.caption(f":material/data_usage: {' · '.join(parts)}")


def server_count(found: Conversation | None, engine: Engine) -> str:
    """Where the conversation goes, and the tokens of its last answer, which only the server can count."""
    assert engine.remote is not None
    host = plain(engine.remote.host)
    last = found.turns[-1] if found is not None and found.turns else None
    if last is None or last.is_user or not last.prompt_tokens:
        return t(f"sent to {host}, which alone knows its tokens", f"发往 {host}，词元数只有该服务器知道")
    return t(
        f"{host} counted {last.prompt_tokens:,} + {last.tokens:,} tokens at the last answer",
        f"{host} 统计上一回答为 {last.prompt_tokens:,} + {last.tokens:,} 词元",
    )


def context_use(store: ConversationStore, found: Conversation, engine: Engine) -> tuple[int, int]:
    """(tokens in use, turns left out): of the answer being written, else of the next question."""
    if found.running:
        return found.running.prompt_tokens, found.running.dropped_turns
    plan = store.usage(found.id, engine)
    return plan.used, plan.dropped_turns


def composer(found: Conversation | None, engine: Engine | None) -> str | None:
    """The box to type into; a question in the address (?q=) is put into it, not sent."""
    if suggested := state.query("q"):
        state.query_set("q", None)
        state.session_set("composer", suggested[:2000])
    busy = found is not None and found.running is not None
    if engine is None:
        hint = t("Load a model to begin", "请先加载模型")
    elif busy:
        hint = t("The answer is being written …", "正在回答…")
    else:
        hint = t("Write a message", "输入消息")
    typed = st.chat_input(hint, key="composer", disabled=engine is None or busy)
    return str(typed) if typed else None


# --- texts as Markdown ------------------------------------------------------------------------------------

_MATH = re.compile(r"\\.|`+[^`]*`+|\$\$.*?\$\$|\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)|\$", re.DOTALL)


def as_typed(text: str) -> str:
    """A user's words as typed: no Markdown, indents kept."""
    lines = []
    for line in text.split("\n"):
        body = line.lstrip(" \t")
        indent = line[: len(line) - len(body)].replace("\t", "    ")
        lines.append("\u00a0" * len(indent) + plain(body).replace("=", "\\="))
    return "\n".join(lines)


def as_answer(text: str) -> str:
    """A model's Markdown to show: nothing is fetched, and $5 is money rather than a formula."""
    return _MATH.sub(lambda match: "\\$" if match[0] == "$" else match[0], strip_remote_images(text))


def with_breaks(text: str) -> str:
    """Markdown whose line breaks hold in the plain view; the bubbles keep them by themselves."""
    lines, fenced = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        lines.append(line if fenced or not line.strip() else f"{line}  ")
    return "\n".join(lines).rstrip()


main()
