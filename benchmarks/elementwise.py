"""Elementwise work against plain loops that move the same bytes, and everyone else who does it.

An operation is an element. Everyone writes into arrays that were made before, where they can be told to; PyTorch and
ONNX Runtime make some of theirs. The plain loops are native (`csrc/qn_limits.c`): so many vectors read, so many
written, and next to nothing in between. NumPy's copy stands beside the one that reads as much as it writes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qnative as qn
from benchmarks.fake_quant import import_torch
from benchmarks.peers import bound_session
from qnative import _core
from qnative.bench import OURS, Case, Contender, WrongResult, move_limits, set_layer_threads
from qnative.granularity import block_min_max
from qnative.streams import Histogram
from tests import reference

Array = NDArray[Any]
Run = Callable[[], object]
COLUMNS = 4096
SCALE, ZERO = np.float32(0.0371), 3


@dataclass(frozen=True)
class Row:
    """One operation: how it is made ready for an array, what it moves, and who else can do it.

    Attributes
    ----------
    prepare : callable
        Of x, float32 of shape (rows, 4096): gives what runs it, what returns its result as (rows, ...) arrays, and
        what the result for some rows of x must be.
    read, written : int
        Bits an element, scales left out.
    peers : callable
        Of x: name to what runs it. ImportError where a peer is not installed.
    times : float
        How many times as fast as the best peer it is to be.
    whole : bool
        Whether the result is one of all rows together, and is checked as such.
    """

    name: str
    prepare: Callable[[Array], tuple[Run, Callable[[], Array], Callable[[slice], Array]]]
    read: int
    written: int
    peers: tuple[Callable[[Array], dict[str, Run]], ...] = ()
    times: float = 1.0
    whole: bool = False


def data(size: int) -> Array:
    """Make rows of Gaussian numbers."""
    return np.random.default_rng(size).standard_normal((max(size // COLUMNS, 1), min(COLUMNS, size)), np.float32)


def case(row: Row, size: int) -> Case:
    """Make the case of a row and a number of elements."""
    x = data(size)
    run, result, expected = row.prepare(x)
    contenders = [Contender(OURS, run, float(size), "ours", partial(set_layer_threads, 1))]
    contenders += move_limits(row.read * size // 8, row.written * size // 8, float(size))
    if row.read == row.written == 32:
        contenders.append(Contender("NumPy copy", partial(np.copyto, np.empty_like(x), x), float(size), "read"))
    for peers in row.peers:
        with contextlib.suppress(ImportError):
            contenders += [Contender(name, peer, float(size), "dynamic") for name, peer in peers(x).items()]

    def check() -> None:
        run()
        rows = slice(None) if row.whole else slice(-16, None)
        try:
            reference.assert_same_bits(result()[rows], expected(rows), row.name)
        except AssertionError as error:
            raise WrongResult(str(error)) from None

    large = size > 1 << 20
    return Case(row.name, check, contenders, sample=5e-3 if large else 1e-3, warm=5e-3 if large else 2.5e-4)


# What is done


def quantizing(dtype: str, axis: int | None = None, group: int | None = None) -> Any:
    """Quantize to codes of a dtype."""

    def prepare(x: Array) -> Any:
        scale, zero = parameters(x, dtype, axis, group)
        out = np.empty(x.shape, qn.quantize(x[:1, :1], SCALE, dtype=dtype).dtype)
        run = partial(qn.quantize, x, scale, zero, dtype, axis, group_size=group, out=out)
        return run, lambda: out, lambda rows: reference.quantize(
            x[rows], part(scale, rows, axis), zero or 0, dtype, axis, group)  # fmt: skip

    return prepare


def dequantizing(dtype: str, axis: int | None = None, group: int | None = None) -> Any:
    """Turn codes of a dtype into float32."""

    def prepare(x: Array) -> Any:
        scale, zero = parameters(x, dtype, axis, group)
        codes, out = qn.quantize(x, scale, zero, dtype, axis, group_size=group), np.empty_like(x)
        run = partial(qn.dequantize, codes, scale, zero, dtype, axis, group_size=group, out=out)
        return run, lambda: out, lambda rows: reference.dequantize(
            codes[rows], part(scale, rows, axis), zero or 0, dtype, axis, group)  # fmt: skip

    return prepare


def simulating(dtype: str, axis: int | None = None, group: int | None = None) -> Any:
    """Fake-quantize."""

    def prepare(x: Array) -> Any:
        scale, zero = parameters(x, dtype, axis, group)
        out = np.empty_like(x)
        run = partial(qn.fake_quantize, x, scale, zero, dtype, axis, group_size=group, out=out)

        def expected(rows: slice) -> Array:
            some = part(scale, rows, axis)
            codes = reference.quantize(x[rows], some, zero or 0, dtype, axis, group)
            return reference.dequantize(codes, some, zero or 0, dtype, axis, group)

        return run, lambda: out, expected

    return prepare


def parameters(x: Array, dtype: str, axis: int | None, group: int | None) -> tuple[Array, int | None]:
    """Scales between two numbers, of the shape that is called for; a zero point where there is one for all."""
    shape: tuple[int, ...] = ()
    if axis is not None:
        shape = (x.shape[axis],) if group is None else (len(x), x.shape[1] // group)
    scale = np.asarray(np.linspace(0.7, 1.3, int(np.prod(shape)), dtype=np.float32).reshape(shape) * SCALE)
    return scale, None if dtype.startswith("float8") or axis is not None else ZERO


def part(scale: Array, rows: slice, axis: int | None) -> Array:
    """Return the scales of some rows."""
    return scale[rows] if scale.ndim == 2 or axis == 0 else scale


def packing(x: Array) -> Any:
    """Pack int4 codes."""
    codes = qn.quantize(x, SCALE * 4, dtype="int4")
    pad, out = np.full(len(x), 8, np.uint8), np.empty((len(x), x.shape[1] // 2), np.uint8)
    run = partial(_core.pack_nibbles, codes.view(np.uint8), 8, pad, out)
    return run, lambda: out, lambda rows: nibbles(codes[rows])


def nibbles(codes: Array) -> Array:
    """Pack by NumPy."""
    shifted = (codes.astype(np.int64) + 8).astype(np.uint8)
    return np.asarray(shifted[:, ::2] | shifted[:, 1::2] << 4)


def unpacking(x: Array) -> Any:
    """Unpack int4 codes."""
    codes = qn.quantize(x, SCALE * 4, dtype="int4")
    packed, out = nibbles(codes), np.empty(x.shape, np.uint8)
    run = partial(_core.unpack_nibbles, packed, 8, out)
    return run, lambda: out.view(np.int8), lambda rows: codes[rows]


def encoding(dtype: str) -> Any:
    """Encode to a small float format."""

    def prepare(x: Array) -> Any:
        out = np.empty(x.shape, np.uint8 if dtype.startswith("float8") else np.uint16)
        return partial(qn.encode, x, dtype, out=out), lambda: out, lambda rows: reference.encode(x[rows], dtype)

    return prepare


def decoding(dtype: str) -> Any:
    """Decode a small float format."""

    def prepare(x: Array) -> Any:
        codes, out = qn.encode(x, dtype), np.empty_like(x)
        return partial(qn.decode, codes, dtype, out=out), lambda: out, lambda rows: reference.decode(codes[rows], dtype)

    return prepare


def ranging(axis: int | None) -> Any:
    """Find least and greatest values: of everything, of each row, of each column."""

    def prepare(x: Array) -> Any:
        config = qn.QuantConfig.int8() if axis is None else qn.QuantConfig.int8_per_channel(axis)
        found: list[Array] = [np.zeros(0), np.zeros(0)]

        def run() -> None:
            found[:] = block_min_max(x, config)

        def result() -> Array:
            ends = np.array([np.atleast_1d(end) for end in found])
            return ends.T if axis == 0 else ends

        def expected(rows: slice) -> Array:
            if axis == 0:
                return np.array([x[rows].min(axis=1), x[rows].max(axis=1)], np.float64).T
            over = None if axis is None else 1 - axis
            return np.array([np.atleast_1d(x.min(axis=over)), np.atleast_1d(x.max(axis=over))], np.float64)

        return run, result, expected

    return prepare


def counting(x: Array) -> Any:
    """Count values into the histogram under percentile, KL and MSE."""
    flat = x.reshape(1, -1)
    amax = np.array([np.abs(x).max()], np.float64)
    statistic = Histogram(1)
    statistic.start(-amax, amax)

    def run() -> None:
        statistic.counts[...] = 0
        statistic.add(flat, True)

    def expected(rows: slice) -> Array:
        index = np.floor(np.abs(x) / float(statistic.width[0])).astype(np.int64)
        return np.array([[np.bincount(index[side], minlength=8192) for side in (x < 0, x > 0)]])[rows]

    return run, lambda: statistic.counts, expected


def observing(x: Array) -> Any:
    """Observe a batch for KL, ends and all."""
    observer = qn.make_observer("kl")

    def run() -> None:
        observer.observe(x)

    return run, lambda: np.array([[observer.min_val, observer.max_val]]), lambda rows: np.array(
        [[x.min(), x.max()]], np.float64)[rows]  # fmt: skip


# Peers


def numpy_quantize(x: Array) -> dict[str, Run]:
    """Quantize as one writes it in NumPy."""
    t, out = np.empty_like(x), np.empty(x.shape, np.int8)

    def run() -> None:
        np.divide(x, SCALE, out=t)
        np.rint(t, out=t)
        np.add(t, ZERO, out=t)
        np.clip(t, -128, 127, out=t)
        out[...] = t.astype(np.int8)

    return {"NumPy": run}


def numpy_dequantize(x: Array) -> dict[str, Run]:
    """Dequantize as one writes it in NumPy."""
    codes, out = qn.quantize(x, SCALE, ZERO), np.empty_like(x)

    def run() -> None:
        np.subtract(codes, np.float32(ZERO), out=out, dtype=np.float32)
        np.multiply(out, SCALE, out=out)

    return {"NumPy": run}


def numpy_ranges(axis: int | None) -> Callable[[Array], dict[str, Run]]:
    """Two reductions."""
    return lambda x: {"NumPy": lambda: (x.min(axis=axis), x.max(axis=axis))}


def numpy_cast(dtype: str, back: bool = False) -> Callable[[Array], dict[str, Run]]:
    """NumPy's own float16, ml_dtypes for the rest."""

    def peers(x: Array) -> dict[str, Run]:
        kind = np.float16 if dtype == "float16" else getattr(import_module("ml_dtypes"), dtype)
        name = "NumPy" if dtype == "float16" else "ml_dtypes"
        with np.errstate(all="ignore"):
            small, out = x.astype(kind), np.empty_like(x)
        return {name: partial(np.copyto, out, small) if back else partial(np.copyto, small, x, casting="unsafe")}

    return peers


