"""Calibration: the same answer serially, in threads, in processes and over shards; and never worse than min-max."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_fake_quant import import_torch

from qnative.calibration import (
    CalibrationDataset,
    Calibrator,
    LayerCalibration,
    QuantizationSpec,
    calibrate_layer,
    calibrate_model,
)
from qnative.config import ObserverMethod, QParams, QuantConfig, qparams_from_range
from qnative.elementwise import fake_quantize, sqnr
from qnative.linear import QuantizedLinear
from qnative.observers import make_observer
from qnative.output_error import OutputError
from qnative.tensor import quantize_tensor
from qnative.work import map_ordered

METHODS = [m.value for m in ObserverMethod]
UINT8 = QuantConfig("uint8", "asymmetric")


def layers(count: int = 4) -> dict[str, list[NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return {
        f"layer{i}": [rng.laplace(size=(50, 8)).astype(np.float32) * 2.0**i for _ in range(3)] for i in range(count)
    }


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(params=["threads", "processes"])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "processes":
        yield request.getfixturevalue("processes")
    else:
        with ThreadPoolExecutor(2) as executor:
            yield executor


def batches_of_the_module() -> list[NDArray[np.float32]]:
    return layers(1)["layer0"]


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_an_array_is_cut_along_its_first_axis() -> None:
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    dataset = CalibrationDataset(x, batch_size=4)
    assert [b.shape for b in dataset] == [(4, 2), (4, 2), (2, 2)] and len(dataset) == 3
    np.testing.assert_array_equal(np.concatenate(list(dataset)), x)
    assert [b.shape for b in CalibrationDataset(x)] == [(10, 2)] and len(CalibrationDataset(x)) == 1


def test_an_array_given_for_batches_is_one_batch_and_not_its_rows() -> None:
    """Iterating an array gives rows: a moving average over those would be another answer."""
    x = np.random.default_rng(1).standard_normal((5, 7))
    spec = calibrate_layer(x, method="moving_average")
    assert spec.qparams == qparams_from_range(x.min(), x.max(), UINT8)


@pytest.mark.parametrize(
    "source",
    [batches_of_the_module(), batches_of_the_module, tuple(batches_of_the_module())],
    ids=["list", "function", "tuple"],
)
def test_datasets_can_be_gone_through_again_and_pickled(source: Any) -> None:
    dataset = CalibrationDataset(source)
    copy = pickle.loads(pickle.dumps(dataset))
    for one in (dataset, dataset, copy):
        np.testing.assert_array_equal(np.stack(list(one)), np.stack(batches_of_the_module()))


def test_a_generator_is_gone_through_once_and_says_so() -> None:
    dataset = CalibrationDataset(b for b in batches_of_the_module())
    assert not dataset.reiterable
    assert len(list(dataset)) == 3
    with pytest.raises(RuntimeError, match="one-shot iterator"):
        list(dataset)
    with pytest.raises(TypeError, match="one-shot iterator"):
        pickle.dumps(dataset)
    with pytest.raises(TypeError):
        len(dataset)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_memory_mapped_array_is_read_piece_by_piece_and_sent_by_name(tmp_path: Path, order: str) -> None:
    x = np.random.default_rng(2).standard_normal((1000, 300)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.asarray(x, order=order))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for dataset in (CalibrationDataset(mapped, 64), CalibrationDataset(tmp_path / "x.npy", 64)):
        sent = pickle.dumps(dataset)
        assert len(sent) < 2000
        assert len(dataset) == 16
        received = pickle.loads(sent)
        assert all(isinstance(batch, np.memmap) for batch in received)
        np.testing.assert_array_equal(np.concatenate(list(received)), x)
    raw = np.memmap(tmp_path / "raw", np.float32, "w+", 64, (3, 5))
    raw[...] = 7.0
    raw.flush()
    assert next(iter(pickle.loads(pickle.dumps(CalibrationDataset(raw))))).tolist() == [[7.0] * 5] * 3


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_part_of_a_map_goes_by_name_where_it_lies_in_one_piece(tmp_path: Path, order: str) -> None:
    x = np.random.default_rng(2).standard_normal((60, 500)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.asarray(x, order=order))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    raw = np.memmap(tmp_path / "raw", np.float32, "w+", 12, (30, 1000))
    raw[...] = x.reshape(30, 1000)
    some = mapped[7:] if order == "C" else mapped[:, 7:]
    for view in (
        some,
        some[1:] if order == "C" else some[:, 1:],
        mapped.T,
        np.asarray(mapped),
        raw[3:].reshape(-1, 50),
    ):
        sent = pickle.dumps(CalibrationDataset(view))
        assert len(sent) < 1000
        (received,) = pickle.loads(sent)
        assert isinstance(received, np.memmap)
        np.testing.assert_array_equal(received, view)
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed[5] = 77.0  # in memory alone
    for view in (mapped[::2], mapped[::-1], mapped[3:4, 5:6][:0], changed, changed[5:], np.array(x, subok=True)):
        (received,) = pickle.loads(pickle.dumps(CalibrationDataset(view)))
        np.testing.assert_array_equal(received, view)


def test_a_path_is_sent_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.float32([1.0]))
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(CalibrationDataset("x.npy"))
    monkeypatch.chdir("/")
    assert [batch.tolist() for batch in pickle.loads(sent)] == [[1.0]]


def test_files_that_are_no_array_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "several.npz", a=np.ones(3), b=np.ones(2))
    np.save(tmp_path / "number.npy", np.float32(3.0))
    np.save(tmp_path / "objects.npy", np.array([None]))
    (tmp_path / "raw").write_bytes(b"12345678")
    for name, batch_size, error, remedy in (
        ("several.npz", None, TypeError, r"several arrays.*\[name\]"),
        ("number.npy", 4, ValueError, "first axis"),
        ("objects.npy", None, ValueError, "no .npy file of numbers"),
        ("raw", None, ValueError, r"raw is no .npy file.*np.memmap"),
        ("absent.npy", None, FileNotFoundError, "absent"),
    ):
        with pytest.raises(error, match=remedy):
            calibrate_layer(CalibrationDataset(tmp_path / name, batch_size))


@pytest.mark.parametrize(
    "batch",
    [
        [np.ones((3, 2)), np.ones(3)],  # as a loader of training data gives inputs and targets
        {"input": np.ones(3)},
        "x.npy",
        np.array([None]),
    ],
    ids=["pair", "mapping", "path", "objects"],
)
def test_a_batch_that_is_not_one_array_is_refused_and_the_error_tells_which(batch: Any) -> None:
    for executor in (None, Recording()):
        with pytest.raises(TypeError, match=f"a {type(batch).__name__}; .* pick that") as caught:
            calibrate_layer([np.ones(3), batch], executor=executor)
        assert caught.value.__notes__ == ["at batch 1 (counted from 0)"]
    assert calibrate_layer([[1.0, 3.0], (0.0, -2.0)], method="min_max").qparams == qparams_from_range(-2.0, 3.0, UINT8)


def test_arguments_that_mean_nothing_are_refused_before_the_data_is_gone_through() -> None:
    def never() -> Iterator[Any]:
        raise AssertionError("the data was gone through")
        yield

    groups = QuantConfig.int4_per_group()
    for options, error, match in (
        ({"config": "uint8"}, TypeError, r"QuantConfig\('uint8'\)"),
        ({"config": groups}, ValueError, "not a group"),
        ({"executor": 4}, TypeError, "executor"),
        ({"method": "entropy"}, ValueError, "choose one of"),
        ({"percentile": 99.0}, TypeError, "no option 'percentile'"),
    ):
        with pytest.raises(error, match=match):
            calibrate_layer(never, **options)
        with pytest.raises(error, match=match):
            calibrate_model({"a": never}, **options)
    with pytest.raises(TypeError, match="mapping"):
        calibrate_model([np.ones(3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a group"):
        Calibrator(groups)
    for bad in ({"config": "uint8"}, {"weight_config": "int8"}):
        with pytest.raises(TypeError, match="QuantConfig"):
            Calibrator(**bad)
    assert Calibrator(weight_config=groups).weight_config == groups


def test_bad_datasets_are_refused() -> None:
    for source, options, error in (
        (3.0, {}, TypeError),
        ([np.ones(2)], {"batch_size": 2}, ValueError),
        (np.ones(2), {"batch_size": 0}, ValueError),
        (np.float32(2.0)[...], {"batch_size": 2}, ValueError),
        (np.ones(2), {"batch_size": 1.5}, ValueError),
    ):
        with pytest.raises(error):
            CalibrationDataset(source, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Specifications


def test_specs_survive_json_and_pickle() -> None:
    for config in (UINT8, QuantConfig.int8_per_channel(axis=1)):
        spec = calibrate_layer(batches_of_the_module(), config, "percentile", name="encoder.0", percentile=99.0)
        assert (spec.name, spec.method) == ("encoder.0", "percentile")
        assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert pickle.loads(pickle.dumps(spec)) == spec
    fields = spec.to_dict()
    assert fields["output_aware"] is False
    for bad in ({**fields, "extra": 1}, {"name": "x"}, {**fields, "method": "best"}):
        with pytest.raises(ValueError):
            QuantizationSpec.from_dict(bad)
    with pytest.raises(TypeError):
        QuantizationSpec("x", 1.0, "kl")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# One layer


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_gets_what_its_observer_says(method: str) -> None:
    batches = batches_of_the_module()
    observer = make_observer(method)
    for batch in batches:
        observer.observe(batch)
    assert calibrate_layer(batches, method=method).qparams == observer.qparams(UINT8)
    config = QuantConfig.int8()
    assert calibrate_layer(iter(batches), config, method).qparams == observer.qparams(config)


@pytest.mark.parametrize("method", METHODS)
def test_shards_of_a_layer_on_an_executor_give_the_answer_of_one(method: str, pool: Executor) -> None:
    rng = np.random.default_rng(3)
    batches = [rng.standard_normal(500) * 4.0**i for i in range(9)]
    spread = calibrate_layer(batches, method=method, executor=pool)
    alone = calibrate_layer(batches, method=method)
    assert spread == alone


def test_no_data_and_bad_data_are_refused() -> None:
    with pytest.raises(RuntimeError, match="call observe"):
        calibrate_layer([])
    dirty = [np.float32([1.0, np.nan, -2.0])]
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        calibrate_layer(dirty)
    spec = calibrate_layer(dirty, method="min_max", nonfinite="skip")
    assert spec.qparams == qparams_from_range(-2.0, 1.0, UINT8)
    with pytest.raises(TypeError, match="no option 'sigma'"):
        calibrate_layer(dirty, method="kl", sigma=2.0)


def output_error(x: NDArray[Any], qparams: QParams, weight: NDArray[Any]) -> float:
    codes_range = {"quant_min": qparams.quant_min, "quant_max": qparams.quant_max}
    error = fake_quantize(x, qparams.scale, qparams.zero_point, qparams.dtype, **codes_range) - x
    return float(np.square((error @ weight.T).astype(np.float64)).sum())


def outlier_case() -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Rare large values in one column: all that this layer looks at."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((4, 500, 16)).astype(np.float32)
    x[:, ::100, 3] *= 50.0
    weight = rng.standard_normal((8, 16)).astype(np.float32) * 0.01
    weight[:, 3] = 1.0
    return list(x), weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [UINT8, QuantConfig.int8(), QuantConfig.int4()], ids=str)
def test_output_aware_is_never_worse_than_min_max(method: str, config: QuantConfig) -> None:
    batches, weight = outlier_case()
    plain = calibrate_layer(batches, config, "min_max").qparams
    asked = calibrate_layer(batches, config, method).qparams
    spec = calibrate_layer(batches, config, method, weight)
    every = np.concatenate(batches)
    assert output_error(every, spec.qparams, weight) <= output_error(every, plain, weight)
    assert output_error(every, spec.qparams, weight) <= output_error(every, asked, weight)
    assert spec.method in (method, "min_max")
    if not spec.output_aware:
        assert spec.qparams == (plain if spec.method == "min_max" else asked)


def test_output_aware_rescues_a_layer_that_lives_on_outliers_and_keeps_a_good_answer() -> None:
    batches, weight = outlier_case()
    assert calibrate_layer(batches, method="kl").method == "kl"
    unaware = calibrate_layer(batches, method="kl", weight=weight, output_aware=False)
    assert (unaware.method, unaware.output_aware) == ("kl", False)
    every = np.concatenate(batches)
    rescued = calibrate_layer(batches, method="kl", weight=weight)
    assert rescued.method == "min_max"
    assert output_error(every, rescued.qparams, weight) < 0.01 * output_error(every, unaware.qparams, weight)
    quantized = quantize_tensor(weight, QuantConfig.int8_per_channel())
    assert calibrate_layer(batches, QuantConfig.int4(), "mse", quantized).qparams.scale > 0
    # Where nothing is to be gained the plain answer is given, and is called that.
    exact = [np.float32([[0.0, 255.0], [128.0, 3.0]])]
    spec = calibrate_layer(exact, method="kl", weight=np.float32([[1.0, 1.0]]))
    assert (spec.method, spec.output_aware) == ("min_max", False)
    assert spec.qparams == calibrate_layer(exact, method="min_max").qparams


@pytest.mark.parametrize("config", [UINT8, QuantConfig.int4(), QuantConfig("uint4", "asymmetric")], ids=str)
def test_output_aware_is_as_good_as_a_search_on_a_grid(config: QuantConfig) -> None:
    """The error of the output itself, for ends shrunk by all pairs of 30 factors, from no other code than NumPy's."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((400, 12)).astype(np.float32)
    x[::40, 3] = 12.0  # on one side only: the ends must be moved singly
    weight = rng.standard_normal((30, 12)).astype(np.float32)  # more outputs than inputs
    weight[:, 3] *= 0.01
    spec = calibrate_layer([x[:150], x[150:]], config, "min_max", weight)
    shrinks = np.exp2(-np.arange(0, 3.75, 0.125))
    pairs = [(s, s) for s in shrinks] if config.is_symmetric else [(s, t) for s in shrinks for t in shrinks]
    least = min(output_error(x, qparams_from_range(x.min() * s, x.max() * t, config), weight) for s, t in pairs)
    assert spec.output_aware
    assert output_error(x, spec.qparams, weight) < 1.02 * least
    assert output_error(x, spec.qparams, weight) < 0.9 * output_error(
        x, calibrate_layer([x], config, "min_max").qparams, weight
    )


