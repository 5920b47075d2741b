"""What outlives one run of a page: the only place that touches st.session_state and st.cache_resource."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from glm_core import access
from glm_core.access import NOBODY, OPERATOR, Person
from glm_core.errors import GLMError
from glm_core.remote import shown
from glm_core.settings import MINI, Settings
from pages.shared import guard

if TYPE_CHECKING:
    from glm_core.chat import ConversationStore
    from glm_core.checkpoints import CheckpointInfo, Progress
    from glm_core.effect import EffectReport
    from glm_core.engine import Engine, EngineHost
    from glm_core.jobs import JobStore, Supervisor

LEAVE_S = 15.0  # how long an end waits for what a start still does
FIRST_PAINT_S = 0.6  # importing torch holds the interpreter lock: the first screen is sent before it begins


# --- what glm_core keeps: one of each per process -------------------------------------------------------


def settings() -> Settings:
    """Where things live; its folders exist. GLMError where they cannot be made."""
    found = Settings.read()
    _folders(found)
    return found


@st.cache_resource(show_spinner=False)
def _folders(found: Settings) -> None:
    found.make_folders()


def engine_host() -> EngineHost:
    """The one owner of the model."""
    from glm_core import engine

    return engine.host()


def current_engine() -> Engine | None:
    """The engine of the loaded model, or None; never waits for one."""
    return engine_host().current


def job_store() -> JobStore:
    """The durable list of jobs, as the person of this session sees it."""
    from glm_core import jobs

    return jobs.store(settings()).seen_by(person() or NOBODY)


def supervisor() -> Supervisor:
    """The thread that runs the jobs, started once per process."""
    return _supervisor(settings())


@st.cache_resource(show_spinner=False)
def _supervisor(found: Settings) -> Supervisor:
    from glm_core import jobs

    running = jobs.supervisor(found)
    running.start()
    return running


def conversations() -> ConversationStore:
    """The saved conversations of the person of this session."""
    return _conversations(settings().database).seen_by(person() or NOBODY)


@st.cache_resource(show_spinner=False)
def _conversations(database: Path) -> ConversationStore:
    from glm_core import chat

    return chat.ConversationStore(database)


def uploads() -> Path:
    """The folder with what the person of this session uploaded."""
    from glm_core import belongings

    return belongings.uploads_of(settings(), (person() or NOBODY).folder)


def exports() -> Path:
    """Where files for a download are written; their names begin with the id of what they are about."""
    return settings().exports


def allowed_table(path: str) -> Path:
    """The resolved path of a table the person of this session may open by its path; GLMError for any other."""
    who, found = person() or NOBODY, settings()
    who.require("paths")
    resolved = found.allowed_table(path)
    if who.role != "operator" and found.workspace in resolved.parents:
        raise GLMError(f"{resolved} is part of the workspace.", "Choose a file elsewhere, or upload it.")
    return resolved


# --- who uses this session --------------------------------------------------------------------------------

TOKEN, FILES, LEFT, VISIT = "access.token", "access.files", "access.left", "access.visitor"


def person() -> Person | None:
    """Who uses this session: the operator where nobody has to log in, None where somebody has and did not."""
    found = Settings.read()
    if found.demo:
        if get_script_run_ctx() is None:
            return guard.speaking.get()
        if VISIT not in st.session_state:
            st.session_state[VISIT] = access.visitor()
        visitor: Person = st.session_state[VISIT]
        return visitor
    if not logins_on(found):
        return OPERATOR
    if get_script_run_ctx() is None:  # a download, which is made outside of the page
        return guard.speaking.get()
    if provider() and st.user.get("is_logged_in"):
        return _of_provider(found)
    token = str(st.session_state.get(TOKEN) or st.context.cookies.get(guard.cookie_name(found)) or "")
    if name := guard.name_of(token, found, ("password",)):
        return access.users_of(found).person(name, found.users_may)
    return None


def may(right: access.Right) -> bool:
    """Whether the person of this session may do something."""
    return (person() or NOBODY).may(right)


def most_rows(rows: int) -> int:
    """How many of so many rows a job of this person takes."""
    return min(rows, access.DEMO_ROWS) if (person() or NOBODY).is_visitor else rows


def logins_on(found: Settings) -> bool:
    """Whether a login is asked for: there are users, or a provider of identities in the secrets."""
    return access.is_on(found) or bool(provider())


def provider() -> list[str]:
    """The names of the OpenID providers in .streamlit/secrets.toml, "" for one without a name."""
    from streamlit.auth_util import get_secrets_auth_section

    section = get_secrets_auth_section()
    named = [key for key in section if hasattr(section[key], "get") and key != "client_kwargs"]
    return named or ([""] if section.get("client_id") else [])


def _of_provider(found: Settings) -> Person | None:
    lists = st.secrets.get("access", {})
    mail, verified = str(st.user.get("email") or ""), st.user.get("email_verified", True) is not False
    return access.by_mail(mail, verified, lists.get("admins", []), lists.get("people", []), found.users_may)


def begin_login(user: access.User) -> None:
    """Make this session a user's; what it held before is dropped."""
    token = access.logins_of(settings()).begin(user.name, "password", user.salt)
    _drop_session()
    st.session_state[TOKEN] = token


