"""Weights with groups, and int4 without: every kernel against the NumPy reference, panels against what they claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import qnative as qn
from qnative.files import SafetensorsFile
from tests import reference as ref

SIZES = (1, 7, 8, 16, 24, 32, 40, 64, 100, 128, 129, 200, None)  # None: per channel
SCALES = ("float32", "float16", "bfloat16")


def config_of(dtype: str, size: int | None, symmetric: bool, scale_dtype: str) -> qn.QuantConfig:
    config = qn.QuantConfig.int4_per_group(size) if size else qn.QuantConfig.int4_per_channel()
    config = replace(config, dtype=dtype, scale_dtype=scale_dtype)
    return config if symmetric else config.asymmetric()


def expected(layer: qn.QuantizedLinear, x: NDArray[np.float32]) -> NDArray[np.float32]:
    q, config = layer.weight_quantized(), layer.config
    w = ref.Weights.build(q.codes, q.scale, q.zero_point, config.dtype, config.group_size)
    if layer.activations == "float":
        return ref.float_linear(x, w, layer.bias)
    codes, scale, zero = ref.dynamic_rows(x, str(layer.activations))
    return ref.epilogue(ref.accumulators(codes, zero, w), scale, w, layer.bias)


def data(seed: int, m: int, k: int, n: int, kind: str) -> tuple[Any, Any, Any]:
    """Normal values; or, so that sums reach their ends, the largest codes everywhere; or rows of one sign."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float32)
    w = np.copysign(np.maximum(np.abs(w), np.float32(2**-8)), w)  # a group of one has a scale that float16 can hold
    if kind == "ends":
        x, w = np.where(x > 1.5, -0.01, 1).astype(np.float32), np.where(w > 2, -0.01, 1).astype(np.float32)
    elif kind == "one sign":
        x, w = -np.abs(x), np.abs(w)
    return x, w, rng.standard_normal(n).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    m=st.sampled_from((1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 25, 49)),
    k=st.integers(1, 700),
    n=st.integers(1, 70),
    dtype=st.sampled_from(("int4", "int4", "uint4", "int8")),
    size=st.sampled_from(SIZES),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALES),
    activations=st.sampled_from(("dynamic", "dynamic_symmetric", "float")),
    kind=st.sampled_from(("normal", "ends", "one sign")),
)
def test_every_kernel_equals_the_reference(
    seed: int, m: int, k: int, n: int, dtype: str, size: int | None, symmetric: bool, scale_dtype: str,
    activations: str, kind: str,
) -> None:  # fmt: skip
    x, w, bias = data(seed, m, k, n, kind)
    config = config_of(dtype, size, symmetric, scale_dtype)
    layer = qn.QuantizedLinear.from_float(w, bias, config, activations=activations)
    wanted = expected(layer, x)
    for name, usable in qn._core.isas().items():
        if usable:
            what = f"{name} {config} {m},{k},{n} {kind} {activations}"
            ref.assert_same_bits(layer._forward(x, isa=name), wanted, what)


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("size", [16, 32, 64, 128, 200, None])
def test_many_rows_and_panels(size: int | None, scale_dtype: str, isa: str) -> None:
    """More rows than a block has, panels than a tile, k than are unpacked at a time; any number of threads."""
    x, w, bias = data(size or 0, 270, 600, 130, "normal")
    for symmetric in (True, False):
        layer = qn.QuantizedLinear.from_float(w, bias, config_of("int4", size, symmetric, scale_dtype))
        wanted = expected(layer, x)
        for threads in (1, 2, 3):
            with qn.num_threads(threads):
                ref.assert_same_bits(layer._forward(x, isa=isa), wanted, f"{threads} threads")
        ref.assert_same_bits(layer._forward(x[7], isa=isa), wanted[7], "a row alone")


@pytest.mark.parametrize("size", [1000, None])
def test_more_panels_than_are_unpacked_at_a_time(size: int | None, isa: str) -> None:
    """Some columns after others, of every kind of output and bias; the last panel is not full."""
    x, w, _ = data(5, 53, 3000, 107, "normal")
    q = qn.quantize_tensor(w, config_of("int4", size, False, "float16"))
    static = qn.QParams(np.float32(0.03), 100, "uint8")
    int_bias = np.arange(-50, 57, dtype=np.int32) * 20
    for bias in (np.linspace(-1, 1, 107, dtype=np.float32), *([] if size else [int_bias])):
        for output in (None, qn.QParams(np.float32(0.8), 3, "uint8")):
            layer = qn.QuantizedLinear.from_tensor(q, bias, static, activation="relu", output=output)
            wanted = layer._forward(x, isa="scalar")
            for threads in (1, 3):
                with qn.num_threads(threads):
                    ref.assert_same_bits(layer._forward(x, isa=isa), wanted)
            ref.assert_same_bits(layer._forward(x[3:5], isa=isa), wanted[3:5], "few rows")
    layer = qn.QuantizedLinear.from_tensor(q, None, "dynamic")
    ref.assert_same_bits(layer._forward(x, isa=isa), expected(layer, x))


