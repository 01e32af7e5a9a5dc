"""Quantization-aware training on real handwritten digits: float32, post-training quantization and QAT, compared.

The data are the 1,797 digits of scikit-learn (8 x 8 pixels, UCI's optical recognition of handwritten digits), the
network three linear layers with ReLU between them. Each seed has its own split into training and test digits, its own
weights and its own order of batches. Three networks come out of it:

- float32, trained to the end;
- that one quantized afterwards (PTQ): scales from the weights and from training data, nothing trained;
- one that stops training in float32 halfway and goes on with simulated quantization, its scales learned (LSQ).

The accuracies of quantized networks are those of what would be deployed: `QATLinear.convert()` gives integer layers,
and the digits run through these.

    pip install '.[qat-demo]'
    python examples/qat_digits.py

Exits 1 when QAT falls further behind float32 than it should (see `failures`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import qnative as qn
from qnative import report

Array = NDArray[np.float32]

SIZES = (64, 32, 32, 10)
TEST_DIGITS = 597
BATCH = 64
FLOAT, PTQ, QAT = "float32", "PTQ", "QAT"


@dataclass(frozen=True)
class Scheme:
    """Codes of weights and activations, how PTQ finds its ranges, and how far behind float32 QAT may be (points)."""

    title: str
    weight: qn.QuantConfig
    activation: qn.QuantConfig
    method: str
    allowed: float
    weight_bits: int | None = None  # fewer than the codes have


SCHEMES = {
    "int8": Scheme(
        "int8 weights, 8-bit activations",
        qn.QuantConfig.int8_per_channel(),
        qn.QuantConfig("uint8").asymmetric(),
        "min_max",
        0.2,
    ),
    "W4A4": Scheme(
        "int4 weights, 4-bit activations",
        qn.QuantConfig.int4_per_channel(),
        qn.QuantConfig("uint4").asymmetric(),
        "mse",
        1.0,
    ),
    "W2A4": Scheme(
        "2-bit weights, 4-bit activations",
        qn.QuantConfig.int4_per_channel().asymmetric(),
        qn.QuantConfig("uint4").asymmetric(),
        "mse",
        2.0,
        weight_bits=2,
    ),
}


# Optimizers: a dozen lines each, on arrays by name


class Trained(Protocol):
    """What an optimizer can drive: a float layer or a `qn.QATLinear`."""

    @property
    def params(self) -> Mapping[str, Array]:
        """Arrays to update in place."""

    @property
    def grads(self) -> Mapping[str, Array]:
        """Their gradients, by the same names."""

    def __call__(self, x: Array) -> Array:
        """Forward."""

    def backward(self, dy: Array) -> Array:
        """Backward: returns dx, leaves `grads`."""


class SGD:
    """Stochastic gradient descent with momentum."""

    def __init__(self, layers: Sequence[Trained], momentum: float = 0.9) -> None:
        self.layers, self.momentum = layers, np.float32(momentum)
        self.velocity: dict[tuple[int, str], Array] = {}

    def step(self, rate: float) -> None:
        """Move every parameter against its gradient."""
        for i, layer in enumerate(self.layers):
            for name, gradient in layer.grads.items():
                velocity = self.velocity.setdefault((i, name), np.zeros_like(gradient))
                velocity *= self.momentum
                velocity += gradient
                layer.params[name][...] -= np.float32(rate) * velocity


class Adam:
    """Adam (Kingma and Ba, 2015)."""

    def __init__(self, layers: Sequence[Trained], beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.layers, self.beta1, self.beta2, self.steps = layers, beta1, beta2, 0
        self.moments: dict[tuple[int, str], tuple[Array, Array]] = {}

    def step(self, rate: float) -> None:
        """Move every parameter by its mean gradient over its typical one."""
        self.steps += 1
        rate *= (1 - self.beta2**self.steps) ** 0.5 / (1 - self.beta1**self.steps)
        for i, layer in enumerate(self.layers):
            for name, gradient in layer.grads.items():
                zeros = np.zeros_like(gradient)
                first, second = self.moments.setdefault((i, name), (zeros, zeros.copy()))
                first += np.float32(1 - self.beta1) * (gradient - first)
                second += np.float32(1 - self.beta2) * (gradient * gradient - second)
                layer.params[name][...] -= np.float32(rate) * first / (np.sqrt(second) + np.float32(1e-8))


# The network


class Linear:
    """A float32 layer: `y = x @ weight.T + bias`."""

    def __init__(self, weight: Array, bias: Array) -> None:
        self.params: dict[str, Array] = {"weight": weight, "bias": bias}
        self.grads: dict[str, Array] = {}

    def __call__(self, x: Array) -> Array:
        """Forward."""
        self.x = x
        return x @ self.params["weight"].T + self.params["bias"]

    def backward(self, dy: Array) -> Array:
        """Backward."""
        self.grads = {"weight": dy.T @ self.x, "bias": dy.sum(axis=0)}
        return dy @ self.params["weight"]


def forward(layers: Sequence[Callable[[Array], Array]], x: Array) -> Array:
    """Run the network: ReLU between layers."""
    for layer in layers[:-1]:
        x = np.maximum(layer(x), np.float32(0))
    return layers[-1](x)


def train_step(layers: Sequence[Trained], x: Array, labels: NDArray[np.int64]) -> float:
    """Run one batch forward and backward; return the mean cross-entropy. The gradients are then in the layers."""
    active = []
    for layer in layers[:-1]:
        x = layer(x)
        active.append(x > 0)
        x = np.maximum(x, np.float32(0))
    scores = layers[-1](x)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -float(np.log(np.maximum(scores[rows, labels], 1e-30)).mean())
    scores[rows, labels] -= 1
    gradient = scores / np.float32(len(labels))
    for layer, mask in zip(reversed(layers[1:]), reversed(active), strict=True):
        gradient = layer.backward(gradient) * mask
    layers[0].backward(gradient)
    return loss


def accuracy(layers: Sequence[Callable[[Array], Array]], x: Array, labels: NDArray[np.int64]) -> float:
    """Return the percentage of digits recognised."""
    return 100.0 * float(np.mean(forward(layers, x).argmax(axis=1) == labels))


def inputs_of(layers: Sequence[Callable[[Array], Array]], x: Array) -> Iterator[Array]:
    """Yield what each layer is given."""
    for layer in layers:
        yield x
        x = np.maximum(layer(x), np.float32(0))


# One seed


@dataclass(frozen=True)
class Data:
    """Digits with pixels in 0..1, and their labels."""

    train_x: Array
    train_labels: NDArray[np.int64]
    test_x: Array
    test_labels: NDArray[np.int64]


@dataclass
class Trace:
    """The scales of one QAT run: of each layer at its start, after each epoch (inputs), and at its end (weights)."""

    first: list[Array] = field(default_factory=list)
    last: list[Array] = field(default_factory=list)
    inputs: list[list[float]] = field(default_factory=list)


def split(seed: int) -> Data:
    """Split the digits at random, each class in the same proportion."""
    digits = load_digits()
    x, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(x))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within
    test = np.zeros(len(x), bool)
    test[order[np.linspace(0, len(x) - 1, TEST_DIGITS).round().astype(int)]] = True
    return Data(x[~test], labels[~test], x[test], labels[test])


def train(
    layers: Sequence[Trained],
    data: Data,
    optimizer: SGD | Adam,
    rates: Sequence[float],
    rng: np.random.Generator,
    tick: Callable[[], Any],
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train an epoch for each of `rates`."""
    for rate in rates:
        order = rng.permutation(len(data.train_x))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            train_step(layers, data.train_x[batch], data.train_labels[batch])
            optimizer.step(rate)
        after_epoch()
        tick()


