"""Answers with and without an adapter are those of the model with and without it, whatever else the engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core import adapters, effect, weights
from glm_core.checkpoints import LoadedModel, inspecting, loading
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.errors import GLMError
from tests.conftest import GOLDEN

SETTINGS = GenerationSettings(max_new_tokens=effect.TOKENS)


class Letters:
    """A stand-in tokenizer: an id per character, and the ids of an answer as its text."""

    generation = "chatglm"

    def __init__(self, ends: tuple[int, ...], stop: int) -> None:
        self.ends = ends
        self.stop_ids = frozenset({stop})

    def chat_ids(self, messages: Any) -> list[int]:
        return [*(5 + ord(letter) % 120 for letter in messages[-1].content), *self.ends]

    def answer_text(self, ids: Any, finished: bool = True) -> str:
        return " ".join(map(str, ids))


def tokenizer_of(family: str) -> Letters:
    """Prompts of ChatGLM-6B end with the golden config's [gMASK] and its begin of the answer."""
    return Letters((151, 154), 155) if family == "v1" else Letters((), 2)


def model_of(family: str) -> Any:
    folder = GOLDEN / family / "tiny"
    raw = inspecting.read_config(folder)
    model = loading.empty_model(inspecting.architecture_of(raw), raw, "chatglm2")
    loading.fill(model, weights.weight_files(folder)[0], torch.float32)
    return model.eval().requires_grad_(False)


def random_lora(model: Any) -> None:
    """A LoRA on every linear layer, strong enough to change answers; the same one each time."""
    torch.manual_seed(3)
    adapters.add_lora(
        model, rank=4, dropout=0.0, targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    model.eval().requires_grad_(False)


def loaded(family: str, kind: str) -> LoadedModel:
    """A golden base with a golden prefix ("noproj", "proj"), a LoRA ("lora", "zero") or nothing ("")."""
    model, prefix, folder = model_of(family), None, GOLDEN / family / "tiny"
    if kind in ("noproj", "proj"):
        folder = GOLDEN / family / f"ptuning_tiny_{kind}"
        prefix = adapters.load_prefix(folder, model.config).requires_grad_(False)
    elif kind == "lora" and family == "v1":
        folder = GOLDEN / "v1" / "lora_tiny"
        adapters.load_lora(model, folder)
    elif kind == "lora":
        random_lora(model)
    elif kind == "zero":
        adapters.add_lora(model)
        model.eval()
    base = inspecting.inspect(GOLDEN / family / "tiny")
    info = replace(inspecting.inspect(folder), architecture=base.architecture, context=256)
    return LoadedModel(model, tokenizer_of(family), info, "fp32", torch.device("cpu"), 0.0, prefix=prefix)  # type: ignore[arg-type]


@pytest.fixture
def running() -> Iterator[Callable[..., Engine]]:
    """running(family, kind): an engine, closed after the test."""
    engines: list[Engine] = []

    def run(family: str, kind: str, max_rows: int | None = None) -> Engine:
        engines.append(Engine(loaded(family, kind), max_rows))
        return engines[-1]

    yield run
    for engine in engines:
        engine.close()


def plain_greedy(logits: Callable[[torch.Tensor], torch.Tensor], tokenizer: Letters) -> tuple[str, ...]:
    """The probes answered by the definition: the whole sequence again for every token."""
    answers = []
    for text in adapters.PROBES:
        ids = tokenizer.chat_ids([type("Message", (), {"content": text})])
        new: list[int] = []
        while len(new) < effect.TOKENS and not (new and new[-1] in tokenizer.stop_ids):
            with torch.inference_mode():
                new.append(int(logits(torch.tensor([ids + new]))[0, -1].argmax()))
        answers.append(tokenizer.answer_text(new))
    return tuple(answers)


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["noproj", "proj", "lora"])
def test_both_sides_are_what_the_model_answers_alone(running, family, kind):
    engine = running(family, kind)
    report = effect.measure(engine)
    bare, tokenizer = model_of(family), tokenizer_of(family)
    assert report.prompts == adapters.PROBES
    assert report.without == plain_greedy(lambda ids: bare(input_ids=ids).logits, tokenizer)
    if engine.loaded.prefix is not None:
        model: Any = adapters.PrefixModel(bare, engine.loaded.prefix)
    else:
        model = loaded(family, kind).model
        adapters.merge_lora(model)
    assert report.with_ == plain_greedy(lambda ids: model(input_ids=ids).logits, tokenizer)
    differing = sum(a != b for a, b in zip(report.without, report.with_, strict=True))
    assert report.effect == adapters.Effect(differing, 8, "")
    assert differing > 0


def test_an_untrained_lora_changes_nothing_and_that_is_said(running):
    report = effect.measure(running("v2", "zero"))
    assert report.without == report.with_
    assert report.effect.differing == 0
    assert report.effect.warning == (
        "The adapter changed none of 8 test answers: it may be untrained, or for another base."
    )


