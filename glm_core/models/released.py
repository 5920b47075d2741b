"""Names of the released checkpoints <-> names of the models that run them, tensor by tensor.

ChatGLM-6B keeps its names. ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B run on transformers' GLM classes: other names, and
the rows of the fused query_key_value apart. Scales of INT8/INT4 weights and biases go the way of their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FUSED = "self_attention.query_key_value."
HEADS = (
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.output_layer.", "lm_head."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.encoder.layers.", "model.layers."),
)
INNER = (
    ("self_attention.dense.", "self_attn.o_proj."),
    ("mlp.dense_h_to_4h.", "mlp.gate_up_proj."),
    ("mlp.dense_4h_to_h.", "mlp.down_proj."),
)


def renames(config: Any) -> bool:
    """Whether the model of a config has other names than its released checkpoint."""
    return hasattr(config, "num_key_value_heads") and hasattr(config, "rope_parameters")


def to_native(name: str, tensor: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """A released tensor under the model's names; query_key_value becomes three views, split by rows."""
    import torch

    if not renames(config):
        return [(name, tensor)]
    for old, new in HEADS:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    if FUSED in name:
        head, kind = name.split(FUSED)
        keys = config.num_key_value_heads * config.head_dim
        parts = torch.split(tensor, [config.num_attention_heads * config.head_dim, keys, keys])
        return [
            (f"{head}self_attn.{letter}_proj.{kind}", part) for letter, part in zip("qkv", parts, strict=True)
        ]
    for old, new in INNER:
        name = name.replace(old, new)
    return [(name, tensor)]


def to_released(state: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors under the names of the released checkpoint, one after another; `to_native` reversed."""
    import torch

    if not renames(config):
        yield from state.items()
        return
    for name, tensor in state.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # came with q_proj
        for new, old in HEADS:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        if ".self_attn.q_proj." in name:
            native = name.replace("transformer.encoder.layers.", "model.layers.")
            tensor = torch.cat([state[native.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace("self_attn.q_proj.", FUSED)
        for new, old in INNER:
            name = name.replace(old, new)
        yield name, tensor
