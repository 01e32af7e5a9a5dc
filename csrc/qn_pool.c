/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The thread pool. At any time it serves one call, the job; whoever finds it busy works alone.
 *
 * a) A job is published as one atomic word: its number, how many seats it has, how many are taken. A thread of the pool
 *    takes a seat by adding one, and reads task and context only then. The caller closes the job by overwriting the word,
 *    which tells how many have begun, and waits for as many to end. So a thread that is late, or was never woken, costs
 *    nothing.
 * b) A thread without work watches the word for a moment when calls come in quick succession, else it sleeps.
 * c) Nothing is ever freed or joined: threads asleep when the process exits, or when the interpreter is torn down, have
 *    nothing to touch. Where a library can be unloaded, it has to be linked with -z nodelete.
 * d) A child process begins with an empty pool, whatever the parent's threads were doing: see after_fork_in_child.
 */
#define _GNU_SOURCE /* pthread_setname_np */

#include "qn_pool.h"

#if defined(__unix__) || defined(__APPLE__)

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

/* How long a thread watches for work, and a caller for the end of what others have begun, before it sleeps. */
#ifndef QN_POOL_SPIN_NS
#define QN_POOL_SPIN_NS 50000
#endif

enum {
    STACK_BYTES = 1 << 20,  /* address space; a page becomes memory when it is touched */
    CALLS_UNTIL_RETRY = 1000 /* after the system has refused a thread */
};

/* The job's word: number << 32 | seats taken << 16 | seats. */
static const uint64_t ONE_TAKEN = 1 << 16;

static uint32_t number_of(uint64_t job) { return (uint32_t)(job >> 32); }
static int taken_of(uint64_t job) { return (int)(job >> 16 & 0xFFFF); }
static int seats_of(uint64_t job) { return (int)(job & 0xFFFF); }

/* Apart in memory: what threads write while others watch something else. */
#define APART _Alignas(128)

static struct {
    APART _Atomic uint64_t job;
    qn_task task;
    void *context;

    APART atomic_int ended;   /* threads that have ended their part of the job */
    atomic_bool caller_sleeps;

    APART atomic_int watching; /* threads of the pool that look at `job` */
    atomic_int sleeping;       /* threads of the pool that wait for `work` */
    atomic_bool hurried;       /* calls come in quick succession: watching pays */

    APART atomic_int callers;  /* threads within qn_pool_run that want company */
    atomic_bool busy;          /* there is a job; who sets this owns what follows */
    uint32_t number;           /* of the last job */
    int threads;               /* made so far */
    int refused;               /* calls until another is asked for */
    int64_t last_end;          /* when the last job ended, ns */

    APART pthread_mutex_t mutex; /* guards no data, only the moment between looking and sleeping */
    pthread_cond_t work, end;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, .end = PTHREAD_COND_INITIALIZER};

static atomic_uint generation; /* of this process: one more in every forked child */
static atomic_int limit;       /* > 0: set; < 0: minus the default; 0: not known */

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* ---- threads of the pool ---- */

static bool is_open(uint64_t job, uint32_t last) { return number_of(job) != last && taken_of(job) < seats_of(job); }

/* Take part in the job, if it has a seat and is not the one this thread took part in last. */
static bool take_part(uint32_t *last) {
    uint64_t job = atomic_load(&pool.job);
    while (is_open(job, *last)) {
        if (!atomic_compare_exchange_weak(&pool.job, &job, job + ONE_TAKEN)) continue;
        *last = number_of(job);
        pool.task(pool.context, taken_of(job) + 1);
        atomic_fetch_add(&pool.ended, 1); /* from here on the caller may be gone, and the job another */
        if (atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.mutex);
            pthread_mutex_unlock(&pool.mutex);
            pthread_cond_signal(&pool.end);
        }
        return true;
    }
    return false;
}

static bool watch(uint32_t last) {
    bool found = false;
    atomic_fetch_add(&pool.watching, 1);
    int64_t until = now() + QN_POOL_SPIN_NS;
    do {
        for (int i = 0; i < 16 && !found; i++) {
            relax();
            found = is_open(atomic_load_explicit(&pool.job, memory_order_relaxed), last);
        }
    } while (!found && now() < until);
    atomic_fetch_sub(&pool.watching, 1);
    return found;
}

/* Once `sleeping` counts this thread, either it sees a job here or the job's caller sees it and signals. Returns when
 * woken even if the job has gone: that calls come in quick succession is then news. */
static void sleep_until_woken(uint32_t last) {
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleeping, 1);
    if (!is_open(atomic_load(&pool.job), last)) pthread_cond_wait(&pool.work, &pool.mutex);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.mutex);
}

static void set_name(int number) {
    char name[16];
    snprintf(name, sizeof name, "qnative-%d", number);
#if defined(__APPLE__)
    pthread_setname_np(name);
#elif defined(__linux__)
    pthread_setname_np(pthread_self(), name);
#endif
}

static void *serve(void *number) {
    uint32_t last = 0;
    set_name((int)(intptr_t)number);
    fesetenv(FE_DFL_ENV);
    for (;;) {
        if (take_part(&last)) continue;
        if (atomic_load(&pool.hurried) && watch(last)) continue;
        sleep_until_woken(last);
    }
    return NULL;
}

