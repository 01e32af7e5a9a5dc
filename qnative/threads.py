"""How many threads one call may use.

The number is one for the whole process. Until it is set it is the default: as many threads as can run at the same
time, by the process's affinity and its control groups' CPU quota, and at most QNATIVE_NUM_THREADS. The default is found
when a call first needs it, and anew in a forked child, which may have been given other CPUs.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from _thread import RLock, get_ident  # `threading` would be a tenth of what importing qnative costs
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from qnative import _core

__all__ = [
    "get_num_threads",
    "lock_of",
    "meet_threadpoolctl",
    "num_threads",
    "register_with_threadpoolctl",
    "set_num_threads",
]


def _from_environment() -> int | None:
    text = os.environ.get("QNATIVE_NUM_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _core.MAX_THREADS):
        raise ValueError(
            f"QNATIVE_NUM_THREADS={text}: must be an integer from 1 to {_core.MAX_THREADS}. "
            "Unset it to let qnative use the CPUs that this process has."
        )
    return int(text)


_ENVIRONMENT = _from_environment()


def _default() -> int:
    from qnative import cpus

    return min(cpus.available(), _ENVIRONMENT or _core.MAX_THREADS)


class _Setting:
    """A number of threads, None for the default, and the thread whose block it belongs to."""

    def __init__(self, n: int | None) -> None:
        self.n = n
        self.thread = get_ident()


#: What holds outside any block, and then one for every open block; the last one is in force.
_settings = [_Setting(None)]
_lock = RLock()  # which a signal handler may take again

#: Objects with a `_lock` of their own.
_owners: WeakSet[Any] = WeakSet()


def lock_of(owner: Any) -> RLock:
    """Return a lock for an object to keep as its `_lock`, so that a forked child finds it open, whoever held it."""
    _owners.add(owner)
    return RLock()


def _after_fork_in_child() -> None:
    """Forget the blocks of threads that the child does not have, and the locks that one of them may have held."""
    global _lock
    _lock = RLock()
    for owner in _owners:
        owner._lock = RLock()
    _settings[1:] = [setting for setting in _settings[1:] if setting.thread == get_ident()]
    _core.set_num_threads(_settings[-1].n)


def _checked(n: int | None) -> int | None:
    if n is None:
        return None
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be an integer, or None for the default, not {type(n).__name__}")
    n = operator.index(n)
    if not 1 <= n <= _core.MAX_THREADS:
        raise ValueError(f"n = {n} must be from 1 to {_core.MAX_THREADS}; None restores the default")
    return n


def get_num_threads() -> int:
    """Return how many threads a call may use.

    A call uses fewer when there is little to do, and only the thread that makes it when the pool is busy with another.
    """
    meet_threadpoolctl()
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Set how many threads a call may use, in the whole process.

    Parameters
    ----------
    n : int or None
        1 to 1024; 1: every call runs on the thread that makes it. More than the process has CPUs is allowed, and only
        makes calls slower; results are the same bits with any number. None: the default again, which is how many
        threads can run at the same time, and at most QNATIVE_NUM_THREADS.

    Raises
    ------
    TypeError, ValueError
        When n is no such number.

    Notes
    -----
    Calls under way keep the number that they began with. Within a `num_threads` block the number holds until the block
    is left.
    """
    n = _checked(n)
    meet_threadpoolctl()
    with _lock:
        _settings[-1].n = n
        _core.set_num_threads(n)


def num_threads(n: int | None) -> contextlib.AbstractContextManager[None]:
    """Set how many threads a call may use while a ``with`` block runs.

    Parameters
    ----------
    n : int or None
        As for `set_num_threads`.

    Raises
    ------
    TypeError, ValueError
        When n is no such number.

    Notes
    -----
    The number is the whole process's: calls that other threads make meanwhile obey it too. When blocks of several
    threads overlap, the one entered last of those still open decides, and when all have been left, in whatever order,
    what was in force before them is so again.

    Examples
    --------
    >>> import qnative as qn
    >>> with qn.num_threads(1):
    ...     qn.get_num_threads()
    1
    """
    return _limited(_checked(n))


@contextlib.contextmanager
def _limited(n: int | None) -> Iterator[None]:
    meet_threadpoolctl()
    setting = _Setting(n)
    with _lock:
        _settings.append(setting)
        _core.set_num_threads(n)
    try:
        yield
    finally:
        with _lock:
            _settings.remove(setting)
            _core.set_num_threads(_settings[-1].n)


# threadpoolctl

_registered: Any = None  # the module that knows us


def register_with_threadpoolctl() -> None:
    """Make qnative's threads known to threadpoolctl: to what it lists and what it limits.

    Needed only when threadpoolctl is imported after qnative and used before any layer is made: importing qnative,
    making a `QuantizedLinear` and every function of this module do the same if threadpoolctl has been imported by then.

    Raises
    ------
    ImportError
        When threadpoolctl is not installed, or is older than 3.2, the first that takes other libraries.
    """
    try:
        import threadpoolctl  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("threadpoolctl is not installed: pip install 'threadpoolctl>=3.2'") from None
    if not _register(threadpoolctl):
        raise ImportError("threadpoolctl is too old to know other libraries: pip install 'threadpoolctl>=3.2'")


def meet_threadpoolctl() -> None:
    """Register if threadpoolctl has been imported: nobody who does not use it pays for it."""
    threadpoolctl = sys.modules.get("threadpoolctl")
    if threadpoolctl is not _registered and threadpoolctl is not None:
        _register(threadpoolctl)


def _register(threadpoolctl: Any) -> bool:
    """Register with this module, once. False when it cannot be done: it is too old, or half imported."""
    global _registered
    if not (hasattr(threadpoolctl, "register") and hasattr(threadpoolctl, "threadpool_limits")):
        return False

    class QnativeController(threadpoolctl.LibController):  # type: ignore[misc]
        """Tells threadpoolctl of the one pool; ``set_num_threads`` holds for the whole process."""

        user_api = internal_api = "qnative"
        filename_prefixes = ("qnative_threads",)

        def get_num_threads(self) -> int:
            return get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            set_num_threads(num_threads)

        def get_version(self) -> str | None:
            return getattr(sys.modules.get("qnative"), "__version__", None)

    with _lock:
        if threadpoolctl is not _registered:
            threadpoolctl.register(QnativeController)
            _registered = threadpoolctl
    return True


_core.set_default_threads(_default)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
meet_threadpoolctl()