def test_the_output_error_of_a_mapped_array_is_measured_piece_by_piece(tmp_path: Path) -> None:
    """One batch that would not fit: 64 MB as a whole, and a few hundred kB of temporaries."""
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1 << 18, 64))
    x[:] = np.random.default_rng(9).standard_normal(64).astype(np.float32)
    x[1000] *= 3.0
    weight = np.random.default_rng(10).standard_normal((200, 64)).astype(np.float32)
    q = [qparams_from_range(-3.0, 3.0, UINT8), qparams_from_range(-9.0, 9.0, QuantConfig.int8())]
    error = OutputError(weight, False)
    tracemalloc.start()
    found = error(x, q)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    np.testing.assert_allclose(found, [output_error(np.asarray(x), one, weight) for one in q], rtol=1e-4)
    channels = qparams_from_range(*np.stack([x[:2000].min(0), x[:2000].max(0)]), UINT8.per_channel(-1))
    small = np.asarray(x[:2000]).reshape(2, 1000, 64)
    alone = fake_quantize(small, channels.scale, channels.zero_point, "uint8", -1) - small
    np.testing.assert_allclose(error(small, [channels]), np.square(alone @ weight.T, dtype=np.float64).sum(), rtol=1e-4)


def test_output_aware_passes_over_scales_that_cannot_be_stored() -> None:
    """Half of this range has a scale that float16 cannot hold."""
    batches, weight = outlier_case()
    tiny = [batch * np.float32(1e-7) for batch in batches]
    amax = max(float(np.abs(batch).max()) for batch in tiny)
    config = QuantConfig("int8", scale_dtype="float16")
    tiny = [batch * np.float32(127 * 5e-8 / amax) for batch in tiny]
    plain = calibrate_layer(tiny, config, "min_max").qparams
    spec = calibrate_layer(tiny, config, "min_max", weight)
    every = np.concatenate(tiny)
    assert output_error(every, spec.qparams, weight) <= output_error(every, plain, weight)
    with pytest.raises(ValueError, match="underflows float16"):
        calibrate_layer([batch * np.float32(0.1) for batch in tiny], config, "min_max", weight)