def cosine(first: float, epochs: int) -> list[float]:
    """Return rates that fall from `first` to nearly 0."""
    return [first * (1 + float(np.cos(np.pi * i / epochs))) / 2 for i in range(epochs)]


def prepare(layers: Sequence[Linear], scheme: Scheme, x: Array) -> list[qn.QATLinear]:
    """Put a float network on simulated codes: ranges of the inputs from training data, of the weights from themselves.

    Converted at once that is PTQ; trained first, QAT.
    """
    weight = qn.FakeQuantConfig(scheme.weight, scheme.method, learnable=True, bits=scheme.weight_bits)
    activation = qn.FakeQuantConfig(scheme.activation, scheme.method, learnable=True)
    prepared = []
    for layer, given in zip(layers, inputs_of(layers, x), strict=True):
        simulated = qn.QATLinear(layer.params["weight"], layer.params["bias"], weight=weight, activation=activation)
        simulated.calibrate([given])
        prepared.append(simulated)
    return prepared


def run_seed(seed: int, epochs: int, tick: Callable[[], Any]) -> tuple[dict[str, float], dict[str, Trace]]:
    """Train and quantize with one seed; return accuracies by "row", and what the scales did."""
    data, rng = split(seed), np.random.default_rng([seed, 2])
    network = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        limit = (6 / (fan_in + fan_out)) ** 0.5  # Glorot and Bengio, 2010
        weight = rng.uniform(-limit, limit, (fan_out, fan_in)).astype(np.float32)
        network.append(Linear(weight, np.zeros(fan_out, np.float32)))
    train(network, data, Adam(network), cosine(4e-3, epochs), rng, tick)
    halfway = [Linear(*(array.copy() for array in layer.params.values())) for layer in network]
    train(network, data, SGD(network), cosine(0.02, epochs), rng, tick)
    found = {FLOAT: accuracy(network, data.test_x, data.test_labels)}
    traces = {}
    for name, scheme in SCHEMES.items():
        quantized = [layer.convert() for layer in prepare(network, scheme, data.train_x)]
        found[f"{name} {PTQ}"] = accuracy(quantized, data.test_x, data.test_labels)
        layers = prepare(halfway, scheme, data.train_x)
        trace = traces[name] = Trace(first=[layer.weight_quantizer.scale.copy() for layer in layers])

        def note_inputs(trace: Trace = trace, layers: list[qn.QATLinear] = layers) -> None:
            trace.inputs.append([float(layer.params["input_scale"]) for layer in layers])

        note_inputs()
        train(layers, data, SGD(layers), cosine(0.01, epochs), rng, tick, note_inputs)
        trace.last = [layer.weight_quantizer.scale.copy() for layer in layers]
        deployed = [layer.convert() for layer in layers]
        found[f"{name} {QAT}"] = accuracy(deployed, data.test_x, data.test_labels)
    return found, traces


