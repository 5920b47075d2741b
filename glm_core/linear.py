"""Linear layers for inference on a CPU, their weights laid out once the way oneDNN multiplies them.

torch's own product lays a bf16 weight out anew in every call and gives fp32 to a library that is slow on some
processors; a weight in oneDNN's blocks is read once per call and no more. The operators are private to torch, so they
are tried before they are used, and what they cannot serve is computed as always.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import groupwise, kernels
from .groupwise import GroupwiseLinear
from .kernels import HALF_ABOVE, MOST_ROWS, SMALLEST, TILE, ZERO
from .quantization import RowwiseLinear, amx, quantize_weight, unpack_int4

DTYPES = (torch.float32, torch.bfloat16)
FEW_ROWS = 8  # up to which the product's time is that of reading the weight
COMPILED_ROWS = (
    64  # up to which the compiled kernels multiply 8 bits faster than oneDNN, by 5 to 25 %, or as fast
)
ROWS_AT_ONCE = 256  # in 8 bits; what is made on the way then stays in memory that is used again
TRIAL_BYTES = 128 << 20  # more than most caches hold; also of a model for which a trial is worth its time
CLEARLY = 0.95  # more rows have to take at most this share of the time of fewer: measurements are noisy

Rows = tuple[int, ...]  # [n]: how many rows to compute for n; a count without an entry stays


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's blocks, the place of an nn.Linear that is not trained.

    `weight` is a copy in the plain layout, bit for bit the one that was packed; state_dict() has it as well.
    """

    bias: nn.Parameter | None
    rows: Rows = ()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack a float weight (out, in) on the CPU; the bias is shared."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._kind: kernels.Kind = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        alike = bias is None or bias.dtype == weight.dtype
        self.few = alike and in_tiles(self._kind, self._packed, weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in the plain layout, written anew at every look."""
        return self._packed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what a few rows will need, so that no answer waits for it; only the weight's dtype does."""
        if self.few and dtype == self.dtype and (own := kernels.kernels()):
            own.make(self._kind, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        n = x.numel() // self.in_features
        if self.few and 0 < n <= MOST_ROWS and (own := kernels.kernels()):
            address = torch.ops.mkldnn.data_ptr(self._packed)
            out: Tensor = own(
                self._kind, x.reshape(n, self.in_features), address, self.out_features, None, None, self.bias
            )
            return out.view(*x.shape[:-1], self.out_features)
        if n < len(self.rows) and (most := self.rows[n]) != n:
            wide = F.pad(x.reshape(n, self.in_features), (0, 0, 0, most - n))
            out = torch.ops.mkldnn._linear_pointwise(wide, self._packed, self.bias, "none", [], "")
            return out[:n].view(*x.shape[:-1], self.out_features)
        out = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class DynamicLinear(nn.Module):
    """y = x W^T + b over INT8 codes with the activations in 8 bits too, each row with a scale of its own.

    The products are integers and their sums exact; what is lost is the rounding of x to 255 levels of its row's
    largest value. codes int8 (out, in), scale (out,); the bias is float. Activations go in as unsigned numbers around
    128: for signed ones oneDNN has no fast product. Source of the scheme: W8A8 with per-token scales, as in Dettmers
    et al. 2022 without the outliers' part.
    """

    bias: nn.Parameter | None
    rows: Rows = ()

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        with torch.inference_mode(False), torch.no_grad():
            self._packed: Tensor = torch.ops.onednn.qlinear_prepack(codes.detach().contiguous(), None)
            self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
            self.few = in_tiles("int8 dynamic", self._packed, codes)
            self._sums = codes.sum(-1, dtype=torch.int32) * -ZERO if self.few else None
        self.weight_scale = nn.Parameter(scale.detach().float(), False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))

    def stored(self) -> Tensor:
        """The codes, int8 (out, in)."""
        return self._packed.to_dense().t().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.out_features * self.in_features

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what a few rows of `dtype` will need, so that no answer waits for it."""
        if self.few and dtype in DTYPES and (own := kernels.kernels()):
            own.make("int8 dynamic", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        most = MOST_ROWS if amx() else COMPILED_ROWS
        if self.few and 0 < len(rows) <= most and x.dtype in DTYPES and (own := kernels.kernels()):
            address = torch.ops.mkldnn.data_ptr(self._packed)
            out = own(
                "int8 dynamic", rows, address, self.out_features, self.weight_scale, self._sums, self.bias
            )
        elif len(rows) == 1 and x.dtype in DTYPES:
            out = self._single(rows)
        else:
            out = x.new_empty(len(rows), self.out_features)
            parts = max(1, -(-len(rows) // ROWS_AT_ONCE))
            for part, target in zip(rows.chunk(parts), out.chunk(parts), strict=True):
                self._product(part, target)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor, out: Tensor) -> None:
        """(n, in) -> (n, out)."""
        if self.few and out.dtype in DTYPES and (own := kernels.kernels()):
            codes, worth = own.encode(rows)
            own.scale(self._multiply(codes, 1.0, torch.float32), worth, self.bias, out)
            return
        largest = rows.abs().amax(-1, keepdim=True).float()
        largest.clamp_min_(SMALLEST)
        codes = (rows * (127 / largest)).add_(HALF_ABOVE).to(torch.uint8)
        sums = self._multiply(codes, 1.0, torch.float32)
        if self.bias is None:
            torch.mul(sums, largest.div_(127), out=out)
        else:
            torch.addcmul(self.bias.float(), sums, largest.div_(127), out=out)

    def _single(self, row: Tensor) -> Tensor:
        """(1, in) -> (1, out) in the dtype of the row: the same with fewer operations, which cost more than they do."""
        largest = max(float(row.abs().max()), SMALLEST)
        codes = row.float().mul(127 / largest).add_(HALF_ABOVE).to(torch.uint8)
        if self.bias is None:
            return self._multiply(codes, largest / 127, row.dtype)
        return self._multiply(codes, largest / 127, torch.float32).add_(self.bias).to(row.dtype)

    def _multiply(self, codes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Unsigned codes (n, in) around ZERO, each worth `scale` -> (n, out)."""
        n = len(codes)
        if n < len(self.rows) and (most := self.rows[n]) != n:
            codes = F.pad(codes, (0, 0, 0, most - n))
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, ZERO, self._packed, self.weight_scale, self._zeros, None, 1.0, 0, dtype, "none", [], "",
        )  # fmt: skip
        return out[:n]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.stored()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


