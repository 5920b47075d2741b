"""Load a checkpoint of any GLM generation, tensor by tensor, in a chosen precision, without remote code or network.

The model is built without memory for its weights; each stored tensor is then renamed, split, converted or quantized
on its way in. So the peak stays near the size of the weights at the chosen precision, whatever is on disk.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import devices
from ..errors import GLMError
from ..weights import Stored, listing, read_json, tensors, weight_files
from .inspecting import (
    DYNAMIC,
    FAMILIES,
    GLM4_VOCABULARY,
    GROUP_METHOD,
    GROUPED,
    PRECISIONS,
    PREFIX_KEYS,
    CheckpointInfo,
    Precision,
    code_bits,
    inspect,
    read_config,
)

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
OWN = ("chatglm", "chatglm2")  # architectures in the released layout; all others are transformers' own
ROWS_WITHOUT_IMAGES = 130_528  # of ChatGLM-6B's embedding; the first release has 20,000 more in front
# Layers whose keys and values the engine's cache holds; windows are as wide as the context is then allowed to be.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


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
    # Module -> device where the layers are spread; `device` is then the one of embeddings and logits.
    device_map: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what an analyst should know: an adapter without effect, a shorter context

    @property
    def weight_bytes(self) -> int:
        from ..linear import weight_bytes

        return weight_bytes(self.model)

    @property
    def devices(self) -> str:
        """Every device in use, as `load` takes them: "cpu", "cuda:0,cuda:1"."""
        return ",".join(dict.fromkeys(self.device_map.values())) or str(self.device)


def best_device() -> str:
    """ "cuda" or "mps" where torch can use one, else "cpu"."""
    return devices.best()


def best_precision(info: CheckpointInfo, device: str) -> Precision:
    """What a device computes best: bf16, fp32 for small models on a processor, fp16 on older GPUs and on a Mac.

    device   one name, or several with commas between; `devices.PRECISION_OF` has the reasons
    """
    return devices.precision_for(device.split(",")[0], info.parameters)  # type: ignore[return-value]


def load(
    path: str | Path,
    precision: str = "auto",
    device: str = "auto",
    generation: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
    num_gpus: int | None = None,
    device_map: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a checkpoint without remote code and without the network.

    path        the checkpoint folder; any name. A folder of P-tuning v2 or LoRA weights alone needs `base`
    precision   "fp32", "bf16", "fp16", "int8", "int4" or "auto"; stored INT8/INT4 weights stay as they are.
                "int4-g32", "int4-g64", "int4-g128": INT4 with a scale and a zero point for so many columns of a row,
                made from float weights
                "int8-dynamic": INT8 over activations of 8 bits, once an Engine has the model; on a processor only
    device      "cpu", "cuda", "cuda:1", "mps", several such as "cuda:0,cuda:1", or "auto": the GPU if there is one,
                all GPUs if one has too little memory
    generation  the prompt format where the folder cannot tell which was trained: "chatglm2" or "chatglm3", or for
                chat models of other makers "template", "alpaca" or "vicuna"
    base        the checkpoint an adapter was trained on
    progress    called with the bytes read so far and the bytes of all files
    num_gpus    spread the layers over the first so many GPUs
    device_map  module -> device, instead of the even spread
    Raises GLMError naming what is wrong: a missing shard, an LFS pointer, a foreign model, too little memory.
    """
    started = time.perf_counter()
    info = inspect(Path(path).expanduser())
    folder = info.path
    _refuse_problems(info)
    on = info
    if info.needs_base:
        on = base_of(info, base)
    names = (
        devices.named(device, num_gpus) if device_map is None else tuple(dict.fromkeys(device_map.values()))
    )
    devices.require(names)
    if precision == "auto":
        precision = best_precision(on, names[0])
    if precision not in PRECISIONS:
        raise GLMError(f"Precision {precision!r} is unknown.", f"Choose one of {', '.join(PRECISIONS)}.")
    if precision in GROUPED and on.bits and on.group != GROUPED[precision]:
        raise GLMError(
            f"{on.name} is stored as {on.codes}; {precision} is made from float weights.",
            "Choose its edition with float weights, or another precision.",
        )
    if precision == DYNAMIC:
        _require_dynamic(names)
        if on.group:
            raise GLMError(
                f"{on.name} is stored as {on.codes}, which cannot be computed with 8-bit activations.",
                "Choose another precision.",
            )
    elif on.bits and precision.startswith("int"):
        # The stored codes stay; this is what is computed with.
        precision = devices.PRECISION_OF[devices.kind(names[0])][0]
    if device == "auto" and num_gpus is None and device_map is None:
        names = _enough(names, devices.needed(on.memory_bytes(precision)))
    _check_memory(on, precision, names)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
    import torch

    chosen = generation or on.generation
    if chosen != on.generation and not any({chosen, on.generation} <= group for group in ALIKE):
        raise GLMError(
            f"The prompt format {chosen!r} does not fit {on.family}.",
            "Leave the prompt format to the folder.",
        )
    prefix: PrefixEncoder | None = None
    notes: tuple[str, ...] = ()
    try:
        model, tokenizer, report, placed = _base_model(on, chosen, precision, names, device_map, progress)
        if info.adapter is not None:
            prefix, notes = _attach(model, info)
        notes += _other_groups(model, on, precision)
        main = devices.check_map(model, placed)
        if len(placed) > 1 or device_map is not None:
            model = devices.spread(model, placed, main).eval().requires_grad_(False)
        else:
            model, placed = model.to(main).eval().requires_grad_(False), {}
    except (RuntimeError, AssertionError) as error:
        if set(names) == {"cpu"}:
            raise
        raise GLMError(
            f"The model does not go onto {','.join(names)}: {str(error).splitlines()[0]}",
            "Choose the device cpu.",
        ) from error
    if prefix is not None:
        prefix = prefix.to(main).eval().requires_grad_(False)
    _self_check(model, tokenizer, folder)
    sized = info if info is on else _with_sizes(info, on)
    if on.architecture not in OWN:
        _check_rows(model, tokenizer, on)
        sized, shorter = _usable_context(sized, model.config)
        notes += (*shorter, *_hardly_quantized(model, on))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        info=sized,
        precision=precision,
        device=torch.device(main),
        load_seconds=time.perf_counter() - started,
        defaults=defaults(on.path),
        report=report,
        prefix=prefix,
        base=None if info is on else on,
        device_map=placed,
        notes=notes,
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
    if found.method == "p-tuning-v2":
        raise GLMError(f"{found.name} carries a prefix of its own.", "Choose the base without it.")
    info.adapter.check_base(read_config(found.path), found.name)
    return found


