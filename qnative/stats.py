"""What quantization came to: bytes before and after, and the SQNR of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative.config import QuantConfig
from qnative.selection import FLOAT_SIZES
from qnative.tensor import QuantizedTensor

__all__ = ["LayerStats", "QuantStats", "finite_original", "layer_stats", "plain_sqnr", "total_stats"]


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
            "sqnr": plain_sqnr(self.sqnr),
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


def plain_sqnr(sqnr: float | None) -> float | str | None:
    """Return an SQNR as JSON can hold it: an infinite one as text."""
    return sqnr if sqnr is None or math.isfinite(sqnr) else str(sqnr)


def finite_original(x: NDArray[Any], q: QuantizedTensor) -> NDArray[Any]:
    """Return an original to compare with: what is not finite in it (``nan="zero"``) counts as kept exactly."""
    bad = ~np.isfinite(x)
    if x.shape != q.shape or not bad.any():
        return x
    return np.where(bad, q.dequantize().astype(x.dtype), x)


def layer_stats(name: str, q: QuantizedTensor, sqnr: float | None) -> LayerStats:
    """Count one quantized weight."""
    return LayerStats(name, q.shape, q.dtype, q.config, q.numel * FLOAT_SIZES[q.dtype], q.nbytes, sqnr)


def total_stats(layers: Iterable[LayerStats], rest: Iterable[tuple[int, int]]) -> QuantStats:
    """Add up layers and the (size, bytes) of everything else."""
    layers, rest = tuple(layers), tuple(rest)
    kept = sum(nbytes for _, nbytes in rest)
    return QuantStats(
        layers,
        len(rest),
        sum(math.prod(layer.shape) for layer in layers) + sum(size for size, _ in rest),
        sum(layer.bytes_before for layer in layers) + kept,
        sum(layer.bytes_after for layer in layers) + kept,
    )
