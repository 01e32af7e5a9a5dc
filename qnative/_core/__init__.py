"""The gate: every native function that Python may call. Nothing else imports the compiled modules.

The contract, for all of them: array arguments are C-contiguous, aligned and in native byte order, inputs may be
read-only, outputs are allocated by the caller and written in full. Sizes are checked here, whatever Python has checked,
and a wrong one raises ValueError; meaning (which dtype, which range, what message a user needs) is Python's.
Long loops run without the GIL.

elementwise   quantize dequantize fake_quantize quantize_float8 dequantize_float8 pack_nibbles unpack_nibbles
fake_quant    fake_quantize_backward
floats        encode encode8 decode decode8
levels        level level_of usable_levels use_level
linear        PackedLinear activate isa isas cpu_features row_ranges scratch_kept
limits        compute_loops run_compute_loop read_loops run_read_loop move_loops run_move_loop
              read_float32
statistics    count_nonfinite min_max histogram histogram_while_it_fits histogram_of_codes squared_sums
threads       MAX_THREADS get_num_threads set_num_threads set_default_threads (compiled as qnative_threads)
"""

from qnative._core.elementwise import (
    dequantize,
    dequantize_float8,
    fake_quantize,
    pack_nibbles,
    quantize,
    quantize_float8,
    unpack_nibbles,
)
from qnative._core.fake_quant import fake_quantize_backward
from qnative._core.floats import decode, decode8, encode, encode8
from qnative._core.levels import level, level_of, usable_levels, use_level
from qnative._core.limits import (
    compute_loops,
    move_loops,
    read_float32,
    read_loops,
    run_compute_loop,
    run_move_loop,
    run_read_loop,
)
from qnative._core.linear import PackedLinear, activate, cpu_features, isa, isas, row_ranges, scratch_kept
from qnative._core.qnative_threads import MAX_THREADS, get_num_threads, set_default_threads, set_num_threads
from qnative._core.statistics import (
    count_nonfinite,
    histogram,
    histogram_of_codes,
    histogram_while_it_fits,
    min_max,
    squared_sums,
)

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
