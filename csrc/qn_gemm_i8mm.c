/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The kernels of qn_gemm_neon.c with 8-bit matrix products (FEAT_I8MM, from Armv8.6 on).
 */
#define QN_I8MM
#include "qn_gemm_neon.c"
