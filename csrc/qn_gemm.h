/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The contract of the linear layer: operand layouts, exactness bounds, one entry per operation.
 *
 *   y[m][n] = epilogue( sum over k of (a[m][k] - za[m]) * (w[n][k] - zw[n]) )
 *
 * One call of `qn_linear` goes, for each block of rows: quantize the rows -> integer product, tile by tile ->
 * one epilogue per tile (zero points, scales, bias, activation, requantize). An int32 tile never leaves the cache.
 *
 * Activations ("A"): one row after another, codes always unsigned here, 0..255. Signed codes arrive as code ^ 0x80,
 * with 128 added to their zero point. A kernel stores a code in one byte or two (`a_bytes`).
 *
 * Weights ("B"): panels of QN_NR = 16 columns (outputs). Everything an output needs lies with its panel:
 *
 *   panel p (columns 16p .. 16p+15), panel_bytes long, 64-byte aligned:
 *     bias   [16]            float or int32          (if any)
 *     scale  [groups][16]    float
 *     sum    [groups][16]    int32, sum of the group's codes (for products of integers)
 *     zero   [groups][16]    int32                   (if any is not 0)
 *     codes  [groups][group_k / 4][16][4]   int8:  one k-step is 64 bytes, 4 consecutive k for each column
 *            k-step 0: | n0: k0 k1 k2 k3 | n1: k0 k1 k2 k3 | ... | n15: k0 k1 k2 k3 |
 *            k-step 1: | n0: k4 k5 k6 k7 | ...
 *            int4: two k-steps share 64 bytes, the even one in the low nibbles, the odd one in the high nibbles
 *   int4's panel is what its file is: scales of their own width, and zero points, unless all are one, as nibbles [groups][16],
 *   the first column's in the lowest bits. Small groups have no sums: unpacking finds them.
 *            float8: as int8, one code a byte
 *
 * The layout is the same for every instruction set: what one packs, any can run. k is padded with zero codes to
 * group_k, a multiple of 8, in every group, and n to whole panels, so no kernel has a tail over k or n. Groups: k is
 * cut into groups of `group` that have scales of their own; per channel and per tensor are one group of all k.
 *
 * Exactness: sums are taken modulo 2^32 and are right whenever the true sum fits int32. Where K is so large that it
 * might not (the caller computes the bound and sets `wide`), partial sums over QN_SEGMENT of k are added in int64.
 *
 * Floats are combined in one order everywhere, without contraction (compile with -ffp-contract=off):
 *   product = fl( fl(float(acc)) * fl(sx * sw) ); groups are added in ascending order; then + bias; then the activation.
 *   Float activations: one chain of fused multiply-adds an output, k ascending from 0, over weights that are decoded,
 *   fl((code - zero) * scale).
 */
#ifndef QN_GEMM_H
#define QN_GEMM_H

#include <stdint.h>

enum {
    QN_NR = 16,           /* columns of a panel */
    QN_KR = 4,            /* consecutive k in a 32-bit lane */
    QN_K_PAD = 8,         /* a group's k is padded to a multiple of this: two k-steps */
    QN_SEGMENT = 32768,   /* k whose raw sum of u8 * s8 surely fits int32: 255 * 128 * 32768 < 2^31 */
    QN_PAIR_GROUP = 128,  /* k whose sum of differences of codes surely fits int16: 255 * 128 < 2^15 */
    QN_MAX_K = 1 << 23,   /* sums of codes fit int32 up to here: 255 * 2^23 < 2^31 */
    QN_TERM_BYTES = 128,  /* an unpacked group's scales and pairs, of a panel */
    QN_TILE_ROWS = 8,     /* no kernel's tile is larger than this */
    QN_TILE_PANELS = 3,
    QN_TILE_COLS = QN_TILE_PANELS * QN_NR,
    QN_ANY_PANELS = 1 << 30,
    QN_TILE_VALUES = 8 * 48 /* rows * columns of a `layer_tile` at most, whatever its form */
};

static inline int64_t qn_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t qn_round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

