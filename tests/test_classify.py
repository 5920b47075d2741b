"""Classification: always one of the labels with its probability, a job that loses nothing, and the shell's table."""

from __future__ import annotations

import csv
import json
import math
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_core import batch, checkpoints, classify, cli, engine, jobs
from glm_core.classify import Classifier, Label, LabelTask, Scored, match_labels
from glm_core.engine import GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.jobs import JobStore, Supervisor
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message

TEXTS = (
    "加我微信，兼职日结三百",
    "这期视频讲得真清楚",
    "good point, thanks",
    "点我头像领福利",
    "第一次看，学到了",
)


class Table:
    def __init__(self, rows):
        self._rows, self.warnings = rows, ()

    def rows(self):
        return iter(self._rows)


def make_task(folder, **values):
    values = {"template": "评论：{text}", "columns": ("text",), "instruction": "垃圾还是正常？"} | values
    return LabelTask(
        checkpoint=str(folder), checkpoint_fingerprint=checkpoints.fingerprint(Path(folder)), precision="fp32",
        device="cpu", input_name="comments.csv", input_sha256="0" * 64, **values,
    )  # fmt: skip


@pytest.fixture
def task(tiny_checkpoint):
    return make_task(tiny_checkpoint)


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workbench.db")


@pytest.fixture
def hosted(tiny_checkpoint, one_thread):
    """The engine of this process, with the small checkpoint."""
    host = engine.host()
    yield host.use(tiny_checkpoint, "fp32", "cpu")
    host.unload()


def run_job(store, job, until=("done", "failed", "paused", "cancelled")):
    supervisor = Supervisor(store, {"classify": classify.run}, poll_s=0.02).start()
    deadline = time.monotonic() + 60
    while store.get(job.id).state not in until and time.monotonic() < deadline:
        time.sleep(0.02)
    supervisor.stop()
    return store.get(job.id)


# ---- one row


def test_the_answer_is_the_likeliest_label_by_whole_label_likelihood(engine, task):
    found = classify.classify(engine, task, TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        prompt = engine.tokenizer.chat_ids([Message("user", f"垃圾还是正常？\n评论：{text}")])
        answers = [engine.tokenizer.answer_ids(label.verbaliser) for label in task.labels]
        scores = engine.score([prompt], answers)[0]
        assert one.scores == pytest.approx(scores, abs=1e-4)
        shares = np.exp(scores) / np.exp(scores).sum()
        assert one.probabilities == pytest.approx(shares.tolist(), abs=1e-4)
        assert one.label == ("0", "1")[int(np.argmax(shares))]
        assert one.outside == pytest.approx(1 - np.exp(scores).sum(), abs=1e-5)
        assert one.margin == pytest.approx(abs(shares[0] - shares[1]), abs=1e-4)
        assert one.entropy == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-4)


def test_labels_that_begin_alike_are_told_apart(engine, task):
    labels = tuple(Label(str(number)) for number in (1, 10, 100))
    alone = classify.classify(engine, replace(task, labels=labels), TEXTS)
    other = classify.classify(engine, replace(task, labels=labels[::-1]), TEXTS)
    for one, two in zip(alone, other, strict=True):
        assert one.scores == pytest.approx(two.scores[::-1], abs=1e-4) and len(set(one.scores)) == 3
        assert sum(one.probabilities) == pytest.approx(1.0)


def test_the_greedy_answer_is_the_generated_one(engine, task):
    classifier = Classifier(engine, task)
    prompts = [classifier.prompts.build((text,)) for text in TEXTS]
    handles = engine.submit_many(
        [Request(prompt.ids, GenerationSettings(max_new_tokens=8), "batch") for prompt in prompts]
    )
    assert all(handle.wait(60) for handle in handles)
    spoken = [handle.text for handle in handles]
    labels = (Label("a", spoken[0]), Label("b", "垃圾"))
    found = classify.classify(engine, replace(task, labels=labels), TEXTS)
    for one, text, handle in zip(found, spoken, handles, strict=True):
        if handle.finish_reason == "stop":
            assert one.greedy == ("a" if text == spoken[0] else "b" if text == "垃圾" else None)


