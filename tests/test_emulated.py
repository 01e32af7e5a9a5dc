"""The same bits on other x86 CPUs.

Python and all of qnative under an emulator that has fewer instruction sets than this machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qnative._core import isas

TESTS = Path(__file__).resolve().parent
EMULATORS = ("qemu-x86_64", "qemu-x86_64-static")
#: A model of a CPU, and the kernels that it can run.
CPUS = {"Nehalem": ["scalar"], "Haswell": ["scalar", "avx2"]}
#: What of the test-suite runs there: what computes, or reads files. Not what starts processes, of which each takes a
#: quarter of a minute under an emulator.
SUITE = (
    "config", "elementwise", "elementwise_levels", "files", "float_products", "floats", "gemm", "groups",
    "layer_paths", "linear", "tensor",
)  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> str:
    found = next(filter(None, map(shutil.which, EMULATORS)), None)
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux" or not found:
        pytest.skip(f"wants Linux on x86-64 and one of {', '.join(EMULATORS)}: make emulate installs it")
    return found


def python(*arguments: str | Path, on: tuple[str, ...] = (), **environment: str) -> str:
    command = [*on, sys.executable, *map(str, arguments)]
    here = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]), **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, env=os.environ | here)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


def digests(rounds: int, *on: str, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(python(TESTS / "digests.py", "--rounds", str(rounds), on=on, **environment))
    return found


@pytest.fixture(scope="module")
def native(request: pytest.FixtureRequest) -> dict[str, Any]:
    return digests(rounds_of(request))


def rounds_of(request: pytest.FixtureRequest) -> int:
    return 20 if request.config.getoption("--slow") else 1


@pytest.mark.parametrize("cpu", CPUS)
def test_same_bits_on_another_cpu(
    cpu: str, emulator: str, native: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    found = digests(rounds_of(request), emulator, "-cpu", cpu)
    assert found.pop("usable") == CPUS[cpu]
    assert found.pop("isa") == CPUS[cpu][-1]
    assert found == {subject: digest for subject, digest in native.items() if subject in found}


@pytest.mark.parametrize("kernel", [name for name, usable in isas().items() if usable])
def test_same_bits_with_every_kernel(kernel: str, native: dict[str, Any], request: pytest.FixtureRequest) -> None:
    found = digests(rounds_of(request), QNATIVE_ISA=kernel)
    assert found.pop("isa") == kernel
    assert found == {subject: digest for subject, digest in native.items() if subject in found}


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_the_suite_passes_on_another_cpu(cpu: str, emulator: str) -> None:
    """In one process: with every kernel that this CPU has, compared with the NumPy reference computed there too."""
    files = [TESTS / f"test_{name}.py" for name in SUITE]
    out = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, on=(emulator, "-cpu", cpu), HYPOTHESIS_PROFILE="short"
    )  # fmt: skip
    found = re.search(r"(\d+) passed", out)
    assert found and int(found[1]) > 1000, out[-2000:]
