"""What a checkpoint folder holds and what is wrong with it, read from configurations and headers alone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GLMError
from ..weights import Stored, can_list, is_lfs_pointer, listing, read_json, weight_files

if TYPE_CHECKING:
    from ..adapters import AdapterInfo

Precision = Literal[
    "fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128", "int8-dynamic"
]  # fmt: skip
# What weights are stored and trained over; and what they can be loaded in: INT8 with the activations rounded to 8 bits
# as well is for computing answers on a processor.
# INT4 with a scale and a zero point for so many columns of a row; `glm_core.groupwise` has the layout.
GROUPED: dict[Precision, int] = {"int4-g32": 32, "int4-g64": 64, "int4-g128": 128}
GROUP_METHOD = "glm-workbench-int4"  # quant_method of a config.json whose weights are stored so
STORED: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4", *GROUPED)
DYNAMIC: Precision = "int8-dynamic"
PRECISIONS: tuple[Precision, ...] = (*STORED, DYNAMIC)
BYTES: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5}
PREFIX_KEYS = "transformer.prefix_encoder."
# The layers that INT8/INT4 replaces, in the released spelling and in that of transformers.
LINEAR = re.compile(
    r"layers\.\d+\..*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h|[qkvo]_proj|gate_up_proj|gate_proj|up_proj"
    r"|down_proj)\.weight$"
)
FAMILIES = {"chatglm": "ChatGLM", "chatglm2": "ChatGLM2", "chatglm3": "ChatGLM3", "glm4": "GLM-4"}
NATIVE = {"glm": "GLM-4", "glm4": "GLM-4-0414", "llama": "LLaMA", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TOKENIZERS = {"chatglm": "ice_text.model", "chatglm2": "tokenizer.model", "chatglm3": "tokenizer.model",
              "glm4": "tokenizer.model"}  # fmt: skip
# What a released config.json must say, and the tensor that every checkpoint of the layout has.
SIZES = {
    "chatglm": ("vocab_size", "hidden_size", "inner_hidden_size", "num_layers", "num_attention_heads", "bos_token_id",
                "eos_token_id"),
    "chatglm2": ("padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads",
                 "multi_query_group_num", "kv_channels", "layernorm_epsilon", "seq_length"),
}  # fmt: skip
EMBEDDING = {"chatglm": "transformer.word_embeddings.weight",
             "chatglm2": "transformer.embedding.word_embeddings.weight"}  # fmt: skip
COUNTS = ("max_sequence_length", "max_position_embeddings", "num_hidden_layers", "pre_seq_len",
          "layernorm_epsilon")  # fmt: skip
UNFINISHED = ".partial"  # ends the name of a folder that is still being written
STEP = re.compile(r"checkpoint-\d+")  # a folder of a training's step, one of several of the same name
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
GLM4_VOCABULARY = 100_000  # padded; ChatGLM2/3 have 65,024, GLM-4 has 151,552


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint folder holds, read without loading a weight."""

    path: Path
    name: str
    family: str  # "ChatGLM", "ChatGLM2", "ChatGLM3", "GLM-4", or what the foreign model_type stands for
    generation: str  # which prompt format: "chatglm", "chatglm2", "chatglm3", "glm4" or "template"
    parameters: int
    size_bytes: int
    dtype: str  # of most weights as stored: F32, F16, BF16, INT8, INT4
    layers: int
    hidden_size: int
    context: int
    problems: tuple[str, ...] = ()
    architecture: str = ""  # what runs it: "chatglm", "chatglm2", or transformers' model_type
    bits: int = 0  # 8 or 4 where the weights are stored quantized
    group: int = 0  # columns that share a scale, where they are stored so; 0: a row has one
    linear_parameters: int = 0  # those that INT8/INT4 replaces
    method: str = ""  # "p-tuning-v2" or "lora" where the folder holds an adapter
    adapter: AdapterInfo | None = None
    base: str = ""  # what the adapter was trained on, as the folder names it

    @property
    def loadable(self) -> bool:
        return not self.problems

    @property
    def codes(self) -> str:
        """What the linear layers are stored as: INT8, INT4, INT4-G64; "" for floats."""
        return code_name(self.bits, self.group)

    @property
    def needs_base(self) -> bool:
        """Whether the folder holds an adapter alone."""
        return self.adapter is not None and not self.adapter.with_base

    def memory_bytes(self, precision: str) -> int:
        """Bytes of the weights in memory at a precision, without cache and activations."""
        others = self.parameters - self.linear_parameters
        if precision == DYNAMIC:
            return int(self.linear_parameters + others * 2)
        if self.bits:
            coded = self.bits / 8 + (4 / self.group if self.group else 0)
            return int(self.linear_parameters * coded + others * BYTES.get(precision, 2))
        if precision in GROUPED:
            return int(self.linear_parameters * (0.5 + 4 / GROUPED[precision]) + others * 2)
        if precision in ("int8", "int4"):
            return int(self.linear_parameters * BYTES[precision] + others * 2)
        return int(self.parameters * BYTES[precision])


