/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Float products with NEON: 6 rows by 16 columns are 24 sums, four vectors of weights and a broadcast.
 */
#include "qn_float_vector.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#include <string.h>

#include "qn_vector_neon.h"

#define QN_FLOAT_ROWS 6
#define QN_FLOAT_PANELS 1
#define QN_DIRECT_PANELS 2
#define QN_DIRECT_WIDE_ROWS 2
#include "qn_float.h"

QN_DEFINE_FLOAT_PRODUCTS(neon)
#else
typedef int qn_float_neon_is_for_aarch64; /* a translation unit may not be empty */
#endif
