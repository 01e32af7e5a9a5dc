/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Float products with NEON: 6 rows by 16 columns are 24 sums, four vectors of weights and a broadcast.
 */
#include "qn_float_vector.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#include <string.h>

#include "qn_vector_neon.h"

#define QN_FLOAT_ROWS 6
#define QN_FLOAT_PANELS 1
#define QN_DIRECT_PANELS 2
#define QN_DIRECT_WIDE_ROWS 2
#include "qn_float.h"

void qn_neon_tile_float(int rows, int panels, int64_t k, const float *a, const float *b, float *acc) {
    tile_float(rows, panels, k, a, b, acc);
}

void qn_neon_float_direct(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, float *out) {
    float_direct(c, rows, row, count, panel, panels, out);
}

void qn_neon_decode(const qn_weights *w, const uint8_t *panel, int64_t g, int64_t k0, int64_t k, int scaled, float *out,
                    int64_t stride) {
    decode(w, panel, g, k0, k, scaled, out, stride);
}
#else
typedef int qn_float_neon_is_for_aarch64; /* a translation unit may not be empty */
#endif
