"""Hand-written sources under data/sources -> seeded, stratified splits under data/, written once."""

from __future__ import annotations

import csv
import json
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import GLMError
from ..settings import DATA

SEED = 20_261_120
SOURCES = DATA / "sources"
SHARES = (("test", 0.12), ("dev", 0.08))  # the rest is train
LABELS = ("spam", "normal")
ANSWERS = {"spam": "垃圾", "normal": "正常"}  # what a checkpoint fine-tuned on the comments says
NEAR = 0.6  # texts that share this part of their character trigrams go to the same side
ADVERTS = 1800

T = TypeVar("T")


@dataclass(frozen=True)
class Comment:
    """One comment of a site: what it says, whether it is spam, its language and kind."""

    text: str
    label: str
    language: str
    kind: str
    batch: int = 1  # written in the first, second, ... round; an earlier round keeps its split


@dataclass(frozen=True)
class Intent:
    """One thing a user may say, in several wordings, and what glm-mini answers."""

    id: str
    lang: str
    topic: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]  # a right answer has one of every group
    held_out: str  # a wording that is in no training text


def normalised(text: str) -> str:
    """What counts when two texts are compared: letters and characters, every digit as 0, no case or width."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"\d", "0", "".join(c for c in text if c.isalnum()))


def intents() -> list[Intent]:
    """Every intent of data/sources/dialogue, checked: ids unique, no wording twice, answers match their keywords."""
    found: list[Intent] = []
    for path in sorted((SOURCES / "dialogue").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            raw: dict[str, Any] = json.loads(line)
            intent = Intent(
                raw["id"], raw["lang"], raw["topic"], tuple(raw["questions"]), tuple(raw["answers"]),
                tuple(tuple(group) for group in raw["keywords"]), raw["held_out"],
            )  # fmt: skip
            wrong = [answer for answer in intent.answers if not is_right(answer, intent)]
            if wrong:
                raise GLMError(
                    f"{path.name} line {number}: the answer {wrong[0]!r} misses its own keywords.", "Fix it."
                )
            found.append(intent)
    if len({intent.id for intent in found}) != len(found):
        raise GLMError("data/sources/dialogue has an id twice.", "Rename one of them.")
    asked = {q.strip().lower() for intent in found for q in intent.questions}
    # A held-out wording that some other file happens to train on would be no test.
    return [intent for intent in found if intent.held_out.strip().lower() not in asked]


def is_right(answer: str, intent: Intent) -> bool:
    """Whether an answer has one keyword of every group and is written in the intent's language."""
    lowered = answer.lower()
    return language_of(answer) == intent.lang and all(
        any(word.lower() in lowered for word in group) for group in intent.keywords
    )


def language_of(text: str) -> str:
    """ "zh" if Chinese characters outnumber English words, else "en".

    Names of formats, programs and commands (CSV, GLM-mini, `make run`) belong to no language and are not counted.
    """
    text = re.sub(r"`[^`]*`|[\w.:/=()-]*[_./\d=(-][\w.:/=()-]*", " ", text, flags=re.ASCII)
    han = len(re.findall(r"[\u4e00-\u9fff]", text))
    words = len(re.findall(r"\b[A-Za-z]?[a-z]+\b", text))
    return "zh" if han > words else "en"


def comments() -> list[Comment]:
    """Every comment of data/sources/comments once; the same text with two labels is refused."""
    found: dict[str, Comment] = {}
    for path in sorted((SOURCES / "comments").glob("*.tsv"), key=lambda p: (p.stem.count("_"), p.stem)):
        language, label, *later = path.stem.split("_")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            kind, _, text = line.partition("\t")
            if not text.strip():
                raise GLMError(f"{path.name} line {number} has no text.", "Write kind, TAB, text.")
            comment = Comment(text.strip(), label, language, kind, int(later[0]) if later else 1)
            # A text of emoji and marks alone normalises to nothing; it is compared as it is.
            other = found.setdefault(normalised(comment.text) or comment.text, comment)
            if other.label != label:
                raise GLMError(
                    f"{path.name} line {number}: {text!r} is also labelled {other.label}.", "Keep one."
                )
    return list(found.values())


def near_groups(texts: Sequence[str]) -> list[int]:
    """A group number per text; texts that share most of their character trigrams get the same one."""
    grams = [frozenset(n[i : i + 3] for i in range(max(1, len(n) - 2))) for n in map(normalised, texts)]
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    holders: dict[str, list[int]] = defaultdict(list)
    for i, own in enumerate(grams):
        shared: dict[int, int] = defaultdict(int)
        for gram in own:
            for j in holders[gram][-200:]:  # a gram in hundreds of texts tells nothing
                shared[j] += 1
            holders[gram].append(i)
        for j, n in shared.items():
            if n / (len(own) + len(grams[j]) - n) >= NEAR:
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(texts))]