def _drop_session() -> None:
    """Forget what the session holds, but for widgets: a widget that is gone before its page is would call its
    callback without a value, and Streamlit drops it itself with the next page that does not draw it."""
    context = get_script_run_ctx()
    drawn = context.session_state._state._key_id_mapper if context is not None else ()
    for key in [str(one) for one in st.session_state]:
        if key not in drawn:
            del st.session_state[key]


def end_login() -> bool:
    """Log out, in every tab of this browser that came from the same login; what the session held is dropped.

    True where the browser is on its way to the provider's logout: a rerun now would keep it here.
    """
    found = settings()
    logins = access.logins_of(found)
    cookie = st.context.cookies.get(guard.cookie_name(found))
    for token in (st.session_state.get(TOKEN), st.session_state.get(FILES), cookie):
        if token:
            logins.end(str(token))
    _drop_session()
    st.session_state[LEFT] = True
    st.query_params.clear()
    if provider() and st.user.get("is_logged_in"):
        st.logout()
        return True
    return False


# --- starting, and loading a model without keeping a screen waiting ---------------------------------------


class Startup:
    """Imports the model libraries, loads the embedded model and resumes jobs, behind the first screen."""

    def __init__(self, found: Settings) -> None:
        self.imported = threading.Event()
        self.finished = threading.Event()
        self.error: GLMError | None = None
        self._settings = found
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="glm-startup", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def _leave(self) -> None:
        """At Python's end: a thread that imports or computes meanwhile would end the process with an error."""
        self._leaving = True
        if self._thread is not threading.current_thread():
            self._thread.join(LEAVE_S)

    def _run(self) -> None:
        from glm_core import jobs

        try:
            if "torch" not in sys.modules:
                time.sleep(FIRST_PAINT_S)
            import torch  # noqa: F401  # here, so that no screen waits for it

            self.imported.set()
            if self._leaving:
                return
            from glm_core.engine import leave_imports_alone

            leave_imports_alone()  # Streamlit collects garbage after every run of a page or fragment
            if engine_host().state == "empty" and not self._leaving:
                engine_host().use(MINI)
        except GLMError as error:
            self.error = error
        finally:
            self.finished.set()
            if not self._leaving:
                jobs.supervisor(self._settings).start()


def startup() -> Startup:
    """The start of this process; the first call begins it, no call waits for it."""
    return _startup(settings())


@st.cache_resource(show_spinner=False)
def _startup(found: Settings) -> Startup:
    return Startup(found)


class Background:
    """One piece of work at a time that goes on when its screen is left; `error` says why it ended early."""

    def __init__(self, thread_name: str) -> None:
        self.error: GLMError | None = None
        self._name = thread_name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, prepare: Callable[[], None], work: Callable[[], None], failed: Callable[[str], GLMError]
    ) -> None:
        """Run `prepare` here and `work` in the background; a second click while it runs changes nothing.

        failed   what to say of an error that is no GLMError, given its kind and text: a thread has no screen
        """
        with self._lock:
            if self.busy:
                return
            self.error = None
            prepare()
            self._thread = threading.Thread(
                target=self._run, args=(work, failed), name=self._name, daemon=True
            )
            self._thread.start()

    def _run(self, work: Callable[[], None], failed: Callable[[str], GLMError]) -> None:
        try:
            work()
        except GLMError as error:
            self.error = error
        except Exception as error:
            self.error = failed(f"{type(error).__name__}: {error}")
            raise


