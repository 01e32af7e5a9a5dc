/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The linear layer around a kernel: packing weights into panels, and the walk over blocks of rows, panels and groups.
 */
#include "qn_gemm.h"

#include <string.h>

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- packing ---- */

void qn_weights_layout(qn_weights *w) {
    w->groups = w->k ? (w->k + w->group - 1) / w->group : 1;
    w->group_k = round_up(w->group, QN_K_PAD);
    w->panels = (w->n + QN_NR - 1) / QN_NR;
    int64_t a_group = QN_NR * w->groups * 4;
    w->bias_at = 0;
    w->scale_at = w->bias == QN_NO_BIAS ? 0 : QN_NR * 4;
    w->sum_at = w->scale_at + a_group;
    int float8 = w->format >= QN_FLOAT8_E4M3FN;
    w->zero_at = w->sum_at + (float8 ? 0 : a_group);
    w->codes_at = round_up(w->zero_at + (w->asymmetric ? a_group : 0), 64);
    w->panel_bytes = w->codes_at + round_up(w->groups * w->group_k * QN_NR / (w->format == QN_INT4 ? 2 : 1), 64);
}

/* Where the code of column n and (padded) k lies among a panel's codes; for int4 the byte that holds its nibble. */
static int64_t code_at(const qn_weights *w, int64_t n, int64_t k) {
    if (w->format == QN_INT4) return k / 8 * 64 + n * QN_KR + k % 4;
    return k / QN_KR * 64 + n * QN_KR + k % QN_KR;
}

void qn_pack_panel(const qn_weights *w, int64_t p, const int8_t *codes, int64_t stride, int count) {
    uint8_t *panel = w->data + p * w->panel_bytes, *to = panel + w->codes_at;
    int32_t *sum = (int32_t *)(panel + w->sum_at);
    memset(to, 0, (size_t)(w->panel_bytes - w->codes_at));
    int float8 = w->format >= QN_FLOAT8_E4M3FN;
    if (!float8) memset(sum, 0, (size_t)(QN_NR * w->groups * 4));
    for (int n = 0; n < count; n++) {
        for (int64_t g = 0; g < w->groups; g++) {
            const int8_t *row = codes + n * stride + g * w->group;
            int64_t k = min64(w->group, w->k - g * w->group), first = g * w->group_k;
            int32_t total = 0;
            if (w->format == QN_INT4) {
                for (int64_t i = 0; i < k; i++) {
                    to[code_at(w, n, first + i)] |= (uint8_t)((row[i] & 15) << (i / QN_KR % 2 * 4));
                    total += row[i] & 15;
                }
            } else {
                int64_t i = 0;
                for (; i + QN_KR <= k; i += QN_KR) {
                    memcpy(to + code_at(w, n, first + i), row + i, QN_KR);
                    total += row[i] + row[i + 1] + row[i + 2] + row[i + 3];
                }
                for (; i < k; i++) {
                    to[code_at(w, n, first + i)] = (uint8_t)row[i];
                    total += row[i];
                }
            }
            if (!float8) sum[g * QN_NR + n] = total;
        }
    }
}

void qn_unpack_panel(const qn_weights *w, int64_t p, int8_t *codes, int64_t stride, int count) {
    const uint8_t *from = w->data + p * w->panel_bytes + w->codes_at;
    for (int n = 0; n < count; n++) {
        for (int64_t g = 0; g < w->groups; g++) {
            int8_t *row = codes + n * stride + g * w->group;
            int64_t k = min64(w->group, w->k - g * w->group), first = g * w->group_k;
            for (int64_t i = 0; i < k; i++) {
                uint8_t byte = from[code_at(w, n, first + i)];
                row[i] = (int8_t)(w->format == QN_INT4 ? byte >> (i / QN_KR % 2 * 4) & 15 : byte);
            }
        }
    }
}

/* ---- the walk ---- */

enum {
    BLOCK_BYTES = 768 << 10, /* quantized rows that stay in the L2 cache while the panels pass by */
    BLOCK_ROWS = 256,
    FLOAT_BLOCK_ROWS = 256,  /* rows that share the work of decoding the weights */
    DECODED_K = 128          /* k of decoded weights that stay in the L1 cache */
};

