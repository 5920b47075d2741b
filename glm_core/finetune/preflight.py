"""Before a training: will it fit into memory and onto the disk, how long will it take, and what else stands in its way?

The prediction reads configurations and headers only. The sizes of activations are counted from the tensors that
the layers' backward passes keep; `tests/test_preflight.py` holds them against measured peaks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import devices
from ..errors import GLMError
from .examples import Example, Problem
from .loop import MULTIPLE, Plan
from .methods import LOGITS_AT_A_TIME, LOGITS_ELSEWHERE, Method
from .work import FinetuneTask, load_data, refuse_used

if TYPE_CHECKING:
    from ..checkpoints import CheckpointInfo

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
# Python with torch and transformers, 490 MiB, and 40 for the work space of the matrix libraries and what the allocator
# keeps, measured with glm-mini on a processor; on a GPU, torch's libraries there.
PROGRAM_BYTES = {"cpu": 530 << 20, "cuda": 600 << 20}
STEP_FILES = 1 << 20  # bytes of a checkpoint beside its tensors: configuration, tokenizer
WARN_SHARE = 0.85  # of the free memory
STEPS = 3
POLL_S = 0.1
SAMPLED_ROWS = 2000  # rows that the trial steps are drawn from


@dataclass(frozen=True)
class Prediction:
    """What a training is going to take.

    memory_bytes   the most at one time, the program itself included; the sum of `memory_parts`
    memory_parts   program, weights, trainable (fp32 copies of what is trained), gradients, optimiser, activations,
                   head (logits and their gradients)
    free_bytes     of memory on the device, with what is said to be freed before the start
    disk_bytes     all checkpoints that are kept, and the published files
    trainable      numbers that are trained, of `parameters`
    problems       "stop" prevents the start, "warn" does not
    """

    device: str
    precision: str
    memory_bytes: int
    memory_parts: dict[str, int]
    free_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    trainable: int
    parameters: int
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def stops(self) -> tuple[Problem, ...]:
        """The problems that prevent the start."""
        return tuple(problem for problem in self.problems if problem.severity == "stop")

    def to_json(self) -> dict[str, Any]:
        """The prediction as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """How fast the plan runs on this machine now.

    seconds_per_step   mean of the steps timed, on rows as the plan draws them
    eta_s              of all its steps; dev rows and writing checkpoints come on top
    memory_bytes       the most the process had in use, on a GPU the most that torch had allocated; the longest
                       rows are among those timed
    """

    seconds_per_step: float
    eta_s: float
    memory_bytes: int
    steps: int
    longest: int  # tokens of the longest row


def predict(
    task: FinetuneTask, longest: int | None = None, counted: int | None = None, freed_bytes: int = 0
) -> Prediction:
    """Memory, disk and all problems of a training, without loading its model.

    longest       tokens of the longest row, where known; else what the limits allow
    counted       tokens of the longest answer, where known; else what the limit allows
    freed_bytes   memory that is going to be given back before the start: that of the chat model
    GLMError where the checkpoint cannot be read at all; everything else is among the problems.
    """
    from .. import checkpoints

    plan = task.plan
    info = checkpoints.inspect(Path(task.checkpoint).expanduser())
    problems = [Problem("stop", message, todo) for message, todo in task.problems()]
    problems += _base(info)
    problems += _files(task)
    device = _device(task.device, problems)
    precision = _precision(info, plan, device, problems)
    problems += _context(task, info)
    sizes = _Sizes() if info.problems else _sizes(task.plan.method, info, precision, device, problems)
    width = longest or task.max_source + task.max_target + 1
    if task.adapt is not None:
        width = max(width, task.adapt.length)
        counted = max(counted or task.max_target + 1, task.adapt.length)
    parts = _memory(task, precision, device, sizes, width, min(counted or task.max_target + 1, width))
    need, free = sum(parts.values()), devices.free_bytes(device) + freed_bytes
    problems += _little_memory(info.name, plan, need, free, device)
    disk, folder = _disk(task, precision, sizes), _existing(Path(task.output).expanduser())
    disk_free = shutil.disk_usage(folder).free
    if disk > disk_free:
        problems.append(
            Problem(
                "stop",
                f"The checkpoints need about {_size(disk)} on the disk; {_size(disk_free)} are free in {folder}.",
                "Free some disk space, keep fewer checkpoints, or choose another folder.",
            )
        )
    return Prediction(
        device=device,
        precision=precision,
        memory_bytes=need,
        memory_parts=parts,
        free_bytes=free,
        disk_bytes=disk,
        disk_free_bytes=disk_free,
        trainable=sizes.trainable,
        parameters=info.parameters,
        notes=_notes(task, precision, device),
        problems=tuple(problems),
    )


