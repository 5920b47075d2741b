"""Write checkpoints: in the released layout, merged with an adapter, quantized, or in the layout of transformers.

Weights are written as safetensors in shards, tensor by tensor, into a folder beside the target that takes its name
once it is whole, config.json last: an interrupted save leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..weights import read_json, tensors, weight_files
from .inspecting import (
    GROUP_METHOD,
    PREFIX_KEYS,
    UNFINISHED,
    CheckpointInfo,
    code_bits,
    generation_of,
    read_config,
)
from .loading import LoadedModel, Progress, base_of, load

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30
BESIDE = ("tokenizer.model", "ice_text.model", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")  # fmt: skip
# What an interrupted save may have left, and the next one to the same place may delete.
OWN = (*BESIDE, "config.json", "README.md", "*.safetensors", "model.safetensors.index.json",
       "pytorch_model.bin")  # fmt: skip
GROUPED_README = """# INT4 in groups of {group} columns

Written by GLM Workbench, which alone reads it: other programs know neither the names nor the layout of these weights.
To use the model elsewhere, convert the float checkpoint that this one was made from (INT4 with a scale per row is the
format of the published ChatGLM checkpoints).

Of every linear layer `weight` (rows, columns / 2) holds two codes of 4 bits in a byte, the even column in the high
half, in two's complement; `weight_scale` and `weight_zero` (rows, columns / {group}) are fp16. A weight is
code * scale + zero. Where {group} does not divide the columns the group is the next smaller of 64 and 32 that does; where
none does, `weight_scale` (rows) is the only one and a weight is code * scale.
"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def save(loaded: LoadedModel, folder: str | Path, progress: Progress | None = None) -> Path:
    """Write a loaded model in the released layout of its family: names, shapes and config.json as published.

    INT4 in groups has no published layout; its names and shapes are our own, as the README.md that goes with it says.
    A prefix that came in a whole checkpoint is written with it. LoRA layers are to be merged first (`merge`).
    GLMError if the folder exists and is not empty.
    """
    from ..models import released

    source = loaded.base or loaded.info
    if loaded.prefix is not None and loaded.base is not None:
        raise GLMError(
            f"{loaded.info.name} holds a P-tuning v2 prefix alone.",
            "Convert its base; a prefix is kept beside it, and export writes it in the released layout.",
        )
    config = read_config(source.path)
    config.pop("auto_map", None)  # points at code that this product never runs
    bits, group = (source.bits, source.group) if source.bits else code_bits(loaded.precision)
    if group:
        config.pop("quantization_bit", None)
        config["quantization_config"] = {"quant_method": GROUP_METHOD, "bits": bits, "group_size": group}
    elif bits:
        config["quantization_bit"] = bits
        if source.architecture == "chatglm":
            config.setdefault("quantization_embeddings", False)
    else:
        config.pop("quantization_bit", None)
        config["torch_dtype"] = DTYPES[loaded.precision]
    state = loaded.model.state_dict()
    own = source.architecture not in ("chatglm", "chatglm2")
    weights = state.items() if own else released.to_released(state, loaded.model.config)
    if loaded.prefix is not None:
        weights = chain(weights, loaded.prefix.released_state().items())
    return write(
        folder, weights, config, source.path, progress, loaded.weight_bytes, _told(loaded, source, config),
        GROUPED_README.format(group=group) if group else "",
    )  # fmt: skip


def _told(loaded: LoadedModel, source: CheckpointInfo, config: dict[str, Any]) -> dict[str, Any] | None:
    """tokenizer_config.json with the generation, where only the name of the folder had told it."""
    generation = getattr(
        loaded.tokenizer, "generation", loaded.info.generation
    )  # training needs no tokenizer
    marked = source.path / "tokenizer_config.json"
    told = read_json(marked) if marked.is_file() else {}
    if source.architecture != "chatglm2" or told.get("glm_generation") == generation:
        return None
    return told | {"glm_generation": generation} if generation_of(Path(), config) != generation else None


def convert(
    path: str | Path, folder: str | Path, precision: str = "bf16", progress: Progress | None = None
) -> Path:
    """Rewrite a checkpoint in the released layout at another precision, INT8 and INT4 included."""
    loaded = load(path, precision, "cpu", progress=progress)
    if loaded.info.adapter is not None and loaded.info.method == "lora":
        raise GLMError(f"{loaded.info.name} is a LoRA adapter.", "Merge it into its base first.")
    return save(loaded, folder)


def convert_to_glm(
    path: str | Path, folder: str | Path, precision: str = "bf16", progress: Progress | None = None
) -> Path:
    """Rewrite a ChatGLM2, ChatGLM3 or GLM-4 checkpoint in the layout of transformers' own `glm` model type.

    Any program that uses transformers can load the result without remote code. GLMError for ChatGLM-6B, which
    transformers has no class for, and for INT8/INT4, which it cannot read.
    """
    from .inspecting import inspect

    info = inspect(Path(path).expanduser())
    if info.architecture != "chatglm2":
        raise GLMError(
            f"{info.family} cannot be written as `glm`: transformers has no class for it.",
            "Convert ChatGLM2, ChatGLM3 or GLM-4.",
        )
    if info.method == "p-tuning-v2":
        raise GLMError(
            f"{info.name} carries a P-tuning v2 prefix, which `glm` has no place for.",
            "Convert the base without it.",
        )
    if info.bits or precision.startswith("int"):
        raise GLMError("INT8/INT4 weights cannot be written as `glm`.", "Start from bf16 or fp16 weights.")
    loaded = load(path, precision, "cpu", progress=progress)
    config = loaded.model.config.to_dict()
    for name in ("auto_map", "_name_or_path", "quantization_bit"):
        config.pop(name, None)
    config |= {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "torch_dtype": DTYPES[loaded.precision],
    }
    marked = info.path / "tokenizer_config.json"
    told = read_json(marked) if marked.is_file() else {}
    return write(
        folder,
        loaded.model.state_dict().items(),
        config,
        info.path,
        total=loaded.weight_bytes,
        tokenizer_config=told | {"glm_generation": loaded.tokenizer.generation},
    )


