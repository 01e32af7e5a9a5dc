"""Who else multiplies by a quantized matrix: PyTorch, ONNX Runtime and NumKong, each where it is installed.

Every peer gets what is best for it: weights packed beforehand, outputs written in place where it has a way to do so,
its own threads with its own way of waiting. Its result is compared with the product before it is timed.

kinds: "dynamic" takes and gives float32 with a bias and quantizes activations within the call, as qnative does;
"static" takes codes and gives float32 with a bias; "integer" takes codes and gives the int32 sums.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnative import QuantConfig, quantize_tensor
from qnative.bench import Contender, Problem, WrongResult

#: What may be installed, for versions in reports.
PACKAGES = ("torch", "onnxruntime", "onnx", "numkong")


@dataclass(frozen=True)
class Quantized:
    """A problem as integers.

    Attributes
    ----------
    problem : Problem
    weight : numpy.ndarray of int8, shape (n, k)
        Symmetric codes, -127..127.
    weight_scale : numpy.ndarray of float32, shape (n,)
    x : numpy.ndarray of uint8, shape (m, k)
    x_scale : float
    x_zero : int
    """

    problem: Problem
    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    x: NDArray[np.uint8]
    x_scale: float
    x_zero: int

    @classmethod
    def of(cls, problem: Problem) -> Quantized:
        """Quantize weights per channel and all of x with one scale."""
        weight_scale = np.abs(problem.weight).max(axis=1) / np.float32(127)
        weight = np.rint(problem.weight / weight_scale[:, None]).astype(np.int8)
        low, high = min(float(problem.x.min()), 0.0), max(float(problem.x.max()), 0.0)
        x_scale = (high - low) / 255
        x_zero = round(-low / x_scale)
        x = np.clip(np.rint(problem.x / np.float32(x_scale)) + x_zero, 0, 255).astype(np.uint8)
        return cls(problem, weight, weight_scale, x, x_scale, x_zero)


@dataclass(frozen=True)
class Call:
    """A peer made ready: what is timed, and its result as an array of float32 or, of kind "integer", whole numbers."""

    run: Callable[[], object]
    result: Callable[[], NDArray[Any]]
    prepare: Callable[[], object] | None = None


def contenders(quantized: Quantized, threads: int = 1) -> Iterator[Contender]:
    """Build and check the peers that are installed and can use so many threads.

    Raises
    ------
    WrongResult
        If one computes something else than it is compared for.
    """
    problem = quantized.problem
    for name, (kind, build, most_threads) in PEERS.items():
        if threads > most_threads:
            continue
        with contextlib.suppress(ImportError):
            call = build(quantized, threads)
            check(f"{name} at {problem.shape}", kind, call.result(), quantized)
            yield Contender(name, call.run, problem.operations, kind, call.prepare)


def check(name: str, kind: str, result: NDArray[Any], quantized: Quantized) -> None:
    """Make sure that a peer computes what it is compared for: sums exactly, layers to int8's precision.

    Raises
    ------
    WrongResult
        If it does not.
    """
    problem = quantized.problem
    rows = np.unique(np.linspace(0, len(problem.x) - 1, 8).astype(np.intp))
    if kind == "integer":
        exact = quantized.x[rows].astype(np.float64) @ quantized.weight.T.astype(np.float64)
        if not np.array_equal(result[rows], exact):
            raise WrongResult(f"{name}: sums differ from the exact ones")
        return
    product = problem.x[rows] @ problem.weight.T + problem.bias
    error = float(np.linalg.norm(result[rows] - product) / np.linalg.norm(product))
    if not error < 0.03:
        raise WrongResult(f"{name}: relative error {error:.3g}; an int8 layer has about 0.01")


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def torch_dynamic(quantized: Quantized, threads: int) -> Call:
    """PyTorch's dynamic int8 linear layer: FBGEMM on x86."""
    torch = import_module("torch")
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(name for name in ("fbgemm", "x86", "onednn", "qnnpack") if name in engines)
    zeros = torch.zeros(len(quantized.weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates quantized tensors, but has no other dynamic layer yet
        weight = torch._make_per_channel_quantized_tensor(
            torch.from_numpy(quantized.weight), torch.from_numpy(quantized.weight_scale).double(), zeros, 0
        )
    packed = torch.ops.quantized.linear_prepack(weight, torch.from_numpy(quantized.problem.bias))
    with torch.inference_mode():  # what is made here is outside of autograd, which then takes no time in a call
        x = torch.from_numpy(quantized.problem.x)
    run = partial(torch.ops.quantized.linear_dynamic, x, packed)
    return Call(run, lambda: np.asarray(run()), partial(torch.set_num_threads, threads))


def torch_static(quantized: Quantized, threads: int) -> Call:
    """PyTorch's linear layer of calibrated activations, codes to float32: oneDNN."""
    torch = import_module("torch")
    weight = torch.ops.onednn.qlinear_prepack(torch.from_numpy(quantized.weight), list(quantized.x.shape))
    with torch.inference_mode():
        x = torch.from_numpy(quantized.x)
    run = partial(
        torch.ops.onednn.qlinear_pointwise, x, quantized.x_scale, quantized.x_zero,
        weight, torch.from_numpy(quantized.weight_scale), torch.zeros(len(quantized.weight), dtype=torch.int32),
        torch.from_numpy(quantized.problem.bias), 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return Call(run, lambda: np.asarray(run()), partial(torch.set_num_threads, threads))


def onnxruntime_dynamic(quantized: Quantized, threads: int) -> Call:
    """ONNX Runtime's DynamicQuantizeMatMul: what its optimiser makes of DynamicQuantizeLinear and MatMulInteger."""
    problem = quantized.problem
    constants: dict[str, NDArray[Any]] = {
        "w": np.ascontiguousarray(quantized.weight.T),
        "s": quantized.weight_scale,
        "z": np.zeros(len(problem.bias), np.int8),
        "b": problem.bias,
    }
    inputs = ("x", "w", "s", "z", "b")
    return bound_session(
        ("DynamicQuantizeMatMul", "com.microsoft"),
        inputs,
        constants,
        problem.x,
        np.float32,
        problem.output().shape,
        threads,
    )


def onnxruntime_integer(quantized: Quantized, threads: int) -> Call:
    """ONNX Runtime's MatMulInteger, uint8 times int8."""
    constants = {"w": np.ascontiguousarray(quantized.weight.T)}
    return bound_session(
        ("MatMulInteger", ""), ("x", "w"), constants, quantized.x, np.int32, quantized.problem.output().shape, threads
    )


def int4_contender(problem: Problem, config: QuantConfig, threads: int = 1) -> Contender:
    """Build and check ONNX Runtime's int4 layer: MatMulNBits, the same codes, activations as int8 (accuracy level 4).

    Raises
    ------
    ImportError
        If ONNX Runtime is not installed.
    WrongResult
        If it computes something else than it is compared for.
    """
    q = quantize_tensor(problem.weight, config)
    (n, k), size = problem.weight.shape, config.group_size
    assert size is not None and config.dtype == "int4" and k % size == 0 and k // size % 2 == 0
    nibbles = (q.codes + 8).astype(np.uint8)
    zeros = np.broadcast_to(q.zero_point + 8, q.scale.shape).astype(np.uint8)
    constants: dict[str, NDArray[Any]] = {
        "w": (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).reshape(n, k // size, size // 2),
        "s": np.asarray(q.scale, np.float32).reshape(-1),
        "z": (zeros[:, 0::2] | zeros[:, 1::2] << 4).reshape(-1),
        "b": problem.bias,
    }
    inputs = ("x", "w", "s", "z", "", "b")
    settings = {"K": k, "N": n, "bits": 4, "block_size": size, "accuracy_level": 4}
    operator = ("MatMulNBits", "com.microsoft")
    call = bound_session(operator, inputs, constants, problem.x, np.float32, (len(problem.x), n), threads, **settings)
    product = problem.x @ q.dequantize().T + problem.bias
    error = float(np.linalg.norm(call.result() - product) / np.linalg.norm(product))
    if not error < 0.03:
        raise WrongResult(f"MatMulNBits: relative error {error:.3g} to the product of the same codes")
    return Contender("ONNX Runtime int4", call.run, problem.operations, "int4", call.prepare)


def bound_session(
    operator: tuple[str, str], inputs: tuple[str, ...], constants: dict[str, NDArray[Any]], x: NDArray[Any],
    out_dtype: type, shape: tuple[int, ...], threads: int, **settings: int,
) -> Call:  # fmt: skip
    """Make a model of one node y = operator(x, constants ...), with x and y, of `shape`, bound to arrays that stay."""
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(operator[0], inputs, ["y"], domain=operator[1], **settings)],
        operator[0],
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(out_dtype)), shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # of one, it makes no pool at all
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    out: NDArray[Any] = np.zeros(shape, out_dtype)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(out))

    def result() -> NDArray[Any]:
        session.run_with_iobinding(binding)
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    return Call(partial(session.run_with_iobinding, binding), result)


def numkong_integer(quantized: Quantized, threads: int) -> Call:
    """NumKong's product of int8 by packed int8; it has no threads of its own."""
    numkong = import_module("numkong")
    packed = numkong.dots_pack(quantized.weight, dtype="int8")
    x = (quantized.x ^ 0x80).view(np.int8)  # codes less 128, signed
    shifted = 128 * quantized.weight.sum(axis=1, dtype=np.int64)
    out = numkong.zeros((len(x), len(quantized.weight)), dtype="int32")
    run = partial(numkong.dots_packed, x, packed, out=out)
    return Call(run, lambda: np.asarray(run()) + shifted)


#: Name: kind, how to make it ready, the most threads it can use.
PEERS: dict[str, tuple[str, Callable[[Quantized, int], Call], int]] = {
    "PyTorch dynamic": ("dynamic", torch_dynamic, 1 << 10),
    "PyTorch static": ("static", torch_static, 1 << 10),
    "ONNX Runtime dynamic": ("dynamic", onnxruntime_dynamic, 1 << 10),
    "ONNX Runtime integer": ("integer", onnxruntime_integer, 1 << 10),
    "NumKong integer": ("integer", numkong_integer, 1),
}
