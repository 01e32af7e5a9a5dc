"""The thread pool for the other modules, which reach the one pool by `cimport` and must not link csrc/qn_pool.c."""

from libc.stdint cimport int64_t

ctypedef void (*qn_task)(void *context, int thread) noexcept nogil

# csrc/qn_pool.h says what these do. The last two find the default limit when a process first asks; it is never 0.
cdef void pool_run(int threads, qn_task task, void *context) noexcept nogil
cdef int pool_threads_for(int64_t nanoseconds) noexcept nogil
cdef int pool_limit() noexcept nogil
