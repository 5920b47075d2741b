"""Adapters over a frozen base: P-tuning v2 prefixes in the released format, and LoRA in PEFT's.

P-tuning v2 (Liu et al. 2021, arXiv:2110.07602) trains the keys and values of P columns that stand before the
text in every layer's cache. LoRA (Hu et al. 2021, arXiv:2106.09685) adds scale * B @ A to a linear layer. A prefix
is run by this module, because PEFT shifts the positions of the text by P, which the released models do not; a LoRA
is run by PEFT, after the names of the released ChatGLM2/3 layout have been translated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import weights
from .errors import GLMError
from .models import released
from .quantization import RowwiseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "transformer.prefix_encoder."
PREFIX_DROPOUT = 0.1
LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Short questions in both languages; an adapter that changes the answer to none of them probably does nothing.
PROBES: tuple[str, ...] = (
    "你好",
    "请用一句话介绍你自己。",
    "这家餐厅的菜很好吃，但是上菜太慢。这条评论是好评还是差评？",
    "把这句话翻译成英文：今天天气很好。",
    "Who are you?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "Is 7 larger than 5? Answer yes or no.",
)


# ------------------------------------------------------------------------------------------------ P-tuning v2


@dataclass(frozen=True)
class BaseShape:
    """What of a base model a prefix has to fit."""

    family: Literal["chatglm", "chatglm2"]  # "chatglm2" stands for ChatGLM2 and ChatGLM3
    layers: int
    hidden: int
    heads: int  # heads that keys and values have: all of them in ChatGLM-6B, the groups in ChatGLM2/3
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> BaseShape:
        """The shape of a loaded model's config."""
        return cls(
            "chatglm" if hasattr(config, "position_encoding_2d") else "chatglm2",
            config.num_hidden_layers,
            config.hidden_size,
            config.num_key_value_heads,
            config.head_dim,
        )

    @classmethod
    def of_file(cls, config: Mapping[str, Any]) -> BaseShape:
        """The shape that a config.json gives, in the released names or in those of transformers."""

        def size(*keys: str) -> int:
            return next((int(config[key]) for key in keys if config.get(key)), 0)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        first = "inner_hidden_size" in config
        return cls(
            "chatglm" if first else "chatglm2",
            size("num_layers", "num_hidden_layers"),
            hidden,
            heads if first else size("multi_query_group_num", "num_key_value_heads") or heads,
            size("kv_channels", "head_dim") or hidden // max(heads, 1),
        )

    @property
    def width(self) -> int:
        """Numbers in one prefix column: a key and a value for every head of every layer."""
        return self.layers * 2 * self.heads * self.head_dim

    def __str__(self) -> str:
        family = "ChatGLM-6B" if self.family == "chatglm" else "ChatGLM2/3"
        return (
            f"a {family} of {self.layers} layers, width {self.hidden} and {self.heads} key/value heads of "
            f"{self.head_dim}"
        )


