"""Containers on disk: what is written is whole and readable by others, and nothing that is read is trusted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from processes import python

from qnative import files, storage
from qnative.files import JSONFile, SafetensorsFile
from qnative.storage import FormatError, NamedTensor

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")

MIB = 1 << 20


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as bytes, with nothing checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), start: Any = 0, stop: Any = 4, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def without(key: str) -> dict[str, Any]:
    found = entry()
    del found[key]
    return found


# Every way a file can lie that we know of. Each must be refused, and cheaply.
BAD_SAFETENSORS: dict[str, bytes] = {
    "nothing at all": b"",
    "shorter than a length": b"\x02\0\0\0\0\0\0",
    "length beyond the file": raw(b"{}", length=100),
    "length one too many": raw(b"{}", length=3),
    "length of 2**63": raw(b"{}", length=2**63),
    "length of 2**64 - 1": raw(b"{}", length=2**64 - 1),
    "length above the reference's limit": raw(b"{}", length=100_000_001),
    "no header": raw(b""),
    "header is a list": raw(b"[]"),
    "header is a number": raw(b"17"),
    "space before the header": raw(b" {}"),
    "byte order mark": raw(b"\xef\xbb\xbf{}"),
    "not UTF-8": raw(b'{"\xff":1}'),
    "lone surrogate": raw(b'{"__metadata__":{"a":"\\ud800"}}'),
    "JSON cut short": raw(b'{"a":{"dtype":"F32"'),
    "text after the JSON": raw(b"{}x"),
    "two JSON objects": raw(b"{}{}"),
    "single quotes": raw(b"{'a':1}"),
    "NaN": raw(b'{"a":NaN}'),
    "Infinity": raw(b'{"a":-Infinity}'),
    "nested a hundred thousand deep": raw(b'{"a":' + b"[" * 100_000),
    "nested lists closed": raw(b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "number of 5000 digits": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "a million lists": raw(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    "20,000 empty tensors": raw({f"t{i}": entry(shape=[0], stop=0) for i in range(20_000)}),
    "header out of proportion": raw({"__metadata__": {"a": "x" * (2 * MIB)}}),
    "the same tensor twice": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "the same metadata twice": raw(b'{"__metadata__":{"x":"1","x":"2"}}'),
    "two metadata": raw(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata is a list": raw({"__metadata__": []}),
    "metadata of a number": raw({"__metadata__": {"a": 1}}),
    "metadata of an object": raw({"__metadata__": {"a": {}}}),
    "entry is a number": raw({"a": 1}),
    "entry is a list": raw({"a": []}),
    "entry is null": raw({"a": None}),
    "no dtype": raw({"a": without("dtype")}, b"1234"),
    "no shape": raw({"a": without("shape")}, b"1234"),
    "no offsets": raw({"a": without("data_offsets")}, b"1234"),
    "a key nobody knows": raw({"a": entry(strides=[1])}, b"1234"),
    "unknown dtype": raw({"a": entry("F31")}, b"1234"),
    "dtype in lower case": raw({"a": entry("f32")}, b"1234"),
    "dtype is a number": raw({"a": entry(32)}, b"1234"),
    "dtype is a list": raw({"a": entry(["F32"])}, b"1234"),
    "shape is a number": raw({"a": entry(shape=1)}, b"1234"),
    "shape is text": raw({"a": entry(shape="1")}, b"1234"),
    "shape of floats": raw({"a": entry(shape=[1.0])}, b"1234"),
    "shape of booleans": raw({"a": entry(shape=[True])}, b"1234"),
    "negative size": raw({"a": entry(shape=[-1])}, b"1234"),
    "two negative sizes": raw({"a": entry(shape=[-1, -1])}, b"1234"),
    "size of 2**64": raw({"a": entry(shape=[2**64])}, b"1234"),
    "product wraps to 0": raw({"a": entry(shape=[2**32, 2**32], stop=0)}),
    "product wraps to 1": raw({"a": entry("U8", [2**63 - 1, 2**63 - 1], stop=1)}, b"1"),
    "exabytes on four bytes": raw({"a": entry(shape=[2**60])}, b"1234"),
    "65 dimensions": raw({"a": entry(shape=[1] * 65)}, b"1234"),
    "one offset": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, b"1234"),
    "three offsets": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
    "offsets are an object": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": {}}}, b"1234"),
    "offsets of floats": raw({"a": entry(start=0.0, stop=4.0)}, b"1234"),
    "negative offset": raw({"a": entry(start=-4, stop=0)}, b"1234"),
    "offsets the wrong way round": raw({"a": entry(start=4, stop=0)}, b"1234"),
    "offset beyond the file": raw({"a": entry(start=0, stop=8, shape=[2])}, b"1234"),
    "offset of 2**70": raw({"a": entry(start=2**70, stop=2**70 + 4)}, b"1234"),
    "fewer bytes than the shape": raw({"a": entry(shape=[2])}, b"1234"),
    "more bytes than the shape": raw({"a": entry(shape=[1], stop=8)}, b"12345678"),
    "hole at the start": raw({"a": entry(start=4, stop=8)}, b"12345678"),
    "hole between": raw({"a": entry(), "b": entry(start=8, stop=12)}, b"123456789abc"),
    "overlap": raw({"a": entry(shape=[2], stop=8), "b": entry(start=4, stop=8)}, b"12345678"),
    "two tensors of the same bytes": raw({"a": entry(), "b": entry()}, b"1234"),
    "data after the last tensor": raw({"a": entry()}, b"1234extra"),
    "data and no tensor": raw({}, b"1234"),
    "data cut short": raw({"a": entry(shape=[100], stop=400)}, b"1234"),
    "half a byte of F4": raw({"a": entry("F4", [3], stop=1)}, b"1"),
}  # fmt: skip

OWN = {"qnative_format": "1", "qnative_crc32": "{}", "qnative_sha256": "0" * 64, "qnative_header_sha256": "0" * 64}


def own(**changes: Any) -> bytes:
    metadata = {k: v for k, v in {**OWN, **changes}.items() if v is not None}
    return raw({"__metadata__": metadata})


BAD_OWN: dict[str, bytes] = {
    "a version from the future": own(qnative_format="2"),
    "no checksums": own(qnative_crc32=None),
    "checksums are a list": own(qnative_crc32="[]"),
    "checksum is a number": own(qnative_crc32='{"a":1}'),
    "checksum of no tensor": own(qnative_crc32='{"a":"00000000"}'),
    "no digest": own(qnative_sha256=None),
    "no digest of the header": own(qnative_header_sha256=None),
    "digest too short": own(qnative_sha256="0" * 63),
    "digest not hexadecimal": own(qnative_sha256="g" * 64),
    "a value that is not JSON": own(qnative_layers="{"),
    "a value with a key twice": own(qnative_layers='{"a":1,"a":1}'),
    "a value with NaN": own(qnative_layers="NaN"),
    "a value beyond a float": own(qnative_layers="1e999"),
    "a value beyond a float, negative": own(qnative_layers='{"sqnr": -1e400}'),
    "a whole number of 23 digits": own(qnative_layers="[12345678901234567890123]"),
    "a whole number below 64 bits": own(qnative_layers="-9223372036854775809"),
    "a value nested too deeply": own(qnative_layers="[" * 20_000 + "]" * 20_000),
    "a value of half a character": own(qnative_layers='"\\ud800"'),
    "a value that is a bomb": own(qnative_layers="[" + "[]," * 200_000 + "[]]"),
    "another program's key": own(format="pt"),
}


def text(**changes: Any) -> bytes:
    tensor = {"dtype": "U8", "shape": [3], "crc32": "352441c2", "data": "YWJj"}
    document = {"qnative_format": "1", "qnative_sha256": "0" * 64, "tensors": {"a": tensor}}
    document = {k: v for k, v in {**document, **changes}.items() if v is not None}
    return json.dumps(document).encode()


def tensor_text(**changes: Any) -> bytes:
    tensor = {"dtype": "U8", "shape": [3], "crc32": "352441c2", "data": "YWJj"}
    return text(tensors={"a": {k: v for k, v in {**tensor, **changes}.items() if v is not None}})


BAD_JSON: dict[str, bytes] = {
    "nothing at all": b"",
    "not JSON": b"hello",
    "a list": b"[]",
    "another JSON file": b'{"a": 1}',
    "not UTF-8": b'{"qnative_format": "\xff"}',
    "cut short": text()[:-1],
    "text after it": text() + b"x",
    "NaN": b'{"qnative_format": NaN}',
    "a key twice": b'{"qnative_format": "1", "qnative_format": "1"}',
    "nested a hundred thousand deep": b"[" * 100_000,
    "a million lists": b'{"qnative_format":[' + b"[]," * 1_000_000 + b"[]]}",
    "a million objects": b'{"qnative_format":[' + b'{"":0},' * 1_000_000 + b"0]}",
    "a version from the future": text(qnative_format="2"),
    "a version that is a number": text(qnative_format=1),
    "no digest": text(qnative_sha256=None),
    "digest is a number": text(qnative_sha256=0),
    "unknown key": text(format="pt"),
    "own checksums in the wrong place": text(qnative_crc32={}),
    "no tensors": text(tensors=None),
    "tensors are a list": text(tensors=[]),
    "tensor is a list": text(tensors={"a": []}),
    "tensor without data": tensor_text(data=None),
    "tensor without checksum": tensor_text(crc32=None),
    "tensor with another key": tensor_text(offset=0),
    "checksum is a number": tensor_text(crc32=1),
    "unknown dtype": tensor_text(dtype="U7"),
    "dtype is an object": tensor_text(dtype={}),
    "shape of floats": tensor_text(shape=[3.0]),
    "negative size": tensor_text(shape=[-3]),
    "exabytes": tensor_text(shape=[2**60]),
    "fewer bytes than the shape": tensor_text(shape=[4]),
    "more bytes than the shape": tensor_text(shape=[2, 3]),
    "data is a list": tensor_text(data=[1, 2, 3]),
    "data with a letter that is none": tensor_text(data="YW!j"),
    "data padded where none is due": tensor_text(data="YW=="),
    "data with padding inside": tensor_text(shape=[6], data="YQ==YWJj"),
    "data with a line break": tensor_text(shape=[3], data="YWJ\n"),
}


def read_all(path: Path, verify: bool = True) -> None:
    with files.open_file(path) as file:
        for name in file.tensors:
            file.read(name)
        if verify:
            file.verify()


def refused(path: Path, content: bytes, factor: int) -> str:
    """Assert that a file is refused, not by its checksums and within its memory, and return the message."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            read_all(path, verify=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= factor * len(content) + 16 * MIB
    message = str(caught.value)
    assert path.name in message, "the message must name the file"
    assert isinstance(caught.value, ValueError)
    return message


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_bad_safetensors_is_refused_cheaply(kind: str, tmp_path: Path) -> None:
    refused(tmp_path / "bad.safetensors", BAD_SAFETENSORS[kind], 2)


