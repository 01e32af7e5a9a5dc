"""Arrays of every nature for every public function that takes one.

The result of the plain array, or an error that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qnative as qn

ROWS, COLUMNS = 12, 20
UINT8 = qn.QuantConfig("uint8").asymmetric()

Taker = Callable[[Any], Any]


def observed(method: str, x: Any) -> list[Any]:
    observer = qn.make_observer(method)
    observer.observe(x)
    qparams = observer.qparams(UINT8)
    return [qparams.scale, qparams.zero_point]


def calibrated(x: Any) -> list[Any]:
    spec = qn.calibrate_model({"a": [x]}, method="min_max")["a"]
    return [spec.qparams.scale, spec.qparams.zero_point]


def trained(x: Any) -> list[Any]:
    fake = qn.FakeQuantize(qn.FakeQuantConfig(qn.QuantConfig.int8(), observer="min_max", learnable=True))
    return [fake(x), fake.backward(x), fake.grads["scale"]]


def trained_layer(x: Any) -> list[Any]:
    config = qn.FakeQuantConfig(qn.QuantConfig.int8(), observer="min_max")
    layer = qn.QATLinear(np.eye(7, COLUMNS, dtype=np.float32), None, weight=config, activation=config)
    return [layer(x)]


PLAIN = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
LAYERS = {
    form: qn.QuantizedLinear.from_float(np.random.default_rng(2).standard_normal((9, COLUMNS)).astype(np.float32), None,
                                        qn.QuantConfig.int8_per_channel(), form)
    for form in ("dynamic", "dynamic_symmetric", "float")
}  # fmt: skip

#: Every public function that takes an array of floats.
TAKERS: dict[str, Taker] = {
    "quantize": lambda x: [qn.quantize(x, 0.02)],
    "quantize along an axis": lambda x: [qn.quantize(x, np.linspace(0.01, 0.1, COLUMNS), axis=1)],
    "quantize into int4": lambda x: [qn.quantize(x, 0.2, dtype="int4")],
    "fake_quantize": lambda x: [qn.fake_quantize(x, 0.02)],
    "encode": lambda x: [qn.encode(x, "float8_e4m3fn"), qn.encode(x, "bfloat16")],
    "quantize_tensor int8": lambda x: [qn.quantize_tensor(x, qn.QuantConfig.int8_per_channel()).dequantize()],
    "quantize_tensor int4": lambda x: [qn.quantize_tensor(x, qn.QuantConfig.int4_per_group(8)).data],
    "quantize_tensor fp8": lambda x: [qn.quantize_tensor(x, qn.QuantConfig.fp8()).data],
    "QuantizedLinear.from_float": lambda w: [qn.QuantizedLinear.from_float(w, w[:, 0])(PLAIN)],
    "quantize_model": lambda w: [qn.quantize_model({"a.weight": w, "a.bias": w[:, 0]})["a"](PLAIN)],
    "FakeQuantize": trained,
    "QATLinear": trained_layer,
    "calibrate_model": calibrated,
    **{f"layer {form}": (lambda x, layer=layer: [layer(x)]) for form, layer in LAYERS.items()},
    **{
        f"observer {method}": (lambda x, method=method: observed(method, x))
        for method in ("min_max", "moving_average", "percentile", "mean_std", "kl", "mse")
    },
}


class Subclass(np.ndarray[Any, Any]):
    """Whose operations are nobody's business here."""

    def __array_finalize__(self, other: object) -> None:
        self.tag = getattr(other, "tag", None)

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a subclass's own operations must not be called")


