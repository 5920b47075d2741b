"""The audit counts what is there, and a split keeps copies and conversations together."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from glm_core.errors import GLMError
from glm_core.finetune.audit import Audit, audit
from glm_core.finetune.encoding import encode_all
from glm_core.finetune.examples import Example
from glm_core.finetune.split import normalised, split
from glm_core.settings import MINI
from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(MINI / "tokenizer.model")


def rows(count: int, classes: int = 2) -> list[Example]:
    return [Example(f"comment number {i}", f"class {i % classes}", (), i + 1) for i in range(count)]


def messages(found: Audit, severity: str | None = None) -> list[str]:
    return [one.message for one in found.findings if severity in (None, one.severity)]


# --- audit ------------------------------------------------------------------------------------------------------


def test_clean_data_has_no_findings(tokenizer):
    train, dev = rows(400), [Example(f"other {i}", f"class {i % 2}") for i in range(40)]
    found = audit(train, dev, encode_all(train, tokenizer, 64, 16), encode_all(dev, tokenizer, 64, 16))
    assert found.findings == ()
    assert found.classes == (("class 0", 200, 20), ("class 1", 200, 20))
    assert (found.rows, found.dev_rows) == (400, 40)


def test_copies_are_counted_exact_and_but_for_width_space_and_case():
    train = [
        Example("加微信 ABC", "spam", (), 1),
        Example("加微信 ABC", "spam", (), 2),
        Example("加微信ＡＢＣ", "spam", (), 3),
        Example("加 微 信 abc", "Spam", (), 4),
        Example("加微信 ABC", "spam", (("a", "b"),), 5),
        Example("加微信 ABD", "spam", (), 6),
    ]
    found = audit(train)
    assert (found.copies.count, found.copies.lines) == (1, (2,))
    assert (found.near_copies.count, found.near_copies.lines) == (2, (3, 4))
    assert found.conflicting == 0


def test_the_same_text_with_different_labels_is_shown_with_its_lines():
    train = rows(60)
    train += [
        Example("Call me", label, (), 100 + i) for i, label in enumerate(["class 0", "class 1", "class 0"])
    ]
    train += [Example("call  ME", "class 1", (), 200)]
    found = audit(train)
    assert found.conflicting == 1
    conflict = found.conflicts[0]
    assert conflict.text == "Call me"
    assert sorted(conflict.responses) == [("class 0", 2, (100, 102)), ("class 1", 2, (101, 200))]
    assert messages(found, "warn")[-1].startswith(
        "1 question with different responses, such as 'Call me' (line 100, 101"
    )


def test_at_most_twenty_conflicts_are_shown_and_all_are_counted():
    train = [Example(f"text {i}", label) for i in range(300) for label in ("a", "b")]
    found = audit(train)
    assert found.conflicting == 300 and len(found.conflicts) == 20


def test_rows_of_dev_that_are_in_train_are_found():
    train, dev = rows(50), [Example("COMMENT number 7", "class 0", (), 3), Example("new", "class 1", (), 4)]
    found = audit(train, dev)
    assert (found.overlap.count, found.overlap.lines, found.overlap_lines) == (1, (3,), ((3, 8),))
    assert "Asked in train as well: 1 row of dev (50.0%; line 3)" in messages(found, "warn")[0]


def test_lengths_are_what_the_limits_would_have_to_be(tokenizer):
    examples = [Example("好" * (i + 1), "行" * (1 + i % 7), (), i + 1) for i in range(300)]
    wide = encode_all(examples, tokenizer, 2000, 2000)
    needed_source, needed_target = sorted(wide.source_needed.tolist()), sorted(wide.target_needed.tolist())
    found = audit(examples, None, encode_all(examples, tokenizer, 40, 9))
    assert found.source.longest == needed_source[-1] and found.target.longest == needed_target[-1]
    assert found.source.truncated == sum(n > 40 for n in needed_source) == round(found.source.share * 300)
    assert found.source.p50 == needed_source[149] and found.source.p99 == needed_source[296]
    # 2 of 300 rows are fewer than 1 %, 3 are not
    assert found.source.fitting == needed_source[297]
    again = encode_all(examples, tokenizer, found.source.fitting, found.target.fitting)
    assert (again.truncated_source > 0).sum() == 2 and (again.truncated_target > 0).mean() < 0.01
    tighter = encode_all(examples, tokenizer, found.source.fitting - 1, found.target.fitting)
    assert (tighter.truncated_source > 0).sum() == 3
    assert sum(count for _, _, count in found.source.histogram) == 300
    assert found.longest[0][0] in (294, 295, 296, 297, 298, 299, 300)
    cut = next(one for one in found.findings if "prompts" in one.message)
    assert cut.severity == "warn" and f"cuts {found.source.truncated} of 300 prompts" in cut.message
    assert f"{found.source.fitting:,}" in cut.todo


def test_empty_prompts_and_responses_stop():
    found = audit([*rows(10), Example(" ", "class 0", (), 11), Example("x", "", (), 12)])
    assert messages(found, "stop") == [
        "Without a prompt: 1 row (line 11).",
        "Without a response: 1 row (line 12).",
    ]


def test_one_class_stops_and_rare_classes_are_named():
    assert messages(audit([Example(f"t{i}", "0") for i in range(20)]), "stop") == [
        "All 20 responses are '0': with one class there is nothing to learn."
    ]
    train = [Example(f"t{i}", "normal") for i in range(90)] + [Example(f"s{i}", "spam") for i in range(9)]
    dev = [Example("d1", "normal"), Example("d2", "ham")]
    assert messages(audit(train, dev), "warn") == [
        "The class 'normal' has 90 rows, the class 'spam' 9: a model that always answers the first looks good by"
        " accuracy.",
        "Fewer than 10 rows in train: 'spam'.",
        "Not in dev, so never measured: 'spam'.",
        "In dev, but not in train: 'ham' (1 row).",
    ]


def test_free_texts_are_no_classes():
    assert audit([Example(f"q{i}", f"a long answer, number {i}") for i in range(100)]).classes == ()


def test_an_audit_survives_json(tokenizer):
    train = [
        *rows(30),
        Example("Comment Number 3", "class 0", (), 31),
        Example("comment number 4", "class 1"),
    ]
    found = audit(train, train[:5], encode_all(train, tokenizer, 12, 8))
    assert found.conflicts and found.findings and found.overlap_lines
    assert Audit.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_rows_and_their_encoding_must_be_the_same(tokenizer):
    with pytest.raises(ValueError, match="10 encoded rows for 11 examples"):
        audit(rows(11), None, encode_all(rows(10), tokenizer, 64, 16))


def test_no_rows_are_no_error():
    assert audit([]).rows == 0


# --- split ------------------------------------------------------------------------------------------------------


def texts(examples, positions):
    return sorted((examples[i].prompt, examples[i].response) for i in positions)


def test_a_split_takes_its_shares_of_each_class():
    examples = [Example(f"t{i}", "spam" if i % 5 == 0 else "normal") for i in range(1000)]
    parts = split(examples, 0.1, 0.2, seed=3)
    assert sorted((*parts.train, *parts.dev, *parts.test)) == list(range(1000))
    assert Counter(examples[i].response for i in parts.dev) == {"normal": 80, "spam": 20}
    assert Counter(examples[i].response for i in parts.test) == {"normal": 160, "spam": 40}


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows():
    examples = rows(500, 3)
    shuffled = list(examples)
    random.Random(1).shuffle(shuffled)
    one, other, reseeded = split(examples, seed=5), split(shuffled, seed=5), split(examples, seed=6)
    assert texts(examples, one.dev) == texts(shuffled, other.dev)
    assert texts(examples, one.dev) != texts(examples, reseeded.dev)
    assert split(examples, seed=5) == one


def test_copies_are_on_one_side():
    generator = random.Random(2)
    forms = (str.upper, str.lower, lambda text: " ".join(text), lambda text: text.replace("c", "ｃ"))
    examples = [Example(generator.choice(forms)(f"comment {i // 4}"), str(i % 2)) for i in range(400)]
    parts = split(examples, 0.25, 0.25)
    sides = [{normalised(examples[i].prompt) for i in part} for part in (parts.train, parts.dev, parts.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert abs(len(parts.dev) - 100) <= 4 and abs(len(parts.test) - 100) <= 4


def test_answers_of_one_conversation_are_on_one_side():
    examples = []
    for i in range(100):
        turns = [(f"hello {i}", f"hi {i}"), (f"how {i}", f"fine {i}"), (f"bye {i}", f"bye {i}!")]
        examples += [Example(*turns[n], tuple(turns[:n]), i + 1) for n in range(3)]
    parts = split(examples, 0.2)
    assert len(parts.dev) == 60
    assert not {examples[i].line for i in parts.dev} & {examples[i].line for i in parts.train}


def test_files_put_together_do_not_link_rows_of_the_same_line():
    examples = [Example(f"{file} {i}", "x", (), i) for file in "ab" for i in range(1, 101)]
    assert len(split(examples, 0.1).dev) == 20


def test_every_class_keeps_a_row_in_train():
    examples = [Example(f"t{i}", label) for i, label in enumerate(["a"] * 30 + ["b"] * 2 + ["c"])]
    for seed in range(20):
        parts = split(examples, 0.5, 0.3, seed=seed)
        assert {examples[i].response for i in parts.train} == {"a", "b", "c"}


@pytest.mark.parametrize(("dev", "test"), [(1.0, 0.0), (0.6, 0.4), (-0.1, 0.0)])
def test_impossible_shares_are_refused(dev, test):
    with pytest.raises(GLMError, match="leave nothing to train on"):
        split(rows(10), dev, test)


def test_too_few_questions_are_refused():
    with pytest.raises(GLMError, match="too few for 2 parts: 1"):
        split([Example("same", "a"), Example("SAME", "b")], 0.5)
