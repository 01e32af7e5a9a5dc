"""What to quantize to: code dtypes, `QuantConfig`, `FakeQuantConfig`, and `QParams`.

The one place that turns a range of values into a scale and a zero point is
`qparams_from_range`; observers, tensors and layers all call it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CODE_DTYPES",
    "CodeDType",
    "FakeQuantConfig",
    "ObserverMethod",
    "QParams",
    "QuantConfig",
    "QuantGranularity",
    "QuantMode",
    "qparams_from_range",
]

#: The smallest normal float32. No scale is smaller, so that x / scale never divides by a subnormal.
SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
_LARGEST_SCALE = float(np.finfo(np.float32).max)


#: No group is larger: sizes are multiplied in native code.
LARGEST_GROUP = 2**31 - 1


class _Choice(enum.StrEnum):
    """An enum whose members equal, hash and print as their strings, and that names the choices when refusing."""

    def __repr__(self) -> str:
        return repr(self.value)

    @classmethod
    def _missing_(cls, value: object) -> _Choice | None:
        if isinstance(value, str) and value.lower() != value:
            return cls(value.lower())
        choices = ", ".join(repr(str(m.value)) for m in cls)
        raise ValueError(f"{value!r} is no {cls.__name__}; choose one of {choices}")


class QuantMode(_Choice):
    """Whether zero sits at a fixed code (symmetric) or where the data puts it (asymmetric)."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


class QuantGranularity(_Choice):
    """How many elements share one scale: all, those of one index of an axis, or a run along an axis."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


class ObserverMethod(_Choice):
    """How a range is found from data (see `qnative.observers`)."""

    MIN_MAX = "min_max"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    MEAN_STD = "mean_std"
    KL = "kl"
    MSE = "mse"


@dataclass(frozen=True)
class CodeDType:
    """A format that codes are stored in.

    Attributes
    ----------
    name : str
        The name, as ml_dtypes spells it.
    bits : int
        Bits a stored code takes: int4 and uint4 are really packed, two a byte.
    min, max : int or float
        The full range: integers for integer formats, the largest finite values for float8.
    storage : numpy.dtype
        The dtype of an unpacked array of codes (one element a code).
    """

    name: str
    bits: int
    min: float
    max: float
    storage: np.dtype[Any]

    @cached_property
    def is_float(self) -> bool:
        """True for the float8 formats, whose codes have no zero point."""
        return self.name.startswith("float8")

    @cached_property
    def is_signed(self) -> bool:
        """True where negative codes exist."""
        return self.min < 0


#: Every code dtype by name.
CODE_DTYPES: Mapping[str, CodeDType] = {
    d.name: d
    for d in (
        CodeDType("int8", 8, -128, 127, np.dtype(np.int8)),
        CodeDType("uint8", 8, 0, 255, np.dtype(np.uint8)),
        CodeDType("int4", 4, -8, 7, np.dtype(np.int8)),
        CodeDType("uint4", 4, 0, 15, np.dtype(np.uint8)),
        CodeDType("float8_e4m3fn", 8, -448.0, 448.0, np.dtype(np.uint8)),
        CodeDType("float8_e5m2", 8, -57344.0, 57344.0, np.dtype(np.uint8)),
    )
}

SCALE_DTYPES = ("float32", "float16", "bfloat16")


def code_dtype(name: object) -> CodeDType:
    """Look up a code dtype by its name (or a NumPy / ml_dtypes dtype of that name); ValueError if unknown."""
    if isinstance(name, CodeDType):
        return name
    key = name if isinstance(name, str) else getattr(name, "name", None) or getattr(name, "__name__", None)
    if key not in CODE_DTYPES:
        raise ValueError(f"{name!r} is not a code dtype; choose one of {', '.join(CODE_DTYPES)}")
    return CODE_DTYPES[str(key)]


def check_int(name: str, value: Any) -> int | None:
    """Return an optional whole number as an int; ValueError if it is something else, True and False too."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r} must be an int")
    return int(value)


