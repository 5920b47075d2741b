"""People, passwords and logins, and stores that show each person what is theirs."""

from __future__ import annotations

import io
import json
import sqlite3
import stat
import time

import pytest

from glm_core import access, belongings, cli
from glm_core.access import DEMO_JOBS, DEMO_ROWS, Attempts, Person, logins, people, users
from glm_core.chat import ConversationStore
from glm_core.errors import GLMError
from glm_core.jobs import JobStore, this_process
from glm_core.review import Reviews
from glm_core.settings import Settings
from glm_core.votes import Side, Trials

ANNA, BOB = Person("anna", "user"), Person("bob", "user")
ADMIN, VISITOR = Person("root", "admin"), Person("~1", "visitor")
PASSWORD = "Pferd Batterie 正确"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(users, "COST", {"n": 16, "r": 8, "p": 1})


@pytest.fixture
def settings(workspace):
    found = Settings.read()
    found.make_folders()
    return found


@pytest.fixture
def store(settings):
    return JobStore(settings.database)


def job_of(store, person, rows=3, kind="batch"):
    made = store.seen_by(person).create(kind, "comments.csv", {"template": "{a}", "columns": ["a"]})
    store.add_rows(made.id, ([f"cell {i}"] for i in range(rows)))
    return store.mark_ready(made.id).id


# ---- users


def test_a_file_of_users_holds_no_password_and_only_its_owner_can_read_it(settings):
    found = access.users_of(settings)
    found.add("anna", PASSWORD, admin=True)
    text = found.path.read_text(encoding="utf-8")
    assert PASSWORD not in text and PASSWORD.split()[0] not in text
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    assert found.check("anna", PASSWORD).role == "admin"
    assert found.check(" anna ", PASSWORD) is not None  # typed with a space
    for name, password in (
        ("anna", "wrong"),
        ("anna", ""),
        ("bob", PASSWORD),
        ("", PASSWORD),
        ("anna", "x" * 2000),
    ):
        assert found.check(name, password) is None


def test_two_users_with_the_same_password_have_different_hashes(settings):
    found = access.users_of(settings)
    assert found.add("anna", PASSWORD).hash != found.add("bob", PASSWORD).hash


