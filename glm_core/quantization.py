"""Weight-only INT8 and INT4 in the format of the released ChatGLM checkpoints.

Every row of a weight has one scale: weight = codes * scale, codes -127..127 or -7..7. INT4 stores two neighbouring
columns in a byte, the even one in the high nibble, both in two's complement. Format: quantization.py of
THUDM/chatglm-6b and THUDM/chatglm2-6b-int4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import kernels
from .errors import GLMError

# The linear layers that a quantized checkpoint holds as codes; embeddings, norms, biases and heads stay float.
# "chatglm" are also the names of a released ChatGLM2/3 file; "chatglm2" are those of transformers' GLM classes.
QUANTIZED: dict[str, tuple[str, ...]] = {
    "chatglm": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "chatglm2": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_up_proj", "mlp.down_proj",
    ),
}  # fmt: skip
LARGEST = {8: 127, 4: 7}
# Up to so many rows of bf16 the packed kernels beat expanding the codes block by block and an ordinary product; they
# get slower in proportion to the rows. Measured on one core of an EPYC with AVX512-BF16, layers of 4096 x 4096.
FEW_ROWS = {8: 10, 4: 40}
# The compiled kernels are twice as fast as expanding the codes for at least so many. Where torch multiplies bf16 with AMX
# it does so eight times as fast as without, so a step of a few streams is left to them (by that factor, not measured).
COMPILED_ROWS, COMPILED_ROWS_AMX = 512, 32
# Codes expanded at a time: on the CPU the floats have to stay in the cache until they are multiplied.
BLOCK_CODES = {"cpu": 1 << 20}
BLOCK_CODES_ELSEWHERE = 1 << 26
ROWS_AT_ONCE = 1024  # of a weight that is read from a file and coded
TILES = (64, 32)  # rows per tile of the INT4 kernel, by the width of the processor's registers

Progress = Callable[[int, int], None]  # (layers done, of all)


def _check_bits(bits: int) -> None:
    if bits not in LARGEST:
        raise GLMError(f"Weights cannot be stored with {bits} bits.", "Choose 8 or 4.")


def pack_int4(codes: Tensor) -> Tensor:
    """Two columns per byte: int8 codes -8..7 (..., in) -> int8 (..., in / 2). GLMError for odd `in` or larger codes."""
    if codes.shape[-1] % 2:
        raise GLMError(f"{codes.shape[-1]} columns cannot be stored in pairs.", "Choose INT8 for this model.")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise GLMError(
            f"Codes from {int(codes.min())} to {int(codes.max())} do not fit into 4 bits.",
            "Quantize the weight with bits=4.",
        )
    return (codes[..., 0::2] << 4) | (codes[..., 1::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 (..., in / 2) -> int8 codes (..., in); the inverse of `pack_int4`."""
    # Shifts of int8 carry the sign, so each nibble arrives as the number it stands for.
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float weight (out, in), bit for bit as the released code makes them.

    Returns int8 (out, in) for 8 bits or (out, in / 2) for 4, and fp16 scales (out,). Scales and quotients are rounded
    to fp16 on the way, as in the release: dividing in fp32 gives other codes, 1 in 100 of INT8 and 1 in 2000 of INT4.
    A row of zeros, where the release divides by zero, gets the scale 0.
    GLMError for weights that are not finite in fp16.
    """
    _check_bits(bits)
    rows, columns = weight.shape
    largest = LARGEST[bits]
    wide = columns and columns % kernels.LANES == 0 and weight.dtype in kernels.QUANTIZED_FROM
    if wide and weight.device.type == "cpu" and (own := kernels.kernels()):
        stored, scale = own.quantize(weight, bits)
        _check_finite(weight, scale)
        return stored, scale
    stored = torch.empty(rows, columns if bits == 8 else columns // 2, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float16, device=weight.device)
    step = max(1, (1 << 22) // max(columns, 1))  # keeps the temporaries at a few MB
    for start in range(0, rows, step):
        part = weight.detach()[start : start + step].half()
        top = part.abs().amax(dim=1)
        _check_finite(weight, top)
        # A tensor as divisor: CUDA would turn a plain number into a multiplication by its reciprocal.
        size = top / torch.full_like(top, largest)
        divisor = torch.where(size == 0, 1, size)[:, None]
        # The bounds matter only for rows so small (below 0.008 and 0.0005) that fp16 rounds their scale coarsely.
        codes = (part / divisor).round().clamp(-largest, largest).to(torch.int8)
        stored[start : start + step] = codes if bits == 8 else pack_int4(codes)
        scale[start : start + step] = size
    return stored, scale


def quantize_in_tiles(weight: Tensor, bits: int, own: kernels.Kernels) -> tuple[Tensor, Tensor]:
    """As `quantize_weight`, with the codes in the order of the compiled kernels, on a CPU.

    Some rows at a time: a weight of its own for the codes in between would take longer to get than to fill.
    """
    rows, columns = weight.shape
    tiled = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    scale = torch.empty(rows, dtype=torch.float16)
    for start in range(0, rows, ROWS_AT_ONCE):
        these = slice(start, min(start + ROWS_AT_ONCE, rows))
        stored, scale[these] = quantize_weight(weight[these], bits)
        own.tiles(stored, bits, tiled[these])
    return tiled, scale


def _check_finite(weight: Tensor, largest: Tensor) -> None:
    if not bool(largest.isfinite().all()):
        raise GLMError(
            f"The weight has values up to {float(weight.detach().abs().max()):g}, which fp16 cannot hold.",
            "Quantize a checkpoint with finite weights below 65,504.",
        )


def dequantize(stored: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale, rounded once to `dtype`: stored (..., in or in / 2) and scale (...) -> (..., in).

    fp32 gives the weights of the released CPU code, fp16 those of its CUDA code.
    """
    _check_bits(bits)
    if stored.shape[:-1] != scale.shape:
        raise GLMError(
            f"Codes of the shape {tuple(stored.shape)} have scales of the shape {tuple(scale.shape)}.",
            "weight and weight_scale are of different layers; copy both from the same checkpoint.",
        )
    codes = stored if bits == 8 else unpack_int4(stored)
    wide = torch.promote_types(torch.float32, dtype)
    return (codes.to(wide) * scale.to(wide)[..., None]).to(dtype)


