"""QATLinear: what was simulated is what runs, gradients against finite differences, training, PyTorch's weights."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
from numpy.typing import NDArray
from test_fake_quant import import_torch
from test_tensor import make_config

import qnative as qn

F64 = NDArray[np.float64]
INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def layer_of(
    n: int, k: int, weight: Any = None, activation: Any = None, bias: bool = True, seed: int = 0
) -> qn.QATLinear:
    rng = np.random.default_rng([seed, n, k])
    w = rng.standard_normal((n, k)) * rng.uniform(0.02, 0.2, (n, 1)) + 0.01
    return qn.QATLinear(w, rng.standard_normal(n) if bias else None, weight=weight, activation=activation)


def fq(config: Any, learnable: bool = True, observer: str = "min_max", bits: int | None = None) -> qn.FakeQuantConfig:
    return qn.FakeQuantConfig(config, observer, learnable, bits)


def wander(layer: qn.QATLinear, rng: np.random.Generator) -> None:
    """Move everything that is trained, as steps of an optimizer do."""
    for name, p in layer.params.items():
        if name.endswith("scale"):
            p *= rng.uniform(0.7, 1.2, p.shape).astype(np.float32)
        elif name.endswith("zero_point"):
            p += rng.uniform(-2, 2, p.shape).astype(np.float32)
        else:
            p += (rng.standard_normal(p.shape) * 0.01).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# What was simulated is what runs


def random_layer(seed: int) -> tuple[qn.QATLinear, NDArray[np.float32], str]:
    """A trained-looking layer of any dtype, mode, granularity, observer, with an input for it."""
    rng = np.random.default_rng(seed)

    def choose(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    n, k = int(rng.integers(1, 40)), int(rng.integers(1, 100))
    dtype = choose(*INTEGERS, *FLOAT8)
    mode = "symmetric" if dtype in FLOAT8 else choose("symmetric", "asymmetric")
    axis, group = choose((None, None), (0, None), (-2, None), (-1, int(rng.integers(1, 50))), (1, 32))
    scale_dtype = choose("float32", "float32", "bfloat16", "float16")
    observer = choose("min_max", "mse", "percentile", "mean_std", "moving_average")
    bits = None if dtype in FLOAT8 else choose(None, None, 2, 3)
    weight = fq(make_config(dtype, mode, axis, group, scale_dtype), choose(True, False), observer, bits)
    inputs: Any = "float"
    if rng.random() < 0.85:
        code = dtype if dtype in FLOAT8 else choose(*INTEGERS)
        kind = "symmetric" if code in FLOAT8 else choose("symmetric", "asymmetric")
        inputs = fq(
            make_config(code, kind, None, None),
            choose(True, False),
            choose("min_max", "moving_average", "mse"),
            None if code in FLOAT8 else choose(None, None, 2, 4),
        )
    layer = layer_of(n, k, weight, inputs, bool(rng.integers(2)), seed)
    shape = choose((k,), (1, k), (7, k), (2, 5, k))
    x = (rng.standard_normal(shape) * rng.uniform(0.1, 10) + rng.uniform(-1, 1)).astype(np.float32)
    if choose(True, False) and inputs != "float":
        layer.calibrate([x, 1.5 * x])
    layer(x)
    wander(layer, rng)
    if choose(True, False, False):
        layer.freeze()
    return layer, x, f"seed {seed}: {layer!r} on {shape}"


def assert_deploys(layer: qn.QATLinear, x: NDArray[np.float32], what: str) -> None:
    y = layer(x)
    assert layer._saved is not None
    shape, rows, weight = layer._saved
    deployed = layer.convert()
    # Weights: the float values that were multiplied with, and their codes.
    tensor = deployed.weight_quantized()
    ref.assert_same_bits(tensor.dequantize(), weight, f"weights, {what}")
    ref.assert_same_bits(tensor.codes, layer.weight_quantizer.quantize(layer.weight), f"weight codes, {what}")
    # Activations likewise.
    if layer.input_quantizer is not None:
        codes, scale, zero = deployed.quantize_input(x)
        q = layer.input_quantizer.qparams
        ref.assert_same_bits(codes, layer.input_quantizer.quantize(x), f"input codes, {what}")
        assert (scale, zero) == (q.scale, q.zero_point)
        decoded = ref.dequantize(codes, scale, zero, q.dtype)
        ref.assert_same_bits(decoded.reshape(rows.shape), rows, f"inputs, {what}")
    # Outputs: sums of the same products, rounded otherwise.
    z = deployed(x)
    assert z.shape == y.shape == (*shape[:-1], layer.out_features)
    size = np.abs(rows.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    if layer.bias is not None:
        size += np.abs(layer.bias)
        ref.assert_same_bits(deployed.bias, layer.bias)
    allowed = (layer.in_features + 8) * 2.0**-24 * size.reshape(y.shape) + 1e-37
    assert np.all(np.abs(z.astype(np.float64) - y) <= allowed), what


@pytest.mark.parametrize("block", range(10))
def test_two_hundred_random_layers_deploy_to_the_codes_they_trained_with(block: int) -> None:
    seen = set()
    for seed in range(20 * block, 20 * block + 20):
        layer, x, what = random_layer(seed)
        seen.add(layer.weight_quantizer.config.quant.dtype)
        assert_deploys(layer, x, what)
    assert len(seen) > 3


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_deployment_after_training_steps(dtype: str) -> None:
    """Not perturbed: trained, with learned and with observed scales."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((64, 24)).astype(np.float32)
    target = (x @ rng.standard_normal((24, 6)) * 0.3).astype(np.float32)
    mode = "symmetric" if dtype in FLOAT8 else "asymmetric"
    for learnable in (True, False):
        weight, inputs = (fq(make_config(dtype, mode, axis, None), learnable) for axis in (0, None))
        layer = layer_of(6, 24, weight, inputs)
        losses = []
        for _ in range(40):
            y = layer(x)
            losses.append(float(np.square(y - target).mean()))
            layer.backward((y - target) * np.float32(2 / y.size))
            for name, gradient in layer.grads.items():
                if name.endswith("scale") and dtype in FLOAT8:  # a scale is 1e-5 of the weights: steps relative to it
                    layer.params[name] *= 1 - np.float32(1e-3) * np.sign(gradient)
                else:
                    layer.params[name] -= np.float32(0.02 if name.endswith(("scale", "point")) else 0.3) * gradient
        assert losses[-1] < 0.3 * losses[0]
        assert_deploys(layer, x, f"{dtype} {learnable}")


