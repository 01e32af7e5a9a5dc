"""Simulated quantization for training: `FakeQuantize`, forward and backward, with ranges observed or scales learned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.config import (
    SMALLEST_SCALE,
    FakeQuantConfig,
    ObserverMethod,
    QParams,
    QuantConfig,
    QuantGranularity,
    qparams_from_range,
    round_scale,
)
from qnative.elementwise import quantize
from qnative.floats import as_float_array, check_array
from qnative.granularity import Granules, block_min_max, nonfinite_error
from qnative.observers import DEFAULT_AVERAGING_CONSTANT, Observer, make_observer, observe_once

__all__ = ["FakeQuantize", "Parameters", "as_float32"]

F32 = NDArray[np.float32]


def as_float32(x: ArrayLike) -> F32:
    """Return x as a C-contiguous, aligned float32 array, itself if it is one; other floats are rounded once."""
    with np.errstate(over="ignore"):  # becomes Inf, which whoever takes it refuses
        return np.asarray(as_float_array(x), np.float32, order="C")


def check_like(out: object, name: str, like: F32) -> F32:
    """Return `out` if a result like `like` can be written straight to it; TypeError or ValueError if not."""
    out = check_array(out, name)
    if out.shape != like.shape or out.dtype != np.float32 or not out.dtype.isnative:
        raise ValueError(f"{name} is {out.dtype} of shape {out.shape}; it must be float32 of shape {like.shape}")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise ValueError(f"{name} must be C-contiguous, aligned and writeable; pass one made by np.empty")
    return out


class Parameters(Mapping[str, F32]):
    """Arrays by name. Assigning to a name writes into its array, which layer and optimizer go on sharing.

    A number fills the array; anything else must have its shape. `copy.deepcopy` gives arrays that nothing else shares,
    and `update` takes them (or any mapping of arrays) back.
    """

    def __init__(self, arrays: Mapping[str, F32]) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> F32:
        if name not in self._arrays:
            raise KeyError(
                f"{name!r} is none of the parameters {', '.join(self._arrays) or '(none)'}; learned scales and zero "
                "points appear with data"
            )
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._arrays!r})"

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        array = self[name]
        if value is array:  # what `params[name] -= step` assigns in the end is the array itself
            return
        if np.ndim(value) and np.shape(value) != array.shape:
            raise ValueError(f"{name} has shape {array.shape}; it cannot take values of shape {np.shape(value)}")
        array[...] = value

    def update(self, *values: Any, **named: ArrayLike) -> None:
        """Assign to several names, as `dict.update` does."""
        for name, value in dict(*values, **named).items():
            self[name] = value


class _GroupObserver:
    """Ranges of groups: those of one array, so each array observed counts by itself (or into the moving average)."""

    def __init__(self, config: QuantConfig, method: ObserverMethod, options: Mapping[str, Any]) -> None:
        make_observer(method, **options)  # for its judgement of the options
        self._config, self._method, self._options = config, method, options
        self.reset()

    def reset(self) -> None:
        self._ends: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._qparams: QParams | None = None

    def observe(self, x: F32) -> None:
        if x.size == 0:
            return
        if self._method is not ObserverMethod.MOVING_AVERAGE:
            self._qparams = observe_once(x, self._config, self._method, **self._options)
            return
        ends = block_min_max(x, self._config)
        if self._ends is not None:
            if self._ends[0].shape != ends[0].shape:
                raise ValueError(
                    f"the groups of an array of shape {x.shape} have shape {ends[0].shape} and earlier ones "
                    f"{self._ends[0].shape}; groups are averaged over arrays of one shape, or use observer='min_max'"
                )
            c = self._options.get("averaging_constant", DEFAULT_AVERAGING_CONSTANT)
            low, high = (old + c * (new - old) for old, new in zip(self._ends, ends, strict=True))
            ends = (low, high)
        self._ends = ends
        self._qparams = qparams_from_range(*ends, self._config)

    def qparams(self, config: QuantConfig) -> QParams:
        if self._qparams is None:
            raise RuntimeError("no data yet")
        return self._qparams

    def state_dict(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "ends": None if self._ends is None else [end.copy() for end in self._ends],
            "qparams": None if self._qparams is None else self._qparams.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"the state must be what state_dict() gives, not {type(state).__name__}")
        if set(state) != set(self.state_dict()) or state["class"] != type(self).__name__:
            raise ValueError(f"the state is one of {state.get('class')!r}, not of groups")
        self._qparams = None if state["qparams"] is None else QParams.from_dict(state["qparams"])
        self._ends = None
        if state["ends"] is not None:
            low, high = (np.array(end, np.float64) for end in state["ends"])
            if low.ndim == 0 or low.shape != high.shape or not np.all((low <= high) & np.isfinite(high - low)):
                raise ValueError(f"the state's ends, of shapes {low.shape} and {high.shape}, are not those of ranges")
            self._ends = (low, high)


class FakeQuantize:
    """Quantize and dequantize in training: what the codes will keep of x, and gradients that go past the rounding.

    Forward: ``y = (clamp(rint(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, bit for bit what
    `quantize` and `dequantize` give. Backward: the straight-through estimator; ``dx = dy`` where the rounded quotient
    lies within the codes, 0 where it was clipped (float8: where ``abs(x / scale)`` is above the largest value).

    Two switches make its states: *observing* (each x goes into the observer) and *quantizing* (y is as above; otherwise
    x passes unchanged, and so does dy).

    =================  =========  ==========  =========================================================
    state              observing  quantizing  reached by
    =================  =========  ==========  =========================================================
    both at once       yes        yes         a new one; `unfreeze`
    observe            yes        no          `disable_fake_quant`
    fake-quantize      no         yes         `disable_observer`; a learnable one after its first batch
    off                no         no          both
    frozen             no         yes         `freeze`: the scale is not learned any more either
    =================  =========  ==========  =========================================================

    **Observed scales** (``config.learnable`` false). While observing, the scale follows the observer. Per group there
    is no stream: groups are those of one array, and each array observed is judged by itself (``moving_average``
    averages over arrays of one shape).

    **Learned scales** (LSQ, Esser et al., ICLR 2020; the zero point as in LSQ+, Bhalgat et al., 2020). Scale and, if
    asymmetric, zero point are taken from what was observed when the first x is quantized; then observing ends. From
    there they are `params`: float32 arrays that an optimizer updates in place, with the gradients in `grads`::

        d scale      = g * sum(dy * d),   d = (q - zero_point) - x / scale   within the codes
                                              quant_min - zero_point         clipped below
                                              quant_max - zero_point         clipped above
        d zero_point = g * sum(-scale * dy over what was clipped)
        g            = 1 / sqrt(N * quant_max),   N elements share the scale

    (float8: ``d = decode(encode(x / scale)) - x / scale`` within, the largest value with its sign outside). Products
    ``dy * d`` are float32, their sums float64 in an order that does not depend on the CPU (`_core/fake_quant.pyx`). The
    zero point is a float, used as ``clamp(rint(zero_point))``; with a `scale_dtype` below float32 the scale is used as
    rounded to it, and its gradient goes past that rounding too.

    A scale stays positive: where an optimizer's step ends at zero or below, the scale becomes half of the one used
    before that step, and a RuntimeWarning says so. A smaller step for scales avoids it. Positive values are used as
    they are, and NaN raises.

    Everything is float32: other floats are rounded to it first. x must not be changed between a call and its backward.
    One object is for one place in a network and one thread.

    Parameters
    ----------
    config : FakeQuantConfig, optional
        What is simulated, how ranges are found, whether scales are learned; symmetric int8 by default.
    forget : bool
        Forget earlier arrays at every observation: for a weight, whose former values are no data. (A moving average
        forgets at its own pace, and is left to.)
    **options
        Of the observer, as for `make_observer`: ``percentile``, ``sigma``, ``averaging_constant``, ``nonfinite``.

    Examples
    --------
    >>> import numpy as np
    >>> fq = FakeQuantize(FakeQuantConfig(QuantConfig.int4(), learnable=True))
    >>> y = fq(np.float32([0.5, -0.9, 7.0]))
    >>> y
    array([ 0., -1.,  7.], dtype=float32)
    >>> dx = fq.backward(np.float32([1.0, 1.0, 1.0]))
    >>> sorted(fq.grads)
    ['scale']
    """

    def __init__(self, config: FakeQuantConfig | None = None, *, forget: bool = False, **options: Any) -> None:
        config = FakeQuantConfig() if config is None else config
        if not isinstance(config, FakeQuantConfig):
            raise TypeError(
                f"config must be a FakeQuantConfig, not {type(config).__name__}; wrap it: FakeQuantConfig(config)"
            )
        self._config = config
        quant = self._quant = config.simulated
        self._observer: Observer | _GroupObserver
        if quant.granularity is QuantGranularity.PER_GROUP:
            self._observer = _GroupObserver(quant, config.observer, options)
        else:
            self._observer = make_observer(config.observer, quant.axis, **options)
        self._forget = forget and config.observer is not ObserverMethod.MOVING_AVERAGE
        self._observing = self._quantizing = True
        self._learning = config.learnable
        self._qparams: QParams | None = None  # of the observer, until it sees more
        self._params: dict[str, F32] = {}
        self._last_scale: F32 | None = None
        self._grads: dict[str, F32] = {}
        self._saved: tuple[F32, Granules, F32, NDArray[np.int32]] | None = None
        self._passed: tuple[int, ...] | None = None  # the shape of an x that passed unchanged

    def __repr__(self) -> str:
        states = [name for name in ("observing", "quantizing", "learning") if getattr(self, name)]
        return f"FakeQuantize({self._config!r}, {' and '.join(states) or 'off'})"

    # States

    @property
    def config(self) -> FakeQuantConfig:
        """What is simulated."""
        return self._config

    @property
    def observing(self) -> bool:
        """Whether a call takes x into the observer."""
        return self._observing

    @property
    def quantizing(self) -> bool:
        """Whether a call quantizes x."""
        return self._quantizing

    @property
    def learning(self) -> bool:
        """Whether backward computes gradients of scale and zero point."""
        return self._learning

    def enable_observer(self) -> None:
        """Observe from now on. A learnable one takes its scale anew from what it then sees."""
        if self._params:
            self._observer.reset()
            self._qparams = None
            self._forget_params()
        self._observing = True

    def disable_observer(self) -> None:
        """Observe no more; the scale stays (or is learned)."""
        self._observing = False

    def enable_fake_quant(self) -> None:
        """Quantize from now on."""
        self._quantizing = True

    def disable_fake_quant(self) -> None:
        """Let x and dy pass unchanged from now on."""
        self._quantizing = False

    def freeze(self) -> None:
        """Quantize with the present scale and zero point from now on: neither observe nor learn."""
        self._observing, self._quantizing, self._learning = False, True, False
        # An optimizer may still hold the old arrays.
        self._params = {name: array.copy() for name, array in self._params.items()}
        self._grads = {}

    def unfreeze(self) -> None:
        """Go on: learn the scale, from where it is, or observe again."""
        self._quantizing, self._learning = True, self._config.learnable
        if not self._params:
            self._observing = True

    def observe(self, x: ArrayLike) -> None:
        """Take x into account, whatever the state.

        A scale that is learned already is not moved by it: `enable_observer` first.

        Parameters
        ----------
        x : array_like of float
            Any shape that has the config's axis.

        Raises
        ------
        TypeError, ValueError
            As `Observer.observe`: not of floats, NaN or infinities, another number of channels.
        """
        array = as_float32(x)
        if self._forget and array.size:
            self._observer.reset()
        self._observer.observe(array)
        self._qparams = None

    # Scale and zero point

    @property
    def scale(self) -> F32:
        """The scale that a call uses (read-only): shape (), (channels,), or the grouped shape.

        RuntimeError before any data.
        """
        return self.qparams.scale

    @property
    def zero_point(self) -> NDArray[Any]:
        """The zero point that a call uses (read-only), in the codes' dtype; shape () when symmetric."""
        return self.qparams.zero_point

    @property
    def qparams(self) -> QParams:
        """Scale, zero point and range as `QParams`: what `quantize_tensor` and `QuantizedLinear` take.

        RuntimeError before any data.
        """
        if self._params:
            return self._learned()
        if self._qparams is None:
            try:
                self._qparams = self._observer.qparams(self._quant)
            except RuntimeError:
                raise RuntimeError(self._no_data()) from None
        return self._qparams

    def _no_data(self) -> str:
        remedy = "call it" if self._observing else "call enable_observer() and then it"
        return (
            f"{self!r} has seen no data (or not in every channel) and has no scale yet; {remedy} with some, call "
            "observe(x), or set_qparams() to one's own"
        )

    @property
    def has_scale(self) -> bool:
        """Whether there is a scale yet, from data or set."""
        try:
            return self.qparams is not None
        except RuntimeError:
            return False

    def state_dict(self) -> dict[str, Any]:
        """Return states, what was observed and what was learned: plain arrays (copies), numbers, strings and None."""
        return {
            "observing": self._observing,
            "quantizing": self._quantizing,
            "learning": self._learning,
            "observer": self._observer.state_dict(),
            "qparams": None if self._qparams is None else self._qparams.to_dict(),
            "params": {name: array.copy() for name, array in self._params.items()},
            "last_scale": None if self._last_scale is None else self._last_scale.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the one that `state` came from was; its config and options must have been the same.

        Learned arrays of the same shape are written into, so that an optimizer goes on sharing them.

        Raises
        ------
        ValueError
            If entries are missing or unknown, or do not fit the config. This one is then as it was before.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state must be what state_dict() gives, not {type(state).__name__}")
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state has the entries {sorted(state)}; needed are {sorted(self.state_dict())}")
        if not isinstance(state["params"], Mapping):
            raise ValueError(f"the state's params must be arrays by name, not {type(state['params']).__name__}")
        observer = copy.deepcopy(self._observer)
        observer.load_state_dict(state["observer"])
        qparams = None if state["qparams"] is None else QParams.from_dict(state["qparams"])
        if qparams is not None:
            self._check_own(qparams)
        params = {name: np.array(array, np.float32) for name, array in state["params"].items()}
        if params:
            names = {"scale"} if self._quant.is_symmetric else {"scale", "zero_point"}
            arrays = [*params.values(), np.asarray(state["last_scale"])]
            if set(params) != names or not self._config.learnable or len({a.shape for a in arrays}) > 1:
                raise ValueError(f"the state's params {sorted(params)} are not those of {self._config!r}, of one shape")
        self._observing, self._quantizing, self._learning = (
            bool(state[name]) for name in ("observing", "quantizing", "learning")
        )
        self._observer, self._qparams, self._grads = observer, qparams, {}
        self._saved = self._passed = None
        for name, array in self._params.items():
            if name in params and params[name].shape == array.shape:
                array[...] = params[name]
                params[name] = array
        self._params = params
        self._last_scale = np.array(state["last_scale"], np.float32) if params else None

    def set_qparams(self, qparams: QParams) -> None:
        """Use one's own scale and zero point (those of an earlier training ...) and observe no more.

        Parameters
        ----------
        qparams : QParams
            Of the config's dtype, granularity, axis and range. A learnable one goes on from them.

        Raises
        ------
        ValueError
            If they are of something else.
        """
        if not isinstance(qparams, QParams):
            raise TypeError(f"qparams must be a QParams, not {type(qparams).__name__}")
        self._check_own(qparams)
        self._observing = False
        self._qparams = qparams
        if self._config.learnable:
            self._take(qparams)

    def _check_own(self, qparams: QParams) -> None:
        """Refuse parameters of other codes than the config's."""
        quant = self._quant
        wanted = (quant.dtype, quant.quant_min, quant.quant_max, quant.axis, quant.group_size)
        found = (qparams.dtype, qparams.quant_min, qparams.quant_max, qparams.axis, qparams.group_size)
        if wanted != found:
            raise ValueError(
                f"qparams have (dtype, quant_min, quant_max, axis, group_size) = {found}; {quant!r} needs {wanted}"
            )
        if quant.is_symmetric and np.any(qparams.zero_point != quant.symmetric_zero_point):
            raise ValueError(f"{quant!r} has the fixed zero point {quant.symmetric_zero_point}; make it asymmetric")
        if not np.array_equal(round_scale(qparams.scale.astype(np.float64), quant.scale_dtype), qparams.scale):
            raise ValueError(f"qparams' scale is not exact in {quant.scale_dtype}; round it first")

    def _forget_params(self) -> None:
        self._params, self._grads, self._last_scale = {}, {}, None

    def _take(self, qparams: QParams) -> None:
        """Make observed parameters learned ones."""
        self._params = {"scale": np.array(qparams.scale)}
        if not self._quant.is_symmetric:
            zero = np.broadcast_to(qparams.zero_point, qparams.scale.shape)
            self._params["zero_point"] = np.array(zero, np.float32)
        self._last_scale = self._params["scale"].copy()
        self._observing = False

    def _learned(self) -> QParams:
        quant, scale = self._quant, self._params["scale"]
        zero = self._params.get("zero_point")
        for name, array in self._params.items():
            if not np.isfinite(array).all():
                bad = np.count_nonzero(~np.isfinite(array))
                raise ValueError(
                    f"{bad} of {array.size} learned {name} values are NaN or infinite; the training has diverged: "
                    "take smaller steps, or look for NaN in the gradients"
                )
        assert self._last_scale is not None
        low = scale < SMALLEST_SCALE
        if low.any():
            np.copyto(scale, np.maximum(self._last_scale / 2, np.float32(SMALLEST_SCALE)), where=low)
            warnings.warn(
                f"a step took {np.count_nonzero(low)} of {scale.size} learned scales to zero or below; they became "
                "half of what they were; take smaller steps for scales",
                RuntimeWarning,
                stacklevel=4,
            )
        self._last_scale[...] = scale
        rounded = round_scale(np.asarray(scale, np.float64), quant.scale_dtype)
        codes: ArrayLike = quant.symmetric_zero_point
        if zero is not None:
            codes = np.clip(np.rint(zero), quant.quant_min, quant.quant_max).astype(np.int32)
        return QParams(
            rounded, codes, quant.dtype, quant.quant_min, quant.quant_max, quant.axis, quant.group_size
        )  # fmt: skip

    # Training

    @property
    def params(self) -> Parameters:
        """What is learned: ``"scale"`` and, if asymmetric, ``"zero_point"``; float32 arrays to update in place.

        Empty when nothing is: not learnable, frozen, or no data yet.
        """
        return Parameters(self._params if self._learning else {})

    @property
    def grads(self) -> dict[str, F32]:
        """Gradients of `params` of the last backward, by the same names (not summed over calls)."""
        return dict(self._grads)

    def initialize(self) -> None:
        """Settle on what was observed so far: observe no more and, if learnable, have `params` from now on.

        RuntimeError before any data.
        """
        qparams = self.qparams
        self._observing = False
        if self._config.learnable and not self._params:
            self._take(qparams)

    def __call__(self, x: ArrayLike, out: F32 | None = None) -> F32:
        """Observe and quantize x, as the state says.

        Parameters
        ----------
        x : array_like of float
            Any shape that has the config's axis; kept, not copied, for `backward`.
        out : numpy.ndarray, optional
            Where to write the result: float32, C-contiguous, of x's shape, sharing no memory with x.

        Returns
        -------
        numpy.ndarray of float32
            Of x's shape; x itself when not quantizing.

        Raises
        ------
        RuntimeError
            If there is no scale: no data so far and not observing.
        ValueError
            For NaN or infinities in x, a shape that does not fit the scale's, or a learned scale that is NaN.
        TypeError
            If x is not of floats.
        """
        array = as_float32(x)
        if out is not None and np.may_share_memory(check_like(out, "out", array), array):
            raise ValueError("out shares memory with x, which backward still needs; pass another array")
        if self._observing:
            self.observe(array)
        if not self._quantizing:
            self._saved, self._passed = None, array.shape
            if out is None:
                return array
            out[...] = array
            return out
        qparams, quant = self.qparams, self._quant
        if self._config.learnable and not self._params:
            self._take(qparams)
        granules = Granules.of_config(array.shape, quant)
        if granules.shape != qparams.scale.shape:
            raise ValueError(
                f"x has shape {array.shape}, which takes scales of shape {granules.shape}; this one has scales of "
                f"shape {qparams.scale.shape}, found from earlier data"
            )
        scales, zeros = granules.spread(qparams.scale, np.float32), granules.spread(qparams.zero_point, np.int32)
        y = np.empty(array.shape, np.float32) if out is None else out
        into = np.asarray(y).reshape(-1)  # a subclass (numpy.matrix, ...) may have a reshape of its own
        if _core.fake_quantize(array.reshape(-1), scales, zeros, granules.walk, *self._codes(), into):
            bad = _core.count_nonfinite(array.reshape(-1))
            raise nonfinite_error(bad, array.size, "clean the data, or look for where the training diverges")
        self._saved, self._passed = (array, granules, scales, zeros), None
        return y

    def _codes(self) -> tuple[int, int, str | None]:
        quant = self._quant
        return (0, 0, quant.dtype) if quant.info.is_float else (int(quant.quant_min), int(quant.quant_max), None)

    def backward(self, dy: ArrayLike, out: F32 | None = None) -> F32:
        """Carry the gradient of the last call's result back, and leave those of scale and zero point in `grads`.

        Parameters
        ----------
        dy : array_like of float
            Of that call's shape.
        out : numpy.ndarray, optional
            Where to write dx: float32, C-contiguous, of that shape; may be dy.

        Returns
        -------
        numpy.ndarray of float32
            dx; dy itself when the call did not quantize.

        Raises
        ------
        RuntimeError
            If there was no call.
        ValueError
            If dy has another shape.
        """
        gradient = as_float32(dy)
        if self._saved is None and self._passed is None:
            raise RuntimeError(f"{self!r} has not been called; backward() is of the last call")
        shape = self._passed if self._saved is None else self._saved[0].shape
        if gradient.shape != shape:
            raise ValueError(f"dy has shape {gradient.shape}; the last call's x has {shape}")
        dx = out if out is None else check_like(out, "out", gradient)
        if self._saved is None:
            self._grads = {name: np.zeros_like(array) for name, array in self.params.items()}
            if dx is None:
                return gradient
            dx[...] = gradient
            return dx
        x, granules, scales, zeros = self._saved
        dx = np.empty(x.shape, np.float32) if dx is None else dx
        if np.may_share_memory(dx, x):
            raise ValueError("out shares memory with x, which is read while it is written; pass another array")
        if np.may_share_memory(dx, gradient) and dx.ctypes.data != gradient.ctypes.data:
            raise ValueError("out overlaps dy, shifted; pass dy itself or another array")
        names = tuple(self.params)
        sums = [np.zeros(scales.size) for _ in names]
        into = np.asarray(dx).reshape(-1)
        _core.fake_quantize_backward(
            x.reshape(-1), gradient.reshape(-1), scales, zeros, granules.walk, *self._codes(), into, *sums
        )
        if names:
            factor = 1.0 / np.sqrt(np.maximum(granules.counts(), 1) * float(self._quant.quant_max))
            if len(sums) == 2:
                sums[1] *= -scales.astype(np.float64)
            with np.errstate(over="ignore"):  # Inf, which the next call refuses by name if a step makes it a scale
                self._grads = {
                    name: np.asarray(total.reshape(granules.shape) * factor, np.float32)
                    for name, total in zip(names, sums, strict=True)
                }
        return dx

    def quantize(self, x: ArrayLike) -> NDArray[Any]:
        """Return the codes of x with the present scale and zero point: those that a call simulates.

        Nothing is observed and nothing kept. int8 for int8 and int4, uint8 for the others; RuntimeError before data.
        """
        q = self.qparams
        low, high = (None, None) if self._quant.info.is_float else (int(q.quant_min or 0), int(q.quant_max or 0))
        return quantize(
            as_float32(x), q.scale, q.zero_point, q.dtype, q.axis,
            group_size=q.group_size, quant_min=low, quant_max=high,
        )  # fmt: skip
