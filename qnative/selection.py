"""Which parameters of a checkpoint are quantized, and where the parameters come from."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative.files import SafetensorsFile
from qnative.floats import decode
from qnative.storage import STORAGE, NamedTensor, TensorInfo, printable
from qnative.tensor import refuse_quantized

if TYPE_CHECKING:
    import logging

    from qnative.files import JSONFile

__all__ = [
    "FLOATS",
    "FLOAT_SIZES",
    "Patterns",
    "Rules",
    "Source",
    "Transposed",
    "layer_name",
    "logger",
    "matches",
    "named_tensors",
    "widen",
]

#: One fnmatch pattern or several, of full names or of names without their ``.weight``.
Patterns: TypeAlias = "str | Iterable[str] | None"

#: Named arrays: a mapping, pairs, or a safetensors file.
Source: TypeAlias = "Mapping[str, Any] | Iterable[tuple[str, Any]] | str | bytes | os.PathLike[Any]"

#: safetensors' codes of the dtypes that are quantized.
FLOATS = ("F64", "F32", "F16", "BF16")

#: Bytes an element of each of those dtypes, by its name.
FLOAT_SIZES = {STORAGE[code].name: STORAGE[code].numpy.itemsize for code in FLOATS}

SUFFIX = ".weight"

#: Words of a layer's name that say it is a product, whatever it embeds: ``embed_out``, ``time_embedding.linear_1``.
_PRODUCTS = frozenset(
    ("dense", "fc", "head", "lin", "linear", "mapping", "mlp", "out", "proj", "project", "projection", "unembed")
)

#: Words of the names of GPT-2's Conv1D layers, whose weights are stored (in_features, out_features).
_CONV1D = ("c_attn", "c_proj", "c_fc")


def logger() -> logging.Logger:
    """Return the library's logger.

    It has no handler of its own: where a program has not set up logging, Python prints warnings to standard error, so
    that a mistyped pattern does not pass unseen.
    """
    import logging

    return logging.getLogger("qnative")


def layer_name(name: str) -> str:
    """Return the layer's name: ``X`` of ``X.weight``."""
    return name.removesuffix(SUFFIX) if len(name) > len(SUFFIX) else name


def _patterns(given: Patterns, what: str) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what} must be fnmatch patterns of names, not {type(pattern).__name__}")
    return patterns


def matches(name: str, pattern: str) -> bool:
    """Tell whether an fnmatch pattern names a parameter, or its layer."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(layer_name(name), pattern)


def _is_embedding_or_norm(name: str) -> bool:
    """Tell by its name that a parameter of rank 2 or more is no linear layer's weight.

    The layer's own name and the one before it count: everything in ``embedder.encoder.0.fc.weight`` may lie within an
    embedder, and it is a linear layer all the same.
    """
    parts = layer_name(name).lower().split(".")
    own, parent = parts[-1], parts[-2] if len(parts) > 1 else ""
    if "norm" in own or own.endswith("bias") or ("norm" in parent and not name.endswith(SUFFIX)):
        return True
    if any(word.rstrip("0123456789") in _PRODUCTS for word in own.split("_")):
        return False
    if "embed" in own or own in ("wte", "wpe") or parent in ("wte", "wpe"):
        return True
    # `time_embed.0` is a step of a sequence, `embeddings.0` a table of a list.
    return "embed" in parent and (not own.isdigit() or parent in ("embed", "embedding", "embeddings"))


class _Used:
    """Patterns that remember which of them matched a name."""

    def __init__(self, given: Patterns, what: str) -> None:
        self._what = what
        self._used = dict.fromkeys(_patterns(given, what), False)

    def match(self, name: str) -> bool:
        hits = [p for p in self._used if matches(name, p)]
        self._used.update(dict.fromkeys(hits, True))
        return bool(hits)

    def warn_unused(self) -> None:
        for pattern, used in self._used.items():
            if not used:
                logger().warning("%s pattern %r matches no parameter", self._what, pattern)


class Rules:
    """Decides by name, dtype and rank which parameters are quantized, and as what."""

    def __init__(self, include: Patterns, exclude: Patterns, linear: Patterns = None) -> None:
        self._include, self._exclude = _Used(include, "include"), _Used(exclude, "exclude")
        self._linear = _Used(linear, "linear")
        self._left: list[str] = []

    def kind(self, name: str, code: str, shape: tuple[int, ...]) -> str | None:
        """Return ``"linear"``, ``"tensor"``, or None for what stays as it is."""
        forced, included = self._linear.match(name), self._include.match(name)
        excluded = self._exclude.match(name)
        if code not in FLOATS or len(shape) < 2 or 0 in shape or excluded:
            return None
        special = _is_embedding_or_norm(name)
        if special and not (included or forced):
            self._left.append(name)
            return None
        return "linear" if len(shape) == 2 and (forced or not special) else "tensor"

    def report(self) -> None:
        """Log the patterns that matched no name (as warnings), and what was left alone for its name."""
        for patterns in (self._include, self._exclude, self._linear):
            patterns.warn_unused()
        if self._left:
            logger().info(
                "left alone, as their names say embedding, norm or bias (include= or linear= quantizes them): %s",
                printable(", ".join(self._left)),
            )


class Transposed:
    """Tells which weights are stored as (in_features, out_features), by patterns; warns of those that seem to be."""

    def __init__(self, transpose: Patterns) -> None:
        self._patterns = _Used(transpose, "transpose")
        self._suspects: list[str] = []

    def __call__(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a linear layer's weight is to be transposed."""
        matched = self._patterns.match(name)
        if len(shape) != 2:
            return False
        if not matched and any(word in layer_name(name).rpartition(".")[2] for word in _CONV1D):
            self._suspects.append(name)
        return matched

    def report(self) -> None:
        """Log, as warnings, patterns that matched no name, and names that no pattern matched although they should."""
        self._patterns.warn_unused()
        if self._suspects:
            logger().warning(
                "%r and %d more are named like GPT-2's Conv1D layers, whose weights are stored "
                "(in_features, out_features), and are taken as (out_features, in_features); "
                "transpose='*c_attn*' and the like turns them",
                self._suspects[0],
                len(self._suspects) - 1,
            )


@contextlib.contextmanager
def named_tensors(source: Source) -> Iterator[tuple[Iterator[NamedTensor], int | None]]:
    """Give the named tensors of a source, each loaded when asked, and how many there are (None: not known)."""
    if isinstance(source, (str, bytes, os.PathLike)):
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
            refuse_quantized(array)
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
