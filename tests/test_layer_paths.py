"""The ways a layer's call takes to be fast, each against the slow rule: the bits may not know which way was taken."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qnative as qn
from qnative import _core
from tests import reference as ref

Array = NDArray[np.float32]
USABLE = [name for name, usable in _core.isas().items() if usable]


def make(n: int, k: int, config: qn.QuantConfig | None = None, seed: int = 0, **settings: Any) -> qn.QuantizedLinear:
    rng = np.random.default_rng([seed, n, k])
    weight, bias = rng.standard_normal((n, k), np.float32), rng.standard_normal(n, np.float32)
    return qn.QuantizedLinear.from_float(weight, bias, config, **settings)


def inputs(m: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, m, k]).standard_normal((m, k), np.float32)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets is taken back."""
    yield
    _core.set_num_threads(None)


# Tiles: every number of rows that a tile can have, and every number of panels, with and without a cut-off last panel


@cache
def expected_tiles(m: int, n: int) -> Array:
    return make(n, 40)._forward(inputs(m, 40), isa="scalar")


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40, 48, 64, 80, 96, 112, 128, 144, 145, 200, 272])
def test_tiles_of_every_size(n: int, isa: str) -> None:
    layer = make(n, 40)
    for m in (*range(1, 18), 23, 33):
        ref.assert_same_bits(layer._forward(inputs(m, 40), isa=isa), expected_tiles(m, n), f"{m} rows, {n} outputs")


INT8 = qn.QuantConfig.int8_per_channel()
OUTPUTS = [None, qn.QParams(np.float32(0.02), 3, "int8"), qn.QParams(np.float32(0.02), 9, "uint8")]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("config", [INT8, INT8.asymmetric()], ids=str)
def test_tiles_with_every_epilogue(config: qn.QuantConfig, activation: str | None, output: Any, isa: str) -> None:
    for n in (47, 64, 100):
        layer = make(n, 33, config, activation=activation, output=output)
        for m in (1, 2, 7, 8, 13):
            x = inputs(m, 33)
            ref.assert_same_bits(layer._forward(x, isa=isa), layer._forward(x, isa="scalar"), f"{m} rows, {n} outputs")


# Rows: the reciprocal stands for the division except near ties


def codes_of(x: Array, isa: str, **settings: Any) -> tuple[NDArray[Any], Any, Any]:
    """The codes that a kernel gives x, read from accumulators: the weights are the identity, whose codes are 127."""
    layer = qn.QuantizedLinear.from_float(np.eye(x.shape[1], dtype=np.float32), None, qn.QuantConfig.int8(), **settings)
    scale, zero = layer.quantize_input(x)[1:]
    return layer._accumulate(x, isa=isa) // 127, scale, zero


def near_ties(scale: np.float32, low: int, high: int, rng: np.random.Generator, count: int) -> Array:
    """Values a few float32 beside (code + 1/2) * scale, on both sides, and on it as far as it can be written."""
    ties = ((rng.integers(low, high, count) + 0.5) * np.float64(scale)).astype(np.float32)
    bits = ties.view(np.int32) + rng.integers(-4, 5, count).astype(np.int32)
    return bits.view(np.float32)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_symmetric"])
def test_rows_near_ties_round_as_division_does(kind: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    for exponent in (-120.0, -30.0, -3.0, 0.0, 5.0, 60.0, 118.0):
        scale = np.float32(2.0**exponent * rng.uniform(1, 2))
        x = np.empty((40, 192), np.float32)
        x[:, 1:] = near_ties(scale, -127, 126, rng, 40 * 191).reshape(40, 191)
        x[:, 0], x[:, 1] = np.float32(-127) * scale, np.float32(127 if kind == "dynamic_symmetric" else 128) * scale
        expected, expected_scale, expected_zero = ref.dynamic_rows(x, kind)
        codes, found_scale, found_zero = codes_of(x, isa, activations=kind)
        ref.assert_same_bits(found_scale, expected_scale)
        zero = np.asarray(expected_zero, np.int64)[:, None]
        np.testing.assert_array_equal(codes, expected.astype(np.int64) - zero)
        np.testing.assert_array_equal(np.asarray(found_zero, np.int64)[:, None], zero)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-127, 2.0**-126, 0.1, 1.0, 2.0**100, 2.0**126, 2.0**127, 3.4e38])
