"""What this machine has, what the workbench finds on it, what is missing; never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import __version__, threads
from .errors import GLMError
from .settings import MINI, REPOSITORY, Settings

OPTIONAL = {"cpm_kernels"}
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
CPM_OLDEST, CPM_NEWEST = (6, 1), (8, 9)  # its binaries are for sm_61 to sm_86; 8.9 runs those of its major
LITTLE_DISK = 1 << 30
VARIABLES = (
    "GLM_WORKSPACE",
    "GLM_MODELS",
    "GLM_TABLES",
    "GLM_KERNELS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)

Problems = list[dict[str, str]]
Section = dict[str, Any]


def report() -> Section:
    """Everything `doctor` shows, ready for JSON; a part that cannot be found out holds an "error" instead."""
    problems: Problems = []
    looks: dict[str, Callable[[Problems], Section]] = {
        "program": _program,
        "packages": _packages,
        "processor": _processor,
        "devices": _devices,
        "memory": _memory,
        "kernels": _kernels,
        "cluster": _cluster,
        "workspace": _workspace,
        "models": _models,
    }
    found: Section = {}
    for name, look in looks.items():
        try:
            with _quiet():
                found[name] = look(problems)
        except GLMError as error:
            found[name] = {"error": error.message}
            _add(problems, error.message, error.todo)
        except (Exception, SystemExit) as error:  # a broken package may raise anything, and this must go on
            found[name] = {"error": _reason(error)}
    return found | {"problems": problems}


def text(found: Section) -> str:
    """A report of `report` as lines to read, or to copy into a question to somebody else."""
    lines: list[str] = []
    for name, section in found.items():
        if name == "problems":
            continue
        lines.append(name.capitalize())
        rows = [(key, _shown(value)) for key, value in section.items() if not key.endswith("_bytes")]
        width = max((len(key) for key, _ in rows), default=0)
        lines += [f"  {key.ljust(width)}  {value}" for key, value in rows]
    lines.append("Problems")
    for problem in found["problems"]:
        lines.append(f"  ! {problem['what']} {problem['todo']}".rstrip())
    return "\n".join(lines if found["problems"] else [*lines, "  none"])


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# ---- the parts


def _program(problems: Problems) -> Section:
    return {
        "glm_core": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _packages(problems: Problems) -> Section:
    from importlib.metadata import PackageNotFoundError, version

    found: Section = {}
    missing: list[str] = []
    other: list[str] = []
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9][\w.-]*)\s*([^#;]*)", line)
        if match is None:
            continue
        name, wanted = match[1], match[2].strip()
        try:
            installed: str | None = version(name)
        except PackageNotFoundError:
            installed = None
        fits = installed is not None and _fits(installed, wanted)
        state = f"{installed or 'not installed'}{'' if fits else f' (wanted {wanted or name})'}"
        found[name] = {"installed": installed, "wanted": wanted, "fits": fits, "text": state}
        if not fits and name not in OPTIONAL:
            (missing if installed is None else other).append(f'"{name}{wanted}"')
    if missing:
        _add(problems, f"{len(missing)} packages are missing.", f"pip install {' '.join(missing)}")
    if other:
        what = f"{len(other)} packages have another version than the workbench was tested with."
        _add(problems, what, f"pip install {' '.join(other)}")
    return found


def _fits(installed: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # nothing to compare with; that it is installed is what counts
    return SpecifierSet(wanted).contains(installed, prereleases=True)


def _processor(problems: Problems) -> Section:
    flags = set(_proc_cpuinfo("flags").split())
    found: Section = {"name": _proc_cpuinfo("model name") or platform.processor() or platform.machine()}
    torch: Any = None
    with contextlib.suppress(Exception):
        import torch
    if not flags and torch is not None:
        with contextlib.suppress(Exception):
            known: dict[str, Any] = torch.cpu.get_capabilities()
            flags = {name.replace("avx512_f", "avx512f") for name, there in known.items() if there is True}
    found["features"] = {name: name in flags for name in FEATURES}
    found["threads"] = {"machine": os.cpu_count(), "usable here": threads.usable()}
    if torch is not None:
        found["torch uses"] = torch.backends.cpu.get_cpu_capability()
        found["threads"]["torch"] = torch.get_num_threads()
    return found


def _proc_cpuinfo(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def _devices(problems: Problems) -> Section:
    try:
        import torch
    except (Exception, SystemExit) as error:
        if getattr(error, "name", "") != "torch":  # where it is not installed, the packages say so
            _add(
                problems, f"PyTorch does not start: {_reason(error)}.", "pip install --force-reinstall torch"
            )
        return {"error": f"PyTorch does not start: {_reason(error)}"}
    found: Section = {"cpu": "usable"}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            major, minor = torch.cuda.get_device_capability(number)
            found[f"cuda:{number}"] = (
                f"{torch.cuda.get_device_name(number)}, sm_{major}{minor}, {size(free)} of {size(total)} free"
            )
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found["cuda"] = f"none usable (PyTorch {torch.__version__}, {built})"
        if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
            todo = "Install a PyTorch build for the driver's CUDA version; see pytorch.org. Until then: cpu."
            _add(problems, "There is an NVIDIA driver, but PyTorch cannot use it.", todo)
    if platform.system() == "Darwin":
        found["mps"] = "usable" if torch.backends.mps.is_available() else "not usable"
    return found


def _memory(problems: Problems) -> Section:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "free": size(memory.available),
        "total": size(memory.total),
        "swap used": size(swap.used),
        "free_bytes": memory.available,
        "total_bytes": memory.total,
    }


def _kernels(problems: Problems) -> Section:
    from . import kernels

    found: Section = {
        "torch": "used on every device; no compiler of the system is ever called",
        "products": f"of few rows and of INT8 and INT4, on this processor: {kernels.state()}",
    }
    usable, why = False, ""
    try:
        # It opens the CUDA driver while it is imported, and without one raises RuntimeError on Linux and
        # macOS, FileNotFoundError or OSError on Windows: never an ImportError.
        import cpm_kernels  # noqa: F401
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "cpm_kernels"
        why = "not installed" if absent else _reason(error)
    else:
        usable, why = _cpm_device()
    state = f"{'usable' if usable else 'unusable'} ({why}); optional, everything works without it"
    return found | {"cpm_kernels": {"usable": usable, "reason": why, "text": state}}


def _cpm_device() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, "it loads, but PyTorch finds no CUDA device"
    able = torch.cuda.get_device_capability(0)
    if CPM_OLDEST <= able <= CPM_NEWEST:
        return True, f"it loads, and has code for sm_{able[0]}{able[1]}"
    return False, f"it has code for sm_61 to sm_86, not for this device's sm_{able[0]}{able[1]}"


def _cluster(problems: Problems) -> Section:
    from importlib.metadata import version

    from . import cluster

    missing = cluster.problem()
    state = f"{version('ray')}, for --engine ray" if missing is None else f"not installed; {missing.todo}"
    return {"ray": f"{state}; optional, everything else works without it"}


def _workspace(problems: Problems) -> Section:
    settings = Settings.read()
    folder = settings.workspace
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    free = shutil.disk_usage(there).free
    if not writable:
        _add(problems, f"The workspace {folder} cannot be written.", "Set GLM_WORKSPACE to another folder.")
    if free < LITTLE_DISK:
        _add(problems, f"The disk with the workspace has only {size(free)} free.", "Free some disk space.")
    return {
        "folder": str(folder),
        "state": ("writable" if writable else "not writable") + ("" if folder.exists() else ", not made yet"),
        "disk free": size(free),
        "disk_free_bytes": free,
        "model folders": [_root(root) for root in settings.model_roots],
        "table folders": [_root(root) for root in settings.table_roots],
    }


def _root(root: Path) -> str:
    return f"{root}{'' if root.is_dir() else ' (not there)'}"


def _models(problems: Problems) -> Section:
    from . import checkpoints

    found = checkpoints.find(Settings.read().model_roots)
    if not any(info.loadable for info in found):
        _add(
            problems,
            "No checkpoint can be loaded.",
            f"The embedded model belongs into {MINI}; add folders of your own with GLM_MODELS.",
        )
    return {
        str(info.path): f"{info.family}: {'can be loaded' if info.loadable else ' '.join(info.problems)}"
        for info in found
    }


# ---- small things


def _add(problems: Problems, what: str, todo: str) -> None:
    problems.append({"what": what, "todo": todo})


def _reason(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{key} {_shown(one)}" for key, one in value.items())
        return str(value["text"]) if "text" in value else ", ".join(parts)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What packages print or warn about while they are tried does not belong into the report."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
