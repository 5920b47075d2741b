"""Load a checkpoint of any GLM generation, tensor by tensor, in a chosen precision, without remote code or network.

The model is built without memory for its weights; each stored tensor is then renamed, split, converted or quantized
on its way in. So the peak stays near the size of the weights at the chosen precision, whatever is on disk.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..weights import listing, tensors, weight_files
from .inspecting import PRECISIONS, PREFIX_KEYS, CheckpointInfo, Precision, inspect, read_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..adapters import PrefixEncoder
    from ..tokenizers.base import Tokenizer

Progress = Callable[[int, int], None]  # (bytes of the files read so far, of all)
# Prompt formats that a folder may be taken for either of; the weights fit both.
ALIKE = ({"chatglm2", "chatglm3"}, {"template", "alpaca", "vicuna"})
IGNORED = ("inv_freq",)  # stored by the released code, computed by ours


@dataclass(frozen=True)
class LoadReport:
    """What became of the stored tensors: names used, names that nothing asked for, names that no file had."""

    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"{len(self.used)} tensors used, {len(self.unused)} unused, {len(self.missing)} missing"


@dataclass
class LoadedModel:
    """A model and its tokenizer, ready for the engine."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    info: CheckpointInfo
    precision: str
    device: torch.device
    load_seconds: float
    defaults: dict[str, Any] = field(default_factory=dict)
    report: LoadReport = LoadReport()
    prefix: PrefixEncoder | None = None  # P-tuning v2
    base: CheckpointInfo | None = None  # what an adapter was put on

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


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
    if device == "mps":
        return "fp16"
    if info.parameters < 200_000_000:
        return "fp32"  # exact, and small enough that speed does not suffer
    return "bf16"


