"""Evaluation runs: answers read as they are meant, scores that repeat to the byte, and nothing counted that was not asked."""

from __future__ import annotations

import csv
import json
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core import cli, engine, evaluate, jobs, metrics
from glm_core.engine import Engine, GenerationSettings
from glm_core.errors import GLMError
from glm_core.evaluate import answers, scoring
from glm_core.evaluate.questions import Questions
from glm_core.evaluate.registry import save_predictions
from glm_core.evaluate.task import EXTRA, rows_of
from glm_core.finetune.examples import Columns
from glm_core.jobs import JobStore, Supervisor
from glm_core.settings import Settings
from glm_core.tables import open_table
from tests.conftest import GOLDEN
from tests.test_batch import FakeEngine, FakeHost, FakeTokenizer

LETTERS = "ABCD"
CHOICES = [
    ("math", "1+1?", "1", "2", "3", "4", "B"),
    ("math", "2+2?", "1", "2", "3", "4", "D"),
    ("geography", "首都？", "北京", "上海", "广州", "天津", "A"),
    ("geography", "最长的河？", "黄河", "珠江", "长江", "淮河", "C"),
    ("geography", "最大的省？", "新疆", "青海", "四川", "西藏", "A"),
    ("math", "3+0?", "1", "2", "3", "4", "C"),
]
HEAD = ("subject", "question", "A", "B", "C", "D", "answer")


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workspace" / "workbench.db")


def write(path, head, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def choices(tmp_path):
    return write(tmp_path / "choices.csv", HEAD, CHOICES)


def finish(store, job):
    """Run a queued job here, to its end."""
    worker = Supervisor(store, {"evaluate": evaluate.run})
    worker.run(store.claim(("evaluate",), worker.owner, job.id))
    return evaluate.run_of(store, job.id)


class Tokenizer(FakeTokenizer):
    """Knows rounds and answers as well."""

    ROLES = {"user": -3, "system": -4, "assistant": -6}

    def chat_ids(self, messages):
        ids = [-1, -2]
        for message in messages:
            ids += [self.ROLES[message.role], *self.encode(message.content)]
        return [*ids, -5]

    def answer_ids(self, text):
        return [*self.encode(text), -7]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A task on a fake engine that answers a question with what `answer` makes of it."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")

    def make(task, answer=lambda text: text[::-1], delay=0.002):
        from glm_core import checkpoints

        running = FakeEngine(answer=answer, delay=delay)
        running.tokenizer, running.context = Tokenizer(), 2000
        monkeypatch.setattr(engine, "host", lambda: FakeHost(running))
        return replace(
            task, checkpoint=str(folder), checkpoint_fingerprint=checkpoints.fingerprint(folder), precision="fp32",
            device="cpu",
        )  # fmt: skip

    return make


@pytest.fixture
def real(monkeypatch, tiny_checkpoint):
    """A task on the small checkpoint, so many rows at a time."""
    from glm_core import checkpoints

    running = []

    def make(task, max_rows=8):
        running.append(Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"), max_rows))
        monkeypatch.setattr(engine, "host", lambda: FakeHost(running[-1]))
        return evaluate.with_model(task, tiny_checkpoint, precision="fp32", device="cpu")

    yield make
    for one in running:
        one.close()


# ---- what an answer says


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 48/2 = 24 left.\n#### 24", "24"), ("#### 1,234.0", "1234"), ("#### 7\nNext: ... #### 9", "7"),
        ("The answer is $-5.50.", "-5.5"), ("答案是－12％", "-12"), ("一共72个。", "72"), ("\\boxed{1{,}000} and 3", "1000"),
        ("costs 1,234,567.89 in total", "1234567.89"), ("18 - 4 = 14", "14"), ("5-10", "10"), ("**72**", "72"),
        ("3/4", "0.75"), ("2/3", "2/3"), ("1e3", "1000"), (".5", "0.5"), ("１２", "12"), ("−3", "-3"), ("$1,000,", "1000"),
        ("The answer is 8. It took 3 steps.", "8"), ("no number", ""), ("", ""), ("1/0", ""), ("9" * 5000, ""),
        ("#### \n7", "7"),
    ],
)  # fmt: skip
def test_the_final_number_of_an_answer_is_found(text, number):
    assert answers.shown_number(answers.number_of(text)) == number


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789.,-+/#eE $%是答案ab\n", max_size=40))
def test_no_text_stops_the_search_for_its_number(text):
    found = answers.number_of(text)
    assert found is None or answers.number_of(answers.shown_number(found)) == found