@pytest.mark.parametrize("name", ["", "~visitor", "a/b", "x" * 61, "\0", "<b>"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(settings, name):
    with pytest.raises(GLMError):
        access.users_of(settings).add(name, PASSWORD)


def test_a_short_password_is_refused_without_being_repeated(settings):
    with pytest.raises(GLMError) as refused:
        access.users_of(settings).add("anna", "geheim")
    assert "geheim" not in str(refused.value)


def test_nobody_gets_in_where_the_file_is_damaged_or_lost(settings):
    found = access.users_of(settings)
    assert not found.on
    found.add("anna", PASSWORD)
    assert found.on
    whole = found.path.read_text(encoding="utf-8")
    found.path.write_text(whole[:50])
    assert found.on and found.person("anna") is None
    found.path.unlink()
    assert found.on and found.person("anna") is None
    found.path.write_text(whole)
    assert found.person("anna") == Person("anna", "user")
    found.remove("anna")
    assert not found.on


def test_a_user_added_by_another_process_is_seen_at_once(settings):
    mine, other = access.Users(settings), access.Users(settings)
    assert not mine.on
    other.add("anna", PASSWORD)
    assert mine.on and mine.check("anna", PASSWORD)


@pytest.mark.parametrize(
    ("mail", "verified", "role"),
    [
        ("Boss@Example.org", True, "admin"), ("boss@example.org", False, None), ("li@example.org", True, "user"),
        ("li@other.org", True, None), ("one@other.org", True, "user"), ("li@evil.example.org", True, None),
        ("", True, None), ("a@b@example.org", True, None), ("~x@example.org", True, None),
    ],
)  # fmt: skip
def test_a_provider_lets_in_only_who_is_on_a_list(mail, verified, role):
    found = access.by_mail(mail, verified, ["boss@example.org"], ["example.org", "one@other.org"])
    assert (found.role if found else None) == role


def test_no_list_lets_nobody_in_and_a_star_everybody():
    assert access.by_mail("a@b.org", True, [], []) is None
    assert access.by_mail("a@b.org", True, [], ["*"]).role == "user"


# ---- logins


def test_a_token_is_kept_as_a_hash_and_ends_with_logout_removal_or_another_password(settings, monkeypatch):
    monkeypatch.setattr(logins, "LOOK_S", 0.0)
    found = access.Logins(settings)
    salt = {"anna": "1"}
    first, second = found.begin("anna", mark="1"), found.begin("anna", mark="1")
    assert first.encode() not in found.path.read_bytes()
    assert found.who(first, lambda name: salt[name]) == "anna"
    assert found.who(first + "x", lambda name: "1") == "" == found.who("", lambda name: "1")
    assert found.who(first, lambda name: "1", "provider") == ""
    found.end(first)
    assert found.who(first, lambda name: salt[name]) == ""
    salt["anna"] = "2"  # another password
    assert found.who(second, lambda name: salt[name]) == ""
    salt["anna"] = "1"
    assert access.Logins(settings).who(second, lambda name: "1") == "anna"  # as after a restart
    assert found.end_all("anna") == 1
    assert found.who(second, lambda name: "1") == ""


def test_a_login_ends_after_a_week(settings, monkeypatch):
    found = access.Logins(settings)
    token = found.begin("anna")
    later = time.time() + 7 * 86400 + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert found.who(token, lambda name: "") == ""


def test_a_code_for_the_cookie_works_once(settings):
    found = access.Logins(settings)
    code = found.code("token")
    assert found.waiting(code)
    assert [found.redeem(code), found.redeem(code), found.redeem("")] == ["token", "", ""]
    assert not found.waiting(code)


def test_wrong_passwords_make_a_name_wait_longer_and_longer():
    now = [0.0]
    tries = Attempts(lambda: now[0])
    waits = []
    for _ in range(12):
        assert tries.admit("anna") == 0
        wait = tries.admit("anna") if len(waits) >= 2 else 0.0
        waits.append(wait)
        now[0] += wait
    assert waits[2:] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert tries.admit("bob") == 0
    now[0] += 60
    assert tries.admit("anna") == 0
    tries.right("anna")
    assert tries.admit("anna") == 0
    assert "anna" not in str(vars(tries))  # perhaps it was a password in the wrong field


def test_a_hundred_tries_at_once_count_as_a_hundred():
    tries = Attempts(lambda: 0.0)
    assert sum(tries.admit("anna") == 0 for _ in range(100)) == logins.FREE


def test_very_many_wrong_passwords_for_many_names_slow_everybody_down():
    tries = Attempts(lambda: 0.0)
    for number in range(logins.ALL_FREE):
        assert tries.admit(f"name {number}") == 0
    assert 0 < tries.admit("anna") <= logins.ALL_SLOWEST_S


# ---- rights


@pytest.mark.parametrize(
    ("person", "rights"),
    [
        (access.OPERATOR, set(access.RIGHTS)), (ADMIN, set(access.RIGHTS)), (ANNA, {"uploads"}),
        (Person("anna", "user", frozenset({"load"})), {"uploads", "load"}), (VISITOR, set()), (access.NOBODY, set()),
    ],
)  # fmt: skip
def test_who_may_do_what(person, rights):
    assert {right for right in access.RIGHTS if person.may(right)} == rights
    for right in set(access.RIGHTS) - rights:
        with pytest.raises(GLMError):
            person.require(right)


def test_the_environment_gives_users_more_rights(monkeypatch):
    monkeypatch.setenv("GLM_USERS_MAY", "load, finetune")
    monkeypatch.setenv("GLM_DEMO", "1")
    found = Settings.read()
    assert found.users_may == {"load", "finetune"} and found.demo
    monkeypatch.setenv("GLM_USERS_MAY", "everything")
    with pytest.raises(GLMError, match="everything"):
        Settings.read()


# ---- jobs


def test_a_person_sees_own_jobs_and_an_administrator_can_see_all(store):
    old, annas, bobs = (job_of(store, person) for person in (access.OPERATOR, ANNA, BOB))
    admins = job_of(store, ADMIN)

    def listed(person, **how):
        return {job.id for job in store.seen_by(person).list(**how)}

    assert listed(ANNA) == {annas} and listed(BOB, everybody=True) == {bobs}
    assert listed(ANNA, kind="batch", states=("queued",)) == {annas}
    assert listed(ADMIN) == {old, admins} and listed(ADMIN, everybody=True) == {old, annas, bobs, admins}
    assert listed(access.OPERATOR) == {old, annas, bobs, admins}
    assert listed(access.NOBODY) == set()
    assert store.get(annas).user == "anna" and store.seen_by(ADMIN).get(annas).user == "anna"


@pytest.mark.parametrize(
    "act",
    [
        lambda s, i: s.get(i), lambda s, i: s.counts(i), lambda s, i: s.progress(i), lambda s, i: s.pending(i, 1),
        lambda s, i: s.results_page(i, 0, 1), lambda s, i: list(s.iter_results(i)), lambda s, i: s.answer_counts(i, 9),
        lambda s, i: s.last_results(i, 1), lambda s, i: s.request_pause(i), lambda s, i: s.request_cancel(i),
        lambda s, i: s.resume(i), lambda s, i: s.retry_failed(i), lambda s, i: s.delete(i), lambda s, i: s.ahead(i),
        lambda s, i: s.add_rows(i, [["x"]]), lambda s, i: Reviews(s).latest(i), lambda s, i: Reviews(s).cells(i, [0]),
        lambda s, i: Reviews(s).log(i), lambda s, i: Reviews(s).undo(i, "bob"), lambda s, i: Reviews(s).truth(i),
    ],
)  # fmt: skip
def test_the_job_of_another_is_as_unknown_as_one_that_never_was(store, act):
    annas = job_of(store, ANNA)
    before = store.get(annas)
    for person in (BOB, VISITOR, access.NOBODY):
        with pytest.raises(GLMError) as of_another:
            act(store.seen_by(person), annas)
        with pytest.raises(GLMError) as unknown:
            act(store.seen_by(person), "20260101-000000-abcdef")
        assert str(of_another.value).replace(annas, "ID") == str(unknown.value).replace(
            "20260101-000000-abcdef", "ID"
        )
    assert store.get(annas) == before


def test_only_who_may_starts_a_training_or_a_measurement(store):
    for kind in ("finetune", "memory"):
        with pytest.raises(GLMError, match="administrator"):
            store.seen_by(ANNA).create(kind, "t", {})
        assert store.seen_by(Person("anna", "user", frozenset({"load", "finetune"}))).create(kind, "t", {})


def test_the_queue_is_shared_without_names_and_an_administrator_changes_the_turn(store):
    first, second, third = (job_of(store, person) for person in (ANNA, BOB, ANNA))
    first, second, third = sorted((first, second, third))  # ids of one second are in no order
    assert [store.ahead(one) for one in (first, second, third)] == [0, 1, 2]
    assert [job.id for job in store.seen_by(ADMIN).in_turn()] == [first, second, third]
    assert {job.user for job in store.seen_by(BOB).in_turn()} == {"bob"}
    with pytest.raises(GLMError, match="administrator"):
        store.seen_by(ANNA).move(third, 0)
    store.seen_by(ADMIN).move(third, 0)
    last = job_of(store, BOB)
    assert [job.id for job in store.in_turn()] == [third, first, second, last]
    assert store.claim(["batch"], this_process()).id == third
    assert store.running() == 1 and store.ahead(first) == 1
    assert store.claim(["batch"], this_process()).id == first
    with pytest.raises(GLMError, match="wait"):
        store.move(first, 0)


def test_a_database_of_an_earlier_version_keeps_its_jobs_and_shows_them_to_administrators(settings):
    def old_table(text):
        return text.split(", user TEXT")[0].split(",\n        user TEXT")[0] + ")"

    from glm_core import chat, votes
    from glm_core.jobs import database

    with sqlite3.connect(settings.database) as db:
        db.execute(old_table(database.SCHEMA[0]))
        db.execute(old_table(votes.SCHEMA[0]))
        db.executescript(old_table(chat.SCHEMA.split(";")[0].strip()) + ";")
        db.execute(
            "INSERT INTO job(id, kind, title, state, task, created, owner) VALUES ('j', 'batch', 't', 'done', '{}', 1, '')"
        )
        db.execute("INSERT INTO conversation VALUES ('c', 't', 1, 1, '', '', '')")
        db.execute("INSERT INTO trial VALUES ('t', 1, ?, 0)", (json.dumps(TRIAL),))
    store, talks = JobStore(settings.database), ConversationStore(settings.database)
    for person, sees in ((access.OPERATOR, True), (ADMIN, True), (ANNA, False)):
        assert bool(store.seen_by(person).list()) == sees
        assert bool(talks.seen_by(person).list()) == sees
        assert bool(Trials(store.seen_by(person)).newest()) == sees


# ---- conversations and trials

SIDES = [Side(name, f"/models/{name}", "", "fp32", "cpu", "chatglm3") for name in "ab"]
TRIAL = {
    "sides": [vars(one) for one in SIDES], "prompts": ["p"], "settings": {}, "system": "", "blind": True, "seed": 0,
}  # fmt: skip


def test_conversations_are_their_persons_alone(settings):
    talks = ConversationStore(settings.database)
    mine, hers = talks.seen_by(ANNA).create("spam"), talks.seen_by(BOB).create("spam")
    old = talks.create("spam")
    for person, ids in ((ANNA, {mine.id}), (BOB, {hers.id}), (ADMIN, {old.id}), (access.NOBODY, set())):
        view = talks.seen_by(person)
        assert {one.id for one in view.list()} == ids == {one.id for one in view.search("spam")}
    bobs = talks.seen_by(BOB)
    for act in (
        lambda: bobs.get(mine.id), lambda: bobs.rename(mine.id, "x"), lambda: bobs.set_system(mine.id, "x"),
        lambda: bobs.clear(mine.id), lambda: bobs.export(mine.id, "md"), lambda: bobs.stop(mine.id),
        lambda: talks.seen_by(ADMIN).get(mine.id),
    ):  # fmt: skip
        with pytest.raises(GLMError, match="There is no conversation"):
            act()
    bobs.delete(mine.id)
    assert talks.get(mine.id) == mine


def test_trials_are_their_persons_alone_and_need_the_right_to_load(store):
    with pytest.raises(GLMError, match="administrator"):
        Trials(store.seen_by(ANNA)).create(SIDES, ["p"])
    loader = Person("anna", "user", frozenset({"load"}))
    made = Trials(store.seen_by(loader)).create(SIDES, ["p"])
    bobs = Trials(store.seen_by(BOB))
    with pytest.raises(GLMError, match="There is no comparison"):
        bobs.get(made.id)
    bobs.delete(made.id)
    bobs.reveal(made.id)
    assert bobs.newest() == [] and bobs.answers(made.id) == {} and bobs.votes(made.id) == []
    assert Trials(store).get(made.id) == made and made.user == "anna"


# ---- the demonstration, and what people have


def test_a_visitor_has_small_jobs_and_nothing_is_left_of_them(settings, store):
    view = store.seen_by(VISITOR)
    made = [view.create("batch", "t", {}) for _ in range(DEMO_JOBS)]
    with pytest.raises(GLMError, match="demonstration"):
        view.create("batch", "t", {})
    assert view.add_rows(made[0].id, ([str(i)] for i in range(3 * DEMO_ROWS))) == DEMO_ROWS
    store.mark_ready(made[0].id)
    talks = ConversationStore(settings.database).seen_by(VISITOR)
    talks.create("hello")
    uploads = belongings.uploads_of(settings, VISITOR.folder)
    uploads.mkdir()
    for file in (uploads / "a.csv", settings.exports / f"{made[0].id}-all.csv"):
        file.write_text("a\n")
    other = job_of(store, ANNA)
    assert belongings.forget_visitors(settings, store) == 0  # just now, perhaps of another process
    assert belongings.forget_visitors(settings, store, older_than_s=-1) == 1
    assert [job.id for job in store.list()] == [other] and talks.list() == []
    assert not uploads.exists() and list(settings.exports.iterdir()) == []


def test_visitors_are_not_taken_for_each_other():
    assert len({access.visitor().name for _ in range(20)}) == 20
    with pytest.raises(GLMError):
        access.checked_name(access.visitor().name)


def test_what_everybody_has_is_counted(settings, store):
    annas = job_of(store, ANNA, rows=7)
    job_of(store, access.OPERATOR, rows=2)
    ConversationStore(settings.database).seen_by(ANNA).create("x")
    folder = belongings.uploads_of(settings, ANNA.folder)
    folder.mkdir()
    (folder / "a.csv").write_bytes(b"x" * 100)
    (settings.uploads / "old.csv").write_bytes(b"x" * 30)
    (settings.exports / f"{annas}-1.csv").write_bytes(b"x" * 20)
    found = {one.name: one for one in belongings.everything(settings, store, ["anna", "bob"])}
    assert (found["anna"].jobs, found["anna"].rows, found["anna"].conversations) == (1, 7, 1)
    assert found["anna"].file_bytes == 120 and found[""].file_bytes == 30 and found["bob"].jobs == 0


# ---- the shell


def told(capsys):
    out = capsys.readouterr()
    return out.out + out.err


def test_the_shell_adds_lists_changes_and_removes_users(settings, monkeypatch, capsys, store):
    def run(*arguments, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return cli.main(["users", *arguments])

    assert run("add", "anna", "--admin", typed=f"{PASSWORD}\n") == 0
    assert run("add", "李雷", typed="battery staple\n") == 0
    assert run("add", "anna", typed=f"{PASSWORD}\n") == 1
    assert run("passwd", "李雷", typed="another word\n") == 0
    said = told(capsys)
    assert "already" in said
    assert run("list", "--json") == 0
    assert [(one["name"], one["role"]) for one in json.loads(capsys.readouterr().out)] == [
        ("anna", "admin"), ("李雷", "user"),
    ]  # fmt: skip
    found = access.users_of(settings)
    assert found.check("李雷", "another word") and not found.check("李雷", "battery staple")
    job_of(store, Person("李雷", "user"))
    assert run("remove", "李雷", "--data") == 0 and store.list() == []
    said += told(capsys)
    logs = [file for file in settings.workspace.rglob("*") if file.is_file()]
    for secret in (PASSWORD, "battery staple", "another word"):
        assert secret not in said
        assert not [file for file in logs if secret.encode() in file.read_bytes()]


def test_the_owner_of_a_job_from_the_shell_must_be_a_user(settings):
    from glm_core.cli.job import opened_store

    access.users_of(settings).add("anna", PASSWORD)
    with pytest.raises(GLMError, match="no user 'ana'"):
        opened_store("ana")
    made = opened_store("anna").create("batch", "t", {})
    assert made.user == "anna" and opened_store().create("batch", "t", {}).user == ""
    assert people.Person("li@example.org", "user").folder != ANNA.folder