def test_output_aware_says_what_it_needs() -> None:
    batches, weight = outlier_case()
    with pytest.raises(ValueError, match="weight="):
        calibrate_layer(batches, output_aware=True)
    with pytest.raises(ValueError, match="one-shot"):
        calibrate_layer(iter(batches), weight=weight)
    for bad in (weight[:, :5], weight[0]):
        with pytest.raises(ValueError, match="shape"):
            calibrate_layer(batches, weight=bad)
    with pytest.raises(ValueError, match="weight holds NaN"):
        calibrate_layer(batches, weight=weight * np.float32(np.nan))


def test_output_aware_with_skipped_values() -> None:
    batches, weight = outlier_case()
    clean = calibrate_layer(batches, method="mse", weight=weight)
    batches = [*batches, np.full((1, 16), np.nan, np.float32), np.full((1, 16), np.inf, np.float32)]
    assert calibrate_layer(batches, method="mse", weight=weight, nonfinite="skip") == clean


# ----------------------------------------------------------------------------------------------------------------------
# A model


class Recording(Executor):
    """An executor of nobody's: runs at once, and keeps what it was given."""

    def __init__(self) -> None:
        self.submitted: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append((fn, args, kwargs))
        future: Future[Any] = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(fn))(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("method", METHODS)
def test_every_executor_gives_the_serial_answer(method: str) -> None:
    data = layers(2)
    serial = calibrate_model(data, method=method)
    assert list(serial) == list(data) and all(serial[name].name == name for name in data)
    assert {(spec.qparams.dtype, spec.qparams.axis) for spec in serial.values()} == {("uint8", None)}
    recording = Recording()
    assert calibrate_model(data, method=method, executor=recording) == serial
    assert len(recording.submitted) == len(data)
    with ThreadPoolExecutor(3) as threads:
        assert calibrate_model(data, method=method, executor=threads) == serial


def test_a_process_pool_gives_the_serial_answer(tmp_path: Path, processes: Executor) -> None:
    data: dict[str, Any] = dict(layers())
    np.save(tmp_path / "x.npy", np.concatenate(data["layer1"]))
    data["mapped"] = CalibrationDataset(tmp_path / "x.npy", batch_size=50)
    data["function"] = batches_of_the_module
    weight = np.random.default_rng(6).standard_normal((3, 8)).astype(np.float32)
    options: dict[str, Any] = {"config": QuantConfig.int8(), "method": "percentile", "percentile": 99.0}
    weights = {"layer2": weight, "mapped": weight}
    serial = calibrate_model(data, **options, weights=weights)
    assert calibrate_model(data, **options, weights=weights, executor=processes) == serial
    assert serial["mapped"].qparams == calibrate_layer(data["layer1"], **options, weight=weight).qparams


def test_an_error_names_the_layer(processes: Executor) -> None:
    data = layers(4)
    data["layer1"] = [np.float32([np.nan])]
    for executor in (None, Recording(), processes):
        with pytest.raises(ValueError, match="NaN") as caught:
            calibrate_model(data, method="min_max", executor=executor)
        assert "while calibrating 'layer1'" in caught.value.__notes__
    with pytest.raises(TypeError, match="one-shot iterator"):
        calibrate_model({"a": iter(data["layer0"])}, executor=processes)


def test_work_is_submitted_a_bounded_number_ahead_in_order_and_cancelled_at_an_error() -> None:
    started, taken = [], []

    def work(i: int) -> int:
        started.append(i)
        if i == 3:
            raise KeyError(i)
        return i

    def items() -> Any:
        for i in range(100):
            taken.append(i)
            yield i

    results = []
    with ThreadPoolExecutor(2) as executor, pytest.raises(KeyError):
        for result in map_ordered(executor, work, items(), in_flight=4):
            results.append(result)
    assert results == [0, 1, 2]
    assert max(started) <= max(taken) <= 3 + 4
    assert list(map_ordered(None, work, [5, 4])) == [5, 4]


def test_progress_is_told_of_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    data, told = layers(3), []
    calibrate_model(data, method="min_max", progress=lambda *args: told.append(args))
    assert told == [(1, 3, "layer0"), (2, 3, "layer1"), (3, 3, "layer2")]
    calibrate_model(data, method="min_max", progress=True)
    assert "3/3" in capsys.readouterr().err
    with pytest.raises(TypeError, match="progress"):
        calibrate_model(data, progress="yes")  # type: ignore[arg-type]
    told.clear()
    calibrate_layer(data["layer0"], method="min_max", name="x", progress=lambda *args: told.append(args))
    assert told == [(1, 3, "x"), (2, 3, "x"), (3, 3, "x")]
    told.clear()
    weight = np.eye(8, dtype=np.float32)
    calibrate_layer(data["layer0"], method="mse", weight=weight, progress=lambda *args: told.append(args))
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1)) and len(told) >= 6
    assert {total for _, total, _ in told} == {None}, "how many passes there will be is not known"
    calibrate_model(data, method="min_max")
    assert capsys.readouterr() == ("", "")


