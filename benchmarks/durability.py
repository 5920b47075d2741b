"""kill -9 of the server at random moments during a batch job: nothing lost, nothing computed twice.

    python benchmarks/durability.py

Every result that was in the database when the server died must be there, unchanged, at the end.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import sync_playwright

from glm_core import batch, checkpoints, jobs
from glm_core.engine import GenerationSettings
from glm_core.settings import MINI
from tests.browser.serving import CHROMIUM, FLAGS, Server


def new_job(workspace: Path, rows: int) -> str:
    """A queued job of distinct rows whose answers take a while."""
    store = jobs.JobStore(workspace / "workbench.db")
    task = batch.BatchTask(
        checkpoint=str(MINI), checkpoint_fingerprint=checkpoints.fingerprint(MINI), precision="fp32", device="cpu",
        template="根据属性写一段商品文案：类型#裙*编号#{number}", system="", settings=GenerationSettings(max_new_tokens=64),
        output_column="answer", input_name="durability", input_path="", input_sha256="", columns=("number",),
    )  # fmt: skip
    job = store.create("batch", "durability", task.to_json())
    store.add_rows(job.id, [(f"{i:05}",) for i in range(rows)])
    store.mark_ready(job.id)
    return job.id


def results(workspace: Path) -> dict[int, tuple[str, float]]:
    with closing(sqlite3.connect(workspace / "workbench.db")) as database:
        return {
            idx: (text, at)
            for idx, text, at in database.execute("SELECT idx, prediction, finished FROM result")
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sync_playwright() as playwright:
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        new_job(workspace, options.rows)
        server = Server(workspace)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        seen: dict[int, tuple[str, float]] = {}
        changed = 0
        for kill in range(options.kills):
            server.start()
            page = browser.new_page()
            page.goto(server.url)  # the first visit starts the workbench's threads
            began, before = time.monotonic(), len(seen)
            target = options.rows * (kill + 1) // (options.kills + 2)
            while time.monotonic() - began < 90 and len(results(workspace)) < max(before + 1, target):
                time.sleep(0.05)
            time.sleep(generator.random() * 0.8)
            server.kill()
            page.close()
            now = results(workspace)
            changed += sum(now.get(idx) != value for idx, value in seen.items())
            print(
                f"kill {kill + 1:2}: {len(now):5} rows finished, {len(now) - before:4} since the last kill",
                flush=True,
            )
            seen = now
        server.start()
        page = browser.new_page()
        page.goto(server.url)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and len(results(workspace)) < options.rows:
            time.sleep(0.3)
        end = results(workspace)
        with closing(sqlite3.connect(workspace / "workbench.db")) as database:
            time.sleep(1.5)
            state, attempts = database.execute("SELECT state, attempt FROM job").fetchone()
        changed += sum(end.get(idx) != value for idx, value in seen.items())
        server.kill()
        browser.close()
    print(
        f"{len(end)} results, {len(set(end))} distinct rows of {options.rows}; job {state} after {attempts} attempts"
    )
    print(f"finished rows that were lost or computed again: {changed}")
    sys.exit(0 if len(end) == options.rows and changed == 0 and state == "done" else 1)


if __name__ == "__main__":
    main()
