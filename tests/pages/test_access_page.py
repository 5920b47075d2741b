"""The login in front of the pages, what each person sees behind it, and the demonstration."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import streamlit as st
from streamlit.runtime.media_file_manager import MediaFileManager
from streamlit.web.server.starlette.starlette_path_security_middleware import PathSecurityMiddleware

from glm_core import access, belongings
from glm_core.access import Person, users
from glm_core.chat import ConversationStore
from glm_core.errors import GLMError
from glm_core.jobs import JobStore
from glm_core.settings import Settings
from pages.shared import access as login
from pages.shared import guard, state
from tests.pages.conftest import FILES, texts

PASSWORD = "correct horse 正确"
ANNA, BOB = Person("anna", "user"), Person("bob", "user")
PARTS = (
    "button", "text_area", "selectbox", "multiselect", "radio", "toggle", "slider", "number_input", "chat_input",
    "dataframe", "metric", "file_uploader", "page_link", "download_button", "info", "warning", "success", "tabs",
    "subheader", "code", "chat_message", "json", "title", "error",
)  # fmt: skip


@pytest.fixture
def team(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A workspace with an administrator and two users."""
    monkeypatch.setattr(users, "COST", {"n": 16, "r": 8, "p": 1})
    monkeypatch.setattr(login, "_attempts", access.Attempts())
    found = Settings.read()
    found.make_folders()
    for name in ("root", "anna", "bob"):
        access.users_of(found).add(name, PASSWORD, admin=name == "root")
    return found


def log_in(app, name, password=PASSWORD):
    app.text_input(key="login_name").set_value(name)
    app.text_input(key="login_password").set_value(password)
    return app.button(key="login_send").click().run()


def job_of(found, person, title="secret.csv"):
    store = JobStore(found.database)
    made = store.seen_by(person).create(
        "batch", title, {"template": "{a}", "columns": ["a"], "output_column": "b"}
    )
    store.add_rows(made.id, [["cell"]])
    return store.mark_ready(made.id).id


def files(found):
    """Every file of the workspace, but for what SQLite puts beside a database while it is open."""
    return sorted(file for file in found.workspace.rglob("*") if not file.name.endswith(("-shm", "-wal")))


def keys(app):
    return {str(one.key) for kind in ("button", "text_input", "toggle") for one in getattr(app, kind)}


# ---- closed


@pytest.mark.parametrize("name", FILES)
def test_a_page_shows_the_login_and_nothing_else_and_does_nothing(team, open_page, monkeypatch, name):
    job = job_of(team, ANNA)
    monkeypatch.setattr(state, "startup", lambda: pytest.fail("the model is loaded for a stranger"))
    before = files(team)
    app = open_page(
        name, job=job, run=job, c=job, sample="comments", q="hello", lang="zh", table="a" * 32 + ".csv"
    )
    assert not app.exception
    assert [one.key for one in app.text_input] == ["login_name", "login_password"]
    assert [one.key for one in app.button] == ["login_send"]
    for kind in set(PARTS) - {"button"}:
        assert not app.get(kind), kind
    assert [one.value for one in app.header] == [":primary[:material/neurology:] GLM Workbench"]
    assert not app.sidebar.children and "secret" not in texts(app)
    assert files(team) == before
    assert not [
        one for one in app.session_state._state.filtered_state if not one.startswith(("login", "kept."))
    ]


def test_the_pages_stay_closed_while_the_file_of_users_is_damaged(team, open_page):
    (team.workspace / "users.json").write_text("{")
    app = open_page("home")
    app = log_in(app, "anna")
    assert "cannot be read" in app.error[0].value and not app.metric


def test_a_wrong_password_is_refused_then_delayed_and_never_shown(team, open_page):
    app = open_page("jobs")
    for _ in range(4):
        app = log_in(app, "anna", "wrong horse")
    assert "Too many wrong passwords" in app.error[0].value
    app = log_in(app, "anna")
    assert "Too many" in app.error[0].value and not app.sidebar.children
    assert "wrong horse" not in texts(app)
    app = log_in(app, "bob")
    assert not app.error and "No jobs yet" in texts(app)


def test_a_login_opens_the_page_that_was_asked_for_and_drops_the_password(team, open_page):
    app = log_in(open_page("jobs"), " anna ")
    assert not app.exception and "No jobs yet" in texts(app)
    assert "anna" in texts(app)
    held = str(app.session_state._state.filtered_state)
    assert PASSWORD not in held and "login_password" not in held
    app = app.button(key="log_out").click().run()
    assert keys(app) == {"login_name", "login_password", "login_send"}
    assert "access.token" not in app.session_state


