"""Contenders that take turns: what `qnative bench` and the benchmarks of the source tree share.

A case is something to compute and those who can. What is checked is checked before anything is timed. Contenders are
timed in turns, so that whatever the machine does meanwhile happens to all of them; the machine's limits are contenders
as others are, and what counts is the ratio of medians within one run.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative import _core
from qnative.linear import QuantizedLinear

__all__ = [
    "BLAS_OVERRIDES",
    "OURS",
    "SHAPES",
    "Case",
    "Contender",
    "Outcome",
    "Problem",
    "Timing",
    "WrongResult",
    "blas_kernel",
    "blas_threads",
    "check_layer",
    "compute_limit",
    "compute_limits",
    "cpu_name",
    "cpus_available",
    "fastest_reads",
    "machine",
    "numpy_float32",
    "ours",
    "race",
    "read_limit",
    "settle",
]

#: The name under which qnative itself runs.
OURS = "qnative"
#: Seconds that a sample lasts at least, by repeating short calls: well above the clock's steps.
SAMPLE = 1e-3
#: (rows, in_features, out_features): layers of encoders, large and small, from one request to a batch.
SHAPES = (
    (1, 384, 384),
    (1, 4096, 4096),
    (8, 768, 3072),
    (32, 384, 1536),
    (128, 384, 1536),
    (128, 768, 3072),
    (512, 1024, 1024),
    (512, 4096, 4096),
)
#: Environment variables that make OpenBLAS run other kernels than it would choose, mostly slower ones.
BLAS_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

#: Loops whose rate is a limit, by what they limit. The fastest that runs here is the limit.
_LIMITS = {
    "vpdpbusd": ("vpdpbusd_512", "vpdpbusd_256", "vpdpbusd_256_vex"),
    "avx2": ("vpmaddwd_256", "vpsignb_256"),
    "float32": ("fma_512", "fma_256"),
    "portable": ("portable_int8", "portable_float32"),
}
#: How far ahead of a load a read loop may prefetch, in bytes; none is often the best, as hardware does it too.
_AHEAD = (0, 512)


class WrongResult(AssertionError):
    """A contender computed something else than it should."""


@dataclass(frozen=True)
class Contender:
    """One who computes, by calling `run`.

    Attributes
    ----------
    name : str
        Who it is, once in a case.
    run : callable
        What is timed; called without arguments.
    operations : float
        Operations that a call does, for its rate. A read loop counts those of the layer whose weights it reads.
    kind : str
        What it stands for in comparisons: "ours", "limit", "read", "float32", and peers' own kinds.
    prepare : callable, optional
        Called before each of its turns, and not timed: thread counts are set there.
    """

    name: str
    run: Callable[[], object]
    operations: float
    kind: str
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """Something to compute, who can, and what must be true before they are timed.

    Attributes
    ----------
    name : str
        What is computed, such as a shape.
    check : callable
        Raises `WrongResult` unless the results are right.
    contenders : sequence of Contender
        Those who take turns.
    """

    name: str
    check: Callable[[], object]
    contenders: Sequence[Contender]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the samples, and half their interquartile range as a fraction of it."""

    median: float
    spread: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise samples."""
        middle = statistics.median(seconds)
        low, high = np.percentile(seconds, [25, 75])
        return cls(middle, float(high - low) / 2 / middle, len(seconds))


@dataclass(frozen=True)
class Outcome:
    """A timed case."""

    name: str
    contenders: Sequence[Contender]
    timings: dict[str, Timing] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """Operations a second of a contender."""
        (operations,) = (c.operations for c in self.contenders if c.name == name)
        return operations / self.timings[name].median

    def names(self, *kinds: str) -> list[str]:
        """Those of some kinds."""
        return [c.name for c in self.contenders if c.kind in kinds]

    def best(self, *kinds: str) -> str | None:
        """Name the fastest of some kinds, or None if none took part."""
        return max(self.names(*kinds), key=self.rate, default=None)

    def ratio(self, name: str, other: str) -> float:
        """How many times the rate of `other` that of `name` is."""
        return self.rate(name) / self.rate(other)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "name": self.name,
            "contenders": {
                c.name: {
                    "kind": c.kind,
                    "operations": c.operations,
                    "seconds": self.timings[c.name].median,
                    "spread": self.timings[c.name].spread,
                    "samples": self.timings[c.name].samples,
                    "gops": self.rate(c.name) / 1e9,
                }
                for c in self.contenders
            },
        }


# Timing


def race(case: Case, seconds: float, least: int = 5, alone: bool = True) -> Outcome:
    """Check a case and time its contenders in turns.

    Who goes first moves on by one each round, so that nobody always runs on the caches that another left; and each turn
    begins with calls that are not timed, which bring the contender's own data to where they find it again.

    Parameters
    ----------
    case : Case
        What to time.
    seconds : float
        How long, in all.
    least : int
        Turns that each contender has, whatever time that takes.
    alone : bool
        Whether all are to run on one thread. Then what is timed is the CPU time of this process: on an idle machine
        that is the time on the wall, and on a busy one it is not made longer by programs that share the core; a
        contender that uses more threads pays for all of them. If not alone, the clock is the one on the wall, and the
        threads that a contender leaves spinning are waited for before the next one's turn: they would slow it down, and
        to forbid them would slow down their owner.

    Returns
    -------
    Outcome

    Raises
    ------
    WrongResult
        By the case's check, before anything is timed.
    """
    case.check()
    settle()
    clock = time.process_time if alone else time.perf_counter
    repeats: dict[str, int] = {}
    for contender in case.contenders:
        _prepare(contender, alone)
        contender.run()
        once = min(_sample(contender.run, 1, clock) for _ in range(3))
        repeats[contender.name] = max(1, math.ceil(SAMPLE / once))
    samples: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    order = list(case.contenders)
    deadline = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in itertools.count(1):
            for contender in order:
                _prepare(contender, alone)
                count = repeats[contender.name]
                _sample(contender.run, max(1, count // 4), clock)
                samples[contender.name].append(_sample(contender.run, count, clock))
            order.append(order.pop(0))
            if turn >= least and time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    return Outcome(case.name, case.contenders, {name: Timing.of(taken) for name, taken in samples.items()})


def _prepare(contender: Contender, alone: bool) -> None:
    if contender.prepare is not None:
        contender.prepare()
    if not alone:
        settle()


def _sample(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in itertools.repeat(None, repeats):
        run()
    return (clock() - start) / repeats


def settle(most: float = 1.0) -> bool:
    """Wait until the other threads of this process have gone to sleep.

    Parameters
    ----------
    most : float
        Seconds after which waiting ends.

    Returns
    -------
    bool
        Whether they have.
    """
    deadline = time.perf_counter() + most
    while time.perf_counter() < deadline:
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(1e-3)
        if time.process_time() - busy < 0.1 * (time.perf_counter() - start):
            return True
    return False


# The layer and what it is compared with


@dataclass(frozen=True)
class Problem:
    """A linear layer to compute: `x @ weight.T + bias`, all float32, of shape (m, n).

    Attributes
    ----------
    weight : numpy.ndarray of float32, shape (n, k)
    bias : numpy.ndarray of float32, shape (n,)
    x : numpy.ndarray of float32, shape (m, k)
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    x: NDArray[np.float32]

    @classmethod
    def random(cls, m: int, k: int, n: int) -> Problem:
        """Draw normal values, the same for the same shape; weights such that outputs are of the size of inputs."""
        rng = np.random.default_rng(m + k + n)
        weight = rng.standard_normal((n, k), np.float32)
        weight *= np.float32(k**-0.5)
        return cls(weight, rng.standard_normal(n, np.float32), rng.standard_normal((m, k), np.float32))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, k, n)."""
        return (*self.x.shape, len(self.weight))

    @property
    def operations(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * math.prod(self.shape)

    def output(self) -> NDArray[np.float32]:
        """Return an array for a result, full of NaN."""
        return np.full((len(self.x), len(self.weight)), np.nan, np.float32)


def ours(
    layer: QuantizedLinear, problem: Problem, *, name: str = OURS, kind: str = "ours", isa: str | None = None,
    prepare: Callable[[], object] | None = None,
) -> Contender:  # fmt: skip
    """Return a layer as a contender, writing into an array made before; on a named kernel if `isa` is given."""
    out = problem.output()
    run = partial(layer, problem.x, out=out) if isa is None else partial(layer._forward, problem.x, out, isa)
    return Contender(name, run, problem.operations, kind, prepare)


def numpy_float32(problem: Problem, prepare: Callable[[], object] | None = None) -> Contender:
    """Return the float32 layer as one writes it in NumPy: a BLAS product and a sum in place."""
    transposed, out = problem.weight.T, problem.output()

    def run() -> NDArray[np.float32]:
        np.matmul(problem.x, transposed, out=out)
        return np.add(out, problem.bias, out=out)

    return Contender("NumPy float32", run, problem.operations, "float32", prepare)


def check_layer(layer: QuantizedLinear, problem: Problem, isas: Sequence[str | None] = (None,)) -> None:
    """Compare the bits of a few rows of a whole call with those that the scalar kernel gives for each row alone.

    The scalar kernel is the specification of the others, and a row's result must not depend on its batch.

    Raises
    ------
    WrongResult
        If a bit differs, or if the result is no approximation of the float product at all.
    """
    rows = np.unique(np.linspace(0, len(problem.x) - 1, 4).astype(np.intp))
    alone = np.concatenate([layer._forward(problem.x[i : i + 1], isa="scalar") for i in rows])
    for isa in isas:
        out = problem.output()
        layer._forward(problem.x, out, isa)
        if not np.array_equal(out[rows].view(np.uint32), alone.view(np.uint32)):
            raise WrongResult(f"{layer!r} on {problem.shape}, kernel {isa or _core.isa()}: not the scalar kernel's bits")
    product = problem.x[rows] @ problem.weight.T + problem.bias
    error = float(np.linalg.norm(alone - product) / np.linalg.norm(product))
    if not error < 0.25:  # int8 has about 0.01, fp8 0.04, int4 0.15
        raise WrongResult(f"{layer!r} on {problem.shape}: relative error {error:.3g} to the float product")


# Limits


def compute_limits(kind: str, threads: int = 1) -> list[Contender]:
    """Return the loops of one kind that run here.

    Parameters
    ----------
    kind : {"vpdpbusd", "avx2", "float32", "portable"}
        What they do; the fastest of them is the limit.
    threads : int
        How many run the loop at once.
    """
    usable = _core.compute_loops()
    return [compute_limit(name, threads) for name in _LIMITS[kind] if usable.get(name)]


def compute_limit(name: str, threads: int = 1) -> Contender:
    """Return one compute loop as a contender whose call takes about half a sample's time."""
    done, iterations = 0, 1
    while True:  # as many iterations as it takes, found by doubling
        start = time.process_time()
        done = _core.run_compute_loop(name, iterations)
        if time.process_time() - start > SAMPLE / 2:
            break
        iterations *= 2
    if threads == 1:
        return Contender(name, partial(_core.run_compute_loop, name, iterations), 2.0 * done, "limit")
    iterations *= 10  # waking a thread is a small part of it then
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        for each in [pool.submit(_core.run_compute_loop, name, iterations) for _ in range(threads)]:
            each.result()

    return Contender(name, run, 20.0 * done * threads, "limit")


