"""Faults while a model is saved: whatever happens, the file is the old one or the new one, whole.

    python tests/crash_saving.py --kills 200

A process saves one model after another over the same file and is killed with SIGKILL at a random moment, so many times;
between kills the file is verified and compared with what was to be written. Then the same save meets a full disk (a
small tmpfs where this process may mount one, a limit on the size of files everywhere), a read-only folder, and the very
file that it is mapped from.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import qnative as qn

SUFFIXES = (".safetensors", ".json")


def model_of(value: int) -> qn.QuantizedModel:
    """A model every byte of whose weights depends on the value."""
    rng = np.random.default_rng(value)
    params = {f"l{i}.weight": rng.standard_normal((64, 96)).astype(np.float32) for i in range(3)}
    return qn.quantize_model({**params, "value": np.full(1000, value, np.int64)})


def value_of(path: Path) -> int:
    """Which model the file holds; it is verified, and its weights are compared with those of that model."""
    model = qn.QuantizedModel.load(path, verify=True)
    values = np.unique(model["value"])
    assert len(values) == 1, f"{path}: parts of several saves: {values}"
    expected = model_of(int(values[0]))
    for name in ("l0", "l1", "l2"):
        assert np.array_equal(model[name].weight_quantized().data, expected[name].weight_quantized().data), name
    return int(values[0])


def save_for_ever(models: list[qn.QuantizedModel], path: Path, begun: int) -> None:
    """What is killed. It says when it begins."""
    os.write(begun, b"!")
    value = 0
    while True:
        models[value % len(models)].save(path)
        value += 1


def kill(times: int, seed: int = 0) -> dict[str, int]:
    """Kill savers; returns the counts."""
    rng = random.Random(seed)
    counts = {"kills": 0, "temporary files left": 0, "found new": 0}
    models = [model_of(value) for value in range(1, 5)]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(times):
            path = Path(folder) / f"m{SUFFIXES[i % 2]}"
            if not path.exists():
                model_of(0).save(path)
            before = path.stat().st_mtime_ns
            told, begun = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    save_for_ever(models, path, begun)
                finally:
                    os._exit(1)
            os.read(told, 1)
            os.close(told)
            os.close(begun)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
                f"the saver ended by itself: {status}"
            )
            value_of(path)
            counts["kills"] += 1
            counts["found new"] += path.stat().st_mtime_ns != before
            for name in os.listdir(folder):
                if name.endswith(".tmp"):
                    counts["temporary files left"] += 1
                    os.unlink(Path(folder) / name)
    return counts


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of so many bytes mounted on the folder, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = (
        sys.platform == "linux" and libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            libc.umount2(os.fsencode(folder), 2)


def refused(model: qn.QuantizedModel, path: Path, numbers: set[int]) -> None:
    """Assert that saving fails with one of these errors and leaves the file and its folder as they were."""
    before, names = path.read_bytes(), sorted(os.listdir(path.parent))
    try:
        model.save(path)
    except OSError as error:
        assert error.errno in numbers, error
    else:
        raise AssertionError(f"saved to {path}, which cannot be written")
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == names


def full_disk() -> str:
    """No space left: in the middle of the temporary file. Returns how it was made full."""
    large = qn.quantize_model({"l0.weight": np.ones((1000, 1000), np.float32)})
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), 512 << 10) as mounted:
        if mounted:
            for suffix in SUFFIXES:
                path = Path(folder) / f"m{suffix}"
                model_of(1).save(path)
                refused(large, path, {errno.ENOSPC})
                assert value_of(path) == 1
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = Path(folder) / f"m{suffix}"
            model_of(1).save(path)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
                    refused(large, path, {errno.EFBIG})
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0, "the error was another one, or the file changed"
            assert value_of(path) == 1
    return "a tmpfs of 512 KiB, and a limit on the size of files" if mounted else "a limit on the size of files"


def read_only_folder() -> str:
    """A folder in which nothing can be made; root may write everywhere but on what is mounted read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        if os.getuid() != 0:
            model_of(1).save(path)
            os.chmod(folder, 0o500)
            try:
                refused(model_of(2), path, {errno.EACCES})
            finally:
                os.chmod(folder, 0o700)
            assert value_of(path) == 1
            return "a folder without write permission"
        with small_disk(Path(folder), 4 << 20) as mounted:
            if not mounted:
                return "none here: root may write in every folder, and may not mount"
            model_of(1).save(path)
            remount, read_only = 32, 1
            assert libc.mount(b"none", os.fsencode(folder), b"tmpfs", remount | read_only, None) == 0
            refused(model_of(2), path, {errno.EROFS})
            assert value_of(path) == 1
            return "a file system mounted read-only"


def over_the_mapped_file() -> None:
    """A mapped model is saved over its own file, and so is another; the mapped one stays what it was."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        model_of(1).save(path)
        mapped = qn.QuantizedModel.load(path, mmap=True)
        for _ in range(20):
            mapped.save(path)
            assert value_of(path) == 1
            model_of(2).save(path)
            assert value_of(path) == 2 and (np.asarray(mapped["value"]) == 1).all()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Faults while saving.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    print(f"full disk: {full_disk()}: the old file, whole")
    print(f"read-only: {read_only_folder()}: the old file, whole")
    over_the_mapped_file()
    print("saved over the mapped file 40 times: whole, and the mapped model as it was")
    counts = kill(options.kills, options.seed)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()) + ": the file whole every time")


if __name__ == "__main__":
    main()