typedef enum { QN_INT8, QN_INT4, QN_FLOAT8_E4M3FN, QN_FLOAT8_E5M2 } qn_format;

typedef enum { QN_SCALE_FLOAT32, QN_SCALE_FLOAT16, QN_SCALE_BFLOAT16 } qn_scale;

/* How a row of activations becomes codes. */
typedef enum {
    QN_INPUT_FLOAT,              /* it does not: float32 times decoded weights */
    QN_INPUT_STATIC,             /* one scale and zero point given for all rows */
    QN_INPUT_DYNAMIC,            /* each row its own: uint8 over its range, ONNX DynamicQuantizeLinear */
    QN_INPUT_DYNAMIC_SYMMETRIC,  /* each row its own: -127..127, scale max|x| / 127 */
    QN_INPUT_INT8_CODES,         /* codes already, with the static scale and zero point */
    QN_INPUT_UINT8_CODES
} qn_input;

typedef enum { QN_OUTPUT_FLOAT32, QN_OUTPUT_INT8, QN_OUTPUT_UINT8, QN_OUTPUT_ACC32, QN_OUTPUT_ACC64 } qn_output;

typedef enum { QN_IDENTITY, QN_RELU, QN_GELU, QN_GELU_TANH, QN_SILU } qn_activation;

typedef enum { QN_NO_BIAS, QN_BIAS_FLOAT32, QN_BIAS_INT32 } qn_bias;

/* A packed weight matrix. Read-only once packed; any number of threads may share it. */
typedef struct {
    qn_format format;
    qn_bias bias;
    int32_t asymmetric;                /* there are zero points */
    int32_t has_sums;                  /* sums of codes are stored */
    qn_scale scale;                    /* how int4 holds scales; others as float32 */
    int32_t one_zero;                  /* int4: the zero point of all, or -1 */
    int64_t n, k;                      /* out_features, in_features */
    int64_t group, groups, group_k;    /* k in a group; groups; a group's k as padded */
    int64_t panels, panel_bytes;
    int64_t bias_at, scale_at, sum_at, zero_at, codes_at; /* byte offsets in a panel */
    uint8_t *data;                     /* panels * panel_bytes, 64-byte aligned */
} qn_weights;

/* One forward call: y = layer(x). */
typedef struct {
    const qn_weights *w;
    qn_input input;
    qn_output output;
    qn_activation activation;
    int32_t wide;                            /* accumulate in int64 */
    int64_t m;
    const void *x;                           /* [m][k], float or codes */
    int64_t x_stride;                        /* bytes from row to row; elements of a row are contiguous */
    float in_scale;                          /* static input; zero point and range as unsigned codes (signed ones + 128) */
    int32_t in_zero, in_min, in_max;
    void *y;                                 /* [m][n]; accumulators [m][groups][n] */
    int64_t y_stride;
    float out_scale;                         /* integer output */
    int32_t out_zero, out_min, out_max;
} qn_call;

/* A block of quantized rows. */
typedef struct {
    int64_t first, count;   /* rows of the call */
    uint8_t *a;             /* codes, or floats for float8 weights, or x itself */
    int64_t a_stride;       /* bytes */
    float *scale;           /* [count] */
    int32_t *zero;          /* [count], of the unsigned code */
    int32_t *sum;           /* of the codes of row i, group g, at i * sum_row + g * sum_group; for `tile_groups` pairs, see there */
    int64_t sum_row, sum_group;
} qn_rows;

/* Some groups of a tile's rows and panels, unpacked, for `tile_groups`. */
typedef struct {
    int rows, panels;
    int64_t groups, group_k;
    const uint8_t *a;            /* the rows' codes of these groups */
    int64_t a_stride;
    const uint8_t *codes, *terms; /* as `unpack_groups` has made them, panels beside each other in a k-step, and in a group */
    const int32_t *pairs;        /* [groups][pairs_stride], of which a group's first are the rows' */
    int64_t pairs_stride;
    const float *row_scale;      /* [rows] */
    const float *before;         /* [rows][QN_TILE_COLS], what the products are added to, to give */
    float *sum;                  /* [rows][QN_TILE_COLS]; `before` itself but for the first groups */
    /* What will be unpacked next: `ask` bytes in each of the first `asking` groups, from `ahead` on, and from `ahead_apart` bytes on
     * for the next panel. */
    const uint8_t *ahead;
    int64_t ahead_apart;
    int32_t ask, asking;
} qn_group_tile;

