"""Memory: what is predicted against tensors, loaded models and fresh processes; the job, its export, and the shell."""

from __future__ import annotations

import csv
import io
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glm_core import checkpoints, cli, evaluate, jobs, linear, memory
from glm_core.checkpoints import loading
from glm_core.engine import Engine, GenerationSettings, KVCache, Request
from glm_core.errors import GLMError
from glm_core.finetune import preflight
from glm_core.finetune.loop import Plan
from glm_core.finetune.methods import Method
from glm_core.finetune.work import FinetuneTask
from glm_core.jobs import StopSignal, Supervisor
from glm_core.memory import measuring, prediction, work
from glm_core.memory.measuring import Level, Point
from glm_core.settings import MINI, Settings

LEVELS = ("fp32", "bf16", "fp16", "int8", "int4")
V1 = {
    "model_type": "chatglm", "vocab_size": 200, "hidden_size": 64, "inner_hidden_size": 256, "num_layers": 3,
    "num_attention_heads": 4, "max_sequence_length": 512, "layernorm_epsilon": 1e-5, "bos_token_id": 130,
    "eos_token_id": 131, "mask_token_id": 128, "gmask_token_id": 129, "pad_token_id": 3,
    "position_encoding_2d": True,
}  # fmt: skip


def store():
    settings = Settings.read()
    settings.make_folders()
    return jobs.store(settings)


# ---- sizes


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        ("chatglm-6b", 6_707_929_088 - 130_528 * 4096, 2048),  # as published, the head being the embedding
        ("chatglm2-6b", 6_243_584_000, 32768),
        ("chatglm3-6b", 6_243_584_000, 8192),
        ("glm-4-9b", 9_399_951_360, 131072),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, parameters, context):
    found = memory.shape(name)
    assert (found.parameters, found.context) == (parameters, context)


def test_a_config_alone_is_enough(tmp_path, tiny_checkpoint):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    alone, whole = memory.shape(tmp_path), memory.shape(tiny_checkpoint)
    assert replace(alone, name="", path="") == replace(whole, name="", path="")
    assert (
        memory.predict(tmp_path, "int4").parts["weights"]
        == memory.predict(tiny_checkpoint, "int4").parts["weights"]
    )


def test_a_config_of_another_maker_alone_is_enough(tmp_path):
    config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
              "max_position_embeddings": 256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = memory.shape(tmp_path)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
    assert (found.linear, found.tied, found.context) == (2 * layer, True, 256)
    assert found.others == 300 * 64 + 2 * (2 * 64 + 64 + 32 + 32) + 64  # the head is the embedding


@pytest.mark.parametrize("level", LEVELS)
def test_the_weights_are_those_of_the_loaded_model(tiny_checkpoint, level):
    loaded = checkpoints.load(tiny_checkpoint, level, "cpu")
    assert memory.predict(tiny_checkpoint, level).parts["weights"] == loaded.weight_bytes


@pytest.mark.skipif(not linear.dynamic_works(), reason="torch has no 8-bit product here")
@pytest.mark.parametrize("stored", ["", "int8", "int4"])
def test_the_weights_over_eight_bit_activations_are_those_of_the_engine(tiny_checkpoint, tmp_path, stored):
    from glm_core.engine import Engine

    folder = checkpoints.convert(tiny_checkpoint, tmp_path / stored, stored) if stored else tiny_checkpoint
    loaded = checkpoints.load(folder, "int8-dynamic", "cpu")
    engine = Engine(loaded)
    try:
        assert memory.predict(folder, "int8-dynamic").parts["weights"] == loaded.weight_bytes
    finally:
        engine.close()
    with pytest.raises(GLMError, match="is not one that"):
        memory.predict(folder, "int8-dynamic", device="cuda")


def test_a_checkpoint_stored_as_codes_has_the_levels_it_computes_in(tiny_checkpoint, tmp_path):
    stored = checkpoints.convert(tiny_checkpoint, tmp_path / "int4", "int4")
    of = memory.shape(stored)
    assert memory.levels(of) == ("fp32", "bf16", "fp16", "int8-dynamic")
    assert memory.levels(of, "cuda") == ("fp32", "bf16", "fp16")
    loaded = checkpoints.load(stored, "bf16", "cpu")
    assert memory.predict(of, "bf16").parts["weights"] == loaded.weight_bytes
    with pytest.raises(GLMError, match="'int8' is not one that int4 can be loaded in"):
        memory.predict(of, "int8")


# ---- the parts


