"""The comparison page: what may be said of runs on one file, why, their rows, and prompts compared by eye."""

from __future__ import annotations

import csv
import json
import threading
import time
from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from glm_core import compare, evaluate, jobs, votes
from glm_core.settings import Settings
from glm_core.votes import Answer, Trials
from pages.shared import compare_diff, compare_runs, compare_setup, compare_verdict
from tests.pages.conftest import ROOT

REFERENCES = (
    "天空是蓝色的，海水是绿色的。",
    "苹果又红又甜。",
    "今天下雨，记得带伞。",
    "猫在窗台上睡觉。",
) * 3
CLOSE = ("天空是蓝色的，海水是蓝色的。", "苹果又大又甜。", "今天下雨，记得带书。", "猫在窗台上吃饭。") * 3
FAR = ("不知道。", "没有。", "好的。", "也许。") * 3


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is, a page of a test waits for its comparison and for the dictionary of words."""
    monkeypatch.setattr(compare_runs, "PATIENCE_S", 60)
    monkeypatch.setattr(compare_diff, "PATIENCE_S", 60)


@pytest.fixture
def store():
    return jobs.store(Settings.read())


@pytest.fixture
def run(store, tmp_path):
    """run(rows, title=...): a run of predictions, each beside its question and reference."""
    made = []

    def make(rows, head=("question", "label", "prediction"), title="", **options):
        path = tmp_path / f"{len(made)}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        found = evaluate.import_predictions(store, path, title=title or f"run {len(made)}", **options)
        made.append(found)
        return found

    return make


@pytest.fixture
def opened():
    """opened(runs="…"): the page as a browser opens it."""

    def open_(**query):
        app = AppTest.from_file(str(ROOT / "Home.py"), default_timeout=60)
        app.switch_page("pages/compare.py")
        for key, value in query.items():
            app.query_params[key] = value
        return app.run()

    return open_


def answered(wrong, n=60):
    """Rows of label 0 and 1 in turn, those numbered in `wrong` answered with the other one."""
    return [(f"q{i}", str(i % 2), str((i + (i + 1 in wrong)) % 2)) for i in range(n)]


def ids(*runs):
    return ",".join(one.id for one in runs)


def shown(app):
    """All words on the page, HTML included."""
    kinds = ("header", "subheader", "markdown", "caption", "error", "info", "warning", "success")
    found = [str(one.value) for kind in kinds for one in getattr(app, kind)]
    return "\n".join([*found, *(str(one.proto.body) for one in app.get("html"))]).replace("\\", "")


def asked(app, name):
    """A parameter of the page's address."""
    found = app.query_params[name]
    return found if isinstance(found, str) else found[0]


def key(app, kind, start):
    return next(one for one in getattr(app, kind) if str(one.key).startswith(start))


def finished(trial):
    end = time.monotonic() + 60
    while votes.live(trial) is not None and time.monotonic() < end:
        time.sleep(0.05)
    assert votes.live(trial) is None


# ---- choosing runs


def test_without_runs_the_page_says_where_they_come_from(opened):
    app = opened()
    assert not app.exception
    assert "no finished evaluation yet" in shown(app)


def test_one_run_is_not_compared_and_the_other_kinds_cannot_join(opened, run):
    a = run(answered({1}), title="first")
    run(answered({2}), title="second")
    run(list(zip("abcdefghijkl", REFERENCES, CLOSE, strict=True)), title="texts", kind="text")
    app = opened(runs=a.id)
    assert "two to four runs" in shown(app)
    assert "One run scores label answers and the other text" in shown(app)
    assert [one.split(" · ")[0] for one in app.multiselect[0].options] == ["second", "first"]


def test_a_run_is_chosen_by_hand_and_then_stands_in_the_address(opened, run):
    a, b = run(answered(range(1, 20)), title="worse"), run(answered({1}), title="good")
    app = opened()
    app.multiselect[0].set_value([a.id]).run()
    app.multiselect[0].set_value([a.id, b.id]).run()
    assert asked(app, "runs") == ids(a, b)
    assert "good is better" in shown(app)


def test_a_run_that_is_gone_is_named(opened, run):
    a, b = run(answered({1})), run(answered({2}))
    app = opened(runs=f"{ids(a, b)},20200101-000000-abcdef")
    assert not app.exception
    assert "20200101-000000-abcdef" in shown(app)
    assert app.multiselect[0].value == [a.id, b.id]


