"""Who may see and do what, where several people share a workbench: people, their passwords and their logins.

people.py has the rights, users.py the file of users, logins.py what keeps a browser logged in. Without a file of
users (and without a login in Streamlit's secrets) there is one person, who sees and may do everything.
"""

from __future__ import annotations

from .logins import Attempts, Logins, logins_of
from .people import DEMO_ANSWER, DEMO_JOBS, DEMO_ROWS, NOBODY, OPERATOR, RIGHTS, Person, visitor
from .users import User, Users, by_mail, checked_name, clean_name, is_on, users_of

__all__ = [
    "DEMO_ANSWER",
    "DEMO_JOBS",
    "DEMO_ROWS",
    "NOBODY",
    "OPERATOR",
    "RIGHTS",
    "Attempts",
    "Logins",
    "Person",
    "User",
    "Users",
    "by_mail",
    "checked_name",
    "clean_name",
    "is_on",
    "logins_of",
    "users_of",
    "visitor",
]