def _with_sizes(info: CheckpointInfo, base: CheckpointInfo) -> CheckpointInfo:
    """The adapter's own description with the sizes of what it runs on."""
    return replace(
        info, family=base.family, generation=base.generation, parameters=base.parameters, layers=base.layers,
        hidden_size=base.hidden_size, context=base.context, architecture=base.architecture, bits=base.bits,
        group=base.group, linear_parameters=base.linear_parameters, dtype=base.dtype,
    )  # fmt: skip


def _require_dynamic(names: Sequence[str]) -> None:
    from ..linear import dynamic_works

    if set(names) != {"cpu"} or not dynamic_works():
        where = "this processor" if set(names) == {"cpu"} else ",".join(names)
        raise GLMError(f"INT8 with 8-bit activations does not run on {where}.", "Choose the precision int8.")


def _base_model(
    info: CheckpointInfo,
    generation: str,
    precision: str,
    names: Sequence[str],
    device_map: Mapping[str, str] | None,
    progress: Progress | None,
) -> tuple[PreTrainedModel, Tokenizer, LoadReport, dict[str, str]]:
    """The model with its weights on their devices, and module -> device."""
    import torch

    from ..tokenizers.base import Message

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        precision, devices.beside_codes(names[0])
    )
    bits, group = (info.bits, info.group) if info.bits else code_bits(precision)
    tokenizer = load_tokenizer(info.path, generation)
    raw = read_config(info.path)
    files, _ = weight_files(info.path)
    own = info.architecture in OWN
    stored = {} if own else listing(files)
    model = empty_model(info.architecture, raw, generation) if own else _native_model(info, stored, dtype)
    size = int(model.config.vocab_size)
    highest = tokenizer.vocab_size
    if tokenizer.generation not in FAMILIES:  # other makers name ids beyond the weights that no prompt uses
        highest = max(tokenizer.n_pieces, 1 + max(tokenizer.chat_ids([Message("user", "?")])))
    if highest > size:
        raise GLMError(
            f"The tokenizer has {highest} ids, the weights only {size}.",
            "Copy the tokenizer and the weights from the same checkpoint.",
        )
    placed = _place(model, info, precision, _sizes(model, dtype, bits, group), names, device_map)
    if own or _named_alike(model, stored):
        embeddings = own and bool(raw.get("quantization_embeddings"))
        report = fill(model, files, dtype, bits, embeddings, progress, placed, group)
    else:
        model, report = _converted(info, dtype, bits, group)
        if progress is not None:
            progress(info.size_bytes, info.size_bytes)
    if report.missing:
        raise GLMError(
            f"{info.path} lacks {len(report.missing)} weights, such as {report.missing[0]}.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    return model, tokenizer, report, placed


def _place(
    model: PreTrainedModel,
    info: CheckpointInfo,
    precision: str,
    sizes: Mapping[str, int],
    names: Sequence[str],
    device_map: Mapping[str, str] | None,
) -> dict[str, str]:
    """Module -> device for a model on the meta device; GLMError where one device has too little room for its share."""
    if device_map is not None:
        devices.check_map(model, device_map)
        placed = devices.whole(model, device_map)
        look = devices.device_of(placed)
        for name in dict.fromkeys(placed.values()):
            share = sum(size for parameter, size in sizes.items() if look(parameter) == name)
            _check_room(info, share, [name], precision)
        return placed
    if len(names) == 1:
        _check_room(info, sum(sizes.values()), names, precision)
        return {"": names[0]}
    found = devices.split(model, sizes, names, [devices.free_bytes(name) for name in names])
    if found is None:
        _check_room(info, sum(sizes.values()), names, precision)
        raise GLMError(
            f"The layers of {info.name} cannot be spread over {','.join(names)}: one of them has too little memory.",
            "Close other programs, choose a lower precision, or name other devices.",
        )
    return found


def _sizes(model: PreTrainedModel, dtype: torch.dtype, bits: int, group: int = 0) -> dict[str, int]:
    """Bytes of every parameter by name, at the precision it is going to have; those of a group's scales included."""
    from ..groupwise import code_bytes
    from ..quantization import linears

    codes = {f"{path}.weight" for path in linears(model)} if bits else set()

    def size(name: str, tensor: Tensor) -> int:
        if name not in codes:
            return tensor.numel() * dtype.itemsize
        rows, columns = tensor.shape
        return code_bytes(rows, columns, group) if group else rows * columns * bits // 8

    return {name: size(name, tensor) for name, tensor in model.named_parameters()}


def load_tokenizer(folder: Path, generation: str) -> Tokenizer:
    """The tokenizer of a folder for a prompt format: "chatglm", "chatglm2", "chatglm3", "glm4" or "template"."""
    if generation == "chatglm":
        from ..tokenizers.chatglm import ChatGLMTokenizer

        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        if "num_image_tokens" not in config:
            # Absent in the first release, which has 20,000 of them, and for a week of April 2023, without any.
            rows = int(read_config(folder)["vocab_size"])
            config["num_image_tokens"] = max(0, rows - ROWS_WITHOUT_IMAGES)
        return ChatGLMTokenizer(folder / "ice_text.model", config)
    if generation in ("chatglm2", "chatglm3"):
        from ..tokenizers.chatglm2 import ChatGLM2Tokenizer

        return ChatGLM2Tokenizer(folder / "tokenizer.model", generation)  # type: ignore[arg-type]
    if generation == "glm4":
        from ..tokenizers.glm4 import GLM4Tokenizer

        return GLM4Tokenizer(folder / "tokenizer.model")
    if (
        generation == "template"
        and (folder / "tokenizer.model").is_file()
        and not (folder / "tokenizer.json").is_file()
    ):
        config = read_config(folder)
        if config.get("model_type") in (
            "glm",
            "glm4",
        ):  # rewritten for transformers, with the released tokenizer
            old = int(config.get("vocab_size", 0)) <= GLM4_VOCABULARY
            return load_tokenizer(folder, "chatglm3" if old else "glm4")
    from ..tokenizers.template import TemplateTokenizer

    return TemplateTokenizer(folder, generation)


# Both libraries change torch for the whole process while they build a model.
_building = threading.RLock()


def empty_model(architecture: str, raw: Mapping[str, Any], generation: str) -> PreTrainedModel:
    """The model of a released config.json with its weights on torch's meta device, its tables computed."""
    from accelerate import init_empty_weights

    with _building, init_empty_weights(include_buffers=False):
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
    device_map: Mapping[str, str] | None = None,
    group: int = 0,
) -> LoadReport:
    """Give a model on the meta device its weights, one stored tensor after another.

    dtype       of everything that is not quantized
    bits        8 or 4: linear layers become INT8/INT4, from float weights or from weights stored so
    device_map  module -> device, "" for all; the CPU where there is none
    group       of INT4: columns that share a scale and a zero point; 0 for a scale per row
    GLMError for a tensor of another shape than the model has.
    """
    import torch

    from .. import groupwise
    from ..models import released
    from ..quantization import RowwiseLinear, replace_linears

    if group:
        groupwise.replace_linears(model, group)
    elif bits:
        replace_linears(model, bits, quantized_embeddings, dtype)
    modules: dict[str, Any] = dict(model.named_modules())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # ChatGLM-6B stores its head too; the released loader puts the embedding in its place, whatever the file says.
    tied = set(model.all_tied_weights_keys)
    seen: set[str] = set()
    used: list[str] = []
    unused: list[str] = []
    device_of = devices.device_of(device_map or {"": "cpu"})
    wide = _kept_wide(model, dtype)

    def put(target: str, tensor: Tensor) -> None:
        owner, leaf = target.rsplit(".", 1)
        if leaf in modules[owner]._buffers:
            modules[owner]._buffers[leaf] = tensor
        else:
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
        # A name of the model's own is never a released one, though other makers use some of their words.
        same = name in expected
        parts = [
            (target, part)
            for target, part in ([(name, tensor)] if same else released.to_native(name, tensor, model.config))
            if target in expected
        ]
        (used if parts else unused).append(name)
        for target, part in parts:
            if target in tied:
                continue
            owner, leaf = target.rsplit(".", 1)
            device = device_of(target)
            if isinstance(modules[owner], RowwiseLinear) and leaf == "weight" and part.is_floating_point():
                for made, codes in modules[owner].coded(part.to(device), dtype).items():
                    put(f"{owner}.{made}", codes)
                continue
            if tuple(part.shape) != expected[target]:
                raise GLMError(
                    f"{name} has the shape {tuple(part.shape)}, config.json says {expected[target]}.",
                    "config.json and the weights are of different models; copy both from the same place.",
                )
            # Scales and zero points are part of the format.
            kept = leaf in groupwise.SCALES or not part.is_floating_point()
            chosen = part.dtype if kept else torch.float32 if wide(target) else dtype
            put(target, part.to(device, chosen, copy=True))
    if quantized_embeddings and bits and not group:
        embedding: Any = model.get_input_embeddings()
        model.set_output_embeddings(embedding.head())
    elif tied:
        model.tie_weights()
    missing = sorted(set(expected) - seen - tied)
    return LoadReport(tuple(sorted(used)), tuple(sorted(unused)), tuple(missing))


