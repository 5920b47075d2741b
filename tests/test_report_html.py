"""The report of a run: one file that needs nothing else, with the same numbers as the scores."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from glm_core import evaluate, report_html
from glm_core.jobs import JobStore

ROWS = [
    ("类型#裙*颜色#红", "红色的裙子很好看", "红色裙子好看"),
    ("类型#裙*颜色#蓝", "蓝色的裙子很清爽", ""),
    ("类型#衣*颜色#白", "白色的衬衫很干净", "白色的衬衫很干净"),
    ("类型#衣*颜色#黑", "<b>黑色</b>的大衣 & 很保暖", "<script>document.title = 'read'</script>"),
]


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "line", "circle"):
            return
        assert self.open.pop() == tag, tag


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workspace" / "workbench.db")


def imported(store, tmp_path, rows, **options):
    file = tmp_path / "predictions.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return evaluate.import_predictions(store, file, **options)


@pytest.fixture
def texts(store, tmp_path):
    rows = [
        {"content": a, "summary": b, "prediction": c, "site": "ab"[i % 2]} for i, (a, b, c) in enumerate(ROWS)
    ]
    return imported(store, tmp_path, rows, title="adverts <i>new</i>")


def test_the_report_of_texts_says_what_the_scores_say(store, texts):
    page = report_html.run_page(store, texts.id)
    for name, one in texts.scores.values.items():
        assert f"<td>{name}</td>" in page or f'<td class="n">{name}</td>' in page
        if one.estimate is not None and name not in report_html.RATIOS:
            assert f"{one.estimate:.2f}" in page
        assert texts.scores.formulas[name].replace("&", "&amp;")[:40] in page
    assert "1 blank predictions" in page
    assert "4 of 4 rows count" in page
    assert "rouge-l by site" in page
    assert "fewer than 30 rows" in page
    assert "Rows with the lowest score: 4 of 4" in page
    assert "<del>" in page and "<ins>" in page


def test_what_a_file_brings_is_text_in_the_report(store, texts):
    page = report_html.run_page(store, texts.id)
    assert "<script" not in page
    assert "<i>new" not in page
    unmarked = re.sub(r"</?(del|ins)>", "", page)
    assert "&lt;script&gt;document.title" in unmarked
    assert "&lt;b&gt;黑色&lt;/b&gt;的大衣 &amp; 很保暖" in unmarked
    assert "&lt;i&gt;new&lt;/i&gt;" in page


def test_the_report_is_well_formed_and_asks_for_nothing(store, texts):
    page = report_html.run_page(store, texts.id)
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {"src", "href", "action", "data"} & set(attributes), (tag, attributes)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "default-src 'none'" in page


def test_the_report_of_labels_has_their_table_and_no_rouge(store, tmp_path):
    rows = [
        {"label": "ab"[i % 2], "predict": "a" if i % 3 else "b", "kind": "xy"[i % 4 // 2]} for i in range(80)
    ]
    run = imported(store, tmp_path, rows, kind="label")
    page = report_html.run_page(store, run.id)
    table = run.scores.labels["confusion"]
    shown = re.findall(r"<tr><th>[ab]</th>(.*?)</tr>", page)
    assert [[int(n) for n in re.findall(r">(\d+)<", row)] for row in shown] == [list(row) for row in table]
    assert "a label is right or wrong" in page
    assert "accuracy by kind" in page
    assert "<td>rouge-l</td>" not in page


def test_the_spread_of_a_report_counts_every_scored_row(store, texts):
    page = report_html.run_page(store, texts.id)
    bars = [int(n) for n in re.findall(r"<title>[\d.]+ to [\d.]+: (\d+) rows</title>", page)]
    assert len(bars) == 20
    assert sum(bars) == texts.scores.n
