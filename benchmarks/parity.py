"""The reference's recorded numbers against this program's, in one table: case, what, largest difference, limit, ok.

    python benchmarks/parity.py                                      the part kept in tests/golden
    python benchmarks/parity.py GOLDEN_FOLDER --vocabulary FOLDER    a whole set, with the released vocabularies

The numbers were made by the released code of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B on a CPU. Every file and every
array of the folder is used, or named at the end. Exit status 1 if anything differs by more than its limit.
--vocabulary is the folder of ice_text.model and tokenizer.model; `vocab` beside the golden folder if it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from glm_core import adapters, checkpoints, quantization, weights
from glm_core.checkpoints import inspecting, loading
from glm_core.engine import Engine, GenerationSettings, Request, choose, warp
from glm_core.finetune.encoding import Encoded, encode
from glm_core.finetune.examples import Example
from glm_core.models import released
from glm_core.models.chatglm import ChatGLMConfig, ChatGLMRotary, layouts, positions, visible
from glm_core.models.chatglm import released_config as released_first
from glm_core.models.chatglm2 import ChatGLM2Config
from glm_core.models.chatglm2 import released_config as released_second
from glm_core.tokenizers import chatglm, chatglm2
from glm_core.tokenizers.base import Message
from glm_core.tokenizers.chatglm import ChatGLMTokenizer
from glm_core.tokenizers.chatglm2 import ChatGLM2Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
# The reference differs from itself by up to 2.5e-5 (cached and uncached); of 22 mistakes tried in it each moved some
# case by 1.2e-4 or more.
LOGITS = 5e-5
# Hidden states are several times as large as logits and grow with the layers: 1e-5 of their size is 80 roundings.
RELATIVE = 1e-5
LOSS, GRADIENT = 1e-5, 2e-6  # before the first step: one forward and backward
NORM = 2e-5  # of gradients, relative
STEPS, AFTER = 1e-3, 2e-3  # Adam enlarges rounding: 2.2e-4 between two correct programs after five steps
REDUCED = 0.1  # fp16, where every addition rounds
ERROR = 2.0  # of fp16 and bf16 against fp32: two orders of the same roundings
PROBABILITY = 1e-6
TABLE = 2e-6  # cosines of two processors differ in their last bits; in fp16 and bf16 then by one rounding

VOCABULARIES = {"v1": "ice_text.model", "v2": "tokenizer.model", "v3": "tokenizer.model"}
GENERATIONS = {"v1": "chatglm", "v2": "chatglm2", "v3": "chatglm3"}
# Keys that say how the numbers were made.
ABOUT = {
    "adapter_config", "adapter_keys", "base", "checks", "collator_adds", "distinct_generated_tokens_per_single_case",
    "max_abs_logit_change_from_adapter", "model", "note", "peft", "prefix_past_layout", "saved_keys", "scaling", "seed",
    "source_weights", "strided_step", "trainable", "trainable_after_from_pretrained", "transformers", "vocab",
    "weights", "total_grad_norm_step0", "merged_vs_adapter_max_abs", "half", "bf16", "sha256", "bits",
    "cpu_backward", "kernel_checks",
}  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """All comparisons of one kind in one case: the largest difference among them and where it is."""

    case: str
    what: str
    limit: float | None  # None: has to be equal
    count: int = 0
    wrong: int = 0
    largest: float = 0.0
    where: str = ""
    note: str = ""  # why a difference is meant, or why nothing was compared

    @property
    def ok(self) -> str:
        if self.note:
            return "-"
        return "no" if self.wrong or not self.count else "yes"

    def cells(self) -> tuple[str, str, str, str, str]:
        found = f"{self.largest:.1e}" if self.limit is not None else f"{self.wrong} of {self.count}"
        limit = "equal" if self.limit is None else f"{self.limit:g}"
        what = f"{self.what} ({self.count})" if self.limit is not None and self.count > 1 else self.what
        if self.note:
            return (
                self.case,
                f"{what}: {self.note}",
                found if self.count else "",
                limit if self.count else "",
                "-",
            )
        return self.case, what + (f"; worst: {self.where}" if self.wrong else ""), found, limit, self.ok


class Table:
    """Rows in the order in which they were first compared."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def row(self, case: str, what: str, limit: float | None) -> Row:
        return self.rows.setdefault((case, what), Row(case, what, limit))

    def near(
        self,
        case: str,
        what: str,
        ours: Any,
        theirs: Any,
        limit: float = LOGITS,
        where: str = "",
        rtol: float = 0.0,
    ) -> None:
        """The largest difference of two arrays; with rtol what exceeds rtol times the number."""
        row = self.row(case, what, limit)
        a, b = (
            np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64)
            for x in (ours, theirs)
        )
        row.count += 1
        if a.shape != b.shape or not a.size:
            row.wrong, row.where, row.largest = (
                row.wrong + 1,
                f"{where} {a.shape}, not {b.shape}",
                float("inf"),
            )
            return
        found = float(np.nan_to_num(np.abs(a - b) - rtol * np.abs(b), nan=np.inf).max())
        row.wrong += found > limit
        if found > row.largest:
            row.largest, row.where = found, where

    def same(self, case: str, what: str, ours: Any, theirs: Any, where: str = "") -> None:
        """Whether two things are equal; arrays and lists are compared as a whole."""
        row = self.row(case, what, None)
        row.count += 1
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            equal = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        else:
            equal = ours == theirs
        if not equal:
            row.wrong, row.where = row.wrong + 1, where or f"{str(ours)[:60]} instead of {str(theirs)[:60]}"

    def note(self, case: str, what: str, why: str) -> None:
        """Nothing is compared, or what differs is meant to: the row does not count."""
        self.row(case, what, None).note = why

    @contextlib.contextmanager
    def section(self, case: str) -> Iterator[None]:
        """A part of the comparison; what it raises is a row that failed."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            row = self.row(case, "was compared without an error", None)
            row.count, row.wrong, row.where = 1, 1, f"{type(error).__name__}: {str(error)[:100]}"

    def print(self) -> None:
        lines = [
            ("case", "what", "largest difference", "limit", "ok"),
            *(row.cells() for row in self.rows.values()),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        for i, line in enumerate(lines):
            print(
                "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            )
            if not i:
                print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


class Seen(dict[str, Any]):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


class Folder:
    """The golden folder; remembers which files and which of their parts were used."""

    def __init__(self, path: Path, vocabulary: Path | None) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.open: dict[str, Seen] = {}
        self.used: set[Path] = set()

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def arrays(self, name: str) -> Seen:
        if name not in self.open:
            with np.load(self.path / name) as arrays:
                self.open[name] = Seen({key: torch.tensor(arrays[key]) for key in arrays})
        return self.open[name]

    def json(self, name: str) -> Seen:
        if name not in self.open:
            self.open[name] = Seen(json.loads((self.path / name).read_text(encoding="utf-8")))
        return self.open[name]

    def folder(self, name: str) -> Path:
        """A checkpoint folder; its files count as used."""
        self.used |= {file for file in (self.path / name).iterdir() if file.is_file()}
        return self.path / name

    def vocab(self, family: str) -> Path | None:
        file = None if self.vocabulary is None else self.vocabulary / VOCABULARIES[family]
        return file if file is not None and file.is_file() else None

    def unused(self) -> list[str]:
        """Files, and parts of files, that nothing was compared with."""
        left = []
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if (
                file.is_file()
                and file not in self.used
                and name not in self.open
                and file.name != "README.md"
            ):
                left.append(name)
        for name, values in self.open.items():
            left += [f"{name}: {key}" for key in values if key not in values.asked | ABOUT]
        return left


# ---- models ----------------------------------------------------------------------------------------------------


def model_of(path: Path, family: str, dtype: torch.dtype = torch.float32, bits: int | None = None) -> Any:
    """A checkpoint folder as the program loads it, without its tokenizer."""
    raw = inspecting.read_config(path)
    stored = int(raw.get("quantization_bit") or 0)
    model = loading.empty_model(inspecting.architecture_of(raw), raw, GENERATIONS[family])
    files, problems = weights.weight_files(path)
    assert not problems, problems
    loading.fill(
        model, files, dtype, stored if bits is None else bits, bool(raw.get("quantization_embeddings"))
    )
    return model.eval().requires_grad_(False)


class NoText:
    """The engine's tokenizer where ids are compared and no text."""

    generation = ""

    def __init__(self) -> None:
        self.stop_ids: frozenset[int] = frozenset()

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        return ""


