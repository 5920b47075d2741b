"""Kernels compiled for this processor: their products, and that torch's take their place wherever they cannot serve."""

from __future__ import annotations

import copy
import gc
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glm_core import groupwise, kernels, linear, quantization
from glm_core.errors import GLMError
from glm_core.groupwise import GroupwiseLinear
from glm_core.quantization import RowwiseLinear

needs_kernels = pytest.mark.skipif(
    kernels.kernels() is None, reason=f"this processor's products are {kernels.state()}"
)
SHAPES = [(64, 32), (128, 96), (192, 416), (640, 1024)]
NAMES = ("packed", "single", "dynamic", "int8", "int4", "int4-g32", "int4-g128")


@pytest.fixture(autouse=True)
def serves_small_weights(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_BYTES", 1)


@pytest.fixture()
def calls(monkeypatch):
    """The kinds that were computed by the kernels."""
    seen: list[str] = []
    real = kernels.Kernels.__call__

    def noted(self, kind, *args):
        seen.append(kind)
        return real(self, kind, *args)

    monkeypatch.setattr(kernels.Kernels, "__call__", noted)
    return seen


def layer(
    name: str, rows: int, columns: int, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    torch.manual_seed(rows + columns)
    plain = nn.Linear(columns, rows, bias).to(torch.float32 if name == "single" else dtype)
    if name in ("packed", "single"):
        return linear.PackedLinear(plain.weight, plain.bias)
    if name == "dynamic":
        codes = RowwiseLinear.from_linear(plain, 8)
        return linear.DynamicLinear(codes.stored(), codes.weight_scale, codes.bias)
    if name in ("int4", "int8"):
        return RowwiseLinear.from_linear(plain, int(name[3:]))
    return GroupwiseLinear.from_linear(plain, 4, groupwise.group_for(columns, int(name[6:])))


def some(name: str, *shape: int) -> torch.Tensor:
    """Numbers as a layer of this name takes them for its kernel."""
    return torch.randn(shape).to(torch.float32 if name == "single" else torch.bfloat16)


def exact(one: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The product in fp64, with the numbers that the layer has."""
    weight = one.weight if isinstance(one, linear.PackedLinear) else one.dequantized()
    out = x.double() @ weight.double().t()
    return out if one.bias is None else out + one.bias.double()


def without(one: nn.Module, x: torch.Tensor, monkeypatch) -> torch.Tensor:
    """What torch's own kernels give."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_found", [(None, "")])
        return one(x)


def test_a_processor_that_can_has_them():
    """Where a mistake switches them off the other tests are skipped."""
    llvm = pytest.importorskip("llvmlite.binding")
    features = llvm.get_host_cpu_features()
    if sys.platform != "linux" or not all(features.get(name) for name in kernels.FEATURES):
        pytest.skip("no AVX-512 with bf16")
    assert kernels.state() == f"compiled for {llvm.get_host_cpu_name()}"


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["packed", "single", "int8", "int4", "int4-g32", "int4-g128"])
@torch.inference_mode()
def test_products_are_those_of_the_weights_whatever_the_number_of_rows(name, bias, calls):
    for rows, columns in SHAPES:
        if name == "int4-g128" and columns % 128:
            continue
        one = layer(name, rows, columns, bias)
        for n in (*range(1, 10), 17):
            x = some(name, n, columns)
            right, before = exact(one, x), len(calls)
            # fp32 sums, rounded once to bf16; and what fp32 loses where large numbers cancel
            rounding, lost = (1e-7, 1e-6) if name == "single" else (2**-8, 1e-5)
            allowed = rounding * right.abs() + lost * (x.abs().double().sum(-1, keepdim=True))
            assert bool(((one(x).double() - right).abs() <= allowed).all()), (rows, columns, n)
            assert (len(calls) > before) == (name not in ("packed", "single") or n <= kernels.MOST_ROWS)


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32", "int4-g128"])
def test_codes_in_their_own_order_are_the_same_layer(name):
    """What is stored, products in fp32 and of many rows, and gradients are those of the released order."""
    one = layer(name, 192, 512)
    other, x = copy.deepcopy(one), torch.randn(3, 512).bfloat16()
    stored = one.stored().clone()
    one(x)
    assert one.weight.dtype == torch.uint8 and one._for_own
    assert torch.equal(one.stored(), stored) and torch.equal(one.state_dict()["weight"], stored)
    for given in (torch.randn(2, 512), torch.randn(quantization.COMPILED_ROWS + 1, 512).bfloat16()):
        torch.testing.assert_close(one(given), other(given), rtol=2**-7, atol=2**-7)
    grown = [given.clone().requires_grad_() for given in (x.float(), x.float())]
    for each, given in zip((one, other), grown, strict=True):
        each(given).square().sum().backward()
    torch.testing.assert_close(grown[0].grad, grown[1].grad)
    one.load_state_dict(other.state_dict())
    assert one.weight.dtype == torch.int8 and torch.equal(one.stored(), stored)


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32"])
@torch.inference_mode()
def test_one_large_input_takes_no_digits_from_those_of_other_groups(name, calls):
    """As trained models have: some channels are hundreds of times as large as the others."""
    plain = nn.Linear(512, 128, False)
    plain.weight[:, :128] = 0
    one = (
        GroupwiseLinear.from_linear(plain, 4, 32)
        if name == "int4-g32"
        else RowwiseLinear.from_linear(plain, 4)
    )
    x = torch.randn(4, 512).bfloat16()
    right = exact(one, x)
    x[:, 3] = 1e4
    torch.testing.assert_close(one(x).double(), right, rtol=2**-8, atol=1e-4)
    assert calls
    small = torch.randn(4, 512).bfloat16() * 1e-30
    torch.testing.assert_close(one(small).double(), exact(one, small), rtol=2**-7, atol=1e-33)
    large = torch.randn(4, 512).bfloat16() * 1e30
    torch.testing.assert_close(one(large).double(), exact(one, large), rtol=2**-7, atol=1e27)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_products_of_8_bit_activations_are_those_of_onednn(dtype, calls, monkeypatch):
    for rows, columns in SHAPES:
        for bias in (True, False):
            one = layer("dynamic", rows, columns, bias, dtype)
            for n in (*range(1, kernels.MOST_ROWS + 2), 64, 300):
                x = (torch.randn(n, columns) * torch.logspace(-3, 3, n)[:, None]).to(dtype)
                x[-1] = 0 if n > 1 else x[-1]
                before = len(calls)
                found, other = one(x), without(one, x, monkeypatch)
                assert len(calls) == before + (one.few and n <= linear.COMPILED_ROWS)
                rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6  # one step of bf16
                torch.testing.assert_close(found, other, rtol=rounding, atol=1e-6)
    assert one.few and set(calls) == {"int8 dynamic"}  # at least the largest one


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", kernels.QUANTIZED_FROM)
def test_codes_and_scales_of_weights_are_torchs_bit_for_bit(dtype, bits, monkeypatch):
    torch.manual_seed(bits)
    weight = torch.randn(300, 176) * torch.logspace(-9, 4, 300)[:, None]  # fp16 ends at 6e-8 and 65,504
    weight[7] = 0
    weight[8] = torch.arange(176) % 15 - 7  # on the codes and, halved, between them
    weight[9] = weight[8] / 2
    weight[9, 0] = 7
    weight = weight.to(dtype)
    stored, scale = quantization.quantize_weight(weight, bits)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_found", [(None, "")])
        right = quantization.quantize_weight(weight, bits)
    assert torch.equal(stored, right[0]) and torch.equal(scale, right[1])
    for bad in (float("nan"), 7e4):
        wrong = weight.clone()
        wrong[5, 3] = bad
        with pytest.raises(GLMError, match="which fp16 cannot hold"):
            quantization.quantize_weight(wrong, bits)


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_coded_into_tiles_as_its_codes_would_be(bits, monkeypatch):
    monkeypatch.setattr(quantization, "ROWS_AT_ONCE", 128)
    for rows, columns in (*SHAPES, (320, 704)):
        plain = nn.Linear(columns, rows)
        right = RowwiseLinear.from_linear(plain, bits)
        stored = right.stored()
        assert torch.equal(kernels.kernels().tiles(stored, bits), kernels.codes_in_tiles(stored, bits))
        one = RowwiseLinear(columns, rows, bits, bias=False, device="meta")
        found = one.coded(plain.weight, torch.bfloat16)
        one.weight, one.weight_scale = (
            nn.Parameter(found[name], False) for name in ("weight", "weight_scale")
        )
        assert one.weight.dtype == torch.uint8 and torch.equal(one.stored(), stored)
        assert torch.equal(one.weight_scale, right.weight_scale)
        right(torch.zeros(1, columns).bfloat16())
        assert torch.equal(one.weight, right.weight)
    # fp32 reads the released order sooner; a weight that another module shares keeps it.
    for dtype, tiled in ((torch.float32, True), (torch.bfloat16, False)):
        one = RowwiseLinear(columns, rows, bits, bias=False, device="meta", tiled=tiled)
        assert torch.equal(one.coded(plain.weight, dtype)["weight"], stored) and not one._for_own


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.inference_mode()
def test_joined_layers_keep_their_tiles(name):
    parts = [layer(name, rows, 128) for rows in (192, 64, 128)]
    stored = torch.cat([one.stored() for one in parts])
    x = torch.randn(2, 128).bfloat16()
    right = torch.cat([one(x) for one in parts], -1)  # which brings their codes into tiles
    whole = linear.joined(parts)
    assert whole._for_own and whole.weight.dtype == torch.uint8 and torch.equal(whole.stored(), stored)
    assert torch.equal(whole(x), right)
    one = layer(name, 64, 128)
    one(x)
    one.load_state_dict(one.state_dict())  # which puts the codes back as they were stored
    mixed = linear.joined([*parts, one])
    assert mixed.weight.dtype == torch.int8 and torch.equal(mixed.stored(), torch.cat((stored, one.stored())))
    assert torch.equal(mixed(x), torch.cat((right, one(x)), -1))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_norms_are_as_exact_as_torchs(dtype):
    own = kernels.kernels()
    for shape in ((1, 16), (7, 48), (2, 3, 512), (40, 4096)):
        x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
        right = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
        found = own.norm(x, weight, 1e-5)
        assert found.dtype == dtype and found.shape == x.shape
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.double(), right, rtol=rounding, atol=1e-9)
        assert torch.equal(own.norm(x[-1:], weight, 1e-5), found[-1:])  # whoever stands beside it
    assert not bool(own.norm(torch.zeros(2, 32, dtype=dtype), torch.ones(32, dtype=dtype), 1e-5).any())


@needs_kernels
@torch.inference_mode()
def test_numbers_that_are_none_are_not_hidden(monkeypatch):
    for name in NAMES:
        one = layer(name, 128, 128)
        for bad in (float("nan"), float("inf")):
            x = some(name, 3, 128)
            x[1, 7] = bad
            out = one(x)
            assert not bool(out[1].isfinite().any()) and bool(out[[0, 2]].isfinite().all()), (name, bad)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_any_number_of_threads_and_callers_gives_the_same(name):
    one, x = layer(name, 640, 512), some(name, 5, 512)
    right, before = one(x), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 12):  # more than there are tiles
            torch.set_num_threads(threads)
            assert torch.equal(one(x), right)
    finally:
        torch.set_num_threads(before)
    found: list[bool] = []

    def call() -> None:
        with torch.inference_mode():
            found.extend(torch.equal(one(x[:n]), right[:n]) for n in (1, 2, 3, 5) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(3)]
    [caller.start() for caller in callers]
    [caller.join() for caller in callers]
    assert len(found) == 3 * 80 and all(found)


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32"])  # oneDNN's weights cannot be copied
@torch.inference_mode()
def test_a_copy_of_a_layer_outlives_the_layer(name):
    one, x = layer(name, 128, 256), torch.randn(2, 256).bfloat16()
    right = one(x)
    other = copy.deepcopy(one)
    del one
    gc.collect()
    torch.randn(1 << 20)
    assert torch.equal(other(x), right)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_other_inputs_and_sizes_are_computed_by_torch(name, calls):
    for rows, columns in ((96, 64), (128, 48)):
        if name.startswith("int4-g") and columns % 32:
            continue
        one = layer(name, rows, columns)
        x = torch.randn(2, columns).bfloat16()
        if isinstance(one, linear.DynamicLinear):
            assert one(x).shape == (2, rows)
        else:
            torch.testing.assert_close(one(x).double(), exact(one, x), rtol=0.02, atol=0.02)
    one = layer(name, 128, 128)
    if name != "dynamic":  # which takes both
        one(torch.randn(2, 128))
    one(torch.randn(0, 128).bfloat16())
    assert one(torch.randn(2, 1, 128).bfloat16()[:, :, ::1]).shape == (2, 1, 128)
    assert len(calls) == 1


