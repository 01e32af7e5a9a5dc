/* SPDX-License-Identifier: BSD-3-Clause
 *
 * From values to codes, a vector at a time. Made of the verbs that qn_tile.h lists.
 */
#ifndef QN_QUANTIZE_H
#define QN_QUANTIZE_H

/* How many of n remaining elements the vector at hand takes. */
QN_INLINE size_t taken(int64_t n) { return n >= QN_W ? QN_W : (size_t)n & (QN_W - 1); }

/* A vector of the first n elements, then zeros. */
QN_INLINE VF load_some(const float *x, int64_t n) {
    float padded[QN_W] = {0};
    if (n >= QN_W) return vf_load(x);
    memcpy(padded, x, taken(n) * sizeof *x);
    return vf_load(padded);
}

/* clamp(rint(x / scale) + zero) as an unsigned code: clamped while it is a float, so that nothing overflows;
 * a NaN becomes the zero point, an infinity the end of the range. */
QN_INLINE VU quantize(VF x, VF scale, VF low, VF high, VU zero) {
    VF t = vf_rint(vf_nan_to_zero(x / scale));
    return vu_from_vf(vf_min(vf_max(t, low), high)) + zero;
}

/* Division by multiplication: with r = fl(1 / s), t = fl(x r) and e = fl(x - t s), fl(t + e r) is fl(x / s), as long as nothing
 * is subnormal or overflows; tests/division.c says why, and has tried every s. (That is Markstein's step, IBM Journal of
 * Research and Development 34, 1990, from a t that need not be one of the two nearest floats.) Where x / s is so small that e is
 * subnormal, the code is the zero point whatever the last places are. */
static int divides_by_multiplying(float scale) {
#ifdef QN_FMA
    return scale >= 0x1p-100f && scale <= 0x1p100f;
#else
    (void)scale;
    return 0;
#endif
}

/* clamp(rint(x / scale), low, high) where `scale` divides by multiplying. Unless `beyond`, x is finite and nothing lies
 * outside of low..high by more than the rounding of the zero point, and is left there. */
QN_INLINE VU quantize_by_reciprocal(VF x, VF scale, VF reciprocal, VF low, VF high, const int beyond) {
#ifdef QN_FMA
    if (beyond) { /* every code is within 512 of the zero point */
        VF most = scale * vf_splat(512.0f);
        x = vf_min(vf_max(vf_nan_to_zero(x), vf_splat(0.0f) - most), most);
    }
    VF t = x * reciprocal;
    VF q = vf_fma(vf_fnma(t, scale, x), reciprocal, t);
    return vu_from_rounded(beyond ? vf_min(vf_max(q, low), high) : q);
#else
    (void)reciprocal, (void)beyond;
    return quantize(x, scale, low, high, vu_splat(0));
#endif
}

#endif
