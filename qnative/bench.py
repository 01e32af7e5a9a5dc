"""Contenders that take turns: what `qnative bench` and the benchmarks of the source tree share.

A case is something to compute and those who can. What can be checked is checked before anything is timed. Contenders
are timed in turns, so that whatever the machine does meanwhile happens to all of them. The machine's limits are
contenders as others are, and what counts is the ratio of medians within one run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative import _core
from qnative.config import QuantConfig
from qnative.linear import QuantizedLinear

__all__ = [
    "BLAS_OVERRIDES",
    "OURS",
    "Case",
    "Contender",
    "Outcome",
    "Problem",
    "Timing",
    "WrongResult",
    "blas_kernel",
    "check_layer",
    "compute_limits",
    "cpu_name",
    "cpus_available",
    "cpus_obtained",
    "last_level_cache",
    "linear_case",
    "machine",
    "move_limits",
    "numpy_float32",
    "ours",
    "race",
    "read_limits",
    "rotate",
    "set_blas_threads",
    "set_layer_threads",
    "settle",
    "threads_available",
    "title",
    "words",
]

#: The name under which qnative itself runs.
OURS = "qnative"
#: Seconds that a sample lasts at least, by repeating short calls: well above the clock's steps.
SAMPLE = 1e-3
#: Environment variables that make OpenBLAS run other kernels than it would choose, mostly slower ones.
BLAS_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

#: Compute loops by what they limit: the first group of which any runs here. The fastest of a group is the limit.
_COMPUTE_LOOPS = {
    "integer": (
        ("vpdpbusd_512", "vpdpbusd_256", "vpdpbusd_256_vex"),
        ("vpmaddwd_256", "vpsignb_256"),
        ("portable_int8",),
    ),
    "avx2": (("vpmaddwd_256", "vpsignb_256"),),
    "float32": (("fma_512", "fma_256"), ("portable_float32",)),
}
#: How far ahead of a load a read loop prefetches, in bytes: nothing is often the best, as the hardware does it too.
_AHEAD = (0, 512)


class WrongResult(RuntimeError):
    """A contender computed something else than it should."""


@dataclass(frozen=True)
class Contender:
    """One who computes, by a call of `run`.

    Attributes
    ----------
    name : str
        Who it is; once in a case.
    run : callable
        What is timed; called without arguments.
    operations : float
        Operations that a call does, for its rate. A loop that reads a layer's weights counts as the layer does.
    kind : str
        What it stands for in comparisons: "ours", "limit" (compute), "read" (bandwidth), "float32", or a peer's kind.
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
    """Something to compute, who can, and how they are timed.

    Attributes
    ----------
    name : str
        What is computed.
    check : callable
        Raises `WrongResult` unless the results are right.
    contenders : sequence of Contender
        Those who take turns.
    shape : (int, int, int), optional
        (m, k, n) of a linear layer.
    threads : int
        How many the contenders may use.
    clock : callable
        Seconds. The CPU time of this process is the default: on an idle machine it is the time on the wall, on a busy
        one it is not made longer by programs that share the core, and a contender with more threads pays for all of
        them. Where several threads are meant to run at once it is the time on the wall, `time.perf_counter`.
    sample, warm : float
        Seconds that a contender's turn lasts at least, and that it runs before, untimed, so that its data is where it
        finds it when it is called again and again.
    """

    name: str
    check: Callable[[], object]
    contenders: Sequence[Contender]
    shape: tuple[int, int, int] | None = None
    threads: int = 1
    clock: Callable[[], float] = time.process_time
    sample: float = SAMPLE
    warm: float = SAMPLE / 4


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

    case: Case
    timings: dict[str, Timing]

    def names(self, *kinds: str) -> list[str]:
        """Those of some kinds."""
        return [c.name for c in self.case.contenders if c.kind in kinds]

    def seconds(self, name: str) -> float:
        """Median seconds of a contender's call."""
        return self.timings[name].median

    def rate(self, name: str) -> float:
        """Operations a second of a contender."""
        (operations,) = (c.operations for c in self.case.contenders if c.name == name)
        return operations / self.timings[name].median

    def best(self, *kinds: str) -> str | None:
        """Name the fastest of some kinds; None if none took part."""
        return max(self.names(*kinds), key=self.rate, default=None)

    def ratio(self, name: str, other: str) -> float:
        """How many times the rate of `other` that of `name` is."""
        return self.rate(name) / self.rate(other)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "name": self.case.name,
            "shape": None if self.case.shape is None else list(self.case.shape),
            "threads": self.case.threads,
            "contenders": {
                c.name: {
                    "kind": c.kind,
                    "operations": c.operations,
                    "seconds": self.timings[c.name].median,
                    "spread": self.timings[c.name].spread,
                    "samples": self.timings[c.name].samples,
                    "gops": self.rate(c.name) / 1e9,
                }
                for c in self.case.contenders
            },
        }


