# cython: boundscheck=False
"""The machine's limits as loops that run for as long as they are told to, without the GIL, so that Python can time them.

Which loops this CPU can run is asked of `cpu_features`, which the linear layer's module has: the C of this module knows
no CPU, and there is one place that does.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from qnative._core.qn_gemm cimport *

from qnative._core.linear import cpu_features

cdef int64_t MOST_ITERATIONS = 1 << 40  # hours; more is a mistake


cdef bint usable(const char *needs):
    features = cpu_features()
    return all(features[name] for name in needs.decode().split())


cdef dict COMPUTE = {}  # name -> (place in the table, can this CPU run it)
cdef dict READ = {}
cdef dict MOVE = {}
cdef int place = 0
while qn_compute_loops[place].name is not NULL:
    COMPUTE[qn_compute_loops[place].name.decode()] = (place, usable(qn_compute_loops[place].needs))
    place += 1
place = 0
while qn_read_loops[place].name is not NULL:
    READ[qn_read_loops[place].name.decode()] = (place, usable(qn_read_loops[place].needs))
    place += 1
place = 0
while qn_move_loops[place].name is not NULL:
    MOVE[qn_move_loops[place].name.decode()] = (place, usable(qn_move_loops[place].needs))
    place += 1


cdef int find(dict loops, str name) except -1:
    if name not in loops or not loops[name][1]:
        names = ", ".join(n for n, (_, can) in loops.items() if can)
        raise ValueError(f"{name!r} is not a loop that this CPU can run; those are {names}")
    return loops[name][0]


def compute_loops():
    """Return the compute loops compiled in as a dict: name -> can this CPU run it."""
    return {name: can for name, (_, can) in COMPUTE.items()}


def read_loops():
    """Return the read loops compiled in as a dict: name -> can this CPU run it."""
    return {name: can for name, (_, can) in READ.items()}


def run_compute_loop(str name, int64_t iterations):
    """Run a compute loop and return how many multiply-adds it did, from the sum of its accumulators."""
    cdef int i = find(COMPUTE, name)
    cdef uint64_t done
    if not 0 <= iterations <= MOST_ITERATIONS:
        raise ValueError(f"iterations is {iterations}; it must be 0 to {MOST_ITERATIONS}")
    with nogil:
        done = qn_compute_loops[i].run(iterations)
    return done


def run_read_loop(str name, const uint8_t[::1] data not None, int64_t ahead=0, int64_t passes=1):
    """Read a buffer `passes` times and return the sum of all 64-bit words that were read, modulo 2^64.

    data : uint8[n], n a multiple of 8; `ahead`: bytes from a load to the line that is prefetched with it (0: none).
    """
    cdef int i = find(READ, name)
    cdef uint64_t total = 0
    cdef int64_t size = data.shape[0], done
    if size % 8:
        raise ValueError(f"data has {size} bytes; their number must be a multiple of 8")
    if not 0 <= ahead <= 1 << 20:
        raise ValueError(f"ahead is {ahead}; it must be 0 to {1 << 20} bytes")
    if not 0 <= passes <= MOST_ITERATIONS:
        raise ValueError(f"passes is {passes}; it must be 0 to {MOST_ITERATIONS}")
    if size:
        with nogil:
            for done in range(passes):
                total += qn_read_loops[i].run(&data[0], size, ahead)
    return total


def move_loops():
    """Return the move loops compiled in as a dict: name -> (vectors read, vectors written, can this CPU run it)."""
    return {name: (qn_move_loops[i].read, qn_move_loops[i].written, can) for name, (i, can) in MOVE.items()}


def run_move_loop(str name, const uint8_t[::1] source not None, uint8_t[::1] target not None):
    """Read source : uint8[n], n a multiple of 256, and write target : uint8[n * written / read]."""
    cdef int i = find(MOVE, name)
    cdef int64_t size = source.shape[0]
    if size % 256:
        raise ValueError(f"source has {size} bytes; their number must be a multiple of 256")
    if target.shape[0] * qn_move_loops[i].read != size * qn_move_loops[i].written:
        raise ValueError(f"target has {target.shape[0]} bytes; {name} writes {size * qn_move_loops[i].written // qn_move_loops[i].read}")
    if size:
        with nogil:
            qn_move_loops[i].run(&source[0], &target[0], size)


def read_float32(const float[::1] x not None):
    """Read x : float32[n] by a plain loop and return its largest magnitude, NaN passed over, 0 if it is empty."""
    cdef float most = 0
    if x.shape[0]:
        with nogil:
            most = qn_read_float32(&x[0], x.shape[0])
    return most
