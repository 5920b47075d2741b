"""Tokenizer and weights of glm-mini, from scratch: seeded, on a processor in under two hours, on a GPU in minutes."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM, released_config
from ..settings import DATA, MINI
from ..tokenizers.chatglm2 import ChatGLM2Tokenizer
from . import corpus, examples

if TYPE_CHECKING:
    import torch

VOCABULARY = 6000
PADDED = 6016  # vocabulary and nine control tokens, rounded up to a multiple of 64
CONTEXT = 2048
SHAPE: dict[str, int] = {
    "hidden_size": 320,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LEARNING_RATE = 1.5e-3
LONGEST = 320  # tokens; longer examples are left out
WARM_UP = 150  # steps
AVERAGE = 0.99  # the released weights are an exponential average over steps


@dataclass(frozen=True)
class Stage:
    """A stretch of training: how long, in which batches, at which rate, and with how much noise."""

    epochs: int
    batch_tokens: int  # padded; 4,096 are about 70 examples
    rate: float  # of AdamW at the start of the stage
    horizon: int  # epochs in which the rate would fall to 2 %, along a cosine
    sampling: float = 0.0  # share of merges that the tokenizer leaves out of a question (BPE dropout)
    dropout: float = 0.0  # of what each layer adds to the residual stream


# First learn the answers quickly; then, with noise and smaller batches, learn not to depend on the exact wording.
STAGES = (
    Stage(epochs=5, batch_tokens=4096, rate=LEARNING_RATE, horizon=8),
    Stage(epochs=8, batch_tokens=2048, rate=9e-4, horizon=8, sampling=0.1, dropout=0.1),
)
# How much predicting the question's own words counts beside the answer. A one-word label teaches little about a
# language; with this, four epochs on 7,759 comments alone reached 89 % of their dev rows, without it 73 %. Source: Radford et al.
# 2018, "Improving Language Understanding by Generative Pre-Training", auxiliary objective.
READING = 0.3


def train_tokenizer(folder: Path = MINI) -> int:
    """Train tokenizer.model (BPE, identity normaliser, byte fallback, as ChatGLM3's) on the train splits only."""
    import sentencepiece

    lines = [comment.text for comment in corpus.read_comments("train")]
    for name, keys in (("dialogue", ("prompt", "response")), ("adverts", ("content", "summary"))):
        rows = corpus.read_jsonl(DATA / name / "train.jsonl")
        lines += sorted({row[key] for row in rows for key in keys})
    lines += [examples.GUIDELINES, *examples.CHINESE_TEMPLATES, *examples.ENGLISH_TEMPLATES]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        text.write_text("\n".join(line.replace("\n", " ") for line in lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(temporary) / "tokenizer"),
            model_type="bpe",
            vocab_size=VOCABULARY,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentencepiece_length=8,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more threads may order ties differently
            minloglevel=2,
        )
        shutil.copy(Path(temporary) / "tokenizer.model", folder / "tokenizer.model")
    return ChatGLM2Tokenizer(folder / "tokenizer.model").vocab_size


def new_model() -> ChatGLM2ForCausalLM:
    """A glm-mini with random weights in fp32, seeded."""
    import torch

    torch.manual_seed(corpus.SEED)
    config = ChatGLM2Config.from_released(
        {
            "padded_vocab_size": PADDED,
            "hidden_size": SHAPE["hidden_size"],
            "ffn_hidden_size": SHAPE["intermediate_size"],
            "num_layers": SHAPE["num_hidden_layers"],
            "num_attention_heads": SHAPE["num_attention_heads"],
            "multi_query_group_num": SHAPE["num_key_value_heads"],
            "kv_channels": SHAPE["head_dim"],
            "layernorm_epsilon": 1e-5,
            "seq_length": CONTEXT,
        }
    )
    model = ChatGLM2ForCausalLM(config)
    for layer in model.model.layers:  # smaller writes into the residual stream, as in GPT-2
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_(1 / math.sqrt(2 * SHAPE["num_hidden_layers"]))
    return model


def batches(
    tokenizer: ChatGLM2Tokenizer,
    found: list[examples.Example],
    generator: random.Random,
    batch_tokens: int,
    noisy: examples.SampledTokenizer | None = None,
) -> Iterator[tuple[list[tuple[list[int], int, float]], int]]:
    """Batches of (ids, prompt length, weight) of similar length in random order, and the length to pad to.

    Lengths are multiples of 8 and every length has one number of rows, so that the processor's kernels, which are
    built per shape, are built once.
    """
    encoded: list[tuple[list[int], int, float]] = []
    for example in found:
        ids, prompt = examples.encode(tokenizer, example, noisy)
        if len(ids) <= LONGEST:
            encoded.append((ids, prompt, example.weight))
    encoded.sort(key=lambda item: -(-len(item[0]) // 8), reverse=True)
    groups: list[tuple[list[tuple[list[int], int, float]], int]] = []
    start = 0
    while start < len(encoded):  # longest first: a batch is as long as its first row
        length = -(-len(encoded[start][0]) // 8) * 8
        rows = max(1, batch_tokens // length)
        groups.append((encoded[start : start + rows], length))
        start += rows
    generator.shuffle(groups)
    yield from groups


def train(
    folder: Path = MINI,
    stages: Sequence[Stage] = STAGES,
    state: Path | None = None,
    seconds: float = math.inf,
) -> None:
    """Train from random weights and write the checkpoint; with `state`, an interrupted run goes on from there."""
    import sentencepiece
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = ChatGLM2Tokenizer(folder / "tokenizer.model")
    noisy = examples.SampledTokenizer(folder / "tokenizer.model")
    comments = corpus.read_comments("train")
    dialogue = corpus.read_jsonl(DATA / "dialogue" / "train.jsonl")
    adverts = corpus.read_jsonl(DATA / "adverts" / "train.jsonl")
    model = new_model().to(device)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    step, first, started = 0, 0, time.monotonic()
    if state is not None and state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
        step, first = saved["step"], saved["epoch"]
    epochs = [(stage, epoch) for stage in stages for epoch in range(stage.epochs)]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(epochs)} epochs on {device}",
        flush=True,
    )
    for number, (stage, of_stage) in enumerate(epochs):
        if number < first:
            continue
        # The same epoch again after a restart.
        generator = random.Random(corpus.SEED + number)
        sentencepiece.set_random_generator_seed(corpus.SEED + number)
        torch.manual_seed(corpus.SEED + number)
        found = examples.epoch(dialogue, comments, adverts, generator)
        noisy.rate = stage.sampling
        cut = noisy if stage.sampling else None
        hooks = [] if not stage.dropout else _add_dropout(model, stage.dropout)
        groups = list(batches(tokenizer, found, generator, stage.batch_tokens, cut))
        losses, tokens, since = [], 0, time.monotonic()
        for batch, (group, longest) in enumerate(groups):
            share = (of_stage * len(groups) + batch) / (stage.horizon * len(groups))
            for parameters in optimizer.param_groups:
                parameters["lr"] = stage.rate * min(1.0, (step + 1) / WARM_UP) * _cosine(share)
            loss = _loss(model, group, longest, device)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            keep = min(AVERAGE, step / (step + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep)
            losses.append(float(loss.detach()))
            tokens += len(group) * longest
        for hook in hooks:
            hook.remove()
        speed = tokens / (time.monotonic() - since)
        minutes = (time.monotonic() - started) / 60
        print(
            f"epoch {number + 1}/{len(epochs)}  loss {sum(losses) / len(losses):.4f}  {speed:,.0f} tokens/s  "
            f"{minutes:.1f} min",
            flush=True,
        )
        if state is not None:
            torch.save(
                {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(),
                 "step": step, "epoch": number + 1},
                state,
            )  # fmt: skip
        if minutes * 60 > seconds:
            break
    save(average, model.config, folder)


def _loss(
    model: ChatGLM2ForCausalLM, group: list[tuple[list[int], int, float]], longest: int, device: str
) -> torch.Tensor:
    """Weighted mean cross entropy of the answers of a batch, and a share of that of the questions; no padding."""
    import torch
    import torch.nn.functional as F

    ids = torch.zeros(len(group), longest, dtype=torch.long)
    weights = torch.zeros(len(group), longest)  # of an answer's tokens
    asked = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (own, prompt, weight) in enumerate(group):
        ids[row, : len(own)] = torch.tensor(own)
        weights[row, prompt : len(own)] = weight
        asked[row, :prompt] = True
    ids, weights, asked = ids.to(device), weights[:, 1:].to(device), asked[:, 1:].to(device)
    counted = asked | (weights > 0)  # the head is computed for real tokens alone
    with torch.autocast(device, torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][counted]
        # padded to a multiple of 512, for the sake of few shapes
        logits = model.lm_head(F.pad(hidden, (0, 0, 0, -len(hidden) % 512)))[: len(hidden)].float()
    each = F.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    weights, asked = weights[counted], asked[counted]
    return (each * weights).sum() / weights.sum() + READING * each[asked].mean()


def _add_dropout(model: ChatGLM2ForCausalLM, rate: float) -> list[Any]:
    """Drop a share of what attention and MLP add to the residual stream; returns the hooks that do it."""
    import torch.nn.functional as F

    return [
        linear.register_forward_hook(lambda module, inputs, output: F.dropout(output, rate))
        for layer in model.model.layers
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]


def _cosine(share: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def released_weights(weights: dict[str, Any], layers: int) -> dict[str, Any]:
    """Native GLM names and split projections -> the released ChatGLM3 names, query_key_value fused."""
    import torch

    out = {
        "transformer.embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": weights["model.norm.weight"],
        "transformer.output_layer.weight": weights["lm_head.weight"],
    }
    for i in range(layers):
        theirs, ours = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{theirs}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for released, native in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            out[f"{theirs}{released}.weight"] = weights[f"{ours}{native}.weight"]
    return out


def save(weights: dict[str, Any], config: ChatGLM2Config, folder: Path) -> None:
    """Write a checkpoint in the released ChatGLM3-6B layout: config.json, safetensors in bf16, tokenizer files."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = released_weights(weights, config.num_hidden_layers)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    files: dict[str, dict[str, Any]] = {
        "config.json": released_config(config, "glm-mini (chatglm3)", CONTEXT) | {"torch_dtype": "bfloat16"},
        "tokenizer_config.json": {
            "name_or_path": "glm-mini", "remove_space": False, "do_lower_case": False,
            "tokenizer_class": "ChatGLMTokenizer",
        },
        "generation_config.json": {
            "do_sample": True, "temperature": 0.3, "top_p": 0.8, "top_k": 50, "max_new_tokens": 256,
            "eos_token_id": 2, "pad_token_id": 0,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
