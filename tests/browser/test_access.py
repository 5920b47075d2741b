"""Two people in two browsers: each has what is theirs, and a file's address opens for nobody else."""

from __future__ import annotations

from glm_core import access, batch, jobs
from glm_core.access import Person
from glm_core.chat import ConversationStore
from glm_core.engine import GenerationSettings
from glm_core.jobs import JobStore, Result
from glm_core.settings import MINI, Settings
from tests.browser.serving import Server, settled

PASSWORD = "correct horse battery"


def done_job(store: JobStore, name: str) -> str:
    task = batch.BatchTask(
        checkpoint=str(MINI), checkpoint_fingerprint="", precision="fp32", device="cpu", template="{a}", system="",
        settings=GenerationSettings(), output_column="answer", input_name=f"{name}.csv", input_path="",
        input_sha256="", columns=("a",), read_options={}, limit_rows=None,
    )  # fmt: skip
    view = store.seen_by(Person(name, "user"))
    made = view.create("batch", f"table of {name}", task.to_json())
    view.add_rows(made.id, [[f"text of {name}"]])
    view.mark_ready(made.id)
    store.claim(("batch",), jobs.this_process(), made.id)
    store.save_results(made.id, [Result(0, "ok", f"answer to {name}")])
    store.release(made.id, jobs.this_process(), "done")
    return made.id


def log_in(page, name: str) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.locator("input[type=password]").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_text("Log out").wait_for()


def test_two_people_in_two_browsers_see_only_their_own(chromium, tmp_path, monkeypatch):
    workspace = tmp_path / "workspace"
    monkeypatch.setenv("GLM_WORKSPACE", str(workspace))
    settings = Settings.read()
    settings.make_folders()
    store, talks = JobStore(settings.database), ConversationStore(settings.database)
    job, talk = {}, {}
    for name in ("anna", "bob"):
        access.users_of(settings).add(name, PASSWORD)
        job[name] = done_job(store, name)
        talk[name] = talks.seen_by(Person(name, "user")).create(f"talk of {name}").id
    talks.close()
    server = Server(workspace)
    server.start()
    pages = {}
    try:
        for name in job:
            context = chromium.new_context(viewport={"width": 1440, "height": 900}, locale="en-US")
            page = pages[name] = context.new_page()
            page.set_default_timeout(30_000)
            page.goto(f"{server.url}/jobs")
            page.locator("input[type=password]").wait_for()
            assert (
                name not in page.inner_text("body")
                and not page.get_by_test_id("stSidebarContent").is_visible()
            )
            log_in(page, name)
            page.get_by_text(f"table of {name}").first.wait_for()
        for name, other in (("anna", "bob"), ("bob", "anna")):
            assert f"table of {other}" not in pages[name].inner_text("body")
        page = pages["bob"]
        page.goto(f"{server.url}/chat?c={talk['anna']}")  # a reload: the cookie keeps the login
        page.get_by_text("Conversations", exact=True).click()
        page.get_by_text("talk of bob").first.wait_for()
        assert "of anna" not in page.inner_text("body")
        page = pages["anna"]
        page.goto(f"{server.url}/batch?job={job['bob']}")
        page.get_by_text("There is no job").wait_for()
        assert "of bob" not in page.inner_text("body")
        page.goto(f"{server.url}/batch?job={job['anna']}")
        page.get_by_test_id("stDownloadButton").first.wait_for()
        settled(page)
        with page.expect_download() as download:
            page.get_by_test_id("stDownloadButton").first.click()
        assert "answer to anna" in download.value.path().read_text(encoding="utf-8-sig")
        address = download.value.url
        assert pages["anna"].request.get(address).status == 200
        assert pages["bob"].request.get(address).status == 403
        page.get_by_text("Log out").click()
        page.locator("input[type=password]").wait_for()
        assert page.request.get(address).status == 403
        assert PASSWORD not in page.content() and PASSWORD not in page.url
    finally:
        server.kill()
        for page in pages.values():
            page.context.close()
    for file in [server.log, *(one for one in workspace.rglob("*") if one.is_file())]:
        assert PASSWORD.encode() not in file.read_bytes(), file.name
