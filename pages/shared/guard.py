"""What a login means below the pages: a cookie no script can read, and files that only their people can fetch.

Streamlit 1.67 lets a page read cookies and set none; its own login cookie is written only by the routes of an OpenID
provider. `install` therefore puts three things around Streamlit's server, as `reruns.install` does around its runs:
a request of its own, `POST /glm-login`, that turns a word a page was given into an HttpOnly cookie; a look at who asks
for a file of /media (a download, a picture), which Streamlit gives to anybody who knows its name; and a refusal of
uploads by browsers that have not logged in. Where nobody has to log in, all three let everything through.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import Any

from streamlit import config
from streamlit.runtime.backend_operation_handler import DeferredFileHandler
from streamlit.runtime.media_file_manager import MediaFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.web.server.starlette.starlette_path_security_middleware import PathSecurityMiddleware

from glm_core import access
from glm_core.access import Person
from glm_core.errors import GLMError
from glm_core.settings import Settings

LOGIN, HEADER = "glm-login", "x-glm-code"
MOST_FILES = 20_000
# Who a download is made for: its code runs outside of a page, in a thread that has no session.
speaking: ContextVar[Person | None] = ContextVar("speaking", default=None)
_people: dict[str, Person] = {}  # session of Streamlit -> who uses it
_files: OrderedDict[str, set[str]] = OrderedDict()  # file of /media -> whose pages show it
_is_on: Callable[[Settings], bool] = access.is_on


def cookie_name(settings: Settings) -> str:
    """Of the cookie of this workspace: cookies do not know ports, and a computer may have several workbenches."""
    return f"glm_login_{hashlib.sha256(str(settings.workspace).encode()).hexdigest()[:10]}"


def login_path() -> str:
    """Where a browser fetches its cookie."""
    return f"{_base()}/{LOGIN}"


def enter(session_id: str, person: Person) -> None:
    """A session is somebody's from now on."""
    _people[session_id] = person


def leave(session_id: str) -> None:
    """A session is nobody's any more."""
    _people.pop(session_id, None)


def install(is_on: Callable[[Settings], bool]) -> None:
    """Put everything in its place; calling it again changes nothing.

    is_on   whether a login is asked for, whichever way
    """
    global _is_on
    _is_on = is_on
    if hasattr(PathSecurityMiddleware.__call__, "guards"):
        return
    answer, add, download = PathSecurityMiddleware.__call__, MediaFileManager.add, DeferredFileHandler.handle

    async def guarded(self: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            status, headers = _look(scope)
            if status:
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        await answer(self, scope, receive, send)

    def added(self: Any, *args: Any, **kwargs: Any) -> str:
        url = add(self, *args, **kwargs)
        context = get_script_run_ctx()
        _belongs(url, _people.get(context.session_id) if context else None)
        return url

    async def downloaded(self: Any, request: Any, session_id: str) -> Any:
        made = self._get_media_file_mgr()._deferred_callables.get(request.deferred_file.file_id)
        if (
            made is not None and made["session_id"] != session_id
        ):  # the button is on a page of another session
            request.deferred_file.file_id = ""
        person = _people.get(session_id)
        before = speaking.set(person)
        try:
            response = await download(self, request, session_id)
        finally:
            speaking.reset(before)
        _belongs(response.deferred_file.url, person)
        return response

    guarded.guards = True  # type: ignore[attr-defined]
    PathSecurityMiddleware.__call__ = guarded  # type: ignore[method-assign]
    MediaFileManager.add = added  # type: ignore[method-assign]
    DeferredFileHandler.handle = downloaded  # type: ignore[method-assign]


def _look(scope: Any) -> tuple[int, list[tuple[bytes, bytes]]]:
    """(status of a request that ends here, headers); 0 for one that Streamlit is to answer."""
    path, base = str(scope.get("path", "")), _base()
    if not path.startswith(base):
        return 0, []
    path = path[len(base) :]
    if path != f"/{LOGIN}" and not path.startswith(("/media/", "/_stcore/upload_file/")):
        return 0, []
    try:
        settings = Settings.read()
        if path == f"/{LOGIN}":
            return _login(scope, settings)
        if path.startswith("/media/"):
            allowed = not _is_on(settings) or _whose(scope, settings) in _files.get(_file(path), ())
        elif settings.demo:
            allowed = scope["method"] == "OPTIONS"
        else:
            allowed = not _is_on(settings) or scope["method"] == "OPTIONS" or path.split("/")[3] in _people
    except GLMError:
        allowed = False
    return (0, []) if allowed else (403, [(b"content-length", b"0")])


def _login(scope: Any, settings: Settings) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Give the browser that has the word of its page the cookie; the header keeps pages of other sites out."""
    empty = [(b"content-length", b"0"), (b"cache-control", b"no-store")]
    if scope["method"] != "POST":
        return 405, empty
    token = access.logins_of(settings).redeem(_header(scope, HEADER))
    if not token:
        return 403, empty
    secure = scope.get("scheme") == "https" or _header(scope, "x-forwarded-proto") == "https"
    cookie = (
        f"{cookie_name(settings)}={token}; Path={_base() or '/'}; HttpOnly; SameSite=Strict; "
        f"Max-Age={access.logins.DAYS * 86400}{'; Secure' if secure else ''}"
    )
    return 204, [(b"cache-control", b"no-store"), (b"set-cookie", cookie.encode("latin-1"))]


def _whose(scope: Any, settings: Settings) -> str:
    """Who asks, by the cookie; "" for nobody."""
    try:
        found = SimpleCookie(_header(scope, "cookie")).get(cookie_name(settings))
    except CookieError:
        return ""
    return name_of(found.value, settings) if found else ""


def name_of(token: str, settings: Settings, kinds: tuple[Any, ...] = ("password", "provider")) -> str:
    """Whose login a token is, "" for nobody's; one made with a password ends when that is changed."""
    users, logins = access.users_of(settings), access.logins_of(settings)

    def salt(name: str) -> str:
        user = users.all().get(name)
        return user.salt if user else secret_of_nobody

    secret_of_nobody = "\0"
    for kind in kinds:
        mark = salt if kind == "password" else lambda _: ""
        if name := logins.who(token, mark, kind):
            return name
    return ""


def _belongs(url: str, person: Person | None) -> None:
    if person is None or not url:
        return
    file = _file(url)
    _files.setdefault(file, set()).add(person.name)
    _files.move_to_end(file)
    while len(_files) > MOST_FILES:
        _files.popitem(last=False)


def _file(url: str) -> str:
    """The name of a file in an address, without its ending."""
    return url.rpartition("/")[2].partition(".")[0]


def _header(scope: Any, name: str) -> str:
    wanted = name.encode("latin-1")
    return "; ".join(value.decode("latin-1") for key, value in scope["headers"] if key == wanted)


def _base() -> str:
    base = str(config.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}" if base else ""
