/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The float products of kernels, one set for each width of vectors, compiled once for all kernels that have it.
 */
#ifndef QN_FLOAT_VECTOR_H
#define QN_FLOAT_VECTOR_H

#include "qn_gemm.h"

#define QN_FLOAT_PRODUCTS(NAME)                                                                                         \
    void qn_##NAME##_tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc);          \
    void qn_##NAME##_float_direct(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel,         \
                                  int panels, float *out);                                                              \
    void qn_##NAME##_decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled,    \
                            float *out, int64_t stride);

QN_FLOAT_PRODUCTS(avx2)
QN_FLOAT_PRODUCTS(avx512)
QN_FLOAT_PRODUCTS(neon)

/* The set itself, behind qn_float.h in the file of a width. */
#define QN_DEFINE_FLOAT_PRODUCTS(NAME)                                                                                  \
    void qn_##NAME##_tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc) {         \
        tile_float(rows, panels, k, a, b, acc);                                                                        \
    }                                                                                                                  \
    void qn_##NAME##_float_direct(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel,         \
                                  int panels, float *out) {                                                             \
        float_direct(c, rows, row, count, panel, panels, out);                                                         \
    }                                                                                                                  \
    void qn_##NAME##_decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled,    \
                            float *out, int64_t stride) {                                                               \
        decode(w, panel, g, k0, k, scaled, out, stride);                                                               \
    }

#endif
