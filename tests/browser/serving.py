"""A real server of the workbench and a real Chromium, for the browser tests and the benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Server:
    """`streamlit run Home.py` on a free port, as a user starts it; can be killed and started again."""

    def __init__(self, workspace: Path, script: str = "Home.py", *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.workspace = workspace
        self.script, self.options = script, options
        self.process: subprocess.Popen[bytes] | None = None
        self.log = workspace.parent / "server.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "streamlit", "run", self.script, "--server.headless=true"]
        self.process = subprocess.Popen(
            [*command, f"--server.port={self.port}", *self.options],
            cwd=REPOSITORY,
            env=os.environ | {"GLM_WORKSPACE": str(self.workspace)},
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/_stcore/health") as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def settled(page) -> None:
    """Wait until the script has run and no element is stale."""
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")


def badge(page, text: str):
    """The first badge that says this: a job's state, or "ready" once the model is loaded."""
    return page.locator(".stMarkdownBadge").filter(has_text=text).first