@needs_kernels
def test_views_of_larger_tensors_are_read_as_they_are_seen():
    for name in NAMES:
        one, wide = layer(name, 128, 256), some(name, 3, 512)
        with torch.inference_mode():
            assert torch.equal(one(wide[:, ::2]), one(wide[:, ::2].contiguous()))


@needs_kernels
def test_a_weight_that_onednn_orders_otherwise_is_left_to_it(monkeypatch):
    for kind, dtype in kernels.FLOAT.items():
        weight = torch.randn(128, 64).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        assert linear.in_tiles(kind, packed, weight)
        for moved in (
            weight.flip(0),
            weight.flip(1),
            weight[:, torch.arange(64).view(2, 32).t().reshape(-1)],
        ):
            assert not linear.in_tiles(kind, packed, moved)


@needs_kernels
def test_the_kernels_of_a_model_are_compiled_when_it_is_laid_out(calls):
    model = nn.ModuleDict({name: layer(name, 128, 128) for name in NAMES})
    made = kernels.kernels()._made
    linear.prepare(model, torch.bfloat16)
    linear.prepare(model, torch.float32)
    expected = {
        (kind, n, kernels.FLOAT.get(kind, torch.bfloat16))
        for kind in kernels.AT_ONCE
        for n in range(kind in kernels.FLOAT, kernels.MOST_ROWS + 1)
    }
    assert expected <= set(made)
    assert not calls


