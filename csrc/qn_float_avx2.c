/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Float products with AVX2 and FMA: 6 rows by 16 columns are 12 sums, two vectors of weights and a broadcast.
 */
#include "qn_float_vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QN_A_BYTES 1
#include "qn_vector_avx2.h"

#define QN_FLOAT_ROWS 6
#define QN_FLOAT_PANELS 1
#define QN_DIRECT_PANELS 2
#define QN_DIRECT_WIDE_ROWS 2
#include "qn_float.h"

QN_DEFINE_FLOAT_PRODUCTS(avx2)

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int qn_float_avx2_is_for_x86_64; /* a translation unit may not be empty */
#endif