# ------------------------------------------------------------------------------------------------ what stands in the way


def _base(info: CheckpointInfo) -> list[Problem]:
    if info.problems:
        return [
            Problem(
                "stop",
                f"{info.path} cannot be loaded. {' '.join(info.problems)}",
                "Repair the folder or choose another.",
            )
        ]
    if info.adapter is not None:
        return [
            Problem(
                "stop",
                f"{info.name} carries an adapter already.",
                "Load its base alone, or merge the adapter into it first.",
            )
        ]
    return []


def _files(task: FinetuneTask) -> list[Problem]:
    """Files that are not there, and an output folder that is in use."""
    found = [
        Problem("stop", f"There is no file {name}.", "Check the spelling, and that the disk is mounted.")
        for name in (
            task.train_file,
            task.dev_file,
            task.general_file if task.general_share else "",
            task.adapt.file if task.adapt else "",
        )
        if name and not Path(name).expanduser().is_file()
    ]
    try:
        refuse_used(Path(task.output).expanduser(), resume=False, overwrite=False)
    except GLMError as error:
        found.append(Problem("stop", error.message, error.todo))
    return found


def _device(device: str, problems: list[Problem]) -> str:
    try:
        return devices.named(device)[0]
    except GLMError as error:
        problems.append(Problem("stop", error.message, error.todo))
        return "cpu"


def _precision(info: CheckpointInfo, plan: Plan, device: str, problems: list[Problem]) -> str:
    """What the base is loaded and computed in."""
    from ..checkpoints import STORED

    precision = devices.precision_for(device, info.parameters) if plan.precision == "auto" else plan.precision
    if precision not in STORED:
        problems.append(
            Problem("stop", f"No training runs in {precision!r}.", f"Choose one of {', '.join(STORED)}.")
        )
        return "fp32"
    if info.bits and precision.startswith("int"):
        precision = devices.PRECISION_OF[devices.kind(device)][0]
    if (info.bits or precision.startswith("int")) and plan.method.kind in ("full", "freeze"):
        problems.append(
            Problem(
                "stop",
                f"The weights are INT8/INT4 codes, which {plan.method.kind} fine-tuning cannot change.",
                "Load the model in bf16 or fp32, or choose lora or p-tuning-v2.",
            )
        )
    return precision


def _context(task: FinetuneTask, info: CheckpointInfo) -> list[Problem]:
    if not info.context or task.max_source + task.max_target + 1 <= info.context:
        return []
    return [
        Problem(
            "stop",
            f"{task.max_source:,} tokens of a prompt and {task.max_target:,} of an answer do not fit into the model's "
            f"context of {info.context:,}.",
            "Choose smaller limits.",
        )
    ]


def _little_memory(name: str, plan: Plan, need: int, free: int, device: str) -> list[Problem]:
    if need <= WARN_SHARE * free:
        return []
    ways = ["fewer rows at a time with more accumulation"] if plan.batch_size > 1 else []
    ways += [] if plan.checkpointing else ["gradient checkpointing"]
    ways += ["lower token limits", "a smaller checkpoint"]
    if plan.method.kind in ("full", "freeze"):
        ways.insert(0, "lora instead")
    elif not plan.precision.startswith("int"):
        ways.insert(0, "a lower precision")
    how = f"Choose one of these: {', '.join(ways)}; or close other programs."
    if need > free:
        message = f"This training of {name} needs about {_size(need)}; {_size(free)} are free on {device}."
        return [Problem("stop", message, how)]
    message = f"This training of {name} needs about {_size(need)} of the {_size(free)} that are free on {device}: it is tight."
    return [Problem("warn", message, how)]


def _notes(task: FinetuneTask, precision: str, device: str) -> tuple[str, ...]:
    found = []
    kind = task.plan.method.kind
    if kind in ("full", "freeze") and precision in ("bf16", "fp16"):
        found.append(f"What is trained is kept in fp32; products are computed in {precision}.")
    if precision == "fp16" and device == "cpu":
        found.append("fp16 is slow or missing on a processor; bf16 and fp32 are not.")
    if task.plan.checkpointing:
        found.append(
            "Gradient checkpointing computes every layer twice: less memory, about a third more time."
        )
    return tuple(found)