def test_runs_asked_of_other_rows_are_refused_with_the_reason(opened, run):
    a = run(answered({1}), kind="label")
    b = run([("other", "0", "0"), ("rows", "1", "0")], kind="label")
    app = opened(runs=ids(a, b))
    assert not app.exception
    assert "These runs cannot be compared" in shown(app)
    assert "no row in common" in shown(app)
    assert not app.success and not app.warning


# ---- the verdict


def test_a_certain_difference_is_the_first_thing_on_the_page(opened, run):
    a, b = run(answered(range(1, 31)), title="old"), run(answered({40, 41}), title="new *")
    app = opened(runs=ids(a, b))
    assert not app.exception
    box = app.success[0].value.replace("\\", "")
    assert box.startswith("### new * is better. This is certain.")
    assert "**46.7 points** of Accuracy" in box and "60 rows; p < 0.001" in box


def test_an_open_difference_says_how_many_rows_would_settle_it(opened, run):
    a, b = run(answered({1, 2, 3, 4, 5}), title="old"), run(answered({6, 7, 8}), title="new")
    app = opened(runs=ids(a, b))
    one = compare.compare(jobs.store(Settings.read()), a.id, b.id)
    assert one.verdict.rows_needed
    box = app.warning[0].value
    assert "Not decided" in box and "may be chance" in box
    assert f"{compare_verdict.two_digits(one.verdict.rows_needed):,} rows" in box


def test_under_six_different_rows_no_test_can_decide(opened, run):
    a, b = run(answered({1, 2, 3, 4, 5}), title="old"), run(answered(set()), title="new")
    app = opened(runs=ids(a, b))
    box = app.warning[0].value
    assert "No test can decide" in box
    assert "Only 5 of 60 rows differ" in box and "p = " not in box


def test_a_difference_within_delta_is_called_the_same(opened, run):
    rows = answered(set(), 3000)
    a, b = run(rows, title="old"), run(answered({1, 2, 3}, 3000), title="new")
    app = opened(runs=ids(a, b))
    assert "the same" in app.info[0].value and "within **1 points**" in app.info[0].value
    app.number_input(key=compare_runs.DELTA).set_value(0.0).run()
    assert asked(app, "delta") == "0"
    assert "No test can decide" in app.warning[0].value


def test_equal_runs_are_said_to_answer_alike(opened, run):
    a, b = run(answered({1})), run(answered({1}))
    assert "no difference at all" in opened(runs=ids(a, b)).info[0].value


def test_the_best_of_three_is_named_only_when_it_beats_both(opened, run):
    low, high = run(answered(range(1, 31)), title="low"), run(answered({40}), title="high")
    middle = run(answered(range(20, 35)), title="middle")
    app = opened(runs=ids(low, middle, high))
    assert "high is the best of 3. This is certain." in app.success[0].value
    assert "3 comparisons" in shown(app)
    near = run(answered({41, 42}), title="near")
    app = opened(runs=ids(low, near, high))
    assert "Not decided: high is ahead, but not for certain of near" in app.warning[0].value


def test_standing_is_shared_where_two_are_the_same(store, run):
    runs = [run(answered(range(1, 31), 3000)), run(answered({40}, 3000)), run(answered({41}, 3000))]
    worse = run(answered(range(1, 900), 3000))
    found = compare.standing(compare.compare_all(store, [one.id for one in (worse, *runs[1:])]))
    assert (found.place, len(found.equal)) == ("shared", 1)
    assert found.leader != worse.id
    alone = compare.standing([compare.compare(store, worse.id, runs[0].id)])
    assert (alone.leader, alone.place) == (runs[0].id, "best")


def test_a_file_that_all_titles_name_is_left_out_of_them(run):
    from glm_core.compare import compare_all

    first, second = run(answered({1})), run(answered({2}))
    store_of = jobs.store(Settings.read())
    name = first.task.input_name
    runs = [replace(first, title=f"a on {name}"), replace(second, title=f"b on {name}")]
    runs = [replace(one, task=replace(one.task, input_name=name)) for one in runs]
    pairs = tuple(compare_all(store_of, [one.id for one in runs]))
    shown, short = compare_runs._shortened(runs, pairs)
    assert [one.title for one in shown] == ["a", "b"]
    assert (short[0].title_a, short[0].title_b) == ("a", "b")
    other = [runs[0], replace(runs[1], task=replace(runs[1].task, input_name="other.csv"))]
    assert compare_runs._shortened(other, pairs) == (other, pairs)
    same = [runs[0], replace(runs[1], title=runs[0].title)]
    assert compare_runs._shortened(same, pairs) == (same, pairs)


