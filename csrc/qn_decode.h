/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Codes of weights as floats, while they are in registers. Includes nothing of an instruction set: it is made of the verbs
 * that qn_tile.h lists.
 *
 * A lane of a k-step has the codes of one column: of four consecutive k, the first in the lowest byte; of int4 eight, k and
 * k + 4 in one byte. So each k takes a shift, and no code has to change its lane.
 */
#ifndef QN_DECODE_H
#define QN_DECODE_H

#include "qn_gemm.h"

#include <math.h>
#include <string.h>

#if defined(__GNUC__)
#define QN_INLINE static inline __attribute__((always_inline))
#else
#define QN_INLINE static inline
#endif
/* Once in a kernel, whatever its arguments. */
#if defined(__clang__)
#define QN_ONCE static __attribute__((noinline))
#elif defined(__GNUC__)
#define QN_ONCE static __attribute__((noinline, noclone))
#else
#define QN_ONCE static
#endif

/* The formats, as a constant where it is inlined: int8 differs with zero points and without. */
typedef enum { CODES_INT8, CODES_INT8_ZERO, CODES_INT4, CODES_E4M3FN, CODES_E5M2 } code_kind;

QN_INLINE code_kind kind_of_codes(const qn_weights *w) {
    switch (w->format) {
    case QN_INT4: return CODES_INT4;
    case QN_FLOAT8_E4M3FN: return CODES_E4M3FN;
    case QN_FLOAT8_E5M2: return CODES_E5M2;
    default: return w->asymmetric ? CODES_INT8_ZERO : CODES_INT8;
    }
}

QN_INLINE int is_float8(code_kind kind) { return kind == CODES_E4M3FN || kind == CODES_E5M2; }

/* k of 64 bytes of a panel. */
QN_INLINE int k_of_step(code_kind kind) { return kind == CODES_INT4 ? 2 * QN_KR : QN_KR; }

QN_INLINE const uint8_t *codes_of_group(const code_kind kind, const qn_weights *w, const uint8_t *panel, int64_t g) {
    return panel + w->codes_at + g * w->group_k / k_of_step(kind) * (QN_NR * QN_KR);
}

/* The values of float8 codes. Above the largest finite code: Inf and NaN in e5m2, NaN in e4m3fn. */
QN_INLINE VF decode_float8(VU code, qn_format format) {
    int mantissa = format == QN_FLOAT8_E4M3FN ? 3 : 2;
    VU size = code & vu_splat(0x7F);
    VF number = vf_from_vu(size);
    VF normal = vf_bits((size << (23 - mantissa)) + vu_splat((mantissa == 3 ? 120u : 112u) << 23));
    VF subnormal = number * vf_splat(mantissa == 3 ? 0x1p-9f : 0x1p-16f);
    VF value = vf_less(number, vf_splat((float)(1 << mantissa)), subnormal, normal);
    VF special = mantissa == 3 ? vf_splat(NAN) : vf_less(number, vf_splat(125.0f), vf_splat(INFINITY), vf_splat(NAN));
    value = vf_less(vf_splat(mantissa == 3 ? 126.0f : 123.0f), number, special, value);
    return vf_bits(vu_bits(value) | ((code & vu_splat(0x80)) << 24));
}

/* A vector of a panel's scales. */
QN_INLINE VF load_scales(const qn_scale kind, const uint8_t *scales, int64_t at) {
    if (kind == QN_SCALE_FLOAT32) return vf_load((const float *)(const void *)scales + at);
    VU narrow = vu_load_u16((const uint16_t *)(const void *)scales + at);
    if (kind == QN_SCALE_BFLOAT16) return vf_bits(narrow << 16);
    return vf_bits(narrow << 13) * vf_splat(0x1p112f);
}

/* The scales of a vector of columns, from column n of a panel on. */
QN_INLINE VF scale_of_columns(const qn_weights *w, const uint8_t *panel, int n, int64_t g) {
    return load_scales(w->scale, panel + w->scale_at, g * QN_NR + n);
}

static const uint32_t nibble_shifts[QN_NR] = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};

/* A vector of zero points, from column n on, of a group's nibbles. */
QN_INLINE VU load_zeros(const uint8_t *nibbles, int n) {
#if QN_W == 16
    (void)n;
    return (vu_splat_halves(nibbles) >> vu_load(nibble_shifts)) & vu_splat(15);
#else
    uint32_t eight;
    memcpy(&eight, nibbles + n / 8 * 4, sizeof eight);
    return (vu_splat(eight) >> vu_load(nibble_shifts + n % 8)) & vu_splat(15);
#endif
}

/* The zero points of a vector of columns. */
QN_INLINE VU zero_of_columns(const qn_weights *w, const uint8_t *panel, int n, int64_t g) {
    if (w->format != QN_INT4)
        return w->asymmetric ? vu_load((const uint32_t *)(const void *)(panel + w->zero_at) + g * QN_NR + n) : vu_splat(0);
    if (w->one_zero >= 0) return vu_splat((uint32_t)w->one_zero);
    return load_zeros(panel + w->zero_at + g * QN_NR / 2, n);
}

