"""Calibration: run observers over a model's activations, layer by layer, on one machine or many.

`calibrate_layer` and `calibrate_model` take batches and give a `QuantizationSpec` a layer, for `quantize_model`;
`Calibrator` records what flows through the layers of a running model instead.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative.config import ObserverMethod, QParams, QuantConfig
from qnative.floats import as_float_array, plain_array
from qnative.granularity import block_min_max
from qnative.observers import CalibrationCollector, Observer, make_observer, observe_once
from qnative.output_error import OutputError, least_output_error
from qnative.threads import lock_of
from qnative.work import Progress, map_ordered, reporting

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = [
    "CalibrationDataset",
    "Calibrator",
    "LayerCalibration",
    "QuantizationSpec",
    "calibrate_layer",
    "calibrate_model",
]

Result = TypeVar("Result")

#: Activations as the layers take them: one scale, the zero point where the data puts it.
ACTIVATIONS = QuantConfig("uint8", mode="asymmetric")


# Data


class CalibrationDataset:
    """Batches that can be gone through again and again, without holding more than one.

    Parameters
    ----------
    source : array, path, callable or iterable
        An array (memory-mapped ones are read as they are needed) or the path of a ``.npy`` file, cut along its first
        axis; a function that returns a new iterable of batches each time; an iterable of batches, such as a list. A
        one-shot iterator (a generator) can be gone through once; a second time raises RuntimeError.
    batch_size : int, optional
        Entries of the first axis a batch, for arrays and files; the whole is one batch by default.

    Notes
    -----
    To pickle one (a process pool does) its source must be picklable: a path, a list or a module's function, not a
    generator. A memory-mapped array is pickled as its file's name, so workers map the same file; so is a contiguous
    part of one. Other views of it, and those mapped to be changed in memory alone (``mode="c"``), go as data.

    Examples
    --------
    >>> import numpy as np
    >>> [batch.shape for batch in CalibrationDataset(np.zeros((5, 3)), batch_size=2)]
    [(2, 3), (2, 3), (1, 3)]
    """

    def __init__(self, source: Any, batch_size: int | None = None) -> None:
        whole = isinstance(source, (np.ndarray, str, os.PathLike))
        if batch_size is not None:
            if not whole:
                raise ValueError(f"batch_size={batch_size} cuts an array or a file; this source has batches of its own")
            if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
                raise ValueError(f"batch_size={batch_size!r} must be a positive int")
        if not (whole or callable(source) or isinstance(source, Iterable)):
            raise TypeError(f"batches must be an array, a path, a function or an iterable, not {type(source).__name__}")
        # A worker may have another working directory.
        self._source: Any = os.path.abspath(os.fsdecode(source)) if isinstance(source, (str, os.PathLike)) else source
        self._batch_size = None if batch_size is None else int(batch_size)
        if batch_size is not None and isinstance(source, np.ndarray):
            self._check_cut(source)
        self._once = isinstance(source, Iterator)
        self._used = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._source).__name__}, batch_size={self._batch_size})"

    @property
    def reiterable(self) -> bool:
        """False for a one-shot iterator."""
        return not self._once

    def _whole(self) -> NDArray[Any] | None:
        path = self._source
        if not isinstance(path, str):
            return path if isinstance(path, np.ndarray) else None
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(
                f"{path} is no .npy file of numbers ({error}); map raw data with np.memmap(path, dtype, 'r', shape=...)"
            ) from None
        if not isinstance(mapped, np.ndarray):
            mapped.close()
            raise TypeError(f"{path} holds several arrays; pass the one meant, np.load(path)[name]")
        if self._batch_size is not None:
            self._check_cut(mapped)
        return mapped

    def _check_cut(self, array: NDArray[Any]) -> None:
        if array.ndim == 0:
            raise ValueError(f"batch_size={self._batch_size} cuts the first axis, and an array of shape () has none")

    def __len__(self) -> int:
        """Return the number of batches; TypeError for a source that does not know it."""
        whole = self._whole()
        if whole is None:
            return len(self._source)
        return 1 if self._batch_size is None else -(-len(whole) // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        whole = self._whole()
        if whole is not None:
            if self._batch_size is None:
                yield whole
                return
            for i in range(0, len(whole), self._batch_size):
                yield whole[i : i + self._batch_size]
        elif self._once:
            if self._used:
                raise RuntimeError(
                    "the batches came from a one-shot iterator, which is used up; pass a list, an array, a path, or a "
                    "function that returns a new iterator each time"
                )
            self._used = True
            yield from self._source
        else:
            yield from self._source() if callable(self._source) else self._source

    def __getstate__(self) -> dict[str, Any]:
        if self._once:
            raise TypeError(
                "a one-shot iterator cannot be sent to another process; pass a list, an array, a path, or a module's "
                "function that returns an iterator"
            )
        state = self.__dict__.copy()
        mapped = _Mapped.of(self._source)
        if mapped is not None:
            state["_source"] = mapped
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._source, _Mapped):
            self._source = self._source.open()


@dataclass(frozen=True)
class _Mapped:
    """How to map an array of a file again."""

    filename: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    order: str

    @classmethod
    def of(cls, array: Any) -> _Mapped | None:
        """Tell how to map an array, or a view, that lies in one piece in a file; None of any other."""
        whole = array
        while isinstance(whole, np.ndarray) and isinstance(whole.base, np.ndarray):
            whole = whole.base
        # Of views NumPy keeps the offset of the whole.
        if not (isinstance(whole, np.memmap) and isinstance(whole.base, mmap.mmap) and whole.filename is not None):
            return None
        if array.size == 0 or whole.mode == "c" or not (array.flags.c_contiguous or array.flags.f_contiguous):
            return None
        offset = whole.offset + array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        order = "C" if array.flags.c_contiguous else "F"
        return cls(os.fspath(whole.filename), array.dtype, offset, array.shape, order)

    def open(self) -> NDArray[Any]:
        return np.memmap(self.filename, self.dtype, "r", self.offset, self.shape, self.order)  # type: ignore[call-overload, no-any-return]


# Answers


@dataclass(frozen=True)
class QuantizationSpec:
    """What calibration found for the input of one layer; `quantize_model` takes a collection of them.

    Parameters
    ----------
    name : str
        The layer's name.
    qparams : QParams
        Scale and zero point.
    method : ObserverMethod
        The method whose answer this is, or from whose answer the search on the layer's output set out. With
        ``output_aware`` it may be min-max where another was asked for.
    output_aware : bool
        Whether that search found the answer, and not the method itself.
    """

    name: str
    qparams: QParams
    method: ObserverMethod
    output_aware: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, not {type(self.name).__name__}")
        if not isinstance(self.qparams, QParams):
            raise TypeError(f"qparams must be a QParams, not {type(self.qparams).__name__}")
        object.__setattr__(self, "method", ObserverMethod(self.method))
        if not isinstance(self.output_aware, bool):
            raise TypeError(f"output_aware must be a bool, not {type(self.output_aware).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {
            "name": self.name,
            "qparams": self.qparams.to_dict(),
            "method": str(self.method),
            "output_aware": self.output_aware,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationSpec:
        """Build from `to_dict`'s result; unknown or missing keys raise ValueError."""
        if set(fields) != {"name", "qparams", "method", "output_aware"}:
            raise ValueError(
                f"a QuantizationSpec has name, qparams, method and output_aware, not {', '.join(map(repr, fields))}"
            )
        return cls(fields["name"], QParams.from_dict(fields["qparams"]), fields["method"], fields["output_aware"])


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """What a `Calibrator` saw of one layer; None where nothing was observed.

    Parameters
    ----------
    weight_min, weight_max : float, optional
        The ends of the weight.
    activation_min, activation_max : float, optional
        The ends of everything that came in.
    weight_scale : float32 array, optional
        The weight's scale, or scales, for the calibrator's `weight_config`.
    """

    weight_min: float | None = None
    weight_max: float | None = None
    activation_min: float | None = None
    activation_max: float | None = None
    weight_scale: NDArray[np.float32] | None = None


