"""The suites: which cases there are, how long each is timed, what is asked of the outcomes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import qnative as qn
from benchmarks import elementwise as elements
from benchmarks import fake_quant as simulation
from benchmarks import install as installation
from benchmarks import limits as machine
from benchmarks import linear, targets
from qnative.bench import (
    Case,
    Outcome,
    cpus_available,
    last_level_cache,
    linear_case,
    race,
    threads_available,
    title,
)

#: The rows of the int8 table: (m, k, n).
SHAPES: tuple[linear.Shape, ...] = (
    (1, 384, 384),
    (1, 4096, 4096),
    (8, 768, 3072),
    (32, 384, 1536),
    (128, 384, 1536),
    (128, 768, 3072),
    (512, 1024, 1024),
    (512, 4096, 4096),
)
SHORT_SHAPES: tuple[linear.Shape, ...] = ((1, 384, 384), (32, 384, 1536), (128, 768, 3072))
INT4_SHAPES: tuple[linear.Shape, ...] = (
    (1, 384, 384),
    (1, 4096, 4096),
    (8, 4096, 4096),
    (32, 4096, 4096),
    (128, 768, 3072),
    (128, 4096, 4096),
    (512, 4096, 4096),
)
#: Its rows on two threads.
TWO_THREAD_SHAPES: tuple[linear.Shape, ...] = ((1, 4096, 4096), (128, 768, 3072))
#: Rows of the table of weights that are multiplied with floats: one, few, some, many.
WEIGHT_ONLY_SHAPES: tuple[linear.Shape, ...] = (
    (1, 4096, 4096),
    (8, 4096, 4096),
    (32, 4096, 4096),
    (128, 768, 3072),
    (128, 4096, 4096),
    (512, 1024, 1024),
)
#: Numbers of rows for the picture, powers of two; and for "time linear in M", which must hold for any other as well.
ROWS = tuple(1 << i for i in range(10))
FLAT_ROWS = (128, 131, 200, 256, 333, 512, 777, 1000)
#: The layer that these have.
K, N = 768, 3072


@dataclass(frozen=True)
class Table:
    """Outcomes that belong together, what was asked of them, and the unit of 1e9 operations a second (if there is)."""

    title: str
    outcomes: list[Outcome]
    verdicts: list[targets.Verdict] = field(default_factory=list)
    unit: str = "GOPS"


Suite = Callable[[bool], Iterator[Table]]


def timed(cases: Iterable[Case], seconds: float, least: int = 5) -> list[Outcome]:
    """Time cases one after the other; they are made one at a time, since their data is large."""
    return [race(case, seconds, least) for case in cases]


def several() -> int:
    """Return 2 where this machine and this build of qnative have two threads, else 1."""
    return min(threads_available(), 2)


def limits(short: bool) -> Iterator[Table]:
    """Time the machine: multiply-adds on registers, reads from each level of the memory."""
    seconds = 0.2 if short else 1.0
    cases = [machine.limits_case()] + ([machine.limits_case(2)] if cpus_available() > 1 and not short else [])
    yield Table("operations", timed(cases, seconds))
    largest = 4 * last_level_cache()
    sizes = {"128 KiB": 128 << 10, "512 KiB": 512 << 10, "2 MiB": 2 << 20, "16 MiB": 16 << 20}
    sizes |= {} if short else {f"{largest >> 20} MiB": largest}
    yield Table("reading", timed((machine.read_case(name, size) for name, size in sizes.items()), seconds), unit="GB/s")


def int8(short: bool) -> Iterator[Table]:
    """S1, S2, S3: the int8 layer against everyone and the limits, one thread and two."""
    seconds = 0.3 if short else 2.0
    if short:
        outcomes = timed(map(linear.int8_case, SHORT_SHAPES), seconds)
        yield Table("one thread", outcomes, int8_verdicts(outcomes, []))
        return
    every = timed(map(linear.int8_case, SHAPES), seconds)
    yield Table("one thread", list(every))
    if several() > 1:
        outcomes = timed((linear.int8_case(shape, 2) for shape in TWO_THREAD_SHAPES), seconds)
        yield Table("two threads", outcomes)
        every += outcomes
    cold = timed([linear.cold_case((1, 4096, 4096))], 2 * seconds)
    yield Table("weights in memory", cold, int8_verdicts(every, cold))


def int8_verdicts(outcomes: list[Outcome], cold: list[Outcome]) -> list[targets.Verdict]:
    """Ask of the rows of the table, and of one row on cold weights, what is asked of them."""
    return [
        *targets.against_peers(outcomes),
        *targets.against_compute_limit(outcomes),
        *targets.against_bandwidth([*outcomes, *cold]),
    ]


def rows(short: bool) -> Iterator[Table]:
    """Time the int8 layer of 768 inputs and 3072 outputs at many numbers of rows: the picture's curve."""
    counts = ROWS[::3] if short else ROWS
    yield Table("rows", timed((linear.int8_case((m, K, N)) for m in counts), 0.2 if short else 1.0))


