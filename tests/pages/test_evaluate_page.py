"""Evaluation: a file asked of checkpoints, predictions imported, the dashboard of a run, and the list of all runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from glm_core import evaluate, jobs
from glm_core.evaluate.task import rows_of
from glm_core.settings import Settings
from glm_core.tables import open_table
from pages.shared import evaluate_beside, evaluate_figures, evaluate_rows, evaluate_run, evaluate_words
from tests.conftest import REPOSITORY

CHOICES = "subject,question,A,B,C,D,answer\n" + "".join(
    f"{'math' if i % 2 else 'art'},问题 {i}?,一,二,三,四,{'ABCD'[i % 4]}\n" for i in range(12)
)
LABELS = "text,label,site\n" + "".join(
    f"评论 {i},{'spam' if i % 3 else 'normal'},{'ab'[i % 2]}\n" for i in range(40)
)


@pytest.fixture
def store():
    return jobs.store(Settings.read())


def opened(**query: str) -> AppTest:
    """The page as a browser opens it, run once."""
    app = AppTest.from_file(str(REPOSITORY / "Home.py"), default_timeout=60)
    app.switch_page("pages/evaluate.py")
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def imported(store, tmp_path, rows, name="predictions.jsonl", **options):
    file = tmp_path / name
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return evaluate.import_predictions(store, file, **options)


def texts_of(count: int = 40) -> list[dict[str, str]]:
    whole = "这件大衣很保暖颜色也好看版型修身适合通勤"
    return [
        {
            "content": f"类型#大衣*编号#{i}", "summary": whole, "prediction": whole[: i % 20] if i % 10 else "",
            "site": "ab"[i % 2],
        }
        for i in range(count)
    ]  # fmt: skip


def labels_of(count: int = 60, right: int = 4) -> list[dict[str, str]]:
    return [
        {
            "comment": f"评论 {i}", "label": "spam" if i % 3 else "normal",
            "predict": ("spam" if i % 3 else "normal") if i % right else "不知道", "site": "ab"[i % 2],
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def texts(store, tmp_path):
    return imported(store, tmp_path, texts_of(), title="adverts", kind="text")


@pytest.fixture
def labels(store, tmp_path):
    return imported(store, tmp_path, labels_of(), name="labels.jsonl", title="comments", kind="label")


def button(app, start: str):
    return next(one for one in app.button if str(one.key).startswith(start))


def by_key(elements, start: str):
    return next(one for one in elements if str(one.key).startswith(start))


def upload(app, what: str, name: str, data: str):
    widget = by_key(app.get("file_uploader"), f"evaluate_{what}_upload")
    return widget.set_value((name, data.encode(), "text/csv")).run()


def page_text(app, words) -> str:
    html = "\n".join(str(one.proto.body) for one in app.get("html"))
    badges = "\n".join(str(one.proto.body) for one in app.get("badge")) if app.get("badge") else ""
    return f"{words(app)}\n{html}\n{badges}".replace("\\", "")


def finished(store, run_id: str, seconds: float = 120):
    jobs.supervisor(Settings.read())
    end = time.monotonic() + seconds
    while store.get(run_id).state not in ("done", "failed") and time.monotonic() < end:
        time.sleep(0.05)
    assert store.get(run_id).state == "done", store.get(run_id).message
    return evaluate.run_of(store, run_id)


# --- a new run


def test_the_page_opens_without_a_model_and_offers_samples(words):
    app = opened()
    assert not app.exception
    assert "Choose a labelled file" in words(app)
    assert {one.key for one in app.button} >= {"evaluate_sample_adverts", "evaluate_sample_comments"}


@pytest.mark.parametrize(
    ("name", "data", "kind", "says"),
    [
        ("choices.csv", CHOICES, "choice", "the options A, B, C"),
        ("labels.csv", LABELS, "label", "few and repeat: normal / spam"),
        ("sums.jsonl", '{"question": "1+1?", "answer": "so #### 2"}\n{"question": "2+2?", "answer": "#### 4"}',
         "number", "numbers"),
        ("texts.csv", "prompt,response\na,一二三四五\nb,六七八九十\n", "text", "texts of their own"),
    ],
)  # fmt: skip
def test_the_kind_of_a_file_is_found_and_its_reason_said(words, name, data, kind, says):
    app = upload(opened(), "file", name, data)
    assert not app.exception
    chosen = by_key(app.get("button_group"), "evaluate_kind_")
    assert chosen.value == kind
    assert says in page_text(app, words)


def test_another_kind_may_be_chosen_and_the_page_says_that_it_was(words):
    app = upload(opened(), "file", "labels.csv", LABELS)
    by_key(app.get("button_group"), "evaluate_kind_").set_value("text").run()
    assert not app.exception
    assert "Chosen by hand" in words(app)
    assert "Labels" in words(app)


def test_unknown_columns_are_asked_for_and_nothing_can_be_started(words):
    app = upload(opened(), "file", "odd.csv", "first,second\n1,一\n2,二\n")
    assert "choose both" in words(app)
    assert not [one for one in app.button if str(one.key).startswith("evaluate_start")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda app: by_key(app.text_area, "evaluate_template_").set_value("no place for a cell"),
            "uses no column",
        ),
        (
            lambda app: by_key(app.text_input, "evaluate_labels_").set_value("spam"),
            "is not among spam",
        ),
        (lambda app: by_key(app.number_input, "evaluate_shots_").set_value(20), None),
    ],
)
def test_a_wrong_question_is_a_sentence_and_nothing_can_be_started(words, change, says):
    app = change(upload(opened(), "file", "labels.csv", LABELS)).run()
    assert not app.exception
    if says is None:
        assert [one for one in app.button if str(one.key).startswith("evaluate_start")]
        return
    if "among" in says:  # the rows themselves are looked at when the run starts
        button(app, "evaluate_start_").click().run()
        assert not app.exception
    assert says in page_text(app, words)


def test_rouge_is_hidden_for_labels_and_the_reason_said(words):
    app = upload(opened(), "file", "labels.csv", LABELS)
    assert "a label is right or wrong" in words(app)
    offered = by_key(app.multiselect, "evaluate_metrics_").options
    assert "Accuracy" in offered
    assert "ROUGE-L" not in offered


def test_a_file_is_asked_of_a_checkpoint_and_the_run_is_in_the_address(store, model_folder, words):
    app = upload(opened(), "file", "choices.csv", CHOICES)
    app.multiselect(key="evaluate_checkpoints").set_value([str(model_folder)]).run()
    button(app, "evaluate_start_").click().run()
    assert not app.exception
    run_id = app.query_params["run"]
    run = finished(store, run_id)
    assert run.task.kind == "choice"
    assert run.scores.n == 12
    app = opened(run=run_id)
    assert not app.exception
    shown = page_text(app, words)
    assert evaluate_words.number(run.scores.headline.estimate, "choice", "accuracy") in shown
    assert "on 12 rows" in shown
    assert f"{round(run.scores.headline.estimate * 12)} of 12" in shown


def test_several_checkpoints_and_precisions_give_a_run_each(store, model_folder):
    app = upload(opened(), "file", "choices.csv", CHOICES)
    app.multiselect(key="evaluate_checkpoints").set_value([str(model_folder)]).run()
    app.multiselect(key="evaluate_precisions").set_value(["fp32", "bf16"]).run()
    button(app, "evaluate_start_").click().run()
    assert not app.exception
    assert "run" not in app.query_params
    found = evaluate.runs(store)
    assert sorted(one.task.precision for one in found) == ["bf16", "fp32"]
    assert sorted(one.title for one in found) == [
        "tiny-chatglm3 on choices.csv (BF16)", "tiny-chatglm3 on choices.csv (FP32)",
    ]  # fmt: skip
    assert any("2 runs are under way" in one.value for one in app.success)


def test_examples_are_shown_in_front_and_not_asked(words):
    app = upload(opened(), "file", "choices.csv", CHOICES)
    by_key(app.number_input, "evaluate_shots_").set_value(2).run()
    assert not app.exception
    shown = [one.value for one in app.code]
    assert any("→ A" in one for one in shown)
    assert any(one.startswith("问题 2?") for one in shown)


# --- importing


def test_predictions_are_imported_scored_by_the_job_thread_and_shown(store, words):
    app = opened()
    by_key(app.get("button_group"), "evaluate_way").set_value("import").run()
    lines = "\n".join(
        json.dumps({"labels": f"第 {i} 条裙子", "predict": f"第 {i} 条裙子" if i % 2 else ""})
        for i in range(10)
    )
    app = upload(app, "import", "generated_predictions.txt", lines)
    assert not app.exception
    assert [one.value for one in app.selectbox if str(one.key).startswith("evaluate_import_")] == [
        "labels", "predict", "",
    ]  # fmt: skip
    button(app, "evaluate_import_0").click().run()
    assert not app.exception
    run_id = app.query_params["run"]
    run = finished(store, run_id)
    assert (run.task.kind, run.scores.n, run.scores.n_empty) == ("text", 10, 5)
    app = opened(run=run_id)
    shown = page_text(app, words)
    assert "50.0" in shown
    assert "5 empty: score 0, counted" in shown


def test_an_import_without_known_columns_waits_for_both(words):
    app = opened()
    by_key(app.get("button_group"), "evaluate_way").set_value("import").run()
    app = upload(app, "import", "odd.csv", "first,second\na,b\n")
    assert "choose both" in words(app)
    assert button(app, "evaluate_import_0").disabled
    by_key(app.selectbox, "evaluate_import_reference").set_value("first").run()
    by_key(app.selectbox, "evaluate_import_prediction").set_value("second").run()
    assert not button(app, "evaluate_import_0").disabled


# --- the dashboard


def test_the_headline_says_score_interval_rows_and_what_was_counted(texts, words):
    app = opened(run=texts.id)
    assert not app.exception
    one = texts.scores.headline
    shown = page_text(app, words)
    assert f"{one.estimate:.1f}" in shown
    assert f"95 % interval {one.low:.1f} – {one.high:.1f}" in shown
    assert "on 40 rows" in shown
    assert "4 empty: score 0, counted" in shown
    assert evaluate.formula("text", "rouge-l")[:60] in shown


def test_every_metric_has_its_interval_and_its_formula(texts):
    app = opened(run=texts.id)
    cards = {one.label: one for one in app.metric}
    for name, one in texts.scores.values.items():
        card = cards[evaluate_words.metric(name)]
        assert card.value == evaluate_words.number(one.estimate, "text", name)
        assert card.delta == evaluate_words.between(one, "text", name)
        assert evaluate.formula("text", name)[:20] in card.proto.help.replace("\\", "")


def test_labels_are_measured_against_always_saying_the_same(labels, words):
    app = opened(run=labels.id)
    assert not app.exception
    shown = page_text(app, words)
    assert "always answering spam (66.7%)" in shown
    assert "15 with none of the labels: wrong" in shown
    assert "a label is right or wrong" in shown
    assert "ROUGE-1" not in {one.label for one in app.metric}


def answered(store, tmp_path, state: str, answers: dict[int, str]):
    """A run of eight adverts that a checkpoint has given these answers to so far."""
    rows = [(f"类型#裙*{i}", f"第{i}条好看的裙子") for i in range(8)]
    task = evaluate.plan(_csv(tmp_path / "adgen.csv", "content,summary", rows))
    job = store.create("evaluate", "adgen", task.to_json() | {"checkpoint": "x", "precision": "fp32"})
    table = open_table(Path(task.input_path))
    store.add_rows(job.id, (one.cells for one in rows_of(task, table)))
    store.mark_ready(job.id)
    store.claim(("evaluate",), jobs.this_process(), job.id)
    store.save_results(job.id, [jobs.Result(i, "ok", told) for i, told in answers.items()])
    store.release(job.id, jobs.this_process(), state)
    return job


def test_published_scores_stand_beside_the_columns_of_adgen(store, tmp_path, words):
    job = answered(store, tmp_path, "done", dict.fromkeys(range(8), "好看的裙子"))
    app = opened(run=job.id)
    assert not app.exception
    assert any("ADGEN" in one.label for one in app.expander)
    assert "Compare only where your file" in words(app)


def test_a_paused_run_shows_what_it_has_and_what_is_missing(store, tmp_path, words):
    job = answered(store, tmp_path, "paused", {0: "第0条好看的裙子", 1: ""})
    app = opened(run=job.id)
    assert not app.exception
    shown = page_text(app, words)
    assert "on 2 rows" in shown
    assert "6 not answered yet" in shown
    assert "Only 2 rows" in shown
    assert button(app, f"resume_page_{job.id}")


def _csv(path: Path, head: str, rows) -> Path:
    path.write_text("\n".join([head, *(",".join(row) for row in rows)]), encoding="utf-8")
    return path


def test_the_worst_rows_come_first_with_what_differs_marked(texts, words):
    app = opened(run=texts.id, view="rows")
    assert not app.exception
    table = app.dataframe[0].value
    assert list(table["ROUGE-L"])[:4] == ["0.0"] * 4
    scores = [float(one) for one in table["ROUGE-L"]]
    assert scores == sorted(scores)
    assert "<ins>" in page_text(app, words)


@pytest.mark.parametrize(("order", "rows"), [("best", 40), ("empty", 4), ("random", 40), ("file", 40)])
def test_rows_are_listed_as_asked_for(texts, order, rows):
    app = opened(run=texts.id, view="rows")
    by_key(app.get("button_group"), "evaluate_order_").set_value(order).run()
    assert not app.exception
    assert len(app.dataframe[0].value) == rows
    if order == "empty":
        assert set(app.dataframe[0].value["answer"]) == {"(empty)"}


def test_wrong_labels_are_listed_with_their_number(labels):
    app = opened(run=labels.id, view="rows")
    assert not app.exception
    table = app.dataframe[0].value
    assert len(table) == 15
    assert set(table["Accuracy"]) == {"wrong"}


def test_slices_have_their_rows_and_few_rows_are_marked(texts):
    app = opened(run=texts.id, view="slices")
    app.selectbox(key=f"evaluate_slice_{texts.id}").set_value("site").run()
    assert not app.exception
    table = app.dataframe[-1].value
    assert list(table["rows"]) == [20, 20]
    assert set(table["certainty"]) == {"few rows"}
    app.selectbox(key=f"evaluate_slice_{texts.id}").set_value("#length").run()
    assert not app.exception
    assert app.dataframe[-1].value["rows"].sum() == 40


def test_what_a_file_brings_is_not_read_as_markup(store, tmp_path, words):
    rows = [{"label": "<b>a</b>", "predict": "<img src=x>", "prompt": "**bold** ![x](http://x)"}] * 4
    run = imported(store, tmp_path, rows, kind="text", title="![x](http://evil) <script>")
    app = opened(run=run.id, view="rows")
    assert not app.exception
    html = "\n".join(str(one.proto.body) for one in app.get("html"))
    assert "<img" not in html
    assert "&lt;img" in html.replace("<del>", "").replace("</del>", "").replace("<ins>", "").replace(
        "</ins>", ""
    )
    assert "![x](http://evil)" not in words(app)


def test_runs_on_the_same_file_name_the_leader_and_its_certainty(store, tmp_path, words):
    good = imported(store, tmp_path, labels_of(60, 20), name="one.jsonl", title="good", kind="label")
    imported(store, tmp_path, labels_of(60, 2), name="two.jsonl", title="poor", kind="label")
    app = opened(run=good.id)
    assert not app.exception
    shown = page_text(app, words)
    assert "**good** leads" in shown
    found = evaluate.runs(store)
    order = evaluate_beside.alike(found[0], found)
    assert [one.title for one in order] == ["good", "poor"]
    said = evaluate_beside.verdict(order[1], order[0])
    assert said.outcome == "better"
    assert said.text in shown


def test_runs_on_other_rows_are_not_put_beside_each_other(store, tmp_path, words):
    imported(store, tmp_path, labels_of(60), name="one.jsonl", title="one", kind="label")
    other = [row | {"label": "spam" if row["label"] == "normal" else "normal", "comment": row["comment"] + "!"}
             for row in labels_of(60)]  # fmt: skip
    run = imported(store, tmp_path, other, name="two.jsonl", title="two", kind="label")
    assert len(evaluate_beside.alike(run, evaluate.runs(store))) == 1
    assert "leads" not in words(opened(run=run.id))


def test_scores_by_precision_are_drawn_and_the_missing_ones_offered(store, model_folder, tmp_path, words):
    file = _csv(tmp_path / "choices.csv", *_head_and_rows())
    task = evaluate.with_model(evaluate.plan(file), model_folder, precision="fp32", device="cpu")
    run = finished(store, evaluate.start(store, task).id)
    app = opened(run=run.id, view="series")
    assert not app.exception
    start = app.button(key="evaluate_levels_start")
    assert start.label == "The same at BF16 / INT8 / INT4"
    start.click().run()
    assert not app.exception
    found = {one.task.precision: one for one in evaluate.runs(store)}
    assert set(found) == {"fp32", "bf16", "int8", "int4"}
    for one in found.values():
        finished(store, one.id)
    app = opened(run=run.id, view="series")
    assert not app.exception
    assert len(app.get("plotly_chart")) == 1
    assert not [one for one in app.button if one.key == "evaluate_levels_start"]


def _head_and_rows():
    first, *rest = CHOICES.strip().splitlines()
    return first, [tuple(row.split(",")) for row in rest]


def test_a_training_shows_its_steps_and_offers_the_missing_ones(store, model_folder, tmp_path, monkeypatch):
    import shutil

    from glm_core.finetune import state as training

    folder = tmp_path / "models" / "my-training"
    for step in (10, 20):
        shutil.copytree(model_folder, folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / training.STATE).write_text("{}")
    monkeypatch.setenv("GLM_MODELS", str(tmp_path / "models"))
    file = _csv(tmp_path / "choices.csv", *_head_and_rows())
    task = evaluate.with_model(evaluate.plan(file), folder / "checkpoint-20", precision="fp32", device="cpu")
    run = finished(store, evaluate.start(store, task).id)
    app = opened(run=run.id, view="series")
    start = app.button(key="evaluate_steps_start")
    assert "(2)" in start.label
    start.click().run()
    assert not app.exception
    steps = [one for one in evaluate.runs(store) if one.task.step is not None]
    assert sorted(one.step for one in steps) == [10, 20]
    for one in steps:
        finished(store, one.id)
    app = opened(run=steps[0].id, view="series")
    assert not app.exception
    assert len(app.get("plotly_chart")) == 1
    # One whose rows are all scored is still on its way to its end.
    with store.writing() as db:
        db.execute("UPDATE job SET state = 'running' WHERE id = ?", (steps[1].id,))
    assert evaluate.run_of(store, steps[1].id).scores is not None
    assert not opened(run=steps[0].id, view="series").exception


# --- the list of runs


def test_runs_are_found_by_text_kind_and_tag(store, texts, labels, words):
    evaluate.tag(store, labels.id, ["spam", "week 1"])
    app = opened()
    assert not app.exception
    listed = words(app)
    assert "adverts" in listed and "comments" in listed
    app.text_input(key="evaluate_find").set_value("comm").run()
    assert _listed(app) == [labels.id]
    app.text_input(key="evaluate_find").set_value("").run()
    app.selectbox(key="evaluate_filter_kind").set_value("text").run()
    assert _listed(app) == [texts.id]
    app.selectbox(key="evaluate_filter_kind").set_value("").run()
    app.selectbox(key="evaluate_filter_tag").set_value("week 1").run()
    assert _listed(app) == [labels.id]


def _listed(app) -> list[str]:
    prefix = "evaluate_pick_"
    return [str(one.key)[len(prefix) :] for one in app.checkbox if str(one.key).startswith(prefix)]


def test_a_run_is_renamed_and_tagged(store, texts):
    app = opened(run=texts.id)
    app.text_input(key=f"evaluate_name_page_{texts.id}").set_value("week 1")
    app.text_input(key=f"evaluate_tags_page_{texts.id}").set_value("adverts，lora")
    button(app, f"evaluate_save_page_{texts.id}").click().run()
    assert not app.exception
    run = evaluate.run_of(store, texts.id)
    assert (run.title, run.tags) == ("week 1", ("adverts", "lora"))


def test_chosen_runs_lead_to_the_comparison(texts, labels, words, installed):
    installed("evaluate", "compare")
    app = opened()
    for run in (texts, labels):
        app.checkbox(key=f"evaluate_pick_{run.id}").check().run()
    assert not app.exception
    queries = [str(one.proto) for one in app.get("page_link")]
    assert any(f"{texts.id},{labels.id}" in one or f"{texts.id}%2C{labels.id}" in one for one in queries)


def test_runs_are_deleted_only_after_a_second_click(store, texts, labels):
    app = opened()
    app.checkbox(key=f"evaluate_pick_{texts.id}").check().run()
    assert len(evaluate.runs(store)) == 2
    app.button(key="evaluate_delete").click().run()
    assert not app.exception
    assert [one.id for one in evaluate.runs(store)] == [labels.id]
    assert not (store.path.parent / "runs" / texts.id).exists()


def test_a_run_is_repeated_with_equal_scores(store, model_folder, tmp_path):
    file = _csv(tmp_path / "choices.csv", *_head_and_rows())
    task = evaluate.with_model(evaluate.plan(file), model_folder, precision="fp32", device="cpu")
    run = finished(store, evaluate.start(store, task).id)
    app = opened(run=run.id)
    app.button(key=f"evaluate_again_page_{run.id}").click().run()
    assert not app.exception
    other = app.query_params["run"]
    assert other != run.id
    assert finished(store, other).scores.to_json() == run.scores.to_json()


# --- moving, gone, in Chinese


def test_a_run_that_waits_has_its_buttons_and_no_dashboard(store, model_folder, tmp_path, words):
    file = _csv(tmp_path / "choices.csv", *_head_and_rows())
    task = evaluate.with_model(evaluate.plan(file), model_folder, precision="fp32", device="cpu")
    job = evaluate.start(store, task)
    store.request_pause(job.id)
    app = opened(run=job.id)
    assert not app.exception
    assert button(app, f"resume_page_{job.id}")
    assert "0 of 12 rows" in words(app)
    assert "95 % interval" not in page_text(app, words)


def test_a_run_that_is_gone_or_of_another_kind_is_a_sentence(store, words):
    app = opened(run="nothing")
    assert not app.exception
    assert app.error
    job = store.create("batch", "other", {})
    store.mark_unready(job.id, "x")
    app = opened(run=job.id)
    assert not app.exception
    assert "no evaluation" in words(app)


def test_the_list_of_jobs_opens_the_run(texts, words):
    app = opened(job=texts.id)
    assert not app.exception
    assert app.query_params["run"] == texts.id
    assert "on 40 rows" in page_text(app, words)


@pytest.mark.parametrize("view", ["", "rows", "slices", "download"])
def test_the_dashboard_is_in_chinese_too(texts, view, words):
    app = opened(run=texts.id, lang="zh", **({"view": view} if view else {}))
    assert not app.exception
    shown = page_text(app, words)
    assert "95% 区间" in shown
    assert "共 40 行" in shown
    assert "interval" not in shown


def test_the_form_and_the_list_are_in_chinese_too(texts, words):
    app = opened(lang="zh", data="adverts")
    assert not app.exception
    shown = page_text(app, words)
    for text in ("提问方式", "检查点与运行", "评测记录", "参考答案是各不相同的文本"):
        assert text in shown
    assert "Runs" not in shown


def test_every_metric_and_kind_has_a_name():
    names = {one for metrics in evaluate.METRICS.values() for one in metrics}
    assert names <= set(evaluate_words.METRICS)
    assert set(evaluate.KINDS) == set(evaluate_words.KINDS)
    assert {one for methods in evaluate.METHODS.values() for one in methods} <= set(evaluate_words.METHODS)


def test_a_figure_as_csv_is_read_by_excel_as_text():
    data = evaluate_figures.comma_separated(("name", "score"), [("=1+1", 0.5), ("裙子", None)])
    assert data.decode("utf-8-sig").splitlines() == ["name,score", "'=1+1,0.5", "裙子,"]
    assert data.startswith(b"\xef\xbb\xbf")


def test_texts_beside_each_other_are_escaped():
    left, right = evaluate_rows.marks("<b>好</b>", "坏")
    assert "<b>" not in left and "&lt;" in left
    assert right == "<ins>坏</ins>"


def test_a_wide_interval_names_the_rows_that_would_narrow_it(labels):
    said = evaluate_run.certain(labels, labels.scores)
    one = labels.scores.headline
    width = (one.high - one.low) * 100
    assert width > 10
    assert f"about {int(60 * (width / 10) ** 2):,} rows would make it 10" in said
