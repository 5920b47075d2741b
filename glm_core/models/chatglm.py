"""ChatGLM-6B, the first generation: own model code, with the released parameter names.

A prefix language model (GLM, arXiv:2103.10360): the prompt in front of `<sop>` attends to itself in both directions,
what follows is causal. Positions have two rows, both rotary (arXiv:2104.09864), one for each half of every head: where
a token stands in the prompt, and how far it is behind the prompt. Blocks scale their residuals as DeepNorm does
(arXiv:2203.00555), but take them from the normalised input. No class of transformers computes this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GLMError
from .library import (
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutputWithPast,
    Cache,
    CausalLMOutputWithPast,
    DynamicCache,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedConfig,
    PreTrainedModel,
    can_return_tuple,
    capture_outputs,
    init,
    merge_with_config_defaults,
)

# The release counts 28 layers here whatever config.json says, so a model of another depth was trained with 28 too.
ALPHA = math.sqrt(2 * 28)
# The score of a hidden key in the release: finite, so that a row that sees nothing does not become NaN.
HIDDEN = -10000.0

# The keys of a released config.json that mean something to the model: without the first ones it is no ChatGLM-6B.
REQUIRED = (
    "bos_token_id",
    "eos_token_id",
    "hidden_size",
    "inner_hidden_size",
    "num_attention_heads",
    "num_layers",
    "vocab_size",
)
OPTIONAL = (
    "gmask_token_id",
    "mask_token_id",
    "pad_token_id",
    "layernorm_epsilon",
    "max_sequence_length",
    "position_encoding_2d",
    "pre_seq_len",
    "prefix_projection",
    "quantization_bit",
    "quantization_embeddings",
    "use_cache",
)


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and special ids, under the names of a released config.json; transformers' names work as well.

    gmask_token_id, mask_token_id, pad_token_id  follow from bos_token_id and vocab_size where the file has none
    mask_token_first  whether [MASK] is preferred in a row that also has [gMASK]: so in the first release (March
                      2023), whose config.json names neither; the later ones prefer [gMASK]
    pre_seq_len       columns of a P-tuning v2 prefix that a cache holds before the first token
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "layer_norm_eps": "layernorm_epsilon",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_layers: int = 28
    num_attention_heads: int = 32
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    gmask_token_id: int | None = None
    mask_token_id: int | None = None
    mask_token_first: bool | None = None
    pad_token_id: int | None = None
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0
    quantization_embeddings: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mask_token_first is None:
            self.mask_token_first = self.gmask_token_id is None
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if self.pad_token_id is None:  # <pad> is piece 3, in the first release behind 20,000 image tokens
            self.pad_token_id = 20003 if self.vocab_size == 150528 else 3
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @classmethod
    def from_released(cls, config: dict[str, Any]) -> ChatGLMConfig:
        """Read a released config.json of any date; keys that mean nothing to the model are left out.

        Raises GLMError where a size is missing, or where a value is one that no published checkpoint has.
        """
        absent = [key for key in REQUIRED if config.get(key) is None]
        if absent:
            raise GLMError(
                f"config.json has no {', '.join(absent)}.", "Copy config.json from a ChatGLM-6B checkpoint."
            )
        # Rotary pairs divide a head by 2, their two rows of positions by 2 more.
        width = config["num_attention_heads"] * (4 if config.get("position_encoding_2d", True) else 2)
        for key, allowed, meaning in (
            ("model_type", config.get("model_type", "chatglm") == "chatglm", "'chatglm'"),
            ("tie_word_embeddings", config.get("tie_word_embeddings", True) is True, "true"),
            ("quantization_bit", config.get("quantization_bit") in (None, 0, 4, 8), "4, 8 or none"),
            ("hidden_size", config["hidden_size"] % width == 0, f"a multiple of {width}"),
        ):
            if not allowed:
                raise GLMError(
                    f"config.json has {key}={config[key]!r}, which no published ChatGLM-6B checkpoint has.",
                    f"Load a checkpoint where {key} is {meaning}.",
                )
        keys = (*REQUIRED, *OPTIONAL, "mask_token_first")
        values = {key: config[key] for key in keys if config.get(key) is not None}
        return cls(**values, dtype=config.get("torch_dtype", config.get("dtype")))


def released_config(config: ChatGLMConfig) -> dict[str, Any]:
    """config.json of a checkpoint in the released layout, the counterpart of `ChatGLMConfig.from_released`."""
    unnamed = {"gmask_token_id", "mask_token_id"} if config.mask_token_first else set()
    keys = (key for key in (*REQUIRED, *OPTIONAL) if key not in unnamed)
    unset = {"pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0}
    if not config.quantization_bit:
        unset["quantization_embeddings"] = False
    values = {key: getattr(config, key) for key in keys}
    return {
        "_name_or_path": "THUDM/chatglm-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        **{key: value for key, value in values.items() if key not in unset or value != unset[key]},
        "torch_dtype": str(config.dtype or "float16").removeprefix("torch."),
    }


@dataclass(frozen=True)
class Layout:
    """Where a row turns from prompt to answer.

    context  index of the first <sop>: the tokens in front of it see each other
    anchor   position that row 0 keeps from <sop> on, the index of the mask token; -1 where it counts on, which is
             so with one-dimensional positions and [gMASK]
    """

    context: int
    anchor: int


def layout(ids: Sequence[int], config: ChatGLMConfig) -> Layout:
    """The layout of one row without padding. GLMError where it holds no <sop>, or no mask token."""
    context, anchor = layouts(torch.tensor([list(ids)], dtype=torch.long), None, config)
    return Layout(int(context), int(anchor))


def layouts(
    ids: Tensor, real: Tensor | None, config: ChatGLMConfig, check: bool = True
) -> tuple[Tensor, Tensor]:
    """`layout` of many rows at once: ids (rows, columns), real (rows, columns) bool or None -> context, anchor (rows,).

    Indices count real columns only. `check=False` saves waiting for the device where the rows were checked before.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    index = real.cumsum(1) - 1

    def first(hits: Tensor) -> Tensor:
        found = index.gather(1, hits.int().argmax(1, keepdim=True))[:, 0]
        return torch.where(hits.any(1), found, -1)

    context = first(real & (ids == config.bos_token_id))
    # A mask token that is generated later must not move the row, so those in front of <sop> come first; a row with
    # none there is searched as a whole, as the release does.
    inside = real & (index < context[:, None])
    general, plain = config.gmask_token_id, config.mask_token_id
    anchor, counts_on = torch.full_like(context, -1), torch.zeros_like(context, dtype=torch.bool)
    for where in (inside, real):
        for token in (plain, general) if config.mask_token_first else (general, plain):
            found = first(where & (ids == token))
            taken = (anchor < 0) & (found >= 0)
            counts_on |= taken & (token == general)
            anchor = torch.where(taken, found, anchor)
    if check:
        for row, (sop, mask) in enumerate(zip(context.tolist(), anchor.tolist(), strict=True)):
            if sop < 0 or mask < 0:
                masks = f"[gMASK] ({general}) or [MASK] ({plain})"
                raise GLMError(
                    f"Row {row} of the ids holds no {masks if sop >= 0 else f'<sop> ({config.bos_token_id})'}.",
                    "End every prompt with [gMASK] <sop>, as the tokenizer does.",
                )
    if not config.position_encoding_2d:
        anchor = torch.where(counts_on, -1, anchor)
    return context, anchor


