"""Whole models: quantize a checkpoint layer by layer, run its layers, save it, load it.

A model is a mapping of names to three kinds of things: *linear* layers (a quantized weight, its bias, what happens to
the activations), quantized *tensors* that are no linear layers (embeddings, convolutions), and tensors that stay as
they were.

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

import contextlib
import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative.config import QParams, QuantConfig
from qnative.files import (
    STORAGE,
    FormatError,
    NamedTensor,
    SafetensorsFile,
    TensorInfo,
    dtype_code,
    open_file,
    to_storage,
    write_json,
    write_safetensors,
)
from qnative.floats import decode
from qnative.granularity import Granules
from qnative.linear import ACTIVATION_FUNCTIONS, ACTIVATIONS, QuantizedLinear
from qnative.tensor import QuantizedTensor, quantize_tensor

if TYPE_CHECKING:
    import logging
    from concurrent.futures import Executor

    from qnative.files import JSONFile

__all__ = [
    "LayerStats",
    "QuantStats",
    "QuantizedModel",
    "quantization_stats",
    "quantize_model",
    "quantize_named_parameters",
]

#: One fnmatch pattern or several, of full names or of names without their ``.weight``.
Patterns: TypeAlias = "str | Iterable[str] | None"

#: Named arrays: a mapping, pairs, or a safetensors file.
Source: TypeAlias = "Mapping[str, Any] | Iterable[tuple[str, Any]] | str | os.PathLike[str]"

_FLOATS = ("F64", "F32", "F16", "BF16")
_ITEMSIZE = {STORAGE[code].name: STORAGE[code].numpy.itemsize for code in _FLOATS}
_FLOAT8_CODES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SCALE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SUFFIX = ".weight"
_BLOCK = 1 << 20


def _logger() -> logging.Logger:
    import logging

    logger = logging.getLogger("qnative")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


# Which parameters are quantized


def layer_name(name: str) -> str:
    """Return the layer's name: ``X`` of ``X.weight``."""
    return name.removesuffix(_SUFFIX) if len(name) > len(_SUFFIX) else name


def _patterns(given: Patterns, what: str) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what} must be fnmatch patterns of names, not {type(pattern).__name__}")
    return patterns