class _Rowwise(nn.Module):
    """`weight` (codes, int8) and `weight_scale`, which keep their dtypes whatever the module is cast to."""

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, rows: int, columns: int, bits: int, device: torch.device | str | None) -> None:
        super().__init__()
        _check_bits(bits)
        if bits == 4 and columns % 2:
            raise GLMError(f"{columns} columns cannot be stored in pairs.", "Choose INT8 for this model.")
        self.bits = bits
        stored = (rows, columns * bits // 8)
        self.weight = _frozen(torch.empty(stored, dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(rows, dtype=torch.float16, device=device))

    def stored(self) -> Tensor:
        """The codes in the released layout: int8 (rows, columns) or (rows, columns / 2)."""
        return self.weight.detach()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight (rows, columns)."""
        return dequantize(self.stored(), self.weight_scale.detach(), self.bits, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Half the digits of an fp16 scale would be lost in bf16, and with them the equality to the checkpoint.
        scale = self.weight_scale

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is scale and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        incoming = state_dict.get(f"{prefix}weight_scale")
        if incoming is not None and incoming.dtype != self.weight_scale.dtype:
            # Some releases have fp32 scales; copying them into fp16 would round.
            self.weight_scale = _frozen(torch.empty_like(self.weight_scale, dtype=incoming.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class RowwiseLinear(_Rowwise):
    """y = x W^T + b over codes: the place of an nn.Linear in a quantized model.

    weight        int8 (out, in) or (out, in / 2), the released layout; never trained
    weight_scale  fp16 or fp32 (out,), as the checkpoint has it
    bias          float (out,) or None
    The input decides the precision: fp32 equals the dequantized weight within rounding, bf16 and fp16 round the
    result. Gradients reach the input and the bias.

    On a CPU and for a few rows of bf16, codes need another order: that of the compiled kernels or, for INT4 where there
    are none, of torch's. The first such call replaces `weight` by one in that order, of the same size, which its dtype
    uint8 tells; `stored()` and state_dict() always give the released layout. `tiled=False` forbids it, for a weight that another module shares.
    """

    bias: nn.Parameter | None
    _for_own = False  # whether a weight in another order has that of the compiled kernels

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tiled: bool = True,
    ) -> None:
        """Empty codes and scales, to be filled from a checkpoint; `dtype` is the bias's."""
        super().__init__(out_features, in_features, bits, device)
        self.in_features, self.out_features, self.tiled = in_features, out_features, tiled
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> RowwiseLinear:
        """The quantized form of a float layer; shares its bias."""
        made = cls(linear.in_features, linear.out_features, bits, bias=False, device="meta")
        stored, scale = quantize_weight(linear.weight, bits)
        made.weight, made.weight_scale, made.bias = _frozen(stored), _frozen(scale), linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        bias_learns = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (x.requires_grad or bias_learns):
            out: Tensor = _Product.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
        else:
            out = self._forward(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _forward(self, x: Tensor) -> Tensor:
        serves = self._kernel_serves(x)
        if serves and self._for_own and (own := self._own()):
            return self._by_own(own, x)
        sums = self._by_kernel(x) if serves else self._by_blocks(x)
        # bf16 sums are scaled in fp32 and rounded once more: a bf16 scale would be wrong by up to 0.4 %.
        wide = torch.promote_types(torch.float32, x.dtype)
        out = sums if self._scaled_codes(x) else sums * self.weight_scale.to(wide)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)

    def _scaled_codes(self, x: Tensor) -> bool:
        """Whether codes get their scale before the product: sums of fp16 over bare codes could pass 65,504."""
        return x.dtype == torch.float16 and x.device.type != "cpu"

    def _by_blocks(self, x: Tensor) -> Tensor:
        dtype = _computed_in(x)
        x = self._order(x).to(dtype)
        sums = x.new_empty(x.shape[0], self.out_features)
        for rows, codes in self._blocks(dtype):
            if self._scaled_codes(x):
                codes.mul_(self.weight_scale[rows, None])
            sums[:, rows] = F.linear(x, codes)
        return sums

    def _backward(self, grad: Tensor) -> Tensor:
        """dL/dy (rows, out) -> dL/dx (rows, in) = dL/dy W."""
        dtype = _computed_in(grad)
        scaled = self._scaled_codes(grad)
        wide = torch.promote_types(torch.float32, grad.dtype)
        total = grad.new_zeros(grad.shape[0], self.in_features, dtype=wide)
        weighted = (grad if scaled else grad * self.weight_scale.to(wide)).to(dtype)
        for rows, codes in self._blocks(dtype):
            if scaled:
                codes.mul_(self.weight_scale[rows, None])
            total += weighted[:, rows] @ codes
        return self._order_back(total).to(grad.dtype)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the codes as numbers (n, in), columns as `_order` puts them; each block overwrites the last one."""
        weight, columns = self.weight.detach(), self.in_features
        budget = BLOCK_CODES.get(weight.device.type, BLOCK_CODES_ELSEWHERE)
        step = min(max(TILES[0], budget // columns // TILES[0] * TILES[0]), self.out_features)
        scratch = torch.empty(step * columns, dtype=dtype, device=weight.device)
        for start in range(0, self.out_features, step):
            part = weight[start : start + step]
            space = scratch[: part.shape[0] * columns]
            rows = slice(start, start + part.shape[0])
            if part.dtype == torch.uint8:
                yield rows, _untiled_numbers(part, space.view(columns, -1), self._for_own)
            else:
                yield rows, _numbers(part, space.view(-1, columns), self.bits)

    def _order(self, x: Tensor) -> Tensor:
        """Columns in the order of `_blocks`: writing each nibble's half apart takes half the time of interleaving."""
        if self.bits == 8 or self.weight.dtype == torch.uint8:
            return x
        return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)

    def _order_back(self, x: Tensor) -> Tensor:
        if self.bits == 8 or self.weight.dtype == torch.uint8:
            return x
        return torch.stack(x.chunk(2, dim=1), dim=-1).flatten(1)

    def _few_rows(self) -> int:
        """Up to how many rows of bf16 a kernel for few rows serves on a CPU."""
        if self._own():
            return COMPILED_ROWS_AMX if amx() else COMPILED_ROWS
        return FEW_ROWS[self.bits]

    def _kernel_serves(self, x: Tensor) -> bool:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not 0 < x.shape[0] <= self._few_rows():
            return False  # in fp32 these kernels are slower than a product over expanded codes
        own = bool(self._own()) and (self.tiled or self._for_own)
        if self.bits == 8 and not own:
            # Over another number of columns the kernel reads past the end of a row, unchecked.
            return self.weight.dtype == torch.int8 and self.in_features % 32 == 0 and int8_kernel()
        tile = int4_tile()
        if not own and not (tile and self.out_features % tile == 0 and _group(self.in_features)):
            return False
        if self.weight.dtype == torch.int8 and self.tiled:
            self._tile()
        return self.weight.dtype == torch.uint8 and self._for_own == own

    @property
    def _kind(self) -> kernels.Kind:
        return "int8" if self.bits == 8 else "int4"

    def _own(self) -> kernels.Kernels | None:
        """The compiled kernels, where they can compute with this layer."""
        served = kernels.serve(self._kind, self.out_features, self.in_features)
        return kernels.kernels() if served else None

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what the layer will need for inputs of `dtype` on this processor, so that no answer waits for it."""
        if self.weight.device.type == "cpu" and dtype == torch.bfloat16 and (own := self._own()):
            own.make(self._kind, dtype)

    def _by_own(self, own: kernels.Kernels, x: Tensor) -> Tensor:
        """The whole layer's output."""
        scale, group = self.weight_scale.detach().float(), _group(self.in_features)
        return own(self._kind, x, self.weight.data_ptr(), self.out_features, scale, None, self.bias, group)

    def _by_kernel(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()
        if self.bits == 8:
            return torch._weight_int8pack_mm(x.contiguous(), weight, x.new_ones(self.out_features))
        ones = _unit_scales(self.in_features, self.out_features)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight, _group(self.in_features), ones
        )
        return out

    def _tile(self) -> None:
        # Tensors born in inference mode could not be used by a later training step.
        with _TILING, torch.inference_mode(False), torch.no_grad():
            if self.weight.dtype == torch.int8:
                self._for_own = bool(self._own())
                self.weight = _frozen(_in_tiles(self.weight.detach(), self.bits, self._for_own))

    def stored(self) -> Tensor:
        weight = self.weight.detach()
        if weight.dtype == torch.int8:
            return weight
        return _of_tiles(weight, self.bits, self._for_own)

    def coded(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that hold a float weight (out, in) here, by their names, ready for inputs of `dtype`."""
        own = self._own() if weight.device.type == "cpu" and dtype == torch.bfloat16 and self.tiled else None
        self._for_own = own is not None
        made = (
            quantize_weight(weight, self.bits) if own is None else quantize_in_tiles(weight, self.bits, own)
        )
        return dict(zip(("weight", "weight_scale"), made, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        like = torch.empty(0, dtype=torch.bfloat16, device=self.weight.device)
        if (became := fn(like)).device != like.device or became.dtype != like.dtype:
            self._release()  # another device or dtype has no use for the order of this one's kernel
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._release()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.dtype == torch.uint8:
            destination[f"{prefix}weight"] = self.stored()

    def _release(self) -> None:
        if self.weight.dtype == torch.uint8:
            self.weight = _frozen(self.stored())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T + b whose backward expands the codes again instead of keeping a float weight for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: RowwiseLinear) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        return layer._forward(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, no-untyped-call]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x = ctx.layer._backward(grad) if ctx.needs_input_grad[0] else None
        for_bias = None
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(torch.float32, grad.dtype)
            for_bias = grad.sum(0, dtype=wide).to(ctx.bias_dtype)
        return for_x, for_bias, None


class RowwiseEmbedding(_Rowwise):
    """A quantized embedding: `weight` int8 (rows, width) or (rows, width / 2), `weight_scale` (rows,).

    Only the embedding of ChatGLM-6B was released so ("int4-qe"), and its head shares it. The codes do not tell which
    precision the model computes in, so `dtype` does; `.to(dtype)` changes it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        # Without elements, but first among the float parameters, where transformers looks for a model's dtype, and
        # carried along by .to(dtype). Never on the meta device, from where nothing can be moved.
        scale = self._parameters.pop("weight_scale")
        self.like = _frozen(torch.empty(0, dtype=dtype, device="cpu"))
        self._parameters["weight_scale"] = scale

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., width) in the model's dtype."""
        scale = self.weight_scale.detach()
        return dequantize(self.weight.detach()[ids], scale[ids], self.bits, self.like.dtype)

    def head(self) -> RowwiseLinear:
        """The output layer (..., width) -> (..., rows) over the same codes and scales."""
        made = RowwiseLinear(
            self.embedding_dim, self.num_embeddings, self.bits, bias=False, device="meta", tiled=False
        )
        made.weight, made.weight_scale = self.weight, self.weight_scale
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}like"]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if f"{prefix}like" in missing_keys:
            missing_keys.remove(f"{prefix}like")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def linears(model: nn.Module) -> list[str]:
    """Paths of the float linear layers that `quantize` turns into codes.

    Those of QUANTIZED where the model has all of a family's names; in another architecture every linear layer but
    the output head. GLMError where there is none.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(".base_layer" in f".{path}" for path in found):  # PEFT's name for what an adapter wraps
        raise GLMError(
            f"{type(model).__name__} carries an adapter, whose own layers are not to be rounded.",
            "Quantize the base first and load the adapter onto it.",
        )
    for names in QUANTIZED.values():
        chosen = {name: [path for path in found if f".{path}".endswith(f".{name}")] for name in names}
        if all(chosen.values()):
            wanted = {path for paths in chosen.values() for path in paths}
            return [path for path in found if path in wanted]
    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output()
    others = [path for path, module in found.items() if module is not head]
    if not others:
        raise GLMError(
            f"{type(model).__name__} has no linear layers with float weights.",
            "Quantize a model that is loaded in fp32, bf16 or fp16, without an adapter.",
        )
    return others


def _fitting(model: nn.Module, bits: int) -> list[str]:
    """`linears`, once all of them are known to fit: a failure half way would leave half a model."""
    _check_bits(bits)
    paths = linears(model)
    for path in paths:
        linear: Any = model.get_submodule(path)
        columns = linear.in_features
        if bits == 4 and columns % 2:
            raise GLMError(
                f"{path} has {columns} columns, which cannot be stored in pairs.",
                "Choose INT8 for this model.",
            )
    return paths


def quantize(model: nn.Module, bits: int, progress: Progress | None = None) -> nn.Module:
    """Turn a float model's linear layers into INT8 or INT4, in place; returns the model.

    Layer by layer: each float weight is freed before the next is touched. GLMError where nothing can be quantized.
    """
    paths = _fitting(model, bits)
    for done, path in enumerate(paths, start=1):
        linear: Any = model.get_submodule(path)
        try:
            made = RowwiseLinear.from_linear(linear, bits)
        except GLMError as error:
            raise GLMError(f"{path}: {error.message}", error.todo) from error
        model.set_submodule(path, made)
        del linear
        if progress is not None:
            progress(done, len(paths))
    return model


def replace_linears(
    model: nn.Module, bits: int, embeddings: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """Put empty RowwiseLinear layers where `quantize` would put filled ones, in place, for stored codes to be loaded.

    Also on the meta device, so that no float weight is ever in memory; the layers are on the device of those they
    replace.
    embeddings  also the input embedding, shared with the head, as in ChatGLM-6B's "int4-qe"
    dtype       what such an embedding computes in; the dtype of the one it replaces where not given
    """
    paths = _fitting(model, bits)
    if embeddings and not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        raise GLMError(
            f"{type(model).__name__} has a head of its own beside its embedding.",
            "Only ChatGLM-6B was released with quantized embeddings; set quantization_embeddings to false.",
        )
    for path in paths:
        old: Any = model.get_submodule(path)
        weight = old.weight
        new = RowwiseLinear(
            old.in_features, old.out_features, bits, old.bias is not None, weight.device, weight.dtype
        )
        model.set_submodule(path, new.train(old.training))
    if embeddings:
        holder: Any = model
        float_embedding, float_head = holder.get_input_embeddings(), holder.get_output_embeddings()
        where = {id(module): path for path, module in model.named_modules()}
        embedding = RowwiseEmbedding(
            float_embedding.num_embeddings,
            float_embedding.embedding_dim,
            bits,
            float_embedding.weight.device,
            dtype or float_embedding.weight.dtype,
        )
        model.set_submodule(where[id(float_embedding)], embedding.train(float_embedding.training))
        model.set_submodule(where[id(float_head)], embedding.head().train(float_head.training))
    return model


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Turn RowwiseLinear and RowwiseEmbedding back into float layers of `dtype`, in place; returns the model."""
    embeddings: dict[
        nn.Parameter, nn.Parameter
    ] = {}  # parameters hash by identity; a shared one stays shared
    paths = [path for path, module in model.named_modules() if isinstance(module, _Rowwise)]
    for path in paths:
        old: Any = model.get_submodule(path)
        shared = embeddings.get(old.weight)
        weight = nn.Parameter(old.dequantized(dtype)) if shared is None else shared
        made: nn.Linear | nn.Embedding
        if isinstance(old, RowwiseLinear):
            made = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
            if old.bias is not None:
                made.bias = nn.Parameter(old.bias.detach().to(dtype))
        else:
            made = nn.Embedding(old.num_embeddings, old.embedding_dim, device="meta")
            embeddings[old.weight] = weight
        made.weight = weight
        model.set_submodule(path, made.train(old.training))
        del old
    return model