class Loading(Background):
    """The last load asked for on a screen."""

    def __init__(self) -> None:
        super().__init__("glm-load")
        self.path: Path | None = None

    @property
    def name(self) -> str:
        return shown(self.path) if self.path else ""

    def start(
        self, path: Path, precision: str, device: str, generation: str | None, base: Path | None = None
    ) -> None:
        """Load a checkpoint."""

        def prepare() -> None:
            self.path = path

        def load() -> None:
            engine_host().use(path, precision=precision, device=device, generation=generation, base=base)

        self.begin(
            prepare,
            load,
            lambda reason: GLMError(
                f"{path.name} was not loaded: {reason}.",
                "The terminal shows where; choose another checkpoint, precision or device.",
            ),
        )


class Testing(Background):
    """The last self-test asked for on a screen; on a large model it takes minutes."""

    def __init__(self) -> None:
        super().__init__("glm-test")
        self.said = ""

    def start(self, engine: Engine) -> None:
        """Compare batched with single."""

        def prepare() -> None:
            self.said = ""

        def test() -> None:
            self.said = engine.self_test().text

        self.begin(
            prepare,
            test,
            lambda reason: GLMError(
                f"The self-test did not end: {reason}.",
                "The terminal shows where; load the model again and repeat it.",
            ),
        )


class Measuring(Background):
    """The last look at whether an adapter took effect; on a large model it takes minutes."""

    def __init__(self) -> None:
        super().__init__("glm-effect")
        self.done, self.total = 0, 0  # tokens
        self._report: EffectReport | None = None
        self._of: weakref.ref[Engine] | None = None

    def report(self, engine: Engine) -> EffectReport | None:
        """What was found on this very load of the model, or None."""
        return self._report if self._of is not None and self._of() is engine else None

    def start(self, engine: Engine) -> None:
        """Answer the test prompts with and without the adapter."""

        def prepare() -> None:
            self.done, self.total, self._report, self._of = 0, 0, None, weakref.ref(engine)

        def measure() -> None:
            from glm_core import effect

            self._report = effect.measure(engine, self._progress)

        self.begin(
            prepare,
            measure,
            lambda reason: GLMError(
                f"The test prompts were not answered: {reason}.",
                "The terminal shows where; load the model again and repeat it.",
            ),
        )

    def _progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total


class Making(Background):
    """The last copy of a checkpoint in another form asked for on a screen; of a large model it takes minutes."""

    def __init__(self) -> None:
        super().__init__("glm-save")
        self.source: Path | None = None
        self.target: Path | None = None
        self.made: CheckpointInfo | None = None  # the new folder, once it is whole
        self._expected, self._read = 0, (0, 0)  # bytes to write; bytes read so far and of all files

    def start(self, source: Path, target: Path, expected: int, make: Callable[[Progress], object]) -> None:
        """Let `make` write a new folder; it may tell how many bytes of the source it has read.

        expected   bytes the folder will have
        """

        def prepare() -> None:
            self.source, self.target, self.made = source, target, None
            self._expected, self._read = expected, (0, 0)

        def work() -> None:
            from glm_core.checkpoints import inspect
            from glm_core.engine import trim

            problem: GLMError | None = None
            try:
                make(self._reading)
            except GLMError as error:
                problem = GLMError(error.message, error.todo)
            gc.collect()
            trim()
            if problem is not None:  # raised out here: the first one's traceback keeps the weights in memory
                raise problem
            self.made = inspect(target)
            checkpoints.clear()

        self.begin(
            prepare,
            work,
            lambda reason: GLMError(
                f"{source.name} was not saved as {target.name}: {reason}.",
                "The terminal shows where; choose another precision or checkpoint.",
            ),
        )

    def progress(self) -> tuple[bool, int, int]:
        """(whether the new folder is being written, bytes read or written, of how many; 0 while not known)."""
        from glm_core.checkpoints.inspecting import UNFINISHED

        assert self.target is not None
        try:
            unfinished = self.target.with_name(self.target.name + UNFINISHED)
            written = sum(file.stat().st_size for file in unfinished.iterdir())
        except OSError:  # not begun, or just renamed
            written = 0
        return (True, written, max(written, self._expected)) if written else (False, *self._read)

    def forget(self) -> None:
        """Take the outcome off the screen."""
        if not self.busy:
            self.error = self.made = None

    def _reading(self, done: int, total: int) -> None:
        self._read = done, total