def numpy_histogram(x: Array) -> dict[str, Run]:
    """Count 2048 bins."""
    low, high = float(x.min()), float(x.max())
    return {"NumPy": lambda: np.histogram(x, 2048, (low, high))}


def torch_of(make: Callable[[Any, Any], Run], name: str = "PyTorch") -> Callable[[Array], dict[str, Run]]:
    """Make a peer of PyTorch from a function of the module and a tensor."""

    def peers(x: Array) -> dict[str, Run]:
        torch = import_torch()
        run = make(torch, torch.from_numpy(x))

        def inferring() -> None:
            with torch.inference_mode():
                run()

        return {name: inferring}

    return peers


def torch_dequantize(torch: Any, x: Any) -> Run:
    """Prepare a quantized tensor."""
    torch_quantize(torch, x)
    return torch.quantize_per_tensor(x, float(SCALE), ZERO, torch.qint8).dequantize  # type: ignore[no-any-return]


def torch_channels(torch: Any, x: Any, axis: int) -> Run:
    """Fake-quantize with a scale for each channel."""
    count = x.shape[axis]
    scale, zero = torch.full((count,), float(SCALE)), torch.zeros(count, dtype=torch.int32)
    return lambda: torch.fake_quantize_per_channel_affine(x, scale, zero, axis, -128, 127)


