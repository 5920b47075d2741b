"""After a training: is it better than its base and than a plain classifier, and what of the general ability is left?

The answer is report.json in the output folder. Facts of the training itself stand in manifest.json beside it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import metrics, statistics
from ..errors import GLMError
from . import probes
from .encoding import encode_all, encode_prompt
from .examples import Example, labels_of
from .preflight import peak_bytes
from .probes import Stop, Stopped
from .split import normalised
from .work import MANIFEST, FinetuneTask, load_data

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..checkpoints import LoadedModel
    from ..engine import Engine

REPORT = "report.json"
FORMAT = 1
MOST_ROWS = 1000  # dev rows that are measured
MOST_LABELS = 20
SEED = 0  # of the rows drawn and of the bootstrap
SURE = 1 - statistics.LEVEL
SHOWN = 20  # rows whose answers are kept to look at
TEXT_SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "char-rouge-l", "exact-match")
DECIDING = "rouge-l"
MARKS = "。.!！?？,，:：;；\"'“”‘’「」()（）[]【】"
NAMES = {
    "tuned": "Fine-tuned model",
    "base": "Base model, free answers",
    "base_choice": "Base model, likeliest label",
    "baseline": "TF-IDF baseline",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Measured:
    """What one model made of the dev rows and the probes."""

    answers: list[str]
    losses: list[tuple[float, int]]
    probed: probes.ProbeResult
    seconds: float  # of the answers alone
    device: str
    chosen: list[str] | None = None  # the likeliest label of every row


def make(folder: Path, say: Say | None = None, stop: Stop | None = None) -> dict[str, Any]:
    """Measure a finished training on its dev rows and on general questions; writes folder/report.json and returns it.

    The model is loaded once where the training left an adapter: its base then answers with the adapter switched
    off. Otherwise the base and the result are loaded one after the other.
    say     told what is being done, a sentence at a time
    stop    asked between batches; Stopped where it is true, and no report is written
    GLMError where there is no finished training, and where the data or the base are no longer those of the training.
    """
    folder = Path(folder).expanduser()
    started = time.perf_counter()
    tell = say or (lambda text: None)
    task, manifest = _read(folder)
    tell("Reading the dev rows ...")
    _check_data(task, manifest)
    _check_base(task, manifest)
    data = load_data(task)
    if len(data.dev) != manifest["rows"]["dev"] or len(data.train) != manifest["rows"]["train"]:
        raise GLMError(
            f"The data now gives {len(data.train):,} training rows and {len(data.dev):,} dev rows; the training had "
            f"{manifest['rows']['train']:,} and {manifest['rows']['dev']:,}.",
            "Measure again with the version of this program that trained it.",
        )
    dev = _drawn(data.dev)
    labels = _labels([one.response for one in (*data.train, *data.dev)])
    measured = _measure(folder, task, dev, labels, data.history, tell, stop)
    report: dict[str, Any] = {
        "format": FORMAT,
        "kind": "none" if not dev else "labels" if labels else "texts",
        "dev_rows": len(data.dev),
        "rows": len(dev),
        "seed": SEED,
        "notes": [],
    }
    if len(dev) < len(data.dev):
        report["notes"].append(
            f"Measured on {len(dev):,} of {len(data.dev):,} dev rows, drawn at random with seed {SEED}."
        )
    if dev and labels:
        report |= _labelled(data.train, dev, labels, measured, report["notes"], tell, stop)
    elif dev:
        report |= _worded(dev, measured, tell, stop)
    report["verdict"] = _verdict(report)
    report["dev_loss"] = _dev_loss(measured) if dev else None
    report["effect"] = _effect(measured, len(dev))
    report["forgetting"] = probes.compare(measured["base"].probed, measured["tuned"].probed).to_json()
    report["examples"] = _examples(dev, measured)
    report["training"] = {key: manifest.get(key) for key in ("seconds", "peak_bytes")}
    report["seconds"] = time.perf_counter() - started
    report["peak_bytes"] = peak_bytes(measured["tuned"].device)
    report["made"] = time.time()
    _write(folder / REPORT, report)
    tell(report["verdict"]["text"])
    return report


def read(folder: str | Path) -> dict[str, Any] | None:
    """The report of an output folder; None where there is none that this version can read."""
    try:
        found = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


# ------------------------------------------------------------------------------------------------ what is measured


def _read(folder: Path) -> tuple[FinetuneTask, dict[str, Any]]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        task = FinetuneTask.from_json(manifest["task"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GLMError(
            f"{folder} holds no training that could be measured: {MANIFEST} is missing or damaged.",
            "Choose the output folder of a training.",
        ) from error
    if manifest.get("state") != "done":
        raise GLMError(f"The training in {folder} is not finished.", "Resume it to its end, then measure it.")
    return task, manifest


def _check_data(task: FinetuneTask, manifest: Mapping[str, Any]) -> None:
    for part, name in (("train", task.train_file), ("dev", task.dev_file)):
        if not name:
            continue
        path, recorded = Path(name).expanduser(), manifest["data"].get(part, {}).get("sha256")
        if not path.is_file():
            raise GLMError(f"{path} is no longer there.", "Put the file back where the training read it.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if recorded and found != recorded:
            raise GLMError(
                f"{path} is no longer the file that the training read.",
                "Put that file back, or train again with the new one.",
            )


def _check_base(task: FinetuneTask, manifest: Mapping[str, Any]) -> None:
    from .. import checkpoints

    base = Path(task.checkpoint).expanduser()
    if not base.is_dir():
        raise GLMError(
            f"The base {base} is no longer there.", "Put the folder back where the training read it."
        )
    recorded = manifest["base"].get("fingerprint")
    if recorded and checkpoints.fingerprint(base) != recorded:
        raise GLMError(
            f"The base {base} is no longer the checkpoint that was trained on.",
            "Put that checkpoint back, or train again on the new one.",
        )


def _drawn(rows: Sequence[Example]) -> tuple[Example, ...]:
    """All rows, or so many of them in their order, the same ones each time."""
    if len(rows) <= MOST_ROWS:
        return tuple(rows)
    chosen = sorted(random.Random(SEED).sample(range(len(rows)), MOST_ROWS))
    return tuple(rows[i] for i in chosen)


def _labels(responses: Sequence[str]) -> tuple[str, ...]:
    """The classes, the commonest first; none where the responses are no classes."""
    counts = labels_of(responses)
    if counts is None or not 2 <= len(counts) <= MOST_LABELS:
        return ()
    return tuple(label for label, _ in counts.most_common())


def _measure(
    folder: Path,
    task: FinetuneTask,
    dev: Sequence[Example],
    labels: Sequence[str],
    history: bool,
    tell: Say,
    stop: Stop | None,
) -> dict[str, _Measured]:
    """The fine-tuned model ("tuned") and its base ("base")."""
    from .. import checkpoints

    base, precision = Path(task.checkpoint).expanduser(), task.plan.precision
    rest = (precision, task.device, task.generation or None)
    found: dict[str, _Measured] = {}
    adapter = task.plan.method.kind in ("lora", "p-tuning-v2")
    tell("Loading the fine-tuned model ...")
    with _loaded(checkpoints.load(folder, *rest, base if adapter else None)) as loaded:
        found["tuned"] = _answers(loaded, task, dev, (), history, "fine-tuned model", tell, stop)
        if adapter:
            with probes.without_adapter(loaded) as bare:
                found["base"] = _answers(bare, task, dev, labels, history, "base model", tell, stop)
    if not adapter:
        tell("Loading the base model ...")
        with _loaded(checkpoints.load(base, *rest)) as loaded:
            found["base"] = _answers(loaded, task, dev, labels, history, "base model", tell, stop)
    return found


@contextmanager
def _loaded(loaded: LoadedModel) -> Iterator[LoadedModel]:
    from .. import checkpoints

    try:
        yield loaded
    finally:
        checkpoints.release(loaded)
        gc.collect()


def _answers(
    loaded: LoadedModel,
    task: FinetuneTask,
    dev: Sequence[Example],
    labels: Sequence[str],
    history: bool,
    name: str,
    tell: Say,
    stop: Stop | None,
) -> _Measured:
    from ..engine import Engine

    tokenizer = loaded.tokenizer
    prompts = [
        tuple(encode_prompt(one, tokenizer, task.max_source, source_prefix=task.source_prefix)) for one in dev
    ]
    rows = encode_all(
        dev,
        tokenizer,
        task.max_source,
        task.max_target,
        source_prefix=task.source_prefix,
        history_column=history,
    )
    engine = Engine(loaded)
    try:
        if dev:
            tell(f"The {name} answers {len(dev):,} dev rows ...")
        started = time.perf_counter()
        answers = probes.answer(engine, prompts, task.max_target, stop)
        seconds = time.perf_counter() - started
        chosen = _chosen(engine, prompts, labels, stop) if labels and dev else None
        losses = probes.answer_losses(loaded, rows, stop)
        tell(f"The {name} answers {len(probes.general())} general questions ...")
        probed = probes.measure(engine, stop=stop)
    finally:
        engine.close()
    return _Measured(answers, losses, probed, seconds, loaded.device.type, chosen)


def _chosen(
    engine: Engine, prompts: Sequence[Sequence[int]], labels: Sequence[str], stop: Stop | None
) -> list[str]:
    """The label that the model finds likeliest as its whole answer, for every prompt."""
    endings = [engine.tokenizer.answer_ids(label) for label in labels]
    found: list[str] = []
    for start in range(0, len(prompts), 64):
        if stop is not None and stop():
            raise Stopped
        for scores in engine.score(prompts[start : start + 64], endings):
            found.append(labels[max(range(len(labels)), key=scores.__getitem__)])
    return found


# ------------------------------------------------------------------------------------------------ labels


def _labelled(
    train: Sequence[Example],
    dev: Sequence[Example],
    labels: Sequence[str],
    measured: Mapping[str, _Measured],
    notes: list[str],
    tell: Say,
    stop: Stop | None,
) -> dict[str, Any]:
    """Scores of all systems on the dev rows, and the fine-tuned model against each of the others."""
    from .baseline import fit_predict

    truth = [one.response for one in dev]
    tuned, base = measured["tuned"], measured["base"]
    said: dict[str, list[str | None]] = {
        "tuned": _as_labels(tuned.answers, labels),
        "base": _as_labels(base.answers, labels),
    }
    seconds = {"tuned": tuned.seconds, "base": base.seconds}
    if base.chosen is not None:
        said["base_choice"] = list(base.chosen)
    if stop is not None and stop():
        raise Stopped
    tell("Training the TF-IDF baseline on the same rows ...")
    description = ""
    try:
        plain = fit_predict(
            [_text(one) for one in train], [one.response for one in train], [_text(one) for one in dev]
        )
        said["baseline"], description = list(plain.predicted), plain.description
        seconds["baseline"] = plain.seconds_predict
    except GLMError as error:
        notes.append(str(error))
    systems = {
        name: _label_scores(truth, answers, labels) | {"name": NAMES[name]} for name, answers in said.items()
    }
    for name, spent in seconds.items():
        systems[name]["seconds_per_1000"] = spent / len(dev) * 1000
    if description:
        systems["baseline"]["description"] = description
    right = {name: [a == b for a, b in zip(answers, truth, strict=True)] for name, answers in said.items()}
    return {
        "labels": list(labels),
        "systems": systems,
        "comparisons": {
            name: statistics.mcnemar(right["tuned"], right[name]).to_json()
            for name in said
            if name != "tuned"
        },
    }


def _text(example: Example) -> str:
    """What the baseline reads: everything that was said before the response."""
    return "\n".join([*(text for one in example.history for text in one), example.prompt])


def _as_labels(answers: Sequence[str], labels: Sequence[str]) -> list[str | None]:
    """The label each answer is, but for width, case, spaces and the marks around it; None for any other answer."""
    index = {_bare(label): label for label in reversed(labels)}
    exact = set(labels)
    return [text.strip() if text.strip() in exact else index.get(_bare(text)) for text in answers]


def _bare(text: str) -> str:
    return normalised(text).strip(MARKS) or normalised(text)


def _label_scores(
    truth: Sequence[str], answers: Sequence[str | None], labels: Sequence[str]
) -> dict[str, Any]:
    import numpy as np

    found = metrics.classification(truth, answers, labels)
    index = {label: i for i, label in enumerate(labels)}
    codes = np.array([index[label] for label in truth])
    given = np.array([index.get(answer, len(labels)) if answer else len(labels) for answer in answers])
    accuracy = statistics.wilson(int((codes == given).sum()), len(truth))

    def macro(rows: npt.NDArray[np.int64]) -> float:
        return _macro_f1(codes[rows], given[rows], len(labels))

    interval = statistics.bootstrap(len(truth), macro, seed=SEED)
    return {
        "accuracy": accuracy.to_json(),
        "macro_f1": interval.to_json(),
        "n_outside": found.n_outside,
        "by_label": [vars(one) for one in found.by_label],
        "confusion": [list(row) for row in found.confusion],
        "outside": [list(one) for one in found.outside],
    }


def _macro_f1(truth: Any, given: Any, size: int) -> float:
    """metrics.classification's "macro-f1", from codes and fast enough for thousands of resamples."""
    import numpy as np

    support = np.bincount(truth, minlength=size + 1)[:size]
    counted = np.bincount(given, minlength=size + 1)[:size]
    hits = np.bincount(truth[truth == given], minlength=size + 1)[:size]
    present = support + counted > 0
    return float((2 * hits[present] / (support + counted)[present]).mean())


