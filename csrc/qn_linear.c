/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The call of a linear layer: the walk over blocks of rows, panels and groups, and how threads share it.
 */
#include "qn_atomic.h"
#include "qn_float_mode.h"
#include "qn_partition.h"

#include <string.h>

/* ---- the walk ---- */

enum {
    BLOCK_BYTES = 768 << 10, /* quantized rows that stay in the L2 cache while the panels pass by */
    BLOCK_ROWS = 256,
    FLOAT_BLOCK_ROWS = 192,  /* rows that share the work of decoding the weights */
    FLOAT_PANELS = 24,       /* whose sums wait for the next piece of k, a multiple of QN_TILE_PANELS */
    FLOAT_K = 256,           /* a piece of k: with its rows, sums and a tile's decoded weights, half of an L2 cache of 1 MiB */
    PIECES_A_THREAD = 8,     /* of a block, so that whoever is late leaves little to wait for */
    FLOAT_PIECES_A_THREAD = 4, /* fewer, as each arranges the rows for itself */
    PIECE_PANELS = 8,        /* of a piece at least, where a tile takes any number */
    UNPACK_ROWS = 48,        /* for fewer, int4 weights are sooner unpacked in registers, tile by tile */
    UNPACK_K = 6 << 10,      /* of longer rows the panels of a tile are more than the L2 cache should hold */
    UNPACKED_BYTES = 128 << 10 /* of int8 weights that are made of int4 ones at a time */
};

/* Does the product run in float32: float activations, or float8 weights? */
static int is_float(const qn_call *c) { return c->input == QN_INPUT_FLOAT || c->w->format >= QN_FLOAT8_E4M3FN; }

static int64_t row_bytes(const qn_kernel *kernel, const qn_call *c) {
    if (c->input == QN_INPUT_FLOAT) return 0; /* x itself is read */
    if (is_float(c)) return qn_round_up(c->w->k * 4, 64);
    int64_t bytes = qn_round_up(c->w->groups * c->w->group_k * kernel->a_bytes, 64);
    return qn_sums_groups(kernel, c) || bytes % 2048 == 0 ? bytes | 64 : bytes; /* rows beside each other in different sets of the L1 cache */
}

static int64_t block_rows(const qn_kernel *kernel, const qn_call *c) {
    if (is_float(c)) { /* blocks of nearly the same size, as a small one decodes as much as a large one */
        return qn_pieces(c->m, qn_pieces(c->m, FLOAT_BLOCK_ROWS));
    }
    int64_t tile = kernel->rows;
    if (c->m <= tile) return c->m;
    int64_t rows = qn_quotient(qn_min64(BLOCK_ROWS, qn_quotient(BLOCK_BYTES, row_bytes(kernel, c))), tile) * tile;
    return qn_min64(rows < tile ? tile : rows, c->m);
}

/* Few rows are multiplied with weights as they are decoded; for more, decoded weights are kept for a moment. */
static int is_direct(const qn_kernel *kernel, const qn_call *c) { return is_float(c) && c->m <= kernel->direct_most; }

/* Sums of a float product wait as tiles of [rows][QN_TILE_COLS]. */
static int64_t float_tiles(int64_t panels) { return qn_pieces(qn_min64(panels, FLOAT_PANELS), QN_TILE_PANELS); }

/* Float8 weights with groups and float8 activations: a chain and a scale each group, the groups added up apart. */
static int adds_groups(const qn_call *c) { return c->input != QN_INPUT_FLOAT && c->w->groups > 1; }

/* Int4 weights with large groups, or none, are unpacked for many rows: some panels at a time become int8 weights. */
static qn_weights unpacked_weights(const qn_weights *w, int64_t first, int64_t panels, uint8_t *data) {
    qn_weights some = *w;
    some.format = QN_INT8;
    some.asymmetric = 0;
    some.has_sums = 1;
    some.scale = QN_SCALE_FLOAT32;
    some.n = qn_min64(w->n - first * QN_NR, panels * QN_NR);
    some.data = data;
    qn_weights_layout(&some);
    return some;
}