@pytest.mark.parametrize("kind", BAD_OWN)
def test_bad_document_is_refused_cheaply(kind: str, tmp_path: Path) -> None:
    refused(tmp_path / "bad.safetensors", BAD_OWN[kind], 2)


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused_cheaply(kind: str, tmp_path: Path) -> None:
    refused(tmp_path / "bad.json", BAD_JSON[kind], 16)


def test_the_tables_of_bad_files_are_bad_for_one_reason(tmp_path: Path) -> None:
    """The files that the tables vary are themselves good, so each is refused for what its name says."""
    for name, content in (("good.safetensors", raw({"a": entry()}, b"1234")), ("own.safetensors", own())):
        (tmp_path / name).write_bytes(content)
        read_all(tmp_path / name, verify=False)
    (tmp_path / "good.json").write_bytes(text())
    with JSONFile(tmp_path / "good.json") as file:
        assert bytes(file.read("a")) == b"abc"


@pytest.mark.parametrize("kind", ["a million lists", "20,000 empty tensors", "exabytes on four bytes"])
def test_hostile_file_takes_no_memory_outside_python_either(kind: str, tmp_path: Path) -> None:
    """The reference library's parser and NumPy are counted too: the resident peak of a process of its own."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    (tmp_path / "good.safetensors").write_bytes(raw({}))
    code = f"""