def _match(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(layer_name(name), pattern)


def _is_embedding_or_norm(name: str) -> bool:
    """Tell by its name that a parameter of rank 2 or more is no linear layer's weight."""
    name = name.lower()
    parts = name.split(".")
    return (
        "embed" in name
        or layer_name(name).endswith("bias")
        or any(part in ("wte", "wpe") for part in parts)
        or "norm" in parts[max(len(parts) - 2, 0)]
    )


class _Rules:
    """Decides by name, dtype and rank which parameters are quantized, and as what."""

    def __init__(self, include: Patterns, exclude: Patterns) -> None:
        self._include = dict.fromkeys(_patterns(include, "include"), False)
        self._exclude = dict.fromkeys(_patterns(exclude, "exclude"), False)

    def kind(self, name: str, code: str, shape: tuple[int, ...]) -> str | None:
        """Return ``"linear"``, ``"tensor"``, or None for what stays as it is."""
        included, excluded = self._seen(self._include, name), self._seen(self._exclude, name)
        if code not in _FLOATS or len(shape) < 2 or 0 in shape or excluded:
            return None
        special = _is_embedding_or_norm(name)
        if special and not included:
            return None
        return "linear" if len(shape) == 2 and not special else "tensor"

    @staticmethod
    def _seen(patterns: dict[str, bool], name: str) -> bool:
        hits = [p for p in patterns if _match(name, p)]
        patterns.update(dict.fromkeys(hits, True))
        return bool(hits)

    def warn_unused(self) -> None:
        """Log the patterns that matched no name."""
        for what, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern, used in patterns.items():
                if not used:
                    _logger().warning("%s pattern %r matches no parameter", what, pattern)


@contextlib.contextmanager
def named_tensors(source: Source) -> Iterator[tuple[Iterator[NamedTensor], int | None]]:
    """Give the named tensors of a source, each loaded when asked, and how many there are (None: not known)."""
    if isinstance(source, (str, os.PathLike)):
        with SafetensorsFile(source) as file:
            if file.document is not None:
                raise ValueError(f"{file.path} is quantized already; give the float checkpoint it was made from")
            yield (_from_file(file, info) for info in file.tensors.values()), len(file.tensors)
    elif isinstance(source, Mapping):
        yield _from_pairs(source.items()), len(source)
    elif isinstance(source, Iterable):
        yield _from_pairs(source), None
    else:
        raise TypeError(f"parameters must be a mapping, (name, array) pairs or a path, not {type(source).__name__}")


def _from_file(file: SafetensorsFile | JSONFile, info: TensorInfo) -> NamedTensor:
    return NamedTensor(info.name, info.dtype, info.shape, lambda: file.read(info.name))


def _from_pairs(pairs: Iterable[tuple[str, Any]]) -> Iterator[NamedTensor]:
    for pair in pairs:
        try:
            name, array = pair
        except (TypeError, ValueError):
            raise TypeError("parameters must be (name, array) pairs") from None
        if not isinstance(name, str) or not name:
            raise TypeError(f"a parameter's name must be a non-empty string, not {name!r}")
        try:
            tensor = NamedTensor.of(name, array)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        del pair, array  # while the consumer works, nothing here keeps an array alive
        yield tensor
        del tensor


def widen(array: NDArray[Any], code: str) -> NDArray[Any]:
    """Return stored floats as NumPy has them: bfloat16 and float8 widened to float32, everything else as it is."""
    if code == "BF16" or code.startswith("F8_"):
        return np.asarray(decode(array, STORAGE[code].name))
    return array


def _quantize(name: str, array: NDArray[Any], code: str, config: QuantConfig) -> tuple[QuantizedTensor, float]:
    """Quantize one stored weight; a function of its own so that any executor can run it."""
    x = widen(array, code)
    del array
    try:
        quantized = quantize_tensor(x, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sqnr = quantized.sqnr(x)
    if code == "BF16":
        q = quantized
        quantized = QuantizedTensor(q.data, q.scale_data, q.zero_point, q.shape, "bfloat16", q.config, check=False)
    return quantized, sqnr


def quantize_named_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    config: QuantConfig | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, QuantizedTensor | NDArray[Any]]:
    """Quantize the weights among named parameters, and leave the rest alone.

    Parameters
    ----------
    params : mapping of str to array_like, or iterable of pairs
        The parameters.
    config : QuantConfig, optional
        How; int8 per channel by default.
    include : str or iterable of str, optional
        fnmatch patterns of names to quantize although their name says embedding or norm (``*embed*``, ``wte``, ``wpe``,
        ``*norm.*``). Only floating-point parameters of rank 2 and more are ever quantized.
    exclude : str or iterable of str, optional
        Patterns of names to leave alone; stronger than `include`.

    Returns
    -------
    dict of str to QuantizedTensor or array
        Under the same names, in the same order; what is left alone is the very object that was given.

    Raises
    ------
    ValueError
        If a weight holds NaN or infinity; the message names it.
    """
    config = _config(config)
    rules = _Rules(include, exclude)
    found: dict[str, QuantizedTensor | NDArray[Any]] = {}
    for name, given in params.items() if isinstance(params, Mapping) else params:
        code = dtype_code(np.asarray(given).dtype)
        if code and rules.kind(name, code, np.shape(given)):
            found[name] = _quantize(name, *to_storage(given), config)[0]
        else:
            found[name] = given
    rules.warn_unused()
    return found


# What it came to


@dataclass(frozen=True)
class LayerStats:
    """What quantizing one weight came to.

    Attributes
    ----------
    name : str
        The layer.
    shape : tuple of int
        The weight's shape.
    dtype : str
        The original dtype.
    config : QuantConfig
        How it is quantized.
    bytes_before, bytes_after : int
        Of the weight in its original dtype; of its codes, scales and zero points.
    sqnr : float or None
        Signal to quantization noise in dB; inf where nothing was lost, None where it is not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    config: QuantConfig
    bytes_before: int
    bytes_after: int
    sqnr: float | None

    @property
    def ratio(self) -> float:
        """How many times smaller the weight is."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them (an infinite SQNR is ``"inf"``)."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "config": self.config.to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "sqnr": _plain_sqnr(self.sqnr),
        }