def find(roots: Iterable[Path]) -> list[CheckpointInfo]:
    """Every folder with a config.json or an adapter_config.json under the roots, at most two levels down, by name."""
    found: dict[Path, CheckpointInfo] = {}
    for root in roots:
        if not os.path.isdir(root):
            continue
        for level in ("", "*/", "*/*/"):
            for name in ("config.json", "adapter_config.json"):
                for config in sorted(root.glob(level + name)):
                    folder = config.parent.resolve()
                    if folder not in found and not folder.name.endswith(UNFINISHED):
                        try:
                            found[folder] = inspect(folder)
                        except GLMError as error:
                            found[folder] = CheckpointInfo(
                                folder,
                                display_name(folder),
                                "unreadable",
                                "",
                                0,
                                0,
                                "",
                                0,
                                0,
                                0,
                                (str(error),),
                            )
    return sorted(found.values(), key=lambda info: info.name.lower())


def display_name(folder: Path) -> str:
    """How a folder is called on screen; a step's checkpoint carries the name of its training before its own."""
    return f"{folder.parent.name}/{folder.name}" if STEP.fullmatch(folder.name) else folder.name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict; GLMError if the folder or the file is missing or damaged."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise GLMError(f"There is no folder {folder}.", "Check the path of the checkpoint.")
    if not path.is_file():
        raise GLMError(
            f"{folder} has no config.json.", "Choose the folder that holds config.json and the weights."
        )
    return read_json(path)


def inspect(folder: Path) -> CheckpointInfo:
    """Family, size, precision and what is wrong with a checkpoint folder; opens headers, never weights.

    GLMError where the folder is no checkpoint, or so damaged that not even this can be said.
    """
    try:
        folder = Path(folder).resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a link in a circle is a RuntimeError until Python 3.13
        raise GLMError(f"{folder!s} leads to no folder.", "Check the path of the checkpoint.") from error
    try:
        if folder.is_dir() and (folder / "adapter_config.json").is_file():
            return _inspect_lora(folder)
        return _inspect(folder, read_config(folder))
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise GLMError(
            f"The files in {folder} are damaged ({type(error).__name__}: {str(error)[:200]}).",
            "Copy the checkpoint again from its source.",
        ) from error


def stored_as(config: Mapping[str, Any]) -> tuple[int, int]:
    """(bits, columns that share a scale) of a config.json: (0, 0) for floats, no columns where every row has one."""
    described = config.get("quantization_config")
    if isinstance(described, Mapping) and described.get("quant_method") == GROUP_METHOD:
        group = _number(described, "group_size")
        return 4, group if group in GROUPED.values() else 0
    return _number(config, "quantization_bit"), 0


def code_name(bits: int, group: int) -> str:
    """How codes are called on screen: INT8, INT4, INT4-G64; "" for none."""
    return f"INT{bits}" + (f"-G{group}" if group else "") if bits else ""


def code_bits(precision: str) -> tuple[int, int]:
    """(bits, columns that share a scale) of the codes a precision makes of float weights, (0, 0) for none."""
    if precision in GROUPED:
        return 4, GROUPED[precision]  # type: ignore[index]
    return {"int8": 8, "int4": 4, DYNAMIC: 8}.get(precision, 0), 0


def architecture_of(config: Mapping[str, Any]) -> str:
    """Which model runs a config.json: "chatglm" (v1), "chatglm2" (v2, v3, GLM-4 as released), or its model_type.

    Three generations share model_type "chatglm"; the names of the sizes tell them apart.
    """
    model_type = str(config.get("model_type", "unknown"))
    if model_type != "chatglm":
        return model_type
    return "chatglm2" if "padded_vocab_size" in config or "ffn_hidden_size" in config else "chatglm"


