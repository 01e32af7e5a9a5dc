/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Many threads in one layer, without Python, so that it can run under the thread sanitizer: each calls one shared matrix with rows of
 * its own, and packs and calls one of its own, all through the one pool, while the pool's limit changes. The program prints "ok" and
 * exits with 0 when every output was the one that a thread alone computes.
 *
 *     concurrent [threads] [calls]
 */
#include "qn_gemm.h"
#include "qn_pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 70, K = 96, M = 9 };

static int64_t calls;
static int8_t codes[N * K];
static float scale[N], input[M * K];
static int8_t zero[N];
static const qn_kernel *kernel;
static qn_weights shared;
static float expected[M * N];

static uint8_t *aligned(int64_t bytes) {
    void *memory = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
    if (!memory) abort();
    return memory;
}

static void pack(qn_weights *w, int threads) {
    *w = (qn_weights){.format = QN_INT8, .asymmetric = 1, .n = N, .k = K, .group = K};
    qn_weights_layout(w);
    w->data = aligned(w->panels * w->panel_bytes);
    qn_source from = {.codes = codes, .stride = K, .scale = scale, .zero = zero};
    if (!qn_pack(kernel, w, &from, threads, qn_pool_run)) abort();
}

static void call(const qn_weights *w, int threads, float *y) {
    qn_call c = {.w = w, .input = QN_INPUT_DYNAMIC, .m = M, .x = input, .x_stride = K * 4, .y = y, .y_stride = N * 4};
    uint8_t *scratch = aligned(qn_scratch_bytes(kernel, &c, threads));
    qn_linear(kernel, &c, scratch, threads, qn_pool_run);
    free(scratch);
}

static void *work(void *argument) {
    int me = *(const int *)argument, wrong = 0;
    for (int64_t i = 0; i < calls; i++) {
        float y[M * N];
        int threads = 1 + (int)((me + i) % 4);
        if (i % 8 == 7) {
            qn_weights own;
            pack(&own, threads);
            call(&own, threads, y);
            free(own.data);
        } else {
            call(&shared, threads, y);
        }
        wrong += memcmp(y, expected, sizeof y) != 0;
        if (me == 0) qn_pool_set_limit(1 + (int)(i % 5));
    }
    return wrong ? argument : NULL;
}

int main(int count, char **arguments) {
    enum { MOST = 64 };
    int threads = count > 1 ? atoi(arguments[1]) : 8, number[MOST], wrong = 0;
    calls = count > 2 ? atoi(arguments[2]) : 40;
    if (threads > MOST) threads = MOST;
    for (int i = 0; qn_kernels[i]; i++)
        if (qn_kernels[i]->usable()) kernel = qn_kernels[i];
    for (int i = 0; i < N * K; i++) codes[i] = (int8_t)(i * 37 % 251 - 125);
    for (int i = 0; i < M * K; i++) input[i] = (float)(i * 53 % 199 - 99) * 0.01f;
    for (int i = 0; i < N; i++) scale[i] = 0.01f + 0.001f * (float)(i % 7), zero[i] = i % 5 - 2;
    pack(&shared, 1);
    call(&shared, 1, expected);
    pthread_t thread[MOST];
    for (int i = 0; i < threads; i++) {
        number[i] = i;
        if (pthread_create(&thread[i], NULL, work, &number[i]) != 0) abort();
    }
    for (int i = 0; i < threads; i++) {
        void *result;
        pthread_join(thread[i], &result);
        wrong += result != NULL;
    }
    free(shared.data);
    if (wrong) fprintf(stderr, "%d of %d threads saw another output\n", wrong, threads);
    else puts("ok");
    return wrong != 0;
}