Whole = PackedLinear | DynamicLinear | RowwiseLinear


class Part(nn.Module):
    """Some output rows of a layer that was joined with its neighbours; computes all of them and keeps its own.

    For those who call the layers one by one. `whole` is the joined layer, `rows` its own.
    """

    whole: Whole

    def __init__(self, whole: Whole, rows: slice) -> None:
        super().__init__()
        self.__dict__["whole"] = whole  # not a child: it is not this layer's alone
        self.rows = rows
        self.in_features, self.out_features = whole.in_features, rows.stop - rows.start

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.whole(x)
        return out[..., self.rows]

    @property
    def weight(self) -> Tensor:
        """Its rows of the weight, or of the stored codes."""
        whole = self.whole
        return (whole.weight if isinstance(whole, PackedLinear) else whole.stored())[self.rows]

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.whole.bias
        return None if bias is None else bias[self.rows]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if not isinstance(self.whole, PackedLinear):
            destination[f"{prefix}weight_scale"] = self.whole.weight_scale.detach()[self.rows]
        if isinstance(self.whole, GroupwiseLinear):
            for name, value in self.whole.scales().items():
                destination[f"{prefix}{name}"] = value[self.rows]
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach()


def joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer that gives the outputs of some side by side; None where they are not of one plain kind.

    Their own weights are not freed: put a `Part` in the place of each.
    """
    plain = [one for one in layers if type(one) is nn.Linear]
    if len(plain) == len(layers):
        if len({(one.weight.dtype, one.bias is None) for one in plain}) != 1:
            return None
        weight = torch.cat([one.weight.detach() for one in plain])
        biases = [one.bias for one in plain]
        bias = None if biases[0] is None else torch.cat([one.detach() for one in biases])
        if packs(weight):
            return PackedLinear(weight, bias)
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight, False)
        made.bias = None if bias is None else nn.Parameter(bias, False)
        return made.eval()
    groups = [one for one in layers if type(one) is GroupwiseLinear]
    if groups and len(groups) == len(layers):
        return groupwise.joined(groups)
    codes = [one for one in layers if type(one) is RowwiseLinear]
    if (
        len(codes) != len(layers)
        or len({(one.bits, one.bias is None, one.weight_scale.dtype) for one in codes}) != 1
    ):
        return None
    first = codes[0]
    rows = sum(one.out_features for one in codes)
    whole = RowwiseLinear(first.in_features, rows, first.bits, bias=False, device="meta")
    # Whole tiles stay as they are.
    whole._for_own = all(one._for_own and one.weight.dtype == torch.uint8 for one in codes)
    parts = [one.weight.detach() if whole._for_own else one.stored() for one in codes]
    whole.weight = nn.Parameter(torch.cat(parts), False)
    whole.weight_scale = nn.Parameter(torch.cat([one.weight_scale.detach() for one in codes]), False)
    if first.bias is not None:
        whole.bias = nn.Parameter(
            torch.cat([one.bias.detach() for one in codes if one.bias is not None]), False
        )
    return whole.eval()


def join(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """Join neighbouring layers of a module in place: a `Part` each where they were; the whole, or None."""
    layers = [parent.get_submodule(name) for name in names]
    if all(type(one) is Part for one in layers):
        first: Any = layers[0]
        return first.whole  # type: ignore[no-any-return]
    whole = joined(layers)
    if whole is None:
        return None
    start = 0
    for name, layer in zip(names, layers, strict=True):
        end = start + int(layer.out_features)  # type: ignore[arg-type]
        setattr(parent, name, Part(whole, slice(start, end)))  # type: ignore[arg-type]
        start = end
    return whole


def packs(weight: Tensor) -> bool:
    """Whether a weight can be packed here."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and works(weight.dtype)