def load(
    path: str | Path,
    precision: str = "auto",
    device: str = "auto",
    generation: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a checkpoint without remote code and without the network.

    path        the checkpoint folder; any name. A folder of P-tuning v2 or LoRA weights alone needs `base`
    precision   "fp32", "bf16", "fp16", "int8", "int4" or "auto"; stored INT8/INT4 weights stay as they are
    device      "cpu", "cuda", "cuda:1", "mps" or "auto"
    generation  "chatglm2" or "chatglm3", where the folder cannot tell which prompt format was trained
    base        the checkpoint an adapter was trained on
    progress    called with the bytes read so far and the bytes of all files
    Raises GLMError naming what is wrong: a missing shard, an LFS pointer, a foreign model, too little memory.
    """
    started = time.perf_counter()
    folder = Path(path).expanduser().resolve()
    info = inspect(folder)
    _refuse_problems(info)
    on = info
    if info.needs_base:
        on = base_of(info, base)
    if device == "auto":
        device = best_device()
    if precision == "auto":
        precision = best_precision(on, device)
    if precision not in PRECISIONS:
        raise GLMError(f"Precision {precision!r} is unknown.", f"Choose one of {', '.join(PRECISIONS)}.")
    if on.bits and precision.startswith("int"):
        precision = "bf16"  # the stored codes stay; this is what is computed with
    _check_memory(on, precision, device)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
    import torch

    chosen = generation or on.generation
    if chosen != on.generation and not any({chosen, on.generation} <= group for group in ALIKE):
        raise GLMError(
            f"The prompt format {chosen!r} does not fit {on.family}.",
            "Leave the prompt format to the folder.",
        )
    model, tokenizer, report = _base_model(on, chosen, precision, progress)
    prefix = None
    if info.adapter is not None:
        prefix = _attach(model, info)
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise GLMError(
            f"The model does not go onto {device}: {str(error).splitlines()[0]}", "Choose the device cpu."
        ) from error
    if prefix is not None:
        prefix = prefix.to(device).eval().requires_grad_(False)
    _self_check(model, tokenizer, folder)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        info=info if info is on else _with_sizes(info, on),
        precision=precision,
        device=torch.device(device),
        load_seconds=time.perf_counter() - started,
        defaults=defaults(on.path),
        report=report,
        prefix=prefix,
        base=None if info is on else on,
    )


def _refuse_problems(info: CheckpointInfo) -> None:
    if info.problems:
        raise GLMError(
            f"{info.path} cannot be loaded. {' '.join(info.problems)}", "Repair the folder or choose another."
        )


def base_of(info: CheckpointInfo, base: str | Path | None) -> CheckpointInfo:
    """The checkpoint under an adapter: the one given, else the one its folder names, if that is on this machine.

    Refused before a weight is read where the sizes show that the adapter was trained on another model.
    """
    assert info.adapter is not None
    if base is None:
        recorded = Path(info.base).expanduser() if info.base else None
        if recorded is None or not recorded.is_dir():
            named = f"; it was trained on {info.base}" if info.base else ""
            raise GLMError(f"{info.name} holds an adapter alone{named}.", "Choose its base checkpoint.")
        base = recorded
    found = inspect(Path(base).expanduser())
    _refuse_problems(found)
    if found.needs_base:
        raise GLMError(f"{found.name} is itself an adapter.", "Choose a whole checkpoint as the base.")
    info.adapter.check_base(read_config(found.path), found.name)
    return found


def _with_sizes(info: CheckpointInfo, base: CheckpointInfo) -> CheckpointInfo:
    """The adapter's own description with the sizes of what it runs on."""
    from dataclasses import replace

    return replace(
        info, family=base.family, generation=base.generation, parameters=base.parameters, layers=base.layers,
        hidden_size=base.hidden_size, context=base.context, architecture=base.architecture, bits=base.bits,
        linear_parameters=base.linear_parameters, dtype=base.dtype,
    )  # fmt: skip


def _base_model(
    info: CheckpointInfo, generation: str, precision: str, progress: Progress | None
) -> tuple[PreTrainedModel, Tokenizer, LoadReport]:
    import torch

    # INT8/INT4 keep embeddings, norms and the head in bf16, which every processor computes with.
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        precision, torch.bfloat16
    )
    bits = info.bits or {"int8": 8, "int4": 4}.get(precision, 0)
    tokenizer = load_tokenizer(info.path, generation)
    raw = read_config(info.path)
    if info.architecture not in ("chatglm", "chatglm2"):
        model, report = _load_native(info, dtype, bits, progress)
    else:
        model = empty_model(info.architecture, raw, generation)
        size = int(model.config.vocab_size)
        if tokenizer.vocab_size > size:
            raise GLMError(
                f"The tokenizer has {tokenizer.vocab_size} ids, the weights only {size}.",
                "Copy the tokenizer and the weights from the same checkpoint.",
            )
        files, _ = weight_files(info.path)
        report = fill(model, files, dtype, bits, bool(raw.get("quantization_embeddings")), progress)
    if report.missing:
        raise GLMError(
            f"{info.path} lacks {len(report.missing)} weights, such as {report.missing[0]}.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    return model, tokenizer, report


def load_tokenizer(folder: Path, generation: str) -> Tokenizer:
    """The tokenizer of a folder for a prompt format: "chatglm", "chatglm2", "chatglm3", "glm4" or "template"."""
    if generation == "chatglm":
        from ..tokenizers.chatglm import ChatGLMTokenizer

        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return ChatGLMTokenizer(folder / "ice_text.model", config)
    if generation in ("chatglm2", "chatglm3"):
        from ..tokenizers.chatglm2 import ChatGLM2Tokenizer

        return ChatGLM2Tokenizer(folder / "tokenizer.model", generation)  # type: ignore[arg-type]
    if generation == "glm4":
        from ..tokenizers.glm4 import GLM4Tokenizer

        return GLM4Tokenizer(folder / "tokenizer.model")
    from ..tokenizers.template import TemplateTokenizer

    return TemplateTokenizer(folder, generation)


def empty_model(architecture: str, raw: Mapping[str, Any], generation: str) -> PreTrainedModel:
    """The model of a released config.json with its weights on torch's meta device, its tables computed."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if architecture == "chatglm":
            from ..models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

            return ChatGLMForConditionalGeneration(ChatGLMConfig.from_released(dict(raw)))
        from ..models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM

        return ChatGLM2ForCausalLM(ChatGLM2Config.from_released(dict(raw), generation))


def fill(
    model: PreTrainedModel,
    files: Sequence[Path],
    dtype: torch.dtype,
    bits: int = 0,
    quantized_embeddings: bool = False,
    progress: Progress | None = None,
) -> LoadReport:
    """Give a model on the meta device its weights, one stored tensor after another.

    dtype   of everything that is not quantized
    bits    8 or 4: linear layers become INT8/INT4, from float weights or from weights stored so
    GLMError for a tensor of another shape than the model has.
    """
    import torch

    from ..models import released
    from ..quantization import RowwiseLinear, quantize_weight, replace_linears

    if bits:
        replace_linears(model, bits, quantized_embeddings, dtype)
    modules: dict[str, Any] = dict(model.named_modules())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # ChatGLM-6B stores its head too; the released loader puts the embedding in its place, whatever the file says.
    tied = set(model.all_tied_weights_keys)
    seen: set[str] = set()
    used: list[str] = []
    unused: list[str] = []

    def put(target: str, tensor: Tensor) -> None:
        owner, leaf = target.rsplit(".", 1)
        modules[owner]._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        seen.add(target)

    total = sum(file.stat().st_size for file in files)
    done = 0
    for name, tensor in tensors(files):
        done += tensor.numel() * tensor.element_size()
        if progress is not None:
            progress(min(done, total), total)
        if name.endswith(IGNORED) or name.startswith(PREFIX_KEYS):
            continue
        parts = [
            (target, part)
            for target, part in released.to_native(name, tensor, model.config)
            if target in expected
        ]
        (used if parts else unused).append(name)
        for target, part in parts:
            if target in tied:
                continue
            owner, leaf = target.rsplit(".", 1)
            if isinstance(modules[owner], RowwiseLinear) and leaf == "weight" and part.is_floating_point():
                codes, scale = quantize_weight(part, bits)
                put(target, codes)
                put(f"{target}_scale", scale)
                continue
            if tuple(part.shape) != expected[target]:
                raise GLMError(
                    f"{name} has the shape {tuple(part.shape)}, config.json says {expected[target]}.",
                    "config.json and the weights are of different models; copy both from the same place.",
                )
            kept = leaf == "weight_scale" or not part.is_floating_point()  # scales are part of the format
            put(target, part.to(part.dtype if kept else dtype, copy=True))
    if quantized_embeddings and bits:
        embedding: Any = model.get_input_embeddings()
        model.set_output_embeddings(embedding.head())
    elif tied:
        model.tie_weights()
    missing = sorted(set(expected) - seen - tied)
    return LoadReport(tuple(sorted(used)), tuple(sorted(unused)), tuple(missing))


def _load_native(
    info: CheckpointInfo, dtype: torch.dtype, bits: int, progress: Progress | None
) -> tuple[PreTrainedModel, LoadReport]:
    """A model whose architecture transformers has, filled as the others where its file has the model's own names."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..quantization import quantize

    files, _ = weight_files(info.path)
    stored = listing(files)
    try:
        config = AutoConfig.from_pretrained(str(info.path), local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a damaged config surfaces as many types; the analyst needs one sentence
        raise GLMError(
            f"config.json in {info.path} describes no model: {type(error).__name__}: {str(error)[:300]}.",
            "Copy config.json again from its source.",
        ) from error
    tied = set(model.all_tied_weights_keys)
    if set(model.state_dict()) - tied <= set(stored):
        return model, fill(model, files, dtype, bits, progress=progress)
    described, held = sum(p.numel() for p in model.parameters()), sum(t.numel for t in stored.values())
    if described > 1.02 * held:  # also keeps from_pretrained from making up what is missing, gigabytes of it
        raise GLMError(
            f"config.json in {info.path} describes {described:,} weights, the files hold {held:,}.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(info.path), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise GLMError(
            f"The weights in {info.path} cannot be read: {type(error).__name__}: {str(error)[:300]}.",
            "Copy the checkpoint again, or convert .bin files to safetensors.",
        ) from error
    if found["mismatched_keys"]:
        raise GLMError(
            f"{info.path} has {len(found['mismatched_keys'])} weights of another shape than config.json says.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    if bits:
        quantize(model, bits)
    return model, LoadReport(
        tuple(sorted(model.state_dict())),
        tuple(sorted(found["unexpected_keys"])),
        tuple(sorted(found["missing_keys"])),
    )


def _attach(model: PreTrainedModel, info: CheckpointInfo) -> PrefixEncoder | None:
    """Put an adapter on its base; the prefix of P-tuning v2 is returned, LoRA becomes part of the model."""
    from .. import adapters

    assert info.adapter is not None
    if info.adapter.method == "lora":
        adapters.load_lora(model, info.path)
        return None
    return adapters.load_prefix(info.path, model.config)


def defaults(folder: Path) -> dict[str, Any]:
    """The checkpoint's own sampling settings: generation_config.json, else what the released chat() uses."""
    chosen: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "max_new_tokens": 512}
    if (folder / "ice_text.model").is_file():  # ChatGLM-6B
        chosen |= {"temperature": 0.95, "top_p": 0.7}
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


def _self_check(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Catch a model that loads but is wrong: rotary table as by formula, finite and non-uniform logits."""
    import torch

    from ..tokenizers.base import Message

    ids = torch.tensor([tokenizer.chat_ids([Message("user", "你好")])], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "default" and hasattr(getattr(model, "model", None), "rotary_emb"):
        head = int(model.config.head_dim) if getattr(model.config, "head_dim", None) else 0
        dims = int(head * parameters.get("partial_rotary_factor", 1.0))
        formula = 1.0 / parameters["rope_theta"] ** (
            torch.arange(0, dims, 2, dtype=torch.float32) / max(dims, 1)
        )
        table = model.model.rotary_emb.inv_freq.float().cpu()
        if dims and not torch.allclose(table, formula, rtol=1e-5):
            raise GLMError(
                f"{folder} loaded with a wrong rotary table.", "Install the versions in requirements.txt."
            )
    if not torch.isfinite(logits).all() or float(logits.std()) < 1e-6:
        raise GLMError(
            f"{folder} gives no usable numbers (its logits are not finite or all equal).",
            "Copy the checkpoint again; for fp16 weights try precision bf16 or fp32.",
        )


def release(loaded: LoadedModel) -> None:
    """Give a model's memory back at once, also where something else still points at the object."""
    import torch

    loaded.model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
