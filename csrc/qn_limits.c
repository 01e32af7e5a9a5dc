/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Compute loops use registers only: as many independent accumulators as hide the instruction's latency, written out in
 * assembly, because a compiler may move a product of constants out of its loop, or keep an array of sums in memory, and
 * the limit would be that of something else. Read loops are plain C over vector types: several widths, and one, two or
 * four places of the buffer read in turn, since which is fastest depends on the level of the memory and the machine.
 */
#include "qn_limits.h"

#include <math.h>
#include <string.h>

#define QN_INLINE static inline __attribute__((always_inline))
#ifndef __GNUC__
#undef QN_INLINE
#define QN_INLINE static inline
#endif

/* Iterations after which accumulators are emptied: floats count exactly up to 2^24, and an int32 lane gets 4 each. */
enum { QN_CHUNK = 1 << 20 };

/* Sum over chunks of `loop`, which is inlined. */
#define QN_IN_CHUNKS(name, loop)                                                                                       \
    static uint64_t name(int64_t iterations) {                                                                        \
        uint64_t total = 0;                                                                                           \
        for (; iterations > 0; iterations -= QN_CHUNK) total += loop(iterations < QN_CHUNK ? iterations : QN_CHUNK);  \
        return total;                                                                                                 \
    }

/* Portable loops: what the compiler makes of a plain dot product for the baseline of this build. */

enum { QN_PORTABLE = 4096 };

static uint64_t portable_int8(int64_t iterations) {
    uint8_t a[QN_PORTABLE];
    int8_t b[QN_PORTABLE];
    uint64_t total = 0;
    uint8_t *x = a;
    int8_t *w = b;
    memset(a, 1, sizeof(a));
    memset(b, 1, sizeof(b));
    for (int64_t i = 0; i < iterations; i++) {
        int32_t sum = 0;
#ifdef __GNUC__
        __asm__ volatile("" : "+r"(x), "+r"(w) : : "memory"); /* what is behind them may have changed: multiply again */
#endif
        for (int k = 0; k < QN_PORTABLE; k++) sum += x[k] * w[k];
        total += (uint64_t)sum;
    }
    return total;
}

enum { QN_LANES = 64 };

static uint64_t portable_float32(int64_t iterations) {
    float sum[QN_LANES], one = 1;
    uint64_t total = 0;
    while (iterations > 0) {
        int64_t chunk = iterations < QN_CHUNK ? iterations : QN_CHUNK;
        for (int k = 0; k < QN_LANES; k++) sum[k] = 0;
        for (int64_t i = 0; i < chunk; i++) {
#ifdef __GNUC__
            __asm__ volatile("" : "+m"(one));
#endif
            for (int k = 0; k < QN_LANES; k++) sum[k] += one * one;
        }
        for (int k = 0; k < QN_LANES; k++) total += (uint64_t)sum[k];
        iterations -= chunk;
    }
    return total;
}

/* Reading: the loop of every width is this one, with V a vector of 64-bit words. */

enum { QN_STEP = 256 }; /* bytes of each place that an iteration reads */

#ifdef __GNUC__
#define QN_PREFETCH(p) __builtin_prefetch(p)
#else
#define QN_PREFETCH(p) (void)(p)
#endif

