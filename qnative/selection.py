"""Which parameters of a checkpoint are quantized, and where the parameters come from."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative.files import STORAGE, NamedTensor, SafetensorsFile, TensorInfo
from qnative.floats import decode

if TYPE_CHECKING:
    import logging

    from qnative.files import JSONFile

__all__ = ["FLOATS", "Patterns", "Rules", "Source", "layer_name", "logger", "matches", "named_tensors", "widen"]

#: One fnmatch pattern or several, of full names or of names without their ``.weight``.
Patterns: TypeAlias = "str | Iterable[str] | None"

#: Named arrays: a mapping, pairs, or a safetensors file.
Source: TypeAlias = "Mapping[str, Any] | Iterable[tuple[str, Any]] | str | os.PathLike[str]"

#: safetensors' codes of the dtypes that are quantized.
FLOATS = ("F64", "F32", "F16", "BF16")
SUFFIX = ".weight"


def logger() -> logging.Logger:
    """Return the library's logger; it never prints by itself."""
    import logging

    logger = logging.getLogger("qnative")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


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
    """Tell by its name that a parameter of rank 2 or more is no linear layer's weight."""
    name = name.lower()
    parts = name.split(".")
    return (
        "embed" in name
        or layer_name(name).endswith("bias")
        or any(part in ("wte", "wpe") for part in parts)
        or "norm" in parts[max(len(parts) - 2, 0)]
    )


class Rules:
    """Decides by name, dtype and rank which parameters are quantized, and as what."""

    def __init__(self, include: Patterns, exclude: Patterns) -> None:
        self._include = dict.fromkeys(_patterns(include, "include"), False)
        self._exclude = dict.fromkeys(_patterns(exclude, "exclude"), False)

    def kind(self, name: str, code: str, shape: tuple[int, ...]) -> str | None:
        """Return ``"linear"``, ``"tensor"``, or None for what stays as it is."""
        included, excluded = self._seen(self._include, name), self._seen(self._exclude, name)
        if code not in FLOATS or len(shape) < 2 or 0 in shape or excluded:
            return None
        special = _is_embedding_or_norm(name)
        if special and not included:
            return None
        return "linear" if len(shape) == 2 and not special else "tensor"

    @staticmethod
    def _seen(patterns: dict[str, bool], name: str) -> bool:
        hits = [p for p in patterns if matches(name, p)]
        patterns.update(dict.fromkeys(hits, True))
        return bool(hits)

    def warn_unused(self) -> None:
        """Log the patterns that matched no name."""
        for what, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern, used in patterns.items():
                if not used:
                    logger().warning("%s pattern %r matches no parameter", what, pattern)


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