@dataclass(frozen=True)
class QuantStats:
    """What quantizing named parameters came to.

    Attributes
    ----------
    layers : tuple of LayerStats
        One for each quantized weight.
    untouched : int
        How many tensors were left as they were, biases included.
    parameters : int
        Elements of everything.
    bytes_before, bytes_after : int
        Of everything, the untouched tensors too.
    """

    layers: tuple[LayerStats, ...]
    untouched: int
    parameters: int
    bytes_before: int
    bytes_after: int

    @property
    def quantized(self) -> int:
        """How many weights are quantized."""
        return len(self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller everything together is."""
        return self.bytes_before / max(self.bytes_after, 1)

    @property
    def sqnr(self) -> dict[str, float | None]:
        """SQNR in dB by layer."""
        return {layer.name: layer.sqnr for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "quantized": self.quantized,
            "untouched": self.untouched,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        return (
            f"{self.quantized} quantized, {self.untouched} untouched; {self.parameters} parameters; "
            f"{self.bytes_before} -> {self.bytes_after} bytes, {self.ratio:.2f} times smaller"
        )


def _plain_sqnr(sqnr: float | None) -> float | str | None:
    return sqnr if sqnr is None or math.isfinite(sqnr) else str(sqnr)


def quantization_stats(
    quantized: QuantizedModel | Mapping[str, Any], params: Mapping[str, Any] | None = None
) -> QuantStats:
    """Count what quantization did: tensors, real bytes before and after, SQNR layer by layer.

    Parameters
    ----------
    quantized : QuantizedModel, or mapping as `quantize_named_parameters` returns
        The result.
    params : mapping of str to array_like, optional
        The parameters it came from, to compute the SQNR from. A `QuantizedModel` knows its own.

    Returns
    -------
    QuantStats
    """
    if isinstance(quantized, QuantizedModel):
        return quantized.totals
    layers, rest = [], []
    for name, value in quantized.items():
        if not isinstance(value, QuantizedTensor):
            rest.append(np.asarray(value))
            continue
        if params is not None and name not in params:
            raise ValueError(f"{name}: not among params; give the parameters that were quantized")
        sqnr = None if params is None else float(value.sqnr(np.asarray(params[name])))
        layers.append(_layer_stats(name, value, sqnr))
    return _total(layers, [(x.size, x.nbytes) for x in rest])


def _layer_stats(name: str, q: QuantizedTensor, sqnr: float | None) -> LayerStats:
    return LayerStats(name, q.shape, q.dtype, q.config, q.numel * _ITEMSIZE[q.dtype], q.nbytes, sqnr)


def _total(layers: Iterable[LayerStats], rest: Iterable[tuple[int, int]]) -> QuantStats:
    layers, rest = tuple(layers), tuple(rest)
    kept = sum(nbytes for _, nbytes in rest)
    return QuantStats(
        layers,
        len(rest),
        sum(math.prod(layer.shape) for layer in layers) + sum(size for size, _ in rest),
        sum(layer.bytes_before for layer in layers) + kept,
        sum(layer.bytes_after for layer in layers) + kept,
    )


# The model


class _Stored:
    """A tensor left as it was: its storage (bfloat16 as bits) and safetensors' code of its dtype."""

    __slots__ = ("array", "code")

    def __init__(self, array: NDArray[Any], code: str) -> None:
        self.array, self.code = array, code
        array.flags.writeable = False

    def value(self) -> NDArray[Any]:
        """Return the values; bfloat16 and float8 as float32, which holds them exactly."""
        return widen(self.array, self.code)


class _Weight:
    """A quantized weight with what belongs to it; a linear layer's is packed when it is first wanted."""

    def __init__(
        self,
        name: str,
        kind: str,
        source: QuantizedTensor | QuantizedLinear,
        sqnr: float | None = None,
        *,
        bias: _Stored | None = None,
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
        self.stats = _layer_stats(name, self.tensor(), sqnr)

    def tensor(self) -> QuantizedTensor:
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


class QuantizedModel(Mapping[str, Any]):
    """Named quantized layers, the tensors left as they were, and the model's own configuration.

    Looking up a linear layer gives a `QuantizedLinear`, packed for this machine on first access (in place of the
    saved form, so that a weight is held once); looking up any other quantized tensor gives a `QuantizedTensor`, and
    anything else an array (bfloat16 and float8 as float32). A layer ``X.weight`` with its ``X.bias`` is looked up as
    ``X``. Any number of threads may use one model.

    Parameters
    ----------
    items : mapping of str to QuantizedLinear, QuantizedTensor or array_like
        The content; arrays are copied.
    config_json : str or mapping, optional
        The model's own configuration, as JSON text or as what JSON can hold.

    Raises
    ------
    ValueError
        If two items would be saved under one name, or `config_json` is not JSON.

    Examples
    --------
    >>> model = quantize_model({"fc.weight": np.eye(3, dtype=np.float32), "fc.bias": np.ones(3, np.float32)})
    >>> model["fc"](np.array([1.0, 2.0, 3.0], np.float32)).round(1)
    array([2., 3., 4.], dtype=float32)
    """

    def __init__(
        self,
        items: Mapping[str, QuantizedLinear | QuantizedTensor | Any],
        config_json: str | Mapping[str, Any] | None = None,
    ) -> None:
        weights: dict[str, _Weight] = {}
        untouched: dict[str, _Stored] = {}
        for name, item in items.items():
            if isinstance(item, QuantizedLinear):
                bias = None if item.bias is None else _Stored(*to_storage(np.array(item.bias)))
                weights[name] = _Weight(
                    name, "linear", item, bias=bias, activations=item.activations, activation=item.activation,
                    output=item.output,
                )  # fmt: skip
            elif isinstance(item, QuantizedTensor):
                weights[name] = _Weight(name, "tensor", item)
            else:
                untouched[name] = _Stored(*to_storage(np.array(item)))
        self._assemble(weights, untouched, config_json)

    @classmethod
    def _of(
        cls, weights: dict[str, _Weight], untouched: dict[str, _Stored], config_json: str | Mapping[str, Any] | None
    ) -> QuantizedModel:
        model = cls.__new__(cls)
        model._assemble(weights, untouched, config_json)
        return model

    def _assemble(
        self, weights: dict[str, _Weight], untouched: dict[str, _Stored], config_json: str | Mapping[str, Any] | None
    ) -> None:
        import threading

        self._weights = weights
        self._untouched = untouched
        self._config_json = _config_text(config_json)
        self._packing = threading.Lock()
        saved = list(untouched)
        for name, weight in weights.items():
            saved += _saved_names(name, weight)
        double = _first_repeated(saved)
        if double is not None:
            raise ValueError(f"two tensors would be saved as {double!r}; rename one, or exclude what it belongs to")
        for name in (*weights, *untouched):
            if not name or name == "__metadata__":
                raise ValueError(f"{name!r} cannot be a tensor's name")

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self._weights, "untouched": self._untouched, "config_json": self._config_json}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._assemble(**state)

    # Looking things up

    def __getitem__(self, name: str) -> QuantizedLinear | QuantizedTensor | NDArray[Any]:
        weight = self._weights.get(name)
        if weight is None:
            return self._stored(name).value()
        if weight.kind == "tensor":
            return weight.tensor()
        if not isinstance(weight.source, QuantizedLinear):
            with self._packing:
                if not isinstance(weight.source, QuantizedLinear):
                    weight.source = weight.packed(weight.source)
        return weight.source

    def _stored(self, name: str) -> _Stored:
        try:
            return self._untouched[name]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(str(name), list(self), 1)
            hint = f"; is it {near[0]!r}?" if near else f"; names() lists the {len(self)} there are"
            raise KeyError(f"{name!r} is not in the model{hint}") from None

    def __iter__(self) -> Iterator[str]:
        yield from self._weights
        yield from self._untouched

    def __len__(self) -> int:
        return len(self._weights) + len(self._untouched)

    def __contains__(self, name: object) -> bool:
        return name in self._weights or name in self._untouched

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def names(self, kind: str | None = None) -> list[str]:
        """Return the names, of everything or of one kind: ``"linear"``, ``"tensor"`` or ``"untouched"``."""
        if kind not in (None, "linear", "tensor", "untouched"):
            raise ValueError(f"kind={kind!r} is not 'linear', 'tensor', 'untouched' or None")
        if kind is None:
            return list(self)
        return list(self._untouched) if kind == "untouched" else [n for n, w in self._weights.items() if w.kind == kind]

    def tensor(self, name: str) -> QuantizedTensor | NDArray[Any]:
        """Return a layer's weight as a `QuantizedTensor`, without packing it; an untouched tensor as an array.

        Parameters
        ----------
        name : str
            ``X``, or ``X.weight``.
        """
        weight = self._weights.get(name) or self._weights.get(layer_name(name))
        return self._stored(name).value() if weight is None else weight.tensor()

    def settings(self, name: str) -> dict[str, Any]:
        """Return how a name is kept, as JSON can hold it: kind, dtype, for a layer config and activations too."""
        weight = self._weights.get(name)
        if weight is None:
            return {"kind": "untouched", "dtype": STORAGE[self._stored(name).code].name}
        return _layer_document(weight)

    @property
    def config_json(self) -> str | None:
        """The model's own configuration, as the JSON text that was given; None when there is none."""
        return self._config_json

    @property
    def scheme(self) -> str:
        """The compressed-tensors format of the weights; ``"mixed-precision"`` for several, ``"dense"`` for none."""
        formats = {_format(w.stats.config) for w in self._weights.values()}
        return formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense"

    @property
    def totals(self) -> QuantStats:
        """Counts, bytes before and after, and the SQNR of every layer as it was quantized."""
        rest = [*self._untouched.values(), *(w.bias for w in self._weights.values() if w.bias is not None)]
        return _total((w.stats for w in self._weights.values()), ((s.array.size, s.array.nbytes) for s in rest))

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"QuantizedModel({len(self.names('linear'))} linear, {len(self.names('tensor'))} tensors, "
            f"{len(self._untouched)} untouched; {self.scheme}, {totals.bytes_after / 1e6:.1f} MB, "
            f"{totals.ratio:.2f} times smaller)"
        )

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to one file, atomically: after a crash at any moment there is the old file or the new one.

        Parameters
        ----------
        path : path-like
            ``.safetensors``, or ``.json`` for small models that people read.

        Raises
        ------
        ValueError
            For another suffix, or what the format cannot hold.
        OSError
            If the file cannot be written; an old one is then as it was.
        """
        suffix = os.path.splitext(os.fsdecode(path))[1].lower()
        if suffix not in (".safetensors", ".json"):
            raise ValueError(f"{os.fsdecode(path)}: a model is saved as .safetensors or .json, not {suffix!r}")
        document = {
            "scheme": self.scheme,
            "layers": {name: _layer_document(weight) for name, weight in self._weights.items()},
            "config_json": self._config_json,
        }
        tensors = [NamedTensor.of_storage(n, s.array, s.code) for n, s in self._untouched.items()]
        for name, weight in self._weights.items():
            tensors += _encode(name, weight)
        (write_json if suffix == ".json" else write_safetensors)(path, tensors, document)
        _logger().info("saved %s: %s", os.fsdecode(path), self)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False, verify: bool = False) -> QuantizedModel:
        """Load what `save` saved; nothing in the file is trusted.

        Parameters
        ----------
        path : path-like
            ``.json``, or safetensors.
        mmap : bool
            Map a safetensors file instead of reading it: pages come from the file when they are needed and are shared
            between processes. Should another program cut the file short meanwhile, the process dies by SIGBUS; `save`
            never does that.
        verify : bool
            Compare the whole file with the checksums saved in it first.

        Returns
        -------
        QuantizedModel

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        FormatError
            If the file is damaged or breaks a rule; the message names the tensor and the rule.
        """
        with open_file(path, mmap) as file:
            if verify:
                file.verify()
            return _decode(file)

    @staticmethod
    def verify(path: str | os.PathLike[str]) -> None:
        """Check a saved model: every byte against its checksums, and everything `load` checks.

        Raises
        ------
        FormatError
            If anything is wrong; the message says what and where.
        """
        QuantizedModel.load(path, mmap=True, verify=True)


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _config_text(config: str | Mapping[str, Any] | None) -> str | None:
    """Return a model's configuration as JSON text; ValueError when it is none."""
    import json

    if config is None:
        return None
    try:
        if isinstance(config, str):
            json.loads(config)
            config.encode("utf-8")
            return config
        return json.dumps(config)
    except RecursionError:
        raise ValueError("config_json is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_json is not JSON: {error}") from None