def generation_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The prompt format. ChatGLM2 and 3 have the same weights' names: names decide, ChatGLM3 is the default."""
    architecture = architecture_of(config)
    if architecture == "chatglm":
        return "chatglm"
    marked = folder / "tokenizer_config.json"
    if marked.is_file():
        try:
            stated = read_json(marked).get("glm_generation")
        except GLMError:
            stated = None  # the tokenizer will say so
        if stated in FAMILIES:
            return str(stated)
    if architecture == "chatglm2" and _number(config, "padded_vocab_size") > GLM4_VOCABULARY:
        return "glm4"
    if architecture != "chatglm2":
        return "template"
    for name in (str(config.get("_name_or_path", "")), folder.name):
        for generation in ("chatglm2", "chatglm3"):
            if generation in name.lower():
                return generation
    return "chatglm2" if config.get("seq_length") == 32768 and "rope_ratio" not in config else "chatglm3"


def _inspect(folder: Path, config: dict[str, Any]) -> CheckpointInfo:
    architecture = architecture_of(config)
    generation = generation_of(folder, config)
    problems = _config_problems(config, architecture)
    bits, group = stored_as(config)
    files, file_problems = weight_files(folder)
    problems += file_problems
    stored: Mapping[str, Stored] = {}
    adapter = None
    prefixed = _number(config, "pre_seq_len") > 0
    if files and not file_problems:
        try:
            if prefixed:
                from ..adapters import inspect_adapter  # brings torch, which most folders do not need

                adapter = inspect_adapter(folder)
                problems += _prefix_problems(folder, config, adapter)
            stored = listing(files) if can_list(files) else {}
        except GLMError as error:
            problems.append(str(error))
    if adapter.with_base if adapter is not None else not prefixed:
        if stored and not problems:
            problems += _weight_problems(stored, config, architecture)
        problems += _tokenizer_problems(folder, generation, architecture)
    parameters, linear, dtype = _count(stored, bits) if stored else (_expected_parameters(config), 0, "")
    return CheckpointInfo(
        path=folder,
        name=display_name(folder),
        family=FAMILIES.get(generation) or NATIVE.get(architecture, architecture),
        generation=generation,
        parameters=parameters,
        size_bytes=sum(f.stat().st_size for f in files if f.is_file()),
        dtype=code_name(bits, group) or dtype or str(config.get("torch_dtype", "")),
        layers=_number(config, "num_layers", "num_hidden_layers"),
        hidden_size=_number(config, "hidden_size"),
        context=_number(config, "seq_length", "max_sequence_length", "max_position_embeddings"),
        problems=tuple(problems),
        architecture=architecture,
        bits=bits,
        group=group,
        linear_parameters=linear,
        method=adapter.method if adapter else "",
        adapter=adapter,
        base=adapter.base if adapter else "",
    )


