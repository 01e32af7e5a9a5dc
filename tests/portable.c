/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The C core without Python, so that it can be run where there is none: cross-compiled for another machine under an
 * emulator, or with the compiler's sanitizers. Random layers of every kind go through the core; standard output gets
 * one line, a hash of all that the scalar kernel computed on one thread. That hash is the same on every machine and with every
 * compiler, or the core does not keep its promise. Fails when another kernel usable here computes other bytes,
 * or any does when its work is shared among threads.
 */
#include "qn_gemm.h"
#include "qn_pool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sizes that leave a remainder wherever something is cut into pieces: rows into tiles, columns into panels and
 * vectors, k into groups, k-steps and the pieces of k that are decoded at a time. */
enum { ROWS = 13, COLUMNS = 37, K = 133, GROUP = 32, THREADS = 3 };

typedef struct {
    qn_format format;
    qn_input input;
    qn_output output;
    qn_activation activation;
    int64_t group;
    int wide;
} layer_kind;

static uint32_t next_random(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8; /* the low bits of such a generator repeat soon */
}

/* -1 .. 1, exact: 24 bits. */
static float random_float(void) { return (float)((int32_t)next_random() - 0x800000) * 0x1p-23f; }

static void *aligned(int64_t size) {
    void *memory = aligned_alloc(64, (size_t)((size + 63) / 64 * 64));
    if (!memory) abort();
    return memory;
}

/* A finite code: the NaN that an operation yields has a sign of the machine's choice. */
static int8_t random_code(qn_format format) {
    uint8_t code = (uint8_t)next_random();
    if (format == QN_INT4) return code & 15;
    if (format == QN_FLOAT8_E4M3FN && (code & 0x7F) == 0x7F) return 5;
    if (format == QN_FLOAT8_E5M2 && (code & 0x7F) >= 0x7C) return 7;
    return (int8_t)code;
}

static void make_weights(qn_weights *w, const layer_kind *kind) {
    memset(w, 0, sizeof *w);
    w->format = kind->format;
    w->n = COLUMNS;
    w->k = K;
    w->group = kind->group;
    w->asymmetric = kind->format == QN_INT8 || kind->format == QN_INT4;
    w->has_sums = w->asymmetric && kind->input != QN_INPUT_FLOAT;
    w->one_zero = kind->format == QN_INT4 ? -1 : 0;
    w->bias = kind->output == QN_OUTPUT_ACC32 ? QN_NO_BIAS : QN_BIAS_FLOAT32;
    qn_weights_layout(w);
    w->data = aligned(w->panels * w->panel_bytes);
    memset(w->data, 0, (size_t)(w->panels * w->panel_bytes));
    int8_t codes[COLUMNS * K];
    for (int i = 0; i < COLUMNS * K; i++) codes[i] = random_code(kind->format);
    for (int64_t p = 0; p < w->panels; p++) {
        int count = p < w->panels - 1 ? QN_NR : COLUMNS - (int)p * QN_NR;
        uint8_t *panel = w->data + p * w->panel_bytes;
        float *scale = (float *)(panel + w->scale_at), *bias = (float *)(panel + w->bias_at);
        uint8_t *zero = panel + w->zero_at;
        qn_pack_panel(&qn_kernel_scalar, w, p, codes + p * QN_NR * K, K, count);
        for (int n = 0; n < count; n++) {
            if (w->bias != QN_NO_BIAS) bias[n] = random_float();
            for (int64_t g = 0; g < w->groups; g++) {
                scale[g * QN_NR + n] = 0.01f + 0.005f * random_float();
                if (!w->asymmetric) continue;
                int32_t value = random_code(kind->format);
                int64_t at = g * QN_NR + n;
                if (kind->format == QN_INT4)
                    zero[at / 2] |= (uint8_t)(value << at % 2 * 4);
                else
                    memcpy(zero + at * 4, &value, 4);
            }
        }
    }
}

/* Codes, or floats of several sizes. */
static void make_input(uint8_t *x, const layer_kind *kind) {
    if (kind->input == QN_INPUT_INT8_CODES || kind->input == QN_INPUT_UINT8_CODES) {
        qn_format format = kind->format == QN_INT4 ? QN_INT8 : kind->format;
        for (int i = 0; i < ROWS * K; i++) x[i] = (uint8_t)random_code(format);
        return;
    }
    for (int i = 0; i < ROWS * K; i++) {
        float value = random_float();
        value *= (float)(1 << next_random() % 4); /* a statement of its own: C does not order the two calls */
        memcpy(x + i * 4, &value, 4);
    }
}

