"""A training as a job: the same numbers however often it was stopped or killed, and a reason where it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm_core import checkpoints, devices, engine, jobs
from glm_core.errors import GLMError
from glm_core.finetune import child, job, preflight, report, state
from glm_core.finetune.job import FinetuneJob, Follower, hold, start, status
from glm_core.finetune.loop import Plan
from glm_core.finetune.methods import Method
from glm_core.finetune.work import EVENTS, MANIFEST, FinetuneTask
from glm_core.jobs import JobStore, StopSignal, Supervisor
from glm_core.settings import REPOSITORY, Settings
from tests.test_finetune import ROWS
from tests.test_jobs import wait_for

STEPS, SAVED = 200, 25
SLOW = 250.0  # seconds that a new process with the model libraries may take on a machine with other work


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace and a table for all trainings of this file."""
    folder = tmp_path_factory.mktemp("trainings")
    lines = [json.dumps({"content": f"{a}{i}", "label": b}) for i in range(5) for a, b in ROWS]
    (folder / "train.json").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def store(place, monkeypatch):
    monkeypatch.setenv("GLM_WORKSPACE", str(place / "workspace"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads for products this small only wait for each other
    return jobs.store(Settings.read())


@pytest.fixture
def training(place, tiny_checkpoint):
    """A training of the small checkpoint into a folder of that name."""

    def make(name, folder=None, **changes):
        plan = Plan(Method("lora", lora_rank=4), "fp32", 1e-2, 2, 1, STEPS, save_steps=SAVED, logging_steps=1)
        plan = replace(plan, **{key: changes.pop(key) for key in list(changes) if hasattr(plan, key)})
        task = FinetuneTask(
            str(tiny_checkpoint), plan, str(place / "train.json"),
            str((folder or place / "workspace" / "checkpoints") / name), device="cpu", max_source=16, max_target=4,
        )  # fmt: skip
        return FinetuneJob(replace(task, **changes), report=False)

    return make


@pytest.fixture
def supervisor(store):
    """The thread that runs the jobs of these tests."""
    running = Supervisor(store, {"finetune": job.run}, poll_s=0.05).start()
    yield running
    running.stop(SLOW)


def ended(store, queued, expected):
    """Wait until a job has this state; any other end is an error that says why."""
    wait_for(lambda: store.get(queued.id).state not in ("queued", "running"), SLOW)
    found = store.get(queued.id)
    assert found.state == expected, (found.message, log_of(found))
    return found


def folder_of(queued):
    return Path(queued.task["task"]["output"])


def log_of(queued):
    log = folder_of(queued) / job.LOG
    return log.read_text(encoding="utf-8") if log.exists() else ""


def reach(store, queued, step):
    """Wait until a training has done a step, with a checkpoint before it."""
    follower = Follower(folder_of(queued))

    def there():
        found = follower.read()
        assert store.get(queued.id).state in ("queued", "running"), store.get(queued.id).message
        return found.state == "running" and found.step >= step and found.saved is not None

    wait_for(there, SLOW)
    assert follower.read().step < STEPS, "it was too fast to be stopped"


def process_of(queued):
    return int(re.findall(r"process (\d+)", log_of(queued))[-1])


def result_of(queued):
    """The losses by step and the trained weights."""
    from safetensors.torch import load_file

    found = status(folder_of(queued))
    weights = load_file(folder_of(queued) / "adapter_model.safetensors")
    return dict(found.curve), {name: tensor.tolist() for name, tensor in weights.items()}


def flat(value):
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


def same(found, expected):
    assert list(found[0]) == list(expected[0]) == list(range(1, STEPS + 1))
    assert list(found[0].values()) == pytest.approx(list(expected[0].values()), rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        assert flat(found[1][name]) == pytest.approx(flat(values), rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def uninterrupted():
    """What the training that nobody disturbs gives; filled by the first test that has one."""
    return {}


def whole(store, training, supervisor, uninterrupted):
    if not uninterrupted:
        queued = ended(store, start(store, training("whole"), "comments"), "done")
        uninterrupted |= {"job": queued, "result": result_of(queued)}
    return uninterrupted["result"]


# ---- whole, stopped, killed


def test_a_job_trains_to_a_checkpoint_that_loads(store, training, supervisor, uninterrupted, tiny_checkpoint):
    losses, _ = whole(store, training, supervisor, uninterrupted)
    queued = uninterrupted["job"]
    found = status(folder_of(queued))
    assert found.state == "done" and found.step == found.steps == STEPS == found.saved == len(losses)
    assert found.loss == losses[STEPS] < losses[1] and len(found.rate) == STEPS
    assert found.manifest["state"] == "done" and found.report is None and found.samples
    assert "Training 2,560 numbers" in " ".join(found.messages)
    assert checkpoints.load(folder_of(queued), "fp32", "cpu", base=tiny_checkpoint).report.missing == ()
    assert queued.total == 0 and FinetuneJob.from_json(queued.task).to_json() == queued.task


def test_killed_and_paused_and_resumed_it_gives_the_same_weights(
    store, training, supervisor, uninterrupted, monkeypatch
):
    told, update = [], store.update
    monkeypatch.setattr(store, "update", lambda key, text: told.append(text) or update(key, text))
    queued = start(store, training("often"), "comments")
    reach(store, queued, SAVED + 1)
    os.kill(process_of(queued), signal.SIGKILL)
    failed = ended(store, queued, "failed")
    assert "was ended by SIGKILL" in failed.message
    assert re.search(r"Resume goes on from checkpoint-\d+\.", failed.message)
    assert status(folder_of(queued)).state == "failed" and "SIGKILL" in status(folder_of(queued)).message
    reached = checkpoints_of(queued)[-1]
    store.resume(queued.id)
    reach(store, queued, SAVED + 1)
    store.request_pause(queued.id)
    ended(store, queued, "paused")
    found = status(folder_of(queued))
    assert found.state == "stopped" and reached < found.saved < STEPS and found.eta_s is None
    store.resume(queued.id)
    ended(store, queued, "done")
    same(result_of(queued), whole(store, training, supervisor, uninterrupted))
    assert any(re.fullmatch(rf"step \d+ of {STEPS}, loss \d+\.\d{{4}}", text) for text in told)
    assert "Stopping after this step; its checkpoint is kept ..." in told


def checkpoints_of(queued):
    return [int(path.name.split("-")[1]) for path in state.checkpoints(folder_of(queued))]


def test_the_death_of_the_server_loses_no_step(store, training, uninterrupted):
    queued = start(store, training("server"), "comments")
    server = "import sys, time; from glm_core import jobs; from glm_core.settings import Settings; "
    server += "jobs.supervisor(Settings.read()); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", server], cwd=REPOSITORY)
    try:
        reach(store, queued, SAVED + 1)
        own = process_of(queued)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not job.held(folder_of(queued)), SLOW)
    found = status(folder_of(queued))
    assert found.state == "stopped" and found.saved == found.step < STEPS
    assert store.get(queued.id).state == "running"  # nobody was left to say otherwise
    supervisor = Supervisor(store, {"finetune": job.run}, poll_s=0.05).start()
    try:
        ended(store, queued, "done")
        assert process_of(queued) != own and store.get(queued.id).attempt == 2
        same(result_of(queued), whole(store, training, supervisor, uninterrupted))
    finally:
        supervisor.stop(SLOW)


def test_cancelled_while_the_model_loads_it_ends_at_once(store, training, supervisor):
    queued = start(store, training("cancelled"), "comments")
    wait_for(lambda: "Loading" in log_of(queued), SLOW)
    store.request_cancel(queued.id)
    ended(store, queued, "cancelled")
    assert status(folder_of(queued)).state == "stopped"
    assert not job.held(folder_of(queued)) and not checkpoints_of(queued)


def test_numbers_that_overflow_fail_the_job_and_leave_a_checkpoint(
    store, training, supervisor, tiny_checkpoint
):
    # AdamW takes learning rate times decay off every weight: here it grows 5,000 times at each step.
    plan = {
        "learning_rate": 0.5,
        "weight_decay": 1e4,
        "save_steps": 1,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    queued = start(store, training("overflow", **plan), "comments")
    failed = ended(store, queued, "failed")
    assert re.match(r"(The loss|A gradient) became (NaN|infinite) at step \d+ ", failed.message)
    assert "Start again with a lower learning rate" in failed.message or "start again" in failed.message
    last = state.checkpoints(folder_of(queued))[-1]
    assert checkpoints.load(last, "fp32", "cpu", base=tiny_checkpoint).report.missing == ()
    assert status(folder_of(queued)).message == failed.message


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0."),
        ({"train_file": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"dev_file": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"start_from": "nowhere"}, "nowhere"),
        ({"output": "/opt/out"}, "is outside the folders this workbench may write"),
        ({"output": str(REPOSITORY / "data" / "models" / "out")}, "is outside the folders"),
    ],
)
def test_what_cannot_work_leaves_neither_job_nor_folder(store, training, changes, said):
    before = store.list()
    what = training("refused", **changes)
    with pytest.raises(GLMError, match=re.escape(said)):
        start(store, what, "comments")
    assert store.list() == before and not Path(what.task.output).exists()


