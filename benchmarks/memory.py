"""Predicted memory beside the memory that fresh processes take, for every level, context and batch.

    python benchmarks/memory.py [--model mini,large] [--precision fp32,bf16,int8,int4] [--context 128,512,2048] [--batch 1,4]

Two models: the embedded glm-mini, of which the process itself is the larger part, and one of 300 million random weights
in ChatGLM2's layout (0.6 GB in bf16), written into a temporary folder. Every level runs in a process of its own. The
prediction knows the configuration and nothing of this machine; with --calibrated it takes the bytes of Python and its
libraries from the measurement, as the Memory page does for a machine that was measured. Below that, the predictions for
the published shapes beside the published figures, which were measured on GPUs with the reference's own code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_core import memory
from glm_core.settings import MINI

LARGE = {
    "model_type": "chatglm", "padded_vocab_size": 16000, "hidden_size": 1024, "ffn_hidden_size": 2816,
    "num_layers": 24, "num_attention_heads": 8, "multi_query_group_num": 2, "kv_channels": 128,
    "layernorm_epsilon": 1e-05, "seq_length": 8192, "add_qkv_bias": True, "torch_dtype": "bfloat16",
}  # fmt: skip
MIB = 1 << 20
WITHIN = 0.07


def write(folder: Path) -> Path:
    """A checkpoint of LARGE with random weights and glm-mini's tokenizer."""
    import torch
    from safetensors.torch import save_file

    from glm_core.checkpoints import loading

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LARGE))
    shutil.copy(MINI / "tokenizer.model", folder)
    torch.manual_seed(7)
    hidden, inner, fused = LARGE["hidden_size"], LARGE["ffn_hidden_size"], 1024 + 2 * 2 * 128
    assert loading

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    weights = {
        "transformer.embedding.word_embeddings.weight": random(LARGE["padded_vocab_size"], hidden),
        "transformer.output_layer.weight": random(LARGE["padded_vocab_size"], hidden),
        "transformer.encoder.final_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(LARGE["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            prefix + "self_attention.query_key_value.weight": random(fused, hidden),
            prefix + "self_attention.query_key_value.bias": random(fused),
            prefix + "self_attention.dense.weight": random(hidden, hidden),
            prefix + "mlp.dense_h_to_4h.weight": random(2 * inner, hidden),
            prefix + "mlp.dense_4h_to_h.weight": random(hidden, inner),
        }
    save_file(weights, str(folder / "model.safetensors"))
    return folder


def rows(level: memory.Level, folder: Path, calibrated: bool) -> list[tuple[str, int, int, int, int]]:
    """(what, context, batch, predicted, measured) of a level."""
    program = level.program if calibrated else None
    first = memory.predict(folder, level.level, 32, program=program)
    found = [("at load", 0, 0, first.at_load, level.at_load)]
    for point in level.points:
        if point.error:
            print(f"  {point.context} x {point.batch}: {point.error}")
            continue
        one = memory.predict(folder, level.level, point.context, point.batch, program=program)
        found.append(("answering", point.context, point.batch, one.total, point.peak))
    return found


def measured(name: str, folder: Path, options: argparse.Namespace) -> list[float]:
    """Print the table of a model; the deviations."""
    deviations = []
    print(f"{name}: predicted and measured MiB at most, and how far the first is from the second")
    for precision in options.precision.split(","):
        level = memory.measure(folder, precision, numbers(options.context), numbers(options.batch))
        assert level is not None
        print(f"  {precision}: weights {level.weights / MIB:,.0f}, program {level.program / MIB:,.0f},"
              f" loaded in {level.load_seconds:.1f} s")  # fmt: skip
        for what, context, batch, predicted, peak in rows(level, folder, options.calibrated):
            off = predicted / peak - 1
            deviations.append(off)
            where = f"{context:6,} x {batch:<3}" if context else " " * 12
            flag = "" if abs(off) <= WITHIN else "  <--"
            print(
                f"    {what:10}{where} {predicted / MIB:9,.0f} {peak / MIB:9,.0f}  {off:+6.1%}{flag}",
                flush=True,
            )
    return deviations


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini,large")
    parser.add_argument("--precision", default="fp32,bf16,int8,int4")
    parser.add_argument("--context", default="128,512,2048")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--calibrated", action="store_true")
    options = parser.parse_args()
    deviations = []
    with tempfile.TemporaryDirectory() as made:
        for name in options.model.split(","):
            folder = MINI if name == "mini" else write(Path(made) / "large")
            deviations += measured(name, folder, options)
    print("Published (GiB, on GPUs, the reference's own code) and predicted in its way; ours beside")
    for figure in memory.FIGURES:
        ours, theirs = figure.predicted().total / 2**30, figure.as_published() / 2**30
        print(f"  {figure.model:12} {figure.what:10}{figure.level} {figure.size:5} {theirs:6.2f} {figure.deviation():+6.1%}"
              f" {ours:8.2f}")  # fmt: skip
    off = [one for one in deviations if abs(one) > WITHIN]
    print(f"{len(deviations) - len(off)} of {len(deviations)} within {WITHIN:.0%}; "
          f"the furthest {max(deviations, key=abs):+.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
