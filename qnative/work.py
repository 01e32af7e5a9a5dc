"""Long work: over many items, on any executor, with progress told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Progress", "map_ordered", "reporting"]

#: What is called with (done, total, name) on long work; True: a tqdm bar.
Progress: TypeAlias = "Callable[[int, int | None, str], Any] | bool | None"
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
    executor: Executor | None, function: Callable[[Item], Result], items: Iterable[Item], in_flight: int | None = None
) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items, with a bounded number submitted ahead.

    At an error, and at Ctrl-C, what has not begun is cancelled, and nothing is waited for.
    """
    if executor is None:
        yield from map(function, items)
        return
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be a concurrent.futures.Executor (or None), not {type(executor).__name__}")
    if in_flight is None:
        workers = getattr(executor, "_max_workers", None)
        in_flight = 1 + workers if isinstance(workers, int) else 64
    import collections

    pending: collections.deque[Any] = collections.deque()

    def oldest() -> Result:
        result: Result = pending[0].result()  # while it is waited for, it is among those to cancel
        pending.popleft()
        return result

    try:
        for item in items:
            if len(pending) >= in_flight:
                yield oldest()
            pending.append(executor.submit(function, item))
        while pending:
            yield oldest()
    finally:
        if pending:
            _cancel(list(pending))


def _cancel(futures: list[Any]) -> None:
    """Cancel, but wait no longer than a moment: a cluster's futures ask its scheduler, one after the other."""
    import threading

    def cancel() -> None:
        for future in futures:
            future.cancel()

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    thread.join(0.1)


@contextlib.contextmanager
def reporting(progress: Progress, total: int | None, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Give a function to call with (done, name), which tells `progress`."""
    if progress is None or progress is False:
        yield lambda done, name: None
    elif progress is True:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(
                "progress=True needs tqdm: pip install 'qnative[progress]', or pass a function of (done, total, name)"
            ) from None
        with tqdm(total=total, unit=unit) as bar:

            def show(done: int, name: str) -> None:
                # A file's names are anybody's: no control characters for the terminal.
                bar.set_postfix_str("".join(c if c.isprintable() else "?" for c in name), refresh=False)
                bar.update(done - bar.n)

            yield show
    elif callable(progress):
        yield lambda done, name: progress(done, total, name)
    else:
        raise TypeError(f"progress must be True or a function of (done, total, name), not {type(progress).__name__}")