def positions(index: Tensor, context: Tensor, anchor: Tensor) -> Tensor:
    """Both rows of positions, (rows, 2, n), of the tokens with these indices.

    index            (rows, n) the how-manieth real token of its row each is, from 0; what padding gets is not used
    context, anchor  (rows,) see `Layout`
    Row 0 counts the prompt and stays at the anchor behind it, row 1 is 0 in the prompt and counts from 1 behind it.
    A model with one-dimensional positions takes its only ones from row 0.
    """
    behind = index >= context[:, None]
    held = behind & (anchor >= 0)[:, None]
    return torch.stack(
        [torch.where(held, anchor[:, None], index), (index - context[:, None] + 1).clamp_min(0)], dim=1
    )


def visible(real: Tensor, context: Tensor, queries: int) -> Tensor:
    """Which columns each of the last columns sees: (rows, 1, queries, columns) bool, True = sees.

    real     (rows, columns) bool: which columns hold a token, cached ones included
    context  (rows,) how many of a row's real columns all of them see: the context of `Layout`, and with a cached
             prefix its columns too. For queries behind the prompt any number up to that gives the same.
    """
    columns = torch.arange(real.shape[1], device=real.device)
    own = columns[real.shape[1] - queries :, None]
    shared = real.cumsum(1) <= context[:, None]
    seen = real[:, None] & ((columns <= own) | shared[:, None])
    # A padding column sees itself: a row of a softmax over nothing is NaN, and would spread.
    return (seen | (columns == own))[:, None]


