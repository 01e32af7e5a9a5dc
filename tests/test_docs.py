"""What README.md and the other documents show runs, and what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import qnative as qn
from qnative.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.md"))]
DENSE = "encoder.layer.0.intermediate.dense"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with the checkpoint that README.md speaks of, no wider than it has to be."""
    rng = np.random.default_rng(0)
    shapes = {f"{DENSE}.weight": (32, 768), f"{DENSE}.bias": (32,), "embeddings.word_embeddings.weight": (50, 16)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(params, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_readme_shows_runs(folder: Path) -> None:
    """One block after the other, with what it leaves to the reader: data, and a gradient."""
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(1)
    namespace: dict[str, Any] = {
        "token_ids": np.array([[3, 1], [4, 1]]),
        "batches": [rng.standard_normal((20, 768)).astype(np.float32)],
        "params": {"layer1.weight": rng.standard_normal((8, 768)).astype(np.float32)},
        "dy": rng.standard_normal((128, 3072)).astype(np.float32),
    }
    threads = qn.get_num_threads()
    try:
        for block in blocks(README, "python"):
            exec(block, namespace)
    finally:
        qn.set_num_threads(None)
    assert qn.get_num_threads() == threads
    assert namespace["rows"].shape == (2, 2, 16)
    assert sorted(r.name for r in namespace["reports"]) == ["embeddings.word_embeddings", DENSE]
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert namespace["model"]["layer1"].activations == namespace["specs"]["layer1"].qparams
    assert {"weight", "bias", "weight_scale"} <= set(namespace["layer"].grads)
    assert np.abs(namespace["deployed"](namespace["x"]) - namespace["y"]).max() < 1e-2


def test_the_commands_of_the_readme_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    commands = [line for block in blocks(README, "") for line in block.splitlines() if line.startswith("qnative ")]
    assert {shlex.split(line)[1] for line in commands} == {"quantize", "inspect", "compare", "verify", "info", "bench"}
    for line in commands:
        arguments = shlex.split(line)[1:]
        if arguments == ["bench"]:
            arguments += ["--shape", "2,64,64", "--seconds", "0.001"]
        assert main(arguments) == 0, f"{line}: {capsys.readouterr().err}"
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")


def links(text: str) -> Iterator[str]:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_names_of_files_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in links(text):
        if not link.startswith("https://"):
            assert (document.parent / link.partition("#")[0]).exists(), link
    folders = "tests|docs|csrc|examples|benchmarks|qnative"
    for name in re.findall(rf"`((?:{folders})/[\w./*]+)`", text):
        assert list(ROOT.glob(name)), name
    for name in re.findall(r"`(\w+\.(?:py|c|h|pyx|md|txt))`", text):
        assert [path for path in ROOT.glob(f"*/{name}")] or (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_targets_of_make_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"test", "demo", "bench-peers"} <= targets
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE)
    assert set(named) <= targets


def test_every_target_is_told_of() -> None:
    """By `make help` and by CONTRIBUTING.md."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    targets = set(phony[1].split()) - {"help"}
    told = set(re.findall(r'@echo "make ([a-z-]+)', makefile))
    assert told == targets
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `make ([a-z-]+)", contributing, re.MULTILINE)) == targets
