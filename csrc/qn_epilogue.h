/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The way of finished sums to y: scales, bias, activation, and codes where y has them. Made of the verbs that qn_tile.h lists, after which an
 * instruction set's file includes this.
 */
#include "qn_activation.h"
#include "qn_quantize.h"

/* Give one row of finished sums to y as floats. */
QN_INLINE void emit_floats(const float *values, int64_t columns, float *y, const qn_activation activation) {
    int64_t n = 0;
    for (; n + QN_W <= columns; n += QN_W) vf_store(y + n, activate(vf_load(values + n), activation));
    if (n < columns) {
        float lanes[QN_W];
        vf_store(lanes, activate(vf_load(values + n), activation));
        memcpy(y + n, lanes, taken(columns - n) * 4);
    }
}

/* The same as codes: clamp(rint(activation(value) / scale) + zero, low, high), one byte each. */
QN_INLINE void emit_codes(const float *values, int64_t columns, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *y,
                          const qn_activation activation) {
    VF s = vf_splat(scale), lowest = vf_splat((float)(low - zero)), highest = vf_splat((float)(high - zero));
    VU z = vu_splat((uint32_t)zero);
    int64_t n = 0;
    if (divides_by_multiplying(scale)) {
        VF reciprocal = vf_splat(1.0f / scale);
        for (; n + 4 * QN_W <= columns; n += 4 * QN_W) {
            VU q[4];
            for (int j = 0; j < 4; j++)
                q[j] = quantize_by_reciprocal(activate(vf_load(values + n + j * QN_W), activation), s, reciprocal, lowest,
                                              highest, 1);
            vu_store_bytes(y + n, q, zero - low, low);
        }
        for (; n + QN_W <= columns; n += QN_W)
            vu_store_u8(y + n, z + quantize_by_reciprocal(activate(vf_load(values + n), activation), s, reciprocal, lowest,
                                                          highest, 1));
    }
    for (; n < columns; n += QN_W) {
        uint8_t lanes[QN_W];
        vu_store_u8(lanes, quantize(activate(load_some(values + n, columns - n), activation), s, lowest, highest, z));
        memcpy(y + n, lanes, taken(columns - n));
    }
}

QN_AROUND_LINKAGE void QN_AROUND(quantize_values)(const float *x, int64_t n, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *codes) {
    emit_codes(x, n, scale, zero, low, high, codes, QN_IDENTITY);
}

/* Give a tile of finished sums, float [count][stride] with bias and all, to y; from `column` on, as many as there are. */
QN_AROUND_LINKAGE void QN_AROUND(emit)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t column, int64_t columns,
                    const float *values, int64_t stride) {
    int codes = output_bytes(c) == 1;
    uint8_t *y = output_at(c, rows, row, column);
    if (columns > c->w->n - column) columns = c->w->n - column;
#define EMIT(ACTIVATION)                                                                                               \
    for (int r = 0; r < count; r++) {                                                                                  \
        if (codes)                                                                                                     \
            emit_codes(values + r * stride, columns, c->out_scale, c->out_zero, c->out_min, c->out_max,                \
                       y + r * c->y_stride, ACTIVATION);                                                               \
        else                                                                                                           \
            emit_floats(values + r * stride, columns, (float *)(y + r * c->y_stride), ACTIVATION);                     \
    }
    if (c->activation == QN_IDENTITY) {
        EMIT(QN_IDENTITY)
    } else if (c->activation == QN_RELU) {
        EMIT(QN_RELU)
    } else {
        EMIT(c->activation)
    }
#undef EMIT
}

/* What the epilogue of one group does is the same for every row of a tile, so it is decided once per vector of columns
 * and the rows are a loop without decisions: `kind` is a constant where this is inlined. */
typedef enum { GROUP, LAST, SUMS } epilogue_kind;

QN_INLINE void finish_columns(const qn_call *c, const qn_rows *rows, int64_t row, int count, const uint8_t *panel, int n,
                              int64_t columns, int64_t g, const int32_t *acc, const float *converted, float *sum, uint8_t *y,
                              const epilogue_kind kind) {
    const qn_weights *w = c->w;
    int float_input = c->input == QN_INPUT_FLOAT, summed = !acc && !converted, add_sum = g > 0 && !float_input && !summed;
    column_terms t = terms_of_columns(w, panel, n, g, acc != 0);
    for (int r = 0; r < count; r++, y += c->y_stride) {
        int64_t i = row + r, lane = (int64_t)r * QN_TILE_COLS + n;
        VF product;
        if (acc) {
            uint32_t a_sum = w->asymmetric ? corrected_sum(w, rows, i, g) : 0;
            VU v = correct(vu_load((const uint32_t *)acc + lane), &t, w->asymmetric, rows->zero[i], a_sum) + t.int_bias;
            if (kind == SUMS) {
                uint32_t lanes[QN_W];
                vu_store(lanes, v);
                memcpy(y, lanes, taken(columns) * 4);
                continue;
            }
            product = vf_from_vu(v);
        } else {
            product = vf_load((converted ? converted : sum) + lane);
        }
        if (!float_input && !summed) product = product * (vf_splat(rows->scale[i]) * t.scale);
        if (add_sum) product = vf_load(sum + lane) + product;
        if (kind == LAST) product = product + t.bias;
        vf_store(sum + lane, product);
    }
}

QN_AROUND_LINKAGE void QN_AROUND(epilogue)(const qn_call *c, const qn_rows *rows, int64_t row, int count, int64_t panel, int panels, int64_t g,
                     const int32_t *acc, const float *converted, float *sum) {
    const qn_weights *w = c->w;
    epilogue_kind kind = c->output == QN_OUTPUT_ACC32 ? SUMS
                         : g < w->groups - 1 && c->input != QN_INPUT_FLOAT ? GROUP : LAST;
#define FINISH(KIND)                                                                                                   \
    finish_columns(c, rows, row, count, from, n, columns, g, acc ? acc + p * QN_NR : 0,                                 \
                   converted ? converted + p * QN_NR : 0, sum + p * QN_NR, y, KIND)
    for (int p = 0; p < panels; p++) {
        const uint8_t *from = w->data + (panel + p) * w->panel_bytes;
        for (int n = 0; n < QN_NR; n += QN_W) {
            int64_t column = (panel + p) * QN_NR + n, columns = w->n - column;
            if (columns <= 0) break;
            /* Accumulators are kept apart group by group. */
            uint8_t *y = (uint8_t *)c->y + (rows->first + row) * c->y_stride + (g * w->n + column) * 4;
            switch (kind) {
            case GROUP: FINISH(GROUP); break;
            case SUMS: FINISH(SUMS); break;
            default: FINISH(LAST); break;
            }
        }
    }
    if (kind == LAST) QN_AROUND(emit)(c, rows, row, count, panel * QN_NR, panels * QN_NR, sum, QN_TILE_COLS);
#undef FINISH
}
