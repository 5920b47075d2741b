"""Where a job runs, as chosen on the pages: it reaches the job, it is kept, and without Ray it is said why not."""

from __future__ import annotations

import importlib.util
import time

import pytest

from glm_core import cluster, jobs
from glm_core.jobs import Result
from glm_core.settings import Settings


def button(app, start: str):
    return next(one for one in app.button if str(one.key).startswith(start))


def finished(kind: str):
    """The newest job of a kind, once it is done."""
    store, end = jobs.store(Settings.read()), time.monotonic() + 30
    while (job := store.list(kind=kind)[0]).state != "done":
        assert job.state != "failed" and time.monotonic() < end, job.message
        time.sleep(0.05)
    return job


@pytest.fixture
def elsewhere(monkeypatch):
    """A cluster that answers at once."""

    def run(job, store, stop):
        rows = store.pending(job.id, 1000)
        store.save_results(job.id, [Result(idx, "failed", error="Not now.") for idx, _ in rows], job.owner)

    monkeypatch.setattr(cluster, "run", run)
    monkeypatch.setattr(cluster, "problem", lambda: None)


def test_a_job_goes_to_the_cluster_that_was_chosen_from_either_page(
    open_page, words, loaded_model, elsewhere
):
    app = open_page("batch", sample="comments")
    app.segmented_control(key="widget.cluster.on").set_value("ray").run()
    app.text_input(key="widget.cluster.address").set_value("head 6379").run()
    button(app, "run_").click().run()
    assert "no address of a Ray cluster" in app.error[0].value
    app.text_input(key="widget.cluster.address").set_value("10.0.0.5:6379").run()
    app.number_input(key="widget.cluster.workers").set_value(3).run()
    button(app, "run_").click().run()
    assert not app.exception
    task = finished("batch").task
    where = {name: task[name] for name in cluster.WHERE}
    assert where == {"engine": "ray", "address": "10.0.0.5:6379", "workers": 3, "cpus_per_worker": 0.0}
    assert task["device"] == "cpu"

    app = open_page("classify", sample="comments")
    assert app.segmented_control(key="widget.cluster.on").value == "ray"
    app.toggle(key="widget.cluster.gpu").set_value(True).run()
    button(app, "classify_start").click().run()
    assert not app.exception
    task = finished("classify").task
    assert (task["engine"], task["workers"], task["device"]) == ("ray", 3, "cuda")


def test_without_ray_the_choice_says_why_and_the_job_runs_here(open_page, loaded_model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest)
    )
    app = open_page("batch", sample="comments")
    assert app.segmented_control(key="widget.cluster.on").disabled
    assert any("Ray is not installed" in one.value for one in app.caption)
    assert any("pip install -r requirements-ray.txt" in one.value for one in app.code)
    app.number_input(key="limit_sample:comments").set_value(2).run()
    app.number_input(key="widget.batch.max_new_tokens").set_value(2).run()
    button(app, "run_").click().run()
    assert finished("batch").task["engine"] == ""
