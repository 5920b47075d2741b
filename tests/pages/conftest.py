"""Pages in a process of their own making: a fresh workspace, no model at the start, a tiny one on request."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from glm_core import engine, jobs
from glm_core.settings import MINI, Settings
from pages.shared import page, state

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "home": "Home.py",
    **{
        key: f"pages/{key}.py"
        for key in (
            "chat",
            "batch",
            "classify",
            "jobs",
            "evaluate",
            "compare",
            "memory",
            "finetune",
            "models",
        )
    },
}


@pytest.fixture(scope="session", autouse=True)
def scanned_once() -> Iterator[None]:
    """Every AppTest reads the metadata of all installed packages for components; they stay the same."""
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        scan = manifest_scanner.scan_component_manifests
        patch.setattr(manifest_scanner, "scan_component_manifests", functools.cache(scan))
        yield


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh workspace for every test; the process starts without a model and stops its job thread after."""
    folder = tmp_path / "workspace"
    monkeypatch.setenv("GLM_WORKSPACE", str(folder))
    monkeypatch.setattr(engine, "_host", None)
    monkeypatch.setattr(state.Startup, "_run", _start_without_a_model)
    st.cache_resource.clear()
    st.cache_data.clear()
    yield folder
    jobs.supervisor(Settings.read()).stop()
    engine.host().unload()
    st.cache_resource.clear()


def _start_without_a_model(startup: state.Startup) -> None:
    startup.finished.set()


@pytest.fixture
def open_page() -> Callable[..., AppTest]:
    """open_page("models", job="..."): the page as a browser opens it, run once."""

    def opened(name: str, **query: str) -> AppTest:
        app = AppTest.from_file(str(ROOT / "Home.py"), default_timeout=60)
        if name != "home":
            app.switch_page(FILES[name])
        for key, value in query.items():
            app.query_params[key] = value
        return app.run()

    return opened


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released layout with random weights and the embedded model's tokenizer."""
    if not (MINI / "tokenizer.model").is_file():
        pytest.skip("data/models/glm-mini has no tokenizer.model")
    import sentencepiece

    from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer

    assert sentencepiece
    folder = tmp_path_factory.mktemp("models") / "tiny-chatglm3"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((MINI / "tokenizer.model").read_bytes())
    vocab = ChatGLM2Tokenizer(folder / "tokenizer.model", "chatglm3").vocab_size
    write_weights(folder, vocab)
    return folder


def write_weights(folder: Path, vocab: int, hidden: int = 32, layers: int = 2, heads: int = 4) -> None:
    """Random weights under the names of the released ChatGLM2 and ChatGLM3 files, and their config.json."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)  # so small a model only waits for its threads, the more so on a busy machine

    head, groups, inner = hidden // heads, 2, 2 * hidden
    config = {
        "model_type": "chatglm", "padded_vocab_size": vocab, "hidden_size": hidden, "num_layers": layers,
        "ffn_hidden_size": inner, "num_attention_heads": heads, "kv_channels": head, "seq_length": 1024,
        "multi_query_attention": True, "multi_query_group_num": groups, "layernorm_epsilon": 1e-5,
        "rmsnorm": True, "add_qkv_bias": True, "add_bias_linear": False, "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False, "rope_ratio": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    qkv = hidden + 2 * groups * head
    weights = {
        "transformer.embedding.word_embeddings.weight": random(vocab, hidden),
        "transformer.output_layer.weight": random(vocab, hidden),
        "transformer.encoder.final_layernorm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        prefix = f"transformer.encoder.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "self_attention.query_key_value.weight": random(qkv, hidden),
            prefix + "self_attention.query_key_value.bias": random(qkv),
            prefix + "self_attention.dense.weight": random(hidden, hidden),
            prefix + "mlp.dense_h_to_4h.weight": random(2 * inner, hidden),
            prefix + "mlp.dense_4h_to_h.weight": random(hidden, inner),
        }
    save_file(weights, str(folder / "model.safetensors"))


def write_prefix(folder: Path, base: Path, length: int = 6, recorded: str = "", seed: int = 0) -> Path:
    """A random P-tuning v2 prefix for a base, in a folder of its own."""
    import torch

    from glm_core import adapters

    config = json.loads((base / "config.json").read_text())
    torch.manual_seed(seed)
    encoder = adapters.PrefixEncoder(adapters.BaseShape.of_file(config), length)
    adapters.save_prefix(encoder, folder, config | ({"_name_or_path": recorded} if recorded else {}))
    return folder


def write_lora(
    folder: Path, base: Path, recorded: str = "", strength: float = 0.5, **settings: object
) -> Path:
    """A LoRA of rank 4 on the first query_key_value of a base; strength 0 is an untrained one."""
    import torch
    from safetensors.torch import load_file, save_file

    layer = "transformer.encoder.layers.0.self_attention.query_key_value"
    rows, columns = load_file(base / "model.safetensors")[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    weights = {
        f"base_model.model.{layer}.lora_A.weight": torch.randn(4, columns, generator=generator),
        f"base_model.model.{layer}.lora_B.weight": torch.randn(rows, 4, generator=generator) * strength,
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"],
        "base_model_name_or_path": recorded,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.fixture
def family(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two checkpoints of different sizes, for adapters to be put beside them."""
    from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer

    folder = tmp_path / "family"
    shutil.copytree(tiny_checkpoint, folder / "tiny-chatglm3")
    wide = folder / "wide-chatglm3"
    wide.mkdir()
    shutil.copy(tiny_checkpoint / "tokenizer.model", wide)
    write_weights(wide, ChatGLM2Tokenizer(wide / "tokenizer.model", "chatglm3").vocab_size, hidden=64)
    monkeypatch.setenv("GLM_MODELS", str(folder))
    return folder


@pytest.fixture
def model_folder(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint under a folder the workbench may read."""
    monkeypatch.setenv("GLM_MODELS", str(tiny_checkpoint.parent))
    return tiny_checkpoint


def write_whole_with_prefix(folder: Path, base: Path) -> Path:
    """A whole checkpoint with a prefix in it."""
    from safetensors.torch import load_file, save_file

    from glm_core import adapters

    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    encoder = adapters.PrefixEncoder(adapters.BaseShape.of_file(config), 5)
    save_file(load_file(base / "model.safetensors") | encoder.released_state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 5, "prefix_projection": False}))
    return folder


@pytest.fixture
def loaded_model(model_folder: Path) -> engine.Engine:
    """The engine of a tiny checkpoint, loaded in this process as after a click on Load."""
    return engine.host().use(model_folder)


def texts(app: AppTest) -> str:
    """All words on the page."""
    kinds = ("title", "header", "subheader", "markdown", "caption", "error", "info", "warning", "success")
    found = [str(one.value) for kind in kinds for one in getattr(app, kind)]
    found += [f"{one.label} {one.value} {one.delta}" for one in app.metric]
    return "\n".join([*found, *(f"{one.proto.label}" for one in app.get("page_link"))])


@pytest.fixture
def words() -> Callable[[AppTest], str]:
    """words(app): all words on the page."""
    return texts


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """installed("chat"): only these pages are there besides Home."""

    def only(*keys: str) -> None:
        entry = page.entry
        monkeypatch.setattr(page, "entry", lambda key: entry(key) if key in (*keys, "home") else None)

    return only
