"""The C core on its own: the same bits on another kind of machine, and nothing that sanitizers find."""

from __future__ import annotations

import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qnative._core import isas

ROOT = Path(__file__).resolve().parents[1]
#: The flags of setup.py that decide what a float operation yields.
NUMERIC_FLAGS = re.findall(r'"(-f(?!sanitize|no-sanitize)[a-z=-]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-gcc", ("qemu-aarch64", "qemu-aarch64-static")
ON_AARCH64 = platform.machine() in ("aarch64", "arm64")
#: What each model of an aarch64 CPU can run.
AARCH64 = {"cortex-a57": "scalar neon", "cortex-a76": "scalar neon dotprod", "max": "scalar neon dotprod i8mm"}
#: Random shapes for `guarded`: on this machine, and where it is slow.
SHAPES, FEW_SHAPES = 600, 40

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="wants a compiler with the arguments of cc")

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build(compiler, program, *flags)`: tests/program.c with the core, compiled once for each set of flags."""
    cores: dict[tuple[str, ...], Path] = {}

    def compile_all(compiler: str, flags: tuple[str, ...], folder: Path, *sources: Path) -> list[str]:
        objects = []
        for source in sources:
            objects.append(str(folder / f"{source.stem}.o"))
            arguments = [
                "-std=gnu11",
                "-O2",
                "-pthread",
                *NUMERIC_FLAGS,
                *flags,
                f"-I{ROOT / 'csrc'}",
                "-c",
                str(source),
            ]
            done = subprocess.run([compiler, *arguments, "-o", objects[-1]], capture_output=True, text=True)
            assert done.returncode == 0, f"{compiler} {' '.join(arguments)}\n{done.stderr}"
        return objects

    def build(compiler: str, program: str, *flags: str) -> Path:
        if (compiler, *flags) not in cores:
            folder = tmp_path_factory.mktemp("core")
            compile_all(compiler, flags, folder, *sorted((ROOT / "csrc").glob("*.c")))
            cores[compiler, *flags] = folder
        folder = cores[compiler, *flags]
        objects = [str(path) for path in folder.glob("qn_*.o")]
        objects += compile_all(compiler, flags, folder, ROOT / "tests" / f"{program}.c")
        arguments = [*flags, "-pthread", *objects, "-o", str(folder / program), "-lm"]
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{compiler} {' '.join(arguments)}\n{done.stderr}"
        return folder / program

    return build


def run(*command: str | Path) -> str:
    """What a program prints; the test fails with what it says when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stderr}"
    return done.stdout


def run_portable(*command: str | Path) -> str:
    found = run(*command)
    assert re.fullmatch(r"[0-9a-f]{16} \d+ layers\n", found), found
    return found


def compiler_here() -> str:
    return shutil.which("cc") or pytest.skip("there is no cc here")


def links(compiler: str, folder: Path, *flags: str) -> bool:
    """Can the compiler make a program with these flags, and can it run? Their libraries are packages of their own."""
    source, program = folder / "nothing.c", folder / "nothing"
    source.write_text("int main(void) { return 0; }\n")
    made = subprocess.run([compiler, *flags, str(source), "-o", str(program)], capture_output=True)
    return made.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def native(build: Build) -> str:
    """What the program prints as this machine's compiler makes it, all kernels compared with the scalar one."""
    return run_portable(build(compiler_here(), "portable"))


def divide(build: Build, stride: int) -> dict[str, int]:
    words = run(build(compiler_here(), "division"), str(stride)).split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def test_multiplying_divides(build: Build) -> None:
    """The step after the product with the reciprocal is needed, and is enough: for every 61st divisor."""
    found = divide(build, 61)  # a prime: of every kind of divisor
    assert found["tried"] > 1_000_000
    assert found["without"] > found["tried"] // 10
    assert found["wrong"] == 0


@pytest.mark.slow
def test_multiplying_divides_by_every_divisor(build: Build) -> None:
    found = divide(build, 1)
    assert found["tried"] > 80_000_000
    assert found["wrong"] == 0


def test_flags_are_those_of_the_build() -> None:
    assert "-ffp-contract=off" in NUMERIC_FLAGS
    assert not any("sanitize" in flag for flag in NUMERIC_FLAGS)


def test_kernels_agree_and_every_kind_of_layer_ran(native: str) -> None:
    layers = int(native.split()[1])
    # Integer products: 2 formats, 5 inputs, 5 activations, 2 outputs, 2 groupings, narrow and wide; sums narrow only.
    # Float products: as many without wide, for float input and for the two float8 formats with every input.
    # Int4 in four storages more, without activation: as many integer products and sums, and with float input.
    assert layers == 2 * 5 * (5 * 2 * 2 * 2 + 2) + (2 + 2 * 6) * 5 * 2 * 2 + 4 * (5 * 2 * (2 * 2 + 1) + 2 * 2)


def test_no_operand_is_left_at_either_end(build: Build, shapes: int) -> None:
    """Pages that nobody may touch lie on both sides of every operand; every kernel that this CPU can run."""
    hashed, kernels = run(build(compiler_here(), "guarded"), str(shapes)).splitlines()
    assert re.fullmatch(rf"[0-9a-f]{{16}} {shapes} shapes", hashed)
    assert kernels.split() == [name for name, usable in isas().items() if usable]


@pytest.fixture
def shapes(request: pytest.FixtureRequest) -> int:
    return 10 * SHAPES if request.config.getoption("--slow") else SHAPES


def test_touching_a_forbidden_page_ends_the_program(build: Build) -> None:
    """The guard guards: reading one byte beyond an operand is what ends this one."""
    done = subprocess.run([build(compiler_here(), "guarded"), "--trespass"], capture_output=True)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


def test_same_bits_whatever_the_optimisation(native: str, build: Build) -> None:
    assert run_portable(build(compiler_here(), "portable", "-O0")) == native


@pytest.fixture(scope="module")
def emulator() -> str:
    found = next(filter(None, map(shutil.which, EMULATORS)), None)
    if ON_AARCH64 or not shutil.which(CROSS_COMPILER) or not found:
        pytest.skip(
            f"wants another machine, {CROSS_COMPILER} and one of {', '.join(EMULATORS)}: make emulate installs them"
        )
    return found


@pytest.mark.parametrize("cpu", AARCH64)
def test_same_bits_on_aarch64(
    cpu: str, emulator: str, native: str, build: Build, request: pytest.FixtureRequest
) -> None:
    """Every NEON kernel on a model of a CPU that has it, and none that it does not have."""
    few = SHAPES if request.config.getoption("--slow") else FEW_SHAPES
    expected = run(build(compiler_here(), "guarded"), str(few)).splitlines()[0]
    found, kernels = run(emulator, "-cpu", cpu, build(CROSS_COMPILER, "guarded", "-static"), str(few)).splitlines()
    assert kernels == AARCH64[cpu]
    assert found == expected
    if cpu != "cortex-a76":
        assert run_portable(emulator, "-cpu", cpu, build(CROSS_COMPILER, "portable", "-static")) == native


def test_sanitizers_find_nothing(native: str, build: Build, tmp_path: Path) -> None:
    compiler = compiler_here()
    if not links(compiler, tmp_path, *SANITIZERS):
        pytest.skip(f"{compiler} cannot link or run {SANITIZERS[0]} here")
    assert run_portable(build(compiler, "portable", "-O1", *SANITIZERS)) == native
    run(build(compiler, "guarded", "-O1", *SANITIZERS), str(FEW_SHAPES))


def test_many_threads_in_one_layer(build: Build) -> None:
    assert run(build(compiler_here(), "concurrent"), "40", "200") == "ok\n"


def test_the_thread_sanitizer_finds_nothing(build: Build, tmp_path: Path) -> None:
    compiler = compiler_here()
    if not links(compiler, tmp_path, "-fsanitize=thread"):
        pytest.skip(f"{compiler} cannot link or run -fsanitize=thread here")
    assert run(build(compiler, "concurrent", "-O1", "-g", "-fsanitize=thread"), "8", "24") == "ok\n"


@pytest.mark.slow
def test_valgrind_finds_nothing(build: Build) -> None:
    """Neither a wrong access nor a decision on bytes that nobody wrote, nor memory that is left."""
    valgrind = shutil.which("valgrind") or pytest.skip("there is no valgrind here: make sanitize installs it")
    checks = [valgrind, "--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]
    compiler = compiler_here()
    assert re.match(r"[0-9a-f]{16}", run(*checks, build(compiler, "guarded"), str(FEW_SHAPES)))
    assert run(*checks, "--fair-sched=yes", build(compiler, "concurrent"), "4", "16") == "ok\n"


FLUSHED = """
import ctypes, sys
import numpy as np
import qnative as qn
rng = np.random.default_rng(0)
w = rng.standard_normal((20, 40)).astype(np.float32)
x = (rng.standard_normal((5, 40)) * 1e-37).astype(np.float32)
layers = [qn.QuantizedLinear.from_float(w, None, qn.QuantConfig.int8_per_channel(), activation="gelu"),
          qn.QuantizedLinear.from_float(w, None, qn.QuantConfig.int4_per_group(8)),
          qn.QuantizedLinear.from_float(w, None, qn.QuantConfig.fp8(), "float")]
tiny = w * np.float32(1e-37)
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1])
    assert ctypes.c_float(1e-37).value and np.float32(1e-20) * np.float32(1e-20) == 0, "subnormals are not flushed"
seen = [layer(x) for layer in layers] + list(layers[0].quantize_input(x)) + list(layers[1].quantize_input(x))
for config in (qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int8().asymmetric()):
    packed = qn.QuantizedLinear.from_float(tiny, None, config).weight_quantized()
    seen += [packed.codes, packed.scale]
print(b"".join(array.tobytes() for array in seen).hex())
"""


def test_a_library_that_flushes_subnormals_changes_no_bit(tmp_path: Path) -> None:
    """Loading what was linked with -ffast-math sets the thread's mode, as libraries in the field do."""
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("gcc"):
        pytest.skip("wants gcc's crtfastmath.o for x86-64")
    start = subprocess.run(["gcc", "-print-file-name=crtfastmath.o"], capture_output=True, text=True).stdout.strip()
    if not Path(start).is_file():
        pytest.skip("this gcc has no crtfastmath.o")
    library = tmp_path / "libflush.so"
    subprocess.run(["gcc", "-shared", "-o", library, start], check=True)
    plain, flushed = (
        subprocess.run([sys.executable, "-c", FLUSHED, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], [str(library)])
    )
    assert plain == flushed
    assert set(plain.strip()) != {"0"}
