"""How many threads each contender uses."""

from __future__ import annotations

from collections.abc import Callable

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import qnative
from qnative.bench import cpus_available

_SET: Callable[[int], object] | None = getattr(qnative, "set_num_threads", None)


def available() -> int:
    """Return how many threads can be measured: two where this machine and this build of qnative have them."""
    return min(cpus_available(), 2 if _SET else 1)


def set_ours(count: int) -> None:
    """Set how many threads a call of qnative uses."""
    if _SET is not None:
        _SET(count)
    elif count != 1:
        raise ValueError(f"this build of qnative has no thread pool, so a call cannot use {count} threads")


def set_blas(count: int) -> None:
    """Set how many threads NumPy's product uses."""
    threadpool_limits(limits=count, user_api="blas")
