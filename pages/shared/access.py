"""The way into the pages: the login screen, who is logged in and how to log out, and what a demonstration says."""

from __future__ import annotations

import threading
import time

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from glm_core import access, belongings, jobs
from glm_core.access import DEMO_ANSWER, DEMO_JOBS, DEMO_ROWS, Person
from glm_core.errors import GLMError
from glm_core.settings import Settings
from pages.shared import guard, panels, state
from pages.shared.text import plain, t

CODE = "access.code"
NAME, PASSWORD = "login_name", "login_password"
ABSENT_S = 180.0  # Streamlit keeps a session whose browser went away for two minutes
COOKIE = """<script>fetch("%s", {method: "POST", headers: {"X-GLM-Code": "%s"}, credentials: "same-origin"});</script>"""
# A new session: nothing that was typed or chosen before is there any more.
AFRESH = "<script>location.replace(location.pathname);</script>"
_attempts = access.Attempts()
_seen: dict[str, float] = {}  # visitors of the demonstration -> when a page was drawn for them last


def gate() -> Person:
    """Who uses this session; where somebody has to log in and did not, the login screen, and the run ends."""
    guard.install(state.logins_on)
    who = state.person()
    if who is None:
        _login()
        st.stop()
    if who.role != "operator":
        _note(who)
    return who


# --- logging in ---------------------------------------------------------------------------------------------


def _login() -> None:
    st.html("<style>.st-key-login {max-width: 25rem; margin: 7vh auto 0;}</style>")
    found = state.settings()
    if state.session(state.LEFT):
        st.html(AFRESH, unsafe_allow_javascript=True)
    with st.container(key="login"):
        st.header(":primary[:material/neurology:] GLM Workbench", anchor=False)
        st.caption(t("Log in to go on.", "请登录后继续。"))
        with st.container(border=True, key="login_card"):
            providers = state.provider()
            for name in providers:
                _provider_button(name)
            if access.is_on(found):
                _password(found)
            if providers and st.user.get("is_logged_in"):
                _not_on_the_list()


def _password(found: Settings) -> None:
    with st.form("login_form", border=False):
        name = st.text_input(t("Name", "用户名"), key=NAME, autocomplete="username", max_chars=80)
        password = st.text_input(
            t("Password", "密码"),
            type="password",
            key=PASSWORD,
            autocomplete="current-password",
            max_chars=1000,
        )
        sent = st.form_submit_button(
            t("Log in", "登录"), type="primary", icon=":material/login:", width="stretch", key="login_send"
        )
    if not sent:
        return
    try:
        user = _admitted(found, name, password)
    except GLMError as error:
        panels.problem(error)
        return
    state.begin_login(user)
    for key in (NAME, PASSWORD):
        state.session_drop(key)
    _offer_cookie(found, str(state.session(state.TOKEN)))
    st.rerun()


def _admitted(found: Settings, name: str, password: str) -> access.User:
    """The user of a name and a password; GLMError for any other, and while too many wrong ones were given."""
    name = access.clean_name(name)
    if wait := _attempts.admit(name):
        raise GLMError(f"Too many wrong passwords: wait {wait:.0f} s.", "Then try again.")
    user = access.users_of(found).check(name, password)
    if user is None:
        raise GLMError("The name or the password is wrong.", "Try again, or ask an administrator.")
    _attempts.right(name)
    return user


def _provider_button(name: str) -> None:
    label = (
        t(f"Log in with {name}", f"使用 {name} 登录")
        if name
        else t("Log in with your account", "使用账户登录")
    )
    if st.button(label, icon=":material/key:", width="stretch", key=f"login_with_{name}"):
        from streamlit.auth_util import is_authlib_installed

        if is_authlib_installed():
            st.login(name or None)
        else:
            panels.problem(
                GLMError("The package Authlib is missing.", "Install it: pip install 'Authlib>=1.3.2'.")
            )


def _not_on_the_list() -> None:
    mail = plain(str(st.user.get("email") or ""))
    st.error(
        t(
            f"{mail} may not use this workbench. Ask an administrator.",
            f"{mail} 无权使用此工作台。请联系管理员。",
        ),
        icon=":material/block:",
    )
    if st.button(t("Use another account", "换一个账户"), key="login_other"):
        _leave()


