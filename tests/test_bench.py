"""The benchmarks: wrong results are caught before anything is timed, ratios are right, documents have their form."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qnative as qn
from benchmarks import __main__ as command
from benchmarks import elementwise, install, linear, peers, picture, suites, targets
from qnative import _core, bench
from qnative.bench import OURS, Case, Contender, Outcome, Problem, Timing, WrongResult

ROOT = Path(__file__).resolve().parents[1]


def outcome(
    seconds: dict[str, float],
    kinds: dict[str, str],
    *,
    operations: float = 8.0,
    shape: Any = (8, 1, 1),
    threads: int = 1,
) -> Outcome:
    """An outcome that no clock has seen."""
    contenders = [Contender(name, lambda: None, operations, kinds.get(name, "ours")) for name in seconds]
    case = Case("8,1,1", lambda: None, contenders, shape, threads)
    return Outcome(case, {name: Timing(taken, 0.01, 5) for name, taken in seconds.items()})


class FakeClock:
    """Seconds that pass only when a contender lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float, log: list[str], kind: str = "peer", **more: Any) -> Contender:
        def run() -> None:
            log.append(name)
            self.now += seconds

        return Contender(name, run, 6e6, kind, **more)


# Timing


def test_race_takes_turns_and_reports_medians() -> None:
    clock, log, prepared = FakeClock(), list[str](), list[str]()
    contenders = [
        clock.contender("slow", 2.0**-8, log, prepare=partial(prepared.append, "slow")),
        clock.contender("fast", 2.0**-13, log, "ours"),
        clock.contender("middle", 2.0**-9, log),
    ]
    found = bench.race(Case("case", lambda: None, contenders, clock=clock), seconds=0.0, least=7)
    assert found.seconds("slow") == 2.0**-8 and found.seconds("fast") == 2.0**-13
    assert all(timing.samples == 7 and timing.spread == 0 for timing in found.timings.values())
    assert found.rate("middle") == 6e6 * 2**9 and found.ratio("fast", "slow") == 32
    assert found.best("ours", "peer") == "fast" and found.best("peer") == "middle" and found.best("none") is None
    assert len(prepared) == 7 + 1  # each turn, and once to see how long a call takes
    # Samples of a millisecond: nine of the short calls, after a quarter of that to warm up; who is first moves on.
    turns = {"slow": ["slow"] * 2, "fast": ["fast"] * (3 + 9), "middle": ["middle"] * 2}
    expected: list[str] = []
    for first in range(7):
        for i in range(3):
            expected += turns[("slow", "fast", "middle")[(first + i) % 3]]
    assert log == [name for name in turns for _ in range(1 + 3)] + expected


def test_median_and_spread() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.median, timing.samples) == (3.0, 5)
    assert timing.spread == pytest.approx((5 - 2) / 2 / 3)


def test_nothing_is_timed_before_the_check() -> None:
    clock, log = FakeClock(), list[str]()

    def wrong() -> None:
        raise WrongResult("the layer is wrong")

    with pytest.raises(WrongResult, match="the layer is wrong"):
        bench.race(Case("case", wrong, [clock.contender("a", 1.0, log)], clock=clock), seconds=1.0)
    assert log == []


def test_rotate_runs_each_in_turn() -> None:
    log: list[int] = []
    contenders = [Contender("same", partial(log.append, i), 2.0, "ours") for i in range(3)]
    together = bench.rotate(contenders)
    for _ in range(7):
        together.run()
    assert log == [0, 1, 2, 0, 1, 2, 0] and together.operations == 2.0 and together.name == "same"