/* One layer through every usable kernel; the scalar one's output goes into the hash. Returns how many differ. */
static int run(const layer_kind *kind, uint64_t *hash) {
    int codes = kind->input == QN_INPUT_INT8_CODES || kind->input == QN_INPUT_UINT8_CODES;
    int bytes_out = kind->output == QN_OUTPUT_UINT8 ? 1 : 4, failures = 0;
    qn_weights w;
    make_weights(&w, kind);
    int64_t outputs = kind->output == QN_OUTPUT_ACC32 ? w.groups * COLUMNS : COLUMNS;
    int64_t y_bytes = ROWS * outputs * bytes_out;
    uint8_t *x = aligned(ROWS * K * 4), *y = aligned(y_bytes), *expected = aligned(y_bytes);
    make_input(x, kind);
    qn_call call = {
        .w = &w, .input = kind->input, .output = kind->output, .activation = kind->activation, .wide = kind->wide,
        .m = ROWS, .x = x, .x_stride = codes ? K : K * 4, .y = y, .y_stride = outputs * bytes_out,
        .in_scale = 0.03f, .in_zero = 100, .in_min = 0, .in_max = 255,
        .out_scale = 0.05f, .out_zero = 90, .out_min = 3, .out_max = 250,
    };
    for (int i = 0; qn_kernels[i]; i++) {
        const qn_kernel *kernel = qn_kernels[i];
        if (!kernel->usable()) continue;
        for (int threads = 1; threads <= THREADS; threads += THREADS - 1) {
            uint8_t *scratch = aligned(qn_scratch_bytes(kernel, &call, threads));
            memset(y, 0xAA, (size_t)y_bytes);
            qn_linear(kernel, &call, scratch, threads, qn_pool_run);
            free(scratch);
            if (i == 0 && threads == 1) {
                memcpy(expected, y, (size_t)y_bytes);
                for (int64_t at = 0; at < y_bytes; at++) *hash = (*hash ^ y[at]) * 1099511628211ull; /* FNV-1a */
            } else if (memcmp(expected, y, (size_t)y_bytes) != 0) {
                fprintf(stderr, "%s, %d threads differ: format %d, input %d, output %d, activation %d, groups of %d, wide %d\n",
                        kernel->name, threads, (int)kind->format, (int)kind->input, (int)kind->output,
                        (int)kind->activation, (int)kind->group, kind->wide);
                failures++;
            }
        }
    }
    free(w.data);
    free(x);
    free(y);
    free(expected);
    return failures;
}

/* Float products have no integer sums, and sums that are asked for have no activation and, in 32 bits, are not wide. */
static int exists(const layer_kind *kind) {
    int float_product = kind->input == QN_INPUT_FLOAT || kind->format >= QN_FLOAT8_E4M3FN;
    int sums = kind->output == QN_OUTPUT_ACC32;
    return !(float_product && (kind->wide || sums)) && !(sums && (kind->wide || kind->activation != QN_IDENTITY));
}

int main(void) {
    static const qn_output outputs[] = {QN_OUTPUT_FLOAT32, QN_OUTPUT_UINT8, QN_OUTPUT_ACC32};
    uint64_t hash = 14695981039346656037ull;
    int layers = 0, failures = 0;
    for (int format = QN_INT8; format <= QN_FLOAT8_E5M2; format++) {
        for (int input = QN_INPUT_FLOAT; input <= QN_INPUT_UINT8_CODES; input++) {
            for (int activation = QN_IDENTITY; activation <= QN_SILU; activation++) {
                for (int choice = 0; choice < 3 * 2 * 2; choice++) {
                    layer_kind kind = {
                        .format = (qn_format)format, .input = (qn_input)input, .activation = (qn_activation)activation,
                        .output = outputs[choice % 3], .group = choice / 3 % 2 ? GROUP : K, .wide = choice / 6,
                    };
                    if (!exists(&kind)) continue;
                    failures += run(&kind, &hash);
                    layers++;
                }
            }
        }
    }
    printf("%016llx %d layers\n", (unsigned long long)hash, layers);
    return failures != 0;
}
