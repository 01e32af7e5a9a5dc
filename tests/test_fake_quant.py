"""FakeQuantize: bits of the forward pass, gradients against the reference and PyTorch, states, learned scales."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from conftest import Guarded
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_elementwise import lay_out
from test_tensor import GRANULARITIES, KINDS, make_config

import qnative as qn
from qnative import _core
from qnative.granularity import Granules

METHODS = [str(m) for m in qn.ObserverMethod]


def is_float8(dtype: str) -> bool:
    return dtype.startswith("float8")


def fake(config: Any, learnable: bool = True, observer: str = "min_max", **options: Any) -> qn.FakeQuantize:
    return qn.FakeQuantize(qn.FakeQuantConfig(config, observer, learnable), **options)


def expected_forward(x: NDArray[Any], scale: Any, zero: Any, config: Any) -> NDArray[np.float32]:
    where = {"axis": config.axis, "group_size": config.group_size}
    limits = ref.code_range(config.dtype, str(config.mode))
    codes = ref.quantize(x, scale, zero, config.dtype, **where, quant_min=limits[0], quant_max=limits[1])
    return ref.dequantize(codes, scale, zero, config.dtype, **where)


class Case(NamedTuple):
    x: NDArray[np.float32]
    dy: NDArray[np.float32]
    config: Any
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]  # learned: not whole numbers


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype, mode = draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    axis, group = None, None
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    if granularity != "tensor":
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        group = draw(st.integers(1, 50)) if granularity == "group" else None
    config = make_config(dtype, mode, axis, group)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape_of_scales = Granules.of_config(shape, config).shape
    low, high = ref.code_range(dtype, mode)
    magnitude = 2.0 ** draw(st.integers(-30, 30))
    scale = (rng.uniform(0.5, 2, shape_of_scales) * magnitude).astype(np.float32)
    # Beyond both ends, at the ends and at ties too.
    reach = (high - low) * draw(st.sampled_from([0.1, 0.6, 2.0]))
    steps = rng.uniform(-reach, reach, shape)
    if not is_float8(dtype):
        steps = np.where(rng.random(shape) < 0.2, np.rint(steps) + 0.5, steps)
    x = (steps * ref.spread(scale, shape, axis, group)).astype(np.float32)
    x[rng.random(shape) < 0.05] = rng.choice(np.float32([0, -0.0]))
    dy = rng.standard_normal(shape).astype(np.float32)
    zero = np.full(shape_of_scales, ref.middle(dtype), np.float32)
    if mode == "asymmetric":
        zero = rng.uniform(low - 2, high + 2, shape_of_scales).astype(np.float32)
        zero = np.where(rng.random(shape_of_scales) < 0.2, np.rint(zero) + np.float32(0.5), zero).astype(np.float32)
    return Case(x, dy, config, scale, zero)


def trained(case: Case) -> qn.FakeQuantize:
    """A FakeQuantize whose learned parameters are those of the case."""
    fq = fake(case.config)
    fq(case.x)
    fq.params["scale"][...] = case.scale
    if "zero_point" in fq.params:
        fq.params["zero_point"][...] = case.zero
    return fq


def assert_close(actual: NDArray[np.float32], expected: Any, size: Any, what: str) -> None:
    """Float32 rounding of a sum whose terms come to `size`, summed in float64 in another order."""
    assert actual.dtype == np.float32 and actual.shape == np.shape(expected)
    allowed = np.abs(expected) * 2.0**-24 + size * 2.0**-46 + 2.0**-149
    assert np.all(np.abs(actual.astype(np.float64) - expected) <= allowed), what


# ----------------------------------------------------------------------------------------------------------------------
# Against the reference


@given(cases())
def test_forward_and_gradients_equal_the_reference(case: Case) -> None:
    fq = trained(case)
    config, mode = case.config, str(case.config.mode)
    codes = np.clip(np.rint(case.zero), *ref.code_range(config.dtype, mode)).astype(np.int64)
    y = fq(case.x)
    ref.assert_same_bits(y, expected_forward(case.x, case.scale, codes, config), repr(config))
    dx = fq.backward(case.dy)
    expected = ref.fake_quantize_backward(
        case.x, case.dy, case.scale, case.zero, config.dtype, mode, config.axis, config.group_size
    )
    ref.assert_same_bits(dx, expected.dx, f"dx {config}")
    assert_close(fq.grads["scale"], expected.ds, expected.ds_size, f"ds {config}")
    assert set(fq.grads) == ({"scale", "zero_point"} if mode == "asymmetric" else {"scale"})
    if mode == "asymmetric":
        assert_close(fq.grads["zero_point"], expected.dz, expected.dz_size, f"dz {config}")


@given(cases())
def test_it_is_fake_quantize_and_its_codes_are_those_of_a_tensor(case: Case) -> None:
    fq = trained(case)
    y = fq(case.x)
    q = fq.qparams
    where = {"group_size": q.group_size} | (
        {} if case.config.info.is_float else {"quant_min": q.quant_min, "quant_max": q.quant_max}
    )
    ref.assert_same_bits(y, qn.fake_quantize(case.x, q.scale, q.zero_point, q.dtype, q.axis, **where))
    tensor = qn.quantize_tensor(case.x, case.config, q)
    ref.assert_same_bits(fq.quantize(case.x), tensor.codes)
    ref.assert_same_bits(y, tensor.dequantize())


@given(cases())
def test_every_level_gives_the_same_bits(case: Case) -> None:
    g = Granules.of_config(case.x.shape, case.config)
    float8 = case.config.dtype if case.config.info.is_float else None
    low, high = (0, 0) if float8 else (int(case.config.quant_min), int(case.config.quant_max))
    zero = np.clip(np.rint(case.zero), low, high).astype(np.int32).ravel()
    scale, x, dy = case.scale.ravel(), case.x.ravel(), case.dy.ravel()
    found = []
    for _ in every_level():
        y, wide, dx, bare = np.empty((4, x.size), np.float32)
        ds, dz = np.zeros(scale.size), np.zeros(scale.size)
        _core.fake_quantize(x, scale, zero, g.walk, low, high, float8, y)
        _core.fake_quantize(x.astype(np.float64), scale, zero, g.walk, low, high, float8, wide)
        _core.fake_quantize_backward(x, dy, scale, zero, g.walk, low, high, float8, bare)
        _core.fake_quantize_backward(x, dy, scale, zero, g.walk, low, high, float8, dx, ds, None if float8 else dz)
        alone = np.zeros(scale.size)
        _core.fake_quantize_backward(x, dy, scale, zero, g.walk, low, high, float8, dx, alone)
        ref.assert_same_bits(bare, dx)
        ref.assert_same_bits(alone, ds)
        found.append((y, wide, dx, ds, dz))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            ref.assert_same_bits(one, two)


def every_level() -> Iterator[str]:
    """Run what follows at each level that this CPU has; the one in use before is restored."""
    before = _core.level()
    try:
        for name, usable in _core.usable_levels().items():
            if usable:
                _core.use_level(name)
                assert _core.level() == name
                yield name
    finally:
        _core.use_level(before)


def test_levels_are_named_and_refused() -> None:
    assert list(_core.usable_levels()) == ["baseline", "avx2", "avx512"]
    assert _core.usable_levels()["baseline"] and _core.usable_levels()[_core.level()]
    with pytest.raises(ValueError, match="'sse9' is not a level"):
        _core.use_level("sse9")
    for name, usable in _core.usable_levels().items():
        if not usable:
            with pytest.raises(RuntimeError, match="cannot run"):
                _core.use_level(name)


@pytest.mark.parametrize(("kernel", "level"), [("scalar", "baseline"), ("avx2", "avx2"), ("avx512vnni", "avx512")])
def test_a_forced_kernel_chooses_the_level_too(kernel: str, level: str) -> None:
    if not _core.isas().get(kernel, False):
        pytest.skip(f"this CPU cannot run {kernel}")
    code = "from qnative import _core; print(_core.level())"
    environment = {**os.environ, "QNATIVE_ISA": kernel, "PYTHONPATH": str(Path(qn.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == level


def test_every_kernel_has_its_level() -> None:
    """Also those that this CPU cannot run: one that were forgotten would make every elementwise loop slow there."""
    plain = {"scalar", "neon", "dotprod", "i8mm"}  # compiled for the machine's baseline, as all of aarch64 is
    wide = {"avx512vnni"}
    for kernel in _core.isas():
        expected = "baseline" if kernel in plain else "avx512" if kernel in wide else "avx2"
        assert _core.level_of(kernel) == expected, kernel
    assert _core.level() == _core.level_of(_core.isa())


def lanes_sum(terms: NDArray[np.float64]) -> float:
    """The written order: element i to lane i mod 32, then the upper half of the lanes to the lower one, and so on."""
    lanes = np.zeros(32)
    for start in range(0, len(terms), 32):
        block = terms[start : start + 32]
        lanes[: len(block)] += block
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 4099])
def test_the_order_of_the_sum_is_the_written_one(size: int) -> None:
    rng = np.random.default_rng(size)
    x = (rng.standard_normal(size) * 40).astype(np.float32)
    dy = (rng.standard_normal(size) * 10.0 ** rng.integers(-6, 6, size)).astype(np.float32)
    scale, zero, walk = np.float32([0.37]), np.int32([5]), Granules.of((size,)).walk
    ratio = x / scale
    code = np.clip(np.rint(ratio), -128 - 5, 127 - 5).astype(np.float32)
    inside = code == np.rint(ratio)
    d = code - np.where(inside, ratio, np.float32(0))
    assert inside.any()
    for _ in every_level():
        ds, dz, dx = np.zeros(1), np.zeros(1), np.empty(size, np.float32)
        _core.fake_quantize_backward(x, dy, scale, zero, walk, -128, 127, None, dx, ds, dz)
        assert ds[0] == lanes_sum((dy * d).astype(np.float64))
        assert dz[0] == lanes_sum(np.where(inside, 0.0, dy))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_rounding_is_that_of_encode(dtype: str) -> None:
    """Every float16 value, every middle between codes and its neighbours, and both ends, as float32 and float64."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    table = ref.magnitudes(dtype)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([table.astype(np.float32), middles, np.float32([448, 464, 465, 57344, 61440, 3e38])])
    x = np.concatenate([halves, edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(0))])
    x = np.concatenate([x, -x, np.float32([1e-45, -1e-45, 0, -0.0])])
    one, zero, walk = np.ones(1, np.float32), np.zeros(1, np.int32), Granules.of(x.shape).walk
    wide = np.concatenate([x.astype(np.float64), np.nextafter(middles.astype(np.float64), 9e9)])
    wide = np.concatenate([wide, np.nextafter(middles.astype(np.float64), 0)])
    for _ in every_level():
        out = np.empty(x.shape, np.float32)
        assert not _core.fake_quantize(x, one, zero, walk, 0, 0, dtype, out)
        ref.assert_same_bits(out, qn.decode(qn.encode(x, dtype), dtype))
        out = np.empty(wide.shape, np.float32)
        assert not _core.fake_quantize(wide, one, zero, Granules.of(wide.shape).walk, 0, 0, dtype, out)
        ref.assert_same_bits(out, qn.decode(qn.encode(wide, dtype), dtype))