def test_a_folder_in_use_is_refused_until_its_job_is_over(store, training, place):
    queued = start(store, training("twice"), "comments")
    with pytest.raises(GLMError, match="The output folder .*twice is in use"):
        start(store, training("twice"), "comments")
    store.request_cancel(queued.id)
    again = start(store, training("twice"), "comments")  # the first never saved a step
    store.request_cancel(again.id)
    (folder_of(again) / "checkpoint-20").mkdir()
    with pytest.raises(GLMError, match="is in use"):
        start(store, training("twice"), "comments")
    store.resume(queued.id)
    claimed = store.claim(["finetune"], jobs.this_process(), queued.id)
    with StopSignal(store, claimed) as stop, pytest.raises(GLMError, match="belongs to another training"):
        job.run(claimed, store, stop)


def test_a_start_that_fails_half_way_takes_its_folder_back(store, training, monkeypatch):
    what = training("parent/child")
    monkeypatch.setattr(
        JobStore, "mark_ready", lambda *_: (_ for _ in ()).throw(GLMError("The disk is full."))
    )
    with pytest.raises(GLMError, match="The disk is full"):
        start(store, what, "comments")
    assert not Path(what.task.output).parent.exists()


def test_only_one_process_has_a_folder(tmp_path):
    code = "import sys, pathlib, time; from glm_core.finetune.job import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1])): print('has it', flush=True); time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    try:
        other.stdout.readline()
        with pytest.raises(GLMError, match="Another process still trains in "), hold(tmp_path, 0.2):
            pass
        assert job.held(tmp_path)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with hold(tmp_path, 5):
        assert job.held(tmp_path)
    assert not job.held(tmp_path)