/* Signals are for the program's own threads, except those that a thread brings upon itself: where they are blocked, the
 * process dies without the report that a handler would have given. */
static bool start_thread(int number) {
    sigset_t blocked, before;
    sigfillset(&blocked);
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) sigdelset(&blocked, own[i]);
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(&thread, &attributes, serve, (void *)(intptr_t)number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error == 0;
}

/* ---- the calling thread ---- */

static void publish(int seats, qn_task task, void *context) {
    pool.task = task;
    pool.context = context;
    atomic_store(&pool.ended, 0);
    atomic_store(&pool.hurried, now() - pool.last_end < QN_POOL_SPIN_NS);
    if (++pool.number == 0) pool.number = 1; /* 0: no job yet */
    atomic_store(&pool.job, (uint64_t)pool.number << 32 | (unsigned)seats);

    /* Those who watch see it without being told: one who has just stopped looks again before it sleeps. */
    int watching = atomic_load(&pool.watching), sleeping = atomic_load(&pool.sleeping);
    int wanted = seats - watching < sleeping ? seats - watching : sleeping;
    if (wanted > 0) {
        pthread_mutex_lock(&pool.mutex);
        pthread_mutex_unlock(&pool.mutex);
        for (int i = 0; i < wanted; i++) pthread_cond_signal(&pool.work);
    }
    if (pool.refused > 0) pool.refused--;
    while (pool.threads < seats && pool.refused == 0) {
        if (start_thread(pool.threads + 1))
            pool.threads++;
        else
            pool.refused = CALLS_UNTIL_RETRY;
    }
}

/* No thread begins after this; wait for those that have. */
static void close_and_wait(void) {
    int begun = taken_of(atomic_exchange(&pool.job, (uint64_t)pool.number << 32));
    if (atomic_load(&pool.ended) != begun) {
        int64_t until = now() + QN_POOL_SPIN_NS;
        do {
            for (int i = 0; i < 16 && atomic_load(&pool.ended) != begun; i++) relax();
        } while (atomic_load(&pool.ended) != begun && now() < until);
    }
    if (atomic_load(&pool.ended) != begun) {
        pthread_mutex_lock(&pool.mutex);
        atomic_store(&pool.caller_sleeps, true);
        while (atomic_load(&pool.ended) != begun) pthread_cond_wait(&pool.end, &pool.mutex);
        atomic_store(&pool.caller_sleeps, false);
        pthread_mutex_unlock(&pool.mutex);
    }
    pool.last_end = now();
}

void qn_pool_run(int threads, qn_task task, void *context) {
    if (threads <= 1) {
        task(context, 0);
        return;
    }
    unsigned born = atomic_load(&generation);
    if (threads > QN_POOL_MAX_THREADS) threads = QN_POOL_MAX_THREADS;
    /* Each other caller is a thread at work, so it leaves one fewer to be had. */
    int most = qn_pool_limit();
    int room = (most > threads ? most : threads) - 1 - atomic_fetch_add(&pool.callers, 1);
    int seats = room < threads - 1 ? room : threads - 1;
    bool shared = seats > 0 && !atomic_exchange(&pool.busy, true);
    if (shared) publish(seats, task, context);
    task(context, 0);
    if (atomic_load(&generation) != born) return; /* the task has forked, and this is the child: none of it is here */
    if (shared) {
        close_and_wait();
        atomic_store(&pool.busy, false);
    }
    atomic_fetch_sub(&pool.callers, 1);
}

/* ---- fork ---- */

/* The child has the one thread that forked. All else is as the parent's threads had it in that moment, locks held
 * included, so every field is written anew; the parent's threads are forgotten, and its default, for the child may be
 * given other CPUs. */
static void after_fork_in_child(void) {
    atomic_store(&pool.job, 0);
    atomic_store(&pool.ended, 0);
    atomic_store(&pool.caller_sleeps, false);
    atomic_store(&pool.watching, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.hurried, false);
    atomic_store(&pool.callers, 0);
    atomic_store(&pool.busy, false);
    pool.number = 0;
    pool.threads = 0;
    pool.refused = 0;
    pool.last_end = 0;
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.end, NULL);
    if (atomic_load(&limit) < 0) atomic_store(&limit, 0);
    atomic_fetch_add(&generation, 1);
}

/* When the library is loaded, so that no thread can fork before. */
__attribute__((constructor)) static void watch_for_forks(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

/* ---- the limit ---- */

int qn_pool_limit(void) {
    int n = atomic_load_explicit(&limit, memory_order_relaxed);
    return n < 0 ? -n : n;
}

void qn_pool_set_limit(int threads) { atomic_store(&limit, threads); }

void qn_pool_set_default_limit(int threads) {
    int unknown = 0;
    atomic_compare_exchange_strong(&limit, &unknown, -threads);
}

#else /* no POSIX threads: every call runs alone */

static volatile int limit;

void qn_pool_run(int threads, qn_task task, void *context) {
    (void)threads;
    task(context, 0);
}

int qn_pool_limit(void) { return limit < 0 ? -limit : limit; }
void qn_pool_set_limit(int threads) { limit = threads; }
void qn_pool_set_default_limit(int threads) {
    if (limit == 0) limit = -threads;
}

#endif
