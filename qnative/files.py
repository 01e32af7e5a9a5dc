"""Containers on disk: safetensors and JSON files of named tensors, read without trust and written atomically.

This module knows tensors, bytes and checksums; what the tensors mean is `qnative.checkpoint`'s business.

A file of qnative's own carries, beside its tensors, a *document*: a few named JSON values. In safetensors they are
strings of ``__metadata__``, each under the prefix ``qnative_``; in JSON they are members of the one object:

=========================  ===================================================================================
``qnative_format``         ``"1"``
``qnative_...``            the document
``qnative_crc32``          tensor name -> CRC-32 of its bytes, to say which tensor is damaged (JSON: with the tensor)
``qnative_sha256``         SHA-256 of the data section (safetensors), of the file with 64 zeros in its place (JSON)
``qnative_header_sha256``  SHA-256 of the header with 64 zeros in its place (safetensors)
=========================  ===================================================================================

Nothing here trusts a number in a file: every size is compared with the size of the file, in Python integers, before
anything is allocated, and the structure of every piece of JSON is bounded before it is parsed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qnative.storage import OTHER_BITS, STORAGE, FormatError, NamedTensor, TensorInfo, bytes_of, possible_shape

if TYPE_CHECKING:
    import io
    from typing import Self

__all__ = [
    "FORMAT_VERSION",
    "JSONFile",
    "Path",
    "SafetensorsFile",
    "exact_keys",
    "open_file",
    "write_json",
    "write_safetensors",
]

#: How a file may be named; bytes too, as the system has them.
Path: TypeAlias = "str | bytes | os.PathLike[Any]"

FORMAT_VERSION = "1"

#: The most bytes a JSON container may have, read or written.
JSON_LIMIT = 256 << 20

#: The most bytes a safetensors header may have, whatever the file's size: the reference library's own limit.
HEADER_LIMIT = 100_000_000

_PREFIX = "qnative_"
_NO_DIGEST = "0" * 64
_CHUNK = 1 << 20
#: What a system says that has nothing left, whatever the file.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# JSON, strictly


def json_cost(data: bytes) -> int:
    """Return an upper estimate of the bytes that parsing JSON text allocates, from its structure alone."""
    text = len(data) if data.isascii() else 4 * len(data)
    return 2 * text + 240 * data.count(b"{") + 96 * data.count(b"[") + 160 * data.count(b":") + 64 * data.count(b",")


def parse_json(data: bytes, where: str, allowance: int) -> Any:
    """Parse JSON text that nobody vouches for.

    Refuses duplicate keys (parsers disagree on which one counts), NaN and infinity tokens, numbers beyond the range of
    a float and whole numbers beyond 64 bits, nesting beyond the interpreter's limit, invalid UTF-8, lone surrogates,
    and text whose structure alone would take more than `allowance` bytes.

    Parameters
    ----------
    data : bytes
        The text.
    where : str
        What the message calls it.
    allowance : int
        Bytes that parsing may take.

    Raises
    ------
    FormatError
    """
    import json

    cost = json_cost(data)
    if cost > allowance:
        raise FormatError(f"{where}: its JSON would take about {cost} bytes to parse; {allowance} is the limit here")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            double = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the key {double!r} appears twice")
        return found

    def constant(token: str) -> None:
        raise FormatError(f"{where}: {token} is not a JSON number")

    def whole(token: str) -> int:
        if len(token) > 20 or not -(1 << 63) <= int(token) < 1 << 64:
            raise FormatError(f"{where}: the number {token[:40]} is beyond 64 bits")
        return int(token)

    def fraction(token: str) -> float:
        value = float(token)
        if not math.isfinite(value):
            raise FormatError(f"{where}: the number {token[:40]} is beyond what a float holds")
        return value

    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=whole,
            parse_float=fraction,
        )
        if b"\\ud" in data or b"\\uD" in data:  # only such an escape can spell half a character
            for text in _strings(found):
                text.encode("utf-8")
        return found
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from None


def _strings(found: Any) -> Iterator[str]:
    """Give every string in parsed JSON, keys too."""
    left = [found]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += value
            left += value.values()
        elif isinstance(value, list):
            left += value


def exact_keys(found: Any, expected: Iterable[str], where: str) -> dict[str, Any]:
    """Return `found` when it is an object with exactly the expected keys."""
    expected = set(expected)
    if not isinstance(found, dict):
        raise FormatError(f"{where}: must be a JSON object, not {type(found).__name__}")
    for key in found:
        if key not in expected:
            raise FormatError(f"{where}: unknown key {key[:80]!r}")
    missing = sorted(expected - set(found))
    if missing:
        raise FormatError(f"{where}: missing key {missing[0]!r}")
    return found


def _dimensions(found: Any, where: str) -> tuple[int, ...]:
    """Return a shape: a short list of whole numbers >= 0."""
    if not isinstance(found, list) or any(type(n) is not int or n < 0 for n in found):
        raise FormatError(f"{where}: a shape must be a list of whole numbers, not {str(found)[:80]}")
    if len(found) > 64:
        raise FormatError(f"{where}: {len(found)} dimensions; an array has at most 64")
    return tuple(found)


def _shaped(flat: NDArray[Any], info: TensorInfo, where: str) -> NDArray[Any]:
    if not possible_shape(info.shape):  # an empty tensor's: no bytes vouch for its other sizes
        raise FormatError(f"{where}: shape {info.shape} is beyond what an array can have")
    return flat.reshape(info.shape)


# Reading


def _opened(path: str) -> io.FileIO:
    """Open a regular file unbuffered; anything else (a folder, a pipe, a device) is refused before it is opened.

    And after, as the name may be another file's by then; opening does not wait, as that of a pipe would.
    """
    import io

    _refuse_irregular(path, os.stat(path).st_mode)
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    file = io.FileIO(path, "rb", opener=lambda path, flags: os.open(path, flags | more))
    try:
        _refuse_irregular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _refuse_irregular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder; give the file in it")
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: not a regular file")


def _read_into(file: io.FileIO, view: memoryview, where: str) -> None:
    """Fill `view` from the file's position; FormatError when the file ends early."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise FormatError(f"{where}: the file ends {len(view) - done} bytes early; it was cut short")
        done += got


