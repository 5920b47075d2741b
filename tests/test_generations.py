"""Every generation, with and without adapters, at every precision: the engine's tokens are those of the plain loop."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

from glm_core import adapters, checkpoints, weights
from glm_core import engine as engine_module
from glm_core.adapters import BaseShape, PrefixEncoder, PrefixModel
from glm_core.checkpoints import LoadedModel, inspecting, loading
from glm_core.engine import Engine, EngineHost, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.models import released
from glm_core.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, layouts, positions
from glm_core.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM
from glm_core.settings import MINI
from glm_core.tokenizers.base import Message
from glm_core.tokenizers.chatglm import ChatGLMTokenizer
from tests.conftest import GOLDEN, SHARED

# The reference differs from itself by up to 2.5e-5 between cached and uncached decoding, on logits of scale 7.
ATOL = 5e-5
# Two ways of running differ by ATOL at most, so a choice with twice that in hand cannot turn out otherwise.
MARGIN = 2 * ATOL
PREFIX = 8  # columns
STOP = frozenset({-1})  # no token: rows run to their longest

FOLDERS = {
    "chatglm": GOLDEN / "v1" / "tiny",
    "chatglm, 28 layers": GOLDEN / "v1" / "tiny28",
    "chatglm2": GOLDEN / "v2" / "tiny",
    "chatglm3": GOLDEN / "v3" / "tiny",
}
GENERATIONS = (*FOLDERS, "glm4")
ADAPTERS = ("no adapter", "prefix", "prefix with projection", "lora")
# v1/tiny: [MASK] 150, [gMASK] 151, <sop> 154
FIRST_KINDS = {
    "gmask": [5, 6, 7, 151, 154],
    "gmask, far longer": [*(5 + (7 * i) % 140 for i in range(150)), 151, 154],
    "mask": [20, 21, 22, 23, 150, 154],
    "mask in the middle, answer begun": [20, 150, 21, 22, 154, 30],
    "both masks": [9, 150, 10, 11, 151, 154],
    "gmask in the middle": [40, 41, 151, 42, 43, 44, 45, 154],
    "nothing but the end": [151, 154],
}


class Letters:
    """The least that the engine asks of a tokenizer: one character for every id."""

    pad_id = 0

    def __init__(self, generation: str, stop_ids: frozenset[int]) -> None:
        self.generation, self.stop_ids = generation, stop_ids

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        return "".join(chr(0x4E00 + i) for i in ids if i not in self.stop_ids)


@pytest.fixture(autouse=True)
def groups_as_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows start together however slow the machine is; how many that are otherwise depends on its speed."""
    monkeypatch.setattr(engine_module, "FORWARD_SECONDS", 1e4)


