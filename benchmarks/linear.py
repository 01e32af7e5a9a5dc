"""`QuantizedLinear`, shape by shape, against the machine's limits, NumPy's float32 product and the peers.

float32 in, float32 out, with a bias; activations are quantized row by row within the call.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import qnative as qn
from benchmarks import peers
from qnative import _core
from qnative.bench import (
    OURS,
    Case,
    Contender,
    Problem,
    WrongResult,
    compute_limits,
    last_level_cache,
    linear_case,
    ours,
    read_limits,
    rotate,
    set_layer_threads,
    title,
    words,
)
from tests import reference

INT8 = qn.QuantConfig.int8_per_channel()
INT4 = replace(qn.QuantConfig.int4_per_group(32).asymmetric(), scale_dtype="float16")
Shape = tuple[int, int, int]


def clock(threads: int) -> Callable[[], float]:
    """Return the clock for so many threads: one thread's work is its CPU time."""
    return time.process_time if threads == 1 else time.perf_counter


def int8_case(shape: Shape, threads: int = 1) -> Case:
    """Return a row of the int8 table: the layer and all that it is compared with."""
    return linear_case(
        shape, INT8, threads=threads, check=check,
        peers=lambda problem: peers.contenders(peers.Quantized.of(problem), threads),
    )  # fmt: skip


def int4_case(shape: Shape, threads: int = 1) -> Case:
    """Return a row of the int4 table: the layer, ONNX Runtime's, our int8 layer, the limits and NumPy's product."""
    return linear_case(shape, INT4, threads=threads, check=check, peers=partial(int4_peers, threads=threads))


def int4_peers(problem: Problem, threads: int = 1) -> Iterator[Contender]:
    """Give those that an int4 layer is compared with, besides limits."""
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, INT8)
    contender = ours(layer, problem, name="qnative int8", threads=threads)
    yield replace(contender, kind="int8")
    with contextlib.suppress(ImportError):
        yield peers.int4_contender(problem, INT4, threads)


def int4_bits() -> dict[str, tuple[float, float]]:
    """Return the bits a weight that formats claim (codes, scales, zero points) and that a layer of 4096x4096 takes."""
    problem, found = Problem.random(1, 4096, 4096), {}
    formats = (
        (32, True, "float16", "dynamic"), (32, False, "float16", "dynamic"), (32, False, "float16", "float"),
        (32, True, "float32", "dynamic"), (128, True, "float16", "dynamic"),
    )  # fmt: skip
    for size, symmetric, scale_dtype, activations in formats:
        config = replace(qn.QuantConfig.int4_per_group(size), scale_dtype=scale_dtype)
        config = config if symmetric else config.asymmetric()
        claimed = 4 + ((16 if scale_dtype == "float16" else 32) + (0 if symmetric else 4)) / size
        layer = qn.QuantizedLinear.from_float(problem.weight, None, config, activations=activations)
        name = f"groups of {size}, {'symmetric' if symmetric else 'asymmetric'}, {scale_dtype} scales"
        name += ", float activations" if activations == "float" else ""
        found[name] = claimed, 8 * layer.nbytes / problem.weight.size
    return found


def cold_case(shape: Shape, config: qn.QuantConfig = INT8) -> Case:
    """Return a row whose weights come from memory: each call is another layer's, of four caches' worth of them."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, config)
    count = max(2, -(-4 * last_level_cache() // layer.nbytes))
    layers = [layer] + [qn.QuantizedLinear.from_float(problem.weight, problem.bias, config) for _ in range(count - 1)]
    if config == INT8:
        quantized = peers.Quantized.of(problem)
        others = [list(peers.contenders(quantized)) for _ in range(count)]
    else:
        others = [list(int4_peers(problem)) for _ in range(count)]
    groups = [[ours(each, problem) for each in layers], *zip(*others, strict=True)]
    contenders = [
        *map(rotate, groups),
        *read_limits(words(layer.nbytes * count, count), problem.operations, pieces=count),
    ]
    return Case(
        f"{title(shape)} from memory", partial(check, layer, problem), contenders, shape,
        sample=1e-2, warm=1e-2,
    )  # fmt: skip


def isa_case(shape: Shape) -> Case:
    """Return every vector kernel that this CPU can run, forced, and the limit of exact products by AVX2."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, INT8)
    names = [name for name, usable in _core.isas().items() if usable and name != "scalar"]
    contenders = [ours(layer, problem, name=name, isa=name) for name in names]
    return Case(
        title(shape), partial(check, layer, problem, names), [*contenders, *compute_limits("avx2")], shape
    )  # fmt: skip