def test_what_convert_gives_is_a_copy_and_fuses() -> None:
    layer = layer_of(5, 9)
    x = np.random.default_rng(1).standard_normal((4, 9)).astype(np.float32)
    y = layer(x)
    out = qn.qparams_from_range(y.min(), y.max(), qn.QuantConfig("uint8").asymmetric())
    deployed, rectified, codes = layer.convert(), layer.convert(activation="relu"), layer.convert(output=out)
    before = deployed(x)
    ref.assert_same_bits(rectified(x), np.maximum(before, np.float32(0)))
    ref.assert_same_bits(codes(x), qn.quantize(before, out.scale, out.zero_point, "uint8"))
    layer.params["weight"] += 1
    layer.params["bias"] += 1
    ref.assert_same_bits(deployed(x), before)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_few_bits(dtype: str, mode: str, bits: int) -> None:
    """2 bits: -2..1 around the zero point, -1..1 where symmetric and signed; those of the whole dtype are not used."""
    quant = qn.QuantConfig(dtype, mode).per_channel()
    config = fq(quant, bits=bits)
    half, middle = 2 ** (bits - 1), 0 if dtype in ("int8", "int4") else 2 ** (quant.bits - 1)
    if mode == "symmetric":
        expected = (middle - half + (middle == 0), middle + half - 1)
    else:
        expected = (-half, half - 1) if middle == 0 else (0, 2 * half - 1)
    assert config.quant_range == expected
    layer = layer_of(5, 60, config, fq(qn.QuantConfig("uint8").asymmetric(), bits=7))
    x = np.random.default_rng(3).standard_normal((40, 60)).astype(np.float32)
    for _ in range(30):
        y = layer(x)
        layer.backward(y / np.float32(y.size))
        for name, gradient in layer.grads.items():
            layer.params[name] -= np.float32(0.01) * gradient
    assert_deploys(layer, x, f"{config}")
    deployed = layer.convert()
    codes = deployed.weight_quantized().codes
    assert expected[0] <= codes.min() and codes.max() == expected[1] and len(np.unique(codes)) >= 2 * half - 1
    assert deployed.quantize_input(x)[0].max() == 127
    assert deployed.config == quant


