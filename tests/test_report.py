"""After a training: what was measured is right, the verdict follows from it, and nothing that changed is passed over."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from glm_core import checkpoints, metrics
from glm_core.engine import Engine
from glm_core.errors import GLMError
from glm_core.finetune import probes, report
from glm_core.finetune.encoding import encode
from glm_core.finetune.examples import Example
from glm_core.finetune.loop import Plan, mean_loss
from glm_core.finetune.methods import Method, attach
from glm_core.finetune.split import normalised
from glm_core.finetune.work import MANIFEST, FinetuneTask, carry_out
from glm_core.settings import DATA

SPAM = ["加微信领红包", "兼职日结加群", "免费领红包加群", "点链接领钱", "加群兼职领钱"]
GOOD = ["这个多少钱", "画质不错", "视频很好看", "多谢分享", "讲得很清楚"]
FEW = (
    probes.Probe("a", "zh", "greeting", "你好", "你好！", ("你好",)),
    probes.Probe("b", "en", "arithmetic", "What is 2 plus 2?", "It is 4.", (r"(?<!\d)4(?!\d)",)),
    probes.Probe("c", "en", "always", "Hello", "Hello!", ("",)),
)


@pytest.fixture(autouse=True)
def few_probes(monkeypatch, request):
    """Three questions with short answers, but where the real ones are meant."""
    if "all_probes" not in request.fixturenames:
        monkeypatch.setattr(probes, "general", lambda: FEW)
        monkeypatch.setattr(probes, "TOKENS", 6)


@pytest.fixture
def all_probes():
    return probes.general()


@pytest.fixture
def trained(tmp_path, tiny_checkpoint, one_thread):
    """A short training on labelled comments or on texts; its output folder."""

    def train(method="lora", rows=None, output="out", **changes):
        if rows is None:
            rows = [(f"{text}{n}", label) for n in range(4) for part, label in ((SPAM, "垃圾"), (GOOD, "正常")) for text in part]  # fmt: skip
        file = tmp_path / "train.jsonl"
        file.write_text(
            "".join(json.dumps({"content": a, "label": b}, ensure_ascii=False) + "\n" for a, b in rows),
            encoding="utf-8",
        )
        settings = {"dev_share": 0.3, "max_source": 24, "max_target": 6} | changes
        plan = Plan(Method(method, prefix_length=4, freeze_layers=1), "fp32", 1e-2, 4, 1, 3, save_steps=3)
        carry_out(FinetuneTask(str(tiny_checkpoint), plan, str(file), str(tmp_path / output), **settings))
        return tmp_path / output

    return train


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("method", ["lora", "p-tuning-v2", "full"])
def test_a_report_compares_with_the_base_and_the_baseline_on_the_same_rows(trained, tiny_checkpoint, method):
    folder = trained(method)
    said = []
    found = report.make(folder, said.append)
    assert json.loads((folder / report.REPORT).read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert report.read(folder) == json.loads(json.dumps(found))
    assert not list(folder.glob("*.part"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert found["kind"] == "labels" and found["rows"] == found["dev_rows"] == manifest["rows"]["dev"] == 12
    assert set(found["systems"]) == {"tuned", "base", "base_choice", "baseline"}
    assert set(found["comparisons"]) == {"base", "base_choice", "baseline"}
    for system in found["systems"].values():
        assert system["accuracy"]["n"] == 12 and sum(map(sum, system["confusion"])) == 12
    # The dev loss of the loop, computed before the files were written.
    assert found["dev_loss"]["tuned"] == pytest.approx(manifest["dev_losses"][-1][1], rel=1e-4)
    base = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    engine = Engine(base)
    plain = probes.measure(engine, FEW)
    engine.close()
    assert found["forgetting"]["before"]["estimate"] == sum(plain.right) / 3
    assert found["forgetting"]["nll"]["b"] == pytest.approx(sum(plain.nll) / 3, rel=1e-4)
    assert found["effect"]["probes"] == 3 and found["effect"]["dev_rows"] == 12
    lines = report.text(found)
    assert lines[0] == found["verdict"]["text"] == said[-1]
    assert any(line.startswith("TF-IDF baseline: accuracy") for line in lines)


def test_texts_are_scored_by_rouge_against_the_base(trained):
    rows = [(f"写一句话{n}", f"今天天气真好，我们去公园{n}走走") for n in range(20)]
    found = report.make(trained(rows=rows))
    assert found["kind"] == "texts" and set(found["systems"]) == {"tuned", "base"}
    assert set(found["comparisons"]["base"]) == set(report.TEXT_SCORES)
    assert found["verdict"]["against"] == "base"
    assert any(line.startswith("Fine-tuned model: ROUGE-1") for line in report.text(found))


def test_without_dev_rows_only_the_general_questions_are_asked(trained):
    found = report.make(trained(dev_share=0.0))
    assert found["kind"] == "none" and found["verdict"]["kind"] == "none" and found["dev_loss"] is None
    assert found["forgetting"]["n"] == 3 and report.text(found)


def test_a_measuring_that_is_stopped_writes_nothing_and_can_be_done_again(trained):
    folder = trained()
    with pytest.raises(probes.Stopped):
        report.make(folder, stop=lambda: True)
    assert not (folder / report.REPORT).exists() and report.read(folder) is None
    assert report.make(folder)["kind"] == "labels"


def test_what_is_no_longer_the_same_is_refused(trained, tmp_path, tiny_checkpoint):
    with pytest.raises(GLMError, match="holds no training"):
        report.make(tmp_path)
    folder = trained()
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))

    def refused(changed, match):
        (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(GLMError, match=match) as caught:
            report.make(folder)
        assert caught.value.todo

    refused(manifest | {"state": "stopped"}, "is not finished")
    refused(manifest | {"base": {"name": "x", "fingerprint": "0"}}, "no longer the checkpoint")
    refused(manifest | {"rows": {"train": 1, "dev": 2}}, "the training had 1 and 2")
    data = Path(manifest["task"]["train_file"])
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    refused(manifest, "no longer the file that the training read")
    data.unlink()
    refused(manifest, "no longer there")


# ------------------------------------------------------------------------------------------------ parts


def test_a_thousand_dev_rows_are_drawn_the_same_way_each_time():
    rows = [Example(str(i), "x") for i in range(3000)]
    first = report._drawn(rows)
    assert len(first) == report.MOST_ROWS and first == report._drawn(rows)
    assert [int(one.prompt) for one in first] == sorted(int(one.prompt) for one in first)
    assert report._drawn(rows[:10]) == tuple(rows[:10])


def test_an_answer_is_a_label_but_for_marks_and_width_and_nothing_else():
    labels = ("spam", "not spam", "1")
    answers = ["spam", " Spam. ", "“not  spam”", "１", "it is spam", "", "spam spam"]
    assert report._as_labels(answers, labels) == ["spam", "spam", "not spam", "1", None, None, None]
    # Labels that only differ in what is ignored are told apart where they are written exactly.
    assert report._as_labels(["A", "a"], ("A", "a")) == ["A", "a"]


def test_responses_are_labels_only_where_they_are_few():
    assert report._labels(["a"] * 5 + ["b"] * 9) == ("b", "a")
    assert report._labels(["a"] * 14) == ()
    assert report._labels([str(i) for i in range(60)]) == ()
    assert report._labels([f"{i % 21}" for i in range(210)]) == ()


def test_macro_f1_of_the_resamples_is_that_of_the_scores():
    generator = np.random.default_rng(3)
    names = ("a", "b", "c", "d")
    for _ in range(20):
        truth = [names[i] for i in generator.integers(0, 3, 30)]
        answers = [(*names, None)[i] for i in generator.integers(0, 5, 30)]
        wanted = metrics.classification(truth, answers, names).scores["macro-f1"]
        codes = np.array([names.index(one) for one in truth])
        given = np.array([names.index(one) if one else 4 for one in answers])
        assert report._macro_f1(codes, given, 4) == pytest.approx(wanted)


def measured(answers, chosen=None, nll=1.0, text="4"):
    probed = probes.ProbeResult(("a", "b", "c"), (text,) * 3, (text == "4",) * 3, (nll,) * 3)
    return report._Measured(list(answers), [(1.0, 2)] * len(answers), probed, 1.0, "cpu", chosen)


def judged(tuned, base, truth, train):
    dev = [Example(f"{label} row {i}", label) for i, label in enumerate(truth)]
    labels = tuple(label for label, _ in Counter(truth).most_common())
    notes: list[str] = []
    both = {"tuned": measured(tuned), "base": measured(base, chosen=list(base))}
    found = {"kind": "labels", "rows": len(dev), "notes": notes}
    found |= report._labelled(train, dev, labels, both, notes, lambda text: None, None)
    return found | {"verdict": report._verdict(found)}


def test_the_verdict_is_decided_by_the_paired_test_against_the_baseline():
    truth = ["x", "y"] * 40
    clear = [Example(f"{label} row", label) for label in truth]
    useless = [Example("same words", label) for label in truth]
    good = judged(truth, ["x"] * 80, truth, useless)
    assert good["verdict"]["kind"] == "better" and good["verdict"]["text"].startswith(
        "Better than the baseline: 100.0%"
    )
    worse = judged(["x"] * 80, truth, truth, clear)
    assert worse["verdict"]["kind"] == "worse" and "use the baseline" in worse["verdict"]["text"]
    assert worse["systems"]["baseline"]["accuracy"]["estimate"] == 1.0
    even = judged([*truth[:-1], "y"], truth, truth, clear)
    assert even["verdict"]["kind"] == "undecided"
    assert good["comparisons"]["baseline"]["p_value"] < 0.001 < even["comparisons"]["baseline"]["p_value"]


def test_where_no_baseline_can_be_trained_the_base_is_compared_with_and_the_reason_is_kept():
    truth = ["x", "y"] * 20
    found = judged(truth, ["x"] * 40, truth, [Example("a", "x")] * 4)
    assert "baseline" not in found["systems"] and found["verdict"]["against"] == "base_choice"
    assert found["verdict"]["kind"] == "better" and "there is nothing to tell apart" in found["notes"][0]


# ------------------------------------------------------------------------------------------------ general questions


def test_the_probes_are_half_chinese_and_right_by_their_own_patterns(all_probes):
    assert Counter(probe.language for probe in all_probes) == {"zh": 40, "en": 40}
    assert len({probe.id for probe in all_probes}) == len({probe.prompt for probe in all_probes}) == 80
    assert [probe.id for probe in all_probes if not probe.is_right(probe.answer)] == []
    other = "I am sorry, but I cannot help with that. 抱歉，我无法回答。"
    assert [probe.id for probe in all_probes if probe.is_right(other) or probe.is_right("")] == []


def test_no_probe_is_worded_as_a_training_row_of_the_embedded_model(all_probes):
    lines = (DATA / "dialogue" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    known = {normalised(json.loads(line)["prompt"]).strip(report.MARKS) for line in lines}
    assert len(known) > 4000
    assert [p.prompt for p in all_probes if normalised(p.prompt).strip(report.MARKS) in known] == []


@pytest.mark.parametrize(
    ("answer", "right"), [("It is ４.", True), ("FOUR", True), ("14", False), ("4.5", False), ("five", False)]
)
def test_an_answer_is_right_whatever_its_width_and_case(all_probes, answer, right):
    sum_of_two = next(probe for probe in all_probes if probe.prompt == "What is 2 plus 2?")
    assert sum_of_two.is_right(answer) is right


def outcome(right, nll=1.0):
    n = len(right)
    return probes.ProbeResult(
        tuple(map(str, range(n))), tuple("ab"[ok] for ok in right), tuple(right), (nll,) * n
    )


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([True] * 50 + [False] * 30, [True] * 50 + [False] * 30, "kept"),
        ([True] * 50 + [False] * 30, [True] * 5 + [False] * 75, "lost"),
        ([True] * 50 + [False] * 30, [True] * 40 + [False] * 40, "lost some"),
        ([True] * 50 + [False] * 30, [True] * 46 + [False] * 34, "undecided"),
        ([True] * 4 + [False] * 76, [False] * 80, "undecided"),
        ([True] * 30 + [False] * 50, [True] * 60 + [False] * 20, "kept"),
    ],
)
def test_a_loss_is_called_one_only_where_it_is_proven(before, after, verdict):
    known = [probes.Probe(str(i), "en", "k", f"q{i}", "b", ("b",)) for i in range(80)]
    gauge = probes.compare(outcome(before), outcome(after, nll=1.5), known)
    assert gauge.verdict == verdict
    assert gauge.before.estimate == sum(before) / 80 and gauge.after.estimate == sum(after) / 80
    assert len(gauge.broke) == sum(a and not b for a, b in zip(before, after, strict=True))
    assert gauge.nll.difference == pytest.approx(0.5)
    assert json.loads(json.dumps(gauge.to_json()))["verdict"] == verdict


def test_the_losses_of_rows_are_those_of_the_plain_definition_and_of_the_loop(tiny_checkpoint, one_thread):
    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    examples = [
        Example("这个多少钱", "正常"),
        Example("加微信领红包，快来", "垃圾评论"),
        Example("hi", "yes, of course"),
    ]
    rows = [encode(one, loaded.tokenizer, 32, 16) for one in examples]
    found = probes.answer_losses(loaded, rows)
    for (total, count), row in zip(found, rows, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logs = loaded.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        places = [i for i, label in enumerate(row.labels) if label != -100]
        assert count == len(places)
        assert total == pytest.approx(-sum(float(logs[i - 1, row.ids[i]]) for i in places), rel=1e-4)
    mean = sum(total for total, _ in found) / sum(count for _, count in found)
    trainee = attach(loaded, Method("lora"))
    assert mean == pytest.approx(mean_loss(trainee, rows, 2, loaded.tokenizer.pad_id), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "p-tuning-v2"])
def test_with_its_adapter_off_a_model_is_its_base(trained, tiny_checkpoint, method):
    folder = trained(method)
    base = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    adapted = checkpoints.load(folder, "fp32", "cpu", base=tiny_checkpoint)
    rows = [probes.with_answer((5, 6, 7), text, base.tokenizer) for text in ("正常", "垃圾", "a longer one")]
    plain, own = probes.answer_losses(base, rows), probes.answer_losses(adapted, rows)
    with probes.without_adapter(adapted) as bare:
        off = probes.answer_losses(bare, rows)
    assert [total for total, _ in off] == pytest.approx([total for total, _ in plain], rel=1e-5)
    assert all(not math.isclose(a, b, rel_tol=1e-4) for (a, _), (b, _) in zip(own, plain, strict=True))
    assert probes.answer_losses(adapted, rows) == own