def _kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a weight stays fp32 where the rest is fp16 or bf16, as the model's class says of some."""
    import re

    import torch

    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if not names:
        return lambda name: False
    found = re.compile(rf"(^|\.)({'|'.join(name.replace('*', '[^.]*') for name in sorted(names))})(\.|$)")
    return lambda name: found.search(name) is not None


def _native_model(info: CheckpointInfo, stored: Mapping[str, Stored], dtype: torch.dtype) -> PreTrainedModel:
    """The model of an architecture that transformers has, on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    method = (read_config(info.path).get("quantization_config") or {}).get("quant_method")
    if method and method != GROUP_METHOD:
        raise GLMError(
            f"{info.name} is stored quantized by {method}, which is not read here.",
            "Choose its edition with float weights; INT8 and INT4 are made from it while it is loaded.",
        )
    try:
        config = AutoConfig.from_pretrained(str(info.path), local_files_only=True)
        if method:
            del config.quantization_config
        with _building, init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if _untied(model, stored):
                config.tie_word_embeddings = False
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a damaged config surfaces as many types; the analyst needs one sentence
        raise GLMError(
            f"config.json in {info.path} describes no model: {type(error).__name__}: {str(error)[:300]}.",
            "Copy config.json again from its source.",
        ) from error
    described, held = sum(p.numel() for p in model.parameters()), sum(t.numel for t in stored.values())
    if described > 1.02 * held and not info.bits and not _named_alike(model, stored):
        # Before memory is asked for, and before from_pretrained makes up what is missing, gigabytes of it.
        raise GLMError(
            f"config.json in {info.path} describes {described:,} weights, the files hold {held:,}.",
            "config.json and the weights are of different models; copy both from the same place.",
        )
    kinds = {str(one) for one in getattr(config, "layer_types", None) or ()} - set(ATTENTION)
    if kinds or not getattr(config, "num_attention_heads", None):
        raise GLMError(
            f"{info.family} has layers other than attention ({', '.join(sorted(kinds)) or info.architecture}), "
            "which the engine cannot run.",
            "Choose a model with attention in every layer.",
        )
    return model  # type: ignore[no-any-return]


def _named_alike(model: PreTrainedModel, stored: Mapping[str, Stored]) -> bool:
    """Whether the files have every weight of the model under the model's own name for it."""
    return set(model.state_dict()) - set(model.all_tied_weights_keys) <= set(stored)