@contextlib.contextmanager
def running(path: Path, model: Any, prefix: Any = None) -> Iterator[Engine]:
    """The engine on a model of the folder."""
    info = inspecting.inspect(path)
    loaded = checkpoints.LoadedModel(model, NoText(), info, "fp32", torch.device("cpu"), 0.0, prefix=prefix)
    engine = Engine(loaded)
    try:
        yield engine
    finally:
        engine.close()


def answers(
    engine: Engine, rows: Sequence[Sequence[int]], tokens: int, stops: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy ids of rows that the engine computes together."""
    engine.tokenizer.stop_ids = frozenset(stops)
    settings = GenerationSettings(max_new_tokens=tokens)
    handles = engine.submit_many([Request(tuple(row), settings, "batch") for row in rows])
    for handle in handles:
        handle.wait()
        if handle.error is not None:
            raise handle.error
    return [handle.ids for handle in handles]


def real_of(arrays: Seen, case: str) -> torch.Tensor:
    """(rows, columns) bool: which recorded ids are no padding."""
    ids, mask = arrays[f"{case}/input_ids"], arrays.get(f"{case}/attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return ~mask[:, 0, -1, -ids.shape[1] :] if mask.ndim == 4 else mask.bool()


def rows_of(arrays: Seen, case: str) -> list[list[int]]:
    real = real_of(arrays, case)
    return [row[kept].tolist() for row, kept in zip(arrays[f"{case}/input_ids"], real, strict=True)]


def new_tokens(arrays: Seen, case: str, kind: str, stops: Sequence[int]) -> list[list[int]]:
    """Recorded new tokens up to the first stop id; what follows fills the row up."""
    rows = arrays[f"{case}/{kind}"][:, arrays[f"{case}/input_ids"].shape[1] :].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))] for row in rows]


def given(family: str, arrays: Seen, case: str) -> dict[str, torch.Tensor]:
    """Mask and positions as recorded, in the arguments of our model."""
    mask, where = arrays.get(f"{case}/attention_mask"), arrays.get(f"{case}/position_ids")
    if mask is None:
        return {}
    if family == "v1":
        return {"attention_mask": ~mask, "glm_position_ids": where}
    return {"attention_mask": mask, "position_ids": where}


def made(family: str, model: Any, ids: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mask and positions by our own functions."""
    index = (real.cumsum(1) - 1).clamp_min(0)
    if family != "v1":
        return {"attention_mask": real.long(), "position_ids": index}
    context, anchor = layouts(ids, real, model.config)
    return {
        "attention_mask": visible(real, context, ids.shape[1]),
        "glm_position_ids": positions(index, context, anchor),
    }


def released_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients under the released names, the three projections fused again."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(released.to_released(gradients, model.config))


def model_numbers(golden: Folder, table: Table, family: str, name: str) -> None:
    """io_<name>: logits by every way, hidden states, caches, tokens, one training step, reduced precision."""
    case, path = f"{family}/{name}", golden.folder(f"{family}/{name}")
    arrays, record = golden.arrays(f"{family}/io_{name}.npz"), golden.json(f"{family}/io_{name}.json")
    recorded = list(record["cases"])
    model = model_of(path, family)
    eos = int(inspecting.read_config(path)["eos_token_id"])
    if golden.has(f"{family}/{name}/sharded"):
        shards = model_of(golden.folder(f"{family}/{name}/sharded"), family).state_dict()
        for key, tensor in model.state_dict().items():
            table.same(case, "weights from shards", shards[key], tensor, key)
    names = [one for one in recorded if f"{one}/logits" in arrays]
    names += [one for one in ("batch_default_masks",) if f"{one}/logits" in arrays]
    with torch.inference_mode():
        for one in names:
            ids, real, theirs = arrays[f"{one}/input_ids"], real_of(arrays, one), arrays[f"{one}/logits"]
            kind = "left-padded" if "batch" in one else "uncached"
            # What the reference computes for padding has no meaning.
            for way, inputs in (
                ("masks given", given(family, arrays, one)),
                ("ours", made(family, model, ids, real)),
            ):
                ours = model(ids, **inputs).logits
                table.near(case, f"logits {kind}, {way}", ours[real], theirs[real], where=one)
            if real.all():
                table.near(case, "logits from ids alone", model(ids).logits, theirs, where=one)
        if f"{'batch_default_positions'}/logits" in arrays:
            ids, real = arrays["batch/input_ids"], real_of(arrays, "batch")
            where = torch.arange(ids.shape[1]).expand_as(ids)  # the reference then counts padding too
            ours = model(ids, attention_mask=real.long(), position_ids=where).logits
            theirs = arrays["batch_default_positions/logits"]
            table.near(case, "logits left-padded, padding counted", ours[real], theirs[real])
            full = arrays.get("batch/full_attention_mask")
            seen = real[:, None, None, :] & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            table.same(case, "mask of real tokens", seen[:, 0][real], ~full[:, 0][real])
        if "chunked/first_ids" in arrays:
            cache = DynamicCache(config=model.config)
            model(arrays["chunked/first_ids"], past_key_values=cache)
            ours = model(arrays["chunked/second_ids"], past_key_values=cache).logits
            table.near(case, "logits chunked", ours, arrays["chunked/second_logits"])
        for one in (key.removesuffix("/hidden_states") for key in arrays if key.endswith("/hidden_states")):
            seen_states: list[torch.Tensor] = []
            layers = model.transformer.layers if family == "v1" else model.model.layers

            def keep(module: Any, args: Any, out: Any, seen: list[torch.Tensor] = seen_states) -> None:
                seen.append(out if isinstance(out, torch.Tensor) else out[0])

            hooks = [layer.register_forward_hook(keep) for layer in layers]
            cache = DynamicCache(config=model.config)
            out = model(arrays[f"{one}/input_ids"], past_key_values=cache, output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            states = [out.hidden_states[0], *seen_states]
            if family == "v1":  # recorded after the last norm, in the others before it
                states[-1] = out.hidden_states[-1]
            theirs = arrays[f"{one}/hidden_states"].transpose(1, 2)
            table.near(case, "hidden states", torch.stack(states), theirs, rtol=RELATIVE)
            for layer, index in (("layer0", 0), ("last", -1)):
                kept = cache.layers[index]
                for side, tensor in (("k", kept.keys), ("v", kept.values)):
                    table.near(
                        case,
                        "cached keys, values",
                        tensor.permute(2, 0, 1, 3),
                        arrays[f"{one}/kv_{layer}_{side}"],
                    )
        stepped = [key.removesuffix("/step_logits") for key in arrays if key.endswith("/step_logits")]
        for one in stepped:
            for kind in (DynamicCache, StaticCache):
                cached_logits(table, case, family, model, arrays, one, kind)
    with running(path, model) as engine:
        for one in stepped:
            rows, steps = rows_of(arrays, one), len(arrays[f"{one}/step_logits"])
            expected = new_tokens(arrays, one, "greedy_loop", ())
            table.same(case, "tokens greedy, engine", answers(engine, rows, steps), expected, one)
            for kind in ("generate", "generate_eos1", "generate_eos2"):
                if f"{one}/{kind}" not in arrays:
                    continue
                ends = arrays.get(f"{one}/{kind}_eos_token_id")
                stops = [eos] if ends is None else ends.tolist()
                expected = new_tokens(arrays, one, kind, stops)
                label = "tokens generate" + (", early ends" if ends is not None else "")
                table.same(
                    case, f"{label}, engine", answers(engine, rows, steps, stops), expected, f"{one}/{kind}"
                )
                ids = model.generate(
                    arrays[f"{one}/input_ids"], attention_mask=real_of(arrays, one).long(), max_new_tokens=steps,
                    do_sample=False, eos_token_id=stops, pad_token_id=model.config.pad_token_id or 0,
                )  # fmt: skip
                width = arrays[f"{one}/input_ids"].shape[1]
                ours = [
                    row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))]
                    for row in ids[:, width:].tolist()
                ]
                table.same(case, f"{label}, transformers", ours, expected, f"{one}/{kind}")
            if f"{one}/final_position_ids" in arrays:
                grown(table, case, model, arrays, one, steps)
    train = record["train"]
    model.requires_grad_(True)
    out = model(arrays["train/input_ids"], labels=arrays["train/labels"])
    out.loss.backward()
    table.near(case, "training loss", out.loss, arrays["train/loss"], LOSS)
    table.near(case, "training loss", out.loss, train["loss"], LOSS)
    table.near(case, "training logits", out.logits, arrays["train/logits"])
    gradients = released_gradients(model)
    table.same(case, "names of gradients", set(gradients), set(train["grad_norms"]))
    for key, norm in train["grad_norms"].items():
        table.near(case, "gradient norms, relative", float(gradients[key].norm()) / norm, 1.0, NORM, key)
    if "loss_with_ones_mask" in train:
        ones = torch.ones_like(arrays["train/input_ids"])
        loss = model(arrays["train/input_ids"], attention_mask=ones, labels=arrays["train/labels"]).loss
        table.near(case, "training loss", loss, train["loss_with_ones_mask"], LOSS)
    for kind, dtype in (("half", torch.float16), ("bf16", torch.bfloat16)):
        name_of = "fp16" if kind == "half" else kind
        keys = [key for key in arrays if key.startswith(f"{kind}/")]
        reduced = model_of(path, family, dtype) if keys else None
        for key in keys:
            one = key.split("/")[1].removesuffix("_logits")
            exact, theirs = arrays[f"{one}/logits"], arrays[key]
            with torch.inference_mode():
                ours = reduced(arrays[f"{one}/input_ids"]).logits.float()
            times = float((ours - exact).abs().max() / (theirs - exact).abs().max())
            table.near(case, f"error of {name_of}, times the reference's own", times, 0.0, ERROR, one)
            table.near(case, f"logits in {name_of}", ours, theirs, REDUCED, one)
            if kind == "bf16":
                table.note(
                    case, f"logits in {name_of}", "for information, the reference is as far from its own fp32"
                )