def test_bits_that_do_not_exist() -> None:
    for bits in (1, 0, -2, 5):
        with pytest.raises(ValueError, match=r"must lie in 2\.\.4, int4's bits"):
            fq(qn.QuantConfig.int4(), bits=bits)
    for odd in (2.0, True, "2"):
        with pytest.raises(ValueError, match="must be an int"):
            fq(qn.QuantConfig.int4(), bits=odd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no integer codes"):
        fq(qn.QuantConfig.fp8(), bits=4)
    assert fq(qn.QuantConfig.int4(), bits=4) == fq(qn.QuantConfig.int4())
    narrow = fq(qn.QuantConfig.int4_per_group(16).with_scale_dtype("float16")).with_bits(2)
    assert narrow.bits == 2 and narrow.quant_range == (-1, 1)
    assert narrow.simulated.group_size == 16 and narrow.simulated.scale_dtype == "float16"
    assert narrow.with_bits(None).simulated == narrow.quant


def test_an_observed_weight_scale_is_that_of_the_weight_as_it_is() -> None:
    layer = layer_of(3, 8, fq(qn.QuantConfig.int8_per_channel(), False), "float")
    x = np.ones((1, 8), np.float32)
    layer(x)
    layer.params["weight"] *= np.float32(0.25)  # its former values are no data
    layer(x)
    expected = qn.quantize_tensor(layer.weight, qn.QuantConfig.int8_per_channel())
    ref.assert_same_bits(layer.weight_quantizer.scale, expected.scale)
    layer.params["weight"] *= np.float32(2)  # and convert does not need another call
    ref.assert_same_bits(layer.convert().weight_scale, qn.quantize_tensor(layer.weight, expected.config).scale)
    layer.freeze()
    layer.params["weight"] *= np.float32(0.5)
    ref.assert_same_bits(layer.convert().weight_scale, expected.scale * np.float32(2))
    never_called = layer_of(3, 8, None, "float")
    ref.assert_same_bits(
        never_called.convert().weight_scale, qn.quantize_tensor(never_called.weight, expected.config).scale
    )


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


class Surrogate:
    """What the straight-through estimator and LSQ differentiate, in float64.

    Rounding is a shift by a constant, found at the point itself; what is clipped there is the end of the range.
    """

    def __init__(self, layer: qn.QATLinear, x: NDArray[np.float32]) -> None:
        self.values: dict[str, F64] = {"x": x.astype(np.float64), "weight": layer.weight.astype(np.float64)}
        if layer.bias is not None:
            self.values["bias"] = layer.bias.astype(np.float64)
        self.quantizers = {"weight": layer.weight_quantizer, "input": layer.input_quantizer}
        self.shifts: dict[str, tuple[F64, NDArray[np.bool_], NDArray[np.bool_]]] = {}
        for name, data in (("weight", layer.weight), ("input", x)):
            q = self.quantizers[name]
            if q is None:
                continue
            quant = q.config.quant
            low, high = q.config.quant_range
            self.values[f"{name}_scale"] = q.scale.astype(np.float64)
            self.values[f"{name}_zero_point"] = np.broadcast_to(q.zero_point, q.scale.shape).astype(np.float64)
            s, z = (ref.spread(v, data.shape, quant.axis, quant.group_size) for v in (q.scale, q.zero_point))
            t = data / s
            if quant.info.is_float:
                rounded = ref.decode(ref.encode(np.clip(t, low, high), quant.dtype), quant.dtype).astype(np.float64)
                below, above = t < low, t > high
            else:
                rounded = np.rint(t).astype(np.float64)
                below, above = rounded + z < low, rounded + z > high
            self.shifts[name] = (rounded - t.astype(np.float64), below, above)

    def simulate(self, name: str, data: F64, values: dict[str, F64]) -> F64:
        q = self.quantizers[name]
        if q is None:
            return data
        quant = q.config.quant
        low, high = q.config.quant_range
        s, z = (
            ref.spread(values[f"{name}_{part}"], data.shape, quant.axis, quant.group_size)
            for part in ("scale", "zero_point")
        )
        shift, below, above = self.shifts[name]
        inside = s * (data / s + shift)
        return np.where(below, s * (low - z), np.where(above, s * (high - z), inside))

    def loss(self, values: dict[str, F64], dy: F64) -> float:
        y = self.simulate("input", values["x"], values) @ self.simulate("weight", values["weight"], values).T
        return float(((y + values.get("bias", 0.0)) * dy).sum())

    def gradient(self, name: str, dy: F64) -> F64:
        """Central differences, an entry at a time."""
        base, out = self.values[name], np.empty(self.values[name].shape)
        for i in np.ndindex(base.shape):
            h = 1e-5 * max(abs(float(base[i])), 1e-3)
            ends = []
            for sign in (1, -1):
                moved = base.copy()
                moved[i] += sign * h
                ends.append(self.loss(self.values | {name: moved}, dy))
            out[i] = (ends[0] - ends[1]) / (2 * h)
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        (("int8", "symmetric", 0, None), ("uint8", "asymmetric")),
        (("int4", "asymmetric", -1, 4), ("int4", "asymmetric")),
        (("uint4", "asymmetric", None, None), ("int8", "symmetric")), (("int4", "symmetric", 0, None), None),
        (("float8_e4m3fn", "symmetric", 0, None), ("float8_e4m3fn", "symmetric")),
        (("float8_e5m2", "symmetric", -1, 5), ("float8_e5m2", "symmetric")),
    ],
)  # fmt: skip
def test_gradients_equal_finite_differences_in_float64(weight: Any, inputs: Any, bias: bool) -> None:
    shape = (2, 3, 9)
    activation: Any = "float" if inputs is None else fq(make_config(*inputs, None, None))
    layer = layer_of(4, 9, fq(make_config(*weight)), activation, bias)
    rng = np.random.default_rng(11)
    x = rng.standard_normal(shape).astype(np.float32)
    layer(x)
    for name, p in layer.params.items():
        if name.endswith("scale"):
            p *= np.float32(0.6)  # so that some is clipped
        elif name.endswith("zero_point"):
            p += np.float32(0.3)
    layer(x)
    dy = rng.standard_normal((2, 3, 4)).astype(np.float32)
    dx = layer.backward(dy)
    surrogate = Surrogate(layer, x)
    clipped = [below.any() or above.any() for _, below, above in surrogate.shifts.values()]
    assert all(clipped)
    found = {"x": dx, **layer.grads}
    assert {f"{n}_scale" for n in surrogate.shifts} <= set(found)
    assert ("bias" in found) == bias
    for name, gradient in found.items():
        expected = surrogate.gradient(name, dy.astype(np.float64))
        if name.endswith(("scale", "zero_point")):
            quantizer = surrogate.quantizers[name.split("_")[0]]
            assert quantizer is not None
            q = quantizer.config.quant
            data = layer.weight if name.startswith("weight") else x
            count = ref.spread(
                np.arange(quantizer.scale.size).reshape(quantizer.scale.shape), data.shape, q.axis, q.group_size
            )
            each = np.bincount(count.ravel()).reshape(quantizer.scale.shape)
            expected = expected / np.sqrt(each * float(q.quant_max))
        assert gradient.dtype == np.float32 and gradient.shape == expected.shape
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_batches_of_any_rank() -> None:
    layer = layer_of(5, 7, fq(qn.QuantConfig.int4_per_channel()), fq(qn.QuantConfig.int8()))
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 7)).astype(np.float32)
    layer.calibrate([x])
    whole = layer(x)
    dx = layer.backward(whole)
    grads = {name: g.copy() for name, g in layer.grads.items()}
    flat = layer(x.reshape(24, 7))
    np.testing.assert_allclose(flat.reshape(whole.shape), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.backward(flat).reshape(dx.shape), dx, rtol=1e-5, atol=1e-6)
    for name, g in layer.grads.items():
        np.testing.assert_allclose(g, grads[name], rtol=1e-4, atol=1e-5)
    one = layer(x[0, 0, 0])
    assert one.shape == (5,) and layer.backward(one).shape == (7,)
    none = layer(np.empty((0, 3, 7), np.float32))
    assert none.shape == (0, 3, 5) and layer.backward(none).shape == (0, 3, 7)
    assert not any(g.any() for g in layer.grads.values())


