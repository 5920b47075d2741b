"""A seeded split into train, dev and test rows that keeps copies, and the answers of one conversation, together."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GLMError
from .examples import Example, labels_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SEPARATOR = "\x1f"  # between texts that are hashed together


@dataclass(frozen=True)
class Split:
    """Positions of the rows of each part, in the order of the input."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    test: tuple[int, ...] = ()


def normalised(text: str) -> str:
    """A text without differences of width, letter case and spaces: ＡＢ　c and abc are the same."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(*texts: str) -> int:
    """64 bits that are the same in every run and on every machine."""
    digest = hashlib.blake2b(SEPARATOR.join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def question_keys(examples: Sequence[Example]) -> npt.NDArray[np.uint64]:
    """A hash of what is asked in each example, earlier rounds included, after `normalised`."""
    import numpy as np

    keys = (
        text_hash(*(normalised(text) for one in example.history for text in one), normalised(example.prompt))
        for example in examples
    )
    return np.fromiter(keys, dtype=np.uint64, count=len(examples))


def split(
    examples: Sequence[Example], dev_share: float = 0.1, test_share: float = 0.0, seed: int = 42
) -> Split:
    """Split by the given shares; where the responses are classes, each class by itself.

    Examples that ask the same after `normalised`, and the answers of one conversation of a file, stay together.
    Which part they go to depends on the seed and the texts only, not on the order of the rows; but the place of a
    row that shares its conversation with others is found by its line. Every class keeps a row in train. A part can
    be a little smaller than its share, where a large group of copies does not fit into it. GLMError for shares
    outside 0 to 1, and where there are fewer different questions than parts.
    """
    import numpy as np

    if not (0 <= dev_share < 1 and 0 <= test_share < 1 and dev_share + test_share < 1):
        raise GLMError(
            f"A dev share of {dev_share:g} and a test share of {test_share:g} leave nothing to train on.",
            "Choose shares from 0 to below 1, together below 1.",
        )
    groups = _groups(examples)
    names, first, inverse, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    parts = 1 + (dev_share > 0) + (test_share > 0)
    if len(names) < parts:
        raise GLMError(
            f"Different questions are too few for {parts} parts: {len(names):,}.",
            "Add rows, or choose fewer parts.",
        )
    strata = _strata(examples, inverse, first, sizes)
    prefix = seed.to_bytes(16, "little", signed=True)
    rank = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(prefix + name.tobytes(), digest_size=8).digest(), "little")
            for name in names
        ),
        dtype=np.uint64,
        count=len(names),
    )
    part = np.zeros(len(names), dtype=np.int8)  # of every group: 0 train, 1 dev, 2 test
    members = {label: np.flatnonzero(strata == label) for label in np.unique(strata)}
    rows = {label: int(sizes[found].sum()) for label, found in members.items()}
    kept = {label: count - 1 for label, count in rows.items()}
    for number, share in ((2, test_share), (1, dev_share)):
        quota = _quotas(rows, kept, share, len(examples))
        for label, found in members.items():
            room = quota[label]
            for group in found[np.lexsort((names[found], rank[found]))]:
                if room <= 0:
                    break
                if part[group] == 0 and sizes[group] <= room:
                    part[group] = number
                    room -= int(sizes[group])
            kept[label] -= quota[label] - room
    of_row = part[inverse]
    train, dev, test = (tuple(np.flatnonzero(of_row == number).tolist()) for number in (0, 1, 2))
    return Split(train, dev, test)


def _quotas(rows: dict[int, int], kept: dict[int, int], share: float, total: int) -> dict[int, int]:
    """Rows of every class for a part: its share rounded down, and what is missing where most was rounded away."""
    wanted = max(1, round(share * total)) if share else 0
    quota = {label: min(kept[label], int(share * count)) for label, count in rows.items()}
    by_rest = sorted(rows, key=lambda label: (-(share * rows[label] % 1), label))
    while sum(quota.values()) < wanted:
        before = sum(quota.values())
        for label in by_rest:
            if sum(quota.values()) < wanted and quota[label] < kept[label]:
                quota[label] += 1
        if sum(quota.values()) == before:
            break
    return quota


def _groups(examples: Sequence[Example]) -> npt.NDArray[np.uint64]:
    """The smallest key of the questions that must stay together, for every row."""
    import numpy as np

    keys = question_keys(examples)
    lines = np.fromiter((example.line for example in examples), dtype=np.int64, count=len(examples))
    shared, counts = np.unique(lines, return_counts=True)
    several = shared[(counts > 1) & (shared > 0)]
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.get(key, key) != key:
            parent[key] = key = parent.get(parent[key], parent[key])
        return key

    conversations: dict[tuple[int, str], int] = {}
    for i in np.flatnonzero(np.isin(lines, several)).tolist():
        example = examples[i]
        opening = example.history[0][0] if example.history else example.prompt
        key = root(int(keys[i]))
        other = root(conversations.setdefault((example.line, opening), key))
        if other != key:
            parent[max(key, other)] = min(key, other)
    if parent:
        keys = np.fromiter((root(key) for key in keys.tolist()), dtype=np.uint64, count=len(keys))
    return keys


def _strata(
    examples: Sequence[Example],
    inverse: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """A number for the class of every group, by its commonest response; all 0 where responses are no classes."""
    import numpy as np

    counts = labels_of([example.response for example in examples])
    if counts is None:
        return np.zeros(len(sizes), dtype=np.int64)
    code = {label: number for number, label in enumerate(sorted(counts))}
    codes = np.fromiter((code[example.response] for example in examples), dtype=np.int64, count=len(examples))
    strata = codes[first]
    larger = np.flatnonzero(sizes > 1)
    if len(larger):
        votes: dict[int, Counter[int]] = {group: Counter() for group in larger.tolist()}
        for i in np.flatnonzero(sizes[inverse] > 1).tolist():
            votes[int(inverse[i])][int(codes[i])] += 1
        for group, vote in votes.items():
            strata[group] = min(vote, key=lambda label: (-vote[label], label))
    return strata
