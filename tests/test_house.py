"""The rules of the house that no linter knows: who imports whom, what importing costs, what the build may not do."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qnative
from qnative import _core

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qnative"
COMPILED = {path.stem for path in (PACKAGE / "_core").glob("*.pyx")}

#: From the ground up: a module may import those of lower floors, never of its own or a higher one.
HOUSE = [
    {"_core"},
    {"config", "cpus", "storage", "work"},
    {"files", "threads"},
    {"floats"},
    {"granularity"},
    {"elementwise"},
    {"streams"},
    {"ranges", "output_error"},
    {"observers"},
    {"tensor"},
    {"fake_quant"},
    {"linear", "calibration"},
    {"qat"},
    {"selection"},
    {"stats"},
    {"checkpoint"},
    {"model"},
    {"conversion"},
    {"report", "bench"},
    {"cli"},
    {"__main__"},
]
FLOORS = {module: floor for floor, modules in enumerate(HOUSE) for module in modules}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, in functions and under TYPE_CHECKING too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> set[str]:
    """The modules of qnative that a file imports, by their first name below it."""
    found = set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "qnative":
            found.add(rest.partition(".")[0] or "__init__")
    return found


MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")


def test_every_module_has_its_floor() -> None:
    assert {path.stem for path in MODULES} <= set(FLOORS), "a new module must take its place in HOUSE"
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == ["_core"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_only_point_downwards(path: Path) -> None:
    used = own_modules(path)
    assert "__init__" not in used, "modules import each other, not the package's list of names"
    upwards = {name for name in used if name in FLOORS and FLOORS[name] >= FLOORS[path.stem]}
    assert not upwards, f"{path.name} may not import {upwards}"
    unknown = {name for name in used if name not in FLOORS}
    assert not unknown, f"{path.name} imports {unknown}, which are no modules of qnative"


def test_init_only_looks_names_up() -> None:
    """No class, no function of its own; and type checkers are told exactly the names that exist, from their homes."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert defined <= {"__getattr__", "__dir__"}
    told = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qnative.")
        for alias in node.names
    }
    assert set(told) == set(qnative.__all__)
    for name, module in told.items():
        home = importlib.import_module(str(module))
        assert getattr(home, name) is getattr(qnative, name)
        assert name in home.__all__, f"{module} does not list {name}, which is public"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qnative.nothing  # type: ignore[attr-defined]
    assert set(qnative.__all__) <= set(dir(qnative))


