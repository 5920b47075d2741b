"""Which runs are compared: the address, the choice with its reasons, and the comparison itself."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import job_panel, page, panels, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.compare import Comparison, MetricRow, Standing
    from glm_core.evaluate import Run
    from glm_core.jobs import JobStore
    from glm_core.statistics import Interval

MOST = 4
LISTED = 500
PATIENCE_S = 1.5  # for a comparison, before the page says that it is on its way
AGAIN_S = 10.0  # for which a refusal is kept, so that showing it does not begin the work anew
KEPT = 12  # comparisons of this process
REFUSED = 12  # runs that cannot join, shown with the reason
PICK, METRIC, DELTA = "compare_pick", "compare_metric", "compare_delta"
RATIOS = ("length-ratio", "distinct-1", "distinct-2", "mcc")
METRICS = {
    "accuracy": ("Accuracy", "准确率"),
    "macro-f1": ("Macro F1", "宏平均 F1"),
    "weighted-f1": ("Weighted F1", "加权 F1"),
    "balanced-accuracy": ("Balanced accuracy", "平衡准确率"),
    "mcc": ("MCC", "MCC"),
    "exact-match": ("Exact match", "完全匹配"),
    "length-ratio": ("Length ratio", "长度比"),
    "chrf": ("chrF", "chrF"),
}
KINDS = {
    "text": ("texts", "文本"),
    "label": ("labels", "标签"),
    "choice": ("multiple choice", "选择题"),
    "number": ("numbers", "数值"),
}


Key = tuple[str, tuple[str, ...], tuple[str, ...], str, float]  # database, runs, their states, metric, delta

_lock = threading.Lock()
_kept: OrderedDict[Key, _Work] = OrderedDict()


@dataclass(frozen=True)
class Found:
    """The runs in the order they were chosen, and every pair of them compared; the first is the reference."""

    runs: tuple[Run, ...]
    pairs: tuple[Comparison, ...]
    standing: Standing
    delta: float

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(run.id for run in self.runs)

    @property
    def against_first(self) -> tuple[Comparison, ...]:
        """The others against the reference, in their order."""
        return tuple(one for one in self.pairs if one.a == self.runs[0].id)

    @property
    def names(self) -> dict[str, str]:
        return names(self.runs)


def names(runs: Sequence[Run]) -> dict[str, str]:
    """A name for every run: its title, with the id where two titles are the same."""
    titles = [run.title for run in runs]
    return {
        run.id: run.title if titles.count(run.title) == 1 else f"{run.title} ({run.id[-6:]})" for run in runs
    }


def metric_name(metric: str) -> str:
    """A metric as it is called."""
    return t(*METRICS[metric]) if metric in METRICS else metric.upper()


def factor(one: Comparison, metric: str) -> float:
    """What a score is multiplied by to be shown."""
    return 1.0 if metric in RATIOS or one.kind == "text" else 100.0


def decimals(metric: str) -> int:
    """How many digits behind the point a score is shown with."""
    return 3 if metric in RATIOS else 1


def main_row(one: Comparison) -> MetricRow:
    """The line of the deciding metric."""
    return next(row for row in one.metrics if row.metric == one.verdict.metric)


def score(found: Interval, times: float, digits: int = 1) -> str:
    """A score with its interval: 84.0 (79.1 to 88.0)."""
    if found.estimate is None:
        return "–"
    shown = f"{found.estimate * times:.{digits}f}"
    if found.low is None or found.high is None:
        return shown
    low, high = f"{found.low * times:.{digits}f}", f"{found.high * times:.{digits}f}"
    return t(f"{shown} ({low} to {high})", f"{shown}（{low} 至 {high}）")


def p_text(value: float | None) -> str:
    """A p value: p = 0.031."""
    return "–" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


# --- choosing -------------------------------------------------------------------------------------------------


def asked() -> list[str]:
    """The runs of the address, each once."""
    return list(dict.fromkeys(one for one in state.query("runs").split(",") if one))


def choose() -> tuple[list[Run], str, float] | None:
    """The form: runs, metric and what counts as the same; None until two runs are chosen."""
    from glm_core import evaluate

    store = state.job_store()
    found = {run.id: run for run in evaluate.runs(store, limit=LISTED)}
    usable = {id_: run for id_, run in found.items() if run.job.done and run.state not in job_panel.MOVING}
    wanted = _wanted(store, usable)
    with st.container(border=True, key="compare_choose"):
        panels.section(t("Runs", "评测"), "checklist")
        if not usable:
            st.info(
                t(
                    "There is no finished evaluation yet. Evaluate two checkpoints on one file, or import predictions "
                    "made elsewhere, then compare them here.",
                    "还没有已完成的评测。请先用同一文件评测两个检查点，或导入其他程序的预测，再在此对比。",
                ),
                icon=":material/info:",
            )
            page.link("evaluate", ("Evaluate or import", "评测或导入"))
            return None
        refused = _refused(wanted, usable)
        options = [id_ for id_ in usable if id_ in wanted or id_ not in refused]
        chosen = _pick(wanted, options, usable)
        if refused:
            with st.expander(t(f"Cannot join: {len(refused)}", f"不能加入：{len(refused)} 个")):
                for id_, error in list(refused.items())[:REFUSED]:
                    st.caption(f"**{plain(usable[id_].title)}**: {plain(said(error.message))}")
                if len(refused) > REFUSED:
                    more = len(refused) - REFUSED
                    st.caption(t(f"and {more} more", f"以及其他 {more} 个"))
        runs = [usable[id_] for id_ in chosen]
        metric, delta = _how(runs)
    if len(runs) < 2:
        st.caption(
            t(
                "Choose two to four runs of the same question; the first one is the reference.",
                "请选择 2 至 4 个同一问题的评测；第一个作为参照。",
            )
        )
        return None
    return runs, metric, delta


def _wanted(store: object, usable: dict[str, Run]) -> list[str]:
    """The runs of the address that can be shown; the others are named."""
    from glm_core import evaluate

    wanted = []
    for id_ in asked():
        if id_ in usable:
            wanted.append(id_)
            continue
        try:
            run = evaluate.run_of(store, id_)  # type: ignore[arg-type]
        except GLMError as error:
            panels.problem(error)
            continue
        if run.job.done and run.state not in job_panel.MOVING:
            usable[id_] = run  # older than the list goes
            wanted.append(id_)
        else:
            panels.problem(
                GLMError(f"The run {run.title!r} has no answers yet.", "Wait for it, or choose another.")
            )
    if len(wanted) > MOST:
        st.caption(t(f"Only the first {MOST} are compared.", f"仅对比前 {MOST} 个。"))
    return wanted[:MOST]


def _refused(wanted: list[str], usable: dict[str, Run]) -> dict[str, GLMError]:
    """The runs that cannot be compared with the first chosen one, each with the reason."""
    from glm_core import compare

    if not wanted:
        return {}
    first = usable[wanted[0]]
    reasons = {id_: compare.refusal(first, run) for id_, run in usable.items() if id_ not in wanted}
    return {id_: error for id_, error in reasons.items() if error is not None}


def _pick(wanted: list[str], options: list[str], usable: dict[str, Run]) -> list[str]:
    titles = [usable[id_].title for id_ in options]

    def label(id_: str) -> str:
        run = usable[id_]
        parts = [run.title if titles.count(run.title) == 1 else f"{run.title} ({id_[-6:]})"]
        if run.scores is not None and run.scores.headline.estimate is not None:
            value = run.scores.headline.estimate / run.scores.unit * 100
            parts.append(f"{metric_name(run.scores.main)} {value:.1f}")
        parts.append(t(f"{run.job.done:,} rows", f"{run.job.done:,} 行"))
        if ago := panels.format_ago(run.job.created, time.time()):
            parts.append(ago)
        return " · ".join(parts)

    if state.session("compare.drawn") != wanted or state.session(PICK) is None:
        state.session_set(PICK, wanted)  # the address says so: a link, the browser's back button
        state.session_set("compare.drawn", wanted)

    def changed() -> None:
        now = list(state.session(PICK) or [])
        state.session_set("compare.drawn", now)
        state.query_set("runs", ",".join(now) or None)

    return list(
        st.multiselect(
            t("Runs to compare", "要对比的评测"),
            options,
            format_func=label,
            max_selections=MOST,
            key=PICK,
            on_change=changed,
            placeholder=t("Type to search", "输入以搜索"),
            help=t(
                "Two to four. The first is the reference: differences are of the others against it.",
                "2 至 4 个。第一个是参照，差异均为其他评测与它相比。",
            ),
            label_visibility="collapsed",
        )
    )


def _how(runs: Sequence[Run]) -> tuple[str, float]:
    """The deciding metric and what counts as the same."""
    if len(runs) < 2:
        return "", 0.01
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    choices = _deciding(runs)
    wanted = state.query("metric")
    with left:
        metric = st.selectbox(
            t("Decided by", "判定指标"),
            choices,
            index=choices.index(wanted) if wanted in choices else 0,
            format_func=metric_name,
            key=f"{METRIC}_{'_'.join(choices)}",
            disabled=len(choices) < 2,
            help=t(
                "The metric of the verdict. Only metrics that every row has a part in can be tested.",
                "用于下结论的指标。只有每行都有分值的指标才能检验。",
            ),
        )
    with right:
        points = st.number_input(
            t("The same within (points)", "视为相同的范围（百分点）"),
            0.0, 50.0, _points(), 0.5, format="%.1f", key=DELTA,
            help=t(
                "A difference whose whole interval lies within this is called the same. 1 point is 1 of 100.",
                "若差异的整个区间都在此范围内，则视为相同。1 个百分点即 100 分中的 1 分。",
            ),
        )  # fmt: skip
    state.query_set("metric", None if metric == choices[0] else str(metric))
    state.query_set("delta", None if points == 1.0 else f"{points:g}")
    return str(metric), float(points) / 100


def _points() -> float:
    try:
        return min(50.0, max(0.0, float(state.query("delta", "1"))))
    except ValueError:
        return 1.0


def _deciding(runs: Sequence[Run]) -> list[str]:
    from glm_core import metrics

    if any(run.task.kind != "text" for run in runs):
        return ["accuracy"]
    both = [name for name in metrics.OF_ROWS if all(name in run.task.metrics for run in runs)]
    return ["rouge-l", *(name for name in both if name != "rouge-l")]


# --- comparing ------------------------------------------------------------------------------------------------


def found(runs: Sequence[Run], metric: str, delta: float) -> Found | None:
    """Every pair of the runs compared; None while that is being computed, which a live part then says.

    GLMError with the reason where they cannot be compared.
    """
    from glm_core import compare

    stamps = tuple(f"{run.title}-{run.job.attempt}-{run.job.done}-{run.job.failed}" for run in runs)
    work = _work((str(state.job_store().path), tuple(run.id for run in runs), stamps, metric, delta))
    if not work.ended.wait(PATIENCE_S):
        _waiting(sum(run.job.done for run in runs), work)
        return None
    if work.error is not None:
        raise GLMError(work.error.message, work.error.todo)
    runs, pairs = _shortened(runs, work.pairs)
    return Found(tuple(runs), pairs, compare.standing(pairs), delta)


def _shortened(
    runs: Sequence[Run], pairs: tuple[Comparison, ...]
) -> tuple[Sequence[Run], tuple[Comparison, ...]]:
    """Titles without the file, where all runs are called after the same one."""
    ends = {f" on {run.task.input_name}" for run in runs}
    titles = {run.id: run.title.removesuffix(min(ends)) for run in runs}
    if len(ends) > 1 or len(set(titles.values())) < len(runs) or not all(titles.values()):
        return runs, pairs
    return (
        [replace(run, title=titles[run.id]) for run in runs],
        tuple(replace(one, title_a=titles[one.a], title_b=titles[one.b]) for one in pairs),
    )


class _Work:
    """One comparison in the background: runs of 100,000 rows take seconds, and no screen waits for them."""

    def __init__(self, key: Key) -> None:
        self.pairs: tuple[Comparison, ...] = ()
        self.error: GLMError | None = None
        self.ended = threading.Event()
        self.begun = time.monotonic()
        self.again = float("inf")  # when a failure is tried once more
        _, ids, _, metric, delta = key
        threading.Thread(
            target=self._run,
            args=(state.job_store(), ids, metric, delta),
            name="glm-compare",
            daemon=True,
        ).start()

    def _run(self, store: JobStore, ids: tuple[str, ...], metric: str, delta: float) -> None:
        from glm_core import compare

        try:
            self.pairs = tuple(compare.compare_all(store, ids, metric=metric, delta=delta))
        except GLMError as error:
            self.error = GLMError(error.message, error.todo)
        except Exception as error:  # a thread has no screen
            self.error = GLMError(
                f"The comparison did not end: {type(error).__name__}: {error}.", "The terminal shows where."
            )
            raise
        finally:
            self.again = time.monotonic() + AGAIN_S
            self.ended.set()


def _work(key: Key) -> _Work:
    """The comparison of these runs, begun where nobody has asked for it yet."""
    with _lock:
        work = _kept.pop(key, None)
        if work is None or (work.error is not None and time.monotonic() > work.again):
            work = _Work(key)
        _kept[key] = work
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return work


@live(run_every=0.5)
def _waiting(rows: int, work: _Work) -> None:
    if work.ended.is_set():
        st.rerun()
    seconds = panels.format_duration(time.monotonic() - work.begun)
    st.info(
        t(f"Comparing {rows:,} answers … {seconds}", f"正在对比 {rows:,} 个回答……{seconds}"),
        icon=":material/progress_activity:",
    )


def pair_of(this: Found) -> Comparison:
    """The comparison with the reference that is looked at; a choice where there are several."""
    pairs = this.against_first
    if len(pairs) == 1:
        return pairs[0]
    shown = this.names
    key = f"compare_pair_{'_'.join(this.ids)}"
    if state.session(key) not in [one.b for one in pairs]:
        state.session_set(key, pairs[0].b)
    chosen = st.segmented_control(
        t("Against the reference", "与参照相比"),
        [one.b for one in pairs],
        format_func=lambda id_: plain(shown[id_]),
        required=True,
        key=key,
    )
    return next(one for one in pairs if one.b == chosen)