@pytest.mark.parametrize("level", ["fp32", "bf16", "int8"])
def test_the_cache_is_as_large_as_the_engine_makes_it(tiny_checkpoint, level):
    engine = Engine(checkpoints.load(tiny_checkpoint, level, "cpu"))
    cache = engine.empty_cache(3)
    ids = torch.ones(3, 40, dtype=torch.long)
    positions = torch.arange(40).expand(3, -1)
    engine.between_steps(lambda: engine.forward(cache, ids, positions, torch.ones(3, 40, dtype=torch.bool)))
    engine.close()
    assert memory.predict(tiny_checkpoint, level, 40, 3).parts["cache"] == cache.nbytes


class Alive(TorchDispatchMode):
    """The most bytes of the tensors that operations made and that are alive at one time, weights apart."""

    def __init__(self, model) -> None:
        super().__init__()
        self.now = self.most = 0
        weights = (one for one in model.parameters() if not one.is_mkldnn)
        self.seen = {one.untyped_storage()._cdata for one in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and not one.is_mkldnn:
                self.note(one.untyped_storage())
        return out

    def note(self, storage) -> None:
        place = storage._cdata
        if place in self.seen:
            return
        self.seen.add(place)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, place, size)

    def forget(self, place, size) -> None:
        self.seen.discard(place)
        self.now -= size


@pytest.mark.parametrize("level", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (4, 96)])
def test_activations_are_those_that_a_forward_makes(level, rows, columns, one_thread):
    engine = Engine(checkpoints.load(MINI, level, "cpu"))
    ids = torch.randint(10, 5000, (rows, columns), generator=torch.Generator().manual_seed(1))
    positions, real = torch.arange(columns).expand(rows, -1), torch.ones(rows, columns, dtype=torch.bool)
    alive, cache = Alive(engine.model), engine.empty_cache(rows)

    def forward() -> None:
        with alive:
            engine.forward(cache, ids, positions, real)

    engine.between_steps(forward)
    engine.close()
    of = memory.shape(MINI)
    predicted = prediction.activation_bytes(of, level, "cpu", rows, columns, columns)
    assert 0.75 <= predicted / (alive.most - cache.nbytes) <= 1.5


def test_activations_of_chatglm_6b_are_those_that_a_forward_makes(tmp_path, one_thread):
    from glm_core.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    (tmp_path / "config.json").write_text(json.dumps(V1))
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_released(dict(V1))).eval()
    rows, columns = 2, 200
    ids = torch.full((rows, columns), 5)
    ids[:, -2:] = torch.tensor([129, 130])
    mask = torch.ones(rows, 1, columns, columns, dtype=torch.bool)
    positions = torch.zeros(rows, 2, columns, dtype=torch.long)
    cache, alive = KVCache(3), Alive(model)
    with torch.inference_mode(), alive:
        model(input_ids=ids, attention_mask=mask, glm_position_ids=positions, past_key_values=cache, use_cache=True,
              logits_to_keep=1)  # fmt: skip
    predicted = prediction.activation_bytes(memory.shape(tmp_path), "fp32", "cpu", rows, columns, columns)
    assert 0.75 <= predicted / (alive.most - cache.nbytes) <= 1.5


def test_a_prompt_that_is_read_in_one_piece_moves_no_cache_and_rows_that_join_move_all():
    of = memory.shape("chatglm2-6b")
    budget = prediction.tokens_at_once(of, "cpu")
    whole, pieces = memory.predict(of, "bf16", budget), memory.predict(of, "bf16", 4 * budget)
    joined = memory.predict(of, "bf16", budget, 3)
    assert whole.parts["moved"] == 0
    assert 0.7 < pieces.parts["moved"] / pieces.parts["cache"] <= 0.75
    assert joined.parts["moved"] == joined.parts["cache"] == 3 * whole.parts["cache"]


def test_a_training_is_what_the_fine_tuning_page_says(tmp_path, tiny_checkpoint):
    method = Method("lora", lora_rank=4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"content": "a", "summary": "b"}\n', encoding="utf-8")
    plan = Plan(method, "bf16", 1e-3, 2, 1, 10)
    task = FinetuneTask(str(tiny_checkpoint), plan, str(rows), str(tmp_path / "out"), max_source=48, max_target=47,
                        device="cpu")  # fmt: skip
    theirs = preflight.predict(task).memory_parts
    ours = memory.predict(tiny_checkpoint, "bf16", 96, 2, method).parts
    assert ours["overhead"] == theirs["program"]
    assert {name: ours[name] for name in theirs if name != "program"} == {
        name: theirs[name] for name in theirs if name != "program"
    }


