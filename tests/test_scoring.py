"""Scores of labels are those of a plain forward over prompt and label, whatever is cached, padded or shared."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from glm_core import adapters, checkpoints, scoring, weights
from glm_core import engine as engine_module
from glm_core.checkpoints import LoadedModel, inspecting, loading
from glm_core.engine import Engine, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.scoring import Scorer
from tests.conftest import GOLDEN

# Sums of up to 12 log-probabilities; one of them differs by up to 2.5e-5 between two right ways of computing.
ATOL = 1e-4
PREFIX = 8
FOLDERS = {
    "chatglm": GOLDEN / "v1" / "tiny",
    "chatglm2": GOLDEN / "v2" / "tiny",
    "chatglm3": GOLDEN / "v3" / "tiny",
    "glm4": GOLDEN / "v3" / "tiny",  # its sizes only, see `load`
}
KINDS = ("", "prefix", "lora")
STOP = 2
ONE, TEN = [31], [31, 30]
# Labels that share tokens, are the beginning of one another, and have 1 to 12 tokens; each ends with the stop token.
LABELS = [
    [*ONE, STOP],
    [*TEN, STOP],
    [40, STOP],
    [31, 30, 33, STOP],
    [50 + i % 7 for i in range(5)] + [STOP],
    [50 + i % 7 for i in range(11)] + [STOP],
]  # fmt: skip


class Letters:
    """The least that the engine asks of a tokenizer."""

    generation, pad_id, stop_ids = "chatglm", 0, frozenset({STOP})

    def answer_text(self, ids: Any, finished: bool = True) -> str:
        return " ".join(map(str, ids))


def load(generation: str, kind: str = "", bits: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A golden model with a fresh adapter that changes its answers."""
    folder = FOLDERS[generation]
    info, raw = inspecting.inspect(folder), inspecting.read_config(folder)
    torch.manual_seed(21)
    if generation == "glm4":  # the positions of 128k tokens, and random weights as large as trained ones
        from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM

        raw |= {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}
        model = ChatGLM2ForCausalLM(ChatGLM2Config.from_released(raw, "glm4")).to(dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(20 if "lm_head" in name else 5)
        assert not bits
    else:
        model = loading.empty_model(info.architecture, raw, info.generation)
        loading.fill(model, weights.weight_files(folder)[0], dtype, bits)
    prefix = None
    if kind == "prefix":
        prefix = adapters.PrefixEncoder(adapters.BaseShape.of(model.config), PREFIX, False).eval()
    if kind == "lora":
        adapters.add_lora(model, targets=["query_key_value", "dense", "dense_h_to_4h"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.eval().requires_grad_(False)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    return LoadedModel(model, Letters(), info, precision, torch.device("cpu"), 0.0, prefix=prefix)  # type: ignore[arg-type]


@pytest.fixture
def running(one_thread: None) -> Any:
    """running(loaded, rows): an engine, closed after the test."""
    engines: list[Engine] = []

    def run(loaded: LoadedModel, rows: int | None = None) -> Engine:
        engines.append(Engine(loaded, rows))
        return engines[-1]

    yield run
    for engine in engines:
        engine.close()


def prompts_of(generation: str, count: int, seed: int = 1) -> tuple[list[int], list[list[int]]]:
    """A head of 20 ids, and prompts of 1 to 60 ids behind it; each tenth begins with something else."""
    draw = random.Random(seed)
    head = [(60 + 3 * i) % 140 + 5 for i in range(20)]
    end = [151, 154] if generation == "chatglm" else []
    rows = []
    for number in range(count):
        tail = [draw.randint(5, 149) for _ in range(draw.choice([1, 2, 3, 8, 20, 60]))]
        rows.append([*(head if number % 10 else head[:7]), *tail, *end])
    return head, rows


def plain(loaded: LoadedModel, prompt: list[int], label: list[int]) -> float:
    """The score by its definition: the whole sequence in one forward, nothing cached, nothing padded."""
    model = loaded.model
    if loaded.prefix is not None:
        model = adapters.PrefixModel(loaded.model, loaded.prefix).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *label]])).logits[0].float().log_softmax(-1)
    steps = logits[len(prompt) - 1 : -1]
    return float(steps[torch.arange(len(label)), torch.tensor(label)].double().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", FOLDERS)
def test_scores_of_200_rows_equal_an_uncached_forward(running, generation, kind):
    loaded = load(generation, kind)
    head, prompts = prompts_of(generation, 200)
    together = Scorer(running(loaded, 32), LABELS, head).score(prompts)
    draw = random.Random(3)
    for row, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        number = draw.randrange(len(LABELS))
        assert found.values[number] == pytest.approx(plain(loaded, prompt, LABELS[number]), abs=ATOL), row
    for row in (0, 57, 199):
        for label, value in zip(LABELS, together[row].values, strict=True):
            assert value == pytest.approx(plain(loaded, prompts[row], label), abs=ATOL)
    # One row at a time, without the shared head.
    alone = Scorer(running(loaded, 1), LABELS).score(prompts[:40])
    for one, other in zip(alone, together, strict=False):
        assert one.values == pytest.approx(other.values, abs=ATOL)
        assert one.outside == pytest.approx(other.outside, abs=1e-5)
    if kind:
        bare = Scorer(running(load(generation), 32), LABELS, head).score(prompts[:5])
        assert all(abs(a.values[0] - b.values[0]) > 10 * ATOL for a, b in zip(bare, together, strict=False))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3"])
def test_scores_on_a_quantized_base_equal_an_uncached_forward(running, generation, bits):
    loaded = load(generation, "prefix", bits)
    head, prompts = prompts_of(generation, 12)
    found = Scorer(running(loaded), LABELS, head).score(prompts)
    for prompt, row in zip(prompts, found, strict=True):
        assert row.values == pytest.approx([plain(loaded, prompt, label) for label in LABELS], abs=ATOL)


@pytest.mark.parametrize("generation", FOLDERS)
def test_bf16_scores_are_as_near_to_exact_ones_as_those_of_an_uncached_bf16_forward(running, generation):
    loaded, exact = load(generation, "", dtype=torch.bfloat16), load(generation)
    exact.model.load_state_dict({name: t.float() for name, t in loaded.model.state_dict().items()})
    head, prompts = prompts_of(generation, 20)
    pairs = [(prompt, label) for prompt in prompts for label in LABELS]
    right = np.array([plain(exact, *pair) for pair in pairs])
    usual = np.array([plain(loaded, *pair) for pair in pairs])
    found = Scorer(running(loaded), LABELS, head).score(prompts)
    ours = np.array([value for row in found for value in row.values])
    tokens = np.array([len(label) for _, label in pairs])
    # Each token's logit of scale 7 has a step of 2^-5 in bf16.
    assert np.abs((ours - right) / tokens).max() < 0.3
    assert np.square((ours - right) / tokens).mean() < 1.5 * np.square((usual - right) / tokens).mean()


def test_a_transformers_native_checkpoint_scores_as_the_released_one(running, tiny_checkpoint, tmp_path):
    """The same weights in both layouts, each with its own classes and tokenizer, give the same scores."""
    checkpoints.convert_to_glm(tiny_checkpoint, tmp_path / "native", "fp32")
    released = running(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    native = running(checkpoints.load(tmp_path / "native", "fp32", "cpu"))
    assert type(native.model).__name__ == "GlmForCausalLM" != type(released.model).__name__
    head, prompts = prompts_of("chatglm3", 20)
    ours = Scorer(released, LABELS, head).score(prompts)
    theirs = Scorer(native, LABELS, head).score(prompts)
    for one, two in zip(ours, theirs, strict=True):
        assert one.values == pytest.approx(two.values, abs=ATOL)


@pytest.mark.parametrize("kind", ["", "prefix"])
@pytest.mark.parametrize("generation", FOLDERS)
def test_long_rows_are_fed_in_pieces_and_many_labels_in_several_trees(running, generation, kind, monkeypatch):
    loaded = load(generation, kind)
    head, prompts = prompts_of(generation, 9)
    prompts = [[*prompt[:25], *[(7 * i) % 140 + 5 for i in range(80)], *prompt[25:]] for prompt in prompts]
    labels = [[5 + i, 10 + i % 3, 20 + i % 5, STOP] for i in range(40)]
    expected = Scorer(running(loaded), labels, head).score(prompts)
    monkeypatch.setattr(scoring, "NODES", 7)
    monkeypatch.setattr(engine_module, "FORWARD_SECONDS", 1e-9)
    monkeypatch.setattr(engine_module, "FORWARD_TOKENS", 32)
    engine = running(loaded)
    widest: list[int] = []
    forward = engine._forward_all
    engine._forward_all = lambda cache, ids, *rest: (widest.append(ids.shape[1]), forward(cache, ids, *rest))[
        1
    ]
    scorer = Scorer(engine, labels, head)
    found = scorer.score(prompts)
    assert len(scorer._trees) > 5
    if generation != "chatglm":
        assert max(widest) < 75
    for prompt, one, two in zip(prompts, found, expected, strict=True):
        assert one.values == pytest.approx(two.values, abs=ATOL)
        assert one.outside == pytest.approx(two.outside, abs=1e-5) and one.greedy == two.greedy
        assert one.values[3] == pytest.approx(plain(loaded, prompt, labels[3]), abs=ATOL)


@pytest.mark.parametrize("generation", FOLDERS)
def test_the_shared_head_is_computed_once_and_not_at_all_by_chatglm_6b(running, generation):
    engine = running(load(generation), 4)
    head, prompts = prompts_of(generation, 30)
    prompts = [prompt for prompt in prompts if prompt[:20] == head]
    fed: list[tuple[int, int]] = []
    forward = engine._forward_all
    engine._forward_all = lambda cache, ids, *rest: (
        fed.append(tuple(ids.shape)),
        forward(cache, ids, *rest),
    )[1]
    for _ in range(2):  # a second scorer finds the head in the engine's prefix cache
        Scorer(engine, LABELS, head).score(prompts)
    nodes = len(scoring._trees(LABELS)[0][1])
    tokens = sum(len(prompt) - (0 if generation == "chatglm" else 20) for prompt in prompts)
    assert fed.count((1, 20)) == (0 if generation == "chatglm" else 1)
    columns = sum(rows * width for rows, width in fed if (rows, width) != (1, 20))
    assert tokens <= columns / 2 - nodes * len(prompts) < 1.5 * tokens


def test_the_outside_mass_and_the_greedy_label_are_those_of_the_whole_vocabulary(running):
    engine = running(load("chatglm2"))
    _, prompts = prompts_of("chatglm2", 30)
    vocabulary = int(engine.model.config.vocab_size)
    every = Scorer(engine, [[token] for token in range(vocabulary)]).score(prompts)
    for row in every:
        assert row.outside == pytest.approx(0.0, abs=1e-5)
        assert row.greedy == max(range(vocabulary), key=row.values.__getitem__)
    half = Scorer(engine, [[token] for token in range(vocabulary // 2)]).score(prompts)
    rest = Scorer(engine, [[token] for token in range(vocabulary // 2, vocabulary)]).score(prompts)
    for first, second, whole in zip(half, rest, every, strict=True):
        assert first.outside + second.outside == pytest.approx(1.0, abs=1e-5)
        assert (first.greedy is None) == (whole.greedy >= vocabulary // 2)


def test_the_greedy_label_is_what_generation_writes(running):
    engine = running(load("chatglm3"))
    _, prompts = prompts_of("chatglm3", 12)
    settings = GenerationSettings(max_new_tokens=3)
    handles = engine.submit_many([Request(tuple(prompt), settings, "batch") for prompt in prompts])
    assert all(handle.wait(60) for handle in handles)
    written = sorted({tuple(handle.ids) for handle in handles})
    labels = [list(ids) for ids in written[::2]]
    found = Scorer(engine, labels).score(prompts)
    for handle, row in zip(handles, found, strict=True):
        assert row.greedy == (labels.index(handle.ids) if handle.ids in labels else None)
    assert any(row.greedy is None for row in found) and any(row.greedy is not None for row in found)


def test_memory_that_runs_out_halves_the_rows_and_one_row_is_a_sentence(running, monkeypatch):
    loaded = load("chatglm2")
    head, prompts = prompts_of("chatglm2", 24)
    expected = Scorer(running(loaded), LABELS, head).score(prompts)
    forward, rows = Engine._forward_all, []

    def short(self: Engine, cache: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, cache, ids, *rest)

    engine = running(loaded)
    monkeypatch.setattr(Engine, "_forward_all", short)
    found = Scorer(engine, LABELS, head).score(prompts)
    assert max(rows) > 3
    for one, two in zip(found, expected, strict=True):
        assert one.values == pytest.approx(two.values, abs=ATOL)
    monkeypatch.setattr(
        Engine, "_forward_all", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    )
    with pytest.raises(GLMError, match="Memory ran out on a prompt of"):
        Scorer(engine, LABELS).score(prompts)
    monkeypatch.undo()
    assert Scorer(engine, LABELS, head).score(prompts[:2])[0].values == pytest.approx(
        expected[0].values, abs=ATOL
    )


def test_numbers_out_of_range_make_a_row_unusable_and_no_other(running, monkeypatch):
    engine = running(load("chatglm2"))
    _, prompts = prompts_of("chatglm2", 6)
    forward, calls = engine._forward_all, []

    def overflowing(cache: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = forward(cache, ids, *rest)
        calls.append(len(ids))
        if len(calls) == 1:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(engine, "_forward_all", overflowing)
    found = Scorer(engine, LABELS).score(prompts)
    assert [row.usable for row in found].count(False) == 1 < len(found)


def test_a_prompt_that_does_not_fit_and_an_answer_without_tokens_are_refused(running):
    engine = running(load("chatglm2"))
    with pytest.raises(GLMError, match="the model takes"):
        Scorer(engine, LABELS).score([[5] * engine.context])
    with pytest.raises(ValueError, match="no token"):
        Scorer(engine, [[5], []])
    assert scoring.score(engine, [], LABELS) == []


def test_a_stop_ends_the_rows_and_an_unloaded_model_is_a_sentence(running):
    engine = running(load("chatglm2"), 2)
    _, prompts = prompts_of("chatglm2", 40)
    stop, seen = threading.Event(), []
    for number, _ in Scorer(engine, LABELS).each(prompts, stop):
        seen.append(number)
        stop.set()
    assert 0 < len(seen) < 12
    engine.close()
    with pytest.raises(GLMError, match="unloaded"):
        Scorer(engine, LABELS).score(prompts)


def test_a_chat_answer_starts_between_two_pieces_of_scoring(running, monkeypatch):
    """Its first token comes after the piece that runs, not after the rows that wait; its later ones get their turns."""
    engine = running(load("chatglm2"), 2)
    _, prompts = prompts_of("chatglm2", 60)
    forward, order = engine._forward_all, []

    def slow(cache: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        chat = len(rest) < 5  # scoring feeds a tree, chat does not
        order.append("chat" if chat else "scores")
        time.sleep(0.0 if chat else 0.01)
        return forward(cache, ids, *rest)

    monkeypatch.setattr(engine, "_forward_all", slow)
    found: dict[int, Any] = {}
    thread = threading.Thread(target=lambda: found.update(Scorer(engine, LABELS).each(prompts)))
    thread.start()
    while order.count("scores") < 5:
        time.sleep(0.001)
    before = len(order)
    handle = engine.submit(Request(tuple(prompts[0]), GenerationSettings(max_new_tokens=8)))
    assert handle.wait(30)
    thread.join(60)
    first = order.index("chat")
    assert first - before <= 2 and handle.n_tokens >= 1
    assert order.index("scores", first) < len(order)  # scoring goes on meanwhile
    tokens = [place for place, what in enumerate(order) if what == "chat"]
    assert tokens[-1] - tokens[0] < 2 * len(tokens)
    assert len(found) == 60
