"""Which elements share a scale: the shape of the scales, and the walk over an array that the native loops take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.config import QuantConfig
from qnative.floats import as_float_array

__all__ = ["Granules", "block_min_max", "nonfinite_error"]


class Granules(NamedTuple):
    """How an array of some shape is cut into the elements that share a scale.

    Attributes
    ----------
    shape : tuple of int
        Of the scales: ``()`` per tensor, ``(channels,)`` per channel, the array's with the axis divided per group.
    walk : tuple
        ``(outer, length, inner, block, per_outer, per_inner)``, as the native loops walk a C-contiguous array
        (see ``_core/walk.pxd``).
    """

    shape: tuple[int, ...]
    walk: tuple[int, int, int, int, bool, bool]

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int | None = None, group_size: int | None = None) -> Granules:
        """Cut `shape` per tensor (no axis), per channel (an axis), or per group (a group size; axis -1 by default)."""
        if group_size is not None and axis is None:
            axis = -1
        if axis is None:
            return cls((), (1, 1, math.prod(shape), 1, False, False))
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis={axis} does not exist in an array of shape {shape}")
        axis %= len(shape)
        outer, length, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        last = axis == len(shape) - 1
        if group_size is None:
            if last:
                return cls((length,), (outer, 1, length, 1, False, True))
            return cls((length,), (outer, length, inner, 1, False, False))
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1")
        groups = -(-length // group_size)
        group_size = min(group_size, max(length, 1))
        return cls((*shape[:axis], groups, *shape[axis + 1 :]), (outer, length, inner, group_size, True, not last))

    @classmethod
    def of_config(cls, shape: tuple[int, ...], config: QuantConfig) -> Granules:
        """Cut `shape` as a `QuantConfig` says."""
        return cls.of(shape, config.axis, config.group_size)

    def spread(self, values: NDArray[Any], dtype: Any) -> NDArray[Any]:
        """Return `values`, of shape () or the scales', as one flat contiguous array with an entry for each scale."""
        if values.shape != self.shape:
            return np.full(math.prod(self.shape), values, dtype)
        values = np.ascontiguousarray(values, dtype=dtype)
        return (values if values.flags.aligned else values.copy()).reshape(-1)

    def counts(self) -> NDArray[np.int64]:
        """Return how many elements share each scale, of the scales' shape."""
        outer, length, inner, block, per_outer, per_inner = self.walk
        along = np.minimum(block, length - np.arange(0, length, block))  # the last group may be shorter
        each = along * (1 if per_outer else outer) * (1 if per_inner else inner)
        shape = (outer if per_outer else 1, len(along), inner if per_inner else 1)
        return np.broadcast_to(each[None, :, None], shape).reshape(self.shape)


def nonfinite_error(bad: int, size: int, remedy: str | None = None) -> ValueError:
    """Build the error for NaNs and infinities in data that is to be quantized."""
    if remedy is None:
        remedy = (
            "clean the data, or have NaN made 0 and infinities the ends of the range: "
            'nan="zero" of quantize, quantize_tensor and quantize_model, --nan zero of the command line'
        )
    return ValueError(f"{bad} of {size} values are NaN or infinite and have no code; {remedy}")


def block_min_max(x: ArrayLike, config: QuantConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the least and greatest value of each scale's elements.

    Parameters
    ----------
    x : array_like of float
        Any shape.
    config : QuantConfig
        Its granularity, axis and group size.

    Returns
    -------
    min, max : numpy.ndarray of float64
        Of the scales' shape; 0 for a scale without elements.

    Raises
    ------
    ValueError
        If x holds NaN or infinities; the message says how many.
    """
    values = as_float_array(x)
    granules = Granules.of_config(values.shape, config)
    low, high = np.empty(granules.shape, values.dtype), np.empty(granules.shape, values.dtype)
    bad = _core.min_max(values.reshape(-1), granules.walk, low.reshape(-1), high.reshape(-1))
    if bad:
        raise nonfinite_error(bad, values.size)
    empty = low > high
    low[empty] = high[empty] = 0.0
    return low.astype(np.float64), high.astype(np.float64)
