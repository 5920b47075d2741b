"""A workspace of its own for every test, and one small random checkpoint for all that need a model."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
WORKING = ("glm-jobs", "glm-job-run", "glm-load", "glm-startup", "glm-votes")  # threads that use the model
LONG = ("/browser/", "test_training.py", "test_generations.py", "test_no_tools.py", "test_finetune_job.py")
REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
SHARED = Path(os.environ.get("GLM_SHARED_DATA", REPOSITORY.parent / "shared" / "data")).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: at the end it would keep one worker busy and leave the others nothing to do."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker has all tests with a browser: a server and a page wait much, which the others' work then fills."""
    from xdist.scheduler import LoadFileScheduling

    class OneBrowser(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "browser" if "/browser/" in nodeid else str(super()._split_scope(nodeid))

    return OneBrowser(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the workspace of whoever runs it."""
    folder = tmp_path / "workspace"
    monkeypatch.setenv("GLM_WORKSPACE", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="module")
def nothing_goes_on() -> Iterator[None]:
    """A job, a load or a model that outlives its module would meet the tests of the next one, whichever that is."""
    yield
    end = time.monotonic() + 20
    while (left := _working_threads()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left, f"still running: {', '.join(left)}"
    if host := getattr(sys.modules.get("glm_core.engine"), "_host", None):
        host.unload()  # `use` takes what is loaded in any precision where none is asked for


def _working_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith(WORKING)]


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """What the libraries made at import is never garbage; looking through it at every unload took a third of the time."""
    import pandas  # noqa: F401
    import torch  # noqa: F401

    import glm_core.models.chatglm  # noqa: F401
    import glm_core.models.chatglm2  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer ChatGLM3 checkpoint with random weights, in a folder with a space, a dot and Chinese."""
    import shutil

    import torch

    from glm_core.minimodel import training
    from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
    from glm_core.settings import MINI

    folder = tmp_path_factory.mktemp("模型 v1.1") / "tiny chatglm3"
    torch.manual_seed(7)
    config = ChatGLM2Config.from_released(
        {
            "padded_vocab_size": training.PADDED,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_layers": 2,
            "num_attention_heads": 4,
            "multi_query_group_num": 2,
            "kv_channels": 16,
            "layernorm_epsilon": 1e-5,
            "seq_length": 2048,
        }
    )
    model = ChatGLM2ForCausalLM(config)
    with torch.no_grad():  # spread the logits, so that greedy choices are far from ties
        model.lm_head.weight.mul_(60)
    training.save(model.state_dict(), config, folder)
    shutil.copy(MINI / "tokenizer.model", folder)
    return folder


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[object]:
    """A running engine in fp32 on the small checkpoint."""
    from glm_core import checkpoints
    from glm_core.engine import Engine

    running = Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    yield running
    running.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share a product of 64 columns wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
