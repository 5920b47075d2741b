"""INT8 and INT4 are the released ones, bit for bit, and compute what their dequantized weights say."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from glm_core import quantization as q
from glm_core.errors import GLMError
from glm_core.models import released
from glm_core.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from tests.conftest import GOLDEN, REPOSITORY

# A product of 64 to 256 fp32 numbers summed in another order: 5e-6 was measured on results of up to 25.
LAYER_ATOL = 1e-5
# The reference differs from itself by up to 2.5e-5 between cached and uncached decoding, on logits of scale 7.
LOGITS_ATOL = 5e-5
# bf16 keeps 8 bits, fp16 11; a result is rounded twice (the sums, then the scaled sums), measured against its row.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11, torch.float64: 1e-13}
FORMATS = [(family, bits) for family in ("v1", "v2") for bits in (8, 4)]

needs_int4_kernel = pytest.mark.skipif(
    not q.int4_tile(), reason="torch has no INT4 kernel for this processor; the plain path is used"
)


def arrays(family: str, bits: int) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(a) for key, a in np.load(GOLDEN / family / f"quant_int{bits}.npz").items()}


def layers(golden: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted({key.rsplit("/", 1)[0] for key in golden if key.endswith("/packed_int8")})
    assert len(names) == 4
    return [
        {key.rsplit("/", 1)[1]: a for key, a in golden.items() if key.rsplit("/", 1)[0] == name}
        for name in names
    ]


def filled(stored: torch.Tensor, scale: torch.Tensor, bits: int, bias=None, **settings) -> q.RowwiseLinear:
    out, columns = stored.shape
    layer = q.RowwiseLinear(columns * 8 // bits, out, bits, bias=bias is not None, **settings)
    state = {"weight": stored, "weight_scale": scale} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state)
    return layer


def random_layer(out: int, columns: int, bits: int, bias: bool = True, seed: int = 0, **settings):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) * 0.05
    return filled(
        *q.quantize_weight(weight, bits), bits, torch.randn(out, generator=generator) if bias else None, **settings
    )  # fmt: skip


def empty(family: str, folder: str):
    """The model of a golden folder without memory for weights, and the folder's config."""
    raw = json.loads((GOLDEN / family / folder / "config.json").read_text())
    with torch.device("meta"):
        if family == "v1":
            return ChatGLMForConditionalGeneration(ChatGLMConfig.from_released(raw)).eval(), raw
        return ChatGLM2ForCausalLM(ChatGLM2Config.from_released(raw)).eval(), raw


def native_state(family: str, folder: str, config) -> dict[str, torch.Tensor]:
    """A golden file under the names of the model that runs it, query_key_value split by rows."""
    return {
        name: part
        for key, tensor in load_file(GOLDEN / family / folder / "model.safetensors").items()
        if not key.endswith("inv_freq")
        for name, part in released.to_native(key, tensor, config)
    }


def fill(model, state: dict[str, torch.Tensor]):
    """Load what a meta model lacks, in fp32 but for codes and scales; its tables come from a model with memory."""
    state = {
        name: t.float() if t.is_floating_point() and not name.endswith("weight_scale") else t
        for name, t in state.items()
    }
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    tables = dict(type(model)(model.config).named_buffers())
    for name, buffer in list(model.named_buffers()):
        assert buffer.is_meta
        owner, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(owner), leaf, tables[name])
    return model


def reference(layer: q.RowwiseLinear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.dequantized(torch.float64), bias)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape
    if got.numel():
        assert (got.detach().double() - expected).abs().max() <= RTOL[dtype] * max(
            1.0, float(expected.abs().max())
        )


# ---- the format ----


@pytest.mark.parametrize(("family", "bits"), FORMATS)
def test_codes_scales_and_weights_are_the_released_ones(family, bits):
    for layer in layers(arrays(family, bits)):
        for weight in (layer["original_fp16"], layer["original_fp16"].float()):
            stored, scale = q.quantize_weight(weight, bits)
            assert torch.equal(stored, layer["packed_int8"]) and stored.dtype == torch.int8
            assert torch.equal(scale, layer["scale_fp16"]) and scale.dtype == torch.float16
        if bits == 4:
            assert torch.equal(q.unpack_int4(layer["packed_int8"]), layer["q"])
            assert torch.equal(q.pack_int4(layer["q"]), layer["packed_int8"])
        for dtype, key in ((torch.float32, "dequant_fp32"), (torch.float16, "dequant_fp16_gpu_semantics")):
            weight = q.dequantize(layer["packed_int8"], layer["scale_fp16"], bits, dtype)
            assert torch.equal(weight, layer[key]) and weight.dtype == dtype


