"""Log-probabilities of given answers: every label of every row from one prefill, beside whatever else the engine does.

The answers form a tree by their first tokens. It is fed in the last columns of the prompt, each token seeing the
prompt and its own ancestors only, so a row needs one forward however many answers there are. What all prompts begin
with is computed once and stays in a cache in front of the rows; ChatGLM-6B reads its prompt in both directions, so
there every prompt is computed whole.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .engine import Engine, KVCache, Request, out_of_memory
from .errors import GLMError

if TYPE_CHECKING:
    from torch import Tensor

NODES = 64  # of the tree that are fed at once
PIECE_SECONDS = 0.2  # of one forward: a chat request waits for no more than that
LOGITS_BYTES = 256 << 20  # of one forward, in fp32
ROW_TOKENS = 1024  # the engine's most rows may have so many columns each
GROUPS_AHEAD = 2  # so that the model does not wait while results are taken over
CHAT_SHARE = 4  # while somebody chats, a forward takes this part of its usual time
ROOM = 32  # columns; the shared cache grows in steps of this


@dataclass(frozen=True)
class Scores:
    """The log-probability of every answer to one prompt, in nats, end token included where the answer has one.

    outside   probability that none of the answers is given: 1 minus the sum of theirs
    greedy    the answer that the likeliest token at every step leads to; None where it leads to none of them
    seconds   of computing, the row's share
    values is empty where a server gave no probabilities: `greedy` is then all there is.
    error     why a server gave no answer to this prompt; shortened: whether it cut the prompt
    """

    values: tuple[float, ...]
    outside: float
    greedy: int | None
    seconds: float = 0.0
    error: str = ""
    shortened: bool = False

    @property
    def usable(self) -> bool:
        """False where the model's numbers left the range of its precision."""
        return not any(map(math.isnan, self.values))


class _Tree:
    """Some answers by their first tokens; a node is a token that another one follows, node 0 the prompt's last."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = [-1]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.edges: dict[tuple[int, int], int] = {}  # (node, next token) -> number
        self.paths: list[list[int]] = []  # edges of every answer
        self.ends: dict[int, int] = {}  # edge -> the answer that ends with it
        self.followed: dict[int, int] = {}  # edge -> the node behind it
        for number, answer in enumerate(answers):
            node, path = 0, []
            for place, token in enumerate(answer):
                edge = self.edges.setdefault((node, token), len(self.edges))
                path.append(edge)
                if place + 1 == len(answer):
                    self.ends.setdefault(edge, number)
                    break
                if edge not in self.followed:
                    self.followed[edge] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(place + 1)
                node = self.followed[edge]
            self.paths.append(path)

    def __len__(self) -> int:
        """Nodes that have to be fed, the prompt's last token not counted."""
        return len(self.tokens) - 1

    def visible(self) -> Tensor:
        """Which nodes each node sees, (nodes, nodes) bool: its ancestors and itself."""
        import torch

        seen = torch.eye(len(self), dtype=torch.bool)
        for node in range(1, len(self.tokens)):
            if parent := self.parents[node]:
                seen[node - 1] |= seen[parent - 1]
        return seen


def _trees(answers: Sequence[Sequence[int]]) -> list[tuple[list[int], _Tree]]:
    """The answers in trees of at most NODES nodes (one long answer may have more), with their numbers."""
    # Those that begin alike stay together.
    order = sorted(range(len(answers)), key=lambda i: tuple(answers[i]))
    parts: list[list[int]] = [[]]
    nodes = 0
    for number in order:
        last = answers[parts[-1][-1]] if parts[-1] else ()
        shared = len(os.path.commonprefix([list(last), list(answers[number])]))
        more = len(answers[number]) - 1 - shared
        if parts[-1] and nodes + more > NODES:
            parts.append([])
            nodes, more = 0, len(answers[number]) - 1
        parts[-1].append(number)
        nodes += max(0, more)
    return [(part, _Tree([answers[i] for i in part])) for part in parts]