def cached_logits(
    table: Table, case: str, family: str, model: Any, arrays: Seen, one: str, kind: type
) -> None:
    """Step by step on one of transformers' caches, positions by our functions."""
    ids, real = arrays[f"{one}/input_ids"], real_of(arrays, one)
    steps, loop = arrays[f"{one}/step_logits"], arrays[f"{one}/greedy_loop"]
    room = {"max_cache_len": ids.shape[1] + len(steps)} if kind is StaticCache else {}
    cache, new = kind(config=model.config, **room), ids
    if family == "v1":
        context, anchor = layouts(ids, real, model.config)
    found, tokens = [], []
    for _ in range(len(steps)):
        index = (real.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        where = {"position_ids": index}
        if family == "v1":
            where = {"glm_position_ids": positions(index, context, anchor)}
        logits = model(
            new, attention_mask=real.long(), past_key_values=cache, logits_to_keep=1, **where
        ).logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        found.append(logits)
        tokens.append(new)
        real = torch.cat([real, torch.ones_like(new, dtype=torch.bool)], 1)
    what = kind.__name__
    table.near(case, f"logits cached, {what}", torch.stack(found).view_as(steps), steps, where=one)
    table.same(
        case, f"tokens greedy, {what}", torch.cat(tokens, 1).tolist(), loop[:, ids.shape[1] :].tolist(), one
    )


def grown(table: Table, case: str, model: Any, arrays: Seen, one: str, steps: int) -> None:
    """Positions and mask of ChatGLM-6B after the last step."""
    ids, real = arrays[f"{one}/input_ids"], real_of(arrays, one)
    context, anchor = layouts(ids, real, model.config)
    real = torch.cat([real, torch.ones(len(ids), steps, dtype=torch.bool)], 1)
    theirs = arrays[f"{one}/final_position_ids"], ~arrays[f"{one}/final_attention_mask"][:, 0]
    real = real[:, : theirs[0].shape[2]]
    ours = positions((real.cumsum(1) - 1).clamp_min(0), context, anchor)
    table.same(
        case, "positions and mask, grown", ours.transpose(1, 2)[real], theirs[0].transpose(1, 2)[real], one
    )
    seen = visible(real, context, real.shape[1])[:, 0]
    table.same(case, "positions and mask, grown", seen[real], theirs[1][real], one)


# ---- quantized -------------------------------------------------------------------------------------------------


def quantized(golden: Folder, table: Table, family: str, name: str) -> None:
    """Codes, scales, dequantized weights, products, gradients, logits and tokens of INT8/INT4."""
    case, path = f"{family}/{name}", golden.folder(f"{family}/{name}")
    arrays, bits = golden.arrays(f"{family}/{name}.npz"), 8 if "int8" in name else 4
    record = golden.json(f"{family}/quant.json")
    layers = sorted(key.rsplit("/", 1)[0] for key in arrays if key.endswith("/packed_int8"))
    made_layers: dict[str, Any] = {}
    for layer in layers:
        part = {key: arrays[f"{layer}/{key}"] for key in (
            "original_fp16", "packed_int8", "scale_fp16", "q", "dequant_fp32", "dequant_fp16_gpu_semantics", "x", "y",
        )}  # fmt: skip
        bias = arrays.get(f"{layer}/bias")
        for weight in (part["original_fp16"], part["original_fp16"].float()):
            stored, scale = quantization.quantize_weight(weight, bits)
            table.same(case, "packed bytes", stored, part["packed_int8"], layer)
            table.same(case, "scales", scale, part["scale_fp16"], layer)
        codes = part["packed_int8"] if bits == 8 else quantization.unpack_int4(part["packed_int8"])
        table.same(case, "codes", codes, part["q"], layer)
        for dtype, key in ((torch.float32, "dequant_fp32"), (torch.float16, "dequant_fp16_gpu_semantics")):
            weight = quantization.dequantize(part["packed_int8"], part["scale_fp16"], bits, dtype)
            table.same(case, f"dequantized, {key[8:12]}", weight, part[key], layer)
        out, columns = part["original_fp16"].shape
        linear = quantization.RowwiseLinear(columns, out, bits, bias=bias is not None)
        state = {"weight": part["packed_int8"], "weight_scale": part["scale_fp16"]}
        linear.load_state_dict(state | ({} if bias is None else {"bias": bias}))
        table.near(case, "outputs of layers", linear(part["x"]), part["y"], where=layer)
        made_layers[layer] = linear
    if "backward/x" in arrays:
        x = arrays["backward/x"].clone().requires_grad_()
        made_layers[next(layer for layer in layers if layer.endswith("dense_h_to_4h"))](
            x
        ).square().sum().backward()
        key = next(key for key in arrays if key.startswith("backward/grad"))
        table.near(case, "gradient of a layer's input", x.grad, arrays[key])
    if "word_embeddings/dequant_fp32" in arrays:
        embedding = model_of(path, family).get_input_embeddings()
        every = embedding(torch.arange(len(arrays["word_embeddings/dequant_fp32"])))
        stored = load_file(path / "model.safetensors")
        for key, (shape, dtype) in record["qe"]["keys_embedding"].items():
            found = (list(stored[key].shape), str(stored[key].dtype))
            table.same(case, "names and shapes", found, (shape, dtype), key)
        table.same(case, "dequantized embedding", every, arrays["word_embeddings/dequant_fp32"])
    else:
        state = dict(released.to_released(
            (ours := model_of(golden.folder(f"{family}/tiny"), family, bits=bits)).state_dict(), ours.config
        ))  # fmt: skip
        for key, tensor in load_file(path / "model.safetensors").items():
            if tensor.dtype == torch.int8 or key.endswith("_scale"):
                table.same(case, "codes and scales of the whole model", state[key], tensor, key)
    if (path / "pytorch_model.bin").is_file():
        with tempfile.TemporaryDirectory() as folder:
            for file in ("config.json", "pytorch_model.bin"):
                shutil.copy(path / file, folder)
            other = model_of(Path(folder), family).state_dict()
        for key, tensor in model_of(path, family).state_dict().items():
            table.same(case, ".bin and .safetensors", other[key], tensor, key)
    model = model_of(path, family)
    kind = "generate" if family == "v1" else "greedy_loop"
    eos = [int(inspecting.read_config(path)["eos_token_id"])] if kind == "generate" else []
    with running(path, model) as engine, torch.inference_mode():
        for key in [key for key in arrays if key.rsplit("/")[-1] == "logits"]:
            one = key.removesuffix("logits")
            ids, tokens = arrays[f"{one}input_ids"], arrays[f"{one}{kind}"]
            table.near(case, "logits", model(ids).logits, arrays[key], where=one)
            width = ids.shape[1]
            ours = answers(engine, ids.tolist(), tokens.shape[1] - width, eos)
            table.same(case, "tokens greedy, engine", ours, tokens[:, width:].tolist(), one)
    assert record["bits"]


# ---- adapters --------------------------------------------------------------------------------------------------


def trained(
    table: Table, case: str, forward: Callable[[], Any], parameters: dict[str, torch.Tensor], rate: float,
    losses: Sequence[float], arrays: Seen, named: str,
) -> None:  # fmt: skip
    """Five steps of AdamW as recorded: losses, first gradients, the parameters after them."""
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    for step, theirs in enumerate(losses):
        loss = forward().loss
        what, limit = ("first loss", LOSS) if not step else ("losses of five steps", STEPS)
        table.near(case, what, loss, theirs, limit)
        if step == len(losses) - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        if not step:
            for name, parameter in parameters.items():
                table.near(
                    case, "first gradients", parameter.grad, arrays[f"grad0/{named}{name}"], GRADIENT, name
                )
        optimizer.step()
    for name, parameter in parameters.items():
        table.near(
            case, "parameters after five steps", parameter, arrays[f"after5/{named}{name}"], AFTER, name
        )


def prefixed(golden: Folder, table: Table, family: str, name: str) -> None:
    """A P-tuning v2 prefix: the encoder, logits and tokens behind it, its training."""
    case, path = f"{family}/{name}", golden.folder(f"{family}/{name}")
    arrays, record = golden.arrays(f"{family}/{name}.npz"), golden.json(f"{family}/{name}.json")
    folder = golden.folder(f"{family}/{'real' if 'real' in name else 'tiny'}")
    base = model_of(folder, family)
    encoder = adapters.load_prefix(path, base.config)
    for key, tensor in load_file(path / "prefix.safetensors").items():
        table.same(case, ".bin and .safetensors", encoder.released_state()[key], tensor, key)
    table.near(case, "encoder output", encoder(), arrays["prefix_encoder_output"])
    for layer, pair in enumerate(encoder.keys_values()):
        for ours, theirs in zip(pair, arrays["prefix_past_key_values"][layer], strict=True):
            table.near(case, "keys, values of the prefix", ours.permute(2, 0, 1, 3), theirs)
    model = adapters.PrefixModel(base, encoder).eval()
    cases = [one for one in ("single", "batch") if f"{one}/logits" in arrays]
    eos = [int(inspecting.read_config(folder)["eos_token_id"])]
    if cases:
        with running(folder, base, encoder) as engine, torch.inference_mode():
            for one in cases:
                ids, real = arrays[f"{one}/input_ids"], real_of(arrays, one)
                for inputs in (given(family, arrays, one), {"attention_mask": real.long()}):
                    ours = model(ids, **inputs).logits
                    table.near(case, "logits", ours[real], arrays[f"{one}/logits"][real], where=one)
                tokens = arrays[f"{one}/generate"].shape[1] - ids.shape[1]
                expected = new_tokens(arrays, one, "generate", eos)
                table.same(
                    case,
                    "tokens generate, engine",
                    answers(engine, rows_of(arrays, one), tokens, eos),
                    expected,
                    one,
                )
            cache = DynamicCache(config=base.config)
            ids = arrays["single/input_ids"]
            for layer, pair in enumerate(encoder.keys_values(1)):
                cache.update(*pair, layer)
            where = {"prefix_length": encoder.length}
            if family != "v1":
                where = {"position_ids": torch.arange(ids.shape[1])[None]}
            base(ids, past_key_values=cache, **where)
            for side, tensor in (("k", cache.layers[0].keys), ("v", cache.layers[0].values)):
                table.near(
                    case,
                    "cached keys, values",
                    tensor.permute(2, 0, 1, 3),
                    arrays[f"single/past_layer0_{side}"],
                )
    inputs = {"input_ids": arrays["train/input_ids"], "labels": arrays["train/labels"]} | given(
        family, arrays, "train"
    )
    encoder.requires_grad_(True)
    model(**inputs).loss.backward()
    for key, norm in record["grad_norms_step0"].items():
        parameter = encoder.get_parameter(key.removeprefix(adapters.PREFIX))
        table.near(case, "gradient norms, relative", float(parameter.grad.norm()) / norm, 1.0, NORM, key)
    losses = record["losses_before_each_of_5_adamw_steps_and_after"]
    encoder.zero_grad()
    parameters = dict(encoder.named_parameters())
    trained(table, case, lambda: model(**inputs), parameters, 2e-2, losses, arrays, adapters.PREFIX)
    recorded = {"pre_seq_len": encoder.length, "prefix_projection": encoder.projection}
    table.same(case, "length and projection", recorded, {key: record[key] for key in recorded})


def low_rank(golden: Folder, table: Table, name: str) -> None:
    """A LoRA of PEFT 0.3 on ChatGLM-6B: logits, losses, gradients, five steps, the merged model."""
    case, path = f"v1/{name}", golden.folder(f"v1/{name}")
    arrays, record = golden.arrays(f"v1/{name}.npz"), golden.json(f"v1/{name}.json")
    base = golden.folder(f"v1/{name.split('_')[1]}")
    other = dict(weights.tensors([path / "adapter_model.bin"]))
    for key, tensor in weights.tensors([path / "adapter_model.safetensors"]):
        table.same(case, ".bin and .safetensors", other[key], tensor, key)
    model = model_of(base, "v1")
    adapters.load_lora(model, path, trainable=True)
    if "single_gmask/logits" in arrays:
        table.near(
            case, "logits", model(arrays["single_gmask/input_ids"]).logits, arrays["single_gmask/logits"]
        )
    parameters = {f"base_model.model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    for one, loss in record["loss"].items():
        inputs = {"input_ids": arrays[f"batch_{one}/input_ids"], "labels": arrays[f"batch_{one}/labels"]}
        out = model(**inputs, **given("v1", arrays, f"batch_{one}"))
        table.near(case, "losses", out.loss, loss, LOSS, one)
        model.zero_grad()
        out.loss.backward()
        norms = record["grad_norms"].get(one, {})
        for key, norm in norms.items():
            table.near(
                case, "gradient norms, relative", float(parameters[key].grad.norm()) / norm, 1.0, NORM, key
            )
        if one == "default" and "train/logits" in arrays:
            table.near(case, "logits in training", out.logits, arrays["train/logits"])
    inputs = {"input_ids": arrays["batch_default/input_ids"], "labels": arrays["batch_default/labels"]}
    model.zero_grad()
    trained(table, case, lambda: model(**inputs), parameters, 1e-3, record["adamw_lr1e-3_losses"], arrays, "")
    model = model_of(base, "v1")
    adapters.load_lora(model, path)
    beside = model(inputs["input_ids"]).logits
    adapters.merge_lora(model)
    table.near(case, "merged and beside the base", model(inputs["input_ids"]).logits, beside)


# ---- tokenizers ------------------------------------------------------------------------------------------------


def tokenizer_of(golden: Folder, family: str, **config: Any) -> Any:
    file = golden.vocab(family)
    assert file is not None
    if family == "v1":
        return ChatGLMTokenizer(file, config or None)
    return ChatGLM2Tokenizer(file, GENERATIONS[family])  # type: ignore[arg-type]


def messages_of(history: Sequence[Any] | None) -> list[Message]:
    out = []
    for one in history or ():
        if isinstance(one, dict):
            tools = tuple(one.get("tools", ()))
            out.append(Message(one["role"], one["content"], one.get("metadata", ""), tools))
        else:
            out += [Message("user", one[0]), Message("assistant", one[1])]
    return out


def tokens_and_texts(golden: Folder, table: Table, family: str) -> None:
    """Every list of the recorded tokenizer."""
    case, cases = f"{family}/tokenizer", golden.json(f"{family}/tokenizer.json")
    ours, info = tokenizer_of(golden, family), cases["info"]
    table.same(
        case,
        "sizes and special ids",
        (ours.vocab_size, ours.n_pieces),
        (info["vocab_size"], info["sp_vocab_size"]),
    )
    if family == "v1":
        table.same(case, "sizes and special ids", (ours.eos_id, ours.pad_id), (info["eos"], info["pad"]))
        table.same(case, "sizes and special ids", ours.prefix_ids, (info["gmask"], info["bos"]))
    else:
        table.same(case, "sizes and special ids", ours.special, info["special_tokens"])
        table.same(case, "sizes and special ids", list(ours.prefix_ids), info["prefix_tokens"])
        table.same(
            case, "sizes and special ids", (ours.eos_id, ours.pad_id), (info["eos_id"], info["pad_id"])
        )
    for one in cases["encode"]:
        text = one["text"]
        table.same(case, "ids", ours.reference_ids(text), one["ids"], text)
        table.same(case, "ids", ours.reference_ids(text, False), one["ids_no_special"], text)
        table.same(case, "texts", ours.reference_text(one["ids"]), one["decode_ids"], text)
        table.same(case, "texts", ours.reference_text(one["ids"], True), one["decode_ids_skip_special"], text)
        table.same(case, "texts", ours.reference_text(one["ids_no_special"]), one["decode_no_special"], text)
        if (
            text != "<unk>"
        ):  # the program leaves an unknown piece out, the reference of v1 prints a mark for it
            table.same(
                case, "texts", ours.decode(one["ids_no_special"]), one["decode_no_special_noclean"], text
            )
    for one in cases["pairs"]:
        table.same(case, "ids of pairs", ours.reference_ids(one["a"], pair=one["b"]), one["ids"])
    for one in cases["truncation"]:
        n = one["max_length"]
        table.same(case, "ids cut", ours.reference_ids(one["text"], max_length=n), one["ids"])
        table.same(
            case, "ids cut", ours.reference_ids(one["text"], False, max_length=n), one["ids_no_special"]
        )
    for one in cases["call_single"]:
        table.same(case, "ids of calls", ours.reference_ids(one["text"]), one["out"]["input_ids"])
    for one in cases["call_batch_of_one"]:
        table.same(case, "ids of calls", [ours.reference_ids(one["text"])], one["out"]["input_ids"])
    for one in cases["batch_no_padding"]:
        table.same(
            case, "ids of calls", [ours.reference_ids(text) for text in one["texts"]], one["out"]["input_ids"]
        )
    for kind in ("batch_padding", "batch_padding_max_length", "batch_pad_to_multiple_of_8"):
        for one in cases[kind]:
            rows = [ours.reference_ids(text) for text in one["texts"]]
            padded = ours.pad(rows, one.get("max_length"), 8 if kind.endswith("8") else None)
            for name, expected in one["out"].items():
                table.same(case, "padded ids, masks, positions", getattr(padded, name).tolist(), expected)
    for one in cases["prefix_decodes"]:
        found = [ours.reference_text(one["ids"][:n]) for n in range(1, len(one["ids"]) + 1)]
        table.same(case, "texts growing", found, one["prefix_decodes"])
    for one in cases["decode_id_lists"]:
        for skip, expected in ((False, one["decode"]), (True, one["decode_skip_special"])):
            try:
                found: Any = ours.reference_text(one["ids"], skip)
            except IndexError:
                found = {"__error__": "IndexError"}
            if isinstance(expected, dict):
                expected = {"__error__": expected["__error__"]}
            table.same(case, "texts of any ids", found, expected, str(one["ids"]))
    lone = cases["decode_scalar"]
    if family == "v1":
        table.same(case, "texts of any ids", ours.reference_text([lone["id"]]), lone["decode"])
        for one in cases["sp_encode"]:
            table.same(case, "ids of whitespace", ours.encode(one["text"]), one["default"])
            table.same(case, "ids of whitespace", ours._prepared(one["text"]), one["preprocessed"])
        early, recorded = (
            tokenizer_of(golden, family, num_image_tokens=20_000),
            cases["num_image_tokens_20000"],
        )
        for one in recorded["encode"]:
            table.same(case, "ids and texts, March 2023", early.reference_ids(one["text"]), one["ids"])
            table.same(case, "ids and texts, March 2023", early.reference_text(one["ids"]), one["decode"])
        found = {i: early.reference_text([int(i)]) for i in recorded["id_to_token"] if int(i) < 20_000}
        expected = {i: recorded["id_to_token"][i] for i in found}
        table.same(case, "ids and texts, March 2023", found, expected)
        slim = tokenizer_of(golden, family, num_image_tokens=0, eos_token="</s>")
        table.same(case, "texts, v0.1.0", cases["v0_1_0_code"]["encode_differs"], [])
        for one in cases["v0_1_0_code"]["decode"]:
            table.same(
                case, "texts, v0.1.0", slim.reference_text(ours.reference_ids(one["text"])), one["decode_ids"]
            )
        return
    table.note(
        case, "decode of one number, `decode_scalar`", "the release takes the letters of its piece for pieces"
    )
    for one in cases[
        "sp_decode"
    ]:  # an inner function of the release, which has its own way with control tokens
        if all(2 < i < ours.n_pieces for i in one["ids"]):
            table.same(
                case, "texts of sentencepiece", ours.decode(one["ids"]), one["decode"], str(one["ids"])
            )
    if family == "v2":
        for one in cases["build_prompt"]:
            history = [tuple(pair) for pair in one["history"] or ()]
            table.same(case, "chat prompts", ours.prompt_text(one["query"], history), one["prompt"])
            ids = ours.chat_ids([*messages_of(history), Message("user", one["query"])])
            table.same(case, "chat prompts", ids, one["ids"]["input_ids"][0])
        for one in cases["build_stream_inputs"]:
            number = len(one["history"] or ()) + 1
            first = ours.chat_ids([Message("user", one["query"])])
            ids = first if number == 1 else ours.next_turn_ids(number, one["query"])
            table.same(case, "next turns of a running chat", ids, one["out"]["input_ids"][0])
        return
    for one in cases["build_single_message"]:
        message = Message(one["role"], one["message"], one["metadata"])
        table.same(case, "chat prompts", ours.message_ids(message), one["ids"])
    for one in cases["build_chat_input"]:
        ids = ours.chat_ids([*messages_of(one["history"]), Message(one["role"], one["query"])])
        table.same(case, "chat prompts", ids, one["out"]["input_ids"][0])
    for one in cases["encode_special_tokens_true"]:
        table.same(
            case,
            "ids of spelt roles",
            ours.reference_ids(one["text"], encode_special_tokens=True),
            one["ids"],
        )
        table.same(case, "ids of spelt roles", ours.reference_text(one["ids"]), one["decode"])
    if cases["batch_decode_chat"] is None:
        table.note(case, "batch_decode_chat", "nothing recorded")


def filled(
    made: Encoded, pad: int, width: int, first: bool, one: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """A row padded as the scripts pad it; where padding is to count in the loss, its id is its label."""
    ids = [*made.ids, *[pad] * (width - len(made.ids))]
    if one["ignore_pad_token_for_loss"]:
        return ids, [*made.labels, *[-100] * (width - len(made.labels))]
    start = next(i for i, label in enumerate(made.labels) if label != -100)
    return ids, [-100 if first else pad] * start + ids[start:]


def training_rows(golden: Folder, table: Table, family: str) -> None:
    """Ids and labels of the ptuning scripts."""
    case, cases = f"{family}/ptuning_preprocess", golden.json(f"{family}/ptuning_preprocess.json")
    ours, first = tokenizer_of(golden, family), family == "v1"
    for one in cases["cases"]:
        source, target = one["max_source_length"], one["max_target_length"]
        made_rows, prompts, told = [], [], []
        for row in cases["data"]:
            if not (row["content"] and row["summary"]):
                continue  # the scripts drop it
            history = [tuple(pair) for pair in row["history"]] if one["history_column_used"] else None
            example = Example(row["content"], row["summary"], tuple(history or ()))
            made = encode(
                example, ours, source, target, source_prefix=one["source_prefix"],
                history_column=one["history_column_used"],
            )  # fmt: skip
            made_rows.append(filled(made, ours.pad_id, source + target + (not first), first, one))
            # Evaluation numbers the rounds of v1 only where there are some.
            asked = ours.prompt_text(row["content"], history or (None if first else ()))
            prompts.append(ours.reference_ids(one["source_prefix"] + asked, max_length=source))
            told.append(ours.reference_ids(row["summary"], max_length=target))
        for i, key in enumerate(("input_ids", "labels")):
            table.same(case, f"training {key}", [pair[i] for pair in made_rows], one["train"][key])
        padded = ours.pad(prompts)
        for key in {"input_ids", "attention_mask", "position_ids"} & set(one["eval"]):
            table.same(case, f"evaluation {key}", getattr(padded, key).tolist(), one["eval"][key])
        table.same(
            case, "evaluation labels", told, [[i for i in row if i != -100] for row in one["eval"]["labels"]]
        )


def alpaca_rows(golden: Folder, table: Table) -> None:
    """The examples of the old LoRA scripts, by our tokenizer."""
    case, data = "v1/lora_alpaca_data", golden.json("v1/lora_alpaca_data.json")
    ours = tokenizer_of(golden, "v1")
    for example, text in zip(data["examples"], data["formatted"], strict=True):
        context = f"Instruction: {example['instruction']}\n"
        context += f"Input: {example['input']}\n" if example.get("input") else ""
        table.same(case, "texts", {"context": context + "Answer: ", "target": example["output"]}, text)
    for one in data["cases"]:
        n, features = one["max_seq_length"], []
        for text in data["formatted"]:
            prompt = ours.reference_ids(text["context"], max_length=n)
            target = ours.reference_ids(text["target"], False, max_length=n)
            features.append({"input_ids": [*prompt, *target, ours.eos_id], "seq_len": len(prompt)})
        table.same(case, "ids", features, one["features"])
        width = max(len(feature["input_ids"]) for feature in features)
        for way in ("collated", "collated_legacy_explicit_masks"):
            theirs = one[way]
            rows = [
                feature["input_ids"] + [ours.pad_id] * (width - len(feature["input_ids"]))
                for feature in features
            ]
            table.same(case, "collated ids", rows, theirs["input_ids"])
            if way == "collated":
                labels = [
                    [-100] * (f["seq_len"] - 1) + f["input_ids"][f["seq_len"] - 1 :]
                    + [-100] * (width - len(f["input_ids"]))
                    for f in features
                ]  # fmt: skip
                table.same(case, "collated labels", labels, theirs["labels"])


def shown_answers(golden: Folder, table: Table, family: str) -> None:
    """process_response of every generation, and the chat prompts recorded beside it."""
    name = f"{family}/{'prompts_' if family == 'v1' else ''}process_response.json"
    cases, case = golden.json(name), f"{family}/process_response"
    for one in cases["process_response"]:
        if family == "v3":
            found = chatglm2.parse_response(one["in"], one["history_in"])
            table.same(case, "answers", found, (one["content"], one["history_out"]), one["in"])
        else:
            process = (chatglm if family == "v1" else chatglm2).process_response
            table.same(case, "answers", process(one["in"]), one["out"], one["in"])
    if family == "v1":
        if golden.vocab("v1") is None:
            table.note(case, "chat prompts", "there is no ice_text.model")
            cases.asked.add("chat_prompts")
            return
        ours = tokenizer_of(golden, family)
        for one in cases["chat_prompts"]:
            history = [tuple(pair) for pair in one["history"]]
            table.same(case, "chat prompts", ours.prompt_text(one["query"], history or None), one["prompt"])
            ids = ours.chat_ids([*messages_of(history), Message("user", one["query"])])
            table.same(case, "chat prompts", ids, one["ids"])


# ---- the released vocabulary, end to end -----------------------------------------------------------------------


def end_to_end(golden: Folder, table: Table, family: str) -> None:
    """io_real: a checkpoint folder loaded whole, its logits, chats and streams."""
    case, record = f"{family}/real", golden.json(f"{family}/io_real.json")
    arrays, generation = golden.arrays(f"{family}/io_real.npz"), GENERATIONS[family]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"{generation}-6b"
        shutil.copytree(golden.folder(f"{family}/real"), folder)
        if (folder / "weights_ref.json").is_file():
            reference = json.loads((folder / "weights_ref.json").read_text())
            weight = golden.folder(f"{family}/real") / reference["weights"]
            table.same(case, "weights", hashlib.sha256(weight.read_bytes()).hexdigest(), reference["sha256"])
            shutil.copy(weight, folder)
        shutil.copy(golden.vocab(family), folder)  # type: ignore[arg-type]
        loaded = checkpoints.load(folder, "fp32", "cpu")
        table.same(case, "generation", loaded.tokenizer.generation, generation)
        engine = Engine(loaded)
        try:
            recorded_cases(table, case, family, loaded, engine, arrays, record)
            recorded_chats(table, case, family, engine, record)
            if "sampling" in record:
                recorded_sampling(table, case, engine, arrays, record["sampling"])
        finally:
            engine.close()


def recorded_cases(
    table: Table, case: str, family: str, loaded: Any, engine: Engine, arrays: Seen, record: Seen
) -> None:
    for one, about in record["cases"].items():
        ids, real = arrays[f"{one}/input_ids"], real_of(arrays, one)
        kind = "last_logits" if f"{one}/last_logits_mean" in arrays else "logits"
        inputs = made(family, loaded.model, ids, real)
        where = given(family, arrays, one)
        for name in set(where) & {"position_ids", "glm_position_ids"}:
            ours_where, theirs_where = (x[name].movedim(-1, 1)[real] for x in (inputs, where))
            table.same(case, "positions", ours_where, theirs_where, one)
        with torch.inference_mode():
            logits = loaded.model(ids, **inputs).logits
        logits = logits[:, -1] if kind == "last_logits" else logits[0]
        top = arrays[f"{one}/{kind}_top_ids"].long()
        for what, ours in (
            ("top_values", logits.gather(1, top)),
            ("top_values", logits.topk(top.shape[1]).values),
            ("logsumexp", logits.logsumexp(-1)),
            ("mean", logits.mean(-1)),
            ("strided", logits[:, ::1009]),
        ):
            table.near(case, "logits", ours, arrays[f"{one}/{kind}_{what}"], where=one)
        table.same(
            case, "likeliest ids", logits.topk(top.shape[1]).indices[:, :1].tolist(), top[:, :1].tolist(), one
        )
        stops, engine.tokenizer.stop_ids = engine.tokenizer.stop_ids, frozenset()
        end = engine.tokenizer.eos_id
        expected = new_tokens(arrays, one, "generate", [end])
        table.same(
            case, "tokens generate, engine", answers(engine, rows_of(arrays, one), 24, [end]), expected, one
        )
        engine.tokenizer.stop_ids = stops
        asked = about.get("prompts") or [about["prompt"]]
        ids_of = [engine.tokenizer.reference_ids(text) for text in asked]
        table.same(case, "ids of prompts", ids_of, rows_of(arrays, one), one)
        texts = about.get("texts") or [about["text"]]
        table.same(case, "texts of answers", [engine.tokenizer.reference_text(
            [i for i in row if i != end] if family != "v3" else row, True).removesuffix("</s>") for row in expected
        ], texts, one)  # fmt: skip


def recorded_chats(table: Table, case: str, family: str, engine: Engine, record: Seen) -> None:
    tokenizer: Any = engine.tokenizer
    process = {"v1": chatglm.process_response, "v2": chatglm2.process_response}.get(family)
    for turn in record["chat"]:
        asked, tokens = turn["query"], turn["generated_ids"]
        messages = [*messages_of(turn["history"]), Message(turn.get("role", "user"), asked)]
        prompt = tokenizer.chat_ids(messages)
        table.same(case, "chat prompts", prompt, turn["prompt_ids"], asked)
        settings = GenerationSettings(max_new_tokens=turn["max_length"] - len(prompt))
        handle = engine.submit(Request(tuple(prompt), settings))
        handle.wait()
        table.same(case, "chat tokens, engine", handle.ids, tokens, asked)
        ended = tokens[-1] in tokenizer.stop_ids
        if family == "v3" and not ended:  # the release drops the last token without looking what it is
            found = tokenizer.answer_text(tokens[:-1])
        else:
            found = handle.text
        table.same(case, "chat answers, engine", found, turn["response"], asked)
        if "prompt" in turn:
            history = [tuple(pair) for pair in turn["history"]]
            text = tokenizer.prompt_text(asked, (history or None) if family == "v1" else history)
            table.same(case, "chat prompts", text, turn["prompt"], asked)
        key = "stream_ids_per_yield" if family == "v1" else "stream_decoded_ids_all_steps"
        texts = []
        for ids in turn[key]:
            text = tokenizer.reference_text(ids)
            if family != "v1" and (not text or text.endswith("\ufffd")):
                continue  # the release waits for the rest of a character
            texts.append(process(text) if process else chatglm2.parse_response(text, [{"role": "user"}])[0])
        table.same(case, "streamed texts", texts, turn["stream_text_per_yield"], asked)
        shown = [tokenizer.answer_text(tokens[:n], finished=False) for n in range(1, len(tokens) + 1)]
        grows = all(b.startswith(a) for a, b in zip(shown, shown[1:], strict=False))
        table.same(case, "streamed texts, engine's only grow", grows, True, asked)
    if "stream_with_past" not in record:
        return
    held: list[int] = []
    for number, turn in enumerate(record["stream_with_past"]["turns"], start=1):
        first = tokenizer.chat_ids([Message("user", turn["query"])])
        ids = first if number == 1 else tokenizer.next_turn_ids(number, turn["query"])
        table.same(case, "running chat: ids", ids, turn["stream_input_ids"])
        settings = GenerationSettings(max_new_tokens=len(turn["generated_ids"]))
        handle = engine.submit(Request((*held, *ids), settings))
        handle.wait()
        table.same(case, "running chat: tokens, engine", handle.ids, turn["generated_ids"])
        table.same(case, "running chat: answers, engine", handle.text, turn["response"])
        held += [*ids, *handle.ids[:-1]]
        table.same(case, "running chat: cached columns", len(held), turn["past_length_after"])


def recorded_sampling(table: Table, case: str, engine: Engine, arrays: Seen, about: dict[str, Any]) -> None:
    """The sampling of chat(): what the cuts keep of the first distribution, and the answer of a seed."""
    found = {}
    for text in about["warpers"]:
        for name in ("temperature", "top_k", "top_p"):
            if f"'{name}': " in text:
                found[name] = float(text.split(f"'{name}': ")[1].split(",")[0].rstrip("}"))
    settings = GenerationSettings(
        max_new_tokens=32, temperature=found["temperature"], top_k=int(found.get("top_k", about.get("top_k", 50))),
        top_p=found["top_p"], seed=1234,
    )  # fmt: skip
    prompt = engine.tokenizer.chat_ids([Message("user", about.get("prompt") or about["query"])])
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt])).logits[0, -1]
    probabilities = warp(logits, settings).softmax(-1)
    kept = probabilities.nonzero()[:, 0]
    table.same(case, "sampling: ids kept", kept.tolist(), sorted(arrays["sampling/kept_ids"].tolist()))
    order = arrays["sampling/kept_ids"].long()
    table.near(case, "sampling: probabilities", probabilities[order], arrays["sampling/kept_probs"], LOGITS)
    handle = engine.submit(Request(tuple(prompt), settings))
    handle.wait()
    recorded = about["seed_1234_chat_response"]  # of fewer tokens, it is not said how many
    table.same(case, "sampling: answer of seed 1234, engine", handle.text[: len(recorded)], recorded)