def _inspect_lora(folder: Path) -> CheckpointInfo:
    """A PEFT folder: no sizes of its own but those of the adapter."""
    from ..adapters import inspect_adapter

    adapter = inspect_adapter(folder)
    assert adapter is not None  # there is an adapter_config.json
    return CheckpointInfo(
        path=folder, name=display_name(folder), family="LoRA", generation="", parameters=adapter.parameters,
        size_bytes=adapter.size_bytes, dtype="", layers=0, hidden_size=0, context=0,
        problems=adapter.problems, method=adapter.method, adapter=adapter, base=adapter.base,
    )  # fmt: skip


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is there as a whole number, else 0."""
    return next((config[name] for name in names if type(config.get(name)) is int), 0)


def _config_problems(config: Mapping[str, Any], architecture: str) -> list[str]:
    """What a config.json lacks or says wrongly, as far as the program depends on it."""
    problems = []
    if "model_type" not in config:
        problems.append("config.json names no model_type.")
    elif architecture not in ("chatglm", "chatglm2", *NATIVE) and architecture not in native_architectures():
        problems.append(
            f"config.json says model_type {architecture!r}, which is no text model that transformers has."
        )
    sizes = SIZES.get(architecture, ())
    if absent := [key for key in sizes if config.get(key) is None]:
        problems.append(f"config.json has no {', '.join(absent)}.")
    for key in dict.fromkeys((*sizes, "hidden_size", *COUNTS)):
        value = config.get(key)
        if value is None or key == "eos_token_id":  # of which newer files list several
            continue
        least = 0 if key in ("bos_token_id", "pre_seq_len") else 1
        whole = type(value) is int and value >= least
        if not whole and not (key == "layernorm_epsilon" and isinstance(value, float) and value > 0):
            problems.append(f"config.json says {key} {value!r}, where a positive number belongs.")
    if (bits := config.get("quantization_bit")) not in (None, 0, 4, 8):
        problems.append(f"config.json says quantization_bit {bits!r}; INT8 and INT4 can be loaded.")
    described = config.get("quantization_config")
    if isinstance(described, Mapping) and described.get("quant_method") == GROUP_METHOD:
        group = described.get("group_size")
        if group not in GROUPED.values() or described.get("bits") != 4:
            problems.append(
                f"config.json says {described.get('bits')!r} bits in groups of {group!r}; INT4 in groups of 32, 64 and 128 "
                "can be loaded."
            )
    return problems


def _prefix_problems(folder: Path, config: Mapping[str, Any], adapter: AdapterInfo | None) -> list[str]:
    """Why the prefix that a config.json promises cannot be used."""
    if adapter is None:
        return [f"config.json says pre_seq_len {config['pre_seq_len']}, the weights hold no prefix."]
    if "hidden_size" not in config:
        return []
    try:
        adapter.check_base(config, folder.name)  # of the folder's own sizes, which are its base's
    except GLMError as error:
        return [error.message]
    return []


def _weight_problems(stored: Mapping[str, Stored], config: Mapping[str, Any], architecture: str) -> list[str]:
    """Where the headers of the weights contradict config.json; the shape of every tensor is checked while loading."""
    problems = []
    said = _number(config, "num_layers", "num_hidden_layers")
    layers = {int(found[1]) for name in stored if (found := LAYER.search(name))}
    embedding = EMBEDDING.get(architecture)
    if embedding is None and architecture not in NATIVE:
        return []
    if embedding not in stored and (
        embedding or not any(name.endswith("embed_tokens.weight") for name in stored)
    ):
        missing = embedding or "model.embed_tokens.weight"
        return [
            f"The weights have no {missing}, but {min(stored)}: they are of another model than config.json."
        ]
    if said and len(layers) != said:
        problems.append(f"config.json says {said} layers, the weights have {len(layers)}.")
    if embedding is None:
        return problems
    quantized_embedding = bool(config.get("quantization_embeddings"))
    expected = (_number(config, "vocab_size", "padded_vocab_size"), _number(config, "hidden_size"))
    shape = stored[embedding].shape
    if shape != expected and not quantized_embedding:
        problems.append(f"{embedding} has the shape {shape}, config.json says {expected}.")
    bits, group = stored_as(config)
    faults: dict[str, str] = {}  # the first tensor with a fault stands for all
    for name, tensor in stored.items():
        coded = LINEAR.search(name) or (quantized_embedding and name in (embedding, "lm_head.weight"))
        if tensor.dtype.startswith(("F", "BF")):
            continue
        if not coded:
            faults.setdefault("type", f"{name} is stored as {tensor.dtype}, where floats belong.")
        elif not bits:
            faults.setdefault(
                "bits", f"{name} is stored as {tensor.dtype}, but config.json has no quantization_bit."
            )
        else:
            scale = stored.get(f"{name}_scale")
            if group and scale is not None and len(scale.shape) == 2:
                continue  # the shapes are checked while loading
            _code_faults(faults, tensor, scale, bits, _inputs(config, name))
    return problems + list(faults.values())


def _code_faults(faults: dict[str, str], codes: Stored, scale: Stored | None, bits: int, inputs: int) -> None:
    """Add what is wrong with the codes and the scales of one quantized layer."""
    rows, columns = codes.shape if len(codes.shape) == 2 else (0, 0)
    other = 12 - bits  # 8 or 4
    if inputs and columns == inputs * other // 8:
        faults.setdefault(
            "packed",
            f"{codes.name} has {columns} columns, as in INT{other}; config.json says quantization_bit {bits}.",
        )
    if scale is None:
        faults.setdefault(
            "scale", f"{codes.name} has no {codes.name}_scale, without which its codes mean nothing."
        )
    elif scale.shape != (rows,):
        faults.setdefault("scale", f"{scale.name} has the shape {scale.shape}, its layer has {rows} rows.")


def _inputs(config: Mapping[str, Any], name: str) -> int:
    """How many numbers a linear layer of the released layouts reads."""
    hidden = _number(config, "hidden_size")
    part = name.split(".")[-2]
    if part == "dense_4h_to_h":
        return _number(config, "inner_hidden_size", "ffn_hidden_size")
    if part == "dense" and "kv_channels" in config:
        return _number(config, "num_attention_heads") * _number(config, "kv_channels")
    return hidden


def _tokenizer_problems(folder: Path, generation: str, architecture: str) -> list[str]:
    problems: list[str] = []
    told: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        try:
            told = read_json(folder / "tokenizer_config.json")
        except GLMError as error:
            problems.append(error.message)
    name = TOKENIZERS.get(generation)
    if name is not None:
        return [*_file_problems(folder / name), *problems]
    there = [
        name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).is_file()
    ]
    if not there:
        return ["There is no tokenizer: neither tokenizer.json, tokenizer.model nor vocab.json.", *problems]
    problems = [*_file_problems(folder / there[0]), *problems]
    remote = told.get("auto_map")
    if isinstance(remote, dict):
        remote = remote.get("AutoTokenizer")
    if remote and not _knows_tokenizer(told.get("tokenizer_class"), architecture):
        problems.append(
            f"tokenizer_config.json asks for {told.get('tokenizer_class')!r}, a class in the folder's own code, "
            "which is never run."
        )
    return problems


def _knows_tokenizer(name: Any, architecture: str) -> bool:
    """Whether transformers has this tokenizer itself; else it would ask on the terminal whether to run the folder's."""
    from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if architecture in CONFIG_MAPPING and CONFIG_MAPPING[architecture] in TOKENIZER_MAPPING:
        return True
    name = str(name).removesuffix("Fast")
    return any(tokenizer_class_from_name(candidate) is not None for candidate in (name, f"{name}Fast"))