def test_the_model_of_a_training_is_built_once_for_all_predictions(monkeypatch):
    built = []
    empty = loading.empty_model
    monkeypatch.setattr(loading, "empty_model", lambda *given: built.append(given) or empty(*given))
    of = replace(memory.shape("chatglm2-6b"), name="of this test")
    found = [
        memory.predict(of, precision, context, batch, Method("lora")).total
        for precision in ("fp32", "bf16", "int4")
        for context in (128, 640)
        for batch in (1, 4)
    ]
    assert len(set(found)) == 12 and len(built) == 1


def test_all_weights_cannot_be_trained_as_codes():
    with pytest.raises(GLMError, match="full fine-tuning cannot change"):
        memory.predict("chatglm2-6b", "int8", training=Method("full"))


def test_the_longest_context_fits_and_a_longer_one_does_not():
    of, room = memory.shape("chatglm2-6b"), 8 << 30
    found = memory.longest_context(of, "int4", room, 4, "cuda")
    assert 32 < found < of.context
    assert memory.predict(of, "int4", found, 4, device="cuda").total <= room
    assert memory.predict(of, "int4", found + 64, 4, device="cuda").total > room
    assert memory.longest_context(of, "fp32", room) == 0


# Nothing is known of what the makers' quantization left in their GPU's allocator, or which rows they trained on.
UNKNOWN = {("tuning", "int4"): 0.16, ("generate", "int8"): 0.10, ("generate", "int4"): 0.09}


@pytest.mark.parametrize("figure", memory.FIGURES, ids=lambda one: f"{one.model}-{one.what}-{one.level}")
def test_the_published_figures_are_met(figure):
    assert abs(figure.deviation()) <= UNKNOWN.get((figure.what, figure.level), 0.07)


def test_a_config_of_the_same_sizes_is_known_as_the_published_model(tmp_path):
    raw = json.loads(memory.shape("chatglm3-6b").config)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    assert memory.same_shape(memory.shape(tmp_path).config) in ("chatglm2-6b", "chatglm3-6b")
    assert memory.same_shape(memory.shape(MINI).config) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": "chatglm9-6b"},
            "There is neither a folder chatglm9-6b nor a built-in shape of that name.",
        ),
        ({"precision": "int3"}, "Precision 'int3' is not one that ChatGLM2-6B can be loaded in."),
        ({"context": 40_000}, "ChatGLM2-6B takes 32,768 tokens, not 40,000."),
        ({"batch": 0}, "0 rows of 2048 tokens cannot be computed."),
        ({"device": "tpu"}, "The device 'tpu' is unknown."),
    ],
)
def test_what_cannot_be_predicted_is_said(given, message):
    with pytest.raises(GLMError) as caught:
        memory.predict(**({"model": "chatglm2-6b"} | given))
    assert caught.value.message == message


def test_a_config_without_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "padded_vocab_size": 10}))
    with pytest.raises(GLMError, match="config.json has no hidden_size"):
        memory.shape(tmp_path)


# ---- measuring


def test_a_fresh_process_takes_what_was_predicted(tiny_checkpoint):
    said = []
    found = memory.measure(tiny_checkpoint, "bf16", [64, 4096], [1, 3], say=said.append)
    assert [(one.context, one.batch) for one in found.points] == [
        (64, 1),
        (64, 3),
    ]  # 4,096 is beyond the model
    assert found.weights == memory.predict(tiny_checkpoint, "bf16").parts["weights"]
    assert found.program < found.at_load <= max(one.peak for one in found.points)
    for point in found.points:
        predicted = memory.predict(tiny_checkpoint, "bf16", point.context, point.batch, program=found.program)
        assert point.expected == predicted.total
        assert predicted.total == pytest.approx(point.peak, rel=0.15)
        assert point.prefill_per_s > 0 and point.decode_per_s > 0
    assert "Loading tiny chatglm3 in BF16" in said
    assert Level.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_process_that_cannot_load_says_why(tmp_path):
    with pytest.raises(memory.Unfinished, match="no config.json") as caught:
        memory.measure(tmp_path, "bf16", [64], [1])
    assert caught.value.found is None


def test_a_process_that_is_killed_leaves_what_it_found():
    level = Level(
        "bf16", "m", "f", "cpu", "x", 2, "2026-01-01T00:00:00", {}, 1, 2, 3, 4, 0.5, (Point(64, 1, 9),)
    )
    with pytest.raises(memory.Unfinished, match=r"signal 9") as caught:
        measuring._found([{"say": "a"}, {"level": level.to_json()}], -9, "")
    assert caught.value.found == level


def test_measuring_stops_when_told(tiny_checkpoint):
    assert memory.measure(tiny_checkpoint, "bf16", [64], [1], stop=lambda: True) is None


