"""The job store and its supervisor: what survives, what is refused, and how fast a million rows are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import psutil
import pytest

from glm_core import jobs
from glm_core.errors import GLMError
from glm_core.jobs import JobLost, JobStore, Result, Supervisor
from glm_core.settings import REPOSITORY, Settings

OWNER = jobs.this_process()


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workbench.db")


def queued(store, rows=10, kind="batch"):
    job = store.create(kind, "comments.csv", {"template": "{a}"})
    store.add_rows(job.id, ([f"cell {i}", "文本"] for i in range(rows)))
    return store.mark_ready(job.id)


def running(store, rows=10):
    queued(store, rows)
    return store.claim(["batch"], OWNER)


def ok(*indexes, **values):
    return [Result(i, "ok", f"answer {i}", **values) for i in indexes]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ---- rows and results


def test_rows_come_back_as_they_were(store):
    cells = ["", "NA", "0012", "a\nb", "\x00", "😀", '"{x}"', " spaces ", "﷽", "\ud83d half"]
    job = store.create("batch", "t", {})
    store.add_rows(job.id, [cells, []])
    assert store.pending(job.id, 10) == [(0, tuple(cells)), (1, ())]


def test_work_list_is_rows_without_a_result(store):
    job = running(store)
    assert store.save_results(job.id, ok(0, 3, 4)) == 3
    assert [i for i, _ in store.pending(job.id, 100)] == [1, 2, 5, 6, 7, 8, 9]
    assert [i for i, _ in store.pending(job.id, 2, after_idx=2)] == [5, 6]


def test_second_result_of_a_row_changes_nothing(store):
    job = running(store)
    store.save_results(job.id, [Result(1, "ok", "first")])
    assert store.save_results(job.id, [Result(1, "failed", "second", truncated=True), *ok(2)]) == 1
    assert store.results_page(job.id, 1, 1)[0][2].prediction == "first"
    assert store.counts(job.id) == jobs.Counts(done=2, failed=0, truncated=0, left=8)


def test_results_pages_filter_failed_and_shortened_rows(store):
    job = running(store)
    store.save_results(job.id, [*ok(0, 5, truncated=True), Result(7, "failed", error="too long"), *ok(2)])
    assert [i for i, _, _ in store.results_page(job.id, 4, 3)] == [4, 5, 6]
    assert [(i, r.error) for i, _, r in store.results_page(job.id, 0, 9, "failed")] == [(7, "too long")]
    assert [i for i, _, _ in store.results_page(job.id, 1, 9, "truncated")] == [5]
    assert [i for i, _, r in store.iter_results(job.id, batch=3) if r] == [0, 2, 5, 7]
    assert len(list(store.iter_results(job.id, batch=3))) == 10


def test_last_results_are_the_newest_first(store):
    job = running(store)
    for i in (4, 1, 8):
        store.save_results(job.id, ok(i, finished=time.time() + i / 1000 if i == 8 else time.time()))
    assert [r.idx for r in store.last_results(job.id, 2)] == [8, 1]


def test_jobs_are_listed_newest_first_and_by_kind_and_state(store):
    first, second = queued(store), queued(store, kind="evaluate")
    assert {j.id for j in store.list()} == {first.id, second.id}
    assert [j.id for j in store.list(kind="evaluate")] == [second.id]
    assert store.list(states=["running"]) == []
    assert len(store.list(limit=1)) == 1


# ---- states


def test_pause_and_cancel_of_a_waiting_job_are_immediate(store):
    job = queued(store)
    assert store.request_pause(job.id).state == "paused"
    assert store.resume(job.id).state == "queued"
    assert store.request_cancel(job.id).state == "cancelled"
    assert store.resume(job.id).state == "queued"


def test_half_read_job_cannot_be_resumed(store):
    job = store.create("batch", "t", {})
    store.add_rows(job.id, [["a"]])
    store.request_cancel(job.id)
    with pytest.raises(JobLost):
        store.add_rows(job.id, [["b"]])
    with pytest.raises(JobLost):
        store.mark_ready(job.id)
    with pytest.raises(GLMError, match="not read to its end"):
        store.resume(job.id)


def test_retry_forgets_only_failed_rows(store):
    job = running(store, 3)
    store.save_results(job.id, [*ok(0), Result(1, "failed", truncated=True), Result(2, "failed")])
    with pytest.raises(GLMError, match="once the job has stopped"):
        store.retry_failed(job.id)
    store.release(job.id, OWNER, "done")
    again = store.retry_failed(job.id)
    assert again.state == "queued" and again.message == "2 failed rows are tried again."
    assert store.counts(job.id) == jobs.Counts(done=1, failed=0, truncated=0, left=2)
    assert [i for i, _ in store.pending(job.id, 9)] == [1, 2]


def test_running_job_is_not_deleted_and_a_deleted_one_is_gone(store):
    job = running(store)
    store.save_results(job.id, ok(0))
    with pytest.raises(GLMError, match="Cancel it first"):
        store.delete(job.id)
    store.release(job.id, OWNER, "cancelled")
    store.delete(job.id)
    assert store.list() == []
    for table in ("job", "row", "result"):
        assert store.connection().execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] == 0
    with pytest.raises(JobLost):
        store.save_results(job.id, ok(1), OWNER)
    with pytest.raises(GLMError, match="There is no job"):
        store.get(job.id)


def test_who_lost_a_job_can_neither_write_nor_end_it(store):
    job = running(store)
    with pytest.raises(JobLost):
        store.save_results(job.id, ok(0), "elsewhere:1:1")
    assert not store.release(job.id, "elsewhere:1:1", "done")
    assert store.counts(job.id).done == 0 and store.get(job.id).state == "running"


def test_progress_counts_only_the_last_stretch_of_running(store):
    job = running(store, 100)
    store.save_results(job.id, ok(*range(50), finished=time.time() - 3600))
    assert store.progress(job.id).rate == 0 and store.progress(job.id).eta_seconds is None
    store.connection().execute("UPDATE job SET run_started = run_started - 10")
    store.save_results(job.id, ok(*range(50, 70)))
    progress = store.progress(job.id)
    assert progress.rate == pytest.approx(2.0, rel=0.05)
    assert progress.eta_seconds == pytest.approx(15.0, rel=0.05)


def test_settings_are_kept(store):
    assert store.setting("language", "en") == "en"
    store.set_setting("language", "zh")
    store.set_setting("language", "en-GB")
    assert JobStore(store.path).setting("language") == "en-GB"


def test_database_that_is_none_is_named(tmp_path):
    (tmp_path / "workbench.db").write_text("not a database, but long enough to be read as one" * 50)
    with pytest.raises(GLMError, match="workbench.db cannot be used"):
        JobStore(tmp_path / "workbench.db")


# ---- dead processes


def dead_process():
    process = subprocess.Popen(
        [sys.executable, "-c", "from glm_core import jobs; print(jobs.this_process())"],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    return process.communicate()[0].strip()


def test_owner_is_alive_dead_or_elsewhere():
    assert jobs.process_alive(OWNER) is True
    assert jobs.process_alive(dead_process()) is False
    host, pid, born = OWNER.rsplit(":", 2)
    assert jobs.process_alive(f"{host}:{pid}:{float(born) - 3600:.0f}") is False  # the id was given out again
    assert jobs.process_alive(f"another-host:{pid}:{born}") is None


def test_job_of_a_dead_process_is_queued_again(store):
    queued(store)
    job = store.claim(["batch"], dead_process())
    store.save_results(job.id, ok(0, 1))
    store.recover()
    again = store.claim(["batch"], OWNER)
    assert (again.id, again.attempt, again.done) == (job.id, 2, 2)


@pytest.mark.parametrize(("request_", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_wish_outlives_the_process_that_was_to_fulfil_it(store, request_, state):
    queued(store)
    job = store.claim(["batch"], dead_process())
    getattr(store, f"request_{request_}")(job.id)
    store.recover()
    assert store.get(job.id).state == state


def test_half_read_job_of_a_dead_process_fails(store):
    job = store.create("batch", "t", {})
    store.add_rows(job.id, [["a"]])
    store.connection().execute("UPDATE job SET owner = ?", (dead_process(),))
    store.recover()
    assert store.get(job.id).state == "failed"
    assert store.get(job.id).message == "The file was not read to its end; start it again."


def test_job_of_a_living_process_is_shown_but_not_taken(store):
    job = running(store)
    store.recover()
    assert store.claim(["batch"], "other:1:1") is None
    assert store.get(job.id).state == "running"


def test_job_of_a_silent_host_is_taken_after_ten_minutes(store):
    queued(store)
    job = store.claim(["batch"], "old-container:1:1")
    store.recover()
    assert store.get(job.id).state == "running"
    store.connection().execute("UPDATE job SET marked = marked - 700")
    store.recover()
    assert store.get(job.id).state == "queued"


def test_job_that_kills_the_process_three_times_is_paused(store):
    job, gone = queued(store), dead_process()
    for _ in range(3):
        assert store.claim(["batch"], gone)
        store.recover()
    assert store.get(job.id).state == "paused" and "ended 3 times" in store.get(job.id).message


# ---- many threads, many processes


def claim_all(path, results):
    store = JobStore(path)
    taken = []
    while job := store.claim(["batch"], f"{jobs.this_process()}"):
        taken.append(job.id)
    results.put(taken)


def test_no_job_is_claimed_twice_by_several_processes(store):
    ids = {queued(store, 1).id for _ in range(40)}
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=claim_all, args=(store.path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [job_id for _ in processes for job_id in results.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(taken) == sorted(ids)


def test_processes_may_create_the_database_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    path = tmp_path / "new" / "workbench.db"
    processes = [context.Process(target=claim_all, args=(path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[], [], []]
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_pages_read_while_the_runner_writes(store):
    job = running(store, 2000)
    over, errors, slowest = threading.Event(), [], [0.0]

    def page():
        try:
            while not over.is_set():
                started = time.monotonic()
                progress = store.progress(job.id)
                assert progress.done + progress.failed <= 2000
                store.results_page(job.id, 0, 50)
                store.last_results(job.id, 5)
                slowest[0] = max(slowest[0], time.monotonic() - started)
                time.sleep(0.005)
        except Exception as error:
            errors.append(error)

    pages = [threading.Thread(target=page) for _ in range(6)]
    for thread in pages:
        thread.start()
    for start in range(0, 2000, 40):
        store.save_results(job.id, ok(*range(start, start + 40)), OWNER)
    over.set()
    for thread in pages:
        thread.join()
    assert not errors and store.counts(job.id).left == 0
    assert slowest[0] < 5  # never locked out; a page waits for no writer


# ---- the supervisor


def supervised(store, runner, **kinds):
    return Supervisor(store, {"batch": runner, **kinds}, poll_s=0.02).start()


def answer_all(job, store, stop):
    for i, _ in store.pending(job.id, 1000):
        if stop.reason():
            return
        store.save_results(job.id, ok(i), job.owner)
        time.sleep(0.01)


def test_supervisor_runs_queued_jobs_to_their_end(store):
    first, second = queued(store, 3), queued(store, 3)
    supervisor = supervised(store, answer_all)
    assert supervisor.start() is supervisor  # a second start is no second thread
    assert sum(t.name == "glm-jobs" for t in threading.enumerate()) == 1
    wait_for(lambda: store.get(second.id).state == "done" and store.get(first.id).state == "done")
    supervisor.stop()
    assert store.get(first.id).active_seconds > 0 and store.get(first.id).finished


@pytest.mark.parametrize(("ask", "state"), [("request_pause", "paused"), ("request_cancel", "cancelled")])
def test_pause_and_cancel_of_a_running_job_take_less_than_a_second(store, ask, state):
    job = queued(store, 900)
    supervisor = supervised(store, answer_all)
    wait_for(lambda: store.counts(job.id).done > 3)
    started = time.monotonic()
    getattr(store, ask)(job.id)
    wait_for(lambda: store.get(job.id).state == state)
    assert time.monotonic() - started < 1
    done = store.counts(job.id).done
    store.resume(job.id)
    wait_for(lambda: store.counts(job.id).done > done)
    supervisor.stop()
    assert store.get(job.id).attempt == 2 and store.get(job.id).state == "queued"


def test_stopped_process_leaves_its_job_in_the_queue(store):
    job = queued(store, 900)
    supervisor = supervised(store, answer_all)
    wait_for(lambda: store.counts(job.id).done > 3)
    supervisor.stop()
    assert store.get(job.id).state == "queued" and store.get(job.id).owner == ""


def test_errors_become_sentences(store, tmp_path):
    def known(job, store, stop):
        raise GLMError("The checkpoint is gone.", "Choose another.")

    def unknown(job, store, stop):
        raise KeyError("x")

    first, second, third = queued(store), queued(store, kind="odd"), queued(store, kind="lazy")
    supervisor = supervised(store, known, odd=unknown, lazy=lambda job, store, stop: None)
    wait_for(lambda: len(store.list(states=["failed"])) == 3)
    supervisor.stop()
    assert store.get(first.id).message == "The checkpoint is gone. Choose another."
    assert store.get(second.id).message.startswith("internal error: KeyError: 'x'")
    assert "KeyError" in (tmp_path / "logs" / f"{second.id}.log").read_text()
    assert store.get(third.id).message == "internal error: the runner ended with 10 rows left."


def test_full_disk_pauses_the_job_and_loses_nothing(store):
    job = queued(store, 200)

    def runner(job, store, stop):
        db = store.connection()
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + (20 if job.attempt == 1 else 100_000)}")
        for i, _ in store.pending(job.id, 1000):
            store.save_results(job.id, [Result(i, "ok", os.urandom(1000).hex())], job.owner)

    supervisor = supervised(store, runner)
    wait_for(lambda: store.get(job.id).state == "paused")
    assert store.get(job.id).message.startswith("The disk is full.")
    done = store.counts(job.id).done
    assert 0 < done < 200 and sum(r is not None for _, _, r in store.iter_results(job.id)) == done
    store.resume(job.id)
    wait_for(lambda: store.get(job.id).state == "done")
    supervisor.stop()
    assert store.counts(job.id).done == 200


def test_disk_too_full_for_the_message_is_waited_for(store, monkeypatch):
    job, full = queued(store, 1), threading.Event()
    full.set()
    release = store.release

    def no_room(*values):
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        return release(*values)

    monkeypatch.setattr(store, "release", no_room)
    supervisor = supervised(store, lambda job, store, stop: store.save_results(job.id, ok(0)))
    wait_for(lambda: supervisor.problem.startswith("The disk is full."))
    full.clear()
    wait_for(lambda: store.get(job.id).state == "done")
    supervisor.stop()
    assert supervisor.problem == ""


def test_deleted_while_it_runs_stops_the_runner(store):
    job, ended = queued(store, 900), threading.Event()

    def runner(job, store, stop):
        stop.event.wait(5)
        ended.set()

    supervisor = supervised(store, runner)
    wait_for(lambda: store.get(job.id).state == "running")
    store.connection().execute("UPDATE job SET state = 'deleting'")
    assert ended.wait(2)
    supervisor.stop()


def test_one_store_and_one_supervisor_per_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM_WORKSPACE", str(tmp_path / "workspace"))
    settings = Settings.read()
    assert jobs.store(settings) is jobs.store(Settings.read())
    assert jobs.supervisor(settings) is jobs.supervisor(Settings.read())
    jobs.supervisor(settings).stop()


def test_store_loads_neither_torch_nor_the_engine():
    code = "import sys, glm_core.jobs, glm_core.batch; sys.exit(any(m in sys.modules for m in "
    code += "('torch', 'transformers', 'pandas', 'streamlit', 'glm_core.engine')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---- kill -9 in the middle of a write, and a million rows

WRITER = """
import sys, time
from glm_core.jobs import JobStore, this_process
store = JobStore(__import__('pathlib').Path(sys.argv[1]))
job = store.create('batch', 't', {})
print(job.id, flush=True)
store.add_rows(job.id, ((f'cell {i}',) for i in range(10_000_000)), batch=500)
"""


def test_kill_while_rows_are_read_in_leaves_a_failed_job_and_a_sound_database(store):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    job_id = process.stdout.readline().strip()
    wait_for(lambda: store.get(job_id).total > 2000)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store.recover()
    job = store.get(job_id)
    assert job.state == "failed"
    assert len(store.pending(job_id, 10_000_000)) == job.total
    assert store.connection().execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_million_rows_stream_in_flat_memory_and_pages_stay_cheap(store):
    process = psutil.Process()
    job = store.create("batch", "big", {})
    store.add_rows(job.id, ([f"w{i}"] for i in range(5000)))
    before, peak = process.memory_info().rss, [0]

    def rows():
        for i in range(5000, 1_000_000):
            if i % 50_000 == 0:
                peak[0] = max(peak[0], process.memory_info().rss)
            yield (f"{i:07d}", f"comment {i}: 加微信领福利 and some more words to read", "label")

    assert store.add_rows(job.id, rows()) == 995_000
    assert max(peak[0], process.memory_info().rss) - before < 60 << 20
    store.mark_ready(job.id)
    # What a page asks for must not walk the table: the steps SQLite takes are counted, not the clock.
    steps = [0]

    def tick():
        steps[0] += 1

    db = store.connection()
    db.execute(
        "INSERT INTO result SELECT job_id, idx, CASE WHEN idx % 10 THEN 'ok' ELSE 'failed' END, 'x', "
        "idx % 7 = 0, 0, 1, 1, '', idx / 1000.0, '' FROM row WHERE job_id = ? AND idx < 900000",
        (job.id,),
    )
    db.execute("UPDATE job SET done = 810000, failed = 90000 WHERE id = ?", (job.id,))
    db.set_progress_handler(tick, 1000)
    started = time.perf_counter()
    assert store.counts(job.id).left == 100_000
    assert len(store.results_page(job.id, 899_990, 50)) == 50
    assert len(store.results_page(job.id, 0, 50, "failed")) == 50
    assert [r.idx for r in store.last_results(job.id, 1)] == [899_999]
    assert store.pending(job.id, 1, after_idx=899_000)[0][0] == 900_000
    store.progress(job.id)
    print(f"pages of a million rows: {time.perf_counter() - started:.3f} s, {steps[0]} thousand steps")
    assert steps[0] < 60


def test_answers_are_counted_where_they_are_few(store):
    job = store.create("batch", "labels", {})
    store.add_rows(job.id, [[str(i)] for i in range(10)])
    store.mark_ready(job.id)
    store.save_results(job.id, [Result(i, "ok", prediction="spam" if i % 3 else "normal") for i in range(9)])
    store.save_results(job.id, [Result(9, "failed", error="no")])
    assert store.answer_counts(job.id, 12) == [("spam", 6), ("normal", 3)]
    assert store.answer_counts(job.id, 1) == []


@pytest.mark.parametrize(
    ("ended", "asked", "later", "expected"),
    [
        ("paused", "pause", "request_cancel", "cancelled"),
        ("queued", "exit", "request_cancel", "cancelled"),
        ("paused", "pause", "", "paused"),
        ("done", "", "request_cancel", "done"),
    ],
)
def test_what_is_asked_while_a_run_ends_still_counts(store, ended, asked, later, expected):
    job = store.create("batch", "x", {})
    store.add_rows(job.id, [["1"]])
    store.mark_ready(job.id)
    claimed = store.claim(("batch",), "me")
    if asked == "pause":
        store.request_pause(job.id)
    if later:
        getattr(store, later)(job.id)
    store.release(claimed.id, "me", ended, asked=asked)
    assert store.get(job.id).state == expected


def test_a_database_of_an_earlier_version_gets_the_new_column(tmp_path):
    path = tmp_path / "old.db"
    JobStore(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE result DROP COLUMN details")
    store = JobStore(path)
    job = store.create("batch", "a", {})
    store.add_rows(job.id, [["x"], ["y"]])
    store.save_results(job.id, [Result(0, "ok", "a", details="{}"), Result(1, "ok", "b")])
    assert [result.details for _, _, result in store.iter_results(job.id)] == ["{}", ""]


def test_what_an_earlier_version_kept_of_a_classified_row_is_read(tmp_path):
    path = tmp_path / "old.db"
    store = JobStore(path)
    made = {}
    for kind in ("classify", "batch"):
        made[kind] = store.create(kind, "a", {}).id
        store.add_rows(made[kind], [["x"], ["y"]])
        store.save_results(made[kind], [Result(0, "ok", "a"), Result(1, "failed", error="{no answer}")])
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE result SET error = '{\"values\": [1]}' WHERE idx = 0")
        db.execute("ALTER TABLE result DROP COLUMN details")
        db.commit()
    store = JobStore(path)
    found = {
        kind: [(r.details, r.error) for _, _, r in store.iter_results(job)] for kind, job in made.items()
    }
    assert found == {
        "classify": [('{"values": [1]}', ""), ("", "{no answer}")],
        "batch": [("", '{"values": [1]}'), ("", "{no answer}")],
    }