def test_models_refuse_weights_of_unknown_layers() -> None:
    with pytest.raises(ValueError, match="'other'"):
        calibrate_model(layers(1), weights={"other": np.ones((1, 8))})
    with pytest.raises(ValueError, match="weight=") as caught:
        calibrate_model(layers(1), output_aware=True)
    assert caught.value.__notes__ == ["while calibrating 'layer0'"]
    assert calibrate_model({}) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Calibrator


def test_a_calibrator_records_weights_and_activations() -> None:
    weight = np.float32([[0.5, -2.0], [0.25, 0.125]])
    calibrator = Calibrator()
    calibrator.record_layer("both", weight)
    calibrator.record_layer("idle", weight)
    calibrator.record_activations("both", np.float32([[1.0, -3.0]]))
    calibrator.record_activations("both", np.float32([[9.0, 0.0], [0.0, 0.0]]))
    calibrator.record_activations("unweighted", np.zeros((0, 2), np.float32))
    found = calibrator.finish()
    assert list(found) == ["both", "idle", "unweighted"] and all(
        isinstance(f, LayerCalibration) for f in found.values()
    )
    both = found["both"]
    assert (both.weight_min, both.weight_max, both.activation_min, both.activation_max) == (-2.0, 0.5, -3.0, 9.0)
    np.testing.assert_array_equal(both.weight_scale, np.float32([2.0 / 127, 0.25 / 127]))
    assert (found["idle"].activation_min, found["idle"].activation_max, found["idle"].weight_max) == (None, None, 0.5)
    assert found["unweighted"].__dict__ == LayerCalibration().__dict__
    assert list(calibrator.specs()) == ["both"]
    per_tensor = Calibrator(weight_config=QuantConfig.int4())
    per_tensor.record_layer("w", weight)
    assert per_tensor.finish()["w"].weight_scale == np.float32(2.0 / 7)


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrator_answers_like_calibrate_model(method: str) -> None:
    data = layers(2)
    calibrator = Calibrator(QuantConfig.int8())
    for i in range(3):
        for name, batches in data.items():
            calibrator.record_activations(name, batches[i])
    assert calibrator.specs(method) == calibrate_model(data, QuantConfig.int8(), method)
    assert calibrator.specs("percentile", percentile=50.0) == calibrate_model(
        data, QuantConfig.int8(), "percentile", percentile=50.0
    )


