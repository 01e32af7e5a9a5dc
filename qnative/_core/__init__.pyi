"""Types of the gate. The contract of every function is in the docstrings of the .pyx sources."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Float = NDArray[np.float32] | NDArray[np.float64]
_Walk = tuple[int, int, int, int, bool, bool]

__all__ = [
    "MAX_THREADS",
    "PackedLinear",
    "activate",
    "compute_loops",
    "count_nonfinite",
    "cpu_features",
    "decode",
    "decode8",
    "dequantize",
    "dequantize_float8",
    "encode",
    "encode8",
    "fake_quantize",
    "fake_quantize_backward",
    "get_num_threads",
    "histogram",
    "histogram_of_codes",
    "histogram_while_it_fits",
    "isa",
    "isas",
    "level",
    "level_of",
    "min_max",
    "move_loops",
    "pack_nibbles",
    "quantize",
    "quantize_float8",
    "read_float32",
    "read_loops",
    "row_ranges",
    "run_compute_loop",
    "run_move_loop",
    "run_read_loop",
    "scratch_kept",
    "set_default_threads",
    "set_num_threads",
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
) -> bool: ...
def dequantize(
    codes: NDArray[np.uint8],
    is_signed: bool,
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    layout: _Walk,
    low: int,
    high: int,
    out: NDArray[np.float32],
) -> bool: ...
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
) -> bool: ...
def dequantize_float8(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], layout: _Walk, dtype: str, out: NDArray[np.float32]
) -> None: ...
def pack_nibbles(codes: NDArray[np.uint8], offset: int, pad: NDArray[np.uint8], out: NDArray[np.uint8]) -> None: ...
def unpack_nibbles(packed: NDArray[np.uint8], offset: int, out: NDArray[np.uint8]) -> None: ...
def squared_sums(x: _Float, y: _Float) -> tuple[float, float, float, float, float]: ...
def histogram(x: _Float, power: NDArray[np.int64], counts: NDArray[np.int64], zeros: NDArray[np.int64]) -> None: ...
def histogram_while_it_fits(
    x: _Float, power: int, counts: NDArray[np.int64], zeros: NDArray[np.int64], ends: NDArray[np.float64]
) -> tuple[int, int]: ...
def histogram_of_codes(codes: NDArray[np.uint8], out: NDArray[np.int64]) -> None: ...
def encode(x: _Float, dtype: str, saturate: bool, out: NDArray[np.uint16]) -> None: ...
def encode8(x: _Float, dtype: str, saturate: bool, out: NDArray[np.uint8]) -> None: ...
def decode(codes: NDArray[np.uint16], dtype: str, out: NDArray[np.float32]) -> None: ...
def decode8(codes: NDArray[np.uint8], dtype: str, out: NDArray[np.float32]) -> None: ...
def level() -> str: ...
def level_of(kernel: str) -> str: ...
def usable_levels() -> dict[str, bool]: ...
def use_level(name: str) -> str: ...
def isa() -> str: ...
def isas() -> dict[str, bool]: ...
def cpu_features() -> dict[str, bool]: ...
def compute_loops() -> dict[str, bool]: ...
def read_loops() -> dict[str, bool]: ...
def run_compute_loop(name: str, iterations: int) -> int: ...
def run_read_loop(name: str, data: NDArray[np.uint8], ahead: int = 0, passes: int = 1) -> int: ...
def move_loops() -> dict[str, tuple[int, int, bool]]: ...
def run_move_loop(name: str, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None: ...
def read_float32(x: NDArray[np.float32]) -> float: ...

MAX_THREADS: int

def get_num_threads() -> int: ...
def set_num_threads(n: int | None) -> None: ...
def set_default_threads(find: Callable[[], int]) -> None: ...
def activate(x: NDArray[np.float32], activation: str | None, out: NDArray[np.float32]) -> None: ...

class PackedLinear:
    def _pack(
        self,
        codes: NDArray[np.uint8] | None,
        values: NDArray[np.float32] | None,
        k: int,
        group: int,
        scale: NDArray[np.uint8],
        zero: NDArray[np.int8] | None,
        bias: NDArray[Any] | None,
        *,
        format: str,
        scale_dtype: str,
        code_range: tuple[int, int],
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
    def _groups(self) -> int: ...
    def _read_codes(self, out: NDArray[np.uint8]) -> None: ...
    def _read_scales(self, scale: NDArray[np.float32], zero: NDArray[np.int32]) -> None: ...
    def _read_bias(self, out: NDArray[Any]) -> None: ...
    def _quantize_rows(
        self,
        x: NDArray[np.float32],
        codes: NDArray[np.uint8] | None,
        values: NDArray[np.float32] | None,
        scale: NDArray[np.float32],
        zero: NDArray[np.int32],
    ) -> None: ...
    def __call__(self, x: ArrayLike, out: NDArray[Any] | None = None) -> NDArray[Any]: ...
    def _forward(self, x: ArrayLike, out: NDArray[Any] | None = None, isa: str | None = None) -> NDArray[Any]: ...
    def _run(self, x: NDArray[Any], y: NDArray[Any], output: str, isa: str | None = None) -> None: ...

def row_ranges(x: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> bool: ...
def scratch_kept() -> int: ...