# ---- memory


class Host:
    """The chat model's place in the engine, as far as a training asks about it."""

    def __init__(self, held=False):
        self.current, self.held = SimpleNamespace(device=SimpleNamespace(type="cpu")), held

    def unload(self):
        if self.held:
            raise GLMError("The loaded model is in use by the job x.", "Pause it on the Jobs page first.")
        self.current = None


@pytest.fixture
def room(store, training, monkeypatch, tmp_path):
    """What becomes of the chat model, by bytes that are needed, free, and free once it is gone."""

    def ask(needs, free, freed=0, held=False, **changes):
        host = Host(held)
        monkeypatch.setattr(engine, "host", lambda: host)
        monkeypatch.setattr(preflight, "predict", lambda task: SimpleNamespace(memory_bytes=needs))
        monkeypatch.setattr(devices, "free_bytes", lambda name: free if host.current else free + freed)
        what = replace(training("room", tmp_path), **changes)
        (tmp_path / "room").mkdir(exist_ok=True)
        queued = store.create("finetune", "room", what.to_json())
        job._make_room(queued, store, what)
        return host.current is not None, " ".join([*store.get(queued.id).warnings, *said(tmp_path / "room")])

    return ask


def said(folder):
    return status(folder).messages


def test_the_chat_model_stays_where_the_training_fits_beside_it(room):
    stays, text = room(2_000_000_000, 3_000_000_000)
    assert stays and "The chat model stays loaded: the training needs about 2.0 GB on cpu, and 3.0 GB" in text


