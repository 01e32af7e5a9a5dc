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
 *
 * The times below were measured on two cores of a Zen 4 server (a virtual machine), with calls of `call` us of work and
 * `gap` us between them. Speed relative to one thread, and CPU time over elapsed time of the whole loop:
 *
 *     call   gap     threads watch    threads sleep
 *       20    10       1.8   1.9        0.7   1.2
 *       50    10       1.9   2.0        1.1   1.4
 *      100    30       1.9   2.0        1.3   1.4
 *      100    60       1.9   2.0        1.3   1.3
 *      100  1000                        1.2   1.0
 *      200  1000                        1.5   1.1
 *
 * Waking a thread costs the caller 8 us, and the thread begins some 25 us later. Watching for 50 us makes a loop of 100 us
 * calls with gaps of 30 us a fifth faster for a tenth more CPU time; with gaps of 100 us it would cost more than it gives.
 * While other processes keep one core or both busy, loops take 0.95 to 1.05 times as long as on one thread; watching without
 * yielding made them take up to twice as long.
 */
#define _GNU_SOURCE /* pthread_setname_np */

#include "qn_pool.h"

#if defined(__unix__) || defined(__APPLE__)

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <time.h>

enum {
    WATCH_NS = 50000, /* how long a thread watches for work, and a caller for the end of what others have begun */
    PIECE_NS = 10000, /* work that is worth a thread that watches */
    WAKE_NS = 60000,  /* work that is worth waking a thread for, even if no other call follows */
    LONG_NS = 1000000000, /* an estimate beyond this is no better than this */
    STACK_BYTES = 1 << 20,   /* address space; a page becomes memory when it is touched */
    CALLS_UNTIL_RETRY = 1000 /* after the system has refused a thread */
};

/* The job's word: number << 32 | seats taken << 16 | seats. */
static const uint64_t ONE_TAKEN = 1 << 16;

static uint32_t number_of(uint64_t job) { return (uint32_t)(job >> 32); }
static int taken_of(uint64_t job) { return (int)(job >> 16 & 0xFFFF); }
static int open_seats(uint64_t job) { return (int)(job & 0xFFFF) - taken_of(job); }

/* Apart in memory: what some threads write while others look at something else. */
#define APART _Alignas(128)

static struct {
    APART _Atomic uint64_t job;
    qn_task task;
    void *context;

    APART atomic_int ended; /* threads that have ended their part of the job */
    atomic_bool caller_sleeps;
    atomic_int caller_core; /* where the job was published */
    atomic_bool crowded;    /* one of the threads took the caller's core to take part */

    APART atomic_int watching; /* threads of the pool that look at `job` */
    atomic_int sleeping;       /* threads of the pool that wait for `work` */
    atomic_bool hurried;       /* calls come in quick succession: watching pays */

    APART atomic_int callers;      /* threads within qn_pool_run that want company */
    _Atomic int64_t last_expected; /* when the last call told to qn_pool_threads_for would end on one thread, ns */
    atomic_bool busy;              /* there is a job; who sets this owns what follows */
    uint32_t number;               /* of the last job */
    int threads;                   /* made so far */
    int refused;                   /* calls until another is asked for */
    int64_t last_end;              /* of the last job, ns */

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

/* The core this thread runs on, or `unknown`. */
static int this_core(int unknown) {
#if defined(__linux__)
    int core = sched_getcpu();
    return core < 0 ? unknown : core;
#else
    return unknown;
#endif
}

/* Having taken the mutex once, whoever looked before what we wrote is asleep by now, and the signal reaches it. */
static void signal_to(pthread_cond_t *condition, int threads) {
    pthread_mutex_lock(&pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    for (int i = 0; i < threads; i++) pthread_cond_signal(condition);
}

/* Wake threads for the seats that those who watch will not take, `most` of them: each that comes wakes more.
 * Those who watch need not be told: one who has just stopped looks again before it sleeps. */
static void wake(int most) {
    int wanted = open_seats(atomic_load(&pool.job)) - atomic_load(&pool.watching);
    int sleeping = atomic_load(&pool.sleeping);
    if (wanted > sleeping) wanted = sleeping;
    if (wanted > most) wanted = most;
    if (wanted > 0) signal_to(&pool.work, wanted);
}

/* ---- threads of the pool ---- */

/* Is there a job with a free seat, and not the one that this thread took part in last? */
static bool job_other_than(uint32_t last) {
    uint64_t job = atomic_load(&pool.job);
    return number_of(job) != last && open_seats(job) > 0;
}

static bool take_part(uint32_t *last) {
    uint64_t job = atomic_load(&pool.job);
    while (number_of(job) != *last && open_seats(job) > 0) {
        if (!atomic_compare_exchange_weak(&pool.job, &job, job + ONE_TAKEN)) continue;
        *last = number_of(job);
        if (this_core(-1) == atomic_load(&pool.caller_core)) atomic_store(&pool.crowded, true);
        wake(2);
        pool.task(pool.context, taken_of(job) + 1);
        atomic_fetch_add(&pool.ended, 1); /* from here on the caller may be gone, and the job another */
        if (atomic_load(&pool.caller_sleeps)) signal_to(&pool.end, 1);
        return true;
    }
    return false;
}

/* Yields between looks: the next caller may want this very core, and so may anybody with something to do. */
static bool watch_for_job(uint32_t last) {
    bool found = false;
    atomic_fetch_add(&pool.watching, 1);
    for (int64_t until = now() + WATCH_NS; !found && now() < until; sched_yield())
        for (int i = 0; i < 16 && !(found = job_other_than(last)); i++) relax();
    atomic_fetch_sub(&pool.watching, 1);
    return found;
}

/* Once `sleeping` counts this thread, either it sees a job here or the job's caller sees it and signals. Returns when
 * woken even if the job has gone: that calls come in quick succession is then news. */
static void sleep_until_woken(uint32_t last) {
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleeping, 1);
    if (!job_other_than(last)) pthread_cond_wait(&pool.work, &pool.mutex);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.mutex);
}