def merge(
    path: str | Path, folder: str | Path, base: str | Path | None = None, precision: str = "bf16",
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Add a LoRA adapter to its base's weights and write the whole checkpoint in the released layout."""
    from .. import adapters
    from .inspecting import inspect

    info = inspect(Path(path).expanduser())
    if info.method != "lora":
        raise GLMError(
            f"{info.name} is no LoRA adapter.",
            "A P-tuning v2 prefix is kept beside its base; use export.",
        )
    if precision.startswith("int") or base_of(info, base).bits:
        raise GLMError(
            "LoRA cannot be merged into INT8/INT4 weights.", "Choose a base with bf16 or fp16 weights."
        )
    loaded = load(path, precision, "cpu", base=base, progress=progress)
    adapters.merge_lora(loaded.model)
    return save(loaded, folder, progress)


def export(path: str | Path, folder: str | Path, progress: Progress | None = None) -> Path:
    """Write a P-tuning v2 prefix alone, as the published scripts do: pytorch_model.bin and the base's config.json."""
    import torch

    source = Path(path).expanduser().resolve()
    config = read_config(source)
    files, problems = weight_files(source)
    if problems:
        raise GLMError(
            f"{source} cannot be read. {' '.join(problems)}", "Repair the folder or choose another."
        )
    state = {
        name: tensor.clone() for name, tensor in tensors(files, lambda name: name.startswith(PREFIX_KEYS))
    }
    if not state:
        raise GLMError(f"{source.name} has no P-tuning v2 prefix.", "Choose a folder made by P-tuning v2.")
    with _into(folder) as partial:
        try:
            torch.save(state, partial / "pytorch_model.bin")
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0].rstrip(".")) from error
        _write_json(partial / "config.json", config)
    return Path(folder).expanduser().resolve()


def write(
    folder: str | Path, state: Iterable[tuple[str, Tensor]], config: dict[str, Any], beside: Path,
    progress: Progress | None = None, total: int = 0, tokenizer_config: dict[str, Any] | None = None,
    readme: str = "",
) -> Path:  # fmt: skip
    """config.json, shards of safetensors with their index, and the tokenizer's files copied from `beside`.

    total             bytes of the weights, where known: a disk with less room is refused before anything is written
    tokenizer_config  in place of the copied tokenizer_config.json
    readme            what README.md is to say
    GLMError where the folder exists and is not empty, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _into(folder, total) as partial:
        names: dict[str, int] = {}
        shards = 0
        written = 0
        for shards, shard in enumerate(_shards(state), 1):
            try:
                save_file(shard, partial / f"part-{shards:05}.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(str(error).rstrip(".")) from error
            names |= dict.fromkeys(shard, shards)
            written += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
            if progress is not None:
                progress(written, max(total, written))
        if shards == 1:
            (partial / "part-00001.safetensors").rename(partial / "model.safetensors")
        else:
            for shard_number in range(1, shards + 1):
                final = f"model-{shard_number:05}-of-{shards:05}.safetensors"
                (partial / f"part-{shard_number:05}.safetensors").rename(partial / final)
            _write_json(
                partial / "model.safetensors.index.json",
                {"metadata": {"total_size": written},
                 "weight_map": {name: f"model-{n:05}-of-{shards:05}.safetensors" for name, n in names.items()}},
            )  # fmt: skip
        for name in BESIDE:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, partial / name)
        if tokenizer_config is not None:
            _write_json(partial / "tokenizer_config.json", tokenizer_config)
        if readme:
            (partial / "README.md").write_text(readme, encoding="utf-8")
        _write_json(partial / "config.json", config)
    return Path(folder).expanduser().resolve()


@contextmanager
def _into(folder: str | Path, total: int = 0) -> Iterator[Path]:
    """An empty folder beside the target to write into, which takes the target's name at the end.

    It is deleted where the writing fails or is stopped; a system error becomes a GLMError.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GLMError(f"{target} exists already.", "Choose a new folder.")
    partial = target.with_name(target.name + UNFINISHED)
    if partial.exists() and not _is_left_over(partial):
        raise GLMError(f"{partial} exists already.", "Choose a new folder.")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if total > free:
            raise GLMError(
                f"{target} needs {total / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free there.",
                "Choose a folder with enough room.",
            )
        yield partial
        if target.is_dir():
            target.rmdir()  # empty, as checked above
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise GLMError(
            f"{target} cannot be written: {error}.", "Choose a folder with enough room."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_left_over(partial: Path) -> bool:
    """Whether a folder holds nothing but what a save writes."""
    return partial.is_dir() and all(
        path.is_file() and any(fnmatch(path.name, own) for own in OWN) for path in partial.iterdir()
    )


def _shards(state: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors of at most SHARD_BYTES; each contiguous and with memory of its own, as safetensors wants."""
    shard: dict[str, Tensor] = {}
    size = 0
    seen: dict[int, str] = {}
    for name, tensor in state:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()  # a tied copy is stored twice, as published
        seen[tensor.data_ptr()] = name
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += nbytes
    yield shard


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
