"""How many threads a processor computes with: what this process may use, and which number of it is fastest."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ASKED = ("GLM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # who sets one of these has chosen
CLEARLY = 0.87  # another number has to take at most this share of the time: measurements are noisy
WORSE = 1.1  # and no kind of step may take longer than this share
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Choice:
    """The chosen number of threads, and the milliseconds of a step with every number that was tried."""

    threads: int
    milliseconds: Mapping[int, float]

    @property
    def text(self) -> str:
        """Such as "4 threads (2: 9.1 ms, 4: 6.0 ms, 8: 6.4 ms)"."""
        tried = ", ".join(f"{n}: {ms:.1f} ms" for n, ms in sorted(self.milliseconds.items()))
        return f"{self.threads} thread{'s' * (self.threads != 1)} ({tried})"


def asked() -> str:
    """The environment variable that names a number of threads; empty if none does."""
    return next((name for name in ASKED if os.environ.get(name, "").strip().isdigit()), "")


def usable() -> int:
    """Processors this process may use: those of its affinity, and no more than a container's share of time."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(mine, quota() or mine))


def quota() -> int:
    """A container's share of processor time in whole processors, 0 where it has no limit.

    Sources: cpu.max of control groups version 2, cpu.cfs_quota_us of version 1.
    """
    try:
        if (CGROUP / "cpu.max").is_file():
            granted, period = (CGROUP / "cpu.max").read_text().split()[:2]
        else:
            granted = (CGROUP / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (CGROUP / "cpu" / "cpu.cfs_period_us").read_text()
        if granted == "max" or int(granted) <= 0:
            return 0
        return max(1, -(-int(granted) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return 0


def candidates(most: int, cores: int) -> tuple[int, ...]:
    """Numbers worth trying, ascending: one per core, half of that, one per hyperthread, and one.

    most    processors that may be used
    cores   physical ones of the machine
    """
    cores = max(1, min(cores, most))
    return tuple(sorted({1, max(1, cores // 2), cores, most}))


class Measurement:
    """Which of some numbers of threads is fastest, a short trial at a time, so that other work fits in between.

    steps    pieces of work that count alike, whatever time each takes
    among    the numbers to try
    now      the number in use, kept unless another is clearly faster; in use between the trials, too
    use      sets the number
    Takes about `budget_s` of trials, at least two rounds of them.
    """

    def __init__(
        self,
        steps: Sequence[Callable[[], object]],
        among: Sequence[int],
        now: int,
        use: Callable[[int], object],
        budget_s: float = 1.0,
    ) -> None:
        self._steps, self._now, self._use, self._left = list(steps), now, use, budget_s
        self._best = {n: [float("inf")] * len(self._steps) for n in dict.fromkeys((*among, now))}
        self._round = [(n, i) for n in self._best for i in range(len(self._steps))]
        self._trials = 0

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self._left <= 0 and self._trials >= 2 * len(self._round)

    def trial(self) -> None:
        """Time one step with one number of threads."""
        threads, step = self._round[self._trials % len(self._round)]
        self._use(threads)
        started = time.perf_counter()
        self._steps[step]()
        took = time.perf_counter() - started
        self._use(self._now)
        self._best[threads][step] = min(self._best[threads][step], took)
        self._left -= took
        self._trials += 1

    def choose(self) -> Choice:
        """The fastest number by what was measured, in use from now on."""

        def cost(threads: int) -> float:
            """Time against that of `now`, the mean over the steps; infinite where one of them gets slower."""
            pairs = zip(self._best[threads], self._best[self._now], strict=True)
            shares = [mine / theirs for mine, theirs in pairs]
            return math.inf if max(shares) > WORSE else math.prod(shares) ** (1 / len(shares))

        chosen = min(self._best, key=cost)
        if cost(chosen) > CLEARLY:
            chosen = self._now
        self._use(chosen)
        return Choice(chosen, {threads: 1e3 * seconds[0] for threads, seconds in self._best.items()})
