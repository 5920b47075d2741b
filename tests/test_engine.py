"""The scheduler: equal answers in any company, priorities, cancel, limits, and what happens when memory runs out."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from glm_core import engine as engine_module
from glm_core.engine import EngineBusy, EngineHost, GenerationSettings, Request, choose, warp
from glm_core.errors import GLMError
from glm_core.settings import REPOSITORY
from glm_core.tokenizers.chatglm2 import Message
from tests.conftest import GOLDEN

TEXTS = [
    "你好",
    "hello there, how are you today my friend?",
    "1",
    "请写一首关于春天的诗，要押韵，四句就好。" * 3,
    "a b c",
]


def prompt(engine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.chat_ids([Message("user", text)]))


def alone(engine, request: Request) -> list[int]:
    """The plain definition: no cache, no padding, the whole sequence again for every token."""
    ids = list(request.prompt_ids)
    with torch.inference_mode():
        for _ in range(request.settings.max_new_tokens):
            ids.append(
                int(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            )
            if ids[-1] in engine.tokenizer.stop_ids:
                break
    return ids[len(request.prompt_ids) :]


@pytest.mark.parametrize("priority", ["chat", "batch"])
def test_rows_together_equal_rows_alone(engine, priority):
    """Ragged lengths, ragged ends, rows that join later: the tokens are those of each row alone (fp32)."""
    generator = random.Random(1)
    requests = [
        Request(
            prompt(engine, text * generator.randint(1, 3)),
            GenerationSettings(max_new_tokens=generator.randint(1, 25)),
            priority,
        )
        for text in TEXTS * 6
    ]
    handles = engine.submit_many(requests[:20])
    time.sleep(0.02)
    handles += engine.submit_many(requests[20:])
    for handle in handles:
        assert handle.wait(60)
    assert [handle.ids for handle in handles] == [alone(engine, request) for request in requests]


def test_a_shared_prefix_changes_nothing(engine):
    head = "评论分类，请只回答一个词：" * 5
    prompts = [prompt(engine, head + text) for text in TEXTS]
    shared = engine_module._common(prompts[0], prompts[1])
    assert shared > 20
    settings = GenerationSettings(max_new_tokens=12)
    with_prefix = engine.submit_many([Request(p, settings, "batch", shared) for p in prompts])
    [handle.wait(60) for handle in with_prefix]
    assert any(len(ids) == shared for ids in engine.prefixes.entries)
    assert [h.ids for h in with_prefix] == [alone(engine, Request(p, settings)) for p in prompts]


def test_the_next_turn_reuses_the_last_one_and_answers_the_same(engine):
    settings = GenerationSettings(max_new_tokens=10)
    first = engine.submit(Request(prompt(engine, "你好"), settings))
    first.wait(60)
    longer = (*first.request.prompt_ids, *first.ids, *prompt(engine, "再见")[2:])
    assert engine.prefixes.longest(longer)[0] >= len(first.request.prompt_ids)
    second = engine.submit(Request(longer, settings))
    second.wait(60)
    assert second.ids == alone(engine, second.request)


def test_chat_starts_while_a_batch_is_running(engine):
    settings = GenerationSettings(max_new_tokens=60)
    engine.submit_many([Request(prompt(engine, f"{i}"), settings, "batch") for i in range(600)])
    started = time.monotonic()
    chat = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=3)))
    assert chat.wait(30)
    waited = time.monotonic() - started
    status = engine.status()
    assert status.queued_batch + status.running_batch > 100, (
        f"the batch was over before the chat ({waited:.2f} s)"
    )


def test_cancel_keeps_what_was_said_and_frees_the_row(engine):
    handle = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=1500)))
    while handle.n_tokens < 3 and not handle.done:
        time.sleep(0.005)
    handle.cancel()
    assert handle.wait(5)
    assert handle.done and handle.n_tokens >= 3
    after = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=2)))
    assert after.wait(10) and after.state == "done"
    assert engine.status().running_chat == 0


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_the_cache_of_an_ended_row_is_freed(engine, end, monkeypatch):
    handle = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=40), "batch"))
    while engine._rows["batch"].cache is None and not handle.done:
        time.sleep(0.001)
    cache = engine._rows["batch"].cache
    reference = weakref.ref(cache) if cache is not None else lambda: None
    del cache
    if end == "cancelled":
        handle.cancel()
    elif end == "failed":
        monkeypatch.setattr(engine, "_step", lambda priority: (_ for _ in ()).throw(ValueError("broken")))
    handle.wait(10)
    time.sleep(0.1)
    gc.collect()
    assert reference() is None
    assert engine._rows["batch"].cache is None


def test_an_exception_reaches_the_caller_as_a_sentence(engine, monkeypatch):
    monkeypatch.setattr(engine, "_forward", lambda *a: (_ for _ in ()).throw(ValueError("wrong kernel")))
    handle = engine.submit(Request(prompt(engine, "你好")))
    assert handle.wait(5)
    assert handle.state == "failed" and "wrong kernel" in str(handle.error)
    monkeypatch.undo()
    assert engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=2))).wait(10)


def test_out_of_memory_halves_the_batch_and_loses_no_row(engine, monkeypatch):
    forward = engine._forward_all

    def limited(cache, ids, *others):
        if ids.shape[0] > 6:
            raise torch.OutOfMemoryError("out of memory")
        return forward(cache, ids, *others)

    monkeypatch.setattr(engine, "_forward_all", limited)
    requests = [
        Request(prompt(engine, text), GenerationSettings(max_new_tokens=8), "batch") for text in TEXTS * 6
    ]
    handles = engine.submit_many(requests)
    assert all(handle.wait(60) for handle in handles)
    monkeypatch.undo()
    assert [handle.state for handle in handles] == ["done"] * len(handles)
    assert [handle.ids for handle in handles] == [alone(engine, request) for request in requests]
    assert engine.max_rows <= 6 and "Memory ran out" in engine.notes[-1]


def test_a_row_too_large_for_memory_fails_with_advice(engine, monkeypatch):
    monkeypatch.setattr(
        engine, "_forward_all", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    )
    handle = engine.submit(Request(prompt(engine, "你好"), priority="batch"))
    assert handle.wait(10)
    assert handle.state == "failed" and "Memory ran out" in str(handle.error) and handle.error.todo


def test_the_chat_queue_is_bounded_and_places_are_shown(engine, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(engine, "_round", lambda: gate.wait(20))
    handles = [engine.submit(Request(prompt(engine, "hi"), GenerationSettings(max_new_tokens=1)))]
    time.sleep(0.05)
    handles += [
        engine.submit(Request(prompt(engine, "hi"), GenerationSettings(max_new_tokens=1)))
        for _ in range(engine_module.CHAT_QUEUE - 1)
    ]
    assert [handle.place for handle in handles[:3]] == [1, 2, 3]
    with pytest.raises(EngineBusy, match="64 requests are waiting"):
        engine.submit(Request(prompt(engine, "hi")))
    monkeypatch.undo()
    gate.set()
    assert all(handle.wait(30) for handle in handles)
    assert handles[0].place == 0


def test_a_seed_gives_the_same_sample_in_any_company(engine):
    settings = GenerationSettings(max_new_tokens=15, temperature=0.9, top_p=0.9, top_k=50, seed=5)
    single = engine.submit(Request(prompt(engine, "你好"), settings))
    single.wait(60)
    crowd = engine.submit_many(
        [Request(prompt(engine, text), settings, "batch") for text in ["你好", *TEXTS]]
    )
    [handle.wait(60) for handle in crowd]
    assert crowd[0].ids == single.ids
    other = engine.submit(
        Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=15, temperature=0.9, seed=6))
    )
    other.wait(60)
    assert other.ids != single.ids


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(engine):
    free = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=30)))
    free.wait(60)
    stop = free.text[len(free.text) // 2 :][:2]
    handle = engine.submit(
        Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=30, stop=(stop,)))
    )
    handle.wait(60)
    assert handle.finish_reason == "stop" and handle.text == free.text.split(stop, 1)[0]


def test_max_new_tokens_is_kept(engine):
    handle = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=4)))
    handle.wait(60)
    assert handle.n_tokens <= 4 and handle.finish_reason in ("length", "stop")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine):
    with pytest.raises(GLMError, match="3000 tokens, the model takes 2048"):
        engine.submit(Request((5,) * 3000))


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}],
)
def test_settings_outside_their_range_are_named(engine, settings):
    with pytest.raises(GLMError, match=next(iter(settings))):
        engine.submit(Request(prompt(engine, "hi"), GenerationSettings(**settings)))


def test_warping_equals_transformers():
    """Temperature, top-k and top-p as transformers 4.30 applied them, on recorded logits."""
    import json

    arrays = np.load(GOLDEN / "generation" / "warpers.npz")
    for case, about in json.loads((GOLDEN / "generation" / "warpers.json").read_text()).items():
        settings = GenerationSettings(
            temperature=about["args"]["temperature"],
            top_p=about["args"]["top_p"],
            top_k=about["top_k_effective"],
        )
        for logits, expected in zip(torch.tensor(arrays["logits"]), arrays[f"{case}/probs"], strict=True):
            np.testing.assert_allclose(
                warp(logits.float(), settings).softmax(-1).numpy(), expected, atol=1e-6
            )


def test_the_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = torch.randn(50, generator=torch.Generator().manual_seed(1)), [3, 7, 7, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None].clone())[0].argmax()
    assert choose(logits, GenerationSettings(repetition_penalty=1.7), seen, None) == int(expected)


def test_scores_are_the_summed_log_probabilities(engine):
    prompts = [prompt(engine, text) for text in TEXTS]
    labels = [engine.tokenizer.answer_ids(label) for label in ("垃圾", "正常", "spam comment")]
    shared = engine_module._common(prompts[0], prompts[1])
    with torch.inference_mode():
        for prefix in (0, shared):
            scored = engine.score(prompts, labels, prefix)
            for ids, row in zip(prompts, scored, strict=True):
                for label, score in zip(labels, row, strict=True):
                    logits = engine.model(input_ids=torch.tensor([[*ids, *label]]), use_cache=False).logits[0]
                    steps = logits.log_softmax(-1)[len(ids) - 1 : -1]
                    expected = float(steps[torch.arange(len(label)), torch.tensor(label)].sum())
                    assert score == pytest.approx(expected, abs=1e-3)


def test_the_self_test_passes_in_fp32_and_fails_when_rows_differ(engine, monkeypatch):
    assert engine.self_test().passed and engine.status().exact is True
    monkeypatch.setattr(engine, "_alone", lambda request: [1])
    assert not engine.self_test().passed and "0 of 8" in engine.status().exact_text


def test_callbacks_run_once_also_after_the_end(engine):
    seen: list[str] = []
    handle = engine.submit(Request(prompt(engine, "hi"), GenerationSettings(max_new_tokens=2)))
    handle.add_done_callback(lambda h: seen.append("first"))
    handle.wait(30)
    handle.add_done_callback(lambda h: seen.append("late"))
    deadline = time.monotonic() + 5
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == ["first", "late"]


def test_memory_of_fifty_rounds_stays_in_its_bounds(engine):
    """The cache of a growing conversation is the only thing that grows, and it is bounded."""
    engine.prefixes.max_bytes = 1 << 20
    ids: tuple[int, ...] = prompt(engine, "你好")
    for _ in range(50):
        handle = engine.submit(Request(ids[-1500:], GenerationSettings(max_new_tokens=10)))
        handle.wait(30)
        ids = (*ids, *handle.ids, *prompt(engine, "继续")[2:])
    assert engine.prefixes.nbytes <= 1 << 20
    assert engine.status().cache_bytes == engine.prefixes.nbytes


def test_a_host_loads_once_for_many_callers_and_unloads_before_the_next(tiny_checkpoint, tmp_path):
    import shutil

    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    host, engines = EngineHost(), []
    threads = [threading.Thread(target=lambda: engines.append(host.use(tiny_checkpoint))) for _ in range(5)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len({id(engine) for engine in engines}) == 1
    first = weakref.ref(engines[0].model.model.embed_tokens.weight)
    engines.clear()
    host.use(other)
    gc.collect()
    assert first() is None, "the first model is still in memory"
    host.unload()
    assert host.current is None and host.state == "empty"


def test_a_held_model_is_not_replaced(tiny_checkpoint, tmp_path):
    import shutil

    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    host = EngineHost()
    host.use(tiny_checkpoint)
    with host.hold("job “comments.csv”"):
        assert host.use(tiny_checkpoint) is host.current
        with pytest.raises(GLMError, match="in use by job “comments.csv”"):
            host.use(other)
        with pytest.raises(GLMError, match="in use"):
            host.unload()
    host.unload()


def test_requests_of_an_unloaded_model_end(tiny_checkpoint):
    host = EngineHost()
    engine = host.use(tiny_checkpoint)
    handle = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=1900)))
    host.unload()
    assert handle.wait(5) and handle.state == "cancelled"
    with pytest.raises(GLMError, match="unloaded"):
        engine.submit(Request((5, 6)))


def test_a_long_prompt_is_given_up_between_its_pieces(engine, monkeypatch):
    forward, seen = engine._forward, []

    def slow(cache, ids, *others):
        seen.append(ids.shape[1])
        time.sleep(0.05)
        return forward(cache, ids, *others)

    monkeypatch.setattr(engine, "_forward", slow)
    engine._prefill_speed = 200.0  # pieces of 50 tokens
    handle = engine.submit(Request(tuple(range(5, 1505))))
    while not seen and not handle.done:
        time.sleep(0.005)
    handle.cancel()
    assert handle.wait(5) and handle.state == "cancelled"
    assert len(seen) < 15, "the whole prompt was computed"


def test_requests_that_arrive_while_others_are_cancelled_are_all_served(engine):
    """Callers append to the queue while the scheduler looks through it."""
    settings = GenerationSettings(max_new_tokens=2)
    ids, kept = prompt(engine, "hi"), []

    def feed() -> None:
        for i in range(400):
            handle = engine.submit_many([Request(ids, settings, "batch")])[0]
            if i % 3:
                handle.cancel()
            else:
                kept.append(handle)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(kept) == 4 * 134 and all(handle.wait(60) for handle in kept)
    assert {handle.state for handle in kept} == {"done"}


def test_a_mistake_in_the_scheduler_does_not_end_it(engine, monkeypatch):
    monkeypatch.setattr(engine, "_drop_cancelled", lambda: (_ for _ in ()).throw(RuntimeError("mutated")))
    first = engine.submit(Request(prompt(engine, "hi")))
    time.sleep(0.1)
    monkeypatch.undo()
    assert first.wait(10)
    assert engine.submit(Request(prompt(engine, "hi"), GenerationSettings(max_new_tokens=2))).wait(10)


def test_rows_of_different_length_behind_a_shared_head_leave_a_right_cache(engine):
    """Padding lies between head and text; what is remembered of such rows must not contain it."""
    head = "评论分类，请只回答一个词：" * 3
    prompts = [prompt(engine, head + text) for text in TEXTS]
    shared = engine_module._common(prompts[0], prompts[1])
    settings = GenerationSettings(max_new_tokens=6)
    gate = threading.Event()
    real, engine._round = engine._round, lambda: gate.wait(10)  # so that the five start as one group
    handles = [engine.submit(Request(p, settings, "chat", shared)) for p in prompts]
    engine._round = real
    gate.set()
    [handle.wait(60) for handle in handles]
    again = engine.submit_many([Request(p, settings, "batch", shared) for p in prompts])
    [handle.wait(60) for handle in again]
    expected = [alone(engine, Request(p, settings)) for p in prompts]
    assert [h.ids for h in handles] == expected
    assert [h.ids for h in again] == expected


def test_chats_that_meet_a_full_memory_are_answered_one_after_the_other(engine, monkeypatch):
    forward = engine._forward_all

    def limited(cache, ids, *others):
        if ids.shape[0] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(cache, ids, *others)

    monkeypatch.setattr(engine, "_forward_all", limited)
    before = engine.max_rows
    requests = [Request(prompt(engine, text), GenerationSettings(max_new_tokens=5)) for text in TEXTS]
    handles = [engine.submit(request) for request in requests]
    assert all(handle.wait(60) for handle in handles)
    monkeypatch.undo()
    assert [handle.ids for handle in handles] == [alone(engine, request) for request in requests]
    assert engine.max_rows == before and all(len(handle.notes) <= 1 for handle in handles)


def test_a_row_that_had_ended_when_memory_ran_out_is_not_continued(engine, monkeypatch):
    monkeypatch.setattr(
        engine, "_settle", lambda priority: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    )
    handle = engine.submit(Request(prompt(engine, "你好"), GenerationSettings(max_new_tokens=1), "batch"))
    assert handle.wait(20)
    assert handle.state == "done" and handle.n_tokens == 1


def test_a_row_that_cannot_be_sampled_does_not_take_its_neighbours_along(engine, monkeypatch):
    real = engine_module.choose

    def broken(logits, settings, seen, generator):
        if settings.seed == 13:
            raise RuntimeError("probability tensor contains nan")
        return real(logits, settings, seen, generator)

    monkeypatch.setattr(engine_module, "choose", broken)
    bad = GenerationSettings(max_new_tokens=5, temperature=0.8, seed=13)
    good = GenerationSettings(max_new_tokens=5, temperature=0.8, seed=1)
    handles = engine.submit_many([Request(prompt(engine, "你好"), s, "batch") for s in (good, bad, good)])
    assert all(handle.wait(30) for handle in handles)
    assert [handle.state for handle in handles] == ["done", "failed", "done"]


@pytest.mark.parametrize("settings", [{"seed": 1 << 63}, {"seed": -1}, {"temperature": 1e-30, "top_p": 0.5}])
def test_values_that_no_sampler_takes_are_refused_before_they_run(engine, settings):
    with pytest.raises(GLMError):
        engine.submit(Request(prompt(engine, "hi"), GenerationSettings(**settings)))


def test_a_load_that_fails_keeps_no_weights(tiny_checkpoint, monkeypatch):
    from glm_core import checkpoints

    seen = []

    def refuse(model, tokenizer, folder):
        seen.append(weakref.ref(model.lm_head.weight))
        raise GLMError("not finite")

    monkeypatch.setattr(checkpoints.loading, "_self_check", refuse)
    host = EngineHost()
    with pytest.raises(GLMError, match="not finite"):
        host.use(tiny_checkpoint)
    gc.collect()
    assert host.state == "failed" and host.error and seen[0]() is None


# ---- log-probabilities


@pytest.mark.parametrize("sampled", [False, True])
def test_noted_scores_are_those_of_the_tokens_in_any_company(engine, sampled):
    """Each is the log-softmax of the plain forward at its place, before temperature and penalty."""
    settings = GenerationSettings(max_new_tokens=9)
    if sampled:
        settings = GenerationSettings(max_new_tokens=9, temperature=2.0, repetition_penalty=1.3, seed=5)
    requests = [
        Request(prompt(engine, text), settings, logprobs=number or None) for number, text in enumerate(TEXTS)
    ]
    handles = [engine.submit(request) for request in requests]
    assert all(handle.wait(60) for handle in handles)
    assert handles[0].scores == []  # not asked for
    for number, handle in enumerate(handles[1:], start=1):
        assert len(handle.scores) == len(handle.ids)
        ids = [*handle.request.prompt_ids, *handle.ids]
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        steps = logits.log_softmax(-1)[handle.n_prompt - 1 : -1]
        for step, token, score in zip(steps, handle.ids, handle.scores, strict=True):
            assert score.logprob == pytest.approx(float(step[token]), abs=1e-4)
            values, order = step.topk(number)
            assert [pair[0] for pair in score.likeliest] == order.tolist()
            assert [pair[1] for pair in score.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_scores_survive_a_new_start_after_memory_ran_out(engine, monkeypatch):
    forward = engine._forward_all

    def limited(cache, ids, *others):
        if ids.shape[0] > 1 and cache.length > 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(cache, ids, *others)

    settings = GenerationSettings(max_new_tokens=6)
    monkeypatch.setattr(engine, "_forward_all", limited)
    handles = [
        engine.submit(Request(prompt(engine, text), settings, logprobs=1)) for text in ("你好", "1", "a")
    ]
    assert all(handle.wait(60) for handle in handles)
    for handle in handles:
        assert handle.state == "done"
        assert len(handle.scores) == len(handle.ids)
        assert [score.likeliest[0][0] for score in handle.scores] == handle.ids  # greedy
    assert any(engine_module.AGAIN in handle.notes for handle in handles)


def test_more_scores_than_the_limit_are_refused(engine):
    for wrong in (-1, engine_module.MOST_LIKELIEST + 1):
        with pytest.raises(GLMError, match=f"logprobs is {wrong}"):
            engine.submit(Request(prompt(engine, "你好"), logprobs=wrong))


def test_threads_that_import_different_models_at_once_all_get_them():
    """transformers fills its namespace lazily; a page's thread was told that it has no GlmConfig."""
    code = (
        "import importlib, threading, torch\n"
        "failed = []\n"
        "def load(name):\n"
        "    try: importlib.import_module('glm_core.models.' + name)\n"
        "    except ImportError as error: failed.append(error)\n"
        "threads = [threading.Thread(target=load, args=(n,)) for n in ('chatglm', 'chatglm2', 'lean')]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "assert not failed, failed\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
