"""`FakeQuantize` against loops that move the same bytes, and PyTorch's fake quantization.

Operations are elements. The loops are NumPy's own compiled ones: a copy (4 bytes in, 4 out) for
forward, a copy and a sum of two arrays (8 in, 4 out) for forward and backward. Ours and the loops write into arrays
that were made before; PyTorch's autograd has no way to.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qnative as qn
from qnative.bench import OURS, Case, Contender, WrongResult
from tests import reference

Array = NDArray[np.float32]

CONFIGS = {
    "int8 per tensor": qn.QuantConfig.int8(),
    "uint8 per tensor, asymmetric": qn.QuantConfig("uint8").asymmetric(),
    "int8 per channel": qn.QuantConfig.int8_per_channel(),
    "int8 per channel of the last axis": qn.QuantConfig.int8_per_channel(-1),
    "int4 per group of 32": qn.QuantConfig.int4_per_group(32),
    "fp8 per tensor": qn.QuantConfig.fp8(),
}
SHORT = ("int8 per tensor", "int4 per group of 32")
COLUMNS = 4096


def data(size: int, seed: int) -> Array:
    """Make rows of Gaussian numbers."""
    return np.random.default_rng(seed).standard_normal((size // COLUMNS, COLUMNS), np.float32)


def ready(config: qn.QuantConfig, x: Array, learnable: bool) -> qn.FakeQuantize:
    """Make a FakeQuantize with its scale found (narrow enough that some of x is clipped)."""
    quantizer = qn.FakeQuantize(qn.FakeQuantConfig(config, learnable=learnable))
    quantizer.observe(x * np.float32(0.7))
    quantizer.initialize()
    return quantizer


def forward_case(name: str, config: qn.QuantConfig, size: int) -> Case:
    """Time the forward pass."""
    x, out, moved = data(size, 1), *(np.empty((size // COLUMNS, COLUMNS), np.float32) for _ in range(2))
    quantizer = ready(config, x, learnable=False)
    contenders = [
        Contender(OURS, lambda: quantizer(x, out=out), float(size), "ours"),
        Contender("copy", lambda: np.copyto(moved, x), float(size), "read"),
    ]
    with contextlib.suppress(ImportError):
        peer = torch_forward(quantizer, x)
        if peer is not None:
            contenders.append(Contender("PyTorch", peer, float(size), "dynamic"))

    def check() -> None:
        quantizer(x, out=out)
        check_forward(quantizer, x, out)

    return Case(name, check, contenders)


def training_case(name: str, config: qn.QuantConfig, size: int) -> Case:
    """Time a forward and a backward pass, scales (and zero points) learned."""
    x, dy = data(size, 1), data(size, 2)
    y, dx, moved = (np.empty_like(x) for _ in range(3))
    quantizer = ready(config, x, learnable=True)

    def ours() -> None:
        quantizer(x, out=y)
        quantizer.backward(dy, out=dx)

    def bytes_alone() -> None:
        np.copyto(moved, x)
        np.add(x, dy, out=moved)

    contenders = [
        Contender(OURS, ours, float(size), "ours"),
        Contender("copy and sum", bytes_alone, float(size), "read"),
    ]
    with contextlib.suppress(ImportError):
        peers = torch_training(quantizer, x, dy)
        contenders += [Contender(name, run, float(size), "dynamic") for name, run in peers.items()]

    def check() -> None:
        ours()
        check_forward(quantizer, x, y)
        check_backward(quantizer, x, dy, dx)

    return Case(name, check, contenders)


def few_rows(config: qn.QuantConfig, x: Array) -> slice:
    """Choose what the (slow) reference looks at: the last rows, or all where the scales' shape is that of all."""
    return slice(-64, None) if config.axis is None or (config.axis == -1 and config.group_size is None) else slice(None)


def check_forward(quantizer: qn.FakeQuantize, x: Array, y: Array) -> None:
    """Compare bits with the reference."""
    q, rows = quantizer.qparams, few_rows(quantizer.config.quant, x)
    where = (q.dtype, q.axis, q.group_size)
    codes = reference.quantize(x[rows], q.scale, q.zero_point, *where, q.quant_min, q.quant_max)
    expected = reference.dequantize(codes, q.scale, q.zero_point, *where)
    try:
        reference.assert_same_bits(y[rows], expected, repr(quantizer))
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def check_backward(quantizer: qn.FakeQuantize, x: Array, dy: Array, dx: Array) -> None:
    """Compare dx bit for bit and the scales' gradients to float32 rounding."""
    q = quantizer.qparams
    mode = str(quantizer.config.quant.mode)
    expected = reference.fake_quantize_backward(x, dy, q.scale, q.zero_point, q.dtype, mode, q.axis, q.group_size)
    try:
        reference.assert_same_bits(dx, expected.dx, repr(quantizer))
    except AssertionError as error:
        raise WrongResult(str(error)) from None
    for name, wanted, size in (
        ("scale", expected.ds, expected.ds_size),
        ("zero_point", expected.dz, expected.dz_size),
    ):
        if name in quantizer.grads:
            wrong = np.abs(quantizer.grads[name] - wanted) > np.abs(wanted) * 2.0**-24 + size * 2.0**-44
            if wrong.any():
                raise WrongResult(f"{quantizer!r}: {wrong.sum()} gradients of {name} are off")


def import_torch() -> Any:
    """Import PyTorch for one thread; ImportError where it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = import_module("torch")
    torch.set_num_threads(1)
    return torch


def torch_forward(quantizer: qn.FakeQuantize, x: Array) -> Callable[[], object] | None:
    """Prepare PyTorch's eager forward pass, where it has one for the config."""
    torch, q = import_torch(), quantizer.qparams
    if quantizer.config.quant.info.is_float or q.group_size is not None:
        return None
    given, limits = torch.from_numpy(x), (int(q.quant_min or 0), int(q.quant_max or 0))

    def run() -> object:
        with torch.inference_mode():
            if q.axis is None:
                return torch.fake_quantize_per_tensor_affine(given, float(q.scale), int(q.zero_point), *limits)
            scale, zero = torch.from_numpy(q.scale.copy()), torch.zeros(q.scale.shape, dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(given, scale, zero, q.axis % 2, *limits)

    return run


def torch_training(quantizer: qn.FakeQuantize, x: Array, dy: Array) -> dict[str, Callable[[], object]]:
    """Prepare PyTorch's forward and backward: its straight-through fake quantization, and its learnable one."""
    torch, q = import_torch(), quantizer.qparams
    if quantizer.config.quant.info.is_float or q.group_size is not None:
        return {}
    limits = int(q.quant_min or 0), int(q.quant_max or 0)
    given, gradient = torch.tensor(x, requires_grad=True), torch.from_numpy(dy)
    count = q.scale.size
    scale = torch.tensor(q.scale.reshape(count), requires_grad=True)
    zero = torch.tensor(np.broadcast_to(q.zero_point, (count,)).astype(np.float32), requires_grad=True)
    whole = zero.detach().int()

    def plain() -> None:
        given.grad = None
        if q.axis is None:
            y = torch.fake_quantize_per_tensor_affine(given, float(q.scale), int(q.zero_point), *limits)
        else:
            y = torch.fake_quantize_per_channel_affine(given, scale.detach(), whole, q.axis % 2, *limits)
        y.backward(gradient)

    def learnable() -> None:
        given.grad = scale.grad = zero.grad = None
        if q.axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(given, scale, zero, *limits, 1.0)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(given, scale, zero, q.axis % 2, *limits, 1.0)
        y.backward(gradient)

    return {"PyTorch": plain, "PyTorch learnable": learnable}