def pack(model: nn.Module) -> int:
    """Pack a model's plain linear layers in place, each freed before the next; how many bytes of weights were packed.

    Left as they are: layers of other devices and dtypes, and an output head that shares the embedding's weight, which
    packing would double.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and packs(module.weight) and id(module.weight) not in shared
    ]
    total = 0
    for path in paths:
        linear: Any = model.get_submodule(path)
        made = PackedLinear(linear.weight, linear.bias)
        model.set_submodule(path, made.train(linear.training))
        total += made.nbytes
        del linear
    return total


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile and try what a laid out model's layers need for a few rows of `dtype`, so that no answer waits for it."""
    kernels.kernels()  # norms use them, too
    layers = {id(one): one for one in model.modules()}
    layers |= {id(one.whole): one.whole for one in layers.values() if isinstance(one, Part)}
    for one in layers.values():
        if isinstance(one, PackedLinear | DynamicLinear | RowwiseLinear):
            one.prepare(dtype)
    packed = [one for one in layers.values() if isinstance(one, PackedLinear | DynamicLinear) and not one.few]
    if sum(one.nbytes for one in packed) < TRIAL_BYTES:
        return
    for one in packed:
        one.rows = fastest_rows(one.dtype if isinstance(one, PackedLinear) else torch.int8)


@lru_cache(maxsize=len(DTYPES) + 1)
def fastest_rows(dtype: torch.dtype) -> Rows:
    """For 0 to 8 rows the number of rows, not fewer, whose product with a large weight takes the least time here.

    oneDNN takes another kernel for some numbers of rows: with six it reads a weight up to a third faster than with
    one (Zen 4, oneDNN of torch 2.13). Takes about a second (0.8 to 1.5 s there), once in a process.
    """
    columns = 4096
    weights = TRIAL_BYTES // columns // dtype.itemsize
    layer: PackedLinear | DynamicLinear
    if dtype == torch.int8:
        layer = DynamicLinear(torch.ones(weights, columns, dtype=dtype), torch.ones(weights), None)
    else:
        layer = PackedLinear(torch.ones(weights, columns, dtype=dtype), None)
    given = torch.ones(FEW_ROWS, columns, dtype=torch.float32 if dtype == torch.int8 else dtype)

    def seconds(rows: int) -> float:
        started = time.perf_counter()
        layer(given[:rows])
        return time.perf_counter() - started

    with torch.inference_mode():
        return least_time(seconds)


