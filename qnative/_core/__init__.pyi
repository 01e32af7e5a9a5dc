"""Types of the gate. The contract of every function is in the docstrings of the .pyx sources."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Float = NDArray[np.float32] | NDArray[np.float64]
_Walk = tuple[int, int, int, int, bool, bool]

__all__ = [
    "PackedLinear",
    "activate",
    "count_nonfinite",
    "cpu_features",
    "decode8",
    "decode_bfloat16",
    "dequantize",
    "dequantize_float8",
    "encode",
    "encode8",
    "fake_quantize",
    "fake_quantize_backward",
    "histogram_of_codes",
    "isa",
    "isas",
    "level",
    "min_max",
    "pack_nibbles",
    "quantize",
    "quantize_float8",
    "squared_sums",
    "unpack_nibbles",
    "usable_levels",
    "use_level",
]

def count_nonfinite(x: _Float) -> int: ...
def min_max(x: _Float, layout: _Walk, low: _Float, high: _Float) -> int: ...
def quantize(
    x: _Float,
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    layout: _Walk,
    low: int,
    high: int,
    out: NDArray[np.uint8],
) -> None: ...
def dequantize(
    codes: NDArray[np.uint8],
    is_signed: bool,
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    layout: _Walk,
    out: NDArray[np.float32],
) -> None: ...
def fake_quantize(
    x: _Float,
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    layout: _Walk,
    low: int,
    high: int,
    float8: str | None,
    out: NDArray[np.float32],
) -> bool: ...
def fake_quantize_backward(
    x: NDArray[np.float32],
    dy: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    layout: _Walk,
    low: int,
    high: int,
    float8: str | None,
    dx: NDArray[np.float32],
    ds: NDArray[np.float64] | None = None,
    dz: NDArray[np.float64] | None = None,
) -> None: ...
def quantize_float8(
    x: _Float, scale: NDArray[np.float32], layout: _Walk, dtype: str, out: NDArray[np.uint8]
) -> None: ...
def dequantize_float8(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], layout: _Walk, dtype: str, out: NDArray[np.float32]
) -> None: ...
def pack_nibbles(codes: NDArray[np.uint8], offset: int, pad: NDArray[np.uint8], out: NDArray[np.uint8]) -> None: ...
def unpack_nibbles(packed: NDArray[np.uint8], offset: int, out: NDArray[np.uint8]) -> None: ...
def squared_sums(x: _Float, y: _Float) -> tuple[float, float, float, float, float]: ...
def histogram_of_codes(codes: NDArray[np.uint8], out: NDArray[np.int64]) -> None: ...
def encode(x: _Float, dtype: str, saturate: bool, out: NDArray[np.uint16]) -> None: ...
def encode8(x: _Float, dtype: str, saturate: bool, out: NDArray[np.uint8]) -> None: ...
def decode8(codes: NDArray[np.uint8], dtype: str, out: NDArray[np.float32]) -> None: ...
def decode_bfloat16(codes: NDArray[np.uint16], out: NDArray[np.float32]) -> None: ...
def level() -> str: ...
def usable_levels() -> dict[str, bool]: ...
def use_level(name: str) -> str: ...
def isa() -> str: ...
def isas() -> dict[str, bool]: ...
def cpu_features() -> dict[str, bool]: ...
def activate(x: NDArray[np.float32], activation: str | None, out: NDArray[np.float32]) -> None: ...

class PackedLinear:
    output: str
    def __init__(
        self,
        codes: NDArray[np.uint8],
        k: int,
        group: int,
        scale: NDArray[np.float32],
        zero: NDArray[np.int32] | None,
        bias: NDArray[Any] | None,
        *,
        format: str,
        input: str,
        activation: str | None,
        output: str,
        in_params: tuple[float, int, int, int],
        out_params: tuple[float, int, int, int],
        signed_codes: bool,
        wide: bool,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def groups(self) -> int: ...
    def codes(self, out: NDArray[np.uint8]) -> None: ...
    def scales(self, scale: NDArray[np.float32], zero: NDArray[np.int32]) -> None: ...
    def bias(self, out: NDArray[Any]) -> None: ...
    def quantize_input(
        self,
        x: NDArray[np.float32],
        codes: NDArray[np.uint8] | None,
        values: NDArray[np.float32] | None,
        scale: NDArray[np.float32],
        zero: NDArray[np.int32],
    ) -> None: ...
    def run(self, x: NDArray[Any], y: NDArray[Any], output: str | None = None, isa: str | None = None) -> None: ...