@pytest.mark.parametrize(("dtype", "end"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
def test_the_largest_value_itself_is_inside(dtype: str, end: float) -> None:
    config = qn.QuantConfig(dtype)
    beyond = np.nextafter(np.float32(end), np.float32(np.inf))
    x = np.float32([end, -end, beyond, -beyond, 0])
    for _ in every_level():
        for learnable in (False, True):
            fq = fake(config, learnable)
            fq.set_qparams(qn.QParams(1.0, 0, dtype))
            assert fq(x).tolist() == [end, -end, end, -end, 0]
            assert fq.backward(np.ones(5)).tolist() == [1, 1, 0, 0, 1]
            if learnable:
                fq.backward(np.float32([1, 1, 0, 0, 1]))
                assert fq.grads["scale"] == 0


@pytest.mark.parametrize("odd", range(5))
def test_one_zero_point_among_others_is_seen(odd: int) -> None:
    config = qn.QuantConfig.int8_per_channel(-1).asymmetric()
    zero = np.full(5, -40)
    zero[odd] = 70
    x = np.linspace(-200, 200, 200, dtype=np.float32).reshape(40, 5)
    for _ in every_level():
        fq = fake(config)
        fq.set_qparams(qn.QParams(np.ones(5), zero, axis=-1))
        ref.assert_same_bits(fq(x), expected_forward(x, np.ones(5), zero, config))
        expected = ref.fake_quantize_backward(x, x, np.ones(5), zero, "int8", "asymmetric", -1)
        ref.assert_same_bits(fq.backward(x), expected.dx)
        assert_close(fq.grads["zero_point"], expected.dz, expected.dz_size, "dz")


def test_nonfinite_is_told_wherever_it_is() -> None:
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    for _ in every_level():
        for kind in (np.float32, np.float64):
            for float8 in (None, "float8_e5m2"):
                for n in (1, 5, 33):
                    x, out = np.full(n, np.finfo(kind).max, kind), np.empty(n, np.float32)
                    walk = Granules.of((n,)).walk
                    assert _core.fake_quantize(x, one, zero, walk, -128, 127, float8, out) is False
                    for bad in (np.nan, np.inf, -np.inf):
                        for i in range(n):
                            y = x.copy()
                            y[i] = bad
                            assert _core.fake_quantize(y, one, zero, walk, -128, 127, float8, out) is True


@pytest.mark.parametrize("form", GRANULARITIES)
def test_nothing_outside_the_arrays_is_touched(guarded: Guarded, form: str) -> None:
    axis, group = GRANULARITIES[form]
    for shape in ((3, 7), (2, 33), (5, 48)):
        g = Granules.of(shape, axis, group)
        count, size = math.prod(g.shape), math.prod(shape)
        for at in ("end", "start"):
            x, dy, y, dx = (guarded((size,), np.float32, at=at) for _ in range(4))
            scale, zero = guarded((count,), np.float32, at=at), guarded((count,), np.int32, at=at)
            ds, dz = guarded((count,), np.float64, at=at), guarded((count,), np.float64, at=at)
            x[:], dy[:], scale[:], zero[:], ds[:], dz[:] = 1, 2, 0.5, 1, 0, 0
            for _ in every_level():
                _core.fake_quantize(x, scale, zero, g.walk, -8, 7, None, y)
                _core.fake_quantize_backward(x, dy, scale, zero, g.walk, -8, 7, None, dx, ds, dz)
                assert (y == 1).all() and (dx == 2).all() and (ds == 0).all()


def test_native_sizes_are_checked() -> None:
    f, d, i = np.zeros(4, np.float32), np.zeros(1), np.zeros(1, np.int32)
    one, walk = np.ones(1, np.float32), Granules.of((4,)).walk
    for arguments in (
        (f[:3], one, i, walk, -8, 7, None, f), (f, one, i, walk, -8, 7, None, f[:3]),
        (f, f, i, walk, -8, 7, None, f), (f, one, np.zeros(2, np.int32), walk, -8, 7, None, f),
        (f, one, i, (1, 1, 4, 0, False, False), -8, 7, None, f), (f, one, i, walk, 0, 0, "float16", f),
        (f, one, i, walk, 0, 0, "float8_e4m3fnuz", f),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"layout|not a float8"):
            _core.fake_quantize(*arguments)
    good = (f, f, one, i, walk, -8, 7, None, f)
    for bad in (
        (f, f[:3], one, i, walk, -8, 7, None, f), (*good, np.zeros(2)), (*good, d, np.zeros(2)), (*good, None, d),
        (f, f, one, i, walk, 0, 0, "float8_e5m2", f, d, d),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"layout|dz"):
            _core.fake_quantize_backward(*bad)


@pytest.mark.parametrize("form", GRANULARITIES)
def test_counts_of_elements_that_share_a_scale(form: str) -> None:
    axis, group = GRANULARITIES[form]
    for shape in ((6, 7), (3, 33), (2, 5, 64), (4, 0)):
        g = Granules.of(shape, axis, group)
        place = ref.spread(np.arange(math.prod(g.shape)).reshape(g.shape), shape, axis, group).ravel()
        expected = np.bincount(place, minlength=math.prod(g.shape)).reshape(g.shape)
        assert g.counts().shape == g.shape
        assert np.array_equal(g.counts(), expected)


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "unaligned", "swapped", "read-only"])
def test_inputs_in_any_layout(layout: str) -> None:
    x, dy = np.random.default_rng(1).standard_normal((2, 6, 40)).astype(np.float32)
    one, two = (fake(qn.QuantConfig.int4_per_group(16).asymmetric()) for _ in range(2))
    ref.assert_same_bits(one(lay_out(x, layout)), two(x))
    ref.assert_same_bits(one.backward(lay_out(dy, layout)), two.backward(dy))
    ref.assert_same_bits(one.grads["scale"], two.grads["scale"])


