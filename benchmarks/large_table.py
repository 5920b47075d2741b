"""A 200 MB table of one million rows, by path, through the pages: extra memory of the server and time to a page.

python benchmarks/large_table.py
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os

import psutil
from playwright.sync_api import sync_playwright

from tests.browser.serving import CHROMIUM, FLAGS, Server, badge, settled

WORDS = "视频 不错 老师 讲得 真好 快递 有点 慢 价格 合适 下次 还来 画质 一般 字幕 清楚 音乐 好听 推荐 收藏".split()


def write_table(path: Path, rows: int) -> None:
    generator = random.Random(1)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "site", "comment"))
        for i in range(rows):
            text = "，".join(generator.choices(WORDS, k=18))
            writer.writerow((f"{i:019}", "video", f"{text}，第{i}条 https://video.example/{i}"))


class Peak:
    """The highest resident size of a process while it is watched, in bytes."""

    def __init__(self, pid: int) -> None:
        self.process, self.highest, self._on = psutil.Process(pid), 0, True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._on:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.02)

    def stop(self) -> None:
        self._on = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sync_playwright() as playwright:
        table = Path(folder) / "one million.csv"
        write_table(table, options.rows)
        print(f"{table.stat().st_size / 1e6:.0f} MB, {options.rows:,} rows")
        os.environ["GLM_TABLES"] = folder
        server = Server(Path(folder) / "workspace")
        server.start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{server.url}/batch")
        badge(page, "ready").wait_for()
        badge(page, "batched = single").wait_for()
        settled(page)
        assert server.process is not None
        before = psutil.Process(server.process.pid).memory_info().rss
        peak = Peak(server.process.pid)
        started = time.perf_counter()
        page.goto(f"{server.url}/batch?path={quote(str(table))}")
        page.get_by_role("button", name=re.compile(r"Run [\d,]+ rows")).wait_for()
        settled(page)
        opened = time.perf_counter() - started
        started = time.perf_counter()
        page.get_by_role("button", name=re.compile(r"Run [\d,]+ rows")).click()
        page.wait_for_url(re.compile(r"[?&]job="))
        page.get_by_text("Finished last").wait_for()
        running = time.perf_counter() - started
        peak.stop()
        print(f"opened and previewed in {opened:.1f} s; job running {running:.1f} s after Run", flush=True)
        more = (peak.highest - before) / 2**20
        print(f"server memory: {before / 2**20:.0f} MiB before, peak {more:.0f} MiB more", flush=True)
        page.get_by_role("button", name="Pause").click()
        badge(page, "paused").wait_for()
        page.locator(".st-key-results").wait_for()
        settled(page)
        shown = []
        for _ in range(3):
            started = time.perf_counter()
            page.reload()
            page.get_by_test_id("stDataFrame").first.wait_for()
            settled(page)
            shown.append(time.perf_counter() - started)
        browser.close()
        server.kill()
    print(f"first page of results: {min(shown):.2f} s (best of {len(shown)}), {max(shown):.2f} s (slowest)")


if __name__ == "__main__":
    main()
