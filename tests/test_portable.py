"""The C core on its own: the same bits on another kind of machine, and nothing that sanitizers find."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / "tests" / "portable.c"), *map(str, sorted((ROOT / "csrc").glob("*.c")))]
#: The flags of setup.py that decide what a float operation yields.
NUMERIC_FLAGS = re.findall(r'"(-f(?!sanitize|no-sanitize)[a-z=-]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-gcc", ("qemu-aarch64", "qemu-aarch64-static")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="wants a compiler with the arguments of cc")


def build(compiler: str, program: Path, *flags: str) -> None:
    flags = ("-std=gnu11", "-O2", "-pthread", *NUMERIC_FLAGS, *flags)
    arguments = [*flags, f"-I{ROOT / 'csrc'}", *SOURCES, "-o", str(program), "-lm"]
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{compiler} {' '.join(arguments)}\n{done.stderr}"


def run(*command: str) -> str:
    """What a program prints; the test fails with what it says when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}"
    assert re.fullmatch(r"[0-9a-f]{16} \d+ layers\n", done.stdout), done.stdout
    return done.stdout


def compiler_here() -> str:
    return shutil.which("cc") or pytest.skip("there is no cc here")


def links(compiler: str, folder: Path, *flags: str) -> bool:
    """Can the compiler make a program with these flags, and can it run? Their libraries are packages of their own."""
    source, program = folder / "nothing.c", folder / "nothing"
    source.write_text("int main(void) { return 0; }\n")
    made = subprocess.run([compiler, *flags, str(source), "-o", str(program)], capture_output=True)
    return made.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program prints as this machine's compiler makes it, all kernels compared with the scalar one."""
    program = tmp_path_factory.mktemp("native") / "portable"
    build(compiler_here(), program)
    return run(str(program))


def test_flags_are_those_of_the_build() -> None:
    assert "-ffp-contract=off" in NUMERIC_FLAGS
    assert not any("sanitize" in flag for flag in NUMERIC_FLAGS)


def test_kernels_agree_and_every_kind_of_layer_ran(native: str) -> None:
    layers = int(native.split()[1])
    # Integer products: 2 formats, 5 inputs, 5 activations, 2 outputs, 2 groupings, narrow and wide; sums narrow only.
    # Float products: as many without wide, for float input and for the two float8 formats with every input.
    assert layers == 2 * 5 * (5 * 2 * 2 * 2 + 2) + (2 + 2 * 6) * 5 * 2 * 2


def test_same_bits_whatever_the_optimisation(native: str, tmp_path: Path) -> None:
    build(compiler_here(), tmp_path / "portable", "-O0")
    assert run(str(tmp_path / "portable")) == native


def test_same_bits_on_aarch64(native: str, tmp_path: Path) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this is one: every other test runs on it")
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if not shutil.which(CROSS_COMPILER) or not emulator:
        pytest.skip(f"wants {CROSS_COMPILER} and one of {', '.join(EMULATORS)}")
    build(CROSS_COMPILER, tmp_path / "portable", "-static")
    assert run(emulator, str(tmp_path / "portable")) == native


def test_sanitizers_find_nothing(native: str, tmp_path: Path) -> None:
    compiler = compiler_here()
    if not links(compiler, tmp_path, *SANITIZERS):
        pytest.skip(f"{compiler} cannot link or run {SANITIZERS[0]} here")
    build(compiler, tmp_path / "portable", "-O1", *SANITIZERS)
    assert run(str(tmp_path / "portable")) == native


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