def test_other_floats_are_rounded_to_float32_first() -> None:
    x = np.random.default_rng(2).standard_normal((3, 9))
    for kind in (np.float64, np.float16, ml_dtypes.bfloat16):
        one, two = fake(qn.QuantConfig.int8()), fake(qn.QuantConfig.int8())
        ref.assert_same_bits(one(x.astype(kind)), two(x.astype(kind).astype(np.float32)))
        ref.assert_same_bits(one.backward(x.astype(kind)), two.backward(x.astype(kind).astype(np.float32)))
    assert fake(qn.QuantConfig.int8())([1.0, 2.0]).tolist() == pytest.approx([1.0, 2.0], abs=0.01)
    scalar = fake(qn.QuantConfig.int8())
    assert scalar(0.5).shape == () and scalar.backward(2.0).shape == ()


# ----------------------------------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["per_tensor", "channel 0", "channel -1", "group -1", "group 0"])
def test_every_observer_in_every_granularity(method: str, form: str) -> None:
    slow = method == "kl"  # tries every threshold of every channel
    x = np.random.default_rng(3).standard_normal((6, 5) if slow else (12, 70)).astype(np.float32)
    for dtype, mode in KINDS[:: 4 if slow else 1]:
        config = make_config(dtype, mode, *GRANULARITIES[form])
        fq = fake(config, learnable=False, observer=method)
        y = fq(x)
        expected = qn.quantize_tensor(x, config, method=method)
        ref.assert_same_bits(fq.scale, expected.scale, f"{config} {method}")
        ref.assert_same_bits(y, expected.dequantize(), f"{config} {method}")
        assert np.array_equal(np.broadcast_to(fq.zero_point, expected.zero_point.shape), expected.zero_point)


