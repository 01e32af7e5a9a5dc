/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The machine's limits, as loops to be timed: how many multiply-adds a core can do when nothing else is in the way, and
 * how fast it can read a buffer. A benchmark that has these from the same run can say what a kernel is worth.
 *
 * Each loop returns what proves that it did its work: a compute loop multiplies ones by ones and returns the sum of its
 * accumulators, the number of multiply-adds; a read loop returns the sum of the buffer's 64-bit words. A move loop writes the
 * exclusive or of every few vectors that it reads, a few times.
 */
#ifndef QN_LIMITS_H
#define QN_LIMITS_H

#include <stdint.h>

typedef struct {
    const char *name;
    const char *needs; /* CPU features, as qn_cpu names them, separated by spaces */
    uint64_t (*run)(int64_t iterations);
} qn_compute_loop;

typedef struct {
    const char *name;
    const char *needs;
    /* bytes must be a multiple of 8; ahead: bytes from a load to the line that is prefetched with it, 0 for none. */
    uint64_t (*run)(const uint8_t *data, int64_t bytes, int64_t ahead);
} qn_read_loop;

typedef struct {
    const char *name;
    const char *needs;
    int read, written; /* vectors an iteration */
    /* bytes to read, a multiple of 256; they are written / read times as many that are written. */
    void (*run)(const uint8_t *from, uint8_t *to, int64_t bytes);
} qn_move_loop;

/* All ended by a NULL name. */
extern const qn_compute_loop qn_compute_loops[];
extern const qn_read_loop qn_read_loops[];
extern const qn_move_loop qn_move_loops[];

/* The largest magnitude of n floats (NaN is passed over): the plain loop that reads a matrix and does next to nothing. */
float qn_read_float32(const float *x, int64_t n);

#endif
