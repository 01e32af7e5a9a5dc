"""Reports: the figures against float64, the table and the picture against anything a file may call its layers."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

import qnative as qn
from qnative import report


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


CONFIGS = [
    qn.QuantConfig.int8(),
    qn.QuantConfig.int8_per_channel().asymmetric(),
    qn.QuantConfig("uint8", qn.QuantMode.ASYMMETRIC),
    qn.QuantConfig.int4_per_group(8),
    qn.QuantConfig("uint4").per_channel(),
    qn.QuantConfig.fp8().per_channel(),
    qn.QuantConfig.fp8("float8_e5m2"),
]


SHAPES: list[tuple[int, ...]] = [(1, 1), (37, 53), (3, 5, 7), (11,), ()]


@pytest.mark.parametrize("config, shape", [(c, s) for c in CONFIGS for s in SHAPES if s or c.axis is None], ids=str)
def test_figures_against_float64(config: qn.QuantConfig, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    q = qn.quantize_tensor(x, config)
    found = report.report_tensor("w", x, q)
    a, b = np.float64(x), np.float64(q.dequantize())
    noise = ((a - b) ** 2).sum()
    assert found.sqnr == pytest.approx(10 * math.log10((a * a).sum() / noise) if noise else math.inf, rel=1e-9)
    assert found.cosine == pytest.approx((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()), rel=1e-9)
    assert found.max_error == pytest.approx(np.abs(a - b).max(), rel=1e-6, abs=1e-12)
    assert (found.nbytes, found.bits_per_weight) == (q.nbytes, q.bits_per_weight)
    # The histogram: every element once, under its own code.
    assert sum(found.histogram) == q.numel
    assert list(found.codes) == sorted(found.codes)
    counted = {code: count for code, count in zip(found.codes, found.histogram, strict=True) if count}
    codes = np.float64(qn.decode(q.codes, config.dtype)) if config.info.is_float else q.codes
    values, counts = np.unique(codes, return_counts=True)
    if config.info.is_float:
        merged: dict[float, int] = {}  # +0 and -0 are two codes of one value
        for code, count in zip(found.codes, found.histogram, strict=True):
            merged[code + 0.0] = merged.get(code + 0.0, 0) + count
        counted = {code: count for code, count in merged.items() if count}
    assert counted == {float(v): int(c) for v, c in zip(values, counts, strict=True)}


def test_codes_of_each_format() -> None:
    def codes(config: qn.QuantConfig) -> tuple[float, ...]:
        return report.report_tensor("w", weights(2, 8), qn.quantize_tensor(weights(2, 8), config)).codes

    assert codes(qn.QuantConfig.int8()) == tuple(range(-127, 128))
    assert codes(qn.QuantConfig.int8().asymmetric()) == tuple(range(-128, 128))
    assert codes(qn.QuantConfig.int4()) == tuple(range(-7, 8))
    assert codes(qn.QuantConfig("uint4")) == tuple(range(16))
    assert len(codes(qn.QuantConfig.fp8())) == 254 and max(codes(qn.QuantConfig.fp8())) == 448


def test_entropy_and_codes_used() -> None:
    x = np.float32([[-7, -7, 7, 7]])
    found = report.report_tensor("w", x, qn.quantize_tensor(x, qn.QuantConfig.int4()))
    assert found.entropy == 1.0 and found.codes_used == 2 / 15 and found.sqnr == math.inf
    same = report.report_tensor("w", x[:, 2:], qn.quantize_tensor(x[:, 2:], qn.QuantConfig.int4()))
    assert same.entropy == 0.0 and math.copysign(1, same.entropy) == 1


def test_report_is_json() -> None:
    x = np.zeros((2, 4), np.float32)
    found = report.report_tensor("w", x, qn.quantize_tensor(x)).to_dict()
    document = json.loads(json.dumps(found, allow_nan=False))
    assert document["sqnr"] == "inf" and sum(document["histogram"]) == 8


def params() -> dict[str, NDArray[Any]]:
    return {
        "z.weight": weights(6, 8, 1), "a.weight": weights(4, 6, 2).astype(ml_dtypes.bfloat16),
        "a.bias": np.zeros(4, np.float32), "embed.weight": weights(9, 8, 3),
    }  # fmt: skip


def test_compare_in_the_models_order(tmp_path: Path) -> None:
    model = qn.quantize_model(params(), include="*embed*")
    reports = qn.compare(params(), model)
    assert [r.name for r in reports] == ["z", "a", "embed"]
    assert [r.sqnr for r in reports] == list(model.totals.sqnr.values())
    # From a file, through a mapping of parameters, with packed layers, in any order.
    half = {n: x.astype(np.float16) for n, x in params().items()}
    safetensors.numpy.save_file(half, tmp_path / "c.safetensors")
    model = qn.quantize_model(half)
    model["z"]
    expected = [(r.name, r.sqnr) for r in qn.compare(half, model)]
    assert [(r.name, r.sqnr) for r in qn.compare(tmp_path / "c.safetensors", model)] == expected
    assert [(r.name, r.sqnr) for r in qn.compare(reversed(half.items()), model)] == expected
    named = qn.quantize_named_parameters(half)
    assert [(r.name, r.sqnr) for r in qn.compare(half, named)] == [(f"{n}.weight", s) for n, s in expected]


def test_compare_refuses_another_checkpoint() -> None:
    model = qn.quantize_model(params())
    with pytest.raises(ValueError, match="the checkpoint lacks 'z' and 1 more of 2 layers"):
        qn.compare({"other": weights(2, 2)}, model)
    with pytest.raises(ValueError, match=r"z: the checkpoint has shape \(8, 6\), the model \(6, 8\)"):
        qn.compare({**params(), "z.weight": weights(8, 6)}, model)


def test_compare_tells_progress() -> None:
    calls: list[Any] = []
    qn.compare(params(), qn.quantize_model(params()), progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, 4, name) for i, name in enumerate(params())]


def test_memory_is_bounded_whatever_the_size() -> None:
    x = weights(4096, 1024)
    for config in (qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int4_per_group(32)):
        q = qn.quantize_tensor(x, config)
        tracemalloc.start()
        try:
            report.report_tensor("w", x, q)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < x.nbytes // 1.5, "blocks, not the whole tensor decoded"


# Tables


def test_table_is_aligned() -> None:
    rows = [
        {"name": "a", "sqnr": 41.5, "count": 1234567, "shape": [3, 4], "ok": True, "note": None},
        {"name": "longer", "sqnr": "inf", "count": 5, "shape": (), "ok": False, "note": "x"},
        {"name": "é", "sqnr": 0.012345, "count": 0, "shape": [2], "ok": True, "note": "y"},
    ]
    lines = report.table(rows, ["name", "sqnr", "count", "shape", "ok", "note"]).split("\n")
    assert lines == [
        "name       sqnr      count  shape   ok  note",
        "------  -------  ---------  -----  ---  ----",
        "a         41.50  1,234,567  3x4    yes  -",
        "longer      inf          5  ()      no  x",
        "é       0.01235          0  2      yes  y",
    ]


def test_what_is_nearly_one_is_not_shown_as_one() -> None:
    shown = [report.table([{"cosine": x}]).split("\n")[2].strip() for x in (0.99997, 0.9998, 1.0, 1.00003)]
    assert shown == ["0.999970", "0.9998", "1", "1.000030"]


def test_table_of_objects_and_of_nothing() -> None:
    model = qn.quantize_model(params())
    lines = report.table(model.totals.layers).split("\n")
    assert lines[0].split() == ["name", "dtype", "bytes", "before", "bytes", "after", "ratio", "sqnr"]
    assert len(lines) == 4
    assert report.table([], ["name"]) == "name\n----"
    assert report.table([]) == "\n"


def test_names_cannot_write_to_the_terminal() -> None:
    text = report.table([{"name": "a\x1b[31mred\n\u202eevil"}])
    assert "\x1b" not in text and "\u202e" not in text and len(text.split("\n")) == 3


# Pictures

EVIL = ["$\\frac{1}$", "a\nb\x00c", "\u6f22\u5b57 \U0001f600", "x" * 300, "", "_private", "</svg><script>"]


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_of_any_names(suffix: str, magic: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    q = qn.quantize_tensor(weights(8, 16))
    rows = [report.report_tensor(name, weights(8, 16), q) for name in EVIL]
    report.picture(rows, tmp_path / f"p{suffix}", title="50% of $x")
    content = (tmp_path / f"p{suffix}").read_bytes()
    assert content.startswith(magic) and len(content) > 5000
    assert b"<script>" not in content


def test_picture_of_one_layer_of_mixed_formats_and_of_exact_ones(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    x = weights(8, 16)
    mixed = [report.report_tensor(str(c), x, qn.quantize_tensor(x, c)) for c in CONFIGS]
    zeros = np.zeros((2, 2), np.float32)
    exact = report.report_tensor("exact", zeros, qn.quantize_tensor(zeros))
    for rows in ([exact], mixed[:1], [*mixed, exact]):
        report.picture(rows, str(tmp_path / "p.png"))
    with pytest.raises(ValueError, match="no layer to draw"):
        report.picture([], tmp_path / "q.png")


def test_picture_shows_the_figures(tmp_path: Path) -> None:
    """The drawing holds each layer's name and SQNR, so it is of these reports and not of anything else."""
    pytest.importorskip("matplotlib")
    import matplotlib

    x = weights(16, 16)
    rows = [
        report.report_tensor(f"layer{bits}", x, qn.quantize_tensor(x, config))
        for bits, config in ((4, qn.QuantConfig.int4()), (8, qn.QuantConfig.int8()))
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        report.picture(rows, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    for row in rows:
        assert row.name in drawn and f">{row.sqnr:.1f}<" in drawn


def test_picture_does_not_call_a_lost_layer_exact(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib

    x = weights(4, 4)
    rows = [report.report_tensor("w", np.zeros_like(x), qn.quantize_tensor(x))]
    assert rows[0].sqnr == -math.inf
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        report.picture(rows, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert "lost" in drawn and "exact" not in drawn


def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = weights(2, 2)
    rows = [report.report_tensor("w", x, qn.quantize_tensor(x))]
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"qnative\[plot\]"):
        report.picture(rows, tmp_path / "p.png")
