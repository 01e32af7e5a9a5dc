/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The calling thread's floating-point mode, set to the default (round to even, subnormals kept) for the call: another
 * library may have made this thread flush subnormals, and the bits must not depend on that.
 */
#ifndef QN_FLOAT_MODE_H
#define QN_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
static inline uint64_t qn_enter_default_mode(void) {
    uint32_t mode, standard = 0x1F80;
    __asm__ volatile("stmxcsr %0" : "=m"(mode));
    __asm__ volatile("ldmxcsr %0" : : "m"(standard) : "memory");
    return mode;
}
static inline void qn_leave_default_mode(uint64_t before) {
    uint32_t mode = (uint32_t)before;
    __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory");
}
#elif defined(__aarch64__) && defined(__GNUC__)
static inline uint64_t qn_enter_default_mode(void) {
    uint64_t mode, standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard) : "memory");
    return mode;
}
static inline void qn_leave_default_mode(uint64_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#else
static inline uint64_t qn_enter_default_mode(void) { return 0; }
static inline void qn_leave_default_mode(uint64_t before) { (void)before; }
#endif
#endif
