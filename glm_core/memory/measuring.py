"""What a model takes in memory and how fast it is, measured level by level, each in a fresh process of its own.

In this process libraries, earlier models and screens would count as well. The other one says on its standard output
how far it is and what it found, a line of JSON at a time, and ends when this one does.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..settings import REPOSITORY
from .prediction import predict
from .shapes import Shape, shape

if TYPE_CHECKING:
    from ..checkpoints import LoadedModel
    from ..engine import Engine

NEW_TOKENS = 16  # of every answer: the first shows the speed of reading, the others that of writing
POLL_S = 0.1
SAMPLE_S = 0.002
TEXT = "从前有一座山，山里有一座庙，庙里的老和尚在讲故事。 The quick brown fox jumps over the lazy dog 12 times. "


@dataclass(frozen=True)
class Point:
    """One context and batch: bytes at most and after the prompts were read, tokens per second of all rows together.

    allocated, reserved, used   on a GPU: what torch gave out and what it holds, at most, and what the device is left
                                without, other programs included; elsewhere None
    predicted                   parts of the prediction that goes with it
    error                       why there are no numbers
    """

    context: int
    batch: int
    peak: int = 0
    after_prefill: int = 0
    allocated: int | None = None
    reserved: int | None = None
    used: int | None = None
    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    predicted: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def expected(self) -> int:
        return sum(self.predicted.values())


@dataclass(frozen=True)
class Level:
    """A precision of a checkpoint as it was measured, with what the numbers depend on.

    program     bytes of Python and its libraries before the checkpoint was loaded, a rehearsal with a tiny model done
    at_load     bytes once it is loaded; on a GPU those torch has allocated there
    load_peak   the most while it was loaded, files that are mapped included
    weights     bytes of its parameters
    """

    level: str
    model: str
    fingerprint: str
    device: str
    device_name: str
    threads: int
    date: str
    versions: dict[str, str]
    program: int
    at_load: int
    load_peak: int
    weights: int
    load_seconds: float
    points: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, in types JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Level:
        """What `to_json` gave; unknown keys are ignored."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        names = {one.name for one in fields(Point)}
        points = tuple(
            Point(**{k: v for k, v in one.items() if k in names}) for one in data.get("points", ())
        )
        return cls(**known | {"points": points})


class Unfinished(GLMError):
    """A level that could not be measured to its end; `found` is what there is of it."""

    found: Level | None = None


def measure(
    folder: str | Path,
    level: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    device: str = "cpu",
    generation: str = "",
    base: str = "",
    new_tokens: int = NEW_TOKENS,
    fingerprint: str = "",
    say: Callable[[str], object] | None = None,
    stop: Callable[[], object] | None = None,
) -> Level | None:
    """Measure a level in a fresh process; None where `stop` said so.

    contexts   tokens of a row at its end, prompt and answer together
    say        told in a few words what is being done
    Unfinished, with what was found, where the process could not go on.
    """
    task = {
        "folder": str(folder), "level": level, "contexts": list(contexts), "batches": list(batches),
        "device": device, "generation": generation, "base": base, "new_tokens": new_tokens,
        "fingerprint": fingerprint,
    }  # fmt: skip
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as wrong:
        process = _process(wrong)
        reader = threading.Thread(target=_read, args=(process, lines, say), daemon=True)
        reader.start()
        try:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended, and the lines below say why
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.flush()
            while process.poll() is None:
                if stop is not None and stop():
                    return None
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join()
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        wrong.seek(0)
        return _found(lines, process.returncode, wrong.read().decode("utf-8", "replace"))


def _process(wrong: Any) -> subprocess.Popen[bytes]:
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", "from glm_core.memory import measuring; measuring.child()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=wrong,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8"},
        start_new_session=os.name == "posix",  # Ctrl-C in the terminal is for this process
    )


