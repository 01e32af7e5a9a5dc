"""Long loops over elements in pieces: shared with the pool's threads, and Ctrl-C is answered in between.

A loop is a function of a task and of the elements [begin, end) that it is to work on; it may be called for any pieces, in
any order, on several threads at once. What it finds out goes to atomic counters or to a place of the thread's own.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from qnative._core.qnative_threads cimport pool_limit, pool_run, pool_threads_for

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from "qn_atomic.h" nogil:
    ctypedef struct qn_atomic:
        pass
    int64_t qn_atomic_add(qn_atomic *p, int64_t n)
    int64_t qn_atomic_get(qn_atomic *p)

ctypedef void (*piece_loop)(void *task, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil

cdef enum:
    PIECE = 1 << 16   # elements of a piece: its data fits the L2 cache
    STRETCH = 1 << 8  # pieces between two looks for Ctrl-C: some ten milliseconds


cdef struct Pieces:
    piece_loop loop
    void *task
    qn_atomic taken  # pieces
    Py_ssize_t begin, end, step


cdef inline void take_pieces(void *context, int thread) noexcept nogil:
    cdef Pieces *p = <Pieces *>context
    cdef Py_ssize_t begin = p.begin + <Py_ssize_t>qn_atomic_add(&p.taken, 1) * p.step
    while begin < p.end:
        p.loop(p.task, begin, min(begin + p.step, p.end), thread)
        begin = p.begin + <Py_ssize_t>qn_atomic_add(&p.taken, 1) * p.step


cdef inline int in_pieces(
    piece_loop loop, void *task, Py_ssize_t size, int64_t picoseconds, int most=1 << 10, Py_ssize_t step=PIECE
) except -1:
    """Run a loop over `size` elements, each of which takes so long, roughly, on `most` threads.

    step : elements of a piece. KeyboardInterrupt, and what else a signal handler raises, ends it between two stretches.
    """
    cdef Pieces p
    cdef Py_ssize_t stretch = STRETCH * step
    if size <= step:
        if size > 0:
            with nogil:
                loop(task, 0, size, 0)
        return 0
    memset(&p, 0, sizeof(p))
    p.loop, p.task, p.step = loop, task, step
    while p.end < size:
        p.begin = p.end
        p.end = min(size - p.begin, stretch) + p.begin
        qn_atomic_add(&p.taken, -qn_atomic_get(&p.taken))
        with nogil:
            pool_run(min(most, pool_threads_for((p.end - p.begin) * picoseconds // 1000)), take_pieces, &p)
        PyErr_CheckSignals()
    return 0