# Calibrating


def calibrate_layer(
    batches: Any,
    config: QuantConfig | None = None,
    method: ObserverMethod | str = ObserverMethod.KL,
    weight: Any = None,
    *,
    name: str = "",
    output_aware: bool | None = None,
    executor: Executor | None = None,
    progress: Progress = None,
    **options: Any,
) -> QuantizationSpec:
    """Find the scale and zero point of one layer's input.

    Parameters
    ----------
    batches : array, path, function or iterable of arrays
        The input, of shape (..., in_features) where `weight` is given; see `CalibrationDataset`.
    config : QuantConfig, optional
        The target; asymmetric uint8, per tensor, by default.
    method : ObserverMethod or str
        How the range is found.
    weight : array_like (out_features, in_features), optional
        The layer's weight, or anything with ``dequantize()``: turns `output_aware` on.
    name : str
        The layer's name, for the answer.
    output_aware : bool, optional
        Search for the range with the least error of the layer's output, ``(fake_quantize(x) - x) @ weight.T`` squared
        and added over all batches, around the method's answer and plain min-max, both among the candidates: never
        worse than either. Elementwise criteria know nothing of the weights, and may clip the few channels that a layer
        lives on. The batches are gone through up to ten times. By default: where a weight is given.
    executor : concurrent.futures.Executor, optional
        Where batches are observed, each a shard; the answer is the same, bit for bit.
    progress : callable or bool, optional
        Called with (done, total, name) after each batch of each pass; total is None where it is not known. True: a
        tqdm bar.
    **options
        Those of the observer: ``percentile``, ``sigma``, ``averaging_constant``, ``nonfinite``.

    Returns
    -------
    QuantizationSpec

    Raises
    ------
    RuntimeError
        If there is no data.
    ValueError
        If `output_aware` lacks a weight, the weight does not fit the batches or is not finite, or `config` is per
        group; and for NaN and infinities unless ``nonfinite="skip"``.
    ImportError
        For ``progress=True`` without tqdm.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> spec = calibrate_layer([rng.standard_normal((64, 16)) for _ in range(8)], method="mse", name="ffn")
    >>> spec.method, spec.qparams.scale.shape
    ('mse', ())
    """
    config = _target(config)
    if output_aware is None:
        output_aware = weight is not None
    if output_aware and weight is None:
        raise ValueError("output_aware=True measures the error of the layer's output; pass its weight=")
    dataset = _dataset(batches)
    if output_aware and not dataset.reiterable:
        raise ValueError(
            "output_aware=True goes through the batches repeatedly, which a one-shot iterator cannot; pass a list, an "
            "array, a path, or a function that returns a new iterator each time"
        )
    method = ObserverMethod(method)
    error = OutputError(_as_weight(weight), options.get("nonfinite") == "skip") if output_aware else None
    with reporting(progress, None if output_aware else _length(dataset), "batch") as report:
        done = 0

        def results(task: Callable[[Any], Result]) -> Iterator[Result]:
            """Do something with every batch, on the executor, in order."""
            nonlocal done
            for result in map_ordered(executor, functools.partial(_on_batch, task), enumerate(dataset)):
                yield result
                done += 1
                report(done, name)

        observers = _observers(method, config.axis, output_aware, options)
        observers[0]._check(config)  # before all of the data is gone through
        if executor is None:
            for _ in results(functools.partial(_observe_all, observers)):
                pass
        else:
            fresh = functools.partial(_observers, method, config.axis, output_aware, options)
            for shard in results(functools.partial(_observe_shard, fresh)):
                for observer, part in zip(observers, shard, strict=True):
                    observer.merge(part)
        if error is None:
            return QuantizationSpec(name, observers[0].qparams(config), method)

        def measure(candidates: list[QParams]) -> NDArray[np.float64]:
            total = np.zeros(len(candidates))
            for errors in results(functools.partial(error, candidates=candidates)):
                total += errors
            return total

        asked, plain = observers[0], observers[-1]
        found, origin = least_output_error(measure, plain.range, asked.calibrated_range(config), config)
    return QuantizationSpec(
        name, found, ObserverMethod.MIN_MAX if origin.plain else method, output_aware=origin.searched
    )