# ------------------------------------------------------------------------------------------------ memory and disk


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a model that its memory depends on.

    weights      bytes of the loaded model
    trainable    numbers that are trained
    inside       those of them that are weights of the model itself, of which `linear` belong to linear layers
    layers       that gradients pass through
    hidden ...   per token: the hidden state, the widest of the MLP, all queries, the vocabulary
    first        ChatGLM-6B's layers: LayerNorm, one fused projection, GELU
    adapted      linear layers of a layer that carry a LoRA
    prefix       numbers of a prefix column
    """

    weights: int = 0
    trainable: int = 0
    inside: int = 0
    linear: int = 0
    all_layers: int = 0
    layers: int = 0
    hidden: int = 0
    inner: int = 0
    queries: int = 0
    heads: int = 0
    vocabulary: int = 0
    first: bool = False
    adapted: int = 0
    prefix: int = 0


def _sizes(
    method: Method, info: CheckpointInfo, precision: str, device: str, problems: list[Problem]
) -> _Sizes:
    """From a model without values, built from the configuration; a problem instead where none can be."""
    import torch

    from ..checkpoints import code_bits, loading, read_config
    from ..weights import listing, weight_files
    from .methods import _last_layers

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtype = dtype or devices.beside_codes(device)
    bits, group = (info.bits, info.group) if info.bits else code_bits(precision)
    try:
        raw = read_config(info.path)
        if info.architecture in loading.OWN:
            model: Any = loading.empty_model(info.architecture, raw, info.generation)
        else:
            model = loading._native_model(info, listing(weight_files(info.path)[0]), dtype)
        weights = sum(loading._sizes(model, dtype, bits, group).values())
        config = model.config
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        sizes = _Sizes(
            weights=weights,
            all_layers=int(config.num_hidden_layers),
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            inner=int(getattr(config, "inner_hidden_size", None) or config.intermediate_size),
            queries=heads * width,
            heads=heads,
            vocabulary=int(config.vocab_size),
            first=info.architecture == "chatglm",
        )
        if method.kind == "lora":
            return _with_lora(sizes, model, method)
        if method.kind == "p-tuning-v2":
            return _with_prefix(sizes, model, info, method)
        parts: list[Any] = [model]
        if method.kind == "freeze":
            parts = _last_layers(model, method.freeze_layers)
            if method.freeze_what == "mlp":
                parts = [layer.get_submodule("mlp") for layer in parts]
            sizes = replace(sizes, layers=method.freeze_layers)
        inside = sum(p.numel() for part in parts for p in part.parameters())
        linear = sum(
            module.weight.numel()
            for part in parts
            for module in part.modules()
            if isinstance(module, torch.nn.Linear)
        )
        return replace(sizes, trainable=inside, inside=inside, linear=linear)
    except GLMError as error:
        if str(error) not in [str(GLMError(one.message, one.todo)) for one in problems]:
            problems.append(Problem("stop", error.message, error.todo))
        return _Sizes()


def _with_lora(sizes: _Sizes, model: Any, method: Method) -> _Sizes:
    """Two matrices of the chosen rank beside every linear layer that is named; GLMError for a name there is none of."""
    from ..adapters import RELEASED_LINEARS, _is_linear

    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    leaves = {path.rsplit(".", 1)[-1] for path in linears}
    same = {
        old.split(".")[-1]: [part.split(".")[-1] for part in parts] for old, parts in RELEASED_LINEARS.items()
    }
    names: list[str] = []
    for target in method.lora_targets:
        parts = [target] if target in leaves else same.get(target, [])
        if not parts or not leaves.issuperset(parts):
            raise GLMError(
                f"{type(model).__name__} has no linear layer named {target}.",
                f"Choose from {', '.join(sorted(leaves))}.",
            )
        names += parts
    chosen = [module for path, module in linears.items() if path.rsplit(".", 1)[-1] in names]
    count = sum(method.lora_rank * (module.in_features + module.out_features) for module in chosen)
    return replace(sizes, trainable=count, adapted=-(-len(chosen) // max(1, sizes.all_layers)))


def _with_prefix(sizes: _Sizes, model: Any, info: CheckpointInfo, method: Method) -> _Sizes:
    import torch

    from ..adapters import BaseShape, PrefixEncoder

    if info.architecture not in ("chatglm", "chatglm2"):
        raise GLMError(
            f"P-tuning v2 is for ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM-4; {info.name} is {info.family}.",
            "Choose lora.",
        )
    shape = BaseShape.of(model.config)
    with torch.device("meta"):
        encoder = PrefixEncoder(shape, method.prefix_length, method.prefix_projection)
    count = sum(p.numel() for p in encoder.parameters())
    return replace(sizes, trainable=count, prefix=shape.width)


def _memory(
    task: FinetuneTask, precision: str, device: str, sizes: _Sizes, width: int, counted: int
) -> dict[str, int]:
    """Bytes of every part at the moment of the most; `width` columns, of which `counted` count in the loss."""
    plan, method = task.plan, task.plan.method
    rows, columns = plan.batch_size, -(-width // MULTIPLE) * MULTIPLE
    element = ELEMENT.get(precision, 2)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    inside = method.kind in ("full", "freeze")
    # The fp32 form of what was loaded in half precision replaces it; autocast keeps a copy of every product's weights.
    copies = sizes.inside * (4 - element) + (sizes.linear * element if element == 2 else 0) if inside else 0
    trainable = copies if inside else 4 * sizes.trainable
    gradients, optimiser = 4 * sizes.trainable, 8 * sizes.trainable
    each = _layer_bytes(sizes, method, element, rows, columns, plan.dropout)
    state = rows * columns * sizes.hidden * (4 if inside else element)
    if plan.checkpointing:
        activations = 2 * each + sizes.layers * state  # of one layer, computed again while its gradient is
    else:
        activations = sizes.layers * each
        if method.kind == "freeze" and method.freeze_what == "mlp":
            # No gradient goes further down than the first of these MLPs.
            activations -= _attention_bytes(sizes, method, element, rows, columns)
    if method.kind == "p-tuning-v2":
        activations += rows * method.prefix_length * sizes.prefix * (4 + 2 * element)
    # What the backward pass of one layer holds beside what was kept, and the states around the layers.
    activations += rows * columns * (3 * sizes.inner * element + 6 * sizes.hidden * 4)
    budget = LOGITS_AT_A_TIME.get(kind, LOGITS_ELSEWHERE)
    tokens = min(rows * counted, max(64, budget // max(1, sizes.vocabulary)))
    head = tokens * sizes.vocabulary * (3 * 4 + 2 * (element if element == 2 else 0))
    return {
        "program": PROGRAM_BYTES[kind],
        "weights": sizes.weights,
        "trainable": trainable,
        "gradients": gradients,
        "optimiser": optimiser,
        "activations": activations,
        "head": head,
    }


def _attention_bytes(sizes: _Sizes, method: Method, element: int, rows: int, columns: int) -> int:
    """Bytes that the attention of one layer keeps for its backward pass."""
    tokens, queries = rows * columns, sizes.queries
    prefix = method.prefix_length if method.kind == "p-tuning-v2" else 0
    # Queries and the mixed values of the text; keys and values of the text and the prefix, repeated for every head.
    kept = (
        tokens * (2 * queries * element + 4 * sizes.heads) + 2 * (tokens + rows * prefix) * queries * element
    )
    if sizes.first or prefix:  # a mask of its own in every layer
        kept += tokens * (columns + prefix) * element
    return kept


def _layer_bytes(sizes: _Sizes, method: Method, element: int, rows: int, columns: int, dropout: bool) -> int:
    """Bytes that all of one layer keeps for its backward pass."""
    tokens = rows * columns
    hidden, inner = sizes.hidden, sizes.inner
    learns = method.kind in ("full", "freeze")
    if sizes.first:
        numbers = (4 * hidden + inner) * element
        if learns:
            numbers += (3 * hidden + inner) * element
    else:
        # RMSNorm computes in fp32 and keeps its input so; gate, up and the gate's SiLU.
        numbers = 2 * hidden * 4 + 3 * inner * element
        if learns:
            # Autocast makes a copy of a product's input for each of the products that read it.
            inputs = 2 if element == 4 else 6
            numbers += 2 * hidden * 4 + inputs * hidden * element + inner * element
    if method.kind == "lora":
        kept = 2 if dropout and method.lora_dropout else 1
        numbers += sizes.adapted * (kept * hidden * 4 + method.lora_rank * 8)
    return tokens * numbers + _attention_bytes(sizes, method, element, rows, columns)


def _disk(task: FinetuneTask, precision: str, sizes: _Sizes) -> int:
    """Bytes of the checkpoints that are kept, the newest and the best, while one more is written."""
    plan = task.plan
    trained, whole = 4 * sizes.trainable, 0
    if plan.method.kind in ("full", "freeze"):
        whole = sizes.weights
        step = whole + 2 * trained + (0 if precision == "fp32" else trained)
    else:
        step = 3 * trained
    saved = -(-plan.max_steps // max(1, plan.save_steps))
    kept = min(plan.save_total + 2, saved + 1)  # the best may be older than those kept; one is being written
    total = kept * (step + STEP_FILES)
    if task.adapt is not None:
        total += 2 * (step + STEP_FILES)
        total *= 2 if task.adapt.compare else 1
    return total


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------ time


def time_steps(task: FinetuneTask, steps: int = STEPS, stop: Callable[[], object] | None = None) -> Timing:
    """Train a few steps in a process of its own and say how long they take; nothing is kept of them.

    One step takes the longest rows, for the memory; `steps` more take rows as the plan draws them.
    stop   asked a few times a second; anything true ends the process, and GLMError says so
    GLMError as the training itself would give it.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
        code = "import sys; from glm_core.finetune import preflight; sys.exit(preflight._child())"
        path = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=wrong,
            env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"task": task.to_json(), "steps": steps}).encode())
            process.stdin.close()
            while process.poll() is None:
                if stop is not None and stop():
                    raise GLMError("The trial steps were stopped.", "Start them again.")
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said.seek(0)
        wrong.seek(0)
        return _timing(process.returncode, said.read().decode(), wrong.read().decode("utf-8", "replace"))


