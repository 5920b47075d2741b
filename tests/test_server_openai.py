"""The official openai client against our server: what it asks for is what it gets."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import pytest

from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.tokenizers.base import Message
from tests.test_server import (  # noqa: F401
    client,
    engine_of,
    first_folder,
    greedy,
    held,
    one_thread,
    served,
    tiny,
    until,
)

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "你好"}]


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{str(server.base_url).rstrip(chr(47))}/v1", api_key="none", max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def ai(client) -> Iterator[openai.OpenAI]:  # noqa: F811
    with client_of(client) as made:
        yield made


@pytest.fixture(scope="module")
def prompt(tiny) -> tuple[int, ...]:  # noqa: F811
    return tuple(tiny.tokenizer.chat_ids([Message("user", "你好")]))


def sampled(engine: Engine, ids, **settings) -> str:
    handle = engine.submit(Request(tuple(ids), GenerationSettings(**settings)))
    assert handle.wait(30)
    return handle.text


def test_the_model_is_listed(ai, tiny):  # noqa: F811
    (model,) = ai.models.list().data
    assert model.id == tiny.loaded.info.name
    assert ai.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-4")


def test_chat_is_the_greedy_answer_with_its_numbers(ai, tiny, prompt):  # noqa: F811
    found = ai.chat.completions.create(model="any", messages=HELLO, temperature=0, max_tokens=9)
    (choice,) = found.choices
    assert choice.message.content == greedy(tiny, prompt, 9)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 9)
    assert found.usage.total_tokens == len(prompt) + 9
    assert found.model == tiny.loaded.info.name


def test_a_conversation_with_system_and_parts_reaches_the_model(ai, tiny):  # noqa: F811
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1"},
    ]
    said = [Message("system", "Be kind."), Message("user", "你好"), Message("assistant", "Hello")]
    ids = tiny.tokenizer.chat_ids([*said, Message("user", "1")])
    found = ai.chat.completions.create(model="any", messages=messages, temperature=0, max_tokens=8)
    assert found.choices[0].message.content == greedy(tiny, ids, 8)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_models_without_roles_take_a_system_prompt_as_their_own_server_does(request, generation):
    folder = request.getfixturevalue("first_folder" if generation == "chatglm" else "tiny_checkpoint")
    messages = [{"role": "system", "content": "好。"}, *HELLO]
    with engine_of(folder, generation) as engine, served(engine) as server:
        ids = engine.tokenizer.chat_ids([Message("user", "好。你好")])
        found = client_of(server).chat.completions.create(
            model="any", messages=messages, temperature=0, max_tokens=6
        )
        assert found.choices[0].message.content == greedy(engine, ids, 6)
        assert found.usage.prompt_tokens == len(ids)


@pytest.fixture
def unhurried(tiny, monkeypatch):  # noqa: F811
    """The model takes its time, so that an answer is on its way for longer than a busy machine stands still."""
    step = tiny._step

    def slowly(priority):
        time.sleep(0.03)
        return step(priority)

    monkeypatch.setattr(tiny, "_step", slowly)


def test_a_stream_says_the_same_and_ends_with_the_usage(ai, tiny, prompt, unhurried):  # noqa: F811
    stream = ai.chat.completions.create(
        model="any", messages=HELLO, temperature=0, max_tokens=20, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == greedy(tiny, prompt, 20)
    assert sum(map(bool, texts)) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("streaming", [False, True])
def test_logprobs_are_those_of_the_scorer(ai, tiny, prompt, streaming):  # noqa: F811
    """Every token's log-probability, summed, is the score the engine gives the same tokens as one answer."""
    handle = tiny.submit(Request(prompt, GenerationSettings(max_new_tokens=10)))
    assert handle.wait(30)
    if streaming:
        stream = ai.chat.completions.create(
            model="any", messages=HELLO, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3, stream=True
        )  # fmt: skip
        content = [
            token
            for chunk in stream
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
    else:
        found = ai.chat.completions.create(
            model="any", messages=HELLO, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3
        )
        content = found.choices[0].logprobs.content
    told = [token.logprob for token in content]
    skipped = len(handle.ids) - len(told)  # a line break in front is no part of the answer
    steps = [
        tiny.score([[*prompt, *handle.ids[:place]]], [[token]])[0][0]
        for place, token in enumerate(handle.ids)
    ]
    assert told == pytest.approx(steps[skipped:], abs=1e-4)
    for token in content:
        likeliest = [one.logprob for one in token.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_sampled_tokens_have_the_probability_before_temperature(ai):
    found = ai.chat.completions.create(
        model="any", messages=HELLO, temperature=2, top_p=1, seed=3, max_tokens=6, logprobs=True, top_logprobs=20
    )  # fmt: skip
    for token in found.choices[0].logprobs.content:
        assert sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1 + 1e-5
        assert token.logprob <= token.top_logprobs[0].logprob + 1e-6


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(ai, tiny, prompt, streaming):  # noqa: F811
    whole = greedy(tiny, prompt, 30)
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    expected = whole[: whole.index(stop)]
    found = ai.chat.completions.create(
        model="any", messages=HELLO, temperature=0, max_tokens=30, stop=[stop, "never said"], stream=streaming
    )
    if streaming:
        chunks = list(found)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert found.choices[0].message.content == expected.rstrip()
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 30


def test_the_same_seed_gives_the_same_answers_and_another_does_not(ai):
    def ask(seed: int) -> list[str]:
        found = ai.chat.completions.create(
            model="any", messages=HELLO, temperature=1.5, top_p=1, seed=seed, n=2, max_tokens=12
        )
        assert [choice.index for choice in found.choices] == [0, 1]
        return [choice.message.content for choice in found.choices]

    assert ask(1) == ask(1)
    assert ask(1) != ask(5)
    assert len(set(ask(1))) == 2
    assert ask(-7) == ask(-7)


def test_several_answers_are_told_apart_in_a_stream(ai):
    found: dict[int, str] = {0: "", 1: "", 2: ""}
    reasons: dict[int, str] = {}
    for chunk in ai.chat.completions.create(
        model="any", messages=HELLO, temperature=1.5, seed=1, n=3, max_tokens=12, stream=True
    ):
        choice = chunk.choices[0]
        found[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    whole = ai.chat.completions.create(
        model="any", messages=HELLO, temperature=1.5, seed=1, n=3, max_tokens=12
    )
    assert [found[choice.index] for choice in whole.choices] == [c.message.content for c in whole.choices]
    assert set(reasons) == {0, 1, 2}


def test_a_closed_stream_ends_the_answer(ai, client, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", frozenset({-1}))
    before = set(tiny._handles)
    with ai.chat.completions.create(model="any", messages=HELLO, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    (handle,) = (one for key, one in tiny._handles.items() if key not in before)
    assert handle.wait(20)
    assert handle.state == "cancelled" and handle.n_tokens < handle.request.settings.max_new_tokens
    until(lambda: client.service.in_flight == 0)


def test_errors_are_the_clients_own(ai, client, tiny):  # noqa: F811
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="any", messages=HELLO, temperature=99)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="any", messages=[{"role": "user", "content": "好" * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        ai.chat.completions.create(model="any", messages=HELLO, top_logprobs=2)
    with no_room(client.service), held(tiny), pytest.raises(openai.RateLimitError) as busy:
        ai.chat.completions.create(model="any", messages=HELLO)
    assert int(busy.value.response.headers["retry-after"]) >= 1


def test_a_failure_in_a_stream_is_raised_by_the_client(ai, tiny, monkeypatch, unhurried):  # noqa: F811
    stream = ai.chat.completions.create(model="any", messages=HELLO, temperature=2, stream=True)
    next(stream)
    monkeypatch.setattr(tiny, "_step", lambda priority: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(openai.APIError, match="broken"):
        list(stream)


@contextlib.contextmanager
def no_room(service) -> Iterator[None]:
    """As if as many requests were being labelled as the server takes."""
    most = service.options.concurrency + service.options.queue
    service._labelling += most
    yield
    service._labelling -= most


# ---- plain completions


def test_a_completion_goes_on_with_the_text_as_it_stands(ai, tiny):  # noqa: F811
    tokenizer = tiny.tokenizer
    ids = (*tokenizer.prefix_ids, *tokenizer.encode("Once upon a"))
    handle = tiny.submit(Request(ids, GenerationSettings(max_new_tokens=16)))
    assert handle.wait(30)
    found = ai.completions.create(model="any", prompt="Once upon a", temperature=0)
    (choice,) = found.choices
    kept = [one for one in handle.ids if one not in tokenizer.stop_ids]
    both = tokenizer.decode([*tokenizer.encode("Once upon a"), *kept])
    assert "Once upon a" + choice.text == both
    assert found.usage.prompt_tokens == len(ids)
    assert choice.finish_reason in ("length", "stop")


def test_chatglm_6b_has_its_marks_behind_the_text(first_folder):  # noqa: F811
    with engine_of(first_folder) as engine, served(engine) as server:
        ids = (*engine.tokenizer.encode("你好"), *engine.tokenizer.prefix_ids)
        found = client_of(server).completions.create(model="any", prompt="你好", temperature=0, max_tokens=5)
        assert found.usage.prompt_tokens == len(ids)
        handle = engine.submit(Request(ids, GenerationSettings(max_new_tokens=5)))
        assert handle.wait(30)
        assert found.choices[0].text.strip() == engine.tokenizer.decode(handle.ids).strip()


def test_prompts_may_be_ids_and_several(ai, tiny):  # noqa: F811
    tokenizer = tiny.tokenizer
    ids = [*tokenizer.prefix_ids, *tokenizer.encode("a b")]
    one = ai.completions.create(model="any", prompt="a b", temperature=0, max_tokens=6).choices[0].text
    two = ai.completions.create(model="any", prompt="你好", temperature=0, max_tokens=6).choices[0].text
    assert ai.completions.create(model="any", prompt=ids, temperature=0, max_tokens=6).choices[0].text == one
    many = ai.completions.create(model="any", prompt=["a b", "你好"], temperature=0, max_tokens=6, n=2)
    assert [choice.text for choice in many.choices] == [one, one, two, two]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]


def test_completion_logprobs_have_places_in_the_text(ai):
    found = ai.completions.create(model="any", prompt="a b", temperature=0, max_tokens=8, logprobs=2)
    told = found.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    for token, value, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert likeliest[token] == pytest.approx(value, abs=1e-5)
    for token, place in zip(told.tokens, told.text_offset, strict=True):
        if "\ufffd" not in "".join(told.tokens):
            assert found.choices[0].text[place:].startswith(token)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_completion_stops_at_its_text(ai, streaming):
    whole = ai.completions.create(model="any", prompt="a b", temperature=0, max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    expected = whole[: whole.index(stop)]
    found = ai.completions.create(
        model="any", prompt="a b", temperature=0, max_tokens=24, stop=stop, stream=streaming
    )
    if streaming:
        chunks = list(found)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
