"""The quantized linear layer: packed once, called many times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core, threads
from qnative.config import CODE_DTYPES, QParams, QuantConfig, qparams_from_range
from qnative.floats import as_float_array, check_array, encode, plain_array
from qnative.granularity import Granules
from qnative.tensor import (
    QuantizedTensor,
    quantize_tensor,
    refuse_quantized,
    store_codes,
    store_scale,
    store_zero_point,
)

__all__ = ["ACTIVATIONS", "ACTIVATION_FUNCTIONS", "QuantizedLinear", "quantize_bias"]

#: How a layer may quantize what it is given, besides statically (a `QParams`).
ACTIVATIONS = ("dynamic", "dynamic_symmetric", "float")
#: What may be fused after the bias.
ACTIVATION_FUNCTIONS = ("relu", "gelu", "gelu_tanh", "silu")

_INT32_MAX = 2**31 - 1
_MAX_IN_FEATURES = 1 << 23
#: Attributes that a layer sets itself. What else an object has, a derived class or a user has put there.
_FIELDS = frozenset(
    f"_{name}"
    for name in (
        "shape", "dtype", "config", "activations", "static", "activation", "output", "out_dtype", "bias_dtype", "wide",
    )
)  # fmt: skip


class QuantizedLinear(_core.PackedLinear):
    """``y = activation(x @ weight.T + bias)`` with quantized weights, and usually quantized activations.

    Build one with `from_float`, `from_tensor` or `QuantizedModel`. The weights are packed once for the machine and held
    once; a call changes nothing in the layer and runs without the GIL, so any number of threads may call one object.

    How x is quantized (`activations`):

    ``"dynamic"``
        Each row by itself to uint8 over its own range (ONNX DynamicQuantizeLinear applied to every row), so that a
        row's result never depends on its batch.
    ``"dynamic_symmetric"``
        Each row by itself to -127..127, ``scale = max(abs(row)) / 127``.
    a `QParams`
        Static: one calibrated scale and zero point. Codes of that dtype are then taken as input too.
    ``"float"``
        Not at all: float32 times decoded weights (weight-only quantization).

    With float8 weights, quantized activations are float8 of the same format, scaled per row (or statically), and the
    products are float32. In a call NaN becomes the zero point's code and infinities the ends of the range (with
    ``activations="float"`` they propagate as floats do); nothing is checked, in every kernel alike.

    The numbers, the same bits on every CPU: sums of products are exact integers; then
    ``y = fl(fl(float32(acc) * fl(s_x * s_w[n])) + bias[n])`` in float32, the products of groups added in ascending
    order before the bias; then the activation; an integer output equals ``quantize(y, output)``.

    Parameters
    ----------
    tensor : QuantizedTensor, shape (out_features, in_features)
        The weights, with one scale, one an output, or groups along in_features.
    bias, activations, activation, output
        As for `from_float`.

    Raises
    ------
    TypeError, ValueError
        For weights that are no `QuantizedTensor`, and shapes or settings that do not fit.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: ArrayLike | None = None,
        activations: str | QParams = "dynamic",
        *,
        activation: str | None = None,
        output: QParams | None = None,
    ) -> None:
        if not isinstance(tensor, QuantizedTensor):
            raise TypeError(f"weights must be a QuantizedTensor, not {type(tensor).__name__}; from_float() quantizes")
        self._set_up(tensor.shape, tensor.dtype, tensor.config, bias, activations, activation, output)
        info, (n, k) = tensor.config.info, tensor.shape
        if info.bits == 4:
            codes = np.ascontiguousarray(tensor.data, "<i4").view(np.uint8).reshape(n, -1 if n else 4 * (-(-k // 8)))
        else:
            codes = tensor.data.view(np.uint8)
            if info.name == "uint8":
                codes = codes ^ np.uint8(0x80)
        self._fill(bias, tensor.scale_data, tensor.zero_point, codes=codes)

    def _set_up(
        self,
        shape: tuple[int, ...],
        dtype: str,
        config: QuantConfig,
        bias: ArrayLike | None,
        activations: str | QParams,
        activation: str | None,
        output: QParams | None,
    ) -> None:
        """Check and keep what a layer is, but for the weights."""
        if len(shape) != 2:
            raise ValueError(f"weights have shape {shape}; a linear layer needs (out_features, in_features)")
        axis = None if config.axis is None else config.axis % 2
        if config.group_size is None and axis == 1:
            raise ValueError(
                "weights per channel of axis 1 have a scale each input, which no sum over inputs can take out; "
                "quantize with axis=0, or per group along axis 1"
            )
        if config.group_size is not None and axis == 0:
            raise ValueError("groups along axis 0 mix outputs; quantize with groups along axis 1 (in_features)")
        self._shape = shape
        self._dtype = dtype
        self._config = config
        self._activations = _check_activations(activations, config)
        self._static = isinstance(self._activations, QParams)
        self._activation = _check_choice("activation", activation, ACTIVATION_FUNCTIONS)
        self._output = _check_output(output)
        self._out_dtype = np.dtype(np.float32) if self._output is None else np.dtype(self._output.dtype)
        if self.in_features > _MAX_IN_FEATURES:
            raise ValueError(
                f"in_features={self.in_features} is above {_MAX_IN_FEATURES}, up to which sums of codes fit int32; cut "
                "the weights along in_features into layers and add their outputs"
            )

    # Building

    @classmethod
    def from_float(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        config: QuantConfig | None = None,
        activations: str | QParams = "dynamic",
        *,
        activation: str | None = None,
        output: QParams | None = None,
    ) -> QuantizedLinear:
        """Quantize float weights and build a layer of them.

        Parameters
        ----------
        weight : array_like of float, shape (out_features, in_features)
            float16, bfloat16, float32 or float64.
        bias : array_like, shape (out_features,), optional
            float32, or int32 in units of ``input_scale * weight_scale`` (static activations only; see `quantize_bias`).
        config : QuantConfig, optional
            `QuantConfig.int8_per_channel` by default. Channels are rows (axis 0); groups run along in_features.
        activations : {"dynamic", "dynamic_symmetric", "float"} or QParams
            How x is quantized; see the class.
        activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
            Fused after the bias. ``"gelu"`` is the exact form with erf.
        output : QParams, optional
            int8 or uint8, per tensor: the layer returns codes, so that layers chain without leaving integers.

        Returns
        -------
        QuantizedLinear

        Raises
        ------
        TypeError
            For weights that are not of floats, or quantized already.
        ValueError
            For shapes or settings that do not fit; the message says which and what to do.
        """
        refuse_quantized(weight, "from_tensor() takes it as it is; ")
        config = QuantConfig.int8_per_channel() if config is None else config
        found = _row_parameters(weight, config)
        if found is None:
            return cls(quantize_tensor(weight, config), bias, activations, activation=activation, output=output)
        values, dtype, qparams = found
        layer = cls.__new__(cls)
        layer._set_up(values.shape, dtype, config, bias, activations, activation, output)
        layer._fill(bias, store_scale(qparams.scale, config), qparams.zero_point, values=values)
        return layer

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantizedTensor,
        bias: ArrayLike | None = None,
        activations: str | QParams = "dynamic",
        *,
        activation: str | None = None,
        output: QParams | None = None,
    ) -> QuantizedLinear:
        """Build a layer of weights that are quantized already; parameters as for `from_float`."""
        return cls(tensor, bias, activations, activation=activation, output=output)

    def _group_count(self) -> int:
        size = self._config.group_size
        return 1 if size is None or self.in_features == 0 else -(-self.in_features // size)

    def _check_bias(self, bias: ArrayLike | None) -> NDArray[Any] | None:
        if bias is None:
            return None
        given = plain_array(bias)
        if given.shape != (self.out_features,):
            raise ValueError(f"bias has shape {given.shape}; it must be ({self.out_features},), the out_features")
        if given.dtype == np.int32:
            if not isinstance(self._activations, QParams) or self._config.info.is_float:
                raise ValueError(
                    "an int32 bias is in units of input_scale * weight_scale, which needs static activations "
                    "and integer weights; pass a float32 bias"
                )
            if self._group_count() > 1:
                raise ValueError("an int32 bias needs one scale per output; with groups pass a float32 bias")
            return np.require(given, np.int32, ["C_CONTIGUOUS", "ALIGNED"])
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(as_float_array(bias), np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"bias has {np.count_nonzero(~np.isfinite(array))} values that are not finite float32")
        return array

    def _sum_may_overflow(self, zero_point: NDArray[Any], bias: NDArray[Any] | None) -> bool:
        """Whether a sum over (a group of) in_features, with the int32 bias, might not fit int32."""
        info, config = self._config.info, self._config
        if info.is_float or self._activations == "float":
            return False
        if isinstance(self._activations, QParams):
            codes, zero = np.iinfo(_input_dtype(self._activations)), int(self._activations.zero_point)
            largest_input = max(codes.max - zero, zero - codes.min)
        else:
            largest_input = 255 if self._activations == "dynamic" else 127
        zeros = (int(zero_point.min()), int(zero_point.max())) if zero_point.size else (0, 0)
        largest_weight = int(max(config.quant_max - zeros[0], zeros[1] - config.quant_min))
        count = min(self.in_features, config.group_size or self.in_features)
        largest = count * largest_input * largest_weight
        if bias is not None and bias.dtype == np.int32 and bias.size:
            largest += int(np.abs(bias.astype(np.int64)).max())
        return largest > _INT32_MAX

    def _fill(
        self,
        bias: ArrayLike | None,
        scale: NDArray[Any],
        zero_point: NDArray[Any],
        codes: NDArray[np.uint8] | None = None,
        values: NDArray[np.float32] | None = None,
    ) -> None:
        """Hand the weights to the kernels in their terms: codes are signed bytes or unsigned nibbles.

        Codes, or floats that are quantized on their way into the panels. Scales as they are stored, zero points in the
        storage of codes.
        """
        config, info, (n, k) = self._config, self._config.info, self._shape
        bias_array = self._check_bias(bias)
        self._bias_dtype: np.dtype[Any] | None = None if bias_array is None else bias_array.dtype
        self._wide = self._sum_may_overflow(zero_point, bias_array)
        offset = _stored_offset(config)
        grouped = (n, self._group_count())
        zero = (zero_point.view(np.uint8) + np.uint8(offset % 256)).view(np.int8)  # modulo 256, as bytes are
        if k == 0:
            scale, zero = store_scale(np.ones(grouped, np.float32), config), np.zeros(grouped, np.int8)
        elif config.group_size is None:
            scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
        scale = np.ascontiguousarray(np.broadcast_to(scale, grouped))
        zeros = np.ascontiguousarray(np.broadcast_to(zero, grouped)) if zero.any() else None
        if isinstance(self._activations, QParams):
            in_params, signed = _unsigned_params(self._activations), _input_dtype(self._activations) == np.int8
            kind = "static"
        else:
            in_params, signed, kind = (1.0, 0, 0, 255), False, self._activations
        out = self._output
        out_params = (1.0, 0, 0, 0)
        if out is not None:
            out_params = (float(out.scale), int(out.zero_point), int(out.quant_min or 0), int(out.quant_max or 0))
        threads.meet_threadpoolctl()
        code_range = (0, 0) if info.is_float else (int(config.quant_min) + offset, int(config.quant_max) + offset)
        self._pack(
            codes, values, k, max(1, min(k, config.group_size or k)), scale.view(np.uint8), zeros, bias_array,
            code_range=code_range, scale_dtype=config.scale_dtype,
            format="int4" if info.bits == 4 else "int8" if not info.is_float else info.name,
            input=kind, activation=self._activation, output="float32" if out is None else out.dtype,
            in_params=in_params, out_params=out_params, signed_codes=signed, wide=self._wide,
        )  # fmt: skip

    # Calling: __call__ is native; what it cannot take as it is comes here.

    def _as_input(self, x: ArrayLike) -> NDArray[Any]:
        """Return x as float32, or as codes, C-contiguous, aligned and in native byte order; explain what cannot be."""
        array = plain_array(x)
        if array.ndim < 1 or array.shape[-1] != self._shape[1]:
            raise ValueError(f"x has shape {array.shape}; its last dimension must be in_features={self._shape[1]}")
        if self._static and array.dtype == _input_dtype(self._activations):
            return np.require(array, requirements=["C", "ALIGNED"])
        if array.dtype.kind in "iu" and self._static:
            raise TypeError(
                f"x holds {array.dtype}; this layer takes float32, or {_input_dtype(self._activations)} codes"
            )
        with np.errstate(over="ignore"):
            return np.require(as_float_array(array), np.float32, ["C", "ALIGNED"])

    def _check_out(self, out: NDArray[Any], x: NDArray[Any]) -> None:
        """Explain why the result for x cannot be written to out."""
        shape = (*x.shape[:-1], self.out_features)
        check_array(out, "out")
        if out.shape != shape or out.dtype != self._out_dtype:
            raise ValueError(f"out is {out.dtype} of shape {out.shape}; it must be {self._out_dtype} of shape {shape}")
        if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
            raise ValueError("out must be C-contiguous, aligned and writeable; pass one made by np.empty")
        raise ValueError("out shares memory with x, which is still read while out is written; pass another array")

    def quantize_input(self, x: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any]]:
        """Quantize x as a call does.

        Parameters
        ----------
        x : array_like, shape (..., in_features)
            As for a call.

        Returns
        -------
        codes : numpy.ndarray, shape of x
            uint8 (dynamic), int8 (dynamic_symmetric), the static dtype's storage, or uint8 holding float8 codes.
        scale : numpy.ndarray of float32, shape x.shape[:-1] (dynamic) or () (static)
        zero_point : numpy.ndarray, of the scale's shape and the codes' dtype

        Raises
        ------
        ValueError
            With ``activations="float"``, and for another shape.
        """
        if self._activations == "float":
            raise ValueError('activations="float" are not quantized')
        array, fixed, info = self._as_input(x), self._activations, self._config.info
        if array.dtype != np.float32 and isinstance(fixed, QParams):
            return array, np.asarray(fixed.scale), np.asarray(fixed.zero_point)
        lead = array.shape[:-1]
        rows = array.reshape(math.prod(lead), self.in_features)
        scale, zero = np.ones(len(rows), np.float32), np.zeros(len(rows), np.int32)
        if info.is_float:
            values = np.empty(rows.shape, np.float32)
            self._quantize_rows(rows, None, values, scale, zero)
            codes = encode(values, info.name)
        else:
            codes = np.empty(rows.shape, np.uint8)
            self._quantize_rows(rows, codes, None, scale, zero)
            if fixed == "dynamic_symmetric" or (isinstance(fixed, QParams) and _input_dtype(fixed) == np.int8):
                codes, zero = (codes ^ np.uint8(0x80)).view(np.int8), zero - 128
        codes = codes.reshape(array.shape)
        if isinstance(fixed, QParams):
            return codes, np.asarray(fixed.scale), np.asarray(fixed.zero_point)
        return codes, scale.reshape(lead), zero.reshape(lead).astype(codes.dtype)

    def accumulate(self, x: ArrayLike) -> NDArray[Any]:
        """Compute the exact integer sums of a call, before any float.

        Parameters
        ----------
        x : array_like, shape (..., in_features)
            As for a call.

        Returns
        -------
        numpy.ndarray
            ``sum((a - z_a) * (w - z_w))``, plus the bias if it is int32; int32, or int64 where in_features is so large
            that int32 might not hold it. Shape (..., out_features), or (..., groups, out_features) with groups.

        Raises
        ------
        ValueError
            With ``activations="float"`` or float8 weights, whose sums are float32, and for another shape.
        """
        return self._accumulate(x)

    def _accumulate(self, x: ArrayLike, isa: str | None = None) -> NDArray[Any]:
        if self._activations == "float" or self._config.info.is_float:
            raise ValueError(
                "the products of float activations or float8 weights are float32; there are no accumulators"
            )
        array = self._as_input(x)
        middle = () if self._config.group_size is None else (self._groups,)
        out = np.empty((*array.shape[:-1], *middle, self.out_features), np.int64 if self._wide else np.int32)
        self._run(array, out, "acc64" if self._wide else "acc32", isa)
        return out

    # What it is

    @property
    def in_features(self) -> int:
        """K: length of an input row."""
        return self._shape[1]

    @property
    def out_features(self) -> int:
        """N: length of an output row."""
        return self._shape[0]

    @property
    def config(self) -> QuantConfig:
        """How the weights are quantized."""
        return self._config

    @property
    def activations(self) -> str | QParams:
        """How x is quantized."""
        return self._activations

    @property
    def activation(self) -> str | None:
        """The fused activation function."""
        return self._activation

    @property
    def output(self) -> QParams | None:
        """The output's scale and zero point, or None for float32."""
        return self._output

    @property
    def bias(self) -> NDArray[Any] | None:
        """The bias, float32 or int32 of shape (out_features,), or None."""
        if self._bias_dtype is None:
            return None
        out = np.empty(self.out_features, self._bias_dtype)
        self._read_bias(out)
        return out

    @property
    def weight_scale(self) -> NDArray[np.float32]:
        """Scales of the weights: shape (), (out_features,), or (out_features, groups)."""
        return self._scales()[0]

    @property
    def weight_zero_point(self) -> NDArray[Any]:
        """Zero points of the weights, in the code dtype; shape () when symmetric."""
        return self._scales()[1]

    @property
    def input_scale(self) -> float | None:
        """The static input scale, or None."""
        return float(self._activations.scale) if isinstance(self._activations, QParams) else None

    @property
    def input_zero_point(self) -> int | None:
        """The static input zero point, or None."""
        return int(self._activations.zero_point) if isinstance(self._activations, QParams) else None

    @property
    def output_scale(self) -> float | None:
        """The output's scale, or None for float32."""
        return None if self._output is None else float(self._output.scale)

    @property
    def output_zero_point(self) -> int | None:
        """The output's zero point, or None for float32."""
        return None if self._output is None else int(self._output.zero_point)

    @property
    def bias_scale(self) -> NDArray[np.float32] | None:
        """The unit of an int32 bias, ``input_scale * weight_scale``; None with groups or without static activations."""
        if not isinstance(self._activations, QParams) or self._group_count() > 1:
            return None
        return np.asarray(self._activations.scale * self.weight_scale, np.float32)

    @property
    def memory_savings_bytes(self) -> int:
        """Bytes that float32 weights and bias would take, less `nbytes`."""
        return (
            4 * (self.out_features * self.in_features + (0 if self._bias_dtype is None else self.out_features))
            - self.nbytes
        )

    def parameters(self) -> list[Any]:
        """Return [], as nothing here can be trained (`QATLinear` can)."""
        return []

    def weight_quantized(self) -> QuantizedTensor:
        """Rebuild the `QuantizedTensor` from the packed form, bit for bit the one that the layer was built from."""
        config, info = self._config, self._config.info
        raw = np.empty(self._shape, np.uint8)
        self._read_codes(raw)
        codes = raw - np.uint8(_stored_offset(config) % 256)  # modulo 256, as bytes are
        scale, zero_point = self._scales()
        data = store_codes(codes.view(info.storage), zero_point, config)
        return QuantizedTensor(
            data, store_scale(scale, config), zero_point, self._shape, self._dtype, config, check=False
        )

    def _scales(self) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Read the scales and zero points back from the packed form, in the shapes that a tensor has them in."""
        shape = Granules.of_config(self._shape, self._config).shape
        packed = (self.out_features, self._groups)
        scale: NDArray[np.float32] = np.empty(packed, np.float32)
        zero: NDArray[np.int32] = np.empty(packed, np.int32)
        self._read_scales(scale, zero)
        count = math.prod(shape)
        if scale.size < count:  # no output, and still one scale for all
            scale = np.ones(count, np.float32)
            zero = np.full(count, _stored_offset(self._config), np.int32)
        zero_point = (zero - _stored_offset(self._config)).reshape(-1)[:count].reshape(shape)
        return scale.reshape(-1)[:count].reshape(shape), store_zero_point(zero_point, shape, self._config)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {"activation": self._activation, "output": self._output}
        arguments = (type(self), self.weight_quantized(), self.bias, self._activations, settings)
        added = {name: value for name, value in vars(self).items() if name not in _FIELDS}
        return (_rebuild, arguments, added) if added else (_rebuild, arguments)

    def __setstate__(self, added: dict[str, Any]) -> None:
        vars(self).update(added)

    def __repr__(self) -> str:
        how = self._activations
        if isinstance(how, QParams):
            how = f"static {how.dtype}(scale={float(how.scale):.6g}, zero_point={int(how.zero_point)})"
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", repr(self._config)]
        parts += [f"activations={how!r}" if isinstance(self._activations, str) else f"activations={how}"]
        parts += [f"bias={'None' if self._bias_dtype is None else self._bias_dtype.name}"]
        if self._activation:
            parts.append(f"activation={self._activation!r}")
        if self._output is not None:
            out = self._output
            parts.append(f"output={out.dtype}(scale={float(out.scale):.6g}, zero_point={int(out.zero_point)})")
        return f"QuantizedLinear({', '.join(parts)}, {self.nbytes:,} bytes)"


def quantize_bias(bias: ArrayLike, input_scale: ArrayLike, weight_scale: ArrayLike) -> NDArray[np.int32]:
    """Quantize a bias to int32 with ``bias_scale = input_scale * weight_scale``, so that it adds to the accumulators.

    Parameters
    ----------
    bias : array_like of float, shape (out_features,)
    input_scale, weight_scale : float or array_like
        The scale that layers multiply accumulators with is their float32 product.

    Returns
    -------
    numpy.ndarray of int32

    Raises
    ------
    ValueError
        If an entry does not fit int32 (or is not finite).
    """
    scale = np.asarray(check_product(input_scale, weight_scale), np.float64)
    codes = np.rint(np.asarray(as_float_array(bias), np.float64) / scale)
    bad = ~(np.abs(codes) <= _INT32_MAX)
    if bad.any():
        raise ValueError(
            f"bias {np.asarray(bias)[bad].ravel()[0]} is {codes[bad].ravel()[0]:.4g} units of input_scale * "
            "weight_scale and overflows int32; keep the bias in float32"
        )
    return codes.astype(np.int32)


def check_product(input_scale: ArrayLike, weight_scale: ArrayLike) -> NDArray[np.float32]:
    """Return the float32 product of an input scale and weight scales; ValueError if it is not a positive number."""
    with np.errstate(over="ignore", under="ignore"):
        product = np.multiply(np.asarray(input_scale, np.float32), np.asarray(weight_scale, np.float32))
    if not (np.isfinite(product).all() and np.all(product > 0)):
        raise ValueError("input_scale * weight_scale is not a positive, finite float32")
    return np.asarray(product)


def _row_parameters(weight: ArrayLike, config: QuantConfig) -> tuple[NDArray[np.float32], str, QParams] | None:
    """Return weights that can be packed without a tensor between, their dtype, and the scales that a tensor would have.

    None where they have to go the long way: other formats and granularities, other floats, what is not finite.
    """
    array = plain_array(weight)
    if not isinstance(config, QuantConfig) or config.info.bits != 8 or config.info.is_float:
        return None
    by_rows = config.group_size is None and config.axis in (None, 0, -2)
    if not by_rows or array.dtype != np.float32 or array.ndim != 2 or not array.size:
        return None
    values = as_float_array(array)
    low, high = np.empty(len(values), np.float32), np.empty(len(values), np.float32)
    if not _core.row_ranges(values, low, high):
        return None
    if config.axis is None:
        low, high = low.min(), high.max()
    return values, array.dtype.name, qparams_from_range(low, high, config)


def _rebuild(
    kind: type[QuantizedLinear], tensor: QuantizedTensor, bias: NDArray[Any] | None, activations: str | QParams,
    settings: dict[str, Any],
) -> QuantizedLinear:  # fmt: skip
    """Make the layer of a pickle or a copy; a derived class's own __init__ does not run, as with any pickle."""
    layer = kind.__new__(kind)
    QuantizedLinear.__init__(layer, tensor, bias, activations, **settings)
    return layer


def _stored_offset(config: QuantConfig) -> int:
    """Return what the packed form adds to a code: int4 becomes an unsigned nibble, uint8 a signed byte."""
    return {"int4": 8, "uint8": -128}.get(config.dtype, 0)


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))} or None")
    return value