/* A thread names itself before it does anything; where another may name it, so does the one that makes it, and it has its name
 * as soon as it is there. */
static void set_name(pthread_t thread, int number) {
    char name[20]; /* of which Linux takes 15 */
    snprintf(name, sizeof name, "qnative-%d", number);
#if defined(__APPLE__)
    if (pthread_equal(thread, pthread_self())) pthread_setname_np(name);
#elif defined(__linux__)
    pthread_setname_np(thread, name);
#else
    (void)thread;
#endif
}

static void *serve(void *number) {
    uint32_t last = 0;
    set_name(pthread_self(), (int)(intptr_t)number);
    fesetenv(FE_DFL_ENV);
    for (;;) {
        if (take_part(&last)) continue;
        if (atomic_load(&pool.hurried) && watch_for_job(last)) continue;
        sleep_until_woken(last);
    }
    return NULL;
}

/* Signals are for the program's own threads, except those that a thread brings upon itself: were they blocked, the process
 * would die without the report that a handler gives. */
static bool start_thread(int number) {
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t blocked, before;
    pthread_attr_t attributes;
    pthread_t thread;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) sigdelset(&blocked, own[i]);
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(&thread, &attributes, serve, (void *)(intptr_t)number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error == 0) set_name(thread, number);
    return error == 0;
}

/* ---- the calling thread ---- */

static void publish(int seats, qn_task task, void *context) {
    pool.task = task;
    pool.context = context;
    atomic_store(&pool.ended, 0);
    atomic_store(&pool.caller_core, this_core(-2));
    atomic_store(&pool.crowded, false);
    atomic_store(&pool.hurried, now() - pool.last_end < WATCH_NS);
    if (++pool.number == 0) pool.number = 1; /* 0: no job yet */
    atomic_store(&pool.job, (uint64_t)pool.number << 32 | (unsigned)seats);
    wake(1);
    if (pool.refused > 0) pool.refused--;
    while (pool.threads < seats && pool.refused == 0) {
        if (start_thread(pool.threads + 1))
            pool.threads++;
        else
            pool.refused = CALLS_UNTIL_RETRY;
    }
}

/* No thread begins after this; wait for those that have. Without yielding: the scheduler may charge a yield with a whole
 * slice of time. A thread that cannot go on before the caller stops is the reason to sleep at once. */
static void close_and_wait(void) {
    int begun = taken_of(atomic_exchange(&pool.job, (uint64_t)pool.number << 32));
    int64_t until = now() + WATCH_NS;
    while (atomic_load(&pool.ended) != begun && !atomic_load(&pool.crowded) && now() < until) relax();
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
    /* Every other caller is a thread at work, so each leaves one fewer to be had. */
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

int qn_pool_threads_for(int64_t work) {
    int most = qn_pool_limit();
    if (most <= 1 || work < 2 * PIECE_NS) return 1;
    int64_t start = now(), end = start + (work < LONG_NS ? work : LONG_NS);
    bool hurried = start - atomic_exchange(&pool.last_expected, end) < WATCH_NS;
    if (work < WAKE_NS && !hurried && atomic_load(&pool.watching) == 0) return 1;
    return work / PIECE_NS < most ? (int)(work / PIECE_NS) : most;
}

/* ---- fork ---- */

/* The child has the one thread that forked. All else is as the parent's threads had it in that moment, a held mutex
 * included, so every field is written anew. The parent's threads are forgotten, and so is its default limit, for the child
 * may be given other CPUs. */
static void after_fork_in_child(void) {
    atomic_store(&pool.job, 0);
    atomic_store(&pool.ended, 0);
    atomic_store(&pool.caller_sleeps, false);
    atomic_store(&pool.crowded, false);
    atomic_store(&pool.watching, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.hurried, false);
    atomic_store(&pool.callers, 0);
    atomic_store(&pool.last_expected, 0);
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

/* When the library is loaded: no thread can be made, nor a limit found, before. */
__attribute__((constructor)) static void prepare_for_forks(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

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

#else /* no POSIX threads: every call runs alone, whatever the limit says */

static volatile int limit;

void qn_pool_run(int threads, qn_task task, void *context) {
    (void)threads;
    task(context, 0);
}

int qn_pool_threads_for(int64_t work) {
    (void)work;
    return 1;
}

int qn_pool_limit(void) { return limit < 0 ? -limit : limit; }
void qn_pool_set_limit(int threads) { limit = threads; }
void qn_pool_set_default_limit(int threads) {
    if (limit == 0) limit = -threads;
}

#endif