@pytest.fixture()
def untried(monkeypatch):
    """As in a program that has not looked for kernels yet."""
    monkeypatch.setattr(kernels, "_found", [])


def test_without_llvm_torch_computes(untried, monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert kernels.kernels() is None and kernels.state() == "torch's (llvmlite is not installed)"
    one = layer("int4-g32", 128, 128)
    x = torch.randn(3, 128).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(one(x).double(), exact(one, x), rtol=0.02, atol=0.02)


def test_they_can_be_switched_off(untried, monkeypatch):
    monkeypatch.setenv("GLM_KERNELS", "torch")
    assert kernels.kernels() is None and kernels.state() == "torch's (GLM_KERNELS=torch)"


@needs_kernels
def test_torchs_openmp_is_found_beside_those_of_other_packages(untried):
    import sklearn.linear_model  # noqa: F401  # brings one

    assert kernels.kernels() is not None


@needs_kernels
def test_kernels_that_compute_wrong_are_not_used(untried, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_16", 1 << 15)  # its high byte is too large
    assert kernels.kernels() is None
    assert kernels.state() == "torch's (wrong products of int4, int4 groups, int8)"


@needs_kernels
def test_tiles_that_are_wrong_are_made_by_torch(monkeypatch):
    found, right = kernels.Kernels(), kernels.codes_in_tiles
    stored = torch.arange(64 * 128).to(torch.int8).view(64, 128)
    monkeypatch.setattr(kernels, "codes_in_tiles", lambda stored, bits: right(stored, bits) ^ 1)
    for bits in (8, 4):
        assert torch.equal(found.tiles(stored, bits), right(stored, bits) ^ 1)
    assert found._right == {8: False, 4: False}
    kernels._all.append(found)  # never freed


def test_a_lesser_processor_is_told(untried, monkeypatch):
    pytest.importorskip("llvmlite")
    monkeypatch.setattr(kernels, "FEATURES", ("avx512f-of-the-future",))
    assert kernels.state() == "torch's (the processor lacks avx512f-of-the-future)"


@needs_kernels
def test_a_layer_that_learns_its_input_keeps_its_gradient():
    one = layer("int4", 128, 128)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    one(x).float().sum().backward()
    right = quantization.dequantize(one.stored(), one.weight_scale, 4).double().sum(0)
    torch.testing.assert_close(x.grad.double(), right.expand(3, -1), rtol=0.02, atol=0.02)