/* What the columns of a vector have in common in a group. */
typedef struct {
    VF scale;      /* 1 where the weights are not to be scaled */
    VF step_scale; /* the same, or times the power of two that decode_byte needs */
    VF zero;
    VU zero_bytes; /* four times the zero point */
} decode_terms;

QN_INLINE decode_terms terms_of_group(const code_kind kind, const qn_weights *w, const uint8_t *panel, int64_t g, int n,
                                      int scaled) {
    decode_terms t;
    t.scale = scaled ? scale_of_columns(w, panel, n, g) : vf_splat(1.0f);
    t.step_scale = t.scale;
    if (is_float8(kind)) t.step_scale = t.scale * vf_splat(kind == CODES_E4M3FN ? 0x1p120f : 0x1p112f);
    VU zero = zero_of_columns(w, panel, n, g);
    t.zero = vf_from_vu(zero);
    t.zero_bytes = vu_multiply(zero, vu_splat(0x01010101));
    return t;
}

/* One k of a k-step: any code, whatever the scale. */
QN_INLINE VF decode_one(const code_kind kind, VU v, int k, const decode_terms *t) {
    VF value;
    if (kind == CODES_INT4) {
        value = vf_from_vu((v >> (k % QN_KR * 8 + k / QN_KR * 4)) & vu_splat(15)) - t->zero;
    } else {
        VU code = (v >> (k * 8)) & vu_splat(0xFF);
        if (kind == CODES_E4M3FN) value = decode_float8(code, QN_FLOAT8_E4M3FN);
        else if (kind == CODES_E5M2) value = decode_float8(code, QN_FLOAT8_E5M2);
        else value = vf_from_vu((code ^ vu_splat(0x80)) - vu_splat(0x80));
        if (kind == CODES_INT8_ZERO) value = value - t->zero;
    }
    return value * t->scale;
}

#if QN_W > 1

/* The part of a k-step that decode_byte takes: int4 has two, k 0..3 and 4..7. */
QN_INLINE VU bytes_of_half(const code_kind kind, const int half, VU v, const decode_terms *t) {
    if (kind != CODES_INT4) return v;
    if (half) v = v >> 4;
#ifndef QN_LOOKUP
    v = (VU)((VB)(v & vu_splat(0x0F0F0F0F)) - (VB)t->zero_bytes);
#endif
    (void)t;
    return v;
}

/* The j-th k of these. float8: normal codes and step scales only. */
QN_INLINE VF decode_byte(const code_kind kind, VU bytes, const int j, const decode_terms *t) {
#ifdef QN_LOOKUP
    if (kind == CODES_INT4) return (vf_of_nibble(bytes >> (8 * j)) - t->zero) * t->scale;
#endif
    VI top = (VI)(bytes << (24 - 8 * j)); /* the code, and what does not count below it */
    if (is_float8(kind)) {
        /* The sign where it belongs, exponent and mantissa at the lower ends of theirs: a float32 that is the value but for
         * the difference of the exponents' biases, 120 or 112. A product makes up for it, the one with the scale: exact
         * before it is rounded. A subnormal code would be a subnormal float32, right but slow on many a CPU. */
        VU bits = kind == CODES_E4M3FN ? (VU)(top >> 4) & vu_splat(0x87F00000) : (VU)(top >> 3) & vu_splat(0x8FE00000);
        return vf_bits(bits) * t->step_scale;
    }
    VF value = vf_from_vu((VU)(top >> 24));
    if (kind == CODES_INT8_ZERO) value = value - t->zero;
    return value * t->scale;
}

/* Are there float8 codes, in `count` vectors, that decode_byte does not take? */
QN_INLINE int has_special(const code_kind kind, const int count, const VU v[]) {
    /* Twice a byte loses its sign. Subnormal ones wrap around to above the largest finite code, where Inf and NaN are. */
    return kind == CODES_E4M3FN ? vu_bytes_above(count, v, 2 * 0x08, 2 * (0x7E - 0x08))
                                : vu_bytes_above(count, v, 2 * 0x04, 2 * (0x7B - 0x04));
}

/* Are there scales, of groups [first, last) of `count` panels, for which step scales might be infinite? */
QN_INLINE int has_huge_scales(const code_kind kind, const qn_weights *w, const uint8_t *panel, const int count, int64_t first,
                              int64_t last) {
    VU largest = vu_splat(0);
    for (int p = 0; p < count; p++) {
        const uint32_t *scale = (const uint32_t *)(panel + p * w->panel_bytes + w->scale_at);
        for (int64_t i = first * QN_NR; i < last * QN_NR; i += QN_W) largest = vu_max(largest, vu_load(scale + i));
    }
    return vu_largest(largest) >= (kind == CODES_E4M3FN ? (127u + 127 - 120) << 23 : (127u + 127 - 112) << 23);
}

#endif
#endif
