"""The number of threads: what a process may use, and the choice by measurement."""

from __future__ import annotations

import pytest
import torch

from glm_core import checkpoints, threads
from glm_core.engine import Engine


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 0),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ({"cpu.max": "unreadable"}, 0),
        ({}, 0),
    ],
)
def test_a_containers_share_is_read(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.quota() == expected
    assert 1 <= threads.usable() <= max(expected, 10**6 * (not expected))


@pytest.mark.parametrize(
    ("most", "cores", "expected"),
    [(1, 1, (1,)), (2, 2, (1, 2)), (16, 8, (1, 4, 8, 16)), (4, 32, (1, 2, 4)), (64, 64, (1, 32, 64))],
)
def test_what_is_tried(most, cores, expected):
    assert threads.candidates(most, cores) == expected


class Machine:
    """A clock that only steps move, each by as much as the number of threads in use makes it."""

    def __init__(self, monkeypatch):
        self.now, self.threads = 0.0, 0
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def use(self, number):
        self.threads = number

    def step(self, seconds):
        def run():
            self.now += seconds[self.threads]

        return run


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def measured(machine, steps, among, now):
    found = threads.Measurement(steps, among, now, machine.use)
    while not found.done:
        found.trial()
        assert machine.threads == now, "other work runs between the trials as before"
    return found.choose()


def test_the_clearly_fastest_is_chosen_and_used(machine):
    found = measured(machine, [machine.step({1: 0.008, 2: 0.002, 4: 0.006})], (1, 2, 4), 4)
    assert found.threads == machine.threads == 2
    assert found.milliseconds == pytest.approx({1: 8, 2: 2, 4: 6})
    assert found.text == "2 threads (1: 8.0 ms, 2: 2.0 ms, 4: 6.0 ms)"
    assert 1 <= machine.now < 1.02, "no longer than was granted"


def test_a_small_gain_changes_nothing(machine):
    assert measured(machine, [machine.step({1: 0.009, 2: 0.01})], (1, 2), 2).threads == 2
    assert machine.threads == 2


def test_every_step_counts_alike(machine):
    one, eight = machine.step({1: 0.002, 4: 0.0021}), machine.step({1: 0.12, 4: 0.04})
    assert measured(machine, [one, eight], (1, 4), 1).threads == 4


def test_no_kind_of_work_gets_slower(machine):
    """One thread is best for a small model's chat, and would halve the speed of labelling."""
    one, prompts = machine.step({1: 0.002, 2: 0.009}), machine.step({1: 0.2, 2: 0.1})
    assert measured(machine, [one, prompts], (1, 2), 2).threads == 2


def test_a_slow_model_is_tried_twice_with_every_number(machine):
    found = measured(machine, [machine.step({1: 3.0, 2: 2.0})], (1, 2), 1)
    assert found.threads == 2 and machine.now == pytest.approx(10)


@pytest.fixture
def free(monkeypatch):
    """No variable chooses, and the number of threads is put back."""
    for name in threads.ASKED:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_an_engine_chooses_and_answers_as_before(tiny_checkpoint, monkeypatch, free, precision):
    running = Engine(checkpoints.load(tiny_checkpoint, precision, "cpu"))
    try:
        monkeypatch.setattr(threads, "usable", lambda: 2)
        monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 2)
        found = running.choose_threads(0.05)
        assert found is not None and sorted(found.milliseconds) == [1, 2] and found.threads in (1, 2)
        assert running.between_steps(torch.get_num_threads) == found.threads
        assert running.status().threads_text == found.text
        assert precision != "fp32" or running.self_test().passed
    finally:
        running.close()


@pytest.mark.parametrize("name", threads.ASKED)
def test_who_asked_for_a_number_has_chosen(engine, monkeypatch, free, name):
    monkeypatch.setenv(name, "1")
    assert engine.choose_threads() is None and engine.status().threads_text == ""


def test_one_processor_leaves_no_choice(engine, monkeypatch, free):
    monkeypatch.setattr(threads, "usable", lambda: 1)
    assert engine.choose_threads() is None


def test_a_number_of_our_own_is_used(engine, monkeypatch, free):
    monkeypatch.setenv("GLM_THREADS", "2")
    assert engine.choose_threads() is None and engine.between_steps(torch.get_num_threads) == 2