def _untied(model: PreTrainedModel, stored: Mapping[str, Stored]) -> bool:
    """Whether the files hold two different matrices that the config calls one: then both count, as in transformers."""
    import torch

    for target, source in model.all_tied_weights_keys.items():
        if target in stored and source in stored:
            files = sorted({stored[target].file, stored[source].file})
            both = dict(tensors(files, {target, source}.__contains__))
            if not torch.equal(both[target], both[source]):
                return True
    return False


def _converted(
    info: CheckpointInfo,
    dtype: torch.dtype,
    bits: int,
    group: int = 0,
) -> tuple[PreTrainedModel, LoadReport]:
    """The model where its files have other names than its class has now, experts one by one for example."""
    import torch
    from transformers import AutoModelForCausalLM

    from .. import groupwise
    from ..quantization import quantize

    # Codes are made from the numbers as stored; rounded to bf16 before, one in a hundred would come out otherwise.
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(info.dtype, dtype)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(info.path), dtype=stored if bits else dtype, local_files_only=True, output_loading_info=True
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
        groupwise.quantize(model, group) if group else quantize(model, bits)
        wide = _kept_wide(model, dtype)
        for name, tensor in model.named_parameters():  # not .to(), which would round the rotary table as well
            if tensor.is_floating_point() and not name.endswith(groupwise.SCALES):
                tensor.data = tensor.data.to(torch.float32 if wide(name) else dtype)
    return model, LoadReport(
        tuple(sorted(model.state_dict())),
        tuple(sorted(found["unexpected_keys"])),
        tuple(sorted(found["missing_keys"])),
    )


