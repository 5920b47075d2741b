"""Comparison in a real browser: two files of predictions to a verdict and a report, and prompts voted on by keys."""

from __future__ import annotations

import csv
import re
import sqlite3
from contextlib import closing

from playwright.sync_api import expect

from glm_core import evaluate, jobs
from glm_core.settings import MINI, Settings
from tests.browser.serving import settled

ROWS = 80


def imported(workspace, monkeypatch, title, wrong):
    """A run of predictions made elsewhere, in the workspace of a server."""
    monkeypatch.setenv("GLM_WORKSPACE", str(workspace))
    settings = Settings.read()
    settings.make_folders()
    path = workspace / "uploads" / f"{title}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [(f"comment {i}", ("normal", "spam")[i % 2], ("normal", "spam")[(i + (i in wrong)) % 2]) for i in range(ROWS)]  # fmt: skip
        csv.writer(file).writerows([("comment", "label", "prediction"), *rows])
    store = jobs.store(settings)
    return evaluate.import_predictions(store, path, title=title)


def write_lora(folder):
    """A LoRA of the embedded model that changes what it says."""
    import torch

    from glm_core import adapters, checkpoints

    loaded = checkpoints.load(MINI, "fp32", "cpu")
    torch.manual_seed(3)
    adapters.add_lora(loaded.model, rank=4, dropout=0.0, targets=("query_key_value", "dense"))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.06)
    adapters.save_lora(loaded.model, folder)
    return folder


def test_two_files_of_predictions_become_a_verdict_its_rows_and_a_report(
    page, own_server, chromium, monkeypatch, tmp_path
):
    old = imported(own_server.workspace, monkeypatch, "old", set(range(30)))
    new = imported(own_server.workspace, monkeypatch, "new", {5, 40, 41})

    # chosen by hand, then in the address
    page.goto(f"{own_server.url}/compare")
    settled(page)
    box = page.get_by_role("combobox", name=re.compile("Runs to compare"))
    for title in ("old", "new"):
        box.click()
        box.fill(title)
        page.get_by_role("option", name=re.compile(f"^{title} ")).click()
        settled(page)
    page.keyboard.press("Escape")
    verdict = page.locator(".st-key-compare_verdict")
    expect(verdict).to_contain_text("new is better. This is certain.", timeout=60_000)
    expect(verdict).to_contain_text("33.8 points")
    page.wait_for_url(re.compile(rf"runs={old.id}(,|%2C){new.id}"))

    # nothing is lost, and the address is all there is to share
    address = page.url
    page.goto(f"{own_server.url}/")
    settled(page)
    page.goto(address)
    expect(verdict).to_contain_text("new is better", timeout=60_000)

    # the rows of a cell
    page.get_by_role("button", name="2 · Broken").click()
    expect(page.locator(".st-key-compare_row_0")).to_contain_text("comment 40", timeout=60_000)
    expect(page.locator(".st-key-compare_row_0 mark.bad")).to_have_text("spam")
    page.get_by_test_id("stButtonGroup").get_by_text("Fixed 29").click()
    expect(page.locator(".st-key-compare_row_0")).to_contain_text("comment 0", timeout=60_000)

    # both charts are drawn
    expect(page.locator(".st-key-compare_chart .js-plotly-plot")).to_have_count(2)

    # the report opens without a network
    with page.expect_download() as caught:
        page.get_by_role("button", name="Report (HTML)").click()
    caught.value.save_as(tmp_path / "report.html")
    context = chromium.new_context(offline=True)
    report, requests = context.new_page(), []
    context.on("request", lambda one: requests.append(one.url))
    report.goto((tmp_path / "report.html").as_uri())
    expect(report.locator(".verdict").first).to_contain_text("new is better by 33.8 points")
    assert [one for one in requests if not one.startswith("file:")] == []
    context.close()
    assert page.get_by_test_id("stException").count() == 0


def test_a_base_and_its_adapter_answer_prompts_and_are_voted_on_by_keys(page, own_server, monkeypatch):
    monkeypatch.setenv("GLM_WORKSPACE", str(own_server.workspace))
    Settings.read().make_folders()
    write_lora(own_server.workspace / "checkpoints" / "other-words")
    page.goto(f"{own_server.url}/compare?mode=prompts")
    settled(page)
    ask = page.get_by_role("button", name=re.compile("^Ask 2 checkpoints"))
    expect(ask).to_be_visible(timeout=120_000)
    second = page.get_by_role("combobox", name=re.compile("Checkpoint 2"))
    second.click()
    page.get_by_role("option", name=re.compile("^other-words")).click()
    settled(page)
    precision = page.get_by_role("combobox", name=re.compile("Precision")).last
    precision.click()
    page.get_by_role("option", name="auto", exact=True).click()
    settled(page)
    ask.click()
    page.wait_for_url(re.compile(r"[?&]trial="))

    # names stay hidden until a vote, and a refresh in between loses nothing
    ballot = page.locator(".st-key-vote_ballot")
    expect(page.locator(".st-key-vote_buttons")).to_be_visible(timeout=240_000)
    assert "other-words" not in ballot.inner_text()
    left, right = (
        page.locator(f".st-key-vote_{side} .compare-text").inner_text() for side in ("left", "right")
    )
    assert left != right
    page.keyboard.press("1")
    told = page.locator(".st-key-vote_revealed")
    expect(told).to_contain_text("you chose left", timeout=60_000)
    expect(told).to_contain_text("other-words")
    page.reload()
    settled(page)
    expect(told).to_contain_text("you chose left", timeout=60_000)
    expect(page.get_by_role("button", name="Undo")).to_be_visible(timeout=60_000)
    page.keyboard.press("u")
    expect(told).to_have_count(0, timeout=60_000)
    expect(page.get_by_role("button", name="Right is better")).to_be_visible(timeout=60_000)
    page.keyboard.press("2")
    expect(told).to_contain_text("you chose right", timeout=60_000)
    with closing(sqlite3.connect(own_server.workspace / "workbench.db")) as database:
        assert database.execute("SELECT choice FROM trial_vote").fetchall() == [("right",)]
    assert page.get_by_test_id("stException").count() == 0