@pytest.mark.parametrize("length", [40, 77, 500])
def test_prompts_have_the_length_asked_for_and_differ(engine, length):
    rows = [measuring.prompt(engine, length, row) for row in range(3)]
    assert {len(one) for one in rows} == {length} and len(set(rows)) == 3
    handle = engine.submit(Request(rows[0], GenerationSettings(max_new_tokens=2)))
    assert handle.wait(60) and handle.state == "done"


# ---- the job


def level_of(name: str, **values) -> Level:
    points = (
        Point(
            64,
            1,
            1000,
            900,
            prefill_per_s=10.0,
            decode_per_s=2.0,
            predicted={"weights": 700, "overhead": 310},
        ),
        Point(128, 1, error="It needs about 9.0 GiB more; 1.0 GiB are free."),
    )
    made = Level(name, "tiny", "print", "cpu", "a processor", 2, "2026-01-01T10:00:00", {"torch": "2"}, 300, 800, 850,
                 500, 1.5, points)  # fmt: skip
    return replace(made, **values)


def run(made, stop_after: int | None = None):
    """Run a job here; after so many levels it is paused."""
    found = store().claim((work.KIND,), jobs.this_process(), made.id)
    supervisor = Supervisor(store(), {work.KIND: work.run})
    supervisor.run(found)
    return store().get(made.id)


def test_a_level_that_fails_keeps_none_of_the_others_back(tiny_checkpoint, monkeypatch):
    def measure(folder, level, *rest):
        if level == "int8":
            problem = memory.Unfinished(
                "The process that measured ended early: no message.", "Close other programs."
            )
            problem.found = level_of("int8", points=())
            raise problem
        return level_of(level)

    monkeypatch.setattr(work, "measure", measure)
    made = memory.start(store(), memory.plan(tiny_checkpoint, ("bf16", "int8", "int4"), (64,), (1,), "cpu"))
    job = run(made)
    assert (job.state, job.done, job.failed) == ("done", 2, 1)
    found = memory.results(store(), job.id)
    assert [name for name, level, _ in found if level is not None] == ["bf16", "int8", "int4"]
    assert found[1][2].startswith("The process that measured ended early")
    again = run(store().retry_failed(job.id))
    assert (again.state, again.failed) == ("done", 1)


def test_a_paused_measurement_goes_on_with_the_levels_left(tiny_checkpoint, monkeypatch):
    asked = []
    task = memory.plan(tiny_checkpoint, ("fp32", "bf16", "int4"), (64,), (1,), "cpu")
    made = memory.start(store(), task)

    def measure(folder, level, *rest):
        asked.append(level)
        if len(asked) == 2:
            signal.stop("pause")
            return None
        return level_of(level)

    monkeypatch.setattr(work, "measure", measure)
    found = store().claim((work.KIND,), jobs.this_process(), made.id)
    with StopSignal(store(), found) as signal:
        work.run(found, store(), signal)
    store().release(made.id, found.owner, "paused")
    assert store().get(made.id).done == 1
    store().resume(made.id)
    assert run(made).state == "done"
    assert asked == ["fp32", "bf16", "bf16", "int4"]


