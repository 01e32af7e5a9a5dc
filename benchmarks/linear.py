"""`QuantizedLinear`, shape by shape, against the machine's limits, NumPy's float32 product and the peers.

float32 in, float32 out, with a bias; activations are quantized row by row within the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qnative as qn
from benchmarks import peers, threads
from qnative.bench import Case, Contender, Problem, WrongResult, compute_limits, numpy_float32, ours, read_limit
from tests import reference

#: The table of the int8 layer: (m, k, n).
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
SHORT_SHAPES = ((1, 384, 384), (32, 384, 1536), (128, 768, 3072))
#: Its rows on two threads.
TWO_THREADS = ((1, 4096, 4096), (128, 768, 3072))
INT8 = qn.QuantConfig.int8_per_channel()
OTHERS = {
    "int4": qn.QuantConfig.int4_per_group(32).asymmetric(),
    "fp8": qn.QuantConfig.fp8().per_channel(),
}


def int8_case(shape: tuple[int, int, int], count: int = 1) -> Case:
    """Build one row of the int8 table: the layer and all that it is compared with, on `count` threads."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, INT8)
    found = [
        ours(layer, problem, prepare=partial(threads.set_ours, count)),
        numpy_float32(problem, partial(threads.set_blas, count)),
        *compute_limits("vpdpbusd", count),
    ]
    if shape[0] == 1 and count == 1:
        found += read_limit(layer._packed.nbytes, problem.operations)
    found += peers.contenders(problem, count)
    return Case(name(shape), partial(check, layer, problem), found)


def other_case(shape: tuple[int, int, int], config: qn.QuantConfig) -> Case:
    """Build one row of another format's table: the layer, the limit of its products, and NumPy."""
    problem = Problem.random(*shape)
    layer = qn.QuantizedLinear.from_float(problem.weight, problem.bias, config)
    limits = compute_limits("float32" if config.info.is_float else "vpdpbusd")
    return Case(name(shape), partial(check, layer, problem), [ours(layer, problem), numpy_float32(problem), *limits])


def name(shape: tuple[int, int, int]) -> str:
    """Return "m,k,n"."""
    return ",".join(map(str, shape))


def check(layer: qn.QuantizedLinear, problem: Problem, isas: tuple[str | None, ...] = (None,)) -> None:
    """Compare bits with the NumPy reference, on a few of the rows of a whole call (the reference is slow).

    Raises
    ------
    WrongResult
        If a bit differs.
    """
    q = layer.weight_quantized()
    config = q.config
    weights = reference.Weights.build(q.codes, q.scale, q.zero_point, config.dtype, config.group_size)
    few = 2 if config.info.is_float else 8
    rows = np.unique(np.linspace(0, len(problem.x) - 1, few).astype(np.intp))
    codes, scale, zero = reference.dynamic_rows(problem.x[rows], "dynamic", config.dtype)
    accumulated: NDArray[Any]
    if config.info.is_float:
        accumulated = reference.float_accumulators(codes, weights, config.dtype)
    else:
        accumulated = reference.accumulators(codes, zero, weights)
    expected = reference.epilogue(accumulated, scale, weights, layer.bias)
    for isa in isas:
        out = problem.output()
        layer._forward(problem.x, out, isa)
        try:
            reference.assert_same_bits(out[rows], expected, f"{layer!r} on {problem.shape}, {isa}, rows {rows.tolist()}")
        except AssertionError as error:
            raise WrongResult(str(error)) from None


def others(short: bool) -> Iterator[tuple[str, Iterator[Case]]]:
    """Yield the tables of the other formats."""
    for title, config in OTHERS.items():
        yield title, (other_case(shape, config) for shape in (SHORT_SHAPES if short else SHAPES))


def contender_of(case: Case, name: str) -> Contender:
    """Find one by its name."""
    (found,) = (c for c in case.contenders if c.name == name)
    return found