class PrefixEncoder(nn.Module):
    """The trained part of P-tuning v2: P columns of keys and values for every layer of a base.

    Parameters, with KV = layers * 2 * heads * head_dim, named as released (below `transformer.prefix_encoder.`):

        without projection     embedding.weight [P, KV]
        with, ChatGLM-6B       embedding.weight [P, hidden], trans.0 hidden -> hidden, tanh, trans.2 hidden -> KV
        with, ChatGLM2/3       embedding.weight [P, KV], trans.0 KV -> hidden, tanh, trans.2 hidden -> KV

    They stay in fp32 whatever the base is cast to, as in the released training scripts: a step of the optimiser is
    smaller than what half precision resolves. Source: `PrefixEncoder` of modeling_chatglm.py, THUDM/chatglm-6b and
    THUDM/chatglm2-6b.
    """

    def __init__(self, shape: BaseShape, length: int, projection: bool = False) -> None:
        """A fresh encoder of `length` columns; GLMError for a length below 1."""
        super().__init__()
        if length < 1:
            raise GLMError(f"A prefix of {length} columns holds nothing.", "Choose a length of at least 1.")
        self.shape = shape
        self.length = length
        self.projection = projection
        entry = shape.hidden if projection and shape.family == "chatglm" else shape.width
        self.embedding = nn.Embedding(length, entry, dtype=torch.float32)
        self.trans = (
            nn.Sequential(
                nn.Linear(entry, shape.hidden, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(shape.hidden, shape.width, dtype=torch.float32),
            )
            if projection
            else None
        )
        self.dropout = nn.Dropout(PREFIX_DROPOUT)

    def _apply(self, fn: Any, recurse: bool = True) -> PrefixEncoder:
        # .half() and .to(dtype) of a model around this one come through here: follow the device, keep the numbers.
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self) -> Tensor:
        """All columns, fp32 (1, P, KV), before dropout."""
        columns = self.embedding.weight[None]
        return columns if self.trans is None else self.trans(columns)

    def keys_values(self, batch: int = 1, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, each (batch, heads, P, head_dim): the first columns of a cache.

        The keys carry no rotary and the text after them is counted from position 0, as without a prefix. In
        training every row loses its own 10 % of the numbers; in evaluation the rows share memory.
        dtype   of the base's activations; fp32 when not given
        """
        shape = self.shape
        columns = self().to(dtype or torch.float32)
        columns = columns.view(1, self.length, 2 * shape.layers, shape.heads, shape.head_dim)
        columns = self.dropout(columns.expand(batch, -1, -1, -1, -1))
        each = columns.permute(2, 0, 3, 1, 4)
        return [(each[2 * layer], each[2 * layer + 1]) for layer in range(shape.layers)]

    def released_state(self) -> dict[str, Tensor]:
        """The tensors under the names a released prefix checkpoint has, on the CPU, in fp32."""
        return {
            PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], config: Any, recorded: Mapping[str, Any] | None = None
    ) -> PrefixEncoder:
        """The encoder in a saved state: prefix tensors alone, or a whole checkpoint that has them among others.

        state      tensors by name, with or without `transformer.prefix_encoder.`; length and projection come from
                   their shapes, and other dtypes are read into fp32
        config     of the base it is for
        recorded   config.json saved with the tensors, if there is one; what it says must agree with both
        Raises GLMError when there is no prefix in the state, or it was trained on a base of another shape.
        """
        shape = BaseShape.of(config)
        tensors = _prefix_tensors(state)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        _check_prefix(shapes, shape, recorded or {}, "this base")
        with torch.device(
            "meta"
        ):  # with projection it has 940 million numbers for a 6B base: none to throw away
            encoder = cls(shape, *_prefix_kind(shapes))
        encoder.load_state_dict(
            {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True
        )
        return encoder.eval()


Shapes = Mapping[str, tuple[int, ...]]


def _prefix_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    bare = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    return named or {name: state[name] for name in bare if name in state}


def _prefix_kind(shapes: Shapes) -> tuple[int, bool]:
    """Length and projection of a prefix, by the shapes of its tensors."""
    return shapes["embedding.weight"][0], "trans.2.weight" in shapes


def _check_prefix(found: Shapes, shape: BaseShape, recorded: Mapping[str, Any], name: str) -> None:
    """GLMError unless tensors of these shapes are a prefix for a base of this shape, which is called `name`."""
    if len(found.get("embedding.weight", ())) != 2:
        raise GLMError(
            "There is no prefix among these tensors.",
            f"A P-tuning v2 checkpoint has {PREFIX}embedding.weight.",
        )
    length, projection = _prefix_kind(found)
    for key, own in (("pre_seq_len", length), ("prefix_projection", projection)):
        if recorded.get(key, own) != own:
            raise GLMError(
                f"config.json says {key}={recorded[key]}, the prefix tensors are for {key}={own}.",
                "Copy config.json and the weights from the same training run.",
            )
    if "hidden_size" in recorded and (theirs := BaseShape.of_file(recorded)) != shape:
        raise GLMError(
            f"The prefix was trained on {theirs}; {name} is {shape}.", "Load the base it was trained on."
        )
    with torch.device("meta"):
        fresh = PrefixEncoder(shape, length, projection).state_dict()
    needed = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    if needed != found:
        key = next(key for key in sorted({*needed, *found}) if needed.get(key) != found.get(key))
        width = found["trans.2.weight"][0] if projection else found["embedding.weight"][1]
        raise GLMError(
            f"{PREFIX}{key} is {_size(found.get(key))}; {name}, {shape}, needs {_size(needed.get(key))}. "
            f"One column of this prefix holds {width:,} numbers, one of the base {shape.width:,}.",
            "Load the base the prefix was trained on.",
        )


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def load_prefix(folder: str | Path, config: Any) -> PrefixEncoder:
    """The prefix saved in a folder, for a base of this config.

    Reads pytorch_model.bin or model.safetensors, one file or shards, with the prefix alone or beside a whole
    checkpoint, of which it then reads nothing else. Raises GLMError as `PrefixEncoder.from_state`, and for files
    that are missing or damaged.
    """
    folder = Path(folder)
    files = _prefix_files(folder)[0]
    state = dict(weights.tensors(files, lambda name: name.startswith(PREFIX)))
    return PrefixEncoder.from_state(state, config, _read_config(folder))


def save_prefix(encoder: PrefixEncoder, folder: str | Path, base_config: Mapping[str, Any]) -> None:
    """Write pytorch_model.bin with the prefix alone, and config.json: the base's, with the prefix recorded in it.

    base_config   config.json of the base in the released layout
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.released_state(), folder / "pytorch_model.bin")
    config = {**base_config, "pre_seq_len": encoder.length, "prefix_projection": encoder.projection}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _prefix_files(folder: Path) -> tuple[list[Path], bool]:
    """The files that hold a prefix, and whether an index lists other weights beside it."""
    for name in weights.WEIGHTS:
        if (folder / name).is_file():
            return [folder / name], False
    for name in weights.INDEXES:
        if (folder / name).is_file():
            listed = weights.read_json(folder / name).get("weight_map", {})
            shards = {shard for key, shard in listed.items() if key.startswith(PREFIX)}
            beside = any(not key.startswith(PREFIX) for key in listed)
            return [folder / Path(shard).name for shard in sorted(shards)], beside
    return [], False


