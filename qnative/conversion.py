"""From a float checkpoint to a quantized model, layer by layer."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative.checkpoint import Stored, Weight, linear_layer
from qnative.config import QParams, QuantConfig, check_config
from qnative.elementwise import check_nan
from qnative.linear import ACTIVATION_FUNCTIONS
from qnative.model import QuantizedModel
from qnative.selection import (
    FLOATS,
    SUFFIX,
    Patterns,
    Rules,
    Source,
    Transposed,
    layer_name,
    logger,
    matches,
    named_tensors,
    widen,
)
from qnative.stats import finite_original
from qnative.storage import dtype_code, to_storage
from qnative.tensor import QuantizedTensor, quantize_tensor
from qnative.work import Progress, map_ordered, reporting

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["quantize_model", "quantize_named_parameters"]


def _quantize(
    name: str, array: NDArray[Any], code: str, config: QuantConfig, nan: str
) -> tuple[QuantizedTensor, float]:
    """Quantize one stored weight; a function of its own so that any executor can run it."""
    x = widen(array, code)
    del array
    try:
        quantized = quantize_tensor(x, config, nan=nan)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sqnr = quantized.sqnr(x if nan == "raise" else finite_original(x, quantized))
    if code == "BF16":
        q = quantized
        quantized = QuantizedTensor(q.data, q.scale_data, q.zero_point, q.shape, "bfloat16", q.config, check=False)
    return quantized, sqnr


#: A weight to quantize: name, array as stored, safetensors' code of its dtype, config, what NaN does.
_Job: TypeAlias = "tuple[str, NDArray[Any], str, QuantConfig, str]"


def _quantize_job(job: _Job) -> tuple[str, tuple[QuantizedTensor, float]]:
    return job[0], _quantize(*job)


def quantize_named_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    config: QuantConfig | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    nan: str = "raise",
) -> dict[str, QuantizedTensor | NDArray[Any]]:
    """Quantize the weights among named parameters, and leave the rest alone.

    Parameters
    ----------
    params : mapping of str to array_like, or iterable of pairs
        The parameters.
    config : QuantConfig, optional
        How; int8 per channel by default.
    include : str or iterable of str, optional
        fnmatch patterns of names to quantize although their layer's name says embedding or norm (``embed_tokens``,
        ``wte``, ``layer_norm``). Only floating-point parameters of rank 2 and more are ever quantized.
    exclude : str or iterable of str, optional
        Patterns of names to leave alone; stronger than `include`.
    nan : {"raise", "zero"}
        Raise at NaN and infinities, or quantize NaN as 0 and infinities as the ends of the range.

    Returns
    -------
    dict of str to QuantizedTensor or array
        Under the same names, in the same order; what is left alone, a `QuantizedTensor` too, is the very object that
        was given.

    Raises
    ------
    ValueError
        If a weight holds NaN or infinity; the message names it.
    """
    config = QuantConfig.int8_per_channel() if config is None else check_config(config)
    check_nan(nan)
    rules = Rules(include, exclude)
    found: dict[str, QuantizedTensor | NDArray[Any]] = {}
    for name, given in params.items() if isinstance(params, Mapping) else params:
        code = None if isinstance(given, QuantizedTensor) else dtype_code(np.asarray(given).dtype)
        if code and rules.kind(name, code, np.shape(given)):
            found[name] = _quantize(name, *to_storage(given), config, nan)[0]
        else:
            found[name] = given
    rules.report()
    return found


def quantize_model(
    source: Source,
    config: QuantConfig | None = None,
    activations: str | QParams = "dynamic",
    calibration: Mapping[str, Any] | Iterable[Any] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    linear: Patterns = None,
    transpose: Patterns = None,
    nan: str = "raise",
    activation: Mapping[str, str] | None = None,
    config_json: str | Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    progress: Progress = None,
) -> QuantizedModel:
    """Quantize a checkpoint, layer by layer: memory peaks at about one layer above the result.

    Floating-point weights of rank 2 become linear layers, each with the bias that is named like it (``X.weight``,
    ``X.bias``, in any order); those of higher rank become quantized tensors. Biases, norms and embeddings stay as they
    are, in their own dtype; embeddings (by the layer's own name or the one before it: ``word_embeddings``,
    ``embeddings.word``, ``wte``; not ``embed_out`` or ``embedder.0.fc``) that `include` names become quantized tensors,
    of which `take` decodes the rows that are looked up. The logger ``"qnative"`` tells what is left alone for its name
    (INFO), and which patterns match no name (WARNING).

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
    linear : str or iterable of str, optional
        Patterns of weights of rank 2 that are linear layers, whatever their names say; implies `include`.
    transpose : str or iterable of str, optional
        Patterns of linear layers whose weights are stored (in_features, out_features), as GPT-2's Conv1D stores them
        (``*c_attn*``, ``*c_fc*``, ``*c_proj*``); they are transposed before they are quantized.
    nan : {"raise", "zero"}
        Raise at NaN and infinities in weights, or quantize NaN as 0 and infinities as the ends of the range; the SQNR
        then takes them as kept exactly.
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
    TypeError
        If a parameter is no array, or quantized already.
    ValueError
        If a weight holds NaN or infinity, a bias does not fit its weight, or `calibration` or `activation` names a
        layer that does not exist.
    FormatError
        If the file is damaged.
    ImportError
        For ``progress=True`` without tqdm.
    """
    config = QuantConfig.int8_per_channel() if config is None else check_config(config)
    check_nan(nan)
    rules = Rules(include, exclude, linear)
    transposed = Transposed(transpose)
    inputs = _calibrated(calibration)
    fused = _fused(activation)
    from_file = isinstance(source, (str, bytes, os.PathLike))
    kinds: dict[str, str] = {}
    quantized: dict[str, tuple[QuantizedTensor, float]] = {}
    untouched: dict[str, Stored] = {}
    with named_tensors(source) as (tensors, total), reporting(progress, total, "tensor") as report:
        done = 0

        def tell(name: str) -> None:
            nonlocal done
            done += 1
            report(done, name)

        def weights_to_quantize() -> Iterator[_Job]:
            """Give the weights, each loaded when its turn comes, and keep everything else on the way."""
            for tensor in tensors:
                name, kind = tensor.name, rules.kind(tensor.name, tensor.dtype, tensor.shape)
                if name in untouched or layer_name(name) in kinds:
                    raise ValueError(f"{name!r}: two parameters of one layer name; rename one, or exclude it")
                if kind is not None:
                    kinds[layer_name(name)] = kind
                    turned = transposed(name, tensor.shape) and kind == "linear"
                    array = np.ascontiguousarray(tensor.load().T) if turned else tensor.load()
                    yield name, array, tensor.dtype, config, nan
                    del array
                else:
                    untouched[name] = Stored(tensor.load() if from_file else tensor.load().copy(), tensor.dtype)
                    tell(name)
                del tensor

        # Where the workers are not known (a cluster), no more whole weights are in flight than there would be locally.
        in_flight = None if hasattr(executor, "_max_workers") else 1 + (os.cpu_count() or 1)
        for name, tensor_and_sqnr in map_ordered(executor, _quantize_job, weights_to_quantize(), in_flight):
            quantized[layer_name(name)] = tensor_and_sqnr
            tell(name)
    rules.report()
    transposed.report()
    if not kinds:
        logger().warning("nothing was quantized: no floating-point parameter of rank 2 or more is left by the rules")

    weights: dict[str, Weight] = {}
    for name, kind in kinds.items():
        result, sqnr = quantized.pop(name)
        if kind == "tensor":
            weights[name] = Weight(name, kind, result, sqnr)
            continue
        bias = untouched.pop(f"{name}.bias", None)
        if bias is not None and (bias.code not in FLOATS or bias.array.shape != result.shape[:1]):
            raise ValueError(
                f"{name}: its bias is {bias.code} of shape {bias.array.shape}, and a weight of shape {result.shape} "
                f"(out_features, in_features) needs floats of shape {result.shape[:1]}; pass transpose={name!r} if "
                f"the weight is stored the other way round, or exclude {name!r}"
            )
        weights[name] = linear_layer(
            name, result, sqnr, bias=bias, activations=inputs.pop(name, activations), activation=fused(name)
        )
    fused(None)
    if inputs:
        raise ValueError(f"calibration names {next(iter(inputs))!r}, which is no linear layer of this model")
    return QuantizedModel.of(weights, untouched, config_json)


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
        hits = [pattern for pattern in table if matches(name, pattern) or fnmatch.fnmatchcase(name + SUFFIX, pattern)]
        for pattern in hits:
            unused.pop(pattern, None)
        return table[hits[0]] if hits else None

    return find
