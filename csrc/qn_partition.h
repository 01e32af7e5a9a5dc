/* SPDX-License-Identifier: BSD-3-Clause
 *
 * n things cut into parts of nearly the same size: the first `longer` have one more than the others.
 */
#ifndef QN_PARTITION_H
#define QN_PARTITION_H

#include "qn_gemm.h"

/* n / d, of n >= 0 and d > 0. Numbers are small here, nearly always, and a division of 64 bits takes up to four times as long as one of
 * 32: before Ice Lake nearly 100 cycles, of which a small call had a dozen. */
static inline int64_t qn_quotient(int64_t n, int64_t d) {
    if (n < d) return 0;
    return (uint64_t)(n | d) >> 32 ? n / d : (int64_t)((uint32_t)n / (uint32_t)d);
}

/* How many pieces of `size` at most it takes. */
static inline int64_t qn_pieces(int64_t n, int64_t size) { return n <= size ? n > 0 : qn_quotient(n + size - 1, size); }

typedef struct { int64_t parts, size, longer; } partition;

static inline partition cut_evenly(int64_t n, int64_t parts) {
    if (n <= 0) return (partition){0, 0, 0};
    if (parts == 1) return (partition){1, n, 0};
    int64_t size = qn_quotient(n, parts);
    return (partition){parts, size, n - size * parts};
}

static inline int64_t part_size(const partition *p, int64_t i) { return p->size + (i < p->longer); }
static inline int64_t part_start(const partition *p, int64_t i) { return i * p->size + qn_min64(i, p->longer); }

#endif
