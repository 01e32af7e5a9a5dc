/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The range of a row of activations. Made of the verbs that qn_tile.h lists.
 */
#include "qn_quantize.h"

/* The range of the finite entries of x[k], extended to contain 0: every entry is looked at. */
static void range_of_finite(const float *x, int64_t k, float *low, float *high) {
    *low = *high = 0.0f;
    for (int64_t i = 0; i < k; i++) {
        if (!(fabsf(x[i]) < INFINITY)) continue;
        *low = x[i] < *low ? x[i] : *low;
        *high = x[i] > *high ? x[i] : *high;
    }
}

/* The range of the finite entries of x[k], extended to contain 0. As integers, the bits of floats rise with a positive
 * number and, unsigned, with the size of a negative one, infinities and NaN above all numbers: two integer maxima, which
 * more of a core's units can do than float ones, find both ends and whether all is finite, as it nearly always is. Returns
 * that. */
QN_AROUND_LINKAGE int QN_AROUND(finite_range)(const float *x, int64_t k, float *low, float *high) {
    VU lo[4], hi[4]; /* four chains: a maximum takes longer than it takes to start the next */
    for (int j = 0; j < 4; j++) lo[j] = hi[j] = vu_splat(0);
    int64_t i = 0;
    for (; i + 4 * QN_W <= k; i += 4 * QN_W) {
        for (int j = 0; j < 4; j++) {
            VU v = vu_bits(vf_load(x + i + j * QN_W));
            lo[j] = vu_max(v, lo[j]);
            hi[j] = vi_max(v, hi[j]);
        }
    }
    for (; i < k; i += QN_W) {
        VU v = vu_bits(load_some(x + i, k - i));
        lo[0] = vu_max(v, lo[0]);
        hi[0] = vi_max(v, hi[0]);
    }
    uint32_t least = vu_largest(vu_max(vu_max(lo[0], lo[1]), vu_max(lo[2], lo[3])));
    uint32_t most = vi_largest(vi_max(vi_max(hi[0], hi[1]), vi_max(hi[2], hi[3])));
    if (least < 0x80000000u) least = 0; /* nothing is negative */
    if (least >= 0xFF800000u || most >= 0x7F800000u) {
        range_of_finite(x, k, low, high);
        return 0;
    }
    memcpy(low, &least, 4);
    memcpy(high, &most, 4);
    return 1;
}
