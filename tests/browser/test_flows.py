"""What an analyst does, in a real browser: every flow also proves that nothing but this machine was asked."""

from __future__ import annotations

import csv
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import openpyxl
import pytest
from playwright.sync_api import expect

from glm_core.minimodel.examples import CHINESE_TEMPLATES
from tests.browser.serving import badge, settled
from tests.conftest import REPOSITORY

COMMENTS = REPOSITORY / "data" / "samples" / "comments.csv"
PAGES = ("", "chat", "batch", "classify", "jobs", "finetune", "models")


def ready(page, server) -> None:
    """Home is on screen and the embedded model is loaded."""
    page.goto(server.url)
    settled(page)
    expect(badge(page, "ready")).to_be_visible(timeout=90_000)


@pytest.mark.parametrize("path", PAGES)
def test_a_deep_link_opens_every_page_without_an_error(page, server, path):
    page.goto(f"{server.url}/{path}")
    settled(page)
    expect(page.get_by_test_id("stHeading").first).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0


@pytest.mark.parametrize("path", PAGES)
def test_no_page_is_wider_than_a_phone(chromium, server, path):
    context = chromium.new_context(viewport={"width": 390, "height": 844}, locale="zh-CN")
    try:
        page = context.new_page()
        page.goto(f"{server.url}/{path}")
        settled(page)
        page.wait_for_timeout(500)
        wide = page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth")
        assert wide <= 0
        assert re.search(r"[\u4e00-\u9fff]", page.get_by_test_id("stHeading").first.inner_text())
    finally:
        context.close()


def test_chat_answers_survive_a_refresh_and_are_kept(page, server):
    ready(page, server)
    page.goto(f"{server.url}/chat")
    settled(page)
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill("What is the capital of France?")
    box.press("Enter")
    page.wait_for_url(re.compile(r"[?&]c="))
    page.reload()
    settled(page)
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled(timeout=60_000)
    with closing(sqlite3.connect(server.workspace / "workbench.db")) as database:
        turns = database.execute(
            "SELECT role, text, state FROM turn ORDER BY created DESC, n DESC LIMIT 2"
        ).fetchall()
    assert {role for role, _, _ in turns} == {"user", "assistant"}
    assert all(text.strip() and state == "done" for _, text, state in turns)


def test_a_spreadsheet_is_labelled_and_comes_back_unchanged(page, server, tmp_path):
    """Upload, run, download as Excel: the analyst's columns cell by cell, and one label per row."""
    ready(page, server)
    page.goto(f"{server.url}/batch")
    settled(page)
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(COMMENTS)
    template = page.get_by_label("Template", exact=True)
    template.fill(CHINESE_TEMPLATES[0].replace("{text}", "{comment}"))
    template.press("Control+Enter")
    settled(page)
    page.get_by_role("button", name=re.compile(r"Run [\d,]+ rows")).click()
    page.wait_for_url(re.compile(r"[?&]job="))
    expect(badge(page, "done")).to_be_visible(timeout=120_000)
    saved = download(page, "Excel", tmp_path)
    sheet = [
        [cell.value if cell.value is not None else "" for cell in row]
        for row in openpyxl.load_workbook(saved).active
    ]
    with COMMENTS.open(encoding="utf-8-sig", newline="") as file:
        source = list(csv.reader(file))
    width = len(source[0])
    assert [row[:width] for row in sheet] == source
    assert len(sheet) == len(source) and all(row[width] for row in sheet[1:])


def download(page, format: str, folder: Path) -> Path:
    """Choose a format and fetch the file."""
    page.get_by_role("radio", name=format, exact=True).or_(
        page.get_by_role("button", name=format, exact=True)
    ).first.click()
    settled(page)
    button = page.get_by_test_id("stDownloadButton").get_by_role("button", name=re.compile(format)).first
    with page.expect_download() as caught:
        button.click()
    saved = folder / caught.value.suggested_filename
    caught.value.save_as(saved)
    return saved


def test_a_killed_server_finishes_the_job_after_its_restart(page, own_server, tmp_path):
    ready(page, own_server)
    table = tmp_path / "many.csv"
    table.write_text(
        "id,comment\n" + "".join(f"{i:05},第{i}条评论，视频不错\n" for i in range(600)), encoding="utf-8"
    )
    page.goto(f"{own_server.url}/batch")
    settled(page)
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(table)
    settled(page)
    page.get_by_role("button", name=re.compile(r"Run [\d,]+ rows")).click()
    page.wait_for_url(re.compile(r"[?&]job="))
    url = page.url
    finished = wait_for_results(own_server, lambda n: n >= 50)
    own_server.kill()
    with closing(sqlite3.connect(own_server.workspace / "workbench.db")) as database:
        before = dict(database.execute("SELECT idx, finished FROM result"))
    assert finished <= len(before) < 600
    own_server.start()
    page.goto(url)
    wait_for_results(own_server, lambda n: n >= 600)
    expect(badge(page, "done")).to_be_visible(timeout=60_000)
    with closing(sqlite3.connect(own_server.workspace / "workbench.db")) as database:
        after = dict(database.execute("SELECT idx, finished FROM result"))
    assert len(after) == 600
    assert {idx: after[idx] for idx in before} == before, "a finished row was computed again"


def wait_for_results(server, enough, seconds: float = 120) -> int:
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        with closing(sqlite3.connect(server.workspace / "workbench.db")) as database:
            (count,) = database.execute("SELECT count(*) FROM result").fetchone()
        if enough(count):
            return count
        time.sleep(0.2)
    raise AssertionError(f"only {count} results:\n{server.log.read_text()[-2000:]}")


def test_a_refused_file_is_a_sentence(page, server, tmp_path):
    empty = tmp_path / "nothing.csv"
    empty.write_bytes(b"")
    page.goto(f"{server.url}/batch")
    settled(page)
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(empty)
    expect(page.get_by_test_id("stAlert").filter(has_text="nothing.csv")).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0
