"""The thread pool's door: the one module that links csrc/qn_pool.c, so that a process has one pool.

Its file is called qnative_threads so that threadpoolctl, which knows libraries by how their file names begin, finds it.
"""

from cpython.exc cimport PyErr_SetInterrupt
from libc.stdint cimport int64_t

cdef extern from "qn_pool.h" nogil:
    enum:
        QN_POOL_MAX_THREADS

    void qn_pool_run(int threads, qn_task task, void *context) noexcept
    int qn_pool_threads_for(int64_t work) noexcept
    int qn_pool_limit() noexcept
    void qn_pool_set_limit(int threads) noexcept
    void qn_pool_set_default_limit(int threads) noexcept


MAX_THREADS = QN_POOL_MAX_THREADS
cdef object FIND_DEFAULT = None


cdef void pool_run(int threads, qn_task task, void *context) noexcept nogil:
    qn_pool_run(threads, task, context)


cdef int pool_threads_for(int64_t nanoseconds) noexcept nogil:
    pool_limit()
    return qn_pool_threads_for(nanoseconds)


cdef int pool_limit() noexcept nogil:
    cdef int limit = qn_pool_limit()
    if limit == 0:  # the first call of this process
        find_default()
        limit = qn_pool_limit()
    return limit if limit > 0 else 1


cdef void find_default() noexcept with gil:
    cdef int found = 1
    if FIND_DEFAULT is not None:
        try:
            found = min(max(FIND_DEFAULT(), 1), QN_POOL_MAX_THREADS)
        except KeyboardInterrupt:
            PyErr_SetInterrupt()  # there is no way out from here: once more, where there is one
            return
    qn_pool_set_default_limit(found)


def set_default_threads(find not None):
    """Have `find`, a function without arguments, say how many threads a call may use where nothing is set.

    It is called when a process, a forked child too, first needs to know. Without it that number is 1.
    """
    global FIND_DEFAULT
    FIND_DEFAULT = find


def get_num_threads():
    """Return how many threads a call may use."""
    return pool_limit()


def set_num_threads(n):
    """Set how many threads a call may use, 1 .. MAX_THREADS; None: the default again."""
    if n is not None and not 1 <= n <= QN_POOL_MAX_THREADS:
        raise ValueError(f"n must be in 1 .. {QN_POOL_MAX_THREADS}, not {n}")
    qn_pool_set_limit(0 if n is None else n)
