"""Every level at the shape of ChatGLM2-6B with random weights, beside llama.cpp, chatglm.cpp and the memory's speed.

    python benchmarks/shape.py
    python benchmarks/shape.py --layers 8 --only int8 --rounds 5

Two programs at a time, each in a process of its own with its model in memory, take turns; every ratio is the median
over the rounds, with a probe of the read bandwidth before and after, because the memory bus of shared machines has
more than one speed. The peers come from `pip install llama-cpp-python gguf chatglm-cpp` (a C++ compiler builds them;
`--peers PYTHON` names the interpreter that has them); without them their lines are left out. The released code's way to
multiply is compiled with `cc`, where there is one. Speed only: random weights say nothing about answers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

SHAPE = {
    "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "num_attention_heads": 32,
    "multi_query_group_num": 2, "kv_channels": 128, "layernorm_epsilon": 1e-5, "seq_length": 32768,
}  # fmt: skip
PAST = {1: 64, 8: 32, 32: 16}  # tokens of a stream before the measured ones; llama.cpp needs long for more
# How the released code multiplies INT8 and INT4 on a CPU: a kernel of this kind, built by the system's C compiler with
# these flags, expands a weight to fp32 in memory, which torch then multiplies.
EXPAND = """
#include <stdint.h>
void int8(const int8_t *codes, const float *scale, float *out, long rows, long bytes) {
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < bytes; c++) out[r * bytes + c] = codes[r * bytes + c] * scale[r];
}
void int4(const int8_t *codes, const float *scale, float *out, long rows, long bytes) {
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < bytes; c++) {
            int8_t two = codes[r * bytes + c];
            out[2 * (r * bytes + c)] = (two >> 4) * scale[r];
            out[2 * (r * bytes + c) + 1] = ((int8_t)(two << 4) >> 4) * scale[r];
        }
}
"""
# With two libraries of OpenMP in one process neither may wait actively for its next work.
ENVIRONMENT = {"released": {"OMP_WAIT_POLICY": "PASSIVE"}}
FLAGS = ("-O3", "-fPIC", "-pthread", "-fopenmp", "-std=c99", "-shared")


# ---- our side --------------------------------------------------------------------------------------------------


class Ours:
    """A model of random weights as an Engine would run it, asked for steps one by one."""

    def __init__(self, level: str, shape: dict[str, Any], threads: int) -> None:
        import torch

        from glm_core.models.lean import laid_out, lean

        torch.set_num_threads(threads)
        self.torch = torch
        self.layers = shape["num_layers"]
        self.model = random_model(level, shape)
        plain = level == "bf16-plain"
        self.forward: Any = lean(self.model) if plain else laid_out(self.model, level == "int8-dynamic")

    def _cache(self) -> Any:
        from glm_core.engine import KVCache

        return KVCache(self.layers)

    def _feed(self, cache: Any, rows: int, tokens: int) -> float:
        torch = self.torch
        ids = torch.randint(5, 6000, (rows, tokens))
        end = cache.length + tokens
        mask = torch.ones(tokens, end, dtype=torch.bool).tril_(end - tokens).expand(rows, 1, tokens, end)
        positions = torch.arange(cache.length, end).expand(rows, -1)
        started = time.perf_counter()
        with torch.inference_mode():
            self.forward(ids, mask, cache, positions, 1).float().argmax(-1)
        cache.length = end
        return time.perf_counter() - started

    def decode(self, streams: int, past: int, steps: int) -> list[float]:
        cache = self._cache()
        self._feed(cache, streams, past)
        return [self._feed(cache, streams, 1) for _ in range(steps)]

    def prefill(self, tokens: int) -> float:
        return self._feed(self._cache(), 1, tokens)

    def labels(self, head: int, row: int, answers: int) -> dict[str, float]:
        """Seconds per row of labelling: whole prompts one by one, and the shared head computed once."""
        torch = self.torch

        def once(shared: Any, rows: int, fed: int, decoded: int) -> float:
            cache = (
                shared.select(torch.zeros(rows, dtype=torch.long)) if shared is not None else self._cache()
            )
            seconds = self._feed(cache, rows, fed)
            return seconds + sum(self._feed(cache, rows, 1) for _ in range(decoded))

        naive = once(None, 1, head + row, answers)
        start = self._cache()
        self._feed(start, 1, head)
        scored = once(start, 8, row + answers, 0) / 8  # one prefill over the row and its label
        return {"naive": naive, "scored": scored}


class Released:
    """The linear layers of one decoder layer, computed as the released code does on a CPU; nothing else of a model."""

    def __init__(self, level: str, shape: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.layers = torch, shape["num_layers"]
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "expand.c"), Path(folder, "expand.so")
            source.write_text(EXPAND)
            subprocess.run(["cc", *FLAGS, str(source), "-o", str(library)], check=True)
            self.expand = getattr(ctypes.CDLL(str(library)), level)
        self.expand.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2
        wide, inner = shape["hidden_size"], shape["ffn_hidden_size"]
        qkv = wide + 2 * shape["multi_query_group_num"] * shape["kv_channels"]
        self.weights = []
        for rows, columns in ((qkv, wide), (wide, wide), (2 * inner, wide), (wide, inner)):
            stored = columns if level == "int8" else columns // 2
            codes = torch.randint(-128, 128, (rows, stored), dtype=torch.int8)
            self.weights.append((codes, torch.full((rows,), 2e-4), torch.randn(1, columns)))
        self.space = torch.empty(2 * inner * wide)

    def decode(self, streams: int, past: int, steps: int) -> list[float]:
        """Seconds of each step, of one layer times all of them."""
        taken = []
        for _ in range(steps):
            started = time.perf_counter()
            for codes, scale, x in self.weights:
                rows, columns = len(codes), x.shape[1]
                floats = self.space[: rows * columns].view(rows, columns)
                self.expand(codes.data_ptr(), scale.data_ptr(), floats.data_ptr(), *codes.shape)
                x.mm(floats.t())
            taken.append((time.perf_counter() - started) * self.layers)
        return taken


def random_model(level: str, shape: dict[str, Any]) -> Any:
    """ChatGLM2 of this shape with random weights, made in the level's own format."""
    import torch

    from glm_core import quantization
    from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM

    config = ChatGLM2Config.from_released(shape)
    with torch.device("meta"):
        model = ChatGLM2ForCausalLM(config).to(torch.bfloat16)
    if level.startswith("int"):
        quantization.replace_linears(model, 4 if level == "int4" else 8)
    torch.manual_seed(0)
    drawn: dict[tuple[Any, ...], Any] = {}
    for name, parameter in list(model.named_parameters()):
        key = (tuple(parameter.shape), parameter.dtype, name.rpartition(".")[2])
        if key not in drawn:
            drawn[key] = _random(torch, name, parameter)
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent), last, torch.nn.Parameter(drawn[key].clone(), requires_grad=False)
        )
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(model.config))
    return model.eval()