def test_rows_that_are_too_long_to_be_unpacked(isa: str) -> None:
    x, w, _ = data(6, 49, 8200, 17, "normal")
    layer = qn.QuantizedLinear.from_float(w, None, config_of("int4", None, True, "float32"))
    ref.assert_same_bits(layer._forward(x, isa=isa), expected(layer, x))


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_zero_points_come_back(symmetric: bool, scale_dtype: str, isa: str) -> None:
    """Of every size that the dtype has: float16's subnormal scales, too."""
    _, w, _ = data(1, 1, 200, 33, "normal")
    w *= np.exp2(np.linspace(-18, 10, 200, dtype=np.float32))
    w[3] = 0
    q = qn.quantize_tensor(w, config_of("int4", 16, symmetric, scale_dtype))
    x = data(2, 14, 200, 1, "normal")[0]
    for activations in ("dynamic", "float"):
        layer = qn.QuantizedLinear.from_tensor(q, None, activations)
        back = layer.weight_quantized()
        assert np.array_equal(back.data, q.data)
        ref.assert_same_bits(back.scale_data, q.scale_data)
        ref.assert_same_bits(back.zero_point, q.zero_point)
        for m in (1, 3, 14):
            ref.assert_same_bits(layer._forward(x[:m], isa=isa), expected(layer, x[:m]), f"{activations}, {m} rows")


@pytest.mark.parametrize(
    ("size", "symmetric", "scale_dtype", "bits"),
    [(32, True, "float16", 4.5), (32, True, "bfloat16", 4.5), (32, True, "float32", 5.0), (32, False, "float16", 4.625),
     (16, True, "float16", 5.0), (64, True, "float16", 4.25), (128, True, "float16", 4.125)],
)  # fmt: skip
def test_packed_form_takes_the_bits_it_claims(
    size: int, symmetric: bool, scale_dtype: str, bits: float, tmp_path: Path
) -> None:
    _, w, _ = data(0, 1, 4096, 32, "normal")
    config = config_of("int4", size, symmetric, scale_dtype)
    for activations in ("dynamic", "float"):
        layer = qn.QuantizedLinear.from_float(w, None, config, activations=activations)
        assert layer.nbytes * 8 == bits * w.size
    path = tmp_path / "model.safetensors"
    qn.quantize_model({"layer.weight": w}, config).save(path)
    with SafetensorsFile(path) as file:
        held = {name: info.nbytes for name, info in file.tensors.items()}
    assert held.pop("layer.weight_shape") == 16
    assert sum(held.values()) * 8 == bits * w.size
    layer = qn.QuantizedModel.load(path)["layer"]
    assert layer.nbytes * 8 == bits * w.size


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 700), st.sampled_from((None, 1, 8, 12, 32, 100, 200)))
def test_nibbles_are_packed_whatever_pads_their_rows(seed: int, n: int, k: int, size: int | None) -> None:
    """Every code, whole vectors of steps and the rest of them, groups that begin within a byte; rows end with noise."""
    config = (qn.QuantConfig.int4_per_group(size) if size else qn.QuantConfig.int4_per_channel()).asymmetric()
    rng = np.random.default_rng([seed, n, k])
    q = qn.quantize_tensor(rng.standard_normal((n, k)).astype(np.float32), config)
    words = rng.integers(0, 2**32, q.data.shape, np.uint32)
    noisy = qn.QuantizedTensor(words.view(np.int32), q.scale_data, q.zero_point, q.shape, q.dtype, config)
    codes = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(n, -1)[:, :k].astype(np.int8) - 8
    layer = qn.QuantizedLinear.from_tensor(noisy)
    ref.assert_same_bits(layer.weight_quantized().codes, codes.astype(np.int8))
    ref.assert_same_bits(layer.weight_quantized().zero_point, q.zero_point)
    x = rng.standard_normal((3, k)).astype(np.float32)
    ref.assert_same_bits(layer(x), expected(layer, x))