class _FixedPrefix:
    """A cache that always holds the prefix and forgets the text.

    That makes a layer safe to recompute: a growing cache would take the same columns twice. It has just what the
    models and transformers' mask functions ask of a cache.
    """

    is_compileable = False

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs
        self.length = pairs[0][0].shape[2]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before = self.pairs[layer]
        return torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, queries: int, layer: int = 0) -> tuple[int, int]:
        return self.length + queries, 0


@contextmanager
def _cache_under_checkpointing(model: nn.Module) -> Iterator[None]:
    """Let the layers keep their cache while gradient checkpointing is on; they drop it by default.

    Only for a cache that a second run of the layer leaves as it was.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_can_checkpoint_with_cache")]
    before = [layer._can_checkpoint_with_cache for layer in layers]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._can_checkpoint_with_cache = value


class PrefixModel(nn.Module):
    """A frozen base with a prefix before every row, for training the prefix and for whole sequences.

    The gradient reaches the encoder only. Gradient checkpointing of the base works, non-reentrant as transformers
    sets it up by default. To decode step by step, put `encoder.keys_values()` into a cache instead and go on with
    the base alone.
    """

    def __init__(self, base: PreTrainedModel, encoder: PrefixEncoder) -> None:
        super().__init__()
        self.base: PreTrainedModel = base.requires_grad_(False)
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        glm_position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The base's output, logits (batch, n, vocabulary) and the loss where labels are given.

        input_ids          (batch, n)
        attention_mask     of the text alone: (batch, n), 1 = real token; for ChatGLM-6B also boolean
                           (batch, 1, n, n), True = visible. The prefix is always visible.
        labels             (batch, n), -100 = not scored; shifted by one inside, mean cross entropy
        position_ids       (batch, n), ChatGLM2/3; real tokens are counted from 0 when absent
        glm_position_ids   (batch, 2, n), ChatGLM-6B; from the ids when absent
        options            further arguments of the base, such as logits_to_keep
        """
        batch, n = input_ids.shape
        shape, length = self.encoder.shape, self.encoder.length
        pairs = self.encoder.keys_values(batch, self.base.dtype)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, n)
        ahead = attention_mask.new_ones((*attention_mask.shape[:-1], length))
        mask = torch.cat((ahead, attention_mask), dim=-1)
        if shape.family == "chatglm":
            options |= {"glm_position_ids": glm_position_ids, "prefix_length": length}
        elif position_ids is not None:
            options["position_ids"] = position_ids
        else:
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with _cache_under_checkpointing(self.base):
            return self.base(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=_FixedPrefix(pairs),
                labels=labels,
                use_cache=False,
                **options,
            )


