/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Memory for the time of a call. Each calling thread keeps one piece for its next call, of at most QN_SCRATCH_KEPT bytes,
 * so that calls neither wait for the system's allocator nor touch fresh pages; it is freed when the thread ends.
 */
#ifndef QN_SCRATCH_H
#define QN_SCRATCH_H

#include <stdint.h>

enum { QN_SCRATCH_KEPT = 1 << 20 };

/* 64-byte aligned, of any content; NULL where there is no memory. Give it back on the same thread. */
uint8_t *qn_scratch_take(int64_t bytes);
void qn_scratch_give(uint8_t *memory);

/* Bytes that the calling thread keeps. */
int64_t qn_scratch_kept(void);

/* Memory for packed weights: aligned to 64 bytes, and large ones to huge pages, which the system is asked for. */
uint8_t *qn_weights_allocate(int64_t bytes);
void qn_weights_free(uint8_t *memory);

#endif
