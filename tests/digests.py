"""Digests of what qnative computes on seeded random arrays: the same text on every CPU, or the same bits are not kept.

    python tests/digests.py --rounds 20
    qemu-x86_64-static -cpu Nehalem python tests/digests.py --rounds 20

Prints one JSON object: the kernel that was chosen, those that are usable, and a SHA-256 for each subject.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import qnative as qn
from qnative import _core

FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float16", "bfloat16")
CONFIGS = (
    qn.QuantConfig.int8(), qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int8_per_channel().asymmetric(),
    qn.QuantConfig("uint8").asymmetric(), qn.QuantConfig.int8().per_group(16), qn.QuantConfig.int4(),
    qn.QuantConfig.int4_per_group(32), qn.QuantConfig.int4_per_group(7).asymmetric(), qn.QuantConfig.fp8(),
    qn.QuantConfig.fp8("float8_e5m2").per_channel(),
)  # fmt: skip


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """Normal numbers of several sizes, some subnormal, some huge; no NaN, whose bits are an operation's choice."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)
    rare = rng.random(shape)
    x = np.where(rare < 0.01, x * 1e-41, np.where(rare > 0.995, x * 1e30, x))
    return x.astype(np.float32)


def random_bits(rng: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
    x = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(1), x)


def layers(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    m, n, k = (int(rng.integers(1, most)) for most in (40, 90, 300))
    config = CONFIGS[rng.integers(len(CONFIGS))]
    w = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if rng.integers(2) else None
    activation = (None, "relu", "gelu", "gelu_tanh", "silu")[rng.integers(5)]
    form: Any = ("dynamic", "dynamic_symmetric", "float")[rng.integers(3)]
    x = (floats(rng, m, k) if form != "float" else rng.standard_normal((m, k))).astype(np.float32)
    layer = qn.QuantizedLinear.from_float(w, bias, config, form, activation=activation)
    with np.errstate(all="ignore"):
        yield layer(x)
    yield layer.weight_quantized().data


def static_layers(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    m, n, k = (int(rng.integers(1, most)) for most in (40, 90, 300))
    w, x = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal((m, k)).astype(np.float32)
    observer = qn.make_observer("min_max")
    observer.observe(x)
    qparams = observer.qparams(qn.QuantConfig("uint8").asymmetric())
    layer = qn.QuantizedLinear.from_float(
        w, None, qn.QuantConfig.int8_per_channel(), qparams, output=qparams, activation="gelu"
    )
    yield layer(x)


def elementwise(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    rows, columns = (int(rng.integers(1, most)) for most in (20, 200))
    x, axis = floats(rng, rows, columns), int(rng.integers(2))
    scale = rng.uniform(0.001, 0.1, x.shape[axis]).astype(np.float32)
    for dtype in ("int8", "uint8", "int4", "uint4"):
        codes = qn.quantize(x, scale, dtype=dtype, axis=axis)
        yield codes
        yield qn.dequantize(codes, scale, dtype=dtype, axis=axis)
        yield qn.fake_quantize(x, scale, dtype=dtype, axis=axis)


def formats(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    x = random_bits(rng, int(rng.integers(1, 5000)))
    for name in FLOATS:
        codes = qn.encode(x, name)
        yield codes
        values = qn.decode(codes, name)
        yield np.where(np.isnan(values), np.float32(0), values)


def observers(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    config = qn.QuantConfig("uint8").asymmetric()
    parts = [rng.standard_normal(int(rng.integers(100, 2000))).astype(np.float32) for _ in range(3)]
    for method in ("min_max", "moving_average", "percentile", "mean_std", "kl", "mse"):
        observer = qn.make_observer(method)
        for part in parts:
            observer.observe(part)
        qparams = observer.qparams(config)
        yield np.asarray(qparams.scale)
        yield np.asarray(qparams.zero_point)


def training(rng: np.random.Generator) -> Iterable[np.ndarray[Any, Any]]:
    fake = qn.FakeQuantize(qn.FakeQuantConfig(qn.QuantConfig.int8(), observer="min_max", learnable=True))
    x = rng.standard_normal((int(rng.integers(1, 30)), int(rng.integers(1, 70)))).astype(np.float32)
    yield fake(x)
    yield fake.backward(np.ones_like(x))
    yield np.asarray(fake.grads["scale"])


SUBJECTS: dict[str, Callable[[np.random.Generator], Iterable[np.ndarray[Any, Any]]]] = {
    f.__name__: f for f in (layers, static_layers, elementwise, formats, observers, training)
}


def digest(subject: str, rounds: int, seed: int = 0) -> str:
    found = hashlib.sha256()
    for i in range(rounds):
        for array in SUBJECTS[subject](np.random.default_rng([seed, i])):
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Print digests of seeded random results.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    usable = [name for name, can in _core.isas().items() if can]
    found = {subject: digest(subject, options.rounds, options.seed) for subject in SUBJECTS}
    print(json.dumps({"isa": _core.isa(), "usable": usable, **found}, indent=1))


if __name__ == "__main__":
    main()
