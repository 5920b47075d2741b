"""The memory page in a real browser: glm-mini at four levels, with labelled rows, to charts, changed answers, exports."""

from __future__ import annotations

import csv
import json
import re

from playwright.sync_api import expect

from glm_core import linear
from tests.browser.serving import badge, settled

LEVELS = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8", "int4": "INT4"}
if linear.dynamic_works():
    LEVELS["int8-dynamic"] = "INT8 dynamic"


def figures(page):
    return page.locator(".js-plotly-plot")


# How many cards of one level were on the page at most: an old one that stays while the new one is drawn is a second.
COUNTED = """
window.most = 0
new MutationObserver(() => {
    most = Math.max(most, document.querySelectorAll('.st-key-level_fp32').length)
}).observe(document, {childList: true, subtree: true})
"""


def test_glm_mini_is_measured_at_four_levels(page, own_server, tmp_path):
    page.add_init_script(COUNTED)
    page.goto(f"{own_server.url}/memory?model=chatglm2-6b")
    settled(page)

    # a published shape without any file
    expect(page.get_by_text("6.2 B parameters")).to_be_visible(timeout=120_000)
    page.locator("[class*=st-key-widget-memory-device]").get_by_text("GPU", exact=True).click()
    expect(page.get_by_text("predictions: there is no GPU here")).to_be_visible(timeout=60_000)
    expect(figures(page).first).to_contain_text("published: reading 2,048 tokens", timeout=60_000)
    with page.expect_download() as caught:
        page.get_by_role("button", name="CSV", exact=True).first.click()
    caught.value.save_as(tmp_path / "predicted.csv")
    with (tmp_path / "predicted.csv").open(encoding="utf-8-sig", newline="") as file:
        found = [row["precision"] for row in csv.DictReader(file)]
    assert found == ["fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128"]

    # the embedded model, with labelled rows
    page.goto(f"{own_server.url}/memory?data=comments")
    settled(page)
    model = page.locator("[class*=st-key-widget-memory-model]").get_by_role("combobox")
    model.click()
    page.get_by_role("option", name="glm-mini", exact=True).click()
    expect(page.get_by_text("11.7 M parameters")).to_be_visible(timeout=60_000)
    page.get_by_text("Ask labelled rows at every level, too").click()
    expect(page.get_by_text("2 · What is asked")).to_be_visible(timeout=60_000)
    settled(page)
    limit = page.locator("[class*=st-key-evaluate_limit] input")
    expect(limit).to_be_visible(timeout=60_000)
    limit.fill("24")
    limit.press("Enter")
    settled(page)
    page.get_by_role("button", name=f"Measure {len(LEVELS)} levels").click()
    page.wait_for_url(re.compile(r"[?&]job="), timeout=120_000)

    # level by level, to the end; a reload loses nothing
    expect(badge(page, "done")).to_be_visible(timeout=300_000)
    page.reload()
    settled(page)
    for level in LEVELS:
        box = page.locator(f".st-key-level_{level}")
        expect(box.get_by_text(re.compile("^loaded "))).to_be_visible(timeout=400_000)
        expect(box.get_by_text("24 of 24 rows")).to_be_visible(timeout=400_000)
    settled(page)
    assert page.evaluate("most") == 1
    expect(page.get_by_text("Predicted and measured")).to_be_visible()
    expect(page.get_by_text("Quality, memory and speed")).to_be_visible(timeout=120_000)
    expect(figures(page)).to_have_count(3, timeout=60_000)
    for level in LEVELS.values():
        expect(figures(page).first).to_contain_text(level, timeout=60_000)

    # the rows whose answer changed
    changed = page.locator(".st-key-memory_changed")
    for level in list(LEVELS.values())[1:]:
        changed.get_by_text(level, exact=True).first.click()
        expect(changed).to_contain_text(re.compile(r"of 24 rows"))

    # out
    table = page.locator(".st-key-memory_table")
    with page.expect_download() as caught:
        table.get_by_role("button", name="CSV", exact=True).click()
    caught.value.save_as(tmp_path / "measured.csv")
    with (tmp_path / "measured.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["level"] for row in rows} == set(LEVELS)
    assert all(int(row["measured_peak"]) > int(row["measured_weights"]) for row in rows)
    with page.expect_download() as caught:
        table.get_by_role("button", name="JSON", exact=True).click()
    caught.value.save_as(tmp_path / "measured.json")
    found = json.loads((tmp_path / "measured.json").read_text(encoding="utf-8"))
    assert sorted(one["level"] for one in found["levels"]) == sorted(LEVELS)
    assert page.get_by_test_id("stException").count() == 0