/* Does the product run in float32: float activations, or float8 weights? */
static int is_float(const qn_call *c) { return c->input == QN_INPUT_FLOAT || c->w->format >= QN_FLOAT8_E4M3FN; }

static int64_t row_bytes(const qn_kernel *kernel, const qn_call *c) {
    if (c->input == QN_INPUT_FLOAT) return 0; /* x itself is read */
    if (is_float(c)) return round_up(c->w->k * 4, 64);
    return round_up(c->w->groups * c->w->group_k * kernel->a_bytes, 64);
}

static int64_t block_rows(const qn_kernel *kernel, const qn_call *c) {
    int64_t tile = kernel->rows, rows = BLOCK_ROWS;
    if (is_float(c)) {
        tile = kernel->float_rows;
        rows = FLOAT_BLOCK_ROWS;
    } else {
        rows = min64(rows, BLOCK_BYTES / row_bytes(kernel, c));
    }
    rows = rows / tile * tile;
    return min64(rows < tile ? tile : rows, c->m);
}

/* Scratch: | codes | scale | zero | sums | decoded weights | float tiles of a block | each 64-byte aligned. */
typedef struct { int64_t scale, zero, sum, decoded, tiles, end; } scratch_layout;

static scratch_layout layout_scratch(const qn_kernel *kernel, const qn_call *c) {
    int64_t rows = block_rows(kernel, c);
    scratch_layout s;
    s.scale = row_bytes(kernel, c) * rows;
    s.zero = s.scale + round_up(rows * 4, 64);
    s.sum = s.zero + round_up(rows * 4, 64);
    s.decoded = s.sum + round_up(rows * c->w->groups * 4, 64);
    s.tiles = s.decoded + (is_float(c) ? DECODED_K * QN_TILE_COLS * 4 : 0);
    s.end = s.tiles + (is_float(c) ? 2 * rows * QN_TILE_COLS * 4 : 0);
    return s;
}

int64_t qn_scratch_bytes(const qn_kernel *kernel, const qn_call *c) { return layout_scratch(kernel, c).end; }

/* K so large that a sum might not fit int32: raw sums of segments are added in int64, corrected there, and converted
 * once. Writes the accumulators if they are what was asked for, else their float values. */
static void wide_group(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel,
                       int panels, int64_t g, const uint8_t *a, const uint8_t *b, float *converted) {
    const qn_weights *w = c->w;
    int64_t total[QN_TILE_ROWS * QN_TILE_COLS] = {0};
    int32_t acc[QN_TILE_ROWS * QN_TILE_COLS];
    int int4 = w->format == QN_INT4;
    for (int64_t k0 = 0; k0 < w->group_k; k0 += QN_SEGMENT) {
        int64_t k = min64(QN_SEGMENT, w->group_k - k0);
        (int4 ? kernel->tile_int4 : kernel->tile_int8)(count, panels, k, a + k0 * kernel->a_bytes, rows->a_stride,
                                                       b + k0 * QN_NR / (int4 ? 2 : 1), w->panel_bytes, acc);
        for (int r = 0; r < count; r++)
            for (int n = 0; n < panels * QN_NR; n++) total[r * QN_TILE_COLS + n] += acc[r * QN_TILE_COLS + n];
    }
    int64_t k = min64(w->group, w->k - g * w->group);
    for (int r = 0; r < count; r++) {
        int64_t zero = rows->zero[row + r];
        for (int n = 0; n < panels * QN_NR; n++) {
            const uint8_t *at = w->data + (panel + n / QN_NR) * w->panel_bytes;
            int64_t entry = g * QN_NR + n % QN_NR, column = panel * QN_NR + n;
            int64_t v = total[r * QN_TILE_COLS + n] - zero * ((const int32_t *)(at + w->sum_at))[entry];
            if (w->asymmetric)
                v -= ((const int32_t *)(at + w->zero_at))[entry] * (rows->sum[(row + r) * w->groups + g] - k * zero);
            if (w->bias == QN_BIAS_INT32) v += ((const int32_t *)(at + w->bias_at))[n % QN_NR];
            if (c->output == QN_OUTPUT_ACC64 && column < w->n)
                ((int64_t *)((uint8_t *)c->y + (rows->first + row + r) * c->y_stride))[g * w->n + column] = v;
            converted[r * QN_TILE_COLS + n] = (float)v;
        }
    }
}

