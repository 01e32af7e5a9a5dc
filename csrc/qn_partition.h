/* SPDX-License-Identifier: BSD-3-Clause
 *
 * n things cut into parts of nearly the same size: the first `longer` have one more than the others.
 */
#ifndef QN_PARTITION_H
#define QN_PARTITION_H

#include "qn_gemm.h"

typedef struct { int64_t parts, size, longer; } partition;

static inline partition cut_evenly(int64_t n, int64_t parts) {
    return n > 0 ? (partition){parts, n / parts, n % parts} : (partition){0, 0, 0};
}

static inline int64_t part_size(const partition *p, int64_t i) { return p->size + (i < p->longer); }
static inline int64_t part_start(const partition *p, int64_t i) { return i * p->size + qn_min64(i, p->longer); }

#endif
