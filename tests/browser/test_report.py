"""The report of a run as an analyst opens it: a file, without a network, in light and dark, as narrow as a phone."""

from __future__ import annotations

import pytest

from glm_core import report_html
from tests.test_report_html import store, texts  # noqa: F401


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_without_a_network(chromium, store, texts, tmp_path, scheme):  # noqa: F811
    file = tmp_path / "report.html"
    file.write_text(report_html.run_page(store, texts.id), encoding="utf-8")
    context = chromium.new_context(offline=True, color_scheme=scheme, viewport={"width": 390, "height": 800})
    page = context.new_page()
    asked, told = [], []
    context.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.goto(file.as_uri())
    assert page.locator("h1").inner_text() == "Evaluation: adverts <i>new</i>"
    assert page.title() == "Evaluation: adverts <i>new</i>"
    assert page.locator("svg").count() == 2
    assert page.locator(".head b").inner_text() == f"{texts.scores.headline.estimate:.2f}"
    assert page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth") <= 0
    assert "dark" in page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    context.close()
    assert [url for url in asked if not url.startswith("file:")] == []
    assert told == []