@st.cache_resource(show_spinner=False)
def making() -> Making:
    """The one copy of a checkpoint in the making, shared by all sessions."""
    return Making()


@st.cache_resource(show_spinner=False)
def measuring() -> Measuring:
    """The one look at an adapter's effect in progress, shared by all sessions."""
    return Measuring()


@st.cache_resource(show_spinner=False)
def testing() -> Testing:
    """The one self-test in progress, shared by all sessions."""
    return Testing()


@st.cache_resource(show_spinner=False)
def loading() -> Loading:
    """The one load in progress, shared by all sessions as the model is."""
    return Loading()


def load_model(
    path: Path = MINI,
    precision: str = "auto",
    device: str = "auto",
    generation: str | None = None,
    base: Path | None = None,
) -> None:
    """Begin to load a checkpoint and return at once; `model_state` and `loading_progress` say how it goes.

    base   the checkpoint to put it on, where the folder holds an adapter alone
    GLMError where this person may not.
    """
    (person() or NOBODY).require("load")
    loading().start(path, precision, device, generation, base)


def loading_progress() -> tuple[float, int]:
    """(share of the weights that is read, 0 to 1; their bytes, 0 while that is not known) of the load under way."""
    host = engine_host()
    if host.state != "loading":
        return 0.0, 0
    return min(1.0, host.loading_share), host.loading_bytes


def unload_model() -> None:
    """Free the model's memory; GLMError while a job holds it, and where this person may not."""
    (person() or NOBODY).require("load")
    loading().error = startup().error = None
    engine_host().unload()


def model_state() -> tuple[str, str]:
    """("starting" | "empty" | "loading" | "ready" | "failed", name of the model it is about)."""
    host = engine_host()
    if host.state == "loading":
        return "loading", host.loading_name
    if loading().busy:
        return "loading", loading().name
    if engine := host.current:
        return "ready", engine.loaded.info.name
    if not startup().finished.is_set():
        return "starting", MINI.name
    return ("failed" if model_error() else "empty"), ""


def model_error() -> GLMError | None:
    """Why the last load failed or was refused, or None."""
    return loading().error or engine_host().error or startup().error


@st.cache_data(ttl=20, show_spinner=False, max_entries=8)
def checkpoints(roots: tuple[Path, ...]) -> list[CheckpointInfo]:
    """The checkpoints under some folders; looked up again after 20 seconds or `checkpoints.clear()`."""
    from glm_core import checkpoints as found

    return found.find(roots)


def bases(
    adapter: CheckpointInfo, found: Sequence[CheckpointInfo]
) -> tuple[list[CheckpointInfo], list[tuple[CheckpointInfo, GLMError]]]:
    """(the whole checkpoints an adapter's sizes fit, the recorded one first; the others, each with the reason).

    A recorded base that lies elsewhere on this computer is among them where the workbench may read it.
    """
    from glm_core.checkpoints import read_config

    assert adapter.adapter is not None
    fits: list[CheckpointInfo] = []
    others: list[tuple[CheckpointInfo, GLMError]] = []
    known = {info.path for info in found}
    for info in (*_recorded_elsewhere(adapter.base, known), *found):
        if info.needs_base or not info.loadable:
            continue
        try:
            if info.adapter is not None:
                raise GLMError(f"{info.name} carries a prefix of its own.", "Choose the base without it.")
            adapter.adapter.check_base(read_config(info.path), info.name)
        except GLMError as error:
            others.append((info, error))
        else:
            fits.append(info)
    fits.sort(key=lambda info: not is_recorded(adapter, info))
    return fits, others


