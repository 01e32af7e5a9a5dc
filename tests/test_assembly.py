"""What the compiler makes of the hot loops: the sums of a tile stay in registers, nothing goes through the stack."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
#: setup.py's flags for a release, sanitizers and debugging left out.
RELEASE_FLAG = r'"(-f(?!sanitize|no-sanitize|no-wrapv)[a-z=-]+|-march=[a-z0-9-]+)"'
FLAGS = ["-std=c11", "-O3", "-g0", *re.findall(RELEASE_FLAG, SETUP)]
#: The instructions that make a loop a hot one.
HOT = re.compile(r"\s(?:{vex} )?(vpmaddwd|vpdpbusd|vfmadd\w+)\s")
LABEL = re.compile(r"^([\w.$]+):")
JUMP = re.compile(r"^\s+j\w+\s+([\w.$]+)\s*$")
#: Source file, and how many loops each of its functions has at least: one for each number of rows (and panels).
KERNELS = {
    "qn_gemm_avx2.c": {"layer_rows": 5, "layer_panel": 3, "tile_int8": 6, "tile_int4": 6},
    "qn_gemm_avxvnni.c": {"layer_tile": 10, "tile_int8": 6, "tile_int4": 6},
    "qn_gemm_vnni256.c": {"layer_tile": 10, "tile_int8": 6, "tile_int4": 6},
    "qn_gemm_vnni.c": {"layer_tile": 28, "tile_int8": 24, "tile_int4": 24},
    "qn_float_avx2.c": {"tile_float": 6},
    "qn_float_avx512.c": {"tile_float": 27},
}


def functions(assembly: str) -> dict[str, list[str]]:
    """The lines of every function; clones of one (`name.part.0`, `name.constprop.1`) are added to it."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        label = LABEL.match(line)
        if label and not label[1].startswith(".L"):
            lines = found.setdefault(label[1].split(".")[0], [])
        lines.append(line)
    return found


def innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """The lines from a label to a later jump back to it, where no other such pair lies within."""
    at = {label[1]: i for i, line in enumerate(lines) if (label := LABEL.match(line))}
    jumps = [(at.get(jump[1], len(lines)), i) for i, line in enumerate(lines) if (jump := JUMP.match(line))]
    loops = {(start, end) for start, end in jumps if start < end}
    for start, end in sorted(loops):
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
            yield lines[start : end + 1]


def hot_loops(lines: list[str]) -> list[list[str]]:
    return [loop for loop in innermost_loops(lines) if any(HOT.search(line) for line in loop)]


def spills(function: list[str], loop: list[str]) -> list[str]:
    """Lines of a loop that write a vector to the stack: through %rsp, or %rbp where that is the frame's address.

    Reading a constant from there, or comparing a counter with it, costs next to nothing; a sum that goes there and back
    in every step costs most of the speed.
    """
    frame = any(re.search(r"\smovq\s+%rsp, %rbp", line) for line in function)
    store = re.compile(r"\sv\w+\s+%[xyz]mm\d+, [^,]*\(" + ("(%rsp|%rbp)" if frame else "(%rsp)"))
    return [line.strip() for line in loop if store.search(line)]


@pytest.fixture(scope="module", params=KERNELS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A source file's name and the assembly that gcc makes of it."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("reads x86-64 assembly as gcc writes it for Linux")
    version = subprocess.run(["gcc", "--version"], capture_output=True, text=True).stdout if shutil.which("gcc") else ""
    if "Free Software Foundation" not in version:
        pytest.skip("there is no gcc here")
    name = str(request.param)
    target = tmp_path_factory.mktemp("assembly") / "kernel.s"
    subprocess.run(["gcc", *FLAGS, "-S", f"-I{ROOT / 'csrc'}", ROOT / "csrc" / name, "-o", target], check=True)
    return name, target.read_text(encoding="utf-8")


def test_hot_loops_keep_off_the_stack(compiled: tuple[str, str]) -> None:
    name, assembly = compiled
    for function, least in KERNELS[name].items():
        lines = functions(assembly)[function]
        loops = hot_loops(lines)
        assert len(loops) >= least, f"{name}: {function} has {len(loops)} hot loops"
        spilt = {i: found for i, loop in enumerate(loops) if (found := spills(lines, loop))}
        report = "\n".join(f"loop {i} of {len(loops)}: " + "; ".join(found) for i, found in spilt.items())
        assert not spilt, f"{name}: {function} spills sums in its innermost loops\n{report}"


EXAMPLE = """
tile_int8:
	pushq	%rbp
	movq	%rsp, %rbp
.L1:
	movq	8(%rsp), %rax
.L2:
	vpmaddwd	(%rax), %ymm0, %ymm1
	vmovdqa	%ymm1, {place}
	jne	.L2
	cmpq	%rax, %rbx
	jl	.L1
.L3:
	addq	$1, (%rsp)
	jne	.L3
	ret
"""


@pytest.mark.parametrize(("place", "spilt"), [("(%rcx)", 0), ("-32(%rsp)", 1), ("(%rsp,%rax,8)", 1), ("-64(%rbp)", 1)])
def test_a_spill_is_seen(place: str, spilt: int) -> None:
    """Only in the innermost hot loop: the loop around it and the loop without products may use the stack."""
    lines = functions(EXAMPLE.format(place=place))["tile_int8"]
    (loop,) = hot_loops(lines)
    assert len(spills(lines, loop)) == spilt