# Results


def rows_of(seeds: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Lay the accuracies out, a network a line."""
    titles = {FLOAT: "float32"} | {
        f"{name} {how}": f"{scheme.title}, {how}" for name, scheme in SCHEMES.items() for how in (PTQ, QAT)
    }
    rows = []
    for key, title in titles.items():
        values = [found[key] for found in seeds]
        row: dict[str, Any] = {"": title} | {f"seed {i}": f"{v:.2f}" for i, v in enumerate(values)}
        mean = statistics.fmean(values)
        row["mean %"] = f"{mean:.2f}"
        row["to float32"] = f"{mean - statistics.fmean(found[FLOAT] for found in seeds):+.2f}"
        rows.append(row)
    return rows


def failures(seeds: Sequence[Mapping[str, float]]) -> list[str]:
    """Name what falls short, on average over seeds: QAT too far below float32, or, at few bits, not above its PTQ."""
    mean = {key: statistics.fmean(found[key] for found in seeds) for key in seeds[0]}
    found = [
        f"{name} QAT: {mean[f'{name} {QAT}']:.2f} % is more than {scheme.allowed} points below {mean[FLOAT]:.2f} %"
        for name, scheme in SCHEMES.items()
        if not mean[f"{name} {QAT}"] >= mean[FLOAT] - scheme.allowed
    ]
    for name in ("W4A4", "W2A4"):
        if not mean[f"{name} {QAT}"] > mean[f"{name} {PTQ}"]:
            found.append(
                f"{name}: QAT's {mean[f'{name} {QAT}']:.2f} % is not above PTQ's {mean[f'{name} {PTQ}']:.2f} %"
            )
    return found


def draw(traces: Mapping[str, Trace], path: Path) -> None:
    """Draw what training did to the scales of one seed: each output's weights, and each layer's input over time."""
    from matplotlib.figure import Figure

    colours = ("#3d6fb4", "#d9623b", "#4d9a6a")
    figure = Figure(figsize=(12.5, 3.6 * len(traces)), layout="constrained")
    grid = figure.subplots(len(traces), len(SIZES), squeeze=False, width_ratios=[1] * (len(SIZES) - 1) + [1.15])
    for (name, trace), line in zip(traces.items(), grid, strict=True):
        layers = zip(trace.first, trace.last, colours, line[:-1], strict=True)
        for i, (first, last, colour, axes) in enumerate(layers):
            order = np.argsort(first)
            axes.plot(first[order], color="#9aa1ad", linewidth=1.2, label="start (as PTQ)")
            axes.plot(last[order], "o", color=colour, markersize=3, label="learned")
            axes.set_ylim(bottom=0)
            axes.set_title(f"{name}: weight scales of layer {i + 1}", loc="left", fontsize=9)
            axes.set_xlabel("outputs, by their scale at the start", fontsize=8)
            axes.legend(frameon=False, fontsize=8, loc="best")
        inputs = np.array(trace.inputs)
        for i, colour in enumerate(colours):
            line[-1].plot(inputs[:, i] / inputs[0, i], color=colour, label=f"layer {i + 1}")
        line[-1].set_title(f"{name}: input scales over their start", loc="left", fontsize=9)
        line[-1].set_xlabel("epoch", fontsize=8)
        line[-1].legend(frameon=False, fontsize=8)
    for axes in grid.ravel():
        axes.grid(axis="y", color="#e3e6eb")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed and a few epochs, for a quick look; not judged")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument(
        "--picture", type=Path, default=Path("build/qat_digits.png"), metavar="PATH", help="(%(default)s)"
    )
    options = parser.parse_args(argv)
    count, epochs = (1, 6) if options.short else (5, 40)
    start = time.perf_counter()
    seeds: list[dict[str, float]] = []
    traces: dict[str, Trace] = {}
    with (
        threadpool_limits(limits=1),
        tqdm(total=count * epochs * (2 + len(SCHEMES)), disable=None, leave=False, unit="epoch") as bar,
    ):
        for seed in range(count):
            found, scales = run_seed(seed, epochs, bar.update)
            seeds.append(found)
            traces = traces or scales
    draw(traces, options.picture)
    failed = [] if options.short else failures(seeds)
    if options.json:
        figures = {"accuracies": seeds, "seconds": time.perf_counter() - start, "picture": str(options.picture)}
        print(json.dumps(figures, indent=1))
    else:
        print(
            f"Handwritten digits recognised, % of {TEST_DIGITS} test digits; {epochs} + {epochs} epochs, one thread\n"
        )
        print(report.table(rows_of(seeds)))
        print(f"\n{time.perf_counter() - start:.0f} s. The picture: {options.picture}")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
