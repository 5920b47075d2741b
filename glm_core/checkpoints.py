"""Find, inspect and load checkpoints; nothing in a checkpoint folder is ever executed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import GLMError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .tokenizers.chatglm2 import ChatGLM2Tokenizer

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LFS_HEAD = b"version https://git-lfs"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint folder holds, read without loading a weight."""

    path: Path
    name: str
    family: str  # "ChatGLM2", "ChatGLM3", or the foreign model_type
    generation: str  # which prompt format: "chatglm2" or "chatglm3"
    parameters: int
    size_bytes: int
    dtype: str
    layers: int
    hidden_size: int
    context: int
    problems: tuple[str, ...] = ()

    @property
    def loadable(self) -> bool:
        return not self.problems

    def memory_bytes(self, precision: str) -> int:
        """Bytes of the weights in memory at a precision, without cache and activations."""
        return self.parameters * BYTES[precision]


@dataclass
class LoadedModel:
    """A model and its tokenizer, ready for the engine."""

    model: PreTrainedModel
    tokenizer: ChatGLM2Tokenizer
    info: CheckpointInfo
    precision: str
    device: torch.device
    load_seconds: float
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def find(roots: Iterable[Path]) -> list[CheckpointInfo]:
    """Every folder with a config.json under the roots, at most two levels down, by name."""
    found: dict[Path, CheckpointInfo] = {}
    for root in roots:
        if not root.is_dir():
            continue
        for config in sorted(
            [*root.glob("config.json"), *root.glob("*/config.json"), *root.glob("*/*/config.json")]
        ):
            folder = config.parent.resolve()
            if folder not in found:
                try:
                    found[folder] = inspect(folder)
                except GLMError as error:
                    found[folder] = CheckpointInfo(
                        folder, folder.name, "unreadable", "", 0, 0, "", 0, 0, 0, (str(error),)
                    )
    return sorted(found.values(), key=lambda info: info.name.lower())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict; GLMError if the folder or the file is missing or damaged."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise GLMError(f"There is no folder {folder}.", "Check the path of the checkpoint.")
    if not path.is_file():
        raise GLMError(
            f"{folder} has no config.json.", "Choose the folder that holds config.json and the weights."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise GLMError(
            f"{path} cannot be read: {error}.", "Copy config.json again from its source."
        ) from error
    if not isinstance(config, dict):
        raise GLMError(f"{path} holds no object.", "Copy config.json again from its source.")
    return config


def inspect(folder: Path) -> CheckpointInfo:
    """Family, size, precision and what is wrong with a checkpoint folder; opens headers, never weights.

    GLMError where the folder is no checkpoint, or so damaged that not even this can be said.
    """
    folder = Path(folder).resolve()
    config = read_config(folder)
    try:
        return _inspect(folder, config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GLMError(
            f"The files in {folder} are damaged ({type(error).__name__}: {str(error)[:200]}).",
            "Copy the checkpoint again from its source.",
        ) from error


def _inspect(folder: Path, config: dict[str, Any]) -> CheckpointInfo:
    model_type = str(config.get("model_type", "unknown"))
    problems: list[str] = []
    family, generation = model_type, ""
    if model_type != "chatglm":
        problems.append(
            f"config.json says model_type {model_type!r}; this version loads 'chatglm' (ChatGLM2, ChatGLM3)."
        )
    elif "padded_vocab_size" not in config:
        problems.append(
            "config.json has no padded_vocab_size: this looks like ChatGLM-6B, which is not loaded yet."
        )
        family = "ChatGLM"
    else:
        generation = _generation(folder, config)
        family = {"chatglm2": "ChatGLM2", "chatglm3": "ChatGLM3"}[generation]
        if config.get("quantization_bit"):
            problems.append(
                f"The weights are stored as INT{config['quantization_bit']}, which is not loaded yet."
            )
    files, file_problems = weight_files(folder)
    problems += file_problems
    if not (folder / "tokenizer.model").is_file():
        problems.append("tokenizer.model is missing.")
    elif is_lfs_pointer(folder / "tokenizer.model"):
        problems.append("tokenizer.model is a Git LFS pointer, not the file itself.")
    parameters, dtype = _count(files, config) if not file_problems else (0, "")
    return CheckpointInfo(
        path=folder,
        name=folder.name,
        family=family,
        generation=generation,
        parameters=parameters,
        size_bytes=sum(f.stat().st_size for f in files if f.is_file()),
        dtype=dtype,
        layers=int(config.get("num_layers", config.get("num_hidden_layers", 0)) or 0),
        hidden_size=int(config.get("hidden_size", 0) or 0),
        context=int(config.get("seq_length", config.get("max_position_embeddings", 0)) or 0),
        problems=tuple(problems),
    )


def _generation(folder: Path, config: dict[str, Any]) -> str:
    """ChatGLM2 or ChatGLM3: the weights cannot tell, so the names decide and ChatGLM3 is the default."""
    for name in (str(config.get("_name_or_path", "")), folder.name):
        for generation in ("chatglm2", "chatglm3"):
            if generation in name.lower():
                return generation
    return "chatglm2" if config.get("seq_length") == 32768 and "rope_ratio" not in config else "chatglm3"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the 130-byte note that Git LFS leaves instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(LFS_HEAD)) == LFS_HEAD


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that hold the weights, and what is wrong with them."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    single = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        files = [single]
    elif index is not None:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, OSError) as error:
            return [], [f"{index.name} cannot be read: {error!r}."]
        if any(Path(name).name != name for name in names):
            return [], [f"{index.name} names files outside the folder."]
        files = [folder / name for name in names]
    else:
        return [], [
            "There are no weights: neither model.safetensors, pytorch_model.bin nor an index of shards."
        ]
    problems = []
    for file in files:
        if not file.is_file():
            problems.append(
                f"The shard {file.name} named in {index.name if index else 'the folder'} is missing."
            )
        elif is_lfs_pointer(file):
            problems.append(
                f"{file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` at its source."
            )
        elif file.suffix == ".safetensors" and (missing := _safetensors_missing(file)):
            problems.append(f"{file.name} is cut off: {missing}")
    return files, problems


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> dtype, shape and data_offsets of a safetensors file, from its first bytes. Raises ValueError."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > 100_000_000:
            raise ValueError("no safetensors header")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    header["__data__"] = 8 + length
    return header