@settings(max_examples=300, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_a_number_is_the_same_however_it_is_written(whole, places):
    for written in (str(whole), f"{whole:,}", f"{whole}.{'0' * (places + 1)}", f"#### {whole:,}.0"):
        assert answers.shown_number(answers.number_of(written)) == str(whole)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"), ("c", "C"), ("（Ｃ）", "C"), ("答案：C", "C"), ("答案是 B，不选A", "B"), ("The answer is (D).", "D"),
        ("C. The pleura", "C"), ("D、四", "D"), ("**B**", "B"), ("选项A不正确，答案是B", "B"), ("I think B is right", "B"),
        ("A dog is an animal", None), ("A or B", None), ("the answer is a dog", None), ("E", None), ("", None),
        ("北京", "A"), ("不选A", None),
    ],
)  # fmt: skip
def test_the_option_an_answer_chooses_is_found(text, letter):
    assert answers.option_of(text, LETTERS, ("北京", "上海", "广州", "天津")) == letter


@pytest.mark.parametrize(("text", "letter"), [("b", "B"), ("(C)", "C"), ("2", "C"), ("3.0", "D"), ("上海", "B"), ("E", None), ("", None)])  # fmt: skip
def test_a_file_may_name_the_correct_option_in_three_ways(text, letter):
    assert answers.option_reference(text, LETTERS, ("北京", "上海", "广州", "天津")) == letter


@pytest.mark.parametrize(
    ("text", "label"),
    [("垃圾", "垃圾"), ("答案：垃圾。", "垃圾"), (" SPAM!", "Spam"), ("１", "1"), ("1.0", "1"), ("label is spam", "Spam"),
     ("不是垃圾", None), ("垃圾或正常", None), ("10", None), ("", None)],
)  # fmt: skip
def test_a_label_is_only_what_an_answer_consists_of(text, label):
    labels = answers.spellings(["垃圾", "正常", "Spam", "spam", "1.0"])
    assert list(labels.values()) == ["垃圾", "正常", "Spam", "1"]
    assert answers.label_of(text, labels) == label


# ---- the kind of a file


@pytest.mark.parametrize(
    ("columns", "rows", "kind"),
    [
        (HEAD, CHOICES, "choice"),
        (("question", "answer"), [("q", "so 3\n#### 3")] * 9, "number"),
        (("question", "answer"), [(f"q{i}", f"{i * 3:,}") for i in range(2000)], "number"),
        (("text", "label"), [("a", "0"), ("b", "1")] * 5, "label"),
        (("content", "summary"), [(f"a{i}", f"一段不同的话 {i}") for i in range(9)], "text"),
        (("x", "y"), [("a", "b")], "text"),
    ],
)
def test_the_kind_is_told_from_columns_and_rows(columns, rows, kind):
    assert evaluate.guess_kind(columns, rows) == kind


# ---- predictions made elsewhere


def test_a_model_that_always_says_c_gets_the_share_of_c(store, tmp_path):
    path = write(tmp_path / "c.csv", (*HEAD, "prediction"), [(*row, "C") for row in CHOICES])
    found = evaluate.import_predictions(store, path, kind="choice").scores
    assert found.headline.estimate == 2 / 6 and found.n == 6
    assert dict(zip(("n", "right"), (found.subjects[0][1], found.subjects[0][2]), strict=True)) == {
        "n": 3,
        "right": 1,
    }


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (["今天天气很好", "一件白色的衬衫"], "text"),
        (["0", "1"] * 3, "label"),
        (["x #### 1,234", "y #### 5"], "number"),
        (["A", "D", "C"], "choice"),
    ],
)
def test_a_perfect_file_scores_100_percent(store, tmp_path, references, kind):
    path = lines(
        tmp_path / "generated_predictions.txt", [{"labels": one, "predict": one} for one in references]
    )
    run = evaluate.import_predictions(store, path, kind=None if kind != "choice" else "choice")
    assert (run.task.kind, run.state, run.imported) == (kind, "done", True)
    assert run.scores.headline.estimate == pytest.approx(run.scores.unit, abs=1e-3)
    assert evaluate.per_row(store, run.id).right.all()


def test_scores_of_a_run_are_those_of_the_reference(store, tmp_path):
    golden = json.loads((GOLDEN / "metrics" / "metrics.json").read_text(encoding="utf-8"))
    pairs = [pair for pair in golden["pairs"] if "scores" in pair]
    path = lines(
        tmp_path / "p.jsonl", [{"labels": p["reference"], "predict": p["prediction"]} for p in pairs]
    )
    run = evaluate.import_predictions(store, path, kind="text")
    for name, expected in golden["averaged_over_pairs_that_do_not_raise"].items():
        assert run.scores.values[name].estimate == pytest.approx(expected, abs=1e-6)
        assert run.scores.values[name].low <= expected <= run.scores.values[name].high
    per_row = evaluate.per_row(store, run.id)
    assert per_row.scores["bleu-4"].tolist() == [pair["scores"]["bleu-4"] for pair in pairs]
    assert list(per_row.frame()["rouge-l"]) == [pair["scores"]["rouge-l"] for pair in pairs]