def test_a_session_ends_when_its_user_is_removed_or_gets_another_password(team, open_page, monkeypatch):
    monkeypatch.setattr(access.logins, "LOOK_S", 0.0)
    first, second = log_in(open_page("jobs"), "anna"), log_in(open_page("jobs"), "bob")
    access.users_of(team).set_password("anna", "another horse")
    access.users_of(team).remove("bob")
    for app in (first, second):
        assert "login_send" in keys(app.run())


# ---- each person's own


def test_two_people_see_neither_each_others_jobs_nor_chats(team, open_page):
    annas, bobs = job_of(team, ANNA, "anna.csv"), job_of(team, BOB, "bob.csv")
    talks = ConversationStore(team.database)
    talk = talks.seen_by(BOB).create("of bob")
    app = log_in(open_page("jobs"), "anna")
    assert "anna.csv" in texts(app).replace("\\", "") and "bob.csv" not in texts(app).replace("\\", "")
    assert "jobs_everybody" not in keys(app) and "people" not in texts(app)
    unknown = None
    for job in ("20260101-000000-abcdef", bobs):
        app.switch_page("pages/batch.py")
        app.query_params["job"] = job
        said = app.run().error[0].value.replace(job.replace("-", "\\-"), "ID")
        assert unknown in (None, said)
        unknown = said
    app.query_params["job"] = annas
    assert not app.run().error
    app.switch_page("pages/chat.py")
    app.query_params.clear()
    app.query_params["c"] = talk.id
    app.run()
    assert "of bob" not in texts(app) and "c" not in app.query_params
    assert not [one for one in app.button if one.key == f"open_{talk.id}"]


@pytest.mark.parametrize(
    ("page", "name"), [("evaluate", "run"), ("compare", "trial"), ("finetune", "job"), ("classify", "job")]
)
def test_an_address_of_somebody_else_says_what_an_unknown_one_says(team, open_page, page, name):
    kind = {"run": "evaluate", "trial": "batch"}.get(name, page)
    allowed = Person("bob", "user", frozenset({"finetune", "load"}))
    made = JobStore(team.database).seen_by(allowed).create(kind, "secret", {}).id
    app = log_in(open_page("home"), "anna")
    said = []
    for one in ("20260101-000000-abcdef", made):
        app.switch_page(FILES[page])
        app.query_params[name] = one
        app.run()
        assert not app.exception
        said.append([error.value.replace(one.replace("-", "\\-"), "ID") for error in app.error])
    assert said[0] == said[1] and said[0] and "secret" not in texts(app)


def test_an_upload_is_its_persons_alone(team, open_page):
    folder = belongings.uploads_of(team, BOB.folder)
    folder.mkdir()
    stored = "a" * 32 + ".csv"
    (folder / stored).write_text("comment\nhello\n")
    for name, opens in (("anna", False), ("bob", True)):
        app = log_in(open_page("home"), name)
        app.switch_page(FILES["batch"])
        app.query_params.update(table=stored, file="comments.csv")
        app.run()
        assert bool(app.error) != opens


def test_preferences_are_each_persons_own(team, open_page):
    first = log_in(open_page("chat"), "anna")
    first.segmented_control(key="language_choice").set_value("zh").run()
    assert "对话" in texts(first) and "对话" not in texts(log_in(open_page("chat"), "bob"))
    assert "对话" in texts(log_in(open_page("chat"), "anna"))


# ---- rights


def test_a_user_changes_no_model_and_opens_no_paths(team, open_page, model_folder):
    app = log_in(open_page("models"), "anna")
    assert not keys(app) & {"load", "unload", "self_test", "folder_path", "folder_add"}
    assert not [one for one in keys(app) if one.startswith("save_as")]
    app.switch_page(FILES["batch"]).run()
    assert "path_form_text" not in keys(app) and "sample_comments" in keys(app)
    app.query_params["path"] = str(Path.home())
    assert "administrator" in app.run().error[0].value
    app = log_in(open_page("models"), "root")
    assert {"load", "folder_path", "folder_add"} <= keys(app)


def test_the_workspace_is_not_opened_by_its_path_even_for_an_administrator(team, open_page):
    app = log_in(open_page("home"), "root")
    app.switch_page(FILES["batch"])
    app.query_params["path"] = str(team.workspace / "users.json")
    assert "part of the workspace" in app.run().error[0].value


def test_a_user_is_told_who_can_measure_train_and_compare(team, open_page, loaded_model):
    app = log_in(open_page("home"), "anna")
    app.switch_page(FILES["compare"])
    app.query_params["mode"] = "prompts"
    assert app.run().button(key="compare_ask").disabled and "Only administrators" in texts(app)
    app.switch_page(FILES["finetune"])
    app.query_params.clear()
    app.query_params["sample"] = "adverts"
    app.run(timeout=120)
    assert not app.exception
    started = [one for one in app.button if str(one.key).startswith("start_")]
    assert all(one.disabled for one in started)


