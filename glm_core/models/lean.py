"""The forward of a GLM decoder with as few operations as it needs, for generating and scoring.

It computes what transformers' GlmForCausalLM and Glm4ForCausalLM compute, from the same modules, and so with whatever
stands in their place: packed and quantized layers, LoRA. What it leaves out costs more than the arithmetic of a small
model: keys and values copied once per query head, a mask converted in every layer, rotary embeddings put together from
eight pieces, three products where one does. Norms round once, at the end, as the released code of ChatGLM2 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels, linear
from .library import Glm4ForCausalLM, GlmForCausalLM

HIDDEN = float("-inf")
# A mask is repeated for the query heads that share keys up to so many numbers; beyond, the keys are repeated instead.
MOST_MASK = 1 << 24
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass
class _Layer:
    """The modules of one layer in the order they are used."""

    before: Any  # RMSNorm
    qkv: Any  # one layer for all three, or None
    query: Any
    key: Any
    value: Any
    output: Any
    after: Any  # RMSNorm of Glm4 behind the attention
    between: Any
    gate_up: Any
    down: Any
    last: Any  # RMSNorm of Glm4 behind the MLP


class LeanDecoder:
    """Calls like the model it was made of, for ids, a bool mask and a cache."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        self.heads, self.groups = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.eps = float(config.rms_norm_eps)
        self.layers = [_layer(one) for one in model.model.layers]

    def __call__(self, ids: Tensor, mask: Tensor, cache: Any, positions: Tensor, keep: int) -> Tensor:
        """Logits (rows, keep, vocabulary) of the last `keep` columns, in the model's dtype.

        ids        (rows, n), fed after the cached columns; `cache.update` takes their keys and values
        mask       (rows, 1, n, columns) bool, no row of it empty
        positions  (rows, n)
        """
        rows, n = ids.shape
        heads, groups, size = self.heads, self.groups, self.head_dim
        shared = heads // groups
        x = self.model.model.embed_tokens(ids)
        cos, sin = self._rotary(x, positions)
        folded = n == 1 or mask.numel() * shared <= MOST_MASK
        seen = self._mask(mask, shared if folded else 1, x.dtype)
        for number, layer in enumerate(self.layers):
            h = self._norm(layer.before, x)
            if layer.qkv is not None:
                qkv = layer.qkv(h)
            else:
                qkv = torch.cat((layer.query(h), layer.key(h), layer.value(h)), -1)
            qkv = qkv.view(rows, n, heads + 2 * groups, size)
            _rotate(qkv[:, :, : heads + groups, : cos.shape[-1]], cos, sin)
            keys, values = cache.update(
                qkv[:, :, heads : heads + groups].transpose(1, 2),
                qkv[:, :, heads + groups :].transpose(1, 2),
                number,
            )
            query = qkv[:, :, :heads].transpose(1, 2)
            if folded:  # the query heads that share keys stand behind each other, as more columns of one head
                query = query.reshape(rows, groups, shared * n, size)
            else:
                keys, values = (one.repeat_interleave(shared, 1) for one in (keys, values))
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            mixed = layer.output(
                mixed.reshape(rows, heads, n, size).transpose(1, 2).reshape(rows, n, heads * size)
            )
            x = x + (mixed if layer.after is None else self._norm(layer.after, mixed))
            gate, up = layer.gate_up(self._norm(layer.between, x)).chunk(2, -1)
            down = layer.down(F.silu(gate).mul_(up))
            x = x + (down if layer.last is None else self._norm(layer.last, down))
        last = self._norm(self.model.model.norm, x[:, -keep:].reshape(rows * keep, -1))
        logits: Tensor = self.model.lm_head(last)
        return logits.view(rows, keep, -1)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        if _compiled(x, norm.weight) and (own := kernels.kernels()) is not None:
            return own.norm(x, norm.weight.detach(), self.eps)  # one operation instead of eight
        return F.rms_norm(x, x.shape[-1:], norm.weight, self.eps)

    def _rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (rows, n, 1, rotated part of a head), the two of a pair beside each other."""
        cos, sin = self.model.model.rotary_emb(x, positions)
        half = cos.shape[-1] // 2
        cos = cos[..., :half].repeat_interleave(2, -1)
        sin = torch.stack((-sin[..., :half], sin[..., :half]), -1).flatten(-2)
        return cos[:, :, None], sin[:, :, None]

    def _mask(self, mask: Tensor, shared: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: (rows, 1, shared * n, columns), or None where everything is seen."""
        n = mask.shape[2]
        if n == 1 and mask.device.type == "cpu" and bool(mask.all()):
            return None
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, HIDDEN)
        return added if n == 1 else added.repeat(1, 1, shared, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the pairs of (rows, n, heads, part) in place."""
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    x.copy_((x * cos).addcmul_(swapped, sin))


def _compiled(x: Tensor, other: Tensor) -> bool:
    """Whether compiled kernels may compute with rows of x and another tensor of its width."""
    alike = x.dtype == other.dtype and x.dtype in linear.DTYPES
    return alike and x.device.type == "cpu" and x.numel() > 0 and x.shape[-1] % kernels.LANES == 0


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before=layer.input_layernorm,
        qkv=linear.join(attention, QKV),
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        after=getattr(layer, "post_self_attn_layernorm", None),
        between=layer.post_attention_layernorm,
        gate_up=mlp.gate_up_proj,
        down=mlp.down_proj,
        last=getattr(layer, "post_mlp_layernorm", None),
    )


def lean(model: nn.Module) -> LeanDecoder | None:
    """The lean forward of a loaded model, its query, key and value layers joined; None for other architectures.

    A model under PEFT's wrapper is looked at inside it: its adapters stand in the place of the layers they change.
    The layers are those of this moment, and kept: what is to be laid out anew comes first, as in `laid_out`.
    """
    inner = _inner(model)
    return None if inner is None else LeanDecoder(inner)


def laid_out(model: nn.Module, dynamic: bool = False) -> LeanDecoder | None:
    """The lean forward of a model on the CPU, its weights in the layout that this processor multiplies fastest.

    dynamic   with activations in 8 bits in front of INT8 and INT4 layers
    Packs the weights of other architectures as well, and returns None for them.
    """
    inner = _inner(model)
    if inner is not None:
        for layer in inner.model.layers:
            linear.join(layer.self_attn, QKV)
    if dynamic:
        linear.dynamic(model)
    linear.pack(model)
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    linear.prepare(model, next(dtypes, torch.float32))
    return lean(model)


def _inner(model: nn.Module) -> Any:
    """The model that the lean forward computes, or None."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = model.get_base_model()  # type: ignore[operator]
    if not isinstance(inner, (GlmForCausalLM, Glm4ForCausalLM)) or inner.training:
        return None
    if inner.config.hidden_act != "silu" or getattr(inner.config, "attn_logit_softcapping", None):
        return None
    return inner