static int unpacks_panels(const qn_kernel *kernel, const qn_call *c) {
    return kernel->unpack_panel && c->w->format == QN_INT4 && !is_float(c) && !qn_sums_groups(kernel, c) && !c->wide &&
           c->output != QN_OUTPUT_ACC32 && c->m >= UNPACK_ROWS && c->w->k <= UNPACK_K;
}

/* How many panels are unpacked at a time: those of whole tiles. */
static int64_t unpacked_panels(const qn_weights *w) {
    int64_t panels = UNPACKED_BYTES / unpacked_weights(w, 0, 1, 0).panel_bytes;
    panels = panels > QN_TILE_PANELS ? panels / QN_TILE_PANELS * QN_TILE_PANELS : QN_TILE_PANELS;
    return qn_min64(panels, w->panels);
}

/* Scratch: | codes | scale | zero | sums | of a block, then for each thread | decoded weights | a block's rows, arranged for
 * tiles | its sums | and of all groups |; each 64-byte aligned. */
typedef struct { int64_t scale, zero, sum, threads, rows, tiles, totals, thread_bytes; } scratch_layout;

static scratch_layout layout_scratch(const qn_kernel *kernel, const qn_call *c) {
    int64_t rows = block_rows(kernel, c);
    scratch_layout s;
    s.scale = row_bytes(kernel, c) * rows;
    s.zero = s.scale + qn_round_up(rows * 4, 64);
    s.sum = s.zero + qn_round_up(rows * 4, 64);
    s.threads = s.sum + qn_round_up(rows * c->w->groups * 4, 64);
    int64_t pieced = is_float(c) && !is_direct(kernel, c), k = qn_round_up(qn_min64(c->w->k, FLOAT_K), QN_KR);
    int64_t sums = float_tiles(c->w->panels) * rows * QN_TILE_COLS * 4;
    s.rows = pieced * k * kernel->float_panels * QN_NR * 4;
    s.tiles = s.rows + pieced * qn_round_up(rows * k * 4, 64);
    s.totals = s.tiles + pieced * sums;
    s.thread_bytes = unpacks_panels(kernel, c) ? unpacked_panels(c->w) * unpacked_weights(c->w, 0, 1, 0).panel_bytes
                     : qn_sums_groups(kernel, c) ? qn_groups_scratch(c->w, rows) : s.totals + (adds_groups(c) ? pieced * sums : 0);
    return s;
}

int64_t qn_scratch_bytes(const qn_kernel *kernel, const qn_call *c, int threads) {
    scratch_layout s = layout_scratch(kernel, c);
    return s.threads + threads * s.thread_bytes;
}

/* K so large that a sum might not fit int32: raw sums of segments are added in int64, corrected there, and converted
 * once. Writes the accumulators if they are what was asked for, else their float values. */
