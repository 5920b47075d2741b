"""Evaluation in a real browser: a file asked of a checkpoint, its dashboard after a refresh, its report without a network."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from tests.browser.serving import badge, settled
from tests.conftest import REPOSITORY

ADVERTS = REPOSITORY / "data" / "adverts" / "test.jsonl"
ROWS = 12


def view(page, name: str) -> None:
    page.get_by_test_id("stButtonGroup").get_by_text(name, exact=True).first.click()
    settled(page)


def predictions(path, count: int = 40):
    """A file of predictions as the released scripts write it: the first half of each reference, some of them blank."""
    rows = [json.loads(line)["summary"] for line in ADVERTS.read_text(encoding="utf-8").splitlines()[:count]]
    lines = [
        json.dumps({"labels": one, "predict": one[: len(one) // 2] if i % 10 else ""}, ensure_ascii=False)
        for i, one in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def import_file(page, path) -> None:
    page.get_by_text("Import predictions", exact=True).click()
    card = page.locator(".st-key-evaluate_import")
    expect(card).to_be_visible(timeout=60_000)
    # by its label: until the view has changed, the uploader of the one before stands in the card, too
    box = card.get_by_test_id("stFileUploader").filter(has_text="TXT, JSONL, CSV or Excel")
    box.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(path)


def test_a_file_is_asked_its_dashboard_survives_a_refresh_and_its_report_opens_offline(
    page, own_server, chromium, tmp_path
):
    page.goto(f"{own_server.url}/evaluate")
    settled(page)
    page.get_by_role("button", name=re.compile("adverts-test.jsonl")).click()
    limit = page.get_by_role("spinbutton", name="First rows only")
    expect(limit).to_be_visible(timeout=60_000)
    limit.fill(str(ROWS))
    limit.press("Enter")
    start = page.get_by_role("button", name=f"Evaluate {ROWS} rows")
    expect(start).to_be_enabled(timeout=60_000)
    start.press("Enter")  # by keyboard
    page.wait_for_url(re.compile(r"[?&]run="))
    expect(badge(page, "done")).to_be_visible(timeout=280_000)

    # what a person sees in five seconds: the score, how certain, on how many rows
    headline = page.locator(".st-key-evaluate_headline")
    expect(headline).to_contain_text(
        re.compile(r"ROUGE-L\s*\d+\.\d\s*95 % interval \d+\.\d – \d+\.\d\s*on 12 rows")
    )
    value, between = headline.locator(".ev-value"), headline.locator(".ev-between")
    shown = value.inner_text(), between.inner_text()
    box, window = value.bounding_box(), page.viewport_size
    assert box["y"] + box["height"] < window["height"] / 2, (
        "the score is in the upper half of the first screen"
    )

    # nothing is lost
    page.reload()
    settled(page)
    expect(value).to_have_text(shown[0], timeout=60_000)
    expect(between).to_have_text(shown[1])

    # the rows, the worst first; one in full
    view(page, "Rows")
    expect(page.locator(".st-key-evaluate_row")).to_contain_text("Correct answer", timeout=60_000)
    page.reload()
    settled(page)
    expect(page.locator(".st-key-evaluate_row")).to_be_visible(timeout=60_000)  # the view is in the address

    # rows and report
    view(page, "Download")
    with page.expect_download() as caught:
        page.locator(".st-key-evaluate_download_rows").get_by_role("button", name=re.compile("CSV ·")).click()
    caught.value.save_as(tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[0].startswith("content,summary,prediction,")
    assert len(lines) >= ROWS + 1
    with page.expect_download() as caught:
        page.get_by_role("button", name="Report, one HTML file").click()
    caught.value.save_as(tmp_path / "report.html")
    # a figure as a picture
    page.get_by_test_id("stButtonGroup").get_by_text("SVG", exact=True).click()
    settled(page)
    view(page, "Overview")
    with page.expect_download() as caught:
        page.get_by_role("button", name=re.compile("Download plot")).first.press("Enter")
    caught.value.save_as(tmp_path / "figure.svg")
    assert caught.value.suggested_filename.endswith("-rouge-l.svg")
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<svg")

    context = chromium.new_context(offline=True)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    report = context.new_page()
    report.goto((tmp_path / "report.html").as_uri())
    expect(report.locator(".head")).to_contain_text(f"n = {ROWS}")
    assert f"{float(report.locator('.head b').inner_text()):.1f}" == shown[0]
    assert [url for url in asked if not url.startswith("file:")] == []
    context.close()

    # imported predictions stand in the list beside it
    page.get_by_role("button", name="All runs").click()
    settled(page)
    import_file(page, predictions(tmp_path / "generated_predictions.txt"))
    score = page.get_by_role("button", name="Score 40 predictions")
    expect(score).to_be_enabled(timeout=60_000)
    score.click()
    expect(headline).to_contain_text("on 40 rows", timeout=120_000)
    expect(headline).to_contain_text("4 empty: score 0, counted")
    page.get_by_role("button", name="All runs").click()
    expect(page.locator(".st-key-evaluate_registry")).to_contain_text(
        "generated_predictions.txt", timeout=60_000
    )
    expect(page.locator(".st-key-evaluate_registry")).to_contain_text("glm-mini on adverts-test.jsonl")
    assert page.get_by_test_id("stException").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_dashboard_fits_a_phone(own_server, chromium, tmp_path, scheme):
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, color_scheme=scheme, locale="en-US"
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{own_server.url}/evaluate")
    settled(page)
    import_file(page, predictions(tmp_path / "generated_predictions.txt"))
    page.get_by_role("button", name="Score 40 predictions").click()
    expect(page.locator(".ev-n")).to_have_text("on 40 rows", timeout=120_000)
    for name in ("Rows", "Slices", "Download"):
        view(page, name)
        wide = page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth")
        assert wide <= 0, name
    assert page.get_by_test_id("stException").count() == 0
    context.close()