@pytest.mark.parametrize(("family", "bits"), FORMATS)
def test_quantizing_the_float_checkpoint_gives_the_released_file(family, bits):
    model, _ = empty(family, "tiny")
    fill(model, native_state(family, "tiny", model.config))
    calls: list[tuple[int, int]] = []
    assert q.quantize(model, bits, lambda done, of: calls.append((done, of))) is model
    expected = native_state(family, f"quant_int{bits}", model.config)
    state = model.state_dict()
    scales = [name for name in expected if name.endswith("weight_scale")]
    assert {name for name in state if name.endswith("weight_scale")} == set(scales)
    for scale in scales:
        for name in (scale, scale.removesuffix("_scale")):
            assert torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype, (
                name
            )
    assert calls == [(i, len(scales)) for i in range(1, len(scales) + 1)]


def test_every_pair_of_nibbles_has_its_byte():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = q.pack_int4(pairs)
    assert packed[:, 0].tolist() == [
        int(np.int8((high & 15) << 4 | low & 15) if high >= 0 else ((high & 15) << 4 | low & 15) - 256)
        for high, low in pairs.tolist()
    ]  # fmt: skip
    assert torch.equal(q.unpack_int4(packed), pairs)
    assert q.unpack_int4(q.pack_int4(pairs.view(2, 16, 16))).shape == (2, 16, 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_without_size_or_nearly_so(bits):
    weight = torch.zeros(4, 6)
    weight[1] = torch.tensor([1e-9, 0, -1e-9, 0, 0, 0])  # fp16 has no such numbers
    weight[2] = torch.tensor([-2e-5, 1e-5, 0, 0, 0, 0])  # its scale is coarse there: codes must not wrap
    weight[3] = torch.tensor([1.0, -1.0, 0.5, 0, 0, 0])
    stored, scale = q.quantize_weight(weight, bits)
    back = q.dequantize(stored, scale, bits)
    assert scale[:2].tolist() == [0, 0] and not stored[:2].any() and not back[:2].any()
    codes = stored if bits == 8 else q.unpack_int4(stored)
    assert int(codes.abs().max()) == q.LARGEST[bits]
    assert back[2, 0] < 0 < back[2, 1] or bits == 4
    # half a step of the scale, and the rounding of the scale itself
    assert ((back - weight)[3].abs() <= 0.5 / q.LARGEST[bits] + 2**-11).all()
    assert torch.isfinite(filled(stored, scale, bits)(torch.ones(1, 6))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q.quantize_weight(torch.ones(2, 2), 3), "3 bits"),
        (lambda: q.quantize_weight(torch.full((2, 2), 1e6), 8), "1e\\+06"),
        (lambda: q.quantize_weight(torch.full((2, 2), float("nan")), 4), "nan"),
        (lambda: q.quantize_weight(torch.ones(2, 3), 4), "3 columns"),
        (lambda: q.pack_int4(torch.tensor([[8, 0]], dtype=torch.int8)), "0 to 8"),
        (lambda: q.RowwiseLinear(3, 2, 4), "3 columns"),
        (lambda: q.dequantize(torch.ones(2, 2, dtype=torch.int8), torch.ones(3), 8), r"\(2, 2\).*\(3,\)"),
        (lambda: q.quantize(nn.Sequential(nn.ReLU()), 8), "Sequential has no linear layers"),
        (lambda: q.replace_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 4)), 4), "^1 has 3 columns"),
        (lambda: q.quantize(nn.ModuleDict({"base_layer": nn.Linear(4, 4), "lora_A": nn.Linear(4, 1)}), 8), "adapter"),
        (lambda: q.replace_linears(empty("v2", "tiny")[0], 4, embeddings=True), "head of its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_said(call, message):
    with pytest.raises(GLMError, match=message) as error:
        call()
    assert error.value.todo


# ---- the layer ----


@pytest.mark.parametrize(("family", "bits"), FORMATS)
def test_layers_give_the_reference_outputs(family, bits):
    for golden in layers(arrays(family, bits)):
        layer = filled(golden["packed_int8"], golden["scale_fp16"], bits, golden.get("bias"))
        np.testing.assert_allclose(
            layer(golden["x"]).detach().numpy(), golden["y"].numpy(), atol=LAYER_ATOL, rtol=0
        )


@pytest.mark.parametrize(("family", "bits"), FORMATS)
def test_gradient_of_the_input_is_the_reference_one(family, bits):
    golden = arrays(family, bits)
    name = next(key for key in golden if key.endswith("dense_h_to_4h/packed_int8")).removesuffix(
        "packed_int8"
    )
    layer = filled(golden[name + "packed_int8"], golden[name + "scale_fp16"], bits, golden.get(name + "bias"))
    x = golden["backward/x"].requires_grad_()
    layer(x).square().sum().backward()
    expected = next(a for key, a in golden.items() if key.startswith("backward/grad"))
    # Sums of some 200 fp32 products of size 60, as in LAYER_ATOL.
    np.testing.assert_allclose(x.grad.numpy(), expected.numpy(), atol=5e-5, rtol=0)
    assert layer.weight.grad is None and layer.weight_scale.grad is None
    assert not layer.weight.requires_grad and not layer.weight_scale.requires_grad


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 96), (70, 34), (192, 64)])
def test_every_path_computes_the_dequantized_layer(monkeypatch, bits, dtype, shape):
    """Packed kernels and blocks, few rows and many, layers of one block and of several."""
    monkeypatch.setitem(q.BLOCK_CODES, "cpu", 64 * 64)  # 64 rows at a time: the last block is a part of one
    generator = torch.Generator().manual_seed(1)
    layer = random_layer(*shape, bits).to(dtype)
    assert layer.bias.dtype == dtype and layer.weight_scale.dtype == torch.float16
    for rows in (0, 1, q.FEW_ROWS[bits], q.FEW_ROWS[bits] + 1, 130, 2):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        weight = torch.randn(rows, shape[0], generator=generator).to(dtype)
        expected = reference(layer, x)
        with torch.inference_mode():
            assert_close(layer(x), expected, dtype)
        x.requires_grad_()
        layer.bias.grad = None
        out = layer(x)
        assert_close(out, expected, dtype)
        out.backward(weight)
        assert_close(x.grad, weight.double() @ layer.dequantized(torch.float64), dtype)
        assert_close(layer.bias.grad, weight.double().sum(0), dtype)