static void wide_group(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel,
                       int panels, int64_t g, const uint8_t *a, const uint8_t *b, float *converted) {
    const qn_weights *w = c->w;
    int64_t total[QN_TILE_ROWS * QN_TILE_COLS] = {0};
    int32_t acc[QN_TILE_ROWS * QN_TILE_COLS];
    int int4 = w->format == QN_INT4;
    for (int64_t k0 = 0; k0 < w->group_k; k0 += QN_SEGMENT) {
        int64_t k = qn_min64(QN_SEGMENT, w->group_k - k0);
        (int4 ? kernel->tile_int4 : kernel->tile_int8)(count, panels, k, a + k0 * kernel->a_bytes, rows->a_stride,
                                                       b + k0 * QN_NR / (int4 ? 2 : 1), w->panel_bytes, acc);
        for (int r = 0; r < count; r++)
            for (int n = 0; n < panels * QN_NR; n++) total[r * QN_TILE_COLS + n] += acc[r * QN_TILE_COLS + n];
    }
    int64_t k = qn_min64(w->group, w->k - g * w->group);
    for (int r = 0; r < count; r++) {
        int64_t zero = rows->zero[row + r];
        for (int n = 0; n < panels * QN_NR; n++) {
            const uint8_t *at = w->data + (panel + n / QN_NR) * w->panel_bytes;
            int64_t column = panel * QN_NR + n;
            int64_t v = total[r * QN_TILE_COLS + n] - zero * ((const int32_t *)(at + w->sum_at))[g * QN_NR + n % QN_NR];
            if (w->asymmetric)
                v -= qn_weight_zero(w, column, g) * (rows->sum[(row + r) * rows->sum_row + g * rows->sum_group] - k * zero);
            if (w->bias == QN_BIAS_INT32) v += ((const int32_t *)(at + w->bias_at))[n % QN_NR];
            if (c->output == QN_OUTPUT_ACC64 && column < w->n)
                ((int64_t *)((uint8_t *)c->y + (rows->first + row + r) * c->y_stride))[g * w->n + column] = v;
            converted[r * QN_TILE_COLS + n] = (float)v;
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

static partition tiles_of_rows(const qn_kernel *kernel, const qn_call *c, int64_t count) {
    int64_t most = goes_whole_way(kernel, c) ? kernel->layer_rows : kernel->rows;
    return cut_evenly(count, qn_pieces(count, most));
}

/* Panels of a tile, when a block of `count` rows is cut into tiles. */
static int64_t tile_panels(const qn_kernel *kernel, const qn_call *c, int64_t count) {
    partition rows = tiles_of_rows(kernel, c, count);
    return goes_whole_way(kernel, c) ? kernel->layer_panels[qn_min64(part_size(&rows, 0), QN_TILE_ROWS)] : kernel->panels;
}

/* Rows of a block by panels [first, last). Tiles are of nearly the same size, as a small one is slow for its size. */
static void integer_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last) {
    const qn_weights *w = c->w;
    int whole = goes_whole_way(kernel, c);
    int64_t most = tile_panels(kernel, c, rows->count), panel = first;
    partition row_tiles = tiles_of_rows(kernel, c, rows->count);
    partition panel_tiles = cut_evenly(last - first, qn_pieces(last - first, most));
    for (int64_t p = 0; p < panel_tiles.parts; p++) {
        int panels = (int)part_size(&panel_tiles, p);
        int64_t row = 0, next = qn_min64(panel + panels, w->panels);
        /* Beside each tile a share of the panels after these is asked for, and no more, since the L2 cache has to hold it. */
        int64_t share = qn_round_up(qn_pieces(qn_min64(panels, w->panels - next) * w->panel_bytes, row_tiles.parts), 64);
        for (int64_t r = 0; r < row_tiles.parts; r++) {
            int count = (int)part_size(&row_tiles, r);
            if (whole)
                kernel->layer_tile(c, rows, row, count, panel, panels, w->data + next * w->panel_bytes + r * share, share);
            else
                integer_tile(kernel, c, rows, row, count, panel, panels);
            row += count;
        }
        panel += panels;
    }
}

/* The same with weights that are unpacked first. */
static void unpacked_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last, uint8_t *scratch) {
    for (int64_t panels; first < last; first += panels) {
        panels = qn_min64(unpacked_panels(c->w), last - first);
        qn_weights some = unpacked_weights(c->w, first, panels, scratch);
        for (int64_t p = 0; p < panels; p++)
            kernel->unpack_panel(c->w, c->w->data + (first + p) * c->w->panel_bytes, &some, scratch + p * some.panel_bytes);
        qn_call part = *c; /* these columns only */
        part.w = &some;
        part.y = (uint8_t *)c->y + first * QN_NR * (c->output == QN_OUTPUT_FLOAT32 ? 4 : 1);
        integer_block(kernel, &part, rows, 0, panels);
    }
}

/* Floats of rows as tiles take them: four k of each row of the tile, then the next four. */
static void arrange_rows(const uint8_t *a, int64_t a_stride, int64_t count, int64_t k, float *to) {
    for (int64_t r = 0; r < count; r++, a += a_stride) {
        const float *from = (const float *)(const void *)a;
        float *at = to + r * QN_KR;
        int64_t i = 0;
        for (; i + QN_KR <= k; i += QN_KR, at += count * QN_KR) memcpy(at, from + i, QN_KR * 4);
        memcpy(at, from + i, (size_t)(k - i) * 4);
    }
}

/* Decode k weights of one panel from `start` on, whatever the groups they are of, into out[k][stride]. */
static void decode_run(const qn_kernel *kernel, const qn_weights *w, int64_t panel, int64_t start, int64_t k, int scaled,
                       float *out, int64_t stride) {
    for (int64_t i = start, end = start + k, next; i < end; out += (next - i) * stride, i = next) {
        int64_t g = i / w->group;
        next = qn_min64(end, (g + 1) * w->group);
        kernel->decode(w, w->data + panel * w->panel_bytes, g, i - g * w->group, next - i, scaled, out, stride);
    }
}

typedef struct { float *decoded, *rows, *tiles, *totals; } float_scratch;

/* Add k [start, start + k) to the sums of a block's rows by panels [first, last). The rows are arranged once for all
 * panels, the weights of a tile decoded once for all rows. */
static void float_piece(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                        int64_t start, int64_t k, const float_scratch *scratch) {
    partition tiles = cut_evenly(rows->count, qn_pieces(rows->count, kernel->float_rows));
    for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++))
        arrange_rows(rows->a + row * rows->a_stride + start * 4, rows->a_stride, part_size(&tiles, t), k,
                     scratch->rows + row * qn_round_up(k, QN_KR));
    for (int64_t panel = first, panels; panel < last; panel += panels) {
        int64_t place = (panel - first) % QN_TILE_PANELS;
        float *sums = scratch->tiles + (panel - first - place) / QN_TILE_PANELS * rows->count * QN_TILE_COLS + place * QN_NR;
        panels = qn_min64(kernel->float_panels, last - panel);
        for (int64_t p = 0; p < panels; p++)
            decode_run(kernel, c->w, panel + p, start, k, c->input == QN_INPUT_FLOAT, scratch->decoded + p * QN_NR,
                       panels * QN_NR);
        for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++))
            kernel->tile_float((int)part_size(&tiles, t), (int)panels, k, scratch->rows + row * qn_round_up(k, QN_KR),
                               scratch->decoded, sums + row * QN_TILE_COLS);
    }
}

