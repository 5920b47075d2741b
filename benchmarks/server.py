"""64 streaming clients for a minute, beside a server of FastAPI, `model.generate` and a lock.

    python benchmarks/server.py

Prints requests and tokens per second of both, how the slowest request compares with the median, the slowest
/health meanwhile, and the memory of our server over the minute. All on loopback, with glm-mini. The processor's
time per answer says the same on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from glm_core.settings import MINI, REPOSITORY

QUESTIONS = (
    "Hello", "你好", "What is the capital of France?", "中国的首都是哪里", "Who are you?", "你是谁", "How do I label a spreadsheet?",
    "怎么上传文件", "Name three fruits", "写一句生日祝福", "What is overfitting?", "准确率是什么", "I am tired", "今天天气怎么样",
)  # fmt: skip


def naive(port: int, precision: str) -> None:
    """The server most tutorials end with: one request at a time through transformers' generate."""
    import torch
    import uvicorn
    from fastapi import FastAPI

    from glm_core import checkpoints
    from glm_core.tokenizers.base import Message

    loaded = checkpoints.load(MINI, precision, "cpu")
    tokenizer, lock = loaded.tokenizer, threading.Lock()
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer.chat_ids([Message("user", asked["messages"][-1]["content"])])
        with lock, torch.inference_mode():
            out = loaded.model.generate(
                torch.tensor([ids]), max_new_tokens=asked["max_tokens"], do_sample=False,
                eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id,
            )[0, len(ids) :].tolist()  # fmt: skip
        message = {"role": "assistant", "content": tokenizer.answer_text(out)}
        return {"choices": [{"message": message}], "usage": {"completion_tokens": len(out)}}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def running(command: list[str], port: int) -> Iterator[psutil.Process]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            asyncio.run(ready(port))
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def ready(port: int, seconds: float = 180) -> None:
    """Wait for a /health of 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if (await exchange(port, "GET", "/health"))[0] == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not come up")


async def exchange(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """One request on a connection of its own: (status, all that came)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
    try:
        await writer.drain()
        got = await reader.read(-1)
    finally:
        writer.close()
    return int(got.split(None, 2)[1]), got


@dataclass
class Found:
    """What the clients of one server saw."""

    seconds: list[float] = field(default_factory=list)  # of every finished request
    per_client: list[int] = field(default_factory=list)
    tokens: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    health: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    broken: int = 0  # streams without an end
    elapsed: float = 0.0
    processor: float = 0.0  # seconds of processor time the server took


async def load(
    port: int, process: psutil.Process, options: argparse.Namespace, seconds: float, stream: bool
) -> Found:
    """All clients at once, each with its next question as soon as it has its answer."""
    found = Found(per_client=[0] * options.clients)
    started = time.monotonic()
    end = started + seconds
    before = sum(process.cpu_times()[:2])

    async def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            question = QUESTIONS[turn % len(QUESTIONS)]
            turn += 5
            body = {
                "messages": [{"role": "user", "content": question}], "temperature": 0,
                "max_tokens": options.tokens,
            }  # fmt: skip
            if stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            begun = time.monotonic()
            status, got = await exchange(port, "POST", "/v1/chat/completions", body)
            took = time.monotonic() - begun
            found.statuses[status] = found.statuses.get(status, 0) + 1
            if status == 429:
                await asyncio.sleep(float(re.search(rb"(?i)retry-after: (\d+)", got)[1]))  # type: ignore[index]
                continue
            if status != 200 or (stream and b"data: [DONE]" not in got):
                found.broken += 1
                continue
            if time.monotonic() <= end:
                found.seconds.append(took)
                found.per_client[number] += 1
                found.tokens += int(re.findall(rb'"completion_tokens":\s*(\d+)', got)[-1])

    async def watch() -> None:
        while time.monotonic() < end:
            begun = time.monotonic()
            await exchange(port, "GET", "/health")
            found.health.append(time.monotonic() - begun)
            found.memory.append((time.monotonic() - started, process.memory_info().rss))
            await asyncio.sleep(0.25)
        found.processor = sum(process.cpu_times()[:2]) - before

    await asyncio.gather(watch(), *(client(number) for number in range(options.clients)))
    found.elapsed = seconds
    return found


def report(name: str, found: Found) -> tuple[float, float]:
    """Print what was found; (requests per second, processor seconds per request)."""
    rate = len(found.seconds) / found.elapsed
    median = statistics.median(found.seconds) if found.seconds else float("nan")
    slowest = max(found.seconds, default=float("nan"))
    print(
        f"{name}: {rate:.2f} requests/s, {found.tokens / found.elapsed:.0f} tokens/s; statuses {found.statuses}, "
        f"{found.broken} broken\n"
        f"  {1000 * found.processor / max(1, len(found.seconds)):.0f} ms of processor per request\n"
        f"  seconds per request: median {median:.2f}, slowest {slowest:.2f} ({slowest / median:.2f} times); "
        f"answers per client {min(found.per_client)} to {max(found.per_client)}\n"
        f"  /health: median {1000 * statistics.median(found.health):.0f} ms, slowest {1000 * max(found.health):.0f} ms "
        f"of {len(found.health)}"
    )
    return rate, found.processor / max(1, len(found.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--naive-seconds", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--concurrency", type=int, default=0, help="default: the server's own")
    parser.add_argument("--naive", action="store_true", help="run the other server and nothing else")
    options = parser.parse_args()
    if options.naive:
        naive(options.port, options.precision)
        return
    python, port = sys.executable, options.port
    command = [python, "-m", "glm_core", "serve", "--port", str(port), "--precision", options.precision]
    command += ["--concurrency", str(options.concurrency)] if options.concurrency else []
    with running(command, port) as process:
        asyncio.run(load(port, process, options, 5, True))  # buffers, prefix cache
        ours = asyncio.run(load(port, process, options, options.seconds, True))
    rate, cost = report("glm_core serve, streaming", ours)
    early = next(size for at, size in ours.memory if at >= min(10, options.seconds / 2))
    late = ours.memory[-1][1]
    print(
        f"  memory: {early / 2**20:.0f} MiB after 10 s, {late / 2**20:.0f} MiB at the end ({late / early - 1:+.1%})"
    )
    if options.naive_seconds:
        command = [python, __file__, "--naive", "--port", str(port + 1), "--precision", options.precision]
        with running(command, port + 1) as process:
            asyncio.run(load(port + 1, process, options, 3, False))
            theirs = asyncio.run(load(port + 1, process, options, options.naive_seconds, False))
        other, other_cost = report("FastAPI, generate and a lock", theirs)
        if other:
            print(
                f"{rate / other:.1f} times as many requests per second, "
                f"{other_cost / cost:.1f} times as many per second of processor"
            )


if __name__ == "__main__":
    main()
