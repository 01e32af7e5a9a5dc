# cython: boundscheck=False
"""The linear layer: packed weights, one forward call, and which kernel runs.

a) `PackedLinear` owns the packed panels and the fixed part of a call. It is written once, by `__cinit__`; after that it
   is read-only, so any number of threads may call `run` on one object.
b) `run` checks the buffers it is given against the sizes it holds, every time, and then is one C call without the GIL.
c) Scratch is allocated and freed by the call itself.
"""

import os

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uintptr_t
from libc.string cimport memcpy, memset, strcmp

from qnative._core.qn_gemm cimport *

cdef dict FORMATS = {
    "int8": QN_INT8, "int4": QN_INT4, "float8_e4m3fn": QN_FLOAT8_E4M3FN, "float8_e5m2": QN_FLOAT8_E5M2,
}
cdef dict INPUTS = {
    "float": QN_INPUT_FLOAT, "static": QN_INPUT_STATIC, "dynamic": QN_INPUT_DYNAMIC,
    "dynamic_symmetric": QN_INPUT_DYNAMIC_SYMMETRIC,
}
cdef dict OUTPUTS = {
    "float32": QN_OUTPUT_FLOAT32, "int8": QN_OUTPUT_INT8, "uint8": QN_OUTPUT_UINT8,
    "acc32": QN_OUTPUT_ACC32, "acc64": QN_OUTPUT_ACC64,
}
cdef dict OUTPUT_BUFFERS = {  # how an output's elements are spelled by the buffer protocol
    "float32": (b"f",), "int8": (b"b",), "uint8": (b"B",), "acc32": (b"i", b"l"), "acc64": (b"q", b"l"),
}
cdef dict OUTPUT_BYTES = {"float32": 4, "int8": 1, "uint8": 1, "acc32": 4, "acc64": 8}
cdef dict ACTIVATIONS = {
    None: QN_IDENTITY, "relu": QN_RELU, "gelu": QN_GELU, "gelu_tanh": QN_GELU_TANH, "silu": QN_SILU,
}


# Which kernel

cdef const qn_kernel *kernel_named(str name) except NULL:
    cdef Py_ssize_t i = 0
    while qn_kernels[i] is not NULL:
        if qn_kernels[i].name == name.encode():
            if not qn_kernels[i].usable():
                raise RuntimeError(f"this CPU cannot run {name!r}; usable: {', '.join(n for n, u in isas().items() if u)}")
            return qn_kernels[i]
        i += 1
    raise RuntimeError(f"{name!r} is not an instruction set of this build; compiled in: {', '.join(isas())}")


def isas():
    """Return the kernels compiled in, worst first, as a dict: name -> can this CPU run it."""
    cdef Py_ssize_t i = 0
    found = {}
    while qn_kernels[i] is not NULL:
        found[qn_kernels[i].name.decode()] = bool(qn_kernels[i].usable())
        i += 1
    return found


cdef const qn_kernel *choose() except NULL:
    """The last usable kernel, or the one that QNATIVE_ISA names."""
    forced = os.environ.get("QNATIVE_ISA")
    if forced:
        try:
            return kernel_named(forced)
        except RuntimeError as error:
            raise RuntimeError(f"QNATIVE_ISA={forced}: {error}. Unset it to let qnative choose.") from None
    best = "scalar"
    for name, usable in isas().items():
        best = name if usable else best
    return kernel_named(best)


cdef const qn_kernel *CHOSEN = choose()


def isa():
    """Return the name of the kernel that runs."""
    return CHOSEN.name.decode()


def cpu_features():
    """Return what this CPU can do, as far as the operating system lets programs use it: a dict name -> bool."""
    cdef const qn_cpu *c = qn_cpu_features()
    return {
        "sse42": bool(c.sse42), "avx2": bool(c.avx2), "fma": bool(c.fma), "f16c": bool(c.f16c),
        "avx_vnni": bool(c.avx_vnni), "avx512f": bool(c.avx512f), "avx512bw": bool(c.avx512bw),
        "avx512vl": bool(c.avx512vl), "avx512dq": bool(c.avx512dq), "avx512_vnni": bool(c.avx512_vnni),
        "amx_int8": bool(c.amx_int8), "neon": bool(c.neon), "dotprod": bool(c.dotprod), "i8mm": bool(c.i8mm),
    }


# The layer

