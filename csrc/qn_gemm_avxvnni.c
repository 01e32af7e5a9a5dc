/* SPDX-License-Identifier: BSD-3-Clause
 *
 * AVX-VNNI: the kernels of qn_gemm_vnni256.c in the VEX encoding, for CPUs that have VNNI but no AVX-512.
 */
#define QN_VEX
#include "qn_gemm_vnni256.c"
