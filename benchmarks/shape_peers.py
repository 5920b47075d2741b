"""llama.cpp and chatglm.cpp over random weights of a ChatGLM2 shape, for benchmarks/shape.py.

Their model files are written here, without a float model ever being made: codes and scales are drawn once per tensor
shape and written again for every layer. Speed does not depend on the numbers.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32  # weights per block of q8_0 and q4_0: one fp16 scale, then the codes
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
CONTEXT = 4096
EACH = 640  # columns of a stream


def tensors(shape: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names in chatglm.cpp's files and shapes, in the order they are written."""
    wide, inner = shape["hidden_size"], shape["ffn_hidden_size"]
    qkv = wide + 2 * shape["multi_query_group_num"] * shape["kv_channels"]
    found: list[tuple[str, tuple[int, ...]]] = [
        ("transformer.embedding.word_embeddings.weight", (shape["padded_vocab_size"], wide))
    ]
    for i in range(shape["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        found += [
            (f"{layer}.input_layernorm.weight", (wide,)),
            (f"{layer}.self_attention.query_key_value.weight", (qkv, wide)),
            (f"{layer}.self_attention.query_key_value.bias", (qkv,)),
            (f"{layer}.self_attention.dense.weight", (wide, wide)),
            (f"{layer}.post_attention_layernorm.weight", (wide,)),
            (f"{layer}.mlp.dense_h_to_4h.weight", (2 * inner, wide)),
            (f"{layer}.mlp.dense_4h_to_h.weight", (wide, inner)),
        ]
    found.append(("transformer.encoder.final_layernorm.weight", (wide,)))
    found.append(("transformer.output_layer.weight", (shape["padded_vocab_size"], wide)))
    return found


GGUF_NAMES = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


class Blocks:
    """Random weights as the bytes of a format; one array per shape."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._made: dict[tuple[int, ...], np.ndarray] = {}
        self._random = np.random.default_rng(7)

    def __call__(self, size: tuple[int, ...]) -> np.ndarray:
        if len(size) == 1:  # norms and biases
            return np.ones(size, np.float32)
        if size not in self._made:
            self._made[size] = self._weights(size)
        return self._made[size]

    def _weights(self, size: tuple[int, ...]) -> np.ndarray:
        rows, columns = size
        if self.kind == "f16":
            return (self._random.random(size, np.float32) * 0.04 - 0.02).astype(np.float16)
        made = self._random.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES[self.kind]), np.uint8)
        scale = np.float16(2e-4 if self.kind == "q8_0" else 3e-3)
        made[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        return made.reshape(rows, -1)


def write_gguf(path: Path, shape: dict[str, Any], kind: str) -> None:
    """A model of llama.cpp's architecture "chatglm" without a vocabulary."""
    import gguf

    types = {name.lower(): getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "F16")}
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["ffn_hidden_size"])
    writer.add_block_count(shape["num_layers"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["multi_query_group_num"])
    writer.add_layer_norm_rms_eps(shape["layernorm_epsilon"])
    writer.add_rope_dimension_count(shape["kv_channels"] // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape["padded_vocab_size"])
    blocks = Blocks(kind)
    for name, size in tensors(shape):
        stem, _, what = name.rpartition(".")
        if stem.startswith("transformer.encoder.layers."):
            number, _, part = stem.removeprefix("transformer.encoder.layers.").partition(".")
            told = f"blk.{number}.{GGUF_NAMES[part]}.{what}"
        else:
            told = f"{GGUF_NAMES[stem]}.{what}"
        data = blocks(size)
        writer.add_tensor(told, data, raw_dtype=types[kind] if len(size) == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ggml(path: Path, shape: dict[str, Any], kind: str, tokenizer: Path) -> None:
    """A model of chatglm.cpp's type ChatGLM2; the file needs a sentencepiece model, whichever it is."""
    number = {"f16": 1, "q4_0": 2, "q8_0": 8}
    proto = tokenizer.read_bytes()
    blocks = Blocks(kind)
    with path.open("wb") as file:
        file.write(b"ggml" + struct.pack("i", 2))
        file.write(
            struct.pack(
                "iiiiiiiififiii", 2, number[kind], shape["padded_vocab_size"], shape["hidden_size"],
                shape["num_attention_heads"], shape["multi_query_group_num"], shape["num_layers"],
                shape["ffn_hidden_size"], shape["layernorm_epsilon"], 0, 10000.0, CONTEXT, 2, 0,
            )
        )  # fmt: skip
        file.write(struct.pack("i", len(proto)) + proto)
        for name, size in tensors(shape):
            told = name.encode()
            file.write(struct.pack("i", len(told)) + told)
            file.write(
                struct.pack("i" * (2 + len(size)), len(size), *size, number[kind] if len(size) == 2 else 0)
            )
            file.seek(-(-file.tell() // 16) * 16)
            blocks(size).tofile(file)


class LlamaCpp:
    """One model of llama.cpp through its C functions, as its package for Python exposes them."""

    def __init__(self, path: Path, threads: int, streams: int) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        model = lib.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        context = lib.llama_context_default_params()
        context.n_ctx = EACH * streams  # a part of its own for every stream
        context.n_batch, context.n_ubatch = 2048, 512
        context.n_seq_max, context.n_threads, context.n_threads_batch = streams, threads, threads
        self.context = lib.llama_init_from_model(self.model, context)
        self.random = np.random.default_rng(1)

    def _feed(self, rows: int, tokens: int, past: int) -> float:
        """Seconds of a call that feeds so many tokens to each row behind `past`."""
        lib = self.lib
        batch = lib.llama_batch_init(rows * tokens, 0, 1)
        batch.n_tokens = rows * tokens
        for i in range(rows * tokens):
            row, column = divmod(i, tokens)
            batch.token[i] = int(self.random.integers(5, 6000))
            batch.pos[i] = past + column
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = column == tokens - 1
        started = time.perf_counter()
        status = lib.llama_decode(self.context, batch)
        lib.llama_synchronize(self.context)
        seconds = time.perf_counter() - started
        lib.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, streams: int, past: int, steps: int) -> list[float]:
        self._clear()
        self._feed(streams, past, 0)
        return [self._feed(streams, 1, past + i) for i in range(steps)]

    def prefill(self, tokens: int) -> float:
        self._clear()
        return self._feed(1, tokens, 0)


class ChatGLMCpp:
    """One model of chatglm.cpp; it knows one stream only."""

    def __init__(self, path: Path, threads: int, streams: int) -> None:
        import chatglm_cpp
        from chatglm_cpp import _C

        self.model = chatglm_cpp.Pipeline(str(path)).model
        self.settings = _C.GenerationConfig(max_length=CONTEXT, do_sample=False)
        self.random = np.random.default_rng(1)

    def _feed(self, ids: list[int], past: int) -> float:
        started = time.perf_counter()
        self.model.generate_next_token(ids, None, self.settings, past, len(ids))
        return time.perf_counter() - started

    def _ids(self, count: int) -> list[int]:
        return [int(i) for i in self.random.integers(5, 6000, count)]

    def decode(self, streams: int, past: int, steps: int) -> list[float]:
        ids = self._ids(past)
        self._feed(ids, 0)
        seconds = []
        for _ in range(steps):
            ids = ids + self._ids(1)
            seconds.append(self._feed(ids, len(ids) - 1))
        return seconds

    def prefill(self, tokens: int) -> float:
        return self._feed(self._ids(tokens), 0)