#define QN_READ_LOOP(name, V, streams)                                                                                 \
    static uint64_t name(const uint8_t *data, int64_t bytes, int64_t ahead) {                                         \
        enum { VECTORS = QN_STEP / (int)sizeof(V), SUMS = 4 };                                                        \
        const int64_t part = bytes / (streams * QN_STEP) * QN_STEP;                                                   \
        V sum[SUMS];                                                                                                  \
        uint64_t words[SUMS * sizeof(V) / 8], total = 0;                                                              \
        memset(sum, 0, sizeof(sum));                                                                                  \
        for (int64_t i = 0; i < part; i += QN_STEP) {                                                                 \
            QN_UNROLL for (int s = 0; s < streams; s++) {                                                             \
                const uint8_t *p = data + s * part + i;                                                               \
                if (ahead) {                                                                                          \
                    QN_UNROLL for (int line = 0; line < QN_STEP; line += 64) QN_PREFETCH(p + ahead + line);           \
                }                                                                                                     \
                QN_UNROLL for (int v = 0; v < VECTORS; v++) {                                                         \
                    V next;                                                                                           \
                    memcpy(&next, p + v * sizeof(V), sizeof(V));                                                      \
                    sum[v % SUMS] += next;                                                                            \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        memcpy(words, sum, sizeof(sum));                                                                              \
        for (unsigned w = 0; w < sizeof(words) / 8; w++) total += words[w];                                           \
        for (int64_t i = streams * part; i < bytes; i += 8) {                                                         \
            uint64_t word;                                                                                            \
            memcpy(&word, data + i, 8);                                                                               \
            total += word;                                                                                            \
        }                                                                                                             \
        return total;                                                                                                 \
    }

#ifdef __GNUC__
#define QN_UNROLL _Pragma("GCC unroll 16")
#ifdef __clang__
#undef QN_UNROLL
#define QN_UNROLL _Pragma("unroll")
#endif
typedef uint64_t V2 __attribute__((vector_size(16)));
typedef uint64_t V4 __attribute__((vector_size(32)));
typedef uint64_t V8 __attribute__((vector_size(64)));
#else
#define QN_UNROLL
typedef uint64_t V2;
#endif

/* Moving: `read` vectors are read, their exclusive or is written `written` times, and so on. The empty assembly keeps a
 * compiler from making a call of memcpy of it, which may go past the caches. */
#if defined(__x86_64__) && defined(__GNUC__)
#define QN_KEEP(v) __asm__ volatile("" : "+x"(v))
#else
#define QN_KEEP(v) (void)(v)
#endif

#define QN_MOVE_LOOP(name, V, read, written)                                                                           \
    static void name(const uint8_t *from, uint8_t *to, int64_t bytes) {                                               \
        for (; bytes > 0; bytes -= (read) * (int)sizeof(V)) {                                                         \
            V all, next;                                                                                              \
            memcpy(&all, from, sizeof(V));                                                                            \
            QN_UNROLL for (int i = 1; i < (read); i++) {                                                              \
                memcpy(&next, from + i * sizeof(V), sizeof(V));                                                       \
                all ^= next;                                                                                          \
            }                                                                                                         \
            QN_KEEP(all);                                                                                             \
            QN_UNROLL for (int i = 0; i < (written); i++) memcpy(to + i * sizeof(V), &all, sizeof(V));                \
            from += (read) * sizeof(V);                                                                               \
            to += (written) * sizeof(V);                                                                              \
        }                                                                                                             \
    }
#define QN_MOVE_LOOPS(bits, V)                                                                                         \
    QN_MOVE_LOOP(move_##bits##_4_1, V, 4, 1)                                                                          \
    QN_MOVE_LOOP(move_##bits##_2_1, V, 2, 1)                                                                          \
    QN_MOVE_LOOP(move_##bits##_1_1, V, 1, 1)                                                                          \
    QN_MOVE_LOOP(move_##bits##_1_2, V, 1, 2)                                                                          \
    QN_MOVE_LOOP(move_##bits##_1_4, V, 1, 4)
#define QN_MOVE_ENTRIES(bits, needs)                                                                                   \
    {"move_" #bits "_4_1", needs, 4, 1, move_##bits##_4_1}, {"move_" #bits "_2_1", needs, 2, 1, move_##bits##_2_1},   \
    {"move_" #bits "_1_1", needs, 1, 1, move_##bits##_1_1}, {"move_" #bits "_1_2", needs, 1, 2, move_##bits##_1_2},   \
    {"move_" #bits "_1_4", needs, 1, 4, move_##bits##_1_4}

QN_MOVE_LOOPS(128, V2)
QN_READ_LOOP(read_128_1, V2, 1)
QN_READ_LOOP(read_128_2, V2, 2)
QN_READ_LOOP(read_128_4, V2, 4)

#if defined(__x86_64__) && defined(__GNUC__)
#define QN_X86_LOOPS 1
#include <immintrin.h>

/* One line of assembly for each accumulator, operands %0 to %11. */
#define QN_EACH_OF_12(line) \
    line(0) line(1) line(2) line(3) line(4) line(5) line(6) line(7) line(8) line(9) line(10) line(11)
/* The accumulators are variables of their own, which surely are registers; an array might be memory. */
#define QN_12_ZEROS(V, zero)                                                                                           \
    V s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, s5 = zero, s6 = zero, s7 = zero, s8 = zero, s9 = zero,   \
      s10 = zero, s11 = zero
#define QN_10_SUMS                                                                                                     \
    "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9)
#define QN_12_SUMS QN_10_SUMS, "+v"(s10), "+v"(s11)

/* Return the sum of all lanes: of int32, or of floats that hold whole numbers. */
#define QN_RETURN_SUM(V, lane)                                                                                         \
    V vectors[] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11};                                                 \
    enum { LANES = 12 * (int)sizeof(V) / 4 };                                                                         \
    lane lanes[LANES];                                                                                                \
    uint64_t total = 0;                                                                                               \
    memcpy(lanes, vectors, sizeof(vectors));                                                                          \
    for (int i = 0; i < LANES; i++) total += (uint64_t)lanes[i];                                                      \
    return total

/* QN_EACH_OF_12(line) once an iteration; V is the vector, `one` an operand of ones. */
#define QN_COMPUTE_LOOP(name, V, lane, zero, one, line)                                                                \
    QN_INLINE uint64_t name##_chunk(int64_t iterations) {                                                             \
        QN_12_ZEROS(V, zero);                                                                                         \
        V a = one, b = one;                                                                                           \
        for (int64_t i = 0; i < iterations; i++)                                                                      \
            __asm__ volatile(QN_EACH_OF_12(line) : QN_12_SUMS : "v"(a), "v"(b));                                      \
        QN_RETURN_SUM(V, lane);                                                                                       \
    }                                                                                                                 \
    QN_IN_CHUNKS(name, name##_chunk)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512vnni")
#endif
#define QN_VPDPBUSD(i) "vpdpbusd %13, %12, %" #i "\n\t"
#define QN_VFMADD(i) "vfmadd231ps %13, %12, %" #i "\n\t"
QN_COMPUTE_LOOP(vpdpbusd_512, __m512i, int32_t, _mm512_setzero_si512(), _mm512_set1_epi8(1), QN_VPDPBUSD)
QN_COMPUTE_LOOP(vpdpbusd_256, __m256i, int32_t, _mm256_setzero_si256(), _mm256_set1_epi8(1), QN_VPDPBUSD)
QN_COMPUTE_LOOP(fma_512, __m512, float, _mm512_setzero_ps(), _mm512_set1_ps(1), QN_VFMADD)
QN_MOVE_LOOPS(512, V8)
QN_READ_LOOP(read_512_1, V8, 1)
QN_READ_LOOP(read_512_2, V8, 2)
QN_READ_LOOP(read_512_4, V8, 4)
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
QN_COMPUTE_LOOP(fma_256, __m256, float, _mm256_setzero_ps(), _mm256_set1_ps(1), QN_VFMADD)
#define QN_VPDPBUSD_VEX(i) "%{vex%} vpdpbusd %13, %12, %" #i "\n\t"
QN_COMPUTE_LOOP(vpdpbusd_256_vex, __m256i, int32_t, _mm256_setzero_si256(), _mm256_set1_epi8(1), QN_VPDPBUSD_VEX)

/* Exact for all u8 * s8 widened to 16 bits: two products go before their two additions, which hides a multiplication. */
#define QN_WIDE_PAIR(i, j)                                                                                             \
    "vpmaddwd %13, %12, %%ymm14\n\tvpmaddwd %13, %12, %%ymm15\n\t"                                                    \
    "vpaddd %%ymm14, %" #i ", %" #i "\n\tvpaddd %%ymm15, %" #j ", %" #j "\n\t"
QN_INLINE uint64_t vpmaddwd_chunk(int64_t iterations) {
    QN_12_ZEROS(__m256i, _mm256_setzero_si256());
    __m256i a = _mm256_set1_epi16(1), b = a;
    for (int64_t i = 0; i < iterations; i++)
        __asm__ volatile(QN_WIDE_PAIR(0, 1) QN_WIDE_PAIR(2, 3) QN_WIDE_PAIR(4, 5) QN_WIDE_PAIR(6, 7) QN_WIDE_PAIR(8, 9)
                             QN_WIDE_PAIR(10, 11)
                         : QN_12_SUMS
                         : "v"(a), "v"(b)
                         : "xmm14", "xmm15");
    QN_RETURN_SUM(__m256i, int32_t);
}
QN_IN_CHUNKS(vpmaddwd_256, vpmaddwd_chunk)

/* The sign trick, exact for weights in -127..127: |a| times w with a's sign, two rows by five vectors of weights. |a| is
 * taken once a row; the sign, the pair sums of 16 and of 32 bits and the addition are each product's own. */
#define QN_SIGNED_PAIR(i, j)                                                                                           \
    "vpsignb %10, %11, %%ymm14\n\tvpsignb %10, %11, %%ymm15\n\t"                                                      \
    "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\tvpmaddubsw %%ymm15, %%ymm13, %%ymm15\n\t"                                \
    "vpmaddwd %12, %%ymm14, %%ymm14\n\tvpmaddwd %12, %%ymm15, %%ymm15\n\t"                                            \
    "vpaddd %%ymm14, %" #i ", %" #i "\n\tvpaddd %%ymm15, %" #j ", %" #j "\n\t"
#define QN_SIGNED_SINGLE(i)                                                                                            \
    "vpsignb %10, %11, %%ymm14\n\tvpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"                                           \
    "vpmaddwd %12, %%ymm14, %%ymm14\n\tvpaddd %%ymm14, %" #i ", %" #i "\n\t"
#define QN_MAGNITUDE "vpabsb %10, %%ymm13\n\t"
QN_INLINE uint64_t vpsignb_chunk(int64_t iterations) {
    QN_12_ZEROS(__m256i, _mm256_setzero_si256()); /* ten are used: the operands take the other registers */
    __m256i a = _mm256_set1_epi8(-1), w = a, one = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < iterations; i++)
        __asm__ volatile(QN_MAGNITUDE QN_SIGNED_PAIR(0, 1) QN_SIGNED_PAIR(2, 3) QN_SIGNED_SINGLE(4)
                         QN_MAGNITUDE QN_SIGNED_PAIR(5, 6) QN_SIGNED_PAIR(7, 8) QN_SIGNED_SINGLE(9)
                         : QN_10_SUMS
                         : "v"(a), "v"(w), "v"(one)
                         : "xmm13", "xmm14", "xmm15");
    QN_RETURN_SUM(__m256i, int32_t);
}
QN_IN_CHUNKS(vpsignb_256, vpsignb_chunk)
QN_MOVE_LOOPS(256, V4)
QN_READ_LOOP(read_256_1, V4, 1)
QN_READ_LOOP(read_256_2, V4, 2)
QN_READ_LOOP(read_256_4, V4, 4)
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const qn_compute_loop qn_compute_loops[] = {
    {"portable_int8", "", portable_int8},
    {"portable_float32", "", portable_float32},
#ifdef QN_X86_LOOPS
    {"fma_256", "avx2 fma", fma_256},
    {"fma_512", "avx512f", fma_512},
    {"vpsignb_256", "avx2", vpsignb_256},
    {"vpmaddwd_256", "avx2", vpmaddwd_256},
    {"vpdpbusd_256_vex", "avx2 avx_vnni", vpdpbusd_256_vex},
    {"vpdpbusd_256", "avx512f avx512vl avx512_vnni", vpdpbusd_256},
    {"vpdpbusd_512", "avx512f avx512vl avx512_vnni", vpdpbusd_512},
#endif
    {0, 0, 0},
};

const qn_read_loop qn_read_loops[] = {
    {"read_128_1", "", read_128_1},
    {"read_128_2", "", read_128_2},
    {"read_128_4", "", read_128_4},
#ifdef QN_X86_LOOPS
    {"read_256_1", "avx2", read_256_1},
    {"read_256_2", "avx2", read_256_2},
    {"read_256_4", "avx2", read_256_4},
    {"read_512_1", "avx512f avx512vl avx512_vnni", read_512_1},
    {"read_512_2", "avx512f avx512vl avx512_vnni", read_512_2},
    {"read_512_4", "avx512f avx512vl avx512_vnni", read_512_4},
#endif
    {0, 0, 0},
};

const qn_move_loop qn_move_loops[] = {
    QN_MOVE_ENTRIES(128, ""),
#ifdef QN_X86_LOOPS
    QN_MOVE_ENTRIES(256, "avx2"),
    QN_MOVE_ENTRIES(512, "avx512f avx512vl avx512_vnni"),
#endif
    {0, 0, 0, 0, 0},
};

float qn_read_float32(const float *x, int64_t n) {
    float largest[32] = {0}, most = 0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 32; k++) {
            float magnitude = fabsf(x[i + k]);
            largest[k] = magnitude > largest[k] ? magnitude : largest[k];
        }
    for (int k = 0; k < 32; k++) most = largest[k] > most ? largest[k] : most;
    for (; i < n; i++) {
        float magnitude = fabsf(x[i]);
        most = magnitude > most ? magnitude : most;
    }
    return most;
}
