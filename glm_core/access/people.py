"""A person as the stores see one: a name that owns things, and rights."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

from ..errors import GLMError

Role = Literal["operator", "admin", "user", "visitor"]
Right = Literal["load", "finetune", "paths", "uploads"]

# What an administrator always may, and GLM_USERS_MAY can give to everybody; uploads are everybody's but a visitor's.
GRANTED: dict[Right, str] = {
    "load": "change the loaded model",
    "finetune": "fine-tune or save models",
    "paths": "open files by their path",
}
RIGHTS: tuple[Right, ...] = (*GRANTED, "uploads")
VISITOR = "~"  # begins the name of a visitor of the demonstration; no user's name may begin so
DEMO_ROWS, DEMO_JOBS, DEMO_ANSWER = 50, 2, 128  # rows of a job, open jobs, tokens of an answer


@dataclass(frozen=True)
class Person:
    """Whoever uses a store.

    name     owns what this person makes; "" owns what was made without a login, which only administrators see
    granted  rights beyond those of the role
    """

    name: str = ""
    role: Role = "operator"
    granted: frozenset[str] = frozenset()

    @property
    def sees_all(self) -> bool:
        """Whether this person may open the jobs of others."""
        return self.role in ("operator", "admin")

    @property
    def lists(self) -> tuple[str, ...] | None:
        """Whose things stand in this person's lists; None for everybody's."""
        return None if self.role == "operator" else (self.name, "") if self.role == "admin" else (self.name,)

    @property
    def is_visitor(self) -> bool:
        return self.role == "visitor"

    @property
    def folder(self) -> str:
        """The name of this person's own folders and files; "" where there is no login."""
        return "" if self.role == "operator" else hashlib.sha256(self.name.encode()).hexdigest()[:20]

    def may(self, right: Right) -> bool:
        """Whether this person has a right."""
        if self.role == "visitor":
            return False
        return self.sees_all or right == "uploads" or right in self.granted

    def require(self, right: Right) -> None:
        """GLMError where this person has not the right."""
        if self.may(right):
            return
        if self.role == "visitor":
            raise GLMError("This is a demonstration: it reads its own samples and saves nothing.",
                           "Install the workbench on your own computer to do this.")  # fmt: skip
        what = GRANTED.get(right, right)
        raise GLMError(f"Only an administrator may {what}.", "Ask an administrator.")


OPERATOR = Person()  # whoever runs the program on a machine of one's own, and the shell
NOBODY = Person("\0", "visitor")  # not logged in: owns nothing, sees nothing


def visitor() -> Person:
    """A new visitor of the demonstration."""
    return Person(VISITOR + secrets.token_hex(8), "visitor")