def test_the_chat_model_makes_room_and_the_job_says_so(room):
    stays, text = room(2_000_000_000, 1_500_000_000, freed=1_000_000_000)
    assert not stays and "The chat model was unloaded to make room for the training." in text


def test_too_little_memory_is_said_with_both_numbers(room):
    with pytest.raises(
        GLMError, match=r"needs about 9\.0 GB of memory on cpu, and 600 MB are free\. Choose a"
    ):
        room(9_000_000_000, 100_000_000, freed=500_000_000)
    with pytest.raises(GLMError, match=r"and 100 MB are free\. Let the chat model be unloaded, or choose"):
        room(9_000_000_000, 100_000_000, freed=500_000_000, keep_chat=True)
    with pytest.raises(GLMError, match="in use by the job x"):
        room(9_000_000_000, 100_000_000, held=True)


# ---- the report


@pytest.fixture
def trained(tmp_path, training):
    """The folder of a training that is done, and what measures it."""
    what = replace(training("done", tmp_path), report=True)
    folder = Path(what.task.output)
    folder.mkdir()
    (folder / MANIFEST).write_text('{"state": "done"}', encoding="utf-8")
    stop = child._Stop(folder, "")
    return lambda: child._work(folder, what, stop), stop


def test_what_is_trained_is_only_measured(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "make", lambda folder, say, stop: asked.append((folder.name, bool(stop()))))
    monkeypatch.setattr(child, "carry_out", None)  # to train again would be an error
    assert trained[0]() == () and asked == [("done", False)]


def test_a_report_that_was_stopped_is_not_done(trained, monkeypatch):
    work, stop = trained

    def make(*_, **__):
        stop.asked.set()
        raise GLMError("Stopped.")

    monkeypatch.setattr(report, "make", make)
    assert work() is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GLMError("There are no rows.", "Add some."), "There are no rows. Add some."),
        (KeyError("x"), "internal error: KeyError"),
    ],
)
def test_a_report_that_fails_does_not_fail_the_training(trained, monkeypatch, error, said):
    def make(*_, **__):
        raise error

    monkeypatch.setattr(report, "make", make)
    (warning,) = trained[0]()
    assert warning.startswith("The report could not be made: ") and said in warning


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "There was too little memory for the training."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "There was too little memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "is full."),
        (KeyError("x"), "The training ended with an internal error: KeyError: 'x'."),
    ],
)
def test_every_end_has_its_sentence(tmp_path, error, said):
    message, todo = child._sentences(error, tmp_path)
    assert said in message and todo


def test_a_process_that_dies_is_quoted(tmp_path):
    (tmp_path / job.LOG).write_bytes(b"of an earlier run\nFatal Python error: Aborted\n\n  File x, line 1\n")
    found = job._died(-signal.SIGABRT, tmp_path, begin=18)
    assert found.message == (
        "The training process was ended by SIGABRT. Its log ends with: Fatal Python error: Aborted"
    )
    assert found.todo == "Resume begins again, since no step was saved yet."


# ---- following


def written(folder, *events, end="\n"):
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(event) for event in events) + end)


def step(number, loss, **more):
    return {"kind": "step", "step": number, "steps": 9, "loss": loss, "learning_rate": 0.1, **more}