def test_partly_overlapping_rows_are_compared_and_counted(opened, run):
    a, b = run(answered({1, 2})), run([*answered(range(1, 31), 40), ("extra", "0", "0")])
    app = opened(runs=ids(a, b))
    assert "Compared on the 40 rows that both have; A has 60 and B 41." in shown(app)


def test_intervals_and_tests_stand_in_the_table(opened, run):
    a, b = run(answered(range(1, 31)), title="old"), run(answered({40, 41}), title="new")
    table = opened(runs=ids(a, b)).dataframe[0].value
    row = table.iloc[0].tolist()
    assert row[0] == "Accuracy ★" and row[1].startswith("50.0 (") and row[2].startswith("96.7 (")
    assert row[3] == "+46.7" and row[5] == "p < 0.001" and row[6] == "exact McNemar"
    assert "Macro F1" in table.iloc[:, 0].tolist()


def test_texts_are_decided_by_a_chosen_metric(opened, run):
    rows = [f"q{i}" for i in range(len(REFERENCES))]
    a = run(list(zip(rows, REFERENCES, FAR, strict=True)), title="far", kind="text")
    b = run(list(zip(rows, REFERENCES, CLOSE, strict=True)), title="close", kind="text")
    app = opened(runs=ids(a, b))
    assert not app.exception
    assert "close is better" in shown(app) and "points** of ROUGE-L" in shown(app)
    key(app, "selectbox", compare_runs.METRIC).set_value("bleu-4").run()
    assert asked(app, "metric") == "bleu-4"
    assert "points** of BLEU-4" in shown(app)
    assert "Higher" in str(key(app, "button_group", "compare_rows_").options)


def test_a_long_comparison_is_said_to_be_on_its_way_and_goes_on_behind_the_page(opened, run, monkeypatch):
    go_on, real = threading.Event(), compare.compare_all
    monkeypatch.setattr(
        compare, "compare_all", lambda *given, **more: go_on.wait(60) and real(*given, **more)
    )
    monkeypatch.setattr(compare_runs, "PATIENCE_S", 0.01)
    a, b = run(answered(range(1, 31)), title="old"), run(answered({40}), title="new")
    app = opened(runs=ids(a, b))
    assert not app.exception
    assert "Comparing 120 answers" in shown(app) and not app.success
    go_on.set()
    monkeypatch.setattr(compare_runs, "PATIENCE_S", 60)
    assert "new is better" in app.run().success[0].value


def test_a_refusal_found_late_is_shown_once_and_not_looked_for_again_and_again(opened, run, monkeypatch):
    calls, real = [], compare.compare_all
    monkeypatch.setattr(
        compare, "compare_all", lambda *given, **more: calls.append(1) or real(*given, **more)
    )
    a = run(answered({1}), kind="label")
    b = run([("other", "0", "0"), ("rows", "1", "0")], kind="label")
    app = opened(runs=ids(a, b))
    app.run()
    assert "no row in common" in shown(app)
    assert len(calls) == 1


# ---- rows


def test_fixed_and_broken_rows_are_shown_with_both_answers(opened, run):
    a, b = run(answered(range(1, 11)), title="old"), run(answered({40, 41}), title="new")
    app = opened(runs=ids(a, b))
    words = shown(app)
    assert "row 1" in words and "row 8" in words and "row 9" not in words
    assert '<mark class="bad">1</mark>' in words and '<mark class="good">0</mark>' in words
    key(app, "button_group", "compare_rows_").set_value("broken").run()
    words = shown(app)
    assert "row 40" in words and "row 41" in words and "row 1\n" not in words


def test_a_cell_of_the_agreement_table_shows_its_rows(opened, run):
    a, b = run(answered(range(1, 11)), title="old"), run(answered({5, 40, 41}), title="new")
    app = opened(runs=ids(a, b))
    cells = {
        name: app.button(key=f"agree_{name}").label
        for name in ("both_right", "broken", "fixed", "both_wrong")
    }
    assert [one.split(" ")[0] for one in cells.values()] == ["48", "2", "9", "1"]
    app.button(key="agree_both_wrong").click().run()
    assert key(app, "button_group", "compare_rows_").value == "both_wrong"
    assert "row 5" in shown(app)