class Scorer:
    """Scores the same answers for any number of prompts; the head they share is computed once.

    Rows of like length are computed together, left-padded, in pieces of at most a quarter of a second between the
    engine's steps. One thread may use a scorer at a time; the engine may serve others meanwhile.
    """

    def __init__(self, engine: Engine, answers: Sequence[Sequence[int]], head: Sequence[int] = ()) -> None:
        """`head`: ids that most prompts begin with; a prompt that does not is computed without it."""
        if not answers or not all(answers):
            raise ValueError("an answer has no token")
        self.engine = engine
        self.answers = [list(answer) for answer in answers]
        self.head = () if engine.whole_prompts else tuple(head)
        self.seconds = 0.0  # of computing, for the speed of a run
        self._trees = _trees(self.answers)
        self._distinct = sorted({tuple(answer): i for i, answer in enumerate(self.answers)}.values())
        self._speed = 0.0  # columns per second, as measured here
        self._most = engine.max_rows
        self._known: KVCache | None = None  # the head, one row
        self._space: dict[int, _Space] = {}  # by the length of the head in it
        vocabulary = int(engine.model.config.vocab_size)
        nodes = 1 + max(len(tree) for _, tree in self._trees)
        self._most_by_logits = max(1, LOGITS_BYTES // (4 * vocabulary * nodes))

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Scores]:
        """The scores of every prompt, in their order. GLMError for a prompt that does not fit, or the model."""
        found = dict(self.each(prompts))
        return [found[i] for i in range(len(prompts))]

    def each(
        self, prompts: Sequence[Sequence[int]], stop: threading.Event | None = None
    ) -> Iterator[tuple[int, Scores]]:
        """(number of the prompt, its scores) as they are computed, long prompts first; fewer once `stop` is set."""
        for prompt in prompts:
            self.engine.check(Request(tuple(prompt)))
        shared = len(self.head)
        fits = [len(p) > shared and tuple(p[:shared]) == self.head for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (not fits[i], -len(prompts[i])))
        waiting, running = deque(order), deque[tuple[list[int], list[Future[_Found | None]]]]()
        try:
            while waiting or running:
                while waiting and len(running) < GROUPS_AHEAD and not (stop is not None and stop.is_set()):
                    group = self._next_group(waiting, prompts, fits)
                    running.append((group, self._submit([prompts[i] for i in group], fits[group[0]])))
                if not running:
                    return
                group, parts = running.popleft()
                try:
                    results = [part.result() for part in parts]
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    self._shrink(len(group), max(len(prompts[i]) for i in group))
                    waiting.extendleft(reversed(group))
                    continue
                yield from zip(group, self._joined([one for one in results if one is not None]), strict=True)
        finally:
            for _, parts in running:
                for part in parts:
                    part.cancel()

    def _next_group(
        self, waiting: deque[int], prompts: Sequence[Sequence[int]], fits: Sequence[bool]
    ) -> list[int]:
        """The next prompts to compute together: as many of the longest one's length as a forward has time for."""
        first = waiting[0]
        shared = len(self.head) if fits[first] else 0
        nodes = max(len(tree) for _, tree in self._trees)
        width = len(prompts[first]) - shared + nodes
        columns = self.engine.virtual + shared + width
        rows = min(
            self._tokens() // width,
            self._most,
            self._most_by_logits,
            self.engine.max_rows * ROW_TOKENS // columns,
        )
        group: list[int] = []
        while waiting and len(group) < max(1, rows) and fits[waiting[0]] == fits[first]:
            group.append(waiting.popleft())
        return group

    def _tokens(self) -> int:
        """How many columns may be fed at once: less while somebody chats, whose tokens come in between."""
        speed = self._speed * PIECE_SECONDS if self._speed else self.engine.forward_tokens()
        return max(1, int(speed / CHAT_SHARE if self.engine.chatting else speed))

    def _submit(self, prompts: list[Sequence[int]], fits: bool) -> list[Future[_Found | None]]:
        """Queue the forwards of some prompts, each a piece of work of its own."""
        whole = [list(prompt) for prompt in prompts]
        work = _Work(self, whole, len(self.head) if fits else 0)
        parts: list[Future[_Found | None]] = []
        if fits and self.head and self._known is None:
            parts += self._compute_head()
        limit = self.engine.forward_columns(len(whole), work.width)
        for begin in range(0, work.width - 1, limit):
            end = min(work.width - 1, begin + limit)
            if end == work.width - 1 and end - begin + len(self._trees[0][1]) < 2 * limit:
                break  # the rest comes with the first tree
            parts.append(self.engine.later(partial(work.feed, end)))
        for place in range(len(self._trees)):
            parts.append(self.engine.later(partial(work.tree, place)))
        return parts

    def _compute_head(self) -> list[Future[_Found | None]]:
        """Queue the forwards of the shared head, unless the engine's prefix cache knows it."""
        head = self.head

        def look() -> _Found | None:
            known, entry = self.engine.prefixes.longest(head)
            if known == len(head) and entry is not None:
                self._known = entry
            return None

        def feed(cache: KVCache, begin: int, end: int) -> _Found | None:
            import torch

            if self._known is not None:
                return None
            device = self.engine.device
            ids = torch.tensor([head[begin:end]], device=device)
            positions = torch.arange(begin, end, device=device)[None]
            real = torch.ones(1, self.engine.virtual + end, dtype=torch.bool, device=device)
            self.engine.forward(cache, ids, positions, real)
            if end == len(head):
                self.engine.prefixes.put(head, cache)
                self._known = cache
            return None

        parts: list[Future[_Found | None]] = [self.engine.later(look)]
        cache = self.engine.empty_cache(1)
        cache.room = 0
        limit = self.engine.forward_tokens()
        for begin in range(0, len(head), limit):
            parts.append(self.engine.later(partial(feed, cache, begin, min(len(head), begin + limit))))
        return parts

    def _joined(self, found: list[_Found]) -> list[Scores]:
        """The scores of some rows from those of each tree."""
        rows = len(found[0].values)
        seconds = sum(part.seconds for part in found) / rows
        results = []
        for row in range(rows):
            values = [0.0] * len(self.answers)
            greedy: int | None = None
            for (numbers, _), part in zip(self._trees, found, strict=True):
                for number, value in zip(numbers, part.values[row], strict=True):
                    values[number] = value
                reached = part.greedy[row]
                greedy = greedy if reached is None else numbers[reached]
            inside = math.fsum(math.exp(values[i]) for i in self._distinct)
            outside = min(1.0, max(0.0, 1.0 - inside))
            results.append(Scores(tuple(values), outside, greedy, seconds))
        return results

    def _measured(self, columns: int, seconds: float) -> None:
        self.seconds += seconds
        if columns >= 64:
            speed = columns / max(seconds, 1e-6)
            self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed

    def _shrink(self, rows: int, longest: int) -> None:
        """After memory ran out: fewer rows at a time. GLMError where it was one row."""
        self._space.clear()
        if rows == 1:
            raise GLMError(
                f"Memory ran out on a prompt of {longest} tokens.",
                "Shorten the text or the history, close other programs, or load the model in a lower precision.",
            )
        self._most = rows // 2


