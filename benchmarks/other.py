"""What is no single call of a layer: the machine itself, callers at once, packing, importing, what is installed."""

from __future__ import annotations

import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import qnative as qn
from benchmarks import linear
from qnative import _core
from qnative.bench import (
    OURS,
    Case,
    Contender,
    Problem,
    compute_limits,
    read_limits,
    set_layer_threads,
    title,
    words,
)


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


def callers_case(shape: linear.Shape, threads: int, callers: tuple[int, int]) -> Case:
    """Return the same calls of one layer, made by few Python threads and by many at once."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, linear.INT8)
    each = 40  # calls of each of the many callers: waking them is a small part
    calls = each * max(callers)
    contenders = [
        Contender(
            callers_name(count), _crowd(layer, problem, count, calls // count), problem.operations * calls, "ours",
            partial(set_layer_threads, threads),
        )
        for count in callers
    ]  # fmt: skip
    check = partial(linear.check, layer, problem)
    return Case(title(shape), check, contenders, shape, threads, time.perf_counter)


def callers_name(count: int) -> str:
    """Return how a contender of so many callers is called."""
    return f"{count} callers"


def _crowd(layer: qn.QuantizedLinear, problem: Problem, callers: int, calls: int) -> Callable[[], None]:
    pool = ThreadPoolExecutor(callers)
    outs = [problem.output() for _ in range(callers)]

    def one(caller: int) -> None:
        for _ in range(calls):
            layer(problem.x, out=outs[caller])

    def run() -> None:
        for each in [pool.submit(one, caller) for caller in range(callers)]:
            each.result()

    return run


def packing_case(k: int, n: int) -> Case:
    """Return making a layer from float32 weights, and merely reading them; operations are weights."""
    problem = Problem.random(1, k, n)
    weight, bias = problem.weight, problem.bias

    def check() -> None:
        linear.check(qn.QuantizedLinear.from_float(weight, bias, linear.INT8), problem)

    operations = float(weight.size)
    contenders = [
        Contender(OURS, lambda: qn.QuantizedLinear.from_float(weight, bias, linear.INT8), operations, "ours"),
        Contender("plain loop", partial(_core.read_float32, weight.reshape(-1)), operations, "plain read"),
        *read_limits(weight.reshape(-1).view(np.uint8), operations),
    ]
    return Case(f"{k},{n}", check, contenders)


def import_case() -> Case:
    """Return importing numpy in a new interpreter; qnative too; the class of its layer too."""
    contenders = [
        Contender(code, partial(subprocess.run, [sys.executable, "-c", code], check=True), 1.0, "import")
        for code in ("import numpy", "import numpy, qnative", "import numpy; from qnative import QuantizedLinear")
    ]
    return Case("import", nothing_to_check, contenders, clock=_children_seconds)


def _children_seconds() -> float:
    """Return the CPU time of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def package_bytes() -> int:
    """Return the bytes of the package as an installation of it has them: modules, extensions of this Python, types."""
    folder = Path(qn.__file__).parent
    suffixes = (".py", ".pyi", ".typed", str(sysconfig.get_config_var("EXT_SUFFIX")))
    files = [path for path in folder.rglob("*") if path.name.endswith(suffixes)]
    return sum(path.stat().st_size for path in files)
