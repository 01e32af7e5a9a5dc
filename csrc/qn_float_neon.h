/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The float products of every NEON kernel, compiled once for all of them.
 */
#ifndef QN_FLOAT_NEON_H
#define QN_FLOAT_NEON_H

#include "qn_gemm.h"

void qn_neon_tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc);
void qn_neon_float_direct(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, float *out);
void qn_neon_decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled, float *out,
                    int64_t stride);

#endif