# ----------------------------------------------------------------------------------------------------------------------
# Parameters, states, refusals


def test_parameters_are_shared_arrays_and_appear_with_data() -> None:
    weights = np.ones((3, 4), np.float32)
    layer = qn.QATLinear(
        weights, [0, 0, 0.5], weight=fq(qn.QuantConfig.int8_per_channel()), activation=fq(qn.QuantConfig.int8())
    )
    layer.params["weight"][0] = 7
    assert weights[0, 0] == 1 and layer.weight[0, 0] == 7
    assert set(layer.params) == {"weight", "bias"} and not layer.grads
    layer.calibrate([np.ones((2, 4))])
    assert set(layer.params) == {"weight", "bias", "weight_scale", "input_scale"}
    assert layer.params["weight_scale"].shape == (3,) and layer.params["input_scale"].shape == ()
    held = layer.params["weight_scale"]
    layer.params["weight_scale"] -= np.float32(0.001)
    assert layer.params["weight_scale"] is held and layer.weight_quantizer.scale[1] == held[1]
    y = layer(np.ones((2, 4)))
    layer.backward(y)
    assert set(layer.grads) == set(layer.params)
    assert all(layer.grads[name].shape == p.shape for name, p in layer.params.items())
    layer.freeze()
    assert set(layer.params) == {"weight", "bias"}
    layer(np.ones((2, 4)))
    layer.backward(y)
    assert set(layer.grads) == {"weight", "bias"}
    layer.unfreeze()
    assert set(layer.params) == {"weight", "bias", "weight_scale", "input_scale"}


def test_calibrate_settles_the_range() -> None:
    batches = [np.full((2, 4), v, np.float32) for v in (1.0, -3.0, 2.0)]
    for learnable in (True, False):
        layer = layer_of(3, 4, None, fq(qn.QuantConfig("uint8").asymmetric(), learnable))
        layer.calibrate(batches)
        expected = qn.qparams_from_range(-3, 2, qn.QuantConfig("uint8").asymmetric())
        layer(np.full((1, 4), 100, np.float32))
        assert layer.input_quantizer is not None and layer.input_quantizer.qparams == expected
    only = layer_of(3, 4, fq(qn.QuantConfig.int4()), "float")
    only.calibrate([])
    assert "weight_scale" in only.params


