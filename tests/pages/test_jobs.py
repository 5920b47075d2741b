"""Jobs: what is listed, what can be done with it, and that a click too late is a sentence."""

from __future__ import annotations

import pytest

from glm_core import jobs
from glm_core.jobs import Result, this_process
from glm_core.settings import Settings

TASK = {"template": "{q}", "columns": ["q"], "output_column": "answer"}


def store():
    return jobs.store(Settings.read())


def made(
    state: str, done: int = 0, failed: int = 0, total: int = 10, owner: str = "elsewhere:1:1", title="t.csv"
):
    """A job in this state; it belongs to a process on another host, so nothing here picks it up."""
    job = store().create("batch", title, TASK)
    store().add_rows(job.id, [(f"q{i}",) for i in range(total)])
    store().mark_ready(job.id)
    store().claim(("batch",), owner, job.id)
    results = [Result(i, "failed" if i < failed else "ok", "a") for i in range(done + failed)]
    store().save_results(job.id, results, owner)
    if state != "running":
        store().release(job.id, owner, state, "Something happened." if state == "failed" else "")
    return store().get(job.id)


def buttons(app) -> set[str]:
    return {str(one.key).split("_list_")[0] for one in app.button if "_list_" in str(one.key)}


def press(app, what: str, job):
    return app.button(key=f"{what}_list_{job.id}").click().run()


def test_an_empty_list_shows_where_to_start(open_page, words):
    app = open_page("jobs")
    assert not app.exception
    assert "No jobs yet" in words(app)
    assert "Start with a sample" in words(app)


def test_a_job_is_listed_with_its_figures(open_page, words):
    made("done", done=7, failed=3, title="reviews.csv")
    shown = words(open_page("jobs"))
    assert "reviews\\.csv" in shown
    assert "10 of 10 rows" in shown
    assert "3 failed" in shown


def test_a_title_is_shown_as_it_is(open_page, words):
    made("done", done=10, title="![x](http://example.org/a.png).csv")
    assert "![x](http" not in words(open_page("jobs"))


@pytest.mark.parametrize(
    ("state", "there", "not_there"),
    [
        ("running", {"pause", "cancel"}, {"resume", "delete", "retry"}),
        ("paused", {"resume", "cancel", "delete"}, {"pause"}),
        ("cancelled", {"resume", "delete"}, {"pause", "cancel"}),
        ("failed", {"resume", "delete"}, {"pause", "cancel"}),
    ],
)
def test_only_what_fits_the_state_can_be_clicked(open_page, state, there, not_there):
    made(state, done=4)
    found = buttons(open_page("jobs"))
    assert there <= found
    assert not not_there & found


def test_a_finished_job_has_nothing_to_resume(open_page):
    made("done", done=10)
    assert buttons(open_page("jobs")) == {"delete"}


def test_pause_asks_the_program_that_runs_it(open_page, words):
    job = made("running", done=4)
    app = open_page("jobs")
    assert "another program" in words(app)
    press(app, "pause", job)
    assert store().get(job.id).stop_request == "pause"


def test_a_job_of_this_program_is_not_called_anothers(open_page, words):
    made("running", done=4, owner=this_process())
    assert "another program" not in words(open_page("jobs"))


def test_cancel_keeps_the_finished_rows(open_page):
    job = made("paused", done=4)
    press(open_page("jobs"), "cancel", job)
    assert (store().get(job.id).state, store().counts(job.id).done) == ("cancelled", 4)


def test_retry_puts_only_the_failed_rows_back(open_page):
    job = made("done", done=7, failed=3)
    press(open_page("jobs"), "retry", job)
    found = store().get(job.id)
    assert (found.failed, found.done) == (0, 7)


def test_delete_takes_rows_and_downloads(open_page, words):
    job, other = made("done", done=10), made("done", done=10)
    exports = Settings.read().exports
    exports.mkdir(parents=True, exist_ok=True)
    for one in (job, other):
        (exports / f"{one.id}-1-10-0.csv").write_text("x")
    press(open_page("jobs"), "delete", job)
    assert [one.id for one in store().list()] == [other.id]
    assert [file.name for file in exports.iterdir()] == [f"{other.id}-1-10-0.csv"]


def test_a_click_on_a_job_that_moved_on_is_a_sentence(open_page):
    job = made("paused", done=4)
    app = open_page("jobs")
    store().delete(job.id)
    app = press(app, "resume", job)
    assert not app.exception
    assert "There is no job" in app.error[0].value


def test_many_jobs_come_in_pages(open_page):
    for _ in range(17):
        made("done", done=1, total=1)
    app = open_page("jobs")
    assert not app.exception
    assert sum(key.startswith("delete_list_") for key in (str(one.key) for one in app.button)) == 15


def test_the_job_in_the_address_comes_first(open_page):
    first = made("done", done=1, total=1)
    for _ in range(3):
        made("done", done=1, total=1)
    app = open_page("jobs", job=first.id)
    keys = [str(one.key) for one in app.button if str(one.key).startswith("delete_list_")]
    assert keys[0] == f"delete_list_{first.id}"


def test_the_page_speaks_chinese(open_page, words):
    made("paused", done=4)
    assert "4 / 10 行" in words(open_page("jobs", lang="zh"))