def test_static_rows_near_ties_and_at_the_ends_of_float32(scale: float, isa: str) -> None:
    rng = np.random.default_rng(1)
    params = qn.QParams(np.float32(scale), 100, "uint8")
    with np.errstate(over="ignore", under="ignore"):
        x = near_ties(np.float32(scale), -110, 160, rng, 64 * 9).reshape(9, 64)
    x[~np.isfinite(x)] = 1.0
    x[0, :8] = [np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45]
    with np.errstate(all="ignore"):
        expected = ref.quantize(np.where(np.isnan(x), np.float32(0), x), np.float32(scale), 100, "uint8")
    codes = codes_of(x, isa, activations=params)[0]
    np.testing.assert_array_equal(codes, expected.astype(np.int64) - 100)


@pytest.mark.parametrize("k", [1, 15, 16, 64, 100, 256])
def test_an_infinity_or_nan_anywhere_in_a_row(k: int, isa: str) -> None:
    layer = make(20, k)
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        for at in {0, k // 2, k - 1}:
            x = inputs(3, k)
            x[1, at] = value
            ref.assert_same_bits(layer._forward(x, isa=isa), layer._forward(x, isa="scalar"), f"{value} at {at} of {k}")
            ref.assert_same_bits(layer._forward(x[:1], isa=isa), layer._forward(x, isa=isa)[:1])


# Threads


SHARED = [
    (1, 4096, 256), (1, 1024, 1024), (3, 700, 900), (8, 384, 1536), (64, 768, 768), (300, 512, 48), (513, 300, 17),
    (5000, 4, 1),
]  # fmt: skip
CONFIGS = [INT8, INT8.asymmetric(), qn.QuantConfig.int4_per_group(32), qn.QuantConfig.fp8()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_the_number_of_threads_changes_no_bit(
    shape: tuple[int, int, int], config: qn.QuantConfig, threads: None
) -> None:
    m, k, n = shape
    layer, x = make(n, k, config), inputs(m, k)
    _core.set_num_threads(1)
    alone = layer(x)
    for count in (2, 3, 8):
        _core.set_num_threads(count)
        for _ in range(3):
            ref.assert_same_bits(layer(x), alone, f"{count} threads")


SIZES = st.integers(1, 300)


@given(st.integers(1, 600), SIZES, SIZES, st.integers(1, 6), st.sampled_from(USABLE), st.data())
def test_any_shape_threads_kernel_and_part_of_a_batch(
    m: int, k: int, n: int, count: int, isa: str, data: st.DataObject
) -> None:
    layer, x = make(n, k), inputs(m, k)
    try:
        _core.set_num_threads(count)
        whole = layer._forward(x, isa=isa)
        first = data.draw(st.integers(0, m - 1))
        last = data.draw(st.integers(first + 1, m))
        _core.set_num_threads(1)
        ref.assert_same_bits(layer._forward(x[first:last], isa="scalar" if m * k * n < 1e6 else isa), whole[first:last])
    finally:
        _core.set_num_threads(None)


def test_many_threads_call_one_layer(threads: None) -> None:
    layer = make(768, 512)
    given_rows = [inputs(m, 512, seed=m) for m in range(1, 41)]
    _core.set_num_threads(1)
    expected = [layer(x) for x in given_rows]
    _core.set_num_threads(3)
    wrong: list[int] = []
    start = threading.Barrier(len(given_rows))

    def call(i: int) -> None:
        start.wait()
        for _ in range(20):
            if layer(given_rows[i]).tobytes() != expected[i].tobytes():
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(given_rows))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# Where rows lie


def test_rows_at_any_distance_are_read_where_they_lie() -> None:
    layer = make(24, 40)
    wide = inputs(30, 100)
    for x in (wide[:, :40], wide[::3, 60:], wide[::-1, 7:47], wide[:1, 2:42], wide[5:5, :40]):
        ref.assert_same_bits(layer(x), layer(np.ascontiguousarray(x)))
        copies = layer._as_input(x) is not x  # what would be copied, were it not taken as it is
        assert copies == (not x.flags.c_contiguous)
    frozen = wide[:, :40]
    frozen.flags.writeable = False
    ref.assert_same_bits(layer(frozen), layer(wide[:, :40].copy()))


def test_codes_at_any_distance_are_taken_too() -> None:
    layer = make(24, 40, activations=qn.QParams(np.float32(0.03), 7, "int8"))
    wide = np.random.default_rng(0).integers(-128, 128, (9, 90)).astype(np.int8)
    for x in (wide[:, 3:43], wide[::-2, :40]):
        ref.assert_same_bits(layer(x), layer(x.copy()))


def test_out_between_the_rows_of_x_is_refused() -> None:
    layer = make(40, 40)
    wide = np.zeros((6, 100), np.float32)
    memory = wide.reshape(-1)
    with pytest.raises(ValueError, match="shares memory"):
        layer(wide[:2, :40], out=memory[50:130].reshape(2, 40))
    with pytest.raises(ValueError, match="shares memory"):
        layer(wide[1::-1, :40], out=memory[20:100].reshape(2, 40))
    inside = memory[400:480].reshape(2, 40)
    assert layer(wide[:2, :40], out=inside) is inside


# Packing


PACKED = [
    qn.QuantConfig.int8(), qn.QuantConfig.int8().asymmetric(), INT8, INT8.asymmetric(),
    qn.QuantConfig("uint8", granularity="per_channel", axis=0),
    qn.QuantConfig("uint8", mode="asymmetric", granularity="per_channel", axis=-2),
    qn.QuantConfig("int8", granularity="per_channel", axis=0, scale_dtype="float16"),
]  # fmt: skip


@pytest.mark.parametrize("config", PACKED, ids=repr)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 101), (130, 300)])
def test_floats_pack_to_the_codes_of_their_tensor(config: qn.QuantConfig, n: int, k: int, threads: None) -> None:
    rng = np.random.default_rng([n, k])
    weight = (rng.standard_normal((n, k)) * 10 ** rng.uniform(-3, 3, (n, 1)) + rng.choice([0, 5], (n, 1))).astype("f")
    weight[n // 2, :] = 0
    weight[0, 0] = -0.0
    tensor = qn.quantize_tensor(weight, config)
    for count in (1, 3):
        _core.set_num_threads(count)
        layer = qn.QuantizedLinear.from_float(weight, None, config)
        found = layer.weight_quantized()
        ref.assert_same_bits(found.codes, tensor.codes)
        ref.assert_same_bits(found.scale, tensor.scale)
        ref.assert_same_bits(found.zero_point, tensor.zero_point)
        assert found.dtype == tensor.dtype
        x = inputs(5, k)
        ref.assert_same_bits(layer(x), qn.QuantizedLinear(tensor)(x))


def test_weights_that_are_not_finite_say_how_many() -> None:
    weight = np.ones((40, 40), np.float32)
    weight[3, 4], weight[30, 0] = np.nan, -np.inf
    with pytest.raises(ValueError, match="2 of 1600 values are NaN or infinite"):
        qn.QuantizedLinear.from_float(weight)


def test_subnormal_and_huge_weights_pack_as_their_tensor() -> None:
    for size in (1e-45, 1e-40, 1e-38, 3.4e38):
        weight = np.full((17, 20), size, np.float32) * np.linspace(-1, 1, 20, dtype=np.float32)
        for config in PACKED[:4]:
            ref.assert_same_bits(
                qn.QuantizedLinear.from_float(weight, None, config).weight_quantized().codes,
                qn.quantize_tensor(weight, config).codes,
            )


def test_a_layer_is_packed_once_and_not_without_weights() -> None:
    empty = qn.QuantizedLinear.__new__(qn.QuantizedLinear)
    with pytest.raises(RuntimeError, match="no weights"):
        empty(np.zeros((1, 3), np.float32))
    layer = make(3, 4)
    with pytest.raises(RuntimeError, match="packed already"):
        layer.__init__(qn.quantize_tensor(np.ones((3, 4), np.float32)))  # type: ignore[misc]


def test_memory_that_ends_while_packing_leaves_no_layer() -> None:
    """Room for the packed weights, and none for the buffer that their floats become codes in."""
    pytest.importorskip("resource")
    script = """
import resource, numpy as np, qnative as qn
weight = np.ones((1, 1 << 22), np.float32)
qn.set_num_threads(1)
packed = qn.QuantizedLinear.from_float(weight[:, :64])  # what a first layer needs is there
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
layer = qn.QuantizedLinear.__new__(qn.QuantizedLinear)
layer._set_up(weight.shape, "float32", qn.QuantConfig.int8_per_channel(), None, "dynamic", None, None)
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    layer._fill(None, np.ones(1, np.float32), np.zeros(1, np.int8), values=weight)
except MemoryError as error:
    print(error)
try:
    layer(weight)
except RuntimeError as error:
    print(error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("does not know how much address space is taken")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    buffer, missing = done.stdout.splitlines()
    assert "to pack a panel with" in buffer
    assert "no weights" in missing


# Scratch


def test_scratch_is_bounded_and_belongs_to_its_thread() -> None:
    kept: list[int] = []

    def call() -> None:
        kept.append(_core.scratch_kept())
        for m, k, n in ((1, 64, 64), (200, 3000, 20), (700, 20000, 3)):
            make(n, k)(inputs(m, k))
            kept.append(_core.scratch_kept())

    caller = threading.Thread(target=call)
    caller.start()
    caller.join()
    assert kept[0] == 0 < kept[1] <= kept[2] <= kept[3] <= 1 << 20
