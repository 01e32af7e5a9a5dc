"""The thread pool for the other modules, which reach the one pool by `cimport` and must not link csrc/qn_pool.c."""

ctypedef void (*qn_task)(void *context, int thread) noexcept nogil

# csrc/qn_pool.h says what these do; `pool_limit` finds the default when it is first asked for, and is never 0.
cdef void pool_run(int threads, qn_task task, void *context) noexcept nogil
cdef int pool_limit() noexcept nogil
