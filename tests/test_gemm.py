"""The linear kernels, every compiled one bit for bit against the reference: tails, extremes, every kind of operand."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from conftest import Guarded
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_elementwise import lay_out

import qnative as qn
from qnative import _core

INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
INT32_MAX = 2**31 - 1


class Spec(NamedTuple):
    """A kind of weights."""

    dtype: str
    mode: str = "symmetric"
    group: int | str = "per_channel"

    @property
    def config(self) -> Any:
        if isinstance(self.group, int):
            return qn.QuantConfig(self.dtype, self.mode, "per_group", -1, self.group)
        return qn.QuantConfig(self.dtype, self.mode, self.group)

    def __str__(self) -> str:
        return f"{self.dtype}-{self.mode}-{self.group}"


GROUPS: tuple[int | str, ...] = ("per_tensor", "per_channel", 1, 5, 8, 16, 32, 100)
SPECS = [Spec(d, m, g) for d in INTEGERS for m in ("symmetric", "asymmetric") for g in GROUPS]
SPECS += [Spec(d, "symmetric", g) for d in FLOAT8 for g in GROUPS]


# ----------------------------------------------------------------------------------------------------------------------
# Building the same layer for qnative and for the reference


def tensor_of(spec: Spec, codes: NDArray[Any], scale: Any, zero: Any) -> Any:
    """A QuantizedTensor from its parts."""
    four = spec.config.bits == 4
    data = ref.pack4(codes, spec.dtype) if four else codes
    storage = np.int8 if spec.dtype in FLOAT8 else ref.STORAGE[spec.dtype]
    return qn.QuantizedTensor(
        data, np.asarray(scale, np.float32), np.asarray(zero).astype(storage), codes.shape, "float32", spec.config
    )


def random_codes(rng: np.random.Generator, spec: Spec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Codes over the whole range, both ends well represented; float8 without NaN (and Inf)."""
    if spec.dtype in FLOAT8:
        codes = rng.integers(0, 256, shape, np.uint8)
        return np.where(np.isfinite(ref.decode(codes, spec.dtype)), codes, np.uint8(0x38))
    low, high = ref.code_range(spec.dtype, spec.mode)
    codes = rng.integers(int(low), int(high), shape, endpoint=True)
    codes = np.where(rng.random(shape) < 0.1, low, np.where(rng.random(shape) < 0.1, high, codes))
    return codes.astype(ref.STORAGE[spec.dtype])


