"""A run, or a comparison of runs, as one HTML file: no script, font or picture from elsewhere, so it opens offline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from html import escape
from typing import TYPE_CHECKING, Any

from . import evaluate
from .compare import Comparison, MetricRow
from .evaluate import views
from .statistics import Interval

if TYPE_CHECKING:
    from .evaluate import PerRow, Run, Scores
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
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; margin: 1rem 0 0; }
.head b { font-size: 3.2rem; line-height: 1.1; font-variant-numeric: tabular-nums; } .head span { font-size: 1.15rem; }
tr.pale td { color: var(--muted); } del, ins { text-decoration: none; border-radius: .2rem; padding: 0 .1rem; }
del { background: #e11d483d; } ins { background: #05966942; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .8rem 1rem; font-size: .82rem; }
tr.main td.t { font-weight: 400; } .wide + .wide { margin-top: 1rem; }
td.diagonal { background: #05966926; }
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
    return _page(title, parts)


def _page(title: str, parts: Iterable[str]) -> str:
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
    pale: Set[int] = frozenset(),
) -> str:
    def cell(tag: str, place: int, text: str) -> str:
        style = ' class="n"' if place in right else ' class="t"' if place in texts and tag == "td" else ""
        return f"<{tag}{style}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join(
        f"<tr{' class=main' if number == main else ' class=pale' if number in pale else ''}>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- one run

WORST = 30  # rows in the report of a run
MOST_SLICES = 20
MOST_COLUMNS = 6  # of the file, by which the report is cut
ACCENT, MEAN = "#6366f1", "#d97706"
MOST_LABELS = 20
COUNTS = (
    ("n_empty", "blank predictions, which score 0 and count"),
    ("n_no_answer", "without a label, option or number, which are wrong"),
    ("n_failed", "failed, not counted"),
    ("n_left", "not answered yet"),
    ("n_no_reference", "without a reference, not counted"),
    ("n_truncated", "asked with a shortened prompt"),
)


def run_page(store: JobStore, run_id: str) -> str:
    """The page of one run: headline, metrics with formulas, spread, labels, slices, worst rows and how it was made."""
    run, scores = evaluate.run_of(store, run_id), evaluate.scores(store, run_id)
    table = evaluate.per_row(store, run_id)
    title = f"Evaluation: {run.title}"
    return _page(title, [f"<h1>{escape(title)}</h1>", *_run(store, run, scores, table)])


def _run(store: JobStore, run: Run, scores: Scores, table: PerRow) -> Iterable[str]:
    task = run.task
    manifest = evaluate.manifest(store, run.id)
    told = manifest["task"]
    asked = [task.input_name, task.kind] if run.imported else [
        str(told.get("checkpoint", "")) + (f" + {told['base']}" if told.get("base") else ""),
        task.precision.upper(), task.input_name, task.kind, task.method,
        f"{task.few_shot}-shot" if task.few_shot else "",
        f"step {run.step:,}" if run.step is not None else "",
    ]  # fmt: skip
    tags = "".join(f" [{escape(one)}]" for one in run.tags)
    yield f'<p class="muted">{escape(" · ".join(filter(None, asked)))}{tags}<br><small>{escape(run.id)}</small></p>'
    yield _headline(scores)
    counted = [f"{scores.n:,} of {scores.rows:,} rows count"]
    counted += [f"{getattr(scores, name):,} {what}" for name, what in COUNTS if getattr(scores, name)]
    yield f"<p>{escape('; '.join(counted))}</p>"
    for note in (*run.job.warnings, *scores.notes):
        yield f"<p>{escape(note)}</p>"
    yield "<h2>Scores</h2>" + _table(
        ("metric", "score", "95 % interval", "what it is"),
        [(name, *_scored(one, scores, name), scores.formulas[name]) for name, one in scores.values.items()],
        right=(1, 2), texts=(3,), main=list(scores.values).index(scores.main),
    )  # fmt: skip
    without = {one.reason for one in scores.values.values() if one.low is None and one.reason}
    yield "".join(f"<small>– {escape(reason)}</small> " for reason in sorted(without))
    if scores.hidden:
        yield f'<p class="muted">ROUGE, BLEU: {escape(next(iter(scores.hidden.values())))}</p>'
    for data_set, checkpoint, values in evaluate.published(task):
        rows = [
            (name, _scored(scores.values[name], scores, name)[0], f"{value:.2f}")
            for name, value in values.items()
            if name in scores.values
        ]
        yield (
            f"<h2>Published for {escape(data_set)}: {escape(checkpoint)}</h2>"
            + _table(("metric", "this run", "published"), rows, right=(1, 2))
            + f"<small>Comparable only where {escape(task.input_name)} is the test file of {escape(data_set)}.</small>"
        )
    if scores.kind == "text":
        yield _spread(scores, table)
    elif scores.labels:
        yield _labels(scores.labels)
    yield from _slices(store, run, scores, table)
    yield _worst(store, run, scores, table)
    yield (
        "<h2>How it was made</h2><details><summary>All settings</summary><pre>"
        + escape(json.dumps(manifest, ensure_ascii=False, indent=1))
        + "</pre></details>"
    )


def _factor(scores: Scores, metric: str) -> float:
    """What a score of a run is multiplied by to be shown."""
    return 1.0 if metric in RATIOS or scores.kind == "text" else 100.0


def _scored(one: Interval, scores: Scores, metric: str) -> tuple[str, str]:
    """(score, interval) as they are shown."""
    factor, unit = _factor(scores, metric), "" if scores.kind == "text" or metric in RATIOS else " %"
    digits = 3 if metric in RATIOS else 2
    if one.estimate is None:
        return "–", one.reason
    value = f"{one.estimate * factor:.{digits}f}{unit}"
    if one.low is None or one.high is None:
        return value, "–"
    return value, f"{one.low * factor:.{digits}f} to {one.high * factor:.{digits}f}{unit}"


def _headline(scores: Scores) -> str:
    one = scores.headline
    value, between = _scored(one, scores, scores.main)
    text = (
        f'<p class="head"><span>{escape(scores.main)}</span><b>{escape(value)}</b>'
        f"<span>95 % interval: {escape(between if one.low is not None else one.reason or between)}</span><span>n = {scores.n:,}</span></p>"
    )
    if one.estimate is None:
        return text
    factor = 100.0 / scores.unit
    middle = one.estimate * factor
    low, high = ((middle if edge is None else edge * factor) for edge in (one.low, one.high))
    return text + (
        '<svg viewBox="0 0 1000 44" role="img" aria-label="The score and its interval from 0 to 100">'
        '<rect x="0" y="8" width="1000" height="12" rx="6" fill="#8883"/>'
        f'<rect x="{low * 10:.1f}" y="8" width="{max((high - low) * 10, 4):.1f}" height="12" rx="6" fill="{ACCENT}" opacity="0.5"/>'
        f'<rect x="{middle * 10 - 2.5:.1f}" y="3" width="5" height="22" rx="2" fill="{ACCENT}"/>'
        '<text x="0" y="40" font-size="15" fill="currentColor">0</text>'
        '<text x="1000" y="40" font-size="15" text-anchor="end" fill="currentColor">100</text></svg>'
    )


def _spread(scores: Scores, table: PerRow) -> str:
    """How many rows got which score of the main metric, as bars."""
    bins = views.histogram(table.measure(scores.main))
    most = max(1, *(one.n for one in bins))
    left, width, top, height = 60.0, 900.0, 24.0, 200.0
    step = width / len(bins)
    parts = [
        f'<svg viewBox="0 0 {left + width + 20:.0f} {top + height + 30:.0f}" role="img" '
        f'aria-label="Rows by {escape(scores.main)}">',
        f'<line x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}" stroke="#888"/>',
        f'<text x="{left - 8}" y="{top + 5}" text-anchor="end" font-size="13" fill="currentColor">{most:,}</text>',
        f'<text x="{left - 8}" y="{top + height}" text-anchor="end" font-size="13" fill="currentColor">0</text>',
    ]
    for place, one in enumerate(bins):
        tall = height * one.n / most
        parts.append(
            f'<rect x="{left + place * step + 2:.1f}" y="{top + height - tall:.1f}" width="{step - 4:.1f}" '
            f'height="{tall:.1f}" rx="2" fill="{ACCENT}"><title>{one.low:g} to {one.high:g}: {one.n:,} rows</title></rect>'
        )
    for value in range(0, 101, 20):
        parts.append(
            f'<text x="{left + width * value / 100:.1f}" y="{top + height + 20:.0f}" text-anchor="middle" '
            f'font-size="13" fill="currentColor">{value}</text>'
        )
    mean = scores.headline.estimate
    if mean is not None:
        x = left + width * mean / 100
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}" stroke="{MEAN}" stroke-width="2"/>'
            f'<text x="{x:.1f}" y="{top - 6:.0f}" text-anchor="middle" font-size="13" fill="{MEAN}">mean {mean:.1f}</text>'
        )
    return f"<h2>Rows by {escape(scores.main)}</h2>" + "".join([*parts, "</svg>"])


def _labels(labels: Mapping[str, Any]) -> str:
    """What was taken for what, and the scores of every label."""
    names, table = [str(one) for one in labels["labels"]], labels["confusion"]
    text = "<h2>Labels</h2>"
    if len(names) <= MOST_LABELS:
        heads = "".join(f'<th class="n">{escape(one)}</th>' for one in (*names, "none of them"))
        rows = "".join(
            f"<tr><th>{escape(names[i])}</th>"
            + "".join(
                f'<td class="n{" diagonal" if i == j else ""}">{count:,}</td>' for j, count in enumerate(row)
            )
            + "</tr>"
            for i, row in enumerate(table)
        )
        text += (
            f'<div class="wide"><table><thead><tr><th>correct \\ answer</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    return text + _table(
        ("label", "rows", "answered", "precision", "recall", "F1"),
        [(str(one["label"]), f"{one['support']:,}", f"{one['predicted']:,}", share(one["precision"]),
          share(one["recall"]), share(one["f1"])) for one in labels["by_label"]],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip


def _slices(store: JobStore, run: Run, scores: Scores, table: PerRow) -> Iterable[str]:
    """The main score by the columns that have a few values each."""
    task = run.task
    known = {task.prompt, task.reference, task.prediction, *task.options}
    names = sorted((one for one in task.columns if one not in known), key=lambda one: one != task.subject)
    cells, shown = _few_values(store, run, names), 0
    for name in names:
        if shown == MOST_COLUMNS:
            return
        if name not in cells:
            continue
        found = views.slices(table, cells[name], scores.main if scores.kind == "text" else "accuracy")
        if len(found) < 2:
            continue
        shown += 1
        metric = scores.main if scores.kind == "text" else "accuracy"
        rows = [(one.value, f"{one.n:,}", *_scored(one.score, scores, metric)) for one in found[:MOST_SLICES]]
        more = f" The first {MOST_SLICES} of {len(found)}." if len(found) > MOST_SLICES else ""
        few = " Grey: fewer than 30 rows, which say little." if any(one.few for one in found) else ""
        yield f"<h2>{escape(metric)} by {escape(name)}</h2>" + _table(
            (name, "rows", metric, "95 % interval"), rows, right=(1, 2, 3),
            pale={place for place, one in enumerate(found) if one.few},
        ) + f"<small>{escape((more + few).strip())}</small>"  # fmt: skip


def _few_values(store: JobStore, run: Run, names: Sequence[str]) -> dict[str, list[str]]:
    """The cells of the columns with at most 60 different values, read in one pass."""
    at = {name: run.task.columns.index(name) for name in names}
    cells: dict[str, list[str]] = {name: [] for name in names}
    kinds: dict[str, set[str]] = {name: set() for name in names}
    for _, row, _ in store.iter_results(run.id) if names else ():
        for name in list(cells):
            cells[name].append(row[at[name]])
            kinds[name].add(row[at[name]].strip())
            if len(kinds[name]) > views.MOST_KINDS:
                del cells[name]
    return cells


def _worst(store: JobStore, run: Run, scores: Scores, table: PerRow) -> str:
    """The rows with the lowest score, or those that are wrong, with what differs marked."""
    found = views.places(table, "worst", scores.main)
    what = "Rows with the lowest score" if scores.kind == "text" else "Wrong rows"
    if not len(found):
        return f"<h2>{what}: 0</h2>"
    lines = []
    for place in found[:WORST].tolist():
        one = evaluate.answers_page(store, run.id, place, 1)[0]
        told, reference = str(one["reasoning"] or one["prediction"]), str(one["reference"])
        if scores.kind == "text":
            score = f"{float(table.measure(scores.main)[place]):.1f}"
            left, right = views.marked(_cut(told), _cut(reference))
        else:
            score = str(table.answer[place]) or "–"
            left, right = [(_cut(told), False)], [(_cut(reference), False)]
        lines.append(
            f'<tr><td class="n">{one["number"]:,}</td><td class="n">{escape(score)}</td>'
            f'<td class="t">{escape(_cut(str(one["question"])))}</td>'
            f'<td class="t">{_marked(left, "del") or "(blank)"}</td><td class="t">{_marked(right, "ins")}</td></tr>'
        )
    head = "".join(
        f"<th{' class=n' if place < 2 else ''}>{escape(one)}</th>"
        for place, one in enumerate(
            ("row", "score" if scores.kind == "text" else "read as", "question", "answer", "reference")
        )
    )
    count = f"{min(WORST, len(found)):,} of {len(found):,}"
    return (
        f"<h2>{what}: {count}</h2>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _marked(pieces: Sequence[tuple[str, bool]], tag: str) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" if other else escape(text) for text, other in pieces)
