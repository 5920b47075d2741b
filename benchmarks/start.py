"""Seconds from `streamlit run Home.py` to a usable Home in a browser, and for a switch between warm pages.

python benchmarks/start.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import sync_playwright

from tests.browser.serving import CHROMIUM, FLAGS, Server, badge, settled

ROUNDS = 3
PAGES = ("Chat", "Batch prediction", "Jobs", "Models", "Home")


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        cold, model, switches = [], [], {name: [] for name in PAGES}
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                server = Server(Path(folder) / "workspace")
                page = browser.new_page()
                started = time.perf_counter()
                server.start()
                page.goto(server.url)
                page.get_by_text("Guided start").wait_for()
                settled(page)
                cold.append(time.perf_counter() - started)
                badge(page, "ready").wait_for(timeout=120_000)
                model.append(time.perf_counter() - started)
                for turn in range(3):
                    for name in PAGES:
                        started = time.perf_counter()
                        page.get_by_test_id("stSidebar").get_by_role("link", name=name, exact=True).click()
                        page.get_by_test_id("stHeading").filter(
                            has_text="GLM Workbench" if name == "Home" else name
                        ).first.wait_for()
                        settled(page)
                        if turn:
                            switches[name].append(time.perf_counter() - started)
                page.close()
                server.kill()
        browser.close()
    print(f"cold start to a usable Home: median {statistics.median(cold):.2f} s (slowest {max(cold):.2f})")
    print(f"embedded model ready: median {statistics.median(model):.2f} s")
    for name, seconds in switches.items():
        print(f"switch to {name}: median {statistics.median(seconds):.2f} s (slowest {max(seconds):.2f})")


if __name__ == "__main__":
    main()
