"""Rules of the house that a linter does not know: imports point down, the core needs no screen, nothing is remote."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

CORE = REPOSITORY / "glm_core"
# Each line may import the lines below it.
LAYERS = (
    ("__main__", "cli", "doctor", "server", "minimodel"),
    ("belongings",),
    (
        "chat",
        "batch",
        "classify",
        "cluster",
        "review",
        "evaluate",
        "compare",
        "report_html",
        "finetune",
        "memory",
        "effect",
        "votes",
    ),
    ("engine", "scoring", "jobs", "remote"),
    ("checkpoints", "tables", "metrics", "statistics"),
    ("adapters", "quantization", "groupwise", "linear", "models", "tokenizers"),
    ("weights", "devices", "threads", "kernels"),
    ("access",),
    ("settings", "errors"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level names of glm_core that a file imports, wherever in the file it does so."""
    depth = len(path.relative_to(CORE).parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level == 0 and parts[:1] == ["glm_core"]:
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif node.level and node.level == depth:
                names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("glm_core.")}
    return names & set(LEVEL)


def test_every_module_has_a_place():
    found = {
        module_of(path) for path in CORE.rglob("*.py") if path.name != "__init__.py" or path.parent != CORE
    }
    assert found <= set(LEVEL), f"without a layer: {found - set(LEVEL)}"


def test_imports_point_down():
    wrong = []
    for path in CORE.rglob("*.py"):
        own = module_of(path)
        for other in imported(path) - {own}:
            if LEVEL.get(own, 0) > LEVEL[other]:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {other}")
    assert not wrong


@pytest.mark.parametrize(
    "module", ["cli", "batch", "chat", "jobs", "tables", "engine", "minimodel.examples", "server"]
)
def test_the_core_runs_without_streamlit_and_starts_light(module):
    code = (
        "import sys; sys.modules['streamlit'] = None; "
        f"import glm_core.{module}; "
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    ).stdout  # fmt: skip
    return [REPOSITORY / name for name in listed.splitlines() if (REPOSITORY / name).is_file()]


def test_no_checkpoint_code_and_no_device_is_hard_wired():
    for path in [*CORE.rglob("*.py"), *(REPOSITORY / "pages").rglob("*.py"), REPOSITORY / "Home.py"]:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        assert not re.search(r"\.cuda\(\)", text), path


def test_no_large_files_and_no_machine_paths():
    for path in sources():
        relative = path.relative_to(REPOSITORY)
        if relative.parts[:2] != ("data", "models"):
            assert path.stat().st_size < 2_000_000, relative
        if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.name != "test_house_rules.py":
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"(?<![\w.])/(work|farm|root)/|bash_jobs", text), relative


def test_the_readme_tree_is_the_disk():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("<!-- tree -->")[1]
    named = {
        word.rstrip("/")
        for line in tree.splitlines()
        for word in line.split()
        if re.fullmatch(r"[\w./-]+", word)
    }
    top = {path.relative_to(REPOSITORY).parts[0] for path in sources()} - {".gitignore", ".ci"}
    core = {path.name for path in CORE.iterdir() if path.name not in ("__init__.py", "__pycache__")}
    pages = {path.name for path in (REPOSITORY / "pages").glob("*.py")}
    missing = (top | core | pages) - named
    assert not missing, f"not in the README's tree: {missing}"
    gone = {name for name in named if name.endswith(".py") and name not in core | pages | top} - {
        "test_<module>.py"
    }
    assert not gone, f"in the README's tree but not on disk: {gone}"