# Timing


def race(case: Case, seconds: float, least: int = 5) -> Outcome:
    """Check a case and time its contenders in turns.

    Who goes first moves on by one each round, so that nobody always runs on the caches that another left.

    Parameters
    ----------
    case : Case
        What to time.
    seconds : float
        How long on the wall, in all.
    least : int
        Turns that each contender has, whatever time that takes.

    Returns
    -------
    Outcome

    Raises
    ------
    WrongResult
        By the case's check, before anything is timed.
    """
    case.check()
    with _threads_kept():
        return _race(case, seconds, least)


def _race(case: Case, seconds: float, least: int) -> Outcome:
    settle()
    repeats: dict[str, int] = {}
    warmups: dict[str, int] = {}
    for contender in case.contenders:
        _prepare(contender, case)
        contender.run()
        once = max(min(_sample(contender.run, 1, case.clock) for _ in range(3)), 1e-9)
        repeats[contender.name] = max(1, math.ceil(case.sample / once))
        warmups[contender.name] = max(1, math.ceil(case.warm / once))
    samples: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    order = list(case.contenders)
    deadline = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in itertools.count(1):
            for contender in order:
                _prepare(contender, case)
                _sample(contender.run, warmups[contender.name], case.clock)
                samples[contender.name].append(_sample(contender.run, repeats[contender.name], case.clock))
            order.append(order.pop(0))
            if turn >= least and time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    return Outcome(case, {name: Timing.of(taken) for name, taken in samples.items()})


def _prepare(contender: Contender, case: Case) -> None:
    if contender.prepare is not None:
        contender.prepare()
    if case.threads > 1:
        settle()


