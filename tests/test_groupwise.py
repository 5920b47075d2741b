"""INT4 in groups of columns: its error, its layout in memory and on disk, and that it computes what its weights say."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from glm_core import checkpoints, groupwise, linear, memory, quantization
from glm_core.errors import GLMError

LEVELS = tuple(checkpoints.GROUPED.items())
# What a product rounded to a dtype may differ by, against the largest result; a weight is rounded to it once as well.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}

needs_kernel = pytest.mark.skipif(
    not groupwise.int4_kernel(), reason="torch has no INT4 kernel for this processor; the plain path is used"
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(*shape: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom: a row has a few weights far beyond the others."""
    chi = sum(numbers(*shape, seed=seed).square() for seed in range(1, 5))
    return numbers(*shape) / (chi / 4).sqrt() * 0.02


def layer(rows: int = 128, columns: int = 256, group: int = 64, bias: bool = True, seed: int = 0):
    plain = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(numbers(rows, columns, seed=seed))
    return groupwise.GroupwiseLinear.from_linear(plain.requires_grad_(False), 4, group)


def right(one: groupwise.GroupwiseLinear, x: torch.Tensor) -> torch.Tensor:
    bias = None if one.bias is None else one.bias.double()
    return F.linear(x.double(), one.dequantized(torch.float64), bias)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape
    assert (got.detach().double() - expected).abs().max() <= RTOL[dtype] * float(expected.abs().max())


def error(weight: torch.Tensor, *, bits: int = 0, group: int = 0) -> float:
    """Root mean square of what quantizing changes, against that of the weight."""
    if group:
        made = groupwise.dequantize(*groupwise.quantize_weight(weight, group))
    else:
        made = quantization.dequantize(*quantization.quantize_weight(weight, bits), bits)
    return float((made - weight).norm() / weight.norm())


# ---- the weights


def test_every_smaller_group_lowers_the_error_of_the_weights():
    for weight, most in (
        (numbers(64, 2048), (0.075, 0.088, 0.098)),
        (heavy_tailed(64, 2048), (0.091, 0.117, 0.147)),
    ):
        found = [error(weight, group=group) for group in (32, 64, 128)]
        assert found == sorted(found) and all(one < bound for one, bound in zip(found, most, strict=True))
        assert error(weight, bits=8) < found[0] and found[-1] < 0.75 * error(weight, bits=4)


@pytest.mark.parametrize("group", groupwise.GROUPS)
def test_no_group_is_worse_than_its_smallest_and_largest_number_make_it(group, monkeypatch):
    weight = torch.cat((numbers(16, 512), heavy_tailed(16, 512), numbers(4, 512).abs() + 1))

    def losses() -> torch.Tensor:
        made = groupwise.dequantize(*groupwise.quantize_weight(weight, group))
        return (made - weight).view(-1, group).square().sum(1)

    refined = losses()
    monkeypatch.setattr(groupwise, "ROUNDS", 0)
    plain = losses()
    assert bool((refined <= plain * (1 + 1e-6)).all()) and refined.sum() < 0.98 * plain.sum()
    spread = weight.view(-1, group).amax(1) - weight.view(-1, group).amin(1)
    # Half a step of a fifteenth of the range, and what bf16 moves a zero point of 1 by.
    assert bool((plain.sqrt() <= group**0.5 * (spread / 15 * 0.55 + 2**-9)).all())


def test_scales_and_zero_points_are_numbers_that_bf16_holds():
    weight = torch.cat((numbers(8, 128), numbers(8, 128) * 1e-4, numbers(8, 128) * 5e5, numbers(8, 128) + 3))
    stored, *scales = groupwise.quantize_weight(weight, 32)
    assert stored.dtype == torch.int8 and stored.shape == (32, 64)
    for one in scales:
        assert one.dtype == torch.float16 and one.shape == (32, 4)
        assert torch.equal(one.bfloat16().half(), one)


def test_groups_of_one_value_and_of_zeros_survive():
    weight = torch.zeros(3, 64)
    weight[1], weight[2, :32] = 0.5, -0.25
    made = groupwise.dequantize(*groupwise.quantize_weight(weight, 32))
    assert torch.equal(made, weight)


def test_codes_have_the_byte_order_of_the_released_int4():
    weight = torch.linspace(-8, 7, 16).repeat(1, 2)
    stored, scale, zero = groupwise.quantize_weight(weight, 32)
    assert scale.item() == 1 and zero.item() == 0
    assert torch.equal(stored, quantization.pack_int4(weight.to(torch.int8)))