# ---- tables, configurations, files -----------------------------------------------------------------------------


def rotary_tables(golden: Folder, table: Table) -> None:
    """Cosines and sines at the published sizes."""
    tables = golden.arrays("rotary/rotary_tables.npz")
    rotary = ChatGLMRotary(ChatGLMConfig())
    table.same("rotary v1", "frequencies", rotary.inv_freq, tables["v1/inv_freq_fp16"].float())
    rows = tables["positions_v1"].expand(1, 2, -1)
    for kind, dtype, limit in (("float", torch.float32, TABLE), ("half", torch.float16, 1e-3)):
        cos, sin = (found[0, 0] for found in rotary(rows, dtype))
        for ours, name in ((cos, "cos"), (sin, "sin")):
            theirs = tables[f"v1/{kind}_{name}"][:, None, :32].expand(-1, 2, -1)
            table.near("rotary v1", f"table, {kind}", ours.float(), theirs.float(), limit)
    where = tables["positions_v2"]
    for family in ("v2", "v3"):
        raw = json.loads((golden.path / "v2" / "tiny" / "config.json").read_text()) | {"kv_channels": 128}
        for kind, dtype, limit in (
            ("float", torch.float32, TABLE), ("half", torch.float16, 1e-3), ("bf16", torch.bfloat16, 8e-3)
        ):  # fmt: skip
            ours = native_table(raw, where, dtype, GENERATIONS[family])
            table.near(
                f"rotary {family}", f"table, {kind}", ours, tables[f"{family}/{kind}_cos_sin"].float(), limit
            )
        if family == "v2":
            for kind in ("half", "bf16"):
                table.note(
                    "rotary v2", f"table, {kind}",
                    "on purpose: the release forms angles in this precision, where positions above 2,048 collide",
                )  # fmt: skip
    long = golden.arrays("rotary/rope_ratio50_restated.npz")
    ours = native_table(raw | {"rope_ratio": 50}, long["positions"], torch.float32, "chatglm3")
    table.near("rotary v3-32k", "table, float", ours, long["cos_sin"], TABLE)