def test_rows_with_the_same_words_can_be_left_out(opened, run, store):
    rows = [(f"q{i}", "1", "A") for i in range(12)]
    a = run(rows, title="old", kind="label", labels=("0", "1"))
    b = run([(q, r, "B" if i < 3 else p) for i, (q, r, p) in enumerate(rows)], title="new", kind="label", labels=("0", "1"))  # fmt: skip
    app = opened(runs=ids(a, b))
    assert "row 8" in shown(app)
    app.toggle(key="widget.compare.only_different").set_value(True).run()
    words = shown(app)
    assert "row 3" in words and "row 4" not in words
    assert compare.other_words(store, compare.compare(store, a.id, b.id)) == {0, 1, 2}


def test_words_that_only_one_text_has_are_marked_and_html_is_text():
    assert compare_diff.warm().wait(60)
    a, b = "海水是绿色的<b>", "海水是蓝色的<b>"
    assert compare_diff.marked(a, b, "bad") == '海水是<mark class="bad">绿色</mark>的&lt;b&gt;'
    assert compare_diff.marked(b, a, "good") == '海水是<mark class="good">蓝色</mark>的&lt;b&gt;'
    assert "<mark" not in compare_diff.marked(a, a, "bad")
    joined = "".join(piece for piece, _ in evaluate.views.marked(a, b)[0])
    assert joined == a


def test_long_texts_are_cut_and_say_so():
    found = compare_diff.marked("长" * 5000, None, "other")
    assert "1,000 more characters" in found and found.count("长") == compare_diff.LONGEST


# ---- settings and files


def test_settings_that_differ_are_shown_and_no_others(opened, run):
    a, b = run(answered({1})), run(answered({2}))
    app = opened(runs=ids(a, b))
    table = next(one.value for one in app.dataframe if "setting" in one.value.columns)
    assert table["setting"].tolist() == ["input_name"]
    assert table.iloc[0].tolist()[1:] == ["0.csv", "1.csv"]


def test_of_three_runs_a_setting_of_one_is_shown_for_all(run, store):
    runs = [run(answered({1}), title="a"), run(answered({2}), title="b"), run(answered({3}), title="c")]
    this = compare_runs.found([evaluate.run_of(store, one.id) for one in runs], "", 0.01)
    assert compare_setup._run_settings(this) == {"input_name": ["0.csv", "1.csv", "2.csv"]}