def test_examples_and_instruction_come_first_and_are_shared(engine, task):
    shots = (("加我薇信", "1"), ("讲得好", "0"))
    classifier = Classifier(engine, replace(task, shots=shots))
    turns = [
        Message("user", "垃圾还是正常？\n评论：加我薇信"), Message("assistant", "垃圾"),
        Message("user", "评论：讲得好"), Message("assistant", "正常"), Message("user", "评论：你好"),
    ]  # fmt: skip
    assert list(classifier.prompts.build(("你好",)).ids) == engine.tokenizer.chat_ids(turns)
    assert len(classifier.prompts.head) >= len(engine.tokenizer.chat_ids(turns[:4])) - 2


def test_an_instruction_with_braces_is_text(engine, task):
    classifier = Classifier(engine, replace(task, instruction='Answer {"label": 1}'))
    assert classifier.prompts.build(("x",)).text == 'Answer {"label": 1}\n评论：x'


def test_a_threshold_moves_the_label_and_no_probability(engine, task):
    plain = classify.classify(engine, task, TEXTS)
    highest = max(one.probabilities[1] for one in plain)
    moved = classify.classify(engine, replace(task, positive="1", threshold=highest), TEXTS)
    assert [one.probabilities for one in moved] == [
        pytest.approx(one.probabilities, abs=1e-6) for one in plain
    ]
    assert [one.label for one in moved].count("1") >= 1
    every = classify.classify(engine, replace(task, positive="1", threshold=0.0), TEXTS)
    assert {one.label for one in every} == {"1"}
    three = replace(task, labels=(*task.labels, Label("2", "广告")), positive="2", threshold=1.0)
    for one in classify.classify(engine, three, TEXTS):
        assert one.label == ("0", "1")[int(np.argmax(one.probabilities[:2]))]


def test_what_a_question_says_without_a_text_is_taken_away(engine, task):
    plain = classify.classify(engine, task, (*TEXTS, *classify.CONTENT_FREE))
    free = classify.classify(engine, replace(task, content_free=True), TEXTS)
    empty = np.mean([one.probabilities for one in plain[-3:]], axis=0)
    for before, after in zip(plain, free, strict=False):
        expected = np.array(before.probabilities) / empty
        assert after.probabilities == pytest.approx((expected / expected.sum()).tolist(), abs=1e-5)


def test_reasons_to_review_name_their_numbers(engine, task):
    sure = classify.classify(engine, replace(task, abstain_below=1.0), [TEXTS[0], "  "])
    highest = max(sure[0].probabilities)
    assert f"The probability is {highest:.2f}, below 1.00." in sure[0].reason
    assert "The text is empty." in sure[1].reason and "The text is empty." not in sure[0].reason
    assert f"{sure[0].outside:.0%} of the probability is outside the labels." in sure[0].reason
    long = classify.classify(engine, task, ["字" * 5000])[0]
    assert long.truncated and "The text was shortened." in long.reason


def test_words_that_moved_the_answer_are_those_whose_absence_changes_the_odds(engine, task):
    text = "加我微信，兼职日结三百"
    words = classify.explain(engine, task, text, "1")
    assert "".join(word.text for word in words) == text
    for word in words:
        assert text[word.start :].startswith(word.text)
        without = text[: word.start] + text[word.start + len(word.text) :]
        odds = [
            math.log(one.probabilities[1] / one.probabilities[0])
            for one in classify.classify(engine, task, [text, without])
        ]
        assert word.change == pytest.approx(odds[0] - odds[1], abs=1e-3)
    label = classify.classify(engine, task, [text])[0].label
    other = classify.explain(engine, task, text, "0")
    assert [word.change for word in other] == pytest.approx([-word.change for word in words], abs=1e-6)
    assert classify.explain(engine, task, text) == (words if label == "1" else other)
    assert classify.explain(engine, task, "") == []
    assert 100 < len(classify.explain(engine, task, "你好啊，" * 100)) <= classify.MOST_PIECES