@pytest.fixture(scope="module")
def glm4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete GLM-4 checkpoint in small: its tokenizer, a padded vocabulary, the frequencies of 128k tokens."""
    folder = tmp_path_factory.mktemp("glm4") / "glm-4-tiny"
    folder.mkdir()
    merged = [b"the", b" the", b"in", b"ing", "你".encode(), "好".encode(), "你好".encode()]
    ranks = [bytes([byte]) for byte in range(256)] + merged
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text('{"glm_generation": "glm4"}')
    raw = json.loads((GOLDEN / "v3" / "tiny" / "config.json").read_text()) | {
        "padded_vocab_size": 320, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 3,
        "num_attention_heads": 4, "kv_channels": 16, "multi_query_group_num": 2, "seq_length": 384,
        "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(11)
    model = ChatGLM2ForCausalLM(ChatGLM2Config.from_released(raw, "glm4"))
    with torch.no_grad():  # sizes as after training: choices far from ties, attention that is no average
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(60 if "lm_head" in name else 6)
    save_file(
        {name: t.contiguous() for name, t in released.to_released(model.state_dict(), model.config)},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete ChatGLM-6B checkpoint in small: random weights, and a vocabulary made like the released one."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("v1") / "chatglm-6b-tiny"
    folder.mkdir()
    cases = json.loads((GOLDEN / "v1" / "tokenizer.json").read_text(encoding="utf-8"))["encode"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([case["text"] for case in cases if case["text"].strip()] * 20),
        model_prefix=str(folder / "ice_text"), model_type="unigram", vocab_size=400, hard_vocab_limit=False,
        character_coverage=0.98, pad_id=3, user_defined_symbols=["<n>"], normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"num_image_tokens": 0}')
    tokenizer = ChatGLMTokenizer(folder / "ice_text.model", {"num_image_tokens": 0})
    raw = json.loads((GOLDEN / "v1" / "tiny" / "config.json").read_text()) | {
        "vocab_size": tokenizer.vocab_size + 24,
        "bos_token_id": tokenizer.special["<sop>"],
        "eos_token_id": tokenizer.eos_id,
        "mask_token_id": tokenizer.special["[MASK]"],
        "gmask_token_id": tokenizer.special["[gMASK]"],
    }
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(12)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_released(raw))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(40 if "embeddings" in name else 30 if "dense" in name else 8)
        # The head is the embedding: under an average above zero every token would be followed by itself.
        torch.nn.init.normal_(model.transformer.final_layernorm.weight)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder_of(glm4_folder: Path) -> Any:
    return lambda generation: glm4_folder if generation == "glm4" else FOLDERS[generation]


def load(
    folder: Path,
    adapter: str = "no adapter",
    bits: int = 0,
    stop_ids: frozenset[int] = STOP,
    context: int = 0,
) -> LoadedModel:
    """A folder in fp32 as the engine takes it, with a fresh adapter that changes its answers."""
    info = inspecting.inspect(folder)
    raw = inspecting.read_config(folder)
    bits = bits or info.bits
    model = loading.empty_model(info.architecture, raw, info.generation)
    files = weights.weight_files(folder)[0]
    loading.fill(model, files, torch.float32, bits, bool(raw.get("quantization_embeddings")))
    model.eval()
    torch.manual_seed(21)
    prefix = None
    if adapter.startswith("prefix"):
        prefix = PrefixEncoder(BaseShape.of(model.config), PREFIX, adapter.endswith("projection")).eval()
        if prefix.trans is not None:
            with torch.no_grad():
                prefix.trans[2].weight.mul_(6)
    if adapter == "lora":
        adapters.add_lora(model, targets=["query_key_value", "dense", "dense_h_to_4h"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=Letters(info.generation, stop_ids),
        info=replace(info, context=context or info.context),
        precision="fp32",
        device=torch.device("cpu"),
        load_seconds=0.0,
        prefix=prefix,
    )


def load_prefix(folder: Path, saved: Path) -> LoadedModel:
    """A folder with the prefix that another one holds."""
    loaded = load(folder)
    return replace(loaded, prefix=adapters.load_prefix(saved, loaded.model.config).eval())


@contextlib.contextmanager
def running(loaded: LoadedModel) -> Iterator[Engine]:
    engine = Engine(loaded)
    try:
        yield engine
    finally:
        engine.close()


def submit(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, priority: str = "batch"
) -> list[engine_module.Handle]:
    settings = GenerationSettings(max_new_tokens=tokens)
    with engine._condition:  # none of them starts before all are there
        return [engine.submit(Request(tuple(prompt), settings, priority)) for prompt in prompts]


def answers(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **kwargs: Any) -> list[list[int]]:
    """Greedy ids of some rows that the engine computes together."""
    handles = submit(engine, prompts, tokens, **kwargs)
    assert all(handle.wait(60) for handle in handles)
    assert [handle.error for handle in handles] == [None] * len(handles)
    return [handle.ids for handle in handles]


def plain(loaded: LoadedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy ids by definition: nothing cached, nothing padded, the whole row again for every token."""
    model = loaded.model if loaded.prefix is None else PrefixModel(loaded.model, loaded.prefix)
    options = {"use_cache": False} if loaded.prefix is None else {}
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(torch.tensor([ids]), **options).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second > MARGIN, "a tie proves nothing: choose another seed"
            ids.append(int(logits.argmax()))
            if ids[-1] in loaded.tokenizer.stop_ids:
                break
    return ids[len(prompt) :]


