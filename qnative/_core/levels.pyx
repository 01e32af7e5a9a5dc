"""Which instruction level the elementwise loops run at: that of the kernel chosen for the linear layer."""

from qnative._core.linear import cpu_features, isa

cdef tuple NAMES = ("baseline", "avx2", "avx512")
cdef int CHOSEN


cdef int chosen_level() noexcept nogil:
    return CHOSEN


def usable_levels():
    """Return {level: whether this CPU can run it}, worst first."""
    features = cpu_features()
    avx2 = all(features.get(name, False) for name in ("avx2", "fma"))
    wide = avx2 and all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    return dict(zip(NAMES, (True, avx2, wide)))


def level():
    """Return the name of the level in use."""
    return NAMES[CHOSEN]


def use_level(str name not None):
    """Make every later call run at a level, for tests that compare them; returns the name of the one before.

    ValueError for an unknown name, RuntimeError for one that this CPU cannot run.
    """
    global CHOSEN
    before = NAMES[CHOSEN]
    usable = usable_levels()
    if name not in usable:
        raise ValueError(f"{name!r} is not a level; choose one of {', '.join(NAMES)}")
    if not usable[name]:
        raise RuntimeError(f"this CPU cannot run {name!r}; usable: {', '.join(n for n, u in usable.items() if u)}")
    CHOSEN = NAMES.index(name)
    return before


# A kernel that QNATIVE_ISA forces holds for everything: a machine without AVX2 is then really simulated.
cdef dict LEVELS = {"avx2": AVX2, "avxvnni": AVX2, "vnni256": AVX2, "avx512vnni": AVX512}


def level_of(str kernel not None):
    """Return the name of the level that goes with one of the kernels that `isas` lists."""
    return NAMES[LEVELS.get(kernel, BASELINE)]


CHOSEN = LEVELS.get(isa(), BASELINE)