@pytest.mark.parametrize("kind", ["noproj", "lora"])
def test_requests_that_run_meanwhile_keep_the_adapter(running, kind):
    engine = running("v2", kind)
    tokenizer = engine.tokenizer
    asked = [tuple(range(20 + n, 60 + n)) for n in range(6)]

    def answers() -> list[list[int]]:
        handles = [engine.submit(Request(ids, SETTINGS, ("chat", "batch")[n % 2])) for n, ids in enumerate(asked)]  # fmt: skip
        assert all(handle.wait(60) for handle in handles)
        return [handle.ids for handle in handles]

    alone = answers()
    found: list[list[list[int]]] = []

    def progress(
        done: int, total: int
    ) -> None:  # in the caller's thread, between two forwards of the measurement
        if done in (3, total - 5) and len(found) < 2:
            found.append(answers())

    kept = dict(engine.prefixes.entries)
    report = effect.measure(engine, progress)
    assert found == [alone, alone]
    assert answers() == alone
    assert engine.prefixes.entries.keys() == kept.keys()  # these requests' own, none of the measurement's
    assert report.without == plain_greedy(lambda ids: model_of("v2")(input_ids=ids).logits, tokenizer)


def test_a_request_in_the_middle_of_its_answer_keeps_the_adapter(running):
    engine = running("v2", "lora")
    ids = tuple(range(20, 60))
    long = GenerationSettings(max_new_tokens=150)
    engine.tokenizer.stop_ids = frozenset()
    before = engine.submit(Request(ids, long))
    assert before.wait(60)
    meanwhile = engine.submit(Request(ids, long))
    effect.measure(engine)
    assert meanwhile.wait(60)
    assert meanwhile.ids == before.ids


def test_progress_goes_from_the_first_token_to_all_of_them(running):
    seen: list[tuple[int, int]] = []
    effect.measure(running("v2", "noproj"), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * effect.TOKENS, 2 * effect.TOKENS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 1


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_fewer_rows_at_a_time_give_the_same_answers(running, family):
    together, few = running(family, "noproj"), running(family, "noproj", 3)
    assert effect.measure(few) == effect.measure(together)


def test_memory_that_runs_out_halves_the_rows(running, monkeypatch):
    engine = running("v2", "noproj")
    wanted = effect.measure(engine)
    forward, rows = Engine._forward, []

    def short_of_memory(self: Engine, cache: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, cache, ids, *rest)

    monkeypatch.setattr(Engine, "_forward", short_of_memory)
    assert effect.measure(engine) == wanted
    assert sorted(set(rows)) == [2, 4, 8]


def test_memory_for_not_even_one_row_is_a_sentence(running, monkeypatch):
    def nothing_left(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    engine = running("v2", "lora")
    monkeypatch.setattr(Engine, "_forward", nothing_left)
    with pytest.raises(GLMError, match="Memory ran out on a prompt of 37 tokens"):
        effect.measure(engine)


def test_the_adapter_is_on_again_after_a_failure(running, monkeypatch):
    engine = running("v2", "lora")
    prompt = Request(tuple(range(20, 60)), SETTINGS)
    before = engine.submit(prompt)
    before.wait(60)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            effect.measure(engine)
    after = engine.submit(replace(prompt, prompt_ids=(7, *prompt.prompt_ids[1:])))
    after.wait(60)
    again = engine.submit(prompt)
    again.wait(60)
    assert again.ids == before.ids


def test_a_model_without_an_adapter_has_nothing_to_switch_off(running):
    with pytest.raises(GLMError, match="tiny carries no adapter") as caught:
        effect.measure(running("v2", ""))
    assert "Load a P-tuning v2 or LoRA folder" in caught.value.todo


def test_an_unloaded_model_ends_the_measurement_with_a_reason(running):
    engine = running("v2", "noproj")

    def unload(done: int, total: int) -> None:
        if done == 5:
            engine.close()

    with pytest.raises(GLMError, match="The model was unloaded"):
        effect.measure(engine, unload)


def test_a_whole_checkpoint_with_a_prefix_is_measured_too(tiny_checkpoint: Path, tmp_path: Path):
    """Loaded from a folder, as an analyst does: weights, prefix and tokenizer in one place."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "whole"))
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    encoder = adapters.PrefixEncoder(adapters.BaseShape.of_file(config), 6)
    file = folder / "model.safetensors"
    save_file(load_file(file) | encoder.released_state(), file)
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 6, "prefix_projection": False}))
    model = loading.load(folder, "fp32", "cpu")
    assert model.info.adapter is not None and model.info.adapter.with_base
    engine = Engine(model)
    try:
        report = effect.measure(engine)
    finally:
        engine.close()
    assert report.effect.differing > 0
    bare = Engine(loading.load(tiny_checkpoint, "fp32", "cpu"))
    try:
        own = [bare.tokenizer.chat_ids([loading_message(text)]) for text in adapters.PROBES]
        handles = bare.submit_many([Request(tuple(ids), SETTINGS, "batch") for ids in own])
        assert all(handle.wait(60) for handle in handles)
        assert report.without == tuple(handle.text for handle in handles)
    finally:
        bare.close()


def loading_message(text: str) -> Any:
    from glm_core.tokenizers.base import Message

    return Message("user", text)