cdef class PackedLinear:
    """A weight matrix packed for the kernels, and how to call it.

    Parameters
    ----------
    codes : uint8[n, k], or uint8[n, 4 * ceil(k / 8)] for int4
        int8's bytes (signed codes), nibbles 0..15 packed two a byte, or float8 codes.
    k : int
        in_features.
    group : int
        k that share a scale; k itself where there are no groups.
    scale : float32[n, groups]
    zero : int32[n, groups] or None
        Zero points in the terms of `codes`; None where all are 0.
    bias : float32[n], int32[n] or None
    format, input, activation, output : str
        Names as in FORMATS, INPUTS, ACTIVATIONS, OUTPUTS.
    in_params, out_params : (scale, zero, min, max)
        Of a static input (as unsigned codes) and of an integer output.
    signed_codes : bool
        Whether codes given as input are int8 (else uint8).
    wide : bool
        Accumulate in int64.
    """

    cdef qn_weights w
    cdef qn_call call
    cdef void *memory
    cdef bint signed_codes
    cdef readonly str output

    def __cinit__(
        self, const uint8_t[:, ::1] codes not None, int64_t k, int64_t group, const float[:, ::1] scale not None,
        const int32_t[:, ::1] zero, bias, *, str format, str input, str activation, str output,
        tuple in_params, tuple out_params, bint signed_codes, bint wide,
    ):
        cdef const float[::1] float_bias
        cdef const int32_t[::1] int_bias
        cdef int64_t width = 4 * ((k + 7) // 8) if format == "int4" else k
        memset(&self.w, 0, sizeof(self.w))
        memset(&self.call, 0, sizeof(self.call))
        self.w.format = FORMATS[format]
        self.w.n, self.w.k, self.w.group = codes.shape[0], k, group
        if not (0 <= k <= QN_MAX_K and 1 <= group <= max(k, 1) and codes.shape[1] == width):
            raise ValueError(f"k={k}, group={group} do not fit codes of {codes.shape[1]} bytes a row")
        self.w.asymmetric = zero is not None
        if bias is None:
            self.w.bias = QN_NO_BIAS
        elif bias.dtype == "int32":
            self.w.bias, int_bias = QN_BIAS_INT32, bias
        else:
            self.w.bias, float_bias = QN_BIAS_FLOAT32, bias
        qn_weights_layout(&self.w)
        if scale.shape[0] != self.w.n or scale.shape[1] != self.w.groups:
            raise ValueError(f"scale must have shape ({self.w.n}, {self.w.groups})")
        if zero is not None and (zero.shape[0] != self.w.n or zero.shape[1] != self.w.groups):
            raise ValueError(f"zero must have shape ({self.w.n}, {self.w.groups})")
        if bias is not None and bias.shape != (self.w.n,):
            raise ValueError(f"bias must have shape ({self.w.n},)")
        self.memory = PyMem_RawMalloc(self.w.panels * self.w.panel_bytes + 64)
        if self.memory is NULL:
            raise MemoryError(f"{self.w.panels * self.w.panel_bytes} bytes for packed weights")
        self.w.data = <uint8_t *>(<uintptr_t>self.memory + 63 & ~<uintptr_t>63)
        self.pack(codes, scale, zero, float_bias, int_bias)

        self.call.w = &self.w
        self.call.input, self.call.output = INPUTS[input], OUTPUTS[output]
        self.call.activation = ACTIVATIONS[activation]
        self.call.wide = wide
        self.call.in_scale, self.call.in_zero, self.call.in_min, self.call.in_max = in_params
        self.call.out_scale, self.call.out_zero, self.call.out_min, self.call.out_max = out_params
        self.signed_codes = signed_codes
        self.output = output

    def __dealloc__(self):
        PyMem_RawFree(self.memory)

    cdef int pack(
        self, const uint8_t[:, ::1] codes, const float[:, ::1] scale, const int32_t[:, ::1] zero,
        const float[::1] float_bias, const int32_t[::1] int_bias,
    ) except -1:
        cdef int64_t p, n, g, i, k = self.w.k, first
        cdef int count
        cdef bint int4 = self.w.format == QN_INT4, has_zero = zero is not None
        cdef uint8_t *panel
        cdef const uint8_t *row
        cdef float *scales
        cdef int32_t *zeros
        cdef int8_t *nibbles = NULL
        if self.w.n == 0:
            return 0
        if int4:
            nibbles = <int8_t *>PyMem_RawMalloc(QN_NR * k + 1)
            if nibbles is NULL:
                raise MemoryError(f"{QN_NR * k} bytes to unpack codes into")
        with nogil:
            for p in range(self.w.panels):
                panel = self.w.data + p * self.w.panel_bytes
                memset(panel, 0, self.w.codes_at)
                first = p * QN_NR
                count = <int>min(<int64_t>QN_NR, self.w.n - first)
                scales = <float *>(panel + self.w.scale_at)
                zeros = <int32_t *>(panel + self.w.zero_at)
                for n in range(count):
                    for g in range(self.w.groups):
                        scales[g * QN_NR + n] = scale[first + n, g]
                        if has_zero:
                            zeros[g * QN_NR + n] = zero[first + n, g]
                    if self.w.bias == QN_BIAS_INT32:
                        (<int32_t *>(panel + self.w.bias_at))[n] = int_bias[first + n]
                    elif self.w.bias == QN_BIAS_FLOAT32:
                        (<float *>(panel + self.w.bias_at))[n] = float_bias[first + n]
                    if int4:
                        row = &codes[first + n, 0]
                        for i in range(k):
                            nibbles[n * k + i] = row[i // 2] >> 4 if i % 2 else row[i // 2] & 15
                if k == 0:
                    memset(panel + self.w.codes_at, 0, self.w.panel_bytes - self.w.codes_at)
                elif int4:
                    qn_pack_panel(&self.w, p, nibbles, k, count)
                else:
                    qn_pack_panel(&self.w, p, <const int8_t *>&codes[first, 0], k, count)
        PyMem_RawFree(nibbles)
        return 0

    @property
    def nbytes(self):
        """Bytes of the packed form: codes, scales, sums, zero points and bias, with their padding."""
        return self.w.panels * self.w.panel_bytes

    @property
    def groups(self):
        """Scales a row of weights has."""
        return self.w.groups

    def codes(self, uint8_t[:, ::1] out not None):
        """Write the codes back, one a byte: out : uint8[n, k]; nibbles 0..15 for int4."""
        cdef int64_t p
        if out.shape[0] != self.w.n or out.shape[1] != self.w.k:
            raise ValueError(f"out must have shape ({self.w.n}, {self.w.k})")
        if self.w.k == 0 or self.w.n == 0:
            return
        with nogil:
            for p in range(self.w.panels):
                qn_unpack_panel(
                    &self.w, p, <int8_t *>&out[p * QN_NR, 0], self.w.k, <int>min(<int64_t>QN_NR, self.w.n - p * QN_NR),
                )

    def scales(self, float[:, ::1] scale not None, int32_t[:, ::1] zero not None):
        """Write the scales and zero points back: float32[n, groups] and int32[n, groups]."""
        cdef int64_t n, g, at
        cdef const uint8_t *panel
        if (scale.shape[0], scale.shape[1]) != (self.w.n, self.w.groups) or (
            zero.shape[0], zero.shape[1]) != (self.w.n, self.w.groups):
            raise ValueError(f"scale and zero must have shape ({self.w.n}, {self.w.groups})")
        for n in range(self.w.n):
            panel = self.w.data + n // QN_NR * self.w.panel_bytes
            for g in range(self.w.groups):
                at = g * QN_NR + n % QN_NR
                scale[n, g] = (<const float *>(panel + self.w.scale_at))[at]
                zero[n, g] = (<const int32_t *>(panel + self.w.zero_at))[at] if self.w.asymmetric else 0

    def bias(self, out not None):
        """Write the bias back: out : float32[n] or int32[n], as it was given."""
        cdef float[::1] floats
        cdef int32_t[::1] ints
        cdef int64_t n
        if out.shape != (self.w.n,) or self.w.bias == QN_NO_BIAS:
            raise ValueError(f"out must have shape ({self.w.n},) and there must be a bias")
        if self.w.bias == QN_BIAS_INT32:
            ints = out
            for n in range(self.w.n):
                ints[n] = (<const int32_t *>(self.w.data + n // QN_NR * self.w.panel_bytes + self.w.bias_at))[n % QN_NR]
        else:
            floats = out
            for n in range(self.w.n):
                floats[n] = (<const float *>(self.w.data + n // QN_NR * self.w.panel_bytes + self.w.bias_at))[n % QN_NR]

    def quantize_input(
        self, const float[:, ::1] x not None, uint8_t[:, ::1] codes, float[:, ::1] values,
        float[::1] scale not None, int32_t[::1] zero not None,
    ):
        """Quantize rows as a call does (with the scalar kernel: all give the same codes).

        x : float32[m, k]; scale : float32[m]; zero : int32[m]. Integer weights write codes : uint8[m, k], unsigned as
        the kernels have them; float8 weights write values : float32[m, k], of which the codes are the encoding.
        """
        cdef qn_call c = self.call
        cdef qn_rows rows
        cdef int64_t m = x.shape[0], k = self.w.k, g, count, i
        cdef bint float8 = self.w.format >= QN_FLOAT8_E4M3FN
        cdef int64_t width = k * 4 if float8 else self.w.groups * self.w.group_k
        cdef uint8_t *memory
        if x.shape[1] != k or scale.shape[0] != m or zero.shape[0] != m or c.input == QN_INPUT_FLOAT:
            raise ValueError(f"x must have {k} columns, scale and zero {m} entries, and the layer quantized input")
        if (values is None or values.shape[0] != m or values.shape[1] != k) if float8 else (
            codes is None or codes.shape[0] != m or codes.shape[1] != k):
            raise ValueError(f"the output must have shape ({m}, {k})")
        memory = <uint8_t *>PyMem_RawMalloc(width + 4 * self.w.groups + 4)
        if memory is NULL:
            raise MemoryError(f"{width} bytes of scratch")
        memset(&rows, 0, sizeof(rows))
        with nogil:
            c.m, c.x_stride, rows.count, rows.a_stride = 1, k * 4, 1, width
            rows.sum = <int32_t *>memory  # 4-byte aligned, as the values behind it are
            rows.a = memory + 4 * self.w.groups
            for i in range(m if k else 0):
                c.x, rows.scale, rows.zero = &x[i, 0], &scale[i], &zero[i]
                zero[i] = 0
                qn_kernel_scalar.quantize_rows(&c, &rows)
                if float8:
                    memcpy(&values[i, 0], rows.a, k * 4)
                    continue
                for g in range(self.w.groups):
                    count = min(self.w.group, k - g * self.w.group)
                    memcpy(&codes[i, g * self.w.group], rows.a + g * self.w.group_k, count)
        PyMem_RawFree(memory)

    def run(self, x not None, y not None, str output=None, str isa=None):
        """y = layer(x), without the GIL.

        x : float32 or codes [..., k], y : [..., n] of the output's dtype ([..., groups, n] for accumulators); both
        C-contiguous and aligned. `output` asks for another output than the layer's ("acc32", "acc64"), `isa` for another
        kernel than the chosen one.
        """
        cdef qn_call c = self.call
        cdef const qn_kernel *kernel = CHOSEN if isa is None else kernel_named(isa)
        cdef Py_buffer xb, yb
        cdef void *memory = NULL
        cdef int64_t columns, item
        cdef str kind = self.output if output is None else output
        c.output = OUTPUTS[kind]
        if kind != self.output:
            if kind != ("acc64" if self.call.wide else "acc32"):
                raise ValueError(f"this layer gives {self.output}, not {kind}")
            if c.input == QN_INPUT_FLOAT or self.w.format >= QN_FLOAT8_E4M3FN:
                raise ValueError("float products have no accumulators")
        item = OUTPUT_BYTES[kind]
        columns = self.w.n * (self.w.groups if kind.startswith("acc") else 1)
        PyObject_GetBuffer(x, &xb, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
        try:
            PyObject_GetBuffer(y, &yb, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&xb)
            raise
        try:
            if xb.ndim < 1 or xb.shape[xb.ndim - 1] != self.w.k:
                raise ValueError(f"x must have {self.w.k} columns")
            c.m = 1
            for i in range(xb.ndim - 1):
                c.m *= xb.shape[i]
            if strcmp(xb.format, b"f") != 0:
                if c.input != QN_INPUT_STATIC or strcmp(xb.format, b"b" if self.signed_codes else b"B") != 0:
                    raise ValueError(f"x has the buffer format {xb.format.decode()!r}, which this layer does not take")
                c.input = QN_INPUT_INT8_CODES if self.signed_codes else QN_INPUT_UINT8_CODES
            if yb.format not in OUTPUT_BUFFERS[kind] or yb.itemsize != item or yb.len != c.m * columns * item:
                raise ValueError(f"y must be {kind} with {c.m} rows of {columns}")
            if <uintptr_t>xb.buf % xb.itemsize or <uintptr_t>yb.buf % yb.itemsize:
                raise ValueError("x and y must be aligned to their elements")
            if c.m == 0 or columns == 0:
                return
            c.x, c.x_stride = xb.buf, self.w.k * xb.itemsize
            c.y, c.y_stride = yb.buf, columns * item
            memory = PyMem_RawMalloc(qn_scratch_bytes(kernel, &c) + 64)
            if memory is NULL:
                raise MemoryError(f"{qn_scratch_bytes(kernel, &c)} bytes of scratch")
            with nogil:
                qn_linear(kernel, &c, <uint8_t *>(<uintptr_t>memory + 63 & ~<uintptr_t>63))
        finally:
            PyMem_RawFree(memory)
            PyBuffer_Release(&xb)
            PyBuffer_Release(&yb)


def activate(const float[::1] x not None, str activation, float[::1] out not None):
    """Apply an activation function to x : float32[n], element by element, as the scalar kernel does."""
    cdef qn_activation which = ACTIVATIONS[activation]
    cdef Py_ssize_t i
    if x.shape[0] != out.shape[0]:
        raise ValueError("activate: sizes differ")
    with nogil:
        for i in range(x.shape[0]):
            out[i] = qn_activate(x[i], which)
