"""Quantization-aware training: a linear layer that trains on what `QuantizedLinear` will compute, and becomes one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative.config import FakeQuantConfig, ObserverMethod, QParams, QuantConfig, check_scale, code_dtype
from qnative.fake_quant import FakeQuantize, Parameters, as_float32
from qnative.granularity import Granules
from qnative.linear import QuantizedLinear
from qnative.tensor import QuantizedTensor, quantize_tensor, store_codes, store_scale, store_zero_point

__all__ = ["QATLinear", "tensor_from_torch"]

F32 = NDArray[np.float32]

#: What weights and inputs are simulated as unless something else is asked for.
DEFAULT_WEIGHT = FakeQuantConfig(QuantConfig.int8_per_channel())
DEFAULT_ACTIVATION = FakeQuantConfig(QuantConfig("uint8").asymmetric(), ObserverMethod.MOVING_AVERAGE)


class QATLinear:
    """``y = fake_quantize(x) @ fake_quantize(weight).T + bias``, forward and backward, in float32.

    What it simulates is what `convert` deploys: the layer it returns has, bit for bit, the codes of the training-time
    weights and gives x the codes of the training-time activations. Its output differs only by how float32 rounds: here
    a matrix product rounds each sum, there sums are exact (integers) or one fused chain (float8).

    Any optimizer can drive it: `params` are named float32 arrays to update in place, `grads` their gradients by the
    same names after `backward`::

        y = layer(x)
        dx = layer.backward(dy)
        for name, gradient in layer.grads.items():
            layer.params[name] -= rate * gradient

    Parameters
    ----------
    weights : array_like of float, shape (out_features, in_features)
        Copied.
    bias : array_like of float, shape (out_features,), optional
        Copied. Stays float.
    weight : FakeQuantConfig, optional
        How weights are simulated; symmetric int8 per channel with min-max by default. Observed scales are those of the
        weight as it is at each call (its former values are no data), unless ``moving_average`` is asked for.
    activation : FakeQuantConfig or "float", optional
        How x is simulated: per tensor. Asymmetric uint8 with a moving average by default; ``"float"``: not at all
        (weight-only quantization).

    Raises
    ------
    ValueError
        For shapes that do not fit, or configs that no `QuantizedLinear` can run.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> lsq = FakeQuantConfig(QuantConfig.int4_per_channel(), learnable=True)
    >>> layer = QATLinear.from_sizes(8, 4, rng=rng, weight=lsq)
    >>> x = rng.normal(size=(5, 8)).astype(np.float32)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> sorted(layer.grads)
    ['bias', 'weight', 'weight_scale']
    >>> bool(np.abs(layer.convert()(x) - y).max() < 1e-5)
    True
    """

    def __init__(
        self,
        weights: ArrayLike,
        /,
        bias: ArrayLike | None = None,
        *,
        weight: FakeQuantConfig | None = None,
        activation: FakeQuantConfig | str | None = None,
    ) -> None:
        self._weight = np.array(as_float32(weights))
        if self._weight.ndim != 2 or not self._weight.size:
            raise ValueError(
                f"weights have shape {self._weight.shape}; they must be (out_features, in_features), at least 1 each"
            )
        self._bias = None if bias is None else np.array(as_float32(bias))
        if self._bias is not None and self._bias.shape != (self.out_features,):
            raise ValueError(f"bias has shape {self._bias.shape}; it must be ({self.out_features},), the out_features")
        activation = DEFAULT_ACTIVATION if activation is None else activation
        if isinstance(activation, str) and activation != "float":
            raise ValueError(f"activation={activation!r} must be a FakeQuantConfig or 'float'")
        self._weight_quantizer = FakeQuantize(DEFAULT_WEIGHT if weight is None else weight, forget=True)
        self._input_quantizer = None if isinstance(activation, str) else FakeQuantize(activation)
        self._check_deployable()
        self._grads: dict[str, F32] = {}
        self._saved: tuple[tuple[int, ...], F32, F32] | None = None

    def _check_deployable(self) -> None:
        """Refuse now what `convert` would refuse after the training: build a layer of one weight."""
        activations: str | QParams = "float"
        if self._input_quantizer is not None:
            quant = self._input_quantizer.config.quant
            if quant.axis is not None:
                raise ValueError(
                    f"activation is {quant.granularity}; a layer takes one scale for its input (a sum over inputs "
                    "cannot take out a scale each input): use a per-tensor config"
                )
            activations = QParams(1.0, quant.symmetric_zero_point, quant.dtype, quant.quant_min, quant.quant_max)
        one = np.ones((1, 1), np.float32)
        QuantizedLinear(quantize_tensor(one, self._weight_quantizer.config.quant), None, activations)

    @classmethod
    def from_sizes(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rng: np.random.Generator | int | None = None,
        weight: FakeQuantConfig | None = None,
        activation: FakeQuantConfig | str | None = None,
    ) -> QATLinear:
        """Make a layer of new weights: uniform within ``sqrt(6 / (in + out))`` (Glorot and Bengio, 2010), bias 0.

        Parameters
        ----------
        in_features, out_features : int
            At least 1.
        bias : bool
            Whether there is one.
        rng : numpy.random.Generator or int, optional
            The generator, or a seed for one.
        weight, activation
            As for the class.

        Returns
        -------
        QATLinear
        """
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name}={size!r} must be a positive int")
        limit = math.sqrt(6.0 / (in_features + out_features))
        weights = np.random.default_rng(rng).uniform(-limit, limit, (out_features, in_features))
        return cls(weights, np.zeros(out_features) if bias else None, weight=weight, activation=activation)

    def __repr__(self) -> str:
        how = "'float'" if self._input_quantizer is None else repr(self._input_quantizer)
        return (
            f"QATLinear(in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._bias is not None}, weight={self._weight_quantizer!r}, activation={how})"
        )

    # What it is

    @property
    def in_features(self) -> int:
        """K: length of an input row."""
        return int(self._weight.shape[1])

    @property
    def out_features(self) -> int:
        """N: length of an output row."""
        return int(self._weight.shape[0])

    @property
    def weight(self) -> F32:
        """The float32 weights, (out_features, in_features): the array in `params`."""
        return self._weight

    @property
    def bias(self) -> F32 | None:
        """The float32 bias, (out_features,), or None: the array in `params`."""
        return self._bias

    @property
    def weight_quantizer(self) -> FakeQuantize:
        """What simulates the weights' quantization."""
        return self._weight_quantizer

    @property
    def input_quantizer(self) -> FakeQuantize | None:
        """What simulates the input's quantization, or None with ``activation="float"``."""
        return self._input_quantizer

    @property
    def _quantizers(self) -> dict[str, FakeQuantize]:
        found = {"weight": self._weight_quantizer}
        return found if self._input_quantizer is None else found | {"input": self._input_quantizer}

    @property
    def params(self) -> Parameters:
        """Everything that is trained, float32 arrays to update in place.

        ``"weight"``, ``"bias"`` and, of what is learned, ``"weight_scale"``, ``"weight_zero_point"``,
        ``"input_scale"``, ``"input_zero_point"``. The learned ones are there from the first call (or `calibrate`) on,
        since data gives them.
        """
        found = {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})
        for prefix, quantizer in self._quantizers.items():
            found |= {f"{prefix}_{name}": array for name, array in quantizer.params.items()}
        return Parameters(found)

    @property
    def grads(self) -> dict[str, F32]:
        """The gradients that the last `backward` left, by the names of `params` (not summed over calls)."""
        return dict(self._grads)

    # Training

    def calibrate(self, batches: Iterable[ArrayLike]) -> None:
        """Find the input's range from data before training, and settle on it: nothing is observed afterwards.

        A learned input scale starts from here, anew if there was one. Without this, the first training batch decides
        (learned scales), or every batch is observed while training goes on.

        Parameters
        ----------
        batches : iterable of array_like of float
            Inputs, (..., in_features).

        Raises
        ------
        ValueError
            If there is no batch, or one has another shape.
        """
        if self._input_quantizer is not None:
            seen = False
            for batch in batches:
                array = self._as_input(batch)
                if not seen:
                    self._input_quantizer.enable_observer()
                self._input_quantizer.observe(array)
                seen = True
            if not seen:
                raise ValueError("there is no batch to calibrate with; give at least one")
            self._input_quantizer.initialize()
        if self._weight_quantizer.config.learnable and not self._weight_quantizer.has_scale:
            self._weight_quantizer.observe(self._weight)
            self._weight_quantizer.initialize()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes, to go on from later: plain arrays (copies), numbers and strings.

        Nested dicts: ``"weight"``, ``"bias"`` and the `FakeQuantize.state_dict` of each quantizer.
        """
        quantizers = {f"{prefix}_quantizer": q.state_dict() for prefix, q in self._quantizers.items()}
        return {"weight": self._weight.copy(), "bias": None if self._bias is None else self._bias.copy()} | quantizers

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the layer that `state` came from was; its sizes and configs must have been the same.

        Arrays in `params` are written into, so that an optimizer goes on sharing them.

        Raises
        ------
        ValueError
            If entries are missing or unknown, or do not fit. The layer is then as it was before.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state must be what state_dict() gives, not {type(state).__name__}")
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(f"the state has the entries {sorted(state)}; needed are {sorted(mine)}")
        for name, array in (("weight", self._weight), ("bias", self._bias)):
            shape = None if array is None else array.shape
            found = None if state[name] is None else np.shape(state[name])
            if shape != found:
                raise ValueError(f"the state's {name} has shape {found}; this layer's has {shape}")
        weight = as_float32(state["weight"])
        bias = None if self._bias is None else as_float32(state["bias"])
        try:
            for prefix, quantizer in self._quantizers.items():
                quantizer.load_state_dict(state[f"{prefix}_quantizer"])
        except BaseException:
            self._weight_quantizer.load_state_dict(mine["weight_quantizer"])
            raise
        self._weight[...] = weight
        if self._bias is not None:
            self._bias[...] = bias
        self._grads, self._saved = {}, None

    def freeze(self) -> None:
        """Keep every scale and zero point as it is from now on; weights and bias can still be trained."""
        self._observe_weight()
        for quantizer in self._quantizers.values():
            quantizer.freeze()

    def unfreeze(self) -> None:
        """Observe or learn scales again."""
        for quantizer in self._quantizers.values():
            quantizer.unfreeze()

    def _as_input(self, x: ArrayLike) -> F32:
        array = as_float32(x)
        if array.ndim < 1 or array.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {array.shape}; its last dimension must be in_features={self.in_features}")
        return array

    def __call__(self, x: ArrayLike) -> F32:
        """Run the layer on simulated codes, observing as the quantizers' states say.

        Parameters
        ----------
        x : array_like of float, shape (..., in_features)
            Not to be changed before `backward`.

        Returns
        -------
        numpy.ndarray of float32, shape (..., out_features)

        Raises
        ------
        RuntimeError
            If a quantizer was frozen before it saw data.
        ValueError
            For a wrong shape, or NaN or infinities in x or the weights.
        """
        array = self._as_input(x)
        seen = array if self._input_quantizer is None else self._input_quantizer(array)
        rows = seen.reshape(math.prod(array.shape[:-1]), self.in_features)
        weight = self._weight_quantizer(self._weight)
        y = rows @ weight.T
        if self._bias is not None:
            y += self._bias
        self._saved = (array.shape, rows, weight)
        return np.asarray(y.reshape(*array.shape[:-1], self.out_features))

    def backward(self, dy: ArrayLike) -> F32:
        """Carry the gradient of the last call's result back, and leave the gradients of `params` in `grads`.

        Parameters
        ----------
        dy : array_like of float, shape (..., out_features)

        Returns
        -------
        numpy.ndarray of float32, shape (..., in_features)

        Raises
        ------
        RuntimeError
            If there was no call.
        ValueError
            If dy has another shape.
        """
        if self._saved is None:
            raise RuntimeError(f"{self!r} has not been called; backward() is of the last call")
        shape, rows, weight = self._saved
        gradient = as_float32(dy)
        if gradient.shape != (*shape[:-1], self.out_features):
            raise ValueError(f"dy has shape {gradient.shape}; the last call's y has {(*shape[:-1], self.out_features)}")
        flat = gradient.reshape(len(rows), self.out_features)
        dx = (flat @ weight).reshape(shape)
        if self._input_quantizer is not None:
            dx = self._input_quantizer.backward(dx)
        self._grads = {"weight": self._weight_quantizer.backward(flat.T @ rows)}
        if self._bias is not None:
            self._grads["bias"] = flat.sum(axis=0)
        for prefix, quantizer in self._quantizers.items():
            self._grads |= {f"{prefix}_{name}": array for name, array in quantizer.grads.items()}
        return dx

    # Deployment

    def _observe_weight(self) -> None:
        """Bring an observed weight scale up to the weight as it is, as the next call would."""
        quantizer = self._weight_quantizer
        averaged = quantizer.config.observer is ObserverMethod.MOVING_AVERAGE
        if quantizer.observing and not (averaged and quantizer.has_scale):
            quantizer.observe(self._weight)

    def convert(self, *, activation: str | None = None, output: QParams | None = None) -> QuantizedLinear:
        """Make the layer that runs: weights as codes, inputs quantized with the trained scale, integer kernels.

        Parameters
        ----------
        activation, output
            As for `QuantizedLinear.from_float`: a function fused after the bias (``"relu"`` ...), and codes as output.

        Returns
        -------
        QuantizedLinear
            With copies: training can go on.

        Raises
        ------
        RuntimeError
            If the input's range is not known: call the layer, or `calibrate`.
        """
        self._observe_weight()
        quant = self._weight_quantizer.config.quant
        tensor = quantize_tensor(self._weight, quant, self._weight_quantizer.qparams)
        inputs: str | QParams = "float" if self._input_quantizer is None else self._input_quantizer.qparams
        return QuantizedLinear(tensor, self._bias, inputs, activation=activation, output=output)


def tensor_from_torch(
    weight: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    dtype: str = "int8",
    axis: int | None = None,
    *,
    group_size: int | None = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> QuantizedTensor:
    """Take over weights trained with PyTorch's fake quantization, given as arrays, with the codes they trained with.

    PyTorch, torchao too, multiplies with the reciprocal in float32, ``clamp(rint(weight * (1 / scale)) + zero_point,
    quant_min, quant_max)``, where `quantize` divides; about one weight in a million falls on another code. This is
    PyTorch's rule.

    Parameters
    ----------
    weight : array_like of float
        The float weights (``layer.weight.detach().numpy()``), any shape; float32.
    scale : array_like of float
        Those of the forward pass (a module's ``scale``). Shape () or (1,) per tensor; (channels,) with `axis`; with
        `group_size` the weights' shape, its axis divided by the group size.
    zero_point : array_like
        Of `scale`'s shape or (). Learned (float) zero points are rounded and clamped as PyTorch's forward pass does.
    dtype : {"int8", "uint8", "int4", "uint4"}
        The codes' dtype.
    axis : int, optional
        The axis of the channels, or along which groups run (then -1 by default).
    group_size : int, optional
        Elements a group. Where torchao gives scales of shape (out_features, 1), that is in_features.
    quant_min, quant_max : int, optional
        The range PyTorch clamped to; the dtype's full range by default, as there. Codes of fewer bits are stored as
        int4 or uint4: 2 bits as ``dtype="int4", quant_min=-2, quant_max=1``.

    Returns
    -------
    QuantizedTensor
        For `QuantizedLinear.from_tensor`. Symmetric where zero points are those of symmetric codes and the range is
        (int8: -127..127), else asymmetric; the layer is as fast either way where zero points are 0.

    Raises
    ------
    ValueError
        For NaN or infinities, scales that are not positive, or shapes that do not fit.

    Examples
    --------
    >>> q = tensor_from_torch(np.float32([[0.5, -1.0]]), np.float32([0.01]), np.int32([0]))
    >>> layer = QuantizedLinear.from_tensor(q, activations=QParams(0.02, 128, "uint8"))
    >>> layer(np.float32([[1.0, 1.0]]))
    array([[-0.5]], dtype=float32)
    """
    values = as_float32(weight)
    info = code_dtype(dtype)
    if info.is_float:
        raise ValueError(
            f"dtype={info.name!r} has no zero point; use quantize_tensor(weight, config, QParams(scale, ...))"
        )
    scales, zeros = check_scale(scale), np.asarray(zero_point, np.float64)
    if axis is None and scales.shape == (1,):
        scales, zeros = scales.reshape(()), zeros.reshape(())
    low = int(info.min) if quant_min is None else quant_min
    high = int(info.max) if quant_max is None else quant_max
    if not np.isfinite(zeros).all():
        raise ValueError("zero_point holds NaN or infinities")
    zeros = np.clip(np.rint(zeros), low, high)
    axis = -1 if axis is None and group_size is not None else axis
    if group_size is not None and scales.ndim != values.ndim:
        raise ValueError(f"scale has shape {scales.shape}; with group_size it has {values.ndim} dimensions, as weight")
    qparams = QParams(scales, zeros, info.name, low, high, axis, group_size)
    config = qparams.config
    granules = Granules.of_config(values.shape, config)
    if granules.shape != scales.shape:
        raise ValueError(f"scale has shape {scales.shape}; weights of shape {values.shape} need {granules.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} weights are NaN or infinite")

    def along(parameters: NDArray[Any]) -> NDArray[Any]:
        """Lay parameters along the weights."""
        if axis is None:
            return parameters
        if group_size is None:
            return parameters.reshape([-1 if i == axis % values.ndim else 1 for i in range(values.ndim)])
        of_each = np.arange(values.shape[axis]) // group_size
        return np.take(parameters, of_each, axis)

    with np.errstate(over="ignore"):
        rounded = np.rint(values * along(np.float32(1) / scales))
    zero = along(np.broadcast_to(zeros, scales.shape))
    codes = np.clip(rounded.astype(np.float64) + zero, low, high).astype(info.storage)
    stored = store_zero_point(qparams.zero_point, granules.shape, config)
    return QuantizedTensor(
        store_codes(codes, stored, config), store_scale(scales, config), stored, values.shape, "float32", config
    )  # fmt: skip