def _safetensors_missing(file: Path) -> str:
    try:
        header = safetensors_header(file)
    except (ValueError, UnicodeDecodeError) as error:
        return f"its header cannot be read ({error})."
    data = header.pop("__data__")
    expected = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    actual = file.stat().st_size
    return (
        ""
        if actual == expected
        else f"it has {actual:,} bytes, its header promises {expected:,}; copy it again."
    )


def _count(files: list[Path], config: dict[str, Any]) -> tuple[int, str]:
    """Parameters and stored precision; from the headers of safetensors, else from the sizes in config.json."""
    total, dtypes = 0, []
    for file in files:
        if file.suffix != ".safetensors":
            return _expected_parameters(config), str(config.get("torch_dtype", ""))
        header = safetensors_header(file)
        header.pop("__data__")
        for name, entry in header.items():
            if not name.endswith("inv_freq"):
                size = 1
                for n in entry["shape"]:
                    size *= n
                total += size
                dtypes.append((size, entry["dtype"]))
    return total, max(dtypes)[1] if dtypes else ""


def _expected_parameters(config: dict[str, Any]) -> int:
    try:
        hidden, layers, ffn = config["hidden_size"], config["num_layers"], config["ffn_hidden_size"]
        queries = config["num_attention_heads"] * config["kv_channels"]
        qkv = queries + 2 * config["multi_query_group_num"] * config["kv_channels"]
        vocab = config["padded_vocab_size"]
    except KeyError:
        return 0
    layer = hidden * qkv + qkv + queries * hidden + 3 * hidden * ffn + 2 * hidden
    return int(2 * vocab * hidden + layers * layer + hidden)


def fingerprint(folder: Path) -> str:
    """A hash that changes when the checkpoint does: config, and names, sizes and both ends of every weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files, _ = weight_files(folder)
    for file in [*files, folder / "tokenizer.model"]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


def best_device() -> str:
    """ "cuda" or "mps" where torch can use one, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_precision(info: CheckpointInfo, device: str) -> Precision:
    """fp32 for small models and on processors without fast bf16 or room; bf16 else; fp16 on older GPUs."""
    import torch

    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if info.parameters < 200_000_000:
        return "fp32"  # exact, and small enough that speed does not suffer
    return "bf16"


