"""A quantized model as named tensors and a document, and back: what a saved model consists of.

On disk a quantized weight ``X.weight`` has the tensor names and bytes of the compressed-tensors formats:

========================  ============================================  ===========================================
format                    weight                                        beside it
========================  ============================================  ===========================================
pack-quantized (4 bits)   ``X.weight_packed`` int32, ``X.weight_shape``  ``X.weight_scale``, ``X.weight_zero_point``
int-quantized (8 bits)    ``X.weight`` int8 (uint8)                     the same
float-quantized (float8)  ``X.weight`` float8                           ``X.weight_scale``
========================  ============================================  ===========================================

Scales have shape (1,) per tensor, (N, 1) per output channel and (N, groups) per group; zero points are there when the
weight is asymmetric, of the scales' shape, and for 4 bits packed eight to an int32 along the rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnative.config import QParams, QuantConfig
from qnative.files import SafetensorsFile, exact_keys
from qnative.granularity import Granules
from qnative.linear import ACTIVATION_FUNCTIONS, ACTIVATIONS, QuantizedLinear
from qnative.selection import FLOAT_SIZES, FLOATS, widen
from qnative.stats import layer_stats, plain_sqnr
from qnative.storage import FormatError, NamedTensor, TensorInfo, plain_array, to_storage
from qnative.tensor import QuantizedTensor

if TYPE_CHECKING:
    from qnative.files import JSONFile

__all__ = [
    "Stored",
    "Weight",
    "check_packing",
    "decode_document",
    "encode_layer",
    "layer_document",
    "linear_layer",
    "packed_bytes",
    "saved_names",
    "scheme_of",
]

_FLOAT8_CODES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SCALE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK = 1 << 20
_SLACK = 16 << 20


class Stored:
    """A tensor left as it was: its storage (bfloat16 as bits) and safetensors' code of its dtype."""

    __slots__ = ("array", "code")

    def __init__(self, array: NDArray[Any], code: str) -> None:
        self.array, self.code = array, code
        array.flags.writeable = False

    @classmethod
    def copy(cls, x: Any) -> Stored:
        """Store a copy of an array."""
        return cls(*to_storage(np.array(plain_array(x))))

    def value(self) -> NDArray[Any]:
        """Return the values; bfloat16 and float8 as float32, which holds them exactly."""
        return widen(self.array, self.code)


class Weight:
    """A quantized weight with what belongs to it; a linear layer's is packed when it is first wanted."""

    def __init__(
        self,
        name: str,
        kind: str,
        source: QuantizedTensor | QuantizedLinear,
        sqnr: float | None = None,
        *,
        bias: Stored | None = None,
        activations: str | QParams = "dynamic",
        activation: str | None = None,
        output: QParams | None = None,
    ) -> None:
        #: The weight, once: as it is saved, or packed. Replaced in one assignment, so that readers need no lock.
        self.source = source
        self.kind = kind
        self.bias = bias
        self.activations = activations
        self.activation = activation
        self.output = output
        self.stats = layer_stats(name, self.tensor(), sqnr)

    def tensor(self) -> QuantizedTensor:
        """Return the weight in the form that is saved."""
        source = self.source
        return source.weight_quantized() if isinstance(source, QuantizedLinear) else source

    def packed(self, quantized: QuantizedTensor) -> QuantizedLinear:
        """Pack a weight with this layer's bias and settings."""
        bias = None if self.bias is None else self.bias.value()
        return QuantizedLinear.from_tensor(
            quantized, bias, self.activations, activation=self.activation, output=self.output
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": self.tensor()}


def linear_layer(name: str, quantized: QuantizedTensor, sqnr: float | None, **settings: Any) -> Weight:
    """Make a linear layer, refusing now what packing it would refuse when it is first wanted."""
    weight = Weight(name, "linear", quantized, sqnr, **settings)
    q, config, bias = quantized, quantized.config, weight.bias
    by_row = config.axis is not None and (config.group_size is not None or config.axis % 2 == 0)
    scale, zero_point = q.scale_data, q.zero_point
    scale, zero_point = scale[:0] if by_row else scale, zero_point[:0] if by_row and zero_point.ndim else zero_point
    # The layer without its rows: of the same columns, groups and settings, and of no size.
    sample = QuantizedTensor(q.data[:0], scale, zero_point, (0, q.shape[1]), q.dtype, config, check=False)
    try:
        if bias is not None:
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(bias.value().astype(np.float32, copy=False)))
            if bad:
                raise ValueError(f"bias has {bad} values that are not finite float32")
            settings["bias"] = Stored(bias.array[:0], bias.code)
        Weight(name, "linear", sample, **settings).packed(sample)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return weight


