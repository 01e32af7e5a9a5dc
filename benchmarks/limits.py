"""The machine itself: how fast it multiplies and adds, and how fast it reads from each level of the memory."""

from __future__ import annotations

from benchmarks import linear
from qnative.bench import Case, compute_limits, read_limits, words


def nothing_to_check() -> None:
    """Do nothing: what loops return shows that they ran, and tests/test_bench.py compares it."""


def limits_case(threads: int = 1) -> Case:
    """Return how fast this machine multiplies and adds."""
    kinds = ("integer", "avx2", "float32")
    contenders = {c.name: c for kind in kinds for c in compute_limits(kind, threads)}
    clock = linear.clock(threads)
    return Case("multiply-adds", nothing_to_check, list(contenders.values()), threads=threads, clock=clock)


def read_case(name: str, size: int) -> Case:
    """Return how fast it reads a buffer that has been read before; operations are bytes."""
    data = words(size)
    return Case(name, nothing_to_check, read_limits(data, float(data.nbytes)), sample=5e-3, warm=5e-3)