# ---- what cannot be


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"labels": ()}, "no labels"),
        ({"labels": (Label("a"),)}, "one label"),
        ({"labels": (Label("a"), Label("a", "b"))}, "is named 'a'"),
        ({"labels": (Label("a", "x"), Label("b", "x"))}, "is written 'x'"),
        ({"labels": (Label(" "), Label("b"))}, "label is empty"),
        ({"labels": (Label("a\ud800"), Label("b"))}, "half a character"),
        ({"labels": tuple(Label(str(i)) for i in range(1001))}, "1,001 labels"),
        ({"template": "{title}"}, "no such column"),
        ({"template": "评论"}, "uses no column"),
        ({"template": "{text"}, "single {"),
        ({"positive": "2"}, "positive label '2'"),
        ({"threshold": 0.5}, "no positive label"),
        ({"threshold": 1.5, "positive": "1"}, "threshold is 1.5"),
        ({"abstain_below": -0.1}, "abstain_below is -0.1"),
        ({"temperature": 0.0}, "temperature of the calibration is 0.0"),
        ({"bias": (1.0,)}, "1 biases for 2 labels"),
        ({"shots": (("hi", "2"),)}, "the label '2'"),
        ({"output_column": " "}, "no name"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_is_refused_with_its_reason(task, store, values, what):
    with pytest.raises(GLMError) as caught:
        classify.start(store, replace(task, **values), Table([("x",)]))
    assert what in caught.value.message and (caught.value.todo or "{" in what)
    assert store.list() == []


def test_a_stored_task_comes_back_whole_and_a_damaged_one_is_a_sentence(task):
    whole = replace(task, shots=(("x", "1"),), bias=(0.0, 0.5), threshold=0.25, positive="1")
    assert LabelTask.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    for damaged in ({}, {"labels": 3, "columns": ["a"]}, whole.to_json() | {"shots": [1]}):
        with pytest.raises(GLMError, match="incomplete"):
            LabelTask.from_json(damaged)


words = st.text(
    st.sampled_from("01aＡ１ 正常垃圾{}#\n\t\u200b\ufeff\ud800\U0001f600\x00.٣"), min_size=0, max_size=6
)


@pytest.fixture(scope="module")
def shared_engine(tiny_checkpoint):
    running = engine.Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    yield running
    running.close()


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    labels=st.lists(st.tuples(words, words), max_size=4),
    template=st.one_of(words, words.map(lambda text: "{text}" + text), st.just("{text}")),
    instruction=words,
    text=words,
    compute=st.integers(0, 19),
)
def test_damaged_labels_and_templates_give_a_sentence_or_a_right_answer(
    shared_engine, tiny_checkpoint, labels, template, instruction, text, compute
):
    task = replace(
        BASE.setdefault("task", make_task(tiny_checkpoint)),
        labels=tuple(Label(*pair) for pair in labels), template=template, instruction=instruction,
    )  # fmt: skip
    try:
        classifier = Classifier(shared_engine, task)
    except GLMError as error:
        assert error.message and error.message != str(error), "what happened, and what to do"
        return
    assert LabelTask.from_json(json.loads(json.dumps(task.to_json()))) == task
    if compute:  # computing all of them takes a minute
        return
    if "\ud800" in text:
        with pytest.raises(GLMError, match="half a character"):
            classifier.score([(text,)])
        return
    one = classifier.score([(text,)])[0]
    assert one.label in task.names and sum(one.probabilities) == pytest.approx(1.0)
    assert (
        0 <= one.outside <= 1
        and 0 <= one.margin <= 1
        and -1e-9 <= one.entropy <= math.log(len(labels)) + 1e-9
    )


BASE: dict[str, LabelTask] = {}


# ---- labels of a file


