/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The verbs of qn_tile.h for NEON's vectors of 128 bits, which every aarch64 has. Codes take one byte.
 */
#define QN_W 4
#define QN_A_BYTES 1
typedef float VF __attribute__((vector_size(16)));
typedef uint32_t VU __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint8_t VB __attribute__((vector_size(16)));

static inline VF vf_load(const float *p) { return (VF)vld1q_f32(p); }
static inline void vf_store(float *p, VF v) { vst1q_f32(p, (float32x4_t)v); }
static inline VU vu_load(const uint32_t *p) { return (VU)vld1q_u32(p); }
static inline void vu_store(uint32_t *p, VU v) { vst1q_u32(p, (uint32x4_t)v); }
static inline VF vf_splat(float x) { return (VF)vdupq_n_f32(x); }
static inline VU vu_splat(uint32_t x) { return (VU)vdupq_n_u32(x); }
static inline VF vf_rint(VF x) { return (VF)vrndnq_f32((float32x4_t)x); }
static inline VF vf_abs(VF x) { return (VF)vabsq_f32((float32x4_t)x); }
static inline VF vf_less(VF a, VF b, VF x, VF y) {
    return (VF)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)x, (float32x4_t)y);
}
static inline VF vf_min(VF a, VF b) { return vf_less(a, b, a, b); } /* fmin would give a NaN in either place */
static inline VF vf_max(VF a, VF b) { return vf_less(b, a, a, b); }
static inline VU vu_max(VU a, VU b) { return (VU)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b); }
static inline VU vi_max(VU a, VU b) { return (VU)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
static inline uint32_t vu_largest(VU v) { return vmaxvq_u32((uint32x4_t)v); }
static inline uint32_t vi_largest(VU v) { return (uint32_t)vmaxvq_s32((int32x4_t)v); }
static inline int vu_bytes_above(int count, const VU v[], int from, int span) {
    uint8x16_t largest = vdupq_n_u8(0);
    for (int i = 0; i < count; i++)
        largest = vmaxq_u8(largest, vsubq_u8(vshlq_n_u8((uint8x16_t)v[i], 1), vdupq_n_u8((uint8_t)from)));
    return vmaxvq_u8(largest) > span;
}
static inline VF vf_from_vu(VU v) { return (VF)vcvtq_f32_s32((int32x4_t)v); }
static inline VU vu_from_vf(VF x) { return (VU)vcvtq_s32_f32((float32x4_t)x); }
static inline VF vf_bits(VU v) { return (VF)v; }
static inline VU vu_bits(VF x) { return (VU)x; }
static inline VF vf_nan_to_zero(VF x) { return vf_bits(vu_bits(x) & (VU)vceqq_f32((float32x4_t)x, (float32x4_t)x)); }
#define QN_FMA
static inline VF vf_fma(VF a, VF b, VF c) { return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline VF vf_fnma(VF a, VF b, VF c) { return (VF)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline VU vu_from_rounded(VF x) { return (VU)vcvtnq_s32_f32((float32x4_t)x); }
static inline VU vu_multiply(VU a, VU b) { return a * b; }
static inline VU vu_load_u8(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return (VU)vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
}
static inline VU vu_load_u16(const uint16_t *p) { return (VU)vmovl_u16(vld1_u16(p)); }
static inline void vu_store_u8(uint8_t *p, VU v) {
    uint16x4_t narrow = vmovn_u32((uint32x4_t)v);
    uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(narrow, narrow))), 0);
    memcpy(p, &four, 4);
}
static inline void vu_store_code(uint8_t *p, VU v) { vu_store_u8(p, v); }
static inline uint8x16_t bytes_of(const VU q[4], int32_t z) { /* each plus z; beyond 0..255: the ends */
    int16x8_t zero = vdupq_n_s16((int16_t)z);
    int16x8_t first = vcombine_s16(vqmovn_s32((int32x4_t)q[0]), vqmovn_s32((int32x4_t)q[1]));
    int16x8_t last = vcombine_s16(vqmovn_s32((int32x4_t)q[2]), vqmovn_s32((int32x4_t)q[3]));
    return vcombine_u8(vqmovun_s16(vaddq_s16(first, zero)), vqmovun_s16(vaddq_s16(last, zero)));
}
static inline void vu_store_bytes(uint8_t *p, const VU q[4], int32_t z, int32_t b) {
    vst1q_u8(p, vaddq_u8(bytes_of(q, z), vdupq_n_u8((uint8_t)b)));
}
static inline VU vu_store_codes(uint8_t *p, const VU q[4], int32_t z) {
    uint8x16_t codes = bytes_of(q, z);
    vst1q_u8(p, codes);
    return (VU)vpaddlq_u16(vpaddlq_u8(codes));
}