def test_shapes_frozen_parts_and_gradients_in_double():
    layer = random_layer(6, 8, 4).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert layer(x).shape == (2, 3, 6) and layer(x[0, 0]).shape == (6,)
    assert torch.autograd.gradcheck(layer, (x,))
    layer.bias.requires_grad_(False)
    assert layer(x).requires_grad and not layer(x.detach()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x.detach().float()), reference(layer, x), torch.bfloat16)


def test_casting_moves_the_bias_only_and_wide_scales_stay():
    layer = random_layer(64, 64, 4)
    stored, scale = layer.stored().clone(), layer.weight_scale.detach().clone()
    for cast in (layer.bfloat16, layer.half, partial(layer.to, "cpu", torch.float32), layer.double):
        cast()
        assert torch.equal(layer.weight, stored) and torch.equal(layer.weight_scale, scale)
        assert layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.float16
    assert layer.bias.dtype == torch.float64
    wide = scale.float() * (1 + 2**-15)  # what fp16 would round away
    layer.load_state_dict({"weight": stored, "weight_scale": wide, "bias": layer.bias})
    assert torch.equal(layer.weight_scale, wide) and layer.weight_scale.dtype == torch.float32


@needs_int4_kernel
def test_the_kernels_order_replaces_the_codes_and_never_leaves_the_layer():
    layer, plain = random_layer(128, 96, 4), random_layer(128, 96, 4, tiled=False)
    before = weakref.ref(layer.weight)
    stored, few = plain.stored().clone(), torch.randn(3, 96).bfloat16()
    with torch.inference_mode():
        layer(few), plain(few)
    assert layer.weight.dtype == torch.uint8 and plain.weight.dtype == torch.int8
    assert before() is None and layer.weight.nbytes == stored.nbytes  # replaced, not doubled
    assert not layer.weight.requires_grad and not layer.weight.is_inference()

    state = layer.state_dict()
    assert torch.equal(state["weight"], stored) and state["weight"].dtype == torch.int8
    assert torch.equal(layer.stored(), stored) and torch.equal(layer.dequantized(), plain.dequantized())
    pickled = io.BytesIO()
    torch.save(layer, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(layer), torch.load(pickled, weights_only=False)):
        assert torch.equal(other.stored(), stored)
    for rows in (3, 200):  # many rows, and training, after the order has changed
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(rows, 96).to(dtype).requires_grad_()
            assert_close(layer(x), reference(plain, x), dtype)
            layer(x).sum().backward()
            assert_close(x.grad, plain.dequantized(torch.float64).sum(0).expand_as(x), dtype)
    layer.to("cpu", torch.bfloat16)
    assert layer.weight.dtype == torch.uint8  # what is computed with does not change
    layer.to(torch.float16)
    assert layer.weight.dtype == torch.int8 and torch.equal(layer.weight, stored)

    other = random_layer(128, 96, 4, seed=5)
    with torch.no_grad():
        layer(few)
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.stored(), other.stored())