def _check_activations(value: str | QParams, config: QuantConfig) -> str | QParams:
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            raise ValueError(f"activations={value!r} is not one of {', '.join(map(repr, ACTIVATIONS))} or a QParams")
        return value
    if not isinstance(value, QParams):
        raise TypeError(f"activations must be a string or a QParams, not {type(value).__name__}")
    if value.scale.ndim:
        raise ValueError(f"static activations need one scale; these have shape {value.scale.shape} (a sum over inputs "
                         "cannot take out a scale each input)")  # fmt: skip
    is_float = value.dtype.startswith("float8")
    if (config.info.is_float and value.dtype != config.dtype) or (is_float and not config.info.is_float):
        raise ValueError(f"weights of {config.dtype} cannot be multiplied with activations of {value.dtype}; "
                         f"{'use ' + config.dtype if config.info.is_float else 'use an integer dtype'}")  # fmt: skip
    return value


def _check_output(value: QParams | None) -> QParams | None:
    if value is None:
        return None
    if not isinstance(value, QParams):
        raise TypeError(f"output must be a QParams or None, not {type(value).__name__}")
    if value.dtype not in ("int8", "uint8") or value.scale.ndim:
        raise ValueError(f"output is {value.dtype} with a scale of shape {value.scale.shape}; "
                         "it must be int8 or uint8 with one scale")  # fmt: skip
    return value


def _input_dtype(params: Any) -> np.dtype[Any]:
    """Return the array dtype of static input codes."""
    return CODE_DTYPES[params.dtype].storage


def _unsigned_params(params: QParams) -> tuple[float, int, int, int]:
    """Return a static input's scale, zero point and range as the unsigned codes that kernels take."""
    if params.dtype.startswith("float8"):
        return float(params.scale), 0, 0, 255
    shift = 128 if _input_dtype(params) == np.int8 else 0
    return (
        float(params.scale), int(params.zero_point) + shift,
        int(params.quant_min or 0) + shift, int(params.quant_max or 0) + shift,
    )  # fmt: skip
