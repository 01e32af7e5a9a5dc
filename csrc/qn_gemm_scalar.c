/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Plain C11, for every machine: the specification that every other file must equal, bit for bit.
 * Integer sums are kept in uint32, where overflow is defined; two's complement makes them the int32 sums.
 */
#include "qn_gemm.h"

#define QN_W 1
#define QN_A_BYTES 1
typedef float VF;
typedef uint32_t VU;
typedef int32_t VI;

#include <math.h>
#include <string.h>
static inline VF vf_load(const float *p) { return *p; }
static inline void vf_store(float *p, VF v) { *p = v; }
static inline VU vu_load(const uint32_t *p) { return *p; }
static inline void vu_store(uint32_t *p, VU v) { *p = v; }
static inline VF vf_splat(float x) { return x; }
static inline VU vu_splat(uint32_t x) { return x; }
static inline VF vf_rint(VF x) { return rintf(x); }
static inline VF vf_abs(VF x) { return fabsf(x); }
static inline VF vf_min(VF a, VF b) { return a < b ? a : b; }
static inline VF vf_max(VF a, VF b) { return a > b ? a : b; }
static inline VU vu_max(VU a, VU b) { return a > b ? a : b; }
static inline VU vi_max(VU a, VU b) { return (int32_t)a > (int32_t)b ? a : b; }
static inline uint32_t vu_largest(VU a) { return a; }
static inline uint32_t vi_largest(VU a) { return a; }
static inline VF vf_less(VF a, VF b, VF x, VF y) { return a < b ? x : y; }
static inline VF vf_nan_to_zero(VF x) { return x == x ? x : 0.0f; }
static inline VF vf_from_vu(VU v) { return (float)(int32_t)v; }
static inline VU vu_from_vf(VF x) { return (uint32_t)(int32_t)x; }
static inline VF vf_bits(VU v) { VF x; memcpy(&x, &v, 4); return x; }
static inline VU vu_bits(VF x) { VU v; memcpy(&v, &x, 4); return v; }
static inline void vu_store_u8(uint8_t *p, VU v) { *p = (uint8_t)v; }
static inline void vu_store_code(uint8_t *p, VU v) { *p = (uint8_t)v; }
static inline VU vu_multiply(VU a, VU b) { return a * b; }
static inline VU vu_store_codes(uint8_t *p, const VU q[4], int32_t z) {
    uint32_t total = 0;
    for (int j = 0; j < 4; j++) {
        int32_t code = (int32_t)q[j] + z;
        p[j] = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
        total += p[j];
    }
    return total;
}
static inline void vu_store_bytes(uint8_t *p, const VU q[4], int32_t z, int32_t b) {
    for (int j = 0; j < 4; j++) p[j] = (uint8_t)(q[j] + (uint32_t)z + (uint32_t)b);
}
static inline VU vu_load_u8(const uint8_t *p) { return *p; }
static inline VU vu_load_u16(const uint16_t *p) { return *p; }

#include "qn_tile.h"

#include "qn_range.h"
#include "qn_rows.h"
#include "qn_epilogue.h"

static void tile_int8(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    for (int m = 0; m < rows; m++) {
        for (int p = 0; p < panels; p++) {
            uint32_t sum[QN_NR] = {0};
            for (int64_t i = 0; i < k; i += QN_KR) {
                const uint8_t *step = b + p * panel_bytes + i * QN_NR;
                for (int n = 0; n < QN_NR; n++)
                    for (int j = 0; j < QN_KR; j++)
                        sum[n] += (uint32_t)(a[m * a_stride + i + j] * (int8_t)step[n * QN_KR + j]);
            }
            memcpy(acc + m * QN_TILE_COLS + p * QN_NR, sum, sizeof sum);
        }
    }
}

static void tile_int4(int rows, int panels, int64_t k, const uint8_t *a, int64_t a_stride, const uint8_t *b,
                      int64_t panel_bytes, int32_t *acc) {
    for (int m = 0; m < rows; m++) {
        for (int p = 0; p < panels; p++) {
            uint32_t sum[QN_NR] = {0};
            for (int64_t i = 0; i < k; i += 2 * QN_KR) {
                const uint8_t *step = b + p * panel_bytes + i * QN_NR / 2;
                const uint8_t *even = a + m * a_stride + i, *odd = even + QN_KR;
                for (int n = 0; n < QN_NR; n++)
                    for (int j = 0; j < QN_KR; j++)
                        sum[n] += (uint32_t)(even[j] * (step[n * QN_KR + j] & 15) + odd[j] * (step[n * QN_KR + j] >> 4));
            }
            memcpy(acc + m * QN_TILE_COLS + p * QN_NR, sum, sizeof sum);
        }
    }
}

static void tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc) {
    int columns = panels * QN_NR;
    for (int m = 0; m < rows; m++)
        for (int64_t i = 0; i < k; i++)
            for (int n = 0; n < columns; n++) {
                float x = a[(i / QN_KR * rows + m) * QN_KR + i % QN_KR];
                acc[m * QN_TILE_COLS + n] = fmaf(x, b[i * columns + n], acc[m * QN_TILE_COLS + n]);
            }
}

static void decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled, float *out,
                   int64_t stride) {
    code_kind kind = kind_of_codes(w);
    int step = k_of_step(kind);
    for (int n = 0; n < QN_NR; n++) {
        decode_terms terms = terms_of_group(kind, w, panel, g, n, scaled);
        for (int64_t i = 0; i < k; i++) {
            uint32_t lane;
            memcpy(&lane, codes_of_group(kind, w, panel, g) + (k0 + i) / step * 64 + n * QN_KR, sizeof lane);
            out[i * stride + n] = decode_one(kind, lane, (int)((k0 + i) % step), &terms);
        }
    }
}

static int always(void) { return 1; }

const qn_kernel qn_kernel_scalar = {
    .name = "scalar", .usable = always, .a_bytes = QN_A_BYTES, .rate = 2, .float_rate = 1, .rows = 4, .panels = 1, .float_rows = 4, .float_panels = 1,
    .quantize_rows = quantize_rows, .range = finite_range, .quantize_values = quantize_values, .tile_int8 = tile_int8, .tile_int4 = tile_int4, .tile_float = tile_float,
    .decode = decode, .epilogue = epilogue,
};

float qn_activate(float x, qn_activation activation) { return activate(x, activation); }