@pytest.mark.parametrize(
    ("columns", "wanted", "group"),
    [(13696, 128, 128), (16384, 128, 128), (4096, 64, 64), (320, 128, 64), (96, 128, 32), (96, 64, 32), (100, 128, 0),
     (64, 32, 32)],
)  # fmt: skip
def test_a_group_that_does_not_divide_the_columns_gives_way_to_the_next_smaller(columns, wanted, group):
    assert groupwise.group_for(columns, wanted) == group


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_weights_that_fp16_cannot_hold_are_refused_with_their_layer(value):
    model = nn.Sequential(nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[5, 6] = value
    with pytest.raises(GLMError, match="^0: The weight has values up to .*fp16 cannot hold"):
        groupwise.quantize(model, 32)


# ---- the product


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("group", groupwise.GROUPS)
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (96, 384), (70, 128)])
def test_a_layer_computes_what_its_weights_say(dtype, group, rows, columns):
    one = layer(rows, columns, group)
    for count in (1, 3, 64):  # after the first of bf16 the codes are in the kernel's order
        x = torch.randn(2, count, columns).to(dtype)
        with torch.inference_mode():
            assert_close(one(x), right(one, x), dtype)


def test_large_weights_off_zero_come_out_in_every_order(monkeypatch):
    monkeypatch.setattr(quantization, "BLOCK_CODES", {"cpu": 1 << 14})  # several blocks
    plain = nn.Linear(256, 192).requires_grad_(False)
    plain.weight.copy_(numbers(192, 256) * 50 + 2)
    one = groupwise.GroupwiseLinear.from_linear(plain, 4, 32)
    for x in (torch.randn(80, 256), torch.randn(2, 256).bfloat16(), torch.randn(80, 256)):
        assert_close(one(x), right(one, x), x.dtype)


@needs_kernel
def test_the_first_few_rows_of_bf16_change_the_order_and_nothing_else():
    one = layer()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    weights, size = one.dequantized(), linear.weight_bytes(one)
    with torch.inference_mode():
        one(torch.randn(2, 256).bfloat16())
    assert one.weight.dtype == torch.uint8 and one.weight_scale.dtype == torch.bfloat16
    assert linear.weight_bytes(one) == size
    for holder in (one, copy.deepcopy(one), one.to(torch.float32)):
        after = holder.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(after[name].dtype == before[name].dtype for name in before)
        assert torch.equal(holder.dequantized(), weights)
    assert one.weight.dtype == torch.int8 and one.weight_scale.dtype == torch.float16


@needs_kernel
def test_a_copy_and_a_reloaded_layer_compute_the_same():
    one, x = layer(), torch.randn(3, 256).bfloat16()
    with torch.inference_mode():
        expected = one(x)
        other = layer(seed=1)
        other(x)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other(x), expected) and torch.equal(copy.deepcopy(one)(x), expected)


def test_scales_that_bf16_would_round_are_never_given_to_the_kernel():
    one = layer()
    with torch.no_grad():
        one.weight_scale.mul_(1.001)
    x = torch.randn(2, 256).bfloat16()
    expected = right(one, x)  # such scales are rounded where the codes are expanded
    assert (one(x).double() - expected).norm() <= 2**-7 * expected.norm()
    assert one.weight.dtype == torch.int8


