"""The table of prior names: every counterpart exists, and every name that the mission lists is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qnative as qn

TABLE = Path(__file__).parent.parent / "docs" / "names.md"

PRIOR = [
    "QuantBits",
    "QuantMode",
    "QuantGranularity",
    "QuantConfig",
    "QatConfig",
    "FakeQuantConfig",
    "ObserverMethod",
    "CalibMethod",
    "QuantObserver",
    "CalibrationCollector",
    "CalibrationCollector.min_max_scale",
    "CalibrationCollector.percentile_scale",
    "CalibrationCollector.kl_divergence_scale",
    "Calibrator",
    "LayerCalibration",
    "CalibrationDataset",
    "QuantizationSpec",
    "FakeQuantize",
    "FakeQuantize.enable_calibration",
    "FakeQuantize.disable_calibration",
    "QatLayer",
    "QatLayer.calibrate_from_data",
    "QatLayer.forward_train",
    "QatLayer.forward_infer",
    "QuantizedTensor",
    "QuantizedTensor.scales",
    "QuantizedTensor.zero_points",
    "QuantizedTensor.size_bytes",
    "QuantizedLinear",
    "QuantizedLinear.from_linear",
    "QuantizedLinear.weight_scale",
    "QuantizedLinear.input_scale",
    "QuantizedLinear.output_scale",
    "QuantizedLinear.bias_q",
    "QuantizedWeights",
    "QuantizedModel",
    "QuantStats",
    "quantize_tensor",
    "dequantize_tensor",
    "quantize_int8",
    "quantize_int4",
    "quantize_fp8",
    "quantize_model_weights",
    "dequantize_weights",
    "quantize_named_parameters",
    "quantization_stats",
    "calibrate_layer",
    "calibrate_model",
    "fp32_to_fp16_bits",
    "fp16_bits_to_fp32",
]

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]


def test_every_prior_name_is_in_the_table() -> None:
    listed = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[0])}
    assert sorted(listed) == sorted(PRIOR)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_counterpart_exists(row: list[str]) -> None:
    target = re.fullmatch(r"`qn\.([\w.]+)`", row[1])
    assert target, row
    value: object = qn
    for part in target[1].split("."):
        fields = getattr(value, "__dataclass_fields__", {})
        value = fields[part] if part in fields else getattr(value, part)
