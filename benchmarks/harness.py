"""What every benchmark shares: cases that are checked before they are timed, contenders that take turns, tables.

A suite is a list of cases. A case has one contender of ours, which must pass `Case.check`, and any number of others.
They are timed in turns, so that whatever the machine does meanwhile happens to all of them, and what is reported is a
ratio of medians within one run.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

import qnative
from qnative import _core
from qnative.report import table

OURS = "qnative"
#: Packages whose versions are part of a result, when they are installed.
PACKAGES = ("numpy", "qnative", "torch", "onnxruntime")
#: Seconds that a sample lasts at least, by repeating short calls: well above the clock's steps.
SAMPLE = 1e-3


class WrongResult(AssertionError):
    """A contender of ours computed something else than the reference."""


@dataclass(frozen=True)
class Case:
    """One thing to compute, and those who can.

    Attributes
    ----------
    name : str
        What is computed, such as a shape.
    operations : float
        Operations a call, for the rate.
    check : callable
        Raises `WrongResult` unless our result is right; runs before anything is timed.
    contenders : mapping of str to callable
        Name to a call without arguments; `OURS` is among them.
    """

    name: str
    operations: float
    check: Callable[[], None]
    contenders: Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Suite:
    """Cases that belong in one table; made one at a time, since their data is large."""

    title: str
    cases: Iterable[Case]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the samples, and half the interquartile range as a fraction of it."""

    median: float
    spread: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise samples."""
        middle = statistics.median(seconds)
        low, high = np.percentile(seconds, [25, 75])
        return cls(middle, float(high - low) / 2 / middle, len(seconds))


@dataclass
class Outcome:
    """A timed case."""

    name: str
    operations: float
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def ours(self) -> Timing:
        """Our timing."""
        return self.timings[OURS]

    def ratio(self, other: str) -> float:
        """How many times the speed of `other` ours is."""
        return self.timings[other].median / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "name": self.name,
            "operations": self.operations,
            "contenders": {
                name: {
                    "seconds": timing.median,
                    "spread": timing.spread,
                    "samples": timing.samples,
                    "gops": self.operations / timing.median / 1e9,
                    "speed_of_ours_over_it": self.ratio(name),
                }
                for name, timing in self.timings.items()
            },
        }


def race(contenders: Mapping[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Time calls in turns for about `seconds` in all, each contender at least `least` times.

    Who goes first moves on by one each round, so that nobody always runs on the caches that another left.
    """
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        run()
        once = min(_sample(run, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(SAMPLE / once))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples[order[0]]) < least:
        for name in order:
            samples[name].append(_sample(contenders[name], repeats[name]))
        order.append(order.pop(0))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _sample(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def run(suite: Suite, seconds: float) -> Iterator[Outcome]:
    """Check and time the cases of a suite, `seconds` each."""
    for case in suite.cases:
        case.check()
        yield Outcome(case.name, case.operations, race(case.contenders, seconds))


def machine() -> dict[str, Any]:
    """Tell what a result depends on: CPU, kernels, threads, versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": qnative.isa(),
        "isas": [name for name, usable in _core.isas().items() if usable],
        "threads": 1,
        "python": platform.python_version(),
        "versions": versions | {"qnative": qnative.__version__},
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep qnative and BLAS to one thread within."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with qnative.num_threads(1), threadpool_limits(limits=1):
        yield


def report(title: str, outcomes: list[Outcome]) -> str:
    """Return a suite's outcomes as a table: our time and rate, and our speed as a multiple of each other's."""
    others = list(dict.fromkeys(name for outcome in outcomes for name in outcome.timings if name != OURS))
    rows: list[dict[str, Any]] = [
        {
            title: outcome.name,
            "us a call": outcome.ours.median * 1e6,
            "GOPS": outcome.operations / outcome.ours.median / 1e9,
            "+- %": 100 * outcome.ours.spread,
            **{f"x {name}": outcome.ratio(name) if name in outcome.timings else None for name in others},
        }
        for outcome in outcomes
    ]
    if len(outcomes) > 1:
        means = {
            f"x {name}": statistics.geometric_mean(o.ratio(name) for o in outcomes if name in o.timings)
            for name in others
        }
        rows.append({title: "geometric mean", **means})
    return table(rows)
