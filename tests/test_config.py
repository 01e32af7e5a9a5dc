"""Configs, and the one place that turns a range into a scale and a zero point."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from hypothesis import assume, given
from hypothesis import strategies as st

from qnative import config as config_module
from qnative.config import (
    CODE_DTYPES,
    FakeQuantConfig,
    ObserverMethod,
    QParams,
    QuantConfig,
    QuantGranularity,
    QuantMode,
    qparams_from_range,
)

INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
MODES = ("symmetric", "asymmetric")

CONFIGS = [
    QuantConfig(dtype, mode, granularity, axis, group_size, scale_dtype)
    for dtype in INTEGERS + FLOAT8
    for mode in MODES
    if not (dtype in FLOAT8 and mode == "asymmetric")
    for granularity, axis, group_size in (("per_tensor", None, None), ("per_channel", 1, None), ("per_group", -1, 32))
    for scale_dtype in ("float32", "bfloat16")
]

# ----------------------------------------------------------------------------------------------------------------------
# QuantConfig


def test_fields_and_presets() -> None:
    assert [f.name for f in dataclasses.fields(QuantConfig)] == [
        "dtype", "mode", "granularity", "axis", "group_size", "scale_dtype",
    ]  # fmt: skip
    q = QuantConfig
    assert q.int8() == q("int8") == q()
    assert q.int8_per_channel() == q("int8", "symmetric", "per_channel", 0)
    assert q.int4() == q("int4")
    assert q.int4_per_channel() == q("int4", "symmetric", "per_channel", 0)
    assert q.int4_per_group(32) == q("int4", "symmetric", "per_group", -1, 32)
    assert q.int4_per_group() == q.int4_per_group(32)
    assert q.fp8() == q("float8_e4m3fn")
    assert q.fp8("float8_e5m2") == q("float8_e5m2")


def test_strings_and_enums_are_the_same() -> None:
    by_enum = QuantConfig("int8", QuantMode.ASYMMETRIC, QuantGranularity.PER_CHANNEL)
    by_name = QuantConfig("int8", "asymmetric", "per_channel")
    assert by_enum == by_name
    assert hash(by_enum) == hash(by_name)
    assert isinstance(by_name.mode, QuantMode)
    assert isinstance(by_name.granularity, QuantGranularity)
    assert QuantMode("ASYMMETRIC") is QuantMode.ASYMMETRIC
    for member in [*QuantMode, *QuantGranularity, *ObserverMethod]:
        assert str(member) == member.value == f"{member}"
        assert hash(member) == hash(member.value)
        assert eval(repr(member)) == member
        assert {member: 1}[member.value] == 1
        assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("dtype", ["int8", np.int8, np.dtype(np.int8), ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_dtype_objects_are_names(dtype: object) -> None:
    config = QuantConfig(dtype)
    assert isinstance(config.dtype, str)
    assert config == QuantConfig(config.dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_prints_as_the_expression_that_builds_it(config: QuantConfig) -> None:
    again = eval(repr(config), {"QuantConfig": QuantConfig})
    assert again == config
    assert hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trips_through_json(config: QuantConfig) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="colour"):
        QuantConfig.from_dict({**fields, "colour": "red"})


def test_distinct_configs_are_distinct() -> None:
    assert len(set(CONFIGS)) == len(CONFIGS)
    assert len({repr(c) for c in CONFIGS}) == len(CONFIGS)


def test_frozen() -> None:
    config = QuantConfig.int8()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dtype = "int4"


def test_changed_copies_leave_the_original() -> None:
    base = QuantConfig.int8_per_channel()
    before = repr(base)
    assert base.asymmetric().mode == "asymmetric"
    assert base.asymmetric().symmetric() == base
    assert base.with_axis(1).axis == 1
    assert base.with_axis(-2).axis == -2
    assert base.per_tensor() == QuantConfig.int8()
    assert base.per_group(16).group_size == 16
    assert base.per_group(16).axis == -1
    assert base.per_group(16).with_group_size(5).group_size == 5
    assert base.per_group(16).per_channel() == base
    assert base.with_dtype("uint4").dtype == "uint4"
    assert base.with_scale_dtype("float16").scale_dtype == "float16"
    assert repr(base) == before


@pytest.mark.parametrize(
    ("dtype", "mode", "expected"),
    [
        ("int8", "symmetric", (-127, 127, 0)),
        ("int8", "asymmetric", (-128, 127, 0)),
        ("uint8", "symmetric", (0, 255, 128)),
        ("uint8", "asymmetric", (0, 255, 128)),
        ("int4", "symmetric", (-7, 7, 0)),
        ("int4", "asymmetric", (-8, 7, 0)),
        ("uint4", "symmetric", (0, 15, 8)),
        ("uint4", "asymmetric", (0, 15, 8)),
        ("float8_e4m3fn", "symmetric", (-448, 448, 0)),
        ("float8_e5m2", "symmetric", (-57344, 57344, 0)),
    ],
)
def test_code_ranges(dtype: str, mode: str, expected: tuple[int, int, int]) -> None:
    config = QuantConfig(dtype, mode)
    assert (config.quant_min, config.quant_max, config.symmetric_zero_point) == expected
    assert ref.code_range(dtype, mode) == expected[:2]
    assert config.bits == (4 if "int4" in dtype else 8)
    assert FakeQuantConfig(config).quant_range == expected[:2]


def test_code_dtypes_are_named_as_ml_dtypes_names_them() -> None:
    assert set(CODE_DTYPES) == {*INTEGERS, *FLOAT8}
    for name, info in CODE_DTYPES.items():
        limits = ml_dtypes.finfo(getattr(ml_dtypes, name)) if name in FLOAT8 else (
            np.iinfo(name) if name in ("int8", "uint8") else ml_dtypes.iinfo(getattr(ml_dtypes, name))
        )  # fmt: skip
        assert info.name == name
        assert (float(info.min), float(info.max)) == (float(limits.min), float(limits.max))
        assert info.storage == (np.uint8 if name in FLOAT8 or name.startswith("u") else np.int8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int9"}, ("int9", "int8")),
        ({"dtype": None}, ("None", "int8")),
        ({"dtype": np.float32}, ("float32", "int8")),
        ({"mode": "sym"}, ("sym", "symmetric")),
        ({"mode": 1}, ("1", "symmetric")),
        ({"granularity": "per_row"}, ("per_row", "per_channel")),
        ({"scale_dtype": "float64"}, ("float64", "float32")),
        ({"dtype": "float8_e5m2", "mode": "asymmetric"}, ("float8_e5m2", "symmetric")),
        ({"axis": 0}, ("axis", "per_channel")),
        ({"granularity": "per_channel", "axis": 1.5}, ("1.5", "int")),
        ({"granularity": "per_channel", "axis": True}, ("True", "int")),
        ({"granularity": "per_channel", "group_size": 4}, ("group_size", "per_group")),
        ({"granularity": "per_group"}, ("group_size", "positive")),
        ({"granularity": "per_group", "group_size": 0}, ("0", "positive")),
        ({"granularity": "per_group", "group_size": -3}, ("-3", "positive")),
        ({"granularity": "per_group", "group_size": "8"}, ("8", "int")),
    ],
    ids=repr,
)
def test_refusals_name_the_value_and_the_remedy(arguments: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        QuantConfig(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_preset_refuses_a_dtype_of_another_kind() -> None:
    with pytest.raises(ValueError, match="int8"):
        QuantConfig.fp8("int8")


def test_fake_quant_config() -> None:
    fake = FakeQuantConfig(QuantConfig.int4(), "mse")
    assert fake.observer is ObserverMethod.MSE
    assert not fake.learnable
    assert fake.with_learnable().learnable
    assert not fake.with_learnable().with_learnable(False).learnable
    assert fake.with_observer("kl").observer is ObserverMethod.KL
    assert fake.observer is ObserverMethod.MSE
    assert hash(fake.with_observer("mse")) == hash(fake)
    assert fake.quant_range == (-7, 7)
    with pytest.raises(ValueError, match="min_max"):
        FakeQuantConfig(observer="median")
    with pytest.raises(TypeError, match="QuantConfig"):
        FakeQuantConfig("int8")


# ----------------------------------------------------------------------------------------------------------------------
# QParams


def test_qparams_defaults() -> None:
    qp = QParams(0.5)
    assert qp.scale.dtype == np.float32
    assert qp.scale.shape == qp.zero_point.shape == ()
    assert (qp.dtype, qp.quant_min, qp.quant_max, qp.axis, qp.group_size) == ("int8", -128, 127, None, None)
    assert qp == QParams(np.float64(0.5), 0)
    assert qp != QParams(0.5, 1)
    assert qp != QParams(0.5, quant_min=-127)
    assert qp != QParams(0.25)
    assert qp != 0.5


@pytest.mark.parametrize("dtype", INTEGERS)
def test_zero_points_are_kept_in_the_code_dtype(dtype: str) -> None:
    low, high = ref.RANGES[dtype]
    for zero in (low, high, float(high), np.int64(low)):
        qp = QParams(1.0, zero, dtype)
        assert qp.zero_point.dtype == ref.STORAGE[dtype]
        assert int(qp.zero_point) == zero
    for zero in (low - 1, high + 1, 10**12, -(10**12), 0.5, np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="zero_point"):
            QParams(1.0, zero, dtype)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-60, 1e60, -0.0, [1.0, 0.0]])
def test_a_scale_must_be_finite_and_positive(scale: object) -> None:
    with pytest.raises(ValueError, match="scale"):
        QParams(scale, axis=0)


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 3.4028234e38, 2.0**-126])
def test_a_users_scale_is_never_replaced(scale: float) -> None:
    assert QParams(scale).scale == np.float32(scale)


def test_qparams_own_their_arrays() -> None:
    scale, zero = np.array([1.0, 2.0], np.float32), np.array([3, 4], np.int8)
    qp = QParams(scale, zero, axis=0)
    scale[:] = 9.0
    zero[:] = 9
    assert qp.scale.tolist() == [1.0, 2.0]
    assert qp.zero_point.tolist() == [3, 4]
    for array in (qp.scale, qp.zero_point):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        qp.dtype = "int4"
    for again in (pickle.loads(pickle.dumps(qp)), copy.deepcopy(qp)):
        assert again == qp
        assert not again.scale.flags.writeable


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"quant_min": 5, "quant_max": 5}, "quant_min"),
        ({"quant_min": 5, "quant_max": 4}, "quant_min"),
        ({"quant_min": -129}, "-129"),
        ({"quant_max": 128}, "128"),
        ({"quant_min": np.nan}, "quant_min"),
        ({"quant_max": np.inf}, "quant_max"),
        ({"quant_min": -1.5}, "quant_min"),
        ({"quant_min": 1}, "zero_point"),
        ({"dtype": "float8_e4m3fn", "zero_point": 1}, "zero_point"),
        ({"dtype": "int5"}, "int5"),
        ({"scale": [1.0, 2.0], "axis": 0, "zero_point": [0, 0, 0]}, "zero_point"),
        ({"scale": [1.0, 2.0], "axis": 0, "zero_point": [0]}, "zero_point"),
        ({"scale": [1.0, 2.0]}, "axis"),
        ({"scale": [[1.0, 2.0]], "axis": 0}, "axis|shape"),
        ({"scale": [1.0], "axis": 0, "group_size": 0}, "group_size"),
        ({"scale": [1.0], "axis": 0, "group_size": -4}, "group_size"),
        ({"scale": [1.0], "group_size": 4}, "axis|group_size"),
        ({"scale": [1.0], "axis": "rows"}, "axis"),
        ({"scale": 1.0, "axis": 1}, "axis|shape"),
    ],
    ids=repr,
)
def test_qparams_refuse_what_means_nothing(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        QParams(**{"scale": 1.0, **arguments})


@pytest.mark.parametrize(
    "qp",
    [
        QParams(np.float32(0.1), 3),
        QParams(np.float32([1 / 3, 1e-38, 3e38]), [0, -128, 127], axis=-1),
        QParams(np.float32([[0.1, 0.2]]), 8, "uint4", axis=1, group_size=7),
        QParams(np.float32(0.1), dtype="float8_e5m2"),
        QParams(0.5, 10, "uint8", np.int64(3), np.int64(200)),
        QParams([0.5], axis=np.int64(0)),
    ],
    ids=lambda q: f"{q.dtype}-{q.scale.shape}",
)
def test_qparams_round_trip_through_json(qp: QParams) -> None:
    fields = json.loads(json.dumps(qp.to_dict()))
    again = QParams.from_dict(fields)
    assert again == qp
    ref.assert_same_bits(again.scale, qp.scale)
    ref.assert_same_bits(again.zero_point, qp.zero_point)
    with pytest.raises(ValueError, match="extra"):
        QParams.from_dict({**fields, "extra": 1})


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.scale_dtype == "float32"], ids=repr)
def test_qparams_know_their_config(config: QuantConfig) -> None:
    shape = {"per_tensor": (), "per_channel": (5,), "per_group": (3, 2)}[str(config.granularity)]
    low = -np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)
    assert qparams_from_range(low, -0.3 * low, config).config == config


# ----------------------------------------------------------------------------------------------------------------------
# qparams_from_range


def finite(magnitude: float) -> st.SearchStrategy[float]:
    return st.floats(-magnitude, magnitude, allow_nan=False, allow_infinity=False)


@given(
    ends=st.tuples(finite(3e38), finite(3e38)).map(sorted),
    dtype=st.sampled_from(INTEGERS + FLOAT8),
    mode=st.sampled_from(MODES),
    scale_dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_range_agrees_with_the_reference(ends: list[float], dtype: str, mode: str, scale_dtype: str) -> None:
    assume(not (dtype in FLOAT8 and mode == "asymmetric"))
    config = QuantConfig(dtype, mode, scale_dtype=scale_dtype)
    qp = qparams_from_range(*ends, config)
    scale, zero = ref.qparams_from_range(*ends, dtype, mode, scale_dtype)
    ref.assert_same_bits(qp.scale, scale)
    assert int(qp.zero_point) == int(zero)
    assert (qp.dtype, qp.quant_min, qp.quant_max) == (dtype, config.quant_min, config.quant_max)
    assert qp.scale >= ref.SMALLEST_NORMAL


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_many_random_ranges(dtype: str, mode: str) -> None:
    rng = np.random.default_rng(5)
    ends = np.sort(rng.standard_normal((2, 20_000)) * 2.0 ** rng.integers(-120, 120, (2, 20_000)), axis=0)
    for scale_dtype in ("float32", "bfloat16"):
        config = QuantConfig(dtype, mode, "per_channel", scale_dtype=scale_dtype)
        qp = qparams_from_range(*ends, config)
        scale, zero = ref.qparams_from_range(*ends, dtype, mode, scale_dtype)
        ref.assert_same_bits(qp.scale, scale)
        assert np.array_equal(np.broadcast_to(qp.zero_point, scale.shape), zero)
        # Zero is exactly representable, and both ends are within half a step (the stored scale may round down).
        steps = np.abs(ref.dequantize(ref.quantize(ends, scale, zero, dtype, 1, None, *ref.code_range(dtype, mode)),
                                      scale, zero, dtype, 1).astype(np.float64) - ends) / scale  # fmt: skip
        slack = 2.0**-8 * (255 if "8" in dtype else 15) if scale_dtype == "bfloat16" else 2.0**-14
        assert steps.max() <= 0.5 + slack
        assert (np.unique(zero).size > 10) == (mode == "asymmetric")


@pytest.mark.parametrize(
    ("dtype", "levels"), [("int8", 127), ("uint8", 127), ("int4", 7), ("uint4", 7), ("float8_e4m3fn", 448),
                          ("float8_e5m2", 57344)],
)  # fmt: skip
def test_symmetric_known_answers(dtype: str, levels: int) -> None:
    qp = qparams_from_range(-1.0, 3.0, QuantConfig(dtype))
    assert qp.scale == np.float32(3.0 / levels)
    assert int(qp.zero_point) == {"uint8": 128, "uint4": 8}.get(dtype, 0)
    assert qparams_from_range(-3.0, 1.0, QuantConfig(dtype)) == qp


def test_asymmetric_known_answers() -> None:
    config = QuantConfig("uint8", "asymmetric")
    for low, high, scale, zero in [
        (0.0, 255.0, 1.0, 0),
        (10.0, 255.0, 1.0, 0),  # extended down to 0
        (-255.0, 0.0, 1.0, 255),
        (-255.0, -3.0, 1.0, 255),  # extended up to 0
        (-0.5, 254.5, 1.0, 0),  # a tie: 0 - -0.5 = 0.5 goes to even
        (-1.5, 253.5, 1.0, 2),
    ]:
        qp = qparams_from_range(low, high, config)
        assert (float(qp.scale), int(qp.zero_point)) == (scale, zero), (low, high)
    qp = qparams_from_range(-128.0, 127.0, QuantConfig("int8", "asymmetric"))
    assert (float(qp.scale), int(qp.zero_point)) == (1.0, 0)


def test_zero_points_come_from_the_stored_scale() -> None:
    """A bfloat16 scale is coarse enough for the unrounded scale to give another zero point."""
    differs = 0
    config = QuantConfig("uint8", "asymmetric", scale_dtype="bfloat16")
    for low in -np.linspace(0.01, 3.0, 300):
        qp = qparams_from_range(low, 1.0, config)
        assert int(qp.zero_point) == np.clip(np.rint(-low / float(qp.scale)), 0, 255)
        differs += int(qp.zero_point) != np.rint(-low / ((1.0 - low) / 255))
    assert differs > 30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_degenerate_ranges(dtype: str, mode: str) -> None:
    config = QuantConfig(dtype, mode)
    for low, high in [(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0)]:
        qp = qparams_from_range(low, high, config)
        assert qp.scale == 1.0
        assert ref.dequantize(qp.zero_point, qp.scale, qp.zero_point, dtype) == 0.0
    for tiny in (5e-324, 1e-310, 1e-45, 2.0**-130):
        assert qparams_from_range(-tiny, tiny, config).scale == ref.SMALLEST_NORMAL
        assert qparams_from_range(tiny, tiny, config).scale == ref.SMALLEST_NORMAL
    # No absolute epsilon anywhere: the scale of data of any magnitude is that data's.
    for magnitude in (1e-30, 1e-20, 1e-10, 1e-8, 1e20, 1e30):
        one, scaled = qparams_from_range(-1.0, 1.0, config), qparams_from_range(-magnitude, magnitude, config)
        assert np.isclose(float(scaled.scale) / float(one.scale), magnitude, rtol=1e-6)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("mode", MODES)
def test_huge_ranges(dtype: str, mode: str) -> None:
    config = QuantConfig(dtype, mode)
    top = float(np.finfo(np.float32).max)
    assert np.isfinite(qparams_from_range(-top, top, config).scale)
    for end in (1e300, float(np.finfo(np.float64).max)):
        with pytest.raises(ValueError, match="overflows float32"):
            qparams_from_range(-end, end, config)


def test_scale_dtypes() -> None:
    for scale_dtype, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        config = QuantConfig("int4", scale_dtype=scale_dtype)
        for high in np.random.default_rng(1).uniform(0.01, 1000.0, 200):
            qp = qparams_from_range(-high, high, config)
            assert qp.scale == np.float32(np.float64(high / 7).astype(kind))
            assert qp.scale.dtype == np.float32
    halfway = 7.0 * (1.0 + 2.0**-8)  # a bfloat16 tie: 1 is even
    assert qparams_from_range(0.0, halfway, QuantConfig("int4", scale_dtype="bfloat16")).scale == 1.0
    assert qparams_from_range(0.0, halfway * 1.0000001, QuantConfig("int4", scale_dtype="bfloat16")).scale > 1.0
    with pytest.raises(ValueError, match=r"underflows float16.*bfloat16"):
        qparams_from_range(-1e-7, 1e-7, QuantConfig("int4", scale_dtype="float16"))
    with pytest.raises(ValueError, match="overflows float16"):
        qparams_from_range(-1e6, 1e6, QuantConfig("int4", scale_dtype="float16"))
    with pytest.raises(ValueError, match="overflows bfloat16"):
        top = float(np.finfo(np.float32).max)
        qparams_from_range(-top * 7, top * 7, QuantConfig("int4", scale_dtype="bfloat16"))
    assert qparams_from_range(0.0, 0.0, QuantConfig("int4", scale_dtype="float16")).scale == 1.0


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(np.nan, 1.0, "NaN"), (0.0, np.nan, "NaN"), (-np.inf, 1.0, "infinite"), (0.0, np.inf, "infinite"),
     (2.0, 1.0, "min"), ([0.0, 1.0], 1.0, "shape")],
)  # fmt: skip
def test_bad_ranges(low: object, high: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        qparams_from_range(low, high, QuantConfig.int8())


def test_a_range_must_have_the_shape_of_the_granularity() -> None:
    for config in (QuantConfig.int8(), QuantConfig.int8().asymmetric()):
        with pytest.raises(ValueError, match=r"shape|axis"):
            qparams_from_range([-1.0, -2.0], [1.0, 2.0], config)
        with pytest.raises(ValueError, match=r"shape|axis"):
            qparams_from_range(-1.0, 1.0, config.per_channel(0))


def test_no_channels() -> None:
    for config in (QuantConfig.int8_per_channel(), QuantConfig.int8_per_channel().asymmetric()):
        assert qparams_from_range(np.zeros(0), np.zeros(0), config).scale.shape == (0,)


def test_everything_public_is_named() -> None:
    for name in config_module.__all__:
        assert hasattr(config_module, name)
