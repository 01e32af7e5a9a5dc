/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The kernels of qn_gemm_neon.c with dot products (FEAT_DotProd, from Armv8.2 on).
 */
#define QN_DOTPROD
#include "qn_gemm_neon.c"
