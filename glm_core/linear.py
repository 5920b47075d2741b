"""Linear layers for inference on a CPU, their weights laid out once the way oneDNN multiplies them.

torch's own product lays a bf16 weight out anew in every call and gives fp32 to a library that is slow on some
processors; a weight in oneDNN's blocks is read once per call and no more. The operators are private to torch, so they
are tried before they are used, and what they cannot serve is computed as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import groupwise
from .groupwise import GroupwiseLinear
from .quantization import RowwiseLinear, quantize_weight, unpack_int4

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's blocks, the place of an nn.Linear that is not trained.

    `weight` is a copy in the plain layout, bit for bit the one that was packed; state_dict() has it as well.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack a float weight (out, in) on the CPU; the bias is shared."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in the plain layout, written anew at every look."""
        return self._packed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
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
    ZERO = 128

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        with torch.inference_mode(False), torch.no_grad():
            self._packed: Tensor = torch.ops.onednn.qlinear_prepack(codes.detach().contiguous(), None)
            self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.weight_scale = nn.Parameter(scale.detach().float(), False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))

    def stored(self) -> Tensor:
        """The codes, int8 (out, in)."""
        return self._packed.to_dense().t().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.out_features * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        largest = torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True, dtype=torch.float32)
        largest.clamp_min_(torch.finfo(torch.float32).tiny * self.ZERO)  # a row of zeros stays zeros
        codes = (
            (rows * (127 / largest)).add_(self.ZERO + 0.5).to(torch.uint8)
        )  # cut off: rounded to the nearest
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, self.ZERO, self._packed, self.weight_scale, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        out *= largest / 127
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

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
    whole.weight = nn.Parameter(torch.cat([one.stored() for one in codes]), False)
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
