"""Counts and times of the server as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number per set of labels that only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, value: float = 1, **labels: str) -> None:
        """Count so much more."""
        key = tuple(labels.items())
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value

    def lines(self) -> Iterable[str]:
        """Its samples."""
        with self._lock:
            values = dict(self._values) or {(): 0.0}
        return [f"{self.name}{_labels(key)} {_number(value)}" for key, value in values.items()]


class Histogram:
    """How many values were at most so large, per set of labels."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.help, self.bounds = name, help, bounds
        self._values: dict[Labels, tuple[list[int], float]] = {}
        self._lock = threading.Lock()

    def add(self, value: float, **labels: str) -> None:
        """Count a value."""
        key = tuple(labels.items())
        with self._lock:
            counts, total = self._values.get(key, ([0] * (len(self.bounds) + 1), 0.0))
            counts[bisect_left(self.bounds, value)] += 1
            self._values[key] = counts, total + value

    def lines(self) -> Iterable[str]:
        """Its samples: cumulated counts, the sum of the values and their number."""
        with self._lock:
            values = {key: (list(counts), total) for key, (counts, total) in self._values.items()}
        for key, (counts, total) in values.items():
            below = 0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                below += count
                yield f"{self.name}_bucket{_labels((*key, ('le', bound)))} {below}"
            yield f"{self.name}_sum{_labels(key)} {_number(total)}"
            yield f"{self.name}_count{_labels(key)} {below}"


class Meters:
    """What the server counts."""

    def __init__(self) -> None:
        self.requests = Counter("glm_requests_total", "Requests by path and status.")
        self.seconds = Histogram(
            "glm_request_seconds", "Time from a request to the end of its answer, by path."
        )
        self.first_token = Histogram("glm_first_token_seconds", "Time from the queue to the first token.")
        self.prompt_tokens = Counter("glm_prompt_tokens_total", "Tokens read.")
        self.tokens = Counter("glm_generated_tokens_total", "Tokens generated.")
        self.cancelled = Counter("glm_answers_cancelled_total", "Answers whose client went away.")
        self.texts = Counter("glm_classified_texts_total", "Texts labelled.")

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All counts, and values of this moment by name: (help, value)."""
        lines: list[str] = []
        for one in vars(self).values():
            lines += [f"# HELP {one.name} {one.help}", f"# TYPE {one.name} {one.kind}", *one.lines()]
        for name, (help, value) in gauges.items():
            lines += [f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {_number(value)}"]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
