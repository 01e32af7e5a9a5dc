"""The same loop for several instruction levels, one of them chosen at import.

A loop is written once, as a function of type `inlined`, and instantiated in one function a level, each of which does
nothing but call it:

    cdef inlined loop(Task *task) noexcept nogil: ...
    cdef at_baseline loop_baseline(Task *task) noexcept nogil: loop(task)
    cdef at_avx2     loop_avx2(Task *task)     noexcept nogil: loop(task)
    cdef at_avx512   loop_avx512(Task *task)   noexcept nogil: loop(task)

The types are void with the attributes that make a C compiler do this (so results go through pointers); what is called
within must be `inlined` too. Nothing here lets a compiler fuse, reorder or approximate, so every level computes the
same bits. Compilers and machines that have no such attribute get the baseline three times. Every level but the baseline
has fused multiply-adds (`fmaf`, where a loop asks for it): a loop that uses them takes a constant that says so.

The pointers named below are for what shares no memory with what else a function is given, so that the compiler need not
look.

A loop over a long array goes by spans and begins each with `fetch`, which asks for what lies half a page ahead: the
hardware's own look ahead stops at the end of every page; `ask` is for what lies so many bytes ahead. A prefetch within a loop
would keep it from being vectorized.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from *:
    """
    #if defined(__GNUC__) || defined(__clang__)
    #define QN_INLINED inline __attribute__((always_inline))
    #else
    #define QN_INLINED inline
    #endif
    #if defined(__x86_64__) && defined(__clang__)
    #define QN_AT_AVX2 __attribute__((target("avx2,fma")))
    #define QN_AT_AVX512 __attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl")))
    #elif defined(__x86_64__) && defined(__GNUC__)
    #define QN_AT_AVX2 __attribute__((target("avx2,fma")))
    #define QN_AT_AVX512 __attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
    #else
    #define QN_AT_AVX2
    #define QN_AT_AVX512
    #endif
    #if defined(__GNUC__) || defined(__clang__)
    #define QN_RESTRICT __restrict__
    #else
    #define QN_RESTRICT __restrict
    #endif
    typedef float *QN_RESTRICT qn_own_floats;
    typedef uint8_t *QN_RESTRICT qn_own_bytes;
    typedef uint16_t *QN_RESTRICT qn_own_words;
    typedef uint32_t *QN_RESTRICT qn_own_codes;
    static QN_INLINED void qn_ask(const void *p, ptrdiff_t ahead, size_t bytes) {
    #if defined(__GNUC__) || defined(__clang__)
        const uintptr_t first = (uintptr_t)p + (uintptr_t)ahead;
        for (size_t i = 0; i < bytes; i += 64)
            __builtin_prefetch((const void *)(first + i)); /* which may lie beyond the array: nothing is accessed */
    #else
        (void)p, (void)ahead, (void)bytes;
    #endif
    }
    #define qn_fetch(p, bytes) qn_ask(p, QN_AHEAD, bytes)
    #define QN_AHEAD 2048
    """
    ctypedef void inlined "QN_INLINED void"
    ctypedef void at_baseline "void"
    ctypedef void at_avx2 "QN_AT_AVX2 void"
    ctypedef void at_avx512 "QN_AT_AVX512 void"
    ctypedef float *own_floats "qn_own_floats"
    ctypedef uint8_t *own_bytes "qn_own_bytes"
    ctypedef uint16_t *own_words "qn_own_words"
    ctypedef uint32_t *own_codes "qn_own_codes"
    void ask "qn_ask"(const void *p, Py_ssize_t ahead, size_t size) noexcept nogil
    void fetch "qn_fetch"(const void *p, size_t size) noexcept nogil
    const Py_ssize_t AHEAD "QN_AHEAD"

cdef enum:
    BASELINE
    AVX2
    AVX512

cdef enum:
    SPAN = 256  # elements between two calls of `fetch`

cdef int chosen_level() noexcept nogil