/* Rows of a block by panels [first, last), FLOAT_PANELS of them at most. Float activations take scaled weights in one chain
 * over all k; float8 activations take a chain and a scale each group. */
static void float_panels(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                         const float_scratch *scratch) {
    const qn_weights *w = c->w;
    int64_t tiles = float_tiles(last - first), tile_values = rows->count * QN_TILE_COLS;
    int64_t chains = c->input == QN_INPUT_FLOAT ? 1 : w->groups, chain_k = c->input == QN_INPUT_FLOAT ? w->k : w->group;
    for (int64_t chain = 0; chain < chains; chain++) {
        int64_t end = qn_min64((chain + 1) * chain_k, w->k);
        memset(scratch->tiles, 0, (size_t)(tiles * tile_values) * 4);
        for (int64_t start = chain * chain_k, k; start < end; start += k) {
            k = qn_min64(FLOAT_K, end - start);
            float_piece(kernel, c, rows, first, last, start, k, scratch);
        }
        for (int64_t t = 0; t < tiles; t++) {
            int64_t panel = first + t * QN_TILE_PANELS;
            float *sums = scratch->tiles + t * tile_values;
            kernel->epilogue(c, rows, 0, (int)rows->count, panel, (int)qn_min64(QN_TILE_PANELS, last - panel),
                             w->groups - chains + chain, 0, sums, adds_groups(c) ? scratch->totals + t * tile_values : sums);
        }
    }
}

static void float_block(const qn_kernel *kernel, const qn_call *c, const qn_rows *rows, int64_t first, int64_t last,
                        const float_scratch *scratch) {
    if (is_direct(kernel, c)) {
        float sums[QN_TILE_ROWS * QN_TILE_COLS];
        partition tiles = cut_evenly(rows->count, qn_pieces(rows->count, kernel->direct_rows));
        for (int64_t panel = first; panel < last; panel += QN_TILE_PANELS) {
            int panels = (int)qn_min64(QN_TILE_PANELS, last - panel);
            for (int64_t t = 0, row = 0; t < tiles.parts; row += part_size(&tiles, t++)) {
                int count = (int)part_size(&tiles, t);
                kernel->float_direct(c, rows, row, count, panel, panels, sums);
                kernel->epilogue(c, rows, row, count, panel, panels, c->w->groups - 1, 0, 0, sums);
            }
        }
        return;
    }
    int64_t units = qn_pieces(last - first, QN_TILE_PANELS), most = FLOAT_PANELS / QN_TILE_PANELS;
    partition cut = cut_evenly(units, qn_pieces(units, most));
    for (int64_t i = 0; i < cut.parts; i++)
        float_panels(kernel, c, rows, first + part_start(&cut, i) * QN_TILE_PANELS,
                     qn_min64(first + part_start(&cut, i + 1) * QN_TILE_PANELS, last), scratch);
}

