# cython: boundscheck=False
"""The linear layer: packed weights, one forward call, and which kernel runs.

a) `PackedLinear` owns the packed panels and the fixed part of a call. They are written once, by `_pack`; after that they
   are read-only, so any number of threads may call one object. `qnative.QuantizedLinear` derives from it, so that calling
   a layer is calling this class, without a Python frame between.
b) A call looks at its arrays' type, shape and memory here, every time. What it cannot take as it is, it hands to the
   derived class's `_as_input` and `_check_out`, which convert or explain, and looks again.
c) Then it is one C call, without the GIL unless it is over sooner than another thread could have it.
"""

import os

import numpy as np

cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from qnative._core.qn_gemm cimport *
from qnative._core.qnative_threads cimport pool_run, pool_threads_for

cnp.import_array()

cdef extern from "Python.h":
    int PyTraceMalloc_Track(unsigned int domain, uintptr_t memory, size_t bytes) nogil
    int PyTraceMalloc_Untrack(unsigned int domain, uintptr_t memory) nogil

cdef unsigned int TRACE_DOMAIN = 0x716E  # "qn": so that tracemalloc counts the weights

# A call that takes less is over before another thread could have got and given back the GIL.
cdef int64_t KEEP_GIL_NS = 5000
# Time to quantize and pack an element, and to find the range of one, on one thread; roughly.
cdef int64_t PACK_PS = 300, RANGE_PS = 150

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
cdef dict OUTPUT_TYPES = {
    "float32": cnp.NPY_FLOAT32, "int8": cnp.NPY_INT8, "uint8": cnp.NPY_UINT8, "acc32": cnp.NPY_INT32, "acc64": cnp.NPY_INT64,
}
cdef dict ACTIVATIONS = {
    None: QN_IDENTITY, "relu": QN_RELU, "gelu": QN_GELU, "gelu_tanh": QN_GELU_TANH, "silu": QN_SILU,
}


# Which kernel

cdef const qn_kernel *kernel_named(str name) except NULL:
    cdef Py_ssize_t i = 0
    while qn_kernels[i] is not NULL:
        if qn_kernels[i].name.decode() == name:
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


cdef dict SCALES = {"float32": QN_SCALE_FLOAT32, "float16": QN_SCALE_FLOAT16, "bfloat16": QN_SCALE_BFLOAT16}


# The layer

cdef bint is_type(cnp.ndarray a, int type) noexcept:
    """Types that are the same but for the name (C's long and long long) count as one."""
    return cnp.PyArray_TYPE(a) == type or cnp.PyArray_EquivTypenums(cnp.PyArray_TYPE(a), type)


cdef bint is_masked(object array) noexcept:
    """Whether an array has a mask, which no kernel would heed."""
    return not cnp.PyArray_CheckExact(array) and isinstance(array, np.ma.MaskedArray)


cdef bint rows_are_contiguous(cnp.ndarray a) noexcept:
    """Aligned, in native byte order, and such that rows (the last axis) are whole and lie at one distance."""
    cdef int n = cnp.PyArray_NDIM(a)
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return False
    return cnp.PyArray_IS_C_CONTIGUOUS(a) or (
        n == 2 and cnp.PyArray_STRIDE(a, 1) == cnp.PyArray_ITEMSIZE(a) and cnp.PyArray_SIZE(a) > 0
    )


cdef int64_t count_rows(cnp.ndarray a) noexcept:
    cdef int64_t rows = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(a) - 1):
        rows *= cnp.PyArray_DIM(a, i)
    return rows


cdef int64_t row_stride(cnp.ndarray a) noexcept:
    """Bytes from a row to the next of an array whose rows are contiguous."""
    cdef int n = cnp.PyArray_NDIM(a)
    if n == 2:
        return cnp.PyArray_STRIDE(a, 0)
    return cnp.PyArray_DIM(a, n - 1) * cnp.PyArray_ITEMSIZE(a)