def fastest_reads(data: NDArray[np.uint8], count: int = 2) -> list[tuple[str, int]]:
    """Try the read loops on a buffer.

    Parameters
    ----------
    data : numpy.ndarray of uint8
        The buffer.
    count : int
        How many to name.

    Returns
    -------
    list of (str, int)
        The fastest loops and how far ahead they prefetch, fastest first, by the median of a few turns.
    """
    candidates = [(name, ahead) for name, can in _core.read_loops().items() if can for ahead in _AHEAD]
    repeats = max(1, (1 << 20) // max(len(data), 1))
    taken: dict[tuple[str, int], list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(5):
        for name, ahead in candidates:
            run = partial(_core.run_read_loop, name, data, ahead)
            run()
            taken[name, ahead].append(_sample(run, repeats, time.process_time))
    return sorted(candidates, key=lambda candidate: statistics.median(taken[candidate]))[:count]


def read_limit(size: int, operations: float) -> list[Contender]:
    """Return the fastest loops that read `size` bytes, a warm buffer of their own, counted as `operations` a read."""
    data = np.zeros(-(-size // 8) * 8, np.uint8)
    data.fill(1)
    return [
        Contender(f"{name} +{ahead}" if ahead else name, partial(_core.run_read_loop, name, data, ahead), operations, "read")
        for name, ahead in fastest_reads(data)
    ]


# The machine


def cpu_name() -> str:
    """Return the CPU's name as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


def cpus_available() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Tell what figures depend on: CPU, kernels, caches, NumPy's BLAS."""
    return {
        "cpu": cpu_name(),
        "cpus_available": cpus_available(),
        "kernel": _core.isa(),
        "kernels": [name for name, usable in _core.isas().items() if usable],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas_kernel(),
        "blas_overrides": {name: os.environ[name] for name in BLAS_OVERRIDES if name in os.environ},
    }


def blas_kernel() -> str | None:
    """Return which of its kernels NumPy's BLAS runs, where threadpoolctl is installed and can tell."""
    try:
        import threadpoolctl  # type: ignore[import-untyped]
    except ImportError:
        return None
    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "blas":
            return f"{pool['internal_api']} {pool['version']} {pool.get('architecture') or ''}".strip()
    return None


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[str]:
    """Hold NumPy's product to some threads where threadpoolctl is installed; yields what holds, in words."""
    try:
        import threadpoolctl
    except ImportError:
        yield "threads as the environment sets them (threadpoolctl is not installed)"
        return
    with threadpoolctl.threadpool_limits(count):
        yield "one thread" if count == 1 else f"{count} threads"