def test_watched_layers_record_what_they_are_called_with() -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((4, 6)).astype(np.float32)
    layer = QuantizedLinear.from_float(weight)
    calibrator = Calibrator()
    watched = calibrator.watch("fc", layer)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    np.testing.assert_array_equal(watched(x), layer(x))
    out = np.empty((5, 4), np.float32)
    assert watched(x, out=out) is out
    assert watched.in_features == 6  # type: ignore[attr-defined]
    found = calibrator.finish()["fc"]
    assert (found.activation_min, found.activation_max) == (x.min(), x.max())
    np.testing.assert_allclose(found.weight_scale, np.abs(weight).max(axis=1) / 127, rtol=1e-5)
    calibrator.watch("plain", lambda x: x)(x)
    assert calibrator.finish()["plain"].weight_min is None
    assert pickle.loads(pickle.dumps(watched)).in_features == 6


def test_layers_called_from_many_threads_are_recorded_whole() -> None:
    calibrator = Calibrator()
    watched = calibrator.watch("fc", lambda x: x)
    x = np.random.default_rng(8).standard_normal(3000).astype(np.float32)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(watched, [x] * 64))
    collector = calibrator._collectors["fc"]
    assert collector.count == 64 * 3000
    reference = make_observer("kl")
    for _ in range(64):
        reference.observe(x)
    np.testing.assert_array_equal(
        collector.state_dict()["histogram.counts"], reference.state_dict()["histogram.counts"]
    )