from qnative.files import SafetensorsFile
from qnative.storage import FormatError
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
SafetensorsFile({str(tmp_path / "good.safetensors")!r}).close()
before = peak()
try:
    SafetensorsFile({str(path)!r})
except FormatError:
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 <= 2 * path.stat().st_size + 16 * MIB


@pytest.mark.parametrize("dtype, shape", [("F32", [0, 2**62, 4]), ("F8_E4M3", [2**61, 0]), ("U8", [0, 2**64 - 1])])
def test_empty_tensor_of_impossible_shape_is_listed_and_not_read(dtype: str, shape: list[int], tmp_path: Path) -> None:
    """Impossible in any dtype: what is read as bytes is float32 when it is looked up."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": entry(dtype, shape, stop=0)}))
    safetensors.deserialize(path.read_bytes())
    with SafetensorsFile(path) as file, pytest.raises(FormatError, match=r"a: shape .* beyond what an array can have"):
        file.read("a")


def test_dtype_without_storage_is_listed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": entry("F4", [4], stop=2)}, b"12"))
    with SafetensorsFile(path) as file:
        assert file.tensors["a"].shape == (4,)
        with pytest.raises(FormatError, match="dtype F4"):
            file.read("a")


VALID = raw(
    {
        "__metadata__": {"who": "me"},
        "b": entry("I64", [2], 0, 16),
        "a": entry("F32", [2, 2], 16, 32),
        "empty": entry("U8", [0, 3], 32, 32),
        "s": entry("F16", [], 32, 34),
        "t": entry("U8", [5], 34, 39),
    },
    bytes(range(39)),
)


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=3
    )
)
def test_accepts_nothing_that_the_reference_refuses(
    edits: list[tuple[int, int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Edits of a valid file: refused, or read as the reference reads it, byte for byte."""
    content = VALID
    for at, removed, inserted in edits:
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as file:
            ours = {
                name: (i.dtype, list(i.shape), file.read(name).tobytes())
                for name, i in file.tensors.items()
                if i.dtype in files.STORAGE
            }
    except FormatError:
        return
    theirs = {n: (v["dtype"], list(v["shape"]), bytes(v["data"])) for n, v in safetensors.deserialize(content)}
    assert ours == {n: v for n, v in theirs.items() if v[0] in files.STORAGE}