def test_a_blank_prediction_scores_0_and_a_blank_reference_does_not_count(store, tmp_path):
    path = write(
        tmp_path / "p.csv",
        ("reference", "prediction", "page"),
        [("好", " ", 1), ("", "好", 2), ("好", "好", 3)],
    )
    run = evaluate.import_predictions(store, path, kind="text", chosen=("bleu-4", "exact-match"))
    found = run.scores
    assert (found.n, found.n_empty, found.n_no_reference, found.rows) == (2, 1, 1, 3)
    assert found.values["exact-match"].estimate == 50.0
    assert list(found.values) == ["rouge-l", "bleu-4", "exact-match"]
    assert run.task.columns == ("reference", "prediction", "page")


def test_an_answer_outside_the_labels_is_wrong_and_counted(store, tmp_path):
    path = write(
        tmp_path / "p.csv", ("label", "prediction"), [("0", "0"), ("1", "1.0"), ("0", "both"), ("1", "")] * 3
    )
    found = evaluate.import_predictions(store, path).scores
    assert found.kind == "label" and found.values["accuracy"].estimate == 0.5
    assert found.n_no_answer == 6
    assert "ROUGE" in found.hidden["rouge-l"] and "rouge-l" not in found.values
    assert found.labels["confusion"] == [[3, 0, 3], [0, 3, 3]] or found.labels["confusion"] == (
        (3, 0, 3),
        (0, 3, 3),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcx")), min_size=1, max_size=40))
def test_scores_of_tables_are_those_of_the_rows(pairs):
    truth, predicted = zip(*pairs, strict=True)
    whole = metrics.classification(truth, predicted, "abc")
    found = scoring.of_tables(np.array([whole.confusion]))
    for name, values in found.items():
        expected = whole.scores[name]
        assert np.isnan(values[0]) if expected is None else values[0] == pytest.approx(expected, abs=1e-12)


def test_intervals_of_label_scores_are_those_of_drawing_rows():
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 3, 400)
    given_ = np.where(generator.random(400) < 0.7, truth, generator.integers(0, 4, 400))
    names = np.array(list("abcx"))
    whole = metrics.classification(names[truth].tolist(), names[given_].tolist(), "abc")
    task = SimpleNamespace(labels=("a", "b", "c"), metrics=("macro-f1",))
    rows = SimpleNamespace(truth=names[truth].tolist(), answer=names[given_].tolist())
    _, values = scoring._of_labels(task, rows, np.arange(400))
    drawn = []
    for _ in range(1500):
        rows_ = generator.integers(0, 400, 400)
        table = np.zeros((3, 4), dtype=int)
        np.add.at(table, (truth[rows_], given_[rows_]), 1)
        drawn.append(float(scoring.of_tables(table[None])["macro-f1"][0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert values["macro-f1"].estimate == whole.scores["macro-f1"]
    assert values["macro-f1"].low == pytest.approx(low, abs=0.01)
    assert values["macro-f1"].high == pytest.approx(high, abs=0.01)


# ---- rows and prompts


def test_what_cannot_be_asked_is_counted_and_the_number_in_the_file_kept(store, tmp_path, fake):
    path = write(
        tmp_path / "t.csv",
        ("prompt", "response"),
        [("ab", "ba"), ("", "x"), ("c", " "), ("", ""), ("de", "ed")],
    )
    job = evaluate.start(store, fake(evaluate.plan(path, kind="text", chosen=("exact-match",))))
    run = finish(store, job)
    assert run.state == "done", run.job.message
    assert set(run.job.warnings) >= {
        "Not asked: 1 row without a prompt.",
        "Not asked: 1 row without a reference.",
    }
    rows = evaluate.per_row(store, run.id)
    assert rows.number.tolist() == [1, 5] and rows.right.all()
    assert run.scores.values["exact-match"].estimate == 100.0


def test_examples_stand_before_the_question_and_are_not_asked(choices):
    task = evaluate.plan(choices, few_shot=2)
    assert (task.kind, task.method, task.shot_rows) == ("choice", "likelihood", (1, 2))
    assert [answer for _, _, answer in task.shots] == ["B", "D"]
    rows = list(rows_of(task, open_table(choices)))
    assert [row.number for row in rows] == [3, 4, 5, 6]
    questions = Questions(Tokenizer(), task, 4000)
    text = "".join(chr(i) if i > 0 else "|" for i in questions.build(rows[0].cells).ids)
    first = "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    assert text.startswith(f"|||{first}|B|2+2?") and text.endswith(
        "首都？\nA. 北京\nB. 上海\nC. 广州\nD. 天津\n答案：|"
    )


def test_examples_of_another_file_are_those_of_the_subject(tmp_path, choices):
    other = write(
        tmp_path / "dev.csv", ("answer", *HEAD[:-1]), [(row[-1], *row[:-1]) for row in reversed(CHOICES)]
    )
    task = evaluate.plan(choices, few_shot=1, few_shot_file=other)
    assert {(subject, answer) for subject, _, answer in task.shots} == {("math", "C"), ("geography", "A")}
    assert task.shot_rows == () and "A. 新疆" in {s: q for s, q, _ in task.shots}["geography"]
    questions = Questions(Tokenizer(), task, 4000)
    rows = list(rows_of(task, open_table(choices)))
    assert questions.rounds(rows[2].cells)[0][1] == "A" and questions.rounds(rows[0].cells)[0][1] == "C"


def test_what_does_not_fit_loses_its_examples_first(choices):
    task = evaluate.plan(choices, few_shot=2)
    row = next(rows_of(task, open_table(choices))).cells
    whole = Questions(Tokenizer(), task, 4000).build(row)
    one = Questions(Tokenizer(), task, len(whole.ids)).build(row)
    assert not whole.truncated and one.truncated
    assert len(one.ids) < len(whole.ids) and one.text == whole.text


def test_history_alpaca_and_conversations_are_asked_as_they_are_trained(tmp_path):
    def asked(rows, **columns):
        path = lines(tmp_path / "t.jsonl", rows)
        task = evaluate.plan(path, kind="text", **columns)
        questions = Questions(Tokenizer(), task, 4000)
        cells = [row.cells for row in rows_of(task, open_table(path))]
        at = len(task.columns) + EXTRA.index("reference")
        return [
            ("".join(chr(i) if i > 0 else "|" for i in questions.build(one).ids)[3:-1], one[at])
            for one in cells
        ]

    assert asked([{"prompt": "c", "response": "d", "history": [["a", "b"]]}]) == [("a|b|c", "d")]
    assert asked([{"instruction": "Add", "input": "1", "output": "2"}]) == [
        ("Instruction: Add\nInput: 1\nAnswer: ", "2")
    ]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    assert asked([{"messages": talk}, {"messages": talk[:2]}]) == [("a", "b"), ("a|b|c", "d"), ("a", "b")]
    assert asked([{"x": "c", "y": "d"}], columns=Columns("x", "y")) == [("c", "d")]


@pytest.mark.parametrize(
    ("head", "rows", "options", "said"),
    [
        (("x", "y"), [("a", "b")], {}, "do not say which"),
        (("prompt", "response"), [("a", "b")], {"reference": "z"}, "no column 'z'"),
        (HEAD, [("m", "q", "1", "2", "3", "4", "E")], {}, "'E' in row 1 is none of the options A, B, C, D"),
        (HEAD, [("m", "q", "1", "2", "3", "", "D")], {}, "none of the options A, B, C"),
        (("question", "answer"), [("q", "x")], {"kind": "number"}, "row 1 holds no number"),
        (("question", "answer"), [("q", "x")], {"kind": "choice"}, "no columns A, B, C"),
        (("text", "label"), [("q", "x")], {"kind": "label", "labels": ["y"]}, "'x' in row 1 is not among y"),
        (("text", "label"), [(str(i), f"v{i}") for i in range(99)], {"kind": "label"}, "more than 50"),
        (
            ("text", "label"),
            [("q", "x")],
            {"kind": "label", "chosen": ["bleu-4"]},
            "says nothing about answers of kind .label",
        ),
        (("text", "label"), [("q", "x")], {"kind": "text", "method": "chain"}, "cannot be found by 'chain'"),
        (("text", "label"), [("q", "x")], {"template": "{nothing}"}, "no such column"),
        (("text", "label"), [("q", "x")], {"few_shot": 3}, "1 usable row for 3 examples"),
        (("text", "label"), [("q", " ")], {"kind": "text"}, "no row with a prompt and a reference"),
    ],
)
def test_a_problem_is_a_sentence_with_a_way_out(store, tmp_path, fake, head, rows, options, said):
    path = write(tmp_path / "t.csv", head, rows)
    with pytest.raises(GLMError, match=said) as caught:
        evaluate.start(store, fake(evaluate.plan(path, **options)))
    assert caught.value.todo
    assert all(job.state == "failed" for job in store.list(kind="evaluate"))


# ---- runs


def test_a_stopped_run_goes_on_and_scores_every_row_once(store, tmp_path, fake):
    path = write(tmp_path / "t.csv", ("prompt", "response"), [(f"q{i}", f"{i}q") for i in range(400)])
    task = fake(evaluate.plan(path, kind="text", chosen=("exact-match",)), delay=0.02)
    job = evaluate.start(store, task)
    worker = Supervisor(store, {"evaluate": evaluate.run})
    claimed = store.claim(("evaluate",), worker.owner, job.id)
    thread = threading.Thread(target=worker.run, args=(claimed,))
    thread.start()
    while store.get(job.id).done < 4:
        thread.join(0.02)
    store.request_pause(job.id)
    thread.join()
    assert store.get(job.id).state == "paused"
    part = evaluate.scores(store, job.id)
    assert part.n == store.get(job.id).done and part.n_left == 400 - part.n
    store.resume(job.id)
    run = finish(store, job)
    assert run.state == "done" and run.scores.n == 400 and run.scores.n_left == 0


def test_scored_texts_are_not_scored_again(store, tmp_path, monkeypatch):
    path = lines(tmp_path / "p.jsonl", [{"labels": "好", "predict": "好"}] * 5)
    run = evaluate.import_predictions(store, path, kind="text")
    before = (scoring.folder_of(store, run.id) / scoring.SCORES).read_bytes()
    (scoring.folder_of(store, run.id) / scoring.SCORES).unlink()
    monkeypatch.setattr(metrics, "score_text", lambda *_: pytest.fail("scored again"))
    assert evaluate.scores(store, run.id).n == 5
    assert (scoring.folder_of(store, run.id) / scoring.SCORES).read_bytes() == before


@pytest.mark.parametrize("kind", ["text", "label", "choice", "chain"])
def test_a_run_repeats_to_the_byte_also_in_another_batch_size(
    store, tmp_path, real, choices, one_thread, kind
):
    if kind in ("choice", "chain"):
        path, options = choices, {"method": "likelihood" if kind == "choice" else "chain"}
    else:
        rows = [(f"{'很' * i}好的评论 {i}", ("正常", "垃圾")[i % 2]) for i in range(8)]
        path = write(tmp_path / "t.csv", ("text", "label"), rows)
        options = {"kind": kind, "method": "likelihood" if kind == "label" else "generate"}
    plan = evaluate.plan(path, settings=GenerationSettings(max_new_tokens=6), **options)
    first = finish(store, evaluate.start(store, real(plan, 8)))
    assert first.state == "done", first.job.message
    second = evaluate.rerun(store, first.id)
    second = finish(store, second.job)
    third = finish(store, evaluate.start(store, real(plan, 1)))
    kept = [
        (scoring.folder_of(store, one.id) / scoring.SCORES).read_bytes() for one in (first, second, third)
    ]
    assert kept[0] == kept[1] == kept[2]
    told = [
        [row["prediction"] for row in evaluate.answers_page(store, one.id, 0, 99)]
        for one in (first, second, third)
    ]
    assert told[0] == told[1] == told[2] and any(told[0])
    assert second.rerun_of == first.id


def test_a_likelihood_run_takes_the_likeliest_letter(store, choices, real, one_thread):
    task = real(evaluate.plan(choices))
    run = finish(store, evaluate.start(store, task))
    host = engine.host().current
    tokenizer = host.tokenizer
    questions = Questions(tokenizer, task, host.context)
    rows = list(rows_of(task, open_table(choices)))
    expected = host.score(
        [questions.build(row.cells).ids for row in rows], [tokenizer.answer_ids(one)[:-1] for one in LETTERS]
    )
    shown = evaluate.answers_page(store, run.id, 0, 99)
    for row, values in zip(shown, expected, strict=True):
        assert row["prediction"] == LETTERS[int(np.argmax(values))]
        assert list(row["log_probabilities"].values()) == pytest.approx(values, abs=1e-3)
    confidence = evaluate.per_row(store, run.id).confidence
    assert ((0.25 < confidence) & (confidence <= 1)).all()
    assert run.scores.headline.n == 6 and run.scores.n_no_answer == 0


def test_a_chain_of_thought_is_kept_and_its_option_scored(store, choices, real, one_thread):
    task = real(evaluate.plan(choices, method="chain", settings=GenerationSettings(max_new_tokens=5)))
    assert task.extraction == "综上所述，ABCD中正确的选项是：" and "答案" not in task.template
    run = finish(store, evaluate.start(store, task))
    assert run.state == "done", run.job.message
    host = engine.host().current
    questions = Questions(host.tokenizer, task, host.context)
    for row, shown in zip(
        rows_of(task, open_table(choices)), evaluate.answers_page(store, run.id, 0, 9), strict=True
    ):
        question = questions.build(row.cells).text
        ids = questions.follow_up(question, shown["reasoning"], row.cells)
        assert ids == questions._ids(f"{question}{shown['reasoning']}\n综上所述，ABCD中正确的选项是：")
        values = host.score([ids], [host.tokenizer.answer_ids(one)[:-1] for one in LETTERS])[0]
        assert shown["prediction"] == LETTERS[int(np.argmax(values))]


def test_runs_are_named_tagged_filtered_and_deleted(store, tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"labels": "好", "predict": "好"}] * 3)
    first = evaluate.import_predictions(store, path, kind="text", title="one")
    second = evaluate.import_predictions(store, path, kind="label")
    assert evaluate.rename(store, first.id, "  一个 名字 ").title == "一个 名字"
    assert evaluate.rename(store, first.id, " ").title == "one"
    assert evaluate.tag(store, first.id, ["a", "a", " ", "b"]).tags == ("a", "b")
    assert [one.id for one in evaluate.runs(store, tag="b")] == [first.id]
    assert [one.id for one in evaluate.runs(store, kind="label")] == [second.id]
    again = evaluate.rerun(store, first.id)
    assert again.tags == ("a", "b") and again.scores == first.scores and again.state == "done"
    evaluate.delete(store, first.id)
    assert not scoring.folder_of(store, first.id).exists()
    assert {one.id for one in evaluate.runs(store)} == {second.id, again.id}
    with pytest.raises(GLMError, match="no job"):
        evaluate.run_of(store, first.id)