def test_calibrators_of_shards_merge_into_one() -> None:
    data, weight = layers(2), np.float32([[1.0, -1.0]])
    parts = []
    for i in range(3):
        part = Calibrator()
        part.record_layer("layer0", weight)
        for name, batches in data.items():
            if (i, name) != (0, "layer1"):
                part.record_activations(name, batches[i])
        parts.append(pickle.loads(pickle.dumps(part)))
    parts[0].record_activations("layer1", data["layer1"][0])
    total = parts[2].merge(parts[0]).merge(parts[1])
    assert total.specs("kl") == calibrate_model(data)
    assert total.finish()["layer0"].weight_max == 1.0
    other = Calibrator()
    other.record_layer("layer0", weight * 2)
    with pytest.raises(ValueError, match="not the same"):
        total.merge(other)
    with pytest.raises(ValueError, match="configs"):
        total.merge(Calibrator(QuantConfig.int8()))


def test_a_merge_that_is_refused_changes_nothing() -> None:
    config = QuantConfig.int8_per_channel(axis=-1)
    one, other = Calibrator(config), Calibrator(config)
    for name in ("first", "second"):
        one.record_activations(name, np.ones((3, 2)))
    other.record_activations("first", np.ones((3, 2)))
    other.record_activations("second", np.ones((3, 3)))
    other.record_activations("third", np.ones((3, 3)))
    with pytest.raises(ValueError, match="3 channels into one of 2") as caught:
        one.merge(other)
    assert caught.value.__notes__ == ["while calibrating 'second'"]
    assert list(one.finish()) == ["first", "second"]
    assert [collector.count for collector in one._collectors.values()] == [6, 6]
    assert one._collectors["first"].qparams(config) == other._collectors["first"].qparams(config)
    assert one.merge(one)._collectors["first"].count == 12
    with pytest.raises(TypeError, match="Calibrator"):
        one.merge(one._collectors)  # type: ignore[arg-type]