def test_control_characters_of_a_name_are_in_no_message(tmp_path: Path) -> None:
    """Tracebacks and logs show messages as they are."""
    path = tmp_path / "x.safetensors"
    for name in ("\x1b[2J\x1b]0;title\x07", "a\r\nFATAL: forged", "\u202egnp.exe"):
        path.write_bytes(raw({name: {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}}, b"1"))
        with pytest.raises(FormatError, match="unknown dtype") as caught:
            SafetensorsFile(path)
        assert str(caught.value).isprintable()
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_missing_file_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        JSONFile(tmp_path / "none.json")
    with pytest.raises(IsADirectoryError):
        SafetensorsFile(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it to read would wait for a writer for ever
        with pytest.raises(FormatError, match="regular file"):
            SafetensorsFile(tmp_path / "pipe")


@posix
def test_a_name_that_becomes_a_pipe_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for either, and nothing is read from it."""
    (tmp_path / "file").write_bytes(raw({}))
    regular = os.stat(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files.os, "stat", lambda path: regular)
    with pytest.raises(FormatError, match="regular file"):
        SafetensorsFile(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")
@pytest.mark.parametrize("after", [b"", VALID[:50], VALID + b"more", raw({"other": entry()}, b"1234")])
def test_what_is_written_meanwhile_is_not_what_is_judged(
    after: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference library maps the header that was read, so a file that is cut short cannot end the process."""
    path, judged = tmp_path / "x.safetensors", []
    path.write_bytes(VALID)
    genuine = safetensors.safe_open

    def meanwhile(name: str, framework: str) -> Any:
        judged.append(name)
        assert not os.path.samefile(name, path)
        path.write_bytes(after)
        return genuine(name, framework=framework)

    monkeypatch.setattr(safetensors, "safe_open", meanwhile)
    before = len(os.listdir("/proc/self/fd"))
    with SafetensorsFile(path) as file:
        assert judged and list(file.tensors) == ["b", "a", "empty", "s", "t"]
        if len(after) < len(VALID):
            with pytest.raises(FormatError, match="cut short"):
                file.read("t")
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_cut_short_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    with SafetensorsFile(path) as file:
        os.truncate(path, len(VALID) - 1)
        with pytest.raises(FormatError, match="t: the file ends 1 bytes early"):
            file.read("t")
    path.write_bytes(VALID)
    with SafetensorsFile(path, mmap=True) as file:
        os.truncate(path, len(VALID) - 1)
        with pytest.raises(FormatError, match="cut short"):
            file.read("t")


# Arrays and their storage

ARRAYS: dict[str, Any] = {
    "bool": np.array([True, False]),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "uint64": np.array([2**64 - 1], np.uint64),
    "float16": np.arange(5, dtype=np.float16),
    "float64 0-d": np.array(2.5),
    "complex64": np.array([1 + 2j], np.complex64),
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "float8_e4m3fn": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.arange(4).astype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.arange(4).astype(ml_dtypes.float8_e4m3fnuz),
    "big-endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "big-endian ints": np.arange(6, dtype=">i8"),
    "Fortran order": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "strided": np.arange(12, dtype=np.int32)[::-2],
    "strided bfloat16": np.arange(12).astype(ml_dtypes.bfloat16)[::3],
    "empty": np.zeros((3, 0, 2), np.float32),
    "list": [[1.0, 2.0], [3.0, 4.0]],
}


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_every_array_comes_back(kind: str, suffix: str, tmp_path: Path) -> None:
    given = np.asarray(ARRAYS[kind])
    path = tmp_path / f"x{suffix}"
    write = files.write_json if suffix == ".json" else files.write_safetensors
    write(path, [NamedTensor.of("x", ARRAYS[kind])], {"answer": 42})
    for mapped in (False, True):
        with files.open_file(path, mmap=mapped) as file:
            found, info = file.read("x"), file.tensors["x"]
            assert file.document == {"answer": 42}
            file.verify()
        assert found.shape == given.shape == info.shape
        assert files.STORAGE[info.dtype].name == given.dtype.name
        native = np.ascontiguousarray(given.astype(given.dtype.newbyteorder("="))).reshape(given.shape)
        assert found.tobytes() == native.tobytes()


@pytest.mark.parametrize("bad", [np.array(["a"]), np.array([object()]), np.array(1, "M8[s]"), np.longdouble(1)])
def test_what_has_no_place_in_a_file(bad: Any) -> None:
    if getattr(bad, "dtype", None) == np.float64:
        pytest.skip("long double is double here")
    with pytest.raises(TypeError, match="cannot be stored; convert it"):
        storage.to_storage(bad)


def test_storage_copies_only_where_it_must() -> None:
    x = np.arange(6, dtype=np.float32)
    assert np.shares_memory(storage.to_storage(x)[0], x)
    bits = storage.to_storage(np.ones(3, ml_dtypes.bfloat16))[0]
    assert bits.dtype == np.uint16 and bits.tolist() == [0x3F80] * 3


def test_the_reference_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "one byte": np.arange(3, dtype=np.int8), "é": np.arange(4.0), "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float16(1.5), "none": np.zeros((0, 4), np.int64),
    }  # fmt: skip
    files.write_safetensors(path, [NamedTensor.of(n, x) for n, x in tensors.items()], {"k": ["v"]})
    theirs = safetensors.numpy.load_file(path)
    assert set(theirs) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(theirs[name], x)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["qnative_k"] == '["v"]'