/* Does the kernel add up the groups by itself? */
static int sums_groups(const qn_kernel *kernel, const qn_call *c) {
    return kernel->tile_groups && c->w->groups > 1 && c->w->group_k <= QN_PAIR_GROUP && !c->wide &&
           c->output != QN_OUTPUT_ACC32 && c->w->bias != QN_BIAS_INT32;
}

/* Turn the rows' sums of codes into what `tile_groups` multiplies with the panels' sums and zero points. */
static void pair_sums(const qn_call *c, const qn_rows *rows) {
    const qn_weights *w = c->w;
    for (int64_t i = 0; i < rows->count; i++) {
        for (int64_t g = 0; g < w->groups; g++) {
            int32_t *sum = rows->sum + i * w->groups + g, zero = rows->zero[i];
            int32_t k = (int32_t)min64(w->group, w->k - g * w->group);
            *sum = (int32_t)((uint32_t)zero | (uint32_t)(*sum - k * zero) << 16);
        }
    }
}

/* All groups of one tile: rows [row, row + count) by panels [panel, panel + panels). */
static void integer_tile(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t row, int count,
                         int64_t panel, int panels) {
    const qn_weights *w = c->w;
    int int4 = w->format == QN_INT4;
    int64_t group_bytes = w->group_k * QN_NR / (int4 ? 2 : 1);
    const uint8_t *codes = w->data + panel * w->panel_bytes + w->codes_at;
    int32_t acc[QN_TILE_ROWS * QN_TILE_COLS];
    float converted[QN_TILE_ROWS * QN_TILE_COLS], sum[QN_TILE_ROWS * QN_TILE_COLS];
    if (sums_groups(kernel, c)) {
        for (int p = 0; p < panels; p++)
            kernel->tile_groups(c, rows, row, count, w->data + (panel + p) * w->panel_bytes, sum + p * QN_NR);
        kernel->epilogue(c, rows, row, count, panel, panels, w->groups - 1, 0, 0, sum);
        return;
    }
    for (int64_t g = 0; g < w->groups; g++) {
        const uint8_t *a = rows->a + row * rows->a_stride + g * w->group_k * kernel->a_bytes;
        const uint8_t *b = codes + g * group_bytes;
        if (c->wide) {
            wide_group(kernel, c, rows, row, count, panel, panels, g, a, b, converted);
            if (c->output != QN_OUTPUT_ACC64) kernel->epilogue(c, rows, row, count, panel, panels, g, 0, converted, sum);
        } else {
            (int4 ? kernel->tile_int4 : kernel->tile_int8)(count, panels, w->group_k, a, rows->a_stride, b, w->panel_bytes, acc);
            kernel->epilogue(c, rows, row, count, panel, panels, g, acc, 0, sum);
        }
    }
}

/* Does the kernel go the whole way from codes to y by itself? */
static int goes_whole_way(const qn_kernel *kernel, const qn_call *c) {
    return kernel->layer_tile && c->w->format == QN_INT8 && c->w->groups == 1 && !c->wide && c->output != QN_OUTPUT_ACC32;
}

/* n things cut into parts of nearly the same size: the first `longer` have one more than the others. */
typedef struct { int64_t parts, size, longer; } partition;

static partition cut(int64_t n, int64_t most) {
    int64_t parts = (n + most - 1) / most;
    return (partition){parts, parts ? n / parts : 0, parts ? n % parts : 0};
}

static int64_t part_size(const partition *p, int64_t i) { return p->size + (i < p->longer); }

/* A block of rows by panels [first, last). */
static void integer_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last) {
    const qn_weights *w = c->w;
    int whole = goes_whole_way(kernel, c);
    partition row_tiles = cut(rows->count, kernel->rows);
    partition panel_tiles = cut(last - first, whole ? kernel->layer_panels[part_size(&row_tiles, 0)] : kernel->panels);
    int64_t panel = first;
    for (int64_t p = 0; p < panel_tiles.parts; p++) {
        int panels = (int)part_size(&panel_tiles, p);
        int64_t row = 0;
        for (int64_t r = 0; r < row_tiles.parts; r++) {
            int count = (int)part_size(&row_tiles, r);
            if (whole)
                kernel->layer_tile(c, rows, row, count, panel, panels,
                                   w->data + min64(panel + panels + r, w->panels - 1) * w->panel_bytes + w->codes_at);
            else
                integer_tile(kernel, c, rows, row, count, panel, panels);
            row += count;
        }
        panel += panels;
    }
}