def load(
    path: str | Path,
    precision: str = "auto",
    device: str = "auto",
    generation: str | None = None,
) -> LoadedModel:
    """Load a ChatGLM2/3 checkpoint in the released layout, without remote code and without the network.

    path        the checkpoint folder; any name
    precision   "fp32", "bf16", "fp16" or "auto"
    device      "cpu", "cuda", "cuda:1", "mps" or "auto"
    generation  "chatglm2" or "chatglm3", where the folder cannot tell which prompt format was trained
    Raises GLMError naming what is wrong: a missing shard, an LFS pointer, a foreign model, too little memory.
    """
    started = time.perf_counter()
    folder = Path(path).expanduser().resolve()
    info = inspect(folder)
    if info.problems:
        raise GLMError(
            f"{folder} cannot be loaded. {' '.join(info.problems)}", "Repair the folder or choose another."
        )
    if device == "auto":
        device = best_device()
    if precision == "auto":
        precision = best_precision(info, device)
    if precision not in PRECISIONS:
        raise GLMError(f"Precision {precision!r} is unknown.", f"Choose one of {', '.join(PRECISIONS)}.")
    _check_memory(info, precision, device)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
    import torch

    from .models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
    from .tokenizers.chatglm2 import ChatGLM2Tokenizer

    if generation not in (None, "chatglm2", "chatglm3"):
        raise GLMError(f"Generation {generation!r} is unknown.", "Choose chatglm2 or chatglm3.")
    tokenizer = ChatGLM2Tokenizer(folder / "tokenizer.model", generation or info.generation)  # type: ignore[arg-type]
    config = ChatGLM2Config.from_released(read_config(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise GLMError(
            f"tokenizer.model has {tokenizer.vocab_size} ids, the weights only {config.vocab_size}.",
            "Copy tokenizer.model and the weights from the same checkpoint.",
        )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    try:
        model, report = ChatGLM2ForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=None,
        )
    except GLMError:
        raise
    except Exception as error:  # a damaged file surfaces as many types; the analyst needs one sentence
        raise GLMError(
            f"The weights in {folder} cannot be read: {type(error).__name__}: {str(error)[:300]}.",
            "Copy the checkpoint again, or convert .bin files to safetensors.",
        ) from error
    missing, mismatched = sorted(report["missing_keys"]), sorted(str(k) for k in report["mismatched_keys"])
    if missing or mismatched:
        raise GLMError(
            f"{folder} lacks {len(missing)} weights and has {len(mismatched)} of another shape, "
            f"such as {(missing or mismatched)[0]}.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise GLMError(
            f"The model does not go onto {device}: {str(error).splitlines()[0]}", "Choose the device cpu."
        ) from error
    _self_check(model, tokenizer, folder)
    return LoadedModel(
        model,
        tokenizer,
        info,
        precision,
        torch.device(device),
        time.perf_counter() - started,
        defaults(folder),
    )


def defaults(folder: Path) -> dict[str, Any]:
    """The checkpoint's own sampling settings: generation_config.json, else what the released chat() uses."""
    chosen: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "max_new_tokens": 512}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return chosen
        for key in chosen:
            if isinstance(stored.get(key), int | float) and not isinstance(stored[key], bool):
                chosen[key] = stored[key]
        if stored.get("do_sample") is False:
            chosen["temperature"] = 0.0
    return chosen


def _check_memory(info: CheckpointInfo, precision: str, device: str) -> None:
    import psutil

    need = int(info.memory_bytes(precision) * 1.1) + (300 << 20)
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise GLMError("There is no usable CUDA device.", "Choose the device cpu.")
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if need > free:
        raise GLMError(
            f"{info.name} needs about {need / 2**30:.1f} GiB in {precision}; {free / 2**30:.1f} GiB are free on {device}.",
            "Close other programs, choose a lower precision, or use a smaller checkpoint.",
        )


def _self_check(model: PreTrainedModel, tokenizer: ChatGLM2Tokenizer, folder: Path) -> None:
    """Catch a model that loads but is wrong: rotary table as by formula, finite and non-uniform logits."""
    import torch

    rotary = model.model.rotary_emb
    dims = int(model.config.head_dim * model.config.rope_parameters["partial_rotary_factor"])
    theta = model.config.rope_parameters["rope_theta"]
    formula = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    ids = torch.tensor([tokenizer.chat_ids([_user("你好")])], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    if not torch.allclose(rotary.inv_freq.float().cpu(), formula, rtol=1e-5):
        raise GLMError(
            f"{folder} loaded with a wrong rotary table.", "Install the versions in requirements.txt."
        )
    if not torch.isfinite(logits).all() or float(logits.std()) < 1e-6:
        raise GLMError(
            f"{folder} gives no usable numbers (its logits are not finite or all equal).",
            "Copy the checkpoint again; for fp16 weights try precision bf16 or fp32.",
        )


def _user(text: str) -> Any:
    from .tokenizers.chatglm2 import Message

    return Message("user", text)


def release(loaded: LoadedModel) -> None:
    """Give a model's memory back at once, also where something else still points at the object."""
    import torch

    loaded.model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
