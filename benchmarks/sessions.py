"""Ten browser sessions chatting at once, and a chat beside a 10,000-row job.

    python benchmarks/sessions.py

Prints how many answers equal the greedy answer of a single user on a quiet engine, the server's memory over the
rounds, and the time to the first token while the job runs. Everything goes through the pages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from playwright.async_api import Page, async_playwright

from glm_core import batch, chat, checkpoints, jobs
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.settings import MINI
from glm_core.tokenizers.chatglm2 import Message
from tests.browser.serving import CHROMIUM, FLAGS, Server, badge

GREEDY = GenerationSettings(max_new_tokens=64)
QUESTIONS = (
    "Hello", "你好", "What is the capital of France?", "中国的首都是哪里", "Who are you?", "你是谁", "How do I label a spreadsheet?",
    "怎么上传文件", "Name three fruits", "写一句生日祝福", "What is overfitting?", "准确率是什么", "I am tired", "今天天气怎么样",
)  # fmt: skip


IDLE = """() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'
    && document.querySelector('[data-testid=stChatInputTextArea]')?.disabled === false"""
SEEN = """() => ({
    state: document.querySelector('[data-testid=stApp]')?.dataset.testScriptState,
    typed: document.querySelector('[data-testid=stChatInputTextArea]')?.value,
    disabled: document.querySelector('[data-testid=stChatInputTextArea]')?.disabled,
    text: document.body.innerText.slice(-400)})"""
TAKEN = "() => document.querySelector('[data-testid=stChatInputTextArea]').value === ''"


async def until(page: Page, condition: str, seconds: float = 120) -> None:
    """Wait for a condition by asking every 0.1 s: a page in the background draws no frames to be told by."""
    deadline = time.monotonic() + seconds
    while not await page.evaluate(condition):
        if time.monotonic() > deadline:
            state = await page.evaluate(SEEN)
            raise AssertionError(f"not within {seconds} s: {condition}; the page says {state}")
        await asyncio.sleep(0.1)


async def ask(page: Page, text: str) -> None:
    """Type a question once the last answer is settled, and see it taken."""
    await until(page, IDLE)
    box = page.get_by_test_id("stChatInputTextArea")
    await box.fill(text)
    await box.press("Enter")
    await until(page, TAKEN)


async def answered(server: Server, expected: int) -> None:
    """Wait until so many answers are stored."""
    deadline = time.monotonic() + 120
    while True:
        with closing(sqlite3.connect(server.workspace / "workbench.db")) as database:
            (done,) = database.execute(
                "SELECT count(*) FROM turn WHERE role='assistant' AND state='done'"
            ).fetchone()
        if done >= expected:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{done} of {expected} answers")
        await asyncio.sleep(0.1)


async def chat_round(pages: list[Page], server: Server, number: int) -> None:
    texts = [QUESTIONS[(number * 3 + session * 5) % len(QUESTIONS)] for session in range(len(pages))]
    await asyncio.gather(*(ask(page, text) for page, text in zip(pages, texts, strict=True)))
    await answered(server, len(pages) * (number + 1))


def check(server: Server) -> tuple[int, int]:
    """(equal, all): stored answers against the greedy answer to the same history, one at a time."""
    engine = Engine(checkpoints.load(MINI, "fp32", "cpu"))
    known: dict[tuple[int, ...], str] = {}
    equal = total = 0
    with closing(sqlite3.connect(server.workspace / "workbench.db")) as database:
        for (conversation,) in database.execute("SELECT id FROM conversation").fetchall():
            turns = database.execute(
                "SELECT role, text FROM turn WHERE conversation_id=? ORDER BY n", (conversation,)
            ).fetchall()
            for i, (role, text) in enumerate(turns):
                if role != "assistant":
                    continue
                history = [Message(r, words) for r, words in turns[:i]]
                ids = chat.budget(
                    engine.tokenizer, "", history, engine.context, GREEDY.max_new_tokens
                ).prompt_ids
                if tuple(ids) not in known:
                    handle = engine.submit(Request(tuple(ids), GREEDY))
                    handle.wait()
                    engine.prefixes.entries.clear()
                    known[tuple(ids)] = handle.text
                total += 1
                equal += known[tuple(ids)] == text
    engine.close()
    print(f"{len(known)} different prompts")
    return equal, total


def add_job(workspace: Path, rows: int) -> None:
    store = jobs.JobStore(workspace / "workbench.db")
    task = batch.BatchTask(
        checkpoint=str(MINI), checkpoint_fingerprint=checkpoints.fingerprint(MINI), precision="fp32", device="cpu",
        template="根据属性写一段商品文案：类型#裙*编号#{number}", system="", settings=GREEDY, output_column="answer",
        input_name="ten thousand rows", input_path="", input_sha256="", columns=("number",),
    )  # fmt: skip
    job = store.create("batch", "ten thousand rows", task.to_json())
    store.add_rows(job.id, [(f"{i:05}",) for i in range(rows)])
    store.mark_ready(job.id)


async def run(options: argparse.Namespace, folder: Path) -> None:
    workspace = folder / "workspace"
    workspace.mkdir()
    (workspace / "preferences.json").write_text(
        json.dumps({"chat.settings": GREEDY.to_json(), "chat.view": "native"}), encoding="utf-8"
    )
    server = Server(workspace)
    server.start()
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        first = await browser.new_page()
        await first.goto(server.url)
        await badge(first, "ready").wait_for(timeout=120_000)
        await first.close()
        pages = [await (await browser.new_context()).new_page() for _ in range(options.sessions)]
        for page in pages:
            page.set_default_timeout(60_000)
        memory: list[int] = []
        for number in range(options.rounds):
            if number % options.turns == 0:
                await asyncio.gather(*(page.goto(f"{server.url}/chat") for page in pages))
            await chat_round(pages, server, number)
            await asyncio.sleep(0.3)
            memory.append(process.memory_info().rss)
            print(f"round {number + 1}: {memory[-1] / 2**20:.0f} MiB", flush=True)
        for page in pages:
            await page.close()
        equal, total = check(server)
        print(
            f"{options.sessions} sessions: {equal} of {total} answers equal the single-user greedy answer (fp32)"
        )
        tenth = memory[min(9, len(memory) - 1)]
        print(f"server memory after round {min(10, len(memory))}: {tenth / 2**20:.0f} MiB, after the last: {memory[-1] / 2**20:.0f} MiB "
              f"({(memory[-1] / tenth - 1):+.1%})")  # fmt: skip

        add_job(workspace, 10_000)
        page = await browser.new_page()
        page.set_default_timeout(60_000)
        await asyncio.sleep(3)
        await page.goto(f"{server.url}/chat")
        far: list[int] = []  # rows of the job done after each answer
        for number in range(8):
            await ask(page, QUESTIONS[number])
            await answered(server, options.sessions * options.rounds + number + 1)
            with closing(sqlite3.connect(workspace / "workbench.db")) as database:
                far.append(database.execute("SELECT done FROM job").fetchone()[0])
        with closing(sqlite3.connect(workspace / "workbench.db")) as database:
            waits = [
                t
                for (t,) in database.execute(
                    "SELECT ttft FROM turn WHERE role='assistant' ORDER BY created DESC LIMIT 8"
                )
                if t
            ]
        print(f"first token beside the job (rows done at each answer: {', '.join(map(str, far))}): median {statistics.median(waits):.2f} s, "
              f"slowest {max(waits):.2f} s of {len(waits)}")  # fmt: skip
        await browser.close()
    server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5, help="rounds per conversation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        asyncio.run(run(options, Path(folder)))


if __name__ == "__main__":
    main()