def test_calibrating_again_starts_again() -> None:
    """A learned input scale that a first batch gave is not kept silently; every state, and nothing without a batch."""
    config = qn.QuantConfig("uint8").asymmetric()
    for settle in (lambda layer: None, qn.QATLinear.freeze):
        layer = layer_of(3, 4, None, fq(config))
        layer(np.ones((1, 4)))
        layer.params["input_scale"] *= 3
        settle(layer)
        before = layer.input_quantizer.qparams  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="no batch"):
            layer.calibrate([])
        with pytest.raises(ValueError, match="in_features"):
            layer.calibrate([np.ones(3)])
        assert layer.input_quantizer.qparams == before  # type: ignore[union-attr]
        layer.calibrate([np.full((2, 4), 5.0), np.full((2, 4), -1.0)])
        assert layer.input_quantizer.qparams == qn.qparams_from_range(-1, 5, config)  # type: ignore[union-attr]
        layer(np.full((1, 4), 100.0))
        assert layer.input_quantizer.qparams == qn.qparams_from_range(-1, 5, config)  # type: ignore[union-attr]


@pytest.mark.parametrize("inputs", ["float", "observed", "learned"])
@pytest.mark.parametrize("learnable", [False, True])
def test_training_goes_on_from_a_state(learnable: bool, inputs: str) -> None:
    activation = "float" if inputs == "float" else fq(qn.QuantConfig.int8(), inputs == "learned", "moving_average")
    weight = fq(qn.QuantConfig.int4_per_group(4), learnable)
    x = np.random.default_rng(1).standard_normal((8, 5, 9)).astype(np.float32)

    def steps(layer: qn.QATLinear, batches: Any) -> qn.QATLinear:
        for batch in batches:
            y = layer(batch)
            layer.backward(y / np.float32(y.size))
            for name, gradient in layer.grads.items():
                layer.params[name] -= np.float32(0.01) * gradient
        return layer

    one = steps(layer_of(6, 9, weight, activation), x[:4])
    state = pickle.loads(pickle.dumps(one.state_dict()))
    fresh, used = layer_of(6, 9, weight, activation, seed=1), steps(layer_of(6, 9, weight, activation, seed=2), x[6:])
    held = dict(used.params)
    expected = steps(one, x[4:])
    for two in (fresh, used):
        two.load_state_dict(state)
        steps(two, x[4:])
        assert set(two.params) == set(one.params)
        for name, p in two.params.items():
            ref.assert_same_bits(p, expected.params[name])
        ref.assert_same_bits(two.convert()(x), expected.convert()(x))
    assert all(used.params[name] is p for name, p in held.items())
    before = one.state_dict()
    for bad, message in (
        ({}, "needed are"), (state | {"bias": None}, "bias has shape None"),
        (layer_of(7, 9, weight, activation).state_dict(), r"weight has shape \(7, 9\)"),
        (state | {"weight_quantizer": {}}, "the state has the entries"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(bad)
    if inputs != "float":
        with pytest.raises(ValueError, match="the state has the entries"):
            one.load_state_dict(fresh.state_dict() | {"input_quantizer": {}})
    assert str(one.state_dict()) == str(before)


def test_from_sizes_is_glorot_and_reproducible() -> None:
    layer = qn.QATLinear.from_sizes(300, 100, rng=3)
    limit = math.sqrt(6 / 400)
    assert layer.weight.shape == (100, 300) and layer.weight.dtype == np.float32
    assert 0.99 * limit < np.abs(layer.weight).max() <= limit
    assert abs(layer.weight.std() - limit / math.sqrt(3)) < 0.002
    assert layer.bias is not None and not layer.bias.any()
    ref.assert_same_bits(layer.weight, qn.QATLinear.from_sizes(300, 100, rng=np.random.default_rng(3)).weight)
    assert not np.array_equal(layer.weight, qn.QATLinear.from_sizes(300, 100, rng=4).weight)
    assert qn.QATLinear.from_sizes(3, 2, bias=False).bias is None
    assert qn.QATLinear.from_sizes(np.int64(3), 2, activation="float").input_quantizer is None
    for bad in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="must be a positive int"):
            qn.QATLinear.from_sizes(bad, 3)  # type: ignore[arg-type]


def test_refusals() -> None:
    w = np.ones((3, 4), np.float32)
    for arguments, keywords, message in (
        ((w[0],), {}, "out_features, in_features"), ((w[:0],), {}, "at least 1 each"),
        ((w, np.ones(4)), {}, r"must be \(3,\)"),
        ((w,), {"activation": "dynamic"}, "FakeQuantConfig or 'float'"),
        ((w,), {"activation": fq(qn.QuantConfig.int8_per_channel())}, "one scale for its input"),
        ((w,), {"activation": fq(qn.QuantConfig.fp8())}, "cannot be multiplied"),
        ((w,), {"weight": fq(qn.QuantConfig.fp8())}, "cannot be multiplied"),
        ((w,), {"weight": fq(qn.QuantConfig.int8_per_channel(1))}, "per channel of axis 1"),
        ((w,), {"weight": fq(qn.QuantConfig.int4_per_group(2, axis=0))}, "groups along axis 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            qn.QATLinear(*arguments, **keywords)
    for config in (qn.QuantConfig.int8(), {"dtype": "int8"}):
        with pytest.raises(TypeError, match="must be a FakeQuantConfig"):
            qn.QATLinear(w, weight=config)  # type: ignore[arg-type]
    layer = qn.QATLinear(w)
    with pytest.raises(RuntimeError, match="has not been called"):
        layer.backward(np.ones((1, 3)))
    with pytest.raises(RuntimeError, match="has seen no data"):
        layer.convert()
    with pytest.raises(ValueError, match="no batch to calibrate with"):
        layer.calibrate([])
    for bad in (np.ones((2, 3), np.float32), np.float32(1)):
        for call in (layer, lambda x: layer.calibrate([x])):
            with pytest.raises(ValueError, match="last dimension must be in_features=4"):
                call(bad)
    y = layer(np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"dy has shape \(3, 2\)"):
        layer.backward(y.T)
    with pytest.raises(TypeError, match="expected an array of float"):
        layer(np.ones((2, 4), np.int32))
    layer.params["weight"][1, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 12 values are NaN"):
        layer(np.ones((2, 4)))
    frozen = qn.QATLinear(w)
    frozen.freeze()
    with pytest.raises(RuntimeError, match="has seen no data"):
        frozen(np.ones((2, 4)))


# ----------------------------------------------------------------------------------------------------------------------
# Weights trained elsewhere


def torch_rule(x: NDArray[np.float32], scale: Any, zero: Any, low: int, high: int) -> NDArray[Any]:
    """PyTorch's codes: times the reciprocal, in float32."""
    return np.clip(np.rint(x * (np.float32(1) / np.float32(scale))) + zero, low, high).astype(np.int64)


RANGES = [
    ("int8", -128, 127),
    ("int8", -127, 127),
    ("uint8", 0, 255),
    ("int4", -8, 7),
    ("int4", -7, 7),
    ("uint4", 0, 15),
]


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@pytest.mark.parametrize("axis", [None, 0])
def test_weights_of_pytorch_keep_their_codes(dtype: str, low: int, high: int, axis: int | None) -> None:
    rng = np.random.default_rng(high)
    n, k = 6, 300
    scale = rng.uniform(0.001, 0.01, n if axis == 0 else 1).astype(np.float32)
    zero = np.zeros(scale.shape, np.int32) if low == -high else rng.integers(low, high + 1, scale.shape)
    column = scale[:, None] if axis == 0 else scale
    ties = np.rint(rng.uniform(-1, 1, (n, k)) * (high - low)) + 0.5
    w = (ties * column).astype(np.float32)
    expected = torch_rule(w, column, zero[:, None] if axis == 0 else zero, low, high)
    q = qn.tensor_from_torch(w, scale, zero, dtype, axis, quant_min=low, quant_max=high)
    assert np.array_equal(q.codes, expected)
    assert np.array_equal(q.scale.ravel(), scale)
    assert q.config.is_symmetric == (low == -high)
    divided = qn.quantize_tensor(w, q.config, q.qparams).codes
    assert (divided != q.codes).any(), "data where PyTorch's rule and true division differ"
    layer = qn.QuantizedLinear.from_tensor(q, np.ones(n), activations=qn.QParams(0.02, 120, "uint8"))
    assert np.array_equal(layer.weight_quantized().codes, expected)
    x = (rng.integers(0, 256, (4, k)) - 120) * np.float32(0.02)
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T + 1
    np.testing.assert_allclose(layer(x.astype(np.float32)), exact, rtol=1e-4, atol=1e-4)


def test_weights_of_pytorch_that_do_not_fit() -> None:
    w = np.ones((2, 3), np.float32)
    for keywords, message in (
        ({"scale": [0.1, 0.2]}, "axis"), ({"scale": [0.1] * 3, "axis": 0}, r"need \(2,\)"),
        ({"scale": -1.0}, "finite and > 0"), ({"scale": 0.1, "dtype": "float8_e5m2"}, "has no zero point"),
        ({"scale": 0.1, "zero_point": np.nan}, "zero_point holds NaN"),
        ({"scale": 0.1, "quant_min": -200}, "must ascend"), ({"scale": 0.1, "dtype": "int2"}, "not a code dtype"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            qn.tensor_from_torch(w, **keywords)
    with pytest.raises(ValueError, match="1 of 6 weights are NaN"):
        qn.tensor_from_torch(np.where(np.eye(2, 3, dtype=bool) & (w == 1) & [[1, 0, 0], [0, 0, 0]], np.nan, w), 0.1)
    assert qn.tensor_from_torch(w, 0.5, -128.0).zero_point == -128
    assert qn.tensor_from_torch(w, 0.5, 3.4).codes.tolist() == [[5] * 3] * 2


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_a_layer_trained_in_pytorch_runs_with_its_codes(
    dtype: str, low: int, high: int, axis: int | None, learned: bool
) -> None:
    torch = import_torch()
    rng = np.random.default_rng([high, learned])
    n, k = 8, 200
    scale = rng.uniform(0.001, 0.01, n if axis == 0 else 1).astype(np.float32)
    zero = np.zeros(scale.shape, np.float32)
    if low != -high:
        zero = rng.integers(low, high + 1, scale.shape).astype(np.float32)
        if learned:
            zero = np.clip(zero + rng.uniform(-0.5, 0.5, scale.shape).astype(np.float32), low, high)
    column = scale[:, None] if axis == 0 else scale
    w = (np.rint(rng.uniform(-1, 1, (n, k)) * (high - low)) * column).astype(np.float32)
    w += np.where(rng.random((n, k)) < 0.5, 0.5, rng.uniform(-0.5, 0.5, (n, k))).astype(np.float32) * column
    bias = rng.standard_normal(n).astype(np.float32)
    x = rng.standard_normal((5, k)).astype(np.float32)
    weight, s, z = torch.tensor(w), torch.tensor(scale), torch.tensor(zero)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if learned:
            call = torch._fake_quantize_learnable_per_tensor_affine
            arguments: tuple[Any, ...] = (weight, s, z, low, high, 1.0)
            if axis == 0:
                call = torch._fake_quantize_learnable_per_channel_affine
                arguments = (weight, s, z, 0, low, high, 1.0)
            simulated = call(*arguments)
        elif axis == 0:
            simulated = torch.fake_quantize_per_channel_affine(weight, s, z.int(), 0, low, high)
        else:
            simulated = torch.fake_quantize_per_tensor_affine(weight, s[0], z[0].int(), low, high)
        seen = torch.fake_quantize_per_tensor_affine(torch.tensor(x), 0.025, 120, 0, 255)
        y = torch.nn.functional.linear(seen, simulated, torch.tensor(bias)).numpy()
    # The bridge: plain arrays in.
    tensor = qn.tensor_from_torch(w, scale, zero, dtype, axis, quant_min=low, quant_max=high)
    ref.assert_same_bits(tensor.dequantize(), simulated.numpy())
    inputs = qn.QParams(0.025, 120, "uint8")
    layer = qn.QuantizedLinear.from_tensor(tensor, bias, activations=inputs)
    ref.assert_same_bits(layer.weight_quantized().dequantize(), simulated.numpy())
    codes = layer.quantize_input(x)[0]
    assert np.array_equal(codes, torch_rule(x, 0.025, 120, 0, 255))  # no tie in this data
    size = np.abs(seen.numpy()) @ np.abs(simulated.numpy()).T + np.abs(bias)
    assert np.all(np.abs(layer(x) - y) <= (k + 8) * 2.0**-24 * size)


@pytest.mark.parametrize(("dtype", "low", "high"), [*RANGES, ("int4", -2, 1), ("uint4", 0, 3)])
@pytest.mark.parametrize(("size", "axis"), [(32, None), (32, -1), (50, 1), (20, 0), (200, -1)])
def test_groups_trained_in_pytorch_keep_their_codes(
    dtype: str, low: int, high: int, size: int, axis: int | None
) -> None:
    """A scale each group, as torchao's QAT leaves them; codes are those that PyTorch gives each group by itself."""
    torch = import_torch()
    rng = np.random.default_rng([high, size])
    n, k = 40, 200
    w = rng.standard_normal((n, k)).astype(np.float32)
    at = 1 if axis is None else axis % 2
    starts = range(0, w.shape[at], size)
    shape = (len(starts), k) if at == 0 else (n, len(starts))
    scale = (rng.uniform(1, 2, shape) / (high - low)).astype(np.float32)
    zero = np.zeros(shape, np.int32) if low == -high else rng.integers(low, high + 1, shape).astype(np.int32)
    expected = np.empty_like(w)
    for i, start in enumerate(starts):
        part = w[start : start + size].T if at == 0 else w[:, start : start + size]
        s, z = (torch.tensor(np.take(a, i, at)) for a in (scale, zero))
        values = torch.fake_quantize_per_channel_affine(torch.tensor(part), s, z, 0, low, high).numpy()
        if at == 0:
            expected[start : start + size] = values.T
        else:
            expected[:, start : start + size] = values
    q = qn.tensor_from_torch(w, scale, zero, dtype, axis, group_size=size, quant_min=low, quant_max=high)
    ref.assert_same_bits(q.dequantize(), expected)
    assert q.codes.min() >= low and q.codes.max() <= high
    if at == 1:
        layer = qn.QuantizedLinear.from_tensor(q, activations="float")
        ref.assert_same_bits(layer.weight_quantized().dequantize(), expected)
    for bad in (scale[0], scale[:, :-1] if scale.shape[1] > 1 else scale[:-1], scale.ravel()[0]):
        with pytest.raises(ValueError, match="scale has shape"):
            qn.tensor_from_torch(w, bad, 0, dtype, axis, group_size=size)


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_a_model_out_of_pytorchs_own_qat(backend: str) -> None:
    """`torch.ao.quantization` from prepare_qat to the arrays, its default config (fused, reduced range on x86)."""
    torch = import_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.quantization as ao

        torch.manual_seed(0)
        model = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(40, 12))
        model.train()
        model.qconfig = ao.get_default_qat_qconfig(backend)
        ao.prepare_qat(model, inplace=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(256, 40)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()
            optimizer.step()
        model.apply(ao.disable_observer)
        seen = model[0](x).detach()
        simulated = model[1].weight_fake_quant(model[1].weight).detach()
    stub, linear = model[0].activation_post_process, model[1]
    m = linear.weight_fake_quant
    weight = qn.tensor_from_torch(
        linear.weight.detach().numpy(), m.scale.numpy(), m.zero_point.numpy(), "int8",
        m.ch_axis if m.ch_axis >= 0 else None, quant_min=m.quant_min, quant_max=m.quant_max,
    )  # fmt: skip
    ref.assert_same_bits(weight.dequantize(), simulated.numpy())
    inputs = qn.QParams(float(stub.scale), int(stub.zero_point), "uint8", stub.quant_min, stub.quant_max)
    layer = qn.QuantizedLinear.from_tensor(weight, linear.bias.detach().numpy(), activations=inputs)
    codes, scale, zero = layer.quantize_input(x.numpy())
    assert codes.max() == stub.quant_max
    decoded = qn.dequantize(codes, scale, zero)
    steps = x.numpy()[decoded != seen.numpy()] / scale.astype(np.float64)  # the layer divides, PyTorch does not
    assert len(steps) < 4 and np.all(np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-5)
    expected = torch.nn.functional.linear(torch.tensor(decoded), simulated, linear.bias.detach()).numpy()
    size = np.abs(decoded) @ np.abs(simulated.numpy()).T + 1
    assert np.all(np.abs(layer(x.numpy()) - expected) <= 48 * 2.0**-24 * size)


DOCUMENT = Path(__file__).parents[1] / "docs" / "qat.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["a layer", "weights of PyTorch"])
def test_what_the_document_shows_runs(block: str) -> None:
    if "import torch" in block:
        import_torch()
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(block, namespace)
    assert namespace["layer"](np.ones((1, 64), np.float32)).shape == (1, 16)


HOSTILE_STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a quantizer that is none": lambda state: state.update(input_quantizer=None),
    "a part of one that is none": lambda state: state["input_quantizer"].update(observer=5),
    "dimensions without end": lambda state: state["input_quantizer"]["observer"].update(dimensions=[np.inf]),
    "weights of text": lambda state: state.update(weight=np.full((6, 8), "x")),
    "weights of objects": lambda state: state.update(weight=np.full((6, 8), None)),
    "complex weights": lambda state: state.update(weight=state["weight"] * 1j),
    "a bias of text": lambda state: state.update(bias=["x"] * 6),
}


@pytest.mark.parametrize("what", HOSTILE_STATES)
def test_a_state_that_is_refused_changes_nothing(what: str) -> None:
    def trained(factor: float) -> qn.QATLinear:
        x = np.linspace(-factor, factor, 48, dtype=np.float32).reshape(6, 8)
        layer = qn.QATLinear(x, np.zeros(6, np.float32), weight=qn.FakeQuantConfig(qn.QuantConfig.int8_per_channel()))
        layer(x)
        return layer

    layer, state = trained(1), trained(3).state_dict()
    before = pickle.dumps(layer.state_dict())
    HOSTILE_STATES[what](state)
    with pytest.raises((ValueError, TypeError)):
        layer.load_state_dict(state)
    assert pickle.dumps(layer.state_dict()) == before
