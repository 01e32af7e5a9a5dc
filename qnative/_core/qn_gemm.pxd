"""The whole C surface, as the headers in csrc/ declare it."""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t


cdef extern from "qn_gemm.h" nogil:
    enum:
        QN_NR
        QN_MAX_K
        QN_PAIR_GROUP

    ctypedef enum qn_format:
        QN_INT8
        QN_INT4
        QN_FLOAT8_E4M3FN
        QN_FLOAT8_E5M2

    ctypedef enum qn_input:
        QN_INPUT_FLOAT
        QN_INPUT_STATIC
        QN_INPUT_DYNAMIC
        QN_INPUT_DYNAMIC_SYMMETRIC
        QN_INPUT_INT8_CODES
        QN_INPUT_UINT8_CODES

    ctypedef enum qn_output:
        QN_OUTPUT_FLOAT32
        QN_OUTPUT_INT8
        QN_OUTPUT_UINT8
        QN_OUTPUT_ACC32
        QN_OUTPUT_ACC64

    ctypedef enum qn_activation:
        QN_IDENTITY
        QN_RELU
        QN_GELU
        QN_GELU_TANH
        QN_SILU

    ctypedef enum qn_bias:
        QN_NO_BIAS
        QN_BIAS_FLOAT32
        QN_BIAS_INT32

    ctypedef enum qn_scale:
        QN_SCALE_FLOAT32
        QN_SCALE_FLOAT16
        QN_SCALE_BFLOAT16

    ctypedef struct qn_weights:
        qn_format format
        qn_bias bias
        int32_t asymmetric, has_sums, one_zero
        qn_scale scale
        int64_t n, k, group, groups, group_k, panels, panel_bytes
        int64_t bias_at, scale_at, sum_at, zero_at, codes_at
        uint8_t *data

    ctypedef struct qn_call:
        const qn_weights *w
        qn_input input
        qn_output output
        qn_activation activation
        int32_t wide
        int64_t m
        const void *x
        int64_t x_stride
        float in_scale
        int32_t in_zero, in_min, in_max
        void *y
        int64_t y_stride
        float out_scale
        int32_t out_zero, out_min, out_max

    ctypedef struct qn_rows:
        int64_t first, count
        uint8_t *a
        int64_t a_stride
        float *scale
        int32_t *zero
        int32_t *sum
        int64_t sum_row, sum_group

    ctypedef struct qn_kernel:
        const char *name
        int (*usable)() noexcept nogil
        void (*quantize_rows)(const qn_call *c, qn_rows *rows) noexcept nogil

    const qn_kernel qn_kernel_scalar

    const qn_kernel *qn_kernels[]

    ctypedef struct qn_cpu:
        int sse42, avx2, fma, f16c, avx_vnni, avx512f, avx512bw, avx512vl, avx512dq, avx512_vnni, amx_int8
        int neon, dotprod, i8mm

    const qn_cpu *qn_cpu_features() noexcept
    void qn_weights_layout(qn_weights *w) noexcept

    ctypedef void (*qn_share)(int threads, void (*task)(void *context, int thread), void *context) noexcept

    ctypedef struct qn_source:
        const void *codes
        const float *values
        int64_t stride
        int32_t low, high
        const void *scale
        qn_scale scale_type
        const int8_t *zero
        const void *bias

    bint qn_pack(
        const qn_kernel *kernel, const qn_weights *w, const qn_source *source, int threads, qn_share share,
    ) noexcept
    int64_t qn_ranges(
        const qn_kernel *kernel, const float *x, int64_t n, int64_t k, int64_t stride, float *low, float *high, int threads,
        qn_share share,
    ) noexcept
    float qn_weight_scale(const qn_weights *w, int64_t n, int64_t g) noexcept
    int32_t qn_weight_zero(const qn_weights *w, int64_t n, int64_t g) noexcept
    void qn_unpack_panel(const qn_weights *w, int64_t p, int8_t *codes, int64_t stride, int count) noexcept
    int64_t qn_linear_work(const qn_kernel *kernel, const qn_call *c) noexcept
    int64_t qn_scratch_bytes(const qn_kernel *kernel, const qn_call *c, int threads) noexcept
    void qn_linear(const qn_kernel *kernel, const qn_call *c, uint8_t *scratch, int threads, qn_share share) noexcept
    float qn_activate(float x, qn_activation activation) noexcept


cdef extern from "qn_float_mode.h" nogil:
    uint64_t qn_enter_default_mode() noexcept
    void qn_leave_default_mode(uint64_t before) noexcept


cdef extern from "qn_scratch.h" nogil:
    uint8_t *qn_scratch_take(int64_t bytes) noexcept
    void qn_scratch_give(uint8_t *memory) noexcept
    int64_t qn_scratch_kept() noexcept
    uint8_t *qn_weights_allocate(int64_t bytes) noexcept
    void qn_weights_free(uint8_t *memory) noexcept


cdef extern from "qn_limits.h" nogil:
    ctypedef struct qn_compute_loop:
        const char *name
        const char *needs
        uint64_t (*run)(int64_t iterations) noexcept nogil

    ctypedef struct qn_read_loop:
        const char *name
        const char *needs
        uint64_t (*run)(const uint8_t *data, int64_t bytes, int64_t ahead) noexcept nogil

    ctypedef struct qn_move_loop:
        const char *name
        const char *needs
        int read, written
        void (*run)(const uint8_t *source, uint8_t *target, int64_t bytes) noexcept nogil

    const qn_compute_loop qn_compute_loops[]
    const qn_read_loop qn_read_loops[]
    const qn_move_loop qn_move_loops[]
    float qn_read_float32(const float *x, int64_t n) noexcept