def frequencies(dim: int) -> Tensor:
    """The dim / 2 rotary frequencies, rounded to fp16 as they are stored in every release, as fp32."""
    return (1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)).half().float()


class ChatGLMRotary(nn.Module):
    """Cosines and sines of both rows of positions."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.rows = 2 if config.position_encoding_2d else 1
        self.dim = config.head_dim // self.rows
        self.register_buffer("inv_freq", frequencies(self.dim), persistent=False)
        self.inv_freq: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> ChatGLMRotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.device.type != "meta":  # undo the rounding of a change to bf16
            self.inv_freq = frequencies(self.dim).to(self.inv_freq.device)
        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(batch, 2, n) positions -> two tensors (batch, 1, n, rows used, dim / 2) of this dtype."""
        # In fp16 the release forms the angles in fp16 too: at position 1,000 they are up to 0.25 off. So must these be.
        exact = dtype if dtype == torch.float16 else torch.float32
        angles = position_ids[:, : self.rows, :, None].to(exact) * self.inv_freq.to(exact)
        angles = angles.transpose(1, 2)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (batch, heads, n, head_dim): each row's share of a head is two halves, whose elements are the pairs."""
    first, second = x.view(*x.shape[:-1], cos.shape[-2], 2, cos.shape[-1]).unbind(-2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3)


