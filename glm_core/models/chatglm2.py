"""ChatGLM2-6B and ChatGLM3-6B in the released layout, on transformers' own GLM classes.

The two architectures are GLM's with other names: rotary over the first half of each head in interleaved pairs,
grouped query attention, RMSNorm, SwiGLU with the gate first. So the weights are renamed while they are read, the
fused query_key_value rows are split, and no model code is needed.
"""

from __future__ import annotations

from typing import Any

from ..errors import GLMError
from .library import (
    GlmConfig,
    GlmForCausalLM,
    Split,
    WeightConverter,
    WeightRenaming,
    register_checkpoint_conversion_mapping,
)

# What every published ChatGLM2/3 checkpoint says; another value means another architecture.
FIXED: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
}
SIZES = ("padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads",
         "multi_query_group_num", "kv_channels", "layernorm_epsilon", "seq_length")  # fmt: skip


class ChatGLM2Config(GlmConfig):
    """A released config.json, read into GLM's field names."""

    model_type = "chatglm"

    @classmethod
    def from_released(cls, config: dict[str, Any], generation: str = "chatglm3") -> ChatGLM2Config:
        """Translate the fields of a released config.json; GLMError for a variant no published model uses.

        generation  decides what rope_ratio means: ChatGLM2-6B-32k divides the positions by it, ChatGLM3-6B-32k and
                    GLM-4 multiply the base of the frequencies with it
        """
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise GLMError(
                    f"config.json has {key}={config[key]!r}, which no published ChatGLM2/3 checkpoint has.",
                    f"Load a checkpoint with {key}={value!r}.",
                )
        missing = [key for key in SIZES if key not in config]
        if missing:
            raise GLMError(
                f"config.json has no {', '.join(missing)}.",
                "Copy config.json again from the checkpoint's source.",
            )
        ratio = float(config.get("rope_ratio", 1.0))
        interpolated = generation == "chatglm2" and ratio != 1.0
        rope: dict[str, Any] = {
            "rope_type": "linear" if interpolated else "default",
            "rope_theta": 10000.0 if interpolated else 10000.0 * ratio,
            "partial_rotary_factor": 0.5,
        }
        if interpolated:
            rope["factor"] = ratio
        return cls(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["multi_query_group_num"],
            head_dim=config["kv_channels"],
            rms_norm_eps=config["layernorm_epsilon"],
            max_position_embeddings=config["seq_length"],
            attention_bias=config.get("add_qkv_bias", True),
            attention_dropout=0.0,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope_parameters=rope,
            pad_token_id=config.get("pad_token_id", 0),
            eos_token_id=config.get("eos_token_id", 2),
            bos_token_id=None,
        )


class ChatGLM2ForCausalLM(GlmForCausalLM):  # type: ignore[misc]
    """GLM with a released ChatGLM2/3 checkpoint's names accepted while loading, and written while saving."""

    config_class = ChatGLM2Config
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]


RELEASED_TO_NATIVE = [
    WeightRenaming(r"transformer.embedding.word_embeddings.", r"model.embed_tokens."),
    WeightRenaming(r"transformer.output_layer.", r"lm_head."),
    WeightRenaming(r"transformer.encoder.final_layernorm.", r"model.norm."),
    WeightRenaming(r"transformer.encoder.layers.", r"model.layers."),
    *(
        WeightConverter(
            f"self_attention.query_key_value.{kind}",
            [f"self_attn.{part}_proj.{kind}" for part in "qkv"],
            operations=[Split(dim=0)],
        )
        for kind in ("weight", "bias")
    ),
    WeightRenaming(r"self_attention.dense.", r"self_attn.o_proj."),
    WeightRenaming(r"mlp.dense_h_to_4h.", r"mlp.gate_up_proj."),
    WeightRenaming(r"mlp.dense_4h_to_h.", r"mlp.down_proj."),
]
# Keyed by class name: keyed by "glm" it would also rename the weights of every plain GLM checkpoint.
register_checkpoint_conversion_mapping("ChatGLM2ForCausalLM", RELEASED_TO_NATIVE)


def released_config(config: ChatGLM2Config, generation: str, context: int) -> dict[str, Any]:
    """config.json of a checkpoint in the released layout, the counterpart of `ChatGLM2Config.from_released`."""
    return {
        "_name_or_path": generation,
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        **FIXED,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "padded_vocab_size": config.vocab_size,
        "seq_length": context,
        "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