def _computed_in(x: Tensor) -> torch.dtype:
    """fp16 is computed as fp32 on the CPU, where it is both slower and coarser."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _numbers(stored: Tensor, space: Tensor, bits: int) -> Tensor:
    """Codes of stored rows written into `space` (n, in); INT4 has its even columns first, then the odd ones."""
    if bits == 8:
        return space.copy_(stored)
    half = stored.shape[1]
    space[:, :half] = stored >> 4
    space[:, half:] = (stored << 4) >> 4
    return space


# ---- the order of codes of the compiled kernels and of torch's INT4 kernel, and whether torch's work here ----

_TILING = threading.Lock()


def _tile(stored: Tensor, tile: int) -> Tensor:
    """Released rows (n, in / 2) -> the kernel's: per tile and column the codes of all its rows, plus 8."""
    codes = (unpack_int4(stored) + 8).view(torch.uint8)
    tiles = codes.view(-1, 2, tile // 2, codes.shape[1])
    return (tiles[:, 0] | (tiles[:, 1] << 4)).transpose(1, 2).reshape(stored.shape)


def _untile(tiled: Tensor, tile: int) -> Tensor:
    """The inverse of `_tile`."""
    pairs = tiled.view(-1, 2 * tiled.shape[1], tile // 2).transpose(1, 2)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=1).view(torch.int8) - 8
    return pack_int4(codes.reshape(tiled.shape[0], 2 * tiled.shape[1]))


def _in_tiles(stored: Tensor, bits: int, own: bool) -> Tensor:
    """Released rows in the order of the compiled kernels or of torch's."""
    if own and (compiled := kernels.kernels()):
        return compiled.tiles(stored, bits)
    return _in_blocks(stored, torch.uint8, int4_tile(), _tile)


def _of_tiles(tiled: Tensor, bits: int, own: bool) -> Tensor:
    """The inverse of `_in_tiles`."""
    if not own:
        return _in_blocks(tiled, torch.int8, int4_tile(), _untile)

    def turn(part: Tensor, tile: int) -> Tensor:
        codes = torch.empty(part.shape[1] * 8 // bits, part.shape[0], dtype=torch.int8)
        kernels.codes_of_tiles(part, bits, codes)
        return codes.t() if bits == 8 else pack_int4(codes.t())

    return _in_blocks(tiled, torch.int8, kernels.TILE, turn)


def _untiled_numbers(tiled: Tensor, space: Tensor, own: bool) -> Tensor:
    """Codes of whole tiles written into `space` (in, n), returned as (n, in)."""
    columns, rows = space.shape
    if own:
        kernels.codes_of_tiles(tiled, 8 if tiled.shape[1] == columns else 4, space)
        return space.t()
    tile = int4_tile()
    pairs = tiled.view(-1, columns, tile // 2).transpose(0, 1)
    filled = space.view(columns, rows // tile, 2, tile // 2)
    filled[:, :, 0] = (pairs & 15).view(torch.int8) - 8
    filled[:, :, 1] = (pairs >> 4).view(torch.int8) - 8
    return space.t()


def _in_blocks(
    weight: Tensor, dtype: torch.dtype, tile: int, turn: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """`turn` applied to some tiles at a time, so that the temporaries stay small."""
    out = torch.empty_like(weight, dtype=dtype)
    step = max(1, BLOCK_CODES["cpu"] // (2 * weight.shape[1] * tile)) * tile
    for start in range(0, weight.shape[0], step):
        out[start : start + step] = turn(weight[start : start + step], tile)
    return out


def _group(columns: int) -> int:
    """The largest group the kernel takes for so many columns, 0 where it takes none."""
    return next((size for size in (128, 64, 32) if columns % size == 0), 0)


@lru_cache(maxsize=32)
def _unit_scales(columns: int, rows: int) -> Tensor:
    """Scale 1 and zero point 0 for every group, shared by all layers of a shape."""
    with torch.inference_mode(False):
        made = torch.zeros(columns // _group(columns), rows, 2, dtype=torch.bfloat16)
        made[..., 0] = 1
        return made


def _trial(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and codes whose products are small integers, exact in bf16, and the products."""
    numbers = torch.arange(128 * 64)
    codes = (numbers * 7919 % (2 * LARGEST[bits] + 1) - LARGEST[bits]).to(torch.int8).view(128, 64)
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 62] = 1, -1
    return x, codes, (x.float() @ codes.float().t())


@lru_cache(maxsize=1)
def amx() -> bool:
    """Whether torch multiplies bf16 and 8 bits with AMX here."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@lru_cache(maxsize=1)
def int8_kernel() -> bool:
    """Whether torch's INT8 kernel works here; it reads the released layout as it is."""
    x, codes, expected = _trial(8)
    try:
        out = torch._weight_int8pack_mm(x, codes, x.new_ones(128))
    except (AttributeError, RuntimeError, NotImplementedError):  # a private function of torch
        return False
    return torch.equal(out.float(), expected)


@lru_cache(maxsize=1)
def int4_tile() -> int:
    """Rows per tile of torch's INT4 kernel on this processor; 0 where the kernel is missing or orders otherwise."""
    x, codes, expected = _trial(4)
    stored = pack_int4(codes)
    for tile in TILES:
        try:
            tiled = _tile(stored, tile)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), 1)
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiled, 64, _unit_scales(64, 128))
        except (AttributeError, RuntimeError, NotImplementedError):
            return 0
        if torch.equal(packed.view(-1), tiled.view(-1)) and torch.equal(out.float(), expected):
            return tile
    return 0
