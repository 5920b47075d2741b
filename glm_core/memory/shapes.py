"""The sizes of a model that its memory depends on, from a config.json alone or built in for the published models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import GLMError

_CHATGLM2 = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 13696,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "original_rope": True,
    "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
}  # fmt: skip
# name -> (name on screen, prompt format, what its config.json says). Sources: config.json of THUDM/chatglm-6b (v1.1.0),
# THUDM/chatglm2-6b, THUDM/chatglm3-6b, THUDM/glm-4-9b-chat.
BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chatglm-6b": (
        "ChatGLM-6B", "chatglm",
        {
            "model_type": "chatglm", "vocab_size": 130528, "hidden_size": 4096, "inner_hidden_size": 16384,
            "num_layers": 28, "num_attention_heads": 32, "max_sequence_length": 2048, "layernorm_epsilon": 1e-05,
            "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001,
            "pad_token_id": 3, "position_encoding_2d": True,
        },
    ),
    "chatglm2-6b": ("ChatGLM2-6B", "chatglm2", _CHATGLM2 | {"seq_length": 32768}),
    "chatglm3-6b": ("ChatGLM3-6B", "chatglm3", _CHATGLM2 | {"seq_length": 8192}),
    "glm-4-9b": (
        "GLM-4-9B", "glm4",
        _CHATGLM2 | {"num_layers": 40, "padded_vocab_size": 151552, "seq_length": 131072, "rope_ratio": 500},
    ),
}  # fmt: skip
EMBEDDINGS = ("embed_tokens", "word_embeddings")


@dataclass(frozen=True)
class Shape:
    """Numbers of a model that its memory follows from.

    linear, rows    weights of the linear layers that INT8/INT4 holds as codes, and their rows, each with a scale
    others          all other parameters; what embedding and head share counts once
    coded           of them those that are stored as codes as well: the embedding of ChatGLM-6B's "int4-qe"
    largest         weights of the largest matrix that is multiplied with, the head included
    inner, gated    width of the MLP; whether a gate of the same width stands beside it
    queries, keys   width of all heads, and of those that keys (and values) are kept for
    fused           one projection makes queries, keys and values, and layers are ChatGLM-6B's
    tied, biased    whether the head is the embedding; whether the widest of the layers' linears has a bias
    bits            8 or 4 where the checkpoint itself is stored as codes
    group           columns that share a scale, where it is stored so
    matrices        (rows, columns, how many) of the layers of `linear`
    """

    name: str
    family: str
    architecture: str
    generation: str
    config: str  # as JSON
    path: str = ""
    context: int = 0
    layers: int = 0
    hidden: int = 0
    inner: int = 0
    gated: bool = True
    queries: int = 0
    keys: int = 0
    heads: int = 0
    vocabulary: int = 0
    linear: int = 0
    rows: int = 0
    others: int = 0
    coded: int = 0
    largest: int = 0
    fused: bool = False
    tied: bool = False
    biased: bool = False
    bits: int = 0
    group: int = 0
    matrices: tuple[tuple[int, int, int], ...] = ()

    @property
    def parameters(self) -> int:
        return self.linear + self.others

    @property
    def codes(self) -> str:
        """What the checkpoint's linear layers are stored as: INT8, INT4, INT4-G64; "" for floats."""
        from ..checkpoints import code_name

        return code_name(self.bits, self.group)


def shape(model: str | Path) -> Shape:
    """The sizes of a built-in shape by its name, or of a folder with at least a config.json; GLMError where it is neither."""
    name = str(model)
    if name.lower() in BUILT_IN and not Path(name).expanduser().is_dir():
        title, generation, config = BUILT_IN[name.lower()]
        return _shape(title, "", json.dumps(config, sort_keys=True), generation)
    from ..checkpoints import read_config
    from ..checkpoints.inspecting import display_name, generation_of

    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise GLMError(
            f"There is neither a folder {name} nor a built-in shape of that name.",
            f"Give a folder with a config.json, or one of {', '.join(BUILT_IN)}.",
        )
    raw = read_config(folder)
    return _shape(
        display_name(folder), str(folder), json.dumps(raw, sort_keys=True), generation_of(folder, raw)
    )


@lru_cache(maxsize=64)
def _shape(name: str, path: str, config: str, generation: str) -> Shape:
    from ..checkpoints.inspecting import FAMILIES, NATIVE, architecture_of, stored_as
    from ..quantization import linears

    raw: dict[str, Any] = json.loads(config)
    architecture = architecture_of(raw)
    model = _empty(raw, architecture, generation, name)
    found: Any = model.config
    coded_paths = linears(model)
    modules = dict(model.named_modules())
    linear = sum(modules[path].weight.numel() for path in coded_paths)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = bool(getattr(found, "tie_word_embeddings", False)) or head.weight is embedding.weight
    total = sum(p.numel() for p in model.parameters())
    if tied and head.weight is not embedding.weight:  # tied once there are values
        total -= head.weight.numel()
    bits, group = stored_as(raw)
    bits = bits if bits in (4, 8) else 0
    matrices = Counter((modules[path].out_features, modules[path].in_features) for path in coded_paths)
    heads = int(found.num_attention_heads)
    width = int(getattr(found, "head_dim", None) or found.hidden_size // heads)
    fused = architecture == "chatglm"
    widest = max((modules[path] for path in coded_paths), key=lambda one: one.out_features)
    return Shape(
        name=name,
        family=FAMILIES.get(generation) or NATIVE.get(architecture, architecture),
        architecture=architecture,
        generation=generation,
        config=config,
        path=path,
        context=_context(raw),
        layers=int(found.num_hidden_layers),
        hidden=int(found.hidden_size),
        inner=int(getattr(found, "inner_hidden_size", None) or found.intermediate_size),
        gated=not fused,
        queries=heads * width,
        keys=int(getattr(found, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        vocabulary=int(found.vocab_size),
        linear=linear,
        rows=sum(modules[path].out_features for path in coded_paths),
        others=total - linear,
        coded=embedding.weight.numel() if bits and raw.get("quantization_embeddings") and not group else 0,
        largest=max(head.weight.numel(), *(modules[path].weight.numel() for path in coded_paths)),
        fused=fused,
        tied=tied,
        biased=widest.bias is not None,
        bits=bits,
        group=group,
        matrices=tuple((*size, count) for size, count in sorted(matrices.items())),
    )


def _context(raw: Mapping[str, Any]) -> int:
    names = ("seq_length", "max_sequence_length", "max_position_embeddings")
    return next((raw[name] for name in names if type(raw.get(name)) is int), 0)


def _empty(raw: Mapping[str, Any], architecture: str, generation: str, name: str) -> Any:
    """The model without values; GLMError for a config.json that describes none."""
    from ..checkpoints import loading
    from ..checkpoints.inspecting import SIZES

    if architecture in loading.OWN:
        missing = [key for key in SIZES[architecture] if raw.get(key) is None]
        if missing:
            raise GLMError(
                f"config.json has no {', '.join(missing)}.",
                "Copy config.json again from the checkpoint's source.",
            )
    try:
        if architecture in loading.OWN:
            return loading.empty_model(architecture, raw, generation)
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        with loading._building, init_empty_weights(include_buffers=False):
            config = AutoConfig.for_model(**{key: raw[key] for key in raw if key != "quantization_config"})
            return AutoModelForCausalLM.from_config(config)
    except GLMError:
        raise
    except Exception as error:  # a damaged config surfaces as many types; the analyst needs one sentence
        raise GLMError(
            f"The config.json of {name} describes no model: {type(error).__name__}: {str(error)[:300]}.",
            "Copy config.json again from its source.",
        ) from error