def test_a_setting_gives_users_the_right_to_load(team, open_page, model_folder, monkeypatch):
    monkeypatch.setenv("GLM_USERS_MAY", "load")
    assert "load" in keys(log_in(open_page("models"), "anna"))


# ---- administrators


def test_an_administrator_sees_the_whole_queue_and_everybodys_share(team, open_page):
    annas = job_of(team, ANNA, "first.csv")
    job_of(team, BOB, "second.csv")
    job_of(team, access.OPERATOR, "before.csv")
    app = log_in(open_page("jobs"), "root")
    assert "before" in texts(app) and "first" not in texts(app)
    app.toggle(key="widget.jobs.everybody").set_value(True).run()
    shown = texts(app)
    assert all(word in shown for word in ("first", "second", "before", "without owner", "anna", "bob"))
    people = app.dataframe[0].value
    assert set(people["Name"]) >= {"anna", "bob", "root", "(without a login)"}
    last = JobStore(team.database).in_turn()[-1].id
    app.button(key=f"next_{last}").click().run()
    assert JobStore(team.database).in_turn()[0].id == last
    app.switch_page(FILES["batch"])
    app.query_params["job"] = annas
    assert not app.run().error


def test_a_waiting_job_says_how_many_come_before_it_and_not_whose(team, open_page):
    for _ in range(2):
        job_of(team, BOB, "hidden.csv")
    store = JobStore(team.database)
    mine = job_of(team, ANNA, "mine.csv")
    for one in store.list():
        if one.user == "bob":
            store.move(one.id, 0)
    app = log_in(open_page("jobs"), "anna")
    assert "2 jobs before it" in texts(app) and "hidden" not in texts(app) and "bob" not in texts(app)
    assert store.ahead(mine) == 2


# ---- below the pages


class Asked:
    """An ASGI request to the guard, with Streamlit behind it answering 200."""

    def __init__(self, path: str, method: str = "GET", **headers: str) -> None:
        self.status, self.headers = 200, {}
        scope = {
            "type": "http", "path": path, "method": method, "scheme": "http",
            "headers": [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()],
        }  # fmt: skip

        async def send(message):
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {key.decode(): value.decode() for key, value in message["headers"]}

        async def behind(scope, receive, send):
            return None

        asyncio.run(PathSecurityMiddleware(behind)(scope, None, send))


@pytest.fixture
def guarded(team):
    guard.install(state.logins_on)
    yield team
    guard._people.clear()
    guard._files.clear()


def cookie_of(team, name):
    made = access.users_of(team).all()[name]
    token = access.logins_of(team).begin(name, mark=made.salt)
    code = access.logins_of(team).code(token)
    asked = Asked(guard.login_path(), "POST", x_glm_code=code)
    assert asked.status == 204 and token in asked.headers["set-cookie"]
    assert "HttpOnly; SameSite=Strict" in asked.headers["set-cookie"]
    assert Asked(guard.login_path(), "POST", x_glm_code=code).status == 403  # it works once
    return asked.headers["set-cookie"].partition(";")[0]


def test_the_cookie_is_given_for_the_word_of_the_page_and_for_nothing_else(guarded):
    assert cookie_of(guarded, "anna").startswith("glm_login_")
    assert Asked(guard.login_path(), "POST").status == 403
    assert Asked(guard.login_path(), "GET", x_glm_code="x").status == 405


def test_a_download_is_given_to_the_person_whose_page_made_it_alone(guarded, monkeypatch):
    anna, bob = cookie_of(guarded, "anna"), cookie_of(guarded, "bob")
    guard.enter("session of anna", ANNA)
    monkeypatch.setattr(guard, "get_script_run_ctx", lambda: SimpleNamespace(session_id="session of anna"))
    from streamlit.runtime.memory_media_file_storage import MemoryMediaFileStorage

    url = MediaFileManager(MemoryMediaFileStorage("/media")).add(b"a,b", "text/csv", "1.0", "labelled.csv")
    assert url.startswith("/media/")
    assert Asked(url, cookie=anna).status == 200
    for asked in (
        Asked(url),
        Asked(url, cookie=bob),
        Asked(url, cookie="glm_login_x=1"),
        Asked(url, cookie=anna + "x"),
    ):
        assert asked.status == 403
    access.users_of(guarded).set_password("anna", "another horse")
    assert Asked(url, cookie=anna).status == 403