# ------------------------------------------------------------------------------------------------ texts


def _worded(
    dev: Sequence[Example], measured: Mapping[str, _Measured], tell: Say, stop: Stop | None
) -> dict[str, Any]:
    """Scores of generated texts, and the fine-tuned model against its base."""
    references = [one.response for one in dev]
    tell("Scoring the answers ...")
    scored: dict[str, metrics.TextScores] = {}
    for name in ("tuned", "base"):
        if stop is not None and stop():
            raise Stopped
        scored[name] = metrics.texts(measured[name].answers, references, TEXT_SCORES)
    systems: dict[str, Any] = {}
    for name, found in scored.items():
        systems[name] = {
            "name": NAMES[name],
            "scores": {
                score: statistics.bootstrap_mean(_known(found, score), seed=SEED).to_json()
                for score in TEXT_SCORES
            },
            "n_empty": found.n_empty,
            "seconds_per_1000": measured[name].seconds / len(dev) * 1000,
        }
    compared = {
        score: statistics.paired_bootstrap_mean(
            _known(scored["tuned"], score), _known(scored["base"], score), seed=SEED
        ).to_json()
        for score in TEXT_SCORES
    }
    return {"systems": systems, "comparisons": {"base": compared}}


def _known(found: metrics.TextScores, score: str) -> list[float]:
    return [value for value in found.rows[score] if value is not None]


