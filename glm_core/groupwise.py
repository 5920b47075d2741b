"""Weight-only INT4 with a scale and a zero point for every 32, 64 or 128 columns of a row.

weight = codes * scale + zero, codes -8..7 in the byte order of the released INT4, scale and zero of each group in fp16.
One outlier coarsens its own group instead of its whole row, which is what row-wise INT4 loses most by; the price is
4 bytes per group. Both numbers are chosen from those that bf16 holds as well, because torch's INT4 kernels take them
so: what a kernel computes with is the stored number itself. No other program reads this layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels, quantization
from .errors import GLMError
from .quantization import RowwiseLinear, pack_int4, unpack_int4

GROUPS = (128, 64, 32)
BITS = 4
LOWEST, HIGHEST = -8, 7
ROUNDS = 2  # of refining; a third one lowers the error of Gaussian weights by another 1 %
LARGEST = 65_280.0  # that both fp16 and bf16 hold
CODES_AT_ONCE = 1 << 18  # while quantizing: the temporaries, some MB in fp32, stay in a processor's cache
CODES_AT_ONCE_ELSEWHERE = 1 << 22
SCALES = ("weight_scale", "weight_zero")
# Up to so many rows, one tile of its product, the INT4 kernel for CUDA computes: beyond, expanded codes are read once
# for all rows. A processor's limit is that of row-wise INT4.
FEW_ROWS_CUDA = 16
CUDA_ROWS = 8  # of a weight in a tile of that kernel


def group_for(columns: int, group: int) -> int:
    """The largest group of at most so many columns that divides a row; 0 where none does."""
    if group not in GROUPS:
        raise GLMError(f"Weights cannot be stored in groups of {group} columns.", "Choose 32, 64 or 128.")
    return next((size for size in GROUPS if size <= group and columns % size == 0), 0)


def code_bytes(rows: int, columns: int, group: int) -> int:
    """Bytes of a layer's codes, scales and zero points; of the row-wise form where no group divides the columns."""
    size = group_for(columns, group)
    return rows * columns // 2 + (rows * columns // size * 4 if size else rows * 2)