/* ---- the call, shared among threads ---- */

/* A block of rows is done in two phases, quantizing its rows and then multiplying, each cut into pieces. The pieces of all
 * blocks are numbered in this order and taken one after another; a piece waits until all pieces of the phases before it
 * are done, since the codes it reads, or writes over, are everybody's. Waiting is for threads that are at work only. */
typedef struct {
    const qn_kernel *kernel;
    const qn_call *c;
    uint8_t *scratch;
    scratch_layout layout;
    int64_t block;                                       /* rows of a block, but for the last */
    partition quantize, rows, panels;                    /* the pieces of a full block: of its rows; of its products */
    int64_t panel_unit;                                  /* panels that are not parted */
    int64_t pieces_a_block, pieces;
    qn_atomic next, done;                                /* pieces taken, and ended */
} job;

static void quantize_piece(const job *j, const qn_rows *rows) {
    const qn_call *c = j->c;
    qn_rows some = *rows;
    j->kernel->quantize_rows(c, &some);
    if (qn_sums_groups(j->kernel, c)) qn_pair_sums(c, &some);
}

static void multiply_piece(const job *j, const qn_rows *rows, int64_t first, int64_t last, int thread) {
    uint8_t *own = j->scratch + j->layout.threads + thread * j->layout.thread_bytes;
    if (qn_sums_groups(j->kernel, j->c)) {
        qn_groups_block(j->kernel, j->c, rows, first, last, own);
    } else if (is_float(j->c)) {
        float_scratch scratch = {
            .decoded = (float *)(void *)own, .rows = (float *)(void *)(own + j->layout.rows),
            .tiles = (float *)(void *)(own + j->layout.tiles), .totals = (float *)(void *)(own + j->layout.totals),
        };
        float_block(j->kernel, j->c, rows, first, last, &scratch);
    } else if (unpacks_panels(j->kernel, j->c)) {
        unpacked_block(j->kernel, j->c, rows, first, last, own);
    } else {
        integer_block(j->kernel, j->c, rows, first, last);
    }
}

/* Rows [first, first + count) of the block that begins at row `block` of the call. */
static qn_rows rows_of_block(const job *j, int64_t block, int64_t first, int64_t count) {
    const qn_call *c = j->c;
    int in_place = c->input == QN_INPUT_FLOAT;
    int64_t stride = in_place ? c->x_stride : row_bytes(j->kernel, c);
    int by_group = qn_sums_groups(j->kernel, c); /* then the rows of a group lie side by side */
    int64_t sum_row = by_group ? 1 : c->w->groups, sum_group = by_group ? j->block : 1;
    uint8_t *a = in_place ? (uint8_t *)c->x + block * stride : j->scratch;
    return (qn_rows){
        .first = block + first, .count = count, .a = a + first * stride, .a_stride = stride,
        .scale = (float *)(j->scratch + j->layout.scale) + first, .zero = (int32_t *)(j->scratch + j->layout.zero) + first,
        .sum = (int32_t *)(j->scratch + j->layout.sum) + first * sum_row, .sum_row = sum_row, .sum_group = sum_group,
    };
}

static void do_piece(const job *j, int64_t piece, int thread) {
    int64_t blocks = qn_quotient(piece, j->pieces_a_block), block = blocks * j->block, count = qn_min64(j->block, j->c->m - block);
    piece -= blocks * j->pieces_a_block;
    int quantizing = piece < j->quantize.parts;
    if (!quantizing) piece -= j->quantize.parts;
    const partition *cut_rows = quantizing ? &j->quantize : &j->rows;
    int64_t part = quantizing ? piece : qn_quotient(piece, j->panels.parts);
    int64_t first = qn_min64(part_start(cut_rows, part), count), last = qn_min64(part_start(cut_rows, part + 1), count);
    if (first == last) return; /* the last block may have fewer rows */
    qn_rows rows = rows_of_block(j, block, first, last - first);
    if (quantizing) {
        quantize_piece(j, &rows);
    } else {
        int64_t panel = piece - part * j->panels.parts;
        multiply_piece(j, &rows, part_start(&j->panels, panel) * j->panel_unit,
                       qn_min64(part_start(&j->panels, panel + 1) * j->panel_unit, j->c->w->panels), thread);
    }
}