/* Float products: weights are decoded a piece of k at a time, and the piece is used by every row of the block. Float
 * activations take scaled weights in one chain over all k; float8 activations take a chain and a scale each group. */
static void float_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, float *decoded, float *tiles) {
    const qn_weights *w = c->w;
    int scaled = c->input == QN_INPUT_FLOAT;
    float *sums = tiles + rows->count * QN_TILE_COLS;
    for (int64_t panel = 0; panel < w->panels; panel += kernel->float_panels) {
        int panels = (int)min64(kernel->float_panels, w->panels - panel);
        for (int64_t g = 0; g < w->groups; g++) {
            if (g == 0 || !scaled) memset(tiles, 0, (size_t)(rows->count * QN_TILE_COLS) * 4);
            int64_t group_k = min64(w->group, w->k - g * w->group);
            for (int64_t k0 = 0; k0 < group_k; k0 += DECODED_K) {
                int64_t k = min64(DECODED_K, group_k - k0);
                for (int p = 0; p < panels; p++)
                    kernel->decode(w, w->data + (panel + p) * w->panel_bytes, g, k0, k, scaled, decoded + p * QN_NR,
                                   panels * QN_NR);
                for (int64_t row = 0; row < rows->count; row += kernel->float_rows)
                    kernel->tile_float((int)min64(kernel->float_rows, rows->count - row), panels, k,
                                       rows->a + row * rows->a_stride + (g * w->group + k0) * 4, rows->a_stride, decoded,
                                       tiles + row * QN_TILE_COLS);
            }
            if (g == w->groups - 1 || !scaled)
                for (int64_t row = 0; row < rows->count; row++)
                    kernel->epilogue(c, rows, row, 1, panel, panels, g, 0, tiles + row * QN_TILE_COLS,
                                     sums + row * QN_TILE_COLS);
        }
    }
}

/* The calling thread's floating-point mode, set to the default (round to even, subnormals kept) for the call: another
 * library may have made this thread flush subnormals, and the bits must not depend on that. */
#if defined(__x86_64__) && defined(__GNUC__)
static uint64_t enter_default_mode(void) {
    uint32_t mode, standard = 0x1F80;
    __asm__ volatile("stmxcsr %0" : "=m"(mode));
    __asm__ volatile("ldmxcsr %0" : : "m"(standard) : "memory");
    return mode;
}
static void leave_default_mode(uint64_t before) {
    uint32_t mode = (uint32_t)before;
    __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory");
}
#elif defined(__aarch64__) && defined(__GNUC__)
static uint64_t enter_default_mode(void) {
    uint64_t mode, standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard) : "memory");
    return mode;
}
static void leave_default_mode(uint64_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#else
static uint64_t enter_default_mode(void) { return 0; }
static void leave_default_mode(uint64_t before) { (void)before; }
#endif

void qn_linear(const qn_kernel *kernel, const qn_call *c, uint8_t *scratch) {
    uint64_t mode = enter_default_mode();
    scratch_layout s = layout_scratch(kernel, c);
    int64_t block = block_rows(kernel, c);
    qn_rows rows = {
        .a = scratch, .a_stride = row_bytes(kernel, c), .scale = (float *)(scratch + s.scale),
        .zero = (int32_t *)(scratch + s.zero), .sum = (int32_t *)(scratch + s.sum),
    };
    for (rows.first = 0; rows.first < c->m; rows.first += block) {
        rows.count = min64(block, c->m - rows.first);
        if (c->input == QN_INPUT_FLOAT) {
            rows.a = (uint8_t *)c->x + rows.first * c->x_stride;
            rows.a_stride = c->x_stride;
        } else {
            kernel->quantize_rows(c, &rows);
            if (sums_groups(kernel, c)) pair_sums(c, &rows);
        }
        if (is_float(c))
            float_block(kernel, c, &rows, (float *)(scratch + s.decoded), (float *)(scratch + s.tiles));
        else
            integer_block(kernel, c, &rows, 0, c->w->panels);
    }
    leave_default_mode(mode);
}
