/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The thread pool under stress, without Python, so that it can run under the thread sanitizer. The argument says which
 * part; the program prints "ok" and exits with 0, or says what was wrong. An alarm ends what hangs.
 */
#define _GNU_SOURCE
#include "qn_pool.h"

#include <errno.h>
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SECONDS_UNTIL_HUNG = 100, PIECES = 64, MANY = 40, COMPANY = 8 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                  \
            fflush(stderr);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static void sleep_us(long us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&t, NULL);
}

static unsigned next_random(unsigned *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* ---- one call: every piece is done once, by threads that each take part once, while the call lasts ---- */

typedef struct {
    int threads, pieces, work;
    unsigned number;
    atomic_int next, open, began[COMPANY];
    int done[PIECES]; /* not atomic: the pool orders these writes before its return, or the sanitizer says so */
} call;

static atomic_uint calls;

static void do_pieces(void *context, int thread) {
    call *c = context;
    CHECK(atomic_load(&c->open) == 1);
    CHECK(thread >= 0 && thread < c->threads);
    CHECK(atomic_fetch_add(&c->began[thread], 1) == 0);
    static _Thread_local unsigned last;
    CHECK(last != c->number); /* no thread comes twice */
    last = c->number;
    for (int i; (i = atomic_fetch_add(&c->next, 1)) < c->pieces;) {
        for (volatile int k = 0; k < c->work; k++) {}
        c->done[i]++;
    }
    CHECK(atomic_load(&c->open) == 1);
}

/* Returns how many threads took part. `c` is used again and again, so that a thread which comes late meets a closed call. */
static int run_call(call *c, int threads, int pieces, int work) {
    int began = 0;
    c->threads = threads;
    c->pieces = pieces;
    c->work = work;
    c->number = atomic_fetch_add(&calls, 1) + 1;
    memset(c->done, 0, sizeof c->done);
    atomic_store(&c->next, 0);
    for (int i = 0; i < COMPANY; i++) atomic_store(&c->began[i], 0);
    atomic_store(&c->open, 1);
    qn_pool_run(threads, do_pieces, c);
    atomic_store(&c->open, 0);
    for (int i = 0; i < pieces; i++) CHECK(c->done[i] == 1);
    for (int i = 0; i < COMPANY; i++) began += atomic_load(&c->began[i]);
    CHECK(atomic_load(&c->began[0]) == 1);
    return began;
}

static void work(void) {
    static call c;
    unsigned random = 1;
    for (int i = 0; i < 20000; i++) {
        run_call(&c, 1 + (int)(next_random(&random) % COMPANY), (int)(next_random(&random) % PIECES), next_random(&random) % 300);
        if (i % 100 == 0) sleep_us(next_random(&random) % 200);
    }
}

/* ---- nobody who is called stays away: no wake-up is lost ---- */

typedef struct { atomic_int arrived, wanted; } meeting;

static void meet(void *context, int thread) {
    meeting *m = context;
    (void)thread;
    atomic_fetch_add(&m->arrived, 1);
    while (atomic_load(&m->arrived) < atomic_load(&m->wanted)) sched_yield(); /* for ever, if somebody is missing */
}

static void meet_all(int threads) {
    static meeting m;
    atomic_store(&m.arrived, 0);
    atomic_store(&m.wanted, threads);
    qn_pool_run(threads, meet, &m);
    CHECK(atomic_load(&m.arrived) == threads);
}

static void company(void) {
    unsigned random = 2;
    for (int i = 0; i < 3000; i++) {
        meet_all(2 + (int)(next_random(&random) % (COMPANY - 1)));
        switch (next_random(&random) % 4) { /* while they watch, while they go to sleep, and long after */
        case 0: break;
        case 1: sleep_us(next_random(&random) % 100); break;
        case 2: for (volatile unsigned k = 0, n = next_random(&random) % 60000; k < n; k++) {} break;
        case 3: if (i % 10 == 0) sleep_us(2000);
        }
    }
}

/* ---- many callers, while somebody changes the limit ---- */

static atomic_int finished;

static void *call_often(void *seed) {
    call *c = calloc(1, sizeof *c);
    unsigned random = (unsigned)(size_t)seed;
    CHECK(c);
    for (int i = 0; i < 300; i++) {
        int threads = qn_pool_limit();
        CHECK(threads >= 1 && threads <= COMPANY);
        run_call(c, threads, (int)(next_random(&random) % PIECES), 200);
    }
    free(c);
    atomic_fetch_add(&finished, 1);
    return NULL;
}

static void callers(void) {
    pthread_t threads[MANY];
    unsigned random = 3;
    qn_pool_set_limit(COMPANY);
    for (int i = 0; i < MANY; i++) CHECK(pthread_create(&threads[i], NULL, call_often, (void *)(size_t)(i + 1)) == 0);
    while (atomic_load(&finished) < MANY) {
        qn_pool_set_limit(1 + (int)(next_random(&random) % COMPANY));
        sleep_us(200);
    }
    for (int i = 0; i < MANY; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    meet_all(COMPANY); /* nothing is left over: one caller still has all the company it wants */
}

/* ---- a call is alone when it has to be ---- */

static void call_within(void *context, int thread) {
    (void)context;
    (void)thread;
    call *c = calloc(1, sizeof *c);
    CHECK(c);
    CHECK(run_call(c, COMPANY, PIECES, 100) == 1);
    free(c);
}

typedef struct { atomic_int inside, leave; } stay;

static void remain(void *context, int thread) {
    stay *s = context;
    (void)thread;
    atomic_fetch_add(&s->inside, 1);
    while (!atomic_load(&s->leave)) sleep_us(100);
}

static void *occupy(void *s) {
    qn_pool_run(2, remain, s);
    return NULL;
}

static void alone(void) {
    static stay s;
    call *c = calloc(1, sizeof *c);
    pthread_t other;
    CHECK(c);
    CHECK(run_call(c, 1, PIECES, 100) == 1);
    for (int i = 0; i < 100; i++) qn_pool_run(4, call_within, NULL);
    CHECK(pthread_create(&other, NULL, occupy, &s) == 0);
    while (atomic_load(&s.inside) < 2) sleep_us(100);
    for (int i = 0; i < 100; i++) CHECK(run_call(c, COMPANY, PIECES, 100) == 1); /* the pool is busy */
    atomic_store(&s.leave, 1);
    CHECK(pthread_join(other, NULL) == 0);
    meet_all(4);
    free(c);
}

/* A caller that works alone is a thread at work, and leaves one fewer for the others, though the pool is free. */
static void crowd(void) {
    static stay first, second;
    static call c;
    pthread_t threads[2];
    qn_pool_set_limit(2);
    CHECK(pthread_create(&threads[0], NULL, occupy, &first) == 0);
    while (atomic_load(&first.inside) < 2) sleep_us(100);
    CHECK(pthread_create(&threads[1], NULL, occupy, &second) == 0);
    while (atomic_load(&second.inside) < 1) sleep_us(100);
    atomic_store(&first.leave, 1);
    CHECK(pthread_join(threads[0], NULL) == 0);
    for (int i = 0; i < 20; i++) {
        CHECK(run_call(&c, 2, PIECES, 100) == 1);
        sleep_us(500);
    }
    qn_pool_set_limit(3);
    meet_all(2);
    atomic_store(&second.leave, 1);
    CHECK(pthread_join(threads[1], NULL) == 0);
    CHECK(atomic_load(&second.inside) == 1);
    atomic_store(&first.inside, 0);
    atomic_store(&first.leave, 0);
    atomic_store(&second.inside, 0);
    atomic_store(&second.leave, 0);
}

/* ---- what a thread of the pool is like ---- */

typedef struct { atomic_int seen, wrong; } look;

static void look_around(void *context, int thread) {
    look *l = context;
    if (thread) {
        sigset_t blocked;
        char name[32] = "qnative-";
        int wrong = pthread_sigmask(SIG_SETMASK, NULL, &blocked) != 0;
        wrong |= !sigismember(&blocked, SIGINT) || !sigismember(&blocked, SIGTERM) || !sigismember(&blocked, SIGUSR1);
        wrong |= sigismember(&blocked, SIGSEGV) || sigismember(&blocked, SIGBUS) || sigismember(&blocked, SIGFPE);
        wrong |= fegetround() != FE_TONEAREST;
#if defined(__linux__) || defined(__APPLE__)
        pthread_getname_np(pthread_self(), name, sizeof name);
#endif
        wrong |= strncmp(name, "qnative-", 8) != 0;
        atomic_fetch_or(&l->wrong, wrong);
        volatile char stack[200 << 10]; /* room for a kernel's scratch */
        for (size_t i = 0; i < sizeof stack; i += 4096) stack[i] = 1;
        atomic_fetch_add(&l->seen, 1);
    }
    while (!atomic_load(&l->seen)) sched_yield();
}

static void manners(void) {
    static look l;
    sigset_t before, after;
    CHECK(fesetround(FE_UPWARD) == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &before) == 0);
    qn_pool_run(2, look_around, &l);
    CHECK(atomic_load(&l.wrong) == 0);
    CHECK(fegetround() == FE_UPWARD);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &after) == 0);
    for (int s = 1; s < 32; s++) CHECK(sigismember(&before, s) == sigismember(&after, s));
}

