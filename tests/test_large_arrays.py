"""Arrays of more elements than an int32 counts, and more bytes than a uint32: 2^31 and 2^33.

Zeros that nobody has written take no memory, so an input of 8 GiB costs its last page; at most about 9 GiB are
resident, in the test whose result is that large. Each looks at the elements behind the limit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qnative as qn

OVER = 2**31
UINT8 = qn.QuantConfig("uint8").asymmetric()

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()


def wants(gigabytes: float) -> None:
    """Skip where a test's memory is not to be had."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        pytest.skip("needs Linux's /proc")
    if int(lines["MemAvailable"].split()[0]) * 1024 < (gigabytes + 2) * 2**30:
        pytest.skip(f"wants {gigabytes} GiB of memory")


def zeros(*shape: int) -> NDArray[np.float32]:
    """Zeros that take no memory, with some other values at the very end."""
    x = np.zeros(shape, np.float32)
    x.reshape(-1)[-3:] = 1, -2, 3
    return x


def check(found: NDArray[Any], tail: list[float]) -> None:
    """The last elements, and that the others are 0, also the one that an index modulo 2^32 or 2^31 would reach."""
    flat = found.reshape(-1)
    assert flat.size > OVER and flat[-3:].tolist() == tail
    assert not any(flat[at : at + (1 << 20)].any() for at in (0, OVER - (2 << 20), flat.size - 3 - (1 << 20)))
    assert not flat[: flat.size % OVER + 8].any()


def test_codes_of_elements() -> None:
    wants(2.5)
    x = zeros(OVER + 5)
    codes = qn.quantize(x, 0.5)
    check(codes, [2, -4, 6])
    check(qn.quantize(x, 0.5, dtype="int4", out=codes), [2, -4, 6])
    eight = qn.encode(np.float32([1, -2, 3]), "float8_e5m2").tolist()
    check(qn.encode(x, "float8_e5m2", out=codes.view(np.uint8)), eight)
    check(qn.quantize(x, 1.0, dtype="float8_e5m2", out=codes.view(np.uint8)), eight)


def test_codes_with_a_scale_each_channel_and_each_group() -> None:
    wants(5)
    x = zeros(OVER // 64 + 1, 64)
    scale = np.full(64, 0.5, np.float32)
    codes = qn.quantize(x, scale, axis=1)
    check(codes, [2, -4, 6])
    scale = np.full((len(x), 2), 0.5, np.float32)
    check(qn.quantize(x, scale, group_size=32, out=codes), [2, -4, 6])
    scale = np.full(len(x), 0.5, np.float32)
    check(qn.quantize(x, scale, axis=0, out=codes), [2, -4, 6])


def test_values_of_elements() -> None:
    """The one whose result takes 8 GiB, once."""
    wants(9)
    codes = np.zeros(OVER + 5, np.int8)
    codes[-3:] = 2, -4, 6
    out = qn.dequantize(codes, 0.5, dtype="int8")
    check(out, [1, -2, 3])
    bits = np.zeros(OVER + 5, np.uint8)
    bits[-3:] = qn.encode(np.float32([1, -2, 3]), "float8_e4m3fn")
    check(qn.decode(bits, "float8_e4m3fn", out=out), [1, -2, 3])
    check(qn.fake_quantize(zeros(OVER + 5), 0.5, out=out), [1, -2, 3])


@pytest.mark.parametrize("method", ["min_max", "moving_average", "percentile", "mean_std", "kl", "mse"])
def test_observers(method: str) -> None:
    wants(1)
    observer = qn.make_observer(method)
    observer.observe(zeros(OVER + 5))
    assert observer.count == OVER + 5
    assert (float(observer.min_val), float(observer.max_val)) == (-2, 3)
    assert np.isfinite(observer.qparams(UINT8).scale)


def test_observer_of_channels() -> None:
    wants(1)
    observer = qn.make_observer("percentile", axis=1, percentile=100.0)
    observer.observe(zeros(OVER // 64 + 1, 64))
    assert observer.max_val.tolist() == [0.0] * 61 + [1.0, 0.0, 3.0] and observer.min_val[62] == -2


@pytest.mark.parametrize("config", [qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(64),
                                    qn.QuantConfig.fp8()], ids=str)  # fmt: skip
def test_tensors(config: qn.QuantConfig, tmp_path: Path) -> None:
    """Quantized, looked up, saved, verified and loaded: one tensor of 2 GiB (1 GiB of int4)."""
    wants(5)
    x = zeros(OVER // 2048 + 1, 2048)
    q = qn.quantize_tensor(x, config)
    expected = qn.quantize_tensor(x[-2:], config).dequantize()
    assert np.array_equal(q.take([0, -1]), np.stack([np.zeros(2048), expected[-1]]))
    assert q.sqnr(x) == pytest.approx(qn.sqnr(x[-1], expected[-1]))
    path = tmp_path / "m.safetensors"
    qn.QuantizedModel({"t": q, "last": np.float32([1, 2])}).save(path)
    rows, digest = q.take([0, 1, -2, -1]), q.data[-1].tobytes()
    del q
    for mapped in (True, False):
        model = qn.QuantizedModel.load(path, mmap=mapped, verify=mapped)
        assert np.array_equal(model["t"].take([0, 1, -2, -1]), rows) and model["t"].data[-1].tobytes() == digest
        assert model["last"].tolist() == [1, 2]
        del model
    path.unlink()


@pytest.mark.parametrize("form", ["dynamic", "float"])
def test_layer_of_an_input_of_so_many(form: str) -> None:
    wants(1)
    x = zeros(OVER // 1024 + 3, 1024)
    w = np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)
    layer = qn.QuantizedLinear.from_float(w, None, qn.QuantConfig.int8_per_channel(), form)
    y = layer(x)
    assert np.array_equal(y[-2:], layer(x[-2:])) and y[-1].any()
    assert not y[:-1].any()


def test_layer_of_an_output_of_so_many() -> None:
    """2^31 codes of one byte, and 2^30 floats, whose bytes are 2^32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((OVER // 32768 + 1, 8)).astype(np.float32)
    w = rng.standard_normal((32768, 8)).astype(np.float32)
    for output, rows in ((qn.QParams(0.1, 3, "int8"), len(x)), (None, len(x) // 2 + 1)):
        wants(4.5)
        layer = qn.QuantizedLinear.from_float(w, None, qn.QuantConfig.int8_per_channel(), output=output)
        y = layer(x[:rows])
        assert y.nbytes > (OVER if output else 2 * OVER)
        some = np.r_[0, 1, rows // 2, rows - 2, rows - 1]
        assert np.array_equal(y[some], layer(x[some]))
        del y


@pytest.mark.parametrize("config, form", [(qn.QuantConfig.int8_per_channel(), "dynamic"),
                                          (qn.QuantConfig.int4_per_group(64), "dynamic_symmetric"),
                                          (qn.QuantConfig.fp8(), "float")], ids=str)  # fmt: skip
def test_layer_of_so_many_weights(config: qn.QuantConfig, form: str) -> None:
    wants(6)
    n, k = OVER // 4096 + 17, 4096
    w = zeros(n, k)
    w[-2] = np.random.default_rng(0).standard_normal(k)
    layer = qn.QuantizedLinear.from_float(w, None, config, form)
    few = qn.QuantizedLinear.from_float(w[-17:], None, config, form)
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    y = layer(x)
    assert y.shape == (3, n) and y[:, -2].all()
    assert np.array_equal(y[:, -17:], few(x)) and not y[:, : n - 17].any()