def eager_attention_forward(
    module: ChatGLMAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, returning its weights: (batch, n, heads, head_dim), (batch, heads, n, columns)."""
    # Scores of deep layers leave the range of fp16; divided by the depth they do not, and fp32 takes it back.
    depth = module.layer_idx + 1
    scores = (query * (scaling / depth)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, HIDDEN)
    weights = (scores.float() * depth).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    """All heads over all keys, with query, key and value of one head side by side in the fused projection."""

    num_key_value_groups = 1  # read by transformers' attention functions
    is_causal = False  # without a mask everything is seen

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        fused = self.query_key_value(hidden_states).view(*shape, -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.dense(mixed.reshape(*shape, -1)), weights


class ChatGLMMLP(nn.Module):
    """Two projections with GELU between, in its tanh form."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))
        return out


class ChatGLMBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Normalise, attend, normalise, expand; both residuals start at the normalised tensor, times ALPHA."""

    _can_checkpoint_with_cache = True  # of those that keep nothing; the model sees to it

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        # nn.LayerNorm keeps its statistics in fp32 whatever the dtype of its parameters.
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = normed * ALPHA + self.attention(normed, **kwargs)[0]
        normed = self.post_attention_layernorm(hidden_states)
        out: Tensor = normed * ALPHA + self.mlp(normed)
        return out


class ChatGLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the model and its head share: what transformers needs to know of both."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True  # flash attention takes no mask of this shape
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotary):  # transformers builds models without values
            init.copy_(module.inv_freq, frequencies(module.dim))


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and final norm: ids to hidden states."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rotary = ChatGLMRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        glm_position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        prefix_length: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `ChatGLMForConditionalGeneration.forward`; returns hidden states (batch, n, hidden size)."""
        if kwargs.pop("position_ids", None) is not None:
            raise GLMError(
                "ChatGLM-6B takes no position_ids: its positions have two rows.",
                "Pass glm_position_ids of shape (batch, 2, n), or none.",
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise GLMError("Both or none of input_ids and inputs_embeds are given.", "Pass one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.gradient_checkpointing and self.training and isinstance(past_key_values, Cache):
            if past_key_values.get_seq_length():
                raise GLMError(
                    "Gradient checkpointing computes every layer twice, which would write the cache twice.",
                    "Switch it off, or pass a prefix as an object whose update() keeps nothing.",
                )
            past_key_values = None
        if attention_mask is None or attention_mask.ndim == 2:
            attention_mask, glm_position_ids = self._plan(
                input_ids, inputs_embeds, attention_mask, glm_position_ids, past_key_values, prefix_length
            )
        elif glm_position_ids is None or attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
            raise GLMError(
                f"The attention mask is {attention_mask.ndim}-D {attention_mask.dtype}, "
                f"{'with' if glm_position_ids is not None else 'without'} glm_position_ids.",
                "Pass one of shape (batch, columns), or (batch, 1, n, columns) of bool and glm_position_ids with it.",
            )
        else:  # a row that sees nothing would become NaN, and spread through its values
            attention_mask = attention_mask | ~attention_mask.any(-1, keepdim=True)

        rotary = self.rotary(glm_position_ids, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                rotary=rotary,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )

    def _plan(
        self,
        ids: Tensor | None,
        embeds: Tensor,
        real: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        prefix_length: int | None,
    ) -> tuple[Tensor | None, Tensor]:
        """The mask that attention takes, and positions, from what the caller left out of them."""
        rows, n = embeds.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        prefix = announced_prefix(self.config, prefix_length) if past else 0
        padded = real is not None
        if real is None:
            real = torch.ones(rows, past + n, dtype=torch.bool, device=embeds.device)
        elif real.shape[1] == past + n - prefix:
            real = F.pad(real.bool(), (prefix, 0), value=True)
        elif real.shape[1] == past + n:
            real = real.bool()
        else:
            raise GLMError(
                f"The attention mask has {real.shape[1]} columns, for {past} cached and {n} new ones.",
                "Give it one column for every token of the row, cached ones included.",
            )
        new = real[:, past:]
        if position_ids is None:
            if ids is None:
                raise GLMError(
                    "inputs_embeds say nothing of <sop>.", "Pass glm_position_ids of shape (batch, 2, n) too."
                )
            if past != prefix:
                raise GLMError(
                    f"The cache holds {past} columns and the prefix has {prefix}: these ids go on with a row whose "
                    "beginning is not known.",
                    "Pass glm_position_ids of shape (batch, 2, n), or prefix_length if the cache holds only that.",
                )
            context, anchor = layouts(ids, new, self.config)
            position_ids = positions((new.cumsum(1) - 1).clamp_min(0), context, anchor)
        elif n > 1:
            inside = new & (position_ids[:, 1] == 0)
            if past != prefix and bool(inside.any()):
                raise GLMError(
                    f"A part of the prompt comes on top of {past} cached columns; a prompt of ChatGLM-6B attends to "
                    "itself in both directions and cannot be computed in pieces.",
                    "Feed the prompt up to <sop> at once, or pass prefix_length if the cache holds only that.",
                )
            context = inside.sum(1)
        else:
            context = torch.zeros(rows, dtype=torch.long, device=embeds.device)
        room = max(cache.get_max_length(), past + n) if isinstance(cache, Cache) else past + n
        if n == 1 and not padded and room == past + n:
            return None, position_ids  # one token sees all columns: no mask is the fastest mask
        mask = visible(real, context + real[:, :past].sum(1), n)
        return F.pad(mask, (0, room - past - n), value=False), position_ids


def announced_prefix(config: ChatGLMConfig, prefix_length: int | None) -> int:
    return (config.pre_seq_len or 0) if prefix_length is None else prefix_length


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """ChatGLM-6B with its language head, which is the embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.word_embeddings = value  # type: ignore[assignment]

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Make embedding and head one matrix, the embedding's where a file holds two different ones."""
        if missing_keys is not None and "transformer.word_embeddings.weight" not in missing_keys:
            missing_keys.add("lm_head.weight")  # else transformers keeps both
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        glm_position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        prefix_length: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, n kept, vocabulary) of n new columns behind those in the cache.

        input_ids         (batch, n); or inputs_embeds (batch, n, hidden size), which need glm_position_ids
        attention_mask    None: every column is a token; (batch, columns), 1 = token and 0 = padding, cached columns
                          included: padding is hidden and not counted; or (batch, 1, n, columns) of bool, True =
                          visible, which is used as it is and needs glm_position_ids (see `visible`, `positions`)
        glm_position_ids  (batch, 2, n). Without them `input_ids` must be whole rows from their first token on, and
                          both mask and positions come from the ids (`layout`)
        past_key_values   a transformers cache, or any object with `update(keys, values, layer)` -> all keys and all
                          values (batch, heads, columns, head_dim), and `get_seq_length()` -> columns before that
        prefix_length     how many columns of a P-tuning v2 prefix the cache held before the first token, by default
                          config.pre_seq_len: every token sees them, they shift no position, and a 2-D mask may
                          leave them out
        labels            (batch, n): the loss is the mean cross entropy of each label by the column before it, in
                          fp32; -100 is left out
        logits_to_keep    the last columns to compute logits for, or the indices of these; 0 is all
        Raises GLMError for a row without <sop> or mask token, and for a prompt that is continued in its middle.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            glm_position_ids=glm_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_length=prefix_length,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        prefix_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new columns of whole rows, with positions made from the whole rows at every step.

        Nothing is remembered between steps, so beams, assistants and a returned cache need no care.
        """
        kwargs.pop("position_ids", None)
        total = input_ids.shape[1]
        announced, prefix = announced_prefix(self.config, prefix_length), 0
        new = total if next_sequence_length is None else next_sequence_length
        if past_key_values is not None and (is_first_iteration or announced):
            cached = int(past_key_values.get_seq_length())
            prefix = announced if cached else 0
            new = total + prefix - cached
            fed = input_ids[:, : total - new]
            if (
                not 0 < new <= total
                or (next_sequence_length is None and cached != prefix)
                or (new < total and not bool((fed == self.config.bos_token_id).any(1).all()))
            ):
                raise GLMError(
                    f"The cache holds {cached} columns, the prefix has {prefix} and the rows {total} ids.",
                    "Pass whole rows, cached tokens included, and prefix_length for a P-tuning prefix in the cache.",
                )
        real = None if attention_mask is None else attention_mask[:, -total:].bool()
        every = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
        context, anchor = layouts(input_ids, every, self.config, check=bool(is_first_iteration))
        index = (every.cumsum(1) - 1).clamp_min(0)[:, -new:]
        if isinstance(past_key_values, Cache) and past_key_values.is_compileable:
            # A compiled forward must not depend on values, so the mask is made here, as wide as the cache is.
            real = F.pad(every, (prefix, 0), value=True)
            room = past_key_values.get_max_length() - real.shape[1]
            attention_mask = F.pad(visible(real, context + prefix, new), (0, room), value=False)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=new,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            glm_position_ids=positions(index, context, anchor),
            prefix_length=prefix_length,
            **kwargs,
        )
        return inputs

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' generate, for whole rows with <sop>, left-padded with a 2-D mask; GLMError for what cannot work."""
        chosen = generation_config or self.generation_config
        if kwargs.get("prefill_chunk_size", getattr(chosen, "prefill_chunk_size", None)) is not None:
            raise GLMError(
                "prefill_chunk_size is set; a prompt of ChatGLM-6B attends to itself in both directions and cannot "
                "be computed in pieces.",
                "Leave prefill_chunk_size out.",
            )
        if kwargs.get("glm_position_ids") is not None or kwargs.get("position_ids") is not None:
            raise GLMError(
                "generate() makes the positions of every step itself.",
                "Leave them out; mark padding in a 2-D attention_mask.",
            )
        return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: GLMError. generate_batch and its relatives all come through here."""
        raise GLMError(
            "transformers' continuous batching knows only causal prompts, ChatGLM-6B's are bidirectional.",
            "Use generate() with left-padded rows, or glm_core.engine.",
        )