def _read(
    process: subprocess.Popen[bytes], lines: list[dict[str, Any]], say: Callable[[str], object] | None
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(ValueError):  # cut by a kill, or printed by a library
            if isinstance(one := json.loads(line), dict):
                lines.append(one)
                if say is not None and "say" in one:
                    say(str(one["say"]))


def _found(lines: Sequence[Mapping[str, Any]], status: int, wrong: str) -> Level:
    """The newest state of the level; Unfinished where the process did not come to its end."""
    told = [one["level"] for one in lines if "level" in one]
    level = Level.from_json(told[-1]) if told else None
    errors = [one["error"] for one in lines if "error" in one]
    if not errors and not any(one.get("done") for one in lines):
        last = next((line for line in reversed(wrong.splitlines()) if line.strip()), "no message")
        if status < 0:
            last = f"the system ended it (signal {-status})"
        errors = [[
            f"The process that measured ended early: {last}.",
            "Close other programs, or choose shorter contexts; a signal 9 means that memory ran out.",
        ]]  # fmt: skip
    if errors:
        problem = Unfinished(*errors[-1])
        problem.found = level
        raise problem
    assert level is not None
    return level


# ---- the process that measures


def child() -> None:
    """What the process of `measure` does: a task on its standard input, findings on its standard output."""
    given = json.loads(sys.stdin.buffer.readline())
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is none of the findings

    def tell(**values: Any) -> None:
        print(json.dumps(values, ensure_ascii=False), file=out, flush=True)

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for level in _measured(given, lambda text: tell(say=text)):
            tell(level=level.to_json())
        tell(done=True)
    except GLMError as error:
        tell(error=[error.message, error.todo])
    out.flush()
    os._exit(0)  # all is said, and tearing down the model libraries takes over a second


def _end_with_parent() -> None:
    with suppress(OSError):
        os.read(0, 1)  # its end: nobody waits for the findings any more
    os._exit(1)


def _measured(given: Mapping[str, Any], say: Callable[[str], object]) -> Iterator[Level]:
    """The level after it was loaded, and again after every point."""
    import torch

    from .. import batch, checkpoints, devices
    from ..engine import Engine, trim

    folder, name, device = Path(given["folder"]), str(given["level"]), str(given["device"])
    base = given["base"] or None
    info = checkpoints.inspect(folder)
    on = checkpoints.base_of(info, base) if info.needs_base else info
    of = shape(on.path)
    say("Rehearsing with a tiny model")
    on_gpu = device.startswith("cuda")
    tokenizer = checkpoints.load_tokenizer(on.path, given["generation"] or on.generation)
    _rehearse(of, name, device)
    del tokenizer
    gc.collect()
    trim()
    program = int(torch.cuda.memory_reserved()) if on_gpu else resident()
    say(f"Loading {info.name} in {name.upper()}")
    with _peak(on_gpu) as load_peak:
        loaded = checkpoints.load(folder, name, device, given["generation"] or None, base)
        Engine(loaded).close()  # lays the weights out for this device
    gc.collect()
    trim()
    level = Level(
        level=name, model=info.name, fingerprint=given["fingerprint"] or checkpoints.fingerprint(folder),
        device=loaded.devices, device_name=device_name(loaded.devices), threads=torch.get_num_threads(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S"), versions=batch.versions(), program=program,
        at_load=int(torch.cuda.memory_allocated()) if on_gpu else resident(),
        load_peak=load_peak[0], weights=loaded.weight_bytes, load_seconds=loaded.load_seconds,
    )  # fmt: skip
    yield level
    loaded.tokenizer.stop_ids = frozenset()  # answers are to have the length that was asked for
    limit = loaded.info.context
    for rows in given["batches"]:
        for context in given["contexts"]:
            if limit and context > limit:
                continue
            say(f"{name.upper()}: {context:,} tokens x {rows}")
            predicted = predict(of, name, context, rows, device=device, program=program or None).parts
            point = Point(context, rows, predicted=predicted)
            more = sum(predicted[part] for part in ("cache", "moved", "activations"))
            free = devices.free_bytes(loaded.devices.split(",")[0])
            if more > free:
                point = replace(
                    point,
                    error=f"It needs about {more / 2**30:.1f} GiB more; {free / 2**30:.1f} GiB are free.",
                )
            else:
                point = _point(loaded, point, int(given["new_tokens"]), on_gpu)
            level = replace(level, points=(*level.points, point))
            yield level


def _rehearse(of: Shape, level: str, device: str) -> None:
    """A tiny model in this precision computes as the engine does: libraries take memory when they are first used."""
    import torch

    from .. import groupwise, kernels
    from ..checkpoints import loading
    from ..engine import KVCache
    from ..quantization import quantize
    from .prediction import bits_of, group_of

    raw: dict[str, Any] = {
        "model_type": "chatglm", "padded_vocab_size": 512, "hidden_size": 128, "ffn_hidden_size": 256,
        "num_layers": 1, "num_attention_heads": 4, "multi_query_group_num": 2, "kv_channels": 32,
        "layernorm_epsilon": 1e-5, "seq_length": 512,
    }  # fmt: skip
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(level, torch.bfloat16)
    model: Any = loading.empty_model("chatglm2", raw, "chatglm2").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    bits, group = bits_of(of, level), group_of(of, level)
    if bits:
        model = groupwise.quantize(model, group) if group else quantize(model, bits)
    model = model.to(dtype).to(device).eval().requires_grad_(False)
    if device == "cpu":
        kernels.kernels()  # with LLVM, 70 MiB

    def compute() -> None:
        cache = KVCache(1)
        with torch.inference_mode():
            for count in (250, 1, 1):
                end = cache.length + count
                seen = torch.ones(2, 1, count, end, dtype=torch.bool, device=device).tril(cache.length)
                model(
                    input_ids=torch.ones(2, count, dtype=torch.long, device=device),
                    attention_mask=seen,
                    position_ids=torch.arange(end - count, end, device=device).expand(2, -1),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache.length = end

    thread = threading.Thread(
        target=compute
    )  # as the engine's own, with its stack and its part of the allocator
    thread.start()
    thread.join()


def _point(loaded: LoadedModel, point: Point, new_tokens: int, on_gpu: bool) -> Point:
    """Answer so many rows of this length with an engine of its own, which begins as every new one does."""
    import torch

    from ..engine import Engine, GenerationSettings, Request, trim

    gc.collect()
    trim()
    settings = GenerationSettings(max_new_tokens=min(new_tokens, max(1, point.context // 2)))
    engine = Engine(loaded, max_rows=point.batch)
    prompts = [prompt(engine, point.context - settings.max_new_tokens, row) for row in range(point.batch)]
    engine.limits["batch"] = point.batch
    after = used = 0
    with _peak(on_gpu) as peak:
        began = time.monotonic()
        handles = engine.submit_many([Request(ids, settings, "batch") for ids in prompts])
        while not all(handle.done for handle in handles):
            if not after and all(handle.first_token is not None for handle in handles):
                after = int(torch.cuda.memory_allocated()) if on_gpu else resident()
                if on_gpu:
                    free, total = torch.cuda.mem_get_info()
                    used = total - free
            time.sleep(SAMPLE_S)
    engine.close()
    failed = next((handle.error for handle in handles if handle.error is not None), None)
    if failed is not None:
        return replace(point, error=failed.message)
    firsts = [handle.first_token or began for handle in handles]
    ended = max(handle.ended or 0 for handle in handles)
    written = sum(handle.n_tokens for handle in handles) - len(handles)
    return replace(
        point,
        peak=peak[0],
        after_prefill=after,
        allocated=int(torch.cuda.max_memory_allocated()) if on_gpu else None,
        reserved=int(torch.cuda.max_memory_reserved()) if on_gpu else None,
        used=used if on_gpu else None,
        prefill_per_s=sum(map(len, prompts)) / max(max(firsts) - began, 1e-6),
        decode_per_s=written / max(ended - max(firsts), 1e-6) if written else 0.0,
    )


def prompt(engine: Engine, length: int, row: int) -> tuple[int, ...]:
    """A conversation of so many tokens; every row has another one."""
    from ..tokenizers.base import Message

    text = TEXT[row % len(TEXT) :] + TEXT
    while len(ids := engine.tokenizer.chat_ids([Message("user", f"{row}: {text}")])) < length:
        text += text
    surplus = len(ids) - length  # out of the middle, where there is nothing but text
    middle = len(ids) // 2 - surplus // 2
    return (*ids[:middle], *ids[middle + surplus :])


# ---- reading the system's numbers


def resident() -> int:
    """Bytes of main memory that this process has in use."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@contextmanager
def _peak(on_gpu: bool) -> Iterator[list[int]]:
    """The most bytes in use inside, in a list that is filled at the end; on a GPU those torch reserved there."""
    found = [0]
    if on_gpu:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[0] = int(torch.cuda.max_memory_reserved())
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high water mark begins anew
    except OSError:  # not Linux, or a container that forbids it
        yield from _sampled(found)
        return
    yield found
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            found[0] = int(line.split()[1]) << 10


def _sampled(found: list[int]) -> Iterator[list[int]]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found[0] = max(found[0], resident())


def device_name(device: str) -> str:
    """What the device is called: a GPU by torch, a processor by the system."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device.split(",")[0]))
    from ..batch import _cpu_name

    return _cpu_name() or platform.processor() or platform.machine()