class _Reader:
    """What the two containers share: names, a document, reading tensors, comparing digests.

    Attributes
    ----------
    path : str
        The file.
    size : int
        Its size in bytes when it was opened.
    tensors : dict of str to TensorInfo
        In the file's order.
    document : dict of str to object, or None
        qnative's own values; None in a file that is not qnative's.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fsdecode(path)
        self._file = _opened(self.path)
        self.size = os.fstat(self._file.fileno()).st_size
        self.tensors: dict[str, TensorInfo] = {}
        self.document: dict[str, Any] | None = None
        self._crc32: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        raise AssertionError  # each container's own

    def _buffer(self, info: TensorInfo) -> NDArray[np.uint8]:
        raise AssertionError  # each container's own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.close()

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor in its storage dtype: bfloat16 as uint16 bits, float8 as uint8 codes.

        Raises
        ------
        KeyError
            If there is no such tensor.
        FormatError
            If its dtype has no storage here, or the file has become shorter.
        """
        info = self.tensors[name]
        where = f"{self.path}: {name}"
        if info.dtype not in STORAGE:
            raise FormatError(f"{where}: dtype {info.dtype} is not one that qnative reads")
        return _shaped(self._buffer(info).view(STORAGE[info.dtype].numpy), info, where)

    def _own(self, document: dict[str, Any]) -> None:
        """Take the document of a file of qnative's own: the version, and a checksum for every tensor."""
        version = document.pop("format")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{self.path}: qnative_format is {str(version)[:40]!r} and this version reads {FORMAT_VERSION!r}; "
                "a newer qnative may read it"
            )
        where = f"{self.path}: qnative_crc32"
        crc32 = document.pop("crc32", None)
        if not isinstance(crc32, dict) or any(not isinstance(v, str) for v in crc32.values()):
            raise FormatError(f"{where}: must be an object of checksums")
        self._crc32 = exact_keys(crc32, self.tensors, where)
        self.document = document

    def _digest(self, name: str, found: Any) -> str:
        if not isinstance(found, str) or len(found) != 64 or any(c not in "0123456789abcdef" for c in found):
            raise FormatError(f"{self.path}: qnative_{name} must be 64 hexadecimal digits")
        return found

    def _require_own(self) -> None:
        if self.document is None:
            raise FormatError(
                f"{self.path}: has no qnative_format and no checksums; only a file that qnative saved can be verified"
            )

    def _damaged(self, name: str, crc: int) -> bool:
        return self._crc32[name] != f"{crc:08x}"

    def _refuse_damage(self, damaged: list[str]) -> None:
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise FormatError(
                f"{self.path}: damaged: the bytes of {', '.join(damaged[:3])}{more} are not those that were saved; "
                "fetch or make the file again"
            )


