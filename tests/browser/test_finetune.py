"""A spreadsheet becomes a fine-tuned model in a real browser: upload, check, train, stop, resume, report, chat."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import openpyxl
import pytest
from playwright.sync_api import expect

from tests.browser.serving import badge, settled
from tests.conftest import REPOSITORY

SLOW_MS = 600_000  # a training on a machine that has other things to do


def spreadsheet(path: Path, rows: int) -> Path:
    """The first comments of the project as an analyst would send them."""
    book = openpyxl.Workbook()
    sheet = book.active
    with (REPOSITORY / "data" / "comments" / "train.csv").open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number == 0:
                sheet.append(["text", "label"])
            if number == rows:
                break
            sheet.append([row["text"], row["label"]])
    book.save(path)
    return path


def metric(page, label: str):
    """A figure by its name."""
    return page.get_by_test_id("stMetric").filter(has_text=label).first


@pytest.mark.timeout(1800)
def test_a_spreadsheet_becomes_a_model_that_chats(page, own_server, tmp_path):
    page.set_default_timeout(180_000)
    expect.set_options(timeout=180_000)
    page.goto(f"{own_server.url}/finetune")
    settled(page)
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(
        spreadsheet(tmp_path / "my comments.xlsx", 160)
    )
    expect(metric(page, "Rows to learn from")).to_contain_text("144")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("54")
    expect(page.get_by_label("Rank", exact=True)).to_have_value("8")
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    expect(badge(page, "ready")).to_be_visible()
    settled(page)
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"[?&]job="))
    job = re.search(r"job=([\w-]+)", page.url).group(1)

    expect(badge(page, "running")).to_be_visible()
    expect(page.locator(".js-plotly-plot .scatterlayer .point").first).to_be_visible(timeout=SLOW_MS)
    page.get_by_role("button", name="Stop").click()
    expect(badge(page, "paused")).to_be_visible(timeout=SLOW_MS)
    expect(page.get_by_text(re.compile(r"Stopped after step \d+ of 54"))).to_be_visible()
    assert list(own_server.workspace.glob("checkpoints/*/checkpoint-*"))

    page.goto(own_server.url)  # the training is found again without its address
    page.goto(f"{own_server.url}/finetune")
    page.wait_for_url(re.compile(f"job={job}"))
    page.get_by_role("button", name="Resume").click()
    expect(badge(page, "done")).to_be_visible(timeout=2 * SLOW_MS)
    expect(metric(page, "Fine-tuned")).to_be_visible()
    expect(metric(page, "TF-IDF baseline")).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0

    page.get_by_role("button", name="Use in Chat").click()
    page.wait_for_url(re.compile(r"/chat"))
    strip = page.locator(".st-key-status_strip")
    expect(strip).to_contain_text("my-comments-lora")
    expect(strip).to_contain_text("ready")
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled()
    box.fill("加微信领红包")
    box.press("Enter")
    page.wait_for_url(re.compile(r"[?&]c="))
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
    assert page.get_by_test_id("stException").count() == 0


def test_the_page_is_no_wider_than_a_phone(chromium, server):
    context = chromium.new_context(viewport={"width": 390, "height": 844}, locale="zh-CN")
    try:
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.goto(f"{server.url}/finetune?sample=adverts")
        expect(page.get_by_role("button", name="开始训练")).to_be_visible(timeout=180_000)
        settled(page)
        wide = page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth")
        assert wide <= 0
        assert page.get_by_test_id("stException").count() == 0
    finally:
        context.close()