def test_values_outside_the_labels_are_counted_and_proposed_but_never_mapped():
    labels = (Label("0", "正常", "normal"), Label("1", "垃圾", "spam"))
    values = [
        "0",
        "1",
        "1",
        "1.0",
        1.0,
        " 1",
        "１",
        "0.0",
        "Spam",
        "SPAM",
        "垃圾",
        "maybe",
        "",
        None,
        "01",
        "10",
    ]
    found = match_labels(values, labels)
    assert found.mapped == {"0": "0", "1": "1"}
    assert found.unknown == {
        "1.0": 2, "": 2, " 1": 1, "１": 1, "0.0": 1, "Spam": 1, "SPAM": 1, "垃圾": 1, "maybe": 1, "01": 1, "10": 1,
    }  # fmt: skip
    assert found.proposals == {
        "1.0": "1", " 1": "1", "１": "1", "0.0": "0", "Spam": "1", "SPAM": "1", "垃圾": "1",
    }  # fmt: skip
    assert found.apply(["1", "1.0", "maybe", 1.0]) == ["1", None, None, None]
    assert found.apply(["1", "1.0", "maybe", 1.0], {"1.0": "1"}) == ["1", "1", None, "1"]
    counted = match_labels({"1": 5, "x": 2}, labels)
    assert counted.unknown == {"x": 2} and counted.mapped == {"1": "1"}


def test_a_value_that_fits_two_labels_is_not_proposed():
    assert match_labels(["A"], (Label("a"), Label("ａ"))).proposals == {}


# ---- calibration


