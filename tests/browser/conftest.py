"""A real server with its own workspace, and a real Chromium that reports every request it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser.serving import CHROMIUM, FLAGS, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="no Chromium on this machine"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("browser") / "workspace")
    started.start()
    yield started
    started.kill()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server for one test, which may kill it."""
    started = Server(tmp_path / "own" / "workspace")
    started.workspace.parent.mkdir()
    started.start()
    yield started
    started.kill()


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    """On a busy machine a page takes longer than Playwright's five seconds to say what it will say."""
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")  # its event loop must be gone where other tests of the process run theirs
def chromium() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[None])
def page(chromium, request: pytest.FixtureRequest) -> Iterator[object]:
    """A page of a fresh profile; the test fails if it asked any host but this machine."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 900}, accept_downloads=True, locale="en-US"
    )
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    asked: list[str] = []
    context.on("request", lambda r: asked.append(r.url))
    yield opened
    context.close()
    foreign = [url for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")
               and urlsplit(url).hostname not in ("127.0.0.1", "localhost")]  # fmt: skip
    assert not foreign, f"asked the internet: {foreign[:3]}"