def test_observed_scales_follow_the_stream() -> None:
    x = np.float32([1, -2, 3])
    fq = fake(qn.QuantConfig.int8(), learnable=False)
    fq(x)
    assert fq.observing and fq.quantizing and fq.scale == np.float32(3 / 127)
    fq(2 * x)
    assert fq.scale == np.float32(6 / 127)
    fq(x)
    assert fq.scale == np.float32(6 / 127)
    fq.disable_observer()
    fq(9 * x)
    assert fq.scale == np.float32(6 / 127)
    fq.enable_observer()
    fq(9 * x)
    assert fq.scale == np.float32(27 / 127)
    fq.freeze()
    fq(99 * x)
    assert fq.scale == np.float32(27 / 127) and not fq.observing
    fq.unfreeze()
    fq(99 * x)
    assert fq.scale == np.float32(297 / 127)
    assert not fq.params and not fq.grads
    moving = fake(qn.QuantConfig.int8(), learnable=False, observer="moving_average", averaging_constant=0.5)
    moving(x)
    moving(3 * x)
    assert moving.scale == np.float32(6 / 127)
    forgetful = fake(qn.QuantConfig.int8(), learnable=False, forget=True)
    forgetful(x)
    forgetful(x / 3)
    assert forgetful.scale == np.float32(np.float32(1) / 127)
    averaging = fake(qn.QuantConfig.int8(), False, "moving_average", forget=True, averaging_constant=0.5)
    averaging(x)
    averaging(3 * x)
    assert averaging.scale == np.float32(6 / 127)


