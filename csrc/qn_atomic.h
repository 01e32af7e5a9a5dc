/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The two atomic operations that sharing work needs, and how to wait; plain ones where no threads are shared with.
 */
#ifndef QN_ATOMIC_H
#define QN_ATOMIC_H

#include <stdint.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#include <stdatomic.h>

typedef _Atomic int64_t qn_atomic;

static inline int64_t qn_atomic_add(qn_atomic *p, int64_t n) { return atomic_fetch_add(p, n); }
static inline int64_t qn_atomic_get(qn_atomic *p) { return atomic_load(p); }

/* Wait a little: the thread that is waited for is at work, unless it has lost its core, and then it may need ours. */
static inline void qn_relax(int tries) {
    if (tries > 1000) {
        sched_yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

#else
typedef int64_t qn_atomic;

static inline int64_t qn_atomic_add(qn_atomic *p, int64_t n) {
    int64_t before = *p;
    *p += n;
    return before;
}
static inline int64_t qn_atomic_get(qn_atomic *p) { return *p; }
static inline void qn_relax(int tries) { (void)tries; }
#endif
#endif
