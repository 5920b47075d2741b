"""Packed and joined layers: the same numbers, the same files, and never a second copy of a weight."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from glm_core import checkpoints, linear
from glm_core.engine import KVCache
from glm_core.errors import GLMError
from glm_core.models.lean import laid_out, lean
from glm_core.quantization import RowwiseLinear

pytestmark = pytest.mark.skipif(not linear.works(torch.float32), reason="torch has no oneDNN operators here")


def layer(dtype=torch.float32, bias=True, rows=24, columns=40):
    torch.manual_seed(rows)
    return nn.Linear(columns, rows, bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", linear.DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 7, 40), (0, 40)])
def test_a_packed_layer_computes_what_the_plain_one_does(dtype, bias, shape):
    plain = layer(dtype, bias)
    packed = linear.PackedLinear(plain.weight, plain.bias)
    x = torch.randn(shape).to(dtype)
    atol = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=atol)
    assert packed(x).dtype == dtype


@pytest.mark.parametrize("dtype", linear.DTYPES)
def test_the_weight_comes_back_bit_for_bit(dtype):
    plain = layer(dtype)
    packed = linear.PackedLinear(plain.weight, plain.bias)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in packed.state_dict().items())
    assert packed.nbytes == plain.weight.numel() * plain.weight.element_size()


def test_a_packed_layer_takes_another_dtype_and_lets_gradients_through():
    plain = layer(torch.bfloat16)
    packed = linear.PackedLinear(plain.weight, plain.bias)
    x = torch.randn(2, 40, requires_grad=True)
    out = packed(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.float().sum(0).expand(2, -1))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_joined_layers_give_their_outputs_side_by_side(kind):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    parts = [layer(dtype, rows=rows, columns=64) for rows in (64, 32, 32)]
    if kind.startswith("int"):
        parts = [RowwiseLinear.from_linear(one, int(kind[3:])) for one in parts]
    holder = nn.ModuleDict({name: copy.deepcopy(one) for name, one in zip("qkv", parts, strict=True)}).eval()
    before = {name: value.clone() for name, value in holder.state_dict().items()}
    whole = linear.join(holder, "qkv")
    x = torch.randn(5, 64).to(dtype)
    atol = 1e-6 if kind == "fp32" else 0.03
    torch.testing.assert_close(whole(x), torch.cat([one(x) for one in parts], -1), rtol=0, atol=atol)
    for name, one in zip("qkv", parts, strict=True):
        torch.testing.assert_close(holder[name](x), one(x), rtol=0, atol=atol)
    after = holder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert linear.weight_bytes(holder) == sum(v.numel() * v.element_size() for v in before.values())
    assert linear.join(holder, "qkv") is whole


@pytest.mark.parametrize(
    "layers",
    [
        (layer(), layer(bias=False)),
        (layer(), layer(torch.bfloat16)),
        (layer(), RowwiseLinear.from_linear(layer(), 8)),
        (RowwiseLinear.from_linear(layer(), 4), RowwiseLinear.from_linear(layer(), 8)),
        (layer(), nn.Sequential(layer())),
    ],
    ids=["bias", "dtype", "codes", "bits", "adapter"],
)
def test_layers_of_different_kinds_are_not_joined(layers):
    holder = nn.ModuleDict(dict(zip("ab", layers, strict=True)))
    assert linear.join(holder, "ab") is None
    assert list(holder.values()) == list(layers)


def test_a_head_that_shares_the_embedding_is_not_packed():
    model = nn.ModuleDict({"embedding": nn.Embedding(24, 40), "dense": layer(), "head": layer(bias=False)})
    model["head"].weight = model["embedding"].weight
    assert linear.pack(model) == 24 * 40 * 4
    assert type(model["head"]) is nn.Linear
    assert type(model["dense"]) is linear.PackedLinear


def test_what_this_processor_lacks_is_computed_as_always(monkeypatch):
    monkeypatch.setattr(linear, "works", lambda dtype: False)
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    x = torch.randn(3, 40)
    right = torch.cat([one(x) for one in model.values()], -1)
    assert linear.pack(model) == 0
    torch.testing.assert_close(linear.join(model, "ab")(x), right)


# --- 8-bit activations

needs_dynamic = pytest.mark.skipif(not linear.dynamic_works(), reason="torch has no 8-bit product here")


@needs_dynamic
@pytest.mark.parametrize("dtype", linear.DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_eight_bit_activations_lose_half_a_level_of_the_rows_largest_value(dtype, bits):
    plain = layer(torch.float32, rows=48, columns=64)
    codes = RowwiseLinear.from_linear(plain, bits)
    made = nn.ModuleDict({"one": copy.deepcopy(codes)})
    assert linear.dynamic(made) == 1
    x = torch.randn(2, 5, 64) * torch.tensor([1e-4, 1.0, 30.0, 1e4, 0.0])[:, None]
    out = made["one"](x.to(dtype))
    assert out.dtype == dtype
    weight = codes.dequantized().double()
    exact = x.to(dtype).double() @ weight.t() + plain.bias.double()
    # Each of 64 products is off by at most half a level of the activation.
    bound = x.abs().amax(-1, keepdim=True) / 127 * 0.501 * weight.abs().sum(1) + exact.abs() * 2**-7
    assert bool(((out.double() - exact).abs() <= bound + 1e-9).all())
    torch.testing.assert_close(
        out[:, 4].float(), plain.bias.to(dtype).float().expand(2, -1)
    )  # a row of zeros


@needs_dynamic
def test_codes_survive_eight_bit_activations():
    codes = RowwiseLinear.from_linear(layer(rows=48, columns=64), 8)
    made = nn.ModuleDict({"one": copy.deepcopy(codes)})
    linear.dynamic(made)
    assert torch.equal(made["one"].stored(), codes.stored())
    assert torch.equal(made.state_dict()["one.weight"], codes.stored())
    assert torch.equal(made.state_dict()["one.weight_scale"], codes.weight_scale.float())
    assert linear.weight_bytes(made) == 48 * 64 + 48 * 4 + 48 * 4


# --- the lean forward

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
    "rms_norm_eps": 1e-5, "attention_bias": True,
}  # fmt: skip


def made(kind: str, **more):
    """A small decoder with random weights; biases and norms are random too."""
    from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

    config, model = (Glm4Config, Glm4ForCausalLM) if kind == "glm4" else (GlmConfig, GlmForCausalLM)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if kind == "stretched":
        rope |= {"rope_type": "linear", "factor": 4.0}
    torch.manual_seed(5)
    built = model(config(**SIZES | {"rope_parameters": rope} | more)).eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if kind == "lora":
        from glm_core import adapters

        adapters.add_lora(built, targets=["q_proj", "down_proj"])
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        built.eval().requires_grad_(False)
    if kind in ("int8", "int4"):
        from glm_core import quantization

        quantization.quantize(built, int(kind[3:]))
    return built


@needs_dynamic
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_with_eight_bit_activations_says_nearly_what_it_said(kind):
    model = made(kind)
    fast = laid_out(copy.deepcopy(model), dynamic=True)
    kinds = [
        type(one) for layer in fast.layers for one in (layer.qkv, layer.output, layer.gate_up, layer.down)
    ]
    assert set(kinds) == {linear.DynamicLinear} == {type(fast.model.lm_head)}
    ids, mask, positions = columns(4, 12, 0, 0)
    with torch.inference_mode():
        right = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        found = fast(ids, mask, KVCache(3), positions, 12)
        again = fast.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert (found - right).square().mean().sqrt() < 0.05 * right.std()
    torch.testing.assert_close(found, again, rtol=0, atol=0.05 * float(right.std()))


def columns(rows: int, n: int, cached: int, padding: int):
    """ids, mask and positions of n new columns behind cached ones; rows but the first begin with padding."""
    ids = torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(rows + n + cached))
    total = cached + n
    real = torch.ones(rows, total, dtype=torch.bool)
    real[1:, :padding] = False
    place = torch.arange(total)
    own = place[cached:, None]
    mask = (real[:, None, :] & (place <= own)) | (place == own)
    return ids, mask[:, None], (real.cumsum(1) - 1).clamp_min(0)[:, cached:]


@pytest.mark.parametrize("most", [0, 1 << 24])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["glm", "glm4", "stretched", "lora", "int8", "int4"])
def test_the_lean_forward_gives_the_models_own_logits_at_every_step(kind, heads, most, monkeypatch):
    monkeypatch.setattr("glm_core.models.lean.MOST_MASK", most)
    model = made(kind, num_key_value_heads=heads)
    fast = laid_out(copy.deepcopy(model))
    assert fast is not None
    own, ours, cached = KVCache(3), KVCache(3), 0
    with torch.inference_mode():
        for n in (9, 1, 1, 4, 1):
            ids, mask, positions = columns(3, n, cached, 3)
            right = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=own,
                position_ids=positions,
                use_cache=True,
            ).logits
            found = fast(ids, mask, ours, positions, n)
            own.length += n
            ours.length += n
            cached += n
            real = slice(None) if cached > 9 else slice(3, None)  # what padding columns give is never read
            torch.testing.assert_close(found[:, real], right[:, real], rtol=0, atol=3e-5)
            torch.testing.assert_close(fast(*columns(1, 2, 0, 0)[:2], KVCache(3), torch.arange(2)[None], 1)[0, 0],
                                       fast(*columns(1, 2, 0, 0)[:2], KVCache(3), torch.arange(2)[None], 2)[0, 1])  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_lean_forward_uses_the_weights_as_they_were_laid_out_and_keeps_no_others(dynamic):
    """The layers it holds are those in the model, and of the ones that stood there before none is left in memory."""
    model = made("int8" if dynamic else "glm")
    old = [
        weakref.ref(one)
        for path, one in model.named_modules()
        if isinstance(one, nn.Linear | RowwiseLinear) and not path.endswith("lm_head")
    ]
    fast = laid_out(model, dynamic)
    gc.collect()
    assert len(old) == 3 * 6 and not any(one() for one in old)
    used = [one for layer in fast.layers for one in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert {type(one) for one in used} == {linear.DynamicLinear if dynamic else linear.PackedLinear}
    assert [one.output for one in fast.layers] == [one.self_attn.o_proj for one in model.model.layers]


# --- how many rows are computed for a few


def test_more_rows_are_computed_only_where_that_is_clearly_faster():
    times = {1: 5.0, 2: 5.2, 3: 4.1, 4: 3.8, 5: 3.9, 6: 3.7, 7: 4.5, 8: 4.4}
    assert linear.least_time(times.__getitem__) == (0, 6, 6, 6, 4, 6, 6, 7, 8)
    assert linear.least_time(lambda rows: 1 + rows / 100) == tuple(range(9))


@pytest.mark.parametrize("dtype", [*linear.DTYPES, pytest.param(torch.int8, marks=needs_dynamic)])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 1, 40), (3, 40), (0, 40), (9, 40)])
def test_rows_added_for_speed_change_no_answer(dtype, shape):
    x = torch.randn(shape)
    if dtype == torch.int8:
        codes = RowwiseLinear.from_linear(layer(), 8)
        one = linear.DynamicLinear(codes.stored(), codes.weight_scale, codes.bias)
    else:
        plain = layer(dtype)
        one, x = linear.PackedLinear(plain.weight, plain.bias), x.to(dtype)
    right = one(x)
    one.rows = (0, 6, 6, 6, 4)
    found = one(x)
    assert found.shape == right.shape and found.dtype == right.dtype
    torch.testing.assert_close(found, right, rtol=0 if dtype == torch.int8 else 2**-7, atol=1e-6)


def test_a_model_larger_than_caches_gets_the_fastest_rows(monkeypatch):
    monkeypatch.setattr(linear, "fastest_rows", lambda dtype: (0, 6))
    small = nn.ModuleDict({"a": layer(), "b": layer()})
    linear.pack(small)
    linear.prepare(small, torch.float32)
    assert small["a"].rows == ()
    monkeypatch.setattr(linear, "TRIAL_BYTES", 1)
    large = nn.ModuleDict({"a": layer(), "b": layer(), "c": layer()})
    whole = linear.join(large, "ab")
    linear.pack(large)
    linear.prepare(large, torch.float32)
    assert whole.rows == large["c"].rows == (0, 6)


def test_an_adapter_that_is_switched_off_is_off_in_the_lean_forward():
    from peft.tuners.tuners_utils import BaseTunerLayer

    bare, adapted = made("glm"), made("lora")
    fast = lean(adapted)
    ids, mask, positions = columns(2, 6, 0, 0)
    with torch.inference_mode():
        on = fast(ids, mask, KVCache(3), positions, 6)
        for one in adapted.modules():
            if isinstance(one, BaseTunerLayer):
                one.enable_adapters(False)
        off = fast(ids, mask, KVCache(3), positions, 6)
        right = bare(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(off, right, rtol=0, atol=3e-5)
    assert (on - off).abs().max() > 0.01


def test_other_architectures_have_no_lean_forward():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    assert lean(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()) is None
    assert lean(made("glm", hidden_act="gelu")) is None
    assert lean(made("glm").train()) is None


def test_an_engines_model_is_still_the_checkpoint(tiny_checkpoint):
    """What the engine made faster is saved as it was loaded, and counts the same bytes."""
    from glm_core.engine import Engine

    loaded = checkpoints.load(tiny_checkpoint, "fp32", "cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    size = loaded.weight_bytes
    engine = Engine(loaded)
    try:
        assert any(isinstance(one, linear.PackedLinear) for one in loaded.model.modules())
        after = loaded.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        assert loaded.weight_bytes == size
    finally:
        engine.close()


@needs_dynamic
@pytest.mark.parametrize("stored", ["", "int8", "int4"])
def test_int8_dynamic_is_a_precision_to_load_in(tiny_checkpoint, tmp_path, stored):
    from glm_core.engine import Engine, GenerationSettings, Request

    folder = checkpoints.convert(tiny_checkpoint, tmp_path / stored, stored) if stored else tiny_checkpoint
    loaded = checkpoints.load(folder, "int8-dynamic", "cpu")
    assert loaded.precision == "int8-dynamic"
    engine = Engine(loaded)
    try:
        kinds = {type(one) for one in loaded.model.modules()}
        assert linear.DynamicLinear in kinds and RowwiseLinear not in kinds and nn.Linear not in kinds
        request = Request((5, 6, 7, 8), GenerationSettings(max_new_tokens=4))
        handle = engine.submit(request)
        assert handle.wait(60) and handle.state == "done" and len(handle.ids) > 0
    finally:
        engine.close()


def test_int8_dynamic_is_refused_where_it_cannot_be_computed(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(linear, "dynamic_works", lambda: False)
    with pytest.raises(GLMError, match="does not run on this processor"):
        checkpoints.load(tiny_checkpoint, "int8-dynamic", "cpu")
