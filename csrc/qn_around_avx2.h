/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What is around the products on vectors of 256 bits (see qn_tile.h), for AVX2 and FMA, which every kernel with such vectors has: compiled
 * once, in qn_around_avx2.c. The functions are those of qn_kernel.
 */
#ifndef QN_AROUND_AVX2_H
#define QN_AROUND_AVX2_H

#include "qn_gemm.h"

#define QN_AROUND(name) qn_avx2_##name
#define QN_AROUND_LINKAGE

void qn_avx2_quantize_rows(const qn_call *c, qn_rows *rows); /* to bytes */
int qn_avx2_finite_range(const float *x, int64_t k, float *low, float *high);
void qn_avx2_quantize_values(const float *x, int64_t n, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *codes);
void qn_avx2_unpack_groups(const qn_weights *w, int64_t panel, int panels, int64_t first, int64_t groups, uint8_t *codes, uint8_t *terms);
void qn_avx2_unpack_panel(const qn_weights *w, const uint8_t *panel, const qn_weights *to, uint8_t *out);

#endif
