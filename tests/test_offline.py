"""Loading asks no network and runs nothing from the folder: proven by a network that fails and code that leaves a mark."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core import checkpoints
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message
from tests.conftest import REPOSITORY
from tests.test_damaged import Make, config_of, make, vocabularies

__all__ = ["make", "vocabularies"]  # fixtures

CODE = (
    "configuration_chatglm",
    "modeling_chatglm",
    "tokenization_chatglm",
    "quantization",
    "generate",
    "__init__",
)
CLASSES = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None],
}


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried that needs the network, remote code or an answer on the terminal; trying fails as well."""
    import transformers.dynamic_module_utils as dynamic

    tried: list[str] = []

    def refused(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tried.append(f"{name} {arguments[:2]}")
            raise OSError(f"{name} is out of bounds")

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refused(name))
    monkeypatch.setattr(builtins, "input", refused("input"))
    resolve = dynamic.resolve_trust_remote_code

    def resolved(*arguments: Any, **options: Any) -> Any:
        trusted = resolve(*arguments, **options)
        return refused("remote code")() if trusted else trusted

    replaced = {
        "resolve_trust_remote_code": resolved,
        "get_class_from_dynamic_module": refused("get_class_from_dynamic_module"),
        "get_class_in_module": refused("get_class_in_module"),
    }
    for module in [module for key, module in sys.modules.items() if key.startswith("transformers.")]:
        for name, function in replaced.items():
            if name in vars(module):  # many modules have imported them by name
                monkeypatch.setattr(module, name, function)
    return tried


def plant(folder: Path, mark: Path) -> None:
    """Code in the folder that creates `mark` when it is imported, and everything that asks for its import."""
    for name in CODE:
        (folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "generate.py", folder / "custom_generate" / "generate.py")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        path = folder / name
        if name == "adapter_config.json" and not path.is_file():
            continue
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        raw |= {"auto_map": CLASSES, "trust_remote_code": True, "custom_generate": str(folder)}
        path.write_text(json.dumps(raw), encoding="utf-8")


def answers(loaded: checkpoints.LoadedModel) -> bool:
    ids = torch.tensor([loaded.tokenizer.chat_ids([Message("user", "你好")])])
    with torch.inference_mode():
        return bool(torch.isfinite(loaded.model(input_ids=ids).logits).all())


WHOLE = ("v1/tiny", "v1/quant_int8", "v1/quant_int4", "v1/quant_int4_qe", "v2/tiny", "v2/quant_int8", "v2/quant_int4",
         "v3/tiny")  # fmt: skip
ADAPTERS = ("v1/ptuning_tiny_noproj", "v1/ptuning_tiny_proj", "v2/ptuning_tiny_noproj", "v2/ptuning_tiny_proj",
            "v1/lora_tiny")  # fmt: skip


def test_the_code_that_is_planted_would_leave_its_mark(make: Make, tmp_path):
    folder = make("v2/tiny")
    plant(folder, tmp_path / "executed")
    subprocess.run([sys.executable, str(folder / "modeling_chatglm.py")], check=True)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("golden", WHOLE)
def test_a_checkpoint_loads_without_network_and_without_its_code(make: Make, tmp_path, attempts, golden):
    folder = make(golden)
    plant(folder, tmp_path / "executed")
    assert answers(checkpoints.load(folder, "fp32", "cpu"))
    assert not attempts and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("golden", ADAPTERS)
def test_an_adapter_loads_without_network_and_without_its_code(make: Make, tmp_path, attempts, golden):
    base, folder = make(f"{golden[:2]}/tiny", "base"), make(golden, "adapter", tokenizer=False)
    for planted in (base, folder):
        plant(planted, tmp_path / "executed")
    assert answers(checkpoints.load(folder, "fp32", "cpu", base=base))
    assert not attempts and not (tmp_path / "executed").exists()