class SafetensorsFile(_Reader):
    """A safetensors file, read tensor by tensor.

    The reference library judges the file first (no holes, no overlaps, sizes that match); what it lets pass and this
    reader does not: duplicate keys, unknown keys, and a header out of proportion to the file. Data is read by plain
    reads into fresh arrays, or, with `mmap`, by read-only views of a memory map: opening is then immediate and
    processes share the pages, but should another program cut the file short meanwhile, the process dies by SIGBUS.

    Parameters
    ----------
    path : path-like
        The file.
    mmap : bool
        Map the data instead of reading it.

    Attributes
    ----------
    metadata : dict of str to str
        The whole ``__metadata__``.
    data_offset : int
        Where the data section begins.

    Raises
    ------
    FileNotFoundError, PermissionError, IsADirectoryError
        As `open` does.
    FormatError
        If the file breaks a rule of the format.
    """

    def __init__(self, path: Path, mmap: bool = False) -> None:
        self._mmap = mmap
        self._map: NDArray[np.uint8] | None = None
        self.metadata: dict[str, str] = {}
        self.data_offset = 0
        super().__init__(path)

    def _open(self) -> None:
        if self.size < 8:
            raise FormatError(f"{self.path}: {self.size} bytes; a safetensors file begins with 8 that say a length")
        prefix = bytearray(8)
        _read_into(self._file, memoryview(prefix), self.path)
        (length,) = struct.unpack("<Q", prefix)
        if length > self.size - 8:
            raise FormatError(f"{self.path}: the header claims {length} bytes; the file has {self.size - 8} for it")
        if length > min(HEADER_LIMIT, (1 << 20) + self.size // 8):
            raise FormatError(
                f"{self.path}: a header of {length} bytes is out of proportion to a file of {self.size}; "
                "at most 1 MiB and an eighth of the file is read"
            )
        header = bytearray(length)
        _read_into(self._file, memoryview(header), self.path)
        if header[:1] != b"{":
            raise FormatError(f"{self.path}: the header must begin with '{{'")
        where = f"{self.path}: header"
        # Parsed before the library sees it: its parser would build whatever the structure asks for.
        entries = parse_json(bytes(header), where, self._allowance)
        self._header = header
        self.data_offset = 8 + length
        metadata = entries.pop("__metadata__", None)
        if metadata is not None:
            if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
                raise FormatError(f"{where}: __metadata__ must map strings to strings")
            self.metadata = metadata
        found = [self._info(name, entry) for name, entry in entries.items()]
        found.sort(key=lambda info: (info.offset, info.nbytes))
        self._judge({info.name for info in found})
        self.tensors = {info.name: info for info in found}
        if _PREFIX + "format" in self.metadata:
            self._own(self._parse_document())

    @property
    def _allowance(self) -> int:
        return (8 << 20) + self.size // 2

    def _info(self, name: str, entry: Any) -> TensorInfo:
        where = f"{self.path}: {name}"
        exact_keys(entry, ("dtype", "shape", "data_offsets"), where)
        code, offsets = entry["dtype"], entry["data_offsets"]
        code = code if isinstance(code, str) else str(code)
        bits = STORAGE[code].numpy.itemsize * 8 if code in STORAGE else OTHER_BITS.get(code)
        if bits is None:
            raise FormatError(f"{where}: unknown dtype {code[:40]!r}")
        shape = _dimensions(entry["shape"], where)
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
            raise FormatError(f"{where}: data_offsets must be two whole numbers")
        start, stop = offsets
        if not 0 <= start <= stop <= self.size - self.data_offset:
            space = self.size - self.data_offset
            raise FormatError(f"{where}: data_offsets {start}, {stop} lie outside the {space} bytes of data")
        if math.prod(shape) * bits != (stop - start) * 8:
            raise FormatError(f"{where}: {code} of shape {shape} does not take the {stop - start} bytes it has")
        return TensorInfo(name, code, shape, stop - start, self.data_offset + start)

    def _judge(self, names: set[str]) -> None:
        """Ask the reference library, whose verdict on holes, overlaps and the rest stands."""
        import safetensors

        with self._stand_in() as path:
            try:
                with safetensors.safe_open(path, framework="np") as judge:
                    agreed = set(judge.keys()) == names
            except FileNotFoundError:
                raise
            except (safetensors.SafetensorError, OSError) as error:
                raise FormatError(f"{self.path}: {error}") from None
        if not agreed:
            raise FormatError(f"{self.path}: changed while it was being read")

    @contextlib.contextmanager
    def _stand_in(self) -> Iterator[str]:
        """Give the path of a file in memory with this header and size, which the reference library then maps.

        It judges what was read here, whatever is written to the file meanwhile, and no file that is cut short can end
        the process as a map of it would. Where the system has no such files, the path of the file itself; OSError where
        it has no descriptors or memory left.
        """
        with contextlib.ExitStack() as stack:
            path = self.path
            try:
                memory = os.memfd_create("qnative")  # type: ignore[attr-defined, unused-ignore]
                stack.callback(os.close, memory)
                os.ftruncate(memory, self.size)  # takes no memory for what is not written
                header = memoryview(struct.pack("<Q", len(self._header)) + self._header)
                while header:
                    header = header[os.write(memory, header) :]
                # Opened here first: of a system without descriptors the library says that there is no such file.
                os.close(os.open(f"/proc/self/fd/{memory}", os.O_RDONLY))
                path = f"/proc/self/fd/{memory}"
            except AttributeError:  # not Linux
                pass
            except OSError as error:  # not allowed, unless there is nothing left
                if error.errno in _EXHAUSTED:
                    raise OSError(error.errno, error.strerror, self.path) from None
            yield path

    def _parse_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for key, text in self.metadata.items():
            if not key.startswith(_PREFIX):
                raise FormatError(f"{self.path}: unknown key {key!r} in __metadata__")
            name = key.removeprefix(_PREFIX)
            if name.endswith("sha256"):
                self._digest(name, text)
            elif name == "format":
                document[name] = text
            else:
                document[name] = parse_json(text.encode("utf-8"), f"{self.path}: {key}", self._allowance)
        for name in ("sha256", "header_sha256"):
            if _PREFIX + name not in self.metadata:
                raise FormatError(f"{self.path}: missing key {_PREFIX + name!r} in __metadata__")
        return document

    def _buffer(self, info: TensorInfo) -> NDArray[np.uint8]:
        if self._mmap and info.nbytes:
            if self._map is None:
                import mmap

                try:
                    mapped = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
                except ValueError as error:
                    raise FormatError(f"{self.path}: cannot be mapped ({error}); it was cut short") from None
                self._map = np.frombuffer(mapped, np.uint8)
            return self._map[info.offset : info.offset + info.nbytes]
        buffer = np.empty(info.nbytes, np.uint8)
        self._file.seek(info.offset)
        _read_into(self._file, bytes_of(buffer), f"{self.path}: {info.name}")
        return buffer

    def verify(self) -> None:
        """Compare every byte with the digests that were saved; FormatError names the tensors that differ."""
        import hashlib
        import zlib

        self._require_own()
        whole, damaged = hashlib.sha256(), []
        chunk = memoryview(bytearray(_CHUNK))
        for info in self.tensors.values():
            self._file.seek(info.offset)
            crc, left = 0, info.nbytes
            while left:
                part = chunk[: min(left, _CHUNK)]
                _read_into(self._file, part, f"{self.path}: {info.name}")
                whole.update(part)
                crc = zlib.crc32(part, crc)
                left -= len(part)
            if self._damaged(info.name, crc):
                damaged.append(info.name)
        said = self.metadata[_PREFIX + "header_sha256"]
        if hashlib.sha256(self._header.replace(said.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != said:
            raise FormatError(
                f"{self.path}: damaged: the header is not the one that was saved; fetch or make the file again"
            )
        self._refuse_damage(damaged)
        if whole.hexdigest() != self.metadata[_PREFIX + "sha256"]:
            raise FormatError(f"{self.path}: damaged: the data's SHA-256 is not the one that was saved")


class JSONFile(_Reader):
    """A JSON file of qnative's own: the document readable, each tensor's bytes as base64.

    For small models: the file is read whole and may have at most `JSON_LIMIT` bytes.

    Parameters
    ----------
    path : path-like
        The file.

    Raises
    ------
    FileNotFoundError, PermissionError, IsADirectoryError
        As `open` does.
    FormatError
        If the file breaks a rule of the format.
    """

    def _open(self) -> None:
        if self.size > JSON_LIMIT:
            raise FormatError(f"{self.path}: {self.size} bytes of JSON, and at most {JSON_LIMIT} are read")
        content = bytearray(self.size)
        _read_into(self._file, memoryview(content), self.path)
        found = parse_json(bytes(content), self.path, (8 << 20) + 8 * self.size)
        if not isinstance(found, dict) or _PREFIX + "format" not in found:
            raise FormatError(f"{self.path}: not a model that qnative saved: no qnative_format")
        tensors = found.pop("tensors", None)
        if not isinstance(tensors, dict):
            raise FormatError(f"{self.path}: missing key 'tensors'")
        self._data: dict[str, str] = {}
        for name, entry in tensors.items():
            self.tensors[name] = self._info(name, entry)
        document: dict[str, Any] = {"crc32": {name: entry["crc32"] for name, entry in tensors.items()}}
        for key, value in found.items():
            if not key.startswith(_PREFIX) or key == _PREFIX + "crc32":
                raise FormatError(f"{self.path}: unknown key {key!r}")
            document[key.removeprefix(_PREFIX)] = value
        self._said = self._digest("sha256", document.pop("sha256", None))
        self._own(document)

    def _info(self, name: str, entry: Any) -> TensorInfo:
        where = f"{self.path}: {name}"
        exact_keys(entry, ("dtype", "shape", "data", "crc32"), where)
        code, data = entry["dtype"], entry["data"]
        if not isinstance(code, str) or code not in STORAGE:
            raise FormatError(f"{where}: unknown dtype {str(code)[:40]!r}")
        shape = _dimensions(entry["shape"], where)
        nbytes = math.prod(shape) * STORAGE[code].numpy.itemsize
        if not isinstance(data, str) or len(data) != -(-nbytes // 3) * 4:
            raise FormatError(
                f"{where}: its base64 text is not of the {nbytes} bytes that {code} of shape {shape} takes"
            )
        self._data[name] = data
        return TensorInfo(name, code, shape, nbytes)

    def _buffer(self, info: TensorInfo) -> NDArray[np.uint8]:
        import binascii

        try:
            data = binascii.a2b_base64(self._data[info.name], strict_mode=True)
        except ValueError as error:
            raise FormatError(f"{self.path}: {info.name}: not base64 ({error})") from None
        if len(data) != info.nbytes:
            raise FormatError(f"{self.path}: {info.name}: {len(data)} bytes of base64, {info.nbytes} by its shape")
        return np.frombuffer(data, np.uint8)

    def verify(self) -> None:
        """Compare every byte with the digests that were saved; FormatError names the tensors that differ."""
        import hashlib
        import zlib

        self._refuse_damage(
            [n for n, i in self.tensors.items() if self._damaged(n, zlib.crc32(bytes_of(self._buffer(i))))]
        )
        self._file.seek(0)
        content = bytearray(self.size)
        _read_into(self._file, memoryview(content), self.path)
        if hashlib.sha256(content.replace(self._said.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != self._said:
            raise FormatError(f"{self.path}: damaged: its text is not what was saved; fetch or make the file again")


def open_file(path: Path, mmap: bool = False) -> SafetensorsFile | JSONFile:
    """Open a container by its suffix: ``.json`` is JSON, everything else safetensors."""
    path = os.fsdecode(path)
    return JSONFile(path) if path.lower().endswith(".json") else SafetensorsFile(path, mmap)


# Writing


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears at `path` whole or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, and take the target's name in one step, so
    that a crash leaves the old file or the new one and a process that has the old one mapped keeps it. On any
    exception the temporary file is removed. A new file gets the mode the umask leaves; a replaced one keeps its own.
    """
    target = os.path.realpath(os.fsdecode(path))
    folder, name = os.path.split(target)
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target).st_mode
    if old is not None and stat.S_ISDIR(old):
        raise IsADirectoryError(f"{target} is a folder; give the name of a file in it")
    if old is not None and not stat.S_ISREG(old):  # which would be no device or pipe any more
        raise FileExistsError(f"{target} is a device or a pipe, not a file to replace; give another name")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    stem = os.fsencode(name)[:100].decode("utf-8", "ignore")  # file systems count bytes
    temporary = os.path.join(folder, f".{stem}.{os.urandom(8).hex()}.tmp")
    try:
        # Nobody may open what replaces a private file before it is as private.
        descriptor = os.open(temporary, flags, 0o666 if old is None else 0o600)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, target) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            if old is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), stat.S_IMODE(old))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Have a new name reach the disk.

    Not in a folder that may be written to but not read, nor on a file system that cannot: the file is there, and what a
    crash of the machine leaves is the old one or the new one all the same.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def _unique(tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
    found = sorted(tensors, key=lambda t: (-STORAGE[t.dtype].numpy.itemsize, t.name))
    seen: set[str] = set()
    for tensor in found:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise ValueError(f"two tensors would be saved as {tensor.name!r}; rename one")
        try:
            tensor.name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{tensor.name!r} holds half a character, which no reader would take; rename it") from None
        seen.add(tensor.name)
    return found


def _dumps(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def write_safetensors(
    path: Path, tensors: Iterable[NamedTensor], document: Mapping[str, Any], check: Callable[[int], None] | None = None
) -> None:
    """Write a safetensors file of qnative's own, atomically, one tensor in memory at a time.

    Parameters
    ----------
    path : path-like
        The target; replaced in one step.
    tensors : iterable of NamedTensor
        Written widest dtype first, then by name, so that each is aligned to its own size.
    document : mapping of str to object
        JSON values that go into ``__metadata__``.
    check : callable, optional
        Called with the file's size before anything is written; what it raises leaves the old file.

    Raises
    ------
    ValueError
        If two tensors have one name, or the header is more than a reader would take.
    OSError
        If the file cannot be written; the old one is then untouched.
    """
    import hashlib
    import zlib

    entries = _unique(tensors)
    offset = 0
    index: dict[str, Any] = {}
    for t in entries:
        index[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    metadata = {_PREFIX + "format": FORMAT_VERSION}
    metadata.update({_PREFIX + k: _dumps(v) for k, v in document.items()})

    def header(crc32: Mapping[str, str], data: str, own: str) -> bytes:
        digests = {"crc32": _dumps(crc32), "sha256": data, "header_sha256": own}
        digests = {_PREFIX + k: v for k, v in digests.items()}
        text = _dumps({"__metadata__": metadata | digests, **index}).encode("ascii")
        return text + b" " * (-len(text) % 8)

    # The header's length does not depend on the digests, so its place is kept free until they are known.
    blank = header(dict.fromkeys(index, "0" * 8), _NO_DIGEST, _NO_DIGEST)
    size = 8 + len(blank) + offset
    if len(blank) > min(HEADER_LIMIT, (1 << 20) + size // 8) or json_cost(blank) > (8 << 20) + size // 2:
        raise ValueError(
            f"the header would have {len(blank)} bytes for {offset} bytes of data, out of proportion; "
            "merge small tensors, or shorten config_json"
        )
    if check is not None:
        check(size)
    with _atomic(path) as file:
        file.write(struct.pack("<Q", len(blank)) + blank)
        data, crc32 = hashlib.sha256(), {}
        for tensor in entries:
            buffer = tensor.buffer()
            data.update(buffer)
            crc32[tensor.name] = f"{zlib.crc32(buffer):08x}"
            file.write(buffer)
            del buffer
        crc32 = {name: crc32[name] for name in index}
        own = hashlib.sha256(header(crc32, data.hexdigest(), _NO_DIGEST)).hexdigest()
        file.seek(8)
        file.write(header(crc32, data.hexdigest(), own))


def write_json(
    path: Path, tensors: Iterable[NamedTensor], document: Mapping[str, Any], check: Callable[[int], None] | None = None
) -> None:
    """Write a JSON file of qnative's own, atomically, one tensor in memory at a time.

    Parameters
    ----------
    path : path-like
        The target; replaced in one step.
    tensors : iterable of NamedTensor
        Written in the order of their names.
    document : mapping of str to object
        JSON values that become members of the one object.
    check : callable, optional
        Called with the file's size before it takes its name; what it raises leaves the old file.

    Raises
    ------
    ValueError
        If two tensors have one name, or the file would be larger than `JSON_LIMIT`.
    OSError
        If the file cannot be written; the old one is then untouched.
    """
    import binascii
    import hashlib
    import json
    import zlib

    entries = sorted(_unique(tensors), key=lambda t: t.name)
    head = {_PREFIX + "format": FORMAT_VERSION, _PREFIX + "sha256": _NO_DIGEST}
    head.update({_PREFIX + k: v for k, v in document.items()})
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ',\n "tensors": {'
    size = len(text) + sum(t.nbytes * 4 // 3 + len(t.name) + 200 for t in entries)
    if size > JSON_LIMIT:
        raise ValueError(f"about {size} bytes of JSON, and at most {JSON_LIMIT} are read back; save as .safetensors")
    with _atomic(path) as file:
        digest = hashlib.sha256()

        def write(part: bytes) -> None:
            digest.update(part)
            file.write(part)

        write(text.encode("ascii"))
        for i, tensor in enumerate(entries):
            buffer = tensor.buffer()
            start = json.dumps({"dtype": tensor.dtype, "shape": tensor.shape, "crc32": f"{zlib.crc32(buffer):08x}"})
            write(f'{"," if i else ""}\n  {json.dumps(tensor.name)}: {start[:-1]}, "data": "'.encode("ascii"))
            for at in range(0, len(buffer), 3 * _CHUNK):  # a multiple of 3 bytes: no padding inside
                write(binascii.b2a_base64(buffer[at : at + 3 * _CHUNK], newline=False))
            write(b'"}')
        write(b"\n }\n}\n")
        if check is not None:
            check(file.tell())
        file.seek(text.index(_NO_DIGEST))
        file.write(digest.hexdigest().encode("ascii"))