def test_a_checkpoint_that_changed_is_not_measured_under_its_old_name(tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    made = memory.start(store(), memory.plan(folder, ("bf16",), (64,), (1,), "cpu"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": 1}))
    job = run(made)
    assert job.state == "failed" and "its files have changed" in job.message


def test_the_newest_measurement_of_a_level_counts(tiny_checkpoint, monkeypatch):
    numbers = iter((111, 222))
    task = memory.plan(tiny_checkpoint, ("bf16",), (64,), (1,), "cpu")
    versions = dict(task.versions)
    monkeypatch.setattr(
        work,
        "measure",
        lambda folder, level, *rest: level_of(level, program=next(numbers), versions=versions),
    )
    for _ in range(2):
        run(memory.start(store(), task))
    found = memory.measurements(store(), task.checkpoint_fingerprint)
    assert [one.program for one in found] == [222]
    assert memory.measurements(store(), task.checkpoint_fingerprint, "cuda") == []
    assert memory.measured_program(store(), "cpu", "bf16") == 222
    assert memory.measured_program(store(), "cpu", "int4") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chosen": ("int3",)}, "Precision 'int3' is not one"),
        ({"contexts": (9999,)}, "9999 tokens x 1, 4 rows cannot be measured."),
        ({"batches": (0,)}, "cannot be measured"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_job(tiny_checkpoint, given, message):
    with pytest.raises(GLMError, match=message):
        memory.plan(tiny_checkpoint, device="cpu", **given)


def test_the_export_has_a_row_per_point():
    text = memory.csv_text([level_of("bf16"), level_of("int4")])
    assert text.startswith("\ufeff")
    rows = list(csv.DictReader(io.StringIO(text[1:])))
    assert [(one["level"], one["context"], one["measured_peak"]) for one in rows] == [
        ("bf16", "64", "1000"), ("bf16", "128", ""), ("int4", "64", "1000"), ("int4", "128", ""),
    ]  # fmt: skip
    assert rows[0]["predicted_total"] == "1010" and float(rows[0]["deviation"]) == 0.01
    assert rows[1]["error"].startswith("It needs about")


# ---- quality


def test_the_same_rows_are_asked_at_every_level_and_changed_answers_are_listed(tiny_checkpoint, tmp_path):
    file = tmp_path / "rows.csv"
    lines = [f"text {i},{'yes' if i % 3 else 'no'}" for i in range(12)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    made = memory.start(store(), memory.plan(tiny_checkpoint, ("fp32", "int4"), (64,), (1,), "cpu"))
    asked = evaluate.plan(file, prompt="text", reference="label", method="likelihood")
    started = memory.start_quality(store(), made, asked)
    assert [one.task.precision for one in started] == ["fp32", "int4"]
    supervisor = Supervisor(store(), {"evaluate": evaluate.run})
    for one in started:
        supervisor.run(store().claim(("evaluate",), jobs.this_process(), one.id))
    runs = memory.quality_runs(store(), made.id)
    assert [one.task.precision for one in runs] == ["fp32", "int4"] and all(one.scores for one in runs)
    different, both, rows = memory.changed(store(), runs[0].id, runs[1].id)
    tables = [evaluate.per_row(store(), one.id) for one in runs]
    assert both == 12
    assert different == int((tables[0].answer != tables[1].answer).sum())
    assert [one.number for one in rows] == [
        int(n) for n, a, b in zip(tables[0].number, tables[0].answer, tables[1].answer, strict=True) if a != b
    ]
    assert all(one.question.startswith("text ") and one.answer != one.other for one in rows)


def test_a_level_that_another_beats_in_everything_is_not_among_the_best():
    points = [
        ("fp32", 4.0, 80.0, 5.0),
        ("bf16", 2.0, 80.0, 9.0),
        ("int8", 1.0, 79.0, 7.0),
        ("int4", 1.0, 70.0, 6.0),
    ]
    assert memory.best(points) == ["bf16", "int8"]
    assert memory.best([("a", 1.0, 1.0, 1.0), ("b", 1.0, 1.0, 1.0)]) == ["a", "b"]


# ---- the shell


def test_the_shell_predicts_every_level_without_weights(capsys):
    assert cli.main(["memory", "--model", "chatglm2-6b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["precision"] for one in found["predictions"]] == [*LEVELS, "int8-dynamic"]
    assert found["parameters"] == 6_243_584_000
    for one in found["predictions"]:
        assert one["total"] == sum(one["parts"].values()) > one["parts"]["weights"] > 3 << 30


def test_the_shell_says_what_fits_a_card(capsys):
    arguments = ["memory", "--model", "chatglm-6b", "--device", "cuda", "--card", "8", "--precision", "bf16,int4",
                 "--context", "512,2048"]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "bf16: 1 x 512 tokens need " in out and "int4: 1 x 2,048 tokens fit into 8 GB" in out


def test_the_shell_predicts_a_training(capsys):
    assert (
        cli.main(["memory", "--model", "chatglm2-6b", "--train", "lora", "--precision", "int4", "--json"])
        == 0
    )
    one = json.loads(capsys.readouterr().out)["predictions"][0]
    assert one["training"] == "lora" and one["parts"]["optimiser"] > 0


def test_the_shell_names_the_built_in_shapes_where_a_model_is_unknown(capsys):
    assert cli.main(["memory", "--model", "chatglm9"]) == 1
    assert "chatglm2-6b" in capsys.readouterr().err


def test_the_shell_measures_a_folder_and_does_not_do_it_twice(tiny_checkpoint, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(work, "measure", lambda folder, level, *rest: asked.append(level) or level_of(level))
    arguments = ["memory", "--model", str(tiny_checkpoint), "--measure", "--precision", "bf16,int4", "--context", "64",
                 "--batch", "1", "--device", "cpu", "--json"]  # fmt: skip
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["level"] for one in found["levels"]] == ["bf16", "int4"] and not found["errors"]
    assert cli.main(arguments) == 0
    assert asked == ["bf16", "int4"]