def test_a_merge_brings_what_only_the_other_has() -> None:
    one, other = Calibrator(), Calibrator()
    one.record_activations("a", np.ones(3))
    other.record_activations("b", np.full(3, 2.0))
    other.record_layer("c", np.float32([[1.0, -3.0]]))
    found = one.merge(other).finish()
    assert list(found) == ["a", "b", "c"]
    assert (found["b"].activation_max, found["c"].weight_min) == (2.0, -3.0)
    assert list(one.specs("min_max")) == ["a", "b"]


def test_what_is_merged_into_a_calibrator_is_its_own() -> None:
    one, other = Calibrator(), Calibrator()
    other.record_activations("a", np.ones(3))
    one.merge(other)
    other.record_activations("a", np.full(3, 9.0))
    assert one.finish()["a"].activation_max == 1.0 and other.finish()["a"].activation_max == 9.0


def test_a_channel_without_a_finite_value_has_no_scale_and_the_others_have_ends() -> None:
    calibrator = Calibrator(QuantConfig.int8_per_channel(axis=-1), nonfinite="skip")
    calibrator.record_activations("a", np.array([[1.0, np.nan, -2.0]]))
    found = calibrator.finish()["a"]
    assert (found.activation_min, found.activation_max) == (-2.0, 1.0)
    with pytest.raises(RuntimeError, match="1 of its 3 channels") as caught:
        calibrator.specs()
    assert caught.value.__notes__ == ["while calibrating 'a'"]
    calibrator.record_activations("a", np.zeros((1, 3)))
    assert calibrator.specs()["a"].qparams.scale.shape == (3,)
    with pytest.raises(TypeError, match="percentil"):
        calibrator.specs("percentile", percentil=9.0)