def native_table(
    raw: dict[str, Any], where: torch.Tensor, dtype: torch.dtype, generation: str
) -> torch.Tensor:
    """(positions, frequencies, 2) as a ChatGLM2/3 model computes it in a precision."""
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

    rotary = GlmRotaryEmbedding(ChatGLM2Config.from_released(raw, generation))
    cos, sin = rotary(torch.zeros(1, dtype=dtype), where[None])
    half = cos.shape[-1] // 2
    return torch.stack([cos[0, :, :half], sin[0, :, :half]], -1).float()


def processors(golden: Folder, table: Table) -> None:
    """What transformers 4.30 and the release do to logits before drawing."""
    arrays = golden.arrays("generation/warpers.npz")
    for name, about in golden.json("generation/warpers.json").items():
        golden.json("generation/warpers.json").asked.add(name)
        chosen = about["args"]
        settings = GenerationSettings(
            temperature=chosen["temperature"], top_p=chosen["top_p"], top_k=about["top_k_effective"]
        )
        ours = torch.stack([warp(logits.float(), settings).softmax(-1) for logits in arrays["logits"]])
        table.near(
            "generation", "temperature, top-k, top-p", ours, arrays[f"{name}/probs"], PROBABILITY, name
        )
    if not golden.has("generation/invalid_score_processor.npz"):
        return
    invalid = golden.arrays("generation/invalid_score_processor.npz")
    for key in [key for key in invalid if key.endswith("/in")]:
        given_logits, theirs = invalid[key], invalid[key.removesuffix("in") + "out"]
        largest = given_logits.max(-1).values.isfinite()
        replaced = not torch.equal(given_logits, theirs)
        if key.startswith("neginf"):
            continue
        table.same("generation", "logits refused: NaN, +inf", not bool(largest.all()), replaced, key)
        for row, good in zip(given_logits, largest, strict=True):
            if good:
                table.same(
                    "generation",
                    "logits of usable rows untouched",
                    choose(row, GenerationSettings(), [], None),
                    int(row.argmax()),
                )
    table.note(
        "generation", "logits replaced by token 5 for all rows",
        "on purpose: the engine ends the row with an error; -inf is no error, the processors set it themselves",
    )  # fmt: skip