# ------------------------------------------------------------------------------------------------ LoRA


@dataclass(frozen=True)
class LoraReport:
    """What `load_lora` or `add_lora` put into a model."""

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]  # the adapted layers: names that stand for every layer, or full paths
    modules: int
    parameters: int
    base: str  # the base as the adapter recorded it
    converted: bool  # from the names of the released ChatGLM2/3 layout
    zero: bool  # every B is zero: the adapter changes nothing
    warnings: tuple[str, ...]


# Layers of the released ChatGLM2/3 layout and the model's own; the rows of a fused B belong to the parts in order.
RELEASED_LINEARS: dict[str, tuple[str, ...]] = {
    released.FUSED.rstrip("."): tuple(f"self_attn.{letter}_proj" for letter in "qkv"),
    **{old.rstrip("."): (new.rstrip("."),) for old, new in released.INNER},
}
_RELEASED_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")
_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
# Layers whose input is as wide as the hidden states.
_READS_HIDDEN = re.compile(
    r"(query_key_value|[qkv]_proj|dense_h_to_4h|gate_up_proj|gate_proj|up_proj|output_layer|lm_head)$"
)
# Settings of a PEFT config under which W + scale * B @ A is not the whole adapter, and the values that are harmless.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "enable_lora": (None,),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "kasa_config": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def load_lora(
    model: PreTrainedModel, folder: str | Path, name: str = "default", trainable: bool = False
) -> LoraReport:
    """Put a LoRA from a PEFT folder into a model, in place and active; a further one replaces it as the active one.

    folder      with adapter_config.json of any PEFT since 0.2 and adapter_model.safetensors or .bin. For ChatGLM2/3
                adapters of the released layout are translated: A of a fused query_key_value is shared by the three
                projections, the rows of B are split among them.
    trainable   whether its tensors get gradients, to train on
    The adapter stays in fp32 and the base, which may be quantized, is frozen. Raises GLMError for another method
    than LoRA, for parts that a LoRA alone cannot express (modules_to_save, DoRA, biases), and for an adapter of
    another base.
    """
    folder = Path(folder)
    config = weights.read_json(folder / "adapter_config.json")
    if problem := _unsupported(config):
        raise GLMError(f"{folder}: {problem[0]}", problem[1])
    file = next((folder / own for own in LORA_WEIGHTS if (folder / own).is_file()), None)
    if file is None:
        raise GLMError(f"{folder} has no weights.", f"Copy {' or '.join(LORA_WEIGHTS)} into it.")
    pairs, converted = _translate(model, _lora_pairs(dict(weights.tensors([file])), file), folder)

    rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, (stored, a, _) in pairs.items():
        said = int(_pattern(config.get("rank_pattern"), stored, rank))
        if a.shape[0] != said:
            raise GLMError(
                f"{file.name} has rank {a.shape[0]} for {stored}, adapter_config.json says r={said}.",
                "Copy both files from the same training run; the strength of the adapter depends on r.",
            )
        if said != rank:
            ranks[path] = said
        if (own := float(_pattern(config.get("alpha_pattern"), stored, alpha))) != alpha:
            alphas[path] = own
    targets, warnings = _targets(model, list(pairs))
    base = str(config.get("base_model_name_or_path") or "")
    _inject(
        model,
        name,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        base_model_name_or_path=base,
        inference_mode=not trainable,
    )
    layers = _lora_layers(model)
    for path, (_, a, b) in pairs.items():
        _put(layers[path], name, a, b, trainable)
    zero = not any(bool(b.any()) for _, _, b in pairs.values())
    if zero:
        warnings.append(
            "Every B of this adapter is zero: it changes no answer. It was saved before training."
        )
    return LoraReport(
        name, rank, alpha, tuple(targets), len(pairs), sum(a.numel() + b.numel() for _, a, b in pairs.values()),
        base, converted, zero, tuple(warnings),
    )  # fmt: skip