@cache
def weights(spec: Spec, n: int, k: int, seed: int = 0) -> tuple[Any, ref.Weights]:
    """Random weights, as a QuantizedTensor and as the reference has them."""
    rng = np.random.default_rng([seed, n, k, *map(ord, str(spec))])
    codes = random_codes(rng, spec, (n, k))
    shape: tuple[int, ...] = ()
    if spec.group == "per_channel":
        shape = (n,)
    elif isinstance(spec.group, int):
        shape = (n, -(-k // spec.group))
    scale = rng.uniform(0.001, 0.1, shape).astype(np.float32)
    zero: NDArray[Any] = np.asarray(0 if spec.dtype in FLOAT8 else ref.middle(spec.dtype))
    if spec.mode == "asymmetric":
        low, high = ref.RANGES[spec.dtype]
        zero = rng.integers(low, high, shape, endpoint=True)
        zero = np.asarray(np.where(rng.random(shape) < 0.3, rng.choice([low, high], shape), zero))
    group = spec.group if isinstance(spec.group, int) else None
    return tensor_of(spec, codes, scale, zero), ref.Weights.build(codes, scale, zero, spec.dtype, group)


def rows(seed: int, m: int, k: int) -> NDArray[np.float32]:
    """Float inputs whose rows differ in range, sign and size; some rows one-sided, some all zero."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)) * 10.0 ** rng.uniform(-2, 2, (m, 1)) + rng.choice([0, 0, 3, -40], (m, 1))
    x[rng.random(m) < 0.05] = 0
    return x.astype(np.float32)


def static(dtype: str, zero: int, scale: float = 0.05, **limits: Any) -> Any:
    return qn.QParams(np.float32(scale), zero, dtype, **limits)


def quantized_input(x: NDArray[np.float32], kind: Any, dtype: str) -> tuple[NDArray[Any], Any, Any]:
    """Codes, scales and zero points as the reference makes them."""
    if isinstance(kind, str):
        return ref.dynamic_rows(x, kind, dtype if dtype in FLOAT8 else None)
    codes = ref.quantize(x, kind.scale, kind.zero_point, kind.dtype, None, None, kind.quant_min, kind.quant_max)
    return codes, kind.scale, np.int64(kind.zero_point)


def expected_float(x: Any, w: ref.Weights, kind: Any, bias: Any = None) -> NDArray[np.float32]:
    """The reference's float32 output before any activation function; `x` may be codes where `kind` is a QParams."""
    if kind == "float":
        return ref.float_linear(x, w, bias)
    if x.dtype == np.float32:
        codes, scale, zero = quantized_input(x, kind, w.dtype)
    else:
        codes, scale, zero = x, kind.scale, np.int64(kind.zero_point)
    if w.dtype in FLOAT8:
        return ref.epilogue(ref.float_accumulators(codes, w, w.dtype), scale, w, bias)
    return ref.epilogue(ref.accumulators(codes, zero, w), scale, w, bias)


def activate(y: NDArray[np.float32], name: str | None) -> NDArray[np.float32]:
    """The one rule of every kernel (its own accuracy is tested below)."""
    out = np.empty(y.size, np.float32)
    _core.activate(np.ascontiguousarray(y).reshape(-1), name, out)
    return out.reshape(y.shape)


def to_codes(y: NDArray[np.float32], qp: Any) -> NDArray[Any]:
    return ref.quantize(y, qp.scale, qp.zero_point, qp.dtype, None, None, qp.quant_min, qp.quant_max)


OUTPUTS = {
    "int8": qn.QParams(np.float32(3.7), 11, "int8"),
    "int8 narrow": qn.QParams(np.float32(0.9), -100, "int8", -127, 100),
    "uint8": qn.QParams(np.float32(2.9), 200, "uint8"),
}


def fitted(out: Any, y: NDArray[np.float32]) -> Any:
    """`out` with a scale that spreads `y` over its codes, some of them beyond the ends."""
    scale = np.float32(np.mean(np.abs(y)) / 50 + 1e-3)
    return qn.QParams(scale, out.zero_point, out.dtype, out.quant_min, out.quant_max)


STATICS = [
    ("int8", -128), ("int8", 127), ("int8", 0), ("uint8", 0), ("uint8", 255), ("uint8", 128),
    ("int4", -8), ("int4", 7), ("uint4", 0), ("uint4", 15),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The reference and the tools stand on their own


def test_fused_multiply_add_of_the_reference() -> None:
    """Against exact rational arithmetic, where double rounding, cancellation and subnormals decide."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**32, 6000, np.uint32).view(np.float32) for _ in range(2))
    with np.errstate(all="ignore"):
        near = (-(a * b) * (1 + rng.integers(-3, 4, a.size) * np.float32(2**-23))).astype(np.float32)
        half = (a * b * np.float32(2.0) ** rng.integers(20, 30, a.size).astype(np.float32)).astype(np.float32)
    for c in (near, half):
        keep = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        got = ref.fma(a, b, c)
        for x, y, z, g in zip(a[keep].tolist(), b[keep].tolist(), c[keep].tolist(), got[keep].tolist(), strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            if not np.isfinite(g):
                assert abs(exact) > Fraction(float(np.finfo(np.float32).max))
                continue
            error = abs(Fraction(g) - exact)
            for side in (np.inf, -np.inf):
                neighbour = float(np.nextafter(np.float32(g), np.float32(side)))
                if np.isfinite(neighbour):
                    other = abs(Fraction(neighbour) - exact)
                    even = int(np.float32(g).view(np.uint32)) % 2 == 0
                    assert error < other or (error == other and even), (x, y, z, g)


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
@pytest.mark.parametrize("at", ["end", "start"])
def test_guarded_memory_is_guarded(at: str) -> None:
    """Reading one byte too far dies, so passing the tests below means something."""
    script = (
        "import conftest, ctypes\n"
        f"a = conftest.guarded_memory((3, 5), 'f4', at={at!r})\n"
        "a[:] = 1; print('alive', flush=True)\n"
        f"ctypes.string_at(a.ctypes.data + ({at!r} == 'end') * a.nbytes - ({at!r} != 'end'), 1); print('not reached')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.stdout.split() == ["alive"], done.stderr
    assert done.returncode < 0


def test_the_default_kernel_is_the_best_usable() -> None:
    isas = _core.isas()
    assert next(iter(isas)) == "scalar"
    assert isas["scalar"]
    assert _core.isa() in isas
    assert isas[_core.isa()]
    layer = layer_of(SPECS[1], 5, 9, "dynamic")
    x = rows(0, 3, 9)
    ref.assert_same_bits(layer(x), layer._forward(x, isa=_core.isa()))
    with pytest.raises((ValueError, RuntimeError), match="scalar"):
        layer._forward(x, isa="sse9")


def test_the_environment_forces_a_kernel(isa: str) -> None:
    script = "from qnative import _core; print(_core.isa())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment(QNATIVE_ISA=isa)
    )
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2!", "\udcff", "neon" if "neon" not in _core.isas() else "avx2"])
def test_an_unusable_kernel_cannot_be_forced(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import qnative; qnative.isa()"], capture_output=True, text=True, check=False,
        env=environment(QNATIVE_ISA=name),
    )  # fmt: skip
    assert done.returncode != 0
    assert ascii(name)[1:-1] in done.stderr  # bytes that are no text too
    assert "scalar" in done.stderr  # what can be chosen


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, **extra}


@cache
def layer_of(
    spec: Spec, n: int, k: int, kind: Any, with_bias: bool = False, activation: str | None = None, seed: int = 0
) -> Any:
    """A float32-output layer of random weights; dynamic and float kinds only (they can be cached)."""
    tensor, _ = weights(spec, n, k, seed)
    return qn.QuantizedLinear.from_tensor(
        tensor, bias_of(n) if with_bias else None, activations=kind, activation=activation
    )


def bias_of(n: int) -> NDArray[np.float32]:
    return (np.random.default_rng(n).standard_normal(n) * 5).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Tails


def tails() -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(70)
    shapes = [(i, int(rng.integers(1, 71)), int(rng.integers(1, 71))) for i in range(1, 71)]
    shapes += [(int(rng.integers(1, 71)), i, int(rng.integers(1, 71))) for i in range(1, 71)]
    shapes += [(int(rng.integers(1, 71)), int(rng.integers(1, 71)), i) for i in range(1, 71)]
    shapes += [tuple(map(int, s)) for s in rng.integers(1, 71, (300, 3))]
    shapes += [(m, n, k) for m in (1, 2) for n in (1, 15, 16, 17, 48, 49) for k in (1, 3, 4, 5, 7, 8, 9, 64, 65)]
    return shapes


KERNELS = {
    "int8 dynamic": (Spec("int8"), "dynamic"),
    "int8 asymmetric weights": (Spec("int8", "asymmetric"), "dynamic_symmetric"),
    "uint8": (Spec("uint8", "asymmetric", "per_tensor"), "dynamic"),
    "int4 groups of 32": (Spec("int4", "symmetric", 32), "dynamic"),
    "uint4 groups of 16": (Spec("uint4", "asymmetric", 16), "dynamic"),
    "int8 weights only": (Spec("int8"), "float"),
    "int4 weights only": (Spec("int4", "asymmetric", 32), "float"),
    "float8": (Spec("float8_e4m3fn"), "dynamic"),
}


@cache
def expected_tail(kernel: str, m: int, n: int, k: int) -> NDArray[np.float32]:
    spec, kind = KERNELS[kernel]
    return expected_float(rows(1, m, k), weights(spec, n, k)[1], kind, bias_of(n))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tail(kernel: str, isa: str, guarded: Guarded) -> None:
    """Input and output lie against pages that nobody may touch, the output poisoned."""
    spec, kind = KERNELS[kernel]
    shapes = tails()
    if kind == "float" or spec.dtype in FLOAT8:
        shapes = shapes[::5]  # the reference's fused chain is slow
    for m, n, k in shapes:
        layer = layer_of(spec, n, k, kind, True)
        x = rows(1, m, k)
        expected = expected_tail(kernel, m, n, k)
        at = ("end", "start")[(m + n + k) % 2]
        guarded_x, out = guarded((m, k), np.float32, at), guarded((m, n), np.float32, at)
        guarded_x[:] = x
        guarded_x.flags.writeable = False
        y = layer._forward(guarded_x, out=out, isa=isa)
        assert y is out
        ref.assert_same_bits(y, expected, f"{kernel} {isa} {m}x{n}x{k}")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_row_alone_is_the_row_in_its_batch(activation: str | None, isa: str) -> None:
    for spec, kind in KERNELS.values():
        for m, n, k in ((9, 50, 70), (17, 33, 67), (70, 7, 129)):
            layer = layer_of(spec, n, k, kind, True, activation)
            x = rows(2, m, k)
            whole = layer._forward(x, isa=isa)
            for i in range(m):
                ref.assert_same_bits(layer._forward(x[i : i + 1], isa=isa), whole[i : i + 1], f"row {i}")
            for start, stop in ((0, 3), (1, 9), (m - 5, m)):
                ref.assert_same_bits(layer._forward(x[start:stop], isa=isa), whole[start:stop])


def test_many_rows_are_cut_into_blocks(isa: str) -> None:
    """More rows, columns and k than any cache block."""
    for spec, kind in KERNELS.values():
        slow = kind == "float" or spec.dtype in FLOAT8
        shapes = [(70, 101, 300), (530, 21, 9)] if slow else [(301, 530, 700), (20, 5, 30_001)]
        for m, n, k in shapes:
            y = layer_of(spec, n, k, kind, True)._forward(rows(3, m, k), isa=isa)
            ref.assert_same_bits(y, expected_blocks(spec, kind, m, n, k), f"{spec} {kind} {m}x{n}x{k}")


@cache
def expected_blocks(spec: Spec, kind: str, m: int, n: int, k: int) -> NDArray[np.float32]:
    return expected_float(rows(3, m, k), weights(spec, n, k)[1], kind, bias_of(n))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5000), (3, 2, 9000), (2, 17, 4097)])
@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_long_float_chains(dtype: str, m: int, n: int, k: int, isa: str) -> None:
    for kind in ("float", "dynamic"):
        if kind == "dynamic" and dtype == "int8":
            continue
        x = rows(4, m, k)
        y = layer_of(Spec(dtype), n, k, kind)._forward(x, isa=isa)
        ref.assert_same_bits(y, expected_long(Spec(dtype), kind, m, n, k))


@cache
def expected_long(spec: Spec, kind: str, m: int, n: int, k: int) -> NDArray[np.float32]:
    return expected_float(rows(4, m, k), weights(spec, n, k)[1], kind)


# ----------------------------------------------------------------------------------------------------------------------
# Every kind of operand


M, N, K = 7, 35, 133


class Combination(NamedTuple):
    """A layer, its input, and what must come out."""

    name: str
    layer: Any
    x: NDArray[Any]
    expected: NDArray[Any]


@cache
def combinations(spec: Spec, kind: str) -> list[Combination]:
    """Every output of one kind of weights and activations."""
    tensor, w = weights(spec, N, K)
    x = rows(5, M, K)
    found = []
    kinds: list[tuple[str, Any, NDArray[Any]]] = [(kind, kind, x)]
    if kind == "static" and spec.dtype in FLOAT8:
        qp = qn.QParams(np.float32(0.3), dtype=spec.dtype)
        codes = random_codes(np.random.default_rng(6), spec, (M, K))
        kinds = [("float in", qp, x), ("codes in", qp, codes)]
    elif kind == "static":
        kinds = []
        for i, (dtype, zero) in enumerate(STATICS):
            qp = static(dtype, zero, 0.05 + 0.01 * i)
            codes = np.random.default_rng(i).integers(*ref.RANGES[dtype], (M, K), endpoint=True)
            kinds += [(f"{dtype} {zero}", qp, x), (f"{dtype} {zero} codes", qp, codes.astype(ref.STORAGE[dtype]))]
        narrow = static("int8", 3, 0.2, quant_min=-20, quant_max=50)
        kinds.append(("int8 narrow", narrow, x))
    for i, (name, qp, data) in enumerate(kinds):
        bias = bias_of(N) if i % 2 else None
        y = expected_float(data, w, qp, bias)
        make = qn.QuantizedLinear.from_tensor
        found.append(Combination(name, make(tensor, bias, activations=qp), data, y))
        for label, out in OUTPUTS.items():
            if len(kinds) > 3 and i % 3 != list(OUTPUTS).index(label):
                continue  # each static input with one of the outputs
            out = fitted(out, y)
            layer = make(tensor, bias, activations=qp, output=out)
            found.append(Combination(f"{name} -> {label}", layer, data, to_codes(y, out)))
        function = ACTIVATIONS[i % 4]
        layer = make(tensor, bias, activations=qp, activation=function)
        found.append(Combination(f"{name} {function}", layer, data, activate(y, function)))
        out = fitted(qn.QParams(np.float32(1), 9, "uint8"), activate(y, function))
        layer = make(tensor, bias, activations=qp, activation=function, output=out)
        codes = to_codes(activate(y, function), out)
        found.append(Combination(f"{name} {function} codes", layer, data, codes))
    return found


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_symmetric", "static", "float"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_combination(spec: Spec, kind: str, isa: str, guarded: Guarded) -> None:
    for c in combinations(spec, kind):
        out = guarded(c.expected.shape, c.expected.dtype)
        ref.assert_same_bits(c.layer._forward(c.x, out=out, isa=isa), c.expected, f"{spec} {c.name} {isa}")
        # Sums of one sign may all clamp to one code, or vanish in an activation function.
        if c.expected.dtype == np.float32 and not any(function in c.name for function in ACTIVATIONS):
            assert np.unique(c.expected).size > 20, c.name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantized_inputs_and_accumulators(spec: Spec, isa: str) -> None:
    """`quantize_input` and `accumulate` show the integers inside."""
    tensor, w = weights(spec, N, K)
    x = rows(5, M, K)
    kinds: list[Any] = ["dynamic", "dynamic_symmetric"]
    if spec.dtype in INTEGERS:
        kinds += [static(*s) for s in STATICS]
    else:
        kinds.append(qn.QParams(np.float32(0.3), dtype=spec.dtype))
    for kind in kinds:
        layer = qn.QuantizedLinear.from_tensor(tensor, bias_of(N), activations=kind)
        codes, scale, zero = quantized_input(x, kind, spec.dtype)
        q = layer.quantize_input(x)
        assert_quantized_rows(q, codes, scale, zero)
        if spec.dtype in FLOAT8:
            continue
        acc = layer._accumulate(x, isa=isa)
        assert acc.dtype == np.int32
        assert acc.shape == ((M, len(w.groups), N) if w.group_size else (M, N))
        assert np.array_equal(grouped(acc, layer), np.moveaxis(ref.accumulators(codes, zero, w), 0, 1))


def assert_quantized_rows(q: Any, codes: NDArray[Any], scale: Any, zero: Any) -> None:
    """`quantize_input`'s answer: the codes alone, or with scale and zero point."""
    parts = q if isinstance(q, tuple) else (q,)
    ref.assert_same_bits(np.asarray(parts[0]), codes)
    if len(parts) > 1:
        got = np.broadcast_to(np.asarray(parts[1]).reshape(-1), len(codes))
        ref.assert_same_bits(np.ascontiguousarray(got), np.ascontiguousarray(np.broadcast_to(scale, len(codes))))
    if len(parts) > 2:
        assert np.array_equal(np.broadcast_to(np.asarray(parts[2]).reshape(-1), len(codes)),
                              np.broadcast_to(zero, len(codes)))  # fmt: skip


def grouped(acc: NDArray[Any], layer: Any) -> NDArray[Any]:
    """`(M, groups, N)`, also where there is one group."""
    return acc if acc.ndim == 3 else acc[:, None, :]


# ----------------------------------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.parametrize("activations", STATICS[:6], ids=str)
@pytest.mark.parametrize(
    ("dtype", "mode", "code", "zero"),
    [
        ("int8", "symmetric", -127, 0), ("int8", "symmetric", 127, 0), ("int8", "asymmetric", -128, 0),
        ("int8", "asymmetric", -128, 127), ("int8", "asymmetric", 127, -128), ("uint8", "asymmetric", 255, 0),
        ("uint8", "asymmetric", 0, 255), ("uint8", "symmetric", 0, 128), ("uint8", "symmetric", 255, 128),
        ("int4", "symmetric", -7, 0), ("int4", "asymmetric", -8, 7), ("uint4", "asymmetric", 15, 0),
    ],
)  # fmt: skip
def test_extreme_codes(dtype: str, mode: str, code: int, zero: int, activations: tuple[str, int], isa: str) -> None:
    """All weights and all inputs at one end: a 16-bit or saturating sum cannot survive."""
    spec = Spec(dtype, mode, "per_tensor")
    for k in (1, 2, 3, 4, 7, 64, 129, 4096):
        tensor = tensor_of(spec, np.full((17, k), code, ref.STORAGE[dtype]), 1.0, zero)
        qp = static(*activations, scale=1.0)
        layer = qn.QuantizedLinear.from_tensor(tensor, activations=qp)
        for a in ref.RANGES[activations[0]]:
            x = np.full((3, k), a, ref.STORAGE[activations[0]])
            truth = k * (a - activations[1]) * (code - zero)
            ref.assert_same_bits(layer._forward(x, isa=isa), np.full((3, 17), np.float32(truth)), f"{k} {a}")


@pytest.mark.parametrize("group", [120, 128, 129, 136, 256, 1000])
@pytest.mark.parametrize(
    ("dtype", "code", "zero"),
    [("int8", -128, 127), ("int8", 127, -128), ("uint8", 255, 0), ("int4", -8, 7), ("int4", 7, -8), ("uint4", 15, 15)],
)
def test_extreme_codes_in_groups(dtype: str, code: int, zero: int, group: int, isa: str) -> None:
    """Kernels that correct groups in 16 bits may do so while 255 times a group's size fits them, and no longer."""
    k, n = 2 * group + 3, 17
    spec = Spec(dtype, "asymmetric", group)
    codes = np.full((n, k), code, ref.STORAGE[dtype])
    scale = np.float32([[1.0, 0.5, 2.0]] * n)
    tensor = tensor_of(spec, codes, scale, np.full((n, 3), zero))
    w = ref.Weights.build(codes, scale, np.full((n, 3), zero), dtype, group)
    for kind, a_zero in (("uint8", 0), ("uint8", 255), ("int8", -128), ("int8", 127)):
        layer = qn.QuantizedLinear.from_tensor(tensor, activations=static(kind, a_zero, scale=1.0))
        x = np.repeat(np.array(ref.RANGES[kind], ref.STORAGE[kind])[:, None], k, axis=1)
        expected = ref.epilogue(ref.accumulators(x, a_zero, w), 1.0, w, None)
        ref.assert_same_bits(layer._forward(x, isa=isa), expected, f"{kind} {a_zero}")


def bound(a: int, w: int) -> int:
    """The largest K whose sums surely fit int32."""
    return INT32_MAX // (a * w)


LONG = {
    "255 x 255": (("uint8", 0), "uint8", "asymmetric", 255, 0, bound(255, 255)),
    "255 x -255": (("uint8", 0), "uint8", "asymmetric", 0, 255, bound(255, 255)),
    "255 x 128": (("uint8", 0), "uint8", "symmetric", 0, 128, bound(255, 128)),
    "255 x 127": (("uint8", 0), "int8", "symmetric", -127, 0, bound(255, 127)),
    "-255 x 127": (("uint8", 255), "int8", "symmetric", 127, 0, bound(255, 127)),
    "-255 x -255": (("int8", 127), "int8", "asymmetric", -128, 127, bound(255, 255)),
    "128 x 127": (("int8", 0), "int8", "symmetric", 127, 0, bound(128, 127)),
    "128 x -127": (("uint8", 128), "int8", "symmetric", -127, 0, bound(128, 127)),
    "255 x 15": (("uint8", 0), "uint4", "asymmetric", 15, 0, bound(255, 15)),
    "-255 x -15": (("uint8", 255), "uint4", "asymmetric", 0, 15, bound(255, 15)),
}


def test_the_bounds_are_those_of_the_rules() -> None:
    assert [bound(255, 255), bound(255, 128), bound(255, 127)] == [33_025, 65_793, 66_311]


@pytest.mark.parametrize("case", LONG)
def test_long_sums_are_exact_on_both_sides_of_int32(case: str, isa: str) -> None:
    """Inputs all at either end: what is stored sums up beyond int32 even where the true sum does not."""
    activations, dtype, mode, code, zero, limit = LONG[case]
    qp = static(*activations, scale=1.0)
    for k in sorted({32_767, 32_768, 32_769, 65_536, limit - 1, limit, limit + 1, 2 * limit + 1, 131_073, 200_000}):
        if k > 200_000 and k > limit + 1:
            continue
        spec = Spec(dtype, mode, "per_tensor")
        codes = np.full((3, k), code, ref.STORAGE[dtype])
        codes[1, ::2] = zero  # half of the sum
        layer = qn.QuantizedLinear.from_tensor(tensor_of(spec, codes, 1.0, zero), activations=qp)
        counts = [[k, k // 2, k], [k - k // 3, odd_from(k // 3, k), k - k // 3]]
        for a in ref.RANGES[activations[0]]:
            x = np.full((2, k), a, ref.STORAGE[activations[0]])
            x[1, : k // 3] = activations[1]
            truth = np.array(counts, np.int64) * ((a - activations[1]) * (code - zero))
            ref.assert_same_bits(layer._forward(x, isa=isa), truth.astype(np.float32), f"{case} {k} {a}")
            acc = layer._accumulate(x, isa=isa)
            assert np.array_equal(acc, truth)
            assert acc.dtype == (np.int32 if k <= limit else np.int64), k


def odd_from(start: int, stop: int) -> int:
    """How many odd numbers lie in start..stop-1."""
    return stop // 2 - start // 2


@pytest.mark.parametrize(("dtype", "mode"), [("int8", "symmetric"), ("int8", "asymmetric"), ("uint8", "asymmetric"),
                                             ("int4", "asymmetric")])  # fmt: skip
def test_long_random_sums(dtype: str, mode: str, isa: str) -> None:
    for k in (33_026, 70_001, 200_000):
        spec = Spec(dtype, mode)
        x = np.abs(rows(7, 2, k))  # one-sided: sums grow with k
        y = layer_of(spec, 3, k, "dynamic", seed=1)._forward(x, isa=isa)
        ref.assert_same_bits(y, expected_long_sum(spec, k), f"{spec} {k}")


@cache
def expected_long_sum(spec: Spec, k: int) -> NDArray[np.float32]:
    return expected_float(np.abs(rows(7, 2, k)), weights(spec, 3, k, 1)[1], "dynamic")


def test_long_sums_of_int4_columns_with_zero_points_of_their_own(isa: str) -> None:
    k, zeros, spec = 570_000, np.array([0, 15, 7]), Spec("uint4", "asymmetric")
    codes = np.random.default_rng(8).integers(0, 16, (3, k)).astype(np.uint8)
    codes[0], codes[1] = 15, 0  # the largest sum, and the least
    layer = qn.QuantizedLinear.from_tensor(
        tensor_of(spec, codes, np.ones(3), zeros), activations=static("uint8", 0, 1.0)
    )
    x = np.full((2, k), 255, np.uint8)
    x[1, ::3] = 1
    truth = x.astype(np.int64) @ (codes.astype(np.int64) - zeros[:, None]).T
    assert truth[0, 0] > INT32_MAX and truth[0, 1] < -INT32_MAX
    assert np.array_equal(layer._accumulate(x, isa=isa), truth)
    ref.assert_same_bits(layer._forward(x, isa=isa), truth.astype(np.float32))


def test_long_groups(isa: str) -> None:
    """A group longer than int32 sums reach, and the ragged rest."""
    k, group = 90_000, 70_000
    spec = Spec("uint8", "asymmetric", group)
    codes = np.full((2, k), 255, np.uint8)
    scale = np.float32([[1.0, 0.5], [2.0, 0.25]])
    tensor = tensor_of(spec, codes, scale, np.zeros((2, 2), int))
    layer = qn.QuantizedLinear.from_tensor(tensor, activations=static("uint8", 0, 1.0))
    x = np.full((1, k), 255, np.uint8)
    w = ref.Weights.build(codes, scale, 0, "uint8", group)
    ref.assert_same_bits(layer._forward(x, isa=isa), ref.epilogue(ref.accumulators(x, 0, w), 1.0, w, None))


def test_int32_bias_is_added_to_the_accumulator(isa: str) -> None:
    rng = np.random.default_rng(0)
    for k in (9, 64, 5000):
        tensor, w = weights(Spec("int8", "asymmetric"), 21, k)
        qp = static("uint8", 77, 0.01)
        bias = rng.integers(-(2**24), 2**24, 21).astype(np.int32)
        bias[0], bias[1] = 2**24 + 1, -(2**24) - 1  # not float32 values
        layer = qn.QuantizedLinear.from_tensor(tensor, bias, activations=qp)
        x = rng.integers(0, 256, (4, k)).astype(np.uint8)
        codes_layer = qn.QuantizedLinear.from_tensor(tensor, bias, activations=qp, output=OUTPUTS["int8"])
        y = expected_float(x, w, qp, bias)
        ref.assert_same_bits(layer._forward(x, isa=isa), y)
        ref.assert_same_bits(codes_layer._forward(x, isa=isa), to_codes(y, OUTPUTS["int8"]))


def test_an_int32_bias_beside_the_bound(isa: str) -> None:
    """The sum with the bias leaves int32 although the product does not."""
    tensor = tensor_of(Spec("int8", "symmetric", "per_tensor"), np.full((2, 66_311), 127, np.int8), 1.0, 0)
    x = np.full((1, 66_311), 255, np.uint8)
    bias = np.array([2**31 - 1, -(2**31)], np.int32)
    try:
        layer = qn.QuantizedLinear.from_tensor(tensor, bias, activations=static("uint8", 0, 1.0))
    except ValueError as error:
        assert "overflow" in str(error) or "int32" in str(error)
        return
    truth = 66_311 * 255 * 127 + bias.astype(np.int64)
    ref.assert_same_bits(layer._forward(x, isa=isa), truth[None].astype(np.float32))


@pytest.mark.parametrize("spec", [Spec("int8"), Spec("int4", "asymmetric", 16), Spec("float8_e4m3fn")], ids=str)
def test_scales_at_the_ends_of_float32(spec: Spec, isa: str) -> None:
    """Subnormal products of scales are not flushed, overflow is Inf, and integer outputs clamp."""
    _, w = weights(spec, 19, 40)
    for factor, size in ((1e-38, 1.0), (1e-30, 1e-10), (1e-20, 1e-25), (1e30, 1e9), (1e38, 1e30)):
        with np.errstate(over="ignore"):
            scale = np.minimum(w.scale * np.float32(factor), np.finfo(np.float32).max).astype(np.float32)
        scaled = tensor_of(spec, w.codes, scale[:, 0] if w.group_size is None else scale,
                           w.zero_point[:, 0] if w.group_size is None and spec.mode == "asymmetric" else
                           w.zero_point if spec.mode == "asymmetric" else ref.middle(spec.dtype)
                           if spec.dtype in INTEGERS else 0)  # fmt: skip
        weights_here = ref.Weights(w.codes, scale, w.zero_point, w.dtype, w.group_size)
        x = (np.random.default_rng(1).standard_normal((3, 40)) * size).astype(np.float32)
        for kind in ("dynamic", "dynamic_symmetric", "float"):
            y = expected_float(x, weights_here, kind)
            make = qn.QuantizedLinear.from_tensor
            ref.assert_same_bits(make(scaled, activations=kind)._forward(x, isa=isa), y, f"{kind} {factor}")
            for out in OUTPUTS.values():
                codes = make(scaled, activations=kind, output=out)._forward(x, isa=isa)
                ref.assert_same_bits(codes, to_codes(y, out), f"{kind} {factor} codes")


def test_requantized_ties_and_clamps(isa: str) -> None:
    """Outputs that stand exactly between two codes go to the even one, in every column and row."""
    codes = np.arange(-60, 61, dtype=np.int8).reshape(-1, 1)
    tensor = tensor_of(Spec("int8", "symmetric", "per_tensor"), codes, 0.5, 0)
    x = np.arange(-128, 128).astype(np.int8).reshape(-1, 1)
    for zero in (0, 1, -128, 127):
        for scale in (1.0, 3.0, 0.25):
            out = qn.QParams(np.float32(scale), zero, "int8")
            layer = qn.QuantizedLinear.from_tensor(tensor, activations=static("int8", 0, 1.0), output=out)
            y = (x.astype(np.float32) * codes.astype(np.float32).T) * np.float32(0.5)
            ref.assert_same_bits(layer._forward(x, isa=isa), to_codes(y, out))


# ----------------------------------------------------------------------------------------------------------------------
# Dynamic ranges


def hard_rows(k: int) -> NDArray[np.float32]:
    """Rows that decide how a range is found and used."""
    top = np.finfo(np.float32).max
    rng = np.random.default_rng(k)
    rows_ = [
        np.zeros(k), np.full(k, 3.0), np.full(k, -3.0), np.full(k, 1e-42), np.full(k, -1e-44), np.full(k, 2.0**-126),
        np.full(k, top), np.full(k, -top), rng.uniform(-1, 1, k) * top, rng.uniform(-1, 1, k) * 1e-38,
        rng.uniform(-1, 1, k) * 1e-41, rng.uniform(1, 2, k), rng.uniform(-2, -1, k), rng.standard_normal(k) * 1e20,
        np.where(np.arange(k) == k - 1, 100.0, 1e-3), np.where(np.arange(k) == 0, -100.0, 1e-3),
        np.where(np.arange(k) % 2 == 0, top, -top), rng.integers(-255, 256, k) / 2.0, np.full(k, -0.0),
    ]  # fmt: skip
    for low in (0.5, 1.5, 2.5, 126.5, 253.5, 254.5):  # a scale of 1, a zero point on a tie, and values on ties
        rows_.append(np.concatenate([[-low, 255.0 - low], rng.integers(0, 256, k) - low])[:k])
    for top in (127.0, 448.0, 57344.0):  # likewise for symmetric rows and float8
        ties = rng.integers(-64, 64, k) * 2.0 ** rng.integers(-12, 3, k)
        rows_.append(np.concatenate([[-top], rng.integers(-127, 127, k) + 0.5 if top == 127 else ties])[:k])
    return np.array(rows_).astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_symmetric"])
def test_dynamic_ranges(kind: str, dtype: str, isa: str) -> None:
    """Zero, constant, one-sided, tiny, huge and overflowing rows."""
    for k in (1, 2, 7, 16, 33, 64, 100):
        spec = Spec(dtype)
        tensor, w = weights(spec, 18, k)
        layer = qn.QuantizedLinear.from_tensor(tensor, activations=kind)
        x = hard_rows(k)
        codes, scale, zero = quantized_input(x, kind, dtype)
        assert_quantized_rows(layer.quantize_input(x), codes, scale, zero)
        ref.assert_same_bits(layer._forward(x, isa=isa), expected_float(x, w, kind), f"{kind} {k}")


def test_dynamic_rows_of_random_bits(isa: str) -> None:
    """Any bit pattern at all, NaN and Inf included."""
    rng = np.random.default_rng(8)
    x = rng.integers(0, 2**32, (300, 21), np.uint32).view(np.float32)
    one_binade = (rng.integers(0, 2**32, (300, 21), np.uint32) & 0x81FFFFFF | 0x3E000000).view(np.float32)
    for data in (x, one_binade):
        for kind in ("dynamic", "dynamic_symmetric"):
            for dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
                tensor, w = weights(Spec(dtype), 17, 21)
                layer = qn.QuantizedLinear.from_tensor(tensor, activations=kind)
                codes, scale, zero = quantized_input(data, kind, dtype)
                assert_quantized_rows(layer.quantize_input(data), codes, scale, zero)
                ref.assert_same_bits(layer._forward(data, isa=isa), expected_float(data, w, kind), f"{kind} {dtype}")


def test_onnx_dynamic_quantize_linear_examples() -> None:
    """The three published examples, each a row."""
    tensor, _ = weights(Spec("int8"), 3, 6)
    layer = qn.QuantizedLinear.from_tensor(tensor, activations="dynamic")
    for x, scale, zero, codes in (
        ([0, 2, -3, -2.5, 1.34, 0.5], 0.0196078438, 153, [153, 255, 0, 26, 221, 179]),
        ([-1.0, -2.1, -1.3, -2.5, -3.34, -4.0], 0.0156862754, 255, [191, 121, 172, 96, 42, 0]),
        ([1, 2.1, 1.3, 2.5, 3.34, 4.0], 0.0156862754, 0, [64, 134, 83, 159, 213, 255]),
    ):
        row = np.float32([x])
        ours = ref.dynamic_rows(row, "dynamic")
        assert ours[0].tolist() == [codes]
        assert ours[1][0] == np.float32(scale)
        assert ours[2][0] == zero
        assert_quantized_rows(layer.quantize_input(row), *ours)


@pytest.mark.parametrize("spec", [Spec("int8"), Spec("int4", "asymmetric", 8), Spec("float8_e4m3fn")], ids=str)
def test_nan_and_inf_in_the_input(spec: Spec, isa: str) -> None:
    """NaN is the zero point's code and Inf an end of the range; rows do not touch each other."""
    m, k = 12, 21
    x = rows(9, m, k)
    x[1, 3], x[2, 0], x[3, 20], x[4, 16] = np.nan, np.inf, -np.inf, -np.nan
    x[5], x[6], x[7] = np.nan, np.inf, -np.inf
    x[8, ::2], x[8, 1::2] = np.nan, np.inf
    tensor, w = weights(spec, 20, k)
    kinds: list[Any] = ["dynamic", "dynamic_symmetric", "float"]
    kinds.append(static("uint8", 9, 0.1) if spec.dtype in INTEGERS else qn.QParams(np.float32(0.3), dtype=spec.dtype))
    for kind in kinds:
        layer = qn.QuantizedLinear.from_tensor(tensor, activations=kind)
        y = layer._forward(x, isa=isa)
        ref.assert_same_bits(y, expected_float(x, w, kind), f"{kind}")
        clean = [0, 9, 10, 11]
        ref.assert_same_bits(layer._forward(x[clean], isa=isa), y[clean])
        if kind != "float":
            assert np.isfinite(y[:5]).all()
        out = qn.QuantizedLinear.from_tensor(tensor, activations=kind, output=OUTPUTS["int8"])
        ref.assert_same_bits(out._forward(x, isa=isa), to_codes(y, OUTPUTS["int8"]))


def test_float_chains_keep_signed_zeros_and_subnormals(isa: str) -> None:
    """No flushing to zero, and padding must not turn -0 into 0."""
    for k in (1, 2, 3, 5, 8, 9):
        spec = Spec("int8", "symmetric", "per_tensor")
        codes = np.ones((18, k), np.int8)
        tensor = tensor_of(spec, codes, 1e-30, 0)
        w = ref.Weights.build(codes, 1e-30, 0, "int8")
        x = np.zeros((5, k), np.float32)
        x[0], x[1], x[2], x[3] = -1e-30, 1e-30, -1e-14, -0.0
        x[4, 0] = -1e-30
        expected = ref.float_linear(x, w, None)
        assert np.signbit(expected[0]).all()
        assert not expected[0].any()
        ref.assert_same_bits(qn.QuantizedLinear.from_tensor(tensor, activations="float")._forward(x, isa=isa), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Activation functions


def sweep() -> NDArray[np.float32]:
    """Every sign and exponent, many mantissas, and the stretch where the functions bend."""
    low_bits = np.array([0, 1, 0x3FFFF, 0x7FFFF], np.uint32)
    coarse = (np.arange(1 << 13, dtype=np.uint32)[:, None] << 19 | low_bits).ravel()
    fine = np.linspace(-12, 12, 60_001, dtype=np.float32)
    far = np.linspace(-110, 110, 20_001, dtype=np.float32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
    return np.concatenate([coarse.view(np.float32), fine, far, special])


@cache
def activated(name: str) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    x = sweep()
    return x, ref.activation(x, name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name: str, isa: str) -> None:
    x, truth = activated(name)
    tensor = tensor_of(Spec("int8", "symmetric", "per_tensor"), np.ones((17, 1), np.int8), 1.0, 0)
    y = qn.QuantizedLinear.from_tensor(tensor, activations="float", activation=name)._forward(x[:, None], isa=isa)
    plain = qn.QuantizedLinear.from_tensor(tensor, activations="float")._forward(x[:, None], isa=isa)
    ref.assert_same_bits(y, activate(plain, name), f"{name} {isa}")
    ref.assert_same_bits(y, np.repeat(y[:, :1], 17, axis=1), "columns")
    y = y[:, 0]
    nan = np.isnan(x)
    assert np.isnan(y[nan]).all() or (y[nan] == 0).all()
    assert not np.isnan(y[~nan]).any()
    keep = np.isfinite(x)
    error = np.abs(y[keep].astype(np.float64) - truth[keep])
    allowed = 2.0**-22 * np.maximum(1.0, np.abs(x[keep].astype(np.float64)))
    worst = int((error / allowed).argmax())
    assert error[worst] <= allowed[worst], (x[keep][worst], y[keep][worst], truth[keep][worst])
    assert np.isposinf(y[np.isposinf(x)]).all()
    assert (np.abs(y[np.isneginf(x)]) <= 2.0**-22).all()
    if name == "relu":
        assert np.array_equal(y[~nan], np.maximum(x[~nan], 0))
    # Nothing may jump: the functions' slope is below 1.13 everywhere.
    order = np.sort(x[keep])
    z = activate(order, name).astype(np.float64)
    step = np.abs(np.diff(z)) - 1.13 * np.diff(order.astype(np.float64))
    assert (step <= 2.0**-21 * np.maximum(1.0, np.abs(order[1:].astype(np.float64)))).all()


# ----------------------------------------------------------------------------------------------------------------------
# Whatever array comes


FORM_KINDS: dict[str, tuple[Spec, Any]] = {
    "dynamic": (Spec("int8"), "dynamic"), "static": (Spec("int8"), static("int8", 3)),
    "float": (Spec("int4", "asymmetric", 16), "float"), "float8": (Spec("float8_e4m3fn"), "dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_any_memory_layout(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    tensor, w = weights(spec, 11, 37)
    layer = qn.QuantizedLinear.from_tensor(tensor, bias_of(11), activations=activations)
    x = rows(10, 6, 37)
    expected = expected_float(x, w, activations, bias_of(11))
    for layout in ("fortran", "strided", "reversed", "unaligned", "swapped", "read-only", "as is"):
        ref.assert_same_bits(layer(lay_out(x, layout)), expected, layout)
    same = np.broadcast_to(x[2], (5, 37))
    ref.assert_same_bits(layer(same), np.repeat(expected[2:3], 5, axis=0))
    ref.assert_same_bits(layer(x[::-2]), expected[::-2])
    ref.assert_same_bits(layer(x.tolist()), expected)
    # Other float types
    for narrow in (np.float16, ml_dtypes.bfloat16):
        half = x.astype(narrow)
        ref.assert_same_bits(layer(half), expected_float(half.astype(np.float32), w, activations, bias_of(11)))
    wide = x.astype(np.float64)
    ref.assert_same_bits(layer(wide), expected)


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_any_shape(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    tensor, w = weights(spec, 11, 37)
    layer = qn.QuantizedLinear.from_tensor(tensor, activations=activations)
    x = rows(11, 24, 37)
    expected = expected_float(x, w, activations)
    ref.assert_same_bits(layer(x[0]), expected[0])
    ref.assert_same_bits(layer(x.reshape(2, 3, 4, 37)), expected.reshape(2, 3, 4, 11))
    ref.assert_same_bits(layer(x.reshape(2, 12, 37)[:, ::3]), expected.reshape(2, 12, 11)[:, ::3])
    for lead in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        y = layer(np.zeros((*lead, 37), np.float32))
        assert y.shape == (*lead, 11)
        assert y.dtype == np.float32
        assert layer(np.zeros((*lead, 37), np.float32), out=y) is y
    row = np.empty(11, np.float32)
    ref.assert_same_bits(layer(x[3], out=row), expected[3])


def test_no_outputs_and_no_inputs(isa: str) -> None:
    for spec in (Spec("int8"), Spec("int4", "asymmetric"), Spec("float8_e4m3fn")):
        for n, k in ((0, 5), (3, 0), (0, 0)):
            tensor, _ = weights(spec, n, k)
            for kind in ("dynamic", "float"):
                try:
                    layer = qn.QuantizedLinear.from_tensor(tensor, bias_of(n), activations=kind)
                except ValueError as error:
                    assert "features" in str(error) or "shape" in str(error)
                    continue
                y = layer._forward(np.zeros((2, k), np.float32), isa=isa)
                ref.assert_same_bits(y, np.broadcast_to(bias_of(n), (2, n)).copy() + np.float32(0))


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_out(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    tensor, w = weights(spec, 11, 37)
    layer = qn.QuantizedLinear.from_tensor(tensor, activations=activations)
    x = rows(12, 6, 37)
    expected = expected_float(x, w, activations)
    out = np.full((6, 11), np.nan, np.float32)
    assert layer(x, out=out) is out
    ref.assert_same_bits(out, expected)
    large = np.full((8, 11), 7.0, np.float32)
    layer(x, out=large[1:7])
    ref.assert_same_bits(large[1:7], expected)
    assert (large[[0, 7]] == 7).all()
    out3 = np.empty((2, 3, 11), np.float32)
    assert layer(x.reshape(2, 3, 37), out=out3) is out3
    # Out with another layout is filled right or refused, never half
    for strange in (np.full((6, 22), 7.0, np.float32)[:, ::2], np.full((11, 6), 7.0, np.float32).T,
                    np.full((6, 11), 7.0, ">f4")):  # fmt: skip
        try:
            layer(x, out=strange)
        except (ValueError, TypeError) as error:
            assert "out" in str(error)
            assert (strange == 7).all()
        else:
            ref.assert_same_bits(strange.astype("=f4"), expected)


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_out_that_does_not_fit_is_refused(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    layer = qn.QuantizedLinear.from_tensor(weights(spec, 11, 37)[0], activations=activations)
    x = rows(12, 6, 37)
    read_only = np.zeros((6, 11), np.float32)
    read_only.flags.writeable = False
    outs = [np.zeros(shape, np.float32) for shape in ((6, 10), (11, 6), (66,), (1, 6, 11))]
    outs += [np.zeros((6, 11), kind) for kind in (np.float64, np.int32, np.int8, complex)]
    for out in (*outs, read_only):
        before = out.copy()
        with pytest.raises((ValueError, TypeError), match="out") as caught:
            layer(x, out=out)
        assert np.array_equal(out, before)
        if out.shape != (6, 11):
            assert "(6, 11)" in str(caught.value)
    with pytest.raises((ValueError, TypeError), match="out"):
        layer(x, out=[[0.0] * 11] * 6)


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_out_that_overlaps_the_input_is_refused(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    layer = qn.QuantizedLinear.from_tensor(weights(spec, 37, 37)[0], activations=activations)
    memory = np.zeros((20, 37), np.float32)
    memory[:] = rows(13, 20, 37)
    before = memory.copy()
    for x, out in ((memory, memory), (memory[:10], memory[5:15]), (memory[5:15], memory[:10])):
        with pytest.raises(ValueError, match=r"overlap|shares memory"):
            layer(x, out=out)
        assert np.array_equal(memory, before)
    ref.assert_same_bits(layer(memory[:10], out=memory[10:]), layer(before[:10]))  # neighbours do not overlap


@pytest.mark.parametrize("kind", FORM_KINDS)
def test_wrong_inputs_are_refused(kind: str) -> None:
    spec, activations = FORM_KINDS[kind]
    layer = qn.QuantizedLinear.from_tensor(weights(spec, 11, 37)[0], activations=activations)
    for shape in ((6, 36), (37, 6), (), (6, 0), (0,)):
        with pytest.raises(ValueError, match="37") as caught:
            layer(np.zeros(shape, np.float32))
        if shape and shape[-1] not in (37,):
            assert str(shape[-1]) in str(caught.value)
    for bad in (*(np.zeros((2, 37), t) for t in (complex, np.int64, np.int16, bool)), np.array([["a"] * 37]),
                np.array([[None] * 37])):  # fmt: skip
        with pytest.raises(TypeError, match=r"float|codes"):
            layer(bad)
    if kind != "static":
        for codes in (np.zeros((2, 37), np.int8), np.zeros((2, 37), np.uint8)):
            with pytest.raises((TypeError, ValueError)):
                layer(codes)
    else:
        with pytest.raises((TypeError, ValueError), match="int8"):
            layer(np.zeros((2, 37), np.uint8))  # the other sign
    with pytest.raises((TypeError, ValueError)):
        layer(None)


def test_codes_outside_a_four_bit_range() -> None:
    """Codes given as int8 may be any int8: they are refused, or the sum is exact all the same."""
    for dtype, zero in (("int4", -8), ("uint4", 15)):
        for k in (20, 200_000):
            qp = static(dtype, zero, 1.0)
            spec = Spec("int8", "symmetric", "per_tensor")
            tensor = tensor_of(spec, np.full((2, k), 127, np.int8), 1.0, 0)
            layer = qn.QuantizedLinear.from_tensor(tensor, activations=qp)
            wild = -128 if dtype == "int4" else 255
            x = np.full((1, k), wild, ref.STORAGE[dtype])
            try:
                y = layer(x)
            except ValueError as error:
                assert dtype in str(error)
                continue
            ref.assert_same_bits(y, np.full((1, 2), np.float32(k * 127 * (wild - zero))))


@given(
    m=st.integers(0, 20), n=st.integers(1, 40), k=st.integers(1, 90), spec=st.sampled_from(SPECS),
    kind=st.sampled_from(["dynamic", "dynamic_symmetric", "static", "float"]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_anything_at_all(m: int, n: int, k: int, spec: Spec, kind: Any, seed: int) -> None:
    """Random kinds and shapes on every usable kernel."""
    tensor, w = weights.__wrapped__(spec, n, k, seed)
    x = rows(seed, m, k)
    if kind == "static":
        dtype, zero = STATICS[seed % len(STATICS)]
        kind = static(dtype, zero, 0.1) if spec.dtype in INTEGERS else qn.QParams(np.float32(0.3), dtype=spec.dtype)
    layer = qn.QuantizedLinear.from_tensor(tensor, bias_of(n), activations=kind)
    expected = expected_float(x, w, kind, bias_of(n))
    for name, usable in _core.isas().items():
        if usable:
            ref.assert_same_bits(layer._forward(x, isa=name), expected, f"{spec} {kind} {name}")