def _timing(status: int, said: str, wrong: str) -> Timing:
    lines = [line for line in said.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    if "error" in found:
        raise GLMError(*found["error"])
    if status or not found:
        last = next((line for line in reversed(wrong.splitlines()) if line.strip()), "no message")
        if status < 0:
            last = f"the system ended them (signal {-status})"
        raise GLMError(
            f"The trial steps ended without a result: {last}.",
            "Close other programs, or choose fewer rows at a time; a signal 9 means that memory ran out.",
        )
    return Timing(**found)


def _child() -> int:
    """What the process of `time_steps` does: a task on stdin, its timing or its error on stdout."""
    given = json.load(sys.stdin)
    with suppress(OSError, AttributeError):
        os.nice(5)
    try:
        found: dict[str, Any] = asdict(_timed(FinetuneTask.from_json(given["task"]), int(given["steps"])))
    except GLMError as error:
        found = {"error": [error.message, error.todo]}
    print(json.dumps(found), flush=True)
    return 0


def _timed(task: FinetuneTask, steps: int) -> Timing:
    import torch

    from .. import checkpoints
    from .encoding import encode_all
    from .loop import _enough_memory, _Run
    from .methods import attach

    for message, todo in task.problems():
        raise GLMError(message, todo)
    data = load_data(task)
    loaded = checkpoints.load(task.checkpoint, task.plan.precision, task.device, task.generation or None)
    plan = replace(task.plan, precision=loaded.precision) if task.plan.precision == "auto" else task.plan
    plan = replace(plan, max_steps=max(plan.max_steps, steps + 1))
    per_step = plan.batch_size * plan.accumulation
    examples = _sample((*data.train, *data.general), per_step, steps)
    rows = encode_all(
        examples, loaded.tokenizer, task.max_source, task.max_target, source_prefix=task.source_prefix,
        history_column=data.history,
    )  # fmt: skip
    trainee = attach(loaded, plan.method, plan.precision, plan.seed)
    if task.start_from:
        trainee.load(Path(task.start_from).expanduser())
    lengths = rows.lengths
    order = sorted(range(len(rows)), key=lambda row: -int(lengths[row]))
    longest = rows.take((order * per_step)[:per_step])
    seconds = []
    for part, count in ((longest, 1), (rows, steps)):
        # Nothing is written: a run writes its checkpoints when it is told to, not from its steps.
        run = _Run(trainee, part, (), plan, Path(task.output), loaded.tokenizer.pad_id, None)
        trainee.training(plan.dropout, plan.checkpointing)
        with _enough_memory(plan, run):
            for step in range(count):
                began = time.perf_counter()
                run._step(step)
                if loaded.device.type == "cuda":
                    torch.cuda.synchronize(loaded.device)
                seconds.append(time.perf_counter() - began)
        run.optimizer.zero_grad(set_to_none=True)
    each = sum(seconds[1:]) / max(1, len(seconds) - 1)
    return Timing(each, each * task.plan.max_steps, peak_bytes(loaded.device.type), steps, int(lengths.max()))


def _sample(examples: Sequence[Example], per_step: int, steps: int) -> list[Example]:
    """The rows with the longest texts, for one step, and others at random for the rest."""
    order = sorted(range(len(examples)), key=lambda i: -(len(examples[i].prompt) + len(examples[i].response)))
    chance = random.Random(0)
    others = chance.sample(range(len(examples)), min(len(examples), max(SAMPLED_ROWS, per_step * steps)))
    return [examples[i] for i in sorted({*order[: 2 * per_step], *others})]


def peak_bytes(device_type: str) -> int:
    """The most memory that this process has had in use; on a GPU the most that torch had allocated."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import psutil

    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    found = psutil.Process().memory_info()
    return int(getattr(found, "peak_wset", found.rss))
