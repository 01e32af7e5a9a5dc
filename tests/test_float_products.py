"""Products in float32 with weights that are decoded on the way: each route, format, tail and code, bit for bit."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_gemm import FLOAT8, Spec, bias_of, expected_float, layer_of, rows, tensor_of, to_codes, weights

import qnative as qn
from qnative import _core

USABLE = [name for name, usable in _core.isas().items() if usable]
#: Formats with and without zero points, groups that are whole k-steps and groups that are not.
WEIGHT_ONLY = [
    Spec("int8"), Spec("int8", "asymmetric"), Spec("uint8", "asymmetric", 100), Spec("int8", "symmetric", 5),
    Spec("int4"), Spec("int4", "asymmetric", 32), Spec("uint4", "asymmetric", 16), Spec("int4", "asymmetric", 7),
    Spec("float8_e4m3fn"), Spec("float8_e4m3fn", "symmetric", 32),
    Spec("float8_e5m2"), Spec("float8_e5m2", "symmetric", 9),
]  # fmt: skip
LAYERS = [(spec, "float") for spec in WEIGHT_ONLY]
LAYERS += [(spec, kind) for spec in WEIGHT_ONLY if spec.dtype in FLOAT8 for kind in ("dynamic", "dynamic_symmetric")]
MANY_ROWS = 20  # of which few take the way of few rows


@cache
def expected_rows(spec: Spec, kind: str, n: int, k: int) -> NDArray[np.float32]:
    return expected_float(rows(1, MANY_ROWS, k), weights(spec, n, k)[1], kind, bias_of(n))


@pytest.mark.parametrize(("spec", "kind"), LAYERS, ids=str)
def test_every_number_of_rows(spec: Spec, kind: str, isa: str) -> None:
    """A row's bits do not depend on how many others there are, so not on how weights are decoded."""
    for n, k in ((1, 3), (16, 8), (17, 37), (50, 64), (97, 133)):
        layer, x, expected = layer_of(spec, n, k, kind, True), rows(1, MANY_ROWS, k), expected_rows(spec, kind, n, k)
        for m in range(1, MANY_ROWS + 1):
            y = layer._forward(x[MANY_ROWS - m :], isa=isa)
            ref.assert_same_bits(y, expected[MANY_ROWS - m :], f"{spec} {kind} {isa} {m}x{k}x{n}")


@cache
def all_codes(dtype: str, finite: bool, k: int) -> NDArray[np.uint8]:
    """Rows of codes, (35, k), that have every code at every place of a k-step; finite ones alone, or all 256."""
    codes = np.arange(256, dtype=np.uint8)
    if finite:
        codes = codes[np.isfinite(ref.decode(codes, dtype))]
    return np.stack([np.resize(np.roll(codes, 7 * n), k) for n in range(35)])


def assert_same_numbers(y: NDArray[np.float32], expected: NDArray[np.float32], what: str) -> None:
    """The same bits, but any NaN for a NaN: which one a sum of several yields is the machine's choice."""
    assert np.array_equal(np.isnan(y), np.isnan(expected)), what
    ref.assert_same_bits(np.nan_to_num(y, nan=0.0), np.nan_to_num(expected, nan=0.0), what)


SCALES = (2.0**-149, 2.0**-126, 2.0**-20, 0.7, 127.9, 128.0, 200.0, 2.0**15, 40000.0, 2.0**110)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_code_with_any_scale(dtype: str, scale: float, isa: str) -> None:
    """Subnormal codes, infinities and NaN among the weights; scales that no power of two can be multiplied into."""
    k = 260
    for finite in (True, False):
        codes = all_codes(dtype, finite, k)
        scales = (np.float32(scale) * np.linspace(1, 1.5, len(codes), dtype=np.float32)).astype(np.float32)
        spec = Spec(dtype)
        layer = qn.QuantizedLinear.from_tensor(tensor_of(spec, codes, scales, 0), activations="float")
        x = np.random.default_rng(3).standard_normal((9, k)).astype(np.float32)
        x[0], x[8] = 0, 1
        x[0, 5] = 1  # one column of weights as it is
        with np.errstate(all="ignore"):
            expected = ref.float_linear(x, ref.Weights.build(codes, scales, 0, dtype), None)
        for m in (1, 2, 9):
            for some in (slice(m), slice(9 - m, 9)):
                y = layer._forward(x[some], isa=isa)
                assert_same_numbers(y, expected[some], f"{dtype} {scale} rows {some}, {finite=}")