def configurations(golden: Folder, table: Table) -> None:
    """Every published config.json read and written, and the names and shapes of the full-size checkpoints."""
    folder = golden.folder("published_configs")
    for path in sorted(folder.glob("*.config.json")):
        if ".tokenizer_config" in path.name:
            continue
        raw, family = json.loads(path.read_text()), path.name[:2]
        silent = {"auto_map", "transformers_version", "_name_or_path"}
        if family == "v1":
            written = released_first(ChatGLMConfig.from_released(raw))
        else:
            generation = GENERATIONS[family]
            config = ChatGLM2Config.from_released(raw, generation)
            written = released_second(config, generation, raw["seq_length"])
            # Said of the weights, and by the loader.
            silent |= {"torch_dtype", "quantization_bit", "pre_seq_len", "prefix_projection", "rope_ratio"}
        for key in sorted(set(raw) - silent):
            if family == "v1" or key in written:
                table.same(
                    "published configs",
                    "read and written back",
                    written.get(key),
                    raw[key],
                    f"{path.name} {key}",
                )
    for path in sorted(folder.glob("v1_*tokenizer_config.json")):
        if golden.vocab("v1") is None:
            table.note("published configs", "ids of the tokenizers of v1", "there is no ice_text.model")
            break
        config = json.loads(path.with_name(path.name.replace("tokenizer_config", "config")).read_text())
        ours = ChatGLMTokenizer(golden.vocab("v1"), json.loads(path.read_text()))
        found = (ours.special["<sop>"], ours.eos_id)
        table.same(
            "published configs",
            "ids of the tokenizers of v1",
            found,
            (config["bos_token_id"], config["eos_token_id"]),
            path.name,
        )
    record = golden.json("published_configs/full_size_keys.json")
    for family, file in (("v1", "v1_v1.1.0"), ("v2", "v2_chatglm2-6b"), ("v3", "v3_chatglm3-6b")):
        about, raw = record[family], json.loads((folder / f"{file}.config.json").read_text())
        model = loading.empty_model(inspecting.architecture_of(raw), raw, GENERATIONS[family])
        with torch.device("meta"):
            state = dict(released.to_released(model.state_dict(), model.config))
        tables = {key for key in about["shapes_layer0_and_global"] if key.endswith("inv_freq")}
        shapes = {k: v for k, v in about["shapes_layer0_and_global"].items() if k not in tables}
        for key, shape in shapes.items():
            table.same(
                f"full size {family}",
                "names and shapes",
                list(state[key].shape) if key in state else None,
                shape,
                key,
            )
        stored = len(state) + (raw["num_layers"] if family == "v1" else 1)  # with the tables of frequencies
        table.same(f"full size {family}", "number of tensors", stored, about["n_keys"])
        count = sum(parameter.numel() for parameter in model.parameters())
        head = raw["vocab_size"] * raw["hidden_size"] if family == "v1" else 0  # counted twice as published
        table.same(
            f"full size {family}",
            "number of parameters",
            count in (about["n_params"], about["n_params"] - head),
            True,
            f"{count:,} instead of {about['n_params']:,}",
        )


