"""qnative: NumPy-native quantization for CPU inference.

NumPy arrays in, NumPy arrays out: int8, int4 and float8 weights, ranges found from data, and linear layers that run on
integer SIMD kernels with the same bits on every CPU.
"""

from qnative._core import isa
from qnative.config import (
    FakeQuantConfig,
    ObserverMethod,
    QParams,
    QuantConfig,
    QuantGranularity,
    QuantMode,
    qparams_from_range,
)
from qnative.floats import decode, encode
from qnative.linear import QuantizedLinear, quantize_bias
from qnative.tensor import (
    QuantizedTensor,
    dequantize,
    dequantize_tensor,
    fake_quantize,
    quantize,
    quantize_tensor,
    sqnr,
)

__version__ = "0.1.0"