def test_checkpoints_of_a_training_are_a_series(store, tmp_path, choices, tiny_checkpoint):
    training = tmp_path / "training"
    for step in (20, 100):
        shutil.copytree(tiny_checkpoint, training / f"checkpoint-{step}")
        (training / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    found = evaluate.start_steps(store, evaluate.plan(choices), training, device="cpu", precision="fp32")
    assert [one.step for one in found] == [20, 100]
    series = evaluate.by_step(reversed(evaluate.runs(store, group=str(training.resolve()))))
    assert [(step, one.task.checkpoint.endswith(f"checkpoint-{step}")) for step, one in series] == [
        (20, True),
        (100, True),
    ]
    with pytest.raises(GLMError, match="no checkpoint of a step"):
        evaluate.start_steps(store, evaluate.plan(choices), tmp_path)
    # One that was chosen by itself is known by its folder.
    task = evaluate.with_model(evaluate.plan(choices), training / "checkpoint-100", None, "fp32", "cpu")
    alone = evaluate.run_of(store, evaluate.start(store, task).id)
    assert (alone.task.group, alone.step, alone.training) == ("", 100, str(training.resolve()))
    assert {one.training for one in found} == {alone.training}
    whole = evaluate.with_model(evaluate.plan(choices), tiny_checkpoint, None, "fp32", "cpu")
    one = evaluate.run_of(store, evaluate.start(store, whole).id)
    assert (one.step, one.training) == (None, "")


def test_rows_manifest_and_predictions_are_written(store, tmp_path):
    path = write(tmp_path / "p.csv", ("text", "label", "prediction"), [("=1", "0", "0"), ("b", "1", "x")] * 3)
    run = evaluate.import_predictions(store, path)
    evaluate.export(store, run.id, tmp_path / "rows.csv", "csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["answer"] == "x" and rows[1]["right"] == "0" and rows[0]["right"] == "1"
    assert rows[1]["prediction (2)"] == "x" and rows[0]["text"] == "'=1"
    manifest = json.loads((tmp_path / "rows.csv.manifest.json").read_text(encoding="utf-8"))
    assert manifest["scores"]["values"]["accuracy"]["estimate"] == 0.5
    assert str(tmp_path) not in json.dumps(manifest)
    save_predictions(store, run.id, tmp_path / "generated_predictions.txt")
    again = evaluate.import_predictions(store, tmp_path / "generated_predictions.txt")
    assert again.scores.values == run.scores.values


def test_published_scores_stand_beside_files_of_their_columns_only(tmp_path):
    path = lines(
        tmp_path / "dev.json", [{"content": f"类型#裙{i}", "summary": f"一条裙子 {i}"} for i in range(5)]
    )
    assert evaluate.published(evaluate.plan(path, kind="text"))[0][2]["rouge-l"] == 24.97
    other = write(tmp_path / "t.csv", ("prompt", "response"), [("a", "b")])
    assert evaluate.published(evaluate.plan(other, kind="text")) == ()


def test_a_column_of_the_file_is_there_to_cut_the_scores_by(store, tmp_path):
    path = write(tmp_path / "p.csv", ("page", "label", "prediction"), [("x", "0", "0"), ("y", "1", "x")] * 3)
    run = evaluate.import_predictions(store, path)
    pages = np.array(evaluate.column(store, run.id, "page"))
    right = evaluate.per_row(store, run.id).measure("accuracy")
    assert right[pages == "x"].mean() == 1 and right[pages == "y"].mean() == 0
    with pytest.raises(GLMError, match="no column 'z'"):
        evaluate.column(store, run.id, "z")


def test_predictions_may_be_scored_by_the_thread_that_runs_jobs(store, tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"labels": "好", "predict": "好"}] * 3)
    run = evaluate.import_predictions(store, path, kind="text", wait=False)
    assert run.state == "queued" and run.scores is None
    assert finish(store, run.job).scores.n == 3