def test_data_is_aligned_for_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    dtypes = [np.int8, np.float64, np.float16, np.float32, np.complex64, np.int8, np.uint16]
    files.write_safetensors(path, [NamedTensor.of(f"x{i}", np.zeros(3, d)) for i, d in enumerate(dtypes)], {})
    with SafetensorsFile(path, mmap=True) as file:
        assert file.data_offset % 8 == 0
        for info in file.tensors.values():
            assert info.offset % files.STORAGE[info.dtype].numpy.itemsize == 0
            assert file.read(info.name).flags.aligned


def test_mapped_arrays_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, [NamedTensor.of("x", np.arange(1000.0))], {})
    with SafetensorsFile(path, mmap=True) as file:
        x = file.read("x")
    assert not x.flags.writeable and x.sum() == 499500
    os.unlink(path)
    assert x[-1] == 999


def test_unaligned_and_unordered_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        raw({"late": entry(start=1, stop=5), "early": entry("U8", [1], 0, 1)}, b"!" + np.float32(2.5).tobytes())
    )
    for mapped in (False, True):
        with SafetensorsFile(path, mmap=mapped) as file:
            assert list(file.tensors) == ["early", "late"]
            assert file.read("late").tolist() == [2.5]
            with pytest.raises(FormatError, match="no checksums"):
                file.verify()