def unaligned(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    y = memory[1:].view(x.dtype).reshape(x.shape)
    y[:] = x
    return y


def frozen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    y = x.copy()
    y.flags.writeable = False
    return y


def mapped(x: np.ndarray[Any, Any], folder: Path) -> Any:
    path = folder / "x.raw"
    path.write_bytes(b"odd" + x.tobytes())
    return np.memmap(path, x.dtype, "r", 3, x.shape)


#: The same numbers, held in another way.
NATURES: dict[str, Callable[[np.ndarray[Any, Any], Path], Any]] = {
    "read-only": lambda x, folder: frozen(x),
    "unaligned": lambda x, folder: unaligned(x),
    "Fortran order": lambda x, folder: np.asfortranarray(x),
    "negative strides": lambda x, folder: x[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda x, folder: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "strides of no whole elements": lambda x, folder: np.ndarray(
        x.shape,
        x.dtype,
        np.pad(x.view(np.uint8).reshape(len(x), -1), ((0, 0), (0, 3))).tobytes(),
        0,
        (x.shape[1] * 4 + 3, 4),
    ),
    "big-endian": lambda x, folder: x.astype(">f4"),
    "memory-mapped": mapped,
    "a subclass": lambda x, folder: x.view(np.memmap) if x.size == 0 else x.copy().view(Subclass),
}


def same(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("nature", NATURES)
@pytest.mark.parametrize("taker", TAKERS)
def test_the_result_is_that_of_the_plain_array(taker: str, nature: str, tmp_path: Path) -> None:
    x = NATURES[nature](PLAIN, tmp_path)
    before = np.array(np.asarray(x))
    same(TAKERS[taker](x), TAKERS[taker](PLAIN))
    assert np.array_equal(np.asarray(x), before), "the argument is the caller's"


REFUSED: dict[str, Any] = {
    "masked": np.ma.MaskedArray(PLAIN, PLAIN > 1),
    "complex": PLAIN.astype(np.complex64),
    "objects": PLAIN.astype(object),
    "text": PLAIN.astype("U8"),
    "dates": np.zeros((ROWS, COLUMNS), "M8[s]"),
    "records": np.zeros((ROWS, COLUMNS), "f4,i4"),
    "booleans": PLAIN > 0,
    "None": None,
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_array_of_floats_is_refused(taker: str, what: str) -> None:
    if taker == "quantize_model" and what not in ("masked", "None"):
        pytest.skip("keeps what is no float as it is")
    with pytest.raises((TypeError, ValueError)) as caught:
        TAKERS[taker](REFUSED[what])
    assert len(str(caught.value)) > 20, "the message says what is wrong"


CODES = PLAIN.astype(np.int8)


def observer_with(dimensions: Any) -> Any:
    observer = qn.make_observer("min_max", axis=1)
    observer.observe(PLAIN)
    observer.load_state_dict(observer.state_dict() | {"dimensions": dimensions})
    return observer.qparams(qn.QuantConfig.int8_per_channel(-1))


def groups_with(ends: Any) -> None:
    fake = qn.FakeQuantize(qn.FakeQuantConfig(qn.QuantConfig.int4_per_group(4), observer="moving_average"))
    fake(PLAIN)
    state = fake.state_dict()
    state["observer"]["ends"] = ends
    fake.load_state_dict(state)


NO_AXIS = (True, 1.0, "1", 2**70, -3, np.float32(1), np.array([1]))
WRONG: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    **{f"axis {a!r}": (lambda a=a: qn.quantize(PLAIN, np.ones(COLUMNS), axis=a), ValueError) for a in NO_AXIS},
    **{f"axis {a!r} of groups": (lambda a=a: qn.dequantize(CODES, 1.0, axis=a, group_size=3), ValueError)
       for a in NO_AXIS},
    **{f"group size {g!r}": (lambda g=g: qn.fake_quantize(PLAIN, 1.0, group_size=g), ValueError)
       for g in (True, 0, -1, 1.5, "8")},
    "scale dtype that is no name": (lambda: qn.QuantConfig.int8().with_scale_dtype(np.dtype("float16")), ValueError),
    "config of None": (lambda: qn.qparams_from_range(0.0, 1.0, None), TypeError),
    "qparams that are text": (lambda: qn.quantize_tensor(PLAIN, qparams="dynamic"), TypeError),
    "an array as an observer's state": (lambda: qn.make_observer("min_max").load_state_dict(PLAIN), TypeError),
    "a number as a layer's state": (lambda: qn.QATLinear(PLAIN, None).load_state_dict(1), TypeError),
    **{f"dimensions {d!r} in an observer's state": (lambda d=d: observer_with(d), ValueError)
       for d in ([0], [-3], [1.5], [np.inf], "12", 5)},
    **{f"ends {e} of groups": (lambda e=e: groups_with(e), ValueError)
       for e in ([1, 2], [[1.0, 2.0], [1.0]], [[np.nan], [1.0]], [[0.0], [np.inf]], [[2.0], [1.0]])},
    "an array as a state": (lambda: qn.FakeQuantize().load_state_dict(PLAIN), TypeError),
    "an array as parameters": (
        lambda: qn.FakeQuantize().load_state_dict(qn.FakeQuantize().state_dict() | {"params": PLAIN}), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_of_another_kind_is_refused_with_a_reason(what: str) -> None:
    call, error = WRONG[what]
    with pytest.raises(error) as caught:
        call()
    assert len(str(caught.value)) > 20


def test_an_axis_of_any_integer_type() -> None:
    scale = np.linspace(0.01, 0.1, COLUMNS)
    for axis in (np.uint8(1), np.int64(-1), -1):
        same([qn.quantize(PLAIN, scale, axis=axis)], [qn.quantize(PLAIN, scale, axis=1)])


def trained_into(step: int, out: Any) -> Any:
    fake = qn.FakeQuantize(qn.FakeQuantConfig(qn.QuantConfig.int8(), observer="min_max"))
    return fake(PLAIN, out=out) if step == 0 else (fake(PLAIN), fake.backward(PLAIN + 1, out=out))[1]


#: Every public function that writes to an array of the caller's, with the dtype that it writes.
WRITERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "quantize": (np.int8, lambda out: qn.quantize(PLAIN, 0.02, out=out)),
    "dequantize": (np.float32, lambda out: qn.dequantize(CODES, 0.1, out=out)),
    "fake_quantize": (np.float32, lambda out: qn.fake_quantize(PLAIN, 0.02, out=out)),
    "encode": (np.uint8, lambda out: qn.encode(PLAIN, "float8_e4m3fn", out=out)),
    "decode": (np.float32, lambda out: qn.decode(CODES.view(np.uint8), "float8_e4m3fn", out=out)),
    "FakeQuantize": (np.float32, lambda out: trained_into(0, out)),
    "backward": (np.float32, lambda out: trained_into(1, out)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_out_of_a_subclass_is_written_to_as_a_plain_one(writer: str) -> None:
    dtype, write = WRITERS[writer]
    expected = write(None)
    for kind in (np.matrix, np.memmap, np.ndarray):
        out = np.zeros((ROWS, COLUMNS), dtype).view(kind)
        assert write(out) is out
        same([np.asarray(out)], [expected])


@pytest.mark.parametrize("writer", WRITERS)
def test_out_that_would_hide_the_result_is_refused(writer: str) -> None:
    dtype, write = WRITERS[writer]
    with pytest.raises(TypeError, match="out is a masked array"):
        write(np.ma.MaskedArray(np.zeros((ROWS, COLUMNS), dtype), PLAIN > 0))


def test_noise_without_bounds() -> None:
    assert qn.sqnr(PLAIN, np.full_like(PLAIN, np.inf)) == -np.inf


@pytest.mark.parametrize("shape", [(0, COLUMNS), (0, 0, COLUMNS), (3, 0, COLUMNS)])
@pytest.mark.parametrize("form", LAYERS)
def test_no_rows(form: str, shape: tuple[int, ...]) -> None:
    y = LAYERS[form](np.zeros(shape, np.float32))
    assert y.shape == (*shape[:-1], 9)


@pytest.mark.parametrize(
    "taker",
    ["quantize", "quantize into int4", "fake_quantize", "encode", "quantize_tensor int8", "quantize_tensor fp8"],
)
def test_no_elements(taker: str) -> None:
    for array in TAKERS[taker](np.zeros((0, COLUMNS), np.float32)):
        assert array.size == 0