# ---- the shell


@pytest.fixture
def shell(capsys):
    def call(*arguments):
        status = cli.main([str(one) for one in arguments])
        output = capsys.readouterr()
        return SimpleNamespace(status=status, out=output.out, err=output.err)

    return call


def test_predictions_are_scored_from_the_shell(shell, tmp_path):
    path = lines(
        tmp_path / "generated_predictions.txt", [{"labels": "好", "predict": one} for one in ("好", "", "坏")]
    )
    done = shell("evaluate", "--predictions", path, "--kind", "text", "--json", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["scores"]["n"] == 3 and found["scores"]["n_empty"] == 1
    assert json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8")) == found["scores"]
    listed = shell("evaluate", "--list")
    assert found["job"] in listed.out and "rouge-l 33.33" in listed.out
    assert json.loads(shell("evaluate", "--list", "--json").out)[0]["scores"]["rouge-l"]["n"] == 3


def test_a_checkpoint_is_scored_from_the_shell_and_not_twice(shell, choices, tiny_checkpoint, monkeypatch):
    arguments = [
        "evaluate",
        choices,
        "--checkpoint",
        tiny_checkpoint,
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    done = shell(*arguments)
    assert done.status == 0, done.err
    assert "6 of 6 rows count" in done.out and "* accuracy" in done.out
    monkeypatch.setattr(evaluate, "run", lambda *_: pytest.fail("asked again"))
    assert "answered these rows already" in shell(*arguments).err
    assert len(jobs.store(Settings.read()).list(kind="evaluate")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate"], "There is no file"),
        (["evaluate", "a.csv", "--predictions", "b.csv"], "two files"),
        (["evaluate", "missing.csv"], "missing.csv"),
        (["compare", "a", "b"], "There is no run 'a'"),
        (["compare", "a"], "There are 1 runs"),
    ],
)
def test_a_wrong_command_is_one_line_and_ends_with_1(shell, arguments, said):
    done = shell(*arguments)
    assert done.status == 1 and said in done.err and "Traceback" not in done.err


# ---- what a screen and a report show of a run


def test_scores_fall_into_bins_and_the_highest_into_the_last():
    found = evaluate.views.histogram(np.array([0.0, 4.9, 5.0, 99.0, 100.0, np.nan]))
    assert [one.n for one in found if one.n] == [2, 1, 2]
    assert (found[0].low, found[0].high, found[-1].high) == (0.0, 5.0, 100.0)


def test_the_worst_rows_come_first_and_equal_ones_in_the_order_of_the_file(store, tmp_path):
    rows = [("甲乙丙丁", "甲乙丙丁"), ("甲乙丙丁", ""), ("春天来了", "春天"), ("夏天很热", "冬天")]
    file = lines(tmp_path / "p.jsonl", [{"labels": a, "predict": b} for a, b in rows])
    run = evaluate.import_predictions(store, file)
    table = evaluate.per_row(store, run.id)
    assert evaluate.views.places(table, "worst", "rouge-l").tolist()[0] in (1, 3)
    assert evaluate.views.places(table, "best", "rouge-l").tolist()[0] == 0
    assert evaluate.views.places(table, "empty", "rouge-l").tolist() == [1]
    assert evaluate.views.places(table, "file", "rouge-l").tolist() == [0, 1, 2, 3]
    scores = table.measure("rouge-l")[evaluate.views.places(table, "worst", "rouge-l")]
    assert (np.diff(scores) >= 0).all()
    chance = [evaluate.views.places(table, "random", "rouge-l", seed).tolist() for seed in (0, 0, 1)]
    assert chance[0] == chance[1]
    assert sorted(chance[0]) == sorted(chance[2]) == [0, 1, 2, 3]


def test_wrong_rows_are_the_worst_of_labels_and_the_majority_is_known(store, tmp_path):
    rows = [("spam", "spam")] * 6 + [("ham", "spam")] * 2 + [("ham", "neither")] * 2
    file = lines(tmp_path / "p.jsonl", [{"label": a, "predict": b} for a, b in rows])
    run = evaluate.import_predictions(store, file, kind="label")
    table = evaluate.per_row(store, run.id)
    assert evaluate.views.places(table, "worst", "accuracy").tolist() == [6, 7, 8, 9]
    assert evaluate.views.places(table, "best", "accuracy").tolist() == [0, 1, 2, 3, 4, 5]
    most = evaluate.views.guess(table)
    assert (most.answer, most.share, most.n) == ("spam", 0.6, 10)


def test_slices_add_up_to_the_whole(store, tmp_path):
    rows = [{"label": "ab"[i % 2], "predict": "ab"[(i // 5) % 2], "site": f"s{i % 3}"} for i in range(90)]
    run = evaluate.import_predictions(store, lines(tmp_path / "p.jsonl", rows), kind="label")
    table = evaluate.per_row(store, run.id)
    values, how = evaluate.views.grouped(evaluate.column(store, run.id, "site"))
    found = evaluate.views.slices(table, values, "accuracy")
    assert how == "value"
    assert [(one.value, one.n, one.few) for one in found] == [(f"s{i}", 30, False) for i in range(3)]
    right = sum(one.score.estimate * one.n for one in found)
    assert right == pytest.approx(int(table.right.sum()))
    assert all(one.score.low < one.score.estimate < one.score.high for one in found)


def test_a_column_of_many_values_is_cut_into_ranges():
    numbers, how = evaluate.views.grouped([str(i) for i in range(400)])
    assert how == "number"
    assert sorted(set(numbers)) == ["0 – 99", "100 – 199", "200 – 299", "300 – 399"]
    texts, how = evaluate.views.grouped(["x" * (i % 200) for i in range(400)])
    assert how == "length"
    assert len(set(texts)) == 4
    assert evaluate.views.ranges([1.0, 1.0, float("nan"), 1.0]) == ["1", "1", "", "1"]


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_marked_texts_are_the_texts(a, b):
    left, right = evaluate.views.marked(a, b)
    assert "".join(text for text, _ in left) == a
    assert "".join(text for text, _ in right) == b
    equal = ["".join(text for text, other in side if not other) for side in (left, right)]
    assert equal[0] == equal[1]


def test_what_only_one_text_has_is_marked():
    left, right = evaluate.views.marked("这件大衣很保暖", "这件外套很保暖")
    assert [text for text, other in left if other] == ["大衣"]
    assert [text for text, other in right if other] == ["外套"]


def test_the_same_rows_are_asked_at_other_precisions(
    store, choices, tiny_checkpoint, one_thread, monkeypatch
):
    from glm_core import checkpoints

    task = evaluate.with_model(evaluate.plan(choices), tiny_checkpoint, precision="fp32", device="cpu")
    running = Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    monkeypatch.setattr(engine, "host", lambda: FakeHost(running))
    try:
        first = finish(store, evaluate.start(store, task))
        others = evaluate.start_precisions(store, first.id, ("bf16", "int8"), "cpu")
        assert [one.task.precision for one in others] == ["bf16", "int8"]
        assert [one.title for one in others] == [f"{first.title} (BF16)", f"{first.title} (INT8)"]
        assert all(one.job.total == first.job.total for one in others)
        waiting = evaluate.views.by_precision(first, evaluate.runs(store))
        assert [name for name, _ in waiting] == ["fp32"]
        done = finish(store, others[1].job)
    finally:
        running.close()
    found = evaluate.views.by_precision(done, evaluate.runs(store))
    assert [(name, one.id) for name, one in found] == [("fp32", first.id), ("int8", done.id)]


def test_another_checkpoint_is_not_asked_at_other_precisions(store, choices, tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    task = evaluate.with_model(evaluate.plan(choices), folder, precision="fp32", device="cpu")
    run = evaluate.run_of(store, evaluate.start(store, task).id)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": 1}))
    with pytest.raises(GLMError, match="its files have changed"):
        evaluate.start_precisions(store, run.id, ("bf16",), "cpu")
    file = lines(tmp_path / "p.jsonl", [{"labels": "a", "predict": "a"}])
    with pytest.raises(GLMError, match="made elsewhere"):
        evaluate.start_precisions(store, evaluate.import_predictions(store, file).id, ("bf16",))
    assert len(evaluate.runs(store)) == 2


def test_a_large_file_of_predictions_is_copied_while_the_run_is_shown(store, tmp_path):
    file = lines(tmp_path / "p.jsonl", [{"labels": "甲乙", "predict": "甲乙"}] * 30)
    run = evaluate.import_predictions(store, file, kind="text", wait=False, background=True)
    end = time.monotonic() + 30
    while store.get(run.id).state == "preparing" and time.monotonic() < end:
        time.sleep(0.01)
    assert finish(store, store.get(run.id)).scores.n == 30


def test_predictions_of_options_are_told_from_the_columns(store, tmp_path):
    rows = [dict(zip((*HEAD, "prediction"), (*one, "B"), strict=True)) for one in CHOICES]
    run = evaluate.import_predictions(store, lines(tmp_path / "p.jsonl", rows))
    assert run.task.kind == "choice"
    assert run.scores.headline.estimate == pytest.approx(1 / 6)