cdef bint may_overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the memory between the ends of `a`, whose rows are contiguous, and of `b`, which is C-contiguous, overlaps."""
    cdef uintptr_t a_first = <uintptr_t>cnp.PyArray_DATA(a), a_last = a_first
    cdef uintptr_t b_first = <uintptr_t>cnp.PyArray_DATA(b), b_last = b_first + cnp.PyArray_NBYTES(b)
    cdef int64_t further = (count_rows(a) - 1) * row_stride(a)
    if cnp.PyArray_SIZE(a) == 0:
        return False
    a_last += cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) * cnp.PyArray_ITEMSIZE(a)
    if further > 0:
        a_last += further
    else:
        a_first += further
    return a_first < b_last and b_first < a_last


cdef int only_value(const int8_t[:, ::1] zero) noexcept nogil:
    """The value that all entries have, or -1."""
    cdef Py_ssize_t n, g
    cdef int differ = 0
    if zero.shape[0] == 0 or zero.shape[1] == 0:
        return -1
    for n in range(zero.shape[0]):
        for g in range(zero.shape[1]):
            differ |= zero[n, g] ^ zero[0, 0]
        if differ:
            return -1
    return zero[0, 0]


cdef bint compute(const qn_kernel *kernel, const qn_call *c, int threads) noexcept nogil:
    """Make the call; whether there was memory for it."""
    cdef uint8_t *scratch = qn_scratch_take(qn_scratch_bytes(kernel, c, threads))
    if scratch is NULL:
        return False
    qn_linear(kernel, c, scratch, threads, pool_run)
    qn_scratch_give(scratch)
    return True


cdef int execute(const qn_kernel *kernel, const qn_call *c) except -1:
    cdef int64_t work = qn_linear_work(kernel, c)
    cdef bint had_memory
    if c.m == 0 or c.w.n == 0:
        return 0
    if work < KEEP_GIL_NS:
        had_memory = compute(kernel, c, 1)
    else:
        with nogil:
            had_memory = compute(kernel, c, pool_threads_for(work))
    if not had_memory:
        raise MemoryError(f"{qn_scratch_bytes(kernel, c, 1)} bytes of scratch for a thread")
    return 0


cdef class PackedLinear:
    """A weight matrix packed for the kernels, and how to call it; `_pack` fills it, once."""

    cdef qn_weights w
    cdef qn_call call
    cdef int input_type, output_type  # NumPy's numbers; the input's besides float32, or -1
    cdef str output

    def __cinit__(self, *arguments, **settings):
        memset(&self.w, 0, sizeof(self.w))
        memset(&self.call, 0, sizeof(self.call))

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        if self.w.data is not NULL:
            PyTraceMalloc_Untrack(TRACE_DOMAIN, <uintptr_t>self.w.data)
            qn_weights_free(self.w.data)
            self.w.data = NULL

    def _pack(
        self, const uint8_t[:, ::1] codes, const float[:, ::1] values, int64_t k, int64_t group,
        const uint8_t[:, ::1] scale not None, const int8_t[:, ::1] zero, bias, *, str format, str scale_dtype, tuple code_range,
        str input,
        activation, str output, tuple in_params, tuple out_params, bint signed_codes, bint wide,
    ):
        """Pack the weights and set how calls are made.

        Parameters
        ----------
        codes : uint8[n, k], or uint8[n, 4 * ceil(k / 8)] for int4
            int8's bytes (signed codes), nibbles 0..15 packed two a byte, or float8 codes; or None and
        values : float32[n, k]
            Finite weights, which become int8 codes in `code_range` on their way into the panels.
        k : int
            in_features.
        group : int
            k that share a scale; k itself where there are no groups.
        scale : uint8[n, groups * size of a scale]
            The bytes of scales of `scale_dtype`: "float32", "float16" or "bfloat16".
        zero : int8[n, groups] or None
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
        cdef const float[::1] float_bias
        cdef const int32_t[::1] int_bias
        cdef int64_t width = 4 * ((k + 7) // 8) if format == "int4" else k, columns, scale_width
        cdef qn_weights w
        cdef qn_source source
        cdef bint packed, small
        if self.w.data is not NULL:
            raise RuntimeError("the weights are packed already, and another thread may be reading them; make a new layer")
        if output.startswith("acc"):
            raise ValueError(f"a layer's output is not {output}; _run gives accumulators")
        if (codes is None) == (values is None) or (values is not None and format != "int8"):
            raise ValueError("give codes, or for int8 values")
        memset(&w, 0, sizeof(w))
        memset(&source, 0, sizeof(source))
        w.format = FORMATS[format]
        w.n, columns = (values.shape[0], values.shape[1]) if codes is None else (codes.shape[0], codes.shape[1])
        w.k, w.group = k, group
        if not (0 <= k <= QN_MAX_K and 1 <= group <= max(k, 1) and columns == width):
            raise ValueError(f"k={k}, group={group} do not fit {columns} columns")
        w.asymmetric = zero is not None
        # Only products of integers have sums to correct. Small groups of int4 are unpacked first, which finds them.
        small = format == "int4" and group < k and group <= QN_PAIR_GROUP
        w.has_sums = input != "float" and w.format <= QN_INT4 and not small
        source.scale_type = SCALES[scale_dtype]
        if format == "int4":
            w.scale = source.scale_type
            w.one_zero = 0 if zero is None else only_value(zero)
        qn_weights_layout(&w)
        scale_width = w.groups * (4 if source.scale_type == QN_SCALE_FLOAT32 else 2)
        if scale.shape[0] != w.n or scale.shape[1] != scale_width:
            raise ValueError(f"scale must have shape ({w.n}, {scale_width})")
        if zero is not None and (zero.shape[0] != w.n or zero.shape[1] != w.groups):
            raise ValueError(f"zero must have shape ({w.n}, {w.groups})")
        if values is not None and w.groups != 1:
            raise ValueError("values are packed with one scale a row")
        if bias is not None and bias.shape != (w.n,):
            raise ValueError(f"bias must have shape ({w.n},)")
        if bias is None:
            w.bias = QN_NO_BIAS
        elif bias.dtype == "int32":
            w.bias, int_bias = QN_BIAS_INT32, bias
        else:
            w.bias, float_bias = QN_BIAS_FLOAT32, bias
        qn_weights_layout(&w)  # once more: a bias takes room

        self.call.w = &self.w
        self.call.input, self.call.output = INPUTS[input], OUTPUTS[output]
        self.call.activation = ACTIVATIONS[activation]
        self.call.wide = wide
        self.call.in_scale, self.call.in_zero, self.call.in_min, self.call.in_max = in_params
        self.call.out_scale, self.call.out_zero, self.call.out_min, self.call.out_max = out_params
        self.input_type = (cnp.NPY_INT8 if signed_codes else cnp.NPY_UINT8) if input == "static" else -1
        self.output_type = OUTPUT_TYPES[output]
        self.output = output

        w.data = qn_weights_allocate(w.panels * w.panel_bytes)
        if w.data is NULL:
            raise MemoryError(f"{w.panels * w.panel_bytes} bytes for packed weights")
        self.w = w  # from here on `release` frees it
        PyTraceMalloc_Track(TRACE_DOMAIN, <uintptr_t>w.data, w.panels * w.panel_bytes)
        if w.n == 0:
            return
        source.low, source.high = code_range
        source.stride = width * (4 if codes is None else 1)
        source.scale = &scale[0, 0]
        if zero is not None:
            source.zero = &zero[0, 0]
        if w.bias == QN_BIAS_INT32:
            source.bias = &int_bias[0]
        elif w.bias == QN_BIAS_FLOAT32:
            source.bias = &float_bias[0]
        if k > 0 and codes is None:
            source.values = &values[0, 0]
        elif k > 0:
            source.codes = &codes[0, 0]
        with nogil:
            packed = qn_pack(CHOSEN, &self.w, &source, pool_threads_for(w.n * k * PACK_PS // 1000), pool_run)
        if not packed:
            self.release()  # half a matrix is none
            raise MemoryError(f"{QN_NR * k} bytes to pack a panel with")

    @property
    def nbytes(self):
        """Bytes of the packed form: codes, scales, sums, zero points and bias, with their padding."""
        return self.w.panels * self.w.panel_bytes

    @property
    def _groups(self):
        """Scales a row of weights has."""
        return self.w.groups

    def _read_codes(self, uint8_t[:, ::1] out not None):
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

    def _read_scales(self, float[:, ::1] scale not None, int32_t[:, ::1] zero not None):
        """Write the scales and zero points back: float32[n, groups] and int32[n, groups]."""
        cdef int64_t n, g
        if (scale.shape[0], scale.shape[1]) != (self.w.n, self.w.groups) or (
            zero.shape[0], zero.shape[1]) != (self.w.n, self.w.groups):
            raise ValueError(f"scale and zero must have shape ({self.w.n}, {self.w.groups})")
        for n in range(self.w.n):
            for g in range(self.w.groups):
                scale[n, g] = qn_weight_scale(&self.w, n, g)
                zero[n, g] = qn_weight_zero(&self.w, n, g)

    def _read_bias(self, out not None):
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

    def _quantize_rows(
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
        cdef uint64_t mode
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
            mode = qn_enter_default_mode()
            c.m, c.x_stride, rows.count, rows.a_stride = 1, k * 4, 1, width
            rows.sum_row, rows.sum_group = self.w.groups, 1
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
            qn_leave_default_mode(mode)
        PyMem_RawFree(memory)

    # Calling

    cdef int check_packed(self) except -1:
        if self.w.data is NULL:
            raise RuntimeError("this layer has no weights: its __init__ has not run, or has failed; make a new one")
        return 0

    cdef bint takes(self, object x) noexcept:
        """Whether x can be read as it is."""
        cdef cnp.ndarray a
        cdef int n
        if not cnp.PyArray_Check(x) or is_masked(x):
            return False
        a = <cnp.ndarray>x
        n = cnp.PyArray_NDIM(a)
        return (
            n >= 1 and cnp.PyArray_DIM(a, n - 1) == self.w.k and rows_are_contiguous(a)
            and (cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(a) == self.input_type)
        )

    cdef bint can_write(self, object out, cnp.ndarray x) noexcept:
        """Whether out is where the result for x can be written to."""
        cdef cnp.ndarray y
        cdef int i, n = cnp.PyArray_NDIM(x)
        if not cnp.PyArray_Check(out) or is_masked(out):
            return False
        y = <cnp.ndarray>out
        if not (is_type(y, self.output_type) and cnp.PyArray_NDIM(y) == n and cnp.PyArray_ISCARRAY(y)):
            return False
        for i in range(n - 1):
            if cnp.PyArray_DIM(y, i) != cnp.PyArray_DIM(x, i):
                return False
        return cnp.PyArray_DIM(y, n - 1) == self.w.n and not may_overlap(x, y)

    cdef object make_output(self, cnp.ndarray x):
        cdef cnp.npy_intp shape[64]  # as many dimensions as an array can have
        cdef int i, n = cnp.PyArray_NDIM(x)
        for i in range(n - 1):
            shape[i] = cnp.PyArray_DIM(x, i)
        shape[n - 1] = self.w.n
        return cnp.PyArray_EMPTY(n, shape, self.output_type, 0)

    cdef object forward(self, object x, object out, const qn_kernel *kernel):
        cdef qn_call c = self.call
        self.check_packed()
        if not self.takes(x):
            x = self._as_input(x)
            if not self.takes(x):
                raise TypeError(f"_as_input gave {type(x).__name__}, which this layer cannot read")
        if out is None:
            out = self.make_output(x)
        elif not self.can_write(out, x):
            self._check_out(out, x)
            raise ValueError("out is not where the result for x can be written to")
        self.set_arrays(&c, x, out, self.w.n)
        execute(kernel, &c)
        return out

    cdef void set_arrays(self, qn_call *c, cnp.ndarray x, cnp.ndarray y, int64_t columns) noexcept:
        """x must be taken, and y C-contiguous with `columns` entries for each row of x."""
        if cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT32:
            c.input = QN_INPUT_INT8_CODES if self.input_type == cnp.NPY_INT8 else QN_INPUT_UINT8_CODES
        c.m = count_rows(x)
        c.x, c.x_stride = cnp.PyArray_DATA(x), row_stride(x)
        c.y, c.y_stride = cnp.PyArray_DATA(y), columns * cnp.PyArray_ITEMSIZE(y)

    def __call__(self, x, out=None):
        """Run the layer.

        Parameters
        ----------
        x : array_like, shape (..., in_features)
            float32 (other floats are rounded to it first); with static activations also the codes themselves. Whole rows
            at any distance from each other are read where they lie; others are copied.
        out : numpy.ndarray, shape (..., out_features), optional
            Where to write the result: C-contiguous, of the result's dtype, sharing no memory with x.

        Returns
        -------
        numpy.ndarray
            float32, or the output's codes (int8 or uint8).

        Raises
        ------
        ValueError
            If x or out has the wrong shape, or out cannot be written to directly.
        TypeError
            If x is neither of floats nor of this layer's codes, or if x or out is a masked array.
        """
        return self.forward(x, out, CHOSEN)

    def _forward(self, x, out=None, str isa=None):
        """Run the layer, on a named kernel if `isa` is given (tests compare them)."""
        return self.forward(x, out, CHOSEN if isa is None else kernel_named(isa))

    def _run(self, x not None, y not None, str output not None, str isa=None):
        """y = the layer's output, or the accumulators before it ("acc32", "acc64"), of x, which must need no conversion.

        y : [..., n] of the output's dtype, [..., groups, n] for accumulators; C-contiguous.
        """
        cdef qn_call c = self.call
        cdef const qn_kernel *kernel = CHOSEN if isa is None else kernel_named(isa)
        cdef int64_t columns
        self.check_packed()
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is not one of {', '.join(OUTPUTS)}")
        c.output = OUTPUTS[output]
        if output != self.output:
            if output != ("acc64" if self.call.wide else "acc32"):
                raise ValueError(f"this layer gives {self.output}, not {output}")
            if c.input == QN_INPUT_FLOAT or self.w.format >= QN_FLOAT8_E4M3FN:
                raise ValueError("float products have no accumulators")
        columns = self.w.n * (self.w.groups if output.startswith("acc") else 1)
        if not self.takes(x):
            raise ValueError(f"x must have {self.w.k} columns, and be float32 or codes that lie in whole rows")
        if not (
            cnp.PyArray_Check(y) and is_type(y, OUTPUT_TYPES[output]) and cnp.PyArray_ISCARRAY(y)
            and cnp.PyArray_SIZE(y) == count_rows(x) * columns and not may_overlap(x, y)
        ):
            raise ValueError(f"y must be {output} with {count_rows(x)} rows of {columns}, apart from x")
        self.set_arrays(&c, x, y, columns)
        execute(kernel, &c)


def row_ranges(const float[:, ::1] x not None, float[::1] low not None, float[::1] high not None):
    """Find the range of each row, extended to contain 0: low, high : float32[n]. Returns whether all of x is finite."""
    cdef int64_t n = x.shape[0], k = x.shape[1], finite
    if low.shape[0] != n or high.shape[0] != n:
        raise ValueError(f"low and high must have {n} entries")
    if n == 0 or k == 0:
        low[:] = 0
        high[:] = 0
        return True
    with nogil:
        finite = qn_ranges(
            CHOSEN, &x[0, 0], n, k, 4 * k, &low[0], &high[0], pool_threads_for(n * k * RANGE_PS // 1000), pool_run,
        )
    return finite == n


def scratch_kept():
    """Return how many bytes of scratch the calling thread keeps for its next call."""
    return qn_scratch_kept()


def activate(const float[::1] x not None, str activation, float[::1] out not None):
    """Apply an activation function to x : float32[n], element by element, as the scalar kernel does."""
    cdef qn_activation which = ACTIVATIONS[activation]
    cdef Py_ssize_t i
    cdef uint64_t mode
    if x.shape[0] != out.shape[0]:
        raise ValueError("activate: sizes differ")
    with nogil:
        mode = qn_enter_default_mode()
        for i in range(x.shape[0]):
            out[i] = qn_activate(x[i], which)
        qn_leave_default_mode(mode)