def add_lora(
    model: PreTrainedModel,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    targets: Sequence[str] = ("query_key_value",),
    name: str = "default",
) -> LoraReport:
    """Put a fresh LoRA into a model for training: A random, B zero, so that it starts without effect.

    targets   layer names of the model, or those of the released layout (query_key_value, dense, dense_h_to_4h,
              dense_4h_to_h), which mean the same layers in every family
    Returns a report with `zero` set. Raises GLMError for a target the model does not have.
    """
    leaves = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if _is_linear(module)}
    same = {
        old.split(".")[-1]: [part.split(".")[-1] for part in parts] for old, parts in RELEASED_LINEARS.items()
    }
    named = {target: [target] if target in leaves else same.get(target, []) for target in targets}
    missing = [target for target, parts in named.items() if not parts or not leaves.issuperset(parts)]
    if missing or not named:
        raise GLMError(
            f"{type(model).__name__} has no linear layer named {', '.join(missing) or 'by an empty list'}.",
            f"Choose from {', '.join(sorted(leaves))}.",
        )
    wanted = [leaf for parts in named.values() for leaf in parts]
    base = Path(str(getattr(model, "name_or_path", ""))).name
    _inject(
        model,
        name,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=wanted,
        base_model_name_or_path=base,
        inference_mode=False,
    )
    layers = [layer for layer in _lora_layers(model).values() if name in layer.lora_A]
    for layer in layers:
        _put(layer, name, layer.lora_A[name].weight, layer.lora_B[name].weight, True)
    parameters = sum(
        layer.lora_A[name].weight.numel() + layer.lora_B[name].weight.numel() for layer in layers
    )
    return LoraReport(name, rank, alpha, tuple(wanted), len(layers), parameters, base, False, True, ())


def use_lora(model: PreTrainedModel, name: str | None) -> None:
    """Make one of the loaded adapters the active one, or none: the model then answers as its base."""
    layers = _needed(model)
    known = {key for layer in layers.values() for key in layer.lora_A}
    if name is not None and name not in known:
        raise GLMError(
            f"No adapter named {name!r} is loaded.", f"Loaded are {', '.join(sorted(known))}; load it first."
        )
    for layer in layers.values():
        flags = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        if name is not None:
            layer.set_adapter(name)
        layer._disable_adapters = name is None
        for parameter, flag in flags.items():  # PEFT makes the active adapter trainable, wanted or not
            parameter.requires_grad_(flag)


def merge_lora(model: PreTrainedModel) -> int:
    """Add the active adapter to the weights for good and take all adapters out; returns the layers changed.

    W + scale * B @ A is computed in fp32 and rounded once, to W's dtype. Raises GLMError without changing anything
    when no adapter is loaded, or when it sits on a quantized layer, whose codes cannot hold the sum.
    """
    changed = {path: layer for path, layer in _needed(model).items() if _active(layer)}
    embedding = model.get_input_embeddings().weight
    for path, layer in changed.items():
        weight = layer.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise GLMError(
                f"The adapter sits on {path}, whose weights are quantized; the sum would be rounded away.",
                "Keep the adapter beside the model, or load the base in bf16 or fp32 and merge there.",
            )
        if weight is embedding:
            raise GLMError(
                f"The adapter sits on {path}, which shares its weights with the input embedding.",
                "Keep the adapter beside the model: merging would change the embedding as well.",
            )
    with torch.no_grad():
        for layer in changed.values():
            weight = layer.get_base_layer().weight
            total = weight.float()
            for name in _active(layer):
                a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
                total = total + layer.scaling[name] * (b @ a)
            weight.copy_(total)
    unload_lora(model)
    return len(changed)


