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

/* How int4 weights lie in memory: scales of a type, and a zero point each, or one for all, or none. */
typedef enum { FLOAT32_SCALES, FLOAT16_SCALES, BFLOAT16_SCALES, ONE_ZERO, SYMMETRIC, STORAGES } storage_kind;

typedef struct {
    qn_format format;
    qn_input input;
    qn_output output;
    qn_activation activation;
    int64_t group;
    int wide;
    storage_kind storage;
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

/* Scale i, as its type has it. */
static void random_scale(qn_scale type, void *scales, int64_t i) {
    if (type == QN_SCALE_FLOAT32)
        ((float *)scales)[i] = 0.01f + 0.005f * random_float();
    else /* of every magnitude from 2^-11 to 2^-4, or of 2^-9 to 2^-7 */
        ((uint16_t *)scales)[i] = (uint16_t)(type == QN_SCALE_FLOAT16 ? 0x1000 + next_random() % 0x1C00 : 0x3B00 + next_random() % 0x100);
}

static void make_weights(qn_weights *w, const layer_kind *kind) {
    int float8 = kind->format >= QN_FLOAT8_E4M3FN, int4 = kind->format == QN_INT4;
    memset(w, 0, sizeof *w);
    w->format = kind->format;
    w->n = COLUMNS;
    w->k = K;
    w->group = kind->group;
    w->asymmetric = !float8 && kind->storage != SYMMETRIC;
    w->has_sums = !float8 && kind->input != QN_INPUT_FLOAT && !(int4 && kind->group < K && kind->group <= QN_PAIR_GROUP);
    if (kind->storage == FLOAT16_SCALES) w->scale = QN_SCALE_FLOAT16;
    if (kind->storage == BFLOAT16_SCALES) w->scale = QN_SCALE_BFLOAT16;
    if (int4) w->one_zero = kind->storage == ONE_ZERO ? 9 : w->asymmetric ? -1 : 0;
    w->bias = kind->output == QN_OUTPUT_ACC32 ? QN_NO_BIAS : QN_BIAS_FLOAT32;
    qn_weights_layout(w);
    w->data = aligned(w->panels * w->panel_bytes);
    int64_t stride = int4 ? 4 * ((K + 7) / 8) : K, pairs = w->groups * COLUMNS;
    uint8_t *codes = aligned(COLUMNS * stride);
    void *scale = aligned(pairs * 4);
    int8_t *zero = aligned(pairs);
    float bias[COLUMNS];
    for (int64_t i = 0; i < COLUMNS * stride; i++) codes[i] = int4 ? (uint8_t)next_random() : (uint8_t)random_code(kind->format);
    for (int i = 0; i < COLUMNS; i++) bias[i] = random_float();
    for (int64_t i = 0; i < pairs; i++) {
        random_scale(w->scale, scale, i);
        zero[i] = kind->storage == ONE_ZERO ? (int8_t)w->one_zero : float8 ? 0 : random_code(kind->format);
    }
    qn_source source = {.codes = codes, .stride = stride, .scale = scale, .scale_type = w->scale, .zero = w->asymmetric ? zero : NULL,
                        .bias = w->bias == QN_NO_BIAS ? NULL : bias};
    if (!qn_pack(&qn_kernel_scalar, w, &source, 1, qn_pool_run)) abort();
    free(codes);
    free(scale);
    free(zero);
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
                fprintf(stderr, "%s, %d threads differ: format %d, input %d, output %d, activation %d, groups of %d, wide %d, storage %d\n",
                        kernel->name, threads, (int)kind->format, (int)kind->input, (int)kind->output,
                        (int)kind->activation, (int)kind->group, kind->wide, (int)kind->storage);
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
    if (kind->storage != FLOAT32_SCALES && (kind->format != QN_INT4 || kind->activation != QN_IDENTITY)) return 0;
    return !(float_product && (kind->wide || sums)) && !(sums && (kind->wide || kind->activation != QN_IDENTITY));
}

int main(void) {
    static const qn_output outputs[] = {QN_OUTPUT_FLOAT32, QN_OUTPUT_UINT8, QN_OUTPUT_ACC32};
    uint64_t hash = 14695981039346656037ull;
    int layers = 0, failures = 0;
    for (int format = QN_INT8; format <= QN_FLOAT8_E5M2; format++) {
        for (int input = QN_INPUT_FLOAT; input <= QN_INPUT_UINT8_CODES; input++) {
            for (int activation = QN_IDENTITY; activation <= QN_SILU; activation++) {
                for (int choice = 0; choice < 3 * 2 * 2 * STORAGES; choice++) {
                    layer_kind kind = {
                        .format = (qn_format)format, .input = (qn_input)input, .activation = (qn_activation)activation,
                        .output = outputs[choice % 3], .group = choice / 3 % 2 ? GROUP : K, .wide = choice / 6 % 2,
                        .storage = (storage_kind)(choice / 12),
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