# Writing


def tensors_of(value: float, size: int = 1000) -> list[NamedTensor]:
    return [NamedTensor.of(f"t{i}", np.full(size, value, np.float32)) for i in range(3)]


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


WRITERS: dict[str, Callable[..., None]] = {".safetensors": files.write_safetensors, ".json": files.write_json}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_failed_write_leaves_the_old_file(error: BaseException, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, tensors_of(1.0), {})
    before = path.read_bytes()

    def fail() -> Any:
        raise error

    with pytest.raises(type(error)):
        WRITERS[suffix](path, [*tensors_of(2.0), NamedTensor("z", "F32", (3,), fail)], {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_tensor_that_is_not_what_it_said(tmp_path: Path) -> None:
    liar = NamedTensor("x", "F32", (3,), lambda: np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"x: float32 \(4,\) was to be float32 \(3,\)"):
        files.write_safetensors(tmp_path / "x.safetensors", [liar], {})
    assert os.listdir(tmp_path) == []


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    for write in WRITERS.values():
        with pytest.raises(ValueError, match="two tensors would be saved as 't0'"):
            write(tmp_path / "x", tensors_of(1.0) + tensors_of(2.0), {})
    assert os.listdir(tmp_path) == []


def test_a_header_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of proportion"):
        files.write_safetensors(tmp_path / "x.safetensors", [], {"config_json": "x" * (2 * MIB)})
    with pytest.raises(ValueError, match=r"save as \.safetensors"):
        huge = NamedTensor("x", "U8", (files.JSON_LIMIT,), lambda: np.zeros(1, np.uint8))
        files.write_json(tmp_path / "x.json", [huge], {})
    assert os.listdir(tmp_path) == []


@posix
def test_disk_full_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors_of(1.0), {})
    before = path.read_bytes()
    code = f"""
import resource, numpy as np
from qnative import files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    files.write_safetensors({str(path)!r}, [files.NamedTensor.of("x", np.zeros(1_000_000, np.float32))], {{}})
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@posix
def test_mode_of_new_and_replaced_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    old = os.umask(0o027)
    try:
        path = tmp_path / "x.safetensors"
        files.write_safetensors(path, tensors_of(1.0), {})
        assert mode(path) == 0o640
        path.chmod(0o600)
        files.write_safetensors(path, tensors_of(2.0), {})
        assert mode(path) == 0o600, "a private file stays private"
        change, found = os.fchmod, []

        def spy(handle: int, wanted: int) -> None:
            found.append(stat.S_IMODE(os.fstat(handle).st_mode))
            change(handle, wanted)

        monkeypatch.setattr(os, "fchmod", spy)
        files.write_safetensors(path, tensors_of(3.0), {})
        assert found == [0o600], "and what replaces it is so from the beginning: who opens it then may read it later"
    finally:
        os.umask(old)


@posix
@pytest.mark.parametrize("letter", ["x", "é", "語", "𝄞"])
def test_the_longest_names(letter: str, tmp_path: Path) -> None:
    """File systems count a name's bytes, and the temporary file's name must fit as well."""
    count = (255 - len(".safetensors")) // len(letter.encode())
    path = tmp_path / (letter * count + ".safetensors")
    files.write_safetensors(path, tensors_of(1.0), {})
    files.write_safetensors(os.fsencode(path), tensors_of(2.0), {})
    with files.open_file(os.fsencode(path)) as file:
        assert (file.read("t0") == 2.0).all() and file.path == str(path)
    assert os.listdir(tmp_path) == [path.name]


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
@pytest.mark.parametrize("suffix", [b".safetensors", b".json"])
def test_names_that_are_no_text(suffix: bytes, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe" + suffix
    write = files.write_json if suffix == b".json" else files.write_safetensors
    write(path, tensors_of(1.0), {})
    with files.open_file(path) as file:
        file.verify()
        assert (file.read("t0") == 1.0).all()


@posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    files.write_safetensors(link, tensors_of(1.0), {})
    assert link.is_symlink() and target.is_file()
    assert os.listdir(tmp_path / "real") == ["x.safetensors"]


def test_missing_folder_and_folder_as_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.x\.safetensors'$"):
        files.write_safetensors(tmp_path / "none" / "x.safetensors", tensors_of(1.0), {})
    with pytest.raises(IsADirectoryError):
        files.write_safetensors(tmp_path, tensors_of(1.0), {})
    assert os.listdir(tmp_path) == []


@posix
def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """Nor through a link: renaming a file onto /dev/null would break the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.safetensors").symlink_to("pipe")
    for name in ("pipe", "x.safetensors"):
        with pytest.raises(FileExistsError, match="not a file to replace"):
            files.write_safetensors(tmp_path / name, tensors_of(1.0), {})
    assert sorted(os.listdir(tmp_path)) == ["pipe", "x.safetensors"]


@posix
def test_saving_over_a_mapped_file_keeps_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors_of(1.0), {})
    with SafetensorsFile(path, mmap=True) as file:
        x = file.read("t0")
        same = [NamedTensor.of_storage(n, file.read(n), "F32") for n in file.tensors]
        files.write_safetensors(path, same, {})  # the very arrays that lie in the file
        with SafetensorsFile(path) as again:
            again.verify()
            assert (again.read("t2") == 1.0).all()
        files.write_safetensors(path, tensors_of(2.0, 10), {})
        assert (x == 1.0).all(), "the reader's map must not change under it"


