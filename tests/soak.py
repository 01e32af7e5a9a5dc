"""Mixed calls from many threads for minutes.

No result ever different, no memory kept. And a leak test of every public call.

    python tests/soak.py --minutes 10 --threads 40

Each thread draws calls at random: layers of every kind (shared by all threads, some packed while others call them),
elementwise functions, observers, saving and loading, the number of threads changed meanwhile, errors that are raised on
purpose. Every result's digest is compared with that of the first time. Resident memory is looked at after a warm-up of
a tenth of the time and at the end, both times when all threads have ended.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import pickle
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import qnative as qn

CONFIGS = (
    qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int8_per_channel().asymmetric(), qn.QuantConfig.fp8(),
    qn.QuantConfig.int4_per_group(16), qn.QuantConfig.int8().per_group(32),
)  # fmt: skip
ROWS, COLUMNS = 96, 160

#: Half a second a call: called a tenth as often.
SLOW = {"observer kl"}
#: What caches fill with (the interpreter's free lists, at first a kilobyte for a load) comes to an end, and a leak does
#: not, so the least of so many batches of calls counts.
BATCHES = 3

Call = Callable[[], Any]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def resident_at_rest() -> int:
    """Without what the C library's allocator keeps for later, where it can be told to give that back."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


def calls(folder: Path) -> dict[str, Call]:
    """Every public call that computes, as functions without arguments that always give the same."""
    rng = np.random.default_rng(0)
    w, bias = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), rng.standard_normal(ROWS).astype(np.float32)
    x = {m: rng.standard_normal((m, COLUMNS)).astype(np.float32) for m in (1, 3, 17, 130)}
    codes = rng.integers(-128, 128, (50, 70)).astype(np.int8)
    uint8 = qn.QuantConfig("uint8").asymmetric()
    found: dict[str, Call] = {}
    for i, config in enumerate(CONFIGS):
        for form in ("dynamic", "dynamic_symmetric", "float"):
            layer = qn.QuantizedLinear.from_float(w, bias, config, form, activation=(None, "gelu", "relu")[i % 3])
            for m, rows in x.items():
                found[f"layer {i} {form} of {m} rows"] = lambda layer=layer, rows=rows: layer(rows)
        found[f"packing {i}"] = lambda config=config: qn.QuantizedLinear.from_float(w, bias, config)(x[3])
        found[f"tensor {i}"] = lambda config=config: qn.quantize_tensor(w, config).dequantize()
        tensor = qn.quantize_tensor(w, config)
        found[f"pickle {i}"] = lambda tensor=tensor: pickle.loads(pickle.dumps(tensor)).data
        found[f"codes {i}"] = lambda tensor=tensor: qn.dequantize_tensor(tensor)
    for dtype in ("int8", "uint8", "int4"):
        found[f"quantize {dtype}"] = lambda dtype=dtype: qn.quantize(w, 0.02, dtype=dtype)
        found[f"fake_quantize {dtype}"] = lambda dtype=dtype: qn.fake_quantize(w, 0.02, dtype=dtype)
    found["dequantize"] = lambda: qn.dequantize(codes, 0.1, dtype="int8")
    for name in ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"):
        found[f"encode {name}"] = lambda name=name: qn.encode(w, name)
        found[f"decode {name}"] = lambda name=name: qn.decode(qn.encode(w, name), name)

    def observed(method: str) -> Any:
        observer, other = qn.make_observer(method), qn.make_observer(method)
        observer.observe(w)
        if method != "moving_average":  # which has an order
            other.observe(x[17])
            observer.merge(other)
        qparams = observer.qparams(uint8)
        return np.array([qparams.scale, qparams.zero_point], np.float64)

    for method in ("min_max", "moving_average", "percentile", "mean_std", "kl", "mse"):
        found[f"observer {method}"] = lambda method=method: observed(method)

    def trained() -> Any:
        fake = qn.FakeQuantize(qn.FakeQuantConfig(qn.QuantConfig.int8(), observer="min_max", learnable=True))
        return fake(w) + fake.backward(w)

    found["fake quantize and back"] = trained
    params = {"a.weight": w, "a.bias": bias, "b.weight": w[:40], "norm": bias}
    shared = qn.quantize_model(params, qn.QuantConfig.int8_per_channel())
    found["quantize_model"] = lambda: qn.quantize_model(params, qn.QuantConfig.int4_per_group(32))["a"](x[3])
    found["shared model"] = lambda: shared["a"](x[17])
    number = iter(range(10**9))
    for suffix in (".safetensors", ".json"):
        common = folder / f"common{suffix}"
        shared.save(common)

        def saved(suffix: str = suffix) -> Any:
            path = folder / f"{threading.get_ident()}-{next(number)}{suffix}"
            shared.save(path)
            model = qn.QuantizedModel.load(path, mmap=True, verify=True)
            path.unlink()
            return model["b"](x[1])

        def loaded(common: Path = common) -> Any:
            shared.save(common)  # over what others are reading
            return qn.QuantizedModel.load(common, mmap=True)["a"](x[3])

        found[f"save and load {suffix}"] = saved
        found[f"load while it is saved {suffix}"] = loaded

    def refused() -> Any:
        wrong: tuple[Call, ...] = (
            lambda: qn.quantize(w, -1.0),
            lambda: qn.encode(w, "float7"),
            lambda: shared["nothing"],
            lambda: qn.QuantizedLinear.from_float(w, bias[:3], CONFIGS[0]),
            lambda: qn.QuantizedModel.load(bad),
        )
        for call in wrong:
            try:
                call()
            except (ValueError, KeyError, TypeError):
                continue
            raise AssertionError("a wrong call went through")
        return np.zeros(1)

    bad = folder / "bad.safetensors"
    bad.write_bytes(b'\x08\0\0\0\0\0\0\0{"a":0}}')
    found["refusals"] = refused

    def fewer_threads() -> Any:
        with qn.num_threads(1):
            return shared["a"](x[130])

    found["in a block of one thread"] = fewer_threads
    return found