def test_only_observing_lets_everything_pass() -> None:
    x, dy = np.random.default_rng(4).standard_normal((2, 5)).astype(np.float32)
    for learnable in (False, True):
        fq = fake(qn.QuantConfig.int4(), learnable)
        fq.disable_fake_quant()
        assert fq(x) is x and fq.backward(dy) is dy
        out = np.empty_like(x)
        assert fq(x, out=out) is out and np.array_equal(out, x)
        assert fq.backward(dy, out=out) is out and np.array_equal(out, dy)
        fq(4 * x)
        fq.enable_fake_quant()
        fq.disable_observer()
        fq(x)
        assert fq.scale == np.float32(4 * np.abs(x).max().astype(np.float64) / 7)
        assert bool(fq.params) == learnable


def test_a_learnable_one_takes_its_scale_from_the_first_batch_and_stops_observing() -> None:
    x = np.float32([1, -2, 3.5])
    fq = fake(qn.QuantConfig.int4().asymmetric())
    assert fq.observing and not fq.params
    fq(x)
    assert not fq.observing and fq.quantizing and fq.learning
    found = qn.qparams_from_range(-2, 3.5, fq.config.quant)
    assert fq.scale == found.scale and fq.zero_point == found.zero_point
    assert set(fq.params) == {"scale", "zero_point"} and fq.params["zero_point"].dtype == np.float32
    fq(100 * x)
    assert fq.scale == found.scale
    held = fq.params["scale"]
    fq.params["scale"] *= 2
    assert fq.params["scale"] is held
    fq.params["scale"] = np.float64(2) * found.scale
    assert fq.params["scale"] is held
    fq.params["zero_point"] += np.float32(0.6)
    assert fq.scale == 2 * found.scale and fq.zero_point == found.zero_point + 1
    fq.freeze()
    held *= 5
    assert fq.scale == 2 * found.scale and not fq.params and not fq.learning
    fq(x)
    fq.backward(x)
    assert not fq.grads
    fq.unfreeze()
    assert fq.scale == 2 * found.scale and set(fq.params) == {"scale", "zero_point"} and not fq.observing
    fq.enable_observer()
    fq(10 * x)
    assert fq.scale == qn.qparams_from_range(-20, 35, fq.config.quant).scale and not fq.observing


def test_a_learnable_one_starts_from_all_that_was_observed() -> None:
    fq = fake(qn.QuantConfig.int8())
    for x in ([1.0], [-8.0], [2.0]):
        fq.observe(x)
    assert not fq.params and fq.has_scale
    fq.initialize()
    assert fq.params["scale"] == np.float32(8 / 127) and not fq.observing


def test_observing_again_keeps_what_was_observed_and_forgets_what_was_learned() -> None:
    fq = fake(qn.QuantConfig.int8())
    fq.observe([4.0])
    fq.enable_observer()  # it is observing already
    fq.observe([1.0])
    fq([2.0])
    assert fq.scale == np.float32(4 / 127)
    fq.enable_observer()
    assert not fq.params and not fq.has_scale
    fq([1.0])
    assert fq.scale == np.float32(1 / 127)


def test_copies_go_their_own_way() -> None:
    x = np.random.default_rng(8).standard_normal((4, 12)).astype(np.float32)
    for config in (qn.QuantConfig.int8(), qn.QuantConfig.int4_per_group(4).asymmetric()):
        for learnable in (False, True):
            fq = fake(config, learnable)
            fq(x)
            for other in (copy.deepcopy(fq), pickle.loads(pickle.dumps(fq))):
                ref.assert_same_bits(other(x), fq(x))
                ref.assert_same_bits(other.backward(x), fq.backward(x))
                assert str(other) == str(fq)
                if learnable:
                    other.params["scale"] *= 2
                    assert np.array_equal(other.scale, 2 * fq.scale)


def test_parameters_can_be_kept_and_put_back() -> None:
    x = np.random.default_rng(8).standard_normal((4, 12)).astype(np.float32)
    fq = fake(qn.QuantConfig.int4_per_channel().asymmetric())
    fq(x)
    held, params = fq.params["scale"], fq.params
    assert set(params) == {"scale", "zero_point"} and len(params) == 2 and "scale" in params and "bias" not in params
    copies = (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), {n: p.copy() for n, p in params.items()})
    before = held.copy()
    for best in copies:
        held *= 2
        assert np.array_equal(fq.scale, 2 * before) and np.array_equal(best["scale"], before)
        fq.params.update(best)
        assert fq.params["scale"] is held
        ref.assert_same_bits(fq.scale, before)
    fq.params.update({"zero_point": 3}, scale=0.5)
    assert (fq.scale == 0.5).all() and (fq.zero_point == 3).all()
    assert repr(params).startswith("Parameters({'scale': array(")


