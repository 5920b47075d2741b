"""Jobs on a cluster: who gets which rows, what becomes of those of a dead worker, and that the answers stay the same."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from glm_core import batch, checkpoints, classify, cli, cluster, engine, jobs
from glm_core.cluster import scheduling
from glm_core.cluster.pool import LONGEST_SOCKET, SOCKET, Node, _folder, shares
from glm_core.cluster.scheduling import Died, Opened, Refused, Report, Scheduler
from glm_core.cluster.worker import Worker
from glm_core.engine import GenerationSettings
from glm_core.errors import GLMError
from glm_core.jobs import JobLost, JobStore, Result, StopSignal
from glm_core.settings import Settings

OWNER = jobs.this_process()


class FakePool:
    """Workers that answer a few rows at each look, and die of the rows that they are told to die of."""

    def __init__(self, poison=(), per_look=7, silent=(), refuse=(), die=None, hook=None):
        self.poison, self.per_look, self.silent, self.refuse = set(poison), per_look, set(silent), set(refuse)
        self.die, self.hook = die, hook
        self.has: dict[int, list] = {}
        self.asked: set[int] = set()
        self.events: list = []
        self.sent: list[tuple[int, list]] = []
        self.died: list[int] = []
        self.dropped: list[int] = []

    def start(self, worker):
        if worker in self.refuse:
            self.events.append(Refused(worker, f"On the node n{worker}: There is no folder /m.", "Copy it."))
            return
        self.has[worker] = []
        self.events.append(Opened(worker, f"n{worker}", 16, {"versions": {"torch": "2.13.0"}}))

    def send(self, worker, rows):
        assert worker not in self.asked, "one report at a time"
        self.sent.append((worker, rows))
        self.has[worker] += rows
        self.asked.add(worker)

    def wait(self, seconds):
        if self.hook:
            self.hook(self)
        events, self.events = self.events, []
        for worker in sorted(self.asked - self.silent):
            rows = self.has[worker]
            if self.die and (reason := self.die(self, worker)):
                events.append(reason)
            elif self.poison & {idx for idx, _ in rows}:
                events.append(Died(worker, "it was killed."))
            else:
                done, self.has[worker] = rows[: self.per_look], rows[self.per_look :]
                events.append(
                    Report(worker, [Result(i, "ok", f"<{cells[1]}>", seconds=1.0) for i, cells in done])
                )
            self.asked.discard(worker)
            if isinstance(events[-1], Died):
                self.died.append(worker)
        if not events:
            time.sleep(0.01)
        return events

    def drop(self, worker):
        self.dropped.append(worker)
        self.asked.discard(worker)

    @property
    def rows_sent(self):
        return [idx for _, rows in self.sent for idx, _ in rows]


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workbench.db")


def claimed(store, rows, kind="batch", task=None):
    job = store.create(kind, "table", task or {})
    store.add_rows(job.id, rows)
    store.mark_ready(job.id)
    return store.claim([kind], OWNER)


def texts(count):
    return [(f"secret {i}", f"text {i}") for i in range(count)]


def schedule(store, job, pool, workers=2, once=True, stop=None, versions=None):
    stop = stop or StopSignal(store, job)
    Scheduler(job, store, stop, pool, workers, (1,), once, versions).run()


def found(store, job):
    return {result.idx: result for _, _, result in store.iter_results(job.id) if result}


def answers(store, job):
    return {idx: result.prediction for idx, result in found(store, job).items()}


# ---- dealing out rows


def test_every_row_is_answered_once_and_no_other_column_leaves_this_machine(store):
    job, pool = claimed(store, texts(3000)), FakePool()
    schedule(store, job, pool, workers=3)
    assert answers(store, job) == {i: f"<text {i}>" for i in range(3000)}
    assert sorted(pool.rows_sent) == list(range(3000))
    assert {cells[0] for _, rows in pool.sent for _, cells in rows} == {""}
    assert {worker for worker, _ in pool.sent} == {1, 2, 3}
    assert sorted(pool.dropped) == [1, 2, 3]


def test_rows_of_workers_that_die_now_and_then_are_done_again_and_none_twice(store):
    done = [0]

    def die(pool, worker):  # one of them after every 700 rows
        before, done[0] = done[0], done[0] + min(pool.per_look, len(pool.has[worker]))
        return Died(worker, "it was killed.") if before // 700 < done[0] // 700 else None

    job, pool = claimed(store, texts(2500)), FakePool(die=die, per_look=40)
    schedule(store, job, pool, workers=3)
    assert len(pool.died) > 2
    assert answers(store, job) == {i: f"<text {i}>" for i in range(2500)}
    counts = store.counts(job.id)
    assert (counts.done, counts.failed, counts.left) == (2500, 0, 0)
    assert any("was replaced" in text for text in store.get(job.id).warnings)


@pytest.mark.parametrize("poison", [{37}, {0, 1, 250}, {498, 499}])
def test_a_row_that_kills_its_worker_three_times_fails_alone(store, poison):
    job, pool = claimed(store, texts(500)), FakePool(poison)
    schedule(store, job, pool)
    results = found(store, job)
    assert {idx for idx, one in results.items() if one.status == "failed"} == poison
    assert len(results) == 500
    for idx in poison:
        assert results[idx].error.startswith("Its worker ended 3 times while it had this row")
        assert "it was killed" in results[idx].error
        # The last time it was alone with its worker.
        assert next(rows for _, rows in reversed(pool.sent) if idx in dict(rows)) == [
            (idx, ("", f"text {idx}"))
        ]
    assert all(pool.rows_sent.count(idx) == 3 for idx in poison)


def test_the_rows_of_a_lost_machine_are_not_suspected(store):
    once = iter([True])

    def die(pool, worker):
        return (
            Died(worker, "The node has died.", blameless=True)
            if len(pool.sent) > 4 and next(once, False)
            else None
        )

    job, pool = claimed(store, texts(300)), FakePool(die=die)
    schedule(store, job, pool)
    assert len(pool.died) == 1
    assert max(len(rows) for _, rows in pool.sent[5:8]) > scheduling.GROUP
    assert len(answers(store, job)) == 300


def test_equal_questions_are_asked_once_and_the_copies_share_the_answer(store):
    rows = [(f"id {i}", f"text {i % 40}") for i in range(3000)]
    job, pool = claimed(store, rows), FakePool()
    schedule(store, job, pool)
    assert len(pool.rows_sent) == 40
    assert answers(store, job) == {i: f"<text {i % 40}>" for i in range(3000)}
    seconds = [one.seconds for one in found(store, job).values()]
    assert (seconds.count(1.0), seconds.count(0.0)) == (40, 2960)
    assert batch.DUPLICATES in store.get(job.id).warnings


def test_equal_questions_are_asked_each_time_where_answers_are_drawn(store):
    job, pool = claimed(store, [("a", "same")] * 50), FakePool()
    schedule(store, job, pool, once=False)
    assert sorted(pool.rows_sent) == list(range(50))


def test_copies_of_a_row_that_kills_its_worker_fail_with_it(store):
    job, pool = claimed(store, [("x", "bad"), ("y", "good"), ("z", "bad")]), FakePool({0})
    schedule(store, job, pool)
    assert {idx: one.status for idx, one in found(store, job).items()} == {0: "failed", 1: "ok", 2: "failed"}


def test_a_pause_keeps_what_is_finished_and_the_next_run_does_the_rest(store):
    job = claimed(store, texts(400))
    stop = StopSignal(store, job)

    def hook(pool):
        if len(pool.sent) == 20:
            stop.stop("pause")

    first = FakePool(hook=hook)
    schedule(store, job, first, stop=stop)
    kept = set(found(store, job))
    assert 0 < len(kept) < 400 and sorted(first.dropped) == [1, 2]
    second = FakePool()
    schedule(store, job, second)
    assert sorted(second.rows_sent) == sorted(set(range(400)) - kept)
    assert len(answers(store, job)) == 400


def test_a_job_taken_over_by_another_process_is_let_go(store):
    job = claimed(store, texts(400))
    pool = FakePool()
    with pytest.raises(JobLost):
        schedule(store, replace(job, owner="another"), pool)
    assert sorted(pool.dropped) == [1, 2] and not answers(store, job)


def test_a_slow_worker_does_not_hold_the_end(store, monkeypatch):
    monkeypatch.setattr(scheduling, "LATE_S", 0.05)
    job, pool = claimed(store, texts(200)), FakePool(silent={2})
    schedule(store, job, pool)
    held = [idx for worker, rows in pool.sent for idx, _ in rows if worker == 2]
    assert held and len(answers(store, job)) == 200
    assert {idx for worker, rows in pool.sent for idx, _ in rows if worker == 1} == set(range(200))


def test_a_worker_that_cannot_do_the_job_is_done_without_and_named(store):
    job, pool = claimed(store, texts(100)), FakePool(refuse={1})
    schedule(store, job, pool)
    assert len(answers(store, job)) == 100
    assert any("On the node n1: There is no folder /m." in text for text in store.get(job.id).warnings)
    with pytest.raises(GLMError, match="On the node n.: There is no folder /m"):
        schedule(store, claimed(store, texts(5)), FakePool(refuse={1, 2}))


def test_workers_that_die_while_they_load_end_the_job(store):
    class Loading(FakePool):
        def start(self, worker):
            self.events.append(Died(worker, "Out of memory."))

    with pytest.raises(GLMError, match="No worker could load the model.*Out of memory"):
        schedule(store, claimed(store, texts(5)), Loading())


def test_workers_that_die_without_end_end_the_job(store):
    pool = FakePool(die=lambda pool, worker: Died(worker, "gone.", blameless=True))
    with pytest.raises(GLMError, match="workers ended one after another"):
        schedule(store, claimed(store, texts(50)), pool)


def test_a_node_with_other_versions_is_named_and_the_record_has_no_names_of_machines(store):
    task = {
        "columns": ["a", "b"], "checkpoint": "/models/chat", "engine": "ray", "address": "10.0.0.5:6379", "workers": 2,
    }  # fmt: skip
    job = claimed(store, texts(50), task=task)
    schedule(store, job, FakePool(), versions={"torch": "2.12.0"})
    told = store.get(job.id)
    assert {one["node"] for one in told.task["nodes"]} == {"n1", "n2"}
    assert "The node n1 has other versions than this machine: torch 2.13.0 (2.12.0 here)." in told.warnings
    manifest = batch.manifest(store, job.id)
    assert manifest["task"]["engine"] == "ray" and manifest["task"]["workers"] == 2
    assert manifest["task"]["nodes"][0]["versions"] == {"torch": "2.13.0"}
    text = json.dumps(manifest)
    assert "10.0.0.5" not in text and '"n1"' not in text and "The node n1" not in text


# ---- who gets how much of which node


HEAD, BIG, GPU = Node("head", 8), Node("big", 16), Node("gpu", 32, 4)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus", "expected"),
    [
        ([HEAD], 0, 0, 0, (1, 8)),  # one for each machine
        ([HEAD, BIG], 0, 0, 0, (3, 8)),  # each gets what the smaller one has
        ([HEAD], 4, 0, 0, (4, 2)),
        ([HEAD, BIG], 5, 0, 0, (5, 4)),
        ([HEAD], 0, 3, 0, (2, 3)),
        ([HEAD], 20, 0, 0, (20, 1)),  # those that have no room yet wait
        ([HEAD, GPU], 0, 0, 1, (4, 8)),  # one for each GPU
        ([GPU], 0, 0, 2, (2, 16)),
        ([GPU], 2, 0, 1, (2, 16)),
        ([Node("head", 0), HEAD], 0, 0, 0, (1, 8)),
    ],
)
def test_workers_share_the_nodes(nodes, workers, cpus, gpus, expected):
    assert shares(nodes, workers, cpus, gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "text"),
    [
        ([HEAD], 0, 1, "A worker with 1 GPUs fits no node of the cluster; it has head .8 CPUs, 0 GPUs."),
        ([HEAD, BIG], 64, 0, "A worker with 64 CPUs fits no node"),
        ([], 0, 0, "it has no nodes"),
    ],
)
def test_a_worker_that_fits_no_node_is_refused_with_the_nodes_there_are(nodes, cpus, gpus, text):
    with pytest.raises(GLMError, match=text):
        shares(nodes, 0, cpus, gpus)


# ---- what is asked for


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("here", 0, 0.0), "'here' is no address"),
        (("host:99999", 0, 0.0), "is no address"),
        (("", -1, 0.0), "cannot be -1 workers"),
        (("", 0, -2.0), "cannot have -2 CPUs"),
    ],
)
def test_what_cannot_be_is_refused_before_the_job(values, text, monkeypatch):
    monkeypatch.setattr(cluster, "problem", lambda: None)
    with pytest.raises(GLMError, match=text):
        cluster.check("/models/chat", *values)


def test_a_model_on_a_server_needs_no_cluster(monkeypatch):
    monkeypatch.setattr(cluster, "problem", lambda: None)
    with pytest.raises(GLMError, match="needs no cluster"):
        cluster.check("http://host:8000/v1#chat", "", 0, 0.0)


def test_without_ray_the_way_to_get_it_is_said(store, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest)
    )
    for call in (
        lambda: cluster.check("/m", "", 0, 0.0),
        lambda: cluster.run(claimed(store, []), store, None),
    ):
        with pytest.raises(GLMError, match="Ray is not installed. pip install -r requirements-ray.txt"):
            call()


# ---- from the shell


@pytest.fixture
def shell(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """Run `batch` over three rows: its exit status and what it says."""
    monkeypatch.setattr(cluster, "problem", lambda: None)
    table = tmp_path / "t.csv"
    table.write_text("a\none\ntwo\nthree\n", encoding="utf-8")
    fixed = [
        "--column",
        "a",
        "--model",
        tiny_checkpoint,
        "--out",
        tmp_path / "o.csv",
        "--max-new-tokens",
        "2",
    ]

    def call(*more):
        capsys.readouterr()
        status = cli.main([str(part) for part in ("batch", table, *fixed, *more)])
        return status, capsys.readouterr().err

    yield call
    engine.host().unload()


def test_a_paused_job_goes_on_on_the_cluster_that_the_command_names(shell, monkeypatch):
    store = jobs.store(Settings.read())
    seen = []

    def interrupted(job, store, stop):
        store.save_results(job.id, [Result(0, "ok", "here")], job.owner)
        raise GLMError("No more memory.")

    def rest(job, store, stop):
        seen.append({name: job.task[name] for name in cluster.WHERE})
        store.save_results(job.id, [Result(i, "ok", "there") for i, _ in store.pending(job.id, 9)], job.owner)

    monkeypatch.setattr(
        batch, "with_engine", lambda job, store, stop, task, work: interrupted(job, store, stop)
    )
    assert shell()[0] == 1
    monkeypatch.setattr(cluster, "run", rest)
    status, said = shell("--engine", "ray", "--address", "10.0.0.5:6379", "--workers", "2")
    assert status == 0 and "goes on: 1 of 3" in said
    assert seen == [{"engine": "ray", "address": "10.0.0.5:6379", "workers": 2, "cpus_per_worker": 0.0}]
    assert [job.done for job in store.list()] == [3]


def test_options_of_a_cluster_are_refused_without_one(shell):
    status, said = shell("--workers", "2")
    assert status == 1 and "--workers is for a cluster. Add --engine ray." in said
    status, said = shell("--engine", "ray", "--address", "nowhere")
    assert status == 1 and "no address of a Ray cluster" in said
    assert not jobs.store(Settings.read()).list()


# ---- the process that speaks to the cluster


def speaking(monkeypatch, code):
    """Let `cluster.run` start a process that runs this instead."""
    real = cluster.subprocess.Popen
    monkeypatch.setattr(
        cluster.subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", code], **rest)
    )
    monkeypatch.setattr(cluster, "problem", lambda: None)


def test_the_death_of_that_process_fails_the_job_and_nothing_else(store, monkeypatch):
    speaking(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    job = claimed(store, texts(5))
    with StopSignal(store, job) as stop, pytest.raises(GLMError, match="ended with SIGKILL.*Resume the job"):
        cluster.run(job, store, stop)


@pytest.mark.parametrize(
    ("said", "error", "text"),
    [
        ({"state": "failed", "message": "No.", "todo": "Do."}, GLMError, "No. Do."),
        ({"state": "lost", "message": "Gone."}, JobLost, "Gone."),
        ({"state": "disk", "message": "database or disk is full", "code": 13}, Exception, "disk is full"),
    ],
)
def test_what_that_process_says_is_raised_here(store, monkeypatch, said, error, text):
    speaking(monkeypatch, f"print({json.dumps(said)!r})")
    job = claimed(store, texts(5))
    with StopSignal(store, job) as stop, pytest.raises(error, match=text) as caught:
        cluster.run(job, store, stop)
    assert bool(jobs.records.disk_problem(caught.value)) == (said["state"] == "disk")


def test_that_process_ends_when_the_job_is_to_stop(store, monkeypatch):
    speaking(monkeypatch, 'import os; os.read(0, 1); print(\'{"state": "done"}\')')
    job = claimed(store, texts(5))
    with StopSignal(store, job) as stop:
        threading.Timer(0.2, stop.stop, ("pause",)).start()
        cluster.run(job, store, stop)


def test_a_workspace_with_a_long_name_gives_way_to_a_short_folder(store, tmp_path, monkeypatch):
    job = claimed(store, texts(1))
    for workspace in (tmp_path / ("long" * 20), Path("/tmp") / f"g{os.getpid()}"):
        monkeypatch.setenv("GLM_WORKSPACE", str(workspace))
        (workspace / "cache").mkdir(parents=True)
        left = workspace / "cache" / "glm-ray-left"
        left.mkdir()
        (left / "owner").write_text(f"{OWNER.rsplit(':', 2)[0]}:999999999:1")
        with _folder(job) as folder:
            assert len(f"{folder}{SOCKET}") <= LONGEST_SOCKET
            assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
            assert (workspace in folder.parents) == (len(str(workspace)) < 30)
            assert left.exists() == (workspace not in folder.parents), "what a killed process left is removed"
        assert not folder.exists()
    for path in (workspace / "cache", workspace):
        path.rmdir()


# ---- the same answers


def batch_task(folder, **values):
    return batch.BatchTask(
        checkpoint=str(folder), checkpoint_fingerprint=checkpoints.fingerprint(folder), precision="fp32", device="cpu",
        template="Say it again: {text}", system="", settings=GenerationSettings(max_new_tokens=6),
        output_column="answer", input_name="t", input_path="", input_sha256="", columns=("id", "text"),
        versions=batch.versions(), **values,
    )  # fmt: skip


def label_task(folder, **values):
    return classify.LabelTask(
        checkpoint=str(folder), checkpoint_fingerprint=checkpoints.fingerprint(folder), precision="fp32", device="cpu",
        template="Comment: {text}", columns=("id", "text"), input_name="t", content_free=True, **values,
    )  # fmt: skip


def comments(count):
    words = "alpha beta gamma 你好 天气 x".split()
    chance = random.Random(3)
    return [(str(i), " ".join(chance.choices(words, k=chance.randint(1, 9)))) for i in range(count)]


def local(store, kind, task, rows):
    """The results of a job run in this process."""
    job = claimed(store, rows, kind, task.to_json())
    with StopSignal(store, job) as stop:
        (batch if kind == "batch" else classify).run(job, store, stop)
    return found(store, job)


def same(here, there):
    """Whether results are equal but for their times, and for the last digits of probabilities."""
    assert here.keys() == there.keys()
    for idx, one in here.items():
        other = there[idx]
        for name in ("status", "prediction", "truncated", "error", "prompt_tokens", "new_tokens"):
            assert getattr(one, name) == getattr(other, name), (idx, name)
        if one.details:
            a, b = json.loads(one.details), json.loads(other.details)
            assert a["greedy"] == b["greedy"] and a["reason"] == b["reason"]
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)


@pytest.mark.parametrize(("kind", "make"), [("batch", batch_task), ("classify", label_task)])
def test_a_worker_answers_as_the_runner_of_this_process_does(store, tiny_checkpoint, one_thread, kind, make):
    task, rows = make(tiny_checkpoint), [*comments(60), ("60", "half \ud83d"), ("61", "long " * 3000)]
    here = local(store, kind, task, rows)
    job = claimed(store, rows, kind, task.to_json())
    worker = Worker(job, "cpu", 1, "n1")
    opened = worker.open()
    assert (opened.node, opened.message, opened.at_once > 0) == ("n1", "", True)
    there, sent, end = {}, 0, time.monotonic() + 60
    while len(there) < len(rows):
        assert time.monotonic() < end
        more = [(i, rows[i]) for i in range(sent, min(sent + 9, len(rows)))]
        sent += len(more)
        results, _, ended = worker.exchange(more, 0.2)
        assert not ended
        there |= {one.idx: one for one in results}
    worker.close()
    same(here, there)
    assert here[60].status == "failed" and here[61].truncated


def test_a_worker_without_the_checkpoint_names_node_and_path(store, tiny_checkpoint, tmp_path):
    task = replace(batch_task(tiny_checkpoint), checkpoint=str(tmp_path / "gone"))
    answer = Worker(claimed(store, [], task=task.to_json()), "cpu", 1, "n7").open()
    assert answer.message == f"On the node n7: There is no folder {tmp_path / 'gone'}."
    other = replace(batch_task(tiny_checkpoint), checkpoint_fingerprint="other")
    answer = Worker(claimed(store, [], task=other.to_json()), "cpu", 1, "n7").open()
    assert answer.message.startswith("On the node n7: The checkpoint tiny chatglm3 is not the one")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_on_ray_the_result_is_the_same_though_a_worker_is_killed(
    store, tiny_checkpoint, one_thread, monkeypatch
):
    """One cluster of its own with two workers, one of which gets SIGKILL in the middle."""
    Path(os.environ["GLM_WORKSPACE"], "cache").mkdir(parents=True)
    rows = comments(400)
    here = local(store, "batch", batch_task(tiny_checkpoint), rows)
    job = claimed(store, rows, "batch", batch_task(tiny_checkpoint, engine="ray", workers=2).to_json())
    killed = []

    def kill_one():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if store.counts(job.id).done:
                for one in psutil.Process().children(recursive=True):
                    if one.name().startswith("ray::Actor"):
                        killed.append(one.nice())
                        one.kill()
                        return
            time.sleep(0.02)

    threading.Thread(target=kill_one, daemon=True).start()
    with StopSignal(store, job) as stop:
        batch.run(job, store, stop)
    assert killed == [psutil.Process().nice()], "a worker is found, and stands behind nothing else"
    same(here, found(store, job))
    told = store.get(job.id)
    assert told.task["nodes"][0]["versions"]["torch"] == batch.versions()["torch"]
    assert not [one for one in psutil.Process().children(recursive=True) if "ray" in one.name()]
