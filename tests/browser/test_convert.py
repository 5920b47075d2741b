"""Save as … in a real browser: a LoRA is merged into its base, and what was made is chosen and loaded."""

from __future__ import annotations

import json

from playwright.sync_api import expect

from glm_core.settings import MINI
from tests.browser.serving import badge, settled
from tests.pages.conftest import write_lora


def test_a_lora_is_merged_chosen_and_loaded(page, own_server):
    own = own_server.workspace / "checkpoints"
    own.mkdir(parents=True)
    write_lora(own / "polite", MINI, recorded=MINI.name)
    page.goto(f"{own_server.url}/models")
    settled(page)
    card = page.locator("[class*=st-key-checkpoint_]").filter(has_text="polite")
    card.get_by_role("button", name="Save as").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()

    card.get_by_role("button", name="Save as").press("Enter")
    start = dialog.get_by_role("button", name="Save", exact=True)
    expect(badge(page, "ready")).to_be_visible(timeout=120_000)
    expect(start).to_be_enabled()  # the embedded model being loaded, and the dialog still open
    start.press("Enter")
    expect(dialog).to_be_hidden()
    outcome = page.locator(".st-key-convert_outcome")
    expect(outcome.get_by_text("polite-merged is saved")).to_be_visible(timeout=60_000)
    page.reload()
    expect(outcome.get_by_text("polite-merged is saved")).to_be_visible()
    assert json.loads((own / "polite-merged" / "config.json").read_text())["model_type"] == "chatglm"

    outcome.get_by_role("button", name="Choose").click()
    expect(outcome).to_be_hidden()
    settled(page)  # until then the page may hold the last run's button beside the new one
    page.get_by_role("button", name="Load", exact=True).click()
    in_memory = page.locator(".st-key-in_memory")
    expect(in_memory.get_by_text("polite-merged")).to_be_visible(timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0