def manifest(golden: Folder, table: Table) -> None:
    """The files are those that were recorded."""
    listed = golden.json("manifest.json")
    table.same("manifest", "number of files", len(listed["files"]), listed["n_files"])
    table.same(
        "manifest", "bytes", sum(about["bytes"] for about in listed["files"].values()), listed["total_bytes"]
    )
    for name, about in listed["files"].items():
        data = (golden.path / name).read_bytes()
        table.same("manifest", "sha256", hashlib.sha256(data).hexdigest(), about["sha256"], name)


def compare(golden: Folder) -> Table:
    """Everything that the folder holds."""
    table = Table()

    def part(case: str, work: Callable[..., None], *args: Any) -> None:
        with table.section(case):
            work(golden, table, *args)

    if golden.has("manifest.json"):
        part("manifest", manifest)
    part("published configs", configurations)
    part("rotary", rotary_tables)
    part("generation", processors)
    for family in GENERATIONS:
        for file in sorted((golden.path / family).glob("io_tiny*.npz")):
            part(f"{family}/{file.stem[3:]}", model_numbers, family, file.stem[3:])
        for file in sorted((golden.path / family).glob("quant_int*.npz")):
            part(f"{family}/{file.stem}", quantized, family, file.stem)
        for file in sorted((golden.path / family).glob("ptuning_*.npz")):
            part(f"{family}/{file.stem}", prefixed, family, file.stem)
        for file in sorted((golden.path / family).glob("lora_*.npz")):
            part(f"{family}/{file.stem}", low_rank, file.stem)
        part(f"{family}/process_response", shown_answers, family)
        needs = (
            (f"{family}/tokenizer", tokens_and_texts, (family,), f"{family}/tokenizer.json"),
            (f"{family}/ptuning_preprocess", training_rows, (family,), f"{family}/ptuning_preprocess.json"),
            (f"{family}/lora_alpaca_data", alpaca_rows, (), f"{family}/lora_alpaca_data.json"),
            (f"{family}/real", end_to_end, (family,), f"{family}/io_real.npz"),
        )
        for case, work, args, file_name in needs:
            if not golden.has(file_name):
                continue
            if golden.vocab(family) is None:
                table.note(case, "all of it", f"there is no {VOCABULARIES[family]}")
                golden.used.add(golden.path / file_name)
            else:
                part(case, work, *args)
    if golden.has("metrics"):
        golden.folder("metrics")
        table.note("metrics", "all of it", "compared in the tests of the metrics")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", nargs="?", type=Path, default=REPOSITORY / "tests" / "golden")
    parser.add_argument("--vocabulary", type=Path, help="folder of ice_text.model and tokenizer.model")
    args = parser.parse_args()
    beside = args.golden.resolve().parent / "vocab"
    golden = Folder(args.golden.resolve(), args.vocabulary or (beside if beside.is_dir() else None))
    torch.manual_seed(0)
    table = compare(golden)
    table.print()
    failed = [row for row in table.rows.values() if row.ok == "no"]
    unused = golden.unused()
    compared = sum(row.count for row in table.rows.values())
    print(f"\n{compared:,} comparisons in {len(table.rows)} rows, {len(failed)} rows not ok.")
    for name in unused:
        print(f"not compared: {name}")
    return 1 if failed or unused else 0


if __name__ == "__main__":
    sys.exit(main())
