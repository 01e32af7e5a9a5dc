/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What this CPU can do, and the table of kernels.
 */
#include "qn_gemm.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

/* Which register files the operating system saves: a CPU flag alone is not enough (virtual machines, old kernels). */
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static qn_cpu detect(void) {
    qn_cpu cpu = {0};
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    cpu.sse42 = c >> 20 & 1;
    int osxsave = c >> 27 & 1;
    uint64_t saved = osxsave ? saved_registers() : 0;
    int ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6, tiles = (saved & 0x60000) == 0x60000;
    cpu.fma = ymm && (c >> 12 & 1);
    cpu.f16c = ymm && (c >> 29 & 1);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    cpu.avx2 = ymm && (b >> 5 & 1);
    cpu.avx512f = zmm && (b >> 16 & 1);
    cpu.avx512dq = zmm && (b >> 17 & 1);
    cpu.avx512bw = zmm && (b >> 30 & 1);
    cpu.avx512vl = zmm && (b >> 31 & 1);
    cpu.avx512_vnni = zmm && (c >> 11 & 1);
    cpu.amx_int8 = tiles && (d >> 25 & 1);
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx_vnni = ymm && (a >> 4 & 1);
    return cpu;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static qn_cpu detect(void) {
    qn_cpu cpu = {0};
    cpu.neon = 1; /* part of every aarch64 */
    cpu.dotprod = getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
    cpu.i8mm = getauxval(AT_HWCAP2) >> 13 & 1;   /* HWCAP2_I8MM */
    return cpu;
}

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

/* A name that this system does not know is a feature that it does not have. */
static int has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

static qn_cpu detect(void) {
    qn_cpu cpu = {0};
    cpu.neon = 1;
    cpu.dotprod = has("hw.optional.arm.FEAT_DotProd");
    cpu.i8mm = has("hw.optional.arm.FEAT_I8MM");
    return cpu;
}

#else
static qn_cpu detect(void) {
    qn_cpu cpu = {0};
    return cpu;
}
#endif

/* Called first while the extension is imported, which Python does one thread at a time. */
const qn_cpu *qn_cpu_features(void) {
    static qn_cpu cpu;
    static int known;
    if (!known) {
        cpu = detect();
        known = 1;
    }
    return &cpu;
}

/* The one place that lists instruction sets: worst first, the last usable one is the default. */
const qn_kernel *const qn_kernels[] = {
    &qn_kernel_scalar,
#if defined(__x86_64__)
    &qn_kernel_avx2,
#if __GNUC__ >= 11
    &qn_kernel_avxvnni,
#endif
    &qn_kernel_vnni256,
    &qn_kernel_avx512vnni,
#elif defined(__aarch64__) && defined(__GNUC__)
    &qn_kernel_neon,
    &qn_kernel_dotprod,
    &qn_kernel_i8mm,
#endif
    0,
};
