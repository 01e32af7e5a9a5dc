"""One walk over an array for every granularity of the scales: shared by the loops of elementwise and fake_quant.

A C-contiguous array is seen as [outer, length, inner]; along `length`, `block` consecutive indices share scales. A
scale's index is
    ((o if per_outer else 0) * blocks + l // block) * (inner if per_inner else 1) + (i if per_inner else 0)
    per tensor   outer 1, length 1, inner n,  block 1              one scale
    per channel  axis in the middle: block 1                       a scale each l
                 axis last: length 1, inner n, per_inner           a scale each i, the same for every o
    per group    block = group size, per_outer; per_inner when the axis is not the last
`next_run` cuts the walk into runs of memory whose scale is constant, or advances by one each element. `part` is the walk
over some of the elements, so that a large array can be worked on in pieces.
"""

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX


cdef struct Walk:
    Py_ssize_t outer, length, inner, block, blocks
    bint per_outer, per_inner
    Py_ssize_t size, scales
    # where the next run begins: element, outer index, index along length, index along inner, block; where to stop
    Py_ssize_t at, o, l, i, b, stop
    Py_ssize_t tile, column  # see `by_columns`; else tile is 0
    # the run at hand
    Py_ssize_t start, count, scale
    Py_ssize_t step  # 0: one scale for the run; 1: a scale each element


cdef inline Walk new_walk(tuple layout) except *:
    cdef Walk w
    w.outer, w.length, w.inner, w.block, w.per_outer, w.per_inner = layout
    if w.outer < 0 or w.length < 0 or w.inner < 0 or not 1 <= w.block <= max(w.length, 1):
        raise ValueError(f"not a layout: {layout}")
    if layout[0] * layout[1] * layout[2] > PY_SSIZE_T_MAX:  # Python's integers: they do not wrap
        raise ValueError(f"a layout of more elements than memory has addresses: {layout}")
    w.blocks = (w.length + w.block - 1) // w.block
    w.size = w.outer * w.length * w.inner
    w.scales = (w.outer if w.per_outer else 1) * w.blocks * (w.inner if w.per_inner else 1)
    w.at = w.o = w.l = w.i = w.b = w.start = w.count = w.scale = w.tile = w.column = 0
    w.stop = w.size
    w.step = 1 if w.per_inner else 0
    return w


cdef inline Walk part(const Walk *whole, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """The walk over elements begin .. end - 1 alone; 0 <= begin < end <= size."""
    cdef Walk w = whole[0]
    cdef Py_ssize_t rest = begin % (w.length * w.inner)
    w.at, w.stop = begin, end
    w.o, w.l, w.i = begin // (w.length * w.inner), rest // w.inner, rest % w.inner
    w.b = w.l // w.block
    return w


cdef inline bint rows_share(const Walk *w) noexcept nogil:
    """Whether every row of `inner` elements has the same scales, one each."""
    return w.per_inner and not w.per_outer and w.blocks == 1


cdef inline Walk by_columns(const Walk *whole, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t tile) noexcept nogil:
    """The walk over whole rows that share scales: a run is so many columns, of the first row, and stands for those of all."""
    cdef Walk w = whole[0]
    w.at, w.stop, w.tile, w.column = begin, end, tile, -tile
    return w


cdef inline bint next_run(Walk *w) noexcept nogil:
    """Move to the next run; False when there is none."""
    cdef Py_ssize_t end
    if w.tile:
        w.column += w.tile
        if w.column >= w.inner:
            return False
        w.start, w.scale, w.count = w.at + w.column, w.column, min(w.tile, w.inner - w.column)
        return True
    if w.at >= w.stop:
        return False
    w.start = w.at
    w.scale = (w.o * w.blocks if w.per_outer else 0) + w.b
    end = min((w.b + 1) * w.block, w.length)
    if w.per_inner:
        w.scale = w.scale * w.inner + w.i
        w.count = w.inner - w.i
        w.l += 1
    else:
        w.count = (end - w.l) * w.inner - w.i
        w.l = end
    w.i = 0
    if w.l == end:
        w.b += 1
    if w.l == w.length:
        w.l = w.b = 0
        w.o += 1
    w.count = min(w.count, w.stop - w.at)
    w.at += w.count
    return True


cdef inline Py_ssize_t skip_runs(Walk *w, Py_ssize_t most) noexcept nogil:
    """Go over runs that follow the one at hand, are as long and have the scales after its; return how many, `most` at most."""
    cdef Py_ssize_t n, last
    if w.per_inner or w.count != w.block * w.inner or w.at >= w.stop:
        return 0
    if w.per_outer and w.blocks * w.block == w.length:  # on to the next rows
        n = min((w.stop - w.at) // w.count, most)
        last = w.o * w.blocks + w.b + n
        w.o, w.b = last // w.blocks, last % w.blocks
        w.l = w.b * w.block
    else:
        n = min(min((w.length - w.l) // w.block, (w.stop - w.at) // w.count), most) if w.l else 0
        w.b += n
        w.l += n * w.block
        if w.l == w.length:
            w.l = w.b = 0
            w.o += 1
    w.at += n * w.count
    return n


cdef inline int check_sizes(
    const Walk *w, Py_ssize_t size, Py_ssize_t out_size, Py_ssize_t scales, Py_ssize_t zeros
) except -1:
    if size != w.size or out_size != w.size:
        raise ValueError(f"layout of {w.size} elements, input of {size}, output of {out_size}")
    if scales != w.scales or zeros != w.scales:
        raise ValueError(f"layout of {w.scales} scales, got {scales} scales and {zeros} zero points")
    return 0