@pytest.mark.parametrize("dtype", FLOAT8)
def test_one_special_code_among_normal_ones(dtype: str, isa: str) -> None:
    """Wherever it stands, and whichever it is, the k-step with it is decoded right and so are its neighbours."""
    n, k = 50, 24
    for code in (0x00, 0x80, 0x01, 0x83, 0x07, 0x87, 0x7E, 0xFE, 0x7B, 0xFB):
        if not np.isfinite(ref.decode(np.uint8([code]), dtype))[0]:
            continue
        codes = np.random.default_rng(code).integers(0x20, 0x60, (n, k)).astype(np.uint8)
        codes[np.arange(n), (np.arange(n) * 7 + code) % k] = code
        layer = qn.QuantizedLinear.from_tensor(tensor_of(Spec(dtype), codes, np.full(n, 0.25), 0), activations="float")
        x = np.random.default_rng(4).standard_normal((7, k)).astype(np.float32)
        expected = ref.float_linear(x, ref.Weights.build(codes, np.full(n, 0.25, np.float32), 0, dtype), None)
        for m in (1, 3, 7):
            ref.assert_same_bits(layer._forward(x[:m], isa=isa), expected[:m], f"{dtype} code {code:#x}, {m} rows")


LARGE = [Spec("int8", "symmetric", 100), Spec("int4", "asymmetric", 32), Spec("float8_e4m3fn")]


@pytest.mark.parametrize("spec", LARGE, ids=str)
def test_more_than_a_block_of_everything(spec: Spec, isa: str) -> None:
    """Rows, panels and k beyond what is arranged, added up and decoded at a time; the scalar kernel is right."""
    for kind in ("float", "dynamic") if spec.dtype in FLOAT8 else ("float",):
        for m, n, k in ((263, 500, 20), (11, 970, 261), (7, 35, 1030), (530, 33, 9)):
            layer, x = layer_of(spec, n, k, kind, True), rows(3, m, k)
            ref.assert_same_bits(layer._forward(x, isa=isa), scalar(spec, kind, m, n, k), f"{spec} {kind} {m}x{k}x{n}")


@cache
def scalar(spec: Spec, kind: str, m: int, n: int, k: int) -> NDArray[np.float32]:
    return np.asarray(layer_of(spec, n, k, kind, True)._forward(rows(3, m, k), isa="scalar"))


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 120), st.integers(1, 300))


@given(st.sampled_from(LAYERS), SHAPES, st.sampled_from(USABLE), st.data())
def test_any_shape_threads_kernel_and_part_of_a_batch(
    layer_kind: tuple[Spec, str], shape: tuple[int, int, int], isa: str, data: Any
) -> None:
    spec, kind = layer_kind
    m, n, k = shape
    layer, x = layer_of(spec, n, k, kind, True), rows(5, m, k)
    expected = layer._forward(x, isa="scalar")
    start = data.draw(st.integers(0, m - 1))
    stop = data.draw(st.integers(start + 1, m))
    with qn.num_threads(data.draw(st.integers(1, 3))):
        y = layer._forward(x[start:stop], isa=isa)
    ref.assert_same_bits(y, expected[start:stop], f"{spec} {kind} {isa} rows {start}..{stop} of {m}x{k}x{n}")


@pytest.mark.parametrize("m", [1, 6, 20])
def test_codes_out_and_activation_functions(m: int, isa: str) -> None:
    """The epilogue of both routes."""
    out = qn.QParams(np.float32(0.5), 7, "uint8")
    for spec in (Spec("int4", "asymmetric", 32), Spec("float8_e4m3fn")):
        tensor, w = weights(spec, 37, 70)
        x = rows(6, m, 70)
        y = expected_float(x, w, "float", bias_of(37))
        for function in (None, "relu"):
            layer = qn.QuantizedLinear.from_tensor(tensor, bias_of(37), "float", output=out, activation=function)
            floats = y if function is None else np.maximum(y, np.float32(0))
            ref.assert_same_bits(layer._forward(x, isa=isa), to_codes(floats, out), f"{spec} {function} {m}")


def test_no_decoded_matrix_is_kept() -> None:
    """A layer takes the room of its codes, a call that of a piece of them: both are small beside a float32 matrix."""
    n, k = 1024, 1024
    kept: list[int] = []

    def call(spec: Spec, m: int) -> None:
        layer = layer_of(spec, n, k, "float")
        assert layer.nbytes < 1.1 * n * k
        layer(rows(7, m, k))
        kept.append(_core.scratch_kept())

    before = _core.get_num_threads()
    _core.set_num_threads(1)
    try:
        for spec in (Spec("int8"), Spec("int4"), Spec("float8_e4m3fn")):
            for m in (1, 40):  # each in a thread of its own, which has kept nothing before
                thread = threading.Thread(target=call, args=(spec, m))
                thread.start()
                thread.join()
    finally:
        _core.set_num_threads(before)
    assert len(kept) == 6
    assert max(kept) < n * k / 2  # an eighth of the matrix in float32