def _random(torch: Any, name: str, like: Any) -> Any:
    if like.dtype == torch.int8:
        return torch.randint(-128, 128, like.shape, dtype=torch.int8)
    if name.endswith("weight_scale"):
        return torch.full(like.shape, 2e-4, dtype=like.dtype)
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    return (torch.rand(like.shape) * 0.04 - 0.02).to(like.dtype)


# ---- processes -------------------------------------------------------------------------------------------------


def work(name: str, file: str, shape: dict[str, Any], threads: int, streams: int) -> None:
    """Load what is named and answer requests from standard input, a line of JSON each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the peers print to standard output
    program, _, level = name.partition(":")
    if program in ("ours", "released"):
        made: Any = {"ours": Ours, "released": Released}[program](level, shape, threads)
    else:
        import shape_peers

        made = {"llama.cpp": shape_peers.LlamaCpp, "chatglm.cpp": shape_peers.ChatGLMCpp}[program](
            Path(file), threads, streams
        )
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(made, method)(*arguments)), file=out, flush=True)


class Worker:
    """A program with its model in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace, streams: int) -> None:
        self.name = name
        own = name.partition(":")[0] in ("ours", "released")
        python = sys.executable if own else options.peers
        file = "" if own else str(peer_file(name, options))
        given = ["--worker", name, "--file", file, "--layers", options.layers, "--threads", options.threads]
        command = [python, __file__, *map(str, given), "--streams", str(streams)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=options.log,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": str(options.threads)}
            | ENVIRONMENT.get(name.partition(":")[0], {}),
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; see the log named with --keep-log.")
        return json.loads(line)

    def ask(self, method: str, *arguments: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def peer_file(name: str, options: argparse.Namespace) -> Path:
    """The peer's model file of this shape, written if it is not there yet."""
    program, _, kind = name.partition(":")
    path = options.files / f"{program.replace('.', '-')}-{kind}-{options.layers}.bin"
    if not path.exists():
        code = (
            "import sys, json; sys.path.insert(0, sys.argv[1]); import shape_peers; from pathlib import Path\n"
            "path, shape, kind = Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]\n"
            "if sys.argv[5] == 'llama.cpp': shape_peers.write_gguf(path, shape, kind)\n"
            "else: shape_peers.write_ggml(path, shape, kind, Path(sys.argv[6]))\n"
        )
        from glm_core.settings import MINI

        part = path.with_suffix(".part")
        subprocess.run(
            [options.peers, "-c", code, str(Path(__file__).parent), str(part), json.dumps(shape_of(options)),
             kind, program, str(MINI / "tokenizer.model")],
            check=True, stdout=options.log, stderr=options.log,
        )  # fmt: skip
        part.rename(path)
    return path


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    return SHAPE | {"num_layers": options.layers}


def bandwidth(threads: int) -> float:
    """GB/s of reading 1 GiB with so many threads, the best of a few reads: the roofline of decoding."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 28)
    best = 0.0
    for _ in range(4):
        for read in (numbers.sum, numbers.amax):
            started = time.perf_counter()
            read()
            best = max(best, numbers.nbytes / 1e9 / (time.perf_counter() - started))
    return best


def weight_gb(level: str, shape: dict[str, Any]) -> float:
    """GB of weights read for one token: all linear layers and the head, not the embedding."""
    wide, inner = shape["hidden_size"], shape["ffn_hidden_size"]
    qkv = wide + 2 * shape["multi_query_group_num"] * shape["kv_channels"]
    body = shape["num_layers"] * wide * (qkv + wide + 3 * inner)
    head = shape["padded_vocab_size"] * wide
    of_body = {"bf16": 2, "bf16-plain": 2, "int8": 1, "int8-dynamic": 1, "int4": 0.5}[level]
    return float(body * of_body + head * (1 if level == "int8-dynamic" else 2)) / 1e9


# ---- duels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duel:
    """Ours against another program at some loads; `goals` are ratios of tokens per second."""

    group: str
    level: str
    peer: str
    goals: tuple[tuple[str, float | None], ...]
    most_layers: int = 28  # where two whole models would take more than 24 GiB


DUELS = (
    Duel("bf16", "bf16", "ours:bf16-plain", (("1 stream", 1.4),), 10),
    Duel("int8", "int8-dynamic", "llama.cpp:q8_0",
         (("prefill 512", None), ("1 stream", 1.05), ("8 streams", 2.5), ("32 streams", 3.5))),
    Duel("int8", "int8-dynamic", "llama.cpp:q4_0", (("prefill 512", 1.7), ("32 streams", 1.7))),
    Duel("int8", "int8-dynamic", "chatglm.cpp:q8_0", (("prefill 512", 7.0), ("1 stream", 1.05))),
    Duel("int4", "int4", "chatglm.cpp:q4_0", (("1 stream", 1.2),)),
    Duel("int4", "int4", "llama.cpp:q4_0", (("1 stream", 0.9),)),
    Duel("released", "int8-dynamic", "released:int8", (("1 stream", 10.0),)),
    Duel("released", "int4", "released:int4", (("1 stream", 10.0),)),
    Duel("exact", "int8", "llama.cpp:q8_0", (("prefill 512", None), ("1 stream", None), ("8 streams", None))),
)  # fmt: skip
GROUPS = ("bf16", "int8", "int4", "exact", "released", "labels")
LABELS = "int8-dynamic"
ROOFLINE = {"bf16": 0.8, "int4": 0.7}


def measured(worker: Worker, load: str, steps: int) -> float:
    """Tokens per second, by the median step."""
    if load.startswith("prefill"):
        tokens = int(load.split()[1])
        return tokens / float(worker.ask("prefill", tokens))
    streams = int(load.split()[0])
    seconds = worker.ask("decode", streams, PAST[streams], steps)
    return streams / statistics.median(seconds)


def verdict(ratio: float, goal: float | None) -> str:
    if goal is None:
        return ""
    return f"  goal {goal:g}: {'met' if ratio >= goal else 'NOT MET'}"


def duel(ours: Worker, one: Duel, options: argparse.Namespace) -> None:
    """Print the ratios of one pair."""
    streams = max([int(load.split()[0]) for load, _ in one.goals if "stream" in load] or [1])
    other = Worker(one.peer, options, streams)
    try:
        for load, goal in one.goals:
            ratios, speeds, shares = [], [], []
            for _ in range(options.rounds):
                before = bandwidth(options.threads)
                mine = measured(ours, load, options.steps)
                between = bandwidth(options.threads)
                theirs = measured(other, load, options.steps)
                ratios.append(mine / theirs)
                speeds.append((mine, theirs, between))
                shares.append(mine * weight_gb(one.level, shape_of(options)) / max(before, between))
            mine, theirs, probe = (statistics.median(values) for values in zip(*speeds, strict=True))
            ratio = statistics.median(ratios)
            cut = f"  ({options.layers} layers)" if options.layers < SHAPE["num_layers"] else ""
            print(
                f"{one.level:13} / {one.peer:17} {load:12} {mine:7.1f} / {theirs:7.1f} tokens/s  x {ratio:.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})  read {probe:.0f} GB/s{cut}{verdict(ratio, goal)}",
                flush=True,
            )
            if load == "1 stream":
                share = statistics.median(shares)
                needed = ROOFLINE.get(one.level)
                print(
                    f"{one.level:13} / read bandwidth    1 stream     x {share:.2f}{verdict(share, needed)}"
                )
    finally:
        other.close()


def labelling(ours: Worker, options: argparse.Namespace) -> None:
    """Print label scoring with the shared head against whole prompts row by row."""
    ratios = []
    for _ in range(options.rounds):
        seconds = ours.ask("labels", 200, 40, 2)
        ratios.append(seconds["naive"] / seconds["scored"])
    ratio = statistics.median(ratios)
    print(f"{LABELS} / row by row        200 + 40 + 2 x {ratio:.2f}{verdict(ratio, 5)}", flush=True)


def has(python: str, module: str) -> bool:
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="tokens decoded per stream and round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=GROUPS, action="append")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument(
        "--files", type=Path, help="where the peers' model files are kept; else they are deleted"
    )
    parser.add_argument("--keep-log", type=Path, help="a file for what the programs print")
    for hidden in ("--worker", "--file", "--streams"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.file, shape_of(options), options.threads, int(options.streams))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.files = options.files or Path(folder)
        options.files.mkdir(parents=True, exist_ok=True)
        options.log = options.keep_log.open("w") if options.keep_log else subprocess.DEVNULL
        there = {"ours"} | ({"released"} if shutil.which("cc") else set())
        there |= {
            name
            for name, needs in (("llama.cpp", ("llama_cpp", "gguf")), ("chatglm.cpp", ("chatglm_cpp",)))
            if all(has(options.peers, module) for module in needs)
        }
        print(
            f"ChatGLM2-6B shape, {options.layers} layers, {options.threads} threads; medians of {options.rounds} rounds; "
            f"beside: {', '.join(sorted(there - {'ours', 'released'})) or 'no other program installed'}"
        )
        wanted = options.only or GROUPS
        duels = [one for one in DUELS if one.group in wanted and one.peer.partition(":")[0] in there]
        levels = dict.fromkeys([one.level for one in duels] + [LABELS] * ("labels" in wanted))
        whole = options.layers
        for level in levels:
            its = [one for one in duels if one.level == level]
            options.layers = min([whole, *(one.most_layers for one in its)])
            ours = Worker(f"ours:{level}", options, 1)
            try:
                if level == LABELS and "labels" in wanted:
                    labelling(ours, options)
                for one in its:
                    duel(ours, one, options)
            finally:
                ours.close()


if __name__ == "__main__":
    main()