def test_the_embedded_model_loads_without_network_and_without_its_code(tmp_path, attempts):
    folder = Path(shutil.copytree(MINI, tmp_path / "models" / "glm-mini"))
    plant(folder, tmp_path / "executed")
    assert answers(checkpoints.load(folder, "fp32", "cpu"))
    assert not attempts and not (tmp_path / "executed").exists()


def native(folder: Path) -> Path:
    """A small model of a class that transformers has, with a tokenizer.json and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "user": 2, "你好": 3}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True)
    pieces.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<eos>",
                "chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
            }
        )
    )
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_loads_without_network_and_without_its_code(tmp_path, attempts):
    folder = native(tmp_path / "models" / "llama")
    plant(folder, tmp_path / "executed")
    assert answers(checkpoints.load(folder, "fp32", "cpu"))
    assert not attempts and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("changes", [{"model_type": "my_chatglm"}, {"model_type": None}])
def test_a_model_that_only_its_own_code_could_run_is_refused(tmp_path, attempts, changes):
    from glm_core.errors import GLMError

    folder = native(tmp_path / "models" / "llama")
    plant(folder, tmp_path / "executed")
    config_of(folder, **changes)
    with pytest.raises(GLMError, match="model_type"):
        checkpoints.load(folder, "fp32", "cpu")
    assert not attempts and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("changes", [{"tokenizer_class": "ChatGLMTokenizer"}, {"tokenizer_class": None}])
def test_a_tokenizer_that_only_its_own_code_could_run_is_refused(tmp_path, attempts, changes):
    """transformers would ask on the terminal whether to run it; nobody sits there."""
    from glm_core.errors import GLMError

    folder = native(tmp_path / "models" / "llama")
    plant(folder, tmp_path / "executed")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | changes))
    with pytest.raises(GLMError, match="a class in the folder's own code, which is never run"):
        checkpoints.load(folder, "fp32", "cpu")
    assert not attempts and not (tmp_path / "executed").exists()


def test_the_guard_notices_both(tmp_path, attempts):
    from transformers import AutoConfig

    folder = native(tmp_path / "models" / "llama")
    plant(folder, tmp_path / "executed")
    config_of(folder, model_type="my_chatglm")
    with pytest.raises(OSError, match="out of bounds"):
        AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    with pytest.raises(OSError, match="out of bounds"):
        socket.create_connection(("127.0.0.1", 9))
    assert [tried.split(" (")[0] for tried in attempts] == ["remote code", "create_connection"]
    assert not (tmp_path / "executed").exists()


OFFLINE = """
import os, socket, sys
os.environ["HF_HUB_OFFLINE"] = "0"  # as if somebody had allowed the hub: even then nothing is asked
tried = []
def refused(*arguments, **options):
    tried.append(arguments[1:])
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
from glm_core import checkpoints
for folder in sys.argv[1:]:
    checkpoints.load(folder, "fp32", "cpu")
print("loaded", len(sys.argv) - 1, "asked", len(tried))
"""


def test_a_fresh_process_asks_no_network_even_where_it_is_allowed(make: Make, tmp_path):
    folders = [
        make("v1/tiny", "v1"),
        make("v2/quant_int4", "v2"),
        native(tmp_path / "models" / "llama"),
        MINI,
    ]
    for folder in folders[:-1]:
        plant(folder, tmp_path / "executed")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *map(str, folders)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", "4", "asked", "0"]
    assert not (tmp_path / "executed").exists()


def test_nothing_in_the_repository_switches_remote_code_on():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    ).stdout  # fmt: skip
    files = [REPOSITORY / name for name in listed.splitlines() if not name.startswith("tests/")]
    assert len(files) > 50
    switched = re.compile(r"trust_remote_code[\"']?\s*[=:]\s*(True|1|\"true\")", re.IGNORECASE)
    found = [
        str(path.relative_to(REPOSITORY))
        for path in files
        if path.is_file() and switched.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found
    assert switched.search("from_pretrained(path, trust_remote_code=True)")