@pytest.mark.parametrize("method", ["min_max", "moving_average", "percentile"])
@pytest.mark.parametrize("form", ["per_tensor", "channel 0", "group -1"])
def test_a_state_goes_on_where_it_was(method: str, form: str) -> None:
    x = np.random.default_rng(9).standard_normal((3, 4, 12)).astype(np.float32)
    config = make_config("int4", "asymmetric", *GRANULARITIES[form])

    def run(fq: qn.FakeQuantize, from_here: int) -> list[Any]:
        found: list[Any] = []
        for batch in x[from_here:]:
            found += [fq(batch), fq.backward(batch), fq.scale, *fq.grads.values()]
            for p in fq.params.values():
                p *= np.float32(0.9)
        return found

    for learnable in (False, True):
        for prepare in (lambda fq: None, qn.FakeQuantize.freeze, qn.FakeQuantize.disable_fake_quant):
            one, two = (fake(config, learnable, method) for _ in range(2))
            one(x[0])
            two(9 * x[1])
            prepare(one)
            held = dict(two.params)
            state = pickle.loads(pickle.dumps(one.state_dict()))
            two.load_state_dict(state)
            assert str(two) == str(one)
            assert all(two.params[name] is p for name, p in held.items() if name in two.params)
            expected = run(one, 1)
            for a, b in zip(expected, run(two, 1), strict=True):
                ref.assert_same_bits(a, b)
            fresh = fake(config, learnable, method)
            fresh.load_state_dict(state)
            for a, b in zip(expected, run(fresh, 1), strict=True):
                ref.assert_same_bits(a, b)
    fresh.load_state_dict(fake(config, True, method).state_dict())
    assert not fresh.has_scale and fresh.observing


def test_a_state_keeps_what_it_was_given_and_halves_from_where_it_was() -> None:
    given = qn.QParams(0.05, 7, "uint8")
    one, two = (fake(qn.QuantConfig("uint8").asymmetric(), False) for _ in range(2))
    one.set_qparams(given)
    two.load_state_dict(one.state_dict())
    assert two.qparams == given and not two.observing
    one, two = fake(qn.QuantConfig.int8()), fake(qn.QuantConfig.int8())
    one([8.0])
    one.params["scale"] -= 1
    two.load_state_dict(one.state_dict())
    with pytest.warns(RuntimeWarning, match="took 1 of 1 learned scales"):
        assert two.scale == np.float32(8 / 127) / 2