def test_a_processor_without_avx512_computes_the_same():
    """The order of its INT4 kernel is another one; torch can be told to take the kernels of a lesser processor."""
    code = (
        "import torch; from glm_core import quantization as q\n"
        "torch.manual_seed(0)\n"
        "for bits in (8, 4):\n"
        "    layer = q.RowwiseLinear.from_linear(torch.nn.Linear(128, 192), bits)\n"
        "    x = torch.randn(3, 128).bfloat16()\n"
        "    w = layer.dequantized()\n"
        "    with torch.no_grad():\n"
        "        y, expected = layer(x).float(), torch.nn.functional.linear(x.float(), w, layer.bias)\n"
        f"    assert (y - expected).abs().max() < {RTOL[torch.bfloat16]} * expected.abs().max()\n"
        "    assert torch.equal(layer.dequantized(), w)\n"
        "print('equal')"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.stdout.strip() == "equal", done.stderr


# ---- whole models ----


@pytest.mark.parametrize("family,folder", [("v1", "quant_int8"), ("v1", "quant_int4"), ("v1", "quant_int4_qe"),
                                           ("v2", "quant_int8"), ("v2", "quant_int4")])  # fmt: skip
def test_released_quantized_checkpoints_give_the_reference_logits_and_tokens(family, folder):
    model, raw = empty(family, folder)
    q.replace_linears(model, raw["quantization_bit"], raw.get("quantization_embeddings", False))
    fill(model, native_state(family, folder, model.config))
    assert model.dtype == torch.float32
    golden = np.load(GOLDEN / family / f"{folder}.npz")
    cases = {key.removesuffix("logits") for key in golden if key.endswith("logits")}
    for case in sorted(cases):
        ids = torch.tensor(golden[f"{case}input_ids"])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
            tokens = f"{case}generate" if family == "v1" else f"{case}greedy_loop"
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=golden[tokens].shape[1] - ids.shape[1],
                do_sample=False, eos_token_id=None, pad_token_id=3,
            )  # fmt: skip
        np.testing.assert_allclose(logits.numpy(), golden[f"{case}logits"], atol=LOGITS_ATOL, rtol=0)
        assert made.tolist() == golden[tokens].tolist()


def test_a_quantized_embedding_and_its_head_share_their_codes():
    model, raw = empty("v1", "quant_int4_qe")
    q.replace_linears(model, 4, embeddings=True, dtype=torch.bfloat16)
    state = native_state("v1", "quant_int4_qe", model.config)
    assert {name for name in model.state_dict() if "inv_freq" not in name} == set(state)
    fill(model, state)
    embedding, head = model.transformer.word_embeddings, model.lm_head
    expected = torch.tensor(np.load(GOLDEN / "v1" / "quant_int4_qe.npz")["word_embeddings/dequant_fp32"])
    ids = torch.tensor([[5, 0], [159, 5]])
    assert model.dtype == embedding(ids).dtype == torch.bfloat16
    assert torch.equal(embedding(ids), expected[ids].bfloat16())
    model.float()
    assert torch.equal(embedding(ids), expected[ids]) and model.dtype == torch.float32
    assert head.weight is embedding.weight
    with torch.inference_mode():
        head(torch.randn(1, 64).bfloat16())
    assert head.weight.dtype == torch.int8  # the order of the kernel would need a second copy
    q.dequantize_model(model, torch.float16)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, expected.half())


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize_model_undoes_the_layers_and_quantize_finds_the_same_codes(bits):
    model, _ = empty("v2", f"quant_int{bits}")
    q.replace_linears(model, bits)
    fill(model, native_state("v2", f"quant_int{bits}", model.config))
    before, names = (
        model.state_dict(),
        {n for n, m in model.named_modules() if isinstance(m, q.RowwiseLinear)},
    )
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        assert q.dequantize_model(model, torch.float32) is model
        assert not any(isinstance(module, q.RowwiseLinear) for module in model.modules())
        torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=LOGITS_ATOL, rtol=0)
    assert set(q.linears(model)) == names
    q.quantize(model, bits)
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and tensor.dtype == torch.int8:
            # scale = largest / 127 is rounded again: a scale may move by one step of fp16, a code never
            assert torch.equal(tensor, before[name]), name


def test_each_float_weight_is_freed_before_the_next():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    q.quantize(model, 8, lambda done, of: alive.append(sum(ref() is not None for ref in weights)))
    assert alive == [3, 2, 1, 0]


def test_other_architectures_keep_their_head_and_a_failure_keeps_the_model():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.out = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Linear:
            return self.out

    model = Other().eval()
    assert q.linears(model) == ["up", "down"]
    model.down = nn.Linear(7, 4)
    with pytest.raises(GLMError, match="down has 7 columns"):
        q.quantize(model, 4)
    assert isinstance(model.up, nn.Linear)
    q.quantize(model, 8)
    assert (
        isinstance(model.up, q.RowwiseLinear) and not model.up.training and isinstance(model.out, nn.Linear)
    )
    with pytest.raises(GLMError, match="no linear layers"):
        q.quantize(model, 8)