def _sample(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in itertools.repeat(None, repeats):
        run()
    return (clock() - start) / repeats


def settle(most: float = 1.0) -> bool:
    """Wait until the other threads of this process have gone to sleep.

    Many thread pools let their threads spin for a while after a call, in case of another. They would slow down whoever
    comes next, and to forbid them to spin would slow down their owner.

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
        return len(self.x), self.weight.shape[1], len(self.weight)

    @property
    def operations(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * math.prod(self.shape)

    def output(self) -> NDArray[np.float32]:
        """Return an array for a result, full of NaN."""
        return np.full((len(self.x), len(self.weight)), np.nan, np.float32)


def ours(
    layer: QuantizedLinear, problem: Problem, *, name: str = OURS, isa: str | None = None, threads: int = 1
) -> Contender:
    """Return a layer as a contender that writes into an array made before; on a named kernel if `isa` is given."""
    out = problem.output()
    run = partial(layer, problem.x, out=out) if isa is None else partial(layer._forward, problem.x, out, isa)
    return Contender(name, run, problem.operations, "ours", partial(set_layer_threads, threads))


def numpy_float32(problem: Problem, threads: int = 1) -> Contender:
    """Return the float32 layer as one writes it in NumPy: a BLAS product and a sum in place."""
    transposed, out = problem.weight.T, problem.output()

    def run() -> NDArray[np.float32]:
        np.matmul(problem.x, transposed, out=out)
        return np.add(out, problem.bias, out=out)

    return Contender("NumPy float32", run, problem.operations, "float32", partial(set_blas_threads, threads))


def linear_case(
    shape: tuple[int, int, int], config: QuantConfig, *, activations: str = "dynamic", threads: int = 1,
    check: Callable[[QuantizedLinear, Problem], object] | None = None,
    peers: Callable[[Problem], Iterable[Contender]] = lambda problem: (),
) -> Case:  # fmt: skip
    """Make the case of one layer: float32 in and out, against the limits and NumPy's product.

    Parameters
    ----------
    shape : (int, int, int)
        (m, k, n).
    config : QuantConfig
        Of the weights.
    activations : {"dynamic", "dynamic_symmetric", "float"}
        As the layer takes them.
    threads : int
        How many each contender may use.
    check : callable, optional
        What raises `WrongResult` for a wrong layer; `check_layer` by default.
    peers : callable, optional
        Gives further contenders.

    Returns
    -------
    Case
    """
    problem = Problem.random(*shape)
    layer = QuantizedLinear.from_float(problem.weight, problem.bias, config, activations=activations)
    in_float32 = config.info.is_float or activations == "float"
    contenders = [
        ours(layer, problem, threads=threads),
        *compute_limits("float32" if in_float32 else "integer", threads),
        numpy_float32(problem, threads),
        *peers(problem),
    ]
    if shape[0] == 1 and threads == 1:
        contenders += read_limits(words(layer.nbytes), problem.operations)
    # Weights larger than the L2 cache take several passes until they lie in the next one.
    large = shape[0] == 1 and layer.nbytes > _caches().get("L2", 1 << 20)
    return Case(
        title(shape), partial(check or check_layer, layer, problem), contenders, shape, threads,
        time.process_time if threads == 1 else time.perf_counter,
        sample=5 * SAMPLE if large else SAMPLE, warm=5 * SAMPLE if large else SAMPLE / 4,
    )  # fmt: skip


def title(shape: Sequence[int]) -> str:
    """Return "m,k,n"."""
    return ",".join(map(str, shape))


def words(size: int, pieces: int = 1) -> NDArray[np.uint8]:
    """Return a buffer of ones of about that size, whole 64-bit words in each of its pieces.

    It begins with a cache line, as packed weights do: from elsewhere on, reading the L2 cache takes a quarter longer.
    """
    size = -(-size // (8 * pieces)) * 8 * pieces
    memory = np.ones(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def rotate(contenders: Sequence[Contender]) -> Contender:
    """Make one contender of several of the same name: each call is the next one's, so that it finds its data cold."""
    first, *_ = contenders
    runs = itertools.cycle([c.run for c in contenders])
    return Contender(first.name, lambda: next(runs)(), first.operations, first.kind, first.prepare)


def check_layer(layer: QuantizedLinear, problem: Problem) -> None:
    """Compare the bits of a few rows of a whole call with those that the scalar kernel gives for each row alone.

    The scalar kernel is the specification of the others, and a row's result must not depend on its batch.

    Raises
    ------
    WrongResult
        If a bit differs, or if the result is no approximation of the float product at all.
    """
    rows = np.unique(np.linspace(0, len(problem.x) - 1, 4).astype(np.intp))
    out = problem.output()
    layer(problem.x, out=out)
    alone = np.concatenate([layer._forward(problem.x[i : i + 1], isa="scalar") for i in rows])
    if not np.array_equal(out[rows].view(np.uint32), alone.view(np.uint32)):
        raise WrongResult(
            f"{layer!r} is wrong for {problem.shape}: kernel {_core.isa()} and the scalar one give different bits; "
            "nothing was timed, please report it"
        )
    product = problem.x[rows] @ problem.weight.T + problem.bias
    error = float(np.linalg.norm(alone - product) / np.linalg.norm(product))
    if not error < 0.25:  # int8 has about 0.01, float8 0.04, int4 0.1
        raise WrongResult(
            f"{layer!r} is wrong for {problem.shape}: relative error {error:.3g} to the float product; "
            "nothing was timed, please report it"
        )


# Limits


def compute_limits(kind: str, threads: int = 1) -> list[Contender]:
    """Return the loops that show how fast this machine can multiply and add; the fastest is the limit.

    Parameters
    ----------
    kind : {"integer", "avx2", "float32"}
        Exact products of 8-bit codes by the best instruction here, or by AVX2 alone (empty where there is none); or of
        float32.
    threads : int
        How many run the loop at once.
    """
    usable = _core.compute_loops()
    groups = ([name for name in group if usable.get(name)] for group in _COMPUTE_LOOPS[kind])
    return [_compute_limit(name, threads) for name in next(filter(None, groups), [])]


def _compute_limit(name: str, threads: int) -> Contender:
    iterations = done = 0
    taken = 0.0
    while taken < SAMPLE / 2:  # as many iterations as that takes, found by doubling
        iterations = max(1, 2 * iterations)
        start = time.process_time()
        done = _core.run_compute_loop(name, iterations)
        taken = time.process_time() - start
    if threads == 1:
        return Contender(name, partial(_core.run_compute_loop, name, iterations), 2.0 * done, "limit")
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        for each in [pool.submit(_core.run_compute_loop, name, 10 * iterations) for _ in range(threads)]:
            each.result()

    return Contender(name, run, 20.0 * done * threads, "limit")  # 10 times, so that waking a thread is a small part


def read_limits(data: NDArray[np.uint8], operations: float, pieces: int = 1, count: int = 2) -> list[Contender]:
    """Return the loops that read a buffer fastest.

    Parameters
    ----------
    data : numpy.ndarray of uint8
        The buffer, a multiple of 8 bytes.
    operations : float
        What one read counts as.
    pieces : int
        Parts of the buffer, of which each read is the next one's.
    count : int
        How many loops to return; each is tried a few times first.
    """
    parts = list(data.reshape(pieces, -1))
    # A small buffer is read several times a call, so that what is seen is the loop and not the call.
    passes = max(1, (1 << 20) // data.size) if pieces == 1 else 1
    usable = [name for name, can in _core.read_loops().items() if can]
    candidates = [
        rotate([_read_loop(name, part, ahead, passes, operations) for part in parts])
        for name in usable
        for ahead in _AHEAD
    ]
    return _fastest(candidates, pieces, count)


def move_limits(read: int, written: int, operations: float, count: int = 2) -> list[Contender]:
    """Return the loops that read and write so many bytes fastest, buffers that stay the same.

    Parameters
    ----------
    read, written : int
        Bytes; their ratio is that of a loop (4:1, 2:1, 1:1, 1:2, 1:4), or nothing is written.
    operations : float
        What one pass counts as.
    count : int
        How many loops to return; each is tried a few times first.
    """
    if not written:
        return read_limits(words(read), operations, count=count)
    read, written = -(-read // 256) * 256, -(-read // 256) * 256 * written // read
    source, target = np.ones(read, np.uint8), np.empty(written, np.uint8)
    candidates = [
        Contender(name, partial(_core.run_move_loop, name, source, target), operations, "read")
        for name, (r, w, can) in _core.move_loops().items()
        if can and r * written == w * read
    ]
    return _fastest(candidates, 1, count)


def _fastest(candidates: Sequence[Contender], repeats: int, count: int) -> list[Contender]:
    """Try each a few times, by turns, and return those of the best medians."""
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(5):
        for candidate in candidates:
            candidate.run()
            taken[candidate.name].append(_sample(candidate.run, repeats, time.process_time))
    return sorted(candidates, key=lambda candidate: statistics.median(taken[candidate.name]))[:count]


def _read_loop(loop: str, data: NDArray[np.uint8], ahead: int, passes: int, operations: float) -> Contender:
    name = f"{loop}, prefetching {ahead} bytes ahead" if ahead else loop
    return Contender(name, partial(_core.run_read_loop, loop, data, ahead, passes), operations * passes, "read")


# Threads


def cpus_available() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus_obtained(threads: int, seconds: float = 0.1) -> float:
    """Return how many CPUs' time so many busy threads of this process get: fewer than they are where others run."""
    (contender,) = compute_limits("float32", threads)[:1]
    used, start = time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        contender.run()
    return (time.process_time() - used) / (time.perf_counter() - start)


def threads_available() -> int:
    """Return how many threads a layer's call can use at most."""
    return cpus_available() if hasattr(_core, "set_num_threads") else 1


def set_layer_threads(count: int) -> None:
    """Set how many threads a layer's call uses."""
    if hasattr(_core, "set_num_threads"):
        _core.set_num_threads(count)
    elif count != 1:
        raise RuntimeError(f"this build of qnative has no thread pool; a call cannot use {count} threads")


def set_blas_threads(count: int) -> bool:
    """Set how many threads NumPy's product uses, where threadpoolctl is installed; return whether it is."""
    controller = _blas()
    if controller is not None:
        controller.limit(limits=count)
    return controller is not None


@functools.cache
def _blas() -> Any:
    try:
        from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Set the thread counts back to what they were."""
    layer = _core.get_num_threads() if hasattr(_core, "get_num_threads") else 1
    with _blas().limit(limits=None) if _blas() else contextlib.nullcontext():
        try:
            yield
        finally:
            set_layer_threads(layer)


# The machine


def machine() -> dict[str, Any]:
    """Tell what figures depend on: CPU, kernels, caches, NumPy's BLAS."""
    return {
        "cpu": cpu_name(),
        "cpus_available": cpus_available(),
        "threads_available": threads_available(),
        "caches": _caches(),
        "transparent_hugepages": _line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": _core.isa(),
        "kernels": [name for name, usable in _core.isas().items() if usable],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas_kernel(),
        "blas_overrides": {name: os.environ[name] for name in BLAS_OVERRIDES if name in os.environ},
    }


def cpu_name() -> str:
    """Return the CPU's name as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Return the bytes of the largest cache, or of a usual one where the system does not tell."""
    return max(_caches().values(), default=32 << 20)


def _caches() -> dict[str, int]:
    """Return the data caches of the first CPU: level to bytes."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_line(folder / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) << 10
    return found


def _line(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def blas_kernel() -> str | None:
    """Return which of its kernels NumPy's BLAS runs, where threadpoolctl is installed and can tell."""
    found: Iterable[dict[str, Any]] = _blas().info() if _blas() else ()
    return next((f"{b['internal_api']} {b['version']} {b.get('architecture') or ''}".strip() for b in found), None)