def check_code_range(info: CodeDType, quant_min: float | None, quant_max: float | None) -> tuple[float, float]:
    """Return the range codes are clamped to, the dtype's full one by default; ValueError if it is not one."""
    low = info.min if quant_min is None else quant_min
    high = info.max if quant_max is None else quant_max
    if not info.min <= low < high <= info.max:
        raise ValueError(f"quant_min={low}, quant_max={high} must ascend within {info.name}'s {info.min}..{info.max}")
    if info.is_float:
        if (low, high) != (info.min, info.max):
            raise ValueError(f"{info.name} has no integer codes to clamp; leave quant_min and quant_max out")
        return low, high
    if low != int(low) or high != int(high):
        raise ValueError(f"quant_min={low}, quant_max={high} must be whole numbers")
    return int(low), int(high)


@dataclass(frozen=True, repr=False)
class QuantConfig:
    """How to quantize: frozen, validated, hashable, and printed as the expression that builds it.

    Parameters
    ----------
    dtype : str
        The code dtype: ``"int8"``, ``"uint8"``, ``"int4"``, ``"uint4"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
    mode : QuantMode or str
        ``"symmetric"`` or ``"asymmetric"``; float8 is symmetric only.
    granularity : QuantGranularity or str
        ``"per_tensor"``, ``"per_channel"`` or ``"per_group"``. Per channel is what weights should use: on a real
        encoder it is about 21 dB better than per tensor.
    axis : int, optional
        The axis whose indices are channels (default 0), or along which groups run (default -1). None per tensor.
    group_size : int, optional
        Elements a group; the last group of a row may be shorter. Only with ``"per_group"``.
    scale_dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: the precision that scales are stored in. Codes are computed
        from the stored scale.

    Raises
    ------
    ValueError
        For an unknown name or a combination that means nothing; the message says which and what to do.

    Examples
    --------
    >>> QuantConfig.int8_per_channel().asymmetric()
    QuantConfig('int8', mode='asymmetric', granularity='per_channel', axis=0)
    """

    dtype: str = "int8"
    mode: QuantMode = QuantMode.SYMMETRIC
    granularity: QuantGranularity = QuantGranularity.PER_TENSOR
    axis: int | None = None
    group_size: int | None = None
    scale_dtype: str = "float32"

    if TYPE_CHECKING:  # what it takes; the fields are what it holds

        def __init__(
            self,
            dtype: str = "int8",
            mode: QuantMode | str = QuantMode.SYMMETRIC,
            granularity: QuantGranularity | str = QuantGranularity.PER_TENSOR,
            axis: int | None = None,
            group_size: int | None = None,
            scale_dtype: str = "float32",
        ) -> None: ...

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("dtype", code_dtype(self.dtype).name)
        put("mode", QuantMode(self.mode))
        put("granularity", QuantGranularity(self.granularity))
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is not one of {', '.join(SCALE_DTYPES)}")
        if self.info.is_float and self.mode is QuantMode.ASYMMETRIC:
            raise ValueError(f"{self.dtype} has no zero point, so it cannot be asymmetric; use mode='symmetric'")
        put("axis", check_int("axis", self.axis))
        put("group_size", check_int("group_size", self.group_size))
        if self.granularity is QuantGranularity.PER_TENSOR:
            if self.axis is not None:
                raise ValueError(f"axis={self.axis} means nothing per tensor; use granularity='per_channel'")
        elif self.axis is None:
            put("axis", 0 if self.granularity is QuantGranularity.PER_CHANNEL else -1)
        if self.granularity is QuantGranularity.PER_GROUP:
            if self.group_size is None or not 1 <= self.group_size <= LARGEST_GROUP:
                raise ValueError(
                    f"group_size={self.group_size} must be a positive int, at most {LARGEST_GROUP}, "
                    "with granularity='per_group'"
                )
        elif self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} needs granularity='per_group', not '{self.granularity}'")

    def __repr__(self) -> str:
        parts = [repr(self.dtype)]
        parts += [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)[1:]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    # Presets

    @classmethod
    def int8(cls) -> QuantConfig:
        """Return one symmetric int8 scale for the whole tensor."""
        return cls("int8")

    @classmethod
    def int8_per_channel(cls, axis: int = 0) -> QuantConfig:
        """Return a symmetric int8 scale for each index of `axis`: the recommendation for weights."""
        return cls("int8", granularity=QuantGranularity.PER_CHANNEL, axis=axis)

    @classmethod
    def int4(cls) -> QuantConfig:
        """Return one symmetric int4 scale for the whole tensor."""
        return cls("int4")

    @classmethod
    def int4_per_channel(cls, axis: int = 0) -> QuantConfig:
        """Return a symmetric int4 scale for each index of `axis`."""
        return cls("int4", granularity=QuantGranularity.PER_CHANNEL, axis=axis)

    @classmethod
    def int4_per_group(cls, group_size: int = 32, axis: int = -1) -> QuantConfig:
        """Return a symmetric int4 scale for each run of `group_size` elements along `axis`."""
        return cls("int4", granularity=QuantGranularity.PER_GROUP, axis=axis, group_size=group_size)

    @classmethod
    def fp8(cls, dtype: str = "float8_e4m3fn") -> QuantConfig:
        """Return one float8 scale for the whole tensor."""
        if not code_dtype(dtype).is_float:
            raise ValueError(f"{dtype!r} is not a float8 format; use 'float8_e4m3fn' or 'float8_e5m2'")
        return cls(dtype)

    # Changed copies

    def _with(self, **changes: Any) -> QuantConfig:
        return dataclasses.replace(self, **changes)

    def symmetric(self) -> QuantConfig:
        """Return a symmetric copy."""
        return self._with(mode=QuantMode.SYMMETRIC)

    def asymmetric(self) -> QuantConfig:
        """Return an asymmetric copy."""
        return self._with(mode=QuantMode.ASYMMETRIC)

    def per_tensor(self) -> QuantConfig:
        """Return a copy with one scale for the whole tensor."""
        return self._with(granularity=QuantGranularity.PER_TENSOR, axis=None, group_size=None)

    def per_channel(self, axis: int = 0) -> QuantConfig:
        """Return a copy with a scale for each index of `axis`."""
        return self._with(granularity=QuantGranularity.PER_CHANNEL, axis=axis, group_size=None)

    def per_group(self, group_size: int = 32, axis: int = -1) -> QuantConfig:
        """Return a copy with a scale for each run of `group_size` elements along `axis`."""
        return self._with(granularity=QuantGranularity.PER_GROUP, axis=axis, group_size=group_size)

    def with_axis(self, axis: int) -> QuantConfig:
        """Return a copy with another axis (per channel or per group)."""
        return self._with(axis=axis)

    def with_group_size(self, group_size: int) -> QuantConfig:
        """Return a copy with another group size (per group)."""
        return self._with(group_size=group_size)

    def with_dtype(self, dtype: str) -> QuantConfig:
        """Return a copy with another code dtype."""
        return self._with(dtype=dtype)

    def with_scale_dtype(self, scale_dtype: str) -> QuantConfig:
        """Return a copy with another precision of the stored scales."""
        return self._with(scale_dtype=scale_dtype)

    # What follows from the fields

    @property
    def info(self) -> CodeDType:
        """The facts of `dtype`: bits, full range, storage."""
        return CODE_DTYPES[self.dtype]

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return self.info.bits

    @property
    def is_symmetric(self) -> bool:
        """True in symmetric mode."""
        return self.mode is QuantMode.SYMMETRIC

    @property
    def quant_min(self) -> float:
        """The smallest code: -127 for symmetric int8 (so that ``abs`` of a code never overflows), else the dtype's."""
        if self.is_symmetric and not self.info.is_float and self.info.is_signed:
            return self.info.min + 1
        return self.info.min

    @property
    def quant_max(self) -> float:
        """The largest code (for float8 the largest finite value)."""
        return self.info.max

    @property
    def symmetric_zero_point(self) -> int:
        """The code of zero in symmetric mode: 0 (float8 too), or the middle of an unsigned range (128, 8)."""
        return 0 if self.info.is_signed else (int(self.info.max) + 1) // 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantConfig:
        """Build from `to_dict`'s result; unknown keys raise ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown {cls.__name__} fields: {', '.join(map(repr, unknown))}")
        return cls(**fields)


def check_config(config: object, name: str = "config") -> QuantConfig:
    """Return `config` if it is a `QuantConfig`; TypeError if not."""
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"{name} must be a QuantConfig, such as QuantConfig.int8_per_channel(), not {type(config).__name__}"
        )
    return config


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, enum.Enum) else value


@dataclass(frozen=True, repr=False)
class NarrowConfig(QuantConfig):
    """A config of whose codes only the ``2**code_bits`` around the zero point are used.

    Codes are stored as `dtype` stores them; only ranges differ, and what follows from them. See `FakeQuantConfig.bits`.
    """

    code_bits: int = 8

    if TYPE_CHECKING:

        def __init__(self, *, code_bits: int, **fields: Any) -> None: ...

    @property
    def quant_min(self) -> float:
        """The smallest code: for 2 bits -2, or -1 if symmetric; unsigned, 0, or 2 below the middle if symmetric."""
        half = 1 << (self.code_bits - 1)
        if self.info.is_signed:
            return 1 - half if self.is_symmetric else -half
        return self.symmetric_zero_point - half if self.is_symmetric else 0

    @property
    def quant_max(self) -> float:
        """The largest code: for 2 bits 1; unsigned, 3, or 1 above the middle if symmetric."""
        half = 1 << (self.code_bits - 1)
        if self.info.is_signed:
            return half - 1
        return (self.symmetric_zero_point if self.is_symmetric else half) + half - 1


@dataclass(frozen=True)
class FakeQuantConfig:
    """How training simulates quantization.

    Parameters
    ----------
    quant : QuantConfig
        What is simulated.
    observer : ObserverMethod or str
        How the range is found.
    learnable : bool
        Learn the scale (and zero point, when asymmetric) by LSQ (Esser et al., 2020).
    bits : int, optional
        Use only codes of so many bits, 2 or more, of the integer dtype; all of them by default. For int4 and 2 bits
        -1..1 when symmetric, -2..1 when asymmetric. What is deployed has these codes, and takes the dtype's room.

    Raises
    ------
    TypeError, ValueError
        For another kind of config, an unknown observer, or bits that the dtype does not have.
    """

    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig.int8)
    observer: ObserverMethod = ObserverMethod.MIN_MAX
    learnable: bool = False
    bits: int | None = None

    if TYPE_CHECKING:  # what it takes; the fields are what it holds

        def __init__(
            self,
            quant: QuantConfig = ...,
            observer: ObserverMethod | str = ...,
            learnable: bool = False,
            bits: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_config(self.quant, "quant")
        object.__setattr__(self, "observer", ObserverMethod(self.observer))
        object.__setattr__(self, "learnable", bool(self.learnable))
        bits = check_int("bits", self.bits)
        if bits is not None:
            if self.quant.info.is_float:
                raise ValueError(f"bits={bits}: {self.quant.dtype} has no integer codes to use fewer of; leave it out")
            if not 2 <= bits <= self.quant.bits:
                raise ValueError(f"bits={bits} must lie in 2..{self.quant.bits}, {self.quant.dtype}'s bits")
        object.__setattr__(self, "bits", None if bits == self.quant.bits else bits)

    def with_learnable(self, learnable: bool = True) -> FakeQuantConfig:
        """Return a copy whose scale is learned (or not)."""
        return dataclasses.replace(self, learnable=learnable)

    def with_observer(self, observer: ObserverMethod | str) -> FakeQuantConfig:
        """Return a copy with another observer."""
        return dataclasses.replace(self, observer=ObserverMethod(observer))

    def with_bits(self, bits: int | None) -> FakeQuantConfig:
        """Return a copy that uses codes of so many bits."""
        return dataclasses.replace(self, bits=bits)

    @property
    def simulated(self) -> QuantConfig:
        """`quant`, its range cut to `bits`: whose rules and ranges the simulation follows."""
        if self.bits is None:
            return self.quant
        fields = {f.name: getattr(self.quant, f.name) for f in dataclasses.fields(self.quant)}
        return NarrowConfig(**fields, code_bits=self.bits)

    @property
    def quant_range(self) -> tuple[float, float]:
        """``(quant_min, quant_max)``."""
        return self.simulated.quant_min, self.simulated.quant_max


@dataclass(frozen=True, eq=False)
class QParams:
    """A scale and a zero point: what observers give and tensors and layers take.

    A code ``q`` stands for ``(q - zero_point) * scale``.

    Parameters
    ----------
    scale : array_like of float
        Finite and > 0. Shape ``()`` per tensor, ``(channels,)`` per channel, the data's shape with the axis divided
        by the group size (rounded up) per group.
    zero_point : array_like of int
        The code of 0.0, of `scale`'s shape or ``()``; kept in the code dtype's storage. 0 for float8.
    dtype : str
        The code dtype.
    quant_min, quant_max : int or float, optional
        The range codes are clamped to; the dtype's full range by default.
    axis, group_size : int, optional
        As in `QuantConfig`.

    Raises
    ------
    ValueError
        If a scale is not finite and positive, or a zero point is outside the code dtype.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any] = dataclasses.field(default_factory=lambda: np.zeros((), np.int8))
    dtype: str = "int8"
    quant_min: float | None = None
    quant_max: float | None = None
    axis: int | None = None
    group_size: int | None = None

    if TYPE_CHECKING:  # what it takes; the fields are what it holds

        def __init__(
            self,
            scale: ArrayLike,
            zero_point: ArrayLike = 0,
            dtype: str = "int8",
            quant_min: float | None = None,
            quant_max: float | None = None,
            axis: int | None = None,
            group_size: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        info = code_dtype(self.dtype)
        scale = check_scale(self.scale)
        zero_point = check_zero_point(self.zero_point, info, scale.shape)
        low, high = check_code_range(info, self.quant_min, self.quant_max)
        axis, group_size = check_int("axis", self.axis), check_int("group_size", self.group_size)
        if group_size is not None and (not 1 <= group_size <= LARGEST_GROUP or axis is None or scale.ndim == 0):
            raise ValueError(f"group_size={group_size} must be positive and needs an axis and a scale each group")
        if group_size is None and scale.ndim != (0 if axis is None else 1):
            raise ValueError(
                f"scale has shape {scale.shape} with axis={axis}; give one number (float(scale)) and no axis, or one "
                "each channel of an axis"
            )
        if not info.is_float and np.any((zero_point.astype(np.int32) < low) | (zero_point.astype(np.int32) > high)):
            raise ValueError(f"zero_point must lie in quant_min..quant_max, {low}..{high}, so that 0.0 has a code")
        scale.flags.writeable = zero_point.flags.writeable = False
        for name, value in (
            ("scale", scale), ("zero_point", zero_point), ("dtype", info.name), ("quant_min", low), ("quant_max", high),
            ("axis", axis), ("group_size", group_size),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return QParams, tuple(getattr(self, f.name) for f in dataclasses.fields(self))  # arrays read-only again

    @property
    def config(self) -> QuantConfig:
        """The `QuantConfig` that these parameters are of, its mode read off the zero points."""
        info = CODE_DTYPES[self.dtype]
        symmetric_zero = 0 if info.is_signed else (int(info.max) + 1) // 2
        symmetric = info.is_float or (
            bool(np.all(self.zero_point == symmetric_zero)) and (not info.is_signed or self.quant_min == info.min + 1)
        )
        if self.group_size is not None:
            granularity = QuantGranularity.PER_GROUP
        else:
            granularity = QuantGranularity.PER_TENSOR if self.axis is None else QuantGranularity.PER_CHANNEL
        mode = QuantMode.SYMMETRIC if symmetric else QuantMode.ASYMMETRIC
        return QuantConfig(self.dtype, mode, granularity, self.axis, self.group_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QParams):
            return NotImplemented
        return (
            np.array_equal(self.scale, other.scale)
            and np.array_equal(
                np.broadcast_to(self.zero_point, self.scale.shape), np.broadcast_to(other.zero_point, other.scale.shape)
            )
            and all(
                getattr(self, n) == getattr(other, n) for n in ("dtype", "quant_min", "quant_max", "axis", "group_size")
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them (floats exactly: each float32 has a shortest decimal)."""
        return {
            "scale": self.scale.astype(np.float64).tolist(),
            "zero_point": self.zero_point.tolist(),
            "dtype": self.dtype,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "axis": self.axis,
            "group_size": self.group_size,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QParams:
        """Build from `to_dict`'s result; unknown keys raise ValueError."""
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown QParams fields: {', '.join(map(repr, unknown))}")
        return cls(**fields)


def check_scale(scale: ArrayLike, *, copy: bool | None = True) -> NDArray[np.float32]:
    """Return `scale` as a float32 array, of its own with `copy`; ValueError unless every entry is finite and > 0."""
    if type(scale) is float and SMALLEST_SCALE <= scale <= _LARGEST_SCALE:  # by far the most: nothing is left to judge
        return np.array(scale, np.float32)
    if getattr(scale, "dtype", None) == np.float32:
        array = np.array(scale, np.float32, copy=copy)
    else:
        with np.errstate(over="ignore", under="ignore"):  # judged below, with a message that says what to do
            array = np.array(scale, np.float32, copy=copy)
    least, most = _ends(array) if array.size else (1, 1)
    if not 0 < least <= most < math.inf:  # of NaN, neither
        bad = array[~(np.isfinite(array) & (array > 0))].ravel()[0]
        raise ValueError(f"scale has the entry {bad}; every scale must be finite and > 0 in float32")
    return array


def _ends(array: NDArray[Any]) -> tuple[Any, Any]:
    """Return the least and the greatest entry; of a single one, sooner than NumPy would."""
    return (array.min(), array.max()) if array.ndim else (array.item(), array.item())


def check_zero_point(
    zero_point: ArrayLike | None,
    info: CodeDType,
    shape: tuple[int, ...],
    dtype: np.dtype[Any] | None = None,
    *,
    copy: bool | None = True,
) -> NDArray[Any]:
    """Return `zero_point` in a dtype, that of stored codes by default; ValueError if it does not fit them or the scale.

    An array of its own with `copy`.
    """
    storage = dtype or (np.dtype(np.int8) if info.is_float else info.storage)
    low, high = (0, 0) if info.is_float else (info.min, info.max)
    if zero_point is None or (type(zero_point) is int and low <= zero_point <= high):
        return np.array(zero_point or 0, storage)
    given = np.asarray(zero_point)
    if given.dtype.kind not in "iu" and (given.dtype.kind != "f" or not np.array_equal(given, np.rint(given))):
        raise ValueError(f"zero_point must be whole numbers, not {given.dtype}; round it first")
    least, most = _ends(given) if given.size else (low, high)
    if least < low or most > high:
        raise ValueError(f"zero_point {least if least < low else most} is outside {info.name}'s codes {low}..{high}")
    if given.shape not in ((), shape):
        raise ValueError(f"zero_point has shape {given.shape}; it must be () or the scale's shape {shape}")
    return np.array(given, dtype=storage, copy=copy)


def round_scale(scale: NDArray[np.float64], scale_dtype: str) -> NDArray[np.float32]:
    """Round float64 scales once to the precision they are stored in, as float32 values.

    Raises ValueError where a scale overflows, or underflows float16.
    """
    with np.errstate(over="ignore", under="ignore"):
        if scale_dtype == "float16":
            stored = scale.astype(np.float16).astype(np.float32)
            if np.any(stored == 0):
                raise ValueError(f"scale {scale.min():.3g} underflows float16; use scale_dtype='bfloat16' or 'float32'")
        else:
            # Tiny data: the scale is only kept from falling below the smallest normal float32.
            scale = np.maximum(scale, SMALLEST_SCALE)
            stored = _round_bfloat16(scale) if scale_dtype == "bfloat16" else scale.astype(np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"scale {scale.max():.3g} overflows {scale_dtype}; rescale the data")
    return stored


def _round_bfloat16(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round positive float64 values once to bfloat16's 8 significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    rounded: NDArray[np.float64] = np.ldexp(np.rint(mantissa * 256.0), exponent - 8)
    return rounded.astype(np.float32)


def qparams_from_range(min_val: ArrayLike, max_val: ArrayLike, config: QuantConfig) -> QParams:
    """Turn a range of values into a scale and a zero point.

    Symmetric: ``scale = max(|min|, |max|) / 127`` (int8 and uint8), ``/ 7`` (int4, uint4), ``/ 448`` (float8_e4m3fn).
    Asymmetric: the range is first extended to contain 0, ``scale = (max - min) / (quant_max - quant_min)`` and the zero
    point is rounded from the stored scale, so that 0.0 always has a code of its own. All-zero data gets scale 1.
    Everything is computed in float64 and the scale rounded once to `config.scale_dtype`; at the very end of float32,
    where a scale rounded up would decode its end code to Inf, it is the next one below. (An asymmetric range wider than
    float32's largest value can still decode one of its ends to Inf.)

    Parameters
    ----------
    min_val, max_val : array_like of float
        Ends of the range, of one shape: ``()`` per tensor, one entry a channel or group otherwise.
    config : QuantConfig
        The target.

    Returns
    -------
    QParams

    Raises
    ------
    ValueError
        If an end is not finite, min > max, or the scale cannot be stored.
    """
    low = np.asarray(min_val, dtype=np.float64)
    high = np.asarray(max_val, dtype=np.float64)
    if low.shape != high.shape:
        raise ValueError(f"min has shape {low.shape} and max {high.shape}; they must be the same")
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the range has an end that is NaN or infinite; only finite data can be quantized")
    if np.any(low > high):
        raise ValueError("the range has min > max; give the smaller end first")
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, not {type(config).__name__}")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if config.is_symmetric:
        zero = config.symmetric_zero_point
        levels = min(config.quant_max - zero, zero - config.quant_min)
        scale = np.maximum(-low, high) / levels
    else:
        # Each end divided by itself: max - min may overflow where the data is near the end of float64.
        levels = config.quant_max - config.quant_min
        scale = high / levels - low / levels
        with np.errstate(over="ignore"):
            exact = high - low
        scale = np.where(np.isfinite(exact), exact / levels, scale)
    scale = np.where(np.maximum(-low, high) == 0.0, 1.0, scale)
    stored = round_scale(scale, config.scale_dtype)
    largest = float(np.finfo(np.float32).max)
    overflows = (stored.astype(np.float64) * levels > largest) & (scale * levels <= largest)
    if overflows.any():
        below = np.nextafter(stored, np.float32(0))
        if config.scale_dtype == "bfloat16":
            below = (below.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        stored = np.where(overflows, below, stored)
    if config.is_symmetric:
        zero_point: ArrayLike = config.symmetric_zero_point
    else:
        raw = np.rint(config.quant_min - low / stored.astype(np.float64))
        zero_point = np.clip(raw, config.quant_min, config.quant_max).astype(np.int32)
    return QParams(
        stored,
        zero_point,
        config.dtype,
        config.quant_min,
        config.quant_max,
        config.axis,
        config.group_size,
    )