def avx2(short: bool) -> Iterator[Table]:
    """S5: each vector kernel forced, the AVX2 one against what AVX2 can do exactly, all with the same bits."""
    shapes = [shape for shape in (SHORT_SHAPES if short else SHAPES) if shape[0] >= 128]
    outcomes = timed(map(linear.isa_case, shapes), 0.3 if short else 1.5)
    yield Table("kernels", outcomes, [*targets.against_avx2(outcomes)])


def threads(short: bool) -> Iterator[Table]:
    """S7: two threads against one, and forty callers against two; where there are two cores and a thread pool."""
    if several() < 2:
        return
    outcomes = timed((linear.threads_case(shape, 2) for shape in SHAPES), 0.2 if short else 1.5, 9)
    yield Table("threads", outcomes, [*targets.of_threads(outcomes)])
    (outcome,) = timed([linear.callers_case((8, K, N), 2, (2, 40))], 0.2 if short else 2.0)
    yield Table("callers at once", [outcome], [*targets.of_callers(outcome)])


def flat(short: bool) -> Iterator[Table]:
    """S8: the same rate for large matrices as for small, for any number of rows from 128 on."""
    small, large = ((512, 512, 512), (1024, 1024, 1024)) if short else ((1024, 1024, 1024), (4096, 4096, 4096))
    (outcome,) = timed([linear.flat_case((small, large))], 0.3 if short else 4.0)
    yield Table("sizes", [outcome], [*targets.of_size(outcome, title(small), title(large))])
    counts = FLAT_ROWS[:3] if short else FLAT_ROWS
    (outcome,) = timed([linear.flat_case([(m, K, N) for m in counts])], 0.3 if short else 3.0, 9)
    yield Table("rows", [outcome], [*targets.of_rows(outcome)])


def install(short: bool) -> Iterator[Table]:
    """S9: how long importing takes and how large the package is."""
    (outcome,) = timed([installation.import_case()], 0.0 if short else 3.0, 3 if short else 9)
    yield Table(
        "import", [outcome], [*targets.of_import(outcome), *targets.of_package(installation.package_bytes())], ""
    )


def packing(short: bool) -> Iterator[Table]:
    """S10: a layer made from float32 weights, against reading them; one loaded from a file, against reading that."""
    size, seconds = (1024, 0.3) if short else (4096, 3.0)
    (outcome,) = timed([linear.packing_case(size, size)], seconds)
    yield Table("packing", [outcome], [*targets.of_packing(outcome)], "G weights/s")
    with tempfile.TemporaryDirectory() as folder:
        loads = (linear.loading_case(size, size, config, Path(folder)) for config in (linear.INT8, linear.INT4))
        yield Table("loading", timed(loads, seconds), unit="G weights/s")