@pytest.mark.parametrize(("busy", "settled"), [([1.0, 0.9, 0.05], True), ([1.0] * 1000, False)])
def test_settle_waits_for_other_threads(busy: list[float], settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by CPU time that passes while this thread sleeps."""
    used, wall, shares = 0.0, 0.0, iter(busy)

    def sleep(seconds: float) -> None:
        nonlocal used, wall
        wall += seconds
        used += seconds * next(shares)

    clock = types.SimpleNamespace(sleep=sleep, process_time=lambda: used, perf_counter=lambda: wall)
    monkeypatch.setattr(bench, "time", clock)
    assert bench.settle(most=0.5) is settled
    assert wall == pytest.approx(3e-3 if settled else 0.5, abs=2e-3)


def test_thread_counts_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = [5]
    monkeypatch.setattr(_core, "set_num_threads", set_to.append, raising=False)
    monkeypatch.setattr(_core, "get_num_threads", lambda: set_to[-1], raising=False)
    run = Contender("a", lambda: None, 1.0, "ours", partial(bench.set_layer_threads, 2))
    bench.race(Case("case", lambda: None, [run]), 0.0, 2)
    assert set_to == [5, 2, 2, 2, 5]


@pytest.mark.parametrize("threads", [1, 2])
def test_cpu_time_of_busy_threads_is_counted(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = wall = 0.0

    def run(name: str, iterations: int) -> int:
        nonlocal used, wall
        used, wall = used + 0.75, wall + 1 / threads
        return 1

    monkeypatch.setattr(_core, "run_compute_loop", run)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(process_time=lambda: used, perf_counter=lambda: wall))
    assert bench.cpus_obtained(threads, 5.0) == pytest.approx(0.75 * threads)


# Checks


@pytest.fixture
def problem() -> Problem:
    return Problem.random(5, 40, 24)


def layer_of(problem: Problem, config: qn.QuantConfig = linear.INT8) -> qn.QuantizedLinear:
    return qn.QuantizedLinear.from_float(problem.weight, problem.bias, config)


@pytest.mark.parametrize("check", [bench.check_layer, linear.check])
@pytest.mark.parametrize(
    "config", [linear.INT8, qn.QuantConfig.int4_per_group(32).asymmetric(), qn.QuantConfig.fp8().per_channel()]
)
def test_a_wrong_bit_of_a_layer_is_caught(
    check: Callable[..., None], config: qn.QuantConfig, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(problem, config)
    check(layer, problem)
    real = qn.QuantizedLinear.__call__

    def wrong(self: qn.QuantizedLinear, x: Any, out: Any = None) -> Any:
        y = real(self, x, out)
        y[-1, -1] = np.nextafter(y[-1, -1], np.float32(np.inf))
        return y

    monkeypatch.setattr(qn.QuantizedLinear, "__call__", wrong)
    with pytest.raises(WrongResult, match=r"QuantizedLinear\(.*\(5, 40, 24\)"):
        check(layer, problem)


def test_a_layer_far_from_the_product_is_caught(problem: Problem) -> None:
    other_weights = Problem(problem.weight[::-1].copy(), problem.bias, problem.x)
    with pytest.raises(WrongResult, match="relative error"):
        bench.check_layer(layer_of(other_weights), problem)


def test_kernels_that_differ_in_a_row_that_the_reference_skips_are_caught(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Problem.random(40, 40, 24)
    layer = layer_of(large)
    linear.check(layer, large, ["scalar", None])
    rows, _ = linear.reference_rows(layer, large)
    (skipped, *_) = set(range(40)) - set(rows.tolist())
    real = qn.QuantizedLinear.__call__

    def wrong(self: qn.QuantizedLinear, x: Any, out: Any = None) -> Any:
        y = real(self, x, out)
        y[skipped, 3] += 1
        return y

    monkeypatch.setattr(qn.QuantizedLinear, "__call__", wrong)
    with pytest.raises(WrongResult, match="and kernel scalar"):
        linear.check(layer, large, ["scalar", None])


def exact(quantized: peers.Quantized) -> NDArray[np.float64]:
    return quantized.x.astype(np.float64) @ quantized.weight.T.astype(np.float64)


def test_peers_codes_are_those_of_the_product(problem: Problem) -> None:
    quantized = peers.Quantized.of(problem)
    sums = exact(quantized) - quantized.x_zero * quantized.weight.sum(axis=1, dtype=np.int64)
    layer = sums * quantized.x_scale * quantized.weight_scale + problem.bias
    peers.check("this", "dynamic", layer, quantized)
    assert np.abs(quantized.weight).max() == 127 and quantized.x.min() == 0 and quantized.x.max() == 255


def test_a_wrong_peer_is_caught(problem: Problem) -> None:
    quantized = peers.Quantized.of(problem)
    sums = exact(quantized)
    peers.check("P", "integer", sums, quantized)
    sums[2, 3] += 1
    with pytest.raises(WrongResult, match="P: sums differ"):
        peers.check("P", "integer", sums, quantized)
    product = problem.x @ problem.weight.T + problem.bias
    peers.check("P", "dynamic", product, quantized)
    for wrong in (product * 1.05, problem.x @ problem.weight.T, np.full_like(product, np.nan)):
        with pytest.raises(WrongResult, match="P: relative error"):
            peers.check("P", "static", wrong, quantized)


def test_only_peers_that_are_installed_take_part(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(quantized: peers.Quantized, threads: int) -> peers.Call:
        raise ImportError("no module named so")

    def present(quantized: peers.Quantized, threads: int) -> peers.Call:
        return peers.Call(lambda: threads, lambda: exact(quantized))

    made = {"absent": ("integer", absent, 9), "present": ("integer", present, 9), "alone": ("integer", present, 1)}
    monkeypatch.setattr(peers, "PEERS", made)
    quantized = peers.Quantized.of(problem)
    assert [c.name for c in peers.contenders(quantized)] == ["present", "alone"]
    (two,) = peers.contenders(quantized, 2)
    assert two.run() == 2 and two.operations == 2 * 5 * 40 * 24 and two.kind == "integer"


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer(name: str) -> None:
    """Each as the table has it, where it is installed; building one checks it."""
    kind, build, _ = peers.PEERS[name]
    for shape in ((1, 32, 48), (9, 64, 32)):
        quantized = peers.Quantized.of(Problem.random(*shape))
        try:
            call = build(quantized, 1)
        except ImportError as error:
            pytest.skip(str(error))
        peers.check(name, kind, call.result(), quantized)
        call.run()


# Contenders


def test_contenders_compute_the_same(problem: Problem) -> None:
    product = problem.x @ problem.weight.T + problem.bias
    np.testing.assert_allclose(np.asarray(bench.numpy_float32(problem).run()), product, rtol=1e-5, atol=1e-5)
    layer = layer_of(problem)
    for contender in (bench.ours(layer, problem), bench.ours(layer, problem, isa="scalar")):
        np.testing.assert_array_equal(np.asarray(contender.run()), layer(problem.x))
        assert contender.operations == problem.operations == 2.0 * 5 * 40 * 24


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["integer", "avx2", "float32"])
def test_limits_count_what_they_do(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    real = _core.run_compute_loop

    def run(name: str, iterations: int) -> int:
        done.append(real(name, iterations))
        return done[-1]

    monkeypatch.setattr(_core, "run_compute_loop", run)
    limits = bench.compute_limits(kind, threads)
    usable = [name for name, can in _core.compute_loops().items() if can]
    assert {c.name for c in limits} <= set(usable) and (limits or kind == "avx2")
    if _core.cpu_features()["avx512_vnni"] and kind == "integer":
        assert all(c.name.startswith("vpdpbusd") for c in limits)
    for contender in limits:
        done.clear()
        contender.run()
        assert contender.operations == 2 * sum(done) and len(done) == threads and contender.kind == "limit"


@pytest.mark.parametrize(("size", "pieces"), [(4096, 1), (1 << 21, 1), (4096, 4)])
def test_reads_count_what_they_do(size: int, pieces: int) -> None:
    data = bench.words(size, pieces)
    data[:] = np.arange(size, dtype=np.uint8)
    found = bench.read_limits(data, 10.0, pieces, count=3)
    assert len({c.name for c in found}) == 3
    for contender in found:
        assert contender.kind == "read"
        read = [int(contender.run()) for _ in range(pieces)]  # type: ignore[call-overload]
        passes = contender.operations / 10.0
        assert passes == (max(1, (1 << 20) // size) if pieces == 1 else 1)
        assert sum(read) % (1 << 64) == int(data.view(np.uint64).sum()) * int(passes) % (1 << 64)


def test_words_are_whole() -> None:
    assert bench.words(17).nbytes == 24 and bench.words(17, 4).nbytes == 32
    assert bench.words(64, 2).nbytes == 64
    for size in (17, 1000, 147_456, 1 << 20, 3 << 22):
        data = bench.words(size)
        assert data.ctypes.data % 64 == 0  # loads that straddle lines are slow
        assert data.flags.c_contiguous and data.all()


def test_cold_layers_do_not_share_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "last_level_cache", lambda: 4096)
    made: list[qn.QuantizedLinear] = []
    real = linear.ours
    monkeypatch.setattr(linear, "ours", lambda layer, problem: made.append(layer) or real(layer, problem))
    case = linear.cold_case((1, 64, 64))
    size = made[0].nbytes
    assert len(made) == -(-4 * 4096 // size) >= 2 and len({id(layer) for layer in made}) == len(made)
    case.check()
    assert {c.kind for c in case.contenders} >= {"ours", "read"}


def test_importing_is_timed_in_other_processes() -> None:
    case = install.import_case()
    before, here = case.clock(), set(sys.modules)
    case.contenders[1].run()
    assert case.clock() > before and set(sys.modules) == here


def test_package_size_is_that_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_core" / "__pycache__").mkdir(parents=True)
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    files = {"a.py": 1, "py.typed": 2, f"_core/b{suffix}": 4, "_core/b.pyi": 8}
    others = {"_core/b.pyx": 16, "_core/b.pxd": 32, "_core/b.other.so": 64, "_core/__pycache__/a.pyc": 128}
    for name, size in {**files, **others}.items():
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(qn, "__file__", str(tmp_path / "__init__.py"))
    assert install.package_bytes() == sum(files.values())


def test_callers_make_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, int] = {}
    lock = threading.Lock()
    real = qn.QuantizedLinear.__call__

    def counted(self: qn.QuantizedLinear, x: Any, out: Any = None) -> Any:
        with lock:
            calls[threading.get_ident()] = calls.get(threading.get_ident(), 0) + 1
        return real(self, x, out)

    case = linear.callers_case((2, 16, 16), 1, (2, 8))
    monkeypatch.setattr(qn.QuantizedLinear, "__call__", counted)
    totals = []
    for contender in case.contenders:
        calls.clear()
        contender.run()
        totals.append(sum(calls.values()))
        assert threading.get_ident() not in calls
    assert totals == [320, 320]
    assert {c.operations for c in case.contenders} == {2.0 * 2 * 16 * 16 * 320}


# Targets


def verdicts(found: Iterator[targets.Verdict]) -> list[tuple[str, float, float, bool]]:
    return [(v.target, v.wanted, pytest.approx(v.seen), v.met) for v in found]


def test_a_verdict_counts_both_ways() -> None:
    least, most = targets.Verdict("S1", "x", 2.0, 3.0), targets.Verdict("S3", "x", 2.0, 3.0, at_most=True)
    assert least.met and least.ratio == 1.5 and not most.met and most.ratio == pytest.approx(2 / 3)
    for at_most in (False, True):
        assert targets.Verdict("S1", "x", 2.0, 2.0, at_most).met
        assert not targets.Verdict("S1", "x", 2.0, 2.01 if at_most else 1.99, at_most).met
    assert most.row()["wanted"] == "<= 2" and most.row()["met"] == "NO" and least.row()["met"] == "yes"


KINDS = {"A": "dynamic", "B": "dynamic", "I": "integer", "L": "limit", "R": "read", "P": "plain read"}


def test_s1() -> None:
    first = outcome({OURS: 1.0, "A": 2.0, "B": 1.5, "I": 0.98}, KINDS)
    second = outcome({OURS: 2.0, "A": 1.0, "I": 4.0}, KINDS, shape=(1, 1, 1))
    assert verdicts(targets.against_peers([first, second])) == [
        ("S1", 1.0, 1.5, True),
        ("S1", 1.0, 0.5, False),
        ("S1", 1.2, 0.75**0.5, False),
        ("S1", 0.97, 0.98, True),  # at one row raw integers are not asked for
    ]
    assert verdicts(targets.against_peers([outcome({OURS: 1.0}, KINDS)])) == []


@pytest.mark.parametrize(("rows", "times"), [(1, 2.0), (8, None), (127, None), (128, 0.95), (512, 0.95)])
def test_s4_float_activations(rows: int, times: float | None) -> None:
    def found(**seconds: float) -> list[Any]:
        case = outcome({OURS: 1.0, **seconds}, {"F": "float32"}, shape=(rows, 4096, 4096))
        return verdicts(targets.against_float32([case], "int8"))

    assert found(F=2.5) == ([] if times is None else [("S4", times, 2.5, True)])
    assert found(F=0.5) == ([] if times is None else [("S4", times, 0.5, False)])
    assert found() == []


def test_s4_is_not_asked_where_a_cache_holds_the_floats() -> None:
    case = outcome({OURS: 1.0, "F": 0.5}, {"F": "float32"}, shape=targets.SMALL)
    assert verdicts(targets.against_float32([case], "int8")) == []


@pytest.mark.parametrize(("rows", "share"), [(1, None), (8, 0.8), (31, 0.8), (32, 0.88), (128, 0.92), (512, 0.92)])
def test_s2(rows: int, share: float | None) -> None:
    def found(limit: str) -> list[Any]:
        kinds = {limit: "limit"}
        return verdicts(targets.against_compute_limit([outcome({OURS: 2.0, limit: 1.7}, kinds, shape=(rows, 1, 1))]))

    assert found("vpdpbusd_512") == ([("S2", share, 0.85, share <= 0.85)] if share else [])
    assert found("vpmaddwd_256") == []


def test_s3() -> None:
    small, large = targets.SMALL, (1, 4096, 4096)
    found = [
        outcome({OURS: 2.4e-6, "R": 1e-6}, KINDS, shape=small),
        outcome({OURS: 2.6e-6, "R": 1e-6}, KINDS, shape=small),
        outcome({OURS: 2.6e-6, "R": 1.5e-6}, KINDS, shape=small),
        outcome({OURS: 1.0, "R": 0.91}, KINDS, shape=large),
        outcome({OURS: 1.0, "R": 0.89}, KINDS, shape=large),
        outcome({OURS: 1.0}, KINDS, shape=large),
    ]
    assert verdicts(targets.against_bandwidth(found)) == [
        ("S3", pytest.approx(2.5), 2.4, True),
        ("S3", pytest.approx(2.5), 2.6, False),
        ("S3", pytest.approx(1.85 * 1.5), 2.6, True),
        ("S3", 0.9, 0.91, True),
        ("S3", 0.9, 0.89, False),
    ]


def test_s5_s7_s8() -> None:
    forced = outcome({"avx2": 1.0, "avx512vnni": 0.4, "L": 0.84}, {"L": "limit"})
    assert verdicts(targets.against_avx2([forced])) == [("S5", 0.85, 0.84, False)]
    assert verdicts(targets.against_avx2([outcome({"scalar": 1.0}, {})])) == []
    small = outcome({"1 thread": 1.0, "2 threads": 1.01}, {}, threads=2)
    large = outcome({"1 thread": 1.0, "2 threads": 0.54}, {}, operations=2.0 * 128 * 768 * 3072, threads=2)
    assert verdicts(targets.of_threads([small, large])) == [
        ("S7", targets.NOT_SLOWER, 1 / 1.01, True),
        ("S7", 1.9, 1 / 0.54, False),
    ]
    assert verdicts(targets.of_callers(outcome({"2 callers": 1.0, "40 callers": 1.1}, {}))) == [
        ("S7", targets.NOT_SLOWER, 1 / 1.1, False)
    ]
    assert verdicts(targets.of_size(outcome({"a": 1.0, "b": 1.06}, {}), "a", "b")) == [("S8", 0.95, 1 / 1.06, False)]
    assert verdicts(targets.of_rows(outcome({"a": 1.0, "b": 1.02, "c": 0.98}, {}))) == [("S8", 0.95, 0.98 / 1.02, True)]


def test_s9_s10() -> None:
    def imports(both: float) -> list[Any]:
        return verdicts(targets.of_import(outcome({"numpy": 0.1, "both": both, "layer": 9.0}, {})))

    assert imports(0.114) == [("S9", 15.0, 14.0, True)] and imports(0.116) == [("S9", 15.0, 16.0, False)]
    assert imports(0.09) == [("S9", 15.0, 0.1, True)]
    assert verdicts(targets.of_package(1_900_000)) == [("S9", 2.0, 1.9, True)]
    packed = outcome({OURS: 3.9, "P": 1.0, "R": 0.5}, KINDS)
    assert verdicts(targets.of_packing(packed)) == [("S10", 4.0, 3.9, True)]


def test_elements_are_held_against_the_best_loop_and_the_best_peer() -> None:
    kinds = {"slow loop": "read", "loop": "read", "a": "dynamic", "b": "dynamic"}
    row = outcome({OURS: 2.0, "slow loop": 3.0, "loop": 1.875, "a": 12.0, "b": 11.0}, kinds, shape=None)
    found = [(v.target, v.wanted, v.seen, v.met) for v in targets.of_elements([row], {row.case.name: 5.0})]
    assert found == [("S6", 0.9, 0.9375, True), ("S6", 5.0, 5.5, True)]
    alone = outcome({OURS: 2.0, "loop": 1.75}, kinds, shape=None)
    (only,) = targets.of_elements([alone], {alone.case.name: 1.0})
    assert (only.seen, only.met) == (0.875, False)
    slow, fast = (outcome({OURS: seconds}, {}, operations=1e9, shape=None) for seconds in (1.25, 0.5))
    assert [(v.seen, v.met) for v in targets.of_counting([slow, fast])] == [(0.8, False), (2.0, True)]


@pytest.mark.parametrize("name", [row.name for row in (*elementwise.rows(), *elementwise.histograms())])
def test_every_row_of_elements_is_checked_before_it_is_timed(name: str) -> None:
    """Right as it is, and found out when it is not."""
    (row,) = (row for row in (*elementwise.rows(), *elementwise.histograms()) if row.name == name)
    elementwise.case(dataclasses.replace(row, peers=()), 1 << 14).check()

    def wrong(x: NDArray[Any]) -> Any:
        run, result, expected = row.prepare(x)
        return run, lambda: result() + result().dtype.type(1), expected

    case = elementwise.case(dataclasses.replace(row, prepare=wrong, peers=()), 1 << 14)
    with pytest.raises(WrongResult, match="differ"):
        case.check()


# The command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One suite of two small layers and all kinds of tables, no time spent on them."""

    def layers(short: bool) -> Iterator[suites.Table]:
        shapes = ((1, 64, 48), (3, 64, 48))
        found = [bench.race(linear.int8_case(shape), 0.0, 2) for shape in shapes]
        yield suites.Table("one thread", found, suites.int8_verdicts(found, []))

    def odd(short: bool) -> Iterator[suites.Table]:
        (found,) = suites.timed([linear.isa_case((3, 64, 48))], 0.0, 2)
        yield suites.Table("kernels", [found], [*targets.against_avx2([found])])
        (found,) = suites.timed([linear.packing_case(64, 48)], 0.0, 2)
        yield suites.Table("packing", [found], [*targets.of_packing(found)], "G weights/s")
        cases = (linear.loading_case(64, 48, config, tmp_path) for config in (linear.INT8, linear.INT4))
        yield suites.Table("loading", suites.timed(cases, 0.0, 2), unit="G weights/s")

    monkeypatch.setattr(command, "SUITES", {"int8": layers, "rows": layers, "odd": odd})


@pytest.mark.usefixtures("tiny")
def test_document_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    target, drawn = tmp_path / "b.json", tmp_path / "made" / "b.png"
    assert command.main(["--short", "--json", str(target), "--picture", str(drawn)]) == 0
    text = capsys.readouterr().out
    document = json.loads(target.read_text(encoding="utf-8"))
    assert set(document) == {"machine", "short", "results", "targets"} and document["short"] is True
    about = document["machine"]
    assert about["kernel"] == qn.isa() and about["cpus_obtained"] > 0 and isinstance(about["versions"], dict)
    assert [(r["suite"], r["title"]) for r in document["results"]] == [
        ("int8", "one thread"), ("rows", "one thread"), ("odd", "kernels"), ("odd", "packing"), ("odd", "loading"),
    ]  # fmt: skip
    for result in document["results"]:
        for case in result["cases"]:
            assert set(case) == {"name", "shape", "threads", "contenders"} and case["threads"] == 1
            for contender in case["contenders"].values():
                assert set(contender) == {"kind", "operations", "seconds", "spread", "samples", "gops"}
                assert contender["seconds"] > 0 and contender["samples"] >= 2
                assert contender["gops"] == pytest.approx(contender["operations"] / contender["seconds"] / 1e9)
    first = document["results"][0]["cases"][0]
    assert first["shape"] == [1, 64, 48] and {OURS, "NumPy float32"} <= set(first["contenders"])
    assert {t["target"] for t in document["targets"]} >= {"S3", "S10"}
    for t in document["targets"]:
        assert set(t) == {"target", "what", "wanted", "at_most", "seen", "ratio", "met"}
        assert t["met"] == (t["seen"] <= t["wanted"] if t["at_most"] else t["seen"] >= t["wanted"]) == (t["ratio"] >= 1)
    assert all(t["what"] in text for t in document["targets"]) and "1,64,48" in text
    assert f"{sum(t['met'] for t in document['targets'])} of {len(document['targets'])} met" in text
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 20_000


@pytest.mark.usefixtures("tiny")
def test_json_to_standard_output_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["odd", "--json", "-"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["results"][0]["suite"] == "odd"
    assert "odd, packing" in done.err and "qnative's kernel" in done.err


@pytest.mark.usefixtures("tiny")
def test_a_wrong_result_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = qn.QuantizedLinear.__call__
    timed: list[str] = []

    def wrong(self: qn.QuantizedLinear, x: Any, out: Any = None) -> Any:
        y = real(self, x, out)
        y += 1
        return y

    monkeypatch.setattr(qn.QuantizedLinear, "__call__", wrong)
    monkeypatch.setattr(bench, "_race", lambda case, *_: timed.append(case.name))
    target = tmp_path / "b.json"
    assert command.main(["--json", str(target)]) == 1
    assert "wrong result: QuantizedLinear(" in capsys.readouterr().err
    assert not target.exists() and timed == []


def test_unknown_suites_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["int9"])
    assert refused.value.code == 2 and "unknown suite 'int9'; choose from limits, int8" in capsys.readouterr().err


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        picture.draw({"machine": {}, "results": [], "targets": []}, str(tmp_path / "b.png"))


def test_overrides_of_blas_are_taken_away() -> None:
    """A new process, which says so, and runs without them."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell"}
    arguments = [sys.executable, "-m", "benchmarks", "limits", "--short", "--json", "-"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unset, since it forces kernels on OpenBLAS: OPENBLAS_CORETYPE" in done.stderr
    document = json.loads(done.stdout)
    assert document["machine"]["blas_overrides"] == {}
    (operations, reading) = document["results"]
    assert operations["unit"] == "GOPS" and reading["unit"] == "GB/s"
    for case in (*operations["cases"], *reading["cases"]):
        assert all(contender["gops"] > 0 for contender in case["contenders"].values())