/* An instruction set's operations. Tiles are written as [rows][QN_TILE_COLS]. */
typedef struct {
    const char *name;
    int (*usable)(void);
    int32_t a_bytes;                 /* bytes an activation code takes */
    int32_t rate, float_rate;        /* multiply-adds a ns, roughly */
    int32_t rows, panels;            /* the largest tile */
    int32_t float_rows, float_panels; /* the largest with decoded weights */
    int32_t direct_rows, direct_most; /* the largest tile of `float_direct`; for how many rows it is quickest; 0 where there is none */
    /* The whole way of int8 weights with one group: product and epilogue of a tile while its sums are in registers. It takes
     * up to layer_rows rows, and of count rows (or 8, if there are more) up to layer_panels[count] panels. `ask` bytes from
     * `ahead` on will be needed next. May be NULL. */
    int32_t layer_rows;
    int32_t layer_panels[QN_TILE_ROWS + 1];
    void (*layer_tile)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels,
                       const uint8_t *ahead, int64_t ask);
    /* Quantize rows->count rows of the call into rows->a, with scales, zero points and sums. */
    void (*quantize_rows)(const qn_call *c, qn_rows *rows);
    /* The least and greatest of x[n] and 0, where all are finite, which it returns; else those of the finite ones. */
    int (*range)(const float *x, int64_t n, float *low, float *high);
    /* codes[n] = clamp(rint(x / scale) + zero, low, high), a byte each. */
    void (*quantize_values)(const float *x, int64_t n, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *codes);
    /* acc = sum over k (a multiple of QN_K_PAD) of a * b; b points into the first panel's codes. */
    void (*tile_int8)(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc);
    void (*tile_int4)(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc);
    /* Int8 and int4 weights with small groups (of at most QN_PAIR_GROUP). `unpack_groups` unpacks groups [first, first +
     * groups) of panels [panel, panel + panels): a k-step of codes is 64 bytes a panel, as int8's; int4's are 0..15. A group's
     * terms, of each panel, are its scales, float [16], and pairs of int16 [16]: the sum of codes and, times 2^16, the zero point.
     * The rows' pairs are minus a row's zero point and, times 2^16, minus its sum of codes less the zero points: one multiply-add
     * of pairs takes both corrections off. `tile_groups` adds the groups' products in ascending order, rows up to group_rows by
     * panels up to group_panels. May be NULL. */
    int32_t group_rows, group_panels;
    void (*unpack_groups)(const qn_weights *w, int64_t panel, int panels, int64_t first, int64_t groups, uint8_t *codes,
                          uint8_t *terms);
    void (*tile_groups)(const qn_group_tile *t);
    /* Make of a panel of int4 weights one of `to`, which is int8 without zero points: they are taken off the codes, which then
     * are -15..15. May be NULL. */
    void (*unpack_panel)(const qn_weights *w, const uint8_t *panel, const qn_weights *to, uint8_t *out);
    /* The whole way of one row by panels [first, last) of int4 weights with small groups. May be NULL. */
    void (*row_groups)(const qn_call *c, const qn_rows *rows, int64_t row, int64_t first, int64_t last);
    /* acc = fma(a[k], b[k], acc), k ascending; a is [k / 4][rows][4], the last k / 4 perhaps not full, b is
     * [k][panels * 16] decoded weights. */
    void (*tile_float)(int rows, int panels, int64_t k, const float *a, const float *b, float *acc);
    /* The whole product of a few rows of floats: weights are decoded in registers, out gets the finished sums but for the
     * bias. It may write direct_rows rows. */
    void (*float_direct)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, float *out);
    /* Decode k weights of one panel and group, from k0 on, into out[k][stride]; times their scale if `scaled`. */
    void (*decode)(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled, float *out,
                   int64_t stride);
    /* Finish group g of a tile: acc (integer sums) or converted (the same as float, corrected) is given; sum carries the
     * groups' products from one group to the next; the last group writes y. With neither, sum holds all of them. */
    void (*epilogue)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, int64_t g,
                     const int32_t *acc, const float *converted, float *sum);
} qn_kernel;