/* What must be done before `piece`: the pieces of the phases before its own. */
static int64_t before(const job *j, int64_t piece) {
    int64_t block = qn_quotient(piece, j->pieces_a_block) * j->pieces_a_block;
    if (j->quantize.parts == 0) return 0; /* x itself is read */
    return piece - block < j->quantize.parts ? block : block + j->quantize.parts;
}

static void work(void *context, int thread) {
    job *j = context;
    uint64_t mode = qn_enter_default_mode();
    int64_t piece;
    while ((piece = qn_atomic_add(&j->next, 1)) < j->pieces) {
        int64_t needed = before(j, piece);
        for (int tries = 0; qn_atomic_get(&j->done) < needed; tries++) qn_relax(tries);
        do_piece(j, piece, thread);
        qn_atomic_add(&j->done, 1);
    }
    qn_leave_default_mode(mode);
}

/* What a call does besides multiplying, roughly: to quantize a row takes so many ns, and a value so many multiply-adds'
 * time. Layers of few inputs or outputs do hardly anything else. */
enum { ROW_NS = 80, QUANTIZE_MACS = 40, UNPACK_MACS = 12, DECODE_MACS = 4, OUTPUT_MACS = 60 };

int64_t qn_linear_work(const qn_kernel *kernel, const qn_call *c) {
    const qn_weights *w = c->w;
    double rows = (double)c->m, k = (double)(w->groups * w->group_k), n = (double)(w->panels * QN_NR);
    double macs = rows * (k * n + n * OUTPUT_MACS), ns = k * n / 100;
    if (is_float(c)) macs += k * n * DECODE_MACS * (double)qn_pieces(c->m, FLOAT_BLOCK_ROWS);
    if (c->input != QN_INPUT_FLOAT) {
        macs += rows * k * QUANTIZE_MACS;
        ns += rows * ROW_NS;
    }
    if (w->format == QN_INT4 && !is_float(c)) /* nibbles once a tile, and groups for each row */
        macs += k * n * (rows + UNPACK_MACS * (double)qn_pieces(c->m, kernel->rows));
    ns += macs / (is_float(c) ? kernel->float_rate : kernel->rate);
    return ns < 1e15 ? (int64_t)ns : (int64_t)1e15;
}

void qn_linear(const qn_kernel *kernel, const qn_call *c, uint8_t *scratch, int threads, qn_share share) {
    job j = {.kernel = kernel, .c = c, .scratch = scratch, .layout = layout_scratch(kernel, c), .block = block_rows(kernel, c)};
    int64_t tile = is_float(c) ? kernel->float_rows : kernel->rows, tiles = qn_pieces(j.block, tile);
    int64_t pieces = is_float(c) && !is_direct(kernel, c) ? FLOAT_PIECES_A_THREAD : PIECES_A_THREAD;
    int64_t wanted = threads > 1 ? threads * pieces : 1;
    /* Panels first: a piece of them is read by one core only. Rows are cut only where there are too few panels. */
    j.panel_unit = is_float(c) ? QN_TILE_PANELS : 1;
    int64_t units = qn_pieces(c->w->panels, j.panel_unit);
    int64_t panel_tile = is_float(c) ? 1 : qn_min64(tile_panels(kernel, c, j.block), PIECE_PANELS);
    j.panels = cut_evenly(units, qn_min64(wanted, qn_pieces(units, panel_tile)));
    j.rows = cut_evenly(j.block, qn_min64(qn_pieces(wanted, j.panels.parts), tiles));
    j.quantize = cut_evenly(c->input == QN_INPUT_FLOAT ? 0 : j.block, qn_min64(wanted, tiles));
    j.pieces_a_block = j.quantize.parts + j.rows.parts * j.panels.parts;
    j.pieces = j.pieces_a_block * qn_pieces(c->m, j.block);
    if (threads > 1)
        share(threads, work, &j);
    else
        work(&j, 0);
}