# ------------------------------------------------------------------------------------------------ the rest


def _verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """kind "better", "undecided", "worse" or "none"; against the baseline, or the base where there is none."""
    rows = report["rows"]
    if report["kind"] == "none":
        return {
            "kind": "none", "against": "",
            "text": "There are no dev rows, so the training is not judged; hold some back with a dev share.",
        }  # fmt: skip
    systems = report["systems"]
    if report["kind"] == "texts":
        found = report["comparisons"]["base"][DECIDING]
        counts = f"ROUGE-L {_number(found['a'])} against {_number(found['b'])} on {rows:,} dev rows"
        kind = _sign(found["p_value"], found["difference"])
        texts = {
            "better": f"Better than the base: {counts} (p {_p(found['p_value'])}).",
            "worse": f"Worse than the base: {counts} (p {_p(found['p_value'])}); use the base.",
            "undecided": f"Not decided: {counts} (p {_p(found['p_value'])}); more dev rows would tell.",
        }
        return {"kind": kind, "against": "base", "text": texts[kind]}
    against = "baseline" if "baseline" in systems else "base_choice"
    found = report["comparisons"][against]
    mine, theirs = (systems[name]["accuracy"]["estimate"] for name in ("tuned", against))
    name = "TF-IDF baseline" if against == "baseline" else "base"
    counts = f"{mine:.1%} of {rows:,} dev rows are right, {theirs:.1%} with the {name}"
    kind = _sign(found["p_value"], found["difference"])
    use = "baseline" if against == "baseline" else "base"
    texts = {
        "better": f"Better than the {use}: {counts} (p {_p(found['p_value'])}).",
        "worse": f"Worse: use the {use}. {counts} (p {_p(found['p_value'])}).",
        "undecided": f"Not decided against the {use}: {counts} (p {_p(found['p_value'])}).",
    }
    return {"kind": kind, "against": against, "text": texts[kind]}