def least_time(seconds: Callable[[int], float], rounds: int = 5) -> Rows:
    """From the time that a number of rows takes, by the median of some rounds, for 0 to 8 the best number above."""
    counts = range(1, FEW_ROWS + 1)
    taken: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(rounds + 1):
        for n in counts:
            taken[n].append(seconds(n))
    medians = {n: statistics.median(times[1:]) for n, times in taken.items()}  # the first one warms up

    def best(n: int) -> int:
        other = min(range(n, FEW_ROWS + 1), key=medians.__getitem__)
        return other if medians[other] <= CLEARLY * medians[n] else n

    return (0, *map(best, counts))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; packed ones, and those of joined layers, are no parameters of the model."""
    total = _parameter_bytes(model)
    wholes = {id(one.whole): one.whole for one in model.modules() if isinstance(one, Part)}
    total += sum(_parameter_bytes(whole) for whole in wholes.values())
    packed = [
        one for one in (*model.modules(), *wholes.values()) if isinstance(one, PackedLinear | DynamicLinear)
    ]
    return total + sum(one.nbytes for one in packed)


def dynamic(model: nn.Module) -> int:
    """Let a model's INT8 and INT4 layers, and a head of its own, take 8-bit activations; how many layers do.

    In place, each layer freed before the next. INT4 codes are INT8 codes with the same scale, at twice the size.
    """
    count = 0
    parts: dict[int, list[Part]] = {}
    for module in model.modules():
        if isinstance(module, Part) and type(module.whole) is RowwiseLinear:
            parts.setdefault(id(module.whole), []).append(module)
    for some in parts.values():
        whole = _dynamic(some[0].whole)
        for part in some:
            part.__dict__["whole"] = whole
        count += 1
    for path, module in list(model.named_modules()):
        if type(module) is RowwiseLinear and module.weight.device.type == "cpu":
            model.set_submodule(path, _dynamic(module).train(module.training))
            count += 1
    holder: Any = model
    head: Any = holder.get_output_embeddings() if hasattr(holder, "get_output_embeddings") else None
    own = type(head) is nn.Linear and head.weight is not holder.get_input_embeddings().weight
    if own and head.weight.device.type == "cpu":
        codes, scale = quantize_weight(head.weight, 8)
        holder.set_output_embeddings(DynamicLinear(codes, scale, head.bias).train(head.training))
        count += 1
    return count


def _dynamic(layer: Any) -> DynamicLinear:
    codes = layer.stored() if layer.bits == 8 else unpack_int4(layer.stored())
    return DynamicLinear(codes, layer.weight_scale, layer.bias)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def in_tiles(kind: kernels.Kind, packed: Tensor, weight: Tensor) -> bool:
    """Whether a packed weight stands in memory as the kernels for few rows read it.

    oneDNN chooses and tells nobody: its first, middle and last tile are compared with those of the plain weight.
    """
    rows, columns = weight.shape
    if not kernels.serve(kind, rows, columns):
        return False
    extra = 4 * rows if kind == "int8 dynamic" else 0  # which oneDNN adds behind the codes
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes + extra:
        return False
    size = TILE * columns * weight.itemsize
    for tile in {0, rows // TILE // 2, rows // TILE - 1}:
        place = torch.ops.mkldnn.data_ptr(packed) + tile * size
        found = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=weight.dtype)
        plain = weight[tile * TILE : (tile + 1) * TILE].detach()
        if not torch.equal(found, kernels.in_tiles(plain).view(-1)):
            return False
    return True


@lru_cache(maxsize=len(DTYPES))
def works(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN operators give a right product here and give the weight back."""
    numbers = torch.arange(48 * 32) * 7919 % 31 - 15
    weight = numbers.view(48, 32).to(dtype)
    x = (torch.arange(3 * 32) * 104729 % 7 - 3).view(3, 32).to(dtype)
    bias = torch.arange(48).to(dtype)
    try:
        made = PackedLinear(weight, bias)
        out, back = made(x), made.weight
    except (AttributeError, RuntimeError, NotImplementedError):  # private functions of torch
        return False
    exact = (x.double() @ weight.double().t() + bias.double()).to(dtype)
    return torch.equal(back, weight) and torch.allclose(out.double(), exact.double(), rtol=2**-7, atol=0)


@lru_cache(maxsize=1)
def dynamic_works() -> bool:
    """Whether torch's oneDNN product of 8-bit numbers is right here and gives the codes back."""
    codes = (torch.arange(48 * 32) * 7919 % 255 - 127).to(torch.int8).view(48, 32)
    x = (torch.arange(3 * 32) * 104729 % 255 - 127).view(3, 32).float()
    x[:, 0] = 127  # so that every row's scale is 1
    scale = torch.arange(1, 49) / 64
    try:
        made = DynamicLinear(codes, scale, None)
        out, back = made(x), made.stored()
    except (AttributeError, RuntimeError, NotImplementedError):  # private functions of torch
        return False
    exact = (x.double() @ codes.double().t()) * scale.double()
    return torch.equal(back, codes) and torch.allclose(out.double(), exact, rtol=1e-6, atol=0)
