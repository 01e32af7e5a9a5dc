"""`QuantizedLinear` against NumPy's float32 product and the dynamic int8 layers of PyTorch and ONNX Runtime.

float32 in, float32 out, with a bias; activations are quantized row by row within the call. What is timed writes into an
array that was made before, except where a peer has no way to do so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qnative as qn
from benchmarks.harness import OURS, Case, Suite, WrongResult
from tests import reference

Array = NDArray[np.float32]
Peer = Callable[[Array, Array, Array], Callable[[], object]]

#: (rows, in_features, out_features)
SHAPES = [
    (1, 384, 384),
    (1, 4096, 4096),
    (8, 768, 3072),
    (32, 384, 1536),
    (128, 384, 1536),
    (128, 768, 3072),
    (512, 1024, 1024),
    (512, 4096, 4096),
]
SHORT_SHAPES = [(1, 384, 384), (32, 384, 1536), (128, 768, 3072)]


def suites(short: bool) -> Iterator[Suite]:
    """One table a scheme."""
    shapes = SHORT_SHAPES if short else SHAPES
    schemes = {
        "int8 per channel, dynamic": qn.QuantConfig.int8_per_channel(),
        "int4 per group of 32, dynamic": qn.QuantConfig.int4_per_group(32).asymmetric(),
        "fp8 per channel, dynamic": qn.QuantConfig.fp8().per_channel(),
    }
    for title, config in schemes.items():
        yield Suite(title, (case(shape, config) for shape in shapes))


def case(shape: tuple[int, int, int], config: qn.QuantConfig) -> Case:
    """Build the layer of one shape and scheme, and those it competes with."""
    m, k, n = shape
    rng = np.random.default_rng(m + k + n)
    weight = rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)
    bias = rng.standard_normal(n, np.float32)
    x = rng.standard_normal((m, k), np.float32)
    layer = qn.QuantizedLinear.from_float(weight, bias, config, activations="dynamic")
    out = np.empty((m, n), np.float32)
    contenders: dict[str, Callable[[], object]] = {OURS: lambda: layer(x, out=out)}
    contenders["NumPy float32"] = numpy_float32(weight, bias, x)
    if config.dtype == "int8":
        for name, peer in PEERS.items():
            with contextlib.suppress(ImportError):
                contenders[name] = peer(weight, bias, x)

    def check_all() -> None:
        check(layer, x)
        product = x @ weight.T + bias
        for name, run in contenders.items():
            if name != OURS:
                check_peer(f"{name} at {shape}", np.asarray(run()), product)

    return Case(f"{m},{k},{n}", 2.0 * m * k * n, check_all, contenders)


def check(layer: qn.QuantizedLinear, x: Array) -> None:
    """Compare bits with the reference, on a few of the rows of the whole batch (the reference is slow)."""
    out = np.full((len(x), layer.out_features), np.nan, np.float32)
    layer(x, out=out)
    q = layer.weight_quantized()
    config = q.config
    weights = reference.Weights.build(q.codes, q.scale, q.zero_point, config.dtype, config.group_size)
    few = 2 if config.info.is_float else 8
    rows = np.unique(np.linspace(0, len(x) - 1, few).astype(np.intp))
    codes, scale, zero = reference.dynamic_rows(x[rows], "dynamic", config.dtype)
    accumulated: NDArray[Any]
    if config.info.is_float:
        accumulated = reference.float_accumulators(codes, weights, config.dtype)
    else:
        accumulated = reference.accumulators(codes, zero, weights)
    expected = reference.epilogue(accumulated, scale, weights, layer.bias)
    try:
        reference.assert_same_bits(out[rows], expected, f"{layer!r} on {x.shape}, rows {rows.tolist()}")
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def check_peer(name: str, result: NDArray[Any], product: Array) -> None:
    """Make sure that a peer computes the same thing, to int8's precision."""
    error = np.linalg.norm(result - product) / np.linalg.norm(product)
    if not error < 0.03:
        raise WrongResult(f"{name}: relative error {error:.3g}; an int8 layer has about 0.01")


def numpy_float32(weight: Array, bias: Array, x: Array) -> Callable[[], object]:
    """Write the float32 layer as one does in NumPy: a BLAS product and a sum in place."""
    transposed = weight.T
    out = np.empty((len(x), len(weight)), np.float32)

    def run() -> Array:
        np.matmul(x, transposed, out=out)
        return np.add(out, bias, out=out)

    return run


def torch_dynamic(weight: Array, bias: Array, x: Array) -> Callable[[], object]:
    """Prepare PyTorch's dynamic int8 linear layer, weights per channel, on one thread."""
    torch = import_module("torch")
    torch.set_num_threads(1)
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(name for name in ("fbgemm", "x86", "onednn", "qnnpack") if name in engines)
    scales = torch.from_numpy(np.abs(weight).max(axis=1) / 127)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch.quantize_per_channel(torch.from_numpy(weight), scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, torch.from_numpy(bias))
    given = torch.from_numpy(x)

    def run() -> object:
        with torch.inference_mode():
            return torch.ops.quantized.linear_dynamic(given, packed)

    return run


def onnxruntime_dynamic(weight: Array, bias: Array, x: Array) -> Callable[[], object]:
    """Prepare ONNX Runtime's DynamicQuantizeMatMul, weights per channel, on one thread."""
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    helper = onnx.helper
    scales = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    codes = np.ascontiguousarray(np.rint(weight / scales[:, None]).astype(np.int8).T)
    initial = {"w": codes, "s": scales, "z": np.zeros(len(weight), np.int8), "b": bias}
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z", "b"], ["y"], domain="com.microsoft")],
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (len(x), len(weight)))],
        [onnx.numpy_helper.from_array(array, name) for name, array in initial.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    out = np.empty((len(x), len(weight)), np.float32)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(out))

    def run() -> Array:
        session.run_with_iobinding(binding)
        return out

    return run


#: Timed where they are installed.
PEERS: dict[str, Peer] = {"PyTorch dynamic": torch_dynamic, "ONNX Runtime dynamic": onnxruntime_dynamic}