def _sign(p_value: float | None, difference: float | None) -> str:
    if p_value is None or difference is None or p_value >= SURE or difference == 0:
        return "undecided"
    return "better" if difference > 0 else "worse"


def _dev_loss(measured: Mapping[str, _Measured]) -> dict[str, Any]:
    """Mean cross entropy of the tokens that count, in nats, and the paired change of the rows' means."""
    found: dict[str, Any] = {}
    for name in ("tuned", "base"):
        losses = measured[name].losses
        found[name] = sum(total for total, _ in losses) / max(1, sum(count for _, count in losses))
    means = {
        name: [total / max(1, count) for total, count in measured[name].losses] for name in ("tuned", "base")
    }
    found["per_row"] = statistics.paired_bootstrap_mean(means["tuned"], means["base"], seed=SEED).to_json()
    return found


def _effect(measured: Mapping[str, _Measured], rows: int) -> dict[str, Any]:
    """How many answers the training changed at all."""
    base, tuned = measured["base"], measured["tuned"]
    changed = sum(a != b for a, b in zip(base.answers, tuned.answers, strict=True))
    probed = sum(a != b for a, b in zip(base.probed.answers, tuned.probed.answers, strict=True))
    total = len(base.probed.answers)
    if changed or probed:
        text = f"The training changed {changed:,} of {rows:,} dev answers and {probed} of {total} general answers."
    else:
        text = "The training changed no answer: it may have been too short, or its learning rate too low."
    return {
        "dev_changed": changed, "dev_rows": rows, "share": statistics.wilson(changed, rows).to_json(),
        "probes_changed": probed, "probes": total, "text": text,
    }  # fmt: skip