def split(
    items: Sequence[T], stratum: Sequence[Hashable], group: Sequence[int], seed: int = SEED
) -> dict[str, list[T]]:
    """Train, dev and test with the same share of every stratum; a group stays on one side, seeded."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(group):
        members[g].append(i)
    strata: dict[Hashable, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        strata[stratum[rows[0]]].append(rows)
    parts: dict[str, list[T]] = {"train": [], "dev": [], "test": []}
    generator = random.Random(seed)
    for key in sorted(strata, key=repr):
        groups = sorted(strata[key])
        generator.shuffle(groups)
        total = sum(map(len, groups))
        for name, share in SHARES:
            taken = 0
            while groups and taken + len(groups[-1]) / 2 < share * total:
                rows = groups.pop()
                taken += len(rows)
                parts[name] += [items[i] for i in rows]
        parts["train"] += [items[i] for rows in groups for i in rows]
    return parts


def split_comments(rows: Sequence[Comment]) -> dict[str, list[Comment]]:
    """`split` round by round: a later round moves no earlier comment, and its near copies of one join that side."""
    group = near_groups([comment.text for comment in rows])
    side: dict[int, str] = {}
    parts: dict[str, list[Comment]] = {"train": [], "dev": [], "test": []}
    for batch in sorted({comment.batch for comment in rows}):
        own = [i for i, comment in enumerate(rows) if comment.batch == batch]
        fresh = [i for i in own if group[i] not in side]
        keys = [(rows[i].language, rows[i].label, rows[i].kind) for i in fresh]
        for name, members in split(fresh, keys, [group[i] for i in fresh]).items():
            side |= dict.fromkeys((group[i] for i in members), name)
        for i in own:
            parts[side[group[i]]].append(rows[i])
    return parts


def adverts(seed: int = SEED) -> list[dict[str, str]]:
    """Attribute-to-advert pairs: the hand-written ones, then compositions of the phrase bank, all distinct."""
    bank = json.loads((SOURCES / "adverts" / "phrases.json").read_text(encoding="utf-8"))
    pairs = {pair["content"]: pair for pair in bank["handwritten"]}
    generator = random.Random(seed)
    conflicts: dict[str, list[set[str]]] = defaultdict(list)
    for conflict in bank["conflicts"]:
        conflicts[conflict["type"]].append(set(conflict["pair"]))
    names = sorted(bank["types"])
    while len(pairs) < ADVERTS:
        name = generator.choice(names)
        garment = bank["types"][name]
        chosen = generator.sample(
            sorted(garment["attributes"]), generator.randint(2, min(4, len(garment["attributes"])))
        )
        values = {
            attribute: generator.choice(sorted(garment["attributes"][attribute])) for attribute in chosen
        }
        if any(conflict <= {f"{a}#{v}" for a, v in values.items()} for conflict in conflicts[name]):
            continue
        content = "*".join([f"类型#{name}", *(f"{attribute}#{value}" for attribute, value in values.items())])
        phrases = [
            generator.choice(garment["attributes"][attribute][value]) for attribute, value in values.items()
        ]
        middle = "，".join(phrases[:2]) + "。" + ("，".join(phrases[2:]) + "。" if phrases[2:] else "")
        opening, closing = generator.choice(garment["openings"]), generator.choice(garment["closings"])
        summary = f"{_sentence(opening)}{middle}{_sentence(closing)}"
        pairs.setdefault(content, {"content": content, "summary": summary})
    return list(pairs.values())


def _sentence(text: str) -> str:
    return text if text[-1] in "。！？" else text.rstrip("，") + "。"


def build() -> dict[str, dict[str, int]]:
    """Write every split under data/; returns the number of rows of each. Same sources, same bytes."""
    counts: dict[str, dict[str, int]] = {}
    parts = split_comments(comments())
    for name, part in parts.items():
        table: list[Comment] = []  # round after round, so that a later one moves no row of an earlier one
        for batch in sorted({comment.batch for comment in part}):
            own = sorted((c for c in part if c.batch == batch), key=lambda c: normalised(c.text))
            random.Random(SEED).shuffle(own)
            table += own
        header = ("text", "label", "language", "kind", "batch", "answer")
        lines = [(c.text, c.label, c.language, c.kind, str(c.batch), ANSWERS[c.label]) for c in table]
        _write_csv(DATA / "comments" / f"{name}.csv", header, lines)
    counts["comments"] = {name: len(part) for name, part in parts.items()}

    known = intents()
    generator = random.Random(SEED)
    shuffled = sorted(known, key=lambda intent: intent.id)
    generator.shuffle(shuffled)
    half = len(shuffled) // 2
    exchanges = [
        {"id": intent.id, "lang": intent.lang, "topic": intent.topic, "prompt": question, "response": answer}
        for intent in known
        for question in intent.questions
        for answer in intent.answers
    ]
    held_out = {"dev": shuffled[:half], "test": shuffled[half:]}
    _write_jsonl(DATA / "dialogue" / "train.jsonl", exchanges)
    for name, kept in held_out.items():
        held = [
            {"id": i.id, "lang": i.lang, "topic": i.topic, "prompt": i.held_out, "keywords": i.keywords}
            for i in kept
        ]
        _write_jsonl(DATA / "dialogue" / f"{name}.jsonl", sorted(held, key=lambda line: str(line["id"])))
    counts["dialogue"] = {"train": len(exchanges)} | {name: len(kept) for name, kept in held_out.items()}

    pairs = adverts()
    types = [pair["content"].split("*")[0] for pair in pairs]
    for name, adverts_part in split(pairs, types, list(range(len(pairs)))).items():
        _write_jsonl(DATA / "adverts" / f"{name}.jsonl", adverts_part)
        counts.setdefault("adverts", {})[name] = len(adverts_part)
    return counts


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_comments(name: str) -> list[Comment]:
    """The comments of one written split: "train", "dev" or "test"."""
    with (DATA / "comments" / f"{name}.csv").open(encoding="utf-8-sig", newline="") as file:
        return [
            Comment(row["text"], row["label"], row["language"], row["kind"], int(row["batch"]))
            for row in csv.DictReader(file)
        ]


def _write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
