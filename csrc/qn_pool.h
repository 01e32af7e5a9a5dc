/* SPDX-License-Identifier: BSD-3-Clause
 *
 * One pool of threads for the whole process, and how many of them a call may use.
 *
 * A call never depends on the pool: work is handed out inside the task, by an atomic counter in its context, so that
 * the calling thread alone can always do everything. Threads of the pool only make it sooner.
 */
#ifndef QN_POOL_H
#define QN_POOL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { QN_POOL_MAX_THREADS = 1024 };

/* Takes pieces of the work until there are none left. `thread` is 0 on the calling thread. */
typedef void (*qn_task)(void *context, int thread);

/* Run task(context, 0) on the calling thread and task(context, i), each i of 1 .. threads - 1 at most once, on threads of
 * the pool that are free and wake in time. Returns when every thread that began has ended; one that has not begun when
 * the caller's own task returns never begins.
 *
 * The caller runs alone when the pool serves another call (so also within a task), when as many threads are calling as
 * the limit allows to run, when threads <= 1, and when no thread can be had. What the task writes may be read after the
 * return. Threads of the pool compute in the default floating-point mode, whatever the caller's is. */
void qn_pool_run(int threads, qn_task task, void *context);

/* How many threads a call should ask for whose work takes one thread `work` ns, of which a rough estimate is enough:
 * 1 .. the limit. Few when there is little to share, and 1 when it would be over before a sleeping thread wakes, unless
 * calls come in quick succession. Asking is cheap, and tells the pool of that succession; ask once a call. */
int qn_pool_threads_for(int64_t work);

/* How many threads a call may use: what was set, else the default once somebody has found it, else 0. */
int qn_pool_limit(void);

/* From now on; calls under way keep what they began with. 0: back to the default, which is then not known. */
void qn_pool_set_limit(int threads);

/* What qn_pool_limit gives as long as nothing is set. A forked child has to find its own. */
void qn_pool_set_default_limit(int threads);

#ifdef __cplusplus
}
#endif
#endif
