"""Where things live and which device is used: one dataclass, from GLM_* variables or defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import GLMError

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"
MINI = DATA / "models" / "glm-mini"
MAY = ("load", "finetune", "paths")  # what GLM_USERS_MAY can allow


def _paths(value: str | None) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser().resolve() for part in (value or "").split(os.pathsep) if part)


@dataclass(frozen=True)
class Settings:
    """The folders and limits of one installation; read once with `Settings.read()`."""

    workspace: Path
    model_roots: tuple[Path, ...]
    table_roots: tuple[Path, ...]
    max_upload_mb: int = 500
    users_may: frozenset[str] = frozenset()  # what is not only for administrators, where there are logins
    demo: bool = False  # every visitor alone with the samples, nothing kept

    @classmethod
    def read(cls) -> Settings:
        """Settings from GLM_WORKSPACE, GLM_MODELS and GLM_TABLES (folders separated as in PATH), and of the logins.

        GLM_USERS_MAY takes words of `MAY` separated by commas, GLM_DEMO a 1.
        """
        workspace = Path(os.environ.get("GLM_WORKSPACE") or "~/.glm-workbench").expanduser().resolve()
        if workspace == REPOSITORY or REPOSITORY in workspace.parents:
            raise GLMError(
                f"The workspace {workspace} lies inside the program's own folder.",
                "Set GLM_WORKSPACE to a folder elsewhere, for example ~/.glm-workbench.",
            )
        models = (DATA / "models", workspace / "checkpoints", *_paths(os.environ.get("GLM_MODELS")))
        tables = _paths(os.environ.get("GLM_TABLES")) or (Path.home().resolve(),)
        return cls(
            workspace,
            models,
            (workspace, DATA, *tables),
            users_may=_may(os.environ.get("GLM_USERS_MAY", "")),
            demo=os.environ.get("GLM_DEMO", "").strip().lower() not in ("", "0", "no", "false", "off"),
        )

    @property
    def database(self) -> Path:
        return self.workspace / "workbench.db"

    @property
    def checkpoints(self) -> Path:
        return self.workspace / "checkpoints"

    @property
    def uploads(self) -> Path:
        return self.workspace / "uploads"

    @property
    def exports(self) -> Path:
        return self.workspace / "exports"

    @property
    def cache(self) -> Path:
        return self.workspace / "cache"

    def make_folders(self) -> None:
        """Create the workspace, readable by its owner only; GLMError where that is not possible."""
        try:
            for folder in (self.workspace, self.checkpoints, self.uploads, self.exports, self.cache):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise GLMError(
                f"The workspace {self.workspace} cannot be written: {error.strerror or error}.",
                "Set GLM_WORKSPACE to a folder you may write to.",
            ) from error

    def allowed_table(self, path: str | Path) -> Path:
        """The resolved path of a table under one of the allowed folders; GLMError for any other."""
        return _allowed(path, self.table_roots, "file", "GLM_TABLES")

    def allowed_model(self, path: str | Path) -> Path:
        """The resolved path of a checkpoint folder under one of the allowed folders; GLMError for any other."""
        return _allowed(path, (*self.model_roots, Path.home().resolve()), "folder", "GLM_MODELS")


def _may(value: str) -> frozenset[str]:
    words = frozenset(one.strip() for one in value.split(",") if one.strip())
    if unknown := sorted(words - set(MAY)):
        raise GLMError(f"GLM_USERS_MAY names {unknown[0]!r}.", f"Choose from: {', '.join(MAY)}.")
    return words


def _allowed(path: str | Path, roots: tuple[Path, ...], what: str, variable: str) -> Path:
    resolved = Path(path).expanduser().resolve()
    if not any(resolved == root or root in resolved.parents for root in roots):
        raise GLMError(
            f"The {what} {resolved} is outside the folders this workbench may read "
            f"({', '.join(str(root) for root in roots)}).",
            f"Move it into one of them, or add its folder to {variable} and start again.",
        )
    if not resolved.exists():
        raise GLMError(f"There is no {what} {resolved}.", "Check the spelling, and that the disk is mounted.")
    return resolved