def int4(short: bool) -> Iterator[Table]:
    """S4: the int4 layer, a float16 scale and a zero point for each 32 weights, against its peers and the limits."""
    seconds = 0.3 if short else 1.5
    shapes = SHORT_SHAPES if short else INT4_SHAPES
    outcomes = timed(map(linear.int4_case, shapes), seconds)
    yield Table("one thread", outcomes, [] if not short else [*targets.against_int4(outcomes)])
    if short:
        return
    if several() > 1:
        yield Table("two threads", timed((linear.int4_case(shape, 2) for shape in TWO_THREAD_SHAPES), seconds))
    cold = timed([linear.cold_case((1, 4096, 4096), linear.INT4)], 2 * seconds)
    verdicts = [*targets.against_int4(outcomes, cold), *targets.of_int4_bits(linear.int4_bits())]
    yield Table("weights in memory", cold, verdicts)


def fp8(short: bool) -> Iterator[Table]:
    """Time the float8 layer, a scale for each channel."""
    yield _format(qn.QuantConfig.fp8().per_channel(), short)


def weight_only(short: bool) -> Iterator[Table]:
    """Time layers with float activations, of every format of weights, one thread and two."""
    formats = {
        "int8": qn.QuantConfig.int8_per_channel(),
        "int4": qn.QuantConfig.int4_per_group(32).asymmetric(),
        "float8_e4m3fn": qn.QuantConfig.fp8().per_channel(),
        "float8_e5m2": qn.QuantConfig.fp8("float8_e5m2").per_channel(),
    }
    for name, config in formats.items():
        for threads in (1,) if short or several() < 2 else (1, 2):
            shapes = SHORT_SHAPES if short else TWO_THREAD_SHAPES if threads > 1 else WEIGHT_ONLY_SHAPES
            cases = (
                linear_case(shape, config, activations="float", threads=threads, check=linear.check) for shape in shapes
            )
            outcomes = timed(cases, 0.2 if short else 1.5)
            title = f"{name}, {'one thread' if threads == 1 else 'two threads'}"
            yield Table(title, outcomes, [*targets.against_float32(outcomes, name)])


def elementwise(short: bool) -> Iterator[Table]:
    """S6: elementwise work against loops that move the same bytes, and everyone; from memory, and in the L2 cache."""
    seconds = 0.1 if short else 1.0
    rows = [row for row in elements.rows() if not short or row.name in elements.SHORT]
    large = 1 << (20 if short else 24)
    outcomes = timed((elements.case(row, large) for row in rows), seconds)
    times = {row.name: row.times for row in rows}
    yield Table(f"2^{large.bit_length() - 1}", outcomes, [*targets.of_elements(outcomes, times)], "G elements/s")
    outcomes = timed((elements.case(row, large) for row in elements.histograms()), seconds)
    yield Table("counting", outcomes, [*targets.of_counting(outcomes)], "G values/s")
    if not short:
        outcomes = timed((elements.case(row, 1 << 16) for row in elements.rows()), seconds / 4)
        yield Table("2^16, in the L2 cache", outcomes, unit="G elements/s")


def fake_quant(short: bool) -> Iterator[Table]:
    """Time fake quantization, forward and with the backward pass of LSQ, against loops that move the same bytes."""
    names = simulation.SHORT if short else tuple(simulation.CONFIGS)
    seconds = 0.3 if short else 1.5
    for power in (22,) if short else (22, 24):
        cases = (simulation.forward_case(name, simulation.CONFIGS[name], 1 << power) for name in names)
        yield Table(f"forward, 2^{power}", timed(cases, seconds), unit="G elements/s")
    cases = (simulation.training_case(name, simulation.CONFIGS[name], 1 << 22) for name in names)
    yield Table("forward + backward with LSQ, 2^22", timed(cases, seconds), unit="G elements/s")


def _format(config: qn.QuantConfig, short: bool) -> Table:
    cases = (linear_case(shape, config, check=linear.check) for shape in (SHORT_SHAPES if short else SHAPES))
    return Table("one thread", timed(cases, 0.3 if short else 1.5))


SUITES: dict[str, Suite] = {
    suite.__name__: suite
    for suite in (
        limits,
        int8,
        rows,
        avx2,
        threads,
        flat,
        packing,
        install,
        int4,
        fp8,
        weight_only,
        elementwise,
        fake_quant,
    )
}