def by_transformers(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], tokens: int, kind: type
) -> list[list[int]]:
    """Greedy ids of left-padded rows on one of transformers' caches, the prefix in its first columns."""
    model, rows, width = loaded.model, len(prompts), max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    virtual = 0 if loaded.prefix is None else loaded.prefix.length
    room = {"max_cache_len": virtual + width + tokens} if kind is StaticCache else {}
    cache = kind(config=model.config, **room)
    first = loaded.info.architecture == "chatglm"
    if first:
        context, anchor = layouts(ids, real.bool(), model.config)
    made, new = torch.zeros(rows, 0, dtype=torch.long), ids
    with torch.inference_mode():
        for layer, pair in enumerate(loaded.prefix.keys_values(rows) if loaded.prefix else ()):
            cache.update(*pair, layer)
        for _ in range(tokens):
            index = (real.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
            where = {"position_ids": index}
            if first:
                where = {"glm_position_ids": positions(index, context, anchor), "prefix_length": virtual}
            mask = torch.cat([real.new_ones(rows, virtual), real], 1)
            out = model(new, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **where)
            new = out.logits[:, -1].argmax(-1, keepdim=True)
            made = torch.cat([made, new], 1)
            real = torch.cat([real, torch.ones_like(new)], 1)
    return made.tolist()


def prompts_of(generation: str) -> list[list[int]]:
    """Three rows of very different lengths."""
    if generation.startswith("chatglm,") or generation == "chatglm":
        return [
            FIRST_KINDS[kind] for kind in ("gmask", "mask in the middle, answer begun", "gmask, far longer")
        ]
    return [[5, 6, 7], [9, 10, 11, 12, 13, 14, 3, 4, 20], [(5 + 7 * i) % 150 for i in range(120)]]


# ---- equal by every way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 8, 4], ids=["fp32", "int8", "int4"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_way_of_running_gives_the_tokens_of_the_plain_loop(folder_of, generation, adapter, bits):
    loaded = load(folder_of(generation), adapter, bits)
    prompts, tokens = prompts_of(generation), 6 if "28" in generation else 10
    expected = [plain(loaded, prompt, tokens) for prompt in prompts]
    with running(loaded) as engine:
        assert answers(engine, prompts, tokens) == expected
        assert [answers(engine, [prompt], tokens)[0] for prompt in prompts] == expected
    for kind in (DynamicCache, StaticCache):
        assert by_transformers(loaded, prompts, tokens, kind) == expected
    if adapter != "no adapter":
        bare = load(folder_of(generation), bits=bits)
        assert [plain(bare, prompt, tokens) for prompt in prompts] != expected


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm, 28 layers"])
def test_every_kind_of_prompt_of_chatglm_6b_keeps_its_tokens_in_any_company(generation, adapter):
    loaded = load(FOLDERS[generation], adapter)
    prompts = list(FIRST_KINDS.values())
    expected = [plain(loaded, prompt, 10) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) >= 6  # a row in another's place would be seen
    with running(loaded) as engine:
        assert answers(engine, prompts, 10) == expected
        assert answers(engine, prompts[::-1], 10, priority="chat") == expected[::-1]


@pytest.mark.parametrize(
    ("prompt", "what"), [([5, 6, 7, 154], r"\[gMASK\]"), ([5, 6, 151], "<sop>"), ([5], "<sop>")]
)
def test_a_prompt_without_its_control_tokens_is_refused_and_ends_no_other_row(prompt, what):
    with running(load(FOLDERS["chatglm"])) as engine:
        others = submit(engine, [FIRST_KINDS["gmask"]], 60)
        with pytest.raises(GLMError, match=what):
            engine.submit(Request(tuple(prompt)))
        with pytest.raises(GLMError, match=what):
            engine.score([FIRST_KINDS["gmask"], prompt], [[30]])
        assert others[0].wait(60) and others[0].state == "done" and others[0].n_tokens == 60


@pytest.mark.parametrize("adapter", ["no adapter", "prefix"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_that_join_while_others_run_change_no_row(folder_of, generation, adapter):
    loaded = load(folder_of(generation), adapter)
    prompts = prompts_of(generation)
    with running(loaded) as engine:
        late: list[engine_module.Handle] = []
        step, steps = engine._step, []

        def counted(priority: str) -> None:
            step(priority)
            steps.append(len(engine._rows[priority]))
            if len(steps) in (3, 6):  # the long row comes last, when the others are far
                late.extend(submit(engine, [prompts[len(late) + 1]], 12, "chat"))

        engine._step = counted
        first = submit(engine, prompts[:1], 24, "chat")[0]
        assert first.wait(60) and len(late) == 2 and all(handle.wait(60) for handle in late)
        assert max(steps) == 3, "all three ran together"
        assert [h.ids for h in (first, *late)] == [
            plain(loaded, prompt, n) for prompt, n in zip(prompts, (24, 12, 12), strict=True)
        ]


@pytest.mark.parametrize("adapter", ["no adapter", "prefix", "lora"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_second_turn_equals_a_cold_run(folder_of, generation, adapter):
    """Left-to-right models start from the cache of the first turn; ChatGLM-6B reads its prompt anew."""
    first = generation.startswith("chatglm") and generation not in ("chatglm2", "chatglm3")
    loaded = load(folder_of(generation), adapter)
    turns = [prompts_of(generation)[i] for i in (1, 2)]
    with running(loaded) as engine:
        handles = submit(engine, turns, 9, "chat")  # of unequal length, so that one of them is padded
        assert all(handle.wait(60) for handle in handles)
        later = [
            [*turn, *handle.ids, 33, 34, 35, *([151, 154] if first else [])]
            for turn, handle in zip(turns, handles, strict=True)
        ]
        fed: list[int] = []
        forward = engine._forward_all
        engine._forward_all = lambda cache, ids, *rest: (fed.append(ids.numel()), forward(cache, ids, *rest))[
            1
        ]
        for ids in later:
            known, entry = engine.prefixes.longest(ids)
            assert (known == 0) if first else (known == len(ids) - 4), (
                "all but the last token, never fed, and three"
            )
            assert entry is None or entry.length == engine.virtual + known
            fed.clear()
            assert answers(engine, [ids], 9, priority="chat") == [plain(loaded, ids, 9)]
            assert fed[0] == len(ids) - known


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("adapter", ["no adapter", "prefix", "prefix with projection", "lora"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_scores_are_the_plain_sums_of_log_probabilities(folder_of, generation, adapter, shared):
    loaded = load(folder_of(generation), adapter)
    head = [(60 + 3 * i) % 140 for i in range(20)]
    end = [151, 154] if loaded.info.architecture == "chatglm" else []
    prompts = [[*head, *tail, *end] for tail in ([8], [9, 10, 11, 12, 13, 14, 15], [7, 7])]
    labels = [[30], [31, 32, 33, 34], [35, 36]]
    model = loaded.model if loaded.prefix is None else PrefixModel(loaded.model, loaded.prefix)
    with running(loaded) as engine, torch.inference_mode():
        scores = engine.score(prompts, labels, shared)
        alone = [engine.score([prompt], labels)[0] for prompt in prompts]
        for prompt, row, single in zip(prompts, scores, alone, strict=True):
            for label, score, other in zip(labels, row, single, strict=True):
                logits = model(torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1)
                steps = logits[len(prompt) - 1 : -1]
                expected = float(steps[torch.arange(len(label)), torch.tensor(label)].double().sum())
                assert score == pytest.approx(expected, abs=2 * ATOL * len(label))
                assert other == pytest.approx(expected, abs=2 * ATOL * len(label))


# ---- the reference's tokens, by the engine ---------------------------------------------------------------------


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def rows_of(arrays: dict[str, np.ndarray], case: str) -> list[list[int]]:
    """The ids of a recorded batch without its padding."""
    ids = arrays[f"{case}input_ids"]
    mask = arrays.get(f"{case}attention_mask")
    if mask is None:
        return ids.tolist()
    real = ~mask[:, 0, -1, -ids.shape[1] :] if mask.ndim == 4 else mask.astype(bool)
    return [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]


def made(arrays: dict[str, np.ndarray], case: str, kind: str, stops: Collection[int] = ()) -> list[list[int]]:
    """The new tokens of a recorded run, without what a row was filled up with after its stop id."""
    tokens = arrays[f"{case}{kind}"][:, arrays[f"{case}input_ids"].shape[1] :].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))] for row in tokens]


TINY = [("v1", "tiny"), ("v1", "tiny28"), ("v2", "tiny"), ("v3", "tiny")]


@pytest.mark.parametrize(("family", "name"), TINY)
def test_the_engine_gives_the_logits_and_tokens_of_the_reference(family, name):
    arrays = arrays_of(GOLDEN / family, f"io_{name}")
    cases = [key.removesuffix("step_logits") for key in arrays if key.endswith("/step_logits")]
    assert len(cases) == (10 if family == "v1" else 5)
    with running(load(GOLDEN / family / name)) as engine:
        seen: list[torch.Tensor] = []
        forward = engine._forward

        def recorded(*args: Any) -> torch.Tensor:
            logits = forward(*args)
            seen.append(logits.clone())
            return logits

        engine._forward = recorded
        for case in cases:
            rows, seen[:] = rows_of(arrays, case), []
            steps = arrays[f"{case}step_logits"]
            assert answers(engine, rows, len(steps)) == made(arrays, case, "greedy_loop")
            ours = torch.stack(seen).numpy()
            np.testing.assert_allclose(ours, steps.reshape(ours.shape), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "name"), TINY)
def test_stop_ids_end_rows_where_they_end_in_the_reference(family, name):
    arrays = arrays_of(GOLDEN / family, f"io_{name}")
    kinds = [key for key in arrays if key.rsplit("/")[-1] in ("generate", "generate_eos1", "generate_eos2")]
    assert sum("eos" in kind for kind in kinds) == (4 if family == "v1" else 2)
    eos = json.loads((GOLDEN / family / name / "config.json").read_text())["eos_token_id"]
    loaded = load(GOLDEN / family / name)
    with running(loaded) as engine:
        for key in kinds:
            case, kind = key.rsplit("/")[0] + "/", key.rsplit("/")[1]
            stops = arrays.get(f"{key}_eos_token_id", np.array([eos])).tolist()
            loaded.tokenizer.stop_ids = frozenset(stops)
            handles = submit(engine, rows_of(arrays, case), 24)
            assert all(handle.wait(60) for handle in handles)
            assert [handle.ids for handle in handles] == made(arrays, case, kind, stops)
            for handle in handles:
                assert handle.finish_reason == ("stop" if handle.ids[-1] in stops else "length")


@pytest.mark.parametrize("kind", ["noproj", "proj"])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_trained_prefix_gives_the_tokens_of_the_reference(family, kind):
    name = f"ptuning_tiny_{kind}"
    arrays = arrays_of(GOLDEN / family, name)
    loaded = load_prefix(GOLDEN / family / "tiny", GOLDEN / family / name)
    loaded.tokenizer.stop_ids = frozenset({155 if family == "v1" else 2})
    with running(loaded) as engine:
        for case in ("single/", "batch/"):
            expected = made(arrays, case, "generate", loaded.tokenizer.stop_ids)
            assert answers(engine, rows_of(arrays, case), 16) == expected


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("v1", "quant_int8"),
        ("v1", "quant_int4"),
        ("v1", "quant_int4_qe"),
        ("v2", "quant_int8"),
        ("v2", "quant_int4"),
    ],
)
def test_released_quantized_weights_give_the_tokens_of_the_reference(family, name):
    arrays = arrays_of(GOLDEN / family, name)
    tokens = "generate" if family == "v1" else "greedy_loop"
    cases = [key.removesuffix(tokens) for key in arrays if key.endswith(tokens)]
    assert len(cases) == (1 if name.endswith("qe") else 2)
    with running(load(GOLDEN / family / name)) as engine:
        rows = [rows_of(arrays, case)[0] for case in cases]
        assert answers(engine, rows, 16) == [made(arrays, case, tokens)[0] for case in cases]


