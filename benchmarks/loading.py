"""Memory and time of loading a checkpoint of ChatGLM2-6B's shape, made of random weights on the spot.

    python benchmarks/loading.py [FOLDER]

Writes 12.5 GB of bf16 shards into FOLDER (a temporary folder otherwise, removed at the end), loads them in bf16 and, from
the same shards, in INT4, each in a process of its own, and generates a few tokens. Prints the largest anonymous
memory while loading (mapped files do not count: the system takes those pages back at will) as a multiple of the
weights, the memory the process held before being taken off, and the time as a multiple of plain reading, both from
the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_core.settings import MINI

CONFIG = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True, "ffn_hidden_size": 13696, "fp32_residual_connection": False,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "original_rope": True,
    "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True, "seq_length": 32768,
    "torch_dtype": "bfloat16", "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SHARDS = 7


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ChatGLM2-6B's weights."""
    hidden, inner, vocabulary, layers = 4096, 13696, 65024, 28
    fused = 4096 + 2 * 2 * 128
    found: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocabulary, hidden)}
    for n in range(layers):
        head = f"transformer.encoder.layers.{n}."
        found |= {
            f"{head}input_layernorm.weight": (hidden,),
            f"{head}self_attention.query_key_value.weight": (fused, hidden),
            f"{head}self_attention.query_key_value.bias": (fused,),
            f"{head}self_attention.dense.weight": (hidden, hidden),
            f"{head}post_attention_layernorm.weight": (hidden,),
            f"{head}mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{head}mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    found["transformer.encoder.final_layernorm.weight"] = (hidden,)
    found["transformer.output_layer.weight"] = (vocabulary, hidden)
    return found


def make(folder: Path) -> None:
    """Write the checkpoint: normal weights of standard deviation 0.02, norms of ones."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    block = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, 0.02)
    names = list(shapes().items())
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for shard in range(SHARDS):
        tensors = {}
        for name, shape in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            if "layernorm" in name:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            size = int(torch.tensor(shape).prod())
            shift = torch.randint(0, 1 << 20, ()).item()
            tensors[name] = block.roll(shift).repeat(-(-size // len(block)))[:size].view(shape)
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    shutil.copyfile(MINI / "tokenizer.model", folder / "tokenizer.model")


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this system does not say what memory is anonymous")


def forgotten(folder: Path) -> list[Path]:
    """The weight files, no page of them in the system's cache any more."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def read(folder: Path) -> float:
    """Seconds of reading all weight files from the disk, without keeping anything."""
    buffer = bytearray(16 << 20)
    files = forgotten(folder)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    took = time.perf_counter() - started
    forgotten(folder)
    return took


def load(folder: Path, precision: str, tokens: int) -> None:
    """Load, generate, and print the figures; run in a process of its own."""
    import torch  # noqa: F401  # what libraries take is not the model's

    from glm_core import checkpoints
    from glm_core.cli.output import Meter
    from glm_core.engine import Engine, GenerationSettings, Request

    reading = read(folder)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    meter = Meter()
    loaded = checkpoints.load(folder, precision, "cpu", progress=meter)
    meter.end()
    took = time.perf_counter() - started
    peak[0] = max(peak[0], anonymous())
    done.set()
    weights = loaded.weight_bytes
    print(
        f"{precision}: weights {weights / 2**30:.2f} GiB, peak while loading {(peak[0] - before) / 2**30:.2f} GiB "
        f"= {(peak[0] - before) / weights:.3f} times the weights (goal 1.3); {took:.0f} s, reading the files "
        f"{reading:.0f} s: x {took / reading:.2f} (goal 2)",
        flush=True,
    )
    engine = Engine(loaded)
    ids = loaded.tokenizer.encode("Who are you?")
    handle = engine.submit(Request(tuple(ids), GenerationSettings(max_new_tokens=tokens)))
    handle.wait()
    print(
        f"{precision}: {handle.n_tokens} tokens generated ({handle.state}), {handle.tokens_per_second:.2f} tokens/s",
        flush=True,
    )
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--precision", help="load only, in this process")
    options = parser.parse_args()
    if options.precision:
        load(options.folder, options.precision, options.tokens)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "chatglm2-6b-shape"
        if not (folder / "config.json").is_file():
            started = time.perf_counter()
            make(folder)
            print(f"written in {time.perf_counter() - started:.0f} s", flush=True)
        for precision in ("bf16", "int4"):
            command = [
                sys.executable,
                __file__,
                str(folder),
                "--precision",
                precision,
                "--tokens",
                str(options.tokens),
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