def _target(config: QuantConfig | None) -> QuantConfig:
    if config is None:
        return ACTIVATIONS
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, such as QuantConfig({config!r}), not {type(config).__name__}")
    return config


def _dataset(batches: Any) -> CalibrationDataset:
    return batches if isinstance(batches, CalibrationDataset) else CalibrationDataset(batches)


def _observers(
    method: ObserverMethod, axis: int | None, output_aware: bool, options: Mapping[str, Any]
) -> list[Observer]:
    """Make the method's observer, and the one of min-max that it is measured against."""
    made = [make_observer(method, axis, **options)]
    if output_aware and method is not ObserverMethod.MIN_MAX:
        made.append(make_observer("min_max", axis, nonfinite=made[0].nonfinite))
    return made


def _on_batch(task: Callable[[Any], Result], numbered: tuple[int, Any]) -> Result:
    """Do something with one batch; an error tells which it was."""
    number, batch = numbered
    try:
        return task(_one_array(batch))
    except Exception as error:
        error.add_note(f"at batch {number} (counted from 0)")
        raise


def _one_array(batch: Any) -> NDArray[Any]:
    """Return a batch as an array; refuse what holds more than one, as loaders of training data give it."""
    try:
        array = plain_array(batch)
    except ValueError:  # NumPy's: arrays of different shapes
        array = None
    if array is None or array.dtype.kind in "OSU":
        raise TypeError(
            f"a batch is one array of floats, and this is a {type(batch).__name__}; where a batch holds more than the "
            "layer's input, pick that: CalibrationDataset(lambda: (x for x, _ in loader))"
        )
    return array