def onnxruntime_of(operator: str, back: bool = False) -> Callable[[Array], dict[str, Run]]:
    """Make a peer of ONNX Runtime, one node with arrays bound."""

    def peers(x: Array) -> dict[str, Run]:
        given = qn.quantize(x, SCALE, ZERO) if back else x
        constants: dict[str, Array] = {"s": np.asarray(SCALE), "z": np.asarray(ZERO, np.int8)}
        kind: type = np.float32 if back else np.int8
        call = bound_session((operator, ""), ("x", "s", "z"), constants, given, kind, x.shape, 1)
        return {"ONNX Runtime": call.run}

    return peers


def numkong_cast(kind: str, back: bool = False) -> Callable[[Array], dict[str, Run]]:
    """Make a peer of NumKong, by its name of the format."""

    def peers(x: Array) -> dict[str, Run]:
        numkong = import_module("numkong")
        small = numkong.zeros(x.shape, dtype=kind)
        numkong.astype(x, kind, out=small)
        if back:
            return {"NumKong": partial(numkong.astype, small, "float32", out=np.empty_like(x))}
        return {"NumKong": partial(numkong.astype, x, kind, out=small)}

    return peers


def numkong_ranges(x: Array) -> dict[str, Run]:
    """Find both ends, and where they are."""
    return {"NumKong": partial(import_module("numkong").minmax, x)}


def to_torch(name: str) -> Callable[[Array], dict[str, Run]]:
    """Cast to a dtype of PyTorch."""

    def make(torch: Any, x: Any) -> Run:
        out = torch.empty(x.shape, dtype=getattr(torch, name))
        return lambda: out.copy_(x)

    return torch_of(make)


