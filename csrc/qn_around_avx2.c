/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What is around the products on vectors of 256 bits, once for all kernels that have them: see qn_around_avx2.h.
 */
#include "qn_around_avx2.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QN_A_BYTES 1
#include "qn_vector_avx2.h"

#include "qn_tile.h"

#include "qn_range.h"
#include "qn_rows.h"
#include "qn_epilogue.h"
#include "qn_unpack.h"

void qn_avx2_quantize_rows(const qn_call *c, qn_rows *rows) { quantize_rows(c, rows); }

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int qn_around_avx2_is_for_x86_64; /* a translation unit may not be empty */
#endif