def test_steps_done_again_replace_those_that_were_lost(tmp_path):
    follower = Follower(tmp_path)
    assert follower.read().state == "waiting"
    written(tmp_path, step(2, 3.0), {"kind": "dev", "step": 2, "dev_loss": 2.5}, step(4, 2.0), step(6, 1.0))
    assert follower.read().curve == [(2, 3.0), (4, 2.0), (6, 1.0)]
    written(tmp_path, step(4, 2.5, rows_per_s=7.0))
    found = follower.read()
    assert found.curve == [(2, 3.0), (4, 2.5)] and found.rate == [(2, 0.1), (4, 0.1)]
    assert found.dev == [(2, 2.5)] and (found.step, found.loss, found.rows_per_s) == (4, 2.5, 7.0)


def test_what_a_process_does_is_said_as_long_as_it_lives(tmp_path):
    follower = Follower(tmp_path)
    job.write_json(tmp_path / job.JOB, {"job": "x"})
    assert follower.read().state == "waiting"
    with hold(tmp_path):
        job.write_message(tmp_path, "starting", "Loading x ...")
        found = follower.read()
        assert (found.state, found.line) == ("starting", "Loading x ...")
        job.write_message(tmp_path, "running")
        written(tmp_path, step(4, 2.5, eta_s=8.0), {"kind": "dev", "step": 4, "steps": 9, "dev_loss": 2.25})
        found = follower.read()
        assert (found.state, found.eta_s, found.messages) == ("running", 8.0, ["Loading x ..."])
        assert found.line == "step 4 of 9, loss 2.5000, dev loss 2.2500"
    found = follower.read()
    assert (found.state, found.eta_s) == ("stopped", None)
    job.write_result(tmp_path, "", "failed", "It broke.", "Mend it.")
    assert (follower.read().state, follower.read().message) == ("failed", "It broke. Mend it.")


def test_slow_steps_get_longer_to_be_saved(tmp_path):
    assert job.patience(tmp_path) == 120
    written(tmp_path, step(3, 1.0, eta_s=6.0))
    assert job.patience(tmp_path) == 120
    written(tmp_path, step(4, 1.0, eta_s=1000.0))  # for 5 steps
    assert job.patience(tmp_path) == 600


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path):
    follower = Follower(tmp_path)
    text = json.dumps(step(1, 0.5))
    for part in (text[:20], text[20:], "\n"):
        assert follower.read().curve == []
        with (tmp_path / EVENTS).open("a") as file:
            file.write(part)
    assert follower.read().curve == [(1, 0.5)]


def test_a_line_cut_by_a_kill_costs_no_later_one(tmp_path):
    written(tmp_path, step(1, 0.5), step(2, 0.4))
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"kind": "st')
    child._mend(tmp_path / EVENTS)
    written(tmp_path, step(2, 0.4), step(3, 0.3))
    assert status(tmp_path).curve == [(1, 0.5), (2, 0.4), (3, 0.3)]


def test_only_new_lines_are_read(tmp_path, monkeypatch):
    written(tmp_path, *[step(number, 1.0) for number in range(1, 20_001)])
    assert len(status(tmp_path).curve) == 20_000
    count, loads = [0], json.loads
    monkeypatch.setattr(
        json, "loads", lambda text: count.__setitem__(0, count[0] + bool(text)) or loads(text)
    )
    written(tmp_path, step(20_001, 0.5), step(20_002, 0.5))
    assert len(status(tmp_path).curve) == 20_002 and count == [2]


def test_a_training_begun_anew_in_its_folder_is_read_from_its_start(tmp_path):
    follower = Follower(tmp_path)
    written(tmp_path, step(1, 0.5), step(2, 0.4))
    assert len(follower.read().curve) == 2
    (tmp_path / EVENTS).unlink()
    written(tmp_path, step(1, 0.9))
    assert follower.read().curve == [(1, 0.9)]