REAL = SHARED / "golden"
VOCABULARY = {"v1": "ice_text.model", "v2": "tokenizer.model", "v3": "tokenizer.model"}


@pytest.fixture(scope="module", params=["v1", "v2", "v3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine on the released vocabulary, the recorded chats and the arrays."""
    family, file = request.param, VOCABULARY[request.param]
    if not (REAL / family / "io_real.npz").is_file() or not (SHARED / "vocab" / file).is_file():
        pytest.skip(f"the reference of the released vocabulary of {family} is not on this machine")
    folder = (
        tmp_path_factory.mktemp(family)
        / {"v1": "chatglm-6b", "v2": "chatglm2-6b", "v3": "chatglm3-6b"}[family]
    )
    shutil.copytree(REAL / family / "real", folder)
    if family == "v3":
        shutil.copy(REAL / "v2" / "real" / "model.safetensors", folder)
    shutil.copy(SHARED / "vocab" / file, folder)
    with running(checkpoints.load(folder, "fp32", "cpu")) as engine:
        record = json.loads((REAL / family / "io_real.json").read_text(encoding="utf-8"))
        yield engine, record, arrays_of(REAL / family, "io_real")


def test_chats_on_the_released_vocabulary_give_the_answers_of_the_reference(real):
    engine, record, _ = real
    assert record["chat"]
    for turn in record["chat"]:
        messages = []
        for one in turn["history"]:
            if isinstance(one, dict):
                messages.append(
                    Message(one["role"], one["content"], one.get("metadata", ""), tuple(one.get("tools", ())))
                )
            else:
                messages += [Message("user", one[0]), Message("assistant", one[1])]
        messages.append(Message(turn.get("role", "user"), turn["query"]))
        prompt = engine.tokenizer.chat_ids(messages)
        assert prompt == turn["prompt_ids"]
        handle = submit(engine, [prompt], turn["max_length"] - len(prompt), "chat")[0]
        assert handle.wait(60) and handle.ids == turn["generated_ids"]
        ended = handle.ids[-1] in engine.tokenizer.stop_ids
        assert handle.finish_reason == ("stop" if ended else "length")
        # Without an end the release of ChatGLM3 drops the last token, which is no end, from what it shows.
        if ended or engine.tokenizer.generation != "chatglm3":
            assert handle.text == turn["response"]


def test_rows_of_the_released_vocabulary_give_the_tokens_of_the_reference(real):
    engine, _, arrays = real
    cases = [key.removesuffix("generate") for key in arrays if key.endswith("/generate")]
    assert len(cases) >= 4
    for case in cases:
        stop = engine.tokenizer.eos_id  # the only one of plain generate()
        expected = made(arrays, case, "generate", [stop])
        loaded_stops, engine.tokenizer.stop_ids = engine.tokenizer.stop_ids, frozenset({stop})
        try:
            assert answers(engine, rows_of(arrays, case), 24) == expected
        finally:
            engine.tokenizer.stop_ids = loaded_stops


# ---- ends, limits, memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_each_stop_id_of_a_generation_ends_the_answer(generation, first_folder, glm4_folder, tiny_checkpoint):
    """With the tokenizer of the generation itself; what stands at the end is not part of the text."""
    folder = {"chatglm": first_folder, "glm4": glm4_folder}.get(generation, tiny_checkpoint)
    chosen = generation if folder is tiny_checkpoint else None
    loaded = checkpoints.load(folder, "fp32", "cpu", chosen)
    tokenizer = loaded.tokenizer
    assert tokenizer.generation == generation
    names = {
        "chatglm": ["<eop>"],
        "chatglm2": [],
        "chatglm3": ["<|user|>", "<|observation|>"],
        "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    }[generation]
    expected = {tokenizer.special[name] for name in names}
    if generation in ("chatglm2", "chatglm3"):
        expected.add(2)  # </s>, a piece of the file
    assert tokenizer.stop_ids == expected
    prompts = [tokenizer.chat_ids([Message("user", text)]) for text in ("你好", "the thing, the thing!")]
    word = tokenizer.encode("好")[-1]
    shown = tokenizer.decode([word, word]).strip()
    assert "好" in shown
    with running(loaded) as engine:
        forward = engine._forward
        for stop in sorted(expected):
            calls: list[int] = []

            def pushed(*args: Any, stop: int = stop, calls: list[int] = calls) -> torch.Tensor:
                logits = forward(*args)
                calls.append(len(logits))
                likeliest = [word, word, stop][min(len(calls), 3) - 1]
                logits[:, likeliest] = 1e6
                return logits

            engine._forward = pushed
            handles = submit(engine, prompts, 30, "batch")
            assert all(handle.wait(60) for handle in handles)
            for handle in handles:
                assert handle.ids == [word, word, stop] and handle.finish_reason == "stop"
                assert handle.text == shown


@pytest.mark.parametrize("adapter", ["no adapter", "prefix"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_prompt_and_answer_fill_the_context_and_a_prefix_takes_none_of_it(folder_of, generation, adapter):
    """The columns of a prefix have no positions, so the longest answer is as long as without one."""
    loaded = load(folder_of(generation), adapter, context=30)
    first = loaded.info.architecture == "chatglm"
    prompt = [*range(5, 25), 151, 154] if first else list(range(5, 27))
    with running(loaded) as engine:
        highest: list[int] = []
        forward = engine._forward_all

        def watched(cache: Any, ids: Any, where: torch.Tensor, *rest: Any) -> torch.Tensor:
            highest.append(int(where.max()))
            return forward(cache, ids, where, *rest)

        engine._forward_all = watched
        handle = submit(engine, [prompt], 500)[0]
        assert handle.wait(60)
        assert handle.finish_reason == "length" and handle.n_tokens == 30 - 22
        assert handle.ids == plain(loaded, prompt, 8)
        assert max(highest) == 28  # of the last token that was fed; the one it gave would be the 30th, 29
        full = [*range(5, 33), 151, 154] if first else list(range(5, 35))
        with pytest.raises(GLMError, match="30 tokens, the model takes 30"):
            engine.submit(Request(tuple(full)))
        with pytest.raises(GLMError, match="30 tokens, the model takes 30"):
            engine.score([full], [[30]])


@pytest.mark.parametrize("adapter", ["no adapter", "prefix"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_cancelled_row_is_freed_and_its_neighbours_go_on(folder_of, generation, adapter):
    loaded = load(folder_of(generation), adapter)
    prompts = prompts_of(generation)
    with running(loaded) as engine:
        step, widths = engine._step, []

        def counted(priority: str) -> None:
            step(priority)
            cache = engine._rows[priority].cache
            widths.append((cache.keys[0].shape[0], cache.length))
            if len(widths) == 4:
                handles[2].cancel()  # the longest

        engine._step = counted
        handles = submit(engine, prompts, 20)
        assert all(handle.wait(60) for handle in handles)
        engine._call(lambda: None)  # the scheduler is past its last round
        assert [handle.state for handle in handles] == ["done", "done", "cancelled"]
        assert widths[3] == (3, engine.virtual + len(prompts[2]) + 4)
        # Its row is gone, and so are the columns in front that only it needed; a prefix stands before those.
        longest = max(map(len, prompts if loaded.prefix else prompts[:2]))
        assert widths[4] == (2, engine.virtual + longest + 5)
        assert engine._rows["batch"].cache is None and engine.status().running_batch == 0
        expected = [plain(loaded, prompt, 20) for prompt in prompts]
        assert [handle.ids for handle in handles] == [*expected[:2], expected[2][:5]]


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_out_of_range_end_their_row_and_nothing_of_it_is_remembered(generation, value):
    """The release goes on with token 5 instead, for all rows."""
    loaded = load(FOLDERS[generation])
    prompts = prompts_of(generation)
    with running(loaded) as engine:
        forward, calls = engine._forward, []

        def overflowing(*args: Any) -> torch.Tensor:
            logits = forward(*args)
            calls.append(1)
            if len(calls) == 3:
                logits[1, 7] = value
            return logits

        engine._forward = overflowing
        handles = submit(engine, prompts, 8, "chat")
        assert all(handle.wait(60) for handle in handles)
        assert [handle.state for handle in handles] == ["done", "failed", "done"]
        assert "left the range of fp32 after 2 tokens" in str(handles[1].error)
        expected = [plain(loaded, prompt, 8) for prompt in prompts]
        assert [handle.ids for handle in handles] == [expected[0], expected[1][:2], expected[2]]
        assert not any(key[: len(prompts[1])] == tuple(prompts[1]) for key in engine.prefixes.entries)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_a_base_and_its_adapter_share_no_cached_column(
    generation, first_folder, glm4_folder, tiny_checkpoint, tmp_path, monkeypatch
):
    """One after the other in one host, loaded from their folders, the same conversation in all three."""
    monkeypatch.setattr(
        EngineHost, "_settle", staticmethod(lambda engine: None)
    )  # it caches a prompt of its own
    folder = {"chatglm": first_folder, "glm4": glm4_folder}.get(generation, tiny_checkpoint)
    chosen = generation if folder is tiny_checkpoint else None
    raw = inspecting.read_config(folder)
    torch.manual_seed(31)
    encoder = PrefixEncoder(BaseShape.of_file(raw), PREFIX, projection=generation == "glm4")
    adapters.save_prefix(encoder, tmp_path / "prefix", raw)
    host, found, caches = EngineHost(), [], []
    tokens = GenerationSettings(max_new_tokens=10)
    for path, base in ((folder, None), (tmp_path / "prefix", folder), (folder, None)):
        engine = host.use(path, "fp32", "cpu", chosen, base)
        engine.tokenizer.stop_ids = STOP  # ten tokens in every turn
        assert not any(cache is engine.prefixes for cache in caches) and not engine.prefixes.entries
        caches.append(engine.prefixes)
        assert engine.virtual == (PREFIX if base else 0)
        talk = [Message("user", "你好 the thing")]
        turns: list[list[int]] = []
        for said in ("in the morning", "好"):
            handle = engine.submit(Request(tuple(engine.tokenizer.chat_ids(talk)), tokens))
            assert handle.wait(60) and handle.error is None
            assert handle.ids == plain(engine.loaded, handle.request.prompt_ids, 10)
            turns.append(handle.ids)
            talk += [Message("assistant", "the answer"), Message("user", said)]
        found.append(turns)
        for ids, entry in engine.prefixes.entries.items():
            assert entry.length == engine.virtual + len(ids)
        assert bool(engine.prefixes.entries) == (generation != "chatglm")
    assert found[0] == found[2]
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    host.unload()


def test_a_released_int4_checkpoint_that_is_asked_for_as_int4_is_loaded_once(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "v2" / "quant_int4", tmp_path / "chatglm2-6b-int4"))
    shutil.copy(MINI / "tokenizer.model", folder)
    info = inspecting.inspect(folder)
    assert info.bits == 4
    host = EngineHost()
    host.current = Engine(replace(load(folder), info=info, precision="bf16"))
    assert host._serves(info.path, "int4", "cpu", None, None)
    assert not host._serves(info.path, "fp32", "cpu", None, None)
    host.current.close()


def test_rows_of_a_shared_instruction_count_as_whole_prompts_in_chatglm_6b(monkeypatch):
    """No part of them is computed once for all, so a group is as small as its whole prompts demand."""
    monkeypatch.setattr(engine_module, "FORWARD_SECONDS", 0.1)
    head = tuple(range(5, 105))
    with running(load(FOLDERS["chatglm"])) as engine:
        prefill, groups = engine._prefill, []
        engine._prefill = lambda handles: (groups.append(len(handles)), prefill(handles))[1]
        engine._prefill_speed = 2500.0  # 250 tokens at a time: two prompts of 103
        settings = GenerationSettings(max_new_tokens=1)
        with engine._condition:
            handles = [
                engine.submit(Request((*head, 110 + i, 151, 154), settings, "batch", len(head)))
                for i in range(2)
            ]
            handles += [engine.submit(Request((*head, 120, 151, 154), settings, "batch", len(head)))]
        assert all(handle.wait(60) for handle in handles)
        assert groups[0] == 2
