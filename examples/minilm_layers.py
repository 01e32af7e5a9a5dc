"""What comes into the encoder's linear layers, and how far others in their place take it from float32.

Shared by the examples that compare ways to quantize MiniLM: see `judge`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minilm
import numpy as np
from minilm import Array, Batch, Encoder, Linear
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import qnative as qn

#: Rows of a layer's input at a time.
ROWS = 1024


@dataclass(frozen=True)
class Subject:
    """The float32 encoder, its parameters by name, and the token ids of the sentences."""

    encoder: Encoder
    tensors: Mapping[str, Array]
    tokens: list[list[int]]

    @classmethod
    def load(cls, short: bool) -> Subject:
        """Load the checkpoint and the sentences, of which the short form takes 48."""
        folder = minilm.model_folder()
        checkpoint = folder / "model.safetensors"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sentences = minilm.read_sentences(minilm.SENTENCES)
        if short:
            sentences = sentences[:: len(sentences) // 48][:48]
        tokens = minilm.tokenise(folder / "tokenizer.json", sentences)
        return cls(minilm.float_contender(checkpoint, config).encoder, load_file(checkpoint), tokens)

    def float_layer(self, name: str) -> Linear:
        """Return a linear layer in float32, without the activation that follows it."""
        return minilm.float_linear(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], None)

    def layer(self, name: str, weight: qn.QuantizedTensor, activations: str | qn.QParams) -> qn.QuantizedLinear:
        """Return a linear layer with another weight, without the activation that follows it."""
        return qn.QuantizedLinear.from_tensor(weight, self.tensors[f"{name}.bias"], activations=activations)


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
    """Run an encoder, its layers recorded."""
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


def judge(
    subject: Subject,
    candidates: Mapping[str, Mapping[str, Linear]],
    inputs: Mapping[str, qn.CalibrationDataset],
    work: Sequence[Batch],
) -> dict[str, dict[str, Any]]:
    """Compare encoders that differ from the float32 one in their linear layers.

    Parameters
    ----------
    subject : Subject
        Has the float32 encoder.
    candidates : mapping of str to mapping of str to callable
        By title: the linear layers by name, without the activations that follow them.
    inputs : mapping of str to CalibrationDataset
        What comes into each layer of the float32 encoder on the sentences of `work`.
    work : sequence of Batch
        The sentences.

    Returns
    -------
    dict
        By title: ``mean_sqnr`` and ``least_sqnr`` over the layers, ``layers`` (the SQNR of each one's outputs on
        float32 inputs, dB), and what `minilm.compare` tells of the embeddings.
    """
    count = sum(len(batch.sentences) for batch in work)
    steps = len(inputs) + len(work) * (1 + len(candidates))
    with tqdm(total=steps, disable=None, leave=False, desc="judging") as bar:
        sqnr = {}
        for name, x in inputs.items():
            sqnr[name] = outputs_sqnr(subject.float_layer(name), [layers[name] for layers in candidates.values()], x)
            bar.update()
        true = embed(subject.encoder, work, count, bar.update)
        rows: dict[str, dict[str, Any]] = {}
        for i, (title, layers) in enumerate(candidates.items()):
            encoder = copy.copy(subject.encoder)
            encoder.linears = {name: with_gelu(name, layer) for name, layer in layers.items()}
            of_layers = {name: float(sqnr[name][i]) for name in inputs}
            rows[title] = {
                "mean_sqnr": float(np.mean(list(of_layers.values()))),
                "least_sqnr": min(of_layers.values()),
                **minilm.compare(true, embed(encoder, work, count, bar.update)),
                "layers": of_layers,
            }
    return rows


def by_length(tokens: Sequence[Sequence[int]]) -> list[Batch]:
    """Cut sentences into batches of like length."""
    return list(minilm.batches(tokens, sorted(range(len(tokens)), key=lambda i: len(tokens[i]))))


def record_all(encoder: Encoder, parts: Sequence[tuple[Sequence[Batch], Recorder]]) -> None:
    """Record what comes into an encoder's layers from each part of the sentences."""
    with tqdm(total=sum(len(work) for work, _ in parts), disable=None, leave=False, desc="recording") as bar:
        for work, recorder in parts:
            record(encoder, work, recorder, bar.update)


def command(description: str | None, run: Callable[[bool, bool, Path], int], argv: Sequence[str] | None) -> int:
    """Read the command line and call ``run(short, as_json, scratch)``, on one thread unless BLAS was given more."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def described(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give the columns of a table for a row of `judge`."""
    return {
        "mean SQNR dB": round(row["mean_sqnr"], 2),
        "least SQNR dB": round(row["least_sqnr"], 2),
        "mean cosine": row["mean_cosine"],
        "min cosine": row["min_cosine"],
        f"top-{minilm.NEIGHBOURS} overlap": row["overlap"],
    }
