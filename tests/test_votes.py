"""Prompts answered by several checkpoints, and what blind votes on the answers say; nothing given is lost."""

from __future__ import annotations

import csv
import time
from dataclasses import replace

import pytest
import torch

from glm_core import adapters, checkpoints, votes
from glm_core.engine import EngineHost, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.jobs import JobStore
from glm_core.tokenizers.base import Message
from glm_core.votes import Answer, Ballot, Side, Trials

PROMPTS = ("今天天气不错", "What is it?", "一", "Tell me more about this, please.")
SHORT = GenerationSettings(max_new_tokens=10)
A = Side("a · FP32", "/models/a", "", "fp32", "cpu", "chatglm3")
B = replace(A, name="b · FP32", checkpoint="/models/b")
C = replace(A, name="c · FP32", checkpoint="/models/c")


@pytest.fixture
def trials(tmp_path):
    return Trials(JobStore(tmp_path / "workspace" / "workbench.db"))


@pytest.fixture
def host():
    made = EngineHost()
    yield made
    made.unload()


@pytest.fixture(scope="module")
def lora(tiny_checkpoint, tmp_path_factory):
    """A LoRA of the tiny checkpoint that changes answers."""
    folder = tmp_path_factory.mktemp("adapters") / "tiny-lora"
    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    torch.manual_seed(3)
    adapters.add_lora(loaded.model, rank=4, dropout=0.0, targets=("query_key_value", "dense"))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    adapters.save_lora(loaded.model, folder)
    return folder