def _file_problems(file: Path) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing."]
    if not file.stat().st_size:
        return [f"{file.name} is cut off: it is empty; copy it again."]
    return [f"{file.name} is a Git LFS pointer, not the file itself."] if is_lfs_pointer(file) else []


def native_architectures() -> frozenset[str]:
    """model_types that transformers runs as text models with code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _count(stored: Mapping[str, Stored], bits: int) -> tuple[int, int, str]:
    """(parameters, those INT8/INT4 replaces, commonest dtype); packed INT4 weights count two per byte.

    A tied copy of the embedding (ChatGLM-6B's lm_head) counts as stored, which is how the model is named "6B".
    """
    total = linear = 0
    sizes: dict[str, int] = {}
    for name, tensor in stored.items():
        if name.endswith(("inv_freq", "weight_scale", "weight_zero")) or name.startswith(PREFIX_KEYS):
            continue
        packed = bits == 4 and tensor.dtype in ("I8", "U8")
        numel = tensor.numel * (2 if packed else 1)
        total += numel
        linear += numel if LINEAR.search(name) else 0
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + numel
    return total, linear, max(sizes, key=sizes.__getitem__) if sizes else ""


def _expected_parameters(config: Mapping[str, Any]) -> int:
    """From the sizes in a released config.json, where the files cannot be listed quickly."""
    try:
        hidden, layers = config["hidden_size"], config["num_layers"]
        if "inner_hidden_size" in config:
            inner = config["inner_hidden_size"]
            layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + inner + hidden + 4 * hidden
            return int(2 * config["vocab_size"] * hidden + layers * layer + 2 * hidden)
        queries = config["num_attention_heads"] * config["kv_channels"]
        qkv = queries + 2 * config["multi_query_group_num"] * config["kv_channels"]
        layer = hidden * qkv + qkv + queries * hidden + 3 * hidden * config["ffn_hidden_size"] + 2 * hidden
        return int(2 * config["padded_vocab_size"] * hidden + layers * layer + hidden)
    except (KeyError, TypeError, ValueError):
        return 0


def fingerprint(folder: Path, base: Path | None = None) -> str:
    """A hash that changes when the checkpoint does: configs, and names, sizes and both ends of every weight file.

    base   the folder under an adapter, which then counts as well
    """
    digest = hashlib.sha256()
    if base is not None:
        digest.update(fingerprint(base).encode())
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    files, _ = weight_files(folder)
    extra = [
        folder / name
        for name in (
            "adapter_model.safetensors",
            "adapter_model.bin",
            *sorted(set(TOKENIZERS.values())),
            "tokenizer.json",
        )
    ]
    for file in [*files, *extra]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]