def test_only_the_gate_imports_compiled_modules() -> None:
    assert COMPILED, "no .pyx files found"
    files = [
        path
        for folder in ("qnative", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent != PACKAGE / "_core"
    ]
    for path in files:
        direct = {name for name in imports(path) if name.split(".")[:2] == ["qnative", "_core"]}
        direct = {name for name in direct if len(name.split(".")) > 2 and name.split(".")[2] in COMPILED}
        # `from qnative._core import linear` names a module; `import encode` names a function of the gate.
        assert not direct - {f"qnative._core.{name}" for name in _core.__all__}, f"{path}: {direct}"


def test_examples_use_public_names_only() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        private = {name for name in imports(path) if name.startswith("qnative") and "._" in name}
        assert not private, f"{path.name} shows users {private}"


def test_c_headers_are_declared_once_and_know_no_python() -> None:
    """The pool only by the module that links it: any other that did would have a pool of its own."""
    declaring = [
        (header, path.name)
        for pattern in ("*.pxd", "*.pyx")
        for path in (PACKAGE / "_core").glob(pattern)
        for header in re.findall(r'cdef\s+extern\s+from\s+"(qn_\w+\.h)"', path.read_text(encoding="utf-8"))
    ]
    assert len({header for header, _ in declaring}) == len(declaring)
    assert ("qn_pool.h", "qnative_threads.pyx") in declaring
    assert {header for header, file in declaring if file == "qn_gemm.pxd"} >= {"qn_gemm.h", "qn_scratch.h"}
    for path in [*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc").glob("*.h")]:
        text = path.read_text(encoding="utf-8")
        assert "Python.h" not in text, f"{path.name} includes Python.h"
        if path.name.startswith("qn_gemm"):
            found = re.findall(r"\b(?:malloc|calloc|realloc|alloca|free)\s*\(", text)
            assert not found, f"{path.name} allocates in a kernel: {found}"


def test_no_flag_that_changes_bits_or_ties_to_this_machine() -> None:
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"]
    files += [*(PACKAGE / "_core").glob("*.px*"), *(ROOT / "csrc").glob("*.[ch]")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for flag in ("-march=native", "-mcpu=native", "-mtune=native", "-ffast-math", "-Ofast", "/fp:fast"):
            assert flag not in text, f"{path.name} says {flag}"
        assert "-ffp-contract=fast" not in text
    assert "-ffp-contract=off" in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_public_names_are_there_and_documented() -> None:
    assert len(set(qnative.__all__)) == len(qnative.__all__)
    assert not [name for name in qnative.__all__ if name.startswith("_") and name != "__version__"]
    for name in qnative.__all__:
        value = getattr(qnative, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.split(".")[0] == "qnative", f"{name} is {value.__module__}'s"
            assert inspect.getdoc(value), f"{name} has no docstring"
    namespace: dict[str, object] = {}
    exec("from qnative import *", namespace)
    assert set(qnative.__all__) <= set(namespace)


def test_module_lists_are_true() -> None:
    for path in MODULES:
        if path.stem == "__main__":  # runs the command line when imported
            continue
        module = importlib.import_module(f"qnative.{path.stem}")
        for name in module.__all__:
            assert hasattr(module, name), f"qnative.{path.stem} lists {name}, which it has not"


def stub_names() -> dict[str, ast.stmt]:
    tree = ast.parse((PACKAGE / "_core" / "__init__.pyi").read_text(encoding="utf-8"))
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def test_stubs_cover_the_gate() -> None:
    stubs = stub_names()
    public = {name for name in stubs if not name.startswith("_")}
    assert public == set(_core.__all__)
    assert {name for name in vars(_core) if not name.startswith("_")} - COMPILED <= set(_core.__all__)
    for name, node in stubs.items():
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            fields = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            actual = {m for m in vars(getattr(_core, name)) if not m.startswith("_")}
            assert {m for m in methods | fields if not m.startswith("_")} == actual, f"{name}: stub and class differ"
        elif isinstance(node, ast.FunctionDef):
            try:
                signature = inspect.signature(getattr(_core, name))
            except ValueError:  # a builtin without a text signature
                continue
            assert parameters(node) == list(signature.parameters), f"{name}: stub and function differ"


@pytest.mark.parametrize("then", ["", "for name in qnative.__all__: getattr(qnative, name)"], ids=["import", "use"])
def test_importing_pulls_in_no_heavy_module(then: str) -> None:
    """What is only needed to read files, draw or parse arguments is imported when that is done."""
    code = f"import sys, numpy\nold = set(sys.modules)\nimport qnative\n{then}\nprint(sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(ast.literal_eval(done.stdout))
    assert "qnative" in new and (not then or "qnative.model" in new)
    heavy = {"safetensors", "json", "argparse", "matplotlib", "tqdm", "hashlib", "scipy", "ml_dtypes", "threadpoolctl"}
    heavy |= {"concurrent", "logging", "multiprocessing", "asyncio", "tempfile"}
    assert not {name for name in new if name.split(".")[0] in heavy}


def test_wheel_has_types_and_no_sources() -> None:
    """The packaging lists are explicit: what they name exists, and no source of the build is among it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = project["tool"]["setuptools"]
    assert tools["packages"] == ["qnative", "qnative._core"]
    assert not tools["include-package-data"]
    patterns = [(name, p) for name, listed in tools["package-data"].items() for p in listed]
    for package, pattern in patterns:
        found = list((ROOT / package.replace(".", "/")).glob(pattern))
        assert found, f"package-data lists {package}: {pattern}, which matches nothing"
        assert all(path.suffix in {".pyi", ".typed"} for path in found)
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.glob("*.py")) if ">>>" in p.read_text()], ids=lambda p: p.stem
)
def test_examples_in_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some save a file
    found = doctest.testmod(importlib.import_module(f"qnative.{path.stem}"))
    assert found.attempted and not found.failed
