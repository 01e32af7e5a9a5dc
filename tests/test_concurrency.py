"""Interruptions, servers that fork, and the free-threaded interpreter.

The pool itself is test_threads.py's, soaking soak.py's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import python

import qnative as qn


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to itself")
def test_ctrl_c_between_and_during_calls() -> None:
    """KeyboardInterrupt comes through at the end of the call that it hits, and everything works as before."""
    assert (
        python("""
    import os, signal, threading, time
    import numpy as np, qnative as qn
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    w = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    layer, x = qn.QuantizedLinear.from_float(w), w[:64]
    expected, hits = layer(x).tobytes(), 0
    def shoot():
        for _ in range(20):
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
    shooter = threading.Thread(target=shoot)
    shooter.start()
    while shooter.is_alive():
        try:
            while shooter.is_alive():
                assert layer(x).tobytes() == expected
                qn.quantize_tensor(w, qn.QuantConfig.int4_per_group(32))
        except KeyboardInterrupt:
            hits += 1
    try:
        shooter.join()
    except KeyboardInterrupt:
        hits += 1
    assert layer(x).tobytes() == expected
    print(hits > 0)
    """)
        == "True"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_server_that_loads_first_and_forks_then(tmp_path: Path) -> None:
    """As gunicorn --preload does: the model is mapped and used in the parent, then in many children and threads."""
    assert (
        python(f"""
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")
    import numpy as np, qnative as qn
    rng = np.random.default_rng(0)
    path = {str(tmp_path / "m.safetensors")!r}
    qn.quantize_model({{"a.weight": rng.standard_normal((300, 256)).astype(np.float32)}}).save(path)
    qn.set_num_threads(3)
    model = qn.QuantizedModel.load(path, mmap=True)
    x = rng.standard_normal((40, 256)).astype(np.float32)
    expected = model["a"](x).tobytes()
    def serve():
        wrong = []
        def one():
            for _ in range(20):
                if model["a"](x).tobytes() != expected: wrong.append(1)
        threads = [threading.Thread(target=one) for _ in range(5)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        return wrong
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(len(serve()))
        children.append(child)
    assert not serve()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    print("served")
    """)
        == "served"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("busy", ["packs a layer", "records activations"])
def test_a_child_forked_while_another_thread(busy: str) -> None:
    """The thread that holds a lock is not in the child, which must not wait for it."""
    assert (
        python(f"""
    import os, signal, threading, time, warnings
    warnings.simplefilter("ignore")
    import numpy as np, qnative as qn
    from qnative.linear import QuantizedLinear
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model, calibrator = qn.quantize_model({{"a.weight": w, "b.weight": w}}), qn.Calibrator()
    within, go_on = threading.Event(), threading.Event()
    if {busy!r} == "packs a layer":
        pack = QuantizedLinear.from_tensor
        def slowly(*arguments, **settings):
            within.set(); go_on.wait()
            return pack(*arguments, **settings)
        QuantizedLinear.from_tensor = slowly
        thread = threading.Thread(target=lambda: model["a"])
    else:
        observe = qn.CalibrationCollector.observe
        def slowly(self, x):
            within.set(); go_on.wait()
            return observe(self, x)
        qn.CalibrationCollector.observe = slowly
        thread = threading.Thread(target=lambda: calibrator.record_activations("a", w))
    thread.start()
    within.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        go_on.set()
        model["a"](w); model["b"](w)
        calibrator.record_activations("b", w)
        os._exit(0)
    go_on.set()
    thread.join()
    print(os.waitpid(child, 0)[1])
    """)
        == "0"
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_handler_may_do_what_it_interrupts() -> None:
    """It runs on the thread that it interrupts, which may hold a lock."""
    assert (
        python("""
    import signal
    import numpy as np, qnative as qn, qnative.threads
    from qnative.linear import QuantizedLinear
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = qn.quantize_model({"a.weight": w})
    expected = qn.quantize_model({"a.weight": w})["a"](w)
    handled = []
    def handler(number, frame):
        handled.append(np.array_equal(model["a"](w), expected))
        qn.set_num_threads(3)
    signal.signal(signal.SIGUSR1, handler)
    signal.alarm(30)
    def interrupted(function):  # once
        left = [signal.SIGUSR1]
        def during(*arguments, **settings):
            if left: signal.raise_signal(left.pop())
            return function(*arguments, **settings)
        return during
    QuantizedLinear.from_tensor = interrupted(QuantizedLinear.from_tensor)
    assert np.array_equal(model["a"](w), expected) and handled.pop()
    qnative.threads._core.set_num_threads = interrupted(qnative.threads._core.set_num_threads)
    qn.set_num_threads(2)
    print(handled, qn.get_num_threads())
    """)
        == "[True] 2"
    )


def test_layers_of_many_threads_while_others_are_packed_and_dropped() -> None:
    rng = np.random.default_rng(0)
    w = [rng.standard_normal((48, 64)).astype(np.float32) for _ in range(8)]
    x = rng.standard_normal((5, 64)).astype(np.float32)
    expected = [qn.QuantizedLinear.from_float(each)(x).tobytes() for each in w]
    layers = [qn.QuantizedLinear.from_float(each) for each in w]
    wrong: list[int] = []

    def work(me: int) -> None:
        for i in range(60):
            at = (me + i) % 8
            if i % 5 == 0:
                layers[at] = qn.QuantizedLinear.from_float(w[at])  # the old one goes while others are in it
            if layers[at](x).tobytes() != expected[at]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_modules_declare_that_they_need_no_gil() -> None:
    """Where there is a free-threaded Python, importing qnative must not switch its GIL on."""
    found = next(filter(None, map(shutil.which, ("python3.14t", "python3.13t"))), None)
    if not found:
        setup = (Path(__file__).resolve().parents[1] / "setup.py").read_text(encoding="utf-8")
        assert '"freethreading_compatible": True' in setup
        pytest.skip("no free-threaded Python here to try it with")
    code = "import sys, qnative; print(sys._is_gil_enabled())"
    done = subprocess.run([found, "-c", code], capture_output=True, text=True)
    if "No module named" in done.stderr:
        pytest.skip(f"qnative is not built for {found}")
    assert done.stdout.strip() == "False", done.stderr