/* ---- the system refuses threads ---- */

static void refused(void) {
    static call c;
    struct rlimit whole, none;
    CHECK(getrlimit(RLIMIT_AS, &whole) == 0);
    none = whole;
    none.rlim_cur = 1 << 20;
    CHECK(setrlimit(RLIMIT_AS, &none) == 0);
    for (int i = 0; i < 10; i++) CHECK(run_call(&c, COMPANY, PIECES, 100) == 1);
    CHECK(setrlimit(RLIMIT_AS, &whole) == 0);
    for (int i = 0; i < 2000; i++) run_call(&c, COMPANY, PIECES, 100);
    meet_all(COMPANY);
}

/* ---- the limit, and how many threads work is worth ---- */

static void limits(void) {
    CHECK(qn_pool_limit() == 0);
    CHECK(qn_pool_threads_for(1000000000) == 1); /* nobody has found the default yet */
    qn_pool_set_default_limit(3);
    CHECK(qn_pool_limit() == 3);
    qn_pool_set_default_limit(5); /* too late */
    CHECK(qn_pool_limit() == 3);
    qn_pool_set_limit(6);
    qn_pool_set_default_limit(5);
    CHECK(qn_pool_limit() == 6);
    CHECK(qn_pool_threads_for(1000000000) == 6);
    CHECK(qn_pool_threads_for(0) == 1 && qn_pool_threads_for(-5) == 1 && qn_pool_threads_for(INT64_MAX) == 6);
    qn_pool_set_limit(0);
    CHECK(qn_pool_limit() == 0);
    qn_pool_set_default_limit(4);
    CHECK(qn_pool_limit() == 4);
    CHECK(qn_pool_threads_for(1000) == 1);
    CHECK(qn_pool_threads_for(INT64_MAX / 2) == 4);
}

