"""Fixtures for every test: the compiled kernels one by one, guarded memory, hypothesis profiles, slow tests."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

try:
    from qnative._core import isas

    ISAS: dict[str, bool] = dict(isas())
except ImportError:  # not built: each test module says so by itself
    ISAS = {"scalar": True}

# A shell that starts the tests in the background has Ctrl-C ignored, which some of them are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci", max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
# Where everything takes ten times as long: under sanitizers, under emulators.
settings.register_profile(
    "short", max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

_selected: set[str] = set()
_ran: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too (all 2^32 float32 values ...)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; make exhaustive runs them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes, more than CI has: make exhaustive runs it"))
    _selected.update(item.nodeid for item in items if "isa" in getattr(item, "fixturenames", ()))


@pytest.fixture(params=list(ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    """The name of each compiled kernel in turn; skipped where this CPU cannot run it."""
    name = str(request.param)
    if not ISAS[name]:
        pytest.skip(f"this CPU cannot run {name}")
    _ran.add(name)
    return name


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A whole run must have run every kernel that this CPU can."""
    options = session.config.option
    narrowed = options.keyword or options.markexpr or any("::" in a for a in session.config.args)
    if exitstatus != 0 or options.collectonly or narrowed or not _selected:
        return
    missed = [name for name, usable in ISAS.items() if usable and name not in _ran]
    if missed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"kernels usable here that no test ran: {', '.join(missed)}", red=True)


Guarded = Callable[..., NDArray[Any]]


def guarded_memory(shape: tuple[int, ...], dtype: Any, at: str = "end") -> NDArray[Any]:
    """Poisoned memory that ends (or begins) exactly at a page that nobody may touch."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    dtype, page = np.dtype(dtype), mmap.PAGESIZE
    size = math.prod(shape) * dtype.itemsize
    body = max(-(-size // page), 1) * page
    memory = mmap.mmap(-1, body + 2 * page)
    memory[:] = b"\xa5" * len(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in (base, base + page + body):
        if mprotect(start, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page + (body - size if at == "end" else 0)
    return np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape)


@pytest.fixture(scope="session")
def guarded() -> Guarded:
    """`guarded(shape, dtype, at="end")`: `guarded_memory` where the system has it, else plain poisoned memory."""
    if os.name == "posix":
        return guarded_memory
    return lambda shape, dtype, at="end": np.frombuffer(
        bytearray(b"\xa5" * (math.prod(shape) * np.dtype(dtype).itemsize)), dtype
    ).reshape(shape)