def test_an_upload_needs_a_session_that_is_logged_in(guarded):
    guard.enter("known", ANNA)
    assert Asked("/_stcore/upload_file/known/f", "PUT").status == 200
    assert Asked("/_stcore/upload_file/unknown/f", "PUT").status == 403
    guard.leave("known")
    assert Asked("/_stcore/upload_file/known/f", "PUT").status == 403
    assert Asked("/_stcore/health").status == 200 == Asked("/static/js/index.js").status


def test_without_users_everything_is_as_before(workspace, open_page):
    guard.install(state.logins_on)
    assert Asked("/media/abc.csv").status == 200 == Asked("/_stcore/upload_file/any/f", "PUT").status
    app = open_page("jobs")
    assert "login_send" not in keys(app) and "log_out" not in keys(app) and app.sidebar.children


def test_a_download_from_the_page_of_another_session_is_not_made(guarded):
    from streamlit.proto.BackMsg_pb2 import BackendOperationRequest
    from streamlit.runtime.backend_operation_handler import DeferredFileHandler
    from streamlit.runtime.memory_media_file_storage import MemoryMediaFileStorage

    files = MediaFileManager(MemoryMediaFileStorage("/media"))
    made = []

    def export():
        made.append(guard.speaking.get())
        return b"rows"

    file_id = files.add_deferred(export, "text/csv", "1.0", "labelled.csv")
    session = files._deferred_callables[file_id]["session_id"]
    for asking, url in (("another", False), (session, True)):
        guard.enter(asking, BOB if asking == "another" else ANNA)
        request = BackendOperationRequest(request_id="1")
        request.deferred_file.file_id = file_id
        response = asyncio.run(DeferredFileHandler(lambda: files).handle(request, asking))
        assert bool(response.deferred_file.url) == url
    assert made == [ANNA]  # once, and in the name of whoever asked


# ---- a provider of identities


@pytest.fixture
def provider(team, monkeypatch):
    who: dict = {}
    monkeypatch.setattr(state, "provider", lambda: ["corp"])
    monkeypatch.setattr(st, "user", who)
    monkeypatch.setattr(
        st, "secrets", {"access": {"admins": ["boss@example.org"], "people": ["example.org"]}}
    )
    return who


def test_who_the_provider_vouches_for_gets_in_by_the_lists(provider, open_page):
    app = open_page("models")
    assert {"login_with_corp", "login_send"} <= keys(app) and not app.sidebar.children
    for mail, inside in (("boss@example.org", True), ("li@example.org", False)):
        provider.update(is_logged_in=True, email=mail, email_verified=True)
        app = open_page("models")
        assert not app.exception and mail in texts(app).replace("\\", "")
        assert ("folder_path" in keys(app)) == inside
    provider.update(email="li@evil.org")
    app = open_page("models")
    assert "may not use" in app.error[0].value and not app.sidebar.children


def test_a_missing_package_of_the_provider_is_said(provider, open_page, monkeypatch):
    monkeypatch.setattr("streamlit.auth_util.is_authlib_installed", lambda: False)
    app = open_page("home").button(key="login_with_corp").click().run()
    assert "pip install" in app.error[0].value


# ---- the demonstration


@pytest.fixture
def demo(workspace, monkeypatch):
    monkeypatch.setenv("GLM_DEMO", "1")
    return Settings.read()


@pytest.mark.parametrize("name", FILES)
def test_every_page_of_the_demonstration_shows_something_and_takes_no_file(
    demo, open_page, loaded_model, name
):
    app = open_page(name)
    assert not app.exception
    assert "Demonstration" in app.info[0].value
    assert not app.get("file_uploader") and not [key for key in keys(app) if key.startswith("path_form")]
    assert not keys(app) & {"load", "unload", "folder_add", "load_embedded"}
    assert len(texts(app)) > 300
    assert not list(demo.workspace.glob("preferences*"))


def test_visitors_are_alone_and_leave_nothing_behind(demo, open_page, monkeypatch):
    guard.install(state.logins_on)
    first, second = open_page("jobs"), open_page("jobs")
    one, other = (app.session_state["access.visitor"] for app in (first, second))
    assert one.name != other.name
    job_of(demo, one, "mine.csv")
    assert "mine" in texts(first.run()) and "mine" not in texts(second.run())
    assert Asked("/_stcore/upload_file/any/f", "PUT").status == 403
    monkeypatch.setattr(login, "ABSENT_S", -1.0)
    login._forget_visitor(demo, one.name)
    assert JobStore(demo.database).list() == []
    with pytest.raises(GLMError, match="demonstration"):
        JobStore(demo.database).seen_by(one).create("finetune", "t", {})
