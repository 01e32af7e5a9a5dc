"""QuantizedLinear for its users: the error the scales allow, round trips, attributes, threads, chains, refusals."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from numpy.typing import NDArray
from test_elementwise import lay_out
from test_gemm import ACTIVATIONS, FLOAT8, INTEGERS, activate, bias_of, expected_float, rows, static, to_codes
from test_tensor import KINDS, make_config

import qnative as qn
from qnative.linear import quantize_bias

FORMS = {"per_tensor": (None, None), "per_channel": (0, None), "groups of 8": (-1, 8), "groups of 32": (1, 32)}


def matrix(seed: int, n: int, k: int) -> NDArray[np.float32]:
    """Weights whose rows differ in size and are not centred."""
    rng = np.random.default_rng([seed, n, k])
    return (rng.standard_normal((n, k)) * rng.uniform(0.02, 0.2, (n, 1)) + 0.01).astype(np.float32)


def reference_weights(q: Any) -> ref.Weights:
    """A QuantizedTensor as the reference has it."""
    return ref.Weights.build(q.codes, q.scale, q.zero_point, q.config.dtype, q.config.group_size)


# ----------------------------------------------------------------------------------------------------------------------
# Float and quantized agree to the error that the scales allow


def rounding_error(values: NDArray[Any], scale: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """The most that a value within the range may be off.

    Integers: half a step, and what float32 adds to at most 255 steps. Float8: half a unit in the last place of the
    value, or half a step of the subnormals.
    """
    if dtype in INTEGERS:
        return np.broadcast_to(scale * (0.5 + 2.0**-14), values.shape).astype(np.float64)
    mantissa = ref.FORMATS[dtype].mantissa
    smallest = ref.magnitudes(dtype)[1]
    relative = 2.0 ** -(mantissa + 1) + 2.0**-20
    return np.maximum(np.abs(values.astype(np.float64)) * relative, scale.astype(np.float64) * smallest / 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activations", ["dynamic", "dynamic_symmetric", "static", "float"])
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_the_error_is_what_the_scales_allow(dtype: str, mode: str, activations: str, form: str) -> None:
    m, n, k = 20, 30, 100
    w, bias = matrix(1, n, k), bias_of(n)
    x = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
    config = make_config(dtype, mode, *FORMS[form])
    kind: Any = activations
    if activations == "static":
        code = dtype if dtype in FLOAT8 else "uint8"
        target = make_config(code, "symmetric" if dtype in FLOAT8 else "asymmetric", None, None)
        kind = qn.qparams_from_range(x.min(), x.max(), target)
    layer = qn.QuantizedLinear.from_float(w, bias, config, kind)
    y = layer(x)
    truth = x.astype(np.float64) @ w.astype(np.float64).T + bias
    s_w = ref.spread(layer.weight_scale, (n, k), config.axis if config.axis is not None else None, config.group_size)
    dw = rounding_error(w, s_w, dtype)
    if activations == "float":
        dx = np.zeros((m, k))
    else:
        s_x = np.broadcast_to(np.asarray(layer.quantize_input(x)[1]).reshape(-1, 1), (m, k))
        dx = rounding_error(x, s_x, dtype if dtype in FLOAT8 else "uint8")
    ax, aw = np.abs(x).astype(np.float64), np.abs(w).astype(np.float64)
    allowed = ax @ dw.T + dx @ aw.T + dx @ dw.T
    # Float32: every output is at most k + 3 additions and products of what it sums.
    allowed += (k + 3) * 2.0**-24 * ((ax + dx) @ (aw + dw).T + np.abs(bias))
    ratio = np.abs(y - truth) / allowed
    assert ratio.max() <= 1.0
    # The bound is not empty: errors add up like a random walk, so some come to a good part of it.
    assert ratio.max() >= 0.05
    # And the signal stands above the noise.
    assert ref.sqnr(truth, y) > (24 if "4" not in dtype or dtype == "float8_e4m3fn" else 12)


def test_better_weights_are_better() -> None:
    w, x = matrix(3, 64, 256), np.random.default_rng(3).standard_normal((50, 256)).astype(np.float32)
    truth = x.astype(np.float64) @ w.astype(np.float64).T

    def quality(config: Any, activations: str = "dynamic") -> float:
        return ref.sqnr(truth, qn.QuantizedLinear.from_float(w, None, config, activations)(x))

    q = qn.QuantConfig
    assert quality(q.int8_per_channel(), "float") > quality(q.int8_per_channel()) > quality(q.int8()) + 3
    assert quality(q.int8_per_channel()) > quality(q.int8_per_channel(), "dynamic_symmetric")
    assert quality(q.int8_per_channel()) > quality(q.fp8()) > quality(q.fp8("float8_e5m2"))
    assert quality(q.int4_per_group(32).asymmetric()) > quality(q.int4_per_group(32)) > quality(q.int4_per_channel())


# ----------------------------------------------------------------------------------------------------------------------
# Building


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_weights_come_back_bit_for_bit(dtype: str, mode: str, form: str) -> None:
    for n, k in ((1, 1), (3, 7), (16, 8), (17, 33), (50, 100)):
        for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
            for scale_dtype in ("float32", "bfloat16") if kind == np.float32 else ("float32",):
                config = make_config(dtype, mode, *FORMS[form], scale_dtype)
                q = qn.quantize_tensor(matrix(4, n, k).astype(kind), config)
                for activations in ("dynamic", "float"):
                    back = qn.QuantizedLinear.from_tensor(q, None, activations).weight_quantized()
                    for name in ("data", "scale_data", "zero_point", "scale", "codes"):
                        ref.assert_same_bits(getattr(back, name), getattr(q, name), f"{name} {n}x{k} {config}")
                    assert (back.shape, back.dtype, back.config) == (q.shape, q.dtype, q.config)
                    ref.assert_same_bits(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_from_float_is_from_tensor_of_the_quantized(dtype: str, mode: str, form: str) -> None:
    w, x, bias = matrix(5, 20, 45), rows(5, 6, 45), bias_of(20)
    config = make_config(dtype, mode, *FORMS[form])
    q = qn.quantize_tensor(w, config)
    for activations in ("dynamic", "dynamic_symmetric", "float"):
        one = qn.QuantizedLinear.from_float(w, bias, config, activations)
        two = qn.QuantizedLinear.from_tensor(q, bias, activations)
        ref.assert_same_bits(one(x), two(x))
        ref.assert_same_bits(one(x), expected_float(x, reference_weights(q), activations, bias))


def test_weights_in_any_form() -> None:
    w, x = matrix(6, 9, 21), rows(6, 4, 21)
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        expected = qn.QuantizedLinear.from_float(w.astype(kind))(x)
        for layout in ("fortran", "strided", "reversed", "unaligned", "swapped", "read-only"):
            odd = lay_out(w.astype(kind), layout)
            ref.assert_same_bits(qn.QuantizedLinear.from_float(odd)(x), expected, f"{kind} {layout}")
    assert qn.QuantizedLinear.from_float(w).config == qn.QuantConfig.int8_per_channel()
    for bias in (lay_out(bias_of(9), "strided"), lay_out(bias_of(9), "swapped"), bias_of(9).astype(np.float64)):
        layer = qn.QuantizedLinear.from_float(w, bias)
        ref.assert_same_bits(layer(x), qn.QuantizedLinear.from_float(w, bias_of(9))(x))
        ref.assert_same_bits(layer.bias, bias_of(9))


def test_weights_of_ones_own_qparams() -> None:
    w, x = matrix(7, 12, 40), rows(7, 5, 40)
    for config, qp in (
        (qn.QuantConfig.int8(), qn.QParams(np.float32(0.003), quant_min=-127)),
        (qn.QuantConfig.int8().asymmetric(), qn.QParams(np.float32(0.003), -128)),
        (qn.QuantConfig("uint4").asymmetric(), qn.QParams(np.float32(0.02), 15, "uint4")),
        (qn.QuantConfig.int8_per_channel(), qn.QParams(np.full(12, 0.004, np.float32), quant_min=-127, axis=0)),
        (qn.QuantConfig.fp8(), qn.QParams(np.float32(0.01), dtype="float8_e4m3fn")),
    ):
        q = qn.quantize_tensor(w, config, qp)
        assert np.unique(q.codes).size > 5
        for activations in ("dynamic", "float"):
            layer = qn.QuantizedLinear.from_tensor(q, None, activations)
            ref.assert_same_bits(layer(x), expected_float(x, reference_weights(q), activations))


def test_what_was_given_may_change_afterwards() -> None:
    w, bias, x = matrix(8, 6, 10), bias_of(6), rows(8, 3, 10)
    layer = qn.QuantizedLinear.from_float(w, bias)
    before = layer(x)
    w[:], bias[:] = 0, 0
    shown = layer.bias
    if shown.flags.writeable:
        shown[:] = 99
    for array in (layer.weight_scale, layer.weight_zero_point):
        if array.flags.writeable:
            array[...] = 1
    ref.assert_same_bits(layer(x), before)


# ----------------------------------------------------------------------------------------------------------------------
# Attributes


def test_attributes() -> None:
    w, bias = matrix(9, 20, 64), bias_of(20)
    config = qn.QuantConfig.int4_per_group(16).asymmetric()
    layer = qn.QuantizedLinear.from_float(w, bias, config, activation="gelu")
    q = qn.quantize_tensor(w, config)
    assert (layer.in_features, layer.out_features) == (64, 20)
    assert (layer.config, layer.activations, layer.activation, layer.output) == (config, "dynamic", "gelu", None)
    ref.assert_same_bits(layer.bias, bias)
    ref.assert_same_bits(layer.weight_scale, q.scale)
    ref.assert_same_bits(layer.weight_zero_point, q.zero_point)
    assert layer.parameters() == []
    assert layer.input_scale is None
    assert layer.output_scale is None
    in_qp, out_qp = static("uint8", 3, 0.5), qn.QParams(np.float32(0.25), -7)
    layer = qn.QuantizedLinear.from_float(w, None, activations=in_qp, output=out_qp)
    assert layer.bias is None
    assert layer.activations == in_qp
    assert layer.output == out_qp
    assert (layer.input_scale, layer.input_zero_point) == (0.5, 3)
    assert (layer.output_scale, layer.output_zero_point) == (0.25, -7)
    ref.assert_same_bits(layer.bias_scale, np.float32(0.5) * layer.weight_scale)


@pytest.mark.parametrize("config", [qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(32),
                                    qn.QuantConfig.fp8()], ids=repr)  # fmt: skip
def test_sizes(config: Any) -> None:
    n, k = 256, 512
    layer = qn.QuantizedLinear.from_float(matrix(10, n, k), bias_of(n), config)
    codes = n * k * config.bits // 8
    scales = 4 * layer.weight_scale.size
    assert codes + scales <= layer.nbytes <= codes + 4 * scales + 16 * n
    assert layer.memory_savings_bytes == 4 * (n * k + n) - layer.nbytes
    assert layer.memory_savings_bytes > 0.7 * 4 * n * k


def test_weights_are_held_once() -> None:
    w = matrix(11, 512, 1024)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        layer = qn.QuantizedLinear.from_float(w)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        layer(rows(11, 4, 1024))
        layer.weight_quantized()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert layer.nbytes <= held <= 1.05 * layer.nbytes + 20_000
    assert after <= held + 20_000  # a call leaves nothing behind


def test_repr_tells() -> None:
    w = matrix(12, 8, 16)
    layer = qn.QuantizedLinear.from_float(w, bias_of(8), activation="relu")
    for word in ("QuantizedLinear", "16", "8", "int8", "per_channel", "dynamic", "relu", "bias"):
        assert word in repr(layer)
    out = qn.QParams(np.float32(0.125), 9, "uint8")
    config = qn.QuantConfig.int4_per_group(4)
    layer = qn.QuantizedLinear.from_float(w, None, config, static("uint8", 77, 0.5), output=out)
    for word in ("int4", "group_size=4", "uint8", "0.5", "77", "0.125"):
        assert word in repr(layer)
    assert len(repr(layer)) < 500


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "mode"), KINDS)
def test_pickles_and_copies(dtype: str, mode: str, form: str) -> None:
    w, x = matrix(13, 10, 27), rows(13, 4, 27)
    config = make_config(dtype, mode, *FORMS[form])
    settings: list[dict[str, Any]] = [{}, {"activations": "float", "activation": "silu"}]
    if dtype in INTEGERS:
        out = qn.QParams(np.float32(0.5), 3, "uint8", 1, 99)
        settings.append({"activations": static("int8", 5, 0.3), "output": out})
    for setting in settings:
        layer = qn.QuantizedLinear.from_float(w, bias_of(10), config, **setting)
        for again in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
            ref.assert_same_bits(again(x), layer(x))
            assert repr(again) == repr(layer)
            ref.assert_same_bits(again.weight_quantized().data, layer.weight_quantized().data)


class Named(qn.QuantizedLinear):
    """A layer with something of its own."""

    name = "unnamed"

    def __init__(self, name: str) -> None:
        raise AssertionError("no pickle and no copy calls this")


def test_pickles_and_copies_of_a_derived_class() -> None:
    layer = Named.from_float(matrix(13, 10, 27), bias_of(10), activation="relu")
    for added in ({}, {"name": "ffn", "_rows": 7}):
        vars(layer).update(added)
        for again in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
            assert type(again) is Named
            assert {name: vars(again).get(name) for name in added} == added
            assert vars(again).keys() == vars(layer).keys()
            ref.assert_same_bits(again(rows(13, 4, 27)), layer(rows(13, 4, 27)))


def test_a_pickle_carries_the_weights_once() -> None:
    layer = qn.QuantizedLinear.from_float(matrix(14, 128, 256), None, qn.QuantConfig.int4_per_group(32))
    assert len(pickle.dumps(layer)) < 1.1 * layer.weight_quantized().nbytes + 3000


# ----------------------------------------------------------------------------------------------------------------------
# Bias in int32


def test_int32_bias_and_its_scale() -> None:
    w, bias = matrix(15, 10, 40), bias_of(10)
    qp = static("uint8", 100, 0.02)
    probe = qn.QuantizedLinear.from_float(w, None, activations=qp)
    codes = quantize_bias(bias, probe.input_scale, probe.weight_scale)
    assert codes.dtype == np.int32
    unit = (np.float32(0.02) * probe.weight_scale).astype(np.float64)
    assert np.array_equal(codes, np.rint(bias.astype(np.float64) / unit))
    layer = qn.QuantizedLinear.from_float(w, codes, activations=qp)
    ref.assert_same_bits(layer.bias, codes)
    x = rows(15, 5, 40)
    expected = expected_float(x, reference_weights(layer.weight_quantized()), qp, codes)
    ref.assert_same_bits(layer(x), expected)
    # Half a unit from the float bias, and float32 rounding.
    floats = qn.QuantizedLinear.from_float(w, bias, activations=qp)(x)
    assert (np.abs(layer(x) - floats) <= 0.5 * unit + 2.0**-22 * (np.abs(floats) + np.abs(bias))).all()
    ref.assert_same_bits(layer.accumulate(x) - probe.accumulate(x), np.broadcast_to(codes, (5, 10)).copy())


def test_int32_bias_that_does_not_fit() -> None:
    w = matrix(16, 3, 8)
    for bias in ([0, 1e9, 0], [0, -1e9, 0], [0, np.nan, 0], [np.inf, 0, 0]):
        with pytest.raises(ValueError, match=r"overflow|int32"):
            quantize_bias(np.array(bias), 1e-3, np.full(3, 1e-3, np.float32))
    assert quantize_bias(np.float64([2**31 - 1, 0.5, -(2**31) + 1]), 1.0, 1.0).tolist() == [2**31 - 1, 0, -(2**31) + 1]
    codes = np.zeros(3, np.int32)
    for activations in ("dynamic", "dynamic_symmetric", "float"):
        with pytest.raises(ValueError, match="static"):
            qn.QuantizedLinear.from_float(w, codes, activations=activations)
    with pytest.raises(ValueError, match="group"):
        qn.QuantizedLinear.from_float(w, codes, qn.QuantConfig.int4_per_group(4), static("uint8", 0))
    with pytest.raises(ValueError, match="float"):
        qp = qn.QParams(np.float32(1), dtype="float8_e4m3fn")
        qn.QuantizedLinear.from_float(w, codes, qn.QuantConfig.fp8(), qp)


# ----------------------------------------------------------------------------------------------------------------------
# Chains of integer layers


@pytest.mark.parametrize(
    "config",
    [
        qn.QuantConfig.int8_per_channel(),
        qn.QuantConfig("int8").asymmetric(),
        qn.QuantConfig.int4_per_group(16).asymmetric(),
        qn.QuantConfig("uint8"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_three_layers_without_leaving_integers(config: Any, activation: str | None, isa: str) -> None:
    sizes = [40, 70, 33, 19]
    x = rows(17, 25, 40)
    between: list[Any] = [
        qn.qparams_from_range(x.min(), x.max(), qn.QuantConfig("uint8").asymmetric()),
        static("int8", -5, 0.9), static("uint8", 60, 1.1), static("int8", 30, 1.3),
    ]  # fmt: skip
    layers = []
    for i in range(3):
        w, bias = matrix(20 + i, sizes[i + 1], sizes[i]), bias_of(sizes[i + 1])
        layers.append(qn.QuantizedLinear.from_float(
            w, bias, config, between[i], activation=activation, output=between[i + 1]))  # fmt: skip
    codes: Any = x
    for layer in layers:
        codes = layer._forward(codes, isa=isa)
    expected: Any = x
    for i, layer in enumerate(layers):
        y = expected_float(expected, reference_weights(layer.weight_quantized()), between[i], layer.bias)
        expected = to_codes(activate(y, activation), between[i + 1])
        assert np.unique(expected).size > 10
    ref.assert_same_bits(codes, expected)
    assert codes.dtype == np.int8
    # The codes of the input may be made first, too.
    first = layers[0].quantize_input(x)[0]
    ref.assert_same_bits(layers[0]._forward(first, isa=isa), layers[0]._forward(x, isa=isa))
    # The chain stays near the float one.
    decoded = qn.dequantize(codes, between[3].scale, between[3].zero_point)
    assert np.isfinite(decoded).all()


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def test_eight_threads_share_one_layer() -> None:
    """Every thread gets the bits that it would get alone."""
    for config, activations in (
        (qn.QuantConfig.int8_per_channel(), "dynamic"), (qn.QuantConfig.int4_per_group(32), "dynamic"),
        (qn.QuantConfig.int8_per_channel(), "float"), (qn.QuantConfig.fp8(), "dynamic"),
    ):  # fmt: skip
        layer = qn.QuantizedLinear.from_float(matrix(30, 96, 128), bias_of(96), config, activations, activation="gelu")
        inputs = [rows(40 + i, 1 + 7 * i, 128) for i in range(8)]
        alone = [layer(x) for x in inputs]
        barrier = threading.Barrier(8)

        def work(i: int, barrier: Any = barrier, layer: Any = layer, inputs: Any = inputs, alone: Any = alone) -> int:
            barrier.wait()
            wrong = 0
            for _ in range(40):
                wrong += not np.array_equal(layer(inputs[i]).view(np.uint32), alone[i].view(np.uint32))
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0


def other_thread_ran_during(action: Any) -> bool:
    """Whether another thread got the GIL while `action` ran, when nobody is ever asked to hand it over."""
    go, ran, interval = threading.Event(), threading.Event(), sys.getswitchinterval()

    def work() -> None:
        go.wait()
        ran.set()

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.02)  # the thread waits for `go` now
    sys.setswitchinterval(1000)
    try:
        go.set()
        action()
        return ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no GIL to release")
def test_the_gil_is_released() -> None:
    def busy() -> None:
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass

    assert not other_thread_ran_during(busy)  # the test can fail
    int8, fp8 = qn.QuantConfig.int8_per_channel(), qn.QuantConfig.fp8()
    # The last two hardly multiply: what takes time is their many rows.
    for config, activations, (m, k, n) in (
        (int8, "dynamic", (256, 1024, 1024)), (fp8, "float", (256, 1024, 1024)),
        (int8, "dynamic", (20000, 4, 1)), (int8, "float", (20000, 4, 1)),
    ):  # fmt: skip
        layer = qn.QuantizedLinear.from_float(matrix(31, n, k), None, config, activations)
        x, out = np.ones((m, k), np.float32), np.empty((m, n), np.float32)

        def run(layer: Any = layer, x: Any = x, out: Any = out) -> None:
            end = time.perf_counter() + 0.2
            while time.perf_counter() < end:
                layer(x, out=out)

        assert other_thread_ran_during(run), (config, activations, (m, k, n))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_masked_arrays_are_refused_and_other_subclasses_are_arrays() -> None:
    w, x, bias = matrix(34, 6, 9), rows(34, 4, 9), bias_of(6)
    layer = qn.QuantizedLinear.from_float(w, bias)
    static_layer = qn.QuantizedLinear.from_float(w, bias, activations=static("int8", 3))
    masked = np.ma.masked_greater
    for call in (
        lambda: layer(masked(x, 0.5)), lambda: layer(masked(x.astype(np.float64), 0.5)),
        lambda: layer.accumulate(masked(x, 1)), lambda: static_layer(masked(x.astype(np.int8), 1)),
        lambda: layer(x, out=masked(np.zeros((4, 6), "f4"), 1)), lambda: qn.QuantizedLinear.from_float(masked(w, 0.1)),
        lambda: qn.QuantizedLinear.from_float(w, masked(bias, 1)),
        lambda: qn.QuantizedLinear.from_float(masked(w, 0.1), config=qn.QuantConfig.fp8()),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="mask"):
            call()

    class Other(np.ndarray):
        pass

    expected, wide, out = layer(x), np.zeros((4, 20), np.float32), np.zeros((4, 6), np.float32)
    wide[:, :9] = x
    ref.assert_same_bits(layer(x.view(Other)), expected)
    ref.assert_same_bits(layer(wide.view(Other)[:, :9]), expected)
    assert type(layer(x.view(Other), out=out.view(Other))) is Other
    ref.assert_same_bits(out, expected)
    ref.assert_same_bits(qn.QuantizedLinear.from_float(w.view(Other), bias.view(Other))(x), expected)


def test_refusals_name_the_value_and_the_remedy() -> None:
    w = matrix(32, 4, 6)
    make = qn.QuantizedLinear.from_float
    per_channel = qn.QParams(np.ones(6, np.float32), axis=0)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: make(w[0]), ValueError, r"\(6,\)"),
        (lambda: make(w[None]), ValueError, r"\(1, 4, 6\)"),
        (lambda: make(w, activations="none"), ValueError, r"none.*dynamic"),
        (lambda: make(w, activations=None), TypeError, "QParams"),
        (lambda: make(w, activations=0.5), TypeError, "QParams"),
        (lambda: make(w, activations=per_channel), ValueError, r"\(6,\)"),
        (lambda: make(w, activation="tanh"), ValueError, r"tanh.*relu"),
        (lambda: make(w, output="int8"), TypeError, "QParams"),
        (lambda: make(w, output=qn.QParams(np.float32(1), dtype="int4")), ValueError, r"int4.*int8"),
        (lambda: make(w, output=qn.QParams(np.ones(4, np.float32), axis=0)), ValueError, r"\(4,\)"),
        (lambda: make(w, output=qn.QParams(np.float32(1), dtype="float8_e5m2")), ValueError, r"float8_e5m2.*int8"),
        (lambda: make(w, config="int8"), TypeError, "QuantConfig"),
        (lambda: make(w, config=qn.QuantConfig.int8_per_channel(1)), ValueError, "axis"),
        (lambda: make(w, config=qn.QuantConfig.int8_per_channel(-1)), ValueError, "axis"),
        (lambda: make(w, config=qn.QuantConfig.int4_per_group(2, axis=0)), ValueError, "axis"),
        (lambda: make(w, config=qn.QuantConfig.int8_per_channel(2)), ValueError, "axis"),
        (lambda: make(np.where(w > 0.1, np.nan, w)), ValueError, r"(?i)nan"),
        (lambda: make(np.arange(6).reshape(2, 3)), TypeError, "float"),
        (lambda: make(w, np.zeros(5, np.float32)), ValueError, r"\(5,\).*4"),
        (lambda: make(w, np.zeros((4, 1), np.float32)), ValueError, r"\(4, 1\)"),
        (lambda: make(w, np.float32([0, np.nan, 0, 0])), ValueError, "bias"),
        (lambda: make(w, np.float64([0, 1e300, 0, 0])), ValueError, "bias"),
        (lambda: make(w, np.zeros(4, np.int64)), TypeError, "bias|float"),
        (lambda: make(w, config=qn.QuantConfig.fp8(), activations=static("uint8", 0)), ValueError, "float8_e4m3fn"),
        (lambda: make(w, activations=qn.QParams(np.float32(1), dtype="float8_e5m2")), ValueError, "float8_e5m2"),
        (lambda: qn.QuantizedLinear.from_tensor(w), TypeError, "QuantizedTensor"),
        (lambda: make(w).quantize_input(np.zeros((2, 5), np.float32)), ValueError, "6"),
        (lambda: make(w).accumulate(np.zeros((2, 5), np.float32)), ValueError, "6"),
        (lambda: make(w, activations="float").accumulate(np.zeros((2, 6), np.float32)), ValueError, "float"),
        (lambda: make(w, activations="float").quantize_input(np.zeros((2, 6), np.float32)), ValueError, "float"),
        (lambda: make(w, config=qn.QuantConfig.fp8()).accumulate(np.zeros((2, 6), np.float32)), ValueError, "float"),
    ]  # fmt: skip
    for i, (call, error, words) in enumerate(cases):
        with pytest.raises(error, match=words):
            call()
            print("not refused:", i)


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_fused_is_the_function_of_the_plain(function: str) -> None:
    w, x = matrix(33, 25, 50), rows(33, 12, 50)
    for activations in ("dynamic", "float"):
        plain = qn.QuantizedLinear.from_float(w, bias_of(25), activations=activations)(x)
        fused = qn.QuantizedLinear.from_float(w, bias_of(25), activations=activations, activation=function)(x)
        truth = ref.activation(plain, function)
        assert (np.abs(fused - truth) <= 2.0**-22 * np.maximum(1, np.abs(plain))).all()
        assert not np.array_equal(fused, plain)


def test_no_outputs_round_trip_too() -> None:
    for config in (qn.QuantConfig.int8(), qn.QuantConfig.int4_per_channel(), qn.QuantConfig.int8().asymmetric()):
        layer = qn.QuantizedLinear.from_float(np.zeros((0, 8), np.float32), None, config)
        assert layer.weight_quantized().shape == (0, 8)
        assert pickle.loads(pickle.dumps(layer))(np.ones((3, 8), np.float32)).shape == (3, 0)


def test_the_gate_gives_no_accumulators_that_are_not_sums() -> None:
    from qnative import _core

    w = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    x = np.ones((2, 16), np.float32)
    cases = [(qn.QuantConfig.int8_per_channel(), "acc64"), (qn.QuantConfig.fp8(), "acc32")]
    for config, output in cases:
        layer = qn.QuantizedLinear.from_float(w, None, config)
        y = np.zeros((2, 4), np.int64 if output == "acc64" else np.int32)
        with pytest.raises(ValueError, match=r"acc64|accumulators"):
            layer._run(x, y, output)
        assert not y.any()
    for output in ("acc32", "acc64"):  # a call would write the sums of all groups to where there is room for one
        layer = _core.PackedLinear()
        with pytest.raises(ValueError, match="accumulators"):
            layer._pack(
                np.zeros((4, 16), np.uint8), None, 16, 4, np.zeros((4, 16), np.uint8), None, None, format="int8",
                scale_dtype="float32", code_range=(-127, 127), input="dynamic", activation=None, output=output,
                in_params=(1.0, 0, 0, 255), out_params=(1.0, 0, 0, 255), signed_codes=True, wide=output == "acc64",
            )  # fmt: skip
    low, high = np.full(1, np.inf, np.float32), np.full(1, -np.inf, np.float32)
    with pytest.raises(ValueError, match="layout"):  # a product that would wrap around to 8 elements
        _core.min_max(np.zeros(8, np.float32), ((1 << 61) + 1, 8, 1, 8, False, False), low, high)


def test_scales_are_read_without_rebuilding_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = qn.QuantizedLinear.from_float(np.eye(40, dtype=np.float32), None, qn.QuantConfig.int4_per_group(8))
    whole = layer.weight_quantized()
    monkeypatch.setattr(qn.QuantizedLinear, "weight_quantized", None)
    ref.assert_same_bits(layer.weight_scale, whole.scale)
    ref.assert_same_bits(layer.weight_zero_point, whole.zero_point)