def packed_bytes(
    shape: tuple[int, ...], config: QuantConfig, bias: bool, activations: str | QParams = "dynamic"
) -> int:
    """Return the bytes that a linear layer takes when it is packed: `QuantizedLinear.nbytes`.

    Outputs are packed by 16, inputs padded to a multiple of 8 within each group. Every scale has its zero point beside
    it, where there are any, and for products of integers the sum of its codes. Four-bit codes have scales of their own
    width, zero points of half a byte, and with groups of at most 128 no sums. (Asymmetric layers whose zero points
    happen all to be 0 in the packed form, or with four bits to be equal, take less.)
    """
    rows, columns = shape
    group = max(1, min(columns, config.group_size or columns))
    groups = -(-columns // group) if columns else 1
    four_bits = config.bits == 4
    sums = activations != "float" and not config.info.is_float and not (four_bits and groups > 1 and group <= 128)
    one = config.axis is None or rows * groups == 1  # all zero points are equal
    zero_points = columns > 0 and not config.is_symmetric and not (four_bits and one)
    terms = 32 if four_bits and config.scale_dtype != "float32" else 64
    terms += 64 * sums + (8 if four_bits else 64) * zero_points
    head = -(-(64 * bias + terms * groups) // 64) * 64
    codes = groups * (-(-group // 8) * 8) * (8 if config.bits == 4 else 16)
    return -(-rows // 16) * (head + -(-codes // 64) * 64)


def check_packing(
    weights: Mapping[str, Weight], untouched: Mapping[str, Stored], config_json: str | None, size: int, factor: int
) -> None:
    """Refuse a model that would take more than `factor` times its file's size + 16 MiB while its layers are packed.

    Raises
    ------
    ValueError
        Naming the layer that grows the most.
    """
    most, largest, meanwhile = 0, "", 0
    # Text takes up to four times what it takes in the file.
    total = sys.getsizeof(config_json) + sum(s.array.nbytes for s in untouched.values())
    for name, weight in weights.items():
        stats, bias = weight.stats, weight.bias
        total += 0 if bias is None else bias.array.nbytes
        if weight.kind == "tensor":
            total += stats.bytes_after
            continue
        packed = packed_bytes(stats.shape, stats.config, bias is not None, weight.activations)
        total += packed
        # While a layer is packed, there are what the file holds of it, a scale and a zero point a group, and uint8's
        # codes as signed ones.
        rows, columns = stats.shape
        groups = max(1, -(-columns // (stats.config.group_size or max(columns, 1))))
        signed = columns if stats.config.dtype == "uint8" else 0
        meanwhile = max(meanwhile, stats.bytes_after + rows * (5 * groups + signed))
        if packed - stats.bytes_after > most:
            most, largest = packed - stats.bytes_after, name
    limit = factor * size + _SLACK
    total += meanwhile
    if total > limit:
        stats = weights[largest].stats
        raise ValueError(
            f"{largest}: packing grows its {stats.bytes_after} bytes by {most} (shape {stats.shape}, {stats.config}); "
            f"the model would take {total} bytes, and a file of {size} may take {limit}; "
            "use larger groups, or keep layers of few outputs as they are (exclude)"
        )


def scheme_of(weights: Iterable[Weight]) -> str:
    """Return the compressed-tensors format of the weights; "mixed-precision" for several, "dense" for none."""
    formats = {format_of(w.stats.config) for w in weights}
    return formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense"


def format_of(config: QuantConfig) -> str:
    if config.info.is_float:
        return "float-quantized"
    return "pack-quantized" if config.bits == 4 else "int-quantized"


def saved_names(name: str, weight: Weight) -> list[str]:
    """Return the names of the tensors that a weight is saved as."""
    config = weight.stats.config
    parts = ["weight_packed", "weight_shape"] if config.bits == 4 else ["weight"]
    parts += ["weight_scale"] + ([] if config.is_symmetric else ["weight_zero_point"])
    parts += [] if weight.bias is None else ["bias"]
    return [f"{name}.{part}" for part in parts]


def _saved_scale_shape(shape: tuple[int, ...], config: QuantConfig) -> tuple[int, ...]:
    """Return the shape of the scales on disk: (1,) per tensor, (N, 1) per output channel of a matrix."""
    inner = Granules.of_config(shape, config).shape
    if config.axis is None:
        return (1,)
    if len(shape) == 2 and config.group_size is None and config.axis in (0, -2):
        return (*inner, 1)
    return inner


def _zero_points_are_packed(config: QuantConfig) -> bool:
    return config.bits == 4 and config.axis is not None


def _packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of packed zero points: eight of the rows (the last axis but one) in one int32."""
    axis = max(len(shape) - 2, 0)
    return (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


def _pack_zero_points(nibbles: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Pack nibbles along the last axis but one, the first in the lowest bits; the last word is filled with 0."""
    axis = max(nibbles.ndim - 2, 0)
    padded = np.zeros([8 * n if i == axis else n for i, n in enumerate(_packed_shape(nibbles.shape))], np.uint32)
    padded[tuple(slice(n) for n in nibbles.shape)] = nibbles
    words = np.zeros(_packed_shape(nibbles.shape), np.uint32)
    for i in range(8):
        words |= padded[(slice(None),) * axis + (slice(i, None, 8),)] << np.uint32(4 * i)
    return words.view(np.int32)


def _unpack_zero_points(words: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Undo `_pack_zero_points`; ValueError when the filling is not 0."""
    axis = max(len(shape) - 2, 0)
    *outer, count, inner = words.shape if words.ndim > 1 else (*words.shape, 1)
    pairs = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*outer, count, inner, 4)
    pairs = np.moveaxis(pairs, -1, -2)  # bytes of a word are pairs of rows
    nibbles = np.empty((*outer, count, 4, 2, inner), np.uint8)
    np.bitwise_and(pairs, np.uint8(15), out=nibbles[..., 0, :])
    np.right_shift(pairs, np.uint8(4), out=nibbles[..., 1, :])
    padded = nibbles.reshape([8 * n if i == axis else n for i, n in enumerate(words.shape)])
    if padded[(slice(None),) * axis + (slice(shape[axis], None),)].any():
        raise ValueError("bits beyond the last row must be 0")
    return np.ascontiguousarray(padded[tuple(slice(n) for n in shape)])


def encode_layer(name: str, weight: Weight) -> Iterator[NamedTensor]:
    """Give the tensors that a quantized weight is saved as."""
    shape, config = weight.stats.shape, weight.stats.config
    quantized = weight.tensor()
    scale_shape = _saved_scale_shape(shape, config)
    scale = quantized.scale_data.reshape(scale_shape)
    zero_point = quantized.zero_point
    del quantized  # a packed layer's codes are rebuilt when their turn to be written comes
    if config.bits == 4:
        packed = (*shape[:-1], -(-shape[-1] // 8)) if shape else (1,)
        yield NamedTensor(f"{name}.weight_packed", "I32", packed, lambda: weight.tensor().data)
        yield NamedTensor.of(f"{name}.weight_shape", np.array(shape, np.int64))
    else:
        code = _FLOAT8_CODES.get(config.dtype, "I8" if config.info.is_signed else "U8")
        yield NamedTensor(f"{name}.weight", code, shape, lambda: weight.tensor().data)
    yield NamedTensor.of_storage(f"{name}.weight_scale", scale, _SCALE_CODES[config.scale_dtype])
    if not config.is_symmetric:
        zero_point = zero_point.reshape(scale_shape)
        if config.bits == 4:
            signed = zero_point.astype(np.int8) - np.int8(0 if config.info.is_signed else 8)
            zero_point = signed
            if _zero_points_are_packed(config):
                zero_point = _pack_zero_points((signed + 8).astype(np.uint8))
        yield NamedTensor.of(f"{name}.weight_zero_point", zero_point)
    if weight.bias is not None:
        yield NamedTensor.of_storage(f"{name}.bias", weight.bias.array, weight.bias.code)


def layer_document(weight: Weight) -> dict[str, Any]:
    """Return what the document says of a weight, as JSON can hold it."""
    stats = weight.stats
    document = {
        "kind": weight.kind,
        "config": stats.config.to_dict(),
        "dtype": stats.dtype,
        "sqnr": plain_sqnr(stats.sqnr),
    }
    if weight.kind == "linear":
        activations = weight.activations
        document |= {
            "activations": activations.to_dict() if isinstance(activations, QParams) else activations,
            "activation": weight.activation,
            "output": None if weight.output is None else weight.output.to_dict(),
            "bias": None if weight.bias is None else weight.bias.code,
        }
    return document


def decode_document(
    file: SafetensorsFile | JSONFile,
) -> tuple[dict[str, Weight], dict[str, Stored], str | None]:
    """Read the weights, the untouched tensors and the configuration of an open file, trusting nothing."""
    document = file.document
    if document is None:
        raise FormatError(
            f"{file.path}: has no qnative_format, so it is not a model that qnative saved; "
            "`qnative quantize` makes one from a checkpoint"
        )
    exact_keys(document, ("scheme", "layers", "config_json"), file.path)
    layers, config_json = document["layers"], document["config_json"]
    if not isinstance(layers, dict):
        raise FormatError(f"{file.path}: layers must be an object")
    if config_json is not None and not isinstance(config_json, str):
        raise FormatError(f"{file.path}: config_json must be JSON text or null")
    rest = dict(file.tensors)
    weights = {name: _Decoder(file, name, layer, rest).weight() for name, layer in layers.items()}
    for name in weights:
        for part in ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point"):
            if f"{name}.{part}" in rest:
                raise FormatError(f"{file.path}: {name}.{part} does not belong to a layer of this kind")
    untouched = {name: Stored(file.read(name), info.dtype) for name, info in rest.items()}
    scheme = scheme_of(weights.values())
    if document["scheme"] != scheme:
        raise FormatError(f"{file.path}: scheme {str(document['scheme'])[:40]!r}, and its layers are {scheme!r}")
    return weights, untouched, config_json


class _Decoder:
    """Reads one quantized weight, taking its tensors out of `rest`."""

    def __init__(self, file: SafetensorsFile | JSONFile, name: str, layer: Any, rest: dict[str, TensorInfo]) -> None:
        self.file, self.name, self.rest = file, name, rest
        self.where = f"{file.path}: {name}"
        kind = layer.get("kind") if isinstance(layer, dict) else None
        if kind not in ("linear", "tensor"):
            raise FormatError(f"{self.where}: kind {str(kind)[:40]!r} is neither 'linear' nor 'tensor'")
        keys = ["kind", "config", "dtype", "sqnr"]
        keys += ["activations", "activation", "output", "bias"] if kind == "linear" else []
        exact_keys(layer, keys, self.where)
        self.kind, self.layer = kind, layer

    def refuse(self, rule: str) -> FormatError:
        return FormatError(f"{self.where}: {rule}")

    def take(self, part: str, code: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Read ``<name>.<part>``, which must be there with this dtype and shape."""
        name = f"{self.name}.{part}"
        info = self.rest.pop(name, None)
        if info is None:
            raise FormatError(f"{self.file.path}: missing tensor {name}")
        if info.dtype != code or (shape is not None and info.shape != shape):
            expected = code if shape is None else f"{code} of shape {shape}"
            raise FormatError(f"{self.file.path}: {name} is {info.dtype} of shape {info.shape}; it must be {expected}")
        array = self.file.read(name)
        array.flags.writeable = False  # nobody else has it: no need to copy it before it is checked
        return array

    def choice(self, key: str, choices: tuple[Any, ...]) -> Any:
        value = self.layer[key]
        if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
            raise self.refuse(f"{key} {str(value)[:40]!r} is not one of {', '.join(map(str, choices))}")
        return value

    def parsed(self, key: str, kind: type[QuantConfig] | type[QParams]) -> Any:
        """Build what `to_dict` wrote, and nothing else."""
        fields = self.layer[key]
        try:
            value = kind.from_dict(fields)
            if value.to_dict() != fields:
                raise ValueError(f"{str(fields)[:120]} is not how it is written")
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise self.refuse(f"{key}: {error}") from None
        return value

    def qparams(self, key: str) -> QParams:
        value: QParams = self.parsed(key, QParams)
        if value.scale.shape != () or value.axis is not None or value.group_size is not None:
            raise self.refuse(f"{key} must be per tensor")
        return value

    def weight(self) -> Weight:
        config: QuantConfig = self.parsed("config", QuantConfig)
        dtype = self.choice("dtype", tuple(FLOAT_SIZES))
        sqnr = self.layer["sqnr"]
        sqnr = float(sqnr) if sqnr in ("inf", "-inf") else sqnr
        if sqnr is not None and (type(sqnr) not in (int, float) or math.isnan(sqnr)):
            raise self.refuse(f"sqnr {str(sqnr)[:40]!r} is not a number")
        if config.bits == 4:
            shape = self.stored_shape()
            data = self.take("weight_packed", "I32", (*shape[:-1], -(-shape[-1] // 8)) if shape else (1,))
        else:
            data = self.take("weight", _FLOAT8_CODES.get(config.dtype, "I8" if config.info.is_signed else "U8"))
            shape = data.shape
        try:
            inner, saved = Granules.of_config(shape, config).shape, _saved_scale_shape(shape, config)
            scale = self.take("weight_scale", _SCALE_CODES[config.scale_dtype], saved).reshape(inner)
            zero_point = self.zero_point(config, inner, saved)
            _check_float8(data, config)
            quantized = QuantizedTensor(_native(data), _native(scale), _native(zero_point), shape, dtype, config)
            make = self.linear if self.kind == "linear" else self.plain
            return make(quantized, sqnr)
        except FormatError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise self.refuse(str(error)) from None

    def stored_shape(self) -> tuple[int, ...]:
        info = self.rest.get(f"{self.name}.weight_shape")
        if info is not None and (len(info.shape) != 1 or info.shape[0] > 64):
            raise self.refuse(f"weight_shape has shape {info.shape}; it must be a short list of sizes")
        shape = tuple(int(n) for n in self.take("weight_shape", "I64"))
        if any(n < 0 for n in shape):
            raise self.refuse(f"weight_shape {shape} has a negative size")
        return shape

    def zero_point(self, config: QuantConfig, inner: tuple[int, ...], saved: tuple[int, ...]) -> NDArray[Any]:
        storage = np.dtype(np.int8) if config.info.is_float else config.info.storage
        if config.is_symmetric:
            return np.array(config.symmetric_zero_point, storage)
        if config.bits == 8:
            return self.take("weight_zero_point", "I8" if config.info.is_signed else "U8", saved).reshape(inner)
        if _zero_points_are_packed(config):
            nibbles = _unpack_zero_points(self.take("weight_zero_point", "I32", _packed_shape(saved)), saved)
        else:
            nibbles = self.take("weight_zero_point", "I8", saved).view(np.uint8) + np.uint8(8)
            if nibbles.max(initial=0) > 15:
                raise ValueError("weight_zero_point has entries beyond 4 bits")
        zero_point = (nibbles - np.uint8(8 if config.info.is_signed else 0)).view(storage).reshape(inner)
        zero_point.flags.writeable = False
        return zero_point

    def plain(self, quantized: QuantizedTensor, sqnr: float | None) -> Weight:
        return Weight(self.name, "tensor", quantized, sqnr)

    def linear(self, quantized: QuantizedTensor, sqnr: float | None) -> Weight:
        if len(quantized.shape) != 2:
            raise ValueError(f"a linear layer's weight is a matrix, not of shape {quantized.shape}")
        layer = self.layer
        bias = None
        if self.choice("bias", (None, "I32", *FLOATS)) is not None:
            bias = Stored(self.take("bias", layer["bias"], quantized.shape[:1]), layer["bias"])
        elif f"{self.name}.bias" in self.rest:
            raise ValueError("has a bias that its entry does not mention")
        given = layer["activations"]
        activations = self.choice("activations", ACTIVATIONS) if isinstance(given, str) else self.qparams("activations")
        return linear_layer(
            self.name, quantized, sqnr,
            bias=bias,
            activations=activations,
            activation=self.choice("activation", (None, *ACTIVATION_FUNCTIONS)),
            output=None if layer["output"] is None else self.qparams("output"),
        )  # fmt: skip


def _check_float8(data: NDArray[Any], config: QuantConfig) -> None:
    """Refuse float8 codes of NaN and Inf, which no weight has; `QuantizedTensor` checks the integers."""
    if not config.info.is_float:
        return
    largest = 0x7E if config.dtype == "float8_e4m3fn" else 0x7B
    flat = data.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        if (flat[at : at + _BLOCK] & np.uint8(0x7F)).max() > largest:
            raise ValueError(f"weight has NaN or infinity among its {config.dtype} codes")


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """Return a stored array in this machine's byte order: itself, except on big-endian machines."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