def test_a_calibrator_skips_or_refuses_bad_values() -> None:
    dirty = np.float32([1.0, np.inf])
    with pytest.raises(ValueError, match="NaN or infinite"):
        Calibrator().record_activations("a", dirty)
    skipping = Calibrator(nonfinite="skip")
    skipping.record_activations("a", dirty)
    assert skipping.finish()["a"].activation_max == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# The document


def blocks_of_the_document() -> list[str]:
    document = Path(__file__).parents[1] / "docs" / "calibration.md"
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def test_what_the_document_shows_runs() -> None:
    """One block after the other; those for processes say so themselves, and are theirs to run."""
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in blocks_of_the_document():
        if "from distributed" not in block and "import torch" not in block:
            exec(block, namespace)
    assert namespace["y"].shape == (100, 64)
    assert set(namespace["specs"]) == {"ffn"}
    assert namespace["calibrator"].finish()["ffn"].activation_max == max(x.max() for x in namespace["batches"])


@pytest.mark.filterwarnings("default")
def test_what_the_document_shows_of_pytorch_runs() -> None:
    torch = import_torch()
    blocks = blocks_of_the_document()
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in (blocks[0], *(block for block in blocks if "import torch" in block)):
        exec(block, namespace)
    net, model = namespace["net"], namespace["model"]
    assert not any(layer._forward_pre_hooks for layer in net)
    assert namespace["calibrator"].finish()["0"].activation_max == max(x.max() for x in namespace["batches"])
    x = namespace["batches"][0]
    with torch.no_grad():
        hidden, exact = net[1](net[0](torch.from_numpy(x))).numpy(), net(torch.from_numpy(x)).numpy()
    assert sqnr(exact, model["2"](hidden)) > 30
    assert {layer.activations.dtype for layer in (model["0"], model["2"])} == {"uint8"}