def fragments(stored: torch.Tensor, tiles: int) -> torch.Tensor:
    """The order of torch's kernel for CUDA, number by number as its source has it; the codes plus 8."""
    unsigned = (stored.view(torch.uint8) ^ 0x88).tolist()
    rows, half = stored.shape
    packed = torch.zeros(rows // 8, half // (8 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n, k, t, i in itertools.product(*map(range, packed.shape)):
        base = k * tiles * 8 + i * 16 + t % 4
        four = [unsigned[8 * n + t // 4][base + 4 * j] for j in range(4)]
        packed[n, k, t, i] = sum((v >> 4) << 4 * j | (v & 15) << 16 + 4 * j for j, v in enumerate(four))
    return packed.to(torch.int32)


@pytest.mark.parametrize(("columns", "tiles"), [(128, 8), (192, 4), (96, 2)])
def test_codes_come_back_from_the_order_of_the_cuda_kernel(columns, tiles, monkeypatch):
    one = layer(32, columns, 32)
    stored = one.stored()
    assert torch.equal(groupwise.from_fragments(fragments(stored, tiles)), stored)
    found = torch.ops.aten._convert_weight_to_int4pack(stored.view(torch.uint8).to("meta"), tiles)
    assert found.shape == fragments(stored, tiles).shape
    # A layer in that order expands it, and gives back the layout on disk.
    monkeypatch.setattr(quantization, "BLOCK_CODES_ELSEWHERE", 16 * columns)
    before, x = {name: value.clone() for name, value in one.state_dict().items()}, torch.randn(50, columns)
    expected = one(x)
    one._pairs = torch.stack([value.t() for value in one.scales().values()], -1).bfloat16()
    one.weight = nn.Parameter(fragments(stored, tiles), requires_grad=False)
    assert torch.equal(one(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert torch.equal(one.to(torch.float32).weight, stored)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", groupwise.GROUPS)
def test_a_layer_on_a_gpu_computes_what_its_weights_say(group):
    one = layer(group=group)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    one.cuda()
    for count in (1, 16, 40):
        for dtype in RTOL:
            x = torch.randn(count, 256, device="cuda").to(dtype)
            with torch.inference_mode():
                assert_close(one(x).cpu(), right(one, x).cpu(), dtype)
    assert (one.weight.dtype == torch.int32) == groupwise.cuda_kernel(torch.device("cuda", 0))
    assert all(torch.equal(value.cpu(), before[name]) for name, value in one.state_dict().items())


def test_casting_a_layer_leaves_its_scales():
    one = layer()
    before = one.scales()
    for dtype in (torch.bfloat16, torch.float64):
        one.to(dtype)
        assert one.bias.dtype == dtype
        assert all(torch.equal(value, before[name]) for name, value in one.scales().items())


def test_gradients_reach_the_input_and_the_bias():
    one = layer(96, 256, 32)
    one.bias.requires_grad_(True)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        x = torch.randn(5, 256).to(dtype).requires_grad_(True)
        plain = x.detach().double().requires_grad_(True)
        one.bias.grad = None
        upstream = torch.randn(5, 96).to(dtype)
        one(x).backward(upstream)
        for_bias = one.bias.grad.clone()
        right(one, plain).backward(upstream.double())
        assert (x.grad.double() - plain.grad).norm() <= rtol * plain.grad.norm()
        torch.testing.assert_close(for_bias, upstream.float().sum(0), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tiled", [False, True])
def test_joined_layers_give_their_outputs_side_by_side(tiled):
    parts = [layer(rows, 128, 32, seed=rows) for rows in (64, 32, 32)]
    holder = nn.ModuleDict({name: copy.deepcopy(one) for name, one in zip("qkv", parts, strict=True)}).eval()
    before = {name: value.clone() for name, value in holder.state_dict().items()}
    whole = linear.join(holder, "qkv")
    x = torch.randn(5, 128).to(torch.bfloat16 if tiled else torch.float32)
    expected = torch.cat([right(one, x) for one in parts], -1)
    with torch.inference_mode():
        assert_close(whole(x), expected, x.dtype)
    after = holder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert linear.weight_bytes(holder) == sum(v.numel() * v.element_size() for v in before.values())


def test_layers_with_different_groups_are_not_joined():
    holder = nn.ModuleDict({"a": layer(group=32), "b": layer(group=64)})
    assert linear.join(holder, "ab") is None
    rows = quantization.RowwiseLinear.from_linear(nn.Linear(256, 64), 4)
    assert linear.join(nn.ModuleDict({"a": layer(), "b": rows}), "ab") is None


# ---- models and checkpoints


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("level", "group"), LEVELS)
def test_a_loaded_saved_and_loaded_model_is_the_same_bit_for_bit(tiny_checkpoint, tmp_path, level, group):
    loaded = checkpoints.load(tiny_checkpoint, level, "cpu")
    assert loaded.precision == level
    groups = {one.group for one in loaded.model.modules() if isinstance(one, groupwise.GroupwiseLinear)}
    assert groups == ({32} if group == 32 else {64, 32})  # rows of 64 and of 96
    assert bool(loaded.notes) == (group != 32)
    folder = checkpoints.save(loaded, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == group and "quantization_bit" not in config
    assert "GLM Workbench, which alone reads it" in (folder / "README.md").read_text()
    info = checkpoints.inspect(folder)
    assert (info.bits, info.group, info.dtype, info.problems) == (4, group, level.upper(), ())
    assert info.parameters == checkpoints.inspect(tiny_checkpoint).parameters
    again = checkpoints.load(folder, "bf16", "cpu")
    first, second = state_of(loaded.model), state_of(again.model)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
    # Converted once more, nothing is rounded again; the float numbers beside the codes are those of the file.
    third = checkpoints.load(checkpoints.convert(folder, tmp_path / "again", "bf16"), level, "cpu")
    assert all(
        torch.equal(value, first[name])
        for name, value in third.model.state_dict().items()
        if "_proj.weight" in name
    )


def test_a_level_of_groups_answers_as_its_dequantized_model(tiny_checkpoint):
    loaded = checkpoints.load(tiny_checkpoint, "int4-g32", "cpu")
    expanded = quantization.dequantize_model(copy.deepcopy(loaded.model), torch.bfloat16)
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        found, expected = (one(input_ids=ids).logits.float() for one in (loaded.model, expanded))
    assert (found - expected).abs().max() <= 0.05 * expected.std()


def test_codes_are_made_from_float_weights_only(tiny_checkpoint, tmp_path):
    for stored in ("int4", "int4-g64"):
        folder = checkpoints.convert(tiny_checkpoint, tmp_path / stored, stored)
        with pytest.raises(
            GLMError, match=f"is stored as {stored.upper()}; int4-g32 is made from float weights"
        ):
            checkpoints.load(folder, "int4-g32", "cpu")
    with pytest.raises(
        GLMError, match="cannot be computed with 8-bit activations|does not run on this processor"
    ):
        checkpoints.load(folder, "int8-dynamic", "cpu")
    assert memory.levels(memory.shape(folder)) == ("fp32", "bf16", "fp16")
    with pytest.raises(GLMError, match="is not one that"):
        memory.predict(folder, "int4-g32")


def damaged(folder: Path, change) -> str:
    """The first problem of a checkpoint whose config or tensors were changed; of loading it where there is none."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    state = load_file(file)
    change(config["quantization_config"], state)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, file)
    problems = checkpoints.inspect(folder).problems
    if problems:
        return problems[0]
    with pytest.raises(GLMError) as found:
        checkpoints.load(folder, "fp32", "cpu")
    return str(found.value)


DENSE = "transformer.encoder.layers.0.self_attention.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config, state: config.update(group_size=48),
            "4 bits in groups of 48; INT4 in groups of 32, 64",
        ),
        (lambda config, state: config.update(bits=3), "3 bits in groups of 32"),
        (lambda config, state: state.pop(f"{DENSE}_scale"), f"{DENSE} has no {DENSE}_scale"),
        (lambda config, state: state.pop(f"{DENSE}_zero"), "lacks 1 weights, such as .*o_proj.weight_zero"),
        (
            lambda config, state: config.update(group_size=64),
            r"has the shape \(192, 2\), config.json says \(192, 1\)",
        ),
    ],
    ids=["group", "bits", "scale", "zero", "other"],
)
def test_a_damaged_checkpoint_of_groups_is_named(tiny_checkpoint, tmp_path, change, message):
    folder = checkpoints.convert(tiny_checkpoint, tmp_path / "made", "int4-g32")
    found = damaged(folder, change)
    assert re.search(message, found), found


@pytest.mark.parametrize(("level", "group"), LEVELS)
def test_the_predicted_weights_are_those_in_memory(tiny_checkpoint, tmp_path, level, group):
    from glm_core.engine import Engine

    loaded = checkpoints.load(tiny_checkpoint, level, "cpu")
    assert memory.predict(tiny_checkpoint, level).parts["weights"] == loaded.weight_bytes
    engine = Engine(loaded)  # which joins layers
    try:
        assert memory.predict(tiny_checkpoint, level).parts["weights"] == loaded.weight_bytes
    finally:
        engine.close()
    folder = checkpoints.convert(tiny_checkpoint, tmp_path / "saved", level)
    stored = checkpoints.load(folder, "fp32", "cpu")
    assert memory.predict(folder, "fp32").parts["weights"] == stored.weight_bytes


def test_the_published_shapes_have_the_bytes_of_their_groups():
    of = memory.shape("chatglm2-6b")
    sizes = [memory.predict(of, level).parts["weights"] for level in ("int8", *checkpoints.GROUPED, "int4")]
    assert sizes == sorted(sizes, reverse=True)
    rows = memory.predict(of, "int4").parts["weights"]
    for level, group in LEVELS:  # 4 bytes for every group instead of 2 for every row
        assert memory.predict(of, level).parts["weights"] == rows - 2 * of.rows + 4 * of.linear // group


def test_default_levels_have_no_groups_and_named_ones_do(tiny_checkpoint):
    of = memory.shape(tiny_checkpoint)
    assert set(checkpoints.GROUPED) <= set(memory.levels(of))
    assert not set(checkpoints.GROUPED) & {*memory.usual(of), *(one.precision for one in memory.table(of))}
    assert [one.precision for one in memory.table(of, ["int4-g64"])] == ["int4-g64"]


def test_lora_trains_over_groups(tiny_checkpoint):
    from glm_core import adapters

    loaded = checkpoints.load(tiny_checkpoint, "int4-g32", "cpu")
    before = state_of(loaded.model)
    ids = torch.arange(5, 25)[None]
    plain = loaded.model(input_ids=ids).logits
    adapters.add_lora(loaded.model, rank=4)
    assert torch.equal(loaded.model(input_ids=ids).logits, plain)
    trained = [one for one in loaded.model.parameters() if one.requires_grad]
    loaded.model(input_ids=ids).logits.float().square().mean().backward()
    assert trained and any(bool(one.grad.abs().sum() > 0) for one in trained)
    codes = [name for name in before if name.endswith(("weight_scale", "weight_zero"))]
    after = {name.replace(".base_layer", ""): value for name, value in loaded.model.state_dict().items()}
    assert codes and all(torch.equal(after[name], before[name]) for name in codes)
