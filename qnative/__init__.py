"""qnative: NumPy-native quantization for CPU inference.

NumPy arrays in, NumPy arrays out: int8, int4 and float8 weights, ranges found from data, and linear layers that run on
integer SIMD kernels with the same bits on every CPU.

The native core and the number of threads are loaded at once, so that what `QNATIVE_ISA` and `QNATIVE_NUM_THREADS`
ask for in vain fails here. Any other Python module is imported when one of its names is first used: ``import qnative``
costs a few milliseconds over NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qnative._core import isa as isa
from qnative.threads import get_num_threads as get_num_threads
from qnative.threads import num_threads as num_threads
from qnative.threads import set_num_threads as set_num_threads

if TYPE_CHECKING:
    from qnative.calibration import CalibrationDataset as CalibrationDataset
    from qnative.calibration import Calibrator as Calibrator
    from qnative.calibration import LayerCalibration as LayerCalibration
    from qnative.calibration import QuantizationSpec as QuantizationSpec
    from qnative.calibration import calibrate_layer as calibrate_layer
    from qnative.calibration import calibrate_model as calibrate_model
    from qnative.config import FakeQuantConfig as FakeQuantConfig
    from qnative.config import ObserverMethod as ObserverMethod
    from qnative.config import QParams as QParams
    from qnative.config import QuantConfig as QuantConfig
    from qnative.config import QuantGranularity as QuantGranularity
    from qnative.config import QuantMode as QuantMode
    from qnative.config import qparams_from_range as qparams_from_range
    from qnative.conversion import quantize_model as quantize_model
    from qnative.conversion import quantize_named_parameters as quantize_named_parameters
    from qnative.elementwise import dequantize as dequantize
    from qnative.elementwise import fake_quantize as fake_quantize
    from qnative.elementwise import quantize as quantize
    from qnative.elementwise import sqnr as sqnr
    from qnative.fake_quant import FakeQuantize as FakeQuantize
    from qnative.floats import decode as decode
    from qnative.floats import encode as encode
    from qnative.linear import QuantizedLinear as QuantizedLinear
    from qnative.linear import quantize_bias as quantize_bias
    from qnative.model import QuantizedModel as QuantizedModel
    from qnative.model import quantization_stats as quantization_stats
    from qnative.observers import CalibrationCollector as CalibrationCollector
    from qnative.observers import Observer as Observer
    from qnative.observers import make_observer as make_observer
    from qnative.qat import QATLinear as QATLinear
    from qnative.qat import tensor_from_torch as tensor_from_torch
    from qnative.report import LayerReport as LayerReport
    from qnative.report import compare as compare
    from qnative.stats import QuantStats as QuantStats
    from qnative.storage import FormatError as FormatError
    from qnative.tensor import QuantizedTensor as QuantizedTensor
    from qnative.tensor import dequantize_tensor as dequantize_tensor
    from qnative.tensor import quantize_tensor as quantize_tensor

__version__ = "0.1.0"

_NAMES = {
    "calibration": (
        "CalibrationDataset",
        "Calibrator",
        "LayerCalibration",
        "QuantizationSpec",
        "calibrate_layer",
        "calibrate_model",
    ),
    "config": (
        "FakeQuantConfig",
        "ObserverMethod",
        "QParams",
        "QuantConfig",
        "QuantGranularity",
        "QuantMode",
        "qparams_from_range",
    ),
    "elementwise": ("dequantize", "fake_quantize", "quantize", "sqnr"),
    "fake_quant": ("FakeQuantize",),
    "floats": ("decode", "encode"),
    "linear": ("QuantizedLinear", "quantize_bias"),
    "conversion": ("quantize_model", "quantize_named_parameters"),
    "model": ("QuantizedModel", "quantization_stats"),
    "observers": ("CalibrationCollector", "Observer", "make_observer"),
    "qat": ("QATLinear", "tensor_from_torch"),
    "report": ("LayerReport", "compare"),
    "stats": ("QuantStats",),
    "storage": ("FormatError",),
    "tensor": (
        "QuantizedTensor",
        "dequantize_tensor",
        "quantize_tensor",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["get_num_threads", "isa", "num_threads", "set_num_threads", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qnative' has no attribute {name!r}")
    value = getattr(import_module(f"qnative.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