def digest(value: Any) -> bytes:
    array = np.asarray(value)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).digest()


def soak(seconds: float, threads: int) -> dict[str, Any]:
    """Run the calls from many threads; returns the counts. AssertionError when a result differs."""
    with tempfile.TemporaryDirectory() as folder:
        every = calls(Path(folder))
        names = list(every)
        expected = {name: digest(call()) for name, call in every.items()}
        assert expected == {name: digest(call()) for name, call in every.items()}, (
            "calls do not even repeat on one thread"
        )
        failures, done, most = [], [0] * threads, 0

        def work(thread: int, end: float) -> None:
            rng = np.random.default_rng([thread, done[thread]])
            try:
                while time.monotonic() < end and not failures:
                    name = names[rng.integers(len(names))]
                    if digest(every[name]()) != expected[name]:
                        failures.append(f"{name}: another result")
                    if thread == 0:
                        qn.set_num_threads(int(rng.integers(1, 5)))
                    done[thread] += 1
            except BaseException as error:
                failures.append(f"{name}: {error!r}")
                raise

        def resident_after(seconds: float) -> int:
            """At rest, as it is compared with the same: calls under way hold more than a leak would for long."""
            nonlocal most
            end = time.monotonic() + seconds
            workers = [threading.Thread(target=work, args=(i, end)) for i in range(threads)]
            for worker in workers:
                worker.start()
            while time.monotonic() < end and not failures:
                time.sleep(min(1.0, seconds / 20))
                most = max(most, resident())
            for worker in workers:
                worker.join()
            return resident_at_rest()

        warm = resident_after(seconds / 10)
        # The least of three: what caches and the allocator hold comes and goes by megabytes, and a leak does not.
        grown = min(resident_after(seconds * 3 / 10) for _ in range(3)) - warm
        qn.set_num_threads(None)
        found = {
            "threads": threads, "seconds": seconds, "calls": sum(done), "kinds of calls": len(names),
            "different results": len(failures),
            "resident bytes after warm-up": warm, "at most": most, "grown at the end": grown,
        }  # fmt: skip
        assert not failures, failures
        return found


def leaks(times: int) -> dict[str, Any]:
    """Call everything many times, thrice, on one thread; returns the bytes that a call leaves behind, at most."""

    def times_of(name: str) -> int:
        return max(times // 10, 1) if name in SLOW else times

    with tempfile.TemporaryDirectory() as folder:
        every = calls(Path(folder))
        worst, worst_name = 0.0, ""
        gc.collect()
        gc.freeze()  # what is here already, nearly everything, need not be looked through each time
        tracemalloc.start()
        try:
            for name, call in every.items():
                for _ in range(min(5, times_of(name))):
                    call()
                batches = []
                for _ in range(BATCHES):
                    gc.collect()
                    before = tracemalloc.get_traced_memory()[0]
                    for _ in range(times_of(name)):
                        call()
                    gc.collect()
                    batches.append((tracemalloc.get_traced_memory()[0] - before) / times_of(name))
                if min(batches) > worst:
                    worst, worst_name = min(batches), name
        finally:
            tracemalloc.stop()
            gc.unfreeze()
        grown: dict[str, int] = {}
        for name, call in every.items():  # what tracemalloc does not see: C's own memory
            for _ in range(min(3, times_of(name))):
                call()
            before = resident()
            for _ in range(times_of(name)):
                call()
            grown[name] = resident() - before
        most = max(grown, key=lambda name: grown[name])
        return {
            "kinds of calls": len(every), "times": times, "most bytes traced a call": worst, "by": worst_name,
            "most resident bytes grown": grown[most], "by which": most,
        }  # fmt: skip


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Soak and leak tests.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=40)
    parser.add_argument("--times", type=int, default=1000, help="of each call in the leak test")
    options = parser.parse_args(None if arguments is None else list(arguments))
    found = leaks(options.times)
    print(json.dumps(found, indent=1), flush=True)
    assert found["most bytes traced a call"] < 64, "a call leaves memory behind"
    assert found["most resident bytes grown"] < 4 << 20, "a call leaves memory behind that Python does not know of"
    found = soak(60 * options.minutes, options.threads)
    print(json.dumps(found, indent=1))
    assert found["grown at the end"] < 16 << 20, "memory grew"


if __name__ == "__main__":
    main()
