"""What a model will take in memory, computed from its sizes: no weights, no device, no model in memory.

Each part follows what our loader, engine and trainer allocate. `benchmarks/memory.py` holds the whole against the
memory that processes take, `tests/test_memory.py` the parts against tensors.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import DYNAMIC, GROUPED, PRECISIONS, code_bits
from ..engine import FORWARD_SECONDS, FORWARD_TOKENS, KVCache
from ..errors import GLMError
from .shapes import Shape, shape

if TYPE_CHECKING:
    from ..finetune.methods import Method
    from ..finetune.preflight import _Sizes

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
SCALE_BYTES = 2
DYNAMIC_BYTES = 4  # a scale
DEVICES = ("cpu", "cuda", "mps")
# Tokens per second that the engine's prefill is taken to reach, which decides how many it feeds at once: on a processor
# what a new engine begins with, on a GPU an A100 with 6 billion weights, more with fewer of them.
CPU_SPEED, GPU_SPEED, GPU_WEIGHTS, MOST_SPEED = 2_000.0, 20_000.0, 6e9, 200_000.0
# Measured on Linux with Python 3.11 and torch 2.13, of glm-mini and of 300 million weights: Python with the libraries
# used, what loading leaves behind, and what the allocator keeps in gaps between tensors that came and went.
PROGRAM = 400 << 20
COMPILER = 90 << 20  # LLVM and what it compiles, where llvmlite is installed
LOADED = 12 << 20
GAPS, GAPS_SHARE, GAPS_CODED = 20 << 20, 0.25, 0.5  # products over codes make tensors of many sizes
MOST_GAPS = 192 << 20  # beside caches; glibc gives pieces of 32 MiB and more back at once
LEAN = ("chatglm2", "glm", "glm4")  # architectures whose forward is glm_core.models.lean
LONGEST_TRAINING_ROW = 128  # tokens of prompt and answer together, as the released scripts have them


@dataclass(frozen=True)
class Prediction:
    """Bytes of a model at work; `total` is the most at one time.

    context    tokens of a row, prompt and answer together
    parts      weights, cache (keys and values), moved (the cache once more, while it grows and rows join), activations,
               overhead (Python, libraries, the allocator's gaps); of a training those of finetune.preflight
    at_load    what is taken before the first prompt
    kept       what the engine may keep beyond that of earlier prompts, so that it need not read them again
    """

    model: str
    family: str
    precision: str
    device: str
    context: int
    batch: int
    training: str
    parts: dict[str, int]
    at_load: int
    kept: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """The prediction as JSON types."""
        return asdict(self) | {"total": self.total, "notes": list(self.notes)}


def levels(of: Shape, kind: str = "cpu") -> tuple[str, ...]:
    """The precisions a model can be loaded in: those it computes in where its weights are stored as codes."""
    found: tuple[str, ...] = PRECISIONS
    if of.bits:  # 8-bit activations go with a scale per row
        found = tuple(ELEMENT) if of.group else (*ELEMENT, DYNAMIC)
    return tuple(one for one in found if one != DYNAMIC or kind == "cpu")


def usual(of: Shape, kind: str = "cpu") -> tuple[str, ...]:
    """The levels measured unless others are chosen: INT4 without groups, and on a processor without fp16, and without
    8-bit activations where it has none.
    """
    from ..linear import dynamic_works

    found = tuple(one for one in levels(of, kind) if one not in GROUPED)
    if kind == "cpu":
        found = tuple(one for one in found if one != "fp16" and (one != DYNAMIC or dynamic_works()))
    return found


def predict(
    model: Shape | str | Path,
    precision: str = "bf16",
    context: int | None = None,
    batch: int = 1,
    training: Method | None = None,
    device: str = "cpu",
    program: int | None = None,
    prompt: int | None = None,
) -> Prediction:
    """Memory of a model at a precision, for answering rows of so many tokens or, with `training`, for training on them.

    model     a Shape, the name of a built-in one, or a folder with at least a config.json
    context   tokens of a row; default: 2,048 or the model's own limit, whichever is less, and 128 for a training
    batch     rows computed together
    device    "cpu", "cuda" or "mps"; it need not be there
    program   bytes of Python and its libraries, where they were measured
    prompt    of the context, what is read; the rest is written. Default: all of it, which takes the most
    GLMError for a precision, context or batch that cannot be.
    """
    of = model if isinstance(model, Shape) else shape(model)
    context = context or min(LONGEST_TRAINING_ROW if training else 2048, of.context or 2048)
    kind = device.partition(":")[0]
    _check(of, precision, context, batch, kind)
    if training is not None:
        return _training(of, precision, context, batch, training, kind, program)
    weights = weight_bytes(of, precision)
    per_token = 2 * of.layers * of.keys * element_bytes(of, precision)
    budget, read = tokens_at_once(of, kind), min(prompt or context, context)
    # Rows that begin together, and the columns that are fed at once; ChatGLM-6B reads its prompts whole.
    together = min(batch, max(1, budget // read))
    fed = read if of.fused else min(read, max(FORWARD_TOKENS, budget // together))
    cache = batch * (context + KVCache(0).room) * per_token
    # Rows join by copying the cache of both parts into a new one. Within a part every further piece of the prompts
    # moves the cache into a longer one; the allocator keeps what the last but one took until the engine rests.
    moved = cache if together < batch else cache * max(0, read - fed) // context
    activations = activation_bytes(of, precision, kind, together, fed, context)
    whole = compiled(of, precision, kind, together * fed)
    begun = program_bytes(kind, program)
    parts = {
        "weights": weights,
        "cache": cache,
        "moved": moved,
        "activations": activations,
        "overhead": begun
        + (gap_bytes(of, precision, whole, cache + moved, activations) if kind == "cpu" else 0),
    }
    kept = 0 if of.fused else max(16 << 20, min(weights // 10, 1 << 30))
    return Prediction(of.name, of.family, precision, kind, context, batch, "", parts, weights + begun, kept)


def _check(of: Shape, precision: str, context: int, batch: int, kind: str) -> None:
    if kind not in DEVICES:
        raise GLMError(f"The device {kind!r} is unknown.", f"Choose one of {', '.join(DEVICES)}.")
    if precision not in levels(of, kind):
        raise GLMError(
            f"Precision {precision!r} is not one that {of.name} can be loaded in.",
            f"Choose one of {', '.join(levels(of, kind))}.",
        )
    if batch < 1 or context < 1:
        raise GLMError(f"{batch} rows of {context} tokens cannot be computed.", "Choose 1 or more of both.")
    if of.context and context > of.context:
        raise GLMError(
            f"{of.name} takes {of.context:,} tokens, not {context:,}.",
            f"Choose a context of at most {of.context:,}.",
        )


def element_bytes(of: Shape, precision: str) -> int:
    """Bytes of a number that is no code: beside INT8/INT4 codes everything else is bf16 or fp16."""
    return ELEMENT.get(precision, 2)


def bits_of(of: Shape, precision: str) -> int:
    """Bits of the linear layers' codes, 0 where they are floats."""
    return 8 if precision == DYNAMIC else of.bits or code_bits(precision)[0]


def group_of(of: Shape, precision: str) -> int:
    """Columns that share a scale and a zero point, 0 where a row has one scale or the weights are floats."""
    return of.group if of.bits else code_bits(precision)[1]


def weight_bytes(of: Shape, precision: str) -> int:
    """Bytes of the loaded parameters, scales included."""
    element, bits = element_bytes(of, precision), bits_of(of, precision)
    if not bits:
        return of.parameters * element
    if precision == DYNAMIC:  # scales in fp32 beside zero points, and a head of its own in codes as well
        head = 0 if of.tied else of.vocabulary * of.hidden
        rows = of.rows + (0 if of.tied else of.vocabulary)
        return of.linear + head + rows * DYNAMIC_BYTES + (of.others - head) * element
    if group := group_of(of, precision):
        from ..groupwise import code_bytes

        codes = sum(count * code_bytes(rows, columns, group) for rows, columns, count in of.matrices)
        return codes + of.others * element
    scales = (of.rows + (of.vocabulary if of.coded else 0)) * SCALE_BYTES
    return (of.linear + of.coded) * bits // 8 + scales + (of.others - of.coded) * element


def tokens_at_once(of: Shape, kind: str) -> int:
    """Tokens that the engine feeds in one forward, all rows together."""
    speed = CPU_SPEED
    if kind != "cpu":
        speed = min(MOST_SPEED, GPU_SPEED * max(1.0, GPU_WEIGHTS / max(1, of.parameters)))
    return max(FORWARD_TOKENS, int(speed * FORWARD_SECONDS))


def activation_bytes(of: Shape, precision: str, kind: str, rows: int, fed: int, columns: int) -> int:
    """The most that is alive beside weights and cache while `fed` columns of so many rows are computed.

    columns   of the cache after them
    """
    e = element_bytes(of, precision)
    tokens, hidden, queries, inner = rows * fed, of.hidden, of.queries, of.inner
    widest = (2 if of.gated else 1) * inner
    # What is seen, as truth values and as the numbers that attention adds to its scores.
    seen = tokens * columns * (1 + e)
    before = 4 * hidden * e  # what is alive when a layer's widest product begins
    if of.fused:
        attention = (3 * hidden + 6 * queries) * e
        mlp = (3 * hidden + 2 * inner) * e
    elif of.architecture in LEAN:
        # The mask once for every query head that shares keys. What a layer made is kept until the next one makes its own.
        seen += tokens * columns * e * (of.queries // max(1, of.keys))
        made = 2 * queries + 2 * of.keys
        before = (4 * hidden + made) * e
        attention = (2 * hidden + made + 2 * queries) * e
        mlp = before + (widest + inner) * e
    else:
        # Keys and values once more for every query head that shares them.
        seen += 2 * rows * columns * queries * e if of.keys < queries else 0
        attention = (3 * hidden + 3 * queries) * e
        mlp = (3 * hidden + widest + 2 * inner) * e
    if compiled(of, precision, kind, tokens):
        pass  # one pass from the codes to the result
    elif group_of(of, precision):
        # Sums in fp32, rounded to the result.
        mlp = max(mlp, before + widest * (4 + e if e < 4 else 4))
    elif bits_of(of, precision):
        # Sums over codes, the same scaled in fp32 and once more with the bias, rounded to the result.
        mlp = max(mlp, before + widest * (e + 8 if of.biased else 2 * e + 4))
    head = rows * of.vocabulary * (e + (4 if e < 4 else 0))
    scratch = 0 if compiled(of, precision, kind, tokens) else scratch_bytes(of, precision, kind)
    return max(seen + tokens * max(attention, mlp), head) + scratch


def compiled(of: Shape, precision: str, kind: str, tokens: int) -> bool:
    """Whether all products over codes with so many rows are those of the kernels compiled for this processor."""
    from .. import kernels, quantization

    bits = bits_of(of, precision)
    if kind != "cpu" or not bits or precision == DYNAMIC or element_bytes(of, precision) != 2:
        return False
    most = quantization.COMPILED_ROWS_AMX if quantization.amx() else quantization.COMPILED_ROWS
    name: kernels.Kind = "int4 groups" if group_of(of, precision) else "int8" if bits == 8 else "int4"
    joined = of.fused or of.architecture in LEAN
    sizes = [
        (of.queries + 2 * of.keys if joined else of.keys, of.hidden),
        (of.hidden, of.queries),
        ((2 if of.gated else 1) * of.inner, of.hidden),
        (of.hidden, of.inner),
    ]
    return tokens <= most and all(kernels.serve(name, *size) for size in sizes)


def scratch_bytes(of: Shape, precision: str, kind: str) -> int:
    """What products need for a moment beside their inputs and results: codes are expanded block by block."""
    from ..quantization import BLOCK_CODES, BLOCK_CODES_ELSEWHERE

    if not bits_of(of, precision) or precision == DYNAMIC:
        return 0
    return BLOCK_CODES.get(kind, BLOCK_CODES_ELSEWHERE) * element_bytes(of, precision)


def program_bytes(kind: str, measured: int | None = None) -> int:
    """What Python and the libraries take once a model is loaded; on a GPU, what the libraries take there."""
    if kind == "cpu":
        compiler = COMPILER if importlib.util.find_spec("llvmlite") else 0
        return (measured or PROGRAM + compiler) + LOADED
    from ..finetune.preflight import PROGRAM_BYTES

    return measured or PROGRAM_BYTES["cuda"]


def gap_bytes(of: Shape, precision: str, whole: bool, caches: int, activations: int) -> int:
    """What the allocator of a processor's memory keeps beside tensors of so many bytes that come and go.

    whole   whether products over codes are `compiled`: they make few tensors, and the gaps serve the caches
    """
    if whole:
        return GAPS + int(GAPS_SHARE * activations)
    share = GAPS_CODED if bits_of(of, precision) else GAPS_SHARE
    return GAPS + int(min(GAPS_SHARE * caches, MOST_GAPS) + share * activations)


# ---- training


def _training(
    of: Shape, precision: str, context: int, batch: int, method: Method, kind: str, program: int | None
) -> Prediction:
    """As finetune.preflight predicts it."""
    from ..finetune import preflight
    from ..finetune.loop import Plan
    from ..finetune.work import FinetuneTask

    if method.kind in ("full", "freeze") and bits_of(of, precision):
        raise GLMError(
            f"The weights are INT8/INT4 codes, which {method.kind} fine-tuning cannot change.",
            "Load the model in bf16 or fp32, or choose lora or p-tuning-v2.",
        )
    sizes = _sizes(of, method)
    task = FinetuneTask(
        "", Plan(method, precision, 1e-3, batch, 1, 1), "", "", max_source=context // 2,
        max_target=context - context // 2 - 1, device=kind,
    )  # fmt: skip
    parts = preflight._memory(task, precision, kind, sizes, context, context - context // 2)
    parts["weights"] = weight_bytes(of, precision)
    parts = {name: parts[name] for name in parts if name != "program"} | {"overhead": parts["program"]}
    if program is not None:
        parts["overhead"] += program - PROGRAM
    return Prediction(
        of.name, of.family, precision, kind, context, batch, method.kind, parts,
        parts["weights"] + program_bytes(kind, program),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _sizes(of: Shape, method: Method) -> _Sizes:
    """What a training adds to a model, at whatever precision, context and batch.

    A model without values is built for it, in 0.2 s; a page shows a hundred predictions, so it is kept. It is read from a
    folder, which a built-in shape is given for that moment. GLMError where the method does not fit the model.
    """
    from ..finetune import preflight
    from ..finetune.examples import Problem

    problems: list[Problem] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(of.config, encoding="utf-8")
        sizes = preflight._sizes(method, _info(of, folder), "fp32", "cpu", problems)
    if problems:
        raise GLMError(problems[0].message, problems[0].todo)
    return sizes


def _info(of: Shape, folder: Path) -> Any:
    from ..checkpoints import CheckpointInfo

    return CheckpointInfo(
        folder, of.name, of.family, of.generation, of.parameters, 0, "", of.layers, of.hidden, of.context,
        architecture=of.architecture, bits=of.bits, group=of.group, linear_parameters=of.linear,
    )  # fmt: skip


# ---- what fits


def longest_context(
    of: Shape, precision: str, room: int, batch: int = 1, device: str = "cuda", program: int | None = None
) -> int:
    """Tokens per row, up to the model's own limit, that fit into so many bytes; 0 where not even 32 do."""
    low, high = 0, of.context or 32768

    def fits(context: int) -> bool:
        return predict(of, precision, context, batch, device=device, program=program).total <= room

    if fits(high):
        return high
    while high - low > 32:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(
    model: Shape | str | Path,
    precisions: Sequence[str] = (),
    contexts: Iterable[int | None] = (None,),
    batches: Iterable[int] = (1,),
    training: Method | None = None,
    device: str = "cpu",
    program: int | None = None,
) -> list[Prediction]:
    """A prediction for every level, context and batch; those of INT4 in groups only where they are named."""
    of = model if isinstance(model, Shape) else shape(model)
    chosen = precisions or tuple(
        one
        for one in levels(of, device.partition(":")[0])
        if one not in GROUPED
        and not (training and (one == DYNAMIC or (training.kind in ("full", "freeze") and code_bits(one)[0])))
    )
    return [
        predict(of, precision, context, batch, training, device, program)
        for precision in chosen
        for context in contexts
        for batch in batches
    ]


def described(of: Shape) -> dict[str, Any]:
    """A shape for programs, without its config."""
    found = asdict(of)
    del found["config"]
    return found | {"parameters": of.parameters, "config": json.loads(of.config)}