def unload_lora(model: PreTrainedModel) -> int:
    """Take all adapters out and leave the base as it was, frozen; returns the layers they sat on."""
    layers = _needed(model)
    for path, layer in layers.items():
        model.set_submodule(path, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return len(layers)


def save_lora(model: PreTrainedModel, folder: str | Path, name: str = "default") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, fp32.

    The names are those of this model's layers, so plain PEFT loads the folder onto the same class.
    """
    import copy

    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": pair[name].weight.detach().float().cpu().contiguous()
        for path, layer in _needed(model).items()
        for side, pair in (("A", layer.lora_A), ("B", layer.lora_B))
        if name in pair
    }
    if not tensors:
        raise GLMError(f"No adapter named {name!r} is loaded.", "Save under the name it was loaded with.")
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    save_file(tensors, folder / LORA_WEIGHTS[0], metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _unsupported(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why the adapter of an adapter_config.json cannot be loaded, and what to do instead."""
    kind = str(config.get("peft_type", "absent"))
    if kind.upper() != "LORA":
        return (
            f"adapter_config.json has peft_type {kind!r}.",
            "Only LORA is loaded; a prefix has to be in the released format, with pre_seq_len in config.json.",
        )
    for key, harmless in _PLAIN.items():
        if key in config and config[key] not in harmless:
            return (
                f"adapter_config.json has {key}={config[key]!r}, which changes more than the low-rank product.",
                "Merge this adapter with the program that trained it, and load the merged checkpoint.",
            )
    return None


def _inject(model: PreTrainedModel, name: str, **settings: Any) -> None:
    """Wrap the target layers by PEFT and make this adapter the active one."""
    import warnings

    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    before = _lora_layers(model)
    if any(name in layer.lora_A for layer in before.values()):
        raise GLMError(f"An adapter named {name!r} is already loaded.", "Unload it, or choose another name.")
    config = LoraConfig(task_type="CAUSAL_LM", bias="none", **settings)
    # PEFT asks of a layer only what RowwiseLinear has: in_features, out_features, weight.device, and a call.
    config._register_custom_module({RowwiseLinear: Linear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # registered just above
        inject_adapter_in_model(config, model, name)
    # PEFT makes its layers in training mode, with dropout on, whatever mode the model is in.
    for layer in _lora_layers(model).values():
        layer.train(model.training)
    if before:  # which may have been switched off
        use_lora(model, name)


def _put(layer: Any, name: str, a: Tensor, b: Tensor, trainable: bool) -> None:
    """Set an adapter's two matrices in fp32; PEFT made them in the dtype of the base."""
    device = layer.get_base_layer().weight.device
    for side, tensor in ((layer.lora_A, a), (layer.lora_B, b)):
        side[name].weight = nn.Parameter(
            tensor.detach().to(device, torch.float32, copy=True), requires_grad=trainable
        )


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear | RowwiseLinear)


def _lora_layers(model: PreTrainedModel) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _needed(model: PreTrainedModel) -> dict[str, Any]:
    layers = _lora_layers(model)
    if not layers:
        raise GLMError("No LoRA is loaded into this model.", "Load one first.")
    return layers


def _active(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _lora_pairs(state: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module, as named in the file."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        found = _LORA_KEY.fullmatch(key)
        if found is None or tensor.ndim != 2 or found["side"] in sides.setdefault(found["module"], {}):
            raise GLMError(
                f"{file.name} has {key}, which is no A or B of a linear layer.",
                "Merge this adapter with the program that trained it, and load the merged checkpoint.",
            )
        sides[found["module"]][found["side"]] = tensor
    for module, pair in sides.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise GLMError(
                f"{file.name} lacks half of the adapter of {module}, or its halves are of different ranks.",
                "Copy the adapter again from its source.",
            )
    if not sides:
        raise GLMError(f"{file.name} holds no LoRA tensors.", "Copy the adapter again from its source.")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _translate(
    model: PreTrainedModel, pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path
) -> tuple[dict[str, tuple[str, Tensor, Tensor]], bool]:
    """(name in the file, A, B) by the model's own layer, and whether any name had to be translated."""
    modules = dict(model.named_modules())
    out: dict[str, tuple[str, Tensor, Tensor]] = {}
    converted = False
    for module, (a, b) in pairs.items():
        paths = [module]
        if module not in modules and (found := _RELEASED_LAYER.fullmatch(module)):
            paths = [f"model.layers.{found[1]}.{part}" for part in RELEASED_LINEARS.get(found[2], ())]
            converted = True
        elif module not in modules and module == "transformer.output_layer":
            paths, converted = ["lm_head"], True
        linears: list[Any] = [modules.get(path) for path in paths]
        linears = [getattr(layer, "base_layer", layer) for layer in linears]
        if not linears or not all(_is_linear(linear) for linear in linears):
            raise GLMError(
                f"The adapter in {folder} adapts {module}, which {type(model).__name__} with "
                f"{model.config.num_hidden_layers} layers does not have.",
                "It was trained on another base; load it onto that one.",
            )
        rows, columns = [int(linear.out_features) for linear in linears], int(linears[0].in_features)
        if a.shape[1] != columns or b.shape[0] != sum(rows):
            raise GLMError(
                f"The adapter in {folder} is for a {module} of {a.shape[1]} -> {b.shape[0]}; "
                f"in this base it is {columns} -> {sum(rows)}.",
                "It was trained on another base; load it onto that one.",
            )
        for path, part in zip(paths, torch.split(b, rows), strict=True):
            out[path] = (module, a, part)
    return out, converted


def _targets(model: PreTrainedModel, paths: list[str]) -> tuple[list[str], list[str]]:
    """Layer names that PEFT resolves to exactly these paths, and a warning for each kind only partly adapted."""
    every: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if _is_linear(module) and ".lora_" not in path:
            path = path.removesuffix(".base_layer")
            every.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    chosen: dict[str, set[str]] = {}
    for path in paths:
        chosen.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    targets: list[str] = []
    warnings: list[str] = []
    for leaf, mine in chosen.items():
        if mine == every[leaf]:
            targets.append(leaf)
        else:
            targets += sorted(mine)
            warnings.append(f"The adapter changes {len(mine)} of the {len(every[leaf])} layers named {leaf}.")
    return targets, warnings


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: the first regular expression that ends the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return otherwise


# ------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder holds, read without loading a tensor."""

    method: str  # "p-tuning-v2", "lora", or PEFT's name of another method, which is then a problem
    prefix_length: int = 0  # P-tuning v2
    projection: bool = False
    rank: int = 0  # LoRA
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    base: str = ""  # the base as the folder records it
    tensors: int = 0
    parameters: int = 0
    size_bytes: int = 0  # of the tensors
    with_base: bool = False  # the base's weights are in the folder as well
    problems: tuple[str, ...] = ()
    shapes: Shapes = field(default_factory=dict, repr=False, compare=False)  # LoRA: (columns, rows) per layer
    recorded: Mapping[str, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # the folder's config

    @property
    def text(self) -> str:
        """What it is in one line, as "P-tuning v2, 128 columns with projection" or "LoRA, rank 8, alpha 32"."""
        if self.method == "p-tuning-v2":
            return f"P-tuning v2, {self.prefix_length} columns{' with projection' if self.projection else ''}"
        if self.method == "lora":
            return f"LoRA, rank {self.rank}, alpha {self.alpha:g}, on {', '.join(self.targets)}"
        return self.method

    def check_base(self, config: Mapping[str, Any], name: str) -> None:
        """GLMError where a base with this config.json, called `name`, cannot be the one it was trained on.

        Compares sizes only, before any weight is read; loading checks every tensor.
        """
        shape = BaseShape.of_file(config)
        if self.method == "p-tuning-v2":
            _check_prefix(self.shapes, shape, self.recorded, name)
            return
        for module, (columns, *_) in self.shapes.items():
            layer = re.search(r"layers\.(\d+)\.", module)
            theirs = ours = ""
            if (
                module.startswith("transformer.")
                and (".layers." in module)
                and (".encoder." in module) != (shape.family == "chatglm2")
            ):
                theirs, ours = module, f"is {shape}"
            elif layer and int(layer[1]) >= shape.layers:
                theirs, ours = f"layer {int(layer[1]) + 1}", f"has {shape.layers} layers"
            elif _READS_HIDDEN.search(module) and columns != shape.hidden:
                theirs, ours = f"layers of width {columns}", f"has width {shape.hidden}"
            if theirs:
                trained = f", {self.base}" if self.base else ""
                raise GLMError(
                    f"The adapter adapts {theirs}; {name} {ours}.",
                    f"Load the base it was trained on{trained}.",
                )


def inspect_adapter(folder: str | Path) -> AdapterInfo | None:
    """What kind of adapter a folder holds, or None where it holds none.

    A folder with adapter_config.json is one, and one with pre_seq_len in config.json and a prefix among its weights,
    alone or in a whole checkpoint. Reads config files and the headers of weight files only. Raises GLMError for files
    that are damaged; `problems` says why an intact adapter cannot be loaded.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return _inspect_lora(folder)
    config = _read_config(folder)
    if not config.get("pre_seq_len"):
        return None
    files, beside = _prefix_files(folder)
    entries = weights.listing(files)
    mine = {name.removeprefix(PREFIX): entry for name, entry in entries.items() if name.startswith(PREFIX)}
    shapes = {name: entry.shape for name, entry in mine.items()}
    if len(shapes.get("embedding.weight", ())) != 2:
        return None
    length, projection = _prefix_kind(shapes)
    return AdapterInfo(
        "p-tuning-v2",
        prefix_length=length,
        projection=projection,
        base=str(config.get("_name_or_path") or ""),
        with_base=beside or len(mine) < len(entries),
        shapes=shapes,
        recorded=config,
        **_totals(mine.values()),
    )


def _inspect_lora(folder: Path) -> AdapterInfo:
    config = weights.read_json(folder / "adapter_config.json")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key) or 0, int | float):
            raise GLMError(
                f"adapter_config.json says {key} {config[key]!r}, where a positive number belongs.",
                "Copy adapter_config.json again from its source.",
            )
    file = next((folder / name for name in LORA_WEIGHTS if (folder / name).is_file()), None)
    entries = weights.listing([file]) if file else {}
    problems = [" ".join(problem)] if (problem := _unsupported(config)) else []
    if file is None:
        problems.append(f"There is no {' or '.join(LORA_WEIGHTS)}.")
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in entries.items():
        if found := _LORA_KEY.fullmatch(name):
            sides.setdefault(found["module"], {})[found["side"]] = entry.shape
    targets = config.get("target_modules") or ()
    return AdapterInfo(
        str(config.get("peft_type", "unknown")).lower(),
        rank=int(config.get("r") or 0),
        alpha=float(config.get("lora_alpha") or 0),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base=str(config.get("base_model_name_or_path") or ""),
        problems=tuple(problems),
        shapes={module: (pair["A"][-1], pair["B"][0]) for module, pair in sides.items() if len(pair) == 2},
        recorded=config,
        **_totals(entries.values()),
    )


def _totals(stored: Collection[weights.Stored]) -> dict[str, Any]:
    return {
        "tensors": len(stored),
        "parameters": sum(tensor.numel for tensor in stored),
        "size_bytes": sum(tensor.nbytes for tensor in stored),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty where there is none, as beside a prefix that was copied alone."""
    path = folder / "config.json"
    return weights.read_json(path) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------ effect


@dataclass(frozen=True)
class Effect:
    """How many of the probe prompts an adapter answers differently from its base."""

    differing: int
    total: int
    warning: str  # empty when at least one differs


def took_effect(base_answers: Sequence[str], adapted_answers: Sequence[str]) -> Effect:
    """Compare greedy answers to the same prompts, such as `PROBES`, without and with the adapter.

    ValueError when the two lists are empty or of different lengths.
    """
    pairs = list(zip(base_answers, adapted_answers, strict=True))
    if not pairs:
        raise ValueError("no answers to compare")
    differing = sum(before != after for before, after in pairs)
    warning = (
        ""
        if differing
        else f"The adapter changed none of {len(pairs)} test answers: it may be untrained, or for another base."
    )
    return Effect(differing, len(pairs), warning)
