"""python -m glm_core users: who may log in to the pages of this workspace."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from typing import TYPE_CHECKING

from ..errors import GLMError
from ..settings import Settings
from .output import PROGRAM, json_text, say, width

if TYPE_CHECKING:
    from ..access import Users


def users(options: argparse.Namespace) -> int:
    """Add, list or remove users, or change a password; passwords are typed or read, never an argument."""
    from .. import access

    settings = Settings.read()
    settings.make_folders()
    found = access.users_of(settings)
    if options.does == "add":
        first = not found.all()
        name = access.checked_name(options.name)
        if name in found.all():
            raise GLMError(
                f"There is a user {name!r} already.", f"Change the password: {PROGRAM} users passwd NAME"
            )
        found.add(name, _password(), admin=options.admin)
        say(f"Added {name}.")
        if first:
            say(
                "The pages ask for a login from now on. What was made without one belongs to the administrators."
            )
        _warn_without_admin(found)
    elif options.does == "passwd":
        user = found.set_password(options.name, _password())
        access.logins_of(settings).end_all(user.name)
        say(f"{user.name} has another password, and is logged out everywhere.")
    elif options.does == "remove":
        found.remove(options.name)
        name = access.clean_name(options.name)
        access.logins_of(settings).end_all(name)
        say(f"Removed {name}.")
        if options.data:
            from .. import belongings, jobs

            belongings.forget(settings, jobs.store(settings), name)
            say("What this user had is deleted: jobs, conversations, comparisons and uploads.")
        if not found.all():
            say(
                "There are no users any more: the pages are open to everybody who reaches them, with all data."
            )
        else:
            _warn_without_admin(found)
    else:
        _list(found, access.logins_of(settings).seen(), options.json)
    return 0


def _password() -> str:
    """A password, typed twice without being shown; from a pipe its first line."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise GLMError("The two are not the same.", "Try again.")
    return password


def _warn_without_admin(found: Users) -> None:
    if not any(user.role == "admin" for user in found.all().values()):
        say(f"No user is an administrator; nobody can change the model. {PROGRAM} users add NAME --admin")


def _list(found: Users, seen: dict[str, float], as_json: bool) -> None:
    listed = sorted(found.all().values(), key=lambda one: one.name)
    if as_json:
        print(json_text([{"name": one.name, "role": one.role, "made": one.made, "seen": seen.get(one.name)}
                         for one in listed]))  # fmt: skip
        return
    if not listed:
        say(f"There are no users: the pages ask for no login. {PROGRAM} users add NAME --admin")
    room = max((width(one.name) for one in listed), default=0)
    for one in listed:
        last = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(seen[one.name])) if one.name in seen else "never"
        )
        print(f"{one.name}{' ' * (room - width(one.name))}  {one.role:5}  last login {last}")