def from_torch(name: str) -> Callable[[Array], dict[str, Run]]:
    """Cast from a dtype of PyTorch."""

    def make(torch: Any, x: Any) -> Run:
        small, out = x.to(getattr(torch, name)), torch.empty(x.shape)
        return lambda: out.copy_(small)

    return torch_of(make)


def torch_quantize(torch: Any, x: Any) -> Run:
    """Quantize to int8; PyTorch says that it will not have such tensors for ever."""
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
    return lambda: torch.quantize_per_tensor(x, float(SCALE), ZERO, torch.qint8)


def torch_simulate(torch: Any, x: Any) -> Run:
    """Fake-quantize per tensor."""
    return lambda: torch.fake_quantize_per_tensor_affine(x, float(SCALE), ZERO, -128, 127)


def torch_ranges(torch: Any, x: Any, axis: int | None) -> Run:
    """Find both ends."""
    return (lambda: torch.aminmax(x)) if axis is None else (lambda: torch.aminmax(x, dim=1 - axis))


def torch_histogram(torch: Any, x: Any) -> Run:
    """Count 2048 bins."""
    low, high = float(x.min()), float(x.max())
    return lambda: torch.histc(x, 2048, low, high)


def rows() -> Iterator[Row]:
    """List what is measured."""
    yield Row("quantize to int8", quantizing("int8"), 32, 8, (
        torch_of(torch_quantize), onnxruntime_of("QuantizeLinear"), numpy_quantize))  # fmt: skip
    yield Row("quantize to int8, per row", quantizing("int8", 0), 32, 8)
    yield Row("quantize to int8, per column", quantizing("int8", 1), 32, 8)
    yield Row("quantize to int4, groups of 32", quantizing("int4", 1, 32), 32, 8)
    yield Row("quantize to e4m3fn", quantizing("float8_e4m3fn"), 32, 8)
    yield Row("dequantize int8", dequantizing("int8"), 8, 32, (
        torch_of(torch_dequantize), onnxruntime_of("DequantizeLinear", True), numpy_dequantize))  # fmt: skip
    yield Row("dequantize int8, per row", dequantizing("int8", 0), 8, 32)
    yield Row("dequantize int8, per column", dequantizing("int8", 1), 8, 32)
    yield Row("dequantize int4, groups of 32", dequantizing("int4", 1, 32), 8, 32)
    yield Row("dequantize e4m3fn", dequantizing("float8_e4m3fn"), 8, 32)
    yield Row("fake-quantize int8", simulating("int8"), 32, 32, (torch_of(torch_simulate),), 5.0)
    for axis, where in ((0, "row"), (1, "column")):
        yield Row(f"fake-quantize int8, per {where}", simulating("int8", axis), 32, 32, (
            torch_of(partial(torch_channels, axis=axis)),), 5.0)  # fmt: skip
    yield Row("pack int4", packing, 8, 4)
    yield Row("unpack int4", unpacking, 4, 8)
    yield Row("min and max", ranging(None), 32, 0, (
        torch_of(partial(torch_ranges, axis=None)), numpy_ranges(None), numkong_ranges), whole=True)  # fmt: skip
    for axis, where in ((0, "row"), (1, "column")):
        yield Row(f"min and max, per {where}", ranging(axis), 32, 0, (
            torch_of(partial(torch_ranges, axis=axis)), numpy_ranges(1 - axis)), 5.0, whole=axis == 1)  # fmt: skip
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        short = dtype.removeprefix("float8_")
        there, back = [to_torch(dtype), numpy_cast(dtype)], [from_torch(dtype), numpy_cast(dtype, True)]
        if not dtype.endswith("fnuz"):
            kind = short.removesuffix("fn")
            there, back = [*there, numkong_cast(kind)], [*back, numkong_cast(kind, True)]
        yield Row(f"float32 to {short}", encoding(dtype), 32, 8, tuple(there))
        yield Row(f"{short} to float32", decoding(dtype), 8, 32, tuple(back), 5.0)
    for dtype in ("float16", "bfloat16"):
        yield Row(f"float32 to {dtype}", encoding(dtype), 32, 16, (
            to_torch(dtype), numpy_cast(dtype), numkong_cast(dtype)))  # fmt: skip
        yield Row(f"{dtype} to float32", decoding(dtype), 16, 32, (
            from_torch(dtype), numpy_cast(dtype, True), numkong_cast(dtype, True)))  # fmt: skip


def histograms() -> Iterator[Row]:
    """List what counts values: of which a rate is asked."""
    peers = (torch_of(torch_histogram), numpy_histogram)
    yield Row("histogram", counting, 32, 0, peers, whole=True)
    yield Row("observe (KL)", observing, 32, 0, whole=True)


#: What the short form has.
SHORT = ("quantize to int8", "dequantize int8", "min and max, per column", "float32 to e4m3fn", "e4m3fn to float32")