def is_recorded(adapter: CheckpointInfo, info: CheckpointInfo) -> bool:
    """Whether a checkpoint is the base an adapter names: by its path, else by the last part of the name."""
    if not adapter.base:
        return False
    named = Path(adapter.base).expanduser()
    return (named.is_absolute() and named.resolve() == info.path) or named.name.lower() == info.name.lower()


def _recorded_elsewhere(base: str, known: set[Path]) -> list[CheckpointInfo]:
    named = Path(base).expanduser()
    if not base or not named.is_absolute() or not named.is_dir() or named.resolve() in known:
        return []
    try:
        allowed = settings().allowed_model(base)
    except GLMError:
        return []
    return [info for info in checkpoints((allowed,)) if info.path == allowed]


# --- what a user chose --------------------------------------------------------------------------------------

_file_lock = threading.Lock()


def remember(key: str, default: Any) -> Any:
    """A user's setting: as chosen in this session, else as kept in the workspace, else the default."""
    shadow = f"kept.{key}"  # a widget's own key is deleted when another page is shown
    if shadow not in st.session_state:
        st.session_state[shadow] = _kept().get(key, default)
    return st.session_state[shadow]


def remember_set(key: str, value: Any) -> None:
    """Keep a user's setting across pages and restarts; the value must be JSON."""
    st.session_state[f"kept.{key}"] = value
    with _file_lock:
        kept = _kept()
        if kept.get(key) == value and key in kept:
            return
        kept[key] = value
        try:
            _write_kept(kept)
        except OSError:  # a full disk must not take the page away; the session still remembers
            return


def kept_widget(
    key: str, default: Any, options: Sequence[Any] | None = None, argument: str = "value"
) -> dict[str, Any]:
    """Arguments that make a widget remember its value: st.slider("Rows", 1, 9, **kept_widget("rows", 3)).

    options   where the choices differ between machines: a remembered value that is not among them is left out
    argument  what the widget calls the value it begins with: "value", "index" (of the options) or "default"
    The value is an argument in every run and not set once through the session: a run that starts before the browser
    has drawn the one before takes its messages back, and the browser would then show and send an empty field.
    """
    widget = f"widget.{key}"
    now = st.session_state.get(widget, remember(key, default))
    if options is not None and now not in options:
        now = default
        if widget in st.session_state:
            st.session_state[widget] = now
    begin = list(options).index(now) if argument == "index" and options is not None else now
    return {
        argument: begin,
        "key": widget,
        "on_change": lambda: remember_set(key, st.session_state[widget]),
    }


def _kept_file() -> Path | None:
    """Where this person's settings are kept; None for whoever is not to leave anything behind."""
    who = person() or NOBODY
    if who.is_visitor:
        return None
    name = f"preferences-{who.folder}.json" if who.folder else "preferences.json"
    return Settings.read().workspace / name


def _kept() -> dict[str, Any]:
    path = _kept_file()
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_kept(kept: dict[str, Any]) -> None:
    path = _kept_file()
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".preferences-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(kept, file, ensure_ascii=False, indent=1)
    os.replace(name, path)  # another session reads the old file or the new one, never half of one


def session(key: str, default: Any = None) -> Any:
    """A value of this browser session only."""
    return st.session_state.get(key, default)


def session_set(key: str, value: Any) -> None:
    """Set a value of this browser session; also a widget's, before it is drawn."""
    st.session_state[key] = value


def session_drop(key: str) -> None:
    """Forget a value of this browser session."""
    st.session_state.pop(key, None)


def query(name: str, default: str = "") -> str:
    """A parameter of the page's address, as in ?job=..."""
    return str(st.query_params.get(name, default))


def query_set(name: str, value: str | None) -> None:
    """Set a parameter of the page's address, or remove it with None."""
    if value is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != value:
        st.query_params[name] = value


def browser_locale() -> str:
    """What the browser speaks, as in "zh-CN"; empty where it does not say."""
    return str(st.context.locale or "")