/* Every kernel compiled in, worst first, ended by a NULL name. */
extern const qn_kernel *const qn_kernels[];
extern const qn_kernel qn_kernel_scalar, qn_kernel_avx2, qn_kernel_avxvnni, qn_kernel_vnni256, qn_kernel_avx512vnni;
extern const qn_kernel qn_kernel_neon, qn_kernel_dotprod, qn_kernel_i8mm;

/* CPU features as the operating system lets us use them. */
typedef struct {
    int sse42, avx2, fma, f16c, avx_vnni, avx512f, avx512bw, avx512vl, avx512dq, avx512_vnni, amx_int8;
    int neon, dotprod, i8mm;
} qn_cpu;
const qn_cpu *qn_cpu_features(void);

/* Runs task(context, thread) on up to so many threads, the calling one (0) among them, and returns when all have ended. */
typedef void (*qn_share)(int threads, void (*task)(void *context, int thread), void *context);

/* Fill in the sizes and offsets of w from what is above them, n, k and group. */
void qn_weights_layout(qn_weights *w);
/* Pack 16 (or fewer) rows of codes into panel p, with the sums of its groups; codes [count][k], one a byte. */
void qn_pack_panel(const qn_kernel *kernel, const qn_weights *w, int64_t p, const int8_t *codes, int64_t stride, int count);

/* What a matrix is packed from: n rows, `stride` bytes apart, of codes, one a byte (int4: nibbles, two a byte, the first in
 * the low one), or of floats that become int8 codes low..high; scale, as `scale_type` has it (int4: as w->scale), and zero
 * [n][groups] (zero where asymmetric), and a bias [n]. */
typedef struct {
    const void *codes;
    const float *values; /* not both */
    int64_t stride;
    int32_t low, high;
    const void *scale;
    qn_scale scale_type;
    const int8_t *zero;
    const void *bias;
} qn_source;

/* Pack a matrix into w->data; returns 0 where there was no memory for scratch. */
int qn_pack(const qn_kernel *kernel, const qn_weights *w, const qn_source *from, int threads, qn_share share);
/* The scale and zero point of column n, group g. */
float qn_weight_scale(const qn_weights *w, int64_t n, int64_t g);
int32_t qn_weight_zero(const qn_weights *w, int64_t n, int64_t g);
void qn_unpack_panel(const qn_weights *w, int64_t p, int8_t *codes, int64_t stride, int count);

/* The range of each row of x [n][k], rows `stride` bytes apart, extended to contain 0; returns how many are all finite. */
int64_t qn_ranges(const qn_kernel *kernel, const float *x, int64_t n, int64_t k, int64_t stride, float *low, float *high,
                  int threads, qn_share share);

/* About how long a call takes one thread, ns. */
int64_t qn_linear_work(const qn_kernel *kernel, const qn_call *c);
/* Bytes of scratch that a call needs (64-byte aligned), and the call; `share` is used where threads > 1. */
int64_t qn_scratch_bytes(const qn_kernel *kernel, const qn_call *c, int threads);
void qn_linear(const qn_kernel *kernel, const qn_call *c, uint8_t *scratch, int threads, qn_share share);

/* Weights with small groups, a part of the call: whether the kernel adds up the groups by itself; bytes of scratch of a thread;
 * rows of a block by panels [first, last); and the rows' sums of codes into the pairs that `tile_groups` takes. */
int qn_sums_groups(const qn_kernel *kernel, const qn_call *c);
int64_t qn_groups_scratch(const qn_weights *w, int64_t rows);
void qn_groups_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                     uint8_t *scratch);
void qn_pair_sums(const qn_call *c, const qn_rows *rows);

/* One element's activation function, for tests and for the reference order of operations. */
float qn_activate(float x, qn_activation activation);

#endif