@posix
def test_every_byte_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a crash of the machine asks for: file synced, renamed, folder synced."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def spy_sync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def spy_replace(source: str, target: str) -> None:
        calls.append("rename")
        with SafetensorsFile(source) as file:
            file.verify()  # whole before it takes the name
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "replace", spy_replace)
    files.write_safetensors(tmp_path / "x.safetensors", tensors_of(1.0), {})
    assert calls == ["file", "rename", "folder"]


@posix
@pytest.mark.parametrize("refused", [errno.EACCES, errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may not be read, one on a file system that has no such thing: the file is saved. A fault is told."""
    opened, sync = os.open, os.fsync

    def spy_open(path: Any, flags: int, *mode: int) -> int:
        if refused == errno.EACCES and os.path.isdir(path):
            raise PermissionError(refused, os.strerror(refused), path)
        return opened(path, flags, *mode)

    def spy_sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(refused, os.strerror(refused))
        sync(handle)

    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors_of(1.0), {})
    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_sync)
    if refused == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(refused)):
            files.write_safetensors(path, tensors_of(2.0), {})
    else:
        files.write_safetensors(path, tensors_of(2.0), {})
    with SafetensorsFile(path) as file:
        file.verify()
        assert (file.read("t0") == 2.0).all()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="limits descriptors, which are in use to read from memory")
def test_a_system_without_descriptors_says_so(tmp_path: Path) -> None:
    """Neither that there is no such file, nor that it is malformed."""
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors_of(1.0), {})
    said = python(f"""
    import errno, os, resource
    from qnative.files import SafetensorsFile
    SafetensorsFile({str(path)!r}).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for free in range(5):
        try:
            SafetensorsFile({str(path)!r}).close()
            print("read")
        except OSError as error:
            assert error.filename == {str(path)!r}
            print(errno.errorcode[error.errno])
        os.close(held.pop())
    """)
    assert said.split() == ["EMFILE"] * 3 + ["read"] * 2


@posix
def test_killed_while_saving(tmp_path: Path) -> None:
    """After `kill -9` at any moment the file is the old one or the new one, whole."""
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, tensors_of(0.0), {})
    code = f"""
import numpy as np
from qnative import files
value = 0
while True:
    value += 1
    x = np.full(300_000, value, np.float32)
    files.write_safetensors({str(path)!r}, [files.NamedTensor.of(f"t{{i}}", x) for i in range(3)], {{}})
    if value == 1:
        print("saved once", flush=True)
"""
    rng = random.Random(7)
    saved = set()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with SafetensorsFile(path) as file:
            file.verify()
            values = {float(v) for name in file.tensors for v in np.unique(file.read(name))}
        assert len(values) == 1, "tensors of two saves in one file"
        saved |= values
    assert 0.0 not in saved


# Damage


def own_file(folder: Path, suffix: str) -> Path:
    path = folder / f"own{suffix}"
    x = np.arange(40, dtype=np.float32)
    WRITERS[suffix](path, [NamedTensor.of("x", x), NamedTensor.of("y", x.astype(np.int8))], {"note": "a b"})
    return path


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(step: int, suffix: str, tmp_path: Path) -> None:
    """In the header, the metadata, the digests, the data and the padding; every bit with --slow."""
    path = own_file(tmp_path, suffix)
    good = path.read_bytes()
    missed = []
    with open(path, "r+b", buffering=0) as file:
        for bit in range(0, 8 * len(good), step):
            file.seek(bit // 8)
            file.write(bytes([good[bit // 8] ^ 1 << bit % 8]))
            try:
                read_all(path)
                missed.append(bit)
            except FormatError:
                pass
            file.seek(bit // 8)
            file.write(good[bit // 8 : bit // 8 + 1])
    assert path.read_bytes() == good
    assert not missed


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_damaged_tensor_is_named(suffix: str, tmp_path: Path) -> None:
    path = own_file(tmp_path, suffix)
    content = bytearray(path.read_bytes())
    if suffix == ".json":
        at = content.index(b'"data"', content.index(b'"y"')) + 12
        content[at] = ord("B") if content[at] == ord("A") else ord("A")
    else:
        content[-1] ^= 0x10  # the last byte is y's: the narrowest dtype comes last
    path.write_bytes(content)
    with files.open_file(path) as file, pytest.raises(FormatError, match="damaged: the bytes of y are not"):
        file.verify()


@pytest.mark.parametrize("suffix", WRITERS)
def test_truncated_anywhere(suffix: str, tmp_path: Path) -> None:
    good = own_file(tmp_path, suffix).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for size in range(0, len(good) - 1, 7):  # JSON's final newline may go
        path.write_bytes(good[:size])
        with pytest.raises(FormatError):
            read_all(path)


def test_damage_that_fits_its_checksum_is_found(tmp_path: Path) -> None:
    """Somebody changed data, and the CRC and the header's digest with it: the data's SHA-256 remains."""
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, [NamedTensor.of("a", np.zeros(8))], {})
    content = path.read_bytes()
    with SafetensorsFile(path) as file:
        header, own_digest = bytes(file._header), file.metadata["qnative_header_sha256"].encode()
    data = np.ones(8).tobytes()
    header = header.replace(f"{zlib.crc32(content[-64:]):08x}".encode(), f"{zlib.crc32(data):08x}".encode())
    header = header.replace(own_digest, b"0" * 64)
    header = header.replace(b"0" * 64, hashlib.sha256(header).hexdigest().encode())
    path.write_bytes(content[:8] + header + data)
    with SafetensorsFile(path) as file, pytest.raises(FormatError, match="the data's SHA-256"):
        file.verify()


def test_swapped_tensors_of_one_size_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, [NamedTensor.of("a", np.zeros(8)), NamedTensor.of("b", np.ones(8))], {})
    content = path.read_bytes()
    path.write_bytes(content[:-128] + content[-64:] + content[-128:-64])
    with SafetensorsFile(path) as file, pytest.raises(FormatError, match="a, b"):
        file.verify()


def test_json_is_readable(tmp_path: Path) -> None:
    document = json.loads(own_file(tmp_path, ".json").read_text())
    assert document["qnative_note"] == "a b"
    assert document["tensors"]["y"]["shape"] == [40]
    assert document["qnative_format"] == "1"