@pytest.fixture(scope="module")
def prefix(tiny_checkpoint, tmp_path_factory):
    """A P-tuning v2 prefix of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("adapters") / "tiny-prefix"
    config = checkpoints.read_config(tiny_checkpoint)
    torch.manual_seed(5)
    encoder = adapters.PrefixEncoder(adapters.BaseShape.of_file(config), 6)
    adapters.save_prefix(encoder, folder, config)
    return folder


def alone(folder, prompts=PROMPTS, settings=SHORT, base=None):
    """What a checkpoint answers on an engine of its own."""
    host = EngineHost()
    engine = host.use(folder, "fp32", "cpu", base=base)
    found = []
    for prompt in prompts:
        ids = tuple(engine.tokenizer.chat_ids([Message("user", prompt)]))
        handle = engine.submit(Request(ids, settings))
        handle.wait(60)
        found.append(handle.text)
    host.unload()
    return found


def texts(trials, trial, side):
    found = trials.answers(trial.id)
    return [found[prompt, side].text for prompt in range(len(trial.prompts))]


def finished(trials, trial):
    """Wait for a trial that is answered in the background."""
    end = time.monotonic() + 60
    while votes.live(trial.id) is not None and time.monotonic() < end:
        time.sleep(0.02)
    assert votes.live(trial.id) is None


def told(trials, trial, words):
    """Store answers: words[side][prompt]."""
    for side, answers in enumerate(words):
        for prompt, text in enumerate(answers):
            trials.save(trial.id, prompt, side, Answer(text, tokens=3))
    return trial


# ---- who answers


def test_a_base_answers_with_its_adapters_load_switched_off(tiny_checkpoint, lora):
    base = votes.side(tiny_checkpoint, precision="fp32", device="cpu")
    tuned = votes.side(lora, tiny_checkpoint, "fp32", "cpu")
    assert [one.sides for one in votes.loads([base, tuned])] == [((0, False), (1, True))]
    assert [one.path for one in votes.loads([base, tuned])] == [str(lora)]


def test_another_precision_is_another_load(tiny_checkpoint, lora):
    base = votes.side(tiny_checkpoint, precision="bf16", device="cpu")
    tuned = votes.side(lora, tiny_checkpoint, "fp32", "cpu")
    assert len(votes.loads([base, tuned])) == 2
    assert base.name != tuned.name


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_base_says_the_same_under_its_adapter_as_alone_and_is_loaded_once(
    trials, host, tiny_checkpoint, request, kind, one_thread
):
    folder = request.getfixturevalue(kind)
    sides = [
        votes.side(tiny_checkpoint, precision="fp32", device="cpu"),
        votes.side(folder, tiny_checkpoint, "fp32", "cpu"),
    ]
    trial = trials.create(sides, PROMPTS, SHORT)
    loads = []
    real = host.use
    host.use = lambda *given: loads.append(given[0]) or real(*given)
    votes.run(trials, trial, host)
    assert loads == [str(folder)]
    assert texts(trials, trial, 0) == alone(tiny_checkpoint)
    assert texts(trials, trial, 1) == alone(folder, base=tiny_checkpoint)
    assert texts(trials, trial, 0) != texts(trials, trial, 1)
    assert trials.unanswered(trial) == []
    assert all(one.tokens > 0 and one.seconds > 0 for one in trials.answers(trial.id).values())


def test_the_base_under_an_adapter_is_sampled_as_alone(trials, host, tiny_checkpoint, lora, one_thread):
    settings = GenerationSettings(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    sides = [
        votes.side(tiny_checkpoint, precision="fp32", device="cpu"),
        votes.side(lora, tiny_checkpoint, "fp32", "cpu"),
    ]
    trial = trials.create(sides, PROMPTS, settings)
    votes.run(trials, trial, host)
    assert texts(trials, trial, 0) == alone(tiny_checkpoint, settings=settings)


def test_what_is_in_memory_answers_first_and_is_not_loaded_again(trials, host, tiny_checkpoint, lora):
    engine = host.use(lora, "fp32", "cpu", base=tiny_checkpoint)
    sides = [
        votes.side(tiny_checkpoint, precision="bf16", device="cpu"),
        votes.side(lora, tiny_checkpoint, "fp32", "cpu"),
    ]
    trial = trials.create(sides, PROMPTS[:1], SHORT)
    order = []
    real = trials.save
    trials.save = lambda id_, prompt, side, answer: order.append(side) or real(id_, prompt, side, answer)
    used = []
    use = host.use
    host.use = lambda *given: used.append(use(*given)) or used[-1]
    votes.run(trials, trial, host)
    assert order == [1, 0]
    assert used[0] is engine


def test_a_checkpoint_that_does_not_load_fails_alone_with_its_reason(trials, host, tiny_checkpoint):
    good = votes.side(tiny_checkpoint, precision="fp32", device="cpu")
    trial = trials.create([replace(good, checkpoint="/gone", name="gone"), good], PROMPTS[:2], SHORT)
    votes.run(trials, trial, host)
    found = trials.answers(trial.id)
    assert found[0, 0].error and not found[0, 0].usable
    assert found[1, 1].usable
    assert {number for _, number in trials.unanswered(trial)} == {0}
    assert trials.ballots(trial) == []


def test_a_prompt_that_is_too_long_fails_alone(trials, host, tiny_checkpoint):
    sides = [votes.side(tiny_checkpoint, precision=one, device="cpu") for one in ("fp32", "bf16")]
    trial = trials.create(sides, ("长" * 5000, "短"), SHORT)
    votes.run(trials, trial, host)
    found = trials.answers(trial.id)
    assert "tokens" in found[0, 0].error and found[1, 0].usable and found[1, 1].usable


def test_stopped_answers_are_asked_again_and_finished_ones_are_not(trials, host, tiny_checkpoint):
    sides = [votes.side(tiny_checkpoint, precision=one, device="cpu") for one in ("fp32", "bf16")]
    trial = trials.create(sides, PROMPTS, SHORT)
    now = votes.Live()
    now.stop.set()
    votes.run(trials, trial, host, now)
    assert len(trials.unanswered(trial)) == 8
    trials.save(trial.id, 0, 0, Answer("kept", tokens=1))
    trials.save(trial.id, 1, 0, Answer("half", tokens=1, finish="cancelled"))
    votes.begin(trials, trial.id, host)
    finished(trials, trial)
    assert trials.unanswered(trial) == []
    assert trials.answers(trial.id)[0, 0].text == "kept"
    assert trials.answers(trial.id)[1, 0].text != "half"


def test_stop_text_and_longest_answer_hold_without_the_adapter_too(
    trials, host, tiny_checkpoint, lora, one_thread
):
    whole = alone(tiny_checkpoint, PROMPTS[:1])[0]
    settings = replace(SHORT, stop=(whole[2],))
    sides = [
        votes.side(tiny_checkpoint, precision="fp32", device="cpu"),
        votes.side(lora, tiny_checkpoint, "fp32", "cpu"),
    ]
    trial = trials.create(sides, PROMPTS[:1], settings)
    votes.run(trials, trial, host)
    answer = trials.answers(trial.id)[0, 0]
    assert answer.text == whole.split(whole[2])[0] and answer.finish == "stop"


def test_deleting_a_trial_ends_its_answering(trials, host, tiny_checkpoint):
    sides = [votes.side(tiny_checkpoint, precision=one, device="cpu") for one in ("fp32", "bf16")]
    trial = trials.create(sides, PROMPTS, GenerationSettings(max_new_tokens=400))
    now = votes.begin(trials, trial.id, host)
    trials.delete(trial.id)
    assert now.stop.is_set()
    finished(trials, trial)
    assert trials.answers(trial.id) == {}
    with pytest.raises(GLMError, match="no comparison of prompts"):
        trials.get(trial.id)


# ---- what is refused


@pytest.mark.parametrize(
    ("sides", "prompts", "says"),
    [
        ([A], ("one",), "1 checkpoints cannot be compared"),
        ([A, B, C, replace(A, precision="bf16"), replace(B, precision="bf16")], ("one",), "5 checkpoints"),
        ([A, replace(A, name="another name")], ("one",), "Two of the checkpoints are the same"),
        ([A, B], (), "There is no prompt"),
        ([A, B], ("x",) * 21, "There are 21 prompts"),
        ([A, B], ("x" * 20_001,), "Prompt 1 has 20,001 characters"),
    ],
)
def test_a_trial_that_cannot_be_asked_is_refused(trials, sides, prompts, says):
    with pytest.raises(GLMError, match=says):
        trials.create(sides, prompts)
    assert trials.newest() == []


def test_an_adapter_without_its_base_is_refused(lora):
    with pytest.raises(GLMError, match="holds an adapter alone"):
        votes.side(lora)


def test_prompts_are_lines_or_one_text():
    assert votes.prompts_of(" a \n\n b", by_line=True) == ("a", "b")
    assert votes.prompts_of(" a \n\n b", by_line=False) == ("a \n\n b",)
    assert votes.prompts_of(" \n", by_line=False) == ()


# ---- votes


def test_left_and_right_follow_the_seed_and_are_not_always_the_same(trials):
    words = [[f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)]]
    prompts = [f"p{i}" for i in range(20)]
    first = told(trials, trials.create([A, B], prompts, seed=1), words)
    again = told(trials, trials.create([A, B], prompts, seed=1), words)
    other = told(trials, trials.create([A, B], prompts, seed=2), words)
    order = [one.left for one in trials.ballots(first)]
    assert order == [one.left for one in trials.ballots(again)]
    assert order != [one.left for one in trials.ballots(other)]
    assert 4 <= sum(order) <= 16


def test_every_two_of_three_checkpoints_meet_once_for_every_prompt(trials):
    trial = told(trials, trials.create([A, B, C], ("x", "y")), [["a"] * 2, ["b"] * 2, ["c"] * 2])
    found = trials.ballots(trial)
    assert sorted((one.prompt, *one.pair) for one in found) == [
        (prompt, *pair) for prompt in (0, 1) for pair in ((0, 1), (0, 2), (1, 2))
    ]


def test_equal_words_are_not_voted_on_but_counted(trials):
    trial = told(trials, trials.create([A, B], ("x", "y")), [["same", "a"], [" same\n", "b"]])
    assert [one.prompt for one in trials.ballots(trial)] == [1]
    assert trials.tally(trial)[0].identical == 1


def test_a_vote_counts_for_the_checkpoint_and_not_for_the_place(trials):
    n = 12
    trial = told(trials, trials.create([A, B], [f"p{i}" for i in range(n)], seed=3), [["a"] * n, ["b"] * n])
    for ballot in trials.ballots(trial):
        trials.vote(trial.id, ballot, "left" if ballot.left == 1 else "right")
    found = trials.tally(trial)[0]
    assert (found.wins_a, found.wins_b) == (0, n)
    assert found.p_value == pytest.approx(2 / 2**n)
    assert found.decided == 1
    assert (found.share.low, found.share.high) == (pytest.approx(0.025 ** (1 / n)), 1)


def test_below_six_preferences_nothing_is_decided(trials):
    trial = told(trials, trials.create([A, B], [f"p{i}" for i in range(8)]), [["a"] * 8, ["b"] * 8])
    for place, ballot in enumerate(trials.ballots(trial)):
        choice = "tie" if place < 2 else "bad" if place < 3 else "left" if ballot.left == 0 else "right"
        trials.vote(trial.id, ballot, choice)
    found = trials.tally(trial)[0]
    assert (found.wins_a, found.wins_b, found.ties, found.bad) == (5, 0, 2, 1)
    assert found.p_value is None and found.decided is None


def test_two_people_on_one_prompt_are_one_preference(trials):
    trial = told(trials, trials.create([A, B], ("x", "y")), [["a"] * 2, ["b"] * 2])
    first, second = trials.ballots(trial)
    for voter in ("Ann", "Bo", "Cy"):
        trials.vote(trial.id, first, "left", voter)
    trials.vote(trial.id, second, "left", "Ann")
    trials.vote(trial.id, second, "right", "Bo")
    found = trials.tally(trial)[0]
    assert (found.wins_a + found.wins_b, found.ties, found.votes) == (1, 1, 5)


def test_p_values_of_several_pairs_are_raised(trials):
    n = 10
    trial = told(
        trials, trials.create([A, B, C], [f"p{i}" for i in range(n)]), [["a"] * n, ["b"] * n, ["c"] * n]
    )
    for ballot in trials.ballots(trial):
        trials.vote(trial.id, ballot, "left" if ballot.left < ballot.right else "right")
    found = trials.tally(trial)
    assert [one.p_value for one in found] == [pytest.approx(3 * 2 / 2**n)] * 3
    assert {one.comparisons for one in found} == {3}


def test_a_second_vote_replaces_the_first_and_undo_takes_the_last_back(trials):
    trial = told(trials, trials.create([A, B], ("x", "y")), [["a"] * 2, ["b"] * 2])
    first, second = trials.ballots(trial)
    trials.vote(trial.id, first, "left", " Ann ")
    trials.vote(trial.id, first, "bad", "Ann")
    trials.vote(trial.id, second, "tie", "Bo")
    assert [(one.voter, one.choice) for one in trials.votes(trial.id)] == [("Ann", "bad"), ("Bo", "tie")]
    assert trials.undo(trial.id, "Ann").choice == "bad"
    assert trials.undo(trial.id, "Ann") is None
    assert len(trials.votes(trial.id)) == 1


def test_votes_outlive_the_program_and_are_deleted_on_request(trials):
    trial = told(trials, trials.create([A, B], ("x",)), [["a"], ["b"]])
    trials.vote(trial.id, trials.ballots(trial)[0], "left", "Ann")
    again = Trials(JobStore(trials.store.path))
    assert again.votes(trial.id) == trials.votes(trial.id)
    assert again.get(trial.id) == trial
    assert again.forget(trial.id) == 1
    assert trials.votes(trial.id) == []


@pytest.mark.parametrize("ballot", [Ballot(0, 0, 0), Ballot(5, 0, 1), Ballot(1, 0, 1)])
def test_an_impossible_vote_is_refused(trials, ballot):
    trial = told(trials, trials.create([A, B], ("x", "y")), [["a"], ["b"]])
    with pytest.raises(GLMError, match="cannot be voted on"):
        trials.vote(trial.id, ballot, "left")


def test_the_export_names_both_sides_and_the_preferred_one(trials, tmp_path):
    trial = told(trials, trials.create([A, B], ("=x",)), [["答一"], ["答二"]])
    ballot = trials.ballots(trial)[0]
    trials.vote(trial.id, ballot, "left", "Ann")
    trials.export(trial.id, tmp_path / "votes.csv")
    with (tmp_path / "votes.csv").open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    names = [one.name for one in trial.sides]
    assert row["preferred"] == row["left"] == names[ballot.left]
    assert row["left_answer"] == ("答一", "答二")[ballot.left]
    assert (row["voter"], row["choice"], row["prompt"]) == ("Ann", "left", "'=x")


def test_an_export_without_votes_is_refused(trials, tmp_path):
    trial = trials.create([A, B], ("x",))
    with pytest.raises(GLMError, match="Nobody has voted yet"):
        trials.export(trial.id, tmp_path / "votes.csv")


def test_two_trials_answer_one_after_the_other(trials, host, tiny_checkpoint, monkeypatch):
    sides = [votes.side(tiny_checkpoint, precision=one, device="cpu") for one in ("fp32", "bf16")]
    running, most = [], []

    def watched(*given):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    monkeypatch.setattr(votes, "run", watched)
    both = [trials.create(sides, PROMPTS[:1], SHORT) for _ in range(2)]
    for one in both:
        votes.begin(trials, one.id, host)
    for one in both:
        finished(trials, one)
    assert most == [1, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_who_takes_the_model_meanwhile_is_let_and_the_answers_are_asked_again(
    trials, host, tiny_checkpoint, lora, first
):
    sides = [
        votes.side(tiny_checkpoint, precision="fp32", device="cpu"),
        votes.side(lora, tiny_checkpoint, "fp32", "cpu"),
    ][:: 1 if first else -1]
    trial = trials.create(sides, PROMPTS, GenerationSettings(max_new_tokens=150))
    now = votes.begin(trials, trial.id, host)
    end = time.monotonic() + 60
    while not now.texts and time.monotonic() < end:
        time.sleep(0.002)
    host.unload()
    finished(trials, trial)
    assert trials.unanswered(trial) == []


def test_a_job_that_holds_the_model_is_named(trials, host, tiny_checkpoint):
    host.use(tiny_checkpoint, "fp32", "cpu")
    sides = [votes.side(tiny_checkpoint, precision=one, device="cpu") for one in ("fp32", "bf16")]
    trial = trials.create(sides, PROMPTS[:1], SHORT)
    with host.hold("the job of Ann"):
        votes.run(trials, trial, host)
    found = trials.answers(trial.id)
    assert found[0, 0].usable and "the job of Ann" in found[0, 1].error