def quantize_weight(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a float weight (out, in) whose columns the group divides.

    Returns int8 (out, in / 2) and twice fp16 (out, in / group). It begins with the smallest and the largest number of a
    group, as torchao does (choose_qparams_affine_tinygemm), and gives scale and zero the values that fit the codes
    best by least squares, then makes the codes anew, twice; a group that this makes worse keeps the first ones.
    GLMError for weights that are not finite in fp16.
    """
    rows, columns = weight.shape
    if group_for(columns, group) != group:
        raise GLMError(f"{columns} columns cannot be divided into groups of {group}.", "Choose INT4 or INT8.")
    device = weight.device
    stored = torch.empty(rows, columns // 2, dtype=torch.int8, device=device)
    scale = torch.empty(rows, columns // group, dtype=torch.float16, device=device)
    zero = torch.empty_like(scale)
    at_once = CODES_AT_ONCE if device.type == "cpu" else CODES_AT_ONCE_ELSEWHERE
    step = max(1, at_once // max(columns, 1))
    for start in range(0, rows, step):
        part = weight.detach()[start : start + step].float().view(-1, columns // group, group)
        if not bool(part.half().isfinite().all()):
            raise GLMError(
                f"The weight has values up to {float(weight.detach().abs().max()):g}, which fp16 cannot hold.",
                "Quantize a checkpoint with finite weights below 65,504.",
            )
        codes, size, centre = _fitted(part)
        stored[start : start + step] = pack_int4(codes.to(torch.int8).view(-1, columns))
        scale[start : start + step], zero[start : start + step] = size[..., 0], centre[..., 0]
    return stored, scale, zero


def _fitted(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of (n, groups, group) numbers, and scales and zero points (n, groups, 1), all in fp32."""
    low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    zero = _short(low + (high - low) * (-LOWEST / (HIGHEST - LOWEST)))
    # The zero point comes first: where it is large, bf16 moves it, and the scale makes up for that.
    scale = _short(torch.maximum((high - zero) / HIGHEST, (low - zero) / LOWEST))
    codes = _codes(part, scale, zero)
    first = codes, scale, zero
    mean = part.mean(-1, keepdim=True)
    for _ in range(ROUNDS):
        middle = codes.mean(-1, keepdim=True)
        spread = codes - middle
        variance = spread.square().sum(-1, keepdim=True)
        slope = (spread * part).sum(-1, keepdim=True) / variance
        scale = _short(torch.where(variance > 0, slope, scale))
        zero = _short(mean - scale * middle)
        codes = _codes(part, scale, zero)
    worse = _loss(part, codes, scale, zero) > _loss(part, *first)
    if bool(worse.any()):
        codes, scale, zero = (
            torch.where(worse, old, new) for old, new in zip(first, (codes, scale, zero), strict=True)
        )
    return codes, scale, zero


def _codes(part: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((part - zero) / torch.where(scale == 0, 1, scale)).round_().clamp_(LOWEST, HIGHEST)


def _loss(part: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.addcmul(zero, codes, scale).sub_(part).square_().sum(-1, keepdim=True)


def _short(numbers: Tensor) -> Tensor:
    """The nearest numbers that bf16 and fp16 both hold."""
    return numbers.clamp(-LARGEST, LARGEST).bfloat16().half().float()


def dequantize(stored: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale + zero, rounded once to `dtype`: (out, in / 2) and twice (out, groups) -> (out, in)."""
    rows, groups = scale.shape
    wide = torch.promote_types(torch.float32, dtype)
    codes = unpack_int4(stored).to(wide).view(rows, groups, -1)
    numbers = codes.mul_(scale.to(wide)[..., None]).add_(zero.to(wide)[..., None])
    return numbers.view(rows, -1).to(dtype)


class GroupwiseLinear(RowwiseLinear):
    """y = x W^T + b over INT4 codes in groups: the place of an nn.Linear in a quantized model.

    weight                    int8 (out, in / 2), two columns per byte as in RowwiseLinear; never trained
    weight_scale, weight_zero fp16 (out, in / group): fp16 takes half the room of fp32 and holds every number that
                              `quantize_weight` chooses
    bias                      float (out,) or None
    The input decides the precision; gradients reach the input and the bias.

    As in RowwiseLinear the first few-row call of bf16 brings the codes into the order of torch's kernel (dtype uint8 on a
    CPU, int32 on a CUDA device), and here scales and zero points too (then bf16, without loss); state_dict() has the
    layout above.
    """

    weight_zero: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tiled: bool = True,
    ) -> None:
        """Empty codes and scales, to be filled from a checkpoint; `dtype` is the bias's."""
        if group_for(in_features, group) != group:
            raise GLMError(
                f"{in_features} columns cannot be divided into groups of {group}.", "Choose INT4 or INT8."
            )
        super().__init__(in_features, out_features, BITS, bias, device, dtype, tiled)
        self.group = group
        for name in SCALES:
            empty = torch.empty(out_features, in_features // group, dtype=torch.float16, device=device)
            setattr(self, name, quantization._frozen(empty))
        self._pairs: Tensor | None = (
            None  # (groups, out, 2) bf16, which scales and zero points are then views of
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = BITS, group: int = GROUPS[-1]) -> GroupwiseLinear:
        """The quantized form of a float layer; shares its bias."""
        made = cls(linear.in_features, linear.out_features, group, bias=False, device="meta")
        made.put(*quantize_weight(linear.weight, group))
        made.bias = linear.bias
        return made.train(linear.training)

    def put(self, stored: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Set codes, scales and zero points."""
        self._pairs = None
        self.weight, self.weight_scale, self.weight_zero = map(quantization._frozen, (stored, scale, zero))

    def coded(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return dict(zip(("weight", *SCALES), quantize_weight(weight, self.group), strict=True))

    def scales(self) -> dict[str, Tensor]:
        """`weight_scale` and `weight_zero` (out, groups) as they are stored."""
        found = {name: getattr(self, name).detach() for name in SCALES}
        return found if self._pairs is None else {name: one.half() for name, one in found.items()}

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight (rows, columns)."""
        found = self.scales()
        return dequantize(self.stored(), found["weight_scale"], found["weight_zero"], dtype)

    def _forward(self, x: Tensor) -> Tensor:
        serves = self._kernel_serves(x)
        if serves and self._for_own and (own := self._own()):
            return self._by_own(own, x)
        out = self._by_kernel(x) if serves else self._by_blocks(x)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype)

    def _by_blocks(self, x: Tensor) -> Tensor:
        # Zero points multiply the sum of a group's inputs, which costs less than adding them to its weights.
        dtype = quantization._computed_in(x)
        wide = torch.promote_types(torch.float32, x.dtype)
        sums = x.view(x.shape[0], self.in_features // self.group, self.group).sum(-1, dtype=wide)
        out = F.linear(sums, self.weight_zero.detach().to(wide))
        x = self._order(x).to(dtype)
        for rows, numbers in self._blocks(dtype):
            out[:, rows] += F.linear(x, numbers)
        return out

    def _backward(self, grad: Tensor) -> Tensor:
        dtype = quantization._computed_in(grad)
        wide = torch.promote_types(torch.float32, grad.dtype)
        total = grad.new_zeros(grad.shape[0], self.in_features, dtype=wide)
        for rows, numbers in self._blocks(dtype):
            total += grad[:, rows].to(dtype) @ numbers
        total = self._order_back(total)
        total.view(grad.shape[0], self.in_features // self.group, self.group).add_(
            (grad.to(wide) @ self.weight_zero.detach().to(wide))[..., None]
        )
        return total.to(grad.dtype)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of codes * scale (n, in), columns as `_order` puts them; each block overwrites the last one."""
        scales = self.weight_scale.detach()
        groups = scales.shape[1]
        blocks = self._fragment_blocks(dtype) if self.weight.dtype == torch.int32 else super()._blocks(dtype)
        for rows, codes in blocks:
            scale = scales[rows].to(dtype)
            if self.weight.dtype == torch.uint8:  # columns in order, rows beside each other in memory
                codes.t().view(groups, self.group, -1).mul_(scale.t().contiguous()[:, None])
            else:  # the even columns of all groups, then the odd ones
                codes.view(-1, 2, groups, self.group // 2).mul_(scale[:, None, :, None])
            yield rows, codes

    def _kernel_serves(self, x: Tensor) -> bool:
        few = {"cpu": self._few_rows(), "cuda": FEW_ROWS_CUDA}.get(x.device.type, 0)
        if x.dtype != torch.bfloat16 or not 0 < x.shape[0] <= few:
            return False
        own = x.device.type == "cpu" and bool(self._own()) and (self.tiled or self._for_own)
        if x.device.type == "cuda":
            tile = CUDA_ROWS if cuda_kernel(x.device) else 0
        else:
            tile = quantization.int4_tile() if int4_kernel() else 0
        if not own and (not tile or self.out_features % tile):
            return False
        if self.weight.dtype == torch.int8 and self.tiled:
            self._tile()
        return self._pairs is not None and self._for_own == own

    @property
    def _kind(self) -> kernels.Kind:
        return "int4 groups"

    def _by_own(self, own: kernels.Kernels, x: Tensor) -> Tensor:
        assert self._pairs is not None
        return own(
            self._kind, x, self.weight.data_ptr(), self.out_features, self._pairs, None, self.bias, self.group
        )

    def _by_kernel(self, x: Tensor) -> Tensor:
        assert self._pairs is not None
        weight = self.weight.detach()
        product = torch._weight_int4pack_mm if weight.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        out: Tensor = product(x.contiguous(), weight, self.group, self._pairs)
        return out

    def stored(self) -> Tensor:
        """The codes, int8 (out, in / 2)."""
        return from_fragments(self.weight.detach()) if self.weight.dtype == torch.int32 else super().stored()

    def _fragment_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """As RowwiseLinear._blocks, from the order of the kernel for CUDA."""
        weight, columns = self.weight.detach(), self.in_features
        step = min(max(1, quantization.BLOCK_CODES_ELSEWHERE // columns // CUDA_ROWS), weight.shape[0])
        scratch = torch.empty(step * CUDA_ROWS, columns, dtype=dtype, device=weight.device)
        for start in range(0, weight.shape[0], step):
            stored = from_fragments(weight[start : start + step])
            rows = slice(start * CUDA_ROWS, start * CUDA_ROWS + stored.shape[0])
            yield rows, quantization._numbers(stored, scratch[: stored.shape[0]], BITS)

    def _tile(self) -> None:
        with quantization._TILING, torch.inference_mode(False), torch.no_grad():
            if self.weight.dtype != torch.int8:
                return
            found = [one.t() for one in self.scales().values()]
            pairs = torch.stack(found, -1).bfloat16()
            if not torch.equal(pairs.half(), torch.stack(found, -1)):
                self.tiled = False  # numbers of another origin, which bf16 would round
                return
            weight = self.weight.detach()
            if weight.is_cuda:
                tiled = to_fragments(weight)
            else:
                self._for_own = bool(self._own())
                tiled = quantization._in_tiles(weight, self.bits, self._for_own)
            self._pairs = pairs
            self.weight_scale, self.weight_zero = (quantization._frozen(one.t()) for one in pairs.unbind(-1))
            self.weight = quantization._frozen(tiled)

    def _release(self) -> None:
        if self._pairs is not None:
            self.put(self.stored(), *(one.contiguous() for one in self.scales().values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._release()
        kept = {id(self.weight_scale), id(self.weight_zero)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return nn.Module._apply(self, move, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._pairs is not None:
            destination[f"{prefix}weight"] = self.stored()
            for name, value in self.scales().items():
                destination[f"{prefix}{name}"] = value.contiguous()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"


def joined(layers: Sequence[GroupwiseLinear]) -> GroupwiseLinear | None:
    """One layer that gives the outputs of some side by side; None where their groups, columns or biases differ."""
    first = layers[0]
    if len({(one.in_features, one.group, one.bias is None) for one in layers}) != 1:
        return None
    rows = sum(one.out_features for one in layers)
    whole = GroupwiseLinear(first.in_features, rows, first.group, bias=False, device="meta")
    scales = [one.scales() for one in layers]
    whole.put(
        torch.cat([one.stored() for one in layers]),
        *(torch.cat([one[name] for one in scales]) for name in SCALES),
    )
    biases = [one.bias.detach() for one in layers if one.bias is not None]
    whole.bias = quantization._frozen(torch.cat(biases)) if biases else None
    return whole.eval()


def quantize(model: nn.Module, group: int, progress: quantization.Progress | None = None) -> nn.Module:
    """Turn a float model's linear layers into INT4 with groups of at most so many columns, in place; returns the model.

    A layer whose columns no group divides becomes row-wise INT4 (`fallbacks` counts them). Layer by layer: each float
    weight is freed before the next is touched. GLMError where nothing can be quantized.
    """
    paths = quantization._fitting(model, BITS)
    for done, path in enumerate(paths, start=1):
        linear: Any = model.get_submodule(path)
        size = group_for(linear.in_features, group)
        try:
            made = (
                GroupwiseLinear.from_linear(linear, BITS, size)
                if size
                else RowwiseLinear.from_linear(linear, BITS)
            )
        except GLMError as error:
            raise GLMError(f"{path}: {error.message}", error.todo) from error
        model.set_submodule(path, made)
        del linear
        if progress is not None:
            progress(done, len(paths))
    return model


def replace_linears(model: nn.Module, group: int) -> nn.Module:
    """Put empty layers where `quantize` would put filled ones, in place, for stored codes to be loaded."""
    for path in quantization._fitting(model, BITS):
        old: Any = model.get_submodule(path)
        size = group_for(old.in_features, group)
        given = (old.bias is not None, old.weight.device, old.weight.dtype)
        new = (
            GroupwiseLinear(old.in_features, old.out_features, size, *given)
            if size
            else RowwiseLinear(old.in_features, old.out_features, BITS, *given)
        )
        model.set_submodule(path, new.train(old.training))
    return model


def fallbacks(model: nn.Module, group: int) -> tuple[int, int, int]:
    """Of a model quantized in groups: (layers with a smaller group, row-wise layers, all)."""
    layers = [one for one in model.modules() if isinstance(one, RowwiseLinear)]
    smaller = sum(isinstance(one, GroupwiseLinear) and one.group != group for one in layers)
    return smaller, sum(not isinstance(one, GroupwiseLinear) for one in layers), len(layers)


# ---- torch's INT4 kernels, and whether this machine's compute with groups as they are stored here ----


def to_fragments(stored: Tensor) -> Tensor:
    """Codes int8 (out, in / 2) -> int32 (out / 8, in / (16 k), 32, k / 2), the order of torch's kernel for CUDA."""
    columns = 2 * stored.shape[1]
    tiles = next(count for count in (8, 4, 2) if columns % (16 * count) == 0)
    plus_eight = (stored.view(torch.uint8) ^ 0x88).contiguous()  # two's complement of 4 bits -> code + 8
    return torch._convert_weight_to_int4pack(plus_eight, tiles)


def from_fragments(packed: Tensor) -> Tensor:
    """The inverse of `to_fragments`, for any device.

    A thread's int32 has the bytes t, t + 4, t + 8 and t + 12 (t its place among 4) of 16 neighbours in a row: their high
    halves in the lower 16 bits, their low halves in the upper ones. Source: matrix_to_m16n8k16_Bint4_layout in torch's
    aten/src/ATen/native/cuda/int4mm.cu.
    """
    rows, outer, _, inner = packed.shape
    b0, b1, b2, b3 = packed.contiguous().view(torch.uint8).view(rows, outer, 8, 4, inner, 4).unbind(-1)
    four = (
        ((b0 & 15) << 4) | (b2 & 15), (b0 & 0xF0) | (b2 >> 4), ((b1 & 15) << 4) | (b3 & 15), (b1 & 0xF0) | (b3 >> 4),
    )  # fmt: skip
    found = torch.stack(four, -1)  # (row tiles, outer, 8 rows, t, inner, 4)
    return (found.permute(0, 2, 1, 4, 5, 3).reshape(rows * 8, -1) ^ 0x88).view(torch.int8)


@lru_cache(maxsize=8)
def cuda_kernel(device: torch.device) -> bool:
    """Whether torch's INT4 kernel for CUDA orders the codes as `from_fragments` undoes it, and computes right."""
    x, stored, pairs, expected = (one.to(device) for one in _trial())
    try:
        packed = to_fragments(stored)
        out = torch._weight_int4pack_mm(x, packed, 32, pairs)
        return torch.equal(from_fragments(packed), stored) and torch.equal(out.float(), expected)
    except (
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ):  # private functions of torch; older devices lack them
        return False


def _trial() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, codes, scales with zero points, and products that are small whole numbers, exact in bf16."""
    numbers = torch.arange(128 * 64)
    codes = (numbers * 7919 % 16 - 8).to(torch.int8).view(128, 64)
    pairs = torch.stack((numbers[: 2 * 128] % 5 + 1, numbers[: 2 * 128] % 7 - 3), -1).view(2, 128, 2)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 62], x[2, 1], x[2, 33] = 1, -1, 1, 1
    scale, zero = (one.t().float() for one in pairs.unbind(-1))
    stored = pack_int4(codes)
    return x, stored, pairs.bfloat16(), x.float() @ dequantize(stored, scale, zero).t()


@lru_cache(maxsize=1)
def int4_kernel() -> bool:
    """Whether torch's INT4 kernel uses scales and zero points of groups here as this module stores them."""
    tile = quantization.int4_tile()
    if not tile:
        return False
    x, stored, pairs, expected = _trial()
    try:
        tiled = quantization._tile(stored, tile)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiled, 32, pairs)
    except (AttributeError, RuntimeError, NotImplementedError):  # a private function of torch
        return False
    return torch.equal(out.float(), expected)