def trained(folder, rate, losses):
    """What a training leaves in its folder."""
    folder.mkdir(parents=True)
    task = {"output": str(folder), "plan": {"learning_rate": rate, "batch": 4}}
    (folder / "manifest.json").write_text(json.dumps({"task": task, "rows": {"train": 10}, "state": "done"}))
    lines = [{"kind": "step", "step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    lines.append({"kind": "dev", "step": len(losses), "dev_loss": losses[-1] / 2})
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def test_trainings_of_the_checkpoints_give_their_settings_and_curves(run, store, tmp_path):
    runs = []
    for number, rate in enumerate((0.001, 0.002)):
        folder = trained(tmp_path / f"training {number}", rate, [2.0, 1.0 + number])
        checkpoint = folder / "checkpoint-2"
        checkpoint.mkdir()
        one = run(answered({number + 1}))
        runs.append(replace(one, task=replace(one.task, method="generate", checkpoint=str(checkpoint))))
    plain = run(answered({5}))
    pairs = tuple(compare.compare_all(store, [one.id for one in (*runs, plain)]))
    this = compare_runs.Found((*runs, plain), pairs, compare.standing(pairs), 0.01)
    found = compare_setup._training_settings(this)
    assert found["plan.learning_rate"] == [0.001, 0.002, None]
    assert "output" not in found
    curves = compare_setup.trainings(this)
    assert [one.name for one in curves] == ["training 0", "training 1"]
    assert [status.curve[-1] for status in curves.values()] == [(2, 1.0), (2, 2.0)]
    assert [status.dev for status in curves.values()] == [[(2, 0.5)], [(2, 1.0)]]


def test_the_rows_leave_as_a_table_with_every_answer(run, store):
    a = run(answered({1, 2}), title="old")
    b, c = run(answered({2, 3}), title="new"), run(answered(set(), 30), title="new")
    this = compare_runs.found([evaluate.run_of(store, one.id) for one in (a, b, c)], "", 0.01)
    file = compare_setup.rows_file(this)
    with file.open(encoding="utf-8-sig", newline="") as opened_file:
        rows = list(csv.DictReader(opened_file))
    assert len(rows) == 60
    assert [rows[i][f"new ({b.id}) against old"] for i in range(4)] == [
        "fixed",
        "both wrong",
        "broken",
        "both right",
    ]
    assert [rows[i][f"new ({c.id}) against old"] for i in (0, 1, 40)] == ["fixed", "fixed", ""]
    assert (
        rows[0]["question"] == "q0" and rows[0]["answer: old"] == "1" and float(rows[0]["accuracy: old"]) == 0
    )
    assert rows[40][f"answer: new ({c.id})"] == ""


def test_the_report_holds_the_verdict_and_asks_nobody(run, store):
    a, b = run(answered(range(1, 31)), title="old"), run(answered({40}), title="new")
    this = compare_runs.found([evaluate.run_of(store, one.id) for one in (a, b)], "", 0.01)
    page = compare_setup.report(this)
    assert "new is better by" in page and "http" not in page.split("</style>")[1]


def test_the_address_holds_runs_metric_and_delta(opened, run):
    a, b = run(answered({1})), run(answered({2}))
    app = opened(runs=ids(a, b), delta="2.5")
    assert app.number_input(key=compare_runs.DELTA).value == 2.5
    assert any(f"runs={ids(a, b)}&delta=2.5" in one.value for one in app.code)


def test_the_page_speaks_chinese(opened, run):
    a, b = run(answered(range(1, 31)), title="旧"), run(answered({40}), title="新")
    app = opened(runs=ids(a, b), lang="zh")
    assert "新 更好，结论可靠。" in shown(app)
    app = opened(mode="prompts", lang="zh")
    assert app.button(key="compare_ask").label == "向 2 个检查点提 4 个问题"


# ---- prompts


@pytest.fixture
def trial(store):
    """A blind trial of two answers to each of three prompts; one pair says the same."""
    trials = Trials(store)
    a = votes.Side("alpha · FP32", "/models/a", "", "fp32", "cpu", "chatglm3")
    b = votes.Side("beta · INT8", "/models/b", "", "int8", "cpu", "chatglm3")
    made = trials.create([a, b], ("问题一", "问题二", "问题三"), seed=1)
    for prompt, (left, right) in enumerate((("红色的花", "蓝色的花"), ("same", "same"), ("one <i>", "two"))):
        for side, text in enumerate((left, right)):
            trials.save(made.id, prompt, side, Answer(text, 4, 0.5, 0.1, 8.0))
    return made


def test_the_form_begins_with_the_embedded_model_at_two_precisions(opened):
    app = opened(mode="prompts")
    assert not app.exception
    assert [one.value.rsplit("/", 1)[-1] for one in app.selectbox if "compare.side" in one.key] == [
        "glm-mini"
    ] * 2
    assert app.button(key="compare_ask").label == "Ask 2 checkpoints 4 prompts"
    app.text_area(key="widget.compare.prompts").set_value("").run()
    assert app.button(key="compare_ask").disabled


def test_up_to_four_checkpoints_and_the_same_twice_is_refused(opened):
    app = opened(mode="prompts")
    app.button(key="compare_add").click().run()
    app.button(key="compare_add").click().run()
    assert app.button(key="compare_add").disabled
    app.button(key="compare_ask").click().run()
    assert "Two of the checkpoints are the same" in shown(app)
    app.button(key="compare_remove").click().run()
    assert sum("compare.side" in one.key for one in app.selectbox) == 3


def test_two_precisions_are_asked_and_shown_side_by_side(opened, model_folder, store):
    app = opened(mode="prompts")
    for number in (0, 1):
        app.selectbox(key=f"widget.compare.side.{number}").set_value(str(model_folder))
    app.selectbox(key="widget.compare.precision.0").set_value("fp32")
    app.selectbox(key="widget.compare.precision.1").set_value("bf16")
    app.text_area(key="widget.compare.prompts").set_value("one\ntwo")
    app.number_input(key="widget.compare.max_new_tokens").set_value(6)
    app.toggle(key="widget.compare.blind").set_value(False)
    app.run()
    app.button(key="compare_ask").click().run()
    assert not app.exception
    (made,) = Trials(store).newest()
    assert asked(app, "trial") == made.id
    finished(made.id)
    app = opened(trial=made.id)
    assert not app.exception
    words = shown(app)
    assert "prompt 1" in words and "prompt 2" in words
    assert "tiny-chatglm3 · FP32" in words and "tiny-chatglm3 · BF16" in words
    assert {one.label.replace("\\", "") for one in app.metric} == {
        "tiny-chatglm3 · FP32",
        "tiny-chatglm3 · BF16",
    }
    assert "6 tokens" in words


def test_names_are_hidden_until_the_vote_and_then_told(opened, trial, store):
    app = opened(trial=trial.id)
    assert not app.exception
    ballot = Trials(store).ballots(trial)[0]
    words = shown(app)
    assert "alpha" not in words.replace("alpha · FP32 / beta · INT8", "")
    assert "tokens/s" not in words
    app.button(key="vote_choice_left").click().run()
    names = [one.name for one in trial.sides]
    assert f"left was **{names[ballot.left]}**, right was **{names[ballot.right]}**; you chose left" in shown(
        app
    )
    assert [one.choice for one in Trials(store).votes(trial.id)] == ["left"]


def test_votes_survive_a_refresh_and_the_same_words_are_not_asked(opened, trial, store):
    app = opened(trial=trial.id)
    app.button(key="vote_choice_bad").click().run()
    app = opened(trial=trial.id)
    assert "1 of 2 voted on" in shown(app)
    app.button(key="vote_choice_tie").click().run()
    assert "You have voted on everything" in shown(app)
    app.button(key="vote_undo").click().run()
    assert "1 of 2 voted on" in shown(app)
    assert len(Trials(store).votes(trial.id)) == 1


def test_each_voter_has_a_queue_of_their_own(opened, trial, store):
    app = opened(trial=trial.id)
    app.text_input(key="widget.compare.voter").set_value("Ann").run()
    app.button(key="vote_choice_right").click().run()
    app.text_input(key="widget.compare.voter").set_value("Bo").run()
    assert "0 of 2 voted on" in shown(app)
    assert [one.voter for one in Trials(store).votes(trial.id)] == ["Ann"]


def test_showing_the_names_ends_the_vote_and_keeps_what_was_given(opened, trial, store):
    app = opened(trial=trial.id)
    app.button(key="vote_choice_left").click().run()
    app.button(key="vote_reveal").click().run()
    words = shown(app)
    assert not any(str(one.key).startswith("vote_choice") for one in app.button)
    assert "with fewer than 6 preferences no test can decide" in words
    assert '<mark class="other">' in words and "one &lt;i&gt;" in words
    assert Trials(store).get(trial.id).revealed


def test_votes_and_trials_are_deleted_only_after_a_question(opened, trial, store):
    app = opened(trial=trial.id)
    app.button(key="vote_choice_left").click().run()
    app.button(key="vote_forget").click().run()
    assert len(Trials(store).votes(trial.id)) == 1
    app.button(key="vote_forget_yes").click().run()
    assert Trials(store).votes(trial.id) == []
    app.button(key="trial_delete").click().run()
    app.button(key="trial_delete_yes").click().run()
    assert Trials(store).newest() == []
    assert "trial" not in app.query_params


def test_missing_answers_say_why_and_can_be_asked_again(opened, trial, store):
    trials = Trials(store)
    trials.save(trial.id, 2, 1, Answer("", finish="error", error="There is no folder /models/b."))
    app = opened(trial=trial.id)
    assert "1 of 6 answers are missing" in shown(app)
    assert "There is no folder /models/b" in shown(app)
    app.button(key="trial_again").click().run()
    finished(trial.id)
    assert trials.answers(trial.id)[2, 1].error


def test_an_earlier_trial_is_opened_again(opened, trial):
    app = opened(mode="prompts")
    app.button(key=f"open_{trial.id}").click().run()
    assert asked(app, "trial") == trial.id
    assert "0 of 2 voted on" in shown(app)


def test_a_trial_that_is_gone_is_a_sentence(opened):
    app = opened(trial="nothing")
    assert not app.exception
    assert "There is no comparison of prompts 'nothing'" in shown(app)
