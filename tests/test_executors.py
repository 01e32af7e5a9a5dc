"""Calibration on executors: one answer from all of them, bit for bit; and Ctrl-C is answered at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qnative
from qnative.calibration import CalibrationDataset, QuantizationSpec, calibrate_layer, calibrate_model
from qnative.config import ObserverMethod, QuantConfig
from qnative.work import map_ordered

# Dask, its sockets and its workers warn of this and that.
pytestmark = pytest.mark.filterwarnings("default")

METHODS = [m.value for m in ObserverMethod]
#: Seconds in which Ctrl-C is to be answered.
AT_ONCE = 0.3


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    """A cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'qnative[dask]'")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as threads:
            yield threads
    else:
        yield request.getfixturevalue(request.param)


def assert_same(one: QuantizationSpec, other: QuantizationSpec) -> None:
    """To the last bit of the scales."""
    assert one == other
    assert one.qparams.scale.tobytes() == other.qparams.scale.tobytes()


def test_every_executor_gives_the_bits_of_serial_work(executor: Executor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = [rng.laplace(size=(300, 4)).astype(np.float32) * 2.0**i for i in range(-3, 3)]
    weight = rng.standard_normal((9, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.concatenate(shards))
    data: dict[str, Any] = {
        "list": shards,
        "mapped": CalibrationDataset(np.load(tmp_path / "x.npy", mmap_mode="r"), batch_size=500),
    }
    four = QuantConfig.int4().asymmetric()  # KL has few levels to try then
    for method in METHODS:
        for config in (four, four.per_channel(-1)):
            alone = calibrate_layer(shards, config, method, name="x")
            assert_same(calibrate_layer(shards, config, method, name="x", executor=executor), alone)
        serial = calibrate_model(data, four, method)
        spread = calibrate_model(data, four, method, executor=executor)
        assert list(serial) == list(spread)
        for name in data:
            assert_same(spread[name], serial[name])
    alone = calibrate_layer(shards, method="mse", weight=weight)
    assert_same(calibrate_layer(shards, method="mse", weight=weight, executor=executor), alone)
    assert_same(calibrate_model({"": shards}, method="mse", weights={"": weight}, executor=executor)[""], alone)
    assert alone.output_aware


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C

# Interrupts by a timer of the process's own CPU time, so that it does not matter how busy the machine is.
OWN_WORK = """
import signal, sys, time
import numpy as np
import qnative as qn

what, path = sys.argv[1:]
rng = np.random.default_rng(0)
x = rng.standard_normal((1 << 16, 64)).astype(np.float32)
weight = rng.standard_normal((2048, 64)).astype(np.float32)
huge = np.memmap(path, np.float32, "w+", shape=(1 << 27, 64))  # 32 GiB of a file that takes no room
collector = qn.CalibrationCollector(axis=1)
collector.observe(x)
config = qn.QuantConfig("uint8", "asymmetric")


def endless(values):
    while True:
        yield values


def forever(function):
    while True:
        function()


WORK = {
    "batches": lambda: qn.calibrate_layer(endless(x), method="kl"),
    "channels": lambda: qn.calibrate_layer(endless(x), config.per_channel(1), "mse"),
    "float64": lambda: qn.calibrate_layer(endless(x.astype(np.float64)), method="mean_std"),
    "one huge batch": lambda: qn.calibrate_layer(huge, method="min_max"),
    "output error": lambda: qn.calibrate_layer([x] * 1000, method="min_max", weight=weight),
    "kl": lambda: forever(lambda: collector.qparams(config.per_channel(1), "kl")),
    "mse": lambda: forever(lambda: collector.qparams(config.per_channel(1), "mse")),
}
if what == "output error of a huge batch":  # observing is another case; this one is to reach the measuring
    from qnative.output_error import OutputError
    q = qn.qparams_from_range(-1.0, 1.0, config)
    WORK[what] = lambda: OutputError(weight, False)(huge, [q] * 16)


def interrupted(signum, frame):
    raise KeyboardInterrupt


signal.signal(signal.SIGPROF, interrupted)
late = 0.0
for after in (0.07, 0.13, 0.23):
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, after)
    try:
        WORK[what]()
    except KeyboardInterrupt:
        late = max(late, time.process_time() - start - after)
    else:
        sys.exit("was done before it could be interrupted")
print(late)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(qnative.__file__).parents[1]),
        "OPENBLAS_NUM_THREADS": "1",
        "QNATIVE_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of CPU time here")
@pytest.mark.parametrize(
    "what",
    [
        "batches",
        "channels",
        "float64",
        "one huge batch",
        "output error",
        "output error of a huge batch",
        "kl",
        "mse",
    ],
)
def test_ctrl_c_is_answered_at_once_in_own_work(what: str, tmp_path: Path) -> None:
    done = run(OWN_WORK, what, str(tmp_path / "huge"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < AT_ONCE, f"{what}: {float(done.stdout):.3f} s of work after Ctrl-C"


# A real SIGINT, to the whole process group as a terminal sends it, while workers are busy for a long time.
ON_EXECUTOR = """
import os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import qnative as qn


class Slow:
    def __call__(self):
        time.sleep(60)
        return []


if __name__ == "__main__":
    kind, whom = sys.argv[1:]
    if kind == "dask":
        from distributed import Client, LocalCluster
        cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50)
        executor = Client(cluster).get_executor()
    else:
        executor = {"processes": ProcessPoolExecutor, "threads": ThreadPoolExecutor}[kind](2)
        list(executor.map(abs, range(8)))  # the workers are there
    data = {str(i): qn.CalibrationDataset(Slow()) for i in range(200)}
    late = []
    for _ in range(3):
        sent = []

        def ctrl_c():
            time.sleep(0.5)
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT) if whom == "process" else os.killpg(0, signal.SIGINT)

        threading.Thread(target=ctrl_c, daemon=True).start()
        try:
            qn.calibrate_model(data, executor=executor)
        except KeyboardInterrupt:
            late.append(time.perf_counter() - sent[0])
        if whom == "group":
            break  # the workers are gone
    print(min(late), flush=True)
    os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
@pytest.mark.parametrize("whom", ["process", "group"])
@pytest.mark.parametrize("kind", ["threads", "processes", "dask"])
def test_ctrl_c_is_answered_at_once_while_an_executor_works(kind: str, whom: str, tmp_path: Path) -> None:
    if kind == "dask":
        pytest.importorskip("distributed", reason="Dask is not installed: pip install 'qnative[dask]'")
    script = tmp_path / "script.py"
    script.write_text(ON_EXECUTOR)
    environment = {**os.environ, "PYTHONPATH": str(Path(qnative.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), kind, whom],
        capture_output=True, text=True, env=environment, check=False, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL and done.stdout, done.stderr
    assert float(done.stdout) < AT_ONCE


class Never(Executor):
    """Begins nothing."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


@pytest.mark.skipif(os.name != "posix", reason="a signal to oneself")
def test_ctrl_c_cancels_what_has_not_begun_the_one_waited_for_too() -> None:
    executor = Never()

    def interrupt() -> None:
        while len(executor.futures) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(map_ordered(executor, abs, range(10), in_flight=4))
    assert len(executor.futures) == 4
    assert all(future.cancelled() for future in executor.futures)