@dataclass
class _Found:
    """What one tree gave: per row a number for each of its answers, and which of them greedy decoding reaches."""

    values: list[list[float]]
    greedy: list[int | None]
    seconds: float = 0.0


class _Space:
    """Memory for the keys and values of the rows, used again for every group; the head's columns are written once."""

    def __init__(self, first: KVCache, known: int, rows: int, columns: int) -> None:
        self.rows, self.columns, self.known = rows, columns, known
        self.cache = KVCache(len(first.keys))
        for mine, theirs in ((first.keys, self.cache.keys), (first.values, self.cache.values)):
            for layer, tensor in enumerate(mine):
                theirs[layer] = tensor.new_empty(rows, tensor.shape[1], columns, tensor.shape[3])
                theirs[layer][:, :, :known] = tensor[:, :, :known]

    def view(self, rows: int) -> KVCache:
        """A cache over the first rows that holds the head."""
        cache = KVCache(len(self.cache.keys))
        cache.keys = [tensor[:rows] for tensor in self.cache.keys]
        cache.values = [tensor[:rows] for tensor in self.cache.values]
        cache.length = self.known
        return cache


class _Work:
    """The forwards of one group of prompts, in the order they are queued."""

    def __init__(self, scorer: Scorer, prompts: list[list[int]], shared: int) -> None:
        self.scorer, self.prompts, self.shared = scorer, prompts, shared
        self.width = max(map(len, prompts)) - shared
        self.done = 0  # columns fed
        self.seconds = 0.0
        self.cache: KVCache | None = None

    def feed(self, end: int) -> _Found | None:
        """Feed the columns up to `end`, without a look at what they give."""
        started = time.monotonic()
        if self.cache is None:
            self._begin()
        assert self.cache is not None
        engine, known = self.scorer.engine, self.scorer.engine.virtual + self.shared
        begin, self.done = self.done, end
        engine.forward(
            self.cache, self.ids[:, begin:end], self.positions[:, begin:end], self.real[:, : known + end], self.layout
        )  # fmt: skip
        self._measure(end - begin, started)
        return None

    def tree(self, place: int) -> _Found:
        """Feed what is left of the prompts and one tree of answers behind them; returns the answers' scores."""
        import torch

        started = time.monotonic()
        if self.cache is None:
            self._begin()
        assert self.cache is not None
        engine, tree = self.scorer.engine, self.scorer._trees[place][1]
        known, rows, nodes = engine.virtual + self.shared, len(self.prompts), len(tree)
        begin = min(self.done, self.width - 1)  # each tree stands behind the last token, which is fed again
        self.cache.length, self.done = known + begin, self.width
        device = engine.device
        ids = self.ids[:, begin:]
        positions, real = self.positions[:, begin:], self.real
        if nodes:
            tokens = torch.tensor(tree.tokens[1:], device=device)
            depths = torch.tensor(tree.depths[1:], device=device)
            ids = torch.cat([ids, tokens.expand(rows, -1)], 1)
            positions = torch.cat([positions, positions[:, -1:] + depths], 1)
            real = torch.cat([real, real.new_ones(rows, nodes)], 1)
        logits = engine.forward_tree(self.cache, ids, positions, real, self.layout, tree.visible().to(device))
        found = self._read(logits, tree)
        self._measure(ids.shape[1], started)
        found.seconds, self.seconds = self.seconds, 0.0
        return found

    def _begin(self) -> None:
        """Put the prompts side by side, padded on the left, behind a cache that holds the head."""
        engine, scorer = self.scorer.engine, self.scorer
        self.ids, self.real, self.positions = engine.left_padded(self.prompts, self.shared)
        self.layout = engine.layouts(self.prompts)
        rows, nodes = len(self.prompts), max(len(tree) for _, tree in scorer._trees)
        first = scorer._known if self.shared else engine.empty_cache(1)
        assert first is not None
        known = engine.virtual + self.shared
        columns = known + self.width + nodes
        if first.keys[0] is None:  # nothing is known of the shape before the first forward
            self.cache = engine.empty_cache(rows)
            self.cache.room = max(0, nodes)
            return
        space = scorer._space.get(self.shared)
        if space is None or space.rows < rows or space.columns < columns:
            most = engine.max_rows * ROW_TOKENS
            columns = -(-max(columns, space.columns if space else 0) // ROOM) * ROOM
            wanted = max(rows, space.rows if space else 0)
            if wanted * columns > most:
                wanted, columns = rows, known + self.width + nodes
            scorer._space.pop(self.shared, None)
            scorer._space[self.shared] = space = _Space(first, known, wanted, columns)
        self.cache = space.view(rows)

    def _read(self, logits: Tensor, tree: _Tree) -> _Found:
        """Sums of log-probabilities along the tree's paths, from logits (rows, 1 + nodes, vocabulary)."""
        import torch

        device = logits.device
        nodes = torch.tensor([node for node, _ in tree.edges], device=device)
        tokens = torch.tensor([token for _, token in tree.edges], device=device)
        steps = logits[:, nodes, tokens] - logits.logsumexp(-1)[:, nodes]  # (rows, edges)
        member = torch.zeros(len(tree.edges), len(tree.paths), dtype=torch.float64)
        for answer, path in enumerate(tree.paths):
            member[path, answer] = 1.0
        values = (steps.double().cpu() @ member).tolist()
        best = logits.argmax(-1).tolist()
        return _Found(values, [self._greedy(row, tree) for row in best])

    def _greedy(self, best: list[int], tree: _Tree) -> int | None:
        """The answer reached from the prompt by the likeliest token of each node; any stop token ends an answer."""
        stops, node = self.scorer.engine.tokenizer.stop_ids, 0
        while True:
            token = best[node]
            edge = tree.edges.get((node, token))
            if edge is None and token in stops:
                edge = next((e for (n, t), e in tree.edges.items() if n == node and t in stops), None)
            if edge is None:
                return None
            if edge in tree.ends:
                return tree.ends[edge]
            node = tree.followed[edge]

    def _measure(self, columns: int, started: float) -> None:
        seconds = time.monotonic() - started
        self.seconds += seconds
        self.scorer._measured(columns * len(self.prompts), seconds)


def score(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prefix_length: int = 0,
) -> list[Scores]:
    """Score the same answers after every prompt; `prefix_length` leading ids of the first are shared by most."""
    if not prompts:
        return []
    head = tuple(prompts[0][: min(prefix_length, min(map(len, prompts)) - 1)])
    return Scorer(engine, answers, head).score(prompts)
