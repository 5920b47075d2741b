"""python -m glm_core serve: the model over HTTP, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GLMError
from ..settings import Settings
from .model import folder_of, own_model
from .output import say

if TYPE_CHECKING:
    from ..engine import EngineHost
    from ..server import Options


def serve(options: argparse.Namespace) -> int:
    """Serve one model until the process is told to stop, or make a key and print it once."""
    keys = None if options.api_keys is None else _key_file(options.api_keys)
    if options.new_key is not None:
        from ..server.keys import new_key

        file = keys or _key_file("")
        print(new_key(file, options.new_key))
        say(f"This key is shown once; {file} keeps its hash. Start the server with --api-keys {file}.")
        return 0
    from ..server import Options

    given = Options(
        concurrency=options.concurrency,
        queue=options.queue,
        max_request_bytes=options.max_request_bytes,
        cors=tuple(options.cors or ()),
        api_keys=keys,
    )
    given.check()
    model = folder_of(options.adapter or options.model)
    base = folder_of(options.model) if options.adapter else options.base
    with _bound(options.host, options.port) as listening, own_model() as host:
        _Running(host, given).run(listening, options, model, base)
    return 0


class _Running:
    """A server and the thread that loads its model meanwhile."""

    def __init__(self, host: EngineHost, options: Options) -> None:
        self._host, self._options = host, options
        self._problem: GLMError | None = None

    def run(
        self, listening: socket.socket, options: argparse.Namespace, model: Path, base: str | Path | None
    ) -> None:
        """Serve until told to stop; GLMError where the model does not load."""
        from ..engine import leave_imports_alone
        from ..server import Service, uvicorn_server

        service = Service(self._options, lambda: self._host.current, lambda: self._host.loading_share)
        server = uvicorn_server(service)
        address = _address(listening)

        def load() -> None:
            try:
                leave_imports_alone()
                engine = self._host.use(model, options.precision, options.device, base=base)
                info = engine.loaded.info
                say(
                    f"Ready: {info.name} ({info.family}), {engine.loaded.precision} on {engine.device}, at {address}"
                )
            except GLMError as error:
                self._problem = error
                server.should_exit = True

        say(f"Loading {model.name}; listening on {address}")
        if self._options.api_keys is None and not _loopback(listening):
            say("Note: whoever reaches this address can use the model; --api-keys asks them for a key.")
        loading = threading.Thread(target=load, name="glm-load", daemon=True)
        loading.start()
        with _logged(), _quiet_signals():
            asyncio.run(server.serve(sockets=[listening]))
        loading.join()
        if self._problem is not None:
            raise self._problem
        say("Stopped.")


def _key_file(named: str) -> Path:
    return Path(named).expanduser() if named else Settings.read().workspace / "api_keys.txt"


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, taken before a large model is read for nothing; GLMError where it is not free."""
    made = None
    try:
        if not 0 <= port <= 65535:  # getaddrinfo takes its remainder instead
            raise OverflowError("ports go from 0 to 65535")
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if sys.platform != "win32":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
    except (OSError, OverflowError) as error:
        if made is not None:
            made.close()
        reason = getattr(error, "strerror", None) or error
        raise GLMError(
            f"Port {port} of {host} cannot be used: {reason}.",
            "Choose another with --port, or end the program that has it.",
        ) from error
    with made:
        yield made


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loopback(listening: socket.socket) -> bool:
    host = str(listening.getsockname()[0])
    return host == "::1" or host.startswith("127.")


@contextmanager
def _logged() -> Iterator[None]:
    """The server's lines on standard error; they hold neither texts nor keys."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    server = logging.getLogger("glm_core.server")
    before = server.level
    server.addHandler(handler)
    server.setLevel(logging.INFO)
    try:
        yield
    finally:
        server.removeHandler(handler)
        server.setLevel(before)


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM are the way to stop a server: uvicorn passes them on once it has ended, to nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