def _observe_all(observers: list[Observer], batch: Any) -> None:
    for observer in observers:
        observer.observe(batch)


def _observe_shard(fresh: Callable[[], list[Observer]], batch: Any) -> list[Observer]:
    observers = fresh()
    _observe_all(observers, batch)
    return observers


def _length(dataset: CalibrationDataset) -> int | None:
    """Return the number of batches where it is known."""
    try:
        return len(dataset)
    except TypeError:
        return None


def _as_weight(weight: Any) -> NDArray[Any]:
    return as_float_array(weight.dequantize() if hasattr(weight, "dequantize") else weight)


def calibrate_model(
    data: Mapping[str, Any],
    config: QuantConfig | None = None,
    method: ObserverMethod | str = ObserverMethod.KL,
    executor: Executor | None = None,
    progress: Progress = None,
    *,
    weights: Mapping[str, Any] | None = None,
    output_aware: bool | None = None,
    **options: Any,
) -> dict[str, QuantizationSpec]:
    """Find the scale and zero point of every layer's input.

    Parameters
    ----------
    data : mapping of str to batches
        By layer name; batches as `calibrate_layer` takes them.
    config : QuantConfig, optional
        The target; asymmetric uint8, per tensor, by default.
    method : ObserverMethod or str
        How ranges are found.
    executor : concurrent.futures.Executor, optional
        Where layers are calibrated: threads, processes or machines. The answers are the same. For processes the batches
        must be picklable; paths and memory-mapped arrays are sent as names. (For few layers of many batches, give the
        executor to `calibrate_layer`.)
    progress : callable or bool, optional
        Called with (done, total, name) after each layer. True: a tqdm bar.
    weights : mapping of str to array_like, optional
        Weights by layer name, for `output_aware`; layers without one are calibrated without.
    output_aware : bool, optional
        As for `calibrate_layer`; True needs a weight for every layer.
    **options
        Those of the observer: ``percentile``, ``sigma``, ``averaging_constant``, ``nonfinite``.

    Returns
    -------
    dict of str to QuantizationSpec
        In the order of `data`.

    Raises
    ------
    ValueError, RuntimeError
        As `calibrate_layer`; a note names the layer.
    ImportError
        For ``progress=True`` without tqdm.

    Examples
    --------
    >>> import numpy as np
    >>> specs = calibrate_model({"a": [np.float32([0.0, 1.0])], "b": [np.float32([-1.0, 3.0])]}, method="min_max")
    >>> {name: int(spec.qparams.zero_point) for name, spec in specs.items()}
    {'a': 0, 'b': 64}
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a mapping of layer names to batches, not {type(data).__name__}")
    config = _target(config)
    weights = {} if weights is None else weights
    unknown = sorted(set(weights) - set(data))
    if unknown:
        raise ValueError(f"weights names {unknown[0]!r}, for which there is no data")
    tasks = ((name, _dataset(batches), weights.get(name)) for name, batches in data.items())
    task = functools.partial(
        _calibrate_named, config=config, method=ObserverMethod(method), output_aware=output_aware, options=options
    )
    specs: dict[str, QuantizationSpec] = {}
    with reporting(progress, len(data), "layer") as report:
        for spec in map_ordered(executor, task, tasks):
            specs[spec.name] = spec
            report(len(specs), spec.name)
    return specs


def _calibrate_named(
    task: tuple[str, CalibrationDataset, Any], options: dict[str, Any], **common: Any
) -> QuantizationSpec:
    name, dataset, weight = task
    with _naming(name):
        return calibrate_layer(dataset, weight=weight, name=name, **common, **options)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have errors name the layer."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while calibrating {name!r}")
        raise


class Calibrator:
    """Records the weights of layers and what comes into them, as a model runs.

    Any number of threads may record at once: one waits for the other.

    Parameters
    ----------
    config : QuantConfig, optional
        What activations are to be; asymmetric uint8, per tensor, by default.
    weight_config : QuantConfig, optional
        What weights are to be; int8 per channel by default.
    nonfinite : {"raise", "skip"}
        As for `Observer`.

    Examples
    --------
    >>> import numpy as np
    >>> calibrator = Calibrator()
    >>> calibrator.record_layer("ffn", np.float32([[0.5, -1.0]]))
    >>> for batch in np.float32([[[0.0, 1.0]], [[3.0, 2.0]]]):
    ...     calibrator.record_activations("ffn", batch)
    >>> calibrator.finish()["ffn"].activation_max
    3.0
    >>> calibrator.specs("min_max")["ffn"].qparams.scale * 255
    np.float32(3.0)
    """

    def __init__(
        self,
        config: QuantConfig | None = None,
        weight_config: QuantConfig | None = None,
        *,
        nonfinite: str = "raise",
    ) -> None:
        self.config = _target(config)
        self.weight_config = QuantConfig.int8_per_channel() if weight_config is None else _target(weight_config)
        self.nonfinite = nonfinite
        self._collector()._check(self.config)
        self._weights: dict[str, tuple[float, float, NDArray[np.float32]]] = {}
        self._collectors: dict[str, CalibrationCollector] = {}
        self._names: dict[str, None] = {}
        self._lock = lock_of(self)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=lock_of(self))

    def _collector(self) -> CalibrationCollector:
        return CalibrationCollector(self.config.axis, nonfinite=self.nonfinite)

    def record_layer(self, name: str, weight: Any) -> None:
        """Take note of a layer's weight: an array, or anything with ``dequantize()``. A second one replaces the first.

        Raises
        ------
        ValueError
            If it holds NaN or infinities, or has not the axis of `weight_config`.
        """
        w = _as_weight(weight)
        low, high = block_min_max(w, QuantConfig.int8())
        scale = observe_once(w, self.weight_config).scale
        with self._lock:
            self._weights[name] = float(low), float(high), scale
            self._names[name] = None

    def record_activations(self, name: str, x: ArrayLike) -> None:
        """Take what comes into a layer into account; every value counts, memory stays bounded (see `Observer`)."""
        with self._lock:
            if name not in self._collectors:
                self._collectors[name] = self._collector()
            self._collectors[name].observe(x)
            self._names[name] = None

    def watch(self, name: str, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Return a stand-in for `layer` that records what it is called with, and is otherwise the layer.

        The weight is recorded too where the layer has one: ``weight_quantized()``, or ``weight``.
        """
        quantized = getattr(layer, "weight_quantized", None)
        weight = getattr(layer, "weight", None) if quantized is None else quantized()
        if weight is not None:
            self.record_layer(name, weight)
        return _Watched(self, name, layer)

    def merge(self, other: Calibrator) -> Calibrator:
        """Take everything into account that `other` recorded, and return self.

        Raises
        ------
        ValueError
            If the configs differ, or both have a weight of one name and not the same.
        """
        if not isinstance(other, Calibrator):
            raise TypeError(f"other must be a Calibrator, not {type(other).__name__}")
        if (other.config, other.weight_config) != (self.config, self.weight_config):
            raise ValueError("cannot merge calibrators of different configs")
        with other._lock:
            weights, names = dict(other._weights), dict(other._names)
            collectors = {name: self._collector().merge(collector) for name, collector in other._collectors.items()}
        with self._lock:
            for name, theirs in weights.items():
                mine = self._weights.get(name, theirs)
                if mine[:2] != theirs[:2] or not np.array_equal(mine[2], theirs[2]):
                    raise ValueError(f"cannot merge: both calibrators have a weight {name!r}, and not the same")
            for name, collector in self._collectors.items():
                if name in collectors:
                    with _naming(name):
                        collectors[name] = self._collector().merge(collector).merge(collectors[name])
            # Nothing has changed up to here, where nothing can fail.
            self._weights = {**weights, **self._weights}
            self._collectors.update(collectors)
            self._names.update(names)
        return self

    def finish(self) -> dict[str, LayerCalibration]:
        """Return what was seen of each layer, in the order they first came; recording may go on."""
        found = {}
        with self._lock:
            for name in self._names:
                weight = self._weights.get(name, (None, None, None))
                low = high = None
                collector = self._collectors.get(name)
                if collector is not None and collector.count:  # of some channels, at least
                    low, high = float(collector._low.min()), float(collector._high.max())
                found[name] = LayerCalibration(weight[0], weight[1], low, high, weight[2])
        return found

    def specs(self, method: ObserverMethod | str = ObserverMethod.KL, **options: float) -> dict[str, QuantizationSpec]:
        """Return the specification of each layer whose activations were recorded, by any method.

        Parameters
        ----------
        method : ObserverMethod or str
            How ranges are found.
        **options
            ``percentile`` or ``sigma``.

        Returns
        -------
        dict of str to QuantizationSpec
            For `quantize_model`.
        """
        method = ObserverMethod(method)
        found = {}
        with self._lock:
            for name in self._names:
                if name in self._collectors and self._collectors[name].count:
                    with _naming(name):
                        qparams = self._collectors[name].qparams(self.config, method, **options)
                    found[name] = QuantizationSpec(name, qparams, method)
        return found


class _Watched:
    """A layer that tells a calibrator what it is called with."""

    def __init__(self, calibrator: Calibrator, name: str, layer: Callable[..., Any]) -> None:
        self._calibrator, self._name, self._layer = calibrator, name, layer

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._calibrator.record_activations(self._name, x)
        return self._layer(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_layer":
            raise AttributeError(name)
        return getattr(self._layer, name)