def test_states_that_do_not_fit() -> None:
    learned, observed = fake(qn.QuantConfig.int8()), fake(qn.QuantConfig.int8(), False)
    for fq in (learned, observed):
        fq([1.0])
    good = learned.state_dict()
    for bad, message in (
        ({}, "the state has the entries"), (good | {"more": 1}, "the state has the entries"),
        (good | {"params": {"scale": [1.0]}}, "of one shape"), (good | {"params": {"step": 1.0}}, "'step'"),
        (good | {"qparams": qn.QParams(1.0, 0, "uint8").to_dict()}, "uint8"),
        (fake(qn.QuantConfig.int8(), observer="mse").state_dict(), "MSEObserver"),
        (fake(qn.QuantConfig.int4_per_group(2)).state_dict(), "_GroupObserver"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            learned.load_state_dict(bad)
        assert learned.scale == np.float32(1 / 127) and learned.params
    with pytest.raises(ValueError, match="are not those of"):
        observed.load_state_dict(good)
    with pytest.raises(ValueError, match="not of groups"):
        fake(qn.QuantConfig.int4_per_group(2)).load_state_dict(good)


def test_no_data_is_a_clear_error() -> None:
    x = np.ones(3, np.float32)
    for learnable in (False, True):
        fq = fake(qn.QuantConfig.int8(), learnable)
        assert not fq.has_scale
        for call in (lambda fq=fq: fq.scale, lambda fq=fq: fq.qparams, fq.initialize, lambda fq=fq: fq.quantize(x)):
            with pytest.raises(RuntimeError, match=r"has seen no data .*call it with some"):
                call()
        with pytest.raises(RuntimeError, match="has not been called"):
            fq.backward(x)
        fq.freeze()
        with pytest.raises(RuntimeError, match=r"has seen no data .*enable_observer"):
            fq(x)
        only = fake(qn.QuantConfig.int8_per_channel(), learnable)
        only.disable_observer()
        with pytest.raises(RuntimeError, match="has seen no data"):
            only(x)
        empty = fake(qn.QuantConfig.int4_per_group(2), learnable)
        with pytest.raises(RuntimeError, match="has seen no data"):
            empty(np.empty((0, 4), np.float32))


def test_ones_own_qparams() -> None:
    x = np.float32([0.4, -0.2, 9])
    for learnable in (False, True):
        fq = fake(qn.QuantConfig("uint8").asymmetric(), learnable)
        fq.set_qparams(qn.QParams(0.05, 7, "uint8"))
        assert fq(x).tolist() == pytest.approx([0.4, -0.2, 9])
        assert (fq.scale, fq.zero_point, fq.observing) == (np.float32(0.05), 7, False)
        assert bool(fq.params) == learnable
    fq = fake(qn.QuantConfig.int8())
    for bad, message in (
        (qn.QParams(1.0, 0, "int8"), "quant_min"), (qn.QParams(1.0, 1, "int8", -127, 127), "fixed zero point"),
        (qn.QParams(1.0, 0, "uint8"), "uint8"), (qn.QParams([1.0], 0, "int8", -127, 127, axis=0), "axis"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fq.set_qparams(bad)
    with pytest.raises(TypeError, match="must be a QParams"):
        fq.set_qparams(0.5)  # type: ignore[arg-type]
    coarse = fake(qn.QuantConfig.int8().with_scale_dtype("bfloat16"))
    with pytest.raises(ValueError, match="not exact in bfloat16"):
        coarse.set_qparams(qn.QParams(0.1, 0, "int8", -127, 127))


def test_refusals() -> None:
    x = np.ones((2, 6), np.float32)
    with pytest.raises(TypeError, match="FakeQuantConfig, not QuantConfig"):
        qn.FakeQuantize(qn.QuantConfig.int8())  # type: ignore[arg-type]
    for config in (qn.QuantConfig.int8(), qn.QuantConfig.int4_per_group(2)):
        with pytest.raises(TypeError, match="no option 'percentile'"):
            fake(config, observer="mse", percentile=9.0)
    fq = fake(qn.QuantConfig.int8_per_channel())
    fq(x)
    with pytest.raises(ValueError, match=r"takes scales of shape \(3,\)"):
        fq(np.ones((3, 6), np.float32))
    with pytest.raises(ValueError, match=r"dy has shape \(6, 2\)"):
        fq.backward(x.T)
    for bad, count in ((np.nan, 1), (np.inf, 1)):
        y = x.copy()
        y[1, 2] = bad
        with pytest.raises(ValueError, match=f"{count} of 12 values are NaN or infinite"):
            fq(y)
        with pytest.raises(ValueError, match="NaN or infinite"):
            fake(qn.QuantConfig.int8())(y)
    with pytest.raises(TypeError, match="expected an array of float"):
        fq(np.ones((2, 6), np.int64))
    out = np.empty_like(x)
    read_only = out.copy()
    read_only.flags.writeable = False
    for bad_out, error, message in (
        (x, ValueError, "shares memory"), (out[:1], ValueError, "shape"),
        (out.astype(np.float64), ValueError, "float64"), (read_only, ValueError, "writeable"),
        (out.tolist(), TypeError, "numpy.ndarray"), (np.asfortranarray(out), ValueError, "C-contiguous"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fq(x, out=bad_out)
        fq(x)
        with pytest.raises(error, match=message):
            fq.backward(x.copy(), out=bad_out)
    dy = np.ones_like(x)
    assert fq.backward(dy, out=dy) is dy
    with pytest.raises(KeyError, match="'step' is none of the parameters scale; learned scales"):
        fq.params["step"] = np.ones(2)
    for wrong in (np.ones(3), np.ones(1), np.ones((2, 1))):  # not even what would broadcast
        with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
            fq.params["scale"] = wrong
    both = np.ones(13, np.float32)
    one, two = both[:12].reshape(2, 6), both[1:].reshape(2, 6)
    with pytest.raises(ValueError, match="out overlaps dy, shifted"):
        fq.backward(one, out=two)
    groups = fake(qn.QuantConfig.int4_per_group(2), False, "moving_average")
    groups(x)
    groups(3 * x)
    assert np.allclose(groups.scale, 1.02 / 7)
    with pytest.raises(ValueError, match="groups are averaged over arrays of one shape"):
        groups(np.ones((1, 6), np.float32))
    assert fake(qn.QuantConfig.int4_per_group(2), False)(np.ones((1, 6), np.float32)).shape == (1, 6)


# ----------------------------------------------------------------------------------------------------------------------
# Learned scales stay positive


def test_a_scale_that_a_step_takes_below_zero_is_halved_and_it_is_said() -> None:
    x = np.random.default_rng(5).standard_normal((3, 8)).astype(np.float32)
    fq = fake(qn.QuantConfig.int8_per_channel())
    fq(x)
    before = fq.scale.copy()
    fq.params["scale"][1] -= 5
    fq.params["scale"][2] *= np.float32(1e-3)  # small, and what the optimizer wants
    with pytest.warns(RuntimeWarning, match="took 1 of 3 learned scales to zero or below"):
        fq(x)
    expected = before * np.float32([1, 0.5, 1e-3])
    ref.assert_same_bits(fq.scale, expected)
    ref.assert_same_bits(fq.params["scale"], expected)
    for _ in range(400):  # however long it goes on
        fq.params["scale"][:] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fq(x)
    assert (fq.scale == np.float32(2.0**-126)).all()
    fq.params["scale"][1] = 1e-40  # below the smallest normal number too
    with pytest.warns(RuntimeWarning, match="took 1 of 3 learned scales"):
        fq(x)
    assert (fq.params["scale"] == np.float32(2.0**-126)).all()
    fq.params["scale"][0] = np.nan
    with pytest.raises(ValueError, match="1 of 3 learned scale values are NaN or infinite"):
        fq(x)


def test_a_diverged_zero_point_is_named() -> None:
    fq = fake(qn.QuantConfig.int8().asymmetric())
    fq(np.float32([1, 2]))
    fq.params["zero_point"][...] = np.inf
    with pytest.raises(ValueError, match="learned zero_point"):
        fq(np.float32([1, 2]))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_scales_of_less_precision_are_used_rounded(scale_dtype: str) -> None:
    x = np.random.default_rng(6).standard_normal((4, 32)).astype(np.float32)
    config = qn.QuantConfig.int4_per_group(8).with_scale_dtype(scale_dtype)
    fq = fake(config)
    fq(x)
    fq.params["scale"][...] *= np.float32(1.2345)
    y = fq(x)
    rounded = ref.store_scale(fq.params["scale"].astype(np.float64), scale_dtype)
    assert not np.array_equal(rounded, fq.params["scale"])
    ref.assert_same_bits(fq.scale, rounded)
    ref.assert_same_bits(qn.quantize_tensor(x, config, fq.qparams).dequantize(), y)


def test_gradient_descent_finds_the_best_scale() -> None:
    """Minimising the squared error of Gaussian data by LSQ alone ends where the known answer is."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal(200_000).astype(np.float32)
    fq = fake(qn.QuantConfig.int4())
    for _ in range(60):
        y = fq(x)
        fq.backward(y - x)
        fq.params["scale"] -= np.float32(0.02 * math.sqrt(x.size * 7) / x.size) * fq.grads["scale"] * 10
    assert fq.scale == pytest.approx(0.3534, abs=0.01)  # Max (1960), for codes -7..7
    assert ref.sqnr(x, fq(x)) == pytest.approx(18.9, abs=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch


def import_torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", ["per_tensor", "channel 0", "channel -1"])
@pytest.mark.parametrize("kind", [("int8", "symmetric"), ("uint8", "asymmetric"), ("int4", "asymmetric")])
def test_gradients_equal_pytorchs(kind: tuple[str, str], form: str, seed: int) -> None:
    """Data and zero points stay clear of what PyTorch does otherwise, none of which is in the formulas:

    - it multiplies by the reciprocal of the scale, so a quotient next to a tie may round to the other side;
    - its sums are float32, and its d is (y - x) / s, off by the rounding of y;
    - backward per tensor rounds a float zero point by truncating z + 0.5, its own forward to even: they differ where
      z < 0 (by one, whole numbers too) and at ties.
    """
    torch = import_torch()
    dtype, mode = kind
    config = make_config(dtype, mode, *GRANULARITIES[form])
    rng = np.random.default_rng([seed, len(dtype), len(form)])
    shape = tuple(rng.integers(3, 40, 2))
    low, high = (int(v) for v in ref.code_range(dtype, mode))
    axis = None if config.axis is None else config.axis % 2
    count = 1 if axis is None else shape[axis]
    scale = rng.uniform(0.01, 0.1, count).astype(np.float32)
    zero = np.zeros(count, np.float32)
    if mode == "asymmetric":
        least = 0 if axis is None else low
        zero = (rng.integers(least, high + 1, count) + rng.uniform(-0.4, 0.4, count)).clip(least, high)
        zero = zero.astype(np.float32)
    along = np.broadcast_to(scale if axis != 0 else scale[:, None], shape)
    steps = np.rint(rng.uniform(-1.2, 1.2, shape) * (high - low)) + rng.uniform(-0.45, 0.45, shape)
    x, dy = (steps * along).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
    given_x, given_s, given_z = (torch.tensor(a, requires_grad=True) for a in (x, scale, zero))
    factor = 1 / math.sqrt(x.size / count * high)
    if axis is None:
        y = torch._fake_quantize_learnable_per_tensor_affine(given_x, given_s, given_z, low, high, factor)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(given_x, given_s, given_z, axis, low, high, factor)
    y.backward(torch.tensor(dy))
    fq = fake(config)
    fq(x)
    fq.params["scale"][...] = scale if axis is not None else scale[0]
    if mode == "asymmetric":
        fq.params["zero_point"][...] = zero if axis is not None else zero[0]
    ref.assert_same_bits(fq(x), y.detach().numpy())
    assert np.array_equal(fq.backward(dy), given_x.grad.numpy())  # PyTorch has -0 where dy < 0 is masked
    expected = ref.fake_quantize_backward(x, dy, fq.scale, zero if axis is not None else zero[0], dtype, mode, axis)
    reach = 2.0**-22 * np.abs(steps).max() * np.abs(dy).sum() * factor  # up to |x / s| * 2^-23 for y and for x
    assert np.all(np.abs(given_s.grad.numpy().reshape(fq.scale.shape) - fq.grads["scale"]) <= reach)
    assert np.abs(fq.grads["scale"]).max() > 100 * reach
    if mode == "asymmetric":
        bound = expected.dz_size * 2.0**-20 + 1e-30
        assert np.all(np.abs(given_z.grad.numpy().reshape(fq.scale.shape) - fq.grads["zero_point"]) <= bound)
