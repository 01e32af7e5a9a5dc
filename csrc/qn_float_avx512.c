/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Float products with AVX-512: 9 rows by 48 columns are 27 sums, beside three vectors of weights; rows are broadcast within
 * the multiply-add.
 */
#include "qn_float_vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

#define QN_A_BYTES 1
#include "qn_vector_avx512.h"

#define QN_FLOAT_ROWS 9
#define QN_FLOAT_PANELS 3
#define QN_DIRECT_PANELS 3
#define QN_DIRECT_WIDE_ROWS 6
#include "qn_float.h"

QN_DEFINE_FLOAT_PRODUCTS(avx512)

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int qn_float_avx512_is_for_x86_64; /* a translation unit may not be empty */
#endif
