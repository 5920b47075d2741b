"""A comparison of runs as one HTML file: no script, no font, no picture from elsewhere, so it opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from . import evaluate
from .compare import Comparison, MetricRow
from .statistics import Interval

if TYPE_CHECKING:
    from .jobs import JobStore

SHOWN = 50  # rows of a kind of flip
LONGEST = 400  # characters of a cell
RATIOS = ("length-ratio", "distinct-1", "distinct-2", "mcc")
COLOURS = {"better": "#1b7f4b", "not decisive": "#b26a00", "same": "#3b6ea5"}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --muted: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --muted: #a3aab5; } }
body { font: 16px/1.5 system-ui, "Noto Sans SC", "Microsoft YaHei", sans-serif; margin: 0 auto; max-width: 68rem;
  padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.verdict { border-left: .4rem solid var(--colour); background: var(--soft); padding: .8rem 1rem; margin: 1rem 0; }
.verdict b { color: var(--colour); text-transform: uppercase; letter-spacing: .04em; font-size: .85rem; }
.verdict p { margin: .2rem 0 0; font-size: 1.1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; }
.muted, small { color: var(--muted); } tr.main td { font-weight: 600; } svg { display: block; width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def comparison_page(store: JobStore, comparisons: Sequence[Comparison]) -> str:
    """The page of one or several comparisons."""
    names = list(dict.fromkeys(name for one in comparisons for name in (one.title_a, one.title_b)))
    title = f"Comparison: {', '.join(names)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    for one in comparisons:
        parts += _comparison(store, one)
    formulas = {row.metric: row.formula for one in comparisons for row in one.metrics}
    parts.append("<h2>What the numbers are</h2>" + _table(("metric", "formula"), list(formulas.items())))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )  # fmt: skip


def _comparison(store: JobStore, one: Comparison) -> Iterable[str]:
    verdict = one.verdict
    yield (
        f'<p class="muted">A: {escape(one.title_a)} <small>{escape(one.a)}</small><br>'
        f"B: {escape(one.title_b)} <small>{escape(one.b)}</small><br>{one.n:,} rows, differences are B &minus; A</p>"
    )
    yield (
        f'<div class="verdict" style="--colour: {COLOURS[verdict.outcome]}"><b>{verdict.outcome}</b>'
        f"<p>{escape(verdict.text)}</p></div>"
    )
    for note in one.notes:
        yield f"<p>{escape(note)}</p>"
    yield "<h2>Scores</h2>" + _scores(one)
    yield _differences(one)
    flips = one.flips
    names = (
        {"fixed": "Higher in B", "broken": "Lower in B", "both_wrong": "", "both_right": "Equal"}
        if one.kind == "text"
        else {"fixed": "Fixed: wrong in A, right in B", "broken": "Broken: right in A, wrong in B",
              "both_wrong": "Wrong in both", "both_right": "Right in both"}
    )  # fmt: skip
    yield "<h2>Rows</h2>"
    if one.agreement is not None:
        both, only_a, only_b, neither = one.agreement
        kappa = "" if one.kappa is None or one.kappa.value is None else (
            f"<p>Same answers beyond chance (Cohen's kappa): {one.kappa.value:.2f}</p>"
        )  # fmt: skip
        yield _table(
            ("", "B right", "B wrong"), [("A right", f"{both:,}", f"{only_a:,}"), ("A wrong", f"{only_b:,}", f"{neither:,}")], right=(1, 2)
        ) + kappa  # fmt: skip
    for name, what in names.items():
        numbers = getattr(flips, name)
        if what and name in ("fixed", "broken", "both_wrong"):
            yield _rows(store, one, name, f"{what}: {len(numbers):,}", opened=name != "both_wrong")
        elif what:
            yield f"<p>{what}: {len(numbers):,}</p>"
    if one.settings:
        rows = [(name, _plain(a), _plain(b)) for name, (a, b) in one.settings.items()]
        yield "<h2>Settings that differ</h2>" + _table(("", "A", "B"), rows)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _unit(one: Comparison, row: MetricRow) -> float:
    """What a score is multiplied by to be shown."""
    return 1.0 if row.metric in RATIOS or one.kind == "text" else 100.0


def _scores(one: Comparison) -> str:
    rows = []
    for row in one.metrics:
        factor = _unit(one, row)
        gap = "" if row.difference is None else f"{row.difference * factor:+.2f}"
        between = (
            ""
            if row.low is None or row.high is None
            else f"{row.low * factor:+.2f} to {row.high * factor:+.2f}"
        )
        p = row.reason if row.p_value is None else f"{row.p_value:.3g}"
        rows.append((row.metric, _score(row.a, factor), _score(row.b, factor), gap, between, p))
    main = [row.metric for row in one.metrics].index(one.verdict.metric) if any(
        row.metric == one.verdict.metric for row in one.metrics
    ) else None  # fmt: skip
    return _table(("metric", "A", "B", "B − A", "95 % interval", "p"), rows, right=(1, 2, 3, 4), main=main)


def _score(found: Interval, factor: float) -> str:
    if found.estimate is None:
        return found.reason
    if found.low is None or found.high is None:
        return f"{found.estimate * factor:.2f}"
    return f"{found.estimate * factor:.2f} ({found.low * factor:.2f} to {found.high * factor:.2f})"


def _differences(one: Comparison) -> str:
    """The differences with their intervals as bars around 0."""
    rows = [
        row
        for row in one.metrics
        if row.low is not None and row.high is not None and row.metric not in RATIOS
    ]
    if not rows:
        return ""
    factor = 1.0 if one.kind == "text" else 100.0
    reach = max(max(abs(row.low or 0), abs(row.high or 0)) * factor for row in rows)
    reach = max(reach, one.verdict.delta * 100, 0.1) * 1.1
    left, width, line = 150.0, 560.0, 26.0

    def x(value: float) -> float:
        return left + width / 2 + value / reach * width / 2

    height = line * len(rows) + 30
    edge = one.verdict.delta * 100
    parts = [
        f'<svg viewBox="0 0 {left + width + 20:.0f} {height:.0f}" role="img" aria-label="Differences B minus A">',
        f'<rect x="{x(-edge):.1f}" y="0" width="{x(edge) - x(-edge):.1f}" height="{height - 24:.0f}" fill="#8883"/>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 24:.0f}" stroke="#888"/>',
    ]
    for place, row in enumerate(rows):
        y = line * place + line / 2
        low, middle, high = ((value or 0.0) * factor for value in (row.low, row.difference, row.high))
        colour = COLOURS["better"] if low > 0 or high < 0 else COLOURS["not decisive"]
        parts.append(
            f'<text x="{left - 12:.0f}" y="{y + 4:.1f}" text-anchor="end" font-size="13" fill="currentColor">'
            f"{escape(row.metric)}</text>"
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="4"/>'
            f'<circle cx="{x(middle):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
        )
    for value in (-reach / 1.1, 0.0, reach / 1.1):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 8:.0f}" text-anchor="middle" font-size="12" fill="currentColor">'
            f"{value:+.1f}</text>"
        )
    return "".join([*parts, "</svg>"]) + (
        f"<small>Points of difference with 95 % intervals; the grey band is what counts as the same"
        f" (&plusmn;{edge:g}).</small>"
    )


def _rows(store: JobStore, one: Comparison, name: str, what: str, opened: bool) -> str:
    places = one.flips.places.get(name)
    if places is None or not len(places):
        return f"<p>{escape(what)}</p>"
    lines = []
    for idx_a, idx_b in places[:SHOWN].tolist():
        a, b = (evaluate.answers_page(store, run, idx, 1)[0] for run, idx in ((one.a, idx_a), (one.b, idx_b)))
        lines.append(
            (str(a["number"]), _cut(a["question"] or b["question"]), _cut(a["reference"]), _told(a), _told(b))
        )
    more = f" The first {SHOWN} are shown." if len(places) > SHOWN else ""
    table = _table(("row", "question", "reference", "A", "B"), lines, texts=(1, 2, 3, 4))
    return (
        f"<details{' open' if opened else ''}><summary>{escape(what + '.' + more)}</summary>{table}</details>"
    )


def _told(row: Mapping[str, Any]) -> str:
    return _cut(str(row["prediction"]) or "(blank)")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[int] = (),
    texts: Sequence[int] = (),
    main: int | None = None,
) -> str:
    def cell(tag: str, place: int, text: str) -> str:
        style = ' class="n"' if place in right else ' class="t"' if place in texts and tag == "td" else ""
        return f"<{tag}{style}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join(
        f"<tr{' class=main' if number == main else ''}>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