def threads_case(shape: Shape, threads: int) -> Case:
    """Return one layer on one thread and on several, by turns."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, INT8)
    contenders = [ours(layer, problem, name=thread_name(count), threads=count) for count in (1, threads)]
    return Case(title(shape), partial(check, layer, problem), contenders, shape, threads, clock(threads))


def thread_name(count: int) -> str:
    """Return how a contender with so many threads is called."""
    return "1 thread" if count == 1 else f"{count} threads"


def flat_case(shapes: Sequence[Shape]) -> Case:
    """Return layers of several shapes in one race, to see whether the rate is the same."""
    problems = [Problem.random(*shape) for shape in shapes]
    layers = [qn.QuantizedLinear.from_float(p.weight, p.bias, INT8) for p in problems]
    contenders = [ours(layer, p, name=title(p.shape)) for layer, p in zip(layers, problems, strict=True)]

    def check_all() -> None:
        for layer, problem in zip(layers, problems, strict=True):
            check(layer, problem)

    return Case("shapes", check_all, contenders)


def callers_case(shape: Shape, threads: int, callers: tuple[int, int]) -> Case:
    """Return the same calls of one layer, made by few Python threads and by many at once."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, INT8)
    each = 40  # calls of each of the many callers: waking them is a small part
    calls = each * max(callers)
    contenders = [
        Contender(
            callers_name(count), _crowd(layer, problem, count, calls // count), problem.operations * calls, "ours",
            partial(set_layer_threads, threads),
        )
        for count in callers
    ]  # fmt: skip
    right = partial(check, layer, problem)
    return Case(title(shape), right, contenders, shape, threads, time.perf_counter)


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

    def check_made() -> None:
        check(qn.QuantizedLinear.from_float(weight, bias, INT8), problem)

    operations = float(weight.size)
    contenders = [
        Contender(OURS, lambda: qn.QuantizedLinear.from_float(weight, bias, INT8), operations, "ours"),
        Contender("plain loop", partial(_core.read_float32, weight.reshape(-1)), operations, "plain read"),
        *read_limits(weight.reshape(-1).view(np.uint8), operations),
    ]
    return Case(f"{k},{n}", check_made, contenders)


def loading_case(k: int, n: int, config: qn.QuantConfig, folder: Path) -> Case:
    """Return making a layer from a model saved into `folder`, and merely reading its file; operations are weights."""
    problem = Problem.random(1, k, n)
    path = folder / f"{config.dtype}.safetensors"
    qn.quantize_model({"layer.weight": problem.weight, "layer.bias": problem.bias}, config).save(path)
    file = np.empty(path.stat().st_size, np.uint8)

    def load() -> qn.QuantizedLinear:
        return cast(qn.QuantizedLinear, qn.QuantizedModel.load(path)["layer"])

    def read() -> None:
        with path.open("rb", buffering=0) as opened:
            opened.readinto(file.data)

    operations = float(problem.weight.size)
    contenders = [
        Contender(OURS, load, operations, "ours"),
        Contender("file into memory", read, operations, "plain read"),
        *read_limits(file, operations),
    ]
    return Case(f"{k},{n}, {config.dtype}", lambda: check(load(), problem), contenders)


def check(layer: qn.QuantizedLinear, problem: Problem, isas: Sequence[str | None] = (None,)) -> None:
    """Compare bits with the NumPy reference on a few of the rows of a whole call (it is slow), and kernels on all rows.

    Raises
    ------
    WrongResult
        If a bit differs.
    """
    first: NDArray[np.float32] | None = None
    rows, expected = reference_rows(layer, problem)
    for isa in isas:
        out = problem.output()
        layer(problem.x, out=out) if isa is None else layer._forward(problem.x, out, isa)
        what = f"{layer!r} on {problem.shape}, kernel {isa or qn.isa()}"
        try:
            reference.assert_same_bits(out[rows], expected, f"{what}, rows {rows.tolist()}")
            if first is not None:
                reference.assert_same_bits(out, first, f"{what}, and kernel {isas[0]}")
        except AssertionError as error:
            raise WrongResult(str(error)) from None
        first = out


def reference_rows(layer: qn.QuantizedLinear, problem: Problem) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return some rows' numbers, and what the reference computes for them."""
    q = layer.weight_quantized()
    config = q.config
    weights = reference.Weights.build(q.codes, q.scale, q.zero_point, config.dtype, config.group_size)
    in_float32 = config.info.is_float or layer.activations == "float"
    rows = np.unique(np.linspace(0, len(problem.x) - 1, 2 if in_float32 else 8).astype(np.intp))
    if layer.activations == "float":
        return rows, reference.float_linear(problem.x[rows], weights, layer.bias)
    codes, scale, zero = reference.dynamic_rows(problem.x[rows], "dynamic", config.dtype)
    accumulated: NDArray[Any]
    if config.info.is_float:
        accumulated = reference.float_accumulators(codes, weights, config.dtype)
    else:
        accumulated = reference.accumulators(codes, zero, weights)
    return rows, reference.epilogue(accumulated, scale, weights, layer.bias)
