"""Classification in a real browser: a file measured, reviewed by keys, and its corrections handed to fine-tuning."""

from __future__ import annotations

import csv
import re
import sqlite3
from contextlib import closing

from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import expect

from glm_core.finetune import examples
from tests.browser.serving import badge, settled
from tests.conftest import REPOSITORY

COMMENTS = REPOSITORY / "data" / "comments" / "dev.csv"
ROWS = 120


def marked(path):
    """Comments with their labels, as an analyst's file."""
    with COMMENTS.open(encoding="utf-8-sig", newline="") as file:
        rows = [(row["text"], row["language"], row["label"]) for row in csv.DictReader(file)][:ROWS]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("comment", "language", "mark"), *rows])
    return path


def pick(page, box, name: str) -> None:
    """Choose from a list; a page that is drawn anew just then closes it, as it would for a person."""
    option = page.get_by_role("option", name=name, exact=True)
    for _ in range(5):
        box.click()
        try:
            option.click(timeout=5_000)
            return
        except PlaywrightTimeout:
            page.keyboard.press("Escape")
    raise AssertionError(f"{name} could not be chosen")


def view(page, name: str) -> None:
    page.get_by_test_id("stButtonGroup").get_by_text(name, exact=True).first.click()
    settled(page)


def test_a_file_is_classified_measured_reviewed_and_handed_to_fine_tuning(page, own_server, tmp_path):
    page.goto(f"{own_server.url}/classify")
    settled(page)
    expect(page.get_by_role("button", name="Classify", exact=True)).to_be_visible(timeout=240_000)

    # one text
    page.get_by_role("button", name="a spam example").click()
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator(".classify-words")).to_contain_text("兼职", timeout=60_000)

    # a file whose labels are mapped by hand
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(marked(tmp_path / "marks.csv"))
    gold = page.locator("[class*=st-key-classify_gold]").get_by_role("combobox")
    expect(gold).to_be_visible(timeout=60_000)
    pick(page, gold, "mark")
    start = page.get_by_role("button", name=f"Classify {ROWS} rows")
    sure = page.get_by_text("Yes, this is what they mean")
    expect(sure).to_be_visible(timeout=60_000)
    expect(start).to_be_disabled()
    sure.click()
    expect(start).to_be_enabled()
    start.click()
    page.wait_for_url(re.compile(r"[?&]job="))
    expect(badge(page, "done")).to_be_visible(timeout=300_000)

    # a cell of the confusion and its rows
    cell = page.locator(".st-key-cell_0_0 button").first
    expect(cell).to_be_visible(timeout=60_000)
    count = cell.inner_text().strip()
    cell.click()
    expect(page.locator(".st-key-confusion_head")).to_contain_text(f"{count} rows")

    # the threshold
    view(page, "Threshold")
    recall = page.get_by_test_id("stMetric").filter(has_text="Recall")
    expect(recall).to_be_visible(timeout=60_000)
    page.locator("[class*=st-key-classify_threshold_]").get_by_role("slider").first.press("End")
    expect(recall).to_contain_text(re.compile(r"Recall\s*0\.0%"), timeout=60_000)

    # ten rows by keys
    view(page, "Review")
    name = page.get_by_role("textbox", name="Reviewer")
    name.fill("Ann")
    name.press("Enter")
    row = page.locator(".st-key-review_row")
    expect(row).to_be_visible(timeout=60_000)
    expect(name).not_to_be_focused()
    for number, key in enumerate("1212121212", 1):
        page.keyboard.press(key)
        expect(page.get_by_text(f"{number} of {ROWS} rows seen by Ann")).to_be_visible(timeout=60_000)
    page.keyboard.press("u")
    expect(page.get_by_text(f"9 of {ROWS} rows seen by Ann")).to_be_visible(timeout=60_000)
    page.keyboard.press("2")
    expect(page.get_by_text(f"10 of {ROWS} rows seen by Ann")).to_be_visible(timeout=60_000)
    settled(page)  # the next row is drawn after the count
    shown = row.inner_text()

    # nothing is lost
    page.reload()
    settled(page)
    expect(page.get_by_text(f"10 of {ROWS} rows seen by Ann")).to_be_visible(timeout=60_000)
    assert row.inner_text().splitlines()[:4] == shown.splitlines()[:4]
    with closing(sqlite3.connect(own_server.workspace / "workbench.db")) as database:
        actions = [one for (one,) in database.execute("SELECT action FROM review ORDER BY seq")]
    assert actions == ["label"] * 10 + ["undo", "label"]

    # out as training data
    with page.expect_download() as caught:
        page.get_by_role("button", name="Corrections as CSV").click()
    caught.value.save_as(tmp_path / "corrections.csv")
    found = examples.read(tmp_path / "corrections.csv")
    assert len(found.examples) == 10
    assert {one.response for one in found.examples} == {"正常", "垃圾"}
    page.get_by_role("button", name="Fine-tune with these").click()
    page.wait_for_url(re.compile(r"/finetune\?.*path="))
    expect(page.get_by_text(re.compile(r"corrections-.*\.csv")).first).to_be_visible(timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0
