"""What it costs to have qnative: the time to import it, and the size of what is installed."""

from __future__ import annotations

import resource
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import qnative as qn
from qnative.bench import Case, Contender


def import_case() -> Case:
    """Return importing numpy in a new interpreter; qnative too; the class of its layer too."""
    contenders = [
        Contender(code, partial(subprocess.run, [sys.executable, "-c", code], check=True), 1.0, "import")
        for code in ("import numpy", "import numpy, qnative", "import numpy; from qnative import QuantizedLinear")
    ]
    return Case("import", lambda: None, contenders, clock=_children_seconds)


def _children_seconds() -> float:
    """Return the CPU time of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def package_bytes() -> int:
    """Return the bytes of the package as an installation of it has them: modules, extensions of this Python, types."""
    folder = Path(qn.__file__).parent
    suffixes = (".py", ".pyi", ".typed", str(sysconfig.get_config_var("EXT_SUFFIX")))
    files = [path for path in folder.rglob("*") if path.name.endswith(suffixes)]
    return sum(path.stat().st_size for path in files)
