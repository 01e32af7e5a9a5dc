/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Activation functions, of vectors: fixed sequences of + - * /, within 2^-22 * max(1, |x|) of the true value. Made of the verbs that
 * qn_tile.h lists.
 */

/* 2^y for -126 <= y <= 0: 2^n * 2^f with |f| <= 1/2, which is exact to take off, and 2^f by a polynomial fitted for its
 * relative error (7.5e-8). */
QN_INLINE VF exp2_of_negative(VF y) {
    VF n = vf_rint(y);
    VF f = y - n;
    VF e = vf_splat(1.32764713e-3f);
    e = e * f + vf_splat(9.67554189e-3f);
    e = e * f + vf_splat(5.55071309e-2f);
    e = e * f + vf_splat(2.40221202e-1f);
    e = e * f + vf_splat(6.93146944e-1f);
    e = e * f + vf_splat(1.00000012f);
    VU power = (vu_from_vf(n) + vu_splat(127)) << 23;
    return e * vf_bits(power);
}

/* All three are max(x, 0) - |x| * tail(|x|) with a tail that vanishes: nothing cancels, nothing overflows, and the
 * negative side keeps its relative precision. A NaN stays one through the max. */
QN_INLINE VF relu(VF x) { return vf_max(vf_splat(0.0f), x); }

/* x * Phi(x), the tail being erfc(a / sqrt 2) / 2 = e^(-a^2 / 2) * poly(1 / (1 + 0.4 a)): the form of Abramowitz and
 * Stegun 26.2.17 with six terms, refitted (weighted least squares) for the error of a * tail. */
QN_INLINE VF gelu(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(12.5f)); /* beyond, the tail is nothing; before, no step of it is subnormal */
    VF t = vf_splat(1.0f) / (vf_splat(1.0f) + vf_splat(0.4f) * a);
    VF p = vf_splat(0.0570474230f);
    p = p * t + vf_splat(-0.257022977f);
    p = p * t + vf_splat(0.342932403f);
    p = p * t + vf_splat(0.0109998528f);
    p = p * t + vf_splat(0.189431950f);
    p = p * t + vf_splat(0.156611666f);
    p = p * t;
    VF tail = exp2_of_negative(a * a * vf_splat(-0.721347511f)) * p; /* -log2(e) / 2 */
    return relu(x) - a * tail;
}

/* x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
QN_INLINE VF gelu_tanh(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(9.5f));
    VF e = exp2_of_negative(a * (vf_splat(-2.30220819f) + vf_splat(-0.102943242f) * (a * a))); /* -2 u log2(e) */
    return relu(x) - a * (e / (vf_splat(1.0f) + e));
}

/* x * sigmoid(x) */
QN_INLINE VF silu(VF x) {
    VF a = vf_min(vf_abs(x), vf_splat(87.0f));
    VF e = exp2_of_negative(a * vf_splat(-1.44269502f)); /* -log2(e) */
    return relu(x) - a * (e / (vf_splat(1.0f) + e));
}

/* Those that are worth a call: once a kernel, not once for every way of writing y. */
QN_ONCE VF activate_smoothly(VF x, qn_activation activation) {
    if (activation == QN_GELU) return gelu(x);
    return activation == QN_GELU_TANH ? gelu_tanh(x) : silu(x);
}

QN_INLINE VF activate(VF x, qn_activation activation) {
    if (activation == QN_IDENTITY) return x;
    return activation == QN_RELU ? relu(x) : activate_smoothly(x, activation);
}
