"""Without compilers, without PATH, with a broken cpm_kernels: the app, the shell and an INT4 answer all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_core.settings import MINI
from tests.conftest import REPOSITORY

BROKEN = {
    "absent": "raise ModuleNotFoundError(\"No module named 'cpm_kernels'\", name='cpm_kernels')",
    "runtime": "raise RuntimeError('Unknown platform: no libcuda here')",
    "os": "raise OSError('libcuda.so.1: cannot open shared object file')",
    "import": "raise ImportError('cannot import name kernels')",
    "present": "",
}
REASONS = {
    "absent": "not installed",
    "runtime": "RuntimeError: Unknown platform: no libcuda here",
    "os": "OSError: libcuda.so.1: cannot open shared object file",
    "import": "ImportError: cannot import name kernels",
    "present": "it loads, but PyTorch finds no CUDA device",
}
# Loads in INT4, answers, and says what the doctor found and which programs were started meanwhile.
ANSWER = """
import json, subprocess, sys
started = []
begin = subprocess.Popen.__init__
def noted(self, args, *rest, **named):
    started.append(args if isinstance(args, str) else " ".join(map(str, args)))
    return begin(self, args, *rest, **named)
subprocess.Popen.__init__ = noted
from glm_core import checkpoints
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.quantization import RowwiseLinear
from glm_core.tokenizers.base import Message
loaded = checkpoints.load(sys.argv[1], "int4", "cpu")
coded = sum(isinstance(one, RowwiseLinear) for one in loaded.model.modules())
engine = Engine(loaded)
ids = tuple(loaded.tokenizer.chat_ids([Message("user", "你好，你是谁？")]))
handle = engine.submit(Request(ids, GenerationSettings(max_new_tokens=8)))
handle.wait(120)
engine.close()
print(json.dumps({"state": handle.state, "tokens": handle.n_tokens, "coded": coded, "started": started}))
"""
SHELL_AND_APP = """
import io, json, sys
from contextlib import redirect_stdout
from glm_core import cli, doctor
said = io.StringIO()
with redirect_stdout(said):
    status = cli.main(["chat", "--prompt", "你好", "--max-new-tokens", "4", "--precision", "int4", "--device", "cpu"])
from streamlit.testing.v1 import AppTest
app = AppTest.from_file("Home.py", default_timeout=120).run()
kernels = doctor.report()["kernels"]["cpm_kernels"]
print(json.dumps({"status": status, "exceptions": len(app.exception), "titles": len(app.header), "kernels": kernels}))
"""


def run(code: str, tmp_path: Path, *arguments: str, **environment: str) -> dict:
    env = {
        name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME", "CUDACXX")
    }
    env |= {"GLM_WORKSPACE": str(tmp_path / "workspace"), "PYTHONIOENCODING": "utf-8"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, encoding="utf-8", env=env,
        cwd=REPOSITORY, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_int4_answers_without_a_path_and_starts_no_program(tmp_path):
    found = run(ANSWER, tmp_path, str(MINI), PATH="")
    assert found["state"] == "done" and found["tokens"] > 0 and found["coded"] > 0
    assert found["started"] == []


@pytest.mark.parametrize("state", list(BROKEN))
def test_cpm_kernels_in_any_state_leaves_app_and_shell_alone_and_the_doctor_says_which(tmp_path, state):
    package = tmp_path / "packages" / "cpm_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN[state], encoding="utf-8")
    paths = os.pathsep.join([str(package.parent), str(REPOSITORY)])
    found = run(SHELL_AND_APP, tmp_path, PYTHONPATH=paths)
    assert (found["status"], found["exceptions"]) == (0, 0) and found["titles"] > 0
    assert found["kernels"] == {
        "usable": False,
        "reason": REASONS[state],
        "text": f"unusable ({REASONS[state]}); optional, everything works without it",
    }


ENDS_MEANWHILE = """
import contextlib, sys, threading, time
from glm_core import engine
from glm_core.errors import GLMError
from glm_core.settings import MINI
host = engine.host()
def load():
    with contextlib.suppress(GLMError):  # "The program is ending."
        host.use(MINI)
threading.Thread(target=load, daemon=True).start()
def reached():
    if sys.argv[1] == "load":
        return host.loading_share > 0
    return "glm-self-test" in {thread.name for thread in threading.enumerate()}
while not reached() and host.state != "ready":
    time.sleep(0.002)
print('{"state": "%s"}' % host.state)
"""


@pytest.mark.parametrize("meanwhile", ["load", "self-test"])
def test_a_program_that_ends_meanwhile_ends_well(tmp_path, meanwhile):
    found = run(ENDS_MEANWHILE, tmp_path, meanwhile)  # fails as well where it ends with "terminate called"
    assert found["state"] in ("loading", "ready")