def _attach(model: PreTrainedModel, info: CheckpointInfo) -> tuple[PrefixEncoder | None, tuple[str, ...]]:
    """Put an adapter on its base; the prefix of P-tuning v2 is returned, LoRA becomes part of the model."""
    from .. import adapters

    assert info.adapter is not None
    if info.adapter.method == "lora":
        return None, adapters.load_lora(model, info.path).warnings
    return adapters.load_prefix(info.path, model.config), ()


def defaults(folder: Path) -> dict[str, Any]:
    """The checkpoint's own sampling settings: generation_config.json, else what the released chat() uses."""
    chosen: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "max_new_tokens": 512}
    if (folder / "ice_text.model").is_file():  # ChatGLM-6B
        chosen |= {"temperature": 0.95, "top_p": 0.7}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            stored = read_json(path)
        except (GLMError, RecursionError):  # a damaged file says nothing
            return chosen
        for key in chosen:
            if isinstance(stored.get(key), int | float) and not isinstance(stored[key], bool):
                chosen[key] = stored[key]
        if stored.get("do_sample") is False:
            chosen["temperature"] = 0.0
    return chosen


def _enough(names: tuple[str, ...], need: int) -> tuple[str, ...]:
    """All GPUs instead of one, where one has too little memory and all together have enough."""
    if names != ("cuda",) or need <= devices.free_bytes("cuda"):
        return names
    every = tuple(name for name in devices.available() if name.startswith("cuda"))
    return every if need <= sum(map(devices.free_bytes, every)) else names