static void worth(void) {
    int quick = 0;
    qn_pool_set_limit(COMPANY);
    for (int i = 0; i < 20; i++) { /* calls far apart, and nobody awake: small ones are not worth waking anybody for */
        sleep_us(1000);
        CHECK(qn_pool_threads_for(25000) == 1);
        sleep_us(1000);
        CHECK(qn_pool_threads_for(60000) == 6);
    }
    for (int i = 0; i < 1000 && !quick; i++) { /* close together, unless this thread has to wait in between */
        sleep_us(1000);
        qn_pool_threads_for(25000);
        quick = qn_pool_threads_for(25000) == 2;
    }
    CHECK(quick);
}

/* ---- fork ---- */

/* Does the child end well, and in time? */
static void expect_success(pid_t child) {
    int status = 0;
    CHECK(child > 0);
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void use_in_child(void) {
    static call c;
    alarm(SECONDS_UNTIL_HUNG / 2); /* alarms are not inherited */
    for (int i = 0; i < 20; i++) run_call(&c, COMPANY, PIECES, 100);
    meet_all(COMPANY);
    _exit(0);
}

static pid_t fork_and_use(void) {
    pid_t child = fork();
    if (child == 0) use_in_child();
    return child;
}

static void fork_within(void *context, int thread) {
    pid_t *child = context;
    if (thread == 0) *child = fork_and_use();
}

/* The child leaves the task and the call as if nothing were, and then has a pool of its own. */
static void fork_and_leave(void *context, int thread) {
    pid_t *child = context;
    if (thread == 0) *child = fork();
}

static void forks(void) {
    static stay s;
    pthread_t other;
    pid_t child;
    qn_pool_set_default_limit(3);
    expect_success(fork_and_use()); /* before use */
    meet_all(COMPANY);
    for (int i = 0; i < 20; i++) { /* after use, while threads watch or sleep */
        child = fork_and_use();
        meet_all(COMPANY);
        expect_success(child);
    }
    child = fork();
    if (child == 0) {
        CHECK(qn_pool_limit() == 0); /* the default is the child's to find */
        qn_pool_set_limit(5);
        child = fork();
        if (child == 0) {
            CHECK(qn_pool_limit() == 5); /* what was set stays */
            use_in_child();
        }
        expect_success(child);
        use_in_child();
    }
    expect_success(child);
    CHECK(pthread_create(&other, NULL, occupy, &s) == 0); /* while another thread and the pool are within a call */
    while (atomic_load(&s.inside) < 2) sleep_us(100);
    for (int i = 0; i < 5; i++) expect_success(fork_and_use());
    atomic_store(&s.leave, 1);
    CHECK(pthread_join(other, NULL) == 0);
    qn_pool_run(COMPANY, fork_within, &child); /* within a task */
    expect_success(child);
    qn_pool_run(COMPANY, fork_and_leave, &child);
    if (child == 0) {
        alarm(SECONDS_UNTIL_HUNG / 2);
        crowd(); /* nor is that call counted any more */
        use_in_child();
    }
    expect_success(child);
    meet_all(COMPANY);
}

/* Forks at every moment of calls that other threads make. */
static atomic_int stop;

static void *call_until_stopped(void *seed) {
    call *c = calloc(1, sizeof *c);
    unsigned random = (unsigned)(size_t)seed;
    CHECK(c);
    while (!atomic_load(&stop)) {
        run_call(c, 2 + (int)(next_random(&random) % 3), (int)(next_random(&random) % PIECES), 50);
        if (next_random(&random) % 4 == 0) sleep_us(next_random(&random) % 60);
    }
    free(c);
    return NULL;
}

static void forks_at_any_time(void) {
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) CHECK(pthread_create(&threads[i], NULL, call_until_stopped, (void *)(size_t)(i + 9)) == 0);
    for (int i = 0; i < 200; i++) expect_success(fork_and_use());
    atomic_store(&stop, 1);
    for (int i = 0; i < 3; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    meet_all(COMPANY);
}

/* ---- the process ends while the pool is at work ---- */

static void *call_for_ever(void *unused) {
    call *c = calloc(1, sizeof *c);
    (void)unused;
    CHECK(c);
    for (;;) run_call(c, 4, PIECES, 5000);
}

static void leave_at_work(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, call_for_ever, NULL) == 0);
    CHECK(pthread_detach(thread) == 0);
    sleep_us(50000);
}

/* ---- where there is no pool ---- */

static void without(void) {
    static call c;
    qn_pool_set_limit(4);
    CHECK(qn_pool_limit() == 4);
    CHECK(qn_pool_threads_for(1000000000) == 1);
    for (int i = 0; i < 100; i++) CHECK(run_call(&c, 4, PIECES, 10) == 1);
    qn_pool_set_limit(0);
    qn_pool_set_default_limit(2);
    qn_pool_set_default_limit(3);
    CHECK(qn_pool_limit() == 2);
}

int main(int count, char **arguments) {
    static const struct { const char *name; void (*run)(void); } parts[] = {
        {"work", work}, {"company", company}, {"callers", callers}, {"alone", alone}, {"crowd", crowd},
        {"manners", manners}, {"refused", refused}, {"limits", limits}, {"worth", worth}, {"forks", forks},
        {"forks-at-any-time", forks_at_any_time}, {"leave-at-work", leave_at_work}, {"without", without},
    };
    alarm(SECONDS_UNTIL_HUNG);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (count == 2 && strcmp(arguments[1], parts[i].name) == 0) {
            parts[i].run();
            puts("ok");
            return 0;
        }
    }
    fprintf(stderr, "which part?\n");
    return 2;
}
