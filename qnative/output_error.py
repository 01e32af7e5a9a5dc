"""The range that serves a layer's output best: the error is measured on data, through the layer's weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative.config import QParams, QuantConfig, qparams_from_range
from qnative.elementwise import fake_quantize
from qnative.floats import as_float_array
from qnative.streams import F64, Ends, pieces

__all__ = ["Origin", "OutputError", "least_output_error"]

#: Elements of the input, and products, worked on at a time: memory is bounded, and Ctrl-C answered, whatever the batch.
BLOCK, PRODUCTS = 1 << 18, 1 << 31
#: Products up to which a weight is factored, for the same reason.
SMALL = 1 << 29
#: Octaves by which both ends of the data are drawn in at first, and by which those of the method's answer are moved.
SHRINKS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
SHIFTS = (-0.5, -0.25, 0.25, 0.5)
#: Then the ends are moved by so many octaves, half as many where that helps no more, in so many passes at most.
FIRST_STEP, LAST_STEP, PASSES = 0.25, 0.0625, 8


class OutputError:
    """Measures how far a layer's output is off when its input is quantized, for several scales in one pass.

    With more outputs than inputs, R of ``weight = Q @ R`` may stand for the weight: the columns of Q are orthonormal,
    so that ``e @ weight.T`` and ``e @ R.T`` are equally long.

    Parameters
    ----------
    weight : float array (out_features, in_features)
    skip : bool
        Whether NaN and infinities in the input count as kept exactly; they raise otherwise.

    Raises
    ------
    ValueError
        If the weight is not of rank 2, or holds NaN or infinities.
    """

    def __init__(self, weight: NDArray[Any], skip: bool) -> None:
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {weight.shape}; it must be (out_features, in_features)")
        if not np.isfinite(weight).all():
            raise ValueError("weight holds NaN or infinities; an output error cannot be measured with it")
        self.shape = weight.shape
        outputs, inputs = weight.shape
        if outputs > inputs and outputs * inputs * inputs <= SMALL:
            factor: Any = np.linalg.qr(weight.astype(np.float64), mode="r")
            weight = factor.astype(weight.dtype)
        self.projection = np.ascontiguousarray(weight.T)
        self.skip = skip

    def __call__(self, batch: ArrayLike, candidates: Iterable[QParams]) -> F64:
        """Sum ``((fake_quantize(x) - x) @ weight.T)**2`` over a batch for each candidate.

        Parameters
        ----------
        batch : array_like of float (..., in_features)
        candidates : iterable of QParams
            Each for the whole batch, or along an axis of it.

        Returns
        -------
        float64 array (candidates,)
        """
        candidates = list(candidates)
        x = np.asarray(batch)
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"a batch of shape {x.shape} does not fit a weight of shape {self.shape}; its last axis must"
            )
        errors = np.zeros(len(candidates))
        if x.size == 0:
            as_float_array(x)  # for its judgement of the dtype
            return errors
        whole = tuple({-1, *(q.axis for q in candidates if q.axis is not None)})
        for piece in pieces(x, whole, max(min(BLOCK, PRODUCTS // max(self.projection.shape[1], 1)), 1)):
            for i, q in enumerate(candidates):
                errors[i] += self._of_piece(piece, q)
        return errors

    def _of_piece(self, x: NDArray[Any], q: QParams) -> float:
        clamp = (None, None) if q.config.info.is_float else (q.quant_min, q.quant_max)
        error = fake_quantize(
            x, q.scale, q.zero_point, q.dtype, q.axis,
            quant_min=clamp[0], quant_max=clamp[1], nan="zero" if self.skip else "raise",
        )  # fmt: skip
        with np.errstate(invalid="ignore"):
            error -= x
        if self.skip:
            error[~np.isfinite(error)] = 0.0
        out = error.reshape(-1, self.shape[1]) @ self.projection
        return float(np.sum(np.square(out, dtype=np.float64)))


class Origin(NamedTuple):
    """Where an answer comes from: plain min-max or the method asked for; as it was, or moved by the search."""

    plain: bool
    searched: bool


class _Candidate(NamedTuple):
    ends: Ends
    origin: Origin


def least_output_error(
    measure: Callable[[list[QParams]], F64], data: Ends, asked: Ends, config: QuantConfig
) -> tuple[QParams, Origin]:
    """Search for the ends whose scale and zero point cost a layer's output least.

    Candidates are the ends of the data and those of the method, as they are and with both moved; then the best's ends
    are moved singly and together, in smaller and smaller steps, to 1/16 of an octave. Channels move together.

    Parameters
    ----------
    measure : callable
        Gives the errors of candidates, in one pass over the data.
    data, asked : pairs of float64 arrays of shape () or (channels,)
        The ends of the data, and the method's answer.
    config : QuantConfig
        The target.

    Returns
    -------
    QParams
        Never worse than plain min-max nor than the method's answer, and plain min-max where nothing is better.
    Origin
    """
    limits = _with_zero(data)
    plain = _Candidate(data, Origin(True, False))
    best, params, least = plain, qparams_from_range(*data, config), np.inf

    def try_out(candidates: list[_Candidate]) -> bool:
        """Keep the best; an equally good one that comes later is none."""
        nonlocal best, params, least
        usable = [(c, q) for c in candidates if (q := _qparams(c, config)) is not None]
        errors = np.nan_to_num(measure([q for _, q in usable]), nan=np.inf)
        i = int(np.argmin(errors))
        if not errors[i] < least:
            return False
        (best, params), least = usable[i], float(errors[i])
        return True

    answer = _Candidate(asked, Origin(False, False))
    moves = [(plain, s) for s in SHRINKS] + [(answer, s) for s in SHIFTS]
    try_out([plain, answer, *(_moved(c, (s, s), limits) for c, s in moves)])
    step = FIRST_STEP
    pair = not config.is_symmetric and bool(np.any(limits[0] < 0)) and bool(np.any(limits[1] > 0))
    if least == 0.0:  # nothing to gain
        return params, best.origin
    for _ in range(PASSES):
        steps = (-step, 0.0, step)
        around = [(s, t) for s, t in itertools.product(steps, repeat=2) if (s, t) != (0, 0) and (pair or s == t)]
        if not try_out([_moved(best, move, limits) for move in around]):
            if step == LAST_STEP:
                break
            step /= 2
    return params, best.origin


def _with_zero(ends: Ends) -> Ends:
    return np.minimum(ends[0], 0.0), np.maximum(ends[1], 0.0)


def _moved(candidate: _Candidate, octaves: tuple[float, float], limits: Ends) -> _Candidate:
    """Draw the ends in by so many octaves (out by negative ones, but not beyond the data)."""
    low, high = (end * 2.0**-u for end, u in zip(_with_zero(candidate.ends), octaves, strict=True))
    ends = np.maximum(low, limits[0]), np.minimum(high, limits[1])
    return _Candidate(ends, candidate.origin._replace(searched=True))


def _qparams(candidate: _Candidate, config: QuantConfig) -> QParams | None:
    """Return the scale and zero point; None where the search has come to a scale that its dtype cannot hold."""
    try:
        return qparams_from_range(*candidate.ends, config)
    except ValueError:
        if candidate.origin.searched:
            return None
        raise
