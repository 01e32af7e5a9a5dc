"""The machine's limits: each loop does what it says, as often as it is told to, and nothing is optimised away."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Guarded
from hypothesis import given
from hypothesis import strategies as st
from test_assembly import FLAGS, functions, innermost_loops

from qnative import _core

ROOT = Path(__file__).resolve().parents[1]
COMPUTE = [name for name, usable in _core.compute_loops().items() if usable]
READ = [name for name, usable in _core.read_loops().items() if usable]
#: Iterations after which the C sums are emptied.
CHUNK = 1 << 20


def test_there_are_loops_for_every_kernel_here() -> None:
    features = _core.cpu_features()
    assert {"portable_int8", "portable_float32"} <= set(COMPUTE)
    if features["avx2"]:
        assert {"vpmaddwd_256", "vpsignb_256"} <= set(COMPUTE) and "read_256_1" in READ
    if features["avx512_vnni"] and features["avx512vl"]:
        assert {"vpdpbusd_512", "vpdpbusd_256", "fma_512"} <= set(COMPUTE) and "read_512_1" in READ
    assert _core.compute_loops().get("vpdpbusd_256_vex", False) == features["avx_vnni"]


@pytest.mark.parametrize("name", COMPUTE)
def test_work_is_proportional_to_iterations(name: str) -> None:
    """Counted, not timed: ones times ones add up to the number of multiply-adds."""
    once = _core.run_compute_loop(name, 1)
    assert once > 0 and once % 32 == 0
    assert _core.run_compute_loop(name, 0) == 0
    many = [2, 3, 1000]
    if name != "portable_int8":  # whose iterations are long and of which no chunks are made
        many += [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]
    assert [_core.run_compute_loop(name, n) for n in many] == [once * n for n in many]


def test_compute_loops_refuse() -> None:
    for name in ("", "vpdpbusd", *(name for name, usable in _core.compute_loops().items() if not usable)):
        with pytest.raises(ValueError, match=r"not a loop that this CPU can run; those are .*portable_int8"):
            _core.run_compute_loop(name, 1)
    for iterations in (-1, (1 << 40) + 1):
        with pytest.raises(ValueError, match=f"iterations is {iterations}; it must be 0 to"):
            _core.run_compute_loop(COMPUTE[0], iterations)


@pytest.mark.parametrize("ahead", [0, 512])
@pytest.mark.parametrize("name", READ)
@given(data=st.data())
def test_every_word_is_read_once_a_pass(name: str, ahead: int, data: st.DataObject) -> None:
    words = data.draw(st.integers(0, 700) | st.sampled_from([32, 64, 128, 1024, 4096]))
    passes = data.draw(st.integers(0, 3))
    x = np.random.default_rng(words).integers(0, 1 << 64, words, np.uint64)
    x.flags.writeable = False
    total = int(x.sum()) * passes % (1 << 64)
    assert _core.run_read_loop(name, x.view(np.uint8), ahead, passes) == total


@pytest.mark.parametrize("at", ["end", "begin"])
@pytest.mark.parametrize("name", READ)
def test_nothing_outside_the_buffer_is_read(name: str, at: str, guarded: Guarded) -> None:
    for size in (8, 256, 264, 1024, 4096, 5000):
        x = guarded((size,), np.uint8, at)
        assert _core.run_read_loop(name, x, 4096) == int(x.view(np.uint64).sum())


def test_read_loops_refuse() -> None:
    x = np.zeros(64, np.uint8)
    for name in ("", "read", *(name for name, usable in _core.read_loops().items() if not usable)):
        with pytest.raises(ValueError, match=r"not a loop that this CPU can run; those are .*read_128_1"):
            _core.run_read_loop(name, x)
    with pytest.raises(ValueError, match="data has 63 bytes"):
        _core.run_read_loop(READ[0], x[:63])
    with pytest.raises(ValueError, match="ahead is -1"):
        _core.run_read_loop(READ[0], x, -1)
    with pytest.raises(ValueError, match="passes is -1"):
        _core.run_read_loop(READ[0], x, 0, -1)
    with pytest.raises(ValueError):
        _core.run_read_loop(READ[0], x[::2])


MOVE = {name: (read, written) for name, (read, written, usable) in _core.move_loops().items() if usable}


@pytest.mark.parametrize("at", ["end", "begin"])
@pytest.mark.parametrize("name", MOVE)
def test_move_loops_read_everything_and_write_everything(name: str, at: str, guarded: Guarded) -> None:
    read, written = MOVE[name]
    size = int(name.split("_")[1]) // 8
    for pieces in (0, 1, 3, 40):
        source = guarded((256 * pieces,), np.uint8, at)
        target = guarded((256 * pieces * written // read,), np.uint8, at)
        source[:] = np.random.default_rng(pieces).integers(0, 256, source.size, np.uint8)
        _core.run_move_loop(name, source, target)
        vectors = np.bitwise_xor.reduce(source.reshape(-1, read, size), axis=1)
        assert np.array_equal(target, np.repeat(vectors[:, None], written, axis=1).reshape(-1))


def test_move_loops_refuse() -> None:
    x = np.zeros(512, np.uint8)
    for name in ("", "move", "read_128_1"):
        with pytest.raises(ValueError, match=r"not a loop that this CPU can run; those are .*move_128_4_1"):
            _core.run_move_loop(name, x, x)
    with pytest.raises(ValueError, match="source has 511 bytes"):
        _core.run_move_loop("move_128_1_1", x[1:], x[1:])
    with pytest.raises(ValueError, match="target has 512 bytes; move_128_4_1 writes 128"):
        _core.run_move_loop("move_128_4_1", x, x.copy())
    assert all((read, written) in {(4, 1), (2, 1), (1, 1), (1, 2), (1, 4)} for read, written in MOVE.values())


@given(st.integers(0, 200), st.integers(0, 1 << 32))
def test_read_float32_is_the_largest_magnitude(n: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    x[: n // 3] *= np.float32(1e30)
    assert _core.read_float32(x) == np.abs(x).max(initial=0)
    x[::7] = np.nan
    assert _core.read_float32(x) == np.nanmax(np.abs(x), initial=0)


#: What an iteration of each compute loop consists of, and how many products of how many lanes that is.
BODIES = {
    "fma_256": {"vfmadd231ps": 12},
    "fma_512": {"vfmadd231ps": 12},
    "vpdpbusd_256": {"vpdpbusd": 12},
    "vpdpbusd_256_vex": {"vpdpbusd": 12},
    "vpdpbusd_512": {"vpdpbusd": 12},
    "vpmaddwd_256": {"vpmaddwd": 12, "vpaddd": 12},
    "vpsignb_256": {"vpabsb": 2, "vpsignb": 10, "vpmaddubsw": 10, "vpmaddwd": 10, "vpaddd": 10},
}


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("reads x86-64 assembly as gcc writes it for Linux")
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc here")
    target = tmp_path_factory.mktemp("assembly") / "limits.s"
    command = ["gcc", *FLAGS, "-S", f"-I{ROOT / 'csrc'}", ROOT / "csrc" / "qn_limits.c", "-o", target]
    subprocess.run(command, check=True)
    return functions(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BODIES)
def test_loops_are_these_instructions_on_registers(name: str, assembly: dict[str, list[str]]) -> None:
    loops = [loop for loop in innermost_loops(assembly[name]) if any(next(iter(BODIES[name])) in line for line in loop)]
    (loop,) = loops
    vectors = [m[1] for line in loop if (m := re.match(r"^\s+(?:\{vex\} )?(v\w+)\s", line))]
    assert {instruction: vectors.count(instruction) for instruction in vectors} == BODIES[name]
    assert not [line for line in loop if "(" in line], "an operand is in memory"
    others = [
        line.split()[0] for line in loop if re.match(r"^\s+[a-z]", line) and not re.match(r"^\s+(?:\{vex\} )?v", line)
    ]
    assert len(others) <= 4, f"besides the products there is {others}"


def test_the_table_of_bodies_is_the_table_of_loops() -> None:
    compiled = {name for name in _core.compute_loops() if not name.startswith("portable")}
    assert compiled in (set(BODIES), set()), "a new loop must be looked at as the others are"