def test_calibration_finds_the_temperature_and_bias_it_was_drawn_with(engine, task):
    draw = np.random.default_rng(1)
    scores = np.stack([np.zeros(20_000), draw.normal(0, 6, 20_000)], 1)
    chance = 1 / (1 + np.exp(-(scores[:, 1] / 3.0 + 0.7)))
    gold = np.where(draw.random(20_000) < chance, "1", "0").tolist()
    found = classify.calibrate(scores.tolist(), gold, ("0", "1"))
    assert found.temperature == pytest.approx(3.0, rel=0.05) and found.bias[1] == pytest.approx(0.7, abs=0.06)
    crossed = classify.calibrate_across(scores[:500].tolist(), gold[:500], ("0", "1"))
    assert len(crossed.fits) == 5 and crossed.probability.shape == (500, 2)
    plain = classify.classify(engine, replace(task, content_free=True), TEXTS)
    after = classify.classify(engine, replace(task, content_free=True).calibrated(found), TEXTS)
    expected = found.apply([one.scores for one in plain])
    assert np.array([one.probabilities for one in after]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(GLMError, match=r"1 correct answers are not among the labels: 'x' \(1\)"):
        classify.calibrate([[0.0, 1.0]], ["x"], ("0", "1"))


# ---- the job


def test_a_job_labels_every_row_as_one_text_alone_and_equal_texts_once(hosted, task, store, tmp_path):
    draw = random.Random(4)
    texts = [
        "".join(draw.choice("加我微信领福利讲得好abc ") for _ in range(draw.randint(1, 60)))
        for _ in range(150)
    ]
    rows = [(str(i), text) for i, text in enumerate([*texts, *texts[:50], "", "字" * 5000])]
    task = replace(task, columns=("id", "text"), abstain_below=0.6)
    done = run_job(store, classify.start(store, task, Table(rows)))
    assert (done.state, done.done, done.failed, done.truncated) == ("done", 202, 0, 1), done.message
    names, answers = classify.read_answers(store, done.id)
    found = list(answers)
    assert names == ("0", "1") and [one.idx for one in found] == list(range(202))
    alone = classify.classify_rows(hosted, task, rows[::20])
    for one, other in zip(alone, found[::20], strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert one.scores == pytest.approx(other.scores, abs=1e-4) and one.reason == other.reason
        assert names.index(one.label) == other.answer
    for i in range(50):
        assert found[i].scores == found[150 + i].scores
    assert batch.DUPLICATES in done.warnings
    results = [result for _, _, result in store.iter_results(done.id)]
    assert sum(result.seconds > 0 for result in results) <= 152
    assert classify.from_result(results[0]).probabilities == found[0].probabilities
    report = classify.export(store, done.id, tmp_path / "out.csv", "csv")
    assert report.rows == 202
    with (tmp_path / "out.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["id", "text", "label", "0", "1", "margin", "outside", "reason", "status", "truncated"]
    assert float(table[1][3]) + float(table[1][4]) == pytest.approx(1, abs=1e-5)
    assert "shortened" in table[-1][7] and "empty" in table[-2][7]
    assert (tmp_path / "out.csv.manifest.json").exists()


def test_a_stopped_job_goes_on_with_the_same_answers_and_repeats_none(hosted, task, store, monkeypatch):
    monkeypatch.setattr(batch, "WINDOW_ROWS", 40)
    monkeypatch.setattr(batch, "COMMIT_ROWS", 5)
    draw = random.Random(5)
    rows = [("".join(draw.choice("加我微信领福利讲得好") for _ in range(30)),) for _ in range(200)]
    whole = run_job(store, classify.start(store, task, Table(rows)))
    expected = list(classify.read_answers(store, whole.id)[1])
    job = classify.start(store, task, Table(rows))
    each, scored, pauses = classify.Classifier.read, [], []

    def slow(self, scores, prompt):
        scored.append(prompt.text)
        if len(scored) % 50 == 0:
            store.request_pause(job.id)
            pauses.append(len(scored))
            time.sleep(0.5)
        return each(self, scores, prompt)

    monkeypatch.setattr(classify.Classifier, "read", slow)
    for _ in range(20):
        state = run_job(store, job).state
        if state == "done":
            break
        assert state == "paused"
        store.resume(job.id)
    assert len(pauses) > 1 and store.get(job.id).done == 200
    found = list(classify.read_answers(store, job.id)[1])
    for one, two in zip(found, expected, strict=True):
        assert (one.idx, one.answer) == (two.idx, two.answer)
        assert one.scores == pytest.approx(two.scores, abs=1e-4)
    assert len(scored) == len(set(scored)) == 200


def test_a_row_the_model_cannot_compute_fails_alone(hosted, task, store, tmp_path, monkeypatch):
    read = engine.Engine._forward_all

    def overflowing(self, cache, ids, *rest):
        logits = read(self, cache, ids, *rest)
        logits[(ids == self.tokenizer.encode("坏")[-1]).any(1)] = math.nan
        return logits

    monkeypatch.setattr(engine.Engine, "_forward_all", overflowing)
    rows = [("好",), ("坏",), ("好的",), ("x\ud800",)]
    done = run_job(store, classify.start(store, task, Table(rows)))
    assert (done.state, done.done, done.failed) == ("done", 2, 2)
    assert "left the range" in store.results_page(done.id, 1, 1)[0][2].error
    classify.export(store, done.id, tmp_path / "out.jsonl", "jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["ok", "failed", "ok", "failed"]
    assert lines[1]["label"] == "" and "left the range" in lines[1]["reason"]


def test_another_checkpoint_than_at_the_start_is_refused(hosted, task, store):
    job = classify.start(store, replace(task, checkpoint_fingerprint="other"), Table([("x",)]))
    done = run_job(store, job)
    assert done.state == "failed" and "not the one this job was started with" in done.message


def test_the_job_kind_is_known_to_the_supervisor():
    assert "classify" in jobs.KINDS


def test_a_chat_is_answered_while_a_job_runs(hosted, task, store):
    rows = [(f"{i} " + "讲得好" * 12,) for i in range(600)]
    job = classify.start(store, task, Table(rows))
    supervisor = Supervisor(store, {"classify": classify.run}, poll_s=0.02).start()
    try:
        while not store.get(job.id).done:
            time.sleep(0.01)
        ids = tuple(hosted.tokenizer.chat_ids([Message("user", "你好")]))
        before = hosted.submit(Request(ids, GenerationSettings(max_new_tokens=5)))
        assert before.wait(60)
        assert store.get(job.id).done < 600, "the job was over before the chat"
    finally:
        while store.get(job.id).state == "running":
            time.sleep(0.02)
        supervisor.stop()
    assert store.get(job.id).done == 600
    again = hosted.submit(Request(ids, GenerationSettings(max_new_tokens=5)))
    assert again.wait(60) and again.ids == before.ids


def test_the_answers_of_a_long_job_are_read_without_holding_them(store, task):
    """One query at a time: what is held does not grow with the rows."""
    job = store.create("classify", "big", task.to_json())
    store.add_rows(job.id, (("x",) for _ in range(60_000)))
    one = Scored("1", (-2.0, -0.5), (0.2, 0.8), 0.01, "1")
    for start in range(0, 60_000, 20_000):
        store.save_results(job.id, (classify.to_result(i, one) for i in range(start, start + 20_000)))
    import tracemalloc

    names, answers = classify.read_answers(store, job.id)
    tracemalloc.start()
    count = sum(answer.answer == 1 for answer in answers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000 and peak < 40 << 20


# ---- the shell


def test_the_shell_labels_a_file_and_scores_it(tmp_path, capsys, one_thread):
    rows = [("加我微信，兼职日结三百，包教包会", "垃圾"), ("这期视频讲得真清楚，谢谢老师", "正常")] * 6
    with (tmp_path / "comments.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("comment", "truth"), *rows])
    command = [
        "classify", str(tmp_path / "comments.csv"), "--column", "comment", "--labels", "正常,垃圾", "--gold", "truth",
        "--out", str(tmp_path / "out.jsonl"), "--json",
    ]  # fmt: skip
    assert cli.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 12 and said["failed"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(lines[0]) == [
        "comment", "truth", "label", "正常", "垃圾", "margin", "outside", "reason", "status", "truncated",
    ]  # fmt: skip
    right = sum(line["label"] == line["truth"] for line in lines)
    assert said["scores"]["accuracy"]["estimate"] == pytest.approx(right / 12)
    assert set(said["scores"]) >= {"accuracy", "macro-f1", "roc-auc", "ece"}
    assert said["scores"]["accuracy"]["low"] < right / 12 + 1e-9
    assert cli.main(command) == 0  # done already: nothing is computed again
    again = capsys.readouterr()
    assert json.loads(again.out)["scores"] == said["scores"] and "already" in again.err


def test_the_shell_says_what_is_wrong_before_it_loads_anything(tmp_path, capsys):
    path = tmp_path / "comments.csv"
    path.write_text("comment,truth\nhi,0.0\nho,spam\n", encoding="utf-8")
    common = ["classify", str(path), "--out", str(tmp_path / "out.csv"), "--labels", "0=正常,1=垃圾"]
    for more, what in (
        (["--column", "text"], "no column 'text'"),
        (["--column", "comment", "--gold", "gold"], "no column 'gold'"),
        (["--column", "comment", "--gold", "truth"], "'0.0' (1"),
        (["--column", "comment", "--labels", "正常"], "one label"),
        (["--template", "{x}"], "no such column"),
        (["--column", "comment", "--model", str(tmp_path / "nothing")], "neither a folder"),
    ):
        assert cli.main([*common, *more]) == 1
        assert what in capsys.readouterr().err, what
    assert MINI.is_dir() and not (tmp_path / "out.csv").exists()


def test_stopping_while_rows_are_scored_waits_for_no_more_than_a_piece(hosted, task):
    classifier, stop = Classifier(hosted, task), threading.Event()
    prompts = [classifier.prompts.build((f"{i} 讲得好",)).ids for i in range(400)]
    seen = 0
    for _ in classifier.scorer.each(prompts, stop):
        seen += 1
        stop.set()
    assert seen < 400