def _check_memory(info: CheckpointInfo, precision: str, names: Sequence[str]) -> None:
    _check_room(info, info.memory_bytes(precision), names, precision)


def _check_room(info: CheckpointInfo, weights: int, names: Sequence[str], precision: str) -> None:
    """GLMError with both numbers where the devices together cannot hold so many bytes of weights."""
    need, free = devices.needed(weights), sum(map(devices.free_bytes, dict.fromkeys(names)))
    if need > free:
        where = ",".join(dict.fromkeys(names))
        raise GLMError(
            f"{info.name} needs about {need / 2**30:.1f} GiB in {precision}; {free / 2**30:.1f} GiB are free on {where}.",
            "Close other programs, choose a lower precision, or use a smaller checkpoint.",
        )


def _self_check(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Catch a model that loads but is wrong: rotary table as by formula, finite and non-uniform logits."""
    import torch

    from ..tokenizers.base import Message

    # Where the first block is kept elsewhere than it is computed, the model brings its inputs there itself.
    device = "cpu" if model.device.type == "meta" else model.device
    ids = torch.tensor([tokenizer.chat_ids([Message("user", "你好")])], device=device)
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


class _Rows:
    """Keys and values as the engine keeps them: what a model of transformers asks of its cache, and no more."""

    def __init__(self, layers: int) -> None:
        self.kept: list[Any] = [None] * layers
        self.length = 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        import torch

        old = self.kept[layer]
        new = (
            (keys, values) if old is None else (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
        )
        self.kept[layer] = new
        return new

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


def _check_rows(model: Any, tokenizer: Tokenizer, info: CheckpointInfo) -> None:
    """GLMError for a model that computes something else when rows are padded and continued from a cache.

    So do models whose positions are not those they are given: a bias by distance, positions counted from a mask,
    states that are no keys and values.
    """
    import torch

    from ..tokenizers.base import Message

    row = tokenizer.chat_ids([Message("user", "你好，今天天气怎么样？ Name three fruits, please.")])[-24:]
    rows = [row, row[: max(4, len(row) // 2)]]
    width = len(row)
    device = "cpu" if model.device.type == "meta" else model.device
    ids = torch.zeros(2, width, dtype=torch.long, device=device)
    real = torch.zeros(2, width, dtype=torch.bool, device=device)
    for number, one in enumerate(rows):
        ids[number, width - len(one) :] = torch.tensor(one, device=device)
        real[number, width - len(one) :] = True
    positions = (real.cumsum(1) - 1).clamp_min(0)
    columns = torch.arange(width, device=device)
    mask = (real[:, None, :] & (columns <= columns[:, None])) | (columns == columns[:, None])
    wrong = ""
    try:
        with torch.inference_mode():
            cache = _Rows(int(model.config.num_hidden_layers))
            found = []
            for begin, end in ((0, width - 2), (width - 2, width - 1), (width - 1, width)):
                found.append(
                    model(
                        input_ids=ids[:, begin:end],
                        attention_mask=mask[:, None, begin:end, :end],
                        position_ids=positions[:, begin:end],
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    ).logits[:, -1]
                )
                cache.length = end
            plain = [
                model(input_ids=torch.tensor([one], device=device), use_cache=False).logits[0, -3:]
                for one in rows
            ]
        away = torch.stack(found, 1).float() - torch.stack(plain).float()
        spread = torch.stack(plain).float().std(-1)
        # Rounding in bf16 differs by some 2 % of the spread; a wrong position or mask by about all of it.
        shares = away.abs().mean(-1) / spread
        if float(shares.median(1).values.max()) > 0.2:
            wrong = f"its logits differ by {float(shares.max()):.0%} of their spread"
    except Exception as error:  # a cache that lacks what the model asks for surfaces as many types
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    if wrong:
        raise GLMError(
            f"{info.name} ({info.architecture}) does not compute padded rows as it computes them alone: {wrong}.",
            "Choose a model of another architecture, with rotary positions for example.",
        )


def _hardly_quantized(model: Any, info: CheckpointInfo) -> tuple[str, ...]:
    """A note where INT8/INT4 reaches less than half of the weights: experts kept as one tensor are no linear layers."""
    from ..quantization import RowwiseLinear

    layers = [module for module in model.modules() if isinstance(module, RowwiseLinear)]
    if not layers:
        return ()
    coded = sum(layer.in_features * layer.out_features for layer in layers)
    kept = sum(tensor.numel() for tensor in model.parameters() if tensor.is_floating_point())
    if 2 * coded >= kept:
        return ()
    return (
        f"INT{layers[0].bits} holds {coded / (coded + kept):.0%} of the weights of {info.name}; "
        "the rest is no linear layer or the embedding, and takes two bytes each.",
    )


def _other_groups(model: Any, info: CheckpointInfo, precision: str) -> tuple[str, ...]:
    """A note where columns that a group does not divide have a smaller one, or a scale per row."""
    from ..groupwise import fallbacks

    group = info.group or GROUPED.get(precision, 0)  # type: ignore[call-overload]
    if not group:
        return ()
    smaller, rows, every = fallbacks(model, group)
    if not smaller and not rows:
        return ()
    return (
        f"Groups of {group} columns do not divide every row of {info.name}: of its {every} layers {smaller} have smaller "
        f"groups and {rows} a scale per row.",
    )


def _usable_context(info: CheckpointInfo, config: Any) -> tuple[CheckpointInfo, tuple[str, ...]]:
    """The longest context the engine computes rightly, and why it is shorter than the model's own."""
    context = info.context or int(getattr(config, "max_position_embeddings", 0) or 0)
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    window = 0
    if "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True)):
        window = int(getattr(config, "sliding_window", 0) or 0)
    if "chunked_attention" in kinds:
        window = int(getattr(config, "attention_chunk_size", 0) or 0)
    if not window or context <= window:
        return replace(info, context=context), ()
    note = (
        f"{info.name} takes {window:,} tokens here instead of {context:,}: "
        "beyond that some of its layers see a window of the text only."
    )
    return replace(info, context=window), (note,)


def release(loaded: LoadedModel) -> None:
    """Give a model's memory back at once, also where something else still points at the object."""
    import torch

    model: Any = devices.gather(loaded.model) if loaded.device_map else loaded.model
    torch.nn.Module.to(model, "meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