def _examples(dev: Sequence[Example], measured: Mapping[str, _Measured]) -> list[dict[str, Any]]:
    """Some dev rows with all answers, those first that the training changed."""
    base, tuned = measured["base"].answers, measured["tuned"].answers
    order = sorted(range(len(dev)), key=lambda i: (base[i] == tuned[i], i))[:SHOWN]
    return [
        {"line": dev[i].line, "prompt": dev[i].prompt, "expected": dev[i].response, "base": base[i], "tuned": tuned[i]}
        for i in order
    ]  # fmt: skip


def _write(path: Path, report: Mapping[str, Any]) -> None:
    """Beside and renamed, so that no reader sees half a report."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


# ------------------------------------------------------------------------------------------------ in words


def text(report: Mapping[str, Any]) -> list[str]:
    """The report as sentences for the shell, the verdict first."""
    lines = [report["verdict"]["text"]]
    for system in report.get("systems", {}).values():
        if report["kind"] == "labels":
            line = f"{system['name']}: accuracy {_range(system['accuracy'], 100)} %, macro F1 {_range(system['macro_f1'], 100)}"
            if system["n_outside"]:
                line += f"; {system['n_outside']:,} answers are no label"
            lines.append(line + ".")
            if system.get("description"):
                lines.append(system["description"])
        else:
            scores = ", ".join(
                f"{name.upper()} {_range(value)}"
                for name, value in system["scores"].items()
                if name in metrics.REFERENCE
            )
            lines.append(f"{system['name']}: {scores}.")
    if loss := report.get("dev_loss"):
        lines.append(f"Dev loss {loss['tuned']:.4f}, of the base {loss['base']:.4f}.")
    lines += [report["effect"]["text"], report["forgetting"]["text"]]
    if broke := report["forgetting"]["broke"]:
        shown = "; ".join(f"{one['prompt']} -> {one['after'][:40]}" for one in broke[:3])
        lines.append(f"No longer right, for example: {shown}")
    lines += report["notes"]
    lines.append(
        f"Measured in {report['seconds']:.0f} s; at most {report['peak_bytes'] / 2**20:,.0f} MB of memory in use."
    )
    return lines


def _range(interval: Mapping[str, Any], factor: float = 1) -> str:
    """ "93.1 (91.2 to 94.6)"."""
    value, low, high = (interval[key] for key in ("estimate", "low", "high"))
    if value is None:
        return "unknown"
    if low is None or high is None:
        return f"{value * factor:.1f}"
    return f"{value * factor:.1f} ({low * factor:.1f} to {high * factor:.1f})"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return "unknown"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