# A model as named tensors and a document, and back


def _format(config: QuantConfig) -> str:
    if config.info.is_float:
        return "float-quantized"
    return "pack-quantized" if config.bits == 4 else "int-quantized"


def _saved_names(name: str, weight: _Weight) -> list[str]:
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
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    padded = np.empty([8 * n if i == axis else n for i, n in enumerate(words.shape)], np.uint8)
    for i in range(8):
        padded[(slice(None),) * axis + (slice(i, None, 8),)] = (unsigned >> np.uint32(4 * i)) & np.uint32(15)
    if padded[(slice(None),) * axis + (slice(shape[axis], None),)].any():
        raise ValueError("bits beyond the last row must be 0")
    return np.ascontiguousarray(padded[tuple(slice(n) for n in shape)])


def _encode(name: str, weight: _Weight) -> Iterator[NamedTensor]:
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


def _layer_document(weight: _Weight) -> dict[str, Any]:
    stats = weight.stats
    document = {
        "kind": weight.kind,
        "config": stats.config.to_dict(),
        "dtype": stats.dtype,
        "sqnr": _plain_sqnr(stats.sqnr),
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


def _decode(file: SafetensorsFile | JSONFile) -> QuantizedModel:
    """Build a model from an open file, trusting nothing."""
    document = file.document
    if document is None:
        raise FormatError(
            f"{file.path}: has no qnative_format, so it is not a model that qnative saved; "
            "`qnative quantize` makes one from a checkpoint"
        )
    _exactly(document, ("scheme", "layers", "config_json"), file.path)
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
    untouched = {name: _Stored(file.read(name), info.dtype) for name, info in rest.items()}
    try:
        model = QuantizedModel._of(weights, untouched, config_json)
    except ValueError as error:
        raise FormatError(f"{file.path}: {error}") from None
    if document["scheme"] != model.scheme:
        raise FormatError(f"{file.path}: scheme {str(document['scheme'])[:40]!r}, and its layers are {model.scheme!r}")
    return model


def _exactly(found: Any, expected: Iterable[str], where: str) -> None:
    if not isinstance(found, dict):
        raise FormatError(f"{where}: must be an object, not {type(found).__name__}")
    for key in sorted(set(found) ^ set(expected)):
        raise FormatError(f"{where}: {'unknown' if key in found else 'missing'} key {key[:80]!r}")


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
        _exactly(layer, keys, self.where)
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
        return self.file.read(name)

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

    def weight(self) -> _Weight:
        config: QuantConfig = self.parsed("config", QuantConfig)
        dtype = self.choice("dtype", tuple(_ITEMSIZE))
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
        except (TypeError, ValueError) as error:
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
            words = self.take("weight_zero_point", "I32", _packed_shape(saved))
            nibbles = _unpack_zero_points(words, saved).astype(np.int16)
        else:
            nibbles = self.take("weight_zero_point", "I8", saved).astype(np.int16) + 8
        if nibbles.size and (nibbles.min() < 0 or nibbles.max() > 15):
            raise ValueError("weight_zero_point has entries beyond 4 bits")
        return (nibbles - 8 if config.info.is_signed else nibbles).astype(storage).reshape(inner)

    def plain(self, quantized: QuantizedTensor, sqnr: float | None) -> _Weight:
        return _Weight(self.name, "tensor", quantized, sqnr)

    def linear(self, quantized: QuantizedTensor, sqnr: float | None) -> _Weight:
        if len(quantized.shape) != 2:
            raise ValueError(f"a linear layer's weight is a matrix, not of shape {quantized.shape}")
        layer = self.layer
        bias = None
        if self.choice("bias", (None, "I32", *_FLOATS)) is not None:
            bias = _Stored(self.take("bias", layer["bias"], quantized.shape[:1]), layer["bias"])
        elif f"{self.name}.bias" in self.rest:
            raise ValueError("has a bias that its entry does not mention")
        given = layer["activations"]
        activations = self.choice("activations", ACTIVATIONS) if isinstance(given, str) else self.qparams("activations")
        return _linear(
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


# From a checkpoint to a model


def _config(config: QuantConfig | None) -> QuantConfig:
    if config is None:
        return QuantConfig.int8_per_channel()
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, not {type(config).__name__}")
    return config


def _linear(name: str, quantized: QuantizedTensor, sqnr: float | None, **settings: Any) -> _Weight:
    """Make a linear layer, refusing now what packing it would refuse when it is first wanted."""
    weight = _Weight(name, "linear", quantized, sqnr, **settings)
    rows, columns = quantized.shape
    sample = np.zeros((rows, min(columns, 1 + (quantized.config.group_size or 0))), np.float32)
    try:
        weight.packed(quantize_tensor(sample, quantized.config))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return weight


def quantize_model(
    source: Source,
    config: QuantConfig | None = None,
    activations: str | QParams = "dynamic",
    calibration: Mapping[str, Any] | Iterable[Any] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    activation: Mapping[str, str] | None = None,
    config_json: str | Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
) -> QuantizedModel:
    """Quantize a checkpoint, layer by layer: memory peaks at about one layer above the result.

    Floating-point weights of rank 2 become linear layers, each with the bias that is named like it (``X.weight``,
    ``X.bias``, in any order); those of higher rank become quantized tensors. Biases, norms and embeddings stay as they
    are, in their own dtype; embeddings (names like ``*embed*``, ``wte``, ``wpe``) that `include` names become
    quantized tensors, of which `take` decodes the rows that are looked up.

    Parameters
    ----------
    source : mapping, iterable of pairs, or path-like
        ``{name: array}``, ``(name, array)`` pairs, or a safetensors file, which is read one tensor at a time.
    config : QuantConfig, optional
        How weights are quantized; int8 per channel by default.
    activations : str or QParams
        ``"dynamic"``, ``"dynamic_symmetric"``, ``"float"``, or the parameters of a static input, for all linear layers.
    calibration : mapping of str to QuantizationSpec or QParams, or iterable of QuantizationSpec, optional
        Static inputs for the layers it names; the others take `activations`.
    include, exclude : str or iterable of str, optional
        fnmatch patterns of names (``X.weight`` or ``X``): quantize these too; leave these alone (the stronger).
    activation : mapping of str to str, optional
        Patterns of layers and the function fused into their output: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``,
        ``"silu"``. The first pattern that matches counts.
    config_json : str or mapping, optional
        The model's own configuration, kept with it.
    executor : concurrent.futures.Executor, optional
        Where weights are quantized: any executor, of threads, processes or machines. The result is the same.
    progress : callable or bool, optional
        Called with (done, total, name) after each tensor; total is None for an iterable of pairs. True: a tqdm bar.

    Returns
    -------
    QuantizedModel

    Raises
    ------
    ValueError
        If a weight holds NaN or infinity, a bias does not fit its weight, or `calibration` or `activation` names a
        layer that does not exist.
    FormatError
        If the file is damaged.
    ImportError
        For ``progress=True`` without tqdm.
    """
    config = _config(config)
    rules = _Rules(include, exclude)
    inputs = _calibrated(calibration)
    fused = _fused(activation)
    from_file = isinstance(source, (str, os.PathLike))
    kinds: dict[str, str] = {}
    quantized: dict[str, tuple[QuantizedTensor, float]] = {}
    untouched: dict[str, _Stored] = {}
    with named_tensors(source) as (tensors, total), reporting(progress, total) as report:
        done = 0

        def finish(name: str, result: tuple[QuantizedTensor, float] | None) -> None:
            nonlocal done
            if result is not None:
                quantized[layer_name(name)] = result
            done += 1
            report(done, name)

        queue = _Queue(executor, finish)
        for tensor in tensors:
            name, kind = tensor.name, rules.kind(tensor.name, tensor.dtype, tensor.shape)
            if name in untouched or layer_name(name) in kinds:
                raise ValueError(f"{name!r}: two parameters of one layer name; rename one, or exclude it")
            if kind is not None:
                kinds[layer_name(name)] = kind
                queue.put(tensor, config)
            else:
                untouched[name] = _Stored(tensor.load() if from_file else tensor.load().copy(), tensor.dtype)
                queue.skip(name)
            del tensor
        queue.drain()
    rules.warn_unused()
    if not kinds:
        _logger().warning("nothing was quantized: no floating-point parameter of rank 2 or more is left by the rules")

    weights: dict[str, _Weight] = {}
    for name, kind in kinds.items():
        result, sqnr = quantized.pop(name)
        if kind == "tensor":
            weights[name] = _Weight(name, kind, result, sqnr)
            continue
        bias = untouched.pop(f"{name}.bias", None)
        if bias is not None and (bias.code not in _FLOATS or bias.array.shape != result.shape[:1]):
            raise ValueError(
                f"{name}: its bias is {bias.code} of shape {bias.array.shape}, and a weight of shape {result.shape} "
                f"(out_features, in_features) needs floats of shape {result.shape[:1]}; transpose the weight, "
                f"or exclude {name!r}"
            )
        weights[name] = _linear(
            name, result, sqnr, bias=bias, activations=inputs.pop(name, activations), activation=fused(name)
        )
    fused(None)
    if inputs:
        raise ValueError(f"calibration names {next(iter(inputs))!r}, which is no linear layer of this model")
    return QuantizedModel._of(weights, untouched, config_json)


def _calibrated(calibration: Mapping[str, Any] | Iterable[Any] | None) -> dict[str, QParams]:
    """Return the input parameters by layer."""
    pairs = calibration.items() if isinstance(calibration, Mapping) else _named_specs(calibration or ())
    found: dict[str, QParams] = {}
    for name, spec in pairs:
        qparams = spec if isinstance(spec, QParams) else getattr(spec, "qparams", None)
        if not isinstance(qparams, QParams):
            raise TypeError(f"calibration of {name!r} must be a QuantizationSpec or QParams, not {type(spec).__name__}")
        if layer_name(name) in found:
            raise ValueError(f"calibration names {layer_name(name)!r} twice")
        found[layer_name(name)] = qparams
    return found


def _named_specs(specs: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for spec in specs:
        name = getattr(spec, "name", None)
        if not isinstance(name, str):
            raise TypeError(f"calibration must be QuantizationSpecs or a mapping by name, not {type(spec).__name__}")
        yield name, spec


def _fused(activation: Mapping[str, str] | None) -> Callable[[str | None], str | None]:
    """Return a look-up of a layer's fused activation; called with None, it refuses patterns that matched nothing."""
    table = dict(activation or {})
    unused = dict.fromkeys(table)
    for pattern, function in table.items():
        if function not in ACTIVATION_FUNCTIONS:
            raise ValueError(f"activation {function!r} for {pattern!r} is not one of {', '.join(ACTIVATION_FUNCTIONS)}")

    def find(name: str | None) -> str | None:
        if name is None:
            if unused:
                raise ValueError(f"activation pattern {next(iter(unused))!r} matches no linear layer of this model")
            return None
        hits = [pattern for pattern in table if _match(name, pattern) or fnmatch.fnmatchcase(name + _SUFFIX, pattern)]
        for pattern in hits:
            unused.pop(pattern, None)
        return table[hits[0]] if hits else None

    return find


class _Queue:
    """Quantizes weights in order: at once, or on an executor with a few in flight, so that memory stays bounded."""

    def __init__(
        self, executor: Executor | None, finish: Callable[[str, tuple[QuantizedTensor, float] | None], None]
    ) -> None:
        import collections

        self._executor = executor
        self._finish = finish
        self._pending: collections.deque[tuple[str, Any]] = collections.deque()
        workers = getattr(executor, "_max_workers", None)
        self._window = 1 + (workers if isinstance(workers, int) else os.cpu_count() or 1)

    def put(self, tensor: NamedTensor, config: QuantConfig) -> None:
        if self._executor is None:
            self._finish(tensor.name, _quantize(tensor.name, tensor.load(), tensor.dtype, config))
            return
        while len(self._pending) >= self._window:
            self._next()
        try:
            future = self._executor.submit(_quantize, tensor.name, tensor.load(), tensor.dtype, config)
        except BaseException:
            self._cancel()
            raise
        self._pending.append((tensor.name, future))

    def skip(self, name: str) -> None:
        self._finish(name, None)

    def drain(self) -> None:
        while self._pending:
            self._next()

    def _next(self) -> None:
        name, future = self._pending.popleft()
        try:
            result = future.result()
        except BaseException:
            self._cancel()
            raise
        self._finish(name, result)

    def _cancel(self) -> None:
        for _, future in self._pending:
            future.cancel()


@contextlib.contextmanager
def reporting(progress: Any, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Give a function that reports (done, name)."""
    if progress is None or progress is False:
        yield lambda done, name: None
    elif progress is True:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(
                "progress=True needs tqdm: pip install 'qnative[progress]', or pass a function of (done, total, name)"
            ) from None
        with tqdm(total=total, unit="tensor") as bar:

            def show(done: int, name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(done - bar.n)

            yield show
    elif callable(progress):
        yield lambda done, name: progress(done, total, name)
    else:
        raise TypeError(f"progress must be True or a function of (done, total, name), not {type(progress).__name__}")