# --- staying logged in ------------------------------------------------------------------------------------


def _note(who: Person) -> None:
    """Remember whose session this is, for files and downloads; forget it when the browser goes."""
    context = get_script_run_ctx()
    if context is None:
        return
    guard.enter(context.session_id, who)
    _until_it_ends(context.session_id, who)
    if who.is_visitor:
        _seen[who.name] = time.monotonic()
        _swept(state.settings())


@st.cache_resource(show_spinner=False)
def _swept(found: Settings) -> int:
    """Once per process: what visitors left behind when a server was killed."""
    return belongings.forget_visitors(found, jobs.store(found))


@st.cache_resource(scope="session", show_spinner=False, on_release=lambda ended: ended())
def _until_it_ends(session_id: str, who: Person) -> object:
    found = state.settings()

    def ended() -> None:
        guard.leave(session_id)
        if who.is_visitor:
            timer = threading.Timer(ABSENT_S, _forget_visitor, (found, who.name))
            timer.daemon = True
            timer.start()

    return ended


def _forget_visitor(found: Settings, name: str) -> None:
    if time.monotonic() - _seen.get(name, 0.0) < ABSENT_S - 1:  # the browser came back
        return
    _seen.pop(name, None)
    belongings.forget(found, jobs.store(found), name)


def _offer_cookie(found: Settings, token: str) -> None:
    state.session_set(CODE, access.logins_of(found).code(token))


def keep() -> None:
    """Let the browser fetch the cookie that keeps it logged in over a reload, once after a login."""
    found = state.settings()
    if found.demo or not state.logins_on(found):
        return
    logins, code = access.logins_of(found), state.session(CODE)
    if code is None and state.provider() and st.user.get("is_logged_in"):
        # Streamlit's own cookie says who it is after a reload; this one is what /media asks for.
        token = logins.begin((state.person() or access.NOBODY).name, "provider")
        state.session_set(state.FILES, token)
        _offer_cookie(found, token)
        code = state.session(CODE)
    if code and logins.waiting(code):
        with st.container(key="login_cookie"):
            st.html(COOKIE % (guard.login_path(), code), unsafe_allow_javascript=True)


def account(who: Person) -> None:
    """Who is logged in, and the way out."""
    if who.role in ("operator", "visitor"):
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="account"):
        icon = ":material/shield_person:" if who.role == "admin" else ":material/person:"
        st.markdown(f"{icon} {plain(who.name)}", width="content")
        st.space("stretch")
        if st.button(t("Log out", "退出"), icon=":material/logout:", type="tertiary", key="log_out"):
            _leave()
    keep()


def _leave() -> None:
    if state.end_login():
        st.stop()
    st.rerun()


# --- the demonstration ------------------------------------------------------------------------------------


def banner(who: Person) -> None:
    """What a demonstration allows, above every page of one."""
    if not who.is_visitor:
        return
    st.info(
        t(
            f"**Demonstration.** Only the samples and the small embedded model are here. Jobs take the first {DEMO_ROWS} rows, "
            f"{DEMO_JOBS} at a time; answers take {DEMO_ANSWER} tokens. What you make is yours alone, and deleted "
            "when you leave.",
            f"**演示模式。**仅提供示例数据和小型内置模型。每个任务只取前 {DEMO_ROWS} 行，同时 {DEMO_JOBS} 个任务；"
            f"回答最多 {DEMO_ANSWER} 词元。您的内容仅自己可见，离开后即删除。",
        ),
        icon=":material/visibility:",
    )


def not_allowed(right: access.Right) -> bool:
    """Whether this person may not do something; says so in a line, with who may."""
    who = state.person() or access.NOBODY
    if who.may(right):
        return False
    st.caption(f":material/lock: {why_not(who)}")
    return True


def why_not(who: Person) -> str:
    """Why something is not offered."""
    if who.is_visitor:
        return t("Not part of the demonstration.", "演示模式中不可用。")
    return t("Only administrators can do this here.", "此处仅管理员可操作。")
