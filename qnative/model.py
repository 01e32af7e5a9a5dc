"""Quantized models: named layers to look up and run, save and load.

A model is a mapping of names to three kinds of things: *linear* layers (a quantized weight, its bias, what happens to
the activations), quantized *tensors* that are no linear layers (embeddings, convolutions), and tensors that stay as
they were. `qnative.checkpoint` says what they are on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative.checkpoint import (
    Stored,
    Weight,
    check_packing,
    decode_document,
    encode_layer,
    layer_document,
    saved_names,
    scheme_of,
)
from qnative.files import Path, SafetensorsFile, open_file, write_json, write_safetensors
from qnative.linear import QuantizedLinear
from qnative.selection import layer_name, logger
from qnative.stats import QuantStats, finite_original, layer_stats, total_stats
from qnative.storage import STORAGE, FormatError, NamedTensor
from qnative.tensor import QuantizedTensor
from qnative.threads import lock_of

__all__ = ["QuantizedModel", "quantization_stats"]

#: How many times its file's size a model may take, all layers packed: a safetensors file, a JSON file.
_FACTOR, _JSON_FACTOR = 2, 16


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
    >>> from qnative import quantize_model
    >>> model = quantize_model({"fc.weight": np.eye(3, dtype=np.float32), "fc.bias": np.ones(3, np.float32)})
    >>> model["fc"](np.array([1.0, 2.0, 3.0], np.float32)).round(1)
    array([2., 3., 4.], dtype=float32)
    """

    def __init__(
        self,
        items: Mapping[str, QuantizedLinear | QuantizedTensor | Any],
        config_json: str | Mapping[str, Any] | None = None,
    ) -> None:
        weights: dict[str, Weight] = {}
        untouched: dict[str, Stored] = {}
        for name, item in items.items():
            if isinstance(item, QuantizedLinear):
                bias = None if item.bias is None else Stored.copy(item.bias)
                weights[name] = Weight(
                    name, "linear", item, bias=bias, activations=item.activations, activation=item.activation,
                    output=item.output,
                )  # fmt: skip
            elif isinstance(item, QuantizedTensor):
                weights[name] = Weight(name, "tensor", item)
            else:
                untouched[name] = Stored.copy(item)
        self._assemble(weights, untouched, config_json)

    @classmethod
    def of(
        cls, weights: dict[str, Weight], untouched: dict[str, Stored], config_json: str | Mapping[str, Any] | None
    ) -> QuantizedModel:
        """Build a model of parts that are prepared already."""
        model = cls.__new__(cls)
        model._assemble(weights, untouched, config_json)
        return model

    def _assemble(
        self, weights: dict[str, Weight], untouched: dict[str, Stored], config_json: str | Mapping[str, Any] | None
    ) -> None:
        self._weights = weights
        self._untouched = untouched
        self._config_json = _config_text(config_json)
        self._lock = lock_of(self)  # while a layer is packed
        saved = list(untouched)
        for name, weight in weights.items():
            saved += saved_names(name, weight)
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

    def __getitem__(self, name: str) -> Any:  # which of the three, whoever knows the model knows
        weight = self._weights.get(name)
        if weight is None:
            return self._stored(name).value()
        if weight.kind == "tensor":
            return weight.tensor()
        if not isinstance(weight.source, QuantizedLinear):
            with self._lock:
                if not isinstance(weight.source, QuantizedLinear):
                    weight.source = weight.packed(weight.source)
        return weight.source

    def _stored(self, name: str) -> Stored:
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

        Returns
        -------
        QuantizedTensor or numpy.ndarray

        Raises
        ------
        KeyError
            If there is no such name; the message suggests one that is near.
        """
        weight = self._weights.get(name) or self._weights.get(layer_name(name))
        return self._stored(name).value() if weight is None else weight.tensor()

    def settings(self, name: str) -> dict[str, Any]:
        """Return how a name is kept, as JSON can hold it: kind, dtype, for a layer config and activations too."""
        weight = self._weights.get(name)
        if weight is None:
            return {"kind": "untouched", "dtype": STORAGE[self._stored(name).code].name}
        return layer_document(weight)

    @property
    def config_json(self) -> str | None:
        """The model's own configuration, as the JSON text that was given; None when there is none."""
        return self._config_json

    @property
    def scheme(self) -> str:
        """The compressed-tensors format of the weights; ``"mixed-precision"`` for several, ``"dense"`` for none."""
        return scheme_of(self._weights.values())

    @property
    def totals(self) -> QuantStats:
        """Counts, bytes before and after, and the SQNR of every layer as it was quantized."""
        rest = [*self._untouched.values(), *(w.bias for w in self._weights.values() if w.bias is not None)]
        return total_stats((w.stats for w in self._weights.values()), ((s.array.size, s.array.nbytes) for s in rest))

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"QuantizedModel({len(self.names('linear'))} linear, {len(self.names('tensor'))} tensors, "
            f"{len(self._untouched)} untouched; {self.scheme}, {totals.bytes_after / 1e6:.1f} MB, "
            f"{totals.ratio:.2f} times smaller)"
        )

    # Files

    def save(self, path: Path) -> None:
        """Save to one file, atomically: after a crash at any moment there is the old file or the new one.

        Parameters
        ----------
        path : path-like
            ``.safetensors``, or ``.json`` for small models that people read.

        Raises
        ------
        ValueError
            For another suffix, what the format cannot hold, or a model that packing would make out of proportion to
            its file, which `load` refuses.
        OSError
            If the file cannot be written; an old one is then as it was.
        """
        path = os.fsdecode(path)
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in (".safetensors", ".json"):
            raise ValueError(f"{path}: a model is saved as .safetensors or .json, not {suffix!r}")
        document = {
            "scheme": self.scheme,
            "layers": {name: layer_document(weight) for name, weight in self._weights.items()},
            "config_json": self._config_json,
        }
        tensors = [NamedTensor.of_storage(n, s.array, s.code) for n, s in self._untouched.items()]
        for name, weight in self._weights.items():
            tensors += encode_layer(name, weight)
        write, factor = (write_json, _JSON_FACTOR) if suffix == ".json" else (write_safetensors, _FACTOR)

        def check(size: int) -> None:
            check_packing(self._weights, self._untouched, self._config_json, size, factor)

        write(path, tensors, document, check)
        logger().info("saved %s: %s", path, self)

    @classmethod
    def load(cls, path: Path, mmap: bool = False, verify: bool = False) -> QuantizedModel:
        """Load what `save` saved; nothing in the file is trusted.

        A model takes at most twice its safetensors file's size (16 times that of JSON) and 16 MiB, all layers packed.

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
            weights, untouched, config_json = decode_document(file)
            factor = _FACTOR if isinstance(file, SafetensorsFile) else _JSON_FACTOR
            try:
                check_packing(weights, untouched, config_json, file.size, factor)
                return cls.of(weights, untouched, config_json)
            except ValueError as error:
                raise FormatError(f"{file.path}: {error}") from None

    @staticmethod
    def verify(path: Path) -> None:
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
        sqnr = None if params is None else float(value.sqnr(finite_original(np.asarray(params[name]), value)))
        layers.append(layer_stats(name, value, sqnr))
    return total_stats(layers, [(x.size, x.nbytes) for x in rest])
